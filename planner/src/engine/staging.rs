//! Slots through which experts pass that are not to stay: moved, computed, forgotten. All layers share them.
//!
//! Some plans let misses of any step pass through; prompts that are streamed bring their experts through them, those of the next layer
//! ahead of its demand.

use super::SlotId;
use super::pool::Presence;

/// An expert that passes through.
#[derive(Debug, Clone, Copy)]
struct Guest {
    layer: u32,
    expert: u32,
    ready: bool,
    failures: u32,
    /// It was sent for before anyone asked.
    ahead: bool,
    /// On its way, and of no use any more.
    unwanted: bool,
}

/// What a guest was when its load ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Arrival {
    /// Its load was not a demand's.
    pub ahead: bool,
    /// Nobody needs it any more; its slot is free again.
    pub unwanted: bool,
    /// How often its load failed.
    pub failures: u32,
}

#[derive(Debug)]
pub(super) struct Staging {
    pool: u32,
    /// Guests at a time of steps that are not streamed prompts.
    passing: usize,
    slots: Vec<Option<Guest>>,
    /// Where the search for a free slot begins: the one that was left longest ago is likeliest to be done with.
    next: usize,
}

impl Staging {
    pub fn new(pool: u32, slots: u32, passing: u32) -> Self {
        Self { pool, passing: passing as usize, slots: vec![None; slots as usize], next: 0 }
    }

    /// Is this slot one of these?
    pub const fn owns(&self, slot: SlotId) -> bool {
        slot.pool == self.pool
    }

    /// Lets an expert in, if there is room: for a streamed prompt in any slot, else in as many as the plan lets pass.
    pub fn admit(&mut self, layer: u32, expert: u32, streamed: bool, ahead: bool) -> Option<SlotId> {
        let n = self.slots.len();
        if !streamed && self.slots.iter().flatten().count() >= self.passing {
            return None;
        }
        // Without streaming the lowest free one: what was recorded before there was streaming replays.
        let first = if streamed { self.next } else { 0 };
        let index = (0..n).map(|i| (first + i) % n).find(|i| self.slots[*i].is_none())?;
        self.next = (index + 1) % n;
        self.slots[index] = Some(Guest { layer, expert, ready: false, failures: 0, ahead, unwanted: false });
        Some(SlotId { pool: self.pool, index: index as u32 })
    }

    /// Where an expert stands here.
    pub fn presence(&self, layer: u32, expert: u32) -> Presence {
        let is = |g: &Guest| (g.layer, g.expert, g.unwanted) == (layer, expert, false);
        match self.slots.iter().position(|s| s.as_ref().is_some_and(is)) {
            Some(i) if self.slots[i].is_some_and(|g| g.ready) => Presence::Ready(SlotId { pool: self.pool, index: i as u32 }),
            Some(_) => Presence::Loading,
            None => Presence::Absent,
        }
    }

    /// The guests of a layer that it does not want leave, at once or when they have come.
    pub fn dismiss(&mut self, layer: u32, wanted: impl Fn(u32) -> bool) {
        for slot in &mut self.slots {
            let Some(guest) = slot.as_mut().filter(|g| g.layer == layer && !g.unwanted && !wanted(g.expert)) else { continue };
            if guest.ready {
                *slot = None;
            } else {
                guest.unwanted = true;
            }
        }
    }

    fn guest(&mut self, layer: u32, expert: u32, slot: SlotId) -> Option<&mut Option<Guest>> {
        let guest = self.slots.get_mut(slot.index as usize)?;
        guest.is_some_and(|g| (g.layer, g.expert, g.ready) == (layer, expert, false)).then_some(guest)
    }

    /// The load is done; `None` if none was under way.
    pub fn loaded(&mut self, layer: u32, expert: u32, slot: SlotId) -> Option<Arrival> {
        let place = self.guest(layer, expert, slot)?;
        let Guest { ahead, unwanted, failures, .. } = (*place)?;
        *place = place.map(|g| Guest { ready: true, ..g }).filter(|g| !g.unwanted);
        Some(Arrival { ahead, unwanted, failures })
    }

    /// The load failed: how often now; `None` if none was under way. Unwanted ones leave.
    pub fn failed(&mut self, layer: u32, expert: u32, slot: SlotId) -> Option<Arrival> {
        let place = self.guest(layer, expert, slot)?;
        let Guest { ahead, unwanted, failures, .. } = (*place)?;
        *place = place.map(|g| Guest { failures: failures + 1, ..g }).filter(|g| !g.unwanted);
        Some(Arrival { ahead, unwanted, failures: failures + 1 })
    }

    /// Gives up what is on its way into a slot.
    pub fn abandon(&mut self, slot: SlotId) {
        if let Some(place) = self.slots.get_mut(slot.index as usize) {
            *place = None;
        }
    }

    /// The expert has been computed, from here or from elsewhere.
    pub fn leave(&mut self, layer: u32, expert: u32) {
        for slot in &mut self.slots {
            if slot.is_some_and(|g| (g.layer, g.expert, g.ready) == (layer, expert, true)) {
                *slot = None;
            }
        }
    }
}
