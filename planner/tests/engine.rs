//! The engine's contract: a hand-made trace, invariants under random drivers, faults, replays.

mod common;

use common::{cached_plan, tiny};
use proptest::prelude::*;
use std::collections::HashMap;
use tierwise_cost::units::Nanos;
use tierwise_planner::CheckedPlan;
use tierwise_planner::engine::{
    Action, Demand, Engine, ExecutorId, ExpertKey, Input, Location, MAX_RETRIES, Purpose, SlotId, TierId,
};
use tierwise_planner::sim::{Keep, Trace, Workload, replay, simulate};

fn demand(step: u64, layer: u32, experts: &[u32]) -> Input {
    Input::Routed(Demand { step, layer, experts: experts.iter().map(|e| (*e, 1)).collect(), tokens: 1, scores: Vec::new() })
}

fn drain(engine: &mut Engine) -> Vec<Action> {
    std::iter::from_fn(|| engine.poll(Nanos(0))).collect()
}

fn tell(engine: &mut Engine, input: Input) -> Vec<Action> {
    engine.handle(Nanos(0), input);
    drain(engine)
}

/// Slot `index` of the first layer.
const fn at(index: u32) -> SlotId {
    SlotId { pool: 0, index }
}

fn key(expert: u32) -> ExpertKey {
    ExpertKey { layer: 0, expert }
}

fn compute(wave: u32, experts: &[(u32, Location)]) -> Action {
    Action::Compute { layer: 0, wave, experts: experts.to_vec(), executor: ExecutorId(0) }
}

#[test]
fn a_trace_by_hand() {
    let spec = tiny(1, 8, 3);
    let plan = cached_plan(&spec, 0, 3);
    let bytes = plan.expert_bytes(0);
    let from = plan.tier_of(0, 0);
    let load = |expert, slot| Action::Load { key: key(expert), slot: at(slot), bytes, from, purpose: Purpose::Demand };
    let mut e = Engine::new(&plan);
    // Three misses into empty slots: one atomic set, nothing to evict.
    assert_eq!(tell(&mut e, demand(7, 0, &[1, 4, 6])), [load(1, 0), load(4, 1), load(6, 2)]);
    // The first that arrives is computed at once; the others wait for the executor and go together.
    assert_eq!(tell(&mut e, Input::Loaded { key: key(4), slot: at(1) }), [compute(0, &[(4, Location::Slot(at(1)))])]);
    assert_eq!(tell(&mut e, Input::Loaded { key: key(1), slot: at(0) }), []);
    assert_eq!(tell(&mut e, Input::Loaded { key: key(6), slot: at(2) }), []);
    assert_eq!(
        tell(&mut e, Input::Computed { layer: 0, wave: 0 }),
        [compute(1, &[(1, Location::Slot(at(0))), (6, Location::Slot(at(2)))])]
    );
    assert_eq!(tell(&mut e, Input::Computed { layer: 0, wave: 1 }), [Action::Finish { step: 7, layer: 0 }]);
    // Two hits and a miss: hits first, and the victim is not one of the demanded.
    assert_eq!(
        tell(&mut e, demand(8, 0, &[1, 2, 6])),
        [
            compute(0, &[(1, Location::Slot(at(0))), (6, Location::Slot(at(2)))]),
            Action::Evict { key: key(4), slot: at(1) },
            load(2, 1)
        ]
    );
    assert_eq!(tell(&mut e, Input::Computed { layer: 0, wave: 0 }), []);
    assert_eq!(tell(&mut e, Input::Loaded { key: key(2), slot: at(1) }), [compute(1, &[(2, Location::Slot(at(1)))])]);
    assert_eq!(tell(&mut e, Input::Computed { layer: 0, wave: 1 }), [Action::Finish { step: 8, layer: 0 }]);
    let s = e.statistics();
    assert_eq!((s.demands, s.requests, s.hits, s.misses, s.loads, s.evictions, s.waves), (2, 6, 2, 4, 4, 1, 4));
    assert_eq!(s.bytes_loaded_by_tier.iter().map(|b| b.0).sum::<u64>(), 4 * bytes.0);
    assert_eq!(e.resident_slots(0).collect::<Vec<_>>(), [(at(0), 1), (at(1), 2), (at(2), 6)]);
}

