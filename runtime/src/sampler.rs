//! Logits to one token: penalties, top-k, top-p, min-p, temperature, in this order.
//!
//! The order and the meaning of each filter are those of llama.cpp's default chain, so settings carry over: top-p
//! and min-p look at the probabilities *before* temperature. All sums are in f64 over candidates sorted by falling
//! logit and then by id, so that one seed gives one text on every machine.
//!
//! Nucleus sampling: Holtzman et al. 2020 (1904.09751); min-p: Nguyen et al. 2024 (2407.01082); the repeat penalty:
//! Keskar et al. 2019 (1909.05858), applied once per token, dividing positive and multiplying negative logits.

use crate::error::{Result, RuntimeError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::cmp::Ordering;
use std::collections::VecDeque;

/// How to choose among the logits.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerConfig {
    /// Divides the logits; 0 takes the best token, of equals the one with the lowest id.
    pub temperature: f32,
    /// Keeps the best `top_k` tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest best tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens with at least this fraction of the best token's probability; 0 keeps all.
    pub min_p: f32,
    /// Weakens tokens among the last `repeat_last_n`; 1 changes nothing.
    pub repeat_penalty: f32,
    /// How far back the penalty looks.
    pub repeat_last_n: usize,
    /// Fixes all random choices.
    pub seed: u64,
}

impl Default for SamplerConfig {
    /// llama.cpp's defaults.
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, repeat_penalty: 1.0, repeat_last_n: 64, seed: 0 }
    }
}

impl SamplerConfig {
    /// Always the best token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    fn check(&self) -> Result<()> {
        let range = |what: &'static str, value: f32, ok: bool, expected: &str| {
            if ok {
                Ok(())
            } else {
                Err(RuntimeError::BadRequest { what, found: value.to_string(), expected: expected.to_owned() })
            }
        };
        let t = self.temperature;
        range("temperature", t, t.is_finite() && t >= 0.0, "0 (greedy) or a positive number")?;
        range("top-p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "more than 0 and at most 1 (off)")?;
        range("min-p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 (off) to 1")?;
        let penalty = self.repeat_penalty;
        range("repeat penalty", penalty, penalty.is_finite() && penalty > 0.0, "a positive number, 1 for none")
    }
}

/// A token that may still be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    id: u32,
    logit: f32,
}

