//! How often a cache of experts hits: measured on a trace ([`lru_curve`]), or before anybody traced the workload.
//!
//! Measured: LRU has the inclusion property, so the depth at which a demanded expert lies in the stack of all experts by recency tells
//! for every cache size at once whether it hits (Mattson et al., Evaluation techniques for storage hierarchies, 1970). Demands are
//! atomic as in [`crate::engine`]: hits are judged before a step, and of the experts of one step the smallest number is the oldest.
//!
//! The prior is the LRU curve measured on two public traces, one cache per layer, one token at a time: DeepSeek-V2-Lite (lower,
//! the best estimate here) and gpt-oss-20b (higher, the optimistic end); uniform independent routing, where the hit rate is the
//! cached fraction, is the pessimistic end. Under wider batches the demanded set fills the layer and recency stops helping: the
//! curve falls towards the cached fraction in proportion. All three curves are concave and piecewise linear, so that the lower
//! bound can hold them in a linear program.

use crate::error::PlanError;

/// Which of the three curves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    /// Hit rate = cached fraction.
    Uniform,
    /// DeepSeek-V2-Lite, LRU.
    Expected,
    /// gpt-oss-20b, LRU.
    Optimistic,
}

/// (cached fraction of the layer's experts, hit rate), ascending.
const DEEPSEEK_V2_LITE: &[(f64, f64)] =
    &[(0.0, 0.0), (0.125, 0.326), (0.25, 0.517), (0.375, 0.648), (0.5, 0.753), (0.75, 0.909), (1.0, 1.0)];
const GPT_OSS_20B: &[(f64, f64)] =
    &[(0.0, 0.0), (0.125, 0.441), (0.25, 0.658), (0.375, 0.805), (0.5, 0.898), (0.75, 0.978), (1.0, 1.0)];
const UNIFORM: &[(f64, f64)] = &[(0.0, 0.0), (1.0, 1.0)];

impl Curve {
    const fn points(self) -> &'static [(f64, f64)] {
        match self {
            Self::Uniform => UNIFORM,
            Self::Expected => DEEPSEEK_V2_LITE,
            Self::Optimistic => GPT_OSS_20B,
        }
    }
}

/// Miss rate as a function of the cached fraction: the largest of some lines.
#[derive(Debug, Clone, PartialEq)]
pub struct MissCurve {
    /// (value at 0, slope).
    lines: Vec<(f64, f64)>,
}

impl MissCurve {
    /// `recency` is 1 when a step demands as few experts as one token does, 0 when it demands all of them.
    pub fn new(curve: Curve, recency: f64) -> Self {
        let w = recency.clamp(0.0, 1.0);
        let bent: Vec<(f64, f64)> = curve.points().iter().map(|(x, h0)| (*x, x + w * (h0 - x))).collect();
        Self::through(&bent)
    }

    /// From measured (cached fraction, hit rate): their concave hull with (0, 0) and (1, 1), so that the curve has the shape which bounds
    /// rely on. Where hit rates are not concave (fewer slots than a step demands) the hull is the more hopeful of the two.
    ///
    /// # Errors
    /// [`PlanError::BadTrace`] when a number is not from 0 to 1.
    pub fn measured(points: &[(f64, f64)]) -> Result<Self, PlanError> {
        if let Some(point) = points.iter().find(|(x, h)| !(0.0..=1.0).contains(x) || !(0.0..=1.0).contains(h)) {
            return Err(PlanError::BadTrace {
                field: "a point of a hit curve".into(),
                found: format!("{point:?}"),
                expected: "a cached fraction and a hit rate from 0 to 1".into(),
            });
        }
        let mut sorted = points.to_vec();
        sorted.extend([(0.0, 0.0), (1.0, 1.0)]);
        sorted.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
        sorted.dedup_by_key(|p| p.0);
        let mut hull: Vec<(f64, f64)> = Vec::with_capacity(sorted.len());
        for p in sorted {
            // The last point goes while it lies on or below the line from the one before it to the new one.
            while let [.., a, b] = hull[..] {
                if (b.1 - a.1) * (p.0 - a.0) > (p.1 - a.1) * (b.0 - a.0) {
                    break;
                }
                hull.pop();
            }
            hull.push(p);
        }
        Ok(Self::through(&hull))
    }

