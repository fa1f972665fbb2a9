//! Placements that other engines would choose, under the same budgets and prices.
//!
//! * llama.cpp `--n-cpu-moe N`: the experts of the first N MoE layers in host memory, all others in VRAM (its README, `common/arg.cpp`).
//! * kTransformers' placement strategies (kt-kernel, `--kt-expert-placement-strategy`): `frequency` puts the most frequent
//!   (layer, expert) pairs into VRAM, `uniform` as many experts of every layer; here of each layer the most frequent.
//!
//! Only the two memories that these engines know are used: that of the first GPU and the host's.

use crate::error::PlanError;
use crate::evaluate::{LayerPlacement, Placement, Prices, step_seconds, usage};
use crate::held_out::{replay_layer, replay_seconds};
use crate::price::PriceTable;
use crate::problem::Problem;
use crate::scenario::Scenarios;
use serde::Serialize;
use tierwise_cost::machine::{MemoryKind, ProcessorKind};

/// The tier of the GPU's memory and that of the host's.
fn two_tiers(problem: &Problem<'_>) -> Result<(u8, u8), PlanError> {
    let gpu = problem
        .tiers
        .iter()
        .position(|t| t.through.is_none() && t.memory == problem.main.memory && problem.main.executor_kind == ProcessorKind::Gpu);
    let host = (0..problem.tiers.len())
        .filter(|t| problem.tiers[*t].through.is_none() && problem.tiers[*t].kind == MemoryKind::Dram && Some(*t) != gpu)
        .max_by_key(|t| problem.room[problem.memory_index(&problem.tiers[*t].memory)]);
    match (gpu, host) {
        (Some(gpu), Some(host)) => Ok((gpu as u8, host as u8)),
        _ => Err(PlanError::BadRequest {
            field: "comparison with other engines",
            found: format!("for {}, where {} leads", problem.machine.name, problem.main.executor),
            expected: "a machine with a GPU that has memory of its own, and host memory beside it".into(),
        }),
    }
}

/// Experts of each layer that are in VRAM, as a placement; `None` when it does not fit.
fn placed(problem: &Problem<'_>, gpu: u8, host: u8, in_vram: impl Fn(usize, u32) -> bool) -> Option<Placement> {
    let layer = |i: usize| LayerPlacement {
        tier_of: (0..problem.layers[i].num_experts).map(|e| if in_vram(i, e) { gpu } else { host }).collect(),
        slots: 0,
    };
    let placement = Placement { layers: (0..problem.layers.len()).map(layer).collect() };
    usage(problem, &placement).is_ok().then_some(placement)
}

/// `--n-cpu-moe N`: the first `n` MoE layers' experts in host memory; `None` when that does not fit.
///
/// # Errors
/// [`PlanError::BadRequest`] on a machine without these two memories.
pub fn whole_layers(problem: &Problem<'_>, n: usize) -> Result<Option<Placement>, PlanError> {
    let (gpu, host) = two_tiers(problem)?;
    Ok(placed(problem, gpu, host, |layer, _| layer >= n))
}

/// The best N of `--n-cpu-moe N` by price, and its placement; `None` when no N fits.
///
/// # Errors
/// [`PlanError::BadRequest`] on a machine without these two memories.
pub fn best_whole_layers(problem: &Problem<'_>, prices: &Prices) -> Result<Option<(usize, Placement)>, PlanError> {
    let mut best: Option<(f64, usize, Placement)> = None;
    for n in 0..=problem.layers.len() {
        if let Some(placement) = whole_layers(problem, n)? {
            let seconds = step_seconds(&prices.decode, &placement);
            if best.as_ref().is_none_or(|(s, ..)| seconds < *s) {
                best = Some((seconds, n, placement));
            }
        }
    }
    Ok(best.map(|(_, n, placement)| (n, placement)))
}

/// Experts of all layers by falling share, into VRAM while they fit; `None` when the rest does not fit the host.
/// `shares` is `[moe layers][num_experts]`.
///
/// # Errors
/// [`PlanError::BadRequest`] on a machine without these two memories.
pub fn frequency_top_k(problem: &Problem<'_>, shares: &[Vec<f64>]) -> Result<Option<Placement>, PlanError> {
    let (gpu, host) = two_tiers(problem)?;
    let mut pairs: Vec<(f64, usize, usize)> = Vec::new();
    for (layer, shares) in shares.iter().enumerate() {
        pairs.extend(shares.iter().enumerate().map(|(e, s)| (*s, layer, e)));
    }
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut room = problem.room[problem.memory_index(&problem.main.memory)].0;
    let mut in_vram: Vec<Vec<bool>> = shares.iter().map(|s| vec![false; s.len()]).collect();
    for (_, layer, e) in pairs {
        let bytes = problem.layers[layer].expert_bytes.0;
        if bytes <= room {
            room -= bytes;
            in_vram[layer][e] = true;
        }
    }
    Ok(placed(problem, gpu, host, |layer, e| in_vram[layer][e as usize]))
}

