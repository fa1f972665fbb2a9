//! Every decision, at plan time and at run time. Sans-IO: no clock, no file, no thread, no device.
//!
//! * [`request`]: what a plan is wanted for; [`problem`]: model + machine + request, and what may go where.
//! * [`budget`]: every byte of every memory has a line.
//! * [`evaluate`]: owns the objective and the feasibility check; judges what solvers propose.
//! * [`solver`]: propose placements; [`lower_bound`]: what no placement can beat.
//! * [`plan`]: the plan file; [`check`]: the only way to a [`CheckedPlan`]; [`explain`]: why each expert is where it is.
//! * [`elastic`]: plans whose slots may change size while a run goes on.
//! * [`settings`]: how the engine is to work, chosen by replaying a trace.
//! * [`balance`]: experts over many devices; [`export`]: plans in the words of other engines.
//! * [`engine`]: the run-time brain; [`sim`]: its driver on a virtual clock.

#![forbid(unsafe_code)]

pub mod balance;
pub mod baselines;
pub mod budget;
pub mod capacity;
pub mod check;
pub mod elastic;
pub mod engine;
pub mod error;
pub mod evaluate;
pub mod explain;
pub mod export;
pub mod held_out;
pub mod hits;
pub mod lower_bound;
pub mod make;
pub mod marginal;
pub mod plan;
pub mod predict;
pub mod price;
pub mod problem;
pub mod request;
pub mod routing;
pub mod scenario;
pub mod serving;
pub mod settings;
pub mod sim;
pub mod solver;

pub use check::CheckedPlan;
pub use error::PlanError;
pub use make::{make_plan, plan_from_placement};
pub use plan::Plan;
pub use problem::Problem;
pub use request::{Goal, Limits, Objective, Popularity, Request, SloLimits, Workload};
pub use solver::SolverKind;
