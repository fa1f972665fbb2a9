//! Prompt speed of published runs: a sketch, labelled so.
//!
//! Nine parameters whose priors were set after looking at the runs; median error 32 % and p90 124 % on machines left out
//! (tools/predict/README.md §8). Good where copies over PCIe dominate and the host is known, poor on Windows, AMD cards and small
//! cards. Every figure from here is a Prior.

use super::inputs::Inputs;
use super::rows::Run;

/// Share of the float16 rate that expert and dense products reach on the GPU.
const PHI_GPU: f64 = 0.718_213_715_734_317_3;
/// Share of the same rate that attention reaches; above 1 because it runs on tensor cores.
const PHI_ATTENTION: f64 = 1.536_444_131_991_175;
/// Share of the PCIe line rate that copies from pinned memory reach.
const ETA_PINNED: f64 = 0.776_289_635_881_255_3;
/// Tokens per expert at which a GPU product reaches half its rate.
const GPU_HALF_TOKENS: f64 = 14.923_314_902_368_02;
/// Rate of copies from memory-mapped weights over the host's read bandwidth.
const PAGEABLE_OF_READ: f64 = 0.295_661_632_135_823_6;
/// Operations of a core per cycle.
const CORE_FLOPS: f64 = 17.048_081_447_591_496;
/// The same over that, for ik_llama.cpp and kTransformers.
const IK_GAIN: f64 = 1.970_473_377_226_095;
/// Tokens per expert at which a CPU product reaches half its rate.
const CPU_HALF_TOKENS: f64 = 7.472_273_439_125_818;
/// Attention operations of a core per cycle.
const CORE_ATTENTION_FLOPS: f64 = 6.948_839_269_996_904;
/// Slow-down of CPU attention over a quantised cache (not ik_llama.cpp).
const QUANTISED_CACHE: f64 = 5.0;
/// Share of the datasheet VRAM bandwidth at which resident experts are read.
const ETA_VRAM: f64 = 0.72;

/// Whether the prompt speed of a run can be sketched at all.
pub fn applies(run: &Run) -> bool {
    let engine = matches!(run.engine.as_deref(), None | Some("llama.cpp" | "ik_llama.cpp" | "kTransformers"));
    let blas = run.flags.as_deref().is_some_and(|f| f.contains("(BLAS"));
    let paged = matches!(run.placement_class.as_deref(), Some("gpu_uvm" | "gpu_spill"));
    engine && !blas && !paged && !run.speculative && run.prompt_len.is_none_or(|n| n >= 64)
}

/// Predicted prompt tokens per second.
pub fn tokens_per_s(run: &Run, x: &Inputs) -> f64 {
    let s = &x.shape;
    let flags = run.flags.as_deref().unwrap_or_default();
    let chunk = run.ubatch.filter(|u| *u > 0).unwrap_or(512);
    let chunk = f64::from(run.prompt_len.filter(|n| *n > 1).map_or(chunk, |n| chunk.min(n)));
    let mut depth = f64::from(run.ctx_depth.unwrap_or(0));
    if matches!(run.bench.as_deref(), None | Some("llama-server" | "llama-bench")) {
        depth += f64::from(run.prompt_len.unwrap_or(0)) / 2.0;
    }
    // Per chunk; expert products per layer.
    let dense_flops = 2.0 * (s.dense_weights_per_token() - s.head_weights) * chunk;
    let expert_flops = 2.0 * s.top_k * s.expert_weights * chunk;
    let attention_flops = s.attention_flops * s.positions_read(depth + chunk / 2.0) * chunk;
    let core_hz = x.host.cores * x.host.ghz * 1e9;
    let cpu = CORE_FLOPS * if x.ik || x.ktransformers { IK_GAIN } else { 1.0 } * core_hz;
    let tokens_per_expert = chunk * s.top_k / s.experts;
    let cpu_experts = cpu * tokens_per_expert / (tokens_per_expert + CPU_HALF_TOKENS);
    let layers = f64::from(s.layers);
    let gpu_layers = layers - x.cpu_layers;
    let Some(cards) = x.cards.filter(|_| gpu_layers > 0.0) else {
        let quantised = if x.kv_quantised && !x.ik { QUANTISED_CACHE } else { 1.0 };
        let products = dense_flops / cpu + x.experts.layers * expert_flops / cpu_experts;
        return chunk / (products + attention_flops / (CORE_ATTENTION_FLOPS * core_hz) * quantised);
    };
    let gpu = PHI_GPU * cards.tflops * 1e12;
    let gpu_expert_s = expert_flops / gpu * (tokens_per_expert + GPU_HALF_TOKENS) / tokens_per_expert;
    let on_gpu = f64::from(s.moe_layers) - x.experts.layers;
    let layer_bytes = s.experts * x.expert_bytes();
    let mut seconds = dense_flops * gpu_layers / layers / gpu
        + on_gpu * gpu_expert_s
        + attention_flops / (PHI_ATTENTION * cards.tflops * 1e12)
        + on_gpu * layer_bytes / (ETA_VRAM * cards.gb_per_s * 1e9);
    if streams(x, flags, chunk) {
        let touched = 1.0 - (1.0 - s.top_k / s.experts).powf(chunk);
        let pcie = ETA_PINNED * pcie_gb_per_s(run);
        let pinned = ["pinned", "no-mmap", "no mmap"].iter().any(|f| flags.contains(f));
        let rate = if pinned { pcie } else { pcie.min(PAGEABLE_OF_READ * x.host.read_gb_per_s) };
        seconds += x.experts.layers * (layer_bytes * touched / (rate * 1e9) + gpu_expert_s);
    } else {
        seconds += x.experts.layers * expert_flops / cpu_experts;
    }
    seconds += dense_flops * x.cpu_layers / layers / cpu;
    chunk / seconds
}

/// Whether the engine copies experts of CPU layers to the GPU for a chunk of this size.
fn streams(x: &Inputs, flags: &str, chunk: f64) -> bool {
    if x.ktransformers || flags.contains("--no-op-offload") {
        return false;
    }
    if x.ik { chunk >= 32.0 * x.shape.experts / x.shape.top_k && !flags.contains("-rtr") } else { chunk >= 32.0 }
}

/// Line rate of the card's slot: as stated, or by the card's generation.
fn pcie_gb_per_s(run: &Run) -> f64 {
    let gpu = run.gpu.as_deref().unwrap_or_default();
    let has = |names: &[&str]| names.iter().any(|n| gpu.contains(n));
    let by_card = || {
        if has(&["RTX 50", "PRO 6000", "RX 90", "R9700"]) && run.ram_type.as_deref() != Some("DDR4") {
            5
        } else if has(&["GTX", "RTX 20", "P100", "Quadro"]) {
            3
        } else {
            4
        }
    };
    let full = match run.pcie_gen.unwrap_or_else(by_card) {
        0..=3 => 15.75,
        4 => 31.5,
        _ => 63.0,
    };
    full * f64::from(run.pcie_lanes.filter(|n| *n > 0).unwrap_or(16)) / 16.0
}
