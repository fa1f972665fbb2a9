//! New numbers of slots while a run goes on: asked for by any thread, taken by the driver between two demands.
//!
//! Memory for slots that are to come is mapped before the engine is told, so that a system without room refuses and the run goes on as it
//! was. Memory of slots that go is unmapped at once, a few after every demand, as the engine says.

use super::Driver;
use crate::error::{Result, RuntimeError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tierwise_planner::engine::{Input, SlotId};

/// The slots, and what became of the last change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotSizes {
    /// Slots of each cache pool.
    pub held: Vec<u32>,
    /// Slots that each is to have.
    pub target: Vec<u32>,
    /// Changes asked for so far.
    pub changes: u64,
    /// Time from the last change's asking to the last slot that came or went for it; `None` until then, or without a change.
    pub took: Option<Duration>,
    /// Why the last change was refused by the system, if it was.
    pub refused: Option<String>,
    /// The run is over: what is still to change never will.
    pub ended: bool,
}

impl SlotSizes {
    /// Whether nothing is still to come or to go.
    pub fn is_settled(&self) -> bool {
        self.changes == 0 || self.took.is_some() || self.refused.is_some()
    }
}

#[derive(Debug, Default)]
struct State {
    wanted: Option<Vec<u32>>,
    asked_at: Option<Instant>,
    sizes: SlotSizes,
}

/// Through which other threads ask for other numbers of slots, and see what there is.
#[derive(Debug, Default)]
pub struct SlotControl {
    /// There is something to take: looked at before every demand, so without a lock.
    waiting: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl SlotControl {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for these numbers of slots, by cache pool; they replace those that were asked for and not yet taken.
    pub fn ask(&self, slots: Vec<u32>) {
        let mut state = self.lock();
        state.sizes.target.clone_from(&slots);
        state.sizes.changes += 1;
        (state.sizes.took, state.sizes.refused) = (None, None);
        state.wanted = Some(slots);
        state.asked_at = Some(Instant::now());
        drop(state);
        self.waiting.store(true, Ordering::Release);
    }

    /// What there is now.
    pub fn sizes(&self) -> SlotSizes {
        self.lock().sizes.clone()
    }

    /// Waits until nothing is still to come or to go, the run ends, or `most` has passed.
    pub fn wait(&self, most: Duration) -> SlotSizes {
        let still = |s: &mut State| !s.sizes.is_settled() && !s.sizes.ended;
        let (state, _) = self.changed.wait_timeout_while(self.lock(), most, still).unwrap_or_else(PoisonError::into_inner);
        state.sizes.clone()
    }

    fn take(&self) -> Option<Vec<u32>> {
        if !self.waiting.swap(false, Ordering::Acquire) {
            return None;
        }
        self.lock().wanted.take()
    }

    /// The system refused what was taken last; the slots stay as they were to be before.
    fn refuse(&self, target: Vec<u32>, reason: String) {
        let mut state = self.lock();
        // Unless something else is wanted by now.
        if state.wanted.is_none() {
            (state.sizes.target, state.sizes.refused) = (target, Some(reason));
        }
        drop(state);
        self.changed.notify_all();
    }

    fn note(&self, note: impl FnOnce(&mut SlotSizes)) {
        let mut state = self.lock();
        note(&mut state.sizes);
        let SlotSizes { held, target, took, refused, .. } = &state.sizes;
        // What was not taken yet is not there by chance.
        if held == target && took.is_none() && refused.is_none() && state.wanted.is_none() {
            state.sizes.took = state.asked_at.map(|t| t.elapsed());
        }
        drop(state);
        self.changed.notify_all();
    }
}

impl Driver {
    /// The driver's end of the control; other threads may hold the other.
    pub const fn control(&self) -> &std::sync::Arc<SlotControl> {
        &self.control
    }

    /// Tells the control what slots there are at the start.
    pub(super) fn tell_sizes(&self) {
        let (held, target) = self.engine.pool_sizes().unzip();
        self.control.note(|s| (s.held, s.target) = (held, target));
    }

    /// Takes the numbers of slots that were asked for since the last demand.
    pub fn take_new_sizes(&mut self) {
        let Some(slots) = self.control.take() else { return };
        if let Err(e) = self.resize(slots) {
            let target: Vec<u32> = self.engine.pool_sizes().map(|(_, target)| target).collect();
            self.control.refuse(target, e.to_string());
        }
    }

    /// The cache pools are to have these numbers of slots.
    fn resize(&mut self, slots: Vec<u32>) -> Result<()> {
        let sizes: Vec<(u32, u32)> = self.engine.pool_sizes().collect();
        if slots.len() != sizes.len() {
            return Err(RuntimeError::BadRequest {
                what: "another number of slots",
                found: format!("numbers for {} pools", slots.len()),
                expected: format!("one for each of the {} pools", sizes.len()),
            });
        }
        let missing =
            |(i, (wanted, (held, _))): (usize, (&u32, &(u32, u32)))| self.slots.spare(i, wanted.saturating_sub(*held) as usize);
        self.spare = slots.iter().zip(&sizes).enumerate().map(missing).collect::<Result<_>>()?;
        self.input(Input::Resize { slots });
        self.start_loads();
        self.control.note(|_| {});
        Ok(())
    }

    /// A slot that the engine added.
    pub(super) fn allocate(&mut self, slot: SlotId) {
        match self.spare.get_mut(slot.pool as usize).and_then(Vec::pop) {
            Some(buffer) => self.slots.add(slot, buffer),
            None => self.stopped = Some("a slot was added without memory for it: an error in Tierwise".to_string()),
        }
        self.control.note(|s| s.held[slot.pool as usize] += 1);
    }

    /// A slot that the engine gave up.
    pub(super) fn release(&mut self, slot: SlotId) {
        self.slots.release(slot);
        self.control.note(|s| s.held[slot.pool as usize] -= 1);
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.control.note(|s| s.ended = true);
    }
}
