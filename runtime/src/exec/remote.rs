//! A layer's routed experts computed by somebody else than the driver: other ranks, each with its own part of the experts.
//!
//! The executor hands over routing and inputs, prepared as the weights want them, and gets a row for every (token, choice) back; the
//! weighted sum stays its own, in the order of choices, so that the result is the driver's.

use super::experts::{ExpertBuffers, ExpertExtras};
use super::model::Model;
use super::prepared::Prepared;
use super::route::Routing;
use super::threads::Threads;
use crate::error::Result;
use tierwise_cost::model::TensorId;

/// The routed experts of one layer in one step.
#[derive(Clone, Copy)]
pub struct RoutedLayer<'a> {
    /// The layer.
    pub layer: u32,
    /// Gate, up and down.
    pub tensors: [TensorId; 3],
    /// What experts do beside three products.
    pub extras: &'a ExpertExtras<'a>,
    /// Who is wanted.
    pub routing: &'a Routing,
    /// A row per token, or per (token, choice) where weights come before the experts; in the forms that gate and up need.
    pub input: &'a Prepared,
    /// To compute with.
    pub threads: &'a Threads,
}

/// Computes routed experts in the driver's place.
pub trait RemoteExperts: Send {
    /// Fills the output row of every (token, choice) of `out`, which was arranged for the layer's routing.
    ///
    /// # Errors
    /// When somebody who is needed is gone, silent or of another mind; the session is of no use after that.
    fn compute(&mut self, model: &Model, layer: RoutedLayer<'_>, out: &mut ExpertBuffers) -> Result<()>;
}