/// Best first, then by id. Not `total_cmp`, to which -0 is less than 0; NaN was refused before.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// Chooses tokens; holds the random state and the tokens seen.
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplerConfig,
    rng: StdRng,
    recent: VecDeque<u32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// Refuses settings without meaning.
    pub fn new(config: SamplerConfig) -> Result<Self> {
        config.check()?;
        let rng = StdRng::seed_from_u64(config.seed);
        Ok(Self { config, rng, recent: VecDeque::new(), candidates: Vec::new() })
    }

    /// The settings.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// Tells the sampler a token of the text, prompt or answer, for the repeat penalty.
    pub fn accept(&mut self, id: u32) {
        if self.config.repeat_penalty == 1.0 || self.config.repeat_last_n == 0 {
            return;
        }
        if self.recent.len() == self.config.repeat_last_n {
            self.recent.pop_front();
        }
        self.recent.push_back(id);
    }

    /// Chooses a token. A logit of minus infinity masks its token; it is never chosen.
    pub fn sample(&mut self, logits: &[f32] /* [vocabulary] */) -> Result<u32> {
        let mut candidates = std::mem::take(&mut self.candidates);
        let chosen = self.fill(logits, &mut candidates).map(|()| {
            if self.config.temperature == 0.0 {
                candidates.iter().min_by(|a, b| by_rank(a, b)).expect("fill leaves at least one").id
            } else {
                self.filter(&mut candidates);
                self.draw(&candidates)
            }
        });
        self.candidates = candidates;
        chosen
    }

    /// The unmasked tokens with penalised logits, in order of id.
    fn fill(&self, logits: &[f32], candidates: &mut Vec<Candidate>) -> Result<()> {
        let bad = |found: String| RuntimeError::BadRequest {
            what: "logits",
            found,
            expected: "finite numbers, or minus infinity for a masked token, and at least one finite".to_owned(),
        };
        if let Some(id) = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
            return Err(bad(format!("{} for token {id}", logits[id])));
        }
        candidates.clear();
        candidates.extend((0u32..).zip(logits).map(|(id, &logit)| Candidate { id, logit }));
        let penalty = self.config.repeat_penalty;
        let mut penalised: Vec<u32> = self.recent.iter().copied().collect();
        penalised.sort_unstable();
        penalised.dedup();
        for id in penalised {
            if let Some(candidate) = candidates.get_mut(id as usize) {
                // Towards zero probability on either side of zero; a finite logit stays finite.
                let logit = if candidate.logit > 0.0 { candidate.logit / penalty } else { candidate.logit * penalty };
                candidate.logit = if candidate.logit.is_finite() { logit.clamp(f32::MIN, f32::MAX) } else { candidate.logit };
            }
        }
        candidates.retain(|c| c.logit != f32::NEG_INFINITY);
        if candidates.is_empty() { Err(bad(format!("none that is finite among {}", logits.len()))) } else { Ok(()) }
    }

    /// Top-k, top-p, min-p. At least the best token stays.
    fn filter(&self, candidates: &mut Vec<Candidate>) {
        let SamplerConfig { top_k, top_p, min_p, .. } = self.config;
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, by_rank);
            candidates.truncate(top_k);
        }
        candidates.sort_unstable_by(by_rank);
        let best = f64::from(candidates[0].logit);
        let weight = |c: &Candidate| (f64::from(c.logit) - best).exp();
        if top_p < 1.0 {
            let total: f64 = candidates.iter().map(weight).sum();
            let mut sum = 0.0;
            let reached = candidates.iter().position(|c| {
                sum += weight(c);
                sum >= f64::from(top_p) * total
            });
            candidates.truncate(reached.map_or(candidates.len(), |last| last + 1));
        }
        if min_p > 0.0 {
            let kept = candidates.partition_point(|c| weight(c) >= f64::from(min_p));
            candidates.truncate(kept.max(1));
        }
    }

    /// One of `candidates`, best first, by softmax at the temperature.
    fn draw(&mut self, candidates: &[Candidate]) -> u32 {
        let temperature = f64::from(self.config.temperature);
        let best = f64::from(candidates[0].logit);
        let weight = |c: &Candidate| ((f64::from(c.logit) - best) / temperature).exp();
        let total: f64 = candidates.iter().map(weight).sum();
        let mut rest = self.rng.random::<f64>() * total;
        for candidate in candidates {
            rest -= weight(candidate);
            if rest < 0.0 {
                return candidate.id;
            }
        }
        // Only rounding leads here; the best token is certainly possible.
        candidates[0].id
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Temperature 1, every filter off.
    fn plain(seed: u64) -> SamplerConfig {
        SamplerConfig { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repeat_penalty: 1.0, repeat_last_n: 64, seed }
    }

    fn sampler(config: SamplerConfig) -> Sampler {
        Sampler::new(config).expect("valid settings")
    }

    /// Ids that survive the filters, sorted.
    fn kept(config: &SamplerConfig, logits: &[f32]) -> Vec<u32> {
        let sampler = sampler(config.clone());
        let mut candidates = Vec::new();
        sampler.fill(logits, &mut candidates).expect("valid logits");
        sampler.filter(&mut candidates);
        let mut ids: Vec<u32> = candidates.iter().map(|c| c.id).collect();
        ids.sort_unstable();
        ids
    }

    fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
        let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|w| w / total).collect()
    }

    /// The definitions, one token at a time: how many are better, and what they weigh together.
    fn kept_by_definition(config: &SamplerConfig, logits: &[f32]) -> Vec<u32> {
        let better = |a: usize, b: usize| logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
        let mut alive: Vec<usize> = (0..logits.len()).filter(|&i| logits[i] > f32::NEG_INFINITY).collect();
        if config.top_k > 0 {
            let all = alive.clone();
            alive.retain(|&i| all.iter().filter(|&&j| better(j, i)).count() < config.top_k);
        }
        if config.top_p < 1.0 {
            let all = alive.clone();
            let p = |i: usize| f64::from(logits[i]).exp() / all.iter().map(|&j| f64::from(logits[j]).exp()).sum::<f64>();
            // A token is needed as long as the better ones do not suffice.
            alive.retain(|&i| all.iter().filter(|&&j| better(j, i)).map(|&j| p(j)).sum::<f64>() < f64::from(config.top_p));
        }
        let best = alive.iter().map(|&i| f64::from(logits[i]).exp()).fold(0.0, f64::max);
        alive.retain(|&i| f64::from(logits[i]).exp() >= f64::from(config.min_p) * best);
        alive.into_iter().map(|i| i as u32).collect()
    }

    proptest! {
        #[test]
        fn filters_equal_their_definitions(
            // A coarse grid makes ties; the odd step keeps sums away from the round thresholds.
            steps in prop::collection::vec(prop_oneof![9 => (-12i32..12).prop_map(Some), 1 => Just(None)], 1..40),
            top_k in 0usize..12,
            top_p in prop_oneof![Just(1.0f32), 0.05f32..0.99],
            min_p in prop_oneof![Just(0.0f32), 0.003f32..0.9],
        ) {
            let logits: Vec<f32> = steps.iter().map(|s| s.map_or(f32::NEG_INFINITY, |s| s as f32 * 0.37)).collect();
            prop_assume!(logits.iter().any(|l| l.is_finite()));
            let config = SamplerConfig { top_k, top_p, min_p, ..plain(0) };
            prop_assert_eq!(kept(&config, &logits), kept_by_definition(&config, &logits));
        }

        #[test]
        fn a_masked_token_is_never_chosen(
            logits in prop::collection::vec(prop_oneof![(-5.0f32..5.0), Just(f32::NEG_INFINITY)], 1..20),
            seed in any::<u64>(), temperature in 0.0f32..3.0, penalty in 0.5f32..2.0, seen in prop::collection::vec(0u32..25, 0..9),
        ) {
            prop_assume!(logits.iter().any(|l| l.is_finite()));
            let mut sampler = sampler(SamplerConfig { temperature, repeat_penalty: penalty, ..plain(seed) });
            seen.iter().for_each(|&id| sampler.accept(id));
            for _ in 0..20 {
                let id = sampler.sample(&logits).expect("valid logits") as usize;
                prop_assert!(logits[id].is_finite());
            }
        }
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits = [1.0f32, 0.0, 2.5, -1.0, 0.3, 2.5];
        let draws = 200_000;
        for temperature in [0.5f32, 1.0, 2.0] {
            let mut sampler = sampler(SamplerConfig { temperature, ..plain(11) });
            let mut counts = [0u32; 6];
            for _ in 0..draws {
                counts[sampler.sample(&logits).expect("valid logits") as usize] += 1;
            }
            let expected = softmax(&logits, f64::from(temperature));
            let chi_square: f64 = counts
                .iter()
                .zip(&expected)
                .map(|(&n, p)| (f64::from(n) - p * f64::from(draws)).powi(2) / (p * f64::from(draws)))
                .sum();
            // 5 degrees of freedom: 20.5 is passed by chance once in a thousand; the seed is fixed.
            assert!(chi_square < 20.5, "temperature {temperature}: {chi_square}, {counts:?}");
        }
    }

    #[test]
    fn filters_look_at_probabilities_before_temperature() {
        // At temperature 1 the best token has 0.5: top-p 0.45 keeps it alone, however flat temperature 10 is.
        let logits = [0.5f32.ln(), 0.25f32.ln(), 0.25f32.ln()];
        let mut sampler = sampler(SamplerConfig { temperature: 10.0, top_p: 0.45, ..plain(5) });
        assert!((0..200).all(|_| sampler.sample(&logits).expect("valid logits") == 0));
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let mut sampler = sampler(SamplerConfig::greedy());
        assert_eq!(sampler.sample(&[0.0, 3.0, 1.0, 3.0]).expect("valid logits"), 1);
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY, -7.0]).expect("valid logits"), 1);
        assert_eq!(sampler.sample(&[f32::MAX, f32::MAX]).expect("valid logits"), 0);
        assert_eq!(sampler.sample(&[-0.0, 0.0]).expect("valid logits"), 0);
    }

    #[test]
    fn one_seed_one_sequence() {
        let logits: Vec<f32> = (0..500).map(|i| ((i * 37) % 101) as f32 / 20.0).collect();
        let run = |seed| -> Vec<u32> {
            let mut s = sampler(SamplerConfig { seed, ..SamplerConfig::default() });
            (0..50).map(|_| s.sample(&logits).expect("valid logits")).collect()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn the_penalty_weakens_recent_tokens_once() {
        let config = SamplerConfig { temperature: 0.0, repeat_penalty: 2.0, repeat_last_n: 2, ..plain(0) };
        let mut sampler = sampler(config);
        let logits = [4.0, 3.0, 1.5];
        assert_eq!(sampler.sample(&logits).expect("valid logits"), 0);
        sampler.accept(0);
        sampler.accept(0);
        // 4 / 2 = 2, not 1: the third token at 1.5 does not overtake it.
        assert_eq!(sampler.sample(&[4.0, 1.9, 1.5]).expect("valid logits"), 0);
        assert_eq!(sampler.sample(&logits).expect("valid logits"), 1);
        // Out of the window again.
        sampler.accept(2);
        sampler.accept(7);
        assert_eq!(sampler.sample(&logits).expect("valid logits"), 0);
        // Negative logits move away from zero.
        sampler.accept(0);
        assert_eq!(sampler.sample(&[-1.0, -1.5, -9.0]).expect("valid logits"), 1);
    }

    #[test]
    fn broken_logits_are_refused() {
        let mut sampler = sampler(SamplerConfig::default());
        let minus = f32::NEG_INFINITY;
        for (logits, expected) in [
            (&[0.0, f32::NAN][..], "NaN for token 1"),
            (&[f32::INFINITY, 0.0], "inf for token 0"),
            (&[minus, minus], "none that is finite among 2"),
            (&[], "among 0"),
        ] {
            let message = sampler.sample(logits).expect_err("refused").to_string();
            assert!(message.contains(expected), "{message}");
        }
        assert_eq!(sampler.sample(&[minus, 0.0]).expect("still usable"), 1);
    }

    #[test]
    fn settings_without_meaning_are_refused() {
        let with = |change: fn(&mut SamplerConfig)| {
            let mut config = SamplerConfig::default();
            change(&mut config);
            Sampler::new(config).expect_err("refused").to_string()
        };
        for (message, what) in [
            (with(|c| c.temperature = -0.1), "temperature"),
            (with(|c| c.temperature = f32::NAN), "temperature"),
            (with(|c| c.top_p = 0.0), "top-p"),
            (with(|c| c.top_p = 1.01), "top-p"),
            (with(|c| c.min_p = f32::NAN), "min-p"),
            (with(|c| c.min_p = -0.5), "min-p"),
            (with(|c| c.repeat_penalty = 0.0), "repeat penalty"),
        ] {
            assert!(message.starts_with(what), "{message}");
        }
    }
}
