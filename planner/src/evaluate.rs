//! The judge: what a placement costs and whether it fits. Independent of every solver.
//!
//! Decode step = other + sum over MoE layers of [fixed + E max(GPU branch, CPU branch, link branch)]; what several links or processors share
//! (the way into a GPU, cards that a CPU computes from) is a branch of its own, busy for the sum of their uses; a processor's branch is the
//! time of its active experts, plus what copies from its memory take from it, plus one round trip if it is not the main one and any
//! of its experts is active (algorithms §1). With sampled steps of a trace the expectation is their mean (sample average, §2), misses being
//! sampled too; without,
//! tiers and links are idle or take their mean time given that they are used, independently ([`expected_slowest`]). Either is at
//! least the maximum of the means, which is what lower bounds use.

use crate::error::PlanError;
use crate::price::{Case, Copies, LayerPrice, Phase, PriceTable, TierPrice};
use crate::problem::Problem;
use crate::request::{Goal, SloLimits};
use tierwise_cost::cost::CostModel;
use tierwise_cost::units::Bytes;

/// What a solver proposes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Per MoE layer of the problem.
    pub layers: Vec<LayerPlacement>,
}

/// One layer of a [`Placement`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlacement {
    /// Tier of each expert. `[num_experts]`
    pub tier_of: Vec<u8>,
    /// Cache slots.
    pub slots: u32,
}

/// Expected load of each tier in one layer and step.
#[derive(Debug, Clone, PartialEq)]
pub struct Loads {
    /// Experts per tier.
    pub count: Vec<u32>,
    /// Expected active experts per tier.
    pub mass: Vec<f64>,
    /// Expected copied experts per tier.
    pub copied: Vec<f64>,
    /// Sum of ln(1 - p) per tier: its exponential is the probability that none is active.
    idle: Vec<f64>,
}

impl Loads {
    /// Loads of `placement` under the activity that `price` states.
    pub fn new(price: &LayerPrice, placement: &LayerPlacement) -> Self {
        let n = price.tiers.len();
        let mut loads = Self { count: vec![0; n], mass: vec![0.0; n], copied: vec![0.0; n], idle: vec![0.0; n] };
        for ((tier, p), ln_idle) in placement.tier_of.iter().zip(&price.active).zip(&price.ln_idle) {
            let t = usize::from(*tier);
            loads.count[t] += 1;
            loads.mass[t] += p;
            loads.idle[t] += ln_idle;
        }
        let cached = (0..n).filter(|t| price.tiers[*t].copies == Copies::Misses).map(|t| loads.count[t]).sum();
        let miss_rate = price.misses.miss_rate(placement.slots, cached);
        loads.copy(price, miss_rate);
        loads
    }

    /// Loads of a layer whose experts are all alike, from their numbers per tier.
    pub fn of_counts(price: &LayerPrice, counts: &[u32], slots: u32) -> Self {
        let (p, ln_idle) = (price.active.first().copied().unwrap_or(0.0), price.ln_idle.first().copied().unwrap_or(0.0));
        let times = |x: f64| counts.iter().map(|n| f64::from(*n) * x).collect::<Vec<f64>>();
        let mut loads = Self { count: counts.to_vec(), mass: times(p), copied: vec![0.0; counts.len()], idle: times(ln_idle) };
        let cached = (0..counts.len()).filter(|t| price.tiers[*t].copies == Copies::Misses).map(|t| counts[t]).sum();
        loads.copy(price, price.misses.miss_rate(slots, cached));
        loads
    }

    fn copy(&mut self, price: &LayerPrice, miss_rate: f64) {
        for (t, tier) in price.tiers.iter().enumerate() {
            self.copied[t] = match tier.copies {
                Copies::Never => 0.0,
                Copies::Misses => self.mass[t] * miss_rate,
                Copies::Always => self.mass[t],
            };
        }
    }
}

/// Time of one layer's routed experts on one resource.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Branch {
    /// Expected seconds.
    pub seconds: f64,
    /// Probability that the resource is used at all in a step.
    pub used: f64,
}

/// Time of one layer's routed experts, per resource.
#[derive(Debug, Clone, Default)]
pub struct Branches {
    /// Per processor of the machine.
    pub processors: Vec<Branch>,
    /// Per link of the price table.
    pub links: Vec<Branch>,
}

