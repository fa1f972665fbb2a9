//! Devices: which ones this machine has, what their drivers say, and back-ends that compute on them.
//!
//! Drivers are loaded at run time: a missing one is a reported fact, never a crash. [`device`] and [`op`] are the contract of back-ends,
//! [`check`] what all of them refuse; [`mod@reference`] is the oracle of the others. [`open`] takes the device that a user asked for.

pub mod check;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod op;
pub mod reference;
#[cfg(feature = "wgpu")]
mod vulkan;
#[cfg(feature = "wgpu")]
pub mod wgpu;

use crate::error::Result;
use device::DeviceBackend;
use serde::Serialize;
use std::path::PathBuf;

/// A device that a driver reported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Name as the driver gives it.
    pub name: String,
    /// "discrete GPU", "integrated GPU", "software", ...
    pub kind: String,
    /// Driver name and version.
    pub driver: String,
    /// Memory in bytes, where the driver says it.
    pub memory_bytes: Option<u64>,
}

/// What one programming interface found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// "CUDA" or "Vulkan".
    pub interface: &'static str,
    /// Devices in the driver's order.
    pub devices: Vec<Device>,
    /// Why there are none, if there are none.
    pub absent_because: Option<String>,
}

/// Asks every interface this build knows.
pub fn discover() -> Vec<Report> {
    vec![cuda_report(), vulkan_report()]
}

#[cfg(feature = "cuda")]
fn cuda_report() -> Report {
    cuda::report()
}

#[cfg(not(feature = "cuda"))]
fn cuda_report() -> Report {
    Report { interface: "CUDA", devices: Vec::new(), absent_because: Some("built without the feature `cuda`".into()) }
}

#[cfg(feature = "wgpu")]
fn vulkan_report() -> Report {
    vulkan::report()
}

#[cfg(not(feature = "wgpu"))]
fn vulkan_report() -> Report {
    Report { interface: "Vulkan", devices: Vec::new(), absent_because: Some("built without the feature `wgpu`".into()) }
}

/// The device a user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// The best one that can execute today.
    Auto,
    /// Processor cores.
    Cpu,
    /// Any GPU through WGSL.
    Wgpu,
    /// NVIDIA GPUs.
    Cuda,
    /// Plain loops in host memory, for tests.
    Reference,
}

/// What back-ends may need besides a device.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Folder of compiled CUDA kernels, if they are not to be compiled here.
    pub cuda_kernels: Option<PathBuf>,
    /// Folder that keeps CUDA kernels compiled here.
    pub cuda_cache: Option<PathBuf>,
    /// Folder of NVIDIA's run-time compiler, if it is not where the system has it.
    pub nvrtc: Option<PathBuf>,
    /// Memory of [`Choice::Reference`]; absent: 1 GiB.
    pub reference_bytes: Option<u64>,
}

/// What [`open`] found.
pub struct Opened {
    /// The device's back-end; absent: processor cores.
    pub backend: Option<Box<dyn DeviceBackend>>,
    /// What was chosen and why, as one sentence for the user.
    pub why: String,
}

impl Opened {
    fn gpu(backend: Box<dyn DeviceBackend>, why: &str) -> Self {
        let info = backend.info();
        let why = format!("{} on {}, {why}", info.backend, info.name);
        Self { backend: Some(backend), why }
    }
}

/// Opens the device of this choice. [`Choice::Auto`] takes CUDA before WGSL and a software adapter never.
///
/// # Errors
/// [`crate::RuntimeError::Device`] when a device asked for by name is not there.
pub fn open(choice: Choice, options: &OpenOptions) -> Result<Opened> {
    match choice {
        Choice::Cpu => Ok(Opened { backend: None, why: "cpu, as asked".into() }),
        Choice::Reference => {
            let backend = reference::ReferenceBackend::new(options.reference_bytes.unwrap_or(1 << 30));
            Ok(Opened::gpu(Box::new(backend), "as asked"))
        }
        Choice::Wgpu => Ok(Opened::gpu(open_wgpu(true)?, "as asked")),
        Choice::Cuda => Ok(Opened::gpu(open_cuda(options)?, "as asked")),
        Choice::Auto => {
            let cuda = match open_cuda(options) {
                Ok(cuda) => return Ok(Opened::gpu(cuda, "the fastest back-end for it")),
                Err(e) => e,
            };
            // Vulkan's loader and layers are slow and talk on standard error even where there is nothing to find.
            if !crate::probe::may_have_gpu() {
                return Ok(Opened {
                    backend: None,
                    why: format!("cpu, because of {cuda}, and device wgpu: no GPU is on the bus"),
                });
            }
            match open_wgpu(false) {
                Ok(wgpu) => Ok(Opened::gpu(wgpu, &format!("because of {cuda}"))),
                Err(wgpu) => Ok(Opened { backend: None, why: format!("cpu, because of {cuda} and {wgpu}") }),
            }
        }
    }
}

#[cfg(feature = "wgpu")]
fn open_wgpu(software_too: bool) -> Result<Box<dyn DeviceBackend>> {
    Ok(Box::new(wgpu::WgpuBackend::open(software_too)?))
}

#[cfg(not(feature = "wgpu"))]
fn open_wgpu(_software_too: bool) -> Result<Box<dyn DeviceBackend>> {
    Err(crate::RuntimeError::Device { device: "wgpu", reason: "no WGSL back-end in this build".into() })
}

#[cfg(feature = "cuda")]
fn open_cuda(options: &OpenOptions) -> Result<Box<dyn DeviceBackend>> {
    let (kernels, cache, nvrtc) = (options.cuda_kernels.clone(), options.cuda_cache.clone(), options.nvrtc.clone());
    Ok(Box::new(cuda::open(cuda::Options { kernels, cache, nvrtc })?))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_options: &OpenOptions) -> Result<Box<dyn DeviceBackend>> {
    Err(crate::RuntimeError::Device { device: "cuda", reason: "built without the feature `cuda`".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_interface_reports_devices_or_a_reason() {
        for report in discover() {
            assert_eq!(report.devices.is_empty(), report.absent_because.is_some(), "{report:?}");
        }
    }

    #[test]
    fn a_gpu_asked_for_by_name_is_never_replaced_silently() {
        for (choice, backend) in [(Choice::Wgpu, "wgpu"), (Choice::Cuda, "cuda"), (Choice::Reference, "reference")] {
            match open(choice, &OpenOptions::default()) {
                Ok(opened) => assert_eq!(opened.backend.expect("not the CPU").info().backend, backend),
                Err(e) => assert!(e.to_string().starts_with(&format!("device {backend}: ")), "{e}"),
            }
        }
    }

    #[test]
    fn auto_takes_a_gpu_or_says_why_there_is_none() {
        let opened = open(Choice::Auto, &OpenOptions::default()).expect("there is always the CPU");
        match opened.backend {
            Some(backend) => assert!(opened.why.contains(&backend.info().name)),
            None => assert!(
                opened.why.starts_with("cpu") && opened.why.contains("wgpu") && opened.why.contains("cuda"),
                "{}",
                opened.why
            ),
        }
        assert!(open(Choice::Cpu, &OpenOptions::default()).expect("there is always the CPU").backend.is_none());
    }
}
