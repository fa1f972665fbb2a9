//! One layer of one batch under a policy: who computes which tokens, and which weights move first.
//!
//! The same decisions for the replay of a log and for ranks that really compute. All that goes in is known to every rank (the placement,
//! the tokens of each expert on each rank, the copies made so far), and nothing is random: so all ranks decide alike without asking
//! anybody. `ep`, `eplb`: every slot of an expert gets an equal part of its tokens. `eplb+split`: L2. `llep`: LLA where the imbalance
//! reaches lambda, its copies for this layer alone. `tierwise`: L2 and L3 with copies that stay; L2 alone where some experts wait in memories
//! beside the devices' own.

use super::cost::{LayerCost, LayerSeconds};
use super::holders::{Holders, LayerPlacement};
use super::lla::{LlaSettings, lla};
use super::replay::{Policy, Slots};
use super::result::once;
use super::spill::{Copy, SpillCache, SpillSettings, Spiller};
use super::split::{Splitter, Unit};
use crate::error::PlanError;

/// By what is decided.
#[derive(Debug, Clone)]
pub struct DecideSettings {
    /// Relative speed of each device. `[devices]`
    pub speed: Vec<f64>,
    /// Prices.
    pub cost: LayerCost,
    /// L3.
    pub spill: SpillSettings,
    /// LLEP's alpha.
    pub alpha: f64,
    /// LLEP acts from this largest / mean on.
    pub lambda: f64,
}

/// What happens to one layer of one batch.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerDecision {
    /// Who can compute what, new copies included.
    pub holders: Holders,
    /// Tokens of each place of `holders`.
    pub share: Vec<u64>,
    /// Weights that are sent before.
    pub copies: Vec<Copy>,
    /// Copies as the policy itself counts them: LLA may send an expert to the same rank twice.
    pub sent: u64,
    /// What it costs.
    pub seconds: LayerSeconds,
}

impl LayerDecision {
    /// Tokens of each device. `[devices]`
    pub fn rows(&self) -> Vec<u64> {
        let mut rows = vec![0; self.holders.num_devices];
        self.holders.device.iter().zip(&self.share).for_each(|(g, s)| rows[usize::from(*g)] += s);
        rows
    }

    /// Where the tokens of `expert` go that device `source` has: (device, tokens), first what it computes itself. `counts`: tokens of
    /// the expert on each device; every device gets its share in the order of sources. `[devices]`
    pub fn targets(&self, expert: usize, counts: &[u64], source: usize) -> Vec<(u16, u64)> {
        let places = self.holders.places(expert);
        let (devices, share) = (&self.holders.device[places.clone()], &self.share[places]);
        let own = |g: usize| devices.iter().zip(share).filter(|(d, _)| usize::from(**d) == g).map(|(_, s)| *s).sum::<u64>();
        let kept = |g: usize| own(g).min(counts[g]);
        let mut targets = Vec::new();
        if kept(source) > 0 {
            targets.push((source as u16, kept(source)));
        }
        // What is left of sources meets what is left of places, both in order.
        let mut skip: u64 = (0..source).map(|g| counts[g] - kept(g)).sum();
        let mut left = counts[source] - kept(source);
        for (device, share) in devices.iter().zip(share) {
            let room = share - kept(usize::from(*device)).min(*share);
            let passed = room.min(skip);
            skip -= passed;
            let taken = (room - passed).min(left);
            if taken > 0 {
                targets.push((*device, taken));
                left -= taken;
            }
        }
        targets
    }
}

/// Decides for all layers, batch after batch.
#[derive(Debug)]
pub struct Decider {
    policy: Policy,
    settings: DecideSettings,
    /// `[layers][devices][slots]`
    slots: Vec<Slots>,
    holders: Vec<Holders>,
    /// What a token of each expert counts as; empty where all count alike. `[layers][experts]`
    prices: Vec<Vec<f64>>,
    splitter: Splitter,
    spiller: Spiller,
    cache: SpillCache,
}

impl Decider {
    /// Without a placement yet.
    pub fn new(policy: Policy, settings: DecideSettings) -> Self {
        let slots = if policy == Policy::Tierwise { settings.spill.slots_per_device } else { 0 };
        let cache = SpillCache::new(settings.speed.len(), slots);
        Self {
            policy,
            settings,
            slots: Vec::new(),
            holders: Vec::new(),
            prices: Vec::new(),
            splitter: Splitter::default(),
            spiller: Spiller::default(),
            cache,
        }
    }

    /// From now on devices hold these. `slots`: `[layers][devices][slots]`, `num_experts`: `[layers]`
    pub fn place(&mut self, slots: Vec<Slots>, num_experts: &[usize]) {
        let of_layer = |(slots, num_experts): (&Slots, &usize)| {
            LayerPlacement { devices: slots.iter().map(|d| once(d)).collect() }.holders(*num_experts)
        };
        self.holders = slots.iter().zip(num_experts).map(of_layer).collect();
        self.slots = slots;
    }

