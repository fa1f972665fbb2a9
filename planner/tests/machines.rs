//! A plan, or an error that says what would work, for a model on every machine of configs/machines.
//!
//! Two models: Qwen3-30B-A3B fits nearly everywhere; DeepSeek-V3 does not, so that the refusals are read as well.

mod common;

use common::{config, machine};
use tierwise_cost::cost::Roofline;
use tierwise_cost::machine::{Machine, MemoryKind};
use tierwise_cost::model::{Geometry, ModelSpec};
use tierwise_cost::recipe::Recipe;
use tierwise_cost::units::Bytes;
use tierwise_planner::{Limits, Plan, PlanError, Problem, Request, SolverKind, make_plan};

fn machines() -> Vec<Machine> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/machines");
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path().file_stem().unwrap().to_str().unwrap().to_string())
        .collect();
    names.sort();
    names.iter().map(|n| machine(n)).collect()
}

fn model(name: &str) -> ModelSpec {
    let geometry = Geometry::from_toml(&config(&format!("models/{name}.toml"))).unwrap();
    ModelSpec::with_recipe(geometry, &Recipe::by_name("Q4_K_M").unwrap()).unwrap()
}

fn plan(spec: &ModelSpec, machine: &Machine) -> Result<Plan, PlanError> {
    make_plan(&Problem::new(spec, machine, Request::default())?, &Roofline::default(), SolverKind::Greedy)
}

/// The plan is one of this model on this machine, all experts are somewhere, and no memory holds more than it has.
fn assert_sound(p: &Plan, spec: &ModelSpec, m: &Machine) {
    p.clone().check(spec, Some(m)).unwrap_or_else(|e| panic!("{} on {}: {e}", spec.name, m.name));
    let resident: u64 = p.budgets.iter().map(|b| b.line("resident experts").0).sum();
    assert_eq!(resident, spec.expert_bytes().0, "{}", m.name);
    for b in &p.budgets {
        assert!(b.capacity <= m.memory(&b.memory).unwrap().capacity.value, "{}: {}", m.name, b.memory);
        assert_eq!(b.lines.iter().map(|l| l.bytes.0).sum::<u64>(), b.capacity.0, "{}: {}", m.name, b.memory);
    }
    let d = p.predicted.decode_tokens_per_s;
    assert!(d.low > 0.0 && d.low <= d.value && d.value <= d.high && d.high.is_finite(), "{}: {d:?}", m.name);
}

#[test]
fn every_machine_plans_qwen3_30b() {
    let spec = model("qwen3-30b-a3b");
    for m in machines() {
        let p = plan(&spec, &m).unwrap_or_else(|e| panic!("{}: {e}", m.name));
        assert_sound(&p, &spec, &m);
        let d = p.predicted.decode_tokens_per_s;
        println!("{:44} {:6.1} tok/s ({:.1} to {:.1}), {}", m.name, d.value, d.low, d.high, p.predicted.binding);
    }
}

/// Faster memory of the same kind of machine is never predicted slower.
#[test]
fn better_machines_are_faster() {
    let spec = model("qwen3-30b-a3b");
    let speed = |name: &str| plan(&spec, &machine(name)).unwrap().predicted.decode_tokens_per_s.value;
    for chain in [
        &["minipc-ddr5-32g", "epyc-8ch-ddr4-512g", "epyc-12ch-ddr5-768g", "xeon6-12ch-mrdimm-1536g"][..],
        &["rtx4060ti-16g-ddr5-64g", "rtx4070tis-16g-ddr5-64g", "rtx5070ti-16g-ddr5-64g", "rtx5080-16g-ddr5-64g"],
        &["apple-m4-pro-48g", "apple-m3-max-128g", "apple-m4-max-128g", "apple-m3-ultra-512g"],
        &["l40s-48g-ddr5-512g", "a100-80g-ddr4-1t", "h100-80g-ddr5-1t", "h200-141g-ddr5-2t", "b200-180g-ddr5-2t"],
    ] {
        let speeds: Vec<f64> = chain.iter().map(|n| speed(n)).collect();
        assert!(speeds.windows(2).all(|w| w[0] <= w[1]), "{chain:?}: {speeds:?}");
    }
}

/// Without the disk, a model that does not fit is refused, and the refusal says what is too small.
#[test]
fn a_model_too_large_gets_a_reason_on_every_machine() {
    let spec = model("deepseek-v3");
    let (mut plans, mut refusals) = (0, 0);
    let in_memory = Request { limits: Limits { disk: Some(Bytes(0)), ..Limits::default() }, ..Request::default() };
    for m in machines() {
        let memory: u64 = m.memories.iter().filter(|x| x.kind != MemoryKind::Disk).map(|x| x.capacity.value.0).sum();
        match Problem::new(&spec, &m, in_memory.clone()) {
            // The largest plans take long; that they exist is known from the problem.
            Ok(_) => {
                assert!(memory > spec.total_bytes().0, "{}", m.name);
                plans += 1;
            }
            Err(e @ (PlanError::NoRoom { .. } | PlanError::ExpertsDoNotFit { .. })) => {
                // Weights, keys and values, reserves: a little more than the weights is needed.
                assert!(memory < spec.total_bytes().0 + spec.total_bytes().0 / 5, "{}: {e}", m.name);
                assert!(e.to_string().contains("GiB"), "{}: {e}", m.name);
                refusals += 1;
            }
            Err(e) => panic!("{}: {e}", m.name),
        }
    }
    println!("{plans} plans, {refusals} refusals");
    assert!(plans >= 15 && refusals >= 30, "{plans} plans, {refusals} refusals");
}

/// With the disk, it is planned on the machines of a kind: few tokens per second, and every byte accounted for.
#[test]
fn a_model_too_large_is_read_from_disk() {
    let spec = model("deepseek-v3");
    for name in ["rtx3090-24g-ddr4-64g", "apple-m4-max-128g", "xeon-cxl-rtx4090", "threadripper-rtxpro6000-96g-ddr5-512g"] {
        let m = machine(name);
        let p = plan(&spec, &m).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_sound(&p, &spec, &m);
        let memory: u64 = m.memories.iter().filter(|x| x.kind != MemoryKind::Disk).map(|x| x.capacity.value.0).sum();
        let disk = p.budgets.iter().find(|b| b.kind == MemoryKind::Disk).map_or(0, |b| b.line("resident experts").0);
        assert_eq!(disk > 0, memory < spec.total_bytes().0, "{name}: {disk} B on disk");
        println!("{name:44} {:6.2} tok/s, {}", p.predicted.decode_tokens_per_s.value, p.predicted.binding);
    }
}
