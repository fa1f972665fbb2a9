//! Streamed prompts: the engine's contract under random drivers with faults, replays, and what streaming is worth on the simulator's clock.

mod common;

use common::{machine, qwen3_30b, small_machine, tiny};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use tierwise_cost::cost::Roofline;
use tierwise_cost::machine::MemoryKind;
use tierwise_cost::units::{Bytes, Nanos};
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::engine::schedule::Rule;
use tierwise_planner::engine::{Action, Demand, Engine, Input, Location, MAX_RETRIES, Purpose, SlotId};
use tierwise_planner::evaluate::{LayerPlacement, Placement};
use tierwise_planner::plan::{EngineSettings, PREFILL_STREAMED};
use tierwise_planner::routing::{GeneratorSpec, generate};
use tierwise_planner::sim::{Keep, Workload, replay, simulate};
use tierwise_planner::{CheckedPlan, Limits, Problem, Request, SolverKind, make_plan, plan_from_placement};

const LAYERS: u32 = 4;
const EXPERTS: u32 = 12;

/// Of four experts the first stays on the GPU, the second comes through a cache slot, the others are planned beside the CPU.
fn plan(settings: EngineSettings) -> (CheckedPlan, Arc<EngineCosts>) {
    let (spec, machine) = (tiny(LAYERS, EXPERTS, 2), small_machine(8 << 30, 64 << 30, 0));
    let request = Request { context: 512, prompt_tokens: 128, chunk_tokens: 64, ..Request::default() };
    let all = Problem::new(&spec, &machine, request.clone()).unwrap();
    let fixed: u64 = all.fixed[all.memory_index("vram0")].iter().map(|(_, b)| b.0).sum();
    // Room for half of the experts.
    let expert = all.layers[0].expert_bytes.0;
    let limits = Limits { vram: Some(Bytes(fixed + expert * u64::from(LAYERS * EXPERTS) / 2)), ..Limits::default() };
    let problem = Problem::new(&spec, &machine, Request { limits, ..request }).unwrap();
    let tier =
        |kind, through: bool| problem.tiers.iter().position(|t| t.kind == kind && t.through.is_some() == through).unwrap() as u8;
    let (gpu, slots, cpu) = (tier(MemoryKind::Vram, false), tier(MemoryKind::Dram, true), tier(MemoryKind::Dram, false));
    let layers = problem.layers.iter().map(|l| LayerPlacement {
        tier_of: (0..l.num_experts).map(|e| [gpu, slots, cpu, cpu][e as usize % 4]).collect(),
        slots: 1,
    });
    let placement = Placement { layers: layers.collect() };
    let mut plan = plan_from_placement(&problem, &Roofline::default(), placement).unwrap();
    plan.predicted.prefill_strategy = PREFILL_STREAMED.into();
    plan.engine = settings;
    let plan = plan.check(&spec, Some(&machine)).unwrap();
    assert_eq!(plan.streaming_slots(), 4, "two buffers of a token's experts");
    let costs = EngineCosts::new(&plan, &spec, &machine, &Roofline::default()).unwrap();
    costs.check(&plan).unwrap();
    let text = serde_json::to_string(&costs).unwrap();
    assert_eq!(serde_json::from_str::<EngineCosts>(&text).unwrap(), costs);
    (plan, Arc::new(costs))
}

/// What a driver may rely on, seen from the outside.
#[derive(Default)]
struct Watch {
    /// What was last loaded into each slot, and whether it has come.
    slots: HashMap<SlotId, (u32, u32, bool)>,
    /// Of the running demand: not given to anyone yet, and being computed from a slot.
    left: HashSet<u32>,
    computing: HashMap<SlotId, u32>,
    layer: Option<u32>,
    /// Slots that the demand being served sent for.
    demanded: HashSet<SlotId>,
    outstanding: Vec<Action>,
}

