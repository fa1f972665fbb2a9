//! Hugging Face folders: geometry, tensor mapping, and the same weights as in the GGUF conversion.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tierwise_cost::model::{Attention, Ffn, Geometry, RopePairing, TensorId, TensorRole};
use tierwise_runtime::gguf::Gguf;
use tierwise_runtime::import::gguf::model_spec;
use tierwise_runtime::import::{HfFolder, hf};

const FAMILIES: [&str; 4] = ["qwen3moe", "olmoe", "mixtral", "qwen2moe"];

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family)
}

/// Hugging Face names and pairs rotary dimensions in its own way.
fn as_gguf(mut geometry: Geometry) -> Geometry {
    for layer in &mut geometry.layers {
        if let Attention::Gqa(a) = &mut layer.attention
            && geometry.architecture == "llama"
        {
            a.rope.as_mut().unwrap().pairing = RopePairing::Interleaved;
        }
    }
    geometry.name = format!("golden-{}", geometry.name);
    geometry
}

fn to_f32(bytes: &[u8], format: tierwise_cost::quant::QuantFormat) -> Vec<f32> {
    use tierwise_cost::quant::QuantFormat as F;
    match format {
        F::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        F::BF16 => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect(),
        other => panic!("golden files have no {other}"),
    }
}

#[test]
fn golden_folders_hold_the_weights_of_their_gguf_files() {
    for family in FAMILIES {
        let folder = HfFolder::open(&golden(family)).unwrap();
        let gguf = Gguf::open(&golden(family).join("model-bf16.gguf")).unwrap();
        let spec = model_spec(&gguf).unwrap();
        assert_eq!(as_gguf(folder.spec().geometry.clone()), spec.geometry, "{family}");
        for (i, t) in folder.spec().tensors.iter().enumerate() {
            let pieces = folder.pieces(TensorId(i as u32));
            if t.role.is_routed_expert() {
                assert_eq!(pieces.len() as u64, t.shape[0], "{family} {}", t.name);
            }
            let stored: Vec<f32> = pieces.iter().flat_map(|p| to_f32(folder.bytes(p).unwrap(), t.format)).collect();
            let info = gguf.tensor(&t.name).unwrap();
            let mut converted = to_f32(gguf.data(info), info.format);
            // The converter permutes the rows of these two, see `unpermute`.
            if family == "mixtral" && matches!(t.role, TensorRole::AttentionQ | TensorRole::AttentionK) {
                let Attention::Gqa(a) = &spec.layers[0].attention else { panic!("golden models have GQA") };
                converted = unpermute(&converted, a.head_dim as usize, t.shape[1] as usize);
            }
            assert!(stored == converted, "{family} {}", t.name);
        }
    }
}

/// Rows of each head from pairs (2i, 2i + 1) back to pairs (i, i + head_dim / 2).
fn unpermute(rows: &[f32], head_dim: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows.len()];
    for (from, row) in rows.chunks_exact(cols).enumerate() {
        let (head, within) = (from / head_dim, from % head_dim);
        let to = head * head_dim + within % 2 * (head_dim / 2) + within / 2;
        out[to * cols..(to + 1) * cols].copy_from_slice(row);
    }
    out
}

#[test]
fn the_trained_folder_opens() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/models/tiny");
    if !folder.is_dir() {
        println!("skipped: {} is not there", folder.display());
        return;
    }
    let hf = HfFolder::open(&folder).unwrap();
    let gguf = model_spec(&Gguf::open(&folder.join("tiny-f16.gguf")).unwrap()).unwrap();
    assert_eq!(hf.spec().name, "tiny");
    assert_eq!(Geometry { name: gguf.name.clone(), ..hf.spec().geometry.clone() }, gguf.geometry);
    assert_eq!(hf.spec().format_name, "BF16");
}

fn config(family: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden(family).join("config.json")).unwrap()).unwrap()
}

fn read(config: &Value) -> Result<Geometry, String> {
    hf::geometry(&config.to_string(), Path::new("folder/config.json"), "test").map_err(|e| e.to_string())
}

