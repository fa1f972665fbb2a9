//! What L1 weighs besides one layer's tokens, against brute force and integer programs: speeds, packs, pairs, copies, budgets, hops.

use good_lp::{Expression, ProblemVariables, Solution, SolverModel, constraint, variable};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tierwise_planner::balance::affinity::{align, staying};
use tierwise_planner::balance::budget::{layer_slots, share_units, spread};
use tierwise_planner::balance::eplb::{EplbShape, eplb};
use tierwise_planner::balance::holders::{Holders, LayerPlacement};
use tierwise_planner::balance::packs::{PackSpec, place_in_packs};
use tierwise_planner::balance::place::{DeviceSpec, Effort, PlaceOptions, Risk, SplitRule, place_layer, place_layer_with};
use tierwise_planner::balance::relabel::relabel;
use tierwise_planner::balance::replan::replan_layer;
use tierwise_planner::balance::split::{Splitter, Unit};
use tierwise_planner::balance::terms::{Terms, Together, copies};

fn devices(n: usize, slots: u32) -> Vec<DeviceSpec> {
    vec![DeviceSpec { node: 0, inverse_speed: 1.0, slots }; n]
}

fn equal() -> PlaceOptions {
    PlaceOptions { split: SplitRule::Equal, ..PlaceOptions::default() }
}

/// Largest load per speed when tokens are divided exactly.
fn exactly(holders: &Holders, load: &[f64], speed: &[f64]) -> f64 {
    let tokens: Vec<u64> = load.iter().map(|w| (w * 1e6).round() as u64).collect();
    Splitter::default().split(holders, &tokens, speed, Unit::Tokens) / 1e6
}

#[test]
fn devices_of_different_speeds_and_slots_are_filled_as_an_integer_program_fills_them() {
    let mut rng = StdRng::seed_from_u64(1);
    for _ in 0..6 {
        let speed: Vec<f64> = (0..3).map(|_| rng.random_range(0.5..2.0)).collect();
        let slots: [u32; 3] = [2, 3, 4];
        let load: Vec<f64> = (0..7).map(|_| rng.random_range(0.0..6.0_f64).exp2()).collect();
        let mut vars = ProblemVariables::new();
        let most = vars.add(variable().min(0.0));
        let mut rules = Vec::new();
        let (mut on, mut used) = (vec![Expression::from(0.0); 3], vec![Expression::from(0.0); 3]);
        for w in &load {
            let mut sum = Expression::from(0.0);
            for g in 0..3 {
                let (y, x) = (vars.add(variable().binary()), vars.add(variable().min(0.0)));
                rules.push(constraint!(x <= *w * y));
                sum.add_mul(1.0, x);
                on[g].add_mul(1.0 / speed[g], x);
                used[g].add_mul(1.0, y);
            }
            rules.push(constraint!(sum == *w));
        }
        let mut problem = vars.minimise(most).using(good_lp::microlp);
        rules.into_iter().for_each(|r| {
            problem.add_constraint(r);
        });
        for (g, (l, u)) in on.into_iter().zip(used).enumerate() {
            problem.add_constraint(constraint!(l <= most));
            problem.add_constraint(constraint!(u <= f64::from(slots[g])));
        }
        let best = problem.solve().expect("feasible").value(most);
        let fleet: Vec<DeviceSpec> =
            (0..3).map(|g| DeviceSpec { node: 0, inverse_speed: 1.0 / speed[g], slots: slots[g] }).collect();
        let placed = place_layer(std::slice::from_ref(&load), &fleet, &PlaceOptions::default()).expect("feasible");
        placed.placement.check(7, &slots).expect("valid");
        assert!(placed.objective >= best * (1.0 - 1e-5) && placed.objective <= best * 1.01, "{} and {best}", placed.objective);
        assert!(placed.lower_bound <= best * (1.0 + 1e-6), "{} and {best}", placed.lower_bound);
    }
}

/// The best choice for every expert of either the host of one device or the GPUs of some.
fn packs_by_brute_force(load: &[f64], gpus: usize, slots: u32, price: f64) -> f64 {
    let choices = gpus + (1 << gpus) - 1;
    let mut at = vec![0_usize; load.len()];
    let mut best = f64::INFINITY;
    loop {
        let mut scaled = load.to_vec();
        let mut lists = vec![Vec::new(); load.len()];
        let mut used = vec![0; gpus];
        for (e, choice) in at.iter().enumerate() {
            if *choice < gpus {
                scaled[e] *= price;
                lists[e].push(*choice as u16);
            } else {
                let set = choice - gpus + 1;
                (0..gpus).filter(|g| set >> g & 1 == 1).for_each(|g| {
                    lists[e].push(g as u16);
                    used[g] += 1;
                });
            }
        }
        if used.iter().all(|u| *u <= slots) {
            best = best.min(exactly(&Holders::new(&lists, gpus), &scaled, &vec![1.0; gpus]));
        }
        let Some(digit) = (0..load.len()).find(|d| at[*d] + 1 < choices) else { return best };
        at[digit] += 1;
        at[..digit].fill(0);
    }
}

