//! The metadata of synthetic files of families with layers of their own: the keys of `import/gguf_keys.rs`.

use super::metadata::general_keys;
use super::vocabulary;
use crate::error::Result;
use crate::gguf::Value;
use crate::import::families::Family;
use crate::import::gguf_keys;
use crate::import::read_back::check_that_it_reads_back;
use std::path::Path;
use tierwise_cost::model::{Geometry, ModelSpec};
use tierwise_cost::recipe::Recipe;

/// The model that will be written and its metadata.
pub(super) fn describe(
    geometry: &Geometry,
    family: &Family,
    recipe: &Recipe,
    out: &Path,
) -> Result<(ModelSpec, Vec<(String, Value)>)> {
    let geometry = gguf_keys::as_in_gguf(family, geometry);
    let mut keys = general_keys(&geometry, recipe);
    let mut arch = |suffix: &str, value| keys.push((format!("{}.{suffix}", geometry.architecture), value));
    gguf_keys::write(family, &geometry, &mut arch)?;
    keys.extend(vocabulary::keys(geometry.vocab_size)?);
    let spec = ModelSpec::with_recipe(geometry, recipe)?;
    check_that_it_reads_back(&spec, &keys, out)?;
    Ok((spec, keys))
}
