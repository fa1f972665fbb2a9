//! Metadata of a file that is to be written, judged by the importer before a byte is written.
//!
//! What the importer makes of the keys must be the geometry that they were made from, so that a model with a part that no key
//! expresses (a bias that the architecture does not have, another routing rule) is refused instead of becoming another model.

use super::gguf::spec_of;
use super::gguf_rope;
use crate::error::{Result, RuntimeError};
use crate::gguf::{Metadata, TensorInfo, Value};
use std::path::Path;
use tierwise_cost::model::{ModelSpec, TensorSpec};

/// Reads `keys` as the importer would and compares.
///
/// # Errors
/// [`RuntimeError::BadRequest`] when they stand for another model.
pub(crate) fn check_that_it_reads_back(spec: &ModelSpec, keys: &[(String, Value)], out: &Path) -> Result<()> {
    let mut metadata = Metadata::new(out);
    for (key, value) in keys {
        metadata.insert(key, value.clone())?;
    }
    let info = |t: &TensorSpec| TensorInfo {
        name: t.name.clone(),
        shape: t.shape.clone(),
        format: t.format,
        bytes: t.bytes.0,
        part: 0,
        offset: 0,
    };
    let tensors: Vec<TensorInfo> = spec.tensors.iter().map(info).collect();
    let reason = match spec_of(out, &metadata, &tensors, &gguf_rope::tensors_of(&spec.geometry)) {
        Ok(read) if read.geometry == spec.geometry => return Ok(()),
        Ok(_) => "its layers differ from what the architecture prescribes".to_string(),
        Err(error) => error.to_string(),
    };
    Err(RuntimeError::BadRequest {
        what: "model",
        found: format!("{}, which a GGUF file of architecture {} cannot express ({reason})", spec.name, spec.architecture),
        expected: "a model of that architecture".into(),
    })
}
