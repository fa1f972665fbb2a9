//! Why each expert is where it is: structured reasons, for tables and for people.

use crate::budget::{FREE, RESIDENT_EXPERTS};
use crate::held_out::{HeldOutLayer, Outcome};
use crate::plan::{MemoryBudget, Plan, Tier};
use serde::Serialize;
use std::ops::Range;
use tierwise_cost::units::Bytes;

/// Totals of one tier over the whole plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TierTotal {
    /// Index of the tier.
    pub tier: u32,
    /// What it is.
    pub place: Tier,
    /// Experts in it.
    pub experts: u32,
    /// Their bytes.
    pub bytes: Bytes,
    /// Layers that have any there.
    pub layers: u32,
    /// Cache slots of those layers, if its experts are loaded before use.
    pub slots: u32,
}

/// Why a group of experts is where it is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reason {
    /// First layer of the group.
    pub first_layer: u32,
    /// Last layer of the group.
    pub last_layer: u32,
    /// Layers in the group: those between first and last that have this very arrangement.
    pub num_layers: u32,
    /// Index of the tier.
    pub tier: u32,
    /// Experts per layer.
    pub experts: u32,
    /// Bytes of the whole group.
    pub bytes: Bytes,
    /// Slots per layer.
    pub slots: u32,
    /// The reason, one sentence.
    pub reason: String,
}

/// Totals per tier; tiers without experts included.
pub fn tier_table(plan: &Plan) -> Vec<TierTotal> {
    let mut table: Vec<TierTotal> = plan
        .tiers
        .iter()
        .enumerate()
        .map(|(t, place)| TierTotal { tier: t as u32, place: place.clone(), experts: 0, bytes: Bytes::ZERO, layers: 0, slots: 0 })
        .collect();
    for layer in &plan.layers {
        for total in &mut table {
            let here: u32 = layer.runs.iter().filter(|r| r.tier == total.tier).map(|r| r.count).sum();
            if here > 0 {
                total.experts += here;
                total.bytes += Bytes(layer.expert_bytes.0.saturating_mul(u64::from(here)));
                total.layers += 1;
                if total.place.through.is_some() {
                    total.slots += layer.slots;
                }
            }
        }
    }
    table
}

/// Experts per tier of a layer. `[tiers]`
fn arrangement(plan: &Plan, layer: usize) -> Vec<u32> {
    let l = &plan.layers[layer];
    (0..plan.tiers.len() as u32).map(|t| l.runs.iter().filter(|r| r.tier == t).map(|r| r.count).sum()).collect()
}

/// Reasons for a plan that was checked or just made: neighbouring layers with the same arrangement are one group.
pub fn explain(plan: &Plan) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let mut first = 0;
    while first < plan.layers.len() {
        let same =
            |i: &usize| arrangement(plan, *i) == arrangement(plan, first) && plan.layers[*i].slots == plan.layers[first].slots;
        let last = (first..plan.layers.len()).take_while(same).last().unwrap_or(first);
        for (t, experts) in arrangement(plan, first).into_iter().enumerate().filter(|(_, n)| *n > 0) {
            let bytes = plan.layers[first..=last].iter().map(|l| l.expert_bytes.0.saturating_mul(u64::from(experts))).sum();
            let all = arrangement(plan, first).iter().filter(|n| **n > 0).count() == 1;
            reasons.push(Reason {
                first_layer: plan.layers[first].layer,
                last_layer: plan.layers[last].layer,
                num_layers: (last - first + 1) as u32,
                tier: t as u32,
                experts,
                bytes: Bytes(bytes),
                slots: if plan.tiers[t].through.is_some() { plan.layers[first].slots } else { 0 },
                reason: reason(plan, t, experts, plan.layers[first].slots, all)
                    + &on_trace(plan, t, first..last + 1).unwrap_or_default(),
            });
        }
        first = last + 1;
    }
    reasons
}

fn budget<'p>(plan: &'p Plan, memory: &str) -> Option<&'p MemoryBudget> {
    plan.budgets.iter().find(|b| b.memory == memory)
}

/// What the held-out part of the trace said about these layers, for the tiers between which it chose.
fn on_trace(plan: &Plan, t: usize, layers: Range<usize>) -> Option<String> {
    let layers = plan.held_out.as_ref()?.layers.get(layers)?;
    let tier = &plan.tiers[t];
    let first = layers.first()?;
    if first.cached.is_none() || (tier.through.is_none() && tier.memory != plan.main.memory) {
        return None;
    }
    let mean_ms = |seconds: &dyn Fn(&HeldOutLayer) -> f64| layers.iter().map(seconds).sum::<f64>() / layers.len() as f64 * 1e3;
    let or_static = |o: Option<Outcome>, l: &HeldOutLayer| o.unwrap_or(l.fixed).seconds;
    Some(format!(
        "; {} on the held-out part of the trace, where a layer takes {:.3} ms static, {:.3} ms cached, {:.3} ms pinned + cached",
        first.chosen.name(),
        mean_ms(&|l| l.fixed.seconds),
        mean_ms(&|l| or_static(l.cached, l)),
        mean_ms(&|l| or_static(l.pinned_cached, l)),
    ))
}

fn reason(plan: &Plan, t: usize, experts: u32, slots: u32, whole_layer: bool) -> String {
    let tier = &plan.tiers[t];
    let room = |memory: &str| {
        budget(plan, memory).map_or_else(String::new, |b| {
            let experts = b.line(RESIDENT_EXPERTS);
            format!("{memory} holds {experts} of experts and has {} free", b.line(FREE))
        })
    };
    if let Some(through) = &tier.through {
        let rate = plan.predicted.hit_rate.map_or_else(String::new, |h| format!(", expected to hit {:.0} %", h.value * 100.0));
        return format!(
            "{slots} slots in {through} serve {experts} experts of {}{rate}; misses are loaded by {}",
            tier.memory, tier.executor
        );
    }
    if tier.memory == plan.main.memory {
        let whole = if whole_layer { "the whole layer fits: no round trip to another processor" } else { "as many as fit" };
        return format!("{whole}; {}", room(&tier.memory));
    }
    let left = if whole_layer { "no room beside the main processor for this layer" } else { "the rest of the layer" };
    format!(
        "{left} ({}); {} computes them where they lie, which costs less than copying them to {}",
        room(&plan.main.memory),
        tier.executor,
        plan.main.executor
    )
}
