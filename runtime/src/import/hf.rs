//! A Hugging Face `config.json` to geometry.
//!
//! Key names and defaults are those of transformers' configuration classes, versions 4 (`rope_theta`, `num_experts`) and 5
//! (`rope_parameters`, `num_local_experts`).

use super::families::{self, Family};
use super::hf_deepseek;
use super::hf_variants::{self, Parts};
use super::routing_rules;
use crate::error::{Result, RuntimeError};
use serde_json::Value;
use std::path::Path;
use tierwise_cost::model::{Attention, DenseFfn, Ffn, Geometry, Gqa, LayerSpec, Moe, Rope, RopePairing, Router, SharedExperts};

/// Reads the text of a `config.json`. `path` is for messages, `name` for people when the file names no model.
///
/// # Errors
/// [`RuntimeError::UnknownArchitecture`], or [`RuntimeError::BadFile`] naming the key that is missing, impossible or set to
/// something that is not implemented.
pub fn geometry(text: &str, path: &Path, name: &str) -> Result<Geometry> {
    let value: Value = serde_json::from_str(text)
        .map_err(|e| RuntimeError::bad_file(path, format!("invalid JSON ({e})"), "a Hugging Face config.json", ""))?;
    let value = text_part(value);
    let config = Config { path, value: &value };
    let family = families::by_hf_name(path, config.str("model_type")?)?;
    match (family.deepseek, family.variant) {
        (Some(facts), _) => hf_deepseek::refuse_unimplemented(&config, facts)?,
        // Its reader refuses what it does not know.
        (_, Some(_)) => {}
        _ => refuse_unimplemented(&config)?,
    }
    let num_layers = config.u32("num_hidden_layers")?;
    if num_layers == 0 || num_layers > 4096 {
        return Err(config.refuse("num_hidden_layers", num_layers, "1 to 4096", ""));
    }
    let hidden_size = config.u32("hidden_size")?;
    let parts = match family.variant {
        Some(variant) => hf_variants::parts(&config, variant, num_layers)?,
        None => {
            let mut layers = Vec::with_capacity(num_layers as usize);
            for layer in 0..num_layers {
                layers.push(match family.deepseek {
                    Some(facts) => hf_deepseek::layer(&config, family, facts, layer)?,
                    None => {
                        let attention = Attention::Gqa(gqa(&config, family, hidden_size, layer)?);
                        LayerSpec { attention, ffn: ffn(&config, family, layer)? }
                    }
                });
            }
            Parts { layers, ..Parts::default() }
        }
    };
    let Parts { layers, norm, output_bias, scales } = parts;
    let geometry = Geometry {
        name: name.to_string(),
        architecture: family.gguf_name.to_string(),
        hidden_size,
        vocab_size: config.u32("vocab_size")?,
        context_length: config.u32("max_position_embeddings")?,
        norm_eps: config.opt_f32("rms_norm_eps")?.unwrap_or(1e-6),
        norm,
        output_bias,
        scales,
        tie_word_embeddings: config.opt_bool("tie_word_embeddings")?.unwrap_or(family.hf_name == "ernie4_5_moe"),
        layers,
    };
    super::check_geometry(path, &geometry)?;
    Ok(geometry)
}

/// Models of more than text whose text part is read.
const NESTED: &[&str] = &["llama4", "qwen3_5_moe"];

/// The text model's config of a model of more than text; it ties embeddings if the whole does.
fn text_part(mut config: Value) -> Value {
    if !config.get("model_type").and_then(Value::as_str).is_some_and(|name| NESTED.contains(&name)) {
        return config;
    }
    let Some(mut text) = config.get_mut("text_config").map(Value::take) else { return config };
    if let (Some(text), Some(tied)) = (text.as_object_mut(), config.get("tie_word_embeddings")) {
        text.entry("tie_word_embeddings").or_insert_with(|| tied.clone());
    }
    text
}

/// A JSON object with errors that name file and key. `null` counts as absent, as in Python.
pub(super) struct Config<'a> {
    pub(super) path: &'a Path,
    pub(super) value: &'a Value,
}

impl Config<'_> {
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn refuse(&self, key: &str, found: impl std::fmt::Display, expected: &str, hint: &str) -> RuntimeError {
        RuntimeError::bad_file(self.path, format!("{key} {found}"), expected, hint)
    }

    fn require<T>(&self, key: &str, value: Option<T>, expected: &str) -> Result<T> {
        value.ok_or_else(|| {
            RuntimeError::bad_file(self.path, format!("no key {key}"), expected, "is this the model's config.json?")
        })
    }

    pub(super) fn opt_u32(&self, key: &str) -> Result<Option<u32>> {
        let read = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        self.get(key).map(|v| read(v).ok_or_else(|| self.refuse(key, v, "a whole number below 2^32", ""))).transpose()
    }

    pub(super) fn u32(&self, key: &str) -> Result<u32> {
        self.require(key, self.opt_u32(key)?, "a whole number")
    }

    pub(super) fn opt_f32(&self, key: &str) -> Result<Option<f32>> {
        self.get(key).map(|v| v.as_f64().map(|x| x as f32).ok_or_else(|| self.refuse(key, v, "a number", ""))).transpose()
    }

    pub(super) fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key).map(|v| v.as_bool().ok_or_else(|| self.refuse(key, v, "true or false", ""))).transpose()
    }

    pub(super) fn str(&self, key: &str) -> Result<&str> {
        let value = self.require(key, self.get(key), "a text")?;
        value.as_str().ok_or_else(|| self.refuse(key, value, "a text", ""))
    }

    fn opt_u32_list(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let read = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let list = value.as_array().and_then(|a| a.iter().map(read).collect::<Option<Vec<_>>>());
        list.ok_or_else(|| self.refuse(key, value, "a list of layer numbers", ""))
    }
}

