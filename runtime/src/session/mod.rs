//! A loaded model with its engine: prefill, decode, logits of every position.
//!
//! What a session holds in memory is what its plan budgets: context, cache format, chunk and slots come from the plan alone.

mod open;
mod perplexity;
pub mod process;
pub mod record;
mod resize;
mod sequences;
mod steps;
pub mod tiers;
pub mod verify;

pub use crate::exec::driver::{DriverTimes, Foreseen, Recording, SlotSizes};
pub use crate::exec::executor::CapturedRouting;
pub use crate::exec::loader::{IoBackend, IoOptions, IoReport, PageCache, Throttle, Throttled};
pub use crate::exec::model::Model;
pub use crate::exec::placed::names_nodes;
pub use crate::exec::sequences::SequenceId;
pub use crate::hybrid::memory::DeviceLine;
pub use open::needs_device;
pub use perplexity::{Perplexity, perplexity};
pub use resize::{BudgetControl, BudgetState};

use crate::backend::device::{DeviceBackend, DeviceInfo};
use crate::error::{Result, RuntimeError};
use crate::exec::driver::Driver;
use crate::exec::loader::ExpertReader;
use crate::exec::remote::RemoteExperts;
use crate::exec::sequences::SequenceTokens;
use crate::hybrid::executor::HybridExecutor;
use crate::memory::PageSize;
use ndarray::Array2;
use open::Source;
use std::sync::Arc;
use std::time::{Duration, Instant};
use steps::Steps;
use tierwise_planner::CheckedPlan;
use tierwise_planner::engine::Statistics;
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::routing::RoutingTrace;

/// What is not in the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionConfig {
    /// Compute threads.
    pub threads: usize,
    /// Keep every layer's routing for [`Session::take_routing`].
    pub capture_routing: bool,
    /// Keep the engine's inputs and actions for [`Session::recording`].
    pub record: bool,
    /// How experts are read from disk.
    pub io: IoOptions,
    /// Ask the routers of so many later layers early even if the plan does not use the answers, to measure or record them (see
    /// [`tierwise_planner::engine::Input::Foreseen`]); at most [`crate::exec::foresight::MAX_DISTANCE`]. 0: as the plan wants.
    pub lookahead: u32,
    /// Pages of slots on memory nodes that the plan names.
    pub pages: PageSize,
}

impl SessionConfig {
    /// `threads` compute threads, nothing captured, recorded or asked early, experts read as suits the system.
    pub const fn new(threads: usize) -> Self {
        let io = IoOptions { backend: IoBackend::Auto, page_cache: PageCache::Auto };
        Self { threads, capture_routing: false, record: false, io, lookahead: 0, pages: PageSize::System }
    }
}

/// Time spent and work done since the session was opened.
#[derive(Debug, Clone)]
pub struct SessionStatistics {
    /// Tokens computed in prompts.
    pub prefill_tokens: usize,
    /// Time for them.
    pub prefill_time: Duration,
    /// Tokens computed one at a time, or one of each of several sequences.
    pub decode_tokens: usize,
    /// Time for them.
    pub decode_time: Duration,
    /// Where the time of routed experts went.
    pub experts: DriverTimes,
    /// The engine's counters: hits, misses, loads, bytes.
    pub engine: Statistics,
}

/// A model and its sequences: one, [`SequenceId::FIRST`], which most functions are about, and those added beside it, which are computed
/// together with [`Session::step`].
pub struct Session {
    model: Arc<Model>,
    /// Dropped before the executor: its threads may be copying into the device's memory.
    driver: Driver,
    /// Changes the slots while the session works.
    budget: BudgetControl,
    executor: Steps,
    chunk_tokens: usize,
    /// Sequences that the plan has room for.
    most_sequences: usize,
    /// Logits after the first sequence's last token: `[vocab_size]`.
    logits: Vec<f32>,
    /// Logits of the last step of several sequences: `[sequences, vocab_size]`.
    step_logits: Vec<f32>,
    prefill: (usize, Duration),
    decode: (usize, Duration),
}

impl Session {
    /// Allocates what the plan says and starts the threads.
    ///
    /// # Errors
    /// When the plan is for another model or wants a processor or memory that this build does not use, when its engine needs times
    /// ([`Self::with_costs`]), or the system refuses threads or files.
    pub fn open(model: Arc<Model>, plan: &CheckedPlan, config: SessionConfig) -> Result<Self> {
        Self::with_costs(model, plan, config, None)
    }

    /// [`Self::open`] with the times by which the engine schedules, prefetches and fills: those of the plan on the machine at hand.
    ///
    /// # Errors
    /// As [`Self::open`], and when the times are of another plan.
    pub fn with_costs(
        model: Arc<Model>,
        plan: &CheckedPlan,
        config: SessionConfig,
        costs: Option<Arc<EngineCosts>>,
    ) -> Result<Self> {
        open::open(model, plan, config, costs, &Source::Files, None)
    }

