//! What an operation or a transfer costs: bytes and operations first, then seconds with the source of the estimate.
//!
//! `work` counts bytes and operations (the one place that does), [`Roofline`] turns them into seconds on a machine that nobody
//! measured, [`Calibrated`] on one that `calibrate` measured; [`cost_model`] chooses.

mod calibrated;
mod curve;
mod gpu_moe;
mod roofline;
mod work;

pub use calibrated::Calibrated;
pub use gpu_moe::{MoeFit, MoeShape, moe_fits, moe_formats, moe_layer_seconds, moe_layer_seconds_of};
pub use roofline::{HostCopies, Range, Roofline};
pub use work::{
    ByFormat, LayerWork, MatrixWork, StepWork, Work, expected_distinct, expected_distinct_of, op_work, step_limit, step_limit_at,
    step_work,
};

use crate::machine::{Link, Machine, Memory, Processor, Source};
use crate::units::Bytes;

/// How an estimate was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EstimateSource {
    /// This very operation was measured on this machine.
    Measured,
    /// Between measurements on this machine.
    Interpolated,
    /// Computed from measured rates of this machine.
    Analytic,
    /// Computed from datasheets or assumptions.
    Prior,
}

/// A span of time with an interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Best estimate.
    pub seconds: f64,
    /// It may be as short as this.
    pub low: f64,
    /// It may be as long as this.
    pub high: f64,
    /// How it was made.
    pub source: EstimateSource,
}

impl Estimate {
    /// No time at all, for certain.
    pub const ZERO: Self = Self { seconds: 0.0, low: 0.0, high: 0.0, source: EstimateSource::Measured };

    /// One after the other; the weaker source is kept.
    #[must_use]
    pub fn then(self, other: Self) -> Self {
        let weaker = if self.source as u8 >= other.source as u8 { self.source } else { other.source };
        Self { seconds: self.seconds + other.seconds, low: self.low + other.low, high: self.high + other.high, source: weaker }
    }

    /// `n` times in a row.
    #[must_use]
    pub fn times(self, n: f64) -> Self {
        Self { seconds: self.seconds * n, low: self.low * n, high: self.high * n, source: self.source }
    }
}

/// Prices operations and transfers.
pub trait CostModel: Send + Sync {
    /// Time of `work` on `p` with its bytes in `from` (as `p` sees it: [`crate::machine::Machine::seen_from`]), in `launches` operations.
    fn compute(&self, p: &Processor, from: &Memory, work: Work, launches: u32) -> Estimate;

    /// Time of one copy of `bytes` over `link`.
    fn transfer(&self, link: &Link, bytes: Bytes) -> Estimate;

    /// What it is and what it assumes, in a line for people.
    fn describe(&self) -> String;

    /// What its numbers rest on, for a plan's list of where numbers come from.
    fn basis(&self) -> (Source, &'static str) {
        (Source::Prior, "published runs of other engines and machines")
    }

    /// One round trip in a layer: handing inputs to `p` and results back, when `p` is not the main processor.
    fn sync(&self, p: &Processor) -> Estimate;
}

/// The best model for a machine: its own samples if `calibrate` left some, else the roofline.
pub fn cost_model(machine: &Machine) -> Box<dyn CostModel> {
    match &machine.calibration {
        Some(c) => Box::new(Calibrated::new(machine, c)),
        None => Box::new(Roofline::default()),
    }
}

#[cfg(test)]
mod tests;
