//! LLA, output-equal to upstream: the token and weight moves that LLEP plans for one layer of one step.
//!
//! Experts by load, descending: the rank that holds an expert takes what fits under the cap, counting its own load still to come; the
//! excess goes in chunks to the least loaded ranks with room, a small chunk only if it finishes the expert; what nobody accepts is forced
//! on the least loaded other rank. Algorithm: arXiv 2601.17111, as published in SalesforceAIResearch/LeastLoadedEP
//! `llep/gpt_oss_llep.py` @ 0349746, with its quirk: for an expert whose own rank has no room the helpers are listed once and walked once.

use crate::error::PlanError;

/// LLA's parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LlaSettings {
    /// Ranks; rank r holds the r-th equal share of the experts.
    pub num_ranks: usize,
    /// A rank takes at most so many times the mean.
    pub alpha: f64,
    /// Fewer tokens are not worth a matrix multiplication of their own.
    pub min_tokens_per_gemm: u64,
}

/// Consecutive tokens of an expert on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRun {
    /// Who computes them.
    pub rank: u32,
    /// First token.
    pub start: u64,
    /// After the last.
    pub end: u64,
}

/// An expert's weights sent for a run of its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightTransfer {
    /// The expert.
    pub expert: u32,
    /// From.
    pub source: u32,
    /// To, and which tokens for.
    pub run: TokenRun,
}

/// LLA's output for one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LlaPlan {
    /// Tokens that a rank should have at most.
    pub cap: u64,
    /// Who computes which tokens; empty without any. `[experts][runs]`
    pub runs: Vec<Vec<TokenRun>>,
    /// In the order of planning.
    pub transfers: Vec<WeightTransfer>,
    /// Tokens per rank.
    pub loads: Vec<u64>,
    /// Tokens that were put on a rank above the cap because nobody had room, or none worth a multiplication.
    pub forced_tokens: u64,
}

/// Plans one layer. `counts` is the number of tokens of each expert. `[experts]`
///
/// # Errors
/// [`PlanError::BadBalance`] when experts do not divide among ranks or a parameter is impossible.
pub fn lla(counts: &[u64], settings: &LlaSettings) -> Result<LlaPlan, PlanError> {
    let LlaSettings { num_ranks, alpha, min_tokens_per_gemm } = *settings;
    let bad = |field: &str, found: String, expected: String| Err(PlanError::BadBalance { field: field.into(), found, expected });
    if num_ranks == 0 || counts.is_empty() || !counts.len().is_multiple_of(num_ranks) {
        return bad("devices", num_ranks.to_string(), format!("a divisor of {}, the number of experts", counts.len()));
    }
    if !(alpha.is_finite() && alpha > 0.0) {
        return bad("alpha", alpha.to_string(), "a positive number".into());
    }
    let Some(total) = counts.iter().try_fold(0_u64, |sum, c| sum.checked_add(*c)).filter(|t| *t < 1 << 53) else {
        return bad("tokens", "more than 2^53".into(), "fewer".into());
    };
    let mean = total / num_ranks as u64;
    let cap = if mean > 0 { (alpha * mean as f64) as u64 } else { total }.max(1);
    let mut work = Work {
        cap,
        min_tokens: min_tokens_per_gemm,
        per_rank: counts.len() / num_ranks,
        pending: counts.chunks_exact(counts.len() / num_ranks).map(|c| c.iter().sum()).collect(),
        plan: LlaPlan {
            cap,
            runs: vec![Vec::new(); counts.len()],
            transfers: Vec::new(),
            loads: vec![0; num_ranks],
            forced_tokens: 0,
        },
        helpers: Vec::with_capacity(num_ranks),
    };
    let mut order: Vec<usize> = (0..counts.len()).filter(|e| counts[*e] > 0).collect();
    order.sort_by_key(|e| std::cmp::Reverse(counts[*e]));
    for expert in order {
        work.place(expert, counts[expert]);
    }
    Ok(work.plan)
}

