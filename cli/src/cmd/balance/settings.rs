//! What `balance` replays a log on: devices, memories, prices, from the arguments.

use super::log::Log;
use super::{BalanceArgs, EffortArg, SplitArg};
use anyhow::{Context, Result, bail};
use tierwise_cost::model::ModelSpec;
use tierwise_cost::units::Bytes;
use tierwise_planner::balance::budget::layer_slots;
use tierwise_planner::balance::cost::{LayerCost, Rates};
use tierwise_planner::balance::loads::Loads;
use tierwise_planner::balance::packs::PackSpec;
use tierwise_planner::balance::place::{DeviceSpec, Effort, PlaceOptions, Risk, Sends, SplitRule};
use tierwise_planner::balance::replay::{Policy, ReplaySettings, steps_placed_from};
use tierwise_planner::balance::spill::SpillSettings;

/// [`PlaceOptions::work`] of all layers together: some seconds of one core.
const WORK: u64 = 60_000_000;

/// Policies by name, each once.
pub fn policies(names: &[String]) -> Result<Vec<Policy>> {
    let mut out = Vec::new();
    for name in names {
        let found: Vec<Policy> = match name.as_str() {
            "all" => Policy::ALL.iter().map(|(_, p)| *p).collect(),
            other => Policy::of_name(other).into_iter().collect(),
        };
        if found.is_empty() {
            let known: Vec<&str> = Policy::ALL.iter().map(|(n, _)| *n).collect();
            bail!("--policy {name}: expected one of {}, all", known.join(", "));
        }
        found.into_iter().for_each(|p| {
            if !out.contains(&p) {
                out.push(p);
            }
        });
    }
    Ok(out)
}

/// Memories of each device after its own slots, by name.
pub fn packs(args: &BalanceArgs) -> Result<Vec<(&'static str, PackSpec)>> {
    let devices = args.devices as usize;
    let mut packs = Vec::new();
    for (name, slots, price) in [("host", &args.host_slots, args.host_price), ("disk", &args.disk_slots, args.disk_price)] {
        let Some(price) = price else { continue };
        if slots.len() != 1 && slots.len() != devices {
            bail!("--{name}-slots: found {} numbers, expected one, or {devices}, one for each device", slots.len());
        }
        let least = packs.last().map_or(1.0, |(_, p): &(_, PackSpec)| p.price);
        if !(price.is_finite() && price >= least) {
            bail!("--{name}-price {price}: expected {least} or more, what a token costs in the memory before");
        }
        let slots = (0..devices).map(|g| slots[g.min(slots.len() - 1)]).collect();
        packs.push((name, PackSpec { price, slots }));
    }
    if !packs.is_empty() && args.rebalance > 0 {
        bail!(
            "--rebalance {}: expected none with --host-slots or --disk-slots: such placements are not changed on the way",
            args.rebalance
        );
    }
    Ok(packs)
}

/// Each layer's slots, when the memory of devices is what is given.
pub fn slots_in_memory(args: &BalanceArgs, loads: &Loads, settings: &ReplaySettings) -> Result<Vec<Vec<u32>>> {
    let devices = settings.devices.len();
    if args.memory.len() != 1 && args.memory.len() != devices {
        bail!("--memory: found {} sizes, expected one, or {devices}, one for each device", args.memory.len());
    }
    let room: Vec<u64> =
        (0..devices).map(|g| (args.memory[g.min(args.memory.len() - 1)].0 as f64 / settings.cost.expert_bytes) as u64).collect();
    let steps = steps_placed_from(loads, settings)?;
    let windows: Vec<_> = (0..loads.num_layers).map(|l| loads.windows(steps.clone(), l, settings.windows)).collect();
    let found = layer_slots(&windows, &settings.devices, &room, settings.packs.first().map(|p| p.price), &settings.place);
    found.with_context(|| format!("--memory: an expert has {}", Bytes(settings.cost.expert_bytes as u64)))
}

