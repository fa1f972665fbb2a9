//! One layer of the engine: the demand it serves, who computes what of it, and what it waits for.

use super::costs::{EngineCosts, TierTime};
use super::pool::{Pool, Prefetched, Presence};
use super::schedule::{Item, LayerWork, Place, Rule, Schedule, Scratch};
use super::staging::{Arrival, Staging};
use super::{Action, Demand, ExecutorId, ExpertKey, Location, MAX_RETRIES, Purpose, SlotId, Statistics, TierId};
use crate::check::CheckedPlan;
use std::collections::VecDeque;
use tierwise_cost::units::{Bytes, Nanos};

/// A place of an expert in the plan.
#[derive(Debug, Clone, Copy)]
pub(super) struct Home {
    pub tier: TierId,
    pub executor: ExecutorId,
    /// Loaded into a slot before use.
    pub cached: bool,
    /// Who can compute it where it is planned, if it is cached.
    pub at_home: Option<ExecutorId>,
    /// Prompts may bring it to the main processor through a staging slot.
    pub streamed: bool,
}

impl Home {
    /// Who computes it from a slot: what is not cached gets into one only to be streamed to the main processor.
    const fn slot_executor(&self) -> ExecutorId {
        if self.cached { self.executor } else { ExecutorId(0) }
    }
}

/// Puts the times of an expert that is not in place into its item.
pub(super) fn fill_in(item: &mut Item, time: &TierTime, tokens: u32) {
    let seconds = |n: Nanos| n.to_seconds().0;
    let (gpu, home, copy, contended) = match &time.streamed {
        Some(s) => (&s.compute, Some(&time.compute), s.copy, s.contended),
        None => (&time.compute, time.at_home.as_ref(), time.copy, time.contended),
    };
    item.gpu_s = seconds(gpu.at(tokens));
    item.cpu_s = home.map_or(f64::INFINITY, |t| seconds(t.at(tokens)));
    (item.move_s, item.contended_s) = (seconds(copy), seconds(contended));
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
    /// A part of a prompt whose experts are streamed.
    streamed: bool,
    /// Misses without a slot yet, in order.
    waiting: VecDeque<u32>,
    /// Experts whose loads it waits for.
    awaited: Vec<u32>,
    /// In place, not yet given to an executor.
    ready: Vec<(u32, Location, ExecutorId)>,
    running: Vec<Wave>,
    next_wave: u32,
}

/// Experts of a streamed prompt that another processor than the main one computes in one wave: what arrives meanwhile is noticed after
/// each of them.
const HOST_WAVE: usize = 8;

/// What a layer works with that is not its own.
pub(super) struct Context<'a> {
    pub now: Nanos,
    pub pool: &'a mut Pool,
    pub staging: &'a mut Staging,
    pub costs: Option<&'a EngineCosts>,
    pub traffic: &'a mut Traffic,
    pub out: &'a mut VecDeque<Action>,
    pub stats: &'a mut Statistics,
}

/// Loads under way by link.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    /// (demanded, prefetched), and when all of them should be done. `[links]`
    pub links: Vec<(u32, u32, Nanos)>,
    /// Index into `links`. `[tiers]`
    pub link_of_tier: Vec<usize>,
}

impl Traffic {
    pub fn of(&mut self, tier: TierId) -> &mut (u32, u32, Nanos) {
        &mut self.links[self.link_of_tier[tier.0 as usize]]
    }
}

#[derive(Debug)]
pub(super) struct LayerEngine {
    pub layer: u32,
    /// Index among the layers with routed experts.
    index: usize,
    pub first_key: u32,
    pub expert_bytes: Bytes,
    pub homes: Vec<Home>,
    /// Steps of more tokens are parts of prompts.
    batch: u32,
    rule: Rule,
    active: Option<Active>,
    last_event: Nanos,
    /// Misses of the last demand that were computed at home.
    missed_at_home: Vec<u32>,
    /// Kept to spare allocations.
    work: LayerWork,
    schedule: Schedule,
    scratch: Scratch,
}

