//! The slowest device under an exact split, by looking at all cuts: for few devices.
//!
//! Tokens of experts all of whose holders are in a set of devices cannot leave the set, so it is at least as slow as its mean; by max-flow
//! min-cut the worst set is as slow as the exact split is. With at most [`MOST_DEVICES`] devices all sets are one short row of numbers, and
//! another set of holders of an expert adds its load to some of them and takes it from others: no flow has to be found, and a change is
//! weighed some thirty times sooner. [`super::split`] is the oracle.

use super::holders::LayerPlacement;
use super::place::DeviceSpec;

/// More devices have too many sets.
pub(super) const MOST_DEVICES: usize = 8;

/// Sets are looked at so many at a time; there are at least as many.
const LANES: usize = 4;

/// Another set of devices for an expert.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewHolders {
    pub expert: u16,
    /// The bit of each device that holds it.
    pub set: u16,
}

/// Every set's load, scenario by scenario, and a change that is looked at.
pub(super) struct Cuts {
    num_devices: usize,
    /// All devices' speed over the set's; 0 for the empty one. `[sets]`
    inverse: Vec<f64>,
    /// Parts of all load. `[scenarios][experts]`
    weight: Vec<f64>,
    /// Load that cannot leave the set, as a multiple of the set's share. `[scenarios][sets]`
    level: Vec<f64>,
    /// `[experts]`
    holders: Vec<u16>,
    change: [NewHolders; 2],
    /// How much of its share a set gets from the whole load of each changed expert. `[sets]`
    gain: [Vec<f64>; 2],
}

/// Every holder is in the set: tokens cannot leave it.
const fn confined(holders: u16, set: usize) -> bool {
    holders as usize & !set == 0
}

impl Cuts {
    /// Of a placement on at most [`MOST_DEVICES`] devices. `windows`: `[scenarios][experts]`
    pub(super) fn new(windows: &[Vec<f64>], devices: &[DeviceSpec], placement: &LayerPlacement) -> Self {
        let num_experts = windows[0].len();
        let sets = (1_usize << devices.len()).max(LANES);
        let speed = |set: usize| {
            devices.iter().enumerate().filter(|(g, _)| set >> g & 1 == 1).map(|(_, d)| 1.0 / d.inverse_speed).sum::<f64>()
        };
        let all = speed(usize::MAX);
        let inverse = (0..sets).map(|set| if speed(set) > 0.0 { all / speed(set) } else { 0.0 }).collect();
        let part = |w: &Vec<f64>| {
            let total: f64 = w.iter().sum();
            let scale = if total > 0.0 { 1.0 / total } else { 0.0 };
            w.iter().map(move |x| x * scale).collect::<Vec<f64>>()
        };
        let nothing = NewHolders { expert: 0, set: 0 };
        let mut cuts = Self {
            num_devices: devices.len(),
            inverse,
            weight: windows.iter().flat_map(part).collect(),
            level: vec![0.0; windows.len() * sets],
            holders: vec![0; num_experts],
            change: [nothing; 2],
            gain: [vec![0.0; sets], vec![0.0; sets]],
        };
        cuts.place(placement);
        cuts
    }

    /// Of another placement on the same devices.
    pub(super) fn place(&mut self, placement: &LayerPlacement) {
        self.holders.fill(0);
        for (g, held) in placement.devices.iter().enumerate() {
            held.iter().for_each(|e| self.holders[usize::from(*e)] |= 1 << g);
        }
        let sets = self.inverse.len();
        for (level, weight) in self.level.chunks_exact_mut(sets).zip(self.weight.chunks_exact(self.holders.len())) {
            level.fill(0.0);
            for (holders, w) in self.holders.iter().zip(weight) {
                level[usize::from(*holders)] += w;
            }
            // Sums over subsets, one device after the other.
            for g in 0..self.num_devices {
                for set in (0..sets).filter(|set| set >> g & 1 == 1) {
                    level[set] += level[set ^ (1 << g)];
                }
            }
            level.iter_mut().zip(&self.inverse).for_each(|(l, i)| *l *= i);
        }
        self.look_at_none();
    }

    /// The devices that hold an expert.
    pub(super) fn holders(&self, expert: u16) -> u16 {
        self.holders[usize::from(expert)]
    }

    /// From now on [`Self::excess`] is that with these two different experts on other devices.
    pub(super) fn look_at(&mut self, change: [NewHolders; 2]) {
        for (new, gain) in change.iter().zip(&mut self.gain) {
            let old = self.holders[usize::from(new.expert)];
            for (set, (gain, inverse)) in gain.iter_mut().zip(&self.inverse).enumerate() {
                *gain = inverse * f64::from(i8::from(confined(new.set, set)) - i8::from(confined(old, set)));
            }
        }
        self.change = change;
    }

