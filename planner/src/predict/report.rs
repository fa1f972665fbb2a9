//! How good the predictions are: errors, coverage of the intervals, ranking within sweeps, memory verdicts.
//!
//! Errors are |predicted / measured - 1| of tokens per second; quantiles interpolate linearly between rows. All figures are over rows
//! that count: measured, of good quality, and described well enough. Whether they are honest depends on which parameters made the
//! predictions: the shipped ones have seen the published runs, those of [`super::refit`] have not seen the row's machine.

use super::inputs::Tier;
use super::memory::Verdict;
use super::{Prediction, host};
use serde::Serialize;
use std::collections::BTreeMap;

/// Errors of a group of rows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Errors {
    /// The group.
    pub name: String,
    /// Rows in it.
    pub rows: usize,
    /// Machines in it.
    pub machines: usize,
    /// Median error.
    pub median_abs_error: f64,
    /// 90 % quantile of the error.
    pub p90_abs_error: f64,
    /// Median over machines of the machine's median error.
    pub median_over_machines: f64,
    /// Median of predicted over measured time, minus 1: positive when predicted too slow.
    pub bias_of_time: f64,
    /// Share of rows inside their 80 % interval.
    pub coverage: f64,
}

/// One row of a group: its machine, ln(measured / predicted), and whether it is inside its interval.
#[derive(Debug, Clone, Copy)]
pub struct Outcome<'a> {
    /// The machine.
    pub machine: &'a str,
    /// ln(measured / predicted tokens per second).
    pub log_error: f64,
    /// The measurement is inside the interval.
    pub inside: bool,
}

impl Errors {
    /// The figures of a group; `None` of an empty one.
    pub fn of(name: impl Into<String>, rows: &[Outcome]) -> Option<Self> {
        let abs = |e: f64| ((-e).exp() - 1.0).abs();
        let mut by_machine: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for row in rows {
            by_machine.entry(row.machine).or_default().push(abs(row.log_error));
        }
        let errors: Vec<f64> = rows.iter().map(|r| abs(r.log_error)).collect();
        let logs: Vec<f64> = rows.iter().map(|r| r.log_error).collect();
        let machines: Vec<f64> = by_machine.into_values().map(|e| quantile(e, 0.5)).collect();
        (!rows.is_empty()).then(|| Self {
            name: name.into(),
            rows: rows.len(),
            machines: machines.len(),
            median_abs_error: quantile(errors.clone(), 0.5),
            p90_abs_error: quantile(errors, 0.9),
            median_over_machines: quantile(machines, 0.5),
            bias_of_time: quantile(logs, 0.5).exp() - 1.0,
            coverage: rows.iter().filter(|r| r.inside).count() as f64 / rows.len() as f64,
        })
    }
}

/// The quantile of `values` at `share`, interpolated linearly; NaN of no values.
pub fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let Some(last) = values.len().checked_sub(1) else { return f64::NAN };
    let at = share * last as f64;
    let low = (at.floor() as usize).min(last);
    let high = (low + 1).min(last);
    values[low] + (values[high] - values[low]) * (at - low as f64)
}

/// Errors by every grouping that is reported.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Groups {
    /// `core`, `tier A`, `tier B`, `all`; empty ones left out.
    pub totals: Vec<Errors>,
    /// By engine, over all rows that count.
    pub by_engine: Vec<Errors>,
    /// By placement class, over all rows that count.
    pub by_class: Vec<Errors>,
    /// By placement class, core rows.
    pub core_by_class: Vec<Errors>,
    /// By engine, core rows.
    pub core_by_engine: Vec<Errors>,
}

