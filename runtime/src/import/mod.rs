//! File metadata to [`tierwise_cost::model::ModelSpec`], checked against the tensors.
//!
//! * [`families`]: the table of architectures; adding a family whose maths exists is one row there.
//! * [`gguf`]: GGUF files. * [`hf`]: `config.json`. * [`hf_weights`]: safetensors folders.
//! * [`source`]: what a user may name on the command line. * [`configs`]: the descriptions built into the binary.
//!
//! An importer never guesses: a key it needs and does not find, a tensor too many or too few, a rope scaling that is not
//! implemented, each is an error that names it.

pub mod configs;
pub mod families;
pub mod gguf;
pub mod hf;
pub mod hf_weights;
pub mod source;
mod tensors;

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
