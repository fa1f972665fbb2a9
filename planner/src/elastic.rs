//! Plans whose slots may change size while a run goes on: every expert waits on disk, host memory's room is slots.
//!
//! An expert that is computed where it lies in the memory map belongs to no slot: nobody can give up its pages for sure, and nobody chose it
//! for the new budget. So an elastic plan pins none, and what memory there is for experts is slots alone, shared evenly over the layers
//! as the solvers share them. With room for all experts there is a slot for each: then only the first use of an expert reads
//! the disk. What that costs against the best placement is the plan's gap. Another budget is another plan of the same kind
//! ([`with_ram`]), with the same tiers and settings and other numbers of slots, so the engine gets from one to the other by
//! [`crate::engine::Input::Resize`].

use crate::check::CheckedPlan;
use crate::error::PlanError;
use crate::evaluate::{LayerPlacement, Placement};
use crate::make::plan_from_placement;
use crate::plan::{Main, Plan, Tier};
use crate::problem::Problem;
use crate::request::Limits;
use crate::settings::{EXECUTED, default_settings};
use crate::solver::fill::share_slots;
use tierwise_cost::cost::CostModel;
use tierwise_cost::machine::{Machine, MemoryKind, ProcessorKind};
use tierwise_cost::model::ModelSpec;
use tierwise_cost::units::Bytes;

/// The name of the solver in elastic plans.
pub const SOLVER: &str = "elastic";

/// Leaves of the tiers the main processor's memory and the disk from which experts are loaded into it.
pub(crate) fn keep_disk(machine: &Machine, main: &Main, tiers: &mut Vec<Tier>) -> Result<(), PlanError> {
    let bad = |found: String, expected: &str| Err(PlanError::BadRequest { field: "elastic", found, expected: expected.into() });
    if main.executor_kind != ProcessorKind::Cpu {
        return bad(
            format!("a plan with {} as main processor", main.executor),
            "a plan for the CPU alone (--vram 0B): only slots in host memory can change size while a run goes on",
        );
    }
    tiers.retain(|t| t.memory == main.memory || is_home(main, t));
    if !tiers.iter().any(|t| is_home(main, t)) {
        return bad(format!("wanted on {}, which has no disk", machine.name), "a machine with a disk that experts are read from");
    }
    Ok(())
}

/// Whether experts of this tier wait on disk for slots in the main processor's memory.
fn is_home(main: &Main, t: &Tier) -> bool {
    t.kind == MemoryKind::Disk && t.through.as_ref() == Some(&main.memory)
}

impl CheckedPlan {
    /// Whether the plan's slots may change size while a run goes on: it keeps no expert but in slots in the CPU's memory.
    pub fn is_elastic(&self) -> bool {
        let main = &self.plan().main;
        let tiers = &self.plan().tiers;
        let elastic = |run: &crate::plan::ExpertRun| is_home(main, &tiers[run.tier as usize]);
        main.executor_kind == ProcessorKind::Cpu && self.plan().layers.iter().all(|l| l.runs.iter().all(elastic))
    }
}

/// The elastic plan for a problem made by [`Problem::elastic`].
///
/// # Errors
/// [`PlanError::ExpertsDoNotFit`] when there is no room for a slot per layer.
pub fn elastic_plan(problem: &Problem<'_>, cost: &dyn CostModel) -> Result<Plan, PlanError> {
    let mut plan = plan_with_staging(problem, cost, Bytes::ZERO)?;
    default_settings(&mut plan, EXECUTED);
    Ok(plan)
}

/// The plan that takes the place of `plan`, which must be elastic, when host memory's budget is `ram`.
///
/// # Errors
/// [`PlanError::NoRoom`] or [`PlanError::ExpertsDoNotFit`] with the smallest budget that works, [`PlanError::BadRequest`] for more than
/// the machine has, [`PlanError::BadPlan`] when `plan` is not elastic or of another machine.
pub fn with_ram(
    plan: &CheckedPlan,
    spec: &ModelSpec,
    machine: &Machine,
    cost: &dyn CostModel,
    ram: Bytes,
) -> Result<CheckedPlan, PlanError> {
    let old = plan.plan();
    let bad = |found: String, expected: String| Err(PlanError::BadPlan { field: "its experts' places".into(), found, expected });
    if !plan.is_elastic() {
        return bad("memory that they cannot leave".into(), "slots alone: plan with --elastic".into());
    }
    let mut request = old.request.clone();
    request.limits.ram = Some(ram);
    let problem = Problem::elastic(spec, machine, request)?;
    if problem.tiers != old.tiers || problem.main.executor != old.main.executor {
        let names = |tiers: &[Tier]| tiers.iter().map(Tier::describe).collect::<Vec<_>>().join("; ");
        return bad(names(&old.tiers), format!("those of {}: {}", machine.name, names(&problem.tiers)));
    }
    let largest = old.layers.iter().map(|l| l.expert_bytes.0).max().unwrap_or(0);
    let staging = Bytes(largest.saturating_mul(u64::from(old.engine.staging_slots)));
    let mut new = plan_with_staging(&problem, cost, staging)?;
    new.engine = old.engine;
    new.settings.clone_from(&old.settings);
    for (new, old) in new.layers.iter_mut().zip(&old.layers) {
        new.policy = old.policy;
    }
    new.check(spec, Some(machine))
}

/// All experts on disk, all room but `staging` in slots.
fn plan_with_staging(problem: &Problem<'_>, cost: &dyn CostModel, staging: Bytes) -> Result<Plan, PlanError> {
    let home = problem.tiers.iter().position(|t| is_home(&problem.main, t)).unwrap_or(0) as u8;
    let memory = problem.memory_index(&problem.main.memory);
    let room = problem.room[memory];
    let layer = |experts: u32| LayerPlacement { tier_of: vec![home; experts as usize], slots: 0 };
    let mut placement = Placement { layers: problem.layers.iter().map(|l| layer(l.num_experts)).collect() };
    share_slots(problem, &mut placement, home, room.saturating_sub(staging).0);
    if placement.layers.iter().any(|l| l.slots == 0) {
        let needed = problem.layers.iter().map(|l| l.expert_bytes).sum::<Bytes>() + staging;
        let smallest = problem.capacity[memory] + needed.saturating_sub(room);
        return Err(PlanError::ExpertsDoNotFit {
            needed: problem.expert_bytes(),
            available: room,
            places: format!("{} {room}, of which {staging} are for experts that pass through", problem.main.memory),
            memory: problem.main.memory.clone(),
            smallest,
            hint: format!("{} {}", Limits::flag(MemoryKind::Dram), smallest.rounded_up()),
        });
    }
    let mut plan = plan_from_placement(problem, cost, placement)?;
    plan.solver = SOLVER.into();
    plan.solver_reason = "every expert waits on disk for a slot, so that the budget may change while a run goes on".into();
    Ok(plan)
}
