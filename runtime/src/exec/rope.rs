//! Rotary position embedding (Su et al., arXiv 2104.09864) with tables shared by all layers and heads of a step.

use std::f64::consts::PI;
use tierwise_cost::model::{Rope, RopePairing, RopeScaling};

/// Radians per position of each pair of dimensions, `[rotary_dim / 2]`, and the factor on what is rotated.
///
/// `context` is the longest context of the session: LongRoPE has a set for short ones and a set for long ones, and keys that are in the
/// cache cannot change theirs. Formulas: transformers, `modeling_rope_utils.py`.
pub fn frequencies(rope: &Rope, context: usize) -> (Vec<f64>, f64) {
    let (theta, dim) = (f64::from(rope.theta), f64::from(rope.rotary_dim));
    let plain = (0..rope.rotary_dim / 2).map(|pair| theta.powf(-2.0 * f64::from(pair) / dim));
    let divided = |plain: &mut dyn Iterator<Item = f64>, divisors: &[f32]| -> Vec<f64> {
        plain.zip(divisors).map(|(f, d)| f / f64::from(*d)).collect()
    };
    let mut plain = plain;
    match &rope.scaling {
        None => (plain.collect(), 1.0),
        Some(RopeScaling::Linear { factor }) => (plain.map(|f| f / f64::from(*factor)).collect(), 1.0),
        Some(RopeScaling::Divisors { divisors }) => (divided(&mut plain, divisors), 1.0),
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }) => {
            let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
            let scale = |f: f64| {
                // Rotations over the original context: all of the frequency from `high` on, none of it below `low`.
                let rotations = f64::from(*original_context) * f / (2.0 * PI);
                let kept = match () {
                    () if rotations >= high => 1.0,
                    () if rotations <= low => 0.0,
                    () => (rotations - low) / (high - low),
                };
                f * kept + f / f64::from(*factor) * (1.0 - kept)
            };
            (plain.map(scale).collect(), 1.0)
        }
        Some(RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, truncate }) => {
            // The dimension that rotates so many times over the original context.
            let dimension = |rotations: f32| {
                dim * (f64::from(*original_context) / (f64::from(rotations) * 2.0 * PI)).ln() / (2.0 * theta.ln())
            };
            let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(dim - 1.0));
            if low == high {
                high += 0.001;
            }
            let scale = |(pair, f): (usize, f64)| {
                let kept = 1.0 - ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                f * kept + f / f64::from(*factor) * (1.0 - kept)
            };
            (plain.enumerate().map(scale).collect(), f64::from(*attention_factor))
        }
        Some(RopeScaling::LongRope {
            original_context,
            short_divisors,
            long_divisors,
            short_attention_factor,
            long_attention_factor,
        }) => {
            if context > *original_context as usize {
                (divided(&mut plain, long_divisors), f64::from(*long_attention_factor))
            } else {
                (divided(&mut plain, short_divisors), f64::from(*short_attention_factor))
            }
        }
    }
}

/// Cosines and sines of a step's positions for one kind of rotation.
#[derive(Debug)]
pub struct RopeTable {
    rope: Rope,
    /// Radians per position: `[rotary_dim / 2]`.
    frequencies: Vec<f64>,
    /// Factor on what is rotated.
    magnitude: f64,
    /// First position and number of positions of each sequence.
    ranges: Vec<(usize, usize)>,
    /// `[positions, rotary_dim / 2]` of (cos, sin).
    cos_sin: Vec<(f32, f32)>,
}

impl RopeTable {
    /// An empty table for a session of at most `context` positions.
    pub fn new(rope: Rope, context: usize) -> Self {
        let (frequencies, magnitude) = frequencies(&rope, context);
        Self { rope, frequencies, magnitude, ranges: Vec::new(), cos_sin: Vec::new() }
    }

