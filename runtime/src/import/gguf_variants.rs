//! GGUF metadata to the layers of families with parts of their own: gpt-oss, Granite, Hunyuan, Phi-3.5-MoE, Llama-4.
//!
//! Keys and defaults are those of llama.cpp's loader (`src/models/openai-moe.cpp`, `granite.cpp`, `hunyuan-moe.cpp`, `llama4.cpp`). Phi-3.5-MoE
//! is run as it was trained (layer norms, its own choice of experts); llama.cpp computes such files otherwise.

use super::families::{Family, Variant};
use super::gguf::Keys;
use super::gguf_delta;
use super::hf_deepseek::yarn_magnitude;
use super::hf_variants::{Parts, SWIGLU_ALPHA, SWIGLU_LIMIT};
use crate::error::Result;
use tierwise_cost::model::{
    Activation, Attention, DenseFfn, Ffn, Gqa, LayerSpec, Moe, NormKind, QkNorm, Rope, RopeScaling, Router, RouterScore, Scales,
    SharedExperts, Temperature,
};

/// The model.
pub(super) fn parts(keys: &Keys<'_>, family: &Family, variant: Variant, num_experts: u32, num_layers: usize) -> Result<Parts> {
    let attention = attention(keys, family)?;
    let moe = Moe::plain(num_experts, keys.u32("expert_used_count")?, inner_size(keys)?, Router::softmax(true));
    let layers = |of: &dyn Fn(usize) -> (Gqa, Moe)| {
        let layer = |(attention, moe)| LayerSpec { attention: Attention::Gqa(attention), ffn: Ffn::Moe(moe) };
        (0..num_layers).map(|l| layer(of(l))).collect()
    };
    match variant {
        Variant::GptOss => {
            let window = keys.u32("attention.sliding_window")?;
            let attention =
                Gqa { rope: Some(yarn(keys, attention.rope)?), qkv_bias: true, output_bias: true, sinks: true, ..attention };
            let moe = Moe {
                activation: Activation::ClampedSwiglu { alpha: SWIGLU_ALPHA, limit: SWIGLU_LIMIT },
                expert_bias: true,
                router: Router { bias: true, ..Router::softmax(true) },
                ..moe
            };
            // Every other layer, the first included, sees the window only.
            let windowed = |l: usize| l.is_multiple_of(2).then_some(window);
            let of = |l| (Gqa { sliding_window: windowed(l), ..attention.clone() }, moe.clone());
            Ok(Parts { layers: layers(&of), ..Parts::default() })
        }
        Variant::Granite => {
            refuse_scaling(keys)?;
            let factor = |suffix: &str| keys.metadata.opt_f32(&keys.key(suffix));
            let attention = Gqa { scale: factor("attention.scale")?.filter(|s| *s != 0.0), ..attention };
            let scales = Scales {
                embedding: factor("embedding_scale")?.unwrap_or(1.0),
                residual: factor("residual_scale")?.unwrap_or(1.0),
                // The file divides by it.
                logits: 1.0 / factor("logit_scale")?.unwrap_or(1.0),
                logits_softcap: None,
            };
            Ok(Parts { layers: layers(&|_| (attention.clone(), moe.clone())), scales, ..Parts::default() })
        }
        Variant::Hunyuan => {
            refuse_scaling(keys)?;
            let attention = Gqa { qk_norm: QkNorm::PerHead, qk_norm_after_rope: true, ..attention };
            let shared =
                SharedExperts { count: 1, inner_size: keys.u32("expert_shared_feed_forward_length")?, sigmoid_gate: false };
            let moe = Moe { shared: Some(shared), ..moe };
            Ok(Parts { layers: layers(&|_| (attention.clone(), moe.clone())), ..Parts::default() })
        }
        Variant::Llama4 => {
            refuse_scaling(keys)?;
            if let Some(window) = keys.opt_u32("attention.sliding_window")? {
                let hint = "chunks of another length are not implemented for this architecture";
                return Err(keys.refuse("attention.sliding_window", window, "no such key", hint));
            }
            let step = keys.opt_u32("interleave_moe_layer_step")?.unwrap_or(1).max(1) as usize;
            // No key says it: of the published models the one with 128 experts has no norm.
            let normed = num_experts != 128;
            let rotated = Gqa {
                chunk: Some(8192),
                qk_norm: if normed { QkNorm::Unweighted } else { QkNorm::None },
                qk_norm_after_rope: normed,
                ..attention.clone()
            };
            let unrotated = Gqa { rope: None, temperature: Some(Temperature { scale: 0.1, period: 8192 }), ..attention };
            let shared = Some(SharedExperts { count: 1, inner_size: moe.inner_size, sigmoid_gate: false });
            let router = Router { score: RouterScore::Sigmoid, ..Router::softmax(false) };
            let moe = Moe { weights_on_input: true, shared, router, ..moe };
            let dense = DenseFfn { inner_size: keys.u32("feed_forward_length")?, gated: true };
            let layer = |l: usize| LayerSpec {
                attention: Attention::Gqa(if (l + 1).is_multiple_of(4) { unrotated.clone() } else { rotated.clone() }),
                ffn: if (l + 1).is_multiple_of(step) { Ffn::Moe(moe.clone()) } else { Ffn::Dense(dense.clone()) },
            };
            Ok(Parts { layers: (0..num_layers).map(layer).collect(), ..Parts::default() })
        }
        Variant::QwenNext | Variant::Qwen35 => {
            refuse_scaling(keys)?;
            let layers = gguf_delta::layers(keys, family, attention, &moe, num_layers)?;
            Ok(Parts { layers, ..Parts::default() })
        }
        Variant::Phi => {
            // The frequencies' two sets are tensors (`gguf_rope`); no other scaling goes with them.
            if keys.metadata.opt_str(&keys.key("rope.scaling.type"))? != Some("longrope") {
                refuse_scaling(keys)?;
            }
            let context = keys.u32("context_length")?;
            // A window that is as long as the context is none.
            let window = keys.opt_u32("attention.sliding_window")?.filter(|w| *w > 0 && *w < context);
            let attention = Gqa { qkv_bias: true, output_bias: true, sliding_window: window, ..attention };
            let moe = Moe { router: Router { score: RouterScore::SparseMixer, ..Router::softmax(false) }, ..moe };
            let layers = layers(&|_| (attention.clone(), moe.clone()));
            Ok(Parts { layers, norm: NormKind::Layer, output_bias: true, ..Parts::default() })
        }
    }
}

