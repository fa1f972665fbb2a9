//! Q2_K to Q6_K and IQ4_XS with 512-bit vectors and VNNI.
//!
//! Per 64 weights: 16-bit pair sums of unsigned codes times activations (`vpmaddubsw`), then pair sums times scales added to
//! 32 bits (`vpdpwssd`). As in `groups256` everything within a super-block is exact integer arithmetic. Signed codes are made unsigned
//! by an offset; what it adds depends on the activations alone, so rows that are computed together share it.

use super::groups256::{q2_k_scales, q3_k_scales, q6_k_scales, twice_each};
use super::rows512::{IQ4_RAISED, look_up};
use super::{FETCH_BYTES, activation_blocks, ahead_of_rows, fetch_ahead, half_field, load_128, load_256, load_512, sum_f32x8};
use crate::quant::{ActivationQ8K, BlockIq4Xs, BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, unpack_scales};
use std::arch::x86_64::*;

/// Which 16-bit scale each pair sum of 64 weights takes: with groups of `1 << bits` pair sums, register `r` of a block
/// begins at group `r * 32 >> bits`.
const fn scale_index<const REGISTERS: usize>(bits: usize) -> [[i16; 32]; REGISTERS] {
    let mut index = [[0; 32]; REGISTERS];
    let mut i = 0;
    while i < 32 * REGISTERS {
        index[i / 32][i % 32] = (i >> bits) as i16;
        i += 1;
    }
    index
}

/// Groups of 32 weights: 16 pair sums.
static SCALES_PER_32: [[i16; 32]; 4] = scale_index(4);

/// Groups of 16 weights: 8 pair sums.
static SCALES_PER_16: [[i16; 32]; 4] = scale_index(3);

/// The 64 codes of sub-blocks `2 * chunk` (lower half of the register) and `2 * chunk + 1` (upper half).
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn nibble_pair(codes: &[u8; 128], chunk: usize) -> __m512i {
    let bytes = _mm512_broadcast_i64x4(load_256(&codes.as_chunks::<32>().0[chunk]));
    // No shift in the lower half, four bits in the upper.
    let shift = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(4));
    _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), _mm512_set1_epi8(15))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q4_k(b: &BlockQ4K, chunk: usize) -> __m512i {
    nibble_pair(&b.codes, chunk)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q5_k(b: &BlockQ5K, chunk: usize) -> __m512i {
    let codes = nibble_pair(&b.codes, chunk);
    let high = _mm512_broadcast_i64x4(load_256(&b.high));
    let (even, odd) = (1u8 << (2 * chunk), 2u8 << (2 * chunk));
    let bit = _mm512_inserti64x4::<1>(_mm512_set1_epi8(even.cast_signed()), _mm256_set1_epi8(odd.cast_signed()));
    _mm512_mask_add_epi8(codes, _mm512_test_epi8_mask(high, bit), codes, _mm512_set1_epi8(16))
}

/// Scales of Q4_K and Q5_K and, once per group of 16, minima, as 16-bit numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn scales_per_32(packed: &[u8; 12]) -> (__m512i, __m256i) {
    let (scales, mins) = unpack_scales(packed);
    (_mm512_castsi128_si512(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(scales.cast_signed()))), twice_each(mins))
}

/// The same of Q2_K, whose scales are per group of 16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q2_k_scales_and_minima(b: &BlockQ2K) -> (__m512i, __m256i) {
    let bytes = load_128(&b.scales);
    let mins = _mm_and_si128(_mm_srli_epi16::<4>(bytes), _mm_set1_epi8(15));
    (_mm512_castsi256_si512(_mm256_cvtepi8_epi16(q2_k_scales(b))), _mm256_cvtepu8_epi16(mins))
}

/// Two half-precision numbers, by turns in all lanes: one conversion for both.
#[inline]
#[target_feature(enable = "avx512f")]
fn scale_and_min(scale: [u8; 2], min: [u8; 2]) -> __m512 {
    let both = i32::from(u16::from_le_bytes(scale)) | i32::from(u16::from_le_bytes(min)) << 16;
    _mm512_cvtph_ps(_mm256_set1_epi32(both))
}

