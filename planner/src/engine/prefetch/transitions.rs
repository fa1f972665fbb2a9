//! Which experts of a later layer follow those of this one: naive Bayes over pairs of layers, learnt online.
//!
//! Kept is P(j in layer l + d | i in layer l), aged per row, and the popularity P(j). By Bayes' rule P(i|j) / P(i|not j) =
//! odds(j|i) / odds(j), so the evidence of a set is a product of such ratios; experts are not independent given j, hence it is
//! tempered. On the routing of gpt-oss-20b and DeepSeek-V2-Lite one layer's set predicts 57-59 % of the next one's.

use super::{LEAST, Popularity, Predictor, Shape, ln, most_likely_by_log_odds, odds};

/// Uses of an expert over which what follows it is averaged.
const USES: f32 = 1024.0;

/// A row is pulled to the popularity as by this many uses of its expert.
const PRIOR_USES: f32 = 8.0;

/// Weight of the evidence: the experts of a set repeat each other.
const TEMPER: f32 = 0.6;

/// Factors, each from 1e-8 to 1e8, whose product is taken before its logarithm: no under- or overflow.
const FACTORS: usize = 4;

/// Pairs of layers.
#[derive(Debug, Clone)]
pub struct Transitions {
    shape: Shape,
    popularity: Popularity,
    /// P(j in layer l + d | i in layer l). `[num_layers, num_experts (i), max_distance, num_experts (j)]`: what one
    /// demand looks up lies together
    follows: Vec<f32>,
    /// Uses of i in layer l that `follows` was learnt from. `[num_layers, num_experts, max_distance]`
    uses: Vec<u32>,
    /// Demand of each layer in its last step. `[num_layers]`
    sets: Vec<(u64, Vec<u32>)>,
    /// Evidence as computed last, and whether it still holds. `[max_distance, num_layers, num_experts]`, `[max_distance, num_layers]`
    evidence: Vec<f32>,
    holds: Vec<bool>,
    /// Kept to spare allocations. `[num_experts]`, all three
    against: Vec<f32>,
    product: Vec<f32>,
    divisor: Vec<f32>,
    /// Where the rows of `follows` are that count.
    rows: Vec<usize>,
}

impl Transitions {
    /// Knows nothing yet.
    pub fn new(shape: Shape) -> Self {
        let rows = shape.max_distance * shape.num_layers * shape.num_experts;
        Self {
            shape,
            popularity: Popularity::new(shape),
            follows: vec![0.0; rows * shape.num_experts],
            uses: vec![0; rows],
            sets: vec![(0, Vec::new()); shape.num_layers],
            evidence: vec![0.0; rows],
            holds: vec![false; shape.max_distance * shape.num_layers],
            against: vec![1.0; shape.num_experts],
            product: vec![1.0; shape.num_experts],
            divisor: vec![1.0; shape.num_experts],
            rows: Vec::new(),
        }
    }

    /// How often the experts of a layer are demanded.
    pub(super) fn popularity(&self) -> &Popularity {
        &self.popularity
    }

    fn row(&self, index: usize, distance: usize, expert: u32) -> usize {
        (index * self.shape.num_experts + expert as usize) * self.shape.max_distance + distance - 1
    }

    /// Logarithm of what the last demand of layer `index` does to the odds of the experts of layer `index + distance`, `distance` from 1
    /// to the greatest. Holds until one of the two layers is observed again. `[num_experts]`
    pub(super) fn know_evidence(&mut self, index: usize, distance: usize) {
        let n = self.shape.num_experts;
        let at = (distance - 1) * self.shape.num_layers + index;
        if std::mem::replace(&mut self.holds[at], true) {
            return;
        }
        let mut rows = std::mem::take(&mut self.rows);
        rows.clear();
        rows.extend(self.sets[index].1.iter().map(|i| self.row(index, distance, *i)).filter(|row| self.uses[*row] > 0));
        let Self { against, product, divisor, evidence, follows, .. } = self;
        let out = &mut evidence[at * n..(at + 1) * n];
        out.fill(0.0);
        for (against, p) in against.iter_mut().zip(self.popularity.means(index + distance)) {
            *against = 1.0 / odds(*p);
        }
        // Row by row, as they lie in memory: the tables are larger than the caches.
        for rows in rows.chunks(FACTORS) {
            product.fill(1.0);
            divisor.fill(1.0);
            for row in rows {
                let factors = follows[row * n..][..n].iter().zip(&*against);
                for ((product, divisor), (p, against)) in product.iter_mut().zip(&mut *divisor).zip(factors) {
                    let p = p.clamp(LEAST, 1.0 - LEAST);
                    *product *= p * against;
                    *divisor *= 1.0 - p;
                }
            }
            out.iter_mut().zip(product.iter().zip(&*divisor)).for_each(|(sum, (a, b))| *sum += ln(a / b));
        }
        self.rows = rows;
    }

