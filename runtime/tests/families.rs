//! Every model family against `transformers`: tiny random models of awkward shapes, from safetensors and from llama.cpp's converter.
//!
//! References and their origin: `tests/data/families`, made by `tools/golden/make_families.py`. A family with references that is not in
//! [`SUPPORTED`] must be refused by name, so support means: add the name, and everything here passes.

mod families_page;
mod family_models;
mod session_common;

use family_models::*;
use serde_json::Value;
use session_common::*;
use std::path::Path;
use std::sync::Arc;
use tierwise_cost::quant::QuantFormat;
use tierwise_runtime::RuntimeError;
use tierwise_runtime::exec::reference;
use tierwise_runtime::import::ModelSource;
use tierwise_runtime::session::{Model, Session};

/// Families that must run. The others must be refused as unknown architectures.
const SUPPORTED: &[&str] = &[
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "llama4",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
];

/// The model when it must run; else checks that it is refused.
fn open_or_refused(name: &str, path: &Path) -> Option<Arc<Model>> {
    if SUPPORTED.contains(&family(name)) {
        return Some(open(path));
    }
    let error = ModelSource::open(path.to_str().expect("UTF-8"), None).expect_err(name);
    let of_config = matches!(&error, RuntimeError::UnknownArchitecture { path, .. } if path.ends_with("config.json"));
    let of_gguf = matches!(&error, RuntimeError::UnknownArchitecture { path: p, .. } if p == path);
    assert!(of_config || of_gguf, "{name}: {error}");
    println!("{name}: refused, {error}");
    None
}

/// Share of the reference's choices that are ours too; their order is not compared.
fn equal_choices(captured: &[Vec<Vec<u32>>], reference: &Value) -> f64 {
    let (mut equal, mut total) = (0u32, 0u32);
    for layer in reference.as_array().expect("a list") {
        let ours = &captured[layer["layer"].as_u64().expect("a layer") as usize];
        let theirs = layer["experts"].as_array().expect("a list");
        assert_eq!(ours.len(), theirs.len(), "tokens of a layer");
        for (ours, theirs) in ours.iter().zip(theirs) {
            let theirs = ids(theirs);
            total += theirs.len() as u32;
            equal += theirs.iter().filter(|e| ours.contains(e)).count() as u32;
        }
    }
    assert!(total > 0, "the reference has router choices");
    f64::from(equal) / f64::from(total)
}

/// Largest difference of the weights by which experts' outputs are multiplied. Compared by expert, not by place.
fn weight_difference(session: &mut Session, tokens: &[u32], reference: &Value) -> f32 {
    session.reset();
    session.take_routing();
    session.prefill(tokens).expect("computed");
    let captured = session.take_routing();
    let mut worst = 0.0f32;
    for layer in reference.as_array().expect("a list") {
        let number = layer["layer"].as_u64().expect("a layer") as u32;
        let rows = layer["experts"].as_array().expect("a list").iter().zip(layer["weights"].as_array().expect("a list"));
        let ours = captured.iter().filter(|c| c.layer == number).flat_map(|c| {
            let k = c.routing.experts_per_token;
            c.routing.experts.chunks(k).zip(c.routing.weights.chunks(k))
        });
        for ((experts, weights), (our_experts, our_weights)) in rows.zip(ours) {
            let weights = weights.as_array().expect("a list").iter().map(|w| w.as_f64().expect("a number") as f32);
            for (expert, weight) in ids(experts).iter().zip(weights) {
                let ours = our_experts.iter().position(|e| e == expert).map_or(f32::INFINITY, |place| our_weights[place]);
                worst = worst.max((ours - weight).abs());
            }
        }
    }
    worst
}