/// The 64 two-bit codes from number `64 * part` on: each half of 128 weights uses 32 bytes, weights 32 apart sharing a byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn two_bit_codes(codes: &[u8; 64], part: usize) -> __m512i {
    let bytes = _mm512_broadcast_i64x4(load_256(&codes.as_chunks::<32>().0[part / 2]));
    let shift = 4 * (part % 2) as i16;
    let shift = _mm512_inserti64x4::<1>(_mm512_set1_epi16(shift), _mm256_set1_epi16(shift + 2));
    _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), _mm512_set1_epi8(3))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q2_k(b: &BlockQ2K, part: usize) -> __m512i {
    two_bit_codes(&b.codes, part)
}

macro_rules! rows_with_minima {
    ($($name:ident $block:ident $codes:ident $scale_index:ident, $scales:expr;)*) => {$(
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
        pub(super) fn $name<const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [f32; T] {
            let weight: &[$block] = bytemuck::cast_slice(weight);
            let x = activation_blocks::<ActivationQ8K, T>(x, weight.len());
            let mut sums = [_mm512_setzero_ps(); T];
            let mut minima = [_mm256_setzero_ps(); T];
            for (i, block) in weight.iter().enumerate() {
                if T == 1 {
                    fetch_ahead(block, FETCH_BYTES);
                }
                let factors = scale_and_min(block.scale, block.min);
                let (scales, mins): (__m512i, __m256i) = $scales(block);
                let mut products = [_mm512_setzero_si512(); T];
                for part in 0..4 {
                    let codes = $codes(block, part);
                    let scale = _mm512_permutexvar_epi16(load_512(&$scale_index[part]), scales);
                    for t in 0..T {
                        let x = load_512(&x[t][i].codes.as_chunks::<64>().0[part]);
                        products[t] = _mm512_dpwssd_epi32(products[t], _mm512_maddubs_epi16(codes, x), scale);
                    }
                }
                for t in 0..T {
                    let x = &x[t][i];
                    let factors = _mm512_mul_ps(factors, _mm512_set1_ps(x.scale));
                    sums[t] = _mm512_fmadd_ps(_mm512_moveldup_ps(factors), _mm512_cvtepi32_ps(products[t]), sums[t]);
                    let minimum = _mm256_cvtepi32_ps(_mm256_madd_epi16(mins, load_256(&x.sums)));
                    minima[t] = _mm256_fmadd_ps(_mm256_movehdup_ps(_mm512_castps512_ps256(factors)), minimum, minima[t]);
                }
            }
            std::array::from_fn(|t| _mm512_reduce_add_ps(sums[t]) - sum_f32x8(minima[t]))
        }
    )*};
}
rows_with_minima! {
    q2_k_row BlockQ2K q2_k SCALES_PER_16, |b: &BlockQ2K| q2_k_scales_and_minima(b);
    q4_k_row BlockQ4K q4_k SCALES_PER_32, |b: &BlockQ4K| scales_per_32(&b.scales);
    q5_k_row BlockQ5K q5_k SCALES_PER_32, |b: &BlockQ5K| scales_per_32(&b.scales);
}

/// The 64 codes from number `64 * part` on, still with their offset of 4.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q3_k(b: &BlockQ3K, part: usize) -> __m512i {
    let codes = two_bit_codes(&b.codes, part);
    let high = _mm512_broadcast_i64x4(load_256(&b.high));
    let (even, odd) = (1u8 << (2 * part), 2u8 << (2 * part));
    let bit = _mm512_inserti64x4::<1>(_mm512_set1_epi8(even.cast_signed()), _mm256_set1_epi8(odd.cast_signed()));
    _mm512_mask_add_epi8(codes, _mm512_test_epi8_mask(high, bit), codes, _mm512_set1_epi8(4))
}

