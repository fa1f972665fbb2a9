//! A Vulkan device: which adapter, its buffers, and whether it is still well.
//!
//! Everything that goes wrong on a device ends in [`Health`], and every call of the back-end asks there: a lost device or a refused
//! command is an error of the call that noticed it, never a panic and never a hang.

use crate::backend::device::BufferId;
use crate::backend::vulkan::{describe, ready};
use crate::error::{Result, RuntimeError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

/// The longest that a device may be busy with what was submitted.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);

/// What went wrong first.
#[derive(Debug, Default)]
pub(super) struct Health(Mutex<Option<String>>);

impl Health {
    fn lock(&self) -> MutexGuard<'_, Option<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, what: String) {
        self.lock().get_or_insert(what);
    }

    /// An error of this device.
    pub fn error(&self, reason: String) -> RuntimeError {
        RuntimeError::Device { device: "wgpu", reason }
    }

    /// An error if something has gone wrong.
    pub fn check(&self) -> Result<()> {
        match &*self.lock() {
            Some(what) => Err(self.error(what.clone())),
            None => Ok(()),
        }
    }
}

/// A device, its queue and its buffers; shared with copiers.
pub(super) struct Device {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub health: Arc<Health>,
    pub alignment_bytes: u64,
    buffers: RwLock<Vec<wgpu::Buffer>>,
}

/// An adapter and what it is.
pub(super) struct Found {
    pub adapter: wgpu::Adapter,
    pub info: wgpu::AdapterInfo,
}

/// The best adapter: discrete before integrated before others, a software one only if there is no other and `software_too`.
pub(super) fn adapter(software_too: bool) -> Result<Found> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN;
    let instance = wgpu::Instance::new(descriptor);
    let rank = |info: &wgpu::AdapterInfo| match info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    };
    let adapters = ready(instance.enumerate_adapters(wgpu::Backends::VULKAN)).unwrap_or_default();
    let mut found: Vec<Found> = adapters.into_iter().map(|adapter| Found { info: adapter.get_info(), adapter }).collect();
    let software = found.iter().find(|f| f.info.device_type == wgpu::DeviceType::Cpu).map(|f| f.info.name.clone());
    found.retain(|f| software_too || f.info.device_type != wgpu::DeviceType::Cpu);
    found.into_iter().min_by_key(|f| rank(&f.info)).ok_or_else(|| {
        let reason = match software {
            Some(name) => format!("no GPU, only a software adapter ({name}); --device wgpu takes it, for tests"),
            None => {
                "no Vulkan loader, no driver, or no device; install the GPU's driver and the Vulkan loader (libvulkan1)".into()
            }
        };
        RuntimeError::Device { device: "wgpu", reason }
    })
}

impl Device {
    /// Opens an adapter with all its limits and, where offered, subgroup operations.
    pub fn open(found: &Found) -> Result<Self> {
        let refused = |reason: String| RuntimeError::Device { device: "wgpu", reason };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("tierwise"),
            required_features: found.adapter.features() & wgpu::Features::SUBGROUP,
            required_limits: found.adapter.limits(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..wgpu::DeviceDescriptor::default()
        };
        let (device, queue) = ready(found.adapter.request_device(&descriptor))
            .ok_or_else(|| refused(format!("{} does not answer", describe(&found.info).name)))?
            .map_err(|e| refused(format!("{} cannot be opened: {e}", found.info.name)))?;
        let health = Arc::new(Health::default());
        let lost = Arc::clone(&health);
        device
            .set_device_lost_callback(move |reason, message| lost.report(format!("the device is lost ({reason:?}): {message}")));
        let refusals = Arc::clone(&health);
        device.on_uncaptured_error(Arc::new(move |e| refusals.report(format!("the device refused a command: {e}"))));
        let alignment_bytes = u64::from(device.limits().min_storage_buffer_offset_alignment);
        Ok(Self { device, queue, health, alignment_bytes, buffers: RwLock::default() })
    }

    fn buffers(&self) -> std::sync::RwLockReadGuard<'_, Vec<wgpu::Buffer>> {
        self.buffers.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a zeroed buffer for storage, refused if there is no room.
    pub fn alloc(&self, bytes: u64, what: &str) -> Result<BufferId> {
        self.health.check()?;
        let limit = self.device.limits().max_buffer_size;
        if bytes > limit {
            return Err(self.health.error(format!("{what} needs {bytes} bytes in one buffer, this device allows {limit}")));
        }
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size: bytes,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        if let Some(Some(e)) = ready(memory.pop()) {
            let advice = "lower --vram or --context, or close other programs that use the GPU";
            return Err(self.health.error(format!("no room for {what} of {bytes} bytes: {e}; {advice}")));
        }
        // wgpu zeroes what was never written when an operation first sees it, and that can land after a copier's write which came
        // between. Zeroed here, nothing is left to be zeroed later.
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.clear_buffer(&buffer, 0, None);
        self.queue.submit([encoder.finish()]);
        self.health.check()?;
        let mut buffers = self.buffers.write().unwrap_or_else(PoisonError::into_inner);
        buffers.push(buffer);
        Ok(BufferId(u32::try_from(buffers.len() - 1).expect("a device has fewer than 2^32 buffers")))
    }

    /// Size of a buffer.
    pub fn bytes_of(&self, id: BufferId) -> Option<u64> {
        self.buffers().get(id.0 as usize).map(wgpu::Buffer::size)
    }

    /// A buffer that was checked to exist.
    pub fn buffer(&self, id: BufferId) -> wgpu::Buffer {
        self.buffers()[id.0 as usize].clone()
    }
}

/// Waits for a submission, or for all of them.
pub(super) fn poll(device: &Device, submission_index: Option<wgpu::SubmissionIndex>) -> Result<()> {
    let wait = wgpu::PollType::Wait { submission_index, timeout: Some(PATIENCE) };
    // wgpu panics when a device is lost while it is waited for. Nothing of ours is changed in there, and the device is given up.
    match catch_unwind(AssertUnwindSafe(|| device.device.poll(wait))) {
        Ok(Ok(_)) => {}
        Ok(Err(e)) => device.health.report(format!("the device does not finish: {e}")),
        Err(_) => device.health.report("the device is lost: it stopped while it was waited for".into()),
    }
    device.health.check()
}
