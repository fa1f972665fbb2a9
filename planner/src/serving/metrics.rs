//! What users feel: time to the first token, time per token, gaps, and how many get what was promised.
//!
//! TTFT: arrival to first token. TPOT = (E2E - TTFT) / (out - 1). ITL: every gap between two tokens of a request. Goodput: requests per
//! second that meet both limits, over the time from the first arrival to the last token. Percentiles are nearest-rank; refused requests
//! meet nothing and are in no percentile.

use super::simulate::{Outcome, Served};
use serde::Serialize;

/// Median, 90th and 99th percentile.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Percentiles {
    /// Half are at most this.
    pub p50: f64,
    /// Nine of ten are at most this.
    pub p90: f64,
    /// 99 of 100 are at most this.
    pub p99: f64,
}

impl Percentiles {
    /// Of values with counts; sorts them.
    pub fn of(values: &mut [(f64, u32)]) -> Self {
        values.sort_by(|a, b| a.0.total_cmp(&b.0));
        let total: u64 = values.iter().map(|v| u64::from(v.1)).sum();
        let at = |share: f64| {
            let rank = ((share * total as f64).ceil() as u64).max(1);
            let mut seen = 0;
            for (value, count) in values.iter() {
                seen += u64::from(*count);
                if seen >= rank {
                    return *value;
                }
            }
            0.0
        };
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99) }
    }
}

/// What is promised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Seconds until the first token.
    pub ttft_s: f64,
    /// Seconds per further token.
    pub tpot_s: f64,
}

/// What a run gave its users.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Metrics {
    /// Requests of the trace.
    pub requests: u64,
    /// Requests longer than the context.
    pub refused: u64,
    /// Seconds until the first token.
    pub ttft_s: Percentiles,
    /// Seconds per token after the first, per request.
    pub tpot_s: Percentiles,
    /// Seconds between tokens, per token.
    pub itl_s: Percentiles,
    /// Share of all requests that met both limits.
    pub attained: f64,
    /// Requests per second that met both limits.
    pub goodput_per_s: f64,
    /// Requests finished per second.
    pub requests_per_s: f64,
    /// Tokens per second.
    pub tokens_per_s: f64,
    /// Requests in the system, waiting or running, on average (Little's law: sum of their times over the time).
    pub users: f64,
    /// Requests in memory while the machine was busy, on average.
    pub running: f64,
    /// Most requests in memory at once.
    pub most_running: u32,
    /// Requests thrown out of memory.
    pub evictions: u64,
    /// Tokens computed again after evictions.
    pub recomputed_tokens: u64,
    /// Peak bytes of keys and values.
    pub peak_kv_bytes: u64,
    /// Share of the time during which a step ran.
    pub busy: f64,
}

/// Seconds per token after the first; `None` for one-token answers.
pub fn tpot_s(r: &Served) -> Option<f64> {
    let first = r.first_token_s?;
    (r.tokens > 1).then(|| (r.finish_s - first) / f64::from(r.tokens - 1))
}

/// Does a request meet both limits? One-token answers only have the first.
pub fn attains(r: &Served, limits: Limits) -> bool {
    r.first_token_s.is_some_and(|t| t - r.arrival_s <= limits.ttft_s) && tpot_s(r).is_none_or(|t| t <= limits.tpot_s)
}

impl Metrics {
    /// Of a run under limits.
    pub fn new(run: &Outcome, limits: Limits) -> Self {
        let percentiles = |values: Vec<f64>| Percentiles::of(&mut values.into_iter().map(|v| (v, 1)).collect::<Vec<_>>());
        let good = run.requests.iter().filter(|r| attains(r, limits)).count() as f64;
        let span_s = run.end_s.max(f64::MIN_POSITIVE);
        let finished = run.requests.iter().filter(|r| r.first_token_s.is_some());
        let residence: f64 = finished.clone().map(|r| r.finish_s - r.arrival_s).sum();
        Self {
            requests: run.requests.len() as u64,
            refused: run.refused,
            ttft_s: percentiles(finished.clone().filter_map(|r| Some(r.first_token_s? - r.arrival_s)).collect()),
            tpot_s: percentiles(run.requests.iter().filter_map(tpot_s).collect()),
            itl_s: Percentiles::of(&mut run.gaps.clone()),
            attained: good / (run.requests.len() as f64).max(1.0),
            goodput_per_s: good / span_s,
            requests_per_s: finished.count() as f64 / span_s,
            tokens_per_s: run.tokens as f64 / span_s,
            users: residence / span_s,
            running: if run.busy_s > 0.0 { run.running_s / run.busy_s } else { 0.0 },
            most_running: run.most_running,
            evictions: run.evictions,
            recomputed_tokens: run.recomputed_tokens,
            peak_kv_bytes: run.peak_kv_bytes,
            busy: run.busy_s / span_s,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let mut ten: Vec<(f64, u32)> = (1..=10).rev().map(|v| (f64::from(v), 1)).collect();
        assert_eq!(Percentiles::of(&mut ten), Percentiles { p50: 5.0, p90: 9.0, p99: 10.0 });
        assert_eq!(Percentiles::of(&mut [(2.0, 99), (7.0, 1)]), Percentiles { p50: 2.0, p90: 2.0, p99: 2.0 });
        assert_eq!(Percentiles::of(&mut []), Percentiles::default());
    }
}
