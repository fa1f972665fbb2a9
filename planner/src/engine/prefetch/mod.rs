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

/// TEMPORARY
#[derive(Debug)]
pub struct HitCalibration;
impl HitCalibration {
    /// T
    pub const fn new() -> Self {
        Self
    }
    /// T
    pub fn observe(&mut self, _d: usize, _p: f64, _hit: bool) {}
    /// T
    pub fn probability(&self, _d: usize, p: f64) -> f64 {
        p
    }
}
#[derive(Debug)]
struct Nothing;
impl Predictor for Nothing {
    fn observe(&mut self, _: u64, _: usize, _: &[(u32, u32)]) {}
    fn predict(&self, _: usize, _: usize, _: usize) -> Vec<(u32, f64)> {
        Vec::new()
    }
}
/// TEMPORARY
pub fn predictor(_experts: &[u32], _depth: usize) -> Box<dyn Predictor> {
    Box::new(Nothing)
}
