//! Attention over one block with 256 and 512 bits: what `kernels::attention_vector` asks of an instruction set.

pub(super) mod avx512 {
    use super::super::ops512::exp;
    use super::super::{half_field, load_f32x16, store_512};
    use crate::kernels::attention::{AttentionTile, BLOCK, KvFloats, MAX_BLOCKS, capped, subtrahend};
    use crate::kernels::attention_vector::{Rows, Scales, attention_kernel, stored};
    use crate::kernels::prefetch;
    use std::arch::x86_64::*;

    /// 16 elements of a row, with its scales, from number `column` on.
    ///
    /// # Safety
    /// They are readable.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load<const FORMAT: u8>((row, scales): (*const u8, *const f32), column: usize) -> __m512 {
        // SAFETY: the caller's; loads need no alignment.
        unsafe {
            match FORMAT {
                stored::F32 => _mm512_loadu_ps(row.add(4 * column).cast()),
                stored::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(row.add(2 * column).cast())),
                _ => {
                    let codes = _mm_loadu_si128(row.add(column / 32 * 34 + 2 + column % 32).cast());
                    let codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
                    _mm512_mul_ps(codes, _mm512_set1_ps(*scales.add(column / 32)))
                }
            }
        }
    }

    /// # Safety
    /// 16 numbers are readable.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_numbers(from: *const f32) -> __m512 {
        // SAFETY: the caller's; loads need no alignment.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::kernels::x86) fn store(to: &mut [f32; 16], v: __m512) {
        store_512(to, _mm512_castps_si512(v));
    }

    /// Lane `i` is the sum of the lanes of `v[i]`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::kernels::x86) fn sums(v: [__m512; 16]) -> __m512 {
        let pd = |v| _mm512_castps_pd(v);
        // Per 128 bits: sums of lanes 2 apart of two vectors, then of neighbours of four.
        let four = |i: usize| {
            let two = |i: usize| _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 1]), _mm512_unpackhi_ps(v[i], v[i + 1]));
            let (a, b) = (pd(two(i)), pd(two(i + 2)));
            _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
        };
        let join = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xDD>(a, b));
        join(join(four(0), four(4)), join(four(8), four(12)))
    }

    attention_kernel! { "avx512f,avx512bw,avx512vl,avx512vnni,f16c", 16, [8, 8, 4, 2], _mm512_setzero_ps, _mm512_set1_ps,
    _mm512_fmadd_ps, _mm512_mul_ps, _mm512_add_ps, _mm512_sub_ps, _mm512_max_ps, sums, load_f32x16, store }
}

pub(super) mod avx2 {
    use super::super::ops256::exp;
    use super::super::{half_field, load_f32x8, store_256};
    use crate::kernels::attention::{AttentionTile, BLOCK, KvFloats, MAX_BLOCKS, capped, subtrahend};
    use crate::kernels::attention_vector::{Rows, Scales, attention_kernel, stored};
    use crate::kernels::prefetch;
    use std::arch::x86_64::*;

    /// 8 elements of a row, with its scales, from number `column` on.
    ///
    /// # Safety
    /// They are readable.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load<const FORMAT: u8>((row, scales): (*const u8, *const f32), column: usize) -> __m256 {
        // SAFETY: the caller's; loads need no alignment.
        unsafe {
            match FORMAT {
                stored::F32 => _mm256_loadu_ps(row.add(4 * column).cast()),
                stored::F16 => _mm256_cvtph_ps(_mm_loadu_si128(row.add(2 * column).cast())),
                _ => {
                    let codes = _mm_loadl_epi64(row.add(column / 32 * 34 + 2 + column % 32).cast());
                    let codes = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
                    _mm256_mul_ps(codes, _mm256_set1_ps(*scales.add(column / 32)))
                }
            }
        }
    }

    /// # Safety
    /// 8 numbers are readable.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_numbers(from: *const f32) -> __m256 {
        // SAFETY: the caller's; loads need no alignment.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::kernels::x86) fn store(to: &mut [f32; 8], v: __m256) {
        store_256(to, _mm256_castps_si256(v));
    }

    /// Lane `i` is the sum of the lanes of `v[i]`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::kernels::x86) fn sums(v: [__m256; 8]) -> __m256 {
        let pd = |v| _mm256_castps_pd(v);
        // Per 128 bits: sums of lanes 2 apart of two vectors, then of neighbours of four.
        let four = |i: usize| {
            let two = |i: usize| _mm256_add_ps(_mm256_unpacklo_ps(v[i], v[i + 1]), _mm256_unpackhi_ps(v[i], v[i + 1]));
            let (a, b) = (pd(two(i)), pd(two(i + 2)));
            _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)))
        };
        let (a, b) = (four(0), four(4));
        _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
    }

    attention_kernel! { "avx2,fma,f16c", 8, [8, 4, 2, 1], _mm256_setzero_ps, _mm256_set1_ps,
    _mm256_fmadd_ps, _mm256_mul_ps, _mm256_add_ps, _mm256_sub_ps, _mm256_max_ps, sums, load_f32x8, store }
}
