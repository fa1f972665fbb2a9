//! The tensor table: every tensor's name, role and shape follow from the geometry.
//!
//! Names are those of GGUF files. Importers check files against this list, `synth` writes it, planning sums it.

use super::{Attention, DeltaNet, Ffn, Geometry, Gqa, Mla, Moe, NormKind, QkNorm};
use crate::error::CostError;
use crate::quant::QuantFormat;
use crate::units::Bytes;

/// Index into [`super::ModelSpec::tensors`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(pub u32);

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "each variant is the field's own word")]
pub enum TensorRole {
    TokenEmbedding,
    OutputNorm,
    OutputNormBias,
    Output,
    OutputBias,
    AttentionNorm,
    AttentionNormBias,
    AttentionQ,
    AttentionK,
    AttentionV,
    AttentionQBias,
    AttentionKBias,
    AttentionVBias,
    AttentionQNorm,
    AttentionKNorm,
    AttentionOutput,
    AttentionOutputBias,
    /// A logit per head without a value.
    AttentionSinks,
    /// MLA: query compression, its norm and expansion.
    AttentionQA,
    AttentionQANorm,
    AttentionQB,
    /// MLA: key/value compression with the rotated key, its norm and the two expansions.
    AttentionKvA,
    AttentionKvANorm,
    AttentionKB,
    AttentionVB,
    /// Gated delta rule: queries, keys and values, the gate of the result, the projections to beta and decay (or both in one), the
    /// convolution, bias and rate of the decay, the norm of the result.
    DeltaQkv,
    DeltaGate,
    DeltaBeta,
    DeltaAlpha,
    DeltaBetaAlpha,
    DeltaConv,
    DeltaDtBias,
    DeltaDecay,
    DeltaNorm,
    /// Weights of a mixing part known only by its size.
    PlanOnlyMixer,
    FfnNorm,
    FfnNormBias,
    Router,
    /// Bias of the router's projection.
    RouterLogitBias,
    /// Added to the scores for the choice only.
    RouterBias,
    ExpertGate,
    ExpertUp,
    ExpertDown,
    ExpertGateBias,
    ExpertUpBias,
    ExpertDownBias,
    /// Projections into and out of the experts' latent width.
    LatentDown,
    LatentUp,
    SharedRouter,
    SharedGate,
    SharedUp,
    SharedDown,
    DenseGate,
    DenseUp,
    DenseDown,
}

/// Roles as a user counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "each variant is the field's own word")]
pub enum RoleGroup {
    Embedding,
    Attention,
    Norms,
    Router,
    RoutedExperts,
    SharedExperts,
    DenseFfn,
    Output,
}

impl RoleGroup {
    /// Every group, in the order in which tables show them.
    pub const ALL: &'static [Self] = &[
        Self::Embedding,
        Self::Attention,
        Self::Norms,
        Self::Router,
        Self::RoutedExperts,
        Self::SharedExperts,
        Self::DenseFfn,
        Self::Output,
    ];

    /// Name in tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::Norms => "norms",
            Self::Router => "router",
            Self::RoutedExperts => "routed experts",
            Self::SharedExperts => "shared experts",
            Self::DenseFfn => "dense ffn",
            Self::Output => "output",
        }
    }
}

impl TensorRole {
    /// The group this role is counted under.
    pub const fn group(self) -> RoleGroup {
        match self {
            Self::TokenEmbedding => RoleGroup::Embedding,
            Self::Output | Self::OutputBias => RoleGroup::Output,
            Self::OutputNorm
            | Self::OutputNormBias
            | Self::AttentionNorm
            | Self::AttentionNormBias
            | Self::FfnNormBias
            | Self::AttentionQNorm
            | Self::AttentionKNorm
            | Self::AttentionQANorm
            | Self::AttentionKvANorm
            | Self::DeltaNorm
            | Self::FfnNorm => RoleGroup::Norms,
            Self::AttentionQ
            | Self::AttentionK
            | Self::AttentionV
            | Self::AttentionQBias
            | Self::AttentionKBias
            | Self::AttentionVBias
            | Self::AttentionOutput
            | Self::AttentionOutputBias
            | Self::AttentionSinks
            | Self::AttentionQA
            | Self::AttentionQB
            | Self::AttentionKvA
            | Self::AttentionKB
            | Self::AttentionVB
            | Self::DeltaQkv
            | Self::DeltaGate
            | Self::DeltaBeta
            | Self::DeltaAlpha
            | Self::DeltaBetaAlpha
            | Self::DeltaConv
            | Self::DeltaDtBias
            | Self::DeltaDecay
            | Self::PlanOnlyMixer => RoleGroup::Attention,
            // Experts' biases are small and stay with the router, wherever the experts themselves go.
            Self::Router
            | Self::RouterLogitBias
            | Self::RouterBias
            | Self::ExpertGateBias
            | Self::ExpertUpBias
            | Self::ExpertDownBias => RoleGroup::Router,
            Self::ExpertGate | Self::ExpertUp | Self::ExpertDown | Self::LatentDown | Self::LatentUp => RoleGroup::RoutedExperts,
            Self::SharedRouter | Self::SharedGate | Self::SharedUp | Self::SharedDown => RoleGroup::SharedExperts,
            Self::DenseGate | Self::DenseUp | Self::DenseDown => RoleGroup::DenseFfn,
        }
    }

