//! The engine's driver on a virtual clock: does what it is told, in the time that the plan's prices say. No policy here.
//!
//! Resources are the plan's processors and the links that its copies use. Each does one thing at a time, in the order asked; all run
//! side by side. Where a copy reads the memory from which a processor computes, the processor ends later by what the copy takes
//! ([`crate::engine::costs::TierTime::contended`]); where that memory is not the processor's home, by as much of that as it computes from
//! there. Links into one GPU share its slot on the bus: together they copy no faster than that. Copies of guesses go on while other layers
//! compute.

pub mod choice;
pub mod count;
pub mod setup;
pub mod study;
mod timeline;
mod trace;
mod workload;

pub use timeline::{Slice, Timeline};
pub use trace::Trace;
pub(crate) use trace::UNRECORDED;
pub use workload::{Step, Workload};

use crate::check::CheckedPlan;
use crate::engine::cache::CachePolicy;
use crate::engine::costs::EngineCosts;
use crate::engine::{Action, Engine, ExecutorId, ExpertKey, Input, Location, SlotId, Statistics};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use tierwise_cost::units::{Bytes, Nanos};

/// What to keep of a replay beside its counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Keep {
    /// Everything that went into the engine and came out.
    pub record: bool,
    /// What every resource did when.
    pub timeline: bool,
}

/// Time and tokens of the steps of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spent {
    /// Steps.
    pub steps: u64,
    /// Tokens.
    pub tokens: u64,
    /// Virtual time.
    pub time: Nanos,
}

impl Spent {
    /// Tokens per second of virtual time; infinite if nothing took time, 0 without tokens.
    pub fn tokens_per_s(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.tokens as f64 / self.time.to_seconds().0 }
    }
}

/// What a replay showed.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// The engine's counts.
    pub statistics: Statistics,
    /// The engine's counts after the first tenth of the steps: until then a cache is called cold.
    pub cold: Statistics,
    /// Virtual time it took.
    pub elapsed: Nanos,
    /// Steps of one token per sequence.
    pub decode: Spent,
    /// Steps that are parts of prompts.
    pub prefill: Spent,
    /// Time of every step.
    pub step_times: Vec<Nanos>,
    /// Time that each processor and each link was busy from the first step to the end of the last, by its name: processors as the plan
    /// has them, the main one first, then links.
    pub busy: Vec<(String, Nanos)>,
    /// Bytes asked for over each link (the last hop into the slots' memory) since the first step, by its name.
    pub bytes_by_link: Vec<(String, Bytes)>,
    /// Everything the engine was told, if recording.
    pub inputs: Vec<(Nanos, Input)>,
    /// Everything it answered, if recording.
    pub actions: Vec<Action>,
    /// What happened when, if kept.
    pub timeline: Timeline,
    /// Why it stopped early, if it did.
    pub aborted: Option<String>,
}

impl Report {
    /// Share of requests found in place after the first tenth of the steps.
    pub fn steady_hit_rate(&self) -> f64 {
        let requests = self.statistics.requests - self.cold.requests;
        if requests == 0 { 1.0 } else { (self.statistics.hits - self.cold.hits) as f64 / requests as f64 }
    }

    /// Time during which the main processor computed nothing: it waited for copies, or for another processor.
    pub fn main_idle(&self) -> Nanos {
        Nanos(self.elapsed.0.saturating_sub(self.busy.first().map_or(0, |b| b.1.0)))
    }

