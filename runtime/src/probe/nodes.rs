//! Memory nodes of a machine as the kernel describes them: NUMA nodes, their rated speed, CXL devices, which node a GPU hangs on.
//!
//! A parser over a root folder, so that tests bring trees of their own. Files: `/sys/devices/system/node` (Linux documentation,
//! admin-guide/mm/numaperf), `/proc/zoneinfo`, `/sys/devices/virtual/memory_tiering`, `/sys/bus/cxl`, `/sys/bus/dax`
//! (testing/sysfs-bus-cxl, sysfs-bus-dax), `/sys/bus/pci`, control groups. Anything may be missing: kernels without NUMA, containers that
//! hide nodes, numbers with holes. What is not known is absent, and a note says what could not be read.

mod devices;

pub use devices::{CxlDevice, CxlRegion, DaxDevice, PciGpu};

use super::host;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use tierwise_cost::units::{Bytes, BytesPerS};

/// What a node is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeKind {
    /// Processors with memory beside them.
    #[default]
    Local,
    /// Processors without memory.
    NoMemory,
    /// Memory behind a CXL device.
    Cxl,
    /// Memory without processors that the firmware rates no faster than processors' own: CXL, persistent memory, another host's.
    Far,
    /// Memory without processors that the firmware rates faster than processors' own: HBM in the package, or a GPU's.
    Fast,
}

impl NodeKind {
    /// Name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::NoMemory => "no memory",
            Self::Cxl => "CXL",
            Self::Far => "no processors",
            Self::Fast => "no processors, fast",
        }
    }

    /// Memory that is planned as CXL memory.
    pub const fn is_far(self) -> bool {
        matches!(self, Self::Cxl | Self::Far)
    }
}

/// What the firmware says of reads by the nearest processors (ACPI HMAT, or CDAT of a CXL device).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rated {
    /// Bandwidth.
    pub read_bandwidth: Option<BytesPerS>,
    /// Of writes.
    pub write_bandwidth: Option<BytesPerS>,
    /// Latency in nanoseconds.
    pub read_latency_ns: Option<u64>,
    /// Of writes.
    pub write_latency_ns: Option<u64>,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Node {
    /// The system's number.
    pub number: u32,
    /// What it is good for.
    pub kind: NodeKind,
    /// Hardware threads beside it.
    pub cpus: Vec<u32>,
    /// Memory.
    pub total: Bytes,
    /// Unused memory.
    pub free: Bytes,
    /// Memory that holds copies of files and can be dropped.
    pub page_cache: Bytes,
    /// Memory in the movable zone, where only pages lie that the system can move away: that of hot-plugged nodes.
    pub movable: Option<Bytes>,
    /// Huge pages of 2 MiB set aside and not used.
    pub free_huge_pages: Option<u64>,
    /// ACPI SLIT distance to other nodes by number; 10 is a node to itself.
    pub distances: BTreeMap<u32, u32>,
    /// The firmware's figures.
    pub rated: Option<Rated>,
    /// The kernel's memory tier: higher numbers are slower.
    pub tier: Option<u32>,
    /// This process may take memory from it.
    pub allowed: bool,
}

impl Node {
    /// What can be had: unused memory and page cache.
    pub fn available(&self) -> Bytes {
        self.free + self.page_cache
    }
}

/// All nodes, and the devices behind them.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Nodes {
    /// Ascending by number. Never empty when read: a kernel without NUMA has node 0.
    pub nodes: Vec<Node>,
    /// CXL memory devices.
    pub cxl: Vec<CxlDevice>,
    /// CXL regions: ranges over one or several devices.
    pub regions: Vec<CxlRegion>,
    /// DAX devices: memory that is a file, or that a driver has made a node.
    pub dax: Vec<DaxDevice>,
    /// Graphics processors and the node that each hangs on.
    pub gpus: Vec<PciGpu>,
    /// The tightest limit of control groups on memory, and what is left of it.
    pub memory_limit: Option<(Bytes, Bytes)>,
    /// What could not be read or was assumed.
    pub notes: Vec<String>,
}