impl Branches {
    /// Branches of one layer.
    pub fn new(price: &LayerPrice, loads: &Loads, num_links: usize) -> Self {
        let mut b = Self { processors: vec![Branch::default(); price.sync_s.len()], links: vec![Branch::default(); num_links] };
        let mut idle = vec![0.0; price.sync_s.len()];
        let mut contention = vec![0.0; price.sync_s.len()];
        // Logarithm of the probability that a link is idle.
        let mut idle_links = vec![0.0; num_links];
        for (t, tier) in price.tiers.iter().enumerate() {
            if loads.count[t] == 0 {
                continue;
            }
            b.processors[tier.processor].seconds += loads.mass[t] * tier.expert_s;
            idle[tier.processor] += loads.idle[t];
            for (r, seconds) in tier.shares(false) {
                b.links[r].seconds += loads.mass[t] * seconds;
                idle_links[r] += loads.idle[t];
            }
            if tier.copies != Copies::Never {
                b.links[tier.link].seconds += loads.copied[t] * tier.copy_s;
                // Copies come one by one and independently: Poisson.
                idle_links[tier.link] -= loads.copied[t];
                for (r, seconds) in tier.shares(true) {
                    b.links[r].seconds += loads.copied[t] * seconds;
                    idle_links[r] -= loads.copied[t];
                }
                if let Some((processor, seconds)) = tier.contends {
                    contention[processor] += loads.copied[t] * seconds;
                }
            }
        }
        for (((branch, sync), idle), contention) in b.processors.iter_mut().zip(&price.sync_s).zip(idle).zip(contention) {
            branch.used = 1.0 - f64::exp(idle);
            // While nothing is computed, copies disturb nobody.
            branch.seconds += (sync + contention) * branch.used;
        }
        for (branch, idle) in b.links.iter_mut().zip(idle_links) {
            branch.used = 1.0 - f64::exp(idle);
        }
        b
    }

    /// All branches.
    pub fn iter(&self) -> impl Iterator<Item = &Branch> {
        self.processors.iter().chain(&self.links)
    }
}

/// Something that a step either uses or not, and what it costs when used.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Event {
    /// Probability that it is used.
    pub used: f64,
    /// Resource: processors first, then links.
    pub on: usize,
    /// Seconds on it when used.
    pub seconds: f64,
    /// A processor that it slows down if that computes, and by how many seconds when used.
    pub slows: (usize, f64),
    /// What it shares with others: resources, and seconds on each when used.
    pub shares: [(usize, f64); 2],
}

/// A tier's shares for an event that takes `times` as long as one expert.
fn shared(tier: &TierPrice, copying: bool, processors: usize, times: f64) -> [(usize, f64); 2] {
    let mut shares = [(0, 0.0); 2];
    for (share, (r, seconds)) in shares.iter_mut().zip(tier.shares(copying)) {
        *share = (processors + r, seconds * times);
    }
    shares
}

/// More events than this are not combined; those of the fastest tiers count with their means.
pub(crate) const JUDGED_EVENTS: usize = 10;
/// As good as always.
const CERTAIN: f64 = 1.0 - 1e-9;
/// Resources up to which nothing is allocated.
const FEW: usize = 24;

/// Expected time of the slowest resource in one layer: over all combinations of tiers and links being used or not, independently of
/// each other, each taking its mean time given that it is used. Rarely used slow tiers thus cost what they cost when they are used;
/// the maximum of the means would hide them. The value grows with the load of every tier and falls with the cache's slots, and it is
/// at least the mean of any resource: bounds rely on both.
pub fn expected_slowest(price: &LayerPrice, loads: &Loads, num_links: usize) -> f64 {
    let mut events: Vec<Event> = Vec::with_capacity(2 * price.tiers.len());
    for (t, copy) in slow_first(price) {
        let tier = &price.tiers[t];
        let event = match copy {
            _ if loads.count[t] == 0 => continue,
            false => computing(tier, loads.mass[t], loads.idle[t], price.sync_s.len()),
            true => copying(tier, loads.copied[t], price.sync_s.len()),
        };
        events.extend(event);
    }
    slowest_of(&events, &price.sync_s, price.sync_s.len() + num_links)
}

