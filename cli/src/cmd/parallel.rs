//! `tierwise parallel`: experts over several ranks, each policy of expert parallelism for real: who computes how much, what travels, and
//! whether the logits are those of one process.
//!
//! Under `mpirun` (feature `mpi`) ranks are processes; with `--ranks` they are threads of this one, and the rest is the same code.

use crate::cmd::bench::random_tokens;
use crate::model;
use crate::place;
use crate::ui::{self, Ui, number};
use anyhow::{Context, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tierwise_cost::cost::cost_model;
use tierwise_cost::machine::Machine;
use tierwise_cost::model::ModelSpec;
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::Bytes;
use tierwise_planner::balance::cost::{LayerCost, Rates};
use tierwise_planner::balance::decide::DecideSettings;
use tierwise_planner::balance::loads::Loads;
use tierwise_planner::balance::replay::Policy;
use tierwise_planner::balance::spill::SpillSettings;
use tierwise_planner::routing::RoutingTrace;
use tierwise_planner::{CheckedPlan, Problem, Request, SolverKind, make_plan};
use tierwise_runtime::RuntimeError;
use tierwise_runtime::kernels::CpuKernels;
use tierwise_runtime::parallel::{ParallelConfig, ParallelSession, Transport, link, run_threads};
use tierwise_runtime::session::{Model, Session, SessionConfig};
use tierwise_runtime::trace::read_routing;

/// `parallel`
#[derive(Debug, Args)]
pub struct ParallelArgs {
    /// GGUF file or folder with safetensors.
    pub model: String,
    /// Ranks as threads of this process. [default: those that mpirun started, in a build with MPI]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub ranks: Option<u16>,
    /// Policies to run, separated by commas: ep, eplb, eplb+split, llep, tierwise; or all.
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_value = "all")]
    pub policy: Vec<String>,
    /// Random tokens of each rank's prompt. As many others are run before, and counted for placements.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: u32,
    /// Tokens that each rank computes one at a time after its prompt.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub decode: u32,
    /// Runs of each policy.
    #[arg(long, short, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub repetitions: u32,
    /// Replace the routers' choices by those of a recorded trace; the logits mean nothing then, but are still the same as one process's.
    #[arg(long, value_name = "TRACE")]
    pub routing: Option<PathBuf>,
    /// Also compute each rank's tokens in its own process alone, and compare all logits.
    #[arg(long)]
    pub check: bool,
    /// Slots for experts on each rank, in every layer. [default: one more than are needed to hold each expert once]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_535))]
    pub slots: Option<u32>,
    /// Copies of experts that a rank keeps for L3, over all layers.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub spill_slots: usize,
    /// Fewest tokens for which an expert is computed on another rank.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub min_tokens: u64,
    /// LLEP: a rank takes at most so many times the mean.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub alpha: f64,
    /// LLEP acts from this largest / mean on.
    #[arg(long, value_name = "X", default_value_t = 1.3)]
    pub lambda: f64,
    /// Relative speed of each rank, where they differ, separated by commas.
    #[arg(long, value_name = "X", value_delimiter = ',')]
    pub speed: Vec<f64>,
    /// Decide as for these GPUs (h100, h200, b200, rtx-pro-6000). [default: for this machine and its measured messages]
    #[arg(long, value_name = "NAME")]
    pub gpu: Option<String>,
    /// Longest silence of a rank, in seconds, before the job ends.
    #[arg(long, value_name = "S", default_value_t = 60.0)]
    pub deadline: f64,
    /// Threads of each rank. [default: an equal part of all]
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Tokens of a prompt computed together.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub chunk: u32,
    /// Format of cached keys and values.
    #[arg(long, value_name = "FORMAT", default_value_t = QuantFormat::F16)]
    pub kv: QuantFormat,
    /// Plan memory by this description of a machine (a name or a file) instead of a probe of this one.
    #[arg(long, value_name = "MACHINE")]
    pub machine: Option<String>,
    /// Kernels of this instruction set only: scalar, avx2, avxvnni, avx512 or amx. [default: the fastest the CPU has]
    #[arg(long, value_name = "NAME")]
    pub isa: Option<String>,
}

