//! Latent attention (MLA; DeepSeek-V2, arXiv 2405.04434) over a cache of latents.
//!
//! Keys and values of a head are projections of a latent that all heads share, so the projections are absorbed: a query is taken
//! into the latent space (`k_b`), attends to the latents themselves, and the result is taken to the value's width (`v_b`). Only
//! latent and rotated key are cached, and nothing is expanded per position. In the latent space all heads share their keys and values
//! (the latents), so that it is [`super::flash`] with one key/value head.

use super::attention::OfSequence;
use super::flash::{self, Attend};
use super::kv_cache::KvCache;
use super::matmul::{Product, prepare_rows, run_products};
use super::model::Matrix;
use super::rope::RopeTable;
use super::threads::{Threads, for_rows};
use crate::kernels::ActivationBuf;
use crate::quant::activation_format;
use ndarray::ArrayViewMut2;
use tierwise_cost::model::Mla;

/// Tokens taken into the latent space at once, where a query is several times as wide: bounds the working memory of long prompts.
const TOKENS_AT_ONCE: usize = 64;

/// The layer's weights besides its projections.
#[derive(Debug, Clone, Copy)]
pub struct LatentWeights<'a> {
    /// `[kv_lora_rank]`
    pub kv_norm: &'a [f32],
    /// `[num_heads * kv_lora_rank, qk_nope_head_dim]`
    pub k_b: Matrix<'a>,
    /// `[num_heads * v_head_dim, kv_lora_rank]`
    pub v_b: Matrix<'a>,
}

/// Working memory of a step.
#[derive(Default)]
pub struct LatentBuffers {
    /// Row of head `h` of token `t` among the rows `[tokens, num_heads]`, head by head: `[num_heads, tokens]`.
    rows: Vec<u32>,
    /// Unrotated parts of the queries, then attention's results, as products want them: `[tokens * num_heads, _]`.
    prepared: ActivationBuf,
    /// Results of products, head by head: `[num_heads, tokens, _]`.
    products: Vec<f32>,
    /// Queries in the latent space and their rotated parts: `[tokens, num_heads, kv_lora_rank + qk_rope_head_dim]`.
    queries: Vec<f32>,
    /// Weighted sums of latents: `[tokens, num_heads, kv_lora_rank]`.
    latents: Vec<f32>,
}

/// Norms the new latents and rotates the rotary parts of queries and keys, in place.
pub fn norm_and_rotate(
    threads: &Threads,
    a: &Mla,
    (kv_norm, eps): (&[f32], f32),
    rope: &RopeTable,
    q: &mut [f32],      // [tokens, num_heads * (qk_nope_head_dim + qk_rope_head_dim)]
    latent: &mut [f32], // [tokens, kv_lora_rank + qk_rope_head_dim]
) {
    let (nope, rotary, rank) = (a.qk_nope_head_dim as usize, a.qk_rope_head_dim as usize, a.kv_lora_rank as usize);
    for_rows(threads, q, a.num_heads as usize * (nope + rotary), |t, row| {
        for head in row.chunks_exact_mut(nope + rotary) {
            rope.apply(t, &mut head[nope..], rotary);
        }
    });
    for_rows(threads, latent, rank + rotary, |t, row| {
        let (compressed, key) = row.split_at_mut(rank);
        super::elementwise::rms_norm_in_place(threads.kernels(), compressed, Some(kv_norm), eps);
        rope.apply(t, key, rotary);
    });
}

/// What every head makes of what it sees, for new tokens whose latents are in their sequences' caches but not yet counted there.
pub fn attention(
    threads: &Threads,
    a: &Mla,
    (layer, sequences): (usize, &[OfSequence<'_>]),
    weights: &LatentWeights<'_>,
    buffers: &mut LatentBuffers,
    q: &[f32],       // [tokens, num_heads * (qk_nope_head_dim + qk_rope_head_dim)]
    out: &mut [f32], // [tokens, num_heads * v_head_dim]
) {
    let (heads, qk) = (a.num_heads as usize, (a.qk_nope_head_dim + a.qk_rope_head_dim) as usize);
    let q = q.chunks(TOKENS_AT_ONCE * heads * qk);
    let out = out.chunks_mut(TOKENS_AT_ONCE * heads * a.v_head_dim as usize);
    for (i, (q, out)) in q.zip(out).enumerate() {
        let first = i * TOKENS_AT_ONCE;
        let rows = runs(sequences, first, first + q.len() / (heads * qk));
        attend_tokens(threads, a, (layer, &rows), weights, buffers, q, out);
    }
}

/// Consecutive tokens of one sequence.
struct Run<'a> {
    kv: &'a KvCache,
    /// Of the first.
    position: usize,
    tokens: usize,
}

/// Whose the rows `from..to` of a step are.
fn runs<'a>(sequences: &[OfSequence<'a>], from: usize, to: usize) -> Vec<Run<'a>> {
    let mut first = 0;
    let mut runs = Vec::with_capacity(sequences.len());
    for s in sequences {
        let (start, end) = (from.max(first), to.min(first + s.rows));
        if start < end {
            runs.push(Run { kv: s.kv, position: s.kv.len() + start - first, tokens: end - start });
        }
        first += s.rows;
    }
    runs
}

