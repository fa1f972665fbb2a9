//! What one more expert in a tier adds to a layer's time at least, anywhere in a box of counts: slopes of a linear lower bound.
//!
//! The judge's time is an expectation over independent events: tier computing (used with probability u = 1 - exp(-l n), mean time k n) and
//! tier copying (the same with misses). Take one event on resource b, the others in a given state: M is the slowest other resource, A0 and
//! A1 what else b does while the event is not and is used (A1 with the round trip). The time is
//!
//! `max(M, A0) + max(u (M - max(M, A0)), u (A1 - max(M, A0)) + k n)`,
//!
//! whose derivative in n is, with d = max(M, A0) - A1, at least k where d <= 0; at least k - l exp(-l n) d where k n > u d > 0, and there
//! it grows with n; and never negative. It falls with d. So over a box it is least at the lower end of n, with the other resources' loads
//! at their upper ends and b's own at their lower ends; contention counts only where it makes the slope smaller. Misses are held at
//! the least rate in the box, which makes all times smaller. What an event takes of something shared makes other resources slower, always as
//! slow as it ever does; that this makes them wait longer when it is itself the slowest is not counted. From the box's lower corner every placement in it is reached by adding
//! experts one by one, each adding at least its slope. Unlike the time at the corner alone this is exact to second order in the box's
//! width, so that branch and bound closes with far fewer boxes.

use crate::evaluate::JUDGED_EVENTS;
use crate::price::{Copies, LayerPrice};

/// Something used or not, at both ends of a box.
#[derive(Clone, Copy, Default)]
struct Event {
    tier: usize,
    on: usize,
    /// Exponent of being idle, per expert.
    rate: f64,
    /// Mean seconds per expert.
    seconds: f64,
    /// Processor that is slowed down, and by how many mean seconds per expert.
    slows: (usize, f64),
    /// Shared resources, and mean seconds per expert.
    shares: [(usize, f64); 2],
}

impl Event {
    /// Probability of being used with `n` experts, and the factor by which means grow when used.
    fn used(&self, n: u32) -> (f64, f64) {
        let n = f64::from(n);
        let used = 1.0 - f64::exp(-self.rate * n);
        if used > 0.0 { (used, n / used) } else { (0.0, 0.0) }
    }
}

/// Adds the slopes of every tier to `slopes`, seconds per expert, for counts from `lo` to `hi`, at most `slots` and at least
/// `least_cached` experts with a cache. False when the judge takes means for some events, which this does not follow. `[tiers]`
pub(super) fn add_slopes(
    form: &[(f64, &LayerPrice)],
    order: &[Vec<(usize, bool)>],
    (lo, hi): (&[u32], &[u32]),
    (slots, least_cached): (u32, u32),
    num_links: usize,
    slopes: &mut [f64],
) -> bool {
    for ((weight, price), order) in form.iter().zip(order) {
        let mut events = [Event::default(); JUDGED_EVENTS];
        let mut n = 0;
        let (active, idle) = (price.active.first().copied().unwrap_or(0.0), -price.ln_idle.first().copied().unwrap_or(0.0));
        let miss_rate = price.misses.miss_rate(slots, least_cached);
        for (t, copies) in order.iter().filter(|(t, _)| hi[*t] > 0) {
            if n == JUDGED_EVENTS {
                return false;
            }
            let tier = &price.tiers[*t];
            let copied = if tier.copies == Copies::Misses { active * miss_rate } else { active };
            let mut shares = [(0, 0.0); 2];
            for (share, (r, s)) in shares.iter_mut().zip(tier.shares(*copies)) {
                *share = (price.sync_s.len() + r, s * if *copies { copied } else { active });
            }
            events[n] = if *copies {
                Event {
                    tier: *t,
                    on: price.sync_s.len() + tier.link,
                    rate: copied,
                    seconds: copied * tier.copy_s,
                    slows: tier.contends.map_or((0, 0.0), |(p, s)| (p, copied * s)),
                    shares,
                }
            } else {
                let seconds = active * tier.expert_s;
                Event { tier: *t, on: tier.processor, rate: idle, seconds, slows: (0, 0.0), shares }
            };
            n += 1;
        }
        let events = &events[..n];
        for e in 0..n {
            let t = events[e].tier;
            if hi[t] > lo[t] {
                slopes[t] += weight * least_slope(events, e, lo, hi, &price.sync_s, num_links);
            }
        }
    }
    true
}

