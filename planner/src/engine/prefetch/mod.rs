//! What may be needed soon: guesses at the demands of later layers, and whether to act on them (algorithms §5).
//!
//! Every predictor keeps small tables per layer and learns from each demand; [`HitCalibration`] turns what they state into what is true
//! of them, [`prefetch_gain`] into seconds.

mod calibration;
mod gain;
mod mix;
mod popularity;
mod repeat;
mod sequence_map;
mod transitions;

pub use calibration::HitCalibration;
pub use gain::{GainScratch, prefetch_gain};
pub use mix::Mix;
pub use popularity::Popularity;
pub use repeat::Repeat;
pub use sequence_map::SequenceMap;
pub use transitions::Transitions;

/// Guesses at demands from past ones. Deterministic: the same calls give the same answers.
pub trait Predictor: std::fmt::Debug + Send {
    /// A layer was asked for these experts, ascending, in `step`; `index` counts the layers with routed experts from 0. Layers of a step
    /// come in order.
    fn observe(&mut self, step: u64, index: usize, experts: &[(u32, u32)]);

    /// Probability of being demanded, for the experts of layer `index + distance`, once layer `index` of the running step was observed;
    /// most likely first, at most `limit`. Nothing for a layer that there is not.
    fn predict(&mut self, index: usize, distance: usize, limit: usize) -> Vec<(u32, f64)>;

    /// What follows belongs to another sequence. Drivers that do not know need not say.
    fn new_sequence(&mut self) {}
}

/// What a predictor predicts for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Layers with routed experts.
    pub num_layers: usize,
    /// Experts of the layer with most of them.
    pub num_experts: usize,
    /// Experts per token.
    pub experts_per_token: usize,
    /// How many layers ahead it is asked.
    pub max_distance: usize,
}

impl Shape {
    /// So many experts that they are a prompt's, not a decode step's: who follows whom is not to be learnt from them.
    fn is_crowd(&self, experts: &[(u32, u32)]) -> bool {
        2 * experts.len() > self.num_experts && self.num_experts > 2 * self.experts_per_token
    }

    /// Where the values of a layer's experts are in a table `[num_layers, num_experts]`.
    fn row(&self, index: usize) -> std::ops::Range<usize> {
        index * self.num_experts..(index + 1) * self.num_experts
    }
}

/// The greatest of the experts' values, at most `limit`; equal ones by number.
fn most_likely(values: impl Iterator<Item = f32>, limit: usize) -> Vec<(u32, f64)> {
    // One integer per expert, the best first: sorted without a branch per comparison.
    let mut keys: Vec<u64> = (0..).zip(values).map(|(e, value)| u64::from(!in_order(value)) << 32 | e).collect();
    if limit == 0 {
        return Vec::new();
    }
    if limit < keys.len() {
        keys.select_nth_unstable(limit - 1);
        keys.truncate(limit);
    }
    keys.sort_unstable();
    keys.into_iter().map(|key| (key as u32, f64::from(of_order(!((key >> 32) as u32))))).collect()
}

/// Bits that compare as integers as the numbers do (IEEE 754's total order).
fn in_order(x: f32) -> u32 {
    let bits = x.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// The number whose [`in_order`] this is.
fn of_order(bits: u32) -> f32 {
    f32::from_bits(if bits >> 31 == 1 { bits & !(1 << 31) } else { !bits })
}

/// As [`most_likely`], of logarithms of odds.
fn most_likely_by_log_odds(log_odds: impl Iterator<Item = f32>, limit: usize) -> Vec<(u32, f64)> {
    let mut best = most_likely(log_odds, limit);
    best.iter_mut().for_each(|(_, x)| *x = logistic(*x));
    best
}

/// Probabilities are kept this far from 0 and 1.
const LEAST: f32 = 1e-4;

/// p / (1 - p).
fn odds(p: f32) -> f32 {
    let p = p.clamp(LEAST, 1.0 - LEAST);
    p / (1.0 - p)
}

/// The natural logarithm of a positive normal number, within 1e-6 of its magnitude or of 1: arithmetic only, so that many are taken at once
/// and everywhere to the same bit.
///
/// With x = m 2^e, m in [sqrt(1/2), sqrt(2)), it is `e ln 2 + 2 artanh(s)`, s = (m - 1) / (m + 1), whose series is s + s^3/3 + s^5/5 + ...
fn ln(x: f32) -> f32 {
    let above = x.to_bits().wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits()).cast_signed() >> 23;
    let m = f32::from_bits(x.to_bits().wrapping_sub((above << 23).cast_unsigned()));
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    above as f32 * std::f32::consts::LN_2 + 2.0 * s * (1.0 + z * (1.0 / 3.0 + z * (0.2 + z * (1.0 / 7.0))))
}

/// 1 / (1 + exp(-x)).
pub(super) fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests;
