//! How long EPLB, our placement (L1), the exact split (L2) and the spill (L3) take.
//!
//! Before criterion's means, the least and the median time of single calls: these are far shorter than a slice of the processor's time, so
//! that other work on the machine lengthens few of them.

use criterion::{Criterion, criterion_group, criterion_main};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::hint::black_box;
use std::time::Instant;
use tierwise_planner::balance::cost::{LayerCost, Rates};
use tierwise_planner::balance::eplb::{EplbShape, eplb};
use tierwise_planner::balance::lla::{LlaSettings, lla};
use tierwise_planner::balance::place::{DeviceSpec, Effort, PlaceOptions, SplitRule, place_layer};
use tierwise_planner::balance::spill::{SpillCache, SpillSettings, Spiller};
use tierwise_planner::balance::split::{Splitter, Unit};

/// Log-normal loads. `[layers][experts]`
fn loads(layers: usize, experts: usize, sigma: f64, seed: u64) -> Vec<Vec<f64>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut one = || {
        let radius = (-2.0 * rng.random_range(f64::MIN_POSITIVE..1.0_f64).ln()).sqrt();
        ((radius * (std::f64::consts::TAU * rng.random::<f64>()).cos() * sigma).exp() * 1000.0).round()
    };
    (0..layers).map(|_| (0..experts).map(|_| one()).collect()).collect()
}

fn devices(n: usize, slots: u32) -> Vec<DeviceSpec> {
    vec![DeviceSpec { node: 0, inverse_speed: 1.0, slots }; n]
}

/// Prints the least and the median time of a call.
fn each_call(name: &str, calls: usize, mut call: impl FnMut()) {
    (0..calls / 10).for_each(|_| call());
    let mut times: Vec<u128> = (0..calls)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed().as_nanos()
        })
        .collect();
    times.sort_unstable();
    println!("{name}: least {:.2} us, median {:.2} us", times[0] as f64 / 1e3, times[calls / 2] as f64 / 1e3);
}

fn placements(c: &mut Criterion) {
    let mut group = c.benchmark_group("58 layers, 256 experts in 288 slots of 32 devices");
    let weight = loads(58, 256, 1.0, 1);
    let shape = |num_groups, num_nodes| EplbShape { num_replicas: 288, num_groups, num_nodes, num_devices: 32 };
    each_call("EPLB, hierarchical", 50, || drop(eplb(black_box(&weight), shape(8, 4))));
    each_call("EPLB, global", 50, || drop(eplb(black_box(&weight), shape(1, 1))));
    group.bench_function("EPLB, hierarchical", |b| b.iter(|| eplb(black_box(&weight), shape(8, 4)).expect("divides")));
    group.bench_function("EPLB, global", |b| b.iter(|| eplb(black_box(&weight), shape(1, 1)).expect("divides")));
    let fleet = devices(32, 9);
    for (name, split) in [("ours, equal split", SplitRule::Equal), ("ours, exact split", SplitRule::Exact)] {
        let options = PlaceOptions { split, effort: Effort::Fast, ..PlaceOptions::default() };
        let layer = |w| place_layer(std::slice::from_ref(w), &fleet, &options).expect("fits").objective;
        each_call(name, 50, || {
            black_box(weight.iter().map(layer).sum::<f64>());
        });
        group.bench_function(name, |b| b.iter(|| weight.iter().map(layer).sum::<f64>()));
    }
    group.finish();
}

fn batches(c: &mut Criterion) {
    let mut group = c.benchmark_group("one batch, 384 experts on 64 devices");
    let past = loads(1, 384, 0.9, 2).remove(0);
    let placed = place_layer(
        std::slice::from_ref(&past),
        &devices(64, 7),
        &PlaceOptions { effort: Effort::Fast, ..PlaceOptions::default() },
    );
    let holders = placed.expect("fits").placement.holders(384);
    // Batches fluctuate around the past.
    let batches: Vec<Vec<u64>> = (0..32)
        .map(|seed| past.iter().zip(&loads(1, 384, 0.4, 100 + seed)[0]).map(|(p, f)| (p * f / 1000.0).round() as u64).collect())
        .collect();
    let speed = vec![1.0; 64];
    let mut splitter = Splitter::default();
    let mut at = batches.iter().cycle();
    each_call("L2, tokens", 10_000, || {
        splitter.split(&holders, black_box(at.next().expect("endless")), &speed, Unit::Tokens);
    });
    group.bench_function("L2, tokens", |b| {
        b.iter(|| splitter.split(&holders, black_box(at.next().expect("endless")), &speed, Unit::Tokens));
    });
    group.bench_function("L2, distinct experts", |b| {
        b.iter(|| splitter.split(&holders, black_box(at.next().expect("endless")), &speed, Unit::Experts));
    });
    let cost = LayerCost::new(7168, 2048, 2.0, &Rates::h100());
    let settings = SpillSettings { min_tokens: 1024, slots_per_device: 4, max_rows: u64::MAX, host_bytes_per_s: 0.0 };
    // Copies are kept over all layers of a model, or all for this one, or none.
    for (name, layers, slots) in [
        ("L2 and L3, 58 layers share the copies", 58, 4),
        ("L2 and L3, one layer has all copies", 1, 4),
        ("L2 and L3, no copies", 1, 0),
    ] {
        let settings = SpillSettings { slots_per_device: slots, ..settings };
        let mut cache = SpillCache::new(64, slots);
        let (mut spiller, mut step) = (Spiller::default(), 0);
        let mut plan = || {
            step += 1;
            let batch = black_box(at.next().expect("endless"));
            spiller.plan(&holders, batch, &speed, &cost, &settings, &mut cache, step % layers).seconds
        };
        each_call(name, 10_000, || {
            black_box(plan());
        });
        group.bench_function(name, |b| b.iter(&mut plan));
        println!("{name}: {} copies held", (0..64).map(|g| cache.of(g).count()).sum::<usize>());
    }
    let settings = LlaSettings { num_ranks: 64, alpha: 1.0, min_tokens_per_gemm: 1024 };
    group.bench_function("LLA", |b| b.iter(|| lla(black_box(at.next().expect("endless")), &settings).expect("divides")));
    group.finish();
}

criterion_group!(benches, placements, batches);
criterion_main!(benches);
