//! GGUF files of every supported architecture: the geometry read from them, and what is said about broken ones.

use std::path::{Path, PathBuf};
use tierwise_cost::model::{
    Attention, Ffn, Geometry, Gqa, LayerSpec, ModelSpec, Moe, NormKind, QkNorm, Rope, RopePairing, Router, Scales, SharedExperts,
};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::recipe::Recipe;
use tierwise_runtime::gguf::{Gguf, GgufWriter, Value};
use tierwise_runtime::import::gguf::model_spec;

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family)
}

/// A layer of one of the four families, as the golden files' config.json describes it.
fn layer(heads: (u32, u32, u32), theta: f32, pairing: RopePairing, moe: (u32, u32, u32), normalize_topk: bool) -> LayerSpec {
    let (num_heads, num_kv_heads, head_dim) = heads;
    let (num_experts, experts_per_token, inner_size) = moe;
    LayerSpec {
        attention: Attention::Gqa(Gqa::plain(num_heads, num_kv_heads, head_dim, Rope::plain(theta, head_dim, pairing))),
        ffn: Ffn::Moe(Moe::plain(num_experts, experts_per_token, inner_size, Router::softmax(normalize_topk))),
    }
}

fn golden_geometry(family: &str) -> Geometry {
    use RopePairing::{Halves, Interleaved};
    let (architecture, norm_eps, mut layer) = match family {
        "qwen3moe" => ("qwen3moe", 1e-6, layer((4, 2, 16), 1e6, Halves, (6, 2, 40), true)),
        "olmoe" => ("olmoe", 1e-5, layer((4, 4, 8), 1e4, Halves, (8, 3, 24), false)),
        "mixtral" => ("llama", 1e-5, layer((4, 2, 8), 5e5, Interleaved, (5, 2, 48), true)),
        "qwen2moe" => ("qwen2moe", 1e-6, layer((4, 2, 8), 5e4, Halves, (6, 3, 24), false)),
        other => panic!("no golden model {other}"),
    };
    if let (Attention::Gqa(a), Ffn::Moe(m)) = (&mut layer.attention, &mut layer.ffn) {
        match family {
            "qwen3moe" => a.qk_norm = QkNorm::PerHead,
            "olmoe" => a.qk_norm = QkNorm::FullWidth,
            "qwen2moe" => {
                a.qkv_bias = true;
                m.shared = Some(SharedExperts { count: 1, inner_size: 56, sigmoid_gate: true });
            }
            _ => {}
        }
    }
    Geometry {
        name: format!("golden-{family}"),
        architecture: architecture.into(),
        hidden_size: 32,
        vocab_size: 96,
        context_length: 256,
        norm_eps,
        norm: NormKind::Rms,
        tie_word_embeddings: false,
        output_bias: false,
        scales: Scales::default(),
        layers: vec![layer; 2],
    }
}

#[test]
fn golden_files_have_the_geometry_of_their_configs() {
    for family in ["qwen3moe", "olmoe", "mixtral", "qwen2moe"] {
        let gguf = Gguf::open(&golden(family).join("model-bf16.gguf")).unwrap();
        let spec = model_spec(&gguf).unwrap();
        assert_eq!(spec.geometry, golden_geometry(family), "{family}");
        assert_eq!(spec.format_name, "BF16");
        assert_eq!(spec.total_bytes().0, gguf.tensor_bytes(), "{family}");
        for t in &spec.tensors {
            let stored = gguf.tensor(&t.name).unwrap();
            assert_eq!((t.format, t.bytes.0), (stored.format, stored.bytes), "{family} {}", t.name);
        }
    }
}

#[test]
fn trained_files_of_the_same_model_differ_in_format_only() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/models/tiny");
    if !folder.is_dir() {
        println!("skipped: {} is not there", folder.display());
        return;
    }
    let open = |name: &str| model_spec(&Gguf::open(&folder.join(name)).unwrap()).unwrap();
    let specs = [open("tiny-f16.gguf"), open("tiny-q8_0.gguf"), open("tiny-q4_k_m.gguf")];
    assert_eq!(specs.each_ref().map(|s| s.format_name.as_str()), ["F16", "Q8_0", "Q4_K_M"]);
    for spec in &specs {
        assert_eq!(spec.geometry, specs[0].geometry);
        let (_, moe) = spec.moe_layers().next().unwrap();
        assert_eq!((spec.layers.len(), moe.num_experts, moe.experts_per_token, spec.vocab_size), (6, 32, 4, 4096));
    }
    // The recipe gives every tensor the format that llama.cpp's quantiser gave it.
    let planned = ModelSpec::with_recipe(specs[2].geometry.clone(), &Recipe::by_name("Q4_K_M").unwrap()).unwrap();
    for (planned, found) in planned.tensors.iter().zip(&specs[2].tensors) {
        assert_eq!((&planned.name, planned.format), (&found.name, found.format));
    }
}

