//! One layer of the engine: its slots and the demand it serves.

use super::cache::{self, Seen};
use super::expert_cache::ExpertCache;
use super::{Action, Demand, ExecutorId, ExpertKey, Input, Location, MAX_RETRIES, Purpose, SlotId, Statistics, TierId};
use crate::check::CheckedPlan;
use std::collections::VecDeque;
use tierwise_cost::units::{Bytes, Nanos};

/// A place of an expert in the plan.
#[derive(Debug, Clone, Copy)]
struct Home {
    tier: TierId,
    executor: ExecutorId,
    cached: bool,
}

/// A computation under way.
#[derive(Debug)]
struct Wave {
    number: u32,
    executor: ExecutorId,
    experts: Vec<u32>,
}

/// A demand under way.
#[derive(Debug)]
struct Active {
    step: u64,
    /// Misses without a slot yet, in order.
    waiting: VecDeque<u32>,
    /// Loads under way.
    loading: u32,
    /// In place, not yet given to an executor.
    ready: Vec<(u32, Location, ExecutorId)>,
    running: Vec<Wave>,
    next_wave: u32,
}

#[derive(Debug)]
pub(super) struct LayerEngine {
    layer: u32,
    /// The pool its slots are in.
    pool: u32,
    expert_bytes: Bytes,
    homes: Vec<Home>,
    cache: ExpertCache,
    active: Option<Active>,
    /// Demanded and not computed yet: may not be evicted. `[num_experts]`
    kept: Vec<bool>,
    last_event: Nanos,
}

impl LayerEngine {
    pub fn new(plan: &CheckedPlan, layer: u32) -> Self {
        let num_experts = plan.num_experts(layer);
        let homes = (0..num_experts)
            .map(|e| {
                let tier = plan.tier_of(layer, e);
                Home { tier, executor: plan.executor_of(tier), cached: plan.tier(tier).through.is_some() }
            })
            .collect();
        let policy = plan.plan().layers.iter().find(|l| l.layer == layer).map(|l| l.policy).unwrap_or_default();
        Self {
            layer,
            pool: plan.pool_of(layer),
            expert_bytes: plan.expert_bytes(layer),
            homes,
            cache: ExpertCache::new(plan.slots(layer), num_experts, cache::build(policy, num_experts)),
            active: None,
            kept: vec![false; num_experts as usize],
            last_event: Nanos(0),
        }
    }

