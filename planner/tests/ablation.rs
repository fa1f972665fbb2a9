//! What schedule, prefetch and cache are worth on real routing, on a machine like the one of HybriMoE's Table III.

mod common;

use common::{config, machine};
use std::path::Path;
use tierwise_cost::cost::Roofline;
use tierwise_cost::model::{Geometry, ModelSpec};
use tierwise_cost::recipe::Recipe;
use tierwise_planner::plan::CachePolicyKind;
use tierwise_planner::routing::RoutingTrace;
use tierwise_planner::sim::study::{ablation, run_variants};
use tierwise_planner::sim::{Report, Workload};
use tierwise_planner::{Problem, Request};

/// The full trace if it is beside the workspace, else the committed cut.
fn trace(full: &str, cut: &str) -> (RoutingTrace, bool) {
    let at = |folder: &Path, name: &str| {
        let meta = std::fs::read_to_string(folder.join(format!("{name}.meta.json"))).ok()?;
        let ids = std::fs::read(folder.join(format!("{name}.ids.u8"))).ok()?;
        Some(RoutingTrace::new(&meta, ids).unwrap())
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    match at(&root.join("../../shared/data/routing"), full) {
        Some(t) => (t, true),
        None => {
            println!("no ../shared/data/routing/{full}.* beside the workspace: the committed cut {cut} instead");
            (at(&root.join("tests/data"), cut).unwrap(), false)
        }
    }
}

/// One row of the table: reports of all variants.
fn row(name: &str, recipe: &str, trace: &RoutingTrace, tokens: usize, fraction: f64, chunk: usize) -> Option<Vec<Report>> {
    let machine = machine("threadripper-a6000-48g-ddr4-256g");
    let geometry = Geometry::from_toml(&config(&format!("models/{name}.toml"))).unwrap();
    let spec = ModelSpec::with_recipe(geometry, &Recipe::by_name(recipe).unwrap()).unwrap();
    let (train, test) = trace.split(0.5, 1).unwrap();
    let tokens: Vec<usize> = trace.tokens(&test).take(tokens).collect();
    let request = Request { context: 4096, chunk_tokens: 1024, prompt_tokens: 1024, ..Request::default() };
    let problem = Problem::new(&spec, &machine, request).unwrap();
    let workload = match chunk {
        0 => Workload::decode_tokens(trace.view(), &tokens),
        n => Workload::prefill(trace.view(), &tokens, n),
    };
    if workload.steps.is_empty() {
        return None;
    }
    let mrs = CachePolicyKind::Mrs { alpha_percent: 50, top_p: 0 };
    let variants = ablation(CachePolicyKind::Adaptive, mrs, 3, 2 * trace.experts_per_token as u32);
    let reports = run_variants(&problem, &Roofline::default(), &variants, fraction, &trace.shares(&train), &workload).unwrap();
    let base = reports[0].elapsed.0 as f64;
    let what = if chunk == 0 { "decode".to_string() } else { format!("prefill {chunk}") };
    print!("{name} {:.1} % {what}:", fraction * 100.0);
    for (v, r) in variants.iter().zip(&reports) {
        let s = &r.statistics;
        print!(
            "  {} {:.2}x ({:.2} ms, hit {:.3}, prefetches {} used + {} late of {}, fills {})",
            v.name,
            base / r.elapsed.0 as f64,
            r.elapsed.0 as f64 / 1e6 / r.step_times.len() as f64,
            s.hit_rate(),
            s.prefetches_used,
            s.prefetches_late,
            s.prefetches_issued,
            s.fills
        );
    }
    println!();
    Some(reports)
}

const MODELS: [(&str, &str, &str, &str); 2] = [
    ("deepseek-v2-lite", "Q4_K_M", "dsv2lite", "dsv2lite_12seq"),
    ("gpt-oss-20b", "MXFP4", "gptoss20b_160seq", "gptoss20b_11seq"),
];

#[test]
fn ideas_do_what_they_are_for() {
    for (name, recipe, full, cut) in MODELS {
        let (trace, _) = trace(full, cut);
        let decode = row(name, recipe, &trace, 200, 0.25, 0).unwrap();
        let [base, _, prefetch, _, all, _] = &decode[..] else { panic!("six variants") };
        let s = &prefetch.statistics;
        assert!(s.hit_rate() > base.statistics.hit_rate() + 0.05, "prefetches are hits");
        assert!(s.prefetches_used * 2 > s.prefetches_issued, "most guesses are right: {s:?}");
        assert!((all.elapsed.0 as f64) < 1.02 * base.elapsed.0 as f64, "all together are not slower");
        let prefill = row(name, recipe, &trace, 512, 0.25, 128).unwrap();
        assert!((prefill[1].elapsed.0 as f64) < 0.9 * prefill[0].elapsed.0 as f64, "what is better moved is moved");
    }
}

/// The whole table; half a minute. `cargo test --release -p tierwise-planner --test ablation -- --ignored --nocapture`
#[test]
#[ignore = "prints a table of the engine study; what it must show is checked above, on parts of it"]
fn table() {
    for (name, recipe, full, cut) in MODELS {
        let (trace, _) = trace(full, cut);
        for fraction in [0.25, 0.5, 0.75] {
            for chunk in [0, 32, 128, 512, 1024] {
                row(name, recipe, &trace, if chunk == 0 { 1000 } else { 2048 }, fraction, chunk);
            }
        }
    }
}
