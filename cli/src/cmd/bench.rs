//! `tierwise bench`: prefill and decode speed like llama-bench, beside what was predicted and what the machine's memory allows.

use crate::args::BenchArgs;
use crate::control::{self, ControlSocket};
use crate::engine_flags;
use crate::loaded::{Loaded, Wanted};
use crate::ui::{self, Ui, number};
use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::json;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use tierwise_cost::units::{Bytes, BytesPerS};
use tierwise_planner::plan::Interval;
use tierwise_runtime::session::{SequenceId, Session, SessionStatistics};
use tierwise_runtime::trace::read_routing;

/// What experts on disk cost per token.
#[derive(Clone, Copy, Serialize)]
struct ExpertTraffic {
    disk_bytes_per_token: f64,
    waiting_s_per_token: f64,
    computing_s_per_token: f64,
    hit_rate: f64,
    /// In the warm-up before: until then slots are still being filled.
    hit_rate_cold: f64,
    prefetches: u64,
    prefetches_used: u64,
    fills: u64,
}

/// One test's speeds over the repetitions.
struct Measured {
    test: String,
    /// Sequences computed together.
    batch: u32,
    /// Of all sequences together.
    tokens_per_s: Vec<f64>,
    /// Only decode has a memory limit worth the name: prefill reuses weights.
    limit_tokens_per_s: Option<f64>,
    /// Bytes of experts read from disk per token, waiting seconds per token, hit rate of demands for experts; in the repetitions.
    experts: Option<ExpertTraffic>,
    /// For the very positions that were measured; absent where plans do not say (a prompt after other tokens).
    predicted: Option<Interval>,
}

pub fn run(args: &BenchArgs, ui: &Ui) -> Result<()> {
    let prompts: Vec<usize> = args.prompt_tokens.iter().copied().filter(|n| *n > 0).collect();
    let decodes: Vec<usize> = args.num_tokens.iter().copied().filter(|n| *n > 0).collect();
    let longest = prompts.iter().chain(&decodes).copied().max().unwrap_or(0);
    if longest == 0 {
        bail!("nothing to measure: give -p or -n a number above 0");
    }
    let batch = args.batch.iter().copied().max().unwrap_or(1);
    let wanted = Wanted { context: Some(args.depth + longest), batch, elastic: args.control.is_some() };
    let mut loaded = Loaded::open_with(&args.exec, wanted, |c| c, ui)?;
    if args.control.is_some() {
        control::end_on_interrupt()?;
    }
    let _control = args.control.as_deref().map(|path| ControlSocket::open(path, &loaded, ui)).transpose()?;
    if let Some(path) = &args.routing {
        let trace = Arc::new(read_routing(path)?);
        ui.note(format!("routing of {} ({}): the logits mean nothing", trace.model, path.display()));
        loaded.session.force_routing(Some((trace, 0)))?;
    }
    let vocab = loaded.session.model().spec().vocab_size;
    let counts = || prompts.iter().map(|n| (*n, false)).chain(decodes.iter().map(|n| (*n, true)));
    let tests = args.batch.iter().flat_map(|batch| counts().map(move |(count, decode)| (*batch, count, decode)));
    let bar = ui.progress("measuring", u64::from(args.repetitions) * tests.clone().count() as u64, false);
    let mut results = Vec::new();
    for (batch, count, decode) in tests {
        let sequences = sequences(&mut loaded.session, batch)?;
        let mut tokens_per_s = Vec::new();
        let start = loaded.session.statistics();
        let mut before = start.clone();
        // One warm-up, not counted: page faults, thread start, frequency.
        for repetition in 0..=args.repetitions {
            // Other tokens in each sequence, so that experts are those of a batch.
            let seed = |i: usize| u64::from(repetition) + 1000 * i as u64;
            let tokens: Vec<_> = (0..sequences.len()).map(|i| random_tokens(args.depth + count, vocab, seed(i))).collect();
            if repetition == 1 {
                before = loaded.session.statistics();
            }
            for sequence in &sequences {
                loaded.session.truncate_sequence(*sequence, 0)?;
            }
            if args.depth > 0 {
                compute(&mut loaded.session, &sequences, &tokens, 0..args.depth)?;
            }
            let started = Instant::now();
            if decode {
                for at in args.depth..args.depth + count {
                    compute(&mut loaded.session, &sequences, &tokens, at..at + 1)?;
                }
            } else {
                compute(&mut loaded.session, &sequences, &tokens, args.depth..args.depth + count)?;
            }
            if repetition > 0 {
                tokens_per_s.push((count * sequences.len()) as f64 / started.elapsed().as_secs_f64());
                bar.inc(1);
            }
        }
        let limit_tokens_per_s = decode.then(|| loaded.batch_limit(args.depth + count / 2, batch));
        let test = format!("{}{count}", if decode { "tg" } else { "pp" });
        let predicted = match decode {
            true => Some(loaded.predicted_decode(args.depth + count / 2, batch)),
            false if args.depth == 0 && batch == 1 => Some(loaded.predicted_prefill(count)),
            false => None,
        };
        // A plan from a file may be for more memory than this machine has for plans; what was measured stands all the same.
        let predicted = predicted.and_then(|p| p.inspect_err(|e| ui.note(format!("no prediction for {test}: {e:#}"))).ok());
        let experts = traffic(
            &start,
            &before,
            &loaded.session.statistics(),
            (args.depth + count) * sequences.len() * args.repetitions as usize,
        );
        results.push(Measured { test, batch, tokens_per_s, limit_tokens_per_s, experts, predicted });
    }
    bar.finish_and_clear();
    print(&loaded, &results, args, ui)
}

