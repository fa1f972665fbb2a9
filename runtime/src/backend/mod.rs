//! Which devices this machine has, and what their drivers say.
//!
//! Drivers are loaded at run time: a missing one is a reported fact, never a crash. Executing on GPUs is not implemented yet,
//! and [`Choice::resolve`] says so instead of falling back silently.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "wgpu")]
mod vulkan;

use crate::error::{Result, RuntimeError};
use serde::Serialize;

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
}

impl Choice {
    /// What will execute and why, as one sentence for the user.
    ///
    /// # Errors
    /// [`RuntimeError::Device`] when a GPU was asked for by name: no GPU back-end can execute a model yet.
    pub fn resolve(self) -> Result<String> {
        match self {
            Self::Cpu => Ok("cpu, as asked".into()),
            Self::Auto => Ok("cpu (GPU back-ends cannot execute models yet)".into()),
            Self::Wgpu => Err(not_yet("wgpu")),
            Self::Cuda => Err(not_yet("cuda")),
        }
    }
}

fn not_yet(device: &'static str) -> RuntimeError {
    RuntimeError::Device {
        device,
        reason: "this version plans for GPUs but executes on the CPU only; use --device cpu or --device auto".into(),
    }
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
        assert!(Choice::Cuda.resolve().unwrap_err().to_string().contains("--device cpu"));
        assert!(Choice::Wgpu.resolve().is_err());
        assert!(Choice::Auto.resolve().unwrap().contains("cpu"));
    }
}