    /// From now on a token of an expert counts as so many; empty for one. Experts that count as more have one holder. `[layers][experts]`
    pub fn price(&mut self, prices: Vec<Vec<f64>>) {
        self.prices = prices;
    }

    /// What each device has to do in a layer: tokens, at their experts' prices, by its speed. `[devices]`
    pub fn levels(&self, layer: usize, decision: &LayerDecision) -> Vec<f64> {
        let mut levels = vec![0.0; decision.holders.num_devices];
        for e in 0..decision.holders.num_experts() {
            let price = self.prices.get(layer).map_or(1.0, |p| p[e]);
            for place in decision.holders.places(e) {
                let g = usize::from(decision.holders.device[place]);
                levels[g] += decision.share[place] as f64 * price / self.settings.speed[g];
            }
        }
        levels
    }

    /// The policy.
    pub const fn policy(&self) -> Policy {
        self.policy
    }

    /// By what is decided.
    pub const fn settings(&self) -> &DecideSettings {
        &self.settings
    }

    /// What devices hold. `[layers][devices][slots]`
    pub fn slots(&self) -> &[Slots] {
        &self.slots
    }

    /// Who holds what of a layer, copies not counted.
    pub fn holders(&self, layer: usize) -> &Holders {
        &self.holders[layer]
    }

    /// Copies that devices keep, layers numbered as in [`Self::decide`].
    pub const fn cache(&self) -> &SpillCache {
        &self.cache
    }

    /// Decides for the `layer`-th layer with experts. `tokens`: `[experts]`
    ///
    /// # Errors
    /// [`PlanError::BadBalance`] when the policy cannot.
    pub fn decide(&mut self, layer: usize, tokens: &[u64]) -> Result<LayerDecision, PlanError> {
        match self.policy {
            Policy::Ep | Policy::Eplb => Ok(self.equal(layer, tokens)),
            Policy::Llep => self.llep(layer, tokens),
            Policy::EplbSplit | Policy::Tierwise if !self.prices.is_empty() => Ok(self.priced(layer, tokens)),
            Policy::EplbSplit | Policy::Tierwise => {
                let mut spill = self.settings.spill;
                if self.policy == Policy::EplbSplit {
                    spill.slots_per_device = 0;
                }
                let (holders, cost) = (&self.holders[layer], &self.settings.cost);
                let speed = &self.settings.speed;
                let plan = self.spiller.plan(holders, tokens, speed, cost, &spill, &mut self.cache, layer as u32);
                let sent = plan.copies.len() as u64;
                Ok(LayerDecision { holders: plan.holders, share: plan.share, copies: plan.copies, sent, seconds: plan.seconds })
            }
        }
    }

    /// L2 where some experts' tokens take longer: what others hold of the rest evens that out.
    fn priced(&mut self, layer: usize, tokens: &[u64]) -> LayerDecision {
        let (holders, prices, settings) = (&self.holders[layer], &self.prices[layer], &self.settings);
        let units: Vec<u64> = tokens.iter().zip(prices).map(|(t, p)| (*t as f64 * p).round() as u64).collect();
        self.splitter.split(holders, &units, &settings.speed, Unit::Tokens);
        let mut share = self.splitter.share.clone();
        let (mut busy_s, mut rows) = (vec![0.0; holders.num_devices], vec![0; holders.num_devices]);
        for (e, price) in prices.iter().enumerate() {
            let places = holders.places(e);
            if *price > 1.0 && places.len() == 1 {
                share[places.start] = tokens[e];
            }
            for place in places {
                let g = usize::from(holders.device[place]);
                busy_s[g] += price * settings.cost.expert_s(share[place]);
                rows[g] += share[place];
            }
        }
        let slowest = busy_s.iter().zip(&settings.speed).map(|(b, s)| b / s).fold(0.0, f64::max);
        let cost = &settings.cost;
        let seconds =
            LayerSeconds { compute_s: slowest + cost.rates.launch_s, all_to_all_s: cost.all_to_all_s(&rows), transfer_s: 0.0 };
        LayerDecision { holders: holders.clone(), share, copies: Vec::new(), sent: 0, seconds }
    }