    pub fn ready_slots(&self) -> impl Iterator<Item = (SlotId, u32)> + '_ {
        self.cache.ready().map(|(index, e)| (SlotId { pool: self.pool, index }, e))
    }

    /// Takes an input; an error is the reason to abort.
    pub fn handle(&mut self, now: Nanos, input: Input, out: &mut VecDeque<Action>, stats: &mut Statistics) -> Result<(), String> {
        if self.active.as_ref().is_some_and(|a| a.running.is_empty()) {
            stats.stalled.0 += now.0.saturating_sub(self.last_event.0);
        }
        self.last_event = now;
        match input {
            Input::Routed(demand) => self.routed(&demand, out, stats),
            Input::Foreseen { .. } => Ok(()),
            Input::Loaded { key, slot } => self.loaded(key.expert, slot, out, stats),
            Input::Computed { wave, .. } => self.computed(wave, out, stats),
            Input::Failed { key, slot, reason } => self.failed(key.expert, slot, &reason, out, stats),
        }
    }

    fn routed(&mut self, demand: &Demand, out: &mut VecDeque<Action>, stats: &mut Statistics) -> Result<(), String> {
        let layer = self.layer;
        if let Some(active) = &self.active {
            return Err(format!("layer {layer} was asked for step {} while it serves step {}", demand.step, active.step));
        }
        let known = demand.experts.iter().all(|(e, tokens)| (*e as usize) < self.homes.len() && *tokens > 0);
        if !known || !demand.experts.is_sorted_by(|a, b| a.0 < b.0) {
            let n = self.homes.len();
            return Err(format!(
                "the demand of step {} for layer {layer} is not a set of experts below {n} with tokens",
                demand.step
            ));
        }
        self.cache.on_demand(&Seen { experts: &demand.experts, tokens: demand.tokens, scores: &demand.scores });
        let mut active = Active {
            step: demand.step,
            waiting: VecDeque::new(),
            loading: 0,
            ready: Vec::new(),
            running: Vec::new(),
            next_wave: 0,
        };
        for e in demand.experts.iter().map(|(e, _)| *e) {
            let home = self.homes[e as usize];
            self.kept[e as usize] = true;
            stats.requests += 1;
            if !home.cached {
                stats.resident_hits += 1;
                active.ready.push((e, Location::Resident, home.executor));
            } else if let Some(slot) = self.cache.ready_slot(e) {
                active.ready.push((e, Location::Slot(SlotId { pool: self.pool, index: slot }), home.executor));
            } else {
                active.waiting.push_back(e);
            }
        }
        stats.demands += 1;
        stats.hits += active.ready.len() as u64;
        stats.misses += active.waiting.len() as u64;
        self.active = Some(active);
        self.advance(out, stats);
        Ok(())
    }

    fn loaded(&mut self, expert: u32, slot: SlotId, out: &mut VecDeque<Action>, stats: &mut Statistics) -> Result<(), String> {
        let not_asked = || {
            format!("expert {expert} of layer {} is not being loaded into slot {} of pool {}", self.layer, slot.index, slot.pool)
        };
        let Some(active) = &mut self.active else { return Err(not_asked()) };
        if slot.pool != self.pool || !self.cache.loaded(expert, slot.index) {
            return Err(not_asked());
        }
        active.loading -= 1;
        active.ready.push((expert, Location::Slot(slot), self.homes[expert as usize].executor));
        self.advance(out, stats);
        Ok(())
    }

    fn computed(&mut self, wave: u32, out: &mut VecDeque<Action>, stats: &mut Statistics) -> Result<(), String> {
        let not_asked = || format!("wave {wave} of layer {} is not being computed", self.layer);
        let Some(active) = &mut self.active else { return Err(not_asked()) };
        let Some(at) = active.running.iter().position(|w| w.number == wave) else { return Err(not_asked()) };
        for e in active.running.swap_remove(at).experts {
            self.kept[e as usize] = false;
        }
        self.advance(out, stats);
        Ok(())
    }

    fn failed(
        &mut self,
        expert: u32,
        slot: SlotId,
        reason: &str,
        out: &mut VecDeque<Action>,
        stats: &mut Statistics,
    ) -> Result<(), String> {
        match if slot.pool == self.pool { self.cache.failed(expert, slot.index) } else { None } {
            None => Err(format!(
                "expert {expert} of layer {} is not being loaded into slot {} of pool {}",
                self.layer, slot.index, slot.pool
            )),
            Some(failures) if failures > MAX_RETRIES => {
                Err(format!("expert {expert} of layer {} could not be loaded in {failures} tries: {reason}", self.layer))
            }
            Some(_) => {
                stats.retries += 1;
                self.load(expert, slot, out, stats);
                Ok(())
            }
        }
    }

    fn load(&self, expert: u32, slot: SlotId, out: &mut VecDeque<Action>, stats: &mut Statistics) {
        let from = self.homes[expert as usize].tier;
        stats.loads += 1;
        stats.bytes_loaded_by_tier[from.0 as usize] += self.expert_bytes;
        let key = ExpertKey { layer: self.layer, expert };
        out.push_back(Action::Load { key, slot, bytes: self.expert_bytes, from, purpose: Purpose::Demand });
    }

    /// Gives idle executors what is ready, waiting misses the slots that may go, and finishes when nothing is left.
    fn advance(&mut self, out: &mut VecDeque<Action>, stats: &mut Statistics) {
        let Some(active) = &mut self.active else { return };
        // One wave per idle executor: all that is ready for it.
        while let Some(executor) = active.ready.iter().map(|r| r.2).find(|x| active.running.iter().all(|w| w.executor != *x)) {
            let mut experts: Vec<(u32, Location)> = active.ready.iter().filter(|r| r.2 == executor).map(|r| (r.0, r.1)).collect();
            active.ready.retain(|r| r.2 != executor);
            experts.sort_unstable_by_key(|(e, _)| *e);
            let number = active.next_wave;
            active.next_wave += 1;
            active.running.push(Wave { number, executor, experts: experts.iter().map(|(e, _)| *e).collect() });
            stats.waves += 1;
            out.push_back(Action::Compute { layer: self.layer, wave: number, experts, executor });
        }
        let mut loads = Vec::new();
        while let Some(expert) = active.waiting.front().copied() {
            let kept = &self.kept;
            let Some(placed) = self.cache.place(expert, |e| kept[e as usize]) else { break };
            active.waiting.pop_front();
            active.loading += 1;
            loads.push((expert, placed));
        }
        let done = active.waiting.is_empty() && active.loading == 0 && active.ready.is_empty() && active.running.is_empty();
        let step = active.step;
        for (expert, placed) in loads {
            let slot = SlotId { pool: self.pool, index: placed.slot };
            if let Some(victim) = placed.evicted {
                stats.evictions += 1;
                out.push_back(Action::Evict { key: ExpertKey { layer: self.layer, expert: victim }, slot });
            }
            self.load(expert, slot, out, stats);
        }
        if done {
            self.active = None;
            out.push_back(Action::Finish { step, layer: self.layer });
        }
    }
}
