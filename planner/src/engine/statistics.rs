//! What the engine counted.

use serde::Serialize;
use tierwise_cost::units::{Bytes, Nanos};

/// Counts since the start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Statistics {
    /// Demands taken.
    pub demands: u64,
    /// Experts demanded; one expert in one demand is one request, however many tokens it serves.
    pub requests: u64,
    /// Requests found in place: planned residents and experts in slots.
    pub hits: u64,
    /// Those of the hits that are planned residents.
    pub resident_hits: u64,
    /// Requests that had to be loaded.
    pub misses: u64,
    /// Loads asked for, retries included.
    pub loads: u64,
    /// Loads asked for again after a failure.
    pub retries: u64,
    /// Experts that had to leave a slot.
    pub evictions: u64,
    /// Loads of experts that only passed through.
    pub bypasses: u64,
    /// Computations asked for.
    pub waves: u64,
    /// Misses and hits that were computed beside the memory they are planned in, not from a slot.
    pub computed_at_home: u64,
    /// Loads before the first demand, as the plan says.
    pub preloads: u64,
    /// Loads of misses that had been computed at home.
    pub fills: u64,
    /// Loads of guesses.
    pub prefetches_issued: u64,
    /// Guesses that were there when they were asked for.
    pub prefetches_used: u64,
    /// Guesses that were on their way when they were asked for.
    pub prefetches_late: u64,
    /// Guesses that left their slot, or failed, before anyone asked.
    pub prefetches_useless: u64,
    /// Bytes of loads by tier they come from. `[tiers]`
    pub bytes_loaded_by_tier: Vec<Bytes>,
    /// Time during which a layer waited for loads with nothing to compute.
    pub stalled: Nanos,
    /// Slots that were added.
    pub slots_added: u64,
    /// Slots that were given up.
    pub slots_released: u64,
    /// Experts that a part of a prompt asked to be streamed.
    pub streamed: u64,
    /// Experts that were sent for before their part of a prompt asked.
    pub streamed_ahead: u64,
    /// Those of them that nobody asked for, or that could not be read.
    pub streamed_useless: u64,
}

impl Statistics {
    /// Share of requests found in place; 1 without requests.
    pub fn hit_rate(&self) -> f64 {
        if self.requests == 0 { 1.0 } else { self.hits as f64 / self.requests as f64 }
    }

    /// Share of requests for cached experts found in a slot; 1 without such requests.
    pub fn cache_hit_rate(&self) -> f64 {
        let cached = self.requests - self.resident_hits;
        if cached == 0 { 1.0 } else { (self.hits - self.resident_hits) as f64 / cached as f64 }
    }
}
