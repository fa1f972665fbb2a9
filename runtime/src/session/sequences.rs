//! Several sequences of one session, computed together: one model, one engine, one cache of experts.
//!
//! A step's rows are the new tokens of all its sequences: a weight is read once for all of them, and experts are grouped over all of them,
//! so that the engine is asked once per layer and step. The plan says how many sequences there is room for (its batch) and how long they
//! may become (its context).

use super::{SequenceId, Session};
use crate::error::{Result, RuntimeError};
use crate::exec::sequences::SequenceTokens;
use ndarray::ArrayView2;
use std::time::Instant;
use tierwise_cost::units::Bytes;

impl Session {
    /// One more sequence, empty, with a cache of its own.
    ///
    /// # Errors
    /// When the plan has no room for it, on a device, or when the system refuses the memory.
    pub fn add_sequence(&mut self) -> Result<SequenceId> {
        let open = self.executor.sequences().len();
        // A device says first that it has no others at all.
        if open >= self.most_sequences && self.device().is_none() {
            let each = Bytes(self.executor.kv_bytes().0 / open as u64);
            return Err(RuntimeError::BadRequest {
                what: "sequences",
                found: format!("{} at once", open + 1),
                expected: format!(
                    "at most {}: the plan has room for keys and values of so many, {each} each for {} tokens; plan with a larger --batch",
                    self.most_sequences,
                    self.context()
                ),
            });
        }
        self.executor.add_sequence(&self.model)
    }

    /// Ends a sequence that was added, and gives its memory back. Loaded experts stay.
    ///
    /// # Errors
    /// For the first one, which stays ([`Self::reset`] empties it), and one that is not there.
    pub fn remove_sequence(&mut self, sequence: SequenceId) -> Result<()> {
        if sequence == SequenceId::FIRST {
            return Err(RuntimeError::BadRequest {
                what: "sequence",
                found: "the session's first, to be removed".to_string(),
                expected: "one that was added; the first can be emptied".to_string(),
            });
        }
        if self.executor.remove_sequence(sequence) { Ok(()) } else { Err(self.unknown(sequence)) }
    }

    /// All sequences, the oldest first.
    pub fn sequences(&self) -> Vec<SequenceId> {
        self.executor.sequences()
    }

    /// Sequences that the plan has room for.
    pub const fn most_sequences(&self) -> usize {
        self.most_sequences
    }