#[test]
fn more_misses_than_slots_are_served_in_waves() {
    let spec = tiny(1, 8, 4);
    let plan = cached_plan(&spec, 0, 1);
    let mut e = Engine::new(&plan);
    let mut computed = Vec::new();
    let mut actions: std::collections::VecDeque<Action> = tell(&mut e, demand(0, 0, &[0, 2, 3, 5])).into();
    let mut finished = false;
    while let Some(action) = actions.pop_front() {
        let input = match action {
            Action::Load { key, slot, .. } => Input::Loaded { key, slot },
            Action::Compute { layer, wave, experts, .. } => {
                computed.extend(experts.iter().map(|x| x.0));
                Input::Computed { layer, wave }
            }
            Action::Finish { .. } => {
                finished = true;
                continue;
            }
            _ => continue,
        };
        actions.extend(tell(&mut e, input));
    }
    assert!(finished);
    assert_eq!(computed, [0, 2, 3, 5]);
    assert_eq!(e.statistics().evictions, 3);
}

#[test]
fn planned_residents_never_load() {
    let spec = tiny(2, 8, 4);
    let plan = cached_plan(&spec, 6, 1);
    let mut e = Engine::new(&plan);
    let actions = tell(&mut e, Input::Routed(Demand { layer: 1, experts: vec![(0, 3), (5, 1)], tokens: 3, ..Demand::default() }));
    let expected = vec![(0, Location::Resident), (5, Location::Resident)];
    assert_eq!(actions, [Action::Compute { layer: 1, wave: 0, experts: expected, executor: ExecutorId(0) }]);
    assert_eq!(tell(&mut e, Input::Computed { layer: 1, wave: 0 }), [Action::Finish { step: 0, layer: 1 }]);
    assert_eq!((e.statistics().resident_hits, e.statistics().hit_rate()), (2, 1.0));
}

#[test]
fn loads_are_retried_twice_then_the_engine_gives_up() {
    let spec = tiny(1, 8, 2);
    let plan = cached_plan(&spec, 0, 2);
    let mut e = Engine::new(&plan);
    let first = tell(&mut e, demand(0, 0, &[3]));
    let fault = || Input::Failed { key: key(3), slot: at(0), reason: "short read".into() };
    for _ in 0..MAX_RETRIES {
        assert_eq!(tell(&mut e, fault()), first);
    }
    let last = tell(&mut e, fault());
    assert!(
        matches!(&last[..], [Action::Abort { reason }] if reason.contains("short read") && reason.contains("3 tries")),
        "{last:?}"
    );
    assert_eq!(tell(&mut e, demand(1, 0, &[3])), []);
    // One failure is survived, and the counter starts anew with the next load.
    let mut e = Engine::new(&plan);
    tell(&mut e, demand(0, 0, &[3]));
    tell(&mut e, fault());
    assert!(matches!(tell(&mut e, Input::Loaded { key: key(3), slot: at(0) })[..], [Action::Compute { .. }]));
    assert_eq!(e.statistics().retries, 1);
}

