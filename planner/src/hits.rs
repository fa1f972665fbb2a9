//! How often a cache of experts hits, before anybody traced the workload.
//!
//! The prior is the LRU curve measured on two public traces, one cache per layer, one token at a time: DeepSeek-V2-Lite (lower,
//! the best estimate here) and gpt-oss-20b (higher, the optimistic end); uniform independent routing, where the hit rate is the
//! cached fraction, is the pessimistic end. Under wider batches the demanded set fills the layer and recency stops helping: the
//! curve falls towards the cached fraction in proportion. All three curves are concave and piecewise linear, so that the lower
//! bound can hold them in a linear program.

/// Which of the three curves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    /// Hit rate = cached fraction.
    Uniform,
    /// DeepSeek-V2-Lite, LRU.
    Expected,
    /// gpt-oss-20b, LRU.
    Optimistic,
}

/// (cached fraction of the layer's experts, hit rate), ascending.
const DEEPSEEK_V2_LITE: &[(f64, f64)] =
    &[(0.0, 0.0), (0.125, 0.326), (0.25, 0.517), (0.375, 0.648), (0.5, 0.753), (0.75, 0.909), (1.0, 1.0)];
const GPT_OSS_20B: &[(f64, f64)] =
    &[(0.0, 0.0), (0.125, 0.441), (0.25, 0.658), (0.375, 0.805), (0.5, 0.898), (0.75, 0.978), (1.0, 1.0)];
const UNIFORM: &[(f64, f64)] = &[(0.0, 0.0), (1.0, 1.0)];

impl Curve {
    const fn points(self) -> &'static [(f64, f64)] {
        match self {
            Self::Uniform => UNIFORM,
            Self::Expected => DEEPSEEK_V2_LITE,
            Self::Optimistic => GPT_OSS_20B,
        }
    }
}

/// Miss rate as a function of the cached fraction: the largest of some lines.
#[derive(Debug, Clone, PartialEq)]
pub struct MissCurve {
    /// (value at 0, slope).
    lines: Vec<(f64, f64)>,
}

impl MissCurve {
    /// `recency` is 1 when a step demands as few experts as one token does, 0 when it demands all of them.
    pub fn new(curve: Curve, recency: f64) -> Self {
        let w = recency.clamp(0.0, 1.0);
        let lines = curve
            .points()
            .windows(2)
            .map(|p| {
                // h = x + w (h0 - x), as a line through two neighbouring points.
                let bend = |(x, h0): (f64, f64)| x + w * (h0 - x);
                let slope = (bend(p[1]) - bend(p[0])) / (p[1].0 - p[0].0);
                (1.0 - (bend(p[0]) - slope * p[0].0), -slope)
            })
            .collect();
        Self { lines }
    }

    /// Miss rate of a cache of `slots` for `cached` experts.
    pub fn miss_rate(&self, slots: u32, cached: u32) -> f64 {
        if slots >= cached {
            return 0.0;
        }
        let x = f64::from(slots) / f64::from(cached);
        self.lines.iter().map(|(at_zero, slope)| at_zero + slope * x).fold(0.0, f64::max)
    }

    /// The lines (value at 0, slope) whose maximum, with 0, the curve is.
    pub fn lines(&self) -> &[(f64, f64)] {
        &self.lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_through_the_measured_points_and_is_convex() {
        for curve in [Curve::Uniform, Curve::Expected, Curve::Optimistic] {
            let m = MissCurve::new(curve, 1.0);
            for (x, hit) in curve.points() {
                let slots = (x * 64.0).round() as u32;
                assert!((m.miss_rate(slots, 64) - (1.0 - hit)).abs() < 1e-9, "{curve:?} {x}");
            }
            let misses: Vec<f64> = (0..=64).map(|s| m.miss_rate(s, 64)).collect();
            assert!(misses.windows(2).all(|p| p[1] <= p[0] + 1e-12));
            assert!(misses.windows(3).all(|p| p[0] + p[2] >= 2.0 * p[1] - 1e-12));
        }
        assert!((MissCurve::new(Curve::Expected, 0.0).miss_rate(16, 64) - 0.75).abs() < 1e-12);
    }
}
