//! A study as one HTML file: no script, nothing loaded from elsewhere, reads on screen and on paper.
//!
//! Order: question, answer, figures with what to read from them, tables, assumptions and where the numbers come from.

use super::figures;
use super::{Study, axis_title, label, value};
use crate::ui::number;
use anyhow::Result;
use std::fmt::Write as _;
use tierwise_planner::capacity::Row;
use tierwise_planner::plan::Interval;

const STYLE: &str = "\
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; color: #222; background: #fff; \
max-width: 1080px; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
.name { color: #666; margin: 0 0 .25rem; font-size: .95rem; }
.answer { background: #f3f7fb; border-left: 4px solid rgb(0,114,178); padding: .75rem 1rem; margin: 1rem 0; }
.answer p { margin: .35rem 0; }
.answer p:first-child { font-weight: 600; }
figure { margin: 1rem 0 1.6rem; }
figure svg { max-width: 100%; height: auto; display: block; }
figcaption { color: #444; font-size: .92rem; max-width: 900px; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; margin: .3rem 0; }
.legend svg { display: inline-block; width: 14px; height: 14px; margin-right: .35rem; vertical-align: -2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
p.caption { color: #444; font-size: .92rem; margin: .8rem 0 .2rem; max-width: 900px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e3e3e3; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; vertical-align: bottom; }
td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
td:not(.n) { min-width: 7.5em; }
td.why { color: #8a2b00; }
tr.front td { background: #eef6ee; }
footer { color: #666; font-size: .85rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: .5rem; }
@media print {
  @page { margin: 12mm; }
  body { max-width: none; margin: 0; padding: 0; font-size: 10.5pt; }
  figure, .answer, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  thead { display: table-header-group; }
  table { font-size: 7.6pt; }
  th, td { padding: .15rem .3rem; }
  td:not(.n) { min-width: 0; }
  .scroll { overflow: visible; }
}
";

/// Text as HTML text: names come from files.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// The whole page.
///
/// # Errors
/// When a figure cannot be drawn.
pub fn document(report: &Study<'_>, answer: &[String]) -> Result<String> {
    let mut body = String::new();
    let _ = writeln!(body, "<p class=\"name\">Capacity study: {}</p>", escape(&report.study.name));
    let _ = writeln!(body, "<h1>{}</h1>", escape(&report.study.question));
    body += "<div class=\"answer\">\n";
    for sentence in answer {
        let _ = writeln!(body, "<p>{}</p>", escape(sentence));
    }
    body += "</div>\n";
    for figure in figures::all(report)? {
        if let Some(heading) = &figure.heading {
            let _ = writeln!(body, "<h2>{}</h2>", escape(heading));
        }
        body += &figure_html(&figure);
    }
    body += &served(report);
    body += "<h2>All combinations</h2>\n";
    body += &rows_table(report);
    body += &marginals_table(report);
    body += &assumptions(report);
    let _ = writeln!(body, "<footer>Made by tierwise {} from its plans' predictions.</footer>", env!("CARGO_PKG_VERSION"));
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n\
         <body>\n{body}</body>\n</html>\n",
        escape(&report.study.question)
    ))
}

fn figure_html(f: &figures::Figure) -> String {
    let mut out = String::from("<figure>\n");
    if let Some(title) = &f.title {
        let _ = writeln!(out, "<h3>{}</h3>", escape(title));
    }
    out += &f.svg;
    if f.legend.len() > 1 {
        out += "<div class=\"legend\">";
        for (i, name) in f.legend.iter().enumerate() {
            let _ = write!(out, "<span>{}{}</span>", marker(i), escape(name));
        }
        out += "</div>\n";
    }
    let _ = writeln!(out, "<figcaption>{}</figcaption>\n</figure>", escape(&f.caption));
    out
}

/// The mark of a series in a legend: the same shapes and colours as in the figure.
fn marker(i: usize) -> String {
    let colour = super::plots::colour(i);
    let shape = match i % 3 {
        0 => format!("<circle cx=\"7\" cy=\"7\" r=\"5\" fill=\"{colour}\"/>"),
        1 => format!("<polygon points=\"7,1 13,12 1,12\" fill=\"{colour}\"/>"),
        _ => format!("<path d=\"M2 2 L12 12 M12 2 L2 12\" stroke=\"{colour}\" stroke-width=\"2\"/>"),
    };
    format!("<svg viewBox=\"0 0 14 14\" aria-hidden=\"true\">{shape}</svg>")
}

/// A cell: text, and whether it is a number.
type Cell = (String, bool);

fn name(text: impl Into<String>) -> Cell {
    (text.into(), false)
}

fn figure(text: impl Into<String>) -> Cell {
    (text.into(), true)
}

fn interval(i: Interval) -> [Cell; 2] {
    [figure(number(i.value)), figure(format!("{} – {}", number(i.low), number(i.high)))]
}

fn table(caption: &str, header: &[(&str, bool)], rows: &[(Vec<Cell>, &str)]) -> String {
    let mut out = format!("<p class=\"caption\">{}</p>\n<div class=\"scroll\"><table>\n<thead><tr>", escape(caption));
    let class = |number: bool| if number { " class=\"n\"" } else { "" };
    for (text, number) in header {
        let _ = write!(out, "<th{}>{}</th>", class(*number), escape(text));
    }
    out += "</tr></thead>\n<tbody>\n";
    for (cells, row_class) in rows {
        out += &if row_class.is_empty() { "<tr>".to_string() } else { format!("<tr class=\"{row_class}\">") };
        for (text, number) in cells {
            let _ = write!(out, "<td{}>{}</td>", class(*number), escape(text));
        }
        out += "</tr>\n";
    }
    out + "</tbody>\n</table></div>\n"
}

/// The swept inputs of a row.
fn inputs(report: &Study<'_>, row: &Row) -> Vec<Cell> {
    report.axes.iter().copied().map(|a| (value(&row.inputs, a), super::numeric(&row.inputs, a).is_some())).collect()
}

fn input_header(report: &Study<'_>) -> Vec<(&'static str, bool)> {
    let p = &report.rows[0].inputs;
    report
        .axes
        .iter()
        .copied()
        .map(|a| {
            (
                if super::numeric(p, a).is_some() && !super::axis_word(a).is_empty() {
                    super::axis_word(a)
                } else {
                    axis_title(a)
                },
                super::numeric(p, a).is_some(),
            )
        })
        .collect()
}

fn rows_table(report: &Study<'_>) -> String {
    let mut header = input_header(report);
    header.extend([
        ("tok/s each", true),
        ("interval", true),
        ("together", true),
        ("prefill tok/s", true),
        ("first token s", true),
        ("VRAM used", true),
        ("experts resident in VRAM", true),
        ("hit rate of slots", true),
        ("gap", true),
        ("limited by", false),
    ]);
    let on_front = |row: usize| report.pareto.iter().any(|f| f.rows.contains(&row));
    let mut possible = Vec::new();
    let mut impossible = Vec::new();
    for row in report.rows {
        let mut cells = inputs(report, row);
        if let Some(e) = &row.expected {
            cells.extend(interval(e.decode_tokens_per_s_per_user));
            cells.push(figure(number(e.decode_tokens_per_s.value)));
            cells.push(figure(number(e.prefill_tokens_per_s.value)));
            cells.push(figure(number(e.ttft_s.value)));
            cells.push(figure(e.vram_used.to_string()));
            cells.push(figure(format!("{:.0} %", e.experts_in_vram * 100.0)));
            cells.push(figure(e.hit_rate.map_or_else(|| "-".into(), |h| format!("{:.0} %", h.value * 100.0))));
            cells.push(figure(format!("{:.2} %", e.gap * 100.0)));
            cells.push(name(e.binding.clone()));
            possible.push((cells, if on_front(row.row) { "front" } else { "" }));
        } else {
            cells.push(name(row.error.clone().unwrap_or_default()));
            impossible.push((cells, ""));
        }
    }
    let caption = "Predictions of the best plan found for each combination. Green rows are on the Pareto front of their model and context: no other gives \
                   more to each user and more together. The gap says how much faster a better plan could be at most.";
    let mut out = if possible.is_empty() { String::new() } else { table(caption, &header, &possible) };
    out += &traffic_table(report);
    if !impossible.is_empty() {
        let mut header = input_header(report);
        header.push(("why it does not work, and what would", false));
        out += &table("Combinations that cannot be planned.", &header, &impossible);
    }
    out
}

/// Bytes per token over every memory and link that any row uses.
fn traffic_table(report: &Study<'_>) -> String {
    let mut places: Vec<&str> = Vec::new();
    for b in report.rows.iter().filter_map(|r| r.expected.as_ref()).flat_map(|e| &e.bytes_per_token) {
        if !places.contains(&b.on.as_str()) {
            places.push(&b.on);
        }
    }
    let mut header = input_header(report);
    header.extend(places.iter().map(|p| (*p, true)));
    let rows: Vec<(Vec<Cell>, &str)> = report
        .rows
        .iter()
        .filter_map(|row| {
            let e = row.expected.as_ref()?;
            let mut cells = inputs(report, row);
            for place in &places {
                let b = e.bytes_per_token.iter().find(|b| b.on == *place);
                cells.push(figure(b.map_or_else(|| "-".into(), |b| b.bytes.to_string())));
            }
            Some((cells, ""))
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    table("Bytes that one generated token reads from each memory and moves over each link, on average.", &header, &rows)
}

/// Serving results of all rows, and ways of admission of the best one.
fn served(report: &Study<'_>) -> String {
    let mut header = input_header(report);
    header.extend([
        ("requests/s kept", true),
        ("slow – fast", true),
        ("users at once", true),
        ("first token p90 s", true),
        ("tok/s p90", true),
        ("gap p99 ms", true),
        ("alone: first token p90 s", true),
        ("alone: tok/s p90", true),
        ("room for keys and values", true),
    ]);
    let speed = |tpot: f64| if tpot > 0.0 { number(1.0 / tpot) } else { "-".into() };
    let mut rows = Vec::new();
    for row in report.rows {
        let Some(s) = row.expected.as_ref().and_then(|e| e.serving.as_ref()) else { continue };
        let mut cells = inputs(report, row);
        let rate = s.curve.first().map_or(0.0, |p| p.rate_per_s / p.load);
        let range = s.load_interval.map_or_else(String::new, |(a, b)| format!("{} – {}", number(a * rate), number(b * rate)));
        match &s.limit {
            Some(l) => {
                let m = &l.metrics;
                cells.extend([
                    figure(number(l.rate_per_s)),
                    figure(range),
                    figure(format!("{:.1}", m.users)),
                    figure(number(m.ttft_s.p90)),
                    figure(speed(m.tpot_s.p90)),
                    figure(format!("{:.0}", m.itl_s.p99 * 1e3)),
                ]);
            }
            None => cells.extend([figure("none"), figure(range), figure("-"), figure("-"), figure("-"), figure("-")]),
        }
        cells.extend([
            figure(number(s.alone.ttft_s.p90)),
            figure(speed(s.alone.tpot_s.p90)),
            figure(tierwise_cost::units::Bytes(s.kv_pool_bytes).to_string()),
        ]);
        rows.push((cells, ""));
    }
    if rows.is_empty() {
        return String::new();
    }
    let mut out = String::from("<h2>Serving: what each combination keeps</h2>\n");
    let promise = report.rows.iter().find_map(|r| Some(r.expected.as_ref()?.serving.as_ref()?.slo.words())).unwrap_or_default();
    out += &table(
        &format!(
            "The largest load at which the promise is kept: {promise}. Alone: every request by itself, which no load can beat."
        ),
        &header,
        &rows,
    );
    if let Some((row, s)) = figures::best_served(report) {
        let rows: Vec<(Vec<Cell>, &str)> = s
            .admissions
            .iter()
            .map(|p| {
                let m = &p.metrics;
                let cells = vec![
                    name(p.admission),
                    figure(number(m.goodput_per_s)),
                    figure(format!("{:.1} %", m.attained * 100.0)),
                    figure(number(m.tokens_per_s)),
                    figure(format!("{:.1}", m.running)),
                    figure(m.evictions.to_string()),
                    figure(m.recomputed_tokens.to_string()),
                    figure(number(m.ttft_s.p90)),
                    figure(speed(m.tpot_s.p90)),
                ];
                (cells, "")
            })
            .collect();
        let header = [
            ("who may start", false),
            ("good requests/s", true),
            ("promise kept", true),
            ("tok/s together", true),
            ("in memory", true),
            ("evictions", true),
            ("tokens computed again", true),
            ("first token p90 s", true),
            ("tok/s p90", true),
        ];
        let rate = s.admissions.first().map_or(0.0, |p| p.rate_per_s);
        let caption = format!(
            "{}: three ways to decide who may start, at {} requests per second. reserve_longest reserves for the longest answer, aggressive \
             looks only at the present, past_future predicts the peak of the memory from the answers so far.",
            label(report.axes, &row.inputs, true),
            number(rate)
        );
        out += &table(&caption, &header, &rows);
    }
    out
}

fn marginals_table(report: &Study<'_>) -> String {
    if report.marginal.is_empty() {
        return String::new();
    }
    let header = [
        ("machine", false),
        ("upgrade", false),
        ("tok/s before", true),
        ("after", true),
        ("gain", true),
        ("gain", true),
        ("first token s before", true),
        ("after", true),
    ];
    let mut rows = Vec::new();
    for m in report.marginal {
        for v in &m.values {
            rows.push((
                vec![
                    name(m.label.clone()),
                    name(v.what.clone()),
                    figure(number(v.before)),
                    figure(number(v.after)),
                    figure(format!("{:+.3}", v.gain)),
                    figure(format!("{:+.2} %", v.gain_fraction * 100.0)),
                    figure(number(v.ttft_s_before)),
                    figure(number(v.ttft_s_after)),
                ],
                "",
            ));
        }
    }
    let caption = "Finite differences: a new plan for the machine with a little more of one thing. Decode tokens per second of all sequences.";
    format!("<h2>Marginal values in numbers</h2>\n{}", table(caption, &header, &rows))
}

fn assumptions(report: &Study<'_>) -> String {
    let request = report.study.request();
    let mut list = vec![
        "Nothing here was measured on these machines: all speeds are predictions of a cost model, and the intervals are its pessimistic and \
         optimistic ends taken together, not standard deviations."
            .to_string(),
        format!(
            "Decode is priced with half of the context in the cache; the time to the first token is for prompts of {} tokens in chunks of {}; \
             keys and values are kept in {}.",
            request.prompt_tokens, request.chunk_tokens, request.kv_format
        ),
        "Swept sizes and rates replace what the machine has; everything else of the machine stays as described, whether such a combination \
         is sold or not. Prices in money are not considered."
            .to_string(),
    ];
    if report.rows.iter().any(|r| r.expected.as_ref().is_some_and(|e| e.serving.is_some())) {
        list.push(
            "Serving is simulated on a virtual clock with chunked prefill. Step times come from the plan's prices at each step's own batch and \
             positions; the plan's placement of experts stays fixed. The trace has times and lengths only: which experts its requests would \
             use is not in it, so the cost model's assumption about routing is used."
                .into(),
        );
        list.push(
            "Other loads than the trace's own are made by stretching or shrinking the times between its requests; its lengths and order stay.".into(),
        );
    }
    let mut out = String::from("<h2>Assumptions and where the numbers come from</h2>\n<ul>\n");
    for text in &list {
        let _ = writeln!(out, "<li>{}</li>", escape(text));
    }
    out += "</ul>\n";
    let opened: Vec<(Vec<Cell>, &str)> =
        report.origins.iter().map(|(what, from)| (vec![name(what.clone()), name(from.clone())], "")).collect();
    out += &table("What was read.", &[("what", false), ("from", false)], &opened);
    let mut seen: Vec<(String, &tierwise_planner::plan::Provenance)> = Vec::new();
    for row in report.rows {
        let machine = row.inputs.machine.clone().unwrap_or_else(|| "this machine".into());
        for p in row.expected.iter().flat_map(|e| &e.provenance) {
            if !seen.iter().any(|(m, q)| *m == machine && *q == p) {
                seen.push((machine.clone(), p));
            }
        }
    }
    let rows: Vec<(Vec<Cell>, &str)> = seen
        .into_iter()
        .map(|(machine, p)| {
            let note = p.note.clone().unwrap_or_default();
            (vec![name(machine), name(p.what.clone()), figure(p.value.clone()), name(p.source.clone()), name(note)], "")
        })
        .collect();
    let header = [("machine", false), ("what", false), ("value", false), ("source", false), ("note", false)];
    out + &table("Numbers behind the predictions, each with its source.", &header, &rows)
}

#[cfg(test)]
mod tests {
    #[test]
    fn markup_in_names_is_only_text() {
        assert_eq!(super::escape("<b a='1' c=\"2\">&"), "&lt;b a=&#39;1&#39; c=&quot;2&quot;&gt;&amp;");
    }
}
