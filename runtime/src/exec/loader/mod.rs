//! Brings experts from the model's files into slots while the caller computes.
//!
//! Two back-ends: io_uring where the kernel has it (`uring`), reader threads elsewhere (`threads`). Both read demanded experts
//! before prefetched ones. Buffers travel with the requests, so a slot that is being filled cannot be computed on.
//!
//! * [`files`]: where experts are in files and slots. * [`buffer`]: aligned memory of a slot. * [`copies`]: into a device's slots. * `throttle`: slow memories, imitated.

pub mod buffer;
pub mod copies;
pub mod files;
mod threads;
mod throttle;
mod uring;

pub use buffer::SlotBuffer;
pub use copies::{COPIERS, DeviceCopies, DeviceLayout, DevicePlace, DiskExperts};
pub use files::{ExpertReader, ExpertTable, FileReader};
pub use throttle::{Throttle, Throttled};

use crate::error::{Result, RuntimeError};
use serde::Serialize;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::Instant;
use threads::{READERS, ReaderThreads, Work};
use throttle::Pace;
use tierwise_planner::CheckedPlan;
use tierwise_planner::engine::{ExpertKey, Purpose, SlotId};
use uring::UringReader;

/// Who reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoBackend {
    /// io_uring if the kernel has it and lets us, else threads.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// Reader threads.
    Threads,
}

/// Whether reads of experts leave copies in the system's page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PageCache {
    /// Bypassed if the file system can, else used: slots are the cache, a second copy would be memory outside the plan.
    #[default]
    Auto,
    /// Used: memory that is free anyway serves as a second cache.
    Use,
    /// Bypassed, or an error.
    Bypass,
}

/// How experts are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IoOptions {
    /// Who reads.
    pub backend: IoBackend,
    /// Past the page cache or through it.
    pub page_cache: PageCache,
}

/// How experts are read in fact, and why so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IoReport {
    /// `io_uring`, `threads`, or `other` for a reader that is not the model's files.
    pub backend: &'static str,
    /// Why that.
    pub backend_reason: String,
    /// `bypassed` or `used`.
    pub page_cache: &'static str,
    /// Why that.
    pub page_cache_reason: String,
    /// Reads under way at most.
    pub queue_depth: usize,
    /// Bytes of one read at most; 0 when matrices are read whole.
    pub block_bytes: usize,
}

impl std::fmt::Display for IoReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { backend, backend_reason, page_cache, page_cache_reason, queue_depth, .. } = self;
        write!(
            f,
            "experts are read by {backend} ({backend_reason}), {queue_depth} reads at once, page cache {page_cache} ({page_cache_reason})"
        )
    }
}

/// A load to be done.
#[derive(Debug)]
struct Request {
    key: ExpertKey,
    slot: SlotId,
    /// A host slot's memory.
    buffer: SlotBuffer,
    /// A device slot's place.
    place: Option<DevicePlace>,
    purpose: Purpose,
}

/// A finished load, with its slot's buffer.
#[derive(Debug)]
pub struct Loaded {
    /// What was loaded.
    pub key: ExpertKey,
    /// Into which slot.
    pub slot: SlotId,
    /// The slot's buffer; empty for a device's slot.
    pub buffer: SlotBuffer,
    /// Whether the bytes are there.
    pub result: Result<(), String>,
}

enum Backend {
    /// Nothing is ever loaded.
    Idle,
    Threads(ReaderThreads),
    Uring(UringReader),
}

/// The readers and their queues.
pub struct Loader {
    backend: Backend,
    /// Copies into a device's slots.
    copies: Option<ReaderThreads>,
    finished: Sender<Loaded>,
    done: Receiver<Loaded>,
    in_flight: usize,
    report: Option<IoReport>,
    /// Memories that are slowed down.
    pace: Option<Pace>,
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loader").field("report", &self.report).field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

impl Loader {
    /// For a plan that loads nothing.
    pub fn idle() -> Self {
        let (finished, done) = channel();
        Self { backend: Backend::Idle, copies: None, finished, done, in_flight: 0, report: None, pace: None }
    }

    /// The same with threads that copy into a device's slots.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn with_device(mut self, copies: DeviceCopies) -> Result<Self> {
        let work: Work = Arc::new(move |request| copies.run(request));
        self.copies = Some(ReaderThreads::new(COPIERS, "copy", &work, &self.finished)?);
        Ok(self)
    }

