//! How much load a plan carries: the largest multiple of a trace's rate at which enough requests get what was promised.
//!
//! The rate is changed by dividing all arrival times; lengths and order stay. Attainment falls with load but for noise, so the limit is
//! bracketed by doubling and then bisected on a logarithmic scale. Below everything stands each request alone on the machine: what
//! fails there fails at every load.

use super::admission::Admission;
use super::arrivals::Arrivals;
use super::memory::KvPool;
use super::metrics::{Limits, Metrics};
use super::simulate::{Config, Outcome, simulate};
use super::steps::StepSeconds;
use crate::error::PlanError;
use serde::{Deserialize, Serialize};
use tierwise_cost::units::Seconds;

/// What is promised to users.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Slo {
    /// Time to the first token.
    pub ttft: Seconds,
    /// Tokens per second of each user after the first token.
    pub tokens_per_s: f64,
    /// Share of the requests that have to get both.
    pub share: f64,
}

impl Default for Slo {
    fn default() -> Self {
        Self { ttft: Seconds(0.5), tokens_per_s: 20.0, share: 0.9 }
    }
}

impl Slo {
    pub(crate) fn check(&self) -> Result<(), PlanError> {
        let bad = |field, found: String, expected: &str| Err(PlanError::BadRequest { field, found, expected: expected.into() });
        if !(self.ttft.0.is_finite() && self.ttft.0 > 0.0) {
            return bad("serving.slo.ttft", self.ttft.to_string(), "a time above 0");
        }
        if !(self.tokens_per_s.is_finite() && self.tokens_per_s > 0.0) {
            return bad("serving.slo.tokens_per_s", self.tokens_per_s.to_string(), "a rate above 0");
        }
        if !(self.share > 0.0 && self.share <= 1.0) {
            return bad("serving.slo.share", self.share.to_string(), "above 0, at most 1");
        }
        Ok(())
    }

    fn limits(self) -> Limits {
        Limits { ttft_s: self.ttft.0, tpot_s: 1.0 / self.tokens_per_s }
    }

    /// `first token < 500 ms and >= 20 tok/s each for 90 % of requests`
    pub fn words(&self) -> String {
        format!(
            "first token < {} and >= {} tok/s each for {} % of requests",
            self.ttft,
            self.tokens_per_s,
            (self.share * 1000.0).round() / 10.0
        )
    }
}

/// A run at one load.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoadPoint {
    /// Multiple of the trace's rate.
    pub load: f64,
    /// Requests per second that arrive.
    pub rate_per_s: f64,
    /// Who may start.
    pub admission: &'static str,
    /// What users got.
    pub metrics: Metrics,
}

/// What was simulated.
#[derive(Debug, Clone, Copy)]
pub struct Serving<'a> {
    /// The trace.
    pub arrivals: &'a Arrivals,
    /// Memory of keys and values.
    pub pool: &'a KvPool,
    /// Batching.
    pub config: &'a Config,
    /// What is promised.
    pub slo: Slo,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ServingReport {
    /// Requests of the trace, their rate and mean lengths, in a line.
    pub trace: String,
    /// What is promised.
    pub slo: Slo,
    /// Bytes for keys and values.
    pub kv_pool_bytes: u64,
    /// Every request alone on the machine.
    pub alone: Metrics,
    /// The largest load that was found to keep the promise; absent when not even requests alone get it.
    pub limit: Option<LoadPoint>,
    /// The same at the slow and the fast end of the cost model's interval, as multiples of the trace's rate (0: at no load).
    pub load_interval: Option<(f64, f64)>,
    /// The curve over loads, with the admission that was asked for.
    pub curve: Vec<LoadPoint>,
    /// All ways of admission at the load where the curve has its best goodput.
    pub admissions: Vec<LoadPoint>,
    /// One sentence for people.
    pub sentence: String,
    /// Steps and events simulated, for the record of how much work it was.
    pub events: u64,
}

