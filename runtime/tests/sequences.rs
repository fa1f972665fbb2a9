//! Several sequences in one session, computed together: the logits of each are those of the sequence alone, whatever else is in the step.
//!
//! The oracles: every family's own session of one sequence (one pass over all tokens), and the slow executor. A step of few rows must give
//! the same bits, since the kernels for few rows promise that; larger ones differ by the order of f32 additions.

#[allow(dead_code, reason = "the models are used as they are committed")]
mod family_models;
mod session_common;

use family_models::*;
use ndarray::{Array2, s};
use proptest::prelude::*;
use session_common::*;
use std::sync::Arc;
use tierwise_cost::model::{Attention, Geometry, ModelSpec};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::recipe::Recipe;
use tierwise_planner::engine::Input;
use tierwise_runtime::RuntimeError;
use tierwise_runtime::backend::reference::ReferenceBackend;
use tierwise_runtime::exec::attention::{OfSequence, attention, attention_of};
use tierwise_runtime::exec::kv_cache::KvCache;
use tierwise_runtime::exec::reference;
use tierwise_runtime::exec::threads::Threads;
use tierwise_runtime::session::verify::verify;
use tierwise_runtime::session::{Model, SequenceId, Session, SessionConfig};

/// Room for so many sequences; chunks that a step of several prompts exceeds.
const OPTIONS: PlanOptions = PlanOptions { context: 64, chunk: 24, batch: 5, ..F32_KV };

/// Texts that share a prefix of four tokens and have different lengths.
fn texts(model: &Model, count: u32) -> Vec<Vec<u32>> {
    let vocab = model.spec().vocab_size;
    let token = |s: u32, i: u32| if i < 4 { 7 * i + 2 } else { i * i * 13 + i * 5 + 29 * s };
    (0..count).map(|s| (0..40 - 5 * s).map(|i| token(s, i) % vocab).collect()).collect()
}

/// Logits of every token of a text, computed alone in one pass: `[tokens, vocab_size]`.
fn alone(model: &Arc<Model>, text: &[u32]) -> Vec<f32> {
    let options = PlanOptions { chunk: 512, batch: 1, ..OPTIONS };
    session(model, options).logits_all(text).expect("computed").into_raw_vec_and_offset().0
}

/// A sequence of a session and what it is to become.
struct Running {
    id: SequenceId,
    text: usize,
    at: usize,
}

/// One session whose sequences work through texts, a text after another.
struct Together {
    session: Session,
    texts: Vec<Vec<u32>>,
    /// Of each text: `[tokens, vocab_size]`.
    expected: Vec<Vec<f32>>,
    running: Vec<Running>,
    /// Rows of logits that were compared, and the largest difference.
    compared: usize,
    worst: f32,
}

impl Together {
    fn new(model: &Arc<Model>, count: usize) -> Self {
        let texts = texts(model, 5);
        let expected = texts.iter().map(|t| alone(model, t)).collect();
        let mut session =
            Session::open(Arc::clone(model), &ram_plan(model.spec(), OPTIONS), SessionConfig::new(2)).expect("opened");
        let mut running = vec![Running { id: SequenceId::FIRST, text: 0, at: 0 }];
        for text in 1..count {
            running.push(Running { id: session.add_sequence().expect("planned"), text, at: 0 });
        }
        Self { session, texts, expected, running, compared: 0, worst: 0.0 }
    }

    /// So many tokens of each sequence (0: it waits), then the logits of each are compared.
    fn step(&mut self, counts: &[usize]) {
        let mut parts: Vec<(SequenceId, &[u32])> = Vec::new();
        let mut ends = Vec::new();
        for (r, count) in self.running.iter_mut().zip(counts) {
            let text = &self.texts[r.text];
            let end = text.len().min(r.at + count);
            if end > r.at {
                parts.push((r.id, &text[r.at..end]));
                ends.push((r.text, end));
                r.at = end;
            }
        }
        if parts.is_empty() {
            return;
        }
        let logits = self.session.step(&parts).expect("computed");
        assert_eq!(logits.nrows(), parts.len());
        for (row, (text, end)) in logits.rows().into_iter().zip(ends) {
            let vocab = row.len();
            let expected = &self.expected[text][(end - 1) * vocab..end * vocab];
            self.compared += 1;
            self.worst = self.worst.max(max_difference(row.as_slice().expect("row-major"), expected));
        }
    }

