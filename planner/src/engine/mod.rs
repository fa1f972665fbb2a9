//! The run-time brain: `handle(now, Input)` takes what happened, `poll(now)` gives what to do next.
//!
//! Sans-IO: it never waits, reads no clock, touches no memory of the model. Two drivers exist: the simulator ([`crate::sim`]) and the
//! runtime. The contract, in four sentences:
//!
//! 1. A demand is the *set* of experts that one layer needs in one step; hits are judged at its start, and nothing demanded is
//!    evicted before it was computed.
//! 2. Hits are computed at once as the first wave (one wave per executor); misses are evicted-for, loaded and computed in further
//!    waves, each expert exactly once, and `Finish` follows the last `Computed`.
//! 3. Decisions follow from the sequence of inputs alone, never from when `poll` is called: replaying a recorded run's inputs gives
//!    its recorded actions.
//! 4. A failed load is tried again twice, then - as after any input that cannot be - the engine answers `Abort` and nothing more.

mod ahead;
pub mod cache;
pub mod costs;
mod expert_cache;
mod layer;
mod makespans;
mod messages;
mod pool;
pub mod prefetch;
mod prefetcher;
mod resize;
pub mod schedule;
mod staging;
mod statistics;
mod streamer;

pub use messages::{Action, Demand, ExecutorId, ExpertKey, Input, Location, Purpose, SCORE_ONE, SlotId, TierId};
pub use statistics::Statistics;

use crate::check::CheckedPlan;
use ahead::FILL_STEPS;
use costs::EngineCosts;
use layer::{Context, LayerEngine, Traffic};
use pool::Pool;
use prefetcher::Prefetcher;
use staging::Staging;
use std::collections::VecDeque;
use std::sync::Arc;
use streamer::Streamer;
use tierwise_cost::units::{Bytes, Nanos};

/// Loads of an expert are tried again this often.
pub const MAX_RETRIES: u32 = 2;

/// All layers and the pools that their experts are in, to be read.
#[derive(Debug, Clone, Copy)]
struct Places<'a> {
    layers: &'a [LayerEngine],
    pools: &'a [Pool],
    /// Index into `pools`. `[layers]`
    pool_of: &'a [usize],
}

impl<'a> Places<'a> {
    fn at(self, index: usize) -> (&'a LayerEngine, &'a Pool) {
        (&self.layers[index], &self.pools[self.pool_of[index]])
    }
}

/// The engine.
#[derive(Debug)]
pub struct Engine {
    layers: Vec<LayerEngine>,
    /// Index into `layers`, by model layer.
    index_of: Vec<Option<usize>>,
    pools: Vec<Pool>,
    /// Index into `pools`. `[layers]`
    pool_of: Vec<usize>,
    staging: Staging,
    costs: Option<Arc<EngineCosts>>,
    traffic: Traffic,
    prefetcher: Option<Prefetcher>,
    streamer: Option<Streamer>,
    rule: schedule::Rule,
    /// Misses computed at home that may yet be loaded: (layer's index, expert), latest last.
    fills: VecDeque<(usize, u32)>,
    fill: bool,
    /// Share of the latest steps that demanded each expert, for fills. `[layers][experts]`
    rates: Vec<Vec<f32>>,
    preload: Vec<(usize, u32)>,
    /// Layers with a demand under way, ascending.
    busy: Vec<usize>,
    /// Slots that come or go at once: those of one layer's demand by one token.
    stage: u32,
    /// Whether a pool has not yet as many slots as it is to have.
    resizing: bool,
    actions: VecDeque<Action>,
    statistics: Statistics,
    aborted: bool,
}

impl Engine {
    /// An engine for a checked plan, with empty slots, that knows nothing of times: every miss is loaded, nothing is prefetched.
    pub fn new(plan: &CheckedPlan) -> Self {
        Self::build(plan, None, None)
    }

    /// An engine that schedules and prefetches as the plan says, by these times, which must be the plan's.
    pub fn with_costs(plan: &CheckedPlan, costs: Arc<EngineCosts>) -> Self {
        Self::build(plan, Some(costs), None)
    }

