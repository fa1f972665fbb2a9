//! Q2_K ... Q6_K and Q8_K: super-blocks of 256 weights with small integer scales per sub-block.
//!
//! All five fit one formula, `w = scale * s[g] * code - min * m[g]` with `g` the group of 16 the weight is in (formats with
//! sub-blocks of 32 repeat each scale). The structs below only differ in where the bits lie; [`Groups`] is the common ground.
//! Layouts: `ggml-common.h` (`block_q2_K` ... `block_q8_K`), bit order: `dequantize_row_*` in `ggml-quants.c`.

use super::{ActivationQ8K, Block, assert_layout, f16};
use tierwise_cost::quant::QuantFormat;

/// A decoded super-block: `w = scale * scales[i / 16] * codes[i] - min * mins[i / 16]`.
struct Groups {
    scale: f32,
    min: f32,
    scales: [i8; 16],
    mins: [u8; 16],
    codes: [i8; 256],
}

impl Groups {
    fn dequantize(&self, out: &mut [f32]) {
        let groups = self.scales.iter().zip(&self.mins).zip(self.codes.chunks_exact(16));
        for (((s, m), codes), out) in groups.zip(out.chunks_exact_mut(16)) {
            let (scale, min) = (self.scale * f32::from(*s), self.min * f32::from(*m));
            for (out, code) in out.iter_mut().zip(codes) {
                *out = scale * f32::from(*code) - min;
            }
        }
    }

    /// The integer sums are exact: at most 256 * 128 * 128 * 127 (Q8_K: scale 1) < 2^31.
    fn dot(&self, activation: &ActivationQ8K) -> f32 {
        let (mut product, mut minimum) = (0i32, 0i32);
        for g in 0..16 {
            let at = 16 * g..16 * g + 16;
            let dot: i32 =
                self.codes[at.clone()].iter().zip(&activation.codes[at]).map(|(w, x)| i32::from(*w) * i32::from(*x)).sum();
            product += i32::from(self.scales[g]) * dot;
            minimum += i32::from(self.mins[g]) * i32::from(activation.sums[g]);
        }
        (self.scale * activation.scale) * product as f32 - (self.min * activation.scale) * minimum as f32
    }
}

macro_rules! k_block {
    ($($block:ident $format:ident),*) => {
        assert_layout!($($block)*);
        $(impl Block for $block {
            const FORMAT: QuantFormat = QuantFormat::$format;
            type Activation = ActivationQ8K;

            fn dequantize(&self, out: &mut [f32]) {
                self.groups().dequantize(out);
            }

            fn dot(&self, activation: &ActivationQ8K) -> f32 {
                self.groups().dot(activation)
            }
        })*
    };
}
k_block!(BlockQ2K Q2_K, BlockQ3K Q3_K, BlockQ4K Q4_K, BlockQ5K Q5_K, BlockQ6K Q6_K, BlockQ8K Q8_K);

/// 2-bit codes with 4-bit scales and minima per 16.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockQ2K {
    /// Per group: scale in the low, minimum in the high nibble.
    pub scales: [u8; 16],
    /// Four codes per byte; see `two_bit_code`.
    pub codes: [u8; 64],
    /// f16.
    pub scale: [u8; 2],
    /// f16.
    pub min: [u8; 2],
}

/// Code `i` of the 64 bytes in which Q2_K and Q3_K keep two bits per element: each half of 128 elements uses 32 bytes,
/// elements 32 apart sharing a byte.
fn two_bit_code(codes: &[u8; 64], i: usize) -> u8 {
    codes[32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32)) & 3
}

impl BlockQ2K {
    fn groups(&self) -> Groups {
        Groups {
            scale: f16(self.scale),
            min: f16(self.min),
            scales: self.scales.map(|s| (s & 15) as i8),
            mins: self.scales.map(|s| s >> 4),
            codes: std::array::from_fn(|i| two_bit_code(&self.codes, i) as i8),
        }
    }
}

/// 3-bit codes (offset 4) with 6-bit scales (offset 32) per 16.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockQ3K {
    /// Third bits: bit `i / 32` of byte `i % 32`.
    pub high: [u8; 32],
    /// Lower two bits; see `two_bit_code`.
    pub codes: [u8; 64],
    /// Sixteen 6-bit scales: nibbles in the first eight bytes, upper two bits in the last four.
    pub scales: [u8; 12],
    /// f16.
    pub scale: [u8; 2],
}

impl BlockQ3K {
    fn groups(&self) -> Groups {
        let scales = std::array::from_fn(|g| {
            let low = self.scales[g % 8] >> (4 * (g / 8)) & 15;
            let high = self.scales[8 + g % 4] >> (2 * (g / 4)) & 3;
            (low | high << 4) as i8 - 32
        });
        let codes = std::array::from_fn(|i| {
            let high = self.high[i % 32] >> (i / 32) & 1;
            (two_bit_code(&self.codes, i) | high << 2) as i8 - 4
        });
        Groups { scale: f16(self.scale), min: 0.0, scales, mins: [0; 16], codes }
    }
}

/// 4-bit codes with 6-bit scales and minima per 32.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockQ4K {
    /// f16.
    pub scale: [u8; 2],
    /// f16.
    pub min: [u8; 2],
    /// See `unpack_scales`.
    pub scales: [u8; 12],
    /// 32 bytes per 64 elements, the first 32 in the low nibbles.
    pub codes: [u8; 128],
}

