//! The hybrid executor on the devices of this machine: wgpu on whatever Vulkan adapter there is (Mesa's software one too), CUDA on an
//! NVIDIA GPU. Few tokens, for software adapters are slow; `hybrid.rs` does all of it on the reference back-end.

mod session_common;

use session_common::*;
use std::sync::Arc;
use tierwise_planner::engine::schedule::Rule;
use tierwise_planner::plan::{EngineSettings, PrefetchKind};
use tierwise_runtime::backend::device::DeviceBackend;
use tierwise_runtime::backend::{Choice, OpenOptions, open as open_device};
use tierwise_runtime::session::{Model, Session, SessionConfig, record};

/// Logits may differ from the CPU's by this.
const TOLERANCE: f32 = 2e-2;
const OPTIONS: PlanOptions = PlanOptions { context: 64, chunk: 16, ..F16_KV };

/// The device, or why its part is skipped.
fn device(choice: Choice) -> Option<Box<dyn DeviceBackend>> {
    match open_device(choice, &OpenOptions::default()) {
        Ok(opened) => opened.backend,
        Err(e) => {
            println!("skipped: {e}");
            None
        }
    }
}

fn tokens(model: &Model, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 31 + i * 7 + 3) % model.spec().vocab_size).collect()
}

/// Logits of a prompt and of some decoded tokens.
fn compute(s: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let (prompt, rest) = tokens.split_at(tokens.len() * 3 / 4);
    let (mut all, _) = s.logits_all(prompt).unwrap_or_else(|e| panic!("{e}")).into_raw_vec_and_offset();
    for t in rest {
        all.extend(s.decode(*t).unwrap_or_else(|e| panic!("{e}")));
    }
    all
}

/// Shares of the experts on the device, the rest beside the CPU or through slots; with guesses and without.
fn equals_the_cpu(choice: Choice, model: &Arc<Model>, name: &str, count: usize) {
    let tokens = tokens(model, count);
    let plan = ram_plan(model.spec(), OPTIONS);
    let mut cpu = Session::open(Arc::clone(model), &plan, SessionConfig::new(2)).expect("opened");
    let expected = compute(&mut cpu, &tokens);
    let text = greedy(&mut cpu, &tokens[..6], 8);
    for quarters in 0..=4 {
        let Some(backend) = device(choice) else { return };
        let prefetch = if quarters % 2 == 0 { PrefetchKind::Off } else { PrefetchKind::Lookahead };
        let schedule = if quarters < 2 { Rule::AllMoved } else { Rule::Exact };
        let settings = EngineSettings { schedule, prefetch, prefetch_layers: 1, ..EngineSettings::default() };
        // One run has too little memory for all and streams its prompts.
        let streamed = quarters == 1;
        let engine = GpuOptions {
            policy: POLICIES[quarters as usize],
            settings,
            streamed,
            ..GpuOptions::slots(if streamed { 1 } else { 3 })
        };
        let place = |layer: u32, e: u32| match (e + layer) % 4 {
            q if q < quarters => Where::Gpu,
            3 => Where::Cpu,
            _ => Where::Slots,
        };
        let (plan, costs) = gpu_plan(model.spec(), OPTIONS, engine, place);
        let config = SessionConfig { record: true, ..SessionConfig::new(2) };
        let mut s = Session::on_device(Arc::clone(model), &plan, config, Some(costs), backend).unwrap_or_else(|e| panic!("{e}"));
        let what = s.device().expect("a device").name.clone();
        let difference = max_difference(&compute(&mut s, &tokens), &expected);
        println!("{name} on {what}, {quarters}/4 resident: max |difference| {difference:.1e}");
        assert!(difference <= TOLERANCE, "{name} on {what}, {quarters}/4: {difference}");
        assert_eq!(greedy(&mut s, &tokens[..6], 8), text, "{name} on {what}, {quarters}/4");
        s.settle();
        assert_eq!(record::replay(&plan, s.recording().expect("it records")), None);
        assert!(!streamed || s.statistics().engine.streamed + s.statistics().engine.streamed_ahead > 0, "{name}");
    }
}

fn all_models(choice: Choice) {
    for family in FAMILIES {
        equals_the_cpu(choice, &open(&golden(family).join("model-bf16.gguf")), family, 20);
    }
    if let Some(folder) = tiny() {
        equals_the_cpu(choice, &open(&folder.join("tiny-f16.gguf")), "tiny", 12);
    }
}

#[test]
fn wgpu_gives_the_logits_of_the_cpu() {
    all_models(Choice::Wgpu);
}

#[test]
fn cuda_gives_the_logits_of_the_cpu() {
    all_models(Choice::Cuda);
}
