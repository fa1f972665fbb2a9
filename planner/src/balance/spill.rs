//! L3: copies of experts for what L2 could not level, if they pay.
//!
//! The slowest device gives tokens of its hottest expert to the least loaded device that does not hold it, up to the mean; a copy counts
//! as fewer tokens than `min(m, mean / 2)` never does. Copies that a device still has from earlier steps are holders like any other, and
//! free; each new one is priced on the busiest sender and receiver, sources being whoever holds the expert and has sent the least, or the
//! target's host memory where that is sooner. Of all
//! prefixes of the list the one with the least total is taken, the empty one included: so it is never slower than L2 alone. LLEP
//! (arXiv 2601.17111) sends all anew in every layer and step and asks for no gain.

use super::cost::{LayerCost, LayerSeconds};
use super::holders::Holders;
use super::split::{Splitter, Unit};
use std::collections::VecDeque;

/// What a spill may do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SpillSettings {
    /// Fewer tokens are not worth a multiplication of their own.
    pub min_tokens: u64,
    /// Copies that a device keeps over all layers.
    pub slots_per_device: usize,
    /// Tokens of a layer that a device may compute: its memory for activations. Helpers are never filled above it.
    pub max_rows: u64,
    /// Bytes per second to each device from its host's memory, where every expert lies too; 0: none lies there.
    pub host_bytes_per_s: f64,
}

/// Copies that devices still have, the least recently used first.
#[derive(Debug, Clone, Default)]
pub struct SpillCache {
    capacity: usize,
    /// (layer, expert). `[devices]`
    held: Vec<VecDeque<(u32, u16)>>,
}

impl SpillCache {
    /// Nothing copied yet.
    pub fn new(num_devices: usize, capacity: usize) -> Self {
        Self { capacity, held: vec![VecDeque::new(); num_devices] }
    }

    /// The copies on a device, the least recently used first.
    pub fn of(&self, device: usize) -> impl Iterator<Item = (u32, u16)> + '_ {
        self.held[device].iter().copied()
    }

    fn touch(&mut self, device: usize, layer: u32, expert: u16) {
        let held = &mut self.held[device];
        if held.back() == Some(&(layer, expert)) {
            return;
        }
        if let Some(at) = held.iter().position(|h| *h == (layer, expert)) {
            held.remove(at);
        } else if held.len() == self.capacity {
            held.pop_front();
        }
        held.push_back((layer, expert));
    }
}

/// The source of a copy that comes from the target's host memory.
pub const HOST: u16 = u16::MAX;

/// A copy of an expert's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy {
    /// The expert.
    pub expert: u16,
    /// From; [`HOST`] for the host's memory.
    pub source: u16,
    /// To.
    pub target: u16,
}

/// What was decided for one layer of one batch.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SpillPlan {
    /// Who can compute what: the placement, copies of earlier steps, and new ones.
    pub holders: Holders,
    /// Tokens of each place of `holders`.
    pub share: Vec<u64>,
    /// New copies.
    pub copies: Vec<Copy>,
    /// Where the time goes.
    pub seconds: LayerSeconds,
    /// With L2 alone, copies of earlier steps included.
    pub without: LayerSeconds,
}

/// Largest / mean that is not worth another look: L2 alone mostly ends below it.
const NEARLY_LEVEL: f64 = 1.02;

/// Room that is kept between calls.
#[derive(Debug, Default)]
pub struct Spiller {
    splitter: Splitter,
    load: Vec<u64>,
    busy_s: Vec<f64>,
    sent: Vec<u64>,
    received: Vec<u64>,
    hosted: Vec<u64>,
    moving: Vec<u64>,
}

impl Spiller {
    /// Divides the tokens of one layer of a batch, and decides about copies. `tokens`: `[experts]`, `speed`: relative, `[devices]`.
    #[allow(clippy::too_many_arguments, reason = "what is balanced, on what, at which price, with which memory")]
    pub fn plan(
        &mut self,
        base: &Holders,
        tokens: &[u64],
        speed: &[f64],
        cost: &LayerCost,
        settings: &SpillSettings,
        cache: &mut SpillCache,
        layer: u32,
    ) -> SpillPlan {
        let mut plan = SpillPlan { holders: base.clone(), ..SpillPlan::default() };
        plan.seconds = self.divide(base, tokens, speed, cost, 1.0, &mut plan.share);
        plan.without = plan.seconds;
        self.load.fill(0);
        base.device.iter().zip(&plan.share).for_each(|(g, s)| self.load[usize::from(*g)] += s);
        let (total, most) = (self.load.iter().sum::<u64>(), self.load.iter().copied().max().unwrap_or(0));
        if most as f64 * base.num_devices as f64 <= total as f64 * NEARLY_LEVEL {
            return plan;
        }
        if let Some(holders) = Self::with_copies(base, cache, layer) {
            let mut share = Vec::new();
            let seconds = self.divide(&holders, tokens, speed, cost, cost.reroute_factor, &mut share);
            if seconds.total() < plan.seconds.total() {
                plan = SpillPlan { holders, share, copies: Vec::new(), seconds, without: plan.without };
            }
        }
        let wanted = self.candidates(&plan, tokens, cost, settings, cache.capacity);
        if !wanted.is_empty() {
            let more: Vec<(u16, u16)> = wanted.iter().map(|c| (c.expert, c.target)).collect();
            let holders = plan.holders.with(&more);
            let mut share = Vec::new();
            let mut seconds = self.divide(&holders, tokens, speed, cost, cost.reroute_factor, &mut share);
            // A copy that nobody uses is not made.
            let used = |c: &Copy| holders.places(usize::from(c.expert)).any(|p| holders.device[p] == c.target && share[p] > 0);
            let copies: Vec<Copy> = wanted.into_iter().filter(used).collect();
            self.count_wires(&copies, base.num_devices);
            seconds.transfer_s = self.transfer_s(cost, settings);
            if seconds.total() < plan.seconds.total() {
                plan = SpillPlan { holders, share, copies, seconds, without: plan.without };
            }
        }
        if plan.holders.device.len() > base.device.len() {
            for e in 0..plan.holders.num_experts() {
                // Copies come after an expert's own holders.
                for p in plan.holders.places(e).skip(base.places(e).len()).filter(|p| plan.share[*p] > 0) {
                    cache.touch(usize::from(plan.holders.device[p]), layer, e as u16);
                }
            }
        }
        plan
    }

