//! The hybrid executor against the CPU's: where an expert is computed, and how it got there, may change an answer by rounding only.
//!
//! The device is the reference back-end (plain loops), so that this runs everywhere; `hybrid_devices.rs` does a part of it on a GPU.

#[allow(dead_code, reason = "the models are used as they are committed")]
mod family_models;
mod session_common;

use family_models::{folder, names};
use session_common::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::CheckedPlan;
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::engine::schedule::Rule;
use tierwise_planner::plan::{EngineSettings, PrefetchKind};
use tierwise_runtime::backend::reference::ReferenceBackend;
use tierwise_runtime::exec::reference;
use tierwise_runtime::session::{Model, Session, SessionConfig, record};

/// Logits may differ from the CPU's by this.
const TOLERANCE: f32 = 2e-2;

/// A session on a device that is as late as it may be.
fn late(model: &Arc<Model>, plan: &CheckedPlan, costs: Option<Arc<EngineCosts>>, faults: &Arc<Faults>) -> Session {
    let backend = Box::new(LateDevice::new(VRAM_BYTES, Arc::clone(faults)));
    let config = SessionConfig { record: true, ..SessionConfig::new(2) };
    Session::on_device(Arc::clone(model), plan, config, costs, backend).unwrap_or_else(|e| panic!("{e}"))
}

fn hybrid(model: &Arc<Model>, plan: &CheckedPlan, costs: Option<Arc<EngineCosts>>, config: SessionConfig) -> Session {
    let backend = Box::new(ReferenceBackend::new(VRAM_BYTES));
    Session::on_device(Arc::clone(model), plan, config, costs, backend).unwrap_or_else(|e| panic!("{e}"))
}

fn tokens(model: &Model, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 31 + i * 7 + 3) % model.spec().vocab_size).collect()
}

/// Logits of every token of a prompt, then of some decoded ones.
fn compute(s: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let (prompt, rest) = tokens.split_at(tokens.len() * 3 / 4);
    let (mut all, _) = s.logits_all(prompt).unwrap_or_else(|e| panic!("{e}")).into_raw_vec_and_offset();
    for t in rest {
        all.extend(s.decode(*t).unwrap_or_else(|e| panic!("{e}")));
    }
    all
}

fn on_cpu(model: &Arc<Model>, options: PlanOptions) -> Session {
    let plan = ram_plan(model.spec(), options);
    Session::open(Arc::clone(model), &plan, SessionConfig::new(options.threads)).expect("opened")
}

/// So many of four experts are on the GPU.
fn share(quarters: u32, rest: Where) -> impl Fn(u32, u32) -> Where {
    move |layer, e| if (e + layer) % 4 < quarters { Where::Gpu } else { rest }
}

const OPTIONS: PlanOptions = PlanOptions { context: 128, chunk: 32, ..F32_KV };

/// Families with parts that no device computes: refused by name.
const ON_CPU_ONLY: [&str; 2] = ["qwen3_next", "qwen3_5_moe"];