/// As many experts of every layer in VRAM, the most frequent of each; what is left over goes to the first layers. `None` when the rest
/// does not fit the host.
///
/// # Errors
/// [`PlanError::BadRequest`] on a machine without these two memories.
pub fn uniform_top_k(problem: &Problem<'_>, shares: &[Vec<f64>]) -> Result<Option<Placement>, PlanError> {
    let (gpu, host) = two_tiers(problem)?;
    let mut room = problem.room[problem.memory_index(&problem.main.memory)].0;
    let mut count = vec![0; shares.len()];
    let most = shares.iter().map(Vec::len).max().unwrap_or(0);
    for _ in 0..most {
        for (layer, count) in count.iter_mut().enumerate() {
            let bytes = problem.layers[layer].expert_bytes.0;
            if *count < shares[layer].len() && bytes <= room {
                room -= bytes;
                *count += 1;
            }
        }
    }
    let mut in_vram: Vec<Vec<bool>> = shares.iter().map(|s| vec![false; s.len()]).collect();
    for ((shares, count), in_vram) in shares.iter().zip(count).zip(&mut in_vram) {
        let mut order: Vec<usize> = (0..shares.len()).collect();
        order.sort_by(|a, b| shares[*b].total_cmp(&shares[*a]).then(a.cmp(b)));
        order.into_iter().take(count).for_each(|e| in_vram[e] = true);
    }
    Ok(placed(problem, gpu, host, |layer, e| in_vram[layer][e as usize]))
}

/// What other engines would do, by name; those that do not fit are left out. `shares` is `[moe layers][num_experts]`.
///
/// # Errors
/// [`PlanError::BadRequest`] on a machine without these two memories.
pub fn others(problem: &Problem<'_>, prices: &Prices, shares: &[Vec<f64>]) -> Result<Vec<(String, Placement)>, PlanError> {
    let mut list = Vec::new();
    if let Some((n, placement)) = best_whole_layers(problem, prices)? {
        list.push((format!("best --n-cpu-moe N: {n}"), placement));
    }
    list.extend(frequency_top_k(problem, shares)?.map(|p| ("frequency top-k".to_string(), p)));
    list.extend(uniform_top_k(problem, shares)?.map(|p| ("uniform top-k".to_string(), p)));
    Ok(list)
}

/// One placement on real steps.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ComparisonRow {
    /// Whose.
    pub plan: String,
    /// Share of the demanded experts found in the main processor's memory.
    pub hit: f64,
    /// Mean seconds per decode step.
    pub step_s: f64,
    /// Tokens per second of all sequences together.
    pub tokens_per_s: f64,
    /// Tokens per second of the first placement over those of this one, less 1.
    pub gain: f64,
}

/// Replays placements on the same steps in the order of time; `table` holds decode prices. The first is the one whose gains are stated.
pub fn compare(
    problem: &Problem<'_>,
    table: &PriceTable,
    placements: &[(String, Placement)],
    steps: &Scenarios,
) -> Vec<ComparisonRow> {
    let fast: Vec<bool> = problem.tiers.iter().map(|t| t.memory == problem.main.memory).collect();
    let mut rows: Vec<ComparisonRow> = Vec::with_capacity(placements.len());
    for (name, placement) in placements {
        let step_s = replay_seconds(table, placement, steps);
        let (mut requests, mut found) = (0.0, 0.0);
        for (i, (layer, steps)) in placement.layers.iter().zip(&steps.layers).enumerate() {
            let replay = replay_layer(table.layer(i), table.links.len(), layer, steps);
            let asked = replay.active.iter().sum::<u64>() as f64;
            requests += asked;
            found += asked * replay.hit_rate(&fast, table.layer(i));
        }
        rows.push(ComparisonRow {
            plan: name.clone(),
            hit: if requests > 0.0 { found / requests } else { 1.0 },
            step_s,
            tokens_per_s: f64::from(problem.request.batch) / step_s,
            gain: rows.first().map_or(0.0, |ours| step_s / ours.step_s - 1.0),
        });
    }
    rows
}
