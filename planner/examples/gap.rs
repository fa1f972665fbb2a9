//! Gap table (scratch).
#[path = "../tests/common/mod.rs"]
mod common;
use std::time::Instant;
use tierwise_cost::cost::Roofline;
use tierwise_cost::model::{Geometry, ModelSpec};
use tierwise_cost::recipe::Recipe;
use tierwise_planner::{Limits, Problem, Request, SolverKind, make_plan};
fn main() {
    let args: Vec<String> = std::env::args().collect();
    for name in args[1].split(',') {
        let text = std::fs::read_to_string(format!("configs/models/{name}.toml")).unwrap();
        let spec = ModelSpec::with_recipe(Geometry::from_toml(&text).unwrap(), &Recipe::by_name("Q4_K_M").unwrap()).unwrap();
        for m in args[2].split(',') {
            let machine = common::machine(m);
            for kind in [SolverKind::Greedy, SolverKind::Local] {
                let request = Request { limits: Limits::default(), batch: args[3].parse().unwrap(), ..Request::default() };
                let t = Instant::now();
                let problem = match Problem::new(&spec, &machine, request) { Ok(p) => p, Err(e) => { println!("{name} {m}: {e}"); continue } };
                match make_plan(&problem, &Roofline::default(), kind) {
                    Ok(p) => println!("{name:22} {m:28} {kind:?} tiers {} obj {:.4} ms bound {:.4} gap {:.3} %  {:.2} s {}", p.tiers.len(), p.objective_s*1e3, p.lower_bound_s*1e3, p.gap*100.0, t.elapsed().as_secs_f64(), p.solver_reason),
                    Err(e) => println!("{name} {m}: {e}"),
                }
            }
        }
    }
}
