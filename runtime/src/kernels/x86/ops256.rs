//! Activation encoding and element-wise operations with 256-bit vectors.
//!
//! Same arithmetic as `ops512`, eight elements at a time; see there.

use super::{half_field, load_128, load_f32x8, store_128, store_256, sum_i32x8};
use crate::kernels::scalar::inverse_rms;
use crate::quant::{ActivationQ8_1, ActivationQ8K, BlockQ8_0, scale_and_inverse};
use half::f16;
use std::arch::x86_64::*;

#[inline]
#[target_feature(enable = "avx2")]
fn abs(x: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_set1_ps(-0.0), x)
}

#[inline]
#[target_feature(enable = "avx2")]
fn largest(x: __m256) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
}

/// Largest magnitude, NaN if there is any NaN.
#[inline]
#[target_feature(enable = "avx2")]
fn magnitude_max(x: &[[[f32; 8]; 4]]) -> f32 {
    let (mut max, mut nan) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    for x in x.as_flattened() {
        let x = load_f32x8(x);
        nan = _mm256_or_ps(nan, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        max = _mm256_max_ps(max, abs(x));
    }
    if _mm256_movemask_ps(nan) == 0 { largest(max) } else { f32::NAN }
}

/// Codes of 32 activations (round to nearest even is the default mode of the conversion).
#[inline]
#[target_feature(enable = "avx2")]
fn codes32(x: &[[f32; 8]; 4], inverse: __m256) -> __m256i {
    let [a, b, c, d] = [0, 1, 2, 3].map(|i| _mm256_cvtps_epi32(_mm256_mul_ps(load_f32x8(&x[i]), inverse)));
    let packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    // The packs work per 128-bit lane and leave groups of four in the order a0 b0 c0 d0 a1 b1 c1 d1.
    _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

/// Sums of four signed bytes each.
#[inline]
#[target_feature(enable = "avx2")]
fn sums_of_four(codes: __m256i) -> __m256i {
    _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), codes), _mm256_set1_epi16(1))
}

#[target_feature(enable = "avx2")]
pub(super) fn encode_q8_1(x: &[f32], out: &mut [ActivationQ8_1]) {
    assert_eq!(x.len(), out.len() * 32, "activation row and buffer differ in length");
    for (x, out) in x.as_chunks::<8>().0.as_chunks::<4>().0.iter().zip(out) {
        let (scale, inverse) = scale_and_inverse(magnitude_max(std::slice::from_ref(x)));
        out.scale = scale;
        if inverse == 0.0 {
            (out.codes, out.sum) = ([0; 32], scale * 0.0);
            continue;
        }
        let codes = codes32(x, _mm256_set1_ps(inverse));
        store_256(&mut out.codes, codes);
        out.sum = scale * sum_i32x8(sums_of_four(codes)) as f32;
    }
}

#[target_feature(enable = "avx2")]
pub(super) fn encode_q8k(x: &[f32], out: &mut [ActivationQ8K]) {
    assert_eq!(x.len(), out.len() * 256, "activation row and buffer differ in length");
    for (x, out) in x.as_chunks::<8>().0.as_chunks::<4>().0.as_chunks::<8>().0.iter().zip(out) {
        let (scale, inverse) = scale_and_inverse(magnitude_max(x));
        (out.scale, out.padding) = (scale, [0; 28]);
        if inverse == 0.0 {
            (out.codes, out.sums) = ([0; 256], [0; 16]);
            continue;
        }
        let inverse = _mm256_set1_ps(inverse);
        let parts = out.codes.as_chunks_mut::<32>().0.iter_mut().zip(out.sums.as_chunks_mut::<2>().0);
        for (x, (codes, sums)) in x.iter().zip(parts) {
            let v = codes32(x, inverse);
            store_256(codes, v);
            let fours = sums_of_four(v);
            let half = |v: __m128i| sum_i32x8(_mm256_zextsi128_si256(v)) as i16;
            *sums = [half(_mm256_castsi256_si128(fours)), half(_mm256_extracti128_si256::<1>(fours))];
        }
    }
}

