//! Where each planned byte really is: page by page, against the nodes that the plan names.
//!
//! Pages of host memory are asked for with move_pages(2), which tells and moves nothing when it is given no targets; what a file's map has
//! not touched yet is looked for in the page cache with mincore(2); `/proc/self/numa_maps` (numa(7)), the kernel's own sum over page
//! tables, must agree for the regions that were bound. Memory of a device is what its back-end allocated. A byte counts with its page, so
//! bytes there, elsewhere and absent add up to the plan's to the byte.

use super::Session;
use super::open::slot_memory;
use super::verify::{Check, OVERHEAD};
use crate::exec::loader::SlotBuffer;
use crate::exec::placed::nodes_of;
use crate::exec::slots::PoolMemory;
use crate::hybrid::memory::DeviceLine;
use crate::memory::{NodeRegion, numa, words};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use tierwise_cost::machine::MemoryKind;
use tierwise_cost::units::Bytes;
use tierwise_planner::plan::MemoryBudget;
use tierwise_planner::{CheckedPlan, budget};

/// One use of one memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TierRow {
    /// The plan's name of the memory.
    pub memory: String,
    /// Its kind.
    pub kind: MemoryKind,
    /// What for: a line of the budget.
    pub what: String,
    /// Nodes that the plan names; empty: wherever the system puts it.
    pub nodes: Vec<u32>,
    /// What the plan says.
    pub planned: Bytes,
    /// On the named nodes, or on any if none is named.
    pub there: Bytes,
    /// On other nodes.
    pub elsewhere: Bytes,
    /// Not in this process's memory: never touched, or empty slots.
    pub absent: Bytes,
    /// Bytes by place: `node 0`, `page cache`, ...
    pub found: BTreeMap<String, Bytes>,
    /// Who says so.
    pub source: &'static str,
    /// Whether it is as planned.
    pub ok: bool,
}

/// All uses of all memories.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TierReport {
    /// In the order of the plan's budgets.
    pub rows: Vec<TierRow>,
    /// Cross-checks.
    pub checks: Vec<Check>,
    /// What could not be looked at, and why.
    pub notes: Vec<String>,
}

impl TierReport {
    /// All as planned.
    pub fn ok(&self) -> bool {
        self.rows.iter().all(|r| r.ok) && self.checks.iter().all(|c| c.ok)
    }

    /// What is not as planned, in words.
    pub fn wrong(&self) -> Vec<String> {
        let row = |r: &TierRow| {
            let Bytes(lost) = r.planned.saturating_sub(r.there + r.elsewhere + r.absent);
            format!(
                "{}, {}: {} planned on {}, {} there, {} elsewhere, {} not resident{}",
                r.memory,
                r.what,
                r.planned,
                if r.nodes.is_empty() { "any node".into() } else { words(&r.nodes) },
                r.there,
                r.elsewhere,
                r.absent,
                if lost > 0 { format!(", {} unknown", Bytes(lost)) } else { String::new() }
            )
        };
        let check = |c: &Check| format!("{}: planned {}, found {}", c.name, c.planned, c.found);
        self.rows.iter().filter(|r| !r.ok).map(row).chain(self.checks.iter().filter(|c| !c.ok).map(check)).collect()
    }
}

/// What one look found.
#[derive(Default)]
struct Found {
    by_node: BTreeMap<u32, u64>,
    absent: u64,
    refused: Option<io::Error>,
}

impl Found {
    fn look(&mut self, bytes: &[u8]) {
        let Self { by_node, absent, refused } = self;
        let result = numa::locate(bytes, |node, bytes| match node {
            Some(node) => *by_node.entry(node).or_default() += bytes,
            None => *absent += bytes,
        });
        if let Err(e) = result {
            refused.get_or_insert(e);
        }
    }

    fn sum(&self) -> u64 {
        self.by_node.values().sum()
    }
}