    /// A vector per routed expert; it stays in memory wherever the expert's matrices go.
    pub const fn is_expert_bias(self) -> bool {
        matches!(self, Self::ExpertGateBias | Self::ExpertUpBias | Self::ExpertDownBias)
    }

    /// Stored in two dimensions, used element by element: kept in plain floats.
    pub const fn is_elementwise(self) -> bool {
        self.is_expert_bias() || matches!(self, Self::DeltaConv)
    }

    /// A part of a gated delta rule.
    pub const fn is_delta(self) -> bool {
        use TensorRole as R;
        matches!(
            self,
            R::DeltaQkv
                | R::DeltaGate
                | R::DeltaBeta
                | R::DeltaAlpha
                | R::DeltaBetaAlpha
                | R::DeltaConv
                | R::DeltaDtBias
                | R::DeltaDecay
                | R::DeltaNorm
        )
    }

    /// One slice of the outermost dimension belongs to one routed expert that is placed.
    pub const fn is_routed_expert(self) -> bool {
        matches!(self, Self::ExpertGate | Self::ExpertUp | Self::ExpertDown)
    }
}

/// A tensor's identity and shape, without format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorShape {
    /// GGUF name, e.g. `blk.3.ffn_up_exps.weight`.
    pub name: String,
    /// What it is for.
    pub role: TensorRole,
    /// Its layer, or `None` outside the layers.
    pub layer: Option<u32>,
    /// Dimensions, outermost first: `[experts, rows, cols]`, `[rows, cols]` or `[cols]`.
    pub shape: Vec<u64>,
}

/// A tensor with its format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// GGUF name.
    pub name: String,
    /// What it is for.
    pub role: TensorRole,
    /// Its layer, or `None` outside the layers.
    pub layer: Option<u32>,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// How its rows are stored.
    pub format: QuantFormat,
    /// Bytes in a file or in memory.
    pub bytes: Bytes,
}

