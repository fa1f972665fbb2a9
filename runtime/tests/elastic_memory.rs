//! Memory of a session whose budget changes goes back to the system and comes again: resident memory of the process under every budget.
//!
//! Alone in its file, because resident memory is the process's.

mod session_common;

use session_common::*;
use std::path::Path;
use std::sync::Arc;
use tierwise_cost::cost::Roofline;
use tierwise_cost::recipe::Recipe;
use tierwise_cost::units::Bytes;
use tierwise_planner::elastic::{elastic_plan, with_ram};
use tierwise_planner::{CheckedPlan, Problem, budget};
use tierwise_runtime::session::process::ProcessMemory;
use tierwise_runtime::session::verify::{OVERHEAD, verify};
use tierwise_runtime::session::{IoBackend, IoOptions, PageCache, Session, SessionConfig};
use tierwise_runtime::synth::synth;

const OPTIONS: PlanOptions = PlanOptions { context: 256, chunk: 64, ..F16_KV };

/// Greedy tokens; the budget changes before the steps that `budgets` names.
fn generate(s: &mut Session, prompt: &[u32], count: usize, mut between: impl FnMut(&mut Session, usize)) -> Vec<u32> {
    let mut token = argmax(s.prefill(prompt).expect("computed"));
    let mut tokens = vec![token];
    for step in 1..count {
        between(s, step);
        token = argmax(s.decode(token).expect("computed"));
        tokens.push(token);
    }
    tokens
}

fn own(path: &Path) -> Bytes {
    ProcessMemory::look(&[path.to_path_buf()]).expect("/proc").anonymous
}

#[test]
fn memory_follows_the_budget() {
    if ProcessMemory::look(&[]).is_none() {
        println!("skipped: there is no /proc");
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    synth(&small_olmoe(), &Recipe::by_name("Q4_K_M").expect("known"), 1, &path, |_, _| {}).expect("written");
    let before = own(&path);
    let model = open(&path);
    let spec = model.spec();
    let machine = machine();
    let ram = |share: f64| {
        let r = request(spec, OPTIONS);
        let rest = [budget::non_expert_weights(spec), budget::kv(spec, &r), budget::activations(spec, &r)];
        Bytes(rest.into_iter().sum::<Bytes>().0 + (share * spec.expert_bytes().0 as f64) as u64)
    };
    let first = {
        let mut r = request(spec, OPTIONS);
        r.limits.ram = Some(ram(0.75));
        let problem = Problem::elastic(spec, &machine, r).expect("it fits");
        elastic_plan(&problem, &Roofline::default()).expect("planned").check(spec, Some(&machine)).expect("a plan of ours")
    };
    let prompt: Vec<u32> = (0..60).map(|i| (i * i * 31 + i * 7 + 3) % spec.vocab_size).collect();
    let plain = {
        let mut s = Session::open(Arc::clone(&model), &first, SessionConfig::new(2)).expect("opened");
        generate(&mut s, &prompt, 150, |_, _| {})
    };
    // What a session held is given back when it is dropped: the next one starts from the same.
    let between = own(&path).saturating_sub(before);
    assert!(between.0 <= OVERHEAD.0, "{between} are left of a session");

    for backend in [IoBackend::Auto, IoBackend::Threads] {
        let io = IoOptions { backend, page_cache: PageCache::Auto };
        let mut s = Session::open(Arc::clone(&model), &first, SessionConfig { io, ..SessionConfig::new(2) }).expect("opened");
        let mut plan = first.clone();
        let line = |plan: &CheckedPlan, name: &str| plan.plan().budgets[0].line(name);
        let mut seen = Vec::new();
        let tokens = generate(&mut s, &prompt, 150, |s, step| {
            let share = match step {
                50 => 0.25,
                100 => 0.6,
                _ => {
                    if step % 50 == 49 {
                        seen.push((own(&path).saturating_sub(before), plan.clone(), s.budget()));
                    }
                    return;
                }
            };
            plan = with_ram(&plan, spec, &machine, &Roofline::default(), ram(share)).expect("it fits");
            s.set_budget(plan.clone()).expect("an elastic session");
        });
        assert_eq!(tokens, plain, "the same tokens");
        for (memory, plan, state) in &seen {
            let planned = line(plan, budget::EXPERT_CACHE) + line(plan, budget::KV) + line(plan, budget::ACTIVATIONS);
            println!(
                "{}: planned {planned}, of which slots {}; {memory} more than before the model was opened; {:?}",
                s.io().map_or("none", |io| io.backend),
                state.held,
                state.sizes.took
            );
            assert!(state.sizes.is_settled() && state.held == plan.slot_bytes());
            assert!(memory.0 <= planned.0 + OVERHEAD.0, "{memory} under a plan of {planned}");
        }
        // The measure sees slots: what went was there.
        let [high, low, _] = &seen[..] else { panic!("three budgets") };
        let (freed, slots) = (high.0.saturating_sub(low.0), high.2.held.saturating_sub(low.2.held));
        assert!(freed.0 * 10 >= slots.0 * 9, "{freed} of {slots} came back");
        let wrong: Vec<_> = verify(&mut s, &plan).expect("readable").into_iter().filter(|c| !c.ok).collect();
        assert!(wrong.is_empty(), "{wrong:?}");
    }
}
