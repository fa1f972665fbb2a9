//! Solvers propose placements; [`crate::evaluate`] judges them all.
//!
//! A new solver: one file, one variant of [`SolverKind`], one arm in [`solve`]; the suite in `tests` then holds it to the rules:
//! feasible, never better than exhaustive on tiny problems, never below the lower bound, deterministic.

mod columns;
mod counts;
mod exchange;
mod exhaustive;
pub(crate) mod fill;
mod greedy;
mod ilp;
mod linear;
mod local;
mod merged;
mod mixes;
mod polish;
mod refine;
mod relax;
mod search;
mod slo;
mod slopes;

pub use exhaustive::Exhaustive;
pub use greedy::Greedy;
pub use ilp::Ilp;
pub use local::Local;
pub use refine::refined;

use crate::error::PlanError;
use crate::evaluate::{Placement, Prices, Weights};
use crate::problem::Problem;

/// Most tiers that the convex program handles.
pub(crate) const MAX_TIERS: usize = 32;
/// Most processors and links that the convex program handles.
pub(crate) const MAX_RESOURCES: usize = 64;

/// Which solver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SolverKind {
    /// Exhaustive for tiny problems, the integer program for small ones, else local search; the plan says which and why.
    #[default]
    Auto,
    /// Most seconds saved per byte first, then moves within layers.
    Greedy,
    /// Greedy, then relaxation, rounding and local search, with a lower bound.
    Local,
    /// Integer program: exact; large problems need the feature `highs`.
    Ilp,
    /// Every placement. Tiny problems only.
    Exhaustive,
}

impl std::str::FromStr for SolverKind {
    type Err = PlanError;
    fn from_str(s: &str) -> Result<Self, PlanError> {
        match s {
            "auto" => Ok(Self::Auto),
            "greedy" => Ok(Self::Greedy),
            "local" => Ok(Self::Local),
            "ilp" => Ok(Self::Ilp),
            "exhaustive" => Ok(Self::Exhaustive),
            _ => Err(PlanError::BadRequest {
                field: "solver",
                found: s.into(),
                expected: "auto, greedy, local, ilp or exhaustive".into(),
            }),
        }
    }
}

/// A proposal and how it came about.
#[derive(Debug, Clone)]
pub struct Solution {
    /// The proposal.
    pub placement: Placement,
    /// Name of the solver.
    pub solver: &'static str,
    /// What it chose between.
    pub reason: String,
    /// A lower bound that the solver proved on its way, if any.
    pub bound: Option<Bound>,
    /// What was reached without the request's latency limits, where it has some.
    pub without_slo: Option<WithoutSlo>,
}

/// What a placement takes that ignores the latency limits.
#[derive(Debug, Clone, Copy)]
pub struct WithoutSlo {
    /// The objective.
    pub objective_s: f64,
    /// A decode step.
    pub step_s: f64,
    /// The request's prompt.
    pub ttft_s: f64,
}

/// What no placement can beat.
#[derive(Debug, Clone)]
pub struct Bound {
    /// The objective of every placement is at least this.
    pub seconds: f64,
    /// How it was computed, and what it holds for.
    pub method: String,
    /// What one more byte of each memory would save, in seconds of the objective: the bound's prices. `[memories]`
    pub saved_s_per_byte: Vec<f64>,
}

/// Proposes placements.
pub trait Solver {
    /// A feasible placement.
    ///
    /// # Errors
    /// When there is none, or the problem is too large for this solver.
    fn solve(&self, problem: &Problem<'_>, prices: &Prices) -> Result<Solution, PlanError>;
}

/// Experts of a layer differ in activity, so that which ones are where matters, not only how many.
fn tells_experts_apart(form: &Weights<'_>) -> bool {
    form.iter().flat_map(|(_, table)| &table.classes).any(|class| class.active.windows(2).any(|p| p[0] != p[1]))
}

/// Runs the wanted solver, under the latency limits of the request.
///
/// # Errors
/// Those of [`Solver::solve`]; [`PlanError::Slo`] when nothing was found that keeps the limits.
pub fn solve(problem: &Problem<'_>, prices: &Prices, kind: SolverKind) -> Result<Solution, PlanError> {
    if problem.request.slo.is_none() { unconstrained(problem, prices, kind) } else { slo::solve(problem, prices, kind) }
}

/// Runs the wanted solver. But for exhaustive search, solvers know no latency limits.
fn unconstrained(problem: &Problem<'_>, prices: &Prices, kind: SolverKind) -> Result<Solution, PlanError> {
    match kind {
        SolverKind::Greedy => Greedy.solve(problem, prices),
        SolverKind::Local => Local::default().solve(problem, prices),
        SolverKind::Ilp => {
            let time_limit_s = problem.time_limit_s.unwrap_or(Ilp::default().time_limit_s);
            Ilp { time_limit_s, ..Ilp::default() }.solve(problem, prices)
        }
        SolverKind::Exhaustive => Exhaustive::default().solve(problem, prices),
        SolverKind::Auto => {
            let small = Exhaustive { max_states: 20_000.0 };
            let states = Exhaustive::states(problem);
            let (mut s, why) = if states <= small.max_states {
                (small.solve(problem, prices)?, format!("auto: {states} placement(s), all tried"))
            } else if Ilp::lists_all(problem) {
                (Ilp::default().solve(problem, prices)?, "auto: few ways to place each layer, so an exact program".to_string())
            } else {
                (Local::default().solve(problem, prices)?, "auto: too many placements to try all".to_string())
            };
            s.reason = format!("{why}; {}", s.reason);
            Ok(s)
        }
    }
}

#[cfg(test)]
mod tests;
