//! Where a model is executed: the device that was asked for or found, and the machine that plans are made for.

use crate::args::{DeviceArg, ExecArgs};
use crate::model;
use crate::ui;
use anyhow::{Result, bail};
use tierwise_cost::machine::{Machine, MemoryKind, ProcessorKind};
use tierwise_cost::units::Bytes;
use tierwise_runtime::backend::device::DeviceBackend;
use tierwise_runtime::backend::{Choice, open};
use tierwise_runtime::probe::add_device;
use tierwise_runtime::session::DeviceLine;

/// A device, or none, and the machine with it.
pub struct Place {
    /// The device's back-end; absent: the CPU.
    pub backend: Option<Box<dyn DeviceBackend>>,
    /// What was chosen and why.
    pub device: String,
    /// With the device as its GPU, or without GPUs.
    pub machine: Machine,
    /// Where its description is from.
    pub machine_origin: String,
}

/// Opens the device and describes the machine.
pub fn choose(args: &ExecArgs, threads: usize) -> Result<Place> {
    if let Some(vram) = args.vram.filter(|v| *v < Bytes::mib(1) && v.0 > 0) {
        bail!("--vram {vram}: too small to hold anything; give 0B to leave the GPU out, or at least 1 MiB");
    }
    let choice = match args.device {
        DeviceArg::Auto | DeviceArg::Cpu if args.vram == Some(Bytes::ZERO) => Choice::Cpu,
        other => other.choice(),
    };
    let options = model::device_options();
    let opened = match open(choice, &options) {
        Ok(opened) => opened,
        Err(e) => bail!("{e}; to run without it: --device cpu, or --device auto, which takes the best there is"),
    };
    let (machine, machine_origin) = model::machine(args.machine.as_deref(), Some(threads))?;
    let Some(backend) = opened.backend else {
        return Ok(Place { backend: None, device: opened.why, machine: without_gpus(machine), machine_origin });
    };
    let (device, name) = (opened.why, backend.info().backend);
    if let Some(machine_name) = &args.machine {
        if machine.processors_of(ProcessorKind::Gpu).next().is_none() {
            bail!(
                "--machine {machine_name}: it has no GPU, and the model is to run on {name}; take another one, or --device cpu"
            );
        }
        return Ok(Place { backend: Some(backend), device, machine, machine_origin });
    }
    let mut machine = without_gpus(machine);
    // What a probe allocates goes with its back-end; the session has one of its own.
    add_device(&mut machine, backend, args.vram)?;
    let machine_origin = format!("{machine_origin}; {name} probed quickly");
    Ok(Place { backend: open(choice, &options)?.backend, device, machine, machine_origin })
}

/// The machine without its GPUs.
pub fn without_gpus(mut machine: Machine) -> Machine {
    machine.processors.retain(|p| p.kind == ProcessorKind::Cpu);
    let gone: Vec<String> = machine.memories.iter().filter(|m| m.kind == MemoryKind::Vram).map(|m| m.id.clone()).collect();
    machine.memories.retain(|m| m.kind != MemoryKind::Vram);
    machine.links.retain(|l| !gone.contains(&l.from) && !gone.contains(&l.to));
    machine
}

/// What is allocated on the device beside what was planned.
pub fn memory_table(lines: &[DeviceLine]) -> String {
    let row = |l: &DeviceLine| vec![l.name.to_string(), l.planned.to_string(), l.allocated.to_string()];
    let sum = |f: fn(&DeviceLine) -> u64| Bytes(lines.iter().map(f).sum()).to_string();
    let all = vec!["all, without the driver's context".to_string(), sum(|l| l.planned.0), sum(|l| l.allocated.0)];
    ui::table(&["device memory", "planned", "allocated"], lines.iter().map(row).chain([all]), true)
}