/// What all ranks of a process share.
struct Job {
    policies: Vec<Policy>,
    model: Arc<Model>,
    machine: Machine,
    plan: CheckedPlan,
    trace: Option<Arc<RoutingTrace>>,
    threads: usize,
}

pub fn run(args: &ParallelArgs, ui: &Ui) -> Result<()> {
    if !(args.deadline > 0.0 && args.deadline <= 1e6) {
        bail!("--deadline {}: expected seconds above 0, at most 1000000", args.deadline);
    }
    for (flag, x) in [("--alpha", args.alpha), ("--lambda", args.lambda)] {
        if !(x.is_finite() && x > 0.0) {
            bail!("{flag} {x}: expected a positive number");
        }
    }
    let deadline = Duration::from_secs_f64(args.deadline);
    let launched = model::launched_ranks().filter(|n| *n > 1);
    match (args.ranks, launched) {
        (Some(_), Some(n)) => bail!(
            "--ranks under mpirun: {n} processes were started; leave --ranks out (in a build with --features mpi), or mpirun"
        ),
        (Some(ranks), None) => threads_of_this_process(args, ui, usize::from(ranks), deadline),
        (None, _) => processes(args, ui, deadline),
    }
}

fn threads_of_this_process(args: &ParallelArgs, ui: &Ui, ranks: usize, deadline: Duration) -> Result<()> {
    let job = prepare(args, ui, ranks)?;
    ui.note(format!("{ranks} ranks as threads of this process, {} threads each", job.threads));
    let results = run_threads(ranks, deadline, |transport| run_rank(args, &job, Box::new(transport), ui));
    // Who failed first says why; what the others say follows from that.
    let follows = |e: &anyhow::Error| matches!(e.downcast_ref(), Some(RuntimeError::Rank { .. }));
    let mut errors: Vec<anyhow::Error> = results.into_iter().filter_map(Result::err).collect();
    errors.sort_by_key(follows);
    errors.into_iter().next().map_or(Ok(()), Err)
}

#[cfg(feature = "mpi")]
fn processes(args: &ParallelArgs, ui: &Ui, deadline: Duration) -> Result<()> {
    use tierwise_runtime::parallel::mpi::MpiJob;
    let mpi = MpiJob::start()?;
    let mut transport = mpi.transport(deadline);
    // Rank 0 speaks for all.
    let quiet = Ui::new(ui.json, true, false);
    let ui = if transport.rank() == 0 { ui } else { &quiet };
    // Before anything is read: from here on all ranks are known to be there.
    let all_here = transport.barrier().map_err(anyhow::Error::from);
    let result = all_here.and_then(|()| prepare(args, ui, mpi.size())).and_then(|job| {
        ui.note(format!("{}, {} threads each", transport.describe(), job.threads));
        run_rank(args, &job, Box::new(mpi.transport(deadline)), ui)
    });
    if let Err(e) = &result {
        transport.abort(&format!("{e:#}"));
    }
    result
}

#[cfg(not(feature = "mpi"))]
fn processes(_: &ParallelArgs, _: &Ui, _: Duration) -> Result<()> {
    bail!(
        "--ranks: expected the number of ranks to run as threads of this process; for processes under mpirun build with `cargo build --release --features mpi` (needs libopenmpi-dev and libclang-dev); ranks on GPUs over NCCL are not there yet"
    )
}

