//! Budgets that change while a run goes on: what the planner makes of them, and the engine's contract under random sizes.

mod common;

use common::answers::{Content, Demanded, answer};
use common::{small_machine, tiny};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use tierwise_cost::cost::Roofline;
use tierwise_cost::model::{Geometry, ModelSpec};
use tierwise_cost::recipe::Recipe;
use tierwise_cost::units::{Bytes, Nanos};
use tierwise_planner::elastic::{elastic_plan, with_ram};
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::engine::schedule::Rule;
use tierwise_planner::engine::{Action, Demand, Engine, Input, Location, SlotId};
use tierwise_planner::plan::{CachePartition, CachePolicyKind, EngineSettings, PrefetchKind};
use tierwise_planner::sim::replay;
use tierwise_planner::{CheckedPlan, Limits, PlanError, Problem, Request, budget};

const LAYERS: u32 = 3;
const EXPERTS: u32 = 12;
const PER_TOKEN: u32 = 4;

fn request(ram: Option<Bytes>) -> Request {
    Request { context: 512, prompt_tokens: 128, limits: Limits { ram, ..Limits::default() }, ..Request::default() }
}

fn plan(spec: &ModelSpec, ram: Option<Bytes>) -> Result<CheckedPlan, PlanError> {
    let machine = small_machine(0, 64 << 30, 1 << 40);
    let problem = Problem::elastic(spec, &machine, request(ram))?;
    elastic_plan(&problem, &Roofline::default())?.check(spec, Some(&machine))
}

/// Host memory that holds `share` of the experts' bytes beside all else.
fn ram(spec: &ModelSpec, share: f64) -> Bytes {
    let r = request(None);
    let rest: Bytes = [budget::non_expert_weights(spec), budget::kv(spec, &r), budget::activations(spec, &r)].into_iter().sum();
    Bytes(rest.0 + (share * spec.expert_bytes().0 as f64) as u64)
}

/// Layers with experts of two sizes.
fn uneven() -> ModelSpec {
    let block = |inner: u32, repeat: u32| {
        format!(
            "[[block]]\nrepeat = {repeat}\n[block.attention]\nkind = \"gqa\"\nnum_heads = 2\nnum_kv_heads = 1\nhead_dim = 32\nqk_norm = \"per_head\"\n\
             rope = {{ theta = 1e6, rotary_dim = 32 }}\n[block.ffn]\nkind = \"moe\"\nnum_experts = {EXPERTS}\nexperts_per_token = {PER_TOKEN}\n\
             inner_size = {inner}\nrouter = {{ score = \"softmax\", normalize_topk = true }}\n"
        )
    };
    let text = format!(
        "name = \"uneven\"\narchitecture = \"qwen3moe\"\nhidden_size = 64\nvocab_size = 256\ncontext_length = 40960\nsource = \"test\"\n{}{}",
        block(64, 1),
        block(160, 2)
    );
    ModelSpec::with_recipe(Geometry::from_toml(&text).unwrap(), &Recipe::by_name("F32").unwrap()).unwrap()
}

#[test]
fn budgets_become_slots_and_other_budgets_other_slots() {
    let machine = small_machine(0, 64 << 30, 1 << 40);
    for spec in [tiny(LAYERS, EXPERTS, PER_TOKEN), uneven()] {
        // With room for all of them there is a slot for each, and still none is pinned.
        let all = plan(&spec, None).unwrap();
        assert!(all.is_elastic() && all.moe_layers().iter().all(|l| all.slots(*l) == EXPERTS));
        let experts = spec.expert_bytes();
        let mut current = plan(&spec, Some(ram(&spec, 0.75))).unwrap();
        assert_eq!(current.plan().solver, "elastic");
        for share in [0.75, 0.25, 0.6, 1.0, 0.25] {
            let budget = ram(&spec, share);
            let next = with_ram(&current, &spec, &machine, &Roofline::default(), budget).unwrap();
            // The same as planned from the start, but for predictions of other slots: the slots follow from the budget alone.
            let fresh = plan(&spec, Some(budget)).unwrap();
            assert_eq!(next.plan(), fresh.plan(), "{share}");
            let largest = next.moe_layers().iter().map(|l| next.expert_bytes(*l).0).max().unwrap();
            let (slots, room) = (next.slot_bytes().0, (share * experts.0 as f64) as u64);
            assert!(slots <= room && slots + largest > room, "{share}: {slots} of {room}");
            assert_eq!(next.plan().request.limits.ram, Some(budget));
            current = next;
        }
    }
}

