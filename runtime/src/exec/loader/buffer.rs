//! A slot's memory: bytes that begin at a multiple of the disk's block size, as direct reads want.
//!
//! Slots are maps of their own (mmap(2)), because what is given up must go back to the system at once: an allocator keeps blocks of this
//! size for later (mallopt(3), `M_MMAP_THRESHOLD`). What is needed for a moment is an ordinary vector that is a block longer, of
//! which an aligned part is used. Either stays where it is when the buffer moves, so no unsafe code is needed.

use crate::error::Result;
use crate::memory::{NodeRegion, PageSize};
use memmap2::MmapMut;

/// Direct reads want addresses, file offsets and lengths that are multiples of the device's block, which is at most this.
pub const ALIGNMENT: usize = 4096;

#[derive(Debug)]
enum Memory {
    Heap(Vec<u8>),
    Map(MmapMut),
    Nodes(NodeRegion),
}

impl Default for Memory {
    fn default() -> Self {
        Self::Heap(Vec::new())
    }
}

/// Zeroed bytes that begin at a multiple of [`ALIGNMENT`]. Pages that were never written take no memory.
#[derive(Debug, Default)]
pub struct SlotBuffer {
    memory: Memory,
    start: usize,
    len: usize,
}

impl SlotBuffer {
    /// `len` zeros; nothing is allocated for none.
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self::default();
        }
        let bytes = vec![0; len + ALIGNMENT];
        // Should the compiler not know the address, direct reads would be refused with a clear error; nothing worse.
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { memory: Memory::Heap(bytes), start, len }
    }

    /// `len` zeros in a map of their own, which goes back to the system when the buffer is dropped.
    ///
    /// # Errors
    /// When the system has no room.
    pub fn mapped(len: usize) -> std::io::Result<Self> {
        if len == 0 {
            return Ok(Self::default());
        }
        // Maps begin at pages, and no system has smaller ones.
        Ok(Self { memory: Memory::Map(MmapMut::map_anon(len)?), start: 0, len })
    }

    /// `len` zeros on these memory nodes, in a map of their own; nothing is allocated for none.
    ///
    /// # Errors
    /// When the system refuses the memory or its place.
    pub fn on(nodes: &[u32], len: usize, pages: PageSize) -> Result<Self> {
        if len == 0 {
            return Ok(Self::default());
        }
        Ok(Self { memory: Memory::Nodes(NodeRegion::new(len, nodes, pages)?), start: 0, len })
    }

    /// The memory on chosen nodes, if it is there.
    pub const fn region(&self) -> Option<&NodeRegion> {
        match &self.memory {
            Memory::Nodes(region) => Some(region),
            Memory::Heap(_) | Memory::Map(_) => None,
        }
    }

    /// Usable bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        let bytes: &[u8] = match &self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Map(map) => map,
            Memory::Nodes(region) => region.as_slice(),
        };
        &bytes[self.start..self.start + self.len]
    }

    /// The bytes.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let bytes: &mut [u8] = match &mut self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Map(map) => map,
            Memory::Nodes(region) => region.as_mut_slice(),
        };
        &mut bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_at_a_block_wherever_it_moves() {
        assert!(SlotBuffer::zeroed(0).is_empty());
        assert!(SlotBuffer::mapped(0).is_ok_and(|b| b.is_empty()));
        assert!(SlotBuffer::mapped(usize::MAX / 2).is_err(), "more than any system has");
        let new =
            |i: usize| if i.is_multiple_of(2) { SlotBuffer::zeroed(i * 37) } else { SlotBuffer::mapped(i * 37).expect("little") };
        let buffers: Vec<_> = (1..200).map(new).collect();
        for (i, mut b) in buffers.into_iter().rev().enumerate() {
            assert_eq!(b.len(), (199 - i) * 37);
            assert_eq!(b.as_slice().as_ptr().align_offset(ALIGNMENT), 0);
            assert!(b.as_mut_slice().iter().all(|x| *x == 0));
        }
    }
}
