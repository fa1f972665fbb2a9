//! `tierwise plan`

use crate::args::{ObjectiveArg, PlanArgs, PlanningArgs, SolverArg};
use crate::cmd::{plan_counts, plan_trace};
use crate::model;
use crate::ui::{self, Ui, number};
use anyhow::{Context, Result};
use serde_json::json;
use std::time::Instant;
use tierwise_cost::cost::{CostModel, cost_model};
use tierwise_cost::machine::ProcessorKind;
use tierwise_cost::model::ModelSpec;
use tierwise_planner::baselines::best_whole_layers;
use tierwise_planner::budget::tight_ram;
use tierwise_planner::elastic::elastic_plan;
use tierwise_planner::evaluate::{Prices, step_seconds};
use tierwise_planner::explain::tier_table;
use tierwise_planner::marginal::{Marginal, marginal_values};
use tierwise_planner::plan::SloReport;
use tierwise_planner::predict::strategy::{LlamaCpp, best_n_cpu_moe};
use tierwise_planner::price::Case;
use tierwise_planner::settings::{self, SettingsReport};
use tierwise_planner::{Limits, Objective, Plan, Problem, Request, SloLimits, SolverKind, make_plan};
use tierwise_runtime::atomic_file::write_atomic;

pub fn run(args: &PlanArgs, ui: &Ui) -> Result<()> {
    if let Some(trace) = &args.trace.trace {
        return plan_trace::run(args, trace, ui);
    }
    let source = model::open(&args.model.model)?;
    let spec = model::spec(&source, args.model.format.as_deref(), args.model.layers)?;
    let (machine, origin) = model::machine(args.planning.machine.as_deref(), None)?;
    ui.detail(format!("machine: {} ({origin})", machine.name));
    let started = Instant::now();
    let counted = plan_counts::read(&args.trace, &spec)?;
    let mut request = request(&args.planning, &spec)?;
    if let Some(counted) = &counted {
        request.popularity = counted.popularity();
        counted.warn(ui);
    }
    let lay_out = if args.elastic { Problem::elastic } else { Problem::new };
    let mut problem = lay_out(&spec, &machine, request)?;
    if let Some(warning) = tight_ram(&machine, &problem.request) {
        ui.note(warning);
    }
    problem.time_limit_s = args.planning.time_limit;
    let cost = cost_model(&machine);
    let kind = solver(args.planning.solver);
    let mut plan = if args.elastic { elastic_plan(&problem, cost.as_ref())? } else { make_plan(&problem, cost.as_ref(), kind)? };
    if let Some(counted) = &counted {
        counted.say_where_from(&mut plan);
    }
    args.engine.apply(&mut plan)?;
    let plan = plan.check(&spec, Some(&machine))?.plan().clone();
    let solve_time_s = started.elapsed().as_secs_f64();
    let engines = other_engines(&problem, cost.as_ref());
    let marginal =
        if args.marginal { marginal_values(&spec, &machine, &problem.request, &cost_model, kind)? } else { Vec::new() };
    if let Some(path) = &args.output {
        write_atomic(path, plan.to_json().as_bytes())?;
    }
    let mut value = serde_json::to_value(&plan).context("plan to JSON")?;
    // The name in the contract of the command line; seconds, as everywhere.
    value["predicted"]["ttft"] = value["predicted"]["ttft_s"].clone();
    value["solve_time_s"] = json!(solve_time_s);
    value["machine_origin"] = json!(origin);
    value["plan_file"] = json!(args.output);
    value["other_engines"] = json!(engines);
    value["marginal"] = json!(marginal);
    ui.result(&value, || {
        let mut text = describe(&plan, &spec, &origin);
        text += &engines.describe();
        if !marginal.is_empty() {
            text += &describe_marginal(&marginal);
        }
        text += &format!("\nmade in {} ms by {}: {}\n", number(solve_time_s * 1e3), plan.solver, plan.solver_reason);
        if let Some(path) = &args.output {
            text += &format!("written to {}\n", path.display());
        }
        text
    })
}

/// What llama.cpp would do with the same bytes: whole layers of experts on the CPU (`--n-cpu-moe N`).
#[derive(Debug, serde::Serialize)]
struct OtherEngines {
    /// The best whole-layer placement under this plan's own prices: what placing single experts is worth.
    whole_layers_same_prices: Option<WholeLayers>,
    /// llama.cpp itself, by the model fitted to published runs.
    llama_cpp: Option<LlamaCpp>,
}

/// A whole-layer placement.
#[derive(Debug, serde::Serialize)]
struct WholeLayers {
    n_cpu_moe: usize,
    decode_tokens_per_s: f64,
}