/// The devices and prices that the arguments describe.
pub fn settings(args: &BalanceArgs, log: &Log, spec: Option<&ModelSpec>) -> Result<ReplaySettings> {
    let devices = args.devices as usize;
    if !devices.is_multiple_of(args.nodes as usize) {
        bail!("--nodes {}: found {devices} devices, expected a multiple of the nodes", args.nodes);
    }
    for (flag, given) in [("--slots", args.slots.len()), ("--speed", args.speed.len())] {
        if given != 0 && given != devices {
            bail!("{flag}: found {given} numbers, expected {devices}, one for each device");
        }
    }
    let packs = packs(args)?;
    if let Some(x) = args.speed.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
        bail!("--speed {x}: expected positive numbers");
    }
    if let Some(share) = args.cvar.filter(|s| !(*s > 0.0 && *s <= 1.0)) {
        bail!("--cvar {share}: expected a share above 0, at most 1");
    }
    for (flag, x) in [("--alpha", args.alpha), ("--lambda", args.lambda), ("--bytes-per-weight", args.bytes_per_weight)] {
        if !(x.is_finite() && x > 0.0) {
            bail!("{flag} {x}: expected a positive number");
        }
    }
    for (flag, x) in [("--node-price", args.node_price), ("--pair-price", args.pair_price), ("--tolerance", args.tolerance)] {
        if !(x.is_finite() && x >= 0.0) {
            bail!("{flag} {x}: expected 0 or more");
        }
    }
    if args.pair_price > 0.0 && log.affinity.is_none() {
        bail!("--pair-price: {} holds counts, expected a trace, which says what tokens choose together", args.load);
    }
    let Some((_, rates)) = Rates::NAMES.iter().find(|(n, _)| *n == args.gpu) else {
        let known: Vec<&str> = Rates::NAMES.iter().map(|(n, _)| *n).collect();
        bail!("--gpu {}: expected one of {}", args.gpu, known.join(", "));
    };
    let moe = spec.and_then(|s| s.moe_layers().next()).map(|(_, m)| m);
    if let (Some(spec), Some(moe)) = (spec, moe)
        && (spec.moe_layers().count(), moe.num_experts as usize) != (log.loads.num_layers, log.loads.num_experts)
    {
        bail!(
            "{}: found loads of {} layers of {} experts, expected {} MoE layers of {} as {} has",
            args.load,
            log.loads.num_layers,
            log.loads.num_experts,
            spec.moe_layers().count(),
            moe.num_experts,
            spec.name
        );
    }
    let (hidden, inner) = match (spec, moe) {
        (Some(spec), Some(moe)) => (spec.hidden_size, moe.inner_size),
        (Some(spec), None) => bail!("{}: has no routed experts", spec.name),
        _ => (7168, 2048),
    };
    let groups = args.groups.unwrap_or_else(|| moe.and_then(|m| m.router.groups).map_or(1, |(n, _)| n));
    let kept = moe.and_then(|m| m.router.groups).map_or(1, |(_, kept)| kept);
    let per_group = moe.map_or(8.0, |m| f64::from(m.experts_per_token)) / f64::from(kept.max(1));
    let slots = match args.replicas {
        Some(r) if !r.is_multiple_of(args.devices) => {
            bail!("--replicas {r}: expected a multiple of {devices}, the number of devices; or --slots for each of them")
        }
        Some(r) => r / args.devices,
        // Upstream's policies can use as many in every layer.
        None if !args.memory.is_empty() => {
            let least = args.memory.iter().map(|b| b.0).min().unwrap_or(0) as f64;
            let bytes = LayerCost::new(hidden, inner, args.bytes_per_weight, rates).expert_bytes;
            ((least / bytes / log.loads.num_layers as f64) as u32).min(log.loads.num_experts as u32)
        }
        None => (log.loads.num_experts as u32).div_ceil(args.devices),
    };
    let device = |g: usize| DeviceSpec {
        node: (g / (devices / args.nodes as usize)) as u16,
        inverse_speed: args.speed.get(g).map_or(1.0, |s| 1.0 / s),
        slots: args.slots.get(g).copied().unwrap_or(slots),
    };
    Ok(ReplaySettings {
        devices: (0..devices).map(device).collect(),
        num_nodes: args.nodes as usize,
        num_groups: groups as usize,
        cost: LayerCost::new(hidden, inner, args.bytes_per_weight, rates),
        train_steps: log.train_steps,
        rebalance_every: args.rebalance,
        windows: args.windows as usize,
        place: PlaceOptions {
            split: if args.split == SplitArg::Equal { SplitRule::Equal } else { SplitRule::Exact },
            risk: args.cvar.map_or(Risk::Mean, |share| Risk::Cvar { share }),
            node_price: (args.nodes > 1 && args.node_price > 0.0)
                .then_some((Sends { num_groups: groups as usize, experts_per_group: per_group }, args.node_price)),
            effort: if args.effort == EffortArg::Fast { Effort::Fast } else { Effort::Thorough },
            seed: 1,
            work: (WORK / log.loads.num_layers as u64).max(WORK / 100),
        },
        spill: SpillSettings {
            min_tokens: args.min_tokens,
            slots_per_device: args.spill_slots,
            max_rows: u64::MAX,
            host_bytes_per_s: args.host_rate.map_or(0.0, |r| r.0 as f64),
        },
        alpha: args.alpha,
        lambda: args.lambda,
        // Input, two inner activations and output of a row, 16 bits each.
        row_bytes: 2.0 * (2.0 * f64::from(hidden) + 2.0 * f64::from(inner)),
        layer_slots: Vec::new(),
        tolerance: args.tolerance,
        affinity: log.affinity.clone(),
        pair_price: args.pair_price,
        packs: packs.into_iter().map(|(_, pack)| pack).collect(),
    })
}