struct Work {
    cap: u64,
    min_tokens: u64,
    per_rank: usize,
    /// Load of each rank's own experts that were not placed yet.
    pending: Vec<u64>,
    plan: LlaPlan,
    /// Other ranks with their load, the least loaded first.
    helpers: Vec<(usize, u64)>,
}

impl Work {
    fn load(&self, rank: usize) -> u64 {
        self.plan.loads[rank] + self.pending[rank]
    }

    fn place(&mut self, expert: usize, tokens: u64) {
        let native = expert / self.per_rank;
        self.pending[native] -= tokens;
        let room = self.cap.saturating_sub(self.load(native));
        if room >= tokens {
            self.assign(expert, native, 0, tokens);
        } else if room > 0 {
            self.assign(expert, native, 0, room);
            let mut placed = room;
            while placed < tokens {
                placed = self.one_chunk(expert, native, placed, tokens);
            }
        } else {
            self.walk_once(expert, native, tokens);
        }
    }

    /// Gives the next chunk to the least loaded rank that accepts one, or all that is left to the least loaded. Returns what is placed.
    fn one_chunk(&mut self, expert: usize, native: usize, placed: u64, tokens: u64) -> u64 {
        self.list_helpers(native);
        let left = tokens - placed;
        let Some(&(least, _)) = self.helpers.first() else {
            // One rank only: it takes all.
            self.plan.runs[expert][0].end += left;
            self.plan.loads[native] += left;
            return tokens;
        };
        let accepts = self.helpers.iter().find_map(|&(rank, load)| self.chunk(load, left).map(|chunk| (rank, chunk)));
        let (rank, chunk) = accepts.unwrap_or_else(|| {
            self.plan.forced_tokens += left;
            (least, left)
        });
        self.send(expert, native, rank, placed, chunk);
        placed + chunk
    }

    /// The quirk: helpers are listed once and visited once.
    fn walk_once(&mut self, expert: usize, native: usize, tokens: u64) {
        self.list_helpers(native);
        let helpers = std::mem::take(&mut self.helpers);
        let mut placed = 0;
        for &(rank, load) in &helpers {
            if placed == tokens {
                break;
            }
            if let Some(chunk) = self.chunk(load, tokens - placed) {
                self.send(expert, native, rank, placed, chunk);
                placed += chunk;
            }
        }
        if placed < tokens {
            match helpers.first() {
                Some(&(least, _)) => {
                    self.plan.forced_tokens += tokens - placed;
                    self.send(expert, native, least, placed, tokens - placed);
                }
                None => self.assign(expert, native, 0, tokens),
            }
        }
        self.helpers = helpers;
    }

    fn list_helpers(&mut self, native: usize) {
        let mut helpers = std::mem::take(&mut self.helpers);
        helpers.clear();
        helpers.extend((0..self.plan.loads.len()).filter(|r| *r != native).map(|r| (r, self.load(r))));
        helpers.sort_by_key(|(_, load)| *load);
        self.helpers = helpers;
    }

    /// What a rank with that load accepts of `left` tokens.
    fn chunk(&self, load: u64, left: u64) -> Option<u64> {
        let chunk = self.cap.saturating_sub(load).min(left);
        (chunk > 0 && (chunk >= self.min_tokens || chunk == left)).then_some(chunk)
    }

    fn assign(&mut self, expert: usize, rank: usize, start: u64, tokens: u64) {
        self.plan.runs[expert].push(TokenRun { rank: rank as u32, start, end: start + tokens });
        self.plan.loads[rank] += tokens;
    }

    fn send(&mut self, expert: usize, native: usize, rank: usize, start: u64, tokens: u64) {
        self.assign(expert, rank, start, tokens);
        let run = TokenRun { rank: rank as u32, start, end: start + tokens };
        self.plan.transfers.push(WeightTransfer { expert: expert as u32, source: native as u32, run });
    }
}
