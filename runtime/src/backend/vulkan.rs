//! Vulkan devices through wgpu.

use super::{Device, Report};
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

pub(super) fn report() -> Report {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN;
    let instance = wgpu::Instance::new(descriptor);
    let devices: Vec<Device> = ready(instance.enumerate_adapters(wgpu::Backends::VULKAN))
        .unwrap_or_default()
        .iter()
        .map(|a| describe(&a.get_info()))
        .collect();
    let absent_because = devices.is_empty().then(|| "no Vulkan loader, no driver, or no device".to_string());
    Report { interface: "Vulkan", devices, absent_because }
}

pub(super) fn describe(info: &wgpu::AdapterInfo) -> Device {
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => "discrete GPU",
        wgpu::DeviceType::IntegratedGpu => "integrated GPU",
        wgpu::DeviceType::VirtualGpu => "virtual GPU",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    };
    Device {
        name: info.name.clone(),
        kind: kind.into(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
        // wgpu does not say how much memory a device has.
        memory_bytes: None,
    }
}

/// The value of a future that is ready at once, as those of native wgpu are; no executor is needed for it.
pub(super) fn ready<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}
