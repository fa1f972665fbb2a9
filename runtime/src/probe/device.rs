//! A quick look at a device: how fast it copies, reads and multiplies, through the back-end that will run the model.
//!
//! Each rate is measured with work that grows until it takes long enough to be timed; a slow (software) device stops at the first size.
//! What was allocated for it goes with the back-end, so a session opens its own. Where host memory is several nodes, copies are measured from
//! each of them, with pages bound there: a GPU hangs on one socket, and bytes of another, or of a CXL card, come a longer way.

use super::nodes::{Node, Nodes};
use crate::backend::device::{Copier, DeviceBackend, View};
use crate::backend::op::{DeviceMatrix, DeviceOp};
use crate::error::{Result, RuntimeError};
use crate::memory::{NodeRegion, PageSize};
use std::time::{Duration, Instant};
use tierwise_cost::machine::{CopySample, Link, Machine, Memory, MemoryKind, Processor, ProcessorKind, Sourced, Spread};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::{Bytes, BytesPerS, FlopsPerS, Seconds};
use tierwise_planner::engine::Purpose;

/// Long enough for a clock that a scheduler disturbs.
const ENOUGH: Duration = Duration::from_millis(5);
/// Elements per row of the measured product.
const COLS: u32 = 4096;
/// Operations of one measured submission.
const REPEATS: usize = 8;

/// What was measured.
struct Rates {
    copy: BytesPerS,
    copy_latency: Seconds,
    read: BytesPerS,
    flops: FlopsPerS,
    launch: Seconds,
    /// Memory of the device that may be written: as much as takes long enough.
    target: View,
}

/// `machine` with the device as processor `gpu0`, its memory `vram0` and the links between that and `dram0`.
///
/// `memory`: what may be used of its memory at most, which must be given where the driver does not say what is free.
///
/// # Errors
/// When the device refuses what inference needs, or nobody knows its memory.
pub fn add_device(machine: &mut Machine, backend: Box<dyn DeviceBackend>, memory: Option<Bytes>) -> Result<()> {
    add_device_beside(machine, backend, memory, &Nodes::of_this_machine())
}

/// [`add_device`] on a machine with these nodes.
fn add_device_beside(
    machine: &mut Machine,
    mut backend: Box<dyn DeviceBackend>,
    memory: Option<Bytes>,
    there: &Nodes,
) -> Result<()> {
    let info = backend.info().clone();
    let capacity = match (info.free_bytes, memory) {
        (Some(free), _) => Sourced::measured(Bytes(free)).with_note("free when probed"),
        (None, Some(limit)) => Sourced::prior(limit).with_note("as --vram says; the driver does not"),
        (None, None) => {
            let reason = format!("the driver of {} does not say how much memory is free: say it with --vram", info.name);
            return Err(RuntimeError::Device { device: info.backend, reason });
        }
    };
    let room = capacity.value.0.min(memory.map_or(u64::MAX, |m| m.0)) / 4;
    let rates = measure(backend.as_mut(), room.min(info.max_buffer_bytes))?;
    let host = machine.processors_of(ProcessorKind::Cpu).next().map(|p| machine.home(p).id.clone());
    let host = host.expect("a checked machine has a CPU");
    let by_node = copies_by_node(machine, &host, there, backend.copier().as_ref(), rates.target);
    machine.memories.push(Memory {
        id: "vram0".into(),
        kind: MemoryKind::Vram,
        capacity,
        read_bandwidth: Sourced::measured(rates.read).with_note("product with one token, F16"),
        latency: Sourced::prior(Seconds(500e-9)),
        numa_nodes: Vec::new(),
    });
    machine.processors.push(Processor {
        id: "gpu0".into(),
        kind: ProcessorKind::Gpu,
        name: format!("{} ({})", info.name, info.backend),
        cores: 1,
        threads: 1,
        isa: info.features,
        computes_from: vec!["vram0".into()],
        f32_flops: Sourced::measured(rates.flops).with_note("product with many tokens, F16 weights"),
        f16_flops: Some(Sourced::measured(rates.flops).with_note("product with many tokens, F16 weights")),
        int8_ops: None,
        launch_latency: Sourced::measured(rates.launch).with_note("small operations in a row"),
    });
    let anywhere = Sourced::measured(rates.copy).with_note("from pageable memory through the back-end's copier");
    let link = |from: &str, to: &str, bandwidth| Link {
        from: from.into(),
        to: to.into(),
        bandwidth,
        pageable_bandwidth: None,
        latency: Sourced::measured(rates.copy_latency).with_note("a copy of 4 KiB"),
    };
    let of_memory = |id: &str| by_node.memories.iter().find(|(memory, _)| memory == id).map(|(_, rate)| rate.clone());
    machine.links.push(link(&host, "vram0", of_memory(&host).unwrap_or_else(|| anywhere.clone())));
    machine.links.push(link("vram0", &host, anywhere));
    machine.links.extend(by_node.memories.iter().filter(|(id, _)| *id != host).map(|(id, rate)| link(id, "vram0", rate.clone())));
    if let Some(c) = &mut machine.calibration {
        c.copies = by_node.nodes;
    }
    machine.check()?;
    Ok(())
}

