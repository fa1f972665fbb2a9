//! The chance that an expert is used again soon, learnt while running: one logistic model per layer over all its experts.
//!
//! After each demand the model gives every expert i of the layer a log-odds `z_i` of being used within the next `horizon` demands:
//!
//! `z = bias_i + s . phi_i + sum_f W[f, i] x_f + sum_(f in the demand) V[f, i] / 2`
//!
//! * phi_i: age (three decays), fast, middle and slow frequency, share of the router's weight at its last use; `s` is common to all.
//! * x: fast frequencies of all experts. W learns which experts come together (a topic brings its own), V which follow each other.
//!
//! Once the horizon is over the truth is known, and one step of gradient ascent of the log-likelihood is made on the features of then.
//! `W x` is kept up to date rather than computed anew: x decays and gains the demanded, W gains a product of two vectors, so that a
//! demand costs one pass over W. Arithmetic only (no exp, no log): the same everywhere to the bit.

use super::Seen;

const FEATURES: usize = 7;
const FAST: f32 = 0.2;
const MIDDLE: f32 = 0.05;
const SLOW: f32 = 0.005;
const RATE_FEATURES: f32 = 0.02;
const RATE_BIAS: f32 = 0.002;
const RATE_PAIRS: f32 = 0.05;
/// Fast frequencies below this are not learnt from: they are most of the work and none of the effect.
const NEGLIGIBLE: f32 = 0.01;
/// Where `s` starts: recent and frequent is good. Learning does the rest.
const START: [f32; FEATURES] = [0.5, 0.5, 0.5, 0.8, 1.2, 1.0, 0.1];

/// What was known after a demand, and what was made of it.
#[derive(Debug, Clone, Default)]
struct Snapshot {
    /// `[FEATURES, experts]`
    phi: Vec<f32>,
    /// `[experts]`
    fast: Vec<f32>,
    demanded: Vec<u32>,
    /// `[experts]`
    chance: Vec<f32>,
}

/// One layer's model.
#[derive(Debug, Clone)]
pub(super) struct Predictor {
    n: usize,
    now: u32,
    /// The demand after which the horizon is what it is.
    since: u32,
    /// By demand modulo the horizon.
    past: Vec<Snapshot>,
    /// Number of the demand; 0 never. `[experts]`, as all below but `s`.
    last_used: Vec<u32>,
    /// Share of the demand's router weight times experts demanded.
    weight: Vec<f32>,
    fast: Vec<f32>,
    middle: Vec<f32>,
    slow: Vec<f32>,
    bias: Vec<f32>,
    s: [f32; FEATURES],
    /// `[from, to]`
    w: Vec<f32>,
    v: Vec<f32>,
    /// W x.
    wx: Vec<f32>,
    /// Errors, then ages: room for one value per expert.
    error: Vec<f32>,
    z: Vec<f32>,
}

/// Logistic function: `tanh(x) ~ x (27 + x^2) / (27 + 9 x^2)`, within 0.024 and exactly +-1 from |x| = 3.
fn sigmoid(z: f32) -> f32 {
    let x = (0.5 * z).clamp(-3.0, 3.0);
    0.5 + 0.5 * x * (27.0 + x * x) / (27.0 + 9.0 * x * x)
}

/// `to += c * from`.
fn add(to: &mut [f32], c: f32, from: &[f32]) {
    for (a, b) in to.iter_mut().zip(from) {
        *a += c * b;
    }
}

/// `to = f(from)`.
fn map(to: &mut [f32], from: &[f32], f: impl Fn(f32) -> f32) {
    for (a, b) in to.iter_mut().zip(from) {
        *a = f(*b);
    }
}

impl Predictor {
    pub fn new(num_experts: u32, horizon: u32) -> Self {
        let n = num_experts as usize;
        let past =
            Snapshot { phi: vec![0.0; FEATURES * n], fast: vec![0.0; n], demanded: Vec::with_capacity(n), chance: vec![0.0; n] };
        Self {
            n,
            now: 0,
            since: 0,
            past: vec![past; horizon.max(1) as usize],
            last_used: vec![0; n],
            weight: vec![0.0; n],
            fast: vec![0.0; n],
            middle: vec![0.0; n],
            slow: vec![0.0; n],
            bias: vec![-1.0; n],
            s: START,
            w: vec![0.0; n * n],
            v: vec![0.0; n * n],
            wx: vec![0.0; n],
            error: vec![0.0; n],
            z: vec![-1.0; n],
        }
    }

    /// From now on "soon" is `horizon` demands. What was learnt stays; what was foretold for the other horizon is forgotten.
    pub fn look_ahead(&mut self, horizon: u32) {
        let horizon = horizon.max(1) as usize;
        if horizon != self.past.len() {
            let empty = self.past[0].clone();
            self.past.resize(horizon, empty);
            self.since = self.now;
        }
    }

    /// Log-odds that the expert is used within the horizon.
    pub fn log_odds(&self, expert: usize) -> f32 {
        self.z[expert]
    }

