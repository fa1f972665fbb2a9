//! `calibrate`: the thorough measurement of this machine, with the code that inference runs.
//!
//! What is measured and why: algorithms §1, "calibration set". Products with weights come from [`super::weights`], the rest of a
//! layer from [`super::layer`], the disk from [`super::disk`]. Everything is in one interleaved series of rounds, so that the
//! numbers of one calibration are comparable, and every sample keeps its smallest and largest run.

use super::disk::DiskFile;
use super::effort::Effort;
use super::far::{FarEffort, add_far};
use super::host::{self, HostFacts, host_facts};
use super::layer::{AttentionWork, SmallWork};
use super::nodes::Nodes;
use super::timing::{Case, Rounds, run_rounds};
use super::weights::{ExpertShape, ExpertWork, MatmulWork, PIECE, Pool, Workspace};
use super::{INT8_FORMAT, Measured, describe, matmul_rate};
use crate::error::{Result, RuntimeError};
use crate::exec::threads::Threads;
use rayon::prelude::*;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tierwise_cost::machine::{
    AttentionSample, Calibration, DiskSample, ExpertSample, Machine, MatmulSample, ReadSample, SmallSample, Sourced, Spread,
};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::{Bytes, BytesPerS, Seconds};

/// What to measure and what to write beside it.
#[derive(Debug, Clone)]
pub struct CalibrateOptions {
    /// Compute threads; those of the machine when `None`.
    pub threads: Option<usize>,
    /// Folder on the disk to measure.
    pub folder: PathBuf,
    /// How much.
    pub effort: Effort,
    /// Day, for the file.
    pub date: String,
    /// Program and version, for the file.
    pub program: String,
}

/// A part of the work: its name, and where it begins and ends on the progress bar.
type Phase = (&'static str, f64, f64);
const READING: Phase = ("reading memory", 0.02, 0.08);
const COMPUTING: Phase = ("computing", 0.08, 0.85);
const DISK: Phase = ("reading the disk", 0.85, 1.0);

/// Told what is being done, and the share of all that is done.
pub type Progress<'a> = &'a mut (dyn FnMut(&str, f64) + Send);

/// Tells `progress` about a share of a phase.
fn within(progress: Progress<'_>, (what, from, to): Phase) -> impl FnMut(f64) + Send {
    move |share| progress(what, from + (to - from) * share)
}

/// Measures this machine. `progress` is told what is being done and the share that is done.
///
/// # Errors
/// When threads or memory are refused, or the folder cannot be written.
pub fn calibrate(options: &CalibrateOptions, progress: Progress<'_>) -> Result<Machine> {
    let start = Instant::now();
    let (facts, effort) = (host_facts(), &options.effort);
    let threads = Threads::new(options.threads.unwrap_or(facts.threads as usize))?;
    let mut notes = gpu_notes();
    progress("preparing", 0.0);
    let pool = Pool::new(&threads, pool_bytes(effort, &facts))?;
    let read = read_samples(&threads, &pool, effort, &mut notes, &mut within(progress, READING))?;
    let launch = launch_runs(&threads, effort.rounds)?;
    let computed = compute_samples(&threads, &pool, effort, &mut within(progress, COMPUTING))?;
    drop(pool);
    let disk = disk_samples(options, &mut notes, &mut within(progress, DISK))?;

    let all = read.iter().map(|s| s.gb_per_s.median).fold(0.0, f64::max);
    let one = read.first().map_or(all, |s| s.gb_per_s.median);
    let brief = Duration::from_millis(100).min(effort.time.1);
    let measured = Measured {
        one: BytesPerS(one * 1e9),
        all: BytesPerS(all * 1e9),
        f32_flops: matmul_rate(&threads, QuantFormat::F32, brief),
        int8_ops: matmul_rate(&threads, INT8_FORMAT, brief),
        launch: Seconds(launch.median * 1e-6),
        threads: threads.count(),
    };
    let mut machine = describe(facts, &measured);
    machine.note = Some(format!("calibrated {} by {}", options.date, options.program));
    put_disk(&mut machine, &disk, &options.folder);
    let disk_memory = (!disk.is_empty()).then(|| machine.memories[1].id.clone());
    let far = FarEffort { pool: effort.pool, time: brief, runs: effort.rounds.max(3), expert: effort.expert, contention: true };
    let nodes = add_far(&mut machine, &Nodes::of_this_machine(), &threads, far)?;
    let calibration = Calibration {
        date: options.date.clone(),
        program: options.program.clone(),
        seconds: (start.elapsed().as_secs_f64() * 10.0).round() / 10.0,
        threads: threads.count() as u32,
        kernels: threads.kernels().name.to_string(),
        processor: machine.processors[0].id.clone(),
        memory: machine.memories[0].id.clone(),
        disk_memory,
        notes,
        launch_us: launch,
        read,
        experts: computed.experts,
        matmuls: computed.matmuls,
        attention: computed.attention,
        small: computed.small,
        disk,
        nodes,
        copies: Vec::new(),
    };
    machine.calibration = Some(calibration);
    machine.check()?;
    progress("done", 1.0);
    Ok(machine)
}

/// The pool that the effort wants, or four times the caches, but little of the free memory.
fn pool_bytes(effort: &Effort, facts: &HostFacts) -> Bytes {
    let wanted = if effort.pool < Bytes::mib(64) { effort.pool.0 } else { effort.pool.0.max(4 * host::last_level_cache().0) };
    Bytes(wanted.min(facts.ram_available.0 / 4).max(effort.pool.0.min(8 << 20)))
}

/// Which GPUs there are, and that they were not measured here (`add_device` does that).
fn gpu_notes() -> Vec<String> {
    let found = host::gpus();
    if found.is_empty() {
        return vec!["no GPU found: not measured".into()];
    }
    found.iter().map(|id| format!("GPU {id} not measured")).collect()
}

/// 1, 2, 4, ... and all threads.
fn thread_counts(all: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|n| *n < all).collect();
    counts.push(all);
    counts
}

