//! Q2_K to Q6_K and IQ4_XS with 256-bit vectors.
//!
//! Per 32 weights: multiply codes and activations to 16-bit pair sums, multiply those by the group's integer scale while
//! adding to 32 bits. All of a super-block's product is one exact integer (see `quant::k_quants`), turned to f32 once.
//! The 16-bit pair sums cannot overflow: two products of a code of at most 127 with an activation of at most 127 fit.

use super::wide32::look_up;
use super::{activation_blocks, half_field, load_128, load_256, sum_f32x8};
use crate::quant::{ActivationQ8K, BlockIq4Xs, BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, IQ4_VALUES, unpack_scales};
use std::arch::x86_64::*;

/// Eight bytes as sixteen 16-bit numbers, each twice: one per group of 16 weights.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn twice_each(bytes: u64) -> __m256i {
    let words = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(bytes.cast_signed()));
    _mm256_set_m128i(_mm_unpackhi_epi16(words, words), _mm_unpacklo_epi16(words, words))
}

/// The 32 codes of sub-blocks `2 * chunk` and `2 * chunk + 1`.
#[inline]
#[target_feature(enable = "avx2")]
fn nibble_pair(codes: &[u8; 128], chunk: usize) -> [__m256i; 2] {
    let bytes = load_256(&codes.as_chunks::<32>().0[chunk]);
    let mask = _mm256_set1_epi8(15);
    [_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask)]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q4_k(b: &BlockQ4K, chunk: usize) -> [__m256i; 2] {
    nibble_pair(&b.codes, chunk)
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q5_k(b: &BlockQ5K, chunk: usize) -> [__m256i; 2] {
    let high = load_256(&b.high);
    let [even, odd] = nibble_pair(&b.codes, chunk);
    [with_fifth_bit(even, high, 1 << (2 * chunk)), with_fifth_bit(odd, high, 2 << (2 * chunk))]
}

/// Adds 16 to the codes whose byte of `high` has `bit`.
#[inline]
#[target_feature(enable = "avx2")]
fn with_fifth_bit(codes: __m256i, high: __m256i, bit: u8) -> __m256i {
    let bit = _mm256_set1_epi8(bit.cast_signed());
    let is_set = _mm256_cmpeq_epi8(_mm256_and_si256(high, bit), bit);
    _mm256_or_si256(codes, _mm256_and_si256(is_set, _mm256_set1_epi8(16)))
}

macro_rules! rows_with_minima {
    ($($name:ident $block:ident $codes:ident;)*) => {$(
        #[target_feature(enable = "avx2,fma,f16c")]
        pub(super) fn $name<const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [f32; T] {
            let weight: &[$block] = bytemuck::cast_slice(weight);
            let x = activation_blocks::<ActivationQ8K, T>(x, weight.len());
            let mut sums = [_mm256_setzero_ps(); T];
            for (i, block) in weight.iter().enumerate() {
                let (scale, min) = (half_field(block.scale), half_field(block.min));
                let (scales, mins) = unpack_scales(&block.scales);
                let mins = twice_each(mins);
                let scales = _mm256_broadcastsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(scales.cast_signed())));
                let mut products = [_mm256_setzero_si256(); T];
                for chunk in 0..4 {
                    for (k, codes) in $codes(block, chunk).into_iter().enumerate() {
                        let s = 2 * chunk + k;
                        // Both bytes of 16-bit scale `s`, in every lane.
                        let pick = _mm256_set1_epi16(0x0100 + 0x0202 * s as i16);
                        let scale = _mm256_shuffle_epi8(scales, pick);
                        for t in 0..T {
                            let x = load_256(&x[t][i].codes.as_chunks::<32>().0[s]);
                            let pairs = _mm256_maddubs_epi16(codes, x);
                            products[t] = _mm256_add_epi32(products[t], _mm256_madd_epi16(pairs, scale));
                        }
                    }
                }
                for t in 0..T {
                    let x = &x[t][i];
                    let minima = _mm256_cvtepi32_ps(_mm256_madd_epi16(mins, load_256(&x.sums)));
                    sums[t] = _mm256_fmadd_ps(_mm256_set1_ps(scale * x.scale), _mm256_cvtepi32_ps(products[t]), sums[t]);
                    sums[t] = _mm256_fnmadd_ps(_mm256_set1_ps(min * x.scale), minima, sums[t]);
                }
            }
            std::array::from_fn(|t| sum_f32x8(sums[t]))
        }
    )*};
}
rows_with_minima! {
    q4_k_row BlockQ4K q4_k;
    q5_k_row BlockQ5K q5_k;
}

