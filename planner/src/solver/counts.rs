//! Layers whose experts are all alike: only how many are in each tier matters.
//!
//! Experts of a layer have equal bytes. When nothing is known about their popularity they have equal activity too, and a layer's
//! placement is a point of a lattice: counts per tier, and cache slots. [`CountLayer::cheapest`] finds the point with the least
//! time plus price of memory, with proof: branch and bound over boxes of the lattice. Bounds of a box rest on two facts: a layer's
//! time grows with every tier's count and falls with its slots, and it is at least the mean of any of its branches.

use super::mixes::Mix;
use crate::evaluate::{Event, JUDGED_EVENTS, LayerPlacement, Weights, computing, copying, slow_first, slowest_of};
use crate::price::{Copies, LayerPrice, TierPrice};
use crate::problem::Problem;
use std::collections::BinaryHeap;

/// Counts per tier and cache slots.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Point {
    /// Experts per tier. `[tiers]`
    pub counts: Vec<u32>,
    /// Cache slots.
    pub slots: u32,
}

impl Point {
    /// The counts of a placement.
    pub fn of(layer: &LayerPlacement, tiers: usize) -> Self {
        let mut counts = vec![0; tiers];
        for t in &layer.tier_of {
            counts[usize::from(*t)] += 1;
        }
        Self { counts, slots: layer.slots }
    }

    /// A placement with these counts: the first experts of `order` in the first tier, and so on.
    pub fn placement(&self, order: &[u32]) -> LayerPlacement {
        let mut tier_of = vec![0_u8; order.len()];
        let mut next = order.iter();
        for (t, n) in self.counts.iter().enumerate() {
            for e in next.by_ref().take(*n as usize) {
                tier_of[*e as usize] = t as u8;
            }
        }
        LayerPlacement { tier_of, slots: self.slots }
    }
}

/// One MoE layer as counts see it.
pub(super) struct CountLayer<'a> {
    /// (weight, prices) of each phase of the objective.
    pub(super) form: Vec<(f64, &'a LayerPrice)>,
    /// Order of the events of each phase, as the judge has it.
    pub(super) order: Vec<Vec<(usize, bool)>>,
    pub(super) num_experts: u32,
    pub(super) num_links: usize,
    /// What an expert in each tier takes room of. `[tiers]`
    pub(super) rooms: Vec<Vec<usize>>,
    /// Memory of each tier's slots. `[tiers]`
    pub(super) through: Vec<Option<usize>>,
}

/// When a search ends; its bound holds wherever that is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    /// When the best point is proven to be within this of the optimum, relatively.
    pub close: f64,
    /// After this many regions.
    pub max_regions: usize,
}

/// A point with its time.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub point: Point,
    pub seconds: f64,
}

/// Points with `lo <= counts <= hi` and `slots.0 <= slots <= slots.1`.
#[derive(Debug, Clone)]
struct Region {
    bound: f64,
    lo: Vec<u32>,
    hi: Vec<u32>,
    slots: (u32, u32),
}

impl PartialEq for Region {
    fn eq(&self, o: &Self) -> bool {
        self.bound == o.bound
    }
}
impl Eq for Region {}
impl PartialOrd for Region {
    fn partial_cmp(&self, o: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(o))
    }
}
impl Ord for Region {
    /// The least bound is the greatest: a heap hands out the most promising region first.
    fn cmp(&self, o: &Self) -> std::cmp::Ordering {
        o.bound.total_cmp(&self.bound)
    }
}

/// With more tiers than this (nodes of many GPUs) the search would take too long.
const MAX_TIERS: usize = 8;
/// Events of so many tiers: computing and copying.
const MAX_EVENTS: usize = 2 * MAX_TIERS;
/// Decoding and a prompt, and some more; copies of phases beyond are taken for free, with which bounds hold.
const MAX_PHASES: usize = 4;
/// With more than four tiers open a search looks at this many times fewer regions: each takes longer and tells less.
const MANY_TIERS: usize = 6;