/// The 64 codes from number `64 * part` on, still with their offset of 32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q6_k(b: &BlockQ6K, part: usize) -> __m512i {
    let low = load_512(&b.low.as_chunks::<64>().0[part / 2]);
    let high = _mm512_broadcast_i64x4(load_256(&b.high.as_chunks::<32>().0[part / 2]));
    // Upper two bits to bit 4: in a half of the block elements 0-31 need a left shift of 4, 32-63 of 2, 64-95 none, 96-127 a right
    // shift of 2.
    let (low, high) = if part.is_multiple_of(2) {
        (low, _mm512_sllv_epi16(high, _mm512_inserti64x4::<1>(_mm512_set1_epi16(4), _mm256_set1_epi16(2))))
    } else {
        let right = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(2));
        (_mm512_srli_epi16::<4>(low), _mm512_srlv_epi16(high, right))
    };
    let (nibble, upper) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
    _mm512_or_si512(_mm512_and_si512(low, nibble), _mm512_and_si512(high, upper))
}

/// `R` rows of as many blocks each, and the bytes from a block to where the next rows are.
#[inline(always)]
fn cut_rows<B: bytemuck::Pod, const R: usize>(weight: &[u8]) -> ([&[B]; R], usize) {
    let all: &[B] = bytemuck::cast_slice(weight);
    let blocks = all.len() / R;
    let mut rows: [&[B]; R] = [&[]; R];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = &all[r * blocks..][..blocks];
    }
    (rows, ahead_of_rows::<R>(blocks * size_of::<B>()))
}

/// The offset is taken from the 16-bit pair sums (twice the largest unsigned code times 127, and twice the offset times 127, both stay
/// below 2^15), so that every lane stays the exact sum of its signed products. `R` weight rows with `T` activation rows: `[R][T]`.
macro_rules! rows_with_offset {
    ($($name:ident $block:ident $codes:ident $scales:ident $offset:literal;)*) => {$(
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
        pub(super) fn $name<const R: usize, const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [[f32; T]; R] {
            let (rows, ahead) = cut_rows::<$block, R>(weight);
            let x = activation_blocks::<ActivationQ8K, T>(x, rows[0].len());
            let offset = _mm512_set1_epi8($offset);
            let mut sums = [[_mm512_setzero_ps(); T]; R];
            for i in 0..rows[0].len() {
                let codes_of = |t: usize, part: usize| load_512(&x[t][i].codes.as_chunks::<64>().0[part]);
                // One row alone makes it where it needs it.
                let mut shared = [[_mm512_setzero_si512(); T]; 4];
                for (part, shared) in shared.iter_mut().enumerate() {
                    for (t, shared) in shared.iter_mut().enumerate() {
                        *shared = _mm512_maddubs_epi16(offset, codes_of(t, part));
                    }
                }
                for r in 0..R {
                    let block = &rows[r][i];
                    if T == 1 {
                        fetch_ahead(block, ahead);
                    }
                    let scales = _mm512_castsi256_si512(_mm256_cvtepi8_epi16($scales(block)));
                    let mut products = [_mm512_setzero_si512(); T];
                    for part in 0..4 {
                        let codes = $codes(block, part);
                        let scale = _mm512_permutexvar_epi16(load_512(&SCALES_PER_16[part]), scales);
                        for t in 0..T {
                            let x = codes_of(t, part);
                            let excess = if R == 1 { _mm512_maddubs_epi16(offset, x) } else { shared[part][t] };
                            let pairs = _mm512_sub_epi16(_mm512_maddubs_epi16(codes, x), excess);
                            products[t] = _mm512_dpwssd_epi32(products[t], pairs, scale);
                        }
                    }
                    let scale = half_field(block.scale);
                    for t in 0..T {
                        let scale = _mm512_set1_ps(scale * x[t][i].scale);
                        sums[r][t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(products[t]), sums[r][t]);
                    }
                }
            }
            total(sums)
        }
    )*};
}
rows_with_offset! {
    q3_k_rows BlockQ3K q3_k q3_k_scales 4;
    q6_k_rows BlockQ6K q6_k q6_k_scales 32;
}

