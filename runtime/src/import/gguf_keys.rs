//! Geometry to GGUF metadata for families with layers of their own: what `gguf_deepseek` and `gguf_variants` read, written.
//!
//! For `convert` and `synth`. Keys are those of llama.cpp's converter (`conversion/*.py`). A geometry that the keys cannot express
//! is found by reading them back, which both do.

use super::families::{DeepSeek, FAMILIES, Family, Variant};
use super::gguf_delta;
use super::{yarn_log_multiplier, yarn_scale};
use crate::error::{Result, RuntimeError};
use crate::exec::rope::frequencies;
use crate::gguf::Value;
use tierwise_cost::model::{Attention, Ffn, Geometry, Gqa, Mla, Moe, Rope, RopeScaling, RouterScore};

/// The family whose keys are written here, if `architecture` is one.
pub(crate) fn family_of(architecture: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|f| f.gguf_name == architecture && (f.deepseek.is_some() || f.variant.is_some()))
}

/// The geometry as a GGUF file has it: rotary pairs as the architecture wants them, scales in the precision of their keys.
pub(crate) fn as_in_gguf(family: &Family, geometry: &Geometry) -> Geometry {
    let mut geometry = geometry.clone();
    for layer in &mut geometry.layers {
        match &mut layer.attention {
            Attention::Gqa(Gqa { rope: Some(rope), .. }) => {
                rope.pairing = family.gguf_pairing;
                if matches!(rope.scaling, Some(RopeScaling::Llama3 { .. })) {
                    rope.scaling = Some(RopeScaling::Divisors { divisors: divisors(rope) });
                }
            }
            Attention::Mla(a) => {
                a.rope.pairing = family.gguf_pairing;
                // The file holds the logarithm's factor in single precision: what it means there is the model's scale.
                if let (Some(RopeScaling::Yarn { factor, .. }), Some(scale)) = (&a.rope.scaling, a.scale) {
                    let key_length = a.qk_nope_head_dim + a.qk_rope_head_dim;
                    a.scale = Some(yarn_scale(*factor, yarn_log_multiplier(*factor, scale, key_length), key_length));
                }
            }
            _ => {}
        }
    }
    geometry
}

/// What every frequency is divided by.
fn divisors(rope: &Rope) -> Vec<f32> {
    let (stretched, _) = frequencies(rope, 0);
    let (plain, _) = frequencies(&Rope { scaling: None, ..rope.clone() }, 0);
    plain.iter().zip(stretched).map(|(plain, stretched)| (plain / stretched) as f32).collect()
}

/// Keys of layers, under the name after the architecture's.
///
/// # Errors
/// [`RuntimeError::BadRequest`] for a model without routed experts.
pub(crate) fn write(family: &Family, g: &Geometry, arch: &mut dyn FnMut(&str, Value)) -> Result<()> {
    let Some(first) = g.layers.iter().find(|l| matches!(l.ffn, Ffn::Moe(_))) else {
        return Err(RuntimeError::BadRequest {
            what: "model",
            found: format!("{} without routed experts in its first {} layers", g.name, g.layers.len()),
            expected: "at least one layer with experts: more layers".into(),
        });
    };
    let Ffn::Moe(moe) = &first.ffn else { return Ok(()) };
    arch("block_count", (g.layers.len() as u32).into());
    arch("context_length", g.context_length.into());
    arch("embedding_length", g.hidden_size.into());
    arch("vocab_size", g.vocab_size.into());
    arch("attention.layer_norm_rms_epsilon", g.norm_eps.into());
    // Layers without rotation have no rotary facts to tell.
    let rotated = g.layers.iter().find(|l| matches!(&l.attention, Attention::Gqa(Gqa { rope: Some(_), .. })));
    match &rotated.unwrap_or(first).attention {
        Attention::Mla(a) => mla_keys(a, arch),
        Attention::Gqa(a) => gqa_keys(a, arch),
        // All layers are recurrent: heads are of no use, and llama.cpp wants their number.
        Attention::DeltaNet(a) => arch("attention.head_count", a.num_key_heads.into()),
        // Refused when the file is read back.
        Attention::PlanOnly(_) => {}
    }
    let dense = g.layers.iter().find_map(|l| if let Ffn::Dense(d) = &l.ffn { Some(d.inner_size) } else { None });
    arch("feed_forward_length", dense.unwrap_or(moe.inner_size).into());
    arch("expert_count", moe.num_experts.into());
    arch("expert_used_count", moe.experts_per_token.into());
    match (family.deepseek, family.variant) {
        (Some(facts), _) => {
            let leading_dense = g.layers.iter().take_while(|l| matches!(l.ffn, Ffn::Dense(_))).count();
            arch("leading_dense_block_count", (leading_dense as u32).into());
            if family.gguf_name == "ernie4_5-moe" {
                // llama.cpp does not load the family without it. Other steps are found when the file is read back.
                arch("interleave_moe_layer_step", 1u32.into());
            }
            arch("expert_feed_forward_length", moe.inner_size.into());
            router_keys(moe, facts, arch);
        }
        (_, Some(variant)) => variant_keys(variant, g, moe, arch),
        _ => {}
    }
    Ok(())
}

