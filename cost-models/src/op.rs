//! The one lowering: (model, batch) to a list of operations.
//!
//! The runtime executes this list, the cost model prices it, the benches measure it; there is no second list.
//! Operations name tensors by [`TensorId`] and activations by [`Slot`]; shapes follow from the batch.

use crate::error::CostError;
use crate::model::{
    Attention, DeltaNet, Ffn, Gqa, Mla, ModelSpec, Moe, NormKind, QkNorm, Rope, Temperature, TensorId, TensorRole,
};

/// What one step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Tokens computed in this step, over all sequences.
    pub tokens: u32,
    /// Positions already in the cache, per sequence.
    pub past: u32,
    /// Sequences the tokens belong to, evenly.
    pub sequences: u32,
    /// Positions whose logits are wanted.
    pub logits: u32,
}

impl Batch {
    /// One token after `past` others, with logits.
    pub const fn decode(past: u32) -> Self {
        Self { tokens: 1, past, sequences: 1, logits: 1 }
    }

    /// `tokens` tokens of one sequence after `past` others, logits for the last.
    pub const fn prefill(tokens: u32, past: u32) -> Self {
        Self { tokens, past, sequences: 1, logits: 1 }
    }
}

/// An activation buffer of a step. Shapes are `[tokens, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Slot {
    /// The residual stream: `[tokens, hidden_size]`.
    Hidden,
    /// Its norm: input of the next matrices.
    Normed,
    /// Queries: `[tokens, num_heads * head_dim]`.
    Q,
    /// Keys of the new tokens: `[tokens, num_kv_heads * head_dim]`.
    K,
    /// Values of the new tokens: `[tokens, num_kv_heads * head_dim]`.
    V,
    /// Attention's result: `[tokens, num_heads * head_dim]`.
    Attended,
    /// What a part adds to the residual stream: `[tokens, hidden_size]`.
    Delta,
    /// Output: `[logits, vocab_size]`.
    Logits,
    /// Compressed queries of latent attention: `[tokens, q_lora_rank]`.
    QLatent,
    /// Their norm.
    QLatentNormed,
    /// Compressed keys and values of the new tokens with the key that is rotated: `[tokens, kv_lora_rank + qk_rope_head_dim]`.
    KvLatent,
    /// What gates attention's result: `[tokens, num_heads * head_dim]`.
    Gate,
    /// Beta's projection in a gated delta rule, alone or with the decay's: `[tokens, num_value_heads]` or twice that.
    Beta,
    /// The decay's, where it is apart: `[tokens, num_value_heads]`.
    Alpha,
}

impl Slot {
    /// How many there are.
    pub const COUNT: usize = Self::Alpha as usize + 1;

    /// Its number, from 0, in the order above.
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// One operation of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Op {
    /// Its layer, or `None` outside the layers.
    pub layer: Option<u32>,
    /// What it does.
    pub kind: OpKind,
}

