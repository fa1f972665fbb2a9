//! NVIDIA devices through cudarc, whose driver library is loaded at run time.
//!
//! [`launch`] turns operations into kernel launches and touches no device; [`graphs`] makes one call of launches that repeat; `driver` carries
//! them out; `copier` copies beside them;
//! [`kernels`] and [`nvrtc`] make machine code of the sources in `tierwise-shaders`. Nothing but the driver is needed where a folder of compiled
//! kernels is given, else NVIDIA's run-time compiler.

mod copier;
mod driver;
mod graph_exec;
pub mod graphs;
pub mod kernels;
pub mod launch;
mod memory;
pub mod nvrtc;

pub use driver::CudaBackend;

use super::check::check_view;
use super::device::View;
use super::{Device, Report};
use crate::error::{Result, RuntimeError};
use cudarc::driver::{CudaContext, DriverError};
use memory::ALIGNMENT_BYTES;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

/// Where compiled kernels come from.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Folder of compiled kernels (`cargo run --example cuda_kernels`), asked first; absent: `kernels` beside this program.
    pub kernels: Option<PathBuf>,
    /// Folder that keeps what is compiled here.
    pub cache: Option<PathBuf>,
    /// Folder of libnvrtc; absent: beside this program, else where the system has it.
    pub nvrtc: Option<PathBuf>,
}

/// Addresses and sizes of the blocks, by number.
type Buffers = Arc<RwLock<Vec<(u64, u64)>>>;

/// Opens the first device.
///
/// # Errors
/// When there is no driver or no device that can compute.
pub fn open(mut options: Options) -> Result<CudaBackend> {
    if let Some(reason) = report().absent_because {
        return Err(refuse(reason));
    }
    if options.kernels.is_none() {
        let beside = std::env::current_exe().ok().and_then(|p| Some(p.parent()?.join("kernels")));
        options.kernels = beside.filter(|folder| folder.is_dir());
    }
    CudaBackend::open(0, options)
}

fn refuse(reason: String) -> RuntimeError {
    RuntimeError::Device { device: "cuda", reason }
}

fn device_error(action: &str, e: DriverError) -> RuntimeError {
    refuse(format!("could not {action}: {e}; if the device was lost, start again"))
}

/// Address of the first of `bytes` bytes of a part.
fn place(buffers: &Buffers, view: View, bytes: u64, what: &str) -> Result<u64> {
    let buffers = buffers.read().unwrap_or_else(PoisonError::into_inner);
    check_view(view, ALIGNMENT_BYTES, |b| buffers.get(b.0 as usize).map(|x| x.1)).map_err(|e| refuse(format!("{what} {e}")))?;
    if bytes > view.bytes {
        return Err(refuse(format!("{what} of {bytes} bytes in a part of {}", view.bytes)));
    }
    let (address, _) = buffers[view.buffer.0 as usize];
    Ok(address + view.offset_bytes)
}

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

fn devices() -> std::result::Result<Vec<Device>, DriverError> {
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
