//! `tierwise run`, and the generation loop that `demo` shares.

use crate::args::{RunArgs, SamplingArgs};
use crate::cmd::chat::{self, Printer};
use crate::cmd::{read_text, verify};
use crate::control::{self, ControlSocket};
use crate::engine_flags;
use crate::loaded::{Loaded, Wanted};
use crate::place;
use crate::ui::{self, Ui, number};
use anyhow::{Result, bail};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tierwise_cost::units::Bytes;
use tierwise_runtime::chat::Message;
use tierwise_runtime::sampler::{Sampler, SamplerConfig};
use tierwise_runtime::session::{Session, SessionConfig, record};
use tierwise_runtime::tokenizer::{AddSpecial, StreamDecoder};

pub fn run(args: &RunArgs, ui: &Ui) -> Result<()> {
    let record = args.record.is_some();
    let wanted = Wanted { elastic: args.control.is_some(), ..Wanted::default() };
    let mut loaded = Loaded::open_with(&args.exec, wanted, |c| SessionConfig { record, ..c }, ui)?;
    if args.verify {
        verify::check_at_start(&mut loaded, ui)?;
    }
    let open_control = |loaded: &Loaded| args.control.as_deref().map(|path| ControlSocket::open(path, loaded, ui)).transpose();
    // Who listens to interrupts does so before there is a socket that one could leave behind.
    let Some(prompt) = &args.prompt else {
        let interrupt = chat::Interrupt::install()?;
        let _control = open_control(&loaded)?;
        let talked = chat::converse(args, &mut loaded, &interrupt, ui);
        keep_record(args, &loaded, ui)?;
        return talked;
    };
    let prompt = if prompt == "-" { read_text("-")? } else { prompt.clone() };
    let (tokens, mut printer) = encode(&loaded, &prompt, args)?;
    let stop = if args.control.is_some() { control::stop_on_interrupt()? } else { Arc::default() };
    let control = open_control(&loaded)?;
    let generated = generate_with(&mut loaded, &tokens, &args.sampling, args.ignore_eos, &stop, &mut printer, ui);
    keep_record(args, &loaded, ui)?;
    let generated = generated?;
    finish(&loaded, &tokens, &generated, args.report, control.as_ref(), ui)
}

/// Writes the recording if one was asked for.
fn keep_record(args: &RunArgs, loaded: &Loaded, ui: &Ui) -> Result<()> {
    if let (Some(path), Some(recording)) = (&args.record, loaded.session.recording()) {
        record::write(path, loaded.plan.plan(), recording)?;
        let (inputs, actions) = (recording.inputs.len(), recording.actions.len());
        ui.note(format!("{}: {inputs} inputs and {actions} actions of the engine", path.display()));
    }
    Ok(())
}

/// Token ids of a prompt, in the model's chat form if asked.
fn encode(loaded: &Loaded, prompt: &str, args: &RunArgs) -> Result<(Vec<u32>, Printer)> {
    let tokenizer = loaded.tokenizer()?;
    let mut printer = Printer::plain();
    let tokens = if args.chat {
        let template = chat::template(args, tokenizer)?;
        let mut messages: Vec<Message> = args.system.as_deref().map(|s| Message::new("system", s)).into_iter().collect();
        messages.push(Message::new("user", prompt));
        let text = template.render(&messages, None, true)?;
        printer = Printer::new(template.form(), &text, args.reasoning);
        tokenizer.encode(&text, AddSpecial::Never, true)?
    } else {
        tokenizer.encode(prompt, AddSpecial::AsModel, false)?
    };
    if tokens.is_empty() {
        bail!("the prompt is empty, and the model has no token to begin with; give at least one character with -p");
    }
    Ok((tokens, printer))
}

/// What a run produced.
pub struct Generated {
    pub tokens: Vec<u32>,
    /// The answer, without the reasoning.
    pub text: String,
    pub reasoning: String,
    pub seed: u64,
    pub prefill_s: f64,
    pub decode_s: f64,
    /// When the computing of each token after the first began, and how long it took.
    pub steps: Vec<(Instant, Duration)>,
    /// Hits and requests of experts after the prompt and after each token.
    pub served: Vec<(u64, u64)>,
    /// Why it ended: "length", "end of text", "context full", "interrupted".
    pub stop: &'static str,
}

/// Prefill, then one token at a time, printed as they come.
pub fn generate(loaded: &mut Loaded, prompt: &[u32], args: &SamplingArgs, ignore_eos: bool, ui: &Ui) -> Result<Generated> {
    generate_with(loaded, prompt, args, ignore_eos, &AtomicBool::new(false), &mut Printer::plain(), ui)
}

