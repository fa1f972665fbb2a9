//! A Hugging Face `config.json` to the layers of families with parts of their own: gpt-oss, Granite, Phi-3.5-MoE, Hunyuan, Llama-4.
//!
//! Keys, defaults and formulas are those of transformers (`models/*/configuration_*.py`, `modeling_*.py`, `modeling_rope_utils.py`).

use super::families::Variant;
use super::hf::Config;
use super::hf_deepseek::{rope_kind, rope_settings, theta, yarn};
use super::hf_delta;
use crate::error::Result;
use serde_json::Value;
use tierwise_cost::model::{
    Activation, Attention, DenseFfn, Ffn, Gqa, LayerSpec, Moe, NormKind, QkNorm, Rope, RopePairing, RopeScaling, Router,
    RouterScore, Scales, SharedExperts, Temperature,
};

/// What a family's reader says of a model.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) layers: Vec<LayerSpec>,
    pub(super) norm: NormKind,
    pub(super) output_bias: bool,
    pub(super) scales: Scales,
}

/// Steepness of gpt-oss's activation, which its implementations hold as a constant.
pub(super) const SWIGLU_ALPHA: f32 = 1.702;
/// Where it is cut when nothing is said.
pub(super) const SWIGLU_LIMIT: f32 = 7.0;

/// The model.
pub(super) fn parts(config: &Config<'_>, variant: Variant, num_layers: u32) -> Result<Parts> {
    refuse_unimplemented(config, variant)?;
    let mut layers = Vec::with_capacity(num_layers as usize);
    for layer in 0..num_layers {
        let (attention, ffn) = match variant {
            Variant::QwenNext | Variant::Qwen35 => {
                layers.push(hf_delta::layer(config, variant, layer)?);
                continue;
            }
            Variant::GptOss => (gpt_oss_attention(config, layer)?, gpt_oss_ffn(config)?),
            Variant::Granite => (granite_attention(config)?, granite_ffn(config)?),
            Variant::Phi => (phi_attention(config)?, phi_ffn(config)?),
            Variant::Hunyuan => (hunyuan_attention(config)?, hunyuan_ffn(config, layer)?),
            Variant::Llama4 => (llama4_attention(config, layer)?, llama4_ffn(config, layer)?),
        };
        layers.push(LayerSpec { attention: Attention::Gqa(attention), ffn });
    }
    let mut parts = Parts { layers, ..Parts::default() };
    match variant {
        Variant::Granite => {
            let factor = |key| Ok::<_, crate::error::RuntimeError>(config.opt_f32(key)?.unwrap_or(1.0));
            let logits_scaling = factor("logits_scaling")?;
            parts.scales = Scales {
                embedding: factor("embedding_multiplier")?,
                residual: factor("residual_multiplier")?,
                logits: 1.0 / logits_scaling,
                logits_softcap: None,
            };
        }
        Variant::Phi => {
            parts.norm = NormKind::Layer;
            parts.output_bias = config.opt_bool("lm_head_bias")?.unwrap_or(false);
        }
        Variant::GptOss | Variant::Hunyuan | Variant::Llama4 | Variant::QwenNext | Variant::Qwen35 => {}
    }
    Ok(parts)
}

/// Settings that have an effect and are not implemented.
fn refuse_unimplemented(config: &Config<'_>, variant: Variant) -> Result<()> {
    let any: &[(&str, Value, &str)] = &[("hidden_act", "silu".into(), "this activation is not implemented")];
    let own: &[(&str, Value, &str)] = match variant {
        Variant::GptOss => &[("attention_bias", true.into(), "this family's projections have biases")],
        Variant::Granite => &[
            ("attention_bias", false.into(), "biases are not implemented for this family"),
            ("shared_intermediate_size", 0.into(), "shared experts are not implemented for this family"),
        ],
        Variant::Phi => &[("router_jitter_noise", 0.01.into(), "the choice of experts is implemented with this value")],
        Variant::Hunyuan => &[
            ("attention_bias", false.into(), "biases are not implemented for this family"),
            ("mlp_bias", false.into(), "biases are not implemented for this family"),
            ("use_cla", false.into(), "attention that shares keys and values between layers is not implemented"),
            ("norm_topk_prob", true.into(), "weights that are not divided by their sum are not implemented for this family"),
        ],
        Variant::Llama4 => &[
            ("attention_bias", false.into(), "biases are not implemented for this family"),
            ("for_llm_compressor", false.into(), "experts in another layout are not implemented"),
        ],
        Variant::QwenNext | Variant::Qwen35 => &[
            ("attention_bias", false.into(), "biases are not implemented for this family"),
            ("norm_topk_prob", true.into(), "weights that are not divided by their sum are not implemented for this family"),
        ],
    };
    for (key, value, hint) in any.iter().chain(own) {
        if let Some(found) = config.get(key)
            && found != value
        {
            return Err(config.refuse(key, found, &value.to_string(), hint));
        }
    }
    Ok(())
}

