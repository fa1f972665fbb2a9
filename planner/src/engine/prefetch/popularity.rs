//! How often each expert is demanded: an aged mean per layer. The baseline of every predictor, and part of most.

use super::{Predictor, Shape, ln, most_likely, odds};

/// Steps over which demands are averaged.
const STEPS: f32 = 2048.0;

/// Aged mean of being demanded.
#[derive(Debug, Clone)]
pub struct Popularity {
    shape: Shape,
    /// Share of an observation in the mean once there are many.
    share: f32,
    /// `[num_layers, num_experts]`
    means: Vec<f32>,
    /// Logarithms of the means' odds, for predictors that weigh evidence. `[num_layers, num_experts]`
    log_odds: Vec<f32>,
    /// Logarithms below this count as this.
    least: f32,
    /// Observations so far. `[num_layers]`
    seen: Vec<u32>,
}

impl Popularity {
    /// The mean over about the last 2048 steps.
    pub fn new(shape: Shape) -> Self {
        Self::over(shape, STEPS, f32::NEG_INFINITY)
    }

    /// The mean over about the last `steps` steps; to whom it matters all logarithms of odds below `least` are equal.
    pub(super) fn over(shape: Shape, steps: f32, least: f32) -> Self {
        let start = shape.experts_per_token as f32 / shape.num_experts as f32;
        let means = vec![start; shape.num_layers * shape.num_experts];
        let log_odds = vec![ln(odds(start)); means.len()];
        Self { shape, share: 1.0 / steps, means, log_odds, least, seen: vec![0; shape.num_layers] }
    }

    /// Probabilities of a layer's experts. `[num_experts]`
    pub(super) fn means(&self, index: usize) -> &[f32] {
        &self.means[self.shape.row(index)]
    }

    /// Logarithms of their odds. `[num_experts]`
    pub(super) fn log_odds(&self, index: usize) -> &[f32] {
        &self.log_odds[self.shape.row(index)]
    }
}

impl Predictor for Popularity {
    fn observe(&mut self, _: u64, index: usize, experts: &[(u32, u32)]) {
        // The start counts as one observation.
        self.seen[index] = self.seen[index].saturating_add(1);
        let share = self.share.max(1.0 / (1.0 + self.seen[index] as f32));
        let means = &mut self.means[self.shape.row(index)];
        means.iter_mut().for_each(|m| *m -= share * *m);
        if self.shape.is_crowd(experts) {
            // The probability in one of its tokens, not in all of them together.
            let routed: u64 = experts.iter().map(|(_, tokens)| u64::from(*tokens)).sum();
            let tokens = routed as f32 / self.shape.experts_per_token as f32;
            experts.iter().for_each(|(e, n)| means[*e as usize] += share * (*n as f32 / tokens).min(1.0));
        } else {
            experts.iter().for_each(|(e, _)| means[*e as usize] += share);
        }
        for (log, mean) in self.log_odds[self.shape.row(index)].iter_mut().zip(means) {
            *log = ln(odds(*mean)).max(self.least);
        }
    }

    fn predict(&mut self, index: usize, distance: usize, limit: usize) -> Vec<(u32, f64)> {
        if index + distance >= self.shape.num_layers {
            return Vec::new();
        }
        most_likely(self.means(index + distance).iter().copied(), limit)
    }
}
