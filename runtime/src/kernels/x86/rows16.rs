//! Products of a few tokens: sixteen weight rows side by side, one in each lane of a 512-bit register.
//!
//! A dot product along a weight row has work to do for every row and token beside the products: sums across lanes, scales,
//! minima. With a row per lane that work is shared by sixteen rows, and a token's activations come from memory as the operand of
//! the product itself. The price is turning 16 rows of 256 columns once, which from two tokens on is less than it saves; the
//! matrix unit (`gemm512`) needs dearer panels and wins later. All sums of a group are exact integers; groups are added in f32.

#![allow(clippy::needless_range_loop, reason = "rows, tokens and registers are counted alike in several arrays")]

use super::{load_512, load_f32x16, store_512};
use crate::kernels::ActivationBuf;
use crate::kernels::gemm::{GemmScratch, GemmTask, LaneActivations, LanePanel, PANEL_COLUMNS, ROWS};
use crate::quant::{ActivationQ8_1, ActivationQ8K};
use bytemuck::Zeroable;
use std::arch::x86_64::*;

/// Tokens whose sums fit into registers.
const TOKENS: usize = 8;

/// Turns some columns of 16 rows, counted in panels, and fetches ahead meanwhile.
pub(super) type Turn = unsafe fn(&[&[u8]; ROWS], usize, &mut LanePanel, &mut Ahead);

/// What is to be fetched while a panel is made and used: an even part of the next 16 rows, a few lines at a time. All at once they
/// would hold up the products: a core waits for no more than some dozen lines at a time.
pub(super) struct Ahead {
    at: *const u8,
    lines: usize,
}

impl Ahead {
    /// Part `panel` of `count` of what follows `rows`.
    fn new(rows: &[u8], panel: usize, count: usize) -> Self {
        let (from, to) = (panel * rows.len() / count, (panel + 1) * rows.len() / count);
        Self { at: rows.as_ptr().wrapping_add(rows.len() + from), lines: (to - from).div_ceil(64) }
    }

    /// Asks for up to so many lines.
    #[inline(always)]
    pub(super) fn fetch(&mut self, lines: usize) {
        let lines = lines.min(self.lines);
        for _ in 0..lines {
            // SAFETY: a hint that reads nothing, whatever the address; no feature beyond x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.at.cast()) }
            self.at = self.at.wrapping_add(64);
        }
        self.lines -= lines;
    }
}

/// Super-block `block` of a token. Codes of weights are `offset` too large.
fn super_activations<const GROUP: usize>(x: &ActivationQ8K, offset: i32, out: &mut LaneActivations) {
    out.codes = x.codes;
    out.scale = [x.scale; 8];
    for g in 0..PANEL_COLUMNS / GROUP {
        let parts = &x.sums[g * GROUP / 16..(g + 1) * GROUP / 16];
        let sum: i32 = parts.iter().map(|s| i32::from(*s)).sum();
        out.start[g] = -offset * sum;
        out.sum[g] = x.scale * sum as f32;
    }
}

/// Up to eight blocks of a token, the rest zero.
fn block_activations(x: &[ActivationQ8_1], offset: i32, out: &mut LaneActivations) {
    *out = LaneActivations::zeroed();
    for (b, x) in x.iter().enumerate() {
        out.codes[32 * b..32 * (b + 1)].copy_from_slice(&x.codes);
        out.scale[b] = x.scale;
        out.sum[b] = x.sum;
        out.start[b] = -offset * x.codes.iter().map(|c| i32::from(*c)).sum::<i32>();
    }
}

/// Adds the products of a panel's first `groups` groups with `T` tokens. `SUPER`: a token has one scale for all groups.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add<const T: usize, const GROUP: usize, const MINIMA: bool, const SUPER: bool>(
    panel: &LanePanel,
    x: &[LaneActivations; T],
    groups: usize,
    ahead: &mut Ahead,
    sums: &mut [__m512; T],
) {
    let mut parts = [_mm512_setzero_ps(); T];
    let quads = panel.codes.chunks_exact(GROUP / 4);
    for (g, codes) in quads.enumerate().take(groups) {
        ahead.fetch(ahead.lines.div_ceil(groups - g));
        let mut products = [_mm512_setzero_si512(); T];
        for t in 0..T {
            products[t] = _mm512_set1_epi32(x[t].start[g]);
        }
        // Two sums, because a product waits long for the one before it.
        let mut odd = [_mm512_setzero_si512(); T];
        for q in (0..GROUP / 4).step_by(2) {
            let (first, second) = (load_512(&codes[q]), load_512(&codes[q + 1]));
            for t in 0..T {
                let x = x[t].codes.as_chunks::<4>().0[g * (GROUP / 4) + q..].first_chunk::<2>().expect("a whole group");
                products[t] = _mm512_dpbusd_epi32(products[t], first, _mm512_set1_epi32(bytemuck::cast(x[0])));
                odd[t] = _mm512_dpbusd_epi32(odd[t], second, _mm512_set1_epi32(bytemuck::cast(x[1])));
            }
        }
        for t in 0..T {
            products[t] = _mm512_add_epi32(products[t], odd[t]);
        }
        let scale = load_f32x16(&panel.scale[g]);
        for t in 0..T {
            let product = _mm512_cvtepi32_ps(products[t]);
            if SUPER {
                parts[t] = _mm512_fmadd_ps(product, scale, parts[t]);
            } else {
                // The scales of blocks lie in the first eight places.
                let product = _mm512_mul_ps(product, _mm512_set1_ps(x[t].scale[g % 8]));
                sums[t] = _mm512_fmadd_ps(product, scale, sums[t]);
            }
        }
        if MINIMA {
            let min = load_f32x16(&panel.min[g]);
            for t in 0..T {
                sums[t] = _mm512_fnmadd_ps(min, _mm512_set1_ps(x[t].sum[g]), sums[t]);
            }
        }
    }
    if SUPER {
        for t in 0..T {
            sums[t] = _mm512_fmadd_ps(parts[t], _mm512_set1_ps(x[t].scale[0]), sums[t]);
        }
    }
}

