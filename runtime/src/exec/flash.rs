//! Causal attention of many rows over a cache, by tiles, blocks and segments; what grouped-query and latent attention share.
//!
//! A row is one head of one token. Work is cut into pieces of rows that share keys and values: tokens times heads of one key/value
//! head. A piece walks the positions by blocks of `BLOCK`; a block is widened once for all its tiles of up to `TILE_ROWS` rows, or
//! read as it lies when there are few. Every `SEGMENT` positions the running maximum, sum and weighted sum start anew and are merged
//! into the row's total, in order of positions. So segments may also be computed by different threads (few rows, long context), and
//! since blocks and segments lie at fixed positions, **a row's bits depend neither on threads nor on how a prompt was cut**.

use super::kv_cache::{KvCache, KvRows, KvSource};
use super::threads::Threads;
use crate::kernels::{AttentionTile, BLOCK, CpuKernels, KvFloats, MAX_BLOCKS, TILE_ROWS, WIDTH_STEP};
use ndarray::{ArrayViewMut2, Axis};
use rayon::prelude::*;

/// Positions after which partial results are merged.
const SEGMENT: usize = 4 * BLOCK;
/// Rows of a piece: enough to widen a block rarely, few enough that queries and sums stay in a core's own cache.
const PIECE_ROWS: usize = 128;
/// Pieces per thread that are worth cutting for.
const PIECES_PER_THREAD: usize = 4;
/// From so many tiles on a block is widened into memory first.
const TILES_TO_WIDEN: usize = 3;
/// Scores (rows times positions) below which all is done on the calling thread: waking others takes longer.
const SERIAL_SCORES: usize = 4096;

/// Attention of one layer for consecutive tokens whose keys and values are in the cache.
pub struct Attend<'a> {
    /// The cache.
    pub kv: &'a KvCache,
    /// The layer.
    pub layer: usize,
    /// Position of the first token.
    pub position: usize,
    /// `[tokens, kv_heads * group * key width]`, which says how many tokens there are.
    pub queries: &'a [f32],
    /// Heads that have keys of their own.
    pub kv_heads: usize,
    /// Query heads to each of them.
    pub group: usize,
    /// Factor on scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)` instead of the score.
    pub softcap: Option<f32>,
    /// Positions seen, counted back from the token's own.
    pub window: Option<usize>,
    /// Positions are seen only inside chunks of this many.
    pub chunk: Option<usize>,
    /// One more logit per head, without a value: `[num_heads]`.
    pub sinks: Option<&'a [f32]>,
}

/// Numbers that start on a cache line, so that no vector crosses one. Memory only grows.
#[derive(Debug, Default)]
struct AlignedFloats {
    lines: Vec<Line>,
}

#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Line([f32; 16]);

impl AlignedFloats {
    /// `len` numbers, whose contents are left from earlier uses.
    fn get(&mut self, len: usize) -> &mut [f32] {
        if 16 * self.lines.len() < len {
            self.lines.resize(len.div_ceil(16), bytemuck::Zeroable::zeroed());
        }
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..len]
    }
}

/// Running results of rows.
#[derive(Debug, Default)]
struct Partial {
    /// `[rows]`
    max: Vec<f32>,
    /// `[rows]`
    sum: Vec<f32>,
    /// `[rows, width]`
    values: AlignedFloats,
    /// Of `values` in use.
    len: usize,
}

impl Partial {
    fn reset(&mut self, rows: usize, width: usize) {
        for (part, start) in [(&mut self.max, f32::NEG_INFINITY), (&mut self.sum, 0.0)] {
            part.clear();
            part.resize(rows, start);
        }
        self.len = rows * width;
        self.values.get(self.len).fill(0.0);
    }

    /// Adds what later positions gave: `[rows]` maxima and sums, `[rows, width]` weighted sums.
    fn merge(&mut self, [max, sum, values]: [&[f32]; 3]) {
        let width = self.len / self.max.len();
        let later = max.iter().zip(sum).zip(values.chunks_exact(width));
        let total = self.max.iter_mut().zip(&mut self.sum).zip(self.values.get(self.len).chunks_exact_mut(width));
        for (((total_max, total_sum), total), ((max, sum), values)) in total.zip(later) {
            // Nothing seen there; a sum that is not a number counts as something.
            if *sum == 0.0 {
                continue;
            }
            let new_max = total_max.max(*max);
            let (old, new) = ((*total_max - new_max).exp(), (max - new_max).exp());
            (*total_max, *total_sum) = (new_max, *total_sum * old + sum * new);
            total.iter_mut().zip(values).for_each(|(t, v)| *t = *t * old + v * new);
        }
    }

