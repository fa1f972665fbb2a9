//! The command line, as clap sees it. Parsing has no side effects; `cmd/*` turns arguments into work.

use crate::cmd::calibrate::CalibrateArgs;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::{Bytes, BytesPerS, Seconds};
use tierwise_runtime::backend::Choice;
use tierwise_runtime::session::Throttle;

/// Plan and run Mixture-of-Experts models on limited VRAM.
#[derive(Debug, Parser)]
#[command(name = "tierwise", version, propagate_version = true, max_term_width = 110)]
#[command(
    after_help = "Start here:  tierwise demo\nThen:        tierwise doctor; tierwise plan MODEL.gguf; tierwise run MODEL.gguf -p \"Hello\""
)]
pub struct Cli {
    /// Print one JSON object on standard output; everything else goes to standard error.
    #[arg(long, global = true)]
    pub json: bool,
    /// Print results only: no progress, no notes.
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Say more about what is done and why.
    #[arg(long, short, global = true)]
    pub verbose: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what is inside a model: layers, experts, bytes by role, format and layer.
    #[command(after_help = "Example:  tierwise inspect qwen3-30b-a3b --format Q4_K_M")]
    Inspect(InspectArgs),
    /// Look at this machine: processors, memory, GPUs, drivers, disk; with hints.
    #[command(after_help = "Example:  tierwise doctor --json")]
    Doctor(DoctorArgs),
    /// Measure this machine thoroughly, so that predictions for it rest on its own numbers.
    #[command(after_help = "Example:  tierwise calibrate --quick --folder /models")]
    Calibrate(CalibrateArgs),
    /// Decide where every expert goes, and predict the speed.
    #[command(after_help = "Example:  tierwise plan qwen3-30b-a3b --machine rtx3090-24g-ddr4-64g --vram 12GiB -o plan.json")]
    Plan(PlanArgs),
    /// Study machines one might buy: sweep machines, memory, links, contexts, batches, arrivals; with plots and marginal values.
    #[command(
        after_help = "Example:  tierwise capacity which-gpu -o report.html\n          tierwise capacity --model qwen3-30b-a3b --machine rtx4090-24g-ddr5-64g --vram 8GiB,12GiB,24GiB"
    )]
    Capacity(Box<crate::cmd::capacity::CapacityArgs>),
    /// Replay recorded routing: count hits of cache policies, or run a plan or a cache on a virtual clock.
    #[command(
        after_help = "Example:  tierwise simulate --trace routing.twtrace --cache 0.25 --compare\n          tierwise simulate --trace routing.twtrace --model gpt-oss-20b --format MXFP4 --machine rtx3060-12g-ddr4-32g --cache 0.25,0.5 --policy lru,adaptive"
    )]
    Simulate(Box<crate::cmd::simulate::SimulateArgs>),
    /// Place experts over many devices, and compare policies of expert parallelism on a log of loads.
    #[command(
        after_help = "Example:  tierwise balance --load counts.json --devices 8 --replicas 288 -o placement.json\n          tierwise balance --load routing.twtrace --devices 8 --model gpt-oss-20b --tokens-per-step 4096 --policy ep,llep,tierwise\n          tierwise balance --load counts.json --devices 8 --replicas 192 --host-slots 8 --host-price 10   (256 experts: the rest waits in host memory)"
    )]
    Balance(Box<crate::cmd::balance::BalanceArgs>),
    /// Write a plan, or a placement over devices, for another engine: its file, its command line, and what is lost.
    #[command(
        after_help = "Example:  tierwise export plan.json --to llama.cpp --model qwen3-30b-a3b.gguf\n          tierwise export placement.json --to sglang -o experts.json"
    )]
    Export(crate::cmd::export::ExportArgs),
    /// Say why each expert of a plan is where it is.
    #[command(after_help = "Example:  tierwise explain plan.json")]
    Explain(ExplainArgs),
    /// Predict runs of other engines from their description, and compare with what was measured.
    #[command(after_help = "Example:  tierwise predict --runs published_runs.json --refit")]
    Predict(crate::cmd::predict::PredictArgs),
    /// Generate text.
    #[command(after_help = "Example:  tierwise run model.gguf -p \"ROMEO:\" -n 64 --report")]
    Run(RunArgs),
    /// Change the budget of host memory of a run that goes on, or look at it.
    #[command(
        after_help = "Example:  tierwise run model.gguf -p hello -n 2000 --ram 8G --control /tmp/tw.sock &\n          tierwise control /tmp/tw.sock ram 4G; tierwise control /tmp/tw.sock wait\n          echo status | nc -U /tmp/tw.sock\n\nSlots come and go in stages between the layers of a step; the tokens stay the same. A budget too small for the run is refused with\nthe smallest that works, and one larger than the machine with what it has; the run then goes on as it was."
    )]
    Control(crate::cmd::control::ControlArgs),
    /// Compare a plan with reality: load and compute as `run` would, then look at slots, bytes and memory. Or replay a recorded run.
    #[command(
        after_help = "Example:  tierwise verify plan.json model.gguf\n          tierwise run model.gguf -p hello --ram 2GiB --record run.rec; tierwise verify --replay run.rec model.gguf"
    )]
    Verify(crate::cmd::verify::VerifyArgs),
    /// Measure prefill and decode speed beside the machine's limit.
    #[command(after_help = "Example:  tierwise bench model.gguf -p 512 -n 64 -r 5")]
    Bench(BenchArgs),
    /// Run with experts spread over several ranks, under one policy of expert parallelism or all: balance, bytes, weights that moved.
    #[command(
        after_help = "Example:  tierwise parallel model.gguf --ranks 4 --tokens 256 --check\n          mpirun -n 4 tierwise parallel model.gguf --routing routing.twtrace --policy ep,llep,tierwise   (built with --features mpi)"
    )]
    Parallel(Box<crate::cmd::parallel::ParallelArgs>),
    /// Print raw logits of all positions, for comparison with other engines.
    #[command(after_help = "Example:  echo 1 2 3 | tierwise logits model.gguf --tokens - --json --routing")]
    Logits(LogitsArgs),
    /// Measure perplexity on a text.
    #[command(after_help = "Example:  tierwise perplexity model.gguf --text wiki.txt --window 512")]
    Perplexity(PerplexityArgs),
    /// Record routing, look at it, make it up, or bring it from other formats.
    #[command(subcommand)]
    #[command(after_help = "Example:  tierwise trace stats routing.twtrace")]
    Trace(crate::cmd::trace::TraceCommand),
    /// Turn a safetensors folder or a GGUF file into a GGUF file with other weight formats.
    #[command(
        after_help = "Example:  tierwise convert ./Qwen3-30B-A3B -o qwen3-q4.gguf --format Q4_K_M\n          tierwise convert model-f16.gguf -o model.gguf --role experts=Q4_K,attention=Q8_0,embedding=Q6_K,output=Q6_K"
    )]
    Convert(crate::cmd::convert::ConvertArgs),
    /// Make a random-weight GGUF in the exact shape of a real model, to benchmark before downloading.
    #[command(after_help = "Example:  tierwise synth olmoe-1b-7b --format Q4_K_M -o olmoe.gguf")]
    Synth(SynthArgs),
    /// Plan and run the bundled tiny model, in seconds.
    #[command(after_help = "Example:  tierwise demo -p \"KING HENRY:\"")]
    Demo(DemoArgs),
    /// Print a completion script for a shell.
    #[command(after_help = "Example:  tierwise completions bash > /etc/bash_completion.d/tierwise")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    #[command(after_help = "Example:  tierwise man | man -l -")]
    Man,
}

