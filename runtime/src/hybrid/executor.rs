//! Runs the operation list of [`tierwise_cost::op::lower`] on a device, one step at a time.

use super::activations::{Activations, PART_TOKENS, first};
use super::experts::{self, LayerExperts, copied_to_device, slots_on_device};
use super::memory::{DeviceLine, DeviceMemory};
use super::mixing::DeviceKv;
use super::routed::Routed;
use super::stream::Stream;
use super::weights::Weights;
use crate::backend::device::{DeviceBackend, DeviceInfo, View};
use crate::backend::op::DeviceOp;
use crate::error::{Result, RuntimeError};
use crate::exec::driver::Driver;
use crate::exec::executor::{CapturedRouting, LogitsSink};
use crate::exec::forced::Forced;
use crate::exec::foresight::Foresight;
use crate::exec::loader::{DeviceLayout, DevicePlace};
use crate::exec::model::Model;
use crate::exec::rope::RopeTable;
use crate::exec::step_ops::StepOps;
use crate::exec::threads::Threads;
use ndarray::ArrayView2;
use std::collections::HashMap;
use std::sync::Arc;
use tierwise_cost::model::{Activation, QkNorm, Rope, Selection, TensorId};
use tierwise_cost::op::{Batch, Op, OpKind, Slot, lower};
use tierwise_planner::CheckedPlan;
use tierwise_planner::budget;
use tierwise_planner::plan::PrefetchKind;
use tierwise_planner::routing::RoutingTrace;

/// What an executor is opened with, besides model, plan and back-end.
#[derive(Debug, Clone, Copy)]
pub struct HybridConfig {
    /// Threads for the experts of the CPU.
    pub threads: usize,
    /// Keep every layer's routing.
    pub capture: bool,
    /// Ask the routers of so many later layers early.
    pub lookahead: u32,
}

/// Device memory for a session, and the code that runs its steps.
pub struct HybridExecutor {
    threads: Threads,
    stream: Stream,
    memory: DeviceMemory,
    weights: Weights,
    kv: DeviceKv,
    buffers: Activations,
    /// Kinds of rotation with their tables on the device.
    ropes: Vec<(RopeTable, View)>,
    routed: Routed,
    foresight: Foresight,
    /// Logits on the host: `[rows, vocab_size]`.
    logits: Vec<f32>,
    ops: StepOps,
    /// The inner products of the next feed-forward network are on their way already.
    ffn_begun: bool,
}

impl HybridExecutor {
    /// Allocates what the plan says, then loads weights and experts. Gives the executor and the device's slots, by pool of the plan
    /// (`None` for pools in host memory).
    ///
    /// # Errors
    /// When the plan and the device do not fit together, there is no room, or a thread or file is refused.
    pub fn open(
        model: &Arc<Model>,
        plan: &CheckedPlan,
        config: HybridConfig,
        mut backend: Box<dyn DeviceBackend>,
    ) -> Result<(Self, Vec<Option<Vec<DevicePlace>>>)> {
        let spec = model.spec();
        let alignment = backend.info().alignment_bytes;
        if alignment > 256 || !alignment.is_power_of_two() {
            return Err(RuntimeError::Device {
                device: backend.info().backend,
                reason: format!("parts of blocks begin at multiples of {alignment} bytes, expected a power of two up to 256"),
            });
        }
        // Before anything is allocated: what cannot be run is refused here.
        let ops = lower(spec, Batch { tokens: 2, past: 0, sequences: 1, logits: 2 })?;
        if let Some(part) = ops.iter().find_map(|o| only_on_cpu(&o.kind)) {
            return Err(RuntimeError::Device {
                device: backend.info().backend,
                reason: format!("{} has {part}, computed on the CPU only so far; use --device cpu", spec.name),
            });
        }
        let device = backend.as_mut();
        let mut memory = DeviceMemory::new(plan, device);
        let weights = Weights::allocate(model, &mut memory, device)?;
        let kv = DeviceKv::allocate(spec, plan.context() as usize, plan.kv_format(), &mut memory, device)?;
        let mut layers = HashMap::new();
        for (layer, moe) in spec.moe_layers() {
            layers.insert(layer, experts::allocate_layer(model, plan, (layer, moe), &weights, &mut memory, device)?);
        }
        let pools = device_pools(plan, &layers, &mut memory, device)?;
        let tokens = u64::from(plan.chunk_tokens().min(plan.context()).max(1));
        let on_cpu = layers.values().any(|l: &LayerExperts| l.on_cpu);
        let mut ropes: Vec<(RopeTable, View)> = Vec::new();
        for rope in ops.iter().filter_map(rope_of) {
            if ropes.iter().all(|(t, _)| t.rope() != rope) {
                let bytes = tokens * u64::from(rope.rotary_dim) * 4;
                let view = memory.alloc(device, budget::ACTIVATIONS, bytes, "rotations")?;
                ropes.push((RopeTable::new(rope.clone(), plan.context() as usize), view));
            }
        }
        let buffers = Activations::allocate(spec, tokens, on_cpu, &mut memory, device)?;

        let copier = backend.copier();
        weights.load(model, copier.as_ref())?;
        let mut in_order: Vec<&LayerExperts> = layers.values().collect();
        in_order.sort_by_key(|l| l.layer);
        experts::load(model, &in_order, copier.as_ref())?;
        let mut stream = Stream::new(backend);
        stream.write(buffers.ones, bytemuck::cast_slice(&vec![1.0f32; (buffers.ones.bytes / 4) as usize]))?;

        // Guesses learn from every demand, so no layer may then route by itself.
        let guesses = plan.plan().engine.prefetch != PrefetchKind::Off || config.lookahead > 0;
        let executor = Self {
            threads: Threads::for_model(model, config.threads)?,
            stream,
            memory,
            weights,
            kv,
            buffers,
            ropes,
            routed: Routed::new(layers, guesses, config.capture),
            foresight: Foresight::new(model, config.lookahead),
            logits: Vec::new(),
            ops: StepOps::default(),
            ffn_begun: false,
        };
        Ok((executor, pools))
    }

