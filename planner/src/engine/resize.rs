//! Slots that come and go while a run goes on.
//!
//! A new size is reached in stages, so that nothing waits longer than for one layer's copy: at most as many slots as a token takes of
//! a layer's experts change at a safe point, which is the end of a demand, or any event while none is served. Whose expert goes is the
//! policy's choice; nothing demanded goes before it was computed, and what is on its way arrives first. Slots are added only where
//! the new sizes have room beside what is still to go: at no time there are more bytes than in the larger of the two states. Every state in
//! between is one that the engine serves from, since every pool keeps a slot.

use super::{Action, Engine};
use tierwise_cost::units::Bytes;

impl Engine {
    /// The pools are to have these numbers of slots.
    pub(super) fn resize(&mut self, slots: &[u32]) -> Result<(), String> {
        if slots.len() != self.pools.len() {
            return Err(format!("{} sizes were given for {} pools of slots", slots.len(), self.pools.len()));
        }
        for (i, (pool, slots)) in self.pools.iter_mut().zip(slots).enumerate() {
            pool.aim_at(*slots).map_err(|possible| {
                format!("pool {i} of slots is to have {slots}, expected {} to {}", possible.start(), possible.end())
            })?;
        }
        self.resizing = true;
        Ok(())
    }

    /// One stage: what is too much goes first, then what is missing comes.
    pub(super) fn restage(&mut self) {
        let Self { pools, actions, statistics, stage, .. } = self;
        let mut left = *stage;
        for pool in pools.iter_mut() {
            while left > 0 && pool.cache.held() > pool.target() {
                let Some((slot, evicted)) = pool.give_up(statistics) else { break };
                if let Some(key) = evicted {
                    actions.push_back(Action::Evict { key, slot });
                }
                actions.push_back(Action::Release { slot });
                statistics.slots_released += 1;
                left -= 1;
            }
        }
        let bytes = |slots: u32, each: Bytes| each.0.saturating_mul(u64::from(slots));
        let most: u64 = pools.iter().map(|p| bytes(p.target(), p.slot_bytes)).sum();
        let mut held: u64 = pools.iter().map(|p| bytes(p.cache.held(), p.slot_bytes)).sum();
        for pool in pools.iter_mut() {
            while left > 0 && pool.cache.held() < pool.target() && held + pool.slot_bytes.0 <= most {
                actions.push_back(Action::Allocate { slot: pool.add() });
                statistics.slots_added += 1;
                held += pool.slot_bytes.0;
                left -= 1;
            }
        }
        self.resizing = pools.iter().any(|p| p.cache.held() != p.target());
    }

    /// Slots of each of the plan's cache pools: how many there are, and how many there are to be.
    pub fn pool_sizes(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.pools.iter().map(|p| (p.cache.held(), p.target()))
    }
}
