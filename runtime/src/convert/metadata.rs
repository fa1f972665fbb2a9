//! The metadata of a GGUF file for a model that comes without: keys from the geometry, proven by reading them back.
//!
//! Keys are those of the GGUF specification. The importer's reader is the judge: what it makes of the keys must be the geometry
//! they were made from, so that a model with a part that no key here expresses is refused instead of becoming another model.

use super::stream::HeadRows;
use crate::error::{Result, RuntimeError};
use crate::gguf::Value;
use crate::import::families;
use crate::import::gguf::file_type_of;
use crate::import::gguf_keys;
use crate::import::routing_rules;
use std::path::Path;
use tierwise_cost::model::{Attention, Ffn, Geometry, Gqa, ModelSpec, Moe, RopePairing, TensorRole, TensorSpec};
use tierwise_cost::recipe::Recipe;

/// Architectures whose conversion is compared with that of other tools in `tests/convert_golden.rs`. Others may store their
/// weights in ways that are not carried over here.
const PROVEN: &[&str] = &[
    "llama",
    "olmoe",
    "qwen2moe",
    "qwen3moe",
    "deepseek2",
    "glm4moe",
    "minimax-m2",
    "ernie4_5-moe",
    "gpt-oss",
    "granitemoe",
    "hunyuan-moe",
    "llama4",
    "phimoe",
    "qwen3next",
];

/// The geometry as a GGUF file has it: the rotary pairs lie as the architecture wants them.
pub(super) fn gguf_geometry(path: &Path, stored: &Geometry) -> Result<Geometry> {
    let architecture = stored.architecture.as_str();
    if !PROVEN.contains(&architecture) {
        return Err(RuntimeError::BadRequest {
            what: "model",
            found: format!(
                "{} of architecture {architecture:?}, whose safetensors convert cannot turn into GGUF yet",
                stored.name
            ),
            expected: format!("one of {}; or a GGUF file of the model, whose formats can be changed", PROVEN.join(", ")),
        });
    }
    let has_experts = stored.layers.iter().any(|l| matches!(l.ffn, Ffn::Moe(_)));
    let family = families::by_gguf_name(path, architecture, has_experts)?;
    Ok(gguf_keys::as_in_gguf(family, stored))
}

/// How the rows of `t` move from the order in which they are stored to that of `geometry`.
pub(super) fn row_order(stored: &Geometry, geometry: &Geometry, t: &TensorSpec) -> Option<HeadRows> {
    use TensorRole as R;
    if !matches!(t.role, R::AttentionQ | R::AttentionK | R::AttentionQBias | R::AttentionKBias) {
        return None;
    }
    let layer = t.layer? as usize;
    match (&stored.layers.get(layer)?.attention, &geometry.layers.get(layer)?.attention) {
        // ERNIE and Llama-4 have neighbours to begin with.
        (Attention::Gqa(Gqa { rope: Some(rope), .. }), _) if rope.pairing == RopePairing::Interleaved => None,
        (_, Attention::Gqa(a)) => {
            let rope = a.rope.as_ref().filter(|r| r.pairing == RopePairing::Interleaved)?;
            Some(HeadRows { head_dim: a.head_dim as usize, rotary_dim: rope.rotary_dim as usize })
        }
        _ => None,
    }
}