/// A GGUF file in the making.
struct Draft {
    keys: Vec<(String, Value)>,
    tensors: Vec<(String, Vec<u64>, QuantFormat)>,
}

impl Draft {
    /// The golden model of a family, with zero weights.
    fn new(family: &str) -> Self {
        let gguf = Gguf::open(&golden(family).join("model-bf16.gguf")).unwrap();
        let keys = gguf.metadata().iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        let tensors = gguf.tensors().iter().map(|t| (t.name.clone(), t.shape.clone(), t.format)).collect();
        Self { keys, tensors }
    }

    fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.remove(key);
        self.keys.push((key.to_string(), value.into()));
    }

    fn remove(&mut self, key: &str) {
        self.keys.retain(|(k, _)| k != key);
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Vec<u64>, QuantFormat) {
        self.tensors.iter_mut().find(|(n, _, _)| n == name).unwrap()
    }

    fn read(&self) -> Result<ModelSpec, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("draft.gguf");
        let mut writer = GgufWriter::new(&path, 32).unwrap();
        for (key, value) in &self.keys {
            writer.meta(key, value.clone()).unwrap();
        }
        for (name, shape, format) in &self.tensors {
            writer.tensor(name, shape, *format).unwrap();
        }
        let mut writer = writer.start().unwrap();
        for (name, shape, format) in &self.tensors {
            writer.write(name, &vec![0; format.tensor_bytes(shape).unwrap().0 as usize]).unwrap();
        }
        writer.finish().unwrap();
        let gguf = Gguf::open(&path).map_err(|e| e.to_string())?;
        model_spec(&gguf).map_err(|e| e.to_string())
    }
}

#[test]
fn harmless_variations_are_read() {
    // The shared expert's gate as a matrix of one row; norms in half precision.
    let mut draft = Draft::new("qwen2moe");
    draft.tensor("blk.0.ffn_gate_inp_shexp.weight").1 = vec![1, 32];
    draft.tensor("blk.1.attn_norm.weight").2 = QuantFormat::F16;
    let spec = draft.read().unwrap();
    assert_eq!(spec.geometry, golden_geometry("qwen2moe"));
    // Widths of early conversions: those of all used experts together, and the dense width for the shared expert.
    draft.remove("qwen2moe.expert_feed_forward_length");
    assert_eq!(draft.read().unwrap().geometry, golden_geometry("qwen2moe"));
    // Tied embeddings; one value per layer; scaling that scales nothing; another order of tensors.
    let mut draft = Draft::new("qwen3moe");
    draft.tensors.retain(|(name, _, _)| name != "output.weight");
    draft.tensors.reverse();
    draft.set("qwen3moe.attention.head_count_kv", vec![2u32, 2]);
    draft.set("qwen3moe.rope.scaling.type", "none");
    draft.set("qwen3moe.rope.scaling.factor", 1.0f32);
    let spec = draft.read().unwrap();
    assert_eq!(spec.geometry, Geometry { tie_word_embeddings: true, ..golden_geometry("qwen3moe") });
    assert_eq!(spec.tensors[0].name, "token_embd.weight");
    // A name for people is found elsewhere, and a dense model of the llama family is no mixture.
    let mut draft = Draft::new("mixtral");
    for key in ["general.name", "general.file_type", "llama.expert_count", "llama.expert_used_count"] {
        draft.remove(key);
    }
    draft.tensors.retain(|(name, _, _)| !name.contains("ffn_gate_inp"));
    for (name, shape, _) in &mut draft.tensors {
        if name.contains("_exps") {
            *name = name.replace("_exps", "");
            shape.remove(0);
        }
    }
    let spec = draft.read().unwrap();
    assert_eq!((spec.name.as_str(), spec.format_name.as_str(), spec.moe_layers().count()), ("draft", "BF16", 0));
}

