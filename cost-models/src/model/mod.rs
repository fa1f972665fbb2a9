//! A model's geometry: what is in each layer, and the tensor table that follows from it.
//!
//! Layers are a list; nothing assumes that they are alike. Sizes never come from formulas elsewhere: [`ModelSpec::tensors`]
//! holds every tensor with shape and format, and all byte counts are sums over it.

mod bytes;
mod file;
mod tensors;

pub use bytes::{LayerBytes, RoleBytes};
pub use tensors::{RoleGroup, TensorId, TensorRole, TensorShape, TensorSpec, tensor_shapes};

use crate::error::CostError;
#[cfg(test)]
use crate::quant::QuantFormat;
use crate::recipe::Recipe;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The geometry of a model, without formats: enough to know every tensor's name and shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Geometry {
    /// Name for people, e.g. `Qwen3-30B-A3B`.
    pub name: String,
    /// Architecture name as in GGUF files, e.g. `qwen3moe`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Rows of the embedding table.
    pub vocab_size: u32,
    /// Longest context the model was made for, in tokens.
    pub context_length: u32,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// The output projection is the embedding table.
    pub tie_word_embeddings: bool,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
}

/// One layer: an attention (or other mixing) part and a feed-forward part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LayerSpec {
    /// How tokens see each other.
    pub attention: Attention,
    /// What happens to each token alone.
    pub ffn: Ffn,
}

/// How tokens see each other in a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Attention {
    /// Grouped-query attention (multi-head when `num_kv_heads == num_heads`).
    Gqa(Gqa),
    /// Multi-head latent attention (DeepSeek-V2 and later).
    Mla(Mla),
    /// A kind that can be planned for but not run: linear attention, state-space layers, sparse variants.
    PlanOnly(PlanOnlyMixer),
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gqa {
    /// Query heads.
    pub num_heads: u32,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: u32,
    /// Width of one head.
    pub head_dim: u32,
    /// Biases on the q, k and v projections.
    #[serde(default, skip_serializing_if = "is_false")]
    pub qkv_bias: bool,
    /// RMS norm of queries and keys before the rotation.
    #[serde(default, skip_serializing_if = "QkNorm::is_none")]
    pub qk_norm: QkNorm,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Only the last so many positions are seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<u32>,
}

/// What the norm of queries and keys spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// No norm.
    #[default]
    None,
    /// Each head alone; weight `[head_dim]` (Qwen3).
    PerHead,
    /// All heads together; weight `[num_heads * head_dim]` (OLMoE).
    FullWidth,
}

impl QkNorm {
    fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// Rotated dimensions at the start of each head.
    pub rotary_dim: u32,
    /// Which dimensions form a pair. A property of how the weights are stored, not of the maths.
    #[serde(default)]
    pub pairing: RopePairing,
}

/// Which two dimensions of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RopePairing {
    /// `i` with `i + rotary_dim / 2` (Hugging Face weights, most GGUF architectures; "neox").
    #[default]
    Halves,
    /// `2i` with `2i + 1` (GGUF architecture `llama`, whose q and k rows are permuted for it; "norm").
    Interleaved,
}

/// Multi-head latent attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mla {
    /// Query heads.
    pub num_heads: u32,
    /// Rank of the query compression; absent when queries are projected directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub q_lora_rank: Option<u32>,
    /// Rank of the key/value compression: what is cached, with `qk_rope_head_dim` more.
    pub kv_lora_rank: u32,
    /// Unrotated width of a query or key head.
    pub qk_nope_head_dim: u32,
    /// Rotated width, shared by all heads of a key.
    pub qk_rope_head_dim: u32,
    /// Width of a value head.
    pub v_head_dim: u32,
    /// Rotary position embedding.
    pub rope: Rope,
}

