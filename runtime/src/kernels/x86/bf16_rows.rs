//! BF16 weights against few f32 activations, 512 bits wide: widened exactly, multiplied and added in f32.
//!
//! A register of weights becomes two of floats by shifting the even ones up and masking the odd ones: one operation each, where
//! widening in order takes two. The activations are put into that order instead, once for all rows that are computed together.

use super::{activation_blocks, ahead_of_rows, fetch_ahead, load_512, load_f32x16};
use std::arch::x86_64::*;

/// Weights of one step: two registers.
const STEP: usize = 64;

/// Places of the even numbers (`0`) or the odd ones (`1`) of two registers.
static EVERY_SECOND: [[i32; 16]; 2] = {
    let mut index = [[0; 16]; 2];
    let mut i = 0;
    while i < 32 {
        index[i % 2][i / 2] = i as i32;
        i += 1;
    }
    index
};

/// The even ones, then the odd ones, of 32 activations.
#[inline]
#[target_feature(enable = "avx512f")]
fn apart(x: &[f32; 32]) -> [__m512; 2] {
    let halves = x.as_chunks::<16>().0;
    let (low, high) = (load_f32x16(&halves[0]), load_f32x16(&halves[1]));
    let (even, odd) = (load_512(&EVERY_SECOND[0]), load_512(&EVERY_SECOND[1]));
    [_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)]
}

/// That of both halves of a step.
#[inline]
#[target_feature(enable = "avx512f")]
fn step_apart(x: &[f32; STEP]) -> [[__m512; 2]; 2] {
    let halves = x.as_chunks::<32>().0;
    [apart(&halves[0]), apart(&halves[1])]
}

/// The even ones, then the odd ones, of 32 weights.
#[inline]
#[target_feature(enable = "avx512f")]
fn widened(weights: &[u8; 64]) -> [__m512; 2] {
    let both = load_512(weights);
    let odd = _mm512_and_si512(both, _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed()));
    [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)), _mm512_castsi512_ps(odd)]
}

/// Four sums of one row and one token: the even and the odd weights of both registers of a step.
type Sums = [__m512; 4];

#[inline]
#[target_feature(enable = "avx512f")]
fn add(weights: &[u8; 2 * STEP], x: &[[__m512; 2]; 2], sums: &mut Sums) {
    for (half, weights) in weights.as_chunks::<64>().0.iter().enumerate() {
        for (odd, weights) in widened(weights).into_iter().enumerate() {
            let sum = &mut sums[2 * half + odd];
            *sum = _mm512_fmadd_ps(weights, x[half][odd], *sum);
        }
    }
}

/// `R` weight rows of as many weights each with `T` activation rows: `[R][T]`. A row's tail is padded with zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
pub(super) fn bf16_rows<const R: usize, const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [[f32; T]; R] {
    let row_bytes = weight.len() / R;
    let x = activation_blocks::<f32, T>(x, row_bytes / 2);
    let rows: [_; R] = std::array::from_fn(|r| weight[r * row_bytes..][..row_bytes].as_chunks::<{ 2 * STEP }>());
    let ahead = ahead_of_rows::<R>(row_bytes);
    let mut sums = [[[_mm512_setzero_ps(); 4]; T]; R];
    let mut lanes = [[[_mm512_setzero_ps(); 2]; 2]; T];
    for i in 0..row_bytes / (2 * STEP) {
        // No `map`: it lacks this function's processor features, so its closure would not be compiled into the loop.
        for (lanes, x) in lanes.iter_mut().zip(&x) {
            *lanes = step_apart(&x.as_chunks().0[i]);
        }
        for ((steps, _), sums) in rows.iter().zip(&mut sums) {
            if T == 1 {
                fetch_ahead(&steps[i], ahead);
            }
            for (lanes, sums) in lanes.iter().zip(sums) {
                add(&steps[i], lanes, sums);
            }
        }
    }
    let tail = row_bytes % (2 * STEP);
    if tail > 0 {
        for (t, x) in x.iter().enumerate() {
            let mut padded = [0f32; STEP];
            padded[..tail / 2].copy_from_slice(x.as_chunks::<STEP>().1);
            let lanes = step_apart(&padded);
            for ((_, row), sums) in rows.iter().zip(&mut sums) {
                let mut padded = [0u8; 2 * STEP];
                padded[..tail].copy_from_slice(row);
                add(&padded, &lanes, &mut sums[t]);
            }
        }
    }
    let mut out = [[0f32; T]; R];
    for (out, sums) in out.iter_mut().zip(sums) {
        for (out, [a, b, c, d]) in out.iter_mut().zip(sums) {
            *out = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
        }
    }
    out
}
