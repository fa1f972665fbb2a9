//! The model families that can be imported, and how each differs from the others.
//!
//! A family is a row: its two names and the facts that neither a GGUF file nor a `config.json` states. Sources: the reference
//! implementations in Hugging Face transformers (`models/*/modeling_*.py`) and llama.cpp (`src/models/*.cpp`,
//! `llama_model_rope_type`).

use crate::error::RuntimeError;
use std::path::Path;
use tierwise_cost::model::{QkNorm, RopePairing, RouterScore};

/// One row of the table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Family {
    /// `general.architecture` in GGUF files.
    pub gguf_name: &'static str,
    /// `model_type` in `config.json`.
    pub hf_name: &'static str,
    /// Layers have routed experts.
    pub moe: bool,
    /// What the norm of queries and keys spans.
    pub qk_norm: QkNorm,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// One expert for every token, scaled by the sigmoid of a projection.
    pub shared_expert: bool,
    /// Expert widths have a name of their own (`expert_feed_forward_length`, `moe_intermediate_size`), apart from the dense width.
    pub own_expert_width: bool,
    /// Routing weights are divided by their sum. GGUF has no key for it in these families: the architecture decides.
    pub gguf_normalize_topk: bool,
    /// The same in Hugging Face: fixed (`Some`), or `norm_topk_prob` (`None`; false when absent).
    pub hf_normalize_topk: Option<bool>,
    /// How the converter to GGUF stored the q and k rows. Hugging Face weights are always in [`RopePairing::Halves`].
    pub gguf_pairing: RopePairing,
    /// RoPE base when `config.json` names none.
    pub hf_rope_theta: f32,
    /// DeepSeek, or a family that took over its router: layers are read by `gguf_deepseek` and `hf_deepseek`.
    pub deepseek: Option<DeepSeek>,
    /// A family with parts of its own: layers are read by `gguf_variants` and `hf_variants`.
    pub variant: Option<Variant>,
}

/// Families with parts of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// gpt-oss: sinks, windows in every other layer, biases everywhere, a clamped SwiGLU.
    GptOss,
    /// Granite-3 MoE: factors on embedding, residual stream, scores and logits.
    Granite,
    /// Phi-3.5-MoE: layer norms, biases, LongRoPE, a router of its own.
    Phi,
    /// Hunyuan-A13B: queries and keys are normed after the rotation.
    Hunyuan,
    /// Llama-4: chunked attention, layers without rotation, weights on the experts' input.
    Llama4,
    /// Qwen3-Next: gated delta rule and gated attention in turn.
    QwenNext,
    /// Qwen3.5-MoE: the same with other projections, and in GGUF files another order of value heads.
    Qwen35,
}

/// What [`Family`]'s other columns cannot say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeepSeek {
    /// Latent attention.
    pub mla: bool,
    /// Router logits to scores, where nothing else is said.
    pub score: RouterScore,
    /// The choice has a learnt bias.
    pub selection_bias: bool,
    /// Weights are divided by their sum: fixed, or said by the file.
    pub fixed_normalize_topk: Option<bool>,
}

/// A row for [`Family::deepseek`]: its other columns that matter follow.
const DEEPSEEK: Family = Family {
    gguf_name: "deepseek2",
    hf_name: "deepseek_v3",
    moe: true,
    qk_norm: QkNorm::None,
    qkv_bias: false,
    shared_expert: true,
    own_expert_width: true,
    gguf_normalize_topk: true,
    hf_normalize_topk: None,
    gguf_pairing: RopePairing::Interleaved,
    hf_rope_theta: 1e4,
    deepseek: Some(DeepSeek { mla: true, score: RouterScore::Sigmoid, selection_bias: true, fixed_normalize_topk: None }),
    variant: None,
};

/// A row for [`Family::variant`]: its other columns that matter follow.
const VARIANT: Family = Family { shared_expert: false, deepseek: None, gguf_pairing: RopePairing::Halves, ..DEEPSEEK };

