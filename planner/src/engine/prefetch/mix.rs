//! Everything known about an expert's next demand in one number: logistic regression, learnt online.
//!
//! Its signals: what the running step's last two layers say ([`Transitions`]), popularity, a fast mean of the expert's own uses, and
//! whether the step before demanded it. One set of weights per distance, since what a layer's set says fades with distance; learnt from
//! every [`LEARN_EVERY`]th step by stochastic gradient with per-weight rates (AdaGrad, Duchi et al. 2011). Logistic regression is
//! calibrated on what it learnt from, so its numbers are close to true probabilities.

use super::{Popularity, Predictor, Repeat, Shape, Transitions, logistic, most_likely_by_log_odds};

/// Bias, popularity, evidence of the last layer, evidence of the layer before, fast mean, demanded in the step before.
const SIGNALS: usize = 6;

/// Where the weights start: near what they come to on recorded routing.
const START: [f64; SIGNALS] = [0.0, 0.7, 0.45, 0.2, 0.3, 0.2];

/// Steps of the fast mean.
const FAST_STEPS: f32 = 12.0;

/// Every so many steps the weights learn; tables learn always.
const LEARN_EVERY: u64 = 4;

/// AdaGrad's rate.
const RATE: f64 = 0.05;

/// Logarithm of the odds (of 0.01) below which the fast mean does not count: all it says is "not of late".
const LEAST_FAST: f32 = -4.6;

/// Evidence beyond this (in logarithms of odds) counts as this.
const MAX_EVIDENCE: f32 = 12.0;

/// The mix.
#[derive(Debug, Clone)]
pub struct Mix {
    shape: Shape,
    transitions: Transitions,
    fast: Popularity,
    repeat: Repeat,
    /// `[max_distance]`
    weights: Vec<[f64; SIGNALS]>,
    /// Sums of squared gradients. `[max_distance]`
    squares: Vec<[f64; SIGNALS]>,
    /// Kept to spare allocations. `[num_experts]`
    signals: Vec<[f64; SIGNALS]>,
    /// No evidence. `[num_experts]`
    none: Vec<f32>,
}

impl Mix {
    /// Knows nothing yet.
    pub fn new(shape: Shape) -> Self {
        Self {
            shape,
            // One more, for the layer before the last.
            transitions: Transitions::new(Shape { max_distance: shape.max_distance + 1, ..shape }),
            fast: Popularity::over(shape, FAST_STEPS, LEAST_FAST),
            repeat: Repeat::new(shape),
            weights: vec![START; shape.max_distance],
            squares: vec![[1.0; SIGNALS]; shape.max_distance],
            signals: Vec::with_capacity(shape.num_experts),
            none: vec![0.0; shape.num_experts],
        }
    }

    /// The weights of the signals (bias, popularity, evidence of the last layer and of the one before, fast mean, repetition) at a
    /// distance.
    pub fn weights(&self, distance: usize) -> Option<&[f64]> {
        self.weights.get(distance.checked_sub(1)?).map(|w| w.as_slice())
    }

    /// The signals of the experts of layer `index + distance`, into `self.signals`.
    fn find_signals(&mut self, index: usize, distance: usize) {
        let target = index + distance;
        self.know_evidence(index, distance);
        let near = self.transitions.evidence(index, distance);
        let far = index.checked_sub(1).map_or(&self.none[..], |before| self.transitions.evidence(before, distance + 1));
        let clamp = |x: f32| f64::from(x.clamp(-MAX_EVIDENCE, MAX_EVIDENCE));
        let (slow, fast) = (self.transitions.popularity().log_odds(target), self.fast.log_odds(target));
        self.signals.clear();
        self.signals.extend(slow.iter().zip(fast).zip(near.iter().zip(far)).map(|((slow, fast), (near, far))| {
            [1.0, f64::from(*slow), clamp(*near), clamp(*far), f64::from(fast.max(LEAST_FAST)), 0.0]
        }));
        for e in self.repeat.last(target) {
            self.signals[*e as usize][SIGNALS - 1] = 1.0;
        }
    }

    fn log_odds(&self, distance: usize, signals: &[f64; SIGNALS]) -> f64 {
        self.weights[distance - 1].iter().zip(signals).map(|(w, s)| w * s).sum()
    }

