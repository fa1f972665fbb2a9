//! What may go where: the machine's tiers, the model's expert layers, and the room that is left for experts.
//!
//! A tier is a memory with the processor that computes from it, or a memory whose experts are first loaded into cache slots beside
//! a processor. Everything that is not a routed expert lives with the main processor: the first GPU whose memory holds it.

use crate::budget;
use crate::error::PlanError;
use crate::hits::MissCurve;
use crate::plan::{ExpertRun, Main, Plan, PlanLayer, Tier};
use crate::request::{Goal, Limits, Popularity, Request};
use crate::scenario::Scenarios;
use tierwise_cost::machine::{Machine, Memory, MemoryKind, Processor, ProcessorKind};
use tierwise_cost::model::ModelSpec;
use tierwise_cost::units::Bytes;

/// A layer with routed experts.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeLayer {
    /// Layer of the model.
    pub layer: u32,
    /// Routed experts.
    pub num_experts: u32,
    /// Experts per token, at most.
    pub experts_per_token: u32,
    /// Experts per token and iteration, on average.
    pub mean_choices: f64,
    /// How often a step asks the layer for experts.
    pub iterations: u32,
    /// Bytes of one expert.
    pub expert_bytes: Bytes,
    /// Experts by falling popularity; ties by number.
    pub by_popularity: Vec<u32>,
}

/// Page-locked host memory: what a GPU's copy engine reads at the link's full rate. The operating system cannot move it, and it may
/// be scarce, so it has a budget of its own. Staging comes first; what is left of the limit is for experts that are copied to a GPU's
/// slots. What does not fit is copied from pageable memory at that rate where the machine's file states one, else not at all; experts
/// in host memory are one or the other as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Locking {
    /// Index in [`Problem::room`] of what is left for experts; absent without a limit.
    pub room: Option<usize>,
    /// Staging buffers are pageable: the limit is below them.
    pub staging_pageable: bool,
    /// Experts are copied from pageable memory: the limit holds not one.
    pub experts_pageable: bool,
}

/// A model, a machine and a request, checked and laid out for solvers.
#[derive(Debug, Clone)]
pub struct Problem<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// The machine.
    pub machine: &'a Machine,
    /// The request.
    pub request: Request,
    /// The main processor.
    pub main: Main,
    /// Places an expert may have.
    pub tiers: Vec<Tier>,
    /// Layers with routed experts, ascending.
    pub layers: Vec<MoeLayer>,
    /// Per memory of the machine: what may be used.
    pub capacity: Vec<Bytes>,
    /// Per memory of the machine: lines that do not depend on the placement.
    pub fixed: Vec<Vec<(&'static str, Bytes)>>,
    /// Per memory of the machine: what is left for experts and slots. With a limit of page-locked memory one more, [`Locking::room`].
    pub room: Vec<Bytes>,
    /// What of host memory is page-locked.
    pub locking: Locking,
    /// Sampled decode steps of a trace, if there is one.
    pub scenarios: Option<Scenarios>,
    /// Measured miss rates of cache slots per MoE layer, if there is a trace.
    pub miss_curves: Option<Vec<MissCurve>>,
    /// Seconds that a solver with a clock of its own may take.
    pub time_limit_s: Option<f64>,
    /// The request's objective; solvers that keep latencies try other weights.
    pub goal: Goal,
}

/// Which memories experts may have as their home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Homes {
    /// All that the machine has; the disk only if memory cannot hold them.
    Any,
    /// The disk.
    Disk,
}

impl<'a> Problem<'a> {
    /// Checks the request and finds the room for experts.
    ///
    /// # Errors
    /// [`PlanError::BadRequest`], [`PlanError::NoRoom`] naming the line that does not fit, [`PlanError::ExpertsDoNotFit`].
    pub fn new(spec: &'a ModelSpec, machine: &'a Machine, request: Request) -> Result<Self, PlanError> {
        let homes = Homes::Any;
        Self::lay_out(spec, machine, request.clone(), homes).map_err(|e| name_smallest(e, spec, machine, request, homes))
    }