    /// The placement with the copies of earlier steps, if there are any of this layer.
    fn with_copies(base: &Holders, cache: &SpillCache, layer: u32) -> Option<Holders> {
        let on = |g: usize| cache.held[g].iter().filter(|(l, _)| *l == layer).map(move |(_, e)| (*e, g as u16));
        let more: Vec<(u16, u16)> =
            (0..cache.held.len()).flat_map(on).filter(|(e, g)| !base.of(usize::from(*e)).contains(g)).collect();
        (!more.is_empty()).then(|| base.with(&more))
    }

    /// Divides by tokens or by distinct experts, whichever the cost model finds faster.
    fn divide(
        &mut self,
        holders: &Holders,
        tokens: &[u64],
        speed: &[f64],
        cost: &LayerCost,
        factor: f64,
        share: &mut Vec<u64>,
    ) -> LayerSeconds {
        self.splitter.split(holders, tokens, speed, Unit::Tokens);
        share.clone_from(&self.splitter.share);
        let mut by_tokens = self.seconds(holders, share, speed, cost);
        by_tokens.compute_s *= factor;
        // When no expert has enough tokens to be worth a division, reading weights is all that counts.
        let ridge = cost.expert_bytes / cost.rates.memory_bytes_per_s / cost.token_s();
        let total: u64 = tokens.iter().sum();
        if total as f64 / tokens.len() as f64 > 4.0 * ridge {
            return by_tokens;
        }
        self.splitter.split(holders, tokens, speed, Unit::Experts);
        let by_experts_share = std::mem::take(&mut self.splitter.share);
        let mut by_experts = self.seconds(holders, &by_experts_share, speed, cost);
        self.splitter.share = by_experts_share;
        by_experts.compute_s *= factor;
        if by_experts.total() < by_tokens.total() {
            share.clone_from(&self.splitter.share);
            return by_experts;
        }
        by_tokens
    }

    /// Seconds of a division, without transfers; leaves each device's tokens and busy time.
    fn seconds(&mut self, holders: &Holders, share: &[u64], speed: &[f64], cost: &LayerCost) -> LayerSeconds {
        self.load.clear();
        self.load.resize(holders.num_devices, 0);
        self.busy_s.clear();
        self.busy_s.resize(holders.num_devices, 0.0);
        for (g, tokens) in holders.device.iter().zip(share) {
            self.load[usize::from(*g)] += tokens;
            self.busy_s[usize::from(*g)] += cost.expert_s(*tokens);
        }
        let slowest = self.busy_s.iter().zip(speed).map(|(b, s)| b / s).fold(0.0, f64::max);
        LayerSeconds { compute_s: slowest + cost.rates.launch_s, all_to_all_s: cost.all_to_all_s(&self.load), transfer_s: 0.0 }
    }