/// What an operation does. A closed set: every back-end runs exactly these.
#[derive(Debug, Clone, PartialEq)]
pub enum OpKind {
    /// Rows of the embedding table into [`Slot::Hidden`].
    Embed {
        /// `[vocab_size, hidden_size]`.
        table: TensorId,
    },
    /// RMS norm over the whole width.
    RmsNorm {
        /// `[width]`.
        weight: TensorId,
        /// Read.
        input: Slot,
        /// Written.
        output: Slot,
    },
    /// Norm over the whole width with the mean subtracted first.
    LayerNorm {
        /// `[width]`.
        weight: TensorId,
        /// `[width]`.
        bias: TensorId,
        /// Read.
        input: Slot,
        /// Written.
        output: Slot,
    },
    /// Every element times a factor, in place.
    Scale {
        /// Read and written.
        slot: Slot,
        /// The factor.
        factor: f32,
    },
    /// `output = input * weight^T (+ bias)`.
    MatMul {
        /// `[rows, cols]`.
        weight: TensorId,
        /// `[rows]`.
        bias: Option<TensorId>,
        /// `[tokens, cols]`.
        input: Slot,
        /// `[tokens, rows]`.
        output: Slot,
    },
    /// RMS norm of queries or keys, per head or over all heads, in place.
    QkNorm {
        /// `[head_dim]` or `[heads * head_dim]`; `None` for a norm without weight.
        weight: Option<TensorId>,
        /// [`Slot::Q`] or [`Slot::K`].
        slot: Slot,
        /// What the norm spans.
        span: QkNorm,
        /// Width of one head.
        head_dim: u32,
    },
    /// Rotary position embedding of queries or keys, in place.
    Rope {
        /// [`Slot::Q`] or [`Slot::K`].
        slot: Slot,
        /// Width of one head.
        head_dim: u32,
        /// Frequencies and pairing.
        rope: Rope,
    },
    /// Queries grow with their position, in place.
    Temper(Temperature),
    /// Appends [`Slot::K`] and [`Slot::V`] to the cache, then attends: [`Slot::Q`] to [`Slot::Attended`].
    Attention {
        /// Sizes and variant.
        gqa: Gqa,
        /// `[num_heads]`: a logit per head without a value.
        sinks: Option<TensorId>,
    },
    /// Latent attention of [`Slot::Q`] over [`Slot::KvLatent`] and the cache, to [`Slot::Attended`]: norms the latent, rotates the
    /// rotary parts, appends both to the cache, attends. The result is as if keys and values were expanded for every head.
    LatentAttention {
        /// Sizes, rotation and scale.
        mla: Mla,
        /// `[kv_lora_rank]`.
        kv_norm: TensorId,
        /// Latent to keys, transposed: `[num_heads, kv_lora_rank, qk_nope_head_dim]`.
        k_b: TensorId,
        /// Latent to values: `[num_heads, v_head_dim, kv_lora_rank]`.
        v_b: TensorId,
    },
    /// Takes [`Slot::Q`] apart: of every head `[2, head_dim]` the queries stay, the others go to [`Slot::Gate`].
    SplitGate {
        /// Width of one head.
        head_dim: u32,
    },
    /// `Attended *= sigmoid(Gate)`.
    GateAttended,
    /// Gated delta rule over [`Slot::Q`] (queries, keys and values), [`Slot::Beta`] and [`Slot::Alpha`], gated by [`Slot::Gate`], to
    /// [`Slot::Attended`]. Goes on from the layer's states and leaves them after the last token.
    DeltaRule {
        /// Sizes.
        delta: DeltaNet,
        /// `[channels, conv_kernel]`.
        conv: TensorId,
        /// `[num_value_heads]`.
        dt_bias: TensorId,
        /// `[num_value_heads]`.
        decay: TensorId,
        /// `[value_head_dim]`.
        norm: TensorId,
    },
    /// `Hidden += factor * Delta`.
    AddDelta {
        /// The factor, 1 in most models.
        factor: f32,
    },
    /// `Logits = cap(factor * (Normed * weight^T + bias))`.
    Logits {
        /// `[vocab_size, hidden_size]`.
        weight: TensorId,
        /// `[vocab_size]`.
        bias: Option<TensorId>,
        /// The factor, 1 in most models.
        factor: f32,
        /// `cap(x) = softcap * tanh(x / softcap)`; else `x`.
        softcap: Option<f32>,
    },
    /// Scores [`Slot::Normed`], chooses experts and weights for each token. The engine is told the choice.
    Route {
        /// `[num_experts, hidden_size]`.
        weight: TensorId,
        /// `[num_experts]`: added to the logits.
        bias: Option<TensorId>,
        /// `[num_experts]`: added to the scores for the choice only.
        selection_bias: Option<TensorId>,
        /// The rule.
        moe: Moe,
        /// Which of the layer's routers it is: its rows follow those of the ones before.
        iteration: u32,
    },
    /// Weighted sum of the chosen experts' outputs on [`Slot::Normed`] into [`Slot::Delta`].
    RoutedExperts {
        /// `[num_experts, inner_size, hidden_size]`.
        gate: TensorId,
        /// `[num_experts, inner_size, hidden_size]`.
        up: TensorId,
        /// `[num_experts, hidden_size, inner_size]`.
        down: TensorId,
        /// Of gate, up and down: `[num_experts, inner_size]` twice, `[num_experts, hidden_size]`.
        biases: Option<[TensorId; 3]>,
        /// Sizes and activation.
        moe: Moe,
    },
    /// SwiGLU network on [`Slot::Normed`] into [`Slot::Delta`].
    Ffn {
        /// `[inner_size, hidden_size]`.
        gate: TensorId,
        /// `[inner_size, hidden_size]`.
        up: TensorId,
        /// `[hidden_size, inner_size]`.
        down: TensorId,
        /// Scales the output by the sigmoid of a projection: `[hidden_size]`.
        sigmoid_gate: Option<TensorId>,
        /// Add to [`Slot::Delta`] instead of overwriting it (shared experts beside routed ones).
        accumulate: bool,
    },
    /// `Delta += Normed`: an iteration of experts adds to its input.
    InnerResidual,
    /// `Normed = Delta`: the next iteration works on the result.
    NextIteration,
    /// Keeps the rows of [`Slot::Hidden`] whose logits are wanted.
    SelectRows,
}

