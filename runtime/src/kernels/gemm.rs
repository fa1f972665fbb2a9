//! Products of many tokens: the shapes of repacked weights and activations, and the memory they are built in.
//!
//! A kernel for many tokens decodes [`ROWS`] weight rows block by block into a panel of signed bytes that stays in the nearest
//! cache while all tokens use it, and lays activations out once so that [`TOKENS`] of them stand side by side. The weights in
//! memory stay as they are in the file. Two shapes serve all quantised formats:
//! * super-blocks of 256: code times group scale is an integer of at most 13 bits, kept as `128 * high + low`; so the product of
//!   a whole super-block is one exact integer, as in the scalar reference;
//! * blocks of 32: the codes as they are, four blocks at a time.
//!
//! The matrix unit takes BF16 weights as they lie, F16 weights and all activations split into BF16 numbers; elsewhere floats are multiplied
//! as floats (`gemm_float`).

/// Weight rows of a panel.
pub(super) const ROWS: usize = 16;
/// Tokens of an activation tile.
pub(super) const TOKENS: usize = 16;
/// Bytes of activations kept at hand for one pass over the weights: most of a usual L2 cache.
pub(super) const PASS_BYTES: usize = 3 << 19;

/// One super-block of [`ROWS`] rows: `w = scale * (128 * high + low) - min * mins`.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, bytemuck::Zeroable)]
pub(super) struct SuperPanel {
    /// 0..=127
    pub low: [[i8; 256]; ROWS],
    pub high: [[i8; 256]; ROWS],
    pub scale: [f32; ROWS],
    pub min: [f32; ROWS],
    /// Two minima each, for 8 groups of 32 (the first four numbers) or 16 groups of 16.
    pub mins: [[[i16; 2]; 8]; ROWS],
}

/// One super-block of [`TOKENS`] activation rows.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, bytemuck::Zeroable)]
pub(super) struct SuperTile {
    /// Four consecutive codes of each token.
    pub codes: [[[i8; 4]; TOKENS]; 64],
    /// Sums of 16 codes, two each.
    pub sums: [[[i16; 2]; TOKENS]; 8],
    /// Sums of 32 codes, two each.
    pub sums_of_32: [[[i16; 2]; TOKENS]; 4],
    pub scale: [f32; TOKENS],
}

/// Four blocks of 32 of [`ROWS`] rows: `w = scale * code + min`.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, bytemuck::Zeroable)]
pub(super) struct BlockPanel {
    pub codes: [[[i8; 32]; 4]; ROWS],
    pub scale: [[f32; 4]; ROWS],
    pub min: [[f32; 4]; ROWS],
}

/// Four blocks of 32 of [`TOKENS`] activation rows.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, bytemuck::Zeroable)]
pub(super) struct BlockTile {
    /// Four consecutive codes of each token.
    pub codes: [[[[i8; 4]; TOKENS]; 8]; 4],
    pub scale: [[f32; TOKENS]; 4],
    pub sum: [[f32; TOKENS]; 4],
}

/// Columns of a [`LanePanel`].
pub(super) const PANEL_COLUMNS: usize = 256;

/// [`PANEL_COLUMNS`] columns of [`ROWS`] rows, a row in each lane, in groups of 16 or 32 columns: `w = scale * (code - offset) - min`.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, bytemuck::Zeroable)]
pub(super) struct LanePanel {
    /// Four consecutive columns of each row.
    pub codes: [[[u8; 4]; ROWS]; PANEL_COLUMNS / 4],
    /// Of each group, as `min`; with groups of 32 the first eight.
    pub scale: [[f32; ROWS]; 16],
    pub min: [[f32; ROWS]; 16],
}

/// The same columns of one activation row.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, bytemuck::Zeroable)]
pub(super) struct LaneActivations {
    pub codes: [i8; PANEL_COLUMNS],
    /// Of each group: minus the weights' offset times the sum of the codes.
    pub start: [i32; 16],
    /// Of each group: the sum of the activations, for minima.
    pub sum: [f32; 16],
    /// Of each block of 32; all alike for super-blocks.
    pub scale: [f32; 8],
}

/// 32 columns of [`TOKENS`] activation rows, each the sum of three BF16 numbers; two consecutive columns side by side.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, bytemuck::Zeroable)]
pub(super) struct FloatTile(pub [[[[u16; 2]; TOKENS]; 16]; 3]);

/// Results of one panel and one tile.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, bytemuck::Zeroable)]
pub(super) struct Sums(pub [[f32; TOKENS]; ROWS]);

/// Working memory of [`super::CpuKernels::gemm`], one per thread. It only grows.
#[derive(Debug, Default)]
pub struct GemmScratch {
    pub(super) super_tiles: Vec<SuperTile>,
    pub(super) block_tiles: Vec<BlockTile>,
    pub(super) float_tiles: Vec<FloatTile>,
    pub(super) lane_activations: Vec<LaneActivations>,
    /// `[tokens, ROWS]`
    pub(super) lane_sums: Vec<[f32; ROWS]>,
    pub(super) sums: Vec<Sums>,
    /// Weight rows of awkward sizes.
    pub(super) padded: Vec<u8>,
    /// Sums of two rows and two tokens each.
    #[cfg(target_arch = "aarch64")]
    pub(super) pairs: Vec<[f32; 4]>,
}

/// One product `out = weight * act[tokens]^T`.
pub(super) struct GemmTask<'a> {
    /// `[rows, cols]`, encoded.
    pub weight: &'a [u8],
    pub row_bytes: usize,
    pub act: &'a super::ActivationBuf,
    /// `[n]`
    pub tokens: &'a [u32],
    /// `[rows, n]`
    pub out: &'a mut [f32],
}

/// A kernel for many tokens.
pub(super) type Gemm = unsafe fn(GemmTask<'_>, &mut GemmScratch);

/// How many tiles of `blocks` blocks of `T` a pass takes: as many as fit, in pairs.
pub(super) fn tiles_per_pass<T>(blocks: usize) -> usize {
    (PASS_BYTES / (blocks * size_of::<T>())).max(2).next_multiple_of(2)
}
