//! Machines with far memory: host memories by nodes, and what each of them does, measured with pages bound there.
//!
//! Nodes with processors are one memory, `dram0`. Far nodes that are alike are one memory striped over them (`cxl0`, `cxl1`, ...): that is
//! how cards are used together. Measured are reading, a pointer chase, routed experts computed from there, and both memories at once: CXL
//! and DRAM streams share the cores' queues and the memory controller, so their rates do not add up (e.g. arXiv:2303.15375).

use super::INT8_FORMAT;
use super::nodes::{Node, NodeKind, Nodes, Rated};
use super::weights::{ExpertShape, ExpertWork, PIECE, Pool, Workspace};
use crate::error::Result;
use crate::exec::threads::Threads;
use crate::kernels::CpuKernels;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tierwise_cost::machine::{Link, Machine, Memory, MemoryKind, NodeSample, ProcessorKind, Sourced, Spread};
use tierwise_cost::units::{Bytes, BytesPerS, Seconds};

/// One load in so many bytes: a cache line.
const LINE_BYTES: usize = 64;

/// Loads of a pointer chase between two looks at the clock.
const CHASES: usize = 1 << 16;

/// How much to measure.
#[derive(Debug, Clone, Copy)]
pub(super) struct FarEffort {
    /// Memory to take of each node at most; a quarter of what is free if that is less.
    pub(super) pool: Bytes,
    /// Time of each measurement.
    pub(super) time: Duration,
    /// Runs of each at least.
    pub(super) runs: usize,
    /// Width of the residual stream and inside an expert.
    pub(super) expert: (u32, u32),
    /// Also both memories at once.
    pub(super) contention: bool,
}

/// A host memory and its nodes.
#[derive(Debug, Clone, PartialEq)]
struct HostMemory {
    id: String,
    nodes: Vec<u32>,
    capacity: Bytes,
    /// Free on the fullest of its nodes.
    available: Bytes,
    rated: Option<Rated>,
    what: &'static str,
}

/// Host memories by nodes, that of the processors first; none where no memory is far.
fn host_memories(there: &Nodes) -> Vec<HostMemory> {
    let near: Vec<&Node> = there.usable().filter(|n| n.kind == NodeKind::Local).collect();
    if near.is_empty() || there.far().next().is_none() {
        return Vec::new();
    }
    let memory = |id: String, nodes: &[&Node], capacity: Bytes| HostMemory {
        id,
        nodes: nodes.iter().map(|n| n.number).collect(),
        capacity,
        available: nodes.iter().map(|n| n.available()).min().unwrap_or_default(),
        rated: nodes[0].rated,
        what: nodes[0].kind.name(),
    };
    let mut memories = vec![memory("dram0".into(), &near, near.iter().map(|n| n.total).sum())];
    let mut groups: Vec<Vec<&Node>> = Vec::new();
    for node in there.far() {
        // A little memory of a card is kept by the firmware, so sizes of equal cards differ by less than a tenth.
        let alike = |o: &Node| {
            let sizes = o.total.0.abs_diff(node.total.0) < o.total.0 / 10;
            sizes && o.kind == node.kind && o.rated == node.rated && o.tier == node.tier
        };
        match groups.iter_mut().find(|g| alike(g[0])) {
            Some(group) => group.push(node),
            None => groups.push(vec![node]),
        }
    }
    for (i, group) in groups.iter().enumerate() {
        let smallest = group.iter().map(|n| n.total.0).min().unwrap_or(0);
        memories.push(memory(format!("cxl{i}"), group, Bytes(smallest * group.len() as u64)));
    }
    memories
}

