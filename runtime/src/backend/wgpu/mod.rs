//! Any GPU through WGSL and Vulkan.
//!
//! A submission becomes one compute pass: `dispatch` says what is to be run, `pipelines` keeps what running it needs, parameters of
//! all dispatches are written to one buffer and found there by dynamic offsets. `transfer` copies, `device` opens and watches.

mod device;
mod dispatch;
mod pipelines;
#[cfg(test)]
mod tests;
mod transfer;

use super::device::{BufferId, Copier, DeviceBackend, DeviceInfo, View};
use super::op::DeviceOp;
use super::vulkan::describe;
use crate::error::Result;
use device::{Device, poll};
use dispatch::{Dispatch, Limits, check_sizes, dispatches};
use pipelines::{PARAMS_BYTES, Pipelines};
use std::sync::Arc;
use tierwise_cost::quant::QuantFormat;
use transfer::{CHUNK_BYTES, Gate, Outstanding, QueueCopier};

/// Dispatches of one compute pass.
const DISPATCHES_PER_PASS: u64 = 1024;
/// The optional feature that is used where it is offered.
const SUBGROUPS: &str = "subgroups";
/// Bytes of the buffer that is bound where an operand is absent.
const NOTHING_BYTES: u64 = 256;
/// Bytes for parts of attention that are to be put together: 32 heads of 128 elements in 16 ranges take 260 KiB.
const SCRATCH_BYTES: u64 = 1 << 20;
/// Kernels address bytes of a binding in 32 bits; no driver that wgpu knows allows more than this anyway.
const MAX_BINDING_BYTES: u64 = i32::MAX as u64;

/// See the module.
pub struct WgpuBackend {
    info: DeviceInfo,
    device: Arc<Device>,
    gate: Arc<Gate>,
    outstanding: Arc<Outstanding>,
    limits: Limits,
    pipelines: Pipelines,
    params: wgpu::Buffer,
    /// Bytes from parameter block to parameter block.
    params_stride: u64,
    staging: wgpu::Buffer,
    allocated_bytes: u64,
}

impl WgpuBackend {
    /// Opens the best adapter; a software one only if there is no other and `software_too`.
    ///
    /// # Errors
    /// [`crate::RuntimeError::Device`] when there is none or it cannot be opened.
    pub fn open(software_too: bool) -> Result<Self> {
        let found = device::adapter(software_too)?;
        let device = Arc::new(Device::open(&found)?);
        let of_device = device.device.limits();
        let nothing = device.alloc(NOTHING_BYTES, "what is absent")?;
        let scratch = device.alloc(SCRATCH_BYTES, "parts of attention")?;
        let limits = Limits {
            binding_bytes: of_device.max_storage_buffer_binding_size.min(MAX_BINDING_BYTES),
            alignment_bytes: device.alignment_bytes,
            max_groups: of_device.max_compute_workgroups_per_dimension,
            nothing: View { buffer: nothing, offset_bytes: 0, bytes: NOTHING_BYTES },
            scratch: View { buffer: scratch, offset_bytes: 0, bytes: SCRATCH_BYTES },
        };
        let subgroups = device.device.features().contains(wgpu::Features::SUBGROUP);
        let params_stride = PARAMS_BYTES.next_multiple_of(u64::from(of_device.min_uniform_buffer_offset_alignment));
        let params = device.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("parameters"),
            size: params_stride * DISPATCHES_PER_PASS,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let staging = transfer::staging(&device.device);
        device.health.check()?;
        let described = describe(&found.info);
        let info = DeviceInfo {
            backend: "wgpu",
            name: described.name,
            driver: described.driver,
            free_bytes: None,
            max_buffer_bytes: of_device.max_buffer_size / 256 * 256,
            max_expert_bytes: limits.max_expert_bytes(),
            alignment_bytes: limits.alignment_bytes,
            formats: QuantFormat::ALL.to_vec(),
            features: if subgroups { vec![SUBGROUPS.into()] } else { Vec::new() },
        };
        let allocated_bytes = NOTHING_BYTES + SCRATCH_BYTES + params.size() + CHUNK_BYTES as u64;
        Ok(Self {
            info,
            limits,
            pipelines: Pipelines::new(params.clone(), subgroups),
            gate: Arc::default(),
            outstanding: Arc::default(),
            device,
            params,
            params_stride,
            staging,
            allocated_bytes,
        })
    }

    /// Binds no more than so many bytes at once from now on: what a smaller device does with larger weights.
    pub fn bind_at_most(&mut self, bytes: u64) {
        self.limits.binding_bytes = self.limits.binding_bytes.min(bytes);
        self.info.max_expert_bytes = self.limits.max_expert_bytes();
    }

    /// Does without subgroup operations from now on, as on a device that does not offer them.
    pub fn use_no_subgroups(&mut self) {
        self.pipelines = Pipelines::new(self.params.clone(), false);
        self.info.features.retain(|f| f != SUBGROUPS);
    }

    /// Dispatches in one compute pass.
    fn run(&mut self, list: &[Dispatch]) -> Result<()> {
        self.pipelines.make_room(list.len());
        let mut params = vec![0; self.params_stride as usize * list.len()];
        for (block, d) in params.chunks_exact_mut(self.params_stride as usize).zip(list) {
            for (word, param) in block.as_chunks_mut::<4>().0.iter_mut().zip(&d.params) {
                *word = param.to_le_bytes();
            }
            self.pipelines.prepare(&self.device, d);
        }
        self.device.health.check()?;
        self.device.queue.write_buffer(&self.params, 0, &params);
        let mut encoder = self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            for (i, d) in list.iter().enumerate() {
                self.pipelines.record(&mut pass, d, (i as u64 * self.params_stride) as u32);
            }
        }
        self.device.queue.submit([encoder.finish()]);
        self.device.health.check()
    }
}

impl DeviceBackend for WgpuBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&mut self, bytes: u64, what: &str) -> Result<BufferId> {
        let bytes = bytes.max(16).next_multiple_of(16);
        let id = self.device.alloc(bytes, what)?;
        self.allocated_bytes += bytes;
        Ok(id)
    }

    fn allocated_bytes(&self) -> u64 {
        self.allocated_bytes
    }

    fn write(&mut self, to: View, bytes: &[u8]) -> Result<()> {
        transfer::write(&self.device, &self.outstanding, to, bytes)
    }

    fn submit(&mut self, ops: &[DeviceOp]) -> Result<()> {
        let mut list = Vec::with_capacity(ops.len() + 16);
        for op in ops {
            let operands = op.check(self.info.alignment_bytes, &self.info.formats, |b| self.device.bytes_of(b))?;
            check_sizes(op, &operands, &self.limits)?;
            list.extend(dispatches(op, &self.limits, |b| self.device.bytes_of(b).unwrap_or(0))?);
        }
        for part in list.chunks(DISPATCHES_PER_PASS as usize) {
            self.run(part)?;
        }
        Ok(())
    }

    fn read(&mut self, parts: &mut [(View, &mut [u8])]) -> Result<()> {
        transfer::read(&self.device, &self.staging, parts)
    }

    fn wait(&mut self) -> Result<()> {
        // Writes that no submission followed are in the queue still.
        let index = self.device.queue.submit([]);
        poll(&self.device, Some(index))
    }

    fn copier(&self) -> Arc<dyn Copier> {
        Arc::new(QueueCopier {
            device: Arc::clone(&self.device),
            gate: Arc::clone(&self.gate),
            outstanding: Arc::clone(&self.outstanding),
        })
    }
}
