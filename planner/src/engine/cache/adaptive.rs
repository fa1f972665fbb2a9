//! Ours: evict the expert with the least chance of being used again soon, as a model says that learns while running ([`super::predictor`]).
//!
//! The horizon is about the time an unused expert stays in the cache: 1.5 times the demands that fill it. Chances of all layers are
//! comparable, so one pool may serve many layers.

use super::predictor::Predictor;
use super::{CachePolicy, Seen};

/// One model per layer of the pool.
#[derive(Debug, Clone)]
pub struct Adaptive {
    experts_per_layer: u32,
    num_layers: u32,
    slots: u32,
    /// By layer, from its first demand on.
    layers: Vec<Option<Predictor>>,
    /// Whether the number of slots changed since the layer's last demand. `[num_layers]`
    resized: Vec<bool>,
}

impl Adaptive {
    /// Nothing learnt yet.
    pub fn new(num_layers: u32, experts_per_layer: u32) -> Self {
        let n = num_layers as usize;
        Self { experts_per_layer: experts_per_layer.max(1), num_layers, slots: 0, layers: vec![None; n], resized: vec![false; n] }
    }

    /// 1.5 times the demands of `demanded` experts each that fill one layer's share of the slots.
    fn horizon(&self, demanded: u32) -> u32 {
        let fill = u64::from(self.slots) * 3 / (2 * u64::from(self.num_layers.max(1)) * u64::from(demanded.max(1)));
        fill.clamp(2, 64) as u32
    }
}

impl CachePolicy for Adaptive {
    fn on_capacity(&mut self, slots: u32) {
        self.slots = slots;
        self.resized.fill(true);
    }

    fn on_demand(&mut self, seen: &Seen<'_>) {
        let Some((first, _)) = seen.experts.first() else { return };
        let layer = first / self.experts_per_layer;
        // The experts of one token tell the horizon; a wide first step must not shorten it.
        let choices: u32 = seen.experts.iter().map(|(_, n)| n).sum();
        let horizon = self.horizon(choices.div_ceil(seen.tokens.max(1)));
        let experts = self.experts_per_layer;
        let model = self.layers[layer as usize].get_or_insert_with(|| Predictor::new(experts, horizon));
        if std::mem::take(&mut self.resized[layer as usize]) {
            model.look_ahead(horizon);
        }
        model.on_demand(seen, layer * experts);
    }

    fn worth(&self, expert: u32) -> f64 {
        // A division takes longer than all the rest.
        let layer = if expert < self.experts_per_layer { 0 } else { expert / self.experts_per_layer };
        let e = expert - layer * self.experts_per_layer;
        self.layers[layer as usize].as_ref().map_or(f64::NEG_INFINITY, |m| f64::from(m.log_odds(e as usize)))
    }
}
