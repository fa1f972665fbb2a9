//! Rotary position embedding (Su et al., arXiv 2104.09864) with tables shared by all layers and heads of a step.

use tierwise_cost::model::{Rope, RopePairing};

/// Cosines and sines of a range of positions for one kind of rotation.
#[derive(Debug)]
pub struct RopeTable {
    rope: Rope,
    /// First position and number of positions.
    range: (usize, usize),
    /// `[positions, rotary_dim / 2]` of (cos, sin).
    cos_sin: Vec<(f32, f32)>,
}

impl RopeTable {
    /// An empty table.
    pub const fn new(rope: Rope) -> Self {
        Self { rope, range: (0, 0), cos_sin: Vec::new() }
    }

    /// The rotation this table is for.
    pub const fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Fills the table for positions `start..start + tokens`. Angles are computed in f64.
    pub fn fill(&mut self, start: usize, tokens: usize) {
        if self.range == (start, tokens) {
            return;
        }
        self.range = (start, tokens);
        self.cos_sin.clear();
        let dim = f64::from(self.rope.rotary_dim);
        for position in start..start + tokens {
            for pair in 0..self.rope.rotary_dim / 2 {
                let frequency = f64::from(self.rope.theta).powf(-2.0 * f64::from(pair) / dim);
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                self.cos_sin.push((cos as f32, sin as f32));
            }
        }
    }

    /// Rotates every head of one row, which is at the table's position number `index`, in place.
    pub fn apply(&self, index: usize, row: &mut [f32] /* [heads * head_dim] */, head_dim: usize) {
        let half = self.rope.rotary_dim as usize / 2;
        let table = &self.cos_sin[index * half..(index + 1) * half];
        for head in row.chunks_exact_mut(head_dim) {
            match self.rope.pairing {
                RopePairing::Halves => {
                    let (low, high) = head[..2 * half].split_at_mut(half);
                    for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(table) {
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
                RopePairing::Interleaved => {
                    for (pair, (cos, sin)) in head[..2 * half].chunks_exact_mut(2).zip(table) {
                        (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_keeps_relative_angles() {
        for pairing in [RopePairing::Halves, RopePairing::Interleaved] {
            let rope = Rope { theta: 10_000.0, rotary_dim: 6, pairing };
            let q: Vec<f32> = (0..8).map(|i| (i as f32).cos()).collect();
            let k: Vec<f32> = (0..8).map(|i| (i as f32 * 1.7).sin()).collect();
            let rotated = |x: &[f32], position| {
                let mut table = RopeTable::new(rope.clone());
                table.fill(position, 1);
                let mut row = x.to_vec();
                table.apply(0, &mut row, 8);
                row
            };
            let dot = |a: Vec<f32>, b: Vec<f32>| a.iter().zip(&b).map(|(x, y)| x * y).sum::<f32>();
            assert_eq!(rotated(&q, 0), q);
            assert_eq!(rotated(&q, 5)[6..], q[6..], "dimensions beyond rotary_dim stay");
            let near = dot(rotated(&q, 9), rotated(&k, 4));
            let far = dot(rotated(&q, 105), rotated(&k, 100));
            assert!((near - far).abs() < 1e-4, "{near} {far}");
            let other = dot(rotated(&q, 9), rotated(&k, 7));
            assert!((near - other).abs() > 1e-3, "another distance gives another product");
        }
    }
}