fn inner_size(keys: &Keys<'_>) -> Result<u32> {
    match keys.opt_u32("expert_feed_forward_length")? {
        Some(width) => Ok(width),
        None => keys.u32("feed_forward_length"),
    }
}

fn attention(keys: &Keys<'_>, family: &Family) -> Result<Gqa> {
    let num_heads = keys.u32("attention.head_count")?;
    let head_dim = match keys.opt_u32("attention.key_length")? {
        Some(length) => length,
        None => keys.u32("embedding_length")?.checked_div(num_heads).unwrap_or(0),
    };
    let value_length = keys.opt_u32("attention.value_length")?.unwrap_or(head_dim);
    if value_length != head_dim {
        let hint = "value heads of another width are not implemented";
        return Err(keys.refuse("attention.value_length", value_length, &format!("{head_dim}, the key length"), hint));
    }
    let theta = keys.metadata.opt_f32(&keys.key("rope.freq_base"))?.unwrap_or(1e4);
    let rotary = keys.opt_u32("rope.dimension_count")?.unwrap_or(head_dim);
    let num_kv_heads = keys.opt_u32("attention.head_count_kv")?.unwrap_or(num_heads);
    Ok(Gqa::plain(num_heads, num_kv_heads, head_dim, Rope::plain(theta, rotary, family.gguf_pairing)))
}

fn refuse_scaling(keys: &Keys<'_>) -> Result<()> {
    match keys.metadata.opt_str(&keys.key("rope.scaling.type"))? {
        None | Some("none") => Ok(()),
        Some(kind) => Err(keys.refuse("rope.scaling.type", format!("{kind:?}"), "none", "not implemented for this architecture")),
    }
}

/// gpt-oss's frequencies: YaRN whose bounds are not rounded, as the model's own code has it.
fn yarn(keys: &Keys<'_>, rope: Option<Rope>) -> Result<Rope> {
    let rope = rope.expect("rotated");
    match keys.metadata.opt_str(&keys.key("rope.scaling.type"))? {
        None | Some("none") => return Ok(rope),
        Some("yarn") => {}
        Some(other) => {
            return Err(keys.refuse("rope.scaling.type", format!("{other:?}"), "none or yarn", "not implemented here"));
        }
    }
    let number = |suffix: &str| keys.metadata.opt_f32(&keys.key(suffix));
    let factor = keys.metadata.get_f32(&keys.key("rope.scaling.factor"))?;
    let scaling = RopeScaling::Yarn {
        factor,
        original_context: keys.u32("rope.scaling.original_context_length")?,
        beta_fast: number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        attention_factor: yarn_magnitude(f64::from(factor), 1.0) as f32,
        truncate: false,
    };
    Ok(Rope { scaling: Some(scaling), ..rope })
}
