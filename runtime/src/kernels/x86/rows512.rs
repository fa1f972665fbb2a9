//! Formats in blocks of 32 weights against 8-bit activations: two blocks per 512-bit register, several weight rows at once.
//!
//! With one token the products are limited by the number of instructions, not by memory, when every row prepares everything for
//! itself: at 17 bytes per 32 weights (MXFP4) the processor could read twice as fast as it multiplied. Here rows share what
//! depends on the activations alone (loads, scales, and the offset that makes the codes unsigned), and a block needs no sign
//! tricks: codes are made unsigned by an offset, and the dot product starts from minus that offset times the activations. All of
//! it is exact integer arithmetic, so each lane is what `wide32` computes.
//!
//! A row's result does not depend on how many rows or tokens are computed with it.

use super::wide32::fifth_bits;
use super::{activation_blocks, ahead_of_rows, fetch_ahead, load_128, load_256};
use crate::quant::{
    ActivationQ8_1, BlockIq4Nl, BlockMxfp4, BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0, IQ4_VALUES, MXFP4_VALUES,
    mxfp4_half_scale,
};
use std::arch::x86_64::*;

/// The upper half of a register of 16 numbers.
const UPPER: __mmask16 = 0xFF00;

/// The 16 bytes of the first block in the lower half of a register, twice, those of the second in the upper half.
#[inline]
#[target_feature(enable = "avx512f")]
fn twice(first: &[u8; 16], second: &[u8; 16]) -> __m512i {
    _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(load_128(first)), UPPER, load_128(second))
}

/// The nibbles of two blocks in element order.
#[inline]
#[target_feature(enable = "avx512f")]
fn nibbles(first: &[u8; 16], second: &[u8; 16]) -> __m512i {
    let shift = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    _mm512_and_si512(_mm512_srlv_epi64(twice(first, second), shift), _mm512_set1_epi8(15))
}

/// A table of values made unsigned.
const fn raised(values: &[i8; 16], offset: i16) -> [u8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = (values[i] as i16 + offset) as u8;
        i += 1;
    }
    out
}

pub(super) static MXFP4_RAISED: [u8; 16] = raised(&MXFP4_VALUES, 12);
pub(super) static IQ4_RAISED: [u8; 16] = raised(&IQ4_VALUES, 128);

