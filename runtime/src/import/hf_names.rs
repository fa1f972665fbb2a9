//! What checkpoints call the tensors of the model, and how they lie in them.
//!
//! The same tensor has other names in other families; experts lie one by one, fused, transposed or in MXFP4; a head's keys and values
//! in one matrix. Names are those of the published folders, which transformers reads (`modeling_*.py`, `conversion_mapping.py`).

use super::convert_hf::{Change, Conversion, MXFP4_GROUP_BYTES};
use super::hf_weights::Piece;
use crate::safetensors::SafeTensors;
use tierwise_cost::model::{Attention, Ffn, Geometry, RoleGroup, TensorRole, TensorShape};

/// One way in which a checkpoint may store a tensor.
pub(super) struct Candidate {
    /// Its parts in order.
    pub(super) pieces: Vec<Piece>,
    /// Shape of each stored tensor that they name.
    pub(super) shape: Vec<u64>,
    /// What has to be done with them.
    pub(super) conversion: Option<Conversion>,
}

/// Where the text model's tensors are in a checkpoint of more than text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nesting {
    /// There is nothing but text.
    Plain,
    /// `language_model.` stands before every name (Llama-4).
    Outside,
    /// `model.language_model.` stands for `model.` (Qwen3.5).
    Inside,
}

impl Nesting {
    /// Told by the name of the embedding table.
    pub(super) fn of(weights: &SafeTensors) -> Self {
        let has = |name: &str| weights.tensor(name).is_some();
        match () {
            () if has("language_model.model.embed_tokens.weight") => Self::Outside,
            () if has("model.language_model.embed_tokens.weight") => Self::Inside,
            () => Self::Plain,
        }
    }

    /// The name in the checkpoint of what is called `name` in one of text alone.
    pub(super) fn stored(self, name: &str) -> String {
        match (self, name.strip_prefix("model.")) {
            (Self::Outside, _) => format!("language_model.{name}"),
            (Self::Inside, Some(rest)) => format!("model.language_model.{rest}"),
            (Self::Plain, _) | (Self::Inside, None) => name.to_string(),
        }
    }

    /// A tensor of another part (vision, projections into the text model).
    pub(super) fn is_beside(self, name: &str) -> bool {
        match self {
            Self::Plain => false,
            Self::Outside => !name.starts_with("language_model."),
            Self::Inside => ["model.visual.", "visual.", "model.audio"].iter().any(|part| name.starts_with(part)),
        }
    }
}

/// The ways in which a checkpoint may store a tensor, the usual ones first.
pub(super) fn candidates(geometry: &Geometry, t: &TensorShape) -> Vec<Candidate> {
    match t.role {
        TensorRole::AttentionKB | TensorRole::AttentionVB => latent_candidate(geometry, t),
        role if role.is_routed_expert() || role.is_expert_bias() => {
            let mut candidates = transposed_experts(geometry, t);
            candidates.extend(mxfp4_experts(geometry, t));
            if role.is_routed_expert() {
                candidates.extend(expert_candidates(geometry, t));
            }
            candidates
        }
        role if role.is_delta() => delta_candidate(geometry, t),
        role => {
            let mut candidates = plain_candidates(t);
            // Norms around zero; that of the delta rule's result is an ordinary one.
            if is_delta_family(geometry) && role.group() == RoleGroup::Norms {
                candidates.iter_mut().for_each(|c| c.conversion = Some(Conversion::Map(Change::PlusOne)));
            }
            candidates
        }
    }
}

fn is_delta_family(geometry: &Geometry) -> bool {
    matches!(geometry.architecture.as_str(), "qwen3next" | "qwen35moe")
}

