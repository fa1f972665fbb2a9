//! Products of many tokens with BF16 and F16 weights on the matrix unit.
//!
//! The unit multiplies BF16 by BF16 and adds in f32, so each f32 activation is split into three BF16 numbers whose sum it is
//! exactly (8 + 8 + 8 bits of significand), an F16 weight into two (8 + 3 bits): products are exact, and the result differs from f32
//! arithmetic by the order of its additions only. BF16 weights are read where they lie; sums stay in the unit for the whole row.
//! Instruction semantics: Intel SDM volume 2, TDPBF16PS (subnormal numbers count as zero).

use super::amx::Tiles;
use super::panels::transpose;
use super::{load_256, load_512, load_f32x16, store_512};
use crate::kernels::gemm::{FloatTile, GemmScratch, GemmTask, ROWS, TOKENS, tiles_per_pass};
use bytemuck::Zeroable;
use std::arch::asm;
use std::arch::x86_64::*;

/// Columns of one step.
const STEP: usize = 32;
const WEIGHT_BYTES: usize = 2;

/// Sums of two times 16 rows and two times 16 tokens, `[tile][half of the rows]`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Zeroable)]
struct Stored([[[[f32; TOKENS]; ROWS]; 2]; 2]);

/// The upper halves of 32 floats, in order.
static UPPER_HALVES: [i16; 32] = {
    let mut index = [0; 32];
    let mut i = 0;
    while i < 32 {
        index[i] = (2 * i + 1) as i16;
        i += 1;
    }
    index
};

/// Columns `32 * step ..` of up to 16 tokens; missing tokens and columns are zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn tile_floats(rows: &[&[f32]; TOKENS], step: usize, tile: &mut FloatTile) {
    let zero = _mm512_setzero_si512();
    let upper = load_512(&UPPER_HALVES);
    let keep = _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed());
    let mut parts = [[zero; TOKENS]; 3];
    for (t, row) in rows.iter().enumerate() {
        let mut x = [0f32; STEP];
        let row = row.get(STEP * step..).unwrap_or_default();
        let count = row.len().min(STEP);
        x[..count].copy_from_slice(&row[..count]);
        let [mut a, mut b] = [load_f32x16(&x.as_chunks::<16>().0[0]), load_f32x16(&x.as_chunks::<16>().0[1])];
        for part in &mut parts {
            let (high_a, high_b) =
                (_mm512_and_si512(_mm512_castps_si512(a), keep), _mm512_and_si512(_mm512_castps_si512(b), keep));
            part[t] = _mm512_permutex2var_epi16(high_a, upper, high_b);
            // Exact: both have the same exponent and the difference fewer bits.
            a = _mm512_sub_ps(a, _mm512_castsi512_ps(high_a));
            b = _mm512_sub_ps(b, _mm512_castsi512_ps(high_b));
        }
    }
    for (to, part) in tile.0.iter_mut().zip(parts) {
        for (to, column) in to.iter_mut().zip(transpose(part)) {
            store_512(to, column);
        }
    }
}

/// The parts of each F16 weight of 32 columns: `[part, 32]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn split_halves(halves: &[u8; 64], parts: &mut [[u8; 64]; 2]) {
    let upper = load_512(&UPPER_HALVES);
    let keep = _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed());
    let [a, b] = bytemuck::cast_ref::<_, [[u8; 32]; 2]>(halves);
    let (a, b) = (_mm512_cvtph_ps(load_256(a)), _mm512_cvtph_ps(load_256(b)));
    let high = |x| _mm512_and_si512(_mm512_castps_si512(x), keep);
    let rest = |x| _mm512_castps_si512(_mm512_sub_ps(x, _mm512_castsi512_ps(high(x))));
    store_512(&mut parts[0], _mm512_permutex2var_epi16(high(a), upper, high(b)));
    store_512(&mut parts[1], _mm512_permutex2var_epi16(rest(a), upper, rest(b)));
}

/// A row of F16 weights: `[steps, part, 32]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn split_row(row: &[u8], to: &mut [u8]) {
    let (whole, tail) = row.as_chunks::<64>();
    let mut padded = [0u8; 64];
    padded[..tail.len()].copy_from_slice(tail);
    for (halves, parts) in whole.iter().chain([&padded]).zip(to.as_chunks_mut::<64>().0.as_chunks_mut::<2>().0) {
        split_halves(halves, parts);
    }
}

