//! CUDA C++ kernels: sources, entry points, parameters, block sizes, shared memory.
//!
//! Kernels that read weights are compiled once per format ([`CudaModule`]), so that a program only compiles what its model needs. The sources
//! include no header: NVRTC alone makes code of them. `shaders/tests/cuda_sources.rs` holds the descriptions against the
//! sources; shared memory is asserted by the sources themselves through `#define`s made here.

use tierwise_cost::quant::QuantFormat;

/// Formats that CUDA kernels read.
pub const CUDA_FORMATS: &[QuantFormat] = &[
    QuantFormat::F32,
    QuantFormat::F16,
    QuantFormat::BF16,
    QuantFormat::Q8_0,
    QuantFormat::Q4_0,
    QuantFormat::Q4_K,
    QuantFormat::Q6_K,
    QuantFormat::MXFP4,
];

/// Architectures that the sources are tested for, as in `sm_90`.
pub const CUDA_ARCHITECTURES: &[u32] = &[80, 89, 90, 120];

/// Weight rows of a block of `matmul_few_*` and `experts_few_*`.
pub const FEW_ROWS: u32 = 16;
/// Weight rows of a block of `*_many*`; half of it where gate and up are made together.
pub const MANY_ROWS: u32 = 128;
/// Tokens of a block of `*_many*`.
pub const MANY_TOKENS: u32 = 128;
/// Rows of rounded activations are padded to a multiple of so many elements.
pub const ROUNDED_COLS: u32 = 64;
/// Query rows of a block of `attention_*`.
pub const ATTENTION_ROWS: u32 = 16;
/// Positions of a tile of `attention_*`: ranges are multiples of it.
pub const ATTENTION_TILE: u32 = 32;

/// One compilation unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CudaModule {
    /// Norms, sums, routing.
    Elementwise,
    /// Attention.
    Attention,
    /// What reads weights of one format.
    Weights(QuantFormat),
}

/// Type of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CudaType {
    /// A device address; 0 where absent.
    Pointer,
    /// 32-bit number.
    U32,
    /// 64-bit number.
    U64,
    /// Float.
    F32,
}

/// One kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaKernel {
    /// Name of the `extern "C"` function.
    pub entry_point: &'static str,
    /// Threads per block.
    pub threads: u32,
    /// Types and names as in the source.
    pub parameters: &'static [(CudaType, &'static str)],
}

macro_rules! kernels {
    ($($name:ident $threads:literal ($($kind:ident $parameter:ident),* $(,)?);)*) => {
        &[$(CudaKernel {
            entry_point: stringify!($name),
            threads: $threads,
            parameters: &[$((CudaType::$kind, stringify!($parameter))),*],
        }),*]
    };
}

const ELEMENTWISE: &[CudaKernel] = kernels! {
    rms_norm 256 (Pointer x, Pointer weight, U32 period, Pointer out, U32 width, F32 eps);
    layer_norm 256 (Pointer x, Pointer weight, Pointer bias, Pointer out, U32 width, F32 eps);
    rope 256 (Pointer x, Pointer cos_sin, U32 tokens, U32 heads, U32 head_stride, U32 first, U32 pairs, U32 interleaved_pairs);
    copy_columns 256 (Pointer x, U32 x_stride, U32 x_start, Pointer out, U32 out_stride, U32 out_start, U32 rows, U32 width);
    append_kv 256 (Pointer x, Pointer cache, U32 half, U64 first, U64 elements);
    scale_rows 256 (Pointer x, F32 factor, Pointer factors, U32 rows, U32 width);
    axpy 256 (Pointer x, Pointer y, F32 factor, U32 elements);
    gated_axpy 256 (Pointer x, Pointer input, Pointer gate, Pointer y, U32 width, U32 cols);
    activate_pairs 256 (Pointer gate, Pointer up, Pointer out, U32 elements, U32 activation, F32 alpha, F32 limit);
    scale_cap 256 (Pointer x, U32 elements, F32 factor, F32 cap);
    combine 256 (Pointer x, Pointer weights, Pointer y, U32 tokens, U32 k, U32 width, U32 accumulate);
    round_rows 256 (Pointer x, U32 x_stride, U32 x_head, U32 cols, Pointer out, U32 pitch);
    route 32 (Pointer logits, Pointer selection_bias, Pointer ids, Pointer weights, U32 num_experts, U32 k, U32 is_sigmoid,
        U32 normalize, U32 softmax_after_topk, F32 scale);
    mma_rate 256 (Pointer out, U32 rounds);
};

