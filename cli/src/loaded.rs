//! A model made ready to run: opened, planned for this machine (or by the user's plan), its session started.

use crate::args::{DeviceArg, ExecArgs, IoArg, PageCacheArg, WeightsArg};
use crate::cmd::plan::default_context;
use crate::model;
use crate::place::{self, Place};
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::sync::Arc;
use tierwise_cost::cost::{cost_model, step_limit};
use tierwise_cost::machine::{Machine, MemoryKind};
use tierwise_cost::model::ModelSpec;
use tierwise_cost::op::Batch;
use tierwise_cost::units::{Bytes, BytesPerS};
use tierwise_planner::budget::tight_ram;
use tierwise_planner::elastic::elastic_plan;
use tierwise_planner::engine::costs::EngineCosts;
use tierwise_planner::evaluate::{LayerPlacement, Placement, Prices, step_seconds};
use tierwise_planner::plan::{Interval, PrefetchKind, Tier};
use tierwise_planner::price::Case;
use tierwise_planner::{CheckedPlan, Limits, Plan, Problem, Request, SolverKind, budget, make_plan};
use tierwise_runtime::gguf::HostWeights;
use tierwise_runtime::import::ModelSource;
use tierwise_runtime::kernels::CpuKernels;
use tierwise_runtime::memory::PageSize;
use tierwise_runtime::session::process::ProcessMemory;
use tierwise_runtime::session::{
    IoBackend, IoOptions, Model, PageCache, Session, SessionConfig, Throttle, names_nodes, needs_device,
};
use tierwise_runtime::tokenizer::Tokenizer;

/// A model ready to run.
pub struct Loaded {
    pub session: Session,
    /// Or why there is none: token ids can still be run.
    pub tokenizer: Result<Tokenizer, String>,
    pub plan: CheckedPlan,
    /// The machine as it is used: without its GPUs, unless one of them is the device.
    pub machine: Machine,
    /// Where its description is from.
    pub machine_origin: String,
    /// Where it executes, and why there.
    pub device: String,
    pub threads: usize,
}

/// What a command is going to need.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Positions, if it knows.
    pub context: Option<usize>,
    /// Sequences computed together.
    pub batch: u32,
    /// The budget of host memory may change while it works.
    pub elastic: bool,
}

impl Default for Wanted {
    fn default() -> Self {
        Self { context: None, batch: 1, elastic: false }
    }
}

impl Loaded {
    /// Opens, plans, checks and starts. `context` is what the caller is going to need, if it knows.
    pub fn open(args: &ExecArgs, context: Option<usize>, capture_routing: bool, ui: &Ui) -> Result<Self> {
        Self::open_with(args, Wanted { context, ..Wanted::default() }, |c| SessionConfig { capture_routing, ..c }, ui)
    }

