//! Local search behind L1: loads of devices under equal split, over several windows of load at once.
//!
//! The device that everybody waits for gives an expert away, swaps one, or gets another replica of one placed elsewhere, as long as the
//! objective falls; ties are broken by the sum of squares, so that plateaus are crossed. No device ever holds an expert twice.

use super::holders::LayerPlacement;
use super::place::{DeviceSpec, Risk, Sends};
use super::terms::Terms;

/// Smaller relative gains are rounding.
const LEAST_GAIN: f64 = 1e-9;

/// One layer's experts on devices, with every load that follows.
#[derive(Clone)]
pub(super) struct State<'a> {
    devices: &'a [DeviceSpec],
    risk: Risk,
    /// `[experts][windows]`
    weight: &'a [f64],
    windows: usize,
    /// Replicas. `[experts]`
    pub count: Vec<u32>,
    /// `[devices][experts held]`
    pub held: Vec<Vec<u16>>,
    /// `[experts][devices]`
    holds: Vec<bool>,
    /// `[windows][devices]`
    load: Vec<f64>,
    sends: Option<SendsState<'a>>,
    terms: Terms<'a>,
    /// Held in the placement in use; empty without one. `[experts][devices]`
    old: Vec<bool>,
    copies: i64,
    /// Where devices belong for pairs of experts; the pairs that are together, and all.
    domains: Vec<u16>,
    pairs: f64,
    all_pairs: f64,
    maxima: Vec<f64>,
}

/// Tokens between nodes, as a price.
#[derive(Clone)]
struct SendsState<'a> {
    rule: &'a Sends,
    price: f64,
    /// Mean load of each expert over windows.
    mean: Vec<f64>,
    /// `[groups][nodes]`
    mass: Vec<f64>,
    nodes: usize,
}

/// How good a state is; smaller is better.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Score {
    pub objective: f64,
    squares: f64,
}

impl Score {
    fn beats(self, other: Self) -> bool {
        let least = LEAST_GAIN * other.objective.abs();
        self.objective < other.objective - least
            || (self.objective <= other.objective + least && self.squares < other.squares * (1.0 - LEAST_GAIN))
    }
}

/// A change of the state.
#[derive(Debug, Clone, Copy)]
enum Change {
    /// An expert moves.
    Shift { expert: u16, from: u16, to: u16 },
    /// Two experts change places.
    Swap { a: u16, on_a: u16, b: u16, on_b: u16 },
    /// One more replica.
    Add { expert: u16, to: u16 },
    /// One more replica in place of one of another expert.
    Replace { expert: u16, to: u16, victim: u16 },
}

