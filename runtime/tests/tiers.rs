//! Experts on memory nodes: bound for real to a node that this machine has, computed from there or moved through slots, bit for bit what
//! the memory map gives, and found there by the kernel's own word.

mod session_common;

use session_common::*;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tierwise_cost::cost::Roofline;
use tierwise_cost::machine::Machine;
use tierwise_cost::model::ModelSpec;
use tierwise_cost::units::{Bytes, BytesPerS};
use tierwise_planner::evaluate::{LayerPlacement, Placement};
use tierwise_planner::plan::Tier;
use tierwise_planner::{CheckedPlan, Problem, Request, budget, plan_from_placement};
use tierwise_runtime::import::ModelSource;
use tierwise_runtime::memory::{NodeRegion, PageSize};
use tierwise_runtime::probe::nodes::Nodes;
use tierwise_runtime::session::tiers::tiers;
use tierwise_runtime::session::verify::verify;
use tierwise_runtime::session::{Model, Session, SessionConfig, Throttle};

/// The kernel's table of bound regions is the whole process's: one test at a time binds memory.
static BINDING: Mutex<()> = Mutex::new(());

/// A node of this machine that memory can be bound to, for this test alone; says why a test is skipped when there is none.
fn own_node() -> Option<(MutexGuard<'static, ()>, u32)> {
    let alone = BINDING.lock().unwrap_or_else(PoisonError::into_inner);
    let node = Nodes::of_this_machine().usable().next().map(|n| n.number)?;
    match NodeRegion::new(1 << 16, &[node], PageSize::System) {
        Ok(_) => Some((alone, node)),
        Err(e) => {
            println!("skipped: {e}");
            None
        }
    }
}

/// Main memory and CXL memory, each on its nodes; `direct`: the CPU computes from CXL memory, else experts there go through slots.
fn machine(dram: &str, cxl: &str, direct: bool) -> Machine {
    let from_cxl = if direct { ", \"cxl0\"" } else { "" };
    let memory = |id: &str, kind: &str, rate: &str, latency: &str, nodes: &str| {
        format!(
            r#"
        [[memory]]
        id = "{id}"
        kind = "{kind}"
        capacity = {{ value = "64 GiB", source = "prior" }}
        read_bandwidth = {{ value = "{rate}", source = "prior" }}
        latency = {{ value = "{latency}", source = "prior" }}
        {nodes}"#
        )
    };
    let memories = memory("dram0", "dram", "50 GB/s", "100 ns", dram) + &memory("cxl0", "cxl", "20 GB/s", "300 ns", cxl);
    let text = format!(
        r#"
        name = "two tiers"
        {memories}
        [[processor]]
        id = "cpu0"
        kind = "cpu"
        name = "test"
        cores = 2
        threads = 2
        computes_from = ["dram0"{from_cxl}]
        f32_flops = {{ value = "100 GFLOP/s", source = "prior" }}
        launch_latency = {{ value = "5 us", source = "prior" }}
        [[link]]
        from = "cxl0"
        to = "dram0"
        bandwidth = {{ value = "20 GB/s", source = "prior" }}
        latency = {{ value = "300 ns", source = "prior" }}
    "#
    );
    Machine::from_toml(&text).expect("a valid machine")
}

fn on(node: u32) -> String {
    format!("numa_nodes = [{node}]")
}

/// A plan with every expert for which `far(layer, expert)` holds in CXL memory.
fn plan(spec: &ModelSpec, machine: &Machine, slots: u32, far: impl Fn(u32, u32) -> bool) -> CheckedPlan {
    let o = F16_KV;
    let context = o.context.min(spec.context_length);
    let request = Request { context, chunk_tokens: o.chunk, prompt_tokens: context / 2, kv_format: o.kv, ..Request::default() };
    let problem = Problem::new(spec, machine, request).expect("it fits");
    let tier = |memory: &str| {
        let of_memory = |t: &Tier| t.memory == memory;
        problem.tiers.iter().position(of_memory).unwrap_or_else(|| panic!("{memory} in {:?}", problem.tiers)) as u8
    };
    let (near, cxl) = (tier("dram0"), tier("cxl0"));
    let through = problem.tiers[usize::from(cxl)].through.is_some();
    let layers = spec
        .moe_layers()
        .map(|(layer, moe)| {
            let tier_of: Vec<u8> = (0..moe.num_experts).map(|e| if far(layer, e) { cxl } else { near }).collect();
            let loaded = tier_of.iter().filter(|t| **t == cxl).count() as u32;
            LayerPlacement { tier_of, slots: if through { slots.min(loaded) } else { 0 } }
        })
        .collect();
    let plan = plan_from_placement(&problem, &Roofline::default(), Placement { layers }).expect("feasible");
    plan.check(spec, Some(machine)).expect("a plan of ours")
}

