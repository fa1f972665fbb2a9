//! A trace in two parts, by whole sequences.

use super::{RoutingTrace, bad};
use crate::error::PlanError;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use std::collections::BTreeMap;

/// Some sequences of a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Indices into the trace's sequences, ascending.
    pub sequences: Vec<usize>,
}

impl RoutingTrace {
    /// All sequences.
    pub fn all(&self) -> Part {
        Part { sequences: (0..self.sequences.len()).collect() }
    }

    /// The tokens of a part, in order.
    pub fn tokens<'a>(&'a self, part: &'a Part) -> impl Iterator<Item = usize> + 'a {
        part.sequences.iter().flat_map(|s| self.sequences[*s].tokens.clone())
    }

    /// Number of tokens of a part.
    pub fn num_tokens_of(&self, part: &Part) -> usize {
        part.sequences.iter().map(|s| self.sequences[*s].tokens.len()).sum()
    }

    /// (train, test): whole sequences, shuffled by `seed`, about `train_fraction` of the tokens of every label in train. Neither part is
    /// empty.
    ///
    /// # Errors
    /// [`PlanError::BadTrace`] with one sequence only, or a fraction that leaves nothing for one part.
    pub fn split(&self, train_fraction: f64, seed: u64) -> Result<(Part, Part), PlanError> {
        if !(train_fraction > 0.0 && train_fraction < 1.0) {
            return bad("the train fraction", train_fraction, "above 0 and below 1");
        }
        if self.sequences.len() < 2 {
            return bad("sequences", "1", "at least 2: one to train on, another to test on");
        }
        let mut by_label: BTreeMap<Option<&str>, Vec<usize>> = BTreeMap::new();
        for (i, s) in self.sequences.iter().enumerate() {
            by_label.entry(s.label.as_deref()).or_default().push(i);
        }
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut train, mut test) = (Vec::new(), Vec::new());
        // Label after label, each sequence to the side that is behind its share. What one label rounds off, the next makes up for, so
        // that labels of a single sequence do not all end up on one side.
        let (mut in_train, mut so_far) = (0.0, 0.0);
        for mut group in by_label.into_values() {
            group.shuffle(&mut rng);
            for i in group {
                let len = self.sequences[i].tokens.len() as f64;
                so_far += len;
                if in_train + len / 2.0 < train_fraction * so_far {
                    in_train += len;
                    train.push(i);
                } else {
                    test.push(i);
                }
            }
        }
        // Very small or large fractions: the last one decided goes to the side that has none.
        if train.is_empty() {
            train.extend(test.pop());
        }
        if test.is_empty() {
            test.extend(train.pop());
        }
        train.sort_unstable();
        test.sort_unstable();
        Ok((Part { sequences: train }, Part { sequences: test }))
    }
}