    /// The device.
    pub fn info(&self) -> &DeviceInfo {
        self.stream.backend().info()
    }

    /// What is allocated on the device, beside what was planned.
    pub fn memory(&self) -> Vec<DeviceLine> {
        self.memory.report(self.stream.backend())
    }

    /// How the experts of each layer that are copied to the device lie there.
    pub fn slot_layouts(&self, plan: &CheckedPlan) -> HashMap<u32, DeviceLayout> {
        let on_device = |l: &&u32| copied_to_device(plan, **l);
        plan.moe_layers().iter().filter(on_device).map(|l| (*l, self.routed.layout(*l))).collect()
    }

    /// The back-end.
    pub fn backend(&self) -> &dyn DeviceBackend {
        self.stream.backend()
    }

    /// The cache.
    pub const fn kv(&self) -> &DeviceKv {
        &self.kv
    }

    /// The cache, to forget positions.
    pub const fn kv_mut(&mut self) -> &mut DeviceKv {
        &mut self.kv
    }

    /// As [`crate::exec::executor::Executor::force_routing`].
    pub fn force_routing(&mut self, trace: Option<(Arc<RoutingTrace>, usize)>) {
        self.routed.forced = Forced::new(trace);
    }

    /// What was captured since the last call; empty unless capture is on.
    pub fn take_routing(&mut self) -> Vec<CapturedRouting> {
        self.routed.captured.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Gate, up and down of an expert on the device, read back.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn read_expert(&mut self, layer: u32, place: DevicePlace) -> Result<[Vec<u8>; 3]> {
        let layout = self.routed.layout(layer);
        let views = [0, 1, 2].map(|which| layout.view(place, which));
        let mut matrices = views.map(|v| vec![0; v.bytes as usize]);
        let mut parts: Vec<(View, &mut [u8])> = views.into_iter().zip(matrices.iter_mut().map(Vec::as_mut_slice)).collect();
        self.stream.read(&mut parts)?;
        matrices.iter_mut().zip(layout.bytes).for_each(|(m, bytes)| m.truncate(bytes as usize));
        Ok(matrices)
    }

    /// Waits until the device has done everything.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn wait(&mut self, driver: &mut Driver) -> Result<()> {
        self.stream.wait()?;
        driver.device_is_idle();
        Ok(())
    }

    /// As [`crate::exec::executor::Executor::step`].
    ///
    /// # Errors
    /// When the device refuses or is lost, or an expert cannot be had.
    pub fn step(
        &mut self,
        model: &Model,
        driver: &mut Driver,
        tokens: &[u32],
        wanted: usize,
        sink: LogitsSink<'_>,
    ) -> Result<()> {
        let select = wanted < tokens.len() && self.routed.captured.is_none();
        let ops = self.ops.get(model, select)?;
        self.stream.clear();
        driver.begin_step();
        self.begin(&ops, tokens)?;
        let pool = self.threads.pool();
        pool.install(|| self.run(model, driver, &ops, tokens.len(), wanted, sink))?;
        self.kv.advance(tokens.len());
        self.routed.forced.advance(tokens.len());
        Ok(())
    }