fn model(family: &str) -> Model {
    let path = golden(family).join("model-bf16.gguf");
    Model::new(ModelSource::open(path.to_str().expect("UTF-8"), None).expect("opened")).expect("a model")
}

fn tokens(model: &Model) -> Vec<u32> {
    (0..40).map(|i| (i * i * 31 + 5) % model.spec().vocab_size).collect()
}

/// Logits of a prompt and of tokens after it.
fn compute(s: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let (prompt, rest) = tokens.split_at(tokens.len() / 3);
    let (mut all, _) = s.logits_all(prompt).expect("computed").into_raw_vec_and_offset();
    for token in rest {
        all.extend(s.decode(*token).expect("computed"));
    }
    all
}

/// The error of something that must not work.
fn refused<T>(result: Result<T, impl std::fmt::Display>) -> String {
    result.err().expect("refused").to_string()
}

#[test]
fn experts_on_nodes_are_where_the_plan_says_and_change_no_bit() {
    let Some((_alone, node)) = own_node() else { return };
    for family in ["qwen3moe", "olmoe"] {
        let mut model = model(family);
        let tokens = tokens(&model);
        let far = |layer: u32, e: u32| !(e + layer).is_multiple_of(3);
        let expected = compute(&mut session(&open(&golden(family).join("model-bf16.gguf")), F16_KV), &tokens);
        for (direct, pages) in [(true, PageSize::System), (true, PageSize::Transparent), (false, PageSize::System)] {
            let machine = machine(&on(node), &on(node), direct);
            let plan = plan(model.spec(), &machine, 2, far);
            model.place(&plan, pages).unwrap_or_else(|e| panic!("{e}"));
            let placed = model.placed().expect("nodes are named");
            assert!(placed.is_for(&plan) && placed.regions().len() == 2, "{placed}");
            let shared = Arc::new(model);
            let config = SessionConfig { pages, ..SessionConfig::new(2) };
            let mut s = Session::open(Arc::clone(&shared), &plan, config).unwrap_or_else(|e| panic!("{e}"));
            assert!(compute(&mut s, &tokens) == expected, "{family} direct {direct}");
            let statistics = s.statistics().engine;
            assert_eq!(statistics.evictions > 0, !direct, "{statistics:?}");
            let report = tiers(&mut s, &plan);
            assert!(report.ok(), "{:?}", report.wrong());
            assert_eq!(report.checks.len(), 2, "{:?}", report.checks);
            for memory in ["dram0", "cxl0"] {
                let budget = plan.plan().budgets.iter().find(|b| b.memory == memory).expect("used");
                assert_eq!(budget.numa_nodes, [node]);
                let row = report.rows.iter().find(|r| r.memory == memory && r.what == budget::RESIDENT_EXPERTS).expect("a row");
                assert_eq!((row.planned, row.there), (budget.line(budget::RESIDENT_EXPERTS), row.planned), "{row:?}");
                assert!(row.there.0 > 0 && row.elsewhere == Bytes::ZERO && row.absent == Bytes::ZERO, "{row:?}");
            }
            let slots = report.rows.iter().find(|r| r.what == budget::EXPERT_CACHE);
            assert_eq!(slots.is_some(), !direct);
            assert!(slots.is_none_or(|r| r.memory == "dram0" && r.there.0 > 0 && r.elsewhere.0 == 0), "{slots:?}");
            let wrong: Vec<_> = verify(&mut s, &plan).expect("looked").into_iter().filter(|c| !c.ok).collect();
            assert!(wrong.is_empty(), "{wrong:?}");
            drop(s);
            model = Arc::into_inner(shared).expect("the session is gone");
        }
    }
}

