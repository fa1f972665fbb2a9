//! x86-64 kernels: 256-bit (AVX2, FMA, F16C) and 512-bit (AVX-512 F, BW, VL, VNNI).
//!
//! Owning a proof ([`Avx2`], [`Avx512`]) means the processor has the features, checked at run time; only a proof makes a
//! table. Inside, functions carry `#[target_feature]`, which makes register arithmetic safe; what stays `unsafe` is loads and
//! stores through pointers, kept in the helpers below, whose arguments are references and thus always valid.

mod amx;
mod amx_float;
mod attention;
mod bf16_rows;
mod float;
mod gemm256;
mod gemm512;
mod groups256;
mod groups512;
mod lane_panels;
mod ops256;
mod ops512;
mod panels;
mod rows16;
mod rows512;
mod wide32;

pub use amx::Amx;

use super::gemm::{Gemm, GemmScratch, GemmTask, TOKENS};
use super::{CpuKernels, GemmSteps, NUM_FORMATS, ROWS, RowDots, TILE, activation_blocks, index, per_format, scalar};
use bytemuck::Pod;
use std::arch::x86_64::*;
use tierwise_cost::quant::QuantFormat;

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// The proof, if the processor has the features.
    pub fn new() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }
}

/// Proof that the processor has AVX-VNNI and all of [`Avx2`]: 8-bit dot products without AVX-512.
#[derive(Debug, Clone, Copy)]
pub struct AvxVnni(Avx2);

impl AvxVnni {
    /// The proof, if the processor has the features.
    pub fn new() -> Option<Self> {
        Avx2::new().filter(|_| is_x86_feature_detected!("avxvnni")).map(Self)
    }
}

/// Proof that the processor has AVX-512 F, BW, VL and VNNI, and all of [`Avx2`].
#[derive(Debug, Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    /// The proof, if the processor has the features.
    pub fn new() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        Avx2::new().filter(|_| found).map(|_| Self(()))
    }
}

/// How far ahead of a single row in work weights are fetched (measured): rows are multiples of pages, at whose ends the processor
/// stops fetching by itself.
const FETCH_BYTES: usize = 4 << 10;

/// How far ahead of `R` rows in work weights are fetched: for several, the same place in the rows that come after them.
const fn ahead_of_rows<const R: usize>(row_bytes: usize) -> usize {
    if R > 1 { R * row_bytes } else { FETCH_BYTES }
}

/// Asks for what lies so many bytes on: as much as a block, line by line.
#[inline(always)]
fn fetch_ahead<B>(block: &B, bytes: usize) {
    let address = std::ptr::from_ref(block).cast::<u8>().wrapping_add(bytes);
    for line in 0..size_of::<B>().div_ceil(64) {
        // SAFETY: a hint that reads nothing, whatever the address; no feature beyond x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.wrapping_add(64 * line).cast()) }
    }
}

/// Both row kernels of a function generic over the number of tokens.
macro_rules! both {
    ($row:path) => {{
        use $row as row;
        RowDots { one: row::<1>, tile: row::<TILE>, several: None, fetches: false }
    }};
}

/// As `both`, of a function that fetches weights ahead.
macro_rules! both_fetching {
    ($row:path) => {
        RowDots { fetches: true, ..both!($row) }
    };
}

/// The row kernels of a function generic over the numbers of rows and tokens.
macro_rules! rows_and_tokens {
    ($rows:path) => {
        rows_and_tokens!("avx512f,avx512bw,avx512vl,avx512vnni,f16c", $rows)
    };
    ($features:literal, $rows:path) => {{
        use $rows as rows;
        #[target_feature(enable = $features)]
        fn one(weight: &[u8], x: [&[u8]; 1]) -> [f32; 1] {
            rows::<1, 1>(weight, x)[0]
        }
        #[target_feature(enable = $features)]
        fn tile(weight: &[u8], x: [&[u8]; TILE]) -> [f32; TILE] {
            rows::<1, TILE>(weight, x)[0]
        }
        #[target_feature(enable = $features)]
        fn several(weight: &[u8], x: &[u8]) -> [f32; ROWS] {
            rows::<ROWS, 1>(weight, [x]).map(|[y]| y)
        }
        RowDots { one, tile, several: Some(several), fetches: true }
    }};
}

