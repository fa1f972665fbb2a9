//! Placements that hold for loads that were not seen.
//!
//! With an exact split a placement is perfect for almost any handful of windows, and 5 % off for the next ones. So it is searched on
//! scenarios: each expert's load deviates from its mean as it did in any of the windows, by itself (experts fluctuate apart from each
//! other), or as any other expert did, scaled by the square root of the means (a search that believes each expert's few windows finds the
//! experts that looked calm by chance); deviations are stretched, since few windows show few extremes. What that asks for is replicas that connect many
//! devices and enough load on each that can leave. Scenarios are looked at worst first, so that most changes are refused after a few.
//!
//! On few devices a change is weighed by `cuts` instead of flows; the search is then long enough to leave local optima: it shakes the best
//! placement and climbs again.

use super::cuts::{Cuts, MOST_DEVICES, NewHolders};
use super::holders::{Holders, LayerPlacement};
use super::judge::Judge;
use super::place::Risk;
use rand::Rng;
use rand::rngs::StdRng;

/// Deviations from the mean are so many times those seen.
const STRETCH: f64 = 1.5;
/// Scenarios among which one is drawn whose binding devices are mended.
const WORST: usize = 16;
/// What looking at a scenario's cuts costs, in places that a split looks at: a fifth of a microsecond.
const WORK_OF_CUTS: u64 = 4;

/// Scenarios, the windows among them, for a search on so many devices.
pub(super) const fn num_scenarios(devices: usize) -> usize {
    if devices <= MOST_DEVICES { 512 } else { 128 }
}

/// The windows, and loads that could have been windows. `[scenarios][experts]`
pub(super) fn scenarios(windows: &[Vec<f64>], count: usize, rng: &mut StdRng) -> Vec<Vec<f64>> {
    let experts = windows[0].len();
    let mean = |e: usize| windows.iter().map(|w| w[e]).sum::<f64>() / windows.len() as f64;
    let means: Vec<f64> = (0..experts).map(mean).collect();
    // Deviations from a mean of so few are too small.
    let n = windows.len() as f64;
    let unbiased = if n > 1.0 { (n / (n - 1.0)).sqrt() } else { 0.0 };
    let mut out = windows.to_vec();
    while out.len() < count {
        let draw = |(e, mean): (usize, &f64)| {
            let other = if rng.random() { e } else { rng.random_range(0..experts) };
            let seen = windows[rng.random_range(0..windows.len())][other] - means[other];
            let size = if means[other] > 0.0 { (mean / means[other]).sqrt() } else { 0.0 };
            (mean + STRETCH * unbiased * size * seen).max(0.0)
        };
        out.push(means.iter().enumerate().map(draw).collect());
    }
    out
}

/// Another expert in a redundant slot, or two experts of different devices swapped.
#[derive(Debug, Clone, Copy)]
struct Change {
    /// Device and slot of the expert that gets another holder.
    from: (usize, usize),
    /// Where it comes to.
    to: (usize, usize),
    /// The expert that moves, and what is there.
    experts: (u16, u16),
    /// What is there has other replicas, and goes.
    replace: bool,
}

impl Change {
    fn apply(self, placement: &mut LayerPlacement) {
        placement.devices[self.to.0][self.to.1] = self.experts.0;
        if !self.replace {
            placement.devices[self.from.0][self.from.1] = self.experts.1;
        }
    }

    fn revert(self, placement: &mut LayerPlacement) {
        placement.devices[self.to.0][self.to.1] = self.experts.1;
        placement.devices[self.from.0][self.from.1] = self.experts.0;
    }

    fn holders(self, cuts: &Cuts) -> [NewHolders; 2] {
        let (a, b) = self.experts;
        let (from, to) = (1 << self.from.0, 1 << self.to.0);
        let (of_a, of_b) = (cuts.holders(a) | to, cuts.holders(b) & !to);
        let [of_a, of_b] = if self.replace { [of_a, of_b] } else { [of_a & !from, of_b | from] };
        [NewHolders { expert: a, set: of_a }, NewHolders { expert: b, set: of_b }]
    }
}

