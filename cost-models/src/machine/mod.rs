//! A machine as a graph: memories, processors that compute from them, links between them.
//!
//! A description comes from measurements or from a file in `configs/machines`, so that a machine one does not own can be planned
//! for. Every number carries its source, and plans repeat it. Bandwidths are what the source says (a datasheet's peak, or a
//! measured rate); what share of it is reached is the cost model's business.

mod calibration;
mod check;
mod file;
mod shared;
mod throttled;

pub use calibration::{
    AttentionSample, Calibration, CopySample, DiskSample, ExpertSample, MatmulSample, NodeSample, ReadSample, SmallSample, Spread,
};

use crate::model::Fnv;
use crate::units::{Bytes, BytesPerS, FlopsPerS, Seconds};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where a number comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Measured on this machine, or on one like it (the note says which).
    Measured,
    /// The vendor's figure, or arithmetic over it.
    Datasheet,
    /// An assumption.
    Prior,
}

impl Source {
    /// Name in files and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Measured => "measured",
            Self::Datasheet => "datasheet",
            Self::Prior => "prior",
        }
    }
}

/// A number with its source: `{ value = "936 GB/s", source = "datasheet" }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sourced<T> {
    /// The number.
    pub value: T,
    /// Where it comes from.
    pub source: Source,
    /// Which measurement, datasheet or reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl<T> Sourced<T> {
    /// A measured number.
    pub const fn measured(value: T) -> Self {
        Self { value, source: Source::Measured, note: None }
    }

    /// A vendor's number.
    pub const fn datasheet(value: T) -> Self {
        Self { value, source: Source::Datasheet, note: None }
    }

    /// An assumed number.
    pub const fn prior(value: T) -> Self {
        Self { value, source: Source::Prior, note: None }
    }

    /// The same with a note.
    #[must_use]
    pub fn with_note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }
}

/// What kind of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemoryKind {
    /// A GPU's own memory.
    Vram,
    /// Host memory, or memory shared by CPU and GPU.
    Dram,
    /// Memory behind a CXL link, read by load instructions.
    Cxl,
    /// Storage: read in blocks, never computed from.
    Disk,
}

impl MemoryKind {
    /// Name in files and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vram => "vram",
            Self::Dram => "dram",
            Self::Cxl => "cxl",
            Self::Disk => "disk",
        }
    }
}

/// One memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Its name within the machine, e.g. `dram0`.
    pub id: String,
    /// Its kind.
    pub kind: MemoryKind,
    /// How much it holds.
    pub capacity: Sourced<Bytes>,
    /// Rate at which the processor beside it reads it.
    pub read_bandwidth: Sourced<BytesPerS>,
    /// Time to the first byte.
    pub latency: Sourced<Seconds>,
    /// The operating system's NUMA nodes that it is: several when cards or sockets are striped. Absent where the machine has one
    /// node, or is described without looking at it; the runtime then leaves bytes where the system puts them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub numa_nodes: Vec<u32>,
}

/// What kind of processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProcessorKind {
    /// One socket of general-purpose cores.
    Cpu,
    /// A graphics processor.
    Gpu,
}

impl ProcessorKind {
    /// Name in files and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
        }
    }
}

/// One processor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processor {
    /// Its name within the machine, e.g. `gpu0`.
    pub id: String,
    /// Its kind.
    pub kind: ProcessorKind,
    /// Product name for people.
    pub name: String,
    /// Physical cores (GPU: multiprocessors).
    pub cores: u32,
    /// Hardware threads (GPU: as many as cores).
    pub threads: u32,
    /// Instruction sets that matter for kernels, e.g. `avx2`, `avx512_vnni`, `sm_86`.
    #[serde(default)]
    pub isa: Vec<String>,
    /// Memories it reads directly; the first is its home, where its buffers and expert slots lie.
    pub computes_from: Vec<String>,
    /// Peak rate in float32.
    pub f32_flops: Sourced<FlopsPerS>,
    /// Peak rate in float16 or bfloat16, dense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub f16_flops: Option<Sourced<FlopsPerS>>,
    /// Peak rate of 8-bit integer products, counted as two operations each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub int8_ops: Option<Sourced<FlopsPerS>>,
    /// Overhead of one operation: a kernel launch, or fork and join of the thread pool.
    pub launch_latency: Sourced<Seconds>,
}

/// A one-way path by which bytes are copied from one memory to another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Memory the bytes come from.
    pub from: String,
    /// Memory they go to.
    pub to: String,
    /// Rate, from pinned memory where that matters.
    pub bandwidth: Sourced<BytesPerS>,
    /// Rate from pageable memory, where it differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pageable_bandwidth: Option<Sourced<BytesPerS>>,
    /// Time to the first byte of a copy.
    pub latency: Sourced<Seconds>,
}

/// A machine. Made by [`Machine::from_toml`] or by a probe; [`Machine::check`] tells whether it makes sense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Name for people; of files in `configs/machines`: the file's name.
    pub name: String,
    /// What it stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Its memories.
    #[serde(rename = "memory")]
    pub memories: Vec<Memory>,
    /// Its processors.
    #[serde(rename = "processor")]
    pub processors: Vec<Processor>,
    /// Its links.
    #[serde(rename = "link", default)]
    pub links: Vec<Link>,
    /// What `calibrate` measured; absent for a machine that nobody measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
}

