//! The only way to a [`CheckedPlan`]: a plan is believed after it was checked against the model (and the machine, if there is one).
//!
//! The engine takes nothing else, so it needs no checks of its own: every expert has exactly one place, every tier exists, budgets
//! add up to the byte.

use crate::budget;
use crate::engine::{ExecutorId, TierId};
use crate::error::PlanError;
use crate::plan::{CachePartition, Interval, PLAN_VERSION, PREFILL_STREAMED, Plan, PlanLayer, PrefetchKind, Tier};
use std::collections::HashSet;
use tierwise_cost::machine::{Machine, MemoryKind, ProcessorKind};
use tierwise_cost::model::ModelSpec;
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::Bytes;

/// A processor that a plan uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executor {
    /// Its id.
    pub id: String,
    /// Its kind.
    pub kind: ProcessorKind,
}

/// Prefetches look this many layers ahead at most: guesses fade with every layer.
const MAX_PREFETCH_LAYERS: u32 = 8;

/// Slots of equal size in one memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Number of slots; 0 in layers that load nothing.
    pub slots: u32,
    /// Bytes of one slot.
    pub slot_bytes: Bytes,
}

/// A plan that holds together. Made by [`Plan::check`] only.
#[derive(Debug, Clone)]
pub struct CheckedPlan {
    plan: Plan,
    moe_layers: Vec<u32>,
    /// Index into the plan's layers, by model layer.
    index_of: Vec<Option<usize>>,
    /// Tier of each expert, by plan layer. `[layers][experts]`
    tier_of: Vec<Vec<u8>>,
    /// Experts per token, by plan layer.
    experts_per_token: Vec<u32>,
    /// Distinct executors: the main one first.
    executors: Vec<Executor>,
    /// Executor of each tier.
    executor_of_tier: Vec<ExecutorId>,
}

#[expect(clippy::needless_pass_by_value, reason = "numbers and texts alike")]
fn bad<T>(field: impl Into<String>, found: impl ToString, expected: impl Into<String>) -> Result<T, PlanError> {
    Err(PlanError::BadPlan { field: field.into(), found: found.to_string(), expected: expected.into() })
}

impl Plan {
    /// Checks the plan against the model and, if given, the machine.
    ///
    /// # Errors
    /// [`PlanError::Mismatch`] for another model or machine, [`PlanError::BadPlan`] naming the field, [`PlanError::BadRequest`].
    pub fn check(self, spec: &ModelSpec, machine: Option<&Machine>) -> Result<CheckedPlan, PlanError> {
        if self.tierwise_plan != PLAN_VERSION {
            return bad("tierwise_plan", self.tierwise_plan, PLAN_VERSION.to_string());
        }
        let mismatch = |what, planned_name: &str, planned: &str, name: &str, found: String| PlanError::Mismatch {
            what,
            planned_name: planned_name.into(),
            planned: planned.into(),
            name: name.into(),
            found,
        };
        if self.model.fingerprint != spec.fingerprint() {
            return Err(mismatch("model", &self.model.name, &self.model.fingerprint, &spec.name, spec.fingerprint()));
        }
        if let Some(m) = machine
            && self.machine.fingerprint != m.fingerprint()
        {
            return Err(mismatch("machine", &self.machine.name, &self.machine.fingerprint, &m.name, m.fingerprint()));
        }
        self.request.check(spec.context_length)?;
        check_tiers(&self, machine)?;
        let tier_of = check_layers(&self, spec)?;
        check_engine(&self)?;
        check_budgets(&self, spec, machine)?;
        check_numbers(&self)?;

        let mut index_of = vec![None; spec.layers.len()];
        for (i, l) in self.layers.iter().enumerate() {
            index_of[l.layer as usize] = Some(i);
        }
        let mut executors = vec![Executor { id: self.main.executor.clone(), kind: self.main.executor_kind }];
        let mut executor_of_tier = Vec::with_capacity(self.tiers.len());
        for t in &self.tiers {
            let known = executors.iter().position(|e| e.id == t.executor).unwrap_or_else(|| {
                executors.push(Executor { id: t.executor.clone(), kind: t.executor_kind });
                executors.len() - 1
            });
            executor_of_tier.push(ExecutorId(known as u32));
        }
        let moe_layers = self.layers.iter().map(|l| l.layer).collect();
        let experts_per_token = spec.moe_layers().map(|(_, moe)| moe.experts_per_token).collect();
        Ok(CheckedPlan { plan: self, moe_layers, index_of, tier_of, experts_per_token, executors, executor_of_tier })
    }
}

