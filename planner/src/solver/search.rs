//! Local search over whole experts: round fractions, repair what is over its room, then moves and swaps while they save time.
//!
//! The value is the convex program's ([`super::linear`]) with round trips paid in full. Loads of every step are kept, so a move is
//! judged by the few steps in which its expert is active.

use super::linear::{Layer, Linear};

/// Loads of one layer's steps under whole experts.
#[derive(Clone)]
struct Loads {
    /// Seconds without round trips. `[steps * resources]`
    seconds: Vec<f64>,
    /// Active experts per processor. `[steps * processors]`
    count: Vec<f64>,
    /// Time of each step: its slowest resource. `[steps]`
    slowest: Vec<f64>,
}

/// A move of one expert.
#[derive(Debug, Clone, Copy)]
struct Move {
    expert: usize,
    /// Seconds more.
    delta: f64,
}

/// Moves done together: (layer, expert, tier to go to).
type Moves = Vec<(usize, usize, usize)>;

/// The search's state.
pub(super) struct Search<'a> {
    lp: &'a Linear,
    /// `[layers][experts]`
    pub tier_of: Vec<Vec<u8>>,
    loads: Vec<Loads>,
    /// Bytes left in each memory. `[memories]`
    free: Vec<f64>,
}

impl<'a> Search<'a> {
    /// Begins with a placement, which may be over its room. `[layers][experts]`
    pub fn new(lp: &'a Linear, tier_of: Vec<Vec<u8>>) -> Self {
        let mut free = lp.room.clone();
        for (layer, tiers) in lp.layers.iter().zip(&tier_of) {
            for t in tiers {
                for (m, bytes) in &layer.uses[usize::from(*t)] {
                    free[*m] -= bytes;
                }
            }
        }
        let loads = lp.layers.iter().zip(&tier_of).map(|(layer, tiers)| loads_of(lp, layer, tiers)).collect();
        Self { lp, tier_of, loads, free }
    }

    /// Whole experts from fractions: each goes where most of it is.
    pub fn rounded(lp: &'a Linear, x: &[Vec<f64>]) -> Self {
        let largest = |xe: &[f64]| (0..xe.len()).max_by(|a, b| xe[*a].total_cmp(&xe[*b])).unwrap_or(0) as u8;
        Self::new(lp, x.iter().map(|x| x.chunks_exact(lp.num_tiers).map(largest).collect()).collect())
    }

    /// The objective in seconds.
    pub fn value(&self) -> f64 {
        let steps = self.lp.layers.iter().zip(&self.loads);
        self.lp.constant_s()
            + steps.map(|(l, loads)| l.steps.iter().zip(&loads.slowest).map(|(s, t)| s.weight * t).sum::<f64>()).sum::<f64>()
    }

    /// Nothing is over its room.
    pub fn is_feasible(&self) -> bool {
        self.free.iter().all(|f| *f >= -0.5)
    }

    /// Every expert to where its time plus the price of its bytes is least, a few times over.
    pub fn descend(&mut self, price: &[f64], sweeps: usize) {
        for _ in 0..sweeps {
            let mut changed = false;
            for l in 0..self.lp.layers.len() {
                for e in 0..self.lp.layers[l].num_experts {
                    let from = usize::from(self.tier_of[l][e]);
                    let cost = |k: usize| self.lp.layers[l].uses[k].iter().map(|(m, b)| price[*m] * b).sum::<f64>();
                    let mut best = (0.0, from);
                    for to in (0..self.lp.num_tiers).filter(|k| *k != from && self.lp.layers[l].allowed[*k]) {
                        let delta = self.delta(l, e, to) + cost(to) - cost(from);
                        if delta < best.0 - 1e-15 {
                            best = (delta, to);
                        }
                    }
                    if best.1 != from {
                        self.apply(l, e, best.1);
                        changed = true;
                    }
                }
            }
            if !changed {
                return;
            }
        }
    }

