//! Look-ahead: what the routers of the next layers make of the hidden state of this one.
//!
//! The residual stream changes little from layer to layer, so a later layer's norm and router, applied now, guess its choice well
//! enough to load experts before they are demanded (HybriMoE §4.3, Fate: algorithms §4).

use super::buffers::Activations;
use super::driver::Foreseen;
use super::elementwise::layer_norm;
use super::matmul::{Product, prepare, run_products};
use super::model::Model;
use super::route::{RouterScores, Rule};
use super::threads::{Threads, for_rows};
use crate::kernels::ActivationBuf;
use tierwise_cost::model::{Moe, TensorId, TensorRole};

/// Later layers that are asked at most.
pub const MAX_DISTANCE: u32 = 3;

/// A layer with routed experts: what a guess at its choice needs.
struct Later {
    layer: u32,
    /// `[hidden]`
    norm: TensorId,
    /// `[hidden]`, of norms that subtract the mean.
    norm_bias: Option<TensorId>,
    /// `[num_experts, hidden]`
    router: TensorId,
    /// `[num_experts]`
    bias: Option<TensorId>,
    /// `[num_experts]`
    selection_bias: Option<TensorId>,
    moe: Moe,
}

/// Working memory of the guesses.
pub struct Foresight {
    /// Layers with routed experts, ascending.
    layers: Vec<Later>,
    distance: u32,
    /// `[tokens, hidden]`
    normed: Vec<f32>,
    input: ActivationBuf,
    /// `[tokens, num_experts]`
    logits: Vec<f32>,
    scores: RouterScores,
}

impl Foresight {
    /// Guesses for up to `distance` layers with routed experts ahead; 0 for none.
    pub fn new(model: &Model, distance: u32) -> Self {
        let spec = model.spec();
        let later = |(layer, moe): (u32, &Moe)| {
            let id = |role| spec.tensor(Some(layer), role).map(|(id, _)| id);
            let (norm, router) = (id(TensorRole::FfnNorm)?, id(TensorRole::Router)?);
            let (bias, selection_bias) = (id(TensorRole::RouterLogitBias), id(TensorRole::RouterBias));
            let norm_bias = id(TensorRole::FfnNormBias);
            Some(Later { layer, norm, norm_bias, router, bias, selection_bias, moe: moe.clone() })
        };
        let layers = if distance == 0 { Vec::new() } else { spec.moe_layers().filter_map(later).collect() };
        let distance = distance.min(MAX_DISTANCE);
        let (input, scores) = (ActivationBuf::default(), RouterScores::default());
        Self { layers, distance, normed: Vec::new(), input, logits: Vec::new(), scores }
    }

    /// Whether there are layers to guess at from `layer`.
    pub fn looks_from(&self, layer: u32) -> bool {
        self.layers.iter().any(|l| l.layer == layer) && self.layers.last().is_some_and(|l| l.layer > layer)
    }

    /// Guesses from the residual stream at `layer`. The model's last layer serves the rows `kept` only.
    pub fn look(
        &mut self,
        model: &Model,
        threads: &Threads,
        layer: u32,
        hidden: &Activations, // [tokens, hidden]
        kept: &[u32],
    ) -> Vec<Foreseen> {
        let Some(at) = self.layers.iter().position(|l| l.layer == layer) else { return Vec::new() };
        let (width, last_layer) = (hidden.width(), model.spec().layers.len() as u32 - 1);
        let (kernels, eps) = (threads.kernels(), model.spec().norm_eps);
        let mut all = Vec::new();
        for (distance, later) in (1..=self.distance).zip(&self.layers[at + 1..]) {
            let kept = if later.layer == last_layer { Some(kept) } else { None };
            let rows = kept.map_or(hidden.rows(), <[u32]>::len);
            let from = hidden.as_slice();
            let weight = model.vector(later.norm);
            self.normed.resize(rows * width, 0.0);
            let bias = later.norm_bias.map(|b| model.vector(b));
            for_rows(threads, &mut self.normed, width, |i, row| {
                let i = kept.map_or(i, |kept| kept[i] as usize);
                let from = &from[i * width..(i + 1) * width];
                match bias {
                    Some(bias) => layer_norm(from, weight, bias, eps, row),
                    None => kernels.rms_norm(from, weight, eps, row),
                }
            });
            // The first of the layer's routers: what later ones look at is not there yet.
            let experts = later.moe.num_experts as usize;
            let router = model.matrix(later.router).rows(0, experts);
            prepare(threads, router.format, &self.normed, width, &mut self.input);
            self.logits.resize(rows * router.rows, 0.0);
            let tokens = self.input.all_tokens();
            run_products(
                threads,
                vec![Product {
                    weight: router,
                    bias: later.bias.map(|b| &model.vector(b)[..experts]),
                    input: &self.input,
                    tokens,
                    out: &mut self.logits,
                }],
            );
            let rule = Rule { moe: &later.moe, selection_bias: later.selection_bias.map(|b| &model.vector(b)[..experts]) };
            self.scores.score(kernels, rule, &mut self.logits);
            all.push(Foreseen { layer: later.layer, distance, scores: self.scores.to_sparse() });
        }
        all
    }
}
