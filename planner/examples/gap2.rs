//! Scenario gap (scratch).
#[path = "../tests/common/mod.rs"]
mod common;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use std::time::Instant;
use tierwise_cost::cost::Roofline;
use tierwise_cost::model::{Geometry, ModelSpec};
use tierwise_cost::recipe::Recipe;
use tierwise_planner::scenario::Scenarios;
use tierwise_planner::{Limits, Problem, Request, SolverKind, make_plan};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let (name, m, batch, s, vram, ram): (&str, &str, u32, usize, Option<&String>, Option<&String>) =
        (&a[1], &a[2], a[3].parse().unwrap(), a[4].parse().unwrap(), a.get(5), a.get(6));
    let text = std::fs::read_to_string(format!("configs/models/{name}.toml")).unwrap();
    let spec = ModelSpec::with_recipe(Geometry::from_toml(&text).unwrap(), &Recipe::by_name("Q4_K_M").unwrap()).unwrap();
    let machine = common::machine(m);
    let limits = Limits { vram: vram.map(|v| v.parse().unwrap()), ram: ram.map(|v| v.parse().unwrap()), ..Limits::default() };
    let request = Request { limits, batch, ..Request::default() };
    let problem = Problem::new(&spec, &machine, request).unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let layers = problem.layers.iter().map(|l| {
        let e = l.num_experts as usize;
        let mut order: Vec<usize> = (0..e).collect();
        order.shuffle(&mut rng);
        let w: Vec<f64> = order.iter().map(|r| 1.0 / (*r as f64 + 8.0).powf(0.8)).collect();
        (0..s).map(|_| {
            let mut set = vec![];
            for _ in 0..batch {
                let mut w = w.clone();
                for _ in 0..l.experts_per_token {
                    let total: f64 = w.iter().sum();
                    let mut x = rng.random::<f64>() * total;
                    let mut pick = e - 1;
                    for (i, v) in w.iter().enumerate() { x -= v; if x <= 0.0 && *v > 0.0 { pick = i; break } }
                    w[pick] = 0.0;
                    set.push(pick as u16);
                }
            }
            set.sort_unstable(); set.dedup(); set
        }).collect()
    }).collect();
    let problem = problem.with_scenarios(Scenarios { layers }).unwrap();
    for t in &problem.tiers { println!("  {}", t.describe()); }
    for kind in [SolverKind::Local] {
        let t = Instant::now();
        match make_plan(&problem, &Roofline::default(), kind) {
            Ok(p) => println!("{name:22} {m:28} {kind:?} obj {:.4} ms bound {:.4} gap {:.3} %  {:.2} s {}\n {}", p.objective_s*1e3, p.lower_bound_s*1e3, p.gap*100.0, t.elapsed().as_secs_f64(), p.solver_reason, p.bound_method),
            Err(e) => println!("{name} {m}: {e}"),
        }
    }
}