macro_rules! attention_kernels {
    ($($name:ident)*) => {
        kernels! {
            $($name 128 (Pointer q, Pointer keys, Pointer values, Pointer sinks, Pointer out, Pointer partial, U32 tokens, U32 past, U32 heads,
                U32 kv_heads, U32 key_dim, U32 value_dim, U32 value_stride, U32 window, U32 chunk, U32 range, F32 scale, F32 softcap);)*
            attention_merge 128 (Pointer partial, Pointer out, U32 ranges, U32 value_dim);
        }
    };
}
const ATTENTION: &[CudaKernel] = attention_kernels!(attention_f32_64 attention_f32_128 attention_f32_256 attention_f32_512
    attention_f16_64 attention_f16_128 attention_f16_256 attention_f16_512);

/// The first [`EXACT_KERNELS`] round nothing.
const WEIGHTS: &[CudaKernel] = kernels! {
    matmul_few_2 128 (Pointer weight, U64 row_bytes, U32 rows, U32 cols, Pointer bias, Pointer x, U32 x_stride, U32 x_head, Pointer out,
        U32 out_stride, U32 out_head, U32 tokens);
    matmul_few_8 128 (Pointer weight, U64 row_bytes, U32 rows, U32 cols, Pointer bias, Pointer x, U32 x_stride, U32 x_head, Pointer out,
        U32 out_stride, U32 out_head, U32 tokens);
    experts_few_gate_up 128 (Pointer base, Pointer table, U32 num_experts, Pointer ids, Pointer x, U32 rows_per_input, Pointer inner, Pointer gate_bias,
        Pointer up_bias, U32 inner_size, U32 hidden, U64 row_bytes, U32 activation, F32 alpha, F32 limit);
    experts_few_down 128 (Pointer base, Pointer table, U32 num_experts, Pointer ids, Pointer inner, Pointer bias, Pointer out, U32 hidden, U32 inner_size,
        U64 row_bytes);
    embed 128 (Pointer table, U64 row_bytes, U32 rows, U32 width, Pointer ids, Pointer out);
    matmul_many 256 (Pointer weight, U64 row_bytes, U32 rows, U32 cols, Pointer bias, Pointer x, U32 x_pitch, Pointer out, U32 out_stride,
        U32 out_head, U32 tokens);
    experts_many_gate_up 256 (Pointer base, Pointer table, U32 num_experts, Pointer order, Pointer tiles, U32 num_tiles, Pointer x, U32 x_pitch,
        U32 rows_per_input, Pointer inner, U32 inner_pitch, Pointer gate_bias, Pointer up_bias, U32 inner_size, U32 hidden, U64 row_bytes,
        U32 activation, F32 alpha, F32 limit);
    experts_many_down 256 (Pointer base, Pointer table, U32 num_experts, Pointer order, Pointer tiles, U32 num_tiles, Pointer inner, U32 inner_pitch,
        Pointer bias, Pointer out, U32 hidden, U32 inner_size, U64 row_bytes);
};

/// Kernels of [`WEIGHTS`] that F32 has: it is never rounded to bf16.
const EXACT_KERNELS: usize = 5;

impl CudaModule {
    /// Every module.
    pub fn all() -> Vec<Self> {
        let weights = CUDA_FORMATS.iter().map(|f| Self::Weights(*f));
        [Self::Elementwise, Self::Attention].into_iter().chain(weights).collect()
    }

    /// Name, also of its cached and prebuilt files.
    pub fn name(self) -> String {
        match self {
            Self::Elementwise => "elementwise".into(),
            Self::Attention => "attention".into(),
            Self::Weights(format) => format!("weights_{}", format.name().to_lowercase()),
        }
    }