#[test]
fn safetensors_agree_with_transformers() {
    let temporary = tempfile::tempdir().expect("created");
    let mut run = Vec::new();
    for name in names(false) {
        let path = write_safetensors(&name, temporary.path());
        let Some(model) = open_or_refused(&name, &path) else { continue };
        run.push(name.clone());
        let reference = json(&folder().join(&name).join("reference.json"));
        let tokens = ids(&reference["tokens"]);
        let mut s = session(&model, F32_KV);
        let logits = s.logits_all(&tokens).expect("computed");
        let expected = floats(&folder().join(&name).join("logits.f32"));
        let mut difference = max_difference(logits.as_slice().expect("row-major"), &expected);
        let exact = reference::run(&model, &tokens).expect("computed").logits.mapv(|x| x as f32);
        let slow = max_difference(exact.as_slice().expect("row-major"), &expected);
        assert!(slow <= 1e-3, "{name}: the slow executor: {slow}");
        if model.spec().tensors.iter().any(|t| t.format == QuantFormat::MXFP4) {
            // Products with 4-bit weights round activations to 8 bits, which says nothing about the weights: those are compared by the
            // slow executor, which rounds nothing, and the fast one as files of quantised weights are.
            for (ours, theirs) in logits.rows().into_iter().zip(expected.chunks_exact(logits.ncols())) {
                let cosine = cosine(ours.as_slice().expect("row-major"), theirs);
                assert!(cosine >= 0.999, "{name}: {cosine}");
            }
            difference = slow;
        }
        let choices = equal_choices(&captured_experts(&s.take_routing(), model.spec().layers.len()), &reference["routing"]);
        let weights = weight_difference(&mut s, &tokens, &reference["routing"]);
        println!("{name}: max |difference| {difference:.1e}, router choices {:.2} %, weights {weights:.1e}", 100.0 * choices);
        assert!(difference <= 1e-3, "{name}: {difference}");
        assert!(choices >= 0.999, "{name}: {choices}");
        assert!(weights <= 1e-4, "{name}: {weights}");
        let continuation = ids(&reference["greedy"]["tokens"]);
        assert_eq!(greedy(&mut s, &ids(&reference["greedy"]["prompt"]), continuation.len()), continuation, "{name}");
    }
    for wanted in SUPPORTED {
        assert!(run.iter().filter(|name| family(name) == *wanted).count() >= 2, "{wanted} in {run:?}");
    }
}

/// How near the logits of a file are to the reference.
struct Nearness {
    /// Share of positions at which every layer makes the reference's router choices. Elsewhere logits say nothing about the arithmetic.
    same_choices: f64,
    /// Smallest cosine at those positions.
    worst: f64,
    /// Mean cosine at those positions.
    mean: f64,
}

fn nearness(name: &str, path: &Path) -> Nearness {
    let reference = json(&folder().join(name).join("reference.json"));
    let tokens = ids(&reference["tokens"]);
    let model = open(path);
    let mut s = session(&model, F32_KV);
    let logits = s.logits_all(&tokens).expect("computed");
    let captured = captured_experts(&s.take_routing(), model.spec().layers.len());
    let expected = floats(&folder().join(name).join("logits.f32"));
    assert_eq!(expected.len(), logits.len(), "{name}");
    let (mut worst, mut sum, mut same) = (1.0, 0.0, 0u32);
    for (position, (ours, theirs)) in logits.rows().into_iter().zip(expected.chunks_exact(logits.ncols())).enumerate() {
        let equal = reference["routing"].as_array().expect("a list").iter().all(|layer| {
            let chosen = &captured[layer["layer"].as_u64().expect("a layer") as usize][position];
            ids(&layer["experts"][position]).iter().all(|e| chosen.contains(e))
        });
        if equal {
            same += 1;
            let cosine = cosine(ours.as_slice().expect("row-major"), theirs);
            sum += cosine;
            worst = if cosine < worst || cosine.is_nan() { cosine } else { worst };
        }
    }
    Nearness { same_choices: f64::from(same) / tokens.len() as f64, worst, mean: sum / f64::from(same.max(1)) }
}

#[test]
fn gguf_f16_and_q8_0_agree_with_transformers() {
    let temporary = tempfile::tempdir().expect("created");
    let mut run = Vec::new();
    for name in names(true) {
        let f16 = folder().join(&name).join("model-f16.gguf");
        if open_or_refused(&name, &f16).is_none() {
            continue;
        }
        let q8_0 = temporary.path().join(format!("{name}-q8_0.gguf"));
        write_q8_0(&f16, &q8_0);
        let (exact, quantised) = (nearness(&name, &f16), nearness(&name, &q8_0));
        for (format, n) in [("F16", &exact), ("Q8_0", &quantised)] {
            println!(
                "{name} {format}: cosine worst {:.6}, mean {:.6}, same choices {:.1} %",
                n.worst,
                n.mean,
                100.0 * n.same_choices
            );
        }
        assert!(exact.worst >= 0.9999 && exact.same_choices >= 1.0, "{name} F16: {}, {}", exact.worst, exact.same_choices);
        // 8-bit weights and activations of rows of 32 and 64 elements, where errors hardly average out: the worst position is allowed more.
        assert!(
            quantised.mean >= 0.999 && quantised.worst >= 0.99,
            "{name} Q8_0: mean {}, worst {}",
            quantised.mean,
            quantised.worst
        );
        assert!(quantised.same_choices >= 0.9, "{name} Q8_0: {}", quantised.same_choices);
        run.push(name);
    }
    for wanted in SUPPORTED {
        assert!(run.iter().any(|name| family(name) == *wanted), "{wanted} in {run:?}");
    }
}

