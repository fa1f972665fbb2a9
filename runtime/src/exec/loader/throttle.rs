//! Slow memories, imitated: a bucket of tokens per memory, one token per byte, for hardware that is not there.
//!
//! Stands in for CXL memory or a slower drive where timing matters. The bytes are where they are and come as fast as they do, but an expert
//! counts as there only when its memory's bucket has paid for it: loads are held back, and computing an expert where it lies does not end
//! earlier. A bucket saves nothing up, so bytes never come faster than the rate, whatever was idle before; copies are paid for one after the
//! other, demanded ones first, as a link does it. What is no expert (attention, keys and values) is not slowed.

use super::Loaded;
use crate::error::{Result, RuntimeError};
use serde::Serialize;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tierwise_cost::units::BytesPerS;
use tierwise_planner::CheckedPlan;
use tierwise_planner::engine::{ExpertKey, Purpose, SlotId};

/// A memory to slow down.
#[derive(Debug, Clone, PartialEq)]
pub struct Throttle {
    /// The plan's name of it.
    pub memory: String,
    /// Bytes of experts that it gives at most.
    pub rate: BytesPerS,
}

/// A memory that is slowed down, and what it gave.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Throttled {
    /// The plan's name of it.
    pub memory: String,
    /// Bytes of experts that it gives at most.
    pub bytes_per_s: f64,
    /// Experts that the plan loads from it into slots.
    pub experts_loaded: u32,
    /// Experts that the plan computes where they lie in it.
    pub experts_in_place: u32,
    /// Bytes that its bucket has paid for since.
    pub paid_bytes: u64,
}

/// What asks for bytes, to be known again.
type Ticket = (ExpertKey, SlotId);

/// A copy that waits for its turn.
#[derive(Debug)]
struct Waiting {
    ticket: Ticket,
    bytes: u64,
    purpose: Purpose,
    since: Duration,
}

/// Tokens at a rate. Times are since any fixed moment and must not go back.
#[derive(Debug)]
struct Bucket {
    bytes_per_s: f64,
    /// All tokens that come until then are spent.
    spent_until: Duration,
    /// In the order asked.
    waiting: VecDeque<Waiting>,
    /// When those that had their turn are paid for.
    paid_at: Vec<(Ticket, Duration)>,
    paid: u64,
}

impl Bucket {
    /// An empty bucket. `bytes_per_s` is finite and above 0.
    const fn new(bytes_per_s: f64) -> Self {
        Self { bytes_per_s, spent_until: Duration::ZERO, waiting: VecDeque::new(), paid_at: Vec::new(), paid: 0 }
    }

    fn spend(&mut self, from: Duration, bytes: u64) -> Duration {
        let time = Duration::try_from_secs_f64(bytes as f64 / self.bytes_per_s).unwrap_or(Duration::MAX);
        self.paid += bytes;
        self.spent_until = from.saturating_add(time);
        self.spent_until
    }

    /// Gives the turn to those who have it by `now`.
    fn advance(&mut self, now: Duration) {
        while self.spent_until <= now {
            let Some(first) = self.waiting.iter().map(|w| w.since).min() else { return };
            let start = self.spent_until.max(first);
            let there = |w: &Waiting| w.since <= start;
            let demanded = self.waiting.iter().position(|w| there(w) && w.purpose == Purpose::Demand);
            let Some(next) = demanded.or_else(|| self.waiting.iter().position(there)) else { return };
            let Some(next) = self.waiting.remove(next) else { return };
            let end = self.spend(start, next.bytes);
            self.paid_at.push((next.ticket, end));
        }
    }

    fn ask(&mut self, now: Duration, ticket: Ticket, bytes: u64, purpose: Purpose) {
        self.advance(now);
        self.waiting.push_back(Waiting { ticket, bytes, purpose, since: now });
    }

    /// A guess is demanded from `now` on.
    fn promote(&mut self, now: Duration, key: ExpertKey) {
        self.advance(now);
        self.waiting.iter_mut().filter(|w| w.ticket.0 == key).for_each(|w| w.purpose = Purpose::Demand);
    }

    /// Pays for bytes that are read at once, before all that waits; when that is done.
    fn read(&mut self, now: Duration, bytes: u64) -> Duration {
        self.advance(now);
        self.spend(self.spent_until.max(now), bytes)
    }
}

/// Everything about time that a loader knows.
pub(super) struct Pace {
    began: Instant,
    memories: Vec<(Throttled, Bucket)>,
    /// `[layer][expert]` to one of the memories; empty for layers without throttled experts.
    memory_of: Vec<Vec<Option<usize>>>,
    /// Bytes of an expert. `[layers]`
    bytes_of: Vec<u64>,
    /// Loads that have come and are not paid for.
    held: Vec<(usize, Loaded)>,
}

