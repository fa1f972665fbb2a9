//! Is what is resident what was planned? Slots against the engine's books and the file's bytes, memory of process and device against the
//! budget's lines.

use super::Session;
use super::process::ProcessMemory;
use crate::error::{Result, RuntimeError};
use crate::exec::loader::{ExpertReader, FileReader};
use crate::hybrid::memory::{DeviceLine, OWN};
use serde::Serialize;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use tierwise_cost::machine::MemoryKind;
use tierwise_cost::units::Bytes;
use tierwise_planner::check::Pool;
use tierwise_planner::engine::ExpertKey;
use tierwise_planner::{CheckedPlan, budget};

/// Memory beside the plan's lines that a process may keep: tokenizer, tensor table, stacks and working memory of threads, blocks
/// around experts in slots, the allocator's slack. The program's own pages come on top.
pub const OVERHEAD: Bytes = Bytes(64 << 20);
/// Pages that the kernel maps around one that is touched (`fault_around_bytes`), on either side of a run of tensors.
const FAULT_AROUND: u64 = 64 << 10;

/// What alignment may add to a line of a device's budget, or a hundredth of the line.
const ALIGNMENT_SHARE: u64 = 1 << 20;

/// One comparison.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What is compared.
    pub name: String,
    /// What the plan says.
    pub planned: String,
    /// What is there.
    pub found: String,
    /// Whether that is as it should be.
    pub ok: bool,
}

#[expect(clippy::needless_pass_by_value, reason = "numbers and texts alike")]
fn check(name: impl Into<String>, planned: impl ToString, found: impl ToString, ok: bool) -> Check {
    Check { name: name.into(), planned: planned.to_string(), found: found.to_string(), ok }
}

/// Compares a session, best one that has computed something, with its plan.
///
/// # Errors
/// When a file cannot be read at all.
pub fn verify(session: &mut Session, plan: &CheckedPlan) -> Result<Vec<Check>> {
    session.settle();
    let table = session.model.expert_table(plan.moe_layers().iter().copied());
    let mut checks = vec![check(
        "model",
        &plan.plan().model.fingerprint,
        session.model.spec().fingerprint(),
        plan.plan().model.fingerprint == session.model.spec().fingerprint(),
    )];
    checks.extend(placement(session, plan));
    checks.extend(slots(session, plan)?);
    checks.push(contents(session, plan)?);
    match session.device_memory() {
        Some(lines) => {
            checks.extend(device_memory(&lines, plan));
            checks.push(device_contents(session, plan)?);
        }
        // With a device, drivers keep memory of their own in the process.
        None => checks.extend(memory(session, plan)),
    }
    for path in table.paths() {
        checks.push(on_disk(path, &table, plan)?);
    }
    Ok(checks)
}

/// Sum of a line over the budgets of memories of `kind`.
fn line(plan: &CheckedPlan, kinds: &[MemoryKind], name: &str) -> Bytes {
    plan.plan().budgets.iter().filter(|b| kinds.contains(&b.kind)).map(|b| b.line(name)).sum()
}

/// Bytes of the file's experts that the plan puts onto the device, into memory and on disk, against the budget's lines.
fn placement(session: &Session, plan: &CheckedPlan) -> Vec<Check> {
    let (mut on_device, mut in_memory, mut on_disk) = (Bytes::ZERO, Bytes::ZERO, Bytes::ZERO);
    for &layer in plan.moe_layers() {
        let bytes = Bytes(session.model.expert_layout(layer).map_or(0, |l| l.bytes()) as u64);
        for expert in 0..plan.num_experts(layer) {
            match plan.tier(plan.tier_of(layer, expert)).kind {
                MemoryKind::Disk => on_disk += bytes,
                MemoryKind::Vram => on_device += bytes,
                MemoryKind::Dram | MemoryKind::Cxl => in_memory += bytes,
            }
        }
    }
    let planned = |kinds: &[MemoryKind]| line(plan, kinds, budget::RESIDENT_EXPERTS);
    let (vram, ram, disk) =
        (planned(&[MemoryKind::Vram]), planned(&[MemoryKind::Dram, MemoryKind::Cxl]), planned(&[MemoryKind::Disk]));
    let mut checks = vec![
        check("experts in memory", ram, in_memory, ram == in_memory),
        check("experts on disk", disk, on_disk, disk == on_disk),
    ];
    if session.device().is_some() {
        checks.insert(0, check("experts on the device", vram, on_device, vram == on_device));
    }
    checks
}

