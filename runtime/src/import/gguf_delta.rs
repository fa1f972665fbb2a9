//! GGUF metadata of Qwen3-Next and Qwen3.5-MoE to layers, and back.
//!
//! Keys and defaults are those of llama.cpp (`src/models/qwen3next.cpp`, `qwen35moe.cpp`). Files of Qwen3.5 hold value heads in another
//! order than checkpoints: those of one key head are not neighbours.

use super::families::{Family, Variant};
use super::gguf::Keys;
use crate::error::Result;
use crate::gguf::{Array, Value};
use tierwise_cost::model::{
    Attention, DeltaNet, DenseFfn, Ffn, Geometry, Gqa, LayerSpec, Moe, QkNorm, Router, SharedExperts, ValueHeads,
};

/// The layers; `attention` is that of the layers without recurrence, but for what these families have alone.
pub(super) fn layers(keys: &Keys<'_>, family: &Family, attention: Gqa, moe: &Moe, num_layers: usize) -> Result<Vec<LayerSpec>> {
    let is_next = family.variant == Some(Variant::QwenNext);
    let num_value_heads = keys.u32("ssm.time_step_rank")?;
    let delta = DeltaNet {
        num_key_heads: keys.u32("ssm.group_count")?,
        num_value_heads,
        key_head_dim: keys.u32("ssm.state_size")?,
        value_head_dim: keys.u32("ssm.inner_size")?.checked_div(num_value_heads).unwrap_or(0),
        conv_kernel: keys.u32("ssm.conv_kernel")?,
        fused_gates: is_next,
        value_heads: if is_next { ValueHeads::Grouped } else { ValueHeads::Tiled },
    }
    .canonical();
    let gated = Gqa { output_gate: true, qk_norm: QkNorm::PerHead, ..attention };
    let inner_size = match keys.opt_u32("expert_shared_feed_forward_length")? {
        Some(width) => width,
        None => keys.u32("feed_forward_length")?,
    };
    let shared = SharedExperts { count: 1, inner_size, sigmoid_gate: true };
    let moe = Moe { shared: Some(shared), router: Router::softmax(true), ..moe.clone() };
    let recurrent = recurrent(keys, num_layers)?;
    let layer = |recurrent: bool| LayerSpec {
        attention: if recurrent { Attention::DeltaNet(delta.clone()) } else { Attention::Gqa(gated.clone()) },
        ffn: if moe.num_experts > 0 { Ffn::Moe(moe.clone()) } else { Ffn::Dense(DenseFfn { inner_size, gated: true }) },
    };
    Ok(recurrent.into_iter().map(layer).collect())
}

fn recurrent(keys: &Keys<'_>, num_layers: usize) -> Result<Vec<bool>> {
    let suffix = "attention.recurrent_layers";
    match keys.metadata.get(&keys.key(suffix)) {
        Some(Value::Array(Array::Bool(list))) if list.len() >= num_layers => Ok(list[..num_layers].to_vec()),
        Some(Value::Bool(all)) => Ok(vec![*all; num_layers]),
        Some(other) => Err(keys.refuse(
            suffix,
            format!("{other:?}"),
            &format!("a list of {num_layers} truth values"),
            "convert the model again",
        )),
        None => {
            let interval = keys.opt_u32("full_attention_interval")?.unwrap_or(4);
            if interval == 0 {
                return Err(keys.refuse("full_attention_interval", 0, "1 or more", ""));
            }
            Ok((0..num_layers).map(|l| !(l as u32 + 1).is_multiple_of(interval)).collect())
        }
    }
}

/// The keys that [`layers`] reads, besides those of attention and experts.
pub(super) fn write(g: &Geometry, m: &Moe, arch: &mut dyn FnMut(&str, Value)) {
    arch("expert_feed_forward_length", m.inner_size.into());
    if let Some(shared) = &m.shared {
        arch("expert_shared_feed_forward_length", shared.inner_size.into());
    }
    let is_delta = |l: &LayerSpec| matches!(l.attention, Attention::DeltaNet(_));
    arch("attention.recurrent_layers", g.layers.iter().map(is_delta).collect::<Vec<bool>>().into());
    let Some(Attention::DeltaNet(a)) = g.layers.iter().find(|l| is_delta(l)).map(|l| &l.attention) else { return };
    arch("ssm.conv_kernel", a.conv_kernel.into());
    arch("ssm.state_size", a.key_head_dim.into());
    arch("ssm.group_count", a.num_key_heads.into());
    arch("ssm.time_step_rank", a.num_value_heads.into());
    arch("ssm.inner_size", a.value_dim().into());
}
