//! Time per generated token of engines that put whole layers on the CPU and overlap nothing.
//!
//! A sum of parts, affine in the number of CPU layers: bytes over bandwidth, weights over arithmetic rate, overheads per layer and per
//! round trip. Twelve parameters are fitted over many machines; nothing depends on a machine but its published figures. Formulas,
//! fit and what was tried and rejected: tools/predict/README.md §5.

use super::geometry::Mixer;
use super::inputs::{Inputs, IntervalClass};
use super::tables::MemoryClass;
use serde::Serialize;

/// Number of fitted parameters.
pub const NUM_PARAMETERS: usize = 12;

/// The fitted parameters, in the order of [`PARAMETERS`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[allow(missing_docs, reason = "PARAMETERS says what each is")]
pub struct Parameters {
    pub eta_gddr: f64,
    pub eta_hbm: f64,
    pub c_layer: f64,
    pub k_mla: f64,
    pub k_lin: f64,
    pub r_core: f64,
    pub t_rt: f64,
    pub x_iq: f64,
    pub t_cpu: f64,
    pub eta_kv: f64,
    pub r_att: f64,
    pub x_kvq: f64,
}

/// What one parameter is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Parameter {
    /// Its name.
    pub name: &'static str,
    /// Centre of its prior, from outside the data; the prior's width is [`PRIOR_SIGMA`].
    pub prior: f64,
    /// Its unit.
    pub unit: &'static str,
    /// What it means.
    pub meaning: &'static str,
}

const fn parameter(name: &'static str, prior: f64, unit: &'static str, meaning: &'static str) -> Parameter {
    Parameter { name, prior, unit, meaning }
}

/// Width of every prior, in natural logarithms.
pub const PRIOR_SIGMA: f64 = 0.7;

/// What the parameters are.
pub const PARAMETERS: [Parameter; NUM_PARAMETERS] = [
    parameter("eta_gddr", 0.55, "1", "share of the datasheet VRAM bandwidth that decode reaches, GDDR cards"),
    parameter("eta_hbm", 0.55, "1", "the same, HBM cards"),
    parameter("c_layer", 170.0, "kcycle", "GPU overhead per layer of a plain MoE model, in thousand GPU clock cycles"),
    parameter("k_mla", 1.6, "1", "overhead of a latent-attention layer over a plain one"),
    parameter("k_lin", 1.5, "1", "overhead of a layer of a linear-attention hybrid over a plain one"),
    parameter("r_core", 8.0, "weight/cycle", "weights that a core multiplies per clock cycle"),
    parameter("t_rt", 85.0, "us", "round trip per CPU expert layer"),
    parameter("x_iq", 2.0, "1", "CPU cycles per weight of codebook formats over others"),
    parameter("t_cpu", 85.0, "us", "overhead per layer computed wholly on the CPU"),
    parameter("eta_kv", 0.55, "1", "share of the datasheet VRAM bandwidth reached when reading the cache"),
    parameter("r_att", 8.0, "element/cycle", "query-head elements of keys and values that a core handles per cycle"),
    parameter("x_kvq", 1.0, "1", "slow-down of CPU attention over a quantised cache (not ik_llama.cpp)"),
];

/// Second socket: share of its bandwidth that counts for large experts, and the expert size in bytes at which half of it does.
const SECOND_SOCKET: (f64, f64) = (0.8, 200e6);
/// Gain of a second socket when each has a copy of the weights.
const COPY_PER_SOCKET: f64 = 1.8;
/// Share of the float16 rate that attention over the cache reaches.
const ATTENTION_OF_TFLOPS: f64 = 0.5;
/// Share of a plain layer's kernels that belong to the routed experts: about 6 of 17 graph nodes.
const EXPERT_KERNELS: f64 = 0.35;

/// Time of one token by what it is spent on, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
#[allow(missing_docs, reason = "the words are those of the formulas")]
pub struct PartsMs {
    pub round_trips: f64,
    pub cpu_expert_bytes: f64,
    pub cpu_expert_arithmetic: f64,
    pub cpu_dense: f64,
    pub cpu_overhead: f64,
    pub cpu_attention: f64,
    pub gpu_dense: f64,
    pub gpu_experts: f64,
    pub gpu_overhead: f64,
    pub gpu_attention: f64,
}

