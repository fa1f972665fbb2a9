//! Tensors of a checkpoint that are no concatenation of stored bytes: made once at load, held in memory.
//!
//! `kv_b_proj` holds keys and values of each head in turn; latent attention wants the keys' part transposed and both parts stacked.
//! gpt-oss and Llama-4 store experts' matrices transposed, gpt-oss with gate and up columns in turn. FP8 checkpoints (DeepSeek-V3 and
//! later) store matrices as 8-bit floats with one scale per block of 128 x 128 elements; they are multiplied out to float32. gpt-oss
//! stores experts in MXFP4 as bytes of two neighbours and, in another tensor, a scale per 32 elements (OCP Microscaling Formats 1.0);
//! they become blocks of ggml, scale first, whose bytes hold elements 16 apart. No bit of a value changes.

use super::hf_weights::Piece;

/// What turns the stored pieces of a tensor into the tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conversion {
    /// The pieces one after the other.
    Join,
    /// Of each piece, a matrix `[rows, cols]`, some columns become rows: `count` of them, every `step`-th from `first` on.
    Columns {
        /// Rows of a stored piece.
        rows: u64,
        /// Columns of a stored piece.
        cols: u64,
        /// First column taken.
        first: u64,
        /// Distance of columns taken.
        step: u64,
        /// Columns taken.
        count: u64,
    },
    /// Of each piece some of its `rows` rows: `count` of them, every `step`-th from `first` on.
    Rows {
        /// Rows of a stored piece.
        rows: u64,
        /// First row taken.
        first: u64,
        /// Distance of rows taken.
        step: u64,
        /// Rows taken.
        count: u64,
    },
    /// The pieces one after the other, every element changed and in float32.
    Map(Change),
}

/// What is done with an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// `1 + x`: weights of norms that are stored around zero (Qwen3-Next).
    PlusOne,
    /// `-exp(x)`: the logarithm of a decay to the decay (Qwen3-Next).
    NegativeExp,
}

impl Change {
    /// The changed element.
    pub(super) fn of(self, x: f32) -> f32 {
        match self {
            Self::PlusOne => 1.0 + x,
            Self::NegativeExp => -x.exp(),
        }
    }
}

impl Conversion {
    /// Each piece is a matrix `[rows, cols]` that is transposed.
    pub(super) const fn transpose(rows: u64, cols: u64) -> Self {
        Self::Columns { rows, cols, first: 0, step: 1, count: cols }
    }
}

/// Appends the transpose of a matrix of elements of `size` bytes.
pub(super) fn transpose(matrix: &[u8] /* [rows, cols] */, rows: usize, cols: usize, size: usize, out: &mut Vec<u8>) {
    for col in 0..cols {
        for row in 0..rows {
            let at = (row * cols + col) * size;
            out.extend_from_slice(&matrix[at..at + size]);
        }
    }
}

/// The tensor of `pieces`, whose bytes `bytes_of` gives.
pub(super) fn convert<'a, E>(
    how: Conversion,
    pieces: &[Piece],
    element_bytes: usize,
    mut bytes_of: impl FnMut(&Piece) -> Result<std::borrow::Cow<'a, [u8]>, E>,
) -> Result<Vec<u8>, E> {
    let mut out = Vec::new();
    for piece in pieces {
        let bytes = bytes_of(piece)?;
        match how {
            Conversion::Join | Conversion::Map(_) => out.extend_from_slice(&bytes),
            Conversion::Columns { rows, cols, first, step, count } => {
                for col in (first..cols).step_by(step as usize).take(count as usize) {
                    for row in 0..rows {
                        let at = (row * cols + col) as usize * element_bytes;
                        out.extend_from_slice(&bytes[at..at + element_bytes]);
                    }
                }
            }
            Conversion::Rows { rows, first, step, count } => {
                let row_bytes = bytes.len() / rows.max(1) as usize;
                for row in (first..rows).step_by(step as usize).take(count as usize) {
                    out.extend_from_slice(&bytes[row as usize * row_bytes..(row as usize + 1) * row_bytes]);
                }
            }
        }
    }
    Ok(out)
}