/// How many steps ahead of the one in work weights are fetched. Each step reads a line of 32 rows, which the processor does not see
/// coming; without, BF16 weights came at half of the rate.
const FETCH_STEPS: usize = 6;

/// `$name`: two times 16 rows, `stride` bytes apart, times two tiles of as many steps. In a step the weights' parts lie at the places
/// `$part` of `$step` bytes.
macro_rules! multiply {
    ($name:ident $step:literal $($part:literal)*) => {
        /// # Safety
        /// Tiles are configured for 64 bytes. From `low` and from `high`, 16 rows of as many steps of weights as `x` has tiles are
        /// readable with this stride.
        #[inline]
        unsafe fn $name(low: *const u8, high: *const u8, stride: usize, x: [&[FloatTile]; 2], out: &mut Stored) {
            let steps = x[0].len();
            assert!(steps > 0 && x[1].len() == steps);
            // So many more steps stay within these rows; then the next 32 begin, and `jump` lies between.
            let within = steps.saturating_sub(FETCH_STEPS);
            let ahead = low.wrapping_add(if within > 0 { $step * FETCH_STEPS } else { 32 * stride });
            let jump = (32 * stride).wrapping_sub($step * steps);
            // SAFETY: loads stay in the rows that the caller vouches for and in the `steps` tiles of 3 KiB of each of `x`; stores
            // write the four times 1 KiB of `out`.
            unsafe {
                asm!(
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "2:",
                    // A line of 32 rows, four rows at a time.
                    "lea {three}, [{stride} + {stride}*2]", "mov {at}, {ahead}",
                    "prefetcht0 [{at}]", "prefetcht0 [{at} + {stride}]", "prefetcht0 [{at} + {stride}*2]", "prefetcht0 [{at} + {three}]", "lea {at}, [{at} + {stride}*4]",
                    "prefetcht0 [{at}]", "prefetcht0 [{at} + {stride}]", "prefetcht0 [{at} + {stride}*2]", "prefetcht0 [{at} + {three}]", "lea {at}, [{at} + {stride}*4]",
                    "prefetcht0 [{at}]", "prefetcht0 [{at} + {stride}]", "prefetcht0 [{at} + {stride}*2]", "prefetcht0 [{at} + {three}]", "lea {at}, [{at} + {stride}*4]",
                    "prefetcht0 [{at}]", "prefetcht0 [{at} + {stride}]", "prefetcht0 [{at} + {stride}*2]", "prefetcht0 [{at} + {three}]", "lea {at}, [{at} + {stride}*4]",
                    "prefetcht0 [{at}]", "prefetcht0 [{at} + {stride}]", "prefetcht0 [{at} + {stride}*2]", "prefetcht0 [{at} + {three}]", "lea {at}, [{at} + {stride}*4]",
                    "prefetcht0 [{at}]", "prefetcht0 [{at} + {stride}]", "prefetcht0 [{at} + {stride}*2]", "prefetcht0 [{at} + {three}]", "lea {at}, [{at} + {stride}*4]",
                    "prefetcht0 [{at}]", "prefetcht0 [{at} + {stride}]", "prefetcht0 [{at} + {stride}*2]", "prefetcht0 [{at} + {three}]", "lea {at}, [{at} + {stride}*4]",
                    "prefetcht0 [{at}]", "prefetcht0 [{at} + {stride}]", "prefetcht0 [{at} + {stride}*2]", "prefetcht0 [{at} + {three}]", "lea {at}, [{at} + {stride}*4]",
                    concat!("add {ahead}, ", $step), "dec {within}", "jnz 3f", "add {ahead}, {jump}", "3:",
                    $(
                        concat!("tileloadd tmm4, [{low} + {stride}*1 + ", $part, "]"),
                        "tileloadd tmm6, [{x0} + {line}*1]", "tdpbf16ps tmm0, tmm4, tmm6",
                        concat!("tileloadd tmm5, [{high} + {stride}*1 + ", $part, "]"),
                        "tdpbf16ps tmm1, tmm5, tmm6",
                        "tileloadd tmm7, [{x1} + {line}*1]", "tdpbf16ps tmm2, tmm4, tmm7", "tdpbf16ps tmm3, tmm5, tmm7",
                        "tileloadd tmm6, [{x0} + {line}*1 + 1024]", "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm5, tmm6",
                        "tileloadd tmm7, [{x1} + {line}*1 + 1024]", "tdpbf16ps tmm2, tmm4, tmm7", "tdpbf16ps tmm3, tmm5, tmm7",
                        "tileloadd tmm6, [{x0} + {line}*1 + 2048]", "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm5, tmm6",
                        "tileloadd tmm7, [{x1} + {line}*1 + 2048]", "tdpbf16ps tmm2, tmm4, tmm7", "tdpbf16ps tmm3, tmm5, tmm7",
                    )*
                    concat!("add {low}, ", $step), concat!("add {high}, ", $step), "add {x0}, 3072", "add {x1}, 3072",
                    "dec {steps}", "jnz 2b",
                    "tilestored [{out} + {line}*1], tmm0", "tilestored [{out} + {line}*1 + 1024], tmm1",
                    "tilestored [{out} + {line}*1 + 2048], tmm2", "tilestored [{out} + {line}*1 + 3072], tmm3",
                    low = inout(reg) low => _, high = inout(reg) high => _, stride = in(reg) stride,
                    x0 = inout(reg) x[0].as_ptr() => _, x1 = inout(reg) x[1].as_ptr() => _, line = in(reg) 64usize,
                    ahead = inout(reg) ahead => _, within = inout(reg) within => _, jump = in(reg) jump,
                    three = out(reg) _, at = out(reg) _,
                    steps = inout(reg) steps => _, out = in(reg) &raw mut *out,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}
multiply! { multiply_whole 64 0 }
multiply! { multiply_parts 128 0 64 }

/// BF16 weights, or F16 ones.
///
/// # Safety
/// An [`super::Amx`] proof exists; lengths agree.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn gemm<const F16: bool>(task: GemmTask<'_>, scratch: &mut GemmScratch) {
    let parts = if F16 { 2 } else { 1 };
    let GemmTask { weight, row_bytes, act, tokens, out } = task;
    let (steps, n) = (act.cols().div_ceil(STEP), tokens.len());
    let GemmScratch { float_tiles: x, padded, .. } = scratch;
    let mut stored = Stored::zeroed();
    // SAFETY: the caller has the proof.
    let _tiles = unsafe { Tiles::configure(64) };
    let pass = tiles_per_pass::<FloatTile>(steps) * TOKENS;
    for (tokens, first) in tokens.chunks(pass).zip((0..).step_by(pass)) {
        let count = tokens.len().div_ceil(TOKENS);
        if x.len() < count * steps {
            x.resize(count * steps, FloatTile::zeroed());
        }
        // `[tiles, steps]`
        for (tokens, tiles) in tokens.chunks(TOKENS).zip(x.chunks_exact_mut(steps)) {
            let rows = std::array::from_fn(|t| tokens.get(t).map_or(&[][..], |t| bytemuck::cast_slice(act.row(*t))));
            for (step, tile) in tiles.iter_mut().enumerate() {
                tile_floats(&rows, step, tile);
            }
        }
        for (rows, out) in weight.chunks(2 * ROWS * row_bytes).zip(out.chunks_mut(2 * ROWS * n)) {
            let stride = parts * STEP * WEIGHT_BYTES * steps;
            let rows = if !F16 && rows.len() == 2 * ROWS * stride {
                rows
            } else {
                // Where rows or columns are missing, zeros.
                padded.clear();
                padded.resize(2 * ROWS * stride, 0);
                for (to, row) in padded.chunks_exact_mut(stride).zip(rows.chunks_exact(row_bytes)) {
                    if F16 {
                        split_row(row, to);
                    } else {
                        to[..row_bytes].copy_from_slice(row);
                    }
                }
                &padded[..]
            };
            let (low, high) = rows.split_at(ROWS * stride);
            let tiles: Vec<&[FloatTile]> = x[..count * steps].chunks_exact(steps).collect();
            for (pair, at) in tiles.chunks(2).zip((0..).step_by(2 * TOKENS)) {
                // A tile without partner is its own; the second result is dropped.
                let x = [pair[0], *pair.last().expect("chunks are not empty")];
                let multiply = if F16 { multiply_parts } else { multiply_whole };
                // SAFETY: tiles are configured above; `low` and `high` are 16 rows of `steps` steps each, with all their parts.
                unsafe { multiply(low.as_ptr(), high.as_ptr(), stride, x, &mut stored) };
                for (r, out) in out.chunks_exact_mut(n).enumerate() {
                    let out = &mut out[first + at..first + tokens.len().min(at + TOKENS * pair.len())];
                    for (out, halves) in out.chunks_mut(TOKENS).zip(&stored.0) {
                        out.copy_from_slice(&halves[r / ROWS][r % ROWS][..out.len()]);
                    }
                }
            }
        }
    }
}