    /// Every slot of an expert computes an equal part of its tokens.
    fn equal(&self, layer: usize, tokens: &[u64]) -> LayerDecision {
        let holders = &self.holders[layer];
        let mut count = vec![0_u64; tokens.len()];
        self.slots[layer].iter().flatten().for_each(|e| count[usize::from(*e)] += 1);
        let mut given = vec![0_u64; tokens.len()];
        let mut share = vec![0; holders.device.len()];
        let mut rows = vec![0; holders.num_devices];
        let mut slowest = 0.0_f64;
        for (g, slots) in self.slots[layer].iter().enumerate() {
            let mut busy = 0.0;
            for e in once(slots).into_iter().map(usize::from) {
                let here = slots.iter().filter(|s| usize::from(**s) == e).count() as u64;
                // Whole tokens: the parts before and after these slots are rounded down alike.
                let part = |slots: u64| tokens[e] * slots / count[e];
                let n = part(given[e] + here) - part(given[e]);
                given[e] += here;
                rows[g] += n;
                let place = holders.places(e).find(|p| usize::from(holders.device[*p]) == g);
                share[place.expect("who has a slot of it holds it")] = n;
                busy += self.settings.cost.expert_s(n);
            }
            slowest = slowest.max(busy / self.settings.speed[g]);
        }
        let cost = &self.settings.cost;
        let seconds =
            LayerSeconds { compute_s: slowest + cost.rates.launch_s, all_to_all_s: cost.all_to_all_s(&rows), transfer_s: 0.0 };
        LayerDecision { holders: holders.clone(), share, copies: Vec::new(), sent: 0, seconds }
    }

    fn llep(&self, layer: usize, tokens: &[u64]) -> Result<LayerDecision, PlanError> {
        let plain = self.equal(layer, tokens);
        let rows = plain.rows();
        let total: u64 = rows.iter().sum();
        let most = rows.iter().copied().max().unwrap_or(0) as f64;
        if total == 0 || most < self.settings.lambda * total as f64 / rows.len() as f64 {
            return Ok(plain);
        }
        let (alpha, min_tokens_per_gemm) = (self.settings.alpha, self.settings.spill.min_tokens);
        let plan = lla(tokens, &LlaSettings { num_ranks: rows.len(), alpha, min_tokens_per_gemm })?;
        let cost = &self.settings.cost;
        let mut busy = vec![0.0; rows.len()];
        for run in plan.runs.iter().flatten() {
            busy[run.rank as usize] += cost.expert_s(run.end - run.start);
        }
        let (mut out, mut into) = (vec![0_u64; rows.len()], vec![0_u64; rows.len()]);
        let mut copies: Vec<Copy> = Vec::new();
        for t in &plan.transfers {
            out[t.source as usize] += 1;
            into[t.run.rank as usize] += 1;
            let copy = Copy { expert: t.expert as u16, source: t.source as u16, target: t.run.rank as u16 };
            if !copies.contains(&copy) {
                copies.push(copy);
            }
        }
        let more: Vec<(u16, u16)> = copies.iter().map(|c| (c.expert, c.target)).collect();
        let holders = plain.holders.with(&more);
        let mut share = vec![0; holders.device.len()];
        for (e, runs) in plan.runs.iter().enumerate() {
            for run in runs {
                let place = holders.places(e).find(|p| u32::from(holders.device[*p]) == run.rank);
                share[place.expect("it is the home or got a copy")] += run.end - run.start;
            }
        }
        let slowest = busy.iter().zip(&self.settings.speed).map(|(b, s)| b / s).fold(0.0, f64::max);
        let seconds = LayerSeconds {
            compute_s: (slowest + cost.rates.launch_s) * cost.reroute_factor,
            all_to_all_s: cost.all_to_all_s(&plan.loads),
            transfer_s: cost.transfer_s(out.iter().chain(&into).copied().max().unwrap_or(0)),
        };
        Ok(LayerDecision { holders, share, copies, sent: plan.transfers.len() as u64, seconds })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every token goes somewhere, every place gets its share, and what can stay stays.
    #[test]
    fn targets_meet_shares() {
        let mut state = 7_u64;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        for _ in 0..500 {
            let devices = 1 + random(6) as usize;
            let mut on: Vec<u16> = (0..devices as u16).filter(|_| random(2) == 0).collect();
            if on.is_empty() {
                on.push(random(devices as u64) as u16);
            }
            let counts: Vec<u64> = (0..devices).map(|_| random(20)).collect();
            let mut share = vec![0; on.len()];
            (0..counts.iter().sum::<u64>()).for_each(|_| share[random(on.len() as u64) as usize] += 1);
            let holders = Holders::new(&[on.clone()], devices);
            let decision = LayerDecision { holders, share: share.clone(), ..LayerDecision::default() };
            let mut got = vec![0; devices];
            for (source, count) in counts.iter().enumerate() {
                let targets = decision.targets(0, &counts, source);
                assert_eq!(targets.iter().map(|t| t.1).sum::<u64>(), *count);
                targets.iter().for_each(|(g, n)| got[usize::from(*g)] += n);
                let own = on.iter().position(|g| usize::from(*g) == source).map_or(0, |p| share[p]);
                let stays: u64 = targets.iter().filter(|t| usize::from(t.0) == source).map(|t| t.1).sum();
                assert_eq!(stays, own.min(*count));
            }
            for (place, g) in on.iter().enumerate() {
                assert_eq!(got[usize::from(*g)], share[place]);
            }
        }
    }
}
