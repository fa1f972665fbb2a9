//! The engine's driver: does what the planner's engine decides, and tells it what happened.
//!
//! One demand at a time: loads are handed to the loader, waves are computed by the caller's [`Compute`] while they run, and the
//! demand ends with the engine's `Finish`. Loads ahead of time go on between demands. The driver decides nothing; the simulator is
//! the engine's other driver.
//!
//! A device's waves are submitted before those of the CPU are computed, so that both run at once, and count as computed when they are
//! submitted: what follows on the device is in order. Only a copy into a slot could overtake a wave that reads it, so it is held back
//! until the device has done what was submitted.

mod resize;

pub use resize::{SlotControl, SlotSizes};

use super::experts::ExpertBytes;
use super::loader::{DevicePlace, Loaded, Loader, SlotBuffer};
use super::slots::ExpertSlots;
use crate::error::{Result, RuntimeError};
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tierwise_cost::units::Nanos;
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::engine::{Action, Demand, Engine, ExecutorId, ExpertKey, Input, Location, Purpose, SlotId, Statistics};

/// With so many tokens a layer takes much longer than to wait for the device and to begin anew.
const LONG_STEP_TOKENS: u32 = 32;

/// What went into the engine and what came out, for replay.
#[derive(Debug, Default, Clone)]
pub struct Recording {
    /// The times by which the engine decided, if it had some.
    pub costs: Option<Arc<EngineCosts>>,
    /// Inputs with their instants.
    pub inputs: Vec<(Nanos, Input)>,
    /// Actions in order.
    pub actions: Vec<Action>,
}

/// What the router of a later layer makes of the current hidden state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreseen {
    /// The later layer.
    pub layer: u32,
    /// How many layers with routed experts on: 1 for the next.
    pub distance: u32,
    /// As [`Demand::scores`].
    pub scores: Vec<(u32, u32)>,
}

/// Experts to compute at once.
pub enum Wave<'a> {
    /// On the CPU, from host memory.
    Host(&'a [(u32, ExpertBytes<'a>)]),
    /// On the device, from a slot or (`None`) from where the plan keeps them there.
    Device(&'a [(u32, Option<DevicePlace>)]),
}

/// Who computes a demand.
pub trait Compute<'m> {
    /// The bytes of an expert that the plan keeps in host memory.
    fn resident(&self, expert: u32) -> ExpertBytes<'m>;

    /// Guesses at later layers. Called once, as soon as the demand's first loads and waves on a device are under way.
    fn foresee(&mut self) -> Vec<Foreseen>;

    /// Computes a wave; on a device it need only be submitted.
    ///
    /// # Errors
    /// When the device refuses.
    fn compute(&mut self, wave: Wave<'_>) -> Result<()>;

    /// Waits until the device has done what was submitted.
    ///
    /// # Errors
    /// When the device is lost.
    fn finish_device(&mut self) -> Result<()>;
}

/// Where the time of demands went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DriverTimes {
    /// Computing experts on the CPU.
    pub computing: Duration,
    /// Handing experts to the device.
    pub submitting: Duration,
    /// Waiting for loads with nothing to compute.
    pub waiting: Duration,
    /// Asking later layers' routers.
    pub foreseeing: Duration,
}

/// A wave that the engine wants computed.
struct PendingWave {
    layer: u32,
    wave: u32,
    experts: Vec<(u32, Location)>,
    executor: ExecutorId,
    on_device: bool,
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
    times: DriverTimes,
    /// Actions not carried out yet.
    pending: VecDeque<Action>,
    /// Loads ahead of time that are under way.
    prefetching: Vec<ExpertKey>,
    /// Who computes on the device, if there is one.
    device: Option<ExecutorId>,
    /// Slots on the device that waves read which may not be done yet.
    read_by_device: HashSet<SlotId>,
    /// Loads into such slots.
    held: Vec<(ExpertKey, SlotId, Purpose)>,
    /// Why the engine gave up; nothing works after that.
    stopped: Option<String>,
    /// Whoever changes the number of slots.
    control: Arc<SlotControl>,
    /// Memory for slots that the engine is about to add. `[pools]`
    spare: Vec<Vec<SlotBuffer>>,
}

impl Driver {
    /// A driver for `engine`, which is fresh and decides by `costs`.
    pub fn new(engine: Engine, slots: ExpertSlots, loader: Loader, costs: Option<Arc<EngineCosts>>, record: bool) -> Self {
        let recording = record.then(|| Recording { costs, ..Recording::default() });
        let driver = Self {
            engine,
            slots,
            loader,
            start: Instant::now(),
            step: 0,
            recording,
            times: DriverTimes::default(),
            pending: VecDeque::new(),
            prefetching: Vec::new(),
            device: None,
            read_by_device: HashSet::new(),
            held: Vec::new(),
            stopped: None,
            control: Arc::default(),
            spare: Vec::new(),
        };
        driver.tell_sizes();
        driver
    }