/// The tiers' events (tier, whether it is the copying), slowest per expert first. Which events are combined must not depend on the
/// loads, or the value would jump.
pub(crate) fn slow_first(price: &LayerPrice) -> Vec<(usize, bool)> {
    let mut order: Vec<(usize, bool)> = (0..price.tiers.len()).flat_map(|t| [(t, false), (t, true)]).collect();
    let seconds = |(t, copy): &(usize, bool)| if *copy { price.tiers[*t].copy_s } else { price.tiers[*t].expert_s };
    order.sort_by(|a, b| seconds(b).total_cmp(&seconds(a)));
    order.retain(|(t, copy)| !copy || price.tiers[*t].copies != Copies::Never);
    order
}

/// Computing of a tier's experts: `mass` expected active ones, none with probability exp(`idle`).
pub(crate) fn computing(tier: &TierPrice, mass: f64, idle: f64, processors: usize) -> Option<Event> {
    let used = 1.0 - f64::exp(idle);
    (used > 0.0).then(|| Event {
        used,
        on: tier.processor,
        seconds: mass * tier.expert_s / used,
        slows: (0, 0.0),
        shares: shared(tier, false, processors, mass / used),
    })
}

/// Copying of a tier's experts, `copied` expected ones. Copies come one by one and independently: Poisson.
pub(crate) fn copying(tier: &TierPrice, copied: f64, processors: usize) -> Option<Event> {
    let used = 1.0 - f64::exp(-copied);
    (used > 0.0).then(|| {
        let when_used = copied / used;
        let slows = tier.contends.map_or((0, 0.0), |(p, s)| (p, s * when_used));
        let shares = shared(tier, true, processors, when_used);
        Event { used, on: processors + tier.link, seconds: when_used * tier.copy_s, slows, shares }
    })
}

/// Expected time of the slowest resource under `events`, in the order of [`slow_first`].
pub(crate) fn slowest_of(events: &[Event], sync_s: &[f64], resources: usize) -> f64 {
    let processors = sync_s.len();
    if resources > FEW {
        let mut buffers = vec![0.0; 2 * resources + 2 * processors];
        let mut busy = vec![false; 2 * processors];
        return combine(events, sync_s, resources, &mut buffers, &mut busy);
    }
    combine(events, sync_s, resources, &mut [0.0; 4 * FEW], &mut [false; 2 * FEW])
}

fn combine(events: &[Event], sync_s: &[f64], resources: usize, buffers: &mut [f64], busy: &mut [bool]) -> f64 {
    let processors = sync_s.len();
    let (base, rest) = buffers.split_at_mut(resources);
    let (time, rest) = rest.split_at_mut(resources);
    let (base_slowed, rest) = rest.split_at_mut(processors);
    let slowed = &mut rest[..processors];
    let (base_busy, busy) = busy.split_at_mut(processors);
    let busy = &mut busy[..processors];
    let shares = events.iter().any(|e| e.shares[0].1 > 0.0 || e.shares[1].1 > 0.0);
    let mut open = [Event::default(); JUDGED_EVENTS];
    let mut num_open = 0;
    for (i, e) in events.iter().enumerate() {
        if i < JUDGED_EVENTS && e.used < CERTAIN {
            open[num_open] = *e;
            num_open += 1;
            continue;
        }
        base[e.on] += e.seconds * e.used;
        e.shares.iter().for_each(|(r, seconds)| base[*r] += seconds * e.used);
        if e.on < processors {
            base_busy[e.on] = true;
        } else {
            base_slowed[e.slows.0] += e.slows.1 * e.used;
        }
    }
    let mut expected = 0.0;
    for state in 0..1_u32 << num_open {
        time.copy_from_slice(base);
        busy.copy_from_slice(base_busy);
        slowed.copy_from_slice(base_slowed);
        let mut probability = 1.0;
        for (i, e) in open[..num_open].iter().enumerate() {
            if state >> i & 1 == 0 {
                probability *= 1.0 - e.used;
                continue;
            }
            probability *= e.used;
            time[e.on] += e.seconds;
            if shares {
                e.shares.iter().for_each(|(r, seconds)| time[*r] += seconds);
            }
            if e.on < processors {
                busy[e.on] = true;
            } else {
                slowed[e.slows.0] += e.slows.1;
            }
        }
        let mut slowest = 0.0_f64;
        for p in 0..processors {
            if busy[p] {
                slowest = slowest.max(time[p] + sync_s[p] + slowed[p]);
            }
        }
        for link in &time[processors..] {
            slowest = slowest.max(*link);
        }
        expected += probability * slowest;
    }
    expected
}

