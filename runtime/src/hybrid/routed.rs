//! Routed experts on device and CPU: the choice, the demand to the engine, waves here and there, and their sum.
//!
//! Where every expert of a layer stays on the device and the step is short, the device chooses by itself and nothing is read back. Else
//! the router's logits are read, the choice is made as on the CPU (`exec/route.rs`), and the engine says who computes what. The CPU's
//! part is summed on the host, in the order of choices, and added to the device's sum.

use super::activations::{Activations, first};
use super::experts::LayerExperts;
use super::groups::Groups;
use super::stream::Stream;
use crate::backend::device::{BufferId, View};
use crate::backend::op::{DeviceExperts, DeviceOp, DeviceRule, RowGroups};
use crate::error::Result;
use crate::exec::buffers::Activations as HostRows;
use crate::exec::driver::{Compute, Driver, Foreseen, Wave};
use crate::exec::executor::CapturedRouting;
use crate::exec::experts::{ExpertBuffers, ExpertBytes, ExpertExtras, weighted_rows};
use crate::exec::forced::Forced;
use crate::exec::foresight::Foresight;
use crate::exec::loader::{DeviceLayout, DevicePlace};
use crate::exec::model::Model;
use crate::exec::prepared::Prepared;
use crate::exec::route::{RouterScores, Routing, Rule};
use crate::exec::sequences::SequenceId;
use crate::exec::threads::Threads;
use std::collections::HashMap;
use tierwise_cost::model::{Moe, RouterScore, TensorId};
use tierwise_cost::op::Slot;

/// From so many tokens on, rows are grouped by expert, for which the host must know the choice. With fewer, most experts have one row.
const GROUPED_TOKENS: u32 = 8;

/// What the parts of a step work with.
type Parts<'a> = (&'a Threads, &'a Activations, &'a mut Stream);

/// Routed experts of all layers, and working memory on the host.
pub struct Routed {
    layers: HashMap<u32, LayerExperts>,
    /// Guesses learn from every demand.
    guesses: bool,
    /// The step's routing, if capture is on.
    pub captured: Option<Vec<CapturedRouting>>,
    /// Choices from elsewhere.
    pub forced: Forced,
    /// A step gave numbers that are not finite: outputs of experts that the CPU computes in the next one must not be among what is left.
    pub outputs_are_tainted: bool,
    /// The current layer was routed on the device.
    on_device: bool,
    routing: Routing,
    scores: RouterScores,
    groups: Groups,
    /// `[tokens, num_experts]`
    logits: Vec<f32>,
    /// `[tokens, hidden]` each: what was read for this layer.
    normed: HostRows,
    hidden: HostRows,
    forms: Prepared,
    weighted: (Vec<f32>, Prepared),
    buffers: ExpertBuffers,
    /// `[tokens, hidden]`
    delta: Vec<f32>,
}

impl Routed {
    /// Nothing routed yet.
    pub fn new(layers: HashMap<u32, LayerExperts>, guesses: bool, capture: bool) -> Self {
        Self {
            layers,
            guesses,
            captured: capture.then(Vec::new),
            forced: Forced::default(),
            outputs_are_tainted: false,
            on_device: false,
            routing: Routing::default(),
            scores: RouterScores::default(),
            groups: Groups::default(),
            logits: Vec::new(),
            normed: HostRows::default(),
            hidden: HostRows::default(),
            forms: Prepared::default(),
            weighted: Default::default(),
            buffers: ExpertBuffers::default(),
            delta: Vec::new(),
        }
    }

    /// How the experts of a layer lie on the device.
    ///
    /// # Panics
    /// If the layer has none.
    pub fn layout(&self, layer: u32) -> DeviceLayout {
        self.layers[&layer].layout
    }