/// The slots: their number and size, and what the engine says is in them.
fn slots(session: &Session, plan: &CheckedPlan) -> Result<Vec<Check>> {
    let pools = plan.pools();
    let found: Vec<usize> = session.driver.slots().counts().collect();
    let bytes = |(p, n): (&Pool, &usize)| Bytes(p.slot_bytes.0 * *n as u64);
    let cached = plan.cache_pools().len();
    let held: Bytes = pools.iter().zip(&found).take(cached).map(bytes).sum();
    let planned = line(plan, &[MemoryKind::Dram, MemoryKind::Vram], budget::EXPERT_CACHE);
    let mut checks = vec![check("slots", planned, held, planned == held)];
    if let Some(staging) = pools.get(cached) {
        let held: Bytes = pools.iter().zip(&found).skip(cached).map(bytes).sum();
        let planned = Bytes(staging.slot_bytes.0 * u64::from(staging.slots));
        checks.push(check("staging slots", planned, held, planned == held));
    }
    for &layer in plan.moe_layers() {
        if plan.slots(layer) == 0 {
            continue;
        }
        let resident: Vec<_> = session.driver.engine().resident_slots(layer).collect();
        let experts: BTreeSet<u32> = resident.iter().map(|(_, e)| *e).collect();
        let slots: BTreeSet<_> = resident.iter().map(|(s, _)| *s).collect();
        let strangers = experts.iter().filter(|e| plan.tier(plan.tier_of(layer, **e)).through.is_none()).count();
        let ok = experts.len() == resident.len()
            && slots.len() == resident.len()
            && strangers == 0
            && slots.iter().all(|s| s.pool == plan.pool_of(layer) && session.driver.slots().contains(*s));
        let name = format!("layer {layer}: experts in slots");
        let found = match strangers {
            0 => format!("{} different ones", experts.len()),
            n => format!("{} different ones, {n} of which are planned to stay where they are", experts.len()),
        };
        checks.push(check(name, format!("at most {} of those to be loaded", plan.slots(layer)), found, ok));
    }
    Ok(checks)
}

/// The device's budget: every line to the alignment of its parts, and the sum.
fn device_memory(lines: &[DeviceLine], plan: &CheckedPlan) -> Vec<Check> {
    let ours = lines.iter().filter(|l| l.name != OWN);
    let mut checks: Vec<Check> = ours
        .map(|l| {
            let alignment = Bytes(ALIGNMENT_SHARE.max(l.planned.0 / 100));
            let planned = format!("{} + at most {alignment}", l.planned);
            check(format!("device: {}", l.name), planned, l.allocated, l.allocated.0 <= l.planned.0 + alignment.0)
        })
        .collect();
    let all: Bytes = lines.iter().map(|l| l.allocated).sum();
    let capacity = plan.plan().budgets.iter().find(|b| b.memory == plan.plan().main.memory).map_or(Bytes::ZERO, |b| b.capacity);
    checks.push(check("device: all", format!("at most {capacity}"), all, all <= capacity));
    checks
}

/// Every expert in a slot on the device, read back, against the model's.
fn device_contents(session: &mut Session, plan: &CheckedPlan) -> Result<Check> {
    let Session { model, executor, driver, .. } = session;
    let (mut count, mut compared, mut wrong) = (0_u64, 0_u64, Vec::new());
    for &layer in plan.moe_layers() {
        let Some(tensors) = model.expert_tensors(layer) else { continue };
        for (slot, expert) in driver.engine().resident_slots(layer) {
            let Some(place) = driver.slots().device_place(slot) else { continue };
            let held = executor.read_expert(layer, place)?;
            let e = model.expert(tensors, expert);
            let own = [e.gate.bytes, e.up.bytes, e.down.bytes];
            compared += own.iter().map(|b| b.len() as u64).sum::<u64>();
            count += 1;
            if held.iter().zip(own).any(|(held, own)| held.as_slice() != own) {
                wrong.push(format!("layer {layer} expert {expert}"));
            }
        }
    }
    let found = match wrong.first() {
        None => format!("{count} experts, {}, all equal", Bytes(compared)),
        Some(first) => format!("{} of {count} differ, first {first}", wrong.len()),
    };
    Ok(check("bytes in slots on the device", "those of the file", found, wrong.is_empty()))
}

/// Every expert in a slot in host memory against a fresh read of the file.
fn contents(session: &Session, plan: &CheckedPlan) -> Result<Check> {
    let table = Arc::new(session.model.expert_table(plan.moe_layers().iter().copied()));
    let reader = FileReader::new(Arc::clone(&table))?;
    let (mut compared, mut checksum, mut wrong) = (0_u64, 0xcbf2_9ce4_8422_2325_u64, Vec::new());
    let mut count = 0;
    for &layer in plan.moe_layers().iter().filter(|l| plan.slots(**l) > 0) {
        let mut fresh = vec![0; table.slot_bytes(layer)];
        for (slot, expert) in session.driver.engine().resident_slots(layer) {
            let key = ExpertKey { layer, expert };
            if session.driver.slots().device_place(slot).is_some() {
                continue;
            }
            reader.read(key, &mut fresh).map_err(|reason| RuntimeError::ExpertsUnavailable { layer, reason })?;
            let held = session.driver.slots().expert(key, slot);
            let mut same = true;
            for (matrix, extent) in [held.gate, held.up, held.down].into_iter().zip(table.expert(key)) {
                let bytes = &fresh[extent.in_slot()..extent.in_slot() + extent.bytes];
                same &= bytes == matrix.bytes;
                compared += bytes.len() as u64;
                // FNV-1a over words: to tell two runs apart, not for security.
                for word in bytes.chunks(8) {
                    let mut eight = [0; 8];
                    eight[..word.len()].copy_from_slice(word);
                    checksum = (checksum ^ u64::from_le_bytes(eight)).wrapping_mul(0x0100_0000_01b3);
                }
            }
            count += 1;
            if !same {
                wrong.push(format!("layer {layer} expert {expert}"));
            }
        }
    }
    let found = match wrong.first() {
        None => format!("{count} experts, {}, all equal (checksum {checksum:016x})", Bytes(compared)),
        Some(first) => format!("{} of {count} differ, first {first}", wrong.len()),
    };
    Ok(check("bytes in slots", "those of the file", found, wrong.is_empty()))
}

