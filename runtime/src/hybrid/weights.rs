//! Weights that are not routed experts, on the device: matrices in the file's format, vectors as f32.

use super::memory::DeviceMemory;
use crate::backend::device::{Copier, DeviceBackend, DeviceInfo, View};
use crate::backend::op::DeviceMatrix;
use crate::error::{Result, RuntimeError};
use crate::exec::loader::copies::padded;
use crate::exec::model::Model;
use tierwise_cost::model::{TensorId, TensorSpec};
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::budget;
use tierwise_planner::engine::Purpose;

/// Bytes of a block of weights, unless one tensor is larger.
const BLOCK_BYTES: u64 = 1 << 30;

/// Where a tensor is on the device.
#[derive(Debug, Clone, Copy)]
enum Place {
    Matrix(DeviceMatrix),
    Vector(View),
}

/// All weights that are not routed experts.
#[derive(Debug)]
pub struct Weights {
    /// By tensor; `None` for routed experts.
    places: Vec<Option<Place>>,
}

/// Tensors that lie in one block.
struct Block {
    bytes: u64,
    /// (tensor, where it begins, its bytes).
    tensors: Vec<(usize, u64, u64)>,
}

/// Vectors are f32 on the device, whatever they are in the file.
fn is_vector(t: &TensorSpec) -> bool {
    t.shape.len() == 1 || t.role.is_expert_bias()
}

impl Weights {
    /// Allocates room for all of them, and loads nothing.
    ///
    /// # Errors
    /// When a format is none of the device's, or there is no room.
    pub fn allocate(model: &Model, memory: &mut DeviceMemory, backend: &mut dyn DeviceBackend) -> Result<Self> {
        let (alignment, largest) = (backend.info().alignment_bytes.max(16), backend.info().max_buffer_bytes);
        let limit = BLOCK_BYTES.min(largest);
        let spec = model.spec();
        let mut blocks: Vec<Block> = Vec::new();
        for (i, t) in spec.tensors.iter().enumerate().filter(|(_, t)| !t.role.is_routed_expert()) {
            let bytes = if is_vector(t) { 4 * t.elements() } else { t.bytes.0.next_multiple_of(4) };
            if !is_vector(t) {
                check_format(backend.info(), &t.name, t.format)?;
            }
            let room = bytes.next_multiple_of(alignment);
            match blocks.last_mut() {
                Some(block) if block.bytes + room <= limit => {
                    block.tensors.push((i, block.bytes, bytes));
                    block.bytes += room;
                }
                _ => blocks.push(Block { bytes: room, tensors: vec![(i, 0, bytes)] }),
            }
        }
        let mut places = vec![None; spec.tensors.len()];
        for Block { bytes, tensors } in blocks {
            let first = &spec.tensors[tensors[0].0].name;
            let what = format!("weights from {first} on");
            let block = memory.alloc(backend, budget::NON_EXPERT_WEIGHTS, bytes, &what)?;
            for (i, offset, bytes) in tensors {
                let (t, view) = (&spec.tensors[i], block.part(offset, bytes));
                places[i] = Some(if is_vector(t) {
                    Place::Vector(view)
                } else {
                    let (cols, outer) = t.shape.split_last().expect("a tensor has at least one dimension");
                    let rows = outer.iter().product::<u64>();
                    Place::Matrix(DeviceMatrix { format: t.format, rows: rows as u32, cols: *cols as u32, view })
                });
            }
        }
        Ok(Self { places })
    }

    /// Loads all of them.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn load(&self, model: &Model, copier: &dyn Copier) -> Result<()> {
        for (i, place) in self.places.iter().enumerate() {
            let id = TensorId(i as u32);
            match place {
                None => {}
                Some(Place::Vector(view)) => copier.copy(*view, bytemuck::cast_slice(model.vector(id)), Purpose::Demand)?,
                Some(Place::Matrix(m)) => copier.copy(m.view, &padded(model.matrix(id).bytes), Purpose::Demand)?,
            }
        }
        Ok(())
    }

    /// A matrix.
    ///
    /// # Panics
    /// If the tensor is a vector or of routed experts: operations and places follow from the same table.
    pub fn matrix(&self, id: TensorId) -> DeviceMatrix {
        match self.places[id.0 as usize] {
            Some(Place::Matrix(m)) => m,
            _ => unreachable!("operations and places follow from the same table: this tensor is no matrix"),
        }
    }

    /// A vector, as f32.
    ///
    /// # Panics
    /// As [`Self::matrix`].
    pub fn vector(&self, id: TensorId) -> View {
        match self.places[id.0 as usize] {
            Some(Place::Vector(view)) => view,
            _ => unreachable!("operations and places follow from the same table: this tensor is no vector"),
        }
    }
}

/// Refuses a weight that the device does not compute with.
pub(super) fn check_format(info: &DeviceInfo, name: &str, format: QuantFormat) -> Result<()> {
    if info.formats.contains(&format) {
        return Ok(());
    }
    let known: Vec<&str> = info.formats.iter().map(|f| f.name()).collect();
    Err(RuntimeError::Device {
        device: info.backend,
        reason: format!(
            "{name} is stored as {format}; this back-end computes with {}: convert the model, or run it with --device cpu",
            known.join(", ")
        ),
    })
}