impl Groups {
    /// Groups rows that count. `outcomes[i]` belongs to `predictions[i]`; `None` for rows that do not count.
    pub fn of(predictions: &[Prediction], outcomes: &[Option<Outcome>]) -> Self {
        let rows: Vec<(&Prediction, Outcome)> = predictions.iter().zip(outcomes).filter_map(|(p, o)| o.map(|o| (p, o))).collect();
        let total = |name: &str, keep: &dyn Fn(&Prediction) -> bool| {
            Errors::of(name, &rows.iter().filter(|(p, _)| keep(p)).map(|(_, o)| *o).collect::<Vec<_>>())
        };
        let by = |key: &dyn Fn(&Prediction) -> String, keep: &dyn Fn(&Prediction) -> bool| {
            let mut groups: BTreeMap<String, Vec<Outcome>> = BTreeMap::new();
            for (p, o) in rows.iter().filter(|(p, _)| keep(p)) {
                groups.entry(key(p)).or_default().push(*o);
            }
            groups.into_iter().filter_map(|(name, rows)| Errors::of(name, &rows)).collect::<Vec<_>>()
        };
        let engine = |p: &Prediction| p.run.engine.clone().unwrap_or_else(|| "not stated".into());
        let class = |p: &Prediction| p.inputs.as_ref().map_or("not stated", |x| x.class).to_string();
        let core = |p: &Prediction| p.is_core();
        let tier = |p: &Prediction, t: Tier| p.inputs.as_ref().is_ok_and(|x| x.tier() == t);
        let totals = [
            total("core", &core),
            total("tier A: all is stated", &|p| tier(p, Tier::A)),
            total("tier B: RAM speed is a prior", &|p| tier(p, Tier::B)),
            total("all", &|_| true),
        ];
        Self {
            totals: totals.into_iter().flatten().collect(),
            by_engine: by(&engine, &|_| true),
            by_class: by(&class, &|_| true),
            core_by_class: by(&class, &core),
            core_by_engine: by(&engine, &core),
        }
    }

    /// The errors that acceptance is judged by: of core rows, or of all rows in a file that has none.
    pub fn headline(&self) -> Option<&Errors> {
        self.total("core").or_else(|| self.total("all"))
    }

    /// The total of this name.
    pub fn total(&self, name: &str) -> Option<&Errors> {
        self.totals.iter().find(|e| e.name.starts_with(name))
    }
}

/// Pairs of one sweep that are ranked as measured.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Sweeps {
    /// Pairs that differ in CPU expert layers, by more than the measurements' noise.
    pub pairs: usize,
    /// Those ranked right; a tie is wrong.
    pub right: usize,
    /// The same in sweeps with core rows.
    pub core_pairs: usize,
    /// Those ranked right.
    pub core_right: usize,
    /// All pairs: threads, depth, model and others too.
    pub all_pairs: usize,
    /// Those ranked right.
    pub all_right: usize,
}

impl Sweeps {
    /// Ranks pairs. `log_errors[i]`: ln(measured / predicted tokens/s) of `predictions[i]`; `None` for rows that do not count.
    pub fn of(predictions: &[Prediction], log_errors: &[Option<f64>]) -> Self {
        struct Member {
            measured_log_ms: f64,
            predicted_log_ms: f64,
            relative_sd: f64,
            cpu_layers: f64,
            core: bool,
        }
        let mut sweeps: BTreeMap<&str, Vec<Member>> = BTreeMap::new();
        for (p, e) in predictions.iter().zip(log_errors) {
            let (Some(sweep), Some((x, tps)), Some(e)) = (&p.run.sweep_id, p.compared(), e) else { continue };
            let measured_log_ms = -tps.ln();
            sweeps.entry(sweep).or_default().push(Member {
                measured_log_ms,
                predicted_log_ms: measured_log_ms + e,
                relative_sd: p.run.decode_sd.unwrap_or(0.0) / tps,
                cpu_layers: x.experts.layers,
                core: p.is_core(),
            });
        }
        let mut found = Self::default();
        for members in sweeps.values() {
            let core = members.iter().any(|m| m.core);
            for (i, a) in members.iter().enumerate() {
                for b in &members[..i] {
                    let measured = b.measured_log_ms - a.measured_log_ms;
                    if measured.abs() <= (2.0 * (a.relative_sd + b.relative_sd)).max(0.03) {
                        continue;
                    }
                    let predicted = b.predicted_log_ms - a.predicted_log_ms;
                    // Equal predictions differ by rounding: they are a tie.
                    let right = usize::from(predicted.abs() > 1e-9 && predicted * measured > 0.0);
                    found.all_pairs += 1;
                    found.all_right += right;
                    if (a.cpu_layers - b.cpu_layers).abs() > 1e-9 {
                        found.pairs += 1;
                        found.right += right;
                        found.core_pairs += usize::from(core);
                        found.core_right += right * usize::from(core);
                    }
                }
            }
        }
        found
    }

    /// Share of the pairs in CPU expert layers that are ranked right; `None` without pairs.
    pub fn share_right(&self) -> Option<f64> {
        (self.pairs > 0).then(|| self.right as f64 / self.pairs as f64)
    }
}