/// Chunks of a prompt, single tokens and going back and on again give the logits of one pass.
#[test]
fn chunks_and_steps_do_not_change_logits() {
    let temporary = tempfile::tempdir().expect("created");
    let safetensors = names(false).into_iter().map(|n| (write_safetensors(&n, temporary.path()), n));
    let files = names(true).into_iter().map(|n| (folder().join(&n).join("model-f16.gguf"), n));
    for (path, name) in safetensors.chain(files) {
        let Some(model) = open_or_refused(&name, &path) else { continue };
        let vocab = model.spec().vocab_size;
        // Kernels for many tokens add in another order than those for few; a recurrent state carries that through all later tokens, and
        // with quantised weights a last bit can decide to which side an activation is rounded. In float32 nothing of this happens.
        let has = |what: fn(QuantFormat) -> bool| model.spec().tensors.iter().any(|t| what(t.format));
        let bound = match () {
            () if has(|f| f.layout().elems > 1) => 1e-2,
            () if has(|f| f != QuantFormat::F32) => 5e-4,
            () => 1e-4,
        };
        let tokens: Vec<u32> = (0..100u32).map(|i| (i * i * 31 + i * 7 + 3) % vocab).collect();
        let logits_of = |options| session(&model, options).logits_all(&tokens).expect("computed").into_raw_vec_and_offset().0;
        let whole = logits_of(F32_KV);
        for chunk in [1, 7, 64] {
            let difference = max_difference(&logits_of(PlanOptions { chunk, ..F32_KV }), &whole);
            assert!(difference <= bound, "{name}: chunks of {chunk}: {difference}");
        }
        let mut s = session(&model, F32_KV);
        s.prefill(&tokens[..50]).expect("computed");
        for (i, token) in tokens.iter().enumerate().skip(50) {
            let expected = &whole[i * vocab as usize..(i + 1) * vocab as usize];
            let difference = max_difference(s.decode(*token).expect("computed"), expected);
            assert!(difference <= bound, "{name}: token {i}: {difference}");
        }
        s.truncate(30);
        let again = s.prefill(&tokens[30..]).expect("computed");
        let difference = max_difference(again, &whole[99 * vocab as usize..]);
        assert!(difference <= bound, "{name}: after going back: {difference}");
    }
}

/// Several sequences of one model, a step of one after a step of the other: the same bits as each alone, also after one of them ended.
#[test]
fn sequences_side_by_side_do_not_disturb_each_other() {
    let temporary = tempfile::tempdir().expect("created");
    for name in names(false) {
        let Some(model) = open_or_refused(&name, &write_safetensors(&name, temporary.path())) else { continue };
        let vocab = model.spec().vocab_size;
        let sequences: Vec<Vec<u32>> =
            (0..3u32).map(|s| (0..24u32).map(|i| (i * i * 13 + i * 5 + 29 * s) % vocab).collect()).collect();
        let alone = |tokens: &[u32]| session(&model, F32_KV).logits_all(tokens).expect("computed").into_raw_vec_and_offset().0;
        let expected: Vec<Vec<f32>> = sequences.iter().map(|tokens| alone(tokens)).collect();
        let mut together: Vec<Session> = sequences.iter().map(|_| session(&model, F32_KV)).collect();
        for (i, _) in sequences[0].iter().enumerate() {
            for (number, (s, tokens)) in together.iter_mut().zip(&sequences).enumerate() {
                // The first sequence ends early and starts again.
                let at = if number == 0 { i % 15 } else { i };
                if at == 0 {
                    s.reset();
                }
                let row = at * vocab as usize..(at + 1) * vocab as usize;
                let difference = max_difference(s.decode(tokens[at]).expect("computed"), &expected[number][row]);
                assert!(difference <= 1e-4, "{name}: sequence {number}, token {i}: {difference}");
            }
        }
    }
}
