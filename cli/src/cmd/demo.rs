//! `tierwise demo`: the bundled model planned for and run on this machine, in seconds.

use crate::args::{DemoArgs, DeviceArg, ExecArgs, SamplingArgs};
use crate::cmd::plan;
use crate::cmd::run::{generate, report_text, to_json};
use crate::loaded::Loaded;
use crate::model;
use crate::ui::Ui;
use anyhow::{Context, Result};
use serde_json::json;
use std::path::PathBuf;
use tierwise_cost::quant::QuantFormat;
use tierwise_runtime::atomic_file::write_atomic;
use tierwise_runtime::tokenizer::AddSpecial;

/// The bundled model: 22M parameters, 32 experts per layer, trained by us (MIT).
const TINY: &[u8] = include_bytes!("../../assets/tiny-q4_k_m.gguf");

pub fn run(args: &DemoArgs, ui: &Ui) -> Result<()> {
    let file = unpack()?;
    let exec = ExecArgs {
        engine: crate::engine_flags::EngineFlags::default(),
        model: file.display().to_string(),
        plan: None,
        threads: None,
        context: None,
        chunk: 512,
        ram: None,
        vram: None,
        cxl: None,
        kv: QuantFormat::F16,
        device: DeviceArg::Cpu,
        machine: None,
        io: crate::args::IoArg::Auto,
        page_cache: None,
        weights: crate::args::WeightsArg::Map,
        isa: None,
        throttle: Vec::new(),
    };
    ui.note(format!("bundled model: {}", file.display()));
    let mut loaded = Loaded::open(&exec, None, false, ui)?;
    let plan_text = plan::describe(loaded.plan.plan(), loaded.session.model().spec(), &loaded.machine_origin);
    if !ui.json {
        ui.out(&format!("\n{plan_text}\nWhat it writes\n{}", args.prompt))?;
    }
    let tokens = loaded.tokenizer()?.encode(&args.prompt, AddSpecial::AsModel, false)?;
    let sampling =
        SamplingArgs { num_tokens: args.num_tokens, temp: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, seed: Some(args.seed) };
    let generated = generate(&mut loaded, &tokens, &sampling, false, ui)?;
    if ui.json {
        let mut value = to_json(&loaded, &tokens, &generated);
        value["plan"] = serde_json::to_value(loaded.plan.plan()).context("plan to JSON")?;
        value["model_file"] = json!(file);
        return ui.result(&value, String::new);
    }
    ui.out(&format!("\nHow fast it was\n{}\n", report_text(&loaded, &tokens, &generated)))?;
    ui.out(&format!("\nNext: tierwise doctor; tierwise run {} -p \"...\"; tierwise plan qwen3-30b-a3b\n", file.display()))
}

/// The bundled model as a file (it is memory-mapped): in the cache folder, written once.
fn unpack() -> Result<PathBuf> {
    let folder = model::cache_dir().unwrap_or_else(|| std::env::temp_dir().join("tierwise"));
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = folder.join("tiny-q4_k_m.gguf");
    let current = std::fs::read(&path).is_ok_and(|found| found == TINY);
    if !current {
        write_atomic(&path, TINY)?;
    }
    Ok(path)
}
