//! A session of which all ranks compute the routed experts together.
//!
//! Ranks run in lockstep: each calls the same methods in the same order, with its own tokens. A rank that has fewer chunks of tokens than
//! another, or none, computes the others' experts in the steps that it lacks. An error on one rank ends the job on all.

use super::dispatch::{ExpertParallel, Shared};
use super::statistics::ParallelStatistics;
use super::transport::Transport;
use crate::error::{Result, RuntimeError};
use crate::exec::experts::ExpertExtras;
use crate::exec::prepared::Prepared;
use crate::exec::remote::RoutedLayer;
use crate::exec::route::Routing;
use crate::exec::threads::Threads;
use crate::session::Session;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tierwise_cost::op::{Batch, Op, OpKind, lower};
use tierwise_planner::balance::decide::{DecideSettings, Decider};
use tierwise_planner::balance::holders::LayerPlacement;
use tierwise_planner::balance::loads::Loads;
use tierwise_planner::balance::place::{DeviceSpec, PlaceOptions};
use tierwise_planner::balance::replay::{Policy, ReplaySettings, Slots, placement};
use tierwise_planner::balance::result::once;

/// Who holds what, and by which rule tokens and weights move. The same on all ranks.
#[derive(Debug, Clone)]
pub struct ParallelConfig {
    /// The rule.
    pub policy: Policy,
    /// Prices and limits.
    pub settings: DecideSettings,
    /// Experts in the slots of each rank. `[MoE layers][ranks][slots]`
    pub slots: Vec<Slots>,
}

impl ParallelConfig {
    /// Experts in order, as many on each rank as divide among them: plain expert parallelism's placement. `num_experts`: `[MoE layers]`
    pub fn in_order(policy: Policy, settings: DecideSettings, num_experts: &[u32]) -> Self {
        let ranks = settings.speed.len().max(1);
        let in_order = |experts: &u32| {
            let mut layer: Slots = vec![Vec::new(); ranks];
            let experts = *experts as usize;
            (0..experts).for_each(|e| layer[e * ranks / experts].push(e as u16));
            layer
        };
        Self { policy, settings, slots: num_experts.iter().map(in_order).collect() }
    }

    /// Where the policy puts experts under such loads, with so many slots per layer on each rank; `num_groups` of the router (EPLB).
    /// `num_experts`: `[MoE layers]`; layers with fewer than the log has columns leave the last ones out.
    ///
    /// # Errors
    /// [`RuntimeError::BadRequest`] when the policy cannot, e.g. with too few slots.
    pub fn placed(
        policy: Policy,
        settings: DecideSettings,
        loads: &Loads,
        num_experts: &[u32],
        slots_per_rank: u32,
        num_groups: usize,
    ) -> Result<Self> {
        if matches!(policy, Policy::Ep | Policy::Llep) {
            return Ok(Self::in_order(policy, settings, num_experts));
        }
        let device = |speed: &f64| DeviceSpec { node: 0, inverse_speed: 1.0 / speed, slots: slots_per_rank };
        let replay = ReplaySettings {
            devices: settings.speed.iter().map(device).collect(),
            num_nodes: 1,
            num_groups,
            cost: settings.cost,
            train_steps: 0,
            rebalance_every: 0,
            windows: WINDOWS,
            place: PlaceOptions::default(),
            spill: settings.spill,
            alpha: settings.alpha,
            lambda: settings.lambda,
            row_bytes: 0.0,
            layer_slots: Vec::new(),
            tolerance: 0.0,
            affinity: None,
            pair_price: 0.0,
            packs: Vec::new(),
        };
        let mut slots = Vec::with_capacity(num_experts.len());
        for (layer, experts) in num_experts.iter().enumerate() {
            let loads = loads.of_layer(layer, *experts as usize).map_err(refused)?;
            slots.extend(placement(&loads, policy, &replay, 0..loads.num_steps(), None).map_err(refused)?.slots);
        }
        Ok(Self { policy, settings, slots })
    }
}

/// Windows of a log whose mean is made small.
const WINDOWS: usize = 8;

#[allow(clippy::needless_pass_by_value, reason = "as `map_err` gives it")]
fn refused(e: tierwise_planner::PlanError) -> RuntimeError {
    RuntimeError::BadRequest {
        what: "expert parallelism",
        found: e.to_string(),
        expected: "experts, ranks and a placement that suit each other".into(),
    }
}

/// One rank's sequence, and its part of the experts.
pub struct ParallelSession {
    session: Session,
    shared: Arc<Mutex<ExpertParallel>>,
    /// The operations that need other ranks, in the order of a step.
    routed: Vec<Op>,
    /// For steps without tokens of its own.
    threads: Threads,
}