#[test]
fn settings_stay_with_another_budget() {
    let machine = small_machine(0, 64 << 30, 1 << 40);
    let spec = tiny(LAYERS, EXPERTS, PER_TOKEN);
    let mut first = plan(&spec, Some(ram(&spec, 0.9))).unwrap().plan().clone();
    let staging = first.layers[0].expert_bytes.0 * 2;
    // Room for two that pass through: a slot of two layers each.
    first.layers[0].slots -= 1;
    first.layers[1].slots -= 1;
    for line in &mut first.budgets.iter_mut().find(|b| b.memory == "dram0").unwrap().lines {
        match line.name.as_str() {
            budget::EXPERT_CACHE => line.bytes.0 -= staging,
            budget::FREE => line.bytes.0 += staging,
            _ => {}
        }
    }
    first.engine = EngineSettings { staging_slots: 2, prefetch: PrefetchKind::History, prefetch_layers: 2, ..first.engine };
    first.layers.iter_mut().for_each(|l| l.policy = CachePolicyKind::Lru);
    let first = first.check(&spec, Some(&machine)).unwrap();
    let next = with_ram(&first, &spec, &machine, &Roofline::default(), ram(&spec, 0.5)).unwrap();
    assert_eq!((next.plan().engine, next.plan().layers[0].policy), (first.plan().engine, CachePolicyKind::Lru));
    let one = next.expert_bytes(0).0;
    assert!(
        next.slot_bytes().0 + 2 * one <= spec.expert_bytes().0 / 2 && next.slot_bytes().0 + 3 * one > spec.expert_bytes().0 / 2
    );
    // Slots for one expert per layer, and none for those that pass through: refused, and the budget named works.
    let least = Bytes(ram(&spec, 0.0).0 + 3 * one);
    let error = with_ram(&first, &spec, &machine, &Roofline::default(), least).unwrap_err();
    let PlanError::ExpertsDoNotFit { smallest, .. } = &error else { panic!("{error}") };
    assert_eq!(smallest.0, least.0 + 2 * one, "{error}");
    with_ram(&first, &spec, &machine, &Roofline::default(), *smallest).unwrap();
}

#[test]
fn what_is_too_small_is_refused_with_what_works() {
    let machine = small_machine(0, 64 << 30, 1 << 40);
    for spec in [tiny(LAYERS, EXPERTS, PER_TOKEN), uneven()] {
        let first = plan(&spec, Some(ram(&spec, 0.75))).unwrap();
        let one_each: u64 = first.moe_layers().iter().map(|l| first.expert_bytes(*l).0).sum();
        let least = ram(&spec, 0.0).0 + one_each;
        for too_small in [Bytes(0), Bytes(1000), Bytes(least - 1)] {
            let error = with_ram(&first, &spec, &machine, &Roofline::default(), too_small).unwrap_err();
            let (PlanError::NoRoom { smallest, .. } | PlanError::ExpertsDoNotFit { smallest, .. }) = &error else {
                panic!("{error}")
            };
            assert_eq!(smallest.0, least, "{error}");
        }
        let works = with_ram(&first, &spec, &machine, &Roofline::default(), Bytes(least)).unwrap();
        assert!(works.moe_layers().iter().all(|l| works.slots(*l) == 1));
        let error = with_ram(&first, &spec, &machine, &Roofline::default(), Bytes(65 << 30)).unwrap_err();
        assert!(error.to_string().contains("at most 64 GiB"), "{error}");
    }
    let spec = tiny(LAYERS, EXPERTS, PER_TOKEN);
    // Pinned experts cannot be given up; a GPU's slots do not change; without a disk nothing is loaded.
    let pinned = common::cached_plan(&spec, 3, 2);
    assert!(!pinned.is_elastic());
    let error = with_ram(&pinned, &spec, &machine, &Roofline::default(), ram(&spec, 0.75)).unwrap_err();
    assert!(error.to_string().contains("--elastic"), "{error}");
    let error = Problem::elastic(&spec, &small_machine(8 << 30, 64 << 30, 1 << 40), request(None)).unwrap_err();
    assert!(error.to_string().contains("--vram 0B"), "{error}");
    let error = Problem::elastic(&spec, &small_machine(0, 64 << 30, 0), request(None)).unwrap_err();
    assert!(error.to_string().contains("no disk"), "{error}");
    // A plan for another machine's memories.
    let mut other = machine;
    other.memories[1].id = "disk7".into();
    other.links[0].from = "disk7".into();
    let first = plan(&spec, None).unwrap();
    let error = with_ram(&first, &spec, &other, &Roofline::default(), ram(&spec, 0.75)).unwrap_err();
    assert!(error.to_string().contains("disk7"), "{error}");
}

/// What a driver may rely on while sizes change, checked from the outside.
struct Watch<'p> {
    plan: &'p CheckedPlan,
    /// Slots that there are.
    there: HashSet<SlotId>,
    content: Content,
    demanded: Demanded,
    outstanding: Vec<Action>,
    failures: HashMap<SlotId, u32>,
    target: Vec<u32>,
    /// There may be no more bytes of slots than these.
    most: u64,
}