    /// The same for experts that all wait on disk and come into slots in the CPU's memory, whatever room there is: see [`crate::elastic`].
    ///
    /// # Errors
    /// As [`Self::new`], and when a GPU is the main processor or the machine has no disk.
    pub fn elastic(spec: &'a ModelSpec, machine: &'a Machine, request: Request) -> Result<Self, PlanError> {
        let homes = Homes::Disk;
        Self::lay_out(spec, machine, request.clone(), homes).map_err(|e| name_smallest(e, spec, machine, request, homes))
    }

    fn lay_out(spec: &'a ModelSpec, machine: &'a Machine, request: Request, homes: Homes) -> Result<Self, PlanError> {
        machine.check()?;
        request.check(spec.context_length)?;
        check_limits(machine, &request)?;
        let layers = moe_layers(spec, &request)?;
        let capacity: Vec<Bytes> = machine.memories.iter().map(|m| budget::capacity(machine, &request, m)).collect();
        let (main, mut fixed) = choose_main(spec, machine, &request, &capacity)?;
        let home = index_of(machine, &main.memory);
        let mut room = room_of(&capacity, &fixed);
        let total: u64 = layers.iter().map(|l| l.expert_bytes.0 * u64::from(l.num_experts)).sum();
        let mut staged = Bytes::ZERO;
        if total > room[home].0 && machine.memories[home].kind == MemoryKind::Vram {
            // Some experts live elsewhere: prompts stream them through two buffers of one token's experts, pinned on the host side.
            let stage = layers.iter().map(|l| 2 * l.expert_bytes.0 * u64::from(l.experts_per_token)).max().unwrap_or(0);
            let host = machine.processors_of(ProcessorKind::Cpu).next().map(|c| index_of(machine, &machine.home(c).id));
            for m in [Some(home), host].into_iter().flatten() {
                staged = Bytes(stage);
                fixed[m].push((budget::STAGING, staged));
                check_lines(machine, &request, m, capacity[m], &fixed[m])?;
            }
            room = room_of(&capacity, &fixed);
        }
        let mut tiers = tiers(machine, &main, &capacity);
        match homes {
            Homes::Any => drop_needless_disk(machine, &layers, &room, total, &mut tiers),
            Homes::Disk => crate::elastic::keep_disk(machine, &main, &mut tiers)?,
        }
        if request.no_cache {
            tiers.retain(|t| t.through.is_none());
        }
        let mut locking = Locking::default();
        if let Some(limit) = request.limits.pinned {
            locking.staging_pageable = limit < staged;
            let left = if locking.staging_pageable { limit } else { limit.saturating_sub(staged) };
            locking.experts_pageable = layers.iter().any(|l| left < l.expert_bytes);
            if locking.experts_pageable {
                tiers.retain(|t| !is_copied_to_gpu(machine, t) || pageable_rate(machine, t));
            } else {
                locking.room = Some(room.len());
                room.push(left);
            }
        }
        let problem = Self {
            goal: request.goal(),
            spec,
            machine,
            request,
            main,
            tiers,
            layers,
            capacity,
            fixed,
            room,
            locking,
            scenarios: None,
            miss_curves: None,
            time_limit_s: None,
        };
        problem.check_total(total)?;
        Ok(problem)
    }

    /// The same with experts in pageable memory, where a limit of page-locked memory holds some but perhaps not enough of them: they are
    /// page-locked or not as a whole. `None` where there is nothing to choose.
    #[must_use]
    pub fn with_pageable_experts(&self) -> Option<Self> {
        let room = self.locking.room?;
        let mut other = self.clone();
        other.locking = Locking { experts_pageable: true, room: None, ..self.locking };
        other.room.truncate(room);
        other.tiers.retain(|t| !is_copied_to_gpu(self.machine, t) || pageable_rate(self.machine, t));
        other.check_total(self.expert_bytes().0).is_ok().then_some(other)
    }

    /// This, or [`Self::with_pageable_experts`] if the plan, which must be of one of them, copies experts from pageable memory.
    #[must_use]
    pub fn as_planned(&self, plan: &Plan) -> Self {
        let copied = |r: &&ExpertRun| is_copied_to_gpu(self.machine, &plan.tiers[r.tier as usize]);
        let bytes = |l: &PlanLayer| l.runs.iter().filter(copied).map(|r| u64::from(r.count) * l.expert_bytes.0).sum::<u64>();
        let experts: u64 = plan.layers.iter().map(bytes).sum();
        let locked: u64 = plan.budgets.iter().map(|b| b.page_locked.0).sum();
        let pageable = plan.tiers.len() != self.tiers.len() || locked < experts;
        self.with_pageable_experts().filter(|_| pageable).unwrap_or_else(|| self.clone())
    }