pub(super) fn avx2_kernels(_proof: Avx2) -> CpuKernels {
    CpuKernels {
        name: "avx2",
        dots: per_format(|format| match format {
            QuantFormat::F32 => rows_and_tokens!("avx2,fma,f16c", float::avx2::f32_rows),
            QuantFormat::F16 => rows_and_tokens!("avx2,fma,f16c", float::avx2::f16_rows),
            QuantFormat::BF16 => rows_and_tokens!("avx2,fma,f16c", float::avx2::bf16_rows),
            QuantFormat::Q4_0 => both!(wide32::avx2::q4_0_row),
            QuantFormat::Q4_1 => both!(wide32::avx2::q4_1_row),
            QuantFormat::Q5_0 => both!(wide32::avx2::q5_0_row),
            QuantFormat::Q5_1 => both!(wide32::avx2::q5_1_row),
            QuantFormat::Q8_0 => both!(wide32::avx2::q8_0_row),
            QuantFormat::Q2_K => both!(groups256::q2_k_row),
            QuantFormat::Q3_K => both!(groups256::q3_k_row),
            QuantFormat::Q4_K => both!(groups256::q4_k_row),
            QuantFormat::Q5_K => both!(groups256::q5_k_row),
            QuantFormat::Q6_K => both!(groups256::q6_k_row),
            QuantFormat::IQ4_NL => both!(wide32::avx2::iq4_nl_row),
            QuantFormat::MXFP4 => both!(wide32::avx2::mxfp4_row),
            QuantFormat::IQ4_XS => both!(groups256::iq4_xs_row),
            // Never seen as weights in practice.
            QuantFormat::Q8_K => scalar::row_dots(format),
        }),
        gemm: gemms256().map(|kernel| [from(FEW, kernel), None]),
        encode_q8_1: ops256::encode_q8_1,
        encode_q8k: ops256::encode_q8k,
        attend: attention::avx2::attend,
        axpy_f32: ops256::axpy_f32,
        rms_norm: ops256::rms_norm,
        silu_mul: ops256::silu_mul,
        softmax: ops256::softmax,
        f32_to_f16: ops256::f32_to_f16,
        f16_to_f32: ops256::f16_to_f32,
        q8_0_to_f32: ops256::q8_0_to_f32,
    }
}

/// The formats in blocks of 32 gain; the others have more than the dot product to do and stay with [`avx2_kernels`].
pub(super) fn avx_vnni_kernels(proof: AvxVnni) -> CpuKernels {
    let mut kernels = avx2_kernels(proof.0);
    kernels.name = "avxvnni";
    for (format, dots) in [
        (QuantFormat::Q4_0, both!(wide32::vnni::q4_0_row)),
        (QuantFormat::Q4_1, both!(wide32::vnni::q4_1_row)),
        (QuantFormat::Q5_0, both!(wide32::vnni::q5_0_row)),
        (QuantFormat::Q5_1, both!(wide32::vnni::q5_1_row)),
        (QuantFormat::Q8_0, both!(wide32::vnni::q8_0_row)),
        (QuantFormat::IQ4_NL, both!(wide32::vnni::iq4_nl_row)),
        (QuantFormat::MXFP4, both!(wide32::vnni::mxfp4_row)),
    ] {
        kernels.dots[index(format)] = dots;
    }
    kernels
}

pub(super) fn avx512_kernels(_proof: Avx512) -> CpuKernels {
    CpuKernels {
        name: "avx512",
        dots: per_format(|format| match format {
            QuantFormat::F32 => rows_and_tokens!(float::avx512::f32_rows),
            QuantFormat::F16 => rows_and_tokens!(float::avx512::f16_rows),
            QuantFormat::BF16 => rows_and_tokens!(bf16_rows::bf16_rows),
            QuantFormat::Q4_0 => rows_and_tokens!(rows512::q4_0_rows),
            QuantFormat::Q4_1 => rows_and_tokens!(rows512::q4_1_rows),
            QuantFormat::Q5_0 => rows_and_tokens!(rows512::q5_0_rows),
            QuantFormat::Q5_1 => rows_and_tokens!(rows512::q5_1_rows),
            QuantFormat::Q8_0 => rows_and_tokens!(rows512::q8_0_rows),
            QuantFormat::Q2_K => both_fetching!(groups512::q2_k_row),
            QuantFormat::Q3_K => rows_and_tokens!(groups512::q3_k_rows),
            QuantFormat::Q4_K => both_fetching!(groups512::q4_k_row),
            QuantFormat::Q5_K => both_fetching!(groups512::q5_k_row),
            QuantFormat::Q6_K => rows_and_tokens!(groups512::q6_k_rows),
            QuantFormat::IQ4_NL => rows_and_tokens!(rows512::iq4_nl_rows),
            QuantFormat::MXFP4 => rows_and_tokens!(rows512::mxfp4_rows),
            QuantFormat::IQ4_XS => rows_and_tokens!(groups512::iq4_xs_rows),
            // Never seen as weights in practice.
            QuantFormat::Q8_K => scalar::row_dots(format),
        }),
        gemm: lanes_then::<false>(),
        encode_q8_1: ops512::encode_q8_1,
        encode_q8k: ops512::encode_q8k,
        attend: attention::avx512::attend,
        axpy_f32: ops512::axpy_f32,
        rms_norm: ops512::rms_norm,
        silu_mul: ops512::silu_mul,
        softmax: ops512::softmax,
        f32_to_f16: ops512::f32_to_f16,
        f16_to_f32: ops512::f16_to_f32,
        q8_0_to_f32: ops512::q8_0_to_f32,
    }
}

