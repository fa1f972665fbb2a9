//! Ranks as threads of one process, with a channel from each to each.
//!
//! What runs on them is what runs over MPI, so every test of the ordinary suite that uses them is a test of that too.

use super::transport::Transport;
use crate::error::{Result, RuntimeError};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

enum Message {
    Bytes(Vec<u8>),
    /// The sender has ended the job, for this reason.
    Stop(String),
}

/// One of the ranks of [`group`].
pub struct ChannelTransport {
    rank: usize,
    deadline: Duration,
    /// To and from each rank; those of the own rank are not used. `[ranks]`
    to: Vec<Sender<Message>>,
    from: Vec<Receiver<Message>>,
}

/// As many ranks, connected; a rank that is silent for longer than `deadline` is an error.
pub fn group(size: usize, deadline: Duration) -> Vec<ChannelTransport> {
    let (mut senders, mut receivers): (Vec<Vec<_>>, Vec<Vec<_>>) = Default::default();
    senders.resize_with(size, Vec::new);
    receivers.resize_with(size, Vec::new);
    for of_source in &mut senders {
        for of_target in &mut receivers {
            let (to, from) = channel();
            of_source.push(to);
            of_target.push(from);
        }
    }
    let rank = |(rank, (to, from))| ChannelTransport { rank, deadline, to, from };
    senders.into_iter().zip(receivers).enumerate().map(rank).collect()
}

/// Runs `work` on `size` ranks, each a thread of this process. Results by rank; a rank that panicked gives an error.
pub fn run_threads<T: Send, E: Send + From<RuntimeError>>(
    size: usize,
    deadline: Duration,
    work: impl Fn(ChannelTransport) -> Result<T, E> + Sync,
) -> Vec<Result<T, E>> {
    let work = &work;
    std::thread::scope(|scope| {
        let start = |t: ChannelTransport| (t.rank, scope.spawn(move || work(t)));
        let running: Vec<_> = group(size, deadline).into_iter().map(start).collect();
        let panicked = |rank| RuntimeError::Rank { rank, reason: "its thread panicked".into() };
        running.into_iter().map(|(rank, thread)| thread.join().unwrap_or_else(|_| Err(panicked(rank).into()))).collect()
    })
}

impl Transport for ChannelTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn describe(&self) -> String {
        format!("{} threads of one process", self.to.len())
    }

    fn exchange(&mut self, what: &str, send: &[(usize, &[u8])], receive: &[usize]) -> Result<Vec<Vec<u8>>> {
        for (to, bytes) in send {
            // One that is gone may have said why: that is read below.
            let _ = self.to[*to].send(Message::Bytes(bytes.to_vec()));
        }
        let mut received = Vec::with_capacity(receive.len());
        for from in receive {
            let reason = match self.from[*from].recv_timeout(self.deadline) {
                Ok(Message::Bytes(bytes)) => {
                    received.push(bytes);
                    continue;
                }
                Ok(Message::Stop(reason)) => format!("ended the job: {reason}"),
                Err(RecvTimeoutError::Disconnected) => format!("is gone ({what}): its thread ended before the job did"),
                Err(RecvTimeoutError::Timeout) => silent(what, self.deadline),
            };
            return Err(RuntimeError::Rank { rank: *from, reason });
        }
        Ok(received)
    }

    fn abort(&mut self, reason: &str) {
        for (_, to) in self.to.iter().enumerate().filter(|(r, _)| *r != self.rank) {
            // Who is gone need not be told.
            let _ = to.send(Message::Stop(reason.to_string()));
        }
    }
}

/// What is said of a rank that does not answer.
pub(super) fn silent(what: &str, deadline: Duration) -> String {
    format!(
        "is silent for {} s ({what}): it hangs, or is slower than the deadline allows; look at it, or give a longer deadline",
        deadline.as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn everyone_gets_what_was_sent_to_it() {
        for size in 1..=8 {
            let results = run_threads(size, LONG, |mut t| {
                for round in 0..20_usize {
                    let to = |r: usize| vec![t.rank() as u8; (t.rank() * 7 + r * 3 + round) % 11];
                    let got = t.all_to_all("test", (0..size).map(to).collect())?;
                    for (from, bytes) in got.iter().enumerate() {
                        assert_eq!(*bytes, vec![from as u8; (from * 7 + t.rank() * 3 + round) % 11]);
                    }
                    let all = t.all_gather("test", &[t.rank() as u8, round as u8])?;
                    assert!(all.iter().enumerate().all(|(r, b)| *b == [r as u8, round as u8]));
                }
                t.barrier()
            });
            results.into_iter().for_each(|r| r.expect("nobody is gone"));
        }
    }

    #[test]
    fn a_rank_that_ends_is_named_by_all_others() {
        let results = run_threads(4, LONG, |mut t| {
            if t.rank() == 2 {
                return Ok(());
            }
            t.barrier().inspect_err(|e| t.abort(&e.to_string()))
        });
        for (rank, result) in results.into_iter().enumerate().filter(|(r, _)| *r != 2) {
            let error = result.expect_err("rank 2 is gone").to_string();
            assert!(error.contains("rank 2: is gone (barrier)"), "rank {rank}: {error}");
        }
    }

    #[test]
    fn a_reason_reaches_everyone() {
        let results = run_threads(3, LONG, |mut t| {
            if t.rank() == 1 {
                t.abort("its disk is full");
                return Ok(());
            }
            t.barrier().inspect_err(|e| t.abort(&e.to_string()))
        });
        for rank in [0, 2] {
            let error = results[rank].as_ref().expect_err("ended").to_string();
            assert!(error.contains("rank 1: ended the job: its disk is full"), "{error}");
        }
    }

    #[test]
    fn a_silent_rank_is_found_out_at_the_deadline() {
        // On a busy machine threads may begin late; the silent one is there until the others have given it up.
        let (begun, given_up) = (std::sync::Barrier::new(3), std::sync::Barrier::new(3));
        let results = run_threads(3, Duration::from_secs(3), |mut t| {
            begun.wait();
            let result = if t.rank() == 1 { Ok(()) } else { t.barrier().inspect_err(|e| t.abort(&e.to_string())) };
            given_up.wait();
            result
        });
        for rank in [0, 2] {
            let error = results[rank].as_ref().expect_err("silent").to_string();
            assert!(error.contains("rank 1: is silent for 3 s (barrier)"), "{error}");
        }
    }

    #[test]
    fn a_panic_is_an_error() {
        let results = run_threads(2, LONG, |mut t| {
            assert!(t.rank() == 0, "rank 1 fails on purpose");
            t.barrier()
        });
        assert!(results[0].as_ref().is_err_and(|e| e.to_string().contains("rank 1: is gone")));
        assert!(results[1].as_ref().is_err_and(|e| e.to_string().contains("rank 1: its thread panicked")));
    }
}