/// Copies into the device by where they come from.
#[derive(Default)]
struct CopiesByNode {
    nodes: Vec<CopySample>,
    /// By id of the memory, from all of its nodes in turn.
    memories: Vec<(String, Sourced<BytesPerS>)>,
}

/// Copies of one measurement.
const COPY_RUNS: usize = 3;

/// Measures copies to `target` from every node of host memory; nothing where that is one node, or where pages cannot be bound to nodes.
fn copies_by_node(machine: &Machine, host: &str, there: &Nodes, copier: &dyn Copier, target: View) -> CopiesByNode {
    let usable: Vec<&Node> = there.usable().filter(|n| n.total.0 > 0).collect();
    // Memory without nodes of its own is all that is beside processors.
    let nodes_of = |memory: &Memory| -> Vec<u32> {
        if memory.id == host && memory.numa_nodes.is_empty() {
            usable.iter().filter(|n| !n.kind.is_far()).map(|n| n.number).collect()
        } else {
            memory.numa_nodes.clone()
        }
    };
    let on_host = |m: &&Memory| matches!(m.kind, MemoryKind::Dram | MemoryKind::Cxl);
    let memories: Vec<(&Memory, Vec<u32>)> = machine.memories.iter().filter(on_host).map(|m| (m, nodes_of(m))).collect();
    if memories.iter().map(|(_, nodes)| nodes.len()).sum::<usize>() < 2 {
        return CopiesByNode::default();
    }
    // Of several GPUs nobody says here which one this is.
    let gpu_node = if let [gpu] = &there.gpus[..] { gpu.node } else { None };
    let mut found = CopiesByNode::default();
    for (memory, nodes) in memories {
        for node in &nodes {
            let Some(gb_per_s) = copies_from(&[*node], copier, target) else { return CopiesByNode::default() };
            let near = gpu_node.map(|gpu| gpu == *node);
            found.nodes.push(CopySample { node: *node, memory: memory.id.clone(), near, gb_per_s });
        }
        let of_memory = found.nodes[found.nodes.len() - nodes.len()..].iter();
        let words: Vec<String> = of_memory
            .map(|s| {
                let near = if s.near == Some(true) { " (the GPU's)" } else { "" };
                format!("node {}{near} {}", s.node, BytesPerS(s.gb_per_s.median * 1e9))
            })
            .collect();
        let all = match &nodes[..] {
            [] => continue,
            [_] => found.nodes.last().map(|s| s.gb_per_s),
            _ => copies_from(&nodes, copier, target),
        };
        let Some(all) = all else { return CopiesByNode::default() };
        let note = format!("through the back-end's copier from pages bound there: {}", words.join(", "));
        found.memories.push((memory.id.clone(), Sourced::measured(BytesPerS(all.median * 1e9)).with_note(note)));
    }
    found
}

