//! Another budget of host memory while a session works.
//!
//! What the slots are to be is decided by the planner: another plan of the same kind for the new budget
//! ([`tierwise_planner::elastic::with_ram`]). Here it is checked that the session can follow it, and handed to the driver, which gets there
//! in stages between demands. Tokens do not change: where an expert's bytes come from is nobody's business.

use super::Session;
use crate::error::{Result, RuntimeError};
use crate::exec::driver::{SlotControl, SlotSizes};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tierwise_cost::units::Bytes;
use tierwise_planner::{CheckedPlan, Request};

/// Changes a session's budget of host memory from any thread.
#[derive(Debug, Clone)]
pub struct BudgetControl {
    plans: Arc<Mutex<Plans>>,
    slots: Arc<SlotControl>,
}

#[derive(Debug)]
struct Plans {
    /// The one that the session is to follow now.
    current: CheckedPlan,
    /// The one before, which holds if the system has no room for the current one.
    before: CheckedPlan,
}

/// The slots under a budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BudgetState {
    /// By pool, with what became of the last change.
    pub sizes: SlotSizes,
    /// Bytes of experts that the slots hold room for.
    pub held: Bytes,
    /// The same when nothing is left to come or to go.
    pub target: Bytes,
}

impl BudgetControl {
    pub(super) fn new(plan: &CheckedPlan, slots: &Arc<SlotControl>) -> Self {
        let plans = Plans { current: plan.clone(), before: plan.clone() };
        Self { plans: Arc::new(Mutex::new(plans)), slots: Arc::clone(slots) }
    }

    fn lock(&self) -> MutexGuard<'_, Plans> {
        // Plans are replaced whole.
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The plan that holds, of `plans`.
    fn holds<'p>(plans: &'p Plans, sizes: &SlotSizes) -> &'p CheckedPlan {
        if sizes.refused.is_some() { &plans.before } else { &plans.current }
    }

    /// The plan that the session follows, or is getting to.
    pub fn plan(&self) -> CheckedPlan {
        Self::holds(&self.lock(), &self.slots.sizes()).clone()
    }

    /// The session is to follow `plan` from its next demand on. It returns at once; [`Self::wait`] waits.
    ///
    /// # Errors
    /// When the session's plan keeps experts elsewhere than in slots in host memory, or `plan` differs from it in more than the budget
    /// of host memory and the numbers of slots. The session then goes on as it was.
    pub fn follow(&self, plan: CheckedPlan) -> Result<()> {
        let mut plans = self.lock();
        let before = Self::holds(&plans, &self.slots.sizes()).clone();
        check_follows(&before, &plan)?;
        self.slots.ask(plan.cache_pools().iter().map(|p| p.slots).collect());
        *plans = Plans { current: plan, before };
        Ok(())
    }

    fn state_of(&self, sizes: SlotSizes) -> BudgetState {
        let pools = self.lock().current.cache_pools();
        let bytes = |slots: &[u32]| slots.iter().zip(&pools).map(|(n, p)| Bytes(p.slot_bytes.0 * u64::from(*n))).sum();
        BudgetState { held: bytes(&sizes.held), target: bytes(&sizes.target), sizes }
    }

    /// What there is now.
    pub fn state(&self) -> BudgetState {
        self.state_of(self.slots.sizes())
    }

    /// Waits until the slots are those of the plan, the session ends, or `most` has passed.
    pub fn wait(&self, most: Duration) -> BudgetState {
        self.state_of(self.slots.wait(most))
    }
}

/// Refuses a plan that a session which follows `current` cannot get to.
fn check_follows(current: &CheckedPlan, new: &CheckedPlan) -> Result<()> {
    let bad = |found: &str, expected: &str| {
        Err(RuntimeError::BadRequest { what: "another budget", found: found.into(), expected: expected.into() })
    };
    if !current.is_elastic() {
        return bad(
            "a session whose plan keeps experts where they cannot be given up",
            "an elastic plan (plan --elastic, or run --control), which keeps experts in slots in host memory alone",
        );
    }
    let but_ram = |plan: &CheckedPlan| {
        let mut request: Request = plan.plan().request.clone();
        request.limits.ram = None;
        request
    };
    let (a, b) = (current.plan(), new.plan());
    let same = new.is_elastic()
        && a.model.fingerprint == b.model.fingerprint
        && (&a.tiers, a.engine, &a.main.memory) == (&b.tiers, b.engine, &b.main.memory)
        && but_ram(current) == but_ram(new)
        && a.layers.iter().zip(&b.layers).all(|(a, b)| a.policy == b.policy);
    if same { Ok(()) } else { bad("a plan of another kind", "the session's own plan with another budget of host memory") }
}

impl Session {
    /// Follows `plan` from now on: the session's own with another budget of host memory ([`tierwise_planner::elastic::with_ram`]). The slots
    /// come and go in stages while the session works; the first of them now.
    ///
    /// # Errors
    /// As [`BudgetControl::follow`], and when the system has no room for more slots. The session then goes on as it was.
    pub fn set_budget(&mut self, plan: CheckedPlan) -> Result<()> {
        self.budget.follow(plan)?;
        self.driver.take_new_sizes();
        match self.budget.state().sizes.refused {
            None => Ok(()),
            Some(found) => Err(RuntimeError::BadRequest {
                what: "another budget",
                found,
                expected: "memory that the system has; the session goes on with the one it had".into(),
            }),
        }
    }

    /// To change the budget from other threads while this one works.
    pub fn budget_control(&self) -> BudgetControl {
        self.budget.clone()
    }

    /// The slots now.
    pub fn budget(&self) -> BudgetState {
        self.budget.state()
    }
}
