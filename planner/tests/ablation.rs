//! What schedule, prefetch and cache are worth on real routing, on a machine like the one of HybriMoE's Table III.

mod common;

use common::{config, machine};
use std::path::Path;
use tierwise_cost::cost::Roofline;
use tierwise_cost::model::{Geometry, ModelSpec};
use tierwise_cost::recipe::Recipe;
use tierwise_planner::plan::CachePolicyKind;
use tierwise_planner::routing::RoutingTrace;
use tierwise_planner::sim::Workload;
use tierwise_planner::sim::study::{ablation, run_variants};
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

#[test]
fn every_idea_helps_and_all_together_most() {
    let machine = machine("threadripper-a6000-48g-ddr4-256g");
    for (name, recipe, full, cut) in [
        ("deepseek-v2-lite", "Q4_K_M", "dsv2lite", "dsv2lite_12seq"),
        ("gpt-oss-20b", "MXFP4", "gptoss20b_160seq", "gptoss20b_11seq"),
    ] {
        let geometry = Geometry::from_toml(&config(&format!("models/{name}.toml"))).unwrap();
        let spec = ModelSpec::with_recipe(geometry, &Recipe::by_name(recipe).unwrap()).unwrap();
        let (trace, _) = trace(full, cut);
        let (train, test) = trace.split(0.5, 1).unwrap();
        let shares = trace.shares(&train);
        let tokens: Vec<usize> = trace.tokens(&test).take(1024).collect();
        let request = Request { context: 4096, chunk_tokens: 1024, prompt_tokens: 1024, ..Request::default() };
        let problem = Problem::new(&spec, &machine, request).unwrap();
        let variants = ablation(CachePolicyKind::Lru, CachePolicyKind::Lru, 3, 12);
        for fraction in [0.25, 0.5, 0.75] {
            for chunk in [0, 32, 128, 512, 1024] {
                let workload = match chunk {
                    0 => Workload::decode_tokens(trace.view(), &tokens),
                    n => Workload::prefill(trace.view(), &tokens, n),
                };
                if workload.steps.is_empty() {
                    continue;
                }
                let reports = run_variants(&problem, &Roofline::default(), &variants, fraction, &shares, &workload).unwrap();
                let base = reports[0].elapsed.0 as f64;
                let what = if chunk == 0 { "decode".to_string() } else { format!("prefill {chunk}") };
                print!("{name} {:.0} % {what}:", fraction * 100.0);
                for (v, r) in variants.iter().zip(&reports) {
                    let s = &r.statistics;
                    print!(
                        "  {} {:.2}x ({:.2} ms, hit {:.2}, used {}/{}/{} fills {})",
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
            }
        }
    }
}
