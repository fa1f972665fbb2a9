//! Does a published run's placement fit its memories: VRAM of all cards, and the host's page cache.
//!
//! VRAM holds dense weights, resident experts, the cache, compute buffers and the driver's own; drivers page silently when it is
//! over-committed (`vram_spill`) or refuse (`oom`). Reported use differs from this accounting by 0.5 GiB in the median, so a free
//! space below [`AT_RISK_GIB`] is called a risk, not a fit. Formulas and figures: tools/predict/README.md §8.

use super::geometry::{Mixer, Shape};
use super::inputs::bits;
use super::placement::{self, CpuExperts};
use super::rows::Run;
use super::tables::kv_bytes;
use serde::Serialize;

const GIB: f64 = 1_073_741_824.0;
/// Below this much free VRAM a placement may fail: 14 of 15 published failures are below it.
pub const AT_RISK_GIB: f64 = 1.3;

/// Whether a placement fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// With room to spare.
    Fits,
    /// It depends on build, desktop and driver.
    AtRisk,
    /// It needs more than there is.
    DoesNotFit,
}

/// VRAM needed, in GiB.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the words say it")]
pub struct VramNeed {
    pub dense: f64,
    pub experts: f64,
    pub kv: f64,
    pub compute: f64,
    pub driver: f64,
}

impl VramNeed {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.dense + self.experts + self.kv + self.compute + self.driver
    }

    /// Does it fit `capacity` GiB?
    pub fn verdict(&self, capacity: f64) -> Verdict {
        match capacity - self.total() {
            free if free >= AT_RISK_GIB => Verdict::Fits,
            free if free >= 0.0 => Verdict::AtRisk,
            _ => Verdict::DoesNotFit,
        }
    }
}

/// Compute buffers of one card in bytes: logits and a few activations of a micro-batch, in float32.
pub fn compute_bytes(shape: &Shape, micro_batch: f64) -> f64 {
    micro_batch * (shape.vocab + 8.0 * shape.hidden) * 4.0
}

/// The driver's own share of a card, GiB.
pub fn driver_gib(windows: bool) -> f64 {
    if windows { 0.8 } else { 0.3 }
}

/// Cached elements of `context` positions over all layers: windows keep one micro-batch more.
pub fn kv_elements(shape: &Shape, context: f64, micro_batch: f64) -> f64 {
    (shape.full_layers * context + shape.window_layers * context.min(shape.window + micro_batch)) * shape.kv_elements
}

/// VRAM that a run needs, or `None` when the description does not say enough.
pub fn vram_need(run: &Run, shape: &Shape) -> Option<VramNeed> {
    run.vram_gb.filter(|_| run.gpu_count > 0)?;
    let (expert_bits, dense_bits, _) = bits(run, Some(shape))?;
    let spilled = placement::class(run, shape) == "gpu_spill";
    let on_cpu = placement::cpu_experts(run, shape, Some(expert_bits))
        .or(spilled.then_some(CpuExperts { layers: 0.0, round_trips: 0.0 }))?
        .layers;
    let (layers, moe_layers) = (f64::from(shape.layers), f64::from(shape.moe_layers));
    let on_gpu = run.ngl.map_or(layers, |n| f64::from(n).min(layers));
    let head = if run.ngl.is_none_or(|n| n > shape.layers) { shape.head_weights } else { 0.0 };
    let mut dense = (on_gpu * shape.dense_weights_per_layer + head) * dense_bits / 8.0;
    let expert_layers = if on_gpu == layers {
        moe_layers - on_cpu
    } else {
        // Layers wholly on the CPU have their experts there already.
        let beyond = if on_cpu > layers - on_gpu { on_cpu.min(moe_layers) - (layers - on_gpu) } else { 0.0 };
        on_gpu * moe_layers / layers - beyond
    };
    let mut experts = expert_layers.max(0.0) * shape.experts * shape.expert_weights * expert_bits / 8.0;
    let dynamic = run.quant.as_deref().is_some_and(|q| q.contains("UD-"));
    if dynamic && shape.mixer == Mixer::Linear {
        // These files keep everything but the experts at 8 to 16 bits.
        const REST_BITS: f64 = 10.0;
        dense *= REST_BITS / dense_bits;
        if let Some(gib) = run.file_gib {
            experts *= (gib * GIB * 8.0 - shape.other_weights() * REST_BITS) / shape.routed_weights() / expert_bits;
        }
    }
    let micro_batch = f64::from(run.ubatch.filter(|u| *u > 0).unwrap_or(512));
    let context = context(run);
    let kv = kv_elements(shape, context, micro_batch) * kv_bytes(run.kv_type.as_deref()) * on_gpu / layers + shape.state_bytes;
    let mut compute = compute_bytes(shape, micro_batch);
    if shape.mixer == Mixer::Latent && run.engine.as_deref() == Some("ik_llama.cpp") && context > 4096.0 {
        // This engine expands the latent cache for 128 heads of 192 + 128.
        compute = compute.max(context * 128.0 * 320.0 * 2.0 + 512.0 * 1_048_576.0);
    }
    let cards = f64::from(run.gpu_count.max(1));
    Some(VramNeed {
        dense: dense / GIB,
        experts: experts / GIB,
        kv: kv / GIB,
        compute: compute * cards / GIB,
        driver: driver_gib(is_windows(run)) * cards,
    })
}

fn is_windows(run: &Run) -> bool {
    run.os.as_deref().is_some_and(|os| os.starts_with("Windows"))
}

/// Positions that the cache is allocated for.
fn context(run: &Run) -> f64 {
    let or_zero = |n: Option<u32>| f64::from(n.unwrap_or(0));
    match run.ctx_size.filter(|c| *c > 0) {
        Some(size) => f64::from(size),
        None if run.bench.as_deref() == Some("llama-server") => 32768.0,
        None => (or_zero(run.ctx_depth) + or_zero(run.prompt_len) + or_zero(run.gen_len)).max(512.0),
    }
}

/// What the host must hold, in GiB; weights are memory-mapped and must stay in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HostNeed {
    /// Needed.
    pub need_gib: f64,
    /// Installed.
    pub ram_gib: f64,
    /// Weights will be read from disk while decoding.
    pub swap_bound: bool,
}

/// What the host of a run must hold, or `None` when the description does not say enough.
pub fn host_need(run: &Run, shape: Option<&Shape>) -> Option<HostNeed> {
    let ram_gib = run.ram_gb?;
    let known = shape.and_then(|s| bits(run, Some(s)).map(|b| (s, b)));
    let need_gib = match known {
        None => run.file_gib? - run.vram_gb.unwrap_or(0.0),
        Some((s, (expert_bits, dense_bits, _))) => {
            let layers = placement::cpu_experts(run, s, Some(expert_bits))?.layers;
            let experts = layers * s.experts * s.expert_weights * expert_bits;
            let dense = if placement::class(run, s) == "cpu_only" { s.dense_weights_per_token() } else { 0.0 };
            (experts + (s.embedding_weights + dense) * dense_bits) / 8.0 / GIB
        }
    };
    // The system and the engine's own memory.
    let kept = if is_windows(run) { 6.0 } else { 4.0 };
    Some(HostNeed { need_gib, ram_gib, swap_bound: need_gib > ram_gib - kept })
}
