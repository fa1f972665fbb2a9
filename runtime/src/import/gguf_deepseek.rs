//! GGUF metadata to the layers of DeepSeek-V2/V3 and of the families that took over their router.
//!
//! Keys and defaults are those of llama.cpp's loader (`src/models/deepseek2.cpp`, `glm4-moe.cpp`, `minimax-m2.cpp`, `ernie4-5.cpp`).
//! Files from before the split of `attn_kv_b` into `attn_k_b` and `attn_v_b` have no `key_length_mla`; their tensors are split here.

use super::families::{DeepSeek, Family};
use super::gguf::Keys;
use super::hf_deepseek::yarn_magnitude;
use crate::error::Result;
use crate::gguf::TensorInfo;
use tierwise_cost::model::{
    Attention, DenseFfn, Ffn, Geometry, Gqa, GroupScore, LayerSpec, Mla, Moe, QkNorm, Rope, RopeScaling, Router, RouterScore,
    Selection, SharedExperts,
};
use tierwise_cost::quant::QuantFormat;

/// The layers that text generation runs: those for multi-token prediction, which come last, are left out.
pub(super) fn layers(
    keys: &Keys<'_>,
    family: &Family,
    facts: DeepSeek,
    num_experts: u32,
    num_blocks: usize,
    tensors: &[TensorInfo],
) -> Result<Vec<LayerSpec>> {
    let prediction = keys.opt_u32("nextn_predict_layers")?.unwrap_or(0);
    let num_layers = num_blocks.checked_sub(prediction as usize).filter(|n| *n > 0).ok_or_else(|| {
        keys.refuse("nextn_predict_layers", prediction, &format!("fewer than the {num_blocks} blocks of the file"), "")
    })?;
    let has = |name: String| tensors.iter().any(|t| t.name == name);
    let attention = if facts.mla {
        Attention::Mla(mla(keys, family)?)
    } else {
        Attention::Gqa(gqa(keys, family, &|suffix| has(format!("blk.0.{suffix}")))?)
    };
    let leading_dense = keys.opt_u32("leading_dense_block_count")?.unwrap_or(0) as usize;
    let step = keys.opt_u32("interleave_moe_layer_step")?.unwrap_or(1).max(1) as usize;
    let mut layers = Vec::with_capacity(num_layers);
    for layer in 0..num_layers {
        let ffn = if layer < leading_dense || !(layer + 1).is_multiple_of(step) {
            Ffn::Dense(DenseFfn { inner_size: keys.per_layer("feed_forward_length", num_blocks)?[layer], gated: true })
        } else {
            let bias = has(format!("blk.{layer}.exp_probs_b.bias"));
            Ffn::Moe(moe(keys, facts, num_experts, bias)?)
        };
        layers.push(LayerSpec { attention: attention.clone(), ffn });
    }
    Ok(layers)
}

fn mla(keys: &Keys<'_>, family: &Family) -> Result<Mla> {
    let rotary = keys.u32("rope.dimension_count")?;
    let (key, value) = match keys.opt_u32("attention.key_length_mla")? {
        Some(key) => (key, keys.u32("attention.value_length_mla")?),
        None => (keys.u32("attention.key_length")?, keys.u32("attention.value_length")?),
    };
    let Some(nope) = key.checked_sub(rotary).filter(|n| *n > 0) else {
        return Err(keys.refuse("rope.dimension_count", rotary, &format!("less than the key length, {key}"), ""));
    };
    let (scaling, scale) = yarn(keys, key)?;
    let theta = keys.metadata.opt_f32(&keys.key("rope.freq_base"))?.unwrap_or(1e4);
    Ok(Mla {
        num_heads: keys.u32("attention.head_count")?,
        q_lora_rank: keys.opt_u32("attention.q_lora_rank")?,
        kv_lora_rank: keys.u32("attention.kv_lora_rank")?,
        qk_nope_head_dim: nope,
        qk_rope_head_dim: rotary,
        v_head_dim: value,
        rope: Rope { scaling, ..Rope::plain(theta, rotary, family.gguf_pairing) },
        scale,
    })
}

/// YaRN and the factor on scores that goes with it. In these files the magnitude is in that factor alone.
fn yarn(keys: &Keys<'_>, key_length: u32) -> Result<(Option<RopeScaling>, Option<f32>)> {
    match keys.metadata.opt_str(&keys.key("rope.scaling.type"))? {
        None | Some("none") => return Ok((None, None)),
        Some("yarn") => {}
        Some(other) => {
            return Err(keys.refuse("rope.scaling.type", format!("{other:?}"), "none or yarn", "not implemented here"));
        }
    }
    let number = |suffix: &str| keys.metadata.opt_f32(&keys.key(suffix));
    let factor = keys.metadata.get_f32(&keys.key("rope.scaling.factor"))?;
    let Some(log_multiplier) = number("rope.scaling.yarn_log_multiplier")? else {
        let found = "no key, though rope.scaling.type is yarn";
        let hint = "convert the model again: without it programs disagree on the scale of scores";
        return Err(keys.refuse("rope.scaling.yarn_log_multiplier", found, "0.1 x mscale_all_dim of the model's config", hint));
    };
    let scaling = RopeScaling::Yarn {
        factor,
        original_context: keys.u32("rope.scaling.original_context_length")?,
        beta_fast: number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        attention_factor: 1.0,
        truncate: true,
    };
    Ok((Some(scaling), Some(yarn_scale(factor, log_multiplier, key_length))))
}