    /// An engine with these policies in place of the plan's: those that know more than a plan says (popularity, the future). One for each
    /// of [`CheckedPlan::cache_pools`]; the keys of a pool are those of [`cache::build_pool`].
    ///
    /// # Panics
    /// If there are not as many policies as pools.
    pub fn with_policies(
        plan: &CheckedPlan,
        costs: Option<Arc<EngineCosts>>,
        policies: Vec<Box<dyn cache::CachePolicy>>,
    ) -> Self {
        Self::build(plan, costs, Some(policies))
    }

    fn build(plan: &CheckedPlan, costs: Option<Arc<EngineCosts>>, policies: Option<Vec<Box<dyn cache::CachePolicy>>>) -> Self {
        let (pools, first_keys) = Pool::all(plan, policies);
        let staging = Staging::new(pools.len() as u32, plan.staging_slots(), plan.plan().engine.staging_slots);
        let mut index_of = Vec::new();
        let mut layers = Vec::with_capacity(plan.moe_layers().len());
        for (i, (layer, first_key)) in plan.moe_layers().iter().zip(first_keys).enumerate() {
            index_of.resize(*layer as usize, None);
            index_of.push(Some(i));
            layers.push(LayerEngine::new(plan, *layer, i, first_key, costs.as_deref()));
        }
        let tiers = plan.plan().tiers.len();
        let link_of_tier: Vec<usize> = match &costs {
            Some(c) => c.link_of_tier.iter().map(|l| l.map_or(c.links.len(), |l| l as usize)).collect(),
            None => (0..tiers).collect(),
        };
        let links = vec![(0, 0, Nanos(0)); link_of_tier.iter().max().map_or(0, |l| l + 1)];
        let preload = plan.plan().layers.iter().enumerate().flat_map(|(i, l)| l.preload.iter().map(move |e| (i, *e))).collect();
        let rated = |l: &LayerEngine| if plan.plan().engine.fill { l.homes.len() } else { 0 };
        let rates = layers.iter().map(|l| vec![0.0; rated(l)]).collect();
        Self {
            layers,
            index_of,
            pools,
            staging,
            pool_of: plan.moe_layers().iter().map(|l| plan.pool_of(*l) as usize).collect(),
            prefetcher: costs.as_ref().and_then(|_| Prefetcher::new(plan)),
            streamer: costs.as_ref().and_then(|c| Streamer::new(plan, c)),
            rule: plan.plan().engine.schedule,
            fills: VecDeque::new(),
            fill: plan.plan().engine.fill,
            rates,
            costs,
            traffic: Traffic { links, link_of_tier },
            preload,
            busy: Vec::new(),
            stage: plan.moe_layers().iter().map(|l| plan.experts_per_token(*l)).max().unwrap_or(1).max(1),
            resizing: false,
            actions: VecDeque::new(),
            statistics: Statistics { bytes_loaded_by_tier: vec![Bytes::ZERO; tiers], ..Statistics::default() },
            aborted: false,
        }
    }

    /// Takes what happened at `now`.
    pub fn handle(&mut self, now: Nanos, input: Input) {
        if self.aborted {
            return;
        }
        if let Err(reason) = self.try_handle(now, input) {
            self.aborted = true;
            self.actions.clear();
            self.actions.push_back(Action::Abort { reason });
        }
    }

