//! Activations as the dot products want them: plain f32, or 8-bit blocks as wide as the weight's blocks.
//!
//! Eight-bit activations make the inner loop an exact integer dot product. The scheme is ggml's (`quantize_row_q8_0_ref`,
//! `quantize_row_q8_K_ref`): scale = max |x| / 127, codes rounded to nearest even. Two deliberate differences: the scale
//! stays f32 (ggml rounds it to f16 for 32-wide blocks), so large activations cannot overflow; and it is always positive
//! (ggml's Q8_K carries the sign of the largest element, which cancels in every product).

use tierwise_cost::quant::QuantFormat;

/// How activations are stored before they meet weights of some format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "names are those of ggml")]
pub enum ActivationFormat {
    /// As they are.
    F32,
    /// [`ActivationQ8_1`]: for weights in blocks of 32.
    Q8_1,
    /// [`ActivationQ8K`]: for weights in blocks of 256.
    Q8_K,
}

impl ActivationFormat {
    /// Elements and bytes of one block.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, size_of::<f32>()),
            Self::Q8_1 => (32, size_of::<ActivationQ8_1>()),
            Self::Q8_K => (256, size_of::<ActivationQ8K>()),
        }
    }

    /// Bytes of a row of `cols` elements, or `None` when `cols` is not a whole number of blocks or overflows.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        let (elems, bytes) = self.block();
        if !cols.is_multiple_of(elems) {
            return None;
        }
        (cols / elems).checked_mul(bytes)
    }
}

/// The activation format that weights of `weight` are multiplied with.
pub const fn activation_format(weight: QuantFormat) -> ActivationFormat {
    match weight {
        QuantFormat::F32 | QuantFormat::F16 | QuantFormat::BF16 => ActivationFormat::F32,
        QuantFormat::Q4_0
        | QuantFormat::Q4_1
        | QuantFormat::Q5_0
        | QuantFormat::Q5_1
        | QuantFormat::Q8_0
        | QuantFormat::IQ4_NL
        | QuantFormat::MXFP4 => ActivationFormat::Q8_1,
        QuantFormat::Q2_K
        | QuantFormat::Q3_K
        | QuantFormat::Q4_K
        | QuantFormat::Q5_K
        | QuantFormat::Q6_K
        | QuantFormat::Q8_K
        | QuantFormat::IQ4_XS => ActivationFormat::Q8_K,
    }
}

/// 32 activations: `x[i] = scale * codes[i]`, codes within +-127.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct ActivationQ8_1 {
    /// The codes.
    pub codes: [i8; 32],
    /// Step between codes.
    pub scale: f32,
    /// `scale` times the sum of the codes, for formats with a minimum.
    pub sum: f32,
}

/// 256 activations: `x[i] = scale * codes[i]`, codes within +-127. Padded to whole cache lines for aligned loads.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct ActivationQ8K {
    /// The codes.
    pub codes: [i8; 256],
    /// Sums of 16 codes each, for formats with minima.
    pub sums: [i16; 16],
    /// Step between codes.
    pub scale: f32,
    /// Always zero.
    pub padding: [u8; 28],
}

/// Below this largest magnitude a block counts as zero: the scale would be subnormal and its reciprocal overflow.
const SMALLEST_MAGNITUDE: f32 = 127.0 * f32::MIN_POSITIVE;

/// `(scale, reciprocal of the scale)` for a block whose largest magnitude is given; `(0, 0)` for a zero block.
/// A magnitude that is not finite gives `(NaN, 0)`: all codes 0 and every product NaN, so that the fault shows.
pub(crate) fn scale_and_inverse(magnitude_max: f32) -> (f32, f32) {
    if !magnitude_max.is_finite() {
        (f32::NAN, 0.0)
    } else if magnitude_max < SMALLEST_MAGNITUDE {
        (0.0, 0.0)
    } else {
        (magnitude_max / 127.0, 127.0 / magnitude_max)
    }
}

/// Fills `codes` from `x` and returns the scale.
fn encode_codes(x: &[f32], codes: &mut [i8]) -> f32 {
    // f32::max drops NaN, hence the separate test.
    let magnitude_max = if x.iter().any(|v| v.is_nan()) { f32::NAN } else { x.iter().fold(0f32, |m, v| m.max(v.abs())) };
    let (scale, inverse) = scale_and_inverse(magnitude_max);
    if inverse == 0.0 {
        codes.fill(0);
    } else {
        for (code, v) in codes.iter_mut().zip(x) {
            *code = (v * inverse).round_ties_even() as i8;
        }
    }
    scale
}

/// Encodes one row. `x` and `out` cover the same number of elements.
pub(crate) fn encode_q8_1(x: &[f32], out: &mut [ActivationQ8_1]) {
    assert_eq!(x.len(), out.len() * 32, "activation row and buffer differ in length");
    for (x, block) in x.chunks_exact(32).zip(out) {
        block.scale = encode_codes(x, &mut block.codes);
        block.sum = block.scale * block.codes.iter().map(|c| i32::from(*c)).sum::<i32>() as f32;
    }
}

/// Encodes one row. `x` and `out` cover the same number of elements.
pub(crate) fn encode_q8k(x: &[f32], out: &mut [ActivationQ8K]) {
    assert_eq!(x.len(), out.len() * 256, "activation row and buffer differ in length");
    for (x, block) in x.chunks_exact(256).zip(out) {
        block.scale = encode_codes(x, &mut block.codes);
        for (sum, codes) in block.sums.iter_mut().zip(block.codes.chunks_exact(16)) {
            *sum = codes.iter().map(|c| i16::from(*c)).sum();
        }
        block.padding = [0; 28];
    }
}
