//! A study on the terminal: the answer, then the table.

use super::{Study, value};
use crate::ui::{self, number};

/// Rows shown on the terminal; all of them are in `--csv`, `--json` and the report.
const MOST_ROWS: usize = 60;

/// The whole text.
pub fn describe(report: &Study<'_>, answer: &[String]) -> String {
    let mut text = format!("{}\n\n", report.study.question);
    for sentence in answer {
        text += &format!("* {sentence}\n");
    }
    let axes = report.axes;
    let mut header = axes.to_vec();
    header.extend(["tok/s each", "low to high", "together", "prefill", "first token", "VRAM used", "limited by"]);
    let rows = report.rows.iter().take(MOST_ROWS).filter_map(|r| {
        let e = r.expected.as_ref()?;
        let each = e.decode_tokens_per_s_per_user;
        let mut cells: Vec<String> = axes.iter().map(|a| value(&r.inputs, a)).collect();
        cells.extend([
            number(each.value),
            format!("{} to {}", number(each.low), number(each.high)),
            number(e.decode_tokens_per_s.value),
            number(e.prefill_tokens_per_s.value),
            super::time(e.ttft_s.value),
            e.vram_used.to_string(),
            e.binding.clone(),
        ]);
        Some(cells)
    });
    text += &format!("\n{}\n", ui::table(&header, rows, false));
    if report.rows.len() > MOST_ROWS {
        text += &format!("... and {} more rows; --csv, --json and -o have them all\n", report.rows.len() - MOST_ROWS);
    }
    let served: Vec<Vec<String>> = report
        .rows
        .iter()
        .filter_map(|r| {
            let s = r.expected.as_ref()?.serving.as_ref()?;
            let mut cells: Vec<String> = axes.iter().map(|a| value(&r.inputs, a)).collect();
            cells.push(s.limit.as_ref().map_or_else(|| "none".into(), |l| format!("{:.3}", l.rate_per_s)));
            cells.push(s.limit.as_ref().map_or_else(|| "-".into(), |l| format!("{:.1}", l.metrics.users)));
            cells.push(super::time(s.alone.ttft_s.p90));
            cells.push(if s.alone.tpot_s.p90 > 0.0 { number(1.0 / s.alone.tpot_s.p90) } else { "-".into() });
            Some(cells)
        })
        .collect();
    if !served.is_empty() {
        let mut header = axes.to_vec();
        header.extend(["requests/s kept", "users", "alone: first token p90", "alone: tok/s p90"]);
        text += &format!("\nServing: the largest load that keeps the promise\n{}\n", ui::table(&header, served, false));
    }
    let impossible: Vec<_> = report.rows.iter().filter_map(|r| Some((r, r.error.as_ref()?))).collect();
    if !impossible.is_empty() {
        text += "\nImpossible\n";
        for (r, why) in impossible.iter().take(MOST_ROWS) {
            text += &format!("{}: {why}\n", super::label(report.axes, &r.inputs, true));
        }
        if impossible.len() > MOST_ROWS {
            text += &format!("... and {} more\n", impossible.len() - MOST_ROWS);
        }
    }
    for m in report.marginal {
        text += &format!("\nWhat a little more would bring to {}\n", m.label);
        let rows = m
            .values
            .iter()
            .map(|v| vec![v.what.clone(), format!("{:+.3} tok/s", v.gain), format!("{:+.2} %", v.gain_fraction * 100.0)]);
        text += &ui::table(&["upgrade", "decode, all together", ""], rows, true);
        text.push('\n');
    }
    text
}
