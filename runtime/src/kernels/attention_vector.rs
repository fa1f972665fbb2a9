//! Attention over one block (see `attention`) with vectors of 8 or 16 floats, for all instruction sets.
//!
//! Scores of a tile lie `[positions, rows]`. As many products run at once as a vector has lanes (rows times positions), so that their
//! sums over the lanes become one vector of scores by a tree of shuffles instead of one horizontal sum each, and maxima and sums over
//! positions need no shuffle but one at the end. Halves and blocks are widened when they are loaded, once for all rows; the scales of
//! blocks before, as there are several loads to a block.

use super::attention::{BLOCK, MAX_BLOCKS};
use crate::quant::BlockQ8_0;

/// How numbers lie in memory.
pub(super) mod stored {
    pub(in crate::kernels) const F32: u8 = 0;
    pub(in crate::kernels) const F16: u8 = 1;
    pub(in crate::kernels) const Q8_0: u8 = 2;
}

/// Scales of blocks: `[positions, blocks]`.
pub(super) type Scales = [f32; BLOCK * MAX_BLOCKS];

/// Keys or values of the positions of a block.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    first: *const u8,
    /// From a row to the next.
    stride_bytes: usize,
    /// For blocks.
    scales: *const f32,
    blocks: usize,
}

impl Rows {
    /// Numbers of `size` bytes, `stride` of them from a row to the next.
    pub(super) const fn of_numbers(first: *const u8, stride: usize, size: usize) -> Self {
        Self { first, stride_bytes: stride * size, scales: std::ptr::null(), blocks: 0 }
    }

    /// Rows of which the first `width` elements are used; `widen` makes a float of a block's scale.
    #[inline(always)]
    pub(super) fn of_blocks(
        all: &[BlockQ8_0],
        stride: usize,
        width: usize,
        scales: &mut Scales,
        widen: impl Fn([u8; 2]) -> f32,
    ) -> Self {
        let (stride, blocks) = (stride / 32, width.div_ceil(32));
        for (row, scales) in all.chunks(stride).zip(scales.chunks_exact_mut(blocks)) {
            for (block, scale) in row.iter().zip(scales) {
                *scale = widen(block.scale);
            }
        }
        Self { first: all.as_ptr().cast(), stride_bytes: stride * size_of::<BlockQ8_0>(), scales: scales.as_ptr(), blocks }
    }

    /// Where a row and its scales begin.
    #[inline(always)]
    pub(super) const fn at(&self, position: usize) -> (*const u8, *const f32) {
        (self.first.wrapping_add(position * self.stride_bytes), self.scales.wrapping_add(position * self.blocks))
    }
}