    /// The copies of the best prefix of the greedy list.
    fn candidates(
        &mut self,
        plan: &SpillPlan,
        tokens: &[u64],
        cost: &LayerCost,
        settings: &SpillSettings,
        capacity: usize,
    ) -> Vec<Copy> {
        let holders = &plan.holders;
        let devices = holders.num_devices;
        let total: u64 = tokens.iter().sum();
        let mean = total.div_ceil(devices as u64);
        let least = settings.min_tokens.min(mean / 2).max(1);
        // The most that perfect balance would win does not pay for one copy: the usual end.
        let loads: Vec<u64> = {
            let mut loads = vec![0; devices];
            holders.device.iter().zip(&plan.share).for_each(|(g, s)| loads[usize::from(*g)] += s);
            loads
        };
        let most = loads.iter().copied().max().unwrap_or(0);
        // A token is multiplied, and travels there and back.
        let travel_s = 2.0 * cost.token_bytes / cost.rates.link_bytes_per_s;
        let (at_home_s, away_s) = (cost.token_s() + travel_s, cost.token_s() * cost.reroute_factor + travel_s);
        let host_s = if settings.host_bytes_per_s > 0.0 {
            cost.rates.latency_s + cost.expert_bytes / settings.host_bytes_per_s
        } else {
            f64::INFINITY
        };
        let one_s = cost.transfer_s(1).min(host_s);
        if capacity == 0 || most.saturating_sub(mean) < least || most as f64 * at_home_s <= mean as f64 * away_s + one_s {
            return Vec::new();
        }
        self.moving.clone_from(&plan.share);
        let mut load = loads;
        let mut added: Vec<Copy> = Vec::new();
        let (mut best, mut best_s) = (0, most as f64 * at_home_s);
        self.sent.clear();
        self.sent.resize(devices, 0);
        self.received.clear();
        self.received.resize(devices, 0);
        self.hosted.clear();
        self.hosted.resize(devices, 0);
        // Experts and places by device.
        let mut first = vec![0_usize; devices + 1];
        holders.device.iter().for_each(|g| first[usize::from(*g) + 1] += 1);
        (0..devices).for_each(|g| first[g + 1] += first[g]);
        let mut next = first.clone();
        let mut on_device = vec![(0_usize, 0_usize); holders.device.len()];
        for e in 0..holders.num_experts() {
            for p in holders.places(e) {
                let at = &mut next[usize::from(holders.device[p])];
                on_device[*at] = (e, p);
                *at += 1;
            }
        }
        while added.len() < 4 * devices {
            let Some(g) = (0..devices).max_by_key(|g| (load[*g], std::cmp::Reverse(*g))) else { break };
            let excess = load[g].saturating_sub(mean);
            // The expert with the most tokens here; what was moved in does not leave again.
            let here = &on_device[first[g]..first[g + 1]];
            let hottest = here.iter().copied().max_by_key(|(e, p)| (self.moving[*p], std::cmp::Reverse(*e)));
            let Some((expert, place)) = hottest.filter(|_| excess >= least) else { break };
            let takes = |h: usize| {
                let room = mean.min(settings.max_rows).saturating_sub(load[h]);
                let has = || holders.of(expert).contains(&(h as u16));
                let gets = || added.iter().any(|c: &Copy| c.expert == expert as u16 && usize::from(c.target) == h);
                (room >= least && ((self.received[h] + self.hosted[h]) as usize) < capacity && !has() && !gets()).then_some(room)
            };
            let helper = (0..devices).filter(|h| takes(*h).is_some()).min_by_key(|h| load[*h]);
            let Some(h) = helper else { break };
            let amount = takes(h).unwrap_or(0).min(excess).min(self.moving[place]);
            if amount < least {
                break;
            }
            self.moving[place] -= amount;
            load[g] -= amount;
            load[h] += amount;
            let peer =
                holders.of(expert).iter().copied().min_by_key(|s| self.sent[usize::from(*s)]).expect("an expert has holders");
            // Whichever wire is free sooner, with this copy on it.
            let over_link = (self.sent[usize::from(peer)].max(self.received[h]) + 1) as f64 / cost.rates.link_bytes_per_s;
            let from_host = (self.hosted[h] + 1) as f64 / settings.host_bytes_per_s;
            let source = if settings.host_bytes_per_s > 0.0 && from_host < over_link {
                self.hosted[h] += 1;
                HOST
            } else {
                self.sent[usize::from(peer)] += 1;
                self.received[h] += 1;
                peer
            };
            added.push(Copy { expert: expert as u16, source, target: h as u16 });
            let wires_s = self.transfer_s(cost, settings);
            let slowest = load.iter().copied().max().unwrap_or(0);
            let s = slowest as f64 * away_s + wires_s;
            if s < best_s {
                (best, best_s) = (added.len(), s);
            }
            // Even a perfect balance with so many copies on one wire is slower: more of them cannot win.
            if mean as f64 * away_s + wires_s > best_s {
                break;
            }
        }
        added.truncate(best);
        added
    }

    /// Counts the copies on every wire.
    fn count_wires(&mut self, copies: &[Copy], devices: usize) {
        for counts in [&mut self.sent, &mut self.received, &mut self.hosted] {
            counts.clear();
            counts.resize(devices, 0);
        }
        for c in copies {
            if c.source == HOST {
                self.hosted[usize::from(c.target)] += 1;
            } else {
                self.sent[usize::from(c.source)] += 1;
                self.received[usize::from(c.target)] += 1;
            }
        }
    }

    /// Seconds of the copies that are counted: links and hosts' wires work at the same time.
    fn transfer_s(&self, cost: &LayerCost, settings: &SpillSettings) -> f64 {
        let wires = self.sent.iter().chain(&self.received).copied().max().unwrap_or(0);
        let hosted = self.hosted.iter().copied().max().unwrap_or(0);
        let from_host =
            if hosted == 0 { 0.0 } else { cost.rates.latency_s + hosted as f64 * cost.expert_bytes / settings.host_bytes_per_s };
        cost.transfer_s(wires).max(from_host)
    }
}