#[test]
fn both_generations_of_configs_say_the_same() {
    let old = config("qwen3moe");
    let mut new = old.clone();
    let fields = new.as_object_mut().unwrap();
    let theta = fields.remove("rope_theta").unwrap();
    fields.remove("rope_scaling");
    fields.insert("rope_parameters".into(), json!({"rope_type": "default", "rope_theta": theta}));
    let experts = fields.remove("num_experts").unwrap();
    fields.insert("num_local_experts".into(), experts);
    assert_eq!(read(&old), read(&new));
}

#[test]
fn dense_layers_between_sparse_ones_are_described() {
    let mut c = config("qwen3moe");
    c["num_hidden_layers"] = json!(6);
    c["decoder_sparse_step"] = json!(2);
    c["mlp_only_layers"] = json!([3]);
    let moe: Vec<bool> = read(&c).unwrap().layers.iter().map(|l| matches!(l.ffn, Ffn::Moe(_))).collect();
    assert_eq!(moe, [false, true, false, false, false, true]);
}

#[test]
fn windows_are_used_where_the_family_uses_them() {
    let windows = |c: &Value| -> Vec<Option<u32>> {
        let window = |l: &tierwise_cost::model::LayerSpec| match &l.attention {
            Attention::Gqa(a) => a.sliding_window,
            _ => None,
        };
        read(c).unwrap().layers.iter().map(window).collect()
    };
    let mut c = config("qwen2moe");
    c["sliding_window"] = json!(64);
    assert_eq!(windows(&c), [None, None]);
    c["use_sliding_window"] = json!(true);
    assert_eq!(windows(&c), [Some(64), None]);
    let mut c = config("mixtral");
    c["sliding_window"] = json!(64);
    assert_eq!(windows(&c), [Some(64), Some(64)]);
}

#[test]
fn impossible_configs_are_refused_with_a_reason() {
    let cases: &[(&str, &str, Value, &[&str])] = &[
        ("qwen3moe", "model_type", json!("gpt_neox"), &["\"gpt_neox\"", "known: ", "qwen2_moe, qwen3_5_moe_text, qwen3_moe"]),
        ("qwen3moe", "model_type", Value::Null, &["no key model_type"]),
        ("qwen3moe", "hidden_size", Value::Null, &["no key hidden_size"]),
        ("qwen3moe", "hidden_size", json!("32"), &["hidden_size \"32\"", "whole number"]),
        ("qwen3moe", "hidden_size", json!(-32), &["hidden_size -32"]),
        ("qwen3moe", "hidden_size", json!(0), &["hidden_size 0"]),
        ("qwen3moe", "num_hidden_layers", json!(5000), &["num_hidden_layers 5000", "1 to 4096"]),
        ("qwen3moe", "num_attention_heads", json!(0), &["num_heads 0"]),
        ("olmoe", "num_attention_heads", json!(0), &["num_attention_heads 0"]),
        ("qwen3moe", "num_experts_per_tok", json!(7), &["experts_per_token 7", "1 to 6"]),
        ("qwen3moe", "decoder_sparse_step", json!(0), &["decoder_sparse_step 0"]),
        ("qwen3moe", "mlp_only_layers", json!("all"), &["mlp_only_layers \"all\"", "list"]),
        (
            "qwen3moe",
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0}),
            &["rope_scaling of type \"yarn\"", "not implemented"],
        ),
        ("qwen2moe", "rope_parameters", json!({"rope_type": "llama3"}), &["rope_parameters of type \"llama3\""]),
        ("qwen3moe", "attention_bias", json!(true), &["attention_bias true", "not implemented"]),
        ("olmoe", "clip_qkv", json!(8.0), &["clip_qkv 8", "not implemented"]),
        ("mixtral", "hidden_act", json!("gelu"), &["hidden_act \"gelu\"", "silu"]),
    ];
    for (family, key, value, expected) in cases {
        let mut c = config(family);
        c[*key] = value.clone();
        let message = read(&c).expect_err(key);
        for part in *expected {
            assert!(message.contains(part), "{family} {key}: {part:?} is not in {message:?}");
        }
        assert!(message.contains("config.json"), "{message}");
    }
    let message = hf::geometry("{", Path::new("config.json"), "x").unwrap_err().to_string();
    assert!(message.contains("invalid JSON"), "{message}");
}