    /// The slow way: the oracle of [`Self::predict_all`].
    #[cfg(test)]
    pub(super) fn log_odds_one_by_one(&mut self, index: usize, distance: usize) -> Vec<f64> {
        self.find_signals(index, distance);
        self.signals.iter().map(|s| self.log_odds(distance, s)).collect()
    }

    /// As [`Predictor::predict`], and the logarithm of every expert's odds into `log_odds`, which may be fewer than the shape's: other
    /// layers may have more. `None` for a layer that there is not.
    pub(in crate::engine) fn predict_all(
        &mut self,
        index: usize,
        distance: usize,
        limit: usize,
        log_odds: &mut [f32],
    ) -> Option<Vec<(u32, f64)>> {
        if index + distance >= self.shape.num_layers || distance == 0 || distance > self.shape.max_distance {
            return None;
        }
        self.find_log_odds(index, distance, log_odds);
        Some(most_likely_by_log_odds(log_odds.iter().copied(), limit))
    }

    /// What [`Self::log_odds`] makes of [`Self::find_signals`], over all experts at once and in float32.
    fn find_log_odds(&mut self, index: usize, distance: usize, log_odds: &mut [f32]) {
        let target = index + distance;
        self.know_evidence(index, distance);
        let near = self.transitions.evidence(index, distance);
        let far = index.checked_sub(1).map_or(&self.none[..], |before| self.transitions.evidence(before, distance + 1));
        let (slow, fast) = (self.transitions.popularity().log_odds(target), self.fast.log_odds(target));
        let [bias, of_slow, of_near, of_far, of_fast, of_repeat] = self.weights[distance - 1].map(|w| w as f32);
        let clamp = |x: f32| x.clamp(-MAX_EVIDENCE, MAX_EVIDENCE);
        for ((out, (slow, fast)), (near, far)) in log_odds.iter_mut().zip(slow.iter().zip(fast)).zip(near.iter().zip(far)) {
            let known = bias + of_slow * slow + of_near * clamp(*near) + of_far * clamp(*far);
            *out = known + of_fast * fast.max(LEAST_FAST);
        }
        for e in self.repeat.last(target) {
            if let Some(out) = log_odds.get_mut(*e as usize) {
                *out += of_repeat;
            }
        }
    }

    /// Makes sure that what the last two layers say is there.
    fn know_evidence(&mut self, index: usize, distance: usize) {
        self.transitions.know_evidence(index, distance);
        if let Some(before) = index.checked_sub(1) {
            self.transitions.know_evidence(before, distance + 1);
        }
    }

    fn learn(&mut self, index: usize, distance: usize, experts: &[(u32, u32)]) {
        let mut gradient = [0.0; SIGNALS];
        self.find_signals(index - distance, distance);
        let mut demanded = experts.iter().map(|x| x.0 as usize).peekable();
        for (e, signals) in self.signals.iter().enumerate() {
            let truth = f64::from(u8::from(demanded.next_if_eq(&e).is_some()));
            let error = truth - logistic(self.log_odds(distance, signals));
            gradient.iter_mut().zip(signals).for_each(|(g, s)| *g += error * s);
        }
        let (weights, squares) = (&mut self.weights[distance - 1], &mut self.squares[distance - 1]);
        for ((weight, square), gradient) in weights.iter_mut().zip(squares).zip(gradient) {
            *square += gradient * gradient;
            *weight += RATE * gradient / square.sqrt();
        }
    }
}

impl Predictor for Mix {
    fn observe(&mut self, step: u64, index: usize, experts: &[(u32, u32)]) {
        // From what was known before.
        if step.is_multiple_of(LEARN_EVERY) && !self.shape.is_crowd(experts) {
            for distance in 1..=self.shape.max_distance.min(index) {
                self.learn(index, distance, experts);
            }
        }
        self.transitions.observe(step, index, experts);
        self.fast.observe(step, index, experts);
        self.repeat.observe(step, index, experts);
    }

    fn predict(&mut self, index: usize, distance: usize, limit: usize) -> Vec<(u32, f64)> {
        let mut log_odds = vec![0.0_f32; self.shape.num_experts];
        self.predict_all(index, distance, limit, &mut log_odds).unwrap_or_default()
    }
}
