//! A model's operation lists, lowered when they are first needed: one for steps whose tokens all want logits, one for those that do not.
//!
//! Sizes of a step are not in the list, so two lists do for all of them.

use super::model::Model;
use crate::error::Result;
use std::sync::Arc;
use tierwise_cost::op::{Batch, Op, lower};

/// The lists without and with `SelectRows`.
#[derive(Debug, Default)]
pub struct StepOps([Option<Arc<Vec<Op>>>; 2]);

impl StepOps {
    /// The list for a step; `select`: rows that nobody wants logits of are dropped before the last feed-forward part.
    ///
    /// # Errors
    /// When the model has parts that no list describes.
    pub fn get(&mut self, model: &Model, select: bool) -> Result<Arc<Vec<Op>>> {
        let known = &mut self.0[usize::from(select)];
        if let Some(ops) = known {
            return Ok(Arc::clone(ops));
        }
        let batch = Batch { tokens: 2, past: 0, sequences: 1, logits: if select { 1 } else { 2 } };
        let ops = Arc::new(lower(model.spec(), batch)?);
        Ok(Arc::clone(known.insert(ops)))
    }
}
