//! `tierwise predict`

use crate::cmd::read_text;
use crate::ui::{self, Ui, number, percent};
use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;
use tierwise_cost::model::Geometry;
use tierwise_planner::predict::decode::{PARAMETERS, Parameters};
use tierwise_planner::predict::geometry::Shape;
use tierwise_planner::predict::refit::{MIN_MACHINES, Refit, refit};
use tierwise_planner::predict::report::{Errors, Report, Sweeps};
use tierwise_planner::predict::rows;
use tierwise_planner::predict::{RowSummary, predict};
use tierwise_runtime::import::configs::{self, Kind};

/// `predict`
#[derive(Debug, Args)]
pub struct PredictArgs {
    /// JSON list of runs: engine, model, quant, gpu, cpu, RAM, flags, depth, and what was measured if anything; `-` for standard input.
    #[arg(long, value_name = "FILE")]
    runs: String,
    /// Fit the model's parameters again to the file's own rows, and judge each row with its machine, then its source, left out.
    #[arg(long)]
    refit: bool,
    /// List every row. Short files are listed anyway.
    #[arg(long)]
    rows: bool,
}

/// Longest file whose rows are listed without being asked for.
const SHORT_FILE: usize = 40;

pub fn run(args: &PredictArgs, ui: &Ui) -> Result<()> {
    let runs = rows::parse(&read_text(&args.runs)?).with_context(|| args.runs.clone())?;
    let predictions = predict(&runs, &Parameters::SHIPPED, &described);
    let report = Report::of(&predictions);
    let refitted = if args.refit { refit(&predictions) } else { None };
    if args.refit && refitted.is_none() {
        ui.note(format!(
            "--refit: fewer than {MIN_MACHINES} machines have measured rows that state all the time depends on; nothing was fitted"
        ));
    }
    let mut rows: Vec<RowSummary> = predictions.iter().map(|p| p.summary()).collect();
    if let Some(r) = &refitted {
        for (row, tps) in rows.iter_mut().zip(&r.lomo_tps) {
            row.held_out_decode_tps = *tps;
            row.held_out_error = tps.zip(row.measured).map(|(tps, measured)| (tps / measured - 1.0).abs());
        }
    }
    // The figures by which a reader judges: of machines left out as soon as they are there.
    let (basis, groups, sweeps) = match &refitted {
        Some(r) => ("each row's machine left out of the fit", &r.lomo, &r.lomo_sweeps),
        None => ("built-in parameters, which were fitted to the published runs of 2026-11", &report.errors, &report.sweeps),
    };
    let headline = groups.headline();
    let value = json!({
        "runs": args.runs,
        "rows": rows,
        "error_basis": basis,
        "error_rows": headline.map(|e| &e.name),
        "median_abs_error": headline.map(|e| e.median_abs_error),
        "p90_abs_error": headline.map(|e| e.p90_abs_error),
        "coverage": headline.map(|e| e.coverage),
        "sweep_pairs_right": sweeps.share_right(),
        "parameters": Parameters::SHIPPED,
        "report": report,
        "lomo": refitted.as_ref().map(|r| &r.lomo),
        "loso": refitted.as_ref().map(|r| &r.loso),
        "refit": refitted,
    });
    ui.result(&value, || {
        let mut text = String::new();
        if args.rows || rows.len() <= SHORT_FILE {
            text += &row_table(&rows);
            text += "\n\n";
        }
        text += &describe(&report);
        if let Some(r) = &refitted {
            text += &describe_refit(r);
        }
        text
    })
}

/// A model beyond the table of published ones: by the name of a built-in description.
fn described(name: &str) -> Option<Shape> {
    let found = configs::find(Kind::Model, name, None).ok()?;
    Shape::of_geometry(&Geometry::from_toml(&found.text).ok()?)
}

fn row_table(rows: &[RowSummary]) -> String {
    let text = |s: &Option<String>| s.clone().unwrap_or_else(|| "-".into());
    let or_dash = |n: Option<f64>| n.map_or_else(|| "-".into(), number);
    let lines = rows.iter().map(|r| {
        let interval = r.low.zip(r.high).map_or_else(|| "-".into(), |(low, high)| format!("{} to {}", number(low), number(high)));
        let mut remarks: Vec<String> = r.skipped.iter().cloned().collect();
        remarks.extend(r.basis.filter(|b| *b == "prior").map(|_| "a prior stands in for what is not stated".into()));
        remarks.extend(r.vram_verdict.zip(r.vram_need_gib).and_then(|(v, need)| {
            use tierwise_planner::predict::memory::Verdict;
            match v {
                Verdict::Fits => None,
                Verdict::AtRisk => Some(format!("VRAM at risk: needs {} GiB", number(need))),
                Verdict::DoesNotFit => Some(format!("does not fit VRAM: needs {} GiB", number(need))),
            }
        }));
        remarks.extend(r.swap_bound.filter(|s| *s).map(|_| "weights do not stay in host memory".into()));
        vec![
            r.id.clone(),
            text(&r.engine),
            text(&r.model),
            or_dash(r.predicted_decode_tps),
            interval,
            or_dash(r.measured),
            r.error.map_or_else(|| "-".into(), percent),
            or_dash(r.predicted_prefill_tps),
            remarks.join("; "),
        ]
    });
    let header =
        ["run", "engine", "model", "decode tok/s", "80 % interval", "measured", "error", "prefill tok/s (prior)", "remarks"];
    ui::table(&header, lines, false)
}