/// Adds the products of a panel with a tile of tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_tile<const T: usize, const GROUP: usize, const MINIMA: bool, const SUPER: bool>(
    panel: &LanePanel,
    x: &[LaneActivations],
    groups: usize,
    ahead: &mut Ahead,
    sums: &mut [[f32; ROWS]],
) {
    let (x, sums): (&[_; T], &mut [_; T]) = (x.first_chunk().expect("a tile"), sums.first_chunk_mut().expect("a tile"));
    let mut registers = [_mm512_setzero_ps(); T];
    for t in 0..T {
        registers[t] = load_f32x16(&sums[t]);
    }
    add::<T, GROUP, MINIMA, SUPER>(panel, x, groups, ahead, &mut registers);
    for t in 0..T {
        store_512(&mut sums[t], _mm512_castps_si512(registers[t]));
    }
}

/// The smallest tile with a kernel that takes so many tokens.
fn tile_of(tokens: usize) -> usize {
    tokens.next_multiple_of(2).min(TOKENS)
}

/// The prepared activations of all tokens, tile by tile: `[tiles][panels][tokens of the tile]`; tokens of each tile.
fn prepare<const GROUP: usize, const SUPER: bool>(
    act: &ActivationBuf,
    tokens: &[u32],
    offset: i32,
    out: &mut Vec<LaneActivations>,
) -> usize {
    let panels = act.cols().div_ceil(PANEL_COLUMNS);
    // All tiles alike, with as few missing tokens as may be.
    let tile = tile_of(tokens.len().div_ceil(tokens.len().div_ceil(TOKENS)));
    let tiles = tokens.len().div_ceil(tile);
    if out.len() < tiles * panels * tile {
        out.resize(tiles * panels * tile, LaneActivations::zeroed());
    }
    for (i, tokens) in tokens.chunks(tile).enumerate() {
        for p in 0..panels {
            let out = &mut out[(i * panels + p) * tile..][..tile];
            let (some, none) = out.split_at_mut(tokens.len());
            for (t, out) in tokens.iter().zip(some) {
                if SUPER {
                    super_activations::<GROUP>(&bytemuck::cast_slice::<_, ActivationQ8K>(act.row(*t))[p], offset, out);
                } else {
                    let row: &[ActivationQ8_1] = &bytemuck::cast_slice(act.row(*t))[8 * p..act.cols() / 32];
                    block_activations(&row[..row.len().min(8)], offset, out);
                }
            }
            none.fill(LaneActivations::zeroed());
        }
    }
    tile
}

/// Groups of `GROUP` columns whose codes are `OFFSET` too large. `SUPER`: activations in super-blocks of 256, else in blocks of 32.
///
/// # Safety
/// An [`super::Avx512`] proof exists; `turn` can run on the processor; lengths agree.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn gemm<const GROUP: usize, const OFFSET: i32, const MINIMA: bool, const SUPER: bool>(
    task: GemmTask<'_>,
    scratch: &mut GemmScratch,
    turn: Turn,
) {
    let GemmTask { weight, row_bytes, act, tokens, out } = task;
    let (cols, n) = (act.cols(), tokens.len());
    let count = cols.div_ceil(PANEL_COLUMNS);
    let GemmScratch { lane_activations: x, lane_sums: sums, .. } = scratch;
    let tile = prepare::<GROUP, SUPER>(act, tokens, OFFSET, x);
    let tiles = n.div_ceil(tile);
    let mut panel = LanePanel::zeroed();
    sums.resize(tiles * tile, [0.0; ROWS]);
    for (rows, out) in weight.chunks(ROWS * row_bytes).zip(out.chunks_mut(ROWS * n)) {
        sums.fill([0.0; ROWS]);
        let all = rows;
        // Missing rows are stood in for by the first, and their results dropped.
        let rows: [&[u8]; ROWS] =
            std::array::from_fn(|r| rows.get(r * row_bytes..(r + 1) * row_bytes).unwrap_or(&rows[..row_bytes]));
        for p in 0..count {
            let mut ahead = Ahead::new(all, p, count);
            // SAFETY: as the caller promises.
            unsafe { turn(&rows, p, &mut panel, &mut ahead) };
            let groups = (cols - p * PANEL_COLUMNS).min(PANEL_COLUMNS) / GROUP;
            for (x, sums) in x.chunks(count * tile).zip(sums.chunks_exact_mut(tile)) {
                let x = &x[p * tile..];
                match tile {
                    2 => add_tile::<2, GROUP, MINIMA, SUPER>(&panel, x, groups, &mut ahead, sums),
                    4 => add_tile::<4, GROUP, MINIMA, SUPER>(&panel, x, groups, &mut ahead, sums),
                    6 => add_tile::<6, GROUP, MINIMA, SUPER>(&panel, x, groups, &mut ahead, sums),
                    _ => add_tile::<TOKENS, GROUP, MINIMA, SUPER>(&panel, x, groups, &mut ahead, sums),
                }
            }
        }
        for (r, out) in out.chunks_exact_mut(n).enumerate() {
            for (out, sums) in out.iter_mut().zip(&*sums) {
                *out = sums[r];
            }
        }
    }
}