    /// The same with sampled decode steps: placements are then judged by their mean over these.
    ///
    /// # Errors
    /// [`PlanError::BadRequest`] when layers or experts do not match the model, or there is no step.
    pub fn with_scenarios(mut self, scenarios: Scenarios) -> Result<Self, PlanError> {
        scenarios.check(&self.layers)?;
        self.scenarios = Some(scenarios);
        Ok(self)
    }

    /// The same with measured miss rates of cache slots, one curve per MoE layer.
    ///
    /// # Errors
    /// [`PlanError::BadRequest`] when their number is another.
    pub fn with_miss_curves(mut self, curves: Vec<MissCurve>) -> Result<Self, PlanError> {
        if curves.len() != self.layers.len() {
            return Err(PlanError::BadRequest {
                field: "miss curves",
                found: curves.len().to_string(),
                expected: format!("one for each of the {} MoE layers", self.layers.len()),
            });
        }
        self.miss_curves = Some(curves);
        Ok(self)
    }

    /// The same without cache slots: every expert is computed where it lies, always.
    ///
    /// # Errors
    /// [`PlanError::ExpertsDoNotFit`] when memory that is computed from cannot hold them all.
    pub fn without_caches(mut self) -> Result<Self, PlanError> {
        self.tiers.retain(|t| t.through.is_none());
        self.check_total(self.expert_bytes().0)?;
        Ok(self)
    }

    /// Index of a memory in the machine's list.
    pub fn memory_index(&self, id: &str) -> usize {
        index_of(self.machine, id)
    }

    /// Indices of what an expert in tier `t` takes room of, besides its slot: its memory and, with a limit of it, page-locked memory.
    pub fn rooms_of<'t>(&'t self, t: &'t Tier) -> impl Iterator<Item = usize> + 't {
        std::iter::once(self.memory_index(&t.memory)).chain(self.locking.room.filter(|_| self.is_page_locked(t)))
    }

    /// Experts in tier `t` are page-locked.
    pub fn is_page_locked(&self, t: &Tier) -> bool {
        !self.locking.experts_pageable && is_copied_to_gpu(self.machine, t)
    }

    /// The processor that computes tier `t`.
    ///
    /// # Panics
    /// If `t` is not one of this problem's tiers.
    pub fn executor(&self, t: &Tier) -> &Processor {
        self.machine.processor(&t.executor).expect("tiers name processors of the machine")
    }

    /// The main processor and its home memory.
    ///
    /// # Panics
    /// Never: the problem was checked.
    pub fn main_place(&self) -> (&Processor, &Memory) {
        let p = self.machine.processor(&self.main.executor).expect("the main processor is one of the machine");
        (p, self.machine.home(p))
    }

    /// Bytes of all routed experts.
    pub fn expert_bytes(&self) -> Bytes {
        self.layers.iter().map(|l| Bytes(l.expert_bytes.0 * u64::from(l.num_experts))).sum()
    }

    /// Do all experts fit somewhere? With slots: at least one expert of every layer has to be loadable.
    fn check_total(&self, total: u64) -> Result<(), PlanError> {
        let mut places: Vec<&str> = self.tiers.iter().map(|t| t.memory.as_str()).collect();
        places.sort_unstable();
        places.dedup();
        let held: u64 = places.iter().map(|id| self.room[self.memory_index(id)].0).sum();
        // Loading from a lower tier needs one slot per layer.
        let direct: u64 =
            self.tiers.iter().filter(|t| t.through.is_none()).map(|t| self.room[self.memory_index(&t.memory)].0).sum();
        let one_slot_each: u64 = self.layers.iter().map(|l| l.expert_bytes.0).sum();
        let fits = total <= direct || (total <= held && one_slot_each <= direct);
        if fits {
            return Ok(());
        }
        // The cheapest memory to enlarge: the one that computes and is largest, by the shortfall.
        let short = if total > held { total - held } else { one_slot_each - direct };
        let enlarge = self
            .tiers
            .iter()
            .filter(|t| t.through.is_none())
            .map(|t| self.memory_index(&t.memory))
            .max_by_key(|m| (self.machine.memories[*m].kind != MemoryKind::Vram, self.capacity[*m]))
            .unwrap_or(0);
        let memory = &self.machine.memories[enlarge];
        let smallest = Bytes(self.capacity[enlarge].0 + short);
        let hint = if smallest <= memory.capacity.value {
            format!("{} {}", Limits::flag(memory.kind), smallest)
        } else {
            "more than the machine has: a smaller format, a shorter --context, or a larger --disk".into()
        };
        let words: Vec<String> = places.iter().map(|id| format!("{id} {}", self.room[self.memory_index(id)])).collect();
        Err(PlanError::ExpertsDoNotFit {
            needed: Bytes(total),
            available: Bytes(held),
            places: words.join(", "),
            memory: memory.id.clone(),
            smallest,
            hint,
        })
    }
}