    /// A demand; `first` is the key of the layer's first expert.
    pub fn on_demand(&mut self, seen: &Seen<'_>, first: u32) {
        let n = self.n;
        self.now += 1;
        self.count(seen, first);
        let at = self.now as usize % self.past.len();
        if (self.now - self.since) as usize > self.past.len() {
            self.learn(at);
        }
        let (last_used, now) = (&self.last_used, self.now);
        let past = &mut self.past[at];
        past.fast.copy_from_slice(&self.fast);
        past.demanded.clear();
        past.demanded.extend(seen.experts.iter().map(|(e, _)| e - first));
        let (phi, z) = (&mut past.phi[..], &mut self.z[..n]);
        // One loop per feature over slices of one length: vector code.
        let age = &mut self.error[..n];
        for (age, last) in age.iter_mut().zip(last_used) {
            *age = now.wrapping_sub(*last).cast_signed() as f32;
        }
        let age = &*age;
        let (row_0, rest) = phi.split_at_mut(n);
        let (row_1, rest) = rest.split_at_mut(n);
        let (row_2, rest) = rest.split_at_mut(n);
        let (row_3, rest) = rest.split_at_mut(n);
        let (row_4, rest) = rest.split_at_mut(n);
        let (row_5, row_6) = rest.split_at_mut(n);
        map(row_0, age, |age| 1.0 / (1.0 + age));
        map(row_1, age, |age| 1.0 / (1.0 + age / 8.0));
        map(row_2, age, |age| 1.0 / (1.0 + age / 64.0));
        map(row_3, &self.fast, |fast| 2.0 * fast);
        map(row_4, &self.middle, |middle| 2.0 * middle);
        map(row_5, &self.slow, |slow| slow / (slow + 0.1));
        for (to, (weight, age)) in row_6.iter_mut().zip(self.weight.iter().zip(age)) {
            *to = 0.5 * weight / (1.0 + 0.1 * age);
        }
        for (z, (bias, wx)) in z.iter_mut().zip(self.bias.iter().zip(&self.wx)) {
            *z = bias + wx;
        }
        for (j, s) in self.s.iter().enumerate() {
            add(z, *s, &phi[j * n..(j + 1) * n]);
        }
        for f in &past.demanded {
            add(z, 0.5, &self.v[*f as usize * n..(*f as usize + 1) * n]);
        }
        for (p, z) in past.chance.iter_mut().zip(z) {
            *p = sigmoid(*z);
        }
    }

    /// Ages, weights, frequencies and W x after a demand.
    fn count(&mut self, seen: &Seen<'_>, first: u32) {
        for (ema, rate) in [(&mut self.fast, FAST), (&mut self.middle, MIDDLE), (&mut self.slow, SLOW)] {
            for x in ema.iter_mut() {
                *x *= 1.0 - rate;
            }
            for (e, _) in seen.experts {
                ema[(e - first) as usize] += rate;
            }
        }
        for x in &mut self.wx {
            *x *= 1.0 - FAST;
        }
        // Both lists ascend.
        let mut scores = seen.scores.iter().peekable();
        let mut sum = 0.0;
        for (e, _) in seen.experts {
            while scores.next_if(|s| s.0 < *e).is_some() {}
            let score = scores.next_if(|s| s.0 == *e).map_or(0, |s| s.1) as f32;
            let i = (e - first) as usize;
            self.weight[i] = score;
            sum += score;
            self.last_used[i] = self.now;
            add(&mut self.wx, FAST, &self.w[i * self.n..(i + 1) * self.n]);
        }
        let k = seen.experts.len() as f32;
        for (e, _) in seen.experts {
            let w = &mut self.weight[(e - first) as usize];
            *w = if sum > 0.0 { *w / sum * k } else { 1.0 };
        }
    }

    /// The horizon of the snapshot `at` is over: which experts were used is known.
    fn learn(&mut self, at: usize) {
        let n = self.n;
        let past = &self.past[at];
        let then = self.now - self.past.len() as u32;
        for (error, (last, chance)) in self.error.iter_mut().zip(self.last_used.iter().zip(&past.chance)) {
            *error = f32::from(u8::from(*last > then)) - chance;
        }
        let error = &self.error[..n];
        let rate = RATE_FEATURES / (n as f32).sqrt();
        // Sums side by side: each one's additions wait for each other.
        let mut sums = [-0.0_f32; FEATURES];
        let mut rows = past.phi.chunks_exact(n);
        let phi: [&[f32]; FEATURES] = std::array::from_fn(|_| &rows.next().expect("a row per feature")[..n]);
        for (i, e) in error.iter().enumerate() {
            for (sum, phi) in sums.iter_mut().zip(phi) {
                *sum += e * phi[i];
            }
        }
        self.s.iter_mut().zip(sums).for_each(|(s, sum)| *s += rate * sum);
        add(&mut self.bias, RATE_BIAS, error);
        let mut overlap = 0.0;
        for (f, x) in past.fast.iter().enumerate().filter(|(_, x)| **x > NEGLIGIBLE) {
            add(&mut self.w[f * n..(f + 1) * n], RATE_PAIRS * x, error);
            overlap += x * self.fast[f];
        }
        add(&mut self.wx, RATE_PAIRS * overlap, error);
        for f in &past.demanded {
            let f = *f as usize;
            add(&mut self.v[f * n..(f + 1) * n], 0.5 * RATE_PAIRS, error);
        }
    }
}

#[cfg(test)]
impl Predictor {
    /// W x from scratch: the oracle of the one kept.
    pub fn wx_error(&self) -> f32 {
        let direct = |i: usize| (0..self.n).map(|f| self.w[f * self.n + i] * self.fast[f]).sum::<f32>();
        (0..self.n).map(|i| (direct(i) - self.wx[i]).abs()).fold(0.0, f32::max)
    }
}
