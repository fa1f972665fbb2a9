//! Cache policies: who has to go. The mechanism (`engine::expert_cache`) knows what may go.
//!
//! A new policy: one file, one variant of [`CachePolicyKind`], one arm in [`build`]; the policy suite in `tests` then holds it to the
//! rules. [`Static`], [`Pinned`] and [`Belady`] need more than a number to start from (popularity, a list, the future), so they have
//! constructors and no variant.

mod adaptive;
mod belady;
mod lfu;
mod lru;
mod mrs;
pub mod partition;
mod predictor;
mod s3fifo;
mod slru;
mod stat;

pub use adaptive::Adaptive;
pub use belady::{Belady, hit_bytes_bound};
pub use lfu::Lfu;
pub use lru::Lru;
pub use mrs::Mrs;
pub use s3fifo::S3Fifo;
pub use slru::Slru;
pub use stat::{Pinned, Static};

pub(crate) use super::expert_cache::{Admission, ExpertCache};
use crate::plan::CachePolicyKind;

/// What a policy learns of a step.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// (expert, tokens routed to it), ascending by expert.
    pub experts: &'a [(u32, u32)],
    /// Tokens of the step.
    pub tokens: u32,
    /// As [`super::Demand::scores`].
    pub scores: &'a [(u32, u32)],
}

/// Ranks the residents of one pool's slots. Deterministic: the same calls give the same answers.
pub trait CachePolicy: std::fmt::Debug + Send {
    /// The pool has this many slots; called before anything else, and again when the number changes: slots then come and go one by one,
    /// and residents beyond it leave by and by.
    fn on_capacity(&mut self, _slots: u32) {}

    /// A step asks for these experts; called once per demand, before any eviction for it.
    fn on_demand(&mut self, seen: &Seen<'_>);

    /// How much keeping `expert` is worth, in the policy's own unit: only the order counts.
    fn worth(&self, expert: u32) -> f64;

    /// The expert of `candidates` (ascending, not empty) that is worth least; the first of equals. It will be evicted.
    fn victim(&mut self, candidates: &[u32]) -> u32 {
        let mut least = (f64::INFINITY, candidates[0]);
        for e in candidates {
            let worth = self.worth(*e);
            if worth < least.0 {
                least = (worth, *e);
            }
        }
        least.1
    }

    /// For policies that keep their residents in order: the first of them that `may_go`, if any; it will be evicted if one is there.
    /// `None`: [`Self::victim`] is asked.
    fn first_that_may_go(&self, _may_go: &dyn Fn(u32) -> bool) -> Option<Option<u32>> {
        None
    }

    /// Whether `incoming` is worth more than `victim`. Asked only where an expert can be used without a slot.
    fn admits(&self, incoming: u32, victim: u32) -> bool {
        self.worth(incoming) > self.worth(victim)
    }

    /// `expert` was given a slot.
    fn on_place(&mut self, _expert: u32) {}

    /// `expert` lost its slot.
    fn on_evict(&mut self, _expert: u32) {}
}

impl<P: CachePolicy + ?Sized> CachePolicy for Box<P> {
    fn on_capacity(&mut self, slots: u32) {
        (**self).on_capacity(slots);
    }

    fn on_demand(&mut self, seen: &Seen<'_>) {
        (**self).on_demand(seen);
    }

    fn worth(&self, expert: u32) -> f64 {
        (**self).worth(expert)
    }

    fn victim(&mut self, candidates: &[u32]) -> u32 {
        (**self).victim(candidates)
    }

    fn first_that_may_go(&self, may_go: &dyn Fn(u32) -> bool) -> Option<Option<u32>> {
        (**self).first_that_may_go(may_go)
    }

    fn admits(&self, incoming: u32, victim: u32) -> bool {
        (**self).admits(incoming, victim)
    }

    fn on_place(&mut self, expert: u32) {
        (**self).on_place(expert);
    }

    fn on_evict(&mut self, expert: u32) {
        (**self).on_evict(expert);
    }
}

/// The policy of one layer with `num_experts` experts.
pub fn build(kind: CachePolicyKind, num_experts: u32) -> Box<dyn CachePolicy> {
    build_pool(kind, 1, num_experts)
}

/// The policy of a pool that `num_layers` layers share; an expert's key is `layer_index * experts_per_layer + expert`.
pub fn build_pool(kind: CachePolicyKind, num_layers: u32, experts_per_layer: u32) -> Box<dyn CachePolicy> {
    let keys = num_layers * experts_per_layer;
    match kind {
        CachePolicyKind::Lru => Box::new(Lru::new(keys)),
        CachePolicyKind::Mrs { alpha_percent, top_p } => Box::new(Mrs::new(num_layers, experts_per_layer, alpha_percent, top_p)),
        CachePolicyKind::Lfu { halve_every } => Box::new(Lfu::new(keys, halve_every)),
        CachePolicyKind::Slru { protected_percent } => Box::new(Slru::new(keys, protected_percent)),
        CachePolicyKind::S3Fifo { small_percent } => Box::new(S3Fifo::new(keys, small_percent)),
        CachePolicyKind::Adaptive => Box::new(Adaptive::new(num_layers, experts_per_layer)),
    }
}

/// Expected seconds that admitting an expert saves: what it saves when it is used again, less what the victim would have saved, less
/// its copy. `p_*` are the chances of being used before the slot changes hands again. Admit when positive.
pub fn admission_gain_s(p_incoming: f64, p_victim: f64, miss_s: f64, copy_s: f64) -> f64 {
    (p_incoming - p_victim) * miss_s - copy_s
}

#[cfg(test)]
mod tests;
