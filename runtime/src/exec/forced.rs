//! Routers' choices replaced by those of a recorded trace, so that models with random weights run under real routing.

use super::route::Routing;
use std::sync::Arc;
use tierwise_planner::routing::RoutingTrace;

/// A trace and the number of the next token.
#[derive(Debug, Clone, Default)]
pub struct Forced(Option<(Arc<RoutingTrace>, usize)>);

impl Forced {
    /// Token by token from number `first` on; `None`: the routers choose.
    pub const fn new(trace: Option<(Arc<RoutingTrace>, usize)>) -> Self {
        Self(trace)
    }

    /// Whether choices are replaced.
    pub const fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Replaces the choices in the `moe_layer`-th layer with routed experts; `number_of(row)` is the row's number in the step.
    pub fn apply(&self, routing: &mut Routing, moe_layer: usize, number_of: impl Fn(usize) -> usize) {
        let Some((trace, next)) = &self.0 else { return };
        for (t, experts) in routing.experts.chunks_exact_mut(routing.experts_per_token).enumerate() {
            let token = (next + number_of(t)) % trace.num_tokens();
            // A token that was not recorded whole keeps the router's choice.
            if trace.is_complete(token) {
                experts.iter_mut().zip(trace.chosen(token, moe_layer)).for_each(|(e, c)| *e = u32::from(c));
            }
        }
    }

    /// A step of so many tokens is done.
    pub fn advance(&mut self, tokens: usize) {
        if let Some((trace, next)) = &mut self.0 {
            *next = (*next + tokens) % trace.num_tokens();
        }
    }
}
