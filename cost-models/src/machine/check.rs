//! Does a machine's description make sense?
//!
//! Everything later may rely on: names that resolve, finite positive rates, a CPU with host memory, no memory out of reach.

use super::{Machine, Memory, MemoryKind, ProcessorKind};
use crate::error::CostError;
use std::collections::HashSet;

/// More than any machine has: catches "24 TiB" for "24 GiB" before sums overflow.
const MAX_MEMORY_BYTES: u64 = 1 << 52;
/// The most that Linux can be built for (`CONFIG_NODES_SHIFT` is at most 10).
const MAX_NUMA_NODE: u32 = 1023;

impl Machine {
    /// Checks that every reference resolves, every number is possible and every memory can be used.
    ///
    /// # Errors
    /// [`CostError::BadMachine`] with the field, its value and what is allowed.
    pub fn check(&self) -> Result<(), CostError> {
        let bad = |field: String, found: String, expected: &str| {
            Err(CostError::BadMachine { machine: self.name.clone(), field, found, expected: expected.to_string() })
        };
        if self.name.trim().is_empty() {
            return bad("name".into(), "empty".into(), "a name");
        }
        let mut ids = HashSet::new();
        for id in self.memories.iter().map(|m| &m.id).chain(self.processors.iter().map(|p| &p.id)) {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-');
            if id.is_empty() || id.len() > 32 || !id.chars().all(plain) {
                return bad("id".into(), format!("{id:?}"), "1 to 32 of a-z, 0-9, '_' and '-'");
            }
            if !ids.insert(id) {
                return bad("id".into(), format!("{id:?} twice"), "an id of its own for every memory and processor");
            }
        }
        for m in &self.memories {
            let field = |name: &str| format!("memory {} {name}", m.id);
            if m.capacity.value.0 == 0 || m.capacity.value.0 > MAX_MEMORY_BYTES {
                return bad(field("capacity"), m.capacity.value.to_string(), "more than 0 B and at most 4096 TiB");
            }
            self.rate(field("read_bandwidth"), m.read_bandwidth.value.0)?;
            self.span(field("latency"), m.latency.value.0)?;
            self.check_nodes(m)?;
        }
        for p in &self.processors {
            self.check_processor(p)?;
        }
        if self.processors_of(ProcessorKind::Cpu).next().is_none() {
            return bad("processor".into(), "no processor of kind cpu".into(), "at least one: something has to hold the files");
        }
        let mut pairs = HashSet::new();
        for l in &self.links {
            let field = |name: &str| format!("link {} -> {} {name}", l.from, l.to);
            for end in [&l.from, &l.to] {
                if self.memory(end).is_none() {
                    return bad(field("end"), format!("{end:?}"), &format!("one of the memories: {}", self.memory_ids()));
                }
            }
            if l.from == l.to {
                return bad(field("end"), "the same memory twice".into(), "two different memories");
            }
            if !pairs.insert((&l.from, &l.to)) {
                return bad(field("end"), "given twice".into(), "one link per direction");
            }
            self.rate(field("bandwidth"), l.bandwidth.value.0)?;
            if let Some(pageable) = &l.pageable_bandwidth {
                self.rate(field("pageable_bandwidth"), pageable.value.0)?;
                if pageable.value.0 > l.bandwidth.value.0 {
                    return bad(
                        field("pageable_bandwidth"),
                        pageable.value.to_string(),
                        "at most the bandwidth from pinned memory",
                    );
                }
            }
            self.span(field("latency"), l.latency.value.0)?;
        }
        for m in &self.memories {
            let computed = self.processors.iter().any(|p| p.computes_from.contains(&m.id));
            let copied = self.links.iter().any(|l| l.from == m.id);
            if !computed && !copied {
                let what = "a processor that computes from it or a link that leaves it";
                return bad(format!("memory {}", m.id), "out of reach".into(), what);
            }
        }
        self.calibration.as_ref().map_or(Ok(()), |c| c.check(self))
    }

