//! `tierwise capacity`: sweeps machines, budgets, contexts, batches, formats and arrival traces.

use crate::args::SolverArg;
use crate::cmd::plan::solver;
use crate::model;
use crate::report::{self, Marginals, Study as Report};
use crate::ui::{Ui, number};
use anyhow::{Context, Result, bail};
use clap::Args;
use rayon::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tierwise_cost::cost::{CostModel, Roofline};
use tierwise_cost::machine::Machine;
use tierwise_cost::model::ModelSpec;
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::{Bytes, BytesPerS};
use tierwise_planner::capacity::values::Values;
use tierwise_planner::capacity::{
    Base, Opened, Point, Row, ServingPart, Study, Sweep, evaluate_point, marginals_of_point, pareto_front,
};
use tierwise_planner::serving::Arrivals;
use tierwise_planner::{Objective, SolverKind};
use tierwise_runtime::atomic_file::write_atomic;

/// `capacity`
#[derive(Debug, Args)]
pub struct CapacityArgs {
    /// Study: a TOML file, or the name of a built-in one. Absent: the flags are the study.
    pub study: Option<String>,
    /// Models, separated by commas; NAME@FORMAT for a format of its own.
    #[arg(long, value_name = "M", value_delimiter = ',')]
    pub model: Vec<String>,
    /// Weight formats of models without weights.
    #[arg(long, value_name = "FORMAT", value_delimiter = ',')]
    pub format: Vec<String>,
    /// Machines.
    #[arg(long, value_name = "M", value_delimiter = ',')]
    pub machine: Vec<String>,
    /// VRAM to install; 0 for no GPU.
    #[arg(long, value_name = "SIZE", value_delimiter = ',')]
    pub vram: Vec<Bytes>,
    /// Host memory to install.
    #[arg(long, value_name = "SIZE", value_delimiter = ',')]
    pub ram: Vec<Bytes>,
    /// CXL memory to install; 0 for none.
    #[arg(long, value_name = "SIZE", value_delimiter = ',')]
    pub cxl: Vec<Bytes>,
    /// Rate of the CXL memory.
    #[arg(long, value_name = "RATE", value_delimiter = ',')]
    pub cxl_bandwidth: Vec<BytesPerS>,
    /// Rate of each link from host to GPU.
    #[arg(long, value_name = "RATE", value_delimiter = ',')]
    pub pcie_bandwidth: Vec<BytesPerS>,
    /// Rate of each socket's memory.
    #[arg(long, value_name = "RATE", value_delimiter = ',')]
    pub dram_bandwidth: Vec<BytesPerS>,
    /// Contexts.
    #[arg(long, value_name = "N", value_delimiter = ',')]
    pub context: Vec<u32>,
    /// Batches.
    #[arg(long, value_name = "N", value_delimiter = ',')]
    pub batch: Vec<u32>,
    /// Traces of arriving requests: CSV or JSON lines, or the built-in azure-conv-2023.
    #[arg(long, value_name = "TRACE", value_delimiter = ',')]
    pub arrivals: Vec<String>,
    /// Format of cached keys and values.
    #[arg(long, value_name = "FORMAT")]
    pub kv: Option<QuantFormat>,
    /// What to make fast.
    #[arg(long, value_enum)]
    pub objective: Option<crate::args::ObjectiveArg>,
    /// How to search.
    #[arg(long, value_enum, default_value_t = SolverArg::Auto)]
    pub solver: SolverArg,
    /// Write a report for people: one HTML file that needs nothing else.
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Write the rows as CSV.
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
}

/// Rows whose marginal values are worth reading.
const MOST_MARGINALS: usize = 6;

