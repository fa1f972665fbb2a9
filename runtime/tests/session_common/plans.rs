//! Plans for the session tests: everything in memory, or chosen experts on disk with a given number of slots.

use tierwise_cost::cost::Roofline;
use tierwise_cost::machine::{Machine, MemoryKind};
use tierwise_cost::model::ModelSpec;
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::Bytes;
use tierwise_planner::budget;
use tierwise_planner::evaluate::{LayerPlacement, Placement};
use tierwise_planner::{CheckedPlan, Problem, Request, SolverKind, make_plan, plan_from_placement};

/// What a test session needs.
#[derive(Clone, Copy)]
pub struct PlanOptions {
    pub context: u32,
    pub chunk: u32,
    pub kv: QuantFormat,
    pub threads: usize,
}

/// A machine with memory and disk for every test model.
fn machine() -> Machine {
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

fn request(spec: &ModelSpec, options: PlanOptions) -> Request {
    let context = options.context.min(spec.context_length);
    Request { context, chunk_tokens: options.chunk, prompt_tokens: context / 2, kv_format: options.kv, ..Request::default() }
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
