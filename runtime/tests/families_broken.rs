//! Broken checkpoints of the families with references: the message names the tensor or key.

mod family_models;

use family_models::*;
use serde_json::{Value, json};
use std::path::Path;
use tierwise_runtime::gguf::{Gguf, GgufWriter, Value as GgufValue};
use tierwise_runtime::import::ModelSource;
use tierwise_runtime::tokenizer::Tokenizer;

fn message(path: &Path) -> String {
    ModelSource::open(path.to_str().expect("UTF-8"), None).expect_err("refused").to_string()
}

/// Models, and a tensor of each that other families do not have.
const TENSORS: &[(&str, &str)] = &[
    ("deepseek_v2-1", "model.layers.0.self_attn.kv_b_proj.weight"),
    ("deepseek_v3-1", "mlp.gate.e_score_correction_bias"),
    ("deepseek_v3-kimi_k2", "self_attn.kv_a_layernorm.weight"),
    ("deepseek_v3-fp8", "weight_scale_inv"),
    ("glm4_moe-1", "self_attn.q_norm.weight"),
    ("minimax_m2-1", "block_sparse_moe.e_score_correction_bias"),
    ("ernie4_5_moe-1", "mlp.moe_statics.e_score_correction_bias"),
    ("gpt_oss-1", "model.layers.0.self_attn.sinks"),
    ("gpt_oss-1", "model.layers.0.mlp.experts.gate_up_proj_bias"),
    ("gpt_oss-mxfp4", "mlp.experts.gate_up_proj_blocks"),
    ("gpt_oss-mxfp4", "mlp.experts.down_proj_scales"),
    ("granitemoe-1", "block_sparse_moe.router.layer.weight"),
    ("phimoe-1", "model.layers.0.input_layernorm.bias"),
    ("hunyuan_v1_moe-1", "query_layernorm.weight"),
    ("llama4-1", "feed_forward.router.weight"),
];

#[test]
fn missing_extra_and_misshapen_tensors_are_named() {
    let temporary = tempfile::tempdir().expect("created");
    for (name, tensor) in TENSORS {
        let find = |header: &Value| {
            let tensors = header.as_object().expect("a table");
            tensors.keys().find(|t| t.ends_with(tensor)).unwrap_or_else(|| panic!("{name} has no {tensor}")).clone()
        };
        let mut whole = String::new();
        let folder = rewritten(name, temporary.path(), false, |header, _| {
            whole = find(header);
            let tensors = header.as_object_mut().expect("a table");
            let entry = tensors.remove(&whole).expect("found before");
            tensors.insert("model.layers.0.renamed".into(), entry);
        });
        let found = message(&folder);
        assert!(found.contains(&whole), "{name} without {whole}: {found}");

        let folder = rewritten(name, temporary.path(), false, |header, _| {
            let mut shape = header[&whole]["shape"].as_array().expect("a shape").clone();
            // The same number of bytes, so that only the shape is wrong.
            shape.extend([json!(1), json!(1)]);
            header[&whole]["shape"] = shape.into();
        });
        let found = message(&folder);
        assert!(found.contains(&whole) && found.contains(", 1, 1]"), "{name}, {whole} of another shape: {found}");

        let found = message(&rewritten(name, temporary.path(), true, |_, _| {}));
        assert!(found.contains("model.layers.0.surprise"), "{name} with one more: {found}");
    }
}

#[test]
fn rope_scalings_that_nobody_knows_are_named() {
    let temporary = tempfile::tempdir().expect("created");
    let families =
        ["deepseek_v2-1", "deepseek_v3-1", "glm4_moe-1", "minimax_m2-1", "ernie4_5_moe-1", "gpt_oss-1", "granitemoe-1"];
    for name in families.into_iter().chain(["phimoe-1", "hunyuan_v1_moe-1", "llama4-1"]) {
        for key in ["rope_scaling", "rope_parameters"] {
            let folder = rewritten(name, temporary.path(), false, |_, config| {
                let config = config.as_object_mut().expect("a table");
                let theta = config.get("rope_theta").cloned().unwrap_or(json!(1e4));
                config.remove("rope_scaling");
                config.remove("rope_parameters");
                config.insert(key.into(), json!({"rope_type": "wobbly", "type": "wobbly", "factor": 4.0, "rope_theta": theta}));
            });
            let found = message(&folder);
            assert!(found.contains("wobbly") && found.contains("rope"), "{name}, {key}: {found}");
        }
    }
    // The same in GGUF files.
    let mut checked = 0;
    for name in names(true) {
        let path = folder().join(&name).join("model-f16.gguf");
        if ModelSource::open(path.to_str().expect("UTF-8"), None).is_err() {
            continue;
        }
        checked += 1;
        let source = Gguf::open(&path).expect("opened");
        let out = temporary.path().join(format!("{name}.gguf"));
        let key = format!("{}.rope.scaling.type", source.metadata().get_str("general.architecture").expect("it is there"));
        let mut writer = GgufWriter::new(&out, source.alignment()).expect("a valid alignment");
        for (k, value) in source.metadata().iter().filter(|(k, _)| *k != key) {
            writer.meta(k, value.clone()).expect("a valid entry");
        }
        writer.meta(&key, GgufValue::from("wobbly")).expect("a valid entry");
        for t in source.tensors() {
            writer.tensor(&t.name, &t.shape, t.format).expect("a valid tensor");
        }
        let mut writer = writer.start().expect("started");
        for t in source.tensors() {
            writer.write(&t.name, source.data(t)).expect("written");
        }
        writer.finish().expect("finished");
        let found = message(&out);
        assert!(found.contains(&key) && found.contains("wobbly"), "{name}: {found}");
    }
    assert!(checked >= 12, "{checked}");
}

/// Weights without a vocabulary are a model, but not one to chat with.
#[test]
fn a_missing_tokenizer_is_named() {
    let temporary = tempfile::tempdir().expect("created");
    for (name, _) in TENSORS {
        let folder = write_safetensors(name, temporary.path());
        let found = Tokenizer::from_hf_folder(&folder).expect_err(name).to_string();
        assert!(found.contains("tokenizer.json"), "{name}: {found}");
    }
}
