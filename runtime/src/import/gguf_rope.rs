//! Stretched rotary frequencies that GGUF files hold as tensors: part of the geometry, not of the weights.
//!
//! `rope_freqs.weight` divides every frequency (Llama 3.1, Llama-4); `rope_factors_short.weight` and `rope_factors_long.weight` are the two
//! sets of LongRoPE (Phi), with `rope.scaling.original_context_length` and `rope.scaling.attn_factor` beside them.

use crate::error::{Result, RuntimeError};
use crate::gguf::{Gguf, Metadata, TensorInfo};
use std::path::Path;
use tierwise_cost::model::{Attention, Geometry, Gqa, RopeScaling};
use tierwise_cost::quant::QuantFormat;

const DIVISORS: &str = "rope_freqs.weight";
const SHORT: &str = "rope_factors_short.weight";
const LONG: &str = "rope_factors_long.weight";

/// Such a tensor: its name and elements.
pub(crate) type RopeTensor = (&'static str, Vec<f32>);

/// The tensors of this kind in a file, and its other tensors.
pub(super) fn split(gguf: &Gguf) -> Result<(Vec<RopeTensor>, Vec<TensorInfo>)> {
    let mut found = Vec::new();
    for name in [DIVISORS, SHORT, LONG] {
        found.extend(vector(gguf, name)?.map(|values| (name, values)));
    }
    let others = gguf.tensors().iter().filter(|t| found.iter().all(|(name, _)| t.name != *name)).cloned().collect();
    Ok((found, others))
}

/// The tensors of this kind that a file of the model has.
pub(crate) fn tensors_of(geometry: &Geometry) -> Vec<RopeTensor> {
    let scaling = geometry.layers.iter().find_map(|l| match &l.attention {
        Attention::Gqa(Gqa { rope: Some(rope), .. }) => rope.scaling.as_ref(),
        _ => None,
    });
    match scaling {
        Some(RopeScaling::Divisors { divisors }) => vec![(DIVISORS, divisors.clone())],
        Some(RopeScaling::LongRope { short_divisors, long_divisors, .. }) => {
            vec![(LONG, long_divisors.clone()), (SHORT, short_divisors.clone())]
        }
        _ => Vec::new(),
    }
}

/// Makes what the tensors say part of the geometry.
pub(super) fn apply(path: &Path, metadata: &Metadata, tensors: &[RopeTensor], geometry: &mut Geometry) -> Result<()> {
    let Some(scaling) = scaling(path, metadata, tensors)? else { return Ok(()) };
    for layer in &mut geometry.layers {
        if let Attention::Gqa(Gqa { rope: Some(rope), .. }) = &mut layer.attention {
            rope.scaling = Some(scaling.clone());
        }
    }
    super::check_geometry(path, geometry)
}

fn scaling(path: &Path, metadata: &Metadata, tensors: &[RopeTensor]) -> Result<Option<RopeScaling>> {
    let values = |name: &str| tensors.iter().find(|t| t.0 == name).map(|t| t.1.clone());
    match (values(DIVISORS), values(SHORT), values(LONG)) {
        (None, None, None) => Ok(None),
        (Some(divisors), None, None) => Ok(Some(RopeScaling::Divisors { divisors })),
        (None, Some(short_divisors), Some(long_divisors)) => {
            let architecture = metadata.get_str("general.architecture")?;
            let key = |suffix: &str| format!("{architecture}.{suffix}");
            let narrow = |key: &str, value: u64| {
                u32::try_from(value)
                    .map_err(|_| RuntimeError::bad_file(path, format!("{key} {value}"), "a number below 2^32", ""))
            };
            let original = key("rope.scaling.original_context_length");
            let original_context = narrow(&original, metadata.get_u64(&original)?)?;
            let factor = metadata.opt_f32(&key("rope.scaling.attn_factor"))?.filter(|f| *f != 0.0).unwrap_or(1.0);
            Ok(Some(RopeScaling::LongRope {
                original_context,
                short_divisors,
                long_divisors,
                short_attention_factor: factor,
                long_attention_factor: factor,
            }))
        }
        _ => {
            let found = format!("some of the tensors {DIVISORS}, {SHORT} and {LONG}");
            Err(RuntimeError::bad_file(path, found, "the first alone, or the two others", "convert the model again"))
        }
    }
}

fn vector(gguf: &Gguf, name: &str) -> Result<Option<Vec<f32>>> {
    let Some(info) = gguf.tensors().iter().find(|t| t.name == name) else { return Ok(None) };
    if info.format != QuantFormat::F32 || info.shape.len() != 1 {
        let found = format!("tensor {name} of shape {:?} in {}", info.shape, info.format);
        return Err(RuntimeError::bad_file(gguf.path(), found, "a vector in F32", "convert the model again"));
    }
    Ok(Some(gguf.data(info).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()))
}
