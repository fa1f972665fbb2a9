//! A back-end with the operations that wait to be submitted, in order with what is written and read.

use crate::backend::device::{DeviceBackend, View};
use crate::backend::op::DeviceOp;
use crate::error::Result;

/// Operations that are submitted together at most: the device begins with the first ones while the rest of a step is laid out.
const TOGETHER: usize = 96;

/// Operations on their way to a device.
pub struct Stream {
    backend: Box<dyn DeviceBackend>,
    pending: Vec<DeviceOp>,
}

impl Stream {
    /// Nothing waits.
    pub const fn new(backend: Box<dyn DeviceBackend>) -> Self {
        Self { backend, pending: Vec::new() }
    }

    /// The back-end, to look at.
    pub fn backend(&self) -> &dyn DeviceBackend {
        self.backend.as_ref()
    }

    /// The back-end, for allocations.
    pub fn backend_mut(&mut self) -> &mut dyn DeviceBackend {
        self.backend.as_mut()
    }

    /// Forgets what a failed step left.
    pub fn clear(&mut self) {
        self.pending.clear();
    }

    /// Adds an operation.
    ///
    /// # Errors
    /// As [`DeviceBackend::submit`], also for operations before it.
    pub fn push(&mut self, op: DeviceOp) -> Result<()> {
        self.pending.push(op);
        if self.pending.len() >= TOGETHER { self.flush() } else { Ok(()) }
    }

    /// Submits what waits.
    ///
    /// # Errors
    /// As [`DeviceBackend::submit`].
    pub fn flush(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let result = self.backend.submit(&self.pending);
        self.pending.clear();
        result
    }

    /// Writes after the operations so far. `bytes` are a multiple of 4.
    ///
    /// # Errors
    /// As [`DeviceBackend::write`] and [`DeviceBackend::submit`].
    pub fn write(&mut self, to: View, bytes: &[u8]) -> Result<()> {
        self.flush()?;
        self.backend.write(to, bytes)
    }

    /// Reads after the operations so far.
    ///
    /// # Errors
    /// As [`DeviceBackend::read`] and [`DeviceBackend::submit`].
    pub fn read(&mut self, parts: &mut [(View, &mut [u8])]) -> Result<()> {
        self.flush()?;
        self.backend.read(parts)
    }

    /// Waits until the device has done everything so far.
    ///
    /// # Errors
    /// As [`DeviceBackend::wait`] and [`DeviceBackend::submit`].
    pub fn wait(&mut self) -> Result<()> {
        self.flush()?;
        self.backend.wait()
    }
}