/// Random changes that are kept unless they hurt. Which tokens can go where in which scenario is too tangled for a rule. The judge's
/// windows are the scenarios; `work` limits the looks at scenarios, by the places of experts that a split looks at.
pub(super) fn climb(judge: &mut Judge<'_>, placement: LayerPlacement, work: u64, rng: &mut StdRng) -> LayerPlacement {
    let slots: usize = placement.devices.iter().map(Vec::len).sum();
    let mut at = Climber::new(judge, placement, work);
    // All pairs of slots, some times.
    let pairs = (slots * slots).max(500);
    let (patience, most) = if at.cuts.is_some() { (pairs, 40 * pairs) } else { (4000, 20_000) };
    let mut best = (at.now.value, at.placement.clone());
    let (mut tries, mut idle) = (0, 0);
    while at.work > at.price_of_look && tries < most {
        if idle > patience {
            if at.now.value < best.0 {
                best = (at.now.value, at.placement.clone());
            }
            if at.cuts.is_none() || best.0 <= 1.0 {
                break;
            }
            at.restart(best.1.clone(), 2 + slots / 32, rng);
            idle = 0;
        }
        (tries, idle) = (tries + 1, idle + 1);
        let Some(change) = at.propose(tries, rng) else { continue };
        if at.keep_unless_worse(change) {
            idle = 0;
        }
    }
    if at.now.value < best.0 { at.placement } else { best.1 }
}

struct Climber<'j, 'a> {
    judge: &'j mut Judge<'a>,
    cuts: Option<Cuts>,
    placement: LayerPlacement,
    /// Replicas. `[experts]`
    counts: Vec<u32>,
    now: Valued,
    /// Devices that bind in one of the worst scenarios.
    binding: Vec<usize>,
    work: u64,
    price_of_look: u64,
}

impl<'j, 'a> Climber<'j, 'a> {
    fn new(judge: &'j mut Judge<'a>, placement: LayerPlacement, work: u64) -> Self {
        let experts = judge.windows[0].len();
        let counts = placement.counts(experts);
        let few = placement.devices.len() <= MOST_DEVICES;
        let cuts = few.then(|| Cuts::new(judge.windows, judge.devices, &placement));
        let places = counts.iter().map(|c| u64::from(*c)).sum::<u64>() + experts as u64;
        let price_of_look = if few { WORK_OF_CUTS } else { places };
        let now = Valued::new(judge, &placement);
        Self { judge, cuts, placement, counts, now, binding: Vec::new(), work, price_of_look }
    }

    /// A change that is possible; half of them let something out of devices that bind in one of the worst scenarios.
    fn propose(&mut self, tries: usize, rng: &mut StdRng) -> Option<Change> {
        let devices = self.placement.devices.len();
        let g = if rng.random() {
            if self.binding.is_empty() || tries.is_multiple_of(16) {
                let scenario = self.now.order[rng.random_range(0..self.now.order.len().min(WORST))];
                self.find_binding(scenario);
            }
            self.binding[rng.random_range(0..self.binding.len())]
        } else {
            rng.random_range(0..devices)
        };
        let h = rng.random_range(0..devices);
        let held = &self.placement.devices;
        if g == h || held[g].is_empty() || held[h].is_empty() {
            return None;
        }
        let (i, j) = (rng.random_range(0..held[g].len()), rng.random_range(0..held[h].len()));
        let (a, b) = (held[g][i], held[h][j]);
        if held[h].contains(&a) || self.judge.terms.pack_of(a) != self.judge.terms.pack_of(b) {
            return None;
        }
        // Both are worth trying for a redundant slot, if they are possible.
        let both_hold = held[g].contains(&b);
        let replace = self.counts[usize::from(b)] > 1 && (both_hold || rng.random());
        (replace || !both_hold).then_some(Change { from: (g, i), to: (h, j), experts: (a, b), replace })
    }

    fn find_binding(&mut self, scenario: usize) {
        self.binding.clear();
        if let Some(cuts) = &self.cuts {
            self.binding.extend(cuts.binding(scenario));
        } else {
            let holders = self.placement.holders(self.counts.len());
            self.judge.excess(&holders, scenario);
            self.work = self.work.saturating_sub(self.price_of_look);
            self.binding.extend(self.judge.binding().iter().map(|g| usize::from(*g)));
        }
    }

    /// True if the placement is better now.
    fn keep_unless_worse(&mut self, change: Change) -> bool {
        change.apply(&mut self.placement);
        let price = self.judge.extra(&self.placement);
        let risk = self.judge.options.risk;
        let (found, looks) = if let Some(cuts) = &mut self.cuts {
            let holders = change.holders(cuts);
            cuts.look_at(holders);
            self.now.not_worse(price, risk, |scenario| cuts.excess(scenario))
        } else {
            let holders = self.placement.holders(self.counts.len());
            self.now.not_worse(price, risk, |scenario| self.judge.excess(&holders, scenario))
        };
        self.work = self.work.saturating_sub(self.price_of_look * looks as u64);
        let Some(found) = found else {
            change.revert(&mut self.placement);
            return false;
        };
        self.took(change);
        let better = found.value < self.now.value * (1.0 - 1e-6);
        self.now = found;
        better
    }

