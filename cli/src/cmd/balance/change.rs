//! From a placement in use to a new one: which experts are copied, switched and freed, in stages.

use anyhow::{Context, Result, bail};
use std::path::Path;
use tierwise_cost::units::Bytes;
use tierwise_planner::balance::holders::LayerPlacement;
use tierwise_planner::balance::loads::Loads;
use tierwise_planner::balance::moves::{Move, layer_moves, stages};
use tierwise_planner::balance::replay::ReplaySettings;
use tierwise_planner::balance::result::{BalanceFile, once};
use tierwise_planner::export::ep::import;

/// The placement in use.
pub fn read_old(path: &Path, loads: &Loads, settings: &ReplaySettings) -> Result<BalanceFile> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let old =
        if text.contains("\"tierwise_balance\"") { BalanceFile::from_json(&text) } else { import(&text, settings.devices.len()) };
    let old = old.with_context(|| path.display().to_string())?;
    if old.num_outside() > 0 {
        bail!(
            "{}: {} experts are in host memory or on disk, expected all on devices: such placements are not changed step by step",
            path.display(),
            old.num_outside()
        );
    }
    let found = (old.slots.len(), old.num_experts as usize, old.devices.len());
    let expected = (loads.num_layers, loads.num_experts, settings.devices.len());
    if found != expected {
        bail!(
            "{}: found {} layers of {} experts on {} devices, expected {} layers of {} on {}",
            path.display(),
            found.0,
            found.1,
            found.2,
            expected.0,
            expected.1,
            expected.2
        );
    }
    Ok(old)
}

/// How one placement becomes another.
pub struct Moved {
    /// In an order that serves at every moment.
    pub moves: Vec<Move>,
    /// How many of them copy an expert.
    pub copies: usize,
    /// Bytes of these.
    pub bytes: f64,
    /// Moves of each stage.
    pub stages: Vec<usize>,
}

/// The moves from one file's placement to another's, `stage` bytes per device and direction at a time.
pub fn moved(old: &BalanceFile, new: &BalanceFile, settings: &ReplaySettings, stage: Bytes) -> Result<Moved> {
    let room: Vec<u32> = new.devices.iter().zip(&old.devices).map(|(n, o)| n.slots.max(o.slots)).collect();
    let layer = |slots: &Vec<Vec<u16>>| LayerPlacement { devices: slots.iter().map(|d| once(d)).collect() };
    let mut moves = Vec::new();
    for (at, layer_index) in new.moe_layers.iter().enumerate() {
        let (was, is) = (layer(&old.slots[at]), layer(&new.slots[at]));
        moves.extend(layer_moves(*layer_index, new.num_experts as usize, &was, &is, &room)?);
    }
    let copies = moves.iter().filter(|m| matches!(m, Move::Copy { .. })).count();
    let stages = stages(&moves, room.len(), settings.cost.expert_bytes as u64, stage.0);
    Ok(Moved { copies, bytes: copies as f64 * settings.cost.expert_bytes, stages, moves })
}
