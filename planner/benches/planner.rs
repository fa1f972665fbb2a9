//! How fast the planner's parts are: judge, solver, bound, whole plan, engine step, simulator.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{cached_plan, machine, qwen3_30b, small_machine, tiny};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::collections::BTreeSet;
use std::hint::black_box;
use std::sync::Arc;
use tierwise_cost::cost::Roofline;
use tierwise_cost::units::{Bytes, Nanos};
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::engine::{Action, Demand, Engine, Input, Purpose};
use tierwise_planner::evaluate::Prices;
use tierwise_planner::lower_bound::lower_bound;
use tierwise_planner::plan::{CachePolicyKind, EngineSettings, PrefetchKind};
use tierwise_planner::price::Case;
use tierwise_planner::routing::synthetic_scenarios;
use tierwise_planner::sim::setup::CacheSetup;
use tierwise_planner::sim::{self, Keep, Trace, Workload, simulate};
use tierwise_planner::solver::{Exhaustive, Greedy, Ilp, Local, Solver};
use tierwise_planner::{Limits, Problem, Request, SolverKind, make_plan};

fn planning(c: &mut Criterion) {
    let (spec, m) = (qwen3_30b("Q4_K_M"), machine("rtx3090-24g-ddr4-64g"));
    let limits = Limits { vram: Some(Bytes(12_000_000_000)), ..Limits::default() };
    let request = Request { limits, ..Request::default() };
    let problem = Problem::new(&spec, &m, request).unwrap();
    let prices = Prices::new(&problem, &Roofline::default(), Case::Expected);
    let placement = Greedy.solve(&problem, &prices).unwrap().placement;
    c.bench_function("evaluate", |b| b.iter(|| black_box(prices.objective(&problem, &placement))));
    c.bench_function("greedy", |b| b.iter(|| Greedy.solve(&problem, &prices).unwrap()));
    c.bench_function("local search with proof, experts alike", |b| b.iter(|| Local::default().solve(&problem, &prices).unwrap()));
    c.bench_function("lower bound", |b| b.iter(|| lower_bound(&problem, &prices).unwrap()));
    c.bench_function("plan", |b| b.iter(|| make_plan(&problem, &Roofline::default(), SolverKind::Auto).unwrap()));
}

/// Solvers on sampled steps, and the integer program and the oracle on a problem small enough for them.
fn solvers(c: &mut Criterion) {
    let mut group = c.benchmark_group("solvers");
    group.sample_size(10);
    for batch in [1, 16] {
        let (spec, m) = (qwen3_30b("Q4_K_M"), machine("rtx3090-24g-ddr4-64g"));
        let limits = Limits { vram: Some(Bytes(12_000_000_000)), ..Limits::default() };
        let problem = Problem::new(&spec, &m, Request { limits, batch, ..Request::default() }).unwrap();
        let steps = synthetic_scenarios(48, 128, 8, batch, 32, 0.8, 7).unwrap();
        let problem = problem.with_scenarios(steps).unwrap();
        let prices = Prices::new(&problem, &Roofline::default(), Case::Expected);
        let placement = Greedy.solve(&problem, &prices).unwrap().placement;
        group.bench_function(format!("evaluate, 32 steps of batch {batch}"), |b| {
            b.iter(|| black_box(prices.objective(&problem, &placement)));
        });
        group.bench_function(format!("greedy, 32 steps of batch {batch}"), |b| {
            b.iter(|| Greedy.solve(&problem, &prices).unwrap());
        });
        group.bench_function(format!("local, 32 steps of batch {batch}"), |b| {
            b.iter(|| Local::default().solve(&problem, &prices).unwrap());
        });
    }
    let (spec, m) = (tiny(2, 4, 2), small_machine(8 << 30, 64 << 30, 0));
    let limits = Limits { vram: Some(Bytes(700 << 20)), ..Limits::default() };
    let request = Request { context: 64, prompt_tokens: 16, chunk_tokens: 16, limits, ..Request::default() };
    let problem = Problem::new(&spec, &m, request).unwrap();
    let prices = Prices::new(&problem, &Roofline::default(), Case::Expected);
    group.bench_function("ilp, 2 layers of 4 experts", |b| b.iter(|| Ilp::default().solve(&problem, &prices).unwrap()));
    group.bench_function("exhaustive, 2 layers of 4 experts", |b| {
        b.iter(|| Exhaustive::default().solve(&problem, &prices).unwrap());
    });
    group.finish();
}

fn engine(c: &mut Criterion) {
    let spec = tiny(48, 128, 8);
    let plan = cached_plan(&spec, 0, 64);
    let mut engine = Engine::new(&plan);
    let mut step = 0_u64;
    let mut group = c.benchmark_group("engine");
    group.throughput(Throughput::Elements(48));
    group.bench_function("step of 48 layers, 8 of 128 experts", |b| {
        b.iter(|| {
            step += 1;
            for layer in 0..48_u32 {
                // A walk with some reuse: neighbouring steps share most experts.
                let first = ((step / 3 + u64::from(layer) * 7) % 100) as u32;
                let experts = (0..8).map(|i| (first + 3 * i, 1)).collect();
                engine.handle(Nanos(step), Input::Routed(Demand { step, layer, experts, tokens: 1, ..Demand::default() }));
                while let Some(action) = engine.poll(Nanos(step)) {
                    let input = match action {
                        Action::Load { key, slot, .. } => Input::Loaded { key, slot },
                        Action::Compute { layer, wave, .. } => Input::Computed { layer, wave },
                        _ => continue,
                    };
                    engine.handle(Nanos(step), input);
                }
            }
        });
    });
    group.finish();
}

