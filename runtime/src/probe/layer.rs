//! Timing what a layer does besides products with weights: attention over the cache, norms, rotations, sums, the router's choice.

use crate::error::Result;
use crate::exec::attention::attention;
use crate::exec::kv_cache::KvCache;
use crate::exec::rope::RopeTable;
use crate::exec::route::Routing;
use crate::exec::threads::{Threads, for_rows};
use ndarray::Array2;
use tierwise_cost::cost::op_work;
use tierwise_cost::model::{Attention, Ffn, Geometry, Gqa, ModelSpec, Moe};
use tierwise_cost::op::{Batch, OpKind, lower};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::recipe::Recipe;

/// Layers that take turns, so that one's keys and values have left the nearest caches when its turn comes again.
const LAYERS: usize = 4;
const HEAD_DIM: u32 = 128;

/// A model of [`LAYERS`] layers of which only the shapes are used.
fn spec(heads: u32, kv_heads: u32) -> Result<ModelSpec> {
    let text = format!(
        r#"
        name = "calibration"
        architecture = "qwen3moe"
        hidden_size = 2048
        vocab_size = 256
        context_length = 65536
        source = "a typical mixture-of-experts layer"
        [[block]]
        repeat = {LAYERS}
        [block.attention]
        kind = "gqa"
        num_heads = {heads}
        num_kv_heads = {kv_heads}
        head_dim = {HEAD_DIM}
        qk_norm = "per_head"
        rope = {{ theta = 1e6, rotary_dim = {HEAD_DIM} }}
        [block.ffn]
        kind = "moe"
        num_experts = 128
        experts_per_token = 8
        inner_size = 768
        router = {{ score = "softmax", normalize_topk = true }}
        "#
    );
    Ok(ModelSpec::with_recipe(Geometry::from_toml(&text)?, &Recipe::by_name("F32")?)?)
}

fn gqa(spec: &ModelSpec) -> &Gqa {
    match &spec.layers[0].attention {
        Attention::Gqa(a) => a,
        Attention::Mla(_) | Attention::DeltaNet(_) | Attention::PlanOnly(_) => unreachable!("the description above says gqa"),
    }
}

fn moe(spec: &ModelSpec) -> &Moe {
    match &spec.layers[0].ffn {
        Ffn::Moe(m) => m,
        Ffn::Dense(_) | Ffn::None => unreachable!("the description above says moe"),
    }
}

/// Numbers between -1 and 1 that differ from each other.
fn values(rows: usize, cols: usize, seed: u32) -> Array2<f32> {
    Array2::from_shape_fn((rows, cols), |(i, j)| {
        let x = (i as u32).wrapping_mul(2_654_435_761) ^ (j as u32).wrapping_mul(40_503) ^ seed.wrapping_mul(97);
        (x.wrapping_mul(2_246_822_519) >> 16) as f32 / 32768.0 - 1.0
    })
}

/// Attention of some tokens after others.
pub(super) struct AttentionWork {
    /// Bytes and operations, counted as the cost model does.
    pub(super) kv_bytes: f64,
    pub(super) flops: f64,
    spec: ModelSpec,
    kv: KvCache,
    q: Array2<f32>,
    out: Array2<f32>,
    layer: usize,
}

impl AttentionWork {
    pub(super) fn new(threads: &Threads, heads: u32, kv_heads: u32, tokens: usize, past: usize) -> Result<Self> {
        let spec = spec(heads, kv_heads)?;
        let positions = past + tokens;
        let mut kv = KvCache::new(&spec, positions, QuantFormat::F16)?;
        let width = (kv_heads * HEAD_DIM) as usize;
        let (k, v) = (values(positions, width, 1), values(positions, width, 2));
        for layer in 0..LAYERS {
            let rows = |x: &Array2<f32>| x.as_slice().expect("a new array is row-major").to_vec();
            kv.append(threads.kernels(), layer, &rows(&k), &rows(&v));
        }
        kv.advance(past);
        let batch = Batch::prefill(tokens as u32, past as u32);
        let ops = lower(&spec, batch)?;
        let op = ops.iter().find(|o| matches!(o.kind, OpKind::Attention { .. })).expect("every layer attends");
        let work = op_work(&spec, op, batch, QuantFormat::F16);
        let q = values(tokens, (heads * HEAD_DIM) as usize, 3);
        let out = Array2::zeros(q.dim());
        let (kv_bytes, flops) = (work.kv_bytes.0 as f64, work.attention_flops);
        Ok(Self { kv_bytes, flops, spec, kv, q, out, layer: 0 })
    }

    pub(super) fn run(&mut self, threads: &Threads) {
        self.layer = (self.layer + 1) % LAYERS;
        attention(threads, gqa(&self.spec), None, self.layer, &self.kv, &self.q.view(), self.out.view_mut());
    }
}

