//! The tensors of a GGUF file against the table that its geometry implies.
//!
//! The file's order does not matter; its formats are taken over. Everything else must agree: a missing, superfluous or
//! misshapen tensor means that the file is damaged or that its architecture has a part that is not implemented, and running it
//! would give wrong text without a word.

use crate::error::{Result, RuntimeError};
use crate::gguf::TensorInfo;
use std::collections::HashMap;
use std::path::Path;
use tierwise_cost::model::{Geometry, TensorRole, TensorShape, TensorSpec, tensor_shapes};
use tierwise_cost::quant::QuantFormat;

/// The expected tensors, in table order, with the file's formats.
pub(super) fn match_tensors(path: &Path, geometry: &Geometry, found: &[TensorInfo]) -> Result<Vec<TensorSpec>> {
    let mut by_name: HashMap<&str, &TensorInfo> = found.iter().map(|t| (t.name.as_str(), t)).collect();
    let mut specs = Vec::with_capacity(found.len());
    for expected in tensor_shapes(geometry) {
        let Some(info) = by_name.remove(expected.name.as_str()) else {
            return Err(missing(path, &expected, &by_name));
        };
        check_shape(path, &expected, info)?;
        check_format(path, &expected, info.format)?;
        specs.push(TensorSpec::new(expected, info.format)?);
    }
    match found.iter().find(|t| by_name.contains_key(t.name.as_str())) {
        Some(extra) => Err(superfluous(path, geometry, extra, by_name.len())),
        None => Ok(specs),
    }
}

/// Refuses a shape other than the expected one; leading dimensions of one do not count.
pub(super) fn check_shape(path: &Path, expected: &TensorShape, info: &TensorInfo) -> Result<()> {
    let squeezed = |shape: &[u64]| shape.iter().copied().skip_while(|d| *d == 1).collect::<Vec<_>>();
    // Only a vector may carry an extra dimension: the shared expert's gate is [hidden] in some files and [1, hidden] in others.
    let same = info.shape == expected.shape || (expected.shape.len() == 1 && squeezed(&info.shape) == squeezed(&expected.shape));
    if same {
        return Ok(());
    }
    Err(RuntimeError::bad_file(
        path,
        format!("tensor {} of shape {:?}", info.name, info.shape),
        format!("shape {:?} (outermost first), as the model's sizes say", expected.shape),
        "metadata and tensors contradict each other: convert the model again",
    ))
}

/// Vectors (norms, biases) are added or multiplied element by element, which has kernels for plain floats only.
pub(super) fn check_format(path: &Path, expected: &TensorShape, format: QuantFormat) -> Result<()> {
    let is_vector = expected.shape.len() == 1 || expected.role.is_elementwise();
    if !is_vector || matches!(format, QuantFormat::F32 | QuantFormat::F16 | QuantFormat::BF16) {
        return Ok(());
    }
    Err(RuntimeError::bad_file(
        path,
        format!("vector {} stored as {format}", expected.name),
        "F32, F16 or BF16",
        "quantise matrices only",
    ))
}

fn missing(path: &Path, expected: &TensorShape, rest: &HashMap<&str, &TensorInfo>) -> RuntimeError {
    let layer = expected.layer.unwrap_or(0);
    let has = |suffix: &str| rest.contains_key(format!("blk.{layer}.{suffix}").as_str());
    let hint = match expected.role {
        TensorRole::ExpertGate | TensorRole::ExpertUp | TensorRole::ExpertDown if has("ffn_gate.0.weight") => {
            "the file stores each expert in its own tensor, a layout given up in 2024: download a newer conversion or convert the \
             model again with a current convert_hf_to_gguf.py"
        }
        TensorRole::ExpertGate | TensorRole::ExpertUp if has("ffn_gate_up_exps.weight") => {
            "gate and up projections are fused into ffn_gate_up_exps, which is not supported: convert the model again without fusing"
        }
        TensorRole::AttentionQ if has("attn_qkv.weight") => {
            "q, k and v projections are fused into attn_qkv, which is not supported: convert the model again without fusing"
        }
        _ => "the file is incomplete: download or convert the model again",
    };
    RuntimeError::bad_file(path, format!("no tensor {}", expected.name), format!("one of shape {:?}", expected.shape), hint)
}

fn superfluous(path: &Path, geometry: &Geometry, extra: &TensorInfo, count: usize) -> RuntimeError {
    let more = if count > 1 { format!(" and {} more unknown ones", count - 1) } else { String::new() };
    let hint = if extra.name.starts_with("rope_f") || extra.name.contains(".rope_f") {
        "the model scales its rotary frequencies (Llama 3.1, LongRoPE), which is not implemented"
    } else if extra.name.ends_with(".bias") {
        "biases at this place are not implemented"
    } else {
        "the model has a part that is not implemented, or the file was put together wrongly"
    };
    RuntimeError::bad_file(
        path,
        format!("tensor {} of shape {:?}{more}", extra.name, extra.shape),
        format!("only the tensors of architecture {} with {} layers", geometry.architecture, geometry.layers.len()),
        hint,
    )
}
