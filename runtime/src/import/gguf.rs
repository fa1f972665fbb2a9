//! GGUF metadata to geometry.
//!
//! Keys are those of the GGUF specification (`{architecture}.block_count`, ...); defaults for absent optional keys are those of
//! llama.cpp's loader (`load_hparams`, `src/models/*.cpp`), so that a file means the same here and there.

use super::families::{self, Family};
use super::hf_variants::Parts;
use super::tensors::match_tensors;
use super::{gguf_deepseek, gguf_rope, gguf_variants, routing_rules};
use crate::error::{Result, RuntimeError};
use crate::gguf::{Gguf, Metadata, TensorInfo};
use std::path::Path;
use tierwise_cost::model::{
    Attention, DenseFfn, Ffn, Geometry, Gqa, LayerSpec, ModelSpec, Moe, Rope, Router, SharedExperts, TensorSpec,
};
use tierwise_cost::quant::QuantFormat;

/// Reads the geometry from the metadata and checks it against the tensors; formats are the file's.
///
/// # Errors
/// [`RuntimeError::UnknownArchitecture`], or [`RuntimeError::BadFile`] naming the key or tensor that is missing, superfluous,
/// impossible or of a kind that is not implemented.
pub fn model_spec(gguf: &Gguf) -> Result<ModelSpec> {
    let (rope_tensors, weights) = gguf_rope::split(gguf)?;
    spec_of(gguf.path(), gguf.metadata(), &weights, &rope_tensors)
}

/// [`model_spec`] without a file: metadata, weights, and the tensors that hold stretched frequencies.
pub(crate) fn spec_of(
    path: &Path,
    metadata: &Metadata,
    tensors: &[TensorInfo],
    rope_tensors: &[gguf_rope::RopeTensor],
) -> Result<ModelSpec> {
    let mut geometry = geometry(path, metadata, tensors)?;
    gguf_rope::apply(path, metadata, rope_tensors, &mut geometry)?;
    let architecture = metadata.get_str("general.architecture")?;
    let has_experts = geometry.layers.iter().any(|l| matches!(l.ffn, Ffn::Moe(_)));
    let tensors = match families::by_gguf_name(path, architecture, has_experts)?.deepseek {
        Some(_) => match_tensors(path, &geometry, &gguf_deepseek::tensors_of(&geometry, tensors))?,
        None => match_tensors(path, &geometry, tensors)?,
    };
    let format_name = format_name(metadata, &tensors)?;
    Ok(ModelSpec { geometry, tensors, format_name })
}

/// Keys of one architecture, with errors that name the full key.
pub(super) struct Keys<'a> {
    pub(super) path: &'a Path,
    pub(super) metadata: &'a Metadata,
    architecture: &'a str,
}

impl Keys<'_> {
    pub(super) fn key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.architecture)
    }

    pub(super) fn narrow(&self, suffix: &str, value: u64) -> Result<u32> {
        u32::try_from(value)
            .map_err(|_| RuntimeError::bad_file(self.path, format!("{} {value}", self.key(suffix)), "a number below 2^32", ""))
    }

    pub(super) fn u32(&self, suffix: &str) -> Result<u32> {
        self.narrow(suffix, self.metadata.get_u64(&self.key(suffix))?)
    }

    pub(super) fn opt_u32(&self, suffix: &str) -> Result<Option<u32>> {
        self.metadata.opt_u64(&self.key(suffix))?.map(|v| self.narrow(suffix, v)).transpose()
    }

    /// One value per layer: a scalar counts for all of them.
    pub(super) fn opt_per_layer(&self, suffix: &str, num_layers: usize) -> Result<Option<Vec<u32>>> {
        let Some(values) = self.metadata.opt_u64_or_array(&self.key(suffix), num_layers)? else { return Ok(None) };
        values.into_iter().map(|v| self.narrow(suffix, v)).collect::<Result<Vec<_>>>().map(Some)
    }

    pub(super) fn per_layer(&self, suffix: &str, num_layers: usize) -> Result<Vec<u32>> {
        match self.opt_per_layer(suffix, num_layers)? {
            Some(values) => Ok(values),
            // The scalar getter's message names the missing key.
            None => Ok(vec![self.u32(suffix)?; num_layers]),
        }
    }

    pub(super) fn refuse(&self, suffix: &str, found: impl std::fmt::Display, expected: &str, hint: &str) -> RuntimeError {
        RuntimeError::bad_file(self.path, format!("{} {found}", self.key(suffix)), expected, hint)
    }
}

