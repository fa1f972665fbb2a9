//! What the engine knows about time: the numbers by which it schedules, and by which the simulator lets time pass.
//!
//! Whole nanoseconds, so that they can be written beside a recorded run and read back to the bit. Times of computing depend on the
//! number of tokens and are linear between the knots of a doubling grid; they come from the same cost model as the plan's prices.

use crate::check::CheckedPlan;
use crate::engine::TierId;
use crate::error::PlanError;
use serde::{Deserialize, Serialize};
use tierwise_cost::cost::{ByFormat, CostModel, Work, step_work};
use tierwise_cost::machine::{Link, Machine, Memory, MemoryKind, Processor};
use tierwise_cost::model::{Ffn, ModelSpec};
use tierwise_cost::op::{Batch, lower};
use tierwise_cost::units::{Bytes, Nanos, Seconds};

/// Time by number of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenTime(Vec<(u32, u64)>);

impl TokenTime {
    /// From knots, ascending by tokens.
    fn new(knots: &[u32], mut seconds: impl FnMut(u32) -> f64) -> Self {
        Self(knots.iter().map(|n| (*n, Seconds(seconds(*n)).to_nanos().0)).collect())
    }

    /// Whether the knots are as [`Self::at`] takes for granted.
    fn is_valid(&self) -> bool {
        self.0.first().is_some_and(|(n, _)| *n > 0) && self.0.is_sorted_by(|a, b| a.0 < b.0)
    }

    /// Time for `tokens`: linear between knots, in proportion beyond the last. 0 for none.
    pub fn at(&self, tokens: u32) -> Nanos {
        if tokens == 0 || self.0.is_empty() {
            return Nanos(0);
        }
        let i = self.0.partition_point(|(n, _)| *n < tokens);
        if i == 0 {
            return Nanos(self.0[0].1);
        }
        let (below, low) = self.0[i - 1];
        let Some((above, high)) = self.0.get(i).copied() else {
            return Nanos((u128::from(low) * u128::from(tokens) / u128::from(below)).min(u128::from(u64::MAX)) as u64);
        };
        let (span, part) = (u128::from(above - below), u128::from(tokens - below));
        Nanos(low.saturating_add((u128::from(high.saturating_sub(low)) * part / span) as u64))
    }
}

/// Times of an expert that is planned beside another processor and streamed to the main one for a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamTime {
    /// Computed by the main processor.
    pub compute: TokenTime,
    /// Copied to it.
    pub copy: Nanos,
    /// What one copy takes from the reading of the processor at home.
    pub contended: Nanos,
}

/// Times of the experts of one layer that are planned in one tier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierTime {
    /// One expert, computed by the tier's executor: where it lies, or from its slot.
    pub compute: TokenTime,
    /// One expert, computed beside the memory it is planned in, if a processor can.
    pub at_home: Option<TokenTime>,
    /// One expert, copied into a slot.
    pub copy: Nanos,
    /// What one copy takes from the reading of the processor at home.
    pub contended: Nanos,
    /// What one copy takes from reads of its memory by a processor whose home that is not: a CPU that computes from CXL memory. The
    /// simulator's; decisions go without.
    #[serde(default, skip_serializing_if = "is_none")]
    pub shared_reads: Nanos,
    /// What one copy takes of the way into a GPU that it shares with copies over other links. The simulator's.
    #[serde(default, skip_serializing_if = "is_none")]
    pub port: Nanos,
    /// One expert, streamed; absent where it is not: prompts are computed in place, or it is where the main processor computes anyway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub streamed: Option<StreamTime>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
const fn is_none(time: &Nanos) -> bool {
    time.0 == 0
}

impl TierTime {
    /// One expert, copied to where the main processor computes: into a slot, or streamed.
    pub fn copy(&self) -> Nanos {
        self.streamed.as_ref().map_or(self.copy, |s| s.copy)
    }

    /// What one copy takes from the reading of the processor at home.
    pub fn contended(&self) -> Nanos {
        self.streamed.as_ref().map_or(self.contended, |s| s.contended)
    }
}

/// Times of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerTime {
    /// Everything before the routed experts, by sequences that decode one token each.
    pub before_decode: TokenTime,
    /// The same by tokens of one prompt.
    pub before_prefill: TokenTime,
    /// By tier of the plan.
    pub tiers: Vec<TierTime>,
}

/// A physical link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkId {
    /// Memory it reads.
    pub from: String,
    /// Memory it writes.
    pub to: String,
}

