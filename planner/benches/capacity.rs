//! How fast capacity studies are: rows, marginal values, step tables, simulated events.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{config, machine, qwen3_30b};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tierwise_cost::cost::{CostModel, Roofline};
use tierwise_cost::machine::Machine;
use tierwise_planner::capacity::{Opened, Study, evaluate_point};
use tierwise_planner::marginal::marginal_values;
use tierwise_planner::price::Case;
use tierwise_planner::serving::memory::KvPool;
use tierwise_planner::serving::steps::placement_of;
use tierwise_planner::serving::{Admission, Arrivals, Config, StepTable, simulate};
use tierwise_planner::{Problem, Request, SolverKind, make_plan};

fn roofline(_: &Machine) -> Box<dyn CostModel> {
    Box::new(Roofline::default())
}

fn rows(c: &mut Criterion) {
    let (spec, m) = (qwen3_30b("Q4_K_M"), machine("rtx4090-24g-ddr5-64g"));
    let study = Study::from_toml(&config("studies/context-and-batch.toml")).unwrap();
    let points = study.points().unwrap();
    let opened = Opened { spec: &spec, machine: &m, arrivals: None };
    let mut next = 0;
    c.bench_function("row of a study", |b| {
        b.iter(|| {
            next = (next + 7) % points.len();
            evaluate_point(next, &points[next], opened, &study, &roofline, SolverKind::Auto)
        });
    });
    let request = Request::default();
    c.bench_function("marginal values", |b| {
        b.iter(|| marginal_values(&spec, &m, &request, &roofline, SolverKind::Auto).unwrap());
    });
}

fn serving(c: &mut Criterion) {
    let (spec, m) = (qwen3_30b("Q4_K_M"), machine("rtx4090-24g-ddr5-64g"));
    let request = Request { batch: 8, context: 8192, chunk_tokens: 1024, ..Request::default() };
    let plan = make_plan(&Problem::new(&spec, &m, request).unwrap(), &Roofline::default(), SolverKind::Auto).unwrap();
    let placement = placement_of(&plan);
    let cost = Roofline::default();
    let table = || StepTable::new(&spec, &m, &plan.request, &placement, &cost, Case::Expected, 64).unwrap();
    c.bench_function("step table", |b| b.iter(table));
    let table = table();
    let pool = KvPool::of_plan(&spec, &plan, 64).unwrap();
    let trace = Arrivals::from_text(&config("studies/data/azure-conv-2023.csv"), None).unwrap();
    let mut group = c.benchmark_group("simulation of 500 requests");
    for admission in Admission::ALL {
        for load in [0.1, 10.0] {
            let config = Config { admission, chunk_tokens: 1024, ..Config::default() };
            let events = simulate(&trace, load, &pool, &table, &config).events;
            group.throughput(Throughput::Elements(events));
            group.bench_function(format!("{} at load {load}", admission.name()), |b| {
                b.iter(|| simulate(&trace, load, &pool, &table, &config));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, rows, serving);
criterion_main!(benches);
