//! What a model, a machine and an operation are, and what an operation costs.
//!
//! This crate is arithmetic over descriptions: it has no clock, opens no file and starts no thread.
//!
//! * [`quant`]: the one table of weight formats; sizes come from nowhere else.
//! * [`model`]: [`model::ModelSpec`], geometry plus the tensor table derived from it.
//! * [`recipe`]: which format each tensor gets under a name such as `Q4_K_M`.
//! * [`machine`]: processors, memories and links, every number with its source.
//! * [`op`]: the one lowering from (model, batch) to operations; executed, priced and measured.
//! * [`cost`]: seconds for an operation or a transfer, with the source of the estimate.
//! * [`units`]: newtypes for bytes, rates and times, and their text forms (`"24 GiB"`, `"64 GB/s"`).

#![forbid(unsafe_code)]

pub mod cost;
pub mod error;
pub mod machine;
pub mod model;
pub mod op;
pub mod quant;
pub mod recipe;
pub mod units;

pub use error::CostError;
