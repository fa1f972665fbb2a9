//! Filling fast memories from a slow one by seconds saved per byte.
//!
//! Within a layer the most popular experts move first (exchange argument: they have equal bytes). The layer's time as a function
//! of how many have moved is not convex - a round trip is only saved by the last one - so the steps of its lower convex hull are
//! taken, steepest first over all layers; the last step is cut to what fits.

use super::polish::alike;
use crate::evaluate::{LayerPlacement, Placement, Weights, layer_seconds};
use crate::problem::Problem;

/// Weighted seconds of one layer.
pub(super) fn seconds(weights: &Weights<'_>, index: usize, layer: &LayerPlacement) -> f64 {
    weights.iter().map(|(w, table)| w * layer_seconds(table, index, layer)).sum()
}

/// A placement with or without a cache `(tier, share of the slots' memory)`; `None` if whole experts do not fit that way.
pub(super) fn fill(problem: &Problem<'_>, weights: &Weights<'_>, cache: Option<(usize, f64)>) -> Option<Placement> {
    let (_, table) = weights.first()?;
    let mut direct: Vec<usize> = (0..problem.tiers.len()).filter(|t| problem.tiers[*t].through.is_none()).collect();
    let speed = |t: &usize| table.classes.first().map_or(0.0, |c| c.tiers[*t].expert_s);
    direct.sort_by(|a, b| speed(a).total_cmp(&speed(b)));
    let mut room: Vec<u64> = problem.room.iter().map(|b| b.0).collect();
    let memory_of = |t: usize| problem.memory_index(&problem.tiers[t].memory);
    let total = problem.expert_bytes().0;

    // Where everything starts, and what may be filled from there.
    let (start, targets, slot_bytes) = match cache {
        None => {
            let mut held = 0_u64;
            let last = direct.iter().position(|t| {
                held = held.saturating_add(room[memory_of(*t)]);
                held >= total
            })?;
            (direct[last], direct[..last].to_vec(), 0)
        }
        Some((tier, share)) => {
            let through = problem.memory_index(problem.tiers[tier].through.as_deref()?);
            let slot_bytes = (room[through] as f64 * share) as u64;
            room[through] -= slot_bytes;
            // Experts that wait in the same memory computed directly are a matter of polishing.
            let targets = direct.iter().copied().filter(|t| problem.tiers[*t].memory != problem.tiers[tier].memory).collect();
            (tier, targets, slot_bytes)
        }
    };
    let mut placement = Placement {
        layers: problem
            .layers
            .iter()
            .map(|l| LayerPlacement { tier_of: vec![start as u8; l.num_experts as usize], slots: 0 })
            .collect(),
    };
    if cache.is_some() {
        share_slots(problem, &mut placement, start as u8, slot_bytes);
        if placement.layers.iter().any(|l| l.slots == 0) {
            return None;
        }
    }
    let mut start_bytes = total;
    for target in targets {
        let m = memory_of(target);
        let moved = move_by_gain(problem, weights, &mut placement, start as u8, target as u8, &mut room[m]);
        start_bytes -= moved;
    }
    let home = memory_of(start);
    if start_bytes > room[home] {
        for target in direct.iter().copied().filter(|t| *t != start && memory_of(*t) != home) {
            let excess = start_bytes.saturating_sub(room[home]);
            start_bytes -= force(problem, &mut placement, start as u8, target as u8, &mut room[memory_of(target)], excess);
        }
        if start_bytes > room[home] {
            return None;
        }
    }
    if let Some(locked) = problem.rooms_of(&problem.tiers[start]).nth(1).map(|r| room[r])
        && start_bytes > locked
    {
        // More than may be page-locked: the rest is computed where it lies, if it can be.
        let beside = direct.iter().copied().find(|t| memory_of(*t) == home)?;
        let mut unlimited = u64::MAX;
        force(problem, &mut placement, start as u8, beside as u8, &mut unlimited, start_bytes - locked);
    }
    if cache.is_some() {
        share_slots(problem, &mut placement, start as u8, slot_bytes);
    }
    Some(placement)
}

/// Shares `bytes` of slots evenly, by experts, over the layers that cache any; none gets more slots than it caches.
pub(crate) fn share_slots(problem: &Problem<'_>, placement: &mut Placement, start: u8, bytes: u64) {
    let mut left = bytes;
    let caches: Vec<u32> = placement.layers.iter().map(|l| l.tier_of.iter().filter(|t| **t == start).count() as u32).collect();
    for l in &mut placement.layers {
        l.slots = 0;
    }
    loop {
        let open: Vec<usize> = (0..caches.len()).filter(|i| placement.layers[*i].slots < caches[*i]).collect();
        let each: u64 = open.iter().map(|i| problem.layers[*i].expert_bytes.0).sum();
        let rounds = left.checked_div(each).unwrap_or(0);
        if rounds == 0 {
            // Less than one for everybody: one each, from the first layer, while they last.
            for i in open {
                let b = problem.layers[i].expert_bytes.0;
                if b <= left {
                    left -= b;
                    placement.layers[i].slots += 1;
                }
            }
            return;
        }
        for i in open {
            let more = u64::from(caches[i] - placement.layers[i].slots).min(rounds) as u32;
            placement.layers[i].slots += more;
            left -= problem.layers[i].expert_bytes.0 * u64::from(more);
        }
    }
}

