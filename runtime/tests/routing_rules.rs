//! Routing rules that no published model has: a number of experts that differs from token to token and from layer to layer, and experts that
//! are applied several times. Compared with a decoder written for it in PyTorch (`tools/golden/make_routing_rules.py`).

mod family_models;
mod session_common;

use family_models::write_safetensors_of;
use serde_json::Value;
use session_common::*;
use std::path::{Path, PathBuf};
use tierwise_cost::cost::{op_work, step_work};
use tierwise_cost::model::Moe;
use tierwise_cost::op::{Batch, lower};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::recipe::Recipe;
use tierwise_runtime::convert::{ConvertOptions, convert};
use tierwise_runtime::exec::executor::CapturedRouting;
use tierwise_runtime::exec::reference;
use tierwise_runtime::exec::route::NO_EXPERT;
use tierwise_runtime::import::ModelSource;
use tierwise_runtime::session::{Session, SessionConfig};

const MODELS: [&str; 4] = ["top_p", "dynamoe", "chain", "chain_top_p"];

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/routing_rules").join(name)
}

/// Choices and weights of one pass: per layer and iteration, per token. Every layer's iterations follow each other.
fn choices(captured: &[CapturedRouting]) -> Vec<Vec<(Vec<u32>, Vec<f32>)>> {
    let of_token = |(experts, weights): (&[u32], &[f32])| {
        let count = experts.iter().take_while(|e| **e != NO_EXPERT).count();
        assert!(experts[count..].iter().all(|e| *e == NO_EXPERT) && weights[count..].iter().all(|w| *w == 0.0));
        (experts[..count].to_vec(), weights[..count].to_vec())
    };
    let rows = |c: &CapturedRouting| {
        let k = c.routing.experts_per_token;
        c.routing.experts.chunks(k).zip(c.routing.weights.chunks(k)).map(of_token).collect()
    };
    captured.iter().map(rows).collect()
}

#[test]
fn logits_choices_and_text_are_those_of_the_other_implementation() {
    let temporary = tempfile::tempdir().expect("created");
    for name in MODELS {
        let model = open(&write_safetensors_of(&source(name), temporary.path()));
        let reference = json(&source(name).join("reference.json"));
        let (tokens, expected) = (ids(&reference["tokens"]), floats(&source(name).join("logits.f32")));
        let mut s = session(&model, F32_KV);
        let logits = s.logits_all(&tokens).expect("computed").into_raw_vec_and_offset().0;
        let difference = max_difference(&logits, &expected);
        let slow = reference::run(&model, &tokens).expect("computed").logits.mapv(|x| x as f32);
        let slow = max_difference(slow.as_slice().expect("row-major"), &expected);
        println!("{name}: max |difference| {difference:.1e}, of the slow executor {slow:.1e}");
        // Iterations with an inner residual let the rounding of both implementations grow.
        assert!(difference <= 1e-3 && slow <= 1e-3, "{name}: {difference}, {slow}");

        let theirs = reference["routing"].as_array().expect("a list");
        let ours = choices(&s.take_routing());
        assert_eq!(ours.len(), theirs.len(), "{name}: layers times iterations");
        for (ours, theirs) in ours.iter().zip(theirs) {
            let rows = |key: &str| theirs[key].as_array().expect("a list").clone();
            for ((ours, experts), weights) in ours.iter().zip(rows("experts")).zip(rows("weights")) {
                assert_eq!(ours.0, ids(&experts), "{name}");
                let weights = weights.as_array().expect("a list").iter().map(|w| Value::as_f64(w).expect("a number") as f32);
                assert!(ours.1.iter().zip(weights).all(|(a, b)| (a - b).abs() < 1e-4), "{name}");
            }
        }
        let continuation = ids(&reference["greedy"]["tokens"]);
        assert_eq!(greedy(&mut s, &ids(&reference["greedy"]["prompt"]), continuation.len()), continuation, "{name}");
        for chunk in [1, 7, 64] {
            let chunked = session(&model, PlanOptions { chunk, ..F32_KV }).logits_all(&tokens).expect("computed");
            let difference = max_difference(chunked.as_slice().expect("row-major"), &logits);
            assert!(difference <= 1e-4, "{name}: chunks of {chunk}: {difference}");
        }
    }
}

