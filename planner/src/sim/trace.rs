//! A token-level routing trace: which experts each token chose in each MoE layer.

use crate::engine::Demand;

/// An expert id that was not recorded.
pub(crate) const UNRECORDED: u8 = 255;

/// A view of a trace in the layout `[tokens][layers][experts_per_token]`, one byte per expert id, 255 for "not recorded".
#[derive(Debug, Clone, Copy)]
pub struct Trace<'a> {
    ids: &'a [u8],
    num_layers: usize,
    experts_per_token: usize,
}

impl<'a> Trace<'a> {
    /// A view of `ids`; `None` when its length is not a whole number of tokens.
    pub fn new(ids: &'a [u8], num_layers: usize, experts_per_token: usize) -> Option<Self> {
        let token = num_layers.checked_mul(experts_per_token)?;
        (token > 0 && ids.len().is_multiple_of(token)).then_some(Self { ids, num_layers, experts_per_token })
    }

    /// Number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.ids.len() / (self.num_layers * self.experts_per_token)
    }

    /// Number of MoE layers.
    pub const fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// The first `tokens` tokens.
    #[must_use]
    pub fn take(&self, tokens: usize) -> Self {
        let end = (tokens * self.num_layers * self.experts_per_token).min(self.ids.len());
        Self { ids: &self.ids[..end], ..*self }
    }

    /// The experts that `token` chose in the `index`-th MoE layer, in the order of the file; those not recorded are left out.
    ///
    /// # Panics
    /// If the trace has no such token or layer.
    pub fn chosen(&self, token: usize, index: usize) -> impl Iterator<Item = u16> + use<'a> {
        let first = (token * self.num_layers + index) * self.experts_per_token;
        self.ids[first..first + self.experts_per_token].iter().filter(|e| **e != UNRECORDED).map(|e| u16::from(*e))
    }

    /// What `token` asks of the `index`-th MoE layer, which is layer `layer` of the model; `None` if nothing was recorded.
    pub fn demand(&self, token: usize, index: usize, layer: u32) -> Option<Demand> {
        let mut experts: Vec<(u32, u32)> = self.chosen(token, index).map(|e| (u32::from(e), 1)).collect();
        experts.sort_unstable();
        experts.dedup_by_key(|(e, _)| *e);
        (!experts.is_empty()).then_some(Demand { step: token as u64, layer, experts, tokens: 1, scores: Vec::new() })
    }

    /// What these tokens together ask of the `index`-th MoE layer.
    pub fn demand_of(&self, tokens: &[usize], index: usize, layer: u32) -> Option<Demand> {
        let mut chosen: Vec<u32> = tokens.iter().flat_map(|t| self.chosen(*t, index)).map(u32::from).collect();
        chosen.sort_unstable();
        let mut experts: Vec<(u32, u32)> = Vec::new();
        for e in chosen {
            match experts.last_mut() {
                Some((last, n)) if *last == e => *n += 1,
                _ => experts.push((e, 1)),
            }
        }
        (!experts.is_empty()).then_some(Demand { step: 0, layer, experts, tokens: tokens.len() as u32, scores: Vec::new() })
    }
}
