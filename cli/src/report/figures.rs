//! Which figures a study gets, and what to read from each.

use super::plots::{self, Axes, Bar, MOST_SERIES, Series};
use super::{Study, axis_title, by_model, label, numeric, value};
use crate::ui::number;
use anyhow::Result;
use tierwise_planner::capacity::Row;
use tierwise_planner::serving::ServingReport;

/// A figure of the report.
pub struct Figure {
    /// Starts a section.
    pub heading: Option<String>,
    pub title: Option<String>,
    pub svg: String,
    /// Names of the series.
    pub legend: Vec<String>,
    /// What to read from it.
    pub caption: String,
}

const WIDE: (u32, u32) = (900, 400);

/// All figures, in the order of the page.
pub fn all(report: &Study<'_>) -> Result<Vec<Figure>> {
    let mut list = Vec::new();
    section(&mut list, "Serving: what users get as the load grows", serving(report)?);
    section(&mut list, "Speed", speed(report)?);
    section(&mut list, "Each user against all together", pareto(report)?);
    section(&mut list, "What a little more would bring", marginals(report)?);
    Ok(list)
}

fn section(list: &mut Vec<Figure>, heading: &str, mut figures: Vec<Figure>) {
    if let Some(first) = figures.first_mut() {
        first.heading = Some(heading.into());
    }
    list.append(&mut figures);
}