    /// [`Self::with_costs`] with another source of experts, e.g. one that fails.
    ///
    /// # Errors
    /// As [`Self::with_costs`].
    pub fn with_reader(
        model: Arc<Model>,
        plan: &CheckedPlan,
        config: SessionConfig,
        costs: Option<Arc<EngineCosts>>,
        reader: Option<&Arc<dyn ExpertReader>>,
    ) -> Result<Self> {
        open::open(model, plan, config, costs, &Source::Reader(reader), None)
    }

    /// [`Self::with_costs`] for a plan whose main processor is a GPU: `backend` is it.
    ///
    /// # Errors
    /// As [`Self::with_costs`], and when the device does not hold or cannot run what the plan wants.
    pub fn on_device(
        model: Arc<Model>,
        plan: &CheckedPlan,
        config: SessionConfig,
        costs: Option<Arc<EngineCosts>>,
        backend: Box<dyn DeviceBackend>,
    ) -> Result<Self> {
        open::open(model, plan, config, costs, &Source::Files, Some(backend))
    }

    /// What is allocated on the device beside what was planned; `None` without a device.
    pub fn device_memory(&self) -> Option<Vec<DeviceLine>> {
        self.executor.device().map(HybridExecutor::memory)
    }

    /// The device; `None` without one.
    pub fn device(&self) -> Option<&DeviceInfo> {
        self.executor.device().map(HybridExecutor::info)
    }

    /// How experts are read from disk; `None` when none is.
    pub const fn io(&self) -> Option<&IoReport> {
        self.driver.loader().report()
    }

    /// From now on these memories of the plan give experts no faster than so: stands in for slow memory that is not there. Bits stay the
    /// same.
    ///
    /// # Errors
    /// For a memory that holds no experts of the plan, its main memory, or a rate that is none.
    pub fn throttle(&mut self, plan: &CheckedPlan, throttles: &[Throttle]) -> Result<()> {
        // What is under way, and what was held back until now, comes first.
        self.settle();
        self.driver.loader_mut().throttle(plan, throttles)
    }

    /// Memories that are slowed down, and what they gave since.
    pub fn throttled(&self) -> Vec<Throttled> {
        self.driver.loader().throttled()
    }

    /// From now on the routers' choices are replaced by those of `trace`, token by token from number `first` on; `None` ends that.
    /// The logits then mean nothing: it serves to measure a model with random weights under real routing.
    ///
    /// # Errors
    /// When the trace is of other experts, or of fewer layers than the model has with routed experts.
    pub fn force_routing(&mut self, trace: Option<(Arc<RoutingTrace>, usize)>) -> Result<()> {
        if let Some((trace, first)) = &trace {
            let spec = self.model.spec();
            let traced = (trace.num_experts, trace.experts_per_token as u32);
            let other = spec.moe_layers().find(|(_, m)| (m.num_experts, m.experts_per_token) != traced);
            let layers = spec.moe_layers().count();
            if other.is_some() || layers > trace.num_moe_layers || *first >= trace.num_tokens() {
                let (experts, k) = other.map_or(traced, |(_, m)| (m.num_experts, m.experts_per_token));
                return Err(RuntimeError::BadRequest {
                    what: "routing trace",
                    found: format!(
                        "{} layers, {} of {} experts per token, {} tokens",
                        trace.num_moe_layers,
                        traced.1,
                        traced.0,
                        trace.num_tokens()
                    ),
                    expected: format!("at least {layers} layers, {k} of {experts} experts per token, a token number {first}"),
                });
            }
        }
        self.executor.force_routing(trace);
        Ok(())
    }

    /// From now on routed experts are computed by `remote`; `None`: by the plan's engine again.
    ///
    /// # Errors
    /// When the session computes on a device.
    pub fn set_remote(&mut self, remote: Option<Box<dyn RemoteExperts>>) -> Result<()> {
        if self.executor.set_remote(remote) {
            return Ok(());
        }
        Err(RuntimeError::BadRequest {
            what: "device",
            found: "a session on a device".into(),
            expected: "one on the CPU: experts over several ranks are computed there only (--device cpu)".into(),
        })
    }

    /// Tokens of a prompt that are computed at once, at most.
    pub const fn chunk_tokens(&self) -> usize {
        self.chunk_tokens
    }

