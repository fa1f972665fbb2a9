//! Cache policies: who has to go. The mechanism (`engine::expert_cache`) knows what may go.
//!
//! A new policy: one file, one variant of [`CachePolicyKind`], one arm in [`build`]; the policy suite in `tests` then holds it to the
//! rules.

mod lru;

pub use lru::Lru;

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

/// Ranks the residents of one layer's slots. Deterministic: the same calls give the same answers.
pub trait CachePolicy: std::fmt::Debug + Send {
    /// A step asks for these experts; called once per demand, before any eviction for it.
    fn on_demand(&mut self, seen: &Seen<'_>);

    /// The expert of `candidates` (ascending, not empty) that is worth least.
    fn victim(&mut self, candidates: &[u32]) -> u32;

    /// Whether `expert`, which is demanded, is to take the place of `victim`; else it passes through, if the plan has room for that.
    fn admits(&self, expert: u32, victim: u32) -> bool {
        let _ = (expert, victim);
        true
    }

    /// What keeping `expert` is worth, in a measure of the policy's own.
    fn worth(&self, expert: u32) -> f64;
}

/// The policy of a layer with `num_experts` experts.
pub fn build(kind: CachePolicyKind, num_experts: u32) -> Box<dyn CachePolicy> {
    match kind {
        CachePolicyKind::Lru => Box::new(Lru::new(num_experts)),
    }
}

#[cfg(test)]
mod tests;
