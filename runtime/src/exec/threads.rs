//! The executor's threads: a pool of its own, working memory for each of its threads, the kernels they run.
//!
//! A session's thread count is a setting, so the process-wide pool of rayon is not used. Where experts lie on several nodes with processors,
//! threads are kept beside them ([`super::beside`]).

use super::beside::Beside;
use super::flash::FlashScratch;
use super::matmul::MatmulScratch;
use super::model::Model;
use crate::error::{Result, RuntimeError};
use crate::kernels::CpuKernels;
use crate::memory::numa;
use rayon::prelude::*;
use std::sync::{Arc, Mutex, PoisonError};

/// Working memory of one thread.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Of [`super::flash`].
    pub flash: FlashScratch,
    /// Of [`super::matmul`].
    pub matmul: MatmulScratch,
    /// One token's inner activations in a feed-forward network.
    pub inner: Vec<f32>,
}

/// A thread pool with one [`Scratch`] per thread.
pub struct Threads {
    pool: Arc<rayon::ThreadPool>,
    kernels: &'static CpuKernels,
    scratch: Vec<Mutex<Scratch>>,
    beside: Option<Arc<Beside>>,
}

impl Threads {
    /// A pool of `count` threads.
    ///
    /// # Errors
    /// When `count` is 0 or above 1024, or the system refuses the threads.
    pub fn new(count: usize) -> Result<Self> {
        Self::beside(count, None)
    }

    /// As many for a model: beside its experts, where those lie on several nodes with processors.
    ///
    /// # Errors
    /// As [`Self::beside`].
    pub fn for_model(model: &Model, count: usize) -> Result<Self> {
        Self::beside(count, model.placed().and_then(|placed| Beside::new(count, placed.regions())))
    }

    /// [`Self::new`] with threads kept beside nodes, as many as `beside` was made for.
    ///
    /// # Errors
    /// As [`Self::new`], and when the system does not let a thread be kept on a node's processors.
    pub fn beside(count: usize, beside: Option<Beside>) -> Result<Self> {
        if count == 0 || count > 1024 {
            return Err(RuntimeError::BadRequest {
                what: "threads",
                found: count.to_string(),
                expected: "1 to 1024".to_string(),
            });
        }
        let pool =
            rayon::ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("tierwise-compute-{i}")).build().map_err(
                |e| RuntimeError::BadRequest {
                    what: "threads",
                    found: format!("{count} ({e})"),
                    expected: "a number of threads that the system allows".to_string(),
                },
            )?;
        if let Some(beside) = &beside {
            let kept: Vec<std::io::Result<()>> = pool.broadcast(|thread| numa::run_on(beside.cpus_of(thread.index())));
            kept.into_iter().collect::<std::io::Result<()>>().map_err(|e| RuntimeError::BadRequest {
                what: "threads beside memory nodes",
                found: format!("refused ({e})"),
                expected: "a process that may choose its processors (sched_setaffinity), or a machine file without numa_nodes"
                    .into(),
            })?;
        }
        Ok(Self {
            pool: Arc::new(pool),
            kernels: CpuKernels::best(),
            scratch: (0..count).map(|_| Mutex::default()).collect(),
            beside: beside.map(Arc::new),
        })
    }

    /// Does `work` for every piece, in parallel: on threads beside the memory that it reads most, if threads are kept beside memory.
    /// To be called on one of the threads.
    pub fn for_each_near<P: Send>(&self, pieces: Vec<P>, address: impl Fn(&P) -> usize, work: impl Fn(P) + Sync + Send) {
        match &self.beside {
            None => pieces.into_par_iter().with_max_len(1).for_each(work),
            Some(beside) => {
                let queues = beside.queues(pieces, address);
                self.pool.broadcast(|thread| {
                    while let Some(piece) = queues.next(thread.index()) {
                        work(piece);
                    }
                });
            }
        }
    }

    /// Number of threads.
    pub fn count(&self) -> usize {
        self.scratch.len()
    }

    /// The kernels for this processor.
    pub const fn kernels(&self) -> &'static CpuKernels {
        self.kernels
    }

    /// The pool; parallel iterators inside its `install` use it.
    pub fn pool(&self) -> Arc<rayon::ThreadPool> {
        Arc::clone(&self.pool)
    }

    /// Gives `f` the calling thread's working memory. Calls must not nest.
    pub fn with_scratch<R>(&self, f: impl FnOnce(&mut Scratch) -> R) -> R {
        let index = self.pool.current_thread_index().unwrap_or(0);
        // Scratch holds nothing between calls, so that of a thread that panicked is as good as any.
        f(&mut self.scratch[index].lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Rows below this many elements in all are worked on by the calling thread.
const SERIAL_ELEMENTS: usize = 32 << 10;

/// Calls `f` with every row of `data` and its index, in parallel when that pays.
pub fn for_rows(
    threads: &Threads,
    data: &mut [f32], /* [rows, width] */
    width: usize,
    f: impl Fn(usize, &mut [f32]) + Sync,
) {
    if threads.count() == 1 || data.len() < SERIAL_ELEMENTS {
        data.chunks_exact_mut(width).enumerate().for_each(|(i, row)| f(i, row));
    } else {
        let rows_at_once = (SERIAL_ELEMENTS / 4 / width).max(1);
        data.par_chunks_exact_mut(width).enumerate().with_min_len(rows_at_once).for_each(|(i, row)| f(i, row));
    }
}
