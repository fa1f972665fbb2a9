//! A pool of slots with what the engine must know of its contents beside the cache itself: who is still needed, what was prefetched.
//!
//! A pool serves one layer or all; within it an expert is a key: the layer's first key plus the expert's number.

use super::cache::{self, CachePolicy, Seen};
use super::expert_cache::{ExpertCache, SlotState};
use super::{Demand, ExpertKey, SlotId, Statistics};
use crate::check::CheckedPlan;
use tierwise_cost::units::Bytes;

/// What became of a prefetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prefetched {
    /// There was none, or it has served.
    No,
    /// On its way without anyone having asked; `guess` when it is a guess, and no preload or fill.
    Flying { guess: bool },
    /// A guess that is there, and nobody asked for it yet.
    Unused,
}

/// Where an expert stands in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    Absent,
    Loading,
    Ready(SlotId),
}

#[derive(Debug)]
pub(super) struct Pool {
    number: u32,
    pub cache: ExpertCache,
    /// Bytes of a slot.
    pub slot_bytes: Bytes,
    /// How many slots it is to have; it has others while they come or go.
    target: u32,
    /// Experts that are loaded before use: more slots are of no use.
    loadable: u32,
    /// Demanded and not computed yet: may not be evicted. `[keys]`
    kept: Vec<bool>,
    prefetched: Vec<Prefetched>,
    /// First key and number of each layer served.
    layers: Vec<(u32, u32)>,
    /// Demands in keys; kept to spare allocations.
    shifted: [Vec<(u32, u32)>; 2],
}

impl Pool {
    /// The plan's pools, empty, and the first key of each layer with routed experts. `given` policies, one per pool, take the place of
    /// the plan's.
    pub fn all(plan: &CheckedPlan, given: Option<Vec<Box<dyn CachePolicy>>>) -> (Vec<Self>, Vec<u32>) {
        let mut first_keys = Vec::with_capacity(plan.moe_layers().len());
        let mut sizes: Vec<(u32, Vec<(u32, u32)>)> = plan.cache_pools().iter().map(|_| (0, Vec::new())).collect();
        let mut policies = vec![Default::default(); sizes.len()];
        let mut loadable = vec![0; sizes.len()];
        for l in &plan.plan().layers {
            let pool = plan.pool_of(l.layer) as usize;
            let (keys, layers) = &mut sizes[pool];
            layers.push((*keys, l.layer));
            first_keys.push(*keys);
            *keys += plan.num_experts(l.layer);
            let loaded = |e: &u32| plan.tier(plan.tier_of(l.layer, *e)).through.is_some();
            loadable[pool] += (0..plan.num_experts(l.layer)).filter(loaded).count() as u32;
            if l.slots > 0 {
                policies[pool] = l.policy;
            }
        }
        let planned = sizes.iter().zip(policies).map(|((keys, layers), policy)| {
            let layers = layers.len().max(1) as u32;
            cache::build_pool(policy, layers, keys / layers)
        });
        let policies = given.unwrap_or_else(|| planned.collect());
        assert_eq!(policies.len(), sizes.len(), "one policy for each pool of the plan");
        let pools = sizes.into_iter().zip(plan.cache_pools()).zip(policies).enumerate();
        let pools = pools.map(|(i, (((keys, layers), pool), policy))| Self {
            number: i as u32,
            cache: ExpertCache::new(pool.slots, keys, policy),
            slot_bytes: pool.slot_bytes,
            target: pool.slots,
            loadable: loadable[i],
            kept: vec![false; keys as usize],
            prefetched: vec![Prefetched::No; keys as usize],
            layers,
            shifted: Default::default(),
        });
        (pools.collect(), first_keys)
    }

    /// Tells the policy of a demand.
    pub fn on_demand(&mut self, first_key: u32, demand: &Demand) {
        if first_key == 0 {
            self.cache.on_demand(&Seen { experts: &demand.experts, tokens: demand.tokens, scores: &demand.scores });
            return;
        }
        for (to, from) in self.shifted.iter_mut().zip([&demand.experts, &demand.scores]) {
            to.clear();
            to.extend(from.iter().map(|(e, n)| (e + first_key, *n)));
        }
        let [experts, scores] = &self.shifted;
        self.cache.on_demand(&Seen { experts, tokens: demand.tokens, scores });
    }

