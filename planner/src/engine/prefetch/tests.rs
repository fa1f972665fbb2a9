//! What predictors learn from sequences whose law is known.

use super::*;
use crate::engine::schedule::{Item, LayerWork};

const SHAPE: Shape = Shape { num_layers: 4, num_experts: 16, experts_per_token: 2, max_distance: 3 };

/// In layer l token t takes experts 2c + l, 2c + l + 1 (mod 16) of its class c, which follows a fixed irregular sequence.
fn demand(step: u64, layer: usize) -> [(u32, u32); 2] {
    let class = (step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60) as u32 % 8;
    let mut set = [(2 * class + layer as u32) % 16, (2 * class + layer as u32 + 1) % 16];
    set.sort_unstable();
    set.map(|e| (e, 1))
}

/// Shares of the demands of `steps` steps that the best two guesses contain, by distance.
fn recall(predictor: &mut dyn Predictor, steps: u64) -> [f64; 3] {
    let (mut hits, mut all) = ([0.0; 3], [0.0; 3]);
    for step in 0..steps {
        for layer in 0..4 {
            predictor.observe(step, layer, &demand(step, layer));
            for distance in 1..4 - layer {
                let guesses = predictor.predict(layer, distance, 2);
                assert!(guesses.len() <= 2 && guesses.iter().all(|g| (0.0..=1.0).contains(&g.1)));
                let truth = demand(step, layer + distance);
                hits[distance - 1] += truth.iter().filter(|t| guesses.iter().any(|g| g.0 == t.0)).count() as f64;
                all[distance - 1] += 2.0;
            }
            assert!(predictor.predict(layer, 4 - layer, 2).is_empty());
        }
    }
    [0, 1, 2].map(|d| hits[d] / all[d])
}

#[test]
fn what_follows_for_certain_is_learnt() {
    for predictor in [&mut Transitions::new(SHAPE) as &mut dyn Predictor, &mut Mix::new(SHAPE)] {
        let first = recall(predictor, 200);
        let then = recall(predictor, 200);
        println!("{first:?} {then:?}");
        assert!(then.iter().all(|r| *r > 0.99), "{then:?}");
        // Ahead of a demand that it is sure of, it says so.
        assert!(predictor.predict(0, 1, 2)[1].1 > 0.8);
    }
    let popularity = recall(&mut Popularity::new(SHAPE), 400);
    assert!(popularity.iter().all(|r| *r < 0.3), "{popularity:?}");
}

#[test]
fn a_prompt_teaches_popularity_only() {
    let mut transitions = Transitions::new(SHAPE);
    let prompt: Vec<(u32, u32)> = (0..16).map(|e| (e, if e == 3 { 40 } else { 4 })).collect();
    for layer in 0..4 {
        transitions.observe(0, layer, &prompt);
    }
    let guesses = transitions.predict(0, 1, 16);
    assert_eq!(guesses[0].0, 3);
    for (a, b) in guesses.iter().zip(transitions.popularity().clone().predict(0, 1, 16)) {
        assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-6, "{a:?} {b:?}");
    }
    // Of 50 tokens 40 took it; the start counts as one more observation.
    assert!((guesses[0].1 - (0.8 + 0.125) / 2.0).abs() < 1e-3, "{guesses:?}");
}

#[test]
fn a_repeated_demand_is_expected_again() {
    let mut repeat = Repeat::new(SHAPE);
    for step in 0..2000 {
        repeat.observe(step, 1, &[(step as u32 % 2, 1), (7, 1)]);
    }
    let guesses = repeat.predict(0, 1, 4);
    assert_eq!(guesses.iter().map(|g| g.0).collect::<Vec<_>>(), [1, 7]);
    // One of two comes again.
    assert!((guesses[0].1 - 0.5).abs() < 0.02, "{guesses:?}");
}

/// Two kinds of sequences: after a few steps the map knows which one it is in.
#[test]
fn sequences_of_a_kind_are_recognised() {
    let mut map = SequenceMap::new(SHAPE);
    let mut hits = 0;
    let mut step = 0;
    for sequence in 0..40_u32 {
        map.new_sequence();
        let kind = sequence % 2 * 8;
        for t in 0..6_u32 {
            step += 1;
            for layer in 0..4_usize {
                // The first layer tells the kinds apart, the last one's demands never repeat within a sequence.
                let experts = if layer == 3 { [(kind + t, 1)] } else { [(kind + layer as u32, 1)] };
                map.observe(step, layer, &experts);
            }
            if sequence >= 20 && t == 1 {
                let guesses = map.predict(0, 3, 8);
                hits += guesses.iter().filter(|g| (kind..kind + 6).contains(&g.0)).count();
            }
        }
    }
    // All six of the kind, in all of the 20.
    assert_eq!(hits, 120);
}

