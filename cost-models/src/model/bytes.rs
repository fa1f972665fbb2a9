//! Byte counts: sums over the tensor table and the cache geometry.

use super::{Attention, Ffn, ModelSpec, RoleGroup, TensorRole};
use crate::cost::expected_distinct_of;
use crate::quant::QuantFormat;
use crate::units::Bytes;

/// Bytes of one role group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoleBytes {
    /// The group.
    pub group: RoleGroup,
    /// Its bytes over the whole model.
    pub bytes: Bytes,
}

/// Bytes of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerBytes {
    /// Everything but the routed experts.
    pub resident: Bytes,
    /// All routed experts together.
    pub routed: Bytes,
    /// One routed expert: its slices of the gate, up and down tensors.
    pub per_expert: Bytes,
}

impl ModelSpec {
    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> Bytes {
        self.tensors.iter().map(|t| t.bytes).sum()
    }

    /// Elements of all tensors: the parameter count.
    pub fn total_elements(&self) -> u64 {
        self.tensors.iter().map(super::TensorSpec::elements).sum()
    }

    /// Bytes by role group, empty groups left out.
    pub fn bytes_by_role(&self) -> Vec<RoleBytes> {
        RoleGroup::ALL
            .iter()
            .map(|group| RoleBytes {
                group: *group,
                bytes: self.tensors.iter().filter(|t| t.role.group() == *group).map(|t| t.bytes).sum(),
            })
            .filter(|r| r.bytes.0 > 0)
            .collect()
    }

    /// Bytes by format, in table order, unused formats left out.
    pub fn bytes_by_format(&self) -> Vec<(QuantFormat, Bytes)> {
        QuantFormat::ALL
            .iter()
            .map(|f| (*f, self.tensors.iter().filter(|t| t.format == *f).map(|t| t.bytes).sum()))
            .filter(|(_, b): &(_, Bytes)| b.0 > 0)
            .collect()
    }

    /// Bytes of each layer, first to last.
    pub fn layer_bytes(&self) -> Vec<LayerBytes> {
        let mut layers = vec![LayerBytes::default(); self.layers.len()];
        for t in &self.tensors {
            let Some(layer) = t.layer else { continue };
            let slot = &mut layers[layer as usize];
            if t.role.is_routed_expert() {
                slot.routed += t.bytes;
                slot.per_expert += Bytes(t.bytes.0 / t.shape[0]);
            } else {
                slot.resident += t.bytes;
            }
        }
        layers
    }

    /// Bytes of all routed experts.
    pub fn expert_bytes(&self) -> Bytes {
        self.tensors.iter().filter(|t| t.role.is_routed_expert()).map(|t| t.bytes).sum()
    }

    /// Bytes that decoding one token reads: everything but unrouted experts and all but one row of the embedding table.
    pub fn active_bytes_per_token(&self) -> Bytes {
        self.tensors.iter().map(|t| Bytes((t.bytes.0 as f64 * self.active_fraction(t)).round() as u64)).sum()
    }

    /// Elements used for one token: the "active parameters".
    pub fn active_elements_per_token(&self) -> u64 {
        self.tensors.iter().map(|t| (t.elements() as f64 * self.active_fraction(t)).round() as u64).sum()
    }

    fn active_fraction(&self, t: &super::TensorSpec) -> f64 {
        if t.role == TensorRole::TokenEmbedding && !self.tie_word_embeddings {
            return 1.0 / f64::from(self.vocab_size);
        }
        match (t.role.is_routed_expert(), t.layer.map(|l| &self.layers[l as usize].ffn)) {
            (true, Some(Ffn::Moe(m))) => {
                expected_distinct_of(m.num_experts, m.mean_choices(), m.iterations) / f64::from(m.num_experts)
            }
            _ => 1.0,
        }
    }

    /// Bytes of keys and values that `context` tokens of one sequence occupy in layer `layer`.
    pub fn kv_bytes_of_layer(&self, layer: u32, context: u64, format: QuantFormat) -> Bytes {
        let (elements, window) = match &self.layers[layer as usize].attention {
            Attention::Gqa(a) => (2 * u64::from(a.num_kv_heads) * u64::from(a.head_dim), a.reach()),
            Attention::Mla(a) => (u64::from(a.kv_lora_rank) + u64::from(a.qk_rope_head_dim), None),
            Attention::DeltaNet(_) => (0, None),
            Attention::PlanOnly(m) => (m.kv_elements_per_token, m.sliding_window),
        };
        let tokens = window.map_or(context, |w| context.min(u64::from(w)));
        let l = format.layout();
        let state = match &self.layers[layer as usize].attention {
            Attention::PlanOnly(m) => m.state_elements * 4,
            Attention::DeltaNet(a) => a.state_elements() * 4,
            Attention::Gqa(_) | Attention::Mla(_) => 0,
        };
        Bytes(tokens * elements * u64::from(l.bytes) / u64::from(l.elems) + state)
    }

    /// Bytes of keys and values of `context` tokens of one sequence over all layers.
    pub fn kv_bytes(&self, context: u64, format: QuantFormat) -> Bytes {
        (0..self.layers.len() as u32).map(|l| self.kv_bytes_of_layer(l, context, format)).sum()
    }

    /// Bytes that one more token adds to an unbounded cache, at the start of a sequence.
    pub fn kv_bytes_per_token(&self, format: QuantFormat) -> Bytes {
        Bytes(self.kv_bytes(1, format).0 - self.kv_bytes(0, format).0)
    }
}
