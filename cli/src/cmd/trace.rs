//! `tierwise trace`: recorded routing: look at it, record it, make it up, bring it from other formats.

use crate::args::ExecArgs;
use crate::cmd::{read_text, trace_import};
use crate::loaded::Loaded;
use crate::ui::{self, Ui, number, percent};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tierwise_planner::routing::{Columns, GeneratorSpec, Provenance, RoutingTrace, Sequence, TokenPhase, TraceStats, generate};
use tierwise_runtime::exec::route::NO_EXPERT;
use tierwise_runtime::session::CapturedRouting;
use tierwise_runtime::tokenizer::AddSpecial;
use tierwise_runtime::trace::{read_if_counts, read_routing, write_routing};

/// What to do with traces.
#[derive(Debug, Subcommand)]
pub enum TraceCommand {
    /// Say what a trace is like: skew, locality, hits of caches, distinct experts per batch.
    #[command(after_help = "Example:  tierwise trace stats routing.twtrace")]
    Stats(StatsArgs),
    /// Run a model over a text and record which experts its routers choose, and with which weights.
    #[command(after_help = "Example:  tierwise trace record model.gguf --text wiki.txt -n 64 -o wiki.twtrace")]
    Record(RecordArgs),
    /// Make up a trace: with the statistics of another, or with Zipf popularity.
    #[command(after_help = "Example:  tierwise trace synth --like routing.twtrace --tokens 5000 -o made-up.twtrace\n          \
                            tierwise trace synth --zipf 0.6 --layers 48 --experts 128 --top-k 8 --repeat 0.3 -o zipf.twtrace")]
    Synth(SynthArgs),
    /// Make a trace file of a trace in another format, or a counts file where it holds counts only.
    #[command(
        after_help = "Example:  tierwise trace import --from jsonl routing.jsonl --model qwen3-30b-a3b -o routing.twtrace\n          \
                            tierwise trace import expert_distribution_recorder_1.pt -o counts.json"
    )]
    Import(trace_import::ImportArgs),
}

/// `trace stats`
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// The trace: NAME.twtrace, or NAME.meta.json with NAME.ids.u8 beside it; or a counts file, of which only the skew is known.
    pub trace: PathBuf,
}

/// `trace record`
#[derive(Debug, Args)]
pub struct RecordArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub exec: ExecArgs,
    /// The text to run over; `-` for standard input.
    #[arg(long, value_name = "FILE")]
    pub text: String,
    /// Licence of the text, for whoever gets the trace.
    #[arg(long, value_name = "NAME", default_value = "not stated")]
    pub licence: String,
    /// Tokens to decode after the text, always the most likely one.
    #[arg(long = "num-tokens", short = 'n', value_name = "N", default_value_t = 0)]
    pub num_tokens: usize,
    /// The trace file to write.
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
}

/// `trace synth`
#[derive(Debug, Args)]
pub struct SynthArgs {
    /// Fit popularity, repetition and shifts to this trace.
    #[arg(long, value_name = "TRACE", conflicts_with = "zipf")]
    pub like: Option<PathBuf>,
    /// Zipf popularity with this exponent (0 is uniform, about 0.5 is as skewed as public traces).
    #[arg(long, value_name = "S", requires = "layers", requires = "experts", requires = "top_k")]
    pub zipf: Option<f64>,
    /// With --zipf: MoE layers.
    #[arg(long, value_name = "N", requires = "zipf")]
    pub layers: Option<usize>,
    /// With --zipf: routed experts per layer.
    #[arg(long, value_name = "N", requires = "zipf")]
    pub experts: Option<u32>,
    /// With --zipf: experts per token.
    #[arg(long, value_name = "K", requires = "zipf")]
    pub top_k: Option<usize>,
    /// With --zipf: kinds of work, each with an order of experts of its own.
    #[arg(long, value_name = "N", requires = "zipf", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub domains: u32,
    /// Probability that an expert of the token before is kept. [default: fitted, or 0]
    #[arg(long, value_name = "P")]
    pub repeat: Option<f64>,
    /// Tokens.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    pub tokens: u32,
    /// Seed of the chance.
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// The trace file to write.
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
}

pub fn run(command: &TraceCommand, ui: &Ui) -> Result<()> {
    match command {
        TraceCommand::Stats(args) => stats(args, ui),
        TraceCommand::Record(args) => record(args, ui),
        TraceCommand::Synth(args) => synth(args, ui),
        TraceCommand::Import(args) => trace_import::run(args, ui),
    }
}

fn stats(args: &StatsArgs, ui: &Ui) -> Result<()> {
    if let Some(table) = read_if_counts(&args.trace)? {
        return trace_import::counts_stats(&table, ui);
    }
    let trace = read_routing(&args.trace)?;
    let stats = TraceStats::new(&trace);
    let mut value = serde_json::to_value(&stats).context("statistics to JSON")?;
    value["model"] = json!(trace.model);
    value["source"] = json!(trace.source);
    value["phase"] = json!(trace.phase);
    value["synthetic"] = json!(trace.synthetic);
    value["fingerprint"] = json!(trace.fingerprint());
    ui.result(&value, || describe(&trace, &stats))
}

