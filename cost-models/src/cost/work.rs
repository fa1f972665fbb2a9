//! Bytes read and operations done: per operation of the lowering, per layer, per step.
//!
//! A matrix is read once per step, however many tokens use it; of routed experts only the distinct ones are read. Under uniform
//! independent routing B tokens reach E (1 - (1 - k/E)^B) of E experts (algorithms §1). Bytes of activations are not counted: they
//! stay in caches or are small beside the weights; their elements are, because norms, rotations and sums take time of their own.

use crate::machine::Machine;
use crate::model::{Attention, Ffn, ModelSpec, Moe, QkNorm, RoleGroup, TensorId, TensorRole, TensorSpec};
use crate::op::{Batch, Op, OpKind};
use crate::quant::QuantFormat;
use crate::units::{Bytes, BytesPerS, Seconds};

/// Bytes and operations.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work {
    /// Weights read.
    pub weight_bytes: Bytes,
    /// Keys and values read.
    pub kv_bytes: Bytes,
    /// Floating-point operations; a multiply-add counts as two.
    pub flops: f64,
    /// The matrices among the weights, by format.
    pub matrices: ByFormat,
    /// The part of `flops` that attention over the cache does.
    pub attention_flops: f64,
    /// Elements of activations that operations without a matrix pass over: norms and the residual sum before them, rotations,
    /// writing the cache, the router's choice.
    pub activations: f64,
    /// If the matrices are routed experts': how many distinct experts the layer computes in this step, of which this is one or all.
    /// 0 for other matrices, and for a mixture.
    pub distinct: f64,
}

/// Bytes and operations of matrices in one format.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MatrixWork {
    /// Bytes read.
    pub bytes: f64,
    /// Operations.
    pub flops: f64,
}

/// Matrices by format.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ByFormat([MatrixWork; QuantFormat::ALL.len()]);

impl ByFormat {
    /// One matrix, or some rows or experts of it.
    pub fn one(format: QuantFormat, bytes: f64, flops: f64) -> Self {
        let mut all = Self::default();
        all.0[format as usize] = MatrixWork { bytes, flops };
        all
    }

    /// The formats that occur.
    pub fn iter(&self) -> impl Iterator<Item = (QuantFormat, MatrixWork)> {
        QuantFormat::ALL.iter().copied().zip(self.0).filter(|(_, m)| m.bytes > 0.0)
    }
}

impl std::ops::AddAssign for ByFormat {
    fn add_assign(&mut self, o: Self) {
        for (to, from) in self.0.iter_mut().zip(o.0) {
            to.bytes += from.bytes;
            to.flops += from.flops;
        }
    }
}

impl Work {
    /// The same so many times; of the same experts.
    #[must_use]
    fn scaled(self, times: f64) -> Self {
        if times == 1.0 {
            return self;
        }
        let bytes = |b: Bytes| Bytes((b.0 as f64 * times).round() as u64);
        let matrices = ByFormat(self.matrices.0.map(|m| MatrixWork { bytes: m.bytes * times, flops: m.flops * times }));
        Self {
            weight_bytes: bytes(self.weight_bytes),
            kv_bytes: bytes(self.kv_bytes),
            flops: self.flops * times,
            matrices,
            attention_flops: self.attention_flops * times,
            activations: self.activations * times,
            distinct: self.distinct,
        }
    }

    /// All bytes read.
    pub fn bytes(&self) -> Bytes {
        self.weight_bytes + self.kv_bytes
    }
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, o: Self) {
        self.distinct = match (self.matrices.iter().next(), o.matrices.iter().next()) {
            (None, _) => o.distinct,
            (_, None) => self.distinct,
            _ if self.distinct == o.distinct => self.distinct,
            _ => 0.0,
        };
        self.weight_bytes += o.weight_bytes;
        self.kv_bytes += o.kv_bytes;
        self.flops += o.flops;
        self.matrices += o.matrices;
        self.attention_flops += o.attention_flops;
        self.activations += o.activations;
    }
}
impl std::ops::Add for Work {
    type Output = Self;
    fn add(mut self, o: Self) -> Self {
        self += o;
        self
    }
}
impl std::iter::Sum for Work {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::default(), std::ops::Add::add)
    }
}

/// Work of one layer in one step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LayerWork {
    /// Everything but routed experts.
    pub resident: Work,
    /// All routed experts that the step reaches.
    pub routed: Work,
    /// One reached expert, with its mean number of tokens.
    pub expert: Work,
    /// Expected number of distinct experts reached.
    pub active_experts: f64,
}