/// The factor on scores. The converter writes 0.1 x mscale_all_dim as the multiplier.
pub(crate) fn yarn_scale(factor: f32, log_multiplier: f32, key_length: u32) -> f32 {
    let magnitude = yarn_magnitude(f64::from(factor), f64::from(log_multiplier) / 0.1);
    (magnitude * magnitude / f64::from(key_length).sqrt()) as f32
}

/// The multiplier that gives this factor on scores, to seven decimals: what models publish has fewer, and a factor made from a multiplier
/// gives that multiplier again.
pub(crate) fn yarn_log_multiplier(factor: f32, scale: f32, key_length: u32) -> f32 {
    let magnitude = (f64::from(scale) * f64::from(key_length).sqrt()).sqrt();
    if factor <= 1.0 { 0.1 } else { ((magnitude - 1.0) / f64::from(factor).ln() * 1e7).round() as f32 / 1e7 }
}

fn gqa(keys: &Keys<'_>, family: &Family, first_layer_has: &dyn Fn(&str) -> bool) -> Result<Gqa> {
    if let Some(kind) = keys.metadata.opt_str(&keys.key("rope.scaling.type"))?
        && kind != "none"
    {
        return Err(keys.refuse("rope.scaling.type", format!("{kind:?}"), "none", "not implemented for this architecture"));
    }
    let num_heads = keys.u32("attention.head_count")?;
    let head_dim = match keys.opt_u32("attention.key_length")? {
        Some(length) => length,
        None => keys.u32("embedding_length")?.checked_div(num_heads).unwrap_or(0),
    };
    let rotary = keys.opt_u32("rope.dimension_count")?.unwrap_or(head_dim);
    let theta = keys.metadata.opt_f32(&keys.key("rope.freq_base"))?.unwrap_or(1e4);
    let rope = Rope::plain(theta, rotary, family.gguf_pairing);
    let num_kv_heads = keys.opt_u32("attention.head_count_kv")?.unwrap_or(num_heads);
    // GLM-4.5 has the norms, GLM-4.5-Air does not, and no key says so.
    let optional_norm = family.qk_norm == QkNorm::PerHead && !first_layer_has("attn_q_norm.weight");
    Ok(Gqa {
        qkv_bias: first_layer_has("attn_q.bias"),
        qk_norm: if optional_norm { QkNorm::None } else { family.qk_norm },
        ..Gqa::plain(num_heads, num_kv_heads, head_dim, rope)
    })
}

fn moe(keys: &Keys<'_>, facts: DeepSeek, num_experts: u32, has_bias: bool) -> Result<Moe> {
    let inner_size = match keys.opt_u32("expert_feed_forward_length")? {
        Some(width) => width,
        None => keys.u32("feed_forward_length")?,
    };
    let count = keys.opt_u32("expert_shared_count")?.unwrap_or(0);
    let shared_width = keys.opt_u32("expert_shared_feed_forward_length")?.filter(|width| *width > 0);
    let shared = (count > 0).then(|| SharedExperts {
        count,
        inner_size: shared_width.unwrap_or_else(|| inner_size.saturating_mul(count)),
        sigmoid_gate: false,
    });
    let score = match keys.opt_u32("expert_gating_func")?.unwrap_or(0) {
        0 if facts.mla => RouterScore::Softmax,
        0 => facts.score,
        1 => RouterScore::Softmax,
        2 => RouterScore::Sigmoid,
        other => return Err(keys.refuse("expert_gating_func", other, "1 (softmax) or 2 (sigmoid)", "not implemented here")),
    };
    let groups = keys.opt_u32("expert_group_count")?.filter(|groups| *groups > 1);
    let groups = match groups {
        Some(groups) => Some((groups, keys.u32("expert_group_used_count")?)),
        None => None,
    };
    let normalize_topk = match facts.fixed_normalize_topk {
        Some(fixed) => fixed,
        None => keys.metadata.opt_bool(&keys.key("expert_weights_norm"))?.unwrap_or(false),
    };
    // 0 means "none" in llama.cpp.
    let scale = keys.metadata.opt_f32(&keys.key("expert_weights_scale"))?.filter(|s| *s != 0.0).unwrap_or(1.0);
    let router = Router {
        score,
        normalize_topk,
        scale,
        bias: false,
        // Every model with sigmoid scores has the bias; where the choice is by softmax the tensors say it.
        selection_bias: score == RouterScore::Sigmoid || has_bias,
        groups,
        group_score: group_score(score, groups),
        selection: Selection::TopK,
    };
    Ok(Moe { shared, ..Moe::plain(num_experts, keys.u32("expert_used_count")?, inner_size, router) })
}

