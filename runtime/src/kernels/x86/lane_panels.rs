//! Sixteen weight rows turned so that each has a lane of its own, for `rows16`.
//!
//! Codes are turned packed as they lie, four bytes at a time, and unpacked afterwards: the four bytes of a lane then are four
//! consecutive columns. All codes are unsigned, as the dot product wants them; by how much too large says the kernel's table.

#![allow(clippy::needless_range_loop, reason = "rows, registers and parts are counted alike in several arrays")]

use super::groups256::q3_k_scales;
use super::rows16::Ahead;
use super::rows512::{IQ4_RAISED, MXFP4_RAISED, MXFP4_SCALES};
use super::{load_128, load_256, load_512, store_128, store_512};
use crate::kernels::gemm::{LanePanel, PANEL_COLUMNS, ROWS};
use crate::quant::{
    BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K,
    BlockQ6K, BlockQ8_0,
};
use bytemuck::Pod;
use std::arch::x86_64::*;

/// Blocks of 32 of a panel.
const BLOCKS: usize = PANEL_COLUMNS / 32;

/// Lines fetched ahead while 16 bytes of each row are turned: a plausible share, not tuned.
const LINES_PER_TURN: usize = 2;

/// Sixteen bytes of each row, turned: result `i` holds bytes `4 * i..4 * i + 4` of every row.
///
/// (Loads put rows 0, 4, 8, 12 side by side, then 1, 5, 9, 13 and so on; what is left is a transposition within each quarter. That
/// takes half of the shuffles of turning whole registers. A macro, because closures given to `map` and the like are not compiled
/// into the caller with its vector instructions.)
macro_rules! turn {
    ($ahead:ident, |$row:ident| $part:expr) => {{
        $ahead.fetch(LINES_PER_TURN);
        let mut registers = [_mm512_setzero_si512(); 4];
        for i in 0..4 {
            let part = |$row: usize| -> &[u8; 16] { $part };
            let low = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(load_128(part(i))), load_128(part(4 + i)));
            registers[i] = _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(low, load_128(part(8 + i))), load_128(part(12 + i)));
        }
        let [a, b, c, d] = registers;
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high),
        ]
    }};
}

/// Super-block `block` of each row.
#[inline(always)]
fn of_rows<'a, B: Pod>(rows: &[&'a [u8]; ROWS], block: usize) -> [&'a B; ROWS] {
    let mut blocks = [&bytemuck::cast_slice::<_, B>(rows[0])[block]; ROWS];
    for (to, row) in blocks.iter_mut().zip(rows).skip(1) {
        *to = &bytemuck::cast_slice::<_, B>(row)[block];
    }
    blocks
}

/// Part `i` of an array of bytes.
#[inline(always)]
fn part<const N: usize>(bytes: &[u8; N], i: usize) -> &[u8; 16] {
    &bytes.as_chunks::<16>().0[i]
}

/// Lower and upper nibbles.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn nibbles(bytes: __m512i) -> [__m512i; 2] {
    let mask = _mm512_set1_epi8(15);
    [_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask)]
}

/// The half-precision number in the lower half of each lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn lower_halves(lanes: __m512i) -> __m512 {
    _mm512_cvtph_ps(_mm512_cvtepi32_epi16(lanes))
}

/// One half-precision number of each row.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves_of(numbers: &[[u8; 2]; ROWS]) -> __m512 {
    _mm512_cvtph_ps(load_256(numbers))
}

/// Stores the four bytes of every lane times the lane's factor as four groups' numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn store_numbers<const SIGNED: bool>(bytes: __m512i, factor: __m512, out: &mut [[f32; ROWS]]) {
    let upper = [_mm512_slli_epi32::<24>(bytes), _mm512_slli_epi32::<16>(bytes), _mm512_slli_epi32::<8>(bytes), bytes];
    for (to, upper) in out.iter_mut().zip(upper) {
        let number = if SIGNED { _mm512_srai_epi32::<24>(upper) } else { _mm512_srli_epi32::<24>(upper) };
        store_512(to, _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(number), factor)));
    }
}

