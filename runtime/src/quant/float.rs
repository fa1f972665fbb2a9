//! F32, F16 and BF16: one element per block, widened exactly, multiplied with f32 activations.
//!
//! BF16 is the upper half of an f32; F16 is IEEE 754 binary16.

use super::{Block, assert_layout, f16};
use tierwise_cost::quant::QuantFormat;

/// One f32, little-endian.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockF32(pub [u8; 4]);

/// One IEEE half.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockF16(pub [u8; 2]);

/// One bfloat16.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockBf16(pub [u8; 2]);

assert_layout!(BlockF32 BlockF16 BlockBf16);

impl BlockF32 {
    fn value(self) -> f32 {
        f32::from_le_bytes(self.0)
    }
}

impl BlockF16 {
    fn value(self) -> f32 {
        f16(self.0)
    }
}

impl BlockBf16 {
    fn value(self) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(self.0)) << 16)
    }
}

macro_rules! float_block {
    ($($block:ident $format:ident),*) => {$(
        impl Block for $block {
            const FORMAT: QuantFormat = QuantFormat::$format;
            type Activation = f32;

            fn dequantize(&self, out: &mut [f32]) {
                out[0] = self.value();
            }

            fn dot(&self, activation: &f32) -> f32 {
                self.value() * activation
            }
        }
    )*};
}
float_block!(BlockF32 F32, BlockF16 F16, BlockBf16 BF16);
