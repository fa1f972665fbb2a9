//! Random-weight GGUF files in the exact shape of a real model, to benchmark a model before downloading it.
//!
//! Speed depends on shapes and formats, not on what the weights say, so random blocks written straight in the quantised format
//! will do. The scale of the weights is that of an initialised network: every projection keeps the size of what it is given, so
//! that activations neither explode nor vanish and routing is spread over the experts.
//!
//! `blocks` makes random blocks of each format, `metadata` the keys, `vocabulary` tokens and merges.

mod blocks;
mod metadata;
mod own_layers;
mod vocabulary;

use crate::error::{Result, RuntimeError};
use crate::gguf::{DEFAULT_ALIGNMENT, GgufDataWriter, GgufWriter};
use crate::import::gguf_rope;
use blocks::BlockSource;
use rayon::prelude::*;
use std::path::Path;
use std::time::Instant;
use tierwise_cost::model::{Geometry, ModelSpec, TensorRole, TensorSpec};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::recipe::Recipe;

/// What was written.
#[derive(Debug, Clone)]
pub struct SynthReport {
    /// The model in the file.
    pub spec: ModelSpec,
    /// Size of the file.
    pub file_bytes: u64,
    /// Time it took, the final sync to disk included.
    pub seconds: f64,
}

/// Bytes of tensor data that are generated as one random stream: the unit of parallel work.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks generated at once; two such windows are held, one being generated while the other is written.
const CHUNKS_PER_WINDOW: usize = 16;

/// Writes a random-weight model of this geometry to `out`. The bytes depend on geometry, recipe and seed alone.
/// `progress` is told tensor bytes done and in all.
///
/// # Errors
/// [`RuntimeError::BadRequest`] when GGUF files of this architecture cannot be written, [`RuntimeError::Io`] when the file cannot.
pub fn synth(
    geometry: &Geometry,
    recipe: &Recipe,
    seed: u64,
    out: &Path,
    mut progress: impl FnMut(u64, u64),
) -> Result<SynthReport> {
    let start = Instant::now();
    let (spec, keys) = metadata::describe(geometry, recipe, out)?;
    let mut header = GgufWriter::new(out, DEFAULT_ALIGNMENT)?;
    for (key, value) in keys {
        header.meta(&key, value)?;
    }
    for t in &spec.tensors {
        header.tensor(&t.name, &t.shape, t.format)?;
    }
    let rope_tensors = gguf_rope::tensors_of(&spec.geometry);
    for (name, values) in &rope_tensors {
        header.tensor(name, &[values.len() as u64], QuantFormat::F32)?;
    }
    let mut writer = header.start()?;
    let total = spec.total_bytes().0;
    let mut done = 0;
    progress(0, total);
    for (index, tensor) in spec.tensors.iter().enumerate() {
        let std = weight_std(&spec, tensor);
        let source =
            BlockSource::new(tensor.format, mean(tensor.role), std, seed_of(seed, index as u64, u64::MAX)).ok_or_else(|| {
                RuntimeError::BadRequest {
                    what: "format",
                    found: format!("{} for tensor {}", tensor.format, tensor.name),
                    expected: "a format for weights".into(),
                }
            })?;
        write_tensor(&mut writer, tensor, &source, seed_of(seed, index as u64, 0), |bytes| {
            done += bytes;
            progress(done, total);
        })?;
    }
    for (name, values) in &rope_tensors {
        writer.write(name, bytemuck::cast_slice(values))?;
    }
    let file_bytes = writer.finish()?;
    Ok(SynthReport { spec, file_bytes, seconds: start.elapsed().as_secs_f64() })
}