    /// Chooses experts from the router's logits, which are on the device. `look`: guesses at later layers need the residual stream.
    #[expect(clippy::too_many_arguments, reason = "the fields of one operation, and where it happens")]
    pub fn route(
        &mut self,
        model: &Model,
        moe: &Moe,
        selection_bias: Option<(&[f32], View)>,
        (layer, position, step_tokens): (u32, usize, usize),
        tokens: u32,
        look: bool,
        driver: &mut Driver,
        (threads, buffers, stream): Parts<'_>,
    ) -> Result<()> {
        let of_layer = &self.layers[&layer];
        let alone = of_layer.all_resident && tokens < GROUPED_TOKENS && !self.guesses;
        let (num_experts, k) = (moe.num_experts, moe.experts_per_token);
        let logits = first(buffers.router, u64::from(tokens * num_experts));
        let rule = device_rule(moe).filter(|_| alone && self.captured.is_none() && !self.forced.is_on());
        self.on_device = rule.is_some();
        if let Some(rule) = rule {
            let rows = u64::from(tokens * k);
            let (ids, weights) = (first(buffers.ids, rows), first(buffers.weights, rows));
            let selection_bias = selection_bias.map(|(_, on_device)| on_device);
            return stream.push(DeviceOp::Route { logits, selection_bias, ids, weights, tokens, num_experts, k, rule });
        }
        let hidden = model.spec().hidden_size;
        self.logits.resize((tokens * num_experts) as usize, 0.0);
        let mut parts: Vec<(View, &mut [u8])> = vec![(logits, bytemuck::cast_slice_mut(&mut self.logits))];
        // All in one go: a later read would wait for the experts that are on their way by then.
        if of_layer.on_cpu {
            self.normed.reshape(tokens as usize, hidden as usize);
            parts.push((buffers.rows(Slot::Normed, tokens), bytemuck::cast_slice_mut(self.normed.as_mut_slice())));
            self.forms.invalidate();
        }
        if look {
            self.hidden.reshape(tokens as usize, hidden as usize);
            parts.push((buffers.rows(Slot::Hidden, tokens), bytemuck::cast_slice_mut(self.hidden.as_mut_slice())));
        }
        stream.read(&mut parts)?;
        driver.device_is_idle();
        let scores = if driver.loads_experts() { Some(&mut self.scores) } else { None };
        let rule = Rule { moe, selection_bias: selection_bias.map(|(on_host, _)| on_host) };
        self.routing.choose_scored(threads.kernels(), rule, &mut self.logits, scores);
        if self.forced.is_on() {
            let moe_layer = model.spec().moe_layers().position(|(l, _)| l == layer).unwrap_or(0);
            // After SelectRows only the step's last tokens are here.
            let first = step_tokens - self.routing.num_tokens();
            self.forced.apply(&mut self.routing, moe_layer, |row| first + row);
        }
        if let Some(captured) = &mut self.captured {
            captured.push(CapturedRouting { sequence: SequenceId::FIRST, layer, position, routing: self.routing.clone() });
        }
        Ok(())
    }

    /// The weighted sum of the chosen experts' outputs into [`Slot::Delta`].
    #[expect(clippy::too_many_arguments, reason = "the fields of one operation, and where it happens")]
    pub fn experts(
        &mut self,
        model: &Model,
        layer: u32,
        (moe, biases): (&Moe, Option<[TensorId; 3]>),
        tokens: u32,
        driver: &mut Driver,
        (foresight, wanted_in_last): (&mut Foresight, usize),
        (threads, buffers, stream): Parts<'_>,
    ) -> Result<()> {
        let of_layer = &self.layers[&layer];
        let hidden = of_layer.shape.hidden;
        let rows = u64::from(tokens * moe.experts_per_token);
        let device = OnDevice { of_layer, moe, buffers, tokens, tiles: None };
        let delta = buffers.rows(Slot::Delta, tokens);
        if self.on_device {
            if moe.weights_on_input {
                // The router's weights go to the input.
                device.weighted_input(stream, first(buffers.weights, rows))?;
            }
            for arena in &of_layer.arenas {
                device.push(stream, arena.buffer, arena.table)?;
            }
            let weights = if moe.weights_on_input { buffers.ones } else { buffers.weights };
            return stream.push(device.combine(first(weights, rows), delta));
        }
        self.groups.arrange(&self.routing);
        let scores = if driver.loads_experts() && !self.forced.is_on() { self.scores.to_sparse() } else { Vec::new() };
        let demand = self.groups.demand(layer, tokens, scores);
        let biases = biases.map(|b| b.map(|b| model.vector(b)));
        let extras = ExpertExtras { activation: moe.activation, biases, weights_on_input: moe.weights_on_input };
        let mut work = Work {
            model,
            threads,
            stream,
            device,
            extras,
            routing: &self.routing,
            groups: &self.groups,
            normed: &self.normed,
            forms: &mut self.forms,
            weighted: &mut self.weighted,
            host: &mut self.buffers,
            on_host: Vec::new(),
            device_used: false,
            foresight,
            residual: &self.hidden,
            wanted_in_last,
        };
        driver.serve(demand, &mut work)?;
        let Work { on_host, device_used, .. } = work;
        let is_mine = |e: u32| on_host.get(e as usize).copied().unwrap_or(false);
        if moe.weights_on_input {
            self.routing.weights.fill(1.0);
        }
        if !on_host.is_empty() {
            self.delta.resize(tokens as usize * hidden as usize, 0.0);
            self.buffers.combine(threads, &self.routing, &mut self.delta, hidden as usize, is_mine);
        }
        let sum = first(buffers.host_delta, u64::from(tokens * hidden));
        if device_used {
            // The device's sum leaves the CPU's choices out; their rows hold an earlier layer's numbers.
            let weights: Vec<f32> =
                self.routing.weights.iter().zip(&self.routing.experts).map(|(w, e)| if is_mine(*e) { 0.0 } else { *w }).collect();
            stream.write(first(buffers.weights, rows), bytemuck::cast_slice(&weights))?;
            if !on_host.is_empty() {
                stream.write(sum, bytemuck::cast_slice(&self.delta))?;
            }
            stream.push(device.combine(first(buffers.weights, rows), delta))?;
            if !on_host.is_empty() {
                stream.push(DeviceOp::Axpy { x: sum, y: delta, factor: 1.0, elements: tokens * hidden })?;
            }
        } else {
            stream.write(delta, bytemuck::cast_slice(&self.delta))?;
        }
        Ok(())
    }
}

