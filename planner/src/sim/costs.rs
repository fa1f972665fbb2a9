//! How long an action takes on the virtual clock.

use crate::check::CheckedPlan;
use crate::engine::{ExecutorId, ExpertKey, Location, TierId};
use crate::price::PriceTable;
use tierwise_cost::units::{Bytes, Nanos, Seconds};

/// Times of actions.
pub trait ActionCosts {
    /// Loading an expert from a tier into its slot.
    fn load(&self, key: ExpertKey, bytes: Bytes, from: TierId) -> Nanos;

    /// Computing a wave.
    fn compute(&self, layer: u32, experts: &[(u32, Location)], executor: ExecutorId) -> Nanos;

    /// Everything of a layer before its routed experts.
    fn before_experts(&self, layer: u32) -> Nanos;

    /// Everything of a step outside layers with routed experts.
    fn outside_layers(&self) -> Nanos;
}

/// Nothing takes time: only hits are counted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Free;

impl ActionCosts for Free {
    fn load(&self, _: ExpertKey, _: Bytes, _: TierId) -> Nanos {
        Nanos(0)
    }
    fn compute(&self, _: u32, _: &[(u32, Location)], _: ExecutorId) -> Nanos {
        Nanos(0)
    }
    fn before_experts(&self, _: u32) -> Nanos {
        Nanos(0)
    }
    fn outside_layers(&self) -> Nanos {
        Nanos(0)
    }
}

/// The prices of a plan's decode phase: the same numbers by which the plan was judged.
#[derive(Debug, Clone, Copy)]
pub struct PlanCosts<'a> {
    plan: &'a CheckedPlan,
    table: &'a PriceTable,
}

impl<'a> PlanCosts<'a> {
    /// Costs of `plan` under `table`, which must be made from the same problem.
    pub const fn new(plan: &'a CheckedPlan, table: &'a PriceTable) -> Self {
        Self { plan, table }
    }

    fn price(&self, layer: u32) -> &crate::price::LayerPrice {
        let index = self.plan.moe_layers().binary_search(&layer).expect("a layer with routed experts");
        self.table.layer(index)
    }
}

impl ActionCosts for PlanCosts<'_> {
    fn load(&self, key: ExpertKey, _: Bytes, from: TierId) -> Nanos {
        Seconds(self.price(key.layer).tiers[from.0 as usize].copy_s).to_nanos()
    }

    fn compute(&self, layer: u32, experts: &[(u32, Location)], executor: ExecutorId) -> Nanos {
        let price = self.price(layer);
        let tiers = experts.iter().map(|(e, _)| self.plan.tier_of(layer, *e));
        let work: f64 = tiers.map(|t| price.tiers[t.0 as usize].expert_s).sum();
        // A wave on another processor than the main one is a round trip.
        let first = experts.first().map(|(e, _)| self.plan.tier_of(layer, *e));
        let sync = if executor.0 == 0 { 0.0 } else { first.map_or(0.0, |t| price.sync_s[price.tiers[t.0 as usize].processor]) };
        Seconds(work + sync).to_nanos()
    }

    fn before_experts(&self, layer: u32) -> Nanos {
        Seconds(self.price(layer).fixed_s).to_nanos()
    }

    fn outside_layers(&self) -> Nanos {
        Seconds(self.table.other_s).to_nanos()
    }
}
