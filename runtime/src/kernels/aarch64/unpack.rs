//! Blocks of every format to signed bytes in element order, with their scales.
//!
//! Formats in blocks of 32 give two registers, super-blocks half by half eight registers, each register a group of 16 weights.

use super::{load_i8, load_u8};
use crate::quant::{
    BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K,
    BlockQ6K, BlockQ8_0, IQ4_VALUES, MXFP4_VALUES, unpack_scales,
};
use half::f16;
use std::arch::aarch64::*;

/// A half-precision field of a block.
#[inline]
pub(super) fn half_field(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}

/// Low and high nibbles of 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
fn nibbles(bytes: uint8x16_t) -> [uint8x16_t; 2] {
    [vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes)]
}

#[inline]
#[target_feature(enable = "neon")]
fn signed(codes: uint8x16_t) -> int8x16_t {
    vreinterpretq_s8_u8(codes)
}

#[inline]
#[target_feature(enable = "neon")]
fn minus(codes: uint8x16_t, offset: i8) -> int8x16_t {
    vsubq_s8(signed(codes), vdupq_n_s8(offset))
}

#[inline]
#[target_feature(enable = "neon")]
fn look_up(table: &[i8; 16], codes: &[u8; 16]) -> [int8x16_t; 2] {
    let table = load_i8(table);
    nibbles(load_u8(codes)).map(|c| vqtbl1q_s8(table, c))
}