/// Scales and minima of Q4_K and Q5_K, of all rows at once: what a block begins with, see `quant::unpack_scales`.
#[inline]
#[target_feature(enable = "avx512f")]
fn store_scales_and_minima([factors, a, b, c]: [__m512i; 4], panel: &mut LanePanel) {
    let (six, low, high) = (_mm512_set1_epi32(0x3F3F_3F3F), _mm512_set1_epi32(0x0F0F_0F0F), _mm512_set1_epi32(0x3030_3030));
    let late = |nibbles: __m512i, bits: __m512i| {
        _mm512_or_si512(_mm512_and_si512(nibbles, low), _mm512_and_si512(_mm512_srli_epi32::<2>(bits), high))
    };
    let (scale, min) = (lower_halves(factors), lower_halves(_mm512_srli_epi32::<16>(factors)));
    store_numbers::<false>(_mm512_and_si512(a, six), scale, &mut panel.scale[..4]);
    store_numbers::<false>(late(c, a), scale, &mut panel.scale[4..8]);
    store_numbers::<false>(_mm512_and_si512(b, six), min, &mut panel.min[..4]);
    store_numbers::<false>(late(_mm512_srli_epi32::<4>(c), b), min, &mut panel.min[4..8]);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) fn q4_k(rows: &[&[u8]; ROWS], block: usize, panel: &mut LanePanel, ahead: &mut Ahead) {
    let blocks: [&BlockQ4K; ROWS] = of_rows(rows, block);
    for piece in 0..8 {
        // 32 bytes hold two groups.
        let (group, first) = (piece / 2 * 2, piece % 2 * 4);
        for (i, bytes) in turn!(ahead, |r| part(&blocks[r].codes, piece)).into_iter().enumerate() {
            let [low, high] = nibbles(bytes);
            store_512(&mut panel.codes[8 * group + first + i], low);
            store_512(&mut panel.codes[8 * (group + 1) + first + i], high);
        }
    }
    let head = turn!(ahead, |r| bytemuck::bytes_of(blocks[r]).first_chunk().expect("a block is longer"));
    store_scales_and_minima(head, panel);
}

/// The fifth bit of sub-block `s` is bit `s` of a byte of `high`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) fn q5_k(rows: &[&[u8]; ROWS], block: usize, panel: &mut LanePanel, ahead: &mut Ahead) {
    let blocks: [&BlockQ5K; ROWS] = of_rows(rows, block);
    let sixteen = _mm512_set1_epi8(16);
    for side in 0..2 {
        let high = turn!(ahead, |r| part(&blocks[r].high, side));
        for pair in 0..4 {
            for (i, bytes) in turn!(ahead, |r| part(&blocks[r].codes, 2 * pair + side)).into_iter().enumerate() {
                for (k, codes) in nibbles(bytes).into_iter().enumerate() {
                    let group = 2 * pair + k;
                    let is_set = _mm512_test_epi8_mask(high[i], _mm512_set1_epi8((1u8 << group).cast_signed()));
                    store_512(&mut panel.codes[8 * group + 4 * side + i], _mm512_mask_add_epi8(codes, is_set, codes, sixteen));
                }
            }
        }
    }
    let head = turn!(ahead, |r| bytemuck::bytes_of(blocks[r]).first_chunk().expect("a block is longer"));
    store_scales_and_minima(head, panel);
}

/// Codes 32 too large.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) fn q6_k(rows: &[&[u8]; ROWS], block: usize, panel: &mut LanePanel, ahead: &mut Ahead) {
    let blocks: [&BlockQ6K; ROWS] = of_rows(rows, block);
    let upper = _mm512_set1_epi8(0x30);
    for half in 0..2 {
        for side in 0..2 {
            let high = turn!(ahead, |r| part(&blocks[r].high, 2 * half + side));
            let first = turn!(ahead, |r| part(&blocks[r].low, 4 * half + side));
            let second = turn!(ahead, |r| part(&blocks[r].low, 4 * half + 2 + side));
            for i in 0..4 {
                let ([a, c], [b, d], high) = (nibbles(first[i]), nibbles(second[i]), high[i]);
                let parts = [
                    (a, _mm512_slli_epi16::<4>(high)),
                    (b, _mm512_slli_epi16::<2>(high)),
                    (c, high),
                    (d, _mm512_srli_epi16::<2>(high)),
                ];
                for (k, (low, high)) in parts.into_iter().enumerate() {
                    let codes = _mm512_or_si512(low, _mm512_and_si512(high, upper));
                    store_512(&mut panel.codes[8 * (4 * half + k) + 4 * side + i], codes);
                }
            }
        }
    }
    let scale = halves_of(&scales_of(|r| blocks[r].scale));
    let scales = turn!(ahead, |r| bytemuck::cast_ref(&blocks[r].scales));
    for (bytes, to) in scales.into_iter().zip(panel.scale.as_chunks_mut::<4>().0) {
        store_numbers::<true>(bytes, scale, to);
    }
}

