//! Honest errors: the parameters fitted again to a file's own rows, with the judged machine or source left out.
//!
//! Only rows of tier A (all that the time depends on is stated) are fitted. A row of a machine without such rows is judged by the fit
//! to all, which has not seen it either. Intervals are judged the same way: the band of a row's class is made from the other machines'
//! left-out errors (tools/predict/README.md §6, §7).

use super::decode::Parameters;
use super::fit::fit;
use super::inputs::{Inputs, IntervalClass, Tier};
use super::report::{Groups, Outcome, Sweeps};
use super::{Prediction, host};
use serde::Serialize;
use std::collections::BTreeMap;

/// Fewer machines than this cannot be left out sensibly.
pub const MIN_MACHINES: usize = 3;

/// What a refit shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Refit {
    /// Rows that were fitted.
    pub rows: usize,
    /// Machines they are from.
    pub machines: usize,
    /// Fitted to all of them.
    pub parameters: Parameters,
    /// Smallest and largest value of each parameter over the fits with a machine left out.
    pub range: (Parameters, Parameters),
    /// Errors of the fit on what it has seen.
    pub train: Groups,
    /// Errors with the row's machine left out.
    pub lomo: Groups,
    /// Ranking within sweeps, with the sweep's machine left out.
    pub lomo_sweeps: Sweeps,
    /// Errors with the row's source left out: one author may have measured several machines.
    pub loso: Groups,
    /// Bands of ln(measured / predicted) by class from the left-out errors.
    pub bands: Vec<(IntervalClass, (f64, f64))>,
    /// Share of machines' rows inside bands made without the machine: mean over machines, by class.
    pub machine_coverage: Vec<(IntervalClass, f64)>,
    /// Tokens per second of each row with its machine left out; `None` for rows that do not count.
    #[serde(skip)]
    pub lomo_tps: Vec<Option<f64>>,
}

/// Rows that count, side by side.
struct Rows<'a> {
    /// Index into the predictions.
    index: Vec<usize>,
    inputs: Vec<&'a Inputs>,
    /// Measured milliseconds per token.
    ms: Vec<f64>,
    machine: Vec<String>,
    source: Vec<String>,
    fitted: Vec<bool>,
    class: Vec<IntervalClass>,
}

impl<'a> Rows<'a> {
    fn of(predictions: &'a [Prediction]) -> Self {
        let mut rows = Self {
            index: Vec::new(),
            inputs: Vec::new(),
            ms: Vec::new(),
            machine: Vec::new(),
            source: Vec::new(),
            fitted: Vec::new(),
            class: Vec::new(),
        };
        for (i, p) in predictions.iter().enumerate() {
            let Some((x, tps)) = p.compared() else { continue };
            rows.index.push(i);
            rows.inputs.push(x);
            rows.ms.push(1000.0 / tps);
            rows.machine.push(host::machine_name(p.run));
            rows.source.push(p.run.source.clone().unwrap_or_default());
            rows.fitted.push(x.tier() == Tier::A);
            rows.class.push(x.interval_class());
        }
        rows
    }

    /// Left-out ln(predicted / measured ms), and the fits that made them. A group without fitted rows is judged by `full`.
    fn left_out(&self, group: &[String], weight: f64, full: &Parameters) -> (Vec<f64>, Vec<Parameters>) {
        let mut members: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (i, name) in group.iter().enumerate() {
            members.entry(name).or_default().push(i);
        }
        let mut errors = vec![0.0; group.len()];
        let mut fits = Vec::new();
        for (name, rows) in &members {
            let parameters = if rows.iter().any(|i| self.fitted[*i]) {
                let p = self.fit(weight, |i| group[i] != *name);
                fits.push(p);
                p
            } else {
                *full
            };
            for i in rows {
                errors[*i] = self.log_error(&parameters, *i);
            }
        }
        (errors, fits)
    }

    fn fit(&self, weight: f64, keep: impl Fn(usize) -> bool) -> Parameters {
        let rows: Vec<(&Inputs, f64)> =
            (0..self.ms.len()).filter(|i| self.fitted[*i] && keep(*i)).map(|i| (self.inputs[i], self.ms[i])).collect();
        fit(&rows, weight)
    }

    /// ln(predicted / measured ms) = ln(measured / predicted tokens/s).
    fn log_error(&self, p: &Parameters, i: usize) -> f64 {
        (p.decode(self.inputs[i]).total() / self.ms[i]).ln()
    }

    /// One value per prediction from one per row that counts.
    fn spread<T: Clone>(&self, len: usize, values: impl Fn(usize) -> T) -> Vec<Option<T>> {
        let mut all = vec![None; len];
        for (i, at) in self.index.iter().enumerate() {
            all[*at] = Some(values(i));
        }
        all
    }
}