/// Which model, and in which format when it is only described.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// GGUF file (first part of a split one), folder with config.json and *.safetensors, or the name of a built-in description.
    pub model: String,
    /// Weight format to assume for a model without weights (Q4_K_M, Q8_0, BF16, MXFP4, ...). [default: Q4_K_M]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Take only the first N layers of a model without weights.
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
}

/// `inspect`
#[derive(Debug, Args)]
pub struct InspectArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Also list every tensor.
    #[arg(long)]
    pub tensors: bool,
}

/// `doctor`
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Folder where models will lie: its disk is looked at.
    #[arg(long, default_value = ".")]
    pub folder: PathBuf,
}

/// Budgets and shape of the work to plan for.
#[derive(Debug, Args)]
pub struct PlanningArgs {
    /// Machine: a TOML file or the name of a built-in one; this machine when absent.
    #[arg(long, value_name = "M")]
    pub machine: Option<String>,
    /// Workload: a TOML file or a built-in name (chat, batch8, coding-agent, summarise); the flags below change its fields.
    #[arg(long, value_name = "W")]
    pub workload: Option<String>,
    /// Tokens of context to reserve the cache for. [default: 4096, or the model's own if smaller]
    #[arg(long, value_name = "N")]
    pub context: Option<u32>,
    /// Sequences decoded together. [default: 1]
    #[arg(long, value_name = "N")]
    pub batch: Option<u32>,
    /// Tokens computed together in prefill. [default: 512]
    #[arg(long, value_name = "N")]
    pub chunk: Option<u32>,
    /// Tokens of a typical prompt, for the time to the first token. [default: 512]
    #[arg(long, value_name = "N")]
    pub prompt_tokens: Option<u32>,
    /// Format of cached keys and values: F32, F16, BF16 or Q8_0. [default: F16]
    #[arg(long, value_name = "FORMAT")]
    pub kv: Option<QuantFormat>,
    /// GPU memory to use at most.
    #[arg(long, value_name = "SIZE")]
    pub vram: Option<Bytes>,
    /// Host memory to use at most.
    #[arg(long, value_name = "SIZE")]
    pub ram: Option<Bytes>,
    /// CXL memory to use at most.
    #[arg(long, value_name = "SIZE")]
    pub cxl: Option<Bytes>,
    /// Disk space for experts to use at most.
    #[arg(long, value_name = "SIZE")]
    pub disk: Option<Bytes>,
    /// What to make fast. [default: decode]
    #[arg(long, value_enum)]
    pub objective: Option<ObjectiveArg>,
    /// Time to the first token of the prompt that the plan has to keep, e.g. 2s.
    #[arg(long, value_name = "S")]
    pub slo_ttft: Option<Seconds>,
    /// Time per token of a sequence (a decode step, whatever the batch) that the plan has to keep, e.g. 50ms.
    #[arg(long, value_name = "S")]
    pub slo_tpot: Option<Seconds>,
    /// Host memory to page-lock at most: staging buffers, and experts that are copied to a GPU. [default: no limit]
    #[arg(long, value_name = "SIZE")]
    pub pinned: Option<Bytes>,
    /// No cache slots: every expert is computed where it lies. What llama.cpp, kTransformers and mistral.rs can do; use it before `export`.
    #[arg(long)]
    pub no_cache: bool,
    /// How to search.
    #[arg(long, value_enum, default_value_t = SolverArg::Auto)]
    pub solver: SolverArg,
    /// Seconds that `--solver ilp` may take. [default: 60]
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub time_limit: Option<f64>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(s) if (0.1..=86_400.0).contains(&s) => Ok(s),
        _ => Err(format!("{text:?} is not a number of seconds from 0.1 to 86400")),
    }
}

