//! A reusable buffer of encoded activation rows.
//!
//! Rows start on cache lines, which both the vector loads and the casts to block types want; storage only ever grows, so a
//! running engine does not allocate.

use crate::quant::ActivationFormat;
use std::slice::ChunksExactMut;

const LINE_BYTES: usize = 64;

#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Line([u8; LINE_BYTES]);

/// `[tokens]` activation rows in one [`ActivationFormat`].
#[derive(Debug)]
pub struct ActivationBuf {
    lines: Vec<Line>,
    all_tokens: Vec<u32>,
    format: ActivationFormat,
    tokens: usize,
    cols: usize,
    row_bytes: usize,
    stride_bytes: usize,
}

impl Default for ActivationBuf {
    fn default() -> Self {
        Self::new()
    }
}

impl ActivationBuf {
    /// An empty buffer.
    pub const fn new() -> Self {
        Self {
            lines: Vec::new(),
            all_tokens: Vec::new(),
            format: ActivationFormat::F32,
            tokens: 0,
            cols: 0,
            row_bytes: 0,
            stride_bytes: LINE_BYTES,
        }
    }

    /// Makes room for `tokens` rows of `cols` elements; their contents are unspecified until filled.
    ///
    /// # Panics
    /// If `cols` is zero or not a whole number of blocks.
    pub fn reset(&mut self, format: ActivationFormat, tokens: usize, cols: usize) {
        let row_bytes = format.row_bytes(cols).filter(|bytes| *bytes > 0);
        let row_bytes = row_bytes.unwrap_or_else(|| panic!("rows of {cols} elements are not whole {format:?} blocks"));
        let lines_per_row = row_bytes.div_ceil(LINE_BYTES);
        let lines = lines_per_row * tokens;
        if self.lines.len() < lines {
            self.lines.resize(lines, bytemuck::Zeroable::zeroed());
        }
        let known = u32::try_from(self.all_tokens.len()).expect("holds u32 numbers counted from 0");
        let wanted = u32::try_from(tokens).expect("a batch has fewer than 2^32 tokens");
        self.all_tokens.extend(known..wanted);
        (self.format, self.tokens, self.cols, self.row_bytes) = (format, tokens, cols, row_bytes);
        self.stride_bytes = lines_per_row * LINE_BYTES;
    }

    /// How the rows are encoded.
    pub fn format(&self) -> ActivationFormat {
        self.format
    }

    /// Number of rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Elements per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Storage held, for memory accounts.
    pub fn capacity_bytes(&self) -> usize {
        self.lines.capacity() * LINE_BYTES + self.all_tokens.capacity() * size_of::<u32>()
    }

    /// `0..tokens`: the list that selects every row.
    pub fn all_tokens(&self) -> &[u32] {
        &self.all_tokens[..self.tokens]
    }

    /// The rows, to be filled with [`super::CpuKernels::quantize_activation_row`]; each may be longer than needed.
    pub fn rows_mut(&mut self) -> ChunksExactMut<'_, u8> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.lines);
        bytes[..self.stride_bytes * self.tokens].chunks_exact_mut(self.stride_bytes)
    }

    /// One encoded row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, token: u32) -> &[u8] {
        let token = token as usize;
        assert!(token < self.tokens, "activation row {token} of {}", self.tokens);
        &bytemuck::cast_slice(&self.lines)[token * self.stride_bytes..][..self.row_bytes]
    }
}