/// [`attention`] of a few tokens.
fn attend_tokens(
    threads: &Threads,
    a: &Mla,
    (layer, runs): (usize, &[Run<'_>]),
    weights: &LatentWeights<'_>,
    buffers: &mut LatentBuffers,
    q: &[f32],       // [tokens, num_heads * (qk_nope_head_dim + qk_rope_head_dim)]
    out: &mut [f32], // [tokens, num_heads * v_head_dim]
) {
    let (heads, rank, width) = (a.num_heads as usize, a.kv_lora_rank as usize, latent_width(a));
    let (nope, qk) = (a.qk_nope_head_dim as usize, (a.qk_nope_head_dim + a.qk_rope_head_dim) as usize);
    let v_head_dim = a.v_head_dim as usize;
    let tokens = q.len() / (heads * qk);
    let b = buffers;
    b.rows.clear();
    b.rows.extend((0..heads).flat_map(|h| (0..tokens).map(move |t| (t * heads + h) as u32)));

    // Queries into the latent space.
    prepare_rows(threads, weights.k_b.format, tokens * heads, nope, &mut b.prepared, |row, kernels, to| {
        kernels.quantize_activation_row(activation_format(weights.k_b.format), &q[row * qk..row * qk + nope], to);
    });
    multiply_heads(threads, weights.k_b, rank, &b.prepared, &b.rows, &mut b.products);
    b.queries.resize(tokens * heads * width, 0.0);
    let products = &b.products;
    for_rows(threads, &mut b.queries, width, |row, query| {
        let (t, h) = (row / heads, row % heads);
        query[..rank].copy_from_slice(&products[(h * tokens + t) * rank..][..rank]);
        query[rank..].copy_from_slice(&q[row * qk + nope..(row + 1) * qk]);
    });

    // Scores and weighted sums there.
    b.latents.resize(tokens * heads * rank, 0.0);
    let mut rest = &b.queries[..];
    let mut of_step = Vec::with_capacity(runs.len());
    for run in runs {
        let (queries, later) = rest.split_at(run.tokens * heads * width);
        rest = later;
        of_step.push(Attend {
            kv: run.kv,
            layer,
            position: run.position,
            queries,
            kv_heads: 1,
            group: heads,
            scale: a.scale.unwrap_or_else(|| 1.0 / (qk as f32).sqrt()),
            softcap: None,
            window: None,
            chunk: None,
            sinks: None,
        });
    }
    let latents = ArrayViewMut2::from_shape((tokens, heads * rank), &mut b.latents).expect("sized above");
    flash::attention(threads, &of_step, latents);

    // To the values' width.
    let latents = &b.latents;
    prepare_rows(threads, weights.v_b.format, tokens * heads, rank, &mut b.prepared, |row, kernels, to| {
        kernels.quantize_activation_row(activation_format(weights.v_b.format), &latents[row * rank..(row + 1) * rank], to);
    });
    multiply_heads(threads, weights.v_b, v_head_dim, &b.prepared, &b.rows, &mut b.products);
    let products = &b.products;
    for_rows(threads, out, heads * v_head_dim, |t, row| {
        for (h, to) in row.chunks_exact_mut(v_head_dim).enumerate() {
            to.copy_from_slice(&products[(h * tokens + t) * v_head_dim..][..v_head_dim]);
        }
    });
}

/// Elements cached per position.
pub const fn latent_width(a: &Mla) -> usize {
    (a.kv_lora_rank + a.qk_rope_head_dim) as usize
}

/// Every head's rows times its own `rows_per_head` rows of `weight`.
fn multiply_heads(
    threads: &Threads,
    weight: Matrix<'_>, // [num_heads * rows_per_head, cols]
    rows_per_head: usize,
    input: &ActivationBuf, // [tokens * num_heads, cols]
    rows: &[u32],          // [num_heads, tokens]
    out: &mut Vec<f32>,    // [num_heads, tokens, rows_per_head]
) {
    let heads = weight.rows / rows_per_head;
    let tokens = rows.len() / heads;
    out.resize(rows.len() * rows_per_head, 0.0);
    let of_head = |(h, (tokens, out))| Product {
        weight: weight.rows(h * rows_per_head, (h + 1) * rows_per_head),
        bias: None,
        input,
        tokens,
        out,
    };
    let products = rows.chunks_exact(tokens).zip(out.chunks_exact_mut(tokens * rows_per_head)).enumerate().map(of_head);
    run_products(threads, products.collect());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::reference;
    use ndarray::{Array1, Array2, s};
    use tierwise_cost::model::{Attention, Geometry, ModelSpec};
    use tierwise_cost::quant::QuantFormat;
    use tierwise_cost::recipe::Recipe;

    const HEADS: usize = 6;
    const RANK: usize = 20;
    const NOPE: usize = 12;
    const ROTARY: usize = 8;
    const VALUE: usize = 10;

    fn spec() -> ModelSpec {
        let yarn =
            "{ kind = \"yarn\", factor = 4.0, original_context = 32, beta_fast = 32.0, beta_slow = 1.0, attention_factor = 1.1 }";
        let rope = format!("{{ theta = 1e4, rotary_dim = {ROTARY}, pairing = \"interleaved\", scaling = {yarn} }}");
        let sizes = format!(
            "num_heads = {HEADS}, kv_lora_rank = {RANK}, qk_nope_head_dim = {NOPE}, qk_rope_head_dim = {ROTARY}, v_head_dim = {VALUE}"
        );
        let text = format!(
            r#"
            name = "latent"
            architecture = "deepseek2"
            hidden_size = 32
            vocab_size = 8
            context_length = 512
            source = "test"
            [[block]]
            repeat = 1
            attention = {{ kind = "mla", {sizes}, rope = {rope}, scale = 0.3 }}
            ffn = {{ kind = "dense", inner_size = 32 }}
            "#
        );
        let geometry = Geometry::from_toml(&text).expect("a geometry");
        ModelSpec::with_recipe(geometry, &Recipe::by_name("F32").expect("a recipe")).expect("a model")
    }

    /// Deterministic values between -1 and 1.
    fn values(rows: usize, cols: usize, seed: u32) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            let x = (i as u32).wrapping_mul(2_654_435_761) ^ (j as u32).wrapping_mul(40_503) ^ seed.wrapping_mul(97);
            (x.wrapping_mul(2_246_822_519) >> 16) as f32 / 32768.0 - 1.0
        })
    }

    fn matrix(x: &Array2<f32>) -> Matrix<'_> {
        let bytes = bytemuck::cast_slice(x.as_slice().expect("row-major"));
        Matrix { format: QuantFormat::F32, rows: x.nrows(), cols: x.ncols(), bytes }
    }

    #[test]
    fn latent_space_and_chunks_give_what_expanded_keys_and_values_give() {
        let spec = spec();
        let Attention::Mla(a) = &spec.layers[0].attention else { panic!("not MLA") };
        let tokens = 150;
        let (q, latent) = (values(tokens, HEADS * (NOPE + ROTARY), 1), values(tokens, RANK + ROTARY, 2));
        let (k_b, v_b) = (values(HEADS * RANK, NOPE, 3), values(HEADS * VALUE, RANK, 4));
        let norm = values(1, RANK, 5).into_raw_vec_and_offset().0;
        let wide = |x: &Array2<f32>| x.mapv(f64::from);
        let wide_norm = Array1::from_iter(norm.iter().map(|x| f64::from(*x)));
        let (k_b, v_b) = (matrix(&k_b), matrix(&v_b));
        let expected = reference::latent_attention(a, &wide(&q), &wide(&latent), (&wide_norm, 1e-6), &k_b, &v_b);
        let weights = LatentWeights { kv_norm: &norm, k_b, v_b };
        for thread_count in [1, 2] {
            let threads = Threads::new(thread_count).expect("threads");
            for (format, tolerance) in [(QuantFormat::F32, 2e-5), (QuantFormat::F16, 4e-3)] {
                let mut kv = KvCache::new(&spec, tokens, format).expect("a cache");
                let width = (RANK + ROTARY) as u64;
                assert_eq!(kv.bytes(), tokens as u64 * width * u64::from(format.layout().bytes));
                assert_eq!(kv.bytes(), spec.kv_bytes(tokens as u64, format).0);
                let (mut buffers, mut rope) = (LatentBuffers::default(), RopeTable::new(a.rope.clone(), tokens));
                let mut got = Array2::<f32>::zeros((tokens, HEADS * VALUE));
                for (start, end) in [(0, 1), (1, 70), (70, 71), (71, 150)] {
                    let part = |x: &Array2<f32>| x.slice(s![start..end, ..]).to_slice().expect("row-major").to_vec();
                    let (mut q, mut latent) = (part(&q), part(&latent));
                    rope.fill(&[(start, end - start)]);
                    norm_and_rotate(&threads, a, (&norm, 1e-6), &rope, &mut q, &mut latent);
                    kv.append_latents(threads.kernels(), 0, &latent);
                    let mut rows = got.slice_mut(s![start..end, ..]);
                    let out = rows.as_slice_mut().expect("row-major");
                    let of_step = [OfSequence { kv: &kv, rows: end - start }];
                    threads.pool().install(|| attention(&threads, a, (0, &of_step), &weights, &mut buffers, &q, out));
                    kv.advance(end - start);
                }
                let worst = got.iter().zip(&expected).map(|(x, y)| (f64::from(*x) - y).abs()).fold(0.0, f64::max);
                assert!(worst < tolerance, "{thread_count} threads, {format}: {worst}");
            }
        }
    }
}
