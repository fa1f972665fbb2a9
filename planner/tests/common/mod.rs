//! Models, machines and plans for the planner's tests.
#![allow(dead_code, reason = "every test file uses its own part")]

pub mod answers;

use tierwise_cost::cost::Roofline;
use tierwise_cost::machine::Machine;
use tierwise_cost::model::{Geometry, ModelSpec};
use tierwise_cost::recipe::Recipe;
use tierwise_cost::units::Bytes;
use tierwise_planner::evaluate::{LayerPlacement, Placement};
use tierwise_planner::{CheckedPlan, Limits, Problem, Request, plan_from_placement};

/// A file of the repository's configs.
pub fn config(path: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A machine of configs/machines.
pub fn machine(name: &str) -> Machine {
    Machine::from_toml(&config(&format!("machines/{name}.toml"))).unwrap()
}

/// A model with `layers` equal MoE layers.
#[allow(clippy::too_many_arguments, reason = "the sizes of a model")]
pub fn model(
    name: &str,
    layers: u32,
    experts: u32,
    k: u32,
    hidden: u32,
    inner: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    vocab: u32,
    recipe: &str,
) -> ModelSpec {
    let text = format!(
        r#"
        name = "{name}"
        architecture = "qwen3moe"
        hidden_size = {hidden}
        vocab_size = {vocab}
        context_length = 40960
        source = "test"
        [[block]]
        repeat = {layers}
        [block.attention]
        kind = "gqa"
        num_heads = {heads}
        num_kv_heads = {kv_heads}
        head_dim = {head_dim}
        qk_norm = "per_head"
        rope = {{ theta = 1e6, rotary_dim = {head_dim} }}
        [block.ffn]
        kind = "moe"
        num_experts = {experts}
        experts_per_token = {k}
        inner_size = {inner}
        router = {{ score = "softmax", normalize_topk = true }}
    "#
    );
    ModelSpec::with_recipe(Geometry::from_toml(&text).unwrap(), &Recipe::by_name(recipe).unwrap()).unwrap()
}

/// Qwen3-30B-A3B.
pub fn qwen3_30b(recipe: &str) -> ModelSpec {
    model("Qwen3-30B-A3B", 48, 128, 8, 2048, 768, 32, 4, 128, 151_936, recipe)
}

/// A model of a few hundred kilobytes.
pub fn tiny(layers: u32, experts: u32, k: u32) -> ModelSpec {
    model("tiny", layers, experts, k, 64, 64, 2, 1, 32, 256, "F32")
}

/// A machine with these sizes in bytes; no GPU with 0 of VRAM, no disk with 0 of disk.
pub fn small_machine(vram: u64, dram: u64, disk: u64) -> Machine {
    let memory = |id: &str, kind: &str, bytes: u64, rate: &str, latency: &str| {
        format!(
            "[[memory]]\nid = \"{id}\"\nkind = \"{kind}\"\ncapacity = {{ value = \"{bytes} B\", source = \"prior\" }}\n\
             read_bandwidth = {{ value = \"{rate}\", source = \"prior\" }}\nlatency = {{ value = \"{latency}\", source = \"prior\" }}\n"
        )
    };
    let processor = |id: &str, kind: &str, home: &str, rate: &str| {
        format!(
            "[[processor]]\nid = \"{id}\"\nkind = \"{kind}\"\nname = \"{kind}\"\ncores = 4\nthreads = 4\ncomputes_from = [\"{home}\"]\n\
             f32_flops = {{ value = \"{rate}\", source = \"prior\" }}\nlaunch_latency = {{ value = \"2 us\", source = \"prior\" }}\n"
        )
    };
    let link = |from: &str, to: &str, rate: &str, latency: &str| {
        format!(
            "[[link]]\nfrom = \"{from}\"\nto = \"{to}\"\nbandwidth = {{ value = \"{rate}\", source = \"prior\" }}\n\
             latency = {{ value = \"{latency}\", source = \"prior\" }}\n"
        )
    };
    let mut text = "name = \"small\"\n".to_string();
    text += &memory("dram0", "dram", dram, "50 GB/s", "81 ns");
    text += &processor("cpu0", "cpu", "dram0", "500 GFLOP/s");
    if vram > 0 {
        text += &memory("vram0", "vram", vram, "900 GB/s", "500 ns");
        text += &processor("gpu0", "gpu", "vram0", "30 TFLOP/s");
        text += &link("dram0", "vram0", "25 GB/s", "10 us");
    }
    if disk > 0 {
        text += &memory("disk0", "disk", disk, "5 GB/s", "80 us");
        text += &link("disk0", "dram0", "5 GB/s", "80 us");
    }
    Machine::from_toml(&text).unwrap()
}

/// A plan on a machine without GPU, `resident + slots` below the number of experts: in every layer the first `resident` experts in DRAM, the others on disk with `slots` slots.
pub fn cached_plan(spec: &ModelSpec, resident: u32, slots: u32) -> CheckedPlan {
    let machine = small_machine(0, 64 << 30, 1 << 40);
    let request = Request { context: 512, prompt_tokens: 128, ..Request::default() };
    // Just the room that this takes, for otherwise nothing would be read from disk.
    let all = Problem::new(spec, &machine, request.clone()).unwrap();
    let fixed: u64 = all.fixed[0].iter().filter(|(name, _)| *name != "reserve").map(|(_, b)| b.0).sum();
    let experts: u64 = all.layers.iter().map(|l| l.expert_bytes.0 * u64::from(resident + slots)).sum();
    let limits = Limits { ram: Some(Bytes(fixed + experts)), ..Limits::default() };
    let problem = Problem::new(spec, &machine, Request { limits, ..request }).unwrap();
    let direct = problem.tiers.iter().position(|t| t.through.is_none()).unwrap() as u8;
    let cached = problem.tiers.iter().position(|t| t.through.is_some()).unwrap() as u8;
    let layers = problem
        .layers
        .iter()
        .map(|l| LayerPlacement {
            tier_of: (0..l.num_experts).map(|e| if e < resident { direct } else { cached }).collect(),
            slots,
        })
        .collect();
    let plan = plan_from_placement(&problem, &Roofline::default(), Placement { layers }).unwrap();
    plan.check(spec, Some(&machine)).unwrap()
}
