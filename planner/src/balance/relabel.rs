//! Which new set of experts goes to which device, so that the fewest weights move.
//!
//! Devices of one node with equal speed and slots are interchangeable: an assignment problem, solved exactly by the Hungarian method
//! with potentials, O(n^3). Kept experts keep their slots.

use super::place::DeviceSpec;

/// Reorders `new` (`[devices][experts held]`) among interchangeable devices; experts that stay keep their place in `old`.
pub fn relabel(old: &[Vec<u16>], new: &[Vec<u16>], devices: &[DeviceSpec]) -> Vec<Vec<u16>> {
    let kept = |have: &[u16], want: &[u16]| want.iter().filter(|e| have.contains(e)).count() as i64;
    let taken = assign_classes(devices, |g, h| -kept(&old[g], &new[h]));
    old.iter().zip(taken).map(|(was, h)| in_place(was, &new[h])).collect()
}

/// Which of the interchangeable devices each one takes the place of, with the least sum of `cost(device, place)`. `[devices]`
pub(super) fn assign_classes(devices: &[DeviceSpec], cost: impl Fn(usize, usize) -> i64) -> Vec<usize> {
    let mut out = vec![usize::MAX; devices.len()];
    for first in 0..devices.len() {
        if out[first] != usize::MAX {
            continue;
        }
        let class: Vec<usize> = (first..devices.len()).filter(|g| devices[*g] == devices[first]).collect();
        let table: Vec<Vec<i64>> = class.iter().map(|g| class.iter().map(|h| cost(*g, *h)).collect()).collect();
        assignment(&table).into_iter().enumerate().for_each(|(i, j)| out[class[i]] = class[j]);
    }
    out
}

/// The experts of `new`, those of `old` in their slots.
pub(super) fn in_place(old: &[u16], new: &[u16]) -> Vec<u16> {
    let mut coming = new.iter().filter(|e| !old.contains(e));
    let mut out: Vec<u16> = old.iter().filter_map(|e| if new.contains(e) { Some(*e) } else { coming.next().copied() }).collect();
    out.extend(coming);
    out
}

/// The column of each row, each column once, with the least sum.
fn assignment(cost: &[Vec<i64>]) -> Vec<usize> {
    let n = cost.len();
    // Columns and rows from 1; 0 stands for none.
    let (mut u, mut v) = (vec![0_i64; n + 1], vec![0_i64; n + 1]);
    let (mut row_of, mut way) = (vec![0_usize; n + 1], vec![0_usize; n + 1]);
    for i in 1..=n {
        row_of[0] = i;
        let mut j0 = 0;
        let mut least = vec![i64::MAX; n + 1];
        let mut used = vec![false; n + 1];
        loop {
            used[j0] = true;
            let (row, mut delta, mut j1) = (row_of[j0], i64::MAX, 0);
            for j in (1..=n).filter(|j| !used[*j]).collect::<Vec<_>>() {
                let now = cost[row - 1][j - 1] - u[row] - v[j];
                if now < least[j] {
                    least[j] = now;
                    way[j] = j0;
                }
                if least[j] < delta {
                    delta = least[j];
                    j1 = j;
                }
            }
            for j in 0..=n {
                if used[j] {
                    u[row_of[j]] += delta;
                    v[j] -= delta;
                } else if least[j] < i64::MAX {
                    least[j] -= delta;
                }
            }
            j0 = j1;
            if row_of[j0] == 0 {
                break;
            }
        }
        while j0 != 0 {
            let j1 = way[j0];
            row_of[j0] = row_of[j1];
            j0 = j1;
        }
    }
    let mut out = vec![0; n];
    for j in 1..=n {
        out[row_of[j] - 1] = j - 1;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    #[test]
    fn fewest_experts_move_by_brute_force() {
        fn permutations(n: usize) -> Vec<Vec<usize>> {
            if n == 0 {
                return vec![Vec::new()];
            }
            permutations(n - 1).iter().flat_map(|p| (0..n).map(move |at| [&p[..at], &[n - 1], &p[at..]].concat())).collect()
        }
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..100 {
            let n = rng.random_range(1..6);
            let devices = vec![DeviceSpec { node: 0, inverse_speed: 1.0, slots: 4 }; n];
            let mut set = || -> Vec<Vec<u16>> {
                (0..n).map(|_| rand::seq::index::sample(&mut rng, 10, 4).into_iter().map(|e| e as u16).collect()).collect()
            };
            let (old, new) = (set(), set());
            let moves =
                |now: &[Vec<u16>]| now.iter().zip(&old).map(|(n, o)| n.iter().filter(|e| !o.contains(e)).count()).sum::<usize>();
            let out = relabel(&old, &new, &devices);
            let best = permutations(n).iter().map(|p| moves(&p.iter().map(|i| new[*i].clone()).collect::<Vec<_>>())).min();
            assert_eq!(Some(moves(&out)), best);
            for (now, was) in out.iter().zip(&old) {
                now.iter().zip(was).for_each(|(n, o)| assert!(n == o || !now.contains(o), "what stays keeps its slot"));
            }
        }
    }
}