impl TensorSpec {
    /// Shape and format to bytes.
    ///
    /// # Errors
    /// [`CostError::RowNotBlocked`] when rows are not whole blocks.
    pub fn new(t: TensorShape, format: QuantFormat) -> Result<Self, CostError> {
        let bytes = format.tensor_bytes(&t.shape).ok_or_else(|| CostError::RowNotBlocked {
            tensor: t.name.clone(),
            cols: t.shape.last().copied().unwrap_or(0),
            format: format.name(),
            block: u64::from(format.layout().elems),
        })?;
        Ok(Self { name: t.name, role: t.role, layer: t.layer, shape: t.shape, format, bytes })
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

struct Table(Vec<TensorShape>);

impl Table {
    fn push(&mut self, layer: Option<u32>, suffix: &str, role: TensorRole, shape: &[u32]) {
        let name = match layer {
            Some(l) => format!("blk.{l}.{suffix}"),
            None => suffix.to_string(),
        };
        self.0.push(TensorShape { name, role, layer, shape: shape.iter().map(|d| u64::from(*d)).collect() });
    }
}

/// Every tensor that a model of this geometry has, in file order.
pub fn tensor_shapes(g: &Geometry) -> Vec<TensorShape> {
    use TensorRole as R;
    let h = g.hidden_size;
    let mut t = Table(Vec::new());
    t.push(None, "token_embd.weight", R::TokenEmbedding, &[g.vocab_size, h]);
    for (i, layer) in g.layers.iter().enumerate() {
        let l = Some(i as u32);
        match &layer.attention {
            Attention::Gqa(a) => push_gqa(&mut t, l, g, a),
            Attention::Mla(a) => push_mla(&mut t, l, h, a),
            Attention::DeltaNet(a) => push_delta(&mut t, l, h, a),
            // Hybrid models have layers that only mix and layers that only transform.
            Attention::PlanOnly(m) if m.weight_elements == 0 => {}
            Attention::PlanOnly(m) => {
                t.push(l, "attn_norm.weight", R::AttentionNorm, &[h]);
                // One matrix of the right size; rows of the hidden size where it divides, so that block formats apply.
                let shape = if m.weight_elements.is_multiple_of(u64::from(h)) {
                    vec![m.weight_elements / u64::from(h), u64::from(h)]
                } else {
                    vec![1, m.weight_elements]
                };
                let name = format!("blk.{i}.mixer.weight");
                t.0.push(TensorShape { name, role: R::PlanOnlyMixer, layer: l, shape });
            }
        }
        if !matches!(layer.ffn, Ffn::None) {
            let name = ffn_norm_name(&g.architecture);
            t.push(l, &format!("{name}.weight"), R::FfnNorm, &[h]);
            if g.norm == NormKind::Layer {
                t.push(l, &format!("{name}.bias"), R::FfnNormBias, &[h]);
            }
        }
        match &layer.ffn {
            Ffn::Dense(d) => push_dense(&mut t, l, h, d.inner_size, d.gated),
            Ffn::Moe(m) => push_moe(&mut t, l, h, m),
            Ffn::None => {}
        }
    }
    t.push(None, "output_norm.weight", R::OutputNorm, &[h]);
    if g.norm == NormKind::Layer {
        t.push(None, "output_norm.bias", R::OutputNormBias, &[h]);
    }
    if !g.tie_word_embeddings {
        t.push(None, "output.weight", R::Output, &[g.vocab_size, h]);
    }
    if g.output_bias {
        t.push(None, "output.bias", R::OutputBias, &[g.vocab_size]);
    }
    t.0
}

/// What GGUF files of this architecture call the norm before the feed-forward part.
fn ffn_norm_name(architecture: &str) -> &'static str {
    match architecture {
        "gpt-oss" | "glm4moe" | "qwen3next" | "qwen35moe" => "post_attention_norm",
        _ => "ffn_norm",
    }
}

fn push_gqa(t: &mut Table, l: Option<u32>, g: &Geometry, a: &Gqa) {
    use TensorRole as R;
    let h = g.hidden_size;
    let (q, kv) = (a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim);
    t.push(l, "attn_norm.weight", R::AttentionNorm, &[h]);
    if g.norm == NormKind::Layer {
        t.push(l, "attn_norm.bias", R::AttentionNormBias, &[h]);
    }
    t.push(l, "attn_q.weight", R::AttentionQ, &[if a.output_gate { 2 * q } else { q }, h]);
    t.push(l, "attn_k.weight", R::AttentionK, &[kv, h]);
    t.push(l, "attn_v.weight", R::AttentionV, &[kv, h]);
    if a.qkv_bias {
        t.push(l, "attn_q.bias", R::AttentionQBias, &[q]);
        t.push(l, "attn_k.bias", R::AttentionKBias, &[kv]);
        t.push(l, "attn_v.bias", R::AttentionVBias, &[kv]);
    }
    let norms = match a.qk_norm {
        QkNorm::None | QkNorm::Unweighted => None,
        QkNorm::PerHead => Some((a.head_dim, a.head_dim)),
        QkNorm::FullWidth => Some((q, kv)),
    };
    if let Some((q, k)) = norms {
        t.push(l, "attn_q_norm.weight", R::AttentionQNorm, &[q]);
        t.push(l, "attn_k_norm.weight", R::AttentionKNorm, &[k]);
    }
    t.push(l, "attn_output.weight", R::AttentionOutput, &[h, q]);
    if a.output_bias {
        t.push(l, "attn_output.bias", R::AttentionOutputBias, &[h]);
    }
    if a.sinks {
        t.push(l, "attn_sinks.weight", R::AttentionSinks, &[a.num_heads]);
    }
}

fn push_mla(t: &mut Table, l: Option<u32>, h: u32, a: &Mla) {
    use TensorRole as R;
    let qk = a.qk_nope_head_dim + a.qk_rope_head_dim;
    t.push(l, "attn_norm.weight", R::AttentionNorm, &[h]);
    match a.q_lora_rank {
        Some(rank) => {
            t.push(l, "attn_q_a.weight", R::AttentionQA, &[rank, h]);
            t.push(l, "attn_q_a_norm.weight", R::AttentionQANorm, &[rank]);
            t.push(l, "attn_q_b.weight", R::AttentionQB, &[a.num_heads * qk, rank]);
        }
        None => t.push(l, "attn_q.weight", R::AttentionQ, &[a.num_heads * qk, h]),
    }
    t.push(l, "attn_kv_a_mqa.weight", R::AttentionKvA, &[a.kv_lora_rank + a.qk_rope_head_dim, h]);
    t.push(l, "attn_kv_a_norm.weight", R::AttentionKvANorm, &[a.kv_lora_rank]);
    t.push(l, "attn_k_b.weight", R::AttentionKB, &[a.num_heads, a.kv_lora_rank, a.qk_nope_head_dim]);
    t.push(l, "attn_v_b.weight", R::AttentionVB, &[a.num_heads, a.v_head_dim, a.kv_lora_rank]);
    t.push(l, "attn_output.weight", R::AttentionOutput, &[h, a.num_heads * a.v_head_dim]);
}

fn push_delta(t: &mut Table, l: Option<u32>, h: u32, a: &DeltaNet) {
    use TensorRole as R;
    let heads = a.num_value_heads;
    t.push(l, "attn_norm.weight", R::AttentionNorm, &[h]);
    t.push(l, "attn_qkv.weight", R::DeltaQkv, &[a.channels(), h]);
    t.push(l, "attn_gate.weight", R::DeltaGate, &[a.value_dim(), h]);
    if a.fused_gates {
        t.push(l, "ssm_ba.weight", R::DeltaBetaAlpha, &[2 * heads, h]);
    } else {
        t.push(l, "ssm_beta.weight", R::DeltaBeta, &[heads, h]);
        t.push(l, "ssm_alpha.weight", R::DeltaAlpha, &[heads, h]);
    }
    t.push(l, "ssm_conv1d.weight", R::DeltaConv, &[a.channels(), a.conv_kernel]);
    t.push(l, "ssm_dt.bias", R::DeltaDtBias, &[heads]);
    t.push(l, "ssm_a", R::DeltaDecay, &[heads]);
    t.push(l, "ssm_norm.weight", R::DeltaNorm, &[a.value_head_dim]);
    t.push(l, "ssm_out.weight", R::AttentionOutput, &[h, a.value_dim()]);
}

fn push_dense(t: &mut Table, l: Option<u32>, h: u32, inner: u32, gated: bool) {
    use TensorRole as R;
    if gated {
        t.push(l, "ffn_gate.weight", R::DenseGate, &[inner, h]);
    }
    t.push(l, "ffn_up.weight", R::DenseUp, &[inner, h]);
    t.push(l, "ffn_down.weight", R::DenseDown, &[h, inner]);
}

fn push_moe(t: &mut Table, l: Option<u32>, h: u32, m: &Moe) {
    use TensorRole as R;
    let (e, inner) = (m.num_experts, m.inner_size);
    let width = m.latent_size.unwrap_or(h);
    // One router after the other.
    t.push(l, "ffn_gate_inp.weight", R::Router, &[m.iterations * e, h]);
    if m.router.bias {
        t.push(l, "ffn_gate_inp.bias", R::RouterLogitBias, &[m.iterations * e]);
    }
    if m.router.selection_bias {
        t.push(l, "exp_probs_b.bias", R::RouterBias, &[m.iterations * e]);
    }
    if let Some(latent) = m.latent_size {
        t.push(l, "ffn_latent_down.weight", R::LatentDown, &[latent, h]);
        t.push(l, "ffn_latent_up.weight", R::LatentUp, &[h, latent]);
    }
    if m.gated {
        t.push(l, "ffn_gate_exps.weight", R::ExpertGate, &[e, inner, width]);
    }
    t.push(l, "ffn_up_exps.weight", R::ExpertUp, &[e, inner, width]);
    t.push(l, "ffn_down_exps.weight", R::ExpertDown, &[e, width, inner]);
    if m.expert_bias {
        if m.gated {
            t.push(l, "ffn_gate_exps.bias", R::ExpertGateBias, &[e, inner]);
        }
        t.push(l, "ffn_up_exps.bias", R::ExpertUpBias, &[e, inner]);
        t.push(l, "ffn_down_exps.bias", R::ExpertDownBias, &[e, width]);
    }
    if let Some(s) = &m.shared {
        if s.sigmoid_gate {
            t.push(l, "ffn_gate_inp_shexp.weight", R::SharedRouter, &[h]);
        }
        if m.gated {
            t.push(l, "ffn_gate_shexp.weight", R::SharedGate, &[s.inner_size, h]);
        }
        t.push(l, "ffn_up_shexp.weight", R::SharedUp, &[s.inner_size, h]);
        t.push(l, "ffn_down_shexp.weight", R::SharedDown, &[h, s.inner_size]);
    }
    if let Some(inner) = m.parallel_dense_inner_size {
        push_dense(t, l, h, inner, m.gated);
    }
}