/// Puts far memory into the description of this machine, which so far takes all memory for `dram0`. Gives what was measured; nothing where
/// no memory is far, or where this process may not bind pages to nodes, which the machine's note then says.
pub(super) fn add_far(machine: &mut Machine, there: &Nodes, threads: &Threads, effort: FarEffort) -> Result<Vec<NodeSample>> {
    let memories = host_memories(there);
    if memories.is_empty() {
        return Ok(Vec::new());
    }
    let mut pools = Vec::with_capacity(memories.len());
    for m in &memories {
        let size = Bytes(effort.pool.0.min(m.available.0 / 4));
        match Pool::on(threads, size, &m.nodes) {
            Ok(pool) => pools.push(pool),
            Err(e) => {
                let note = machine.note.get_or_insert_default();
                *note += &format!(" Far memory is counted as dram0: {e}");
                return Ok(Vec::new());
            }
        }
    }
    let mut samples = Vec::with_capacity(memories.len());
    for (i, (m, pool)) in memories.iter().zip(&pools).enumerate() {
        let home = (i > 0 && effort.contention).then_some(&pools[0]);
        samples.push(measure(&m.id, threads, pool, home, effort));
    }
    let home = machine.memories.iter().position(|m| m.id == memories[0].id).expect("the description begins with it");
    machine.memories[home].numa_nodes.clone_from(&memories[0].nodes);
    let capacity = &mut machine.memories[home].capacity;
    capacity.value = capacity.value.min(memories[0].capacity);
    machine.memories[home].latency = latency(&samples[0]);
    for (at, (m, sample)) in memories.iter().zip(&samples).skip(1).enumerate() {
        let rated = m.rated.and_then(|r| r.read_bandwidth).map_or(String::new(), |r| format!("; {r} as the firmware rates it"));
        let rate = BytesPerS(sample.gb_per_s.median * 1e9);
        let bandwidth = Sourced::measured(rate).with_note(format!("{} threads{rated}", sample.threads));
        machine.memories.insert(
            home + 1 + at,
            Memory {
                id: m.id.clone(),
                kind: MemoryKind::Cxl,
                capacity: Sourced::measured(m.capacity).with_note(format!("{} ({})", crate::memory::words(&m.nodes), m.what)),
                read_bandwidth: bandwidth.clone(),
                latency: latency(sample),
                numa_nodes: m.nodes.clone(),
            },
        );
        machine.links.push(Link {
            from: m.id.clone(),
            to: memories[0].id.clone(),
            bandwidth,
            pageable_bandwidth: None,
            latency: latency(sample),
        });
        for p in machine.processors.iter_mut().filter(|p| p.kind == ProcessorKind::Cpu) {
            p.computes_from.push(m.id.clone());
        }
    }
    Ok(samples)
}

fn latency(sample: &NodeSample) -> Sourced<Seconds> {
    Sourced::measured(Seconds(sample.latency_ns.median * 1e-9)).with_note("pointer chase")
}

/// What one memory does.
fn measure(id: &str, threads: &Threads, pool: &Pool, home: Option<&Pool>, effort: FarEffort) -> NodeSample {
    let FarEffort { time, runs, expert: (hidden, inner), .. } = effort;
    let rate = |bytes: f64| move |seconds: &f64| bytes / seconds / 1e9;
    let kernels = threads.kernels();
    let read = || threads.pool().install(|| pool.bytes().par_chunks(PIECE).for_each(|piece| read_piece(kernels, piece)));
    let reading: Vec<f64> = seconds_of(time, runs, read).iter().map(rate(pool.bytes().len() as f64)).collect();
    const DISTINCT: usize = 8;
    let shape = ExpertShape { format: INT8_FORMAT, hidden: hidden as usize, inner: inner as usize };
    let work = ExpertWork::new(shape, 1, DISTINCT);
    let weights = 3.0 * f64::from(hidden) * f64::from(inner) * DISTINCT as f64 * INT8_FORMAT.bits_per_element() / 8.0;
    let mut workspace = Workspace::default();
    let computing = seconds_of(time, runs, || threads.pool().install(|| work.run(threads, pool, &mut workspace)));
    let computing: Vec<f64> = computing.iter().map(rate(weights)).collect();
    let chain = Chain::new(pool.bytes().len());
    let waiting: Vec<f64> = chain.seconds(pool.bytes(), time, runs).iter().map(|s| s * 1e9).collect();
    let spread = |runs: &[f64]| Spread::of(runs).expect("a run takes time");
    NodeSample {
        memory: id.to_string(),
        threads: threads.count() as u32,
        gb_per_s: spread(&reading),
        latency_ns: spread(&waiting),
        expert_gb_per_s: spread(&computing),
        contended_gb_per_s: home.map(|home| {
            let both: Vec<[f64; 2]> = (0..runs).map(|_| both_at_once(threads, pool, home, time)).collect();
            [0, 1].map(|which| spread(&both.iter().map(|b| b[which]).collect::<Vec<_>>()))
        }),
    }
}