#[test]
fn what_cannot_be_aborts() {
    let spec = tiny(2, 8, 2);
    let plan = cached_plan(&spec, 0, 2);
    let cases: Vec<(&str, Vec<Input>, &str)> = vec![
        ("unknown layer", vec![demand(0, 9, &[0])], "layer 9"),
        ("unknown expert", vec![demand(0, 0, &[8])], "below 8"),
        ("unsorted", vec![demand(0, 0, &[3, 1])], "not a set"),
        ("twice", vec![demand(0, 0, &[3, 3])], "not a set"),
        ("no tokens", vec![Input::Routed(Demand { experts: vec![(1, 0)], tokens: 1, ..Demand::default() })], "tokens"),
        ("busy layer", vec![demand(0, 0, &[1]), demand(1, 0, &[2])], "serves step 0"),
        ("load not asked for", vec![Input::Loaded { key: key(1), slot: at(0) }], "not being loaded"),
        ("wrong slot", vec![demand(0, 0, &[1]), Input::Loaded { key: key(1), slot: at(1) }], "slot 1"),
        ("slot out of range", vec![demand(0, 0, &[1]), Input::Loaded { key: key(1), slot: at(99) }], "slot 99"),
        ("wave not asked for", vec![demand(0, 0, &[1]), Input::Computed { layer: 0, wave: 0 }], "wave 0"),
        ("sizes for other pools", vec![Input::Resize { slots: vec![2] }], "1 sizes were given for 2"),
        ("no slot at all", vec![Input::Resize { slots: vec![2, 0] }], "pool 1 of slots is to have 0, expected 1 to 8"),
        ("more slots than experts", vec![Input::Resize { slots: vec![9, 2] }], "expected 1 to 8"),
        ("failure not asked for", vec![Input::Failed { key: key(1), slot: at(0), reason: String::new() }], "not being loaded"),
    ];
    for (name, inputs, words) in cases {
        let mut e = Engine::new(&plan);
        let last = inputs.into_iter().map(|i| tell(&mut e, i)).last().unwrap();
        assert!(matches!(&last[..], [Action::Abort { reason }] if reason.contains(words)), "{name}: {last:?}");
    }
    // Another layer is another matter.
    let mut e = Engine::new(&plan);
    tell(&mut e, demand(0, 0, &[1]));
    assert!(matches!(tell(&mut e, demand(0, 1, &[1]))[..], [Action::Load { .. }]));
    // An empty demand is served at once.
    let mut e = Engine::new(&plan);
    assert_eq!(tell(&mut e, demand(4, 0, &[])), [Action::Finish { step: 4, layer: 0 }]);
}

/// What a driver may rely on, checked from the outside.
struct Watch<'p> {
    plan: &'p CheckedPlan,
    /// Content by slot: an expert and whether it has arrived.
    slots: HashMap<SlotId, (u32, bool)>,
    demanded: HashMap<u32, Vec<u32>>,
    outstanding: Vec<Action>,
}