    /// Writes what a step needs from the host.
    fn begin(&mut self, ops: &[Op], tokens: &[u32]) -> Result<()> {
        self.ffn_begun = false;
        self.stream.write(first(self.buffers.token_ids, tokens.len() as u64), bytemuck::cast_slice(tokens))?;
        for (table, view) in &mut self.ropes {
            table.fill(&[(self.kv.len(), tokens.len())]);
            let values: Vec<f32> = table.values().collect();
            self.stream.write(first(*view, values.len() as u64), bytemuck::cast_slice(&values))?;
        }
        let temper = ops.iter().find_map(|o| if let OpKind::Temper(t) = &o.kind { Some(*t) } else { None });
        if let Some(t) = temper {
            // As the CPU executor: with the position counted from one.
            let factor = |i: usize| 1.0 + t.scale * (((self.kv.len() + i + 1) / t.period as usize) as f32).ln_1p();
            let factors: Vec<f32> = (0..tokens.len()).map(factor).collect();
            self.stream.write(first(self.buffers.temper, factors.len() as u64), bytemuck::cast_slice(&factors))?;
        }
        if std::mem::take(&mut self.routed.outputs_are_tainted) {
            self.stream.write(self.buffers.expert_out, &vec![0; self.buffers.expert_out.bytes as usize])?;
        }
        Ok(())
    }