/// The encoded scale of each row.
#[inline(always)]
fn scales_of(of: impl Fn(usize) -> [u8; 2]) -> [[u8; 2]; ROWS] {
    let mut out = [[0; 2]; ROWS];
    for r in 0..ROWS {
        out[r] = of(r);
    }
    out
}

/// The four two-bit codes of every byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn two_bit_codes(bytes: __m512i) -> [__m512i; 4] {
    let mask = _mm512_set1_epi8(3);
    [
        _mm512_and_si512(bytes, mask),
        _mm512_and_si512(_mm512_srli_epi16::<2>(bytes), mask),
        _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask),
        _mm512_and_si512(_mm512_srli_epi16::<6>(bytes), mask),
    ]
}

/// Scales in the lower nibbles of the bytes, minima in the upper.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) fn q2_k(rows: &[&[u8]; ROWS], block: usize, panel: &mut LanePanel, ahead: &mut Ahead) {
    let blocks: [&BlockQ2K; ROWS] = of_rows(rows, block);
    for piece in 0..4 {
        let (half, first) = (piece / 2, piece % 2 * 4);
        for (i, bytes) in turn!(ahead, |r| part(&blocks[r].codes, piece)).into_iter().enumerate() {
            for (k, codes) in two_bit_codes(bytes).into_iter().enumerate() {
                store_512(&mut panel.codes[8 * (4 * half + k) + first + i], codes);
            }
        }
    }
    let scale = halves_of(&scales_of(|r| blocks[r].scale));
    let min = halves_of(&scales_of(|r| blocks[r].min));
    for (g, bytes) in turn!(ahead, |r| &blocks[r].scales).into_iter().enumerate() {
        let [scales, minima] = nibbles(bytes);
        store_numbers::<false>(scales, scale, &mut panel.scale[4 * g..4 * g + 4]);
        store_numbers::<false>(minima, min, &mut panel.min[4 * g..4 * g + 4]);
    }
}

/// Codes 4 too large: the third bit is bit `4 * half + k` of a byte of `high`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) fn q3_k(rows: &[&[u8]; ROWS], block: usize, panel: &mut LanePanel, ahead: &mut Ahead) {
    let blocks: [&BlockQ3K; ROWS] = of_rows(rows, block);
    let four = _mm512_set1_epi8(4);
    for side in 0..2 {
        let high = turn!(ahead, |r| part(&blocks[r].high, side));
        for half in 0..2 {
            for (i, bytes) in turn!(ahead, |r| part(&blocks[r].codes, 2 * half + side)).into_iter().enumerate() {
                for (k, codes) in two_bit_codes(bytes).into_iter().enumerate() {
                    let is_set = _mm512_test_epi8_mask(high[i], _mm512_set1_epi8((1u8 << (4 * half + k)).cast_signed()));
                    let codes = _mm512_mask_add_epi8(codes, is_set, codes, four);
                    store_512(&mut panel.codes[8 * (4 * half + k) + 4 * side + i], codes);
                }
            }
        }
    }
    let mut bytes = [[0u8; 16]; ROWS];
    for r in 0..ROWS {
        store_128(&mut bytes[r], q3_k_scales(blocks[r]));
    }
    let scale = halves_of(&scales_of(|r| blocks[r].scale));
    for (bytes, to) in turn!(ahead, |r| &bytes[r]).into_iter().zip(panel.scale.as_chunks_mut::<4>().0) {
        store_numbers::<true>(bytes, scale, to);
    }
}