    fn parts(&self) -> [&[f32]; 3] {
        [&self.max, &self.sum, &bytemuck::cast_slice(&self.values.lines)[..self.len]]
    }
}

/// Working memory of one thread.
#[derive(Debug, Default)]
pub struct FlashScratch {
    /// A piece's queries: `[rows, key width]`.
    queries: AlignedFloats,
    scores: AlignedFloats,
    /// A widened block each.
    keys: AlignedFloats,
    values: AlignedFloats,
    segment: Partial,
    total: Partial,
    /// Results of segments that are computed apart, of the thread that asks for them.
    apart: Vec<f32>,
}

/// Tokens and heads that are worked on together.
#[derive(Debug, Clone, Copy)]
struct Rows {
    first_token: usize,
    tokens: usize,
    kv_head: usize,
    first_head: usize,
    heads: usize,
}

impl Rows {
    const fn count(&self) -> usize {
        self.tokens * self.heads
    }
}

/// Widths of rows and of what they are padded to.
#[derive(Debug, Clone, Copy)]
struct Widths {
    key: usize,
    value: usize,
    padded_key: usize,
    padded_value: usize,
}

struct Piece<'a> {
    rows: Rows,
    /// `[tokens, heads * value width]`
    out: ArrayViewMut2<'a, f32>,
}

/// One sequence's part of the work.
struct Cut<'w, 'a> {
    attend: &'w Attend<'w>,
    pieces: Vec<Piece<'a>>,
    /// That some of its rows see something of.
    segments: std::ops::Range<usize>,
    /// Rows times positions, about.
    scores: usize,
}

