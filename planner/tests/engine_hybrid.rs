//! The engine with times: work at home, prefetches, fills, preloads, shared slots. Invariants under random drivers, faults, replays.

mod common;

use common::answers::{Content, Demanded, answer};
use common::{small_machine, tiny};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;
use tierwise_cost::cost::Roofline;
use tierwise_cost::machine::Machine;
use tierwise_cost::model::ModelSpec;
use tierwise_cost::units::Nanos;
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::engine::schedule::Rule;
use tierwise_planner::engine::{Action, Demand, Engine, Input, Location, MAX_RETRIES, Purpose, SlotId};
use tierwise_planner::plan::{CachePartition, EngineSettings, PrefetchKind};
use tierwise_planner::sim::setup::{CacheSetup, cached_plan};
use tierwise_planner::sim::{Keep, Trace, Workload, replay, simulate};
use tierwise_planner::{CheckedPlan, Problem, Request};

const LAYERS: u32 = 3;
const EXPERTS: u32 = 12;

fn hybrid(
    spec: &ModelSpec,
    machine: &Machine,
    slots: u32,
    engine: EngineSettings,
    preload: u32,
) -> (CheckedPlan, Arc<EngineCosts>) {
    let request = Request { context: 512, prompt_tokens: 128, ..Request::default() };
    let problem = Problem::new(spec, machine, request).unwrap();
    let layers = problem.layers.len();
    let setup = CacheSetup {
        slots: vec![slots; layers],
        policy: Default::default(),
        preload: vec![(0..preload.min(slots)).collect(); layers],
        engine,
    };
    let plan = cached_plan(&problem, &Roofline::default(), &setup).unwrap().check(spec, Some(machine)).unwrap();
    let costs = EngineCosts::new(&plan, spec, machine, &Roofline::default()).unwrap();
    (plan, Arc::new(costs))
}

/// What a driver may rely on, checked from the outside.
struct Watch<'p> {
    plan: &'p CheckedPlan,
    slots: Content,
    demanded: Demanded,
    outstanding: Vec<Action>,
    failures: HashMap<SlotId, u32>,
}

impl Watch<'_> {
    fn see(&mut self, action: &Action) {
        match action {
            Action::Evict { key, slot } => {
                assert!((slot.pool as usize) < self.plan.cache_pools().len());
                assert_eq!(self.slots.remove(slot), Some((key.layer, key.expert, true)), "only what is in the slot leaves it");
                let needed = self.demanded.get(&key.layer).is_some_and(|d| d.contains(&key.expert));
                assert!(!needed, "nothing demanded is evicted before it is served");
            }
            Action::Load { key, slot, bytes, from, purpose } => {
                let staging = self.plan.cache_pools().len() as u32;
                assert!(slot.pool == self.plan.pool_of(key.layer) || slot.pool == staging);
                assert!(slot.index < self.plan.pools()[slot.pool as usize].slots, "within the budget");
                assert_eq!((*bytes, *from), (self.plan.expert_bytes(key.layer), self.plan.tier_of(key.layer, key.expert)));
                let there =
                    self.slots.iter().filter(|(s, (l, e, _))| s.pool != staging && (*l, *e) == (key.layer, key.expert)).count();
                let before = self.slots.insert(*slot, (key.layer, key.expert, false));
                let retry = before == Some((key.layer, key.expert, false));
                assert!(before.is_none() || retry, "a load goes into a free slot, or is a retry");
                assert!(there == 0 || retry, "nothing is loaded twice");
                if *purpose == Purpose::Demand {
                    assert!(self.demanded[&key.layer].contains(&key.expert));
                }
                self.outstanding.push(action.clone());
            }
            Action::Compute { layer, experts, executor, .. } => {
                for (e, place) in experts {
                    assert!(self.demanded.get_mut(layer).unwrap().contains(e), "computed once, and only on demand");
                    match place {
                        Location::Resident => {
                            let tier = self.plan.tier_of(*layer, *e);
                            let home = self.plan.home_executor(tier).unwrap_or_else(|| self.plan.executor_of(tier));
                            assert_eq!(*executor, home, "beside its memory");
                        }
                        Location::Slot(s) => assert_eq!(self.slots[s], (*layer, *e, true), "the weights are there"),
                    }
                }
                self.outstanding.push(action.clone());
            }
            Action::Finish { layer, .. } => assert!(self.demanded.remove(layer).unwrap().is_empty(), "everything was computed"),
            Action::Allocate { .. } | Action::Release { .. } => panic!("nobody asked for another number of slots"),
            Action::Abort { reason } => panic!("{reason}"),
        }
    }
}