/// A mixing part known only by its sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanOnlyMixer {
    /// What it is, e.g. `gated delta net`.
    pub name: String,
    /// Elements of its weight matrices; 0 for a layer that has only its feed-forward part.
    pub weight_elements: u64,
    /// Elements cached per token (keys and values), 0 for a recurrent part.
    pub kv_elements_per_token: u64,
    /// Elements of recurrent state per sequence.
    #[serde(default)]
    pub state_elements: u64,
    /// Only the last so many positions are cached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<u32>,
}

/// The feed-forward part of a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Ffn {
    /// One network for all tokens.
    Dense(DenseFfn),
    /// Routed experts.
    Moe(Moe),
    /// The layer has no feed-forward part (hybrid state-space models).
    None,
}

/// A dense feed-forward network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DenseFfn {
    /// Inner width.
    pub inner_size: u32,
    /// Gate matrix present: SwiGLU; else two matrices.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub gated: bool,
}

/// Routed experts, with shared ones beside them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Moe {
    /// Routed experts.
    pub num_experts: u32,
    /// Experts each token goes to.
    pub experts_per_token: u32,
    /// Inner width of one expert.
    pub inner_size: u32,
    /// Gate matrix present: SwiGLU; else two matrices.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub gated: bool,
    /// Experts work on a projection of this width instead of the hidden state (latent MoE).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent_size: Option<u32>,
    /// How experts are chosen and weighted.
    pub router: Router,
    /// Experts that every token goes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedExperts>,
    /// Inner width of a dense network that runs in parallel with the experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parallel_dense_inner_size: Option<u32>,
}

/// Experts that every token goes to, fused into one network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SharedExperts {
    /// How many the model's description counts.
    pub count: u32,
    /// Inner width of all of them together.
    pub inner_size: u32,
    /// The output is scaled by a sigmoid of a learnt projection (Qwen1.5/2-MoE).
    #[serde(default, skip_serializing_if = "is_false")]
    pub sigmoid_gate: bool,
}

/// How experts are chosen and weighted (algorithms: softmax or sigmoid scores, top-k, optional groups).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Router {
    /// Router logits to scores.
    pub score: RouterScore,
    /// The chosen experts' weights are divided by their sum.
    pub normalize_topk: bool,
    /// Factor on the weights at the end.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub scale: f32,
    /// A learnt bias is added to the scores for the choice only (DeepSeek-V3).
    #[serde(default, skip_serializing_if = "is_false")]
    pub selection_bias: bool,
    /// Group-limited choice: `(groups, groups kept)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<(u32, u32)>,
}

/// Router logits to scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RouterScore {
    /// Softmax over all experts, before the choice. With `normalize_topk` this equals a softmax over the chosen ones.
    Softmax,
    /// Sigmoid of each logit.
    Sigmoid,
    /// Square root of the softplus of each logit (DeepSeek-V4).
    SqrtSoftplus,
}

fn yes() -> bool {
    true
}
fn one() -> f32 {
    1.0
}
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(b: &bool) -> bool {
    !b
}
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_true(b: &bool) -> bool {
    *b
}
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_one(x: &f32) -> bool {
    *x == 1.0
}

/// Geometry with a format for every tensor: what a file holds, or would hold.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The geometry.
    pub geometry: Geometry,
    /// Every tensor, in file order: embedding, layers first to last, output.
    pub tensors: Vec<TensorSpec>,
    /// Format name for people: the recipe, or what the file says.
    pub format_name: String,
}

impl std::ops::Deref for ModelSpec {
    type Target = Geometry;
    fn deref(&self) -> &Geometry {
        &self.geometry
    }
}