    /// The same where waves of `executor` are computed by a device.
    #[must_use]
    pub fn with_device(mut self, executor: ExecutorId) -> Self {
        self.device = Some(executor);
        self
    }

    /// The device has done all that was submitted: what its waves read may be overwritten.
    pub fn device_is_idle(&mut self) {
        self.read_by_device.clear();
        for (key, slot, purpose) in std::mem::take(&mut self.held) {
            self.submit(key, slot, purpose);
        }
    }

    /// The engine, to look at.
    pub const fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The slots, to look at.
    pub const fn slots(&self) -> &ExpertSlots {
        &self.slots
    }

    /// The loader, to look at.
    pub const fn loader(&self) -> &Loader {
        &self.loader
    }

    /// The loader, to slow it down.
    pub const fn loader_mut(&mut self) -> &mut Loader {
        &mut self.loader
    }

    /// Where the time of demands went.
    pub const fn times(&self) -> DriverTimes {
        self.times
    }

    /// Whether anything is ever loaded, so that router scores are of use.
    pub fn loads_experts(&self) -> bool {
        self.slots.counts().any(|n| n > 0)
    }

    /// Waits until nothing is under way, so that slots can be looked at.
    pub fn settle(&mut self) {
        while let Some(done) = self.loader.wait() {
            self.arrived(done);
            self.start_loads();
        }
    }

    /// Between demands: what came ahead of time is told, and what is to come next is asked for, so that links do not idle while the
    /// rest of the model is computed.
    pub fn keep_loading(&mut self) {
        if self.loader.is_idle() {
            return;
        }
        self.take_arrivals();
        self.start_loads();
    }

    /// Carries out what the engine wants while no demand is served: loads alone.
    fn start_loads(&mut self) {
        while let Some(action) = self.pending.pop_front() {
            let left = self.carry_out(action);
            debug_assert!(left.is_none(), "nothing is computed outside a demand");
        }
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

    /// Serves a layer's demand of this step: `work` computes wave after wave until all are done, each expert exactly once.
    ///
    /// # Errors
    /// When an expert cannot be had, even after the engine's retries, or the device fails. The driver is of no use after that.
    pub fn serve<'m>(&mut self, demand: Demand /* its step is set here */, work: &mut dyn Compute<'m>) -> Result<()> {
        let (layer, long) = (demand.layer, demand.tokens >= LONG_STEP_TOKENS);
        self.take_new_sizes();
        // What came ahead of time is there when hits are judged; what is still to come does not wait behind other guesses.
        self.take_arrivals();
        self.start_loads();
        for key in self.prefetching.iter().filter(|k| k.layer == layer) {
            if demand.experts.binary_search_by_key(&key.expert, |e| e.0).is_ok() {
                self.loader.promote(*key);
                self.held.iter_mut().filter(|(k, ..)| k == key).for_each(|(.., purpose)| *purpose = Purpose::Demand);
            }
        }
        self.input(Input::Routed(Demand { step: self.step, ..demand }));
        let mut foreseen = false;
        let mut waves: VecDeque<PendingWave> = VecDeque::new();
        let mut finished = false;
        loop {
            while let Some(action) = self.pending.pop_front() {
                match self.carry_out(action) {
                    Some(Action::Compute { layer, wave, experts, executor }) => {
                        waves.push_back(PendingWave { layer, wave, experts, executor, on_device: self.device == Some(executor) });
                    }
                    Some(Action::Finish { .. }) => finished = true,
                    _ => {}
                }
            }
            if let Some(reason) = &self.stopped {
                return Err(RuntimeError::ExpertsUnavailable { layer, reason: reason.clone() });
            }
            if let Some(at) = waves.iter().position(|w| w.on_device) {
                let wave = waves.remove(at).expect("found");
                self.on_device(wave, work)?;
            } else if !foreseen {
                foreseen = true;
                let start = Instant::now();
                let guesses = work.foresee();
                if !guesses.is_empty() {
                    self.times.foreseeing += start.elapsed();
                    for Foreseen { layer, distance, scores } in guesses {
                        self.input(Input::Foreseen { step: self.step, layer, distance, scores });
                    }
                }
            } else if let Some(wave) = waves.pop_front() {
                // Waves of different processors (sockets) are computed together, each by the threads beside its experts.
                let mut together = vec![wave];
                while let Some(at) = waves.iter().position(|w| together.iter().all(|t| t.executor != w.executor)) {
                    together.extend(waves.remove(at));
                }
                self.on_host(&together, work)?;
            } else if finished {
                if long && !self.held.is_empty() {
                    // Experts of a prompt's next layer are to come while its attention is computed, not only after its router was read.
                    work.finish_device()?;
                    self.device_is_idle();
                }
                return Ok(());
            } else {
                let start = Instant::now();
                if !self.held.is_empty() {
                    work.finish_device()?;
                    self.device_is_idle();
                } else {
                    match self.loader.wait() {
                        Some(done) => self.arrived(done),
                        None => self.stopped = Some("the engine waits for nothing: an error in Tierwise".to_string()),
                    }
                }
                self.times.waiting += start.elapsed();
            }
        }
    }

