//! Steps to plan for: which experts a decode step activates in each layer.
//!
//! The expected maximum of branches is not the maximum of their means, so a placement is judged on sampled steps of a trace (sample
//! average approximation, algorithms §2). One scenario is one step of the request's batch.

/// Sampled decode steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scenarios {
    /// Active experts, ascending and without doubles. `[moe layers][scenarios][active experts]`
    pub layers: Vec<Vec<Vec<u16>>>,
}
