//! Routed experts on the device: those that stay, in blocks of their layer, and the slots of those that come and go.

use super::memory::DeviceMemory;
use super::weights::{Weights, check_format};
use crate::backend::device::{BufferId, Copier, DeviceBackend, View};
use crate::backend::op::{ABSENT, DeviceExperts};
use crate::error::{Result, RuntimeError};
use crate::exec::loader::copies::write;
use crate::exec::loader::{DeviceLayout, DevicePlace, ExpertReader, FileReader, SlotBuffer};
use crate::exec::model::Model;
use std::sync::Arc;
use tierwise_cost::machine::MemoryKind;
use tierwise_cost::model::{Moe, TensorId, TensorRole};
use tierwise_cost::units::Bytes;
use tierwise_planner::engine::{ExecutorId, ExpertKey, Purpose};
use tierwise_planner::{CheckedPlan, budget};

/// The main processor: the device.
pub const DEVICE: ExecutorId = ExecutorId(0);

/// Experts in one block.
#[derive(Debug)]
pub struct Arena {
    /// The block.
    pub buffer: BufferId,
    /// Where each is: u32 `[num_experts, 3]`.
    pub table: View,
    /// (expert, where it is).
    pub experts: Vec<(u32, DevicePlace)>,
}

/// The routed experts of a layer, as the device sees them.
#[derive(Debug)]
pub struct LayerExperts {
    /// The layer.
    pub layer: u32,
    /// Gate, up and down.
    pub tensors: [TensorId; 3],
    /// What operations need, with buffer and table to be filled in.
    pub shape: DeviceExperts,
    /// How an expert lies in device memory.
    pub layout: DeviceLayout,
    /// Those that stay.
    pub arenas: Vec<Arena>,
    /// All of them stay.
    pub all_resident: bool,
    /// The CPU may compute some of them.
    pub on_cpu: bool,
}

impl LayerExperts {
    /// The entries of a table with these experts: `[num_experts, 3]`.
    pub fn table(&self, experts: impl IntoIterator<Item = (u32, DevicePlace)>) -> Vec<u32> {
        let mut table = vec![ABSENT; 3 * self.shape.num_experts as usize];
        for (expert, place) in experts {
            for (entry, start) in table[3 * expert as usize..][..3].iter_mut().zip(self.layout.starts) {
                *entry = ((place.offset_bytes + start) / 16) as u32;
            }
        }
        table
    }
}

/// Whether an expert stays on the device.
fn is_resident(plan: &CheckedPlan, layer: u32, expert: u32) -> bool {
    let tier = plan.tier_of(layer, expert);
    let t = plan.tier(tier);
    t.through.is_none() && t.memory == plan.plan().main.memory && plan.executor_of(tier) == DEVICE
}

/// Whether the slots of a layer are on the device.
pub fn slots_on_device(plan: &CheckedPlan, layer: u32) -> bool {
    let through = |e| plan.tier(plan.tier_of(layer, e)).through.as_ref() == Some(&plan.plan().main.memory);
    plan.slots(layer) > 0 && (0..plan.num_experts(layer)).any(through)
}

/// Whether prompts may stream experts of a layer to the device, past its slots.
fn streams_to_device(plan: &CheckedPlan, layer: u32) -> bool {
    let main = &plan.plan().main.memory;
    let may_come = |e| {
        let t = plan.tier(plan.tier_of(layer, e));
        t.memory != *main && t.kind != MemoryKind::Disk && t.through.as_ref().is_none_or(|through| through == main)
    };
    plan.streaming_slots() > 0 && (0..plan.num_experts(layer)).any(may_come)
}

/// Whether experts of a layer are ever copied to the device.
pub fn copied_to_device(plan: &CheckedPlan, layer: u32) -> bool {
    slots_on_device(plan, layer) || streams_to_device(plan, layer)
}

/// Whether the CPU may compute an expert: where it is planned, or from a slot in host memory.
fn may_be_on_cpu(plan: &CheckedPlan, layer: u32, expert: u32) -> bool {
    let tier = plan.tier_of(layer, expert);
    plan.executor_of(tier) != DEVICE || plan.home_executor(tier).is_some_and(|e| e != DEVICE)
}