impl ModelSpec {
    /// The model as it would be stored under `recipe`.
    ///
    /// # Errors
    /// When a field of the geometry is impossible (zero sizes, heads that do not divide, top-k above the expert count).
    pub fn with_recipe(geometry: Geometry, recipe: &Recipe) -> Result<Self, CostError> {
        geometry.check()?;
        let tensors = tensor_shapes(&geometry)
            .into_iter()
            .map(|t| {
                let format = recipe.format_of(&geometry, &t);
                TensorSpec::new(t, format)
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { geometry, tensors, format_name: recipe.name().to_string() })
    }

    /// The first tensor with this role in this layer (`None` for tensors outside the layers).
    pub fn tensor(&self, layer: Option<u32>, role: TensorRole) -> Option<(TensorId, &TensorSpec)> {
        self.tensors.iter().enumerate().find(|(_, t)| t.layer == layer && t.role == role).map(|(i, t)| (TensorId(i as u32), t))
    }

    /// Stable 64-bit fingerprint of geometry and formats (FNV-1a over a canonical text), in hexadecimal.
    pub fn fingerprint(&self) -> String {
        let mut hash = Fnv::new();
        hash.add(&self.architecture);
        for n in [self.hidden_size, self.vocab_size, self.context_length] {
            hash.add(&n.to_string());
        }
        for layer in &self.layers {
            hash.add(&format!("{layer:?}"));
        }
        for t in &self.tensors {
            hash.add(&format!("{} {:?} {}", t.name, t.shape, t.format));
        }
        hash.hex()
    }

    /// Layers with routed experts: `(layer index, its description)`.
    pub fn moe_layers(&self) -> impl Iterator<Item = (u32, &Moe)> {
        self.geometry.layers.iter().enumerate().filter_map(|(i, l)| match &l.ffn {
            Ffn::Moe(moe) => Some((i as u32, moe)),
            Ffn::Dense(_) | Ffn::None => None,
        })
    }

    /// Why the runtime cannot execute this model, if it cannot.
    pub fn plan_only_reason(&self) -> Option<String> {
        for (i, layer) in self.layers.iter().enumerate() {
            match &layer.attention {
                Attention::Gqa(_) => {}
                Attention::Mla(_) => return Some(format!("layer {i}: latent attention (MLA) can be planned but not run yet")),
                Attention::PlanOnly(m) => return Some(format!("layer {i}: {} can be planned but not run", m.name)),
            }
            match &layer.ffn {
                Ffn::Dense(d) if !d.gated => {
                    return Some(format!("layer {i}: ungated feed-forward can be planned but not run yet"));
                }
                Ffn::None => return Some(format!("layer {i}: layers without feed-forward part can be planned but not run yet")),
                Ffn::Moe(m) if !m.gated || m.latent_size.is_some() || m.parallel_dense_inner_size.is_some() => {
                    return Some(format!("layer {i}: this kind of expert can be planned but not run yet"));
                }
                Ffn::Moe(m) if m.router.score != RouterScore::Softmax || m.router.selection_bias || m.router.groups.is_some() => {
                    return Some(format!("layer {i}: this routing rule can be planned but not run yet"));
                }
                Ffn::Dense(_) | Ffn::Moe(_) => {}
            }
        }
        None
    }
}

/// FNV-1a, 64 bits: small, stable across versions, not for security.
pub(crate) struct Fnv(u64);

impl Fnv {
    pub(crate) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Adds a text and a separator.
    pub(crate) fn add(&mut self, text: &str) {
        for b in text.bytes().chain([0xff]) {
            self.0 = (self.0 ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    pub(crate) fn hex(&self) -> String {
        format!("{:016x}", self.0)
    }
}

impl Geometry {
    /// Checks that every size is possible.
    ///
    /// # Errors
    /// [`CostError::BadModel`] with the field, its value and what is allowed.
    pub fn check(&self) -> Result<(), CostError> {
        let bad = |field: String, found: String, expected: &str| {
            Err(CostError::BadModel { model: self.name.clone(), field, found, expected: expected.to_string() })
        };
        let range = |field: &str, value: u32, max: u32| {
            if value == 0 || value > max { bad(field.to_string(), value.to_string(), &format!("1 to {max}")) } else { Ok(()) }
        };
        range("hidden_size", self.hidden_size, 1 << 20)?;
        range("vocab_size", self.vocab_size, 1 << 24)?;
        range("context_length", self.context_length, 1 << 30)?;
        range("num_layers", self.layers.len().try_into().unwrap_or(u32::MAX), 4096)?;
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return bad("norm_eps".into(), self.norm_eps.to_string(), "a number between 0 and 1");
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let field = |name: &str| format!("layer {i} {name}");
            match &layer.attention {
                Attention::Gqa(a) => {
                    range(&field("num_heads"), a.num_heads, 4096)?;
                    range(&field("num_kv_heads"), a.num_kv_heads, a.num_heads)?;
                    range(&field("head_dim"), a.head_dim, 4096)?;
                    if !a.num_heads.is_multiple_of(a.num_kv_heads) {
                        return bad(field("num_kv_heads"), a.num_kv_heads.to_string(), "a divisor of num_heads");
                    }
                    a.rope.check(&field("rope"), a.head_dim).or_else(|(f, found, expected)| bad(f, found, &expected))?;
                }
                Attention::Mla(a) => {
                    range(&field("num_heads"), a.num_heads, 4096)?;
                    range(&field("q_lora_rank"), a.q_lora_rank.unwrap_or(1), 1 << 16)?;
                    range(&field("kv_lora_rank"), a.kv_lora_rank, 1 << 16)?;
                    range(&field("qk_nope_head_dim"), a.qk_nope_head_dim, 4096)?;
                    range(&field("qk_rope_head_dim"), a.qk_rope_head_dim, 4096)?;
                    range(&field("v_head_dim"), a.v_head_dim, 4096)?;
                    a.rope.check(&field("rope"), a.qk_rope_head_dim).or_else(|(f, found, expected)| bad(f, found, &expected))?;
                }
                Attention::PlanOnly(m) => {
                    // 2^40 elements is more than any whole model has; sums over 4096 such layers still fit 64 bits.
                    for (name, value) in [
                        ("weight_elements", m.weight_elements),
                        ("kv_elements_per_token", m.kv_elements_per_token),
                        ("state_elements", m.state_elements),
                    ] {
                        if value > 1 << 40 {
                            return bad(field(name), value.to_string(), "0 to 2^40");
                        }
                    }
                }
            }
            match &layer.ffn {
                Ffn::Dense(d) => range(&field("inner_size"), d.inner_size, 1 << 20)?,
                Ffn::Moe(m) => {
                    range(&field("num_experts"), m.num_experts, 1 << 16)?;
                    range(&field("experts_per_token"), m.experts_per_token, m.num_experts)?;
                    range(&field("inner_size"), m.inner_size, 1 << 20)?;
                    range(&field("latent_size"), m.latent_size.unwrap_or(1), 1 << 20)?;
                    range(&field("parallel_dense_inner_size"), m.parallel_dense_inner_size.unwrap_or(1), 1 << 20)?;
                    if !m.router.scale.is_finite() {
                        return bad(field("router scale"), m.router.scale.to_string(), "a finite number");
                    }
                    if let Some((groups, kept)) = m.router.groups
                        && (groups == 0 || !m.num_experts.is_multiple_of(groups) || kept == 0 || kept > groups)
                    {
                        return bad(
                            field("router groups"),
                            format!("{groups} groups, {kept} kept"),
                            "groups that divide the experts",
                        );
                    }
                    if let Some(s) = &m.shared {
                        range(&field("shared inner_size"), s.inner_size, 1 << 20)?;
                    }
                }
                Ffn::None => {}
            }
        }
        Ok(())
    }
}

impl Rope {
    /// `Err((field, found, expected))` when the rotation does not fit a head of `head_dim`.
    fn check(&self, field: &str, head_dim: u32) -> Result<(), (String, String, String)> {
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return Err((format!("{field} theta"), self.theta.to_string(), "a positive number".into()));
        }
        if self.rotary_dim == 0 || self.rotary_dim > head_dim || !self.rotary_dim.is_multiple_of(2) {
            return Err((format!("{field} rotary_dim"), self.rotary_dim.to_string(), format!("an even number up to {head_dim}")));
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
