//! Runs with random plans, engines and faults, recorded and replayed: the same actions byte for byte, nothing lost, one clear error.

mod session_common;

use proptest::prelude::*;
use session_common::*;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tierwise_planner::engine::schedule::Rule;
use tierwise_planner::engine::{Action, ExpertKey, Input, MAX_RETRIES, Statistics};
use tierwise_planner::plan::{CachePartition, EngineSettings, PrefetchKind};
use tierwise_runtime::RuntimeError;
use tierwise_runtime::exec::loader::{ExpertReader, FileReader};
use tierwise_runtime::session::{Model, Recording, Session, SessionConfig, record};

/// Reads from the file, late or not at all, as a hash of seed, expert and attempt says.
struct Faulty {
    inner: FileReader,
    seed: u64,
    /// Of 1000 reads, so many fail.
    failing: u64,
    /// Longest delay.
    slow_us: u64,
    /// Reads of an expert so far, and of these in a row failed.
    attempts: Mutex<HashMap<ExpertKey, (u64, u32)>>,
    /// Whether an expert may fail for good.
    fatal: bool,
    failed: AtomicU64,
}

fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl ExpertReader for Faulty {
    fn read(&self, key: ExpertKey, buffer: &mut [u8]) -> Result<(), String> {
        let mut attempts = self.attempts.lock().expect("no panic");
        let (attempt, in_a_row) = attempts.entry(key).or_default();
        *attempt += 1;
        let chance = mix(self.seed ^ mix(u64::from(key.layer) << 40 | u64::from(key.expert) << 20 | *attempt));
        let fails = chance % 1000 < self.failing && (self.fatal || *in_a_row < MAX_RETRIES);
        *in_a_row = if fails { *in_a_row + 1 } else { 0 };
        drop(attempts);
        if self.slow_us > 0 {
            std::thread::sleep(Duration::from_micros((chance >> 20) % self.slow_us));
        }
        if fails {
            self.failed.fetch_add(1, Ordering::SeqCst);
            buffer.fill(0xff);
            return Err(format!("model.gguf: read of expert {} failed by design", key.expert));
        }
        self.inner.read(key, buffer)
    }
}

/// What happened in all runs together.
#[derive(Debug)]
struct Totals {
    issued: u64,
    used: u64,
    fills: u64,
    retries: u64,
}

static TOTALS: Mutex<Totals> = Mutex::new(Totals { issued: 0, used: 0, fills: 0, retries: 0 });

impl Totals {
    fn add(&mut self, s: &Statistics) {
        self.issued += s.prefetches_issued;
        self.used += s.prefetches_used;
        self.fills += s.fills;
        self.retries += s.retries;
    }
}

fn tokens(model: &Model, count: usize, seed: u64) -> Vec<u32> {
    (0..count as u64).map(|i| (mix(seed ^ i) % u64::from(model.spec().vocab_size)) as u32).collect()
}

/// Logits of every token of a prompt and some decoded ones.
fn compute(s: &mut Session, tokens: &[u32]) -> Result<Vec<f32>, RuntimeError> {
    let (prompt, rest) = tokens.split_at(tokens.len() / 2);
    let (mut all, _) = s.logits_all(prompt)?.into_raw_vec_and_offset();
    for t in rest {
        all.extend(s.decode(*t)?);
    }
    Ok(all)
}

/// Every load is answered once, every demanded expert computed once, every demand finished once.
fn nothing_is_lost(recording: &Recording) {
    let (mut loads, mut answers) = (HashMap::<_, i64>::new(), 0);
    let (mut demanded, mut computed, mut finished, mut demands) = (0, 0, 0, 0);
    for action in &recording.actions {
        match action {
            Action::Load { key, slot, .. } => *loads.entry((*key, *slot)).or_default() += 1,
            Action::Compute { experts, .. } => computed += experts.len(),
            Action::Finish { .. } => finished += 1,
            Action::Evict { .. } | Action::Allocate { .. } | Action::Release { .. } | Action::Abort { .. } => {}
        }
    }
    for (_, input) in &recording.inputs {
        match input {
            Input::Loaded { key, slot } | Input::Failed { key, slot, .. } => {
                answers += 1;
                *loads.get_mut(&(*key, *slot)).expect("asked for") -= 1;
            }
            Input::Routed(d) => {
                demands += 1;
                demanded += d.experts.len();
            }
            Input::Begin | Input::Foreseen { .. } | Input::Computed { .. } | Input::Resize { .. } => {}
        }
    }
    assert!(loads.values().all(|n| *n == 0), "{answers} answers, open: {:?}", loads.iter().find(|(_, n)| **n != 0));
    assert_eq!((computed, finished), (demanded, demands));
}

