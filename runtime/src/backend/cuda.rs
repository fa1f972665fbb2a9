//! NVIDIA devices through cudarc, whose driver library is loaded at run time.

use super::{Device, Report};
use cudarc::driver::{CudaContext, DriverError};

pub(super) fn report() -> Report {
    let absent = |reason: String| Report { interface: "CUDA", devices: Vec::new(), absent_because: Some(reason) };
    // SAFETY: only opens and closes the driver library by name, which runs its initialisers as any use of it would.
    // Asking first matters: creating a context without the library panics instead of returning an error.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return absent("the NVIDIA driver library (libcuda) is not installed".into());
    }
    match devices() {
        Ok(devices) if devices.is_empty() => absent("the NVIDIA driver reports no device".into()),
        Ok(devices) => Report { interface: "CUDA", devices, absent_because: None },
        Err(e) => absent(format!("the NVIDIA driver refused: {e}")),
    }
}

fn devices() -> Result<Vec<Device>, DriverError> {
    (0..CudaContext::device_count()?)
        .map(|ordinal| {
            let context = CudaContext::new(ordinal as usize)?;
            let (major, minor) = context.compute_capability()?;
            Ok(Device {
                name: context.name()?,
                kind: "discrete GPU".into(),
                driver: format!("compute capability {major}.{minor}"),
                memory_bytes: Some(context.total_mem()? as u64),
            })
        })
        .collect()
}