impl<'a> CountLayer<'a> {
    /// Layer `index`, or `None` when its experts differ in activity.
    pub fn new(problem: &Problem<'_>, form: &Weights<'a>, index: usize) -> Option<Self> {
        let form: Vec<_> = form.iter().map(|(w, table)| (*w, table.layer(index))).collect();
        let alike = |p: &LayerPrice| p.scenarios.is_none() && p.active.windows(2).all(|a| a[0] == a[1]);
        if problem.tiers.len() > MAX_TIERS || !form.iter().all(|(_, p)| alike(p)) {
            return None;
        }
        let links = form.iter().flat_map(|(_, p)| &p.tiers).map(TierPrice::links_end).max().unwrap_or(0);
        Some(Self {
            order: form.iter().map(|(_, p)| slow_first(p)).collect(),
            form,
            num_experts: problem.layers[index].num_experts,
            num_links: links,
            rooms: problem.tiers.iter().map(|t| problem.rooms_of(t).collect()).collect(),
            through: problem.tiers.iter().map(|t| t.through.as_deref().map(|m| problem.memory_index(m))).collect(),
        })
    }

    /// The layers differ in nothing that depends on the placement; then the difference in seconds.
    pub fn differs_only_by(&self, other: &Self) -> Option<f64> {
        let same =
            |a: &LayerPrice, b: &LayerPrice| LayerPrice { fixed_s: 0.0, ..a.clone() } == LayerPrice { fixed_s: 0.0, ..b.clone() };
        let alike = self.num_experts == other.num_experts && self.form.iter().zip(&other.form).all(|(a, b)| same(a.1, b.1));
        let fixed = |c: &Self| c.form.iter().map(|(w, p)| w * p.fixed_s).sum::<f64>();
        alike.then(|| fixed(self) - fixed(other))
    }

    /// Weighted seconds with these counts; they may be fewer than the layer's experts. The judge's own arithmetic
    /// ([`crate::evaluate::expected_slowest`]) without its lists.
    pub fn seconds(&self, counts: &[u32], slots: u32) -> f64 {
        let mut events = [Event::default(); MAX_EVENTS];
        let mut total = 0.0;
        for ((weight, p), order) in self.form.iter().zip(&self.order) {
            let (active, ln_idle) = (p.active.first().copied().unwrap_or(0.0), p.ln_idle.first().copied().unwrap_or(0.0));
            let cached = (0..counts.len()).filter(|t| p.tiers[*t].copies == Copies::Misses).map(|t| counts[t]).sum();
            let miss_rate = p.misses.miss_rate(slots, cached);
            let mut n = 0;
            for (t, copy) in order.iter().filter(|(t, _)| counts[*t] > 0) {
                let (tier, count) = (&p.tiers[*t], f64::from(counts[*t]));
                let copied = if tier.copies == Copies::Misses { active * count * miss_rate } else { active * count };
                let event = match copy {
                    false => computing(tier, active * count, ln_idle * count, p.sync_s.len()),
                    true => copying(tier, copied, p.sync_s.len()),
                };
                if let Some(event) = event {
                    events[n] = event;
                    n += 1;
                }
            }
            total += weight * (p.fixed_s + slowest_of(&events[..n], &p.sync_s, p.sync_s.len() + self.num_links));
        }
        total
    }

    /// Experts that each memory holds, slots included. `[memories]`
    pub fn experts_in(&self, point: &Point, memories: usize) -> Vec<u32> {
        let mut experts = vec![0; memories];
        let mut slots = None;
        for (t, n) in point.counts.iter().enumerate() {
            self.rooms[t].iter().for_each(|room| experts[*room] += n);
            if *n > 0 {
                slots = slots.or(self.through[t]);
            }
        }
        if let Some(m) = slots {
            experts[m] += point.slots;
        }
        experts
    }

    /// Price of the room that an expert in tier `t` takes.
    pub(super) fn price_of(&self, t: usize, expert_price: &[f64]) -> f64 {
        self.rooms[t].iter().map(|room| expert_price[*room]).sum()
    }

    pub(super) fn priced(&self, point: &Point, expert_price: &[f64]) -> f64 {
        let held = self.experts_in(point, expert_price.len());
        self.seconds(&point.counts, point.slots) + held.iter().zip(expert_price).map(|(n, p)| f64::from(*n) * p).sum::<f64>()
    }