impl<'a> State<'a> {
    pub fn new(
        placement: &LayerPlacement,
        weight: &'a [f64],
        windows: usize,
        devices: &'a [DeviceSpec],
        risk: Risk,
        sends: Option<(&'a Sends, f64)>,
        terms: Terms<'a>,
    ) -> Self {
        let experts = weight.len() / windows;
        let mut old = Vec::new();
        if let Some((placement, _)) = terms.old {
            old = vec![false; experts * devices.len()];
            for (g, held) in placement.devices.iter().enumerate() {
                held.iter().for_each(|e| old[usize::from(*e) * devices.len() + g] = true);
            }
        }
        let below = |e: usize| (0..e).map(move |f| e * experts + f);
        let all_pairs = terms.together.map_or(0.0, |t| (0..experts).flat_map(below).map(|i| t.counts[i]).sum());
        let mut state = Self {
            devices,
            risk,
            weight,
            windows,
            count: placement.counts(experts),
            held: placement.devices.clone(),
            holds: vec![false; experts * devices.len()],
            load: vec![0.0; windows * devices.len()],
            sends: sends.map(|(rule, price)| {
                let nodes = devices.iter().map(|d| usize::from(d.node) + 1).max().unwrap_or(1);
                let mean = weight.chunks_exact(windows).map(|w| w.iter().sum::<f64>() / windows as f64).collect();
                SendsState { rule, price, mean, mass: vec![0.0; rule.num_groups * nodes], nodes }
            }),
            terms,
            old,
            copies: 0,
            domains: terms.domains(devices),
            pairs: 0.0,
            all_pairs,
            maxima: Vec::with_capacity(windows),
        };
        for g in 0..devices.len() {
            for i in 0..state.held[g].len() {
                let e = state.held[g][i];
                state.set(e, g, true);
                state.add_piece(usize::from(e), g, 1.0);
            }
        }
        state
    }

    pub fn placement(&self) -> LayerPlacement {
        LayerPlacement { devices: self.held.clone() }
    }

    fn holds(&self, expert: u16, device: usize) -> bool {
        self.holds[usize::from(expert) * self.devices.len() + device]
    }

    fn set(&mut self, expert: u16, device: usize, held: bool) {
        let at = usize::from(expert) * self.devices.len() + device;
        self.holds[at] = held;
        if self.old.get(at) == Some(&false) {
            self.copies += if held { 1 } else { -1 };
        }
    }

    /// Tokens that chose this expert together with one that the device's domain holds, by the part that replicas there have.
    fn pairs_with(&self, expert: usize, device: usize) -> f64 {
        let Some(t) = self.terms.together else { return 0.0 };
        let row = &t.counts[expert * self.count.len()..(expert + 1) * self.count.len()];
        let mut sum = 0.0;
        for g in (0..self.devices.len()).filter(|g| self.domains[*g] == self.domains[device]) {
            for f in self.held[g].iter().filter(|f| usize::from(**f) != expert && self.holds(**f, g)) {
                sum += row[usize::from(*f)] / f64::from(self.count[usize::from(*f)]);
            }
        }
        sum
    }

    /// Adds (or with -1 takes) one replica's share of an expert's load.
    fn add_piece(&mut self, expert: usize, device: usize, sign: f64) {
        let part = sign / f64::from(self.count[expert]);
        let n = self.devices.len();
        for (w, load) in self.weight[expert * self.windows..(expert + 1) * self.windows].iter().enumerate() {
            self.load[w * n + device] += load * part;
        }
        if let Some(sends) = &mut self.sends {
            let group = sends.rule.group_of(expert, sends.mean.len());
            sends.mass[group * sends.nodes + usize::from(self.devices[device].node)] += sends.mean[expert] * part;
        }
        if self.terms.together.is_some() {
            self.pairs += part * self.pairs_with(expert, device);
        }
    }

    /// Takes or gives the shares of all replicas of an expert.
    fn all_pieces(&mut self, expert: usize, sign: f64) {
        for g in 0..self.devices.len() {
            if self.holds(expert as u16, g) {
                self.add_piece(expert, g, sign);
            }
        }
    }

    pub fn score(&mut self) -> Score {
        let n = self.devices.len();
        let mut squares = 0.0;
        self.maxima.clear();
        for row in self.load.chunks_exact(n) {
            let mut most = 0.0_f64;
            for (load, device) in row.iter().zip(self.devices) {
                let level = load * device.inverse_speed;
                squares += level * level;
                if level > most {
                    most = level;
                }
            }
            self.maxima.push(most);
        }
        let mut objective = self.risk.of(&mut self.maxima);
        if let Some(s) = &self.sends {
            objective += s.price * s.rule.sends_of_mass(&s.mass, s.nodes);
        }
        if let Some((_, price)) = self.terms.old {
            objective += price * self.copies as f64;
        }
        if let Some(t) = &self.terms.together {
            objective += t.price * (self.all_pairs - self.pairs);
        }
        Score { objective, squares }
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Shift { expert, from, to } => self.relocate(expert, from, to),
            Change::Swap { a, on_a, b, on_b } => {
                self.relocate(a, on_a, on_b);
                self.relocate(b, on_b, on_a);
            }
            Change::Add { expert, to } => self.add_replica(expert, to),
            Change::Replace { expert, to, victim } => {
                self.drop_replica(victim, to);
                self.add_replica(expert, to);
            }
        }
    }

    /// Takes a change back; experts of a device may lie in another order afterwards.
    fn revert(&mut self, change: Change) {
        match change {
            Change::Shift { expert, from, to } => self.apply(Change::Shift { expert, from: to, to: from }),
            Change::Swap { a, on_a, b, on_b } => self.apply(Change::Swap { a: b, on_a, b: a, on_b }),
            Change::Add { expert, to } => self.drop_replica(expert, to),
            Change::Replace { expert, to, victim } => {
                self.drop_replica(expert, to);
                self.add_replica(victim, to);
            }
        }
    }

    fn relocate(&mut self, expert: u16, from: u16, to: u16) {
        let (e, from, to) = (usize::from(expert), usize::from(from), usize::from(to));
        self.add_piece(e, from, -1.0);
        self.held[from].retain(|h| *h != expert);
        self.set(expert, from, false);
        self.held[to].push(expert);
        self.set(expert, to, true);
        self.add_piece(e, to, 1.0);
    }

    fn add_replica(&mut self, expert: u16, to: u16) {
        let e = usize::from(expert);
        self.all_pieces(e, -1.0);
        self.count[e] += 1;
        self.held[usize::from(to)].push(expert);
        self.set(expert, usize::from(to), true);
        self.all_pieces(e, 1.0);
    }