impl PartsMs {
    /// The parts with their names.
    pub const fn named(&self) -> [(&'static str, f64); 10] {
        [
            ("round trips to the CPU", self.round_trips),
            ("bytes of experts from host memory", self.cpu_expert_bytes),
            ("arithmetic of experts on the CPU", self.cpu_expert_arithmetic),
            ("dense weights on the CPU", self.cpu_dense),
            ("overhead of layers on the CPU", self.cpu_overhead),
            ("attention on the CPU", self.cpu_attention),
            ("dense weights on the GPU", self.gpu_dense),
            ("experts on the GPU", self.gpu_experts),
            ("overhead of layers on the GPU", self.gpu_overhead),
            ("attention on the GPU", self.gpu_attention),
        ]
    }

    /// The whole token.
    pub fn total(&self) -> f64 {
        self.named().iter().map(|(_, ms)| ms).sum()
    }
}

impl Parameters {
    /// Fitted to 171 published runs on 31 machines (tier A; tools/predict/predictions.json, 2026-11).
    pub const SHIPPED: Self = Self {
        eta_gddr: 0.747_536_759_228_338_5,
        eta_hbm: 0.530_241_596_596_634_4,
        c_layer: 104.805_698_309_714_9,
        k_mla: 3.715_966_672_484_005,
        k_lin: 1.676_680_823_094_287_1,
        r_core: 12.382_053_367_857_292,
        t_rt: 64.780_698_371_000_9,
        x_iq: 8.808_502_832_492_932,
        t_cpu: 156.712_290_036_364_5,
        eta_kv: 0.545_465_846_325_691,
        r_att: 3.163_893_113_549_711_7,
        x_kvq: 3.813_666_227_345_541_5,
    };

    /// The centres of the priors.
    pub fn priors() -> Self {
        Self::from_array(PARAMETERS.map(|p| p.prior))
    }

    /// Values in the order of [`PARAMETERS`].
    pub const fn to_array(&self) -> [f64; NUM_PARAMETERS] {
        [
            self.eta_gddr,
            self.eta_hbm,
            self.c_layer,
            self.k_mla,
            self.k_lin,
            self.r_core,
            self.t_rt,
            self.x_iq,
            self.t_cpu,
            self.eta_kv,
            self.r_att,
            self.x_kvq,
        ]
    }

    /// From values in the order of [`PARAMETERS`].
    pub const fn from_array(a: [f64; NUM_PARAMETERS]) -> Self {
        let [eta_gddr, eta_hbm, c_layer, k_mla, k_lin, r_core, t_rt, x_iq, t_cpu, eta_kv, r_att, x_kvq] = a;
        Self { eta_gddr, eta_hbm, c_layer, k_mla, k_lin, r_core, t_rt, x_iq, t_cpu, eta_kv, r_att, x_kvq }
    }