/// DeepSeek-V2 goes by a group's best score, DeepSeek-V3 by the sum of its two best.
pub(super) fn group_score(score: RouterScore, groups: Option<(u32, u32)>) -> GroupScore {
    if groups.is_some() && score == RouterScore::Softmax { GroupScore::Max } else { GroupScore::default() }
}

/// The file's tensors as the model's table names them: without the layers for multi-token prediction, `attn_kv_b` split.
pub(super) fn tensors_of(geometry: &Geometry, found: &[TensorInfo]) -> Vec<TensorInfo> {
    let block_of = |t: &TensorInfo| t.name.strip_prefix("blk.").and_then(|n| n.split_once('.')?.0.parse::<usize>().ok());
    let mut tensors = Vec::with_capacity(found.len());
    for t in found {
        match block_of(t).map(|block| (block, geometry.layers.get(block))) {
            // Predicts the token after the next one; only speculative decoding has a use for it.
            Some((_, None)) => {}
            Some((block, Some(LayerSpec { attention: Attention::Mla(a), .. }))) if t.name.ends_with(".attn_kv_b.weight") => {
                let [heads, rank] = [a.num_heads, a.kv_lora_rank].map(u64::from);
                let [nope, value] = [a.qk_nope_head_dim, a.v_head_dim].map(u64::from);
                if t.shape != [heads * (nope + value), rank] {
                    tensors.push(t.clone());
                    continue;
                }
                let part = |name: &str, format: QuantFormat, rows: u64, cols: u64| TensorInfo {
                    name: format!("blk.{block}.{name}.weight"),
                    shape: vec![heads, rows, cols],
                    format,
                    bytes: format.tensor_bytes(&[heads, rows, cols]).unwrap_or(tierwise_cost::units::Bytes(0)).0,
                    ..t.clone()
                };
                tensors.push(part("attn_k_b", transposed_format(t.format), rank, nope));
                tensors.push(part("attn_v_b", t.format, value, rank));
            }
            _ => tensors.push(t.clone()),
        }
    }
    tensors
}

/// Plain elements can change places; blocks are decoded to halves.
fn transposed_format(format: QuantFormat) -> QuantFormat {
    match format {
        QuantFormat::F32 | QuantFormat::F16 | QuantFormat::BF16 => format,
        _ => QuantFormat::F16,
    }
}

/// `attn_k_b` and `attn_v_b` of an unsplit `attn_kv_b` (`data`, `[num_heads * (nope + v_head_dim), rank]`).
pub(crate) fn split_kv_b(a: &Mla, format: QuantFormat, data: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (heads, rank) = (a.num_heads as usize, a.kv_lora_rank as usize);
    let (nope, value) = (a.qk_nope_head_dim as usize, a.v_head_dim as usize);
    let row_bytes = data.len() / (heads * (nope + value));
    let to = transposed_format(format);
    let size = to.layout().bytes as usize;
    let mut k_b = Vec::with_capacity(heads * nope * rank * size);
    let mut v_b = Vec::with_capacity(heads * value * row_bytes);
    let mut plain = Vec::new();
    let mut row = vec![0.0; rank];
    for head in data.chunks_exact((nope + value) * row_bytes) {
        let (keys, values) = head.split_at(nope * row_bytes);
        v_b.extend_from_slice(values);
        plain.clear();
        for bytes in keys.chunks_exact(row_bytes) {
            if to == format {
                plain.extend_from_slice(bytes);
            } else {
                crate::quant::dequantize_row(format, bytes, &mut row);
                plain.extend(row.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()));
            }
        }
        super::convert_hf::transpose(&plain, nope, rank, size, &mut k_b);
    }
    (k_b, v_b)
}

/// Settings that have an effect and are not implemented.
pub(super) fn refuse_unimplemented(keys: &Keys<'_>) -> Result<()> {
    if let Some(scale) = keys.metadata.opt_f32(&keys.key("attention.temperature_scale"))?.filter(|s| *s != 0.0) {
        let hint = "queries that grow with their position are not implemented for this architecture";
        return Err(keys.refuse("attention.temperature_scale", scale, "no such key", hint));
    }
    if let Some(window) = keys.opt_u32("attention.sliding_window")?.filter(|w| *w != 0) {
        let hint = "sliding windows are not implemented for this architecture";
        return Err(keys.refuse("attention.sliding_window", window, "no such key", hint));
    }
    Ok(())
}
