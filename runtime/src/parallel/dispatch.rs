//! One layer's routed experts over all ranks.
//!
//! Counts to everyone, one decision, weights if it says so, rows to who computes them, results back: three exchanges, four with weights.
//! What a rank computes with is its own part of the file and the copies that it was sent; nothing else is touched.

use super::copies::{Copies, to_message};
use super::message::{Received, Request, check_results, counts_message, counts_of, forms};
use super::statistics::ParallelStatistics;
use super::transport::Transport;
use crate::error::{Result, RuntimeError};
use crate::exec::experts::{ExpertBuffers, ExpertBytes};
use crate::exec::model::Model;
use crate::exec::prepared::Prepared;
use crate::exec::remote::{RemoteExperts, RoutedLayer};
use crate::exec::route::{NO_EXPERT, Routing};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tierwise_cost::model::TensorId;
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::balance::decide::{Decider, LayerDecision};
use tierwise_planner::balance::replay::Policy;

/// This rank's part in computing experts.
pub struct ExpertParallel {
    /// To the other ranks.
    pub(super) transport: Box<dyn Transport>,
    pub(super) decider: Decider,
    pub(super) statistics: ParallelStatistics,
    /// Tokens of all ranks per expert, where they are counted. `[steps][MoE layers][experts]`
    pub(super) loads: Option<Vec<Vec<Vec<u64>>>>,
    pub(super) step: u64,
    /// Experts of each layer that has some. `[MoE layers]`
    num_experts: Vec<usize>,
    /// Layers with experts, ascending.
    moe_layers: Vec<u32>,
    copies: Copies,
    /// What this rank computes for all.
    input: Prepared,
    routing: Routing,
    experts: ExpertBuffers,
}

/// The same for the executor, which owns what it calls.
pub(super) struct Shared(pub(super) Arc<Mutex<ExpertParallel>>);

impl RemoteExperts for Shared {
    fn compute(&mut self, model: &Model, layer: RoutedLayer<'_>, out: &mut ExpertBuffers) -> Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).layer(model, layer, Some(out))
    }
}

/// Rows for each rank. `[ranks]`
struct Outgoing(Vec<Request>);

impl ExpertParallel {
    pub(super) fn new(model: &Model, transport: Box<dyn Transport>, decider: Decider) -> Self {
        let moe = model.spec().moe_layers();
        Self {
            transport,
            decider,
            statistics: ParallelStatistics::default(),
            loads: None,
            step: 0,
            num_experts: moe.map(|(_, m)| m.num_experts as usize).collect(),
            moe_layers: model.spec().moe_layers().map(|(l, _)| l).collect(),
            copies: Copies::default(),
            input: Prepared::default(),
            routing: Routing::default(),
            experts: ExpertBuffers::default(),
        }
    }

    /// Another policy or placement; copies are forgotten.
    pub(super) fn set_decider(&mut self, decider: Decider) {
        self.decider = decider;
        self.copies = Copies::default();
    }

    /// Begins the next step.
    pub(super) fn begin_step(&mut self) {
        self.step += 1;
        if let Some(loads) = &mut self.loads {
            // Rows of a log are equally long: layers with fewer experts than others have some that nobody chooses.
            let most = self.num_experts.iter().copied().max().unwrap_or(0);
            loads.push(vec![vec![0; most]; self.moe_layers.len()]);
        }
    }

    /// Computes one layer together with all other ranks. Without `out` this rank has no tokens.
    pub(super) fn layer(&mut self, model: &Model, call: RoutedLayer<'_>, out: Option<&mut ExpertBuffers>) -> Result<()> {
        let Ok(moe) = self.moe_layers.binary_search(&call.layer) else {
            return Err(RuntimeError::BadRequest {
                what: "layer",
                found: call.layer.to_string(),
                expected: "one with routed experts".into(),
            });
        };
        let start = Instant::now();
        let counts = self.counts(&call, moe)?;
        let counted = Instant::now();
        let tokens: Vec<u64> = (0..self.num_experts[moe]).map(|e| counts.iter().map(|c| c[e]).sum()).collect();
        let decision = self.decide(moe, &tokens)?;
        let decided = Instant::now();
        self.move_weights(model, &call, moe, &decision)?;
        let moved = Instant::now();
        let outgoing = self.outgoing(&call, &counts, &decision);
        let results = self.exchange(model, &call, moe, &decision, &outgoing)?;
        if let Some(out) = out {
            let hidden = shape(model, call.tensors[2])[1];
            for (request, bytes) in outgoing.0.iter().zip(&results) {
                for (origin, row) in request.origins().iter().zip(bytes.chunks_exact(4 * hidden)) {
                    bytemuck::cast_slice_mut(out.output_mut(*origin, hidden)).copy_from_slice(row);
                }
            }
        }
        self.forget_copies(moe);
        let s = &mut self.statistics;
        s.counts_time += counted - start;
        s.decide_time += decided - counted;
        s.weights_time += moved - decided;
        Ok(())
    }