/// Everything but the ranks.
fn prepare(args: &ParallelArgs, ui: &Ui, ranks: usize) -> Result<Job> {
    if let Some(name) = &args.isa {
        CpuKernels::use_only(name)?;
    }
    let policies = policies(&args.policy)?;
    let all_threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = args.threads.map_or((all_threads / ranks).max(1), usize::from);
    let source = model::open(&args.model)?;
    if !source.has_weights() {
        bail!(
            "{}: a description without weights cannot be run; make random weights: tierwise synth {0} -o model.gguf",
            args.model
        );
    }
    let model = Model::new(source)?;
    let (machine, origin) = model::machine(args.machine.as_deref(), Some(threads))?;
    let processors = machine.processors.len();
    let machine = place::without_gpus(machine);
    ui.detail(format!("machine: {} ({origin})", machine.name));
    if machine.processors.len() < processors {
        ui.note("ranks compute on CPUs; GPUs are left alone: ranks on GPUs would need NCCL, which is not there yet");
    }
    let spec = model.spec();
    let needed = args.tokens.saturating_add(args.decode);
    if needed > spec.context_length {
        bail!(
            "--tokens {} and --decode {}: {needed} in all, expected at most {}, the model's context",
            args.tokens,
            args.decode,
            spec.context_length
        );
    }
    let request = Request {
        context: needed,
        chunk_tokens: args.chunk.min(needed),
        prompt_tokens: args.tokens,
        kv_format: args.kv,
        ..Request::default()
    };
    let plan = make_plan(&Problem::new(spec, &machine, request)?, cost_model(&machine).as_ref(), SolverKind::Auto)?;
    let plan = plan.check(spec, Some(&machine))?;
    let trace = args.routing.as_deref().map(read_routing).transpose()?.map(Arc::new);
    if let Some(trace) = &trace {
        ui.note(format!("routing of {}: the logits mean nothing", trace.model));
    }
    Ok(Job { policies, model: Arc::new(model), machine, plan, trace, threads })
}

fn policies(names: &[String]) -> Result<Vec<Policy>> {
    if names.iter().any(|n| n == "all") {
        return Ok(Policy::ALL.iter().map(|(_, p)| *p).collect());
    }
    let known = Policy::ALL.map(|(n, _)| n).join(", ");
    let of_name = |n: &String| Policy::of_name(n).with_context(|| format!("--policy {n}: expected some of {known}; or all"));
    names.iter().map(of_name).collect()
}

/// One policy on one rank.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Outcome {
    seconds: f64,
    dispatch_bytes: u64,
    result_bytes: u64,
    weight_bytes: u64,
    /// Against one process, where that was asked for.
    largest_difference: Option<f32>,
    largest_logit: Option<f32>,
    rows_compared: u64,
    rows_identical: u64,
    seconds_of: [f64; 5],
}

/// What a rank computes: its prompt, and what comes one at a time after it.
struct Work {
    prompt: Vec<u32>,
    decode: Vec<u32>,
    /// Place in the trace.
    first: usize,
}

impl Work {
    fn new(args: &ParallelArgs, job: &Job, rank: usize, part: usize) -> Self {
        let vocab = job.model.spec().vocab_size;
        let count = (args.tokens + args.decode) as usize;
        let mut prompt = random_tokens(count, vocab, 2 * rank as u64 + part as u64 + 1);
        let decode = prompt.split_off(args.tokens as usize);
        let first = job.trace.as_ref().map_or(0, |t| (2 * rank + part) * count % t.num_tokens());
        Self { prompt, decode, first }
    }

    fn force(&self, job: &Job, session: &mut Session) -> Result<()> {
        Ok(session.force_routing(job.trace.as_ref().map(|t| (Arc::clone(t), self.first)))?)
    }

    /// Logits of all positions, one after the other.
    fn alone(&self, job: &Job, session: &mut Session) -> Result<Vec<Vec<f32>>> {
        session.reset();
        self.force(job, session)?;
        let mut all = Vec::new();
        session.for_each_logits(&self.prompt, 0, |_, logits| all.push(logits.to_vec()))?;
        for token in &self.decode {
            all.push(session.decode(*token)?.to_vec());
        }
        Ok(all)
    }

    fn together(&self, job: &Job, group: &mut ParallelSession, sink: &mut (dyn FnMut(usize, &[f32]) + Send)) -> Result<()> {
        group.reset();
        self.force(job, group.session_mut())?;
        group.for_each_logits(&self.prompt, &mut *sink)?;
        for (i, token) in self.decode.iter().enumerate() {
            let logits = group.decode(Some(*token))?;
            sink(self.prompt.len() + i, logits);
        }
        Ok(())
    }
}