/// Unpacks the nibbles of a block of 32: the lower ones come first.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn store_nibbles(turned: [__m512i; 4], block: usize, table: Option<&[u8; 16]>, panel: &mut LanePanel) {
    for i in 0..4 {
        let codes = nibbles(turned[i]);
        for k in 0..2 {
            let codes = match table {
                Some(table) => _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_128(table)), codes[k]),
                None => codes[k],
            };
            store_512(&mut panel.codes[8 * block + 4 * k + i], codes);
        }
    }
}

/// Codes 128 too large.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) fn iq4_xs(rows: &[&[u8]; ROWS], block: usize, panel: &mut LanePanel, ahead: &mut Ahead) {
    let blocks: [&BlockIq4Xs; ROWS] = of_rows(rows, block);
    for b in 0..BLOCKS {
        store_nibbles(turn!(ahead, |r| part(&blocks[r].codes, b)), b, Some(&IQ4_RAISED), panel);
    }
    let mut bytes = [[0u8; 16]; ROWS];
    for r in 0..ROWS {
        bytes[r][..8].copy_from_slice(&blocks[r].sub_scales().map(i8::cast_unsigned));
    }
    let scale = halves_of(&scales_of(|r| blocks[r].scale));
    for (bytes, to) in turn!(ahead, |r| &bytes[r]).into_iter().zip(panel.scale.as_chunks_mut::<4>().0).take(2) {
        store_numbers::<true>(bytes, scale, to);
    }
}

/// Calls `turn` with eight blocks of each row; where a row ends earlier they are zero.
// Always inlined, so that whole panels are read without checks.
#[inline(always)]
fn with_eight_blocks<B: Pod>(rows: &[&[u8]; ROWS], first: usize, turn: impl FnOnce([&[B; BLOCKS]; ROWS])) {
    let rest = |r: usize| &bytemuck::cast_slice::<_, B>(rows[r])[BLOCKS * first..];
    let whole = |r: usize| rest(r).first_chunk::<BLOCKS>().expect("rows are of one length");
    if rest(0).len() >= BLOCKS {
        let mut blocks = [whole(0); ROWS];
        for r in 1..ROWS {
            blocks[r] = whole(r);
        }
        turn(blocks);
    } else {
        let mut filled_up = [[B::zeroed(); BLOCKS]; ROWS];
        for r in 0..ROWS {
            filled_up[r][..rest(r).len()].copy_from_slice(rest(r));
        }
        turn(filled_up.each_ref());
    }
}

/// Half-precision numbers, one per row and block, as `[blocks][rows]`.
#[inline]
#[target_feature(enable = "avx512f")]
fn store_halves<B>(blocks: &[&[B; BLOCKS]; ROWS], number: impl Fn(&B) -> [u8; 2], negative: bool, out: &mut [[f32; 16]; 16]) {
    let mut numbers = [[[0u8; 2]; ROWS]; BLOCKS];
    for (r, blocks) in blocks.iter().enumerate() {
        for (b, block) in blocks.iter().enumerate() {
            numbers[b][r] = number(block);
        }
    }
    let sign = _mm512_castsi512_ps(_mm512_set1_epi32(if negative { i32::MIN } else { 0 }));
    for (to, numbers) in out.iter_mut().zip(&numbers) {
        let v = _mm512_cvtph_ps(load_256(numbers));
        store_512(to, _mm512_xor_si512(_mm512_castps_si512(v), _mm512_castps_si512(sign)));
    }
}