/// Every family with committed weights, with no, half and all of the experts on the GPU, the others on the CPU.
#[test]
fn every_family_gives_the_logits_of_the_cpu() {
    for name in names(true) {
        let path = folder().join(&name).join("model-f16.gguf");
        let Ok(source) = tierwise_runtime::import::ModelSource::open(path.to_str().expect("UTF-8"), None) else {
            println!("{name}: not supported on the CPU either");
            continue;
        };
        let model = Arc::new(Model::new(source).expect("a model"));
        let tokens = tokens(&model, 40);
        let expected = compute(&mut on_cpu(&model, OPTIONS), &tokens);
        // The CPU rounds activations where weights are quantised, the device does not: then the slow executor judges both.
        let is_float = |f: QuantFormat| matches!(f, QuantFormat::F32 | QuantFormat::F16 | QuantFormat::BF16);
        let float = model.spec().tensors.iter().all(|t| is_float(t.format));
        let exact: Vec<f32> = reference::run(&model, &tokens).expect("computed").logits.iter().map(|x| *x as f32).collect();
        let of_cpu = max_difference(&expected, &exact);
        for quarters in [0, 2, 4] {
            let (plan, costs) = gpu_plan(model.spec(), OPTIONS, GpuOptions::slots(0), share(quarters, Where::Cpu));
            if ON_CPU_ONLY.iter().any(|family| name.starts_with(family)) {
                let backend = Box::new(ReferenceBackend::new(VRAM_BYTES));
                let refused = Session::on_device(Arc::clone(&model), &plan, SessionConfig::new(1), Some(costs), backend);
                let message = refused.err().expect("refused").to_string();
                assert!(message.contains("--device cpu"), "{name}: {message}");
                println!("{message}");
                continue;
            }
            let got = compute(&mut hybrid(&model, &plan, Some(costs), SessionConfig::new(2)), &tokens);
            let (difference, error) = (max_difference(&got, &expected), max_difference(&got, &exact));
            println!(
                "{name}, {quarters}/4 on the GPU: from the CPU {difference:.1e}, from the exact {error:.1e} (CPU: {of_cpu:.1e})"
            );
            let bound = if float || quarters == 4 { 1e-4 } else { 2.0 * of_cpu };
            assert!(error <= bound, "{name}, {quarters}/4: {error} from the exact");
            assert!(difference <= TOLERANCE || !float, "{name}, {quarters}/4: {difference} from the CPU");
        }
    }
}

/// The trained tiny model: logits, and the same greedy text.
#[test]
fn the_tiny_model_says_the_same() {
    let Some(folder) = tiny() else { return };
    let model = open(&folder.join("tiny-f16.gguf"));
    let tokens = tokens(&model, 24);
    let mut cpu = on_cpu(&model, OPTIONS);
    let expected = compute(&mut cpu, &tokens);
    let text = greedy(&mut cpu, &tokens[..8], 12);
    for quarters in 0..=4 {
        let (plan, costs) = gpu_plan(model.spec(), OPTIONS, GpuOptions::slots(6), share(quarters, Where::Slots));
        let mut s = hybrid(&model, &plan, Some(costs), SessionConfig::new(2));
        let difference = max_difference(&compute(&mut s, &tokens), &expected);
        println!("tiny, {quarters}/4 resident, 6 slots: max |difference| {difference:.1e}, {:?}", s.statistics().engine);
        assert!(difference <= TOLERANCE, "{quarters}/4: {difference}");
        assert_eq!(greedy(&mut s, &tokens[..8], 12), text, "{quarters}/4");
    }
}

/// Every policy with few slots, guesses on and off, every rule of who computes: the same logits, and a record that replays.
#[test]
fn policies_rules_and_guesses_change_nothing() {
    let model = open(&golden("qwen3moe").join("model-bf16.gguf"));
    let tokens = tokens(&model, 40);
    let expected = compute(&mut on_cpu(&model, OPTIONS), &tokens);
    let (mut evictions, mut used, mut at_home) = (0, 0, 0);
    for policy in POLICIES {
        for prefetch in [PrefetchKind::Off, PrefetchKind::History, PrefetchKind::Lookahead] {
            for schedule in [Rule::Exact, Rule::Static, Rule::AllMoved] {
                let staging_slots = u32::from(schedule == Rule::AllMoved);
                let fill = schedule == Rule::Static;
                let settings =
                    EngineSettings { schedule, prefetch, prefetch_layers: 1, fill, staging_slots, ..EngineSettings::default() };
                let engine = GpuOptions { policy, settings, ..GpuOptions::slots(2) };
                let place = |layer, e| match (e + layer) % 4 {
                    0 => Where::Gpu,
                    1 => Where::Cpu,
                    _ => Where::Slots,
                };
                let (plan, costs) = gpu_plan(model.spec(), OPTIONS, engine, place);
                let mut s = late(&model, &plan, Some(costs), &Arc::default());
                let what = format!("{policy:?} {prefetch:?} {schedule:?}");
                let difference = max_difference(&compute(&mut s, &tokens), &expected);
                assert!(difference <= TOLERANCE, "{what}: {difference}");
                s.settle();
                let recording = s.recording().expect("it records");
                assert_eq!(record::replay(&plan, recording), None, "{what}");
                let e = s.statistics().engine;
                assert_eq!(e.hits + e.misses, e.requests, "{what}");
                evictions += e.evictions;
                used += e.prefetches_used;
                at_home += e.computed_at_home;
            }
        }
    }
    println!("{evictions} evictions, {used} guesses used, {at_home} computed beside their memory");
    assert!(evictions > 0 && used > 0 && at_home > 0, "the runs were to show all of these");
}

