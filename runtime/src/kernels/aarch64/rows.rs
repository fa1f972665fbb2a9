//! Quantised weight rows against 8-bit activations, with NEON alone and with 8-bit dot products.
//!
//! A register holds 16 weights; products of a block of 32 and products times group scale of a super-block are exact integers, as in
//! the scalar versions, turned to f32 once per block.

use super::unpack::*;
use super::{activation_blocks, load_i8, load_i16};
use crate::quant::{
    ActivationQ8_1, ActivationQ8K, BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, mxfp4_half_scale,
};
use std::arch::aarch64::*;

/// Four sums of four signed products each, NEON alone: a product of bytes is at most 128 * 127, which 16 bits hold.
#[inline]
#[target_feature(enable = "neon")]
fn add_widening(sums: int32x4_t, weight: int8x16_t, x: int8x16_t) -> int32x4_t {
    let low = vmull_s8(vget_low_s8(weight), vget_low_s8(x));
    vpadalq_s16(vpadalq_s16(sums, low), vmull_high_s8(weight, x))
}

/// The same with one instruction.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add_dots(sums: int32x4_t, weight: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // SAFETY: touches registers only, and the function requires the feature that the instruction needs.
    unsafe {
        std::arch::asm!(
            "sdot {sums:v}.4s, {weight:v}.16b, {x:v}.16b",
            sums = inout(vreg) sums,
            weight = in(vreg) weight,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Minima times sums of activations of sixteen groups.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn minima_times_sums(mins: &[u8; 16], sums: &[i16; 16]) -> i32 {
    let (mins, sums) = (mins.map(i16::from), sums.as_chunks::<8>().0);
    let mins = mins.as_chunks::<8>().0;
    let mut total = vdupq_n_s32(0);
    for (mins, sums) in mins.iter().zip(sums) {
        let (mins, sums) = (load_i16(mins), load_i16(sums));
        total = vmlal_s16(total, vget_low_s16(mins), vget_low_s16(sums));
        total = vmlal_high_s16(total, mins, sums);
    }
    vaddvq_s32(total)
}

macro_rules! rows_of_32 {
    ($features:literal, $add:ident: $($name:ident $block:ident $codes:ident, $scale:expr, $min:expr;)*) => {$(
        #[target_feature(enable = $features)]
        pub(in crate::kernels::aarch64) fn $name<const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [f32; T] {
            let weight: &[$block] = bytemuck::cast_slice(weight);
            let x = activation_blocks::<ActivationQ8_1, T>(x, weight.len());
            let mut sums = [vdupq_n_f32(0.0); T];
            let mut minima = [0f32; T];
            for (i, block) in weight.iter().enumerate() {
                let [low, high] = $codes(block);
                let scale: f32 = $scale(block);
                let min: Option<f32> = $min(block);
                for t in 0..T {
                    let x = &x[t][i];
                    let halves = x.codes.as_chunks::<16>().0;
                    let products = $add($add(vdupq_n_s32(0), low, load_i8(&halves[0])), high, load_i8(&halves[1]));
                    sums[t] = vfmaq_n_f32(sums[t], vcvtq_f32_s32(products), scale * x.scale);
                    if let Some(min) = min {
                        minima[t] += min * x.sum;
                    }
                }
            }
            std::array::from_fn(|t| vaddvq_f32(sums[t]) + minima[t])
        }
    )*};
}

macro_rules! rows_of_256 {
    ($features:literal, $add:ident: $($name:ident $block:ident $codes:ident $groups:ident;)*) => {$(
        #[target_feature(enable = $features)]
        pub(in crate::kernels::aarch64) fn $name<const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [f32; T] {
            let weight: &[$block] = bytemuck::cast_slice(weight);
            let x = activation_blocks::<ActivationQ8K, T>(x, weight.len());
            let mut sums = [vdupq_n_f32(0.0); T];
            let mut minima = [0f32; T];
            for (i, block) in weight.iter().enumerate() {
                let scale = half_field(block.scale);
                let (scales, mins) = $groups(block);
                let mut products = [vdupq_n_s32(0); T];
                for half in 0..2 {
                    let codes = $codes(block, half);
                    for g in 0..8 {
                        let group = 8 * half + g;
                        for t in 0..T {
                            let x = load_i8(&x[t][i].codes.as_chunks::<16>().0[group]);
                            let dots = $add(vdupq_n_s32(0), codes[g], x);
                            products[t] = vmlaq_n_s32(products[t], dots, i32::from(scales[group]));
                        }
                    }
                }
                for t in 0..T {
                    let x = &x[t][i];
                    sums[t] = vfmaq_n_f32(sums[t], vcvtq_f32_s32(products[t]), scale * x.scale);
                    if let Some((min, mins)) = &mins {
                        minima[t] -= min * x.scale * minima_times_sums(mins, &x.sums) as f32;
                    }
                }
            }
            std::array::from_fn(|t| vaddvq_f32(sums[t]) + minima[t])
        }
    )*};
}

macro_rules! all_rows {
    ($features:literal, $add:ident) => {
        use super::*;
        rows_of_32! { $features, $add:
            q4_0_row BlockQ4_0 q4_0, |b: &BlockQ4_0| half_field(b.scale), |_| None;
            q4_1_row BlockQ4_1 q4_1, |b: &BlockQ4_1| half_field(b.scale), |b: &BlockQ4_1| Some(half_field(b.min));
            q5_0_row BlockQ5_0 q5_0, |b: &BlockQ5_0| half_field(b.scale), |_| None;
            q5_1_row BlockQ5_1 q5_1, |b: &BlockQ5_1| half_field(b.scale), |b: &BlockQ5_1| Some(half_field(b.min));
            q8_0_row BlockQ8_0 q8_0, |b: &BlockQ8_0| half_field(b.scale), |_| None;
            iq4_nl_row BlockIq4Nl iq4_nl, |b: &BlockIq4Nl| half_field(b.scale), |_| None;
            mxfp4_row BlockMxfp4 mxfp4, |b: &BlockMxfp4| mxfp4_half_scale(b.exponent), |_| None;
        }
        rows_of_256! { $features, $add:
            q2_k_row BlockQ2K q2_k q2_k_groups;
            q3_k_row BlockQ3K q3_k q3_k_groups;
            q4_k_row BlockQ4K q4_k q4_k_groups;
            q5_k_row BlockQ5K q5_k q5_k_groups;
            q6_k_row BlockQ6K q6_k q6_k_groups;
            iq4_xs_row BlockIq4Xs iq4_xs iq4_xs_groups;
        }
    };
}

pub(super) mod neon {
    all_rows!("neon", add_widening);
}

pub(super) mod dotprod {
    all_rows!("neon,dotprod", add_dots);
}