fn check_tiers(plan: &Plan, machine: Option<&Machine>) -> Result<(), PlanError> {
    if plan.tiers.is_empty() || plan.tiers.len() > usize::from(u8::MAX) {
        return bad("tiers", plan.tiers.len(), "1 to 255");
    }
    let mut seen = HashSet::new();
    for (i, t) in plan.tiers.iter().enumerate() {
        let field = |name: &str| format!("tiers[{i}].{name}");
        if !seen.insert(t) {
            return bad(format!("tiers[{i}]"), t.describe(), "every tier once");
        }
        if t.through.as_ref() == Some(&t.memory) {
            return bad(field("through"), &t.memory, "another memory than its own");
        }
        if t.kind == MemoryKind::Disk && t.through.is_none() {
            return bad(field("through"), "absent", "the memory into which experts are loaded from disk");
        }
        let Some(machine) = machine else { continue };
        let Some(memory) = machine.memory(&t.memory) else {
            return bad(field("memory"), &t.memory, format!("a memory of {}", machine.name));
        };
        let Some(p) = machine.processor(&t.executor) else {
            return bad(field("executor"), &t.executor, format!("a processor of {}", machine.name));
        };
        if memory.kind != t.kind || p.kind != t.executor_kind {
            return bad(
                field("kind"),
                format!("{} and {}", t.kind.name(), t.executor_kind.name()),
                format!("{} and {}", memory.kind.name(), p.kind.name()),
            );
        }
        let place = t.through.as_ref().unwrap_or(&t.memory);
        if !p.computes_from.contains(place) {
            return bad(field("executor"), format!("{} for {place}", p.id), "a processor that computes from that memory");
        }
        if let Some(through) = &t.through
            && machine.link(&t.memory, through).is_none()
        {
            return bad(field("through"), through, format!("a memory to which a link leads from {}", t.memory));
        }
    }
    if let Some(machine) = machine {
        let main = machine.processor(&plan.main.executor);
        if main.is_none_or(|p| p.kind != plan.main.executor_kind || machine.home(p).id != plan.main.memory) {
            let found = format!("{} on {}", plan.main.executor, plan.main.memory);
            return bad("main", found, format!("a processor of {} and its home memory", machine.name));
        }
    }
    Ok(())
}

/// Tiers by expert, for every layer of the plan. `[layers][experts]`
fn check_layers(plan: &Plan, spec: &ModelSpec) -> Result<Vec<Vec<u8>>, PlanError> {
    let bytes = spec.layer_bytes();
    let expected: Vec<u32> = spec.moe_layers().map(|(l, _)| l).collect();
    let found: Vec<u32> = plan.layers.iter().map(|l| l.layer).collect();
    if found != expected {
        let first = expected.iter().zip(found.iter().map(Some).chain(std::iter::repeat(None))).find(|(e, f)| Some(*e) != *f);
        let what =
            first.map_or_else(|| "layers beyond the model's".to_string(), |(e, f)| format!("{f:?} where layer {e} belongs"));
        return bad("layers", what, format!("the model's {} MoE layers, ascending", expected.len()));
    }
    let mut all = Vec::with_capacity(plan.layers.len());
    for (l, (_, moe)) in plan.layers.iter().zip(spec.moe_layers()) {
        if l.expert_bytes != bytes[l.layer as usize].per_expert {
            let expected = bytes[l.layer as usize].per_expert.to_string();
            return bad(format!("layer {} expert_bytes", l.layer), l.expert_bytes, expected);
        }
        all.push(check_runs(plan, l, moe.num_experts)?);
    }
    Ok(all)
}