/// Bytes of a throttled memory never come faster than its rate, whether experts are computed there or loaded from it; bits stay.
#[test]
fn a_throttled_memory_keeps_to_its_rate() {
    let Some((_alone, node)) = own_node() else { return };
    let mut model = model("qwen3moe");
    let tokens = tokens(&model);
    let far = |layer: u32, e: u32| !(e + layer).is_multiple_of(3);
    let expected = compute(&mut session(&open(&golden("qwen3moe").join("model-bf16.gguf")), F16_KV), &tokens);
    for direct in [true, false] {
        let plan = plan(model.spec(), &machine(&on(node), &on(node), direct), 2, far);
        model.place(&plan, PageSize::System).unwrap_or_else(|e| panic!("{e}"));
        let shared = Arc::new(model);
        let mut s = Session::open(Arc::clone(&shared), &plan, SessionConfig::new(2)).unwrap_or_else(|e| panic!("{e}"));
        let slow = |memory: &str, rate: f64| [Throttle { memory: memory.into(), rate: BytesPerS(rate) }];
        for (throttles, word) in
            [(slow("dram0", 1e9), "what is no expert"), (slow("tape0", 1e9), "cxl0"), (slow("cxl0", 0.0), "at least 1")]
        {
            let message = refused(s.throttle(&plan, &throttles));
            assert!(message.contains("--throttle") && message.contains(word), "{message}");
        }
        assert!(s.throttled().is_empty());
        // So that it takes a moment, whatever the experts' size.
        let bytes = plan.moe_layers().iter().map(|l| plan.expert_bytes(*l).0).max().expect("has experts") as f64;
        let rate = bytes * 2000.0;
        let start = Instant::now();
        s.throttle(&plan, &slow("cxl0", rate)).expect("a memory with experts");
        assert!(compute(&mut s, &tokens) == expected, "direct {direct}");
        let seconds = start.elapsed().as_secs_f64();
        let [slow] = &s.throttled()[..] else { panic!("one memory") };
        assert_eq!((slow.experts_loaded > 0, slow.experts_in_place > 0), (!direct, direct), "{slow:?}");
        assert!(slow.paid_bytes as f64 >= 10.0 * bytes, "{slow:?}");
        assert!(slow.paid_bytes as f64 <= seconds * rate * (1.0 + 1e-6), "{slow:?} in {seconds} s at {rate}");
        drop(s);
        model = Arc::into_inner(shared).expect("the session is gone");
    }
}

#[test]
fn a_plan_without_nodes_stays_in_the_map_and_is_looked_at_there() {
    let mut model = model("qwen3moe");
    let plan = ram_plan(model.spec(), F16_KV);
    model.place(&plan, PageSize::System).expect("nothing to place");
    assert!(model.placed().is_none());
    let tokens = tokens(&model);
    let mut s = Session::open(Arc::new(model), &plan, SessionConfig::new(2)).expect("opened");
    compute(&mut s, &tokens);
    let report = tiers(&mut s, &plan);
    assert!(report.ok() && report.checks.is_empty(), "{report:?}");
    let row = &report.rows[0];
    assert_eq!((row.memory.as_str(), row.what.as_str(), row.nodes.len()), ("dram0", budget::RESIDENT_EXPERTS, 0));
    if report.notes.is_empty() {
        assert_eq!(row.there + row.absent, row.planned, "{row:?}");
        assert!(row.there.0 > 0, "some experts were computed: {row:?}");
    }
}

#[test]
fn what_cannot_be_placed_is_refused_by_name() {
    let far = |_: u32, e: u32| e.is_multiple_of(2);
    let mut model = model("qwen3moe");
    let Some((_alone, node)) = own_node() else { return };
    // A node that is not there, before anything is read.
    let elsewhere = plan(model.spec(), &machine(&on(node), &on(777), true), 0, far);
    let message = refused(model.place(&elsewhere, PageSize::System));
    assert!(message.contains("cxl0 on node 777") && message.contains(&format!("node {node} (")), "{message}");
    // Huge pages that nobody set aside.
    let own = plan(model.spec(), &machine(&on(node), &on(node), true), 0, far);
    let none_set_aside = Nodes::of_this_machine().usable().find(|n| n.number == node).and_then(|n| n.free_huge_pages) == Some(0);
    if none_set_aside {
        let message = refused(model.place(&own, PageSize::Hugetlb));
        assert!(message.contains("free huge pages") && message.contains(&format!("node {node}")), "{message}");
    }
    // CXL memory of which no node is known, and a model that was not placed.
    let unknown = plan(model.spec(), &machine("", "", true), 0, far);
    model.place(&unknown, PageSize::System).expect("nothing is named");
    let shared = Arc::new(model);
    let open = |plan: &CheckedPlan| refused(Session::open(Arc::clone(&shared), plan, SessionConfig::new(1)).map(drop));
    let message = open(&unknown);
    assert!(message.contains("cxl0") && message.contains("numa_nodes"), "{message}");
    assert!(open(&own).contains("placed for this plan"));
}
