//! The sequences of a session, and which of them a step computes.
//!
//! A step has rows: the new tokens of one sequence, then those of the next. All but attention looks at rows alone, so that weights are
//! read once for all sequences; attention and states belong to a sequence each, and so do the positions of its rows.

use super::kv_cache::KvCache;
use crate::error::Result;
use tierwise_cost::model::ModelSpec;
use tierwise_cost::quant::QuantFormat;

/// A sequence of a session. A number is given once: that of a removed sequence is not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(u64);

impl SequenceId {
    /// The sequence that every session has from the start, and that cannot be removed.
    pub const FIRST: Self = Self(0);
}

impl std::fmt::Display for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// New tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct SequenceTokens<'a> {
    /// The sequence. Once in a step.
    pub sequence: SequenceId,
    /// What is computed after its cached positions; at least one.
    pub tokens: &'a [u32],
    /// How many of the last of them have their logits given out; at least one.
    pub wanted: usize,
}

/// What is kept of one sequence.
#[derive(Debug)]
pub struct Sequence {
    id: SequenceId,
    /// Its keys, values and states.
    pub kv: KvCache,
    /// Tokens in the cache, kept where states may have to be computed again.
    pub history: Vec<u32>,
}

/// All sequences of a session.
#[derive(Debug)]
pub struct Sequences {
    all: Vec<Sequence>,
    next: u64,
    context: usize,
    kv_format: QuantFormat,
}

impl Sequences {
    /// The first sequence, empty, of at most `context` positions.
    ///
    /// # Errors
    /// As [`KvCache::new`].
    pub fn new(spec: &ModelSpec, context: usize, kv_format: QuantFormat) -> Result<Self> {
        let mut sequences = Self { all: Vec::with_capacity(1), next: 0, context, kv_format };
        sequences.add(spec)?;
        Ok(sequences)
    }

    /// One more, empty.
    ///
    /// # Errors
    /// As [`KvCache::new`].
    pub fn add(&mut self, spec: &ModelSpec) -> Result<SequenceId> {
        let kv = KvCache::new(spec, self.context, self.kv_format)?;
        let id = SequenceId(self.next);
        self.next += 1;
        self.all.push(Sequence { id, kv, history: Vec::new() });
        Ok(id)
    }

    /// Gives a sequence's memory back; `false` when there is none of this number, or it is the first.
    pub fn remove(&mut self, id: SequenceId) -> bool {
        let place = self.place(id).filter(|_| id != SequenceId::FIRST);
        if let Some(place) = place {
            self.all.remove(place);
        }
        place.is_some()
    }

    /// Where a sequence is among [`Self::all`].
    pub fn place(&self, id: SequenceId) -> Option<usize> {
        self.all.iter().position(|s| s.id == id)
    }

    /// A sequence's cache.
    pub fn kv(&self, id: SequenceId) -> Option<&KvCache> {
        self.place(id).map(|place| &self.all[place].kv)
    }

    /// A sequence's cache, to forget positions.
    pub fn kv_mut(&mut self, id: SequenceId) -> Option<&mut KvCache> {
        self.place(id).map(|place| &mut self.all[place].kv)
    }

    /// The cache of [`SequenceId::FIRST`], which is always there and never moves.
    pub fn first(&self) -> &KvCache {
        &self.all[0].kv
    }

    /// All of them, the oldest first.
    pub fn all(&self) -> &[Sequence] {
        &self.all
    }

    /// All of them, the oldest first.
    pub fn all_mut(&mut self) -> &mut [Sequence] {
        &mut self.all
    }

    /// Positions that each can hold.
    pub const fn context(&self) -> usize {
        self.context
    }
}

impl Sequence {
    /// Its number.
    pub const fn id(&self) -> SequenceId {
        self.id
    }
}

/// Rows of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The sequence's place among [`Sequences::all`].
    pub place: usize,
    /// Position of the first row.
    pub position: usize,
    /// First row.
    pub first_row: usize,
    /// Number of rows.
    pub rows: usize,
}

impl Part {
    /// Its rows of a buffer of `width` elements per row.
    pub fn of<'x>(&self, width: usize, x: &'x [f32] /* [rows, width] */) -> &'x [f32] {
        &x[self.first_row * width..(self.first_row + self.rows) * width]
    }
}

/// What the rows of a step are.
#[derive(Debug)]
pub struct StepRows {
    /// One per sequence, in the order of the rows.
    pub parts: Vec<Part>,
    /// `[rows]`
    pub tokens: Vec<u32>,
    /// Rows that go on after the last layer's attention, ascending: those whose logits are wanted if others are dropped there, else all.
    pub kept: Vec<u32>,
    /// Which of the kept rows have their logits given out, ascending.
    pub wanted: Vec<u32>,
}

impl StepRows {
    /// The rows of a step over `of_step`. With `drop_others` only rows whose logits are wanted go on from the last layer's attention.
    pub fn new(sequences: &Sequences, of_step: &[SequenceTokens<'_>], drop_others: bool) -> Self {
        let mut step =
            Self { parts: Vec::with_capacity(of_step.len()), tokens: Vec::new(), kept: Vec::new(), wanted: Vec::new() };
        for part in of_step {
            let place = sequences.place(part.sequence).expect("the session has checked the sequences of a step");
            let (first_row, rows) = (step.tokens.len(), part.tokens.len());
            step.parts.push(Part { place, position: sequences.all[place].kv.len(), first_row, rows });
            step.tokens.extend_from_slice(part.tokens);
            let end = step.tokens.len() as u32;
            step.wanted.extend(end - part.wanted.min(rows) as u32..end);
        }
        let rows = step.tokens.len() as u32;
        if drop_others {
            step.kept = std::mem::take(&mut step.wanted);
            step.wanted = (0..step.kept.len() as u32).collect();
        } else {
            step.kept = (0..rows).collect();
        }
        step
    }

    /// Position of the first row and number of rows, part by part.
    pub fn ranges(&self) -> Vec<(usize, usize)> {
        self.parts.iter().map(|p| (p.position, p.rows)).collect()
    }

    /// Position of every row in its sequence.
    pub fn positions(&self) -> Vec<usize> {
        self.parts.iter().flat_map(|p| p.position..p.position + p.rows).collect()
    }
}