/// Work of one step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepWork {
    /// Per layer, first to last.
    pub layers: Vec<LayerWork>,
    /// Embedding, last norm, output projection.
    pub outside: Work,
}

impl StepWork {
    /// Everything together.
    pub fn total(&self) -> Work {
        self.layers.iter().map(|l| l.resident + l.routed).sum::<Work>() + self.outside
    }
}

/// Expected number of distinct experts that `tokens` tokens reach, `experts_per_token` of `num_experts` each, uniform and independent.
pub fn expected_distinct(num_experts: u32, experts_per_token: u32, tokens: u32) -> f64 {
    expected_distinct_of(num_experts, f64::from(experts_per_token), tokens)
}

/// The same of a number of experts per token that varies: by its mean, as if every token had that many.
pub fn expected_distinct_of(num_experts: u32, mean_choices: f64, tokens: u32) -> f64 {
    let e = f64::from(num_experts);
    let k = mean_choices.min(e);
    // One token reaches exactly k: spared the rounding of 1 - (1 - k/E).
    if tokens == 1 { k } else { e * (1.0 - (1.0 - k / e).powf(f64::from(tokens))) }
}

/// Bytes and operations of one operation of [`crate::op::lower`].
pub fn op_work(spec: &ModelSpec, op: &Op, batch: Batch, kv_format: QuantFormat) -> Work {
    let weight = |id: &TensorId| {
        let t = &spec.tensors[id.0 as usize];
        tensor_work(t, rows_of(spec, t, batch))
    };
    match &op.kind {
        OpKind::Embed { table } => embed_work(&spec.tensors[table.0 as usize], batch),
        // The output projection may be the embedding table: its rows follow from the use, not from the role.
        OpKind::Logits { weight: w, bias, .. } => {
            tensor_work(&spec.tensors[w.0 as usize], batch.logits) + bias.iter().map(weight).sum()
        }
        OpKind::MatMul { weight: w, bias, .. } => weight(w) + bias.iter().map(weight).sum(),
        OpKind::LayerNorm { weight: w, bias, .. } => weight(w) + weight(bias),
        OpKind::RmsNorm { weight: w, .. } => weight(w),
        OpKind::QkNorm { weight: w, .. } => w.iter().map(weight).sum(),
        OpKind::Route { weight: w, bias, selection_bias, moe, .. } => {
            let all = weight(w) + bias.iter().chain(selection_bias).map(weight).sum();
            all.scaled(1.0 / f64::from(moe.iterations))
        }
        OpKind::LatentAttention { kv_norm, k_b, v_b, .. } => {
            let attention = op.layer.map_or_else(Work::default, |l| attention_work(spec, l, batch, kv_format));
            attention + [kv_norm, k_b, v_b].into_iter().map(weight).sum()
        }
        OpKind::Ffn { gate, up, down, sigmoid_gate, .. } => [gate, up, down].into_iter().chain(sigmoid_gate).map(weight).sum(),
        OpKind::RoutedExperts { gate, up, down, biases, moe } => {
            let of_experts = |id: &TensorId| {
                let t = &spec.tensors[id.0 as usize];
                routed_work(t, moe, rows_of(spec, t, batch))
            };
            [gate, up, down].into_iter().map(of_experts).sum::<Work>() + biases.iter().flatten().map(weight).sum()
        }
        OpKind::DeltaRule { conv, dt_bias, decay, norm, .. } => {
            let states = op.layer.map_or_else(Work::default, |l| attention_work(spec, l, batch, kv_format));
            states + [conv, dt_bias, decay, norm].into_iter().map(weight).sum()
        }
        OpKind::Attention { sinks, .. } => {
            op.layer.map_or_else(Work::default, |l| attention_work(spec, l, batch, kv_format)) + sinks.iter().map(weight).sum()
        }
        // No weights and few operations beside the matrices; their elements are counted with attention and with the norms.
        OpKind::Rope { .. }
        | OpKind::Scale { .. }
        | OpKind::Temper(_)
        | OpKind::SplitGate { .. }
        | OpKind::GateAttended
        | OpKind::AddDelta { .. }
        | OpKind::InnerResidual
        | OpKind::NextIteration
        | OpKind::SelectRows => Work::default(),
    }
}