pub fn run(args: &CapacityArgs, ui: &Ui) -> Result<()> {
    let (study, folder) = study(args)?;
    let points = study.points()?;
    let names = Named::open(&points, &study, folder.as_deref())?;
    let solver = solver(args.solver);
    let started = Instant::now();
    let bar = ui.progress("planning", points.len() as u64, false);
    let rows: Vec<Row> = points
        .par_iter()
        .enumerate()
        .map(|(i, point)| {
            let row = evaluate_point(i, point, names.of(point), &study, &cost_model, solver);
            bar.inc(1);
            row
        })
        .collect();
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    let pareto = fronts(&rows);
    let axes = report::axes(&study, &points);
    let marginal = marginals(&rows, &names, &study, &axes, solver)?;
    let report =
        Report { study: &study, rows: &rows, pareto: &pareto, marginal: &marginal, origins: &names.origins, axes: &axes };
    let answer = report::answer::sentences(&report);
    if let Some(path) = &args.csv {
        write_atomic(path, report::csv::text(&rows).as_bytes())?;
    }
    if let Some(path) = &args.output {
        let html = report::html::document(&report, &answer).with_context(|| format!("cannot draw {}", path.display()))?;
        write_atomic(path, html.as_bytes())?;
    }
    let value = json!({
        "name": study.name,
        "question": study.question,
        "answer": answer,
        "rows": rows,
        "pareto": pareto,
        "marginal": marginal,
        "origins": names.origins,
        "seconds": seconds,
        "rows_per_s": rows.len() as f64 / seconds,
        "report_file": args.output,
        "csv_file": args.csv,
    });
    ui.result(&value, || {
        let mut text = report::text::describe(&report, &answer);
        text += &format!("\n{} rows in {} s\n", rows.len(), number(seconds));
        for (what, path) in [("report", &args.output), ("rows", &args.csv)] {
            if let Some(path) = path {
                text += &format!("{what} written to {}\n", path.display());
            }
        }
        text
    })
}

/// The cost model of a machine.
fn cost_model(_: &Machine) -> Box<dyn CostModel> {
    Box::new(Roofline::default())
}

/// The study of the arguments, and the folder beside which its files lie.
fn study(args: &CapacityArgs) -> Result<(Study, Option<PathBuf>)> {
    let (mut study, folder) = match &args.study {
        Some(name) => {
            let (text, origin) = model::study(name)?;
            let study = Study::from_toml(&text).with_context(|| origin.clone())?;
            (study, Path::new(&origin).parent().map(Path::to_path_buf))
        }
        None if args.model.is_empty() => {
            bail!("capacity: no study and no --model; expected a study (a TOML file or a built-in name) or flags")
        }
        None => (from_flags(), None),
    };
    // Flags replace what the study says about their axis.
    let (base, sweep) = (&mut study.base, &mut study.sweep);
    names(&args.model, &mut base.model, &mut sweep.model);
    names(&args.format, &mut base.format, &mut sweep.format);
    names(&args.machine, &mut base.machine, &mut sweep.machine);
    names(&args.arrivals, &mut base.arrivals, &mut sweep.arrivals);
    sizes(&args.vram, Some(&mut base.vram), &mut sweep.vram);
    sizes(&args.ram, Some(&mut base.ram), &mut sweep.ram);
    sizes(&args.cxl, Some(&mut base.cxl), &mut sweep.cxl);
    sizes(&args.cxl_bandwidth, None, &mut sweep.cxl_bandwidth);
    sizes(&args.pcie_bandwidth, None, &mut sweep.pcie_bandwidth);
    sizes(&args.dram_bandwidth, None, &mut sweep.dram_bandwidth);
    sizes(&args.context, Some(&mut base.context), &mut sweep.context);
    sizes(&args.batch, Some(&mut base.batch), &mut sweep.batch);
    base.kv = args.kv.or(base.kv);
    base.objective = match args.objective {
        None => base.objective,
        Some(crate::args::ObjectiveArg::Decode) => Some(Objective::Decode),
        Some(crate::args::ObjectiveArg::Prefill) => Some(Objective::Prefill),
        Some(crate::args::ObjectiveArg::Mix) => Some(Objective::Mix),
    };
    Ok((study, folder))
}

/// A study with nothing but flags.
fn from_flags() -> Study {
    Study {
        name: "capacity".into(),
        question: "How fast are these combinations?".into(),
        base: Base::default(),
        sweep: Sweep::default(),
        serving: ServingPart::default(),
    }
}

fn names(flag: &[String], base: &mut Option<String>, sweep: &mut Option<Vec<String>>) {
    match flag {
        [] => {}
        [one] => (*base, *sweep) = (Some(one.clone()), None),
        several => *sweep = Some(several.to_vec()),
    }
}

fn sizes<T: Clone>(flag: &[T], base: Option<&mut Option<T>>, sweep: &mut Option<Values<T>>) {
    if !flag.is_empty() {
        *sweep = Some(Values::List(flag.to_vec()));
        if let Some(base) = base {
            *base = None;
        }
    }
}

/// Everything that the points name, opened once.
struct Named {
    models: BTreeMap<(String, String), ModelSpec>,
    machines: BTreeMap<Option<String>, Machine>,
    arrivals: BTreeMap<String, Arrivals>,
    /// What was opened and where it is from.
    origins: Vec<(String, String)>,
}