impl ParallelSession {
    /// All ranks open theirs at once. `session` is fresh, computes on the CPU, and is of the same model on all ranks; `threads` compute what
    /// other ranks ask for while this one has no tokens.
    ///
    /// # Errors
    /// When ranks differ in model or settings, or the configuration does not suit model and ranks.
    pub fn open(mut session: Session, threads: usize, transport: Box<dyn Transport>, config: ParallelConfig) -> Result<Self> {
        let model = Arc::clone(session.model());
        let batch = Batch { tokens: 2, past: 0, sequences: 1, logits: 2 };
        let mut routed = lower(model.spec(), batch)?;
        routed.retain(|op| matches!(op.kind, OpKind::RoutedExperts { .. }));
        check(&session, transport.as_ref(), &config)?;
        let hello = hello(&session, &config);
        let shared = Arc::new(Mutex::new(ExpertParallel::new(&model, transport, decider(config, &session))));
        session.set_remote(Some(Box::new(Shared(Arc::clone(&shared)))))?;
        let mut this = Self { session, shared, routed, threads: Threads::new(threads)? };
        this.agree(&hello)?;
        Ok(this)
    }

    /// Goes on with another policy or placement, on all ranks at once; sequence, statistics and copies begin anew.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn configure(&mut self, config: ParallelConfig) -> Result<()> {
        check(&self.session, self.group().transport.as_ref(), &config)?;
        let hello = hello(&self.session, &config);
        self.agree(&hello)?;
        let decider = decider(config, &self.session);
        let mut group = self.group();
        group.set_decider(decider);
        group.statistics = ParallelStatistics::default();
        drop(group);
        self.session.reset();
        Ok(())
    }

    /// The session beneath, e.g. to force routing.
    pub const fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.group().transport.rank()
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.group().transport.size()
    }

    /// What was done since the last [`Self::configure`].
    pub fn statistics(&self) -> ParallelStatistics {
        self.group().statistics.clone()
    }

    /// Copies of experts that this rank has from others.
    pub fn num_copies(&self) -> usize {
        self.group().num_copies()
    }

    /// From now on counts the tokens of all ranks for each expert.
    pub fn count_loads(&self) {
        self.group().loads = Some(Vec::new());
    }

    /// What was counted; the same on all ranks. Counting ends.
    ///
    /// # Errors
    /// When there was no step since [`Self::count_loads`].
    pub fn take_loads(&self) -> Result<Loads> {
        Loads::new(&self.group().loads.take().unwrap_or_default()).map_err(refused)
    }

    /// Forgets this rank's sequence.
    pub fn reset(&mut self) {
        self.session.reset();
    }

    /// Every rank's message to all. `[ranks]`
    ///
    /// # Errors
    /// As [`Transport::exchange`].
    pub fn all_gather(&self, what: &str, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut group = self.group();
        let result = group.transport.all_gather(what, mine);
        result.inspect_err(|e| group.transport.abort(&e.to_string()))
    }

    /// Tells all ranks that it is over, and why. Over MPI this does not return.
    pub fn abort(&self, reason: &str) {
        self.group().transport.abort(reason);
    }

    /// Computes this rank's tokens after those before, chunk by chunk, with logits after each to `sink(number, logits)`. All ranks call
    /// it at once; who has no tokens helps the others.
    ///
    /// # Errors
    /// As [`Session::for_each_logits`], and when another rank is gone, silent, or of another mind. The job of all ranks has ended then.
    pub fn for_each_logits(&mut self, tokens: &[u32], mut sink: impl FnMut(usize, &[f32]) + Send) -> Result<()> {
        self.together(tokens, |session, at, chunk| session.for_each_logits(chunk, 0, |i, logits| sink(at + i, logits)))
    }

    /// The same with logits after the last token alone: `[vocab_size]`, empty without tokens.
    ///
    /// # Errors
    /// As [`Self::for_each_logits`].
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.together(tokens, |session, _, chunk| session.prefill(chunk).map(drop))?;
        Ok(if tokens.is_empty() { &[] } else { self.session.last_logits() })
    }

    /// One token of each rank that goes on: logits after it, empty for `None`.
    ///
    /// # Errors
    /// As [`Self::for_each_logits`].
    pub fn decode(&mut self, token: Option<u32>) -> Result<&[f32]> {
        self.together(token.as_slice(), |session, _, token| session.decode(token[0]).map(drop))?;
        Ok(if token.is_none() { &[] } else { self.session.last_logits() })
    }

    /// As many steps as the rank with the most chunks needs. An error of this rank is everyone's.
    fn together(&mut self, tokens: &[u32], step: impl FnMut(&mut Session, usize, &[u32]) -> Result<()>) -> Result<()> {
        let result = self.steps(tokens, step);
        if let Err(e) = &result {
            self.abort(&e.to_string());
        }
        result
    }

    fn steps(&mut self, tokens: &[u32], mut step: impl FnMut(&mut Session, usize, &[u32]) -> Result<()>) -> Result<()> {
        let size = self.session.chunk_tokens();
        let mut chunks = tokens.chunks(size).enumerate();
        let all = self.group().transport.all_gather("number of steps", &(chunks.len() as u64).to_le_bytes())?;
        let number = |m: &Vec<u8>| m.as_slice().try_into().map_or(0, u64::from_le_bytes);
        for _ in 0..all.iter().map(number).max().unwrap_or(0) {
            self.group().begin_step();
            match chunks.next() {
                Some((i, chunk)) => step(&mut self.session, i * size, chunk)?,
                None => self.help()?,
            }
        }
        Ok(())
    }

    /// A step without tokens: computes what others ask for.
    fn help(&mut self) -> Result<()> {
        let model = Arc::clone(self.session.model());
        let (pool, threads) = (self.threads.pool(), &self.threads);
        let mut group = self.group();
        let group = &mut *group;
        let routing = Routing { experts_per_token: 1, ..Routing::default() };
        let input = Prepared::default();
        pool.install(|| {
            for op in &self.routed {
                let OpKind::RoutedExperts { gate, up, down, biases, moe } = &op.kind else { continue };
                let biases = biases.map(|b| b.map(|b| model.vector(b)));
                let extras = ExpertExtras { activation: moe.activation, biases, weights_on_input: moe.weights_on_input };
                let (layer, tensors) = (op.layer.unwrap_or(0), [*gate, *up, *down]);
                let call = RoutedLayer { layer, tensors, extras: &extras, routing: &routing, input: &input, threads };
                group.layer(&model, call, None)?;
            }
            Ok(())
        })
    }

    /// All ranks say the same, or it is an error on all.
    fn agree(&mut self, hello: &str) -> Result<()> {
        let all = self.all_gather("first words", hello.as_bytes())?;
        let Some((rank, other)) = all.iter().enumerate().find(|(_, m)| *m != hello.as_bytes()) else { return Ok(()) };
        let other = String::from_utf8_lossy(other);
        let differs = hello.lines().zip(other.lines()).find(|(a, b)| a != b);
        let (mine, its) = differs.unwrap_or(("more lines", "fewer lines"));
        let error = RuntimeError::Rank {
            rank,
            reason: format!("runs with {its}, rank {} with {mine}; give all ranks the same model and arguments", self.rank()),
        };
        self.abort(&error.to_string());
        Err(error)
    }

    fn group(&self) -> MutexGuard<'_, ExpertParallel> {
        // A panic under the lock has ended the step; what is read here is whole.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn decider(config: ParallelConfig, session: &Session) -> Decider {
    let num_experts: Vec<usize> = session.model().spec().moe_layers().map(|(_, m)| m.num_experts as usize).collect();
    let mut decider = Decider::new(config.policy, config.settings);
    decider.place(config.slots, &num_experts);
    decider
}