/// The operations of one step, in order.
///
/// # Errors
/// [`CostError::BadModel`] when the model has a part that can be planned but not run (see [`ModelSpec::plan_only_reason`]).
pub fn lower(spec: &ModelSpec, batch: Batch) -> Result<Vec<Op>, CostError> {
    let refuse = |found: String| CostError::BadModel {
        model: spec.name.clone(),
        field: "architecture".into(),
        found,
        expected: "a model that the runtime can execute".into(),
    };
    if let Some(reason) = spec.plan_only_reason() {
        return Err(refuse(reason));
    }
    let index = Index::new(spec);
    let get = |layer: Option<u32>, role: TensorRole| {
        index.find(layer, role).ok_or_else(|| refuse(format!("a tensor table without {role:?} in layer {layer:?}")))
    };
    let mut ops = Vec::with_capacity(spec.layers.len() * 16 + 4);
    let mut push = |layer, kind| ops.push(Op { layer, kind });
    let embedding = get(None, TensorRole::TokenEmbedding)?;
    push(None, OpKind::Embed { table: embedding });
    let scales = spec.scales;
    if scales.embedding != 1.0 {
        push(None, OpKind::Scale { slot: Slot::Hidden, factor: scales.embedding });
    }
    let norm = |l, weight, bias| {
        let (weight, input, output) = (get(l, weight)?, Slot::Hidden, Slot::Normed);
        Ok::<_, CostError>(match spec.norm {
            NormKind::Rms => OpKind::RmsNorm { weight, input, output },
            NormKind::Layer => OpKind::LayerNorm { weight, bias: get(l, bias)?, input, output },
        })
    };
    let optional = |wanted: bool, l, role| if wanted { get(l, role).map(Some) } else { Ok(None) };
    for (i, layer) in spec.layers.iter().enumerate() {
        let l = Some(i as u32);
        push(l, norm(l, TensorRole::AttentionNorm, TensorRole::AttentionNormBias)?);
        match &layer.attention {
            Attention::Gqa(a) => lower_gqa(a, &|role| get(l, role), &mut |kind| push(l, kind))?,
            Attention::Mla(a) => lower_mla(a, &|role| get(l, role), &mut |kind| push(l, kind))?,
            Attention::DeltaNet(a) => lower_delta(a, &|role| get(l, role), &mut |kind| push(l, kind))?,
            Attention::PlanOnly(_) => return Err(refuse("an attention kind without execution".into())),
        }
        let output_bias = matches!(&layer.attention, Attention::Gqa(a) if a.output_bias);
        push(
            l,
            OpKind::MatMul {
                weight: get(l, TensorRole::AttentionOutput)?,
                bias: optional(output_bias, l, TensorRole::AttentionOutputBias)?,
                input: Slot::Attended,
                output: Slot::Delta,
            },
        );
        push(l, OpKind::AddDelta { factor: scales.residual });
        // Only the rows whose logits are wanted go on from the last layer's attention.
        if i + 1 == spec.layers.len() && batch.logits < batch.tokens {
            push(l, OpKind::SelectRows);
        }
        push(l, norm(l, TensorRole::FfnNorm, TensorRole::FfnNormBias)?);
        match &layer.ffn {
            Ffn::Dense(_) => push(
                l,
                OpKind::Ffn {
                    gate: get(l, TensorRole::DenseGate)?,
                    up: get(l, TensorRole::DenseUp)?,
                    down: get(l, TensorRole::DenseDown)?,
                    sigmoid_gate: None,
                    accumulate: false,
                },
            ),
            Ffn::Moe(m) => lower_moe(m, &|role| get(l, role), &mut |kind| push(l, kind))?,
            Ffn::None => return Err(refuse("a layer without feed-forward part".into())),
        }
        push(l, OpKind::AddDelta { factor: scales.residual });
    }
    push(None, norm(None, TensorRole::OutputNorm, TensorRole::OutputNormBias)?);
    let weight = if spec.tie_word_embeddings { embedding } else { get(None, TensorRole::Output)? };
    let bias = optional(spec.output_bias, None, TensorRole::OutputBias)?;
    push(None, OpKind::Logits { weight, bias, factor: scales.logits, softcap: scales.logits_softcap });
    Ok(ops)
}