fn check_runs(plan: &Plan, l: &PlanLayer, num_experts: u32) -> Result<Vec<u8>, PlanError> {
    let at = |what: &str| format!("layer {} {what}", l.layer);
    let mut tier_of = Vec::with_capacity(num_experts as usize);
    let (mut cached, mut through): (u32, Option<&str>) = (0, None);
    for run in &l.runs {
        let Some(tier) = plan.tiers.get(run.tier as usize) else {
            return bad(at("runs"), format!("tier {}", run.tier), format!("a tier below {}", plan.tiers.len()));
        };
        let end = run.first.checked_add(run.count).filter(|end| *end <= num_experts && run.count > 0);
        if run.first as usize != tier_of.len() || end.is_none() {
            let found = format!("{} experts from {} after {} others", run.count, run.first, tier_of.len());
            return bad(at("runs"), found, format!("every one of {num_experts} experts exactly once, ascending"));
        }
        tier_of.extend(std::iter::repeat_n(run.tier as u8, run.count as usize));
        if let Some(memory) = &tier.through {
            cached += run.count;
            if through.is_some_and(|other| other != memory) {
                return bad(at("runs"), "tiers through two memories", "slots in one memory per layer");
            }
            through = Some(memory);
        }
    }
    if tier_of.len() != num_experts as usize {
        return bad(at("runs"), format!("{} experts", tier_of.len()), format!("{num_experts} experts"));
    }
    let valid = if cached == 0 { l.slots == 0 } else { (1..=cached).contains(&l.slots) };
    if !valid {
        let expected = if cached == 0 {
            "0: nothing is loaded".into()
        } else {
            format!("1 to {cached}, the number of experts that are loaded")
        };
        return bad(at("slots"), l.slots, expected);
    }
    let mut seen = HashSet::new();
    for e in &l.preload {
        let loaded = tier_of.get(*e as usize).is_some_and(|t| plan.tiers[usize::from(*t)].through.is_some());
        if !loaded || !seen.insert(*e) || seen.len() > l.slots as usize {
            return bad(
                at("preload"),
                format!("expert {e}"),
                "different experts that are loaded before use, at most one per slot",
            );
        }
    }
    Ok(tier_of)
}

fn check_engine(plan: &Plan) -> Result<(), PlanError> {
    let e = &plan.engine;
    if e.prefetch != PrefetchKind::Off && !(1..=MAX_PREFETCH_LAYERS).contains(&e.prefetch_layers) {
        return bad("engine.prefetch_layers", e.prefetch_layers, format!("1 to {MAX_PREFETCH_LAYERS}"));
    }
    if e.staging_slots > 0 {
        let cached = plan.layers.iter().filter(|l| l.slots > 0);
        let needed = u64::from(e.staging_slots).saturating_mul(cached.map(|l| l.expert_bytes.0).max().unwrap_or(0));
        for through in plan.tiers.iter().filter_map(|t| t.through.as_ref()) {
            let room =
                plan.budgets.iter().filter(|b| b.memory == *through).map(|b| b.line(budget::STAGING).0 + b.line(budget::FREE).0);
            if room.sum::<u64>() < needed {
                return bad(
                    "engine.staging_slots",
                    e.staging_slots,
                    format!("slots that fit what {through} has for staging or free"),
                );
            }
        }
    }
    if e.partition == CachePartition::Global {
        let mut cached = plan.layers.iter().filter(|l| l.slots > 0);
        let first = cached.next();
        let alike = |l: &PlanLayer| first.is_none_or(|f| l.expert_bytes == f.expert_bytes && l.policy == f.policy);
        let experts = |l: &PlanLayer| l.runs.iter().map(|r| r.count).sum::<u32>();
        if let Some(pair) = plan.layers.windows(2).find(|p| experts(&p[0]) != experts(&p[1])) {
            let found = format!("global, with {} and {} experts per layer", experts(&pair[0]), experts(&pair[1]));
            return bad("engine.partition", found, "as many experts in every layer");
        }
        if let Some(other) = cached.find(|l| !alike(l)) {
            return bad(
                "engine.partition",
                format!("global, with layer {} unlike the first", other.layer),
                "experts of one size and one policy",
            );
        }
    }
    Ok(())
}

