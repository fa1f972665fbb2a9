//! Segmented LRU: an expert used again while it is resident is protected; the rest go first (Karedla et al., 1994; LFRU is the same idea).
//!
//! The protected segment has a fixed share of the slots; what it cannot hold falls back, the least recently used first.

use super::{CachePolicy, Seen};

/// Two LRU segments.
#[derive(Debug, Clone)]
pub struct Slru {
    protected_percent: u32,
    room: usize,
    now: u64,
    /// `[num_experts]`
    last_used: Vec<u64>,
    resident: Vec<bool>,
    /// Protected residents, in no order.
    protected: Vec<u32>,
    is_protected: Vec<bool>,
}

impl Slru {
    /// `protected_percent` of the slots are for experts that were used again.
    pub fn new(num_experts: u32, protected_percent: u32) -> Self {
        let n = num_experts as usize;
        Self {
            protected_percent: protected_percent.min(100),
            room: 0,
            now: 0,
            last_used: vec![0; n],
            resident: vec![false; n],
            protected: Vec::new(),
            is_protected: vec![false; n],
        }
    }
}

impl Slru {
    /// What the protected segment has no room for falls back, the least recently used first.
    fn demote(&mut self) {
        while self.protected.len() > self.room {
            let last_used = &self.last_used;
            let oldest = (0..self.protected.len()).min_by_key(|p| (last_used[self.protected[*p] as usize], self.protected[*p]));
            let Some(oldest) = oldest else { return };
            let back = self.protected.swap_remove(oldest);
            self.is_protected[back as usize] = false;
        }
    }
}

impl CachePolicy for Slru {
    fn on_capacity(&mut self, slots: u32) {
        self.room = (u64::from(slots) * u64::from(self.protected_percent) / 100) as usize;
        self.protected.reserve((slots as usize + 1).saturating_sub(self.protected.len()));
        self.demote();
    }

    fn on_demand(&mut self, seen: &Seen<'_>) {
        self.now += 1;
        for (e, _) in seen.experts {
            let i = *e as usize;
            self.last_used[i] = self.now;
            if self.resident[i] && !self.is_protected[i] {
                self.is_protected[i] = true;
                self.protected.push(*e);
                self.demote();
            }
        }
    }

    fn worth(&self, expert: u32) -> f64 {
        // Demands are counted to far less than 2^40.
        let segment = if self.is_protected[expert as usize] { (1_u64 << 40) as f64 } else { 0.0 };
        segment + self.last_used[expert as usize] as f64
    }

    fn on_place(&mut self, expert: u32) {
        self.resident[expert as usize] = true;
    }

    fn on_evict(&mut self, expert: u32) {
        self.resident[expert as usize] = false;
        if std::mem::take(&mut self.is_protected[expert as usize]) {
            self.protected.retain(|e| *e != expert);
        }
    }
}
