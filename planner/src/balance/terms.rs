//! What else a placement is judged by, besides the slowest device: copies that it needs, tokens that travel, packs that are full.
//!
//! * moves: every expert on a device that does not hold it in the placement in use has to be copied there;
//! * affinity: a token whose experts are on one device (or node) is sent once; counted in pairs of experts that tokens choose together;
//! * packs: a device has memories of its own, the GPU's first, then the host's and the disk's. An expert in a later pack has one
//!   replica only (what does not fit once is not copied), and its tokens count more: the caller scales its load by the pack's price.

use super::holders::LayerPlacement;
use super::place::DeviceSpec;

/// How often experts are chosen by the same token.
#[derive(Debug, Clone, Copy)]
pub struct Together<'a> {
    /// Tokens of a mean window that chose both; symmetric, the diagonal is not read. `[experts][experts]`
    pub counts: &'a [f64],
    /// Price of a pair that is apart, in tokens computed on a device.
    pub price: f64,
    /// Together means on one node, not on one device.
    pub by_node: bool,
}

/// Experts' memories, where a device has several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packs {
    /// 0 for the device's own slots ([`DeviceSpec::slots`]). `[experts]`
    pub pack_of: Vec<u8>,
    /// Room of the packs after the first. `[packs - 1][devices]`
    pub slots: Vec<Vec<u32>>,
}

/// The terms beside the slowest device; none by default.
#[derive(Debug, Clone, Copy, Default)]
pub struct Terms<'a> {
    /// The placement in use, and the price of a copy in tokens computed on a device.
    pub old: Option<(&'a LayerPlacement, f64)>,
    /// Tokens' pairs of experts.
    pub together: Option<Together<'a>>,
    /// Memories.
    pub packs: Option<&'a Packs>,
}

impl Terms<'_> {
    /// Nothing but the slowest device has a price.
    pub(super) const fn is_plain(&self) -> bool {
        self.old.is_none() && self.together.is_none()
    }

    /// The pack of an expert.
    pub(super) fn pack_of(&self, expert: u16) -> u8 {
        self.packs.map_or(0, |p| p.pack_of[usize::from(expert)])
    }

    /// May there be a second replica?
    pub(super) fn may_replicate(&self, expert: u16) -> bool {
        self.pack_of(expert) == 0
    }

    /// Does a device that holds these have room for one more expert of this one's pack?
    pub(super) fn has_room(&self, devices: &[DeviceSpec], device: usize, held: &[u16], expert: u16) -> bool {
        let Some(packs) = self.packs else { return held.len() < devices[device].slots as usize };
        let pack = self.pack_of(expert);
        let room = if pack == 0 { devices[device].slots } else { packs.slots[usize::from(pack) - 1][device] };
        held.iter().filter(|e| self.pack_of(**e) == pack).count() < room as usize
    }

    /// Experts that a device can hold in all its packs. `[devices]`
    pub fn room(&self, devices: &[DeviceSpec]) -> Vec<u32> {
        let more = |g: usize| self.packs.map_or(0, |p| p.slots.iter().map(|s| s[g]).sum());
        devices.iter().enumerate().map(|(g, d)| d.slots.saturating_add(more(g))).collect()
    }

    /// Where each device belongs for [`Together`].
    pub(super) fn domains(&self, devices: &[DeviceSpec]) -> Vec<u16> {
        let by_node = self.together.is_some_and(|t| t.by_node);
        devices.iter().enumerate().map(|(g, d)| if by_node { d.node } else { g as u16 }).collect()
    }

    /// Copies that a placement needs, coming from the one in use.
    pub fn copies(&self, placement: &LayerPlacement) -> usize {
        self.old.map_or(0, |(old, _)| copies(old, placement))
    }

    /// Pairs of a mean window whose experts are apart; a replicated expert is on each of its holders with equal probability.
    pub fn pairs_apart(&self, placement: &LayerPlacement, devices: &[DeviceSpec]) -> f64 {
        let Some(t) = self.together else { return 0.0 };
        let experts = t.counts.len().isqrt();
        let domains = self.domains(devices);
        let num_domains = domains.iter().map(|d| usize::from(*d) + 1).max().unwrap_or(1);
        let count = placement.counts(experts);
        let mut share = vec![0.0; experts * num_domains];
        for (held, domain) in placement.devices.iter().zip(&domains) {
            for e in held.iter().map(|e| usize::from(*e)) {
                share[e * num_domains + usize::from(*domain)] += 1.0 / f64::from(count[e]);
            }
        }
        let of = |e: usize| &share[e * num_domains..(e + 1) * num_domains];
        let mut apart = 0.0;
        for e in 0..experts {
            for f in (0..e).filter(|f| t.counts[e * experts + f] > 0.0) {
                let same: f64 = of(e).iter().zip(of(f)).map(|(a, b)| a * b).sum();
                apart += t.counts[e * experts + f] * (1.0 - same);
            }
        }
        apart
    }

    /// What these terms add to the objective.
    pub fn price(&self, placement: &LayerPlacement, devices: &[DeviceSpec]) -> f64 {
        let moves = self.old.map_or(0.0, |(old, price)| copies(old, placement) as f64 * price);
        moves + self.together.map_or(0.0, |t| t.price * self.pairs_apart(placement, devices))
    }
}

/// Experts that devices hold in `new` and not in `old`.
pub fn copies(old: &LayerPlacement, new: &LayerPlacement) -> usize {
    let coming = |(n, o): (&Vec<u16>, &Vec<u16>)| n.iter().filter(|e| !o.contains(e)).count();
    new.devices.iter().zip(&old.devices).map(coming).sum()
}