fn check_budgets(plan: &Plan, spec: &ModelSpec, machine: Option<&Machine>) -> Result<(), PlanError> {
    let mut memories = HashSet::new();
    for b in &plan.budgets {
        let at = |what: &str| format!("budget of {} {what}", b.memory);
        if !memories.insert(b.memory.as_str()) {
            return bad(at(""), "given twice", "one budget per memory");
        }
        let mut names = HashSet::new();
        let mut sum = 0_u64;
        for line in &b.lines {
            if !budget::LINES.contains(&line.name.as_str()) || !names.insert(line.name.as_str()) {
                return bad(
                    at("lines"),
                    format!("{:?}", line.name),
                    format!("each at most once of: {}", budget::LINES.join(", ")),
                );
            }
            match sum.checked_add(line.bytes.0) {
                Some(s) => sum = s,
                None => return bad(at("lines"), "a sum beyond 2^64", format!("{}, its capacity", b.capacity)),
            }
        }
        if sum != b.capacity.0 {
            return bad(at("lines"), format!("a sum of {sum} B"), format!("{} B, its capacity", b.capacity.0));
        }
        let Some(machine) = machine else { continue };
        let Some(memory) = machine.memory(&b.memory) else {
            return bad(at(""), "of no memory", format!("a memory of {}", machine.name));
        };
        let allowed = budget::capacity(machine, &plan.request, memory);
        if b.kind != memory.kind || b.capacity != allowed {
            return bad(at("capacity"), format!("{} {}", b.kind.name(), b.capacity), format!("{} {allowed}", memory.kind.name()));
        }
        if b.numa_nodes != memory.numa_nodes {
            return bad(at("numa_nodes"), format!("{:?}", b.numa_nodes), format!("{:?}, as the machine has", memory.numa_nodes));
        }
    }
    check_page_locked(plan)?;
    // What the lines must hold follows from the placement, the model and the request.
    let line = |memory: &str, name: &str, needed: Bytes| {
        let Some(b) = plan.budgets.iter().find(|b| b.memory == memory) else {
            return bad("budgets", format!("none for {memory}"), "one for every memory that is used");
        };
        if b.line(name) != needed {
            return bad(format!("budget of {memory} {name:?}"), format!("{} B", b.line(name).0), format!("{} B", needed.0));
        }
        Ok(())
    };
    let main = &plan.main.memory;
    line(main, budget::NON_EXPERT_WEIGHTS, budget::non_expert_weights(spec))?;
    line(main, budget::KV, budget::kv(spec, &plan.request))?;
    line(main, budget::ACTIVATIONS, budget::activations(spec, &plan.request))?;
    let mut used: Vec<&str> =
        plan.tiers.iter().flat_map(|t| std::iter::once(&t.memory).chain(&t.through)).map(String::as_str).collect();
    used.extend(plan.budgets.iter().map(|b| b.memory.as_str()));
    used.sort_unstable();
    used.dedup();
    for memory in used {
        let (mut resident, mut slots) = (0_u64, 0_u64);
        for l in &plan.layers {
            let mut cached_here = false;
            for run in &l.runs {
                let t = &plan.tiers[run.tier as usize];
                if t.memory == memory {
                    resident = resident.saturating_add(l.expert_bytes.0.saturating_mul(u64::from(run.count)));
                }
                cached_here |= t.through.as_deref() == Some(memory);
            }
            if cached_here {
                slots = slots.saturating_add(l.expert_bytes.0.saturating_mul(u64::from(l.slots)));
            }
        }
        line(memory, budget::RESIDENT_EXPERTS, Bytes(resident))?;
        line(memory, budget::EXPERT_CACHE, Bytes(slots))?;
    }
    Ok(())
}

/// Page-locked are experts that wait in host memory for slots of a GPU, or none of them, and staging, or not.
fn check_page_locked(plan: &Plan) -> Result<(), PlanError> {
    let mut all = 0_u64;
    for b in &plan.budgets {
        let locked = |t: &Tier| t.memory == b.memory && t.through.is_some() && t.executor_kind == ProcessorKind::Gpu;
        let experts = plan.layers.iter().flat_map(|l| l.runs.iter().map(move |r| (l, r)));
        let experts = experts.filter(|(_, r)| locked(&plan.tiers[r.tier as usize]));
        let experts = experts.fold(0_u64, |sum, (l, r)| sum.saturating_add(l.expert_bytes.0.saturating_mul(u64::from(r.count))));
        let staging = b.line(budget::STAGING).0;
        let allowed = match b.kind {
            MemoryKind::Dram | MemoryKind::Cxl => [experts.saturating_add(staging), experts, staging, 0],
            MemoryKind::Vram | MemoryKind::Disk => [0; 4],
        };
        if !allowed.contains(&b.page_locked.0) {
            return bad(format!("budget of {} page_locked", b.memory), b.page_locked, format!("{} B", allowed[0]));
        }
        all = all.saturating_add(b.page_locked.0);
    }
    match plan.request.limits.pinned {
        Some(limit) if all > limit.0 => bad("page_locked", Bytes(all), format!("at most {limit}, the request's limit")),
        _ => Ok(()),
    }
}

