//! Devices that misbehave: the reference back-end behind a wrapper that is late, refuses, or is lost.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;
use tierwise_planner::engine::Purpose;
use tierwise_runtime::RuntimeError;
use tierwise_runtime::backend::device::{BufferId, Copier, DeviceBackend, DeviceInfo, View};
use tierwise_runtime::backend::op::DeviceOp;
use tierwise_runtime::backend::reference::ReferenceBackend;

type Result<T> = std::result::Result<T, RuntimeError>;

/// What goes wrong. Shared with the test, which looks and changes.
#[derive(Debug, Default)]
pub struct Faults {
    /// Copies after the session was opened fail as often as this.
    pub failing_copies: AtomicU32,
    /// Every copy takes so long.
    pub slow_us: AtomicU64,
    /// Whatever is asked fails.
    pub lost: AtomicBool,
    /// The device is lost after so many submissions, if not 0.
    pub lost_after: AtomicU32,
    /// Allocations that succeed, if not 0.
    pub allocations: AtomicU32,
    /// Writes and copies so far.
    pub written: AtomicU32,
    /// Copies so far, and reads.
    pub copied: AtomicU32,
    pub reads: AtomicU32,
    /// Submissions so far.
    pub submitted: AtomicU32,
}

enum Queued {
    Write(View, Vec<u8>),
    Ops(Vec<DeviceOp>),
}

/// A device that does nothing before it must: what was submitted is done when somebody waits or reads. Copies are done at once, as a
/// real device may. What holds here holds for any order that a real device has.
pub struct LateDevice {
    inner: ReferenceBackend,
    queue: VecDeque<Queued>,
    faults: Arc<Faults>,
}

fn refused(reason: &str) -> RuntimeError {
    RuntimeError::Device { device: "late", reason: reason.into() }
}

impl LateDevice {
    pub fn new(bytes: u64, faults: Arc<Faults>) -> Self {
        Self { inner: ReferenceBackend::new(bytes), queue: VecDeque::new(), faults }
    }

    fn catch_up(&mut self) -> Result<()> {
        while let Some(next) = self.queue.pop_front() {
            match next {
                Queued::Write(to, bytes) => self.inner.write(to, &bytes)?,
                Queued::Ops(ops) => self.inner.submit(&ops)?,
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if self.faults.lost.load(Ordering::SeqCst) { Err(refused("the device was lost by design")) } else { Ok(()) }
    }
}

impl DeviceBackend for LateDevice {
    fn info(&self) -> &DeviceInfo {
        self.inner.info()
    }

    fn alloc(&mut self, bytes: u64, what: &str) -> Result<BufferId> {
        match self.faults.allocations.load(Ordering::SeqCst) {
            0 => {}
            1 => return Err(refused(&format!("{what}: {bytes} bytes refused by design"))),
            n => self.faults.allocations.store(n - 1, Ordering::SeqCst),
        }
        self.inner.alloc(bytes, what)
    }

    fn allocated_bytes(&self) -> u64 {
        self.inner.allocated_bytes()
    }

    fn write(&mut self, to: View, bytes: &[u8]) -> Result<()> {
        self.check()?;
        self.faults.written.fetch_add(1, Ordering::SeqCst);
        self.queue.push_back(Queued::Write(to, bytes.to_vec()));
        Ok(())
    }

    fn submit(&mut self, ops: &[DeviceOp]) -> Result<()> {
        let count = self.faults.submitted.fetch_add(1, Ordering::SeqCst) + 1;
        let after = self.faults.lost_after.load(Ordering::SeqCst);
        if after > 0 && count > after {
            self.faults.lost.store(true, Ordering::SeqCst);
        }
        self.check()?;
        self.queue.push_back(Queued::Ops(ops.to_vec()));
        Ok(())
    }

    fn read(&mut self, parts: &mut [(View, &mut [u8])]) -> Result<()> {
        self.check()?;
        self.faults.reads.fetch_add(1, Ordering::SeqCst);
        self.catch_up()?;
        self.inner.read(parts)
    }

    fn wait(&mut self) -> Result<()> {
        self.check()?;
        self.catch_up()?;
        self.inner.wait()
    }

    fn copier(&self) -> Arc<dyn Copier> {
        Arc::new(LateCopier { inner: self.inner.copier(), faults: Arc::clone(&self.faults) })
    }
}

struct LateCopier {
    inner: Arc<dyn Copier>,
    faults: Arc<Faults>,
}

impl Copier for LateCopier {
    fn copy(&self, to: View, bytes: &[u8], purpose: Purpose) -> Result<()> {
        let f = &self.faults;
        f.written.fetch_add(1, Ordering::SeqCst);
        f.copied.fetch_add(1, Ordering::SeqCst);
        if f.lost.load(Ordering::SeqCst) {
            return Err(refused("the device was lost by design"));
        }
        std::thread::sleep(Duration::from_micros(f.slow_us.load(Ordering::SeqCst)));
        let fails = f.failing_copies.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
        if fails {
            // Half a copy is worse than none.
            let _ = self.inner.copy(to.part(0, (bytes.len() / 8 * 4) as u64), &vec![0xff; bytes.len() / 8 * 4], purpose);
            return Err(refused("the copy failed by design"));
        }
        self.inner.copy(to, bytes, purpose)
    }
}