    /// The slow way: the oracle of [`Self::know_evidence`].
    #[cfg(test)]
    pub(super) fn evidence_one_by_one(&self, index: usize, distance: usize) -> Vec<f64> {
        let popularity = self.popularity.means(index + distance);
        let of = |j: usize| {
            let factor = |i: &u32| {
                let row = self.row(index, distance, *i);
                let p = f64::from(self.follows[row * self.shape.num_experts + j].clamp(LEAST, 1.0 - LEAST));
                let odds_of_all = f64::from(odds(popularity[j]));
                if self.uses[row] > 0 { (p / (1.0 - p) / odds_of_all).ln() } else { 0.0 }
            };
            self.sets[index].1.iter().map(factor).sum()
        };
        (0..self.shape.num_experts).map(of).collect()
    }

    /// What [`Self::know_evidence`] found. `[num_experts]`
    pub(super) fn evidence(&self, index: usize, distance: usize) -> &[f32] {
        let (n, at) = (self.shape.num_experts, (distance - 1) * self.shape.num_layers + index);
        &self.evidence[at * n..(at + 1) * n]
    }

    /// Layer `index` was observed: what depended on its demand or its tables holds no more.
    fn forget_evidence(&mut self, index: usize) {
        for distance in 1..=self.shape.max_distance {
            let row = (distance - 1) * self.shape.num_layers;
            self.holds[row + index] = false;
            if let Some(from) = index.checked_sub(distance) {
                self.holds[row + from] = false;
            }
        }
    }

    fn learn(&mut self, from: usize, distance: usize, experts: &[(u32, u32)]) {
        let n = self.shape.num_experts;
        let popularity = self.popularity.means(from + distance);
        for i in 0..self.sets[from].1.len() {
            let row = self.row(from, distance, self.sets[from].1[i]);
            let follows = &mut self.follows[row * n..][..n];
            if self.uses[row] == 0 {
                follows.copy_from_slice(popularity);
            }
            self.uses[row] = self.uses[row].saturating_add(1);
            let share = (1.0 / USES).max(1.0 / (PRIOR_USES + self.uses[row] as f32));
            follows.iter_mut().for_each(|p| *p -= share * *p);
            experts.iter().for_each(|(j, _)| follows[*j as usize] += share);
        }
    }
}

impl Predictor for Transitions {
    fn observe(&mut self, step: u64, index: usize, experts: &[(u32, u32)]) {
        self.popularity.observe(step, index, experts);
        let crowd = self.shape.is_crowd(experts);
        if !crowd {
            for distance in 1..=self.shape.max_distance.min(index) {
                if self.sets[index - distance].0 == step {
                    self.learn(index - distance, distance, experts);
                }
            }
        }
        self.forget_evidence(index);
        let (last, set) = &mut self.sets[index];
        *last = step;
        set.clear();
        if !crowd {
            set.extend(experts.iter().map(|x| x.0));
        }
    }

    fn predict(&mut self, index: usize, distance: usize, limit: usize) -> Vec<(u32, f64)> {
        if index + distance >= self.shape.num_layers {
            return Vec::new();
        }
        let known = (1..=self.shape.max_distance).contains(&distance);
        if known {
            self.know_evidence(index, distance);
        }
        let evidence = |e: usize| if known { self.evidence(index, distance)[e] } else { 0.0 };
        let prior = self.popularity.log_odds(index + distance);
        let log_odds = prior.iter().enumerate().map(|(e, p)| p + TEMPER * evidence(e));
        most_likely_by_log_odds(log_odds, limit)
    }
}
