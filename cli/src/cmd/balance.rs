//! `tierwise balance`: experts over many devices, and what every policy would have cost on a log of loads.
//!
//! * `log`: the loads; `settings`: the devices; `change`: from a placement in use; `report`: what is written and shown.

mod change;
mod log;
mod report;
mod settings;

use crate::model;
use crate::ui::Ui;
use anyhow::{Result, bail};
use change::{moved, read_old};
use clap::{Args, ValueEnum};
use log::read_log;
use rayon::prelude::*;
use report::{balance_file, text, value};
use settings::{packs, policies, settings, slots_in_memory};
use std::path::PathBuf;
use std::time::Instant;
use tierwise_cost::units::Bytes;
use tierwise_planner::PlanError;
use tierwise_planner::balance::loads::Loads;
use tierwise_planner::balance::place::lower_bound;
use tierwise_planner::balance::replay::{
    Placement, Policy, PolicyResult, ReplaySettings, Slots, align_all, place_one, placement, replay_from, steps_placed_from,
};
use tierwise_runtime::atomic_file::write_atomic;

/// `balance`
#[derive(Debug, Args)]
pub struct BalanceArgs {
    /// Loads: counts (JSON with weight, steps or groups), a trace, or any dump that `trace import` reads; `-` for standard input.
    #[arg(long, value_name = "F")]
    pub load: String,
    /// Devices.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_535))]
    pub devices: u32,
    /// Nodes that the devices are in, as many in each.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_535))]
    pub nodes: u32,
    /// Groups of experts that the router chooses among first. [default: the model's, or 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_535))]
    pub groups: Option<u32>,
    /// Slots for experts of a layer on all devices together. [default: one per expert, rounded up to a multiple of the devices]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=65_535))]
    pub replicas: Option<u32>,
    /// Slots for experts of a layer on each device, where they differ, separated by commas.
    #[arg(long, value_name = "N", value_delimiter = ',', conflicts_with = "replicas")]
    pub slots: Vec<u32>,
    /// Memory for experts on each device, all layers together; one size, or one for each device, separated by commas. Each layer then gets as
    /// many slots as make the sum of all layers fastest; with --host-slots there may be fewer slots than experts.
    #[arg(long, value_name = "SIZE", value_delimiter = ',', conflicts_with_all = ["replicas", "slots"])]
    pub memory: Vec<Bytes>,
    /// Experts of a layer that each device has room for in its host's memory, besides its own slots: one number, or one for each device.
    /// The least chosen experts go there, each once, and the rest is balanced around them.
    #[arg(long, value_name = "N", value_delimiter = ',', requires = "host_price", conflicts_with = "from")]
    pub host_slots: Vec<u32>,
    /// What a token of an expert in host memory counts as: 10 if it takes ten times as long as on the device.
    #[arg(long, value_name = "X", requires = "host_slots")]
    pub host_price: Option<f64>,
    /// The same for experts on disk.
    #[arg(long, value_name = "N", value_delimiter = ',', requires = "disk_price", conflicts_with = "from")]
    pub disk_slots: Vec<u32>,
    /// What a token of an expert on disk counts as; not less than in host memory.
    #[arg(long, value_name = "X", requires = "disk_slots")]
    pub disk_price: Option<f64>,
    /// Relative speed of each device, where they differ, separated by commas.
    #[arg(long, value_name = "X", value_delimiter = ',')]
    pub speed: Vec<f64>,
    /// Policies to compare, separated by commas: ep, eplb, eplb+split, llep, tierwise; or all. The placement is that of the last one.
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_value = "all")]
    pub policy: Vec<String>,
    /// How tokens divide among replicas when placements are made: exactly (L2), or equally, all that SGLang, vLLM and TensorRT-LLM can.
    #[arg(long, value_enum, default_value_t = SplitArg::Exact)]
    pub split: SplitArg,
    /// Take one group of a counts file.
    #[arg(long, value_name = "LABEL")]
    pub group: Option<String>,
    /// Judge on this other group of the file instead of on the one that placements are made from.
    #[arg(long, value_name = "LABEL")]
    pub judge: Option<String>,
    /// For a JSON file with several tables: path of keys, joined by dots.
    #[arg(long, value_name = "PATH")]
    pub select: Option<String>,
    /// Tokens in a step: traces are cut so, and counts scaled so. [default: 1024 for a trace; counts as they are]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens_per_step: Option<u32>,
    /// Share of the log's steps that placements are made from; the others judge.
    #[arg(long, value_name = "F", default_value_t = 0.5)]
    pub train: f64,
    /// Place anew after so many steps, from those since the last time. [default: never]
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub rebalance: usize,
    /// Windows of the log; the mean of their slowest devices is what placements make small.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub windows: u32,
    /// Make the mean of the worst share of windows small instead of the mean of all.
    #[arg(long, value_name = "F")]
    pub cvar: Option<f64>,
    /// Price of a token that crosses nodes, in tokens computed on a device. 0: nodes do not matter to our placement.
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub node_price: f64,
    /// Price of two experts that a token needs from different devices (with several nodes: from different nodes), in tokens computed on
    /// a device. Needs a trace.
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub pair_price: f64,
    /// How much slower than a fresh placement one made from --from may be, to copy less.
    #[arg(long, value_name = "F", default_value_t = 0.01)]
    pub tolerance: f64,
    /// Search for a tenth of a millisecond per layer, or for up to a second in all.
    #[arg(long, value_enum, default_value_t = EffortArg::Thorough)]
    pub effort: EffortArg,
    /// Model: sizes of experts and tokens, groups, which layers have experts. [default: those of DeepSeek-V3]
    #[arg(long, value_name = "M")]
    pub model: Option<String>,
    /// Bytes per weight of the experts.
    #[arg(long, value_name = "X", default_value_t = 2.0)]
    pub bytes_per_weight: f64,
    /// What the devices are: h100, h200, b200 or rtx-pro-6000.
    #[arg(long, value_name = "NAME", default_value = "h100")]
    pub gpu: String,
    /// Copies of experts that a device may keep for L3, over all layers.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub spill_slots: usize,
    /// Bytes per second from the host's memory to each device, where every expert lies there too: L3 then copies from the host where that is
    /// sooner. [default: no experts there]
    #[arg(long, value_name = "SIZE")]
    pub host_rate: Option<Bytes>,
    /// LLEP: a rank takes at most so many times the mean.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub alpha: f64,
    /// LLEP acts from this largest / mean on.
    #[arg(long, value_name = "X", default_value_t = 1.3)]
    pub lambda: f64,
    /// Fewest tokens for which an expert is computed on another device.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub min_tokens: u64,
    /// A placement in use, of `balance -o`, SGLang, vLLM-Ascend or TensorRT-LLM: devices are relabelled so that few experts move, and the moves are listed in stages.
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
    /// Bytes that a device may send or receive in one stage of these moves.
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub stage: Bytes,
    /// Write the placement to this file, for `export` and `--from`.
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// How tokens are divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum SplitArg {
    Exact,
    Equal,
}

