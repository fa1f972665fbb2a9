//! Loads that no demand waits for: what the plan preloads, experts of a prompt's next layer, misses that were computed at home, guesses.
//!
//! All of them yield to demands: they go over links that carry nothing demanded, into slots whose content is worth less.

use super::Engine;
use super::layer::Context;
use super::pool::Presence;
use super::prefetcher::Prefetcher;
use tierwise_cost::units::Nanos;

/// Steps over which the use of experts is averaged where it is weighed whether a miss is loaded afterwards.
pub(super) const FILL_STEPS: f32 = 16.0;

impl Engine {
    /// Fills the slots as the plan says.
    pub(super) fn begin(&mut self, now: Nanos) {
        for (index, expert) in std::mem::take(&mut self.preload) {
            let Self { layers, pools, pool_of, staging, costs, traffic, actions, statistics, .. } = self;
            let pool = &mut pools[pool_of[index]];
            if pool.presence(layers[index].key(expert)) == Presence::Absent && pool.would_evict() == Some(None) {
                let mut cx = Context { now, pool, staging, costs: costs.as_deref(), traffic, out: actions, stats: statistics };
                layers[index].prefetch(expert, false, &mut cx);
                statistics.preloads += 1;
            }
        }
    }

    /// Sends for experts of a prompt's next layer, as soon as everything of the current one is on its way.
    pub(super) fn stream_ahead(&mut self, now: Nanos) {
        let Self { layers, pools, pool_of, staging, costs, traffic, streamer, actions, statistics, busy, .. } = self;
        let Some(streamer) = streamer else { return };
        let Some(index) = streamer.target() else { return };
        if busy.iter().any(|i| layers[*i].waits_for_slot()) {
            return;
        }
        let pool = &mut pools[pool_of[index]];
        let mut cx = Context { now, pool, staging, costs: costs.as_deref(), traffic, out: actions, stats: statistics };
        while let Some(expert) = streamer.first() {
            if !layers[index].stream_ahead(expert, &mut cx) {
                return;
            }
            streamer.done();
        }
    }

    /// Loads misses that were computed at home, newest first, on links that carry nothing.
    pub(super) fn fill(&mut self, now: Nanos) {
        let Self { layers, pools, pool_of, staging, costs, traffic, fills, actions, statistics, .. } = self;
        if traffic.links.iter().all(|(demanded, prefetched, _)| demanded + prefetched > 0) {
            return;
        }
        let mut at = fills.len();
        while at > 0 {
            at -= 1;
            let (index, expert) = fills[at];
            let layer = &layers[index];
            let (demanded, prefetched, _) = *traffic.of(layer.homes[expert as usize].tier);
            if demanded + prefetched > 0 {
                continue;
            }
            fills.remove(at);
            let (key, pool) = (layer.key(expert), &mut pools[pool_of[index]]);
            if pool.presence(key) != Presence::Absent {
                continue;
            }
            // Seconds saved while it stays, for as many steps as the rates look back, against what the copy takes from computing.
            let time = costs.as_ref().map(|c| &c.layers[index].tiers[layer.homes[expert as usize].tier.0 as usize]);
            let saved = |rate: f32| {
                let s = time.and_then(|t| t.at_home.as_ref()).map_or(0.0, |t| t.at(1).to_seconds().0);
                f64::from(rate * FILL_STEPS) * s
            };
            let price = time.map_or(0.0, |t| t.contended.to_seconds().0);
            let worth_it = match pool.would_evict() {
                None => false,
                Some(None) => true,
                Some(Some(victim)) => {
                    let of_victim = victim.checked_sub(layer.first_key).and_then(|e| self.rates[index].get(e as usize));
                    let rate = self.rates[index][expert as usize] - of_victim.copied().unwrap_or(0.0);
                    pool.cache.worth(key) > pool.cache.worth(victim) && saved(rate) > price
                }
            };
            if worth_it {
                let mut cx = Context { now, pool, staging, costs: costs.as_deref(), traffic, out: actions, stats: statistics };
                if layer.prefetch(expert, false, &mut cx) {
                    statistics.fills += 1;
                }
            }
        }
    }

    /// Issues what is worth it on links without demands.
    pub(super) fn prefetch(&mut self, now: Nanos) {
        let Self { layers, pools, pool_of, staging, costs, traffic, prefetcher, actions, statistics, .. } = self;
        let (Some(prefetcher), Some(costs)) = (prefetcher, costs) else { return };
        if traffic.links.iter().all(|(demanded, prefetched, _)| demanded + prefetched > 0) {
            return;
        }
        let elapsed_s = now.0.saturating_sub(prefetcher.last_demand().0) as f64 * 1e-9;
        // Who would have to go, by pool: the same for all guesses until one of them is issued.
        let mut victims: Vec<(usize, Option<Option<u32>>)> = Vec::new();
        loop {
            victims.clear();
            let best = prefetcher.next(|c, starts_in_s, chances| {
                let layer = &layers[c.index];
                let tier = layer.homes[c.expert as usize].tier;
                let (demanded, prefetched, _) = *traffic.of(tier);
                let pool = &pools[pool_of[c.index]];
                let copy_s = costs.layers[c.index].tiers[tier.0 as usize].copy.to_seconds().0;
                let in_time = elapsed_s + copy_s <= starts_in_s;
                if demanded + prefetched > 0 || !in_time || pool.presence(layer.key(c.expert)) != Presence::Absent {
                    return false;
                }
                let known = victims.iter().find(|v| v.0 == pool_of[c.index]).map(|v| v.1);
                let victim = known.unwrap_or_else(|| {
                    let victim = pool.would_evict();
                    victims.push((pool_of[c.index], victim));
                    victim
                });
                match victim {
                    None => false,
                    Some(victim) => {
                        let of_layer = |key: u32| key.checked_sub(layer.first_key).and_then(|e| chances.of(e));
                        Prefetcher::beats(c, victim.and_then(of_layer))
                    }
                }
            });
            let Some(c) = best else { return };
            let pool = &mut pools[pool_of[c.index]];
            let mut cx = Context { now, pool, staging, costs: Some(costs), traffic, out: actions, stats: statistics };
            if !layers[c.index].prefetch(c.expert, true, &mut cx) {
                return;
            }
        }
    }
}
