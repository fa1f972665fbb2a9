//! L1: which experts every device holds, and how often.
//!
//! Per layer: replicas by water-filling (one more for the expert with the most load per replica, never more than devices), packed
//! heaviest first on the least loaded device that has a slot and does not hold the expert; EPLB's placements as further starts; then local
//! search (`search`) and, with [`Effort::Thorough`], restarts from shaken placements. The objective is the slowest device's load
//! per speed, averaged over windows of the log (a variance in time is thereby paid for) or over the worst share of them (CVaR), plus a
//! price on tokens between nodes: nodes are a price, not a wall. Loads divide equally among replicas ([`SplitRule::Equal`], all that
//! SGLang, vLLM and TensorRT-LLM can) or as L2 divides them ([`SplitRule::Exact`]). A lower bound comes with every result.

use super::eplb::{EplbShape, eplb};
use super::holders::LayerPlacement;
use super::judge::Judge;
use super::loads::check_rows;
use super::robust;
use super::search::State;
use super::terms::Terms;
use crate::error::PlanError;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// A device, as far as one layer is concerned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceSpec {
    /// Its node.
    pub node: u16,
    /// 1 / relative speed.
    pub inverse_speed: f64,
    /// Experts of this layer that it has room for.
    pub slots: u32,
}

/// How an expert's tokens are divided among its replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SplitRule {
    /// Equally.
    Equal,
    /// As L2 divides them.
    #[default]
    Exact,
}

/// What is made small over windows of the log.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Risk {
    /// The mean.
    #[default]
    Mean,
    /// The mean of the worst share of windows.
    Cvar {
        /// Above 0, at most 1.
        share: f64,
    },
}

impl Risk {
    /// Of the times of windows, which are sorted in passing.
    pub fn of(self, maxima: &mut [f64]) -> f64 {
        match self {
            Self::Mean => maxima.iter().sum::<f64>() / maxima.len().max(1) as f64,
            Self::Cvar { share } => {
                maxima.sort_by(|a, b| b.total_cmp(a));
                let worst = ((share * maxima.len() as f64).ceil() as usize).clamp(1, maxima.len().max(1));
                maxima.iter().take(worst).sum::<f64>() / worst as f64
            }
        }
    }
}

/// Tokens that cross nodes: an estimate from loads alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sends {
    /// Groups of consecutive experts that the router chooses among first.
    pub num_groups: usize,
    /// Experts that a token chooses in each group it chose.
    pub experts_per_group: f64,
}

impl Sends {
    /// The group of an expert.
    pub fn group_of(&self, expert: usize, num_experts: usize) -> usize {
        expert * self.num_groups / num_experts.max(1)
    }

    /// Copies of tokens sent to another node, when a dispatcher sends one copy of a token to each node (as DeepEP does), tokens start
    /// anywhere, and choices within a group are independent. `mass`: load by group and node. `[groups][nodes]`
    pub fn sends_of_mass(&self, mass: &[f64], nodes: usize) -> f64 {
        let elsewhere = 1.0 - 1.0 / nodes as f64;
        let of_group = |row: &[f64]| {
            let total: f64 = row.iter().sum();
            if total <= 0.0 {
                return 0.0;
            }
            let distinct: f64 = row.iter().map(|m| 1.0 - (1.0 - (m / total).clamp(0.0, 1.0)).powf(self.experts_per_group)).sum();
            total / self.experts_per_group * distinct
        };
        mass.chunks_exact(nodes.max(1)).map(of_group).sum::<f64>() * elsewhere
    }

    /// The same for a placement, loads divided equally among replicas.
    pub fn sends(&self, placement: &LayerPlacement, load: &[f64], node_of: &[u16]) -> f64 {
        let nodes = node_of.iter().map(|n| usize::from(*n) + 1).max().unwrap_or(1);
        let counts = placement.counts(load.len());
        let mut mass = vec![0.0; self.num_groups * nodes];
        for (held, node) in placement.devices.iter().zip(node_of) {
            for e in held.iter().map(|e| usize::from(*e)) {
                mass[self.group_of(e, load.len()) * nodes + usize::from(*node)] += load[e] / f64::from(counts[e]);
            }
        }
        self.sends_of_mass(&mass, nodes)
    }
}

/// How long to search.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Effort {
    /// About a tenth of a millisecond per layer of 256 experts.
    Fast,
    /// Restarts: up to a second for a large model.
    #[default]
    Thorough,
}

