//! Moves between tiers within one layer, while they save time: what filling memory by memory does not see.
//!
//! Finds splits between processors that work side by side (CPU beside link, socket beside socket). Group sizes are halved, so a
//! layer needs few judgements.

use super::fill::seconds;
use crate::evaluate::{LayerPlacement, Placement, Weights};
use crate::problem::Problem;

/// Rounds over all layers at most; every round must save time.
const MAX_ROUNDS: usize = 4;

/// Improves `placement`, which must be feasible, and keeps it so.
pub(super) fn polish(problem: &Problem<'_>, weights: &Weights<'_>, placement: &mut Placement) {
    let Ok(usage) = crate::evaluate::usage(problem, placement) else { return };
    let mut free: Vec<u64> =
        (0..problem.room.len()).map(|m| problem.room[m].0 - usage.resident[m].0 - usage.slots[m].0).collect();
    for _ in 0..MAX_ROUNDS {
        let mut saved = false;
        for i in 0..placement.layers.len() {
            while let Some(better) = best_move(problem, weights, &placement.layers[i], i, &mut free) {
                placement.layers[i] = better;
                saved = true;
            }
        }
        if !saved {
            return;
        }
    }
}

/// The first move that makes layer `i` faster by more than rounding; takes its bytes from `free`.
fn best_move(
    problem: &Problem<'_>,
    weights: &Weights<'_>,
    layer: &LayerPlacement,
    i: usize,
    free: &mut [u64],
) -> Option<LayerPlacement> {
    let now = seconds(weights, i, layer);
    let bytes = problem.layers[i].expert_bytes.0;
    let through = |t: usize| problem.tiers[t].through.as_deref();
    let used: Vec<bool> = (0..problem.tiers.len()).map(|t| layer.tier_of.iter().any(|o| usize::from(*o) == t)).collect();
    let slots_in = (0..problem.tiers.len()).find_map(|t| if used[t] { through(t) } else { None });
    for from in (0..problem.tiers.len()).filter(|t| used[*t]) {
        for to in 0..problem.tiers.len() {
            // Into a cached tier only where the layer has slots for it.
            if to == from || (through(to).is_some() && through(to) != slots_in) {
                continue;
            }
            let (a, b) = (problem.memory_index(&problem.tiers[from].memory), problem.memory_index(&problem.tiers[to].memory));
            let members: Vec<usize> = problem.layers[i]
                .by_popularity
                .iter()
                .map(|e| *e as usize)
                .filter(|e| usize::from(layer.tier_of[*e]) == from)
                .collect();
            let fits = if a == b { members.len() } else { members.len().min((free[b] / bytes.max(1)) as usize) };
            let mut n = fits;
            while n > 0 {
                let mut moved = layer.clone();
                // The least popular go: the slower tier then gets the smaller load.
                for e in &members[members.len() - n..] {
                    moved.tier_of[*e] = to as u8;
                }
                let cached = moved.tier_of.iter().filter(|t| through(usize::from(**t)).is_some()).count() as u32;
                moved.slots = layer.slots.min(cached);
                if seconds(weights, i, &moved) < now * (1.0 - 1e-6) {
                    if a != b {
                        free[a] += bytes * n as u64;
                        free[b] -= bytes * n as u64;
                    }
                    if let Some(memory) = slots_in {
                        free[problem.memory_index(memory)] += bytes * u64::from(layer.slots - moved.slots);
                    }
                    return Some(moved);
                }
                n /= 2;
            }
        }
    }
    None
}
