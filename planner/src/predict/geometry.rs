//! What the predictor needs to know of a model: sizes in weights, averaged over its layers.
//!
//! Engines that move whole layers see a model as equal layers, so one mean per kind of tensor is enough (tools/predict/README.md §3).
//! Two sources give it: the table of the models that published runs were made with, whose figures belong to the fitted parameters, and
//! any [`Geometry`] for models beyond it. A test holds the two against each other.

use serde::Deserialize;
use std::sync::LazyLock;
use tierwise_cost::model::{Attention, Ffn, Geometry, TensorRole, tensor_shapes};

/// What kind of mixing part the layers have, as far as its overhead goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mixer {
    /// Grouped-query attention.
    Grouped,
    /// Latent attention: several more kernels per layer.
    Latent,
    /// Most layers have linear attention with a recurrent state.
    Linear,
}

/// A model's sizes. Counts of weights are floats: they are only ever multiplied by times per weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Name for people.
    pub name: String,
    /// Width of the residual stream.
    pub hidden: f64,
    /// Rows of the embedding table.
    pub vocab: f64,
    /// Layers.
    pub layers: u32,
    /// Layers with routed experts.
    pub moe_layers: u32,
    /// Layers without routed experts before the first one with.
    pub leading_dense_layers: u32,
    /// Routed experts per layer.
    pub experts: f64,
    /// Experts per token.
    pub top_k: f64,
    /// Weights of one expert.
    pub expert_weights: f64,
    /// Weights of a layer that are not routed experts, mean over all layers.
    pub dense_weights_per_layer: f64,
    /// Weights of the output projection.
    pub head_weights: f64,
    /// Weights of an embedding table of its own; 0 when it is the output projection.
    pub embedding_weights: f64,
    /// Kind of mixing part.
    pub mixer: Mixer,
    /// Layers that see all positions.
    pub full_layers: f64,
    /// Layers that see only a window.
    pub window_layers: f64,
    /// That window, in positions.
    pub window: f64,
    /// Cached elements per position and layer.
    pub kv_elements: f64,
    /// Operations of decoding one token per cached position and layer.
    pub attention_flops: f64,
    /// Bytes of recurrent state read and written per token, all layers.
    pub state_bytes: f64,
}

impl Shape {
    /// The model of a published run, by its name there.
    pub fn published(model: &str) -> Option<&'static Self> {
        PUBLISHED.iter().find(|(patterns, _)| patterns.iter().any(|p| model.contains(p.as_str()))).map(|(_, s)| s)
    }

    /// All models of the table.
    pub fn all_published() -> impl Iterator<Item = &'static Self> {
        PUBLISHED.iter().map(|(_, s)| s)
    }

    /// Any model with routed experts; `None` for one without.
    pub fn of_geometry(g: &Geometry) -> Option<Self> {
        let layers = u32::try_from(g.layers.len()).ok()?;
        let moe: Vec<_> = g.layers.iter().filter_map(|l| if let Ffn::Moe(m) = &l.ffn { Some(m) } else { None }).collect();
        let moe_layers = moe.len() as f64;
        let mean =
            |of: &dyn Fn(&tierwise_cost::model::Moe) -> u32| moe.iter().map(|m| f64::from(of(m))).sum::<f64>() / moe_layers;
        let (experts, top_k) = (mean(&|m| m.num_experts), mean(&|m| m.experts_per_token));
        let tensors = tensor_shapes(g);
        let weights = |which: &dyn Fn(TensorRole) -> bool| -> f64 {
            tensors
                .iter()
                .filter(|t| t.shape.len() > 1 && which(t.role))
                .map(|t| t.shape.iter().map(|d| *d as f64).product::<f64>())
                .sum()
        };
        let routed = weights(&TensorRole::is_routed_expert);
        let outside = |r: TensorRole| matches!(r, TensorRole::TokenEmbedding | TensorRole::Output);
        let dense = weights(&|r| !r.is_routed_expert() && !outside(r));
        let embedding = f64::from(g.vocab_size) * f64::from(g.hidden_size);
        let caches: Vec<Cache> = g.layers.iter().map(|l| Cache::of(&l.attention)).collect();
        let seen: Vec<&Cache> = caches.iter().filter(|c| c.kv_elements > 0.0).collect();
        let over_seen = |of: &dyn Fn(&Cache) -> f64| seen.iter().map(|c| of(c)).sum::<f64>() / (seen.len().max(1) as f64);
        let windowed: Vec<f64> = seen.iter().filter_map(|c| c.window).collect();
        let state_bytes: f64 = caches.iter().map(|c| c.state_bytes).sum();
        let latent = |l: &tierwise_cost::model::LayerSpec| match &l.attention {
            Attention::Mla(_) => true,
            Attention::PlanOnly(m) => m.name.contains("latent"),
            Attention::Gqa(_) | Attention::DeltaNet(_) => false,
        };
        (moe_layers > 0.0 && routed > 0.0).then(|| Self {
            name: g.name.clone(),
            hidden: f64::from(g.hidden_size),
            vocab: f64::from(g.vocab_size),
            layers,
            moe_layers: moe.len() as u32,
            leading_dense_layers: g.layers.iter().take_while(|l| !matches!(l.ffn, Ffn::Moe(_))).count() as u32,
            experts,
            top_k,
            expert_weights: routed / (moe_layers * experts),
            dense_weights_per_layer: dense / f64::from(layers),
            head_weights: embedding,
            embedding_weights: if g.tie_word_embeddings { 0.0 } else { embedding },
            mixer: if state_bytes > 0.0 {
                Mixer::Linear
            } else if g.layers.iter().any(latent) {
                Mixer::Latent
            } else {
                Mixer::Grouped
            },
            full_layers: (seen.len() - windowed.len()) as f64,
            window_layers: windowed.len() as f64,
            window: windowed.iter().sum::<f64>() / (windowed.len().max(1) as f64),
            kv_elements: over_seen(&|c| c.kv_elements),
            attention_flops: over_seen(&|c| c.flops),
            state_bytes,
        })
    }

    /// Weights of all routed experts.
    pub fn routed_weights(&self) -> f64 {
        f64::from(self.moe_layers) * self.experts * self.expert_weights
    }

    /// Weights of everything else.
    pub fn other_weights(&self) -> f64 {
        f64::from(self.layers) * self.dense_weights_per_layer + self.head_weights + self.embedding_weights
    }

    /// Weights outside the routed experts that are read for every token.
    pub fn dense_weights_per_token(&self) -> f64 {
        self.other_weights() - self.embedding_weights
    }

    /// Cached positions read per token, summed over layers.
    pub fn positions_read(&self, depth: f64) -> f64 {
        self.full_layers * depth + self.window_layers * depth.min(self.window)
    }
}

