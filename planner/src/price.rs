//! The prices that a placement is judged by: seconds per active expert and tier, per layer, phase and case.
//!
//! Made once per problem from the cost model, so that judging a placement is additions only. Layers with equal prices share one
//! entry (a class). A step is priced by its mean loads: expert e is active in a step of B tokens with probability
//! 1 - (1 - k q_e)^B, q_e being its share of the selections.

use crate::hits::{Curve, MissCurve};
use crate::plan::Tier;
use crate::problem::Problem;
use crate::request::Popularity;
use tierwise_cost::cost::{CostModel, Estimate, LayerWork, Work, step_work};
use tierwise_cost::machine::{Link, Memory, MemoryKind, Processor};
use tierwise_cost::op::{Batch, lower};
use tierwise_cost::units::Bytes;

/// Best estimate, or an end of the interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    /// Best estimate.
    Expected,
    /// Everything as fast as it may be.
    Fast,
    /// Everything as slow as it may be.
    Slow,
}

impl Case {
    fn of(self, e: Estimate) -> f64 {
        match self {
            Self::Expected => e.seconds,
            Self::Fast => e.low,
            Self::Slow => e.high,
        }
    }

    const fn curve(self) -> Curve {
        match self {
            Self::Expected => Curve::Expected,
            Self::Fast => Curve::Optimistic,
            Self::Slow => Curve::Uniform,
        }
    }
}

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// One token per sequence.
    Decode,
    /// A chunk of a prompt, every expert computed by its tier's executor.
    PrefillInPlace,
    /// A chunk of a prompt, experts outside the main processor's memory copied to it.
    PrefillStreamed,
}

/// Which active experts of a tier are copied first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copies {
    /// None.
    Never,
    /// Those that are not in a slot.
    Misses,
    /// All.
    Always,
}

/// Prices of one tier in one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct TierPrice {
    /// Resource that computes: index of a processor.
    pub processor: usize,
    /// Seconds per active expert.
    pub expert_s: f64,
    /// Resource that copies: index of a link.
    pub link: usize,
    /// Seconds per copied expert.
    pub copy_s: f64,
    /// What is copied.
    pub copies: Copies,
    /// Processor that computes from the memory the copies come from, and seconds of its reading that one copy takes from it.
    pub contends: Option<(usize, f64)>,
    /// What computing shares with others: a memory that is also copied from.
    pub compute_shares: Shares,
    /// What copying shares with others: the memory it reads, the way into a GPU.
    pub copy_shares: Shares,
}

/// Shared resources, by their place among the links, and seconds of each per expert.
pub type Shares = [Option<(usize, f64)>; 2];

impl TierPrice {
    /// What computing an expert, or copying it, takes of shared resources: (place among the links, seconds).
    pub fn shares(&self, copying: bool) -> impl Iterator<Item = (usize, f64)> + '_ {
        (if copying { &self.copy_shares } else { &self.compute_shares }).iter().flatten().copied()
    }

    /// How many links and shared resources there are at least.
    pub fn links_end(&self) -> usize {
        let shared = self.shares(false).chain(self.shares(true)).map(|(r, _)| r + 1).max().unwrap_or(0);
        shared.max(self.link + 1)
    }
}

/// Prices of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerPrice {
    /// Attention, norms, router, shared experts: on the main processor, before the routed experts.
    pub fixed_s: f64,
    /// Round trip per processor; 0 for the main one.
    pub sync_s: Vec<f64>,
    /// Per tier of the problem.
    pub tiers: Vec<TierPrice>,
    /// Probability that an expert is active in a step. `[num_experts]`
    pub active: Vec<f64>,
    /// ln(1 - active), kept finite: sums of it are the log-probability that none of a set is active. `[num_experts]`
    pub ln_idle: Vec<f64>,
    /// Miss rate of cache slots.
    pub misses: MissCurve,
    /// Sampled steps: the active experts of each, ascending; absent when only their probabilities are known.
    pub scenarios: Option<Vec<Vec<u16>>>,
    /// With sampled steps: which layer it is, for [`LayerPrice::chance`]; else 0.
    pub number: u32,
}