fn check_numbers(plan: &Plan) -> Result<(), PlanError> {
    let positive = |field: &str, x: f64| if x.is_finite() && x > 0.0 { Ok(()) } else { bad(field, x, "a finite number above 0") };
    let interval = |field: &str, i: Interval| {
        positive(field, i.low)?;
        positive(field, i.high)?;
        if i.low <= i.value && i.value <= i.high { Ok(()) } else { bad(field, format!("{i:?}"), "low <= value <= high") }
    };
    interval("predicted.decode_tokens_per_s", plan.predicted.decode_tokens_per_s)?;
    interval("predicted.prefill_tokens_per_s", plan.predicted.prefill_tokens_per_s)?;
    interval("predicted.ttft_s", plan.predicted.ttft_s)?;
    interval("predicted.decode_step_s", plan.predicted.decode_step_s)?;
    let (asked, p) = (plan.request.slo, &plan.predicted);
    let line = |l: Option<crate::plan::SloLine>| l.map(|l| (l.limit_s, l.predicted_s));
    let stated = plan.slo.as_ref().map_or([None; 2], |s| [line(s.ttft), line(s.tpot)]);
    let limits = [("slo.ttft", asked.ttft, p.ttft_s.value), ("slo.tpot", asked.tpot, p.decode_step_s.value)];
    for ((field, limit, predicted_s), found) in limits.into_iter().zip(stated) {
        let needed = limit.map(|l| (crate::make::rounded(l.0), predicted_s));
        if found != needed {
            return bad(field, format!("{found:?}"), format!("{needed:?}: the request's limit and the prediction"));
        }
    }
    positive("objective_s", plan.objective_s)?;
    positive("lower_bound_s", plan.lower_bound_s)?;
    if plan.lower_bound_s > plan.objective_s * (1.0 + 1e-9) {
        return bad("lower_bound_s", plan.lower_bound_s, format!("at most the objective, {}", plan.objective_s));
    }
    let gap = (plan.objective_s - plan.lower_bound_s) / plan.objective_s;
    if !plan.gap.is_finite() || (plan.gap - gap).abs() > 1e-6 {
        return bad("gap", plan.gap, format!("(objective - bound) / objective = {gap}"));
    }
    Ok(())
}

impl CheckedPlan {
    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Layers of the model with routed experts, ascending.
    pub fn moe_layers(&self) -> &[u32] {
        &self.moe_layers
    }

    fn layer(&self, layer: u32) -> Option<usize> {
        self.index_of.get(layer as usize).copied().flatten()
    }

    /// Routed experts of a layer; 0 if it has none.
    pub fn num_experts(&self, layer: u32) -> u32 {
        self.layer(layer).map_or(0, |i| self.tier_of[i].len() as u32)
    }

    /// Routed experts that a token takes in a layer; 0 if it has none.
    pub fn experts_per_token(&self, layer: u32) -> u32 {
        self.layer(layer).and_then(|i| self.experts_per_token.get(i)).copied().unwrap_or(0)
    }

    /// Cache slots of a layer.
    pub fn slots(&self, layer: u32) -> u32 {
        self.layer(layer).map_or(0, |i| self.plan.layers[i].slots)
    }

    /// Bytes of one expert of a layer.
    pub fn expert_bytes(&self, layer: u32) -> Bytes {
        self.layer(layer).map_or(Bytes::ZERO, |i| self.plan.layers[i].expert_bytes)
    }

    /// The pools of slots: one per layer with routed experts, in order, or one for all; then the one for experts that do not stay, if
    /// the plan has one.
    pub fn pools(&self) -> Vec<Pool> {
        let mut pools = self.cache_pools();
        let (slots, streams) = (self.staging_slots(), self.streaming_slots() > 0);
        if slots > 0 {
            let users = self.plan.layers.iter().filter(|l| streams || l.slots > 0);
            pools.push(Pool { slots, slot_bytes: users.map(|l| l.expert_bytes).max().unwrap_or_default() });
        }
        pools
    }

    /// Slots in the main processor's memory through which prompts stream experts that are planned elsewhere: what the budget stages, where
    /// the plan says that prompts are streamed; else 0.
    pub fn streaming_slots(&self) -> u32 {
        let plan = &self.plan;
        let main = plan.budgets.iter().find(|b| b.memory == plan.main.memory && b.kind == MemoryKind::Vram);
        let Some(main) = main.filter(|_| plan.predicted.prefill_strategy == PREFILL_STREAMED) else { return 0 };
        let largest = plan.layers.iter().map(|l| l.expert_bytes.0).max().unwrap_or(0).max(1);
        u32::try_from(main.line(budget::STAGING).0 / largest).unwrap_or(u32::MAX)
    }