/// Fits the file's own rows and judges each with its machine, then with its source, left out.
///
/// `None` when fewer than [`MIN_MACHINES`] machines have rows that can be fitted.
pub fn refit(predictions: &[Prediction]) -> Option<Refit> {
    let rows = Rows::of(predictions);
    let mut names: Vec<&str> = rows.machine.iter().zip(&rows.fitted).filter(|(_, f)| **f).map(|(m, _)| m.as_str()).collect();
    let fitted = names.len();
    names.sort_unstable();
    names.dedup();
    if names.len() < MIN_MACHINES {
        return None;
    }
    // Rows of one machine share an error: together they weigh as many observations as there are machines.
    let weight = (names.len() as f64 / fitted as f64).sqrt();
    let full = rows.fit(weight, |_| true);
    let train: Vec<f64> = (0..rows.ms.len()).map(|i| rows.log_error(&full, i)).collect();
    let (lomo, fits) = rows.left_out(&rows.machine, weight, &full);
    let (loso, _) = rows.left_out(&rows.source, weight, &full);
    let inside = inside_bands(&rows, &rows.machine, &lomo);
    let source_inside = inside_bands(&rows, &rows.source, &loso);
    let len = predictions.len();
    let groups = |errors: &[f64], inside: &[bool]| {
        let outcome = |i: usize| Outcome { machine: &rows.machine[i], log_error: errors[i], inside: inside[i] };
        Groups::of(predictions, &rows.spread(len, outcome))
    };
    let bands: Vec<_> = IntervalClass::ALL
        .into_iter()
        .filter_map(|c| {
            let members: Vec<usize> = (0..lomo.len()).filter(|i| rows.class[*i] == c).collect();
            Some((c, band(&rows, &lomo, &members)?))
        })
        .collect();
    let band_of = |c: IntervalClass| bands.iter().find(|(class, _)| *class == c).map_or((0.0, 0.0), |(_, b)| *b);
    let within = |errors: &[f64]| -> Vec<bool> {
        errors.iter().zip(&rows.class).map(|(e, c)| (band_of(*c).0..=band_of(*c).1).contains(e)).collect()
    };
    let extreme = |pick: fn(f64, f64) -> f64| {
        let arrays: Vec<_> = fits.iter().map(Parameters::to_array).collect();
        Parameters::from_array(std::array::from_fn(|i| arrays.iter().map(|a| a[i]).reduce(pick).unwrap_or(f64::NAN)))
    };
    Some(Refit {
        rows: fitted,
        machines: names.len(),
        parameters: full,
        range: (extreme(f64::min), extreme(f64::max)),
        train: groups(&train, &within(&train)),
        lomo: groups(&lomo, &inside),
        lomo_sweeps: Sweeps::of(predictions, &rows.spread(len, |i| lomo[i])),
        loso: groups(&loso, &source_inside),
        machine_coverage: machine_coverage(&rows, &inside),
        bands,
        lomo_tps: rows.spread(len, |i| 1000.0 / rows.ms[i] / lomo[i].exp()),
    })
}

/// Band of left-out errors that holds 80 % of unseen machines: the 10 % and 90 % quantiles with rows weighted by one over the square
/// root of their machine's number of rows, at the finite-sample level of split conformal prediction counted in machines.
fn band(rows: &Rows, errors: &[f64], members: &[usize]) -> Option<(f64, f64)> {
    let mut per_machine: BTreeMap<&str, f64> = BTreeMap::new();
    for i in members {
        *per_machine.entry(&rows.machine[*i]).or_default() += 1.0;
    }
    let machines = per_machine.len() as f64;
    let level = (0.90 * (machines + 1.0) / machines).min(1.0);
    let mut sorted: Vec<(f64, f64)> =
        members.iter().map(|i| (errors[*i], per_machine[rows.machine[*i].as_str()].powf(-0.5))).collect();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let total: f64 = sorted.iter().map(|(_, w)| w).sum();
    let at = |wanted: f64| {
        let mut sum = 0.0;
        let first = sorted.iter().find(|(_, w)| {
            sum += w / total;
            sum >= wanted
        });
        first.or(sorted.last()).map(|(e, _)| *e)
    };
    Some((at(1.0 - level + 1e-12)?, at(level - 1e-12)?))
}

/// Whether each row is inside the band of its class made from the rows of other groups (machines or sources).
fn inside_bands(rows: &Rows, group: &[String], errors: &[f64]) -> Vec<bool> {
    /// Fewer rows of other machines do not make a band.
    const MIN_ROWS: usize = 5;
    let mut cache: BTreeMap<(&str, IntervalClass), Option<(f64, f64)>> = BTreeMap::new();
    (0..errors.len())
        .map(|i| {
            let (name, class) = (group[i].as_str(), rows.class[i]);
            let band = cache.entry((name, class)).or_insert_with(|| {
                let of_class = |j: &usize| rows.class[*j] == class;
                let others: Vec<usize> = (0..errors.len()).filter(of_class).filter(|j| group[*j] != name).collect();
                if others.len() >= MIN_ROWS {
                    band(rows, errors, &others)
                } else {
                    band(rows, errors, &(0..errors.len()).filter(of_class).collect::<Vec<_>>())
                }
            });
            band.is_some_and(|(low, high)| (low - 1e-9..=high + 1e-9).contains(&errors[i]))
        })
        .collect()
}

/// Mean over machines of the share of their rows that are inside, by class.
fn machine_coverage(rows: &Rows, inside: &[bool]) -> Vec<(IntervalClass, f64)> {
    let mut shares: BTreeMap<IntervalClass, BTreeMap<&str, (f64, f64)>> = BTreeMap::new();
    for (i, inside) in inside.iter().enumerate() {
        let (hits, all) = shares.entry(rows.class[i]).or_default().entry(&rows.machine[i]).or_default();
        *hits += f64::from(u8::from(*inside));
        *all += 1.0;
    }
    let mean = |m: &BTreeMap<&str, (f64, f64)>| m.values().map(|(h, n)| h / n).sum::<f64>() / m.len() as f64;
    shares.iter().map(|(c, m)| (*c, mean(m))).collect()
}