    /// The point with the least seconds plus `expert_price` per expert held in each memory, and a lower bound of that value.
    /// `start`, if given, is a good point to begin with; `max_held` is what a layer may hold at most, per memory; the search ends
    /// as `effort` says.
    pub fn cheapest(
        &self,
        expert_price: &[f64],
        max_held: &[u32],
        start: Option<&Point>,
        effort: Effort,
    ) -> (Option<Found>, f64) {
        let mut best: Option<(f64, Point)> = start.map(|p| (self.priced(p, expert_price), p.clone()));
        let mut proven = f64::INFINITY;
        let mut caches: Vec<Option<usize>> = vec![None];
        caches.extend(self.through.iter().filter(|t| t.is_some()));
        caches.dedup();
        let mut seen: Vec<Option<usize>> = Vec::new();
        for cache in caches {
            if !seen.contains(&cache) {
                seen.push(cache);
                proven = proven.min(self.search(cache, expert_price, max_held, effort, &mut best));
            }
        }
        let best = best.map(|(_, point)| Found { seconds: self.seconds(&point.counts, point.slots), point });
        (best, proven)
    }

    /// Searches the points whose slots, if any, are in memory `cache`; returns a lower bound over them.
    fn search(
        &self,
        cache: Option<usize>,
        expert_price: &[f64],
        max_held: &[u32],
        effort: Effort,
        best: &mut Option<(f64, Point)>,
    ) -> f64 {
        let e = self.num_experts;
        let held = |t: usize| self.rooms[t].iter().map(|room| max_held[*room]).fold(e, u32::min);
        let mut hi: Vec<u32> = (0..self.rooms.len())
            .map(|t| if self.through[t].is_none() || self.through[t] == cache { held(t) } else { 0 })
            .collect();
        self.leave_out_dominated(&mut hi, expert_price);
        let slots = cache.map_or((0, 0), |m| (1, e.min(max_held[m])));
        if cache.is_some() && slots.1 == 0 {
            return f64::INFINITY;
        }
        let Some(merged) = self.merged(cache, &hi, expert_price) else {
            return self.branch_and_bound(hi, slots, cache, expert_price, max_held, effort, best);
        };
        // The relaxation first: with fewer tiers it closes much sooner, and mostly it leaves nothing to look for.
        let (relaxed, relaxed_hi) = merged.layer(self, &hi);
        let mut relaxed_best = best.as_ref().map(|(_, p)| {
            let point = merged.as_one(p);
            (relaxed.priced(&point, expert_price), point)
        });
        let floor = relaxed.branch_and_bound(relaxed_hi, slots, cache, expert_price, max_held, effort, &mut relaxed_best);
        for point in relaxed_best.iter().flat_map(|(_, p)| merged.spread(p, &hi)) {
            self.try_point(point, cache, expert_price, max_held, best);
        }
        if best.as_ref().is_some_and(|(v, _)| floor >= v * (1.0 - effort.close)) {
            return floor;
        }
        floor.max(self.branch_and_bound(hi, slots, cache, expert_price, max_held, effort, best))
    }

    /// Searches the points up to `hi` per tier, with slots from `slots.0` to `slots.1`; returns a lower bound over them.
    #[allow(clippy::too_many_arguments, reason = "a box and what it is judged by")]
    fn branch_and_bound(
        &self,
        hi: Vec<u32>,
        slots: (u32, u32),
        cache: Option<usize>,
        expert_price: &[f64],
        max_held: &[u32],
        effort: Effort,
        best: &mut Option<(f64, Point)>,
    ) -> f64 {
        let few = hi.iter().filter(|n| **n > 0).count() <= 4;
        let max_regions = if few { effort.max_regions } else { effort.max_regions / MANY_TIERS };
        let mut mixes = self.mixes(cache, best.as_ref().map(|(_, p)| p));
        let target = |best: &Option<(f64, Point)>| best.as_ref().map_or(f64::INFINITY, |(v, _)| v * (1.0 - effort.close));
        let mut heap = BinaryHeap::new();
        let mut root = Region { bound: 0.0, lo: vec![0; hi.len()], hi, slots };
        if self.tighten(&mut root, cache) {
            root.bound = self.bound(&root, cache, expert_price, &mut mixes, target(best));
            heap.push(root);
        }
        let mut looked_at = 0;
        let mut floor = f64::INFINITY;
        while let Some(region) = heap.pop() {
            if region.bound >= target(best) || looked_at >= max_regions {
                // The heap is ordered: no other region is below this one.
                floor = floor.min(region.bound);
                break;
            }
            looked_at += 1;
            self.try_middle(&region, cache, expert_price, max_held, best);
            let Some(halves) = split(&region) else {
                // A single point: its bound is its value.
                floor = floor.min(region.bound);
                continue;
            };
            for mut half in halves {
                if self.tighten(&mut half, cache) {
                    half.bound = self.bound(&half, cache, expert_price, &mut mixes, target(best)).max(region.bound);
                    if half.bound >= target(best) {
                        floor = floor.min(half.bound);
                    } else {
                        heap.push(half);
                    }
                }
            }
        }
        floor
    }