    /// Time of one token.
    pub fn decode(&self, x: &Inputs) -> PartsMs {
        let s = &x.shape;
        let layers = f64::from(s.layers);
        let expert_bytes = x.expert_bytes();
        // What a second socket adds depends on how finely an expert's rows spread over both memories.
        let gain = match x.host.sockets {
            n if n <= 1.0 => 1.0,
            _ if x.ktransformers => COPY_PER_SOCKET,
            _ => 1.0 + SECOND_SOCKET.0 * expert_bytes / (expert_bytes + SECOND_SOCKET.1),
        };
        let bytes_per_ms = x.host.read_gb_per_s * gain * 1e6;
        let weights_per_ms = self.r_core * x.host.ghz * x.host.cores / x.host.sockets * gain * 1e6;
        let expert_weights_per_ms = if x.codebook { weights_per_ms / self.x_iq } else { weights_per_ms };
        let per_layer = match s.mixer {
            Mixer::Grouped => 1.0,
            Mixer::Latent => self.k_mla,
            Mixer::Linear => self.k_lin,
        };
        let positions = s.positions_read(x.depth);
        let attention_flops = s.attention_flops * positions;

        let mut parts = PartsMs {
            round_trips: if x.cpu_layers >= layers { 0.0 } else { x.experts.round_trips * self.t_rt * 1e-3 },
            cpu_expert_bytes: x.experts.layers * s.top_k * expert_bytes / bytes_per_ms,
            cpu_expert_arithmetic: x.experts.layers * s.top_k * s.expert_weights / expert_weights_per_ms,
            ..PartsMs::default()
        };
        if x.cpu_layers > 0.0 {
            let head = if x.head_on_cpu { s.head_weights } else { 0.0 };
            let weights = x.cpu_layers * s.dense_weights_per_layer + head;
            parts.cpu_dense = weights * x.dense_bits / 8.0 / bytes_per_ms + weights / weights_per_ms;
            parts.cpu_overhead = x.cpu_layers * per_layer * self.t_cpu * 1e-3;
            let elements_per_ms = self.r_att * x.host.ghz * x.host.cores * 1e6;
            let quantised = if x.kv_quantised && !x.ik { self.x_kvq } else { 1.0 };
            parts.cpu_attention = attention_flops / 2.0 * x.cpu_layers / layers / elements_per_ms * quantised;
        }
        let gpu_layers = layers - x.cpu_layers;
        if let Some(cards) = x.cards.filter(|_| gpu_layers > 0.0) {
            let eta = match cards.memory {
                MemoryClass::Hbm => self.eta_hbm,
                MemoryClass::Gddr => self.eta_gddr,
            };
            let card_bytes_per_ms = eta * cards.gb_per_s * 1e6;
            let share = gpu_layers / layers;
            let head = if x.head_on_cpu { 0.0 } else { s.head_weights };
            let weights = gpu_layers * s.dense_weights_per_layer + head;
            parts.gpu_dense = (weights * x.dense_bits / 8.0 + s.state_bytes * share) / card_bytes_per_ms;
            let expert_layers = (f64::from(s.moe_layers) - x.experts.layers).max(0.0);
            parts.gpu_experts = expert_layers * s.top_k * expert_bytes / card_bytes_per_ms;
            // Layers whose expert kernels run on the CPU instead.
            let elsewhere = (x.experts.round_trips - x.cpu_layers).max(0.0);
            parts.gpu_overhead = (gpu_layers * per_layer - EXPERT_KERNELS * elsewhere) * self.c_layer / cards.ghz * 1e-3;
            let kv_ms = x.kv_elements * x.kv_bytes * positions / (self.eta_kv * cards.gb_per_s * 1e6);
            parts.gpu_attention = share * (kv_ms + attention_flops / (ATTENTION_OF_TFLOPS * cards.tflops * 1e9));
        }
        parts
    }
}

/// A predicted speed with its 80 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Speed {
    /// Tokens per second.
    pub tps: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Speed {
    /// A time per token with the band of its class.
    pub fn new(ms: f64, band: (f64, f64)) -> Self {
        let tps = 1000.0 / ms;
        Self { tps, low: tps * band.0.exp(), high: tps * band.1.exp() }
    }
}

/// Band of ln(measured / predicted tokens/s) that holds 80 % of machines that the fit has not seen, by class: quantiles of
/// leave-one-machine-out errors at the finite-sample level 0.9 (n + 1) / n, n machines (tools/predict/README.md §7).
pub const fn shipped_band(class: IntervalClass) -> (f64, f64) {
    match class {
        IntervalClass::GpuOrHybrid => (-0.751_023_051_203_866, 0.234_518_561_833_070_3),
        IntervalClass::CpuOrNuma => (-0.601_557_719_893_77, 0.414_900_720_316_638_6),
        IntervalClass::CpuNamed => (-0.726_859_009_273_007_4, 0.077_896_532_049_874_79),
        IntervalClass::CpuUnnamed => (-0.817_490_755_032_985_7, 0.391_383_546_627_155_35),
    }
}
