//! Reads experts from the model's files into slots, on threads of its own.
//!
//! Reads are positional, not through the memory map: pages of a map would stay resident outside the plan's budget.
//! Buffers travel with the requests, so a slot that is being filled cannot be computed on.

use crate::error::{Result, RuntimeError};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use tierwise_planner::engine::{ExpertKey, SlotId};

/// Reads in flight at once: NVMe drives need a few to reach their bandwidth.
const READERS: usize = 4;

/// Where experts come from. A trait, so that tests can make reads fail.
pub trait ExpertReader: Send + Sync {
    /// Fills `buffer` with the expert's bytes.
    ///
    /// # Errors
    /// The system's reason, with the file.
    fn read(&self, key: ExpertKey, buffer: &mut [u8]) -> Result<(), String>;
}

/// One contiguous read: part of an expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Index into the reader's files.
    pub file: usize,
    /// Where it is in the file.
    pub offset: u64,
    /// Its length.
    pub bytes: usize,
    /// Where it goes in the slot.
    pub slot_offset: usize,
}

/// Reads from the model's files.
#[derive(Debug)]
pub struct FileReader {
    files: Vec<(PathBuf, File)>,
    /// `[layer][expert]` to the extents of gate, up and down; empty for layers without experts.
    extents: Vec<Vec<[Extent; 3]>>,
}

impl FileReader {
    /// Opens the files at `paths`.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn new(paths: Vec<PathBuf>, extents: Vec<Vec<[Extent; 3]>>) -> Result<Self> {
        let mut files = Vec::with_capacity(paths.len());
        for path in paths {
            let file = File::open(&path).map_err(|e| RuntimeError::io("open", &path, e))?;
            files.push((path, file));
        }
        Ok(Self { files, extents })
    }
}

impl ExpertReader for FileReader {
    fn read(&self, key: ExpertKey, buffer: &mut [u8]) -> Result<(), String> {
        for e in &self.extents[key.layer as usize][key.expert as usize] {
            let (path, file) = &self.files[e.file];
            file.read_exact_at(&mut buffer[e.slot_offset..e.slot_offset + e.bytes], e.offset)
                .map_err(|source| format!("{}: {} bytes at {}: {source}", path.display(), e.bytes, e.offset))?;
        }
        Ok(())
    }
}

struct Request {
    key: ExpertKey,
    slot: SlotId,
    buffer: Vec<u8>,
}

/// A finished load, with its slot's buffer.
#[derive(Debug)]
pub struct Loaded {
    /// What was loaded.
    pub key: ExpertKey,
    /// Into which slot.
    pub slot: SlotId,
    /// The slot's buffer.
    pub buffer: Vec<u8>,
    /// Whether the bytes are there.
    pub result: Result<(), String>,
}

/// Reader threads and their queues.
#[derive(Debug)]
pub struct Loader {
    requests: Option<Sender<Request>>,
    done: Receiver<Loaded>,
    in_flight: usize,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Loader {
    /// Starts the reader threads. `reader` is `None` for a plan that loads nothing.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(reader: Option<&Arc<dyn ExpertReader>>) -> Result<Self> {
        let (requests, queue) = channel::<Request>();
        let (finished, done) = channel();
        let queue = Arc::new(Mutex::new(queue));
        let mut threads = Vec::new();
        for reader in reader.into_iter().flat_map(|r| std::iter::repeat_n(r, READERS)) {
            let (reader, queue, finished) = (Arc::clone(reader), Arc::clone(&queue), finished.clone());
            let work = move || {
                // The lock is held while waiting; the next thread waits for the lock instead.
                while let Ok(request) = { queue.lock().unwrap_or_else(PoisonError::into_inner).recv() } {
                    let Request { key, slot, mut buffer } = request;
                    let result = reader.read(key, &mut buffer);
                    if finished.send(Loaded { key, slot, buffer, result }).is_err() {
                        return;
                    }
                }
            };
            let thread = std::thread::Builder::new().name("tierwise-reader".to_string()).spawn(work).map_err(|e| {
                RuntimeError::BadRequest {
                    what: "reader threads",
                    found: e.to_string(),
                    expected: format!("{READERS} threads that the system allows"),
                }
            })?;
            threads.push(thread);
        }
        Ok(Self { requests: Some(requests), done, in_flight: 0, threads })
    }

    /// Queues a load into `buffer`.
    pub fn submit(&mut self, key: ExpertKey, slot: SlotId, buffer: Vec<u8>) {
        self.in_flight += 1;
        let queue = self.requests.as_ref().expect("taken only on drop");
        queue.send(Request { key, slot, buffer }).expect("this holds the queue's other end through its threads");
    }

    /// A finished load, if there is one already.
    pub fn try_wait(&mut self) -> Option<Loaded> {
        let loaded = self.done.try_recv().ok()?;
        self.in_flight -= 1;
        Some(loaded)
    }

    /// Waits for the next finished load; `None` when nothing is in flight.
    pub fn wait(&mut self) -> Option<Loaded> {
        if self.in_flight == 0 {
            return None;
        }
        let loaded = self.done.recv().ok()?;
        self.in_flight -= 1;
        Some(loaded)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        drop(self.requests.take());
        for t in self.threads.drain(..) {
            // A reader that panicked has nothing to clean up.
            let _ = t.join();
        }
    }
}
