//! Time of one MoE layer's grouped expert FFN on data-centre GPUs, from measured kernels.
//!
//! launch + ((bytes / (share of bandwidth))^s + (operations / (share of rate))^s)^(1/s): weights of the distinct experts and every
//! token's activations read once, against two operations per weight and token; s makes the corner of the roofline round. Four
//! parameters per GPU and weight format, fitted to 21 755 latencies of vLLM's and SGLang's kernels (aiconfigurator, Apache-2.0);
//! method, errors and what did not earn its place: tools/gpu-moe/README.md.

use super::work::expected_distinct;
use super::{Estimate, EstimateSource};

/// Fitted to one kernel; the interval is what it misses on shapes it was not fitted to, at the 10th and 90th percentile.
struct Fit {
    gpu: &'static str,
    format: &'static str,
    /// Scales included.
    bytes_per_weight: f64,
    /// Bytes per second, datasheet.
    bandwidth: f64,
    /// Operations per second in the kernel's arithmetic, datasheet.
    flops: f64,
    launch_s: f64,
    memory_share: f64,
    arithmetic_share: f64,
    sharpness: f64,
    low: f64,
    high: f64,
    // Smallest and largest that were measured.
    hidden: (u32, u32),
    inner: (u32, u32),
    top_k: (u32, u32),
    num_experts: (u32, u32),
}

/// Tokens per call that were measured, for every kernel.
const TOKENS: (u32, u32) = (1, 16_384);

