//! A model's geometry: what is in each layer, and the tensor table that follows from it.
//!
//! Layers are a list; nothing assumes that they are alike. Sizes never come from formulas elsewhere: [`ModelSpec::tensors`]
//! holds every tensor with shape and format, and all byte counts are sums over it.

mod attention;
mod bytes;
mod check;
mod ffn;
mod file;
mod runnable;
mod tensors;

pub use attention::{
    Attention, DeltaNet, Gqa, Mla, PlanOnlyMixer, QkNorm, Rope, RopePairing, RopeScaling, Temperature, ValueHeads,
};
pub use bytes::{LayerBytes, RoleBytes};
pub use ffn::{Activation, DenseFfn, Ffn, GroupScore, Moe, Router, RouterScore, Selection, SharedExperts};
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
    /// Which norm layers and output have.
    pub norm: NormKind,
    /// The output projection is the embedding table.
    pub tie_word_embeddings: bool,
    /// Bias on the output projection.
    pub output_bias: bool,
    /// Factors on the residual stream and the logits.
    pub scales: Scales,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
}

/// Which norm layers and output have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// Root mean square, with a weight.
    #[default]
    Rms,
    /// The mean is subtracted first; weight and bias (Phi-3.5).
    Layer,
}

/// Factors on the residual stream and the logits (Granite), and a cap on the logits (Gemma, Grok).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Scales {
    /// Factor on the embedding.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub embedding: f32,
    /// Factor on what each part adds to the residual stream.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub residual: f32,
    /// Factor on the logits.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub logits: f32,
    /// Logits `x` become `cap * tanh(x / cap)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logits_softcap: Option<f32>,
}

impl Default for Scales {
    fn default() -> Self {
        Self { embedding: 1.0, residual: 1.0, logits: 1.0, logits_softcap: None }
    }
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

#[cfg(test)]
pub(crate) mod tests;