/// What has to be the same on all ranks, a line each.
fn hello(session: &Session, config: &ParallelConfig) -> String {
    let slots = config.slots.iter().flatten().flatten();
    // FNV-1a: a difference is found, nobody is deceived.
    let hash = slots.fold(0xcbf2_9ce4_8422_2325_u64, |h, e| (h ^ u64::from(*e)).wrapping_mul(0x100_0000_01b3));
    format!(
        "tierwise {}\nthe model {}\nthe policy {}\na placement of hash {hash:016x}\n{:?}\n",
        env!("CARGO_PKG_VERSION"),
        session.model().spec().fingerprint(),
        config.policy.name(),
        config.settings
    )
}

/// Refuses what cannot be computed together.
fn check(session: &Session, transport: &dyn Transport, config: &ParallelConfig) -> Result<()> {
    let bad = |what, found: String, expected: String| Err(RuntimeError::BadRequest { what, found, expected });
    let spec = session.model().spec();
    let counts: Vec<u32> = spec.moe_layers().map(|(_, m)| m.num_experts).collect();
    if counts.is_empty() {
        return bad("model", format!("{}, without routed experts", spec.name), "a Mixture of Experts".into());
    }
    let (ranks, speed) = (transport.size(), &config.settings.speed);
    if speed.len() != ranks || speed.iter().any(|s| !(s.is_finite() && *s > 0.0)) {
        return bad("speeds of ranks", format!("{speed:?}"), format!("{ranks} positive numbers, one for each rank"));
    }
    if config.slots.len() != counts.len() {
        return bad(
            "placement",
            format!("{} layers", config.slots.len()),
            format!("{}, the model's layers with experts", counts.len()),
        );
    }
    for (layer, (slots, num_experts)) in config.slots.iter().zip(&counts).enumerate() {
        let placement = LayerPlacement { devices: slots.iter().map(|s| once(s)).collect() };
        let room: Vec<u32> = placement.devices.iter().map(|d| d.len() as u32).collect();
        let checked = if room.len() == ranks {
            placement.check(*num_experts as usize, &room).map_err(|e| e.to_string())
        } else {
            Err(format!("{} devices", room.len()))
        };
        if let Err(found) = checked {
            return bad(
                "placement",
                format!("in the MoE layer {layer}: {found}"),
                format!("all {num_experts} experts on {ranks} ranks"),
            );
        }
    }
    Ok(())
}
