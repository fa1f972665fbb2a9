//! What the session tests share: models, plans, references.
#![allow(dead_code, unused_imports, reason = "each test file uses a part")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::plan::CachePolicyKind;
use tierwise_runtime::exec::executor::CapturedRouting;
use tierwise_runtime::import::ModelSource;
use tierwise_runtime::session::{Model, Session, SessionConfig};

mod devices;
mod gpu_plans;
mod plans;
pub use devices::{Faults, LateDevice};
pub use gpu_plans::{GpuOptions, VRAM_BYTES, Where, gpu_machine, gpu_plan};
pub use plans::{EngineOptions, PlanOptions, disk_plan, engine_plan, machine, ram_plan, request};

/// The families with goldens.
pub const FAMILIES: [&str; 4] = ["qwen3moe", "olmoe", "mixtral", "qwen2moe"];

pub fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family)
}

/// The trained tiny model's folder; prints why the test is skipped when it is not there.
pub fn tiny() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/models/tiny");
    if folder.join("config.json").is_file() {
        return Some(folder);
    }
    println!("skipped: {} is not there (the trained tiny model is not part of the repository)", folder.display());
    None
}

pub fn open(path: &Path) -> Arc<Model> {
    let source = ModelSource::open(path.to_str().expect("UTF-8"), None).unwrap_or_else(|e| panic!("{e}"));
    Arc::new(Model::new(source).unwrap_or_else(|e| panic!("{e}")))
}

/// A session with everything in memory, capturing its routing.
pub fn session(model: &Arc<Model>, options: PlanOptions) -> Session {
    let config = SessionConfig { capture_routing: true, ..SessionConfig::new(options.threads) };
    Session::open(Arc::clone(model), &ram_plan(model.spec(), options), config).unwrap_or_else(|e| panic!("{e}"))
}

/// Little-endian floats of a file.
pub fn floats(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

pub fn json(path: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().expect("an array").iter().map(|v| v.as_u64().expect("an id") as u32).collect()
}

/// Reference routing as `[layer][token]` to experts, heaviest first.
pub fn reference_experts(layers: &serde_json::Value) -> Vec<Vec<Vec<u32>>> {
    let of_layer = |l: &serde_json::Value| l["experts"].as_array().expect("an array").iter().map(ids).collect();
    layers.as_array().expect("an array").iter().map(of_layer).collect()
}

/// Captured routing in the same shape.
pub fn captured_experts(captured: &[CapturedRouting], num_layers: usize) -> Vec<Vec<Vec<u32>>> {
    let mut layers = vec![Vec::new(); num_layers];
    for c in captured {
        layers[c.layer as usize].extend(c.routing.experts.chunks(c.routing.experts_per_token).map(<[u32]>::to_vec));
    }
    layers
}

pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
}

pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(p, q)| f64::from(*p) * f64::from(*q)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

pub fn argmax(x: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in x.iter().enumerate() {
        if *v > x[best] {
            best = i;
        }
    }
    best as u32
}

/// Greedy continuation of `prompt` by `count` tokens.
pub fn greedy(session: &mut Session, prompt: &[u32], count: usize) -> Vec<u32> {
    session.reset();
    let mut token = argmax(session.prefill(prompt).unwrap_or_else(|e| panic!("{e}")));
    let mut tokens = vec![token];
    while tokens.len() < count {
        token = argmax(session.decode(token).unwrap_or_else(|e| panic!("{e}")));
        tokens.push(token);
    }
    tokens
}

/// Every policy of cache slots.
pub const POLICIES: [CachePolicyKind; 6] = [
    CachePolicyKind::Lru,
    CachePolicyKind::Mrs { alpha_percent: 50, top_p: 0 },
    CachePolicyKind::Lfu { halve_every: 8 },
    CachePolicyKind::Slru { protected_percent: 50 },
    CachePolicyKind::S3Fifo { small_percent: 10 },
    CachePolicyKind::Adaptive,
];

/// Exact keys and values, for tight comparisons.
pub const F32_KV: PlanOptions = PlanOptions { context: 1024, chunk: 512, kv: QuantFormat::F32, threads: 2, batch: 1 };
/// What users run.
pub const F16_KV: PlanOptions = PlanOptions { context: 1024, chunk: 512, kv: QuantFormat::F16, threads: 2, batch: 1 };

/// OLMoE made small: 4 layers of 64 experts of 0.9 MB, 230 MB in all.
pub fn small_olmoe() -> tierwise_cost::model::Geometry {
    let mut g = ModelSource::open("olmoe-1b-7b", None).expect("built in").geometry().clone().truncated(4);
    (g.hidden_size, g.vocab_size, g.context_length) = (512, 2000, 256);
    for layer in &mut g.layers {
        if let tierwise_cost::model::Attention::Gqa(a) = &mut layer.attention {
            (a.num_heads, a.num_kv_heads, a.head_dim) = (8, 8, 64);
            a.rope.as_mut().expect("rotated").rotary_dim = 64;
        }
        if let tierwise_cost::model::Ffn::Moe(m) = &mut layer.ffn {
            m.inner_size = 1024;
        }
    }
    g
}
