//! Formats in blocks of 32 weights against 8-bit activations.
//!
//! Each format only says how to turn a block into 32 signed bytes; the loop is the same for all. One block fills one 256-bit
//! register. Both instruction sets (AVX2 with and without AVX-VNNI; `rows512` is for AVX-512) multiply magnitudes
//! (unsigned) by activations that take the weight's sign, because the hardware wants one unsigned operand. This is exact:
//! |w| <= 128 and |x| <= 127, so even the 16-bit pair sums of AVX2 stay within 2 * 128 * 127 < 2^15.
//! Even and odd blocks use separate sums, which hides the latency of the addition.

use super::{activation_blocks, load_128, load_256, sum_f32x8};
use crate::quant::{
    ActivationQ8_1, BlockIq4Nl, BlockMxfp4, BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0, IQ4_VALUES, MXFP4_VALUES,
    mxfp4_half_scale,
};
use bytemuck::Pod;
use std::arch::x86_64::*;

/// Nibbles of 16 bytes: low ones in the lower lane, high ones in the upper.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(codes: &[u8; 16]) -> __m256i {
    let bytes = _mm256_broadcastsi128_si256(load_128(codes));
    let shift = _mm256_set_m128i(_mm_set1_epi32(4), _mm_setzero_si128());
    _mm256_and_si256(_mm256_srlv_epi32(bytes, shift), _mm256_set1_epi8(15))
}

/// The first two half-precision numbers of a block, each in every lane. In formats without a minimum the second is code bits
/// and must not be used. (One broadcast load and one conversion; through scalars it takes three shuffles more.)
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn leading_halves<B: Pod>(block: &B) -> (__m256, __m256) {
    let bytes = bytemuck::bytes_of(block).first_chunk::<4>().expect("every block is longer than four bytes");
    let alternating = _mm256_cvtph_ps(_mm_set1_epi32(i32::from_le_bytes(*bytes)));
    (_mm256_moveldup_ps(alternating), _mm256_movehdup_ps(alternating))
}

/// 16 in every byte whose bit is set in `high`.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn fifth_bits(high: [u8; 4]) -> __m256i {
    // Byte i gets a copy of byte i / 8 of `high` and tests bit i % 8.
    let spread = _mm256_set_epi64x(0x0303_0303_0303_0303, 0x0202_0202_0202_0202, 0x0101_0101_0101_0101, 0);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(high)), spread);
    let is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    _mm256_and_si256(is_set, _mm256_set1_epi8(16))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn look_up(table: &[i8; 16], codes: &[u8; 16]) -> __m256i {
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_128(table)), nibbles(codes))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q4_0(b: &BlockQ4_0) -> __m256i {
    _mm256_sub_epi8(nibbles(&b.codes), _mm256_set1_epi8(8))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q4_1(b: &BlockQ4_1) -> __m256i {
    nibbles(&b.codes)
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q5_0(b: &BlockQ5_0) -> __m256i {
    _mm256_sub_epi8(_mm256_or_si256(nibbles(&b.codes), fifth_bits(b.high)), _mm256_set1_epi8(16))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q5_1(b: &BlockQ5_1) -> __m256i {
    _mm256_or_si256(nibbles(&b.codes), fifth_bits(b.high))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q8_0(b: &BlockQ8_0) -> __m256i {
    load_256(&b.codes)
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn iq4_nl(b: &BlockIq4Nl) -> __m256i {
    look_up(&IQ4_VALUES, &b.codes)
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn mxfp4(b: &BlockMxfp4) -> __m256i {
    look_up(&MXFP4_VALUES, &b.codes)
}

/// Sums of four signed products each, AVX2.
#[inline]
#[target_feature(enable = "avx2")]
fn dot_avx2(weight: __m256i, x: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight));
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}

/// Sums of four signed products each, AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn dot_vnni(weight: __m256i, x: __m256i) -> __m256i {
    _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), _mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight))
}

macro_rules! rows {
    ($features:literal, $dot:ident: $($name:ident $block:ident $codes:ident, $scale:expr, $min:expr;)*) => {$(
        #[target_feature(enable = $features)]
        pub(in crate::kernels::x86) fn $name<const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [f32; T] {
            let weight: &[$block] = bytemuck::cast_slice(weight);
            let x = activation_blocks::<ActivationQ8_1, T>(x, weight.len());
            let add = |block: &$block, i: usize, sums: &mut [__m256; T], minima: &mut [f32; T]| {
                let codes = $codes(block);
                let scale: __m256 = $scale(block);
                let min: Option<__m256> = $min(block);
                for t in 0..T {
                    let x = &x[t][i];
                    let products = _mm256_cvtepi32_ps($dot(codes, load_256(&x.codes)));
                    sums[t] = _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_set1_ps(x.scale)), products, sums[t]);
                    if let Some(min) = min {
                        minima[t] += _mm256_cvtss_f32(min) * x.sum;
                    }
                }
            };
            let mut sums = [[_mm256_setzero_ps(); T]; 2];
            let mut minima = [[0f32; T]; 2];
            // Written in pairs, not with `i % 2`: the sums must have constant indices to live in registers.
            let (pairs, last) = weight.as_chunks::<2>();
            for (i, pair) in pairs.iter().enumerate() {
                for (k, block) in pair.iter().enumerate() {
                    add(block, 2 * i + k, &mut sums[k], &mut minima[k]);
                }
            }
            if let [block] = last {
                add(block, weight.len() - 1, &mut sums[0], &mut minima[0]);
            }
            std::array::from_fn(|t| sum_f32x8(_mm256_add_ps(sums[0][t], sums[1][t])) + (minima[0][t] + minima[1][t]))
        }
    )*};
}

macro_rules! all_rows {
    ($features:literal, $dot:ident) => {
        use super::*;
        rows! { $features, $dot:
            q4_0_row BlockQ4_0 q4_0, |b| leading_halves(b).0, |_| None;
            q4_1_row BlockQ4_1 q4_1, |b| leading_halves(b).0, |b| Some(leading_halves(b).1);
            q5_0_row BlockQ5_0 q5_0, |b| leading_halves(b).0, |_| None;
            q5_1_row BlockQ5_1 q5_1, |b| leading_halves(b).0, |b| Some(leading_halves(b).1);
            q8_0_row BlockQ8_0 q8_0, |b| leading_halves(b).0, |_| None;
            iq4_nl_row BlockIq4Nl iq4_nl, |b| leading_halves(b).0, |_| None;
            mxfp4_row BlockMxfp4 mxfp4, |b: &BlockMxfp4| _mm256_set1_ps(mxfp4_half_scale(b.exponent)), |_| None;
        }
    };
}

pub(super) mod avx2 {
    all_rows!("avx2,fma,f16c", dot_avx2);
}

pub(super) mod vnni {
    all_rows!("avx2,fma,f16c,avxvnni", dot_vnni);
}