fn rope_keys(rope: &Rope, arch: &mut dyn FnMut(&str, Value)) {
    arch("rope.freq_base", rope.theta.into());
    arch("rope.dimension_count", rope.rotary_dim.into());
    if let Some(RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, .. }) = rope.scaling {
        arch("rope.scaling.type", "yarn".into());
        arch("rope.scaling.factor", factor.into());
        arch("rope.scaling.original_context_length", original_context.into());
        arch("rope.scaling.yarn_beta_fast", beta_fast.into());
        arch("rope.scaling.yarn_beta_slow", beta_slow.into());
    }
}

fn mla_keys(a: &Mla, arch: &mut dyn FnMut(&str, Value)) {
    let key_length = a.qk_nope_head_dim + a.qk_rope_head_dim;
    arch("attention.head_count", a.num_heads.into());
    arch("attention.head_count_kv", 1u32.into());
    if let Some(rank) = a.q_lora_rank {
        arch("attention.q_lora_rank", rank.into());
    }
    arch("attention.kv_lora_rank", a.kv_lora_rank.into());
    arch("attention.key_length", (a.kv_lora_rank + a.qk_rope_head_dim).into());
    arch("attention.value_length", a.kv_lora_rank.into());
    arch("attention.key_length_mla", key_length.into());
    arch("attention.value_length_mla", a.v_head_dim.into());
    rope_keys(&a.rope, arch);
    if let (Some(RopeScaling::Yarn { factor, .. }), Some(scale)) = (&a.rope.scaling, a.scale) {
        arch("rope.scaling.yarn_log_multiplier", yarn_log_multiplier(*factor, scale, key_length).into());
    }
}

fn gqa_keys(a: &Gqa, arch: &mut dyn FnMut(&str, Value)) {
    arch("attention.head_count", a.num_heads.into());
    arch("attention.head_count_kv", a.num_kv_heads.into());
    arch("attention.key_length", a.head_dim.into());
    arch("attention.value_length", a.head_dim.into());
    if let Some(rope) = &a.rope {
        rope_keys(rope, arch);
    }
}

fn router_keys(m: &Moe, facts: DeepSeek, arch: &mut dyn FnMut(&str, Value)) {
    if let Some(shared) = &m.shared {
        arch("expert_shared_count", shared.count.into());
        arch("expert_shared_feed_forward_length", shared.inner_size.into());
    }
    let softmax = m.router.score == RouterScore::Softmax;
    arch("expert_gating_func", if softmax { 1u32 } else { 2u32 }.into());
    // Where the architecture fixes it there is no key.
    if facts.fixed_normalize_topk.is_none() {
        arch("expert_weights_norm", m.router.normalize_topk.into());
    }
    arch("expert_weights_scale", m.router.scale.into());
    if let Some((groups, kept)) = m.router.groups {
        arch("expert_group_count", groups.into());
        arch("expert_group_used_count", kept.into());
    }
}

fn variant_keys(variant: Variant, g: &Geometry, m: &Moe, arch: &mut dyn FnMut(&str, Value)) {
    let gqa = g.layers.iter().filter_map(|l| if let Attention::Gqa(a) = &l.attention { Some(a) } else { None });
    match variant {
        Variant::GptOss => {
            arch("expert_feed_forward_length", m.inner_size.into());
            if let Some(window) = gqa.filter_map(|a| a.sliding_window).next() {
                arch("attention.sliding_window", window.into());
            }
        }
        Variant::Granite => {
            if let Some(scale) = gqa.filter_map(|a| a.scale).next() {
                arch("attention.scale", scale.into());
            }
            arch("embedding_scale", g.scales.embedding.into());
            arch("residual_scale", g.scales.residual.into());
            arch("logit_scale", divisor(g.scales.logits).into());
        }
        Variant::Hunyuan => {
            arch("expert_feed_forward_length", m.inner_size.into());
            if let Some(shared) = &m.shared {
                arch("expert_shared_count", shared.count.into());
                arch("expert_shared_feed_forward_length", shared.inner_size.into());
            }
        }
        Variant::Llama4 => {
            arch("expert_feed_forward_length", m.inner_size.into());
            let first = g.layers.iter().position(|l| matches!(l.ffn, Ffn::Moe(_))).unwrap_or(0);
            arch("interleave_moe_layer_step", (first as u32 + 1).into());
        }
        Variant::QwenNext | Variant::Qwen35 => gguf_delta::write(g, m, arch),
        Variant::Phi => {
            let first = gqa.clone().next();
            // As llama.cpp's converter has it: a window that is as long as the context is none.
            arch("attention.sliding_window", first.and_then(|a| a.sliding_window).unwrap_or(g.context_length).into());
            // The frequencies themselves are tensors (`gguf_rope`).
            if let Some(RopeScaling::LongRope { original_context, long_attention_factor, .. }) =
                first.and_then(|a| a.rope.as_ref()?.scaling.as_ref())
            {
                arch("rope.scaling.original_context_length", (*original_context).into());
                arch("rope.scaling.attn_factor", (*long_attention_factor).into());
            }
        }
    }
}

/// The number by which the file divides, so that its inverse is exactly `factor`.
fn divisor(factor: f32) -> f32 {
    let near = 1.0 / factor;
    [near, near.next_up(), near.next_down()].into_iter().find(|d| 1.0 / d == factor).unwrap_or(near)
}