    fn on_device<'m>(&mut self, wave: PendingWave, work: &mut dyn Compute<'m>) -> Result<()> {
        let mut experts = Vec::with_capacity(wave.experts.len());
        for (expert, location) in wave.experts {
            let place = match location {
                Location::Resident => None,
                Location::Slot(slot) => {
                    self.read_by_device.insert(slot);
                    self.slots.device_place(slot)
                }
            };
            experts.push((expert, place));
        }
        let start = Instant::now();
        work.compute(Wave::Device(&experts))?;
        self.times.submitting += start.elapsed();
        self.input(Input::Computed { layer: wave.layer, wave: wave.wave });
        Ok(())
    }

    /// Computes waves of one layer.
    fn on_host<'m>(&mut self, waves: &[PendingWave], work: &mut dyn Compute<'m>) -> Result<()> {
        let layer = waves.first().map_or(0, |w| w.layer);
        let place = |(expert, location): &(u32, Location)| match location {
            Location::Resident => (*expert, work.resident(*expert)),
            Location::Slot(slot) => (*expert, self.slots.expert(ExpertKey { layer, expert: *expert }, *slot)),
        };
        let wanted = || waves.iter().flat_map(|w| &w.experts);
        let experts: Vec<(u32, ExpertBytes<'_>)> = wanted().map(place).collect();
        let start = Instant::now();
        let at_home = wanted().filter(|(_, location)| *location == Location::Resident).map(|(expert, _)| *expert);
        let earliest = self.loader.read_in_place(layer, at_home);
        work.compute(Wave::Host(&experts))?;
        if let Some(left) = earliest.and_then(|end| end.checked_duration_since(Instant::now())) {
            std::thread::sleep(left);
        }
        self.times.computing += start.elapsed();
        // What arrived meanwhile is told first, so that the next wave takes all of it.
        self.take_arrivals();
        for wave in waves {
            self.input(Input::Computed { layer, wave: wave.wave });
        }
        Ok(())
    }

    /// Starts the loads that the plan wants before the first demand.
    pub fn begin(&mut self) {
        self.input(Input::Begin);
        self.start_loads();
    }

    /// Does what needs nobody else; gives back what does.
    fn carry_out(&mut self, action: Action) -> Option<Action> {
        match action {
            Action::Evict { .. } => None,
            Action::Allocate { slot } => {
                self.allocate(slot);
                None
            }
            Action::Release { slot } => {
                self.release(slot);
                None
            }
            Action::Load { key, slot, purpose, .. } => {
                if purpose == Purpose::Prefetch {
                    self.prefetching.push(key);
                }
                if self.read_by_device.contains(&slot) {
                    self.held.push((key, slot, purpose));
                } else {
                    self.submit(key, slot, purpose);
                }
                None
            }
            Action::Abort { reason } => {
                self.stopped = Some(reason);
                None
            }
            other => Some(other),
        }
    }

    fn submit(&mut self, key: ExpertKey, slot: SlotId, purpose: Purpose) {
        match self.slots.device_place(slot) {
            Some(place) => self.loader.submit_copy(key, slot, place, purpose),
            None => {
                let buffer = self.slots.take(slot);
                self.loader.submit(key, slot, buffer, purpose);
            }
        }
    }

    fn take_arrivals(&mut self) {
        while let Some(done) = self.loader.try_wait() {
            self.arrived(done);
        }
    }

    fn arrived(&mut self, done: Loaded) {
        self.prefetching.retain(|k| *k != done.key);
        self.slots.put_back(done.slot, done.buffer);
        self.input(match done.result {
            Ok(()) => Input::Loaded { key: done.key, slot: done.slot },
            Err(reason) => Input::Failed { key: done.key, slot: done.slot, reason },
        });
    }

    fn now(&self) -> Nanos {
        Nanos(self.start.elapsed().as_nanos().try_into().unwrap_or(u64::MAX))
    }

    /// Tells the engine, and takes its answer at once: a replay then sees the actions after the same inputs.
    fn input(&mut self, input: Input) {
        let now = self.now();
        if let Some(r) = &mut self.recording {
            r.inputs.push((now, input.clone()));
        }
        self.engine.handle(now, input);
        while let Some(action) = self.engine.poll(now) {
            if let Some(r) = &mut self.recording {
                r.actions.push(action.clone());
            }
            self.pending.push_back(action);
        }
    }
}
