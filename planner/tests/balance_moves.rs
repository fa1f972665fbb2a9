//! Changes of placement: every prefix of the moves is a valid state, and going on from a crash at any step arrives.

use proptest::prelude::*;
use tierwise_planner::balance::holders::LayerPlacement;
use tierwise_planner::balance::moves::{Move, layer_moves, stages};

const EXPERTS: usize = 9;

/// A valid placement: experts dealt from a shuffled list, slots filled up with others.
fn placement(devices: usize, slots: usize) -> impl Strategy<Value = LayerPlacement> {
    let order = Just((0..EXPERTS as u16).collect::<Vec<_>>()).prop_shuffle();
    (order, prop::collection::vec((0..devices, 0..EXPERTS as u16), 0..12)).prop_map(move |(order, more)| {
        let mut held = vec![Vec::new(); devices];
        for (i, e) in order.into_iter().enumerate() {
            held[i % devices].push(e);
        }
        for (g, e) in more {
            if held[g].len() < slots && !held[g].contains(&e) {
                held[g].push(e);
            }
        }
        LayerPlacement { devices: held }
    })
}

/// The slots of a device, played move by move: what serves, and what is being written.
#[derive(Clone)]
struct World {
    live: Vec<Vec<u16>>,
    writing: Vec<Option<u16>>,
}

impl World {
    fn play(&mut self, m: &Move, slots: usize) {
        match *m {
            Move::Copy { expert, source, target, .. } => {
                let target = usize::from(target);
                assert!(self.live[usize::from(source)].contains(&expert), "copied from where it does not serve: {m:?}");
                assert!(!self.live[target].contains(&expert), "copied to where it is: {m:?}");
                assert!(self.writing[target].is_none() && self.live[target].len() <= slots, "no spare slot: {m:?}");
                self.writing[target] = Some(expert);
            }
            Move::Switch { expert, device, .. } => {
                assert_eq!(self.writing[usize::from(device)].take(), Some(expert), "switched before it was copied");
                self.live[usize::from(device)].push(expert);
            }
            Move::Free { expert, device, .. } => {
                let held = &mut self.live[usize::from(device)];
                let before = held.len();
                held.retain(|e| *e != expert);
                assert_eq!(held.len() + 1, before, "freed what is not there: {m:?}");
            }
        }
        for e in 0..EXPERTS as u16 {
            assert!(self.live.iter().any(|l| l.contains(&e)), "expert {e} serves nowhere after {m:?}");
        }
        assert!(self.live.iter().all(|l| l.len() <= slots + 1));
    }
}

fn sorted(mut p: Vec<Vec<u16>>) -> Vec<Vec<u16>> {
    p.iter_mut().for_each(|l| l.sort_unstable());
    p
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]
    #[test]
    fn every_prefix_serves_every_expert_and_a_crash_is_harmless(
        (slots, old, new) in (2_usize..5, 3_usize..6)
            .prop_filter("room", |(d, s)| d * s > EXPERTS && EXPERTS.div_ceil(*d) <= *s)
            .prop_flat_map(|(d, s)| (Just(s), placement(d, s), placement(d, s))),
    ) {
        let room = vec![slots as u32; old.devices.len()];
        let moves = layer_moves(0, EXPERTS, &old, &new, &room).expect("valid placements");
        let copies = moves.iter().filter(|m| matches!(m, Move::Copy { .. })).count();
        let needed: usize = new.devices.iter().zip(&old.devices).map(|(n, o)| n.iter().filter(|e| !o.contains(e)).count()).sum();
        prop_assert_eq!(copies, needed, "as many copies as experts that are new to their device");
        let mut world = World { live: old.devices.clone(), writing: vec![None; old.devices.len()] };
        for (at, m) in moves.iter().enumerate() {
            world.play(m, slots);
            // A crash here: what was being written is lost, what served serves. A device may still have one too many.
            let mut after = world.clone();
            after.writing.iter_mut().for_each(|w| *w = None);
            let found = LayerPlacement { devices: after.live.clone() };
            let over: Vec<u32> = found.devices.iter().map(|l| l.len().max(slots) as u32).collect();
            let again = layer_moves(0, EXPERTS, &found, &new, &over).expect("what a crash leaves is a placement");
            for m in &again {
                after.play(m, slots + 1);
            }
            prop_assert_eq!(sorted(after.live), sorted(new.devices.clone()), "after a crash at move {}", at);
        }
        prop_assert_eq!(sorted(world.live), sorted(new.devices));
        // Stages hold all moves and keep the budget.
        for budget in [1, 3, 100] {
            let cut = stages(&moves, room.len(), 1, budget);
            prop_assert_eq!(cut.iter().sum::<usize>(), moves.len());
            let mut from = 0;
            for n in cut {
                let part = &moves[from..from + n];
                from += n;
                for g in 0..room.len() as u16 {
                    let sent = part.iter().filter(|m| matches!(m, Move::Copy { source, .. } if *source == g)).count();
                    let got = part.iter().filter(|m| matches!(m, Move::Copy { target, .. } if *target == g)).count();
                    prop_assert!(sent.max(got) as u64 <= budget);
                }
            }
        }
    }
}

#[test]
fn placements_that_are_none_are_refused() {
    let good = LayerPlacement { devices: vec![vec![0, 1], vec![2]] };
    #[rustfmt::skip]
    let table = [
        (vec![vec![0, 1], vec![0]], "devices that hold expert 2 is none"),
        (vec![vec![0, 1], vec![2, 2]], "experts of device 1 is 2 twice"),
        (vec![vec![0, 1], vec![2, 3]], "expert on device 1 is 3, expected below 3"),
        (vec![vec![0, 1, 2], vec![]], "experts on device 0 is 3, expected at most 2"),
        (vec![vec![0, 1, 2]], "number of devices is 1, expected 2"),
    ];
    for (devices, message) in table {
        let error = layer_moves(0, 3, &good, &LayerPlacement { devices }, &[2, 2]).expect_err(message).to_string();
        assert!(error.contains(message), "{error}");
    }
}