fn other_engines(problem: &Problem<'_>, cost: &dyn CostModel) -> OtherEngines {
    let has_gpu = problem.machine.processors_of(ProcessorKind::Gpu).next().is_some();
    let prices = Prices::new(problem, cost, Case::Expected);
    // An error says that whole layers do not apply here: no GPU leads, or memory cannot hold them without a disk.
    let best = if has_gpu { best_whole_layers(problem, &prices).ok().flatten() } else { None };
    let whole = best.map(|(n_cpu_moe, placement)| WholeLayers {
        n_cpu_moe,
        decode_tokens_per_s: f64::from(problem.request.batch) / step_seconds(&prices.decode, &placement),
    });
    let llama_cpp = best_n_cpu_moe(problem.spec, problem.machine, &problem.request);
    OtherEngines { whole_layers_same_prices: whole, llama_cpp }
}

impl OtherEngines {
    fn describe(&self) -> String {
        let mut text = String::new();
        if let Some(w) = &self.whole_layers_same_prices {
            text += &format!(
                "whole layers instead (llama.cpp's --n-cpu-moe {}), same prices: {} tokens/s decode\n",
                w.n_cpu_moe,
                number(w.decode_tokens_per_s)
            );
        }
        if let Some(l) = &self.llama_cpp {
            text += &format!(
                "llama.cpp with --n-cpu-moe {}, by its published runs: {} tokens/s ({} to {})\n",
                l.n_cpu_moe,
                number(l.decode.tps),
                number(l.decode.low),
                number(l.decode.high)
            );
        }
        text
    }
}

fn describe_marginal(rows: &[Marginal]) -> String {
    let rows = rows
        .iter()
        .map(|m| vec![m.what.clone(), format!("{} to {}", number(m.before), number(m.after)), ui::percent(m.gain_fraction)]);
    format!("\nWhat more would bring (planned anew)\n{}\n", ui::table(&["", "decode tokens/s", "gain"], rows, false))
}

/// The workload, changed by the flags; without one the context defaults to what the model can take.
pub(super) fn request(args: &PlanningArgs, spec: &ModelSpec) -> Result<Request> {
    let mut request = match &args.workload {
        Some(name) => model::workload(name)?.request,
        None => Request { context: default_context(spec), ..Request::default() },
    };
    let set = |field: &mut u32, flag: Option<u32>| *field = flag.unwrap_or(*field);
    set(&mut request.context, args.context);
    set(&mut request.batch, args.batch);
    set(&mut request.chunk_tokens, args.chunk);
    set(&mut request.prompt_tokens, args.prompt_tokens);
    if args.prompt_tokens.is_none() {
        request.prompt_tokens = request.prompt_tokens.min(request.context);
    }
    request.kv_format = args.kv.unwrap_or(request.kv_format);
    request.objective = match args.objective {
        None => request.objective,
        Some(ObjectiveArg::Decode) => Objective::Decode,
        Some(ObjectiveArg::Prefill) => Objective::Prefill,
        Some(ObjectiveArg::Mix) => Objective::Mix,
    };
    request.slo = SloLimits { ttft: args.slo_ttft.or(request.slo.ttft), tpot: args.slo_tpot.or(request.slo.tpot) };
    request.no_cache |= args.no_cache;
    let l = request.limits;
    request.limits = Limits {
        vram: args.vram.or(l.vram),
        ram: args.ram.or(l.ram),
        cxl: args.cxl.or(l.cxl),
        disk: args.disk.or(l.disk),
        pinned: args.pinned.or(l.pinned),
    };
    Ok(request)
}

/// 4096 tokens, or what the model was made for if that is less.
pub fn default_context(spec: &ModelSpec) -> u32 {
    spec.context_length.min(4096)
}

/// The solver that a flag names.
pub fn solver(arg: SolverArg) -> SolverKind {
    match arg {
        SolverArg::Auto => SolverKind::Auto,
        SolverArg::Greedy => SolverKind::Greedy,
        SolverArg::Local => SolverKind::Local,
        SolverArg::Ilp => SolverKind::Ilp,
        SolverArg::Exhaustive => SolverKind::Exhaustive,
    }
}