/// The `used` groups of tools/gpu-moe/fitted.json.
#[rustfmt::skip]
const FITS: &[Fit] = &[
    Fit { gpu: "B200", format: "nvfp4", bytes_per_weight: 0.5625, bandwidth: 7700e9, flops: 9000e12, launch_s: 17.36e-6, memory_share: 0.8749, arithmetic_share: 0.6043, sharpness: 0.8857, low: 0.8811, high: 1.2252, hidden: (2048, 7168), inner: (512, 16384), top_k: (1, 10), num_experts: (8, 512) },
    Fit { gpu: "B200", format: "int4_wo", bytes_per_weight: 0.5625, bandwidth: 7700e9, flops: 2250e12, launch_s: 36.61e-6, memory_share: 0.5464, arithmetic_share: 0.1269, sharpness: 0.9361, low: 0.8217, high: 1.1413, hidden: (7168, 7168), inner: (2048, 2048), top_k: (8, 8), num_experts: (384, 384) },
    Fit { gpu: "B200", format: "fp8_block", bytes_per_weight: 1.000244140625, bandwidth: 7700e9, flops: 4500e12, launch_s: 31.38e-6, memory_share: 0.9199, arithmetic_share: 0.2383, sharpness: 0.8604, low: 0.8555, high: 1.2374, hidden: (2048, 7168), inner: (512, 16384), top_k: (2, 10), num_experts: (8, 512) },
    Fit { gpu: "B200", format: "w4a16_mxfp4", bytes_per_weight: 0.53125, bandwidth: 7700e9, flops: 2250e12, launch_s: 20.01e-6, memory_share: 0.5414, arithmetic_share: 0.285, sharpness: 0.9838, low: 0.7812, high: 1.1951, hidden: (2880, 2880), inner: (2880, 2880), top_k: (4, 4), num_experts: (32, 128) },
    Fit { gpu: "B200", format: "fp8", bytes_per_weight: 1.0, bandwidth: 7700e9, flops: 4500e12, launch_s: 16.4e-6, memory_share: 0.8194, arithmetic_share: 0.3604, sharpness: 1.831, low: 0.8721, high: 1.3919, hidden: (2048, 6144), inner: (512, 16384), top_k: (1, 22), num_experts: (8, 512) },
    Fit { gpu: "B200", format: "w4a8_mxfp4_mxfp8", bytes_per_weight: 0.53125, bandwidth: 7700e9, flops: 4500e12, launch_s: 23.69e-6, memory_share: 0.8415, arithmetic_share: 0.9374, sharpness: 0.7, low: 0.859, high: 1.2676, hidden: (4096, 7168), inner: (2048, 3072), top_k: (6, 6), num_experts: (256, 384) },
    Fit { gpu: "B200", format: "bfloat16", bytes_per_weight: 2.0, bandwidth: 7700e9, flops: 2250e12, launch_s: 14.07e-6, memory_share: 0.8349, arithmetic_share: 0.3506, sharpness: 1.857, low: 0.8653, high: 1.4978, hidden: (2048, 6144), inner: (512, 16384), top_k: (1, 22), num_experts: (8, 512) },
    Fit { gpu: "H100", format: "int4_wo", bytes_per_weight: 0.5625, bandwidth: 3350e9, flops: 989e12, launch_s: 34.85e-6, memory_share: 0.8495, arithmetic_share: 0.26, sharpness: 1.136, low: 0.8417, high: 1.1313, hidden: (7168, 7168), inner: (2048, 2048), top_k: (8, 8), num_experts: (384, 384) },
    Fit { gpu: "H100", format: "fp8_block", bytes_per_weight: 1.000244140625, bandwidth: 3350e9, flops: 1978e12, launch_s: 39.06e-6, memory_share: 0.8366, arithmetic_share: 0.3186, sharpness: 1.494, low: 0.9049, high: 1.1496, hidden: (2048, 7168), inner: (512, 16384), top_k: (1, 10), num_experts: (8, 512) },
    Fit { gpu: "H100", format: "w4a16_mxfp4", bytes_per_weight: 0.53125, bandwidth: 3350e9, flops: 989e12, launch_s: 42.71e-6, memory_share: 0.8368, arithmetic_share: 0.8702, sharpness: 0.7005, low: 0.7962, high: 1.1403, hidden: (2880, 2880), inner: (2880, 2880), top_k: (4, 4), num_experts: (32, 128) },
    Fit { gpu: "H100", format: "fp8", bytes_per_weight: 1.0, bandwidth: 3350e9, flops: 1978e12, launch_s: 132.4e-6, memory_share: 0.1819, arithmetic_share: 0.1278, sharpness: 1.591, low: 0.8222, high: 1.1983, hidden: (1024, 6144), inner: (512, 16384), top_k: (1, 22), num_experts: (8, 512) },
    Fit { gpu: "H100", format: "bfloat16", bytes_per_weight: 2.0, bandwidth: 3350e9, flops: 989e12, launch_s: 27.16e-6, memory_share: 0.8539, arithmetic_share: 0.5301, sharpness: 1.393, low: 0.9221, high: 1.1522, hidden: (2048, 6144), inner: (512, 16384), top_k: (1, 22), num_experts: (8, 512) },
    Fit { gpu: "H200", format: "int4_wo", bytes_per_weight: 0.5625, bandwidth: 4800e9, flops: 989e12, launch_s: 34.37e-6, memory_share: 0.7342, arithmetic_share: 0.2746, sharpness: 0.9199, low: 0.7896, high: 1.1379, hidden: (7168, 7168), inner: (2048, 2048), top_k: (8, 8), num_experts: (384, 384) },
    Fit { gpu: "H200", format: "fp8_block", bytes_per_weight: 1.000244140625, bandwidth: 4800e9, flops: 1978e12, launch_s: 37.55e-6, memory_share: 0.8124, arithmetic_share: 0.3244, sharpness: 1.311, low: 0.8867, high: 1.1573, hidden: (2048, 7168), inner: (512, 16384), top_k: (1, 10), num_experts: (8, 512) },
    Fit { gpu: "H200", format: "w4a16_mxfp4", bytes_per_weight: 0.53125, bandwidth: 4800e9, flops: 989e12, launch_s: 41.78e-6, memory_share: 0.6124, arithmetic_share: 0.8395, sharpness: 0.7, low: 0.7861, high: 1.1414, hidden: (2880, 2880), inner: (2880, 2880), top_k: (4, 4), num_experts: (32, 128) },
    Fit { gpu: "H200", format: "fp8", bytes_per_weight: 1.0, bandwidth: 4800e9, flops: 1978e12, launch_s: 151.7e-6, memory_share: 0.1336, arithmetic_share: 0.1566, sharpness: 1.61, low: 0.8107, high: 1.1974, hidden: (2048, 6144), inner: (512, 16384), top_k: (1, 22), num_experts: (8, 512) },
    Fit { gpu: "H200", format: "bfloat16", bytes_per_weight: 2.0, bandwidth: 4800e9, flops: 989e12, launch_s: 31.39e-6, memory_share: 0.8748, arithmetic_share: 0.6321, sharpness: 1.189, low: 0.8975, high: 1.1373, hidden: (2048, 6144), inner: (512, 16384), top_k: (1, 22), num_experts: (8, 512) },
    Fit { gpu: "RTX PRO 6000", format: "fp8_block", bytes_per_weight: 1.000244140625, bandwidth: 1792e9, flops: 935.60107e12, launch_s: 13.95e-6, memory_share: 0.7912, arithmetic_share: 0.5348, sharpness: 2.356, low: 0.9355, high: 1.1354, hidden: (2048, 7168), inner: (512, 16384), top_k: (1, 10), num_experts: (8, 512) },
    Fit { gpu: "RTX PRO 6000", format: "int4_wo", bytes_per_weight: 0.5625, bandwidth: 1792e9, flops: 467.800535e12, launch_s: 10.47e-6, memory_share: 0.731, arithmetic_share: 0.4832, sharpness: 1.448, low: 0.8507, high: 1.2379, hidden: (7168, 7168), inner: (2048, 2048), top_k: (8, 8), num_experts: (384, 384) },
    Fit { gpu: "RTX PRO 6000", format: "w4a16_mxfp4", bytes_per_weight: 0.53125, bandwidth: 1792e9, flops: 467.800535e12, launch_s: 7.623e-6, memory_share: 0.6362, arithmetic_share: 0.4113, sharpness: 2.101, low: 0.8551, high: 1.178, hidden: (2880, 2880), inner: (2880, 2880), top_k: (4, 4), num_experts: (32, 128) },
    Fit { gpu: "RTX PRO 6000", format: "nvfp4", bytes_per_weight: 0.5625, bandwidth: 1792e9, flops: 1871.20214e12, launch_s: 50.91e-6, memory_share: 0.7767, arithmetic_share: 0.6506, sharpness: 1.387, low: 0.9019, high: 1.1342, hidden: (2048, 7168), inner: (512, 16384), top_k: (1, 10), num_experts: (8, 512) },
    Fit { gpu: "RTX PRO 6000", format: "fp8", bytes_per_weight: 1.0, bandwidth: 1792e9, flops: 935.60107e12, launch_s: 24.18e-6, memory_share: 0.7855, arithmetic_share: 0.3247, sharpness: 1.732, low: 0.9243, high: 1.1666, hidden: (2048, 6144), inner: (512, 16384), top_k: (1, 22), num_experts: (8, 512) },
    Fit { gpu: "RTX PRO 6000", format: "bfloat16", bytes_per_weight: 2.0, bandwidth: 1792e9, flops: 467.800535e12, launch_s: 35.92e-6, memory_share: 0.7994, arithmetic_share: 0.3685, sharpness: 1.925, low: 0.9275, high: 1.2374, hidden: (2048, 6144), inner: (512, 16384), top_k: (1, 22), num_experts: (8, 512) },
];

