//! `convert` of every family against llama.cpp's converter: the same weights as safetensors and as its GGUF file.
//!
//! `tests/data/families/<family>-gguf` has both (`tools/golden/make_families.py`). Keys and bytes are compared, not only meanings:
//! llama.cpp itself is to load what is written here.

mod family_models;
mod session_common;

use family_models::*;
use session_common::*;
use std::path::Path;
use tierwise_cost::recipe::Recipe;
use tierwise_runtime::convert::{ConvertOptions, convert, role_formats};
use tierwise_runtime::gguf::{Gguf, Value};
use tierwise_runtime::import::ModelSource;

/// Its files hold value heads in another order than checkpoints, which convert does not move.
const NOT_CONVERTED: [&str; 1] = ["qwen3_5_moe-gguf"];

fn options(format: &str) -> ConvertOptions {
    ConvertOptions {
        recipe: Recipe::by_name(format).expect("known"),
        roles: Vec::new(),
        allow_requantize: false,
        without_tokenizer: true,
        force: false,
    }
}

fn convert_folder(folder: &Path, format: &str, out: &Path) {
    let source = ModelSource::open(folder.to_str().expect("UTF-8"), None).expect("a model");
    let mut options = options(format);
    // What is in MXFP4 stays so, bit by bit.
    if source.geometry().architecture == "gpt-oss" && format == "F16" {
        options.roles = role_formats(&["experts=MXFP4".to_string()]).expect("valid");
    }
    let report = convert(&source, &options, out, |_, _| {}).unwrap_or_else(|e| panic!("{}: {e}", out.display()));
    assert!(report.fallbacks.is_empty(), "{:?}", report.fallbacks);
}

/// Keys of theirs that need not be in ours: notes about the file, and settings without an effect.
fn has_no_effect(theirs: &Gguf, key: &str, value: &Value) -> bool {
    let suffix = key.split_once('.').map_or(key, |(_, suffix)| suffix);
    let dense = theirs.tensors().iter().any(|t| t.name.ends_with(".ffn_up.weight"));
    let one = *value == Value::from(1u32);
    match suffix {
        // The converter calls every gpt-oss file MXFP4. Recurrent layers are listed one by one, which the interval does not change.
        "size_label" | "file_type" | "full_attention_interval" => true,
        // One group is none; no layer for multi-token prediction.
        "expert_group_count" | "expert_group_used_count" => one,
        "nextn_predict_layers" => *value == Value::from(0u32),
        // The width of dense layers, in files that have none.
        "feed_forward_length" => !dense,
        _ => false,
    }
}

#[test]
fn files_have_the_keys_and_bytes_of_llama_cpps_converter() {
    let temporary = tempfile::tempdir().expect("a folder");
    let mut compared = Vec::new();
    for name in names(true).into_iter().filter(|n| !NOT_CONVERTED.contains(&n.as_str())) {
        let file = folder().join(&name).join("model-f16.gguf");
        if ModelSource::open(file.to_str().expect("UTF-8"), None).is_err() {
            println!("{name}: left out, its GGUF file is not read");
            continue;
        }
        let folder = write_safetensors(&name, temporary.path());
        let out = temporary.path().join(format!("{name}.gguf"));
        convert_folder(&folder, "F16", &out);
        let theirs = Gguf::open(&file).expect("a file");
        let ours = Gguf::open(&out).expect("a file");
        for (key, value) in theirs.metadata().iter().filter(|(key, _)| !key.starts_with("tokenizer.")) {
            let written = ours.metadata().get(key);
            let near = match (written, value) {
                (Some(Value::F32(a)), Value::F32(b)) => (a - b).abs() <= 1e-6 * b.abs(),
                (Some(a), b) => a == b,
                (None, _) => false,
            };
            assert!(near || has_no_effect(&theirs, key, value), "{name}: {key} is {value:?}, ours {written:?}");
        }
        for t in theirs.tensors() {
            let written = ours.require_tensor(&t.name).expect(&name);
            assert_eq!(written.format, t.format, "{name}: {}", t.name);
            assert!(ours.data(written) == theirs.data(t), "{name}: {} has other bytes", t.name);
        }
        assert_eq!(ours.tensors().len(), theirs.tensors().len(), "{name}");
        println!("{name}: {} keys, {} tensors", ours.metadata().iter().count(), ours.tensors().len());
        compared.push(family(&name).to_string());
    }
    compared.dedup();
    assert!(compared.len() >= 14, "{compared:?}");
}

/// Checkpoints in 8-bit floats, and every way of storing experts: what the file computes is what transformers computes from the folder.
#[test]
fn converted_folders_compute_the_same() {
    let temporary = tempfile::tempdir().expect("a folder");
    for name in [
        "deepseek_v3-fp8",
        "deepseek_v3-1",
        "gpt_oss-1",
        "granitemoe-1",
        "llama4-gguf",
        "glm4_moe-1",
        "ernie4_5_moe-1",
        "phimoe-1",
        "qwen3_next-1",
    ] {
        let out = temporary.path().join(format!("{name}.gguf"));
        convert_folder(&write_safetensors(name, temporary.path()), "F32", &out);
        let reference = json(&folder().join(name).join("reference.json"));
        let model = open(&out);
        let mut s = session(&model, F32_KV);
        let logits = s.logits_all(&ids(&reference["tokens"])).expect("computed");
        let expected = floats(&folder().join(name).join("logits.f32"));
        let difference = max_difference(logits.as_slice().expect("row-major"), &expected);
        println!("{name}: max |difference| {difference:.1e}");
        assert!(difference <= 1e-3, "{name}: {difference}");
    }
}

/// What convert cannot say in a GGUF file: chunks of another length than Llama-4's, value heads in another order.
#[test]
fn models_that_no_file_expresses_are_refused() {
    let temporary = tempfile::tempdir().expect("a folder");
    for (name, told) in [("llama4-1", "cannot express"), ("qwen3_5_moe-1", "qwen3next")] {
        let source = write_safetensors(name, temporary.path());
        let source = ModelSource::open(source.to_str().expect("UTF-8"), None).expect("a model");
        let out = temporary.path().join(format!("{name}.gguf"));
        let message = convert(&source, &options("F16"), &out, |_, _| {}).expect_err("refused").to_string();
        assert!(message.contains(name) && message.contains(told), "{message}");
        assert!(!out.exists());
    }
}
