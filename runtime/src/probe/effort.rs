//! What `calibrate` measures, and for how long: the thorough set, the quick one, and a tiny one for tests.

use std::time::Duration;
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::Bytes;

/// Formats of expert weights that people run, in table order.
pub(super) const FORMATS: &[QuantFormat] = &[
    QuantFormat::F32,
    QuantFormat::F16,
    QuantFormat::BF16,
    QuantFormat::Q4_0,
    QuantFormat::Q8_0,
    QuantFormat::Q3_K,
    QuantFormat::Q4_K,
    QuantFormat::Q5_K,
    QuantFormat::Q6_K,
    QuantFormat::IQ4_XS,
    QuantFormat::MXFP4,
];

/// One calibration's extent.
#[derive(Debug, Clone, PartialEq)]
pub struct Effort {
    /// Formats of experts, in table order.
    pub expert_formats: Vec<QuantFormat>,
    /// Formats of other matrices, in table order. Routers are mostly float32.
    pub matmul_formats: Vec<QuantFormat>,
    /// Width of the residual stream and inside an expert: a typical expert.
    pub expert: (u32, u32),
    /// Rows of a matrix that is no expert's.
    pub matrix_rows: u32,
    /// Tokens per expert and the numbers of distinct experts to measure them with, ascending.
    pub experts: Vec<(usize, Vec<usize>)>,
    /// Tokens of other products, ascending.
    pub matmul_tokens: Vec<usize>,
    /// Tokens and past of attention.
    pub attention: Vec<(usize, usize)>,
    /// Tokens of the small operations, ascending.
    pub small_tokens: Vec<usize>,
    /// Weights to rotate over; more where the caches are larger than a quarter of it.
    pub pool: Bytes,
    /// Time for reading memory, computing, and reading the disk.
    pub time: (Duration, Duration, Duration),
    /// Short measurements are repeated for this long: more than a scheduler's slice, so that all meet the same disturbances.
    pub visit: Duration,
    /// Rounds at least.
    pub rounds: usize,
    /// File to read, the size of blocks and the depths.
    pub disk_file: Bytes,
    /// Bytes per read, ascending.
    pub disk_blocks: Vec<u64>,
    /// Reads under way, ascending.
    pub disk_depths: Vec<u32>,
}

impl Effort {
    /// Everything, in about three minutes on two cores.
    pub fn full() -> Self {
        let few = vec![1, 2, 4, 8, 32, 128];
        let mut experts: Vec<(usize, Vec<usize>)> = vec![(1, few)];
        experts.extend([2, 4, 8].map(|n| (n, vec![8, 32, 128])));
        experts.extend([16, 32].map(|n| (n, vec![8, 32])));
        // With so many tokens sharing the work out costs nothing, and few experts save time.
        experts.extend([(64, vec![8]), (128, vec![4]), (512, vec![2])]);
        Self {
            expert_formats: FORMATS.iter().copied().filter(|f| *f != QuantFormat::F32).collect(),
            matmul_formats: FORMATS.to_vec(),
            expert: (2048, 768),
            matrix_rows: 4096,
            experts,
            matmul_tokens: vec![1, 2, 4, 8, 16, 32, 64, 128, 512],
            attention: vec![(1, 511), (1, 2047), (16, 0), (64, 0), (512, 0), (512, 1536)],
            small_tokens: vec![1, 4, 16, 64, 512],
            pool: Bytes::mib(512),
            time: (Duration::from_secs(8), Duration::from_secs(120), Duration::from_secs(20)),
            visit: Duration::from_millis(10),
            rounds: 5,
            disk_file: Bytes::mib(512),
            disk_blocks: vec![64 << 10, 1 << 20, 4 << 20, 16 << 20],
            disk_depths: vec![1, 4, 16],
        }
    }

    /// The formats of the most common files, in less than 20 seconds on two cores.
    pub fn quick() -> Self {
        Self {
            expert_formats: vec![QuantFormat::Q8_0, QuantFormat::Q4_K, QuantFormat::Q6_K],
            matmul_formats: vec![QuantFormat::F32, QuantFormat::Q8_0, QuantFormat::Q4_K, QuantFormat::Q6_K],
            experts: vec![(1, vec![1, 8, 32]), (4, vec![8, 32]), (16, vec![8]), (64, vec![8])],
            matmul_tokens: vec![1, 4, 16, 64, 256],
            attention: vec![(1, 511), (64, 0), (256, 0)],
            small_tokens: vec![1, 64, 512],
            pool: Bytes::mib(384),
            time: (Duration::from_secs(2), Duration::from_secs(9), Duration::from_secs(2)),
            disk_file: Bytes::mib(128),
            disk_blocks: vec![64 << 10, 1 << 20, 4 << 20],
            disk_depths: vec![1, 4],
            ..Self::full()
        }
    }

    /// A fraction of a second, for tests: the shapes are too small to say anything.
    pub fn tiny() -> Self {
        Self {
            expert_formats: vec![QuantFormat::Q8_0, QuantFormat::Q4_K],
            matmul_formats: vec![QuantFormat::F32, QuantFormat::Q8_0, QuantFormat::Q4_K],
            expert: (256, 256),
            matrix_rows: 256,
            experts: vec![(1, vec![1, 8]), (4, vec![8])],
            matmul_tokens: vec![1, 4, 16],
            attention: vec![(1, 63), (16, 0)],
            small_tokens: vec![1, 16],
            pool: Bytes::mib(8),
            time: (Duration::ZERO, Duration::ZERO, Duration::ZERO),
            visit: Duration::ZERO,
            rounds: 2,
            disk_file: Bytes::mib(1),
            disk_blocks: vec![64 << 10],
            disk_depths: vec![1, 4],
        }
    }
}
