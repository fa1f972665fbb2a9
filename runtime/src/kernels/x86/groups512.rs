//! Q4_K, Q5_K and Q6_K with 512-bit vectors and VNNI.
//!
//! Per 64 weights: 16-bit pair sums of unsigned codes times activations (`vpmaddubsw`), then pair sums times scales added to
//! 32 bits (`vpdpwssd`). As in `groups256` everything within a super-block is exact integer arithmetic.

use super::groups256::twice_each;
use super::{activation_blocks, half_field, load_128, load_256, load_512, sum_f32x8};
use crate::quant::{ActivationQ8K, BlockQ4K, BlockQ5K, BlockQ6K, unpack_scales};
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

macro_rules! rows_with_minima {
    ($($name:ident $block:ident $codes:ident;)*) => {$(
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
        pub(super) fn $name<const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [f32; T] {
            let weight: &[$block] = bytemuck::cast_slice(weight);
            let x = activation_blocks::<ActivationQ8K, T>(x, weight.len());
            let mut sums = [_mm512_setzero_ps(); T];
            let mut minima = [_mm256_setzero_ps(); T];
            for (i, block) in weight.iter().enumerate() {
                let (scale, min) = (half_field(block.scale), half_field(block.min));
                let (scales, mins) = unpack_scales(&block.scales);
                let mins = twice_each(mins);
                let scales = _mm512_castsi128_si512(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(scales.cast_signed())));
                let mut products = [_mm512_setzero_si512(); T];
                for chunk in 0..4 {
                    let codes = $codes(block, chunk);
                    let scale = _mm512_permutexvar_epi16(load_512(&SCALES_PER_32[chunk]), scales);
                    for t in 0..T {
                        let x = load_512(&x[t][i].codes.as_chunks::<64>().0[chunk]);
                        products[t] = _mm512_dpwssd_epi32(products[t], _mm512_maddubs_epi16(codes, x), scale);
                    }
                }
                for t in 0..T {
                    let x = &x[t][i];
                    sums[t] = _mm512_fmadd_ps(_mm512_set1_ps(scale * x.scale), _mm512_cvtepi32_ps(products[t]), sums[t]);
                    let minimum = _mm256_cvtepi32_ps(_mm256_madd_epi16(mins, load_256(&x.sums)));
                    minima[t] = _mm256_fmadd_ps(_mm256_set1_ps(min * x.scale), minimum, minima[t]);
                }
            }
            std::array::from_fn(|t| _mm512_reduce_add_ps(sums[t]) - sum_f32x8(minima[t]))
        }
    )*};
}
rows_with_minima! {
    q4_k_row BlockQ4K q4_k;
    q5_k_row BlockQ5K q5_k;
}

/// The 128 codes of one half of a block, still with their offset of 32, in element order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q6_k(b: &BlockQ6K, half: usize) -> [__m512i; 2] {
    let low = load_512(&b.low.as_chunks::<64>().0[half]);
    let high = _mm512_broadcast_i64x4(load_256(&b.high.as_chunks::<32>().0[half]));
    let (nibble, upper) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
    // Upper two bits to bit 4: elements 0-31 need a left shift of 4, 32-63 of 2, 64-95 none, 96-127 a right shift of 2.
    let left = _mm512_inserti64x4::<1>(_mm512_set1_epi16(4), _mm256_set1_epi16(2));
    let right = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(2));
    let parts = [(low, _mm512_sllv_epi16(high, left)), (_mm512_srli_epi16::<4>(low), _mm512_srlv_epi16(high, right))];
    parts.map(|(low, high)| _mm512_or_si512(_mm512_and_si512(low, nibble), _mm512_and_si512(high, upper)))
}

/// The offset of 32 is taken from the 16-bit pair sums (2 * 63 * 127 and 2 * 32 * 127 both stay below 2^15), so that every
/// lane stays the exact sum of its signed products.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
pub(super) fn q6_k_row<const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [f32; T] {
    let weight: &[BlockQ6K] = bytemuck::cast_slice(weight);
    let x = activation_blocks::<ActivationQ8K, T>(x, weight.len());
    let offset = _mm512_set1_epi8(32);
    let mut sums = [_mm512_setzero_ps(); T];
    for (i, block) in weight.iter().enumerate() {
        let scale = half_field(block.scale);
        let scales = _mm512_castsi256_si512(_mm256_cvtepi8_epi16(load_128(&block.scales)));
        let mut products = [_mm512_setzero_si512(); T];
        for half in 0..2 {
            for (k, codes) in q6_k(block, half).into_iter().enumerate() {
                let r = 2 * half + k;
                let scale = _mm512_permutexvar_epi16(load_512(&SCALES_PER_16[r]), scales);
                for t in 0..T {
                    let x = load_512(&x[t][i].codes.as_chunks::<64>().0[r]);
                    let pairs = _mm512_sub_epi16(_mm512_maddubs_epi16(codes, x), _mm512_maddubs_epi16(offset, x));
                    products[t] = _mm512_dpwssd_epi32(products[t], pairs, scale);
                }
            }
        }
        for t in 0..T {
            let scale = _mm512_set1_ps(scale * x[t][i].scale);
            sums[t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(products[t]), sums[t]);
        }
    }
    std::array::from_fn(|t| _mm512_reduce_add_ps(sums[t]))
}
