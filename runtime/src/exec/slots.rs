//! Memory for experts that are loaded before use: per layer a few slots, each of one expert's bytes.

use super::experts::{ExpertBytes, ExpertLayout};

/// The slots of all layers.
#[derive(Debug)]
pub struct ExpertSlots {
    layers: Vec<LayerSlots>,
}

/// The slots of one layer.
#[derive(Debug, Default)]
pub struct LayerSlots {
    /// How an expert lies in a slot; `None` for a layer without slots.
    pub layout: Option<ExpertLayout>,
    /// The buffers; empty while a load is in flight.
    pub buffers: Vec<Vec<u8>>,
}

impl ExpertSlots {
    /// Slots for every layer of the model, `layers[l]` for layer `l`.
    pub const fn new(layers: Vec<LayerSlots>) -> Self {
        Self { layers }
    }

    /// Takes a slot's buffer out, to be filled.
    pub fn take(&mut self, layer: u32, slot: u32) -> Vec<u8> {
        std::mem::take(&mut self.layers[layer as usize].buffers[slot as usize])
    }

    /// Puts a slot's buffer back.
    pub fn put_back(&mut self, layer: u32, slot: u32, buffer: Vec<u8>) {
        self.layers[layer as usize].buffers[slot as usize] = buffer;
    }

    /// The expert in a slot.
    pub fn expert(&self, layer: u32, slot: u32) -> ExpertBytes<'_> {
        let l = &self.layers[layer as usize];
        let layout = l.layout.as_ref().expect("a layer with slots has a layout");
        layout.in_slot(&l.buffers[slot as usize])
    }
}