/// An AVX2 kernel for many tokens from a function that fills panels.
macro_rules! gemm256 {
    ($gemm:ident::<$($parameter:literal),*>, $fill:path) => {{
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn gemm(task: GemmTask<'_>, scratch: &mut GemmScratch) {
            // SAFETY: only called through a table that was made with an `Avx2` proof.
            unsafe { gemm256::$gemm::<$($parameter),*>(task, scratch, $fill) }
        }
        Some(gemm as Gemm)
    }};
}

fn gemms256() -> [Option<Gemm>; NUM_FORMATS] {
    let mut table = [None; NUM_FORMATS];
    for format in QuantFormat::ALL {
        // How many products are added in 16 bits: 2 * (largest code) * 127 times as many must stay below 2^15.
        table[index(*format)] = match format {
            QuantFormat::F16 => Some(float::avx2::f16_gemm as Gemm),
            QuantFormat::BF16 => Some(float::avx2::bf16_gemm as Gemm),
            // In float32 many tokens give the bits of few.
            QuantFormat::F32 | QuantFormat::Q8_K => None,
            QuantFormat::Q4_0 => gemm256!(gemm_blocks::<8, false, false, 8>, panels::q4_0_panel),
            QuantFormat::Q4_1 => gemm256!(gemm_blocks::<8, false, true, 0>, panels::q4_1_panel),
            QuantFormat::Q5_0 => gemm256!(gemm_blocks::<4, false, false, 16>, panels::q5_0_panel),
            QuantFormat::Q5_1 => gemm256!(gemm_blocks::<4, false, true, 0>, panels::q5_1_panel),
            QuantFormat::Q8_0 => gemm256!(gemm_blocks::<1, true, false, 0>, panels::q8_0_panel),
            QuantFormat::IQ4_NL => gemm256!(gemm_blocks::<1, true, false, 0>, panels::iq4_nl_panel),
            QuantFormat::MXFP4 => gemm256!(gemm_blocks::<4, false, false, 12>, panels::mxfp4_panel),
            QuantFormat::Q2_K => gemm256!(gemm_super::<4, 4, false, 8, false>, gemm256::q2_k_panel),
            QuantFormat::Q3_K => gemm256!(gemm_super::<4, 4, false, 8, true>, gemm256::q3_k_panel),
            QuantFormat::Q4_K => gemm256!(gemm_super::<8, 8, false, 4, false>, gemm256::q4_k_panel),
            QuantFormat::Q5_K => gemm256!(gemm_super::<8, 4, false, 4, false>, gemm256::q5_k_panel),
            QuantFormat::Q6_K => gemm256!(gemm_super::<4, 2, false, 8, true>, gemm256::q6_k_panel),
            QuantFormat::IQ4_XS => gemm256!(gemm_super::<4, 1, true, 0, false>, gemm256::iq4_xs_panel),
        };
    }
    table
}

/// A kernel for many tokens from a function that fills panels.
macro_rules! gemm {
    ($gemm:ident::<$minima:literal>, $fill:ident) => {{
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
        unsafe fn gemm<const MATRIX: bool>(task: GemmTask<'_>, scratch: &mut GemmScratch) {
            // SAFETY: only called through a table that was made with an `Avx512` proof, for `MATRIX` with an `Amx` proof.
            unsafe { gemm512::$gemm::<$minima, MATRIX>(task, scratch, panels::$fill) }
        }
        Some(gemm::<MATRIX> as Gemm)
    }};
}

/// From so many tokens on the panels pay (measured; the kernels for few tokens work in tiles of four and then one).
const FEW: usize = TILE + 2;

fn from(tokens: usize, kernel: Option<Gemm>) -> Option<(usize, Gemm)> {
    kernel.map(|kernel| (tokens, kernel))
}

