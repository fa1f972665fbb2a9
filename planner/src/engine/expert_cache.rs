//! The slots of one pool: what is in them, what is on its way, what may go. Which of them goes is the policy's choice.
//!
//! A pool of one layer is asked by expert, a pool of many by `layer_index * experts_per_layer + expert`. Nothing is allocated after
//! [`ExpertCache::new`] unless slots are added; sets are bit masks, so that candidates come out ascending without a sort. Slots that
//! were given up keep their numbers until they are added again: nothing moves when others go.

use super::cache::{CachePolicy, Seen};

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SlotState {
    Empty,
    /// An expert on its way, and how often its load failed.
    Loading {
        expert: u32,
        failures: u32,
    },
    Ready {
        expert: u32,
    },
    /// No slot any more.
    Gone,
}

const NONE: u32 = u32::MAX;

/// A slot that was given to an expert, and who had to leave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Placed {
    pub slot: u32,
    pub evicted: Option<u32>,
}

/// What became of an expert that can be used without a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    Placed(Placed),
    /// The policy values everything that could leave at least as highly.
    Bypassed,
    /// Nothing may leave now.
    Full,
}

/// A set of small numbers, ascending.
#[derive(Debug, Clone)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(len: u32) -> Self {
        Self(vec![0; len.div_ceil(64) as usize])
    }

    /// Room for numbers below `len`.
    fn reach(&mut self, len: u32) {
        let words = len.div_ceil(64) as usize;
        if words > self.0.len() {
            self.0.resize(words, 0);
        }
    }

    fn set(&mut self, i: u32) {
        self.0[i as usize / 64] |= 1 << (i % 64);
    }

    fn clear(&mut self, i: u32) {
        self.0[i as usize / 64] &= !(1 << (i % 64));
    }

    fn contains(&self, i: u32) -> bool {
        self.0[i as usize / 64] >> (i % 64) & 1 == 1
    }

    fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().enumerate().flat_map(|(i, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(i as u32 * 64 + bit)
            })
        })
    }
}

/// The slots of one pool.
#[derive(Debug)]
pub(crate) struct ExpertCache<P = Box<dyn CachePolicy>> {
    slots: Vec<SlotState>,
    /// Slot of each expert that is in one or on its way, else [`NONE`]. `[num_experts]`
    slot_of: Vec<u32>,
    /// Experts in ready slots.
    ready: Bits,
    /// Empty slots.
    empty: Bits,
    num_empty: u32,
    /// Slots that are not gone.
    held: u32,
    policy: P,
    /// Kept to spare allocations.
    candidates: Vec<u32>,
}

impl<P: CachePolicy> ExpertCache<P> {
    pub fn new(slots: u32, num_experts: u32, mut policy: P) -> Self {
        policy.on_capacity(slots);
        let mut empty = Bits::new(slots);
        (0..slots).for_each(|i| empty.set(i));
        Self {
            slots: vec![SlotState::Empty; slots as usize],
            slot_of: vec![NONE; num_experts as usize],
            ready: Bits::new(num_experts),
            empty,
            num_empty: slots,
            held: slots,
            policy,
            candidates: Vec::with_capacity(slots as usize),
        }
    }

    pub fn on_demand(&mut self, seen: &Seen<'_>) {
        self.policy.on_demand(seen);
    }

    /// The policy's worth of keeping `expert`; only the order counts.
    pub fn worth(&self, expert: u32) -> f64 {
        self.policy.worth(expert)
    }

    /// The slot in which `expert` is ready.
    pub fn ready_slot(&self, expert: u32) -> Option<u32> {
        let slot = self.slot_of[expert as usize];
        let state = *self.slots.get(slot as usize)?;
        (state == SlotState::Ready { expert }).then_some(slot)
    }

    /// What `expert`'s slot holds: [`SlotState::Empty`] when it has none.
    pub fn slot_state(&self, expert: u32) -> SlotState {
        self.slots.get(self.slot_of[expert as usize] as usize).copied().unwrap_or(SlotState::Empty)
    }

    /// Slots with their ready experts.
    pub fn ready(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.slots.iter().enumerate().filter_map(|(i, s)| match s {
            SlotState::Ready { expert } => Some((i as u32, *expert)),
            SlotState::Empty | SlotState::Loading { .. } | SlotState::Gone => None,
        })
    }

    /// Gives `expert` a slot: an empty one (the lowest), else the policy's choice among experts that are not `kept`; `None` if there is
    /// none now.
    pub fn place(&mut self, expert: u32, kept: impl Fn(u32) -> bool) -> Option<Placed> {
        let (slot, evicted) = match self.take_empty() {
            Some(slot) => (slot, None),
            None => {
                let victim = self.choose(kept)?;
                (self.evict(victim), Some(victim))
            }
        };
        Some(self.give(expert, slot, evicted))
    }

