//! Tables of expert counts: popularity without the order of tokens.
//!
//! JSON with `n_experts`, `top_k` and one object (`tasks`, `domains` or `per_dataset`) of groups, each `{"tokens": N, "counts":
//! [[...]]}` with one list per MoE layer.

use super::{MAX_LAYERS, bad};
use crate::error::PlanError;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Selections per expert of one kind of work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountsGroup {
    /// Which kind of work.
    pub label: String,
    /// Tokens counted, if the table says.
    pub tokens: Option<u64>,
    /// Selections. `[moe layers][num_experts]`
    pub counts: Vec<Vec<u64>>,
}

/// Selections per expert and layer, by kind of work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountsTable {
    /// The model, as the table's author calls it.
    pub model: String,
    /// Where it is from.
    pub source: String,
    /// Under which licence.
    pub licence: String,
    /// MoE layers.
    pub num_moe_layers: usize,
    /// Routed experts per layer.
    pub num_experts: u32,
    /// Experts per token.
    pub experts_per_token: u32,
    /// By label.
    pub groups: Vec<CountsGroup>,
}

#[derive(Deserialize)]
struct Raw {
    model: String,
    source: String,
    licence: String,
    n_experts: u32,
    top_k: u32,
    #[serde(alias = "domains", alias = "per_dataset")]
    tasks: BTreeMap<String, RawGroup>,
}

#[derive(Deserialize)]
struct RawGroup {
    tokens: Option<u64>,
    counts: Vec<Vec<u64>>,
}

/// A group that repeats the sum of the others.
const SUM_OF_ALL: &str = "all";

impl CountsTable {
    /// From the text of a table.
    ///
    /// # Errors
    /// [`PlanError::BadTrace`] naming the field.
    pub fn from_json(text: &str) -> Result<Self, PlanError> {
        let raw: Raw = match serde_json::from_str(text) {
            Ok(raw) => raw,
            Err(e) => {
                return bad(
                    "the table of counts",
                    e,
                    "JSON with model, source, licence, n_experts, top_k and tasks, domains or per_dataset: {label: {tokens, counts}}",
                );
            }
        };
        if raw.n_experts == 0 || raw.n_experts > u32::from(u16::MAX) {
            return bad("n_experts", raw.n_experts, "1 to 65535");
        }
        if raw.top_k == 0 || raw.top_k > raw.n_experts {
            return bad("top_k", raw.top_k, format!("1 to n_experts, {}", raw.n_experts));
        }
        let mut groups = Vec::with_capacity(raw.tasks.len());
        let mut num_moe_layers = None;
        for (label, group) in raw.tasks {
            let layers = *num_moe_layers.get_or_insert(group.counts.len());
            if group.counts.len() != layers || layers == 0 || layers > MAX_LAYERS {
                let expected = format!("1 to {MAX_LAYERS}, and as many in every group");
                return bad(format!("the number of layers of {label}"), group.counts.len(), expected);
            }
            if let Some(layer) = group.counts.iter().position(|c| c.len() != raw.n_experts as usize) {
                let expected = format!("{}, one for each expert", raw.n_experts);
                return bad(format!("the number of counts of {label}, layer {layer}"), group.counts[layer].len(), expected);
            }
            groups.push(CountsGroup { label, tokens: group.tokens, counts: group.counts });
        }
        let Some(num_moe_layers) = num_moe_layers else {
            return bad("the table of counts", "without any group", "at least one");
        };
        Ok(Self {
            model: raw.model,
            source: raw.source,
            licence: raw.licence,
            num_moe_layers,
            num_experts: raw.n_experts,
            experts_per_token: raw.top_k,
            groups,
        })
    }

    /// Share of the selections of each expert in one group, or in all groups together. `[moe layers][num_experts]`
    ///
    /// # Errors
    /// [`PlanError::BadTrace`] when there is no such group.
    pub fn shares(&self, label: Option<&str>) -> Result<Vec<Vec<f64>>, PlanError> {
        let wanted: Vec<&CountsGroup> = match label {
            Some(label) => self.groups.iter().filter(|g| g.label == label).collect(),
            None if self.groups.len() == 1 => self.groups.iter().collect(),
            None => self.groups.iter().filter(|g| g.label != SUM_OF_ALL).collect(),
        };
        if wanted.is_empty() {
            let labels: Vec<&str> = self.groups.iter().map(|g| g.label.as_str()).collect();
            return bad("the group", label.unwrap_or_default(), format!("one of {}", labels.join(", ")));
        }
        let layer_shares = |layer: usize| {
            let mut sum = vec![0_u64; self.num_experts as usize];
            for group in &wanted {
                for (s, c) in sum.iter_mut().zip(&group.counts[layer]) {
                    *s = s.saturating_add(*c);
                }
            }
            normalised(&sum)
        };
        Ok((0..self.num_moe_layers).map(layer_shares).collect())
    }
}

/// Shares that sum to 1; equal ones when there is nothing to share.
pub(super) fn normalised(counts: &[u64]) -> Vec<f64> {
    let sum: f64 = counts.iter().map(|c| *c as f64).sum();
    if sum > 0.0 { counts.iter().map(|c| *c as f64 / sum).collect() } else { vec![1.0 / counts.len() as f64; counts.len()] }
}
