//! Tokens per expert, layer and step: what there is to balance.
//!
//! A log comes from counts (one step, or steps in the order of time) or from a trace, cut into steps of so many tokens.

use crate::error::PlanError;
use crate::routing::{CountsTable, Part, RoutingTrace};

/// Sums stay exact in whole numbers and in floating point.
const MOST: f64 = 9_007_199_254_740_992.0;

/// A log of loads. Every step has all layers, every layer all experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loads {
    /// MoE layers.
    pub num_layers: usize,
    /// Routed experts per layer.
    pub num_experts: usize,
    /// Tokens routed to each expert. `[steps][layers][experts]`
    counts: Vec<u64>,
}

#[allow(clippy::needless_pass_by_value, reason = "numbers and texts alike, as they come")]
fn bad<T>(field: impl Into<String>, found: impl ToString, expected: impl Into<String>) -> Result<T, PlanError> {
    Err(PlanError::BadBalance { field: field.into(), found: found.to_string(), expected: expected.into() })
}

/// Refuses rows of different lengths and loads that are no loads. `[layers][experts]`
///
/// # Errors
/// [`PlanError::BadBalance`] naming layer and expert.
pub fn check_rows(rows: &[Vec<f64>], num_experts: usize) -> Result<(), PlanError> {
    if rows.is_empty() || num_experts == 0 {
        return bad("the number of layers", rows.len(), "one or more, with experts");
    }
    for (layer, row) in rows.iter().enumerate() {
        if row.len() != num_experts {
            return bad(format!("the number of experts of layer {layer}"), row.len(), num_experts.to_string());
        }
        if let Some(e) = row.iter().position(|w| !(w.is_finite() && (0.0..MOST).contains(w))) {
            return bad(format!("the load of expert {e} in layer {layer}"), row[e], "a number from 0 to 9e15");
        }
    }
    Ok(())
}

impl Loads {
    /// From `[steps][layers][experts]`.
    ///
    /// # Errors
    /// [`PlanError::BadBalance`] naming step, layer and expert.
    pub fn new(steps: &[Vec<Vec<u64>>]) -> Result<Self, PlanError> {
        let num_layers = steps.first().map_or(0, Vec::len);
        let num_experts = steps.first().and_then(|s| s.first()).map_or(0, Vec::len);
        if num_layers == 0 || num_experts == 0 || num_experts > usize::from(u16::MAX) {
            return bad(
                "the log",
                format!("{num_layers} layers of {num_experts} experts"),
                "one or more of each, below 65536 experts",
            );
        }
        let mut counts = Vec::with_capacity(steps.len() * num_layers * num_experts);
        for (at, step) in steps.iter().enumerate() {
            if step.len() != num_layers {
                return bad(format!("the number of layers of step {at}"), step.len(), format!("{num_layers}, as in step 0"));
            }
            for (layer, row) in step.iter().enumerate() {
                if row.len() != num_experts {
                    return bad(format!("the number of experts of step {at}, layer {layer}"), row.len(), num_experts.to_string());
                }
                if row.iter().try_fold(0_u64, |sum, c| sum.checked_add(*c)).is_none_or(|sum| sum as f64 >= MOST) {
                    return bad(format!("the tokens of step {at}, layer {layer}"), "more than 9e15", "fewer");
                }
                counts.extend_from_slice(row);
            }
        }
        Ok(Self { num_layers, num_experts, counts })
    }

    /// From a table of counts: its steps, or one step with the sum of the groups (or the one of that label).
    ///
    /// # Errors
    /// [`PlanError::BadTrace`] when there is no such group, [`PlanError::BadBalance`].
    pub fn from_counts(table: &CountsTable, label: Option<&str>) -> Result<Self, PlanError> {
        if table.in_order && label.is_none() {
            let steps: Vec<_> = table.groups.iter().map(|g| g.counts.clone()).collect();
            return Self::new(&steps);
        }
        Self::new(&[table.counts(label)?])
    }

