//! The slots of one layer: what is in them, what is on its way, what may go. Which of them goes is the policy's choice.

use super::cache::{CachePolicy, Seen};

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlotState {
    Empty,
    /// An expert on its way, and how often its load failed.
    Loading {
        expert: u32,
        failures: u32,
    },
    Ready {
        expert: u32,
    },
}

const NONE: u32 = u32::MAX;

/// A slot that was given to an expert, and who had to leave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placed {
    pub slot: u32,
    pub evicted: Option<u32>,
}

/// The slots of one layer.
#[derive(Debug)]
pub(super) struct ExpertCache {
    slots: Vec<SlotState>,
    /// Slot of each expert that is in one or on its way, else [`NONE`]. `[num_experts]`
    slot_of: Vec<u32>,
    policy: Box<dyn CachePolicy>,
    /// Kept to spare allocations.
    candidates: Vec<u32>,
}

impl ExpertCache {
    pub fn new(slots: u32, num_experts: u32, policy: Box<dyn CachePolicy>) -> Self {
        Self {
            slots: vec![SlotState::Empty; slots as usize],
            slot_of: vec![NONE; num_experts as usize],
            policy,
            candidates: Vec::with_capacity(slots as usize),
        }
    }

    pub fn on_demand(&mut self, seen: &Seen<'_>) {
        self.policy.on_demand(seen);
    }

    /// The slot in which `expert` is ready.
    pub fn ready_slot(&self, expert: u32) -> Option<u32> {
        let slot = self.slot_of[expert as usize];
        let state = *self.slots.get(slot as usize)?;
        (state == SlotState::Ready { expert }).then_some(slot)
    }

    /// Whether `expert` is on its way.
    pub fn is_loading(&self, expert: u32) -> bool {
        let state = self.slots.get(self.slot_of[expert as usize] as usize);
        matches!(state, Some(SlotState::Loading { .. }))
    }

    /// Gives up the load into `slot`, which is empty then.
    pub fn abandon(&mut self, slot: u32) {
        if let Some(SlotState::Loading { expert, .. }) = self.slots.get(slot as usize).copied() {
            self.slot_of[expert as usize] = NONE;
            self.slots[slot as usize] = SlotState::Empty;
        }
    }

    /// What the policy thinks that keeping `expert` is worth.
    pub fn worth(&self, expert: u32) -> f64 {
        self.policy.worth(expert)
    }

    /// Whether the policy wants `expert` in the place of `victim`.
    pub fn admits(&self, expert: u32, victim: u32) -> bool {
        self.policy.admits(expert, victim)
    }

    /// Whom [`Self::place`] would evict: `Some(None)` if there is an empty slot, `None` if nobody may go now.
    pub fn would_evict(&mut self, kept: impl Fn(u32) -> bool) -> Option<Option<u32>> {
        if self.slots.contains(&SlotState::Empty) {
            return Some(None);
        }
        let mut candidates: Vec<u32> = self.ready().map(|(_, e)| e).filter(|e| !kept(*e)).collect();
        candidates.sort_unstable();
        if candidates.is_empty() { None } else { Some(Some(self.policy.victim(&candidates))) }
    }

    /// Slots with their ready experts.
    pub fn ready(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.slots.iter().enumerate().filter_map(|(i, s)| match s {
            SlotState::Ready { expert } => Some((i as u32, *expert)),
            SlotState::Empty | SlotState::Loading { .. } => None,
        })
    }

    /// Gives `expert` a slot: an empty one, else the policy's choice among experts that are not `kept`; `None` if there is none now.
    pub fn place(&mut self, expert: u32, kept: impl Fn(u32) -> bool) -> Option<Placed> {
        let (slot, evicted) = match self.slots.iter().position(|s| *s == SlotState::Empty) {
            Some(slot) => (slot, None),
            None => {
                let mut candidates = std::mem::take(&mut self.candidates);
                candidates.clear();
                candidates.extend(self.ready().map(|(_, e)| e).filter(|e| !kept(*e)));
                candidates.sort_unstable();
                let victim = if candidates.is_empty() { None } else { Some(self.policy.victim(&candidates)) };
                self.candidates = candidates;
                let victim = victim?;
                let slot = self.slot_of[victim as usize] as usize;
                self.slot_of[victim as usize] = NONE;
                (slot, Some(victim))
            }
        };
        self.slots[slot] = SlotState::Loading { expert, failures: 0 };
        self.slot_of[expert as usize] = slot as u32;
        Some(Placed { slot: slot as u32, evicted })
    }

    /// The load of `expert` into `slot` is done; false if none was under way.
    pub fn loaded(&mut self, expert: u32, slot: u32) -> bool {
        let Some(state) = self.slots.get_mut(slot as usize) else { return false };
        let expected = matches!(*state, SlotState::Loading { expert: e, .. } if e == expert);
        if expected {
            *state = SlotState::Ready { expert };
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
}