fn describe(trace: &RoutingTrace, stats: &TraceStats) -> String {
    let optional = |x: Option<u64>| x.map_or_else(|| "-".to_string(), |x| x.to_string());
    let part = |x: Option<f64>| x.map_or_else(|| "-".to_string(), percent);
    let mut text = format!(
        "{}{}: {} tokens in {} sequences, {} MoE layers, {} of {} experts per token ({})\n\n",
        trace.model,
        if trace.synthetic { ", synthetic" } else { "" },
        stats.num_tokens,
        stats.num_sequences,
        stats.layers.len(),
        stats.experts_per_token,
        stats.num_experts,
        trace.phase
    );
    let rows = stats.layers.iter().enumerate().map(|(i, l)| {
        vec![
            i.to_string(),
            number(l.entropy),
            number(l.gini),
            percent(l.top_share),
            percent(l.repeat_next),
            optional(l.median_reuse_distance),
        ]
    });
    let header = &["MoE layer", "entropy", "Gini", "hottest quarter", "repeats at next token", "median reuse distance"];
    text += &ui::table(header, rows, true);
    let rows = stats.overlap.iter().map(|l| vec![l.lag.to_string(), part(l.overlap), percent(stats.random_overlap)]);
    text += &format!("\n\n{}", ui::table(&["tokens apart", "experts in common", "by chance"], rows, true));
    let rows = stats.lru.iter().map(|p| vec![percent(p.cached), p.slots.to_string(), percent(p.hit_rate)]);
    text += &format!("\n\n{}", ui::table(&["experts cached", "slots per layer", "LRU hits, cold per sequence"], rows, true));
    let rows = stats.distinct.iter().map(|d| {
        let measured = d.measured.map_or_else(|| "-".to_string(), number);
        vec![d.tokens.to_string(), measured, number(d.uniform)]
    });
    text += &format!("\n\n{}", ui::table(&["consecutive tokens", "distinct experts", "if uniform"], rows, true));
    let r = &stats.reuse_distance;
    text += &format!(
        "\n\nreuse distance in tokens: median {}, p75 {}, p90 {}, p99 {}; {} at the next token, {} within 8; first touches {}\n",
        optional(r.median),
        optional(r.p75),
        optional(r.p90),
        optional(r.p99),
        percent(r.next_token),
        percent(r.within_8),
        percent(stats.first_touch)
    );
    text
}

fn synth(args: &SynthArgs, ui: &Ui) -> Result<()> {
    let mut spec = match (&args.like, args.zipf) {
        (Some(path), _) => {
            let trace = read_routing(path)?;
            GeneratorSpec::like(&trace).with_context(|| path.display().to_string())?
        }
        (None, Some(exponent)) => {
            if !(0.0..=8.0).contains(&exponent) {
                bail!("--zipf {exponent}: expected 0 to 8");
            }
            let (layers, experts) = (args.layers.unwrap_or(0), args.experts.unwrap_or(0));
            if !(1..=4096).contains(&layers) || !(1..65_535).contains(&experts) {
                bail!("--layers {layers} --experts {experts}: expected 1 to 4096 layers and 1 to 65534 experts");
            }
            GeneratorSpec::zipf(layers, experts, args.top_k.unwrap_or(0), exponent, args.domains, args.seed)
        }
        (None, None) => bail!("neither --like nor --zipf: expected one of them"),
    };
    if let Some(repeat) = args.repeat {
        spec.repeat = vec![repeat];
    }
    let trace = generate(&spec, args.tokens as usize, args.seed)?;
    let fit = json!({ "repeat": spec.mean_repeat(), "repeat_by_layer": spec.repeat, "tilt": spec.tilt, "blend": spec.blend });
    written(&args.output, &trace, json!({ "parameters": fit, "seed": args.seed }), ui)
}

