//! Steps sampled from popularity alone: where no tokens were recorded, and for benches.
//!
//! Layers and tokens are independent, so caches and correlated layers look worse than they are; whoever shows such numbers says
//! [`INDEPENDENT`].

use super::bad;
use crate::error::PlanError;
use crate::scenario::Scenarios;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// What to say about steps that were sampled from counts.
pub const INDEPENDENT: &str = "sampled from counts, independent";

/// `count` steps of `batch` tokens, each of which chooses `experts_per_token` different experts of every layer, one after the other in
/// proportion to their shares. `shares` is `[moe layers][num_experts]`.
///
/// # Errors
/// [`PlanError::BadTrace`] when a layer has fewer experts than a token chooses, or shares that are not numbers of 0 or more.
pub fn independent_scenarios(
    shares: &[Vec<f64>],
    experts_per_token: u32,
    batch: u32,
    count: usize,
    seed: u64,
) -> Result<Scenarios, PlanError> {
    for (layer, shares) in shares.iter().enumerate() {
        if shares.len() < experts_per_token as usize || shares.len() > usize::from(u16::MAX) {
            let expected = format!("{experts_per_token} to 65535: a token chooses different experts");
            return bad(format!("the number of experts of MoE layer {layer}"), shares.len(), expected);
        }
        if let Some(share) = shares.iter().find(|s| !s.is_finite() || **s < 0.0) {
            return bad(format!("a share of MoE layer {layer}"), share, "a number of 0 or more");
        }
    }
    let mut rng = StdRng::seed_from_u64(seed);
    let mut scenarios = Scenarios { layers: vec![Vec::with_capacity(count); shares.len()] };
    for _ in 0..count {
        for (shares, steps) in shares.iter().zip(&mut scenarios.layers) {
            let mut active = vec![false; shares.len()];
            for _ in 0..batch {
                for e in choose(shares, experts_per_token, &mut rng) {
                    active[e] = true;
                }
            }
            steps.push((0..shares.len()).filter(|e| active[*e]).map(|e| e as u16).collect());
        }
    }
    Ok(scenarios)
}

/// Different experts, drawn one after the other in proportion to the shares of those left.
fn choose(shares: &[f64], k: u32, rng: &mut StdRng) -> Vec<usize> {
    let mut chosen: Vec<usize> = Vec::with_capacity(k as usize);
    let mut weights = shares.to_vec();
    for _ in 0..k {
        let mut sum: f64 = weights.iter().sum();
        if sum <= 0.0 {
            // Nothing left to go by (fewer experts with a share than are chosen): equal chances.
            weights = (0..shares.len()).map(|e| if chosen.contains(&e) { 0.0 } else { 1.0 }).collect();
            sum = weights.iter().sum();
        }
        let mut at = rng.random::<f64>() * sum;
        let hit = weights.iter().position(|w| {
            at -= w;
            at < 0.0
        });
        // Rounding may leave a hair at the end: the last one that could be drawn at all.
        let next = hit.or_else(|| weights.iter().rposition(|w| *w > 0.0)).expect("k is at most the number of experts");
        weights[next] = 0.0;
        chosen.push(next);
    }
    chosen
}

/// Shares that fall with the rank r as 1 / (r + 1)^`exponent`; which expert has which rank is shuffled in each layer.
/// `[moe layers][num_experts]`
pub fn zipf_shares(num_moe_layers: usize, num_experts: u32, exponent: f64, seed: u64) -> Vec<Vec<f64>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let raw: Vec<f64> = (0..num_experts).map(|r| (f64::from(r) + 1.0).powf(-exponent)).collect();
    let sum: f64 = raw.iter().sum();
    (0..num_moe_layers)
        .map(|_| {
            let mut shares: Vec<f64> = raw.iter().map(|x| x / sum).collect();
            shares.shuffle(&mut rng);
            shares
        })
        .collect()
}

/// Steps of a made-up workload: Zipf popularity, its order shuffled in each layer. An `exponent` of 0 is uniform routing, about 0.5 has
/// the skew of the public traces.
///
/// # Errors
/// [`PlanError::BadTrace`] when there are fewer experts than a token chooses.
pub fn synthetic_scenarios(
    num_moe_layers: usize,
    num_experts: u32,
    experts_per_token: u32,
    batch: u32,
    count: usize,
    exponent: f64,
    seed: u64,
) -> Result<Scenarios, PlanError> {
    independent_scenarios(&zipf_shares(num_moe_layers, num_experts, exponent, seed), experts_per_token, batch, count, seed ^ 1)
}