/// As many sequences as the batch, of which the session's own is the first.
fn sequences(session: &mut Session, batch: u32) -> Result<Vec<SequenceId>> {
    let batch = batch as usize;
    for added in session.sequences().into_iter().skip(batch) {
        session.remove_sequence(added)?;
    }
    while session.sequences().len() < batch {
        session.add_sequence()?;
    }
    Ok(session.sequences())
}

/// The tokens `at` of each sequence, all together.
fn compute(session: &mut Session, sequences: &[SequenceId], tokens: &[Vec<u32>], at: Range<usize>) -> Result<()> {
    match (sequences, tokens) {
        ([_], [tokens]) if at.len() == 1 => session.decode(tokens[at.start]).map(drop)?,
        ([_], [tokens]) => session.prefill(&tokens[at]).map(drop)?,
        _ => {
            let parts: Vec<(SequenceId, &[u32])> = sequences.iter().zip(tokens).map(|(s, t)| (*s, &t[at.clone()])).collect();
            session.step(&parts).map(drop)?;
        }
    }
    Ok(())
}

/// Per token between two moments, after the warm-up that began at `start`; `None` when nothing was read. Tokens of the depth are counted in.
fn traffic(
    start: &SessionStatistics,
    before: &SessionStatistics,
    after: &SessionStatistics,
    tokens: usize,
) -> Option<ExpertTraffic> {
    let bytes = |s: &SessionStatistics| s.engine.bytes_loaded_by_tier.iter().map(|b| b.0).sum::<u64>();
    let read = bytes(after) - bytes(before);
    let requests = after.engine.requests - before.engine.requests;
    (read > 0).then(|| ExpertTraffic {
        disk_bytes_per_token: read as f64 / tokens as f64,
        waiting_s_per_token: (after.experts.waiting - before.experts.waiting).as_secs_f64() / tokens as f64,
        computing_s_per_token: (after.experts.computing - before.experts.computing).as_secs_f64() / tokens as f64,
        hit_rate: (after.engine.hits - before.engine.hits) as f64 / requests.max(1) as f64,
        hit_rate_cold: (before.engine.hits - start.engine.hits) as f64
            / (before.engine.requests - start.engine.requests).max(1) as f64,
        prefetches: after.engine.prefetches_issued - before.engine.prefetches_issued,
        prefetches_used: after.engine.prefetches_used - before.engine.prefetches_used,
        fills: after.engine.fills - before.engine.fills,
    })
}

