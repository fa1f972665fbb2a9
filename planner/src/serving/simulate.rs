//! Continuous batching on a virtual clock.
//!
//! One step after the other: arrived requests are admitted first come, first served; every sequence whose prompt is done decodes one
//! token; what is left of the step's token budget goes to prompts, oldest first (chunked prefill, Sarathi-Serve). A prompt's last chunk
//! yields the first token. Caches grow block by block; when one does not fit, the request that started last is evicted, loses its
//! cache and later computes prompt and answer so far again; until somebody has finished after that, nobody is admitted, for else the
//! same request would come and go. Requests that exceed the context are refused.
//!
//! The oldest request is never evicted and always fits, so every admitted request finishes.

use super::admission::{Admission, History, Seen, admits};
use super::arrivals::Arrivals;
use super::memory::KvPool;
use super::steps::{Chunk, StepSeconds};
use std::collections::VecDeque;

/// How requests are batched.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Who may start.
    pub admission: Admission,
    /// Most requests in a step.
    pub max_running: u32,
    /// Most tokens in a step, decoding ones included.
    pub chunk_tokens: u32,
    /// Share of the pool that `past_future` keeps for answers longer than predicted.
    pub reserve: f64,
    /// Finished answers that are remembered.
    pub history: usize,
    /// Seed of the predictions.
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { admission: Admission::PastFuture, max_running: 64, chunk_tokens: 512, reserve: 0.03, history: 1000, seed: 1 }
    }
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Served {
    /// When it arrived.
    pub arrival_s: f64,
    /// When its first token was there; `None` for refused ones.
    pub first_token_s: Option<f64>,
    /// When its last token was there.
    pub finish_s: f64,
    /// Tokens it got.
    pub tokens: u32,
}

/// A simulated run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outcome {
    /// Per request of the trace, in its order.
    pub requests: Vec<Served>,
    /// Gaps between tokens of one request: (seconds, how many).
    pub gaps: Vec<(f64, u32)>,
    /// Steps.
    pub steps: u64,
    /// Arrivals, admissions, steps, evictions and finishes.
    pub events: u64,
    /// Tokens given out.
    pub tokens: u64,
    /// Prompt tokens computed, again ones included.
    pub prompt_tokens: u64,
    /// Requests thrown out of memory.
    pub evictions: u64,
    /// Tokens computed again after evictions.
    pub recomputed_tokens: u64,
    /// Requests longer than the context.
    pub refused: u64,
    /// When the last token was there.
    pub end_s: f64,
    /// Seconds during which a step ran.
    pub busy_s: f64,
    /// Sum over steps of seconds times requests in memory.
    pub running_s: f64,
    /// Most requests in memory at once.
    pub most_running: u32,
    /// Most bytes of keys and values at once.
    pub peak_kv_bytes: u64,
}

/// A request in memory.
struct Active {
    id: usize,
    prompt: u32,
    output: u32,
    emitted: u32,
    /// Tokens in its cache.
    held: u32,
    /// Tokens that have to be in its cache before it decodes.
    target: u32,
    last_token_s: f64,
    /// Tokens of this step's chunk.
    chunk: u32,
}

impl Active {
    const fn decoding(&self) -> bool {
        self.held >= self.target
    }
}

struct Simulation<'a> {
    pool: &'a KvPool,
    config: &'a Config,
    arrivals: &'a Arrivals,
    load: f64,
    longest: u32,
    history: History,
    waiting: VecDeque<(usize, u32, f64)>,
    active: Vec<Active>,
    used: u64,
    /// Nobody is admitted before somebody has finished.
    blocked: bool,
    out: Outcome,
}

/// Replays `arrivals` at `load` times their rate.
///
/// # Panics
/// If `load` is not a positive number or the pool cannot hold one request of its context: both are checked where they come from.
pub fn simulate(arrivals: &Arrivals, load: f64, pool: &KvPool, steps: &dyn StepSeconds, config: &Config) -> Outcome {
    assert!(load > 0.0 && pool.bytes(pool.context) <= pool.capacity_bytes, "checked by the callers");
    let mut s = Simulation {
        pool,
        config,
        arrivals,
        load,
        longest: arrivals.longest_output(),
        history: History::new(config.history, config.seed),
        waiting: VecDeque::new(),
        active: Vec::new(),
        used: 0,
        blocked: false,
        out: Outcome::default(),
    };
    s.run(steps);
    s.out
}