/// In a round of runs some twenty guesses are used and as many misses filled, all of them in few of the runs: a round may have none.
const MOST_ROUNDS: u32 = 30;

#[test]
fn recorded_runs_replay_to_the_byte() {
    for _ in 0..MOST_ROUNDS {
        random_runs();
        let totals = TOTALS.lock().expect("no panic");
        println!("{totals:?}");
        let Totals { issued, used, fills, retries } = *totals;
        if issued > 0 && used > 0 && fills > 0 && retries > 0 {
            return;
        }
    }
    panic!("the runs were to show guesses, used ones, fills and retries: {:?}", TOTALS.lock());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]
    fn random_runs(
        family in 0_usize..4,
        engine in engines(),
        pattern in any::<u64>(),
        failing in prop_oneof![Just(0_u64), 50..400_u64],
        slow_us in prop_oneof![Just(0_u64), 1..800_u64],
        fatal in any::<bool>(),
        lookahead in 0_u32..4,
        seed in any::<u64>(),
    ) {
        let path = golden(FAMILIES[family]).join("model-bf16.gguf");
        let model = open(&path);
        let spec = model.spec();
        let tokens = tokens(&model, 16, seed);
        let away = |l: u32, e: u32| e < 2 || !mix(pattern ^ u64::from(l * 1000 + e)).is_multiple_of(4);
        let (plan, costs) = engine_plan(spec, F16_KV, engine, away);
        let layers: Vec<u32> = spec.moe_layers().map(|(l, _)| l).collect();
        let faulty = Arc::new(Faulty {
            inner: model.expert_reader(&layers).expect("opened"),
            seed, failing, slow_us, fatal, attempts: Mutex::default(), failed: AtomicU64::new(0),
        });
        let reader: Arc<dyn ExpertReader> = Arc::<Faulty>::clone(&faulty);
        let config = SessionConfig { record: true, lookahead, ..SessionConfig::new(2) };
        let mut s = Session::with_reader(Arc::clone(&model), &plan, config, Some(costs), Some(&reader)).expect("opened");
        let outcome = compute(&mut s, &tokens);
        s.settle();
        let recording = s.recording().expect("it records").clone();
        let failures = recording.inputs.iter().filter(|(_, i)| matches!(i, Input::Failed { .. })).count() as u64;
        prop_assert_eq!(failures, faulty.failed.load(Ordering::SeqCst), "each failed read is told once");
        match outcome {
            Ok(logits) => {
                let expected = compute(&mut session(&model, F16_KV), &tokens).expect("computed");
                prop_assert!(logits == expected, "the same bits as in memory");
                nothing_is_lost(&recording);
                // What nobody waits for (a guess, a preload, a fill) is given up when it cannot be read three times in a row.
                let Statistics { retries, prefetches_issued, preloads, fills, .. } = s.statistics().engine;
                let given_up = failures - retries;
                prop_assert!(given_up == 0 || (fatal && prefetches_issued + preloads + fills > 0), "{given_up}");
                TOTALS.lock().expect("no panic").add(&s.statistics().engine);
            }
            Err(e) => {
                prop_assert!(fatal && failures > u64::from(MAX_RETRIES));
                let message = e.to_string();
                prop_assert!(message.contains("failed by design") && message.contains("3 tries"), "{}", message);
                let aborted = matches!(recording.actions.last(), Some(Action::Abort { .. }));
                prop_assert!(aborted, "the engine gave up");
                prop_assert!(s.decode(tokens[0]).is_err(), "the session stays stopped");
            }
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("run.rec");
        record::write(&file, plan.plan(), &recording).expect("written");
        let back = record::read(&file).expect("read");
        prop_assert_eq!((&back.recording.inputs, &back.recording.actions), (&recording.inputs, &recording.actions));
        prop_assert_eq!(back.replay(&file, spec).expect("the same model"), None);
    }
}

