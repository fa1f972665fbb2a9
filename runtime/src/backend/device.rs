//! What a GPU back-end does: memory, copies and a closed set of operations ([`super::op::DeviceOp`]).
//!
//! Three back-ends implement [`DeviceBackend`]: `reference` (plain loops on the CPU, the oracle of the others), `wgpu` (WGSL through
//! Vulkan) and `cuda`. One conformance suite runs over all of them. A back-end decides nothing about experts: what is loaded, kept
//! and computed where is the engine's.
//!
//! Order: writes, operations and reads of one back-end happen in the order of the calls. Only a [`Copier`]'s copies run beside them;
//! an operation that reads what a copier wrote is submitted after [`Copier::copy`] has returned.

use super::op::DeviceOp;
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::engine::Purpose;

/// A block of device memory. Valid until its back-end is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferId(pub u32);

/// Part of a block. `offset_bytes` is a multiple of [`DeviceInfo::alignment_bytes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct View {
    /// The block.
    pub buffer: BufferId,
    /// First byte.
    pub offset_bytes: u64,
    /// Bytes, a multiple of 4.
    pub bytes: u64,
}

impl View {
    /// `bytes` bytes from `start` on of this part.
    #[must_use]
    pub const fn part(self, start_bytes: u64, bytes: u64) -> Self {
        Self { buffer: self.buffer, offset_bytes: self.offset_bytes + start_bytes, bytes }
    }
}

/// What a device is and can.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeviceInfo {
    /// "reference", "wgpu" or "cuda".
    pub backend: &'static str,
    /// Name as the driver gives it.
    pub name: String,
    /// Driver and version.
    pub driver: String,
    /// Memory that is free for us, where the driver says it.
    pub free_bytes: Option<u64>,
    /// Largest block that can be allocated.
    pub max_buffer_bytes: u64,
    /// Largest part of a block that one expert may take: what a kernel sees at once. Other operands are windowed by the back-end.
    pub max_expert_bytes: u64,
    /// Multiple of which every [`View::offset_bytes`] is.
    pub alignment_bytes: u64,
    /// Weight formats that it computes with.
    pub formats: Vec<QuantFormat>,
    /// What is used of the optional things: "subgroups", "f16", "tensor cores", ...
    pub features: Vec<String>,
}

/// Copies from host memory that run beside the operations. Shared by loader threads.
pub trait Copier: Send + Sync {
    /// Copies `bytes` into `to` and returns when a later submitted operation sees them. Blocks the calling thread, not the device:
    /// big copies go in chunks, and between chunks demanded copies go before those ahead of time.
    ///
    /// # Errors
    /// When the device refuses or is lost.
    fn copy(&self, to: View, bytes: &[u8], purpose: Purpose) -> Result<()>;
}

/// A device with its queue.
pub trait DeviceBackend: Send {
    /// What it is and can.
    fn info(&self) -> &DeviceInfo;

    /// A zeroed block. `what` is for the message if it is refused.
    ///
    /// # Errors
    /// When there is no room for it.
    fn alloc(&mut self, bytes: u64, what: &str) -> Result<BufferId>;

    /// Bytes allocated so far, with what the back-end needs itself (staging, scratch).
    fn allocated_bytes(&self) -> u64;

    /// Writes `bytes` (at most the part's, a multiple of 4) to the start of `to`, after what was submitted before.
    ///
    /// # Errors
    /// When the device refuses or is lost.
    fn write(&mut self, to: View, bytes: &[u8]) -> Result<()>;

    /// Submits operations. May return before they are done.
    ///
    /// # Errors
    /// When an operation cannot be (formats, shapes) or the device is lost.
    fn submit(&mut self, ops: &[DeviceOp]) -> Result<()>;

    /// Waits for what was submitted, then reads the parts into the slices.
    ///
    /// # Errors
    /// When the device is lost.
    fn read(&mut self, parts: &mut [(View, &mut [u8])]) -> Result<()>;

    /// Waits for what was submitted.
    ///
    /// # Errors
    /// When the device is lost.
    fn wait(&mut self) -> Result<()>;

    /// The back-end's copier.
    fn copier(&self) -> Arc<dyn Copier>;
}