/// Adds 16 to the codes of block `block` whose bit is set in `high`: bit `i` for column `i`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn add_fifth_bits(high: &[[u8; 4]; ROWS], block: usize, panel: &mut LanePanel) {
    let high = load_512(high);
    for quad in 0..8 {
        // The byte with the four bits, four times in each lane; then the bit of each column.
        let byte = (quad / 2) as i32 * 0x0101_0101;
        let pick = _mm512_add_epi8(
            _mm512_set1_epi32(byte),
            _mm512_broadcast_i32x4(_mm_set_epi32(0x0C0C_0C0C, 0x0808_0808, 0x0404_0404, 0)),
        );
        let bits = _mm512_set1_epi32(if quad % 2 == 0 { 0x0804_0201 } else { 0x8040_2010_u32.cast_signed() });
        let is_set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(high, pick), bits);
        let codes = load_512(&panel.codes[8 * block + quad]);
        store_512(&mut panel.codes[8 * block + quad], _mm512_mask_add_epi8(codes, is_set, codes, _mm512_set1_epi8(16)));
    }
}

/// Formats in blocks of 32 with codes of four bits, and maybe a fifth.
macro_rules! blocks_of_nibbles {
    ($($name:ident $block:ident, $table:expr, $high:expr, $scales:expr;)*) => {$(
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
        pub(super) fn $name(rows: &[&[u8]; ROWS], first: usize, panel: &mut LanePanel, ahead: &mut Ahead) {
            with_eight_blocks::<$block>(rows, first, |blocks| {
                for b in 0..BLOCKS {
                    store_nibbles(turn!(ahead, |r| &blocks[r][b].codes), b, $table, panel);
                }
                let high: Option<fn(&$block) -> [u8; 4]> = $high;
                if let Some(high) = high {
                    for b in 0..BLOCKS {
                        add_fifth_bits(&blocks.map(|blocks| high(&blocks[b])), b, panel);
                    }
                }
                $scales(&blocks, panel);
            });
        }
    )*};
}
blocks_of_nibbles! {
    q4_0 BlockQ4_0, None, None,
        |b: &[&[BlockQ4_0; BLOCKS]; ROWS], panel: &mut LanePanel| store_halves(b, |b| b.scale, false, &mut panel.scale);
    q4_1 BlockQ4_1, None, None, |b: &[&[BlockQ4_1; BLOCKS]; ROWS], panel: &mut LanePanel| {
        store_halves(b, |b| b.scale, false, &mut panel.scale);
        store_halves(b, |b| b.min, true, &mut panel.min);
    };
    q5_0 BlockQ5_0, None, Some(|b| b.high),
        |b: &[&[BlockQ5_0; BLOCKS]; ROWS], panel: &mut LanePanel| store_halves(b, |b| b.scale, false, &mut panel.scale);
    q5_1 BlockQ5_1, None, Some(|b| b.high), |b: &[&[BlockQ5_1; BLOCKS]; ROWS], panel: &mut LanePanel| {
        store_halves(b, |b| b.scale, false, &mut panel.scale);
        store_halves(b, |b| b.min, true, &mut panel.min);
    };
    iq4_nl BlockIq4Nl, Some(&IQ4_RAISED), None,
        |b: &[&[BlockIq4Nl; BLOCKS]; ROWS], panel: &mut LanePanel| store_halves(b, |b| b.scale, false, &mut panel.scale);
    mxfp4 BlockMxfp4, Some(&MXFP4_RAISED), None, |b: &[&[BlockMxfp4; BLOCKS]; ROWS], panel: &mut LanePanel| {
        for (r, blocks) in b.iter().enumerate() {
            for (b, block) in blocks.iter().enumerate() {
                panel.scale[b][r] = MXFP4_SCALES[usize::from(block.exponent)];
            }
        }
    };
}

/// Codes 128 too large.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) fn q8_0(rows: &[&[u8]; ROWS], first: usize, panel: &mut LanePanel, ahead: &mut Ahead) {
    let sign = _mm512_set1_epi8(i8::MIN);
    with_eight_blocks::<BlockQ8_0>(rows, first, |blocks| {
        for b in 0..BLOCKS {
            for side in 0..2 {
                let turned = turn!(ahead, |r| bytemuck::cast_ref(&blocks[r][b].codes.as_chunks::<16>().0[side]));
                for i in 0..4 {
                    store_512(&mut panel.codes[8 * b + 4 * side + i], _mm512_xor_si512(turned[i], sign));
                }
            }
        }
        store_halves(&blocks, |b| b.scale, false, &mut panel.scale);
    });
}
