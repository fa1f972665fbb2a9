//! Host memory by node: regions whose pages come from the NUMA nodes that a plan names, with the page size that was asked for.
//!
//! A region is an anonymous map, bound before its first page is touched (mbind(2)), so that no page has to be moved afterwards. One node:
//! strictly there (`MPOL_BIND`). Several: striped, by the system's weights where the kernel has them. The kernel may put pages of a
//! striped region elsewhere when a node is full; `verify` asks where they are.

pub mod numa;

use crate::error::{Result, RuntimeError};
use crate::probe::nodes::Nodes;
use memmap2::{Advice, MmapMut, MmapOptions};
use numa::Spread;
use std::io;
use tierwise_cost::units::Bytes;

/// Bytes of a huge page that is asked for by name.
pub const HUGE_BYTES: usize = 2 << 20;

/// The pages of memory that the program allocates for weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PageSize {
    /// As the system gives them.
    #[default]
    System,
    /// Huge ones as far as the system finds some (madvise(2), `MADV_HUGEPAGE`).
    Transparent,
    /// Huge ones that the administrator has set aside (`MAP_HUGETLB`, 2 MiB), or an error.
    Hugetlb,
}

impl PageSize {
    /// Name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::System => "ordinary pages",
            Self::Transparent => "transparent huge pages",
            Self::Hugetlb => "huge pages set aside",
        }
    }

    /// What a region of `bytes` takes.
    pub const fn rounded(self, bytes: usize) -> usize {
        match self {
            Self::Hugetlb => bytes.next_multiple_of(HUGE_BYTES),
            Self::System | Self::Transparent => bytes,
        }
    }
}

/// An anonymous map of `bytes` with these pages, not bound and not touched.
///
/// # Errors
/// The system's reason.
pub fn anonymous(bytes: usize, pages: PageSize) -> io::Result<MmapMut> {
    match pages {
        PageSize::System => MmapMut::map_anon(bytes),
        PageSize::Transparent => {
            let map = MmapMut::map_anon(bytes)?;
            // Refused where the kernel has no huge pages: the map then has small ones, and reports say so.
            let _ = map.advise(Advice::HugePage);
            Ok(map)
        }
        PageSize::Hugetlb => MmapOptions::new().len(pages.rounded(bytes)).huge(Some(HUGE_BYTES.ilog2() as u8)).map_anon(),
    }
}

/// Memory on chosen nodes.
#[derive(Debug)]
pub struct NodeRegion {
    map: MmapMut,
    nodes: Vec<u32>,
    spread: Spread,
}

impl NodeRegion {
    /// `bytes` zeros on `nodes`, of which none is touched yet. [`check_nodes`] and [`check_room`] are the caller's to call first.
    ///
    /// # Errors
    /// When the system refuses the memory or its place, with the nodes that there are.
    pub fn new(bytes: usize, nodes: &[u32], pages: PageSize) -> Result<Self> {
        let mut map = anonymous(bytes, pages).map_err(|e| refused(bytes, nodes, pages, &e))?;
        let mut spread = if nodes.len() == 1 { Spread::Bind } else { Spread::WeightedInterleave };
        let mut bound = numa::bind(&mut map, nodes, spread);
        if spread == Spread::WeightedInterleave && bound.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)) {
            spread = Spread::Interleave;
            bound = numa::bind(&mut map, nodes, spread);
        }
        bound.map_err(|e| refused(bytes, nodes, pages, &e))?;
        Ok(Self { map, nodes: nodes.to_vec(), spread })
    }

    /// The nodes.
    pub fn nodes(&self) -> &[u32] {
        &self.nodes
    }

    /// How pages are spread over them.
    pub const fn spread(&self) -> Spread {
        self.spread
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.map
    }

    /// The bytes.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.map
    }
}

fn refused(bytes: usize, nodes: &[u32], pages: PageSize, source: &io::Error) -> RuntimeError {
    let hint = match (source.raw_os_error(), pages) {
        (Some(libc::ENOMEM), PageSize::Hugetlb) => {
            "huge pages set aside: echo N > /sys/devices/system/node/nodeX/hugepages/hugepages-2048kB/nr_hugepages, or --weights huge"
                .to_string()
        }
        (Some(libc::EPERM), _) => {
            "a process that may call mbind: containers forbid it without CAP_SYS_NICE; or a machine file without numa_nodes".into()
        }
        (Some(libc::ENOSYS), _) => "a kernel with NUMA, or a machine file without numa_nodes".into(),
        _ => format!("nodes of this machine: {}", Nodes::of_this_machine().words()),
    };
    RuntimeError::BadRequest {
        what: "memory on a node",
        found: format!("{} as {} on {} refused ({source})", Bytes(bytes as u64), pages.name(), words(nodes)),
        expected: hint,
    }
}

/// `node 1` or `nodes 1, 2`.
pub fn words(nodes: &[u32]) -> String {
    let numbers: Vec<String> = nodes.iter().map(u32::to_string).collect();
    format!("node{} {}", if nodes.len() == 1 { "" } else { "s" }, numbers.join(", "))
}

/// What a memory of the plan is going to take of its nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// The plan's name of the memory.
    pub memory: String,
    /// Its nodes; not empty.
    pub nodes: Vec<u32>,
    /// Bytes in all, spread evenly.
    pub bytes: u64,
}

