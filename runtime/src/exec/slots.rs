//! Memory for experts that are loaded before use: the plan's pools of slots, each slot of one expert's bytes, in host memory or on a
//! device.

use super::experts::{ExpertBytes, ExpertLayout};
use super::loader::{DevicePlace, ExpertTable, SlotBuffer};
use crate::error::{Result, RuntimeError};
use crate::memory::PageSize;
use std::sync::Arc;
use tierwise_planner::engine::{ExpertKey, SlotId};

/// The slots of a pool.
#[derive(Debug)]
pub enum PoolMemory {
    /// In host memory.
    Host(HostSlots),
    /// Places by index.
    Device(Vec<DevicePlace>),
}

/// Slots in host memory.
#[derive(Debug)]
pub struct HostSlots {
    /// Bytes of one.
    buffer_bytes: usize,
    /// Memory nodes on which they are; empty: wherever the system puts them.
    nodes: Vec<u32>,
    /// Pages of slots on nodes.
    pages: PageSize,
    /// Buffers by index, empty while a load is in flight; `None` where a slot was given up.
    buffers: Vec<Option<SlotBuffer>>,
}

impl HostSlots {
    /// `count` empty slots, on these memory nodes or (none) wherever the system puts them.
    ///
    /// # Errors
    /// When the system has no room, or refuses the place.
    pub fn new(count: u32, buffer_bytes: usize, nodes: &[u32], pages: PageSize) -> Result<Self> {
        let nodes = nodes.to_vec();
        let mut slots = Self { buffer_bytes, nodes, pages, buffers: Vec::with_capacity(count as usize) };
        for _ in 0..count {
            let buffer = slots.one()?;
            slots.buffers.push(Some(buffer));
        }
        Ok(slots)
    }

    fn one(&self) -> Result<SlotBuffer> {
        if !self.nodes.is_empty() {
            return SlotBuffer::on(&self.nodes, self.buffer_bytes, self.pages);
        }
        SlotBuffer::mapped(self.buffer_bytes).map_err(|e| RuntimeError::BadRequest {
            what: "memory for a slot of an expert",
            found: e.to_string(),
            expected: format!("{} bytes that the system has; a smaller --ram leaves it more", self.buffer_bytes),
        })
    }

    /// The buffers that are in place.
    pub fn held(&self) -> impl Iterator<Item = &SlotBuffer> {
        self.buffers.iter().flatten()
    }
}

impl PoolMemory {
    /// Slots, those being filled included.
    pub fn count(&self) -> usize {
        match self {
            Self::Host(slots) => slots.held().count(),
            Self::Device(slots) => slots.len(),
        }
    }
}

/// The slots of all pools.
#[derive(Debug)]
pub struct ExpertSlots {
    /// Formats and sizes by layer of the model; `None` without routed experts.
    layouts: Vec<Option<ExpertLayout>>,
    /// How each expert lies in a slot in host memory.
    table: Arc<ExpertTable>,
    pools: Vec<PoolMemory>,
}

impl ExpertSlots {
    /// Slots for the plan's pools, `layouts[l]` for layer `l` of the model.
    pub const fn new(layouts: Vec<Option<ExpertLayout>>, table: Arc<ExpertTable>, pools: Vec<PoolMemory>) -> Self {
        Self { layouts, table, pools }
    }

    /// Where a slot is, if it is on a device.
    pub fn device_place(&self, slot: SlotId) -> Option<DevicePlace> {
        match &self.pools[slot.pool as usize] {
            PoolMemory::Host(_) => None,
            PoolMemory::Device(slots) => Some(slots[slot.index as usize]),
        }
    }

    /// Takes a host slot's buffer out, to be filled.
    pub fn take(&mut self, slot: SlotId) -> SlotBuffer {
        match &mut self.pools[slot.pool as usize] {
            PoolMemory::Host(slots) => slots.buffers[slot.index as usize].as_mut().map(std::mem::take).unwrap_or_default(),
            PoolMemory::Device(_) => SlotBuffer::default(),
        }
    }

    /// Puts a host slot's buffer back.
    pub fn put_back(&mut self, slot: SlotId, buffer: SlotBuffer) {
        if let PoolMemory::Host(slots) = &mut self.pools[slot.pool as usize] {
            slots.buffers[slot.index as usize] = Some(buffer);
        }
    }

    /// Memory for so many more slots of a pool, not yet part of it.
    ///
    /// # Errors
    /// When the slots are on a device, or the system has no room.
    pub fn spare(&self, pool: usize, count: usize) -> Result<Vec<SlotBuffer>> {
        match &self.pools[pool] {
            PoolMemory::Host(slots) => (0..count).map(|_| slots.one()).collect(),
            PoolMemory::Device(_) => Err(RuntimeError::BadRequest {
                what: "another number of slots",
                found: "slots on a device".to_string(),
                expected: "slots in host memory: those on a device are as many as planned".to_string(),
            }),
        }
    }

    /// A slot more, with this memory.
    pub fn add(&mut self, slot: SlotId, buffer: SlotBuffer) {
        if let PoolMemory::Host(slots) = &mut self.pools[slot.pool as usize] {
            let needed = slot.index as usize + 1;
            if slots.buffers.len() < needed {
                slots.buffers.resize_with(needed, || None);
            }
            slots.buffers[slot.index as usize] = Some(buffer);
        }
    }

    /// A slot less: its memory goes back to the system.
    pub fn release(&mut self, slot: SlotId) {
        if let PoolMemory::Host(slots) = &mut self.pools[slot.pool as usize]
            && let Some(buffer) = slots.buffers.get_mut(slot.index as usize)
        {
            *buffer = None;
        }
    }

    /// Whether there is this slot.
    pub fn contains(&self, slot: SlotId) -> bool {
        match self.pools.get(slot.pool as usize) {
            None => false,
            Some(PoolMemory::Host(slots)) => slots.buffers.get(slot.index as usize).is_some_and(Option::is_some),
            Some(PoolMemory::Device(slots)) => (slot.index as usize) < slots.len(),
        }
    }

    /// An expert in a host slot.
    ///
    /// # Panics
    /// If the slot is on a device.
    pub fn expert(&self, key: ExpertKey, slot: SlotId) -> ExpertBytes<'_> {
        let layout = self.layouts[key.layer as usize].as_ref().expect("a layer with routed experts has a layout");
        let starts = self.table.expert(key).map(|e| e.in_slot());
        match &self.pools[slot.pool as usize] {
            PoolMemory::Host(slots) => {
                let buffer = slots.buffers[slot.index as usize].as_ref().expect("the engine computes from slots that there are");
                layout.in_slot(buffer.as_slice(), starts)
            }
            PoolMemory::Device(_) => unreachable!("the caller asks for slots in host memory"),
        }
    }

    /// The pools' slots.
    pub fn pools(&self) -> &[PoolMemory] {
        &self.pools
    }

    /// Slots by pool, those being filled included.
    pub fn counts(&self) -> impl Iterator<Item = usize> + '_ {
        self.pools.iter().map(PoolMemory::count)
    }

    /// Bytes of all buffers in host memory that are in place: experts and the blocks around them.
    pub fn bytes(&self) -> u64 {
        let host = |p: &PoolMemory| match p {
            PoolMemory::Host(slots) => slots.held().map(|b| b.len() as u64).sum::<u64>(),
            PoolMemory::Device(_) => 0,
        };
        self.pools.iter().map(host).sum()
    }
}
