//! Pipelines and bind groups, made when first needed and kept.

use super::device::Device;
use super::dispatch::Dispatch;
use crate::backend::device::View;
use std::collections::HashMap;
use std::num::NonZeroU64;
use tierwise_shaders::wgsl::{Access, ENTRY_POINT, Kernel};
use wgpu::{BindGroupEntry, BindGroupLayoutEntry, BindingType, BufferBinding, BufferBindingType};

/// Bytes of every parameter block: sixteen words, the most that a kernel has.
pub(super) const PARAMS_BYTES: u64 = 64;
/// Bind groups kept: a decode step of a large model needs a few thousand.
const MAX_GROUPS_KEPT: usize = 16384;

struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

/// See the module.
pub(super) struct Pipelines {
    subgroups: bool,
    /// Parameter blocks of a submission, one after the other.
    params: wgpu::Buffer,
    pipelines: HashMap<Kernel, Pipeline>,
    groups: HashMap<(Kernel, Vec<View>), wgpu::BindGroup>,
}

impl Pipelines {
    pub fn new(params: wgpu::Buffer, subgroups: bool) -> Self {
        Self { subgroups, params, pipelines: HashMap::new(), groups: HashMap::new() }
    }

    /// Forgets bind groups if `count` more are too many. Not between preparing and recording.
    pub fn make_room(&mut self, count: usize) {
        if self.groups.len() + count > MAX_GROUPS_KEPT {
            self.groups.clear();
        }
    }

    /// Makes sure that the dispatch's pipeline and bind group are there.
    pub fn prepare(&mut self, device: &Device, d: &Dispatch) {
        let pipeline = self.pipelines.entry(d.kernel).or_insert_with(|| make(&device.device, d.kernel, self.subgroups));
        let key = (d.kernel, d.bindings.clone());
        if self.groups.contains_key(&key) {
            return;
        }
        let buffers: Vec<wgpu::Buffer> = d.bindings.iter().map(|view| device.buffer(view.buffer)).collect();
        let params = BufferBinding { buffer: &self.params, offset: 0, size: NonZeroU64::new(PARAMS_BYTES) };
        let storage = buffers.iter().zip(&d.bindings).map(|(buffer, view)| BufferBinding {
            buffer,
            offset: view.offset_bytes,
            size: NonZeroU64::new(view.bytes),
        });
        let entries: Vec<_> = [params]
            .into_iter()
            .chain(storage)
            .enumerate()
            .map(|(i, binding)| BindGroupEntry { binding: i as u32, resource: wgpu::BindingResource::Buffer(binding) })
            .collect();
        let descriptor = wgpu::BindGroupDescriptor { label: None, layout: &pipeline.layout, entries: &entries };
        self.groups.insert(key, device.device.create_bind_group(&descriptor));
    }

    /// Records a dispatch that was prepared, its parameters at `offset` of the parameter blocks.
    pub fn record(&self, pass: &mut wgpu::ComputePass<'_>, d: &Dispatch, offset: u32) {
        let pipeline = &self.pipelines[&d.kernel];
        pass.set_pipeline(&pipeline.pipeline);
        pass.set_bind_group(0, &self.groups[&(d.kernel, d.bindings.clone())], &[offset]);
        let [x, y, z] = d.groups;
        pass.dispatch_workgroups(x, y, z);
    }
}

fn make(device: &wgpu::Device, kernel: Kernel, subgroups: bool) -> Pipeline {
    let shader = kernel.shader(subgroups);
    let name = format!("{kernel:?}");
    let entry = |i: usize, ty: BufferBindingType, dynamic: bool| BindGroupLayoutEntry {
        binding: i as u32,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: BindingType::Buffer { ty, has_dynamic_offset: dynamic, min_binding_size: None },
        count: None,
    };
    let storage = shader
        .bindings
        .iter()
        .enumerate()
        .map(|(i, b)| entry(i + 1, BufferBindingType::Storage { read_only: b.access == Access::Read }, false));
    let entries: Vec<_> = [entry(0, BufferBindingType::Uniform, true)].into_iter().chain(storage).collect();
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(&name), entries: &entries });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: Some(&name),
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some(&name),
        source: wgpu::ShaderSource::Wgsl(shader.source.into()),
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(&name),
        layout: Some(&pipeline_layout),
        module: &module,
        entry_point: Some(ENTRY_POINT),
        // Kernels write their workgroup memory before they read it.
        compilation_options: wgpu::PipelineCompilationOptions { zero_initialize_workgroup_memory: false, ..Default::default() },
        cache: None,
    });
    Pipeline { pipeline, layout }
}
