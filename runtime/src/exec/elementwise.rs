//! What is done to the elements of a row: norms, caps, gates. The executor's matrices are elsewhere.

use crate::kernels::CpuKernels;

/// `x / sqrt(mean(x^2) + eps) * weight`.
pub(super) fn rms_norm_in_place(kernels: &CpuKernels, x: &mut [f32], weight: Option<&[f32]>, eps: f32) {
    let scale = 1.0 / (kernels.dot_f32(x, x) / x.len() as f32 + eps).sqrt();
    match weight {
        Some(weight) => x.iter_mut().zip(weight).for_each(|(x, w)| *x *= scale * w),
        None => x.iter_mut().for_each(|x| *x *= scale),
    }
}

/// `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`.
pub(super) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let mean = x.iter().sum::<f32>() / x.len() as f32;
    let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / x.len() as f32;
    let scale = 1.0 / (variance + eps).sqrt();
    for (((out, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *out = (x - mean) * scale * w + b;
    }
}

/// `cap * tanh(x / cap)`, if there is a cap.
pub(super) fn capped(x: f32, cap: Option<f32>) -> f32 {
    cap.map_or(x, |cap| cap * (x / cap).tanh())
}

/// `1 / (1 + exp(-x))`.
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
