//! LLEP's published study (arXiv 2601.17111, Fig. 4) without GPUs: how well the simulation stands for measurements, and ours beside it.
//!
//! A layer gets 1 048 576 token copies on 8 GPUs; a share of them goes to the first experts, all on the first GPU. Seconds are those of
//! [`super::cost`] on H200s; one number per model is fitted to the figure's speedups: how much longer a row takes when experts are
//! computed away from home. Memory of plain expert parallelism is affine in the rows of the busiest GPU.

use super::cost::{LayerCost, Rates};
use super::holders::LayerPlacement;
use super::lla::{LlaSettings, lla};
use super::spill::{SpillCache, SpillSettings, Spiller};
use crate::error::PlanError;

/// Token copies of a step.
pub const TOKENS: u64 = 1 << 20;
/// GPUs.
pub const GPUS: usize = 8;

/// A model of the study.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// Its name there.
    pub name: &'static str,
    /// Routed experts.
    pub num_experts: usize,
    hidden: u32,
    inner: u32,
    /// Fitted.
    reroute_factor: f64,
    /// Gigabytes before any row, and per row.
    base_gb: f64,
    row_gb: f64,
}

/// The three models.
pub const MODELS: [Model; 3] = [
    Model {
        name: "gpt-oss-120b",
        num_experts: 128,
        hidden: 2880,
        inner: 2880,
        reroute_factor: 1.33,
        base_gb: 7.60,
        row_gb: 53.66e-6,
    },
    Model {
        name: "DeepSeek-R1",
        num_experts: 256,
        hidden: 7168,
        inner: 2048,
        reroute_factor: 1.72,
        base_gb: 23.21,
        row_gb: 66.61e-6,
    },
    Model {
        name: "Kimi-K2",
        num_experts: 384,
        hidden: 7168,
        inner: 2048,
        reroute_factor: 1.70,
        base_gb: 33.73,
        row_gb: 66.65e-6,
    },
];

/// One bar of the figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cell {
    /// Seconds of the layer, plain.
    pub ep_s: f64,
    /// With LLEP.
    pub llep_s: f64,
    /// Ours, mean over the steps: placement as plain, copies kept.
    pub ours_s: f64,
    /// Expert copies that LLEP sends, all steps.
    pub llep_transfers: u64,
    /// Ours.
    pub our_transfers: u64,
    /// Rows on the busiest GPU: plain, ours.
    pub rows: [u64; 2],
    /// Gigabytes on the busiest GPU: plain.
    pub ep_gb: f64,
}

/// Token copies by expert: `share` of them go to the first `hot`.
pub fn counts(model: &Model, tokens: u64, hot: usize, share: f64) -> Vec<u64> {
    let n = model.num_experts as u64;
    let hot_tokens = if share > 0.0 { (tokens as f64 * share).round() as u64 } else { 0 };
    let (hot, cold) = if share > 0.0 { (hot as u64, n - hot as u64) } else { (0, n) };
    let part = |total: u64, parts: u64, i: u64| total * (i + 1) / parts - total * i / parts;
    (0..n).map(|e| if e < hot { part(hot_tokens, hot, e) } else { part(tokens - hot_tokens, cold, e - hot) }).collect()
}

/// Simulates one bar for `steps` equal steps.
///
/// # Errors
/// [`PlanError::BadBalance`]: never for the models above.
pub fn cell(model: &Model, tokens: u64, hot: usize, share: f64, steps: u64) -> Result<Cell, PlanError> {
    let cost =
        LayerCost { reroute_factor: model.reroute_factor, ..LayerCost::new(model.hidden, model.inner, 2.0, &Rates::h200()) };
    let counts = counts(model, tokens, hot, share);
    let holders = LayerPlacement::contiguous(model.num_experts, GPUS)?.holders(model.num_experts);
    let per = model.num_experts / GPUS;
    let rows: Vec<u64> = counts.chunks(per).map(|c| c.iter().sum()).collect();
    let busiest = rows.iter().copied().max().unwrap_or(0);
    let busy = |c: &[u64]| c.iter().map(|n| cost.expert_s(*n)).sum::<f64>();
    let ep_s = counts.chunks(per).map(busy).fold(0.0, f64::max) + cost.rates.launch_s + cost.all_to_all_s(&rows);

    let plan = lla(&counts, &LlaSettings { num_ranks: GPUS, alpha: 1.0, min_tokens_per_gemm: 1024 })?;
    let gated = (busiest as f64) < 1.3 * tokens as f64 / GPUS as f64;
    let (llep_s, llep_transfers) = if gated {
        (ep_s, 0)
    } else {
        let mut busy = [0.0; GPUS];
        plan.runs.iter().flatten().for_each(|r| busy[r.rank as usize] += cost.expert_s(r.end - r.start));
        let (mut out, mut into) = ([0_u64; GPUS], [0_u64; GPUS]);
        plan.transfers.iter().for_each(|t| {
            out[t.source as usize] += 1;
            into[t.run.rank as usize] += 1;
        });
        let wires = out.iter().chain(&into).copied().max().unwrap_or(0);
        let compute = (busy.iter().copied().fold(0.0, f64::max) + cost.rates.launch_s) * cost.reroute_factor;
        (compute + cost.all_to_all_s(&plan.loads) + cost.transfer_s(wires), plan.transfers.len() as u64)
    };

    let settings = SpillSettings { min_tokens: 1024, slots_per_device: 4, max_rows: u64::MAX, host_bytes_per_s: 0.0 };
    let (mut spiller, mut cache) = (Spiller::default(), SpillCache::new(GPUS, settings.slots_per_device));
    let (mut ours_s, mut our_transfers, mut our_rows) = (0.0, 0, 0);
    for _ in 0..steps {
        let plan = spiller.plan(&holders, &counts, &[1.0; GPUS], &cost, &settings, &mut cache, 0);
        ours_s += plan.seconds.total() / steps as f64;
        our_transfers += plan.copies.len() as u64;
        let mut rows = [0; GPUS];
        plan.holders.device.iter().zip(&plan.share).for_each(|(g, s)| rows[usize::from(*g)] += s);
        our_rows = our_rows.max(rows.iter().copied().max().unwrap_or(0));
    }
    Ok(Cell {
        ep_s,
        llep_s,
        ours_s,
        llep_transfers: llep_transfers * steps,
        our_transfers,
        rows: [busiest, our_rows],
        ep_gb: model.base_gb + busiest as f64 * model.row_gb,
    })
}
