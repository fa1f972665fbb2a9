//! The text form of a geometry: `configs/models/*.toml`. Equal neighbouring layers are written once with a count.

use super::{Attention, Ffn, Geometry, LayerSpec};
use crate::error::CostError;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GeometryFile {
    name: String,
    architecture: String,
    hidden_size: u32,
    vocab_size: u32,
    context_length: u32,
    #[serde(default = "default_eps")]
    norm_eps: f32,
    #[serde(default)]
    tie_word_embeddings: bool,
    /// Where the numbers come from.
    source: String,
    /// What the description leaves out or does not know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    block: Vec<BlockFile>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BlockFile {
    repeat: u32,
    attention: Attention,
    ffn: Ffn,
}

fn default_eps() -> f32 {
    1e-6
}

impl Geometry {
    /// Reads the text of a `configs/models/*.toml` file.
    ///
    /// # Errors
    /// [`CostError::BadToml`] with line and column, or [`CostError::BadModel`] for an impossible size.
    pub fn from_toml(text: &str) -> Result<Self, CostError> {
        let file: GeometryFile =
            toml::from_str(text).map_err(|e| CostError::BadToml { what: "model", message: e.to_string() })?;
        let total: u64 = file.block.iter().map(|b| u64::from(b.repeat)).sum();
        if total > 4096 {
            return Err(CostError::BadModel {
                model: file.name,
                field: "num_layers".into(),
                found: total.to_string(),
                expected: "1 to 4096".into(),
            });
        }
        let layers = file
            .block
            .into_iter()
            .flat_map(|b| std::iter::repeat_n(LayerSpec { attention: b.attention, ffn: b.ffn }, b.repeat as usize))
            .collect();
        let geometry = Self {
            name: file.name,
            architecture: file.architecture,
            hidden_size: file.hidden_size,
            vocab_size: file.vocab_size,
            context_length: file.context_length,
            norm_eps: file.norm_eps,
            tie_word_embeddings: file.tie_word_embeddings,
            layers,
        };
        geometry.check()?;
        Ok(geometry)
    }

    /// The text of a `configs/models/*.toml` file for this geometry.
    ///
    /// # Errors
    /// [`CostError::BadToml`] if a value has no TOML form.
    pub fn to_toml(&self, source: &str, note: Option<&str>) -> Result<String, CostError> {
        let mut block: Vec<BlockFile> = Vec::new();
        for layer in &self.layers {
            match block.last_mut() {
                Some(b) if b.attention == layer.attention && b.ffn == layer.ffn => b.repeat += 1,
                _ => block.push(BlockFile { repeat: 1, attention: layer.attention.clone(), ffn: layer.ffn.clone() }),
            }
        }
        let file = GeometryFile {
            name: self.name.clone(),
            architecture: self.architecture.clone(),
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            context_length: self.context_length,
            norm_eps: self.norm_eps,
            tie_word_embeddings: self.tie_word_embeddings,
            source: source.to_string(),
            note: note.map(str::to_string),
            block,
        };
        toml::to_string(&file).map_err(|e| CostError::BadToml { what: "model", message: e.to_string() })
    }

    /// The same model cut to its first `num_layers` layers.
    #[must_use]
    pub fn truncated(mut self, num_layers: usize) -> Self {
        self.layers.truncate(num_layers);
        self
    }
}
