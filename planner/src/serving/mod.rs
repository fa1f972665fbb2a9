//! Requests that arrive over time: continuous batching with keys and values and experts sharing the memory.
//!
//! * [`arrivals`]: traces of requests; [`steps`]: seconds of a step, from the plan's prices at the step's own batch and positions.
//! * [`memory`]: bytes of keys and values; [`admission`]: who may start; [`mod@simulate`]: the virtual clock.
//! * [`metrics`]: what a user feels; [`load`]: how much load a plan carries under limits on it, in one sentence.
//!
//! Metrics and admission follow algorithms §9; definitions stand where they are computed.

pub mod admission;
pub mod arrivals;
pub mod load;
pub mod memory;
pub mod metrics;
pub mod simulate;
pub mod steps;

pub use admission::Admission;
pub use arrivals::{Arrival, Arrivals};
pub use load::{LoadPoint, Serving, ServingReport, Slo, study_load};
pub use metrics::Metrics;
pub use simulate::{Config, Outcome, simulate};
pub use steps::{StepSeconds, StepTable};
