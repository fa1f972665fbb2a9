//! What to expect of one combination: a plan's predictions, or why there is none.

use super::point::Point;
use super::study::{ServingPart, Study};
use crate::budget;
use crate::error::PlanError;
use crate::make::make_plan;
use crate::marginal::{CostFactory, Marginal, marginal_values};
use crate::plan::{BytesOn, Interval, Plan, Provenance};
use crate::price::Case;
use crate::problem::Problem;
use crate::request::Request;
use crate::serving::memory::KvPool;
use crate::serving::steps::placement_of;
use crate::serving::{Arrivals, Config, Serving, ServingReport, StepSeconds, StepTable, study_load};
use crate::solver::SolverKind;
use serde::Serialize;
use tierwise_cost::cost::CostModel;
use tierwise_cost::machine::{Machine, MemoryKind};
use tierwise_cost::model::ModelSpec;
use tierwise_cost::units::Bytes;

/// A row of a study.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Its place in the study.
    pub row: usize,
    /// What was combined.
    pub inputs: Point,
    /// What to expect; absent when it is impossible.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<Expected>,
    /// Why it is impossible, and the smallest budget that works.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Predictions of a row's plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Expected {
    /// Tokens per second of each sequence.
    pub decode_tokens_per_s_per_user: Interval,
    /// Tokens per second of all sequences.
    pub decode_tokens_per_s: Interval,
    /// Prompt tokens per second.
    pub prefill_tokens_per_s: Interval,
    /// Seconds until the first token of the request's prompt.
    pub ttft_s: Interval,
    /// Seconds per further token of each sequence.
    pub tpot_s: Interval,
    /// Who computes everything but routed experts, and why.
    pub main: String,
    /// What a decode step mostly waits for.
    pub binding: String,
    /// Share of the step during which that is waited for.
    pub binding_share: f64,
    /// Bytes per generated token, by memory and link.
    pub bytes_per_token: Vec<BytesOn>,
    /// How prompts are computed.
    pub prefill_strategy: String,
    /// Hit rate of expert caches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hit_rate: Option<Interval>,
    /// Value of the objective, in seconds.
    pub objective_s: f64,
    /// How far from the best possible plan it may be.
    pub gap: f64,
    /// Who made the plan.
    pub solver: String,
    /// VRAM used, its reserve included.
    pub vram_used: Bytes,
    /// VRAM of the machine.
    pub vram: Bytes,
    /// Host memory used, its reserve included.
    pub ram_used: Bytes,
    /// CXL memory used.
    pub cxl_used: Bytes,
    /// Bytes of keys and values.
    pub kv_bytes: Bytes,
    /// Share of the routed experts' bytes that stay in VRAM.
    pub experts_in_vram: f64,
    /// Arriving requests, when there is a trace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serving: Option<ServingReport>,
    /// Where the numbers come from.
    #[serde(skip_serializing)]
    pub provenance: Vec<Provenance>,
}

/// What a combination names, opened.
#[derive(Debug, Clone, Copy)]
pub struct Opened<'a> {
    /// The model in the row's format.
    pub spec: &'a ModelSpec,
    /// The machine before the row's changes.
    pub machine: &'a Machine,
    /// The trace of arriving requests.
    pub arrivals: Option<&'a Arrivals>,
}

/// The machine and request of a combination.
fn of_point(point: &Point, opened: Opened<'_>, study: &Study) -> Result<(Machine, Request), PlanError> {
    let base = study.request();
    let (machine, limits) = point.machine(opened.machine, base.limits)?;
    Ok((machine, Request { limits, ..point.request(&base) }))
}

/// Evaluates one combination. Those that cannot be planned are rows too.
pub fn evaluate_point(
    row: usize,
    point: &Point,
    opened: Opened<'_>,
    study: &Study,
    cost: &CostFactory<'_>,
    solver: SolverKind,
) -> Row {
    let made = of_point(point, opened, study).and_then(|(machine, request)| {
        expected(&request, opened.spec, &machine, opened.arrivals, &study.serving, &*cost(&machine), solver)
    });
    let inputs = point.clone();
    match made {
        Ok(expected) => Row { row, inputs, expected: Some(expected), error: None },
        Err(e) => Row { row, inputs, expected: None, error: Some(e.to_string()) },
    }
}