/// Memory of the process against the sum of the budget's lines.
fn memory(session: &Session, plan: &CheckedPlan) -> Vec<Check> {
    let kv = Bytes(session.executor.kv_bytes().0);
    let planned_kv = line(plan, &[MemoryKind::Dram], budget::KV);
    // All sequences are alike; the plan has room for as many as its batch.
    let (open, planned) = (session.executor.sequences().len() as u64, u64::from(plan.batch().max(1)));
    let kv_ok = open <= planned && planned_kv.0 * open == kv.0 * planned;
    let mut checks = vec![check("keys and values", planned_kv, kv, kv_ok)];
    let Some(found) = ProcessMemory::look(&session.model.paths()) else {
        return checks;
    };
    let dram = |name| line(plan, &[MemoryKind::Dram], name);
    // Staging slots have room in what is staged or free.
    let staging: Bytes =
        plan.pools().iter().skip(plan.cache_pools().len()).map(|p| Bytes(p.slot_bytes.0 * u64::from(p.slots))).sum();
    // Experts on named nodes were copied there, with the blocks around them.
    let placed: Bytes =
        session.model.placed().into_iter().flat_map(|p| p.regions()).map(|r| Bytes(r.region.as_slice().len() as u64)).sum();
    let without_nodes = plan.plan().budgets.iter().filter(|b| b.kind == MemoryKind::Dram && b.numa_nodes.is_empty());
    let in_map: Bytes = without_nodes.map(|b| b.line(budget::RESIDENT_EXPERTS)).sum();
    let own = dram(budget::EXPERT_CACHE) + dram(budget::KV) + dram(budget::ACTIVATIONS) + staging + placed;
    let mapped = dram(budget::NON_EXPERT_WEIGHTS) + in_map;
    let within = |name: &str, planned: Bytes, overhead: Bytes, found: Bytes| {
        let ok = found.0 <= planned.0 + overhead.0;
        check(name, format!("{planned} + at most {overhead}"), found, ok)
    };
    // Runs of tensors between which experts lie: at most two borders per tensor that is no expert.
    let borders = 2 * session.model.spec().tensors.iter().filter(|t| !t.role.is_routed_expert()).count() as u64;
    let program = found.file.saturating_sub(found.model);
    checks.extend([
        within("memory of its own", own, OVERHEAD, found.anonymous),
        within("pages of the model's files", mapped, Bytes(borders * FAULT_AROUND), found.model),
        within("resident memory", own + mapped, OVERHEAD + program, found.resident),
    ]);
    checks
}

/// The file that holds experts: which disk, and whether all of them are inside.
fn on_disk(path: &Path, table: &crate::exec::loader::ExpertTable, plan: &CheckedPlan) -> Result<Check> {
    let meta = std::fs::metadata(path).map_err(|e| RuntimeError::io("open", path, e))?;
    let file = table.paths().iter().position(|p| p == path);
    let keys = plan.moe_layers().iter().flat_map(|l| (0..plan.num_experts(*l)).map(|expert| ExpertKey { layer: *l, expert }));
    let end = keys
        .flat_map(|k| *table.expert(k))
        .filter(|e| Some(e.file) == file)
        .map(|e| e.offset + e.bytes as u64)
        .max()
        .unwrap_or(0);
    let found = format!("{} on {}", Bytes(meta.len()), disk_of(meta.dev()));
    Ok(check(format!("{}", path.display()), format!("experts up to byte {end}"), found, meta.len() >= end))
}

/// Device and file system with number `dev`, as mounted (proc_pid_mountinfo(5)).
fn disk_of(dev: u64) -> String {
    // The encoding of makedev(3) on Linux.
    let (major, minor) = ((dev >> 8) & 0xfff | (dev >> 32) & !0xfff, dev & 0xff | (dev >> 12) & !0xff);
    let number = format!("{major}:{minor}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let line = mounts.lines().find(|l| l.split(' ').nth(2) == Some(&number));
    let name = line.and_then(|l| {
        let (before, after) = l.split_once(" - ")?;
        let mut after = after.split(' ');
        let kind = after.next()?;
        Some(format!("{} ({kind}, mounted at {})", after.next()?, before.split(' ').nth(4)?))
    });
    name.unwrap_or_else(|| format!("device {number}"))
}