/// All keys but the tokenizer's.
pub(super) fn keys(spec: &ModelSpec, recipe: &Recipe) -> Result<Vec<(String, Value)>> {
    let g = &spec.geometry;
    let mut keys: Vec<(String, Value)> = vec![
        ("general.architecture".into(), g.architecture.as_str().into()),
        ("general.type".into(), "model".into()),
        ("general.name".into(), g.name.as_str().into()),
        ("general.quantization_version".into(), 2u32.into()),
    ];
    if let Some(id) = file_type_of(recipe.name()) {
        keys.push(("general.file_type".into(), id.into()));
    }
    let mut arch = |suffix: &str, value: Value| keys.push((format!("{}.{suffix}", g.architecture), value));
    if let Some(family) = gguf_keys::family_of(&g.architecture) {
        gguf_keys::write(family, g, &mut arch)?;
        return Ok(keys);
    }
    arch("block_count", (g.layers.len() as u32).into());
    arch("context_length", g.context_length.into());
    arch("embedding_length", g.hidden_size.into());
    arch("vocab_size", g.vocab_size.into());
    arch("attention.layer_norm_rms_epsilon", g.norm_eps.into());
    let attention: Vec<&Gqa> = g
        .layers
        .iter()
        .filter_map(|l| match &l.attention {
            Attention::Gqa(a) => Some(a),
            Attention::Mla(_) | Attention::DeltaNet(_) | Attention::PlanOnly(_) => None,
        })
        .collect();
    let Some(a) = attention.first().copied().filter(|_| attention.len() == g.layers.len()) else {
        return Err(unwritable(g, "layers without grouped-query attention"));
    };
    arch("attention.head_count", per_layer(attention.iter().map(|a| a.num_heads)));
    arch("attention.head_count_kv", per_layer(attention.iter().map(|a| a.num_kv_heads)));
    arch("attention.key_length", a.head_dim.into());
    arch("attention.value_length", a.head_dim.into());
    if let Some(window) = a.sliding_window {
        arch("attention.sliding_window", window.into());
    }
    if let Some(rope) = &a.rope {
        arch("rope.freq_base", rope.theta.into());
        arch("rope.dimension_count", rope.rotary_dim.into());
    }
    ffn_keys(g, &mut arch)?;
    Ok(keys)
}

fn ffn_keys(g: &Geometry, arch: &mut impl FnMut(&str, Value)) -> Result<()> {
    let experts: Vec<&Moe> = g
        .layers
        .iter()
        .filter_map(|l| match &l.ffn {
            Ffn::Moe(m) => Some(m),
            Ffn::Dense(_) | Ffn::None => None,
        })
        .collect();
    let Some(m) = experts.first() else {
        let widths: Vec<u32> = g
            .layers
            .iter()
            .filter_map(|l| match &l.ffn {
                Ffn::Dense(d) => Some(d.inner_size),
                Ffn::Moe(_) | Ffn::None => None,
            })
            .collect();
        if widths.len() != g.layers.len() {
            return Err(unwritable(g, "layers without feed-forward part"));
        }
        arch("feed_forward_length", per_layer(widths.into_iter()));
        return Ok(());
    };
    if experts.len() != g.layers.len() {
        return Err(unwritable(g, "layers with and without experts"));
    }
    arch("expert_count", per_layer(experts.iter().map(|m| m.num_experts)));
    arch("expert_used_count", per_layer(experts.iter().map(|m| m.experts_per_token)));
    routing_rules::write(&experts, arch);
    if families::FAMILIES.iter().any(|f| f.moe && f.gguf_name == g.architecture && f.own_expert_width) {
        arch("expert_feed_forward_length", m.inner_size.into());
        let dense = m.shared.as_ref().map_or_else(|| m.inner_size.saturating_mul(m.experts_per_token), |s| s.inner_size);
        arch("feed_forward_length", dense.into());
    } else {
        arch("feed_forward_length", m.inner_size.into());
    }
    if let Some(shared) = &m.shared {
        arch("expert_shared_feed_forward_length", shared.inner_size.into());
    }
    Ok(())
}

/// One number if all layers agree, else an array.
fn per_layer(values: impl Iterator<Item = u32>) -> Value {
    let values: Vec<u32> = values.collect();
    match values.first() {
        Some(first) if values.iter().all(|v| v == first) => (*first).into(),
        _ => values.into(),
    }
}

fn unwritable(g: &Geometry, what: &str) -> RuntimeError {
    RuntimeError::BadRequest {
        what: "model",
        found: format!("{} with {what}", g.name),
        expected: "a model whose GGUF form convert can write".into(),
    }
}
