//! One combination of a study, and the hypothetical machine that it means.

use crate::error::PlanError;
use crate::marginal::resize;
use crate::request::{Limits, Request};
use serde::{Deserialize, Serialize};
use tierwise_cost::machine::{Machine, MemoryKind};
use tierwise_cost::units::{Bytes, BytesPerS};

/// The format of models without weights when none is said.
pub const DEFAULT_FORMAT: &str = "Q4_K_M";

/// All inputs of a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Model by name or file.
    pub model: String,
    /// Its weight format, when it has no weights.
    pub format: String,
    /// Machine by name or file; absent: this one.
    pub machine: Option<String>,
    /// VRAM installed instead of the machine's own.
    pub vram: Option<Bytes>,
    /// Host memory installed instead of the machine's own.
    pub ram: Option<Bytes>,
    /// CXL memory installed instead of the machine's own.
    pub cxl: Option<Bytes>,
    /// Its rate.
    pub cxl_bandwidth: Option<BytesPerS>,
    /// Rate of each link from the host to a GPU.
    pub pcie_bandwidth: Option<BytesPerS>,
    /// Rate of each socket's memory.
    pub dram_bandwidth: Option<BytesPerS>,
    /// Positions that each sequence may reach.
    pub context: u32,
    /// Sequences decoded together.
    pub batch: u32,
    /// Trace of arriving requests.
    pub arrivals: Option<String>,
}

impl Point {
    /// The request of this row.
    pub fn request(&self, base: &Request) -> Request {
        let mut r = Request { context: self.context, batch: self.batch, ..base.clone() };
        r.prompt_tokens = r.prompt_tokens.min(r.context);
        r
    }

    /// The machine of this row and the budgets that leave out what has size 0.
    ///
    /// Rates keep the kind of source that the machine's own figure has, so that the cost model treats all values of an axis alike; notes
    /// say that they are assumed.
    ///
    /// # Errors
    /// [`PlanError::BadRequest`] when the machine has no memory or link of that kind, or a rate is impossible.
    pub fn machine(&self, machine: &Machine, mut limits: Limits) -> Result<(Machine, Limits), PlanError> {
        let mut m = machine.clone();
        for (kind, size) in [(MemoryKind::Vram, self.vram), (MemoryKind::Dram, self.ram), (MemoryKind::Cxl, self.cxl)] {
            let Some(size) = size else { continue };
            if m.memories_of(kind).next().is_none() {
                if size.0 == 0 {
                    continue;
                }
                return Err(absent(machine, kind.name(), format!("{size} of {}", kind.name())));
            }
            if size.0 == 0 {
                limits.set(kind, Bytes::ZERO);
            } else {
                resize(&mut m, kind, size);
                note(m.memories.iter_mut().filter(|o| o.kind == kind).map(|o| &mut o.capacity.note));
            }
        }
        if let Some(rate) = self.dram_bandwidth {
            set_rates(&mut m, MemoryKind::Dram, rate, "dram_bandwidth")?;
        }
        if let Some(rate) = self.cxl_bandwidth {
            set_rates(&mut m, MemoryKind::Cxl, rate, "cxl_bandwidth")?;
        }
        if let Some(rate) = self.pcie_bandwidth {
            set_pcie(&mut m, rate)?;
        }
        m.check()?;
        Ok((m, limits))
    }
}

fn absent(machine: &Machine, field: &'static str, found: String) -> PlanError {
    PlanError::BadRequest { field, found, expected: format!("a machine that has it; {} has none", machine.name) }
}

fn note<'a>(notes: impl Iterator<Item = &'a mut Option<String>>) {
    notes.for_each(|n| *n = Some("assumed by the study".into()));
}

/// The rate of all memories of a kind. A CXL card is as fast as its port: links that leave it change with it, but no link gets faster
/// than another part of its way lets it be.
fn set_rates(machine: &mut Machine, kind: MemoryKind, rate: BytesPerS, field: &'static str) -> Result<(), PlanError> {
    if machine.memories_of(kind).next().is_none() {
        return Err(absent(machine, field, rate.to_string()));
    }
    let old: Vec<(String, f64)> = machine.memories_of(kind).map(|m| (m.id.clone(), m.read_bandwidth.value.0)).collect();
    for m in machine.memories.iter_mut().filter(|m| m.kind == kind) {
        m.read_bandwidth.value = rate;
        m.read_bandwidth.note = Some("assumed by the study".into());
    }
    if kind == MemoryKind::Cxl {
        for l in &mut machine.links {
            let Some((_, before)) = old.iter().find(|(id, _)| *id == l.from) else { continue };
            let own_port = l.bandwidth.value.0 >= *before;
            if own_port || l.bandwidth.value.0 > rate.0 {
                l.bandwidth.value = rate;
                l.bandwidth.note = Some("assumed by the study".into());
            }
        }
    }
    Ok(())
}

/// The rate of every link from host or CXL memory to a GPU; from CXL at most what the card gives.
fn set_pcie(machine: &mut Machine, rate: BytesPerS) -> Result<(), PlanError> {
    let memories = machine.memories.clone();
    let find = |id: &str| memories.iter().find(|m| m.id == id);
    let mut any = false;
    for l in &mut machine.links {
        let (Some(from), Some(to)) = (find(&l.from), find(&l.to)) else { continue };
        if to.kind != MemoryKind::Vram || !matches!(from.kind, MemoryKind::Dram | MemoryKind::Cxl) {
            continue;
        }
        any = true;
        l.bandwidth.value =
            if from.kind == MemoryKind::Cxl && from.read_bandwidth.value < rate { from.read_bandwidth.value } else { rate };
        l.bandwidth.note = Some("assumed by the study".into());
        if let Some(pageable) = &mut l.pageable_bandwidth
            && pageable.value > l.bandwidth.value
        {
            pageable.value = l.bandwidth.value;
        }
    }
    if any { Ok(()) } else { Err(absent(machine, "pcie_bandwidth", rate.to_string())) }
}