/// What to make fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum ObjectiveArg {
    Decode,
    Prefill,
    Mix,
}

/// How to search for a placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum SolverArg {
    Auto,
    Greedy,
    Local,
    Ilp,
    Exhaustive,
}

/// `plan`
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub planning: PlanningArgs,
    /// Write the plan to this file.
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub engine: crate::engine_flags::EngineFlags,
    /// Keep every expert on disk and in slots, none pinned in memory, so that --ram may change while a run follows the plan (run --control).
    #[arg(long, conflicts_with_all = ["trace", "solver"])]
    pub elastic: bool,
    /// Also say what one more GiB of each memory and one more GB/s of each link would bring.
    #[arg(long)]
    pub marginal: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub trace: crate::cmd::plan_trace::TraceArgs,
}

/// `explain`
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// The plan.
    pub plan: PathBuf,
}

/// How to execute a model on this machine.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// GGUF file or folder with safetensors.
    pub model: String,
    /// Follow this plan instead of making one.
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
    /// Threads. [default: all]
    #[arg(long, short, value_name = "N")]
    pub threads: Option<usize>,
    /// Tokens of context. [default: 4096, or the model's own if smaller]
    #[arg(long, value_name = "N", conflicts_with = "plan")]
    pub context: Option<u32>,
    /// Tokens computed together in prefill.
    #[arg(long, value_name = "N", default_value_t = 512, conflicts_with = "plan")]
    pub chunk: u32,
    /// Host memory to use at most; experts beyond it are read from disk when they are needed.
    #[arg(long, value_name = "SIZE", conflicts_with = "plan")]
    pub ram: Option<Bytes>,
    /// GPU memory to use at most, everything included but the driver's own context; 0B leaves the GPU out. [default: what is free]
    #[arg(long, value_name = "SIZE", conflicts_with = "plan")]
    pub vram: Option<Bytes>,
    /// CXL memory to use at most.
    #[arg(long, value_name = "SIZE", conflicts_with = "plan")]
    pub cxl: Option<Bytes>,
    /// Format of cached keys and values.
    #[arg(long, value_name = "FORMAT", default_value_t = QuantFormat::F16, conflicts_with = "plan")]
    pub kv: QuantFormat,
    /// Where to execute: a GPU through CUDA or WGSL (Vulkan) with the CPU beside it, or the CPU alone. auto takes the best there is.
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto)]
    pub device: DeviceArg,
    /// Plan and predict by this description of a machine (a name or a file) instead of a probe of this one; its GPU stands for the device.
    /// With --plan: predict by it. A probe takes long where the machine is slow, in emulation above all.
    #[arg(long, value_name = "MACHINE")]
    pub machine: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub engine: crate::engine_flags::EngineFlags,
    /// How experts on disk are read: io_uring where the kernel has it, else threads. -v says which, and why.
    #[arg(long, value_enum, default_value_t = IoArg::Auto)]
    pub io: IoArg,
    /// Reads of experts on disk leave copies in the system's page cache, or bypass it. [default: bypass if the file system can]
    #[arg(long, value_enum)]
    pub page_cache: Option<PageCacheArg>,
    /// How weights in host memory come from their file: mapped and read when first touched, mapped and read at once, or copied into huge
    /// pages that the system finds (huge) or that the administrator has set aside (hugetlb). Without memory nodes in the plan, all but map
    /// need all experts in memory.
    #[arg(long, value_enum, default_value_t = WeightsArg::Map)]
    pub weights: WeightsArg,
    /// Hold experts of a memory of the plan back to a rate, to stand in for slow memory that is not there: `cxl0=5GB/s`; may be repeated.
    /// Predictions are for a machine as slow. Loads from it are held back and reads by the CPU in it; other weights, keys and values are not,
    /// so it cannot be the memory that holds them.
    #[arg(long, value_name = "MEMORY=RATE", value_parser = throttle)]
    pub throttle: Vec<Throttle>,
    /// Kernels of this instruction set only, for comparisons: scalar, avx2, avxvnni, avx512 or amx. [default: the fastest the CPU has]
    #[arg(long, value_name = "NAME")]
    pub isa: Option<String>,
}