impl Nodes {
    /// Those of this machine, now.
    pub fn of_this_machine() -> Self {
        Self::read(Path::new("/"), crate::memory::numa::page_bytes() as u64)
    }

    /// Those below `root`, which stands for `/`. `page_bytes` is the size in which `/proc/zoneinfo` counts.
    pub fn read(root: &Path, page_bytes: u64) -> Self {
        let mut notes = Vec::new();
        let mut nodes = numa_nodes(root, page_bytes, &mut notes);
        let dax = devices::dax(root);
        classify(&mut nodes, &dax);
        let cgroup = text(root, "proc/self/cgroup").unwrap_or_default();
        let limits = host::cgroup_limits(&root.join("sys/fs/cgroup"), &cgroup);
        let total: u64 = nodes.iter().map(|n| n.total.0).sum();
        let memory_limit = limits
            .into_iter()
            .filter(|(limit, _)| *limit < total)
            .map(|(limit, used)| (Bytes(limit), Bytes(limit.saturating_sub(used))))
            .min_by_key(|l| l.0);
        let (cxl, regions) = devices::cxl(root);
        Self { nodes, cxl, regions, dax, gpus: devices::gpus(root), memory_limit, notes }
    }

    /// Nodes with memory that this process may use.
    pub fn usable(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|n| n.allowed && n.total.0 > 0)
    }

    /// Usable nodes without processors that are planned as CXL memory.
    pub fn far(&self) -> impl Iterator<Item = &Node> {
        self.usable().filter(|n| n.kind.is_far())
    }

    /// `node 0 (16 GiB, 12 GiB free), node 2 (...)`.
    pub fn words(&self) -> String {
        let list: Vec<String> =
            self.usable().map(|n| format!("node {} ({}, {} free)", n.number, n.total, n.available())).collect();
        if list.is_empty() { "none".into() } else { list.join(", ") }
    }
}

/// The trimmed text of a file below `root`.
fn text(root: &Path, path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(root.join(path)).ok().map(|t| t.trim().to_string())
}

/// Decimal, or hexadecimal with `0x`.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Numbers more than this in a list are no list of nodes or processors.
const MOST_IN_LIST: u32 = 1 << 16;

/// `0-3,8` to its numbers; `None` when it is something else.
pub(super) fn parse_list(text: &str) -> Option<Vec<u32>> {
    let mut list = Vec::new();
    for part in text.trim().split(',').filter(|p| !p.trim().is_empty()) {
        let (first, last) = part.trim().split_once('-').unwrap_or((part.trim(), part.trim()));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if last < first || last - first >= MOST_IN_LIST {
            return None;
        }
        list.extend(first..=last);
    }
    Some(list)
}

/// The entries of a folder whose names are `prefix` and a number, ascending by it.
fn numbered(folder: &Path, prefix: &str) -> Option<Vec<u32>> {
    let entries = std::fs::read_dir(folder).ok()?;
    let name = |e: std::fs::DirEntry| e.file_name().to_string_lossy().strip_prefix(prefix).and_then(|n| n.parse().ok());
    let mut found: Vec<u32> = entries.flatten().filter_map(name).collect();
    found.sort_unstable();
    Some(found)
}

