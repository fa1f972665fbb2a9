//! Plans for the session tests: everything in memory, or chosen experts on disk with a given number of slots.

use std::sync::Arc;
use tierwise_cost::cost::Roofline;
use tierwise_cost::machine::{Machine, MemoryKind};
use tierwise_cost::model::ModelSpec;
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::Bytes;
use tierwise_planner::budget;
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::evaluate::{LayerPlacement, Placement};
use tierwise_planner::plan::{CachePartition, CachePolicyKind, EngineSettings};
use tierwise_planner::{CheckedPlan, Problem, Request, SolverKind, make_plan, plan_from_placement};

/// What a test session needs.
#[derive(Clone, Copy)]
pub struct PlanOptions {
    pub context: u32,
    pub chunk: u32,
    pub kv: QuantFormat,
    pub threads: usize,
    /// Sequences that the plan has room for.
    pub batch: u32,
}

/// A machine with memory and disk for every test model.
pub fn machine() -> Machine {
    let text = r#"
        name = "test"
        [[memory]]
        id = "dram0"
        kind = "dram"
        capacity = { value = "64 GiB", source = "prior" }
        read_bandwidth = { value = "50 GB/s", source = "prior" }
        latency = { value = "100 ns", source = "prior" }
        [[memory]]
        id = "disk0"
        kind = "disk"
        capacity = { value = "1 TB", source = "prior" }
        read_bandwidth = { value = "3 GB/s", source = "prior" }
        latency = { value = "80 us", source = "prior" }
        [[processor]]
        id = "cpu0"
        kind = "cpu"
        name = "test"
        cores = 2
        threads = 2
        computes_from = ["dram0"]
        f32_flops = { value = "100 GFLOP/s", source = "prior" }
        launch_latency = { value = "5 us", source = "prior" }
        [[link]]
        from = "disk0"
        to = "dram0"
        bandwidth = { value = "3 GB/s", source = "prior" }
        latency = { value = "80 us", source = "prior" }
    "#;
    Machine::from_toml(text).expect("a valid machine")
}

pub fn request(spec: &ModelSpec, options: PlanOptions) -> Request {
    let context = options.context.min(spec.context_length);
    let (chunk_tokens, prompt_tokens, kv_format) = (options.chunk, context / 2, options.kv);
    Request { context, chunk_tokens, prompt_tokens, kv_format, batch: options.batch, ..Request::default() }
}

/// Everything in memory.
pub fn ram_plan(spec: &ModelSpec, options: PlanOptions) -> CheckedPlan {
    let machine = machine();
    let problem = Problem::new(spec, &machine, request(spec, options)).expect("it fits");
    let plan = make_plan(&problem, &Roofline::default(), SolverKind::Greedy).expect("planned");
    assert!(plan.layers.iter().all(|l| l.slots == 0), "the machine has room for all");
    plan.check(spec, Some(&machine)).expect("a plan of ours")
}

/// Experts for which `on_disk(layer, expert)` holds are loaded into `slots` slots per layer (one to all but one of them).
pub fn disk_plan(spec: &ModelSpec, options: PlanOptions, slots: u32, on_disk: impl Fn(u32, u32) -> bool) -> CheckedPlan {
    let machine = machine();
    let mut request = request(spec, options);
    // A byte too little for all experts: with room for all, the planner does not consider the disk.
    let rest = [budget::non_expert_weights(spec), budget::kv(spec, &request), budget::activations(spec, &request)];
    let room = rest.into_iter().sum::<Bytes>() + spec.expert_bytes();
    request.limits.ram = Some(room.saturating_sub(Bytes(1)));
    let problem = Problem::new(spec, &machine, request).expect("it fits with the disk");
    let tier = |kind| problem.tiers.iter().position(|t| t.kind == kind).expect("the machine has both") as u8;
    let (dram, disk) = (tier(MemoryKind::Dram), tier(MemoryKind::Disk));
    let layers = spec
        .moe_layers()
        .map(|(layer, moe)| {
            let tier_of: Vec<u8> = (0..moe.num_experts).map(|e| if on_disk(layer, e) { disk } else { dram }).collect();
            let loaded = tier_of.iter().filter(|t| **t == disk).count() as u32;
            LayerPlacement { tier_of, slots: slots.min(loaded - 1).max(1) }
        })
        .collect();
    let plan = plan_from_placement(&problem, &Roofline::default(), Placement { layers }).expect("feasible");
    plan.check(spec, Some(&machine)).expect("a plan of ours")
}