/// Seconds of runs of `f` until `time` has passed, at least `runs` of them, after one to warm up.
fn seconds_of(time: Duration, runs: usize, mut f: impl FnMut()) -> Vec<f64> {
    f();
    let (start, mut seconds) = (Instant::now(), Vec::new());
    while seconds.len() < runs.max(1) || start.elapsed() < time {
        let begin = Instant::now();
        f();
        seconds.push(begin.elapsed().as_secs_f64().max(1e-9));
    }
    seconds
}

fn read_piece(kernels: &CpuKernels, piece: &[u8]) {
    let floats: &[f32] = bytemuck::try_cast_slice(piece).unwrap_or_default();
    let (a, b) = floats.split_at(floats.len() / 2);
    std::hint::black_box(kernels.dot_f32(a, &b[..a.len()]));
}

/// 10^9 bytes per second of `far` and of `home` while half of the threads (at least one) read each.
fn both_at_once(threads: &Threads, far: &Pool, home: &Pool, time: Duration) -> [f64; 2] {
    let (kernels, each) = (threads.kernels(), (threads.count() / 2).max(1));
    let (done, counts) = (AtomicBool::new(false), [AtomicU64::new(0), AtomicU64::new(0)]);
    let start = Instant::now();
    std::thread::scope(|s| {
        for (pool, count) in [far, home].into_iter().zip(&counts) {
            for thread in 0..each {
                let done = &done;
                s.spawn(move || {
                    let pieces = pool.bytes().chunks(PIECE).cycle().skip(thread * pool.bytes().len() / PIECE / each);
                    for piece in pieces {
                        if done.load(Ordering::Relaxed) {
                            return;
                        }
                        read_piece(kernels, piece);
                        count.fetch_add(piece.len() as u64, Ordering::Relaxed);
                    }
                });
            }
        }
        std::thread::sleep(time);
        done.store(true, Ordering::Relaxed);
    });
    let seconds = start.elapsed().as_secs_f64();
    // A rate is never zero: a thread that was not scheduled at all has read a byte.
    counts.map(|c| c.into_inner().max(1) as f64 / seconds / 1e9)
}

/// A random cycle over the lines of a memory: each load's address depends on the load before, so none overlaps another.
///
/// The memory that is measured is read only and holds one repeated byte. So the order is computed, not stored: a full-period linear
/// congruence over the lines, into which the loaded byte enters (Hull and Dobell: a power of two, odd increment, multiplier 1 mod 4).
struct Chain {
    mask: usize,
    first: usize,
}

impl Chain {
    const MULTIPLIER: usize = 1_664_525;
    const INCREMENT: usize = 1_013_904_223;

    fn new(bytes: usize) -> Self {
        let lines = (bytes / LINE_BYTES).max(1);
        let lines = if lines.is_power_of_two() { lines } else { lines.next_power_of_two() / 2 };
        Self { mask: lines - 1, first: StdRng::seed_from_u64(7).random_range(0..lines) }
    }

    /// The line after `line`, of which `loaded` was read.
    const fn next(&self, line: usize, loaded: u8, base: u8) -> usize {
        // `loaded` equals `base` always, which the processor cannot know before the load ends.
        line.wrapping_mul(Self::MULTIPLIER).wrapping_add(Self::INCREMENT).wrapping_add((loaded ^ base) as usize) & self.mask
    }

    /// Seconds per load, of several runs.
    fn seconds(&self, memory: &[u8], time: Duration, runs: usize) -> Vec<f64> {
        let base = memory[0];
        let mut line = self.first;
        let chase = || {
            for _ in 0..CHASES {
                line = self.next(line, memory[line * LINE_BYTES], base);
            }
            std::hint::black_box(line);
        };
        seconds_of(time, runs, chase).iter().map(|s| s / CHASES as f64).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u32, kind: NodeKind, gib: u64) -> Node {
        Node { number, kind, total: Bytes::gib(gib), free: Bytes::gib(gib / 2), allowed: true, ..Node::default() }
    }