    fn run(
        &mut self,
        model: &Model,
        driver: &mut Driver,
        ops: &[Op],
        step_tokens: usize,
        wanted: usize,
        sink: LogitsSink<'_>,
    ) -> Result<()> {
        let mut tokens = step_tokens as u32;
        let eps = model.spec().norm_eps;
        for (i, op) in ops.iter().enumerate() {
            driver.keep_loading();
            let layer = op.layer.map_or(0, |l| l as usize);
            match &op.kind {
                OpKind::Embed { table } => {
                    let table = self.weights.matrix(*table);
                    self.buffers.widen(Slot::Hidden, table.cols);
                    let ids = first(self.buffers.token_ids, u64::from(tokens));
                    self.stream.push(DeviceOp::Embed { table, ids, out: self.buffers.rows(Slot::Hidden, tokens), tokens })?;
                }
                OpKind::RmsNorm { weight, input, output } => {
                    let width = self.buffers.width(*input);
                    self.buffers.widen(*output, width);
                    let weight = Some(self.weights.vector(*weight));
                    let (x, out) = (self.buffers.rows(*input, tokens), self.buffers.rows(*output, tokens));
                    self.stream.push(DeviceOp::RmsNorm { x, weight, period: 1, out, rows: tokens, width, eps })?;
                }
                OpKind::LayerNorm { weight, bias, input, output } => {
                    let width = self.buffers.width(*input);
                    self.buffers.widen(*output, width);
                    let (weight, bias) = (self.weights.vector(*weight), self.weights.vector(*bias));
                    let (x, out) = (self.buffers.rows(*input, tokens), self.buffers.rows(*output, tokens));
                    self.stream.push(DeviceOp::LayerNorm { x, weight, bias, out, rows: tokens, width, eps })?;
                }
                OpKind::Scale { slot, factor } => self.scale(*slot, *factor, None, tokens)?,
                OpKind::Temper(_) => {
                    let factors = first(self.buffers.temper, u64::from(tokens));
                    self.scale(Slot::Q, 1.0, Some(factors), tokens)?;
                }
                OpKind::MatMul { weight, bias, input, output } => {
                    let weight = self.weights.matrix(*weight);
                    self.buffers.widen(*output, weight.rows);
                    let (x, out) = (self.buffers.rows(*input, tokens), self.buffers.rows(*output, tokens));
                    let bias = bias.map(|b| self.weights.vector(b));
                    self.stream.push(DeviceOp::MatMul { weight, bias, x, out, tokens })?;
                }
                OpKind::QkNorm { weight, slot, span, head_dim } => {
                    let all = self.buffers.width(*slot);
                    let width = if *span == QkNorm::FullWidth { all } else { *head_dim };
                    let x = self.buffers.rows(*slot, tokens);
                    let (weight, rows) = (weight.map(|w| self.weights.vector(w)), tokens * (all / width));
                    self.stream.push(DeviceOp::RmsNorm { x, weight, period: 1, out: x, rows, width, eps })?;
                }
                OpKind::Rope { slot, head_dim, rope } => {
                    let x = self.buffers.rows(*slot, tokens);
                    let heads = self.buffers.width(*slot) / head_dim;
                    let (pairs, pairing) = (rope.rotary_dim / 2, rope.pairing);
                    let cos_sin = self.rope(rope, tokens);
                    let head_stride = *head_dim;
                    self.stream.push(DeviceOp::Rope { x, cos_sin, tokens, heads, head_stride, first: 0, pairs, pairing })?;
                }
                OpKind::Attention { gqa, sinks } => {
                    let sinks = sinks.map(|s| self.weights.vector(s));
                    self.kv.attention((layer, gqa), sinks, tokens, &mut self.buffers, &mut self.stream)?;
                }
                OpKind::LatentAttention { mla, kv_norm, k_b, v_b } => {
                    let norm = (self.rope(&mla.rope, tokens), eps);
                    let of = (layer, mla);
                    let (weights, buffers, stream) = (&self.weights, &mut self.buffers, &mut self.stream);
                    self.kv.latent_attention(of, [*kv_norm, *k_b, *v_b], norm, tokens, weights, buffers, stream)?;
                }
                OpKind::SplitGate { .. }
                | OpKind::GateAttended
                | OpKind::DeltaRule { .. }
                | OpKind::InnerResidual
                | OpKind::NextIteration => unreachable!("refused when the session was opened"),
                OpKind::AddDelta { factor } => {
                    let width = self.buffers.width(Slot::Hidden);
                    let (x, y) = (self.buffers.rows(Slot::Delta, tokens), self.buffers.rows(Slot::Hidden, tokens));
                    self.stream.push(DeviceOp::Axpy { x, y, factor: *factor, elements: tokens * width })?;
                }
                OpKind::SelectRows => {
                    // What is added was added: its block takes the rows.
                    self.copy_last(Slot::Hidden, Slot::Delta, tokens, wanted as u32)?;
                    self.buffers.swap(Slot::Hidden, Slot::Delta);
                    tokens = wanted as u32;
                }
                OpKind::Route { weight, bias, selection_bias, moe, .. } => {
                    let (weight, logits) =
                        (self.weights.matrix(*weight), first(self.buffers.router, u64::from(tokens * moe.num_experts)));
                    let bias = bias.map(|b| self.weights.vector(b));
                    let x = self.buffers.rows(Slot::Normed, tokens);
                    self.stream.push(DeviceOp::MatMul { weight, bias, x, out: logits, tokens })?;
                    let selection = selection_bias.map(|b| (model.vector(b), self.weights.vector(b)));
                    let look = self.foresight.looks_from(layer as u32);
                    let (buffers, stream) = (&self.buffers, &mut self.stream);
                    let at = (layer as u32, self.kv.len(), step_tokens);
                    self.routed.route(model, moe, selection, at, tokens, look, driver, (&self.threads, buffers, stream))?;
                }
                OpKind::RoutedExperts { biases, moe, .. } => {
                    if let Some(OpKind::Ffn { gate, up, down, accumulate: true, .. }) = ops.get(i + 1).map(|o| &o.kind) {
                        // The shared expert is computed while the CPU computes its experts.
                        self.ffn(tokens, [*gate, *up, *down], self.buffers.ffn_out)?;
                        self.ffn_begun = true;
                    }
                    let wanted_in_last = if self.routed.captured.is_none() { wanted } else { step_tokens };
                    self.buffers.widen(Slot::Delta, model.spec().hidden_size);
                    let parts = (&self.threads, &self.buffers, &mut self.stream);
                    let guess = (&mut self.foresight, wanted_in_last);
                    self.routed.experts(model, layer as u32, (moe, *biases), tokens, driver, guess, parts)?;
                }
                OpKind::Ffn { gate, up, down, sigmoid_gate, accumulate } => {
                    let hidden = model.spec().hidden_size;
                    self.buffers.widen(Slot::Delta, hidden);
                    let delta = self.buffers.rows(Slot::Delta, tokens);
                    let out = if *accumulate { self.buffers.ffn_out } else { delta };
                    if !std::mem::take(&mut self.ffn_begun) {
                        self.ffn(tokens, [*gate, *up, *down], out)?;
                    }
                    let out = first(out, u64::from(tokens * hidden));
                    match sigmoid_gate {
                        Some(gate) => {
                            let (input, gate) = (self.buffers.rows(Slot::Normed, tokens), self.weights.vector(*gate));
                            let (rows, width, cols) = (tokens, hidden, hidden);
                            self.stream.push(DeviceOp::GatedAxpy { x: out, input, gate, y: delta, rows, width, cols })?;
                        }
                        None if *accumulate => {
                            self.stream.push(DeviceOp::Axpy { x: out, y: delta, factor: 1.0, elements: tokens * hidden })?;
                        }
                        None => {}
                    }
                }
                OpKind::Logits { weight, bias, factor, softcap } => {
                    self.project(driver, [Some(*weight), *bias], (*factor, *softcap), tokens, wanted as u32, sink)?;
                }
            }
        }
        Ok(())
    }

