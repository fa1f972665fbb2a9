//! Threads that fill slots with whole experts, demanded ones first: positional reads into host memory, or copies to a device.
//!
//! What every system has. Readers sleep in the kernel while the disk works; with the page cache in use they also copy.

use super::{Loaded, Request, thread_refused};
use crate::error::Result;
use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tierwise_planner::engine::{ExpertKey, Purpose};

/// Reads in flight at once: NVMe drives need a few to reach their bandwidth.
pub(super) const READERS: usize = 4;

/// What a thread does with a request.
pub(super) type Work = Arc<dyn Fn(&mut Request) -> Result<(), String> + Send + Sync>;

#[derive(Default)]
struct Queues {
    demand: VecDeque<Request>,
    prefetch: VecDeque<Request>,
    /// Threads busy with prefetches; one is always left for demands.
    prefetching: usize,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queues: Mutex<Queues>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        // Queues are whole between any two statements, so a panic elsewhere leaves nothing half done.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next request to serve, of which at most `most` may be ahead of time; `None` when the pool closes.
    fn next(&self, most: usize) -> Option<Request> {
        let mut queues = self.lock();
        loop {
            if queues.closed {
                return None;
            }
            if let Some(request) = queues.demand.pop_front() {
                return Some(request);
            }
            if queues.prefetching < most
                && let Some(request) = queues.prefetch.pop_front()
            {
                queues.prefetching += 1;
                return Some(request);
            }
            queues = self.changed.wait(queues).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The pool.
pub(super) struct ReaderThreads {
    shared: Arc<Shared>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl ReaderThreads {
    /// `count` threads, at least two, that do `work`.
    pub fn new(count: usize, name: &str, work: &Work, done: &Sender<Loaded>) -> Result<Self> {
        let mut pool = Self { shared: Arc::default(), threads: Vec::new() };
        for i in 0..count {
            let (work, shared, done) = (Arc::clone(work), Arc::clone(&pool.shared), done.clone());
            let run = move || {
                while let Some(mut request) = shared.next(count - 1) {
                    let result = work(&mut request);
                    let Request { key, slot, buffer, purpose, .. } = request;
                    if purpose == Purpose::Prefetch {
                        shared.lock().prefetching -= 1;
                        shared.changed.notify_all();
                    }
                    if done.send(Loaded { key, slot, buffer, result }).is_err() {
                        return;
                    }
                }
            };
            let thread =
                std::thread::Builder::new().name(format!("tierwise-{name}-{i}")).spawn(run).map_err(|e| thread_refused(&e))?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    pub fn submit(&self, request: Request) {
        let mut queues = self.shared.lock();
        match request.purpose {
            Purpose::Demand => queues.demand.push_back(request),
            Purpose::Prefetch => queues.prefetch.push_back(request),
        }
        drop(queues);
        self.shared.changed.notify_one();
    }

    /// A prefetch is demanded now.
    pub fn promote(&self, key: ExpertKey) {
        let mut queues = self.shared.lock();
        if let Some(at) = queues.prefetch.iter().position(|r| r.key == key)
            && let Some(mut request) = queues.prefetch.remove(at)
        {
            request.purpose = Purpose::Demand;
            queues.demand.push_back(request);
        }
        drop(queues);
        self.shared.changed.notify_one();
    }
}

impl Drop for ReaderThreads {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        for t in self.threads.drain(..) {
            // A thread that panicked has nothing to clean up.
            let _ = t.join();
        }
    }
}
