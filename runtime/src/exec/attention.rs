//! Causal grouped-query attention over the cache: [`super::flash`] with the variants that models have.

use super::flash::{self, Attend};
use super::kv_cache::KvCache;
use super::threads::Threads;
use ndarray::{ArrayView2, ArrayViewMut2};
use tierwise_cost::model::Gqa;

/// Rows of a step that belong to one sequence.
#[derive(Debug, Clone, Copy)]
pub struct OfSequence<'a> {
    /// The sequence's cache.
    pub kv: &'a KvCache,
    /// Number of rows.
    pub rows: usize,
}

/// `out[t] = softmax(scale * q[t] K^T) V` over the positions that token `t` (at position `kv.len() + t`) may see. A head's sink is one
/// more logit of its softmax, without a value.
///
/// Keys and values of the tokens themselves must be in the cache already, not yet counted in `kv.len()`.
pub fn attention(
    threads: &Threads,
    a: &Gqa,
    sinks: Option<&[f32]>, // [num_heads]
    layer: usize,
    kv: &KvCache,
    q: &ArrayView2<'_, f32>,     // [tokens, num_heads * head_dim]
    out: ArrayViewMut2<'_, f32>, // [tokens, num_heads * head_dim]
) {
    attention_of(threads, a, sinks, layer, &[OfSequence { kv, rows: q.nrows() }], q, out);
}

/// [`attention`] of the rows of several sequences, each over its own cache; the same bits as one after the other.
pub fn attention_of(
    threads: &Threads,
    a: &Gqa,
    sinks: Option<&[f32]>, // [num_heads]
    layer: usize,
    sequences: &[OfSequence<'_>],
    q: &ArrayView2<'_, f32>,     // [tokens, num_heads * head_dim]
    out: ArrayViewMut2<'_, f32>, // [tokens, num_heads * head_dim]
) {
    let width = q.ncols();
    let mut rest = q.to_slice().expect("activations are row-major");
    let mut of_step = Vec::with_capacity(sequences.len());
    for s in sequences {
        let (queries, later) = rest.split_at(s.rows * width);
        rest = later;
        of_step.push(Attend {
            kv: s.kv,
            layer,
            position: s.kv.len(),
            queries,
            kv_heads: a.num_kv_heads as usize,
            group: (a.num_heads / a.num_kv_heads) as usize,
            scale: a.scale.unwrap_or_else(|| 1.0 / (a.head_dim as f32).sqrt()),
            softcap: a.softcap,
            window: a.sliding_window.map(|w| w as usize),
            chunk: a.chunk.map(|c| c as usize),
            sinks,
        });
    }
    flash::attention(threads, &of_step, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::reference;
    use ndarray::{Array2, s};
    use tierwise_cost::model::{Attention, Geometry, ModelSpec};
    use tierwise_cost::quant::QuantFormat;
    use tierwise_cost::recipe::Recipe;

    fn spec(num_heads: u32, num_kv_heads: u32, window: Option<u32>) -> ModelSpec {
        let window = window.map_or(String::new(), |w| format!(", sliding_window = {w}"));
        let rope = "{ theta = 1e4, rotary_dim = 12 }";
        let text = format!(
            r#"
            name = "attention"
            architecture = "qwen3moe"
            hidden_size = 32
            vocab_size = 8
            context_length = 512
            source = "test"
            [[block]]
            repeat = 1
            attention = {{ kind = "gqa", num_heads = {num_heads}, num_kv_heads = {num_kv_heads}, head_dim = 12, rope = {rope}{window} }}
            ffn = {{ kind = "dense", inner_size = 32 }}
            "#
        );
        let geometry = Geometry::from_toml(&text).expect("a geometry");
        ModelSpec::with_recipe(geometry, &Recipe::by_name("F32").expect("a recipe")).expect("a model")
    }

    /// Deterministic values between -2 and 2.
    fn values(rows: usize, cols: usize, seed: u32) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            let x = (i as u32).wrapping_mul(2_654_435_761) ^ (j as u32).wrapping_mul(40_503) ^ seed.wrapping_mul(97);
            (x.wrapping_mul(2_246_822_519) >> 16) as f32 / 16384.0 - 2.0
        })
    }

    /// Every variant against the plain formula, over caches filled in uneven parts.
    #[test]
    fn blocks_windows_groups_and_variants_agree_with_the_plain_formula() {
        let threads = Threads::new(2).expect("threads");
        for (heads, kv_heads) in [(4, 4), (6, 2), (8, 1)] {
            let logits: Vec<f32> = (0..heads).map(|h| h as f32 - 2.0).collect();
            let plain = |window| (window, None, None, None, None);
            let variants = [
                plain(None),
                plain(Some(1)),
                plain(Some(5)),
                plain(Some(64)),
                plain(Some(100)),
                (Some(7), None, Some(&logits[..]), None, None),
                (None, Some(16), None, Some(0.5), None),
                (None, Some(70), Some(&logits[..]), None, Some(3.0)),
            ];
            for (window, chunk, sinks, scale, softcap) in variants {
                let spec = spec(heads, kv_heads, window);
                let Attention::Gqa(a) = &spec.layers[0].attention else { panic!("not GQA") };
                let a = &Gqa { chunk, scale, softcap, ..a.clone() };
                let tokens = 150;
                let q = values(tokens, heads as usize * 12, 1);
                let (k, v) = (values(tokens, kv_heads as usize * 12, 2), values(tokens, kv_heads as usize * 12, 3));
                let wide = |x: &Array2<f32>| x.mapv(f64::from);
                let wide_sinks = sinks.map(|s| s.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
                let expected = reference::attention(a, wide_sinks.as_deref(), &wide(&q), &wide(&k), &wide(&v));
                for (format, tolerance) in [(QuantFormat::F32, 1e-5), (QuantFormat::F16, 4e-3)] {
                    let mut kv = KvCache::new(&spec, tokens, format).expect("a cache");
                    let mut got = Array2::zeros(q.dim());
                    for (start, end) in [(0, 1), (1, 70), (70, 71), (71, 150)] {
                        let rows = s![start..end, ..];
                        let slice = |x: &Array2<f32>| x.slice(rows).to_slice().expect("row-major").to_vec();
                        kv.append(threads.kernels(), 0, &slice(&k), &slice(&v));
                        attention(&threads, a, sinks, 0, &kv, &q.slice(rows), got.slice_mut(rows));
                        kv.advance(end - start);
                    }
                    let worst = got.iter().zip(&expected).map(|(x, y)| (f64::from(*x) - y).abs()).fold(0.0, f64::max);
                    assert!(worst < tolerance, "{heads} heads over {kv_heads}, {a:?}, {format}: {worst}");
                }
            }
        }
    }
}