/// The rule as the device has it, if it has it: no groups of experts, no sparse mixer.
fn device_rule(moe: &Moe) -> Option<DeviceRule> {
    let r = &moe.router;
    let sigmoid = match r.score {
        RouterScore::Softmax => false,
        RouterScore::Sigmoid => true,
        RouterScore::SparseMixer | RouterScore::SqrtSoftplus => return None,
    };
    let grouped = r.groups.is_some_and(|(groups, kept)| kept < groups);
    (!grouped).then_some(DeviceRule { sigmoid, normalize: r.normalize_topk, softmax_after_topk: false, scale: r.scale })
}

/// A layer's experts on the device in one step.
#[derive(Clone, Copy)]
struct OnDevice<'a> {
    of_layer: &'a LayerExperts,
    moe: &'a Moe,
    buffers: &'a Activations,
    tokens: u32,
    /// Number of tiles, when rows are grouped.
    tiles: Option<u32>,
}

impl OnDevice<'_> {
    fn rows(&self) -> u32 {
        self.tokens * self.moe.experts_per_token
    }

    /// An input row for every choice, times its weight.
    fn weighted_input(&self, stream: &mut Stream, weights: View) -> Result<()> {
        let (hidden, k) = (self.of_layer.shape.hidden, self.moe.experts_per_token);
        let x = self.buffers.rows(Slot::Normed, self.tokens);
        let out = first(self.buffers.expert_input, u64::from(self.rows() * hidden));
        for choice in 0..k {
            stream.push(DeviceOp::CopyColumns {
                x,
                x_stride: hidden,
                x_start: 0,
                out,
                out_stride: k * hidden,
                out_start: choice * hidden,
                rows: self.tokens,
                width: hidden,
            })?;
        }
        stream.push(DeviceOp::Scale { x: out, factor: 1.0, factors: Some(weights), rows: self.rows(), width: hidden })
    }

    /// Outputs of the experts of one block.
    fn push(&self, stream: &mut Stream, buffer: BufferId, table: View) -> Result<()> {
        let (b, rows, hidden) = (self.buffers, self.rows(), self.of_layer.shape.hidden);
        let (x, rows_per_input) = if self.moe.weights_on_input {
            (first(b.expert_input, u64::from(rows * hidden)), 1)
        } else {
            (b.rows(Slot::Normed, self.tokens), self.moe.experts_per_token)
        };
        let groups = self.tiles.map(|num_tiles| RowGroups {
            order: first(b.order, u64::from(rows)),
            tiles: first(b.tiles, 3 * u64::from(num_tiles)),
            num_tiles,
        });
        stream.push(DeviceOp::Experts {
            experts: DeviceExperts { buffer, table, ..self.of_layer.shape },
            x,
            ids: first(b.ids, u64::from(rows)),
            rows_per_input,
            inner: first(b.expert_inner, u64::from(rows) * u64::from(self.moe.inner_size)),
            out: first(b.expert_out, u64::from(rows * hidden)),
            rows,
            groups,
        })
    }

    fn combine(&self, weights: View, delta: View) -> DeviceOp {
        let hidden = self.of_layer.shape.hidden;
        DeviceOp::Combine {
            x: first(self.buffers.expert_out, u64::from(self.rows() * hidden)),
            weights,
            y: delta,
            tokens: self.tokens,
            k: self.moe.experts_per_token,
            width: hidden,
            accumulate: false,
        }
    }
}

/// A demand's waves, computed by device and CPU.
struct Work<'a, 'm> {
    model: &'m Model,
    threads: &'a Threads,
    stream: &'a mut Stream,
    device: OnDevice<'a>,
    extras: ExpertExtras<'a>,
    routing: &'a Routing,
    groups: &'a Groups,
    /// What was read: `[tokens, hidden]`.
    normed: &'a HostRows,
    forms: &'a mut Prepared,
    weighted: &'a mut (Vec<f32>, Prepared),
    host: &'a mut ExpertBuffers,
    /// Which experts the CPU computed, by number; empty while none.
    on_host: Vec<bool>,
    device_used: bool,
    foresight: &'a mut Foresight,
    residual: &'a HostRows,
    wanted_in_last: usize,
}

