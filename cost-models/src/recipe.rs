//! Which format each tensor gets under a name such as `Q4_K_M`.
//!
//! The mixes follow llama.cpp's `llama_tensor_get_type` (src/llama-quant.cpp), so that sizes planned here are the sizes of the
//! files that people download: more bits for some value and down projections, `Q6_K` for the output, a fallback for
//! rows that are not whole K-blocks.

use crate::error::CostError;
use crate::model::{Ffn, Geometry, RoleGroup, TensorRole, TensorShape};
use crate::quant::QuantFormat;

/// A named assignment of formats to tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    name: &'static str,
    base: QuantFormat,
    mix: Mix,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mix {
    /// Every matrix in the base format (the output in Q6_K when the base is smaller).
    Uniform,
    /// llama.cpp's medium mix over a K-quant base: some value and down projections in Q6_K.
    Medium,
    /// Experts in the base format, all other matrices in Q8_0.
    ExpertsOnly,
}

const RECIPES: &[Recipe] = &[
    Recipe { name: "F32", base: QuantFormat::F32, mix: Mix::Uniform },
    Recipe { name: "F16", base: QuantFormat::F16, mix: Mix::Uniform },
    Recipe { name: "BF16", base: QuantFormat::BF16, mix: Mix::Uniform },
    Recipe { name: "Q8_0", base: QuantFormat::Q8_0, mix: Mix::Uniform },
    Recipe { name: "Q6_K", base: QuantFormat::Q6_K, mix: Mix::Uniform },
    Recipe { name: "Q5_K_M", base: QuantFormat::Q5_K, mix: Mix::Medium },
    Recipe { name: "Q5_0", base: QuantFormat::Q5_0, mix: Mix::Uniform },
    Recipe { name: "Q5_1", base: QuantFormat::Q5_1, mix: Mix::Uniform },
    Recipe { name: "Q4_K_M", base: QuantFormat::Q4_K, mix: Mix::Medium },
    Recipe { name: "Q4_K", base: QuantFormat::Q4_K, mix: Mix::Uniform },
    Recipe { name: "Q4_0", base: QuantFormat::Q4_0, mix: Mix::Uniform },
    Recipe { name: "Q4_1", base: QuantFormat::Q4_1, mix: Mix::Uniform },
    Recipe { name: "IQ4_NL", base: QuantFormat::IQ4_NL, mix: Mix::Uniform },
    Recipe { name: "IQ4_XS", base: QuantFormat::IQ4_XS, mix: Mix::Uniform },
    Recipe { name: "Q3_K", base: QuantFormat::Q3_K, mix: Mix::Uniform },
    Recipe { name: "Q2_K", base: QuantFormat::Q2_K, mix: Mix::Uniform },
    Recipe { name: "MXFP4", base: QuantFormat::MXFP4, mix: Mix::ExpertsOnly },
];

impl Recipe {
    /// The recipe of this name (case does not matter).
    ///
    /// # Errors
    /// [`CostError::UnknownFormat`] with all known names.
    pub fn by_name(name: &str) -> Result<Self, CostError> {
        RECIPES
            .iter()
            .find(|r| r.name.eq_ignore_ascii_case(name))
            .cloned()
            .ok_or_else(|| CostError::UnknownFormat { name: name.to_string(), known: Self::known_names() })
    }

    /// All names, separated by commas.
    pub fn known_names() -> String {
        RECIPES.iter().map(|r| r.name).collect::<Vec<_>>().join(", ")
    }

    /// Name as given by people.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The format of tensor `t` of model `g`.
    pub fn format_of(&self, g: &Geometry, t: &TensorShape) -> QuantFormat {
        fit_rows(self.wanted_format(g, t), *t.shape.last().expect("a tensor has at least one dimension"))
    }

