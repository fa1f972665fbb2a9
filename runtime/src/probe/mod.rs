//! A quick look at this machine: facts from the system, and short measurements with the kernels that inference uses.
//!
//! It takes about a second, so its rates are good to perhaps ten per cent; `calibrate` is the thorough way. What is not measured
//! carries the source "prior".

mod calibrate;
mod device;
mod disk;
mod effort;
mod far;
mod host;
mod layer;
pub mod nodes;
mod timing;
mod weights;

use far::FarEffort;
use nodes::Nodes;

pub use calibrate::{CalibrateOptions, Progress, calibrate};
pub use device::add_device;
pub use effort::Effort;
pub(crate) use host::may_have_gpu;
pub use host::{HostFacts, host_facts};

use crate::error::Result;
use crate::exec::threads::Threads;
use crate::kernels::{ActivationBuf, CpuKernels, GemmScratch};
use rayon::prelude::*;
use std::time::{Duration, Instant};
use tierwise_cost::machine::{Link, Machine, Memory, MemoryKind, Processor, ProcessorKind, Sourced};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::{Bytes, BytesPerS, FlopsPerS, Seconds};

/// The format whose product stands for arithmetic with 8-bit integers: that of most models.
const INT8_FORMAT: QuantFormat = QuantFormat::Q4_K;

/// How much effort the measurements may take.
#[derive(Debug, Clone, Copy)]
pub struct ProbeOptions {
    /// Compute threads to measure with; those of the machine when `None`.
    pub threads: Option<usize>,
    /// Buffer to read for the bandwidth: several times the processor's caches.
    pub buffer: Bytes,
    /// Time for each of the measurements.
    pub time_each: Duration,
}

impl Default for ProbeOptions {
    fn default() -> Self {
        Self { threads: None, buffer: Bytes::mib(512), time_each: Duration::from_millis(200) }
    }
}

/// This machine, as far as a short probe can tell. Memories are `dram0` and `disk0`, far ones `cxl0`, ...; the processor is `cpu0`.
///
/// # Errors
/// When threads cannot be started.
pub fn probe_machine(options: ProbeOptions) -> Result<Machine> {
    let facts = host_facts();
    let threads = Threads::new(options.threads.unwrap_or(facts.threads as usize))?;
    let (one, all) = read_bandwidth(&threads, options);
    let measured = Measured {
        one,
        all,
        f32_flops: matmul_rate(&threads, QuantFormat::F32, options.time_each),
        int8_ops: matmul_rate(&threads, INT8_FORMAT, options.time_each),
        launch: launch_latency(&threads),
        threads: threads.count(),
    };
    let mut machine = describe(facts, &measured);
    let effort = FarEffort { pool: options.buffer, time: options.time_each, runs: 3, expert: (1024, 512), contention: false };
    far::add_far(&mut machine, &Nodes::of_this_machine(), &threads, effort)?;
    machine.check()?;
    Ok(machine)
}

/// What either way of measuring finds.
struct Measured {
    /// Reading memory with one thread and with all.
    one: BytesPerS,
    all: BytesPerS,
    f32_flops: FlopsPerS,
    int8_ops: FlopsPerS,
    /// Fork and join.
    launch: Seconds,
    threads: usize,
}

/// The machine with what was measured; its disk has priors.
fn describe(facts: HostFacts, m: &Measured) -> Machine {
    let count = m.threads;
    let (disk, disk_bytes, disk_rate, disk_latency) = disk_prior();
    let dram = Memory {
        id: "dram0".into(),
        kind: MemoryKind::Dram,
        capacity: Sourced::measured(facts.ram_total).with_note(format!("{} available when probed", facts.ram_available)),
        read_bandwidth: Sourced::measured(m.all).with_note(format!("{count} threads; one thread {}", m.one)),
        latency: Sourced::prior(Seconds(81e-9)).with_note("DDR5, local"),
        numa_nodes: Vec::new(),
    };
    let disk = Memory {
        id: "disk0".into(),
        kind: MemoryKind::Disk,
        capacity: disk_bytes.with_note(disk),
        read_bandwidth: disk_rate,
        latency: disk_latency,
        numa_nodes: Vec::new(),
    };
    let link = Link {
        from: disk.id.clone(),
        to: dram.id.clone(),
        bandwidth: disk.read_bandwidth.clone(),
        pageable_bandwidth: None,
        latency: disk.latency.clone(),
    };
    let cpu = Processor {
        id: "cpu0".into(),
        kind: ProcessorKind::Cpu,
        name: facts.cpu_name,
        cores: facts.cores,
        threads: facts.threads,
        isa: facts.isa,
        computes_from: vec![dram.id.clone()],
        f32_flops: Sourced::measured(m.f32_flops).with_note(format!("{count} threads, {} kernels", CpuKernels::best().name)),
        f16_flops: None,
        int8_ops: Some(Sourced::measured(m.int8_ops).with_note(format!("{INT8_FORMAT} product, {count} threads"))),
        launch_latency: Sourced::measured(m.launch).with_note("fork and join of the thread pool"),
    };
    Machine {
        name: "this machine".into(),
        note: Some("Short probe; `calibrate` measures thoroughly.".into()),
        memories: vec![dram, disk],
        processors: vec![cpu],
        links: vec![link],
        calibration: None,
    }
}