/// Allocates the experts of a layer that stay, and loads nothing.
///
/// # Errors
/// When a format is none of the device's, an expert is too large for its kernels, or there is no room.
pub fn allocate_layer(
    model: &Model,
    plan: &CheckedPlan,
    (layer, moe): (u32, &Moe),
    weights: &Weights,
    memory: &mut DeviceMemory,
    backend: &mut dyn DeviceBackend,
) -> Result<LayerExperts> {
    let spec = model.spec();
    let info = backend.info().clone();
    let tensors = model.expert_tensors(layer).expect("a layer with routed experts has their tensors");
    let formats = tensors.map(|t| spec.tensors[t.0 as usize].format);
    let layout = DeviceLayout::new(&model.expert(tensors, 0), info.alignment_bytes);
    let mut experts: Vec<u32> = (0..moe.num_experts).filter(|e| is_resident(plan, layer, *e)).collect();
    let on_device = !experts.is_empty() || copied_to_device(plan, layer);
    if on_device {
        for (tensor, format) in tensors.iter().zip(formats) {
            check_format(&info, &spec.tensors[tensor.0 as usize].name, format)?;
        }
        if layout.stride > info.max_expert_bytes.min(info.max_buffer_bytes) {
            let (found, most) = (Bytes(layout.stride), Bytes(info.max_expert_bytes.min(info.max_buffer_bytes)));
            let reason =
                format!("an expert of layer {layer} has {found}, this device's kernels see {most} at once: use --device cpu");
            return Err(RuntimeError::Device { device: info.backend, reason });
        }
    }
    let role = |role| spec.tensor(Some(layer), role).map(|(id, _)| weights.vector(id));
    let biases = match (role(TensorRole::ExpertGateBias), role(TensorRole::ExpertUpBias), role(TensorRole::ExpertDownBias)) {
        (Some(gate), Some(up), Some(down)) => Some([gate, up, down]),
        _ => None,
    };
    let nowhere = View { buffer: BufferId(0), offset_bytes: 0, bytes: 0 };
    let shape = DeviceExperts {
        buffer: nowhere.buffer,
        table: nowhere,
        num_experts: moe.num_experts,
        formats,
        inner_size: moe.inner_size,
        hidden: spec.hidden_size,
        activation: moe.activation,
        biases,
    };
    let all_resident = experts.len() == moe.num_experts as usize;
    let on_cpu = (0..moe.num_experts).any(|e| may_be_on_cpu(plan, layer, e));
    let mut arenas = Vec::new();
    let per_block = (info.max_buffer_bytes / layout.stride).max(1) as usize;
    while !experts.is_empty() {
        let rest = experts.split_off(experts.len().min(per_block));
        let what = format!("experts of layer {layer}");
        let block = memory.alloc(backend, budget::RESIDENT_EXPERTS, layout.stride * experts.len() as u64, &what)?;
        let table = memory.alloc(backend, budget::RESIDENT_EXPERTS, 12 * u64::from(moe.num_experts), "a table of experts")?;
        let places = experts
            .iter()
            .enumerate()
            .map(|(i, e)| (*e, DevicePlace { buffer: block.buffer, offset_bytes: layout.stride * i as u64 }));
        arenas.push(Arena { buffer: block.buffer, table, experts: places.collect() });
        experts = rest;
    }
    Ok(LayerExperts { layer, tensors, shape, layout, arenas, all_resident, on_cpu })
}

/// The slots of a pool: `layouts` are those of the layers whose experts may come there.
///
/// # Errors
/// When there is no room.
pub fn allocate_pool(
    slots: u32,
    layouts: &[DeviceLayout],
    line: &'static str,
    memory: &mut DeviceMemory,
    backend: &mut dyn DeviceBackend,
) -> Result<Vec<DevicePlace>> {
    let stride = layouts.iter().map(|l| l.stride).max().unwrap_or(0);
    let per_block = (backend.info().max_buffer_bytes / stride.max(1)).clamp(1, u64::from(u32::MAX)) as u32;
    let mut places = Vec::with_capacity(slots as usize);
    while (places.len() as u32) < slots && stride > 0 {
        let count = (slots - places.len() as u32).min(per_block);
        let block = memory.alloc(backend, line, stride * u64::from(count), "slots of experts")?;
        places.extend((0..count).map(|i| DevicePlace { buffer: block.buffer, offset_bytes: stride * u64::from(i) }));
    }
    Ok(places)
}

/// Loads the experts that stay and the tables of where they are. They are read from the files, not through the map: no copy of them
/// remains in this process.
///
/// # Errors
/// When the device refuses, or a file cannot be read.
pub fn load(model: &Arc<Model>, layers: &[&LayerExperts], copier: &dyn Copier) -> Result<()> {
    let from_files = |l: &&&LayerExperts| !l.arenas.is_empty() && !model.experts_are_made(l.layer);
    let read: Vec<u32> = layers.iter().filter(from_files).map(|l| l.layer).collect();
    let table = Arc::new(model.expert_table(read.iter().copied()));
    let reader = if table.paths().is_empty() { None } else { Some(FileReader::new(Arc::clone(&table))?) };
    for l in layers {
        let mut buffer = SlotBuffer::zeroed(if read.contains(&l.layer) { table.slot_bytes(l.layer) } else { 0 });
        for arena in &l.arenas {
            for (expert, place) in &arena.experts {
                let key = ExpertKey { layer: l.layer, expert: *expert };
                let failed = |reason: String| RuntimeError::ExpertsUnavailable { layer: l.layer, reason };
                match reader.as_ref().filter(|_| !buffer.is_empty()) {
                    Some(reader) => {
                        reader.read(key, buffer.as_mut_slice()).map_err(failed)?;
                        let matrices = table.expert(key).map(|e| &buffer.as_slice()[e.in_slot()..e.in_slot() + e.bytes]);
                        write(copier, &l.layout, *place, matrices, Purpose::Demand)?;
                    }
                    None => {
                        let e = model.expert(l.tensors, *expert);
                        write(copier, &l.layout, *place, [e.gate.bytes, e.up.bytes, e.down.bytes], Purpose::Demand)?;
                    }
                }
            }
            copier.copy(arena.table, bytemuck::cast_slice(&l.table(arena.experts.iter().copied())), Purpose::Demand)?;
        }
    }
    Ok(())
}
