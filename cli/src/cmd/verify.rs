//! `tierwise verify`: is what is resident what was planned, and on which memory node; does a recorded run replay.

use crate::args::ExecArgs;
use crate::loaded::Loaded;
use crate::ui::{self, Ui};
use crate::{cmd, model};
use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tierwise_runtime::session::tiers::{TierReport, TierRow, tiers};
use tierwise_runtime::session::verify::{Check, verify};
use tierwise_runtime::session::{Model, record};

/// `verify`
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The plan and the model; without a plan one is made as `run` would.
    #[arg(value_name = "FILE", required = true, num_args = 1..=2)]
    pub files: Vec<String>,
    /// Replay this recorded run (`run --record FILE`) and compare the engine's actions byte for byte.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ram", "vram", "cxl", "machine", "context"])]
    pub replay: Option<PathBuf>,
    /// Tokens to compute before looking, so that slots are filled.
    #[arg(long = "num-tokens", short = 'n', value_name = "N", default_value_t = 16)]
    pub num_tokens: usize,
    /// Host memory to use at most, without a plan.
    #[arg(long, value_name = "SIZE")]
    pub ram: Option<tierwise_cost::units::Bytes>,
    /// GPU memory to use at most, without a plan.
    #[arg(long, value_name = "SIZE")]
    pub vram: Option<tierwise_cost::units::Bytes>,
    /// CXL memory to use at most, without a plan.
    #[arg(long, value_name = "SIZE")]
    pub cxl: Option<tierwise_cost::units::Bytes>,
    /// How weights in host memory come from their file, as for `run`.
    #[arg(long, value_enum, default_value_t = crate::args::WeightsArg::Map)]
    pub weights: crate::args::WeightsArg,
    /// Where to execute.
    #[arg(long, value_enum, default_value_t = crate::args::DeviceArg::Auto)]
    pub device: crate::args::DeviceArg,
    /// Plan by this description of a machine, without a plan.
    #[arg(long, value_name = "MACHINE")]
    pub machine: Option<String>,
    /// Tokens of context, without a plan. [default: 4096, or the model's own if smaller]
    #[arg(long, value_name = "N")]
    pub context: Option<u32>,
    /// Threads. [default: all]
    #[arg(long, short, value_name = "N")]
    pub threads: Option<usize>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub engine: crate::engine_flags::EngineFlags,
    /// How experts on disk are read.
    #[arg(long, value_enum, default_value_t = crate::args::IoArg::Auto)]
    pub io: crate::args::IoArg,
    /// Reads of experts on disk go through the page cache or bypass it.
    #[arg(long, value_enum)]
    pub page_cache: Option<crate::args::PageCacheArg>,
}

pub fn run(args: &VerifyArgs, ui: &Ui) -> Result<()> {
    let (plan, model) = match args.files.as_slice() {
        [plan, model] => (Some(PathBuf::from(plan)), model),
        [model] => (None, model),
        _ => bail!("verify takes a plan and a model: tierwise verify plan.json model.gguf"),
    };
    match &args.replay {
        Some(path) if plan.is_none() => replay(path, model, ui),
        Some(path) => bail!("{} has its own plan; give the model alone with --replay", path.display()),
        None => compare(args, plan, model, ui),
    }
}

