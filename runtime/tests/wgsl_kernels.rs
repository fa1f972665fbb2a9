//! The WGSL kernels on whatever Vulkan device there is (Mesa's software one will do), against the scalar references.
//!
//! Without a device the test says so and passes; with `TIERWISE_REQUIRE_GPU=1` that is a failure.
#![cfg(feature = "wgpu")]

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use tierwise_cost::quant::QuantFormat;
use tierwise_runtime::kernels::CpuKernels;
use tierwise_runtime::quant::{dequantize_row, quantize_row};
use tierwise_shaders::{Access, Shader, wgsl};
use wgpu::util::{BufferInitDescriptor, DeviceExt};

/// The value of a future of native wgpu, which is ready at once.
fn ready<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("native wgpu futures are ready at once"),
    }
}

struct Gpu {
    device: wgpu::Device,
    queue: wgpu::Queue,
}

impl Gpu {
    fn open() -> Option<Self> {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = wgpu::Backends::VULKAN;
        let instance = wgpu::Instance::new(descriptor);
        let adapter = match ready(instance.request_adapter(&wgpu::RequestAdapterOptions::default())) {
            Ok(adapter) => adapter,
            Err(e) => {
                assert!(std::env::var_os("TIERWISE_REQUIRE_GPU").is_none(), "TIERWISE_REQUIRE_GPU is set, but: {e}");
                println!("skipped: no Vulkan device ({e})");
                return None;
            }
        };
        println!("on {}", adapter.get_info().name);
        let (device, queue) =
            ready(adapter.request_device(&wgpu::DeviceDescriptor::default())).expect("the adapter gives a device");
        Some(Self { device, queue })
    }

    /// Runs one kernel over `workgroups` groups. `inputs` are the bytes of all bindings but the last, which has `outputs` floats.
    fn run(&self, shader: &Shader, inputs: &[&[u8]], outputs: usize, workgroups: u32) -> Vec<f32> {
        let module = self.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: None,
            source: wgpu::ShaderSource::Wgsl(shader.source.into()),
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some(shader.entry_point),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        assert_eq!(inputs.len() + 1, shader.bindings.len());
        let zeros = vec![0; outputs * 4];
        let buffers: Vec<wgpu::Buffer> = shader
            .bindings
            .iter()
            .zip(inputs.iter().copied().chain([zeros.as_slice()]))
            .map(|(binding, contents)| {
                let usage = match binding.access {
                    Access::Uniform => wgpu::BufferUsages::UNIFORM,
                    Access::Read => wgpu::BufferUsages::STORAGE,
                    Access::ReadWrite => wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
                };
                self.device.create_buffer_init(&BufferInitDescriptor { label: Some(binding.name), contents, usage })
            })
            .collect();
        let entries: Vec<_> = buffers
            .iter()
            .enumerate()
            .map(|(i, b)| wgpu::BindGroupEntry { binding: i as u32, resource: b.as_entire_binding() })
            .collect();
        let layout = pipeline.get_bind_group_layout(0);
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: &layout, entries: &entries });
        let result = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: zeros.len() as u64,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(workgroups, 1, 1);
        }
        encoder.copy_buffer_to_buffer(&buffers[inputs.len()], 0, &result, 0, zeros.len() as u64);
        self.queue.submit([encoder.finish()]);
        result.map_async(wgpu::MapMode::Read, .., |r| r.expect("the result can be read"));
        self.device.poll(wgpu::PollType::wait_indefinitely()).expect("the device finishes");
        let view = result.get_mapped_range(..).expect("the result is mapped");
        view.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
}

/// Values in -1..1 that do not repeat (a Weyl sequence).
fn values(count: usize, seed: f32) -> Vec<f32> {
    (0..count).map(|i| ((i as f32 * 0.618_034 + seed).fract() - 0.5) * 2.0).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[test]
fn q8_0_gemv_equals_the_decoded_weights_product() {
    let Some(gpu) = Gpu::open() else { return };
    let shader = wgsl("gemv_q8_0").expect("registered");
    // Odd numbers of rows and of blocks per row: blocks straddle words, and the last group has idle lanes.
    for (rows, cols) in [(1, 32), (7, 96), (33, 65 * 32)] {
        let row_bytes = QuantFormat::Q8_0.row_bytes(cols as u64).expect("whole blocks") as usize;
        let x = values(cols, 0.3);
        let mut weight = vec![0; row_bytes * rows];
        let mut expected = Vec::new();
        for (row, encoded) in weight.chunks_exact_mut(row_bytes).enumerate() {
            quantize_row(QuantFormat::Q8_0, &values(cols, row as f32 * 0.1), encoded).expect("finite values");
            let mut decoded = vec![0.0; cols];
            dequantize_row(QuantFormat::Q8_0, encoded, &mut decoded);
            let terms = decoded.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            expected.push((terms.clone().sum::<f64>(), terms.map(f64::abs).sum::<f64>()));
        }
        weight.resize(weight.len().next_multiple_of(4), 0);
        let shape = words(&[rows as u32, cols as u32, 0, 0]);
        let y = gpu.run(shader, &[&shape, &weight, &bytes(&x)], rows, rows as u32);
        for (row, (y, (sum, magnitude))) in y.iter().zip(&expected).enumerate() {
            // Each of the `cols` additions and three products per term rounds once: 2^-24 relative to the terms' magnitude.
            let bound = (cols + 3) as f64 * 2f64.powi(-24) * magnitude;
            assert!((f64::from(*y) - sum).abs() <= bound, "{rows} x {cols}, row {row}: {y} against {sum}");
        }
    }
}

#[test]
fn rms_norm_equals_the_scalar_one() {
    let Some(gpu) = Gpu::open() else { return };
    let shader = wgsl("rms_norm").expect("registered");
    for (tokens, width) in [(1, 1), (3, 63), (5, 256)] {
        let (x, weight) = (values(tokens * width, 0.7), values(width, 0.2));
        let mut shape = words(&[tokens as u32, width as u32]);
        shape.extend(1e-6f32.to_le_bytes());
        shape.extend([0; 4]);
        let y = gpu.run(shader, &[&shape, &bytes(&weight), &bytes(&x)], tokens * width, tokens as u32);
        let mut expected = vec![0.0; width];
        for (x, y) in x.chunks(width).zip(y.chunks(width)) {
            CpuKernels::SCALAR.rms_norm(x, &weight, 1e-6, &mut expected);
            for (a, b) in y.iter().zip(&expected) {
                // inverseSqrt may be 2 units in the last place off (WGSL accuracy), the sum `width` roundings.
                let bound = (width + 8) as f32 * 2f32.powi(-24) * b.abs().max(1e-6);
                assert!((a - b).abs() <= bound, "{tokens} x {width}: {a} against {b}");
            }
        }
    }
}