#[test]
fn calibration_learns_how_far_statements_are_off() {
    let mut calibration = HitCalibration::new(2);
    assert_eq!(calibration.probability(1, 0.9), 0.9);
    for n in 0..10_000 {
        // Says 0.9, is right every other time; at distance 2 says 0.3, is right 3 times in 10.
        calibration.record(1, 0.9, n % 2 == 0);
        calibration.record(2, 0.3, n % 10 < 3);
    }
    assert!((calibration.probability(1, 0.9) - 0.5).abs() < 0.01);
    assert!((calibration.probability(2, 0.3) - 0.3).abs() < 0.01);
    assert_eq!(calibration.probability(1, 0.1), 0.1, "nothing known of it");
    assert_eq!(calibration.probability(7, 0.3), calibration.probability(2, 0.3));
}

#[test]
fn gain_is_what_the_schedule_saves() {
    let item = |expert: u32, move_s: f64| Item { expert, gpu_s: 1.0, cpu_s: 4.0, move_s, contended_s: 0.0, worth: 0.0 };
    let without = LayerWork { items: vec![item(0, 3.0), item(1, 3.0), item(2, 0.0)], ..LayerWork::default() };
    let mut with = without.clone();
    with.items[0].move_s = 0.0;
    // Without: one at home (4), one moved (3 + 1). With: one moved or at home (4), the others 2: nothing saved.
    assert_eq!(prefetch_gain(&without, &with, &mut GainScratch::default()), 0.0);
    // With an expert that nobody can compute at home the moves are a chain: 7 without, 4 with.
    let disk = |w: &LayerWork| {
        let items = w.items.iter().map(|i| Item { cpu_s: f64::INFINITY, ..*i }).collect();
        LayerWork { items, ..LayerWork::default() }
    };
    assert_eq!(prefetch_gain(&disk(&without), &disk(&with), &mut GainScratch::default()), 3.0);
}

#[test]
fn logarithms_are_those_of_float64() {
    // Every exponent, and mantissas all over.
    for bits in (f32::MIN_POSITIVE.to_bits()..f32::INFINITY.to_bits()).step_by(9973) {
        let x = f32::from_bits(bits);
        let exact = f64::from(x).ln();
        assert!((f64::from(ln(x)) - exact).abs() <= 1e-6 * exact.abs().max(1.0), "{x}: {} {exact}", ln(x));
    }
    assert_eq!(ln(1.0), 0.0);
}

/// Evidence as defined, factor by factor in float64.
#[test]
fn evidence_is_the_sum_of_logarithms() {
    // More experts per token than factors of one product, and no whole number of vectors.
    let shape = Shape { num_layers: 3, num_experts: 43, experts_per_token: 9, max_distance: 2 };
    let mut transitions = Transitions::new(shape);
    let mut state = 3_u64;
    for step in 0..300 {
        for layer in 0..3 {
            let mut set: Vec<u32> = (0..9)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 40) as u32 % 43 / (1 + (state >> 33) as u32 % 4)
                })
                .collect();
            set.sort_unstable();
            set.dedup();
            transitions.observe(step, layer, &set.iter().map(|e| (*e, 1)).collect::<Vec<_>>());
            for distance in 1..3 - layer {
                transitions.know_evidence(layer, distance);
                let slow = transitions.evidence_one_by_one(layer, distance);
                let fast = transitions.evidence(layer, distance);
                assert!(fast.iter().zip(&slow).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-4), "{fast:?} {slow:?}");
            }
        }
    }
}

/// All experts at once give what each gives alone, and predictions are the likeliest of them.
#[test]
fn log_odds_of_all_are_those_of_each() {
    // Experts that fill no whole number of chunks.
    let shape = Shape { num_layers: 5, num_experts: 29, experts_per_token: 3, max_distance: 2 };
    let mut mix = Mix::new(shape);
    let mut state = 7_u64;
    for step in 0..120 {
        for layer in 0..5 {
            let mut set: Vec<(u32, u32)> = (0..3)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    ((state >> 40) as u32 % 29 / (1 + (state >> 33) as u32 % 3), 1)
                })
                .collect();
            set.sort_unstable();
            set.dedup();
            mix.observe(step, layer, &set);
            for distance in 1..=2 {
                let mut all = vec![f32::NAN; 29];
                let Some(guesses) = mix.predict_all(layer, distance, 6, &mut all) else {
                    assert!(layer + distance >= 5);
                    continue;
                };
                let slow = mix.log_odds_one_by_one(layer, distance);
                let near = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs() < 1e-5 * b.abs().max(1.0);
                assert!(all.iter().zip(&slow).all(near), "step {step}, layer {layer}: {all:?} {slow:?}");
                let mut order: Vec<u32> = (0..29).collect();
                order.sort_by(|a, b| all[*b as usize].total_cmp(&all[*a as usize]));
                let likeliest = order[..6].iter().map(|e| (*e, logistic(f64::from(all[*e as usize]))));
                assert_eq!(guesses, likeliest.collect::<Vec<_>>());
            }
        }
    }
}
