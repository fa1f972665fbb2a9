//! Recorded routing: which experts each token chose, checked, split by sequences, and turned into popularity and scenarios.
//!
//! A trace is two files: a description (`NAME.meta.json`) and the choices (`NAME.ids.u8`: one byte per choice, row-major
//! `[tokens][moe_layers][experts_per_token]`, 255 for "not recorded"). Tokens of one sequence are alike, so a trace is only ever
//! split between sequences: a test on tokens of a sequence that was trained on would flatter every popularity plan. Where only counts
//! per expert are known ([`CountsTable`]) steps are sampled independently in each layer, and say so ([`INDEPENDENT`]).

mod counts;
mod scenarios;
mod split;
mod synthetic;

pub use counts::{CountsGroup, CountsTable};
pub use scenarios::{VIEWS_PER_EXPERT, num_scenarios_for};
pub use split::Part;
pub use synthetic::{INDEPENDENT, independent_scenarios, synthetic_scenarios, zipf_shares};

use crate::error::PlanError;
use crate::sim::{Trace, UNRECORDED};
use serde::Deserialize;
use std::ops::Range;

/// Tokens of one conversation or document, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// What kind of work it is, if the trace says.
    pub label: Option<String>,
    /// Its tokens in the trace.
    pub tokens: Range<usize>,
}

/// A routing trace in memory. Every sequence lies within it, none overlap, every id is that of an expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutingTrace {
    /// The model that was traced, as the trace's author calls it.
    pub model: String,
    /// Where it is from.
    pub source: String,
    /// Under which licence.
    pub licence: String,
    /// Decode, prefill, teacher-forced: in the author's words.
    pub phase: String,
    /// MoE layers.
    pub num_moe_layers: usize,
    /// Routed experts per layer.
    pub num_experts: u32,
    /// Experts per token.
    pub experts_per_token: usize,
    /// The sequences, by their first token.
    pub sequences: Vec<Sequence>,
    /// Chosen experts. `[tokens][moe_layers][experts_per_token]`
    ids: Vec<u8>,
}

/// The fields of a `.meta.json` that are used; others are provenance for people.
#[derive(Deserialize)]
struct Meta {
    model: String,
    source: String,
    licence: String,
    phase: String,
    n_tokens: usize,
    n_moe_layers: usize,
    n_experts: u32,
    top_k: usize,
    sequences: Vec<MetaSequence>,
}

#[derive(Deserialize)]
struct MetaSequence {
    start: usize,
    len: usize,
    task: Option<String>,
    dataset: Option<String>,
}

/// No model has more: keeps products far from overflow and hostile files from large allocations.
const MAX_LAYERS: usize = 1 << 12;

#[allow(clippy::needless_pass_by_value, reason = "numbers and texts alike, as they come")]
fn bad<T>(field: impl Into<String>, found: impl ToString, expected: impl Into<String>) -> Result<T, PlanError> {
    Err(PlanError::BadTrace { field: field.into(), found: found.to_string(), expected: expected.into() })
}

impl RoutingTrace {
    /// From the text of the description and the bytes of the choices.
    ///
    /// # Errors
    /// [`PlanError::BadTrace`] naming the field.
    pub fn new(meta_json: &str, ids: Vec<u8>) -> Result<Self, PlanError> {
        let meta: Meta = match serde_json::from_str(meta_json) {
            Ok(meta) => meta,
            Err(e) => {
                return bad(
                    "the description",
                    e,
                    "JSON with model, source, licence, phase, n_tokens, n_moe_layers, n_experts, top_k and sequences [{start, len}]",
                );
            }
        };
        if meta.n_moe_layers == 0 || meta.n_moe_layers > MAX_LAYERS {
            return bad("n_moe_layers", meta.n_moe_layers, format!("1 to {MAX_LAYERS}"));
        }
        if meta.n_experts == 0 || meta.n_experts > u32::from(UNRECORDED) {
            return bad("n_experts", meta.n_experts, "1 to 255: ids are bytes, and 255 means not recorded");
        }
        if meta.top_k == 0 || meta.top_k > meta.n_experts as usize {
            return bad("top_k", meta.top_k, format!("1 to n_experts, {}", meta.n_experts));
        }
        let per_token = meta.n_moe_layers * meta.top_k;
        match meta.n_tokens.checked_mul(per_token) {
            Some(bytes) if bytes == ids.len() && bytes > 0 => {}
            Some(bytes) if bytes > 0 => {
                let expected = format!("{bytes}: {} tokens x {} layers x {}", meta.n_tokens, meta.n_moe_layers, meta.top_k);
                return bad("the number of ids", ids.len(), expected);
            }
            _ => return bad("n_tokens", meta.n_tokens, format!("{}, as many as there are ids for", ids.len() / per_token)),
        }
        if let Some(at) = ids.iter().position(|e| *e != UNRECORDED && u32::from(*e) >= meta.n_experts) {
            let (token, layer) = (at / per_token, at % per_token / meta.top_k);
            let expected = format!("below {}, the number of experts, or 255 for not recorded", meta.n_experts);
            return bad(format!("the expert of token {token} in MoE layer {layer}"), ids[at], expected);
        }
        let trace = Self {
            model: meta.model,
            source: meta.source,
            licence: meta.licence,
            phase: meta.phase,
            num_moe_layers: meta.n_moe_layers,
            num_experts: meta.n_experts,
            experts_per_token: meta.top_k,
            sequences: sequences(meta.sequences, meta.n_tokens)?,
            ids,
        };
        trace.check_choices()?;
        Ok(trace)
    }

