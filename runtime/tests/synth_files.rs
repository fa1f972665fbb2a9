//! Synthetic files: every recipe decodes to weights of the right scale, the same seed gives the same bytes, and the importer
//! reads back the geometry that was asked for.

use std::path::Path;
use tierwise_cost::CostError;
use tierwise_cost::model::{Attention, Ffn, Geometry, QkNorm, TensorRole};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::recipe::Recipe;
use tierwise_runtime::gguf::Gguf;
use tierwise_runtime::import::ModelSource;
use tierwise_runtime::import::gguf::model_spec;
use tierwise_runtime::quant::dequantize_row;
use tierwise_runtime::synth::{SynthReport, synth};

/// A published model with everything made small; widths stay whole K-blocks.
fn small(name: &str) -> Geometry {
    let whole = ModelSource::open(name, None).unwrap().geometry().clone();
    let first_with_experts = whole.layers.iter().position(|l| matches!(l.ffn, Ffn::Moe(_))).unwrap();
    let mut g = whole.truncated((first_with_experts + 1).max(2));
    (g.hidden_size, g.vocab_size, g.context_length) = (256, 1000, 128);
    for layer in &mut g.layers {
        if let Attention::Gqa(a) = &mut layer.attention {
            (a.num_heads, a.num_kv_heads, a.head_dim) = (4, if a.num_kv_heads < a.num_heads { 2 } else { 4 }, 64);
            a.rope.as_mut().unwrap().rotary_dim = 64;
        }
        if let Attention::Mla(a) = &mut layer.attention {
            (a.num_heads, a.kv_lora_rank) = (4, 256);
            a.q_lora_rank = a.q_lora_rank.map(|_| 256);
        }
        if let Ffn::Dense(d) = &mut layer.ffn {
            d.inner_size = 512;
        }
        if let Ffn::Moe(m) = &mut layer.ffn {
            (m.num_experts, m.experts_per_token, m.inner_size) = (8, 2, 256);
            if let Some(s) = &mut m.shared {
                s.inner_size = 512;
            }
        }
    }
    g
}

/// The factor on scores goes through a logarithm in single precision: two models that differ in its last bits are one.
fn same_scale(geometry: &Geometry, of: &Geometry) -> Geometry {
    let mut g = geometry.clone();
    for (layer, other) in g.layers.iter_mut().zip(&of.layers) {
        if let (Attention::Mla(a), Attention::Mla(b)) = (&mut layer.attention, &other.attention) {
            assert_eq!(a.scale.is_some(), b.scale.is_some());
            assert!((a.scale.unwrap_or(1.0) - b.scale.unwrap_or(1.0)).abs() < 1e-6);
            a.scale = b.scale;
        }
    }
    g
}

fn write(geometry: &Geometry, recipe: &str, seed: u64, out: &Path) -> Result<SynthReport, String> {
    synth(geometry, &Recipe::by_name(recipe).unwrap(), seed, out, |_, _| {}).map_err(|e| e.to_string())
}

#[test]
fn files_of_every_family_read_back_as_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let names = [
        "qwen3-30b-a3b",
        "olmoe-1b-7b",
        "mixtral-8x7b",
        "qwen1.5-moe-a2.7b",
        "deepseek-v2-lite",
        "deepseek-v2",
        "kimi-k2",
        "moonlight-16b-a3b",
        "glm-4.5",
        "glm-4.5-air",
        "minimax-m2.5",
        "ernie-4.5-21b-a3b",
        "granite-3.1-3b-a800m",
        "hunyuan-a13b",
        "qwen3-next-80b-a3b",
        "qwen3.5-35b-a3b",
    ];
    for name in names {
        for tied in [false, true] {
            let geometry = Geometry { tie_word_embeddings: tied, ..small(name) };
            let out = dir.path().join("model.gguf");
            let mut calls = Vec::new();
            let recipe = Recipe::by_name("Q4_K_M").unwrap();
            let report = synth(&geometry, &recipe, 1, &out, |done, total| calls.push((done, total))).unwrap();
            let gguf = Gguf::open(&out).unwrap();
            let spec = model_spec(&gguf).unwrap();
            assert_eq!(spec, report.spec, "{name}");
            assert_eq!(spec.geometry, same_scale(&geometry, &spec.geometry), "{name}");
            assert_eq!(gguf.tensor_bytes(), spec.total_bytes().0, "{name}");
            assert_eq!(report.file_bytes, std::fs::metadata(&out).unwrap().len());
            let total = spec.total_bytes().0;
            assert_eq!((calls.first(), calls.last()), (Some(&(0, total)), Some(&(total, total))));
            assert!(calls.is_sorted());
        }
    }
}

/// Mean and standard deviation of a tensor's decoded values.
fn moments(gguf: &Gguf, name: &str) -> (f64, f64) {
    let info = gguf.tensor(name).unwrap();
    let mut values = vec![0.0f32; info.num_elements() as usize];
    dequantize_row(info.format, gguf.data(info), &mut values);
    assert!(values.iter().all(|v| v.is_finite()), "{name}");
    let n = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    (mean, (values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n).sqrt())
}