    /// Nodes are of host memory, ascending.
    fn check_nodes(&self, m: &Memory) -> Result<(), CostError> {
        let bad = |found: String, expected: &str| {
            let field = format!("memory {} numa_nodes", m.id);
            Err(CostError::BadMachine { machine: self.name.clone(), field, found, expected: expected.to_string() })
        };
        if !m.numa_nodes.is_empty() && !matches!(m.kind, MemoryKind::Dram | MemoryKind::Cxl) {
            return bad(format!("nodes of {}", m.kind.name()), "none: only dram and cxl are nodes of the system");
        }
        if !m.numa_nodes.is_sorted_by(|a, b| a < b) || m.numa_nodes.iter().any(|n| *n > MAX_NUMA_NODE) {
            return bad(format!("{:?}", m.numa_nodes), "ascending numbers of nodes from 0 to 1023");
        }
        Ok(())
    }

    fn check_processor(&self, p: &super::Processor) -> Result<(), CostError> {
        let bad = |name: &str, found: String, expected: &str| {
            let field = format!("processor {} {name}", p.id);
            Err(CostError::BadMachine { machine: self.name.clone(), field, found, expected: expected.to_string() })
        };
        if p.cores == 0 || p.cores > 1 << 16 {
            return bad("cores", p.cores.to_string(), "1 to 65536");
        }
        if p.threads < p.cores || p.threads > 1 << 20 {
            return bad("threads", p.threads.to_string(), "at least the number of cores");
        }
        if p.computes_from.is_empty() {
            return bad("computes_from", "empty".into(), "the memory it computes from");
        }
        for (i, id) in p.computes_from.iter().enumerate() {
            let Some(m) = self.memory(id) else {
                return bad("computes_from", format!("{id:?}"), &format!("one of the memories: {}", self.memory_ids()));
            };
            if p.computes_from[..i].contains(id) {
                return bad("computes_from", format!("{id:?} twice"), "every memory once");
            }
            match (p.kind, m.kind) {
                (_, MemoryKind::Disk) => {
                    return bad("computes_from", format!("the disk {id:?}"), "a memory; disks are only linked");
                }
                (ProcessorKind::Cpu, MemoryKind::Vram) => {
                    return bad("computes_from", format!("the VRAM {id:?}"), "memory that a CPU reads (dram, cxl)");
                }
                _ => {}
            }
            if i == 0 && p.kind == ProcessorKind::Cpu && m.kind != MemoryKind::Dram {
                return bad("computes_from", format!("{id:?} first"), "dram first: it is the home memory");
            }
        }
        self.rate(format!("processor {} f32_flops", p.id), p.f32_flops.value.0)?;
        for (name, rate) in [("f16_flops", &p.f16_flops), ("int8_ops", &p.int8_ops)] {
            if let Some(rate) = rate {
                self.rate(format!("processor {} {name}", p.id), rate.value.0)?;
            }
        }
        self.span(format!("processor {} launch_latency", p.id), p.launch_latency.value.0)
    }

    fn memory_ids(&self) -> String {
        self.memories.iter().map(|m| m.id.as_str()).collect::<Vec<_>>().join(", ")
    }

    fn rate(&self, field: String, value: f64) -> Result<(), CostError> {
        if value.is_finite() && value >= 1.0 {
            return Ok(());
        }
        Err(self.bad_number(field, value, "a finite rate of at least 1 per second"))
    }

    fn span(&self, field: String, value: f64) -> Result<(), CostError> {
        if value.is_finite() && (0.0..=1.0).contains(&value) {
            return Ok(());
        }
        Err(self.bad_number(field, value, "0 to 1 s"))
    }

    fn bad_number(&self, field: String, value: f64, expected: &str) -> CostError {
        CostError::BadMachine { machine: self.name.clone(), field, found: value.to_string(), expected: expected.to_string() }
    }
}