/// Reading the whole pool with 1, 2, 4, ... threads.
fn read_samples(
    threads: &Threads,
    pool: &Pool,
    effort: &Effort,
    notes: &mut Vec<String>,
    progress: &mut dyn FnMut(f64),
) -> Result<Vec<ReadSample>> {
    let nodes = host::numa_nodes();
    if nodes > 1 {
        notes.push(format!("{nodes} NUMA nodes: threads were not bound to one, so memory was read from all of them together"));
    }
    let kernels = threads.kernels();
    let counts = thread_counts(threads.count());
    let pools = counts.iter().map(|n| Threads::new(*n)).collect::<Result<Vec<_>>>()?;
    let read = |piece: &[u8]| {
        let floats: &[f32] = bytemuck::try_cast_slice(piece).unwrap_or_default();
        let (a, b) = floats.split_at(floats.len() / 2);
        std::hint::black_box(kernels.dot_f32(a, &b[..a.len()]));
    };
    let mut cases: Vec<Case<'_>> =
        pools.iter().map(|t| Case::new(move || t.pool().install(|| pool.bytes().par_chunks(PIECE).for_each(read)))).collect();
    let rounds = Rounds { time: effort.time.0, at_least: effort.rounds, visit: Duration::ZERO };
    run_rounds(&mut cases, rounds, progress);
    let gigabytes = pool.bytes().len() as f64 / 1e9;
    counts
        .iter()
        .zip(&cases)
        .map(|(n, case)| {
            let us = case.us().ok_or_else(no_sample)?;
            let rate = |us: f64| gigabytes / (us * 1e-6);
            let gb_per_s = Spread { median: rate(us.median), min: rate(us.max), max: rate(us.min), runs: us.runs };
            Ok(ReadSample { node: (nodes <= 1).then_some(0), threads: *n as u32, gb_per_s })
        })
        .collect()
}

fn no_sample() -> RuntimeError {
    RuntimeError::BadRequest { what: "clock", found: "runs without length".into(), expected: "a clock that advances".into() }
}