/// Stored bytes of an MXFP4 group: two elements each.
pub(super) const MXFP4_GROUP_BYTES: usize = 16;

/// MXFP4 groups `[groups, 16]` with their scales `[groups]` as ggml's blocks: the scale, then elements 0 and 16, 1 and 17, ...
pub(super) fn repack_mxfp4(groups: &[u8], scales: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(groups.len() + scales.len());
    let nibble = |group: &[u8; MXFP4_GROUP_BYTES], element: usize| group[element / 2] >> (4 * (element % 2)) & 15;
    for (group, scale) in groups.as_chunks::<MXFP4_GROUP_BYTES>().0.iter().zip(scales) {
        out.push(*scale);
        out.extend((0..MXFP4_GROUP_BYTES).map(|i| nibble(group, i) | nibble(group, i + 16) << 4));
    }
    out
}

/// Rows and columns that share a scale.
const FP8_BLOCK: usize = 128;

/// Shape of the scales of an FP8 matrix `[rows, cols]`.
pub(super) fn fp8_scale_shape(rows: u64, cols: u64) -> [u64; 2] {
    [rows.div_ceil(FP8_BLOCK as u64), cols.div_ceil(FP8_BLOCK as u64)]
}

/// Elements from number `first` on of an FP8 matrix of `cols` columns as float32 bytes.
pub(super) fn decode_fp8(
    elements: &[u8],
    first: usize,
    cols: usize,
    scales: &[f32], // [rows / 128, cols / 128], rounded up
) -> Vec<u8> {
    let table: Vec<f32> = (0..=255u8).map(fp8_e4m3).collect();
    let scales_per_row = cols.div_ceil(FP8_BLOCK);
    let mut out = Vec::with_capacity(elements.len() * 4);
    for (at, element) in (first..).zip(elements) {
        let (row, col) = (at / cols, at % cols);
        let scale = scales[row / FP8_BLOCK * scales_per_row + col / FP8_BLOCK];
        out.extend_from_slice(&(table[usize::from(*element)] * scale).to_le_bytes());
    }
    out
}

/// A float of one sign, four exponent (bias 7) and three mantissa bits; without infinities (arXiv 2209.05433).
fn fp8_e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2.0f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2.0f32.powi(exponent - 7),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bit_floats_by_hand() {
        let cases =
            [(0x00, 0.0), (0x01, 0.001_953_125), (0x08, 0.015_625), (0x38, 1.0), (0x3c, 1.5), (0xc0, -2.0), (0x7e, 448.0)];
        for (bits, value) in cases {
            assert_eq!(fp8_e4m3(bits), value, "{bits:#x}");
        }
        assert!(fp8_e4m3(0x7f).is_nan() && fp8_e4m3(0xff).is_nan());
    }

    #[test]
    fn mxfp4_blocks_keep_every_element() {
        // Element i of the group is i mod 16: bytes of neighbours 10, 32, ..., twice.
        let group: Vec<u8> = (0..16).map(|i| (2 * i % 16) | (((2 * i + 1) % 16) << 4)).collect();
        let blocks = repack_mxfp4(&[group, vec![0xf0; 16]].concat(), &[120, 7]);
        let mut expected = vec![120];
        expected.extend((0..16u8).map(|i| i | i << 4));
        expected.push(7);
        // Even elements 0, odd ones 15.
        expected.extend((0..16u8).map(|i| if i % 2 == 0 { 0 } else { 0xff }));
        assert_eq!(blocks, expected);
    }

    #[test]
    fn scales_are_those_of_the_block() {
        // Two rows of 130 columns from column 127 of row 127 on: blocks (0, 0), (0, 1), then (1, 0).
        let scales = [1.0, 10.0, 100.0, 1000.0];
        let bytes = decode_fp8(&[0x38; 4], 127 * 130 + 127, 130, &scales);
        let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        assert_eq!(values, [1.0, 10.0, 10.0, 100.0]);
    }

    #[test]
    fn transposed_elements_keep_their_bytes() {
        let mut out = Vec::new();
        transpose(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 2, 3, 2, &mut out);
        assert_eq!(out, [1, 2, 7, 8, 3, 4, 9, 10, 5, 6, 11, 12]);
    }
}