/// Where the bytes of a session are, against its plan. Waits for loads under way.
pub fn tiers(session: &mut Session, plan: &CheckedPlan) -> TierReport {
    session.settle();
    let mut report = TierReport { rows: Vec::new(), checks: Vec::new(), notes: Vec::new() };
    for b in &plan.plan().budgets {
        match b.kind {
            MemoryKind::Dram | MemoryKind::Cxl => host_rows(session, plan, b, &mut report),
            MemoryKind::Vram => report.rows.extend(device_row(session.device_memory().as_deref(), plan, b)),
            MemoryKind::Disk => report.rows.extend(disk_row(session, plan, b, &mut report.notes)),
        }
    }
    numa_maps(session, plan, &mut report);
    report
}

fn host_rows(session: &Session, plan: &CheckedPlan, b: &MemoryBudget, report: &mut TierReport) {
    let experts = b.line(budget::RESIDENT_EXPERTS);
    if experts.0 > 0 {
        let mut found = Found::default();
        let mut untouched = 0;
        for bytes in experts_in(session, plan, &b.memory) {
            let absent = found.absent;
            found.look(bytes);
            if found.absent > absent && b.numa_nodes.is_empty() {
                // Of a part that was touched the cache holds at least as much.
                untouched += numa::cached(bytes).unwrap_or(0).saturating_sub(bytes.len() as u64 - (found.absent - absent));
            }
        }
        // Experts on named nodes were copied there, so all are in memory; those of a map come when they are first wanted.
        let complete = b.numa_nodes.is_empty() || found.absent == 0;
        let mut row = host_row(b, budget::RESIDENT_EXPERTS, experts, &found, report);
        row.ok &= complete;
        if untouched > 0 {
            row.found.insert("page cache, not touched".into(), Bytes(untouched));
        }
        report.rows.push(row);
    }
    let slots = b.line(budget::EXPERT_CACHE);
    if slots.0 > 0 {
        let mut found = Found::default();
        let (mut held, mut on_host) = (0, false);
        for &layer in plan.moe_layers() {
            if plan.slots(layer) == 0 || slot_memory(plan, plan.pool_of(layer) as usize) != Some(b.memory.as_str()) {
                continue;
            }
            for (slot, expert) in session.driver.engine().resident_slots(layer) {
                if session.driver.slots().device_place(slot).is_none() {
                    on_host = true;
                    let e = session.driver.slots().expert(tierwise_planner::engine::ExpertKey { layer, expert }, slot);
                    for matrix in [e.gate, e.up, e.down] {
                        held += matrix.bytes.len() as u64;
                        found.look(matrix.bytes);
                    }
                }
            }
        }
        if on_host || session.driver.slots().pools().iter().any(|p| matches!(p, PoolMemory::Host(s) if s.held().next().is_some()))
        {
            // A slot may be of a larger expert's size; empty ones hold nothing.
            found.absent += slots.0.saturating_sub(held);
            let row = host_row(b, budget::EXPERT_CACHE, slots, &found, report);
            report.rows.push(row);
        }
    }
    if plan.plan().main.memory == b.memory && session.device().is_none() {
        let mut found = Found::default();
        session.model.non_expert_bytes().for_each(|bytes| found.look(bytes));
        let row = host_row(b, budget::NON_EXPERT_WEIGHTS, b.line(budget::NON_EXPERT_WEIGHTS), &found, report);
        report.rows.push(row);
    }
}

/// The matrices of all experts that are at home in a memory.
fn experts_in<'s>(session: &'s Session, plan: &'s CheckedPlan, memory: &'s str) -> impl Iterator<Item = &'s [u8]> {
    plan.moe_layers().iter().flat_map(move |layer| {
        let tensors = session.model.expert_tensors(*layer);
        let here = move |e: &u32| plan.tier(plan.tier_of(*layer, *e)).memory == memory;
        (0..plan.num_experts(*layer))
            .filter(here)
            .filter_map(move |e| Some(session.model.expert(tensors?, e)))
            .flat_map(|e| [e.gate.bytes, e.up.bytes, e.down.bytes])
    })
}