/// A plan for people: where things are, what every byte is for, what to expect.
pub fn describe(plan: &Plan, spec: &ModelSpec, machine_origin: &str) -> String {
    let mut text = format!(
        "{} ({}, {}) on {} ({machine_origin}); context {}, batch {}, cache {}\n\n",
        plan.model.name,
        plan.model.format,
        spec.total_bytes(),
        plan.machine.name,
        plan.request.context,
        plan.request.batch,
        plan.request.kv_format
    );
    text += "Where the experts are\n";
    let rows = tier_table(plan).into_iter().filter(|t| t.experts > 0).map(|t| {
        let slots = t.place.through.map_or_else(|| "-".into(), |memory| format!("{} in {memory}", t.slots));
        vec![t.place.memory, t.place.executor, t.experts.to_string(), t.bytes.to_string(), t.layers.to_string(), slots]
    });
    text += &ui::table(&["memory", "computed by", "experts", "bytes", "layers", "cache slots"], rows, false);
    text += "\n\nWhat every byte is for\n";
    let rows = plan.budgets.iter().flat_map(|b| {
        let head = vec![b.memory.clone(), "budget".into(), b.capacity.to_string()];
        let lines = b.lines.iter().filter(|l| l.bytes.0 > 0).map(|l| vec![String::new(), l.name.clone(), l.bytes.to_string()]);
        let locked = (b.page_locked.0 > 0).then(|| vec![String::new(), "of it page-locked".into(), b.page_locked.to_string()]);
        std::iter::once(head).chain(lines.collect::<Vec<_>>()).chain(locked)
    });
    text += &ui::table(&["memory", "line", "bytes"], rows, false);
    if plan.layers.iter().any(|l| l.slots > 0) {
        text += &format!("\n\nengine: {}", crate::engine_flags::describe(plan));
    }
    let p = &plan.predicted;
    text += "\n\nWhat to expect\n";
    let speed = |what: &str, i: &tierwise_planner::plan::Interval, unit: &str| {
        vec![what.to_string(), format!("{} {unit}", number(i.value)), format!("{} to {}", number(i.low), number(i.high))]
    };
    text += &ui::table(
        &["", "predicted", "interval"],
        [
            speed("decode", &p.decode_tokens_per_s, "tokens/s"),
            speed("prefill", &p.prefill_tokens_per_s, "tokens/s"),
            speed("first token", &p.ttft_s, "s"),
        ],
        false,
    );
    let traffic: Vec<_> = p.bytes_per_token.iter().map(|t| format!("{} {}", t.bytes, t.on)).collect();
    text += &format!("\nper token: {}; limited by {}\n", traffic.join(", "), p.binding);
    text += &format!(
        "objective {} ms, no plan is below {} ms (gap {}; bound: {})\n",
        number(plan.objective_s * 1e3),
        number(plan.lower_bound_s * 1e3),
        ui::percent(plan.gap),
        plan.bound_method
    );
    if let Some(slo) = &plan.slo {
        text += &describe_slo(slo, plan.objective_s);
    }
    if let Some(settings) = &plan.settings {
        text += &describe_settings(plan, settings);
    }
    text
}

/// How the engine is to work, why, and what was replayed to find out.
fn describe_settings(plan: &Plan, report: &SettingsReport) -> String {
    let mut text = format!("\nHow it runs: {}\n({})\n", settings::describe(plan), report.reason);
    if !report.candidates.is_empty() {
        let rows = report.candidates.iter().map(|c| {
            let taken = if c.taken { "taken" } else { "" };
            vec![c.name.clone(), number(c.step_s * 1e3), ui::percent(c.hit), taken.into()]
        });
        let steps = format!("on {} steps of the train part", report.train_steps);
        text += &format!("{}\n", ui::table(&[&steps, "ms per step", "hits", ""], rows, false));
    }
    if let Some(t) = report.test {
        text += &format!(
            "on {} steps of the held-out part: {} ms per step, hits {}; LRU alone {} ms, hits {}\n",
            t.steps,
            number(t.step_s * 1e3),
            ui::percent(t.hit),
            number(t.plain_step_s * 1e3),
            ui::percent(t.plain_hit)
        );
    }
    text
}

/// Which latencies were asked for, and what they cost.
fn describe_slo(slo: &SloReport, objective_s: f64) -> String {
    let mut text = String::new();
    for (what, line) in [("first token", slo.ttft), ("decode step", slo.tpot)] {
        let Some(l) = line else { continue };
        let binds = match l.binds {
            Some(true) => "binds: the plan without it is above",
            Some(false) => "does not bind",
            None => "the placement was given",
        };
        text += &format!(
            "{what} within {} ms asked for, {} ms predicted; {binds}\n",
            number(l.limit_s * 1e3),
            number(l.predicted_s * 1e3)
        );
    }
    if let Some(free) = slo.objective_without_s.filter(|free| *free < objective_s) {
        let more = ui::percent(objective_s / free - 1.0);
        text += &format!("without limits the objective would be {} ms: they cost {more}\n", number(free * 1e3));
    }
    text
}
