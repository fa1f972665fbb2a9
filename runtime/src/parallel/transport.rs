//! Messages between ranks: one primitive, and what is made of it.
//!
//! Ranks run in lockstep and know of each other's messages from numbers that all of them have, so a message needs neither a tag nor a length
//! known before: one from each rank that is named, in order.

use crate::error::Result;

/// A rank's way to the others.
pub trait Transport: Send {
    /// This rank, counted from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// What carries the messages, in a few words.
    fn describe(&self) -> String;

    /// Sends each `(rank, bytes)` and receives one message from every rank of `receive`, in that order. Neither names this rank, or another
    /// one twice. `what` is for errors.
    ///
    /// # Errors
    /// When a rank is gone, has ended the job, or is silent beyond the deadline; the transport is of no use after that.
    fn exchange(&mut self, what: &str, send: &[(usize, &[u8])], receive: &[usize]) -> Result<Vec<Vec<u8>>>;

    /// Ends the job of all ranks, with a reason. Over MPI this does not return.
    fn abort(&mut self, reason: &str);

    /// A message to every rank and one from every rank, the own one included. `[ranks]`
    ///
    /// # Errors
    /// As [`Self::exchange`].
    fn all_to_all(&mut self, what: &str, mut messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        let (me, size) = (self.rank(), self.size());
        let own = std::mem::take(&mut messages[me]);
        // Everyone begins with another one.
        let send: Vec<(usize, &[u8])> = (1..size).map(|i| (me + i) % size).map(|to| (to, messages[to].as_slice())).collect();
        let others: Vec<usize> = (0..size).filter(|r| *r != me).collect();
        let mut received = self.exchange(what, &send, &others)?;
        received.insert(me, own);
        Ok(received)
    }

    /// The same message to every rank. `[ranks]`
    ///
    /// # Errors
    /// As [`Self::exchange`].
    fn all_gather(&mut self, what: &str, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (me, size) = (self.rank(), self.size());
        let send: Vec<(usize, &[u8])> = (1..size).map(|i| ((me + i) % size, mine)).collect();
        let others: Vec<usize> = (0..size).filter(|r| *r != me).collect();
        let mut received = self.exchange(what, &send, &others)?;
        received.insert(me, mine.to_vec());
        Ok(received)
    }

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// As [`Self::exchange`].
    fn barrier(&mut self) -> Result<()> {
        self.all_gather("barrier", &[]).map(drop)
    }
}