/// Decode steps of a 30B-A3B model with routing that repeats itself about as real routing does, engines from plain to all at once.
/// Copies that are demanded come at once, others by the next layer, as on a machine where both take about as long.
fn whole_engine(c: &mut Criterion) {
    let (spec, m) = (qwen3_30b("Q4_K_M"), machine("rtx3090-24g-ddr4-64g"));
    let problem = Problem::new(&spec, &m, Request::default()).unwrap();
    let demands = walk(200);
    let mut group = c.benchmark_group("engine, a step of 48 layers, 8 of 128 experts");
    let settings =
        |prefetch| EngineSettings { prefetch, prefetch_layers: 2, fill: prefetch != PrefetchKind::Off, ..Default::default() };
    for (name, policy, prefetch, timed) in [
        ("lru, misses move", CachePolicyKind::Lru, PrefetchKind::Off, false),
        ("lru, exact schedule", CachePolicyKind::Lru, PrefetchKind::Off, true),
        ("adaptive, exact schedule", CachePolicyKind::Adaptive, PrefetchKind::Off, true),
        ("lru, exact schedule, prefetch and fill", CachePolicyKind::Lru, PrefetchKind::History, true),
        ("adaptive, exact schedule, prefetch and fill", CachePolicyKind::Adaptive, PrefetchKind::History, true),
        ("adaptive, exact schedule, look-ahead and fill", CachePolicyKind::Adaptive, PrefetchKind::Lookahead, true),
    ] {
        let setup = CacheSetup { slots: vec![64; 48], policy, preload: Vec::new(), engine: settings(prefetch) };
        let plan = sim::setup::cached_plan(&problem, &Roofline::default(), &setup).unwrap().check(&spec, Some(&m)).unwrap();
        let costs = Arc::new(EngineCosts::new(&plan, &spec, &m, &Roofline::default()).unwrap());
        let mut engine = if timed { Engine::with_costs(&plan, costs) } else { Engine::new(&plan) };
        let (mut step, mut now, mut guesses) = (0, Nanos(0), Vec::new());
        let mut one_step = |engine: &mut Engine| {
            for demand in &demands[step % demands.len()] {
                now = now + Nanos(200_000);
                for (key, slot) in guesses.drain(..) {
                    engine.handle(now, Input::Loaded { key, slot });
                }
                engine.handle(now, Input::Routed(Demand { step: step as u64, ..demand.clone() }));
                if prefetch == PrefetchKind::Lookahead && demand.layer < 47 {
                    let next = &demands[step % demands.len()][demand.layer as usize + 1];
                    let (layer, scores) = (next.layer, next.scores.clone());
                    engine.handle(now, Input::Foreseen { step: step as u64, layer, distance: 1, scores });
                }
                while let Some(action) = engine.poll(now) {
                    let input = match action {
                        Action::Load { key, slot, purpose: Purpose::Demand, .. } => Input::Loaded { key, slot },
                        Action::Load { key, slot, .. } => {
                            guesses.push((key, slot));
                            continue;
                        }
                        Action::Compute { layer, wave, .. } => Input::Computed { layer, wave },
                        Action::Abort { reason } => panic!("{reason}"),
                        Action::Allocate { .. } | Action::Release { .. } => unreachable!("nobody asks for another size"),
                        Action::Evict { .. } | Action::Finish { .. } => continue,
                    };
                    engine.handle(now, input);
                }
            }
            step += 1;
        };
        (0..200).for_each(|_| one_step(&mut engine));
        group.bench_function(name, |b| b.iter(|| one_step(&mut engine)));
        let s = engine.statistics();
        println!(
            "  hits {:.3}, {} prefetches, {} used, {} fills, {} demands",
            s.hit_rate(),
            s.prefetches_issued,
            s.prefetches_used,
            s.fills,
            s.demands
        );
    }
    group.finish();
}

/// Demands of `steps` tokens in 48 layers: each expert of the step before stays with probability 0.4, others come by a skewed popularity.
fn walk(steps: usize) -> Vec<Vec<Demand>> {
    let mut state = 1_u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / f64::from(1 << 24)
    };
    let mut last = vec![BTreeSet::<u32>::new(); 48];
    let mut all = Vec::with_capacity(steps);
    for _ in 0..steps {
        let step = last.iter_mut().enumerate().map(|(layer, set)| {
            set.retain(|_| random() < 0.4);
            while set.len() < 8 {
                set.insert((128.0 * random().powf(1.5)) as u32);
            }
            let mut scored = set.clone();
            while scored.len() < 16 {
                scored.insert((128.0 * random()) as u32);
            }
            let scores = scored.iter().map(|e| (*e, if set.contains(e) { 6000 } else { 1000 })).collect();
            Demand { step: 0, layer: layer as u32, experts: set.iter().map(|e| (*e, 1)).collect(), tokens: 1, scores }
        });
        all.push(step.collect());
    }
    all
}

fn simulator(c: &mut Criterion) {
    let ids: Vec<u16> = include_bytes!("../tests/data/gptoss20b_11seq.ids.u8").iter().map(|e| u16::from(*e)).collect();
    let trace = Trace::new(&ids, 24, 4).unwrap();
    let spec = tiny(24, 32, 4);
    let plan = cached_plan(&spec, 0, 8);
    let mut group = c.benchmark_group("simulator");
    group.sample_size(20).throughput(Throughput::Elements((trace.num_tokens() * 24) as u64));
    let workload = Workload::decode(trace);
    group.bench_function("demands", |b| b.iter(|| simulate(&plan, None, &workload, Keep::default())));
    group.finish();
}

criterion_group!(benches, planning, solvers, engine, whole_engine, simulator);
criterion_main!(benches);
