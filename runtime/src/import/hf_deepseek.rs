//! A Hugging Face `config.json` to the layers of DeepSeek-V2/V3, Kimi-K2, Moonlight and of the families that took over their router
//! (GLM-4.5/4.6, MiniMax-M2, ERNIE-4.5).
//!
//! Keys and defaults are those of transformers' configuration classes; formulas those of `modeling_deepseek_v3.py` and
//! `modeling_rope_utils.py`.

use super::families::{DeepSeek, Family};
use super::gguf_deepseek::group_score;
use super::hf::Config;
use crate::error::Result;
use serde_json::Value;
use tierwise_cost::model::{
    Attention, DenseFfn, Ffn, Gqa, LayerSpec, Mla, Moe, QkNorm, Rope, RopePairing, RopeScaling, Router, RouterScore, Selection,
    SharedExperts,
};

/// What YaRN multiplies queries and keys with so that attention keeps its sharpness.
pub(super) fn yarn_magnitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// One layer.
pub(super) fn layer(config: &Config<'_>, family: &Family, facts: DeepSeek, layer: u32) -> Result<LayerSpec> {
    let attention = if facts.mla { Attention::Mla(mla(config)?) } else { Attention::Gqa(gqa(config, family)?) };
    let ffn = if has_experts(config, family, layer)? {
        Ffn::Moe(moe(config, family, facts)?)
    } else {
        Ffn::Dense(DenseFfn { inner_size: config.u32("intermediate_size")?, gated: true })
    };
    Ok(LayerSpec { attention, ffn })
}

/// Settings that have an effect and are not implemented.
pub(super) fn refuse_unimplemented(config: &Config<'_>, facts: DeepSeek) -> Result<()> {
    let must_be: &[(&str, Value, &str)] = &[
        ("hidden_act", "silu".into(), "this activation is not implemented"),
        ("use_bias", false.into(), "biases are not implemented for this family"),
        ("mlp_bias", false.into(), "biases on feed-forward parts are not implemented"),
        ("moe_layer_freq", 1.into(), "dense layers among those with experts are not implemented for this family"),
        ("qk_norm_type", "per_layer".into(), "this norm of queries and keys is not implemented"),
        ("shared_intermediate_size", 0.into(), "shared experts are not implemented for this family"),
        ("use_routing_bias", true.into(), "this family's router has a selection bias"),
        ("moe_gate", "topk".into(), "this router is not implemented"),
    ];
    for (key, value, hint) in must_be {
        if let Some(found) = config.get(key)
            && found != value
        {
            return Err(config.refuse(key, found, &value.to_string(), hint));
        }
    }
    if facts.mla && config.opt_bool("attention_bias")? == Some(true) {
        return Err(config.refuse("attention_bias", "true", "false", "biases are not implemented with latent attention"));
    }
    Ok(())
}

/// The rotary settings, wherever transformers' versions put them.
pub(super) fn rope_settings<'a>(config: &'a Config<'_>) -> Config<'a> {
    let value = config.get("rope_parameters").or_else(|| config.get("rope_scaling")).unwrap_or(&Value::Null);
    Config { path: config.path, value }
}

pub(super) fn rope_kind<'a>(settings: &'a Config<'_>) -> &'a str {
    let kind = settings.get("rope_type").or_else(|| settings.get("type"));
    kind.and_then(Value::as_str).unwrap_or("default")
}

pub(super) fn theta(config: &Config<'_>, settings: &Config<'_>) -> Result<f32> {
    let theta = match settings.opt_f32("rope_theta")? {
        Some(theta) => Some(theta),
        None => config.opt_f32("rope_theta")?,
    };
    Ok(theta.unwrap_or(1e4))
}