/// Puts the smallest budget that works into an error about room. The lines depend on each other (reserve, staging, slots, which
/// processor leads), so it is found by trying: feasibility only grows with the budget, and laying a problem out is cheap.
fn name_smallest(mut error: PlanError, spec: &ModelSpec, machine: &Machine, mut request: Request, homes: Homes) -> PlanError {
    let (PlanError::NoRoom { memory, smallest, hint, .. } | PlanError::ExpertsDoNotFit { memory, smallest, hint, .. }) =
        &mut error
    else {
        return error;
    };
    let kind = machine.memories[index_of(machine, memory)].kind;
    let installed = machine.memories_of(kind).map(|m| m.capacity.value.0).sum();
    let (mut fails, mut enough) = (request.limits.of(kind).map_or(0, |b| b.0), installed);
    let mut works = |bytes: u64| {
        request.limits.set(kind, Bytes(bytes));
        Problem::lay_out(spec, machine, request.clone(), homes).is_ok()
    };
    if fails >= enough || !works(enough) {
        return error;
    }
    while enough - fails > 1 {
        let middle = fails + (enough - fails) / 2;
        if works(middle) { enough = middle } else { fails = middle }
    }
    *smallest = Bytes(enough);
    *hint = format!("{} {}", Limits::flag(kind), smallest.rounded_up());
    error
}

fn index_of(machine: &Machine, id: &str) -> usize {
    machine.memories.iter().position(|m| m.id == id).expect("a checked machine's references resolve")
}

fn check_limits(machine: &Machine, request: &Request) -> Result<(), PlanError> {
    for kind in [MemoryKind::Vram, MemoryKind::Dram, MemoryKind::Cxl, MemoryKind::Disk] {
        let installed: Bytes = machine.memories_of(kind).map(|m| m.capacity.value).sum();
        if let Some(limit) = request.limits.of(kind)
            && limit > installed
        {
            return Err(PlanError::BadRequest {
                field: kind.name(),
                found: limit.to_string(),
                expected: format!("at most {installed}, which is what {} has", machine.name),
            });
        }
    }
    Ok(())
}

fn moe_layers(spec: &ModelSpec, request: &Request) -> Result<Vec<MoeLayer>, PlanError> {
    let bad = |found: String, expected: String| PlanError::BadRequest { field: "popularity", found, expected };
    let bytes = spec.layer_bytes();
    let count = spec.moe_layers().count();
    if let Popularity::Shares(shares) = &request.popularity
        && shares.len() != count
    {
        return Err(bad(format!("{} layers", shares.len()), format!("one list for each of the {count} MoE layers")));
    }
    let mut layers = Vec::with_capacity(count);
    for (i, (layer, moe)) in spec.moe_layers().enumerate() {
        let mut by_popularity: Vec<u32> = (0..moe.num_experts).collect();
        if let Popularity::Shares(shares) = &request.popularity {
            let s = &shares[i];
            let sum: f64 = s.iter().sum();
            if s.len() != moe.num_experts as usize || !s.iter().all(|x| x.is_finite() && *x >= 0.0) || (sum - 1.0).abs() > 1e-3 {
                return Err(bad(
                    format!("{} numbers with sum {sum} for layer {layer}", s.len()),
                    format!("{} shares that sum to 1", moe.num_experts),
                ));
            }
            by_popularity.sort_by(|a, b| s[*b as usize].total_cmp(&s[*a as usize]).then(a.cmp(b)));
        }
        layers.push(MoeLayer {
            layer,
            num_experts: moe.num_experts,
            experts_per_token: moe.experts_per_token,
            mean_choices: moe.mean_choices(),
            iterations: moe.iterations,
            expert_bytes: bytes[layer as usize].per_expert,
            by_popularity,
        });
    }
    Ok(layers)
}