/// Marginal values of one combination's machine.
///
/// # Errors
/// Those of [`marginal_values`].
pub fn marginals_of_point(
    point: &Point,
    opened: Opened<'_>,
    study: &Study,
    cost: &CostFactory<'_>,
    solver: SolverKind,
) -> Result<Vec<Marginal>, PlanError> {
    let (machine, request) = of_point(point, opened, study)?;
    marginal_values(opened.spec, &machine, &request, cost, solver)
}

fn expected(
    request: &Request,
    spec: &ModelSpec,
    machine: &Machine,
    arrivals: Option<&Arrivals>,
    part: &ServingPart,
    cost: &dyn CostModel,
    solver: SolverKind,
) -> Result<Expected, PlanError> {
    let problem = Problem::new(spec, machine, request.clone())?;
    let plan = make_plan(&problem, cost, solver)?;
    let serving = arrivals.map(|a| serve(&plan, spec, machine, a, part, cost)).transpose()?;
    let p = &plan.predicted;
    let batch = f64::from(request.batch);
    let total = p.decode_tokens_per_s;
    let used = |kind: MemoryKind| {
        let of = plan.budgets.iter().filter(|b| b.kind == kind);
        of.map(|b| b.capacity.saturating_sub(b.line(budget::FREE))).sum()
    };
    let in_vram: u64 =
        plan.budgets.iter().filter(|b| b.kind == MemoryKind::Vram).map(|b| b.line(budget::RESIDENT_EXPERTS).0).sum();
    let all = problem.expert_bytes().0;
    Ok(Expected {
        decode_tokens_per_s_per_user: Interval { value: total.value / batch, low: total.low / batch, high: total.high / batch },
        decode_tokens_per_s: total,
        prefill_tokens_per_s: p.prefill_tokens_per_s,
        ttft_s: p.ttft_s,
        tpot_s: p.decode_step_s,
        main: format!("{}: {}", plan.main.executor, plan.main.reason),
        binding: p.binding.clone(),
        binding_share: p.binding_share,
        bytes_per_token: p.bytes_per_token.clone(),
        prefill_strategy: p.prefill_strategy.clone(),
        hit_rate: p.hit_rate,
        objective_s: plan.objective_s,
        gap: plan.gap,
        solver: plan.solver.clone(),
        vram_used: used(MemoryKind::Vram),
        vram: machine.memories_of(MemoryKind::Vram).map(|m| m.capacity.value).sum(),
        ram_used: used(MemoryKind::Dram),
        cxl_used: used(MemoryKind::Cxl),
        kv_bytes: budget::kv(spec, request),
        experts_in_vram: if all > 0 { in_vram as f64 / all as f64 } else { 1.0 },
        serving,
        provenance: plan.provenance.clone(),
    })
}

/// Simulates the trace under the plan.
///
/// # Errors
/// When the memory for keys and values cannot hold one request.
pub fn serve(
    plan: &Plan,
    spec: &ModelSpec,
    machine: &Machine,
    arrivals: &Arrivals,
    part: &ServingPart,
    cost: &dyn CostModel,
) -> Result<ServingReport, PlanError> {
    let request = &plan.request;
    // Half of a step's tokens are always left for prompts.
    let max_running = part.max_running.min((request.chunk_tokens / 2).max(1));
    let placement = placement_of(plan);
    let table = |case| StepTable::new(spec, machine, request, &placement, cost, case, max_running);
    let (steps, slow, fast) = (table(Case::Expected)?, table(Case::Slow)?, table(Case::Fast)?);
    let pool = KvPool::of_plan(spec, plan, max_running)?;
    let config = Config {
        admission: part.admission,
        max_running,
        chunk_tokens: request.chunk_tokens.max(2),
        reserve: part.reserve,
        seed: part.seed,
        ..Config::default()
    };
    let serving = Serving { arrivals, pool: &pool, config: &config, slo: part.slo };
    Ok(study_load(&serving, &steps, Some([&slow as &dyn StepSeconds, &fast])))
}