struct Step {
    layer: usize,
    experts: u32,
    saved_per_byte: f64,
}

/// Experts of layer `i` that are in tier `from`, most popular first.
fn movable(problem: &Problem<'_>, placement: &Placement, i: usize, from: u8) -> Vec<usize> {
    let tier_of = &placement.layers[i].tier_of;
    problem.layers[i].by_popularity.iter().map(|e| *e as usize).filter(|e| tier_of[*e] == from).collect()
}

/// The layer with its first `n` movable experts in tier `to`; slots never exceed what is still cached.
fn with_moved(layer: &LayerPlacement, movable: &[usize], n: usize, from: u8, to: u8) -> LayerPlacement {
    let mut moved = layer.clone();
    for e in &movable[..n] {
        moved.tier_of[*e] = to;
    }
    if layer.slots > 0 {
        moved.slots = layer.slots.min(moved.tier_of.iter().filter(|t| **t == from).count() as u32);
    }
    moved
}

/// Moves experts from tier `from` to tier `to` while that saves time and `room` lasts; returns the bytes moved.
fn move_by_gain(
    problem: &Problem<'_>,
    weights: &Weights<'_>,
    placement: &mut Placement,
    from: u8,
    to: u8,
    room: &mut u64,
) -> u64 {
    let before = *room;
    let mut steps: Vec<Step> = Vec::new();
    let mut times: Vec<f64> = Vec::new();
    for (i, layer) in placement.layers.iter().enumerate() {
        // Neighbours that are alike have the same times.
        let same = i > 0 && *layer == placement.layers[i - 1] && alike(problem, weights, i - 1, i);
        if !same {
            let movable = movable(problem, placement, i, from);
            let moved = |n| seconds(weights, i, &with_moved(layer, &movable, n, from, to));
            times = (0..=movable.len()).map(moved).collect();
        }
        let bytes = problem.layers[i].expert_bytes.0 as f64;
        for (a, b) in hull(&times) {
            let saved_per_byte = (times[a] - times[b]) / ((b - a) as f64 * bytes);
            if saved_per_byte > 0.0 {
                steps.push(Step { layer: i, experts: (b - a) as u32, saved_per_byte });
            }
        }
    }
    // A stable sort: equal steps keep the order of layers, and the steps of one layer their own (its hull is convex).
    steps.sort_by(|a, b| b.saved_per_byte.total_cmp(&a.saved_per_byte));
    let mut cut = vec![false; placement.layers.len()];
    for step in steps {
        let bytes = problem.layers[step.layer].expert_bytes.0;
        let fits = (*room / bytes.max(1)).min(u64::from(step.experts)) as usize;
        if cut[step.layer] {
            continue;
        }
        let movable = movable(problem, placement, step.layer, from);
        let layer = &placement.layers[step.layer];
        let n = if fits == step.experts as usize {
            fits
        } else {
            cut[step.layer] = true;
            // Inside a hull step moving fewer may even cost time: take the best number that fits.
            let time = |n: &usize| seconds(weights, step.layer, &with_moved(layer, &movable, *n, from, to));
            (0..=fits).min_by(|a, b| time(a).total_cmp(&time(b))).unwrap_or(0)
        };
        placement.layers[step.layer] = with_moved(layer, &movable, n, from, to);
        *room -= bytes * n as u64;
    }
    before - *room
}

/// Lower convex hull of `times` over 0..n: its corners as pairs of neighbours.
fn hull(times: &[f64]) -> Vec<(usize, usize)> {
    let mut corners: Vec<usize> = Vec::new();
    for i in 0..times.len() {
        while let [.., a, b] = corners[..] {
            let below = (times[b] - times[a]) * (i - a) as f64 >= (times[i] - times[a]) * (b - a) as f64;
            if !below {
                break;
            }
            corners.pop();
        }
        corners.push(i);
    }
    corners.windows(2).map(|w| (w[0], w[1])).collect()
}

/// Moves the least popular experts, last layers first, until `excess` bytes left or the room ends; returns the bytes moved.
fn force(problem: &Problem<'_>, placement: &mut Placement, from: u8, to: u8, room: &mut u64, excess: u64) -> u64 {
    let mut moved = 0;
    for i in (0..placement.layers.len()).rev() {
        let bytes = problem.layers[i].expert_bytes.0;
        for e in movable(problem, placement, i, from).into_iter().rev() {
            if moved >= excess || bytes > *room {
                break;
            }
            placement.layers[i].tier_of[e] = to;
            *room -= bytes;
            moved += bytes;
        }
        let cached = placement.layers[i].tier_of.iter().filter(|t| **t == from).count() as u32;
        placement.layers[i].slots = placement.layers[i].slots.min(cached);
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::hull;

    #[test]
    fn hull_skips_what_bulges() {
        // 10, 9, 8, 2: only the last step pays, so the hull goes straight there.
        assert_eq!(hull(&[10.0, 9.0, 8.0, 2.0]), [(0, 3)]);
        assert_eq!(hull(&[10.0, 5.0, 3.0, 2.0]), [(0, 1), (1, 2), (2, 3)]);
        assert_eq!(hull(&[1.0]), []);
    }
}