fn numa_nodes(root: &Path, page_bytes: u64, notes: &mut Vec<String>) -> Vec<Node> {
    const FOLDER: &str = "sys/devices/system/node";
    let folder = root.join(FOLDER);
    let allowed = allowed_nodes(root);
    let numbers = numbered(&folder, "node").unwrap_or_default();
    if numbers.is_empty() {
        notes.push(format!("/{FOLDER} has no nodes or is hidden: all memory is treated as node 0"));
        return vec![whole_machine(root)];
    }
    let online =
        text(&folder, "online").and_then(|t| parse_list(&t)).filter(|l| !l.is_empty()).unwrap_or_else(|| numbers.clone());
    let movable = text(root, "proc/zoneinfo").map(|t| parse_movable(&t, page_bytes));
    let tiers = memory_tiers(root);
    let mut unreadable = Vec::new();
    let mut nodes = Vec::with_capacity(numbers.len());
    for number in numbers {
        let own = folder.join(format!("node{number}"));
        let Some(meminfo) = text(&own, "meminfo") else {
            unreadable.push(number.to_string());
            continue;
        };
        let kib = |key: &str| parse_node_meminfo(&meminfo, key);
        let distances = text(&own, "distance").unwrap_or_default();
        // The kernel prints a distance for every node that is online, in order: with holes in the numbers, columns are not numbers.
        let distances = online.iter().copied().zip(distances.split_whitespace().filter_map(|d| d.parse().ok())).collect();
        let cpus = text(&own, "cpulist").and_then(|t| parse_list(&t)).unwrap_or_default();
        nodes.push(Node {
            number,
            kind: NodeKind::default(),
            cpus,
            total: kib("MemTotal").unwrap_or_default(),
            free: kib("MemFree").unwrap_or_default(),
            page_cache: kib("Active(file)").unwrap_or_default() + kib("Inactive(file)").unwrap_or_default(),
            movable: movable.as_ref().map(|m| m.get(&number).copied().unwrap_or_default()),
            free_huge_pages: text(&own, "hugepages/hugepages-2048kB/free_hugepages").and_then(|t| t.parse().ok()),
            distances,
            rated: rated(&own),
            tier: tiers.iter().find(|(_, of)| of.contains(&number)).map(|(tier, _)| *tier),
            allowed: allowed.as_ref().is_none_or(|a| a.contains(&number)),
        });
    }
    if !unreadable.is_empty() {
        notes.push(format!("node {} cannot be read (a container may hide it): left out", unreadable.join(", ")));
    }
    if nodes.is_empty() {
        notes.push("no node can be read: all memory is treated as node 0".into());
        return vec![whole_machine(root)];
    }
    let barred: Vec<String> = nodes.iter().filter(|n| !n.allowed).map(|n| n.number.to_string()).collect();
    if !barred.is_empty() {
        notes.push(format!("node {} is not allowed to this process (cpuset)", barred.join(", ")));
    }
    nodes
}

/// Where there are no nodes: one with everything.
fn whole_machine(root: &Path) -> Node {
    let meminfo = text(root, "proc/meminfo").unwrap_or_default();
    let field = |key: &str| {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024).map(Bytes)
    };
    Node {
        total: field("MemTotal").unwrap_or_default(),
        free: field("MemFree").unwrap_or_default(),
        page_cache: field("Active(file)").unwrap_or_default() + field("Inactive(file)").unwrap_or_default(),
        allowed: true,
        ..Node::default()
    }
}

/// Nodes from which this process may take memory: the kernel's word, else that of its control group.
fn allowed_nodes(root: &Path) -> Option<Vec<u32>> {
    let status = text(root, "proc/self/status").unwrap_or_default();
    if let Some(list) = status.lines().find_map(|l| l.strip_prefix("Mems_allowed_list:")) {
        return parse_list(list);
    }
    let groups = text(root, "proc/self/cgroup").unwrap_or_default();
    groups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?.trim_start_matches('/'));
        let mems = |folder: String, file: &str| parse_list(&text(root, format!("{folder}/{file}"))?).filter(|l| !l.is_empty());
        if id == "0" && controllers.is_empty() {
            mems(format!("sys/fs/cgroup/{path}"), "cpuset.mems.effective")
        } else if controllers.split(',').any(|c| c == "cpuset") {
            mems(format!("sys/fs/cgroup/cpuset/{path}"), "cpuset.effective_mems")
        } else {
            None
        }
    })
}