    /// The rotation this table is for.
    pub const fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Fills the table for ranges of positions, one after the other, each given by its first position and its length. Angles are computed
    /// in f64.
    pub fn fill(&mut self, ranges: &[(usize, usize)]) {
        if self.ranges == ranges {
            return;
        }
        self.ranges.clear();
        self.ranges.extend_from_slice(ranges);
        self.cos_sin.clear();
        for position in ranges.iter().flat_map(|(start, count)| *start..start + count) {
            for frequency in &self.frequencies {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                self.cos_sin.push(((cos * self.magnitude) as f32, (sin * self.magnitude) as f32));
            }
        }
    }

    /// Cosines and sines of the table's positions: `[positions, rotary_dim / 2, 2]`.
    pub fn values(&self) -> impl Iterator<Item = f32> + '_ {
        self.cos_sin.iter().flat_map(|(cos, sin)| [*cos, *sin])
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

    /// transformers 5.23, `ROPE_INIT_FUNCTIONS`, heads of 16 dimensions; it computes in f32.
    #[test]
    fn stretched_frequencies_are_those_of_transformers() {
        use RopeScaling as S;
        let yarn = |factor, original_context, attention_factor, truncate| S::Yarn {
            factor,
            original_context,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor,
            truncate,
        };
        let llama3 = S::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        let cases = [
            (
                1e4,
                yarn(4.0, 64, 1.138_629_4, true),
                [1.0, 0.237_170_8, 0.05, 7.905_695e-3, 2.5e-3, 7.905_695e-4, 2.5e-4, 7.905_695e-5],
            ),
            (
                150_000.0,
                yarn(32.0, 4096, 1.346_573_6, false),
                [1.0, 0.225_418, 0.050_813_27, 6.794_959e-3, 4.564_839e-4, 1.818_834e-5, 4.099_978e-6, 9.242_09e-7],
            ),
            (
                500_000.0,
                llama3,
                [1.0, 0.193_922_8, 0.037_606_03, 7.292_665e-3, 5.248_46e-4, 3.428_102e-5, 6.647_87e-6, 1.289_173e-6],
            ),
            (
                1e4,
                S::Linear { factor: 4.0 },
                [0.25, 0.079_056_94, 0.025, 7.905_695e-3, 2.5e-3, 7.905_695e-4, 2.5e-4, 7.905_695e-5],
            ),
        ];
        for (theta, scaling, expected) in cases {
            let stated = if let S::Yarn { attention_factor, .. } = scaling { f64::from(attention_factor) } else { 1.0 };
            let (found, magnitude) =
                frequencies(&Rope { scaling: Some(scaling.clone()), ..Rope::plain(theta, 16, RopePairing::Halves) }, 64);
            assert_eq!(magnitude, stated);
            for (a, b) in found.iter().zip(expected) {
                assert!((a - b).abs() <= 1e-5 * b, "{scaling:?}: {found:?}");
            }
        }
    }

    #[test]
    fn long_contexts_take_the_long_set() {
        let scaling = RopeScaling::LongRope {
            original_context: 16,
            short_divisors: vec![1.0, 2.0],
            long_divisors: vec![4.0, 8.0],
            short_attention_factor: 1.0,
            long_attention_factor: 1.5,
        };
        let rope = Rope { scaling: Some(scaling), ..Rope::plain(100.0, 4, RopePairing::Halves) };
        assert_eq!(frequencies(&rope, 16), (vec![1.0, 0.05], 1.0));
        assert_eq!(frequencies(&rope, 17), (vec![0.25, 0.012_5], 1.5));
    }

    #[test]
    fn rotation_keeps_relative_angles() {
        for pairing in [RopePairing::Halves, RopePairing::Interleaved] {
            let rope = Rope::plain(10_000.0, 6, pairing);
            let q: Vec<f32> = (0..8).map(|i| (i as f32).cos()).collect();
            let k: Vec<f32> = (0..8).map(|i| (i as f32 * 1.7).sin()).collect();
            let rotated = |x: &[f32], position| {
                let mut table = RopeTable::new(rope.clone(), 128);
                table.fill(&[(position, 1)]);
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