impl LayerEngine {
    /// `costs` are those by which it decides; without them nothing is streamed.
    pub fn new(plan: &CheckedPlan, layer: u32, index: usize, first_key: u32, costs: Option<&EngineCosts>) -> Self {
        let costs = costs.filter(|c| c.streams);
        let homes = (0..plan.num_experts(layer))
            .map(|e| {
                let (tier, executor) = (plan.tier_of(layer, e), plan.executor_of(plan.tier_of(layer, e)));
                let cached = plan.tier(tier).through.is_some();
                let streamed = costs.is_some_and(|c| match cached {
                    true => executor.0 == 0,
                    false => c.layers[index].tiers[tier.0 as usize].streamed.is_some(),
                });
                Home { tier, executor, cached, at_home: plan.home_executor(tier), streamed }
            })
            .collect();
        Self {
            layer,
            index,
            first_key,
            expert_bytes: plan.expert_bytes(layer),
            homes,
            batch: plan.batch().max(1),
            rule: plan.plan().engine.schedule,
            active: None,
            last_event: Nanos(0),
            missed_at_home: Vec::new(),
            work: LayerWork::default(),
            schedule: Schedule::default(),
            scratch: Scratch::default(),
        }
    }

    /// Tokens of a step that is no part of a prompt, at most.
    pub const fn batch(&self) -> u32 {
        self.batch
    }