    /// Tokens that a sequence has in its cache.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub fn sequence_len(&self, sequence: SequenceId) -> Result<usize> {
        self.executor.len(sequence).ok_or_else(|| self.unknown(sequence))
    }

    /// Forgets a sequence's tokens from `len` on.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub fn truncate_sequence(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        if sequence == SequenceId::FIRST {
            self.truncate(len);
            return Ok(());
        }
        if self.executor.truncate(sequence, len) { Ok(()) } else { Err(self.unknown(sequence)) }
    }

    /// Computes new tokens of some sequences together: one of each to decode them, or (a part of) a prompt. Logits after the last token
    /// of each, in the order of `parts`: `[sequences, vocab_size]`.
    ///
    /// More tokens than the plan's chunk are computed in several goes, in the order of `parts`.
    ///
    /// # Errors
    /// For no sequence, one that is not there or there twice, on a device for any but the first; for each sequence as [`Self::prefill`].
    /// Nothing is computed then, unless an expert cannot be read.
    pub fn step(&mut self, parts: &[(SequenceId, &[u32])]) -> Result<ArrayView2<'_, f32>> {
        self.check_parts(parts)?;
        let start = Instant::now();
        let vocab = self.model.spec().vocab_size as usize;
        let Self { model, executor, driver, step_logits, .. } = self;
        step_logits.clear();
        step_logits.resize(parts.len() * vocab, 0.0);
        let mut left: Vec<(usize, SequenceId, &[u32])> = parts.iter().enumerate().map(|(i, (id, t))| (i, *id, *t)).collect();
        while !left.is_empty() {
            let (now, later) = first_tokens(&left, self.chunk_tokens.max(self.most_sequences));
            let of_step: Vec<_> =
                now.iter().map(|(_, sequence, tokens)| SequenceTokens { sequence: *sequence, tokens, wanted: 1 }).collect();
            executor.step(model, driver, &of_step, &mut |first, block| {
                for (row, (part, ..)) in block.rows().into_iter().zip(&now[first..]) {
                    // Those of a sequence that goes on are overwritten by its next ones.
                    let row = row.to_slice().expect("logits are row-major");
                    step_logits[part * vocab..(part + 1) * vocab].copy_from_slice(row);
                }
            })?;
            left = later;
        }
        if let Some(first) = parts.iter().position(|(id, _)| *id == SequenceId::FIRST) {
            self.logits.clear();
            self.logits.extend_from_slice(&self.step_logits[first * vocab..(first + 1) * vocab]);
        }
        let tokens: usize = parts.iter().map(|(_, tokens)| tokens.len()).sum();
        let counted = if tokens == parts.len() { &mut self.decode } else { &mut self.prefill };
        counted.0 += tokens;
        counted.1 += start.elapsed();
        Ok(ArrayView2::from_shape((parts.len(), vocab), &self.step_logits).expect("sized above"))
    }

    fn check_parts(&self, parts: &[(SequenceId, &[u32])]) -> Result<()> {
        let bad = |found: String, expected: &str| {
            Err(RuntimeError::BadRequest { what: "sequences of a step", found, expected: expected.to_string() })
        };
        if parts.is_empty() {
            return bad("none".to_string(), "at least one");
        }
        for (i, (id, tokens)) in parts.iter().enumerate() {
            self.check_tokens(self.sequence_len(*id)?, tokens)?;
            if parts[..i].iter().any(|(other, _)| other == id) {
                return bad(format!("number {id} twice"), "each sequence once, with all its new tokens");
            }
        }
        Ok(())
    }

    fn unknown(&self, sequence: SequenceId) -> RuntimeError {
        let there: Vec<String> = self.sequences().iter().map(ToString::to_string).collect();
        RuntimeError::BadRequest {
            what: "sequence",
            found: format!("number {sequence}"),
            expected: format!("one that was added and not removed since: {}", there.join(", ")),
        }
    }
}

/// Tokens of one part of a step: the part's number, its sequence, the tokens.
type PartTokens<'a> = (usize, SequenceId, &'a [u32]);

/// The first `most` tokens of all, and the rest.
fn first_tokens<'a>(all: &[PartTokens<'a>], most: usize) -> (Vec<PartTokens<'a>>, Vec<PartTokens<'a>>) {
    let (mut now, mut later) = (Vec::with_capacity(all.len()), Vec::new());
    let mut room = most;
    for (part, sequence, tokens) in all {
        let (first, rest) = tokens.split_at(room.min(tokens.len()));
        room -= first.len();
        for (list, tokens) in [(&mut now, first), (&mut later, rest)] {
            if !tokens.is_empty() {
                list.push((*part, *sequence, tokens));
            }
        }
    }
    (now, later)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_cut_in_order_and_no_token_is_lost() {
        let id = SequenceId::FIRST;
        let (a, b, c) = ([1, 2, 3, 4, 5], [6], [7, 8]);
        let all = [(0, id, &a[..]), (1, id, &b[..]), (2, id, &c[..])];
        let (now, later) = first_tokens(&all, 4);
        assert_eq!(now, [(0, id, &a[..4])]);
        assert_eq!(later, [(0, id, &a[4..]), (1, id, &b[..]), (2, id, &c[..])]);
        let (now, later) = first_tokens(&later, 3);
        assert_eq!(now, [(0, id, &a[4..]), (1, id, &b[..]), (2, id, &c[..1])]);
        assert_eq!(later, [(2, id, &c[1..])]);
        let (now, later) = first_tokens(&later, 3);
        assert_eq!(now, [(2, id, &c[1..])]);
        assert!(later.is_empty());
    }
}