    fn scale(&mut self, slot: Slot, factor: f32, factors: Option<View>, rows: u32) -> Result<()> {
        let width = self.buffers.width(slot);
        self.stream.push(DeviceOp::Scale { x: self.buffers.rows(slot, rows), factor, factors, rows, width })
    }

    /// The table of a rotation, filled at the step's beginning.
    fn rope(&self, rope: &Rope, tokens: u32) -> View {
        let known = self.ropes.iter().find(|(t, _)| t.rope() == rope);
        let (_, view) = known.expect("every rotation of the list got its table when the session was opened");
        first(*view, u64::from(tokens * rope.rotary_dim))
    }

    /// Copies the last `count` of `rows` rows: as one long row, so that no part begins where a part may not.
    fn copy_last(&mut self, from: Slot, to: Slot, rows: u32, count: u32) -> Result<()> {
        self.copy_rows(from, to, rows, (rows - count, count))
    }

    fn copy_rows(&mut self, from: Slot, to: Slot, rows: u32, (start, count): (u32, u32)) -> Result<()> {
        let width = self.buffers.width(from);
        self.buffers.widen(to, width);
        self.stream.push(DeviceOp::CopyColumns {
            x: self.buffers.rows(from, rows),
            x_stride: rows * width,
            x_start: start * width,
            out: self.buffers.rows(to, count),
            out_stride: count * width,
            out_start: 0,
            rows: 1,
            width: count * width,
        })
    }

    /// Gate, up, activation and down of a network for all tokens, in as many parts as its inner buffers ask for.
    fn ffn(&mut self, tokens: u32, tensors: [TensorId; 3], out: View) -> Result<()> {
        let [gate, up, down] = tensors.map(|t| self.weights.matrix(t));
        let (inner_size, hidden) = (gate.rows, down.rows);
        let room = (self.buffers.ffn[0].bytes / (4 * u64::from(inner_size))) as u32;
        let at_once = if room >= tokens { tokens } else { room - room % PART_TOKENS };
        let x = self.buffers.rows(Slot::Normed, tokens);
        for start in (0..tokens).step_by(at_once as usize) {
            let rows = at_once.min(tokens - start);
            let part = |view: View, width: u32| {
                view.part(4 * u64::from(start) * u64::from(width), 4 * u64::from(rows) * u64::from(width))
            };
            let elements = rows * inner_size;
            let [gate_out, up_out, inner] = self.buffers.ffn.map(|v| first(v, u64::from(elements)));
            let x = part(x, gate.cols);
            self.stream.push(DeviceOp::MatMul { weight: gate, bias: None, x, out: gate_out, tokens: rows })?;
            self.stream.push(DeviceOp::MatMul { weight: up, bias: None, x, out: up_out, tokens: rows })?;
            let activation = Activation::Silu;
            self.stream.push(DeviceOp::Activate { gate: gate_out, up: up_out, out: inner, elements, activation })?;
            self.stream.push(DeviceOp::MatMul { weight: down, bias: None, x: inner, out: part(out, hidden), tokens: rows })?;
        }
        Ok(())
    }