    fn drop_replica(&mut self, expert: u16, from: u16) {
        let e = usize::from(expert);
        self.all_pieces(e, -1.0);
        self.count[e] -= 1;
        self.held[usize::from(from)].retain(|h| *h != expert);
        self.set(expert, usize::from(from), false);
        self.all_pieces(e, 1.0);
    }

    /// Forgets the rounding errors of many changes.
    fn recount(&mut self) {
        self.load.fill(0.0);
        self.pairs = 0.0;
        if let Some(s) = &mut self.sends {
            s.mass.fill(0.0);
        }
        for g in 0..self.devices.len() {
            for i in 0..self.held[g].len() {
                self.add_piece(usize::from(self.held[g][i]), g, 1.0);
            }
        }
        // Every pair was counted from both sides.
        self.pairs /= 2.0;
    }

    /// Devices that somebody waits for: the slowest of each window, without repetitions.
    fn critical(&self, out: &mut Vec<u16>) {
        out.clear();
        for row in self.load.chunks_exact(self.devices.len()) {
            let level = |g: &usize| row[*g] * self.devices[*g].inverse_speed;
            let g = (0..row.len()).max_by(|a, b| level(a).total_cmp(&level(b))).unwrap_or(0) as u16;
            if !out.contains(&g) {
                out.push(g);
            }
        }
    }

    /// Devices by load, the least loaded first; at most `width` of them.
    fn helpers(&self, width: usize, out: &mut Vec<u16>) {
        let n = self.devices.len();
        let level = |g: &u16| {
            (0..self.windows).map(|w| self.load[w * n + usize::from(*g)]).sum::<f64>()
                * self.devices[usize::from(*g)].inverse_speed
        };
        out.clear();
        out.extend(0..n as u16);
        out.sort_by(|a, b| level(a).total_cmp(&level(b)));
        out.truncate(width);
    }

    /// Improves until nothing does, or `enough` is reached. Looks at the `width` least loaded devices as helpers.
    pub fn improve(&mut self, width: usize, enough: f64, mut rounds: usize) -> Score {
        let (mut critical, mut helpers) = (Vec::new(), Vec::new());
        let mut score = self.score();
        while score.objective > enough && rounds > 0 {
            rounds -= 1;
            self.critical(&mut critical);
            self.helpers(width, &mut helpers);
            let mut best = score;
            let mut change = self.best_exchange(&critical, &helpers, &mut best);
            if change.is_none() {
                // Replicas change many devices: few are tried when time is short.
                let few = if width < self.devices.len() { 2 } else { usize::MAX };
                change = self.best_replica(&critical, &helpers, few, &mut best);
            }
            let Some(change) = change else { break };
            self.apply(change);
            score = best;
        }
        self.recount();
        self.score()
    }

    /// Best shift or swap of an expert of a critical device.
    fn best_exchange(&mut self, critical: &[u16], helpers: &[u16], best: &mut Score) -> Option<Change> {
        if self.windows == 1 && self.sends.is_none() && self.terms.is_plain() && matches!(self.risk, Risk::Mean) {
            return self.best_exchange_of_one_window(critical[0], helpers, best);
        }
        let mut found = None;
        for &g in critical {
            for &h in helpers.iter().filter(|h| **h != g) {
                // Trying a change and taking it back changes the order within a device.
                for a in self.held[usize::from(g)].clone() {
                    if self.holds(a, usize::from(h)) {
                        continue;
                    }
                    if self.has_room(h, a) {
                        self.consider(Change::Shift { expert: a, from: g, to: h }, best, &mut found);
                    }
                    for b in self.held[usize::from(h)].clone() {
                        if !self.holds(b, usize::from(g)) && self.may_swap(a, b) {
                            self.consider(Change::Swap { a, on_a: g, b, on_b: h }, best, &mut found);
                        }
                    }
                }
            }
        }
        found
    }

    /// Room for this expert.
    fn has_room(&self, device: u16, expert: u16) -> bool {
        self.terms.has_room(self.devices, usize::from(device), &self.held[usize::from(device)], expert)
    }

    /// They take room of the same pack.
    fn may_swap(&self, a: u16, b: u16) -> bool {
        self.terms.packs.is_none() || self.terms.pack_of(a) == self.terms.pack_of(b)
    }

    fn consider(&mut self, change: Change, best: &mut Score, found: &mut Option<Change>) {
        self.apply(change);
        let score = self.score();
        self.revert(change);
        if score.beats(*best) {
            *best = score;
            *found = Some(change);
        }
    }