#[test]
fn what_does_not_fit_on_gpus_goes_to_the_hosts_as_brute_force_would() {
    let mut rng = StdRng::seed_from_u64(2);
    let (mut optimal, mut worst) = (0, 1.0_f64);
    for round in 0..24 {
        let load: Vec<f64> = (0..6).map(|_| rng.random_range(0.0..6.0_f64).exp2().round()).collect();
        let price = [1.5, 3.0, 10.0][round % 3];
        let host = PackSpec { price, slots: vec![6; 2] };
        let found =
            place_in_packs(std::slice::from_ref(&load), &devices(2, 2), &[host], &PlaceOptions::default(), Terms::default())
                .expect("there is room");
        // What it claims is what its placement is worth.
        let scaled: Vec<f64> = load.iter().zip(&found.pack_of).map(|(l, p)| if *p == 0 { *l } else { l * price }).collect();
        let value = exactly(&found.placed.placement.holders(6), &scaled, &[1.0; 2]);
        assert!((value - found.placed.objective).abs() <= 1e-5 * value, "{value} and {found:?}");
        for held in &found.placed.placement.devices {
            assert!(held.iter().filter(|e| found.pack_of[usize::from(**e)] == 0).count() <= 2, "{found:?}");
        }
        let best = packs_by_brute_force(&load, 2, 2, price);
        assert!(value >= best * (1.0 - 1e-5), "better than the best: {value} and {best}");
        assert!(found.placed.lower_bound <= best * (1.0 + 1e-5), "no bound: {} and {best}", found.placed.lower_bound);
        optimal += u32::from(value <= best * (1.0 + 1e-4));
        worst = worst.max(value / best);
    }
    println!("packs: {optimal} of 24 optimal, worst {worst:.4}");
    assert!(optimal >= 18 && worst < 1.1, "{optimal} of 24 optimal, worst {worst}");
}

#[test]
fn pairs_that_travel_together_lie_together_when_that_pays() {
    let mut rng = StdRng::seed_from_u64(3);
    let mut optimal = 0;
    for _ in 0..20 {
        let n = 6_usize;
        let load: Vec<f64> = (0..n).map(|_| rng.random_range(50.0..100.0_f64).round()).collect();
        let mut counts = vec![0.0; n * n];
        for e in 0..n {
            for f in 0..e {
                let c = rng.random_range(0.0..30.0_f64).round();
                (counts[e * n + f], counts[f * n + e]) = (c, c);
            }
        }
        let price = rng.random_range(0.1..1.0);
        let terms = Terms { together: Some(Together { counts: &counts, price, by_node: false }), ..Terms::default() };
        let placed = place_layer_with(std::slice::from_ref(&load), &devices(2, 3), &equal(), terms).expect("feasible");
        // Three experts on each of two devices.
        let mut best = f64::INFINITY;
        for set in (0..1_u32 << n).filter(|s| s.count_ones() == 3) {
            let part = |side: u32| (0..n as u16).filter(|e| u32::from(set >> e & 1 == 1) == side).collect::<Vec<u16>>();
            let p = LayerPlacement { devices: vec![part(0), part(1)] };
            let most = p.equal_loads(&load).into_iter().fold(0.0, f64::max);
            best = best.min(most + price * terms.pairs_apart(&p, &devices(2, 3)));
        }
        let most = placed.placement.equal_loads(&load).into_iter().fold(0.0, f64::max);
        let value = most + terms.price(&placed.placement, &devices(2, 3));
        assert!((value - placed.objective).abs() < 1e-6 * value, "the search counts as the definition does: {value}, {placed:?}");
        assert!(value >= best - 1e-9 && value <= best * 1.05, "{value} and {best}");
        optimal += u32::from(value <= best * (1.0 + 1e-9));
    }
    println!("pairs: {optimal} of 20 optimal");
    assert!(optimal >= 16, "{optimal}");
}

