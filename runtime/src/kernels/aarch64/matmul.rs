//! Products of many tokens by 8-bit matrix products (I8MM): two weight rows times two tokens per instruction.
//!
//! Two rows are decoded block by block into a panel that stays in L1 while all tokens use it; nothing is stored twice. As elsewhere a
//! block's product is one exact integer; a value's additions run over the blocks in order, whatever the other tokens.

use super::rows::minima_times_sums;
use super::unpack::*;
use super::{load_f32, load_i8, load_i32, store_f32};
use crate::kernels::gemm::{Gemm, GemmScratch, GemmTask};
use crate::quant::{
    ActivationQ8_1, ActivationQ8K, BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, mxfp4_half_scale,
};
use std::arch::aarch64::*;
use tierwise_cost::quant::QuantFormat;

/// The kernel of a format, if it has one.
pub(super) fn kernel(format: QuantFormat) -> Option<Gemm> {
    Some(match format {
        QuantFormat::Q4_0 => gemm_q4_0,
        QuantFormat::Q4_1 => gemm_q4_1,
        QuantFormat::Q5_0 => gemm_q5_0,
        QuantFormat::Q5_1 => gemm_q5_1,
        QuantFormat::Q8_0 => gemm_q8_0,
        QuantFormat::IQ4_NL => gemm_iq4_nl,
        QuantFormat::MXFP4 => gemm_mxfp4,
        QuantFormat::Q2_K => gemm_q2_k,
        QuantFormat::Q3_K => gemm_q3_k,
        QuantFormat::Q4_K => gemm_q4_k,
        QuantFormat::Q5_K => gemm_q5_k,
        QuantFormat::Q6_K => gemm_q6_k,
        QuantFormat::IQ4_XS => gemm_iq4_xs,
        QuantFormat::F32 | QuantFormat::F16 | QuantFormat::BF16 | QuantFormat::Q8_K => return None,
    })
}

