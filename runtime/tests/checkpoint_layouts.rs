//! Folders that store a model in another way: text models inside models of more, stretched frequencies that GGUF files hold as tensors,
//! experts that are made at load.

mod family_models;
mod session_common;

use family_models::*;
use serde_json::{Value, json};
use session_common::*;
use std::path::Path;
use tierwise_cost::recipe::Recipe;
use tierwise_runtime::convert::{ConvertOptions, convert};
use tierwise_runtime::import::ModelSource;
use tierwise_runtime::session::{Session, SessionConfig};

fn logits(path: &Path, tokens: &[u32]) -> Vec<f32> {
    session(&open(path), F32_KV).logits_all(tokens).expect("computed").into_raw_vec_and_offset().0
}

/// Renames every tensor and puts the config into `text_config`, as Llama-4 and Qwen3.5 are published, with something of a vision tower.
fn nest(header: &mut Value, config: &mut Value, outer_type: &str, rename: impl Fn(&str) -> String) {
    let tensors = std::mem::take(header.as_object_mut().expect("a table"));
    let renamed = tensors.into_iter().map(|(name, entry)| match name.as_str() {
        "model.layers.0.surprise" => ("vision_model.patch".to_string(), entry),
        _ => (rename(&name), entry),
    });
    *header = Value::Object(renamed.collect());
    let mut text = config.take();
    let tied = text.as_object_mut().expect("a table").remove("tie_word_embeddings");
    *config =
        json!({"model_type": outer_type, "tie_word_embeddings": tied, "text_config": text, "vision_config": {"hidden_size": 8}});
}

#[test]
fn the_text_part_of_llama_4_is_the_text_model() {
    let temporary = tempfile::tempdir().expect("created");
    let tokens: Vec<u32> = (0..30).map(|i| i * 7 % 80).collect();
    for name in ["llama4-1", "llama4-2"] {
        let plain = logits(&write_safetensors(name, temporary.path()), &tokens);
        let folder = rewritten(name, temporary.path(), true, |header, config| {
            nest(header, config, "llama4", |tensor| format!("language_model.{tensor}"));
        });
        assert_eq!(logits(&folder, &tokens), plain, "{name}");
    }
}

/// Llama-4-Scout's frequencies: `rope_freqs.weight` in the file that convert writes.
#[test]
fn stretched_frequencies_are_converted() {
    let temporary = tempfile::tempdir().expect("created");
    let tokens: Vec<u32> = (0..100).map(|i| i * i % 80).collect();
    let folder = rewritten("llama4-gguf", temporary.path(), false, |_, config| {
        config["rope_scaling"] = json!({
            "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
            "original_max_position_embeddings": 16,
        });
    });
    let stretched = logits(&folder, &tokens);
    let out = temporary.path().join("stretched.gguf");
    let options = ConvertOptions {
        recipe: Recipe::by_name("F32").expect("known"),
        roles: Vec::new(),
        allow_requantize: false,
        without_tokenizer: true,
        force: false,
    };
    let source = ModelSource::open(folder.to_str().expect("UTF-8"), None).expect("a model");
    convert(&source, &options, &out, |_, _| {}).unwrap_or_else(|e| panic!("{e}"));
    let difference = max_difference(&logits(&out, &tokens), &stretched);
    assert!(difference <= 1e-4, "{difference}");
    let plain = logits(&write_safetensors("llama4-gguf", temporary.path()), &tokens);
    assert!(max_difference(&plain, &stretched) > 0.1, "the frequencies do not matter");
}

/// Experts that are no run of bytes of a file cannot be read from it while the model runs.
#[test]
fn experts_made_at_load_are_refused_on_disk() {
    let temporary = tempfile::tempdir().expect("created");
    for name in ["gpt_oss-1", "gpt_oss-mxfp4", "llama4-1", "deepseek_v3-fp8"] {
        let model = open(&write_safetensors(name, temporary.path()));
        assert!(model.made_bytes() > 0, "{name}");
        let plan = disk_plan(model.spec(), F32_KV, 2, |_, _| true);
        let error = Session::open(model, &plan, SessionConfig::new(1)).err().unwrap_or_else(|| panic!("{name} runs from disk"));
        let message = error.to_string();
        assert!(message.contains("on disk") && message.contains("tierwise convert"), "{name}: {message}");
    }
    // Those that are runs of bytes are read.
    let model = open(&write_safetensors("mixtral-1", temporary.path()));
    assert_eq!(model.made_bytes(), 0);
    let plan = disk_plan(model.spec(), F32_KV, 2, |_, _| true);
    assert!(Session::open(model, &plan, SessionConfig::new(1)).is_ok());
}
