//! Runs the operation list of [`tierwise_cost::op::lower`] on the CPU, one step at a time, for one sequence or several at once.
//!
//! Here: the walk over the list, norms and products. `attend`: what looks at positions, sequence by sequence. `feed_forward`: routers,
//! experts and other feed-forward parts.

mod attend;
mod feed_forward;

use super::buffers::Buffers;
use super::delta_net::DeltaBuffers;
use super::driver::Driver;
use super::elementwise::{capped, layer_norm, sigmoid};
use super::experts::{ExpertBuffers, ExpertExtras};
use super::forced::Forced;
use super::foresight::Foresight;
use super::matmul::{Product, run_products};
use super::mla::LatentBuffers;
use super::model::Model;
use super::prepared::Prepared;
use super::remote::RemoteExperts;
use super::rope::RopeTable;
use super::route::{RouterScores, Routing};
use super::sequences::{SequenceId, SequenceTokens, Sequences, StepRows};
use super::step_ops::StepOps;
use super::threads::{Threads, for_rows};
use crate::error::Result;
use feed_forward::FfnBuffers;
use ndarray::ArrayView2;
use std::sync::Arc;
use tierwise_cost::model::TensorId;
use tierwise_cost::op::{Op, OpKind, Slot};
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::routing::RoutingTrace;

/// Memory that a block of logits may take; more positions are computed block by block.
const LOGITS_BYTES: usize = 32 << 20;

/// Tokens of one step where states are computed again.
const TOKENS_COMPUTED_AGAIN: usize = 512;