/// The expert FFN of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeShape {
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width inside an expert.
    pub inner: u32,
    /// Routed experts.
    pub num_experts: u32,
    /// Experts per token.
    pub top_k: u32,
    /// Matrices per expert: three with a gate, two without.
    pub matrices: u32,
}

/// Names of the weight formats that were measured on `gpu_name`; empty for a GPU without measurements.
pub fn moe_formats(gpu_name: &str) -> Vec<&'static str> {
    FITS.iter().filter(|f| is_gpu(gpu_name, f.gpu)).map(|f| f.format).collect()
}

/// Time of one MoE layer with gated experts for `tokens` tokens that route uniformly and independently.
///
/// `gpu_name` is a product name such as "NVIDIA H100 SXM 80 GB"; `dtype` one of [`moe_formats`], e.g. `bfloat16`, `fp8_block`,
/// `nvfp4`. `None` for a GPU or format without measurements and for a shape that is none (no tokens, more experts per token than
/// experts).
pub fn moe_layer_seconds(
    gpu_name: &str,
    dtype: &str,
    hidden: u32,
    inner: u32,
    num_experts: u32,
    top_k: u32,
    tokens: u32,
) -> Option<Estimate> {
    let shape = MoeShape { hidden, inner, num_experts, top_k, matrices: 3 };
    moe_layer_seconds_of(gpu_name, dtype, shape, tokens, expected_distinct(num_experts, top_k, tokens))
}