/// Every policy, guesses of every kind, fills, and who computes what.
fn engines() -> impl Strategy<Value = EngineOptions> {
    let settings = (
        prop::sample::select(Rule::ALL.to_vec()),
        prop::sample::select(vec![PrefetchKind::Off, PrefetchKind::History, PrefetchKind::Lookahead]),
        1_u32..4,
        prop::sample::select(vec![CachePartition::PerLayer, CachePartition::Global]),
        any::<bool>(),
        0_u32..3,
    );
    let settings = settings.prop_map(|(schedule, prefetch, prefetch_layers, partition, fill, staging_slots)| EngineSettings {
        schedule,
        prefetch,
        prefetch_layers,
        partition,
        fill,
        staging_slots,
    });
    let policy = prop::sample::select(POLICIES.to_vec());
    (settings, policy, 1_u32..6, any::<bool>(), 0_u32..3).prop_map(|(settings, policy, slots, sockets, preload)| EngineOptions {
        slots,
        policy,
        settings,
        sockets,
        preload,
    })
}

fn recorded() -> (Arc<Model>, tierwise_planner::CheckedPlan, Recording) {
    let model = open(&golden("olmoe").join("model-bf16.gguf"));
    let plan = disk_plan(model.spec(), F16_KV, 2, |_, _| true);
    let config = SessionConfig { record: true, ..SessionConfig::new(1) };
    let mut s = Session::open(Arc::clone(&model), &plan, config).expect("opened");
    compute(&mut s, &tokens(&model, 12, 5)).expect("computed");
    let recording = s.recording().expect("it records").clone();
    (model, plan, recording)
}

#[test]
fn a_changed_record_is_told_apart_at_its_first_difference() {
    let (_, plan, recording) = recorded();
    assert_eq!(record::replay(&plan, &recording), None);

    let mut changed = recording.clone();
    let at = changed.actions.iter().position(|a| matches!(a, Action::Evict { .. })).expect("two slots are few");
    let Action::Evict { key, .. } = &mut changed.actions[at] else { unreachable!() };
    key.expert += 1;
    let d = record::replay(&plan, &changed).expect("they differ");
    assert_eq!(d.action, at);
    assert!(d.recorded.is_some() && d.replayed.is_some() && d.recorded != d.replayed && d.to_string().contains("after input"));

    let mut short = recording.clone();
    short.actions.pop();
    let d = record::replay(&plan, &short).expect("they differ");
    assert_eq!((d.action, d.recorded), (short.actions.len(), None));

    let mut long = recording.clone();
    long.actions.push(recording.actions[0].clone());
    let d = record::replay(&plan, &long).expect("they differ");
    assert_eq!((d.action, d.replayed), (recording.actions.len(), None));

    let mut fewer = recording;
    let computed = fewer.inputs.iter().position(|(_, i)| matches!(i, Input::Computed { .. })).expect("some");
    fewer.inputs.remove(computed);
    assert!(record::replay(&plan, &fewer).is_some());
}

#[test]
fn damaged_records_and_other_models_are_refused() {
    let (model, plan, recording) = recorded();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("run.rec");
    record::write(&file, plan.plan(), &recording).expect("written");
    let text = std::fs::read_to_string(&file).expect("read");
    let message = |text: &str| {
        std::fs::write(&file, text).expect("written");
        record::read(&file).expect_err("refused").to_string()
    };
    let cut = &text[..text.trim_end().rfind('\n').expect("many lines") + 1];
    assert!(message(cut).contains("the file was cut"), "{}", message(cut));
    assert!(message(&text[..text.len() - 5]).contains("in line"));
    assert!(message("").contains("nothing"));
    assert!(message("{}\n").contains("no header"));
    let newer = text.replacen("\"tierwise_record\":2", "\"tierwise_record\":3", 1);
    assert!(message(&newer).contains("version 3"), "{}", message(&newer));
    std::fs::write(&file, &text).expect("written");
    let other = open(&golden("mixtral").join("model-bf16.gguf"));
    let error = record::read(&file).expect("whole").replay(&file, other.spec()).expect_err("another model").to_string();
    assert!(error.contains("a run of this model"), "{error}");
    assert_eq!(record::read(&file).expect("whole").replay(&file, model.spec()).expect("its model"), None);
}