type Break = fn(&mut Draft);

/// What is broken, in which family, how, and what the message must say.
const BROKEN: &[(&str, &str, Break, &[&str])] = &[
    (
        "unknown architecture",
        "qwen3moe",
        |d| d.set("general.architecture", "warbler"),
        &["\"warbler\"", "known: ", "qwen2moe, qwen35moe, qwen3moe"],
    ),
    ("no architecture", "qwen3moe", |d| d.remove("general.architecture"), &["general.architecture"]),
    ("missing key", "qwen3moe", |d| d.remove("qwen3moe.embedding_length"), &["qwen3moe.embedding_length"]),
    ("missing expert count", "olmoe", |d| d.remove("olmoe.expert_count"), &["olmoe.expert_count"]),
    ("missing epsilon", "olmoe", |d| d.remove("olmoe.attention.layer_norm_rms_epsilon"), &["layer_norm_rms_epsilon"]),
    ("key of another type", "olmoe", |d| d.set("olmoe.block_count", "two"), &["olmoe.block_count"]),
    ("no layers", "olmoe", |d| d.set("olmoe.block_count", 0u32), &["olmoe.block_count 0", "1 to 4096"]),
    ("too many layers", "olmoe", |d| d.set("olmoe.block_count", u32::MAX), &["olmoe.block_count 4294967295"]),
    ("number above 32 bits", "olmoe", |d| d.set("olmoe.context_length", 1u64 << 40), &["olmoe.context_length 1099511627776"]),
    ("more experts used than there are", "olmoe", |d| d.set("olmoe.expert_used_count", 9u32), &["experts_per_token 9", "1 to 8"]),
    ("no expert used", "olmoe", |d| d.set("olmoe.expert_used_count", 0u32), &["experts_per_token 0", "1 to 8"]),
    ("no experts", "olmoe", |d| d.set("olmoe.expert_count", 0u32), &["num_experts 0"]),
    ("no heads", "qwen3moe", |d| d.set("qwen3moe.attention.head_count", 0u32), &["num_heads 0"]),
    ("no heads and no width", "olmoe", |d| d.set("olmoe.attention.head_count", 0u32), &["olmoe.attention.head_count 0"]),
    ("heads do not divide", "olmoe", |d| d.set("olmoe.attention.head_count", 5u32), &["olmoe.attention.head_count 5", "divisor"]),
    ("kv heads do not divide", "qwen3moe", |d| d.set("qwen3moe.attention.head_count_kv", 3u32), &["num_kv_heads 3", "divisor"]),
    (
        "as many values as layers are wanted",
        "qwen3moe",
        |d| d.set("qwen3moe.attention.head_count", vec![4u32, 4, 4]),
        &["qwen3moe.attention.head_count"],
    ),
    ("odd rotation", "qwen3moe", |d| d.set("qwen3moe.rope.dimension_count", 15u32), &["rotary_dim 15", "even"]),
    ("epsilon", "qwen3moe", |d| d.set("qwen3moe.attention.layer_norm_rms_epsilon", 2.0f32), &["norm_eps 2"]),
    (
        "rope scaling",
        "qwen3moe",
        |d| d.set("qwen3moe.rope.scaling.type", "yarn"),
        &["rope.scaling.type \"yarn\"", "not implemented"],
    ),
    (
        "linear rope scaling",
        "qwen3moe",
        |d| d.set("qwen3moe.rope.scaling.factor", 4.0f32),
        &["rope.scaling.factor 4", "not implemented"],
    ),
    ("sigmoid routing", "qwen3moe", |d| d.set("qwen3moe.expert_gating_func", 2u32), &["expert_gating_func 2", "softmax"]),
    ("routing groups", "qwen3moe", |d| d.set("qwen3moe.expert_group_count", 8u32), &["expert_group_count 8"]),
    ("routing scale", "qwen3moe", |d| d.set("qwen3moe.expert_weights_scale", 2.5f32), &["expert_weights_scale 2.5"]),
    ("routing norm", "qwen3moe", |d| d.set("qwen3moe.expert_weights_norm", false), &["expert_weights_norm false", "true"]),
    ("other value width", "qwen3moe", |d| d.set("qwen3moe.attention.value_length", 8u32), &["value_length 8", "16"]),
    (
        "missing tensor",
        "qwen3moe",
        |d| d.tensors.retain(|t| t.0 != "blk.1.ffn_norm.weight"),
        &["no tensor blk.1.ffn_norm.weight", "[32]"],
    ),
    ("no embedding", "qwen3moe", |d| d.tensors.retain(|t| t.0 != "token_embd.weight"), &["no tensor token_embd.weight"]),
    (
        "superfluous tensor",
        "qwen3moe",
        |d| d.tensors.push(("blk.0.attn_sinks.weight".into(), vec![4], QuantFormat::F32)),
        &["tensor blk.0.attn_sinks.weight of shape [4]", "qwen3moe with 2 layers"],
    ),
    (
        "bias that the family has not",
        "mixtral",
        |d| d.tensors.push(("blk.0.attn_output.bias".into(), vec![32], QuantFormat::F32)),
        &["blk.0.attn_output.bias", "biases at this place"],
    ),
    (
        "more layers than stated",
        "qwen3moe",
        |d| d.set("qwen3moe.block_count", 1u32),
        &["tensor blk.1.", "and 11 more", "with 1 layers"],
    ),
    (
        "scaled rotary frequencies",
        "mixtral",
        |d| d.tensors.push(("rope_factors_long.weight".into(), vec![4], QuantFormat::F32)),
        &["rope_factors_long.weight", "the two others"],
    ),
    (
        "wrong shape",
        "qwen3moe",
        |d| d.tensor("blk.0.attn_k.weight").1 = vec![16, 32],
        &["tensor blk.0.attn_k.weight of shape [16, 32]", "[32, 32]"],
    ),
    (
        "transposed",
        "olmoe",
        |d| d.tensor("blk.0.ffn_down_exps.weight").1 = vec![8, 24, 32],
        &["blk.0.ffn_down_exps.weight of shape [8, 24, 32]", "[8, 32, 24]"],
    ),
    (
        "width that the experts do not have",
        "qwen3moe",
        |d| d.set("qwen3moe.expert_feed_forward_length", 48u32),
        &["blk.0.ffn_gate_exps.weight of shape [6, 40, 32]", "[6, 48, 32]"],
    ),
    (
        "extra dimension",
        "qwen3moe",
        |d| d.tensor("blk.0.attn_q.weight").1 = vec![1, 64, 32],
        &["blk.0.attn_q.weight of shape [1, 64, 32]"],
    ),
    (
        "quantised norm",
        "qwen3moe",
        |d| d.tensor("blk.0.attn_norm.weight").2 = QuantFormat::Q8_0,
        &["blk.0.attn_norm.weight stored as Q8_0", "F32, F16 or BF16"],
    ),
    (
        "vocabulary of another size",
        "qwen3moe",
        |d| d.set("tokenizer.ggml.tokens", vec!["a".to_string()]),
        &["token_embd.weight with 96 rows", "1 rows", "tokenizer.ggml.tokens"],
    ),
    (
        "one tensor per expert",
        "mixtral",
        |d| {
            d.tensors.retain(|t| !t.0.contains("_exps"));
            for e in 0..5 {
                for (name, shape) in [("gate", vec![48, 32]), ("up", vec![48, 32]), ("down", vec![32, 48])] {
                    d.tensors.push((format!("blk.0.ffn_{name}.{e}.weight"), shape, QuantFormat::BF16));
                }
            }
        },
        &["no tensor blk.0.ffn_gate_exps.weight", "convert the model again"],
    ),
    (
        "fused projections",
        "qwen3moe",
        |d| d.tensor("blk.0.attn_q.weight").0 = "blk.0.attn_qkv.weight".into(),
        &["no tensor blk.0.attn_q.weight", "without fusing"],
    ),
];

#[test]
fn broken_models_are_refused_with_a_reason() {
    for (what, family, break_it, expected) in BROKEN {
        let mut draft = Draft::new(family);
        break_it(&mut draft);
        let message = match draft.read() {
            Ok(spec) => panic!("{what}: was read as {:?}", spec.geometry),
            Err(message) => message,
        };
        for part in *expected {
            assert!(message.contains(part), "{what}: {part:?} is not in {message:?}");
        }
        assert!(message.contains("draft.gguf"), "{what}: no path in {message:?}");
    }
}
