//! F32, F16 and BF16 weights against f32 activations: widen exactly, multiply and add in f32.
//!
//! One macro for both widths; what differs is how a register of weights is loaded. Several independent sums per token hide
//! the latency of the multiply-add (four with 512 bits; two with 256, where only 16 registers exist).

/// `$load` turns `$lanes` weights of `$bytes` bytes into a register; the tail of a row is padded with zeros.
macro_rules! float_rows {
    ($features:literal, $lanes:literal, $sums:literal, $zero:ident, $add:ident, $fma:ident, $load_x:ident, $reduce:ident:
     $($name:ident $bytes:literal $load:ident;)*) => {$(
        #[target_feature(enable = $features)]
        pub(in crate::kernels::x86) fn $name<const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [f32; T] {
            const REGISTER: usize = $bytes * $lanes;
            let x = activation_blocks::<f32, T>(x, weight.len() / $bytes);
            let (registers, weight_tail) = weight.as_chunks::<REGISTER>();
            let parts = x.map(|x| x.as_chunks::<$lanes>());
            let x: [&[[f32; $lanes]]; T] = parts.map(|(x, _)| &x[..registers.len()]);
            let mut sums = [[$zero(); T]; $sums];
            let (unrolled, rest) = registers.as_chunks::<$sums>();
            for (i, weights) in unrolled.iter().enumerate() {
                for (s, weight) in weights.iter().enumerate() {
                    let weight = $load(weight);
                    for t in 0..T {
                        sums[s][t] = $fma(weight, $load_x(&x[t][$sums * i + s]), sums[s][t]);
                    }
                }
            }
            for (s, weight) in rest.iter().enumerate() {
                let weight = $load(weight);
                for t in 0..T {
                    sums[s][t] = $fma(weight, $load_x(&x[t][$sums * unrolled.len() + s]), sums[s][t]);
                }
            }
            if !weight_tail.is_empty() {
                let mut padded = [0u8; REGISTER];
                padded[..weight_tail.len()].copy_from_slice(weight_tail);
                let weight = $load(&padded);
                for t in 0..T {
                    let mut padded = [0f32; $lanes];
                    padded[..parts[t].1.len()].copy_from_slice(parts[t].1);
                    sums[0][t] = $fma(weight, $load_x(&padded), sums[0][t]);
                }
            }
            std::array::from_fn(|t| {
                let mut sum = sums[0][t];
                for more in &sums[1..] {
                    sum = $add(sum, more[t]);
                }
                $reduce(sum)
            })
        }
    )*};
}

pub(super) mod avx2 {
    use super::super::{activation_blocks, load_128, load_256, load_f32x8, sum_f32x8};
    use std::arch::x86_64::*;

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
        f32_row 4 load_f32;
        f16_row 2 load_f16;
        bf16_row 2 load_bf16;
    }
}

pub(super) mod avx512 {
    use super::super::{activation_blocks, load_256, load_512, load_f32x16};
    use std::arch::x86_64::*;

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
        f32_row 4 load_f32;
        f16_row 2 load_f16;
        bf16_row 2 load_bf16;
    }
}
