//! From a problem to a plan: prices, placement, judgement, bound, and every byte on a line.

use crate::budget::{self, EXPERT_CACHE, RESIDENT_EXPERTS};
use crate::error::PlanError;
use crate::evaluate::{Branches, LayerPlacement, Loads, Placement, Prices, Usage, step_seconds, usage};
use crate::lower_bound::{METHOD, lower_bound};
use crate::plan::{
    BytesOn, CachePolicyKind, EngineSettings, ExpertRun, Interval, MachineId, MemoryBudget, ModelId, PLAN_VERSION,
    PREFILL_IN_PLACE, PREFILL_STREAMED, Plan, PlanLayer, Predicted, Provenance, SloLine, SloReport,
};
use crate::price::{Case, Copies, PriceTable};
use crate::problem::{MoeLayer, Problem};
use crate::request::{Objective, Popularity, SloLimits};
use crate::settings::{EXECUTED, default_settings};
use crate::solver::{Solution, SolverKind, solve};
use tierwise_cost::cost::CostModel;
use tierwise_cost::machine::{MemoryKind, Sourced};
use tierwise_cost::units::{Bytes, Seconds};

/// Makes a plan: the wanted solver proposes, [`crate::evaluate`] judges, the bound says how good it is. Where page-locked memory is
/// limited, experts in locked and in pageable memory are both planned, and the faster is taken.
///
/// # Errors
/// When there is no placement, the solver refuses the size, or the bound's linear program fails.
pub fn make_plan(problem: &Problem<'_>, cost: &dyn CostModel, kind: SolverKind) -> Result<Plan, PlanError> {
    either_way(problem, |p| make_plan_as_posed(p, cost, kind), |plan| plan)
}

