//! Interpolation between samples: piecewise linear in the logarithms of both axes.
//!
//! Costs here are sums of a constant part and a part that grows with x. In logarithms a constant is a level line and a proportional
//! cost a straight one, so both are met exactly, and what lies between is met well at samples a factor of two apart.

use super::{Estimate, EstimateSource};
use crate::machine::Spread;

/// A positive value with an interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Span {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

impl Span {
    pub(super) fn of(s: &Spread) -> Self {
        Self { value: s.median, low: s.min, high: s.max }
    }

    pub(super) fn times(self, factor: f64) -> Self {
        Self { value: self.value * factor, low: self.low * factor, high: self.high * factor }
    }

    fn zip(self, o: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self { value: f(self.value, o.value), low: f(self.low, o.low), high: f(self.high, o.high) }
    }
}

/// A value read off a curve.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Reading {
    pub span: Span,
    pub source: EstimateSource,
}

impl Reading {
    pub(super) fn estimate(self) -> Estimate {
        Estimate { seconds: self.span.value, low: self.span.low, high: self.span.high, source: self.source }
    }

    /// The weaker of two sources.
    pub(super) fn weakened(mut self, by: EstimateSource) -> Self {
        if by as u8 > self.source as u8 {
            self.source = by;
        }
        self
    }
}

/// Samples by ascending x; never empty.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Curve(Vec<(f64, Span)>);

/// Closer than this is the sample itself.
const SAME: f64 = 1e-6;

impl Curve {
    /// `None` without samples. They are ascending: the calibration was checked.
    pub(super) fn new(samples: Vec<(f64, Span)>) -> Option<Self> {
        (!samples.is_empty()).then_some(Self(samples))
    }

    /// A single sample.
    pub(super) fn one(x: f64, span: Span) -> Self {
        Self(vec![(x, span)])
    }

    /// The next sample: its x is above all others.
    pub(super) fn push(&mut self, x: f64, span: Span) {
        self.0.push((x, span));
    }

    /// The value at `x`; beyond the ends that of the end, marked as computed.
    pub(super) fn at(&self, x: f64) -> Reading {
        let (first, last) = (self.0[0], self.0[self.0.len() - 1]);
        if let Some((_, span)) = self.0.iter().find(|(at, _)| (at / x - 1.0).abs() < SAME) {
            return Reading { span: *span, source: EstimateSource::Measured };
        }
        let after = self.0.partition_point(|(at, _)| *at < x);
        if after == 0 || after == self.0.len() {
            let span = if after == 0 { first.1 } else { last.1 };
            return Reading { span, source: EstimateSource::Analytic };
        }
        let ((x0, y0), (x1, y1)) = (self.0[after - 1], self.0[after]);
        let share = (x / x0).ln() / (x1 / x0).ln();
        let span = y0.zip(y1, |a, b| (a.ln() * (1.0 - share) + b.ln() * share).exp());
        Reading { span, source: EstimateSource::Interpolated }
    }

    /// The last x.
    pub(super) fn end(&self) -> f64 {
        self.0[self.0.len() - 1].0
    }

    /// What interpolation may err by, estimated at each inner sample: a quarter of how far it is from the curve through its
    /// neighbours, which are twice as far apart as those that are used (the error of a straight line grows with the square).
    pub(super) fn errors(&self) -> Vec<f64> {
        (1..self.0.len().saturating_sub(1))
            .map(|i| {
                let (x, y) = self.0[i];
                let without = Self(vec![self.0[i - 1], self.0[i + 1]]);
                0.25 * (without.at(x).span.value / y.value - 1.0).abs()
            })
            .collect()
    }
}