/// Bytes and operations of one step, layer by layer. Also for models that can be planned but not run, which have no lowering:
/// every tensor of the table is read once.
pub fn step_work(spec: &ModelSpec, batch: Batch, kv_format: QuantFormat) -> StepWork {
    let mut step = StepWork { layers: vec![LayerWork::default(); spec.layers.len()], outside: Work::default() };
    for t in &spec.tensors {
        let rows = rows_of(spec, t, batch);
        let Some(l) = t.layer else {
            step.outside += match t.role {
                TensorRole::TokenEmbedding if spec.tie_word_embeddings => embed_work(t, batch) + tensor_work(t, batch.logits),
                TensorRole::TokenEmbedding => embed_work(t, batch),
                _ => tensor_work(t, rows),
            };
            continue;
        };
        let layer = &mut step.layers[l as usize];
        match &spec.layers[l as usize].ffn {
            Ffn::Moe(moe) if t.role.is_routed_expert() => {
                // Every iteration is a demand of its own and reads its experts anew.
                let times = f64::from(moe.iterations);
                layer.routed += routed_work(t, moe, rows).scaled(times);
                layer.active_experts =
                    expected_distinct_of(moe.num_experts, moe.mean_choices(), rows.saturating_mul(moe.iterations));
                let share = times * f64::from(rows) * moe.mean_choices() / layer.active_experts.max(1e-9);
                let once = expected_distinct_of(moe.num_experts, moe.mean_choices(), rows);
                let reads = if moe.iterations == 1 { 1.0 } else { times * once / layer.active_experts.max(1e-9) };
                let bytes = reads * (t.bytes.0 / t.shape[0]) as f64;
                let flops = 2.0 * share * (t.elements() / t.shape[0]) as f64;
                layer.expert += Work {
                    weight_bytes: Bytes(bytes.round() as u64),
                    flops,
                    matrices: ByFormat::one(t.format, bytes, flops),
                    distinct: layer.active_experts,
                    ..Work::default()
                };
            }
            Ffn::Moe(moe) if t.role.is_expert_bias() || t.role.group() == RoleGroup::SharedExperts => {
                layer.resident += tensor_work(t, rows).scaled(f64::from(moe.iterations));
            }
            _ => layer.resident += tensor_work(t, rows),
        }
    }
    for (l, layer) in step.layers.iter_mut().enumerate() {
        layer.resident += attention_work(spec, l as u32, batch, kv_format);
    }
    step
}

/// Least time of a step: every byte read once from a memory of this rate.
pub fn step_limit_at(spec: &ModelSpec, batch: Batch, kv_format: QuantFormat, rate: BytesPerS) -> Seconds {
    step_work(spec, batch, kv_format).total().bytes() / rate
}

/// Least time of a step on a machine: every byte read once from the main processor's home memory at its full rate.
pub fn step_limit(spec: &ModelSpec, batch: Batch, kv_format: QuantFormat, machine: &Machine) -> Seconds {
    let home = machine.home(machine.main_processor());
    step_limit_at(spec, batch, kv_format, home.read_bandwidth.value)
}

/// Rows of activations that meet tensor `t`: after the last layer's attention only those whose logits are wanted.
fn rows_of(spec: &ModelSpec, t: &TensorSpec, batch: Batch) -> u32 {
    use TensorRole as R;
    let after_last_attention = match t.layer {
        None => t.role != R::TokenEmbedding,
        Some(l) => {
            l as usize + 1 == spec.layers.len()
                && matches!(
                    t.role,
                    R::FfnNorm
                        | R::FfnNormBias
                        | R::Router
                        | R::RouterLogitBias
                        | R::RouterBias
                        | R::ExpertGateBias
                        | R::ExpertUpBias
                        | R::ExpertDownBias
                        | R::ExpertGate
                        | R::ExpertUp
                        | R::ExpertDown
                        | R::LatentDown
                        | R::LatentUp
                        | R::SharedRouter
                        | R::SharedGate
                        | R::SharedUp
                        | R::SharedDown
                        | R::DenseGate
                        | R::DenseUp
                        | R::DenseDown
                )
        }
    };
    if after_last_attention { batch.logits } else { batch.tokens }
}

/// A tensor read once and applied to `rows` rows: two operations per element of a matrix, four per element of a norm.
fn tensor_work(t: &TensorSpec, rows: u32) -> Work {
    use TensorRole as R;
    let is_matrix = t.shape.len() >= 2 && !t.role.is_elementwise();
    let flops = if is_matrix { 2.0 } else { 4.0 } * t.elements() as f64 * f64::from(rows);
    let per_row = match t.role {
        // The norm and the residual sum before it (before the first norm: the embedding's rows).
        R::AttentionNorm | R::FfnNorm | R::OutputNorm => 2.0 * t.elements() as f64,
        // Softmax and choice over its outputs.
        R::Router => t.shape[0] as f64,
        _ => 0.0,
    };
    Work {
        weight_bytes: t.bytes,
        flops,
        matrices: if is_matrix { ByFormat::one(t.format, t.bytes.0 as f64, flops) } else { ByFormat::default() },
        activations: per_row * f64::from(rows),
        ..Work::default()
    }
}