fn host_row(b: &MemoryBudget, what: &str, planned: Bytes, found: &Found, report: &mut TierReport) -> TierRow {
    let named = |node: &u32| b.numa_nodes.is_empty() || b.numa_nodes.contains(node);
    let there = found.by_node.iter().filter(|(n, _)| named(n)).map(|(_, bytes)| bytes).sum();
    let elsewhere = found.sum() - there;
    if let Some(e) = &found.refused {
        let note = format!("where pages are is unknown: move_pages is refused ({e}); containers need CAP_SYS_NICE for it");
        if !report.notes.contains(&note) {
            report.notes.push(note);
        }
    }
    // Without named nodes the plan promises nothing that a refusal could hide.
    let accounted = found.sum() + found.absent == planned.0;
    let ok = elsewhere == 0 && if found.refused.is_some() { b.numa_nodes.is_empty() } else { accounted };
    let mut by_place: BTreeMap<String, Bytes> = found.by_node.iter().map(|(n, b)| (format!("node {n}"), Bytes(*b))).collect();
    if found.absent > 0 {
        by_place.insert("not resident".into(), Bytes(found.absent));
    }
    TierRow {
        memory: b.memory.clone(),
        kind: b.kind,
        what: what.into(),
        nodes: b.numa_nodes.clone(),
        planned,
        there: Bytes(there),
        elsewhere: Bytes(elsewhere),
        absent: Bytes(found.absent),
        found: by_place,
        source: "move_pages",
        ok,
    }
}

/// The device's whole budget against what its back-end allocated.
fn device_row(lines: Option<&[DeviceLine]>, plan: &CheckedPlan, b: &MemoryBudget) -> Option<TierRow> {
    let lines = lines.filter(|_| plan.plan().main.memory == b.memory)?;
    let sum = |f: fn(&DeviceLine) -> Bytes| lines.iter().map(f).sum::<Bytes>();
    let (planned, there) = (sum(|l| l.planned), sum(|l| l.allocated));
    Some(TierRow {
        memory: b.memory.clone(),
        kind: b.kind,
        what: "all lines".into(),
        nodes: Vec::new(),
        planned,
        there,
        elsewhere: Bytes::ZERO,
        absent: planned.saturating_sub(there),
        found: BTreeMap::from([("device".to_string(), there)]),
        source: "the back-end's allocator",
        ok: there <= b.capacity,
    })
}

/// Experts on disk: how many of their bytes the page cache holds, which is memory outside the plan.
fn disk_row(session: &Session, plan: &CheckedPlan, b: &MemoryBudget, notes: &mut Vec<String>) -> Option<TierRow> {
    let planned = b.line(budget::RESIDENT_EXPERTS);
    if planned.0 == 0 {
        return None;
    }
    let (mut all, mut cached, mut refused) = (0, 0, None);
    for bytes in experts_in(session, plan, &b.memory) {
        all += bytes.len() as u64;
        match numa::cached(bytes) {
            Ok(there) => cached += there,
            Err(e) => refused = Some(e),
        }
    }
    if let Some(e) = refused {
        notes.push(format!("what the page cache holds is unknown: mincore is refused ({e})"));
    }
    Some(TierRow {
        memory: b.memory.clone(),
        kind: b.kind,
        what: budget::RESIDENT_EXPERTS.into(),
        nodes: Vec::new(),
        planned,
        there: Bytes(all),
        elsewhere: Bytes::ZERO,
        absent: Bytes::ZERO,
        found: BTreeMap::from([("files".to_string(), Bytes(all)), ("page cache".to_string(), Bytes(cached))]),
        source: "mincore",
        ok: all == planned.0,
    })
}

/// A line of `/proc/self/numa_maps`: where the range begins, its policy, whether it is memory of the process's own, bytes by node.
#[derive(Debug, PartialEq, Eq)]
struct MapsLine {
    start: usize,
    own: bool,
    by_node: BTreeMap<u32, u64>,
}