fn print(loaded: &Loaded, results: &[Measured], args: &BenchArgs, ui: &Ui) -> Result<()> {
    let bandwidth = loaded.machine.home(loaded.machine.main_processor()).read_bandwidth.value;
    let rows: Vec<_> = results
        .iter()
        .map(|m| {
            let mut sorted = m.tokens_per_s.clone();
            sorted.sort_by(f64::total_cmp);
            let median = median(&sorted);
            (m, median, sorted[0], sorted[sorted.len() - 1])
        })
        .collect();
    let value = json!({
        "model": loaded.plan.plan().model, "device": loaded.device, "threads": loaded.threads, "depth": args.depth,
        "read_bandwidth_bytes_per_s": bandwidth.0,
        "cost_model": loaded.cost_words(), "io": loaded.session.io(), "throttled": loaded.session.throttled(),
        "predicted": { "decode_tokens_per_s": loaded.plan.plan().predicted.decode_tokens_per_s, "prefill_tokens_per_s": loaded.plan.plan().predicted.prefill_tokens_per_s },
        "engine": engine_flags::to_json(loaded.plan.plan(), &loaded.session.statistics().engine, None, None),
        "results": rows.iter().map(|(m, median, min, max)| json!({
            "test": m.test, "batch": m.batch, "tokens_per_s_median": median, "min": min, "max": max, "samples": m.tokens_per_s,
            "predicted_tokens_per_s": m.predicted, "predicted_over_measured": m.predicted.map(|p| p.value / median),
            "experts_on_disk": m.experts, "limit_tokens_per_s": m.limit_tokens_per_s, "fraction_of_limit": m.limit_tokens_per_s.map(|l| median / l),
        })).collect::<Vec<_>>(),
    });
    ui.result(&value, || {
        let table = rows.iter().map(|(m, median, min, max)| {
            vec![
                name(m),
                number(*median),
                number(*min),
                number(*max),
                m.predicted.map_or_else(|| "-".into(), |p| number(p.value)),
                m.predicted.map_or_else(|| "-".into(), |p| format!("{} to {}", number(p.low), number(p.high))),
                m.predicted.map_or_else(|| "-".into(), |p| format!("{:+.1} %", 100.0 * (p.value / median - 1.0))),
                m.limit_tokens_per_s.map_or_else(|| "-".into(), number),
                m.limit_tokens_per_s.map_or_else(|| "-".into(), |l| ui::percent(median / l)),
            ]
        });
        let from_disk: String = rows
            .iter()
            .filter_map(|(m, ..)| m.experts.map(|e| (m, e)))
            .map(|(m, e)| {
                format!(
                    "\n{}: per token {} read from disk, {} ms waiting for it, {} ms computing experts; {} of experts were in memory ({} in the warm-up); {} prefetches, {} of them used; {} fills",
                    name(m),
                    Bytes(e.disk_bytes_per_token as u64),
                    number(e.waiting_s_per_token * 1e3),
                    number(e.computing_s_per_token * 1e3),
                    ui::percent(e.hit_rate),
                    ui::percent(e.hit_rate_cold),
                    e.prefetches,
                    e.prefetches_used,
                    e.fills
                )
            })
            .collect();
        let throttled: String = loaded
            .session
            .throttled()
            .iter()
            .map(|t| format!("\nthrottled: {} gave experts at {} at most, {}", t.memory, BytesPerS(t.bytes_per_s), Bytes(t.paid_bytes)))
            .collect();
        format!(
            "{} ({}), {} threads, depth {}\n{}{from_disk}{throttled}\npredicted by: {}\nthe limit assumes that memory reads {bandwidth} with {} threads",
            loaded.plan.plan().model.name,
            loaded.plan.plan().model.format,
            loaded.threads,
            args.depth,
            ui::table(&["test", "tokens/s", "min", "max", "predicted", "interval", "error", "memory limit", "of limit"], table, true),
            loaded.cost_words(),
            loaded.threads
        )
    })
}

/// `pp512`, or `8 x pp512` for eight sequences.
fn name(m: &Measured) -> String {
    if m.batch == 1 { m.test.clone() } else { format!("{} x {}", m.batch, m.test) }
}

fn median(sorted: &[f64]) -> f64 {
    let mid = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[mid - 1], sorted[mid]) } else { sorted[mid] }
}

/// Token ids spread over the vocabulary (splitmix64), so that routing is not that of one repeated token.
pub fn random_tokens(count: usize, vocab: u32, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..count)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % u64::from(vocab)) as u32
        })
        .collect()
}