/// A safetensors file of zeros; the format is a length, a JSON header and the data.
fn write_safetensors(path: &Path, tensors: &[(String, Vec<u64>)]) {
    let (mut header, mut offset) = (serde_json::Map::new(), 0u64);
    for (name, shape) in tensors {
        let bytes = 2 * shape.iter().product::<u64>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + bytes]}));
        offset += bytes;
    }
    let text = Value::Object(header).to_string();
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    // Element i of the file holds its own number, so that pieces can be told apart.
    out.extend((0..offset / 2).flat_map(|i| (i as u16).to_le_bytes()));
    std::fs::write(path, out).unwrap();
}

/// The golden folder of a family with its tensor list changed.
fn changed_folder(family: &str, change: impl Fn(&mut Vec<(String, Vec<u64>)>)) -> Result<HfFolder, String> {
    let golden = HfFolder::open(&golden(family)).unwrap();
    let mut tensors: Vec<(String, Vec<u64>)> =
        golden.weights().tensors().iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
    change(&mut tensors);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config(family).to_string()).unwrap();
    write_safetensors(&dir.path().join("model.safetensors"), &tensors);
    HfFolder::open(dir.path()).map_err(|e| e.to_string())
}

#[test]
fn fused_experts_are_taken_apart() {
    // transformers 5 keeps [experts, 2 * inner, hidden] and [experts, hidden, inner]: inner 40, hidden 32, 6 experts.
    let folder = changed_folder("qwen3moe", |tensors| {
        tensors.retain(|(name, _)| !name.contains(".experts."));
        for layer in 0..2 {
            tensors.push((format!("model.layers.{layer}.mlp.experts.gate_up_proj"), vec![6, 80, 32]));
            tensors.push((format!("model.layers.{layer}.mlp.experts.down_proj"), vec![6, 32, 40]));
        }
    })
    .unwrap();
    let spec = folder.spec();
    for (role, first, step) in
        [(TensorRole::ExpertGate, 0, 80 * 32), (TensorRole::ExpertUp, 40 * 32, 80 * 32), (TensorRole::ExpertDown, 0, 32 * 40)]
    {
        let (id, _) = spec.tensor(Some(1), role).unwrap();
        let pieces = folder.pieces(id);
        assert_eq!(pieces.len(), 6);
        for (e, piece) in pieces.iter().enumerate() {
            assert_eq!((piece.first_element, piece.num_elements), (first + e as u64 * step, 40 * 32), "{role:?} {e}");
        }
        // The bytes are those at that place of the stored tensor.
        let stored = folder.weights().require_tensor(&pieces[2].tensor).unwrap();
        let at = 2 * pieces[2].first_element as usize;
        assert_eq!(folder.bytes(&pieces[2]).unwrap(), &folder.weights().data(stored)[at..at + 2 * 40 * 32]);
    }
}

#[test]
fn folders_that_do_not_fit_their_config_are_refused() {
    type Change = fn(&mut Vec<(String, Vec<u64>)>);
    let cases: &[(&str, &str, Change, &[&str])] = &[
        (
            "missing",
            "olmoe",
            |t| t.retain(|(n, _)| n != "model.norm.weight"),
            &["no tensor for output_norm.weight", "model.norm.weight"],
        ),
        (
            "missing expert",
            "mixtral",
            |t| t.retain(|(n, _)| n != "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
            &["model.layers.1.block_sparse_moe.experts.3.w2.weight"],
        ),
        (
            "superfluous",
            "olmoe",
            |t| t.push(("model.extra.weight".into(), vec![4])),
            &["model.extra.weight of shape [4]", "olmoe"],
        ),
        (
            "wrong shape",
            "qwen3moe",
            |t| t.iter_mut().find(|(n, _)| n == "model.layers.0.self_attn.k_proj.weight").unwrap().1 = vec![16, 32],
            &["k_proj.weight of shape [16, 32]", "[32, 32]"],
        ),
    ];
    for (what, family, change, expected) in cases {
        let message = changed_folder(family, change).expect_err(what);
        for part in *expected {
            assert!(message.contains(part), "{what}: {part:?} is not in {message:?}");
        }
    }
    // Tensors that say nothing new are no reason to refuse.
    changed_folder("mixtral", |t| t.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), vec![4]))).unwrap();
}
