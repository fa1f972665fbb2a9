//! MXFP4: 32 FP4 (E2M1) weights sharing one power-of-two scale (E8M0), the OCP microscaling format.
//!
//! ggml stores the code values doubled ([`MXFP4_VALUES`]) and halves the scale instead: `w = 2^(exponent - 128) * value`.
//! Layout: `ggml-common.h` (`block_mxfp4`); exponents 0 and 1 give the subnormals 2^-128 and 2^-127 as in ggml.

use super::legacy::{dot_codes, nibbles};
use super::{ActivationQ8_1, Block, MXFP4_VALUES, assert_layout};
use tierwise_cost::quant::QuantFormat;

/// 32 weights.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockMxfp4 {
    /// E8M0: a biased power of two.
    pub exponent: u8,
    /// Two codes per byte, low nibbles first.
    pub codes: [u8; 16],
}
assert_layout!(BlockMxfp4);

/// `2^(exponent - 128)`, the scale of the doubled code values.
pub(crate) const fn half_scale(exponent: u8) -> f32 {
    let bits = if exponent < 2 { 0x0020_0000 << exponent } else { (exponent as u32 - 1) << 23 };
    f32::from_bits(bits)
}

impl BlockMxfp4 {
    fn values(&self) -> [i8; 32] {
        nibbles(&self.codes).map(|c| MXFP4_VALUES[usize::from(c)])
    }
}

impl Block for BlockMxfp4 {
    const FORMAT: QuantFormat = QuantFormat::MXFP4;
    type Activation = ActivationQ8_1;

    fn dequantize(&self, out: &mut [f32]) {
        let scale = half_scale(self.exponent);
        for (out, value) in out.iter_mut().zip(self.values()) {
            *out = scale * f32::from(value);
        }
    }

    fn dot(&self, activation: &ActivationQ8_1) -> f32 {
        (half_scale(self.exponent) * activation.scale) * dot_codes(&self.values(), activation) as f32
    }
}