fn mla(config: &Config<'_>) -> Result<Mla> {
    let (nope, rotary) = (config.u32("qk_nope_head_dim")?, config.u32("qk_rope_head_dim")?);
    let settings = rope_settings(config);
    let (scaling, scale) = match rope_kind(&settings) {
        "default" => (None, None),
        "yarn" => {
            let (scaling, magnitude) = yarn(config, &settings)?;
            let plain = 1.0 / f64::from(nope.saturating_add(rotary)).sqrt();
            (Some(scaling), magnitude.map(|m| (m * m * plain) as f32))
        }
        other => return Err(config.refuse("rope_scaling", format!("of type {other:?}"), "yarn or none", "not implemented here")),
    };
    let interleaved = config.opt_bool("rope_interleave")?.unwrap_or(true);
    let pairing = if interleaved { RopePairing::Interleaved } else { RopePairing::Halves };
    Ok(Mla {
        num_heads: config.u32("num_attention_heads")?,
        q_lora_rank: config.opt_u32("q_lora_rank")?,
        kv_lora_rank: config.u32("kv_lora_rank")?,
        qk_nope_head_dim: nope,
        qk_rope_head_dim: rotary,
        v_head_dim: config.u32("v_head_dim")?,
        rope: Rope { scaling, ..Rope::plain(theta(config, &settings)?, rotary, pairing) },
        scale,
    })
}

/// YaRN, and the magnitude whose square multiplies the scores.
pub(super) fn yarn(config: &Config<'_>, settings: &Config<'_>) -> Result<(RopeScaling, Option<f64>)> {
    let original_context = settings.u32("original_max_position_embeddings")?;
    let factor = match settings.opt_f32("factor")? {
        Some(factor) => factor,
        None => config.u32("max_position_embeddings")? as f32 / original_context as f32,
    };
    // Zero counts as absent, as in Python.
    let number = |key: &str| Ok::<_, crate::error::RuntimeError>(settings.opt_f32(key)?.filter(|x| *x != 0.0).map(f64::from));
    let (mscale, all_dim) = (number("mscale")?, number("mscale_all_dim")?);
    let wide = f64::from(factor);
    let attention_factor = match (number("attention_factor")?, mscale, all_dim) {
        (Some(stated), ..) => stated,
        (None, Some(mscale), Some(all_dim)) => yarn_magnitude(wide, mscale) / yarn_magnitude(wide, all_dim),
        (None, ..) => yarn_magnitude(wide, 1.0),
    };
    let scaling = RopeScaling::Yarn {
        factor,
        original_context,
        beta_fast: number("beta_fast")?.map_or(32.0, |x| x as f32),
        beta_slow: number("beta_slow")?.map_or(1.0, |x| x as f32),
        attention_factor: attention_factor as f32,
        truncate: settings.opt_bool("truncate")?.unwrap_or(true),
    };
    Ok((scaling, all_dim.map(|m| yarn_magnitude(wide, m))))
}

fn gqa(config: &Config<'_>, family: &Family) -> Result<Gqa> {
    let settings = rope_settings(config);
    let kind = rope_kind(&settings);
    if kind != "default" {
        return Err(config.refuse("rope_scaling", format!("of type {kind:?}"), "none", "not implemented for this family"));
    }
    let num_heads = config.u32("num_attention_heads")?;
    let head_dim = match config.opt_u32("head_dim")? {
        Some(head_dim) => head_dim,
        None => config.u32("hidden_size")?.checked_div(num_heads).unwrap_or(0),
    };
    let share = match settings.opt_f32("partial_rotary_factor")? {
        Some(share) => Some(share),
        None => config.opt_f32("partial_rotary_factor")?,
    };
    let rotary = match (family.hf_name, config.opt_u32("rotary_dim")?, share) {
        ("minimax_m2", Some(rotary), _) => rotary,
        (_, _, Some(share)) => (head_dim as f32 * share) as u32,
        ("glm4_moe", _, None) => head_dim / 2,
        _ => head_dim,
    };
    // ERNIE's weights are stored for pairs of neighbours.
    let pairing = if family.hf_name == "ernie4_5_moe" { RopePairing::Interleaved } else { RopePairing::Halves };
    let norm_default = family.qk_norm != QkNorm::PerHead;
    let normed = config.opt_bool("use_qk_norm")?.unwrap_or(norm_default);
    Ok(Gqa {
        qkv_bias: config.opt_bool("attention_bias")?.unwrap_or(false),
        qk_norm: if normed { family.qk_norm } else { QkNorm::None },
        ..Gqa::plain(
            num_heads,
            config.opt_u32("num_key_value_heads")?.unwrap_or(num_heads),
            head_dim,
            Rope::plain(theta(config, &settings)?, rotary, pairing),
        )
    })
}