/// Both kernels for many tokens: rows in lanes first, then panels.
fn lanes_then<const MATRIX: bool>() -> [GemmSteps; NUM_FORMATS] {
    let (lanes, panels) = (gemms_of_lanes(), gemms::<MATRIX>());
    std::array::from_fn(|i| match lanes[i] {
        Some(_) => [from(LANES_FROM, lanes[i]), from(if MATRIX { MATRIX_FROM } else { PANELS_FROM }, panels[i])],
        // On the matrix unit F16 weights have to be split first, which many tokens must share; BF16 weights are read where they lie.
        None if MATRIX && i == index(QuantFormat::F16) => [from(FEW, gemms::<false>()[i]), from(HALVES_FROM, panels[i])],
        None if MATRIX && i == index(QuantFormat::BF16) => [from(LANES_FROM, panels[i]), None],
        None => [from(FEW, panels[i]), None],
    })
}

/// From so many tokens on it pays to turn 16 rows, or to use the matrix unit where weights need no preparation (measured).
const LANES_FROM: usize = 2;

/// From so many tokens on panels with their scales in the codes are used by VNNI. Not measured: two tiles of tokens, which share a panel.
const PANELS_FROM: usize = 33;
/// The same on the matrix unit: on a busy machine the two were equal at 8 to 13 tokens, depending on the format.
const MATRIX_FROM: usize = 13;
/// F16 weights on the matrix unit (measured).
const HALVES_FROM: usize = 3 * TOKENS;

/// A kernel for a few tokens from a function that turns 16 rows.
macro_rules! gemm_of_lanes {
    (<$($parameter:literal),*>, $turn:ident) => {{
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
        unsafe fn gemm(task: GemmTask<'_>, scratch: &mut GemmScratch) {
            // SAFETY: only called through a table that was made with an `Avx512` proof.
            unsafe { rows16::gemm::<$($parameter),*>(task, scratch, lane_panels::$turn) }
        }
        Some(gemm as Gemm)
    }};
}

/// Columns of a group, by how much codes are too large, whether there are minima, whether activations come in super-blocks.
fn gemms_of_lanes() -> [Option<Gemm>; NUM_FORMATS] {
    let mut table = [None; NUM_FORMATS];
    for format in QuantFormat::ALL {
        table[index(*format)] = match format {
            QuantFormat::F32 | QuantFormat::F16 | QuantFormat::BF16 | QuantFormat::Q8_K => None,
            QuantFormat::Q4_0 => gemm_of_lanes!(<32, 8, false, false>, q4_0),
            QuantFormat::Q4_1 => gemm_of_lanes!(<32, 0, true, false>, q4_1),
            QuantFormat::Q5_0 => gemm_of_lanes!(<32, 16, false, false>, q5_0),
            QuantFormat::Q5_1 => gemm_of_lanes!(<32, 0, true, false>, q5_1),
            QuantFormat::Q8_0 => gemm_of_lanes!(<32, 128, false, false>, q8_0),
            QuantFormat::IQ4_NL => gemm_of_lanes!(<32, 128, false, false>, iq4_nl),
            QuantFormat::MXFP4 => gemm_of_lanes!(<32, 12, false, false>, mxfp4),
            QuantFormat::Q2_K => gemm_of_lanes!(<16, 0, true, true>, q2_k),
            QuantFormat::Q3_K => gemm_of_lanes!(<16, 4, false, true>, q3_k),
            QuantFormat::Q4_K => gemm_of_lanes!(<32, 0, true, true>, q4_k),
            QuantFormat::Q5_K => gemm_of_lanes!(<32, 0, true, true>, q5_k),
            QuantFormat::Q6_K => gemm_of_lanes!(<16, 32, false, true>, q6_k),
            QuantFormat::IQ4_XS => gemm_of_lanes!(<32, 128, false, true>, iq4_xs),
        };
    }
    table
}