/// Bisections: 2^(1/32), about 2 %.
const HALVINGS: u32 = 5;
/// Loads beyond these are not of this trace any more.
const LEAST_LOAD: f64 = 1.0 / 4096.0;
const MOST_LOAD: f64 = 4096.0;

impl Serving<'_> {
    fn at(&self, load: f64, steps: &dyn StepSeconds, admission: Admission) -> (LoadPoint, Outcome) {
        let config = Config { admission, ..self.config.clone() };
        let run = simulate(self.arrivals, load, self.pool, steps, &config);
        let metrics = Metrics::new(&run, self.slo.limits());
        let point = LoadPoint { load, rate_per_s: self.arrivals.rate_per_s() * load, admission: admission.name(), metrics };
        (point, run)
    }

    /// Every request alone on the machine, one after the other.
    pub fn alone(&self, steps: &dyn StepSeconds) -> Metrics {
        let mut all = Outcome::default();
        for r in &self.arrivals.requests {
            let one = Arrivals { format: self.arrivals.format, requests: vec![super::Arrival { at_s: 0.0, ..*r }], skipped: 0 };
            let run = simulate(&one, 1.0, self.pool, steps, self.config);
            all.requests.extend(&run.requests);
            all.gaps.extend(run.gaps);
            all.tokens += run.tokens;
            all.refused += run.refused;
            all.end_s += run.end_s;
            all.busy_s += run.busy_s;
            all.running_s += run.running_s;
            all.most_running = all.most_running.max(run.most_running);
            all.peak_kv_bytes = all.peak_kv_bytes.max(run.peak_kv_bytes);
        }
        Metrics::new(&all, self.slo.limits())
    }

    /// The largest load found at which enough requests get what was promised, and the events that were simulated.
    pub fn limit(&self, steps: &dyn StepSeconds) -> (Option<LoadPoint>, u64) {
        let mut events = 0;
        if self.alone(steps).attained < self.slo.share {
            return (None, events);
        }
        let mut probe = |load: f64| {
            let (point, run) = self.at(load, steps, self.config.admission);
            events += run.events;
            (point.metrics.attained >= self.slo.share).then_some(point)
        };
        let mut best = None;
        let mut load = 1.0;
        // Down from the trace's own rate until it holds, or up until it does not.
        while best.is_none() && load >= LEAST_LOAD {
            best = probe(load);
            if best.is_none() {
                load /= 2.0;
            }
        }
        let Some(mut held) = best else { return (None, events) };
        let mut fails = held.load * 2.0;
        if held.load >= 1.0 {
            while fails <= MOST_LOAD {
                match probe(fails) {
                    Some(point) => held = point,
                    None => break,
                }
                fails *= 2.0;
            }
        }
        for _ in 0..HALVINGS {
            let middle = (held.load * fails).sqrt();
            match probe(middle) {
                Some(point) => held = point,
                None => fails = middle,
            }
        }
        (Some(held), events)
    }
}

/// Answers how much load is carried. `steps` are the expected, slow and fast step times; without the latter two there is no interval.
pub fn study_load(serving: &Serving<'_>, steps: &dyn StepSeconds, slow_fast: Option<[&dyn StepSeconds; 2]>) -> ServingReport {
    let alone = serving.alone(steps);
    let (limit, mut events) = serving.limit(steps);
    let interval = slow_fast.map(|ends| {
        let [slow, fast] = ends.map(|s| {
            let (limit, more) = serving.limit(s);
            events += more;
            limit.map_or(0.0, |l| l.load)
        });
        (slow, fast)
    });
    // Around the limit, or around what the machine can do at all.
    let middle = limit.as_ref().map_or_else(|| saturation(serving, steps), |l| l.load);
    let mut curve = Vec::new();
    for i in -6..=4 {
        let (point, run) = serving.at(middle * f64::powf(2.0, f64::from(i) / 2.0), steps, serving.config.admission);
        events += run.events;
        curve.push(point);
    }
    let best = curve.iter().max_by(|a, b| a.metrics.goodput_per_s.total_cmp(&b.metrics.goodput_per_s));
    let at = best.map_or(middle, |p| p.load);
    let admissions: Vec<LoadPoint> = Admission::ALL
        .into_iter()
        .map(|a| {
            let (point, run) = serving.at(at, steps, a);
            events += run.events;
            point
        })
        .collect();
    let sentence = sentence(&serving.slo, &alone, limit.as_ref(), interval, &curve);
    ServingReport {
        trace: describe(serving.arrivals),
        slo: serving.slo,
        kv_pool_bytes: serving.pool.capacity_bytes,
        alone,
        limit,
        load_interval: interval,
        curve,
        admissions,
        sentence,
        events,
    }
}

