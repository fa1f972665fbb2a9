//! Activation encoding and element-wise operations with 512-bit vectors.
//!
//! Rows are taken 16 elements at a time; a tail is padded with zeros in a small array so that every element goes through the
//! same arithmetic wherever it stands. `exp` is the polynomial of Cephes' `expf` (range reduction by ln 2 in two parts,
//! degree 5), within 2 ulp over its range.

use super::{half_field, load_128, load_256, load_f32x8, load_f32x16, store_128, store_256, store_512, sum_i32x8};
use crate::kernels::scalar::inverse_rms;
use crate::quant::{ActivationQ8_1, ActivationQ8K, BlockQ8_0, scale_and_inverse};
use half::f16;
use std::arch::x86_64::*;

/// Largest magnitude, NaN if there is any NaN.
#[inline]
#[target_feature(enable = "avx512f")]
fn magnitude_max(x: &[[f32; 16]]) -> f32 {
    let mut max = _mm512_setzero_ps();
    let mut nan = 0;
    for x in x {
        let x = load_f32x16(x);
        nan |= _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        max = _mm512_max_ps(max, _mm512_abs_ps(x));
    }
    if nan == 0 { _mm512_reduce_max_ps(max) } else { f32::NAN }
}

/// Codes of 16 activations (round to nearest even is the default mode of the conversion).
#[inline]
#[target_feature(enable = "avx512f")]
fn codes16(x: &[f32; 16], inverse: __m512) -> __m128i {
    _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(load_f32x16(x), inverse)))
}

/// The sum of 16 signed bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn sum16(codes: __m128i) -> i32 {
    let fours = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), codes);
    sum_i32x8(_mm256_zextsi128_si256(fours))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn encode_q8_1(x: &[f32], out: &mut [ActivationQ8_1]) {
    assert_eq!(x.len(), out.len() * 32, "activation row and buffer differ in length");
    for (x, out) in x.as_chunks::<16>().0.as_chunks::<2>().0.iter().zip(out) {
        let (scale, inverse) = scale_and_inverse(magnitude_max(x));
        out.scale = scale;
        if inverse == 0.0 {
            (out.codes, out.sum) = ([0; 32], scale * 0.0);
            continue;
        }
        let inverse = _mm512_set1_ps(inverse);
        let mut sum = 0;
        for (x, codes) in x.iter().zip(out.codes.as_chunks_mut::<16>().0) {
            let v = codes16(x, inverse);
            store_128(codes, v);
            sum += sum16(v);
        }
        out.sum = scale * sum as f32;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn encode_q8k(x: &[f32], out: &mut [ActivationQ8K]) {
    assert_eq!(x.len(), out.len() * 256, "activation row and buffer differ in length");
    for (x, out) in x.as_chunks::<16>().0.as_chunks::<16>().0.iter().zip(out) {
        let (scale, inverse) = scale_and_inverse(magnitude_max(x));
        (out.scale, out.padding) = (scale, [0; 28]);
        if inverse == 0.0 {
            (out.codes, out.sums) = ([0; 256], [0; 16]);
            continue;
        }
        let inverse = _mm512_set1_ps(inverse);
        for ((x, codes), sum) in x.iter().zip(out.codes.as_chunks_mut::<16>().0).zip(&mut out.sums) {
            let v = codes16(x, inverse);
            store_128(codes, v);
            *sum = sum16(v) as i16;
        }
    }
}

/// Splits a slice into whole registers and a padded tail.
#[inline]
fn registers(x: &[f32]) -> (&[[f32; 16]], [f32; 16]) {
    let (whole, tail) = x.as_chunks::<16>();
    let mut padded = [0f32; 16];
    padded[..tail.len()].copy_from_slice(tail);
    (whole, padded)
}

#[target_feature(enable = "avx512f")]
pub(super) fn axpy_f32(a: f32, x: &[f32], y: &mut [f32]) {
    let a = _mm512_set1_ps(a);
    let (x, x_tail) = registers(x);
    let (y, y_tail) = y.as_chunks_mut::<16>();
    for (x, y) in x.iter().zip(y) {
        let sum = _mm512_fmadd_ps(a, load_f32x16(x), load_f32x16(y));
        store_512(y, _mm512_castps_si512(sum));
    }
    let mut padded = registers(y_tail).1;
    let sum = _mm512_fmadd_ps(a, load_f32x16(&x_tail), load_f32x16(&padded));
    store_512(&mut padded, _mm512_castps_si512(sum));
    y_tail.copy_from_slice(&padded[..y_tail.len()]);
}

#[target_feature(enable = "avx512f")]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let (halves, tail) = x.as_chunks::<8>();
    let mut sum = _mm512_setzero_pd();
    for x in halves {
        let x = _mm512_cvtps_pd(load_f32x8(x));
        sum = _mm512_fmadd_pd(x, x, sum);
    }
    let squares = _mm512_reduce_add_pd(sum) + tail.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
    let scale = inverse_rms(squares, x.len(), eps);
    // Compiled for 512-bit vectors as it stands.
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// `e^x`; 0 below the smallest normal result, finite up to its largest.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn exp(x: __m512) -> __m512 {
    let c = |v: f32| _mm512_set1_ps(v);
    let too_small = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, c(-87.336_54));
    // Operand order: NaN in the second operand passes through min and max.
    let x = _mm512_max_ps(c(-87.336_54), _mm512_min_ps(c(88.376_26), x));
    let n =
        _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm512_mul_ps(x, c(std::f32::consts::LOG2_E)));
    let r = _mm512_fnmadd_ps(n, c(-2.121_944_4e-4), _mm512_fnmadd_ps(n, c(355.0 / 512.0), x));
    let mut p = c(1.987_569_1e-4);
    for k in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = _mm512_fmadd_ps(p, r, c(k));
    }
    let p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, c(1.0)));
    _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), too_small, _mm512_setzero_ps())
}