fn settings() -> impl Strategy<Value = EngineSettings> {
    let schedule = prop::sample::select(vec![Rule::Exact, Rule::Hybrimoe, Rule::Static, Rule::AllMoved]);
    let prefetch = prop::sample::select(vec![PrefetchKind::Off, PrefetchKind::History, PrefetchKind::Lookahead]);
    let partition = prop::sample::select(vec![CachePartition::PerLayer, CachePartition::Global]);
    (schedule, prefetch, 1_u32..4, partition, any::<bool>(), 0_u32..4).prop_map(
        |(schedule, prefetch, prefetch_layers, partition, fill, staging_slots)| EngineSettings {
            schedule,
            prefetch,
            prefetch_layers,
            partition,
            fill,
            staging_slots,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn random_runs_keep_the_contract_and_replay(
        engine in settings(),
        slots in 1_u32..8,
        preload in 0_u32..8,
        steps in prop::collection::vec(prop::collection::vec(prop::collection::btree_map(0_u32..EXPERTS, 1_u32..5, 1..7), LAYERS as usize), 1..25),
        choices in prop::collection::vec(any::<u16>(), 50..200),
        faults in any::<bool>(),
    ) {
        let (spec, machine) = (tiny(LAYERS, EXPERTS, 4), small_machine(8 << 30, 64 << 30, 0));
        let (plan, costs) = hybrid(&spec, &machine, slots, engine, preload);
        let mut e = Engine::with_costs(&plan, Arc::clone(&costs));
        let mut w = Watch { plan: &plan, slots: HashMap::new(), demanded: HashMap::new(), outstanding: Vec::new(), failures: HashMap::new() };
        let (mut inputs, mut actions) = (Vec::new(), Vec::new());
        let mut choices = choices.iter().cycle();
        let mut queue = steps.iter().enumerate().flat_map(|(s, layers)| layers.iter().enumerate().map(move |(l, d)| (s as u64, l as u32, d)));
        let mut next = queue.next();
        let mut now = Nanos(0);
        let mut first = Some(Input::Begin);
        let (mut late_guesses, mut requests) = (0_u64, 0_u64);
        loop {
            let choice = usize::from(*choices.next().unwrap());
            now = Nanos(now.0 + choice as u64 % 100_000);
            let input = if let Some(begin) = first.take() {
                begin
            } else if w.demanded.is_empty() && next.is_some() && (w.outstanding.is_empty() || choice % 3 == 0) {
                let (step, layer, d) = next.take().unwrap();
                if choice % 2 == 0 && layer + 1 < LAYERS {
                    // A guess at the next layer first: right or wrong.
                    let scores = (0..EXPERTS).filter(|x| (choice >> (x % 16)) & 1 == 1).map(|x| (x, 1 + x * 5000)).collect();
                    late_guesses += 1;
                    let guess = Input::Foreseen { step, layer: layer + 1, distance: 1, scores };
                    inputs.push((now, guess.clone()));
                    e.handle(now, guess);
                    while let Some(action) = e.poll(now) {
                        w.see(&action);
                        actions.push(action);
                    }
                }
                next = queue.next();
                requests += d.len() as u64;
                w.demanded.insert(layer, d.keys().copied().collect());
                let tokens = d.values().copied().max().unwrap();
                Input::Routed(Demand { step, layer, experts: d.iter().map(|(e, n)| (*e, *n)).collect(), tokens, scores: Vec::new() })
            } else if !w.outstanding.is_empty() {
                let action = w.outstanding.swap_remove(choice % w.outstanding.len());
                let fails = faults && choice % 4 == 0;
                answer(&plan, action, fails, &mut w.failures, &mut w.slots, &mut w.demanded)
            } else {
                break;
            };
            inputs.push((now, input.clone()));
            e.handle(now, input);
            while let Some(action) = e.poll(now) {
                w.see(&action);
                actions.push(action);
            }
        }
        prop_assert!(w.demanded.is_empty() && next.is_none(), "every demand finishes");
        let s = e.statistics();
        prop_assert_eq!((s.requests, s.hits + s.misses), (requests, requests));
        prop_assert!(s.prefetches_issued >= s.prefetches_used + s.prefetches_late + s.prefetches_useless);
        if engine.prefetch == PrefetchKind::Off {
            prop_assert_eq!(s.prefetches_issued, 0);
        }
        let _ = late_guesses;
        // The replay invariant, byte for byte.
        let again = replay(Engine::with_costs(&plan, costs), &inputs);
        prop_assert_eq!(serde_json::to_string(&again).unwrap(), serde_json::to_string(&actions).unwrap());
    }
}

/// A prefetch that fails for good is given up; a demand for the same expert reads it again.
#[test]
fn a_guess_that_cannot_be_read_does_not_stop_the_run() {
    let (spec, machine) = (tiny(2, 8, 2), small_machine(8 << 30, 64 << 30, 0));
    let (plan, costs) = hybrid(&spec, &machine, 2, EngineSettings { schedule: Rule::AllMoved, ..EngineSettings::default() }, 1);
    let mut e = Engine::with_costs(&plan, costs);
    e.handle(Nanos(0), Input::Begin);
    let loads: Vec<Action> = std::iter::from_fn(|| e.poll(Nanos(0))).collect();
    let [Action::Load { key, slot, purpose: Purpose::Prefetch, .. }, Action::Load { .. }] = loads[..] else {
        panic!("{loads:?}")
    };
    for _ in 0..=MAX_RETRIES {
        e.handle(Nanos(0), Input::Failed { key, slot, reason: "bad sector".into() });
    }
    while let Some(a) = e.poll(Nanos(0)) {
        assert!(matches!(a, Action::Load { .. }), "{a:?}");
    }
    e.handle(Nanos(1), Input::Routed(Demand { layer: 0, experts: vec![(0, 1)], tokens: 1, ..Demand::default() }));
    assert!(matches!(e.poll(Nanos(1)), Some(Action::Load { purpose: Purpose::Demand, .. })));
}

/// The timed simulator does what its recording says, whatever is switched on, and its resources are never busier than time allows.
#[test]
fn simulated_runs_replay_and_add_up() {
    let ids = include_bytes!("data/gptoss20b_11seq.ids.u8");
    let ids: Vec<u16> = ids.iter().map(|e| u16::from(*e)).collect();
    let trace = Trace::new(&ids, 24, 4).unwrap().take(120);
    let (spec, machine) = (tiny(24, 32, 4), small_machine(8 << 30, 64 << 30, 0));
    for prefetch in [PrefetchKind::Off, PrefetchKind::History] {
        for schedule in [Rule::Exact, Rule::Hybrimoe, Rule::Static, Rule::AllMoved] {
            let engine = EngineSettings { schedule, prefetch, prefetch_layers: 2, fill: true, ..EngineSettings::default() };
            let (plan, costs) = hybrid(&spec, &machine, 8, engine, 8);
            for workload in [
                Workload::decode(trace),
                Workload::prefill(trace, &(0..120).collect::<Vec<_>>(), 30),
                Workload::decode_batch(trace, &[0..40, 40..80, 80..120], 2),
            ] {
                let r = simulate(&plan, Some(&costs), &workload, Keep { record: true, timeline: true });
                assert_eq!(r.aborted, None);
                assert_eq!(r.decode.tokens + r.prefill.tokens, 120);
                assert!(
                    r.busy.iter().all(|(_, b)| b.0 <= r.elapsed.0 + r.statistics.preloads * 1_000_000),
                    "{:?} of {:?}",
                    r.busy,
                    r.elapsed
                );
                assert_eq!(replay(Engine::with_costs(&plan, Arc::clone(&costs)), &r.inputs), r.actions);
                assert!(r.timeline.slices.iter().all(|s| s.start <= s.end && s.resource < r.timeline.resources.len()));
                let json: serde_json::Value = serde_json::from_str(&r.timeline.to_chrome_json()).unwrap();
                assert_eq!(json["traceEvents"].as_array().unwrap().len(), r.timeline.slices.len() + r.timeline.resources.len());
            }
        }
    }
}

/// A layer's look-ahead comes after its demand: the guess at the very next layer must count all the same.
#[test]
fn a_look_ahead_over_one_layer_is_used() {
    let (spec, machine) = (tiny(LAYERS, EXPERTS, 4), small_machine(8 << 30, 64 << 30, 0));
    let prefetch = PrefetchKind::Lookahead;
    let engine = EngineSettings { prefetch, prefetch_layers: 1, ..EngineSettings::default() };
    let (plan, costs) = hybrid(&spec, &machine, 8, engine, 0);
    let mut e = Engine::with_costs(&plan, costs);
    let mut now = Nanos(0);
    // Tells it, and answers all it asks for; the guesses among that.
    let tell = |e: &mut Engine, now: Nanos, input: Input| {
        let mut guesses = Vec::new();
        e.handle(now, input);
        while let Some(action) = e.poll(now) {
            let answer = match action {
                Action::Load { key, slot, purpose, .. } => {
                    if purpose == Purpose::Prefetch {
                        guesses.push((key.layer, key.expert));
                    }
                    Input::Loaded { key, slot }
                }
                Action::Compute { layer, wave, .. } => Input::Computed { layer, wave },
                _ => continue,
            };
            e.handle(now, answer);
        }
        guesses
    };
    for step in 0..3 {
        for layer in 0..LAYERS {
            now = Nanos(now.0 + 50_000_000);
            let experts = vec![(0, 1), (1, 1), (2, 1), (3, 1)];
            tell(&mut e, now, Input::Routed(Demand { step, layer, experts, tokens: 1, scores: Vec::new() }));
            if step == 2 && layer == 0 {
                let scores = vec![(EXPERTS - 1, 60_000)];
                let guesses = tell(&mut e, now, Input::Foreseen { step, layer: 1, distance: 1, scores });
                assert_eq!(guesses, [(1, EXPERTS - 1)]);
            }
        }
    }
}