    pub fn missed_at_home(&self) -> impl Iterator<Item = u32> + '_ {
        self.missed_at_home.iter().copied()
    }

    pub const fn key(&self, expert: u32) -> u32 {
        self.first_key + expert
    }

    /// Accounts for the time since this layer's last event.
    pub fn pass(&mut self, now: Nanos, stats: &mut Statistics) {
        if self.active.as_ref().is_some_and(|a| a.running.is_empty()) {
            stats.stalled.0 += now.0.saturating_sub(self.last_event.0);
        }
        self.last_event = now;
    }

    pub fn routed(&mut self, demand: &Demand, cx: &mut Context<'_>) -> Result<(), String> {
        let layer = self.layer;
        if let Some(active) = &self.active {
            return Err(format!("layer {layer} was asked for step {} while it serves step {}", demand.step, active.step));
        }
        let known = demand.experts.iter().all(|(e, tokens)| (*e as usize) < self.homes.len() && *tokens > 0);
        let scored = demand.scores.iter().all(|(e, _)| (*e as usize) < self.homes.len());
        if !known || !scored || !demand.experts.is_sorted_by(|a, b| a.0 < b.0) || !demand.scores.is_sorted_by(|a, b| a.0 < b.0) {
            let (n, step) = (self.homes.len(), demand.step);
            return Err(format!("the demand of step {step} for layer {layer} is not a set of experts below {n} with tokens"));
        }
        cx.pool.on_demand(self.first_key, demand);
        let streamed = self.streams(demand);
        let asked = |e: u32| demand.experts.binary_search_by_key(&e, |d| d.0).is_ok();
        cx.staging.dismiss(layer, |e| streamed && asked(e));
        let mut active = Active {
            step: demand.step,
            streamed,
            waiting: VecDeque::new(),
            awaited: Vec::new(),
            ready: Vec::new(),
            running: Vec::new(),
            next_wave: 0,
        };
        cx.stats.demands += 1;
        cx.stats.requests += demand.experts.len() as u64;
        self.work.items.clear();
        (self.work.gpu_busy_s, self.work.cpu_first_s, self.work.link_busy_s) = (0.0, 0.0, 0.0);
        for (expert, tokens) in demand.experts.iter().copied() {
            let home = self.homes[expert as usize];
            let key = self.key(expert);
            if !home.cached {
                cx.stats.hits += 1;
                cx.stats.resident_hits += 1;
                match self.presence(expert, cx) {
                    _ if !(streamed && home.streamed) => {
                        active.ready.push((expert, Location::Resident, home.executor));
                        self.already(home, tokens, false, cx);
                    }
                    Presence::Loading => {
                        active.awaited.push(expert);
                        self.already(home, tokens, true, cx);
                    }
                    presence => self.item(expert, tokens, presence != Presence::Absent, cx),
                }
                continue;
            }
            cx.pool.keep(key, true);
            match self.presence(expert, cx) {
                Presence::Ready(_) => {
                    cx.stats.hits += 1;
                    if cx.pool.prefetched(key) == Prefetched::Unused {
                        cx.pool.set_prefetched(key, Prefetched::No);
                        cx.stats.prefetches_used += 1;
                    }
                    self.item(expert, tokens, true, cx);
                }
                Presence::Loading => {
                    cx.stats.misses += 1;
                    if cx.pool.prefetched(key) == (Prefetched::Flying { guess: true }) {
                        cx.stats.prefetches_late += 1;
                    }
                    active.awaited.push(expert);
                    self.already(home, tokens, true, cx);
                }
                Presence::Absent => {
                    cx.stats.misses += 1;
                    self.item(expert, tokens, false, cx);
                }
            }
        }
        self.assign(&mut active, cx);
        self.active = Some(active);
        self.advance(cx);
        Ok(())
    }

    /// Whether a demand is of a part of a prompt whose experts are streamed.
    pub fn streams(&self, demand: &Demand) -> bool {
        demand.tokens > self.batch && self.homes.iter().any(|h| h.streamed)
    }

    /// Where an expert stands: in the cache, or on its way through.
    pub fn presence(&self, expert: u32, cx: &Context<'_>) -> Presence {
        match cx.pool.presence(self.key(expert)) {
            Presence::Absent => cx.staging.presence(self.layer, expert),
            found => found,
        }
    }

    /// Work that nobody chooses: of experts planned where they are computed, and of those already on their way.
    fn already(&mut self, home: Home, tokens: u32, on_its_way: bool, cx: &Context<'_>) {
        let Some(costs) = cx.costs else { return };
        let time = &costs.layers[self.index].tiers[home.tier.0 as usize];
        let on_its_way = time.streamed.as_ref().filter(|_| on_its_way);
        let seconds = on_its_way.map_or(&time.compute, |s| &s.compute).at(tokens).to_seconds().0;
        if home.executor.0 == 0 || on_its_way.is_some() {
            self.work.gpu_busy_s += seconds;
        } else {
            self.work.cpu_first_s += seconds;
        }
    }

    /// Adds an expert that may be computed here or there.
    fn item(&mut self, expert: u32, tokens: u32, ready: bool, cx: &Context<'_>) {
        let mut item = Item { expert, gpu_s: 0.0, cpu_s: f64::INFINITY, move_s: 0.0, contended_s: 0.0, worth: 0.0 };
        if !ready {
            item.move_s = 1.0;
        }
        if let Some(costs) = cx.costs {
            let time = &costs.layers[self.index].tiers[self.homes[expert as usize].tier.0 as usize];
            fill_in(&mut item, time, tokens);
            if ready {
                (item.move_s, item.contended_s) = (0.0, 0.0);
            }
        }
        self.work.items.push(item);
    }

    /// Decides who computes what, and what is moved in which order.
    fn assign(&mut self, active: &mut Active, cx: &mut Context<'_>) {
        let choice = cx.costs.filter(|_| self.work.items.iter().any(|i| i.cpu_s.is_finite()));
        let chosen = choice.is_some();
        if let Some(costs) = choice {
            let first = self.work.items.iter().find(|i| i.cpu_s.is_finite()).map_or(0, |i| i.expert);
            let home = self.homes[first as usize];
            let executor = home.at_home.unwrap_or(home.executor);
            self.work.cpu_first_s += costs.sync[executor.0 as usize].to_seconds().0;
            self.work.link_busy_s = cx.traffic.of(home.tier).2.0.saturating_sub(cx.now.0) as f64 * 1e-9;
            // What a prompt leaves at home is the optimum's choice, whatever the plan says of decoding.
            let rule = if active.streamed { Rule::Exact } else { self.rule };
            rule.decide(&self.work, &mut self.scratch, &mut self.schedule);
        }
        let place = |i: usize, item: &Item| match chosen {
            true => self.schedule.places[i],
            false if item.is_cached() => Place::Cached,
            false => Place::Moved,
        };
        self.missed_at_home.clear();
        for (i, item) in self.work.items.iter().enumerate() {
            let home = self.homes[item.expert as usize];
            match (place(i, item), self.presence(item.expert, cx)) {
                (Place::Home, _) => {
                    let executor = home.at_home.unwrap_or(home.executor);
                    cx.stats.computed_at_home += u64::from(home.cached);
                    if item.move_s > 0.0 && home.cached {
                        self.missed_at_home.push(item.expert);
                    }
                    active.ready.push((item.expert, Location::Resident, executor));
                }
                (_, Presence::Ready(slot)) => active.ready.push((item.expert, Location::Slot(slot), home.slot_executor())),
                _ if !chosen => active.waiting.push_back(item.expert),
                _ => {}
            }
        }
        if chosen {
            active.waiting.extend(self.schedule.moves.iter().map(|i| self.work.items[*i].expert));
        }
    }

    pub fn loaded(&mut self, expert: u32, slot: SlotId, cx: &mut Context<'_>) -> Result<(), String> {
        let key = self.key(expert);
        let guest = cx.staging.owns(slot);
        let arrival = match guest {
            _ if expert as usize >= self.homes.len() => None,
            true => cx.staging.loaded(self.layer, expert, slot),
            false => cx.pool.loaded(key, slot).then_some(Arrival { ahead: false, unwanted: false, failures: 0 }),
        };
        let Some(arrival) = arrival else { return Err(self.not_loading(expert, slot)) };
        let home = self.homes[expert as usize];
        let was = cx.pool.prefetched(key);
        let flying = !guest && matches!(was, Prefetched::Flying { .. });
        self.arrived(home.tier, flying || arrival.ahead, cx);
        if arrival.unwanted {
            cx.stats.streamed_useless += 1;
            return Ok(());
        }
        let awaited = self.active.as_mut().and_then(|a| Some((a.awaited.iter().position(|e| *e == expert)?, a)));
        if flying {
            let unused = awaited.is_none() && was == (Prefetched::Flying { guess: true });
            cx.pool.set_prefetched(key, if unused { Prefetched::Unused } else { Prefetched::No });
        }
        if let Some((at, active)) = awaited {
            active.awaited.swap_remove(at);
            active.ready.push((expert, Location::Slot(slot), home.slot_executor()));
            self.advance(cx);
        }
        Ok(())
    }

    fn not_loading(&self, expert: u32, slot: SlotId) -> String {
        format!("expert {expert} of layer {} is not being loaded into slot {} of pool {}", self.layer, slot.index, slot.pool)
    }

    fn arrived(&self, tier: TierId, prefetch: bool, cx: &mut Context<'_>) {
        let (demanded, prefetched, _) = cx.traffic.of(tier);
        let count = if prefetch { prefetched } else { demanded };
        *count = count.saturating_sub(1);
    }

    pub fn computed(&mut self, wave: u32, cx: &mut Context<'_>) -> Result<(), String> {
        let not_asked = || format!("wave {wave} of layer {} is not being computed", self.layer);
        let Some(active) = &mut self.active else { return Err(not_asked()) };
        let Some(at) = active.running.iter().position(|w| w.number == wave) else { return Err(not_asked()) };
        for e in active.running.swap_remove(at).experts {
            cx.pool.keep(self.first_key + e, false);
            cx.staging.leave(self.layer, e);
        }
        self.advance(cx);
        Ok(())
    }

    pub fn failed(&mut self, expert: u32, slot: SlotId, reason: &str, cx: &mut Context<'_>) -> Result<(), String> {
        let key = self.key(expert);
        if expert as usize >= self.homes.len() {
            return Err(self.not_loading(expert, slot));
        }
        let was = cx.pool.prefetched(key);
        let guest = cx.staging.owns(slot);
        let flying = !guest && matches!(was, Prefetched::Flying { .. });
        let tier = self.homes[expert as usize].tier;
        let arrival = match guest {
            true => cx.staging.failed(self.layer, expert, slot),
            false => cx.pool.failed(key, slot).map(|failures| Arrival { ahead: false, unwanted: false, failures }),
        };
        let Some(Arrival { ahead, unwanted, failures }) = arrival else { return Err(self.not_loading(expert, slot)) };
        let awaited = self.active.as_ref().is_some_and(|a| a.awaited.contains(&expert));
        if unwanted || (ahead && !awaited && failures > MAX_RETRIES) {
            // Nobody asked for it, or nobody does any more.
            cx.staging.abandon(slot);
            cx.stats.streamed_useless += 1;
            self.arrived(tier, true, cx);
            return Ok(());
        }
        match failures {
            failures if failures > MAX_RETRIES => {
                if flying && !awaited {
                    // Nobody asked for it: it is given up, and read again if it is demanded.
                    cx.pool.cache.abandon(slot.index);
                    cx.pool.set_prefetched(key, Prefetched::No);
                    cx.stats.prefetches_useless += u64::from(was == Prefetched::Flying { guess: true });
                    self.arrived(tier, true, cx);
                    return Ok(());
                }
                Err(format!("expert {expert} of layer {} could not be loaded in {failures} tries: {reason}", self.layer))
            }
            _ => {
                cx.stats.retries += 1;
                self.arrived(tier, flying || ahead, cx);
                self.load(expert, slot, if flying || ahead { Purpose::Prefetch } else { Purpose::Demand }, cx);
                Ok(())
            }
        }
    }

    /// Asks the driver for a load.
    pub fn load(&self, expert: u32, slot: SlotId, purpose: Purpose, cx: &mut Context<'_>) {
        let from = self.homes[expert as usize].tier;
        cx.stats.loads += 1;
        cx.stats.bytes_loaded_by_tier[from.0 as usize] += self.expert_bytes;
        let copy = cx.costs.map_or(Nanos(0), |c| c.layers[self.index].tiers[from.0 as usize].copy());
        let now = cx.now;
        let (demanded, prefetched, free_at) = cx.traffic.of(from);
        *(if purpose == Purpose::Demand { demanded } else { prefetched }) += 1;
        *free_at = (*free_at).max(now) + copy;
        let key = ExpertKey { layer: self.layer, expert };
        cx.out.push_back(Action::Load { key, slot, bytes: self.expert_bytes, from, purpose });
    }

    /// Loads `expert` into a slot of its own accord, as a guess or for another reason; false if there is no slot for it now.
    pub fn prefetch(&self, expert: u32, guess: bool, cx: &mut Context<'_>) -> bool {
        let key = self.key(expert);
        let Some((slot, evicted)) = cx.pool.place(key, cx.stats) else { return false };
        if let Some(victim) = evicted {
            cx.out.push_back(Action::Evict { key: victim, slot });
        }
        cx.pool.set_prefetched(key, Prefetched::Flying { guess });
        cx.stats.prefetches_issued += u64::from(guess);
        self.load(expert, slot, Purpose::Prefetch, cx);
        true
    }

    /// Sends for an expert of the next demand of a prompt, unless it is here; false if there is no slot for it now.
    pub fn stream_ahead(&self, expert: u32, cx: &mut Context<'_>) -> bool {
        if self.presence(expert, cx) != Presence::Absent {
            return true;
        }
        let Some(slot) = cx.staging.admit(self.layer, expert, true, true) else { return false };
        cx.stats.streamed_ahead += 1;
        self.load(expert, slot, Purpose::Prefetch, cx);
        true
    }

    /// Whether it serves a demand.
    pub const fn is_busy(&self) -> bool {
        self.active.is_some()
    }

    /// Whether it waits for a slot: then whatever happened to its pool may concern it.
    pub fn waits_for_slot(&self) -> bool {
        self.active.as_ref().is_some_and(|a| !a.waiting.is_empty())
    }

    /// Gives idle executors what is ready, waiting misses the slots that may go, and finishes when nothing is left.
    pub fn advance(&mut self, cx: &mut Context<'_>) {
        let Some(mut active) = self.active.take() else { return };
        // One wave per idle executor: all that is ready for it.
        while let Some(executor) = active.ready.iter().map(|r| r.2).find(|x| active.running.iter().all(|w| w.executor != *x)) {
            let most = if active.streamed && executor.0 != 0 { HOST_WAVE } else { usize::MAX };
            let mut experts: Vec<(u32, Location)> = Vec::new();
            active.ready.retain(|r| {
                let taken = r.2 == executor && experts.len() < most;
                if taken {
                    experts.push((r.0, r.1));
                }
                !taken
            });
            experts.sort_unstable_by_key(|(e, _)| *e);
            let number = active.next_wave;
            active.next_wave += 1;
            active.running.push(Wave { number, executor, experts: experts.iter().map(|(e, _)| *e).collect() });
            cx.stats.waves += 1;
            cx.out.push_back(Action::Compute { layer: self.layer, wave: number, experts, executor });
        }
        let mut loads = Vec::new();
        while let Some(expert) = active.waiting.front().copied() {
            let (key, home) = (self.first_key + expert, self.homes[expert as usize]);
            let streamed = active.streamed && home.streamed;
            let placed = match Some(key).filter(|_| home.cached).and_then(|key| cx.pool.admits(key)) {
                // There is a slot for it, and it is to stay.
                Some(true) => cx.pool.place(key, cx.stats),
                // It passes through if it can, else it takes a slot like any other.
                admitted => match cx.staging.admit(self.layer, expert, streamed, false) {
                    Some(slot) => {
                        *(if streamed { &mut cx.stats.streamed } else { &mut cx.stats.bypasses }) += 1;
                        Some((slot, None))
                    }
                    None if admitted.is_some() => cx.pool.place(key, cx.stats),
                    None => None,
                },
            };
            let Some(placed) = placed else { break };
            active.waiting.pop_front();
            active.awaited.push(expert);
            loads.push((expert, placed));
        }
        for (expert, (slot, evicted)) in loads {
            if let Some(victim) = evicted {
                cx.out.push_back(Action::Evict { key: victim, slot });
            }
            self.load(expert, slot, Purpose::Demand, cx);
        }
        let waits = !active.waiting.is_empty() || !active.awaited.is_empty();
        if waits || !active.ready.is_empty() || !active.running.is_empty() {
            self.active = Some(active);
        } else {
            cx.out.push_back(Action::Finish { step: active.step, layer: self.layer });
        }
    }
}