impl Pace {
    /// The pace of `plan` with these memories slowed down.
    pub fn new(plan: &CheckedPlan, throttles: &[Throttle]) -> Result<Self> {
        let bad = |found: String, expected: String| Err(RuntimeError::BadRequest { what: "--throttle", found, expected });
        let layers = plan.moe_layers().iter().max().map_or(0, |l| *l as usize + 1);
        let mut pace = Self {
            began: Instant::now(),
            memories: Vec::new(),
            memory_of: vec![Vec::new(); layers],
            bytes_of: vec![0; layers],
            held: Vec::new(),
        };
        let main = &plan.plan().main.memory;
        for Throttle { memory, rate } in throttles {
            if !(rate.0.is_finite() && rate.0 >= 1.0) {
                return bad(
                    format!("{} bytes per second for {memory}", rate.0),
                    "at least 1 byte per second, such as 5 GB/s".into(),
                );
            }
            if memory == main {
                let expected = format!(
                    "another memory: in {main} is also what is no expert, which cannot be slowed down, so that times would mean nothing"
                );
                return bad(memory.clone(), expected);
            }
            if pace.memories.iter().any(|(known, _)| known.memory == *memory) {
                return bad(format!("{memory} twice"), "every memory once".into());
            }
            let throttled =
                Throttled { memory: memory.clone(), bytes_per_s: rate.0, experts_loaded: 0, experts_in_place: 0, paid_bytes: 0 };
            pace.memories.push((throttled, Bucket::new(rate.0)));
        }
        for layer in plan.moe_layers() {
            let experts = 0..plan.num_experts(*layer);
            let of = &mut pace.memory_of[*layer as usize];
            for tier in experts.map(|e| plan.tier(plan.tier_of(*layer, e))) {
                let at = pace.memories.iter().position(|(m, _)| m.memory == tier.memory);
                if let Some(at) = at {
                    let throttled = &mut pace.memories[at].0;
                    let count =
                        if tier.through.is_some() { &mut throttled.experts_loaded } else { &mut throttled.experts_in_place };
                    *count += 1;
                }
                of.push(at);
            }
            pace.bytes_of[*layer as usize] = plan.expert_bytes(*layer).0;
        }
        if let Some((unused, _)) = pace.memories.iter().find(|(m, _)| m.experts_loaded + m.experts_in_place == 0) {
            let mut used: Vec<&str> = plan.plan().tiers.iter().map(|t| t.memory.as_str()).filter(|m| m != main).collect();
            used.dedup();
            let used = if used.is_empty() { "this plan has all in one".to_string() } else { used.join(", ") };
            return bad(unused.memory.clone(), format!("a memory other than {main} that holds experts of the plan: {used}"));
        }
        Ok(pace)
    }

    /// The memories, and what they gave.
    pub fn throttled(&self) -> Vec<Throttled> {
        self.memories.iter().map(|(m, bucket)| Throttled { paid_bytes: bucket.paid, ..m.clone() }).collect()
    }

    fn memory_of(&self, key: ExpertKey) -> Option<usize> {
        self.memory_of.get(key.layer as usize)?.get(key.expert as usize).copied().flatten()
    }

    /// A load has been asked for.
    pub fn asked(&mut self, key: ExpertKey, slot: SlotId, purpose: Purpose) {
        if let Some(m) = self.memory_of(key) {
            let (now, bytes) = (self.began.elapsed(), self.bytes_of[key.layer as usize]);
            self.memories[m].1.ask(now, (key, slot), bytes, purpose);
        }
    }

    /// A guess is demanded.
    pub fn promote(&mut self, key: ExpertKey) {
        if let Some(m) = self.memory_of(key) {
            self.memories[m].1.promote(self.began.elapsed(), key);
        }
    }

    /// Experts of `layer` are going to be read where they lie; the earliest moment at which that may be done. `None`: not slowed down.
    pub fn read_in_place(&mut self, layer: u32, experts: impl Iterator<Item = u32>) -> Option<Instant> {
        let now = self.began.elapsed();
        let mut end = None;
        for expert in experts {
            if let Some(m) = self.memory_of(ExpertKey { layer, expert }) {
                let paid = self.memories[m].1.read(now, self.bytes_of[layer as usize]);
                end = end.max(Some(paid));
            }
        }
        end.and_then(|end| self.began.checked_add(end))
    }