fn record(args: &RecordArgs, ui: &Ui) -> Result<()> {
    let text = read_text(&args.text)?;
    let mut loaded = Loaded::open(&args.exec, None, true, ui)?;
    let tokens = loaded.tokenizer()?.encode(&text, AddSpecial::AsModel, false)?;
    let (context, chunk) = (loaded.session.context(), loaded.plan.chunk_tokens().max(1) as usize);
    if args.num_tokens >= context {
        bail!("-n {}: expected fewer than {context}, the tokens of context; --context gives more", args.num_tokens);
    }
    if tokens.is_empty() {
        bail!("{}: the text has no tokens, expected one or more", args.text);
    }
    // A text that does not fit the context is run in windows, each a sequence of its own; decoding follows the last.
    let window = context - args.num_tokens;
    let mut recorder = Recorder::default();
    let bar = ui.progress("recording", (tokens.len() + args.num_tokens) as u64, false);
    for window in tokens.chunks(window) {
        loaded.session.reset();
        recorder.begin();
        for chunk in window.chunks(chunk) {
            loaded.session.prefill(chunk)?;
            recorder.add(&loaded.session.take_routing(), TokenPhase::Prefill)?;
            bar.inc(chunk.len() as u64);
        }
    }
    for _ in 0..args.num_tokens {
        let logits = loaded.session.last_logits();
        let best = logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |b, (i, x)| if *x > b.1 { (i, *x) } else { b }).0;
        loaded.session.decode(best as u32)?;
        recorder.add(&loaded.session.take_routing(), TokenPhase::Decode)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let spec = loaded.session.model().spec();
    let Some(num_experts) = spec.moe_layers().next().map(|(_, moe)| moe.num_experts) else {
        bail!("{}: the model has no layers with experts, so there is no routing to record", args.exec.model);
    };
    let (columns, scale) = recorder.columns(num_experts);
    let scaled = if scale > 1.0 { format!(", weights divided by {scale}") } else { String::new() };
    let text_name = Path::new(&args.text).file_name().map_or("-".into(), |n| n.to_string_lossy());
    let provenance = Provenance {
        model: spec.name.clone(),
        model_fingerprint: Some(spec.fingerprint()),
        source: format!("recorded by tierwise {} over {text_name}{scaled}", env!("CARGO_PKG_VERSION")),
        licence: args.licence.clone(),
        phase: if args.num_tokens == 0 { "prefill" } else { "prefill, then greedy decoding" }.into(),
        synthetic: false,
    };
    let trace = RoutingTrace::from_columns(provenance, columns)?;
    written(&args.output, &trace, json!({ "model_fingerprint": trace.model_fingerprint, "decoded_tokens": args.num_tokens }), ui)
}

/// Collects what the session captures.
#[derive(Default)]
struct Recorder {
    columns: Columns,
    /// As captured: some models scale their weights above 1.
    weights: Vec<f32>,
    steps: u32,
}

impl Recorder {
    /// A new sequence starts.
    fn begin(&mut self) {
        let at = self.columns.steps.len();
        self.columns.sequences.push(Sequence { label: None, tokens: at..at });
    }

    /// One step: the choices of all layers for the same tokens.
    fn add(&mut self, captured: &[CapturedRouting], phase: TokenPhase) -> Result<()> {
        let Some(first) = captured.first() else { return Ok(()) };
        let (tokens, k) = (first.routing.num_tokens(), first.routing.experts_per_token);
        let c = &mut self.columns;
        if captured.iter().any(|l| l.routing.num_tokens() != tokens || l.routing.experts_per_token != k)
            || captured.windows(2).any(|pair| pair[0].layer == pair[1].layer)
            || (c.num_moe_layers != 0 && (c.num_moe_layers, c.experts_per_token) != (captured.len(), k))
        {
            bail!(
                "the layers of this model choose different numbers of experts, or several times; a trace holds one number, once per layer"
            );
        }
        (c.num_moe_layers, c.experts_per_token) = (captured.len(), k);
        for token in 0..tokens {
            for layer in captured {
                let at = token * k..(token + 1) * k;
                for (expert, weight) in layer.routing.experts[at.clone()].iter().zip(&layer.routing.weights[at]) {
                    // A token with fewer experts than others: a place that is not recorded.
                    let expert = if *expert == NO_EXPERT { u32::from(u16::MAX) } else { *expert };
                    c.ids.push(u16::try_from(expert).context("an expert's number fits 16 bits")?);
                    self.weights.push(*weight);
                }
            }
            c.phases.push(phase);
            c.steps.push(self.steps);
        }
        if let Some(sequence) = c.sequences.last_mut() {
            sequence.tokens.end += tokens;
        }
        self.steps += 1;
        Ok(())
    }

    /// The columns, and what the weights were divided by to lie within 0 and 1.
    fn columns(self, num_experts: u32) -> (Columns, f32) {
        let scale = self.weights.iter().copied().fold(1.0, f32::max);
        let fixed = |w: &f32| (w.max(0.0) / scale * f32::from(u16::MAX)).round() as u16;
        (Columns { num_experts, weights: self.weights.iter().map(fixed).collect(), ..self.columns }, scale)
    }
}

/// Writes the trace and says so.
pub(super) fn written(path: &Path, trace: &RoutingTrace, more: Value, ui: &Ui) -> Result<()> {
    let bytes = write_routing(path, trace)?;
    let mut value = json!({
        "file": path, "bytes": bytes, "model": trace.model, "num_tokens": trace.num_tokens(), "num_sequences": trace.sequences.len(),
        "num_moe_layers": trace.num_moe_layers, "num_experts": trace.num_experts, "experts_per_token": trace.experts_per_token,
        "synthetic": trace.synthetic, "fingerprint": trace.fingerprint(),
    });
    if let (Some(value), Value::Object(more)) = (value.as_object_mut(), more) {
        value.extend(more);
    }
    ui.result(&value, || {
        format!(
            "{}: {}{} tokens, {} MoE layers, {} of {} experts per token, {}; trace {}",
            path.display(),
            if trace.synthetic { "made up: " } else { "" },
            trace.num_tokens(),
            trace.num_moe_layers,
            trace.experts_per_token,
            trace.num_experts,
            tierwise_cost::units::Bytes(bytes),
            trace.fingerprint()
        )
    })
}