    /// Its kernels.
    pub fn kernels(self) -> &'static [CudaKernel] {
        match self {
            Self::Elementwise => ELEMENTWISE,
            Self::Attention => ATTENTION,
            Self::Weights(QuantFormat::F32) => &WEIGHTS[..EXACT_KERNELS],
            Self::Weights(_) => WEIGHTS,
        }
    }

    /// The kernel of this name.
    pub fn kernel(self, entry_point: &str) -> Option<&'static CudaKernel> {
        self.kernels().iter().find(|k| k.entry_point == entry_point)
    }

    /// What is particular to this module: the format and its shared memory.
    pub fn defines(self) -> String {
        let Self::Weights(format) = self else { return String::new() };
        let mut text = format!("#define FORMAT {}\n", format.name());
        if format == QuantFormat::F32 {
            text += "#define EXACT\n";
        }
        for kernel in self.kernels() {
            if let Some(bytes) = weights_shared_bytes(format, kernel.entry_point) {
                text += &format!("#define SHARED_{} {bytes}\n", kernel.entry_point);
            }
        }
        text
    }

    /// The part of the source that is compiled once per module.
    pub const fn body(self) -> &'static str {
        match self {
            Self::Elementwise => include_str!("cuda/elementwise.cu"),
            Self::Attention => include_str!("cuda/attention.cu"),
            Self::Weights(_) => include_str!("cuda/weights.cu"),
        }
    }

    /// What it builds on.
    pub fn prelude(self) -> String {
        match self {
            Self::Elementwise | Self::Attention => COMMON.into(),
            Self::Weights(_) => [COMMON, FORMATS, FEW, MANY].concat(),
        }
    }

    /// The whole text for NVRTC.
    pub fn source(self) -> String {
        self.prelude() + &self.defines() + self.body()
    }
}

const COMMON: &str = include_str!("cuda/common.cuh");
const FORMATS: &str = include_str!("cuda/formats.cuh");
const FEW: &str = include_str!("cuda/few.cuh");
const MANY: &str = include_str!("cuda/many.cuh");

/// Elements per chunk of a row and per step of the kernels for many tokens.
const fn chunk_elems(format: QuantFormat, many: bool) -> u32 {
    match format {
        QuantFormat::Q4_K | QuantFormat::Q6_K => 256,
        _ if many => 64,
        QuantFormat::F32 => 64,
        QuantFormat::F16 | QuantFormat::BF16 => 128,
        _ => 256,
    }
}

/// Dynamic shared memory of a kernel that reads weights, `None` if it takes none.
pub fn weights_shared_bytes(format: QuantFormat, entry_point: &str) -> Option<u32> {
    let pitch = |many| {
        let layout = format.layout();
        (chunk_elems(format, many) / layout.elems * layout.bytes + 30) / 16 * 16
    };
    let few = |pairs: u32, matrices: u32| {
        let stages = if (matrices == 2 && pitch(false) > 160) || (pairs == 4 && pitch(false) > 240) { 2 } else { 3 };
        let activations = pairs * chunk_elems(format, false) / 32 * 6 * 4 * 16;
        4 * (stages * 16 * matrices * pitch(false) + activations).max(matrices * pairs * 16 * 8 * 4)
    };
    match entry_point {
        "matmul_few_2" | "experts_few_down" => Some(few(1, 1)),
        "matmul_few_8" => Some(few(4, 1)),
        "experts_few_gate_up" => Some(few(1, 2)),
        "matmul_many" | "experts_many_gate_up" | "experts_many_down" => {
            Some(MANY_ROWS * pitch(true) + 3 * 128 * 72 * 2 + MANY_TOKENS * 4)
        }
        _ => None,
    }
}

/// Dynamic shared memory of `attention_*`; `shared_values` where the values are the keys' first elements.
pub const fn attention_shared_bytes(key_dim: u32, value_dim: u32, element_bytes: u32, shared_values: bool) -> u32 {
    const fn pitch(dim: u32, element_bytes: u32) -> u32 {
        dim.div_ceil(16) * 16 + 16 / element_bytes
    }
    let values = if shared_values { 0 } else { ATTENTION_TILE * pitch(value_dim, element_bytes) * element_bytes };
    ATTENTION_ROWS * key_dim.div_ceil(4) * 4 * 4
        + ATTENTION_ROWS * ATTENTION_TILE * 4
        + ATTENTION_TILE * pitch(key_dim, element_bytes) * element_bytes
        + values
}

/// Dynamic shared memory of `route`.
pub const fn route_shared_bytes(num_experts: u32, k: u32) -> u32 {
    8 * num_experts + 8 * k
}

/// Dynamic shared memory of the kernels that add up over a block.
pub const SUM_SHARED_BYTES: u32 = 256;