/// Lines in the order of their addresses. A policy may contain spaces (`weighted interleave:1-2`), so fields are known by their names.
fn parse_numa_maps(text: &str) -> Vec<MapsLine> {
    let line = |l: &str| {
        let (start, rest) = l.split_once(' ')?;
        let start = usize::from_str_radix(start, 16).ok()?;
        let field =
            |name: &str| rest.split_whitespace().find_map(|w| w.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok());
        let page = field("kernelpagesize_kB").unwrap_or(4) * 1024;
        let by_node = rest.split_whitespace().filter_map(|w| {
            let (node, pages) = w.strip_prefix('N')?.split_once('=')?;
            Some((node.parse().ok()?, pages.parse::<u64>().ok()? * page))
        });
        Some(MapsLine { start, own: field("anon").is_some(), by_node: by_node.collect() })
    };
    let mut lines: Vec<MapsLine> = text.lines().filter_map(line).collect();
    lines.sort_by_key(|l| l.start);
    lines
}

/// Indices of the lines that hold a range of addresses: that in which it begins, and those that begin inside it.
fn lines_of(lines: &[MapsLine], range: &std::ops::Range<usize>) -> std::ops::Range<usize> {
    let first = lines.partition_point(|l| l.start <= range.start).saturating_sub(1);
    first..lines.partition_point(|l| l.start < range.end)
}

/// Bytes by node, in words.
fn by_node_words(by_node: &BTreeMap<u32, u64>) -> String {
    let parts: Vec<String> = by_node.iter().filter(|(_, b)| **b > 0).map(|(n, b)| format!("node {n}: {b} B")).collect();
    if parts.is_empty() { "nothing".into() } else { parts.join(", ") }
}

/// The kernel's own sums: of regions that were bound, and of what else the process has.
fn numa_maps(session: &Session, plan: &CheckedPlan, report: &mut TierReport) {
    let regions: Vec<&NodeRegion> = bound_regions(session).collect();
    if regions.is_empty() {
        return;
    }
    let mut asked: BTreeMap<u32, u64> = BTreeMap::new();
    let page = numa::page_bytes() as u64;
    for region in &regions {
        // Refusals are noted with the rows.
        let _ = numa::locate(region.as_slice(), |node, _| {
            if let Some(node) = node {
                *asked.entry(node).or_default() += page;
            }
        });
    }
    let Ok(text) = std::fs::read_to_string("/proc/self/numa_maps") else {
        report.notes.push("/proc/self/numa_maps is not there: pages were asked for one by one only".into());
        return;
    };
    let lines = parse_numa_maps(&text);
    let ours: BTreeSet<usize> = regions
        .iter()
        .flat_map(|r| {
            let range = r.as_slice().as_ptr_range();
            lines_of(&lines, &(range.start as usize..range.end as usize))
        })
        .collect();
    let sum = |keep: &dyn Fn(usize) -> bool| {
        let mut sum: BTreeMap<u32, u64> = BTreeMap::new();
        for (_, line) in lines.iter().enumerate().filter(|(i, _)| keep(*i)) {
            line.by_node.iter().for_each(|(n, b)| *sum.entry(*n).or_default() += b);
        }
        sum
    };
    let counted = sum(&|i| ours.contains(&i));
    report.checks.push(Check {
        name: "bound regions in numa_maps".into(),
        planned: by_node_words(&asked),
        found: by_node_words(&counted),
        ok: asked == counted,
    });
    // Keys and values, activations, heap: preferred on the main memory's nodes. What was there before the preference may be elsewhere.
    let home = nodes_of(plan, &plan.plan().main.memory);
    if !home.is_empty() {
        let others = sum(&|i| lines[i].own && !ours.contains(&i));
        let elsewhere: u64 = others.iter().filter(|(n, _)| !home.contains(n)).map(|(_, b)| b).sum();
        report.checks.push(Check {
            name: "other memory of the process".into(),
            planned: format!("{}, at most {OVERHEAD} elsewhere", words(home)),
            found: by_node_words(&others),
            ok: elsewhere <= OVERHEAD.0,
        });
    }
}

