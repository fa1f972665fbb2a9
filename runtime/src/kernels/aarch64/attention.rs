//! Attention over one block with pairs of 128-bit vectors: what `kernels::attention_vector` asks of an instruction set.

use super::float::widen;
use super::unpack::half_field;
use super::{load_f32, store_f32};
use crate::kernels::attention::{AttentionTile, BLOCK, KvFloats, MAX_BLOCKS, capped, subtrahend};
use crate::kernels::attention_vector::{Rows, Scales, attention_kernel, stored};
use crate::kernels::prefetch;
use std::arch::aarch64::*;

/// Eight numbers. Two registers, because with one a score would be the sum of four long partial sums instead of eight.
pub(super) type Pair = [float32x4_t; 2];

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn zero() -> Pair {
    [vdupq_n_f32(0.0); 2]
}

#[inline]
#[target_feature(enable = "neon")]
fn splat(x: f32) -> Pair {
    [vdupq_n_f32(x); 2]
}

/// `a * b + c`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn multiply_add(a: Pair, b: Pair, c: Pair) -> Pair {
    [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])]
}

#[inline]
#[target_feature(enable = "neon")]
fn multiply(a: Pair, b: Pair) -> Pair {
    [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "neon")]
fn add(a: Pair, b: Pair) -> Pair {
    [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "neon")]
fn subtract(a: Pair, b: Pair) -> Pair {
    [vsubq_f32(a[0], b[0]), vsubq_f32(a[1], b[1])]
}

/// The larger; what is not a number does not count.
#[inline]
#[target_feature(enable = "neon")]
fn larger(a: Pair, b: Pair) -> Pair {
    [vmaxnmq_f32(a[0], b[0]), vmaxnmq_f32(a[1], b[1])]
}

/// Lane `i` is the sum of the lanes of `v[i]`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn sums(v: [Pair; 8]) -> Pair {
    let four = |i: usize| {
        let halves = |i: usize| vaddq_f32(v[i][0], v[i][1]);
        let (a, b) = (vpaddq_f32(halves(i), halves(i + 1)), vpaddq_f32(halves(i + 2), halves(i + 3)));
        vpaddq_f32(a, b)
    };
    [four(0), four(4)]
}

/// 8 elements of a row, with its scales, from number `column` on.
///
/// # Safety
/// They are readable.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load<const FORMAT: u8>((row, scales): (*const u8, *const f32), column: usize) -> Pair {
    // SAFETY: the caller's; loads of bytes need no alignment.
    unsafe {
        match FORMAT {
            stored::F32 => [0, 16].map(|half| vreinterpretq_f32_u8(vld1q_u8(row.add(4 * column + half)))),
            stored::F16 => {
                let halves = vreinterpretq_u16_u8(vld1q_u8(row.add(2 * column)));
                [widen(vget_low_u16(halves)), widen(vget_high_u16(halves))]
            }
            _ => {
                let codes = vmovl_s8(vld1_s8(row.add(column / 32 * 34 + 2 + column % 32).cast()));
                let scale = *scales.add(column / 32);
                [vget_low_s16(codes), vget_high_s16(codes)].map(|c| vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(c)), scale))
            }
        }
    }
}

/// # Safety
/// 8 numbers are readable.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_numbers(from: *const f32) -> Pair {
    // SAFETY: the caller's.
    unsafe { [vld1q_f32(from), vld1q_f32(from.add(4))] }
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_pair(from: &[f32; 8]) -> Pair {
    let [low, high] = bytemuck::cast_ref::<_, [[f32; 4]; 2]>(from);
    [load_f32(low), load_f32(high)]
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn store(to: &mut [f32; 8], v: Pair) {
    let [low, high] = bytemuck::cast_mut::<_, [[f32; 4]; 2]>(to);
    store_f32(low, v[0]);
    store_f32(high, v[1]);
}

/// `e^x` of eight numbers.
#[inline]
#[target_feature(enable = "neon")]
fn exp(x: Pair) -> Pair {
    x.map(|x| exp_of_four(x))
}

/// `e^x`; 0 below the smallest normal result, finite up to its largest. The polynomial is that of the x86 kernels.
#[inline]
#[target_feature(enable = "neon")]
fn exp_of_four(x: float32x4_t) -> float32x4_t {
    let c = |v: f32| vdupq_n_f32(v);
    let too_small = vcltq_f32(x, c(-87.336_54));
    // What is not a number passes through both.
    let x = vmaxq_f32(c(-87.336_54), vminq_f32(c(88.376_26), x));
    let n = vrndnq_f32(vmulq_f32(x, c(std::f32::consts::LOG2_E)));
    let r = vfmsq_f32(vfmsq_f32(x, n, c(355.0 / 512.0)), n, c(-2.121_944_4e-4));
    let mut p = c(1.987_569_1e-4);
    for k in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = vfmaq_f32(c(k), p, r);
    }
    let p = vfmaq_f32(vaddq_f32(r, c(1.0)), p, vmulq_f32(r, r));
    // 2^n by its bits: n lies in -126..=127.
    let power = vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)));
    let e = vmulq_f32(p, vreinterpretq_f32_s32(power));
    vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(e), too_small))
}

attention_kernel! { "neon", 8, [8, 4, 2, 1], zero, splat, multiply_add, multiply, add, subtract, larger, sums, load_pair, store }