/// `cxl0=5GB/s`.
fn throttle(text: &str) -> Result<Throttle, String> {
    let (memory, rate) = text.split_once('=').ok_or("expected a memory and a rate, such as cxl0=5GB/s")?;
    let rate = rate.trim().parse::<BytesPerS>().map_err(|e| e.to_string())?;
    if rate.0 < 1.0 {
        return Err(format!("{rate}: expected at least 1 B/s"));
    }
    Ok(Throttle { memory: memory.trim().to_string(), rate })
}

/// How weights come into host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum WeightsArg {
    Map,
    Prefault,
    Huge,
    Hugetlb,
}

/// How experts on disk are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum IoArg {
    Auto,
    Uring,
    Threads,
}

/// Whether reads of experts on disk go through the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum PageCacheArg {
    Use,
    Bypass,
}

/// Where to execute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum DeviceArg {
    Auto,
    Cpu,
    Wgpu,
    Cuda,
    /// Plain loops: to test the rest.
    #[value(hide = true)]
    Reference,
}

impl DeviceArg {
    /// What back-ends are asked for.
    pub const fn choice(self) -> Choice {
        match self {
            Self::Auto => Choice::Auto,
            Self::Cpu => Choice::Cpu,
            Self::Wgpu => Choice::Wgpu,
            Self::Cuda => Choice::Cuda,
            Self::Reference => Choice::Reference,
        }
    }
}

/// How the next token is chosen.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Tokens to generate at most.
    #[arg(long = "num-tokens", short = 'n', value_name = "N", default_value_t = 128)]
    pub num_tokens: usize,
    /// Temperature; 0 always takes the most likely token.
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    pub temp: f32,
    /// Choose among the K most likely tokens; 0 for all.
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub top_k: usize,
    /// Choose among the most likely tokens that together have probability P.
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub top_p: f32,
    /// Drop tokens less likely than P times the most likely one.
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    pub min_p: f32,
    /// Seed of the random choice. [default: from the clock, and printed]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
}

/// What to do with a model's reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ReasoningArg {
    /// Print it before the answer.
    Show,
    /// Keep it off the output.
    Hide,
}