/// The faster of what `make` makes of the problem as it is and with pageable experts; `of` is the plan in it. The bound is that of both.
pub(crate) fn either_way<T>(
    problem: &Problem<'_>,
    make: impl Fn(&Problem<'_>) -> Result<T, PlanError>,
    of: impl Fn(&mut T) -> &mut Plan,
) -> Result<T, PlanError> {
    let first = make(problem);
    let Some(other) = problem.with_pageable_experts() else { return first };
    match (first, make(&other)) {
        (Ok(mut a), Ok(mut b)) => {
            let bound_s = of(&mut a).lower_bound_s.min(of(&mut b).lower_bound_s);
            let pageable = of(&mut b).objective_s < of(&mut a).objective_s;
            let (mut best, than) = if pageable { (b, "more page-locked ones") } else { (a, "pageable ones") };
            let plan = of(&mut best);
            set_bound(plan, bound_s);
            let which = if pageable { "pageable" } else { "page-locked" };
            plan.solver_reason += &format!("; experts to copy in {which} memory, faster than {than} within --pinned");
            Ok(best)
        }
        // Only one way keeps what was asked for.
        (Ok(a), Err(_)) => Ok(a),
        (Err(_), Ok(b)) => Ok(b),
        (Err(e), Err(_)) => Err(e),
    }
}

fn set_bound(plan: &mut Plan, bound_s: f64) {
    plan.lower_bound_s = bound_s.min(plan.objective_s);
    plan.gap = if plan.objective_s > 0.0 { rounded((plan.objective_s - plan.lower_bound_s) / plan.objective_s) } else { 0.0 };
}

/// [`make_plan`] with experts page-locked as the problem says.
pub(crate) fn make_plan_as_posed(problem: &Problem<'_>, cost: &dyn CostModel, kind: SolverKind) -> Result<Plan, PlanError> {
    let prices = Prices::new(problem, cost, Case::Expected);
    let solution = solve(problem, &prices, kind)?;
    let mut plan = plan_from(problem, cost, &prices, &solution)?;
    default_settings(&mut plan, EXECUTED);
    Ok(plan)
}

/// The plan for a placement that is given, not searched: for experiments and tests.
///
/// # Errors
/// [`PlanError::BadPlan`] when it is not feasible.
pub fn plan_from_placement(problem: &Problem<'_>, cost: &dyn CostModel, placement: Placement) -> Result<Plan, PlanError> {
    let prices = Prices::new(problem, cost, Case::Expected);
    let solution =
        Solution { placement, solver: "given", reason: "the placement was given".into(), bound: None, without_slo: None };
    plan_from(problem, cost, &prices, &solution)
}

/// The plan for a placement that replaces that of `solved`, whose bound is on all placements, so it stays.
pub(crate) fn replanned(
    problem: &Problem<'_>,
    cost: &dyn CostModel,
    placement: Placement,
    solved: Plan,
) -> Result<Plan, PlanError> {
    let mut plan = plan_from_placement(problem, cost, placement)?;
    set_bound(&mut plan, solved.lower_bound_s);
    plan.bound_method = solved.bound_method;
    keep_what_binds(&mut plan, solved.slo);
    plan.solver = solved.solver;
    plan.solver_reason = solved.solver_reason;
    plan.held_out = solved.held_out;
    plan.settings = solved.settings;
    Ok(plan)
}

/// A placement that was given does not know what the limits cost; the solver does.
fn keep_what_binds(plan: &mut Plan, solved: Option<SloReport>) {
    let (Some(slo), Some(solved)) = (&mut plan.slo, solved) else { return };
    slo.objective_without_s = solved.objective_without_s;
    for (line, solved) in [(&mut slo.ttft, solved.ttft), (&mut slo.tpot, solved.tpot)] {
        if let Some(line) = line {
            line.binds = solved.and_then(|s| s.binds);
        }
    }
}

fn plan_from(problem: &Problem<'_>, cost: &dyn CostModel, prices: &Prices, solution: &Solution) -> Result<Plan, PlanError> {
    let placement = &solution.placement;
    let usage = usage(problem, placement)?;
    let objective_s = rounded(prices.objective(problem, placement));
    // Equal up to the LP's tolerance when the placement is optimal: the bound is never above.
    let (bound_s, bound_method) = match &solution.bound {
        Some(b) => (b.seconds, b.method.clone()),
        None => (lower_bound(problem, prices)?, METHOD.to_string()),
    };
    let lower_bound_s = rounded(bound_s).min(objective_s);
    let cases = [prices, &Prices::new(problem, cost, Case::Fast), &Prices::new(problem, cost, Case::Slow)];
    Ok(Plan {
        tierwise_plan: PLAN_VERSION,
        model: ModelId {
            name: problem.spec.name.clone(),
            architecture: problem.spec.architecture.clone(),
            fingerprint: problem.spec.fingerprint(),
            format: problem.spec.format_name.clone(),
        },
        machine: MachineId { name: problem.machine.name.clone(), fingerprint: problem.machine.fingerprint() },
        request: problem.request.clone(),
        main: problem.main.clone(),
        tiers: problem.tiers.clone(),
        layers: plan_layers(problem, placement),
        budgets: budgets(problem, &usage, placement)?,
        predicted: predict(problem, placement, cases),
        objective_s,
        lower_bound_s,
        gap: if objective_s > 0.0 { rounded((objective_s - lower_bound_s) / objective_s) } else { 0.0 },
        bound_method,
        solver: solution.solver.into(),
        solver_reason: solution.reason.clone(),
        provenance: provenance(problem, cost, &usage),
        held_out: None,
        engine: EngineSettings::default(),
        slo: slo_report(problem, prices, solution),
        settings: None,
    })
}

/// The latencies asked for, what is predicted, and whether they shape the plan.
fn slo_report(problem: &Problem<'_>, prices: &Prices, solution: &Solution) -> Option<SloReport> {
    let SloLimits { ttft, tpot } = problem.request.slo;
    let without = solution.without_slo;
    let line = |limit: Option<Seconds>, predicted_s: f64, without_s: Option<f64>| {
        let Seconds(limit_s) = limit?;
        Some(SloLine { limit_s: rounded(limit_s), predicted_s: rounded(predicted_s), binds: without_s.map(|s| s > limit_s) })
    };
    (!problem.request.slo.is_none()).then(|| SloReport {
        ttft: line(ttft, prices.prompt_seconds(problem, &solution.placement).0, without.map(|w| w.ttft_s)),
        tpot: line(tpot, step_seconds(&prices.decode, &solution.placement), without.map(|w| w.step_s)),
        objective_without_s: without.map(|w| rounded(w.objective_s)),
    })
}

/// To nine significant digits: files read back exactly whatever the parser, and nothing is predicted more precisely.
pub(crate) fn rounded(x: f64) -> f64 {
    format!("{x:.8e}").parse().unwrap_or(x)
}

fn plan_layers(problem: &Problem<'_>, placement: &Placement) -> Vec<PlanLayer> {
    let mut layers = Vec::with_capacity(problem.layers.len());
    for (layer, p) in problem.layers.iter().zip(&placement.layers) {
        let mut runs: Vec<ExpertRun> = Vec::new();
        for (expert, tier) in p.tier_of.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if run.tier == u32::from(*tier) => run.count += 1,
                _ => runs.push(ExpertRun { tier: u32::from(*tier), first: expert as u32, count: 1 }),
            }
        }
        layers.push(PlanLayer {
            layer: layer.layer,
            expert_bytes: layer.expert_bytes,
            runs,
            slots: p.slots,
            policy: CachePolicyKind::Lru,
            preload: Vec::new(),
        });
    }
    layers
}