    /// [`Self::open`] with a changed session.
    pub fn open_with(
        args: &ExecArgs,
        wanted: Wanted,
        change: impl FnOnce(SessionConfig) -> SessionConfig,
        ui: &Ui,
    ) -> Result<Self> {
        let Wanted { batch, elastic, .. } = wanted;
        // Before anything measures or computes.
        if let Some(name) = &args.isa {
            CpuKernels::use_only(name)?;
        }
        let threads = threads(args.threads)?;
        let source = model::open(&args.model)?;
        if !source.has_weights() {
            bail!(
                "{}: a description without weights cannot be run; download the model, or make random weights: tierwise synth {} -o model.gguf",
                args.model,
                args.model
            );
        }
        let tokenizer = tokenizer(&source);
        let Place { mut backend, mut device, mut machine, machine_origin } = place::choose(args, threads)?;
        if elastic && backend.is_some() && args.device == DeviceArg::Auto {
            (backend, device, machine) =
                (None, "cpu: --control changes slots in host memory".to_string(), place::without_gpus(machine));
        }
        for Throttle { memory, rate } in &args.throttle {
            match machine.throttled(memory, *rate) {
                Some(slow) => machine = slow,
                // A plan from a file may have memories of its own.
                None if args.plan.is_some() => {}
                None => {
                    let ids: Vec<&str> = machine.memories.iter().map(|m| m.id.as_str()).collect();
                    bail!("--throttle {memory}: {} has no such memory, but {}", machine.name, ids.join(", "));
                }
            }
        }
        ui.detail(format!("machine: {} ({machine_origin})", machine.name));
        let mut model = Model::new(source)?;
        let made = Bytes(model.made_bytes());
        if made.0 > 0 {
            ui.note(format!("{made} of weights are stored in another form and were converted at load"));
        }
        let plan = match &args.plan {
            Some(path) => {
                let mut plan = read_plan(path)?;
                args.engine.apply(&mut plan)?;
                let plan = plan.check(model.spec(), None).with_context(|| path.display().to_string())?;
                if elastic && !plan.is_elastic() {
                    bail!(
                        "{}: the plan keeps experts in memory that they cannot leave, and --control is to change the budget; make it with `tierwise plan --elastic`",
                        path.display()
                    );
                }
                if plan.batch() < batch {
                    bail!(
                        "{}: a plan for {} sequences decoded together, and {batch} are wanted; plan with --batch {batch}",
                        path.display(),
                        plan.batch()
                    );
                }
                plan
            }
            None => {
                let mut plan = plan_for(model.spec(), &machine, args, wanted, ui)?;
                args.engine.apply(&mut plan)?;
                plan.check(model.spec(), Some(&machine))?
            }
        };
        let (device, machine) = match (needs_device(&plan), backend.is_some()) {
            (true, false) => bail!(
                "the plan computes on {}, which is not there: {device}; plan for this machine by leaving out --plan, or for the CPU with --vram 0B",
                plan.plan().main.executor
            ),
            // Asked for by name, a device that the plan leaves out is refused by the session.
            (false, true) if args.device == DeviceArg::Auto => {
                backend = None;
                (format!("cpu: {}", plan.plan().main.reason), place::without_gpus(machine))
            }
            _ => (device, machine),
        };
        if let Some(vram) = args.vram.filter(|v| v.0 > 0 && backend.is_none()) {
            ui.note(format!("--vram {vram} is not used: running on {device}"));
        }
        ui.note(format!("{}; {threads} threads; {}", device_line(&device), place_line(&plan)));
        if plan.plan().layers.iter().any(|l| l.slots > 0) {
            ui.detail(format!("engine: {}", crate::engine_flags::describe(plan.plan())));
        }
        bring_in(&mut model, args.weights, &plan, ui)?;
        let model = Arc::new(model);
        if plan.batch() > batch {
            ui.note(format!("the plan is for {} sequences decoded together; this command runs {batch}", plan.batch()));
        }
        let pages = page_size(args.weights);
        let config = change(SessionConfig { io: io_options(args), pages, ..SessionConfig::new(threads) });
        let costs = engine_costs(&plan, &model, &machine, ui)?;
        let mut session = match backend {
            Some(backend) => Session::on_device(model, &plan, config, costs, backend)?,
            None => Session::with_costs(model, &plan, config, costs)?,
        };
        if !args.throttle.is_empty() {
            session.throttle(&plan, &args.throttle)?;
        }
        for slow in session.throttled() {
            ui.note(format!(
                "throttled: {} gives experts at {} at most ({} that are loaded into slots, {} that are computed where they lie); nothing else is slowed",
                slow.memory,
                BytesPerS(slow.bytes_per_s),
                slow.experts_loaded,
                slow.experts_in_place
            ));
        }
        if let Some(memory) = session.device_memory() {
            ui.detail(place::memory_table(&memory));
        }
        if let Some(io) = session.io() {
            // Falling back from what is the default is worth a word; the rest is for those who asked.
            let fell_back = args.page_cache.is_none() && io.page_cache == "used";
            if fell_back { ui.note(io.to_string()) } else { ui.detail(io.to_string()) }
        }
        Ok(Self { session, tokenizer, plan, machine, machine_origin, device, threads })
    }