fn room_of(capacity: &[Bytes], fixed: &[Vec<(&'static str, Bytes)>]) -> Vec<Bytes> {
    capacity.iter().zip(fixed).map(|(c, lines)| c.saturating_sub(lines.iter().map(|(_, b)| *b).sum())).collect()
}

/// The fixed lines of memory `m`, with or without the main processor's part.
fn lines_of(spec: &ModelSpec, request: &Request, m: &Memory, capacity: Bytes, is_main: bool) -> Vec<(&'static str, Bytes)> {
    let mut lines = Vec::new();
    if is_main {
        lines.push((budget::NON_EXPERT_WEIGHTS, budget::non_expert_weights(spec)));
        lines.push((budget::KV, budget::kv(spec, request)));
        lines.push((budget::ACTIVATIONS, budget::activations(spec, request)));
    }
    // What is already less than the reserve is not used at all.
    let reserve = budget::reserve(request, m, capacity);
    lines.push((budget::RESERVE, if is_main { reserve } else { reserve.min(capacity) }));
    lines
}

/// The first line that does not fit, as an error.
fn check_lines(
    machine: &Machine,
    request: &Request,
    m: usize,
    capacity: Bytes,
    lines: &[(&'static str, Bytes)],
) -> Result<(), PlanError> {
    let memory = &machine.memories[m];
    let mut left = capacity;
    // The reserve comes first: nobody may use it.
    let reserve_first =
        lines.iter().filter(|(n, _)| *n == budget::RESERVE).chain(lines.iter().filter(|(n, _)| *n != budget::RESERVE));
    for (name, bytes) in reserve_first {
        if *bytes <= left {
            left = left.saturating_sub(*bytes);
            continue;
        }
        let uses: u64 = lines.iter().filter(|(n, _)| *n != budget::RESERVE).map(|(_, b)| b.0).sum();
        let smallest = smallest_capacity(memory, uses);
        let hint = if smallest > memory.capacity.value {
            "more than the memory has: a shorter --context, a smaller --batch or a smaller format".into()
        } else if request.limits.of(memory.kind).is_some() {
            format!("{} {smallest}", Limits::flag(memory.kind))
        } else {
            "a shorter --context, a smaller --batch or a smaller format".into()
        };
        return Err(PlanError::NoRoom {
            memory: memory.id.clone(),
            line: (*name).to_string(),
            needed: *bytes,
            available: left,
            capacity,
            smallest,
            hint,
        });
    }
    Ok(())
}

/// The least capacity that holds `uses` and its own reserve.
fn smallest_capacity(memory: &Memory, uses: u64) -> Bytes {
    match memory.kind {
        // uses + max(c / 50, 512 MiB) <= c
        MemoryKind::Vram => Bytes((uses + (512 << 20)).max((u128::from(uses) * 50).div_ceil(49) as u64 + 1)),
        _ => Bytes(uses),
    }
}

type FixedLines = Vec<Vec<(&'static str, Bytes)>>;

fn choose_main(
    spec: &ModelSpec,
    machine: &Machine,
    request: &Request,
    capacity: &[Bytes],
) -> Result<(Main, FixedLines), PlanError> {
    let mut skipped: Option<String> = None;
    for p in machine.processors_of(ProcessorKind::Gpu).chain(machine.processors_of(ProcessorKind::Cpu)) {
        let home = index_of(machine, &machine.home(p).id);
        let memory = &machine.memories[home];
        if memory.kind == MemoryKind::Vram && request.limits.vram == Some(Bytes::ZERO) {
            skipped = Some("--vram 0 leaves the GPU out".into());
            continue;
        }
        let fixed: FixedLines =
            (0..machine.memories.len()).map(|m| lines_of(spec, request, &machine.memories[m], capacity[m], m == home)).collect();
        match check_lines(machine, request, home, capacity[home], &fixed[home]) {
            Ok(()) => {
                let reason = match &skipped {
                    Some(why) => why.clone(),
                    None if p.kind == ProcessorKind::Gpu => "the first GPU; its memory holds all but routed experts".into(),
                    None => "the machine has no GPU".into(),
                };
                let main = Main { executor: p.id.clone(), executor_kind: p.kind, memory: memory.id.clone(), reason };
                return Ok((main, fixed));
            }
            // Without an explicit limit a GPU that is too small is left out, and the plan says so.
            Err(e) if memory.kind == MemoryKind::Vram && request.limits.vram.is_none() => {
                skipped = Some(format!("{} cannot hold all but routed experts: {e}", p.id));
            }
            Err(e) => return Err(e),
        }
    }
    unreachable!("a checked machine has a CPU, whose arm returns")
}

fn tier(machine: &Machine, memory: &Memory, p: &Processor, through: Option<&str>) -> Tier {
    debug_assert!(machine.memory(&memory.id).is_some());
    Tier {
        memory: memory.id.clone(),
        kind: memory.kind,
        executor: p.id.clone(),
        executor_kind: p.kind,
        through: through.map(str::to_string),
    }
}

/// Direct tiers first, then those through cache slots beside the main processor or the first CPU.
fn tiers(machine: &Machine, main: &Main, capacity: &[Bytes]) -> Vec<Tier> {
    let mut tiers = Vec::new();
    let usable = |m: &Memory| capacity[index_of(machine, &m.id)].0 > 0;
    for m in machine.memories.iter().filter(|m| m.kind != MemoryKind::Disk && usable(m)) {
        let at_home = |p: &&Processor| p.computes_from.first() == Some(&m.id);
        let reads = |p: &&Processor| p.computes_from.contains(&m.id);
        // Beside the memory if possible; where CPU and GPU share it, the GPU.
        let gpus_first = || machine.processors_of(ProcessorKind::Gpu).chain(machine.processors_of(ProcessorKind::Cpu));
        if let Some(p) = gpus_first().find(at_home).or_else(|| gpus_first().find(reads)) {
            tiers.push(tier(machine, m, p, None));
        }
    }
    let host = machine.processors_of(ProcessorKind::Cpu).next();
    let mut targets: Vec<&Processor> = machine.processor(&main.executor).into_iter().chain(host).collect();
    targets.dedup_by_key(|p| p.id.clone());
    for p in targets {
        let home = machine.home(p);
        // In shared memory the GPU computes whatever is loaded.
        let doubled = tiers.iter().any(|t| t.through.as_deref() == Some(home.id.as_str()));
        if doubled || !usable(home) {
            continue;
        }
        for m in machine.memories.iter().filter(|m| m.id != home.id && m.kind != MemoryKind::Vram && usable(m)) {
            if machine.link(&m.id, &home.id).is_some() && !(p.kind == ProcessorKind::Cpu && p.computes_from.contains(&m.id)) {
                tiers.push(tier(machine, m, p, Some(&home.id)));
            }
        }
    }
    tiers
}

/// Experts of the tier wait in host memory and are copied into slots beside a GPU.
fn is_copied_to_gpu(machine: &Machine, t: &Tier) -> bool {
    let through = t.through.as_deref().and_then(|id| machine.memory(id));
    matches!(t.kind, MemoryKind::Dram | MemoryKind::Cxl) && through.is_some_and(|m| m.kind == MemoryKind::Vram)
}

/// The machine's file says how fast pageable memory is copied there.
fn pageable_rate(machine: &Machine, t: &Tier) -> bool {
    let route = t.through.as_deref().and_then(|to| machine.route(&t.memory, to));
    route.is_some_and(|r| r.pageable_bandwidth.is_some())
}

/// Nothing is read from disk at run time when memory holds everything, whole experts and all.
fn drop_needless_disk(machine: &Machine, layers: &[MoeLayer], room: &[Bytes], total: u64, tiers: &mut Vec<Tier>) {
    let largest = layers.iter().map(|l| l.expert_bytes.0).max().unwrap_or(0);
    let held: u64 =
        tiers.iter().filter(|t| t.through.is_none()).map(|t| room[index_of(machine, &t.memory)].0.saturating_sub(largest)).sum();
    let exactly_one = tiers.iter().any(|t| t.through.is_none() && room[index_of(machine, &t.memory)].0 >= total);
    if held >= total || exactly_one {
        tiers.retain(|t| t.kind != MemoryKind::Disk);
    }
}