/// Parts of a gated delta rule. Qwen3-Next stores queries, keys, values and gate of each key head in turn (`in_proj_qkvz`).
fn delta_candidate(geometry: &Geometry, t: &TensorShape) -> Vec<Candidate> {
    use TensorRole as R;
    let layer = t.layer.unwrap_or(0);
    let Some(Attention::DeltaNet(a)) = geometry.layers.get(layer as usize).map(|l| &l.attention) else { return Vec::new() };
    let [keys, values, key_dim, value_dim] =
        [a.num_key_heads, a.num_value_heads, a.key_head_dim, a.value_head_dim].map(u64::from);
    let hidden = u64::from(geometry.hidden_size);
    let name = |suffix: &str| format!("model.layers.{layer}.linear_attn.{suffix}");
    let whole = |suffix: &str, shape: Vec<u64>, conversion| {
        let pieces = vec![Piece { tensor: name(suffix), first_element: 0, num_elements: shape.iter().product() }];
        vec![Candidate { pieces, shape, conversion }]
    };
    let plain = |suffix: &str| whole(suffix, t.shape.clone(), None);
    let of_key_head = 2 * key_dim + 2 * (values / keys) * value_dim;
    // Rows `first..first + count` of every key head, as pieces of `unit` rows.
    let rows = |first: u64, count: u64, unit: u64| {
        let starts =
            (0..keys).flat_map(move |head| (first..first + count).step_by(unit as usize).map(move |r| head * of_key_head + r));
        let piece =
            |start| Piece { tensor: name("in_proj_qkvz.weight"), first_element: start * hidden, num_elements: unit * hidden };
        starts.map(piece).collect::<Vec<_>>()
    };
    let joined = |pieces| vec![Candidate { pieces, shape: vec![keys * of_key_head, hidden], conversion: Some(Conversion::Join) }];
    let of_values = values / keys * value_dim;
    match t.role {
        R::DeltaQkv if a.fused_gates => {
            // All pieces alike, as `convert` wants them.
            let unit = greatest_common_divisor(key_dim, of_values);
            let parts = [(0, key_dim), (key_dim, key_dim), (2 * key_dim, of_values)];
            joined(parts.into_iter().flat_map(|(first, count)| rows(first, count, unit)).collect())
        }
        R::DeltaGate if a.fused_gates => joined(rows(2 * key_dim + of_values, of_values, of_values)),
        R::DeltaQkv => plain("in_proj_qkv.weight"),
        R::DeltaGate => plain("in_proj_z.weight"),
        R::DeltaBeta => plain("in_proj_b.weight"),
        R::DeltaAlpha => plain("in_proj_a.weight"),
        R::DeltaBetaAlpha => plain("in_proj_ba.weight"),
        R::DeltaConv => whole("conv1d.weight", vec![t.shape[0], 1, t.shape[1]], None),
        R::DeltaDtBias => plain("dt_bias"),
        R::DeltaDecay => whole("A_log", t.shape.clone(), Some(Conversion::Map(Change::NegativeExp))),
        R::DeltaNorm => plain("norm.weight"),
        _ => Vec::new(),
    }
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

fn plain_candidates(t: &TensorShape) -> Vec<Candidate> {
    use TensorRole as R;
    let outside = |name: &str| vec![name.to_string()];
    let layer = |suffix: &str| vec![format!("model.layers.{}.{suffix}", t.layer.unwrap_or(0))];
    let names = match t.role {
        R::TokenEmbedding => outside("model.embed_tokens.weight"),
        R::OutputNorm => outside("model.norm.weight"),
        R::OutputNormBias => outside("model.norm.bias"),
        R::Output => outside("lm_head.weight"),
        R::OutputBias => outside("lm_head.bias"),
        R::AttentionNorm => layer("input_layernorm.weight"),
        R::AttentionNormBias => layer("input_layernorm.bias"),
        R::AttentionQ => layer("self_attn.q_proj.weight"),
        R::AttentionK => layer("self_attn.k_proj.weight"),
        R::AttentionV => layer("self_attn.v_proj.weight"),
        R::AttentionQBias => layer("self_attn.q_proj.bias"),
        R::AttentionKBias => layer("self_attn.k_proj.bias"),
        R::AttentionVBias => layer("self_attn.v_proj.bias"),
        R::AttentionQNorm => [layer("self_attn.q_norm.weight"), layer("self_attn.query_layernorm.weight")].concat(),
        R::AttentionKNorm => [layer("self_attn.k_norm.weight"), layer("self_attn.key_layernorm.weight")].concat(),
        R::AttentionOutput => [layer("self_attn.o_proj.weight"), layer("linear_attn.out_proj.weight")].concat(),
        R::AttentionOutputBias => layer("self_attn.o_proj.bias"),
        R::AttentionQA => layer("self_attn.q_a_proj.weight"),
        R::AttentionQANorm => layer("self_attn.q_a_layernorm.weight"),
        R::AttentionQB => layer("self_attn.q_b_proj.weight"),
        R::AttentionKvA => layer("self_attn.kv_a_proj_with_mqa.weight"),
        R::AttentionKvANorm => layer("self_attn.kv_a_layernorm.weight"),
        R::RouterBias => SELECTION_BIASES.iter().flat_map(|name| layer(name)).collect(),
        R::AttentionSinks => layer("self_attn.sinks"),
        R::FfnNorm => layer("post_attention_layernorm.weight"),
        R::FfnNormBias => layer("post_attention_layernorm.bias"),
        R::Router => {
            let usual = MOE_BLOCKS.iter().map(|block| format!("{block}.gate.weight"));
            usual.chain(ROUTERS.iter().map(|r| (*r).to_string())).flat_map(|name| layer(&name)).collect()
        }
        R::RouterLogitBias => layer("mlp.router.bias"),
        R::SharedRouter => layer("mlp.shared_expert_gate.weight"),
        R::SharedGate => SHARED_EXPERTS.iter().flat_map(|s| layer(&format!("{s}.gate_proj.weight"))).collect(),
        R::SharedUp => SHARED_EXPERTS.iter().flat_map(|s| layer(&format!("{s}.up_proj.weight"))).collect(),
        R::SharedDown => SHARED_EXPERTS.iter().flat_map(|s| layer(&format!("{s}.down_proj.weight"))).collect(),
        R::DenseGate => [layer("mlp.gate_proj.weight"), layer("feed_forward.gate_proj.weight")].concat(),
        R::DenseUp => [layer("mlp.up_proj.weight"), layer("feed_forward.up_proj.weight")].concat(),
        R::DenseDown => [layer("mlp.down_proj.weight"), layer("feed_forward.down_proj.weight")].concat(),
        // Parts of kv_b_proj (`latent_candidate`), experts (`expert_candidates`), delta rules (`delta_candidate`), and what no family of the table has.
        R::AttentionKB
        | R::AttentionVB
        | R::DeltaQkv
        | R::DeltaGate
        | R::DeltaBeta
        | R::DeltaAlpha
        | R::DeltaBetaAlpha
        | R::DeltaConv
        | R::DeltaDtBias
        | R::DeltaDecay
        | R::DeltaNorm
        | R::PlanOnlyMixer
        | R::ExpertGateBias
        | R::ExpertUpBias
        | R::ExpertDownBias
        | R::LatentDown
        | R::LatentUp
        | R::ExpertGate
        | R::ExpertUp
        | R::ExpertDown => Vec::new(),
    };
    let num_elements = t.shape.iter().product();
    let whole = |tensor| Candidate {
        pieces: vec![Piece { tensor, first_element: 0, num_elements }],
        shape: t.shape.clone(),
        conversion: None,
    };
    names.into_iter().map(whole).collect()
}

/// Names of the shared experts: Qwen, DeepSeek, Hunyuan, Llama-4.
const SHARED_EXPERTS: &[&str] = &["mlp.shared_expert", "mlp.shared_experts", "mlp.shared_mlp", "feed_forward.shared_expert"];

/// Routers with names of their own: gpt-oss, Granite, Hunyuan, Llama-4.
const ROUTERS: &[&str] =
    &["mlp.router.weight", "block_sparse_moe.router.layer.weight", "mlp.gate.wg.weight", "feed_forward.router.weight"];

/// Names of the bias of the choice: DeepSeek-V3, MiniMax-M2, ERNIE-4.5.
const SELECTION_BIASES: &[&str] =
    &["mlp.gate.e_score_correction_bias", "block_sparse_moe.e_score_correction_bias", "mlp.moe_statics.e_score_correction_bias"];

/// Keys' or values' part of `kv_b_proj`, `[num_heads * (nope + v_head_dim), rank]`: each head's rows for keys, then those for values.
fn latent_candidate(geometry: &Geometry, t: &TensorShape) -> Vec<Candidate> {
    let layer = t.layer.unwrap_or(0);
    let Some(Attention::Mla(a)) = geometry.layers.get(layer as usize).map(|l| &l.attention) else { return Vec::new() };
    let [heads, rank, nope, value] = [a.num_heads, a.kv_lora_rank, a.qk_nope_head_dim, a.v_head_dim].map(u64::from);
    let (first_row, rows, conversion) = match t.role {
        TensorRole::AttentionKB => (0, nope, Conversion::transpose(nope, rank)),
        _ => (nope, value, Conversion::Join),
    };
    let piece = |head: u64| Piece {
        tensor: format!("model.layers.{layer}.self_attn.kv_b_proj.weight"),
        first_element: (head * (nope + value) + first_row) * rank,
        num_elements: rows * rank,
    };
    let shape = vec![heads * (nope + value), rank];
    vec![Candidate { pieces: (0..heads).map(piece).collect(), shape, conversion: Some(conversion) }]
}

/// Experts' matrices stored transposed, gate and up in one tensor: gpt-oss (columns in turn, with biases), Llama-4 (one half each).
fn transposed_experts(geometry: &Geometry, t: &TensorShape) -> Vec<Candidate> {
    use TensorRole as R;
    let layer = t.layer.unwrap_or(0);
    let Some(Ffn::Moe(moe)) = geometry.layers.get(layer as usize).map(|l| &l.ffn) else { return Vec::new() };
    let (block, interleaved) = match geometry.architecture.as_str() {
        "gpt-oss" => ("mlp", true),
        "llama4" => ("feed_forward", false),
        _ => return Vec::new(),
    };
    let [experts, inner, hidden] = [moe.num_experts, moe.inner_size, geometry.hidden_size].map(u64::from);
    let (name, rows, cols, is_up) = match t.role {
        R::ExpertGate | R::ExpertGateBias => ("gate_up_proj", hidden, 2 * inner, Some(false)),
        R::ExpertUp | R::ExpertUpBias => ("gate_up_proj", hidden, 2 * inner, Some(true)),
        _ => ("down_proj", inner, hidden, None),
    };
    let bias = t.role.is_expert_bias();
    let rows = if bias { 1 } else { rows };
    let (first, step, count) = match is_up {
        None => (0, 1, cols),
        Some(up) if interleaved => (u64::from(up), 2, inner),
        Some(up) => (if up { inner } else { 0 }, 1, inner),
    };
    let tensor = format!("model.layers.{layer}.{block}.experts.{name}{}", if bias { "_bias" } else { "" });
    let piece = |e| Piece { tensor: tensor.clone(), first_element: e * rows * cols, num_elements: rows * cols };
    let shape = if bias { vec![experts, cols] } else { vec![experts, rows, cols] };
    let conversion = Some(Conversion::Columns { rows, cols, first, step, count });
    vec![Candidate { pieces: (0..experts).map(piece).collect(), shape, conversion }]
}

/// gpt-oss's experts as published: `[experts, rows, groups, 16]` bytes, gate and up rows in turn.
fn mxfp4_experts(geometry: &Geometry, t: &TensorShape) -> Option<Candidate> {
    use TensorRole as R;
    let ([experts, inner, cols], "gpt-oss") = (&t.shape[..], geometry.architecture.as_str()) else { return None };
    let (name, rows, first, step) = match t.role {
        R::ExpertGate => ("gate_up_proj", 2 * inner, 0, 2),
        R::ExpertUp => ("gate_up_proj", 2 * inner, 1, 2),
        R::ExpertDown => ("down_proj", *inner, 0, 1),
        _ => return None,
    };
    let tensor = format!("model.layers.{}.mlp.experts.{name}_blocks", t.layer.unwrap_or(0));
    let (groups, bytes) = (cols / 32, MXFP4_GROUP_BYTES as u64);
    let stored = rows * groups * bytes;
    let piece = |e| Piece { tensor: tensor.clone(), first_element: e * stored, num_elements: stored };
    Some(Candidate {
        pieces: (0..*experts).map(piece).collect(),
        shape: vec![*experts, rows, groups, bytes],
        conversion: Some(Conversion::Rows { rows, first, step, count: *inner }),
    })
}

/// Name of the block that holds router and experts: Qwen and OLMoE, then Mixtral.
const MOE_BLOCKS: &[&str] = &["mlp", "block_sparse_moe"];

fn expert_candidates(geometry: &Geometry, t: &TensorShape) -> Vec<Candidate> {
    let layer = t.layer.unwrap_or(0);
    let Some(Ffn::Moe(moe)) = geometry.layers.get(layer as usize).map(|l| &l.ffn) else { return Vec::new() };
    let [num_experts, rows, cols] = t.shape[..] else { return Vec::new() };
    let (plain, mixtral) = match t.role {
        TensorRole::ExpertGate => ("gate_proj", "w1"),
        TensorRole::ExpertUp => ("up_proj", "w3"),
        _ => ("down_proj", "w2"),
    };
    let mut candidates = Vec::new();
    for block in MOE_BLOCKS {
        let prefix = format!("model.layers.{layer}.{block}.experts");
        for name in [plain, mixtral] {
            let piece = |e| Piece { tensor: format!("{prefix}.{e}.{name}.weight"), first_element: 0, num_elements: rows * cols };
            candidates.push(Candidate {
                pieces: (0..num_experts).map(piece).collect(),
                shape: vec![rows, cols],
                conversion: None,
            });
        }
        // Fused: [experts, 2 * inner, hidden] with the gate rows before the up rows, and [experts, hidden, inner].
        let (stored_rows, first_row) = match t.role {
            TensorRole::ExpertGate => (2 * rows, 0),
            TensorRole::ExpertUp => (2 * rows, u64::from(moe.inner_size)),
            _ => (rows, 0),
        };
        let [plain, granite] = match t.role {
            TensorRole::ExpertDown => ["experts.down_proj", "output_linear.weight"],
            _ => ["experts.gate_up_proj", "input_linear.weight"],
        };
        for name in [plain, granite] {
            let piece = |e: u64| Piece {
                tensor: format!("model.layers.{layer}.{block}.{name}"),
                first_element: (e * stored_rows + first_row) * cols,
                num_elements: rows * cols,
            };
            let shape = vec![num_experts, stored_rows, cols];
            candidates.push(Candidate { pieces: (0..num_experts).map(piece).collect(), shape, conversion: None });
        }
    }
    candidates
}
