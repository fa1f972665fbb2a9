//! Tiers that load into the same slots over different links, taken for one: a relaxation with fewer tiers.
//!
//! On machines with several sockets or a CXL card the same slots are loaded over two or three links, and the search of
//! [`super::counts`] grows with every tier. How an expert got into its slot hardly matters, so the relaxation proves nearly as much.

use super::counts::{CountLayer, Point};
use crate::evaluate::slow_first;
use crate::price::{Copies, LayerPrice, TierPrice};

/// Tiers that load into the same slots over different links, taken for one: a relaxation.
///
/// The one tier's link is a new one, as fast as all of theirs together, and disturbs nobody but who shares something with all of them. Its load is the mean of theirs, weighted by
/// their speeds, so never more than the slowest of them; and as with dominated tiers the expectation over the one tier's events is at
/// most that over the several ones' (Jensen). It costs as much room as the cheapest of them.
pub(super) struct Merged {
    tiers: Vec<usize>,
    /// The one that stands for all.
    cheapest: usize,
    /// Per phase.
    prices: Vec<LayerPrice>,
}

/// `None` if the tiers are not alike enough.
fn merge(price: &LayerPrice, tiers: &[usize], num_links: usize) -> Option<LayerPrice> {
    let all = || tiers.iter().map(|t| &price.tiers[*t]);
    let first = all().next()?;
    if all().any(|t| t.processor != first.processor || t.copies != first.copies || t.copies == Copies::Never || t.copy_s <= 0.0) {
        return None;
    }
    let one = TierPrice {
        expert_s: all().map(|t| t.expert_s).fold(f64::INFINITY, f64::min),
        link: num_links,
        copy_s: 1.0 / all().map(|t| 1.0 / t.copy_s).sum::<f64>(),
        contends: None,
        compute_shares: [None; 2],
        // What all of them share, as the one that takes least of it.
        copy_shares: first.copy_shares.map(|s| {
            let (r, _) = s?;
            let of = |t: &TierPrice| t.shares(true).find(|(other, _)| *other == r).map(|(_, seconds)| seconds);
            all().map(of).collect::<Option<Vec<f64>>>().map(|seconds| (r, seconds.into_iter().fold(f64::INFINITY, f64::min)))
        }),
        ..first.clone()
    };
    let mut merged = price.clone();
    tiers.iter().for_each(|t| merged.tiers[*t] = one.clone());
    Some(merged)
}

impl Merged {
    /// The relaxed layer, and what its tiers may hold.
    pub(super) fn layer<'m>(&'m self, of: &CountLayer<'_>, hi: &[u32]) -> (CountLayer<'m>, Vec<u32>) {
        let layer = CountLayer {
            form: of.form.iter().zip(&self.prices).map(|((w, _), p)| (*w, p)).collect(),
            order: self.prices.iter().map(slow_first).collect(),
            num_experts: of.num_experts,
            num_links: of.num_links + 1,
            rooms: of.rooms.clone(),
            through: of.through.clone(),
        };
        let sum: u32 = self.tiers.iter().map(|t| hi[*t]).sum();
        let mut all = hi.to_vec();
        self.tiers.iter().for_each(|t| all[*t] = 0);
        all[self.cheapest] = sum.min(of.num_experts);
        (layer, all)
    }

    /// A point of the layer as one of the relaxed layer.
    pub(super) fn as_one(&self, point: &Point) -> Point {
        let mut one = point.clone();
        let sum = self.tiers.iter().map(|t| std::mem::take(&mut one.counts[*t])).sum();
        one.counts[self.cheapest] = sum;
        one
    }

    /// Points of the layer that a point of the relaxed layer stands for: all in one tier after the other as they hold them, and in
    /// equal parts.
    pub(super) fn spread(&self, point: &Point, hi: &[u32]) -> Vec<Point> {
        let fill = |first: usize, share: u32| {
            let mut spread = point.clone();
            let mut left = std::mem::take(&mut spread.counts[self.cheapest]);
            for most in [left.div_ceil(share), left] {
                for t in self.tiers.iter().cycle().skip(first).take(self.tiers.len()) {
                    let more = most.min(left).min(hi[*t] - spread.counts[*t]);
                    spread.counts[*t] += more;
                    left -= more;
                }
            }
            (left == 0).then_some(spread)
        };
        let n = self.tiers.len();
        (0..n).filter_map(|first| fill(first, 1)).chain(fill(0, n as u32)).collect()
    }
}

impl CountLayer<'_> {
    /// The tiers that load into `cache` as one, if there are several.
    pub(super) fn merged(&self, cache: Option<usize>, hi: &[u32], expert_price: &[f64]) -> Option<Merged> {
        let tiers: Vec<usize> = (0..hi.len()).filter(|t| hi[*t] > 0 && cache.is_some() && self.through[*t] == cache).collect();
        if tiers.len() < 2 || !self.judges_all(hi) {
            return None;
        }
        let cheapest =
            tiers.iter().copied().min_by(|a, b| self.price_of(*a, expert_price).total_cmp(&self.price_of(*b, expert_price)))?;
        let prices: Option<Vec<LayerPrice>> = self.form.iter().map(|(_, p)| merge(p, &tiers, self.num_links)).collect();
        Some(Merged { tiers, cheapest, prices: prices? })
    }

    /// What a point is worth with the tiers merged that load into `cache`, for tests; `None` where nothing is merged.
    #[cfg(test)]
    pub(super) fn relaxed_value(&self, point: &Point, cache: Option<usize>, expert_price: &[f64]) -> Option<f64> {
        let hi = vec![self.num_experts; self.rooms.len()];
        let open: Vec<u32> =
            (0..hi.len()).map(|t| if self.through[t].is_none() || self.through[t] == cache { hi[t] } else { 0 }).collect();
        let merged = self.merged(cache, &open, expert_price)?;
        let (relaxed, _) = merged.layer(self, &open);
        Some(relaxed.priced(&merged.as_one(point), expert_price))
    }
}