/// Every family that can be imported. The first row with a GGUF name and the right `moe` is the one.
pub const FAMILIES: &[Family] = &[
    Family {
        gguf_name: "qwen3moe",
        hf_name: "qwen3_moe",
        moe: true,
        qk_norm: QkNorm::PerHead,
        qkv_bias: false,
        shared_expert: false,
        own_expert_width: true,
        gguf_normalize_topk: true,
        hf_normalize_topk: None,
        gguf_pairing: RopePairing::Halves,
        hf_rope_theta: 1e4,
        deepseek: None,
        variant: None,
    },
    Family {
        gguf_name: "olmoe",
        hf_name: "olmoe",
        moe: true,
        qk_norm: QkNorm::FullWidth,
        qkv_bias: false,
        shared_expert: false,
        own_expert_width: false,
        gguf_normalize_topk: false,
        hf_normalize_topk: None,
        gguf_pairing: RopePairing::Halves,
        hf_rope_theta: 1e4,
        deepseek: None,
        variant: None,
    },
    Family {
        gguf_name: "llama",
        hf_name: "mixtral",
        moe: true,
        qk_norm: QkNorm::None,
        qkv_bias: false,
        shared_expert: false,
        own_expert_width: false,
        gguf_normalize_topk: true,
        hf_normalize_topk: Some(true),
        gguf_pairing: RopePairing::Interleaved,
        hf_rope_theta: 1e6,
        deepseek: None,
        variant: None,
    },
    Family {
        gguf_name: "qwen2moe",
        hf_name: "qwen2_moe",
        moe: true,
        qk_norm: QkNorm::None,
        qkv_bias: true,
        shared_expert: true,
        own_expert_width: true,
        gguf_normalize_topk: false,
        hf_normalize_topk: None,
        gguf_pairing: RopePairing::Halves,
        hf_rope_theta: 1e4,
        deepseek: None,
        variant: None,
    },
    Family {
        gguf_name: "llama",
        hf_name: "llama",
        moe: false,
        qk_norm: QkNorm::None,
        qkv_bias: false,
        shared_expert: false,
        own_expert_width: false,
        gguf_normalize_topk: false,
        hf_normalize_topk: Some(false),
        gguf_pairing: RopePairing::Interleaved,
        hf_rope_theta: 1e4,
        deepseek: None,
        variant: None,
    },
    DEEPSEEK,
    Family { hf_name: "kimi_k2", ..DEEPSEEK },
    Family {
        hf_name: "deepseek_v2",
        deepseek: Some(DeepSeek { mla: true, score: RouterScore::Softmax, selection_bias: false, fixed_normalize_topk: None }),
        ..DEEPSEEK
    },
    Family {
        gguf_name: "glm4moe",
        hf_name: "glm4_moe",
        qk_norm: QkNorm::PerHead,
        gguf_pairing: RopePairing::Halves,
        deepseek: Some(DeepSeek { mla: false, score: RouterScore::Sigmoid, selection_bias: true, fixed_normalize_topk: None }),
        ..DEEPSEEK
    },
    Family {
        gguf_name: "minimax-m2",
        hf_name: "minimax_m2",
        qk_norm: QkNorm::FullWidth,
        gguf_pairing: RopePairing::Halves,
        deepseek: Some(DeepSeek {
            mla: false,
            score: RouterScore::Sigmoid,
            selection_bias: true,
            fixed_normalize_topk: Some(true),
        }),
        ..DEEPSEEK
    },
    Family {
        gguf_name: "ernie4_5-moe",
        hf_name: "ernie4_5_moe",
        deepseek: Some(DeepSeek {
            mla: false,
            score: RouterScore::Softmax,
            selection_bias: true,
            fixed_normalize_topk: Some(true),
        }),
        ..DEEPSEEK
    },
    Family { gguf_name: "gpt-oss", hf_name: "gpt_oss", variant: Some(Variant::GptOss), ..VARIANT },
    Family {
        gguf_name: "granitemoe",
        hf_name: "granitemoe",
        gguf_pairing: RopePairing::Interleaved,
        variant: Some(Variant::Granite),
        ..VARIANT
    },
    Family { gguf_name: "phimoe", hf_name: "phimoe", variant: Some(Variant::Phi), ..VARIANT },
    Family { gguf_name: "hunyuan-moe", hf_name: "hunyuan_v1_moe", variant: Some(Variant::Hunyuan), ..VARIANT },
    Family {
        gguf_name: "llama4",
        hf_name: "llama4_text",
        gguf_pairing: RopePairing::Interleaved,
        variant: Some(Variant::Llama4),
        ..VARIANT
    },
    Family { gguf_name: "qwen3next", hf_name: "qwen3_next", variant: Some(Variant::QwenNext), ..VARIANT },
    Family { gguf_name: "qwen35moe", hf_name: "qwen3_5_moe_text", variant: Some(Variant::Qwen35), ..VARIANT },
];

/// The family with this GGUF architecture name, with or without experts.
///
/// # Errors
/// [`RuntimeError::UnknownArchitecture`] with the known names.
pub fn by_gguf_name(path: &Path, name: &str, has_experts: bool) -> Result<&'static Family, RuntimeError> {
    let of_name = |f: &&Family| f.gguf_name == name;
    FAMILIES
        .iter()
        .filter(of_name)
        .find(|f| f.moe == has_experts)
        .or_else(|| FAMILIES.iter().find(of_name))
        .ok_or_else(|| unknown(path, name, |f| f.gguf_name))
}

/// The family with this `model_type`.
///
/// # Errors
/// [`RuntimeError::UnknownArchitecture`] with the known names.
pub fn by_hf_name(path: &Path, name: &str) -> Result<&'static Family, RuntimeError> {
    FAMILIES.iter().find(|f| f.hf_name == name).ok_or_else(|| unknown(path, name, |f| f.hf_name))
}

fn unknown(path: &Path, name: &str, name_of: fn(&Family) -> &'static str) -> RuntimeError {
    let mut known: Vec<&str> = FAMILIES.iter().map(name_of).collect();
    known.sort_unstable();
    known.dedup();
    RuntimeError::UnknownArchitecture { path: path.to_path_buf(), found: name.to_string(), known: known.join(", ") }
}