/// Best read rate of one thread and of all together, with the kernel that reads fastest: the float dot product.
fn read_bandwidth(threads: &Threads, options: ProbeOptions) -> (BytesPerS, BytesPerS) {
    let kernels = threads.kernels();
    let elements = usize::try_from(options.buffer.0 / 4).unwrap_or(usize::MAX).max(1 << 20);
    // Small enough to be spread evenly, large enough that the loop's start does not count.
    const PIECE: usize = 256 << 10;
    let mut data = vec![0.0f32; elements];
    // Each thread touches what it will read, so that pages lie near it.
    threads.pool().install(|| data.par_chunks_mut(PIECE).for_each(|c| c.fill(1.0)));
    let read = |piece: &[f32]| {
        let (a, b) = piece.split_at(piece.len() / 2);
        std::hint::black_box(kernels.dot_f32(a, &b[..a.len()]));
    };
    let rate = |pass: &dyn Fn()| best_seconds(options.time_each, pass).map_or(0.0, |s| (elements * 4) as f64 / s);
    let one = rate(&|| data.chunks(PIECE).for_each(read));
    let all = rate(&|| threads.pool().install(|| data.par_chunks(PIECE).for_each(read)));
    (BytesPerS(one), BytesPerS(all.max(one)))
}

/// Operations per second of a matrix product for many tokens that fits the caches, on all threads at once.
fn matmul_rate(threads: &Threads, format: QuantFormat, time: Duration) -> FlopsPerS {
    // A piece of an expert's matrix as threads get them, and a prompt's share of tokens.
    const ROWS: usize = 128;
    const COLS: usize = 1024;
    const TOKENS: usize = 64;
    let kernels = threads.kernels();
    // Any bytes are valid weights; zeroed ones are ordinary numbers in every format.
    let weight = vec![0u8; format.row_bytes(COLS as u64).map_or(0, |b| b as usize) * ROWS];
    let mut input = ActivationBuf::new();
    kernels.quantize_activations(format, &vec![1.0; TOKENS * COLS], COLS, &mut input);
    const REPEATS: usize = 8;
    let run = |_| {
        let (mut out, mut scratch) = (vec![0.0; ROWS * TOKENS], GemmScratch::default());
        for _ in 0..REPEATS {
            kernels.gemm(format, &weight, COLS, &input, input.all_tokens(), &mut scratch, &mut out);
            std::hint::black_box(&out);
        }
    };
    let pass = || threads.pool().install(|| (0..threads.count()).into_par_iter().with_max_len(1).for_each(run));
    let operations = (2 * ROWS * COLS * TOKENS * REPEATS * threads.count()) as f64;
    FlopsPerS(best_seconds(time, &pass).map_or(1.0, |s| operations / s))
}

/// Median time of a parallel region that does nothing.
fn launch_latency(threads: &Threads) -> Seconds {
    let mut times: Vec<f64> = threads.pool().install(|| {
        (0..200)
            .map(|_| {
                let start = Instant::now();
                (0..threads.count()).into_par_iter().with_max_len(1).for_each(|i| {
                    std::hint::black_box(i);
                });
                start.elapsed().as_secs_f64()
            })
            .collect()
    });
    times.sort_by(f64::total_cmp);
    Seconds(times[times.len() / 2].max(1e-9))
}

/// The shortest of at least two runs of `pass` within `time`.
fn best_seconds(time: Duration, pass: &dyn Fn()) -> Option<f64> {
    let start = Instant::now();
    let mut best: Option<f64> = None;
    let mut runs = 0;
    while runs < 2 || start.elapsed() < time {
        let begin = Instant::now();
        pass();
        let seconds = begin.elapsed().as_secs_f64();
        best = Some(best.map_or(seconds, |b| b.min(seconds)));
        runs += 1;
    }
    best.filter(|s| *s > 0.0)
}

/// The largest disk: its name, capacity, and rates typical of its kind. A short read would measure the page cache.
fn disk_prior() -> (String, Sourced<Bytes>, Sourced<BytesPerS>, Sourced<Seconds>) {
    let Some((name, bytes, spins)) = host::largest_disk() else {
        let note = "no block device visible; an NVMe drive assumed".to_string();
        return (note, Sourced::prior(Bytes(1_000_000_000_000)), Sourced::prior(BytesPerS(3e9)), Sourced::prior(Seconds(80e-6)));
    };
    let (rate, latency, kind) = if spins && !name.starts_with("vd") {
        (150e6, 8e-3, "a hard disk")
    } else if name.starts_with("nvme") {
        (3e9, 80e-6, "an NVMe drive")
    } else if name.starts_with("vd") || name.starts_with("xvd") {
        (1e9, 200e-6, "a virtual disk")
    } else {
        (500e6, 100e-6, "a SATA drive")
    };
    let note = format!("typical of {kind}; not measured");
    (
        format!("block device {name}"),
        Sourced::measured(bytes),
        Sourced::prior(BytesPerS(rate)).with_note(note.clone()),
        Sourced::prior(Seconds(latency)).with_note(note),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_probe_gives_a_machine_that_makes_sense() {
        let options = ProbeOptions { threads: Some(1), buffer: Bytes::mib(8), time_each: Duration::from_millis(5) };
        let machine = probe_machine(options).expect("probed");
        let dram = machine.memory("dram0").expect("there");
        // Between a tenth of the slowest memory of today and more than any cache delivers.
        assert!((1e8..1e13).contains(&dram.read_bandwidth.value.0), "{}", dram.read_bandwidth.value);
        let again = Machine::from_toml(&machine.to_toml().expect("written")).expect("read");
        assert_eq!(again.fingerprint(), machine.fingerprint());
    }
}