/// `sums[i][j] += first row i of 8 bytes * second row j of 8 bytes`, the lanes in the order 00 01 10 11.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn add_products(sums: int32x4_t, rows: int8x16_t, tokens: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // SAFETY: touches registers only, and the function requires the feature that the instruction needs.
    unsafe {
        std::arch::asm!(
            "smmla {sums:v}.4s, {rows:v}.16b, {tokens:v}.16b",
            sums = inout(vreg) sums,
            rows = in(vreg) rows,
            tokens = in(vreg) tokens,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Two registers as two of which each has eight bytes of the one and eight of the other.
#[inline]
#[target_feature(enable = "neon")]
fn side_by_side(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    let (a, b) = (vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b));
    [vreinterpretq_s8_s64(vzip1q_s64(a, b)), vreinterpretq_s8_s64(vzip2q_s64(a, b))]
}

/// A factor per row and a factor per token to the lanes of [`add_products`].
#[inline]
#[target_feature(enable = "neon")]
fn lanes(rows: [f32; 2], tokens: [f32; 2]) -> float32x4_t {
    vmulq_f32(load_f32(&[rows[0], rows[0], rows[1], rows[1]]), load_f32(&[tokens[0], tokens[1], tokens[0], tokens[1]]))
}

/// The loop over pairs of rows, blocks and pairs of tokens. `$panel` decodes a pair of blocks, `$add` adds its product with a pair of
/// activation blocks to four sums.
macro_rules! gemm {
    ($($name:ident $block:ident $activation:ident, $panel:expr, $add:expr;)*) => {$(
        #[target_feature(enable = "neon,dotprod,i8mm")]
        fn $name(task: GemmTask<'_>, scratch: &mut GemmScratch) {
            let GemmTask { weight, row_bytes, act, tokens, out } = task;
            let n = tokens.len();
            let row = |token: u32| -> &[$activation] { bytemuck::cast_slice(act.row(token)) };
            for (weight, out) in weight.chunks(2 * row_bytes).zip(out.chunks_mut(2 * n)) {
                let (first, second) = weight.split_at(row_bytes);
                let first: &[$block] = bytemuck::cast_slice(first);
                // A last row without a partner is its own.
                let second: &[$block] = if second.is_empty() { first } else { bytemuck::cast_slice(second) };
                scratch.pairs.clear();
                scratch.pairs.resize(n.div_ceil(2), [0.0; 4]);
                for (i, pair) in first.iter().zip(second).enumerate() {
                    let panel = $panel([pair.0, pair.1]);
                    for (sums, tokens) in scratch.pairs.iter_mut().zip(tokens.chunks(2)) {
                        let x = [&row(tokens[0])[i], &row(tokens[tokens.len() - 1])[i]];
                        let sum = $add(load_f32(sums), &panel, x);
                        store_f32(sums, sum);
                    }
                }
                for (r, out) in out.chunks_mut(n).enumerate() {
                    for (out, sums) in out.chunks_mut(2).zip(&scratch.pairs) {
                        out.copy_from_slice(&sums[2 * r..][..out.len()]);
                    }
                }
            }
        }
    )*};
}

/// Two blocks of 32: codes side by side, factors and minima.
type BlockPair = ([int8x16_t; 4], [f32; 2], Option<[f32; 2]>);

#[inline]
#[target_feature(enable = "neon")]
fn block_pair(codes: [[int8x16_t; 2]; 2], scale: [f32; 2], min: Option<[f32; 2]>) -> BlockPair {
    let [low, high] = [side_by_side(codes[0][0], codes[1][0]), side_by_side(codes[0][1], codes[1][1])];
    ([low[0], low[1], high[0], high[1]], scale, min)
}

#[inline]
#[target_feature(enable = "neon,i8mm")]
fn add_blocks(sums: float32x4_t, (codes, scale, min): &BlockPair, x: [&ActivationQ8_1; 2]) -> float32x4_t {
    let mut products = vdupq_n_s32(0);
    for half in 0..2 {
        let x = x.map(|x| load_i8(&x.codes.as_chunks::<16>().0[half]));
        let x = side_by_side(x[0], x[1]);
        products = add_products(products, codes[2 * half], x[0]);
        products = add_products(products, codes[2 * half + 1], x[1]);
    }
    let sums = vfmaq_f32(sums, vcvtq_f32_s32(products), lanes(*scale, x.map(|x| x.scale)));
    match min {
        Some(min) => vaddq_f32(sums, lanes(*min, x.map(|x| x.sum))),
        None => sums,
    }
}

/// Two super-blocks: codes side by side, group scales in the lanes of the products, factors, minima.
struct SuperPair {
    codes: [[int8x16_t; 2]; 16],
    scales: [[i32; 4]; 16],
    scale: [f32; 2],
    minima: [Option<(f32, [u8; 16])>; 2],
}

#[inline]
#[target_feature(enable = "neon")]
fn super_pair(codes: [[[int8x16_t; 8]; 2]; 2], groups: [Groups; 2], scale: [f32; 2]) -> SuperPair {
    let [(a, min_a), (b, min_b)] = groups;
    SuperPair {
        codes: std::array::from_fn(|g| side_by_side(codes[0][g / 8][g % 8], codes[1][g / 8][g % 8])),
        scales: std::array::from_fn(|g| [a[g], a[g], b[g], b[g]].map(i32::from)),
        scale,
        minima: [min_a, min_b],
    }
}

#[inline]
#[target_feature(enable = "neon,i8mm")]
fn add_supers(sums: float32x4_t, panel: &SuperPair, x: [&ActivationQ8K; 2]) -> float32x4_t {
    let mut products = vdupq_n_s32(0);
    for g in 0..16 {
        let tokens = x.map(|x| load_i8(&x.codes.as_chunks::<16>().0[g]));
        let tokens = side_by_side(tokens[0], tokens[1]);
        let group = add_products(vdupq_n_s32(0), panel.codes[g][0], tokens[0]);
        let group = add_products(group, panel.codes[g][1], tokens[1]);
        products = vmlaq_s32(products, group, load_i32(&panel.scales[g]));
    }
    let factors = x.map(|x| x.scale);
    let sums = vfmaq_f32(sums, vcvtq_f32_s32(products), lanes(panel.scale, factors));
    let [Some(a), Some(b)] = &panel.minima else { return sums };
    let minimum = |(_, mins): &(f32, [u8; 16]), x: &ActivationQ8K| minima_times_sums(mins, &x.sums) as f32;
    let minima = [minimum(a, x[0]), minimum(a, x[1]), minimum(b, x[0]), minimum(b, x[1])];
    vfmsq_f32(sums, load_f32(&minima), lanes([a.0, b.0], factors))
}

/// A panel of two blocks of 32.
macro_rules! blocks {
    ($codes:ident, $scale:expr, $min:expr) => {
        |pair| {
            let pair: [&_; 2] = pair;
            block_pair(pair.map(|b| $codes(b)), pair.map($scale), $min(pair))
        }
    };
}

/// A panel of two super-blocks.
macro_rules! supers {
    ($codes:ident, $groups:ident) => {
        |pair| {
            let pair: [&_; 2] = pair;
            super_pair(pair.map(|b| [$codes(b, 0), $codes(b, 1)]), pair.map($groups), pair.map(|b| half_field(b.scale)))
        }
    };
}

gemm! {
    gemm_q4_0 BlockQ4_0 ActivationQ8_1, blocks!(q4_0, |b: &BlockQ4_0| half_field(b.scale), |_| None), add_blocks;
    gemm_q4_1 BlockQ4_1 ActivationQ8_1, blocks!(q4_1, |b: &BlockQ4_1| half_field(b.scale), |p: [&BlockQ4_1; 2]| Some(p.map(|b| half_field(b.min)))), add_blocks;
    gemm_q5_0 BlockQ5_0 ActivationQ8_1, blocks!(q5_0, |b: &BlockQ5_0| half_field(b.scale), |_| None), add_blocks;
    gemm_q5_1 BlockQ5_1 ActivationQ8_1, blocks!(q5_1, |b: &BlockQ5_1| half_field(b.scale), |p: [&BlockQ5_1; 2]| Some(p.map(|b| half_field(b.min)))), add_blocks;
    gemm_q8_0 BlockQ8_0 ActivationQ8_1, blocks!(q8_0, |b: &BlockQ8_0| half_field(b.scale), |_| None), add_blocks;
    gemm_iq4_nl BlockIq4Nl ActivationQ8_1, blocks!(iq4_nl, |b: &BlockIq4Nl| half_field(b.scale), |_| None), add_blocks;
    gemm_mxfp4 BlockMxfp4 ActivationQ8_1, blocks!(mxfp4, |b: &BlockMxfp4| mxfp4_half_scale(b.exponent), |_| None), add_blocks;
    gemm_q2_k BlockQ2K ActivationQ8K, supers!(q2_k, q2_k_groups), add_supers;
    gemm_q3_k BlockQ3K ActivationQ8K, supers!(q3_k, q3_k_groups), add_supers;
    gemm_q4_k BlockQ4K ActivationQ8K, supers!(q4_k, q4_k_groups), add_supers;
    gemm_q5_k BlockQ5K ActivationQ8K, supers!(q5_k, q5_k_groups), add_supers;
    gemm_q6_k BlockQ6K ActivationQ8K, supers!(q6_k, q6_k_groups), add_supers;
    gemm_iq4_xs BlockIq4Xs ActivationQ8K, supers!(iq4_xs, iq4_xs_groups), add_supers;
}