impl Watch {
    fn see(&mut self, plan: &CheckedPlan, action: Action) {
        match &action {
            Action::Evict { .. } => {}
            Action::Allocate { .. } | Action::Release { .. } => unreachable!("nobody asks for another size"),
            Action::Load { key, slot, from, purpose, .. } => {
                assert!(slot.index < plan.pools()[slot.pool as usize].slots, "within the budget");
                assert_eq!(*from, plan.tier_of(key.layer, key.expert));
                assert!(!self.computing.contains_key(slot), "nobody reads the slot");
                match self.slots.insert(*slot, (key.layer, key.expert, false)) {
                    Some((l, e, false)) => assert_eq!((l, e), (key.layer, key.expert), "a retry"),
                    // What came ahead may have been dismissed since; what this demand sent for stays until it is computed.
                    Some((l, e, true)) if self.demanded.contains(slot) => {
                        assert!(Some(l) != self.layer || !self.left.contains(&e), "nobody needs what was there");
                    }
                    _ => {}
                }
                if *purpose == Purpose::Demand {
                    self.demanded.insert(*slot);
                    assert!(Some(key.layer) == self.layer && self.left.contains(&key.expert));
                }
                let cached = plan.tier(*from).through.is_some();
                assert!(cached || slot.pool == plan.cache_pools().len() as u32, "what is planned elsewhere does not stay");
                self.outstanding.push(action);
            }
            Action::Compute { layer, experts, executor, .. } => {
                assert_eq!(Some(*layer), self.layer);
                for (e, place) in experts {
                    assert!(self.left.remove(e), "computed once, and only on demand");
                    if let Location::Slot(s) = place {
                        assert_eq!(self.slots[s], (*layer, *e, true), "the weights are there");
                        assert_eq!(executor.0, 0);
                        self.computing.insert(*s, *e);
                    }
                }
                self.outstanding.push(action);
            }
            Action::Finish { layer, .. } => {
                assert!(Some(*layer) == self.layer && self.left.is_empty() && self.computing.is_empty());
                self.layer = None;
            }
            Action::Abort { reason } => panic!("{reason}"),
        }
    }
}

fn settings() -> impl Strategy<Value = EngineSettings> {
    (prop::sample::select(vec![Rule::Exact, Rule::Static, Rule::AllMoved]), any::<bool>(), 0_u32..3)
        .prop_map(|(schedule, fill, staging_slots)| EngineSettings { schedule, fill, staging_slots, ..EngineSettings::default() })
}

type Step = (bool, Vec<std::collections::BTreeMap<u32, u32>>);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let layer = prop::collection::btree_map(0_u32..EXPERTS, 1_u32..40, 1..EXPERTS as usize);
    prop::collection::vec((prop::bool::weighted(0.7), prop::collection::vec(layer, LAYERS as usize)), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn random_prompts_keep_the_contract_and_replay(
        settings in settings(),
        steps in steps(),
        choices in prop::collection::vec(any::<u16>(), 50..200),
        faults in any::<bool>(),
    ) {
        let (plan, costs) = plan(settings);
        let mut e = Engine::with_costs(&plan, Arc::clone(&costs));
        let (mut w, mut inputs, mut actions) = (Watch::default(), Vec::new(), Vec::new());
        let mut failures: HashMap<(SlotId, u32, u32), u32> = HashMap::new();
        let mut choices = choices.iter().cycle();
        let demands = steps.iter().enumerate().flat_map(|(s, (prompt, layers))| {
            layers.iter().enumerate().map(move |(l, d)| {
                let last = l + 1 == LAYERS as usize;
                // In the last layer some steps compute one token alone.
                let single = !prompt || (last && s % 2 == 0);
                let experts: Vec<(u32, u32)> = d.iter().map(|(e, n)| (*e, if single { 1 } else { *n })).take(if single { 2 } else { 99 }).collect();
                Demand { step: s as u64, layer: l as u32, experts, tokens: if single { 1 } else { 64 }, scores: Vec::new() }
            })
        });
        let mut demands = demands.collect::<Vec<_>>().into_iter();
        let (mut now, mut requests) = (Nanos(0), 0);
        loop {
            let choice = usize::from(*choices.next().unwrap());
            now = Nanos(now.0 + choice as u64 % 100_000);
            let begins = w.layer.is_none() && (choice % 3 == 0 || w.outstanding.is_empty());
            let input = if let Some(demand) = begins.then(|| demands.next()).flatten() {
                requests += demand.experts.len() as u64;
                w.demanded.clear();
                (w.layer, w.left) = (Some(demand.layer), demand.experts.iter().map(|d| d.0).collect());
                Input::Routed(demand)
            } else if w.outstanding.is_empty() {
                prop_assert!(w.layer.is_none(), "the engine waits for nothing");
                break;
            } else {
                match w.outstanding.swap_remove(choice % w.outstanding.len()) {
                    Action::Load { key, slot, .. } => {
                        let times = failures.entry((slot, key.layer, key.expert)).or_default();
                        if faults && choice % 4 == 0 && *times < MAX_RETRIES {
                            *times += 1;
                            if w.slots.get(&slot) == Some(&(key.layer, key.expert, false)) {
                                // It may be given up instead of being tried again.
                                w.slots.remove(&slot);
                            }
                            Input::Failed { key, slot, reason: "injected".into() }
                        } else {
                            *times = 0;
                            w.slots.insert(slot, (key.layer, key.expert, true));
                            Input::Loaded { key, slot }
                        }
                    }
                    Action::Compute { layer, wave, experts, .. } => {
                        w.computing.retain(|_, e| !experts.iter().any(|(x, _)| x == e));
                        Input::Computed { layer, wave }
                    }
                    other => unreachable!("{other:?} needs no answer"),
                }
            };
            inputs.push((now, input.clone()));
            e.handle(now, input);
            while let Some(action) = e.poll(now) {
                actions.push(action.clone());
                w.see(&plan, action);
            }
        }
        let s = e.statistics();
        prop_assert_eq!((s.requests, s.hits + s.misses), (requests, requests));
        prop_assert!(s.streamed_useless <= s.streamed_ahead + s.streamed);
        let again = replay(Engine::with_costs(&plan, costs), &inputs);
        prop_assert_eq!(serde_json::to_string(&again).unwrap(), serde_json::to_string(&actions).unwrap());
    }
}