    /// Moves experts until no memory is over its room, cheapest per byte of excess first; false when no move makes the excess smaller.
    pub fn repair(&mut self) -> bool {
        while !self.is_feasible() {
            // Candidates are judged once per round; after a move those of its layer are out of date, so few are taken per layer.
            let mut candidates: Vec<(f64, usize, usize, usize)> = Vec::new();
            for (l, layer) in self.lp.layers.iter().enumerate() {
                let t = self.lp.num_tiers;
                let less: Vec<f64> = (0..t * t).map(|pair| self.excess_less(l, pair / t, pair % t)).collect();
                for e in 0..layer.num_experts {
                    let from = usize::from(self.tier_of[l][e]);
                    for to in (0..t).filter(|k| layer.allowed[*k] && less[from * t + k] > 0.5) {
                        candidates.push((self.delta(l, e, to) / less[from * t + to], l, e, to));
                    }
                }
            }
            candidates.sort_by(|a, b| a.0.total_cmp(&b.0));
            let mut moved = false;
            let mut done: Vec<(usize, usize)> = Vec::new();
            let mut touched = vec![0_usize; self.lp.layers.len()];
            for (_, l, e, to) in candidates {
                let from = usize::from(self.tier_of[l][e]);
                if touched[l] < 2 && !done.contains(&(l, e)) && self.excess_less(l, from, to) > 0.5 {
                    self.apply(l, e, to);
                    done.push((l, e));
                    touched[l] += 1;
                    moved = true;
                }
            }
            if !moved {
                return false;
            }
        }
        true
    }

    /// By how many bytes a move makes what is over its room less, over all memories.
    fn excess_less(&self, l: usize, from: usize, to: usize) -> f64 {
        let uses = &self.lp.layers[l].uses;
        (0..self.free.len())
            .map(|m| {
                let after = self.free[m] + bytes_in(&uses[from], m) - bytes_in(&uses[to], m);
                (-self.free[m]).max(0.0) - (-after).max(0.0)
            })
            .sum()
    }

    /// The moves (layer, from, to) leave no memory over its room.
    fn fits(&self, moves: &[(usize, usize, usize)]) -> bool {
        moves.iter().flat_map(|(l, _, to)| &self.lp.layers[*l].uses[*to]).all(|(m, _)| {
            let more: f64 = moves
                .iter()
                .map(|(l, from, to)| bytes_in(&self.lp.layers[*l].uses[*to], *m) - bytes_in(&self.lp.layers[*l].uses[*from], *m))
                .sum();
            more <= 0.0 || self.free[*m] >= more
        })
    }

    /// Moves and swaps that save time within the room, until none does or `work` multiply-adds are spent.
    pub fn improve(&mut self, work: f64) {
        let t = self.lp.num_tiers;
        let per_layer: Vec<f64> = self
            .lp
            .layers
            .iter()
            .map(|l| l.steps_of.iter().map(Vec::len).sum::<usize>() as f64 * (t * self.lp.num_resources * 2) as f64)
            .collect();
        let mut left = work - per_layer.iter().sum::<f64>();
        let mut best: Vec<Vec<Option<Move>>> = (0..self.lp.layers.len()).map(|l| self.best_moves(l)).collect();
        let least = 1e-9 * self.value();
        while left > 0.0 {
            let Some(changed) = self.best_changes(&best, least) else {
                // No single move and no swap between layers: swaps within a layer.
                let mut any = false;
                for l in 0..self.lp.layers.len() {
                    left -= per_layer[l];
                    if self.swap_within(l, least) {
                        best[l] = self.best_moves(l);
                        any = true;
                    }
                }
                if !any {
                    return;
                }
                continue;
            };
            for l in changed {
                left -= per_layer[l];
                best[l] = self.best_moves(l);
            }
        }
    }