fn has_experts(config: &Config<'_>, family: &Family, layer: u32) -> Result<bool> {
    match family.hf_name {
        "minimax_m2" => Ok(true),
        "ernie4_5_moe" => {
            let start = config.opt_u32("moe_layer_start_index")?.unwrap_or(1);
            // -1, and absent: to the last layer.
            let end = config.get("moe_layer_end_index").and_then(Value::as_i64).unwrap_or(-1);
            let interval = config.opt_u32("moe_layer_interval")?.unwrap_or(1).max(1);
            Ok((layer + 1).is_multiple_of(interval) && layer >= start && (end < 0 || i64::from(layer) <= end))
        }
        _ => Ok(layer >= config.opt_u32("first_k_dense_replace")?.unwrap_or(0)),
    }
}

fn moe(config: &Config<'_>, family: &Family, facts: DeepSeek) -> Result<Moe> {
    let first = |names: [&str; 2]| match config.opt_u32(names[0])? {
        Some(n) => Ok(n),
        None => config.u32(names[1]),
    };
    let (num_experts, experts_per_token, inner_size, count) = match family.hf_name {
        "minimax_m2" => (
            first(["num_local_experts", "num_experts"])?,
            config.u32("num_experts_per_tok")?,
            config.u32("intermediate_size")?,
            0,
        ),
        "ernie4_5_moe" => (
            first(["moe_num_experts", "num_experts"])?,
            first(["moe_k", "num_experts_per_tok"])?,
            config.u32("moe_intermediate_size")?,
            config.opt_u32("moe_num_shared_experts")?.unwrap_or(0),
        ),
        _ => (
            first(["n_routed_experts", "num_experts"])?,
            config.u32("num_experts_per_tok")?,
            config.u32("moe_intermediate_size")?,
            config.opt_u32("n_shared_experts")?.unwrap_or(0),
        ),
    };
    let shared = (count > 0).then(|| SharedExperts { count, inner_size: inner_size.saturating_mul(count), sigmoid_gate: false });
    let router = router(config, family, facts)?;
    Ok(Moe { shared, ..Moe::plain(num_experts, experts_per_token, inner_size, router) })
}

fn router(config: &Config<'_>, family: &Family, facts: DeepSeek) -> Result<Router> {
    let score = match config.get("scoring_func").and_then(Value::as_str) {
        None => facts.score,
        Some("softmax") => RouterScore::Softmax,
        Some("sigmoid") => RouterScore::Sigmoid,
        Some(other) => return Err(config.refuse("scoring_func", format!("{other:?}"), "softmax or sigmoid", "")),
    };
    if score != facts.score {
        let expected = format!("that of {}, {:?}", family.hf_name, facts.score);
        return Err(config.refuse(
            "scoring_func",
            format!("{score:?}"),
            &expected,
            "the reference implementation knows no other",
        ));
    }
    let normalize_topk = match facts.fixed_normalize_topk {
        Some(fixed) => fixed,
        None => config.opt_bool("norm_topk_prob")?.unwrap_or(score == RouterScore::Sigmoid),
    };
    if family.hf_name == "deepseek_v2" && normalize_topk {
        let hint = "the reference implementations of this family disagree on what it does";
        return Err(config.refuse("norm_topk_prob", "true", "false", hint));
    }
    let grouped = match config.get("topk_method").and_then(Value::as_str) {
        Some("greedy") => false,
        None => score == RouterScore::Sigmoid,
        Some("group_limited_greedy" | "noaux_tc") => true,
        Some(other) => {
            let expected = "greedy, group_limited_greedy or noaux_tc";
            return Err(config.refuse("topk_method", format!("{other:?}"), expected, "this choice is not implemented"));
        }
    };
    let groups = match config.opt_u32("n_group")?.filter(|n| grouped && *n > 1) {
        Some(groups) => Some((groups, config.u32("topk_group")?)),
        None => None,
    };
    Ok(Router {
        score,
        normalize_topk,
        scale: config.opt_f32("routed_scaling_factor")?.unwrap_or(if family.hf_name == "deepseek_v3" { 2.5 } else { 1.0 }),
        bias: false,
        selection_bias: facts.selection_bias,
        groups,
        group_score: group_score(score, groups),
        selection: Selection::TopK,
    })
}