fn run_rank(args: &ParallelArgs, job: &Job, mut transport: Box<dyn Transport>, ui: &Ui) -> Result<()> {
    let (rank, ranks) = (transport.rank(), transport.size());
    let spec = job.model.spec();
    let Some((_, moe)) = spec.moe_layers().next() else { bail!("{}: has no routed experts", spec.name) };
    let num_experts: Vec<u32> = spec.moe_layers().map(|(_, m)| m.num_experts).collect();
    let most_experts = num_experts.iter().copied().max().unwrap_or(0);
    let groups = moe.router.groups.map_or(1, |g| g.0);
    let described = transport.describe();
    let float = |f: QuantFormat| matches!(f, QuantFormat::F32 | QuantFormat::F16 | QuantFormat::BF16);
    let quantised = !spec.tensors.iter().all(|t| float(t.format));
    let settings = settings(args, job, transport.as_mut())?;
    let slots = args.slots.unwrap_or(most_experts.div_ceil(ranks as u32) + 1);
    let open = || Session::open(Arc::clone(&job.model), &job.plan, SessionConfig::new(job.threads));
    let first = ParallelConfig::in_order(Policy::Ep, settings.clone(), &num_experts);
    let mut group = ParallelSession::open(open()?, job.threads, transport, first)?;
    let mut measure = || -> Result<(Loads, Vec<(Policy, Value)>)> {
        // Placements are made from other tokens than they are judged by.
        group.count_loads();
        Work::new(args, job, rank, 0).together(job, &mut group, &mut |_, _| {})?;
        let loads = group.take_loads()?;
        let work = Work::new(args, job, rank, 1);
        let expected = if args.check { Some(work.alone(job, &mut open()?)?) } else { None };
        let mut done = Vec::new();
        for policy in &job.policies {
            let config = ParallelConfig::placed(*policy, settings.clone(), &loads, &num_experts, slots, groups as usize)?;
            group.configure(config)?;
            let outcome = one_policy(args, job, &mut group, &work, expected.as_deref())?;
            let texts = group.all_gather("outcomes", &serde_json::to_vec(&outcome)?)?;
            let of_rank = |text: &Vec<u8>| serde_json::from_slice(text).context("what another rank reports");
            let outcomes: Vec<Outcome> = texts.iter().map(of_rank).collect::<Result<_>>()?;
            done.push((*policy, summary(*policy, &group, quantised, &outcomes)));
        }
        Ok((loads, done))
    };
    let (loads, done) = match measure() {
        Ok(found) => found,
        Err(e) => {
            // The others wait for this rank; over MPI this is the end of all.
            if e.downcast_ref::<RuntimeError>().is_none_or(|e| !matches!(e, RuntimeError::Rank { .. })) {
                group.abort(&format!("{e:#}"));
            }
            return Err(e);
        }
    };
    if rank != 0 {
        return Ok(());
    }
    let value = json!({
        "model": spec.name, "ranks": ranks, "transport": described, "threads_per_rank": job.threads,
        "moe_layers": num_experts.len(), "num_experts": most_experts, "slots_per_rank": slots,
        "tokens_per_rank": args.tokens, "decoded_per_rank": args.decode, "repetitions": args.repetitions,
        "steps_placed_from": loads.num_steps(),
        "prices": {
            "expert_bytes": settings.cost.expert_bytes, "link_bytes_per_s": settings.cost.rates.link_bytes_per_s,
            "latency_s": settings.cost.rates.latency_s, "flops_per_s": settings.cost.rates.flops_per_s,
            "memory_bytes_per_s": settings.cost.rates.memory_bytes_per_s,
            "break_even_tokens": settings.cost.break_even_tokens(),
        },
        "policies": done.iter().map(|(_, v)| v).collect::<Vec<_>>(),
    });
    ui.result(&value, || text(&value, spec))?;
    let unequal = |v: &Value| v["check"]["equal"] == json!(false);
    match done.iter().find(|(_, v)| unequal(v)) {
        Some((policy, v)) => bail!("{}: logits differ from one process's by {}", policy.name(), v["check"]["largest_difference"]),
        None => Ok(()),
    }
}