/// The 128 codes of one half of a block, offset removed, in element order.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q6_k(b: &BlockQ6K, half: usize) -> [__m256i; 4] {
    let low = b.low.as_chunks::<32>().0;
    let (low0, low1) = (load_256(&low[2 * half]), load_256(&low[2 * half + 1]));
    let high = load_256(&b.high.as_chunks::<32>().0[half]);
    let (nibble, upper, offset) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30), _mm256_set1_epi8(32));
    let parts = [
        (low0, _mm256_slli_epi16::<4>(high)),
        (low1, _mm256_slli_epi16::<2>(high)),
        (_mm256_srli_epi16::<4>(low0), high),
        (_mm256_srli_epi16::<4>(low1), _mm256_srli_epi16::<2>(high)),
    ];
    parts.map(|(low, high)| {
        let code = _mm256_or_si256(_mm256_and_si256(low, nibble), _mm256_and_si256(high, upper));
        _mm256_sub_epi8(code, offset)
    })
}

/// Code `j` of each of the four that a byte of `codes` holds, for `j` = 0..4: 32 elements each.
#[inline]
#[target_feature(enable = "avx2")]
fn two_bit_codes(codes: &[u8; 64], half: usize) -> [__m256i; 4] {
    let bytes = load_256(&codes.as_chunks::<32>().0[half]);
    // Called here and not by `map`, which lacks this function's processor features and so would keep it out of line.
    let low = |v| _mm256_and_si256(v, _mm256_set1_epi8(3));
    [low(bytes), low(_mm256_srli_epi16::<2>(bytes)), low(_mm256_srli_epi16::<4>(bytes)), low(_mm256_srli_epi16::<6>(bytes))]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q2_k(b: &BlockQ2K, half: usize) -> [__m256i; 4] {
    two_bit_codes(&b.codes, half)
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q3_k(b: &BlockQ3K, half: usize) -> [__m256i; 4] {
    let high = load_256(&b.high);
    let mut codes = two_bit_codes(&b.codes, half);
    for (j, code) in codes.iter_mut().enumerate() {
        let bit = _mm256_set1_epi8((1u8 << (4 * half + j)).cast_signed());
        let is_set = _mm256_cmpeq_epi8(_mm256_and_si256(high, bit), bit);
        // Without the third bit the code is 4 lower.
        *code = _mm256_sub_epi8(*code, _mm256_andnot_si256(is_set, _mm256_set1_epi8(4)));
    }
    codes
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn iq4_xs(b: &BlockIq4Xs, half: usize) -> [__m256i; 4] {
    let parts = b.codes.as_chunks::<16>().0;
    // As in `two_bit_codes`.
    let codes = |k: usize| look_up(&IQ4_VALUES, &parts[4 * half + k]);
    [codes(0), codes(1), codes(2), codes(3)]
}

/// The sixteen group scales, as signed bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q6_k_scales(b: &BlockQ6K) -> __m128i {
    load_128(&b.scales)
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q2_k_scales(b: &BlockQ2K) -> __m128i {
    _mm_and_si128(load_128(&b.scales), _mm_set1_epi8(15))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q3_k_scales(b: &BlockQ3K) -> __m128i {
    let words: [[u8; 4]; 3] = bytemuck::cast(b.scales);
    // Not with `map`: its closure stays a call, around which all registers are saved.
    let (a, b, high) = (i32::from_le_bytes(words[0]), i32::from_le_bytes(words[1]), i32::from_le_bytes(words[2]));
    let bytes = _mm_set_epi32(b, a, b, a);
    let low = _mm_and_si128(_mm_srlv_epi32(bytes, _mm_set_epi32(4, 4, 0, 0)), _mm_set1_epi8(15));
    let upper = _mm_and_si128(_mm_srlv_epi32(_mm_set1_epi32(high), _mm_set_epi32(6, 4, 2, 0)), _mm_set1_epi8(3));
    _mm_sub_epi8(_mm_or_si128(low, _mm_slli_epi16::<4>(upper)), _mm_set1_epi8(32))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn iq4_xs_scales(b: &BlockIq4Xs) -> __m128i {
    let scales = _mm_cvtsi64_si128(i64::from_le_bytes(b.sub_scales().map(i8::cast_unsigned)));
    _mm_unpacklo_epi8(scales, scales)
}

/// Scale of the minima and the sixteen minima as 16-bit numbers.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn q2_k_minima(b: &BlockQ2K) -> (f32, __m256i) {
    let mins = _mm_and_si128(_mm_srli_epi16::<4>(load_128(&b.scales)), _mm_set1_epi8(15));
    (half_field(b.min), _mm256_cvtepu8_epi16(mins))
}

/// Formats whose codes are signed and whose scales are signed bytes per group of 16, with or without minima.
macro_rules! rows_of_signed_codes {
    ($($name:ident $block:ident $codes:ident $scales:ident, $minima:expr;)*) => {$(
        #[target_feature(enable = "avx2,fma,f16c")]
        pub(super) fn $name<const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [f32; T] {
            let weight: &[$block] = bytemuck::cast_slice(weight);
            let x = activation_blocks::<ActivationQ8K, T>(x, weight.len());
            let mut sums = [_mm256_setzero_ps(); T];
            for (i, block) in weight.iter().enumerate() {
                let scale = half_field(block.scale);
                let scales = $scales(block);
                let minima: Option<(f32, __m256i)> = $minima(block);
                let mut products = [_mm256_setzero_si256(); T];
                for half in 0..2 {
                    for (k, codes) in $codes(block, half).into_iter().enumerate() {
                        let s = 4 * half + k;
                        // Scales of groups 2s and 2s + 1, eight times each, widened to 16 bits.
                        let group = 2 * s as i64;
                        let pick = _mm_set_epi64x((group + 1) * 0x0101_0101_0101_0101, group * 0x0101_0101_0101_0101);
                        let scale = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, pick));
                        let magnitudes = _mm256_abs_epi8(codes);
                        for t in 0..T {
                            let x = load_256(&x[t][i].codes.as_chunks::<32>().0[s]);
                            let pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, codes));
                            products[t] = _mm256_add_epi32(products[t], _mm256_madd_epi16(pairs, scale));
                        }
                    }
                }
                for t in 0..T {
                    let x = &x[t][i];
                    sums[t] = _mm256_fmadd_ps(_mm256_set1_ps(scale * x.scale), _mm256_cvtepi32_ps(products[t]), sums[t]);
                    if let Some((min, mins)) = minima {
                        let minimum = _mm256_cvtepi32_ps(_mm256_madd_epi16(mins, load_256(&x.sums)));
                        sums[t] = _mm256_fnmadd_ps(_mm256_set1_ps(min * x.scale), minimum, sums[t]);
                    }
                }
            }
            std::array::from_fn(|t| sum_f32x8(sums[t]))
        }
    )*};
}
rows_of_signed_codes! {
    q2_k_row BlockQ2K q2_k q2_k_scales, |b| Some(q2_k_minima(b));
    q3_k_row BlockQ3K q3_k q3_k_scales, |_| None;
    q6_k_row BlockQ6K q6_k q6_k_scales, |_| None;
    iq4_xs_row BlockIq4Xs iq4_xs iq4_xs_scales, |_| None;
}