/// What is wanted of a placement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlaceOptions {
    /// How tokens are divided.
    pub split: SplitRule,
    /// What is made small.
    pub risk: Risk,
    /// How nodes are reached, and what a token copy between nodes costs in units of a token on a device. None: nodes do not matter.
    pub node_price: Option<(Sends, f64)>,
    /// How long to search.
    pub effort: Effort,
    /// Seed of restarts.
    pub seed: u64,
    /// How long to search for a placement that holds when loads fluctuate (thorough, exact split, several windows): places of experts
    /// that splits look at; a million takes 50 ms.
    pub work: u64,
}

impl Default for PlaceOptions {
    fn default() -> Self {
        Self { split: SplitRule::Exact, risk: Risk::Mean, node_price: None, effort: Effort::Thorough, seed: 1, work: 20_000_000 }
    }
}

/// One layer placed.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    /// Who holds what.
    pub placement: LayerPlacement,
    /// Value of the objective: tokens on the slowest device, per speed.
    pub objective: f64,
    /// No placement has a smaller one.
    pub lower_bound: f64,
}

/// Closer to the bound is not worth searching for.
const ENOUGH: f64 = 3e-3;
const ENOUGH_THOROUGH: f64 = 1e-6;

/// Places the experts of one layer. `windows`: loads in windows of the log. `[windows][experts]`
///
/// # Errors
/// [`PlanError::BadBalance`] when the slots do not hold every expert once, or a load or speed is impossible.
pub fn place_layer(windows: &[Vec<f64>], devices: &[DeviceSpec], options: &PlaceOptions) -> Result<Placed, PlanError> {
    place_layer_with(windows, devices, options, Terms::default())
}

/// The same with more terms. With packs `windows` are already scaled by their prices, and the bound is one for these packs' experts.
///
/// # Errors
/// As [`place_layer`].
///
/// # Panics
/// Never: there is always a placement to start from.
pub fn place_layer_with(
    windows: &[Vec<f64>],
    devices: &[DeviceSpec],
    options: &PlaceOptions,
    terms: Terms<'_>,
) -> Result<Placed, PlanError> {
    let num_experts = windows.first().map_or(0, Vec::len);
    check_rows(windows, num_experts)?;
    check_devices(devices, num_experts, &terms)?;
    let weight: Vec<f64> = (0..num_experts).flat_map(|e| windows.iter().map(move |w| w[e])).collect();
    let mean: Vec<f64> = weight.chunks_exact(windows.len()).map(|w| w.iter().sum::<f64>() / windows.len() as f64).collect();
    let elsewhere = (0..num_experts).filter(|e| !terms.may_replicate(*e as u16)).count();
    let lower_bound = bound_with(windows, devices, options.risk, elsewhere);
    let sends = options.node_price.as_ref().map(|(s, price)| (s, *price));
    let state = |p: &LayerPlacement| State::new(p, &weight, windows.len(), devices, options.risk, sends, terms);
    let thorough = options.effort == Effort::Thorough;
    let enough = lower_bound * (1.0 + if thorough { ENOUGH_THOROUGH } else { ENOUGH });
    let width = if thorough { devices.len() } else { devices.len().min(4) };

    let mut judge = Judge::new(windows, devices, options, terms);
    let mut best: Option<(f64, LayerPlacement)> = None;
    let mut best_equal: Option<(f64, LayerPlacement)> = None;
    let mut offer = |placement: LayerPlacement, equal: f64, judge: &mut Judge<'_>| {
        let value = judge.value(&placement, equal);
        if best.as_ref().is_none_or(|(v, _)| value < *v) {
            best = Some((value, placement.clone()));
        }
        if best_equal.as_ref().is_none_or(|(v, _)| equal < *v) {
            best_equal = Some((equal, placement));
        }
        best.as_ref().map_or(f64::INFINITY, |(v, _)| *v)
    };
    for start in starts(&mean, devices, options, &terms) {
        let mut s = state(&start);
        let before = s.score().objective;
        if thorough && options.split == SplitRule::Exact {
            // What is best when divided equally need not be best when divided exactly.
            offer(start, before, &mut judge);
        }
        let rounds = if thorough { 1000 } else { 12 };
        let after = s.improve(width, enough, rounds).objective;
        if offer(s.placement(), after, &mut judge) <= enough {
            break;
        }
    }
    let (mut value, mut placement) = best.expect("there is a start");
    if options.split == SplitRule::Exact && value > enough {
        (value, placement) = judge.widen(value, placement, enough, if thorough { 64 } else { 4 });
    }
    if thorough && value > enough {
        let mut rng = StdRng::seed_from_u64(options.seed);
        let (_, equal) = best_equal.expect("there is a start");
        let mut at = state(&equal);
        let mut best_objective = at.score().objective;
        let slots: usize = devices.iter().map(|d| d.slots as usize).sum();
        for _ in 0..(24_000 / (slots * windows.len())).clamp(4, 1500) {
            let mut other = at.clone();
            other.shake(2 + slots / 64, &mut rng);
            let score = other.improve(width, enough, 200).objective;
            if score <= best_objective {
                (best_objective, at) = (score, other);
            }
            if best_objective <= enough {
                break;
            }
        }
        let shaken = at.placement();
        let v = judge.value(&shaken, best_objective);
        if v < value {
            (value, placement) = (v, shaken);
        }
    }
    if thorough && options.split == SplitRule::Exact && windows.len() > 1 {
        let mut rng = StdRng::seed_from_u64(options.seed);
        let scenarios = robust::scenarios(windows, robust::num_scenarios(devices.len()), &mut rng);
        let mut judge_of_more = Judge::new(&scenarios, devices, options, terms);
        let mut candidates = starts(&mean, devices, options, &terms);
        candidates.push(placement);
        let start = robust::best(&mut judge_of_more, candidates).expect("there is a start");
        placement = robust::climb(&mut judge_of_more, start, options.work, &mut rng);
        value = judge.value(&placement, f64::INFINITY);
    }
    Ok(Placed { placement, objective: value, lower_bound: lower_bound.min(value) })
}