/// All experts of half of the layers come through two slots, none at home.
fn through_slots(model: &Model) -> (CheckedPlan, Arc<EngineCosts>) {
    let settings = EngineSettings { schedule: Rule::AllMoved, ..EngineSettings::default() };
    let engine = GpuOptions { settings, ..GpuOptions::slots(2) };
    gpu_plan(model.spec(), OPTIONS, engine, |layer, _| if layer % 2 == 0 { Where::Slots } else { Where::Gpu })
}

/// Copies that fail are tried again and then reported; slow ones are waited for. In no case is a wrong number computed.
#[test]
fn copies_that_fail_or_take_their_time() {
    let model = open(&golden("qwen3moe").join("model-bf16.gguf"));
    let tokens = tokens(&model, 40);
    let (plan, costs) = through_slots(&model);
    let session = |faults: &Arc<Faults>| late(&model, &plan, Some(Arc::clone(&costs)), faults);
    let expected = compute(&mut session(&Arc::default()), &tokens);
    assert!(max_difference(&expected, &compute(&mut on_cpu(&model, OPTIONS), &tokens)) <= TOLERANCE);

    let slow = Arc::<Faults>::default();
    let mut s = session(&slow);
    slow.slow_us.store(2000, Ordering::SeqCst);
    assert_eq!(compute(&mut s, &tokens), expected, "the same bits, however late");
    assert!(s.statistics().engine.loads > 0 && s.statistics().engine.evictions > 0);

    let failing = Arc::<Faults>::default();
    let mut s = session(&failing);
    failing.failing_copies.store(2, Ordering::SeqCst);
    assert_eq!(compute(&mut s, &tokens), expected, "the third try succeeds");
    assert_eq!(s.statistics().engine.retries, 2);

    let broken = Arc::<Faults>::default();
    let mut s = session(&broken);
    broken.failing_copies.store(u32::MAX, Ordering::SeqCst);
    let error = s.prefill(&tokens).expect_err("no copy ever succeeds").to_string();
    assert!(error.contains("failed by design") && error.contains("3 tries"), "{error}");
    assert!(s.decode(1).is_err(), "the session stays stopped");
}

/// Experts in all three kinds of places, and prompts that stream those of host memory.
fn streaming(model: &Model, settings: EngineSettings) -> (CheckedPlan, Arc<EngineCosts>) {
    let engine = GpuOptions { settings, streamed: true, ..GpuOptions::slots(1) };
    let (plan, costs) = gpu_plan(model.spec(), OPTIONS, engine, |layer, e| match (layer + e) % 4 {
        0 => Where::Gpu,
        1 => Where::Slots,
        _ => Where::Cpu,
    });
    assert!(plan.streaming_slots() > 0 && costs.streams);
    (plan, costs)
}

/// Streamed prompts: the logits of the CPU, under every setting; a record that replays; experts that came ahead; memory as planned.
#[test]
fn streamed_prompts_change_nothing() {
    for family in ["qwen3moe", "olmoe"] {
        let model = open(&golden(family).join("model-bf16.gguf"));
        let tokens = tokens(&model, 80);
        let expected = compute(&mut on_cpu(&model, OPTIONS), &tokens);
        let (mut streamed, mut ahead) = (0, 0);
        for prefetch in [PrefetchKind::Off, PrefetchKind::Lookahead] {
            for (schedule, staging_slots) in [(Rule::Exact, 0), (Rule::Static, 1)] {
                let fill = schedule == Rule::Static;
                let settings =
                    EngineSettings { schedule, prefetch, prefetch_layers: 1, fill, staging_slots, ..EngineSettings::default() };
                let (plan, costs) = streaming(&model, settings);
                let faults = Arc::<Faults>::default();
                let mut s = late(&model, &plan, Some(costs), &faults);
                let what = format!("{family} {prefetch:?} {schedule:?}");
                let difference = max_difference(&compute(&mut s, &tokens), &expected);
                assert!(difference <= TOLERANCE, "{what}: {difference}");
                s.settle();
                assert_eq!(record::replay(&plan, s.recording().expect("it records")), None, "{what}");
                let e = s.statistics().engine;
                assert_eq!(e.hits + e.misses, e.requests, "{what}");
                streamed += e.streamed;
                ahead += e.streamed_ahead - e.streamed_useless;
                for l in s.device_memory().expect("a device").iter().filter(|l| l.name == "staging") {
                    assert!(l.allocated.0 > 0 && l.allocated.0 <= l.planned.0 + 4096, "{l:?}");
                }
            }
        }
        println!("{family}: {streamed} experts streamed when asked for, {ahead} came ahead and served");
        assert!(streamed > 0 && ahead > 0);
    }
}