const ERROR_COLUMNS: [&str; 8] = ["", "rows", "machines", "median", "p90", "median of machines", "bias of time", "in interval"];

fn error_row(name: &str, e: &Errors) -> Vec<String> {
    vec![
        name.to_string(),
        e.rows.to_string(),
        e.machines.to_string(),
        percent(e.median_abs_error),
        percent(e.p90_abs_error),
        percent(e.median_over_machines),
        format!("{:+.1} %", 100.0 * e.bias_of_time),
        percent(e.coverage),
    ]
}

fn error_table<'a>(groups: impl IntoIterator<Item = (&'a str, &'a [Errors])>) -> String {
    let rows = groups.into_iter().flat_map(|(prefix, errors)| {
        errors.iter().map(move |e| error_row(&format!("{prefix}{}", e.name), e)).collect::<Vec<_>>()
    });
    ui::table(&ERROR_COLUMNS, rows, true)
}

fn sweeps(s: &Sweeps) -> String {
    match s.share_right() {
        Some(share) => format!(
            "sweeps: {} of {} pairs that differ in CPU expert layers are ranked as measured ({}); {} of {} pairs of all kinds\n",
            s.right,
            s.pairs,
            percent(share),
            s.all_right,
            s.all_pairs
        ),
        None => String::new(),
    }
}

fn describe(r: &Report) -> String {
    let mut text =
        format!("{} runs: {} predicted, {} of them measured well enough to compare\n", r.rows, r.predicted, r.compared);
    if r.compared > 0 {
        text += "\nError |predicted / measured - 1| of decode tokens/s, with the parameters that are built in. They were fitted to the\n\
                 published runs of 2026-11 (171 rows of tier A): on those this is what the fit has seen; --refit leaves machines out.\n\n";
        text += &error_table([("", &r.errors.totals[..]), ("engine ", &r.errors.by_engine), ("class ", &r.errors.by_class)]);
        text += "\n\n";
        text += &sweeps(&r.sweeps);
    }
    let m = &r.memory;
    if m.failed + m.swap_bound > 0 {
        text += &format!(
            "memory: of {} runs that ended out of VRAM, {} are said not to fit and {} to be at risk; of {} that ran, {} and {}\n\
             host: of {} runs bound by the disk, {} are recognised; {} false alarms\n",
            m.failed,
            m.failed_does_not_fit,
            m.failed_at_risk,
            m.ok,
            m.ok_does_not_fit,
            m.ok_at_risk,
            m.swap_bound,
            m.swap_bound_found,
            m.swap_bound_false
        );
    }
    if let Some(p) = &r.prefill {
        text += &format!(
            "prefill (a prior, not better): median {}, p90 {} over {} rows\n",
            percent(p.median_abs_error),
            percent(p.p90_abs_error),
            p.rows
        );
    }
    if !r.skipped.is_empty() {
        /// Reasons that are written out.
        const SHOWN: usize = 8;
        let reasons: Vec<String> = r.skipped.iter().take(SHOWN).map(|(why, n)| format!("{n} {why}")).collect();
        text += &format!("not predicted: {}", reasons.join("; "));
        let others: usize = r.skipped.iter().skip(SHOWN).map(|(_, n)| n).sum();
        text += &if others > 0 { format!("; {others} for other reasons (--json names them all)\n") } else { "\n".into() };
    }
    text
}

fn describe_refit(r: &Refit) -> String {
    let mut text = format!(
        "\nFitted again to {} rows of {} machines. Left out: each row's machine (the honest figure for a machine that nobody has\n\
         measured), or its source (stricter: one author may have measured several machines).\n\n",
        r.rows, r.machines
    );
    text += &error_table([
        ("seen: ", &r.train.totals[..]),
        ("machine out: ", &r.lomo.totals),
        ("source out: ", &r.loso.totals),
        ("machine out, core, engine ", &r.lomo.core_by_engine),
        ("machine out, core, class ", &r.lomo.core_by_class),
        ("machine out, engine ", &r.lomo.by_engine),
        ("machine out, class ", &r.lomo.by_class),
    ]);
    text += "\n\nmachine out, ";
    text += &sweeps(&r.lomo_sweeps);
    let shares: Vec<String> = r.machine_coverage.iter().map(|(c, s)| format!("{c:?} {}", percent(*s))).collect();
    text += &format!(
        "80 % intervals made without a machine hold this share of its rows, mean of machines: {}\n\n",
        shares.join(", ")
    );
    let (low, high) = (r.range.0.to_array(), r.range.1.to_array());
    let rows = PARAMETERS.iter().zip(r.parameters.to_array()).enumerate().map(|(i, (p, value))| {
        vec![
            p.name.to_string(),
            number(p.prior),
            number(value),
            format!("{} to {}", number(low[i]), number(high[i])),
            p.unit.to_string(),
            p.meaning.to_string(),
        ]
    });
    text += &ui::table(&["parameter", "prior", "fitted", "with a machine out", "unit", "meaning"], rows, false);
    text
}