fn budgets(problem: &Problem<'_>, usage: &Usage, placement: &Placement) -> Result<Vec<MemoryBudget>, PlanError> {
    let mut budgets = Vec::with_capacity(problem.machine.memories.len());
    for (m, memory) in problem.machine.memories.iter().enumerate() {
        let mut uses = problem.fixed[m].clone();
        uses.push((RESIDENT_EXPERTS, usage.resident[m]));
        uses.push((EXPERT_CACHE, usage.slots[m]));
        let mut done = budget::complete(memory, problem.capacity[m], &uses).ok_or_else(|| PlanError::BadPlan {
            field: format!("{} lines", memory.id),
            found: uses.iter().map(|(_, b)| *b).sum::<Bytes>().to_string(),
            expected: format!("at most {}", problem.capacity[m]),
        })?;
        if matches!(memory.kind, MemoryKind::Dram | MemoryKind::Cxl) {
            let locked = |t: &u8| {
                let tier = &problem.tiers[usize::from(*t)];
                tier.memory == memory.id && problem.is_page_locked(tier)
            };
            let experts = |(l, p): (&MoeLayer, &LayerPlacement)| {
                Bytes(l.expert_bytes.0 * p.tier_of.iter().filter(|t| locked(t)).count() as u64)
            };
            done.page_locked = problem.layers.iter().zip(&placement.layers).map(experts).sum();
            if !problem.locking.staging_pageable {
                done.page_locked += done.line(budget::STAGING);
            }
        }
        budgets.push(done);
    }
    Ok(budgets)
}

/// `cases` are expected, fast, slow.
fn predict(problem: &Problem<'_>, placement: &Placement, cases: [&Prices; 3]) -> Predicted {
    let steps = cases.map(|c| step_seconds(&c.decode, placement));
    let prompts = cases.map(|c| c.prompt_seconds(problem, placement));
    let interval = |value, low, high| Interval { value: rounded(value), low: rounded(low), high: rounded(high) };
    let per_second = |amount: f64, [value, fast, slow]: [f64; 3]| interval(amount / value, amount / slow, amount / fast);
    let seconds = |[value, low, high]: [f64; 3]| interval(value, low, high);
    let expected = &cases[0].decode;
    let (binding, binding_share) = binding(problem, expected, placement);
    let hit_rates = cases.map(|c| hit_rate(&c.decode, placement));
    Predicted {
        decode_tokens_per_s: per_second(f64::from(problem.request.batch), steps),
        prefill_tokens_per_s: per_second(f64::from(problem.request.prompt_tokens), prompts.map(|p| p.0)),
        ttft_s: seconds(prompts.map(|p| p.0)),
        decode_step_s: seconds(steps),
        prefill_strategy: if prompts[0].1 { PREFILL_STREAMED } else { PREFILL_IN_PLACE }.into(),
        hit_rate: match hit_rates {
            [Some(value), Some(high), Some(low)] => Some(interval(value, low, high)),
            _ => None,
        },
        bytes_per_token: bytes_per_token(problem, expected, placement),
        binding,
        binding_share: rounded(binding_share),
    }
}

/// Expected share of active cached experts that are in their slots.
fn hit_rate(table: &PriceTable, placement: &Placement) -> Option<f64> {
    let (mut wanted, mut copied) = (0.0, 0.0);
    for (i, layer) in placement.layers.iter().enumerate() {
        let price = table.layer(i);
        let loads = Loads::new(price, layer);
        for t in (0..price.tiers.len()).filter(|t| price.tiers[*t].copies == Copies::Misses) {
            wanted += loads.mass[t];
            copied += loads.copied[t];
        }
    }
    (wanted > 0.0).then(|| 1.0 - copied / wanted)
}

/// What the step waits for longest, and its share of the step.
fn binding(problem: &Problem<'_>, table: &PriceTable, placement: &Placement) -> (String, f64) {
    let processors = &problem.machine.processors;
    // The main processor's part outside routed experts, then processors, then links.
    let mut waits = vec![0.0; 1 + processors.len() + table.links.len()];
    waits[0] = table.other_s;
    for (i, layer) in placement.layers.iter().enumerate() {
        let price = table.layer(i);
        let b = Branches::new(price, &Loads::new(price, layer), table.links.len());
        waits[0] += price.fixed_s;
        let slowest = b.iter().map(|b| b.seconds).enumerate().max_by(|x, y| x.1.total_cmp(&y.1));
        if let Some((r, s)) = slowest {
            waits[1 + r] += s;
        }
    }
    let total: f64 = waits.iter().sum();
    let (at, most) = waits.iter().enumerate().fold((0, 0.0), |best, (i, s)| if *s > best.1 { (i, *s) } else { best });
    let name = match at {
        0 => format!("{}: everything but routed experts", problem.main.executor),
        r if r <= processors.len() => format!("{}: routed experts", processors[r - 1].id),
        r => {
            let name = &table.links[r - 1 - processors.len()];
            // What is shared has words of its own.
            if name.contains("->") { format!("{name}: loading experts") } else { name.clone() }
        }
    };
    (name, if total > 0.0 { most / total } else { 0.0 })
}