    /// Goes back by a third.
    fn go_back(&mut self, which: usize) {
        let r = &mut self.running[which];
        r.at = r.at * 2 / 3;
        self.session.truncate_sequence(r.id, r.at).expect("there");
        assert_eq!(self.session.sequence_len(r.id).expect("there"), r.at);
    }

    /// Ends a sequence and begins another text in its place.
    fn replace(&mut self, which: usize, text: usize) {
        let r = &mut self.running[which];
        if r.id == SequenceId::FIRST {
            self.session.reset();
        } else {
            self.session.remove_sequence(r.id).expect("there");
            r.id = self.session.add_sequence().expect("there is room again");
        }
        (r.text, r.at) = (text, 0);
    }
}

/// Safetensors in F32 and GGUF files in F16 of every family.
fn every_model(run: &mut dyn FnMut(&str, &Arc<Model>)) {
    let temporary = tempfile::tempdir().expect("created");
    for name in names(false) {
        run(&name, &open(&write_safetensors(&name, temporary.path())));
    }
    for name in names(true) {
        run(&name, &open(&folder().join(&name).join("model-f16.gguf")));
    }
}

/// Prompts beside decoding, chunks of 7 and more than the plan's chunk, going back, ending and beginning anew.
#[test]
fn sequences_of_every_family_get_the_logits_of_each_alone() {
    every_model(&mut |name, model| {
        let mut t = Together::new(model, 4);
        t.step(&[5, 0, 0, 0]);
        t.step(&[1, 7, 0, 9]);
        t.step(&[1, 7, 13, 1]);
        t.step(&[1, 1, 1, 1]);
        t.go_back(1);
        t.step(&[1, 7, 1, 1]);
        t.replace(3, 4);
        t.step(&[12, 12, 12, 12]);
        t.replace(0, 3);
        t.step(&[1, 1, 1, 1]);
        for _ in 0..6 {
            t.step(&[7, 1, 1, 1]);
        }
        println!("{name}: {} rows, max |difference| {:.1e}", t.compared, t.worst);
        assert!(t.compared >= 40, "{}", t.compared);
        assert!(t.worst <= 1e-4, "{name}: {}", t.worst);
    });
}

/// The slow executor knows one sequence only.
#[test]
fn sequences_together_agree_with_the_slow_executor() {
    let temporary = tempfile::tempdir().expect("created");
    // 4-bit weights go with 8-bit activations, to which the slow executor does not round.
    for name in names(false).iter().filter(|n| !n.ends_with("mxfp4")) {
        let model = open(&write_safetensors(name, temporary.path()));
        let mut t = Together::new(&model, 3);
        let slow = |text: &Vec<u32>| reference::run(&model, text).expect("computed").logits.iter().map(|x| *x as f32).collect();
        t.expected = t.texts.iter().map(slow).collect();
        for _ in 0..8 {
            t.step(&[6, 1, 7]);
        }
        assert!(t.worst <= 1e-3, "{name}: {}", t.worst);
    }
}

