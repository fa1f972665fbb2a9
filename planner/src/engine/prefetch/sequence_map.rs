//! Sequences that went like this one: activation matrices, the nearest of which foretell the rest (MoE-Infinity, arXiv 2401.14361).
//!
//! The running sequence's matrix counts its demands per layer and expert. When a sequence ends (or, where nobody says so, after a fixed
//! number of steps) it is stored in the place of the one least like any other's use: the oldest that was nearest to nobody since. The
//! stored ones nearest by cosine give the guess, mixed with the running one.

use super::{Predictor, Shape, most_likely};

/// Matrices that are kept.
const STORED: usize = 64;

/// Nearest ones that are asked.
const NEAREST: usize = 4;

/// Steps after which a sequence is stored although it goes on.
const MAX_STEPS: u32 = 64;

/// Steps before which a sequence says too little to be stored.
const MIN_STEPS: u32 = 4;

/// The running sequence counts as this many of the nearest ones per step of it, up to [`NEAREST`].
const OWN_WEIGHT_PER_STEP: f32 = 0.25;

#[derive(Debug, Clone)]
struct Matrix {
    /// Share of the steps that demanded it. `[num_layers, num_experts]`
    means: Vec<f32>,
    norm: f32,
    /// When it was stored or last among the nearest, in sequences.
    used: u64,
}

/// Activation matrices.
#[derive(Debug, Clone)]
pub struct SequenceMap {
    shape: Shape,
    stored: Vec<Matrix>,
    /// Demands of the running sequence. `[num_layers, num_experts]`
    counts: Vec<f32>,
    steps: u32,
    running: Option<u64>,
    sequences: u64,
    /// Stored ones nearest to the running one with their similarity, as of the start of the step.
    nearest: Vec<(usize, f32)>,
}

impl SequenceMap {
    /// Knows nothing yet.
    pub fn new(shape: Shape) -> Self {
        let counts = vec![0.0; shape.num_layers * shape.num_experts];
        Self { shape, stored: Vec::new(), counts, steps: 0, running: None, sequences: 0, nearest: Vec::new() }
    }

    fn store(&mut self) {
        if self.steps >= MIN_STEPS {
            self.sequences += 1;
            let means: Vec<f32> = self.counts.iter().map(|c| c / self.steps as f32).collect();
            let norm = means.iter().map(|m| m * m).sum::<f32>().sqrt();
            let matrix = Matrix { means, norm, used: self.sequences };
            match (0..self.stored.len()).min_by_key(|m| self.stored[*m].used) {
                Some(oldest) if self.stored.len() == STORED => self.stored[oldest] = matrix,
                _ => self.stored.push(matrix),
            }
        }
        self.counts.fill(0.0);
        self.steps = 0;
    }

    fn find_nearest(&mut self) {
        let own = self.counts.iter().map(|c| c * c).sum::<f32>().sqrt();
        self.nearest.clear();
        if own <= 0.0 {
            return;
        }
        let dot = |m: &Matrix| self.counts.iter().zip(&m.means).map(|(a, b)| a * b).sum::<f32>();
        let likeness = |m: &Matrix| if m.norm > 0.0 { dot(m) / (own * m.norm) } else { 0.0 };
        self.nearest.extend(self.stored.iter().map(likeness).enumerate());
        self.nearest.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        self.nearest.truncate(NEAREST);
        for (m, _) in &self.nearest {
            self.stored[*m].used = self.sequences;
        }
    }
}

impl Predictor for SequenceMap {
    fn observe(&mut self, step: u64, index: usize, experts: &[(u32, u32)]) {
        if self.running != Some(step) {
            self.running = Some(step);
            if self.steps >= MAX_STEPS {
                self.store();
            }
            self.find_nearest();
            self.steps += 1;
        }
        let counts = &mut self.counts[self.shape.row(index)];
        experts.iter().for_each(|(e, _)| counts[*e as usize] += 1.0);
    }

    fn predict(&mut self, index: usize, distance: usize, limit: usize) -> Vec<(u32, f64)> {
        if index + distance >= self.shape.num_layers {
            return Vec::new();
        }
        let row = self.shape.row(index + distance);
        // The running step has not come to that layer.
        let before = self.steps.saturating_sub(1) as f32;
        let own_weight = (before * OWN_WEIGHT_PER_STEP).min(NEAREST as f32);
        let start = self.shape.experts_per_token as f32 / self.shape.num_experts as f32;
        let total = own_weight + self.nearest.iter().map(|n| n.1).sum::<f32>() + 0.1;
        let mut means = vec![0.1 * start; self.shape.num_experts];
        for (m, weight) in &self.nearest {
            means.iter_mut().zip(&self.stored[*m].means[row.clone()]).for_each(|(sum, mean)| *sum += weight * mean);
        }
        if before > 0.0 {
            means.iter_mut().zip(&self.counts[row]).for_each(|(sum, count)| *sum += own_weight * count / before);
        }
        most_likely(means.into_iter().map(|mean| mean / total), limit)
    }

    fn new_sequence(&mut self) {
        self.store();
        self.nearest.clear();
    }
}
