//! The heuristic with proof: starts from greedy, relaxes, rounds, searches locally, and states a lower bound.
//!
//! Where experts of a layer are alike the relaxation is over whole columns of layers ([`super::columns`]); where a trace tells them
//! apart it is the linear program over experts and sampled steps ([`super::relax`]).

use super::{Bound, Greedy, Solution, Solver, columns};
use crate::error::PlanError;
use crate::evaluate::{Placement, Prices};
use crate::problem::Problem;

/// The local-search solver.
#[derive(Debug, Clone, Copy, Default)]
pub struct Local;

impl Solver for Local {
    fn solve(&self, problem: &Problem<'_>, prices: &Prices) -> Result<Solution, PlanError> {
        let greedy = Greedy.solve(problem, prices)?;
        let start_s = prices.objective(problem, &greedy.placement);
        let mut best: (f64, Placement) = (start_s, greedy.placement.clone());
        let mut bound_s = f64::INFINITY;
        let mut saved = Vec::new();
        for form in prices.forms(problem) {
            let Some(found) = columns::solve(problem, &form, std::slice::from_ref(&greedy.placement))? else {
                return Ok(greedy);
            };
            if found.bound_s < bound_s {
                bound_s = found.bound_s;
                saved = found.saved_s_per_byte;
            }
            if let Some(placement) = found.placement {
                let seconds = prices.objective(problem, &placement);
                if seconds < best.0 {
                    best = (seconds, placement);
                }
            }
        }
        let reason = format!(
            "greedy ({}), then columns of whole layers: objective {:.2} % lower",
            greedy.reason,
            (1.0 - best.0 / start_s) * 100.0
        );
        let bound = Some(Bound { seconds: bound_s, method: columns::METHOD.into(), saved_s_per_byte: saved });
        Ok(Solution { placement: best.1, solver: "local", reason, bound })
    }
}