/// How long to search.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum EffortArg {
    Fast,
    Thorough,
}

pub fn run(args: &BalanceArgs, ui: &Ui) -> Result<()> {
    let policies = policies(&args.policy)?;
    let spec = args.model.as_deref().map(|m| model::spec(&model::open(m)?, None, None)).transpose()?;
    let log = read_log(args, spec.as_ref(), ui)?;
    let mut settings = settings(args, &log, spec.as_ref())?;
    let packs = packs(args)?;
    if settings.train_steps == 0 {
        ui.note("one step, or none to judge on: placements are judged on the loads they were made from");
    }
    let started = Instant::now();
    let steps = steps_placed_from(&log.loads, &settings)?;
    if !args.memory.is_empty() {
        settings.layer_slots = slots_in_memory(args, &log.loads, &settings)?;
    }
    let judged = if settings.train_steps == 0 { log.loads.num_steps() } else { log.loads.num_steps() - settings.train_steps };
    let ours = if policies.contains(&Policy::Tierwise) { log.loads.num_layers } else { 0 };
    let bar = ui.progress("placing and replaying", (ours + policies.len() * judged) as u64, false);
    let old = args.from.as_deref().map(|p| read_old(p, &log.loads, &settings)).transpose()?;
    let fresh = if ours > 0 { Some(place_layers(&log.loads, &settings, &steps, None, || bar.inc(1))) } else { None };
    let replayed: Vec<Result<PolicyResult, PlanError>> = policies
        .par_iter()
        .map(|policy| {
            let first = match &fresh {
                Some(Ok((placement, _))) if *policy == Policy::Tierwise => Some(placement.clone()),
                _ => None,
            };
            replay_from(&log.loads, *policy, &settings, first, &mut || bar.inc(1))
        })
        .collect();
    bar.finish_and_clear();
    let mut results = Vec::new();
    let mut last = None;
    for (policy, result) in policies.iter().zip(replayed) {
        match result {
            Ok(result) => {
                results.push(result);
                last = Some(*policy);
            }
            // Asked for by name: an error. One of all: said, and left out.
            Err(e) if policies.len() == 1 || !args.policy.iter().any(|p| p == "all") => return Err(e.into()),
            Err(e) => ui.note(format!("{} is left out: {e}", policy.name())),
        }
    }
    let Some(policy) = last else { bail!("no policy can place these experts; see the notes above") };
    let placement = match &old {
        Some(old) if policy == Policy::Tierwise => place_layers(&log.loads, &settings, &steps, Some(&old.slots), || ())?.0,
        Some(old) => placement(&log.loads, policy, &settings, steps.clone(), Some(&old.slots))?,
        None => results.last().map(|r| r.placement.clone()).unwrap_or_default(),
    };
    let file = balance_file(&log, &settings, spec.as_ref(), policy, placement, &packs, steps.clone());
    file.check()?;
    let bound = |l| lower_bound(&log.loads.windows(steps.clone(), l, settings.windows), &settings.fleet(l), settings.place.risk);
    let bounds: Vec<f64> = match &fresh {
        // Prices of memories are in the bound too.
        Some(Ok((_, bounds))) if !packs.is_empty() => bounds.clone(),
        _ => (0..log.loads.num_layers).map(bound).collect(),
    };
    let moved = old.as_ref().map(|old| moved(old, &file, &settings, args.stage)).transpose()?;
    if let Some(path) = &args.output {
        write_atomic(path, file.to_json().as_bytes())?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let own = results.iter().find(|r| r.policy == policy.name()).expect("the last policy has a result");
    let value = value(args, &log, &settings, &file, &results, own, &bounds, moved.as_ref(), seconds)?;
    ui.result(&value, || text(args, &log, &settings, &file, &results, moved.as_ref(), seconds))
}

/// L1 for all layers, on all cores; and each layer's lower bound.
fn place_layers(
    loads: &Loads,
    settings: &ReplaySettings,
    steps: &std::ops::Range<usize>,
    old: Option<&Vec<Slots>>,
    on_layer: impl Fn() + Sync,
) -> Result<(Placement, Vec<f64>), PlanError> {
    let place = |layer: usize| {
        let placed = place_one(loads, settings, steps.clone(), layer, old.map(|o| &o[layer]));
        on_layer();
        placed
    };
    let mut placed = (0..loads.num_layers).into_par_iter().map(place).collect::<Result<Vec<_>, _>>()?;
    if old.is_none() {
        align_all(&mut placed, settings);
    }
    let bounds = placed.iter().map(|p| p.placed.lower_bound).collect();
    Ok((Placement::of(placed), bounds))
}
