//! The convex program and its solvers against brute force, on random tiny problems with sampled steps.

use super::ilp::Ilp;
use super::linear::Linear;
use super::relax::{Effort, relax};
use super::search::Search;
use super::*;
use crate::evaluate::{LayerPlacement, usage};
use crate::price::Case;
use crate::scenario::Scenarios;
use crate::{Limits, Request};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tierwise_cost::cost::Roofline;
use tierwise_cost::machine::Machine;
use tierwise_cost::model::{Geometry, ModelSpec};
use tierwise_cost::recipe::Recipe;
use tierwise_cost::units::Bytes;

const LAYERS: usize = 2;
const EXPERTS: usize = 6;
const STEPS: usize = 5;

fn spec() -> ModelSpec {
    let text = format!(
        r#"
        name = "tiny"
        architecture = "qwen3moe"
        hidden_size = 256
        vocab_size = 256
        context_length = 4096
        source = "test"
        [[block]]
        repeat = {LAYERS}
        [block.attention]
        kind = "gqa"
        num_heads = 2
        num_kv_heads = 1
        head_dim = 32
        rope = {{ theta = 1e6, rotary_dim = 32 }}
        [block.ffn]
        kind = "moe"
        num_experts = {EXPERTS}
        experts_per_token = 2
        inner_size = 256
        router = {{ score = "softmax", normalize_topk = true }}
    "#
    );
    ModelSpec::with_recipe(Geometry::from_toml(&text).unwrap(), &Recipe::by_name("F32").unwrap()).unwrap()
}

fn machine() -> Machine {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/machines/xeon-cxl-rtx4090.toml");
    Machine::from_toml(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A problem with room for `vram` and `dram` experts, the rest in CXL memory.
fn problem<'a>(spec: &'a ModelSpec, machine: &'a Machine, vram: u64, dram: u64, rng: &mut StdRng) -> Problem<'a> {
    let request = Request { context: 64, prompt_tokens: 16, chunk_tokens: 16, ..Request::default() };
    let free = Problem::new(spec, machine, request.clone()).unwrap();
    let expert = free.layers[0].expert_bytes.0;
    let fixed: u64 = free.fixed[0].iter().filter(|(n, _)| *n != "reserve").map(|(_, b)| b.0).sum();
    let stage = 4 * expert;
    let limits = Limits {
        vram: Some(Bytes(fixed + stage + (512 << 20) + vram * expert)),
        ram: Some(Bytes(stage + dram * expert)),
        cxl: Some(Bytes((LAYERS * EXPERTS) as u64 * expert)),
        disk: Some(Bytes::ZERO),
        ..Limits::default()
    };
    let problem = Problem::new(spec, machine, Request { limits, ..request }).unwrap();
    let mut step = || {
        let mut set: Vec<u16> = (0..EXPERTS as u16).filter(|_| rng.random::<f64>() < 0.4).collect();
        if set.is_empty() {
            set.push(rng.random_range(0..EXPERTS as u16));
        }
        set
    };
    let layers = (0..LAYERS).map(|_| (0..STEPS).map(|_| step()).collect()).collect();
    problem.with_scenarios(Scenarios { layers }).unwrap()
}

/// Every placement without a cache.
fn brute_force(problem: &Problem<'_>, prices: &Prices) -> (f64, Placement) {
    let direct: Vec<u8> = (0..problem.tiers.len()).filter(|t| problem.tiers[*t].through.is_none()).map(|t| t as u8).collect();
    let options = direct.len().pow((LAYERS * EXPERTS) as u32);
    let mut best: Option<(f64, Placement)> = None;
    for mut code in 0..options {
        let layers = (0..LAYERS).map(|_| {
            let tier_of = (0..EXPERTS).map(|_| {
                let t = direct[code % direct.len()];
                code /= direct.len();
                t
            });
            LayerPlacement { tier_of: tier_of.collect(), slots: 0 }
        });
        let placement = Placement { layers: layers.collect() };
        if usage(problem, &placement).is_err() {
            continue;
        }
        let seconds = prices.objective(problem, &placement);
        if best.as_ref().is_none_or(|(s, _)| seconds < *s) {
            best = Some((seconds, placement));
        }
    }
    best.expect("CXL memory holds everything")
}

#[test]
fn relaxation_below_search_above_integer_program_at_the_optimum() {
    let (spec, machine) = (spec(), machine());
    let mut rng = StdRng::seed_from_u64(11);
    let (mut worst_search, mut worst_bound) = (1.0_f64, 1.0_f64);
    for (vram, dram) in [(0, 3), (2, 4), (5, 2), (4, 8)] {
        let problem = problem(&spec, &machine, vram, dram, &mut rng);
        let prices = Prices::new(&problem, &Roofline::default(), Case::Expected);
        let (best, _) = brute_force(&problem, &prices);
        let form = prices.forms(&problem).remove(0);
        let start = greedy::starts(&problem, &form).into_iter().find(|p| p.layers.iter().all(|l| l.slots == 0)).unwrap();
        let lp = Linear::new(&problem, &form, &start).unwrap();
        let tier_of: Vec<Vec<u8>> = start.layers.iter().map(|l| l.tier_of.clone()).collect();
        // The program's value of whole experts is the judge's.
        let value = Search::new(&lp, tier_of.clone()).value();
        let judged = prices.objective(&problem, &start);
        assert!((value / judged - 1.0).abs() < 1e-9, "{value} {judged}");
        let relaxed = relax(&lp, &tier_of, Effort { work: 3e8, close: 1e-5 });
        assert!(relaxed.bound_s <= best * (1.0 + 1e-9), "bound {} above the optimum {best}", relaxed.bound_s);
        worst_bound = worst_bound.max(best / relaxed.bound_s);
        let found = local::search(&lp, &relaxed, tier_of, 1e8).unwrap();
        let found = prices.objective(&problem, &lp.placement(&problem, &found));
        assert!(found >= best * (1.0 - 1e-9), "search {found} better than all {best}");
        worst_search = worst_search.max(found / best);
        let ilp = Ilp { time_limit_s: 30.0, gap: 1e-6 }.solve_static(&problem, &form, &start).unwrap();
        let exact = prices.objective(&problem, &ilp.0);
        assert!((exact / best - 1.0).abs() < 1e-4, "integer program {exact}, brute force {best}");
    }
    println!("search / optimum at most {worst_search:.4}, optimum / bound at most {worst_bound:.4}");
    assert!(worst_search < 1.05 && worst_bound < 1.25);
}
