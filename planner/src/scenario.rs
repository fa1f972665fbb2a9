//! Steps to plan for: which experts a decode step activates in each layer.
//!
//! The expected maximum of branches is not the maximum of their means, so a placement is judged on sampled steps of a trace (sample
//! average approximation, algorithms §2). One scenario is one step of the request's batch.

use crate::error::PlanError;
use crate::problem::MoeLayer;

/// Sampled decode steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scenarios {
    /// Active experts, ascending and without doubles. `[moe layers][scenarios][active experts]`
    pub layers: Vec<Vec<Vec<u16>>>,
}

impl Scenarios {
    /// Number of steps.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, Vec::len)
    }

    /// No step at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn check(&self, layers: &[MoeLayer]) -> Result<(), PlanError> {
        let bad = |found: String, expected: String| Err(PlanError::BadRequest { field: "scenarios", found, expected });
        if self.layers.len() != layers.len() {
            return bad(format!("{} layers", self.layers.len()), format!("the model's {} MoE layers", layers.len()));
        }
        if self.is_empty() {
            return bad("no step".into(), "at least one".into());
        }
        for (steps, layer) in self.layers.iter().zip(layers) {
            if steps.len() != self.len() {
                return bad(format!("{} steps in layer {}", steps.len(), layer.layer), self.len().to_string());
            }
            for step in steps {
                let ascending = step.windows(2).all(|p| p[0] < p[1]);
                if !ascending || step.last().is_some_and(|e| u32::from(*e) >= layer.num_experts) {
                    let expected = format!("ascending numbers below {}", layer.num_experts);
                    return bad(format!("experts {step:?} in layer {}", layer.layer), expected);
                }
            }
        }
        Ok(())
    }
}