/// What one thread does at once.
enum Job<'w, 'a> {
    Whole(&'w Attend<'w>, Piece<'a>),
    /// Rows over one segment; maxima, sums and weighted sums go to the last.
    Segment(&'w Attend<'w>, Rows, usize, &'w mut [f32]),
}

/// `out[t] = softmax(scale * q[t] K^T) V` per head, over the positions that token `t` may see, for the tokens of the first of
/// `sequences`, then for those of the next. They differ in cache, position and queries only.
pub fn attention(
    threads: &Threads,
    sequences: &[Attend<'_>],
    out: ArrayViewMut2<'_, f32>, /* [tokens, heads * value width] */
) {
    let Some(first) = sequences.first() else { return };
    let source = first.kv.source(first.layer, 0);
    let pad = |width: usize| width.next_multiple_of(WIDTH_STEP);
    let widths = Widths {
        key: source.key_width,
        value: source.value_width,
        padded_key: pad(source.key_width),
        padded_value: pad(source.value_width),
    };
    let num_heads = first.kv_heads * first.group;
    let tokens_of = |a: &Attend<'_>| a.queries.len() / (num_heads * widths.key);
    debug_assert_eq!(sequences.iter().map(tokens_of).sum::<usize>(), out.nrows(), "a query per head");
    let scores: usize = sequences.iter().map(|a| tokens_of(a) * num_heads * (a.position + tokens_of(a))).sum();
    let serial = threads.count() == 1 || scores <= SERIAL_SCORES;
    let wanted = if serial { 1 } else { PIECES_PER_THREAD * threads.count() };
    let mut rest = out;
    let mut cuts = Vec::with_capacity(sequences.len());
    for attend in sequences {
        let (of_sequence, later) = rest.split_at(Axis(0), tokens_of(attend));
        rest = later;
        cuts.push(cut(attend, wanted.div_ceil(sequences.len()), widths.value, of_sequence));
    }
    if serial {
        for Cut { attend, pieces, .. } in cuts {
            pieces.into_iter().for_each(|piece| attend_whole(threads, attend, &widths, piece));
        }
        return;
    }
    // Segments on their own where a sequence's pieces are few and each of them more than a thread's share.
    let scores: usize = cuts.iter().map(|c| c.scores).sum();
    let is_apart = |c: &Cut<'_, '_>| {
        let count = c.pieces.len();
        c.segments.len() > 1 && count < wanted && c.scores * wanted > scores * count
    };
    let (apart, whole): (Vec<_>, Vec<_>) = cuts.into_iter().partition(is_apart);
    // Taken away from the scratch, since this thread will use that for segments.
    let mut results = threads.with_scratch(|s| std::mem::take(&mut s.flash.apart));
    let row_len = widths.padded_value + 2;
    let needed = apart.iter().map(|c| c.pieces.iter().map(|p| p.rows.count()).sum::<usize>() * c.segments.len() * row_len).sum();
    if results.len() < needed {
        results.resize(needed, 0.0);
    }
    let mut jobs = Vec::new();
    let mut rest = &mut results[..needed];
    for c in &apart {
        for piece in &c.pieces {
            for segment in c.segments.clone() {
                let (result, later) = rest.split_at_mut(piece.rows.count() * row_len);
                rest = later;
                jobs.push(Job::Segment(c.attend, piece.rows, segment, result));
            }
        }
    }
    jobs.extend(whole.into_iter().flat_map(|c| c.pieces.into_iter().map(move |piece| Job::Whole(c.attend, piece))));
    jobs.into_par_iter().with_max_len(1).for_each(|job| match job {
        Job::Whole(attend, piece) => attend_whole(threads, attend, &widths, piece),
        Job::Segment(attend, rows, segment, result) => attend_apart(threads, attend, &widths, &rows, segment, result),
    });
    put_together(&widths, apart, &results[..needed]);
    threads.with_scratch(|s| s.flash.apart = results);
}

/// A sequence's rows in about `wanted` pieces.
fn cut<'w, 'a>(
    a: &'w Attend<'w>,
    wanted: usize,
    value_width: usize,
    out: ArrayViewMut2<'a, f32>, // [tokens, heads * value width]
) -> Cut<'w, 'a> {
    let tokens = out.nrows();
    let end = a.position + tokens;
    let segments = a.visible(0).0 / SEGMENT..end.div_ceil(SEGMENT);
    // First tokens are divided, then segments, then, in short contexts, the heads of a group.
    let tokens_at_once = (PIECE_ROWS / a.group).clamp(1, tokens.div_ceil(wanted.div_ceil(a.kv_heads)).max(1));
    let pieces_of = |heads: usize| tokens.div_ceil(tokens_at_once) * a.kv_heads * a.group.div_ceil(heads);
    let mut heads_at_once = a.group;
    while heads_at_once > TILE_ROWS && pieces_of(heads_at_once) * segments.len() < wanted {
        heads_at_once = heads_at_once.div_ceil(2);
    }
    let mut pieces = Vec::with_capacity(pieces_of(heads_at_once));
    let mut rest = out;
    let mut first_token = 0;
    while first_token < tokens {
        let count = tokens_at_once.min(tokens - first_token);
        let (mut of_tokens, later) = rest.split_at(Axis(0), count);
        rest = later;
        for kv_head in 0..a.kv_heads {
            for first in (0..a.group).step_by(heads_at_once) {
                let heads = heads_at_once.min(a.group - first);
                let (out, others) = of_tokens.split_at(Axis(1), heads * value_width);
                of_tokens = others;
                let rows = Rows { first_token, tokens: count, kv_head, first_head: kv_head * a.group + first, heads };
                pieces.push(Piece { rows, out });
            }
        }
        first_token += count;
    }
    let scores = tokens * a.kv_heads * a.group * segments.len();
    Cut { attend: a, pieces, segments, scores }
}

/// A piece over all its segments.
fn attend_whole(threads: &Threads, a: &Attend<'_>, widths: &Widths, mut piece: Piece<'_>) {
    threads.with_scratch(|s| {
        let s = &mut s.flash;
        a.start(&piece.rows, widths, &mut s.total);
        a.pack(&piece.rows, widths, &mut s.queries);
        let (first, last) = (piece.rows.first_token, piece.rows.first_token + piece.rows.tokens - 1);
        for segment in a.visible(first).0 / SEGMENT..a.visible(last).1.div_ceil(SEGMENT) {
            a.attend_segment(threads.kernels(), &piece.rows, widths, segment, s);
            s.total.merge(s.segment.parts());
        }
        finish(&piece.rows, widths, &s.total, &mut piece.out);
    });
}

/// A piece's rows over one segment, into `result`.
fn attend_apart(threads: &Threads, a: &Attend<'_>, widths: &Widths, rows: &Rows, segment: usize, result: &mut [f32]) {
    threads.with_scratch(|s| {
        let s = &mut s.flash;
        a.pack(rows, widths, &mut s.queries);
        a.attend_segment(threads.kernels(), rows, widths, segment, s);
        let (max, result) = result.split_at_mut(rows.count());
        let (sum, values) = result.split_at_mut(rows.count());
        max.copy_from_slice(&s.segment.max);
        sum.copy_from_slice(&s.segment.sum);
        values.copy_from_slice(s.segment.parts()[2]);
    });
}

/// Each piece's segments, in order.
fn put_together(widths: &Widths, apart: Vec<Cut<'_, '_>>, results: &[f32]) {
    let mut total = Partial::default();
    let mut rest = results;
    for c in apart {
        for mut piece in c.pieces {
            c.attend.start(&piece.rows, widths, &mut total);
            for _ in c.segments.clone() {
                let (result, later) = rest.split_at(piece.rows.count() * (widths.padded_value + 2));
                rest = later;
                let (max, result) = result.split_at(piece.rows.count());
                let (sum, values) = result.split_at(piece.rows.count());
                total.merge([max, sum, values]);
            }
            finish(&piece.rows, widths, &total, &mut piece.out);
        }
    }
}

/// Weighted sums to means, into the output.
fn finish(rows: &Rows, widths: &Widths, total: &Partial, out: &mut ArrayViewMut2<'_, f32>) {
    let mut results = total.sum.iter().zip(total.parts()[2].chunks_exact(widths.padded_value));
    for mut token in out.rows_mut() {
        let token = token.as_slice_mut().expect("activations are row-major");
        for (head, (sum, values)) in token.chunks_exact_mut(widths.value).zip(results.by_ref().take(rows.heads)) {
            let factor = 1.0 / sum;
            head.iter_mut().zip(values).for_each(|(x, v)| *x = v * factor);
        }
    }
}

impl Attend<'_> {
    /// The positions `from..to` that token `t` sees.
    fn visible(&self, t: usize) -> (usize, usize) {
        let at = self.position + t;
        let chunk_start = self.chunk.map_or(0, |c| at - at % c);
        let window_start = self.window.map_or(0, |w| (at + 1).saturating_sub(w));
        (window_start.max(chunk_start), at + 1)
    }

    /// What rows have seen before the first position: nothing, or their sink.
    fn start(&self, rows: &Rows, widths: &Widths, total: &mut Partial) {
        total.reset(rows.count(), widths.padded_value);
        if let Some(sinks) = self.sinks {
            for (row, (max, sum)) in total.max.iter_mut().zip(&mut total.sum).enumerate() {
                (*max, *sum) = (sinks[rows.first_head + row % rows.heads], 1.0);
            }
        }
    }

    /// Queries one after the other, padded with zeros.
    fn pack(&self, rows: &Rows, widths: &Widths, queries: &mut AlignedFloats /* [rows, padded key width] */) {
        let row_len = self.kv_heads * self.group * widths.key;
        let queries = queries.get(rows.count() * widths.padded_key);
        for (row, to) in queries.chunks_exact_mut(widths.padded_key).enumerate() {
            let (t, h) = (rows.first_token + row / rows.heads, rows.first_head + row % rows.heads);
            to[..widths.key].copy_from_slice(&self.queries[t * row_len + h * widths.key..][..widths.key]);
            to[widths.key..].fill(0.0);
        }
    }

    /// What the rows, packed, make of the positions of one segment, into `s.segment`.
    fn attend_segment(&self, kernels: &CpuKernels, rows: &Rows, widths: &Widths, segment: usize, s: &mut FlashScratch) {
        let source = self.kv.source(self.layer, rows.kv_head);
        let FlashScratch { queries, scores, keys: wide_keys, values: wide_values, segment: partial, .. } = s;
        partial.reset(rows.count(), widths.padded_value);
        let scores = scores.get(BLOCK * TILE_ROWS);
        let queries = queries.get(rows.count() * widths.padded_key);
        let sums = partial.values.get(partial.len);
        let (first, last) = (self.visible(rows.first_token).0, self.visible(rows.first_token + rows.tokens - 1).1);
        let (begin, end) = (first.max(segment * SEGMENT), last.min((segment + 1) * SEGMENT));
        let tiles = rows.count().div_ceil(TILE_ROWS);
        let mut start = begin - begin % BLOCK;
        while start < end {
            let positions = (start, end.min(start + BLOCK));
            // Beyond the segment, too: the next one is most often this thread's next.
            let next = (positions.1, last.min(positions.1 + BLOCK));
            let block = widen(kernels, &source, positions, widths, tiles, [&mut *wide_keys, &mut *wide_values]);
            // What each tile has fetched while it is computed: the values it needs next, then the next block.
            let ahead = |tile: usize| match (block.widened, tile) {
                (true, 0) => [source.key_bytes(next), source.value_bytes(next)],
                (false, 0) if tiles == 1 => [source.value_bytes(positions), source.key_bytes(next)],
                (false, 0) => [source.value_bytes(positions), &[]],
                (false, _) if tile + 1 == tiles => [source.key_bytes(next), &[]],
                _ => [&[][..], &[]],
            };
            let (mut row, mut tile) = (0, 0);
            while row < rows.count() {
                let count = 1 << (rows.count() - row).min(TILE_ROWS).ilog2();
                let mut seen = [(0, 0); TILE_ROWS];
                for (i, seen) in seen[..count].iter_mut().enumerate() {
                    let (from, to) = self.visible(rows.first_token + (row + i) / rows.heads);
                    // In the block; `from >= to` when nothing is.
                    *seen = (from.max(positions.0) - start, to.clamp(start, positions.1) - start);
                }
                kernels.attend(&mut AttentionTile {
                    rows: count,
                    queries: &queries[row * widths.padded_key..(row + count) * widths.padded_key],
                    key_width: widths.padded_key,
                    value_width: widths.padded_value,
                    strides: block.strides,
                    keys: block.keys,
                    values: block.values,
                    seen: &seen[..count],
                    scale: self.scale,
                    softcap: self.softcap,
                    ahead: ahead(tile),
                    scores,
                    max: &mut partial.max[row..row + count],
                    sum: &mut partial.sum[row..row + count],
                    out: &mut sums[row * widths.padded_value..(row + count) * widths.padded_value],
                });
                row += count;
                tile += 1;
            }
            start += BLOCK;
        }
    }
}

/// A block as tiles take it.
struct Block<'a> {
    keys: KvFloats<'a>,
    values: KvFloats<'a>,
    strides: [usize; 2],
    widened: bool,
}

/// The block at `positions`: where it lies, if few tiles use it and its rows are whole vectors of floats; else widened.
fn widen<'a>(
    kernels: &CpuKernels,
    source: &KvSource<'a>,
    positions: (usize, usize),
    widths: &Widths,
    tiles: usize,
    [wide_keys, wide_values]: [&'a mut AlignedFloats; 2],
) -> Block<'a> {
    let (keys, values) = (source.keys(positions), source.values(positions));
    let aligned = widths.key == widths.padded_key && widths.value == widths.padded_value;
    let few = aligned && tiles < TILES_TO_WIDEN;
    let direct = |rows: &KvRows<'a>| match *rows {
        KvRows::F32(x) if aligned => Some(KvFloats::F32(x)),
        KvRows::F16(x) if few => Some(KvFloats::F16(x)),
        KvRows::Q8_0(x) if few && widths.key.max(widths.value) <= 32 * MAX_BLOCKS => Some(KvFloats::Q8_0(x)),
        _ => None,
    };
    if let Some(keys) = direct(&keys) {
        let (value_stride, values) = match &values {
            Some(values) => (widths.value, direct(values).expect("keys and values have one format")),
            None => (widths.key, keys),
        };
        return Block { keys, values, strides: [widths.key, value_stride], widened: false };
    }
    let fill = |rows: &KvRows<'_>, width: usize, padded: usize, to: &'a mut AlignedFloats| -> &'a [f32] {
        let to = to.get(BLOCK * padded);
        let count = positions.1 - positions.0;
        if width == padded {
            rows.widen(kernels, 0, &mut to[..count * width]);
        } else {
            for (i, to) in to.chunks_exact_mut(padded).take(count).enumerate() {
                rows.widen(kernels, i * width, &mut to[..width]);
                to[width..].fill(0.0);
            }
        }
        to
    };
    let keys = KvFloats::F32(fill(&keys, widths.key, widths.padded_key, wide_keys));
    match values {
        Some(values) => {
            let values = KvFloats::F32(fill(&values, widths.value, widths.padded_value, wide_values));
            Block { keys, values, strides: [widths.padded_key, widths.padded_value], widened: true }
        }
        None => Block { keys, values: keys, strides: [widths.padded_key; 2], widened: true },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::attention;
    use ndarray::{Array2, s};
    use tierwise_cost::model::{Attention, Geometry, Gqa, ModelSpec};
    use tierwise_cost::quant::QuantFormat;
    use tierwise_cost::recipe::Recipe;

    const TOKENS: usize = 330;

    fn spec(heads: usize, kv_heads: usize, head_dim: usize) -> ModelSpec {
        let sizes = format!("num_heads = {heads}, num_kv_heads = {kv_heads}, head_dim = {head_dim}");
        let text = format!(
            r#"
            name = "flash"
            architecture = "qwen3moe"
            hidden_size = 32
            vocab_size = 8
            context_length = 1024
            source = "test"
            [[block]]
            repeat = 1
            attention = {{ kind = "gqa", {sizes}, rope = {{ theta = 1e4, rotary_dim = 8 }} }}
            ffn = {{ kind = "dense", inner_size = 32 }}
            "#
        );
        let geometry = Geometry::from_toml(&text).expect("a geometry");
        ModelSpec::with_recipe(geometry, &Recipe::by_name("F32").expect("a recipe")).expect("a model")
    }

    fn values(rows: usize, cols: usize, seed: u32) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            let x = (i as u32).wrapping_mul(2_654_435_761) ^ (j as u32).wrapping_mul(40_503) ^ seed.wrapping_mul(97);
            (x.wrapping_mul(2_246_822_519) >> 16) as f32 / 16384.0 - 2.0
        })
    }

    /// The same bits for any number of threads and any chunks of the prompt: through one, few and many tiles, blocks as they lie and
    /// widened, segments one after the other and apart.
    #[test]
    fn threads_and_chunks_change_no_bit() {
        let sinks = [0.5; 32];
        for (heads, kv_heads, head_dim) in [(8, 1, 32), (32, 1, 16), (6, 2, 12), (5, 5, 48), (12, 4, 16)] {
            let spec = spec(heads, kv_heads, head_dim);
            let Attention::Gqa(plain) = &spec.layers[0].attention else { panic!("not GQA") };
            let variants = [
                (plain.clone(), None),
                (Gqa { sliding_window: Some(300), ..plain.clone() }, Some(&sinks[..heads])),
                (Gqa { chunk: Some(130), softcap: Some(5.0), ..plain.clone() }, None),
            ];
            let q = values(TOKENS, heads * head_dim, 1);
            let (k, v) = (values(TOKENS, kv_heads * head_dim, 2), values(TOKENS, kv_heads * head_dim, 3));
            let formats = [QuantFormat::F32, QuantFormat::F16, QuantFormat::Q8_0];
            // Q8_0 where rows are whole blocks.
            for format in formats.into_iter().filter(|f| head_dim.is_multiple_of(f.layout().elems as usize)) {
                for (a, sinks) in &variants {
                    let run = |threads: usize, cuts: &mut dyn Iterator<Item = usize>| {
                        let threads = Threads::new(threads).expect("threads");
                        let mut kv = KvCache::new(&spec, TOKENS, format).expect("a cache");
                        let mut out = Array2::zeros(q.dim());
                        let mut start = 0;
                        while start < TOKENS {
                            let end = TOKENS.min(start + cuts.next().expect("endless"));
                            let part = |x: &Array2<f32>| x.slice(s![start..end, ..]).to_slice().expect("row-major").to_vec();
                            kv.append(threads.kernels(), 0, &part(&k), &part(&v));
                            let rows = s![start..end, ..];
                            let work = || attention::attention(&threads, a, *sinks, 0, &kv, &q.slice(rows), out.slice_mut(rows));
                            threads.pool().install(work);
                            kv.advance(end - start);
                            start = end;
                        }
                        out.mapv(f32::to_bits)
                    };
                    let whole = run(1, &mut std::iter::repeat(TOKENS));
                    for (threads, chunk) in [(1, 7), (2, TOKENS), (2, 64), (3, 1), (16, 1), (16, 250)] {
                        let again = run(threads, &mut std::iter::repeat(chunk));
                        assert!(
                            again == whole,
                            "{heads} heads over {kv_heads}, {format}, {threads} threads, chunks of {chunk}: {a:?}"
                        );
                    }
                }
            }
        }
    }
}