    /// Share of the time during which the busiest resource is busy, and which it is: at 1 nothing but that resource can be faster.
    pub fn busiest(&self) -> Option<(&str, f64)> {
        let (name, busy) = self.busy.iter().max_by_key(|(_, b)| b.0)?;
        Some((name, busy.to_seconds().0 / self.elapsed.to_seconds().0))
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
    /// The next layer's router has spoken.
    Router,
    Load {
        layer: u32,
        expert: u32,
        slot: SlotId,
    },
    Wave {
        layer: u32,
        wave: u32,
        executor: u32,
    },
}

/// A copy, waiting or under way, that reads the memory from which an executor computes.
#[derive(Debug, Clone, Copy)]
struct Copying {
    begin: Nanos,
    end: Nanos,
    /// What it takes from the reading of that executor, if that reads all the while.
    contended: Nanos,
    reader: u32,
    /// Only of what is read from this memory, by its first tier; `None`: the reader's home.
    of: Option<usize>,
}

/// What an executor is doing.
#[derive(Debug, Clone, Default)]
struct Running {
    begin: Nanos,
    /// By how much copies have delayed it so far.
    late: u64,
    /// How long it takes alone.
    took: Nanos,
    /// Parts of that by the memory that is read (its first tier), as far as memories are anybody's but the executor's home.
    reads: Vec<(usize, Nanos)>,
}

impl Running {
    /// The part of its time in which it reads what a copy reads.
    fn share(&self, c: &Copying) -> f64 {
        let Some(of) = c.of else { return 1.0 };
        let read: u64 = self.reads.iter().filter(|(memory, _)| *memory == of).map(|(_, t)| t.0).sum();
        if self.took.0 == 0 { 0.0 } else { read as f64 / self.took.0 as f64 }
    }
}

impl Copying {
    /// What it takes between `from` and `to`.
    fn takes(&self, from: Nanos, to: Nanos) -> u64 {
        let both = to.0.min(self.end.0).saturating_sub(from.0.max(self.begin.0));
        (u128::from(self.contended.0) * u128::from(both) / u128::from((self.end.0 - self.begin.0).max(1))) as u64
    }
}

/// Replays a workload through a fresh engine for `plan`. Without `costs` nothing takes time: only hits are counted.
///
/// The trace's layers are the plan's MoE layers in order.
pub fn simulate(plan: &CheckedPlan, costs: Option<&Arc<EngineCosts>>, workload: &Workload<'_>, keep: Keep) -> Report {
    let engine = match costs {
        Some(c) => Engine::with_costs(plan, Arc::clone(c)),
        None => Engine::new(plan),
    };
    drive(engine, plan, costs, workload, keep)
}

/// [`simulate`] with these policies in place of the plan's, as [`Engine::with_policies`] takes them.
///
/// # Panics
/// If there are not as many policies as pools.
pub fn simulate_with_policies(
    plan: &CheckedPlan,
    costs: Option<&Arc<EngineCosts>>,
    policies: Vec<Box<dyn CachePolicy>>,
    workload: &Workload<'_>,
    keep: Keep,
) -> Report {
    drive(Engine::with_policies(plan, costs.map(Arc::clone), policies), plan, costs, workload, keep)
}

fn drive(engine: Engine, plan: &CheckedPlan, costs: Option<&Arc<EngineCosts>>, workload: &Workload<'_>, keep: Keep) -> Report {
    let executors = plan.executors().len();
    let links = costs.map_or(0, |c| c.links.len());
    let names = plan.executors().iter().map(|e| e.id.clone());
    let link_names = costs.iter().flat_map(|c| c.links.iter().map(|l| format!("{}->{}", l.from, l.to)));
    let mut s = Simulator {
        plan,
        engine,
        costs: costs.map(Arc::as_ref),
        now: Nanos(0),
        due: BinaryHeap::new(),
        at_once: VecDeque::new(),
        started: 0,
        free: vec![Nanos(0); executors + links],
        running: vec![Running::default(); executors],
        ports: HashMap::new(),
        shares_reads: costs.is_some_and(|c| c.layers.iter().flat_map(|l| &l.tiers).any(|t| t.shared_reads.0 > 0)),
        copying: Vec::new(),
        tokens_of: Vec::new(),
        finished: true,
        keep,
        report: Report {
            busy: names.chain(link_names).map(|n| (n, Nanos(0))).collect(),
            cold: Statistics::default(),
            ..Report::default()
        },
    };
    s.report.bytes_by_link = s.report.busy[executors..].iter().map(|(n, _)| (n.clone(), Bytes::ZERO)).collect();
    s.report.timeline.resources = s.report.busy.iter().map(|(n, _)| n.clone()).collect();
    s.run(workload);
    let Simulator { mut report, engine, now, .. } = s;
    report.statistics = engine.statistics().clone();
    report.elapsed = now;
    report
}

/// The actions of a fresh engine under recorded inputs.
pub fn replay(mut engine: Engine, inputs: &[(Nanos, Input)]) -> Vec<Action> {
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
    plan: &'a CheckedPlan,
    engine: Engine,
    costs: Option<&'a EngineCosts>,
    now: Nanos,
    due: BinaryHeap<Reverse<Due>>,
    /// Answers that take no time.
    at_once: VecDeque<Input>,
    started: u64,
    /// When each resource is free: executors, then links.
    free: Vec<Nanos>,
    /// By executor.
    running: Vec<Running>,
    /// When the way into a GPU's memory has carried all that was put on it, by the memory's name.
    ports: HashMap<&'a str, Nanos>,
    /// Copies read memories from which executors compute though they are not their homes.
    shares_reads: bool,
    copying: Vec<Copying>,
    /// Tokens of each expert in the running demand, ascending by expert.
    tokens_of: Vec<(u32, u32)>,
    finished: bool,
    keep: Keep,
    report: Report,
}

impl Simulator<'_> {
    fn run(&mut self, workload: &Workload<'_>) {
        self.tell(Input::Begin);
        // What the plan loads first is there before the first token.
        self.until(|s| s.due.is_empty() && s.at_once.is_empty());
        let cold_steps = workload.steps.len().div_ceil(10);
        let layers = workload.trace.num_layers().min(self.plan.moe_layers().len());
        let begin = self.now;
        self.report.busy.iter_mut().for_each(|b| b.1 = Nanos(0));
        self.report.bytes_by_link.iter_mut().for_each(|b| b.1 = Bytes::ZERO);
        for (number, step) in workload.steps.iter().enumerate() {
            let (start, tokens) = (self.now, step.tokens.len() as u32);
            let mut wait = self.costs.map_or(Nanos(0), |c| c.outside(tokens, step.prefill));
            for index in 0..layers {
                let layer = self.plan.moe_layers()[index];
                if let Some(c) = self.costs {
                    wait = wait + c.before(index, tokens, step.prefill);
                }
                let Some(demand) = workload.demand(number, index, layer) else { continue };
                self.pass(std::mem::take(&mut wait), layer);
                self.tokens_of.clone_from(&demand.experts);
                self.finished = false;
                self.tell(Input::Routed(demand));
                self.until(|s| s.finished);
                if self.report.aborted.is_some() {
                    return;
                }
            }
            self.pass(wait, u32::MAX);
            let took = Nanos(self.now.0 - start.0);
            self.report.step_times.push(took);
            let spent = if step.prefill { &mut self.report.prefill } else { &mut self.report.decode };
            spent.steps += 1;
            spent.tokens += u64::from(tokens);
            spent.time = spent.time + took;
            if number + 1 == cold_steps {
                self.report.cold = self.engine.statistics().clone();
            }
        }
        // Nor is what links still carry then: they are busy with it without a pause.
        for (busy, free) in self.report.busy.iter_mut().zip(&self.free) {
            busy.1.0 -= free.0.saturating_sub(self.now.0);
        }
        // Time before the first token is not the run's.
        self.now = Nanos(self.now.0 - begin.0);
    }