/// Refuses nodes that are not there, have no memory or are not allowed to this process.
///
/// # Errors
/// [`RuntimeError::BadRequest`] with the memory, its nodes and those that there are.
pub fn check_nodes(needs: &[Need], there: &Nodes) -> Result<()> {
    for need in needs {
        let absent = need.nodes.iter().find(|n| !there.usable().any(|u| u.number == **n));
        if let Some(node) = absent {
            return Err(RuntimeError::BadRequest {
                what: "plan",
                found: format!("{} on node {node}", need.memory),
                expected: format!(
                    "one of the nodes with memory that this process may use: {}; correct numa_nodes in the machine's description",
                    there.words()
                ),
            });
        }
    }
    Ok(())
}

/// Refuses more than the nodes have free, before anything is loaded. Page cache counts as free: the system drops it.
///
/// # Errors
/// [`RuntimeError::BadRequest`] with the node and its free bytes.
pub fn check_room(needs: &[Need], there: &Nodes, pages: PageSize) -> Result<()> {
    for node in there.usable() {
        let of_node: Vec<(&Need, u64)> = needs
            .iter()
            .filter(|n| n.nodes.contains(&node.number))
            .map(|n| (n, n.bytes.div_ceil(n.nodes.len() as u64)))
            .collect();
        let needed: u64 = of_node.iter().map(|n| n.1).sum();
        let (free, of_what) = match pages {
            PageSize::Hugetlb => {
                (node.free_huge_pages.unwrap_or(0).saturating_mul(HUGE_BYTES as u64), "in free huge pages of 2 MiB")
            }
            PageSize::System | PageSize::Transparent => (node.available().0, "free"),
        };
        if needed > free {
            let memories: Vec<&str> = of_node.iter().map(|n| n.0.memory.as_str()).collect();
            let detail = match pages {
                PageSize::Hugetlb => String::new(),
                _ => format!(" ({} unused, {} of page cache that can be dropped, of {})", node.free, node.page_cache, node.total),
            };
            return Err(RuntimeError::BadRequest {
                what: "plan",
                found: format!("{} of {} for node {}", Bytes(needed), memories.join(" and "), node.number),
                expected: format!(
                    "at most the {} {of_what} on node {}{detail}: a smaller --cxl or --ram, or free memory there",
                    Bytes(free),
                    node.number
                ),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::nodes::Node;

    fn node(number: u32, free: u64, page_cache: u64) -> Node {
        Node { number, total: Bytes(1 << 30), free: Bytes(free), page_cache: Bytes(page_cache), allowed: true, ..Node::default() }
    }

    fn need(memory: &str, nodes: &[u32], bytes: u64) -> Need {
        Need { memory: memory.into(), nodes: nodes.to_vec(), bytes }
    }

    #[test]
    fn budgets_beyond_a_node_are_refused_with_its_free_bytes() {
        let there = Nodes { nodes: vec![node(0, 1000, 500), node(2, 1 << 20, 0)], ..Nodes::default() };
        let check = |needs: &[Need]| check_room(needs, &there, PageSize::System).map_err(|e| e.to_string());
        check(&[need("dram0", &[0], 1500)]).expect("page cache is free");
        let message = check(&[need("dram0", &[0], 1501)]).expect_err("a byte too much");
        assert!(message.contains("for node 0") && message.contains("KiB free on node 0"), "{message}");
        // Two memories on one node share it; a striped one takes half from each.
        let message = check(&[need("dram0", &[0], 800), need("cxl0", &[0, 2], 1402)]).expect_err("1501 on node 0");
        assert!(message.contains("dram0 and cxl0"), "{message}");
        check(&[need("dram0", &[0], 800), need("cxl0", &[0, 2], 1400)]).expect("1500 on node 0");
        let message = check(&[need("cxl0", &[2], 2 << 20)]).expect_err("twice as much");
        assert!(message.contains("cxl0") && message.contains("node 2") && message.contains("MiB free"), "{message}");
        let huge = check_room(&[need("cxl0", &[2], 1)], &there, PageSize::Hugetlb).expect_err("none set aside").to_string();
        assert!(huge.contains("huge pages"), "{huge}");
    }

    #[test]
    fn nodes_that_are_not_there_are_named_with_those_that_are() {
        let mut not_ours = node(3, 1 << 30, 0);
        not_ours.allowed = false;
        let there = Nodes { nodes: vec![node(0, 1, 0), not_ours], ..Nodes::default() };
        check_nodes(&[need("dram0", &[0], 1)], &there).expect("there");
        for wrong in [1, 3] {
            let message = check_nodes(&[need("cxl0", &[0, wrong], 1)], &there).expect_err("refused").to_string();
            assert!(message.contains(&format!("cxl0 on node {wrong}")) && message.contains("node 0"), "{message}");
        }
    }

    #[test]
    fn a_region_is_writable_and_on_its_node() {
        let there = Nodes::of_this_machine();
        let Some(own) = there.usable().next().map(|n| n.number) else { return };
        for pages in [PageSize::System, PageSize::Transparent] {
            let mut region = match NodeRegion::new(5_000_001, &[own], pages) {
                Ok(region) => region,
                Err(e) => return println!("skipped: {e}"),
            };
            region.as_mut_slice().iter_mut().enumerate().for_each(|(i, b)| *b = i as u8);
            let mut on = std::collections::BTreeMap::new();
            numa::locate(region.as_slice(), |at, bytes| *on.entry(at).or_insert(0) += bytes).expect("asked");
            assert_eq!(on.into_iter().collect::<Vec<_>>(), [(Some(own), 5_000_001)], "{pages:?}");
            assert!(region.as_slice().iter().enumerate().all(|(i, b)| *b == i as u8));
        }
        let message = NodeRegion::new(1 << 20, &[777], PageSize::System).expect_err("no such node").to_string();
        assert!(message.contains("node 777") && message.contains(&format!("node {own}")), "{message}");
    }
}