fn geometry(path: &Path, metadata: &Metadata, tensors: &[TensorInfo]) -> Result<Geometry> {
    let architecture = metadata.get_str("general.architecture")?;
    // Refuse an unknown name before any key of it is asked for.
    families::by_gguf_name(path, architecture, true)?;
    let keys = Keys { path, metadata, architecture };
    // The most of any layer. An array is for families whose reader asks again, layer by layer.
    // More layers than there may be are refused below.
    let num_layers = keys.opt_u32("block_count")?.unwrap_or(1).min(4096) as usize;
    let listed = metadata.opt_u64_or_array(&keys.key("expert_count"), num_layers)?;
    let num_experts = keys.narrow("expert_count", listed.and_then(|l| l.into_iter().max()).unwrap_or(0))?;
    let family = families::by_gguf_name(path, architecture, num_experts > 0)?;
    if family.deepseek.is_some() || family.variant.is_some() {
        keys.opt_u32("expert_count")?;
    }
    match (family.deepseek, family.variant) {
        (Some(_), _) => gguf_deepseek::refuse_unimplemented(&keys)?,
        // Its reader refuses what it does not know.
        (_, Some(_)) => {}
        _ => refuse_unimplemented(&keys, family)?,
    }

    let block_count = keys.u32("block_count")?;
    if block_count == 0 || block_count > 4096 {
        return Err(keys.refuse("block_count", block_count, "1 to 4096", ""));
    }
    let num_layers = block_count as usize;
    let hidden_size = keys.u32("embedding_length")?;
    let context_length = keys.u32("context_length")?;
    let plain = |layers| Parts { layers, ..Parts::default() };
    let parts = match (family.deepseek, family.variant) {
        (Some(facts), _) => plain(gguf_deepseek::layers(&keys, family, facts, num_experts, num_layers, tensors)?),
        (_, Some(variant)) => gguf_variants::parts(&keys, family, variant, num_experts, num_layers)?,
        _ => {
            let attention = attention(&keys, family, hidden_size, context_length, num_layers)?;
            let ffn = ffn(&keys, family, num_experts, num_layers)?;
            plain(attention.into_iter().zip(ffn).map(|(attention, ffn)| LayerSpec { attention, ffn }).collect())
        }
    };
    let Parts { layers, norm, output_bias, scales } = parts;
    let geometry = Geometry {
        name: name(path, metadata)?,
        architecture: architecture.to_string(),
        hidden_size,
        vocab_size: vocab_size(&keys, tensors)?,
        context_length,
        norm_eps: metadata.get_f32(&keys.key("attention.layer_norm_rms_epsilon"))?,
        norm,
        output_bias,
        scales,
        tie_word_embeddings: !tensors.iter().any(|t| t.name == "output.weight"),
        layers,
    };
    super::check_geometry(path, &geometry)?;
    Ok(geometry)
}