/// Scales and minima of the eight sub-blocks of Q4_K and Q5_K, one byte each, from their 12 packed bytes: the lower six bits
/// of bytes 0-3 and 4-7 are the first four scales and minima; the last four have their lower four bits in the nibbles of
/// bytes 8-11 and their upper two in the top bits of bytes 0-7.
#[inline]
pub(crate) fn unpack_scales(packed: &[u8; 12]) -> (u64, u64) {
    let word = |i: usize| u32::from_le_bytes([packed[i], packed[i + 1], packed[i + 2], packed[i + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    let scales_late = (c & 0x0F0F_0F0F) | (a >> 2 & 0x3030_3030);
    let mins_late = (c >> 4 & 0x0F0F_0F0F) | (b >> 2 & 0x3030_3030);
    let join = |early: u32, late: u32| u64::from(early & 0x3F3F_3F3F) | u64::from(late) << 32;
    (join(a, scales_late), join(b, mins_late))
}

/// The packed inverse of [`unpack_scales`].
pub(crate) fn pack_scales(scales: [u8; 8], mins: [u8; 8]) -> [u8; 12] {
    std::array::from_fn(|i| match i {
        0..4 => scales[i] | scales[i + 4] >> 4 << 6,
        4..8 => mins[i - 4] | mins[i] >> 4 << 6,
        _ => scales[i - 4] & 15 | mins[i - 4] << 4,
    })
}

fn sub_block_pairs(values: u64) -> [u8; 16] {
    let values = values.to_le_bytes();
    std::array::from_fn(|g| values[g / 2])
}

/// Nibble of element `i` in the layout of Q4_K and Q5_K.
fn nibble(codes: &[u8; 128], i: usize) -> u8 {
    codes[32 * (i / 64) + i % 32] >> (4 * (i % 64 / 32)) & 15
}

impl BlockQ4K {
    fn groups(&self) -> Groups {
        let (scales, mins) = unpack_scales(&self.scales);
        Groups {
            scale: f16(self.scale),
            min: f16(self.min),
            scales: sub_block_pairs(scales).map(|s| s as i8),
            mins: sub_block_pairs(mins),
            codes: std::array::from_fn(|i| nibble(&self.codes, i) as i8),
        }
    }
}

/// 5-bit codes with 6-bit scales and minima per 32.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockQ5K {
    /// f16.
    pub scale: [u8; 2],
    /// f16.
    pub min: [u8; 2],
    /// See `unpack_scales`.
    pub scales: [u8; 12],
    /// Fifth bits: bit `i / 32` of byte `i % 32`.
    pub high: [u8; 32],
    /// As in [`BlockQ4K`].
    pub codes: [u8; 128],
}

impl BlockQ5K {
    fn groups(&self) -> Groups {
        let (scales, mins) = unpack_scales(&self.scales);
        let codes = std::array::from_fn(|i| {
            let high = self.high[i % 32] >> (i / 32) & 1;
            (nibble(&self.codes, i) | high << 4) as i8
        });
        Groups {
            scale: f16(self.scale),
            min: f16(self.min),
            scales: sub_block_pairs(scales).map(|s| s as i8),
            mins: sub_block_pairs(mins),
            codes,
        }
    }
}

/// 6-bit codes (offset 32) with 8-bit scales per 16.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockQ6K {
    /// Lower four bits: per half of 128 elements 64 bytes, elements 64 apart sharing a byte.
    pub low: [u8; 128],
    /// Upper two bits: per half 32 bytes, elements 32 apart sharing a byte.
    pub high: [u8; 64],
    /// Per group of 16.
    pub scales: [i8; 16],
    /// f16.
    pub scale: [u8; 2],
}

impl BlockQ6K {
    fn groups(&self) -> Groups {
        let codes = std::array::from_fn(|i| {
            let low = self.low[64 * (i / 128) + i % 64] >> (4 * (i % 128 / 64)) & 15;
            (low | two_bit_code(&self.high, i) << 4) as i8 - 32
        });
        Groups { scale: f16(self.scale), min: 0.0, scales: self.scales, mins: [0; 16], codes }
    }
}

/// 8-bit codes with an f32 scale. Files rarely hold it; ggml uses it for activations.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BlockQ8K {
    /// f32.
    pub scale: [u8; 4],
    /// The codes.
    pub codes: [i8; 256],
    /// Sixteen i16 sums of 16 codes each; redundant, not read.
    pub sums: [[u8; 2]; 16],
}

impl BlockQ8K {
    fn groups(&self) -> Groups {
        Groups { scale: f32::from_le_bytes(self.scale), min: 0.0, scales: [1; 16], mins: [0; 16], codes: self.codes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_scales_round_trip() {
        let scales: [u8; 8] = [0, 63, 1, 32, 17, 48, 63, 5];
        let mins: [u8; 8] = [63, 0, 31, 16, 63, 1, 15, 49];
        let (s, m) = unpack_scales(&pack_scales(scales, mins));
        assert_eq!((s.to_le_bytes(), m.to_le_bytes()), (scales, mins));
    }
}
