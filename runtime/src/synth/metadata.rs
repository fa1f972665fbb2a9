//! The metadata of a synthetic file, proven by reading it back with the importer before anything is written.

use super::{own_layers, vocabulary};
use crate::error::{Result, RuntimeError};
use crate::gguf::Value;
use crate::import::families::{self, Family};
use crate::import::gguf::file_type_of;
use crate::import::gguf_keys;
use crate::import::read_back::check_that_it_reads_back;
use std::path::Path;
use tierwise_cost::model::{Attention, Ffn, Geometry, Gqa, ModelSpec, Moe};
use tierwise_cost::recipe::Recipe;

/// The model that will be written and its metadata.
pub(super) fn describe(geometry: &Geometry, recipe: &Recipe, out: &Path) -> Result<(ModelSpec, Vec<(String, Value)>)> {
    if let Some(family) = gguf_keys::family_of(&geometry.architecture) {
        return own_layers::describe(geometry, family, recipe, out);
    }
    let (family, attention, moe) = supported(geometry)?;
    let mut geometry = geometry.clone();
    for layer in &mut geometry.layers {
        if let Attention::Gqa(a) = &mut layer.attention
            && let Some(rope) = &mut a.rope
        {
            rope.pairing = family.gguf_pairing;
        }
    }
    let keys = keys(&geometry, family, &attention, &moe, recipe)?;
    let spec = ModelSpec::with_recipe(geometry, recipe)?;
    check_that_it_reads_back(&spec, &keys, out)?;
    Ok((spec, keys))
}

/// The family and the one kind of layer, if files of it can be written.
fn supported(geometry: &Geometry) -> Result<(&'static Family, Gqa, Moe)> {
    let refuse = |found: String, expected: String| Err(RuntimeError::BadRequest { what: "model", found, expected });
    let names: Vec<&str> = families::FAMILIES.iter().filter(|f| f.moe).map(|f| f.gguf_name).collect();
    let architecture = &geometry.architecture;
    let Some(family) = families::FAMILIES.iter().find(|f| f.moe && f.gguf_name == *architecture) else {
        let found = format!("{} of architecture {architecture:?}, which synth cannot write yet", geometry.name);
        return refuse(found, format!("one of {}", names.join(", ")));
    };
    let first = geometry.layers.first();
    let Some((Attention::Gqa(a), Ffn::Moe(m))) = first.map(|l| (&l.attention, &l.ffn)) else {
        return refuse(format!("{} without routed experts in its first layer", geometry.name), "experts in every layer".into());
    };
    if geometry.layers.iter().any(|l| Some(l) != first) {
        return refuse(format!("{} with layers of several kinds", geometry.name), "layers that are all alike".into());
    }
    Ok((family, a.clone(), m.clone()))
}

/// What every file says.
pub(super) fn general_keys(g: &Geometry, recipe: &Recipe) -> Vec<(String, Value)> {
    let mut keys: Vec<(String, Value)> = vec![
        ("general.architecture".into(), g.architecture.as_str().into()),
        ("general.name".into(), g.name.as_str().into()),
        ("general.description".into(), "random weights in the shape of the model, for benchmarks".into()),
        ("general.quantization_version".into(), 2u32.into()),
    ];
    if let Some(id) = file_type_of(recipe.name()) {
        keys.push(("general.file_type".into(), id.into()));
    }
    keys
}

fn keys(g: &Geometry, family: &Family, a: &Gqa, m: &Moe, recipe: &Recipe) -> Result<Vec<(String, Value)>> {
    let mut keys = general_keys(g, recipe);
    let mut arch = |suffix: &str, value: Value| keys.push((format!("{}.{suffix}", g.architecture), value));
    arch("block_count", (g.layers.len() as u32).into());
    arch("context_length", g.context_length.into());
    arch("embedding_length", g.hidden_size.into());
    arch("vocab_size", g.vocab_size.into());
    arch("attention.head_count", a.num_heads.into());
    arch("attention.head_count_kv", a.num_kv_heads.into());
    arch("attention.key_length", a.head_dim.into());
    arch("attention.value_length", a.head_dim.into());
    arch("attention.layer_norm_rms_epsilon", g.norm_eps.into());
    if let Some(window) = a.sliding_window {
        arch("attention.sliding_window", window.into());
    }
    if let Some(rope) = &a.rope {
        arch("rope.freq_base", rope.theta.into());
        arch("rope.dimension_count", rope.rotary_dim.into());
    }
    arch("expert_count", m.num_experts.into());
    arch("expert_used_count", m.experts_per_token.into());
    if family.own_expert_width {
        arch("expert_feed_forward_length", m.inner_size.into());
        let dense = m.shared.as_ref().map_or_else(|| m.inner_size.saturating_mul(m.experts_per_token), |s| s.inner_size);
        arch("feed_forward_length", dense.into());
    } else {
        arch("feed_forward_length", m.inner_size.into());
    }
    if let Some(shared) = &m.shared {
        arch("expert_shared_feed_forward_length", shared.inner_size.into());
    }
    keys.extend(vocabulary::keys(g.vocab_size)?);
    Ok(keys)
}