    /// The same by arithmetic instead of trying: the usual case, and the fast one.
    fn best_exchange_of_one_window(&mut self, g: u16, helpers: &[u16], best: &mut Score) -> Option<Change> {
        let piece = |this: &Self, e: u16| this.weight[usize::from(e)] / f64::from(this.count[usize::from(e)]);
        let inverse = |this: &Self, d: u16| this.devices[usize::from(d)].inverse_speed;
        let now = self.load[usize::from(g)] * inverse(self, g);
        // The two next slowest: the slowest of all others is one of them.
        let (mut second, mut third) = ((0.0, g), 0.0);
        for (d, load) in self.load.iter().enumerate().filter(|(d, _)| *d != usize::from(g)) {
            let level = load * self.devices[d].inverse_speed;
            if level > second.0 {
                third = second.0;
                second = (level, d as u16);
            } else if level > third {
                third = level;
            }
        }
        let mut found: Option<(f64, f64, Change)> = None;
        for &h in helpers.iter().filter(|h| **h != g) {
            let (load_g, load_h) = (self.load[usize::from(g)], self.load[usize::from(h)]);
            let others = if h == second.1 { third } else { second.0 };
            let (ig, ih) = (inverse(self, g), inverse(self, h));
            for &a in &self.held[usize::from(g)] {
                if self.holds(a, usize::from(h)) {
                    continue;
                }
                let pa = piece(self, a);
                let mut consider = |moved: f64, change: Change| {
                    if moved <= 0.0 {
                        return;
                    }
                    let (new_g, new_h) = ((load_g - moved) * ig, (load_h + moved) * ih);
                    let pair = new_g.max(new_h);
                    if pair >= now * (1.0 - LEAST_GAIN) {
                        return;
                    }
                    let most = pair.max(others);
                    let squares = new_g * new_g + new_h * new_h - now * now - (load_h * ih) * (load_h * ih);
                    if found.is_none_or(|(m, s, _)| most < m || (most == m && squares < s)) {
                        found = Some((most, squares, change));
                    }
                };
                if self.has_room(h, a) {
                    consider(pa, Change::Shift { expert: a, from: g, to: h });
                }
                for &b in &self.held[usize::from(h)] {
                    if !self.holds(b, usize::from(g)) && self.may_swap(a, b) {
                        consider(pa - piece(self, b), Change::Swap { a, on_a: g, b, on_b: h });
                    }
                }
            }
        }
        let (most, squares, change) = found?;
        let score = Score { objective: most, squares: best.squares + squares };
        score.beats(*best).then(|| {
            *best = score;
            change
        })
    }

    /// Best additional replica of an expert of a critical device, on a helper: in a free slot, or in place of a redundant replica.
    fn best_replica(&mut self, critical: &[u16], helpers: &[u16], few: usize, best: &mut Score) -> Option<Change> {
        let mut found = None;
        for &g in critical {
            let mut heaviest = self.held[usize::from(g)].clone();
            heaviest.retain(|e| self.terms.may_replicate(*e));
            if heaviest.len() > few {
                let piece = |e: &u16| self.weight[usize::from(*e) * self.windows] / f64::from(self.count[usize::from(*e)]);
                heaviest.sort_by(|a, b| piece(b).total_cmp(&piece(a)));
                heaviest.truncate(few);
            }
            for a in heaviest {
                for &h in helpers.iter().take(few) {
                    if self.holds(a, usize::from(h)) {
                        continue;
                    }
                    if self.has_room(h, a) {
                        self.consider(Change::Add { expert: a, to: h }, best, &mut found);
                        continue;
                    }
                    let victims: Vec<u16> =
                        self.held[usize::from(h)].iter().copied().filter(|v| self.count[usize::from(*v)] > 1).collect();
                    for victim in victims {
                        self.consider(Change::Replace { expert: a, to: h, victim }, best, &mut found);
                    }
                }
            }
        }
        found
    }

    /// Changes `times` replicas at random: a new start for [`Self::improve`].
    pub fn shake(&mut self, times: usize, rng: &mut impl rand::Rng) {
        let (devices, experts) = (self.devices.len(), self.count.len());
        for _ in 0..times {
            let to = rng.random_range(0..devices);
            let expert = rng.random_range(0..experts) as u16;
            if self.holds(expert, to) || !self.terms.may_replicate(expert) {
                continue;
            }
            if self.has_room(to as u16, expert) {
                self.apply(Change::Add { expert, to: to as u16 });
                continue;
            }
            if self.held[to].is_empty() {
                continue;
            }
            let victim = self.held[to][rng.random_range(0..self.held[to].len())];
            if self.count[usize::from(victim)] > 1 {
                self.apply(Change::Replace { expert, to: to as u16, victim });
            } else if !self.may_swap(expert, victim) {
                continue;
            } else if let Some(from) = (0..devices).find(|g| self.holds(expert, *g) && !self.holds(victim, *g)) {
                self.apply(Change::Swap { a: expert, on_a: from as u16, b: victim, on_b: to as u16 });
            }
        }
    }
}