/// With few rows in a step, and single tokens on the other side, neighbours do not matter: bit for bit where weights are floats of 32
/// or 16 bits; other weights have kernels for two tokens and more that add in another order.
#[test]
fn few_rows_change_no_bit() {
    every_model(&mut |name, model| {
        let floats = model.spec().tensors.iter().all(|t| matches!(t.format, QuantFormat::F32 | QuantFormat::F16));
        let texts = texts(model, 4);
        let mut expected = Vec::new();
        for text in &texts {
            let mut s = session(model, PlanOptions { batch: 1, ..OPTIONS });
            expected.push(text[..16].iter().map(|t| s.decode(*t).expect("computed").to_vec()).collect::<Vec<_>>());
        }
        let mut s = Session::open(Arc::clone(model), &ram_plan(model.spec(), OPTIONS), SessionConfig::new(2)).expect("opened");
        let mut ids = vec![SequenceId::FIRST];
        ids.extend((1..4).map(|_| s.add_sequence().expect("planned")));
        // The later a sequence, the later it begins.
        for round in 0..16 {
            let now = || (0..4).filter(|i| 2 * i <= round).map(|i| (i, round - 2 * i));
            let parts: Vec<(SequenceId, &[u32])> = now().map(|(i, at)| (ids[i], &texts[i][at..=at])).collect();
            let logits = s.step(&parts).expect("computed");
            for (row, (i, at)) in logits.rows().into_iter().zip(now()) {
                let (row, expected) = (row.as_slice().expect("row-major"), &expected[i][at]);
                let difference = row.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(
                    if floats { row == expected } else { difference <= 1e-2 },
                    "{name}: sequence {i}, token {at}: {difference}"
                );
            }
        }
    });
}

#[derive(Debug, Clone)]
enum Move {
    Step([usize; 4]),
    GoBack(usize),
    Replace(usize, usize),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let count = || prop_oneof![2 => Just(0usize), 4 => Just(1usize), 1 => 2..10usize];
    let step = [count(), count(), count(), count()].prop_map(Move::Step);
    let one = prop_oneof![
        6 => step,
        1 => (0..4usize).prop_map(Move::GoBack),
        1 => (0..4usize, 0..5usize).prop_map(|(which, text)| Move::Replace(which, text)),
    ];
    proptest::collection::vec(one, 1..25)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// States (Qwen3-Next), latents (DeepSeek-V3), sinks and windows (gpt-oss), chunks and tempered queries (Llama-4).
    #[test]
    fn any_schedule_gives_the_logits_of_each_alone(moves in moves()) {
        let temporary = tempfile::tempdir().expect("created");
        for name in ["qwen3_next-1", "deepseek_v3-1", "gpt_oss-1", "llama4-1"] {
            let mut t = Together::new(&open(&write_safetensors(name, temporary.path())), 4);
            for m in &moves {
                match m {
                    Move::Step(counts) => t.step(counts),
                    Move::GoBack(which) => t.go_back(*which),
                    Move::Replace(which, text) => t.replace(*which, *text),
                }
            }
            prop_assert!(t.worst <= 1e-4, "{name}: {}", t.worst);
        }
    }
}

/// The engine is asked once per layer and step, whoever is in it; slots change no bit.
#[test]
fn experts_on_disk_are_demanded_once_for_all_sequences() {
    for family in ["qwen3moe", "olmoe"] {
        let model = open(&golden(family).join("model-bf16.gguf"));
        let spec = model.spec();
        let texts = texts(&model, 4);
        let run = |s: &mut Session| {
            let mut ids = vec![SequenceId::FIRST];
            ids.extend((1..4).map(|_| s.add_sequence().expect("planned")));
            let mut all = Vec::new();
            for at in 0..10 {
                let parts: Vec<(SequenceId, &[u32])> = ids.iter().zip(&texts).map(|(id, t)| (*id, &t[at..=at])).collect();
                all.extend(s.step(&parts).expect("computed").iter().copied());
            }
            // One goes on with a prompt.
            let parts = [(ids[0], &texts[0][10..11]), (ids[2], &texts[2][10..17])];
            all.extend(s.step(&parts).expect("computed").iter().copied());
            all
        };
        let config = SessionConfig { record: true, ..SessionConfig::new(2) };
        let mut resident = Session::open(Arc::clone(&model), &ram_plan(spec, OPTIONS), config).expect("opened");
        let expected = run(&mut resident);
        let plan = disk_plan(spec, OPTIONS, 2, |_, _| true);
        let mut s = Session::open(Arc::clone(&model), &plan, config).expect("opened");
        assert!(run(&mut s) == expected, "{family}: slots change bits");
        let demands = s.recording().expect("recorded").inputs.iter().filter(|(_, i)| matches!(i, Input::Routed(_))).count();
        assert_eq!(demands, 11 * spec.moe_layers().count(), "{family}: one demand per layer and step");
        let statistics = s.statistics();
        assert!(statistics.engine.loads > 0);
        assert_eq!((statistics.decode_tokens, statistics.prefill_tokens), (40, 8));
        let checks = verify(&mut s, &plan).expect("readable");
        // The process's memory is also that of the tests beside this one.
        let kv = checks.iter().find(|c| c.name == "keys and values").expect("checked");
        assert!(kv.ok, "{kv:?}");
    }
}