#[target_feature(enable = "avx512f")]
pub(super) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (gate, gate_tail) = registers(gate);
    let (up, up_tail) = registers(up);
    let (out, out_tail) = out.as_chunks_mut::<16>();
    let one = |gate: &[f32; 16], up: &[f32; 16], out: &mut [f32; 16]| {
        let gate = load_f32x16(gate);
        let denominator = _mm512_add_ps(_mm512_set1_ps(1.0), exp(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
        let v = _mm512_mul_ps(_mm512_div_ps(gate, denominator), load_f32x16(up));
        store_512(out, _mm512_castps_si512(v));
    };
    for ((gate, up), out) in gate.iter().zip(up).zip(out) {
        one(gate, up, out);
    }
    let mut padded = [0f32; 16];
    one(&gate_tail, &up_tail, &mut padded);
    out_tail.copy_from_slice(&padded[..out_tail.len()]);
}

#[target_feature(enable = "avx512f")]
pub(super) fn softmax(x: &mut [f32]) {
    let (whole, tail) = x.as_chunks_mut::<16>();
    let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
    for v in whole.iter() {
        max = _mm512_max_ps(max, load_f32x16(v));
    }
    let max = tail.iter().fold(_mm512_reduce_max_ps(max), |m, v| m.max(*v));
    let (wide_max, mut sum) = (_mm512_set1_ps(max), _mm512_setzero_pd());
    let mut padded = [f32::NEG_INFINITY; 16];
    padded[..tail.len()].copy_from_slice(tail);
    for v in whole.iter_mut().chain([&mut padded]) {
        let e = exp(_mm512_sub_ps(load_f32x16(v), wide_max));
        store_512(v, _mm512_castps_si512(e));
        for half in v.as_chunks::<8>().0 {
            sum = _mm512_add_pd(sum, _mm512_cvtps_pd(load_f32x8(half)));
        }
    }
    tail.copy_from_slice(&padded[..tail.len()]);
    let scale = (1.0 / _mm512_reduce_add_pd(sum)) as f32;
    for v in x {
        *v *= scale;
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn f32_to_f16(src: &[f32], out: &mut [f16]) {
    let (src, src_tail) = registers(src);
    let (out, out_tail) = bytemuck::cast_slice_mut::<f16, u16>(out).as_chunks_mut::<16>();
    for (src, out) in src.iter().zip(out) {
        store_256(out, _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load_f32x16(src)));
    }
    let mut padded = [0u16; 16];
    store_256(&mut padded, _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load_f32x16(&src_tail)));
    out_tail.copy_from_slice(&padded[..out_tail.len()]);
}

#[target_feature(enable = "avx512f")]
pub(super) fn f16_to_f32(src: &[f16], out: &mut [f32]) {
    let (src, src_tail) = bytemuck::cast_slice::<f16, u16>(src).as_chunks::<16>();
    let (out, out_tail) = out.as_chunks_mut::<16>();
    for (src, out) in src.iter().zip(out) {
        store_512(out, _mm512_castps_si512(_mm512_cvtph_ps(load_256(src))));
    }
    let mut padded = [0u16; 16];
    padded[..src_tail.len()].copy_from_slice(src_tail);
    let mut widened = [0f32; 16];
    store_512(&mut widened, _mm512_castps_si512(_mm512_cvtph_ps(load_256(&padded))));
    out_tail.copy_from_slice(&widened[..out_tail.len()]);
}

#[target_feature(enable = "avx512f,f16c")]
pub(super) fn q8_0_to_f32(src: &[BlockQ8_0], out: &mut [f32]) {
    for (block, out) in src.iter().zip(out.as_chunks_mut::<16>().0.as_chunks_mut::<2>().0) {
        let scale = _mm512_set1_ps(half_field(block.scale));
        for (codes, out) in block.codes.as_chunks::<16>().0.iter().zip(out) {
            let codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_128(codes)));
            store_512(out, _mm512_castps_si512(_mm512_mul_ps(scale, codes)));
        }
    }
}
