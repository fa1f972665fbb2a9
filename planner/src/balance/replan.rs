//! A new placement from one in use: few copies, nearly the balance of a fresh one.
//!
//! Loads drift; a fresh placement is better, but it shares with the old one only what chance left. So: how good a fresh placement is says
//! what to reach; candidates are the old placement as it is, the old one mended where it binds, the old one improved, and the fresh one on
//! relabelled devices; of those within the tolerance, copies are taken back one by one while the tolerance holds; the one with the fewest copies
//! wins. A fresh placement is always among them, so the tolerance is always kept.

use super::holders::LayerPlacement;
use super::judge::Judge;
use super::place::{DeviceSpec, Effort, PlaceOptions, Placed, SplitRule, place_layer_with};
use super::relabel::relabel;
use super::robust::scenarios;
use super::search::State;
use super::terms::{Terms, copies};
use crate::error::PlanError;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Scenarios that candidates are judged by, where there are several windows.
const SCENARIOS: usize = 32;

/// Places the experts of one layer anew. `tolerance`: how much slower than a fresh placement is allowed, 0.01 for 1 %.
///
/// # Errors
/// As [`place_layer_with`].
pub fn replan_layer(
    windows: &[Vec<f64>],
    devices: &[DeviceSpec],
    old: &LayerPlacement,
    tolerance: f64,
    options: &PlaceOptions,
    terms: Terms<'_>,
) -> Result<Placed, PlanError> {
    let terms = Terms { old: None, ..terms };
    let fresh = place_layer_with(windows, devices, options, terms)?;
    let experts = windows[0].len();
    if old.check(experts, &terms.room(devices)).is_err() || terms.packs.is_some() {
        return Ok(fresh);
    }
    let mut rng = StdRng::seed_from_u64(options.seed);
    let exact = options.split == SplitRule::Exact;
    let seen = if exact && windows.len() > 1 { scenarios(windows, SCENARIOS, &mut rng) } else { windows.to_vec() };
    let mut judge = Judge::new(&seen, devices, options, terms);
    let weight: Vec<f64> = (0..experts).flat_map(|e| seen.iter().map(move |w| w[e])).collect();
    let sends = options.node_price.as_ref().map(|(s, price)| (s, *price));
    let state = |p: &LayerPlacement| State::new(p, &weight, seen.len(), devices, options.risk, sends, terms);
    let value_of = |p: &LayerPlacement, judge: &mut Judge<'_>| {
        let equal = if exact { f64::INFINITY } else { state(p).score().objective };
        judge.value(p, equal)
    };
    let relabelled = LayerPlacement { devices: relabel(&old.devices, &fresh.placement.devices, devices) };
    let target = value_of(&relabelled, &mut judge) * (1.0 + tolerance);

    let mut candidates = vec![old.clone()];
    let now = value_of(old, &mut judge);
    if now > target {
        if exact {
            candidates.push(judge.widen(now, old.clone(), target, 24).1);
        }
        // As few changes as lead below the target, seen with equal splits; or twice as far where that is not what counts.
        for enough in [target, 2.0 * target - now.min(2.0 * target)] {
            let mut s = state(old);
            let width = if options.effort == Effort::Thorough { devices.len() } else { devices.len().min(4) };
            s.improve(width, enough, 200);
            let improved = s.placement();
            let value = value_of(&improved, &mut judge);
            candidates.push(improved.clone());
            if exact && value > target {
                candidates.push(judge.widen(value, improved, target, 24).1);
            }
        }
    }
    candidates.push(relabelled);
    let mut best: Option<(usize, LayerPlacement)> = None;
    for candidate in candidates {
        if value_of(&candidate, &mut judge) > target {
            continue;
        }
        let kept = take_back(old, candidate, experts, |p| value_of(p, &mut judge) <= target);
        let n = copies(old, &kept);
        if best.as_ref().is_none_or(|(least, _)| n < *least) {
            best = Some((n, kept));
        }
    }
    let Some((_, placement)) = best else { return Ok(fresh) };
    let mut judge = Judge::new(windows, devices, options, terms);
    let weight: Vec<f64> = (0..experts).flat_map(|e| windows.iter().map(move |w| w[e])).collect();
    let equal = State::new(&placement, &weight, windows.len(), devices, options.risk, sends, terms).score().objective;
    let objective = judge.value(&placement, equal);
    // Slots of what stays are kept.
    let kept = relabel_in_place(old, &placement);
    Ok(Placed { placement: kept, objective, lower_bound: fresh.lower_bound.min(objective) })
}

/// Undoes copies one by one while the placement stays valid and good.
fn take_back(
    old: &LayerPlacement,
    mut new: LayerPlacement,
    experts: usize,
    mut is_good: impl FnMut(&LayerPlacement) -> bool,
) -> LayerPlacement {
    loop {
        let mut changed = false;
        for g in 0..new.devices.len() {
            let coming: Vec<u16> = new.devices[g].iter().copied().filter(|e| !old.devices[g].contains(e)).collect();
            for e in coming {
                let gone: Vec<u16> = old.devices[g].iter().copied().filter(|x| !new.devices[g].contains(x)).collect();
                let others = new.counts(experts)[usize::from(e)] > 1;
                let at = new.devices[g].iter().position(|x| *x == e).expect("a coming expert is held");
                let mut undo = |mut other: LayerPlacement, x: Option<u16>| {
                    match x {
                        Some(x) => other.devices[g][at] = x,
                        None => drop(other.devices[g].remove(at)),
                    }
                    is_good(&other).then_some(other)
                };
                // The old expert comes back into its place; a copy that is the expert's only replica has to stay, unless its old device
                // takes it back for what came from here.
                let better = if others {
                    gone.iter().find_map(|x| undo(new.clone(), Some(*x))).or_else(|| undo(new.clone(), None))
                } else {
                    gone.iter().find_map(|x| {
                        let home = (0..new.devices.len()).find(|h| {
                            *h != g && old.devices[*h].contains(&e) && new.devices[*h].contains(x) && !old.devices[*h].contains(x)
                        })?;
                        let mut other = new.clone();
                        let there = other.devices[home].iter().position(|y| y == x)?;
                        other.devices[home][there] = e;
                        undo(other, Some(*x))
                    })
                };
                if let Some(better) = better {
                    new = better;
                    changed = true;
                }
            }
        }
        if !changed {
            return new;
        }
    }
}

/// The same placement, with what stays in its old slot.
fn relabel_in_place(old: &LayerPlacement, new: &LayerPlacement) -> LayerPlacement {
    let in_place = |(was, is): (&Vec<u16>, &Vec<u16>)| super::relabel::in_place(was, is);
    LayerPlacement { devices: old.devices.iter().zip(&new.devices).map(in_place).collect() }
}
