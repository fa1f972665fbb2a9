//! `config.json` of Qwen3-Next and Qwen3.5-MoE to layers: gated delta rule and gated attention in turn.
//!
//! Keys and defaults are those of transformers (`configuration_qwen3_next.py`, `configuration_qwen3_5_moe.py`).

use super::families::Variant;
use super::hf::{Config, is_sparse};
use super::hf_deepseek::{rope_kind, rope_settings, theta};
use crate::error::Result;
use serde_json::Value;
use tierwise_cost::model::{
    Attention, DeltaNet, DenseFfn, Ffn, Gqa, LayerSpec, Moe, QkNorm, Rope, RopePairing, Router, SharedExperts, ValueHeads,
};

/// Layer number `layer`.
pub(super) fn layer(config: &Config<'_>, variant: Variant, layer: u32) -> Result<LayerSpec> {
    let attention = if is_recurrent(config, layer)? { delta_net(config, variant)? } else { gated(config)? };
    Ok(LayerSpec { attention, ffn: ffn(config, variant, layer)? })
}

fn is_recurrent(config: &Config<'_>, layer: u32) -> Result<bool> {
    match config.get("layer_types").and_then(|t| t.get(layer as usize)).and_then(Value::as_str) {
        Some("linear_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        Some(other) => Err(config.refuse("layer_types", format!("{other:?}"), "linear_attention or full_attention", "")),
        None => {
            let interval = config.opt_u32("full_attention_interval")?.unwrap_or(4);
            if interval == 0 {
                return Err(config.refuse("full_attention_interval", 0, "1 or more", ""));
            }
            Ok(!(layer + 1).is_multiple_of(interval))
        }
    }
}

fn delta_net(config: &Config<'_>, variant: Variant) -> Result<Attention> {
    Ok(Attention::DeltaNet(DeltaNet {
        num_key_heads: config.u32("linear_num_key_heads")?,
        num_value_heads: config.u32("linear_num_value_heads")?,
        key_head_dim: config.u32("linear_key_head_dim")?,
        value_head_dim: config.u32("linear_value_head_dim")?,
        conv_kernel: config.opt_u32("linear_conv_kernel_dim")?.unwrap_or(4),
        fused_gates: variant == Variant::QwenNext,
        value_heads: ValueHeads::Grouped,
    }))
}

fn gated(config: &Config<'_>) -> Result<Attention> {
    let num_heads = config.u32("num_attention_heads")?;
    let head_dim = match config.opt_u32("head_dim")? {
        Some(head_dim) => head_dim,
        None => config.u32("hidden_size")?.checked_div(num_heads).unwrap_or(0),
    };
    let settings = rope_settings(config);
    if rope_kind(&settings) != "default" {
        let found = format!("of type {:?}", rope_kind(&settings));
        return Err(config.refuse("rope_scaling", found, "none", "not implemented for this family"));
    }
    let part = match settings.opt_f32("partial_rotary_factor")? {
        Some(part) => Some(part),
        None => config.opt_f32("partial_rotary_factor")?,
    };
    // Positions of text are the same in all sections of Qwen3.5's rotation, which makes it a plain one.
    let rotary_dim = (f64::from(head_dim) * f64::from(part.unwrap_or(0.25))) as u32;
    let rope = Rope::plain(theta(config, &settings)?, rotary_dim, RopePairing::Halves);
    let num_kv_heads = config.opt_u32("num_key_value_heads")?.unwrap_or(num_heads);
    Ok(Attention::Gqa(Gqa { output_gate: true, qk_norm: QkNorm::PerHead, ..Gqa::plain(num_heads, num_kv_heads, head_dim, rope) }))
}

fn ffn(config: &Config<'_>, variant: Variant, layer: u32) -> Result<Ffn> {
    if variant == Variant::QwenNext && !is_sparse(config, layer)? {
        return Ok(Ffn::Dense(DenseFfn { inner_size: config.u32("intermediate_size")?, gated: true }));
    }
    let (num_experts, used) = (config.u32("num_experts")?, config.u32("num_experts_per_tok")?);
    let shared = SharedExperts { count: 1, inner_size: config.u32("shared_expert_intermediate_size")?, sigmoid_gate: true };
    let moe = Moe::plain(num_experts, used, config.u32("moe_intermediate_size")?, Router::softmax(true));
    Ok(Ffn::Moe(Moe { shared: Some(shared), ..moe }))
}
