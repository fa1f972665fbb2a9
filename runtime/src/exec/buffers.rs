//! Activation buffers of a session, one per [`Slot`], reused by every step.

use ndarray::{ArrayView2, ArrayViewMut2};
use tierwise_cost::op::Slot;

/// A `[rows, width]` array whose size changes from step to step; memory only grows.
#[derive(Debug, Default)]
pub struct Activations {
    data: Vec<f32>,
    rows: usize,
    width: usize,
}

impl Activations {
    /// Sets the shape. Contents are kept only if the width stays.
    pub fn reshape(&mut self, rows: usize, width: usize) {
        (self.rows, self.width) = (rows, width);
        if self.data.len() < rows * width {
            self.data.resize(rows * width, 0.0);
        }
    }

    /// Splits every run of `2 * part` elements of a row: the first halves stay, the others go to `second`.
    pub fn split_halves(&mut self, part: usize, second: &mut Self) {
        let (rows, width) = (self.rows, self.width / 2);
        second.reshape(rows, width);
        for (i, out) in second.as_mut_slice().chunks_exact_mut(part).enumerate() {
            out.copy_from_slice(&self.data[(2 * i + 1) * part..(2 * i + 2) * part]);
            // Towards the start, in order: nothing is overwritten before it moved.
            self.data.copy_within(2 * i * part..(2 * i + 1) * part, i * part);
        }
        self.width = width;
    }

    /// Keeps `rows`, which ascend.
    pub fn keep(&mut self, rows: &[u32]) {
        for (to, from) in rows.iter().enumerate() {
            let from = *from as usize * self.width;
            self.data.copy_within(from..from + self.width, to * self.width);
        }
        self.rows = rows.len();
    }

    /// Number of rows.
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Elements per row.
    pub const fn width(&self) -> usize {
        self.width
    }

    /// All rows, one after the other.
    pub fn as_slice(&self) -> &[f32] {
        &self.data[..self.rows * self.width]
    }

    /// All rows, one after the other.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.data[..self.rows * self.width]
    }

    /// As a matrix.
    pub fn view(&self) -> ArrayView2<'_, f32> {
        ArrayView2::from_shape((self.rows, self.width), self.as_slice()).expect("rows * width elements")
    }

    /// As a matrix.
    pub fn view_mut(&mut self) -> ArrayViewMut2<'_, f32> {
        let shape = (self.rows, self.width);
        ArrayViewMut2::from_shape(shape, self.as_mut_slice()).expect("rows * width elements")
    }
}

/// One buffer per slot.
#[derive(Debug, Default)]
pub struct Buffers {
    buffers: [Activations; Slot::COUNT],
}

impl Buffers {
    /// A slot's buffer.
    pub const fn get(&self, slot: Slot) -> &Activations {
        &self.buffers[slot.index()]
    }

    /// A slot's buffer.
    pub const fn get_mut(&mut self, slot: Slot) -> &mut Activations {
        &mut self.buffers[slot.index()]
    }

    /// Different slots' buffers at once.
    pub fn get_many_mut<const N: usize>(&mut self, slots: [Slot; N]) -> [&mut Activations; N] {
        self.buffers.get_disjoint_mut(slots.map(Slot::index)).expect("an operation's slots differ")
    }

    /// All buffers, each to be taken once.
    pub fn each_mut(&mut self) -> EachBuffer<'_> {
        EachBuffer(self.buffers.each_mut().map(Some))
    }
}

/// Buffers to be taken one by one.
pub struct EachBuffer<'a>([Option<&'a mut Activations>; 14]);

impl<'a> EachBuffer<'a> {
    /// A slot's buffer.
    pub fn take(&mut self, slot: Slot) -> &'a mut Activations {
        self.0[slot.index()].take().expect("operations on one input write different slots")
    }
}
