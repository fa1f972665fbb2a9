//! Copies of experts into a device's slots: from the memory map where the plan keeps them in host memory, else read from the files
//! first. The back-end's copier takes the bytes in chunks and lets demanded copies go before those ahead of time.

use super::Request;
use super::buffer::SlotBuffer;
use super::files::{ExpertReader, ExpertTable};
use crate::backend::device::{BufferId, Copier, View};
use crate::error::Result;
use crate::exec::experts::ExpertBytes;
use crate::exec::model::Model;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use tierwise_planner::engine::{ExpertKey, Purpose};

/// Copies under way at once: one of them is always left for demands.
pub const COPIERS: usize = 3;

/// Room for an expert in a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DevicePlace {
    /// The block.
    pub buffer: BufferId,
    /// First byte of the expert.
    pub offset_bytes: u64,
}

/// How the experts of a layer lie in a device's memory: each matrix begins where a copy may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceLayout {
    /// First byte of gate, up and down.
    pub starts: [u64; 3],
    /// Bytes of each.
    pub bytes: [u64; 3],
    /// Bytes from one expert to the next.
    pub stride: u64,
}

impl DeviceLayout {
    /// The layout for experts like `example` on a device with this alignment.
    pub fn new(example: &ExpertBytes<'_>, alignment_bytes: u64) -> Self {
        let alignment = alignment_bytes.next_multiple_of(16);
        let bytes = [example.gate, example.up, example.down].map(|m| m.bytes.len() as u64);
        let rooms = bytes.map(|b| b.next_multiple_of(alignment));
        Self { starts: [0, rooms[0], rooms[0] + rooms[1]], bytes, stride: rooms.iter().sum() }
    }

    /// Where matrix `which` (0 gate, 1 up, 2 down) of an expert at `place` is written.
    pub fn view(&self, place: DevicePlace, which: usize) -> View {
        let bytes = self.bytes[which].next_multiple_of(4);
        View { buffer: place.buffer, offset_bytes: place.offset_bytes + self.starts[which], bytes }
    }
}

/// `bytes` with zeros behind them, if their number is no multiple of 4.
pub fn padded(bytes: &[u8]) -> Cow<'_, [u8]> {
    if bytes.len().is_multiple_of(4) {
        return Cow::Borrowed(bytes);
    }
    let mut longer = bytes.to_vec();
    longer.resize(bytes.len().next_multiple_of(4), 0);
    Cow::Owned(longer)
}

/// Where the bytes come from and how they get there.
pub struct DeviceCopies {
    /// The back-end's.
    pub copier: Arc<dyn Copier>,
    /// The model, for experts in host memory.
    pub model: Arc<Model>,
    /// By layer with slots on the device.
    pub layouts: HashMap<u32, DeviceLayout>,
    /// Experts that are not in host memory, read into a slot of this table first.
    pub disk: Option<DiskExperts>,
}

/// Experts on disk that go to a device.
pub struct DiskExperts {
    /// Where they are, and how they lie in a buffer.
    pub table: Arc<ExpertTable>,
    /// Reads them.
    pub reader: Arc<dyn ExpertReader>,
    /// Which ones.
    pub is_on_disk: Box<dyn Fn(ExpertKey) -> bool + Send + Sync>,
}

impl DeviceCopies {
    pub(super) fn run(&self, request: &mut Request) -> Result<(), String> {
        let Request { key, place, purpose, .. } = request;
        let place = place.ok_or("a copy to nowhere: an error in Tierwise")?;
        self.copy(*key, place, *purpose).map_err(|e| format!("copy to the device: {e}"))
    }

    fn copy(&self, key: ExpertKey, place: DevicePlace, purpose: Purpose) -> Result<(), String> {
        let layout = self.layouts.get(&key.layer).ok_or("a layer without slots: an error in Tierwise")?;
        let disk = self.disk.as_ref().filter(|d| (d.is_on_disk)(key));
        if let Some(disk) = disk {
            let mut read = SlotBuffer::zeroed(disk.table.slot_bytes(key.layer));
            disk.reader.read(key, read.as_mut_slice())?;
            let matrices = disk.table.expert(key).map(|e| &read.as_slice()[e.in_slot()..e.in_slot() + e.bytes]);
            return write(self.copier.as_ref(), layout, place, matrices, purpose).map_err(|e| e.to_string());
        }
        let tensors = self.model.expert_tensors(key.layer).ok_or("a layer without experts: an error in Tierwise")?;
        let expert = self.model.expert(tensors, key.expert);
        let matrices = [expert.gate.bytes, expert.up.bytes, expert.down.bytes];
        write(self.copier.as_ref(), layout, place, matrices, purpose).map_err(|e| e.to_string())
    }
}

/// Copies an expert's matrices to their places.
pub(crate) fn write(
    copier: &dyn Copier,
    layout: &DeviceLayout,
    place: DevicePlace,
    matrices: [&[u8]; 3],
    purpose: Purpose,
) -> Result<()> {
    for (which, bytes) in matrices.into_iter().enumerate() {
        copier.copy(layout.view(place, which), &padded(bytes), purpose)?;
    }
    Ok(())
}