/// Time of the slowest resource in sampled step number `index`, in which the experts of `step` are active and every processor and link
/// does exactly its work; `miss_rate` decides which cached experts are copied ([`LayerPrice::chance`]).
pub fn step_slowest(
    price: &LayerPrice,
    placement: &LayerPlacement,
    (index, step): (usize, &[u16]),
    miss_rate: f64,
    num_links: usize,
) -> f64 {
    let processors = price.sync_s.len();
    let mut time = vec![0.0; processors + num_links];
    let mut busy = vec![false; processors];
    let mut slowed = vec![0.0; processors];
    for expert in step {
        let tier = &price.tiers[usize::from(placement.tier_of[usize::from(*expert)])];
        time[tier.processor] += tier.expert_s;
        busy[tier.processor] = true;
        tier.shares(false).for_each(|(r, seconds)| time[processors + r] += seconds);
        let copied = match tier.copies {
            Copies::Never => false,
            Copies::Misses => price.chance(index, *expert) < miss_rate,
            Copies::Always => true,
        };
        if copied {
            time[processors + tier.link] += tier.copy_s;
            tier.shares(true).for_each(|(r, seconds)| time[processors + r] += seconds);
            if let Some((p, seconds)) = tier.contends {
                slowed[p] += seconds;
            }
        }
    }
    for p in (0..processors).filter(|p| busy[*p]) {
        time[p] += price.sync_s[p] + slowed[p];
    }
    time.into_iter().fold(0.0, f64::max)
}

/// Seconds of one MoE layer.
pub fn layer_seconds(table: &PriceTable, index: usize, placement: &LayerPlacement) -> f64 {
    let price = table.layer(index);
    let links = table.links.len();
    let Some(steps) = &price.scenarios else {
        return price.fixed_s + expected_slowest(price, &Loads::new(price, placement), links);
    };
    let is_cached = |t: &&u8| price.tiers[usize::from(**t)].copies == Copies::Misses;
    let cached = placement.tier_of.iter().filter(is_cached).count() as u32;
    let miss_rate = price.misses.miss_rate(placement.slots, cached);
    let all = steps.iter().enumerate().map(|(i, s)| step_slowest(price, placement, (i, s), miss_rate, links));
    price.fixed_s + all.sum::<f64>() / steps.len() as f64
}

/// Seconds of one step.
pub fn step_seconds(table: &PriceTable, placement: &Placement) -> f64 {
    table.other_s + placement.layers.iter().enumerate().map(|(i, l)| layer_seconds(table, i, l)).sum::<f64>()
}

/// The price tables of one case.
#[derive(Debug, Clone)]
pub struct Prices {
    /// One token per sequence.
    pub decode: PriceTable,
    /// A prompt chunk where the experts lie.
    pub in_place: PriceTable,
    /// A prompt chunk with experts copied to the main processor; absent when nothing is outside or no link leads there.
    pub streamed: Option<PriceTable>,
}

impl Prices {
    /// All prices of a case.
    ///
    /// # Panics
    /// Never: tiers were made only where a route exists, so decode and in-place prefill always have prices.
    pub fn new(problem: &Problem<'_>, cost: &dyn CostModel, case: Case) -> Self {
        let table = |phase| PriceTable::new(problem, cost, phase, case);
        Self {
            decode: table(Phase::Decode).expect("every tier has a route"),
            in_place: table(Phase::PrefillInPlace).expect("every tier has a route"),
            streamed: table(Phase::PrefillStreamed),
        }
    }

    /// Seconds of the request's prompt, and whether experts are streamed.
    pub fn prompt_seconds(&self, problem: &Problem<'_>, placement: &Placement) -> (f64, bool) {
        let chunks = self.chunks(problem);
        let in_place = step_seconds(&self.in_place, placement) * chunks;
        match self.streamed.as_ref().map(|t| step_seconds(t, placement) * chunks) {
            Some(streamed) if streamed < in_place => (streamed, true),
            _ => (in_place, false),
        }
    }