#[test]
fn a_price_of_copies_is_paid_only_when_the_balance_is_worth_it() {
    let load = vec![vec![100.0, 60.0, 50.0, 40.0, 30.0, 20.0]];
    let old = LayerPlacement { devices: vec![vec![0, 1, 2], vec![3, 4, 5]] };
    let copies_at = |price: f64| {
        let terms = Terms { old: Some((&old, price)), ..Terms::default() };
        let placed = place_layer_with(&load, &devices(2, 3), &equal(), terms).expect("feasible");
        let most = placed.placement.equal_loads(&load[0]).into_iter().fold(0.0, f64::max);
        assert!((placed.objective - most - price * terms.copies(&placed.placement) as f64).abs() < 1e-9);
        terms.copies(&placed.placement)
    };
    // 210 and 90 as it is; 170 and 130 by one swap (two copies), 150 and 150 by another.
    assert_eq!(copies_at(1000.0), 0);
    assert!(copies_at(1.0) > 0);
}

#[test]
fn a_new_placement_moves_at_most_half_of_what_eplb_moves_and_is_as_good() {
    let mut rng = StdRng::seed_from_u64(4);
    let normal = |rng: &mut StdRng| {
        let radius = (-2.0 * rng.random_range(f64::MIN_POSITIVE..1.0_f64).ln()).sqrt();
        radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
    };
    for (experts, num, slots, drift) in [(64, 8, 10, 0.3), (128, 16, 9, 0.2), (64, 8, 9, 0.5)] {
        for split in [SplitRule::Equal, SplitRule::Exact] {
            let options = PlaceOptions { split, effort: Effort::Fast, ..PlaceOptions::default() };
            let fleet = devices(num, slots);
            let (mut moved, mut upstream, mut best, mut found) = (0, 0, 0.0, 0.0);
            for _ in 0..6 {
                let before: Vec<f64> = (0..experts).map(|_| (normal(&mut rng)).exp() * 1000.0).collect();
                let after: Vec<f64> = before.iter().map(|w| w * (normal(&mut rng) * drift).exp()).collect();
                let shape = EplbShape { num_replicas: num * slots as usize, num_groups: 1, num_nodes: 1, num_devices: num };
                let theirs = eplb(&[before.clone(), after.clone()], shape).expect("divides").physical_to_logical;
                let theirs = theirs.map_rows(num);
                upstream += copies(&theirs[0], &theirs[1]);
                let old = place_layer(std::slice::from_ref(&before), &fleet, &options).expect("feasible").placement;
                let fresh = place_layer(std::slice::from_ref(&after), &fleet, &options).expect("feasible");
                let new = replan_layer(std::slice::from_ref(&after), &fleet, &old, 0.01, &options, Terms::default());
                let new = new.expect("feasible");
                new.placement.check(experts, &vec![slots; num]).expect("valid");
                assert!(new.objective <= fresh.objective * 1.01 * (1.0 + 1e-9), "{} and {}", new.objective, fresh.objective);
                moved += copies(&old, &new.placement);
                (best, found) = (best + fresh.objective, found + new.objective);
                let blind = LayerPlacement { devices: relabel(&old.devices, &fresh.placement.devices, &fleet) };
                assert!(copies(&old, &new.placement) <= copies(&old, &blind));
            }
            println!(
                "{experts} experts, {num} devices, {split:?}: {moved} copies, EPLB {upstream}; {:.4} of fresh",
                found / best
            );
            assert!(2 * moved <= upstream, "{experts} experts, {num} devices, {split:?}: {moved} and {upstream}");
        }
    }
}

/// Rows of slots as placements.
trait MapRows {
    fn map_rows(&self, devices: usize) -> Vec<LayerPlacement>;
}

impl MapRows for Vec<Vec<u16>> {
    fn map_rows(&self, devices: usize) -> Vec<LayerPlacement> {
        self.iter().map(|row| LayerPlacement::from_slots(row, devices)).collect()
    }
}

#[test]
fn one_budget_is_shared_among_layers_as_by_brute_force() {
    let mut rng = StdRng::seed_from_u64(5);
    for _ in 0..50 {
        let curves: Vec<Vec<f64>> =
            (0..3).map(|_| (0..rng.random_range(1..5)).map(|_| rng.random_range(0.0..9.0)).collect()).collect();
        let units = rng.random_range(0..8);
        let given = share_units(&curves, units);
        let sum: f64 = curves.iter().zip(&given).map(|(c, k)| c[*k]).sum();
        assert!(given.iter().sum::<usize>() <= units);
        let mut best = f64::INFINITY;
        for a in 0..curves[0].len() {
            for b in 0..curves[1].len() {
                for c in 0..curves[2].len() {
                    if a + b + c <= units {
                        best = best.min(curves[0][a] + curves[1][b] + curves[2][c]);
                    }
                }
            }
        }
        assert!((sum - best).abs() < 1e-12, "{sum} and {best}");
        // Slots are spread within every device's room.
        let room: Vec<u64> = (0..4).map(|_| rng.random_range(5..40)).collect();
        let layers: Vec<usize> = (0..5).map(|_| rng.random_range(0..=room.iter().sum::<u64>() as usize / 5)).collect();
        let rows = spread(&layers, &room, 40).expect("room enough");
        for (row, slots) in rows.iter().zip(&layers) {
            assert_eq!(row.iter().sum::<u32>() as usize, *slots);
        }
        for (g, room) in room.iter().enumerate() {
            assert!(rows.iter().map(|r| u64::from(r[g])).sum::<u64>() <= *room);
        }
    }
}

