//! Makespans of layers whose experts take equally long, remembered.
//!
//! Where every expert of a layer takes each processor equally long and every missing one is moved equally long, the optimum depends on how
//! many there are and how many are missing, not on which: the layer's steps ask the same few questions over and over. The scheduler's own
//! answers are kept, so they are the same to the bit.

use super::schedule::{Item, LayerWork};

/// Of layers with more experts than this nothing is kept: a prompt's, which are few.
const MOST_EXPERTS: usize = 32;

/// What was asked of one layer so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Makespans {
    /// GPU, CPU, the CPU's first seconds; then move and contended of those that are missing, if one was.
    of: ([f64; 3], Option<[f64; 2]>),
    /// By experts and how many of them are missing; NaN unknown. `[experts, experts + 1]`, a triangle
    known: Vec<f64>,
}

impl Makespans {
    /// Whether it does not matter to the optimum which of the experts are missing.
    pub fn are_alike(items: &[Item]) -> bool {
        let missing = || items.iter().filter(|i| !i.is_cached());
        items.windows(2).all(|w| w[0].gpu_s == w[1].gpu_s && w[0].cpu_s == w[1].cpu_s)
            && missing().zip(missing().skip(1)).all(|(a, b)| a.move_s == b.move_s && a.contended_s == b.contended_s)
    }

    /// The makespan of `work`, whose experts are alike and of which nothing is busy before; `decide` finds it out.
    pub fn of(&mut self, work: &LayerWork, decide: impl FnOnce() -> f64) -> f64 {
        let n = work.items.len();
        let Some(first) = work.items.first().filter(|_| n <= MOST_EXPERTS) else { return decide() };
        debug_assert!(work.gpu_busy_s == 0.0 && work.link_busy_s == 0.0 && Self::are_alike(&work.items));
        let of_all = [first.gpu_s, first.cpu_s, work.cpu_first_s];
        let mut missing = work.items.iter().filter(|i| !i.is_cached());
        let of_missing = missing.next().map(|i| [i.move_s, i.contended_s]);
        let count = usize::from(of_missing.is_some()) + missing.count();
        let (all, moved) = &mut self.of;
        if *all != of_all || of_missing.is_some() && *moved != of_missing {
            *all = of_all;
            // What is known of layers without missing ones need not go, but times of a layer change once, if ever.
            *moved = of_missing.or(*moved);
            self.known.clear();
        }
        let at = n * (n + 1) / 2 + count;
        if self.known.len() <= at {
            self.known.resize((n + 1) * (n + 2) / 2, f64::NAN);
        }
        if self.known[at].is_nan() {
            self.known[at] = decide();
        }
        self.known[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::schedule::{Rule, Schedule, Scratch};
    use rand::rngs::StdRng;
    use rand::seq::SliceRandom;
    use rand::{Rng, SeedableRng};

    /// Whatever is missing in whatever order, with times that change now and then.
    #[test]
    fn they_are_those_of_the_scheduler() {
        let rng = &mut StdRng::seed_from_u64(4);
        let (mut kept, mut scratch, mut schedule) = (Makespans::default(), Scratch::default(), Schedule::default());
        let mut asked = 0;
        for round in 0..4000 {
            let times = &mut StdRng::seed_from_u64(round / 500);
            let cpu_s = if times.random_bool(0.2) { f64::INFINITY } else { times.random_range(0.5..8.0) };
            let (gpu_s, move_s, contended_s) =
                (times.random_range(0.1..2.0), times.random_range(0.5..5.0), times.random_range(0.0..3.0));
            let cpu_first_s = times.random_range(0.0..2.0);
            let (n, missing) = (rng.random_range(0..40), rng.random_range(0..40));
            let item = |expert: u32| Item { expert, gpu_s, cpu_s, move_s: 0.0, contended_s: 0.0, worth: 0.0 };
            let mut items: Vec<Item> = (0..n).map(item).collect();
            items.iter_mut().take(missing).for_each(|i| (i.move_s, i.contended_s) = (move_s, contended_s));
            items.shuffle(rng);
            let work = LayerWork { items, cpu_first_s, ..LayerWork::default() };
            Rule::Exact.decide(&work, &mut scratch, &mut schedule);
            let found = kept.of(&work, || {
                asked += 1;
                schedule.makespan_s
            });
            assert_eq!(found.to_bits(), schedule.makespan_s.to_bits(), "{work:?}");
        }
        assert!(asked < 3600, "nothing was remembered: {asked}");
        // Unequal ones are not alike.
        let item = |gpu_s: f64, move_s: f64| Item { expert: 0, gpu_s, cpu_s: 1.0, move_s, contended_s: 0.0, worth: 0.0 };
        assert!(Makespans::are_alike(&[item(1.0, 0.0), item(1.0, 2.0), item(1.0, 2.0)]));
        assert!(!Makespans::are_alike(&[item(1.0, 0.0), item(2.0, 0.0)]));
        assert!(!Makespans::are_alike(&[item(1.0, 3.0), item(1.0, 0.0), item(1.0, 2.0)]));
    }
}
