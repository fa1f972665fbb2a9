//! One block of the cache against a tile of rows: scores, a step of the online softmax, weighted sums of values.
//!
//! A row is one head of one token; the rows of a tile share their keys and values. The running maximum and sum are those of Milakov
//! and Gimelshein (arXiv 1805.02867), the tiling over rows and positions that of FlashAttention (arXiv 2205.14135).
//! What a row gets depends neither on the other rows of its tile nor on their number: every table keeps to one order of additions
//! per row (scores: partial sums by lane, then a tree; sums of exponentials: by position modulo the lanes, then a tree; values: one
//! position after the other). Positions that a row does not see are not touched on its behalf, so what lies there does not matter.

use super::CpuKernels;
use crate::quant::BlockQ8_0;
use half::f16;

/// Positions of a block.
pub const BLOCK: usize = 64;
/// Most rows of a tile.
pub const TILE_ROWS: usize = 8;
/// Widths are whole multiples of this many elements.
pub const WIDTH_STEP: usize = 16;

/// Most blocks of 32 elements in a key or a value that is given as such.
pub const MAX_BLOCKS: usize = 8;

/// Keys or values of the positions of a block as they are multiplied.
#[derive(Debug, Clone, Copy)]
pub enum KvFloats<'a> {
    /// Halves, `[positions, stride]`.
    F16(&'a [f16]),
    /// Single precision, `[positions, stride]`.
    F32(&'a [f32]),
    /// Blocks of 32, `[positions, stride / 32]`; what is used of a row is at most [`MAX_BLOCKS`] of them.
    Q8_0(&'a [BlockQ8_0]),
}

impl KvFloats<'_> {
    const fn len(&self) -> usize {
        match self {
            Self::F16(x) => x.len(),
            Self::F32(x) => x.len(),
            Self::Q8_0(x) => 32 * x.len(),
        }
    }

    /// Whether rows of so many elements, `stride` apart, can be given like this.
    const fn fits(&self, stride: usize, width: usize) -> bool {
        stride >= width && (!matches!(self, Self::Q8_0(_)) || stride.is_multiple_of(32) && width <= 32 * MAX_BLOCKS)
    }

    /// Row `position`, element `i`.
    fn at(&self, position: usize, stride: usize, i: usize) -> f32 {
        match self {
            Self::F16(x) => x[position * stride + i].to_f32(),
            Self::F32(x) => x[position * stride + i],
            Self::Q8_0(x) => {
                let block = &x[(position * stride + i) / 32];
                f16::from_le_bytes(block.scale).to_f32() * f32::from(block.codes[i % 32])
            }
        }
    }
}

/// A tile of rows and a block of positions.
#[derive(Debug)]
pub struct AttentionTile<'a> {
    /// 1, 2, 4 or 8.
    pub rows: usize,
    /// `[rows, key_width]`
    pub queries: &'a [f32],
    /// Elements of a query and a key.
    pub key_width: usize,
    /// Elements of a value.
    pub value_width: usize,
    /// Elements from a key to the next, and from a value to the next.
    pub strides: [usize; 2],
    /// `[positions, stride]`, the first `key_width` elements of each.
    pub keys: KvFloats<'a>,
    /// `[positions, stride]`, the first `value_width` elements of each.
    pub values: KvFloats<'a>,
    /// The positions `from..to` that each row sees, within the block: `[rows]`.
    pub seen: &'a [(usize, usize)],
    /// Factor on the products of queries and keys.
    pub scale: f32,
    /// `cap * tanh(score / cap)` instead of the score.
    pub softcap: Option<f32>,
    /// Bytes to fetch ahead while scores and while sums are computed.
    pub ahead: [&'a [u8]; 2],
    /// Working memory: `[BLOCK * TILE_ROWS]`.
    pub scores: &'a mut [f32],
    /// Largest score so far: `[rows]`.
    pub max: &'a mut [f32],
    /// Sum of `exp(score - max)` so far: `[rows]`.
    pub sum: &'a mut [f32],
    /// Sum of `exp(score - max) * value` so far: `[rows, value_width]`.
    pub out: &'a mut [f32],
}

impl AttentionTile<'_> {
    /// The positions that any row sees.
    pub(super) fn range(&self) -> (usize, usize) {
        let seen = || self.seen.iter().filter(|(from, to)| from < to);
        (seen().map(|s| s.0).min().unwrap_or(0), seen().map(|s| s.1).max().unwrap_or(0))
    }

    /// The positions that all rows see; `from >= to` if there are none.
    pub(super) fn common(&self) -> (usize, usize) {
        let from = self.seen.iter().map(|s| s.0).max().unwrap_or(0);
        (from, self.seen.iter().map(|s| s.1).min().unwrap_or(0))
    }

    fn check(&self) {
        assert!(matches!(self.rows, 1 | 2 | 4 | 8), "{} rows in a tile", self.rows);
        assert!(self.key_width > 0 && self.key_width.is_multiple_of(WIDTH_STEP), "keys of {} elements", self.key_width);
        assert!(self.value_width > 0 && self.value_width.is_multiple_of(WIDTH_STEP), "values of {} elements", self.value_width);
        assert!(self.seen.iter().all(|s| s.1 <= BLOCK), "a block has {BLOCK} positions");
        let positions = self.range().1;
        for (block, stride, width) in
            [(self.keys, self.strides[0], self.key_width), (self.values, self.strides[1], self.value_width)]
        {
            let needed = positions.checked_sub(1).map_or(0, |last| last * stride + width);
            assert!(block.fits(stride, width) && block.len() >= needed, "{} elements for {positions} positions", block.len());
        }
        assert_eq!(self.queries.len(), self.rows * self.key_width, "queries are not rows x key width");
        assert_eq!(self.out.len(), self.rows * self.value_width, "sums are not rows x value width");
        assert_eq!(self.scores.len(), BLOCK * TILE_ROWS, "working memory for scores");
        assert_eq!([self.seen.len(), self.max.len(), self.sum.len()], [self.rows; 3], "something is not there for every row");
    }
}