    /// Tokens that each rank has for each expert. `[ranks][experts]`
    fn counts(&mut self, call: &RoutedLayer<'_>, moe: usize) -> Result<Vec<Vec<u64>>> {
        let mut mine = vec![0_u32; self.num_experts[moe]];
        call.routing.experts.iter().filter(|e| **e != NO_EXPERT).for_each(|e| mine[*e as usize] += 1);
        let what = format!("step {}, layer {}: counts", self.step, call.layer);
        let all = self.transport.all_gather(&what, &counts_message(self.step, call.layer, &mine))?;
        let of = |(rank, message): (usize, &Vec<u8>)| counts_of(rank, message, self.step, call.layer, self.num_experts[moe]);
        all.iter().enumerate().map(of).collect()
    }

    fn decide(&mut self, moe: usize, tokens: &[u64]) -> Result<LayerDecision> {
        let decision = self.decider.decide(moe, tokens).map_err(|e| RuntimeError::BadRequest {
            what: "expert parallelism",
            found: e.to_string(),
            expected: "a policy that suits model and ranks".into(),
        })?;
        if let Some(step) = self.loads.as_mut().and_then(|l| l.last_mut()) {
            step[moe].iter_mut().zip(tokens).for_each(|(sum, t)| *sum += t);
        }
        let ranks = self.transport.size();
        let mut home = vec![0; ranks];
        tokens.iter().enumerate().for_each(|(e, t)| home[e * ranks / tokens.len()] += t);
        let s = &mut self.statistics;
        s.layer_steps += 1;
        s.before.add(&home);
        s.after.add(&decision.rows());
        s.experts_sent += decision.copies.len() as u64;
        Ok(decision)
    }