/// Heads of a layer, without rotation.
fn heads(config: &Config<'_>) -> Result<(u32, u32, u32)> {
    let num_heads = config.u32("num_attention_heads")?;
    let head_dim = match config.opt_u32("head_dim")? {
        Some(head_dim) => head_dim,
        None => config.u32("hidden_size")?.checked_div(num_heads).unwrap_or(0),
    };
    Ok((num_heads, config.opt_u32("num_key_value_heads")?.unwrap_or(num_heads), head_dim))
}

fn plain(config: &Config<'_>, pairing: RopePairing) -> Result<Gqa> {
    let (num_heads, num_kv_heads, head_dim) = heads(config)?;
    let settings = rope_settings(config);
    Ok(Gqa::plain(num_heads, num_kv_heads, head_dim, Rope::plain(theta(config, &settings)?, head_dim, pairing)))
}

/// Refuses every kind of stretched frequencies.
fn refuse_scaling(config: &Config<'_>) -> Result<()> {
    let settings = rope_settings(config);
    match rope_kind(&settings) {
        "default" => Ok(()),
        kind => Err(config.refuse("rope_scaling", format!("of type {kind:?}"), "none", "not implemented for this family")),
    }
}

fn kind_of_layer<'a>(config: &'a Config<'_>, layer: u32) -> Option<&'a str> {
    config.get("layer_types").and_then(|t| t.get(layer as usize)).and_then(Value::as_str)
}

fn gpt_oss_attention(config: &Config<'_>, layer: u32) -> Result<Gqa> {
    let mut a = plain(config, RopePairing::Halves)?;
    let settings = rope_settings(config);
    match rope_kind(&settings) {
        "default" => {}
        "yarn" => {
            let (scaling, _) = yarn(config, &settings)?;
            a.rope.as_mut().expect("rotated").scaling = Some(scaling);
        }
        other => return Err(config.refuse("rope_scaling", format!("of type {other:?}"), "yarn or none", "not implemented here")),
    }
    let windowed = match kind_of_layer(config, layer) {
        Some("full_attention") => false,
        Some("sliding_attention") => true,
        Some(other) => return Err(config.refuse("layer_types", format!("{other:?}"), "full_attention or sliding_attention", "")),
        None => layer.is_multiple_of(2),
    };
    a.sliding_window = if windowed { Some(config.u32("sliding_window")?) } else { None };
    Ok(Gqa { qkv_bias: true, output_bias: true, sinks: true, ..a })
}

fn gpt_oss_ffn(config: &Config<'_>) -> Result<Ffn> {
    let limit = config.opt_f32("swiglu_limit")?.unwrap_or(SWIGLU_LIMIT);
    let router = Router { bias: true, ..Router::softmax(true) };
    Ok(Ffn::Moe(Moe {
        activation: Activation::ClampedSwiglu { alpha: SWIGLU_ALPHA, limit },
        expert_bias: true,
        ..moe(config, router)?
    }))
}

/// Experts under the names that most of these families use.
fn moe(config: &Config<'_>, router: Router) -> Result<Moe> {
    let num_experts = config.u32("num_local_experts")?;
    Ok(Moe::plain(num_experts, config.u32("num_experts_per_tok")?, config.u32("intermediate_size")?, router))
}