    /// Applies the best moves and swaps between layers, each layer changing at most once; the layers that changed, if any.
    fn best_changes(&mut self, best: &[Vec<Option<Move>>], least: f64) -> Option<Vec<usize>> {
        let t = self.lp.num_tiers;
        /// Layers looked at for each pair of tiers.
        const FEW: usize = 6;
        let lowest: Vec<Vec<(usize, Move)>> = (0..t * t).map(|pair| lowest(best, pair, FEW)).collect();
        let mut offers: Vec<(f64, Moves)> = Vec::new();
        for (pair, moves) in lowest.iter().enumerate() {
            let (from, to) = (pair / t, pair % t);
            for (l1, m1) in moves.iter().filter(|(_, m)| m.delta < -least) {
                if self.fits(&[(*l1, from, to)]) {
                    offers.push((m1.delta, vec![(*l1, m1.expert, to)]));
                    continue;
                }
                // It does not fit alone: with another move that makes room.
                for (back_pair, backs) in lowest.iter().enumerate() {
                    let (back_from, back_to) = (back_pair / t, back_pair % t);
                    for (l2, m2) in backs.iter().filter(|(l2, _)| l2 != l1) {
                        if m1.delta + m2.delta < -least && self.fits(&[(*l1, from, to), (*l2, back_from, back_to)]) {
                            offers.push((m1.delta + m2.delta, vec![(*l1, m1.expert, to), (*l2, m2.expert, back_to)]));
                        }
                    }
                }
            }
        }
        offers.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut changed: Vec<usize> = Vec::new();
        for (_, moves) in offers {
            let places: Vec<_> = moves.iter().map(|(l, e, to)| (*l, usize::from(self.tier_of[*l][*e]), *to)).collect();
            if moves.iter().any(|(l, _, _)| changed.contains(l)) || !self.fits(&places) {
                continue;
            }
            for (l, e, to) in moves {
                self.apply(l, e, to);
                changed.push(l);
            }
        }
        (!changed.is_empty()).then_some(changed)
    }

    /// The first swap of two experts of a layer that saves time: those that look best alone are tried in pairs.
    fn swap_within(&mut self, l: usize, least: f64) -> bool {
        const TRIED: usize = 12;
        let layer = &self.lp.layers[l];
        let mut moves: Vec<(f64, usize, usize)> = Vec::new();
        for e in 0..layer.num_experts {
            for to in (0..self.lp.num_tiers).filter(|k| layer.allowed[*k] && *k != usize::from(self.tier_of[l][e])) {
                moves.push((self.delta(l, e, to), e, to));
            }
        }
        moves.sort_by(|a, b| a.0.total_cmp(&b.0));
        let good: Vec<_> = moves.iter().take(TRIED).copied().collect();
        for (first, e, to) in good {
            if first >= -least {
                break;
            }
            let from = usize::from(self.tier_of[l][e]);
            self.apply(l, e, to);
            let mut back: Option<(f64, usize, usize)> = None;
            for (_, e2, to2) in moves.iter().filter(|(_, e2, _)| *e2 != e) {
                let from2 = usize::from(self.tier_of[l][*e2]);
                // The first move is done already, so only what it took too much must come back.
                if !self.fits_after(l, from2, *to2) {
                    continue;
                }
                let second = self.delta(l, *e2, *to2);
                if first + second < -least && back.is_none_or(|(d, _, _)| second < d) {
                    back = Some((second, *e2, *to2));
                }
            }
            match back {
                Some((_, e2, to2)) => {
                    self.apply(l, e2, to2);
                    return true;
                }
                None => self.apply(l, e, from),
            }
        }
        false
    }

    /// After this move nothing is over its room.
    fn fits_after(&self, l: usize, from: usize, to: usize) -> bool {
        let uses = &self.lp.layers[l].uses;
        (0..self.free.len()).all(|m| self.free[m] - bytes_in(&uses[to], m) + bytes_in(&uses[from], m) >= -0.5)
    }

    /// For every pair of tiers the best move in layer `l`. `[from * tiers + to]`
    fn best_moves(&self, l: usize) -> Vec<Option<Move>> {
        let t = self.lp.num_tiers;
        let mut best: Vec<Option<Move>> = vec![None; t * t];
        for e in 0..self.lp.layers[l].num_experts {
            let from = usize::from(self.tier_of[l][e]);
            for to in (0..t).filter(|k| *k != from && self.lp.layers[l].allowed[*k]) {
                let delta = self.delta(l, e, to);
                let slot = &mut best[from * t + to];
                if slot.is_none_or(|m| delta < m.delta) {
                    *slot = Some(Move { expert: e, delta });
                }
            }
        }
        best
    }