/// A large prompt on a desktop: the same plan computed in place (every expert where it is planned), and streamed.
#[test]
fn streaming_is_worth_what_the_plan_says() {
    let (spec, machine) = (qwen3_30b("Q4_K_M"), machine("rtx3090-24g-ddr4-64g"));
    let limits = Limits { vram: Some(Bytes(8 << 30)), ..Limits::default() };
    let request = Request { context: 8192, prompt_tokens: 4096, chunk_tokens: 2048, limits, ..Request::default() };
    let problem = Problem::new(&spec, &machine, request).unwrap();
    let planned = make_plan(&problem, &Roofline::default(), SolverKind::Greedy).unwrap();
    assert_eq!(planned.predicted.prefill_strategy, PREFILL_STREAMED);
    let predicted = planned.predicted.prefill_tokens_per_s.value;
    let plan = planned.check(&spec, Some(&machine)).unwrap();
    let costs = EngineCosts::new(&plan, &spec, &machine, &Roofline::default()).unwrap();
    let mut in_place = costs.clone();
    in_place.streams = false;
    let trace = generate(&GeneratorSpec::zipf(48, 128, 8, 0.5, 1, 7), 4096, 11).unwrap();
    let tokens: Vec<usize> = (0..4096).collect();
    let run = |costs: EngineCosts| {
        let workload = Workload::prefill(trace.view(), &tokens, 2048);
        let costs = Arc::new(costs);
        let r = simulate(&plan, Some(&costs), &workload, Keep { record: true, timeline: false });
        assert_eq!(r.aborted, None);
        assert_eq!(replay(Engine::with_costs(&plan, costs), &r.inputs), r.actions);
        r
    };
    let (before, after) = (run(in_place), run(costs));
    let rate = |r: &tierwise_planner::sim::Report| r.prefill.tokens_per_s();
    let link = |r: &tierwise_planner::sim::Report| {
        r.busy.iter().find(|b| b.0.contains("->")).map_or(0.0, |b| b.1.to_seconds().0 / r.elapsed.to_seconds().0)
    };
    println!(
        "in place {:.0} tokens/s; streamed {:.0} (planned {predicted:.0}), link busy {:.0} %, {} asked for, {} ahead, {} of no use",
        rate(&before),
        rate(&after),
        100.0 * link(&after),
        after.statistics.streamed,
        after.statistics.streamed_ahead,
        after.statistics.streamed_useless,
    );
    assert!(after.statistics.streamed > 0 && after.statistics.streamed_ahead > 0 && before.statistics.streamed == 0);
    assert!(rate(&after) > 1.5 * rate(&before), "{} against {}", rate(&after), rate(&before));
    assert!(rate(&after) > 0.8 * predicted, "{} of {predicted} planned", rate(&after));
}
