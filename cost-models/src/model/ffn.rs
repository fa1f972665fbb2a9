//! What happens to each token alone: dense networks, routed experts and how they are chosen.

use super::{is_false, is_one, is_true, one, yes};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    /// Experts each token goes to; the most of them where the router's [`Selection`] lets their number vary.
    pub experts_per_token: u32,
    /// How many they are on average, where it varies: what costs are computed with. Absent: as many as can be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_experts_per_token: Option<f32>,
    /// How often the part is applied, each time with a router of its own, to its own result (Chain-of-Experts, arXiv 2506.18945).
    #[serde(default = "once", skip_serializing_if = "is_once")]
    pub iterations: u32,
    /// An iteration adds to what it is given instead of replacing it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub inner_residual: bool,
    /// Inner width of one expert.
    pub inner_size: u32,
    /// Gate matrix present: SwiGLU; else two matrices.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub gated: bool,
    /// What happens between the gate and up projections and the down projection.
    #[serde(default, skip_serializing_if = "Activation::is_silu")]
    pub activation: Activation,
    /// Biases on the experts' projections (gpt-oss).
    #[serde(default, skip_serializing_if = "is_false")]
    pub expert_bias: bool,
    /// An expert's input is multiplied by its weight, instead of its output (Llama-4).
    #[serde(default, skip_serializing_if = "is_false")]
    pub weights_on_input: bool,
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

impl Moe {
    /// Gated experts under a softmax router, without extras.
    pub const fn plain(num_experts: u32, experts_per_token: u32, inner_size: u32, router: Router) -> Self {
        Self {
            num_experts,
            experts_per_token,
            mean_experts_per_token: None,
            iterations: 1,
            inner_residual: false,
            inner_size,
            gated: true,
            activation: Activation::Silu,
            expert_bias: false,
            weights_on_input: false,
            latent_size: None,
            router,
            shared: None,
            parallel_dense_inner_size: None,
        }
    }

    /// Experts of a token in one iteration, on average.
    pub fn mean_choices(&self) -> f64 {
        self.mean_experts_per_token.map_or_else(|| f64::from(self.experts_per_token), f64::from)
    }
}

const fn once() -> u32 {
    1
}
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_once(n: &u32) -> bool {
    *n == 1
}

/// What happens between the gate and up projections and the down projection of a gated network.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Activation {
    /// `silu(gate) * up`.
    #[default]
    Silu,
    /// gpt-oss: `g * sigmoid(alpha g) * (u + 1)`, `g` the gate cut at `limit`, `u` the up projection cut to `-limit..limit`.
    ClampedSwiglu {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Where both are cut.
        limit: f32,
    },
}

impl Activation {
    fn is_silu(&self) -> bool {
        *self == Self::Silu
    }
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
    /// The router's projection has a bias (gpt-oss).
    #[serde(default, skip_serializing_if = "is_false")]
    pub bias: bool,
    /// A learnt bias is added to the scores for the choice only (DeepSeek-V3).
    #[serde(default, skip_serializing_if = "is_false")]
    pub selection_bias: bool,
    /// Group-limited choice: `(groups, groups kept)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<(u32, u32)>,
    /// What a group of experts is worth in that choice.
    #[serde(default, skip_serializing_if = "GroupScore::is_default")]
    pub group_score: GroupScore,
    /// How many of the best experts a token gets.
    #[serde(default, skip_serializing_if = "Selection::is_top_k")]
    pub selection: Selection,
}

impl Router {
    /// The best softmax scores, without biases or groups.
    pub const fn softmax(normalize_topk: bool) -> Self {
        Self {
            score: RouterScore::Softmax,
            normalize_topk,
            scale: 1.0,
            bias: false,
            selection_bias: false,
            groups: None,
            group_score: GroupScore::Top2Sum,
            selection: Selection::TopK,
        }
    }
}

/// How many of the best experts a token gets: always one, never more than the layer's experts per token.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Selection {
    /// As many as the layer's experts per token.
    #[default]
    TopK,
    /// Until their scores sum to `p` (dynamic routing, arXiv 2403.07652).
    TopP {
        /// The sum that is enough.
        p: f32,
    },
    /// Those whose score is not below a threshold (a number per token up to a maximum per layer, as in DynaMoE, arXiv 2603.01697).
    Threshold {
        /// The threshold.
        min_score: f32,
    },
}

impl Selection {
    fn is_top_k(&self) -> bool {
        *self == Self::TopK
    }
}

/// What a group of experts is worth in a group-limited choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// The sum of its two best scores (DeepSeek-V3).
    #[default]
    Top2Sum,
    /// Its best score (DeepSeek-V2).
    Max,
}

impl GroupScore {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
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
    /// Phi-3.5's rule: two experts, one after the other, each weighted by a softmax over the logits near the best one
    /// (transformers' `sparsemixer`, without its noise).
    SparseMixer,
}
