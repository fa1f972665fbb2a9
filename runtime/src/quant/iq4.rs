//! IQ4_NL and IQ4_XS: 4-bit codes into a fixed table of unevenly spaced values.
//!
//! IQ4_NL has one f16 scale per 32 weights; IQ4_XS is 256 weights, an f16 scale and eight 6-bit scales (offset 32) for
//! sub-blocks of 32. Layout: `ggml-common.h` (`block_iq4_nl`, `block_iq4_xs`).

use super::legacy::{dot_codes, nibbles};
use super::{ActivationQ8_1, ActivationQ8K, Block, IQ4_VALUES, assert_layout, f16};
use tierwise_cost::quant::QuantFormat;

/// 32 weights, `w = scale * table[code]`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockIq4Nl {
    /// f16.
    pub scale: [u8; 2],
    /// Two codes per byte, low nibbles first.
    pub codes: [u8; 16],
}

/// 256 weights, `w = scale * (sub_scale - 32) * table[code]`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockIq4Xs {
    /// f16.
    pub scale: [u8; 2],
    /// Upper two bits of the eight sub-scales, two bits each.
    pub scales_high: [u8; 2],
    /// Lower four bits of the eight sub-scales, a nibble each.
    pub scales_low: [u8; 4],
    /// Sixteen bytes per sub-block, low nibbles first.
    pub codes: [u8; 128],
}
assert_layout!(BlockIq4Nl BlockIq4Xs);

fn table_values(codes: &[u8; 16]) -> [i8; 32] {
    nibbles(codes).map(|c| IQ4_VALUES[usize::from(c)])
}

impl Block for BlockIq4Nl {
    const FORMAT: QuantFormat = QuantFormat::IQ4_NL;
    type Activation = ActivationQ8_1;

    fn dequantize(&self, out: &mut [f32]) {
        let scale = f16(self.scale);
        for (out, value) in out.iter_mut().zip(table_values(&self.codes)) {
            *out = scale * f32::from(value);
        }
    }

    fn dot(&self, activation: &ActivationQ8_1) -> f32 {
        (f16(self.scale) * activation.scale) * dot_codes(&table_values(&self.codes), activation) as f32
    }
}

impl BlockIq4Xs {
    /// The eight sub-block scales, -32..=31.
    pub(crate) fn sub_scales(&self) -> [i8; 8] {
        let high = u16::from_le_bytes(self.scales_high);
        std::array::from_fn(|i| {
            let low = self.scales_low[i / 2] >> (4 * (i % 2)) & 15;
            (low | ((high >> (2 * i) & 3) as u8) << 4) as i8 - 32
        })
    }
}

impl Block for BlockIq4Xs {
    const FORMAT: QuantFormat = QuantFormat::IQ4_XS;
    type Activation = ActivationQ8K;

    fn dequantize(&self, out: &mut [f32]) {
        let scale = f16(self.scale);
        let parts = self.codes.as_chunks::<16>().0.iter().zip(self.sub_scales());
        for ((codes, sub_scale), out) in parts.zip(out.chunks_exact_mut(32)) {
            let scale = scale * f32::from(sub_scale);
            for (out, value) in out.iter_mut().zip(table_values(codes)) {
                *out = scale * f32::from(value);
            }
        }
    }

    fn dot(&self, activation: &ActivationQ8K) -> f32 {
        let mut sum = 0;
        let parts = self.codes.as_chunks::<16>().0.iter().zip(self.sub_scales());
        for ((codes, sub_scale), x) in parts.zip(activation.codes.as_chunks::<32>().0) {
            let part: i32 = table_values(codes).iter().zip(x).map(|(w, x)| i32::from(*w) * i32::from(*x)).sum();
            sum += i32::from(sub_scale) * part;
        }
        (f16(self.scale) * activation.scale) * sum as f32
    }
}
