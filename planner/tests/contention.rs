//! What copies and computing share: the plan's prices against the simulator's clock on a machine with CXL memory, step by step on the same
//! routing; and bounds that stay bounds.

mod common;

use common::{machine, qwen3_30b};
use std::sync::Arc;
use tierwise_cost::cost::Roofline;
use tierwise_cost::machine::{Machine, Sourced};
use tierwise_cost::units::BytesPerS;
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::engine::schedule::Rule;
use tierwise_planner::evaluate::{LayerPlacement, Placement, Prices};
use tierwise_planner::held_out::replay_seconds;
use tierwise_planner::lower_bound::lower_bound;
use tierwise_planner::plan::Tier;
use tierwise_planner::price::{Case, PriceTable};
use tierwise_planner::routing::{GeneratorSpec, generate};
use tierwise_planner::scenario::Scenarios;
use tierwise_planner::sim::{Keep, Workload, simulate};
use tierwise_planner::{Problem, Request, plan_from_placement};

/// One card behind a link of its own rate, so that DRAM, card and the GPU's slot all matter.
fn one_card() -> Machine {
    let mut m = machine("xeon-cxl-rtx4090");
    let rate = Sourced::datasheet(BytesPerS(17.8e9));
    for memory in m.memories.iter_mut().filter(|x| x.id == "cxl0") {
        memory.read_bandwidth = rate.clone();
    }
    for link in m.links.iter_mut().filter(|l| l.from == "cxl0") {
        link.bandwidth = rate.clone();
    }
    m
}

/// The same prices with nothing shared.
fn unshared(table: &PriceTable) -> PriceTable {
    let mut table = table.clone();
    for tier in table.classes.iter_mut().flat_map(|c| &mut c.tiers) {
        (tier.compute_shares, tier.copy_shares) = ([None; 2], [None; 2]);
    }
    table
}

/// Seconds of a decode step on the same random routing: by the simulator, by the plan's prices, and by those with nothing shared. Experts are
/// in the tiers `of`, in turn.
fn step_seconds(of: &[(&str, bool)]) -> [f64; 3] {
    let (spec, machine) = (qwen3_30b("Q4_K_M"), one_card());
    let request = Request { context: 4096, prompt_tokens: 512, chunk_tokens: 512, ..Request::default() };
    let problem = Problem::new(&spec, &machine, request).expect("it fits");
    let tier = |(memory, copied): &(&str, bool)| {
        let is = |t: &Tier| t.memory == *memory && t.through.is_some() == *copied;
        problem.tiers.iter().position(is).unwrap_or_else(|| panic!("{memory} in {:?}", problem.tiers)) as u8
    };
    let tiers: Vec<u8> = of.iter().map(tier).collect();
    let copied = of.iter().any(|(_, copied)| *copied);
    let layers = problem.layers.iter().map(|l| LayerPlacement {
        tier_of: (0..l.num_experts as usize).map(|e| tiers[e % tiers.len()]).collect(),
        slots: if copied { 16 } else { 0 },
    });
    let placement = Placement { layers: layers.collect() };
    let cost = Roofline::default();
    let mut plan = plan_from_placement(&problem, &cost, placement.clone()).expect("feasible");
    // As plans price it: what is cached is computed from its slot.
    plan.engine.schedule = Rule::AllMoved;
    let plan = plan.check(&spec, Some(&machine)).expect("a plan of ours");
    let costs = Arc::new(EngineCosts::new(&plan, &spec, &machine, &cost).expect("priced"));
    let trace = generate(&GeneratorSpec::zipf(48, 128, 8, 0.0, 1, 3), 200, 5).expect("made up");
    let tokens: Vec<usize> = (0..200).collect();
    let report = simulate(&plan, Some(&costs), &Workload::decode_tokens(trace.view(), &tokens), Keep::default());
    assert_eq!(report.aborted, None);
    let steps = |layer: usize| {
        let step = |token: &usize| {
            let mut experts: Vec<u16> = trace.chosen(*token, layer).collect();
            experts.sort_unstable();
            experts
        };
        tokens.iter().map(step).collect()
    };
    let steps = Scenarios { layers: (0..problem.layers.len()).map(steps).collect() };
    let prices = Prices::new(&problem, &cost, Case::Expected);
    let [shared, alone] = [prices.decode.clone(), unshared(&prices.decode)].map(|t| replay_seconds(&t, &placement, &steps));
    let step_s = |of: &PriceTable| tierwise_planner::evaluate::step_seconds(of, &placement);
    assert!(step_s(&prices.decode) >= step_s(&unshared(&prices.decode)), "sharing never makes faster");
    let bound = lower_bound(&problem, &prices).expect("solved");
    let judged = prices.objective(&problem, &placement);
    assert!(bound <= judged * (1.0 + 1e-9), "bound {bound} above {judged}");
    [report.decode.time.to_seconds().0 / report.decode.steps as f64, shared, alone]
}

#[test]
fn prices_share_what_the_simulator_shares() {
    // Name, tiers with whether experts are copied from them, whether anything is shared.
    type Named<'a> = (&'a str, &'a [(&'a str, bool)], bool);
    let cases: [Named<'_>; 4] = [
        ("copies from DRAM alone", &[("dram0", true)], false),
        ("copies from DRAM and card", &[("dram0", true), ("cxl0", true)], true),
        ("card computed from and copied", &[("cxl0", false), ("cxl0", true)], true),
        ("card computed from alone", &[("cxl0", false)], false),
    ];
    for (name, tiers, shares) in cases {
        let [simulated, priced, alone] = step_seconds(tiers);
        let off = |seconds: f64| 100.0 * (seconds / simulated - 1.0);
        println!(
            "{name}: simulated {:.2} ms, priced {:.2} ms ({:+.1} %), priced with nothing shared {:.2} ms ({:+.1} %)",
            simulated * 1e3,
            priced * 1e3,
            off(priced),
            alone * 1e3,
            off(alone)
        );
        assert_eq!(priced > alone * 1.02, shares, "{name}: {priced} {alone}");
        assert!(off(priced).abs() < 15.0, "{name}: {simulated} {priced}");
        assert!(!shares || off(priced).abs() < off(alone).abs(), "{name}: {simulated} {priced} {alone}");
    }
}