    /// Who is worth least of those that may go: `Some(None)` if there is an empty slot, `None` if nobody may go now. The policy's own
    /// choice, when it comes to that, may be another.
    pub fn would_evict(&self, kept: impl Fn(u32) -> bool) -> Option<Option<u32>> {
        if self.num_empty > 0 {
            return Some(None);
        }
        let worth = |e: u32| (self.policy.worth(e), e);
        let least = self.ready.iter().filter(|e| !kept(*e)).map(worth).reduce(|a, b| if b.0 < a.0 { b } else { a });
        least.map(|(_, e)| Some(e))
    }

    /// Whether the policy wants `expert` in the place of `victim`.
    pub fn admits(&self, expert: u32, victim: u32) -> bool {
        self.policy.admits(expert, victim)
    }

    /// As [`Self::place`], but the policy may value the incomer less than whoever would have to leave.
    pub fn place_or_bypass(&mut self, expert: u32, kept: impl Fn(u32) -> bool) -> Admission {
        if let Some(slot) = self.take_empty() {
            return Admission::Placed(self.give(expert, slot, None));
        }
        let Some(victim) = self.choose(kept) else { return Admission::Full };
        if !self.policy.admits(expert, victim) {
            return Admission::Bypassed;
        }
        let slot = self.evict(victim);
        Admission::Placed(self.give(expert, slot, Some(victim)))
    }

    fn take_empty(&mut self) -> Option<u32> {
        if self.num_empty == 0 {
            return None;
        }
        let slot = self.empty.iter().next()?;
        self.empty.clear(slot);
        self.num_empty -= 1;
        Some(slot)
    }

    fn choose(&mut self, kept: impl Fn(u32) -> bool) -> Option<u32> {
        let Self { candidates, ready, policy, .. } = self;
        if let Some(victim) = policy.first_that_may_go(&|e| ready.contains(e) && !kept(e)) {
            return victim;
        }
        candidates.clear();
        // Plain loops: an iterator over the set costs several times as much here, once per miss.
        for (word, bits) in (0..).zip(&ready.0) {
            let mut left = *bits;
            while left != 0 {
                let expert = word * 64 + left.trailing_zeros();
                left &= left - 1;
                if !kept(expert) {
                    candidates.push(expert);
                }
            }
        }
        (!candidates.is_empty()).then(|| policy.victim(candidates))
    }

    /// The slot that `victim` leaves.
    fn evict(&mut self, victim: u32) -> u32 {
        self.policy.on_evict(victim);
        self.ready.clear(victim);
        std::mem::replace(&mut self.slot_of[victim as usize], NONE)
    }

    fn give(&mut self, expert: u32, slot: u32, evicted: Option<u32>) -> Placed {
        self.slots[slot as usize] = SlotState::Loading { expert, failures: 0 };
        self.slot_of[expert as usize] = slot;
        self.policy.on_place(expert);
        Placed { slot, evicted }
    }

    /// The load of `expert` into `slot` is done; false if none was under way.
    pub fn loaded(&mut self, expert: u32, slot: u32) -> bool {
        let Some(state) = self.slots.get_mut(slot as usize) else { return false };
        let expected = matches!(*state, SlotState::Loading { expert: e, .. } if e == expert);
        if expected {
            *state = SlotState::Ready { expert };
            self.ready.set(expert);
        }
        expected
    }

    /// The load of `expert` into `slot` failed: how often now; `None` if none was under way.
    pub fn failed(&mut self, expert: u32, slot: u32) -> Option<u32> {
        match self.slots.get_mut(slot as usize) {
            Some(SlotState::Loading { expert: e, failures }) if *e == expert => {
                *failures += 1;
                Some(*failures)
            }
            _ => None,
        }
    }

    /// Empties `slot`, whatever it holds or waits for; false if it was empty or is none.
    pub fn abandon(&mut self, slot: u32) -> bool {
        let expert = match self.slots.get(slot as usize) {
            None | Some(SlotState::Empty | SlotState::Gone) => return false,
            Some(SlotState::Loading { expert, .. } | SlotState::Ready { expert }) => *expert,
        };
        self.evict(expert);
        self.slots[slot as usize] = SlotState::Empty;
        self.empty.set(slot);
        self.num_empty += 1;
        true
    }

    /// Slots that are not gone.
    pub const fn held(&self) -> u32 {
        self.held
    }

    /// The policy is to count on so many slots; they come and go one by one, by [`Self::add`] and [`Self::give_up`].
    pub fn expect(&mut self, slots: u32) {
        self.policy.on_capacity(slots);
    }