    /// Refuses tokens that choose one expert twice.
    fn check_choices(&self) -> Result<(), PlanError> {
        let view = self.view();
        let mut last_seen_at = vec![usize::MAX; self.num_experts as usize];
        for token in 0..self.num_tokens() {
            for layer in 0..self.num_moe_layers {
                let at = token * self.num_moe_layers + layer;
                for e in view.chosen(token, layer) {
                    if std::mem::replace(&mut last_seen_at[usize::from(e)], at) == at {
                        let field = format!("the choice of token {token} in MoE layer {layer}");
                        return bad(field, format!("expert {e} twice"), "different experts");
                    }
                }
            }
        }
        Ok(())
    }

    /// The choices, for replay.
    ///
    /// # Panics
    /// Never: the number of ids was checked.
    pub fn view(&self) -> Trace<'_> {
        Trace::new(&self.ids, self.num_moe_layers, self.experts_per_token).expect("the number of ids was checked")
    }

    /// Number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.ids.len() / (self.num_moe_layers * self.experts_per_token)
    }

    /// Experts that `token` chose in MoE layer `layer`, without those that were not recorded.
    pub fn chosen(&self, token: usize, layer: usize) -> impl Iterator<Item = u16> + '_ {
        self.view().chosen(token, layer)
    }

    /// Was every choice of `token` recorded?
    pub fn is_complete(&self, token: usize) -> bool {
        let per_token = self.num_moe_layers * self.experts_per_token;
        !self.ids[token * per_token..(token + 1) * per_token].contains(&UNRECORDED)
    }

    /// Share of the selections of each expert in `part`; equal shares in a layer of which nothing was recorded.
    /// `[moe layers][num_experts]`
    pub fn shares(&self, part: &Part) -> Vec<Vec<f64>> {
        let view = self.view();
        let mut counts = vec![vec![0_u64; self.num_experts as usize]; self.num_moe_layers];
        for token in self.tokens(part) {
            for (layer, counts) in counts.iter_mut().enumerate() {
                for e in view.chosen(token, layer) {
                    counts[usize::from(e)] += 1;
                }
            }
        }
        counts.iter().map(|c| counts::normalised(c)).collect()
    }

    /// Refuses a model of other layers, experts or experts per token. `layers` holds (experts, experts per token) per MoE layer.
    ///
    /// # Errors
    /// [`PlanError::BadTrace`] naming both sides.
    pub fn check_model(&self, model: &str, layers: &[(u32, u32)]) -> Result<(), PlanError> {
        let traced = (self.num_experts, self.experts_per_token as u32);
        if layers.len() == self.num_moe_layers && layers.iter().all(|l| *l == traced) {
            return Ok(());
        }
        let (experts, k) = layers.iter().find(|l| **l != traced).or(layers.first()).copied().unwrap_or_default();
        let found =
            format!("of {}: {} MoE layers, {} of {} experts per token", self.model, self.num_moe_layers, traced.1, traced.0);
        bad("it", found, format!("one of {model}: {} MoE layers, {k} of {experts} experts per token", layers.len()))
    }

    /// 64-bit fingerprint of the choices and the sequences, in hexadecimal: tells whether a plan was made from this very trace.
    pub fn fingerprint(&self) -> String {
        // FNV-1a: small, stable across versions, not for security.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut add = |bytes: &[u8]| {
            for b in bytes {
                hash = (hash ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        };
        for n in [self.num_moe_layers, self.num_experts as usize, self.experts_per_token] {
            add(&(n as u64).to_le_bytes());
        }
        for s in &self.sequences {
            add(&(s.tokens.start as u64).to_le_bytes());
            add(&(s.tokens.end as u64).to_le_bytes());
        }
        add(&self.ids);
        format!("{hash:016x}")
    }
}

/// Sequences by their first token, checked to lie within the trace and not to overlap.
fn sequences(meta: Vec<MetaSequence>, num_tokens: usize) -> Result<Vec<Sequence>, PlanError> {
    let mut sequences = Vec::with_capacity(meta.len());
    for (i, s) in meta.into_iter().enumerate() {
        match s.start.checked_add(s.len) {
            Some(end) if s.len > 0 && end <= num_tokens => {
                sequences.push(Sequence { label: s.task.or(s.dataset), tokens: s.start..end });
            }
            _ => {
                let found = format!("start {}, len {}", s.start, s.len);
                return bad(format!("sequences[{i}]"), found, format!("one token or more within the {num_tokens} of the trace"));
            }
        }
    }
    if sequences.is_empty() {
        return bad("sequences", "empty", "at least one");
    }
    sequences.sort_by_key(|s| s.tokens.start);
    if let Some(pair) = sequences.windows(2).find(|p| p[1].tokens.start < p[0].tokens.end) {
        let found = format!("tokens {:?} and {:?}", pair[0].tokens, pair[1].tokens);
        return bad("sequences", found, "sequences that do not overlap");
    }
    Ok(sequences)
}

#[cfg(test)]
mod tests;
