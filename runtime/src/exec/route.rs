//! The routing rule: router logits to chosen experts and their weights.
//!
//! Softmax over all experts, then the `k` largest in descending order, ties to the lower id (`torch.topk` on the CPU and ggml's
//! stable sort agree on this), then optionally division by their sum, then the scale.

use crate::kernels::CpuKernels;
use tierwise_cost::model::Moe;

/// The choice for every token of a step in one layer.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Routing {
    /// Chosen experts, heaviest first: `[tokens, experts_per_token]`.
    pub experts: Vec<u32>,
    /// Their weights: `[tokens, experts_per_token]`.
    pub weights: Vec<f32>,
    /// Experts per token.
    pub experts_per_token: usize,
}

impl Routing {
    /// Tokens routed.
    pub fn num_tokens(&self) -> usize {
        self.experts.len().checked_div(self.experts_per_token).unwrap_or(0)
    }

    /// Replaces the choice by that for `logits`, which are overwritten.
    pub fn choose(&mut self, kernels: &CpuKernels, moe: &Moe, logits: &mut [f32] /* [tokens, num_experts] */) {
        self.experts.clear();
        self.weights.clear();
        self.experts_per_token = moe.experts_per_token as usize;
        for row in logits.chunks_exact_mut(moe.num_experts as usize) {
            kernels.softmax(row);
            let start = self.weights.len();
            for _ in 0..moe.experts_per_token {
                let mut best = 0;
                for (e, score) in row.iter().enumerate() {
                    if *score > row[best] {
                        best = e;
                    }
                }
                self.experts.push(best as u32);
                self.weights.push(row[best]);
                // Taken: below every score, which are at least zero.
                row[best] = -1.0;
            }
            let chosen = &mut self.weights[start..];
            let factor = moe.router.scale / if moe.router.normalize_topk { chosen.iter().sum::<f32>() } else { 1.0 };
            for w in chosen {
                *w *= factor;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tierwise_cost::model::{Router, RouterScore};

    fn moe(normalize_topk: bool, scale: f32) -> Moe {
        Moe {
            num_experts: 4,
            experts_per_token: 2,
            inner_size: 1,
            gated: true,
            latent_size: None,
            router: Router { score: RouterScore::Softmax, normalize_topk, scale, selection_bias: false, groups: None },
            shared: None,
            parallel_dense_inner_size: None,
        }
    }

    #[test]
    fn ties_go_to_the_lower_id_and_weights_follow_the_rule() {
        let ln2 = 2.0f32.ln();
        let mut r = Routing::default();
        r.choose(CpuKernels::best(), &moe(false, 1.0), &mut [0.0, ln2, ln2, 0.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(r.experts, [1, 2, 0, 1]);
        for (w, expected) in r.weights.iter().zip([1.0 / 3.0, 1.0 / 3.0, 0.25, 0.25]) {
            assert!((w - expected).abs() < 1e-6);
        }
        assert_eq!(r.num_tokens(), 2);
        r.choose(CpuKernels::best(), &moe(true, 2.0), &mut [0.0, 2.0 * ln2, ln2, 0.0]);
        assert_eq!(r.experts, [1, 2]);
        assert!((r.weights[0] - 4.0 / 3.0).abs() < 1e-6 && (r.weights[1] - 2.0 / 3.0).abs() < 1e-6);
    }
}
