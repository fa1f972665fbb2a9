//! How tokens see each other: attention kinds and the encoding of positions.

use super::{is_false, is_true, yes};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How tokens see each other in a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Attention {
    /// Grouped-query attention (multi-head when `num_kv_heads == num_heads`).
    Gqa(Gqa),
    /// Multi-head latent attention (DeepSeek-V2 and later).
    Mla(Mla),
    /// A state per head under the gated delta rule (Qwen3-Next, Qwen3.5).
    DeltaNet(DeltaNet),
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
    /// Bias on the output projection.
    #[serde(default, skip_serializing_if = "is_false")]
    pub output_bias: bool,
    /// RMS norm of queries and keys.
    #[serde(default, skip_serializing_if = "QkNorm::is_none")]
    pub qk_norm: QkNorm,
    /// That norm comes after the rotation (Hunyuan, Llama-4) instead of before it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub qk_norm_after_rope: bool,
    /// Rotary position embedding; absent in layers that do not encode positions (Llama-4's every fourth).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope: Option<Rope>,
    /// Only the last so many positions are seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<u32>,
    /// Only positions of the same chunk of so many are seen (Llama-4).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk: Option<u32>,
    /// A learnt logit per head takes part in the softmax and has no value (gpt-oss).
    #[serde(default, skip_serializing_if = "is_false")]
    pub sinks: bool,
    /// Factor on the products of queries and keys; absent: `1 / sqrt(head_dim)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f32>,
    /// Scores `s` become `cap * tanh(s / cap)` (Gemma-2, Grok).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub softcap: Option<f32>,
    /// Queries grow with the logarithm of their position (Llama-4's layers without rotation).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<Temperature>,
    /// The result is multiplied by the sigmoid of a projection, which lies with the queries', head by head (Qwen3-Next).
    #[serde(default, skip_serializing_if = "is_false")]
    pub output_gate: bool,
}

impl Gqa {
    /// Attention without biases, norms or other extras.
    pub const fn plain(num_heads: u32, num_kv_heads: u32, head_dim: u32, rope: Rope) -> Self {
        Self {
            num_heads,
            num_kv_heads,
            head_dim,
            qkv_bias: false,
            output_bias: false,
            qk_norm: QkNorm::None,
            qk_norm_after_rope: false,
            rope: Some(rope),
            sliding_window: None,
            chunk: None,
            sinks: false,
            scale: None,
            softcap: None,
            temperature: None,
            output_gate: false,
        }
    }

    /// How many positions a token sees at most, if not all: those of its window or chunk.
    pub fn reach(&self) -> Option<u32> {
        self.sliding_window.into_iter().chain(self.chunk).min()
    }
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
    /// All heads together; weight `[num_heads * head_dim]` (OLMoE, MiniMax-M2).
    FullWidth,
    /// Each head alone, without a weight (Llama-4).
    Unweighted,
}

/// Queries at position `p` are multiplied by `1 + scale * ln(1 + floor((p + 1) / period))` (Llama-4).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Temperature {
    /// Factor on the logarithm.
    pub scale: f32,
    /// Positions per step.
    pub period: u32,
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
    /// How frequencies were stretched for contexts longer than those of the first training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<RopeScaling>,
}

impl Rope {
    /// A rotation without scaling.
    pub const fn plain(theta: f32, rotary_dim: u32, pairing: RopePairing) -> Self {
        Self { theta, rotary_dim, pairing, scaling: None }
    }
}

/// Frequencies stretched for longer contexts. The formulas are in `runtime`'s `rope.rs`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// All frequencies are divided by the factor.
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Llama 3.1: low frequencies are divided by the factor, high ones kept, those between interpolated.
    Llama3 {
        /// Factor on low frequencies.
        factor: f32,
        /// Wavelengths above `original_context / low_freq_factor` are low frequencies.
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` are high frequencies.
        high_freq_factor: f32,
        /// Context of the first training, in tokens.
        original_context: u32,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Longest context over that of the first training.
        factor: f32,
        /// Context of the first training, in tokens.
        original_context: u32,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f32,
        /// Rotations below which it is divided by the factor.
        beta_slow: f32,
        /// Factor on rotated queries and keys.
        attention_factor: f32,
        /// The bounds are rounded to whole dimensions (all models but gpt-oss).
        #[serde(default = "yes", skip_serializing_if = "is_true")]
        truncate: bool,
    },
    /// LongRoPE (arXiv 2402.13753): a divisor for every frequency, one set for short and one for long contexts.
    LongRope {
        /// Context of the first training, in tokens: longer ones take the long set.
        original_context: u32,
        /// `[rotary_dim / 2]`
        short_divisors: Vec<f32>,
        /// `[rotary_dim / 2]`
        long_divisors: Vec<f32>,
        /// Factor on rotated queries and keys in short contexts.
        short_attention_factor: f32,
        /// The same in long ones.
        long_attention_factor: f32,
    },
    /// A divisor for every frequency, as GGUF files store them (`rope_freqs.weight`).
    Divisors {
        /// `[rotary_dim / 2]`
        divisors: Vec<f32>,
    },
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
    /// Factor on the products of queries and keys; absent: `1 / sqrt(qk_nope_head_dim + qk_rope_head_dim)`. YaRN models multiply that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f32>,
}

/// Gated delta rule (Gated DeltaNet, arXiv 2412.06464): a causal convolution, then a state per value head that decays and is
/// corrected by every token; nothing grows with the context.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeltaNet {
    /// Heads of queries and keys; divides `num_value_heads`.
    pub num_key_heads: u32,
    /// Heads of values, each with a state.
    pub num_value_heads: u32,
    /// Width of a query or key head.
    pub key_head_dim: u32,
    /// Width of a value head.
    pub value_head_dim: u32,
    /// Positions that the convolution sees.
    pub conv_kernel: u32,
    /// Projections of beta and of the decay are one matrix: per key head first the one, then the other (Qwen3-Next).
    #[serde(default, skip_serializing_if = "is_false")]
    pub fused_gates: bool,
    /// Which value heads share a key head. A property of how the weights are stored, not of the maths.
    #[serde(default, skip_serializing_if = "ValueHeads::is_grouped")]
    pub value_heads: ValueHeads,
}

/// Which value heads share a key head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ValueHeads {
    /// Neighbours.
    #[default]
    Grouped,
    /// Those with the same remainder after division by the number of key heads (GGUF files of Qwen3.5).
    Tiled,
}

impl ValueHeads {
    fn is_grouped(&self) -> bool {
        *self == Self::Grouped
    }
}

impl DeltaNet {
    /// Width of all value heads.
    pub const fn value_dim(&self) -> u32 {
        self.num_value_heads.saturating_mul(self.value_head_dim)
    }

    /// Channels of the convolution: queries, keys and values.
    pub const fn channels(&self) -> u32 {
        self.num_key_heads.saturating_mul(self.key_head_dim).saturating_mul(2).saturating_add(self.value_dim())
    }

    /// Elements kept per sequence, in float32: the states, and the convolution's inputs before the next position.
    pub const fn state_elements(&self) -> u64 {
        let states = self.value_dim() as u64 * self.key_head_dim as u64;
        states + (self.conv_kernel as u64).saturating_sub(1) * self.channels() as u64
    }

    /// With one value head per key head there is one order.
    #[must_use]
    pub fn canonical(self) -> Self {
        let value_heads = if self.num_key_heads == self.num_value_heads { ValueHeads::Grouped } else { self.value_heads };
        Self { value_heads, ..self }
    }
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