    /// The tokenizer, or why there is none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().map_err(|e| anyhow::anyhow!("{e}"))
    }

    /// Tokens per second that this machine's memory allows at most for one token after `past` others.
    pub fn decode_limit(&self, past: usize) -> f64 {
        self.batch_limit(past, 1)
    }

    /// The same for one token of each of `batch` sequences, all together.
    pub fn batch_limit(&self, past: usize, batch: u32) -> f64 {
        let step = Batch { tokens: batch, past: past as u32, sequences: batch, logits: batch };
        f64::from(batch) / step_limit(self.session.model().spec(), step, self.plan.kv_format(), &self.machine).0
    }

    /// What prices the predictions, in a line.
    pub fn cost_words(&self) -> String {
        cost_model(&self.machine).describe()
    }

    /// Predicted tokens per second for one token of each of `batch` sequences after `past` others, whatever the plan was made for.
    pub fn predicted_decode(&self, past: usize, batch: u32) -> Result<Interval> {
        let at = u32::try_from(past).unwrap_or(u32::MAX / 2).clamp(1, u32::MAX / 2);
        // Plans predict decoding at half of the context.
        let seconds = self.predicted_seconds(
            |r| (r.context, r.batch) = (2 * at, batch),
            |prices, _, placement| step_seconds(&prices.decode, placement),
        )?;
        Ok(per_second(f64::from(batch), seconds))
    }

    /// Predicted tokens per second of a prompt of `tokens`.
    pub fn predicted_prefill(&self, tokens: usize) -> Result<Interval> {
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        let seconds = self.predicted_seconds(
            |r| (r.prompt_tokens, r.chunk_tokens) = (tokens, r.chunk_tokens.min(tokens)),
            |prices, problem, placement| prices.prompt_seconds(problem, placement).0,
        )?;
        Ok(per_second(f64::from(tokens), seconds))
    }

    /// Seconds as expected, at best and at worst, of this plan's placement under a changed request.
    fn predicted_seconds(
        &self,
        change: impl FnOnce(&mut Request),
        seconds: impl Fn(&Prices, &Problem<'_>, &Placement) -> f64,
    ) -> Result<[f64; 3]> {
        let (spec, plan) = (self.session.model().spec(), self.plan.plan());
        let mut problem = Problem::new(spec, &self.machine, plan.request.clone())?;
        // Tiers by name: a plan from a file may have been made with others.
        let tier = |t: &Tier| problem.tiers.iter().position(|own| (&own.memory, &own.through) == (&t.memory, &t.through));
        let mut layers = Vec::with_capacity(problem.layers.len());
        for layer in &problem.layers {
            let tier_of = (0..layer.num_experts).map(|e| {
                let place = self.plan.tier(self.plan.tier_of(layer.layer, e));
                let index = tier(place).and_then(|i| u8::try_from(i).ok());
                index.with_context(|| format!("the plan keeps experts in {}, which this machine's plans do not", place.memory))
            });
            layers.push(LayerPlacement { tier_of: tier_of.collect::<Result<_>>()?, slots: self.plan.slots(layer.layer) });
        }
        let placement = Placement { layers };
        change(&mut problem.request);
        let cost = cost_model(&self.machine);
        Ok([Case::Expected, Case::Fast, Case::Slow]
            .map(|case| seconds(&Prices::new(&problem, cost.as_ref(), case), &problem, &placement)))
    }
}

/// The times by which the engine decides, on this machine. A plan from a file may be for other memories: without prefetches and fills
/// it needs none.
fn engine_costs(plan: &CheckedPlan, model: &Model, machine: &Machine, ui: &Ui) -> Result<Option<Arc<EngineCosts>>> {
    let settings = plan.plan().engine;
    let needed = settings.prefetch != PrefetchKind::Off || settings.fill;
    match EngineCosts::new(plan, model.spec(), machine, cost_model(machine).as_ref()) {
        Ok(costs) => Ok(Some(Arc::new(costs))),
        Err(e) if needed => Err(e).context("the plan prefetches or fills, which needs times of this machine: plan for it"),
        Err(e) => {
            ui.detail(format!("the engine goes without times: {e}"));
            Ok(None)
        }
    }
}

/// Tokens per second from seconds as expected, at best and at worst.
fn per_second(tokens: f64, [expected, fast, slow]: [f64; 3]) -> Interval {
    Interval { value: tokens / expected, low: tokens / slow, high: tokens / fast }
}

fn device_line(device: &str) -> String {
    format!("running on {device}")
}

fn io_options(args: &ExecArgs) -> IoOptions {
    let backend = match args.io {
        IoArg::Auto => IoBackend::Auto,
        IoArg::Uring => IoBackend::Uring,
        IoArg::Threads => IoBackend::Threads,
    };
    let page_cache = match args.page_cache {
        None => PageCache::Auto,
        Some(PageCacheArg::Use) => PageCache::Use,
        Some(PageCacheArg::Bypass) => PageCache::Bypass,
    };
    IoOptions { backend, page_cache }
}

/// How many experts are on the GPU, in host memory and on disk.
fn place_line(plan: &CheckedPlan) -> String {
    let mut counts = [0u64; 3];
    for layer in plan.moe_layers() {
        for expert in 0..plan.num_experts(*layer) {
            counts[match plan.tier(plan.tier_of(*layer, expert)).kind {
                MemoryKind::Vram => 0,
                MemoryKind::Dram | MemoryKind::Cxl => 1,
                MemoryKind::Disk => 2,
            }] += 1;
        }
    }
    let far =
        plan.plan().budgets.iter().filter(|b| b.kind == MemoryKind::Cxl).map(|b| b.line(budget::RESIDENT_EXPERTS)).sum::<Bytes>();
    let far = if far.0 > 0 { format!(" ({far} of them in CXL memory)") } else { String::new() };
    let slots = if plan.slot_bytes().0 > 0 { format!(" with {} of slots", plan.slot_bytes()) } else { String::new() };
    match counts {
        [0, in_memory, 0] => format!("all {in_memory} experts in memory{far}{slots}"),
        [0, in_memory, on_disk] => format!("{in_memory} experts in memory{far}, {on_disk} on disk{slots}"),
        [on_gpu, 0, 0] => format!("all {on_gpu} experts on the GPU"),
        [on_gpu, in_memory, 0] => format!("{on_gpu} experts on the GPU, {in_memory} in memory{far}{slots}"),
        [on_gpu, in_memory, on_disk] => {
            format!("{on_gpu} experts on the GPU, {in_memory} in memory{far}, {on_disk} on disk{slots}")
        }
    }
}

