//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 weights, one f16 scale, for the `_1` formats one f16 minimum.
//!
//! Element `i` of a 4-bit block is the low nibble of byte `i` for `i < 16`, else the high nibble of byte `i - 16`; bit `i` of
//! `high` is its fifth bit. The `_0` formats subtract the middle code, the `_1` formats add the minimum.
//! Layout: `ggml-common.h` (`block_q4_0` ... `block_q8_0`).

use super::{ActivationQ8_1, Block, assert_layout, f16};
use tierwise_cost::quant::QuantFormat;

/// `w = scale * (code - 8)`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockQ4_0 {
    /// f16.
    pub scale: [u8; 2],
    /// Two codes per byte.
    pub codes: [u8; 16],
}

/// `w = scale * code + min`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockQ4_1 {
    /// f16.
    pub scale: [u8; 2],
    /// f16.
    pub min: [u8; 2],
    /// Two codes per byte.
    pub codes: [u8; 16],
}

/// `w = scale * (code - 16)`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockQ5_0 {
    /// f16.
    pub scale: [u8; 2],
    /// Fifth bits, element 0 in bit 0 of the little-endian number.
    pub high: [u8; 4],
    /// Low four bits, two codes per byte.
    pub codes: [u8; 16],
}

/// `w = scale * code + min`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockQ5_1 {
    /// f16.
    pub scale: [u8; 2],
    /// f16.
    pub min: [u8; 2],
    /// Fifth bits, element 0 in bit 0 of the little-endian number.
    pub high: [u8; 4],
    /// Low four bits, two codes per byte.
    pub codes: [u8; 16],
}

/// `w = scale * code`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockQ8_0 {
    /// f16.
    pub scale: [u8; 2],
    /// The codes.
    pub codes: [i8; 32],
}

assert_layout!(BlockQ4_0 BlockQ4_1 BlockQ5_0 BlockQ5_1 BlockQ8_0);

/// The 32 nibbles of 16 bytes in element order.
pub(super) fn nibbles(codes: &[u8; 16]) -> [u8; 32] {
    std::array::from_fn(|i| if i < 16 { codes[i] & 15 } else { codes[i - 16] >> 4 })
}

/// The 32 five-bit codes.
fn five_bits(codes: &[u8; 16], high: [u8; 4]) -> [u8; 32] {
    let high = u32::from_le_bytes(high);
    let low = nibbles(codes);
    std::array::from_fn(|i| low[i] | ((high >> i & 1) as u8) << 4)
}

/// Exact integer dot product of 32 codes.
pub(super) fn dot_codes(weights: &[i8; 32], activation: &ActivationQ8_1) -> i32 {
    weights.iter().zip(&activation.codes).map(|(w, x)| i32::from(*w) * i32::from(*x)).sum()
}

/// Blocks without a minimum: signed codes times the scale.
macro_rules! symmetric_block {
    ($block:ident, $format:ident, $codes:expr) => {
        impl Block for $block {
            const FORMAT: QuantFormat = QuantFormat::$format;
            type Activation = ActivationQ8_1;

            fn dequantize(&self, out: &mut [f32]) {
                let scale = f16(self.scale);
                let codes: [i8; 32] = $codes(self);
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = scale * f32::from(code);
                }
            }

            fn dot(&self, activation: &ActivationQ8_1) -> f32 {
                let codes: [i8; 32] = $codes(self);
                (f16(self.scale) * activation.scale) * dot_codes(&codes, activation) as f32
            }
        }
    };
}
symmetric_block!(BlockQ4_0, Q4_0, |b: &BlockQ4_0| nibbles(&b.codes).map(|c| c as i8 - 8));
symmetric_block!(BlockQ5_0, Q5_0, |b: &BlockQ5_0| five_bits(&b.codes, b.high).map(|c| c as i8 - 16));
symmetric_block!(BlockQ8_0, Q8_0, |b: &BlockQ8_0| b.codes);

/// Blocks with a minimum: unsigned codes times the scale, plus the minimum times the sum of the activations.
macro_rules! minimum_block {
    ($block:ident, $format:ident, $codes:expr) => {
        impl Block for $block {
            const FORMAT: QuantFormat = QuantFormat::$format;
            type Activation = ActivationQ8_1;

            fn dequantize(&self, out: &mut [f32]) {
                let (scale, min) = (f16(self.scale), f16(self.min));
                let codes: [u8; 32] = $codes(self);
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = scale * f32::from(code) + min;
                }
            }

            fn dot(&self, activation: &ActivationQ8_1) -> f32 {
                let codes: [u8; 32] = $codes(self);
                let product = dot_codes(&codes.map(|c| c as i8), activation);
                (f16(self.scale) * activation.scale) * product as f32 + f16(self.min) * activation.sum
            }
        }
    };
}
minimum_block!(BlockQ4_1, Q4_1, |b: &BlockQ4_1| nibbles(&b.codes));
minimum_block!(BlockQ5_1, Q5_1, |b: &BlockQ5_1| five_bits(&b.codes, b.high));