impl LayerPrice {
    /// A number between 0 and 1, fixed per layer, sampled step and expert: a cached expert misses where it is below the miss rate. So
    /// misses are sampled like steps are, and a bigger cache never misses where a smaller one hits.
    pub fn chance(&self, step: usize, expert: u16) -> f64 {
        // SplitMix64 (Steele, Lea, Flood 2014).
        let mut z = (u64::from(self.number) << 40 | (step as u64) << 16 | u64::from(expert)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// All prices of a phase and case.
#[derive(Debug, Clone, PartialEq)]
pub struct PriceTable {
    /// Distinct layer prices.
    pub classes: Vec<LayerPrice>,
    /// Class of each MoE layer of the problem.
    pub class_of: Vec<usize>,
    /// Seconds per step outside the MoE layers: dense layers, embedding, output.
    pub other_s: f64,
    /// Weighs the copies of one step against those of the prompt: tokens per step.
    pub tokens: u32,
    /// Bytes that a step reads besides routed experts, from the main processor's memory.
    pub main_bytes: Bytes,
    /// Links by resource index, as `from->to`; among them what several of them or of the processors share ([`TierPrice::shares`]).
    pub links: Vec<String>,
}

/// What lowering makes of a layer that has no lowering yet (models that can only be planned).
const LAUNCHES_PER_LAYER: u32 = 16;

impl PriceTable {
    /// The prices of `phase`, or `None` when the machine has no way to do it (streaming without a link).
    pub fn new(problem: &Problem<'_>, cost: &dyn CostModel, phase: Phase, case: Case) -> Option<Self> {
        let r = &problem.request;
        let batch = match phase {
            Phase::Decode => Batch { tokens: r.batch, past: r.decode_past(), sequences: r.batch, logits: r.batch },
            Phase::PrefillInPlace | Phase::PrefillStreamed => {
                let tokens = r.chunk_tokens.min(r.prompt_tokens);
                Batch::prefill(tokens, (r.prompt_tokens - tokens) / 2)
            }
        };
        let step = step_work(problem.spec, batch, r.kv_format);
        let launches = lower(problem.spec, batch).ok();
        let launches_of = |layer: Option<u32>| match &launches {
            Some(ops) => ops.iter().filter(|o| o.layer == layer).count() as u32,
            None => LAUNCHES_PER_LAYER,
        };
        let (main, home) = problem.main_place();
        let on_main = |w: Work, launches: u32| case.of(cost.compute(main, home, w, launches));
        let mut links = Vec::new();
        let mut table = Self {
            classes: Vec::new(),
            class_of: Vec::new(),
            other_s: on_main(step.outside, launches_of(None)),
            tokens: batch.tokens,
            main_bytes: step.outside.bytes() + step.layers.iter().map(|l| l.resident.bytes()).sum(),
            links: Vec::new(),
        };
        let mut moe = problem.layers.iter().enumerate().peekable();
        for (l, work) in step.layers.iter().enumerate() {
            let fixed_s = on_main(work.resident, launches_of(Some(l as u32)));
            let Some((index, layer)) = moe.next_if(|(_, m)| m.layer as usize == l) else {
                table.other_s += fixed_s;
                continue;
            };
            let tokens = if work.active_experts <= 0.0 { 0 } else { rows(batch, l, problem.spec.layers.len()) };
            let scenarios = problem.scenarios.as_ref().filter(|_| phase == Phase::Decode).map(|s| s.layers[index].clone());
            let active = match &scenarios {
                Some(steps) => frequencies(steps, layer.num_experts as usize),
                None => active(problem, index, tokens),
            };
            let demanded = active.iter().sum::<f64>() / active.len() as f64;
            let least = layer.mean_choices / f64::from(layer.num_experts);
            let recency = if least < 1.0 { 1.0 - (demanded - least) / (1.0 - least) } else { 0.0 };
            let price = LayerPrice {
                fixed_s,
                sync_s: problem
                    .machine
                    .processors
                    .iter()
                    .map(|p| if p.id == main.id { 0.0 } else { case.of(cost.sync(p)) })
                    .collect(),
                tiers: tier_prices(problem, cost, phase, case, work, layer.expert_bytes, &mut links)?,
                ln_idle: active.iter().map(|p| (1.0 - p.min(1.0 - 1e-12)).ln()).collect(),
                active,
                misses: match problem.miss_curves.as_ref().filter(|_| phase == Phase::Decode) {
                    Some(curves) => curves[index].clone(),
                    None => MissCurve::new(case.curve(), recency),
                },
                number: if scenarios.is_some() { layer.layer } else { 0 },
                scenarios,
            };
            let class = table.classes.iter().position(|c| *c == price).unwrap_or_else(|| {
                table.classes.push(price);
                table.classes.len() - 1
            });
            table.class_of.push(class);
        }
        table.links = links;
        Some(table)
    }

    /// The same prices without sampled steps: judged by the experts' frequencies alone, which is much faster.
    #[must_use]
    pub fn without_steps(&self) -> Self {
        let mut table = self.clone();
        for class in &mut table.classes {
            class.scenarios = None;
        }
        table
    }

    /// Prices of MoE layer `index` of the problem.
    pub fn layer(&self, index: usize) -> &LayerPrice {
        &self.classes[self.class_of[index]]
    }
}

/// Tokens that reach the experts of layer `l`: in the last layer only those whose logits are wanted.
fn rows(batch: Batch, l: usize, num_layers: usize) -> u32 {
    if l + 1 == num_layers { batch.logits } else { batch.tokens }
}

/// Probability of being active, per expert. `[num_experts]`
fn active(problem: &Problem<'_>, index: usize, tokens: u32) -> Vec<f64> {
    let layer = &problem.layers[index];
    let (e, k) = (layer.num_experts as usize, layer.mean_choices);
    let tokens = tokens.saturating_mul(layer.iterations);
    let in_step = |share: f64| {
        let once = (k * share).min(1.0);
        if tokens == 1 { once } else { 1.0 - (1.0 - once).powf(f64::from(tokens)) }
    };
    match &problem.request.popularity {
        Popularity::Uniform => vec![in_step(1.0 / e as f64); e],
        Popularity::Shares(shares) => shares[index].iter().map(|q| in_step(*q)).collect(),
    }
}

/// Share of the steps in which each expert is active. `[num_experts]`
fn frequencies(steps: &[Vec<u16>], num_experts: usize) -> Vec<f64> {
    let mut active = vec![0.0; num_experts];
    for expert in steps.iter().flatten() {
        active[usize::from(*expert)] += 1.0 / steps.len() as f64;
    }
    active
}

/// The same way from pageable memory; `None` when nobody said how fast that is.
fn pageable(mut route: Link) -> Option<Link> {
    route.bandwidth = route.pageable_bandwidth.clone()?;
    Some(route)
}

/// Who shares what in a phase: transfers that use one thing at once share its rate ([`tierwise_cost::machine::Machine::port`]).
struct Sharing<'a> {
    problem: &'a Problem<'a>,
    cost: &'a dyn CostModel,
    phase: Phase,
    case: Case,
}

impl Sharing<'_> {
    /// Where the copies of a tier go, if it has some.
    fn copied_to<'t>(&'t self, t: &'t Tier) -> Option<&'t str> {
        match self.phase {
            Phase::PrefillStreamed => Some(self.problem.main.memory.as_str()).filter(|home| *home != t.memory),
            Phase::Decode | Phase::PrefillInPlace => t.through.as_deref(),
        }
    }

    /// The memory of `t` is both copied from and computed from by a processor whose home it is not: then its name as a resource.
    fn shared_memory(&self, t: &Tier) -> Option<String> {
        self.problem.machine.guest_of(&t.memory)?;
        let mut users = self.problem.tiers.iter().filter(|o| o.memory == t.memory).map(|o| o.through.is_some());
        let first = users.next()?;
        // Streamed, nothing is computed there.
        (self.phase != Phase::PrefillStreamed && users.any(|copied| copied != first))
            .then(|| format!("all reads of {}", t.memory))
    }

    /// What one copy of a tier takes of what it shares: the memory it reads, the way into a GPU. Never more than it takes of its link.
    fn of_copy(&self, t: &Tier, route: &Link, bytes: Bytes, copy_s: f64) -> [Option<(String, f64)>; 2] {
        let (problem, machine) = (self.problem, self.problem.machine);
        let memory = self.shared_memory(t).and_then(|name| {
            let (guest, memory) = (machine.guest_of(&t.memory)?, machine.memory(&t.memory)?);
            let read = Work { weight_bytes: bytes, ..Work::default() };
            let read_s = self.case.of(self.cost.compute(guest, &machine.seen_from(guest, memory), read, 0));
            Some((name, read_s.min(copy_s)))
        });
        let others = problem.tiers.iter().any(|o| o.memory != t.memory && self.copied_to(o) == Some(route.to.as_str()));
        let port = machine.port(&route.to).filter(|_| others).map(|port| {
            let seconds = self.case.of(self.cost.transfer(port, bytes));
            (format!("all copies into {}", route.to), seconds.min(copy_s))
        });
        [memory, port]
    }
}

fn tier_prices(
    problem: &Problem<'_>,
    cost: &dyn CostModel,
    phase: Phase,
    case: Case,
    work: &LayerWork,
    expert_bytes: Bytes,
    links: &mut Vec<String>,
) -> Option<Vec<TierPrice>> {
    let (main, home) = problem.main_place();
    let mut index_of = |name: String| {
        links.iter().position(|l| *l == name).unwrap_or_else(|| {
            links.push(name);
            links.len() - 1
        })
    };
    let sharing = Sharing { problem, cost, phase, case };
    let mut price = |tier: &Tier, p: &Processor, from: &Memory, route: Option<Link>, copies: Copies| {
        let seen = problem.machine.seen_from(p, from);
        let processor = problem.machine.processors.iter().position(|o| o.id == p.id).expect("a processor of the machine");
        let expert_s = case.of(cost.compute(p, &seen, work.expert, 0));
        let read_s = || case.of(cost.compute(p, &seen, Work { weight_bytes: expert_bytes, ..Work::default() }, 0));
        let memory = sharing.shared_memory(tier).filter(|_| route.is_none());
        let compute_shares = [memory.map(|name| (index_of(name), read_s().min(expert_s))), None];
        let (link, copy_s, contends, copy_shares) = match route {
            None => (0, 0.0, None, [None; 2]),
            Some(route) => {
                // A route of two hops keeps its last link busy for as long as the slower hop takes.
                let last = problem.machine.links.iter().find(|l| l.to == route.to);
                let direct = problem.machine.link(&route.from, &route.to).or(last);
                let name = direct.map_or_else(String::new, |l| format!("{}->{}", l.from, l.to));
                let index = index_of(name);
                let copy_s = case.of(cost.transfer(&route, expert_bytes));
                // Copies and computing drink from the same memory: what one takes the other waits for (algorithms §1). A copy is never
                // slower through this than over its link.
                let source = problem.machine.memory(&route.from);
                let reader = problem.machine.processors.iter().position(|p| p.computes_from.first() == Some(&route.from));
                let contends = source.zip(reader).map(|(memory, reader)| {
                    let read = Work { weight_bytes: expert_bytes, ..Work::default() };
                    let read_s = case.of(cost.compute(&problem.machine.processors[reader], memory, read, 0));
                    (reader, read_s.min(copy_s))
                });
                let shares = sharing.of_copy(tier, &route, expert_bytes, copy_s);
                (index, copy_s, contends, shares.map(|s| s.map(|(name, seconds)| (index_of(name), seconds))))
            }
        };
        TierPrice { processor, expert_s, link, copy_s, copies, contends, compute_shares, copy_shares }
    };
    problem
        .tiers
        .iter()
        .map(|t| {
            let memory = problem.machine.memory(&t.memory).expect("tiers name memories of the machine");
            if phase == Phase::PrefillStreamed {
                if t.memory == home.id {
                    return Some(price(t, main, home, None, Copies::Never));
                }
                let route = problem.machine.route(&t.memory, &home.id)?;
                let from_host = matches!(t.kind, MemoryKind::Dram | MemoryKind::Cxl);
                let route = if from_host && problem.locking.staging_pageable { pageable(route)? } else { route };
                return Some(price(t, main, home, Some(route), Copies::Always));
            }
            let p = problem.executor(t);
            match &t.through {
                None => Some(price(t, p, memory, None, Copies::Never)),
                Some(through) => {
                    let route = problem.machine.route(&t.memory, through)?;
                    let pages = problem.locking.experts_pageable && matches!(t.kind, MemoryKind::Dram | MemoryKind::Cxl);
                    let slots = problem.machine.memory(through).expect("tiers name memories of the machine");
                    let to_gpu = slots.kind == MemoryKind::Vram;
                    let route = if pages && to_gpu { pageable(route)? } else { route };
                    Some(price(t, p, slots, Some(route), Copies::Misses))
                }
            }
        })
        .collect()
}