    /// The main processor works on everything but routed experts.
    fn pass(&mut self, wait: Nanos, layer: u32) {
        if wait.0 == 0 {
            return;
        }
        let end = self.now + wait;
        self.busy(0, self.now, end, || {
            if layer == u32::MAX { "output".into() } else { format!("layer {layer}: attention, router") }
        });
        self.push(end, Done::Router);
        let now = self.now;
        self.until(|s| s.now > now && s.now >= end);
    }

    /// Lets things happen until `enough`.
    fn until(&mut self, enough: impl Fn(&Self) -> bool) {
        while !enough(self) && self.report.aborted.is_none() {
            if let Some(input) = self.at_once.pop_front() {
                self.tell(input);
                continue;
            }
            let Some(Reverse(due)) = self.due.pop() else { return };
            self.now = due.at;
            match due.what {
                Done::Router => {}
                Done::Load { layer, expert, slot } => self.tell(Input::Loaded { key: ExpertKey { layer, expert }, slot }),
                Done::Wave { layer, wave, executor } => {
                    // It was slower while copies read its memory: by what they took until now, of which it may be late again.
                    let running = &mut self.running[executor as usize];
                    let late = running.late;
                    let beside = self.copying.iter().filter(|c| c.reader == executor);
                    let delay = beside.map(|c| (c.takes(running.begin, due.at) as f64 * running.share(c)) as u64).sum::<u64>();
                    if delay > late {
                        running.late = delay;
                        let end = due.at + Nanos(delay - late);
                        self.busy(executor as usize, due.at, end, || "waits for memory".into());
                        self.free[executor as usize] = end;
                        self.push(end, Done::Wave { layer, wave, executor });
                    } else {
                        self.tell(Input::Computed { layer, wave });
                    }
                }
            }
        }
    }