/// `run`
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub exec: ExecArgs,
    /// The prompt; `-` reads it from standard input.
    #[arg(long, short, value_name = "TEXT", required_unless_present = "chat")]
    pub prompt: Option<String>,
    /// Wrap the prompt in the model's chat template; without a prompt, talk: one line of standard input is one turn.
    #[arg(long)]
    pub chat: bool,
    /// With --chat: use the Jinja template in this file instead of the model's own.
    #[arg(long, value_name = "FILE", requires = "chat", conflicts_with = "chatml")]
    pub chat_template: Option<PathBuf>,
    /// With --chat: show the model's reasoning (dimmed on a terminal) or only the answer.
    #[arg(long, value_enum, default_value = "show", requires = "chat")]
    pub reasoning: ReasoningArg,
    /// With --chat: use the ChatML form instead of the model's own template.
    #[arg(long, requires = "chat")]
    pub chatml: bool,
    /// System message for --chat.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    /// Do not stop at the end-of-text token.
    #[arg(long)]
    pub ignore_eos: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sampling: SamplingArgs,
    /// Add predicted, measured and limit at the end.
    #[arg(long)]
    pub report: bool,
    /// Before the first token, look on which memory nodes the weights lie; end with an error if it is not as planned.
    #[arg(long)]
    pub verify: bool,
    /// Write what the engine was told and what it decided to this file, for `verify --replay`; written on failure too.
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Make a Unix socket here that takes `ram SIZE`, `status` and `wait`, a line each, and answers each with a line of JSON: --ram then
    /// changes while the run goes on (see `control`). Experts are planned as `plan --elastic` does.
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
}

/// `bench`
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub exec: ExecArgs,
    /// Prompt lengths to prefill, separated by commas; 0 for none.
    #[arg(long, short = 'p', value_name = "N", value_delimiter = ',', default_value = "512")]
    pub prompt_tokens: Vec<usize>,
    /// Tokens to decode, separated by commas; 0 for none.
    #[arg(long = "num-tokens", short = 'n', value_name = "N", value_delimiter = ',', default_value = "64")]
    pub num_tokens: Vec<usize>,
    /// Tokens already in the cache before each test.
    #[arg(long, short, value_name = "N", default_value_t = 0)]
    pub depth: usize,
    /// Sequences computed together, separated by commas; speeds are those of all together. Above 1 on the CPU only.
    #[arg(long, short = 'b', value_name = "N", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: Vec<u32>,
    /// Repetitions.
    #[arg(long, short, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repetitions: u32,
    /// Replace the routers' choices by those of this routing trace (NAME.meta.json), to measure random weights under real routing.
    #[arg(long, value_name = "TRACE")]
    pub routing: Option<PathBuf>,
    /// Make a Unix socket here that changes --ram while the bench goes on, as `run --control` does.
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
}

/// `logits`
#[derive(Debug, Args)]
pub struct LogitsArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub exec: ExecArgs,
    /// File with token ids separated by white space; `-` for standard input.
    #[arg(long, value_name = "FILE")]
    pub tokens: String,
    /// Also print which experts the router chose.
    #[arg(long)]
    pub routing: bool,
    /// Write the logits as raw little-endian float32 [tokens, vocab] to this file instead of printing them.
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `perplexity`
#[derive(Debug, Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub exec: ExecArgs,
    /// The text; `-` for standard input.
    #[arg(long, value_name = "FILE")]
    pub text: String,
    /// Tokens per window; the second half of each is scored, as llama.cpp does.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub window: usize,
}

/// `synth`
#[derive(Debug, Args)]
pub struct SynthArgs {
    /// Name of a built-in description, a config.json, or a TOML description.
    pub model: String,
    /// Weight format: Q4_K_M, Q8_0, Q4_0, BF16, MXFP4, ...
    #[arg(long, value_name = "FORMAT", default_value = "Q4_K_M")]
    pub format: String,
    /// Only the first N layers.
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
    /// Seed of the weights.
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// The file to write.
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
}

/// `demo`
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// The prompt to continue.
    #[arg(long, short, value_name = "TEXT", default_value = "ROMEO:")]
    pub prompt: String,
    /// Tokens to generate.
    #[arg(long = "num-tokens", short = 'n', value_name = "N", default_value_t = 160)]
    pub num_tokens: usize,
    /// Seed of the random choice.
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
}