/// The same for a known number of distinct experts, e.g. of a trace (or `min(experts, tokens x k)` for perfectly balanced load).
pub fn moe_layer_seconds_of(gpu_name: &str, dtype: &str, shape: MoeShape, tokens: u32, distinct: f64) -> Option<Estimate> {
    let MoeShape { hidden, inner, num_experts, top_k, matrices } = shape;
    let fit = FITS.iter().find(|f| f.format == dtype && is_gpu(gpu_name, f.gpu))?;
    let possible = [hidden, inner, top_k, matrices, tokens].iter().all(|n| *n > 0) && top_k <= num_experts;
    if !possible || !(f64::from(top_k)..=f64::from(num_experts)).contains(&distinct) {
        return None;
    }
    let slots = f64::from(tokens) * f64::from(top_k);
    let weights = f64::from(matrices) * f64::from(hidden) * f64::from(inner);
    // Inputs and outputs of every product, two bytes each.
    let activations = 2.0 * slots * (2.0 * f64::from(hidden) + f64::from(matrices) * f64::from(inner));
    let read_s = (distinct * weights * fit.bytes_per_weight + activations) / (fit.memory_share * fit.bandwidth);
    let compute_s = 2.0 * weights * slots / (fit.arithmetic_share * fit.flops);
    let seconds = fit.launch_s + smooth_max(read_s, compute_s, fit.sharpness);
    let within = |n: u32, (least, most): (u32, u32)| (least..=most).contains(&n);
    let measured = within(hidden, fit.hidden)
        && within(inner, fit.inner)
        && within(top_k, fit.top_k)
        && within(num_experts, fit.num_experts)
        && within(tokens, TOKENS);
    // Away from what was measured the errors are at least those of shapes held out within it: twice as wide.
    let (low, high, source) = if measured {
        (fit.low, fit.high, EstimateSource::Interpolated)
    } else {
        (fit.low * fit.low, fit.high * fit.high, EstimateSource::Analytic)
    };
    Some(Estimate { seconds, low: seconds * low, high: seconds * high, source })
}

/// (a^s + b^s)^(1/s): the larger one where they differ much, more where they are alike.
fn smooth_max(a: f64, b: f64, s: f64) -> f64 {
    let top = a.max(b);
    top * ((a / top).powf(s) + (b / top).powf(s)).powf(1.0 / s)
}

/// Does a product name mean this GPU? By whole words, and not its PCIe or mobile variants, which have other rates.
fn is_gpu(name: &str, gpu: &str) -> bool {
    let words: Vec<&str> = name.split([' ', '-', '_']).filter(|w| !w.is_empty()).collect();
    let wanted: Vec<&str> = gpu.split(' ').collect();
    let other = |w: &str| ["PCIe", "NVL", "Max", "Mobile", "Laptop"].iter().any(|o| w.eq_ignore_ascii_case(o));
    words.windows(wanted.len()).any(|w| w.iter().zip(&wanted).all(|(a, b)| a.eq_ignore_ascii_case(b)))
        && !words.iter().any(|w| other(w))
}

/// One row of the fitted table, for tools and tests.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoeFit {
    /// GPU.
    pub gpu: &'static str,
    /// Weight format.
    pub format: &'static str,
    /// Fixed time of a layer, in seconds.
    pub launch_s: f64,
    /// Share of the bandwidth that is reached.
    pub memory_share: f64,
    /// Share of the arithmetic rate that is reached.
    pub arithmetic_share: f64,
    /// Exponent of the smooth maximum.
    pub sharpness: f64,
    /// Measured over predicted at the 10th and 90th percentile.
    pub low_high: (f64, f64),
}

/// All rows of the fitted table.
pub fn moe_fits() -> impl Iterator<Item = MoeFit> {
    FITS.iter().map(|f| MoeFit {
        gpu: f.gpu,
        format: f.format,
        launch_s: f.launch_s,
        memory_share: f.memory_share,
        arithmetic_share: f.arithmetic_share,
        sharpness: f.sharpness,
        low_high: (f.low, f.high),
    })
}