    /// Whether the judge combines all events of these tiers. If it takes means for some, arguments by Jensen's inequality do not hold.
    pub(super) fn judges_all(&self, hi: &[u32]) -> bool {
        let events = |order: &Vec<(usize, bool)>| order.iter().filter(|(t, _)| hi[*t] > 0).count();
        self.order.iter().all(|o| events(o) <= JUDGED_EVENTS)
    }

    /// Closes tiers that another makes needless at these prices: the same processor computes there, no expert takes longer, is copied
    /// more slowly or costs more room, and all of them fit. Both tiers' loads are then better together: they keep that processor busy
    /// equally often, and a mean given that it is busy is at most the expectation over the two tiers apart (Jensen), whatever the other
    /// resources do.
    fn leave_out_dominated(&self, hi: &mut [u32], expert_price: &[f64]) {
        if !self.judges_all(hi) {
            return;
        }
        for a in 0..hi.len() {
            let better = |b: usize| {
                let as_good = self.form.iter().all(|(_, p)| no_slower(&p.tiers[b], &p.tiers[a]));
                let cheaper = self.price_of(b, expert_price) <= self.price_of(a, expert_price);
                hi[b] >= self.num_experts && self.through[a] == self.through[b] && as_good && cheaper
            };
            // Closed tiers dominate nothing, so of two that are alike one stays.
            if hi[a] > 0 && (0..hi.len()).any(|b| b != a && better(b)) {
                hi[a] = 0;
            }
        }
    }

    /// Narrows a region to what can hold all experts; false when nothing can.
    fn tighten(&self, r: &mut Region, cache: Option<usize>) -> bool {
        let (lo, hi): (u32, u32) = (r.lo.iter().sum(), r.hi.iter().sum());
        let e = self.num_experts;
        if lo > e || hi < e {
            return false;
        }
        for t in 0..r.lo.len() {
            let (l, h) = (r.lo[t], r.hi[t]);
            r.lo[t] = l.max(e.saturating_sub(hi - h));
            r.hi[t] = h.min(e - (lo - l));
        }
        if cache.is_some() {
            let cached: u32 = (0..r.hi.len()).filter(|t| self.through[*t].is_some()).map(|t| r.hi[t]).sum();
            r.slots.1 = r.slots.1.min(cached);
        }
        r.slots.0 <= r.slots.1
    }