fn one_policy(
    args: &ParallelArgs,
    job: &Job,
    group: &mut ParallelSession,
    work: &Work,
    expected: Option<&[Vec<f32>]>,
) -> Result<Outcome> {
    let (mut difference, mut logit, mut compared, mut identical) = (0.0_f32, 0.0_f32, 0_u64, 0_u64);
    let start = Instant::now();
    for _ in 0..args.repetitions {
        work.together(job, group, &mut |i, logits| {
            let Some(expected) = expected.and_then(|e| e.get(i)) else { return };
            compared += 1;
            identical += u64::from(logits == expected.as_slice());
            for (a, b) in logits.iter().zip(expected) {
                let d = (a - b).abs();
                // JSON has no infinity.
                difference = if d.is_finite() { difference.max(d) } else { f32::MAX };
                logit = logit.max(b.abs());
            }
        })?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let s = group.statistics();
    let times = [s.counts_time, s.decide_time, s.weights_time, s.exchange_time, s.compute_time];
    Ok(Outcome {
        seconds,
        dispatch_bytes: s.dispatch_bytes,
        result_bytes: s.result_bytes,
        weight_bytes: s.weight_bytes,
        largest_difference: expected.map(|_| difference),
        largest_logit: expected.map(|_| logit),
        rows_compared: compared,
        rows_identical: identical,
        seconds_of: times.map(|t| t.as_secs_f64()),
    })
}

/// Of the largest logit: up to the order of additions. Where weights are quantised, that order may round an eight-bit activation to the other
/// side, and single logits differ as much as by quantisation itself.
const EQUAL: f32 = 1e-5;
const EQUAL_QUANTISED: f32 = 0.25;

fn summary(policy: Policy, group: &ParallelSession, quantised: bool, outcomes: &[Outcome]) -> Value {
    let s = group.statistics();
    let sum = |of: fn(&Outcome) -> u64| outcomes.iter().map(of).sum::<u64>();
    let most = |of: fn(&Outcome) -> f64| outcomes.iter().map(of).fold(0.0, f64::max);
    let times = ["counts_s", "decide_s", "weights_s", "exchange_s", "compute_s"];
    let seconds_of: serde_json::Map<String, Value> = times
        .iter()
        .enumerate()
        .map(|(i, name)| ((*name).to_string(), json!(outcomes.iter().map(|o| o.seconds_of[i]).fold(0.0, f64::max))))
        .collect();
    let mut value = json!({
        "policy": policy.name(), "seconds": most(|o| o.seconds), "slowest_rank": seconds_of, "layer_steps": s.layer_steps,
        "imbalance_before": s.before.imbalance(), "imbalance_after": s.after.imbalance(),
        "worst_before": s.before.worst, "worst_after": s.after.worst,
        "rows_before": s.before.rows, "rows_after": s.after.rows,
        "experts_sent": s.experts_sent, "weight_bytes": sum(|o| o.weight_bytes),
        "dispatch_bytes": sum(|o| o.dispatch_bytes), "result_bytes": sum(|o| o.result_bytes),
    });
    if outcomes.iter().all(|o| o.largest_difference.is_some()) {
        let largest = |of: fn(&Outcome) -> Option<f32>| outcomes.iter().filter_map(of).fold(0.0, f32::max);
        let (difference, logit) = (largest(|o| o.largest_difference), largest(|o| o.largest_logit));
        let bound = logit.max(1.0) * if quantised { EQUAL_QUANTISED } else { EQUAL };
        value["check"] = json!({
            "equal": difference <= bound, "largest_difference": difference, "allowed": bound, "largest_logit": logit,
            "rows_compared": sum(|o| o.rows_compared), "rows_identical": sum(|o| o.rows_identical),
        });
    }
    value
}

/// By what all ranks decide: the slowest rank's rates, so that all have the same numbers.
fn settings(args: &ParallelArgs, job: &Job, transport: &mut dyn Transport) -> Result<DecideSettings> {
    let ranks = transport.size();
    if !args.speed.is_empty() && args.speed.len() != ranks {
        bail!("--speed: found {} numbers, expected {ranks}, one for each rank", args.speed.len());
    }
    let rates = match &args.gpu {
        Some(name) => match Rates::NAMES.iter().find(|(n, _)| n == name) {
            Some((_, rates)) => *rates,
            None => bail!("--gpu {name}: expected one of {}", Rates::NAMES.map(|(n, _)| n).join(", ")),
        },
        None => measured_rates(job, transport)?,
    };
    let spec = job.model.spec();
    let (layer, moe) = spec.moe_layers().next().context("a Mixture of Experts")?;
    let mut cost = LayerCost::new(spec.hidden_size, moe.inner_size, 1.0, &rates);
    cost.expert_bytes = job.model.expert_layout(layer).map_or(0.0, |l| l.bytes() as f64);
    // Rows go out encoded and come back as floats.
    cost.token_bytes = 4.0 * f64::from(spec.hidden_size);
    let speed = if args.speed.is_empty() { vec![1.0; ranks] } else { args.speed.clone() };
    let spill = SpillSettings {
        min_tokens: args.min_tokens,
        slots_per_device: args.spill_slots,
        max_rows: u64::MAX,
        host_bytes_per_s: 0.0,
    };
    Ok(DecideSettings { speed, cost, spill, alpha: args.alpha, lambda: args.lambda })
}

fn measured_rates(job: &Job, transport: &mut dyn Transport) -> Result<Rates> {
    let (latency_s, link) = link::measure(transport)?;
    let cpu = job.machine.main_processor();
    let mine = [cpu.f32_flops.value.0, job.machine.home(cpu).read_bandwidth.value.0];
    let message: Vec<u8> = mine.iter().flat_map(|x| x.to_le_bytes()).collect();
    let all = transport.all_gather("rates", &message)?;
    let slowest = |i: usize| {
        let of = |m: &Vec<u8>| m.get(8 * i..8 * i + 8).and_then(|b| b.try_into().ok()).map_or(0.0, f64::from_le_bytes);
        all.iter().map(of).fold(f64::INFINITY, f64::min)
    };
    Ok(Rates {
        flops_per_s: slowest(0),
        memory_bytes_per_s: slowest(1),
        link_bytes_per_s: link,
        node_bytes_per_s: f64::INFINITY,
        latency_s,
        launch_s: 0.0,
        row_tile: 1,
    })
}

fn text(value: &Value, spec: &ModelSpec) -> String {
    let empty = Vec::new();
    let policies = value["policies"].as_array().unwrap_or(&empty);
    let f = |v: &Value| v.as_f64().unwrap_or(0.0);
    let bytes = |v: &Value| Bytes(v.as_u64().unwrap_or(0)).to_string();
    let rows = policies.iter().map(|p| {
        let check = match &p["check"] {
            Value::Null => "-".to_string(),
            c if c["equal"] == json!(true) && c["rows_identical"] == c["rows_compared"] => "identical".to_string(),
            c => format!("{} ({:.1e})", if c["equal"] == json!(true) { "equal" } else { "DIFFER" }, f(&c["largest_difference"])),
        };
        vec![
            p["policy"].as_str().unwrap_or_default().to_string(),
            format!("{:.3}", f(&p["imbalance_before"])),
            format!("{:.3}", f(&p["imbalance_after"])),
            format!("{:.2}", f(&p["worst_after"])),
            bytes(&p["dispatch_bytes"]),
            bytes(&p["result_bytes"]),
            p["experts_sent"].to_string(),
            bytes(&p["weight_bytes"]),
            format!("{} s", number(f(&p["seconds"]))),
            check,
        ]
    });
    let header = ["policy", "before", "after", "worst", "rows sent", "results", "experts", "weights", "time", "logits"];
    format!(
        "{}: {} layers of {} experts over {}, {} slots on each rank; {} tokens of each rank and {} one at a time\n{}\n\
         before, after: largest / mean tokens of ranks, over layers and steps, with experts in order and as the policy has them; worst: of one layer and step\n\
         a copy of an expert pays from {} tokens on",
        spec.name,
        value["moe_layers"],
        value["num_experts"],
        value["transport"].as_str().unwrap_or_default(),
        value["slots_per_rank"],
        value["tokens_per_rank"],
        value["decoded_per_rank"],
        ui::table(&header, rows, true),
        number(f(&value["prices"]["break_even_tokens"])),
    )
}