    /// Seconds more if expert `e` of layer `l` were in tier `to`.
    fn delta(&self, l: usize, e: usize, to: usize) -> f64 {
        let (lp, layer, loads) = (self.lp, &self.lp.layers[l], &self.loads[l]);
        let from = usize::from(self.tier_of[l][e]);
        let (r, p) = (lp.num_resources, lp.num_processors);
        let mut more = 0.0;
        let mut now = [0.0; super::MAX_RESOURCES];
        for (s, a) in &layer.steps_of[e] {
            let (s, step) = (*s as usize, &layer.steps[*s as usize]);
            now[..r].copy_from_slice(&loads.seconds[s * r..(s + 1) * r]);
            let costs = &layer.phases[step.phase];
            for c in &costs.by_tier[to] {
                now[c.on] += c.of(a);
            }
            for c in &costs.by_tier[from] {
                now[c.on] -= c.of(a);
            }
            let (leaves, joins) = (costs.processor[from], costs.processor[to]);
            for (on, sync_s) in costs.sync_s.iter().enumerate() {
                let change = f64::from(u8::from(on == joins)) - f64::from(u8::from(on == leaves));
                if loads.count[s * p + on] + a.times * change > 1e-9 {
                    now[on] += sync_s;
                }
            }
            more += step.weight * (now[..r].iter().copied().fold(0.0, f64::max) - loads.slowest[s]);
        }
        more
    }

    fn apply(&mut self, l: usize, e: usize, to: usize) {
        let (lp, layer) = (self.lp, &self.lp.layers[l]);
        let from = usize::from(self.tier_of[l][e]);
        let (r, p) = (lp.num_resources, lp.num_processors);
        let loads = &mut self.loads[l];
        for (s, a) in &layer.steps_of[e] {
            let (s, step) = (*s as usize, &layer.steps[*s as usize]);
            let costs = &layer.phases[step.phase];
            for c in &costs.by_tier[to] {
                loads.seconds[s * r + c.on] += c.of(a);
            }
            for c in &costs.by_tier[from] {
                loads.seconds[s * r + c.on] -= c.of(a);
            }
            loads.count[s * p + costs.processor[from]] -= a.times;
            loads.count[s * p + costs.processor[to]] += a.times;
            loads.slowest[s] = slowest(costs, &loads.seconds[s * r..(s + 1) * r], &loads.count[s * p..(s + 1) * p]);
        }
        self.tier_of[l][e] = to as u8;
        for (m, bytes) in &layer.uses[from] {
            self.free[*m] += bytes;
        }
        for (m, bytes) in &layer.uses[to] {
            self.free[*m] -= bytes;
        }
    }
}

/// Bytes of `uses` in memory `m`.
fn bytes_in(uses: &[(usize, f64)], m: usize) -> f64 {
    uses.iter().filter(|(other, _)| *other == m).map(|(_, b)| b).sum()
}

fn loads_of(lp: &Linear, layer: &Layer, tiers: &[u8]) -> Loads {
    let (r, p) = (lp.num_resources, lp.num_processors);
    let n = layer.steps.len();
    let mut loads = Loads { seconds: vec![0.0; n * r], count: vec![0.0; n * p], slowest: vec![0.0; n] };
    for (s, step) in layer.steps.iter().enumerate() {
        let costs = &layer.phases[step.phase];
        for a in &step.active {
            let tier = usize::from(tiers[usize::from(a.expert)]);
            for c in &costs.by_tier[tier] {
                loads.seconds[s * r + c.on] += c.of(a);
            }
            loads.count[s * p + costs.processor[tier]] += a.times;
        }
        loads.slowest[s] = slowest(costs, &loads.seconds[s * r..(s + 1) * r], &loads.count[s * p..(s + 1) * p]);
    }
    loads
}

/// Time of a step: its slowest resource, round trips of busy processors included.
fn slowest(costs: &super::linear::Costs, seconds: &[f64], count: &[f64]) -> f64 {
    let mut most = seconds.iter().copied().fold(0.0, f64::max);
    for (on, sync_s) in costs.sync_s.iter().enumerate() {
        if count[on] > 1e-9 {
            most = most.max(seconds[on] + sync_s);
        }
    }
    most
}

/// The layers with the lowest change for a pair of tiers.
fn lowest(best: &[Vec<Option<Move>>], pair: usize, few: usize) -> Vec<(usize, Move)> {
    let mut all: Vec<(usize, Move)> = best.iter().enumerate().filter_map(|(l, m)| m[pair].map(|m| (l, m))).collect();
    all.sort_by(|a, b| a.1.delta.total_cmp(&b.1.delta));
    all.truncate(few);
    all
}