fn granite_attention(config: &Config<'_>) -> Result<Gqa> {
    refuse_scaling(config)?;
    Ok(Gqa { scale: Some(config.opt_f32("attention_multiplier")?.unwrap_or(1.0)), ..plain(config, RopePairing::Halves)? })
}

fn granite_ffn(config: &Config<'_>) -> Result<Ffn> {
    // A softmax over the chosen experts' logits is the softmax over all of them divided by the chosen ones' sum.
    Ok(Ffn::Moe(moe(config, Router::softmax(true))?))
}

fn phi_attention(config: &Config<'_>) -> Result<Gqa> {
    let mut a = plain(config, RopePairing::Halves)?;
    let settings = rope_settings(config);
    match rope_kind(&settings) {
        "default" => {}
        "longrope" => a.rope.as_mut().expect("rotated").scaling = Some(long_rope(config, &settings)?),
        other => {
            return Err(config.refuse("rope_scaling", format!("of type {other:?}"), "longrope or none", "not implemented here"));
        }
    }
    let bias = config.opt_bool("attention_bias")?.unwrap_or(false);
    // A window that is as long as the context is none.
    let context = config.u32("max_position_embeddings")?;
    let window = config.opt_u32("sliding_window")?.filter(|w| *w > 0 && *w < context);
    Ok(Gqa { qkv_bias: bias, output_bias: bias, sliding_window: window, ..a })
}

fn long_rope(config: &Config<'_>, settings: &Config<'_>) -> Result<RopeScaling> {
    let list = |key: &str| {
        let Some(value) = settings.get(key) else {
            return Err(config.refuse(key, "is absent", "a list of factors, one per pair of dimensions", ""));
        };
        let numbers = value.as_array().and_then(|a| a.iter().map(|x| x.as_f64().map(|x| x as f32)).collect::<Option<Vec<_>>>());
        numbers.ok_or_else(|| config.refuse(key, value, "a list of numbers", ""))
    };
    let original_context = match settings.opt_u32("original_max_position_embeddings")? {
        Some(n) => n,
        None => config.u32("original_max_position_embeddings")?,
    };
    let ratio = f64::from(config.u32("max_position_embeddings")?) / f64::from(original_context.max(1));
    let usual = if ratio <= 1.0 { 1.0 } else { (1.0 + ratio.ln() / f64::from(original_context.max(2)).ln()).sqrt() } as f32;
    let stated = settings.opt_f32("attention_factor")?.unwrap_or(usual);
    Ok(RopeScaling::LongRope {
        original_context,
        short_divisors: list("short_factor")?,
        long_divisors: list("long_factor")?,
        short_attention_factor: settings.opt_f32("short_mscale")?.unwrap_or(stated),
        long_attention_factor: settings.opt_f32("long_mscale")?.unwrap_or(stated),
    })
}

fn phi_ffn(config: &Config<'_>) -> Result<Ffn> {
    Ok(Ffn::Moe(moe(config, Router { score: RouterScore::SparseMixer, ..Router::softmax(false) })?))
}

fn hunyuan_attention(config: &Config<'_>) -> Result<Gqa> {
    let mut a = plain(config, RopePairing::Halves)?;
    let settings = rope_settings(config);
    match rope_kind(&settings) {
        "default" => {}
        "dynamic" => {
            // With an alpha the base is raised once for all lengths; without one it would change as the context grows.
            let Some(alpha) = settings.opt_f32("alpha")?.filter(|alpha| *alpha > 0.0) else {
                return Err(config.refuse("rope_scaling", "of type dynamic without alpha", "an alpha", "not implemented here"));
            };
            let rope = a.rope.as_mut().expect("rotated");
            let dim = f64::from(a.head_dim);
            rope.theta = (f64::from(rope.theta) * f64::from(alpha).powf(dim / (dim - 2.0))) as f32;
        }
        other => {
            return Err(config.refuse("rope_scaling", format!("of type {other:?}"), "dynamic or none", "not implemented here"));
        }
    }
    let normed = config.opt_bool("use_qk_norm")?.unwrap_or(true);
    let qk_norm = if normed { QkNorm::PerHead } else { QkNorm::None };
    Ok(Gqa { qk_norm, qk_norm_after_rope: normed, ..a })
}