/// Two processors, each with its own memory, of which the second is too far for the first to compute from: experts there are moved to
/// the first, or computed by the second. `speed` multiplies the rate of copies, and divides their latency.
fn two_sockets(speed: f64) -> Machine {
    let mut machine = machine();
    let (mut memory, mut cpu, mut link) = (machine.memories[0].clone(), machine.processors[0].clone(), machine.links[0].clone());
    (memory.id, cpu.id) = ("dram1".into(), "cpu1".into());
    cpu.computes_from = vec!["dram1".into()];
    (link.from, link.to) = ("dram1".into(), "dram0".into());
    link.bandwidth.value.0 *= speed;
    link.latency.value.0 /= speed;
    machine.memories.insert(1, memory);
    machine.processors.push(cpu);
    machine.links.push(link);
    machine
}

/// The test machine with a disk that is `speed` times as fast, for engines whose guesses come in time in tiny models.
fn fast_disk(speed: f64) -> Machine {
    let mut machine = machine();
    machine.links[0].bandwidth.value.0 *= speed;
    machine.links[0].latency.value.0 /= speed;
    machine
}

/// How a plan for [`engine_plan`] works.
#[derive(Debug, Clone, Copy)]
pub struct EngineOptions {
    /// Slots of each layer, at most.
    pub slots: u32,
    pub policy: CachePolicyKind,
    pub settings: EngineSettings,
    /// Absent experts are beside another processor, not on disk.
    pub sockets: bool,
    /// Experts in slots before the first demand, at most.
    pub preload: u32,
}

/// A plan with these settings, and the times of its machine. Experts for which `away(layer, expert)` holds are loaded before use.
pub fn engine_plan(
    spec: &ModelSpec,
    options: PlanOptions,
    engine: EngineOptions,
    away: impl Fn(u32, u32) -> bool,
) -> (CheckedPlan, Arc<EngineCosts>) {
    let machine = if engine.sockets { two_sockets(1e3) } else { fast_disk(1e3) };
    let mut request = request(spec, options);
    let rest = [budget::non_expert_weights(spec), budget::kv(spec, &request), budget::activations(spec, &request)];
    let room = rest.into_iter().sum::<Bytes>() + spec.expert_bytes();
    if !engine.sockets {
        // With room for all the planner leaves the disk out.
        request.limits.ram = Some(room.saturating_sub(Bytes(1)));
    }
    let problem = Problem::new(spec, &machine, request).expect("it fits");
    let through = |t: &tierwise_planner::plan::Tier| t.through.as_deref() == Some("dram0");
    let far = problem.tiers.iter().position(through).expect("experts can be loaded") as u8;
    let near = problem.tiers.iter().position(|t| t.memory == "dram0" && t.through.is_none()).expect("the main memory") as u8;
    let layers = spec.moe_layers().map(|(layer, moe)| {
        let tier_of: Vec<u8> = (0..moe.num_experts).map(|e| if away(layer, e) { far } else { near }).collect();
        let loaded = tier_of.iter().filter(|t| **t == far).count() as u32;
        LayerPlacement { tier_of, slots: engine.slots.min(loaded.max(2) - 1).max(1) }
    });
    let placement = Placement { layers: layers.collect() };
    let mut plan = plan_from_placement(&problem, &Roofline::default(), placement).expect("feasible");
    plan.engine = engine.settings;
    let free: u64 = plan.budgets.iter().filter(|b| b.memory == "dram0").map(|b| b.line(budget::FREE).0).sum();
    let largest = plan.layers.iter().map(|l| l.expert_bytes.0).max().unwrap_or(1);
    plan.engine.staging_slots = plan.engine.staging_slots.min((free / largest) as u32);
    let alike = plan.layers.iter().all(|l| (l.expert_bytes, l.slots > 0) == (plan.layers[0].expert_bytes, true));
    if !alike {
        plan.engine.partition = CachePartition::PerLayer;
    }
    for layer in &mut plan.layers {
        layer.policy = engine.policy;
        let experts = (0..spec.moe_layers().map(|(_, m)| m.num_experts).max().unwrap_or(0)).filter(|e| away(layer.layer, *e));
        layer.preload = experts.take(engine.preload.min(layer.slots) as usize).collect();
    }
    let plan = plan.check(spec, Some(&machine)).expect("a plan of ours");
    let costs = EngineCosts::new(&plan, spec, &machine, &Roofline::default()).expect("the plan's machine");
    (plan, Arc::new(costs))
}