    fn tell(&mut self, input: Input) {
        if self.keep.record {
            self.report.inputs.push((self.now, input.clone()));
        }
        self.engine.handle(self.now, input);
        while let Some(action) = self.engine.poll(self.now) {
            if self.keep.record {
                self.report.actions.push(action.clone());
            }
            match action {
                Action::Load { key, slot, bytes, from, .. } => self.load(key, slot, bytes, from.0 as usize),
                Action::Compute { layer, wave, experts, executor } => self.compute(layer, wave, &experts, executor),
                Action::Abort { reason } => self.report.aborted = Some(reason),
                Action::Finish { .. } => self.finished = true,
                Action::Evict { .. } | Action::Allocate { .. } | Action::Release { .. } => {}
            }
        }
    }

    fn load(&mut self, key: ExpertKey, slot: SlotId, bytes: Bytes, tier: usize) {
        let Some((costs, index)) = self.costs.zip(self.plan.moe_layers().binary_search(&key.layer).ok()) else {
            self.at_once.push_back(Input::Loaded { key, slot });
            return;
        };
        let time = &costs.layers[index].tiers[tier];
        let number = costs.link_of_tier[tier].unwrap_or(0) as usize;
        let link = self.plan.executors().len() + number;
        self.report.bytes_by_link[number].1 += bytes;
        let begin = self.free[link].max(self.now);
        let mut end = begin + time.copy();
        if time.port.0 > 0 {
            // Copies over other links are on the same wire, which works off what was asked for without a pause: when the last of several is
            // done is exact, the order between them is that of asking.
            let carried = self.ports.entry(costs.links[number].to.as_str()).or_insert(Nanos(0));
            *carried = (*carried).max(self.now) + time.port;
            end = end.max(*carried);
        }
        self.free[link] = end;
        self.busy(link, begin, end, || format!("layer {} expert {}", key.layer, key.expert));
        let id = crate::engine::TierId(tier as u32);
        let at_home = time.streamed.as_ref().map(|_| self.plan.executor_of(id));
        let of = (time.shared_reads.0 > 0).then(|| self.plan.first_tier_of(&self.plan.tier(id).memory));
        let contended = if of.is_some() { time.shared_reads } else { time.contended() };
        if let Some(reader) = at_home.or_else(|| self.plan.home_executor(id)) {
            if self.copying.len() >= 64 {
                let (now, running, free) = (self.now, &self.running, &self.free);
                let counts = |c: &Copying| {
                    let reader = c.reader as usize;
                    c.end > now || (free[reader] > now && c.end > running[reader].begin)
                };
                self.copying.retain(counts);
            }
            self.copying.push(Copying { begin, end, contended, reader: reader.0, of });
        }
        self.push(end, Done::Load { layer: key.layer, expert: key.expert, slot });
    }

    fn compute(&mut self, layer: u32, wave: u32, experts: &[(u32, Location)], executor: ExecutorId) {
        let Some((costs, index)) = self.costs.zip(self.plan.moe_layers().binary_search(&layer).ok()) else {
            self.at_once.push_back(Input::Computed { layer, wave });
            return;
        };
        let x = executor.0 as usize;
        let mut took = costs.sync[x];
        let mut reads = Vec::new();
        for (expert, place) in experts {
            let tier = self.plan.tier_of(layer, *expert);
            let time = &costs.layers[index].tiers[tier.0 as usize];
            let at = self.tokens_of.binary_search_by_key(expert, |t| t.0);
            let tokens = at.map_or(1, |i| self.tokens_of[i].1);
            let planned = self.plan.executor_of(tier) == executor;
            let elsewhere = time.at_home.as_ref().or(time.streamed.as_ref().map(|s| &s.compute)).filter(|_| !planned);
            let alone = elsewhere.unwrap_or(&time.compute).at(tokens);
            took = took + alone;
            if self.shares_reads && *place == Location::Resident {
                reads.push((self.plan.first_tier_of(&self.plan.tier(tier).memory), alone));
            }
        }
        let begin = self.free[x].max(self.now);
        self.running[x] = Running { begin, late: 0, took, reads };
        let end = begin + took;
        self.free[x] = end;
        self.busy(x, begin, end, || format!("layer {layer}: {} experts", experts.len()));
        self.push(end, Done::Wave { layer, wave, executor: executor.0 });
    }

    fn busy(&mut self, resource: usize, start: Nanos, end: Nanos, name: impl FnOnce() -> String) {
        let total = &mut self.report.busy[resource].1;
        *total = *total + Nanos(end.0 - start.0);
        if self.keep.timeline {
            self.report.timeline.slices.push(Slice { resource, name: name(), start, end });
        }
    }

    fn push(&mut self, at: Nanos, what: Done) {
        self.started += 1;
        self.due.push(Reverse(Due { at, order: self.started, what }));
    }
}