/// `half_scale` of every exponent: a load instead of a shift, a move and a broadcast.
pub(super) static MXFP4_SCALES: [f32; 256] = {
    let mut out = [0.0; 256];
    let mut i = 0;
    while i < 256 {
        out[i] = mxfp4_half_scale(i as u8);
        i += 1;
    }
    out
};

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn look_up(table: &[u8; 16], first: &[u8; 16], second: &[u8; 16]) -> __m512i {
    _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_128(table)), nibbles(first, second))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn halves(first: __m256i, second: __m256i) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q4_0(a: &BlockQ4_0, b: &BlockQ4_0) -> __m512i {
    nibbles(&a.codes, &b.codes)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q4_1(a: &BlockQ4_1, b: &BlockQ4_1) -> __m512i {
    nibbles(&a.codes, &b.codes)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q5_0(a: &BlockQ5_0, b: &BlockQ5_0) -> __m512i {
    _mm512_or_si512(nibbles(&a.codes, &b.codes), halves(fifth_bits(a.high), fifth_bits(b.high)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q5_1(a: &BlockQ5_1, b: &BlockQ5_1) -> __m512i {
    _mm512_or_si512(nibbles(&a.codes, &b.codes), halves(fifth_bits(a.high), fifth_bits(b.high)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q8_0(a: &BlockQ8_0, b: &BlockQ8_0) -> __m512i {
    // Adds 128, modulo 256.
    _mm512_xor_si512(halves(load_256(&a.codes), load_256(&b.codes)), _mm512_set1_epi8(-128))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn iq4_nl(a: &BlockIq4Nl, b: &BlockIq4Nl) -> __m512i {
    look_up(&IQ4_RAISED, &a.codes, &b.codes)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn mxfp4(a: &BlockMxfp4, b: &BlockMxfp4) -> __m512i {
    look_up(&MXFP4_RAISED, &a.codes, &b.codes)
}

/// One number in the lower half of the lanes, another in the upper.
#[inline]
#[target_feature(enable = "avx512f")]
fn pair_of(lower: f32, upper: f32) -> __m512 {
    _mm512_mask_broadcastss_ps(_mm512_set1_ps(lower), UPPER, _mm_set_ss(upper))
}

/// Two half-precision numbers, each in half of the lanes.
#[inline]
#[target_feature(enable = "avx512f,f16c")]
fn pair_of_halves(lower: [u8; 2], upper: [u8; 2]) -> __m512 {
    let both = i32::from(u16::from_le_bytes(lower)) | i32::from(u16::from_le_bytes(upper)) << 16;
    let numbers = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi32_si128(both)));
    _mm512_permutexvar_ps(_mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0), numbers)
}

/// Scales and minima of two blocks: scale, minimum, scale, minimum.
#[inline]
#[target_feature(enable = "avx512f,f16c")]
fn two_pairs_of_halves(bytes: [[u8; 2]; 4]) -> (__m512, Option<__m512>) {
    let four = i64::from_le_bytes(bytemuck::cast(bytes));
    let numbers = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi64_si128(four)));
    let scales = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
    let minima = _mm512_set_epi32(3, 3, 3, 3, 3, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1);
    (_mm512_permutexvar_ps(scales, numbers), Some(_mm512_permutexvar_ps(minima, numbers)))
}

/// What two blocks of activations are to every weight row.
#[derive(Clone, Copy)]
struct Shared {
    codes: __m512i,
    /// Minus the offset of the codes times the activations: what the dot product starts from.
    start: __m512i,
    scale: __m512,
    /// The sums of the activations, in one lane of each half: what minima are multiplied with.
    sums: __m512,
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn shared<const OFFSET: i16>(a: &ActivationQ8_1, b: &ActivationQ8_1) -> Shared {
    let (codes, zero) = (halves(load_256(&a.codes), load_256(&b.codes)), _mm512_setzero_si512());
    let start =
        if OFFSET == 0 { zero } else { _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(OFFSET as i8), codes)) };
    let sums = _mm512_maskz_mov_ps(0x0101, pair_of(a.sum, b.sum));
    Shared { codes, start, scale: pair_of(a.scale, b.scale), sums }
}

macro_rules! rows {
    ($($name:ident $block:ident $codes:ident, $offset:literal, $factors:expr;)*) => {$(
        /// `R` weight rows of `row` bytes each with `T` activation rows: `[R][T]`.
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
        pub(super) fn $name<const R: usize, const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [[f32; T]; R] {
            let all: &[$block] = bytemuck::cast_slice(weight);
            let blocks = all.len() / R;
            let x = activation_blocks::<ActivationQ8_1, T>(x, blocks);
            let mut rows: [&[$block]; R] = [&[]; R];
            for r in 0..R {
                rows[r] = &all[r * blocks..][..blocks];
            }
            let mut sums = [[_mm512_setzero_ps(); T]; R];
            for i in 0..blocks / 2 {
                let mut activations = [shared::<$offset>(&x[0][2 * i], &x[0][2 * i + 1]); T];
                for t in 1..T {
                    activations[t] = shared::<$offset>(&x[t][2 * i], &x[t][2 * i + 1]);
                }
                for r in 0..R {
                    let (a, b) = (&rows[r][2 * i], &rows[r][2 * i + 1]);
                    if R > 1 {
                        fetch_ahead(a, ahead_of_rows::<R>(size_of_val(rows[r])));
                    }
                    let codes = $codes(a, b);
                    let (scale, min): (__m512, Option<__m512>) = $factors(a, b);
                    for t in 0..T {
                        let s = activations[t];
                        let products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(s.start, codes, s.codes));
                        sums[r][t] = _mm512_fmadd_ps(_mm512_mul_ps(scale, s.scale), products, sums[r][t]);
                        if let Some(min) = min {
                            sums[r][t] = _mm512_fmadd_ps(min, s.sums, sums[r][t]);
                        }
                    }
                }
            }
            if blocks % 2 == 1 {
                let i = blocks - 1;
                for t in 0..T {
                    let s = shared::<$offset>(&x[t][i], &x[t][i]);
                    for r in 0..R {
                        let a = &rows[r][i];
                        let products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(s.start, $codes(a, a), s.codes));
                        let (scale, min): (__m512, Option<__m512>) = $factors(a, a);
                        // The block is in both halves: only the lower counts.
                        sums[r][t] = _mm512_mask3_fmadd_ps(_mm512_mul_ps(scale, s.scale), products, sums[r][t], !UPPER);
                        if let Some(min) = min {
                            sums[r][t] = _mm512_mask3_fmadd_ps(min, s.sums, sums[r][t], !UPPER);
                        }
                    }
                }
            }
            let mut out = [[0f32; T]; R];
            for r in 0..R {
                for t in 0..T {
                    out[r][t] = _mm512_reduce_add_ps(sums[r][t]);
                }
            }
            out
        }
    )*};
}

rows! {
    q4_0_rows BlockQ4_0 q4_0, 8, |a: &BlockQ4_0, b: &BlockQ4_0| (pair_of_halves(a.scale, b.scale), None);
    q4_1_rows BlockQ4_1 q4_1, 0, |a: &BlockQ4_1, b: &BlockQ4_1| two_pairs_of_halves([a.scale, a.min, b.scale, b.min]);
    q5_0_rows BlockQ5_0 q5_0, 16, |a: &BlockQ5_0, b: &BlockQ5_0| (pair_of_halves(a.scale, b.scale), None);
    q5_1_rows BlockQ5_1 q5_1, 0, |a: &BlockQ5_1, b: &BlockQ5_1| two_pairs_of_halves([a.scale, a.min, b.scale, b.min]);
    q8_0_rows BlockQ8_0 q8_0, 128, |a: &BlockQ8_0, b: &BlockQ8_0| (pair_of_halves(a.scale, b.scale), None);
    iq4_nl_rows BlockIq4Nl iq4_nl, 128, |a: &BlockIq4Nl, b: &BlockIq4Nl| (pair_of_halves(a.scale, b.scale), None);
    mxfp4_rows BlockMxfp4 mxfp4, 12, |a: &BlockMxfp4, b: &BlockMxfp4| {
        (pair_of(MXFP4_SCALES[usize::from(a.exponent)], MXFP4_SCALES[usize::from(b.exponent)]), None)
    };
}