/// A GGUF file says the same, and the engine may load the experts: of an iterated layer several times in a step.
#[test]
fn files_and_experts_on_disk_compute_the_same() {
    let temporary = tempfile::tempdir().expect("created");
    for name in MODELS {
        let folder = write_safetensors_of(&source(name), temporary.path());
        let file = temporary.path().join(format!("{name}.gguf"));
        let options = ConvertOptions {
            recipe: Recipe::by_name("F32").expect("known"),
            roles: Vec::new(),
            allow_requantize: false,
            without_tokenizer: true,
            force: false,
        };
        let opened = ModelSource::open(folder.to_str().expect("UTF-8"), None).expect("a model");
        convert(&opened, &options, &file, |_, _| {}).unwrap_or_else(|e| panic!("{name}: {e}"));
        let tokens = ids(&json(&source(name).join("reference.json"))["tokens"]);
        let expected = floats(&source(name).join("logits.f32"));
        let model = open(&file);
        assert_eq!(model.spec().geometry.layers, opened.geometry().layers, "{name}");
        let in_memory = session(&model, F32_KV).logits_all(&tokens).expect("computed").into_raw_vec_and_offset().0;
        assert!(max_difference(&in_memory, &expected) <= 1e-3, "{name}");
        for slots in [1, 2] {
            let plan = disk_plan(model.spec(), F32_KV, slots, |_, expert| expert != 1);
            let mut s = Session::open(model.clone(), &plan, SessionConfig::new(2)).unwrap_or_else(|e| panic!("{name}: {e}"));
            let mut logits = s.prefill(&tokens[..30]).expect("computed").to_vec();
            for (i, token) in tokens.iter().enumerate().skip(30) {
                let at = i * model.spec().vocab_size as usize;
                let before = &in_memory[at - logits.len()..at];
                assert!(max_difference(&logits, before) <= 1e-4, "{name}: {slots} slots, before token {i}");
                logits = s.decode(*token).expect("computed").to_vec();
            }
        }
    }
}

/// The cost model counts what the lowering does: every iteration, and as many experts as tokens have on average.
#[test]
fn costs_count_iterations_and_the_mean_number_of_experts() {
    let temporary = tempfile::tempdir().expect("created");
    for name in MODELS {
        let model = open(&write_safetensors_of(&source(name), temporary.path()));
        let spec = model.spec();
        let reference = json(&source(name).join("reference.json"));
        for batch in [Batch::decode(10), Batch { tokens: 7, past: 0, sequences: 1, logits: 7 }] {
            let total = step_work(spec, batch, QuantFormat::F16).total();
            let ops = lower(spec, batch).expect("executable");
            let sum: f64 = ops.iter().map(|op| op_work(spec, op, batch, QuantFormat::F16).flops).sum();
            assert!((sum / total.flops - 1.0).abs() < 1e-6, "{name}: {sum} {}", total.flops);
        }
        let layers: Vec<(u32, &Moe)> = spec.moe_layers().collect();
        let decode = step_work(spec, Batch::decode(10), QuantFormat::F16);
        for (layer, moe) in layers {
            let rows: Vec<&Value> =
                reference["routing"].as_array().expect("a list").iter().filter(|r| r["layer"] == layer).collect();
            let number = |r: &&Value| r["experts"].as_array().expect("a list").iter().map(|e| ids(e).len()).sum::<usize>();
            let chosen: usize = rows.iter().map(number).sum();
            let mean = chosen as f64 / 40.0 / f64::from(moe.iterations);
            assert!((moe.mean_choices() - mean).abs() < 1e-3, "{name}, layer {layer}: {} {mean}", moe.mean_choices());
            // A token's experts are read once per iteration.
            let per_expert = spec.layer_bytes()[layer as usize].per_expert.0 as f64;
            let read = decode.layers[layer as usize].routed.weight_bytes.0 as f64 / per_expert / f64::from(moe.iterations);
            assert!((read - mean).abs() < 1e-2, "{name}, layer {layer}: {read} {mean}");
        }
    }
}
