//! Memory of the device and page-locked memory of the host, counted.

use super::{device_error, refuse};
use crate::error::Result;
use cudarc::driver::{CudaContext, result, sys};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Multiple of which blocks are: kernels read whole pieces of 16 bytes around what they need.
pub(super) const ALIGNMENT_BYTES: u64 = 256;

/// A block of device memory, zeroed.
#[derive(Debug)]
pub(super) struct DeviceBlock {
    context: Arc<CudaContext>,
    pub(super) address: sys::CUdeviceptr,
    pub(super) bytes: u64,
}

impl DeviceBlock {
    /// `what` is for the message if there is no room.
    pub(super) fn new(context: &Arc<CudaContext>, bytes: u64, what: &str) -> Result<Self> {
        context.bind_to_thread().map_err(|e| device_error("use the context", e))?;
        let rounded = bytes.max(1).next_multiple_of(ALIGNMENT_BYTES);
        let free = || context.mem_get_info().map_or(0, |(free, _)| free);
        let no_room = |reason: String| {
            refuse(format!("{what} needs {bytes} bytes and {} are free ({reason}); lower --vram or --context", free()))
        };
        let size = usize::try_from(rounded).map_err(|e| no_room(e.to_string()))?;
        // SAFETY: the memory is set to zero before anything reads it.
        let address = unsafe { result::malloc_sync(size) }.map_err(|e| no_room(e.to_string()))?;
        let block = Self { context: Arc::clone(context), address, bytes };
        // SAFETY: the block was just allocated with this size.
        unsafe { result::memset_d8_sync(address, 0, size) }
            .and_then(|()| context.synchronize())
            .map_err(|e| device_error(&format!("clear {what}"), e))?;
        Ok(block)
    }
}

impl Drop for DeviceBlock {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `new` and freed here only. A failure means a lost device, whose memory is gone anyway.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Page-locked host memory, which the device reads and writes by itself.
#[derive(Debug)]
pub(super) struct Pinned {
    context: Arc<CudaContext>,
    start: *mut u8,
    len: usize,
}

// SAFETY: a plain block of memory, reached only through `&mut self`.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(super) fn new(context: &Arc<CudaContext>, len: usize) -> Result<Self> {
        context.bind_to_thread().map_err(|e| device_error("use the context", e))?;
        // SAFETY: no contents are assumed: everything is written before it is read.
        let start = unsafe { result::malloc_host(len, 0) }
            .map_err(|e| device_error(&format!("lock {len} bytes of host memory (ulimit -l?)"), e))?;
        // SAFETY: the block has `len` bytes; zeroed so that slices of it are initialised.
        unsafe { std::ptr::write_bytes(start.cast::<u8>(), 0, len) };
        Ok(Self { context: Arc::clone(context), start: start.cast(), len })
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialised bytes, borrowed with `self`. What the device copies from or to them is waited for before they are used
        // again (`Writer`, `Copier`).
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `new`, freed here only; the owners wait for copies first.
            let _ = unsafe { result::free_host(self.start.cast()) };
        }
    }
}

/// Bytes in use: of the device, and locked in the host.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn remove(&self, bytes: u64) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
