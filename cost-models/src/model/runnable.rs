//! What the runtime can execute; everything else can be planned.

use super::{Attention, Ffn, ModelSpec, Moe, RouterScore};

impl ModelSpec {
    /// Why the runtime cannot execute this model, if it cannot.
    pub fn plan_only_reason(&self) -> Option<String> {
        for (i, layer) in self.layers.iter().enumerate() {
            match &layer.attention {
                Attention::Gqa(_) | Attention::Mla(_) | Attention::DeltaNet(_) => {}
                Attention::PlanOnly(m) => return Some(format!("layer {i}: {} can be planned but not run", m.name)),
            }
            match &layer.ffn {
                Ffn::Dense(d) if !d.gated => {
                    return Some(format!("layer {i}: ungated feed-forward can be planned but not run yet"));
                }
                Ffn::None => return Some(format!("layer {i}: layers without feed-forward part can be planned but not run yet")),
                Ffn::Moe(m) if !m.gated || m.latent_size.is_some() || m.parallel_dense_inner_size.is_some() => {
                    return Some(format!("layer {i}: this kind of expert can be planned but not run yet"));
                }
                Ffn::Moe(Moe { router: r, .. }) => {
                    if r.score == RouterScore::SqrtSoftplus {
                        return Some(format!("layer {i}: this routing rule can be planned but not run yet"));
                    }
                }
                Ffn::Dense(_) => {}
            }
        }
        None
    }
}
