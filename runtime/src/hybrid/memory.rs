//! Allocations on a device against the plan's budget lines.
//!
//! Everything is allocated when a session is opened, before a weight is loaded, and nothing later. Lines may exceed the plan's by the
//! alignment of parts; the sum, with what the back-end allocates itself, may not exceed the memory's budget (`--vram`). Not in it is
//! the driver's own context, of which programs learn nothing.

use crate::backend::device::{BufferId, DeviceBackend, View};
use crate::error::{Result, RuntimeError};
use serde::Serialize;
use tierwise_cost::units::Bytes;
use tierwise_planner::CheckedPlan;
use tierwise_planner::budget;
use tierwise_planner::plan::MemoryBudget;

/// The line of what a back-end allocates for itself.
pub const OWN: &str = "the back-end's own, reserve, free";

/// One line of the budget, planned and allocated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceLine {
    /// Name: those of [`tierwise_planner::budget`], or [`OWN`].
    pub name: &'static str,
    /// What the plan says; reserve and free memory are planned for [`OWN`].
    pub planned: Bytes,
    /// What is allocated.
    pub allocated: Bytes,
}

/// What is allocated on a device.
#[derive(Debug, Clone)]
pub struct DeviceMemory {
    budget: Option<MemoryBudget>,
    device: &'static str,
    free: Option<u64>,
    lines: Vec<DeviceLine>,
}

impl DeviceMemory {
    /// Nothing yet, under the budget of the main processor's memory.
    pub fn new(plan: &CheckedPlan, backend: &dyn DeviceBackend) -> Self {
        let main = &plan.plan().main.memory;
        let info = backend.info();
        let budget = plan.plan().budgets.iter().find(|b| b.memory == *main).cloned();
        Self { budget, device: info.backend, free: info.free_bytes, lines: Vec::new() }
    }

    /// Bytes that the plan gives a line.
    pub fn planned(&self, name: &str) -> u64 {
        self.budget.as_ref().map_or(0, |b| b.line(name).0)
    }

    /// Bytes allocated for a line so far.
    pub fn allocated(&self, name: &str) -> u64 {
        self.lines.iter().filter(|l| l.name == name).map(|l| l.allocated.0).sum()
    }

    /// All that may be allocated.
    pub fn capacity(&self) -> u64 {
        self.budget.as_ref().map_or(0, |b| b.capacity.0)
    }

    /// A zeroed block for `line`.
    ///
    /// # Errors
    /// When it does not fit the budget, the device refuses it, or it is larger than a block may be.
    pub fn alloc(&mut self, backend: &mut dyn DeviceBackend, line: &'static str, bytes: u64, what: &str) -> Result<View> {
        let bytes = bytes.max(4).next_multiple_of(4);
        let refuse = |reason: String| Err(RuntimeError::Device { device: self.device, reason });
        let (before, largest) = (backend.allocated_bytes(), backend.info().max_buffer_bytes);
        if bytes > largest {
            return refuse(format!("{what} takes {}, a block of this device at most {}", Bytes(bytes), Bytes(largest)));
        }
        let after = before.saturating_add(bytes);
        if after > self.capacity() {
            let (found, capacity) = (Bytes(after), Bytes(self.capacity()));
            return refuse(format!(
                "{what} ({line}) makes {found} of the plan's {capacity}; plan with a larger --vram, or a smaller --context or --chunk"
            ));
        }
        if let Some(free) = self.free.filter(|free| after > *free) {
            return refuse(format!(
                "{what} ({line}) makes {} of {} that are free; plan with --vram {}",
                Bytes(after),
                Bytes(free),
                Bytes(free)
            ));
        }
        let buffer: BufferId = backend.alloc(bytes, what)?;
        match self.lines.iter_mut().find(|l| l.name == line) {
            Some(l) => l.allocated.0 += bytes,
            None => self.lines.push(DeviceLine { name: line, planned: Bytes(self.planned(line)), allocated: Bytes(bytes) }),
        }
        Ok(View { buffer, offset_bytes: 0, bytes })
    }

    /// The lines, planned and allocated, in the budget's order; last what the back-end takes itself.
    pub fn report(&self, backend: &dyn DeviceBackend) -> Vec<DeviceLine> {
        let of = |name: &&'static str| {
            let line = DeviceLine { name, planned: Bytes(self.planned(name)), allocated: Bytes(self.allocated(name)) };
            (line.planned.0 > 0 || line.allocated.0 > 0).then_some(line)
        };
        let used = budget::LINES.iter().filter(|n| ![budget::RESERVE, budget::FREE].contains(n));
        let mut lines: Vec<DeviceLine> = used.filter_map(of).collect();
        let ours: u64 = lines.iter().map(|l| l.allocated.0).sum();
        let planned = Bytes(self.planned(budget::RESERVE) + self.planned(budget::FREE));
        lines.push(DeviceLine { name: OWN, planned, allocated: Bytes(backend.allocated_bytes().saturating_sub(ours)) });
        lines
    }
}