fn bytes_per_token(problem: &Problem<'_>, table: &PriceTable, placement: &Placement) -> Vec<BytesOn> {
    let memories = &problem.machine.memories;
    let mut read = vec![0.0; memories.len()];
    let mut moved = vec![0.0; table.links.len()];
    read[problem.memory_index(&problem.main.memory)] += table.main_bytes.0 as f64;
    for (i, layer) in placement.layers.iter().enumerate() {
        let price = table.layer(i);
        let loads = Loads::new(price, layer);
        let bytes = problem.layers[i].expert_bytes.0 as f64;
        for (t, tier) in problem.tiers.iter().enumerate() {
            let place = tier.through.as_ref().unwrap_or(&tier.memory);
            read[problem.memory_index(place)] += loads.mass[t] * bytes;
            if price.tiers[t].copies != Copies::Never {
                read[problem.memory_index(&tier.memory)] += loads.copied[t] * bytes;
                moved[price.tiers[t].link] += loads.copied[t] * bytes;
            }
        }
    }
    let names = memories.iter().map(|m| m.id.clone()).chain(table.links.iter().cloned());
    let per_token = |bytes: f64| Bytes((bytes / f64::from(table.tokens)).round() as u64);
    names
        .zip(read.into_iter().chain(moved).map(per_token))
        .filter(|(_, b)| b.0 > 0)
        .map(|(on, bytes)| BytesOn { on, bytes })
        .collect()
}

fn provenance(problem: &Problem<'_>, cost: &dyn CostModel, usage: &Usage) -> Vec<Provenance> {
    fn sourced<T: std::fmt::Display>(what: String, s: &Sourced<T>) -> Provenance {
        Provenance { what, value: s.value.to_string(), source: s.source.name().into(), note: s.note.clone() }
    }
    let prior = |what: &str, value: String, note: &str| Provenance {
        what: what.into(),
        value,
        source: "prior".into(),
        note: Some(note.into()),
    };
    let mut list = Vec::new();
    let main_memory = problem.memory_index(&problem.main.memory);
    for (m, memory) in problem.machine.memories.iter().enumerate() {
        if m == main_memory || usage.resident[m].0 + usage.slots[m].0 > 0 {
            list.push(sourced(format!("{} read bandwidth", memory.id), &memory.read_bandwidth));
        }
    }
    for p in &problem.machine.processors {
        list.push(sourced(format!("{} arithmetic rate", p.id), p.f16_flops.as_ref().unwrap_or(&p.f32_flops)));
    }
    for l in &problem.machine.links {
        list.push(sourced(format!("{}->{} bandwidth", l.from, l.to), &l.bandwidth));
    }
    let (source, note) = cost.basis();
    list.push(sourced("cost model".into(), &Sourced { value: cost.describe(), source, note: Some(note.into()) }));
    match &problem.request.popularity {
        Popularity::Uniform => list.push(prior("popularity of experts", "uniform".into(), "no trace was given")),
        Popularity::Shares(_) => list.push(Provenance {
            what: "popularity of experts".into(),
            value: "shares of a trace".into(),
            source: "measured".into(),
            note: None,
        }),
    }
    if usage.slots.iter().any(|s| s.0 > 0) {
        let note = "LRU on traces of DeepSeek-V2-Lite (expected), gpt-oss-20b (high), uniform routing (low)";
        list.push(prior("hit rate of expert caches", "curve over the cached fraction".into(), note));
    }
    let locking = problem.locking;
    if problem.request.limits.pinned.is_none() && problem.tiers.iter().any(|t| problem.is_page_locked(t)) {
        let note = "what the system lets a process lock (memlock) is not looked at; --pinned sets a limit";
        list.push(prior("page-locked host memory", "no limit".into(), note));
    } else if locking.staging_pageable || locking.experts_pageable {
        let note = "--pinned is less than a staging buffer or an expert: copies at the rate of pageable memory";
        list.push(prior("page-locked host memory", "too little".into(), note));
    }
    let past = problem.request.decode_past();
    if problem.request.objective != Objective::Prefill {
        list.push(prior("positions in the cache while decoding", past.to_string(), "half of the context"));
    }
    list
}
