//! The engine's driver: does what the planner's engine decides, and tells it what happened.
//!
//! One demand at a time: loads are handed to reader threads, waves are computed by the caller's function while they run, and the
//! demand ends with the engine's `Finish`. The driver decides nothing; the simulator is the engine's other driver.

use super::experts::ExpertBytes;
use super::loader::{Loaded, Loader};
use super::slots::ExpertSlots;
use crate::error::{Result, RuntimeError};
use std::collections::VecDeque;
use std::time::Instant;
use tierwise_cost::units::Nanos;
use tierwise_planner::engine::{Action, Demand, Engine, Input, Location, Statistics};

/// What went into the engine and what came out, for replay.
#[derive(Debug, Default, Clone)]
pub struct Recording {
    /// Inputs with their instants.
    pub inputs: Vec<(Nanos, Input)>,
    /// Actions in order.
    pub actions: Vec<Action>,
}

/// Runs an engine against the wall clock.
#[derive(Debug)]
pub struct Driver {
    engine: Engine,
    slots: ExpertSlots,
    loader: Loader,
    start: Instant,
    step: u64,
    recording: Option<Recording>,
    /// Why the engine gave up; nothing works after that.
    stopped: Option<String>,
}

impl Driver {
    /// A driver for `engine`, which is fresh.
    pub fn new(engine: Engine, slots: ExpertSlots, loader: Loader, record: bool) -> Self {
        let recording = record.then(Recording::default);
        Self { engine, slots, loader, start: Instant::now(), step: 0, recording, stopped: None }
    }

    /// The engine's counters.
    pub fn statistics(&self) -> Statistics {
        self.engine.statistics().clone()
    }

    /// What was recorded so far, if the driver records.
    pub const fn recording(&self) -> Option<&Recording> {
        self.recording.as_ref()
    }

    /// Begins the next step.
    pub fn begin_step(&mut self) {
        self.step += 1;
    }

    /// Serves a layer's demand of this step: calls `compute` with each wave's experts until all are done.
    ///
    /// `resident` gives the bytes of an expert that the plan keeps in memory. Each expert is computed exactly once.
    ///
    /// # Errors
    /// When an expert cannot be read, even after the engine's retries. The driver is of no use after that.
    pub fn serve<'m>(
        &mut self,
        demand: Demand, // its step is set here
        resident: impl Fn(u32) -> ExpertBytes<'m>,
        mut compute: impl FnMut(&[(u32, ExpertBytes<'_>)]),
    ) -> Result<()> {
        let layer = demand.layer;
        self.input(Input::Routed(Demand { step: self.step, ..demand }));
        let mut waves = VecDeque::new();
        loop {
            while let Some(action) = self.poll() {
                match action {
                    Action::Evict { .. } => {}
                    Action::Load { key, slot, .. } => self.loader.submit(key, slot, self.slots.take(slot)),
                    Action::Compute { layer: of, wave, experts, .. } => waves.push_back((of, wave, experts)),
                    Action::Finish { .. } => return Ok(()),
                    Action::Abort { reason } => self.stopped = Some(reason),
                }
            }
            if let Some(reason) = &self.stopped {
                return Err(RuntimeError::ExpertsUnavailable { layer, reason: reason.clone() });
            }
            if let Some((of, wave, experts)) = waves.pop_front() {
                let bytes: Vec<(u32, ExpertBytes<'_>)> = experts
                    .iter()
                    .map(|(expert, location)| match location {
                        Location::Resident => (*expert, resident(*expert)),
                        Location::Slot(slot) => (*expert, self.slots.expert(of, *slot)),
                    })
                    .collect();
                compute(&bytes);
                // What arrived meanwhile is told first, so that the next wave takes all of it.
                while let Some(done) = self.loader.try_wait() {
                    self.arrived(done);
                }
                self.input(Input::Computed { layer: of, wave });
            } else if let Some(done) = self.loader.wait() {
                self.arrived(done);
            } else {
                self.stopped = Some("the engine waits for nothing: an error in Tierwise".to_string());
            }
        }
    }

    fn arrived(&mut self, done: Loaded) {
        self.slots.put_back(done.slot, done.buffer);
        self.input(match done.result {
            Ok(()) => Input::Loaded { key: done.key, slot: done.slot },
            Err(reason) => Input::Failed { key: done.key, slot: done.slot, reason },
        });
    }

    fn now(&self) -> Nanos {
        Nanos(self.start.elapsed().as_nanos().try_into().unwrap_or(u64::MAX))
    }

    fn input(&mut self, input: Input) {
        let now = self.now();
        if let Some(r) = &mut self.recording {
            r.inputs.push((now, input.clone()));
        }
        self.engine.handle(now, input);
    }

    fn poll(&mut self) -> Option<Action> {
        let action = self.engine.poll(self.now());
        if let (Some(r), Some(a)) = (&mut self.recording, &action) {
            r.actions.push(a.clone());
        }
        action
    }
}