fn refuse_unimplemented(config: &Config<'_>) -> Result<()> {
    if let Some(act) = config.get("hidden_act")
        && act != "silu"
    {
        return Err(config.refuse("hidden_act", act, "\"silu\"", "this activation is not implemented"));
    }
    if config.opt_bool("attention_bias")? == Some(true) {
        return Err(config.refuse("attention_bias", "true", "false", "a bias on the attention's output is not implemented"));
    }
    if let Some(clip) = config.get("clip_qkv") {
        return Err(config.refuse("clip_qkv", clip, "null", "clipping of queries, keys and values is not implemented"));
    }
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = config.get(key) else { continue };
        let kind = rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str).unwrap_or("default");
        if kind != "default" {
            return Err(config.refuse(
                key,
                format!("of type {kind:?}"),
                "null or type \"default\"",
                "rope scaling is not implemented",
            ));
        }
    }
    Ok(())
}

fn gqa(config: &Config<'_>, family: &Family, hidden_size: u32, layer: u32) -> Result<Gqa> {
    let num_heads = config.u32("num_attention_heads")?;
    let head_dim = match config.opt_u32("head_dim")? {
        Some(head_dim) => head_dim,
        None if num_heads > 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            let found = format!("{num_heads} with hidden_size {hidden_size}");
            return Err(config.refuse("num_attention_heads", found, "a divisor of hidden_size that is not zero", ""));
        }
    };
    let num_kv_heads = config.opt_u32("num_key_value_heads")?.unwrap_or(num_heads);
    let rope = Rope::plain(rope_theta(config, family)?, head_dim, RopePairing::Halves);
    Ok(Gqa {
        qkv_bias: config.opt_bool("qkv_bias")?.unwrap_or(family.qkv_bias),
        qk_norm: family.qk_norm,
        sliding_window: sliding_window(config, family, layer)?,
        ..Gqa::plain(num_heads, num_kv_heads, head_dim, rope)
    })
}

fn rope_theta(config: &Config<'_>, family: &Family) -> Result<f32> {
    if let Some(rope) = config.get("rope_parameters") {
        let parameters = Config { path: config.path, value: rope };
        if let Some(theta) = parameters.opt_f32("rope_theta")? {
            return Ok(theta);
        }
    }
    Ok(config.opt_f32("rope_theta")?.unwrap_or(family.hf_rope_theta))
}

/// Qwen configs state a window and then whether and in which layers to use it; others use the one they state.
fn sliding_window(config: &Config<'_>, family: &Family, layer: u32) -> Result<Option<u32>> {
    let window = config.opt_u32("sliding_window")?.filter(|w| *w > 0);
    let used = match family.hf_name {
        "qwen3_moe" => config.opt_bool("use_sliding_window")?.unwrap_or(false),
        "qwen2_moe" => match config.get("layer_types").and_then(|t| t.get(layer as usize)).and_then(Value::as_str) {
            Some(kind) => kind == "sliding_attention",
            None => {
                let max_window_layers = config.opt_u32("max_window_layers")?.unwrap_or(28);
                config.opt_bool("use_sliding_window")?.unwrap_or(false) && layer.is_multiple_of(2) && layer < max_window_layers
            }
        },
        _ => true,
    };
    Ok(window.filter(|_| used))
}

fn ffn(config: &Config<'_>, family: &Family, layer: u32) -> Result<Ffn> {
    if !family.moe || !is_sparse(config, layer)? {
        return Ok(Ffn::Dense(DenseFfn { inner_size: config.u32("intermediate_size")?, gated: true }));
    }
    let num_experts = match config.get("num_experts") {
        Some(_) => hf_variants::per_layer(config, "num_experts", layer)?,
        None => config.u32("num_local_experts")?,
    };
    let shared = if family.shared_expert {
        Some(SharedExperts { count: 1, inner_size: config.u32("shared_expert_intermediate_size")?, sigmoid_gate: true })
    } else {
        None
    };
    let normalize_topk = match family.hf_normalize_topk {
        Some(fixed) => fixed,
        None => config.opt_bool("norm_topk_prob")?.unwrap_or(false),
    };
    let inner_size = config.u32(if family.own_expert_width { "moe_intermediate_size" } else { "intermediate_size" })?;
    let experts_per_token = hf_variants::per_layer(config, "num_experts_per_tok", layer)?;
    let moe = Moe { shared, ..Moe::plain(num_experts, experts_per_token, inner_size, Router::softmax(normalize_topk)) };
    routing_rules::of_config(config, layer, moe).map(Ffn::Moe)
}

/// `mlp_only_layers` and `decoder_sparse_step` (Qwen): every so-many-th layer has experts, except the listed ones.
pub(super) fn is_sparse(config: &Config<'_>, layer: u32) -> Result<bool> {
    let step = config.opt_u32("decoder_sparse_step")?.unwrap_or(1);
    if step == 0 {
        return Err(config.refuse("decoder_sparse_step", 0, "1 or more", ""));
    }
    Ok((layer + 1).is_multiple_of(step) && !config.opt_u32_list("mlp_only_layers")?.contains(&layer))
}