/// Most processors and links.
const MAX_RESOURCES: usize = 24;

/// The slope of event `target`, at least.
fn least_slope(events: &[Event], target: usize, lo: &[u32], hi: &[u32], sync_s: &[f64], num_links: usize) -> f64 {
    let (processors, it) = (sync_s.len(), &events[target]);
    if processors + num_links > MAX_RESOURCES || it.seconds <= 0.0 {
        return 0.0;
    }
    // (probability, seconds when used, slowing when used) of the others: what helps the target least.
    let mut others = [(0_usize, 0.0, 0.0, (0_usize, 0.0), [(0_usize, 0.0); 2]); JUDGED_EVENTS];
    let mut m = 0;
    let (mut always_slowed, mut always_shared) = ([0.0; MAX_RESOURCES], [0.0; MAX_RESOURCES]);
    for (i, e) in events.iter().enumerate() {
        let own = e.on == it.on;
        if own {
            // Shares the target's resource, or is the target: it slows others always, as much as it ever does.
            let (_, grow) = e.used(hi[e.tier]);
            always_slowed[e.slows.0] += e.slows.1 * grow;
            e.shares.iter().for_each(|(r, s)| always_shared[*r] += s * grow);
        }
        if i == target {
            continue;
        }
        let (used, grow) = e.used(if own { lo[e.tier] } else { hi[e.tier] });
        if used > 0.0 {
            let slows = if own { (0, 0.0) } else { (e.slows.0, e.slows.1 * grow) };
            let shares = if own { [(0, 0.0); 2] } else { e.shares.map(|(r, s)| (r, s * grow)) };
            others[m] = (e.on, used, e.seconds * grow, slows, shares);
            m += 1;
        }
    }
    let others = &others[..m];
    let n = f64::from(lo[it.tier]);
    let idle = f64::exp(-it.rate * n);
    let slope = |d: f64| {
        if d <= 0.0 {
            it.seconds
        } else if it.seconds * n < (1.0 - idle) * d {
            0.0
        } else {
            (it.seconds - it.rate * idle * d).max(0.0)
        }
    };
    let mut expected = 0.0;
    for state in 0..1_u32 << m {
        let (mut time, mut slowed, mut busy) = ([0.0; MAX_RESOURCES], always_slowed, [false; MAX_RESOURCES]);
        let mut shared = always_shared;
        let mut probability = 1.0;
        for (i, (on, used, seconds, slows, shares)) in others.iter().enumerate() {
            if state >> i & 1 == 0 {
                probability *= 1.0 - used;
            } else {
                probability *= used;
                time[*on] += seconds;
                busy[*on] = true;
                slowed[slows.0] += slows.1;
                shares.iter().for_each(|(r, s)| shared[*r] += s);
            }
        }
        if probability <= 0.0 {
            continue;
        }
        let mut slowest = 0.0_f64;
        for r in (0..processors + num_links).filter(|r| *r != it.on) {
            let extra = if r < processors { sync_s[r] + slowed[r] } else { 0.0 };
            if busy[r] {
                slowest = slowest.max(time[r] + extra);
            }
            // No event is on what is shared alone; nothing shared is a processor.
            slowest = slowest.max(shared[r]);
        }
        // What else the target's resource does, without contention.
        let sync = if it.on < processors { sync_s[it.on] } else { 0.0 };
        let with = time[it.on] + sync;
        let without = if busy[it.on] { with } else { 0.0 };
        expected += probability * slope(slowest.max(without) - with);
    }
    expected
}