    /// The projection to the vocabulary of the last `wanted` of `tokens` rows, block by block to `sink`.
    fn project(
        &mut self,
        driver: &mut Driver,
        [weight, bias]: [Option<TensorId>; 2],
        (factor, softcap): (f32, Option<f32>),
        tokens: u32,
        wanted: u32,
        sink: LogitsSink<'_>,
    ) -> Result<()> {
        let weight = self.weights.matrix(weight.expect("given by the caller"));
        let bias = bias.map(|b| self.weights.vector(b));
        let vocab = weight.rows;
        self.buffers.widen(Slot::Logits, vocab);
        let at_once = (self.buffers.whole(Slot::Logits).bytes / (4 * u64::from(vocab))).max(1) as u32;
        for start in (0..wanted).step_by(at_once as usize) {
            let rows = at_once.min(wanted - start);
            let from = tokens - wanted + start;
            let x = if from == 0 {
                self.buffers.rows(Slot::Normed, rows)
            } else {
                self.copy_rows(Slot::Normed, Slot::Delta, tokens, (from, rows))?;
                self.buffers.rows(Slot::Delta, rows)
            };
            let (out, elements) = (self.buffers.rows(Slot::Logits, rows), rows * vocab);
            self.stream.push(DeviceOp::MatMul { weight, bias, x, out, tokens: rows })?;
            if factor != 1.0 || softcap.is_some() {
                self.stream.push(DeviceOp::ScaleCap { x: out, elements, factor, softcap })?;
            }
            self.logits.resize(elements as usize, 0.0);
            self.stream.read(&mut [(out, bytemuck::cast_slice_mut(&mut self.logits))])?;
            self.routed.outputs_are_tainted |= self.logits.iter().any(|x| !x.is_finite());
            let block = ArrayView2::from_shape((rows as usize, vocab as usize), &self.logits).expect("rows * vocab elements");
            sink(start as usize, block);
        }
        driver.device_is_idle();
        Ok(())
    }
}

/// The rotation of an operation, if it has one.
fn rope_of(op: &Op) -> Option<&Rope> {
    match &op.kind {
        OpKind::Rope { rope, .. } => Some(rope),
        OpKind::LatentAttention { mla, .. } => Some(&mla.rope),
        _ => None,
    }
}

/// Slots of the pools on the device, by pool of the plan.
fn device_pools(
    plan: &CheckedPlan,
    layers: &HashMap<u32, LayerExperts>,
    memory: &mut DeviceMemory,
    backend: &mut dyn DeviceBackend,
) -> Result<Vec<Option<Vec<DevicePlace>>>> {
    let cached = plan.cache_pools().len();
    let mut pools = Vec::new();
    for (i, pool) in plan.pools().iter().enumerate() {
        let (staged, passes) = (i >= cached, plan.plan().engine.staging_slots > 0);
        let streamed = |l: u32| staged && copied_to_device(plan, l);
        let of_pool = |l: &&u32| match plan.slots(**l) > 0 {
            true if staged => passes || streamed(**l),
            true => plan.pool_of(**l) as usize == i,
            false => streamed(**l),
        };
        let is_on_device = |l: &u32| slots_on_device(plan, *l) || (streamed(*l) && !(passes && plan.slots(*l) > 0));
        let mut on_device = plan.moe_layers().iter().filter(of_pool).map(is_on_device).collect::<Vec<_>>();
        on_device.dedup();
        match on_device.as_slice() {
            [] | [false] => pools.push(None),
            [true] => {
                let line = if i < cached { budget::EXPERT_CACHE } else { budget::STAGING };
                let layouts: Vec<DeviceLayout> =
                    plan.moe_layers().iter().filter(of_pool).filter_map(|l| layers.get(l)).map(|l| l.layout).collect();
                pools.push(Some(experts::allocate_pool(pool.slots, &layouts, line, memory, backend)?));
            }
            _ => {
                return Err(RuntimeError::BadRequest {
                    what: "plan",
                    found: "slots that layers with slots on the device share with layers whose slots are in host memory".into(),
                    expected: "slots of their own for every layer (partition per_layer, no staging slots)".into(),
                });
            }
        }
    }
    Ok(pools)
}

/// What an operation is part of that no device computes.
fn only_on_cpu(op: &OpKind) -> Option<&'static str> {
    match op {
        OpKind::SplitGate { .. } | OpKind::GateAttended => Some("gated attention"),
        OpKind::DeltaRule { .. } => Some("a gated delta rule"),
        OpKind::InnerResidual | OpKind::NextIteration => Some("experts in iterations"),
        OpKind::Route { moe, .. } if moe.router.selection != Selection::TopK => {
            Some("a number of experts that differs from token to token")
        }
        _ => None,
    }
}