/// All times of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineCosts {
    /// Layers with routed experts, in order.
    pub layers: Vec<LayerTime>,
    /// Everything of a step outside those layers, by sequences that decode.
    pub outside_decode: TokenTime,
    /// The same by tokens of one prompt.
    pub outside_prefill: TokenTime,
    /// Handing work to a processor that is not the main one, and its results back. `[executors of the plan]`
    pub sync: Vec<Nanos>,
    /// Distinct links that copies use.
    pub links: Vec<LinkId>,
    /// Index into `links`, by tier; `None` where nothing is copied.
    pub link_of_tier: Vec<Option<u32>>,
    /// Prompts are streamed: the plan says so and has the slots for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub streams: bool,
}

impl EngineCosts {
    /// The times of `plan` on `machine`, for which it must have been made.
    ///
    /// # Errors
    /// [`PlanError::BadPlan`] when the plan names a memory or processor that the machine lacks.
    pub fn new(plan: &CheckedPlan, spec: &ModelSpec, machine: &Machine, cost: &dyn CostModel) -> Result<Self, PlanError> {
        let maker = Maker { plan, spec, machine, cost };
        let most = plan.chunk_tokens().max(plan.batch()).clamp(1, 1 << 16);
        let knots: Vec<u32> = (0..=most.next_power_of_two().ilog2()).map(|i| 1 << i).collect();
        let mut links = Vec::new();
        let link_of_tier = plan.plan().tiers.iter().map(|t| maker.link(t, &mut links)).collect::<Result<Vec<_>, _>>()?;
        let past = plan.context() / 2;
        let decode = |n: u32| Batch { tokens: n, past, sequences: n, logits: n };
        let prefill = |n: u32| Batch::prefill(n, 0);
        let (outside_decode, before_decode) = maker.fixed(&knots, decode)?;
        let (outside_prefill, before_prefill) = maker.fixed(&knots, prefill)?;
        let mut layers = Vec::with_capacity(plan.moe_layers().len());
        for ((layer, before_decode), before_prefill) in plan.moe_layers().iter().zip(before_decode).zip(before_prefill) {
            let tiers = (0..plan.plan().tiers.len() as u32).map(|t| maker.tier(*layer, TierId(t), &knots));
            let tiers = tiers.collect::<Result<Vec<_>, _>>()?;
            layers.push(LayerTime { before_decode, before_prefill, tiers });
        }
        let sync = plan
            .executors()
            .iter()
            .enumerate()
            .map(|(i, e)| if i == 0 { Ok(Nanos(0)) } else { Ok(Seconds(cost.sync(maker.processor(&e.id)?).seconds).to_nanos()) })
            .collect::<Result<Vec<_>, PlanError>>()?;
        let streams = plan.streaming_slots() > 0;
        Ok(Self { layers, outside_decode, outside_prefill, sync, links, link_of_tier, streams })
    }

    /// Whether these are times of `plan`: they may come from a file.
    ///
    /// # Errors
    /// [`PlanError::BadPlan`] naming what is missing or too much.
    pub fn check(&self, plan: &CheckedPlan) -> Result<(), PlanError> {
        let tiers = plan.plan().tiers.len();
        let same = |field: &str, found: usize, expected: usize| {
            let bad = || PlanError::BadPlan {
                field: format!("costs: {field}"),
                found: found.to_string(),
                expected: format!("{expected}, as the plan has"),
            };
            if found == expected { Ok(()) } else { Err(bad()) }
        };
        same("layers", self.layers.len(), plan.moe_layers().len())?;
        same("executors", self.sync.len(), plan.executors().len())?;
        same("tiers", self.link_of_tier.len(), tiers)?;
        let bad = |field: &str, found: String, expected: &str| {
            Err(PlanError::BadPlan { field: format!("costs: {field}"), found, expected: expected.into() })
        };
        if let Some(link) = self.link_of_tier.iter().flatten().find(|l| **l as usize >= self.links.len()) {
            return bad("links", format!("number {link} of {}", self.links.len()), "a link that is listed");
        }
        let mut curves = vec![&self.outside_decode, &self.outside_prefill];
        for layer in &self.layers {
            same("tiers of a layer", layer.tiers.len(), tiers)?;
            curves.extend([&layer.before_decode, &layer.before_prefill]);
            for tier in &layer.tiers {
                curves.push(&tier.compute);
                curves.extend(&tier.at_home);
                curves.extend(tier.streamed.as_ref().map(|s| &s.compute));
            }
        }
        if let Some(curve) = curves.into_iter().find(|c| !c.is_valid()) {
            return bad("times", format!("{:?}", curve.0), "numbers of tokens from 1 on, ascending");
        }
        Ok(())
    }

    /// Time before the routed experts of the `index`-th layer that has some.
    pub fn before(&self, index: usize, tokens: u32, prefill: bool) -> Nanos {
        let layer = &self.layers[index];
        if prefill { layer.before_prefill.at(tokens) } else { layer.before_decode.at(tokens) }
    }