    /// A value that no point of the region is below; not computed further once it reaches `enough`.
    fn bound(&self, r: &Region, cache: Option<usize>, expert_price: &[f64], mixes: &mut [Mix], enough: f64) -> f64 {
        let slot_price = cache.map_or(0.0, |m| expert_price[m]);
        let rest = self.num_experts - r.lo.iter().sum::<u32>();
        let mut bound: f64 = 0.0;
        // Means of branches, mixed: linear in the counts, so filled from the cheapest tier up.
        let cached = |v: &[u32]| (0..v.len()).filter(|t| self.through[*t].is_some()).map(|t| v[t]).sum::<u32>();
        let middle = f64::from(cached(&r.lo) + cached(&r.hi)) / 2.0;
        let x = (f64::from(r.slots.0 + r.slots.1) / 2.0 / middle.max(1.0)).min(1.0);
        let (mut costs, mut prices) = ([0.0; MAX_EVENTS], [0.0; MAX_TIERS]);
        let (costs, prices) = (&mut costs[..r.lo.len()], &mut prices[..r.lo.len()]);
        prices.iter_mut().enumerate().for_each(|(t, price)| *price = self.price_of(t, expert_price));
        // n m(s/n) is at least each of its tangent planes n (m - x m') + s m', taken in the middle of the region.
        let tangent = |p: &LayerPrice| {
            let lines = p.misses.lines().iter();
            let at = lines.max_by(|a, b| (a.0 + a.1 * x).total_cmp(&(b.0 + b.1 * x))).copied();
            at.filter(|(at_zero, slope)| at_zero + slope * x > 0.0).unwrap_or_default()
        };
        let mut tangents = [(0.0, 0.0); MAX_PHASES];
        tangents.iter_mut().zip(&self.form).for_each(|(t, (_, p))| *t = tangent(p));
        for i in 0..mixes.len() {
            let mix = &mixes[i];
            costs.copy_from_slice(&mix.per_expert);
            let mut per_slot = slot_price;
            for ((at_zero, slope), copy_s) in tangents.iter().zip(&mix.per_copy).filter(|(_, c)| **c > 0.0) {
                for (cost, _) in costs.iter_mut().zip(&self.through).filter(|(_, t)| t.is_some()) {
                    *cost += copy_s * at_zero;
                }
                per_slot += copy_s * slope;
            }
            let slots = if per_slot < 0.0 { r.slots.1 } else { r.slots.0 };
            let mut value = mix.constant + f64::from(slots) * per_slot;
            for (t, cost) in costs.iter_mut().enumerate() {
                *cost += prices[t];
                value += *cost * f64::from(r.lo[t]);
            }
            value += cheapest_fill(costs, r, rest);
            bound = bound.max(value);
            if bound >= enough {
                // What helped here will help its neighbours.
                mixes[..=i].rotate_right(1);
                return bound;
            }
        }
        // What is surely there, and the rest for nothing but its memory.
        let price = |t: usize| self.price_of(t, expert_price);
        let held: f64 = r.lo.iter().enumerate().map(|(t, n)| f64::from(*n) * price(t)).sum();
        let open = (0..r.lo.len()).filter(|t| r.hi[*t] > r.lo[*t]).map(price).fold(f64::INFINITY, f64::min);
        let open = if rest > 0 { f64::from(rest) * open } else { 0.0 };
        let surely = self.seconds(&r.lo, r.slots.1) + held + f64::from(r.slots.0) * slot_price;
        bound = bound.max(surely + open);
        // In wide boxes slopes are next to nothing.
        if bound >= enough || rest == 0 || rest > self.num_experts / 4 {
            return bound;
        }
        // The same, the rest for what every one of them adds at least.
        let mut more = [0.0; MAX_EVENTS];
        let more = &mut more[..r.lo.len()];
        let least_cached = cached(&r.lo).max(r.slots.0);
        if !super::slopes::add_slopes(&self.form, &self.order, (&r.lo, &r.hi), (r.slots.1, least_cached), self.num_links, more) {
            return bound;
        }
        for (t, slope) in more.iter_mut().enumerate() {
            *slope += price(t);
        }
        bound.max(surely + cheapest_fill(more, r, rest))
    }

    /// A point's time plus price, and the bound of a box around it, for tests. `lo`, `hi`: `[tiers]`
    #[cfg(test)]
    pub(super) fn value_and_bound(
        &self,
        point: &Point,
        (lo, hi): (&[u32], &[u32]),
        slots: (u32, u32),
        cache: Option<usize>,
        expert_price: &[f64],
    ) -> Option<(f64, f64)> {
        let mut r = Region { bound: 0.0, lo: lo.to_vec(), hi: hi.to_vec(), slots };
        let mut mixes = self.mixes(cache, None);
        self.tighten(&mut r, cache)
            .then(|| (self.priced(point, expert_price), self.bound(&r, cache, expert_price, &mut mixes, f64::INFINITY)))
    }