/// The operations of a layer that have no matrix.
pub(super) struct SmallWork {
    /// Elements, counted as the cost model does.
    pub(super) elements: f64,
    spec: ModelSpec,
    kv: KvCache,
    rope: RopeTable,
    hidden: Array2<f32>,
    normed: Array2<f32>,
    q: Array2<f32>,
    k: Array2<f32>,
    logits: Array2<f32>,
    scores: Vec<f32>,
    norm: Vec<f32>,
    routing: Routing,
}

impl SmallWork {
    pub(super) fn new(tokens: usize) -> Result<Self> {
        let spec = spec(32, 4)?;
        let (a, hidden) = (gqa(&spec), spec.hidden_size as usize);
        let mut rope = RopeTable::new(a.rope.clone().expect("the probed layer is rotated"), tokens);
        rope.fill(&[(0, tokens)]);
        let batch = Batch { tokens: tokens as u32, past: 0, sequences: 1, logits: tokens as u32 };
        let of_layer = |o: &&tierwise_cost::op::Op| o.layer == Some(0);
        let elements =
            lower(&spec, batch)?.iter().filter(of_layer).map(|o| op_work(&spec, o, batch, QuantFormat::F16).activations).sum();
        Ok(Self {
            elements,
            kv: KvCache::new(&spec, tokens, QuantFormat::F16)?,
            rope,
            hidden: values(tokens, hidden, 1),
            normed: Array2::zeros((tokens, hidden)),
            q: values(tokens, (a.num_heads * a.head_dim) as usize, 2),
            k: values(tokens, (a.num_kv_heads * a.head_dim) as usize, 3),
            logits: values(tokens, moe(&spec).num_experts as usize, 4),
            scores: Vec::new(),
            norm: vec![1.0; hidden],
            routing: Routing::default(),
            spec,
        })
    }

    pub(super) fn run(&mut self, threads: &Threads) {
        const MESSAGE: &str = "a new array is row-major";
        let kernels = threads.kernels();
        let head_dim = HEAD_DIM as usize;
        for _ in 0..2 {
            let (width, hidden) = (self.hidden.ncols(), self.hidden.as_slice().expect(MESSAGE));
            for_rows(threads, self.normed.as_slice_mut().expect(MESSAGE), width, |i, row| {
                kernels.rms_norm(&hidden[i * width..(i + 1) * width], &self.norm, 1e-6, row);
            });
            let normed = self.normed.as_slice().expect(MESSAGE);
            for_rows(threads, self.hidden.as_slice_mut().expect(MESSAGE), width, |i, row| {
                // Small, so that the sum does not grow from run to run; as many operations as any other.
                row.iter_mut().zip(&normed[i * width..]).for_each(|(x, d)| *x = 0.5 * (*x + d));
            });
        }
        for x in [&mut self.q, &mut self.k] {
            let width = x.ncols();
            let (norm, rope) = (&self.norm[..head_dim], &self.rope);
            for_rows(threads, x.as_slice_mut().expect(MESSAGE), width, |_, row| {
                for part in row.chunks_exact_mut(head_dim) {
                    let scale = 1.0 / (kernels.dot_f32(part, part) / head_dim as f32 + 1e-6).sqrt();
                    part.iter_mut().zip(norm).for_each(|(x, w)| *x *= scale * w);
                }
            });
            for_rows(threads, x.as_slice_mut().expect(MESSAGE), width, |i, row| rope.apply(i, row, head_dim));
        }
        let k = self.k.as_slice().expect(MESSAGE);
        self.kv.append(kernels, 0, k, k);
        // Choosing overwrites them.
        self.scores.clear();
        self.scores.extend(self.logits.iter());
        self.routing.choose(kernels, moe(&self.spec).into(), &mut self.scores);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_counted_by_hand() {
        let threads = Threads::new(2).expect("threads");
        let mut a = AttentionWork::new(&threads, 4, 2, 3, 5).expect("made");
        // 8 positions x 2 heads x keys and values x 128 x 2 bytes; 3 tokens see 7 positions on the mean.
        assert_eq!(a.kv_bytes, 8.0 * 2.0 * 2.0 * 128.0 * 2.0);
        assert_eq!(a.flops, 3.0 * 7.0 * 4.0 * 4.0 * 128.0);
        threads.pool().install(|| a.run(&threads));
        assert!(a.out.iter().all(|x| x.is_finite()) && a.out.iter().any(|x| *x != 0.0));
        let mut s = SmallWork::new(2).expect("made");
        // Two norms with sums, two passes over queries and keys, one over values, the router's outputs.
        assert_eq!(s.elements, 2.0 * (4.0 * 2048.0 + 2.0 * (4096.0 + 512.0) + 512.0 + 128.0));
        for _ in 0..50 {
            threads.pool().install(|| s.run(&threads));
        }
        assert!(s.hidden.iter().chain(&s.q).all(|x| x.is_finite() && x.abs() < 100.0));
        assert_eq!(s.routing.num_tokens(), 2);
    }
}
