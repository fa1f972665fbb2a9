//! Renumbers the experts of a GGUF model, so that an engine without placement input gets a placement for free.
//!
//! Engines that spread experts over devices in order (or cut tensors at their expert axis) put experts 0 to n - 1 on the first device. If
//! the file's experts are in the order of the plan, that is the plan. Everything that has an axis of experts is renumbered alike: expert
//! matrices and biases, the router's rows and bias, the selection bias; the model computes the same.

use crate::error::{Result, RuntimeError};
use crate::gguf::{Gguf, GgufWriter};
use std::collections::BTreeMap;
use std::path::Path;

/// The writer states the alignment itself.
const ALIGNMENT_KEY: &str = "general.alignment";

/// The tensors of a block whose outermost axis is experts, after `blk.N.`.
fn has_expert_axis(rest: &str) -> bool {
    let Some((name, kind)) = rest.rsplit_once('.') else { return false };
    let known = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps", "ffn_gate_inp", "exp_probs_b"];
    known.contains(&name) && ["weight", "bias"].contains(&kind)
}

/// Block number and the rest of a tensor's name.
fn block_of(name: &str) -> Option<(u32, &str)> {
    let (number, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

/// Refuses orders that are no permutations.
///
/// # Errors
/// [`RuntimeError::BadRequest`] naming the layer.
pub(crate) fn check_order(order: &BTreeMap<u32, Vec<u16>>) -> Result<()> {
    for (layer, row) in order {
        let mut seen = vec![false; row.len()];
        let fresh = |e: &u16| seen.get_mut(usize::from(*e)).is_some_and(|s| !std::mem::replace(s, true));
        if row.is_empty() || !row.iter().all(fresh) {
            return Err(RuntimeError::BadRequest {
                what: "order of experts",
                found: format!("{row:?} in layer {layer}"),
                expected: format!("every expert from 0 to {} once: no replicas", row.len().saturating_sub(1)),
            });
        }
    }
    Ok(())
}

/// Copies a model with its experts in another order: place i of layer l gets expert `order[l][i]` of the old file. Layers without an
/// entry stay. Returns the new file's size.
///
/// # Errors
/// [`RuntimeError::BadRequest`] when an order is no permutation, names a layer without experts, or a tensor cannot be renumbered.
pub fn permute_experts(gguf: &Gguf, order: &BTreeMap<u32, Vec<u16>>, out: &Path) -> Result<u64> {
    let bad = |what: &'static str, found: String, expected: String| Err(RuntimeError::BadRequest { what, found, expected });
    let mut touched: BTreeMap<u32, usize> = order.keys().map(|l| (*l, 0)).collect();
    check_order(order)?;
    if let Some(t) = gguf.tensors().iter().find(|t| t.name.contains("chexps")) {
        return bad("model", format!("grouped experts ({})", t.name), "experts of a layer in one tensor per matrix".into());
    }
    let mut writer = GgufWriter::new(out, gguf.alignment())?;
    for (key, value) in gguf.metadata().iter() {
        // A split model becomes one file.
        if key != ALIGNMENT_KEY && !key.starts_with("split.") {
            writer.meta(key, value.clone())?;
        }
    }
    for t in gguf.tensors() {
        writer.tensor(&t.name, &t.shape, t.format)?;
    }
    let mut data = writer.start()?;
    for t in gguf.tensors() {
        let bytes = gguf.data(t);
        let row = block_of(&t.name)
            .filter(|(_, rest)| has_expert_axis(rest))
            .and_then(|(layer, rest)| Some((layer, rest, order.get(&layer)?)));
        let Some((layer, rest, row)) = row else {
            data.write(&t.name, bytes)?;
            continue;
        };
        // One dimension: biases, one number per expert; else an expert's part is contiguous.
        let experts = row.len();
        if t.shape.first() != Some(&(experts as u64)) || !bytes.len().is_multiple_of(experts) {
            return bad(
                "order of experts",
                format!("{experts} experts for {} of shape {:?}", t.name, t.shape),
                "as many as the tensor has".into(),
            );
        }
        if t.shape.len() == 1 && t.format.layout().elems != 1 {
            return bad(
                "model",
                format!("{} in blocks of {}", t.name, t.format),
                "plain numbers: blocks hold several experts".into(),
            );
        }
        let part = bytes.len() / experts;
        for e in row {
            data.write(&t.name, &bytes[usize::from(*e) * part..(usize::from(*e) + 1) * part])?;
        }
        *touched.entry(layer).or_default() += usize::from(!rest.starts_with("ffn_gate_inp") && !rest.starts_with("exp_probs"));
    }
    if let Some((layer, _)) = touched.iter().find(|(_, n)| **n == 0) {
        return bad("order of experts", format!("one for layer {layer}"), "layers that have experts in the model".into());
    }
    data.finish()
}