    /// The format that the mix intends for tensor `t`, whether or not its rows are whole blocks.
    pub fn wanted_format(&self, g: &Geometry, t: &TensorShape) -> QuantFormat {
        // Vectors and routers are small and sensitive: always float32, as every converter does.
        if t.shape.len() < 2 || t.role.is_elementwise() || t.role.group() == RoleGroup::Router {
            return QuantFormat::F32;
        }
        match self.mix {
            Mix::Uniform => self.uniform(g, t),
            Mix::Medium => self.medium(g, t),
            Mix::ExpertsOnly if t.role.is_routed_expert() => self.base,
            Mix::ExpertsOnly => QuantFormat::Q8_0,
        }
    }

    fn uniform(&self, g: &Geometry, t: &TensorShape) -> QuantFormat {
        let is_output = t.role == TensorRole::Output || (t.role == TensorRole::TokenEmbedding && g.tie_word_embeddings);
        if is_output && self.base.bits_per_element() < QuantFormat::Q6_K.bits_per_element() {
            QuantFormat::Q6_K
        } else {
            self.base
        }
    }

    fn medium(&self, g: &Geometry, t: &TensorShape) -> QuantFormat {
        let more = t.layer.is_some_and(|l| use_more_bits(l, g.layers.len() as u32));
        // Models with eight experts get 8-bit keys and values: the matrices are small beside the experts.
        let eight_experts = g.layers.iter().any(|l| matches!(&l.ffn, Ffn::Moe(m) if m.num_experts == 8));
        match t.role {
            TensorRole::AttentionV | TensorRole::AttentionK if eight_experts => QuantFormat::Q8_0,
            TensorRole::AttentionOutput if eight_experts && self.base == QuantFormat::Q4_K => QuantFormat::Q5_K,
            TensorRole::AttentionV | TensorRole::ExpertDown | TensorRole::DenseDown | TensorRole::SharedDown if more => {
                QuantFormat::Q6_K
            }
            _ => self.uniform(g, t),
        }
    }
}

/// The first and last eighth of the layers and every third between them.
fn use_more_bits(layer: u32, num_layers: u32) -> bool {
    let eighth = num_layers / 8;
    layer < eighth || layer >= 7 * num_layers / 8 || (layer - eighth) % 3 == 2
}

/// The format itself if rows of `cols` are whole blocks of it, else the nearest one with smaller blocks.
pub fn fit_rows(format: QuantFormat, cols: u64) -> QuantFormat {
    if format.row_bytes(cols).is_some() {
        return format;
    }
    use QuantFormat as F;
    let smaller = match format {
        F::Q2_K | F::Q3_K | F::IQ4_XS => F::IQ4_NL,
        F::Q4_K => F::Q5_0,
        F::Q5_K => F::Q5_1,
        F::Q6_K | F::Q8_K => F::Q8_0,
        F::F32 | F::F16 | F::BF16 | F::Q4_0 | F::Q4_1 | F::Q5_0 | F::Q5_1 | F::Q8_0 | F::IQ4_NL | F::MXFP4 => F::F16,
    };
    if smaller.row_bytes(cols).is_some() { smaller } else { F::F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_fall_back_as_in_real_files() {
        assert_eq!(fit_rows(QuantFormat::Q4_K, 128), QuantFormat::Q5_0);
        assert_eq!(fit_rows(QuantFormat::Q6_K, 128), QuantFormat::Q8_0);
        assert_eq!(fit_rows(QuantFormat::Q6_K, 100), QuantFormat::F16);
        assert_eq!(fit_rows(QuantFormat::Q4_K, 512), QuantFormat::Q4_K);
    }

    #[test]
    fn names_are_case_blind_and_unknown_ones_are_listed() {
        assert_eq!(Recipe::by_name("q4_k_m").unwrap().name(), "Q4_K_M");
        let message = Recipe::by_name("Q9").unwrap_err().to_string();
        assert!(message.contains("Q9") && message.contains("MXFP4"), "{message}");
    }
}