fn check_devices(devices: &[DeviceSpec], num_experts: usize, terms: &Terms<'_>) -> Result<(), PlanError> {
    let bad = |field: String, found: String, expected: String| Err(PlanError::BadBalance { field, found, expected });
    if devices.is_empty() || devices.len() > usize::from(u16::MAX) {
        return bad("devices".into(), devices.len().to_string(), "1 to 65535".into());
    }
    if let Some(g) = devices.iter().position(|d| !(d.inverse_speed.is_finite() && d.inverse_speed > 0.0)) {
        return bad(format!("the speed of device {g}"), (1.0 / devices[g].inverse_speed).to_string(), "a positive number".into());
    }
    let slots: u64 = terms.room(devices).iter().map(|s| u64::from(*s).min(num_experts as u64)).sum();
    if slots < num_experts as u64 {
        return bad(
            "slots for experts".into(),
            slots.to_string(),
            format!("{num_experts} or more, one for each expert of the layer"),
        );
    }
    Ok(())
}

/// No placement on these devices is better, however tokens are divided: the mean over devices, and the heaviest replica if every slot is
/// given to water-filling.
pub fn lower_bound(windows: &[Vec<f64>], devices: &[DeviceSpec], risk: Risk) -> f64 {
    bound_with(windows, devices, risk, 0)
}

/// The same when so many experts take no slots of the first pack.
fn bound_with(windows: &[Vec<f64>], devices: &[DeviceSpec], risk: Risk, elsewhere: usize) -> f64 {
    let speeds: f64 = devices.iter().map(|d| 1.0 / d.inverse_speed).sum();
    let fastest = devices.iter().map(|d| d.inverse_speed).fold(f64::INFINITY, f64::min);
    let slots = devices.iter().map(|d| d.slots as usize).sum::<usize>() + elsewhere;
    let of_window = |load: &Vec<f64>| {
        let counts = water_fill(load, slots, devices.len());
        let heaviest = load.iter().zip(&counts).map(|(w, c)| w / f64::from(*c)).fold(0.0, f64::max);
        (load.iter().sum::<f64>() / speeds).max(heaviest * fastest)
    };
    risk.of(&mut windows.iter().map(of_window).collect::<Vec<_>>())
}

/// Replicas per expert: one more for whoever has the most load per replica, at most `most` each.
pub fn water_fill(load: &[f64], slots: usize, most: usize) -> Vec<u32> {
    let mut count = vec![1_u32; load.len()];
    let mut piece = load.to_vec();
    for _ in load.len()..slots {
        let mut at = 0;
        for (i, p) in piece.iter().enumerate().skip(1) {
            if *p > piece[at] {
                at = i;
            }
        }
        if piece[at] < 0.0 {
            break;
        }
        count[at] += 1;
        piece[at] = if count[at] as usize >= most { -1.0 } else { load[at] / f64::from(count[at]) };
    }
    if most == 1 {
        count.fill(1);
    }
    count
}