    pub fn presence(&self, key: u32) -> Presence {
        match self.cache.ready_slot(key) {
            Some(index) => Presence::Ready(SlotId { pool: self.number, index }),
            None if self.cache.slot_state(key) != SlotState::Empty => Presence::Loading,
            None => Presence::Absent,
        }
    }

    pub fn keep(&mut self, key: u32, kept: bool) {
        self.kept[key as usize] = kept;
    }

    pub fn prefetched(&self, key: u32) -> Prefetched {
        self.prefetched[key as usize]
    }

    pub fn set_prefetched(&mut self, key: u32, state: Prefetched) {
        self.prefetched[key as usize] = state;
    }

    /// Gives `key` a slot for which nobody that is kept has to go; who had to go. `None` if there is no such slot now.
    pub fn place(&mut self, key: u32, stats: &mut Statistics) -> Option<(SlotId, Option<ExpertKey>)> {
        let kept = &self.kept;
        let placed = self.cache.place(key, |k| kept[k as usize])?;
        let evicted = placed.evicted.map(|k| self.evicted(k, stats));
        Some((SlotId { pool: self.number, index: placed.slot }, evicted))
    }

    fn evicted(&mut self, key: u32, stats: &mut Statistics) -> ExpertKey {
        stats.evictions += 1;
        if std::mem::replace(&mut self.prefetched[key as usize], Prefetched::No) == Prefetched::Unused {
            stats.prefetches_useless += 1;
        }
        self.name(key)
    }

    /// It is to have so many slots; `Err` says how many it can have.
    pub fn aim_at(&mut self, slots: u32) -> Result<(), std::ops::RangeInclusive<u32>> {
        let possible = self.loadable.min(1)..=self.loadable;
        if !possible.contains(&slots) {
            return Err(possible);
        }
        if slots != self.target {
            self.target = slots;
            self.cache.expect(slots);
        }
        Ok(())
    }

    /// How many slots it is to have.
    pub const fn target(&self) -> u32 {
        self.target
    }

    /// An empty slot more.
    pub fn add(&mut self) -> SlotId {
        SlotId { pool: self.number, index: self.cache.add() }
    }

    /// A slot less, and who had to leave it; `None` if none may go now.
    pub fn give_up(&mut self, stats: &mut Statistics) -> Option<(SlotId, Option<ExpertKey>)> {
        let kept = &self.kept;
        let gone = self.cache.give_up(|k| kept[k as usize])?;
        let evicted = gone.evicted.map(|k| self.evicted(k, stats));
        Some((SlotId { pool: self.number, index: gone.slot }, evicted))
    }

    /// Is `key` to take a slot for good, as the policy sees it? `None` if there is no slot for it now.
    pub fn admits(&self, key: u32) -> Option<bool> {
        let victim = self.would_evict()?;
        Some(victim.is_none_or(|v| self.cache.admits(key, v)))
    }

    /// Who would have to go for a newcomer: `Some(None)` if there is an empty slot, `None` if nobody may.
    pub fn would_evict(&self) -> Option<Option<u32>> {
        let kept = &self.kept;
        self.cache.would_evict(|k| kept[k as usize])
    }

    /// The load of `key` into `slot` is done; false if none was under way.
    pub fn loaded(&mut self, key: u32, slot: SlotId) -> bool {
        slot.pool == self.number && self.cache.loaded(key, slot.index)
    }

    /// The load failed: how often now; `None` if none was under way.
    pub fn failed(&mut self, key: u32, slot: SlotId) -> Option<u32> {
        if slot.pool == self.number { self.cache.failed(key, slot.index) } else { None }
    }

    pub fn ready(&self, first_key: u32, num_experts: u32) -> impl Iterator<Item = (SlotId, u32)> + '_ {
        let of_layer = move |(index, key): (u32, u32)| {
            let expert = key.checked_sub(first_key).filter(|e| *e < num_experts)?;
            Some((SlotId { pool: self.number, index }, expert))
        };
        self.cache.ready().filter_map(of_layer)
    }

    fn name(&self, key: u32) -> ExpertKey {
        let at = self.layers.partition_point(|(first, _)| *first <= key) - 1;
        let (first, layer) = self.layers[at];
        ExpertKey { layer, expert: key - first }
    }
}