    /// The weights of an expert that this rank has.
    fn weights<'a>(
        (decider, copies): (&Decider, &'a Copies),
        model: &'a Model,
        tensors: [TensorId; 3],
        rank: usize,
        (moe, expert): (usize, u32),
    ) -> Result<ExpertBytes<'a>> {
        if decider.holders(moe).of(expert as usize).contains(&(rank as u16)) {
            return Ok(model.expert(tensors, expert));
        }
        copies.get((moe, expert)).ok_or_else(|| RuntimeError::Rank {
            rank,
            reason: format!("was asked for expert {expert} of the MoE layer {moe}, which it neither holds nor has a copy of"),
        })
    }

    /// Sends and receives the copies that were decided.
    fn move_weights(&mut self, model: &Model, call: &RoutedLayer<'_>, moe: usize, decision: &LayerDecision) -> Result<()> {
        if decision.copies.is_empty() {
            return Ok(());
        }
        let me = self.transport.rank();
        // One message between two ranks, with all experts that go that way, in the order of the decision.
        let mut to: Vec<Vec<u8>> = vec![Vec::new(); self.transport.size()];
        for copy in decision.copies.iter().filter(|c| usize::from(c.source) == me) {
            let held = (&self.decider, &self.copies);
            let expert = Self::weights(held, model, call.tensors, me, (moe, u32::from(copy.expert)))?;
            to[usize::from(copy.target)].extend(to_message(&expert));
        }
        let send: Vec<(usize, &[u8])> =
            to.iter().enumerate().filter(|(_, m)| !m.is_empty()).map(|(r, m)| (r, m.as_slice())).collect();
        self.statistics.weight_bytes += send.iter().map(|(_, m)| m.len() as u64).sum::<u64>();
        let sources =
            |r: usize| decision.copies.iter().filter(move |c| (usize::from(c.source), usize::from(c.target)) == (r, me));
        let receive: Vec<usize> = (0..self.transport.size()).filter(|r| sources(*r).next().is_some()).collect();
        let what = format!("step {}, layer {}: weights", self.step, call.layer);
        let received = self.transport.exchange(&what, &send, &receive)?;
        let example = model.expert(call.tensors, 0);
        let bytes = example.gate.bytes.len() + example.up.bytes.len() + example.down.bytes.len();
        for (rank, message) in receive.iter().zip(&received) {
            for (i, copy) in sources(*rank).enumerate() {
                let part = message.get(i * bytes..message.len().min((i + 1) * bytes)).unwrap_or_default();
                self.copies.keep((moe, u32::from(copy.expert)), &example, *rank, part)?;
            }
        }
        Ok(())
    }

    /// Who gets which of this rank's rows. `counts`: `[ranks][experts]`
    fn outgoing(&self, call: &RoutedLayer<'_>, counts: &[Vec<u64>], decision: &LayerDecision) -> Outgoing {
        let me = self.transport.rank();
        // Targets of the tokens of each expert still to come, the last one first.
        let mut targets: Vec<Vec<u16>> = vec![Vec::new(); decision.holders.num_experts()];
        let mut of_expert = vec![0; counts.len()];
        for (e, targets) in targets.iter_mut().enumerate().filter(|(e, _)| counts[me][*e] > 0) {
            of_expert.iter_mut().zip(counts).for_each(|(n, c)| *n = c[e]);
            for (rank, n) in decision.targets(e, &of_expert, me).into_iter().rev() {
                targets.extend(std::iter::repeat_n(rank, n as usize));
            }
        }
        let mut requests = vec![Request::default(); counts.len()];
        let k = call.routing.experts_per_token.max(1);
        for (choice, expert) in call.routing.experts.iter().enumerate().filter(|(_, e)| **e != NO_EXPERT) {
            let rank = targets[*expert as usize].pop().expect("as many targets as tokens");
            let row = if call.extras.weights_on_input { choice } else { choice / k };
            requests[usize::from(rank)].push(row as u32, *expert, choice);
        }
        Outgoing(requests)
    }

    /// Rows out, experts, results back. Results of each rank, in the order of the requests. `[ranks]`
    fn exchange(
        &mut self,
        model: &Model,
        call: &RoutedLayer<'_>,
        moe: usize,
        decision: &LayerDecision,
        outgoing: &Outgoing,
    ) -> Result<Vec<Vec<u8>>> {
        let start = Instant::now();
        let me = self.transport.rank();
        let format = |i: usize| model.spec().tensors[call.tensors[i].0 as usize].format;
        let forms = forms(format(0), format(1));
        let messages: Vec<Vec<u8>> = outgoing.0.iter().map(|r| r.encode(&forms, call.input)).collect();
        let others = |m: &[Vec<u8>]| m.iter().enumerate().filter(|(r, _)| *r != me).map(|(_, m)| m.len() as u64).sum::<u64>();
        self.statistics.dispatch_bytes += others(&messages);
        let what = |part| format!("step {}, layer {}: {part}", self.step, call.layer);
        let (rows_out, results_back) = (what("rows"), what("results"));
        let received = self.transport.all_to_all(&rows_out, messages)?;
        let arrived = Instant::now();
        let results = self.serve(model, call, moe, decision, &forms, &received)?;
        let computed = Instant::now();
        self.statistics.result_bytes += others(&results);
        let results = self.transport.all_to_all(&results_back, results)?;
        let hidden = shape(model, call.tensors[2])[1];
        for (rank, (request, bytes)) in outgoing.0.iter().zip(&results).enumerate() {
            check_results(rank, bytes, request.origins().len(), hidden)?;
        }
        self.statistics.compute_time += computed - arrived;
        self.statistics.exchange_time += (arrived - start) + computed.elapsed();
        Ok(results)
    }

    /// Computes what all ranks asked of this one. Results for each. `[ranks]`
    fn serve(
        &mut self,
        model: &Model,
        call: &RoutedLayer<'_>,
        moe: usize,
        decision: &LayerDecision,
        forms: &[QuantFormat],
        received: &[Vec<u8>],
    ) -> Result<Vec<Vec<u8>>> {
        let me = self.transport.rank();
        let (cols, inner_size, hidden) =
            (shape(model, call.tensors[0])[2], shape(model, call.tensors[0])[1], shape(model, call.tensors[2])[1]);
        let row_bytes: Vec<usize> =
            forms.iter().map(|f| crate::quant::activation_format(*f).row_bytes(cols).unwrap_or(0)).collect();
        // Messages are checked before any is used.
        let requests: Vec<Received<'_>> = received
            .iter()
            .enumerate()
            .map(|(rank, message)| Received::decode(rank, message, row_bytes.iter().sum(), self.num_experts[moe]))
            .collect::<Result<_>>()?;
        let rows: usize = requests.iter().map(|r| r.rows).sum();

        let mut before = 0;
        for (format, row_bytes) in forms.iter().zip(&row_bytes) {
            self.input.fill(*format, rows, cols, |form| {
                let all = requests.iter().flat_map(|r| r.rows_of_form(before, *row_bytes));
                form.rows_mut().zip(all).for_each(|(to, from)| to[..from.len()].copy_from_slice(from));
            });
            before += row_bytes;
        }
        // Rows of all ranks as tokens with as many choices as the one with the most.
        let mut of_row: Vec<Vec<u32>> = vec![Vec::new(); rows];
        let mut places = Vec::new();
        let mut first = 0;
        for request in &requests {
            for (row, expert) in request.choices() {
                let row = first + row as usize;
                places.push((row, of_row[row].len()));
                of_row[row].push(expert);
            }
            first += request.rows;
        }
        let k = of_row.iter().map(Vec::len).max().unwrap_or(1);
        self.routing.experts_per_token = k;
        self.routing.experts.clear();
        for experts in &of_row {
            self.routing.experts.extend(experts);
            self.routing.experts.extend(std::iter::repeat_n(NO_EXPERT, k - experts.len()));
        }
        self.routing.weights.clear();
        self.routing.weights.resize(rows * k, 0.0);

        let down = model.spec().tensors[call.tensors[2].0 as usize].format;
        self.experts.arrange(&self.routing, inner_size, hidden, down, false);
        let mut wanted: Vec<u32> = of_row.into_iter().flatten().collect();
        wanted.sort_unstable();
        wanted.dedup();
        debug_assert!(wanted.iter().all(|e| decision.holders.of(*e as usize).contains(&(me as u16))), "all decide alike");
        let held = (&self.decider, &self.copies);
        let weights = |e: &u32| Self::weights(held, model, call.tensors, me, (moe, *e)).map(|w| (*e, w));
        let experts: Vec<(u32, ExpertBytes<'_>)> = wanted.iter().map(weights).collect::<Result<_>>()?;
        self.experts.compute(call.threads, &self.input, call.extras, &experts);

        let mut places = places.into_iter();
        let mut results = Vec::with_capacity(requests.len());
        for request in &requests {
            let count = request.choices().count();
            let mut message = Vec::with_capacity(count * hidden * 4);
            for (row, choice) in places.by_ref().take(count) {
                message.extend_from_slice(bytemuck::cast_slice(self.experts.output(row * k + choice, hidden)));
            }
            results.push(message);
        }
        Ok(results)
    }

    /// Copies stay as the planner's cache says, or for their layer only.
    fn forget_copies(&mut self, moe: usize) {
        let me = self.transport.rank();
        if self.copies.is_empty() {
            return;
        }
        if self.decider.policy() != Policy::Tierwise {
            return self.copies.retain(|(layer, _)| layer != moe);
        }
        let stay: Vec<(usize, u32)> = self.decider.cache().of(me).map(|(l, e)| (l as usize, u32::from(e))).collect();
        self.copies.retain(|key| stay.contains(&key));
    }

    /// Copies that this rank has.
    pub(super) fn num_copies(&self) -> usize {
        self.copies.len()
    }
}

/// The shape of a tensor.
fn shape(model: &Model, id: TensorId) -> [usize; 3] {
    let shape = &model.spec().tensors[id.0 as usize].shape;
    [0, 1, 2].map(|i| shape.get(i).map_or(0, |n| *n as usize))
}