/// Some rows of the table; nothing is multiplied.
fn embed_work(t: &TensorSpec, batch: Batch) -> Work {
    let row = t.bytes.0 / t.shape[0];
    Work { weight_bytes: Bytes((row * u64::from(batch.tokens)).min(t.bytes.0)), ..Work::default() }
}

/// A tensor of routed experts: the distinct slices are read, every row meets `experts_per_token` of them.
fn routed_work(t: &TensorSpec, moe: &Moe, rows: u32) -> Work {
    let distinct = expected_distinct_of(moe.num_experts, moe.mean_choices(), rows);
    let per_expert = (t.elements() / t.shape[0]) as f64;
    let bytes = distinct * (t.bytes.0 / t.shape[0]) as f64;
    let flops = 2.0 * f64::from(rows) * moe.mean_choices() * per_expert;
    Work {
        weight_bytes: Bytes(bytes.round() as u64),
        flops,
        matrices: ByFormat::one(t.format, bytes, flops),
        distinct,
        ..Work::default()
    }
}

/// Keys and values of all positions read once per sequence; scores and weighted sums over the visible positions.
fn attention_work(spec: &ModelSpec, layer: u32, batch: Batch, kv_format: QuantFormat) -> Work {
    let sequences = batch.sequences.max(1);
    let new = f64::from(batch.tokens) / f64::from(sequences);
    let length = u64::from(batch.past) + u64::from(batch.tokens.div_ceil(sequences));
    let (window, flops_per_pair) = match &spec.layers[layer as usize].attention {
        Attention::Gqa(a) => (a.reach(), 4.0 * f64::from(a.num_heads) * f64::from(a.head_dim)),
        // Queries absorbed into the latent space: scores over rank + rotated width, sums over the rank.
        Attention::Mla(a) => (None, 2.0 * f64::from(a.num_heads) * f64::from(2 * a.kv_lora_rank + a.qk_rope_head_dim)),
        // Every token decays the states, reads them twice and writes them once, whatever came before.
        Attention::DeltaNet(a) => (Some(1), 7.0 * f64::from(a.value_dim()) * f64::from(a.key_head_dim)),
        // Known only by its size: at least one multiply-add per cached element.
        Attention::PlanOnly(m) => (m.sliding_window, 2.0 * m.kv_elements_per_token as f64),
    };
    // Token i of the new ones sees past + i + 1 positions, or the window.
    let visible = f64::from(batch.past) + (new + 1.0) / 2.0;
    let visible = window.map_or(visible, |w| visible.min(f64::from(w)));
    // Queries and keys are rotated (and perhaps normed), keys and values written to the cache.
    let per_token = match &spec.layers[layer as usize].attention {
        Attention::Gqa(a) => {
            let (q, k) = (f64::from(a.num_heads) * f64::from(a.head_dim), f64::from(a.num_kv_heads) * f64::from(a.head_dim));
            let passes = if a.qk_norm == QkNorm::None { 1.0 } else { 2.0 };
            // The gate's rows are split off, and multiplied by.
            let gate = if a.output_gate { 2.0 * q } else { 0.0 };
            passes * (q + k) + k + gate
        }
        // Besides: queries in the latent space, and attention's results there.
        Attention::Mla(a) => {
            let width = f64::from(a.kv_lora_rank + a.qk_rope_head_dim);
            width + f64::from(a.num_heads) * (width + f64::from(a.kv_lora_rank))
        }
        // Convolved and normed, then the result normed and gated.
        Attention::DeltaNet(a) => 2.0 * f64::from(a.channels()) + 2.0 * f64::from(a.value_dim()),
        Attention::PlanOnly(_) => spec.kv_bytes_of_layer(layer, 1, QuantFormat::F32).0 as f64 / 4.0,
    };
    let flops = flops_per_pair * visible * f64::from(batch.tokens);
    Work {
        kv_bytes: Bytes(spec.kv_bytes_of_layer(layer, length, kv_format).0 * u64::from(sequences)),
        flops,
        attention_flops: flops,
        activations: per_token * f64::from(batch.tokens),
        ..Work::default()
    }
}
