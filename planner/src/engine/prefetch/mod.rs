//! What may be needed soon: guesses at the demands of later layers, and whether to act on them (algorithms §5).

/// Guesses at demands from past ones. Deterministic: the same calls give the same answers.
pub trait Predictor: std::fmt::Debug + Send {
    /// A layer was asked for these experts, ascending, in `step`; `index` counts the layers with routed experts from 0. Layers of a step
    /// come in order.
    fn observe(&mut self, step: u64, index: usize, experts: &[(u32, u32)]);

    /// Probability of being demanded, for the experts of layer `index + distance`, once layer `index` of the running step was observed;
    /// most likely first, at most `limit`.
    fn predict(&self, index: usize, distance: usize, limit: usize) -> Vec<(u32, f64)>;
}
