//! Copies beside the computation: page-locked chunks, two streams, demand before prefetch.
//!
//! A fixed number of chunks is shared by all loader threads: a copy takes a chunk, fills it, sends it off and goes on with the next, so that
//! filling and sending overlap. While a demanded copy waits for a chunk, copies ahead of time get none.

use super::memory::Pinned;
use super::{Buffers, device_error, place};
use crate::backend::device::{Copier, View};
use crate::error::Result;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tierwise_planner::engine::Purpose;

/// Chunks shared by all copies.
const CHUNKS: usize = 8;
const CHUNK_BYTES: usize = 4 << 20;
/// Chunks that one copy has under way.
const CHUNKS_PER_COPY: usize = 3;
/// Host memory that copies lock.
pub(super) const STAGING_BYTES: u64 = (CHUNKS * CHUNK_BYTES) as u64;

struct Chunk {
    memory: Pinned,
    /// After its last copy.
    event: CudaEvent,
}

#[derive(Default)]
struct Pool {
    free: Vec<Chunk>,
    demands_waiting: usize,
}

/// See the module.
pub(super) struct CudaCopier {
    context: Arc<CudaContext>,
    demand: Arc<CudaStream>,
    prefetch: Arc<CudaStream>,
    buffers: Buffers,
    pool: Mutex<Pool>,
    freed: Condvar,
}

impl CudaCopier {
    pub(super) fn new(context: &Arc<CudaContext>, buffers: Buffers) -> Result<Self> {
        let failed = |e| device_error("prepare copies", e);
        context.bind_to_thread().map_err(failed)?;
        // Lower numbers go first.
        let (least, greatest) = result::stream::get_priority_range().map_err(failed)?;
        let mut free = Vec::with_capacity(CHUNKS);
        for _ in 0..CHUNKS {
            free.push(Chunk { memory: Pinned::new(context, CHUNK_BYTES)?, event: context.new_event(None).map_err(failed)? });
        }
        Ok(Self {
            context: Arc::clone(context),
            demand: context.new_stream_with_priority(greatest).map_err(failed)?,
            prefetch: context.new_stream_with_priority(least).map_err(failed)?,
            buffers,
            pool: Mutex::new(Pool { free, demands_waiting: 0 }),
            freed: Condvar::new(),
        })
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        // Nothing in it is half done while it is held.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A chunk if there is one, and no demanded copy is waiting for it.
    fn try_take(&self, purpose: Purpose) -> Option<Chunk> {
        let mut pool = self.pool();
        if purpose == Purpose::Demand || pool.demands_waiting == 0 { pool.free.pop() } else { None }
    }

    fn take(&self, purpose: Purpose) -> Chunk {
        let mut pool = self.pool();
        let demanded = purpose == Purpose::Demand;
        pool.demands_waiting += usize::from(demanded);
        loop {
            if (demanded || pool.demands_waiting == 0)
                && let Some(chunk) = pool.free.pop()
            {
                pool.demands_waiting -= usize::from(demanded);
                if demanded {
                    self.freed.notify_all();
                }
                return chunk;
            }
            pool = self.freed.wait(pool).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn give_back(&self, chunk: Chunk) {
        self.pool().free.push(chunk);
        self.freed.notify_all();
    }

    /// Fills a chunk and sends it off.
    fn send(&self, chunk: &mut Chunk, stream: &Arc<CudaStream>, address: u64, bytes: &[u8]) -> Result<()> {
        let failed = |e| device_error("copy to the device", e);
        let staged = &mut chunk.memory.bytes()[..bytes.len()];
        staged.copy_from_slice(bytes);
        // SAFETY: `address` has room for the bytes (`place`); `staged` is not touched before the event has passed (`finish`).
        unsafe { result::memcpy_htod_async(address, staged, stream.cu_stream()) }.map_err(failed)?;
        chunk.event.record(stream).map_err(failed)
    }

    fn finish(&self, chunk: Chunk) -> Result<()> {
        let done = chunk.event.synchronize().map_err(|e| device_error("copy to the device", e));
        self.give_back(chunk);
        done
    }
}

impl Copier for CudaCopier {
    fn copy(&self, to: View, bytes: &[u8], purpose: Purpose) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| device_error("use the context", e))?;
        let address = place(&self.buffers, to, bytes.len() as u64, "a copy")?;
        let stream = if purpose == Purpose::Demand { &self.demand } else { &self.prefetch };
        let mut under_way = VecDeque::with_capacity(CHUNKS_PER_COPY);
        let mut result = Ok(());
        for (i, part) in bytes.chunks(CHUNK_BYTES).enumerate() {
            // Only a copy that holds no chunk waits for one: those that hold some give back first.
            let mut chunk = loop {
                if under_way.len() < CHUNKS_PER_COPY
                    && let Some(chunk) = self.try_take(purpose)
                {
                    break chunk;
                }
                match under_way.pop_front() {
                    Some(oldest) => result = result.and(self.finish(oldest)),
                    None => break self.take(purpose),
                }
            };
            if result.is_err() {
                self.give_back(chunk);
                break;
            }
            let sent = self.send(&mut chunk, stream, address + (i * CHUNK_BYTES) as u64, part);
            under_way.push_back(chunk);
            result = sent;
            if result.is_err() {
                break;
            }
        }
        for chunk in under_way {
            result = result.and(self.finish(chunk));
        }
        result
    }
}

impl Drop for CudaCopier {
    fn drop(&mut self) {
        // Every copy waited for its chunks; this only guards against one that failed half way.
        let _ = self.demand.synchronize();
        let _ = self.prefetch.synchronize();
    }
}