/// Routers, experts and shared experts, as often as the layer applies them, on [`Slot::Normed`] into [`Slot::Delta`].
fn lower_moe(
    m: &Moe,
    get: &dyn Fn(TensorRole) -> Result<TensorId, CostError>,
    push: &mut dyn FnMut(OpKind),
) -> Result<(), CostError> {
    use TensorRole as R;
    let optional = |wanted: bool, role| if wanted { get(role).map(Some) } else { Ok(None) };
    let biases =
        if m.expert_bias { Some([get(R::ExpertGateBias)?, get(R::ExpertUpBias)?, get(R::ExpertDownBias)?]) } else { None };
    for iteration in 0..m.iterations {
        if iteration > 0 {
            push(OpKind::NextIteration);
        }
        push(OpKind::Route {
            weight: get(R::Router)?,
            bias: optional(m.router.bias, R::RouterLogitBias)?,
            selection_bias: optional(m.router.selection_bias, R::RouterBias)?,
            moe: m.clone(),
            iteration,
        });
        let [gate, up, down] = [get(R::ExpertGate)?, get(R::ExpertUp)?, get(R::ExpertDown)?];
        push(OpKind::RoutedExperts { gate, up, down, biases, moe: m.clone() });
        if let Some(shared) = &m.shared {
            push(OpKind::Ffn {
                gate: get(R::SharedGate)?,
                up: get(R::SharedUp)?,
                down: get(R::SharedDown)?,
                sigmoid_gate: optional(shared.sigmoid_gate, R::SharedRouter)?,
                accumulate: true,
            });
        }
        if m.inner_residual {
            push(OpKind::InnerResidual);
        }
    }
    Ok(())
}

/// Projections, norms, rotation and attention of a grouped-query layer, up to [`Slot::Attended`].
fn lower_gqa(
    a: &Gqa,
    get: &dyn Fn(TensorRole) -> Result<TensorId, CostError>,
    push: &mut dyn FnMut(OpKind),
) -> Result<(), CostError> {
    let optional = |wanted: bool, role| if wanted { get(role).map(Some) } else { Ok(None) };
    let projections = [
        (TensorRole::AttentionQ, TensorRole::AttentionQBias, Slot::Q),
        (TensorRole::AttentionK, TensorRole::AttentionKBias, Slot::K),
        (TensorRole::AttentionV, TensorRole::AttentionVBias, Slot::V),
    ];
    for (weight, bias, output) in projections {
        let bias = optional(a.qkv_bias, bias)?;
        push(OpKind::MatMul { weight: get(weight)?, bias, input: Slot::Normed, output });
    }
    if a.output_gate {
        push(OpKind::SplitGate { head_dim: a.head_dim });
    }
    for (role, slot) in [(TensorRole::AttentionQNorm, Slot::Q), (TensorRole::AttentionKNorm, Slot::K)] {
        let mut stages = Vec::with_capacity(2);
        if a.qk_norm != QkNorm::None {
            let weight = optional(a.qk_norm != QkNorm::Unweighted, role)?;
            stages.push(OpKind::QkNorm { weight, slot, span: a.qk_norm, head_dim: a.head_dim });
        }
        if let Some(rope) = &a.rope {
            stages.push(OpKind::Rope { slot, head_dim: a.head_dim, rope: rope.clone() });
        }
        if a.qk_norm_after_rope {
            stages.reverse();
        }
        stages.into_iter().for_each(&mut *push);
    }
    if let Some(temperature) = a.temperature {
        push(OpKind::Temper(temperature));
    }
    push(OpKind::Attention { gqa: a.clone(), sinks: optional(a.sinks, TensorRole::AttentionSinks)? });
    if a.output_gate {
        push(OpKind::GateAttended);
    }
    Ok(())
}

