//! Placements valued under the split that was asked for, and mended where that split gets stuck.
//!
//! An equal split is a sum; an exact one is a maximum flow, whose minimum cut names the devices that cannot hand their tokens to anybody.

use super::holders::{Holders, LayerPlacement};
use super::place::{DeviceSpec, PlaceOptions, SplitRule};
use super::split::{Splitter, Unit};
use super::terms::Terms;

/// Values placements under the split that was asked for.
pub(super) struct Judge<'a> {
    splitter: Splitter,
    /// `[windows][experts]`
    pub windows: &'a [Vec<f64>],
    pub devices: &'a [DeviceSpec],
    pub options: &'a PlaceOptions,
    pub terms: Terms<'a>,
    tokens: Vec<u64>,
    speed: Vec<f64>,
}

/// Loads are divided in so many parts of a layer's tokens.
const PARTS: f64 = 1e9;

impl<'a> Judge<'a> {
    pub(super) fn new(windows: &'a [Vec<f64>], devices: &'a [DeviceSpec], options: &'a PlaceOptions, terms: Terms<'a>) -> Self {
        let speed = devices.iter().map(|d| 1.0 / d.inverse_speed).collect();
        Self { splitter: Splitter::default(), windows, devices, options, terms, tokens: Vec::new(), speed }
    }

    /// The objective; `equal` is what it is when tokens are divided equally.
    pub(super) fn value(&mut self, placement: &LayerPlacement, equal: f64) -> f64 {
        if self.options.split == SplitRule::Equal {
            return equal;
        }
        let holders = placement.holders(self.windows[0].len());
        let mut maxima = Vec::with_capacity(self.windows.len());
        for w in 0..self.windows.len() {
            maxima.push(self.exact(&holders, w));
        }
        self.options.risk.of(&mut maxima) + self.price(placement)
    }

    /// What counts beside the slowest device, in tokens.
    fn price(&self, placement: &LayerPlacement) -> f64 {
        let sends = self.options.node_price.as_ref().map_or(0.0, |(sends, price)| {
            let node_of: Vec<u16> = self.devices.iter().map(|d| d.node).collect();
            let over = |w: &Vec<f64>| sends.sends(placement, w, &node_of);
            price * self.windows.iter().map(over).sum::<f64>() / self.windows.len() as f64
        });
        sends + self.terms.price(placement, self.devices)
    }

    /// The same as a multiple of the mean load per device.
    pub(super) fn extra(&self, placement: &LayerPlacement) -> f64 {
        if self.options.node_price.is_none() && self.terms.is_plain() {
            return 0.0;
        }
        let total: f64 = self.windows.iter().flatten().sum::<f64>() / self.windows.len() as f64;
        if total > 0.0 { self.price(placement) * self.speed.iter().sum::<f64>() / total } else { 0.0 }
    }

    /// The slowest device in one window as a multiple of the mean: 1 or more. Windows count alike, however many tokens they have.
    pub(super) fn excess(&mut self, holders: &Holders, window: usize) -> f64 {
        let total: f64 = self.windows[window].iter().sum();
        if total <= 0.0 {
            return 1.0;
        }
        (self.exact(holders, window) * self.speed.iter().sum::<f64>() / total).max(1.0)
    }

    /// The slowest device in one window, divided exactly.
    pub(super) fn exact(&mut self, holders: &Holders, window: usize) -> f64 {
        let load = &self.windows[window];
        let total: f64 = load.iter().sum();
        if total <= 0.0 {
            return 0.0;
        }
        let scale = PARTS / total;
        self.tokens.clear();
        self.tokens.extend(load.iter().map(|w| (w * scale).round() as u64));
        self.splitter.split(holders, &self.tokens, &self.speed, Unit::Tokens) / scale
    }

    /// The devices that bound the last split.
    pub(super) fn binding(&self) -> &[u16] {
        self.splitter.binding()
    }

    /// Lets tokens out of the devices that bind: another holder for one of their experts, in place of a redundant replica or of an expert
    /// with less load that moves the other way.
    pub(super) fn widen(
        &mut self,
        mut value: f64,
        mut placement: LayerPlacement,
        enough: f64,
        rounds: usize,
    ) -> (f64, LayerPlacement) {
        let experts = self.windows[0].len();
        for _ in 0..rounds {
            let holders = placement.holders(experts);
            let worst = (0..self.windows.len()).map(|w| (w, self.exact(&holders, w))).max_by(|a, b| a.1.total_cmp(&b.1));
            let Some((window, _)) = worst else { break };
            self.exact(&holders, window);
            let binding: Vec<u16> = self.splitter.binding().to_vec();
            if binding.len() == self.devices.len() {
                break;
            }
            let counts = placement.counts(experts);
            let load = &self.windows[window];
            let level = |g: &usize| self.splitter.load[*g] as f64 * self.devices[*g].inverse_speed;
            let mut helpers: Vec<usize> = (0..self.devices.len()).filter(|g| !binding.contains(&(*g as u16))).collect();
            helpers.sort_by(|a, b| level(a).total_cmp(&level(b)));
            let mut hot: Vec<u16> = binding.iter().flat_map(|g| placement.devices[usize::from(*g)].iter().copied()).collect();
            hot.sort_by(|a, b| load[usize::from(*b)].total_cmp(&load[usize::from(*a)]));
            hot.dedup();
            let mut candidates = Vec::new();
            for &e in hot.iter().take(4) {
                for &h in helpers.iter().take(4) {
                    if placement.devices[h].contains(&e) || !self.terms.may_replicate(e) {
                        continue;
                    }
                    let mut with = placement.clone();
                    if self.terms.has_room(self.devices, h, &with.devices[h], e) {
                        with.devices[h].push(e);
                        candidates.push(with);
                        continue;
                    }
                    let redundant = (0..with.devices[h].len()).filter(|i| counts[usize::from(with.devices[h][*i])] > 1);
                    for i in redundant.take(4) {
                        let mut with = with.clone();
                        with.devices[h][i] = e;
                        candidates.push(with);
                    }
                    let from = binding.iter().map(|g| usize::from(*g)).find(|g| placement.devices[*g].contains(&e));
                    let lightest = (0..with.devices[h].len())
                        .filter(|i| self.terms.may_replicate(with.devices[h][*i]))
                        .min_by(|a, b| load[usize::from(with.devices[h][*a])].total_cmp(&load[usize::from(with.devices[h][*b])]));
                    if let (Some(from), Some(i)) = (from, lightest)
                        && !with.devices[from].contains(&with.devices[h][i])
                        && let Some(at) = with.devices[from].iter().position(|x| *x == e)
                    {
                        with.devices[from][at] = with.devices[h][i];
                        with.devices[h][i] = e;
                        candidates.push(with);
                    }
                }
            }
            let mut improved = false;
            for candidate in candidates {
                let v = self.value(&candidate, f64::INFINITY);
                if v < value * (1.0 - 1e-9) {
                    (value, placement, improved) = (v, candidate, true);
                }
            }
            if !improved || value <= enough {
                break;
            }
        }
        (value, placement)
    }
}
