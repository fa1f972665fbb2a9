//! Budgets that change while a session works: the same bits, every engine and reader, replays, refusals; from its own thread and from another.

mod session_common;

use proptest::prelude::*;
use session_common::*;
use std::sync::Arc;
use std::time::Duration;
use tierwise_cost::cost::Roofline;
use tierwise_cost::machine::Machine;
use tierwise_cost::model::ModelSpec;
use tierwise_cost::units::Bytes;
use tierwise_planner::elastic::{elastic_plan, with_ram};
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::engine::{Action, Input};
use tierwise_planner::plan::{CachePartition, CachePolicyKind, EngineSettings, PrefetchKind};
use tierwise_planner::{CheckedPlan, Problem, Request, budget};
use tierwise_runtime::session::{IoBackend, IoOptions, Model, PageCache, Session, SessionConfig, record, verify::verify};

/// Memory that holds `share` of the experts' bytes beside all else.
fn ram(spec: &ModelSpec, request: &Request, share: f64) -> Bytes {
    let rest = [budget::non_expert_weights(spec), budget::kv(spec, request), budget::activations(spec, request)];
    Bytes(rest.into_iter().sum::<Bytes>().0 + (share * spec.expert_bytes().0 as f64) as u64)
}

/// An elastic plan for this share, its machine and the engine's times.
fn plan(
    spec: &ModelSpec,
    share: f64,
    engine: EngineSettings,
    policy: CachePolicyKind,
) -> (CheckedPlan, Machine, Arc<EngineCosts>) {
    let machine = machine();
    let mut request = request(spec, F16_KV);
    request.limits.ram = Some(ram(spec, &request, share));
    let problem = Problem::elastic(spec, &machine, request).expect("it fits");
    let mut plan = elastic_plan(&problem, &Roofline::default()).expect("planned");
    plan.engine = engine;
    plan.layers.iter_mut().for_each(|l| l.policy = policy);
    let plan = plan.check(spec, Some(&machine)).expect("a plan of ours");
    let costs = EngineCosts::new(&plan, spec, &machine, &Roofline::default()).expect("the plan's machine");
    (plan, machine, Arc::new(costs))
}

fn tokens(model: &Model, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 31 + i * 7 + 3) % model.spec().vocab_size).collect()
}

/// Logits of a prompt's tokens in parts, then of tokens decoded one by one; `between(s, n)` is called before part or token number n.
fn compute(s: &mut Session, tokens: &[u32], mut between: impl FnMut(&mut Session, usize)) -> Vec<f32> {
    let (prompt, rest) = tokens.split_at(tokens.len() / 2);
    let mut all = Vec::new();
    for (i, part) in prompt.chunks(5).enumerate() {
        between(s, i);
        all.extend(s.logits_all(part).expect("computed").into_raw_vec_and_offset().0);
    }
    for (i, token) in rest.iter().enumerate() {
        between(s, 100 + i);
        all.extend(s.decode(*token).expect("computed"));
    }
    all
}

const OFF: EngineSettings = EngineSettings {
    schedule: tierwise_planner::engine::schedule::Rule::Exact,
    prefetch: PrefetchKind::Off,
    prefetch_layers: 1,
    partition: CachePartition::PerLayer,
    fill: false,
    staging_slots: 0,
};