    /// From a trace, `tokens_per_step` tokens in a step; what is left at the end makes no step of its own unless it is all there is.
    ///
    /// # Errors
    /// [`PlanError::BadBalance`] when a step would have no tokens.
    pub fn from_trace(trace: &RoutingTrace, part: &Part, tokens_per_step: usize) -> Result<Self, PlanError> {
        if tokens_per_step == 0 {
            return bad("tokens per step", 0, "one or more");
        }
        let (layers, experts) = (trace.num_moe_layers, trace.num_experts as usize);
        let tokens: Vec<usize> = trace.tokens(part).collect();
        let mut counts = Vec::new();
        for step in tokens.chunks(tokens_per_step) {
            if step.len() < tokens_per_step && !counts.is_empty() {
                break;
            }
            let first = counts.len();
            counts.resize(first + layers * experts, 0_u64);
            for token in step {
                for layer in 0..layers {
                    for e in trace.chosen(*token, layer) {
                        counts[first + layer * experts + usize::from(e)] += 1;
                    }
                }
            }
        }
        if counts.is_empty() {
            return bad("the trace", "without tokens", "one or more");
        }
        Ok(Self { num_layers: layers, num_experts: experts, counts })
    }

    /// The same shares with `selections` in every layer of every step, largest remainders rounded up; layers without any stay empty.
    #[must_use]
    pub fn scaled(&self, selections: u64) -> Self {
        let mut out = self.clone();
        for row in out.counts.chunks_exact_mut(self.num_experts) {
            let total: u128 = row.iter().map(|c| u128::from(*c)).sum();
            if total == 0 {
                continue;
            }
            let exact = |c: u64| (u128::from(c) * u128::from(selections) / total, u128::from(c) * u128::from(selections) % total);
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.sort_by_key(|e| std::cmp::Reverse(exact(row[*e]).1));
            let parts: Vec<u64> = row.iter().map(|c| exact(*c).0 as u64).collect();
            let left = selections - parts.iter().sum::<u64>();
            row.copy_from_slice(&parts);
            order.iter().take(left as usize).for_each(|e| row[*e] += 1);
        }
        out
    }

    /// One layer alone, with its first so many experts.
    ///
    /// # Errors
    /// [`PlanError::BadBalance`] when there is no such layer, or there are not so many experts.
    pub fn of_layer(&self, layer: usize, num_experts: usize) -> Result<Self, PlanError> {
        if layer >= self.num_layers || num_experts == 0 || num_experts > self.num_experts {
            let expected = format!("a layer below {} with 1 to {} experts", self.num_layers, self.num_experts);
            return bad("the layer of the log", format!("{layer} with {num_experts} experts"), expected);
        }
        let counts = (0..self.num_steps()).flat_map(|step| self.row(step, layer)[..num_experts].iter().copied()).collect();
        Ok(Self { num_layers: 1, num_experts, counts })
    }

    /// These steps, then those of another log of the same shape.
    ///
    /// # Errors
    /// [`PlanError::BadBalance`] when shapes differ.
    pub fn then(&self, other: &Self) -> Result<Self, PlanError> {
        if (self.num_layers, self.num_experts) != (other.num_layers, other.num_experts) {
            let expected = format!("{} layers of {} experts", self.num_layers, self.num_experts);
            return bad("the other log", format!("{} layers of {} experts", other.num_layers, other.num_experts), expected);
        }
        Ok(Self { counts: [self.counts.as_slice(), &other.counts].concat(), ..self.clone() })
    }

    /// Number of steps.
    pub fn num_steps(&self) -> usize {
        self.counts.len() / (self.num_layers * self.num_experts)
    }

    /// Tokens of each expert. `[experts]`
    pub fn row(&self, step: usize, layer: usize) -> &[u64] {
        let first = (step * self.num_layers + layer) * self.num_experts;
        &self.counts[first..first + self.num_experts]
    }

    /// Sum over steps of a layer. `[experts]`
    pub fn sum(&self, steps: std::ops::Range<usize>, layer: usize) -> Vec<f64> {
        let mut sum = vec![0.0; self.num_experts];
        for step in steps {
            sum.iter_mut().zip(self.row(step, layer)).for_each(|(s, c)| *s += *c as f64);
        }
        sum
    }

    /// The steps cut into at most `windows` runs of equal length, summed. `[windows][experts]`
    pub fn windows(&self, steps: std::ops::Range<usize>, layer: usize, windows: usize) -> Vec<Vec<f64>> {
        let windows = windows.clamp(1, steps.len().max(1));
        let cut = |w: usize| steps.start + steps.len() * w / windows;
        (0..windows).map(|w| self.sum(cut(w)..cut(w + 1), layer)).collect()
    }
}