/// Generates a tensor window by window; a window is written while the next one is generated.
fn write_tensor(
    writer: &mut GgufDataWriter,
    tensor: &TensorSpec,
    source: &BlockSource,
    seed: u64,
    mut wrote: impl FnMut(u64),
) -> Result<()> {
    let block_bytes = tensor.format.layout().bytes as usize;
    let chunk_bytes = CHUNK_BYTES / block_bytes * block_bytes;
    let window_bytes = (chunk_bytes * CHUNKS_PER_WINDOW) as u64;
    let num_windows = tensor.bytes.0.div_ceil(window_bytes);
    let generate = |window: u64, buffer: &mut Vec<u8>| {
        let bytes = window_bytes.min(tensor.bytes.0 - window * window_bytes);
        buffer.resize(bytes as usize, 0);
        buffer.par_chunks_mut(chunk_bytes).enumerate().for_each(|(i, chunk)| {
            let number = window * CHUNKS_PER_WINDOW as u64 + i as u64;
            source.fill(chunk, seed_of(seed, number, 1));
        });
    };
    let (mut ready, mut next) = (Vec::new(), Vec::new());
    if num_windows > 0 {
        generate(0, &mut ready);
    }
    for window in 0..num_windows {
        let (written, ()) = rayon::join(
            || writer.write(&tensor.name, &ready),
            || {
                if window + 1 < num_windows {
                    generate(window + 1, &mut next);
                }
            },
        );
        written?;
        wrote(ready.len() as u64);
        std::mem::swap(&mut ready, &mut next);
    }
    Ok(())
}

/// Norms multiply by about one; everything else is centred.
fn mean(role: TensorRole) -> f32 {
    use TensorRole as R;
    match role {
        R::AttentionNorm
        | R::FfnNorm
        | R::OutputNorm
        | R::AttentionQNorm
        | R::AttentionKNorm
        | R::AttentionQANorm
        | R::AttentionKvANorm
        | R::DeltaNorm => 1.0,
        // Half of a state is left after a few dozen tokens.
        R::DeltaDecay => -0.03,
        _ => 0.0,
    }
}

/// Standard deviation of a tensor's weights.
fn weight_std(spec: &ModelSpec, t: &TensorSpec) -> f32 {
    use TensorRole as R;
    let fan_in = *t.shape.last().expect("a tensor has at least one dimension") as f32;
    let hidden = spec.hidden_size as f32;
    match t.role {
        // Enough that a norm in the wrong place or order shows in the logits.
        R::AttentionNorm
        | R::FfnNorm
        | R::OutputNorm
        | R::AttentionQNorm
        | R::AttentionKNorm
        | R::AttentionQANorm
        | R::AttentionKvANorm
        | R::RouterBias
        | R::AttentionNormBias
        | R::FfnNormBias
        | R::OutputNormBias
        | R::OutputBias
        | R::ExpertGateBias
        | R::ExpertUpBias
        | R::ExpertDownBias
        | R::RouterLogitBias
        | R::DeltaNorm => 0.1,
        R::DeltaDecay => 0.003,
        R::DeltaDtBias | R::DeltaConv => 0.5,
        R::AttentionQBias | R::AttentionKBias | R::AttentionVBias | R::AttentionOutputBias => 0.2,
        // Logits of standard deviation 2.5, a little less than trained models have.
        R::Output => 2.5 / hidden.sqrt(),
        R::TokenEmbedding if spec.tie_word_embeddings => 2.5 / hidden.sqrt(),
        R::TokenEmbedding | R::AttentionSinks => 1.0,
        // Router logits of standard deviation 2: a few experts get most of a token's weight.
        R::Router => 2.0 / hidden.sqrt(),
        // Attention over random scores is nearly an average over the context, the same for all tokens: at full size it would make
        // the tokens' hidden states alike within a few layers, and their experts with them.
        R::AttentionOutput => 0.3 / fan_in.sqrt(),
        _ => 1.0 / fan_in.sqrt(),
    }
}

/// One step of SplitMix64: turns (seed, position) into an independent seed.
fn seed_of(seed: u64, number: u64, purpose: u64) -> u64 {
    blocks::mix(blocks::mix(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)) ^ purpose)
}