fn threads(asked: Option<usize>) -> Result<usize> {
    match asked {
        Some(0) => bail!("--threads 0: expected at least 1"),
        Some(n) if n > 1024 => bail!("--threads {n}: expected at most 1024"),
        Some(n) => Ok(n),
        None => Ok(std::thread::available_parallelism().map_or(1, std::num::NonZero::get)),
    }
}

/// Weights of host memory before the first token, if that is wanted.
fn bring_in(model: &mut Model, how: WeightsArg, plan: &CheckedPlan, ui: &Ui) -> Result<()> {
    if names_nodes(plan) {
        // Experts are copied to their nodes; what is no expert stays in the map.
        model.place(plan, page_size(how))?;
        if let Some(placed) = model.placed() {
            let huge = ProcessMemory::look(&[]).filter(|_| how == WeightsArg::Huge);
            let pages = huge.map_or_else(String::new, |m| format!("; {} of the process are in huge pages", m.huge));
            ui.note(format!("{placed}{pages}"));
        }
        return Ok(());
    }
    let (how, words) = match how {
        WeightsArg::Map => return Ok(()),
        WeightsArg::Prefault => (HostWeights::Prefault, "read into the page cache"),
        WeightsArg::Huge => (HostWeights::Huge, "copied into huge pages"),
        WeightsArg::Hugetlb => (HostWeights::Hugetlb, "copied into huge pages set aside"),
    };
    let on_disk = |tier: u32| plan.plan().tiers[tier as usize].kind == MemoryKind::Disk;
    if plan.plan().layers.iter().flat_map(|l| &l.runs).any(|run| on_disk(run.tier)) {
        bail!(
            "weights cannot be {words}: the plan keeps experts on disk, which stay there; leave --weights out, or give more --ram"
        );
    }
    let start = std::time::Instant::now();
    model.bring_in(how)?;
    let seconds = start.elapsed().as_secs_f64();
    let huge = ProcessMemory::look(&[]).filter(|_| how == HostWeights::Huge);
    let pages = huge.map_or_else(String::new, |m| format!("; {} of the process are in huge pages", m.huge));
    ui.note(format!("weights: {words} in {seconds:.1} s{pages}"));
    Ok(())
}

/// The pages of memory that is allocated for weights.
const fn page_size(how: WeightsArg) -> PageSize {
    match how {
        WeightsArg::Map | WeightsArg::Prefault => PageSize::System,
        WeightsArg::Huge => PageSize::Transparent,
        WeightsArg::Hugetlb => PageSize::Hugetlb,
    }
}

fn tokenizer(source: &ModelSource) -> Result<Tokenizer, String> {
    match source {
        ModelSource::Gguf { gguf, .. } => Tokenizer::from_gguf(gguf),
        ModelSource::Folder(folder) => Tokenizer::from_hf_folder(folder.weights().path()),
        ModelSource::Description { .. } => return Err("a description has no tokenizer".into()),
    }
    .map_err(|e| e.to_string())
}

fn read_plan(path: &Path) -> Result<Plan> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read plan {}", path.display()))?;
    Plan::from_json(&text).with_context(|| path.display().to_string())
}

/// A plan for this machine within the budgets of the flags.
fn plan_for(
    spec: &ModelSpec,
    machine: &Machine,
    args: &ExecArgs,
    Wanted { context, batch, elastic }: Wanted,
    ui: &Ui,
) -> Result<Plan> {
    let wanted = args.context.unwrap_or_else(|| {
        let needed = context.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        default_context(spec).max(needed).min(spec.context_length)
    });
    let has_gpu = machine.memories_of(MemoryKind::Vram).next().is_some();
    let request = Request {
        context: wanted,
        batch,
        chunk_tokens: args.chunk.min(wanted.max(1)),
        prompt_tokens: Request::default().prompt_tokens.min(wanted.max(1)),
        kv_format: args.kv,
        limits: Limits { ram: args.ram, vram: args.vram.filter(|_| has_gpu), cxl: args.cxl, ..Limits::default() },
        ..Request::default()
    };
    if let Some(warning) = tight_ram(machine, &request) {
        ui.note(warning);
    }
    let cost = cost_model(machine);
    if elastic {
        return Ok(elastic_plan(&Problem::elastic(spec, machine, request)?, cost.as_ref())?);
    }
    Ok(make_plan(&Problem::new(spec, machine, request)?, cost.as_ref(), SolverKind::Auto)?)
}