/// Waking every thread and waiting for all of them, each run the mean of many.
fn launch_runs(threads: &Threads, rounds: usize) -> Result<Spread> {
    const REPEATS: u32 = 200;
    let pool = threads.pool();
    let us: Vec<f64> = pool.install(|| {
        let run = |_| {
            let start = Instant::now();
            for _ in 0..REPEATS {
                pool.broadcast(|context| std::hint::black_box(context.index()));
            }
            start.elapsed().as_secs_f64() * 1e6 / f64::from(REPEATS)
        };
        (0..rounds.max(5)).map(run).collect()
    });
    Spread::of(&us).ok_or_else(no_sample)
}

struct Computed {
    experts: Vec<ExpertSample>,
    matmuls: Vec<MatmulSample>,
    attention: Vec<AttentionSample>,
    small: Vec<SmallSample>,
}

/// Everything that computes, in one series of rounds on the threads' own pool, as a session's steps run.
fn compute_samples(threads: &Threads, pool: &Pool, effort: &Effort, progress: &mut (dyn FnMut(f64) + Send)) -> Result<Computed> {
    let workspace = Mutex::new(Workspace::default());
    let shared = || workspace.lock().unwrap_or_else(PoisonError::into_inner);
    let shared = &shared;
    let (hidden, inner) = effort.expert;
    let mut cases: Vec<Case<'_>> = Vec::new();
    let mut expert_keys = Vec::new();
    let mut matmul_keys = Vec::new();
    for format in &effort.expert_formats {
        let shape = ExpertShape { format: *format, hidden: hidden as usize, inner: inner as usize };
        for (tokens, counts) in &effort.experts {
            for distinct in counts {
                let work = ExpertWork::new(shape, *tokens, *distinct);
                expert_keys.push((*format, *tokens, *distinct));
                cases.push(Case::new(move || work.run(threads, pool, &mut shared())));
            }
        }
    }
    for format in &effort.matmul_formats {
        // The router's shape for float32.
        let rows = if *format == QuantFormat::F32 { effort.matrix_rows.min(128) } else { effort.matrix_rows };
        for tokens in &effort.matmul_tokens {
            let work = MatmulWork { format: *format, rows: rows as usize, cols: hidden as usize, tokens: *tokens };
            matmul_keys.push(work);
            cases.push(Case::new(move || work.run(threads, pool, &mut shared())));
        }
    }
    let mut attention_keys = Vec::new();
    // Eight query heads share a key head, or none do.
    for (heads, kv_heads) in [(32, 4), (16, 16)] {
        for (tokens, past) in &effort.attention {
            let mut work = AttentionWork::new(threads, heads, kv_heads, *tokens, *past)?;
            attention_keys.push(AttentionSample {
                flops_per_byte: work.flops / work.kv_bytes,
                heads,
                kv_heads,
                tokens: *tokens as u32,
                past: *past as u32,
                kv_bytes: work.kv_bytes,
                us: Spread { median: 0.0, min: 0.0, max: 0.0, runs: 0 },
            });
            cases.push(Case::new(move || work.run(threads)));
        }
    }
    let mut small_keys = Vec::new();
    for tokens in &effort.small_tokens {
        let mut work = SmallWork::new(*tokens)?;
        small_keys.push(work.elements);
        cases.push(Case::new(move || work.run(threads)));
    }
    let rounds = Rounds { time: effort.time.1, at_least: effort.rounds, visit: effort.visit };
    threads.pool().install(|| run_rounds(&mut cases, rounds, progress));

    let mut spreads = cases.iter().map(|c| c.us().ok_or_else(no_sample));
    let mut next = || spreads.next().expect("one per case");
    let mut experts = Vec::new();
    for (format, tokens, distinct) in expert_keys {
        experts.push(ExpertSample { format, hidden, inner, tokens: tokens as f64, distinct: distinct as f64, us: next()? });
    }
    let mut matmuls = Vec::new();
    for MatmulWork { format, rows, cols, tokens } in matmul_keys {
        matmuls.push(MatmulSample { format, rows: rows as u32, cols: cols as u32, tokens: tokens as f64, us: next()? });
    }
    let mut attention = Vec::new();
    for sample in attention_keys {
        attention.push(AttentionSample { us: next()?, ..sample });
    }
    // Ascending by intensity; of two with the same one the longer run says more.
    attention
        .sort_by(|a: &AttentionSample, b| a.flops_per_byte.total_cmp(&b.flops_per_byte).then(b.kv_bytes.total_cmp(&a.kv_bytes)));
    attention.dedup_by(|later, kept| (later.flops_per_byte / kept.flops_per_byte - 1.0).abs() < 0.02);
    let mut small = Vec::new();
    for elements in small_keys {
        small.push(SmallSample { elements, us: next()? });
    }
    Ok(Computed { experts, matmuls, attention, small })
}