/// What was captured says whose it is.
#[test]
fn captured_routing_is_told_apart() {
    let model = open(&golden("qwen3moe").join("model-bf16.gguf"));
    let layers = model.spec().layers.len();
    let texts = texts(&model, 3);
    let routing_alone = |text: &[u32]| {
        let mut s = session(&model, PlanOptions { batch: 1, ..OPTIONS });
        for token in text {
            s.decode(*token).expect("computed");
        }
        captured_experts(&s.take_routing(), layers)
    };
    let mut s = session(&model, OPTIONS);
    let ids = [SequenceId::FIRST, s.add_sequence().expect("planned"), s.add_sequence().expect("planned")];
    for at in 0..12 {
        let parts: Vec<(SequenceId, &[u32])> = ids.iter().zip(&texts).map(|(id, t)| (*id, &t[at..=at])).collect();
        s.step(&parts).expect("computed");
    }
    let captured = s.take_routing();
    for (id, text) in ids.iter().zip(&texts) {
        let own: Vec<_> = captured.iter().filter(|c| c.sequence == *id).cloned().collect();
        assert_eq!(captured_experts(&own, layers), routing_alone(&text[..12]), "sequence {id}");
        assert!(own.iter().zip(0..).all(|(c, i)| c.position == i / model.spec().moe_layers().count()));
    }
}

/// Attention alone, where contexts are long and unlike enough that some are cut into segments and others are not.
#[test]
fn attention_of_several_caches_changes_no_bit() {
    let value = |i: usize, seed: usize| ((i * 2_654_435_761 + seed * 97) % 65_521) as f32 / 16_384.0 - 2.0;
    let values = |count: usize, seed: usize| (0..count).map(|i| value(i, seed)).collect::<Vec<f32>>();
    for (heads, kv_heads) in [(16, 1), (8, 4)] {
        let sizes = format!("num_heads = {heads}, num_kv_heads = {kv_heads}, head_dim = 16");
        let text = format!(
            r#"
            name = "attention"
            architecture = "qwen3moe"
            hidden_size = 32
            vocab_size = 8
            context_length = 4096
            source = "test"
            [[block]]
            repeat = 1
            attention = {{ kind = "gqa", {sizes}, rope = {{ theta = 1e4, rotary_dim = 8 }} }}
            ffn = {{ kind = "dense", inner_size = 32 }}
            "#
        );
        let geometry = Geometry::from_toml(&text).expect("a geometry");
        let spec = ModelSpec::with_recipe(geometry, &Recipe::by_name("F32").expect("a recipe")).expect("a model");
        let Attention::Gqa(a) = &spec.layers[0].attention else { panic!("not GQA") };
        // Positions before, and rows.
        let lengths = [(2999, 1), (0, 9), (70, 1), (1500, 40), (640, 1)];
        let caches = lengths.map(|(past, rows)| {
            let mut kv = KvCache::new(&spec, past + rows, QuantFormat::F16).expect("a cache");
            let kernels = Threads::new(1).expect("a thread").kernels();
            for (count, seed) in [(past, 1), (rows, 2)] {
                let width = count * kv_heads * 16;
                kv.append(kernels, 0, &values(width, seed + past), &values(width, seed + past + 10));
                if seed == 1 {
                    kv.advance(past);
                }
            }
            kv
        });
        let rows: usize = lengths.iter().map(|(_, rows)| rows).sum();
        let q = Array2::from_shape_vec((rows, heads * 16), values(rows * heads * 16, 3)).expect("sized");
        let mut expected: Option<Array2<f32>> = None;
        for count in [1, 2, 5, 16] {
            let threads = Threads::new(count).expect("threads");
            let (mut each, mut together) = (Array2::zeros(q.dim()), Array2::zeros(q.dim()));
            threads.pool().install(|| {
                let mut first = 0;
                for (kv, (_, rows)) in caches.iter().zip(lengths) {
                    let of_sequence = s![first..first + rows, ..];
                    attention(&threads, a, None, 0, kv, &q.slice(of_sequence), each.slice_mut(of_sequence));
                    first += rows;
                }
                let all: Vec<_> = caches.iter().zip(lengths).map(|(kv, (_, rows))| OfSequence { kv, rows }).collect();
                attention_of(&threads, a, None, 0, &all, &q.view(), together.view_mut());
            });
            assert!(each == together, "{heads} heads over {kv_heads}, {count} threads");
            let expected = expected.get_or_insert_with(|| each.clone());
            assert!(*expected == each, "{heads} heads over {kv_heads}, {count} threads");
        }
    }
}