impl Simulation<'_> {
    fn run(&mut self, steps: &dyn StepSeconds) {
        let requests = &self.arrivals.requests;
        self.out.requests = requests
            .iter()
            .map(|r| Served { arrival_s: r.at_s / self.load, first_token_s: None, finish_s: r.at_s / self.load, tokens: 0 })
            .collect();
        let (mut now, mut next) = (0.0_f64, 0);
        let mut chunks = Vec::new();
        loop {
            while next < requests.len() && self.out.requests[next].arrival_s <= now {
                self.arrive(next);
                next += 1;
            }
            self.admit();
            if self.active.is_empty() {
                // Nothing waits either: an empty memory admits anybody.
                let Some(r) = self.out.requests.get(next) else { break };
                now = r.arrival_s;
                continue;
            }
            let (decoding, past) = self.compose(&mut chunks);
            let mean_past = if decoding > 0 { past as f64 / f64::from(decoding) } else { 0.0 };
            let seconds = steps.seconds(decoding, mean_past, &chunks);
            now += seconds;
            self.out.busy_s += seconds;
            self.out.running_s += seconds * self.active.len() as f64;
            self.out.steps += 1;
            self.out.events += 1;
            self.finish_step(now, seconds);
        }
    }

    fn arrive(&mut self, id: usize) {
        self.out.events += 1;
        let r = &self.arrivals.requests[id];
        if u64::from(r.prompt_tokens) + u64::from(r.output_tokens) > u64::from(self.pool.context) {
            self.out.refused += 1;
        } else {
            self.waiting.push_back((id, 0, self.out.requests[id].arrival_s));
        }
    }

    fn admit(&mut self) {
        while !self.blocked && self.active.len() < self.config.max_running as usize {
            let Some(&(id, emitted, last_token_s)) = self.waiting.front() else { return };
            let r = &self.arrivals.requests[id];
            let next = Seen { id, prompt: r.prompt_tokens, emitted };
            let running = self.active.iter().map(|a| Seen { id: a.id, prompt: a.prompt, emitted: a.emitted });
            let fits = self.active.is_empty()
                || admits(self.config.admission, self.pool, &self.history, self.longest, self.config.reserve, running, next);
            if !fits {
                self.blocked = true;
                return;
            }
            self.waiting.pop_front();
            self.out.events += 1;
            self.active.push(Active {
                id,
                prompt: r.prompt_tokens,
                output: r.output_tokens,
                emitted,
                held: 0,
                target: r.prompt_tokens + emitted,
                last_token_s,
                chunk: 0,
            });
        }
    }

    /// Makes room for `tokens` more of active request `i` by evicting later ones; `false` when that is not enough.
    fn grow(&mut self, i: usize, tokens: u32) -> bool {
        let held = self.active[i].held;
        let more = self.pool.bytes(held + tokens) - self.pool.bytes(held);
        while self.used + more > self.pool.capacity_bytes {
            if self.active.len() == i + 1 {
                return false;
            }
            self.evict_last();
        }
        self.used += more;
        self.active[i].held += tokens;
        self.out.peak_kv_bytes = self.out.peak_kv_bytes.max(self.used);
        true
    }

    fn evict_last(&mut self) {
        if let Some(a) = self.active.pop() {
            debug_assert_eq!(a.chunk, 0, "only requests without a part in this step are evicted");
            self.used -= self.pool.bytes(a.held);
            self.out.evictions += 1;
            self.out.events += 1;
            self.out.recomputed_tokens += u64::from(a.held);
            self.waiting.push_front((a.id, a.emitted, a.last_token_s));
            self.blocked = true;
        }
    }

    /// Chooses the step's work and gives it memory: how many sequences decode, and the sum of their positions.
    fn compose(&mut self, chunks: &mut Vec<Chunk>) -> (u32, u64) {
        chunks.clear();
        let (mut decoding, mut past) = (0_u32, 0_u64);
        let mut i = 0;
        self.active.iter_mut().for_each(|a| a.chunk = 0);
        while i < self.active.len() {
            if self.active[i].decoding() {
                let held = self.active[i].held;
                // The last one may have to go itself; the first one always fits.
                if !self.grow(i, 1) {
                    self.evict_last();
                    break;
                }
                // What it holds now is what must be there before the token after this one.
                self.active[i].target = held + 1;
                self.active[i].chunk = 1;
                decoding += 1;
                past += u64::from(held);
            }
            i += 1;
        }
        let mut left = self.config.chunk_tokens.saturating_sub(decoding);
        let mut i = 0;
        while i < self.active.len() && left > 0 {
            let a = &self.active[i];
            if a.chunk == 0 {
                let before = a.held;
                let tokens = left.min(a.target - a.held);
                // Prompts are done oldest first, so those evicted here have no part in this step yet.
                if !self.grow(i, tokens) {
                    break;
                }
                self.active[i].chunk = tokens;
                chunks.push(Chunk { tokens, past: before });
                self.out.prompt_tokens += u64::from(tokens);
                left -= tokens;
            }
            i += 1;
        }
        self.out.most_running = self.out.most_running.max(self.active.len() as u32);
        (decoding, past)
    }

    /// Tokens come out at the end of the step.
    fn finish_step(&mut self, now: f64, seconds: f64) {
        let mut regular = 0;
        let mut finished = false;
        for a in &mut self.active {
            if a.chunk == 0 || a.held < a.target {
                continue;
            }
            let r = &mut self.out.requests[a.id];
            if r.first_token_s.is_none() {
                r.first_token_s = Some(now);
            } else if now - a.last_token_s <= seconds * (1.0 + 1e-6) {
                // One step after the token before: counted together.
                regular += 1;
            } else {
                self.out.gaps.push((now - a.last_token_s, 1));
            }
            a.last_token_s = now;
            a.emitted += 1;
            r.tokens += 1;
            self.out.tokens += 1;
            if a.emitted == a.output {
                r.finish_s = now;
                self.out.end_s = now;
                finished = true;
            }
        }
        if regular > 0 {
            self.out.gaps.push((seconds, regular));
        }
        if finished {
            self.blocked = false;
            let (pool, history, out, used) = (self.pool, &mut self.history, &mut self.out, &mut self.used);
            self.active.retain(|a| {
                if a.emitted == a.output {
                    *used -= pool.bytes(a.held);
                    history.add(a.output);
                    out.events += 1;
                }
                a.emitted < a.output
            });
        }
    }
}