/// `Node 1 MemTotal:  1234 kB`
fn parse_node_meminfo(text: &str, key: &str) -> Option<Bytes> {
    let value = |l: &str| {
        let (name, value) = l.split_once(':')?;
        (name.split_whitespace().last() == Some(key)).then(|| value.trim().trim_end_matches("kB").trim().parse::<u64>().ok())?
    };
    text.lines().find_map(value)?.checked_mul(1024).map(Bytes)
}

/// Managed bytes of the movable zone by node.
fn parse_movable(zoneinfo: &str, page_bytes: u64) -> BTreeMap<u32, Bytes> {
    let mut movable: BTreeMap<u32, Bytes> = BTreeMap::new();
    let mut at: Option<u32> = None;
    for line in zoneinfo.lines() {
        if let Some((node, zone)) = line.strip_prefix("Node ").and_then(|l| l.split_once(", zone")) {
            at = node.trim().parse().ok().filter(|_| zone.trim() == "Movable");
        } else if let (Some(node), Some(pages)) = (at, line.trim().strip_prefix("managed ")) {
            let bytes = pages.trim().parse::<u64>().ok().and_then(|p| p.checked_mul(page_bytes)).unwrap_or(0);
            *movable.entry(node).or_default() += Bytes(bytes);
        }
    }
    movable
}

/// The firmware's figures: of accesses by processors (`access1`) where the kernel tells them from those by any initiator.
fn rated(node: &Path) -> Option<Rated> {
    ["access1", "access0"].iter().find_map(|class| {
        let value = |name: &str| number(&text(node, format!("{class}/initiators/{name}"))?).filter(|n| *n > 0);
        let rate = |name: &str| value(name).map(|mib| BytesPerS(mib as f64 * 1_048_576.0));
        let rated = Rated {
            read_bandwidth: rate("read_bandwidth"),
            write_bandwidth: rate("write_bandwidth"),
            read_latency_ns: value("read_latency"),
            write_latency_ns: value("write_latency"),
        };
        (rated.read_bandwidth.is_some() || rated.read_latency_ns.is_some()).then_some(rated)
    })
}

/// The kernel's tiers with their nodes.
fn memory_tiers(root: &Path) -> Vec<(u32, Vec<u32>)> {
    let folder = root.join("sys/devices/virtual/memory_tiering");
    let nodes = |tier: u32| {
        let own = folder.join(format!("memory_tier{tier}"));
        let list = text(&own, "nodelist").or_else(|| text(&own, "nodes"))?;
        Some((tier, parse_list(&list)?))
    };
    numbered(&folder, "memory_tier").unwrap_or_default().into_iter().filter_map(nodes).collect()
}

/// A node without processors is CXL memory if a CXL region's DAX device is it; the firmware's figures tell fast memory from far one.
fn classify(nodes: &mut [Node], dax: &[DaxDevice]) {
    let local = nodes.iter().filter(|n| !n.cpus.is_empty());
    let local_rate = local.filter_map(|n| n.rated?.read_bandwidth).map(|r| r.0).fold(0.0, f64::max);
    // A machine whose processors' nodes cannot be read has no far memory to speak of.
    let has_local = nodes.iter().any(|n| !n.cpus.is_empty());
    for node in nodes {
        let behind_cxl = dax.iter().any(|d| d.behind_cxl && d.target_node == Some(node.number));
        let rate = node.rated.and_then(|r| r.read_bandwidth).map_or(0.0, |r| r.0);
        node.kind = match (node.cpus.is_empty(), node.total.0 > 0) {
            (_, false) => NodeKind::NoMemory,
            (false, true) => NodeKind::Local,
            (true, true) if behind_cxl => NodeKind::Cxl,
            (true, true) if !has_local => NodeKind::Local,
            (true, true) if local_rate > 0.0 && rate > 1.2 * local_rate => NodeKind::Fast,
            (true, true) => NodeKind::Far,
        };
    }
}

#[cfg(test)]
mod tests;