fn gemms<const MATRIX: bool>() -> [Option<Gemm>; NUM_FORMATS] {
    let mut table = [None; NUM_FORMATS];
    for format in QuantFormat::ALL {
        table[index(*format)] = match format {
            QuantFormat::BF16 if MATRIX => Some(amx_float::gemm::<false> as Gemm),
            QuantFormat::F16 if MATRIX => Some(amx_float::gemm::<true> as Gemm),
            QuantFormat::F16 => Some(float::avx512::f16_gemm as Gemm),
            QuantFormat::BF16 => Some(float::avx512::bf16_gemm as Gemm),
            QuantFormat::F32 | QuantFormat::Q8_K => None,
            QuantFormat::Q4_0 => gemm!(gemm_blocks::<false>, q4_0_panel),
            QuantFormat::Q4_1 => gemm!(gemm_blocks::<true>, q4_1_panel),
            QuantFormat::Q5_0 => gemm!(gemm_blocks::<false>, q5_0_panel),
            QuantFormat::Q5_1 => gemm!(gemm_blocks::<true>, q5_1_panel),
            QuantFormat::Q8_0 => gemm!(gemm_blocks::<false>, q8_0_panel),
            QuantFormat::IQ4_NL => gemm!(gemm_blocks::<false>, iq4_nl_panel),
            QuantFormat::MXFP4 => gemm!(gemm_blocks::<false>, mxfp4_panel),
            QuantFormat::Q2_K => gemm!(gemm_super::<8>, q2_k_panel),
            QuantFormat::Q3_K => gemm!(gemm_super::<0>, q3_k_panel),
            QuantFormat::Q4_K => gemm!(gemm_super::<4>, q4_k_panel),
            QuantFormat::Q5_K => gemm!(gemm_super::<4>, q5_k_panel),
            QuantFormat::Q6_K => gemm!(gemm_super::<0>, q6_k_panel),
            QuantFormat::IQ4_XS => gemm!(gemm_super::<0>, iq4_xs_panel),
        };
    }
    table
}

/// Which of the tables have an entry for format number `index`.
pub(super) fn many_token_kernels(index: usize) -> [bool; 3] {
    [gemms256(), gemms::<false>(), gemms::<true>()].map(|table| table[index].is_some())
}

pub(super) fn amx_kernels(proof: Amx) -> CpuKernels {
    CpuKernels { name: "amx", gemm: lanes_then::<true>(), ..avx512_kernels(proof.avx512()) }
}

#[inline]
#[target_feature(enable = "avx")]
fn load_128<T: Pod>(src: &T) -> __m128i {
    const { assert!(size_of::<T>() == 16) }
    // SAFETY: `src` is a reference to 16 readable bytes; the load needs no alignment.
    unsafe { _mm_loadu_si128(std::ptr::from_ref(src).cast()) }
}

#[inline]
#[target_feature(enable = "avx")]
fn load_256<T: Pod>(src: &T) -> __m256i {
    const { assert!(size_of::<T>() == 32) }
    // SAFETY: `src` is a reference to 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(std::ptr::from_ref(src).cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_512<T: Pod>(src: &T) -> __m512i {
    const { assert!(size_of::<T>() == 64) }
    // SAFETY: `src` is a reference to 64 readable bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(std::ptr::from_ref(src).cast()) }
}

#[inline]
#[target_feature(enable = "avx")]
fn load_f32x8(src: &[f32; 8]) -> __m256 {
    _mm256_castsi256_ps(load_256(src))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_f32x16(src: &[f32; 16]) -> __m512 {
    _mm512_castsi512_ps(load_512(src))
}

#[inline]
#[target_feature(enable = "avx")]
fn store_128<T: Pod>(out: &mut T, v: __m128i) {
    const { assert!(size_of::<T>() == 16) }
    // SAFETY: `out` is a reference to 16 writable bytes of a type that takes any bits; the store needs no alignment.
    unsafe { _mm_storeu_si128(std::ptr::from_mut(out).cast(), v) }
}

#[inline]
#[target_feature(enable = "avx")]
fn store_256<T: Pod>(out: &mut T, v: __m256i) {
    const { assert!(size_of::<T>() == 32) }
    // SAFETY: `out` is a reference to 32 writable bytes of a type that takes any bits; the store needs no alignment.
    unsafe { _mm256_storeu_si256(std::ptr::from_mut(out).cast(), v) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_512<T: Pod>(out: &mut T, v: __m512i) {
    const { assert!(size_of::<T>() == 64) }
    // SAFETY: `out` is a reference to 64 writable bytes of a type that takes any bits; the store needs no alignment.
    unsafe { _mm512_storeu_si512(std::ptr::from_mut(out).cast(), v) }
}

/// A half-precision field of a block.
#[inline]
#[target_feature(enable = "f16c")]
fn half_field(bytes: [u8; 2]) -> f32 {
    let value: __m128;
    // Written out because LLVM turns the intrinsics into an insertion into whatever register is at hand (`vpinsrw`): when that
    // is the running sum, every block waits for the block before it, which halved the speed of Q4_0.
    // SAFETY: touches registers only, and the function requires the feature the second instruction needs.
    unsafe {
        std::arch::asm!(
            "vmovd {value}, {bits:e}",
            "vcvtph2ps {value}, {value}",
            bits = in(reg) u32::from(u16::from_le_bytes(bytes)),
            value = out(xmm_reg) value,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    _mm_cvtss_f32(value)
}

#[inline]
#[target_feature(enable = "avx")]
fn sum_f32x8(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn sum_i32x8(v: __m256i) -> i32 {
    let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
    _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v)))
}