/// Keys whose effect is not implemented, when they are set to something that has one.
fn refuse_unimplemented(keys: &Keys<'_>, family: &Family) -> Result<()> {
    let m = keys.metadata;
    if let Some(kind) = m.opt_str(&keys.key("rope.scaling.type"))?
        && !matches!(kind, "none" | "linear")
    {
        return Err(keys.refuse("rope.scaling.type", format!("{kind:?}"), "no rope scaling", "this scaling is not implemented"));
    }
    for suffix in ["rope.scaling.factor", "rope.scale_linear"] {
        // 0 means "none" in llama.cpp.
        if let Some(factor) = m.opt_f32(&keys.key(suffix))?
            && factor != 1.0
            && factor != 0.0
        {
            return Err(keys.refuse(suffix, factor, "1 (no rope scaling)", "rope scaling is not implemented"));
        }
    }
    let must_be = [
        ("expert_group_count", &[0, 1][..], "group-limited routing is not implemented for this architecture"),
        ("expert_gating_func", &[0, 1][..], "only softmax routing (1) is implemented for this architecture"),
        ("nextn_predict_layers", &[0][..], "layers for multi-token prediction are not implemented for this architecture"),
    ];
    for (suffix, allowed, hint) in must_be {
        if let Some(value) = keys.opt_u32(suffix)?
            && !allowed.contains(&value)
        {
            return Err(keys.refuse(suffix, value, &format!("one of {allowed:?}"), hint));
        }
    }
    for suffix in ["expert_weights_scale", "attention.clamp_kqv"] {
        let neutral = if suffix == "expert_weights_scale" { 1.0 } else { 0.0 };
        if let Some(value) = m.opt_f32(&keys.key(suffix))?
            && value != neutral
            && value != 0.0
        {
            return Err(keys.refuse(suffix, value, &neutral.to_string(), "this is not implemented for this architecture"));
        }
    }
    if let Some(normalize) = m.opt_bool(&keys.key("expert_weights_norm"))?
        && normalize != family.gguf_normalize_topk
        && family.moe
    {
        let expected = family.gguf_normalize_topk.to_string();
        return Err(keys.refuse("expert_weights_norm", normalize, &expected, "the architecture fixes this"));
    }
    Ok(())
}

fn attention(
    keys: &Keys<'_>,
    family: &Family,
    hidden_size: u32,
    context_length: u32,
    num_layers: usize,
) -> Result<Vec<Attention>> {
    let heads = keys.per_layer("attention.head_count", num_layers)?;
    let kv_heads = keys.opt_per_layer("attention.head_count_kv", num_layers)?.unwrap_or_else(|| heads.clone());
    let key_length = keys.opt_u32("attention.key_length")?;
    let value_length = keys.opt_u32("attention.value_length")?;
    let rotary_dim = keys.opt_u32("rope.dimension_count")?;
    let theta = keys.metadata.opt_f32(&keys.key("rope.freq_base"))?.unwrap_or(1e4);
    let window = keys.opt_u32("attention.sliding_window")?.filter(|w| *w > 0 && *w < context_length);
    let mut layers = Vec::with_capacity(num_layers);
    for (num_heads, num_kv_heads) in heads.into_iter().zip(kv_heads) {
        let head_dim = match key_length {
            Some(length) => length,
            None if num_heads > 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                let found = format!("{num_heads} with {} {hidden_size}", keys.key("embedding_length"));
                return Err(keys.refuse("attention.head_count", found, "a divisor of it that is not zero", ""));
            }
        };
        if let Some(value) = value_length
            && value != head_dim
        {
            let expected = format!("{head_dim}, the key length");
            return Err(keys.refuse(
                "attention.value_length",
                value,
                &expected,
                "value heads of another width are not implemented",
            ));
        }
        let rope = Rope::plain(theta, rotary_dim.unwrap_or(head_dim), family.gguf_pairing);
        layers.push(Attention::Gqa(Gqa {
            qkv_bias: family.qkv_bias,
            qk_norm: family.qk_norm,
            sliding_window: window,
            ..Gqa::plain(num_heads, num_kv_heads, head_dim, rope)
        }));
    }
    Ok(layers)
}

fn ffn(keys: &Keys<'_>, family: &Family, num_experts: u32, num_layers: usize) -> Result<Vec<Ffn>> {
    if !family.moe {
        let widths = keys.per_layer("feed_forward_length", num_layers)?;
        return Ok(widths.into_iter().map(|inner_size| Ffn::Dense(DenseFfn { inner_size, gated: true })).collect());
    }
    if num_experts == 0 {
        // Absent: the getter's message names the key. Present and zero: the geometry check would say so too.
        keys.u32("expert_count")?;
    }
    let used = keys.per_layer("expert_used_count", num_layers)?;
    let own_widths = if family.own_expert_width { keys.opt_per_layer("expert_feed_forward_length", num_layers)? } else { None };
    let widths = match own_widths {
        Some(widths) => widths,
        None => {
            let dense = keys.per_layer("feed_forward_length", num_layers)?;
            // Early conversions give the width of all used experts together where the family has a width of its own.
            let divisor = |used: u32| if family.own_expert_width { used.max(1) } else { 1 };
            dense.into_iter().zip(&used).map(|(width, used)| width / divisor(*used)).collect()
        }
    };
    let shared = if family.shared_expert {
        let inner_size = match keys.opt_u32("expert_shared_feed_forward_length")? {
            Some(width) => width,
            None => keys.u32("feed_forward_length")?,
        };
        Some(SharedExperts { count: 1, inner_size, sigmoid_gate: true })
    } else {
        None
    };
    let counts = keys.per_layer("expert_count", num_layers)?;
    let router = Router::softmax(family.gguf_normalize_topk);
    let layer = |((num_experts, experts_per_token), inner_size)| Moe {
        shared: shared.clone(),
        ..Moe::plain(num_experts, experts_per_token, inner_size, router.clone())
    };
    let layers = counts.into_iter().zip(used).zip(widths).map(layer).collect();
    Ok(routing_rules::of_keys(keys, layers)?.into_iter().map(Ffn::Moe).collect())
}