    /// Lines through neighbouring points, ascending and concave.
    fn through(points: &[(f64, f64)]) -> Self {
        let line = |p: &[(f64, f64)]| {
            let slope = (p[1].1 - p[0].1) / (p[1].0 - p[0].0);
            (1.0 - (p[0].1 - slope * p[0].0), -slope)
        };
        Self { lines: points.windows(2).map(line).collect() }
    }

    /// Miss rate of a cache of `slots` for `cached` experts.
    pub fn miss_rate(&self, slots: u32, cached: u32) -> f64 {
        if slots >= cached {
            return 0.0;
        }
        let x = f64::from(slots) / f64::from(cached);
        self.lines.iter().map(|(at_zero, slope)| at_zero + slope * x).fold(0.0, f64::max)
    }

    /// The lines (value at 0, slope) whose maximum, with 0, the curve is.
    pub fn lines(&self) -> &[(f64, f64)] {
        &self.lines
    }
}

/// Hits of LRU caches of every size on one stream of steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LruCurve {
    /// Hits by number of slots, 0 to all experts that take part. `[members + 1]`
    pub hits: Vec<u64>,
    /// Experts demanded, of those that take part.
    pub requests: u64,
}

impl LruCurve {
    /// Share of the demanded experts that are in a cache of `slots`; 1 when none is demanded.
    pub fn hit_rate(&self, slots: usize) -> f64 {
        if self.requests == 0 { 1.0 } else { self.hits[slots.min(self.hits.len() - 1)] as f64 / self.requests as f64 }
    }

    /// The same over many streams, each with a cache of its own of the same size.
    #[must_use]
    pub fn pooled(curves: &[Self]) -> Self {
        let sizes = curves.iter().map(|c| c.hits.len()).max().unwrap_or(1);
        let sum = |slots: usize| curves.iter().map(|c| c.hits.get(slots).or(c.hits.last()).copied().unwrap_or(0)).sum();
        Self { hits: (0..sizes).map(sum).collect(), requests: curves.iter().map(|c| c.requests).sum() }
    }

    /// As the miss curve that plans are priced with. A cache that holds everything is taken to hit: first uses are paid once.
    ///
    /// # Panics
    /// Never: there are at most as many hits as requests.
    pub fn miss_curve(&self) -> MissCurve {
        let members = self.hits.len() - 1;
        let point = |slots: usize| (slots as f64 / members as f64, self.hit_rate(slots));
        MissCurve::measured(&(1..members).map(point).collect::<Vec<_>>()).expect("shares of at most 1")
    }
}

