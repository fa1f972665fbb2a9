//! What ranks did: tokens on each, bytes between them, time.

use serde::Serialize;
use std::time::Duration;

/// Tokens of each rank, over layers and steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RankLoads {
    /// (Token, choice) rows that each rank computed. `[ranks]`
    pub rows: Vec<u64>,
    /// Sum over layers and steps of the largest rank's rows: what is waited for.
    pub sum_of_largest: u64,
    /// Sum over layers and steps of the mean.
    pub sum_of_means: f64,
    /// The largest ratio of largest to mean of one layer and step.
    pub worst: f64,
}

impl RankLoads {
    /// Adds a layer of a step.
    pub fn add(&mut self, rows: &[u64]) {
        self.rows.resize(rows.len(), 0);
        self.rows.iter_mut().zip(rows).for_each(|(sum, r)| *sum += r);
        let (most, total) = (rows.iter().copied().max().unwrap_or(0), rows.iter().sum::<u64>());
        let mean = total as f64 / rows.len().max(1) as f64;
        self.sum_of_largest += most;
        self.sum_of_means += mean;
        if total > 0 {
            self.worst = self.worst.max(most as f64 / mean);
        }
    }

    /// Largest / mean of rows per rank, weighted by rows: 1 is perfect.
    pub fn imbalance(&self) -> f64 {
        if self.sum_of_means > 0.0 { self.sum_of_largest as f64 / self.sum_of_means } else { 1.0 }
    }
}

/// Since the last reset; loads and experts sent are those of all ranks, the rest this rank's.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ParallelStatistics {
    /// Layers with experts, step by step.
    pub layer_steps: u64,
    /// As it would have been with experts in order and nothing else.
    pub before: RankLoads,
    /// As it was.
    pub after: RankLoads,
    /// Experts whose weights were sent.
    pub experts_sent: u64,
    /// Bytes of rows sent to other ranks.
    pub dispatch_bytes: u64,
    /// Bytes of results sent to other ranks.
    pub result_bytes: u64,
    /// Bytes of weights sent to other ranks.
    pub weight_bytes: u64,
    /// Time for the counts of tokens, waiting for slower ranks included.
    pub counts_time: Duration,
    /// Time for decisions.
    pub decide_time: Duration,
    /// Time for weights.
    pub weights_time: Duration,
    /// Time for rows and results, waiting for slower ranks included.
    pub exchange_time: Duration,
    /// Time for experts.
    pub compute_time: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imbalance_is_what_is_waited_for() {
        let mut loads = RankLoads::default();
        assert_eq!(loads.imbalance(), 1.0);
        loads.add(&[30, 10]);
        loads.add(&[0, 0]);
        loads.add(&[10, 10]);
        assert_eq!(loads.rows, [40, 20]);
        assert!((loads.imbalance() - 40.0 / 30.0).abs() < 1e-12 && loads.worst == 1.5);
    }
}
