//! Mixes of branches: bounds of a layer's time that are linear in its counts.
//!
//! A layer waits for its slowest branch (processors and links). The mean of branches by any weights that sum to one is no slower, and it is
//! a sum over experts: what a search over boxes of counts can be bounded by.

use super::counts::{CountLayer, Point};
use crate::evaluate::{Branches, Loads};
use crate::price::{Copies, LayerPrice};

/// A weighted mean of branches: linear in the counts but for misses.
pub(super) struct Mix {
    /// Seconds whatever the counts are.
    pub constant: f64,
    /// Seconds per expert in each tier, without copies of misses. `[tiers]`
    pub per_expert: Vec<f64>,
    /// Seconds per expert that misses, at least. `[phases]`
    pub per_copy: Vec<f64>,
}

impl CountLayer<'_> {
    /// Mixes of branches, each summing to one per phase: every branch alone, pairs, and what balances the branches of a good point.
    /// The mean of a mix is at most the slowest branch's expected time.
    pub(super) fn mixes(&self, cache: Option<usize>, good: Option<&Point>) -> Vec<Mix> {
        let processors = self.form.first().map_or(0, |(_, p)| p.sync_s.len());
        let n = processors + self.num_links;
        let uses = |b: usize| {
            let tiers = self.form.iter().flat_map(|(_, p)| p.tiers.iter().enumerate());
            tiers.filter(|(t, _)| self.through[*t].is_none() || self.through[*t] == cache).any(|(_, t)| {
                let copies = t.copies != Copies::Never;
                let shares = t.shares(false).chain(t.shares(true).filter(|_| copies)).any(|(r, _)| processors + r == b);
                t.processor == b || shares || (copies && processors + t.link == b)
            })
        };
        let used: Vec<usize> = (0..n).filter(|b| uses(*b)).collect();
        let unit = |b: usize| (0..n).map(|i| f64::from(u8::from(i == b))).collect::<Vec<f64>>();
        let mut mixes = Vec::new();
        if let Some(point) = good {
            let mix = |p: &LayerPrice| {
                let b = Branches::new(p, &Loads::of_counts(p, &point.counts, point.slots), self.num_links);
                let all: Vec<f64> = b.iter().map(|b| b.seconds).collect();
                let sum: f64 = all.iter().sum();
                if sum > 0.0 { all.iter().map(|s| s / sum).collect() } else { unit(0) }
            };
            mixes.push(self.form.iter().map(|(_, p)| mix(p)).collect());
        }
        for (i, a) in used.iter().enumerate() {
            mixes.push(vec![unit(*a); self.form.len()]);
            for b in &used[i + 1..] {
                for share in [0.1, 0.25, 0.5, 0.75, 0.9] {
                    let mix: Vec<f64> = unit(*a).iter().zip(unit(*b)).map(|(x, y)| share * x + (1.0 - share) * y).collect();
                    mixes.push(vec![mix; self.form.len()]);
                }
            }
        }
        mixes.into_iter().map(|weights| self.mix(cache, &weights)).collect()
    }

    /// The mean time of a mix of branches. `weights`: `[phases][processors, links]`
    fn mix(&self, cache: Option<usize>, weights: &[Vec<f64>]) -> Mix {
        let mut mix = Mix { constant: 0.0, per_expert: vec![0.0; self.rooms.len()], per_copy: Vec::new() };
        for ((weight, p), w) in self.form.iter().zip(weights) {
            mix.constant += weight * p.fixed_s;
            let active = p.active.first().copied().unwrap_or(0.0);
            let ln_idle = p.ln_idle.first().copied().unwrap_or(0.0);
            // A round trip is paid with probability 1 - exp(n ln_idle): concave in n, so at least its chord.
            let all_busy = -p.ln_idle.iter().sum::<f64>();
            let chord = if all_busy > 0.0 { (1.0 - (-all_busy).exp()) / all_busy } else { 0.0 };
            let mut per_copy = f64::INFINITY;
            for (t, tier) in p.tiers.iter().enumerate() {
                let sync = p.sync_s[tier.processor] * chord * -ln_idle;
                let shared = |copying| tier.shares(copying).map(|(r, s)| w[p.sync_s.len() + r] * s).sum::<f64>();
                mix.per_expert[t] += weight * (w[tier.processor] * (active * tier.expert_s + sync) + active * shared(false));
                let copy_s = weight * active * (w[p.sync_s.len() + tier.link] * tier.copy_s + shared(true));
                match tier.copies {
                    Copies::Always => mix.per_expert[t] += copy_s,
                    Copies::Misses if self.through[t] == cache => per_copy = per_copy.min(copy_s),
                    Copies::Misses | Copies::Never => {}
                }
            }
            mix.per_copy.push(if per_copy.is_finite() { per_copy } else { 0.0 });
        }
        mix
    }
}