/// Hits of LRU on the steps of one layer (active experts, ascending), in the order of time, from an empty cache. With `members`, only
/// those experts take part: the others are pinned.
pub fn lru_curve(steps: &[Vec<u16>], num_experts: u32, members: Option<&[bool]>) -> LruCurve {
    let takes_part = |e: u16| members.is_none_or(|m| m[usize::from(e)]);
    let size = members.map_or(num_experts as usize, |m| m.iter().filter(|x| **x).count());
    // Depths of hits; the experts used so far, most recent first.
    let mut at_depth = vec![0_u64; size];
    let mut stack: Vec<u16> = Vec::with_capacity(size);
    let mut requests = 0;
    for step in steps {
        for e in step.iter().filter(|e| takes_part(**e)) {
            requests += 1;
            if let Some(depth) = stack.iter().position(|s| s == e) {
                at_depth[depth] += 1;
            }
        }
        for e in step.iter().filter(|e| takes_part(**e)) {
            let from = stack.iter().position(|s| s == e).unwrap_or_else(|| {
                stack.push(*e);
                stack.len() - 1
            });
            stack[..=from].rotate_right(1);
        }
    }
    let mut hits = vec![0];
    for n in at_depth {
        hits.push(hits[hits.len() - 1] + n);
    }
    LruCurve { hits, requests }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One cache of one size, as a list with the most recent last; the oracle.
    fn naive_hits(steps: &[Vec<u16>], slots: usize, members: &[bool]) -> u64 {
        let mut cache: Vec<u16> = Vec::new();
        let mut hits = 0;
        for step in steps {
            let wanted: Vec<u16> = step.iter().copied().filter(|e| members[usize::from(*e)]).collect();
            hits += wanted.iter().filter(|e| cache.contains(e)).count() as u64;
            cache.retain(|e| !wanted.contains(e));
            cache.extend(&wanted);
            cache.drain(..cache.len().saturating_sub(slots));
        }
        hits
    }

    proptest! {
        #[test]
        fn one_pass_equals_a_cache_of_each_size(
            steps in prop::collection::vec(prop::collection::btree_set(0_u16..12, 1..5), 0..60),
            members in prop::collection::vec(any::<bool>(), 12),
        ) {
            let steps: Vec<Vec<u16>> = steps.into_iter().map(|s| s.into_iter().collect()).collect();
            let size = members.iter().filter(|m| **m).count();
            let curve = lru_curve(&steps, 12, Some(&members));
            prop_assert_eq!(curve.hits.len(), size + 1);
            for slots in 0..=size {
                prop_assert_eq!(curve.hits[slots], naive_hits(&steps, slots, &members), "{} slots", slots);
            }
            prop_assert_eq!(lru_curve(&steps, 12, None), lru_curve(&steps, 12, Some(&[true; 12])));
        }

        #[test]
        fn measured_curves_are_concave_hulls(hits in prop::collection::vec(0.0_f64..1.0, 1..20)) {
            let n = hits.len() as u32 + 1;
            let points: Vec<(f64, f64)> = hits.iter().enumerate().map(|(i, h)| ((i + 1) as f64 / f64::from(n), *h)).collect();
            let curve = MissCurve::measured(&points).unwrap();
            let misses: Vec<f64> = (0..=n).map(|s| curve.miss_rate(s, n)).collect();
            prop_assert!((misses[0] - 1.0).abs() < 1e-12 && misses[n as usize] == 0.0);
            prop_assert!(misses.windows(2).all(|p| p[1] <= p[0] + 1e-12), "falling");
            prop_assert!(misses.windows(3).all(|p| p[0] + p[2] >= 2.0 * p[1] - 1e-12), "convex");
            // At most what was measured, and the least such curve: it touches every corner of the hull.
            for (i, h) in hits.iter().enumerate() {
                prop_assert!(misses[i + 1] <= 1.0 - h + 1e-12);
                let above = |j: usize, k: usize| {
                    let p = |i: usize| if i == 0 { (0.0, 0.0) } else if i == n as usize { (1.0, 1.0) } else { points[i - 1] };
                    let (x, (a, b)) = ((i + 1) as f64 / f64::from(n), (p(j), p(k)));
                    a.1 + (b.1 - a.1) * (x - a.0) / (b.0 - a.0)
                };
                let best = (0..=i).flat_map(|j| (i + 2..=n as usize).map(move |k| (j, k))).map(|(j, k)| above(j, k)).fold(*h, f64::max);
                prop_assert!((1.0 - misses[i + 1] - best).abs() < 1e-9, "hull {} against {best}", 1.0 - misses[i + 1]);
            }
        }
    }

    #[test]
    fn a_point_outside_is_refused() {
        for point in [(0.5, 1.5), (-0.1, 0.5), (0.5, f64::NAN)] {
            assert!(MissCurve::measured(&[point]).is_err());
        }
    }

    #[test]
    fn goes_through_the_measured_points_and_is_convex() {
        for curve in [Curve::Uniform, Curve::Expected, Curve::Optimistic] {
            let m = MissCurve::new(curve, 1.0);
            for (x, hit) in curve.points() {
                let slots = (x * 64.0).round() as u32;
                assert!((m.miss_rate(slots, 64) - (1.0 - hit)).abs() < 1e-9, "{curve:?} {x}");
            }
            let misses: Vec<f64> = (0..=64).map(|s| m.miss_rate(s, 64)).collect();
            assert!(misses.windows(2).all(|p| p[1] <= p[0] + 1e-12));
            assert!(misses.windows(3).all(|p| p[0] + p[2] >= 2.0 * p[1] - 1e-12));
        }
        assert!((MissCurve::new(Curve::Expected, 0.0).miss_rate(16, 64) - 0.75).abs() < 1e-12);
    }
}