/// The embedding table's rows; vocabulary and key, where they exist, must say the same.
fn vocab_size(keys: &Keys<'_>, tensors: &[TensorInfo]) -> Result<u32> {
    let tokens = keys.metadata.opt_str_array("tokenizer.ggml.tokens")?.map(|t| t.len() as u64);
    let rows = tensors.iter().find(|t| t.name == "token_embd.weight").and_then(|t| t.shape.first().copied());
    let Some(rows) = rows else {
        return Err(RuntimeError::bad_file(
            keys.path,
            "no tensor token_embd.weight",
            "one of shape [vocabulary, hidden]",
            "the file holds no model, or only a vocabulary",
        ));
    };
    let stated = [("tokenizer.ggml.tokens", tokens), ("vocab_size", keys.opt_u32("vocab_size")?.map(u64::from))];
    for (what, value) in stated {
        if let Some(value) = value
            && value != rows
        {
            return Err(RuntimeError::bad_file(
                keys.path,
                format!("token_embd.weight with {rows} rows"),
                format!("{value} rows, as {what} says"),
                "vocabulary and weights are from different models",
            ));
        }
    }
    keys.narrow("vocab_size", rows)
}

fn name(path: &Path, metadata: &Metadata) -> Result<String> {
    Ok(match metadata.opt_str("general.name")? {
        Some(name) if !name.trim().is_empty() => name.to_string(),
        _ => path.file_stem().map_or_else(|| "unnamed".to_string(), |s| s.to_string_lossy().into_owned()),
    })
}

/// `general.file_type`: llama.cpp's `llama_ftype` (llama.h) and its names. The second name of a number is our recipe's.
const FILE_TYPES: &[(u32, &str)] = &[
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (7, "Q8_0"),
    (8, "Q5_0"),
    (9, "Q5_1"),
    (10, "Q2_K"),
    (11, "Q3_K_S"),
    (11, "Q3_K"),
    (12, "Q3_K_M"),
    (13, "Q3_K_L"),
    (14, "Q4_K_S"),
    (14, "Q4_K"),
    (15, "Q4_K_M"),
    (16, "Q5_K_S"),
    (17, "Q5_K_M"),
    (18, "Q6_K"),
    (21, "Q2_K_S"),
    (25, "IQ4_NL"),
    (30, "IQ4_XS"),
    (32, "BF16"),
    (38, "MXFP4"),
];

/// The number that a file of this recipe carries.
pub(crate) fn file_type_of(recipe_name: &str) -> Option<u32> {
    FILE_TYPES.iter().find(|(_, name)| *name == recipe_name).map(|(id, _)| *id)
}

/// The name of the file's type as llama.cpp's tools give it, else the format that holds the most bytes.
fn format_name(metadata: &Metadata, tensors: &[TensorSpec]) -> Result<String> {
    let stated = metadata.opt_u64("general.file_type")?;
    if let Some((_, name)) = FILE_TYPES.iter().find(|(id, _)| Some(u64::from(*id)) == stated) {
        return Ok((*name).to_string());
    }
    let bytes_of = |f: &QuantFormat| tensors.iter().filter(|t| t.format == *f).map(|t| t.bytes.0).sum::<u64>();
    Ok(QuantFormat::ALL.iter().max_by_key(|f| bytes_of(f)).map_or("F32", |f| f.name()).to_string())
}