/// A number, or one per layer.
pub(super) fn per_layer(config: &Config<'_>, key: &str, layer: u32) -> Result<u32> {
    match config.get(key).and_then(Value::as_array) {
        None => config.u32(key),
        Some(list) => {
            let value = list.get(layer as usize).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
            value.ok_or_else(|| config.refuse(key, format!("{list:?}"), &format!("a number for layer {layer}"), ""))
        }
    }
}

fn hunyuan_ffn(config: &Config<'_>, layer: u32) -> Result<Ffn> {
    let inner_size = config.u32("intermediate_size")?;
    if let Some(widths) = config.get("moe_intermediate_size")
        && per_layer(config, "moe_intermediate_size", layer)? != inner_size
    {
        let expected = format!("{inner_size}, the intermediate_size, in every layer");
        return Err(config.refuse("moe_intermediate_size", widths, &expected, "the reference implementation knows no other"));
    }
    let moe = Moe::plain(
        per_layer(config, "num_experts", layer)?,
        per_layer(config, "moe_topk", layer)?,
        inner_size,
        Router::softmax(true),
    );
    // One of the width of an expert, however many are stated.
    let shared = Some(SharedExperts { count: 1, inner_size, sigmoid_gate: false });
    Ok(Ffn::Moe(Moe { shared, ..moe }))
}

fn llama4_attention(config: &Config<'_>, layer: u32) -> Result<Gqa> {
    let mut a = plain(config, RopePairing::Interleaved)?;
    let listed = config.get("no_rope_layers").and_then(Value::as_array).filter(|l| !l.is_empty());
    // The list says 1 where there is a rotation; without one every fourth layer has none.
    let rotated = match listed {
        Some(list) => list.get(layer as usize).and_then(Value::as_u64).unwrap_or(1) == 1,
        None => !(layer + 1).is_multiple_of(config.opt_u32("no_rope_layer_interval")?.unwrap_or(4).max(1)),
    };
    if !rotated {
        a.rope = None;
        if config.opt_bool("attn_temperature_tuning")?.unwrap_or(true) {
            let scale = config.opt_f32("attn_scale")?.unwrap_or(0.1);
            let period = config.opt_f32("floor_scale")?.unwrap_or(8192.0) as u32;
            a.temperature = Some(Temperature { scale, period });
        }
        return Ok(a);
    }
    a.chunk = Some(config.opt_u32("attention_chunk_size")?.unwrap_or(8192));
    let settings = rope_settings(config);
    match rope_kind(&settings) {
        "default" => {}
        "llama3" => {
            let number =
                |key| settings.opt_f32(key)?.ok_or_else(|| config.refuse(key, "is absent", "a number", "rope_scaling needs it"));
            a.rope.as_mut().expect("rotated").scaling = Some(RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_context: settings.u32("original_max_position_embeddings")?,
            });
        }
        other => {
            return Err(config.refuse("rope_scaling", format!("of type {other:?}"), "llama3 or none", "not implemented here"));
        }
    }
    let normed = config.opt_bool("use_qk_norm")?.unwrap_or(true);
    let qk_norm = if normed { QkNorm::Unweighted } else { QkNorm::None };
    Ok(Gqa { qk_norm, qk_norm_after_rope: normed, ..a })
}

fn llama4_ffn(config: &Config<'_>, layer: u32) -> Result<Ffn> {
    let step = config.opt_u32("interleave_moe_layer_step")?.unwrap_or(1).max(1);
    let sparse = match config.get("moe_layers").and_then(Value::as_array) {
        Some(list) => list.iter().any(|l| l.as_u64() == Some(u64::from(layer))),
        None => (layer + 1).is_multiple_of(step),
    };
    if !sparse {
        return Ok(Ffn::Dense(DenseFfn { inner_size: config.u32("intermediate_size_mlp")?, gated: true }));
    }
    let router = Router { score: RouterScore::Sigmoid, ..Router::softmax(false) };
    let moe = moe(config, router)?;
    let shared = Some(SharedExperts { count: 1, inner_size: moe.inner_size, sigmoid_gate: false });
    Ok(Ffn::Moe(Moe { weights_on_input: true, shared, ..moe }))
}
