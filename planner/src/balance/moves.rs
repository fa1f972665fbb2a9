//! From one placement to another while serving: a list of moves of which every prefix leaves a valid placement.
//!
//! A device with one spare slot can take a new expert before it gives up an old one. Moves come in chains: a device copies an expert into
//! its spare slot; then it may free a slot whose expert is live somewhere else; if there is none, the device that is to get that expert
//! copies it next, and so on. Only the last device of a chain has its spare slot in use, and every link of a chain is one of the copies
//! that are needed anyway: so there is no deadlock, and nothing is copied twice. An expert is never without a live replica, a copy
//! serves only once it is complete ([`Move::Copy`], then [`Move::Switch`]), and a crash at any point leaves what was live. After
//! ElasticMoE (arXiv 2510.02613), whose slots are remapped pages.

use super::holders::LayerPlacement;
use crate::error::PlanError;

/// One step of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// Weights travel into a slot that serves nothing.
    Copy {
        /// Layer.
        layer: u32,
        /// The expert.
        expert: u16,
        /// A device where it is live.
        source: u16,
        /// The device that gets it.
        target: u16,
    },
    /// The copy is complete: the router may use it.
    Switch {
        /// Layer.
        layer: u32,
        /// The expert.
        expert: u16,
        /// Where.
        device: u16,
    },
    /// The router no longer uses this replica; its slot is free.
    Free {
        /// Layer.
        layer: u32,
        /// The expert.
        expert: u16,
        /// Where.
        device: u16,
    },
}

/// The moves of one layer. `slots`: places on each device, the spare one not counted. `[devices]`
///
/// # Errors
/// [`PlanError::BadBalance`] when a placement is not valid.
pub fn layer_moves(
    layer: u32,
    num_experts: usize,
    old: &LayerPlacement,
    new: &LayerPlacement,
    slots: &[u32],
) -> Result<Vec<Move>, PlanError> {
    old.check(num_experts, slots)?;
    new.check(num_experts, slots)?;
    let mut work = Chains {
        layer,
        live: old.devices.clone(),
        coming: difference(&new.devices, &old.devices),
        going: difference(&old.devices, &new.devices),
        slots,
        sent: vec![0; slots.len()],
        out: Vec::new(),
    };
    for device in 0..slots.len() {
        while let Some(expert) = work.coming[device].pop() {
            work.chain(device, expert);
        }
    }
    // What is not needed any more and was not in anybody's way.
    for device in 0..slots.len() {
        while let Some(expert) = work.going[device].pop() {
            work.free(device, expert);
        }
    }
    Ok(work.out)
}

/// Experts of each device of `these` that the same device of `those` has not.
fn difference(these: &[Vec<u16>], those: &[Vec<u16>]) -> Vec<Vec<u16>> {
    these.iter().zip(those).map(|(a, b)| a.iter().copied().filter(|e| !b.contains(e)).collect()).collect()
}

struct Chains<'a> {
    layer: u32,
    /// Experts that serve. `[devices][experts]`
    live: Vec<Vec<u16>>,
    coming: Vec<Vec<u16>>,
    going: Vec<Vec<u16>>,
    slots: &'a [u32],
    /// Copies that each device was the source of.
    sent: Vec<u32>,
    out: Vec<Move>,
}

impl Chains<'_> {
    /// Copies an expert to a device, and whatever has to follow until no device has one too many.
    fn chain(&mut self, device: usize, expert: u16) {
        self.copy(device, expert);
        let mut over = Some(device).filter(|d| self.is_over(*d));
        while let Some(device) = over {
            over = self.make_room(device);
        }
    }

    fn is_over(&self, device: usize) -> bool {
        self.live[device].len() > self.slots[device] as usize
    }

    /// Frees a slot of a device that has one too many; returns the device that has one too many then, if any.
    fn make_room(&mut self, device: usize) -> Option<usize> {
        let elsewhere = |e: &u16| self.live.iter().enumerate().any(|(g, l)| g != device && l.contains(e));
        if let Some(at) = self.going[device].iter().position(elsewhere) {
            let old = self.going[device].swap_remove(at);
            self.free(device, old);
            return None;
        }
        // All that could go lives nowhere else: one of them is coming on another device, and that copy is made now.
        let next = self.going[device].pop().expect("a device with more experts than slots has some that go");
        let to = (0..self.coming.len())
            .find(|g| self.coming[*g].contains(&next))
            .expect("an expert that lives only here is coming somewhere");
        self.coming[to].retain(|e| *e != next);
        self.copy(to, next);
        self.free(device, next);
        self.is_over(to).then_some(to)
    }

    fn copy(&mut self, target: usize, expert: u16) {
        let holders = (0..self.live.len()).filter(|g| self.live[*g].contains(&expert));
        let source = holders.min_by_key(|g| self.sent[*g]).expect("an expert is always live somewhere");
        self.sent[source] += 1;
        let layer = self.layer;
        self.out.push(Move::Copy { layer, expert, source: source as u16, target: target as u16 });
        self.out.push(Move::Switch { layer, expert, device: target as u16 });
        self.live[target].push(expert);
    }

    fn free(&mut self, device: usize, expert: u16) {
        self.live[device].retain(|e| *e != expert);
        self.out.push(Move::Free { layer: self.layer, expert, device: device as u16 });
    }
}

/// Moves in stages of at most `budget_bytes` sent or received by any device: how many moves each stage has. A copy larger than the budget is a
/// stage of its own.
pub fn stages(moves: &[Move], num_devices: usize, expert_bytes: u64, budget_bytes: u64) -> Vec<usize> {
    let mut out = Vec::new();
    let mut wires = vec![0_u64; 2 * num_devices];
    let mut count = 0;
    for m in moves {
        if let Move::Copy { source, target, .. } = m {
            let (s, t) = (usize::from(*source), num_devices + usize::from(*target));
            let busy = wires.iter().any(|w| *w > 0);
            if busy && (wires[s] + expert_bytes > budget_bytes || wires[t] + expert_bytes > budget_bytes) {
                out.push(count);
                count = 0;
                wires.fill(0);
            }
            wires[s] += expert_bytes;
            wires[t] += expert_bytes;
        }
        count += 1;
    }
    if count > 0 {
        out.push(count);
    }
    out
}
