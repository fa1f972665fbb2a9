//! Who computes what within one layer: the processor with the cache, the one at home with the weights, or the first after a move.
//!
//! Rules take a [`LayerWork`] and give a [`Schedule`]; [`LayerWork::makespan`] judges them all (algorithms §3, after HybriMoE, arXiv
//! 2504.05897).

/// One demanded expert.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Item {
    /// The expert.
    pub expert: u32,
    /// Seconds of the processor with the cache, its tokens together.
    pub gpu_s: f64,
    /// Seconds of the processor at home with the weights; infinite where nobody can (weights on disk).
    pub cpu_s: f64,
    /// Seconds of the link to bring it to the cache; 0 if it is there.
    pub move_s: f64,
    /// Seconds that this move takes from the reading of the processor at home: copies and computing drink from the same memory.
    pub contended_s: f64,
    /// What keeping it in the cache is worth, in the policy's own measure: breaks ties.
    pub worth: f64,
}

/// What one layer has to do.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerWork {
    /// The demanded experts, ascending.
    pub items: Vec<Item>,
    /// Seconds that the processor with the cache is busy first (shared experts).
    pub gpu_busy_s: f64,
    /// Seconds until the link is free.
    pub link_busy_s: f64,
    /// Seconds that the other processor needs once if it computes anything (its round trip, its first expert).
    pub cpu_first_s: f64,
}

/// Where each item is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// By the processor with the cache, from the cache.
    Cached,
    /// By the processor at home with the weights.
    Home,
    /// By the processor with the cache, after a move.
    Moved,
}

/// A decision for one layer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Schedule {
    /// Where each item goes. `[items]`
    pub places: Vec<Place>,
    /// Indices of the moved items, in the order of their moves.
    pub moves: Vec<usize>,
    /// Seconds until all is computed.
    pub makespan_s: f64,
}
