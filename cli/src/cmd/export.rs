//! `tierwise export`: a plan, or a placement of `balance`, in the words of another engine.

use crate::model;
use crate::ui::{Ui, number};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tierwise_cost::cost::cost_model;
use tierwise_cost::units::Bytes;
use tierwise_planner::balance::result::BalanceFile;
use tierwise_planner::evaluate::{LayerPlacement, Placement};
use tierwise_planner::export::{Content, Exported, ep, import, kt_kernel, kt_yaml, llama_cpp, mistralrs};
use tierwise_planner::{Plan, Problem, Request, SolverKind, make_plan, plan_from_placement};
use tierwise_runtime::atomic_file::write_atomic;
use tierwise_runtime::gguf::Gguf;
use tierwise_runtime::permute::permute_experts;
use tierwise_runtime::permute_folder::permute_folder;
use tierwise_runtime::torch_file::write_logical_count;

/// `export`
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// A plan of `plan -o` (for llama.cpp, ik_llama, ktransformers, mistralrs) or a placement of `balance -o` (for the others); with --from
    /// the other engine's file, for llama.cpp a text with its command line.
    pub plan: PathBuf,
    /// The engine.
    #[arg(long, value_enum, required_unless_present_any = ["permute_checkpoint", "from"])]
    pub to: Option<TargetArg>,
    /// The other way round: read what this engine is told, and write it as a plan for --model on --machine to --output.
    #[arg(long, value_enum, requires = "model", conflicts_with_all = ["to", "permute_checkpoint"])]
    pub from: Option<SourceArg>,
    /// Instead: write the model (--model: a GGUF file, or a folder in safetensors form) with its experts in the order of the placement, for engines that take none. The placement
    /// must hold every expert once.
    #[arg(long, value_name = "FILE", requires = "model", conflicts_with_all = ["to", "output", "machine"])]
    pub permute_checkpoint: Option<PathBuf>,
    /// The file to write, for engines that take one. [default: beside the plan]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// The model's path, for the command line, and where it is not found by the plan's name its description. [default: the plan's name]
    #[arg(long, value_name = "M")]
    pub model: Option<String>,
    /// The machine, to predict the exported placement. [default: the plan's, by name]
    #[arg(long, value_name = "M")]
    pub machine: Option<String>,
}

/// The engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum TargetArg {
    #[value(name = "llama.cpp")]
    LlamaCpp,
    #[value(name = "ik_llama")]
    IkLlama,
    Ktransformers,
    KtransformersYaml,
    Mistralrs,
    Sglang,
    VllmAscend,
    TensorrtLlm,
}

/// An engine whose settings are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum SourceArg {
    #[value(name = "llama.cpp", alias = "ik_llama")]
    LlamaCpp,
    KtransformersYaml,
    Mistralrs,
}

impl TargetArg {
    /// Ending of the file's name.
    const fn ending(self) -> &'static str {
        match self {
            Self::LlamaCpp | Self::IkLlama => "",
            Self::Ktransformers => "kt.pt",
            Self::KtransformersYaml => "kt.yaml",
            Self::Mistralrs => "mistralrs.yaml",
            Self::Sglang => "sglang.json",
            Self::VllmAscend => "vllm-ascend.json",
            Self::TensorrtLlm => "tensorrt-llm.yaml",
        }
    }

    const fn is_for_many_devices(self) -> bool {
        matches!(self, Self::Sglang | Self::VllmAscend | Self::TensorrtLlm)
    }
}

/// The model with its experts in the order of the placement.
fn permute(args: &ExportArgs, text: &str, out: &Path, ui: &Ui) -> Result<()> {
    let file = BalanceFile::from_json(text).with_context(|| args.plan.display().to_string())?;
    let model = args.model.as_deref().unwrap_or_default();
    let order = file.moe_layers.iter().copied().zip(file.slots.iter().map(|l| l.concat())).collect();
    let path = Path::new(model);
    let bytes =
        if path.is_dir() { permute_folder(path, &order, out)? } else { permute_experts(&Gguf::open(path)?, &order, out)? };
    let value = json!({ "files": [out], "bytes": bytes, "layers": file.moe_layers.len(), "command": Value::Null, "loss": {} });
    ui.result(&value, || {
        format!(
            "{}: {}, {} layers renumbered; an engine that gives each of {} devices as many experts in order follows the placement",
            out.display(),
            Bytes(bytes),
            file.moe_layers.len(),
            file.devices.len()
        )
    })
}