/// Projections and states of a gated delta rule, up to [`Slot::Attended`].
fn lower_delta(
    a: &DeltaNet,
    get: &dyn Fn(TensorRole) -> Result<TensorId, CostError>,
    push: &mut dyn FnMut(OpKind),
) -> Result<(), CostError> {
    use TensorRole as R;
    let mut project = |role, output| {
        push(OpKind::MatMul { weight: get(role)?, bias: None, input: Slot::Normed, output });
        Ok::<_, CostError>(())
    };
    project(R::DeltaQkv, Slot::Q)?;
    project(R::DeltaGate, Slot::Gate)?;
    if a.fused_gates {
        project(R::DeltaBetaAlpha, Slot::Beta)?;
    } else {
        project(R::DeltaBeta, Slot::Beta)?;
        project(R::DeltaAlpha, Slot::Alpha)?;
    }
    let (conv, dt_bias) = (get(R::DeltaConv)?, get(R::DeltaDtBias)?);
    let (decay, norm) = (get(R::DeltaDecay)?, get(R::DeltaNorm)?);
    push(OpKind::DeltaRule { delta: a.clone(), conv, dt_bias, decay, norm });
    Ok(())
}

/// Latent attention up to the output projection.
fn lower_mla(
    a: &Mla,
    get: &dyn Fn(TensorRole) -> Result<TensorId, CostError>,
    push: &mut dyn FnMut(OpKind),
) -> Result<(), CostError> {
    use TensorRole as R;
    let matmul = |weight, input, output| OpKind::MatMul { weight, bias: None, input, output };
    let kv_latent = matmul(get(R::AttentionKvA)?, Slot::Normed, Slot::KvLatent);
    if a.q_lora_rank.is_some() {
        push(matmul(get(R::AttentionQA)?, Slot::Normed, Slot::QLatent));
        push(kv_latent);
        push(OpKind::RmsNorm { weight: get(R::AttentionQANorm)?, input: Slot::QLatent, output: Slot::QLatentNormed });
        push(matmul(get(R::AttentionQB)?, Slot::QLatentNormed, Slot::Q));
    } else {
        push(matmul(get(R::AttentionQ)?, Slot::Normed, Slot::Q));
        push(kv_latent);
    }
    let (kv_norm, k_b, v_b) = (get(R::AttentionKvANorm)?, get(R::AttentionKB)?, get(R::AttentionVB)?);
    push(OpKind::LatentAttention { mla: a.clone(), kv_norm, k_b, v_b });
    Ok(())
}

/// Tensor look-up by layer and role; the table is searched once.
struct Index(std::collections::HashMap<(Option<u32>, TensorRole), TensorId>);

impl Index {
    fn new(spec: &ModelSpec) -> Self {
        Self(spec.tensors.iter().enumerate().map(|(i, t)| ((t.layer, t.role), TensorId(i as u32))).collect())
    }

    fn find(&self, layer: Option<u32>, role: TensorRole) -> Option<TensorId> {
        self.0.get(&(layer, role)).copied()
    }
}
