//! Which experts tokens choose together, and one after another: how far tokens travel.
//!
//! Within a layer a token is sent once to each device that holds some of its experts: pairs that are chosen together should lie together
//! ([`super::terms::Together`] is their price). From layer to layer a token stays where it is if its next expert is there
//! (ExFlow, arXiv 2401.08383): devices of a layer are relabelled for that, which costs no balance at all.

use super::holders::LayerPlacement;
use super::place::DeviceSpec;
use super::relabel::assign_classes;
use crate::routing::{Part, RoutingTrace};

/// Counts of pairs over a trace.
#[derive(Debug, Clone, PartialEq)]
pub struct Affinity {
    /// Tokens that chose both experts of a layer; symmetric, with 0 on the diagonal. `[layers][experts * experts]`
    pub together: Vec<Vec<f64>>,
    /// Times that a token's expert in a layer was followed by one in the next. `[layers - 1][experts * experts]`
    pub hops: Vec<Vec<f64>>,
    /// Experts chosen in one layer by all tokens.
    pub choices: u64,
}

impl Affinity {
    /// Counts the tokens of a part of a trace.
    pub fn from_trace(trace: &RoutingTrace, part: &Part) -> Self {
        let (layers, experts) = (trace.num_moe_layers, trace.num_experts as usize);
        let mut out = Self {
            together: vec![vec![0.0; experts * experts]; layers],
            hops: vec![vec![0.0; experts * experts]; layers.saturating_sub(1)],
            choices: 0,
        };
        let (mut now, mut before) = (Vec::new(), Vec::new());
        for token in trace.tokens(part) {
            for layer in 0..layers {
                std::mem::swap(&mut now, &mut before);
                now.clear();
                now.extend(trace.chosen(token, layer).map(usize::from));
                out.choices += if layer == 0 { now.len() as u64 } else { 0 };
                for a in &now {
                    now.iter().filter(|b| *b != a).for_each(|b| out.together[layer][a * experts + b] += 1.0);
                    if layer > 0 {
                        before.iter().for_each(|b| out.hops[layer - 1][b * experts + a] += 1.0);
                    }
                }
            }
        }
        out
    }
}

/// Relabels the devices of `next` among interchangeable ones, so that most hops from `previous` stay on their device. `hops`:
/// `[experts][experts]`
pub fn align(previous: &LayerPlacement, next: &LayerPlacement, hops: &[f64], devices: &[DeviceSpec]) -> LayerPlacement {
    let experts = hops.len().isqrt();
    let (from, to) = (previous.counts(experts), next.counts(experts));
    // A hop between replicas is as probable as their shares.
    let part = |e: u16, f: u16| {
        let (e, f) = (usize::from(e), usize::from(f));
        hops[e * experts + f] / f64::from(from[e] * to[f])
    };
    let staying = |g: usize, h: usize| {
        let sum: f64 = previous.devices[g].iter().flat_map(|e| next.devices[h].iter().map(move |f| part(*e, *f))).sum();
        -(sum * 1024.0).round() as i64
    };
    let taken = assign_classes(devices, staying);
    LayerPlacement { devices: taken.into_iter().map(|h| next.devices[h].clone()).collect() }
}

/// The share of hops that stay on their device.
pub fn staying(previous: &LayerPlacement, next: &LayerPlacement, hops: &[f64]) -> f64 {
    let experts = hops.len().isqrt();
    let (from, to) = (previous.counts(experts), next.counts(experts));
    let total: f64 = hops.iter().sum();
    let mut sum = 0.0;
    for (a, b) in previous.devices.iter().zip(&next.devices) {
        for e in a.iter().map(|e| usize::from(*e)) {
            for f in b.iter().map(|f| usize::from(*f)) {
                sum += hops[e * experts + f] / f64::from(from[e] * to[f]);
            }
        }
    }
    if total > 0.0 { sum / total } else { 1.0 }
}