    /// Time of a step outside layers with routed experts.
    pub fn outside(&self, tokens: u32, prefill: bool) -> Nanos {
        if prefill { self.outside_prefill.at(tokens) } else { self.outside_decode.at(tokens) }
    }
}

/// What lowering makes of a layer that has no lowering yet (models that can only be planned).
const LAUNCHES_PER_LAYER: u32 = 16;

struct Maker<'a> {
    plan: &'a CheckedPlan,
    spec: &'a ModelSpec,
    machine: &'a Machine,
    cost: &'a dyn CostModel,
}

impl Maker<'_> {
    fn processor(&self, id: &str) -> Result<&Processor, PlanError> {
        self.machine.processor(id).ok_or_else(|| self.absent("processor", id))
    }

    fn memory(&self, id: &str) -> Result<&Memory, PlanError> {
        self.machine.memory(id).ok_or_else(|| self.absent("memory", id))
    }

    fn absent(&self, what: &str, id: &str) -> PlanError {
        PlanError::BadPlan { field: what.into(), found: id.into(), expected: format!("a {what} of {}", self.machine.name) }
    }

    /// The physical link of a tier: the last hop into the slots' memory.
    fn link(&self, tier: &crate::plan::Tier, links: &mut Vec<LinkId>) -> Result<Option<u32>, PlanError> {
        let route = match &tier.through {
            Some(through) => self.route(&tier.memory, through)?,
            None => match self.streaming_route(tier) {
                Some(route) => route,
                None => return Ok(None),
            },
        };
        let last = self.machine.links.iter().find(|l| l.to == route.to);
        let direct = self.machine.link(&route.from, &route.to).or(last).unwrap_or(&route);
        let id = LinkId { from: direct.from.clone(), to: direct.to.clone() };
        let known = links.iter().position(|l| *l == id).unwrap_or_else(|| {
            links.push(id);
            links.len() - 1
        });
        Ok(Some(known as u32))
    }

    /// The way on which experts of a tier are streamed, if they are: they wait in host memory beside another processor.
    fn streaming_route(&self, tier: &crate::plan::Tier) -> Option<Link> {
        let main = &self.plan.plan().main.memory;
        let waits = tier.through.is_none() && tier.memory != *main && matches!(tier.kind, MemoryKind::Dram | MemoryKind::Cxl);
        if waits && self.plan.streaming_slots() > 0 { self.machine.route(&tier.memory, main) } else { None }
    }

    /// Seconds of one copy, and what it takes from the processor at home.
    fn copy(&self, route: &Link, bytes: Bytes) -> (Nanos, Nanos) {
        let copy_s = self.cost.transfer(route, bytes).seconds;
        // Copies and computing drink from the same memory (algorithms §1). A copy is never slower through this than over its link.
        let source = self.machine.memory(&route.from);
        let reader = self.machine.processors.iter().find(|p| p.computes_from.first() == Some(&route.from));
        let contended_s = source.zip(reader).map_or(0.0, |(source, reader)| {
            let read = Work { weight_bytes: bytes, ..Work::default() };
            self.cost.compute(reader, source, read, 0).seconds.min(copy_s)
        });
        (Seconds(copy_s).to_nanos(), Seconds(contended_s).to_nanos())
    }

    fn route(&self, from: &str, to: &str) -> Result<Link, PlanError> {
        self.machine.route(from, to).ok_or_else(|| PlanError::BadPlan {
            field: format!("the tier in {from} through {to}"),
            found: "no link".into(),
            expected: format!("a way from {from} to {to} on {}", self.machine.name),
        })
    }

    /// The way that experts of a tier are copied on, if they are.
    fn route_of(&self, tier: &crate::plan::Tier) -> Result<Option<Link>, PlanError> {
        match &tier.through {
            Some(through) => self.route(&tier.memory, through).map(Some),
            None => Ok(self.streaming_route(tier)),
        }
    }

    /// What a copy takes of the way into a GPU, where there are several links to it; as plans price it.
    fn port(&self, route: &Link, bytes: Bytes) -> Nanos {
        let alone = self.cost.transfer(route, bytes).seconds;
        let seconds = self.machine.port(&route.to).map_or(0.0, |port| self.cost.transfer(port, bytes).seconds.min(alone));
        Seconds(seconds).to_nanos()
    }

    /// What a copy takes of a memory that is nobody's home and that a processor computes from.
    fn shared_reads(&self, route: &Link, bytes: Bytes) -> Nanos {
        let guest = self.machine.guest_of(&route.from).zip(self.machine.memory(&route.from));
        let seconds = guest.map_or(0.0, |(guest, memory)| {
            let read = Work { weight_bytes: bytes, ..Work::default() };
            let read_s = self.cost.compute(guest, &self.machine.seen_from(guest, memory), read, 0).seconds;
            read_s.min(self.cost.transfer(route, bytes).seconds)
        });
        Seconds(seconds).to_nanos()
    }

    /// Time outside, and before the routed experts of every layer that has some.
    fn fixed(&self, knots: &[u32], batch: impl Fn(u32) -> Batch) -> Result<(TokenTime, Vec<TokenTime>), PlanError> {
        let main = self.processor(&self.plan.plan().main.executor)?;
        let home = self.machine.home(main);
        let launches = lower(self.spec, batch(1)).ok();
        let launches_of = |layer: Option<u32>| match &launches {
            Some(ops) => ops.iter().filter(|o| o.layer == layer).count() as u32,
            None => LAUNCHES_PER_LAYER,
        };
        let per_layer: Vec<u32> = (0..self.spec.layers.len() as u32).map(|l| launches_of(Some(l))).collect();
        let outside_launches = launches_of(None);
        let seconds = |w: Work, launches: u32| self.cost.compute(main, home, w, launches).seconds;
        let mut outside = vec![0.0; knots.len()];
        let mut before = vec![vec![0.0; knots.len()]; self.plan.moe_layers().len()];
        for (i, n) in knots.iter().enumerate() {
            let step = step_work(self.spec, batch(*n), self.plan.kv_format());
            outside[i] = seconds(step.outside, outside_launches);
            for (l, work) in step.layers.iter().enumerate() {
                let time = seconds(work.resident, per_layer[l]);
                match self.plan.moe_layers().binary_search(&(l as u32)) {
                    Ok(index) => before[index][i] = time,
                    Err(_) => outside[i] += time,
                }
            }
        }
        let curve = |times: &[f64]| {
            let mut times = times.iter();
            TokenTime::new(knots, |_| *times.next().expect("one per knot"))
        };
        Ok((curve(&outside), before.iter().map(|b| curve(b)).collect()))
    }

    fn tier(&self, layer: u32, id: TierId, knots: &[u32]) -> Result<TierTime, PlanError> {
        let (tier, bytes) = (self.plan.tier(id), self.plan.expert_bytes(layer));
        let executor = self.processor(&tier.executor)?;
        let place = self.memory(tier.through.as_ref().unwrap_or(&tier.memory))?;
        let computed_by = |p: &Processor, from: &Memory| {
            let seen = self.machine.seen_from(p, from);
            TokenTime::new(knots, |n| self.cost.compute(p, &seen, self.expert_work(layer, n), 0).seconds)
        };
        let compute = computed_by(executor, place);
        let mut time = TierTime {
            compute,
            at_home: None,
            copy: Nanos(0),
            contended: Nanos(0),
            shared_reads: Nanos(0),
            port: Nanos(0),
            streamed: None,
        };
        if let Some(route) = self.route_of(tier)? {
            time.port = self.port(&route, bytes);
            time.shared_reads = self.shared_reads(&route, bytes);
        }
        if let Some(through) = &tier.through {
            (time.copy, time.contended) = self.copy(&self.route(&tier.memory, through)?, bytes);
            if let Some(home) = self.plan.home_executor(id) {
                time.at_home = Some(computed_by(self.processor(&self.plan.executor(home).id)?, self.memory(&tier.memory)?));
            }
        } else if let Some(route) = self.streaming_route(tier) {
            let main = self.processor(&self.plan.plan().main.executor)?;
            let (copy, contended) = self.copy(&route, bytes);
            time.streamed = Some(StreamTime { compute: computed_by(main, self.machine.home(main)), copy, contended });
        }
        Ok(time)
    }

    /// One routed expert of `layer` with `tokens`.
    fn expert_work(&self, layer: u32, tokens: u32) -> Work {
        let k = match &self.spec.layers[layer as usize].ffn {
            Ffn::Moe(moe) => moe.experts_per_token,
            Ffn::Dense(_) | Ffn::None => 1,
        };
        let matrices = self.spec.tensors.iter().filter(|t| t.layer == Some(layer) && t.role.is_routed_expert());
        let mut all = Work::default();
        for t in matrices {
            let bytes = t.bytes.0 / t.shape[0];
            let flops = 2.0 * f64::from(tokens) * (t.elements() / t.shape[0]) as f64;
            all += Work {
                weight_bytes: Bytes(bytes),
                flops,
                matrices: ByFormat::one(t.format, bytes as f64, flops),
                distinct: f64::from(k),
                ..Work::default()
            };
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_time_is_linear_between_knots() {
        let t = TokenTime::new(&[1, 2, 4], |n| f64::from(n * n) * 1e-9);
        assert_eq!([0, 1, 2, 3, 4, 8].map(|n| t.at(n).0), [0, 1, 4, 10, 16, 32]);
    }
}