    /// One more empty slot: the lowest number that is free.
    pub fn add(&mut self) -> u32 {
        let slot = self.slots.iter().position(|s| *s == SlotState::Gone).unwrap_or(self.slots.len()) as u32;
        if slot as usize == self.slots.len() {
            self.slots.push(SlotState::Gone);
            self.empty.reach(slot + 1);
        }
        self.slots[slot as usize] = SlotState::Empty;
        self.empty.set(slot);
        self.num_empty += 1;
        self.held += 1;
        slot
    }

    /// One slot less: an empty one (the highest), else that of the policy's choice among experts that are not `kept`; `None` if there is
    /// none now.
    pub fn give_up(&mut self, kept: impl Fn(u32) -> bool) -> Option<Placed> {
        let highest = self.empty.iter().last();
        let gone = match highest {
            Some(slot) => {
                self.empty.clear(slot);
                self.num_empty -= 1;
                Placed { slot, evicted: None }
            }
            None => {
                let victim = self.choose(kept)?;
                Placed { slot: self.evict(victim), evicted: Some(victim) }
            }
        };
        self.slots[gone.slot as usize] = SlotState::Gone;
        self.held -= 1;
        Some(gone)
    }
}

#[cfg(test)]
mod tests {
    use super::super::cache::Lru;
    use super::*;

    #[test]
    fn abandoned_slots_are_free_again_lowest_first() {
        let mut c = ExpertCache::new(3, 8, Lru::new(8));
        for e in [5, 6, 7] {
            let at = c.place(e, |_| false).unwrap();
            assert_eq!((at.slot, at.evicted), (e - 5, None));
        }
        assert!(c.place(1, |_| false).is_none(), "what is on its way may not go");
        assert!(c.abandon(1) && !c.abandon(1) && !c.abandon(9));
        assert!(c.loaded(5, 0) && !c.loaded(6, 1));
        assert_eq!(c.slot_state(6), SlotState::Empty);
        assert_eq!(c.slot_state(7), SlotState::Loading { expert: 7, failures: 0 });
        assert!(c.abandon(0));
        assert_eq!(c.ready_slot(5), None);
        assert_eq!(c.place(2, |_| false), Some(Placed { slot: 0, evicted: None }));
        assert_eq!(c.place(3, |_| false), Some(Placed { slot: 1, evicted: None }));
        assert!(c.loaded(2, 0) && c.loaded(3, 1));
        c.on_demand(&Seen { experts: &[(3, 1)], tokens: 1, scores: &[] });
        assert_eq!(c.place(4, |_| false), Some(Placed { slot: 0, evicted: Some(2) }));
        assert!(c.loaded(4, 0));
        // Expert 1 was never used, nor was 4: the incomer is not worth more.
        assert_eq!(c.place_or_bypass(1, |_| false), Admission::Bypassed);
        assert_eq!(c.place_or_bypass(1, |_| true), Admission::Full);
        c.on_demand(&Seen { experts: &[(1, 1)], tokens: 1, scores: &[] });
        assert_eq!(c.place_or_bypass(1, |_| false), Admission::Placed(Placed { slot: 0, evicted: Some(4) }));
        assert!(c.worth(1) > c.worth(3));
    }

    #[test]
    fn slots_come_and_go_and_keep_their_numbers() {
        let mut c = ExpertCache::new(2, 80, Lru::new(80));
        for e in [70, 71] {
            c.place(e, |_| false).unwrap();
        }
        assert!(c.give_up(|_| false).is_none(), "what is on its way may not go");
        assert!(c.loaded(70, 0) && c.loaded(71, 1));
        assert!(c.give_up(|_| true).is_none(), "nor what is kept");
        assert_eq!(c.give_up(|e| e == 71), Some(Placed { slot: 0, evicted: Some(70) }));
        assert_eq!((c.held(), c.ready_slot(70), c.ready_slot(71), c.would_evict(|_| false)), (1, None, Some(1), Some(Some(71))));
        assert!(!c.abandon(0) && !c.loaded(70, 0));
        // The free number comes first, then new ones; empty ones go first, the highest of them first.
        assert_eq!((c.add(), c.add(), c.add(), c.held()), (0, 2, 3, 4));
        assert_eq!(c.place(5, |_| false), Some(Placed { slot: 0, evicted: None }));
        assert_eq!(c.give_up(|_| false), Some(Placed { slot: 3, evicted: None }));
        assert_eq!(c.give_up(|_| false), Some(Placed { slot: 2, evicted: None }));
        assert_eq!(c.ready().collect::<Vec<_>>(), [(1, 71)]);
        // Beyond what one word of the mask holds.
        let mut wide = ExpertCache::new(64, 80, Lru::new(80));
        assert_eq!((wide.add(), wide.add()), (64, 65));
        (0..66).for_each(|e| assert_eq!(wide.place(e, |_| false).map(|p| p.slot), Some(e)));
        assert!(wide.place(66, |_| false).is_none());
    }
}