impl Work<'_, '_> {
    /// Writes what the device needs to know of the choice, before its first wave.
    fn begin_device(&mut self) -> Result<()> {
        let (b, rows) = (self.device.buffers, u64::from(self.device.rows()));
        self.stream.write(first(b.ids, rows), bytemuck::cast_slice(&self.routing.experts))?;
        if self.device.tokens >= GROUPED_TOKENS {
            let tiles = self.groups.tiles();
            self.stream.write(first(b.order, rows), bytemuck::cast_slice(&self.groups.order))?;
            self.stream.write(first(b.tiles, 3 * tiles.len() as u64), bytemuck::cast_slice(&tiles))?;
            self.device.tiles = Some(tiles.len() as u32);
        }
        if self.extras.weights_on_input {
            let factors = first(b.factors, rows);
            self.stream.write(factors, bytemuck::cast_slice(&self.routing.weights))?;
            self.device.weighted_input(self.stream, factors)?;
        }
        self.device_used = true;
        Ok(())
    }

    fn on_device(&mut self, experts: &[(u32, Option<DevicePlace>)]) -> Result<()> {
        if !self.device_used {
            self.begin_device()?;
        }
        let of_layer = self.device.of_layer;
        for arena in &of_layer.arenas {
            let has = |e: u32| arena.experts.binary_search_by_key(&e, |(expert, _)| *expert).is_ok();
            if experts.iter().any(|(e, place)| place.is_none() && has(*e)) {
                self.device.push(self.stream, arena.buffer, arena.table)?;
            }
        }
        let mut in_slots: Vec<(u32, DevicePlace)> = experts.iter().filter_map(|(e, place)| place.map(|p| (*e, p))).collect();
        in_slots.sort_by_key(|(_, place)| place.buffer.0);
        for of_buffer in in_slots.chunk_by(|a, b| a.1.buffer == b.1.buffer) {
            let table = of_layer.table(of_buffer.iter().copied());
            let view = first(self.device.buffers.table, table.len() as u64);
            self.stream.write(view, bytemuck::cast_slice(&table))?;
            self.device.push(self.stream, of_buffer[0].1.buffer, view)?;
        }
        self.stream.flush()
    }

    fn on_host(&mut self, experts: &[(u32, ExpertBytes<'_>)]) -> Result<()> {
        // What the device can do meanwhile, it begins.
        self.stream.flush()?;
        let Some((_, first)) = experts.first() else { return Ok(()) };
        let (gate, up, down, inner_size, hidden) =
            (first.gate.format, first.up.format, first.down.format, first.gate.rows, first.down.rows);
        if self.on_host.is_empty() {
            self.on_host.resize(self.device.moe.num_experts as usize, false);
            self.host.arrange(self.routing, inner_size, hidden, down, self.extras.weights_on_input);
            if self.extras.weights_on_input {
                weighted_rows(self.normed.as_slice(), hidden, self.routing, &mut self.weighted.0);
                self.weighted.1.invalidate();
            }
        }
        let (rows, forms) = if self.extras.weights_on_input {
            (self.weighted.0.as_slice(), &mut self.weighted.1)
        } else {
            (self.normed.as_slice(), &mut *self.forms)
        };
        forms.ensure(self.threads, gate, rows, hidden);
        forms.ensure(self.threads, up, rows, hidden);
        self.host.compute(self.threads, forms, &self.extras, experts);
        experts.iter().for_each(|(e, _)| self.on_host[*e as usize] = true);
        Ok(())
    }
}

impl<'m> Compute<'m> for Work<'_, 'm> {
    fn resident(&self, expert: u32) -> ExpertBytes<'m> {
        self.model.expert(self.device.of_layer.tensors, expert)
    }

    fn foresee(&mut self) -> Vec<Foreseen> {
        let layer = self.device.of_layer.layer;
        let rows = self.residual.rows() as u32;
        let kept: Vec<u32> = (rows.saturating_sub(self.wanted_in_last as u32)..rows).collect();
        self.foresight.look(self.model, self.threads, layer, self.residual, &kept)
    }

    fn compute(&mut self, wave: Wave<'_>) -> Result<()> {
        match wave {
            Wave::Host(experts) => self.on_host(experts),
            Wave::Device(experts) => self.on_device(experts),
        }
    }

    fn finish_device(&mut self) -> Result<()> {
        self.stream.wait()
    }
}