/// Experts' homes and slots on named nodes.
fn bound_regions(session: &Session) -> impl Iterator<Item = &NodeRegion> {
    let homes = session.model.placed().into_iter().flat_map(|p| p.regions().iter().map(|r| &r.region));
    let slots = session.driver.slots().pools().iter().filter_map(|p| match p {
        PoolMemory::Host(slots) => Some(slots.held()),
        PoolMemory::Device(_) => None,
    });
    homes.chain(slots.flatten().filter_map(SlotBuffer::region))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "7f10000000 bind:1 anon=3 dirty=3 N1=3 kernelpagesize_kB=4\n\
                        7f20000000 weighted interleave:1-2 anon=5 dirty=5 active=0 N1=3 N2=2 kernelpagesize_kB=4\n\
                        7f30000000 bind:2 file=/anon_hugepage\\040(deleted) huge anon=2 dirty=2 N2=2 kernelpagesize_kB=2048\n\
                        7f05000000 prefer:0 file=/models/a.gguf mapped=7 N0=7 kernelpagesize_kB=4\n\
                        7f40000000 default\n";

    fn budget_of(kind: MemoryKind, nodes: &[u32]) -> MemoryBudget {
        let numa_nodes = nodes.to_vec();
        MemoryBudget {
            memory: "cxl0".into(),
            kind,
            capacity: Bytes(100),
            lines: Vec::new(),
            page_locked: Bytes::ZERO,
            numa_nodes,
        }
    }

    fn row(nodes: &[u32], planned: u64, by_node: &[(u32, u64)], absent: u64, refused: bool) -> (TierRow, TierReport) {
        let mut report = TierReport { rows: Vec::new(), checks: Vec::new(), notes: Vec::new() };
        let refused = refused.then(|| io::Error::from_raw_os_error(libc::EPERM));
        let found = Found { by_node: by_node.iter().copied().collect(), absent, refused };
        let row = host_row(&budget_of(MemoryKind::Cxl, nodes), budget::RESIDENT_EXPERTS, Bytes(planned), &found, &mut report);
        report.rows.push(row.clone());
        (row, report)
    }

    #[test]
    fn bytes_elsewhere_or_unaccounted_are_wrong() {
        assert!(row(&[1], 15, &[(1, 15)], 0, false).0.ok);
        assert!(row(&[1, 2], 15, &[(1, 5), (2, 10)], 0, false).0.ok, "striped");
        assert!(row(&[], 15, &[(0, 5), (7, 4)], 6, false).0.ok, "no node is named");
        let (wrong, report) = row(&[1], 15, &[(0, 5), (1, 10)], 0, false);
        assert!(!wrong.ok && !report.ok() && (wrong.there, wrong.elsewhere) == (Bytes(10), Bytes(5)));
        let words = report.wrong().join("");
        assert!(words.contains("cxl0") && words.contains("node 1") && words.contains("5 B elsewhere"), "{words}");
        let (lost, report) = row(&[1], 15, &[(1, 14)], 0, false);
        assert!(!lost.ok && report.wrong()[0].contains("1 B unknown"), "{:?}", report.wrong());
        // Refused to look: wrong if a node was promised, and said in either case.
        let (promised, report) = row(&[1], 15, &[], 0, true);
        assert!(!promised.ok && report.notes[0].contains("move_pages is refused"), "{:?}", report.notes);
        assert!(row(&[], 15, &[], 0, true).0.ok);
    }

    #[test]
    fn numa_maps_are_read_by_fields() {
        let lines = parse_numa_maps(MAPS);
        assert_eq!(
            lines.iter().map(|l| l.start).collect::<Vec<_>>(),
            [0x7f05000000, 0x7f10000000, 0x7f20000000, 0x7f30000000, 0x7f40000000]
        );
        assert_eq!(lines[2].by_node, BTreeMap::from([(1, 3 * 4096), (2, 2 * 4096)]));
        assert_eq!(lines[3].by_node, BTreeMap::from([(2, 4 << 20)]), "pages of 2 MiB");
        assert_eq!(lines.iter().map(|l| l.own).collect::<Vec<_>>(), [false, true, true, true, false]);
        // A region may begin inside a line (ranges with one policy are merged) and may be split over several.
        assert_eq!(lines_of(&lines, &(0x7f10001000..0x7f10002000)), 1..2);
        assert_eq!(lines_of(&lines, &(0x7f10001000..0x7f20000001)), 1..3);
        assert_eq!(lines_of(&lines, &(0x7f20000000..0x7f30000000)), 2..3);
        assert!(parse_numa_maps("nonsense\n\nxyz default\n").is_empty());
    }
}
