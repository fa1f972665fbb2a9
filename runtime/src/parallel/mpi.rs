//! Ranks as processes, over MPI (tried with Open MPI 4.1).
//!
//! Messages are sent without blocking and looked for without blocking, so that a silent rank is found out at the deadline. A rank that
//! dies is the launcher's affair: `mpirun` ends all others within moments. A rank that gives up says why and ends all others itself:
//! whoever left without that would make the others wait for it in `MPI_Finalize`.

use super::channels::silent;
use super::transport::Transport;
use crate::error::{Result, RuntimeError};
use mpi::Threading;
use mpi::environment::Universe;
use mpi::request::{Request, Scope};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Destination, Equivalence, Source};
use std::time::{Duration, Instant};

/// MPI in this process; kept by the main thread until all ranks are done.
pub struct MpiJob {
    /// Finalised when dropped.
    _universe: Universe,
}

impl MpiJob {
    /// Starts MPI. Without a launcher the process is the only rank.
    ///
    /// # Errors
    /// When it runs already, or its library cannot be used by more than one thread.
    pub fn start() -> Result<Self> {
        let refused = |found: String| RuntimeError::BadRequest {
            what: "MPI",
            found,
            expected: "one start per process of a library with thread support (MPI_THREAD_SERIALIZED)".into(),
        };
        match mpi::initialize_with_threading(Threading::Serialized) {
            None => Err(refused("a second start".into())),
            Some((_, got)) if got < Threading::Serialized => Err(refused(format!("{got:?}"))),
            Some((universe, _)) => Ok(Self { _universe: universe }),
        }
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        SimpleCommunicator::world().size() as usize
    }

    /// The way to the other ranks; a rank that is silent for longer than `deadline` is an error.
    pub fn transport(&self, deadline: Duration) -> MpiTransport {
        let world = SimpleCommunicator::world();
        MpiTransport { rank: world.rank() as usize, size: world.size() as usize, deadline }
    }
}

impl Drop for MpiJob {
    fn drop(&mut self) {
        // The others would wait for this rank's end in theirs.
        if std::thread::panicking() {
            SimpleCommunicator::world().abort(101);
        }
    }
}

/// A rank's way to the others.
pub struct MpiTransport {
    rank: usize,
    size: usize,
    deadline: Duration,
}

impl MpiTransport {
    /// Ends the job because of another rank.
    fn give_up(&mut self, rank: usize, reason: String) -> ! {
        let error = RuntimeError::Rank { rank, reason };
        self.abort(&error.to_string());
        unreachable!("MPI_Abort does not return")
    }
}

/// Those under way, each with the other rank.
fn unfinished<'a, S: Scope<'a>>(requests: Vec<(usize, Request<'a, [u8], S>)>) -> Vec<(usize, Request<'a, [u8], S>)> {
    requests.into_iter().filter_map(|(rank, r)| r.test().err().map(|r| (rank, r))).collect()
}

impl Transport for MpiTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn describe(&self) -> String {
        let library = mpi::environment::library_version().unwrap_or_default();
        let library = library.split([',', '\n', '\0']).next().unwrap_or_default().to_string();
        format!("{} processes over {library}", self.size)
    }

    fn exchange(&mut self, what: &str, send: &[(usize, &[u8])], receive: &[usize]) -> Result<Vec<Vec<u8>>> {
        let world = SimpleCommunicator::world();
        if let Some((to, bytes)) = send.iter().find(|(_, b)| i32::try_from(b.len()).is_err()) {
            return Err(RuntimeError::Rank {
                rank: *to,
                reason: format!("{} bytes for it in one message ({what}); expected fewer than 2^31: smaller chunks", bytes.len()),
            });
        }
        let mut received = vec![Vec::new(); receive.len()];
        // Requests live no longer than the buffers, which is what the scope is for.
        mpi::request::scope(|scope| {
            let mut sending = Vec::with_capacity(send.len());
            for (to, bytes) in send {
                sending.push((*to, world.process_at_rank(*to as i32).immediate_send(scope, *bytes)));
            }
            let mut expected: Vec<(usize, &mut Vec<u8>)> = receive.iter().copied().zip(&mut received).collect();
            let mut receiving = Vec::with_capacity(receive.len());
            let mut last = Instant::now();
            loop {
                let before = (expected.len(), receiving.len(), sending.len());
                for (from, place) in std::mem::take(&mut expected) {
                    let Some((message, status)) = world.process_at_rank(from as i32).immediate_matched_probe() else {
                        expected.push((from, place));
                        continue;
                    };
                    // What is announced is not here yet: large messages come in pieces, and the sender may stop between two of them.
                    place.resize(status.count(u8::equivalent_datatype()) as usize, 0);
                    receiving.push((from, message.immediate_matched_receive_into(scope, place.as_mut_slice())));
                }
                receiving = unfinished(receiving);
                sending = unfinished(sending);
                let others = expected.iter().map(|e| e.0).chain(receiving.iter().map(|r| r.0)).chain(sending.iter().map(|s| s.0));
                let Some(silent_rank) = others.min() else { break };
                if before != (expected.len(), receiving.len(), sending.len()) {
                    last = Instant::now();
                } else if last.elapsed() > self.deadline {
                    // Messages under way cannot be taken back: there is no return from here.
                    self.give_up(silent_rank, silent(what, self.deadline));
                } else {
                    // Ranks may share a processor.
                    std::thread::yield_now();
                }
            }
        });
        Ok(received)
    }

    fn abort(&mut self, reason: &str) {
        eprintln!("error: rank {} ends the job: {reason}", self.rank);
        SimpleCommunicator::world().abort(1);
    }
}