/// The wanted scale is written down here a second time, from the fan-in.
#[test]
fn weights_of_every_format_have_the_scale_of_an_initialised_network() {
    let dir = tempfile::tempdir().unwrap();
    let mut formats = std::collections::BTreeSet::new();
    for recipe in Recipe::known_names().split(", ") {
        let out = dir.path().join("model.gguf");
        write(&small("qwen1.5-moe-a2.7b"), recipe, 7, &out).unwrap();
        let gguf = Gguf::open(&out).unwrap();
        for t in &model_spec(&gguf).unwrap().tensors {
            let fan_in = *t.shape.last().unwrap() as f64;
            let (wanted_mean, wanted) = match t.role {
                TensorRole::AttentionNorm | TensorRole::FfnNorm | TensorRole::OutputNorm => (1.0, 0.1),
                TensorRole::AttentionQBias | TensorRole::AttentionKBias | TensorRole::AttentionVBias => (0.0, 0.2),
                TensorRole::TokenEmbedding => (0.0, 1.0),
                TensorRole::Output => (0.0, 2.5 / fan_in.sqrt()),
                TensorRole::Router => (0.0, 2.0 / fan_in.sqrt()),
                TensorRole::AttentionOutput => (0.0, 0.3 / fan_in.sqrt()),
                _ => (0.0, 1.0 / fan_in.sqrt()),
            };
            let (mean, std) = moments(&gguf, &t.name);
            // Block scales vary by 15 %: four standard errors, and one percent for the rounding of scales.
            let blocks = t.elements() as f64 / f64::from(t.format.layout().elems);
            let slack = 0.01 + 4.0 * if blocks == t.elements() as f64 { 1.0 } else { 0.15 } / blocks.sqrt();
            let what = format!("{recipe}: {} in {}: mean {mean}, std {std}, wanted {wanted_mean}, {wanted}", t.name, t.format);
            assert!((mean - wanted_mean).abs() <= slack * wanted, "{what}");
            assert!((std / wanted - 1.0).abs() <= slack, "{what}");
            formats.insert(t.format);
        }
    }
    // Every format that a recipe can give, which is all but the one for activations.
    let missing: Vec<_> = QuantFormat::ALL.iter().filter(|f| !formats.contains(f)).collect();
    assert_eq!(missing, [&QuantFormat::Q8_K]);
}

#[test]
fn bytes_depend_on_the_seed_and_not_on_the_threads() {
    let dir = tempfile::tempdir().unwrap();
    // More than one window of 16 MiB in a tensor, so that windows and chunks are crossed.
    let mut geometry = small("olmoe-1b-7b");
    geometry.vocab_size = 40_000;
    let make = |name: &str, threads: usize, seed: u64| {
        let out = dir.path().join(name);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| write(&geometry, "F16", seed, &out)).unwrap();
        std::fs::read(out).unwrap()
    };
    let one = make("one", 1, 5);
    assert!(one == make("three", 3, 5));
    let other = make("other", 2, 6);
    assert_eq!(one.len(), other.len());
    assert!(one != other);
    // No part of a tensor repeats another: the embedding's first and last rows of every window differ.
    let gguf = Gguf::open(&dir.path().join("one")).unwrap();
    let data = gguf.data(gguf.tensor("token_embd.weight").unwrap());
    let starts: std::collections::HashSet<&[u8]> = data.chunks(1 << 20).map(|c| &c[..64]).collect();
    assert_eq!(starts.len(), data.len().div_ceil(1 << 20));
}

#[test]
fn what_cannot_be_written_is_refused_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model.gguf");
    let built_in = |name: &str| ModelSource::open(name, None).unwrap().geometry().clone();
    let changed = |change: fn(&mut Geometry)| {
        let mut g = small("qwen3-30b-a3b");
        change(&mut g);
        g
    };
    let cases: &[(&str, Geometry, &[&str])] = &[
        ("another family", built_in("step-3.7-flash"), &["step35", "cannot write yet", "olmoe"]),
        ("a hybrid", built_in("jamba-mini-1.6"), &["jamba", "cannot write yet"]),
        ("a tiny vocabulary", changed(|g| g.vocab_size = 100), &["vocab_size", "100", "259"]),
        ("layers of two kinds", changed(|g| g.layers[1] = small("olmoe-1b-7b").layers[0].clone()), &["several kinds"]),
        ("no layers", changed(|g| g.layers.clear()), &["without routed experts"]),
        (
            "a norm that the family has not",
            changed(|g| {
                for l in &mut g.layers {
                    if let Attention::Gqa(a) = &mut l.attention {
                        a.qk_norm = QkNorm::None;
                    }
                }
            }),
            &["cannot express", "attn_q_norm"],
        ),
        (
            "routing that the family has not",
            changed(|g| {
                for l in &mut g.layers {
                    if let Ffn::Moe(m) = &mut l.ffn {
                        m.router.normalize_topk = false;
                    }
                }
            }),
            &["cannot express", "prescribes"],
        ),
        ("no width", changed(|g| g.hidden_size = 0), &["hidden_size"]),
    ];
    for (what, geometry, expected) in cases {
        let message = write(geometry, "Q4_K_M", 1, &out).expect_err(what);
        for part in *expected {
            assert!(message.contains(part), "{what}: {part:?} is not in {message:?}");
        }
    }
    let message = write(&small("olmoe-1b-7b"), "Q4_0", 1, &dir.path().join("absent/model.gguf")).unwrap_err();
    assert!(message.contains("absent"), "{message}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(matches!(Recipe::by_name("Q9"), Err(CostError::UnknownFormat { .. })));
}
