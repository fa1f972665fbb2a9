//! Weights of experts that other ranks sent.
//!
//! Which of them stay is the planner's decision ([`tierwise_planner::balance::spill::SpillCache`]), the same on all ranks; here are the bytes.

use crate::error::{Result, RuntimeError};
use crate::exec::experts::{ExpertBytes, ExpertLayout};
use crate::exec::loader::SlotBuffer;
use std::collections::HashMap;

/// Matrices begin at multiples of this.
const ALIGNMENT: usize = 64;

/// An expert's bytes as they travel: gate, up and down, one after the other.
pub fn to_message(expert: &ExpertBytes<'_>) -> Vec<u8> {
    [expert.gate.bytes, expert.up.bytes, expert.down.bytes].concat()
}

/// Copies by (layer, expert); layers are counted among those with experts.
#[derive(Debug, Default)]
pub struct Copies {
    held: HashMap<(usize, u32), Copy>,
}

#[derive(Debug)]
struct Copy {
    layout: ExpertLayout,
    starts: [usize; 3],
    bytes: SlotBuffer,
}

impl Copies {
    /// Keeps what `rank` sent. `example` is any expert of the layer.
    ///
    /// # Errors
    /// When it is not an expert's size.
    pub fn keep(&mut self, key: (usize, u32), example: &ExpertBytes<'_>, rank: usize, message: &[u8]) -> Result<()> {
        let layout = ExpertLayout::new(example);
        if message.len() != layout.bytes() {
            return Err(RuntimeError::Rank {
                rank,
                reason: format!(
                    "sent {} bytes for expert {} of the MoE layer {}, expected {}: do all ranks run the same model?",
                    message.len(),
                    key.1,
                    key.0,
                    layout.bytes()
                ),
            });
        }
        let sizes = [example.gate.bytes.len(), example.up.bytes.len(), example.down.bytes.len()];
        let padded = sizes.map(|s| s.next_multiple_of(ALIGNMENT));
        let starts = [0, padded[0], padded[0] + padded[1]];
        let mut bytes = SlotBuffer::zeroed(padded.iter().sum());
        let mut rest = message;
        for (start, size) in starts.into_iter().zip(sizes) {
            let (part, after) = rest.split_at(size);
            bytes.as_mut_slice()[start..start + size].copy_from_slice(part);
            rest = after;
        }
        self.held.insert(key, Copy { layout, starts, bytes });
        Ok(())
    }

    /// The copy of an expert, if it is held.
    pub fn get(&self, key: (usize, u32)) -> Option<ExpertBytes<'_>> {
        self.held.get(&key).map(|c| c.layout.in_slot(c.bytes.as_slice(), c.starts))
    }

    /// Drops what `stays` does not hold for.
    pub fn retain(&mut self, stays: impl Fn((usize, u32)) -> bool) {
        self.held.retain(|key, _| stays(*key));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}
