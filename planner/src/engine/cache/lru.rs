//! Least recently used. Experts of one demand were used at the same time; among them the one with the smallest number goes first.
//!
//! Residents form a list in the order in which they go, so that a victim is found without looking at all of them.

use super::{CachePolicy, Seen};

/// When each expert was last demanded.
#[derive(Debug, Clone)]
pub struct Lru {
    /// Number of the latest demand: whole, and exact far beyond any number of demands.
    now: f64,
    /// Number of the demand that last asked for it; 0 never. `[num_experts]`
    last_used: Vec<f64>,
    /// Neighbours of each resident; the last entry is the list's two ends. `[num_experts + 1]`
    links: Vec<Link>,
}

/// A resident's place in the list. Of an expert that is not resident: itself on both sides.
#[derive(Debug, Clone, Copy)]
struct Link {
    /// Who goes before it.
    before: u32,
    /// Who goes after it.
    after: u32,
}

impl Lru {
    /// Nothing was used yet.
    pub fn new(num_experts: u32) -> Self {
        let links = (0..=num_experts).map(|e| Link { before: e, after: e }).collect();
        Self { now: 0.0, last_used: vec![0.0; num_experts as usize], links }
    }

    const fn ends(&self) -> u32 {
        self.last_used.len() as u32
    }

    fn link(&mut self, expert: u32) -> &mut Link {
        &mut self.links[expert as usize]
    }

    fn remove(&mut self, expert: u32) {
        let Link { before, after } = *self.link(expert);
        self.link(before).after = after;
        self.link(after).before = before;
        *self.link(expert) = Link { before: expert, after: expert };
    }

    /// Puts a resident where it belongs, which is near the end unless it was given a slot without having been demanded.
    fn insert(&mut self, expert: u32) {
        let order = |e: u32| (self.last_used[e as usize], e);
        let mut before = self.links[self.ends() as usize].before;
        while before != self.ends() && order(before) > order(expert) {
            before = self.links[before as usize].before;
        }
        let after = self.link(before).after;
        *self.link(expert) = Link { before, after };
        self.link(before).after = expert;
        self.link(after).before = expert;
    }
}

impl CachePolicy for Lru {
    fn on_demand(&mut self, seen: &Seen<'_>) {
        self.now += 1.0;
        for (e, _) in seen.experts {
            self.last_used[*e as usize] = self.now;
            if self.links[*e as usize].before != *e {
                self.remove(*e);
                self.insert(*e);
            }
        }
    }

    fn worth(&self, expert: u32) -> f64 {
        self.last_used[expert as usize]
    }

    fn first_that_may_go(&self, may_go: &dyn Fn(u32) -> bool) -> Option<Option<u32>> {
        let mut expert = self.links[self.ends() as usize].after;
        while expert != self.ends() {
            if may_go(expert) {
                return Some(Some(expert));
            }
            expert = self.links[expert as usize].after;
        }
        Some(None)
    }

    fn on_place(&mut self, expert: u32) {
        self.remove(expert);
        self.insert(expert);
    }

    fn on_evict(&mut self, expert: u32) {
        self.remove(expert);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cache::ExpertCache;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// The rule without the list: the common one over all candidates.
    #[derive(Debug)]
    struct Plain(Vec<f64>, f64);

    impl CachePolicy for Plain {
        fn on_demand(&mut self, seen: &Seen<'_>) {
            self.1 += 1.0;
            seen.experts.iter().for_each(|(e, _)| self.0[*e as usize] = self.1);
        }

        fn worth(&self, expert: u32) -> f64 {
            self.0[expert as usize]
        }
    }

    /// Demands, places with and without demand, failures and evictions in random order.
    #[test]
    fn the_list_chooses_as_the_plain_rule() {
        let rng = &mut StdRng::seed_from_u64(5);
        for _ in 0..200 {
            let (experts, slots) = (rng.random_range(2..90u32), rng.random_range(1..20u32));
            let mut fast = ExpertCache::new(slots, experts, Lru::new(experts));
            let mut plain = ExpertCache::new(slots, experts, Plain(vec![0.0; experts as usize], 0.0));
            for _ in 0..120 {
                let expert = rng.random_range(0..experts);
                let kept = rng.random_range(0..experts);
                match rng.random_range(0..10) {
                    0..4 => {
                        let mut demand: Vec<(u32, u32)> = (0..4).map(|_| (rng.random_range(0..experts), 1)).collect();
                        demand.sort_unstable();
                        demand.dedup();
                        let seen = Seen { experts: &demand, tokens: 1, scores: &[] };
                        fast.on_demand(&seen);
                        plain.on_demand(&seen);
                    }
                    4..9 if fast.slot_state(expert) == plain.slot_state(expert) && fast.ready_slot(expert).is_none() => {
                        if fast.slot_state(expert) != crate::engine::expert_cache::SlotState::Empty {
                            continue;
                        }
                        let placed = fast.place(expert, |e| e == kept);
                        assert_eq!(placed, plain.place(expert, |e| e == kept));
                        if let Some(at) = placed.filter(|_| rng.random_bool(0.8)) {
                            assert!(fast.loaded(expert, at.slot) && plain.loaded(expert, at.slot));
                        }
                    }
                    _ => {
                        let slot = rng.random_range(0..slots);
                        assert_eq!(fast.abandon(slot), plain.abandon(slot));
                    }
                }
                assert_eq!(fast.ready().collect::<Vec<_>>(), plain.ready().collect::<Vec<_>>());
            }
        }
    }
}