#[inline]
#[target_feature(enable = "avx512f")]
fn total<const R: usize, const T: usize>(sums: [[__m512; T]; R]) -> [[f32; T]; R] {
    let mut out = [[0f32; T]; R];
    for r in 0..R {
        for t in 0..T {
            out[r][t] = _mm512_reduce_add_ps(sums[r][t]);
        }
    }
    out
}

/// Which sub-block's scale each sum of four products of 64 weights takes.
static SUB_BLOCK_OF_SUM: [[i32; 16]; 4] = {
    let mut index = [[0; 16]; 4];
    let mut i = 0;
    while i < 64 {
        index[i / 16][i % 16] = (i / 8) as i32;
        i += 1;
    }
    index
};

/// The eight sub-block scales as floats.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn iq4_xs_scales(b: &BlockIq4Xs) -> __m512 {
    let low = _mm256_set1_epi32(i32::from_le_bytes(b.scales_low));
    let high = _mm256_set1_epi32(i32::from(u16::from_le_bytes(b.scales_high)));
    let low = _mm256_srlv_epi32(low, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    let high = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    let high = _mm256_slli_epi32::<4>(_mm256_and_si256(high, _mm256_set1_epi32(3)));
    let scales = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)), high);
    _mm512_castps256_ps512(_mm256_cvtepi32_ps(_mm256_sub_epi32(scales, _mm256_set1_epi32(32))))
}

/// Codes use all eight bits, so pair sums would not fit 16 bits: four products are added at once (`vpdpbusd`), starting from minus
/// the offset of 128 times the activations, and multiplied by the scale as floats. That is exact: in a lane at most
/// 4 * 4 * 127 * 127 * 32 < 2^24 comes together in a block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
pub(super) fn iq4_xs_rows<const R: usize, const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [[f32; T]; R] {
    let (rows, ahead) = cut_rows::<BlockIq4Xs, R>(weight);
    let x = activation_blocks::<ActivationQ8K, T>(x, rows[0].len());
    let (zero, offset) = (_mm512_setzero_si512(), _mm512_set1_epi8(i8::MIN));
    let mut sums = [[_mm512_setzero_ps(); T]; R];
    let start_of = |x| _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, offset, x));
    for i in 0..rows[0].len() {
        let codes_of = |t: usize, part: usize| load_512(&x[t][i].codes.as_chunks::<64>().0[part]);
        // As in `rows_with_offset`.
        let mut shared = [[zero; T]; 4];
        for (part, shared) in shared.iter_mut().enumerate() {
            for (t, shared) in shared.iter_mut().enumerate() {
                *shared = start_of(codes_of(t, part));
            }
        }
        for r in 0..R {
            let block = &rows[r][i];
            if T == 1 {
                fetch_ahead(block, ahead);
            }
            let scales = iq4_xs_scales(block);
            let codes = block.codes.as_chunks::<16>().0;
            let mut products = [_mm512_setzero_ps(); T];
            for part in 0..4 {
                let codes = look_up(&IQ4_RAISED, &codes[2 * part], &codes[2 * part + 1]);
                let scale = _mm512_permutexvar_ps(load_512(&SUB_BLOCK_OF_SUM[part]), scales);
                for t in 0..T {
                    let x = codes_of(t, part);
                    let start = if R == 1 { start_of(x) } else { shared[part][t] };
                    let dots = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, codes, x));
                    products[t] = _mm512_fmadd_ps(dots, scale, products[t]);
                }
            }
            let scale = half_field(block.scale);
            for t in 0..T {
                sums[r][t] = _mm512_fmadd_ps(_mm512_set1_ps(scale * x[t][i].scale), products[t], sums[r][t]);
            }
        }
    }
    total(sums)
}