#[test]
fn a_run_that_shrinks_and_grows_says_the_same() {
    let mut models: Vec<_> = FAMILIES.iter().map(|f| open(&golden(f).join("model-bf16.gguf"))).collect();
    models.extend(tiny().map(|t| open(&t.join("tiny-q4_k_m.gguf"))));
    for model in models {
        let spec = model.spec();
        let tokens = tokens(&model, 80);
        let expected = compute(&mut session(&model, F16_KV), &tokens, |_, _| {});
        for (backend, page_cache) in [(IoBackend::Auto, PageCache::Auto), (IoBackend::Threads, PageCache::Use)] {
            let (first, machine, costs) = plan(spec, 0.75, OFF, CachePolicyKind::Adaptive);
            let config = SessionConfig { record: true, io: IoOptions { backend, page_cache }, ..SessionConfig::new(2) };
            let mut s = Session::with_costs(Arc::clone(&model), &first, config, Some(costs)).expect("opened");
            let mut current = first.clone();
            let got = compute(&mut s, &tokens, |s, step| {
                let share = match step {
                    104 => 0.25,
                    120 => 0.6,
                    _ => return,
                };
                let budget = ram(spec, &current.plan().request, share);
                current = with_ram(&current, spec, &machine, &Roofline::default(), budget).expect("it fits");
                s.set_budget(current.clone()).expect("an elastic session");
                assert_eq!(s.budget().target, current.slot_bytes());
            });
            assert!(got == expected, "{}: other logits", spec.name);
            let state = s.budget();
            assert!(state.sizes.is_settled() && state.sizes.took.is_some() && state.sizes.changes == 2, "{state:?}");
            assert_eq!((state.held, state.target), (current.slot_bytes(), current.slot_bytes()));
            let statistics = s.statistics().engine;
            assert!(statistics.slots_released > 0 && statistics.slots_added > 0, "{statistics:?}");
            // What verify finds is the plan of the last budget.
            let wrong: Vec<_> = verify(&mut s, &current).expect("readable").into_iter().filter(|c| !c.ok).collect();
            assert!(wrong.iter().all(|c| c.name.contains("memory") || c.name.contains("pages")), "{wrong:?}");
            let slots = |plan: &CheckedPlan| plan.moe_layers().iter().map(|l| plan.slots(*l)).sum::<u32>();
            assert!(verify(&mut s, &first).expect("readable").iter().any(|c| c.name == "slots" && !c.ok));
            println!(
                "{}: {} slots, {} in the end; {} added, {} released",
                spec.name,
                slots(&first),
                slots(&current),
                statistics.slots_added,
                statistics.slots_released
            );
            let recording = s.recording().expect("it records");
            assert!(recording.inputs.iter().any(|(_, i)| matches!(i, Input::Resize { .. })));
            assert_eq!(record::replay(&first, recording), None);
        }
    }
}