impl CpuKernels {
    /// Adds what the rows of a tile see of a block to their running maxima, sums and weighted sums of values.
    ///
    /// # Panics
    /// If lengths disagree.
    pub fn attend(&self, tile: &mut AttentionTile<'_>) {
        tile.check();
        // SAFETY: this table was built with proof that the processor has the features it needs; sizes are checked above.
        unsafe { (self.attend)(tile) }
    }
}

/// What is subtracted from scores: the largest one. While a row has seen nothing it is minus infinity, whose difference from itself is
/// not a number.
pub(super) fn subtrahend(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

pub(super) fn capped(score: f32, cap: f32) -> f32 {
    cap * (score / cap).tanh()
}

/// The plain version.
pub(super) fn attend(tile: &mut AttentionTile<'_>) {
    const LANES: usize = 16;
    let [key_stride, value_stride] = tile.strides;
    for row in 0..tile.rows {
        let (from, to) = tile.seen[row];
        if from >= to {
            continue;
        }
        let query = &tile.queries[row * tile.key_width..(row + 1) * tile.key_width];
        let scores = &mut tile.scores[from..to];
        for (position, score) in (from..).zip(scores.iter_mut()) {
            let mut sums = [0f32; LANES];
            for (i, q) in query.iter().enumerate() {
                sums[i % LANES] += q * tile.keys.at(position, key_stride, i);
            }
            *score = sums.iter().sum::<f32>() * tile.scale;
            *score = tile.softcap.map_or(*score, |cap| capped(*score, cap));
        }
        let max = scores.iter().copied().fold(tile.max[row], f32::max);
        let base = subtrahend(max);
        let rescale = (tile.max[row] - base).exp();
        let mut sum = 0f32;
        for score in scores.iter_mut() {
            *score = (*score - base).exp();
            sum += *score;
        }
        (tile.max[row], tile.sum[row]) = (max, tile.sum[row] * rescale + sum);
        let out = &mut tile.out[row * tile.value_width..(row + 1) * tile.value_width];
        out.iter_mut().for_each(|x| *x *= rescale);
        for (position, weight) in (from..).zip(scores.iter()) {
            for (i, x) in out.iter_mut().enumerate() {
                *x += weight * tile.values.at(position, value_stride, i);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const ROUNDING: f64 = 1.0 / (1 << 24) as f64;

    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Stored {
        F32,
        F16,
        Q8_0,
    }

    /// Random blocks of 32 numbers up to about `size`, and the numbers.
    fn random_blocks(elements: usize, size: f32, rng: &mut StdRng) -> (Vec<BlockQ8_0>, Vec<f32>) {
        let mut block = || BlockQ8_0 {
            scale: f16::from_f32(size / 127.0 * rng.random_range(0.1..1.0f32)).to_le_bytes(),
            codes: std::array::from_fn(|_| rng.random()),
        };
        let blocks: Vec<_> = (0..elements / 32).map(|_| block()).collect();
        let mut numbers = vec![0.0; elements];
        CpuKernels::SCALAR.q8_0_to_f32(&blocks, &mut numbers);
        (blocks, numbers)
    }

    /// Rows that walk over some blocks, each seeing its own range of positions.
    struct Case {
        key_width: usize,
        value_width: usize,
        stored: Stored,
        /// Values are the first elements of keys.
        shared: bool,
        scale: f32,
        softcap: Option<f32>,
        blocks: usize,
        queries: Vec<f32>,
        keys: Vec<f32>,
        values: Vec<f32>,
        /// What `keys` and `values` are, where they are stored as blocks.
        blocks_of: [Vec<BlockQ8_0>; 2],
        seen: Vec<(usize, usize)>,
    }

    impl Case {
        fn random(rows: usize, rng: &mut StdRng) -> Self {
            let stored = [Stored::F32, Stored::F16, Stored::Q8_0][rng.random_range(0..3)];
            // Rows are whole blocks, and not too many of them.
            let (unit, most) = if stored == Stored::Q8_0 { (32, MAX_BLOCKS) } else { (16, 11) };
            let key_width = unit * rng.random_range(1..=most);
            let shared = rng.random_range(0..3) == 0;
            let value_width = if shared { 16 * rng.random_range(1..=key_width / 16) } else { unit * rng.random_range(1..=most) };
            let blocks = rng.random_range(1..4);
            let positions = blocks * BLOCK;
            let size = [0.1f32, 1.0, 8.0][rng.random_range(0..3)];
            let mut numbers = |n: usize, size: f32| -> Vec<f32> {
                let exact = |x: f32| if stored == Stored::F16 { f16::from_f32(x).to_f32() } else { x };
                (0..n).map(|_| exact(size * rng.random_range(-1.0..1.0f32))).collect()
            };
            let queries = numbers(rows * key_width, 2.0);
            let mut keys = numbers(positions * key_width, size);
            let mut values = if shared { keys.clone() } else { numbers(positions * value_width, 3.0) };
            let mut blocks_of = [Vec::new(), Vec::new()];
            if stored == Stored::Q8_0 {
                (blocks_of[0], keys) = random_blocks(positions * key_width, size, rng);
                (blocks_of[1], values) =
                    if shared { (blocks_of[0].clone(), keys.clone()) } else { random_blocks(positions * value_width, 3.0, rng) };
            }
            let seen = (0..rows)
                .map(|_| match rng.random_range(0..4) {
                    0 => (0, positions),
                    1 => (rng.random_range(0..positions), 0),
                    _ => (rng.random_range(0..positions), rng.random_range(0..=positions)),
                })
                .collect();
            let scale = rng.random_range(0.05..0.3);
            let softcap = (rng.random_range(0..3) == 0).then_some(4.0);
            Self { key_width, value_width, stored, shared, scale, softcap, blocks, queries, keys, values, blocks_of, seen }
        }

        fn value_stride(&self) -> usize {
            if self.shared { self.key_width } else { self.value_width }
        }

        /// Maxima, sums and weighted sums of rows `rows` in one tile.
        fn run(&self, kernels: &CpuKernels, rows: std::ops::Range<usize>) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
            let halves = |x: &[f32]| x.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>();
            let (half_keys, half_values) = (halves(&self.keys), halves(&self.values));
            let n = rows.len();
            let (mut max, mut sum, mut out) = (vec![f32::NEG_INFINITY; n], vec![0.0; n], vec![0.0; n * self.value_width]);
            let mut scores = vec![f32::NAN; BLOCK * TILE_ROWS];
            for block in 0..self.blocks {
                let seen: Vec<(usize, usize)> = self.seen[rows.clone()]
                    .iter()
                    .map(|(from, to)| {
                        let inside = |p: usize| p.clamp(block * BLOCK, (block + 1) * BLOCK) - block * BLOCK;
                        (inside(*from), inside(*to))
                    })
                    .collect();
                let part = |width: usize| block * BLOCK * width..(block + 1) * BLOCK * width;
                let (k, v) = (part(self.key_width), part(self.value_stride()));
                let (keys, values) = match self.stored {
                    Stored::F16 => (KvFloats::F16(&half_keys[k]), KvFloats::F16(&half_values[v])),
                    Stored::F32 => (KvFloats::F32(&self.keys[k]), KvFloats::F32(&self.values[v])),
                    Stored::Q8_0 => {
                        let [keys, values] = &self.blocks_of;
                        (KvFloats::Q8_0(&keys[k.start / 32..k.end / 32]), KvFloats::Q8_0(&values[v.start / 32..v.end / 32]))
                    }
                };
                kernels.attend(&mut AttentionTile {
                    rows: n,
                    queries: &self.queries[rows.start * self.key_width..rows.end * self.key_width],
                    key_width: self.key_width,
                    value_width: self.value_width,
                    strides: [self.key_width, self.value_stride()],
                    keys,
                    values,
                    seen: &seen,
                    scale: self.scale,
                    softcap: self.softcap,
                    ahead: [bytemuck::cast_slice(&half_keys), bytemuck::cast_slice(&half_values)],
                    scores: &mut scores,
                    max: &mut max,
                    sum: &mut sum,
                    out: &mut out,
                });
            }
            (max, sum, out)
        }

        /// A row's result in f64 and what rounding may change. With u = 2^-24: a score's products and sum err by at most
        /// (width / 8 + 8) u of the sum of their magnitudes (partial sums of at least 8 lanes, then trees, then the scale; a tanh adds
        /// 4 u of its value, at most the cap, and its slope is at most 1); exp errs by 4 u and by the rounding of its argument. Such an
        /// error e of every weight moves a weighted mean by at most 2 e of the mean of magnitudes; sums over P positions and rescaling
        /// by blocks add (2 P + 4 blocks) u.
        fn exact(&self, row: usize) -> Option<Vec<(f64, f64)>> {
            let (from, to) = self.seen[row];
            if from >= to {
                return None;
            }
            let query = &self.queries[row * self.key_width..][..self.key_width];
            let mut worst: f64 = 0.0;
            let scores: Vec<f64> = (from..to)
                .map(|p| {
                    let key = &self.keys[p * self.key_width..][..self.key_width];
                    let terms = || query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k));
                    let scale = f64::from(self.scale);
                    let magnitude = scale * terms().map(f64::abs).sum::<f64>();
                    worst = worst.max((self.key_width as f64 / 8.0 + 8.0) * ROUNDING * magnitude);
                    let score = scale * terms().sum::<f64>();
                    self.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let range = max - scores.iter().copied().fold(f64::INFINITY, f64::min);
            let of_weight = worst + f64::from(self.softcap.unwrap_or(0.0)) * 4.0 * ROUNDING + (range + 4.0) * ROUNDING;
            let relative = 2.0 * of_weight + (2.0 * (to - from) as f64 + 4.0 * self.blocks as f64 + 8.0) * ROUNDING;
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let column = |i: usize| {
                let term = |(p, s): (usize, &f64)| (s - max).exp() / sum * f64::from(self.values[p * self.value_stride() + i]);
                let terms = || (from..).zip(&scores).map(term);
                (terms().sum(), 1.1 * relative * terms().map(f64::abs).sum::<f64>() + 1e-37)
            };
            Some((0..self.value_width).map(column).collect())
        }
    }

    fn check(rows: usize, seed: u64) {
        let case = Case::random(rows, &mut StdRng::seed_from_u64(seed));
        let exact: Vec<_> = (0..rows).map(|row| case.exact(row)).collect();
        for kernels in CpuKernels::available() {
            let name = kernels.name;
            let (max, sum, out) = case.run(&kernels, 0..rows);
            for (row, exact) in exact.iter().enumerate() {
                let out = &out[row * case.value_width..][..case.value_width];
                match exact {
                    None => assert!(max[row] == f32::NEG_INFINITY && sum[row] == 0.0 && out.iter().all(|x| *x == 0.0), "{name}"),
                    Some(exact) => {
                        for (x, (exact, bound)) in out.iter().zip(exact) {
                            let mean = f64::from(*x) / f64::from(sum[row]);
                            assert!((mean - exact).abs() <= *bound, "{name}, seed {seed}: {mean} for {exact}, bound {bound:e}");
                        }
                    }
                }
                let alone = case.run(&kernels, row..row + 1);
                let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&alone.2), bits(out), "{name}, seed {seed}: the tile changed row {row}");
                assert_eq!([alone.0[0].to_bits(), alone.1[0].to_bits()], [max[row].to_bits(), sum[row].to_bits()], "{name}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn tiles_agree_with_f64_and_rows_do_not_depend_on_each_other(rows in 0u32..4, seed: u64) {
            check(1 << rows, seed);
        }
    }

    /// Keys and values that a row does not see may be anything; those that it sees show.
    #[test]
    fn only_what_is_seen_matters() {
        for kernels in CpuKernels::available() {
            for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for seed in 0..20 {
                    let mut case = Case::random(8, &mut StdRng::seed_from_u64(seed));
                    // Blocks cannot hold them.
                    case.stored = if case.stored == Stored::Q8_0 { Stored::F32 } else { case.stored };
                    case.shared = false;
                    case.values = case.values[..case.blocks * BLOCK * 16].to_vec();
                    case.value_width = 16;
                    case.seen = (0..8).map(|r| (r, 20 + r)).collect();
                    let clean = case.run(&kernels, 0..8);
                    for position in [3, 22] {
                        case.keys[position * case.key_width + 5] = special;
                        case.values[position * 16 + 7] = special;
                    }
                    let (_, sum, out) = case.run(&kernels, 0..8);
                    for row in 0..8 {
                        let touched = [3, 22].iter().any(|p| (row..20 + row).contains(p));
                        let (out, clean_out) = (&out[row * 16..][..16], &clean.2[row * 16..][..16]);
                        let mean = out[7] / sum[row];
                        assert!(!touched || mean.is_nan() || case.softcap.is_some() || special == f32::NEG_INFINITY, "{mean}");
                        assert!(
                            touched || (out == clean_out && sum[row] == clean.1[row]),
                            "{} {special} row {row}",
                            kernels.name
                        );
                    }
                }
            }
        }
    }

    /// Rows that see a score of minus infinity only after something else ignore it.
    #[test]
    fn a_key_infinitely_far_weighs_nothing() {
        for kernels in CpuKernels::available() {
            let mut case = Case::random(1, &mut StdRng::seed_from_u64(1));
            (case.stored, case.softcap, case.seen) = (Stored::F32, None, vec![(0, 30)]);
            let width = case.key_width;
            case.queries.iter_mut().for_each(|q| *q = 1.0);
            case.keys[4 * width..5 * width].fill(-60000.0);
            let (_, sum, out) = case.run(&kernels, 0..1);
            assert!(sum[0].is_finite() && out.iter().all(|x| x.is_finite()), "{}", kernels.name);
        }
    }
}
