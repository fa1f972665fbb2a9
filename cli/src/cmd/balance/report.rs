//! What `balance` found: the file that it writes, JSON, and the table for people.

use super::BalanceArgs;
use super::change::Moved;
use super::log::Log;
use crate::ui::{self, number};
use anyhow::Result;
use serde_json::{Value, json};
use tierwise_cost::model::ModelSpec;
use tierwise_cost::units::Bytes;
use tierwise_planner::balance::moves::Move;
use tierwise_planner::balance::packs::PackSpec;
use tierwise_planner::balance::replay::{Placement, Policy, PolicyResult, ReplaySettings};
use tierwise_planner::balance::result::{BALANCE_VERSION, BalanceFile, FileDevice, FilePack};

/// What `-o` writes.
pub fn balance_file(
    log: &Log,
    settings: &ReplaySettings,
    spec: Option<&ModelSpec>,
    policy: Policy,
    placement: Placement,
    packs: &[(&'static str, PackSpec)],
    steps: std::ops::Range<usize>,
) -> BalanceFile {
    let layers = log.loads.num_layers as u32;
    let share = |layer: usize| {
        let sum = log.loads.sum(steps.clone(), layer);
        let total: f64 = sum.iter().sum();
        sum.iter().map(|c| if total > 0.0 { c / total } else { 0.0 }).collect()
    };
    BalanceFile {
        tierwise_balance: BALANCE_VERSION,
        model: log.model.clone(),
        num_layers: spec.map_or(layers, |s| s.layers.len() as u32),
        moe_layers: spec.map_or_else(|| (0..layers).collect(), |s| s.moe_layers().map(|(l, _)| l).collect()),
        num_experts: log.loads.num_experts as u32,
        num_groups: settings.num_groups as u32,
        policy: policy.name().into(),
        devices: settings
            .devices
            .iter()
            .enumerate()
            .map(|(g, d)| {
                let most = settings.layer_slots.iter().map(|row| row[g]).max();
                FileDevice { node: d.node, speed: 1.0 / d.inverse_speed, slots: most.unwrap_or(d.slots) }
            })
            .collect(),
        slots: placement.slots,
        load: (0..log.loads.num_layers).map(share).collect(),
        packs: if placement.pack_of.is_empty() { Vec::new() } else { packs.iter().map(file_pack).collect() },
        pack_of: placement.pack_of,
    }
}

fn file_pack((name, pack): &(&'static str, PackSpec)) -> FilePack {
    FilePack { name: (*name).into(), price: pack.price, slots: pack.slots.clone() }
}

/// Where experts are, if not all are in the devices' own slots, and how many of the tokens choose them.
fn in_packs(file: &BalanceFile) -> String {
    let mut text = String::new();
    for (at, pack) in file.packs.iter().enumerate() {
        let here =
            |layer: usize| file.pack_of[layer].iter().zip(&file.load[layer]).filter(move |(p, _)| usize::from(**p) == at + 1);
        let experts: usize = (0..file.pack_of.len()).map(|l| here(l).count()).sum();
        let tokens: f64 = (0..file.pack_of.len()).flat_map(here).map(|(_, load)| load).sum();
        text += &format!(
            "{}: {experts} of {} experts, {:.2} % of the tokens that placements are made from, each counted {} times\n",
            pack.name,
            file.pack_of.len() * file.num_experts as usize,
            100.0 * tokens / file.pack_of.len().max(1) as f64,
            number(pack.price)
        );
    }
    text
}

/// All of it, as JSON.
#[allow(clippy::too_many_arguments, reason = "everything that was found, once")]
pub fn value(
    args: &BalanceArgs,
    log: &Log,
    settings: &ReplaySettings,
    file: &BalanceFile,
    results: &[PolicyResult],
    own: &PolicyResult,
    bounds: &[f64],
    moved: Option<&Moved>,
    seconds: f64,
) -> Result<Value> {
    let flat: Vec<Vec<u16>> = file.slots.iter().map(|l| l.iter().flatten().copied().collect()).collect();
    let step_bound: f64 = bounds.iter().sum();
    let mut value = json!({
        "load": args.load,
        "model": file.model,
        "policy": file.policy,
        "num_layers": log.loads.num_layers,
        "num_experts": log.loads.num_experts,
        "num_steps": log.loads.num_steps(),
        "steps_placed_from": if log.train_steps == 0 { log.loads.num_steps() } else { log.train_steps },
        "in_sample": log.train_steps == 0,
        "devices": file.devices,
        "physical_to_logical": flat,
        "slots": file.slots,
        "balancedness": own.balance.balancedness,
        "aggregate_balancedness": own.balance.aggregate_balancedness,
        "lower_bound": step_bound,
        "lower_bound_by_layer": bounds,
        "max_load": own.last_loads.iter().map(|l| l.iter().copied().max().unwrap_or(0)).collect::<Vec<_>>(),
        "transfers": own.transfers,
        "bytes_moved": own.bytes_moved,
        "policies": results,
        "formulas": {
            "balancedness": "mean over layers and steps of (mean load of devices / largest): SGLang's utilization rate",
            "aggregate_balancedness": "sum of mean loads / sum of largest: vLLM's balancedness; what the largest cost is the time lost",
            "imbalance_ratio": "mean of (largest - mean) / mean: TensorRT-LLM's",
            "worst_par": "largest / mean of the worst layer: FlashLB's PAR",
            "lower_bound": "per layer and window: max(mean over devices, heaviest replica when all slots are given to water-filling), in tokens of the steps placed from",
        },
        "prices": {
            "gpu": args.gpu,
            "expert_bytes": settings.cost.expert_bytes,
            "break_even_tokens": settings.cost.break_even_tokens(),
        },
        "output": args.output,
        "seconds": seconds,
    });
    if !file.packs.is_empty() {
        value["packs"] = json!(file.packs);
        value["pack_of"] = json!(file.pack_of);
        value["experts_outside"] = json!(file.num_outside());
    }
    if let Some(m) = moved {
        let list: Vec<Value> = m.moves.iter().map(move_value).collect();
        value["change"] = json!({ "copies": m.copies, "bytes": m.bytes, "moves_per_stage": m.stages, "moves": list });
    }
    Ok(value)
}

fn move_value(m: &Move) -> Value {
    match m {
        Move::Copy { layer, expert, source, target } => {
            json!({ "copy": expert, "layer": layer, "from": source, "to": target })
        }
        Move::Switch { layer, expert, device } => json!({ "switch": expert, "layer": layer, "on": device }),
        Move::Free { layer, expert, device } => json!({ "free": expert, "layer": layer, "on": device }),
    }
}

/// The table for people.
pub fn text(
    args: &BalanceArgs,
    log: &Log,
    settings: &ReplaySettings,
    file: &BalanceFile,
    results: &[PolicyResult],
    moved: Option<&Moved>,
    seconds: f64,
) -> String {
    let slots: u32 =
        (0..log.loads.num_layers).flat_map(|l| settings.fleet(l)).map(|d| d.slots).sum::<u32>() / log.loads.num_layers as u32;
    let judged = if log.train_steps == 0 { log.loads.num_steps() } else { log.loads.num_steps() - log.train_steps };
    let mut text = format!(
        "{}: {} layers of {} experts in {slots} slots of {} devices on {} nodes; {judged} steps judged{}, {}\n\n",
        log.model,
        log.loads.num_layers,
        log.loads.num_experts,
        settings.devices.len(),
        settings.num_nodes,
        if log.train_steps == 0 { " (also placed from)".into() } else { format!(", {} placed from", log.train_steps) },
        args.gpu
    );
    let rows = results.iter().map(|r| {
        vec![
            r.policy.into(),
            format!("{} ms", number(r.step_s * 1e3)),
            format!("{:.4}", r.balance.aggregate_balancedness),
            format!("{:.4}", r.balance.balancedness),
            format!("{:.4}", r.balance.imbalance_ratio),
            format!("{:.3}", r.balance.worst_par),
            r.transfers.to_string(),
            Bytes(r.bytes_moved as u64).to_string(),
            Bytes(r.peak_bytes as u64).to_string(),
        ]
    });
    let header = ["policy", "step", "vLLM", "SGLang", "TRT-LLM", "worst PAR", "transfers", "moved", "peak"];
    text += &ui::table(&header, rows, true);
    text += "\n\nvLLM: sum of mean loads / sum of largest; SGLang: mean of mean / largest; TRT-LLM: mean of (largest - mean) / mean; PAR: largest / mean\n";
    text += &format!(
        "a copy of an expert pays from {} tokens on; {} in all\n",
        number(settings.cost.break_even_tokens()),
        tierwise_cost::units::Seconds(seconds)
    );
    text += &in_packs(file);
    if let Some(m) = moved {
        text += &format!(
            "\nfrom the placement in use: {} copies, {}, in {} stages of at most {} per device and direction\n",
            m.copies,
            Bytes(m.bytes as u64),
            m.stages.len(),
            args.stage
        );
    }
    if let Some(path) = &args.output {
        let export =
            if file.num_outside() > 0 { String::new() } else { format!(": `tierwise export {} --to sglang`", path.display()) };
        text += &format!("\nwritten to {}{export}\n", path.display());
    }
    text
}