fn engines() -> impl Strategy<Value = (EngineSettings, CachePolicyKind)> {
    let prefetch = prop::sample::select(vec![PrefetchKind::Off, PrefetchKind::History, PrefetchKind::Lookahead]);
    let partition = prop::sample::select(vec![CachePartition::PerLayer, CachePartition::Global]);
    (prefetch, 1_u32..4, partition, any::<bool>(), prop::sample::select(POLICIES.to_vec())).prop_map(
        |(prefetch, prefetch_layers, partition, fill, policy)| {
            (EngineSettings { prefetch, prefetch_layers, partition, fill, ..OFF }, policy)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn random_budgets_at_random_steps_change_no_bit(
        family in 0_usize..4,
        (engine, policy) in engines(),
        start in 0.35_f64..1.0,
        // Which step, which share of the experts; shares that do not fit are refused.
        changes in prop::collection::btree_map(100_usize..116, 0.0_f64..1.1, 0..8),
        at_once in any::<bool>(),
    ) {
        let model = open(&golden(FAMILIES[family]).join("model-bf16.gguf"));
        let spec = model.spec();
        let tokens = tokens(&model, 32);
        let expected = compute(&mut session(&model, F16_KV), &tokens, |_, _| {});
        let (first, machine, costs) = plan(spec, start, engine, policy);
        let config = SessionConfig { record: true, ..SessionConfig::new(2) };
        let mut s = Session::with_costs(Arc::clone(&model), &first, config, Some(costs)).expect("opened");
        let control = s.budget_control();
        let mut refused = 0;
        let got = compute(&mut s, &tokens, |s, step| {
            let Some(share) = changes.get(&step) else { return };
            let before = control.plan();
            let budget = ram(spec, &before.plan().request, *share);
            match with_ram(&before, spec, &machine, &Roofline::default(), budget) {
                Ok(next) if at_once => s.set_budget(next).expect("an elastic session"),
                Ok(next) => control.follow(next).expect("an elastic session"),
                Err(e) => {
                    assert!(e.to_string().contains("the smallest budget that works"), "{e}");
                    refused += 1;
                }
            }
        });
        prop_assert!(got == expected, "the same bits as in memory");
        s.settle();
        let state = s.budget();
        let taken = changes.len() as u64 - refused;
        prop_assert_eq!(state.sizes.changes, taken);
        prop_assert_eq!(&state.sizes.refused, &None);
        let most = [first.slot_bytes(), control.plan().slot_bytes()].into_iter().max().expect("two");
        prop_assert!(changes.len() > 1 || state.held <= most);
        let recording = s.recording().expect("it records");
        let resizes = recording.inputs.iter().filter(|(_, i)| matches!(i, Input::Resize { .. })).count() as u64;
        prop_assert!(resizes <= taken, "what was replaced before it was taken never came");
        // A step is more layers than stages are needed here, unless the last change came at its end.
        let stages: Vec<usize> = recording.actions.iter().map(|a| usize::from(matches!(a, Action::Release { .. } | Action::Allocate { .. }))).collect();
        let s2 = s.statistics().engine;
        prop_assert_eq!(stages.iter().sum::<usize>() as u64, s2.slots_added + s2.slots_released);
        prop_assert_eq!(record::replay(&first, recording), None);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("run.rec");
        record::write(&file, first.plan(), recording).expect("written");
        prop_assert_eq!(record::read(&file).expect("read").replay(&file, spec).expect("the same model"), None);
    }
}

/// From another thread, while the session computes; what is too small is refused there and changes nothing.
#[test]
fn another_thread_changes_the_budget() {
    let model = open(&golden("olmoe").join("model-bf16.gguf"));
    let spec = model.spec();
    let tokens = tokens(&model, 60);
    let expected = compute(&mut session(&model, F16_KV), &tokens, |_, _| {});
    let (first, machine, costs) = plan(spec, 0.8, OFF, CachePolicyKind::Lru);
    let mut s = Session::with_costs(Arc::clone(&model), &first, SessionConfig::new(2), Some(costs)).expect("opened");
    let control = s.budget_control();
    assert!(control.state().sizes.is_settled(), "nothing was asked for");
    let (last, states) = std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut states = Vec::new();
            for share in [0.3, 0.01, 0.9, 0.3] {
                let plan = control.plan();
                match with_ram(&plan, spec, &machine, &Roofline::default(), ram(spec, &plan.plan().request, share)) {
                    Ok(next) => {
                        control.follow(next).expect("an elastic session");
                        // However slow the machine is, the other thread computes until it is told to stop.
                        states.push(control.wait(Duration::from_secs(60)));
                    }
                    Err(e) => assert!(share < 0.1, "{e}"),
                }
            }
            states
        });
        let mut last = Vec::new();
        while !other.is_finished() {
            s.reset();
            last = compute(&mut s, &tokens, |_, _| {});
        }
        (last, other.join().expect("no panic"))
    });
    assert!(last == expected, "the same bits as in memory");
    assert_eq!(states.len(), 3);
    for state in &states {
        assert!(state.held == state.target && state.sizes.took.is_some(), "{state:?}");
    }
    assert_eq!(states[0].held, states[2].held);
    assert!(states[1].held > states[0].held);
    drop(s);
    assert!(control.state().sizes.ended);
}

#[test]
fn sessions_that_cannot_change_say_so() {
    let model = open(&golden("olmoe").join("model-bf16.gguf"));
    let spec = model.spec();
    let (elastic, machine, _) = plan(spec, 0.5, OFF, CachePolicyKind::Lru);
    let mut pinned = session(&model, F16_KV);
    let error = pinned.set_budget(elastic.clone()).expect_err("its experts are pinned").to_string();
    assert!(error.contains("--control"), "{error}");
    let mut s = Session::open(Arc::clone(&model), &elastic, SessionConfig::new(1)).expect("opened");
    let other = plan(spec, 0.5, OFF, CachePolicyKind::Adaptive).0;
    let error = s.set_budget(other).expect_err("another policy").to_string();
    assert!(error.contains("a plan of another kind"), "{error}");
    assert!(s.set_budget(ram_plan(spec, F16_KV)).is_err());
    let error = with_ram(&elastic, spec, &machine, &Roofline::default(), Bytes(1000)).expect_err("too small").to_string();
    assert!(error.contains("the smallest budget that works"), "{error}");
    s.prefill(&[1, 2, 3]).expect("it goes on as it was");
    assert_eq!(s.budget().held, elastic.slot_bytes());
}
