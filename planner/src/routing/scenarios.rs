//! Sampled decode steps of a trace.
//!
//! A scenario is one step of a batch: one token of each of as many different sequences, and in every layer the union of their experts.
//! All layers of a scenario come from the same tokens, so that what the layers have in common is kept.

use super::{Part, RoutingTrace, bad};
use crate::error::PlanError;
use crate::scenario::Scenarios;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tierwise_cost::cost::expected_distinct;

/// How often each expert should occur in the scenarios on average: its activity is then known to about 1/8.
pub const VIEWS_PER_EXPERT: f64 = 64.0;

/// So many scenarios that each expert is active in about [`VIEWS_PER_EXPERT`] of them; 32 to 4096.
pub fn num_scenarios_for(num_experts: u32, experts_per_token: u32, batch: u32) -> usize {
    let active = expected_distinct(num_experts, experts_per_token, batch).max(1.0);
    ((VIEWS_PER_EXPERT * f64::from(num_experts) / active).ceil() as usize).clamp(32, 4096)
}

impl RoutingTrace {
    /// `count` sampled steps of `batch` sequences. Sequences are drawn in proportion to their tokens, without replacement within a step
    /// while there are any left; a longer batch than there are sequences begins anew. Tokens with choices that were not recorded are
    /// left out.
    ///
    /// # Errors
    /// [`PlanError::BadTrace`] when the part has no token that was recorded in full, or `batch` or `count` is 0.
    pub fn scenarios(&self, part: &Part, batch: u32, count: usize, seed: u64) -> Result<Scenarios, PlanError> {
        if batch == 0 || count == 0 {
            return bad("scenarios", format!("{count} of batch {batch}"), "at least 1 of batch 1 or more");
        }
        let tokens: Vec<Vec<usize>> = self.complete_tokens(part)?;
        let mut rng = StdRng::seed_from_u64(seed);
        let mut scenarios = Scenarios { layers: vec![Vec::with_capacity(count); self.num_moe_layers] };
        let mut weights: Vec<usize> = Vec::new();
        let mut step = Vec::with_capacity(batch as usize);
        for _ in 0..count {
            step.clear();
            let mut left = 0;
            for _ in 0..batch {
                if left == 0 {
                    weights.clear();
                    weights.extend(tokens.iter().map(Vec::len));
                    left = weights.iter().sum();
                }
                let mut at = rng.random_range(0..left);
                let sequence = weights
                    .iter()
                    .position(|w| {
                        let here = at < *w;
                        at -= if here { 0 } else { *w };
                        here
                    })
                    .expect("the draw is below the sum of the weights");
                left -= std::mem::take(&mut weights[sequence]);
                step.push(tokens[sequence][at]);
            }
            self.push_step(&mut scenarios, &step);
        }
        Ok(scenarios)
    }

    /// Steps in the order of time, for caches: `batch` sequences are decoded side by side, and who ends is followed by the next. The
    /// part's tokens, one sequence after the other, are cut into `batch` pieces of equal length; step i takes the i-th token of each.
    ///
    /// # Errors
    /// [`PlanError::BadTrace`] when the part has fewer tokens recorded in full than `batch`, or `batch` is 0.
    pub fn stream(&self, part: &Part, batch: u32) -> Result<Scenarios, PlanError> {
        let tokens: Vec<usize> = self.complete_tokens(part)?.into_iter().flatten().collect();
        let lanes = batch as usize;
        let Some(steps) = tokens.len().checked_div(lanes).filter(|n| *n > 0) else {
            return bad("the batch", batch, format!("1 to {}, the tokens of this part of the trace", tokens.len()));
        };
        let mut scenarios = Scenarios { layers: vec![Vec::with_capacity(steps); self.num_moe_layers] };
        let mut step = Vec::with_capacity(lanes);
        for i in 0..steps {
            step.clear();
            step.extend((0..lanes).map(|lane| tokens[lane * steps + i]));
            self.push_step(&mut scenarios, &step);
        }
        Ok(scenarios)
    }

    /// Tokens of each sequence that were recorded in full; sequences without any are left out.
    fn complete_tokens(&self, part: &Part) -> Result<Vec<Vec<usize>>, PlanError> {
        let complete = |s: &usize| self.sequences[*s].tokens.clone().filter(|t| self.is_complete(*t)).collect();
        let tokens: Vec<Vec<usize>> = part.sequences.iter().map(complete).filter(|t: &Vec<usize>| !t.is_empty()).collect();
        if tokens.is_empty() {
            return bad("the part of the trace", "without any token recorded in full", "at least one");
        }
        Ok(tokens)
    }

    /// Adds the step in which `tokens` are decoded together.
    fn push_step(&self, scenarios: &mut Scenarios, tokens: &[usize]) {
        for (layer, steps) in scenarios.layers.iter_mut().enumerate() {
            let mut active: Vec<u16> = tokens.iter().flat_map(|t| self.chosen(*t, layer)).collect();
            active.sort_unstable();
            active.dedup();
            steps.push(active);
        }
    }
}