/// Where logits go: `(first row among the wanted ones, [rows, vocab_size])`; the wanted rows of one sequence after those of another, in
/// the order of the step.
pub type LogitsSink<'a> = &'a mut (dyn FnMut(usize, ArrayView2<'_, f32>) + Send);

/// The routing of one layer in one step, for one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct CapturedRouting {
    /// The sequence.
    pub sequence: SequenceId,
    /// The layer.
    pub layer: u32,
    /// Position of the first token.
    pub position: usize,
    /// The choice for the sequence's tokens of the step.
    pub routing: Routing,
}

/// Working memory of a session and the code that runs its steps.
pub struct Executor {
    threads: Threads,
    sequences: Sequences,
    buffers: Buffers,
    normed: Prepared,
    attended: Prepared,
    /// [`Slot::Normed`] times the experts' weights, and its forms, where these come before the experts.
    weighted: (Vec<f32>, Prepared),
    q_latent: Prepared,
    latent: LatentBuffers,
    delta: DeltaBuffers,
    ropes: Vec<RopeTable>,
    router_logits: Vec<f32>,
    routing: Routing,
    experts: ExpertBuffers,
    ffn: FfnBuffers,
    /// The operation lists without and with `SelectRows`, once they were needed.
    ops: StepOps,
    captured: Option<Vec<CapturedRouting>>,
    scores: RouterScores,
    foresight: Foresight,
    forced: Forced,
    /// Who computes routed experts in the driver's place.
    remote: Option<Box<dyn RemoteExperts>>,
}

impl Executor {
    /// An executor with one empty sequence of at most `context` positions. With `capture`, every layer's routing is kept for [`Self::take_routing`]; the routers of up
    /// to `lookahead` layers ahead are asked early.
    ///
    /// # Errors
    /// As [`Threads::for_model`] and [`Sequences::new`].
    pub fn new(
        model: &Model,
        threads: usize,
        context: usize,
        kv_format: QuantFormat,
        capture: bool,
        lookahead: u32,
    ) -> Result<Self> {
        Ok(Self {
            threads: Threads::for_model(model, threads)?,
            sequences: Sequences::new(model.spec(), context, kv_format)?,
            buffers: Buffers::default(),
            normed: Prepared::default(),
            attended: Prepared::default(),
            weighted: Default::default(),
            q_latent: Prepared::default(),
            latent: LatentBuffers::default(),
            delta: DeltaBuffers::default(),
            ropes: Vec::new(),
            router_logits: Vec::new(),
            routing: Routing::default(),
            experts: ExpertBuffers::default(),
            ffn: FfnBuffers::default(),
            ops: StepOps::default(),
            captured: capture.then(Vec::new),
            scores: RouterScores::default(),
            foresight: Foresight::new(model, lookahead),
            forced: Forced::default(),
            remote: None,
        })
    }

    /// From now on the routers' choices are replaced by those of a trace, token by token from number `first` on; `None` ends that.
    /// The trace has the model's experts, experts per token and at least its layers with routed experts, in order.
    pub fn force_routing(&mut self, trace: Option<(Arc<RoutingTrace>, usize)>) {
        self.forced = Forced::new(trace);
    }

    /// From now on routed experts are computed by `remote`; `None`: by the driver again.
    pub fn set_remote(&mut self, remote: Option<Box<dyn RemoteExperts>>) {
        self.remote = remote;
    }

    /// The sequences.
    pub const fn sequences(&self) -> &Sequences {
        &self.sequences
    }

    /// The sequences, to add, remove and shorten them.
    pub const fn sequences_mut(&mut self) -> &mut Sequences {
        &mut self.sequences
    }

    /// What was captured since the last call; empty unless capture is on.
    pub fn take_routing(&mut self) -> Vec<CapturedRouting> {
        self.captured.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Computes the tokens of every part after its sequence's cached positions, all in one go, and gives the wanted logits to `sink`.
    ///
    /// The caller has checked that there is a part, that each is of another sequence that there is, that the tokens are in the vocabulary
    /// and fit the context.
    ///
    /// # Errors
    /// When the model cannot be run or an expert cannot be read.
    pub fn step(&mut self, model: &Model, driver: &mut Driver, parts: &[SequenceTokens<'_>], sink: LogitsSink<'_>) -> Result<()> {
        if self.sequences.first().has_states() {
            for part in parts {
                self.compute_states_again(model, driver, part)?;
            }
        }
        self.compute(model, driver, parts, sink)
    }

    /// States that positions were forgotten from go on where the cache ends. Choices are the routers' then, and not captured again.
    fn compute_states_again(&mut self, model: &Model, driver: &mut Driver, part: &SequenceTokens<'_>) -> Result<()> {
        let place = self.sequences.place(part.sequence).expect("the session has checked the sequences of a step");
        let sequence = &mut self.sequences.all_mut()[place];
        let lost = sequence.kv.go_back_to_states();
        sequence.history.truncate(lost.as_ref().map_or(sequence.kv.len(), |lost| lost.end));
        let tokens = lost.map_or_else(Vec::new, |lost| sequence.history[lost].to_vec());
        sequence.history.extend_from_slice(part.tokens);
        if tokens.is_empty() {
            return Ok(());
        }
        let (captured, forced) = (self.captured.take(), std::mem::take(&mut self.forced));
        let result = tokens.chunks(TOKENS_COMPUTED_AGAIN).try_for_each(|chunk| {
            let again = SequenceTokens { sequence: part.sequence, tokens: chunk, wanted: 1 };
            self.compute(model, driver, &[again], &mut |_, _| {})
        });
        (self.captured, self.forced) = (captured, forced);
        result
    }

    fn compute(&mut self, model: &Model, driver: &mut Driver, parts: &[SequenceTokens<'_>], sink: LogitsSink<'_>) -> Result<()> {
        // The last layer's routing is captured for all tokens, so none may be dropped before it.
        let select = self.captured.is_none() && parts.iter().any(|p| p.wanted < p.tokens.len());
        let step = StepRows::new(&self.sequences, parts, select);
        let ops = self.ops.get(model, select)?;
        driver.begin_step();
        let ranges = step.ranges();
        for table in &mut self.ropes {
            table.fill(&ranges);
        }
        // The whole step runs on the pool's threads: entering the pool for every operation would cost a wake-up each.
        let pool = self.threads.pool();
        pool.install(|| self.run(model, driver, &ops, &step, sink))?;
        for part in &step.parts {
            self.sequences.all_mut()[part.place].kv.advance(part.rows);
        }
        self.forced.advance(step.tokens.len());
        Ok(())
    }

    fn run(&mut self, model: &Model, driver: &mut Driver, mut ops: &[Op], step: &StepRows, sink: LogitsSink<'_>) -> Result<()> {
        while let Some((op, rest)) = ops.split_first() {
            ops = rest;
            driver.keep_loading();
            match &op.kind {
                OpKind::Embed { table } => self.embed(model, *table, &step.tokens),
                OpKind::RmsNorm { weight, input, output } => self.norm(model, *weight, *input, *output),
                OpKind::LayerNorm { weight, bias, input, output } => self.layer_norm(model, [*weight, *bias], *input, *output),
                OpKind::Scale { slot, factor } => {
                    let x = self.buffers.get_mut(*slot);
                    let width = x.width();
                    for_rows(&self.threads, x.as_mut_slice(), width, |_, row| row.iter_mut().for_each(|x| *x *= factor));
                }
                OpKind::Logits { weight, bias, factor, softcap } => {
                    self.logits(model, *weight, *bias, (*factor, *softcap), &step.wanted, sink);
                }
                OpKind::MatMul { input, .. } => {
                    // Neighbours with the same input (q, k, v) run in one region.
                    let same = |o: &&Op| matches!(&o.kind, OpKind::MatMul { input: i, .. } if i == input);
                    let more = rest.iter().take_while(same).count();
                    self.matmuls(model, *input, std::iter::once(op).chain(&rest[..more]));
                    ops = &rest[more..];
                }
                OpKind::QkNorm { weight, slot, span, head_dim } => self.qk_norm(model, *weight, *slot, *span, *head_dim as usize),
                OpKind::Rope { slot, head_dim, rope } => self.rope(*slot, *head_dim as usize, rope, step),
                OpKind::Temper(temperature) => self.temper(temperature, step),
                OpKind::Attention { gqa, sinks } => {
                    let sinks = sinks.map(|s| model.vector(s));
                    self.attend(op.layer, gqa, sinks, step);
                }
                OpKind::LatentAttention { mla, kv_norm, k_b, v_b } => {
                    self.latent_attention(model, op.layer, mla, [*kv_norm, *k_b, *v_b], step);
                }
                OpKind::SplitGate { head_dim } => {
                    let [q, gate] = self.buffers.get_many_mut([Slot::Q, Slot::Gate]);
                    q.split_halves(*head_dim as usize, gate);
                }
                OpKind::GateAttended => {
                    let [attended, gate] = self.buffers.get_many_mut([Slot::Attended, Slot::Gate]);
                    let (width, gate) = (attended.width(), gate.as_slice());
                    for_rows(&self.threads, attended.as_mut_slice(), width, |i, row| {
                        row.iter_mut().zip(&gate[i * width..]).for_each(|(x, g)| *x *= sigmoid(*g));
                    });
                }
                OpKind::DeltaRule { delta, conv, dt_bias, decay, norm } => {
                    let vectors = [conv, dt_bias, decay, norm].map(|id| model.vector(*id));
                    self.delta_rule(op.layer, delta, vectors, model.spec().norm_eps, step);
                }
                OpKind::AddDelta { factor } => {
                    let [hidden, delta] = self.buffers.get_many_mut([Slot::Hidden, Slot::Delta]);
                    let (width, delta) = (hidden.width(), delta.as_slice());
                    for_rows(&self.threads, hidden.as_mut_slice(), width, |i, row| {
                        row.iter_mut().zip(&delta[i * width..]).for_each(|(x, d)| *x += factor * d);
                    });
                }
                OpKind::SelectRows => self.buffers.get_mut(Slot::Hidden).keep(&step.kept),
                OpKind::Route { weight, bias, selection_bias, moe, iteration } => {
                    let layer = (op.layer.unwrap_or(0), *iteration);
                    self.route(model, *weight, [*bias, *selection_bias], moe, layer, step, driver.loads_experts());
                }
                OpKind::InnerResidual => {
                    let [normed, delta] = self.buffers.get_many_mut([Slot::Normed, Slot::Delta]);
                    delta.as_mut_slice().iter_mut().zip(normed.as_slice()).for_each(|(d, x)| *d += x);
                }
                OpKind::NextIteration => {
                    let [normed, delta] = self.buffers.get_many_mut([Slot::Normed, Slot::Delta]);
                    normed.as_mut_slice().copy_from_slice(delta.as_slice());
                    self.normed.invalidate();
                }
                OpKind::RoutedExperts { gate, up, down, biases, moe } => {
                    let biases = biases.map(|b| b.map(|b| model.vector(b)));
                    let extras = ExpertExtras { activation: moe.activation, biases, weights_on_input: moe.weights_on_input };
                    let layer = op.layer.unwrap_or(0);
                    self.routed_experts(model, driver, layer, [*gate, *up, *down], &extras, step)?;
                }
                OpKind::Ffn { gate, up, down, sigmoid_gate, accumulate } => {
                    self.ffn(model, [*gate, *up, *down], *sigmoid_gate, *accumulate);
                }
            }
        }
        Ok(())
    }

    fn embed(&mut self, model: &Model, table: TensorId, tokens: &[u32]) {
        let table = model.matrix(table);
        let hidden = self.buffers.get_mut(Slot::Hidden);
        hidden.reshape(tokens.len(), table.cols);
        for (token, row) in tokens.iter().zip(hidden.as_mut_slice().chunks_exact_mut(table.cols)) {
            table.dequantize_row(*token as usize, row);
        }
    }

    fn norm(&mut self, model: &Model, weight: TensorId, input: Slot, output: Slot) {
        let (weight, eps, kernels) = (model.vector(weight), model.spec().norm_eps, self.threads.kernels());
        let [from, to] = self.buffers.get_many_mut([input, output]);
        let width = from.width();
        to.reshape(from.rows(), width);
        let from = from.as_slice();
        for_rows(&self.threads, to.as_mut_slice(), width, |i, row| {
            kernels.rms_norm(&from[i * width..(i + 1) * width], weight, eps, row);
        });
        match output {
            Slot::Normed => self.normed.invalidate(),
            Slot::QLatentNormed => self.q_latent.invalidate(),
            _ => {}
        }
    }

    fn layer_norm(&mut self, model: &Model, [weight, bias]: [TensorId; 2], input: Slot, output: Slot) {
        let (weight, bias, eps) = (model.vector(weight), model.vector(bias), model.spec().norm_eps);
        let [from, to] = self.buffers.get_many_mut([input, output]);
        let width = from.width();
        to.reshape(from.rows(), width);
        let from = from.as_slice();
        for_rows(&self.threads, to.as_mut_slice(), width, |i, row| {
            layer_norm(&from[i * width..(i + 1) * width], weight, bias, eps, row);
        });
        if output == Slot::Normed {
            self.normed.invalidate();
        }
    }

    /// `slot` in the form that weights of `format` multiply with.
    fn ensure(&mut self, slot: Slot, format: QuantFormat) {
        let x = self.buffers.get(slot);
        let prepared = match slot {
            Slot::Attended => &mut self.attended,
            Slot::QLatentNormed => &mut self.q_latent,
            _ => &mut self.normed,
        };
        prepared.ensure(&self.threads, format, x.as_slice(), x.width());
    }

    fn matmuls<'o>(&mut self, model: &Model, input: Slot, ops: impl Iterator<Item = &'o Op>) {
        let rows = self.buffers.get(input).rows();
        let mut outputs = Vec::with_capacity(3);
        for op in ops {
            let OpKind::MatMul { weight, bias, output, .. } = &op.kind else { continue };
            let weight = model.matrix(*weight);
            self.ensure(input, weight.format);
            self.buffers.get_mut(*output).reshape(rows, weight.rows);
            outputs.push((*output, weight, bias.map(|b| model.vector(b))));
        }
        let prepared = match input {
            Slot::Attended => &self.attended,
            Slot::QLatentNormed => &self.q_latent,
            _ => &self.normed,
        };
        let mut products = Vec::with_capacity(outputs.len());
        let mut buffers = self.buffers.each_mut();
        for (output, weight, bias) in outputs {
            let form = prepared.get(weight.format);
            let out = buffers.take(output).as_mut_slice();
            products.push(Product { weight, bias, input: form, tokens: form.all_tokens(), out });
        }
        run_products(&self.threads, products);
    }

    /// The projection to the vocabulary of the `wanted` rows, in blocks.
    fn logits(
        &mut self,
        model: &Model,
        weight: TensorId,
        bias: Option<TensorId>,
        (factor, softcap): (f32, Option<f32>),
        wanted: &[u32],
        sink: LogitsSink<'_>,
    ) {
        let (weight, bias) = (model.matrix(weight), bias.map(|b| model.vector(b)));
        self.ensure(Slot::Normed, weight.format);
        let form = self.normed.get(weight.format);
        let block_rows = (LOGITS_BYTES / (4 * weight.rows)).max(1);
        for (i, block) in wanted.chunks(block_rows).enumerate() {
            let logits = self.buffers.get_mut(Slot::Logits);
            logits.reshape(block.len(), weight.rows);
            let out = logits.as_mut_slice();
            run_products(&self.threads, vec![Product { weight, bias, input: form, tokens: block, out }]);
            if factor != 1.0 || softcap.is_some() {
                for_rows(&self.threads, logits.as_mut_slice(), weight.rows, |_, row| {
                    row.iter_mut().for_each(|x| *x = capped(*x * factor, softcap));
                });
            }
            sink(i * block_rows, logits.view());
        }
    }
}
