//! Who may start: three ways to judge whether the memory will do.
//!
//! The answer's length is not known when a request starts. `reserve_longest` reserves for the worst and leaves memory idle;
//! `aggressive` looks only at the present and has to evict when answers grow; `past_future` (arXiv 2507.10150) predicts each answer
//! from the lengths seen so far, given how long it already is, and admits while the peak of the future memory fits. With requests
//! sorted by what they still have to generate, longest first, the i-th one finishes beside the i longer ones:
//! `peak = max over i of sum over j <= i of bytes(held_j + left_i)`.

use super::memory::KvPool;
use crate::error::PlanError;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// The way to judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Admission {
    /// Prompt plus the longest answer that may come is reserved.
    ReserveLongest,
    /// The prompt has to fit beside what is there now.
    Aggressive,
    /// The predicted peak has to fit.
    #[default]
    PastFuture,
}

impl Admission {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::ReserveLongest, Self::Aggressive, Self::PastFuture];

    /// Name in files and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ReserveLongest => "reserve_longest",
            Self::Aggressive => "aggressive",
            Self::PastFuture => "past_future",
        }
    }
}

impl std::str::FromStr for Admission {
    type Err = PlanError;
    fn from_str(s: &str) -> Result<Self, PlanError> {
        Self::ALL.into_iter().find(|a| a.name() == s).ok_or_else(|| PlanError::BadRequest {
            field: "admission",
            found: s.into(),
            expected: Self::ALL.map(Self::name).join(", "),
        })
    }
}

/// A running or waiting request as admission sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its number: the same request always gets the same luck.
    pub id: usize,
    /// Tokens of its prompt.
    pub prompt: u32,
    /// Tokens it has generated.
    pub emitted: u32,
}

impl Seen {
    /// Tokens that its cache holds, or will hold before its next token.
    const fn held(self) -> u32 {
        self.prompt + self.emitted
    }
}

/// Lengths of the answers that finished last.
#[derive(Debug, Clone)]
pub struct History {
    order: VecDeque<u32>,
    sorted: Vec<u32>,
    most: usize,
    seed: u64,
}

/// With fewer finished answers than this the longest possible one is assumed.
const LEAST_HISTORY: usize = 16;

impl History {
    /// An empty history of up to `most` answers.
    pub fn new(most: usize, seed: u64) -> Self {
        Self { order: VecDeque::new(), sorted: Vec::new(), most: most.max(1), seed }
    }

    /// An answer of `tokens` finished.
    pub fn add(&mut self, tokens: u32) {
        if self.order.len() == self.most
            && let Some(oldest) = self.order.pop_front()
        {
            let at = self.sorted.partition_point(|t| *t < oldest);
            self.sorted.remove(at);
        }
        self.order.push_back(tokens);
        let at = self.sorted.partition_point(|t| *t < tokens);
        self.sorted.insert(at, tokens);
    }

    /// Tokens of the whole answer of `r`: drawn from the finished ones that are longer than it is now; `longest` when there are none.
    pub fn predict(&self, r: Seen, longest: u32) -> u32 {
        let from = self.sorted.partition_point(|t| *t <= r.emitted);
        let longer = &self.sorted[from..];
        if self.sorted.len() < LEAST_HISTORY || longer.is_empty() {
            return longest.max(r.emitted + 1);
        }
        // One draw per request: its prediction changes only by what is learned, and runs repeat exactly.
        let u = unit(self.seed ^ (r.id as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        longer[((u * longer.len() as f64) as usize).min(longer.len() - 1)]
    }
}

/// A number in [0, 1) from a seed (the finaliser of SplitMix64).
fn unit(seed: u64) -> f64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Peak of the bytes that requests will hold. `(tokens held, tokens left)` each; sorted here.
pub fn future_peak(pool: &KvPool, requests: &mut [(u32, u32)]) -> u64 {
    requests.sort_unstable_by(|a, b| b.1.cmp(&a.1).then(b.0.cmp(&a.0)));
    let bytes = |held: u32, left: u32| pool.bytes(held.saturating_add(left).min(pool.context));
    let mut peak = 0;
    for i in 0..requests.len() {
        let left = requests[i].1;
        peak = peak.max(requests[..=i].iter().map(|(held, _)| bytes(*held, left)).sum());
    }
    peak
}

/// May `next` start beside `running`?
pub fn admits(
    admission: Admission,
    pool: &KvPool,
    history: &History,
    longest: u32,
    reserve: f64,
    running: impl Iterator<Item = Seen>,
    next: Seen,
) -> bool {
    let all = running.chain(std::iter::once(next));
    match admission {
        Admission::ReserveLongest => {
            let most = |r: Seen| pool.bytes(r.prompt.saturating_add(longest).min(pool.context));
            all.map(most).sum::<u64>() <= pool.capacity_bytes
        }
        Admission::Aggressive => all.map(|r| pool.bytes(r.held())).sum::<u64>() <= pool.capacity_bytes,
        Admission::PastFuture => {
            let mut list: Vec<(u32, u32)> =
                all.map(|r| (r.held(), history.predict(r, longest).saturating_sub(r.emitted))).collect();
            let usable = (pool.capacity_bytes as f64 * (1.0 - reserve)) as u64;
            future_peak(pool, &mut list) <= usable
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_that_of_a_replay() {
        let pool = KvPool::linear(u64::MAX, 4096, 1);
        // Block by block, token by token: everybody grows until finished.
        let replay = |requests: &[(u32, u32)]| {
            let most = requests.iter().map(|r| r.1).max().unwrap();
            (1..=most).map(|t| requests.iter().filter(|r| r.1 >= t).map(|r| pool.bytes(r.0 + t)).sum::<u64>()).max().unwrap()
        };
        let mut seed = 1;
        for _ in 0..200 {
            let mut list: Vec<(u32, u32)> = (0..5)
                .map(|_| {
                    seed += 2;
                    ((unit(seed) * 900.0) as u32, 1 + (unit(seed + 1) * 700.0) as u32)
                })
                .collect();
            let expected = replay(&list);
            assert_eq!(future_peak(&pool, &mut list), expected, "{list:?}");
        }
    }

    #[test]
    fn predictions_are_longer_than_what_is_there() {
        let mut h = History::new(100, 7);
        let r = |emitted| Seen { id: 3, prompt: 10, emitted };
        assert_eq!(h.predict(r(0), 500), 500, "nothing was seen yet");
        (1..=200).for_each(|t| h.add(t));
        assert_eq!((h.sorted[0], h.sorted.len()), (101, 100), "the oldest are forgotten");
        for emitted in 0..200 {
            let p = h.predict(r(emitted), 500);
            assert!(p > emitted && (101..=200).contains(&p), "{emitted}: {p}");
        }
        assert_eq!(h.predict(r(200), 500), 500);
        // Over many requests the draws follow the distribution.
        let mean = (0..1000).map(|id| f64::from(h.predict(Seen { id, prompt: 1, emitted: 0 }, 500))).sum::<f64>() / 1000.0;
        assert!((mean - 150.5).abs() < 3.0, "{mean}");
    }
}