    #[test]
    fn far_nodes_that_are_alike_are_striped() {
        use NodeKind::{Cxl, Far, Local};
        let nodes = |nodes: Vec<Node>| Nodes { nodes, ..Nodes::default() };
        assert!(host_memories(&nodes(vec![node(0, Local, 64), node(1, Local, 64)])).is_empty(), "two sockets have no far memory");
        let mut barred = node(4, Cxl, 96);
        barred.allowed = false;
        let found =
            host_memories(&nodes(vec![node(0, Local, 64), node(1, Local, 64), node(2, Cxl, 96), node(3, Cxl, 95), barred]));
        let short: Vec<_> = found.iter().map(|m| (m.id.as_str(), m.nodes.as_slice(), m.capacity)).collect();
        assert_eq!(short, [("dram0", &[0, 1][..], Bytes::gib(128)), ("cxl0", &[2, 3], Bytes::gib(190))]);
        let found = host_memories(&nodes(vec![node(0, Local, 64), node(2, Cxl, 96), node(3, Far, 96), node(5, Cxl, 32)]));
        assert_eq!(found.iter().map(|m| m.nodes.clone()).collect::<Vec<_>>(), [vec![0], vec![2], vec![3], vec![5]]);
    }

    #[test]
    fn a_chain_visits_every_line_before_it_repeats() {
        for bytes in [64, 4096, 100_000, 1 << 20] {
            let chain = Chain::new(bytes);
            let mut seen = vec![false; chain.mask + 1];
            assert!((chain.mask + 1) * LINE_BYTES <= bytes && (chain.mask + 1) * LINE_BYTES * 2 > bytes);
            let mut line = chain.first;
            for _ in 0..seen.len() {
                assert!(!std::mem::replace(&mut seen[line], true), "line {line} twice");
                line = chain.next(line, 9, 9);
            }
            assert_eq!(line, chain.first);
        }
    }

    #[test]
    fn a_second_memory_on_the_own_node_is_described_and_measured() {
        let there = Nodes::of_this_machine();
        let Some(own) = there.usable().find(|n| n.kind == NodeKind::Local).cloned() else { return };
        // The same node as if it were far: binding and measuring are real.
        let twin = Node { kind: NodeKind::Far, ..own.clone() };
        let nodes = Nodes { nodes: vec![own.clone(), twin], ..Nodes::default() };
        let options = super::super::ProbeOptions { threads: Some(2), buffer: Bytes::mib(4), time_each: Duration::from_millis(2) };
        let mut machine = super::super::probe_machine(options).expect("probed");
        machine.memories.retain(|m| m.kind != MemoryKind::Cxl);
        let threads = Threads::new(2).expect("threads");
        let effort =
            FarEffort { pool: Bytes::mib(4), time: Duration::from_millis(2), runs: 3, expert: (256, 256), contention: true };
        let samples = add_far(&mut machine, &nodes, &threads, effort).expect("measured");
        if samples.is_empty() {
            return println!("skipped: {:?}", machine.note);
        }
        machine.check().expect("a machine that makes sense");
        let cxl = machine.memory("cxl0").expect("described");
        assert_eq!((cxl.kind, cxl.numa_nodes.as_slice()), (MemoryKind::Cxl, &[own.number][..]));
        assert_eq!(machine.processors[0].computes_from, ["dram0", "cxl0"]);
        assert!(machine.link("cxl0", "dram0").is_some());
        assert_eq!(samples.len(), 2);
        assert!(samples[0].contended_gb_per_s.is_none() && samples[1].contended_gb_per_s.is_some());
        // A load takes from a tenth of a nanosecond (caches) to a hundred microseconds (a busy machine).
        assert!(samples.iter().all(|s| (0.1..1e5).contains(&s.latency_ns.median)), "{samples:?}");
        let again = Machine::from_toml(&machine.to_toml().expect("written")).expect("read");
        assert_eq!(again.fingerprint(), machine.fingerprint());
    }
}