/// Copies for streamed prompts that are slow, fail, or fail for good.
#[test]
fn streamed_copies_that_fail_or_take_their_time() {
    let model = open(&golden("qwen3moe").join("model-bf16.gguf"));
    let tokens = tokens(&model, 80);
    let (plan, costs) = streaming(&model, EngineSettings::default());
    let session = |faults: &Arc<Faults>| late(&model, &plan, Some(Arc::clone(&costs)), faults);
    let expected = compute(&mut on_cpu(&model, OPTIONS), &tokens);
    for (slow_us, failing) in [(2000, 0), (0, 2), (300, 2)] {
        let faults = Arc::<Faults>::default();
        let mut s = session(&faults);
        faults.slow_us.store(slow_us, Ordering::SeqCst);
        faults.failing_copies.store(failing, Ordering::SeqCst);
        let difference = max_difference(&compute(&mut s, &tokens), &expected);
        assert!(difference <= TOLERANCE, "{slow_us} us, {failing} failures: {difference}");
        assert!(failing == 0 || s.statistics().engine.retries + s.statistics().engine.streamed_useless > 0);
    }
    let faults = Arc::<Faults>::default();
    let mut s = session(&faults);
    faults.failing_copies.store(u32::MAX, Ordering::SeqCst);
    let error = s.prefill(&tokens).expect_err("no copy ever succeeds").to_string();
    assert!(error.contains("failed by design") && error.contains("3 tries"), "{error}");
    let faults = Arc::<Faults>::default();
    let mut s = session(&faults);
    faults.lost_after.store(3, Ordering::SeqCst);
    let error = s.prefill(&tokens).expect_err("lost").to_string();
    assert!(error.contains("lost by design"), "{error}");
    s.settle();
}

/// A lost device is an error at once, not a hang, whenever it is lost.
#[test]
fn a_lost_device_is_an_error() {
    let model = open(&golden("qwen3moe").join("model-bf16.gguf"));
    let tokens = tokens(&model, 40);
    let (plan, costs) = through_slots(&model);
    let all = {
        let faults = Arc::<Faults>::default();
        compute(&mut late(&model, &plan, Some(Arc::clone(&costs)), &faults), &tokens);
        faults.submitted.load(Ordering::SeqCst)
    };
    // How often a run submits depends on when copies arrive: another run may do with less than `all`.
    for after in [1, 2, 5, all / 2, all - 1] {
        let faults = Arc::<Faults>::default();
        let mut s = late(&model, &plan, Some(Arc::clone(&costs)), &faults);
        faults.lost_after.store(after, Ordering::SeqCst);
        let run = |s: &mut Session| -> Result<(), tierwise_runtime::RuntimeError> {
            s.logits_all(&tokens[..30])?;
            tokens[30..].iter().try_for_each(|t| s.decode(*t).map(|_| ()))
        };
        match run(&mut s) {
            Err(error) => assert!(error.to_string().contains("lost by design"), "after {after} of {all}: {error}"),
            Ok(()) => {
                assert!(after > 5 && faults.submitted.load(Ordering::SeqCst) <= after, "after {after} of {all}: nobody noticed");
                faults.lost.store(true, Ordering::SeqCst);
            }
        }
        assert!(s.decode(1).is_err() && s.prefill(&tokens[..2]).is_err());
        s.settle();
    }
}

