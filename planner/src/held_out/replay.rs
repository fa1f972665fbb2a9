//! What a layer's placement does on steps that really happened: hits and seconds, exactly.
//!
//! Steps come in the order of time; caches are LRU as the engine runs it (hits judged before a step, of the experts of one step the
//! smallest number the oldest). Every step is priced by its own active and copied experts, and the mean is taken over the steps.

use crate::evaluate::{LayerPlacement, Placement};
use crate::price::{Copies, LayerPrice, PriceTable};
use crate::scenario::Scenarios;
use std::collections::HashMap;

/// What one layer did.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerReplay {
    /// Mean seconds per step, everything of the layer.
    pub seconds: f64,
    /// Experts demanded per tier. `[tiers]`
    pub active: Vec<u64>,
    /// Experts copied into slots per tier. `[tiers]`
    pub copied: Vec<u64>,
}

impl LayerReplay {
    /// Share of the demanded experts that were found in tiers of which `fast` is true, or in a slot. `[tiers]`
    pub fn hit_rate(&self, fast: &[bool], price: &LayerPrice) -> f64 {
        let found = (0..self.active.len()).map(|t| match price.tiers[t].copies {
            Copies::Misses => self.active[t] - self.copied[t],
            _ if fast[t] => self.active[t],
            _ => 0,
        });
        let requests: u64 = self.active.iter().sum();
        if requests == 0 { 1.0 } else { found.sum::<u64>() as f64 / requests as f64 }
    }
}

/// Replays the steps (active experts, ascending) of one layer, from an empty cache.
pub fn replay_layer(price: &LayerPrice, num_links: usize, placement: &LayerPlacement, steps: &[Vec<u16>]) -> LayerReplay {
    let tiers = price.tiers.len();
    // How many steps have these numbers of active and of copied experts per tier: they take the same time.
    let mut kinds: HashMap<Vec<u32>, u64> = HashMap::new();
    let mut kind = vec![0_u32; 2 * tiers];
    let (slots, experts) = (placement.slots as usize, placement.tier_of.len());
    // Latest first; and by expert.
    let mut recent: Vec<u16> = Vec::with_capacity(experts);
    let mut is_held = vec![false; experts];
    let cached: Vec<bool> = placement.tier_of.iter().map(|t| price.tiers[usize::from(*t)].copies == Copies::Misses).collect();
    for step in steps {
        kind.fill(0);
        for e in step.iter().map(|e| usize::from(*e)) {
            let t = usize::from(placement.tier_of[e]);
            kind[t] += 1;
            kind[tiers + t] += u32::from(cached[e] && !is_held[e]);
        }
        for e in step.iter().filter(|e| cached[usize::from(**e)]) {
            let from = if std::mem::replace(&mut is_held[usize::from(*e)], true) {
                recent.iter().position(|r| r == e).expect("who is held is in the list")
            } else {
                recent.push(*e);
                recent.len() - 1
            };
            recent[..=from].rotate_right(1);
        }
        recent.iter().skip(slots).for_each(|e| is_held[usize::from(*e)] = false);
        recent.truncate(slots);
        match kinds.get_mut(kind.as_slice()) {
            Some(n) => *n += 1,
            None => {
                kinds.insert(kind.clone(), 1);
            }
        }
    }
    // In a fixed order: sums are the same in every run.
    let mut kinds: Vec<(Vec<u32>, u64)> = kinds.into_iter().collect();
    kinds.sort_unstable();
    let mut replay = LayerReplay { seconds: 0.0, active: vec![0; tiers], copied: vec![0; tiers] };
    for (kind, n) in kinds {
        let (active, copied) = kind.split_at(tiers);
        for t in 0..tiers {
            replay.active[t] += n * u64::from(active[t]);
            replay.copied[t] += n * u64::from(copied[t]);
        }
        replay.seconds += slowest(price, num_links, active, copied) * (n as f64 / steps.len() as f64);
    }
    replay.seconds += price.fixed_s;
    replay
}

/// Time of the slowest processor or link when so many experts of each tier are active and copied. `[tiers]`
fn slowest(price: &LayerPrice, num_links: usize, active: &[u32], copied: &[u32]) -> f64 {
    let processors = price.sync_s.len();
    let mut time = vec![0.0; processors + num_links];
    let mut slowed = vec![0.0; processors];
    for (t, tier) in price.tiers.iter().enumerate() {
        time[tier.processor] += f64::from(active[t]) * tier.expert_s;
        tier.shares(false).for_each(|(r, seconds)| time[processors + r] += f64::from(active[t]) * seconds);
        if copied[t] > 0 {
            time[processors + tier.link] += f64::from(copied[t]) * tier.copy_s;
            tier.shares(true).for_each(|(r, seconds)| time[processors + r] += f64::from(copied[t]) * seconds);
            if let Some((p, seconds)) = tier.contends {
                slowed[p] += f64::from(copied[t]) * seconds;
            }
        }
    }
    // A round trip and what copies take from the memory: only where anything is computed.
    for p in 0..processors {
        if price.tiers.iter().zip(active).any(|(tier, n)| tier.processor == p && *n > 0) {
            time[p] += price.sync_s[p] + slowed[p];
        }
    }
    time.into_iter().fold(0.0, f64::max)
}

/// Mean seconds of a step of the whole model.
pub fn replay_seconds(table: &PriceTable, placement: &Placement, steps: &Scenarios) -> f64 {
    let layers = placement.layers.iter().zip(&steps.layers).enumerate();
    table.other_s + layers.map(|(i, (p, s))| replay_layer(table.layer(i), table.links.len(), p, s).seconds).sum::<f64>()
}