/// Memory verdicts against outcomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct MemoryCounts {
    /// Runs that ended with `oom` or `vram_spill` and say enough to judge.
    pub failed: usize,
    /// Those that are said not to fit.
    pub failed_does_not_fit: usize,
    /// Those that are said to be at risk.
    pub failed_at_risk: usize,
    /// Runs that went well and say enough to judge (without those that page on purpose).
    pub ok: usize,
    /// Those that are said not to fit: false alarms.
    pub ok_does_not_fit: usize,
    /// Those that are said to be at risk.
    pub ok_at_risk: usize,
    /// Runs with outcome `swap_bound` that say enough.
    pub swap_bound: usize,
    /// Those recognised.
    pub swap_bound_found: usize,
    /// Other runs said to be bound by the disk: false alarms.
    pub swap_bound_false: usize,
}

impl MemoryCounts {
    /// Counts verdicts.
    pub fn of(predictions: &[Prediction]) -> Self {
        let mut c = Self::default();
        for p in predictions {
            let outcome = p.run.outcome.as_deref().unwrap_or("ok");
            let paged = p.run.placement_class.as_deref() == Some("gpu_uvm");
            match (outcome, p.vram.map(|(_, v)| v)) {
                ("oom" | "vram_spill", Some(v)) => {
                    c.failed += 1;
                    c.failed_does_not_fit += usize::from(v == Verdict::DoesNotFit);
                    c.failed_at_risk += usize::from(v == Verdict::AtRisk);
                }
                ("ok", Some(v)) if !paged => {
                    c.ok += 1;
                    c.ok_does_not_fit += usize::from(v == Verdict::DoesNotFit);
                    c.ok_at_risk += usize::from(v == Verdict::AtRisk);
                }
                _ => {}
            }
            if let Some(need) = p.host {
                let was = outcome == "swap_bound";
                c.swap_bound += usize::from(was);
                c.swap_bound_found += usize::from(was && need.swap_bound);
                c.swap_bound_false += usize::from(!was && need.swap_bound);
            }
        }
        c
    }

    /// Failed runs that are not said to fit.
    pub const fn recognised(&self) -> usize {
        self.failed_does_not_fit + self.failed_at_risk
    }
}

/// How good predictions are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Rows of the file.
    pub rows: usize,
    /// Rows with a prediction.
    pub predicted: usize,
    /// Rows that count: predicted, measured and of good quality.
    pub compared: usize,
    /// Errors by group.
    pub errors: Groups,
    /// Ranking within sweeps.
    pub sweeps: Sweeps,
    /// Memory verdicts.
    pub memory: MemoryCounts,
    /// Errors of the sketch of prompt speed.
    pub prefill: Option<Errors>,
    /// Why rows have no prediction, with how many.
    pub skipped: Vec<(String, usize)>,
}

impl Report {
    /// The report of predictions made with the shipped parameters and intervals.
    pub fn of(predictions: &[Prediction]) -> Self {
        let machines: Vec<String> = predictions.iter().map(|p| host::machine_name(p.run)).collect();
        let log_errors: Vec<Option<f64>> = predictions.iter().map(Prediction::log_error).collect();
        let outcome = |i: usize| {
            let p: &Prediction = &predictions[i];
            let (speed, _) = p.decode.as_ref().ok()?;
            let (_, measured) = p.compared()?;
            let inside = (speed.low..=speed.high).contains(&measured);
            Some(Outcome { machine: &machines[i], log_error: log_errors[i]?, inside })
        };
        let outcomes: Vec<Option<Outcome>> = (0..predictions.len()).map(outcome).collect();
        let prefill: Vec<Outcome> = predictions
            .iter()
            .zip(&machines)
            .filter(|(p, _)| p.run.quality.as_deref() != Some("low"))
            .filter_map(|(p, machine)| {
                let log_error = (p.run.prefill_tps? / p.prefill_tps?).ln();
                Some(Outcome { machine, log_error, inside: false })
            })
            .collect();
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for p in predictions {
            if let Err(reason) = &p.decode {
                *reasons.entry(reason).or_default() += 1;
            }
        }
        let mut skipped: Vec<(String, usize)> = reasons.into_iter().map(|(r, n)| (r.to_string(), n)).collect();
        skipped.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        Self {
            rows: predictions.len(),
            predicted: predictions.iter().filter(|p| p.decode.is_ok()).count(),
            compared: outcomes.iter().flatten().count(),
            errors: Groups::of(predictions, &outcomes),
            sweeps: Sweeps::of(predictions, &log_errors),
            memory: MemoryCounts::of(predictions),
            prefill: Errors::of("prefill (prior)", &prefill),
            skipped,
        }
    }
}