/// Prompt tokens between two looks at whether to stop.
const STOP_CHUNK: usize = 512;

/// [`generate`] after what is cached, until `stop` is set, with the channels taken apart by `printer`.
pub fn generate_with(
    loaded: &mut Loaded,
    prompt: &[u32],
    args: &SamplingArgs,
    ignore_eos: bool,
    stop: &AtomicBool,
    printer: &mut Printer,
    ui: &Ui,
) -> Result<Generated> {
    let seed = args.seed.unwrap_or_else(clock_seed);
    let config = SamplerConfig {
        temperature: args.temp,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        seed,
        ..SamplerConfig::default()
    };
    let mut sampler = Sampler::new(config)?;
    let Loaded { session, tokenizer, .. } = loaded;
    let tokenizer = tokenizer.as_ref().map_err(|e| anyhow::anyhow!("{e}"))?;
    let mut stream = StreamDecoder::new(false);
    let mut out = Generated {
        tokens: Vec::new(),
        text: String::new(),
        reasoning: String::new(),
        seed,
        prefill_s: 0.0,
        decode_s: 0.0,
        steps: Vec::new(),
        served: Vec::new(),
        stop: "length",
    };
    let mut logits = if prompt.len() <= STOP_CHUNK { session.prefill(prompt)?.to_vec() } else { Vec::new() };
    if logits.is_empty() {
        if session.len() + prompt.len() > session.context() {
            // Refused before any part is computed, with the session's message.
            session.prefill(prompt)?;
        }
        for chunk in prompt.chunks(STOP_CHUNK) {
            if stop.load(Ordering::SeqCst) {
                break;
            }
            logits = session.prefill(chunk)?.to_vec();
        }
    }
    let served = |session: &Session| {
        let engine = session.statistics().engine;
        (engine.hits, engine.requests)
    };
    out.prefill_s = session.statistics().prefill_time.as_secs_f64();
    out.served.push(served(session));
    while out.tokens.len() < args.num_tokens {
        if stop.load(Ordering::SeqCst) {
            out.stop = "interrupted";
            break;
        }
        let token = sampler.sample(&logits)?;
        if tokenizer.is_end_of_generation(token) && !ignore_eos {
            out.stop = "end of text";
            break;
        }
        sampler.accept(token);
        out.tokens.push(token);
        let hidden = !ignore_eos && tokenizer.is_special(token) && !printer.is_mark(&tokenizer.decode(&[token]));
        if !hidden && let Some(text) = stream.push(tokenizer, token) {
            printer.push(&text, ui)?;
        }
        if out.tokens.len() == args.num_tokens {
            break;
        }
        if session.len() == session.context() {
            out.stop = "context full";
            break;
        }
        logits.clear();
        let begun = Instant::now();
        logits.extend_from_slice(session.decode(token)?);
        out.steps.push((begun, begun.elapsed()));
        out.served.push(served(session));
    }
    printer.push(&stream.flush().unwrap_or_default(), ui)?;
    printer.finish(ui)?;
    out.text = printer.text.clone();
    out.reasoning = printer.reasoning.trim_end().to_owned();
    out.decode_s = session.statistics().decode_time.as_secs_f64();
    Ok(out)
}

fn clock_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64 & 0xffff_ffff)
}

/// The result in JSON, and the report if asked.
fn finish(loaded: &Loaded, prompt: &[u32], g: &Generated, report: bool, control: Option<&ControlSocket>, ui: &Ui) -> Result<()> {
    let mut value = to_json(loaded, prompt, g);
    if let Some(control) = control {
        value["control"] = control.to_json(&g.steps);
    }
    if ui.json {
        return ui.result(&value, String::new);
    }
    if g.stop == "context full" {
        ui.note(format!("stopped: the context of {} tokens is full; raise --context", loaded.session.context()));
    }
    if report {
        let budget = control.map_or_else(String::new, |c| c.report(&g.steps));
        ui.note(format!("\n{}{budget}", report_text(loaded, prompt, g)));
    }
    ui.detail(format!("seed {}", g.seed));
    Ok(())
}

/// Tokens per second, or 0 when nothing was timed.
fn rate(count: usize, seconds: f64) -> f64 {
    if count == 0 || seconds <= 0.0 { 0.0 } else { count as f64 / seconds }
}

/// Position at which decode was measured: the middle of what was generated.
fn middle(prompt: &[u32], g: &Generated) -> usize {
    prompt.len() + g.tokens.len() / 2
}

