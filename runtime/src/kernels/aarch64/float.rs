//! F32, F16 and BF16 weights against f32 activations: widen exactly, multiply and add in f32. Many tokens: `kernels::gemm_float`.

use super::attention::{Pair, load_pair, multiply_add, store, sums, zero};
use super::{activation_blocks, load_f32};
use crate::kernels::ActivationBuf;
use crate::kernels::gemm::{GemmScratch, GemmTask};
use crate::kernels::gemm_float::{PIECE, float_gemm, tokens_per_pass};
use std::arch::aarch64::*;
use std::ops::Range;

/// Four halves, widened (the instruction is part of NEON; Rust's intrinsic asks for more).
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn widen(halves: uint16x4_t) -> float32x4_t {
    let out: float32x4_t;
    // SAFETY: touches registers only; the instruction belongs to NEON.
    unsafe {
        std::arch::asm!("fcvtl {out:v}.4s, {halves:v}.4h", out = out(vreg) out, halves = in(vreg) halves, options(pure, nomem, nostack, preserves_flags));
    }
    out
}

#[inline]
#[target_feature(enable = "neon")]
fn from_f32(bytes: &[u8; 16]) -> float32x4_t {
    vreinterpretq_f32_u8(super::load_u8(bytes))
}

#[inline]
#[target_feature(enable = "neon")]
fn from_f16(bytes: &[u8; 8]) -> float32x4_t {
    widen(vcreate_u16(u64::from_le_bytes(*bytes)))
}

#[inline]
#[target_feature(enable = "neon")]
fn from_bf16(bytes: &[u8; 8]) -> float32x4_t {
    vreinterpretq_f32_u32(vshll_n_u16::<16>(vcreate_u16(u64::from_le_bytes(*bytes))))
}

/// Sums that run beside each other, to hide the latency of the multiply-add.
const SUMS: usize = 4;

macro_rules! float_rows {
    ($($name:ident $bytes:literal $load:ident;)*) => {$(
        #[target_feature(enable = "neon")]
        pub(super) fn $name<const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [f32; T] {
            const REGISTER: usize = 4 * $bytes;
            let x = activation_blocks::<f32, T>(x, weight.len() / $bytes);
            let (registers, weight_tail) = weight.as_chunks::<REGISTER>();
            let parts = x.map(|x| x.as_chunks::<4>());
            let x: [&[[f32; 4]]; T] = parts.map(|(x, _)| &x[..registers.len()]);
            let mut sums = [[vdupq_n_f32(0.0); T]; SUMS];
            let (unrolled, rest) = registers.as_chunks::<SUMS>();
            for (i, weights) in unrolled.iter().enumerate() {
                for (s, weight) in weights.iter().enumerate() {
                    let weight = $load(weight);
                    for t in 0..T {
                        sums[s][t] = vfmaq_f32(sums[s][t], weight, load_f32(&x[t][SUMS * i + s]));
                    }
                }
            }
            for (s, weight) in rest.iter().enumerate() {
                let weight = $load(weight);
                for t in 0..T {
                    sums[s][t] = vfmaq_f32(sums[s][t], weight, load_f32(&x[t][SUMS * unrolled.len() + s]));
                }
            }
            if !weight_tail.is_empty() {
                let mut padded = [0u8; REGISTER];
                padded[..weight_tail.len()].copy_from_slice(weight_tail);
                let weight = $load(&padded);
                for t in 0..T {
                    let mut padded = [0f32; 4];
                    padded[..parts[t].1.len()].copy_from_slice(parts[t].1);
                    sums[0][t] = vfmaq_f32(sums[0][t], weight, load_f32(&padded));
                }
            }
            std::array::from_fn(|t| {
                vaddvq_f32(vaddq_f32(vaddq_f32(sums[0][t], sums[1][t]), vaddq_f32(sums[2][t], sums[3][t])))
            })
        }
    )*};
}
float_rows! {
    f32_row 4 from_f32;
    f16_row 2 from_f16;
    bf16_row 2 from_bf16;
}

/// The vectors of both halves of `bytes`.
macro_rules! pair {
    ($($name:ident $bytes:literal $of_four:ident;)*) => {$(
        #[inline]
        #[target_feature(enable = "neon")]
        fn $name(bytes: &[u8; 8 * $bytes]) -> Pair {
            let [low, high] = bytemuck::cast_ref::<_, [[u8; 4 * $bytes]; 2]>(bytes);
            [$of_four(low), $of_four(high)]
        }
    )*};
}
pair! {
    pair_of_f16 2 from_f16;
    pair_of_bf16 2 from_bf16;
}

float_gemm! { "neon", 8, zero, multiply_add, sums, load_pair, store:
    f16_gemm 2 pair_of_f16;
    bf16_gemm 2 pair_of_bf16;
}
