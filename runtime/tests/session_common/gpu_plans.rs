//! Plans for a machine with a GPU: experts on it, beside the CPU, or copied into slots on the GPU.

use super::plans::{PlanOptions, machine, request};
use std::sync::Arc;
use tierwise_cost::cost::Roofline;
use tierwise_cost::machine::{Machine, MemoryKind};
use tierwise_cost::model::ModelSpec;
use tierwise_cost::units::Bytes;
use tierwise_planner::budget;
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::evaluate::{LayerPlacement, Placement};
use tierwise_planner::plan::{CachePolicyKind, EngineSettings, PREFILL_STREAMED, Tier};
use tierwise_planner::{CheckedPlan, Limits, Problem, Request, plan_from_placement};

/// Memory of the test machine's GPU.
pub const VRAM_BYTES: u64 = 2 << 30;

/// Where an expert is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// On the GPU, always.
    Gpu,
    /// In host memory, computed by the CPU.
    Cpu,
    /// In host memory, copied into a slot on the GPU before use, or computed by the CPU if the engine thinks so.
    Slots,
}

/// The test machine with a GPU whose link is fast enough for guesses to come in time in tiny models.
pub fn gpu_machine() -> Machine {
    let text = r#"
        name = "test"
        [[memory]]
        id = "vram0"
        kind = "vram"
        capacity = { value = "2 GiB", source = "prior" }
        read_bandwidth = { value = "500 GB/s", source = "prior" }
        latency = { value = "500 ns", source = "prior" }
        [[memory]]
        id = "dram0"
        kind = "dram"
        capacity = { value = "64 GiB", source = "prior" }
        read_bandwidth = { value = "50 GB/s", source = "prior" }
        latency = { value = "100 ns", source = "prior" }
        [[processor]]
        id = "gpu0"
        kind = "gpu"
        name = "test"
        cores = 10
        threads = 10
        computes_from = ["vram0"]
        f32_flops = { value = "1 TFLOP/s", source = "prior" }
        launch_latency = { value = "5 us", source = "prior" }
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
        from = "dram0"
        to = "vram0"
        bandwidth = { value = "3 TB/s", source = "prior" }
        latency = { value = "10 ns", source = "prior" }
    "#;
    Machine::from_toml(text).unwrap_or_else(|e| panic!("{e}: {:?}", machine().name))
}

/// How a plan for [`gpu_plan`] works.
#[derive(Debug, Clone, Copy)]
pub struct GpuOptions {
    /// Slots of each layer, at most.
    pub slots: u32,
    pub policy: CachePolicyKind,
    pub settings: EngineSettings,
    /// The GPU has not the memory for all experts, and prompts are streamed.
    pub streamed: bool,
}

impl GpuOptions {
    pub fn slots(slots: u32) -> Self {
        Self { slots, policy: CachePolicyKind::Lru, settings: EngineSettings::default(), streamed: false }
    }
}

/// A plan with experts where `place(layer, expert)` says, and the times of its machine.
pub fn gpu_plan(
    spec: &ModelSpec,
    options: PlanOptions,
    engine: GpuOptions,
    place: impl Fn(u32, u32) -> Where,
) -> (CheckedPlan, Arc<EngineCosts>) {
    let machine = gpu_machine();
    let mut problem = Problem::new(spec, &machine, request(spec, options)).expect("it fits");
    let mut vram = problem.expert_bytes() + problem.fixed[0].iter().map(|(_, b)| *b).sum();
    while engine.streamed && problem.fixed[0].iter().all(|(name, _)| *name != budget::STAGING) {
        let limits = Limits { vram: Some(vram), ..Limits::default() };
        problem = Problem::new(spec, &machine, Request { limits, ..request(spec, options) }).expect("it fits");
        vram = Bytes(vram.0 - problem.expert_bytes().0 / 16);
    }
    let find = |f: &dyn Fn(&Tier) -> bool| problem.tiers.iter().position(f).expect("the machine has all three") as u8;
    let gpu = find(&|t| t.kind == MemoryKind::Vram);
    let cpu = find(&|t| t.kind == MemoryKind::Dram && t.through.is_none());
    let slots = find(&|t| t.kind == MemoryKind::Dram && t.through.as_deref() == Some("vram0"));
    let layers = spec.moe_layers().map(|(layer, moe)| {
        let tier = |e| match place(layer, e) {
            Where::Gpu => gpu,
            Where::Cpu => cpu,
            Where::Slots => slots,
        };
        let tier_of: Vec<u8> = (0..moe.num_experts).map(tier).collect();
        let loaded = tier_of.iter().filter(|t| **t == slots).count() as u32;
        LayerPlacement { tier_of, slots: engine.slots.min(loaded) }
    });
    let placement = Placement { layers: layers.collect() };
    let mut plan = plan_from_placement(&problem, &Roofline::default(), placement).expect("feasible");
    plan.engine = engine.settings;
    if engine.streamed {
        plan.predicted.prefill_strategy = PREFILL_STREAMED.into();
    }
    plan.layers.iter_mut().for_each(|l| l.policy = engine.policy);
    let plan = plan.check(spec, Some(&machine)).unwrap_or_else(|e| panic!("{e}"));
    let costs = EngineCosts::new(&plan, spec, &machine, &Roofline::default()).expect("the plan's machine");
    (plan, Arc::new(costs))
}