/// Share of hits in the prompt and the first tenth of the steps, and after that: until then slots are still being filled.
fn cold_and_steady(g: &Generated) -> (Option<f64>, Option<f64>) {
    let share = |hits: u64, requests: u64| (requests > 0).then(|| hits as f64 / requests as f64);
    let (Some(cold), Some(all)) = (g.served.get(g.served.len().div_ceil(10).saturating_sub(1)), g.served.last()) else {
        return (None, None);
    };
    (share(cold.0, cold.1), share(all.0 - cold.0, all.1 - cold.1))
}

/// The JSON contract of `run`.
pub fn to_json(loaded: &Loaded, prompt: &[u32], g: &Generated) -> Value {
    let statistics = loaded.session.statistics();
    let engine = &statistics.engine;
    let (cold, steady) = cold_and_steady(g);
    let p = &loaded.plan.plan().predicted;
    let by_tier: serde_json::Map<String, Value> = loaded
        .plan
        .plan()
        .tiers
        .iter()
        .zip(&engine.bytes_loaded_by_tier)
        .filter(|(_, b)| b.0 > 0)
        .map(|(t, b)| (t.memory.clone(), json!(b.0)))
        .collect();
    json!({
        "text": g.text, "reasoning": g.reasoning, "tokens": g.tokens, "prompt_tokens": prompt.len(), "stop": g.stop, "seed": g.seed,
        "device": loaded.device, "threads": loaded.threads,
        "prefill_tokens_per_s": rate(prompt.len(), g.prefill_s), "decode_tokens_per_s": rate(statistics.decode_tokens, g.decode_s),
        "ttft_s": g.prefill_s, "hit_rate": engine.hit_rate(), "hits": engine.hits, "misses": engine.misses, "bytes_by_link": by_tier,
        "device_memory": loaded.session.device_memory(), "io": loaded.session.io(), "throttled": loaded.session.throttled(), "engine": engine_flags::to_json(loaded.plan.plan(), engine, cold, steady),
        "experts_s": {
            "computing": statistics.experts.computing.as_secs_f64(), "waiting": statistics.experts.waiting.as_secs_f64(),
            "submitting": statistics.experts.submitting.as_secs_f64(),
        },
        "predicted": {
            "decode_tokens_per_s": p.decode_tokens_per_s.value, "decode_low": p.decode_tokens_per_s.low, "decode_high": p.decode_tokens_per_s.high,
            "prefill_tokens_per_s": p.prefill_tokens_per_s.value,
        },
        "limit": { "decode_tokens_per_s": loaded.decode_limit(middle(prompt, g)) },
    })
}

/// Predicted, measured, limit.
pub fn report_text(loaded: &Loaded, prompt: &[u32], g: &Generated) -> String {
    let statistics = loaded.session.statistics();
    let p = &loaded.plan.plan().predicted;
    let limit = loaded.decode_limit(middle(prompt, g));
    let decode = rate(statistics.decode_tokens, g.decode_s);
    let interval =
        |i: &tierwise_planner::plan::Interval| format!("{} ({} to {})", number(i.value), number(i.low), number(i.high));
    let mut text = ui::table(
        &["tokens/s", "predicted", "measured", "memory limit", "of limit"],
        [
            vec!["decode".into(), interval(&p.decode_tokens_per_s), number(decode), number(limit), ui::percent(decode / limit)],
            vec![
                "prefill".into(),
                interval(&p.prefill_tokens_per_s),
                number(rate(prompt.len(), g.prefill_s)),
                "-".into(),
                "-".into(),
            ],
        ],
        true,
    );
    let e = &statistics.engine;
    text += &format!("\n{} prompt tokens, {} generated ({})", prompt.len(), g.tokens.len(), g.stop);
    let request = &loaded.plan.plan().request;
    let at_once = request.chunk_tokens.min(request.prompt_tokens) as usize;
    if prompt.len() < at_once {
        text += &format!("; prefill is predicted for {at_once} tokens at once, which read the weights once for all");
    }
    if e.loads > 0 {
        let loaded_bytes: u64 = e.bytes_loaded_by_tier.iter().map(|b| b.0).sum();
        let (cold, steady) = cold_and_steady(g);
        let share = |s: Option<f64>| s.map_or_else(|| "-".into(), ui::percent);
        text += &format!(
            "; expert cache: {} hits ({} cold, {} steady), {} loaded",
            ui::percent(e.hit_rate()),
            share(cold),
            share(steady),
            Bytes(loaded_bytes)
        );
        text += &format!("\nengine: {}", engine_flags::describe(loaded.plan.plan()));
        let counts = engine_flags::counts(e);
        if !counts.is_empty() {
            text += &format!("; {counts}");
        }
    }
    if let Some(memory) = loaded.session.device_memory() {
        text += &format!("\n\n{}", place::memory_table(&memory));
    }
    text
}