/// Another engine's settings as a plan, and what it is worth beside our own without caches.
fn read_settings(args: &ExportArgs, from: SourceArg, text: &str, ui: &Ui) -> Result<()> {
    let shown = args.plan.display().to_string();
    let source = model::open(args.model.as_deref().unwrap_or_default())?;
    let spec = model::spec(&source, None, None)?;
    let (machine, _) = model::machine(args.machine.as_deref(), None)?;
    let layers: Vec<(u32, usize)> = spec.moe_layers().map(|(l, m)| (l, m.num_experts as usize)).collect();
    let wanted = match from {
        SourceArg::LlamaCpp => import::llama_cpp(text, &layers, spec.layers.len()),
        SourceArg::Mistralrs => import::topology(text, &layers, spec.layers.len()),
        SourceArg::KtransformersYaml => import::kt_rules(text, &layers),
    };
    let wanted = wanted.with_context(|| shown.clone())?;
    let d = Request::default();
    let batch = wanted.parallel.unwrap_or(d.batch).max(1);
    let request = Request {
        context: wanted.context.map_or(d.context, |c| c / batch).min(spec.context_length).max(1),
        batch,
        chunk_tokens: wanted.chunk.unwrap_or(d.chunk_tokens),
        no_cache: true,
        ..d
    };
    let request = Request { prompt_tokens: request.prompt_tokens.min(request.context), ..request };
    let problem = Problem::new(&spec, &machine, request)?;
    let cost = cost_model(&machine);
    let placement = on_tiers(&wanted.on_gpu, &problem)?;
    let theirs =
        plan_from_placement(&problem, cost.as_ref(), placement).with_context(|| format!("{shown}, on {}", machine.name))?;
    let ours = make_plan(&problem, cost.as_ref(), SolverKind::Auto)?;
    if let Some(path) = &args.output {
        write_atomic(path, theirs.to_json().as_bytes())?;
    }
    let speed = |p: &Plan| p.predicted.decode_tokens_per_s.value;
    let on_gpu = wanted.on_gpu.iter().flatten().filter(|g| **g).count();
    let value = json!({
        "files": args.output.iter().collect::<Vec<_>>(),
        "experts_on_gpu": on_gpu,
        "experts": wanted.on_gpu.iter().flatten().count(),
        "decode_tokens_per_s": speed(&theirs),
        "decode_tokens_per_s_ours": speed(&ours),
        "notes": wanted.notes,
    });
    ui.result(&value, || {
        let mut text = format!(
            "{on_gpu} experts on the GPU; decode {} tokens/s, our own plan without caches {} tokens/s, by the same prices\n",
            number(speed(&theirs)),
            number(speed(&ours))
        );
        wanted.notes.iter().for_each(|n| text += &format!("  {n}\n"));
        if let Some(path) = &args.output {
            text += &format!("written to {}\n", path.display());
        }
        text
    })
}

pub fn run(args: &ExportArgs, ui: &Ui) -> Result<()> {
    let shown = args.plan.display();
    let text = std::fs::read_to_string(&args.plan).with_context(|| format!("cannot read {shown}"))?;
    if let Some(out) = &args.permute_checkpoint {
        return permute(args, &text, out, ui);
    }
    if let Some(from) = args.from {
        return read_settings(args, from, &text, ui);
    }
    let to = args.to.context("--to ENGINE, or --permute-checkpoint FILE")?;
    let kind: Value =
        serde_json::from_str(&text).with_context(|| format!("{shown}: expected JSON of `plan -o` or `balance -o`"))?;
    let (has_plan, has_balance) = (kind.get("tierwise_plan").is_some(), kind.get("tierwise_balance").is_some());
    let (name, exported, predicted) = match (has_plan, has_balance) {
        (true, _) if to.is_for_many_devices() => bail!(
            "{shown}: is a plan for the memories of one machine; expected a placement over devices, `tierwise balance --load F --devices N -o placement.json`"
        ),
        (_, true) if !to.is_for_many_devices() => {
            bail!("{shown}: is a placement over devices; expected a plan for one machine, `tierwise plan MODEL -o plan.json`")
        }
        (true, _) => of_plan(args, to, &text, ui)?,
        (_, true) => {
            let file = BalanceFile::from_json(&text).with_context(|| shown.to_string())?;
            let exported = match to {
                TargetArg::Sglang => ep::sglang(&file)?,
                TargetArg::VllmAscend => ep::vllm_ascend(&file)?,
                _ => ep::tensorrt_llm(&file)?,
            };
            (file.model, exported, None)
        }
        _ => bail!("{shown}: has neither tierwise_plan nor tierwise_balance; expected a file of `plan -o` or `balance -o`"),
    };
    let path = exported.content.as_ref().map(|_| match &args.output {
        Some(path) => path.clone(),
        None => args.plan.with_extension(to.ending()),
    });
    if args.output.is_some() && path.is_none() {
        ui.note(format!("--output: {} takes no file, the command line says all", exported.target));
    }
    if let (Some(path), Some(content)) = (&path, &exported.content) {
        write(path, content)?;
    }
    let quoted = path.as_ref().map_or(String::new(), |p| p.display().to_string());
    let command = exported.command.replace("{file}", &quoted).replace("{model}", args.model.as_deref().unwrap_or(&name));
    let mut value = serde_json::to_value(&exported).context("the export to JSON")?;
    value["files"] = json!(path.iter().collect::<Vec<_>>());
    value["command"] = json!(command);
    if let Some(p) = &predicted {
        value["loss"]["decode_tokens_per_s_planned"] = json!(p.0);
        value["loss"]["decode_tokens_per_s_exported"] = json!(p.1);
    }
    ui.result(&value, || describe(&exported, path.as_deref(), &command, predicted))
}