    /// From now on [`Self::excess`] is that of the placement as it is.
    pub(super) fn look_at_none(&mut self) {
        self.gain.iter_mut().for_each(|g| g.fill(0.0));
        self.change = [NewHolders { expert: 0, set: self.holders[0] }; 2];
    }

    /// Makes what was looked at the placement.
    pub(super) fn accept(&mut self) {
        let (sets, experts) = (self.inverse.len(), self.holders.len());
        let [a, b] = self.change.map(|c| usize::from(c.expert));
        for (level, weight) in self.level.chunks_exact_mut(sets).zip(self.weight.chunks_exact(experts)) {
            for (level, (x, y)) in level.iter_mut().zip(self.gain[0].iter().zip(&self.gain[1])) {
                *level += weight[a] * x + weight[b] * y;
            }
        }
        self.change.iter().for_each(|c| self.holders[usize::from(c.expert)] = c.set);
        self.look_at_none();
    }

    /// The slowest device in a scenario as a multiple of the mean, 1 or more, with the change that is looked at.
    pub(super) fn excess(&self, scenario: usize) -> f64 {
        let (sets, experts) = (self.inverse.len(), self.holders.len());
        let weight = &self.weight[scenario * experts..(scenario + 1) * experts];
        let [a, b] = self.change.map(|c| weight[usize::from(c.expert)]);
        let level = &self.level[scenario * sets..(scenario + 1) * sets];
        let mut most = [1.0_f64; LANES];
        let gains = self.gain[0].chunks_exact(LANES).zip(self.gain[1].chunks_exact(LANES));
        for (level, (x, y)) in level.chunks_exact(LANES).zip(gains) {
            for i in 0..LANES {
                let now = level[i] + (a * x[i] + b * y[i]);
                most[i] = if now > most[i] { now } else { most[i] };
            }
        }
        most.into_iter().fold(1.0, f64::max)
    }

    /// The devices of the worst set in a scenario, as the placement is.
    pub(super) fn binding(&self, scenario: usize) -> impl Iterator<Item = usize> + use<> {
        let sets = self.inverse.len();
        let level = &self.level[scenario * sets..(scenario + 1) * sets];
        let worst = (0..sets).max_by(|a, b| level[*a].total_cmp(&level[*b])).unwrap_or(0);
        (0..self.num_devices).filter(move |g| worst >> g & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::judge::Judge;
    use super::super::place::PlaceOptions;
    use super::super::terms::Terms;
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// Cuts of random placements, and of each after many changes, are what splits are.
    #[test]
    fn the_worst_cut_is_what_an_exact_split_reaches() {
        let mut rng = StdRng::seed_from_u64(5);
        for round in 0..60 {
            let (num_devices, experts) = (1 + round % MOST_DEVICES, rng.random_range(2..24));
            let devices: Vec<DeviceSpec> = (0..num_devices)
                .map(|_| DeviceSpec { node: 0, inverse_speed: rng.random_range(0.5..2.0), slots: experts as u32 })
                .collect();
            // Some windows are empty, and so are some experts.
            let mut load = |w: usize| if w == 3 || rng.random_bool(0.1) { 0.0 } else { rng.random_range(0.0..50.0) };
            let windows: Vec<Vec<f64>> = (0..4).map(|w| (0..experts).map(|_| load(w)).collect()).collect();
            let random_set = |rng: &mut StdRng| rng.random_range(1..1_u16 << num_devices);
            let mut sets: Vec<u16> = (0..experts).map(|_| random_set(&mut rng)).collect();
            let placement = |sets: &[u16]| LayerPlacement {
                devices: (0..num_devices)
                    .map(|g| (0..experts as u16).filter(|e| sets[usize::from(*e)] >> g & 1 == 1).collect())
                    .collect(),
            };
            let options = PlaceOptions::default();
            let mut judge = Judge::new(&windows, &devices, &options, Terms::default());
            let mut cuts = Cuts::new(&windows, &devices, &placement(&sets));
            for _ in 0..20 {
                let a = rng.random_range(0..experts);
                let b = (a + rng.random_range(1..experts)) % experts;
                (sets[a], sets[b]) = (random_set(&mut rng), random_set(&mut rng));
                cuts.look_at([a, b].map(|e| NewHolders { expert: e as u16, set: sets[e] }));
                let holders = placement(&sets).holders(experts);
                for w in 0..4 {
                    let (flow, cut) = (judge.excess(&holders, w), cuts.excess(w));
                    assert!((flow - cut).abs() <= 1e-6, "round {round}, window {w}: {flow} by flow, {cut} by cuts");
                }
                let looked = cuts.excess(0);
                cuts.accept();
                assert!((cuts.excess(0) - looked).abs() <= 1e-12);
                assert!(cuts.holders(a as u16) == sets[a] && cuts.holders(b as u16) == sets[b]);
            }
        }
    }
}