#[test]
fn sequences_that_make_no_sense_are_refused() {
    let model = open(&golden("olmoe"));
    let options = PlanOptions { context: 10, batch: 2, ..OPTIONS };
    let mut s = session(&model, options);
    let first = SequenceId::FIRST;
    let second = s.add_sequence().expect("planned");
    assert_eq!((s.sequences(), s.most_sequences()), (vec![first, second], 2));
    let refused = s.add_sequence().expect_err("no room").to_string();
    assert!(refused.contains("at most 2") && refused.contains("10 tokens") && refused.contains("--batch"), "{refused}");

    s.step(&[(first, &[1, 2, 3][..]), (second, &[4; 8][..])]).expect("computed");
    assert_eq!(s.last_logits().len(), model.spec().vocab_size as usize);
    let too_long = s.step(&[(first, &[1][..]), (second, &[1; 3][..])]).expect_err("eleven do not fit ten");
    assert!(matches!(too_long, RuntimeError::ContextTooSmall { needed: 11, context: 10, .. }), "{too_long}");
    assert_eq!((s.len(), s.sequence_len(second).expect("there")), (3, 8), "nothing is computed of a step that is refused");
    let (one, none, strange) = (&[1][..], &[][..], &[model.spec().vocab_size][..]);
    let wrong = [
        (vec![], "at least one"),
        (vec![(first, none)], "at least one"),
        (vec![(first, one), (second, strange)], "vocabulary"),
        (vec![(first, one), (second, one), (first, one)], "twice"),
    ];
    for (parts, words) in wrong {
        let error = s.step(&parts).expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
    }
    assert!(s.remove_sequence(first).expect_err("it stays").to_string().contains("first"));
    s.remove_sequence(second).expect("there");
    for error in [
        s.remove_sequence(second).expect_err("gone"),
        s.truncate_sequence(second, 0).expect_err("gone"),
        s.sequence_len(second).map(drop).expect_err("gone"),
        s.step(&[(second, &[1][..])]).map(drop).expect_err("gone"),
    ] {
        assert!(error.to_string().contains("number 1"), "{error}");
    }
    let third = s.add_sequence().expect("there is room again");
    assert!(third != second && s.sequence_len(third).expect("there") == 0);
}

#[test]
fn a_device_computes_one_sequence() {
    let model = open(&golden("olmoe").join("model-bf16.gguf"));
    let options = PlanOptions { batch: 1, ..OPTIONS };
    let (plan, costs) = gpu_plan(model.spec(), options, GpuOptions::slots(0), |_, _| Where::Gpu);
    let backend = Box::new(ReferenceBackend::new(VRAM_BYTES));
    let mut s = Session::on_device(Arc::clone(&model), &plan, SessionConfig::new(2), Some(costs), backend).expect("opened");
    let refused = s.add_sequence().expect_err("on a device").to_string();
    assert!(refused.contains("on the CPU only"), "{refused}");
    let one = s.step(&[(SequenceId::FIRST, &[1, 2, 3][..])]).expect("computed").row(0).to_vec();
    s.reset();
    assert_eq!(s.prefill(&[1, 2, 3]).expect("computed"), one);
}