impl Watch<'_> {
    fn bytes(&self) -> u64 {
        let pools = self.plan.cache_pools();
        self.there.iter().filter_map(|s| pools.get(s.pool as usize)).map(|p| p.slot_bytes.0).sum()
    }

    fn target_bytes(&self) -> u64 {
        self.plan.cache_pools().iter().zip(&self.target).map(|(p, n)| p.slot_bytes.0 * u64::from(*n)).sum()
    }

    fn held(&self) -> Vec<u32> {
        (0..self.target.len() as u32).map(|p| self.there.iter().filter(|s| s.pool == p).count() as u32).collect()
    }

    /// The actions after one input.
    fn see(&mut self, actions: &[Action]) {
        let changed = actions.iter().filter(|a| matches!(a, Action::Allocate { .. } | Action::Release { .. })).count();
        assert!(changed <= PER_TOKEN as usize, "a stage is one layer's demand: {changed}");
        for action in actions {
            self.one(action);
            assert!(self.bytes() <= self.most, "more bytes than in either state");
        }
        // What went does not come back.
        self.most = self.bytes().max(self.target_bytes());
    }

    fn one(&mut self, action: &Action) {
        match action {
            Action::Allocate { slot } => assert!(self.there.insert(*slot), "a new slot"),
            Action::Release { slot } => {
                assert!(self.there.remove(slot), "a slot that was there");
                assert!(!self.content.contains_key(slot), "it is empty, and nothing is on its way");
            }
            Action::Evict { key, slot } => {
                assert_eq!(self.content.remove(slot), Some((key.layer, key.expert, true)), "only what is in the slot leaves it");
                let needed = self.demanded.get(&key.layer).is_some_and(|d| d.contains(&key.expert));
                assert!(!needed, "nothing demanded is evicted before it is served");
            }
            Action::Load { key, slot, .. } => {
                assert!(self.there.contains(slot), "into a slot that there is");
                let before = self.content.insert(*slot, (key.layer, key.expert, false));
                assert!(before.is_none() || before == Some((key.layer, key.expert, false)), "a free slot, or a retry");
                self.outstanding.push(action.clone());
            }
            Action::Compute { layer, experts, .. } => {
                for (e, place) in experts {
                    assert!(self.demanded[layer].contains(e), "computed once, and only on demand");
                    let Location::Slot(s) = place else { panic!("none is pinned") };
                    assert!(self.there.contains(s));
                    assert_eq!(self.content[s], (*layer, *e, true), "the weights are there");
                }
                self.outstanding.push(action.clone());
            }
            Action::Finish { layer, .. } => assert!(self.demanded.remove(layer).unwrap().is_empty(), "everything was computed"),
            Action::Abort { reason } => panic!("{reason}"),
        }
    }
}

fn engines() -> impl Strategy<Value = (EngineSettings, CachePolicyKind)> {
    let policies = vec![
        CachePolicyKind::Lru,
        CachePolicyKind::Mrs { alpha_percent: 50, top_p: 0 },
        CachePolicyKind::Lfu { halve_every: 8 },
        CachePolicyKind::Slru { protected_percent: 50 },
        CachePolicyKind::S3Fifo { small_percent: 10 },
        CachePolicyKind::Adaptive,
    ];
    let prefetch = prop::sample::select(vec![PrefetchKind::Off, PrefetchKind::History, PrefetchKind::Lookahead]);
    let partition = prop::sample::select(vec![CachePartition::PerLayer, CachePartition::Global]);
    (prefetch, 1_u32..4, partition, any::<bool>(), 0_u32..3, prop::sample::select(policies)).prop_map(
        |(prefetch, prefetch_layers, partition, fill, staging_slots, policy)| {
            (EngineSettings { schedule: Rule::Exact, prefetch, prefetch_layers, partition, fill, staging_slots }, policy)
        },
    )
}

