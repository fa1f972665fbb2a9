//! The kernels in plain Rust: the oracle of the vector versions and the fallback everywhere.
//!
//! Sums run over 16 interleaved partial sums: closer to the exact value than one long sum, and easy for the compiler.

use super::{RowDots, TILE};
use crate::quant::{Block, BlockQ8_0, with_block};
use half::f16;
use tierwise_cost::quant::QuantFormat;

const LANES: usize = 16;

pub(super) const fn row_dots(format: QuantFormat) -> RowDots {
    with_block!(format, B => RowDots { one: rows::<B, 1>, tile: rows::<B, TILE>, several: None, fetches: false })
}

fn rows<B: Block, const T: usize>(weight: &[u8], x: [&[u8]; T]) -> [f32; T] {
    let weight: &[B] = bytemuck::cast_slice(weight);
    x.map(|x| {
        let x: &[B::Activation] = bytemuck::cast_slice(x);
        assert_eq!(weight.len(), x.len(), "weight and activation rows differ in length");
        let mut sums = [0f32; LANES];
        for (weight, x) in weight.chunks(LANES).zip(x.chunks(LANES)) {
            for ((sum, weight), x) in sums.iter_mut().zip(weight).zip(x) {
                *sum += weight.dot(x);
            }
        }
        sums.iter().sum()
    })
}

pub(super) fn axpy_f32(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// `1 / sqrt(mean + eps)` from the sum of squares over `n` elements.
pub(super) fn inverse_rms(sum_of_squares: f64, n: usize, eps: f32) -> f32 {
    (1.0 / (sum_of_squares / n as f64 + f64::from(eps)).sqrt()) as f32
}

pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let squares: f64 = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    let scale = inverse_rms(squares, x.len(), eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

pub(super) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + (-gate).exp()) * up;
    }
}

pub(super) fn softmax(x: &mut [f32]) {
    let max = x.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let mut sum = 0f64;
    for v in x.iter_mut() {
        *v = (*v - max).exp();
        sum += f64::from(*v);
    }
    let scale = (1.0 / sum) as f32;
    for v in x {
        *v *= scale;
    }
}

pub(super) fn f32_to_f16(src: &[f32], out: &mut [f16]) {
    for (out, src) in out.iter_mut().zip(src) {
        *out = f16::from_f32(*src);
    }
}

pub(super) fn f16_to_f32(src: &[f16], out: &mut [f32]) {
    for (out, src) in out.iter_mut().zip(src) {
        *out = src.to_f32();
    }
}

pub(super) fn q8_0_to_f32(src: &[BlockQ8_0], out: &mut [f32]) {
    for (block, out) in src.iter().zip(out.chunks_exact_mut(32)) {
        block.dequantize(out);
    }
}