/// Placements to start from.
fn starts(mean: &[f64], devices: &[DeviceSpec], options: &PlaceOptions, terms: &Terms<'_>) -> Vec<LayerPlacement> {
    let slots: usize = devices.iter().map(|d| d.slots as usize).sum();
    // Experts of later packs are not replicated; theirs is not room of the first.
    let first: Vec<f64> = (0..mean.len()).map(|e| if terms.may_replicate(e as u16) { mean[e] } else { -1.0 }).collect();
    let elsewhere = first.iter().filter(|w| **w < 0.0).count();
    let fill = |most: usize| water_fill(&first, slots + elsewhere, most.min(devices.len()));
    let mut out = vec![pack(mean, &fill(devices.len()), devices, terms)];
    if options.effort != Effort::Thorough {
        return out;
    }
    if options.split == SplitRule::Exact {
        // Many experts with two holders connect more devices than few with many.
        out.extend([2, 3].map(|most| pack(mean, &fill(most), devices, terms)));
    }
    // Fewer replicas leave slots that the search fills where they help.
    let total: f64 = mean.iter().sum::<f64>() / devices.len() as f64;
    for level in [1.0, 0.8, 0.6, 0.5] {
        let wanted = |w: &f64| ((w / (total * level)).ceil().max(1.0) as u32).min(devices.len() as u32);
        let counts: Vec<u32> = first.iter().map(wanted).collect();
        if counts.iter().sum::<u32>() as usize <= slots + elsewhere {
            out.push(pack(mean, &counts, devices, terms));
        }
    }
    let nodes = devices.iter().map(|d| usize::from(d.node) + 1).max().unwrap_or(1);
    if terms.packs.is_none() && devices.iter().all(|d| d.slots == devices[0].slots) {
        for (groups, nodes) in [(1, 1), (nodes, nodes)] {
            let shape = EplbShape { num_replicas: slots, num_groups: groups, num_nodes: nodes, num_devices: devices.len() };
            if let Ok(maps) = eplb(&[mean.to_vec()], shape) {
                out.push(LayerPlacement::from_slots(&maps.physical_to_logical[0], devices.len()));
            }
        }
    }
    if let Some((old, _)) = terms.old {
        out.push(old.clone());
    }
    out
}

/// Replicas, heaviest first, each on the device that is least loaded with it, has a slot and does not hold the expert.
pub(super) fn pack(load: &[f64], counts: &[u32], devices: &[DeviceSpec], terms: &Terms<'_>) -> LayerPlacement {
    let mut order: Vec<u16> = (0..load.len() as u16).collect();
    let piece = |e: u16| load[usize::from(e)] / f64::from(counts[usize::from(e)]);
    order.sort_by(|a, b| piece(*b).total_cmp(&piece(*a)));
    let mut held: Vec<Vec<u16>> = devices.iter().map(|d| Vec::with_capacity(d.slots as usize)).collect();
    let mut level = vec![0.0; devices.len()];
    // An expert's first replica must find a slot: as many stay reserved as experts of the pack are still to come.
    let packs = order.iter().map(|e| usize::from(terms.pack_of(*e)) + 1).max().unwrap_or(1);
    let mut to_come = vec![0_usize; packs];
    order.iter().for_each(|e| to_come[usize::from(terms.pack_of(*e))] += 1);
    let mut free: usize = devices.iter().map(|d| d.slots as usize).sum();
    for e in order {
        let pack = usize::from(terms.pack_of(e));
        to_come[pack] -= 1;
        let p = piece(e);
        for replica in 0..counts[usize::from(e)] {
            if replica > 0 && free <= to_come[0] {
                break;
            }
            let fits = (0..devices.len())
                .filter(|g| terms.has_room(devices, *g, &held[*g], e) && (replica == 0 || !held[*g].contains(&e)));
            let after = |g: &usize| level[*g] + p * devices[*g].inverse_speed;
            let Some(g) = fits.min_by(|a, b| after(a).total_cmp(&after(b))) else { break };
            level[g] = after(&g);
            held[g].push(e);
            free -= usize::from(pack == 0);
        }
    }
    LayerPlacement { devices: held }
}