type Step = Vec<std::collections::BTreeMap<u32, u32>>;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let demand = prop::collection::btree_map(0_u32..EXPERTS, 1_u32..5, 1..7);
    prop::collection::vec(prop::collection::vec(demand, LAYERS as usize), 2..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn random_sizes_at_random_moments_keep_the_contract_and_replay(
        (engine, policy) in engines(),
        steps in steps(),
        sizes in prop::collection::vec(prop::collection::vec(1_u32..=EXPERTS, LAYERS as usize), 1..12),
        choices in prop::collection::vec(any::<u16>(), 50..200),
        faults in any::<bool>(),
    ) {
        let global = engine.partition == CachePartition::Global;
        let spec = if global { tiny(LAYERS, EXPERTS, PER_TOKEN) } else { uneven() };
        let machine = small_machine(0, 64 << 30, 1 << 40);
        let mut planned = plan(&spec, None).unwrap().plan().clone();
        planned.engine = engine;
        planned.layers.iter_mut().for_each(|l| l.policy = policy);
        let plan = planned.check(&spec, Some(&machine)).unwrap();
        let costs = Arc::new(EngineCosts::new(&plan, &spec, &machine, &Roofline::default()).unwrap());
        let mut e = Engine::with_costs(&plan, Arc::clone(&costs));
        let target: Vec<u32> = plan.cache_pools().iter().map(|p| p.slots).collect();
        let there = plan.pools().iter().zip(0..).flat_map(|(p, pool)| (0..p.slots).map(move |index| SlotId { pool, index })).collect();
        let mut w = Watch {
            plan: &plan, there, content: HashMap::new(), demanded: HashMap::new(), outstanding: Vec::new(), failures: HashMap::new(), target, most: 0,
        };
        w.most = w.bytes();
        let (mut inputs, mut actions) = (Vec::new(), Vec::new());
        let mut choices = choices.iter().cycle();
        let mut queue = steps.iter().enumerate().flat_map(|(s, layers)| layers.iter().enumerate().map(move |(l, d)| (s as u64, l as u32, d)));
        let mut next = queue.next();
        let mut sizes = sizes.into_iter();
        let mut now = Nanos(0);
        let mut empty_demands = 0;
        loop {
            let choice = usize::from(*choices.next().unwrap());
            now = Nanos(now.0 + choice as u64 % 100_000);
            let resize = if choice % 5 == 0 { sizes.next() } else { None };
            let input = if let Some(slots) = resize {
                let slots = if global { vec![slots.iter().sum()] } else { slots };
                w.target.clone_from(&slots);
                w.most = w.most.max(w.target_bytes());
                empty_demands = 0;
                Input::Resize { slots }
            } else if next.is_some_and(|(_, l, _)| !w.demanded.contains_key(&l)) && (w.outstanding.is_empty() || choice % 3 == 0) {
                let (step, layer, d) = next.take().unwrap();
                next = queue.next();
                w.demanded.insert(layer, d.keys().copied().collect());
                let tokens = d.values().copied().max().unwrap();
                Input::Routed(Demand { step, layer, experts: d.iter().map(|(e, n)| (*e, *n)).collect(), tokens, scores: Vec::new() })
            } else if !w.outstanding.is_empty() {
                let action = w.outstanding.swap_remove(choice % w.outstanding.len());
                let fails = faults && choice % 4 == 0;
                answer(&plan, action, fails, &mut w.failures, &mut w.content, &mut w.demanded)
            } else if w.held() != w.target && empty_demands < 20 {
                // Nothing more to do: demands of nothing let the stages go on, of which a change has at most 9.
                empty_demands += 1;
                w.demanded.insert(0, HashSet::new());
                Input::Routed(Demand { step: 1000, layer: 0, tokens: 1, ..Demand::default() })
            } else {
                break;
            };
            inputs.push((now, input.clone()));
            e.handle(now, input);
            let all: Vec<Action> = std::iter::from_fn(|| e.poll(now)).collect();
            w.see(&all);
            actions.extend(all);
        }
        prop_assert!(w.demanded.is_empty() && next.is_none(), "every demand finishes");
        prop_assert_eq!(w.held(), w.target.clone(), "every size is reached");
        prop_assert!(e.pool_sizes().eq(w.target.iter().map(|n| (*n, *n))));
        let staging = plan.cache_pools().len() as u32;
        for layer in plan.moe_layers() {
            for (slot, expert) in e.resident_slots(*layer) {
                prop_assert_eq!(w.content.get(&slot), Some(&(*layer, expert, true)));
            }
        }
        prop_assert!(w.content.iter().all(|(s, (.., ready))| w.there.contains(s) && (*ready || s.pool == staging)));
        let s = e.statistics();
        let start: i64 = plan.cache_pools().iter().map(|p| i64::from(p.slots)).sum();
        let end: i64 = w.target.iter().map(|n| i64::from(*n)).sum();
        prop_assert_eq!(start + s.slots_added as i64 - s.slots_released as i64, end);
        let again = replay(Engine::with_costs(&plan, costs), &inputs);
        prop_assert_eq!(serde_json::to_string(&again).unwrap(), serde_json::to_string(&actions).unwrap());
        let text = serde_json::to_string(&inputs.iter().map(|(_, i)| i).collect::<Vec<_>>()).unwrap();
        let back: Vec<Input> = serde_json::from_str(&text).unwrap();
        prop_assert!(back.iter().eq(inputs.iter().map(|(_, i)| i)));
    }
}