fn write(path: &Path, content: &Content) -> Result<()> {
    match content {
        Content::Text(text) => write_atomic(path, text.as_bytes())?,
        Content::LogicalCount { layers, experts, counts } => {
            if path.extension().is_none_or(|e| e != "pt") {
                bail!("{}: the file's name ends otherwise, expected .pt: kt-kernel reads counts from no other", path.display());
            }
            write_logical_count(path, *layers, *experts, counts)?;
        }
    }
    Ok(())
}

/// A plan's model name, its export, and tokens per second as planned and as exported, where model and machine are at hand.
type OfPlan = (String, Exported, Option<(f64, f64)>);

fn of_plan(args: &ExportArgs, to: TargetArg, text: &str, ui: &Ui) -> Result<OfPlan> {
    let plan = Plan::from_json(text).with_context(|| args.plan.display().to_string())?;
    let name = args.model.clone().unwrap_or_else(|| plan.model.name.clone());
    let spec = model::open(&name).and_then(|source| {
        let format = (!source.has_weights()).then_some(plan.model.format.as_str());
        model::spec(&source, format, None)
    });
    let layers = |what: &str| match &spec {
        Ok(spec) => Ok(spec.layers.len()),
        Err(e) => bail!(
            "--model: {what} needs the number of layers, and {name} was not found ({e:#}); expected the model's file, folder or name"
        ),
    };
    let exported = match to {
        TargetArg::LlamaCpp => llama_cpp::export(&plan, false)?,
        TargetArg::IkLlama => llama_cpp::export(&plan, true)?,
        TargetArg::Ktransformers => kt_kernel::export(&plan, layers("ktransformers")?)?,
        TargetArg::KtransformersYaml => kt_yaml::export(&plan)?,
        _ => mistralrs::export(&plan, layers("mistralrs")?)?,
    };
    let predicted = match (&spec, model::machine(Some(args.machine.as_deref().unwrap_or(&plan.machine.name)), None)) {
        (Ok(spec), Ok((machine, _))) => {
            let cost = cost_model(&machine);
            let whole = || -> Result<f64> {
                plan.clone().check(spec, Some(&machine))?;
                let problem = Problem::new(spec, &machine, plan.request.clone())?;
                let placement = on_tiers(&exported.on_gpu, &problem)?;
                Ok(plan_from_placement(&problem, cost.as_ref(), placement)?.predicted.decode_tokens_per_s.value)
            };
            match whole() {
                Ok(after) => Some((plan.predicted.decode_tokens_per_s.value, after)),
                Err(e) => {
                    ui.note(format!("what the exported placement is worth was not predicted: {e:#}"));
                    None
                }
            }
        }
        _ => {
            ui.detail("model or machine of the plan were not found by name: no prediction of the exported placement");
            None
        }
    };
    Ok((plan.model.name, exported, predicted))
}

/// Experts on the GPU, or computed by the host from its memory, in the tiers of this problem.
fn on_tiers(on_gpu: &[Vec<bool>], problem: &Problem<'_>) -> Result<Placement> {
    let is_gpu = |t: &tierwise_planner::plan::Tier| t.through.is_none() && t.memory == problem.main.memory;
    let gpu = problem.tiers.iter().position(is_gpu);
    let host = problem.tiers.iter().position(|t| t.through.is_none() && t.kind == tierwise_cost::machine::MemoryKind::Dram);
    let (Some(gpu), Some(host)) = (gpu, host.or(gpu)) else {
        bail!("{}: the machine has no host memory to compute from", problem.machine.name);
    };
    let layer = |row: &Vec<bool>| LayerPlacement {
        tier_of: row.iter().map(|g| if *g { gpu as u8 } else { host as u8 }).collect(),
        slots: 0,
    };
    Ok(Placement { layers: on_gpu.iter().map(layer).collect() })
}

fn describe(exported: &Exported, path: Option<&Path>, command: &str, predicted: Option<(f64, f64)>) -> String {
    let loss = &exported.loss;
    let mut text = String::new();
    if let Some(path) = path {
        text += &format!("{}, for {}\n\n", path.display(), exported.written_for);
    } else {
        text += &format!("for {}\n\n", exported.written_for);
    }
    text += &format!("{command}\n\nlost on the way:\n");
    if let (Some(planned), Some(after)) = (loss.balancedness_planned, loss.balancedness_exported) {
        text += &format!("  balancedness {planned:.4} as planned, {after:.4} there\n");
    }
    if let (Some(n), Some(bytes)) = (loss.experts_elsewhere, loss.bytes_elsewhere) {
        text += &format!(
            "  {n} experts ({}) are on another processor than planned; {} on the GPU, {} planned\n",
            Bytes(bytes),
            loss.experts_on_gpu_exported.unwrap_or(0),
            loss.experts_on_gpu_planned.unwrap_or(0)
        );
    }
    if let Some((planned, after)) = predicted {
        text += &format!("  decode {} tokens/s as planned, {} there, by the same prices\n", number(planned), number(after));
    }
    for note in &loss.notes {
        text += &format!("  {note}\n");
    }
    text
}
