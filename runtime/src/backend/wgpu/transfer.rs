//! Copies between host and device: chunks through the queue's staging memory, reads through one mapped buffer.

use super::device::{Device, PATIENCE, poll};
use crate::backend::check::check_view;
use crate::backend::device::{Copier, View};
use crate::error::Result;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use tierwise_planner::engine::Purpose;
use wgpu::{BufferUsages, MapMode};

/// Bytes of a chunk, which is what a demanded copy waits for at most.
pub(super) const CHUNK_BYTES: usize = 4 << 20;

/// Chunks under way at most: with the one before, what bounds the queue's staging memory.
const MAX_OUTSTANDING: usize = 16;
/// Writes up to this size wait for the next submission.
const SMALL_BYTES: usize = 64 << 10;

/// Lets demanded copies go before those ahead of time.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// Demanded copies under way.
    demanded: Mutex<usize>,
    changed: Condvar,
}

/// A demanded copy under way.
struct Demanded<'a>(&'a Gate);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, usize> {
        // A count is never half changed.
        self.demanded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn demand(&self) -> Demanded<'_> {
        *self.lock() += 1;
        Demanded(self)
    }

    /// Returns when no demanded copy is under way.
    fn wait(&self) {
        let mut demanded = self.lock();
        while *demanded > 0 {
            demanded = self.changed.wait(demanded).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Demanded<'_> {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
        self.0.changed.notify_all();
    }
}

/// Chunks whose submission may not be done yet, oldest first.
#[derive(Debug, Default)]
pub(super) struct Outstanding(Mutex<VecDeque<wgpu::SubmissionIndex>>);

impl Outstanding {
    /// Adds a chunk; the oldest one if there are too many now.
    fn add(&self, index: wgpu::SubmissionIndex) -> Option<wgpu::SubmissionIndex> {
        let mut chunks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        chunks.push_back(index);
        (chunks.len() > MAX_OUTSTANDING).then(|| chunks.pop_front()).flatten()
    }
}

/// Writes from loader threads.
pub(super) struct QueueCopier {
    pub device: Arc<Device>,
    pub gate: Arc<Gate>,
    pub outstanding: Arc<Outstanding>,
}

impl Copier for QueueCopier {
    fn copy(&self, to: View, bytes: &[u8], purpose: Purpose) -> Result<()> {
        let _demanded = (purpose == Purpose::Demand).then(|| self.gate.demand());
        chunks(&self.device, &self.outstanding, to, bytes, || {
            if purpose == Purpose::Prefetch {
                self.gate.wait();
            }
        })
    }
}

/// Writes to the start of a part. What is small stays in the queue until the next submission, before which it is ordered.
pub(super) fn write(device: &Device, outstanding: &Outstanding, to: View, bytes: &[u8]) -> Result<()> {
    if bytes.len() > SMALL_BYTES {
        return chunks(device, outstanding, to, bytes, || ());
    }
    device.check(to, bytes.len())?;
    device.queue.write_buffer(&device.buffer(to.buffer), to.offset_bytes, bytes);
    device.health.check()
}

/// Writes in chunks, each submitted at once: later submissions see it. `between` is called before every chunk.
fn chunks(device: &Device, outstanding: &Outstanding, to: View, bytes: &[u8], between: impl Fn()) -> Result<()> {
    device.check(to, bytes.len())?;
    let buffer = device.buffer(to.buffer);
    for (i, chunk) in bytes.chunks(CHUNK_BYTES).enumerate() {
        between();
        device.queue.write_buffer(&buffer, to.offset_bytes + (i * CHUNK_BYTES) as u64, chunk);
        if let Some(oldest) = outstanding.add(device.queue.submit([])) {
            poll(device, Some(oldest))?;
        }
        device.health.check()?;
    }
    Ok(())
}

/// Reads parts through the staging buffer, as many at once as fit it.
pub(super) fn read(device: &Device, staging: &wgpu::Buffer, parts: &mut [(View, &mut [u8])]) -> Result<()> {
    let mut batch: Vec<(usize, &mut [u8])> = Vec::new();
    let mut encoder = device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let mut used = 0;
    for (view, out) in parts {
        device.check(*view, out.len())?;
        let buffer = device.buffer(view.buffer);
        let mut offset = view.offset_bytes;
        for piece in out.chunks_mut(CHUNK_BYTES) {
            if used + piece.len() > CHUNK_BYTES {
                let full = std::mem::replace(
                    &mut encoder,
                    device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default()),
                );
                fetch(device, staging, full, std::mem::take(&mut batch), used)?;
                used = 0;
            }
            encoder.copy_buffer_to_buffer(&buffer, offset, staging, used as u64, piece.len() as u64);
            offset += piece.len() as u64;
            let start = used;
            used += piece.len();
            batch.push((start, piece));
        }
    }
    fetch(device, staging, encoder, batch, used)
}

/// Runs the copies to the staging buffer and takes them from there.
fn fetch(
    device: &Device,
    staging: &wgpu::Buffer,
    encoder: wgpu::CommandEncoder,
    batch: Vec<(usize, &mut [u8])>,
    used: usize,
) -> Result<()> {
    if used == 0 {
        return device.health.check();
    }
    let index = device.queue.submit([encoder.finish()]);
    let (answer, answered) = mpsc::sync_channel(1);
    staging.map_async(MapMode::Read, 0..used as u64, move |r| {
        // Nobody waits any longer only after an error, which was reported.
        let _ = answer.send(r);
    });
    poll(device, Some(index))?;
    // wgpu answers on whichever thread sees the submission end first. A copier that submits or polls at this moment may have taken
    // the answer without having given it yet, so it is waited for here and not expected to be there after the poll.
    match answered.recv_timeout(PATIENCE) {
        Ok(Ok(())) => {}
        Ok(Err(e)) => return Err(device.health.error(format!("cannot be read from: {e}"))),
        Err(_) => return Err(device.health.error("did not answer a read".into())),
    }
    let outcome = match staging.get_mapped_range(0..used as u64) {
        Ok(bytes) => {
            for (start, out) in batch {
                let len = out.len();
                out.copy_from_slice(&bytes[start..start + len]);
            }
            Ok(())
        }
        Err(e) => Err(device.health.error(format!("cannot be read from: {e}"))),
    };
    staging.unmap();
    outcome
}

impl Device {
    /// Whether `bytes` bytes may be copied from or to the start of a part.
    fn check(&self, view: View, bytes: usize) -> Result<()> {
        check_view(view, self.alignment_bytes, |b| self.bytes_of(b))
            .map_err(|e| self.health.error(format!("refuses a part {e}")))?;
        if bytes as u64 > view.bytes || !bytes.is_multiple_of(4) {
            return Err(self.health.error(format!("refuses to copy {bytes} bytes for a part of {}", view.bytes)));
        }
        Ok(())
    }
}

/// The buffer that reads go through.
pub(super) fn staging(device: &wgpu::Device) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("staging for reads"),
        size: CHUNK_BYTES as u64,
        usage: BufferUsages::MAP_READ | BufferUsages::COPY_DST,
        mapped_at_creation: false,
    })
}
