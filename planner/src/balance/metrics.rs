//! How well loads are balanced, in every engine's own words. `loads`: tokens by device.
//!
//! * SGLang `utilization rate`: mean over layers of (mean load / largest load) (`eplb/expert_distribution.py`).
//! * vLLM `balancedness`: sum over layers of the mean load / sum over layers of the largest (`distributed/eplb/eplb_state.py`); the time
//!   lost is what the largest cost, so this is the one that counts.
//! * TensorRT-LLM `imbalance ratio`: mean over layers of (largest - mean) / mean (`examples/wide_ep/ep_load_balancer`).
//! * FlashLB `PAR`: largest / mean.

use serde::Serialize;

/// Sums over layers and steps.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Balance {
    sum_mean: f64,
    sum_most: f64,
    sum_ratio: f64,
    sum_excess: f64,
    worst: f64,
    layers: f64,
}

/// The same as means.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BalanceReport {
    /// Mean over layers of mean / largest: SGLang's utilization rate.
    pub balancedness: f64,
    /// Sum of means / sum of largest: vLLM's balancedness.
    pub aggregate_balancedness: f64,
    /// Mean of (largest - mean) / mean: TensorRT-LLM's imbalance ratio.
    pub imbalance_ratio: f64,
    /// Largest / mean of the worst layer.
    pub worst_par: f64,
}

impl Balance {
    /// Adds one layer of one step.
    pub fn add(&mut self, loads: &[f64]) {
        let most = loads.iter().copied().fold(0.0, f64::max);
        let mean = loads.iter().sum::<f64>() / loads.len().max(1) as f64;
        // A layer without tokens is balanced.
        let ratio = if most > 0.0 { mean / most } else { 1.0 };
        self.sum_mean += mean;
        self.sum_most += most;
        self.sum_ratio += ratio;
        self.sum_excess += 1.0 / ratio - 1.0;
        self.worst = self.worst.max(1.0 / ratio);
        self.layers += 1.0;
    }

    /// Means so far.
    pub fn report(&self) -> BalanceReport {
        let per = |sum: f64| if self.layers > 0.0 { sum / self.layers } else { 0.0 };
        BalanceReport {
            balancedness: if self.layers > 0.0 { per(self.sum_ratio) } else { 1.0 },
            aggregate_balancedness: if self.sum_most > 0.0 { self.sum_mean / self.sum_most } else { 1.0 },
            imbalance_ratio: per(self.sum_excess),
            worst_par: self.worst.max(1.0),
        }
    }
}
