//! Solvers against the exhaustive oracle and the lower bound, on random tiny problems.

mod common;

use common::{small_machine, tiny};
use proptest::prelude::*;
use tierwise_cost::cost::Roofline;
use tierwise_cost::units::Bytes;
use tierwise_planner::evaluate::{Prices, usage};
use tierwise_planner::lower_bound::lower_bound;
use tierwise_planner::price::Case;
use tierwise_planner::solver::{Exhaustive, Greedy, Solver};
use tierwise_planner::{Limits, Objective, PlanError, Popularity, Problem, Request};

/// Fixed needs of the tiny model and one expert, in bytes, found by planning without limits.
fn needs(layers: u32, experts: u32, k: u32, request: &Request) -> (u64, u64) {
    let spec = tiny(layers, experts, k);
    let machine = small_machine(0, 64 << 30, 1 << 40);
    let p = Problem::new(&spec, &machine, request.clone()).unwrap();
    let fixed: u64 = p.fixed[0].iter().filter(|(n, _)| *n != "reserve").map(|(_, b)| b.0).sum();
    (fixed, p.layers[0].expert_bytes.0)
}

fn request(objective: Objective, shares: Option<Vec<Vec<f64>>>) -> Request {
    Request {
        context: 64,
        prompt_tokens: 16,
        chunk_tokens: 16,
        objective,
        popularity: shares.map_or(Popularity::Uniform, Popularity::Shares),
        ..Request::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn between_the_bound_and_the_oracle(
        experts in 2_u32..5,
        layers in 1_u32..3,
        in_vram in 0_u64..9,
        in_dram in 1_u64..10,
        objective in prop_oneof![Just(Objective::Decode), Just(Objective::Prefill), Just(Objective::Mix)],
        gpu in any::<bool>(),
        skew in prop::collection::vec(1_u32..20, 8),
        skewed in any::<bool>(),
    ) {
        let k = 1.max(experts / 2);
        let spec = tiny(layers, experts, k);
        let shares = skewed.then(|| (0..layers as usize).map(|l| {
            let raw: Vec<f64> = (0..experts as usize).map(|e| f64::from(skew[(l * experts as usize + e) % 8])).collect();
            let sum: f64 = raw.iter().sum();
            raw.iter().map(|x| x / sum).collect()
        }).collect());
        let mut request = request(objective, shares);
        let (fixed, expert) = needs(layers, experts, k, &request);
        let stage = 2 * expert * u64::from(k);
        let machine = small_machine(if gpu { 8 << 30 } else { 0 }, 64 << 30, 1 << 40);
        request.limits = Limits {
            vram: gpu.then_some(Bytes(fixed + stage + (512 << 20) + in_vram * expert)),
            ram: Some(Bytes(if gpu { stage } else { fixed } + in_dram * expert)),
            ..Limits::default()
        };
        let problem = match Problem::new(&spec, &machine, request) {
            Ok(p) => p,
            Err(PlanError::ExpertsDoNotFit { .. }) => return Ok(()),
            Err(e) => panic!("{e}"),
        };
        let prices = Prices::new(&problem, &Roofline::default(), Case::Expected);
        let bound = lower_bound(&problem, &prices).unwrap();
        let limit = Exhaustive { max_states: 3e4 };
        if Exhaustive::states(&problem) > limit.max_states {
            return Ok(());
        }
        let best = match limit.solve(&problem, &prices) {
            Ok(s) => prices.objective(&problem, &s.placement),
            Err(_) => {
                prop_assert!(Greedy.solve(&problem, &prices).is_err(), "greedy found what does not exist");
                return Ok(());
            }
        };
        prop_assert!(bound <= best, "bound {bound} above the optimum {best}");
        match Greedy.solve(&problem, &prices) {
            Ok(s) => {
                usage(&problem, &s.placement).unwrap();
                let greedy = prices.objective(&problem, &s.placement);
                prop_assert!(greedy >= best * (1.0 - 1e-9), "greedy {greedy} better than all {best}");
                prop_assert!(greedy <= best * 1.5, "greedy {greedy}, optimum {best}: {}", s.reason);
                let again = Greedy.solve(&problem, &prices).unwrap();
                prop_assert_eq!(again.placement, s.placement);
            }
            Err(e) => prop_assert!(false, "there is a placement of {best} s, greedy says: {e}"),
        }
    }
}
