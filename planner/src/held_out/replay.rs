//! What a layer's placement does on steps that really happened: hits and seconds, exactly.
//!
//! Steps come in the order of time; caches are LRU as the engine runs it (hits judged before a step, of the experts of one step the
//! smallest number the oldest). Every step is priced by its own active and copied experts, and the mean is taken over the steps.

use crate::evaluate::{LayerPlacement, Placement};
use crate::price::{Copies, LayerPrice, PriceTable};
use crate::scenario::Scenarios;
use std::collections::BTreeMap;

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
    let mut kinds: BTreeMap<Vec<u32>, u64> = BTreeMap::new();
    let mut kind = vec![0_u32; 2 * tiers];
    let mut recent: Vec<u16> = Vec::with_capacity(placement.tier_of.len());
    let cached = |e: u16| price.tiers[usize::from(placement.tier_of[usize::from(e)])].copies == Copies::Misses;
    for step in steps {
        kind.fill(0);
        for e in step {
            let t = usize::from(placement.tier_of[usize::from(*e)]);
            kind[t] += 1;
            if cached(*e) && !recent.contains(e) {
                kind[tiers + t] += 1;
            }
        }
        for e in step.iter().filter(|e| cached(**e)) {
            let from = recent.iter().position(|r| r == e).unwrap_or_else(|| {
                recent.push(*e);
                recent.len() - 1
            });
            recent[..=from].rotate_right(1);
        }
        recent.truncate(placement.slots as usize);
        match kinds.get_mut(kind.as_slice()) {
            Some(n) => *n += 1,
            None => {
                kinds.insert(kind.clone(), 1);
            }
        }
    }
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
        if copied[t] > 0 {
            time[processors + tier.link] += f64::from(copied[t]) * tier.copy_s;
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