    /// The model.
    pub const fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.executor.len(SequenceId::FIRST).unwrap_or(0)
    }

    /// Nothing in the cache.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens the cache can hold.
    pub const fn context(&self) -> usize {
        self.executor.context()
    }

    /// Forgets the sequence. Loaded experts stay.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// Forgets the tokens from `len` on, e.g. to keep a common prefix.
    pub fn truncate(&mut self, len: usize) {
        self.executor.truncate(SequenceId::FIRST, len);
        self.logits.clear();
    }

    /// Logits after the last token: `[vocab_size]`; empty before the first.
    pub fn last_logits(&self) -> &[f32] {
        &self.logits
    }

    /// Computes a prompt (or the next part of it) in chunks; logits after its last token: `[vocab_size]`.
    ///
    /// # Errors
    /// For no token, one outside the vocabulary, more than fit the context, or an expert that cannot be read.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.check(tokens)?;
        let start = Instant::now();
        for chunk in tokens.chunks(self.chunk_tokens) {
            self.step_for_last(chunk)?;
        }
        self.prefill.0 += tokens.len();
        self.prefill.1 += start.elapsed();
        Ok(&self.logits)
    }

    /// Computes one token; logits after it: `[vocab_size]`.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn decode(&mut self, token: u32) -> Result<&[f32]> {
        self.check(&[token])?;
        let start = Instant::now();
        self.step_for_last(&[token])?;
        self.decode.0 += 1;
        self.decode.1 += start.elapsed();
        Ok(&self.logits)
    }

    /// Computes a prompt and gives the logits after each token from number `first` on to `sink(number, logits)`.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn for_each_logits(&mut self, tokens: &[u32], first: usize, mut sink: impl FnMut(usize, &[f32]) + Send) -> Result<()> {
        self.check(tokens)?;
        let start = Instant::now();
        for (i, chunk) in tokens.chunks(self.chunk_tokens).enumerate() {
            let at = i * self.chunk_tokens;
            let end = at + chunk.len();
            if end <= first {
                self.step_for_last(chunk)?;
                continue;
            }
            let wanted = end - first.max(at);
            let Self { model, executor, driver, logits: last, .. } = self;
            let part = SequenceTokens { sequence: SequenceId::FIRST, tokens: chunk, wanted };
            executor.step(model, driver, &[part], &mut |row, block| {
                for (i, logits) in block.rows().into_iter().enumerate() {
                    let logits = logits.to_slice().expect("logits are row-major");
                    sink(end - wanted + row + i, logits);
                    if row + i + 1 == wanted {
                        last.clear();
                        last.extend_from_slice(logits);
                    }
                }
            })?;
        }
        self.prefill.0 += tokens.len();
        self.prefill.1 += start.elapsed();
        Ok(())
    }

    /// Computes a prompt; logits after every token: `[tokens, vocab_size]`.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn logits_all(&mut self, tokens: &[u32]) -> Result<Array2<f32>> {
        let mut all = Array2::zeros((tokens.len(), self.model.spec().vocab_size as usize));
        self.for_each_logits(tokens, 0, |i, logits| {
            all.row_mut(i).as_slice_mut().expect("a new array is row-major").copy_from_slice(logits);
        })?;
        Ok(all)
    }

    /// The routing captured since the last call, in the order of computation; empty unless capture is on.
    pub fn take_routing(&mut self) -> Vec<CapturedRouting> {
        self.executor.take_routing()
    }

    /// The engine's inputs and actions so far, if the session records.
    pub const fn recording(&self) -> Option<&Recording> {
        self.driver.recording()
    }

    /// Waits until no load is under way: what was begun is then in the recording with its end.
    pub fn settle(&mut self) {
        // A lost device is an error of the next step; what it holds back is given up here.
        let _ = self.executor.wait(&mut self.driver);
        self.driver.settle();
    }

    /// Time spent and work done.
    pub fn statistics(&self) -> SessionStatistics {
        SessionStatistics {
            prefill_tokens: self.prefill.0,
            prefill_time: self.prefill.1,
            decode_tokens: self.decode.0,
            decode_time: self.decode.1,
            experts: self.driver.times(),
            engine: self.driver.statistics(),
        }
    }

    fn step_for_last(&mut self, tokens: &[u32]) -> Result<()> {
        let Self { model, executor, driver, logits, .. } = self;
        let part = SequenceTokens { sequence: SequenceId::FIRST, tokens, wanted: 1 };
        executor.step(model, driver, &[part], &mut |_, block| {
            logits.clear();
            logits.extend(block.iter());
        })
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        self.check_tokens(self.len(), tokens)
    }

    /// Refuses tokens that cannot follow `len` others.
    fn check_tokens(&self, len: usize, tokens: &[u32]) -> Result<()> {
        let spec = self.model.spec();
        let bad = |found: String, expected: String| Err(RuntimeError::BadRequest { what: "tokens", found, expected });
        if tokens.is_empty() {
            return bad("none".to_string(), "at least one".to_string());
        }
        if let Some(token) = tokens.iter().find(|t| **t >= spec.vocab_size) {
            return bad(format!("id {token}"), format!("ids below the vocabulary's size {}", spec.vocab_size));
        }
        let needed = len + tokens.len();
        if needed > self.context() {
            return Err(RuntimeError::ContextTooSmall { needed, context: self.context(), trained: spec.context_length as usize });
        }
        Ok(())
    }
}
