//! The arrangements of one layer that use the same fast bytes: experts pinned there, slots for the others, or some of both.

use crate::evaluate::LayerPlacement;
use crate::problem::Problem;

/// A layer whose fast memory may be shared between pinned experts and slots.
#[derive(Debug)]
pub(super) struct Alternatives {
    /// As it was given.
    given: LayerPlacement,
    /// Experts in the fast memory or in the one below it, most popular first.
    group: Vec<u32>,
    /// What the fast memory holds of them: pinned experts and slots.
    pub fast: u32,
    /// Index of the fast memory.
    pub fast_memory: usize,
    /// Index of the memory below it.
    pub slow_memory: usize,
    /// Tiers: pinned in the fast memory; loaded into its slots; computed where they lie below it (there is none on a disk).
    pinned_tier: u8,
    cached_tier: u8,
    slow_tier: Option<u8>,
}

impl Alternatives {
    /// `None` when there is nothing to choose: no link to load over, nothing or everything in the fast memory.
    pub fn new(problem: &Problem<'_>, layer: usize, given: &LayerPlacement) -> Option<Self> {
        let tier = |t: u8| &problem.tiers[usize::from(t)];
        let count = |memory: &str| given.tier_of.iter().filter(|t| tier(**t).memory == memory).count();
        let numbers = || (0..problem.tiers.len()).map(|t| t as u8);
        // The cache that the layer has, else the one beside the main processor for the memory with most of the other experts.
        let cached_tier = numbers().find(|t| tier(*t).through.is_some() && given.tier_of.contains(t)).or_else(|| {
            numbers()
                .filter(|t| tier(*t).through.as_deref() == Some(&problem.main.memory) && count(&tier(*t).memory) > 0)
                .max_by_key(|t| count(&tier(*t).memory))
        })?;
        let (slow, fast) = (tier(cached_tier).memory.clone(), tier(cached_tier).through.clone()?);
        let direct = |memory: &str| numbers().find(|t| tier(*t).memory == memory && tier(*t).through.is_none());
        let group: Vec<u32> = problem.layers[layer]
            .by_popularity
            .iter()
            .copied()
            .filter(|e| {
                let t = tier(given.tier_of[*e as usize]);
                t.memory == slow || (t.memory == fast && t.through.is_none())
            })
            .collect();
        let held = count(&fast) as u32 + given.slots;
        (held > 0 && (held as usize) < group.len()).then_some(Self {
            given: given.clone(),
            group,
            fast: held,
            fast_memory: problem.memory_index(&fast),
            slow_memory: problem.memory_index(&slow),
            pinned_tier: direct(&fast)?,
            cached_tier,
            slow_tier: direct(&slow),
        })
    }

    /// The most popular `pinned` experts in the fast memory for good, the rest of its room as slots. Below the number of experts that
    /// the fast memory holds.
    pub fn with_slots(&self, pinned: u32) -> LayerPlacement {
        self.arranged(pinned, self.cached_tier, self.fast - pinned)
    }

    /// Without slots: as given, or else the most popular experts pinned and the others computed where they lie. From a disk nothing is
    /// computed, so one slot stays.
    pub fn without_cache(&self) -> LayerPlacement {
        match self.slow_tier {
            _ if self.given.slots == 0 => self.given.clone(),
            Some(slow) => self.arranged(self.fast, slow, 0),
            None => self.with_slots(self.fast - 1),
        }
    }

    /// Numbers of pinned experts to try beside slots: eighths of what the fast memory holds, and as many as were given.
    pub fn shares_to_pin(&self) -> Vec<u32> {
        let given = (self.given.slots > 0).then(|| self.fast - self.given.slots);
        let mut shares: Vec<u32> = (1..8).map(|eighth| self.fast * eighth / 8).chain(given).filter(|n| *n > 0).collect();
        shares.sort_unstable();
        shares.dedup();
        shares
    }

    fn arranged(&self, pinned: u32, below: u8, slots: u32) -> LayerPlacement {
        let mut placement = LayerPlacement { tier_of: self.given.tier_of.clone(), slots };
        for (rank, e) in self.group.iter().enumerate() {
            placement.tier_of[*e as usize] = if rank < pinned as usize { self.pinned_tier } else { below };
        }
        placement
    }
}