    /// Slots of the last of [`Self::pools`]: for experts that do not stay, in decoding and in prompts.
    pub fn staging_slots(&self) -> u32 {
        self.plan.engine.staging_slots.max(self.streaming_slots())
    }

    /// The pools whose contents stay.
    pub fn cache_pools(&self) -> Vec<Pool> {
        let pool = |l: &PlanLayer| Pool { slots: l.slots, slot_bytes: if l.slots > 0 { l.expert_bytes } else { Bytes::ZERO } };
        let each = self.plan.layers.iter().map(pool);
        match self.plan.engine.partition {
            CachePartition::PerLayer => each.collect(),
            CachePartition::Global => {
                let all = |a: Pool, b: Pool| Pool { slots: a.slots + b.slots, slot_bytes: a.slot_bytes.max(b.slot_bytes) };
                each.reduce(all).into_iter().collect()
            }
        }
    }

    /// The pool in which the slots of `layer` are.
    ///
    /// # Panics
    /// If the layer has no routed experts.
    pub fn pool_of(&self, layer: u32) -> u32 {
        let index = self.layer(layer).expect("a layer with routed experts") as u32;
        if self.plan.engine.partition == CachePartition::Global { 0 } else { index }
    }

    /// Distinct executors: the main one first.
    pub fn executors(&self) -> &[Executor] {
        &self.executors
    }

    /// Who computes beside the memory that a tier loads from, if anyone can.
    pub fn home_executor(&self, id: TierId) -> Option<ExecutorId> {
        let tier = self.tier(id);
        tier.through.as_ref()?;
        let beside = self.plan.tiers.iter().position(|t| t.memory == tier.memory && t.through.is_none())?;
        Some(self.executor_of_tier[beside])
    }

    /// The first tier in a memory, to know memories apart by numbers; the number of tiers for a memory without one.
    pub fn first_tier_of(&self, memory: &str) -> usize {
        self.plan.tiers.iter().position(|t| t.memory == memory).unwrap_or(self.plan.tiers.len())
    }

    /// Bytes of all slots of all layers.
    pub fn slot_bytes(&self) -> Bytes {
        self.plan.layers.iter().map(|l| Bytes(l.expert_bytes.0 * u64::from(l.slots))).sum()
    }

    /// Tier of an expert.
    ///
    /// # Panics
    /// If the model has no such expert.
    pub fn tier_of(&self, layer: u32, expert: u32) -> TierId {
        let i = self.layer(layer).expect("a layer with routed experts");
        TierId(u32::from(self.tier_of[i][expert as usize]))
    }

    /// A tier.
    ///
    /// # Panics
    /// If the id is not of this plan.
    pub fn tier(&self, id: TierId) -> &Tier {
        &self.plan.tiers[id.0 as usize]
    }

    /// Executor of a tier.
    ///
    /// # Panics
    /// If the id is not of this plan.
    pub fn executor_of(&self, id: TierId) -> ExecutorId {
        self.executor_of_tier[id.0 as usize]
    }

    /// An executor.
    ///
    /// # Panics
    /// If the id is not of this plan.
    pub fn executor(&self, id: ExecutorId) -> &Executor {
        &self.executors[id.0 as usize]
    }

    /// The main executor and those of all tiers that hold an expert: what a runtime must offer to run this plan.
    pub fn required_executors(&self) -> Vec<Executor> {
        let mut needed = vec![false; self.executors.len()];
        needed[0] = true;
        for tier in self.tier_of.iter().flatten() {
            needed[self.executor_of_tier[usize::from(*tier)].0 as usize] = true;
        }
        self.executors.iter().zip(needed).filter(|(_, n)| *n).map(|(e, _)| e.clone()).collect()
    }

    /// Positions that each sequence may reach.
    pub fn context(&self) -> u32 {
        self.plan.request.context
    }

    /// Sequences decoded together.
    pub fn batch(&self) -> u32 {
        self.plan.request.batch
    }

    /// Tokens of a prompt computed at once.
    pub fn chunk_tokens(&self) -> u32 {
        self.plan.request.chunk_tokens
    }

    /// Format of keys and values.
    pub fn kv_format(&self) -> QuantFormat {
        self.plan.request.kv_format
    }
}