impl Named {
    fn open(points: &[Point], study: &Study, folder: Option<&Path>) -> Result<Self> {
        let mut named =
            Self { models: BTreeMap::new(), machines: BTreeMap::new(), arrivals: BTreeMap::new(), origins: Vec::new() };
        for p in points {
            let key = (p.model.clone(), p.format.clone());
            if !named.models.contains_key(&key) {
                let source = model::open(&p.model)?;
                let format = (!source.has_weights()).then_some(p.format.as_str());
                let spec = model::spec(&source, format, None)?;
                let what =
                    format!("model {} in {}: {}, {} layers", spec.name, spec.format_name, spec.total_bytes(), spec.layers.len());
                named.origins.push((what, p.model.clone()));
                named.models.insert(key, spec);
            }
            if !named.machines.contains_key(&p.machine) {
                let (machine, origin) = model::machine(p.machine.as_deref(), None)?;
                let note = machine.note.clone().unwrap_or_default();
                named.origins.push((format!("machine {}: {note}", machine.name), origin));
                named.machines.insert(p.machine.clone(), machine);
            }
            if let Some(name) = &p.arrivals
                && !named.arrivals.contains_key(name)
            {
                let (text, origin) = model::arrivals(name, folder)?;
                let trace =
                    Arrivals::from_text(&text, Some(study.serving.max_requests as usize)).with_context(|| origin.clone())?;
                named.origins.push((format!("arrivals {name}: {}", tierwise_planner::serving::load::describe(&trace)), origin));
                named.arrivals.insert(name.clone(), trace);
            }
        }
        Ok(named)
    }

    fn of(&self, point: &Point) -> Opened<'_> {
        Opened {
            spec: &self.models[&(point.model.clone(), point.format.clone())],
            machine: &self.machines[&point.machine],
            arrivals: point.arrivals.as_ref().map(|name| &self.arrivals[name]),
        }
    }
}

/// Pareto fronts of tokens per second of each user and of all together: rows by rising speed of each.
fn fronts(rows: &[Row]) -> Vec<report::Front> {
    let mut fronts: Vec<report::Front> = Vec::new();
    for (model, members) in report::by_model(rows) {
        let mut contexts: Vec<u32> = members.iter().map(|r| r.inputs.context).collect();
        contexts.sort_unstable();
        contexts.dedup();
        for context in contexts {
            let members: Vec<&&Row> = members.iter().filter(|r| r.inputs.context == context).collect();
            let speeds = |r: &&&Row| {
                let e = r.expected.as_ref();
                e.map_or((f64::NAN, f64::NAN), |e| (e.decode_tokens_per_s_per_user.value, e.decode_tokens_per_s.value))
            };
            let points: Vec<(f64, f64)> = members.iter().map(speeds).collect();
            let rows = pareto_front(&points).into_iter().map(|i| members[i].row).collect();
            fronts.push(report::Front { model: model.clone(), context, rows });
        }
    }
    fronts
}

/// Marginal values of the first and the last possible row of every model and machine: where axes count upwards, the least and the most.
fn marginals(rows: &[Row], names: &Named, study: &Study, axes: &[&'static str], solver: SolverKind) -> Result<Vec<Marginals>> {
    let same = |a: &Row, b: &Row| {
        a.inputs.model == b.inputs.model && a.inputs.format == b.inputs.format && a.inputs.machine == b.inputs.machine
    };
    let possible: Vec<&Row> = rows.iter().filter(|r| r.expected.is_some()).collect();
    let first = |i: usize| !possible[..i].iter().any(|r| same(r, possible[i]));
    let last = |i: usize| !possible[i + 1..].iter().any(|r| same(r, possible[i]));
    let mut chosen: Vec<usize> =
        (0..possible.len()).filter(|i| first(*i)).chain((0..possible.len()).filter(|i| last(*i))).collect();
    let mut seen = std::collections::BTreeSet::new();
    chosen.retain(|i| seen.insert(*i));
    chosen.truncate(MOST_MARGINALS);
    chosen.sort_unstable();
    chosen
        .par_iter()
        .map(|i| {
            let row = possible[*i];
            let values = marginals_of_point(&row.inputs, names.of(&row.inputs), study, &cost_model, solver)?;
            Ok(Marginals { row: row.row, label: report::label(axes, &row.inputs, true), values })
        })
        .collect()
}