/// The numeric axis with the most values.
fn main_axis(report: &Study<'_>) -> Option<&'static str> {
    let count = |axis: &str| {
        let mut values: Vec<f64> = report.rows.iter().filter_map(|r| numeric(&r.inputs, axis)).collect();
        values.sort_by(f64::total_cmp);
        values.dedup();
        values.len()
    };
    let mut best: Option<(&'static str, usize)> = None;
    for axis in report.axes.iter().copied() {
        let n = count(axis);
        if n > 1 && best.is_none_or(|b| n > b.1) {
            best = Some((axis, n));
        }
    }
    best.map(|b| b.0)
}

/// A number of a row with the ends of its interval.
type Read = fn(&Row) -> Option<(f64, (f64, f64))>;

/// Rows of one model as series along `axis`, one for each combination of the other axes.
fn series_along(report: &Study<'_>, rows: &[&Row], axis: &str, read: Read) -> Vec<Series> {
    let others: Vec<&str> = report.axes.iter().copied().filter(|a| *a != axis && !matches!(*a, "model" | "format")).collect();
    let mut list: Vec<Series> = Vec::new();
    for row in rows {
        let (Some(x), Some((y, ends))) = (numeric(&row.inputs, axis), read(row)) else { continue };
        let parts: Vec<String> = others
            .iter()
            .map(|a| match super::axis_word(a) {
                "" => value(&row.inputs, a),
                word => format!("{word} {}", value(&row.inputs, a)),
            })
            .collect();
        let name = parts.join(", ");
        let at = list.iter().position(|s| s.name == name).unwrap_or_else(|| {
            list.push(Series { name, points: Vec::new(), ends: Vec::new(), line: true });
            list.len() - 1
        });
        list[at].points.push((x, y));
        list[at].ends.push(ends);
    }
    list
}

/// At most as many series as can be told apart, evenly picked, and how many were left out.
fn pick(mut list: Vec<Series>) -> (Vec<Series>, usize) {
    let n = list.len();
    if n <= MOST_SERIES {
        return (list, 0);
    }
    let keep: Vec<usize> = (0..MOST_SERIES).map(|i| i * (n - 1) / (MOST_SERIES - 1)).collect();
    let mut i = 0;
    list.retain(|_| {
        i += 1;
        keep.contains(&(i - 1))
    });
    (list, n - MOST_SERIES)
}

fn left_out(n: usize) -> String {
    if n == 0 { String::new() } else { format!(" {n} more lines are only in the table.") }
}

/// Doubling steps read better on a logarithmic axis.
fn spread(series: &[Series]) -> bool {
    let xs = || series.iter().flat_map(|s| s.points.iter().map(|p| p.0));
    let (low, high) = xs().fold((f64::INFINITY, 0.0_f64), |(l, h), x| (l.min(x), h.max(x)));
    low > 0.0 && high / low >= 8.0
}

fn per_user(row: &Row) -> Option<(f64, (f64, f64))> {
    let i = row.expected.as_ref()?.decode_tokens_per_s_per_user;
    Some((i.value, (i.low, i.high)))
}

fn speed(report: &Study<'_>) -> Result<Vec<Figure>> {
    let axis = main_axis(report);
    let mut figures = Vec::new();
    for (model, rows) in by_model(report.rows) {
        if rows.iter().all(|r| r.expected.is_none()) {
            continue;
        }
        let Some(axis) = axis else {
            figures.push(speed_bars(report, model, &rows)?);
            continue;
        };
        let (mut series, more) = pick(series_along(report, &rows, axis, per_user));
        if series.len() > 1 {
            // Many intervals at the same places hide each other; the table has them.
            series.iter_mut().for_each(|s| s.ends.clear());
        }
        let one = series.len() == 1;
        let chart_axes =
            Axes { x: axis_title(axis), y: "decode tok/s of each user", log_x: spread(&series), log_y: false, limit: None };
        let svg = plots::chart(&chart_axes, &series, WIDE)?;
        let caption = format!(
            "Higher is better. Where a line is flat, more of this buys nothing.{}{}",
            if one { " Bars are the cost model's interval." } else { " Intervals are in the table." },
            left_out(more)
        );
        figures.push(Figure { heading: None, title: Some(model), svg, legend: names(&series), caption });
    }
    Ok(figures)
}

fn names(series: &[Series]) -> Vec<String> {
    series.iter().map(|s| s.name.clone()).collect()
}

/// Without a numeric axis: one bar for each combination.
fn speed_bars(report: &Study<'_>, model: String, rows: &[&Row]) -> Result<Figure> {
    const MOST: usize = 30;
    let all: Vec<Bar> = rows
        .iter()
        .filter_map(|r| {
            let (v, ends) = per_user(r)?;
            Some(Bar {
                label: label(report.axes, &r.inputs, false),
                value: v,
                ends: Some(ends),
                text: format!("{} tok/s", number(v)),
            })
        })
        .collect();
    let more = all.len().saturating_sub(MOST);
    let svg = plots::bars(&all[..all.len() - more], 0, 0.0)?;
    let caption = format!(
        "Decode tokens per second of each user. The thin line is the cost model's interval: overlapping ones cannot be told apart with \
         certainty.{}",
        left_out(more)
    );
    Ok(Figure { heading: None, title: Some(model), svg, legend: Vec::new(), caption })
}

/// A line for the front of each context, and what it beats.
fn pareto(report: &Study<'_>) -> Result<Vec<Figure>> {
    let of = |row: &Row| {
        let e = row.expected.as_ref()?;
        Some((e.decode_tokens_per_s_per_user.value, e.decode_tokens_per_s.value))
    };
    let mut figures = Vec::new();
    for (model, rows) in by_model(report.rows) {
        // With one batch size both axes say the same.
        let mut batches: Vec<u32> = rows.iter().map(|r| r.inputs.batch).collect();
        batches.sort_unstable();
        batches.dedup();
        let fronts: Vec<_> = report.pareto.iter().filter(|f| f.model == model && !f.rows.is_empty()).collect();
        if batches.len() < 2 || fronts.is_empty() {
            continue;
        }
        let (mut series, more) = pick(
            fronts
                .iter()
                .map(|f| {
                    let name = if fronts.len() > 1 { format!("context {}", f.context) } else { "on the Pareto front".into() };
                    let points = f.rows.iter().filter_map(|i| of(&report.rows[*i])).collect();
                    Series { name, points, ends: Vec::new(), line: true }
                })
                .collect(),
        );
        let beaten: Vec<(f64, f64)> =
            rows.iter().filter(|r| !fronts.iter().any(|f| f.rows.contains(&r.row))).filter_map(|r| of(r)).collect();
        if !beaten.is_empty() && series.len() < MOST_SERIES {
            series.push(Series { name: "beaten in both by another".into(), points: beaten, ends: Vec::new(), line: false });
        }
        let chart_axes = Axes {
            x: "decode tok/s of each user",
            y: "decode tok/s of all together",
            log_x: spread(&series),
            log_y: false,
            limit: None,
        };
        let svg = plots::chart(&chart_axes, &series, WIDE)?;
        let ends: Vec<String> = [fronts[0].rows.first(), fronts[0].rows.last()]
            .into_iter()
            .flatten()
            .map(|i| label(report.axes, &report.rows[*i].inputs, false))
            .collect();
        let caption = format!(
            "Up is more together, right is more for each. Only points on a line are worth choosing{}: the first line goes from {} to {}.{}",
            if fronts.len() > 1 { " among those of the same context" } else { "" },
            ends.first().map_or("-", String::as_str),
            ends.last().map_or("-", String::as_str),
            left_out(more)
        );
        figures.push(Figure { heading: None, title: Some(model), svg, legend: names(&series), caption });
    }
    Ok(figures)
}

fn marginals(report: &Study<'_>) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    // One scale for all, so that bars of different machines can be compared.
    let largest = report.marginal.iter().flat_map(|m| &m.values).map(|v| v.gain_fraction).fold(0.0, f64::max);
    for m in report.marginal {
        let mut helpful: Vec<_> = m.values.iter().filter(|v| v.gain_fraction >= 5e-5).collect();
        helpful.sort_by(|a, b| b.gain_fraction.total_cmp(&a.gain_fraction));
        let idle: Vec<&str> = m.values.iter().filter(|v| v.gain_fraction < 5e-5).map(|v| v.what.as_str()).collect();
        let bars: Vec<Bar> = helpful
            .iter()
            .map(|v| Bar {
                label: v.what.clone(),
                value: v.gain_fraction,
                ends: None,
                text: format!("{:+.2} %  ({:+.3} tok/s)", v.gain_fraction * 100.0, v.gain),
            })
            .collect();
        let svg = if bars.is_empty() { String::new() } else { plots::bars(&bars, 1, largest)? };
        let caption = if bars.is_empty() {
            format!("Nothing helps by itself: {}.", idle.join(", "))
        } else {
            let nothing = if idle.is_empty() { String::new() } else { format!(" Without effect: {}.", idle.join(", ")) };
            format!(
                "Gain in decode speed from one GiB or one GB/s more, each alone, with a new plan; all such figures have one scale.{nothing}"
            )
        };
        figures.push(Figure { heading: None, title: Some(m.label.clone()), svg, legend: Vec::new(), caption });
    }
    Ok(figures)
}

/// The row that carries the most requests per second; the first of equals.
pub fn best_served<'a>(report: &Study<'a>) -> Option<(&'a Row, &'a ServingReport)> {
    let mut best: Option<(&Row, &ServingReport, f64)> = None;
    for row in report.rows {
        let Some(s) = row.expected.as_ref().and_then(|e| e.serving.as_ref()) else { continue };
        let rate = s.limit.as_ref().map_or(0.0, |l| l.rate_per_s);
        if best.is_none_or(|b| rate > b.2) {
            best = Some((row, s, rate));
        }
    }
    best.map(|b| (b.0, b.1))
}

fn served_rate(row: &Row) -> Option<(f64, (f64, f64))> {
    let s = row.expected.as_ref()?.serving.as_ref()?;
    let rate = s.limit.as_ref().map_or(0.0, |l| l.rate_per_s);
    Some((rate, (rate, rate)))
}

fn serving(report: &Study<'_>) -> Result<Vec<Figure>> {
    let Some((row, s)) = best_served(report) else { return Ok(Vec::new()) };
    let mut figures = Vec::new();
    let who = label(report.axes, &row.inputs, true);
    let curve = |name: &str, y: &dyn Fn(&tierwise_planner::serving::LoadPoint) -> f64| Series {
        name: name.into(),
        points: s.curve.iter().map(|p| (p.rate_per_s, y(p))).collect(),
        ends: Vec::new(),
        line: true,
    };
    let x = "requests per second that arrive";
    let small = (900, 300);
    let rates =
        vec![curve("that meet the promise", &|p| p.metrics.goodput_per_s), curve("finished", &|p| p.metrics.requests_per_s)];
    let svg = plots::chart(&Axes { x, y: "requests per second", log_x: true, log_y: false, limit: None }, &rates, small)?;
    let caption = format!(
        "Promise: {}. Where the two lines part, requests still finish but too late to be good; right of the peak more load makes \
         fewer users happy.",
        s.slo.words()
    );
    figures.push(Figure { heading: None, title: Some(format!("{who}: good requests")), svg, legend: names(&rates), caption });
    let waits =
        vec![curve("nine of ten wait at most", &|p| p.metrics.ttft_s.p90), curve("half wait at most", &|p| p.metrics.ttft_s.p50)];
    let limit = Some(s.slo.ttft.0);
    let svg = plots::chart(&Axes { x, y: "seconds to the first token", log_x: true, log_y: true, limit }, &waits, small)?;
    let caption =
        "Time to the first token, queue included. The dashed line is what is promised; both axes are logarithmic.".to_string();
    figures.push(Figure {
        heading: None,
        title: Some(format!("{who}: waiting for the first token")),
        svg,
        legend: names(&waits),
        caption,
    });
    let rate_of = |tpot: f64| if tpot > 0.0 { 1.0 / tpot } else { f64::NAN };
    let speeds = vec![
        curve("nine of ten get at least", &|p| rate_of(p.metrics.tpot_s.p90)),
        curve("half get at least", &|p| rate_of(p.metrics.tpot_s.p50)),
    ];
    let limit = Some(s.slo.tokens_per_s);
    let svg = plots::chart(&Axes { x, y: "tok/s of each user", log_x: true, log_y: false, limit }, &speeds, small)?;
    let caption =
        "Speed of each answer after its first token: it falls as more requests share the machine and reach more experts. \
                   The dashed line is what is promised."
            .to_string();
    figures.push(Figure {
        heading: None,
        title: Some(format!("{who}: speed of the answers")),
        svg,
        legend: names(&speeds),
        caption,
    });
    if let Some(axis) = main_axis(report) {
        for (model, rows) in by_model(report.rows) {
            let (mut series, more) = pick(series_along(report, &rows, axis, served_rate));
            series.iter_mut().for_each(|s| s.ends.clear());
            if series.iter().all(|s| s.points.iter().all(|p| p.1 == 0.0)) {
                continue;
            }
            let chart_axes =
                Axes { x: axis_title(axis), y: "requests per second kept", log_x: spread(&series), log_y: false, limit: None };
            let svg = plots::chart(&chart_axes, &series, WIDE)?;
            let caption = format!(
                "The largest load at which the promise is kept. 0 means that not even requests alone get it. Room for keys and values is \
                 taken from experts, so there is a best size.{}",
                left_out(more)
            );
            figures.push(Figure { heading: None, title: Some(model), svg, legend: names(&series), caption });
        }
    }
    Ok(figures)
}
