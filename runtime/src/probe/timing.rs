//! Timing many small measurements fairly: interleaved rounds, the median and the spread of each.
//!
//! A disturbance (another program, a change of frequency) then hits one run of many measurements, which their medians forget,
//! instead of all runs of one.

use std::time::{Duration, Instant};
use tierwise_cost::machine::Spread;

/// A measurement: what is run, and how long each run took.
pub(super) struct Case<'a> {
    run: Box<dyn FnMut() + Send + 'a>,
    /// Runs per round, so that a round takes longer than the clock's noise.
    repeats: u32,
    /// Seconds of one run, one entry per round.
    seconds: Vec<f64>,
}

impl<'a> Case<'a> {
    pub(super) fn new(run: impl FnMut() + Send + 'a) -> Self {
        Self { run: Box::new(run), repeats: 1, seconds: Vec::new() }
    }

    /// Microseconds of one run; `None` before the first round.
    pub(super) fn us(&self) -> Option<Spread> {
        let us: Vec<f64> = self.seconds.iter().map(|s| s * 1e6).collect();
        Spread::of(&us)
    }

    fn visit(&mut self) -> f64 {
        let start = Instant::now();
        for _ in 0..self.repeats {
            (self.run)();
        }
        // The clock ticks in nanoseconds; what takes less takes one.
        (start.elapsed().as_secs_f64() / f64::from(self.repeats)).max(1e-9)
    }
}

/// How long to measure.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rounds {
    /// Rounds are begun until this has passed.
    pub(super) time: Duration,
    /// But at least so many, unless this has already taken half as long again.
    pub(super) at_least: usize,
    /// Short runs are repeated until a visit takes this long.
    pub(super) visit: Duration,
}

/// Warms every case up, then runs them all, round by round. `progress` is told the share that is done.
pub(super) fn run_rounds(cases: &mut [Case<'_>], rounds: Rounds, progress: &mut dyn FnMut(f64)) {
    let start = Instant::now();
    for case in cases.iter_mut() {
        // The first run grows buffers and wakes threads, the second says how many fit a visit.
        case.visit();
        let seconds = if case.visit() < 0.02 { case.visit() } else { 1.0 };
        case.repeats = (rounds.visit.as_secs_f64() / seconds).ceil().clamp(1.0, 1000.0) as u32;
    }
    let mut done = 0;
    let late = rounds.time.mul_f64(1.5).max(Duration::from_secs(1));
    // Three runs have a middle one: the least that says something on a machine that is slow or busy.
    while done < rounds.at_least.min(3)
        || (done < rounds.at_least && start.elapsed() < late)
        || (done >= rounds.at_least && start.elapsed() < rounds.time)
    {
        let count = cases.len();
        for (i, case) in cases.iter_mut().enumerate() {
            let seconds = case.visit();
            case.seconds.push(seconds);
            let by_time = start.elapsed().as_secs_f64() / rounds.time.as_secs_f64().max(1e-9);
            let by_rounds = (done as f64 + (i + 1) as f64 / count as f64) / rounds.at_least.max(1) as f64;
            progress(by_time.min(by_rounds).min(1.0));
        }
        done += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_runs_in_every_round() {
        let mut counts = [0u32; 2];
        let [a, b] = &mut counts;
        let mut cases = [Case::new(|| *a += 1), Case::new(|| *b += 1)];
        let rounds = Rounds { time: Duration::ZERO, at_least: 5, visit: Duration::ZERO };
        let mut last = 0.0;
        run_rounds(&mut cases, rounds, &mut |share| last = share);
        let spreads = cases.each_ref().map(|c| c.us().expect("measured"));
        assert!(spreads.iter().all(|s| s.runs == 5 && s.min <= s.median && s.median <= s.max));
        assert!(last > 0.0);
        drop(cases);
        // Three runs to warm up, then one in each round.
        assert_eq!(counts, [8, 8]);
    }
}