    /// Reader threads on any source.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn with_reader(reader: &Arc<dyn ExpertReader>) -> Result<Self> {
        let report = IoReport {
            backend: "other",
            backend_reason: "a reader of the caller's".into(),
            page_cache: "used",
            page_cache_reason: "the reader decides".into(),
            queue_depth: READERS,
            block_bytes: 0,
        };
        Self::on_threads(reader, report)
    }

    /// Threads that copy experts from far memory, and read those that are on disk past the page cache or through it.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn from_memory(reader: &Arc<dyn ExpertReader>, direct: bool) -> Result<Self> {
        let report = IoReport {
            backend: "threads",
            backend_reason: "experts in far memory are copied".into(),
            page_cache: if direct { "bypassed" } else { "used" },
            page_cache_reason: "for experts on disk".into(),
            queue_depth: READERS,
            block_bytes: 0,
        };
        Self::on_threads(reader, report)
    }

    fn on_threads(reader: &Arc<dyn ExpertReader>, report: IoReport) -> Result<Self> {
        let (finished, done) = channel();
        let reader = Arc::clone(reader);
        let work: Work = Arc::new(move |request| reader.read(request.key, request.buffer.as_mut_slice()));
        let backend = Backend::Threads(ReaderThreads::new(READERS, "read", &work, &finished)?);
        Ok(Self { backend, copies: None, finished, done, in_flight: 0, report: Some(report), pace: None })
    }

    /// Opens the files of `table` and chooses how to read them.
    ///
    /// # Errors
    /// When a file cannot be opened, what was asked for explicitly cannot be had, or the system refuses a thread.
    pub fn open(table: &Arc<ExpertTable>, options: IoOptions) -> Result<Self> {
        let (reader, page_cache_reason) = match options.page_cache {
            PageCache::Use => (FileReader::new(Arc::clone(table))?, "as asked".to_string()),
            asked => match FileReader::direct(Arc::clone(table))? {
                Ok(reader) if asked == PageCache::Bypass => (reader, "as asked".into()),
                Ok(reader) => (reader, "slots are the cache".into()),
                Err(why) if asked == PageCache::Bypass => {
                    return Err(RuntimeError::BadRequest {
                        what: "--page-cache bypass",
                        found: why,
                        expected: "a file system with direct reads (O_DIRECT): move the model, or leave the page cache in use with --page-cache use".into(),
                    });
                }
                Err(why) => (FileReader::new(Arc::clone(table))?, why),
            },
        };
        let page_cache = if reader.is_direct() { "bypassed" } else { "used" };
        let reader = Arc::new(reader);
        let (finished, done) = channel();
        let backend_reason = match options.backend {
            IoBackend::Threads => "as asked".to_string(),
            asked => match UringReader::new(&reader, finished.clone())? {
                Ok(uring) => {
                    let reason = if asked == IoBackend::Uring { "as asked" } else { "the kernel has it" };
                    let report = IoReport {
                        backend: "io_uring",
                        backend_reason: reason.into(),
                        page_cache,
                        page_cache_reason,
                        queue_depth: uring::DEPTH,
                        block_bytes: uring::BLOCK_BYTES,
                    };
                    let backend = Backend::Uring(uring);
                    return Ok(Self { backend, copies: None, finished, done, in_flight: 0, report: Some(report), pace: None });
                }
                Err(why) if asked == IoBackend::Uring => {
                    return Err(RuntimeError::BadRequest {
                        what: "--io uring",
                        found: why,
                        expected: "a kernel (5.6 or newer) that lets this process use io_uring, or --io threads".into(),
                    });
                }
                Err(why) => why,
            },
        };
        let report =
            IoReport { backend: "threads", backend_reason, page_cache, page_cache_reason, queue_depth: READERS, block_bytes: 0 };
        let reader: Arc<dyn ExpertReader> = reader;
        Self::on_threads(&reader, report)
    }

    /// From now on these memories of `plan` give experts no faster than so.
    ///
    /// # Errors
    /// [`RuntimeError::BadRequest`] for a memory that holds no experts of the plan, its main memory, or a rate that is none.
    pub fn throttle(&mut self, plan: &CheckedPlan, throttles: &[Throttle]) -> Result<()> {
        self.pace = if throttles.is_empty() { None } else { Some(Pace::new(plan, throttles)?) };
        Ok(())
    }

    /// Memories that are slowed down, and what they gave.
    pub fn throttled(&self) -> Vec<Throttled> {
        self.pace.as_ref().map_or_else(Vec::new, Pace::throttled)
    }

    /// Experts of `layer` are about to be computed where the plan keeps them; when that may be done at the earliest, if their memory is
    /// slowed down.
    pub fn read_in_place(&mut self, layer: u32, experts: impl Iterator<Item = u32>) -> Option<Instant> {
        self.pace.as_mut()?.read_in_place(layer, experts)
    }

    /// How it reads; `None` when there is nothing to read.
    pub const fn report(&self) -> Option<&IoReport> {
        self.report.as_ref()
    }

    /// Queues a load into a device's slot at `place`.
    pub fn submit_copy(&mut self, key: ExpertKey, slot: SlotId, place: DevicePlace, purpose: Purpose) {
        if let Some(pace) = &mut self.pace {
            pace.asked(key, slot, purpose);
        }
        let request = Request { key, slot, buffer: SlotBuffer::default(), place: Some(place), purpose };
        match &self.copies {
            Some(copies) => copies.submit(request),
            None => unreachable!("a plan with slots on a device has copiers"),
        }
        self.in_flight += 1;
    }

    /// Queues a load into `buffer`, a slot's.
    pub fn submit(&mut self, key: ExpertKey, slot: SlotId, buffer: SlotBuffer, purpose: Purpose) {
        if let Some(pace) = &mut self.pace {
            pace.asked(key, slot, purpose);
        }
        let request = Request { key, slot, buffer, place: None, purpose };
        match &mut self.backend {
            Backend::Idle => unreachable!("a plan with slots has a reader"),
            Backend::Threads(threads) => threads.submit(request),
            Backend::Uring(uring) => uring.submit(request),
        }
        self.in_flight += 1;
    }

    /// An expert that is being prefetched is demanded now: what is still queued goes before other prefetches.
    pub fn promote(&mut self, key: ExpertKey) {
        if let Some(pace) = &mut self.pace {
            pace.promote(key);
        }
        if let Some(copies) = &self.copies {
            copies.promote(key);
        }
        match &mut self.backend {
            Backend::Idle => {}
            Backend::Threads(threads) => threads.promote(key),
            Backend::Uring(uring) => uring.promote(key),
        }
    }

    /// Whether nothing is in flight.
    pub const fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    /// A finished load, if there is one already.
    pub fn try_wait(&mut self) -> Option<Loaded> {
        let loaded = match &mut self.pace {
            None => self.done.try_recv().ok(),
            Some(pace) => loop {
                match self.done.try_recv() {
                    Ok(loaded) => {
                        if let Some(loaded) = pace.arrived(loaded) {
                            break Some(loaded);
                        }
                    }
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break pace.ready(),
                }
            },
        };
        self.in_flight -= usize::from(loaded.is_some());
        loaded
    }

    /// Waits for the next finished load; `None` when nothing is in flight.
    pub fn wait(&mut self) -> Option<Loaded> {
        if self.in_flight == 0 {
            return None;
        }
        let loaded = match &mut self.pace {
            None => self.done.recv().ok()?,
            Some(pace) => loop {
                if let Some(loaded) = pace.ready() {
                    break loaded;
                }
                let arrived = match pace.next() {
                    None => self.done.recv().ok()?,
                    Some(time) => match self.done.recv_timeout(time) {
                        Ok(arrived) => arrived,
                        Err(RecvTimeoutError::Timeout) => continue,
                        Err(RecvTimeoutError::Disconnected) => return None,
                    },
                };
                if let Some(loaded) = pace.arrived(arrived) {
                    break loaded;
                }
            },
        };
        self.in_flight -= 1;
        Some(loaded)
    }
}

fn thread_refused(error: &std::io::Error) -> RuntimeError {
    RuntimeError::BadRequest {
        what: "reader threads",
        found: error.to_string(),
        expected: format!("{READERS} threads that the system allows"),
    }
}