    /// The change is in the placement: the rest follows.
    fn took(&mut self, change: Change) {
        if let Some(cuts) = &mut self.cuts {
            let holders = change.holders(cuts);
            cuts.look_at(holders);
            cuts.accept();
        }
        if change.replace {
            self.counts[usize::from(change.experts.1)] -= 1;
            self.counts[usize::from(change.experts.0)] += 1;
        }
        self.binding.clear();
    }

    /// Goes on from there, with some changes whether they help or not.
    fn restart(&mut self, placement: LayerPlacement, changes: usize, rng: &mut StdRng) {
        self.counts = placement.counts(self.counts.len());
        self.placement = placement;
        if let Some(cuts) = &mut self.cuts {
            cuts.place(&self.placement);
        }
        self.binding.clear();
        for _ in 0..changes {
            if let Some(change) = self.propose(0, rng) {
                change.apply(&mut self.placement);
                self.took(change);
            }
        }
        let (price, risk) = (self.judge.extra(&self.placement), self.judge.options.risk);
        let looks = self.now.excess.len() as u64;
        self.work = self.work.saturating_sub(self.price_of_look * looks);
        self.now = match &self.cuts {
            Some(cuts) => Valued::of((0..self.now.excess.len()).map(|s| cuts.excess(s)).collect(), price, risk),
            None => Valued::new(self.judge, &self.placement),
        };
    }
}

/// A placement's value, scenario by scenario.
struct Valued {
    value: f64,
    /// The slowest device, as a multiple of the mean. `[scenarios]`
    excess: Vec<f64>,
    /// Scenarios, the worst first.
    order: Vec<usize>,
}

impl Valued {
    fn new(judge: &mut Judge<'_>, placement: &LayerPlacement) -> Self {
        let holders = placement.holders(judge.windows[0].len());
        let excess = (0..judge.windows.len()).map(|w| judge.excess(&holders, w)).collect();
        Self::of(excess, judge.extra(placement), judge.options.risk)
    }

    fn of(excess: Vec<f64>, price: f64, risk: Risk) -> Self {
        let mut order: Vec<usize> = (0..excess.len()).collect();
        order.sort_by(|a, b| excess[*b].total_cmp(&excess[*a]));
        let value = risk.of(&mut excess.clone()) + price;
        Self { value, excess, order }
    }

    /// Another placement's value unless it is worse than this one's, and how many scenarios that took.
    fn not_worse(&self, price: f64, risk: Risk, mut excess_in: impl FnMut(usize) -> f64) -> (Option<Self>, usize) {
        // Nobody is below 1: what is still to come costs at least that.
        let mut excess = vec![1.0; self.excess.len()];
        let n = excess.len() as f64;
        let mut sum = n;
        for (looks, w) in self.order.iter().enumerate() {
            excess[*w] = excess_in(*w);
            sum += excess[*w] - 1.0;
            let hopeless = match risk {
                Risk::Mean => sum / n + price > self.value * (1.0 + 1e-12),
                Risk::Cvar { .. } => looks % 16 == 15 && risk.of(&mut excess.clone()) + price > self.value * (1.0 + 1e-12),
            };
            if hopeless {
                return (None, looks + 1);
            }
        }
        let looks = excess.len();
        let other = Self::of(excess, price, risk);
        ((other.value <= self.value * (1.0 + 1e-12)).then_some(other), looks)
    }
}

/// The candidate with the least value on the judge's windows.
pub(super) fn best(judge: &mut Judge<'_>, candidates: Vec<LayerPlacement>) -> Option<LayerPlacement> {
    let mut best: Option<(Valued, LayerPlacement)> = None;
    for candidate in candidates {
        let better = match &best {
            None => Some(Valued::new(judge, &candidate)),
            Some((now, _)) => {
                let holders: Holders = candidate.holders(judge.windows[0].len());
                let (price, risk) = (judge.extra(&candidate), judge.options.risk);
                let found = now.not_worse(price, risk, |w| judge.excess(&holders, w)).0;
                found.filter(|v| v.value < now.value)
            }
        };
        if let Some(valued) = better {
            best = Some((valued, candidate));
        }
    }
    best.map(|(_, placement)| placement)
}