/// The load at which requests would arrive as fast as they finish when all are there at once.
fn saturation(serving: &Serving<'_>, steps: &dyn StepSeconds) -> f64 {
    let (point, _) = serving.at(MOST_LOAD, steps, serving.config.admission);
    let rate = serving.arrivals.rate_per_s();
    if rate > 0.0 { (point.metrics.requests_per_s / rate).clamp(LEAST_LOAD, MOST_LOAD) } else { 1.0 }
}

/// A trace in a line.
pub fn describe(arrivals: &Arrivals) -> String {
    let (prompt, output) = arrivals.mean_tokens();
    format!(
        "{} requests over {:.0} s ({:.3} per second; {}), prompts of {prompt:.0} and answers of {output:.0} tokens on average; \
         the trace says nothing about experts: their use is the cost model's assumption",
        arrivals.requests.len(),
        arrivals.span_s(),
        arrivals.rate_per_s(),
        arrivals.format
    )
}

fn seconds(s: f64) -> String {
    if s < 1.0 { format!("{:.0} ms", s * 1e3) } else { format!("{s:.1} s") }
}

fn sentence(slo: &Slo, alone: &Metrics, limit: Option<&LoadPoint>, interval: Option<(f64, f64)>, curve: &[LoadPoint]) -> String {
    let percent = |x: f64| format!("{:.1} %", x * 100.0);
    let range = interval.map_or_else(String::new, |(low, high)| {
        format!(" ({low:.2} to {high:.2} times between the slow and the fast end of the cost model)")
    });
    match limit {
        Some(l) => format!(
            "{:.1} users at once on average: first token < {}, >= {} tok/s each, for {} of requests, at {:.3} requests per second, \
             {:.2} times the trace's rate{range}.",
            l.metrics.users,
            slo.ttft,
            slo.tokens_per_s,
            percent(l.metrics.attained),
            l.rate_per_s,
            l.load
        ),
        None => {
            let tpot = alone.tpot_s.p90;
            let speed = if tpot > 0.0 { 1.0 / tpot } else { 0.0 };
            let shared = curve.first().map_or_else(String::new, |p| {
                let m = &p.metrics;
                let speed = if m.tpot_s.p90 > 0.0 { 1.0 / m.tpot_s.p90 } else { 0.0 };
                format!(
                    "; with {:.1} users at once ({:.3} requests per second) it is {} and {speed:.1} tok/s",
                    m.users,
                    p.rate_per_s,
                    seconds(m.ttft_s.p90)
                )
            });
            format!(
                "At no load: {} is not kept even for one user alone ({} of requests; nine of ten wait at most {} for the first token, and \
                 nine of ten get at least {speed:.1} tok/s{shared}){}.",
                slo.words(),
                percent(alone.attained),
                seconds(alone.ttft_s.p90),
                match interval {
                    Some((_, high)) if high > 0.0 =>
                        format!("; at the fast end of the cost model {high:.2} times the trace's rate"),
                    _ => String::new(),
                }
            )
        }
    }
}