    /// A load has come: what is not slowed down goes on at once, the rest waits.
    pub fn arrived(&mut self, loaded: Loaded) -> Option<Loaded> {
        let ticket = (loaded.key, loaded.slot);
        let asked = |b: &Bucket| b.waiting.iter().any(|w| w.ticket == ticket) || b.paid_at.iter().any(|(t, _)| *t == ticket);
        match self.memory_of(loaded.key) {
            Some(m) if asked(&self.memories[m].1) => {
                self.held.push((m, loaded));
                None
            }
            _ => Some(loaded),
        }
    }

    /// A load that has come and is paid for.
    pub fn ready(&mut self) -> Option<Loaded> {
        let now = self.began.elapsed();
        self.memories.iter_mut().for_each(|(_, bucket)| bucket.advance(now));
        for at in 0..self.held.len() {
            let (m, loaded) = &self.held[at];
            let (ticket, paid_at) = ((loaded.key, loaded.slot), &mut self.memories[*m].1.paid_at);
            if let Some(paid) = paid_at.iter().position(|(t, end)| *t == ticket && *end <= now) {
                paid_at.remove(paid);
                return Some(self.held.remove(at).1);
            }
        }
        None
    }

    /// How long until the next of those that have come may be ready; `None` when none waits.
    pub fn next(&self) -> Option<Duration> {
        let now = self.began.elapsed();
        let turn = |(m, loaded): &(usize, Loaded)| {
            let (bucket, ticket) = (&self.memories[*m].1, (loaded.key, loaded.slot));
            // Without a turn yet: when the next one has it.
            bucket.paid_at.iter().find(|(t, _)| *t == ticket).map_or(bucket.spent_until, |(_, end)| *end)
        };
        self.held.iter().map(turn).min().map(|next| next.saturating_sub(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(n: u32) -> Ticket {
        (ExpertKey { layer: 0, expert: n }, SlotId { pool: 0, index: n })
    }

    /// Never more bytes in any stretch of time than the rate gives and one copy, and never idle while something waits.
    #[test]
    fn pays_at_its_rate_and_no_faster() {
        let mut state = 12_345_u64;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..200 {
            let rate = 5e6;
            let mut bucket = Bucket::new(rate);
            let mut asked: Vec<(Duration, u64)> = Vec::new();
            let mut now = Duration::from_millis(random(50));
            for n in 0..60 {
                now += Duration::from_micros(random(4_000));
                let bytes = 1 + random(20_000);
                let purpose = if random(3) == 0 { Purpose::Prefetch } else { Purpose::Demand };
                bucket.ask(now, ticket(n), bytes, purpose);
                asked.push((now, bytes));
            }
            bucket.advance(Duration::from_secs(1000));
            assert!(bucket.waiting.is_empty() && bucket.paid == asked.iter().map(|(_, b)| b).sum::<u64>());
            // In the order of their turns.
            let mut end = Duration::ZERO;
            for (i, ((key, _), paid_at)) in bucket.paid_at.iter().enumerate() {
                let (since, bytes) = asked[key.expert as usize];
                let took = Duration::from_secs_f64(bytes as f64 / rate);
                let idle_until = bucket.paid_at[i..].iter().map(|((k, _), _)| asked[k.expert as usize].0).min().expect("itself");
                assert!(*paid_at >= since + took && *paid_at == end.max(idle_until) + took, "{i}: {paid_at:?}");
                end = *paid_at;
            }
        }
    }

    #[test]
    fn demanded_copies_go_first_but_interrupt_nothing() {
        let second = |s: u64| Duration::from_secs(s);
        let mut bucket = Bucket::new(100.0);
        bucket.ask(second(1), ticket(0), 100, Purpose::Prefetch);
        bucket.ask(second(1), ticket(1), 100, Purpose::Prefetch);
        bucket.ask(second(1), ticket(2), 100, Purpose::Prefetch);
        bucket.advance(second(1));
        bucket.ask(second(1), ticket(3), 100, Purpose::Demand);
        bucket.promote(second(1), ticket(2).0);
        // Reads in place go before whatever waits.
        assert_eq!(bucket.read(second(1), 200), second(4));
        bucket.advance(second(100));
        let order: Vec<_> = bucket.paid_at.iter().map(|((k, _), at)| (k.expert, at.as_secs())).collect();
        assert_eq!(order, [(0, 2), (2, 5), (3, 6), (1, 7)]);
    }

    #[test]
    fn nothing_overflows() {
        let mut bucket = Bucket::new(f64::MIN_POSITIVE);
        assert_eq!(bucket.read(Duration::ZERO, u64::MAX), Duration::MAX);
        bucket.ask(Duration::from_secs(1), ticket(0), 1, Purpose::Demand);
        bucket.advance(Duration::from_secs(2));
        assert!(bucket.paid_at.is_empty() && bucket.waiting.len() == 1);
    }
}