    /// The separable forms of the objective: weighted sums over layers. Whether prompts run in place or streamed is one choice for the
    /// whole plan, so there is a form for each; the objective is the least of the forms.
    pub fn forms(&self, problem: &Problem<'_>) -> Vec<Weights<'_>> {
        let Goal { decode, prompt } = problem.goal;
        let decode = (decode > 0.0).then_some((decode, &self.decode));
        if prompt <= 0.0 {
            return vec![decode.into_iter().collect()];
        }
        let chunks = self.chunks(problem);
        let prompts = std::iter::once(&self.in_place).chain(&self.streamed);
        prompts.map(|t| decode.into_iter().chain([(prompt * chunks, t)]).collect()).collect()
    }

    /// Chunks of the request's prompt.
    pub fn chunks(&self, problem: &Problem<'_>) -> f64 {
        f64::from(problem.request.prompt_tokens) / f64::from(self.in_place.tokens)
    }

    /// The objective, in seconds.
    pub fn objective(&self, problem: &Problem<'_>, placement: &Placement) -> f64 {
        let Goal { decode, prompt } = problem.goal;
        let step_s = if decode > 0.0 { step_seconds(&self.decode, placement) } else { 0.0 };
        let prompt_s = if prompt > 0.0 { self.prompt_seconds(problem, placement).0 } else { 0.0 };
        problem.goal.of(step_s, prompt_s)
    }

    /// The placement keeps the latencies that the request states.
    pub fn meets(&self, problem: &Problem<'_>, placement: &Placement) -> bool {
        let SloLimits { ttft, tpot } = problem.request.slo;
        tpot.is_none_or(|most| step_seconds(&self.decode, placement) <= most.0)
            && ttft.is_none_or(|most| self.prompt_seconds(problem, placement).0 <= most.0)
    }
}

/// A weighted sum of phases: (weight, prices).
pub type Weights<'p> = Vec<(f64, &'p PriceTable)>;

/// Bytes of experts and of slots in each memory of the machine, then page-locked if that is limited ([`Problem::room`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Experts whose place it is.
    pub resident: Vec<Bytes>,
    /// Cache slots.
    pub slots: Vec<Bytes>,
}

/// Checks a placement and sums its bytes.
///
/// # Errors
/// [`PlanError::BadPlan`] naming the layer or memory: a missing expert, an unknown tier, slots where nothing is cached or none where
/// something is, experts of one layer cached in two memories, a memory over its room.
pub fn usage(problem: &Problem<'_>, placement: &Placement) -> Result<Usage, PlanError> {
    let bad = |field: String, found: String, expected: String| Err(PlanError::BadPlan { field, found, expected });
    if placement.layers.len() != problem.layers.len() {
        return bad("layers".into(), placement.layers.len().to_string(), format!("{} MoE layers", problem.layers.len()));
    }
    let rooms = problem.room.len();
    let mut usage = Usage { resident: vec![Bytes::ZERO; rooms], slots: vec![Bytes::ZERO; rooms] };
    let home: Vec<Vec<usize>> = problem.tiers.iter().map(|t| problem.rooms_of(t).collect()).collect();
    for (layer, p) in problem.layers.iter().zip(&placement.layers) {
        let at = |what: &str| format!("layer {} {what}", layer.layer);
        if p.tier_of.len() != layer.num_experts as usize {
            return bad(at("experts"), p.tier_of.len().to_string(), layer.num_experts.to_string());
        }
        let mut cached = 0;
        let mut through: Option<&str> = None;
        for tier in &p.tier_of {
            let Some(t) = problem.tiers.get(usize::from(*tier)) else {
                return bad(at("tier"), tier.to_string(), format!("below {}", problem.tiers.len()));
            };
            for room in &home[usize::from(*tier)] {
                usage.resident[*room] += layer.expert_bytes;
            }
            if let Some(memory) = &t.through {
                cached += 1;
                if through.is_some_and(|other| other != memory) {
                    return bad(at("tiers"), "slots in two memories".into(), "slots in one memory".into());
                }
                through = Some(memory);
            }
        }
        match through {
            None if p.slots > 0 => return bad(at("slots"), p.slots.to_string(), "0: nothing is cached".into()),
            Some(_) if p.slots == 0 || p.slots > cached => {
                return bad(at("slots"), p.slots.to_string(), format!("1 to {cached}, the number of cached experts"));
            }
            None => {}
            Some(memory) => {
                usage.slots[problem.memory_index(memory)] += Bytes(layer.expert_bytes.0 * u64::from(p.slots));
            }
        }
    }
    let names = problem.machine.memories.iter().map(|m| m.id.as_str()).chain(["page-locked"]);
    for (m, name) in names.enumerate().take(rooms) {
        let used = usage.resident[m] + usage.slots[m];
        if used > problem.room[m] {
            return bad(format!("{name} experts and slots"), used.to_string(), format!("at most {}", problem.room[m]));
        }
    }
    Ok(usage)
}