/// The kernel of one width. `$sums` turns `$lanes` vectors into the vector of their sums; `$at_once` are the vectors of values taken
/// at once with 1, 2, 4 and 8 rows.
macro_rules! attention_kernel {
    ($features:literal, $lanes:literal, $at_once:tt, $zero:ident, $splat:ident, $fma:ident, $mul:ident, $add:ident,
     $sub:ident, $max:ident, $sums:ident, $load:ident, $store:ident) => {
        const LANES: usize = $lanes;
        type Lanes = [f32; LANES];

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn attend(tile: &mut AttentionTile<'_>) {
            match tile.rows {
                1 => rows::<1, { $at_once[0] }>(tile),
                2 => rows::<2, { $at_once[1] }>(tile),
                4 => rows::<4, { $at_once[2] }>(tile),
                _ => rows::<8, { $at_once[3] }>(tile),
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn rows<const R: usize, const N: usize>(tile: &mut AttentionTile<'_>) {
            let (begin, end) = tile.range();
            if begin >= end {
                return;
            }
            let ([key_stride, value_stride], [key_width, value_width]) = (tile.strides, [tile.key_width, tile.value_width]);
            // SAFETY: the tile was checked: positions before `end` are in the block, the other arrays have one entry per row.
            unsafe {
                match tile.keys {
                    KvFloats::F16(keys) => {
                        let keys = Rows::of_numbers(keys.as_ptr().cast(), key_stride, 2);
                        scores::<R, { stored::F16 }>(tile, keys, begin, end);
                    }
                    KvFloats::F32(keys) => {
                        let keys = Rows::of_numbers(keys.as_ptr().cast(), key_stride, 4);
                        scores::<R, { stored::F32 }>(tile, keys, begin, end);
                    }
                    KvFloats::Q8_0(keys) => {
                        let mut scales: Scales = [0.0; BLOCK * MAX_BLOCKS];
                        let keys = Rows::of_blocks(keys, key_stride, key_width, &mut scales, |s| half_field(s));
                        scores::<R, { stored::Q8_0 }>(tile, keys, begin, end);
                    }
                }
            }
            softmax_step::<R>(tile, begin, end);
            // SAFETY: as above.
            unsafe {
                match tile.values {
                    KvFloats::F16(values) => {
                        let values = Rows::of_numbers(values.as_ptr().cast(), value_stride, 2);
                        weighted_sums::<R, N, { stored::F16 }>(tile, values);
                    }
                    KvFloats::F32(values) => {
                        let values = Rows::of_numbers(values.as_ptr().cast(), value_stride, 4);
                        weighted_sums::<R, N, { stored::F32 }>(tile, values);
                    }
                    KvFloats::Q8_0(values) => {
                        let mut scales: Scales = [0.0; BLOCK * MAX_BLOCKS];
                        let values = Rows::of_blocks(values, value_stride, value_width, &mut scales, |s| half_field(s));
                        weighted_sums::<R, N, { stored::Q8_0 }>(tile, values);
                    }
                }
            }
        }

        /// Scaled products of all rows with keys `begin..end`, into `[positions, R]`.
        ///
        /// # Safety
        /// `keys` are at least `end` keys; the tile was checked.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn scores<const R: usize, const FORMAT: u8>(tile: &mut AttentionTile<'_>, keys: Rows, begin: usize, end: usize) {
            let per = LANES / R;
            let width = tile.key_width;
            let queries = tile.queries.as_ptr();
            let scale = $splat(tile.scale);
            let groups = (end - begin).div_ceil(per) + 1;
            let mut ahead = tile.ahead[0].chunks(tile.ahead[0].len().div_ceil(groups).next_multiple_of(64).max(64));
            let mut at = begin - begin % per;
            while at < end {
                prefetch(ahead.next().unwrap_or_default());
                let mut key = [keys.at(0); LANES];
                for i in 0..per {
                    // Beyond the end the last key stands in; the scores are dropped.
                    key[i] = keys.at((at + i).min(end - 1));
                }
                let mut products = [$zero(); LANES];
                let mut column = 0;
                while column < width {
                    let mut k = [$zero(); LANES];
                    for i in 0..per {
                        // SAFETY: `column` is before the end of a key.
                        k[i] = unsafe { load::<FORMAT>(key[i], column) };
                    }
                    for r in 0..R {
                        // SAFETY: queries are `[R, width]`.
                        let q = unsafe { load_numbers(queries.add(r * width + column)) };
                        for i in 0..per {
                            products[i * R + r] = $fma(k[i], q, products[i * R + r]);
                        }
                    }
                    column += LANES;
                }
                let scores = &mut tile.scores.as_chunks_mut::<LANES>().0[at / per];
                $store(scores, $mul($sums(products), scale));
                at += per;
            }
        }

        /// Scores to exponentials; running maxima and sums; earlier weighted sums to the new maximum.
        #[inline]
        #[target_feature(enable = $features)]
        fn softmax_step<const R: usize>(tile: &mut AttentionTile<'_>, begin: usize, end: usize) {
            if let Some(cap) = tile.softcap {
                tile.scores[begin * R..end * R].iter_mut().for_each(|s| *s = capped(*s, cap));
            }
            // Whole groups of positions, so that a position's partial sum does not depend on where the range begins.
            let (first, last) = (begin - begin % LANES, end.next_multiple_of(LANES));
            for (r, (from, to)) in tile.seen.iter().enumerate() {
                let (from, to) = if from < to { (*from, *to) } else { (last, last) };
                for position in (first..from).chain(to..last) {
                    tile.scores[position * R + r] = f32::NEG_INFINITY;
                }
            }
            let scores = tile.scores[first * R..last * R].as_chunks_mut::<LANES>().0;

            let mut max = $splat(f32::NEG_INFINITY);
            for s in scores.iter() {
                max = $max($load(s), max);
            }
            let mut largest: Lanes = [0.0; LANES];
            $store(&mut largest, max);
            halve::<R>(&mut largest, f32::max);
            let mut base: Lanes = [0.0; LANES];
            let mut rescale: Lanes = [0.0; LANES];
            for r in 0..R {
                let max = tile.max[r].max(largest[r]);
                base[r] = subtrahend(max);
                rescale[r] = tile.max[r] - base[r];
                tile.max[r] = max;
            }
            for i in R..LANES {
                base[i] = base[i % R];
            }
            let (base, factors) = ($load(&base), exp($load(&rescale)));
            $store(&mut rescale, factors);

            let mut sums = [$zero(); R];
            for group in scores.chunks_exact_mut(R) {
                for (s, sum) in group.iter_mut().zip(&mut sums) {
                    let e = exp($sub($load(s), base));
                    $store(s, e);
                    *sum = $add(*sum, e);
                }
            }
            let mut half = R / 2;
            while half > 0 {
                for i in 0..half {
                    sums[i] = $add(sums[i], sums[i + half]);
                }
                half /= 2;
            }
            let mut sum: Lanes = [0.0; LANES];
            $store(&mut sum, sums[0]);
            halve::<R>(&mut sum, |a, b| a + b);
            for (r, out) in tile.out.chunks_exact_mut(tile.value_width).enumerate() {
                tile.sum[r] = tile.sum[r] * rescale[r] + sum[r];
                if rescale[r] != 1.0 {
                    let factor = $splat(rescale[r]);
                    for x in out.as_chunks_mut::<LANES>().0 {
                        $store(x, $mul($load(x), factor));
                    }
                }
            }
        }

        /// Joins upper and lower halves until `R` lanes are left.
        #[inline(always)]
        fn halve<const R: usize>(lanes: &mut Lanes, join: impl Fn(f32, f32) -> f32) {
            let mut half = LANES / 2;
            while half >= R {
                for i in 0..half {
                    lanes[i] = join(lanes[i], lanes[i + half]);
                }
                half /= 2;
            }
        }

        /// Adds the weighted values; what not all rows see, row by row.
        ///
        /// # Safety
        /// `values` are as many values as any row sees; the tile was checked.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn weighted_sums<const R: usize, const N: usize, const FORMAT: u8>(tile: &mut AttentionTile<'_>, values: Rows) {
            const ALONE: usize = $at_once[0];
            let (from, to) = tile.common();
            let (weights, ahead, width) = (tile.scores.as_ptr(), tile.ahead[1], tile.value_width);
            let sums = tile.out.as_mut_ptr();
            // SAFETY: row `r` of `[R, width]` sums, weights `[positions, R]`; the caller's values.
            unsafe {
                if from >= to {
                    for (r, seen) in tile.seen.iter().enumerate() {
                        let (weights, sums) = (weights.add(r), sums.add(r * width));
                        add_weighted::<1, ALONE, FORMAT>(weights, R, values, width, *seen, &[], sums);
                    }
                    return;
                }
                for (r, seen) in tile.seen.iter().enumerate() {
                    let (weights, sums) = (weights.add(r), sums.add(r * width));
                    add_weighted::<1, ALONE, FORMAT>(weights, R, values, width, (seen.0, from), &[], sums);
                }
                add_weighted::<R, N, FORMAT>(weights, R, values, width, (from, to), ahead, sums);
                for (r, seen) in tile.seen.iter().enumerate() {
                    let (weights, sums) = (weights.add(r), sums.add(r * width));
                    add_weighted::<1, ALONE, FORMAT>(weights, R, values, width, (to, seen.1), &[], sums);
                }
            }
        }

        /// `sums += weights * values` for `R` rows over positions `from..to`.
        ///
        /// # Safety
        /// `values` are at least `to` values; `weights` points to `[to, weight_stride]` of which `R` are used, `sums` to `[R, width]`.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn add_weighted<const R: usize, const N: usize, const FORMAT: u8>(
            weights: *const f32,
            weight_stride: usize,
            values: Rows,
            width: usize,
            (from, to): (usize, usize),
            ahead: &[u8],
            sums: *mut f32,
        ) {
            if from >= to {
                return;
            }
            let steps = (to - from) * width.div_ceil(N * LANES);
            let mut ahead = ahead.chunks(ahead.len().div_ceil(steps).next_multiple_of(64).max(64));
            let whole = width - width % (N * LANES);
            // SAFETY: columns before `whole` in steps of N vectors, the rest in steps of one; the caller's sizes.
            unsafe {
                for column in (0..whole).step_by(N * LANES) {
                    columns::<R, N, FORMAT>(weights, weight_stride, values, [width, column], (from, to), &mut ahead, sums);
                }
                for column in (whole..width).step_by(LANES) {
                    columns::<R, 1, FORMAT>(weights, weight_stride, values, [width, column], (from, to), &mut ahead, sums);
                }
            }
        }

        /// [`add_weighted`] for `N` vectors of columns from `column` on.
        ///
        /// # Safety
        /// As there, the columns being before `width`.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn columns<const R: usize, const N: usize, const FORMAT: u8>(
            weights: *const f32,
            weight_stride: usize,
            values: Rows,
            [width, column]: [usize; 2],
            (from, to): (usize, usize),
            ahead: &mut std::slice::Chunks<'_, u8>,
            sums: *mut f32,
        ) {
            let mut acc = [[$zero(); N]; R];
            // SAFETY: all places are in what the caller vouches for.
            unsafe {
                for r in 0..R {
                    for n in 0..N {
                        acc[r][n] = load_numbers(sums.add(r * width + column + n * LANES));
                    }
                }
                for position in from..to {
                    prefetch(ahead.next().unwrap_or_default());
                    let value = values.at(position);
                    let mut v = [$zero(); N];
                    for n in 0..N {
                        v[n] = load::<FORMAT>(value, column + n * LANES);
                    }
                    for r in 0..R {
                        let weight = $splat(*weights.add(position * weight_stride + r));
                        for n in 0..N {
                            acc[r][n] = $fma(weight, v[n], acc[r][n]);
                        }
                    }
                }
                for r in 0..R {
                    for n in 0..N {
                        $store(&mut *sums.add(r * width + column + n * LANES).cast(), acc[r][n]);
                    }
                }
            }
        }
    };
}

pub(super) use attention_kernel;
