//! S3-FIFO: a small queue for newcomers, a main queue for those used again, a ghost list of those that left the small queue unused
//! (Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023).
//!
//! Uses are counted to 3. Experts that may not go now (demanded, on their way) keep their places in the queues.

use super::{CachePolicy, Seen};
use std::collections::VecDeque;

/// The queues.
#[derive(Debug, Clone)]
pub struct S3Fifo {
    small_percent: u32,
    small_room: usize,
    slots: usize,
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    ghost: VecDeque<u32>,
    /// Uses since it came, at most 3. `[num_experts]`
    uses: Vec<u8>,
    resident: Vec<bool>,
}

impl S3Fifo {
    /// `small_percent` of the slots are for newcomers; at least one slot.
    pub fn new(num_experts: u32, small_percent: u32) -> Self {
        let n = num_experts as usize;
        Self {
            small_percent: small_percent.min(100),
            small_room: 1,
            slots: 0,
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghost: VecDeque::new(),
            uses: vec![0; n],
            resident: vec![false; n],
        }
    }
}

impl CachePolicy for S3Fifo {
    fn on_capacity(&mut self, slots: u32) {
        self.slots = slots as usize;
        self.small_room = ((u64::from(slots) * u64::from(self.small_percent) / 100) as usize).max(1);
        while self.ghost.len() > self.slots {
            self.ghost.pop_front();
        }
    }

    fn on_demand(&mut self, seen: &Seen<'_>) {
        for (e, _) in seen.experts {
            if self.resident[*e as usize] {
                self.uses[*e as usize] = (self.uses[*e as usize] + 1).min(3);
            }
        }
    }

    fn worth(&self, expert: u32) -> f64 {
        f64::from(self.uses[expert as usize])
    }

    fn victim(&mut self, candidates: &[u32]) -> u32 {
        let may_go = |e: &u32| candidates.binary_search(e).is_ok();
        loop {
            let from_small = self.small.len() >= self.small_room || !self.main.iter().any(may_go);
            if from_small && let Some(at) = self.small.iter().position(may_go) {
                let e = self.small[at];
                if self.uses[e as usize] == 0 {
                    return e;
                }
                self.small.remove(at);
                self.uses[e as usize] = 0;
                self.main.push_back(e);
                continue;
            }
            // Every round takes a use away, so this ends.
            let Some(at) = self.main.iter().position(may_go) else { return candidates[0] };
            let e = self.main[at];
            if self.uses[e as usize] == 0 {
                return e;
            }
            self.main.remove(at);
            self.uses[e as usize] -= 1;
            self.main.push_back(e);
        }
    }

    fn on_place(&mut self, expert: u32) {
        self.resident[expert as usize] = true;
        self.uses[expert as usize] = 0;
        if let Some(at) = self.ghost.iter().position(|e| *e == expert) {
            self.ghost.remove(at);
            self.main.push_back(expert);
        } else {
            self.small.push_back(expert);
        }
    }

    fn on_evict(&mut self, expert: u32) {
        self.resident[expert as usize] = false;
        if let Some(at) = self.small.iter().position(|e| *e == expert) {
            self.small.remove(at);
            self.ghost.push_back(expert);
            if self.ghost.len() > self.slots {
                self.ghost.pop_front();
            }
        } else {
            self.main.retain(|e| *e != expert);
        }
    }
}