#[test]
fn skewed_layers_get_more_slots_and_memory_limits_hold() {
    // Three layers, one of them flat, one with a hot expert, one with four; devices with room for 4 to 8 experts a layer.
    let with = |hot: usize| -> Vec<Vec<f64>> { vec![(0..16).map(|e| if e < hot { 400.0 } else { 100.0 }).collect()] };
    let windows = vec![with(0), with(1), with(4)];
    let fleet = devices(4, 0);
    let room = [13, 14, 15, 18];
    let options = equal();
    let slots = layer_slots(&windows, &fleet, &room, None, &options).expect("room enough");
    for (g, room) in room.iter().enumerate() {
        assert!(slots.iter().map(|l| u64::from(l[g])).sum::<u64>() <= *room, "{slots:?}");
    }
    let of = |slots: &[Vec<u32>]| -> f64 {
        let layer = |(w, row): (&Vec<Vec<f64>>, &Vec<u32>)| {
            let fleet: Vec<DeviceSpec> = fleet.iter().zip(row).map(|(d, s)| DeviceSpec { slots: *s, ..*d }).collect();
            place_layer(w, &fleet, &options).expect("feasible").objective
        };
        windows.iter().zip(slots).map(layer).sum()
    };
    let even = spread(&[20, 20, 20], &room, 16).expect("room enough");
    assert!(of(&slots) <= of(&even) * (1.0 + 1e-9), "{slots:?}: {} and {}", of(&slots), of(&even));
    let error = layer_slots(&windows, &fleet, &[4; 4], None, &options).expect_err("48 experts in 16 slots").to_string();
    assert!(error.contains("room for experts of all layers is 16, expected 48 or more"), "{error}");
    // With a host to fall back to, the flat layer is not starved for the others.
    let tight = layer_slots(&windows, &fleet, &[8; 4], Some(4.0), &options).expect("hosts take the rest");
    assert!(tight.iter().flatten().sum::<u32>() <= 32, "{tight:?}");
}

#[test]
fn hops_stay_on_their_device_as_by_brute_force() {
    let mut rng = StdRng::seed_from_u64(6);
    for _ in 0..40 {
        let (n, per) = (rng.random_range(2..5), 3);
        let experts = n * per;
        let hops: Vec<f64> = (0..experts * experts).map(|_| f64::from(rng.random_range(0..100_u32))).collect();
        let shuffled = |rng: &mut StdRng| {
            let order = rand::seq::index::sample(rng, experts, experts).into_vec();
            LayerPlacement { devices: order.chunks(per).map(|c| c.iter().map(|e| *e as u16).collect()).collect() }
        };
        let (a, b) = (shuffled(&mut rng), shuffled(&mut rng));
        let found = staying(&a, &align(&a, &b, &hops, &devices(n, per as u32)), &hops);
        fn permutations(n: usize) -> Vec<Vec<usize>> {
            if n == 0 {
                return vec![Vec::new()];
            }
            permutations(n - 1).iter().flat_map(|p| (0..n).map(move |at| [&p[..at], &[n - 1], &p[at..]].concat())).collect()
        }
        let of = |p: &Vec<usize>| LayerPlacement { devices: p.iter().map(|i| b.devices[*i].clone()).collect() };
        let best = permutations(n).iter().map(|p| staying(&a, &of(p), &hops)).fold(0.0, f64::max);
        assert!((found - best).abs() < 1e-9, "{found} and {best}");
    }
}

#[test]
fn the_worst_windows_count_more_when_asked() {
    // Thirty calm windows and two in which experts 0 and 1 are hot together.
    let mut windows = vec![vec![10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0]; 30];
    windows.extend(vec![vec![100.0, 100.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0]; 2]);
    let risk = PlaceOptions { risk: Risk::Cvar { share: 0.0625 }, ..equal() };
    let p = place_layer(&windows, &devices(2, 4), &risk).expect("feasible");
    let held = &p.placement.devices[0];
    assert!(held.contains(&0) != held.contains(&1), "{p:?}");
    // 32 windows, a sixteenth of them: the two.
    assert!((p.objective - 130.0).abs() < 1e-9 && p.lower_bound <= p.objective, "{p:?}");
}
