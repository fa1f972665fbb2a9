//! AArch64 kernels: NEON alone, with 8-bit dot products (DotProd), with 8-bit matrix products (I8MM).
//!
//! As in `x86`, owning a proof ([`Neon`], [`DotProd`], [`I8mm`]) means the processor has the features, checked at run time, and only a
//! proof makes a table. Stable Rust has no intrinsics for the two extensions, so their one instruction each is written as inline
//! assembly. Tested under emulation (CONTRIBUTING); the operations without an entry here run the scalar versions.

mod attention;
mod float;
mod matmul;
mod ops;
mod rows;
mod unpack;

use super::gemm::Gemm;
use super::{CpuKernels, NUM_FORMATS, RowDots, TILE, activation_blocks, index, per_format, scalar};
use bytemuck::Pod;
use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;
use tierwise_cost::quant::QuantFormat;

/// Proof that the processor has NEON.
#[derive(Debug, Clone, Copy)]
pub struct Neon(());

impl Neon {
    /// The proof, if the processor has the feature.
    pub fn new() -> Option<Self> {
        is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

/// Proof that the processor has 8-bit dot products and NEON.
#[derive(Debug, Clone, Copy)]
pub struct DotProd(Neon);

impl DotProd {
    /// The proof, if the processor has the features.
    pub fn new() -> Option<Self> {
        Neon::new().filter(|_| is_aarch64_feature_detected!("dotprod")).map(Self)
    }
}

/// Proof that the processor has 8-bit matrix products and all of [`DotProd`].
#[derive(Debug, Clone, Copy)]
pub struct I8mm(DotProd);

impl I8mm {
    /// The proof, if the processor has the features.
    pub fn new() -> Option<Self> {
        DotProd::new().filter(|_| is_aarch64_feature_detected!("i8mm")).map(Self)
    }
}

/// Both row kernels of a function generic over the number of tokens.
macro_rules! both {
    ($row:path) => {{
        use $row as row;
        RowDots { one: row::<1>, tile: row::<TILE>, several: None, fetches: false }
    }};
}

/// The kernels of a module of `rows`, by format.
macro_rules! quantized {
    ($format:expr, $module:ident) => {
        match $format {
            QuantFormat::F32 => both!(float::f32_row),
            QuantFormat::F16 => both!(float::f16_row),
            QuantFormat::BF16 => both!(float::bf16_row),
            QuantFormat::Q4_0 => both!(rows::$module::q4_0_row),
            QuantFormat::Q4_1 => both!(rows::$module::q4_1_row),
            QuantFormat::Q5_0 => both!(rows::$module::q5_0_row),
            QuantFormat::Q5_1 => both!(rows::$module::q5_1_row),
            QuantFormat::Q8_0 => both!(rows::$module::q8_0_row),
            QuantFormat::IQ4_NL => both!(rows::$module::iq4_nl_row),
            QuantFormat::MXFP4 => both!(rows::$module::mxfp4_row),
            QuantFormat::Q2_K => both!(rows::$module::q2_k_row),
            QuantFormat::Q3_K => both!(rows::$module::q3_k_row),
            QuantFormat::Q4_K => both!(rows::$module::q4_k_row),
            QuantFormat::Q5_K => both!(rows::$module::q5_k_row),
            QuantFormat::Q6_K => both!(rows::$module::q6_k_row),
            QuantFormat::IQ4_XS => both!(rows::$module::iq4_xs_row),
            // Never seen as weights in practice.
            QuantFormat::Q8_K => scalar::row_dots($format),
        }
    };
}

/// From so many tokens on the kernels for many run: a pair of tokens is what they multiply at once; those for few take four at a time,
/// then one.
const FEW: usize = TILE + 2;

pub(super) fn neon_kernels(_proof: Neon) -> CpuKernels {
    CpuKernels {
        name: "neon",
        dots: per_format(|format| quantized!(format, neon)),
        gemm: {
            let mut gemm = [[None; 2]; NUM_FORMATS];
            // In float32 many tokens give the bits of few.
            gemm[index(QuantFormat::F16)][0] = Some((FEW, float::f16_gemm as Gemm));
            gemm[index(QuantFormat::BF16)][0] = Some((FEW, float::bf16_gemm as Gemm));
            gemm
        },
        attend: attention::attend,
        axpy_f32: ops::axpy_f32,
        f32_to_f16: ops::f32_to_f16,
        f16_to_f32: ops::f16_to_f32,
        ..CpuKernels::SCALAR
    }
}

pub(super) fn dotprod_kernels(proof: DotProd) -> CpuKernels {
    CpuKernels { name: "dotprod", dots: per_format(|format| quantized!(format, dotprod)), ..neon_kernels(proof.0) }
}

pub(super) fn i8mm_kernels(proof: I8mm) -> CpuKernels {
    let mut kernels = CpuKernels { name: "i8mm", ..dotprod_kernels(proof.0) };
    for format in QuantFormat::ALL {
        if let Some(kernel) = matmul::kernel(*format) {
            kernels.gemm[index(*format)] = [Some((FEW, kernel)), None];
        }
    }
    kernels
}

#[inline]
#[target_feature(enable = "neon")]
fn load_u8(src: &[u8; 16]) -> uint8x16_t {
    // SAFETY: `src` is a reference to 16 readable bytes; the load needs no alignment.
    unsafe { vld1q_u8(src.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_i8(src: &[i8; 16]) -> int8x16_t {
    // SAFETY: as in `load_u8`.
    unsafe { vld1q_s8(src.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_i16(src: &[i16; 8]) -> int16x8_t {
    // SAFETY: `src` is a reference to 8 readable numbers; the load needs no more than their alignment.
    unsafe { vld1q_s16(src.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_i32(src: &[i32; 4]) -> int32x4_t {
    // SAFETY: `src` is a reference to 4 readable numbers.
    unsafe { vld1q_s32(src.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_f32(src: &[f32; 4]) -> float32x4_t {
    // SAFETY: `src` is a reference to 4 readable numbers.
    unsafe { vld1q_f32(src.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store_f32(out: &mut [f32; 4], v: float32x4_t) {
    // SAFETY: `out` is a reference to 4 writable numbers.
    unsafe { vst1q_f32(out.as_mut_ptr(), v) }
}
