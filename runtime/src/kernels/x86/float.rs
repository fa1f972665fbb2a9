//! F32, F16 and BF16 weights against f32 activations: widen exactly, multiply and add in f32. Many tokens: `kernels::gemm_float`;
//! BF16 with 512 bits: [`super::bf16_rows`].
//!
//! One macro for both widths; what differs is how a register of weights is loaded. Several independent sums per row and token hide
//! the latency of the multiply-add (four with 512 bits; two with 256, where only 16 registers exist).

/// `R` weight rows of as many weights each with `T` activation rows: `[R][T]`. `$load` turns `$lanes` weights of `$bytes` bytes into a
/// register; the tail of a row is padded with zeros.
macro_rules! float_rows {
    ($features:literal, $lanes:literal, $sums:literal, $zero:ident, $add:ident, $fma:ident, $load_x:ident, $reduce:ident:
     $($name:ident $bytes:literal $load:ident;)*) => {$(
        #[target_feature(enable = $features)]
        pub(in crate::kernels::x86) fn $name<const R: usize, const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [[f32; T]; R] {
            const REGISTER: usize = $bytes * $lanes;
            let row_bytes = weight.len() / R;
            let x = activation_blocks::<f32, T>(x, row_bytes / $bytes);
            let rows: [_; R] = std::array::from_fn(|r| weight[r * row_bytes..][..row_bytes].as_chunks::<REGISTER>());
            let count = row_bytes / REGISTER;
            let parts = x.map(|x| x.as_chunks::<$lanes>());
            let x: [&[[f32; $lanes]]; T] = parts.map(|(x, _)| &x[..count]);
            let ahead = ahead_of_rows::<R>(row_bytes);
            let mut sums = [[[$zero(); T]; R]; $sums];
            for i in 0..count / $sums {
                for (r, (registers, _)) in rows.iter().enumerate() {
                    let weights = &registers.as_chunks::<$sums>().0[i];
                    if T == 1 {
                        fetch_ahead(weights, ahead);
                    }
                    for (s, weight) in weights.iter().enumerate() {
                        let weight = $load(weight);
                        for t in 0..T {
                            sums[s][r][t] = $fma(weight, $load_x(&x[t][$sums * i + s]), sums[s][r][t]);
                        }
                    }
                }
            }
            for (r, (registers, weight_tail)) in rows.iter().enumerate() {
                for (s, i) in (count / $sums * $sums..count).enumerate() {
                    let weight = $load(&registers[i]);
                    for t in 0..T {
                        sums[s][r][t] = $fma(weight, $load_x(&x[t][i]), sums[s][r][t]);
                    }
                }
                if !weight_tail.is_empty() {
                    let mut padded = [0u8; REGISTER];
                    padded[..weight_tail.len()].copy_from_slice(weight_tail);
                    let weight = $load(&padded);
                    for t in 0..T {
                        let mut padded = [0f32; $lanes];
                        padded[..parts[t].1.len()].copy_from_slice(parts[t].1);
                        sums[0][r][t] = $fma(weight, $load_x(&padded), sums[0][r][t]);
                    }
                }
            }
            let mut out = [[0f32; T]; R];
            for r in 0..R {
                for t in 0..T {
                    let mut sum = sums[0][r][t];
                    for more in &sums[1..] {
                        sum = $add(sum, more[r][t]);
                    }
                    out[r][t] = $reduce(sum);
                }
            }
            out
        }
    )*};
}

pub(super) mod avx2 {
    use super::super::attention::avx2::{store, sums};
    use super::super::{activation_blocks, ahead_of_rows, fetch_ahead, load_128, load_256, load_f32x8, sum_f32x8};
    use crate::kernels::ActivationBuf;
    use crate::kernels::gemm::{GemmScratch, GemmTask};
    use crate::kernels::gemm_float::{PIECE, float_gemm, tokens_per_pass};
    use std::arch::x86_64::*;
    use std::ops::Range;

    #[inline]
    #[target_feature(enable = "avx2")]
    fn load_f32(src: &[u8; 32]) -> __m256 {
        _mm256_castsi256_ps(load_256(src))
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn load_f16(src: &[u8; 16]) -> __m256 {
        _mm256_cvtph_ps(load_128(src))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn load_bf16(src: &[u8; 16]) -> __m256 {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load_128(src))))
    }

    float_rows! { "avx2,fma,f16c", 8, 2, _mm256_setzero_ps, _mm256_add_ps, _mm256_fmadd_ps, load_f32x8, sum_f32x8:
        f32_rows 4 load_f32;
        f16_rows 2 load_f16;
        bf16_rows 2 load_bf16;
    }

    float_gemm! { "avx2,fma,f16c", 8, _mm256_setzero_ps, _mm256_fmadd_ps, sums, load_f32x8, store:
        f16_gemm 2 load_f16;
        bf16_gemm 2 load_bf16;
    }
}

pub(super) mod avx512 {
    use super::super::attention::avx512::{store, sums};
    use super::super::{activation_blocks, ahead_of_rows, fetch_ahead, load_256, load_512, load_f32x16};
    use crate::kernels::ActivationBuf;
    use crate::kernels::gemm::{GemmScratch, GemmTask};
    use crate::kernels::gemm_float::{PIECE, float_gemm, tokens_per_pass};
    use std::arch::x86_64::*;
    use std::ops::Range;

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_f32(src: &[u8; 64]) -> __m512 {
        _mm512_castsi512_ps(load_512(src))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_f16(src: &[u8; 32]) -> __m512 {
        _mm512_cvtph_ps(load_256(src))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_bf16(src: &[u8; 32]) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load_256(src))))
    }

    float_rows! { "avx512f,avx512bw,avx512vl,avx512vnni", 16, 4, _mm512_setzero_ps, _mm512_add_ps, _mm512_fmadd_ps, load_f32x16,
        _mm512_reduce_add_ps:
        f32_rows 4 load_f32;
        f16_rows 2 load_f16;
    }

    float_gemm! { "avx512f,avx512bw,avx512vl,avx512vnni", 16, _mm512_setzero_ps, _mm512_fmadd_ps, sums, load_f32x16, store:
        f16_gemm 2 load_f16;
        bf16_gemm 2 load_bf16;
    }
}