    fn try_handle(&mut self, now: Nanos, input: Input) -> Result<(), String> {
        let layer = match &input {
            Input::Begin => {
                self.begin(now);
                return Ok(());
            }
            Input::Resize { slots } => {
                self.resize(slots)?;
                self.restage();
                self.resume(now);
                return Ok(());
            }
            Input::Routed(d) => d.layer,
            Input::Foreseen { layer, .. } | Input::Computed { layer, .. } => *layer,
            Input::Loaded { key, .. } | Input::Failed { key, .. } => key.layer,
        };
        let Some(index) = self.index_of.get(layer as usize).copied().flatten() else {
            return Err(format!("layer {layer} has no routed experts"));
        };
        let Self { layers, pools, pool_of, staging, costs, traffic, prefetcher, streamer, actions, statistics, .. } = self;
        if let (Some(s), Input::Routed(_)) = (&mut *streamer, &input) {
            s.before(index, layers, staging);
        }
        let one = &mut layers[index];
        one.pass(now, statistics);
        let pool = &mut pools[pool_of[index]];
        let mut cx = Context { now, pool, staging, costs: costs.as_deref(), traffic, out: actions, stats: statistics };
        match input {
            Input::Begin | Input::Resize { .. } => {}
            Input::Routed(demand) => {
                if let Some(p) = prefetcher {
                    p.routed(now, demand.step, index, &demand.experts);
                }
                one.routed(&demand, &mut cx)?;
                if self.fill {
                    let rates = &mut self.rates[index];
                    rates.iter_mut().for_each(|r| *r -= *r / FILL_STEPS);
                    demand.experts.iter().for_each(|(e, _)| rates[*e as usize] += 1.0 / FILL_STEPS);
                    // A layer's own later misses are better guesses than its earlier ones.
                    self.fills.retain(|(i, _)| *i != index);
                    self.fills.extend(one.missed_at_home().map(|e| (index, e)));
                }
                let places = Places { layers, pools, pool_of };
                if let (Some(s), Some(costs)) = (streamer, &costs) {
                    s.after(index, &demand, places, costs);
                }
                if let (Some(p), Some(costs)) = (prefetcher, costs) {
                    p.guess(index, places, costs, self.rule);
                }
            }
            Input::Foreseen { distance, scores, .. } => {
                if !scores.iter().all(|(e, _)| (*e as usize) < one.homes.len()) {
                    return Err(format!("a guess at layer {layer} names experts that it lacks"));
                }
                let places = Places { layers, pools, pool_of };
                if let (Some(s), Some(costs)) = (streamer, &costs) {
                    s.foreseen(index, &scores, places, costs);
                }
                // It was sent after the demand that it is based on, whose guesses it replaces.
                if let (Some(p), Some(costs)) = (prefetcher, costs)
                    && p.foreseen(index, distance as usize, &scores)
                {
                    p.guess_at(index - distance as usize, distance as usize, places, costs, self.rule);
                }
            }
            Input::Loaded { key, slot } => one.loaded(key.expert, slot, &mut cx)?,
            Input::Computed { wave, .. } => one.computed(wave, &mut cx)?,
            Input::Failed { key, slot, reason } => one.failed(key.expert, slot, &reason, &mut cx)?,
        }
        let place = self.busy.binary_search(&index);
        let was_busy = place.is_ok();
        match (self.layers[index].is_busy(), place) {
            (true, Err(at)) => self.busy.insert(at, index),
            (false, Ok(at)) => {
                self.busy.remove(at);
            }
            _ => {}
        }
        // A demand was served, or nobody waits.
        if self.resizing && (self.busy.is_empty() || was_busy && !self.layers[index].is_busy()) {
            self.restage();
        }
        self.resume(now);
        self.stream_ahead(now);
        self.prefetch(now);
        self.fill(now);
        Ok(())
    }

    /// Lets layers go on that wait for a slot: one that was filled unasked may have become free.
    fn resume(&mut self, now: Nanos) {
        let Self { layers, pools, pool_of, staging, costs, traffic, actions, statistics, busy, .. } = self;
        // A layer that waits has something to compute before it is done, so it stays busy.
        for index in busy.iter().filter(|i| layers[**i].waits_for_slot()).copied().collect::<Vec<_>>() {
            let pool = &mut pools[pool_of[index]];
            layers[index].advance(&mut Context {
                now,
                pool,
                staging,
                costs: costs.as_deref(),
                traffic,
                out: actions,
                stats: statistics,
            });
        }
    }

    /// The next thing to do; `None` until something happens.
    pub fn poll(&mut self, _now: Nanos) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Counts since the start.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Slots of a layer with the experts that are ready in them.
    pub fn resident_slots(&self, layer: u32) -> impl Iterator<Item = (SlotId, u32)> + '_ {
        let index = self.index_of.get(layer as usize).copied().flatten();
        index.into_iter().flat_map(|i| {
            let l = &self.layers[i];
            self.pools[self.pool_of[i]].ready(l.first_key, l.homes.len() as u32)
        })
    }
}