/// What one layer's mixing part caches.
struct Cache {
    kv_elements: f64,
    window: Option<f64>,
    flops: f64,
    state_bytes: f64,
}

impl Cache {
    fn of(a: &Attention) -> Self {
        match a {
            Attention::Gqa(a) => Self {
                kv_elements: 2.0 * f64::from(a.num_kv_heads) * f64::from(a.head_dim),
                window: a.reach().map(f64::from),
                flops: 4.0 * f64::from(a.num_heads) * f64::from(a.head_dim),
                state_bytes: 0.0,
            },
            Attention::Mla(a) => Self {
                kv_elements: f64::from(a.kv_lora_rank) + f64::from(a.qk_rope_head_dim),
                window: None,
                flops: 2.0 * f64::from(a.num_heads) * (2.0 * f64::from(a.kv_lora_rank) + f64::from(a.qk_rope_head_dim)),
                state_bytes: 0.0,
            },
            Attention::DeltaNet(a) => {
                Self { kv_elements: 0.0, window: None, flops: 0.0, state_bytes: a.state_elements() as f64 * 4.0 * 2.0 }
            }
            Attention::PlanOnly(m) => Self {
                kv_elements: m.kv_elements_per_token as f64,
                window: m.sliding_window.map(f64::from),
                // The number of query heads is not described; eight per key/value head is the usual group.
                flops: 2.0 * 8.0 * m.kv_elements_per_token as f64,
                // float32, read and written.
                state_bytes: m.state_elements as f64 * 4.0 * 2.0,
            },
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TableFile {
    model: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    r#match: Vec<String>,
    hidden: u32,
    layers: u32,
    moe_layers: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    experts: u32,
    top_k: u32,
    expert_inner: u32,
    shared_inner: u32,
    dense_inner: u32,
    vocab: u32,
    tied: bool,
    mixer: EntryMixer,
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum EntryMixer {
    Gqa { window_layers: u32, window: u32 },
    Mla { q_lora_rank: u32, kv_lora_rank: u32, nope: u32, rope: u32, value: u32 },
    Linear { full_every: u32, key_heads: u32, key_dim: u32, value_heads: u32, value_dim: u32 },
}

static PUBLISHED: LazyLock<Vec<(Vec<String>, Shape)>> = LazyLock::new(|| {
    let file: TableFile =
        toml::from_str(include_str!("data/models.toml")).expect("the table in the crate is valid; a test reads it");
    file.model.into_iter().map(|e| (e.r#match.clone(), e.shape())).collect()
});

impl Entry {
    fn shape(self) -> Shape {
        let f = f64::from;
        let (h, l, nh, nkv, d) = (f(self.hidden), f(self.layers), f(self.heads), f(self.kv_heads), f(self.head_dim));
        let mut shape = Shape {
            hidden: h,
            vocab: f(self.vocab),
            layers: self.layers,
            moe_layers: self.moe_layers,
            // Where dense and expert layers alternate, the first layers are not special.
            leading_dense_layers: if 2 * self.moe_layers == self.layers { 1 } else { self.layers - self.moe_layers },
            experts: f(self.experts),
            top_k: f(self.top_k),
            expert_weights: 3.0 * h * f(self.expert_inner),
            dense_weights_per_layer: 0.0,
            head_weights: h * f(self.vocab),
            embedding_weights: if self.tied { 0.0 } else { h * f(self.vocab) },
            mixer: Mixer::Grouped,
            full_layers: l,
            window_layers: 0.0,
            window: 0.0,
            kv_elements: 2.0 * nkv * d,
            attention_flops: 4.0 * nh * d,
            state_bytes: 0.0,
            name: self.name,
        };
        let attention = match self.mixer {
            EntryMixer::Gqa { window_layers, window } => {
                shape.full_layers = l - f(window_layers);
                (shape.window_layers, shape.window) = (f(window_layers), f(window));
                l * (2.0 * h * nh * d + 2.0 * h * nkv * d)
            }
            EntryMixer::Mla { q_lora_rank, kv_lora_rank, nope, rope, value } => {
                let (q, kv, nope, rope, value) = (f(q_lora_rank), f(kv_lora_rank), f(nope), f(rope), f(value));
                shape.mixer = Mixer::Latent;
                shape.kv_elements = kv + rope;
                shape.attention_flops = 2.0 * nh * (2.0 * kv + rope);
                let width = nope + rope;
                let query = if q > 0.0 { h * q + q * nh * width } else { h * nh * width };
                l * (query + h * (kv + rope) + kv * nh * (nope + value) + nh * value * h)
            }
            EntryMixer::Linear { full_every, key_heads, key_dim, value_heads, value_dim } => {
                let full = f(self.layers / full_every);
                let (k, v) = (f(key_heads) * f(key_dim), f(value_heads) * f(value_dim));
                shape.mixer = Mixer::Linear;
                shape.full_layers = full;
                shape.state_bytes = (l - full) * v * f(key_dim) * 4.0 * 2.0;
                // Full layers gate their output: twice the queries.
                let gated = 2.0 * h * nh * d + 2.0 * h * nkv * d + nh * d * h;
                let linear = h * (2.0 * k + 2.0 * v) + 2.0 * h * f(value_heads) + v * h;
                full * gated + (l - full) * linear
            }
        };
        let per_moe_layer = 3.0 * h * f(self.shared_inner) + h * shape.experts;
        let dense_layers = f(self.layers - self.moe_layers);
        let all = attention + f(self.moe_layers) * per_moe_layer + dense_layers * 3.0 * h * f(self.dense_inner);
        shape.dense_weights_per_layer = all / l;
        shape
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_reference() {
        // tools/predict/README.md §3.
        let q = Shape::published("Qwen3-30B-A3B-Instruct").unwrap();
        assert_eq!((q.expert_weights, q.dense_weights_per_layer), (4_718_592.0, 19_136_512.0));
        assert_eq!((q.head_weights, q.other_weights()), (311_164_928.0, 1_540_882_432.0));
        let d = Shape::published("DeepSeek-R1-0528").unwrap();
        assert!((d.dense_weights_per_layer - 250_217_522.36).abs() < 0.01, "{}", d.dense_weights_per_layer);
        assert_eq!((d.expert_weights, d.other_weights()), (44_040_192.0, 17_116_626_944.0));
        assert_eq!(Shape::published("Llama-2-7B"), None);
    }

    #[test]
    fn the_table_agrees_with_the_descriptions_of_the_models() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/models");
        let mut described: Vec<Shape> = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            described.extend(Shape::of_geometry(&Geometry::from_toml(&text).unwrap()));
        }
        for t in Shape::all_published() {
            let own = t.name.rsplit('/').next().unwrap();
            let d =
                described.iter().find(|d| own.eq_ignore_ascii_case(&d.name)).unwrap_or_else(|| panic!("{own} is not described"));
            let near = |what: &str, a: f64, b: f64, tolerance: f64| {
                assert!((a - b).abs() <= tolerance * b, "{own}: {what} {a} in the table, {b} described");
            };
            near("routed weights", t.routed_weights(), d.routed_weights(), 1e-9);
            near("embedding", t.embedding_weights, d.embedding_weights, 0.0);
            assert_eq!((t.layers, t.moe_layers, t.mixer), (d.layers, d.moe_layers, d.mixer), "{own}");
            assert_eq!(t.leading_dense_layers, d.leading_dense_layers, "{own}");
            // What the table leaves out: Gemma's wider full layers, GLM-5.2's sparse indexer, gpt-oss's biases of every expert (1.9 % and
            // 1 % of what is no expert); elsewhere biases and convolutions.
            let (weights, cache) = match own {
                "gemma-4-26B-A4B" => (0.04, 0.10),
                "GLM-5.2" => (0.012, 0.06),
                "gpt-oss-120b" | "gpt-oss-20b" => (0.02, 1e-9),
                _ => (1e-3, 1e-9),
            };
            near("weights outside the experts", t.other_weights(), d.other_weights(), weights);
            let kv = |s: &Shape| s.kv_elements * (s.full_layers + s.window_layers);
            near("cache", kv(t), kv(d), cache);
        }
    }
}
