//! The crate's one error type.

use thiserror::Error;
use tierwise_cost::CostError;
use tierwise_cost::units::{Bytes, Seconds};

/// Why there is no plan, or why a plan is refused.
#[derive(Debug, Error)]
pub enum PlanError {
    /// A model or machine description is wrong.
    #[error(transparent)]
    Cost(#[from] CostError),
    /// A field of the request is impossible.
    #[error("request: {field} is {found}, expected {expected}")]
    BadRequest {
        /// The field.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// One budget line does not fit its memory.
    #[error(
        "{memory}: {line} needs {needed}, but {available} of {capacity} is left for it; \
         the smallest budget that works is {} ({hint})",
        smallest.rounded_up()
    )]
    NoRoom {
        /// The memory's id.
        memory: String,
        /// The line that does not fit.
        line: String,
        /// Its size.
        needed: Bytes,
        /// What the lines before it left.
        available: Bytes,
        /// The budget of the memory.
        capacity: Bytes,
        /// The smallest capacity of this memory with which all lines fit.
        smallest: Bytes,
        /// Which flag or change.
        hint: String,
    },
    /// The memories together are too small for the routed experts.
    #[error(
        "the routed experts need {needed} and at least one slot per layer in a memory that a processor computes from, \
         but what is left is {places}; the smallest budget that works is {} of {memory} ({hint})",
        smallest.rounded_up()
    )]
    ExpertsDoNotFit {
        /// Bytes of all routed experts.
        needed: Bytes,
        /// Bytes that the memories hold.
        available: Bytes,
        /// What each memory holds, in words.
        places: String,
        /// The memory to enlarge.
        memory: String,
        /// Its smallest sufficient budget.
        smallest: Bytes,
        /// Which flag or change.
        hint: String,
    },
    /// A plan contradicts itself, the model or the machine.
    #[error("plan: {field} is {found}, expected {expected}")]
    BadPlan {
        /// The offending field.
        field: String,
        /// Its value.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// A plan file is not JSON of the schema.
    #[error("plan: {message}; expected a file written by `tierwise plan -o`")]
    BadJson {
        /// The parser's message with line and column.
        message: String,
    },
    /// A plan for something else.
    #[error(
        "the plan was made for {what} {planned_name} ({planned}), not for {name} ({found}); make a new plan with `tierwise plan`"
    )]
    Mismatch {
        /// "model" or "machine".
        what: &'static str,
        /// The plan's name for it.
        planned_name: String,
        /// The plan's fingerprint of it.
        planned: String,
        /// Name of what was given.
        name: String,
        /// Fingerprint of what was given.
        found: String,
    },
    /// A solver cannot take a problem of this size.
    #[error("solver {solver}: {states:.3e} placements, it takes at most {limit:.0e}; use --solver greedy")]
    TooLarge {
        /// The solver.
        solver: &'static str,
        /// Number of placements.
        states: f64,
        /// What it takes.
        limit: f64,
    },
    /// The linear program of the lower bound was not solved.
    #[error("lower bound: the linear program failed: {message}")]
    Bound {
        /// The LP solver's message.
        message: String,
    },
    /// A file of published runs is not in the format.
    #[error("runs: {row}: {field} is {found}, expected {expected}")]
    BadRuns {
        /// The row's id, or which row.
        row: String,
        /// The offending field.
        field: String,
        /// Its value.
        found: String,
        /// What the format wants.
        expected: String,
    },
    /// No placement was found that keeps the latencies asked for.
    #[error(
        "no placement was found with {asked} ({proof}): the fastest first token is {best_ttft} (with decode steps of {step_then}), \
         the fastest decode step {best_tpot} (with a first token after {ttft_then}); what would do: {hint}, or more --vram or --ram, \
         a smaller format, --context or --batch, and for the first token fewer --prompt-tokens"
    )]
    Slo {
        /// The limits, in words.
        asked: String,
        /// Whether it is proven that there is none.
        proof: &'static str,
        /// The fastest first token found.
        best_ttft: Seconds,
        /// The decode step of that placement.
        step_then: Seconds,
        /// The fastest decode step found.
        best_tpot: Seconds,
        /// The first token of that placement.
        ttft_then: Seconds,
        /// Limits that were found to work.
        hint: String,
    },
    /// A routing trace or a table of expert counts contradicts itself or the model.
    #[error("trace: {field} is {found}, expected {expected}")]
    BadTrace {
        /// The offending field.
        field: String,
        /// Its value.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// Loads, devices or replicas that cannot be balanced.
    #[error("balance: {field} is {found}, expected {expected}")]
    BadBalance {
        /// The offending number.
        field: String,
        /// Its value.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// A plan that another engine cannot take.
    #[error("export to {target}: {field} is {found}, expected {expected}")]
    CannotExport {
        /// The engine.
        target: &'static str,
        /// What it cannot take.
        field: String,
        /// Its value.
        found: String,
        /// What it takes, and what to do.
        expected: String,
    },
}
