//! The answer in a few sentences: what is fastest, what is enough, what it serves, what does not work.

use super::{Study, by_model, label};
use crate::ui::number;
use tierwise_planner::capacity::Row;

/// A row that reaches this share of the best is called enough.
const ENOUGH: f64 = 0.9;

/// The sentences, most important first.
pub fn sentences(report: &Study<'_>) -> Vec<String> {
    let mut list = Vec::new();
    for (model, rows) in by_model(report.rows) {
        let possible: Vec<&&Row> = rows.iter().filter(|r| r.expected.is_some()).collect();
        if possible.is_empty() {
            let why = rows.first().and_then(|r| r.error.as_deref()).unwrap_or_default();
            list.push(format!("{model}: none of {} combinations works. The first: {why}.", rows.len()));
            continue;
        }
        if let Some(serving) = best_served(&possible) {
            list.push(format!("{model}: {serving}"));
        }
        list.extend(speed(report, &model, &possible));
        let impossible = rows.len() - possible.len();
        if impossible > 0 {
            list.push(format!(
                "{model}: {impossible} of {} combinations do not work; the table says why and what would.",
                rows.len()
            ));
        }
    }
    list
}

fn per_user(r: &Row) -> f64 {
    r.expected.as_ref().map_or(0.0, |e| e.decode_tokens_per_s_per_user.value)
}

fn together(r: &Row) -> f64 {
    r.expected.as_ref().map_or(0.0, |e| e.decode_tokens_per_s.value)
}

/// The first of the largest: ties go to the row that comes first in the study.
fn best<'a>(rows: &[&'a &'a Row], key: fn(&Row) -> f64) -> Option<&'a Row> {
    let mut best: Option<&Row> = None;
    for row in rows {
        if best.is_none_or(|b| key(row) > key(b) * (1.0 + 1e-9)) {
            best = Some(row);
        }
    }
    best
}

fn speed(report: &Study<'_>, model: &str, rows: &[&&Row]) -> Vec<String> {
    let mut list = Vec::new();
    let name = |r: &Row| label(report.axes, &r.inputs, false);
    let Some(fastest) = best(rows, per_user) else { return list };
    let e = fastest.expected.as_ref().expect("only possible rows are compared");
    let i = e.decode_tokens_per_s_per_user;
    list.push(format!(
        "{model}: fastest for one user with {}: {} tok/s ({} to {}), first token of a prompt after {}; limited by {}.",
        name(fastest),
        number(i.value),
        number(i.low),
        number(i.high),
        super::time(e.ttft_s.value),
        e.binding
    ));
    let enough = rows.iter().find(|r| per_user(r) >= ENOUGH * i.value);
    if let Some(row) = enough.filter(|r| r.row != fastest.row) {
        list.push(format!(
            "{model}: {} already gives {} tok/s, {:.0} % of that.",
            name(row),
            number(per_user(row)),
            100.0 * per_user(row) / i.value
        ));
    }
    if let Some(most) = best(rows, together).filter(|r| r.row != fastest.row && together(r) > together(fastest) * 1.01) {
        list.push(format!(
            "{model}: most tokens together with {}: {} tok/s, {} for each of {} users.",
            name(most),
            number(together(most)),
            number(per_user(most)),
            most.inputs.batch
        ));
    }
    list
}

/// The serving sentence of the row that carries the most requests.
fn best_served(rows: &[&&Row]) -> Option<String> {
    let served = rows.iter().filter_map(|r| {
        let s = r.expected.as_ref()?.serving.as_ref()?;
        Some((s.limit.as_ref().map_or(0.0, |l| l.rate_per_s), *r, s))
    });
    // `max_by` keeps the last of equals; the first is wanted.
    let (_, row, s) = served.fold(None, |best: Option<(f64, &&Row, _)>, x| match best {
        Some(b) if x.0 <= b.0 => Some(b),
        _ => Some(x),
    })?;
    let machine = row.inputs.machine.as_deref().unwrap_or("this machine");
    Some(format!("{machine}, planned for {} sequences: {}", row.inputs.batch, s.sentence))
}