/// Splits a slice into whole registers and a padded tail.
#[inline]
fn registers(x: &[f32]) -> (&[[f32; 8]], [f32; 8]) {
    let (whole, tail) = x.as_chunks::<8>();
    let mut padded = [0f32; 8];
    padded[..tail.len()].copy_from_slice(tail);
    (whole, padded)
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(out: &mut [f32; 8], v: __m256) {
    store_256(out, _mm256_castps_si256(v));
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn axpy_f32(a: f32, x: &[f32], y: &mut [f32]) {
    let a = _mm256_set1_ps(a);
    let (x, x_tail) = registers(x);
    let (y, y_tail) = y.as_chunks_mut::<8>();
    for (x, y) in x.iter().zip(y) {
        let sum = _mm256_fmadd_ps(a, load_f32x8(x), load_f32x8(y));
        store(y, sum);
    }
    let mut padded = registers(y_tail).1;
    let sum = _mm256_fmadd_ps(a, load_f32x8(&x_tail), load_f32x8(&padded));
    store(&mut padded, sum);
    y_tail.copy_from_slice(&padded[..y_tail.len()]);
}

#[inline]
#[target_feature(enable = "avx2")]
fn sum_f64x4(v: __m256d) -> f64 {
    let v = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd::<1>(v));
    _mm_cvtsd_f64(_mm_add_sd(v, _mm_unpackhi_pd(v, v)))
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let (whole, tail) = x.as_chunks::<8>();
    let (mut low, mut high) = (_mm256_setzero_pd(), _mm256_setzero_pd());
    for x in whole {
        let x = load_f32x8(x);
        let (a, b) = (_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(x)));
        low = _mm256_fmadd_pd(a, a, low);
        high = _mm256_fmadd_pd(b, b, high);
    }
    let squares = sum_f64x4(_mm256_add_pd(low, high)) + tail.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
    let scale = inverse_rms(squares, x.len(), eps);
    // Compiled for 256-bit vectors as it stands.
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// `e^x`; 0 below the smallest normal result, finite up to its largest.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn exp(x: __m256) -> __m256 {
    let c = |v: f32| _mm256_set1_ps(v);
    let too_small = _mm256_cmp_ps::<_CMP_LT_OQ>(x, c(-87.336_54));
    // Operand order: NaN in the second operand passes through min and max.
    let x = _mm256_max_ps(c(-87.336_54), _mm256_min_ps(c(88.376_26), x));
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(x, c(std::f32::consts::LOG2_E)));
    let r = _mm256_fnmadd_ps(n, c(-2.121_944_4e-4), _mm256_fnmadd_ps(n, c(355.0 / 512.0), x));
    let mut p = c(1.987_569_1e-4);
    for k in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = _mm256_fmadd_ps(p, r, c(k));
    }
    let p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, c(1.0)));
    // 2^n by its bits: n lies in -126..=127.
    let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
    _mm256_andnot_ps(too_small, _mm256_mul_ps(p, _mm256_castsi256_ps(power)))
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (gate, gate_tail) = registers(gate);
    let (up, up_tail) = registers(up);
    let (out, out_tail) = out.as_chunks_mut::<8>();
    let one = |gate: &[f32; 8], up: &[f32; 8], out: &mut [f32; 8]| {
        let gate = load_f32x8(gate);
        let denominator = _mm256_add_ps(_mm256_set1_ps(1.0), exp(_mm256_sub_ps(_mm256_setzero_ps(), gate)));
        store(out, _mm256_mul_ps(_mm256_div_ps(gate, denominator), load_f32x8(up)));
    };
    for ((gate, up), out) in gate.iter().zip(up).zip(out) {
        one(gate, up, out);
    }
    let mut padded = [0f32; 8];
    one(&gate_tail, &up_tail, &mut padded);
    out_tail.copy_from_slice(&padded[..out_tail.len()]);
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn softmax(x: &mut [f32]) {
    let (whole, tail) = x.as_chunks_mut::<8>();
    let mut max = _mm256_set1_ps(f32::NEG_INFINITY);
    for v in whole.iter() {
        max = _mm256_max_ps(max, load_f32x8(v));
    }
    let max = tail.iter().fold(largest(max), |m, v| m.max(*v));
    let (wide_max, mut sum) = (_mm256_set1_ps(max), _mm256_setzero_pd());
    let mut padded = [f32::NEG_INFINITY; 8];
    padded[..tail.len()].copy_from_slice(tail);
    for v in whole.iter_mut().chain([&mut padded]) {
        let e = exp(_mm256_sub_ps(load_f32x8(v), wide_max));
        store(v, e);
        let (low, high) = (_mm256_castps256_ps128(e), _mm256_extractf128_ps::<1>(e));
        sum = _mm256_add_pd(sum, _mm256_add_pd(_mm256_cvtps_pd(low), _mm256_cvtps_pd(high)));
    }
    tail.copy_from_slice(&padded[..tail.len()]);
    let scale = (1.0 / sum_f64x4(sum)) as f32;
    for v in x {
        *v *= scale;
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn f32_to_f16(src: &[f32], out: &mut [f16]) {
    let (src, src_tail) = registers(src);
    let (out, out_tail) = bytemuck::cast_slice_mut::<f16, u16>(out).as_chunks_mut::<8>();
    for (src, out) in src.iter().zip(out) {
        store_128(out, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load_f32x8(src)));
    }
    let mut padded = [0u16; 8];
    store_128(&mut padded, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load_f32x8(&src_tail)));
    out_tail.copy_from_slice(&padded[..out_tail.len()]);
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn f16_to_f32(src: &[f16], out: &mut [f32]) {
    let (src, src_tail) = bytemuck::cast_slice::<f16, u16>(src).as_chunks::<8>();
    let (out, out_tail) = out.as_chunks_mut::<8>();
    for (src, out) in src.iter().zip(out) {
        store(out, _mm256_cvtph_ps(load_128(src)));
    }
    let mut padded = [0u16; 8];
    padded[..src_tail.len()].copy_from_slice(src_tail);
    let mut widened = [0f32; 8];
    store(&mut widened, _mm256_cvtph_ps(load_128(&padded)));
    out_tail.copy_from_slice(&widened[..out_tail.len()]);
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn q8_0_to_f32(src: &[BlockQ8_0], out: &mut [f32]) {
    for (block, out) in src.iter().zip(out.as_chunks_mut::<8>().0.as_chunks_mut::<4>().0) {
        let scale = _mm256_set1_ps(half_field(block.scale));
        for (codes, out) in block.codes.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<2>().0) {
            let codes = load_128(codes);
            let [low, high] = [codes, _mm_unpackhi_epi64(codes, codes)].map(|c| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(c)));
            store(&mut out[0], _mm256_mul_ps(scale, low));
            store(&mut out[1], _mm256_mul_ps(scale, high));
        }
    }
}