/// The disk's samples; empty with a note when it cannot be read directly.
fn disk_samples(options: &CalibrateOptions, notes: &mut Vec<String>, progress: &mut dyn FnMut(f64)) -> Result<Vec<DiskSample>> {
    let e = &options.effort;
    let not_measured = |why: String| format!("disk not measured: {why}");
    let file = match DiskFile::create(&options.folder, e.disk_file.0)? {
        Ok(file) => file,
        Err(why) => {
            notes.push(not_measured(why));
            return Ok(Vec::new());
        }
    };
    match file.measure(&e.disk_blocks, &e.disk_depths, e.time.2, e.rounds, progress) {
        Ok(samples) => Ok(samples),
        Err(error) => {
            notes.push(not_measured(error.to_string()));
            Ok(Vec::new())
        }
    }
}

/// Replaces the disk's priors by what was measured: the best rate, and the time of one small read.
fn put_disk(machine: &mut Machine, samples: &[DiskSample], folder: &std::path::Path) {
    let (Some(best), Some(small)) =
        (samples.iter().max_by(|a, b| a.gb_per_s.median.total_cmp(&b.gb_per_s.median)), samples.first())
    else {
        return;
    };
    let note = format!("direct reads of {} blocks, {} at a time, in {}", Bytes(best.block), best.depth, folder.display());
    let rate = Sourced::measured(BytesPerS((best.gb_per_s.median * 1e9).max(1.0))).with_note(note);
    let seconds = (small.block as f64 / (small.gb_per_s.median * 1e9)).min(1.0);
    let latency = Sourced::measured(Seconds(seconds)).with_note(format!("one direct read of {}", Bytes(small.block)));
    machine.memories[1].read_bandwidth = rate.clone();
    machine.memories[1].latency = latency.clone();
    for link in machine.links.iter_mut().filter(|l| l.from == machine.memories[1].id) {
        link.bandwidth = rate.clone();
        link.latency = latency.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tierwise_cost::cost::cost_model;

    #[test]
    fn threads_double_up_to_all() {
        assert_eq!(thread_counts(1), [1]);
        assert_eq!(thread_counts(2), [1, 2]);
        assert_eq!(thread_counts(6), [1, 2, 4, 6]);
        assert_eq!(thread_counts(8), [1, 2, 4, 8]);
    }

    #[test]
    fn a_tiny_calibration_reads_back_equal() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let options = CalibrateOptions {
            threads: Some(2),
            folder: folder.path().to_path_buf(),
            effort: Effort::tiny(),
            date: "2026-11-21".into(),
            program: "tierwise test".into(),
        };
        let mut last = 0.0;
        let machine = calibrate(&options, &mut |_, share| {
            assert!(share >= last - 1e-9 && share <= 1.0, "{share} after {last}");
            last = share;
        })
        .expect("calibrated");
        assert_eq!(last, 1.0);
        let again = Machine::from_toml(&machine.to_toml().expect("written")).expect("read");
        assert_eq!(again, machine);
        assert!(cost_model(&machine).describe().starts_with("calibrated 2026-11-21"));
        assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 0);
    }
}