/// Whichever allocation is refused: an error that says what for, before anything is written.
#[test]
fn a_refused_allocation_stops_the_opening() {
    let model = open(&golden("qwen3moe").join("model-bf16.gguf"));
    let (plan, costs) = through_slots(&model);
    let mut refused = 0;
    for allocations in (1..).step_by(3) {
        let faults = Arc::<Faults>::default();
        faults.allocations.store(allocations, Ordering::SeqCst);
        let backend = Box::new(LateDevice::new(VRAM_BYTES, Arc::clone(&faults)));
        let opened = Session::on_device(Arc::clone(&model), &plan, SessionConfig::new(1), Some(Arc::clone(&costs)), backend);
        let Err(error) = opened else { break };
        assert!(error.to_string().contains("refused by design"), "{error}");
        assert_eq!(faults.written.load(Ordering::SeqCst), 0, "nothing is loaded before everything has its place");
        refused += 1;
    }
    assert!(refused > 5, "{refused}");
}

/// With everything on the device a token is one read: nothing is asked in between.
#[test]
fn a_resident_model_reads_nothing_but_logits() {
    let model = open(&golden("olmoe").join("model-bf16.gguf"));
    let (plan, costs) = gpu_plan(model.spec(), OPTIONS, GpuOptions::slots(0), share(4, Where::Cpu));
    let faults = Arc::<Faults>::default();
    let mut s = late(&model, &plan, Some(costs), &faults);
    s.prefill(&tokens(&model, 5)).expect("computed");
    let (reads, copied) = (faults.reads.load(Ordering::SeqCst), faults.copied.load(Ordering::SeqCst));
    for token in 1..=10 {
        s.decode(token).expect("computed");
    }
    assert_eq!(faults.reads.load(Ordering::SeqCst) - reads, 10);
    assert_eq!(faults.copied.load(Ordering::SeqCst), copied);
}

/// What is allocated is what was planned, to the alignment of parts.
#[test]
fn memory_is_what_was_planned() {
    let model = open(&golden("olmoe").join("model-bf16.gguf"));
    let (plan, costs) = gpu_plan(model.spec(), OPTIONS, GpuOptions::slots(3), share(2, Where::Slots));
    let s = hybrid(&model, &plan, Some(costs), SessionConfig::new(1));
    let lines = s.device_memory().expect("a device");
    for l in &lines {
        println!("{}: planned {}, allocated {}", l.name, l.planned, l.allocated);
    }
    let padding = 4096 * (model.spec().tensors.len() as u64 + 64);
    let planned: u64 = lines.iter().map(|l| l.planned.0).sum();
    let allocated: u64 = lines.iter().map(|l| l.allocated.0).sum();
    assert!(allocated <= planned && planned <= VRAM_BYTES);
    for l in lines.iter().filter(|l| !l.name.contains("back-end")) {
        assert!(l.allocated.0 <= l.planned.0 + padding, "{l:?}");
        assert!(l.allocated.0 > 0, "{l:?}");
    }
}

/// Plans and devices that do not fit together are refused before anything is loaded.
#[test]
fn what_does_not_fit_is_refused() {
    let model = open(&golden("olmoe").join("model-bf16.gguf"));
    let open = |plan: &CheckedPlan, bytes| {
        let backend = Box::new(ReferenceBackend::new(bytes));
        Session::on_device(Arc::clone(&model), plan, SessionConfig::new(1), None, backend).err().expect("refused").to_string()
    };
    let (gpu, _) = gpu_plan(model.spec(), OPTIONS, GpuOptions::slots(0), share(4, Where::Cpu));
    let small = open(&gpu, 100 << 10);
    assert!(small.contains("--vram") && small.contains("free"), "{small}");
    let cpu = ram_plan(model.spec(), OPTIONS);
    let message = open(&cpu, VRAM_BYTES);
    assert!(message.contains("main processor"), "{message}");
    let without = Session::open(Arc::clone(&model), &gpu, SessionConfig::new(1)).err().expect("refused").to_string();
    assert!(without.contains("--device"), "{without}");
}