/// 10^9 bytes per second of copies from pages on `nodes`; `None` where the system binds no pages there.
fn copies_from(nodes: &[u32], copier: &dyn Copier, target: View) -> Option<Spread> {
    let mut region = NodeRegion::new(target.bytes as usize, nodes, PageSize::System).ok()?;
    region.as_mut_slice().fill(1);
    let copy = || seconds(|| copier.copy(target, region.as_slice(), Purpose::Demand));
    let runs: Vec<f64> = (0..COPY_RUNS).filter_map(|_| copy().ok()).map(|s| target.bytes as f64 / s / 1e9).collect();
    Spread::of(&runs)
}

/// Seconds of one run of `work` that is at least the second one.
fn seconds(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64().max(1e-9))
}

fn measure(backend: &mut dyn DeviceBackend, room: u64) -> Result<Rates> {
    let row = u64::from(COLS) * 2;
    // 1 MiB, then as much as there is room for, up to 256 MiB: more than caches hold.
    let most = (room / 2 / row).clamp(128, (256 << 20) / row) as u32;
    let weight_bytes = u64::from(most) * row;
    let weight_buffer = backend.alloc(weight_bytes, "a probe's weights")?;
    let tokens = 256_u32;
    let x = backend.alloc(4 * u64::from(tokens * COLS), "a probe's input")?;
    let out = backend.alloc(4 * u64::from(tokens) * u64::from(most), "a probe's output")?;
    let view = |buffer, bytes| View { buffer, offset_bytes: 0, bytes };
    let product = |rows: u32, tokens: u32| DeviceOp::MatMul {
        weight: DeviceMatrix { format: QuantFormat::F16, rows, cols: COLS, view: view(weight_buffer, u64::from(rows) * row) },
        bias: None,
        x: view(x, 4 * u64::from(tokens * COLS)),
        out: view(out, 4 * u64::from(tokens) * u64::from(rows)),
        tokens,
    };
    let mut time = |op: DeviceOp, repeats: usize| {
        let ops = vec![op; repeats];
        seconds(|| {
            backend.submit(&ops)?;
            backend.wait()
        })
    };

    // Growing rows until it takes long enough.
    let mut rows = 128.min(most);
    let read = loop {
        let s = time(product(rows, 1), REPEATS)? / REPEATS as f64;
        if s * REPEATS as f64 >= ENOUGH.as_secs_f64() || rows == most {
            break f64::from(rows) * row as f64 / s;
        }
        rows = rows.saturating_mul(4).min(most);
    };
    let (mut rows, mut columns) = (128.min(most), 8_u32);
    let flops = loop {
        let s = time(product(rows, columns), 1)?;
        let done = 2.0 * f64::from(rows) * f64::from(COLS) * f64::from(columns) / s;
        if s >= ENOUGH.as_secs_f64() || (rows == most.min(4096) && columns == tokens) {
            break done;
        }
        (rows, columns) = (rows.saturating_mul(2).min(most.min(4096)), (columns * 2).min(tokens));
    };
    let small = DeviceOp::Scale { x: view(x, 1024), factor: 1.0, factors: None, rows: 1, width: 256 };
    let launch = time(small, 64)? / 64.0;

    let copier = backend.copier();
    let copy = |bytes: &[u8]| seconds(|| copier.copy(view(weight_buffer, bytes.len() as u64), bytes, Purpose::Demand));
    let copy_latency = copy(&[0; 4096])?;
    let mut bytes = (1 << 20).min(weight_bytes as usize);
    let rate = loop {
        let s = copy(&vec![1; bytes])?;
        if s >= ENOUGH.as_secs_f64() || bytes as u64 == weight_bytes {
            break bytes as f64 / s;
        }
        bytes = (4 * bytes).min(weight_bytes as usize);
    };
    Ok(Rates {
        target: view(weight_buffer, bytes as u64),
        copy: BytesPerS(rate.max(1.0)),
        copy_latency: Seconds(copy_latency.min(1.0)),
        read: BytesPerS(read.max(1.0)),
        flops: FlopsPerS(flops.max(1.0)),
        launch: Seconds(launch.min(1.0)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::reference::ReferenceBackend;
    use crate::probe::nodes::{NodeKind, PciGpu};
    use crate::probe::{ProbeOptions, probe_machine};

    #[test]
    fn a_device_becomes_part_of_the_machine() {
        let options = ProbeOptions { threads: Some(1), buffer: Bytes::mib(8), time_each: Duration::from_millis(1) };
        let mut machine = probe_machine(options).expect("probed");
        add_device(&mut machine, Box::new(ReferenceBackend::new(64 << 20)), None).expect("added");
        assert_eq!(machine.main_processor().id, "gpu0");
        assert!(machine.link("dram0", "vram0").is_some_and(|l| l.bandwidth.value.0 > 1e6));
        let again = Machine::from_toml(&machine.to_toml().expect("written")).expect("read");
        assert_eq!(again.fingerprint(), machine.fingerprint());
    }

    #[test]
    fn copies_are_measured_from_every_node() {
        let real = Nodes::of_this_machine();
        let Some(own) = real.usable().find(|n| n.kind == NodeKind::Local).cloned() else { return };
        if NodeRegion::new(1 << 16, &[own.number], PageSize::System).is_err() {
            return println!("skipped: pages cannot be bound to nodes here");
        }
        // The same node as if it were a card beside it: binding and copying are real.
        let number = own.number;
        let twin = Node { kind: NodeKind::Cxl, ..own.clone() };
        let gpu = PciGpu { address: "0000:41:00.0".into(), id: "10de:26b9".into(), node: Some(number) };
        let there = Nodes { nodes: vec![own, twin], gpus: vec![gpu], ..Nodes::default() };
        let options = ProbeOptions { threads: Some(1), buffer: Bytes::mib(8), time_each: Duration::from_millis(1) };
        let mut machine = probe_machine(options).expect("probed");
        machine.memories.retain(|m| m.kind != MemoryKind::Cxl);
        machine.links.retain(|l| l.from != "cxl0");
        let at = machine.memories.iter().position(|m| m.id == "dram0").expect("there");
        machine.memories[at].numa_nodes = vec![number];
        let card = Memory { id: "cxl0".into(), kind: MemoryKind::Cxl, ..machine.memories[at].clone() };
        machine.memories.insert(at + 1, card);
        machine.processors.iter_mut().for_each(|p| p.computes_from = vec!["dram0".into(), "cxl0".into()]);
        let plain = machine.clone();
        add_device_beside(&mut machine, Box::new(ReferenceBackend::new(64 << 20)), None, &there).expect("added");
        for from in ["dram0", "cxl0"] {
            let link = machine.link(from, "vram0").expect("measured");
            assert!(link.bandwidth.value.0 > 1e6 && link.bandwidth.source == tierwise_cost::machine::Source::Measured);
            let note = link.bandwidth.note.as_deref().unwrap_or_default();
            assert!(note.contains(&format!("node {number} (the GPU's)")), "{note}");
        }
        assert!(machine.link("vram0", "dram0").is_some() && machine.link("vram0", "cxl0").is_none());
        // One node: nothing to tell apart.
        let mut machine = plain;
        machine.memories.retain(|m| m.id != "cxl0");
        machine.processors.iter_mut().for_each(|p| p.computes_from = vec!["dram0".into()]);
        add_device_beside(&mut machine, Box::new(ReferenceBackend::new(64 << 20)), None, &real).expect("added");
        let note = machine.link("dram0", "vram0").and_then(|l| l.bandwidth.note.clone()).unwrap_or_default();
        assert!(note.contains("pageable memory") || real.usable().count() > 1, "{note}");
    }
}