impl Watch<'_> {
    fn see(&mut self, action: &Action) {
        match action {
            Action::Evict { key, slot } => {
                let removed = self.slots.remove(slot);
                assert_eq!(removed, Some((key.expert, true)), "only what is in the slot leaves it");
                assert!(!self.demanded[&key.layer].contains(&key.expert), "nothing demanded is evicted before it is served");
            }
            Action::Load { key, slot, bytes, from, .. } => {
                assert!(slot.index < self.plan.pools()[slot.pool as usize].slots, "within the budget");
                assert_eq!(*bytes, self.plan.expert_bytes(key.layer));
                assert_eq!(*from, self.plan.tier_of(key.layer, key.expert));
                assert!(self.plan.tier(*from).through.is_some());
                let before = self.slots.insert(*slot, (key.expert, false));
                assert!(before.is_none() || before == Some((key.expert, false)), "a load goes into a free slot, or is a retry");
                self.outstanding.push(action.clone());
            }
            Action::Compute { layer, experts, .. } => {
                for (e, place) in experts {
                    assert!(self.demanded[layer].contains(e), "computed once, and only on demand");
                    match place {
                        Location::Resident => assert!(self.plan.tier(self.plan.tier_of(*layer, *e)).through.is_none()),
                        Location::Slot(s) => assert_eq!(self.slots[s], (*e, true), "the weights are there"),
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

fn check_random_run(slots: u32, resident: u32, demands: &[(u32, Vec<u32>)], choices: &[u16], faults: bool) {
    let spec = tiny(2, 12, 4);
    let plan = cached_plan(&spec, resident, slots);
    let mut engine = Engine::new(&plan);
    let mut w = Watch { plan: &plan, slots: HashMap::new(), demanded: HashMap::new(), outstanding: Vec::new() };
    let (mut inputs, mut actions) = (Vec::new(), Vec::new());
    let mut queue = demands.iter().enumerate();
    let mut choices = choices.iter().cycle();
    let mut failed: HashMap<SlotId, u32> = HashMap::new();
    let mut next = queue.next();
    let mut now = Nanos(0);
    loop {
        let choice = usize::from(*choices.next().unwrap());
        now = Nanos(now.0 + choice as u64 % 1000);
        // Either the next demand, if its layer is idle, or any outstanding action completes.
        let start = next.is_some_and(|(_, (l, _))| !w.demanded.contains_key(l)) && (w.outstanding.is_empty() || choice % 3 == 0);
        let input = if start {
            let (step, (layer, experts)) = next.unwrap();
            w.demanded.insert(*layer, experts.clone());
            next = queue.next();
            demand(step as u64, *layer, experts)
        } else if !w.outstanding.is_empty() {
            match w.outstanding.swap_remove(choice % w.outstanding.len()) {
                Action::Load { key, slot, .. } => {
                    let times = failed.entry(slot).or_default();
                    if faults && choice % 4 == 0 && *times < MAX_RETRIES {
                        *times += 1;
                        Input::Failed { key, slot, reason: "injected".into() }
                    } else {
                        *times = 0;
                        w.slots.insert(slot, (key.expert, true));
                        Input::Loaded { key, slot }
                    }
                }
                Action::Compute { layer, wave, experts, .. } => {
                    let left = w.demanded.get_mut(&layer).unwrap();
                    left.retain(|e| !experts.iter().any(|(x, _)| x == e));
                    Input::Computed { layer, wave }
                }
                other => unreachable!("{other:?} needs no answer"),
            }
        } else {
            break;
        };
        inputs.push((now, input.clone()));
        engine.handle(now, input);
        while let Some(action) = engine.poll(now) {
            w.see(&action);
            actions.push(action);
        }
    }
    assert!(w.demanded.is_empty() && next.is_none(), "every demand finishes");
    let s = engine.statistics();
    assert_eq!(s.requests, demands.iter().map(|(_, e)| e.len() as u64).sum::<u64>());
    assert_eq!((s.hits + s.misses, s.loads), (s.requests, s.misses + s.retries));
    // The replay invariant, byte for byte.
    let again = replay(Engine::new(&plan), &inputs);
    assert_eq!(serde_json::to_string(&again).unwrap(), serde_json::to_string(&actions).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn random_runs_keep_the_contract_and_replay(
        slots in 1_u32..6,
        resident in 0_u32..7,
        demands in prop::collection::vec((0_u32..2, prop::collection::btree_set(0_u32..12, 1..9)), 1..40),
        choices in prop::collection::vec(any::<u16>(), 50..200),
        faults in any::<bool>(),
    ) {
        let demands: Vec<(u32, Vec<u32>)> = demands.into_iter().map(|(l, d)| (l, d.into_iter().collect())).collect();
        check_random_run(slots, resident, &demands, &choices, faults);
    }

    /// Polling pattern makes no difference: a driver that answers between polls gives the same actions as its recording.
    #[test]
    fn interleaving_polls_changes_nothing(
        slots in 1_u32..5,
        demands in prop::collection::vec(prop::collection::btree_set(0_u32..12, 1..6), 1..30),
    ) {
        let spec = tiny(1, 12, 4);
        let plan = cached_plan(&spec, 0, slots);
        let mut engine = Engine::new(&plan);
        let (mut inputs, mut actions) = (Vec::new(), Vec::new());
        for (step, d) in demands.into_iter().enumerate() {
            let mut input = Some(demand(step as u64, 0, &d.into_iter().collect::<Vec<_>>()));
            loop {
                if let Some(i) = input.take() {
                    inputs.push((Nanos(0), i.clone()));
                    engine.handle(Nanos(0), i);
                }
                // One action at a time, answered at once.
                let Some(action) = engine.poll(Nanos(0)) else { break };
                input = match &action {
                    Action::Load { key, slot, .. } => Some(Input::Loaded { key: *key, slot: *slot }),
                    Action::Compute { layer, wave, .. } => Some(Input::Computed { layer: *layer, wave: *wave }),
                    _ => None,
                };
                actions.push(action);
            }
        }
        prop_assert_eq!(replay(Engine::new(&plan), &inputs), actions);
    }
}

/// The published hit rates of one LRU cache per layer on a continuous stream (data statistics, gpt-oss-20b).
#[test]
fn lru_hit_rates_are_the_independent_ones() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/routing");
    let Ok(ids) = std::fs::read(path.join("gptoss20b_160seq.ids.u8")) else {
        println!("skipped: no ../shared/data/routing/gptoss20b_160seq.ids.u8 beside the workspace");
        return;
    };
    let stats: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path.join("policies.stats.json")).unwrap()).unwrap();
    let published = &stats["gptoss20b"];
    let tokens = published["tokens_for_policies"].as_u64().unwrap() as usize;
    let ids: Vec<u16> = ids.into_iter().map(u16::from).collect();
    let trace = Trace::new(&ids, 24, 4).unwrap().take(tokens);
    let spec = tiny(24, 32, 4);
    for slots in [4, 8, 12, 16, 24] {
        let report = simulate(&cached_plan(&spec, 0, slots), None, &Workload::decode(trace), Keep::default());
        let expected = published["policies"][slots.to_string()]["lru"].as_f64().unwrap();
        println!("{slots} of 32: {:.4}, published {expected:.4}", report.statistics.hit_rate());
        assert_eq!(report.statistics.requests, (tokens * 24 * 4) as u64);
        // The published stream is shuffled by sequence: the same traffic, not the same order.
        assert!((report.statistics.hit_rate() - expected).abs() < 0.006, "{slots}: {}", report.statistics.hit_rate());
    }
}

/// Against a cache written in ten lines, exactly, on real routing.
#[test]
fn lru_on_real_routing_equals_a_naive_cache() {
    let ids: Vec<u16> = include_bytes!("data/gptoss20b_11seq.ids.u8").iter().map(|e| u16::from(*e)).collect();
    let trace = Trace::new(&ids, 24, 4).unwrap();
    let spec = tiny(24, 32, 4);
    for slots in [4_usize, 8, 16] {
        let mut caches = vec![Vec::<u16>::new(); 24];
        let mut hits = 0_u64;
        for (i, chosen) in ids.chunks(4).enumerate() {
            let cache = &mut caches[i % 24];
            hits += chosen.iter().filter(|e| cache.contains(e)).count() as u64;
            cache.retain(|e| !chosen.contains(e));
            let mut newest = chosen.to_vec();
            newest.sort_unstable();
            cache.extend(newest);
            let excess = cache.len().saturating_sub(slots);
            cache.drain(..excess);
        }
        let report = simulate(
            &cached_plan(&spec, 0, slots as u32),
            None,
            &Workload::decode(trace),
            Keep { record: slots == 8, timeline: false },
        );
        assert_eq!(report.statistics.hits, hits, "{slots} slots");
        assert_eq!((report.decode.tokens, report.aborted), (986, None));
        if slots == 8 {
            assert_eq!(replay(Engine::new(&cached_plan(&spec, 0, 8)), &report.inputs), report.actions);
            assert!(report.actions.iter().any(|a| matches!(a, Action::Load { from: TierId(_), .. })));
        }
    }
}
