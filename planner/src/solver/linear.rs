//! The placement problem with the sizes of caches held fixed in proportion, as a convex program over experts and steps.
//!
//! x[layer, expert, tier] says where an expert is; every step of every layer waits for its slowest resource, whose time is linear in
//! x. Steps are the sampled steps of a trace (decode), or one step of mean activity (no trace, and prompts). The share of its cached
//! experts that a layer has slots for is given: so miss rates are known, and an expert in a cached tier takes its bytes there and
//! that share of them in the memory with the slots. Then everything is linear but the maximum and the round trips; those are paid
//! when any expert of a processor is active, here in proportion to how many are, which is never more.

use crate::evaluate::{LayerPlacement, Placement, Weights};
use crate::price::{Copies, LayerPrice};
use crate::problem::Problem;

/// An active expert of a step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Active {
    pub expert: u16,
    /// How many times it is computed: 1, or its probability.
    pub times: f64,
    /// How many times it is copied where it is cached or streamed.
    pub copies: f64,
}

/// One step of one layer.
#[derive(Debug, Clone)]
pub(super) struct Step {
    /// Its share of the objective.
    pub weight: f64,
    /// Which costs apply.
    pub phase: usize,
    /// Active experts.
    pub active: Vec<Active>,
    /// One over the number of active experts.
    pub share: f64,
}

/// Seconds on resource `on` per active expert in tier `tier`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cost {
    pub tier: usize,
    pub on: usize,
    pub seconds: f64,
    /// Per copy, not per computation.
    pub copying: bool,
}

impl Cost {
    /// Seconds for an active expert in this tier.
    pub fn of(&self, a: &Active) -> f64 {
        self.seconds * if self.copying { a.copies } else { a.times }
    }
}

/// Costs of a phase.
#[derive(Debug, Clone, Default)]
pub(super) struct Costs {
    /// Times per active expert.
    pub costs: Vec<Cost>,
    /// The same by tier. `[tiers]`
    pub by_tier: Vec<Vec<Cost>>,
    /// Processor of each tier. `[tiers]`
    pub processor: Vec<usize>,
    /// Round trip of each processor. `[processors]`
    pub sync_s: Vec<f64>,
}

/// One layer.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub num_experts: usize,
    /// Tiers that experts may be in.
    pub allowed: Vec<bool>,
    pub steps: Vec<Step>,
    /// `[phases]`
    pub phases: Vec<Costs>,
    /// For each expert: the steps in which it is active. `[experts]`
    pub steps_of: Vec<Vec<(u32, Active)>>,
    /// Seconds besides routed experts.
    pub fixed_s: f64,
    /// Slots per cached expert.
    pub slot_share: f64,
    /// Bytes that an expert in each tier takes, per memory. `[tiers]`
    pub uses: Vec<Vec<(usize, f64)>>,
}

/// The whole program.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    pub layers: Vec<Layer>,
    pub num_tiers: usize,
    /// Processors, then links.
    pub num_resources: usize,
    pub num_processors: usize,
    /// Bytes that experts and slots may take in each memory. `[memories]`
    pub room: Vec<f64>,
    /// Seconds besides layers with routed experts.
    pub other_s: f64,
}

impl Linear {
    /// The program around `placement`: what share of a layer's cached experts has slots is kept.
    /// `None` for machines with more tiers or resources than [`super::MAX_TIERS`] and [`super::MAX_RESOURCES`].
    pub fn new(problem: &Problem<'_>, form: &Weights<'_>, placement: &Placement) -> Option<Self> {
        let num_processors = problem.machine.processors.len();
        let num_links = form.iter().map(|(_, t)| t.links.len()).max().unwrap_or(0);
        if problem.tiers.len() > super::MAX_TIERS || num_processors + num_links > super::MAX_RESOURCES {
            return None;
        }
        let room: Vec<f64> = problem.room.iter().map(|b| b.0 as f64).collect();
        let mut layers = Vec::with_capacity(problem.layers.len());
        for (i, (layer, p)) in problem.layers.iter().zip(&placement.layers).enumerate() {
            let through = |t: usize| problem.tiers[t].through.as_deref();
            let cache = p.tier_of.iter().find_map(|t| through(usize::from(*t)));
            let cached = p.tier_of.iter().filter(|t| through(usize::from(**t)).is_some()).count() as u32;
            let bytes = layer.expert_bytes.0 as f64;
            let slot_share = f64::from(p.slots) / f64::from(cached.max(1));
            let uses: Vec<Vec<(usize, f64)>> = problem
                .tiers
                .iter()
                .map(|t| {
                    let slots = t.through.as_deref().map(|m| (problem.memory_index(m), slot_share * bytes));
                    problem.rooms_of(t).map(|room| (room, bytes)).chain(slots).collect()
                })
                .collect();
            let prices: Vec<(f64, &LayerPrice)> = form.iter().map(|(w, t)| (*w, t.layer(i))).collect();
            let steps: Vec<Step> =
                prices.iter().enumerate().flat_map(|(k, (w, price))| steps(price, k, *w, p.slots, cached)).collect();
            let mut steps_of = vec![Vec::new(); layer.num_experts as usize];
            for (s, step) in steps.iter().enumerate() {
                for active in &step.active {
                    steps_of[usize::from(active.expert)].push((s as u32, *active));
                }
            }
            layers.push(Layer {
                num_experts: layer.num_experts as usize,
                allowed: (0..problem.tiers.len())
                    .map(|t| through(t).is_none() || through(t) == cache)
                    .zip(&uses)
                    .map(|(allowed, uses)| allowed && uses.iter().all(|(m, b)| room[*m] >= *b))
                    .collect(),
                uses,
                phases: prices.iter().map(|(_, price)| costs(price, num_processors)).collect(),
                fixed_s: prices.iter().map(|(w, price)| w * price.fixed_s).sum(),
                steps,
                steps_of,
                slot_share,
            });
        }
        Some(Self {
            layers,
            num_tiers: problem.tiers.len(),
            num_resources: num_processors + num_links,
            num_processors,
            room,
            other_s: form.iter().map(|(w, t)| w * t.other_s).sum(),
        })
    }

