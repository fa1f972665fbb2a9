//! Memory for experts that are loaded before use: the plan's pools of slots, each slot of one expert's bytes.

use super::experts::{ExpertBytes, ExpertLayout};
use tierwise_planner::engine::SlotId;

/// The slots of all pools.
#[derive(Debug)]
pub struct ExpertSlots {
    /// How an expert of each layer of the model lies in a slot; `None` without routed experts.
    layouts: Vec<Option<ExpertLayout>>,
    /// Buffers by pool and index; empty while a load is in flight.
    pools: Vec<Vec<Vec<u8>>>,
}

impl ExpertSlots {
    /// Slots for the plan's pools, `layouts[l]` for layer `l` of the model.
    pub const fn new(layouts: Vec<Option<ExpertLayout>>, pools: Vec<Vec<Vec<u8>>>) -> Self {
        Self { layouts, pools }
    }

    /// Takes a slot's buffer out, to be filled.
    pub fn take(&mut self, slot: SlotId) -> Vec<u8> {
        std::mem::take(&mut self.pools[slot.pool as usize][slot.index as usize])
    }

    /// Puts a slot's buffer back.
    pub fn put_back(&mut self, slot: SlotId, buffer: Vec<u8>) {
        self.pools[slot.pool as usize][slot.index as usize] = buffer;
    }

    /// The expert of `layer` in a slot.
    pub fn expert(&self, layer: u32, slot: SlotId) -> ExpertBytes<'_> {
        let layout = self.layouts[layer as usize].as_ref().expect("a layer with routed experts has a layout");
        layout.in_slot(&self.pools[slot.pool as usize][slot.index as usize])
    }
}