/// Loads and computes as `run` would, then looks.
fn compare(args: &VerifyArgs, plan: Option<PathBuf>, model: &str, ui: &Ui) -> Result<()> {
    if plan.is_some()
        && (args.ram.is_some() || args.vram.is_some() || args.cxl.is_some() || args.machine.is_some() || args.context.is_some())
    {
        bail!("--ram, --vram, --cxl, --machine and --context are the plan's: leave them out, or leave out the plan");
    }
    let exec = ExecArgs {
        model: model.to_string(),
        plan,
        threads: args.threads,
        context: args.context,
        chunk: 512,
        ram: args.ram,
        vram: args.vram,
        cxl: args.cxl,
        kv: tierwise_cost::quant::QuantFormat::F16,
        device: args.device,
        machine: args.machine.clone(),
        engine: args.engine.clone(),
        io: args.io,
        page_cache: args.page_cache,
        weights: args.weights,
        isa: None,
        throttle: Vec::new(),
    };
    let mut loaded = Loaded::open(&exec, Some(args.num_tokens), false, ui)?;
    let count = args.num_tokens.min(loaded.session.context());
    let tokens = cmd::bench::random_tokens(count, loaded.session.model().spec().vocab_size, 1);
    let (prompt, decoded) = tokens.split_at(count / 2);
    if !prompt.is_empty() {
        loaded.session.prefill(prompt)?;
    }
    for token in decoded {
        loaded.session.decode(*token)?;
    }
    let checks = verify(&mut loaded.session, &loaded.plan)?;
    let tiers = tiers(&mut loaded.session, &loaded.plan);
    let text = |c: &Check| format!("{}: planned {}, found {}", c.name, c.planned, c.found);
    let mut wrong: Vec<String> = checks.iter().filter(|c| !c.ok).map(text).collect();
    wrong.extend(tiers.wrong());
    let value = json!({
        "checks": checks, "tiers": tiers.rows, "tier_checks": tiers.checks, "notes": tiers.notes, "tokens": count,
        "io": loaded.session.io(), "ok": wrong.is_empty(),
    });
    ui.result(&value, || {
        let verdict = if wrong.is_empty() { "all as planned" } else { "NOT as planned" };
        format!("{}\n\n{}\n\nafter {count} tokens: {verdict}", table(&checks), tier_text(&tiers))
    })?;
    match wrong.first() {
        None => Ok(()),
        Some(first) => {
            bail!("{} of {} checks failed; first: {first}", wrong.len(), checks.len() + tiers.rows.len() + tiers.checks.len())
        }
    }
}

/// Looks where the bytes of a session are before it computes, for `run --verify`.
pub fn check_at_start(loaded: &mut Loaded, ui: &Ui) -> Result<()> {
    let report = tiers(&mut loaded.session, &loaded.plan);
    ui.note(tier_text(&report));
    let wrong = report.wrong();
    match wrong.first() {
        None => Ok(()),
        Some(first) => bail!("{} placements are not as planned; first: {first}", wrong.len()),
    }
}

/// Where bytes are by memory and use, cross-checks and notes.
fn tier_text(report: &TierReport) -> String {
    let row = |r: &TierRow| {
        let nodes = match r.nodes.as_slice() {
            [] => "any".to_string(),
            nodes => nodes.iter().map(u32::to_string).collect::<Vec<_>>().join(", "),
        };
        let found: Vec<String> = r.found.iter().map(|(place, bytes)| format!("{place}: {bytes}")).collect();
        vec![
            r.memory.clone(),
            r.what.clone(),
            nodes,
            r.planned.to_string(),
            r.there.to_string(),
            r.elsewhere.to_string(),
            r.absent.to_string(),
            found.join(", "),
            if r.ok { "ok" } else { "WRONG" }.to_string(),
        ]
    };
    let headers = ["memory", "what", "nodes", "planned", "there", "elsewhere", "not resident", "found", ""];
    let mut text = ui::table(&headers, report.rows.iter().map(row), false);
    if !report.checks.is_empty() {
        text += &format!("\n\n{}", table(&report.checks));
    }
    for note in &report.notes {
        text += &format!("\nnote: {note}");
    }
    text
}

fn table(checks: &[Check]) -> String {
    let row = |c: &Check| vec![c.name.clone(), c.planned.clone(), c.found.clone(), if c.ok { "ok" } else { "WRONG" }.to_string()];
    ui::table(&["what", "planned", "found", ""], checks.iter().map(row), false)
}

/// Feeds a recorded run to a fresh engine.
fn replay(path: &Path, model: &str, ui: &Ui) -> Result<()> {
    let record = record::read(path)?;
    let model = Model::new(model::open(model)?)?;
    let difference = record.replay(path, model.spec())?;
    let (inputs, actions) = (record.recording.inputs.len(), record.recording.actions.len());
    let found = difference.as_ref().map_or_else(|| "the same".to_string(), ToString::to_string);
    let check = Check { name: "replay".into(), planned: format!("{actions} actions"), found, ok: difference.is_none() };
    let value: Value =
        json!({ "checks": [check], "inputs": inputs, "actions": actions, "difference": difference, "ok": check.ok });
    ui.result(&value, || format!("{inputs} inputs replayed: {actions} actions, {}", check.found))?;
    match difference {
        None => Ok(()),
        Some(d) => bail!("{}: the replay differs from the record: {d}", path.display()),
    }
}