/// 16 in every byte whose bit is set in `high`.
#[inline]
#[target_feature(enable = "neon")]
fn fifth_bits(high: [u8; 4]) -> [uint8x16_t; 2] {
    static BITS: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
    let of = |a: u8, b: u8| {
        let bytes = vcombine_u8(vdup_n_u8(a), vdup_n_u8(b));
        vandq_u8(vtstq_u8(bytes, load_u8(&BITS)), vdupq_n_u8(16))
    };
    [of(high[0], high[1]), of(high[2], high[3])]
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn q4_0(b: &BlockQ4_0) -> [int8x16_t; 2] {
    nibbles(load_u8(&b.codes)).map(|c| minus(c, 8))
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn q4_1(b: &BlockQ4_1) -> [int8x16_t; 2] {
    nibbles(load_u8(&b.codes)).map(|c| signed(c))
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn q5_0(b: &BlockQ5_0) -> [int8x16_t; 2] {
    let ([a, c], [high_a, high_c]) = (nibbles(load_u8(&b.codes)), fifth_bits(b.high));
    [minus(vorrq_u8(a, high_a), 16), minus(vorrq_u8(c, high_c), 16)]
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn q5_1(b: &BlockQ5_1) -> [int8x16_t; 2] {
    let ([a, c], [high_a, high_c]) = (nibbles(load_u8(&b.codes)), fifth_bits(b.high));
    [signed(vorrq_u8(a, high_a)), signed(vorrq_u8(c, high_c))]
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn q8_0(b: &BlockQ8_0) -> [int8x16_t; 2] {
    let halves = b.codes.as_chunks::<16>().0;
    [load_i8(&halves[0]), load_i8(&halves[1])]
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn iq4_nl(b: &BlockIq4Nl) -> [int8x16_t; 2] {
    look_up(&IQ4_VALUES, &b.codes)
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn mxfp4(b: &BlockMxfp4) -> [int8x16_t; 2] {
    look_up(&MXFP4_VALUES, &b.codes)
}

/// The nibbles of one half of a super-block of Q4_K or Q5_K: 64 weights per 32 bytes, low nibbles first.
#[inline]
#[target_feature(enable = "neon")]
fn nibble_half(codes: &[u8; 128], half: usize) -> [uint8x16_t; 8] {
    let parts = &codes.as_chunks::<16>().0[4 * half..][..4];
    let [a, b, c, d] = [0, 1, 2, 3].map(|i| nibbles(load_u8(&parts[i])));
    [a[0], b[0], a[1], b[1], c[0], d[0], c[1], d[1]]
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn q4_k(b: &BlockQ4K, half: usize) -> [int8x16_t; 8] {
    nibble_half(&b.codes, half).map(|c| signed(c))
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn q5_k(b: &BlockQ5K, half: usize) -> [int8x16_t; 8] {
    let codes = nibble_half(&b.codes, half);
    let high = b.high.as_chunks::<16>().0;
    std::array::from_fn(|g| with_bit(codes[g], load_u8(&high[g % 2]), 4 * half + g / 2, 16))
}

/// Adds `value` where bit `bit` of `high` is set.
#[inline]
#[target_feature(enable = "neon")]
fn with_bit(codes: uint8x16_t, high: uint8x16_t, bit: usize, value: u8) -> int8x16_t {
    let set = vtstq_u8(high, vdupq_n_u8(1 << bit));
    signed(vorrq_u8(codes, vandq_u8(set, vdupq_n_u8(value))))
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn q6_k(b: &BlockQ6K, half: usize) -> [int8x16_t; 8] {
    let low = &b.low.as_chunks::<16>().0[4 * half..][..4];
    let high = &b.high.as_chunks::<16>().0[2 * half..][..2];
    std::array::from_fn(|g| {
        let nibble = nibbles(load_u8(&low[g % 4]))[g / 4];
        // The upper two bits of elements 32 apart share a byte.
        let shifted = vshlq_u8(load_u8(&high[g % 2]), vdupq_n_s8(-2 * (g / 2) as i8));
        let upper = vshlq_n_u8::<4>(vandq_u8(shifted, vdupq_n_u8(3)));
        minus(vorrq_u8(nibble, upper), 32)
    })
}

/// The two-bit codes of one half of a super-block of Q2_K or Q3_K.
#[inline]
#[target_feature(enable = "neon")]
fn two_bit_half(codes: &[u8; 64], half: usize) -> [uint8x16_t; 8] {
    let parts = &codes.as_chunks::<16>().0[2 * half..][..2];
    std::array::from_fn(|g| vandq_u8(vshlq_u8(load_u8(&parts[g % 2]), vdupq_n_s8(-2 * (g / 2) as i8)), vdupq_n_u8(3)))
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn q2_k(b: &BlockQ2K, half: usize) -> [int8x16_t; 8] {
    two_bit_half(&b.codes, half).map(|c| signed(c))
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn q3_k(b: &BlockQ3K, half: usize) -> [int8x16_t; 8] {
    let codes = two_bit_half(&b.codes, half);
    let high = b.high.as_chunks::<16>().0;
    // Without the third bit the code is 4 lower.
    std::array::from_fn(|g| vsubq_s8(with_bit(codes[g], load_u8(&high[g % 2]), 4 * half + g / 2, 4), vdupq_n_s8(4)))
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn iq4_xs(b: &BlockIq4Xs, half: usize) -> [int8x16_t; 8] {
    let parts = &b.codes.as_chunks::<16>().0[4 * half..][..4];
    let [a, b, c, d] = [0, 1, 2, 3].map(|i| look_up(&IQ4_VALUES, &parts[i]));
    [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
}

/// Eight numbers, each for two groups of 16.
#[inline]
fn twice_each(values: [u8; 8]) -> [u8; 16] {
    std::array::from_fn(|g| values[g / 2])
}

/// Scales and minima (factor and numbers) of a super-block's sixteen groups.
pub(super) type Groups = ([i8; 16], Option<(f32, [u8; 16])>);

#[inline]
pub(super) fn q2_k_groups(b: &BlockQ2K) -> Groups {
    (b.scales.map(|s| (s & 15).cast_signed()), Some((half_field(b.min), b.scales.map(|s| s >> 4))))
}

#[inline]
pub(super) fn q3_k_groups(b: &BlockQ3K) -> Groups {
    let scales = std::array::from_fn(|g| {
        let low = b.scales[g % 8] >> (4 * (g / 8)) & 15;
        let high = b.scales[8 + g % 4] >> (2 * (g / 4)) & 3;
        (low | high << 4).cast_signed() - 32
    });
    (scales, None)
}

#[inline]
fn with_minima(scales: &[u8; 12], min: [u8; 2]) -> Groups {
    let (scales, mins) = unpack_scales(scales);
    let scales = twice_each(scales.to_le_bytes()).map(u8::cast_signed);
    (scales, Some((half_field(min), twice_each(mins.to_le_bytes()))))
}

#[inline]
pub(super) fn q4_k_groups(b: &BlockQ4K) -> Groups {
    with_minima(&b.scales, b.min)
}

#[inline]
pub(super) fn q5_k_groups(b: &BlockQ5K) -> Groups {
    with_minima(&b.scales, b.min)
}

#[inline]
pub(super) fn q6_k_groups(b: &BlockQ6K) -> Groups {
    (b.scales, None)
}

#[inline]
pub(super) fn iq4_xs_groups(b: &BlockIq4Xs) -> Groups {
    let scales = b.sub_scales();
    (std::array::from_fn(|g| scales[g / 2]), None)
}
