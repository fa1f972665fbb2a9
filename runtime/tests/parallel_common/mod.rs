//! What the tests of several ranks share: settings under which copies pay in tiny models, skewed routing, sequences.
#![allow(dead_code, reason = "each test file uses a part")]

use crate::session_common::{PlanOptions, ram_plan};
use std::sync::Arc;
use tierwise_planner::balance::cost::{LayerCost, Rates};
use tierwise_planner::balance::decide::DecideSettings;
use tierwise_planner::balance::spill::SpillSettings;
use tierwise_planner::routing::{GeneratorSpec, RoutingTrace, generate};
use tierwise_runtime::session::{Model, Session, SessionConfig};

/// Small chunks, so that ranks differ in their number of steps.
pub const CHUNK: u32 = 16;

/// Ranks on which a token costs much and weights little: what a tiny model would have to be priced like for copies to be worth it.
pub fn settings(ranks: usize) -> DecideSettings {
    let rates = Rates {
        flops_per_s: 1e6,
        memory_bytes_per_s: 1e12,
        link_bytes_per_s: 1e12,
        node_bytes_per_s: f64::INFINITY,
        latency_s: 0.0,
        launch_s: 0.0,
        row_tile: 1,
    };
    DecideSettings {
        speed: vec![1.0; ranks],
        cost: LayerCost::new(64, 64, 4.0, &rates),
        spill: SpillSettings { min_tokens: 1, slots_per_device: 3, max_rows: u64::MAX, host_bytes_per_s: 0.0 },
        alpha: 1.0,
        lambda: 1.1,
    }
}

/// A rank's sequence: lengths that differ, some without any.
pub fn sequence(model: &Model, rank: usize) -> Vec<u32> {
    const LENGTHS: [u32; 8] = [37, 0, 64, 5, 21, 50, 1, 13];
    let first = 1000 * rank as u32;
    (first..first + LENGTHS[rank % 8]).map(|i| (i * i * 31 + i * 7 + 3) % model.spec().vocab_size).collect()
}

/// A session with everything in memory.
pub fn plain(model: &Arc<Model>, options: PlanOptions) -> Session {
    let plan = ram_plan(model.spec(), options);
    Session::open(Arc::clone(model), &plan, SessionConfig::new(options.threads)).unwrap_or_else(|e| panic!("{e}"))
}

/// Choices of experts of which few are popular.
pub fn skewed(model: &Model) -> Arc<RoutingTrace> {
    let (_, moe) = model.spec().moe_layers().next().expect("a Mixture of Experts");
    let layers = model.spec().moe_layers().count();
    let spec = GeneratorSpec::zipf(layers, moe.num_experts, moe.experts_per_token as usize, 1.4, 1, 5);
    Arc::new(generate(&spec, 8 * 256, 5).expect("a valid description"))
}
