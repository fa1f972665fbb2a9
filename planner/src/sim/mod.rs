//! The engine's driver on a virtual clock: does what it is told, in the time that the cost model says. No policy here.
//!
//! Loads from one tier run one after the other, computations of one executor too; both run side by side. A trace is replayed token by
//! token, layer by layer, as a single sequence is decoded.

mod costs;
pub mod count;
mod trace;

pub use costs::{ActionCosts, Free, PlanCosts};
pub use trace::Trace;
pub(crate) use trace::UNRECORDED;

use crate::check::CheckedPlan;
use crate::engine::{Action, Engine, Input, SlotId, Statistics};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use tierwise_cost::units::Nanos;

/// What a replay showed.
#[derive(Debug, Clone)]
pub struct Report {
    /// The engine's counts.
    pub statistics: Statistics,
    /// Virtual time it took.
    pub elapsed: Nanos,
    /// Tokens replayed.
    pub tokens: u64,
    /// Everything the engine was told, if recording.
    pub inputs: Vec<(Nanos, Input)>,
    /// Everything it answered, if recording.
    pub actions: Vec<Action>,
    /// Why it stopped early, if it did.
    pub aborted: Option<String>,
}

impl Report {
    /// Tokens per second of virtual time; infinite if nothing cost anything.
    pub fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.elapsed.to_seconds().0
    }
}

/// A completion to come: ordered by time, then by the order in which it was started.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    at: Nanos,
    order: u64,
    what: Done,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Done {
    Load { layer: u32, expert: u32, slot: SlotId },
    Wave { layer: u32, wave: u32 },
}

/// Replays a trace through a fresh engine for `plan`.
///
/// The trace's layers are the plan's MoE layers in order. With `record`, inputs and actions are kept.
pub fn simulate(plan: &CheckedPlan, costs: &dyn ActionCosts, trace: &Trace<'_>, record: bool) -> Report {
    let mut s = Simulator {
        engine: Engine::new(plan),
        costs,
        now: Nanos(0),
        due: BinaryHeap::new(),
        started: 0,
        link_free: vec![Nanos(0); plan.plan().tiers.len()],
        executor_free: vec![Nanos(0); plan.plan().tiers.len() + 1],
        record,
        inputs: Vec::new(),
        actions: Vec::new(),
        aborted: None,
    };
    let mut tokens = 0;
    'tokens: for token in 0..trace.num_tokens() {
        s.now = s.now + costs.outside_layers();
        for (i, layer) in plan.moe_layers().iter().enumerate().take(trace.num_layers()) {
            s.now = s.now + costs.before_experts(*layer);
            if let Some(demand) = trace.demand(token, i, *layer) {
                s.serve(Input::Routed(demand));
            }
            if s.aborted.is_some() {
                break 'tokens;
            }
        }
        tokens += 1;
    }
    Report {
        statistics: s.engine.statistics().clone(),
        elapsed: s.now,
        tokens,
        inputs: s.inputs,
        actions: s.actions,
        aborted: s.aborted,
    }
}

/// The actions of a fresh engine for `plan` under recorded inputs.
pub fn replay(plan: &CheckedPlan, inputs: &[(Nanos, Input)]) -> Vec<Action> {
    let mut engine = Engine::new(plan);
    let mut actions = Vec::new();
    for (now, input) in inputs {
        engine.handle(*now, input.clone());
        while let Some(action) = engine.poll(*now) {
            actions.push(action);
        }
    }
    actions
}

struct Simulator<'a> {
    engine: Engine,
    costs: &'a dyn ActionCosts,
    now: Nanos,
    due: BinaryHeap<Reverse<Due>>,
    started: u64,
    /// When the link of each tier is free.
    link_free: Vec<Nanos>,
    /// When each executor is free.
    executor_free: Vec<Nanos>,
    record: bool,
    inputs: Vec<(Nanos, Input)>,
    actions: Vec<Action>,
    aborted: Option<String>,
}

impl Simulator<'_> {
    /// Gives the demand to the engine and lets time pass until it is served.
    fn serve(&mut self, demand: Input) {
        self.tell(demand);
        while let Some(Reverse(due)) = self.due.pop() {
            self.now = due.at;
            let input = match due.what {
                Done::Load { layer, expert, slot } => Input::Loaded { key: crate::engine::ExpertKey { layer, expert }, slot },
                Done::Wave { layer, wave } => Input::Computed { layer, wave },
            };
            self.tell(input);
            if self.aborted.is_some() {
                return;
            }
        }
    }

    fn tell(&mut self, input: Input) {
        if self.record {
            self.inputs.push((self.now, input.clone()));
        }
        self.engine.handle(self.now, input);
        while let Some(action) = self.engine.poll(self.now) {
            if self.record {
                self.actions.push(action.clone());
            }
            match action {
                Action::Load { key, slot, bytes, from, .. } => {
                    let cost = self.costs.load(key, bytes, from);
                    let at = start(&mut self.link_free[from.0 as usize], self.now, cost);
                    self.push(at, Done::Load { layer: key.layer, expert: key.expert, slot });
                }
                Action::Compute { layer, wave, experts, executor } => {
                    let cost = self.costs.compute(layer, &experts, executor);
                    let at = start(&mut self.executor_free[executor.0 as usize], self.now, cost);
                    self.push(at, Done::Wave { layer, wave });
                }
                Action::Abort { reason } => self.aborted = Some(reason),
                Action::Evict { .. } | Action::Finish { .. } => {}
            }
        }
    }

    fn push(&mut self, at: Nanos, what: Done) {
        self.started += 1;
        self.due.push(Reverse(Due { at, order: self.started, what }));
    }
}

/// Starts something that takes `cost` as soon as `free` and `now` allow; returns its end.
fn start(free: &mut Nanos, now: Nanos, cost: Nanos) -> Nanos {
    *free = (*free).max(now) + cost;
    *free
}