    /// What does not depend on the placement, in seconds.
    pub fn constant_s(&self) -> f64 {
        self.other_s + self.layers.iter().map(|l| l.fixed_s).sum::<f64>()
    }

    /// The placement with these tiers. `[layers][experts]`
    pub fn placement(&self, problem: &Problem<'_>, tier_of: &[Vec<u8>]) -> Placement {
        let layers = self.layers.iter().zip(tier_of).map(|(layer, tiers)| {
            let cached = tiers.iter().filter(|t| problem.tiers[usize::from(**t)].through.is_some()).count() as u32;
            // Rounded down, so that slots fit; what is left over is given back by the caller.
            let slots = ((layer.slot_share * f64::from(cached)).floor() as u32).clamp(u32::from(cached > 0), cached);
            LayerPlacement { tier_of: tiers.clone(), slots }
        });
        Placement { layers: layers.collect() }
    }
}

fn steps(price: &LayerPrice, phase: usize, weight: f64, slots: u32, cached: u32) -> Vec<Step> {
    let step = |weight: f64, active: Vec<Active>| {
        let total: f64 = active.iter().map(|a| a.times).sum();
        Step { weight, phase, share: if total > 0.0 { 1.0 / total } else { 0.0 }, active }
    };
    let streamed = price.tiers.iter().any(|t| t.copies == Copies::Always);
    let miss_rate = if streamed { 1.0 } else { price.misses.miss_rate(slots, cached.max(1)) };
    match &price.scenarios {
        Some(list) => {
            let each = weight / list.len() as f64;
            let active = |s: usize, e: u16| {
                let copies = f64::from(u8::from(price.chance(s, e) < miss_rate));
                Active { expert: e, times: 1.0, copies }
            };
            list.iter().enumerate().map(|(s, l)| step(each, l.iter().map(|e| active(s, *e)).collect())).collect()
        }
        None => {
            let active = |(e, p): (usize, &f64)| Active { expert: e as u16, times: *p, copies: p * miss_rate };
            let mut mean = step(weight, price.active.iter().enumerate().map(active).collect());
            // A round trip is paid unless no expert is active: at least the chord of that probability.
            let all_busy = -price.ln_idle.iter().sum::<f64>();
            mean.share *= 1.0 - (-all_busy).exp();
            vec![mean]
        }
    }
}

fn costs(price: &LayerPrice, num_processors: usize) -> Costs {
    let mut costs = Costs { sync_s: price.sync_s.clone(), ..Costs::default() };
    for (t, tier) in price.tiers.iter().enumerate() {
        costs.costs.push(Cost { tier: t, on: tier.processor, seconds: tier.expert_s, copying: false });
        let shared = |(r, seconds): (usize, f64), copying| Cost { tier: t, on: num_processors + r, seconds, copying };
        costs.costs.extend(tier.shares(false).map(|s| shared(s, false)));
        if tier.copies != Copies::Never {
            costs.costs.push(Cost { tier: t, on: num_processors + tier.link, seconds: tier.copy_s, copying: true });
            costs.costs.extend(tier.shares(true).map(|s| shared(s, true)));
            if let Some((on, seconds)) = tier.contends {
                costs.costs.push(Cost { tier: t, on, seconds, copying: true });
            }
        }
        costs.processor.push(tier.processor);
        costs.by_tier.push(costs.costs.iter().filter(|c| c.tier == t).copied().collect());
    }
    costs
}