    /// Tries a point in the middle of the region.
    fn try_middle(
        &self,
        r: &Region,
        cache: Option<usize>,
        expert_price: &[f64],
        max_held: &[u32],
        best: &mut Option<(f64, Point)>,
    ) {
        let mut counts = r.lo.clone();
        let mut left = self.num_experts - counts.iter().sum::<u32>();
        let room: u32 = r.hi.iter().zip(&r.lo).map(|(h, l)| h - l).sum();
        for t in 0..counts.len() {
            let share = (u64::from(left) * u64::from(r.hi[t] - r.lo[t])).div_ceil(u64::from(room.max(1))) as u32;
            let more = share.min(r.hi[t] - counts[t]).min(self.num_experts - counts.iter().sum::<u32>());
            counts[t] += more;
        }
        left = self.num_experts - counts.iter().sum::<u32>();
        for (n, most) in counts.iter_mut().zip(&r.hi) {
            let more = (most - *n).min(left);
            *n += more;
            left -= more;
        }
        let cached: u32 = (0..counts.len()).filter(|t| self.through[*t].is_some()).map(|t| counts[t]).sum();
        if left > 0 {
            return;
        }
        let slots = if cached == 0 { 0 } else { ((r.slots.0 + r.slots.1) / 2).clamp(1, cached) };
        self.try_point(Point { counts, slots }, cache, expert_price, max_held, best);
    }

    /// Keeps a point if it fits and is the best so far.
    fn try_point(
        &self,
        point: Point,
        cache: Option<usize>,
        expert_price: &[f64],
        max_held: &[u32],
        best: &mut Option<(f64, Point)>,
    ) {
        let cached = (0..point.counts.len()).any(|t| self.through[t].is_some() && point.counts[t] > 0);
        let held = self.experts_in(&point, expert_price.len());
        if (cached && cache.is_none()) || held.iter().zip(max_held).any(|(n, max)| n > max) {
            return;
        }
        let value = self.priced(&point, expert_price);
        if best.as_ref().is_none_or(|(v, _)| value < *v) {
            *best = Some((value, point));
        }
    }
}

/// The least cost of `rest` more experts within the region; `costs` are per expert and used up. `[tiers]`
fn cheapest_fill(costs: &mut [f64], r: &Region, rest: u32) -> f64 {
    let (mut left, mut value) = (rest, 0.0);
    while left > 0 {
        let cheapest = (0..costs.len())
            .filter(|t| r.hi[*t] > r.lo[*t] && costs[*t].is_finite())
            .min_by(|a, b| costs[*a].total_cmp(&costs[*b]));
        let Some(t) = cheapest else { break };
        let more = (r.hi[t] - r.lo[t]).min(left);
        left -= more;
        value += costs[t] * f64::from(more);
        costs[t] = f64::INFINITY;
    }
    value
}

/// An expert in tier `a` takes no more of any resource than one in tier `b`, and no other resource.
fn no_slower(a: &TierPrice, b: &TierPrice) -> bool {
    let copies = a.copies == Copies::Never || (a.copies == b.copies && a.link == b.link && a.copy_s <= b.copy_s);
    let contends = match (a.contends, b.contends) {
        _ if a.copies == Copies::Never => true,
        (None, _) => true,
        (Some((p, s)), Some((q, t))) => p == q && s <= t,
        (Some(_), None) => false,
    };
    let shares = |copying| a.shares(copying).all(|(r, s)| b.shares(copying).any(|(other, most)| other == r && s <= most));
    let copy_shares = a.copies == Copies::Never || shares(true);
    a.processor == b.processor && a.expert_s <= b.expert_s && copies && contends && shares(false) && copy_shares
}

/// The two halves of a region along its longest side; `None` for a single point.
fn split(r: &Region) -> Option<[Region; 2]> {
    let width = |t: usize| r.hi[t] - r.lo[t];
    let longest = (0..r.lo.len()).max_by_key(|t| width(*t))?;
    let (mut low, mut high) = (r.clone(), r.clone());
    if width(longest) >= r.slots.1 - r.slots.0 {
        if width(longest) == 0 {
            return None;
        }
        let middle = r.lo[longest] + width(longest) / 2;
        low.hi[longest] = middle;
        high.lo[longest] = middle + 1;
    } else {
        let middle = r.slots.0 + (r.slots.1 - r.slots.0) / 2;
        low.slots.1 = middle;
        high.slots.0 = middle + 1;
    }
    Some([low, high])
}
