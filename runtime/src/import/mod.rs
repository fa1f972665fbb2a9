//! File metadata to [`tierwise_cost::model::ModelSpec`], checked against the tensors.
//!
//! * [`families`]: the table of architectures; adding a family whose maths exists is one row there.
//! * [`gguf`]: GGUF files. * [`hf`]: `config.json`. * [`hf_weights`]: safetensors folders, `hf_names`: what they call a tensor.
//! * `gguf_deepseek`, `hf_deepseek`: the same for DeepSeek and those who took over its router. * [`convert_hf`]: tensors made at load.
//! * `gguf_delta`, `hf_delta`, `gguf_variants`, `hf_variants`: families with parts of their own.
//! * `routing_rules`: keys of our own for rules that no published model has.
//! * `gguf_keys`, `gguf_rope`, `read_back`: the way back, for files that are written.
//! * [`source`]: what a user may name on the command line. * [`configs`]: the descriptions built into the binary.
//!
//! An importer never guesses: a key it needs and does not find, a tensor too many or too few, a rope scaling that is not
//! implemented, each is an error that names it.

pub mod configs;
pub mod convert_hf;
pub mod families;
pub mod gguf;
mod gguf_deepseek;
mod gguf_delta;
pub(crate) mod gguf_keys;
pub(crate) mod gguf_rope;
mod gguf_variants;
pub mod hf;
mod hf_deepseek;
mod hf_delta;
mod hf_names;
mod hf_variants;
pub mod hf_weights;
pub(crate) mod read_back;
pub(crate) mod routing_rules;
pub mod source;
mod tensors;

pub(crate) use gguf_deepseek::{split_kv_b, yarn_log_multiplier, yarn_scale};
pub use hf_weights::HfFolder;
pub use source::ModelSource;

use crate::error::RuntimeError;
use std::path::Path;
use tierwise_cost::CostError;
use tierwise_cost::model::Geometry;

/// [`Geometry::check`], with the file's path in the message.
fn check_geometry(path: &Path, geometry: &Geometry) -> Result<(), RuntimeError> {
    geometry.check().map_err(|e| match e {
        CostError::BadModel { field, found, expected, .. } => RuntimeError::bad_file(
            path,
            format!("{field} {found}"),
            expected,
            "the file's metadata is damaged or not a language model's",
        ),
        other => other.into(),
    })
}