impl Machine {
    /// The memory of this name.
    pub fn memory(&self, id: &str) -> Option<&Memory> {
        self.memories.iter().find(|m| m.id == id)
    }

    /// The processor of this name.
    pub fn processor(&self, id: &str) -> Option<&Processor> {
        self.processors.iter().find(|p| p.id == id)
    }

    /// The link between these two memories.
    pub fn link(&self, from: &str, to: &str) -> Option<&Link> {
        self.links.iter().find(|l| l.from == from && l.to == to)
    }

    /// All memories of a kind, in file order.
    pub fn memories_of(&self, kind: MemoryKind) -> impl Iterator<Item = &Memory> {
        self.memories.iter().filter(move |m| m.kind == kind)
    }

    /// All processors of a kind, in file order.
    pub fn processors_of(&self, kind: ProcessorKind) -> impl Iterator<Item = &Processor> {
        self.processors.iter().filter(move |p| p.kind == kind)
    }

    /// The home memory of `p`.
    ///
    /// # Panics
    /// If `p` is not of a checked machine.
    pub fn home(&self, p: &Processor) -> &Memory {
        p.computes_from.first().and_then(|id| self.memory(id)).expect("a checked machine's processors have a home memory")
    }

    /// The processor that runs what is not routed: the first GPU, else the first CPU.
    ///
    /// # Panics
    /// If the machine was not checked: a checked one has a CPU.
    pub fn main_processor(&self) -> &Processor {
        self.processors_of(ProcessorKind::Gpu)
            .chain(self.processors_of(ProcessorKind::Cpu))
            .next()
            .expect("a checked machine has a processor")
    }

    /// CPU and GPU compute from the same memory.
    pub fn is_unified(&self) -> bool {
        self.processors_of(ProcessorKind::Gpu).any(|g| self.home(g).kind == MemoryKind::Dram)
    }

    /// Memory `m` as processor `p` sees it: reads of a memory that is not its home go through the link between the two.
    pub fn seen_from(&self, p: &Processor, m: &Memory) -> Memory {
        let mut seen = m.clone();
        let home = self.home(p);
        if home.id != m.id
            && let Some(link) = self.link(&m.id, &home.id)
        {
            if link.bandwidth.value.0 < seen.read_bandwidth.value.0 {
                seen.read_bandwidth = link.bandwidth.clone();
            }
            seen.latency.value.0 = seen.latency.value.0.max(link.latency.value.0);
        }
        seen
    }

    /// The way for copies from one memory to another: a link, or two links over one memory between, as one link.
    ///
    /// Two hops are pipelined, so the slower one sets the rate; latencies add.
    pub fn route(&self, from: &str, to: &str) -> Option<Link> {
        if let Some(link) = self.link(from, to) {
            return Some(link.clone());
        }
        let over = |first: &Link| {
            let second = self.link(&first.to, to)?;
            let slow = if first.bandwidth.value.0 <= second.bandwidth.value.0 { first } else { second };
            Some(Link {
                from: from.to_string(),
                to: to.to_string(),
                bandwidth: slow.bandwidth.clone(),
                pageable_bandwidth: None,
                latency: Sourced {
                    value: Seconds(first.latency.value.0 + second.latency.value.0),
                    source: first.latency.source,
                    note: None,
                },
            })
        };
        self.links
            .iter()
            .filter(|l| l.from == from)
            .filter_map(over)
            .max_by(|a, b| a.bandwidth.value.0.total_cmp(&b.bandwidth.value.0))
    }

    /// Stable 64-bit fingerprint of everything that a plan depends on (names of products and notes left out), in hexadecimal.
    pub fn fingerprint(&self) -> String {
        let mut hash = Fnv::new();
        for m in &self.memories {
            hash.add(&format!("memory {} {:?} {:?}", m.id, m.kind, (m.capacity.value, m.read_bandwidth.value, m.latency.value)));
            // Descriptions without nodes keep the fingerprint that they had before there were any.
            if !m.numa_nodes.is_empty() {
                hash.add(&format!("nodes {:?}", m.numa_nodes));
            }
        }
        for p in &self.processors {
            let rates = (p.f32_flops.value, p.f16_flops.as_ref().map(|r| r.value), p.int8_ops.as_ref().map(|r| r.value));
            hash.add(&format!("processor {} {:?} {} {}", p.id, p.kind, p.cores, p.threads));
            hash.add(&format!("{:?} {:?} {rates:?} {:?}", p.isa, p.computes_from, p.launch_latency.value));
        }
        for l in &self.links {
            let rates = (l.bandwidth.value, l.pageable_bandwidth.as_ref().map(|r| r.value), l.latency.value);
            hash.add(&format!("link {} {} {rates:?}", l.from, l.to));
        }
        if let Some(c) = &self.calibration {
            hash.add(&format!("calibration {}", c.identity()));
        }
        hash.hex()
    }
}

#[cfg(test)]
pub(crate) mod tests;
