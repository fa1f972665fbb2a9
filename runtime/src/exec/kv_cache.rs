//! Keys and values of the positions seen so far.
//!
//! Per layer two arrays `[kv_heads, context, head_dim]`: the positions of one head lie together, so decoding streams them. Layers with
//! latent attention have one array `[context, kv_lora_rank + qk_rope_head_dim]`, which all heads share. Layers with a gated delta rule have
//! a state of fixed size, which cannot go back: after positions were forgotten it is computed again from the first one.
//! Memory is reserved at once and becomes resident only where positions are written.

use super::delta_net::DeltaState;
use super::mla::latent_width;
use crate::error::{Result, RuntimeError};
use crate::kernels::CpuKernels;
use crate::quant::{ActivationFormat, ActivationQ8_1, BlockQ8_0};
use bytemuck::Zeroable;
use half::f16;
use memmap2::MmapMut;
use tierwise_cost::model::{Attention, ModelSpec};
use tierwise_cost::quant::QuantFormat;

/// Keys and values of one sequence over all layers.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    /// Positions it can hold.
    context: usize,
    /// Positions it holds.
    len: usize,
    /// Positions that the states have seen, if there are states.
    states_len: usize,
}

#[derive(Debug)]
enum LayerCache {
    Heads(HeadsCache),
    /// Rows of `width` elements, of which the first `rank` are the values.
    Latent {
        rows: Elements,
        width: usize,
        rank: usize,
    },
    State(DeltaState),
}

#[derive(Debug)]
struct HeadsCache {
    keys: Elements,
    values: Elements,
    kv_heads: usize,
    head_dim: usize,
}

/// One array in the cache's format. An anonymous map, because its pages cost nothing until they are written and because a size
/// that the system refuses is an error, where an allocation would abort the process.
#[derive(Debug)]
enum Elements {
    F16(MmapMut),
    F32(MmapMut),
    /// Blocks of [`Q8_0_BLOCK`] elements.
    Q8_0(MmapMut),
}

/// Elements of a block of Q8_0; rows are whole blocks.
const Q8_0_BLOCK: usize = 32;

impl Elements {
    /// `rows` times `width` elements.
    fn new(format: QuantFormat, rows: usize, width: usize) -> Result<Self> {
        let count = rows.checked_mul(width).ok_or_else(|| RuntimeError::BadRequest {
            what: "context",
            found: format!("{rows} rows of {width} elements per layer"),
            expected: "a number of tokens whose cache can be addressed".to_string(),
        })?;
        let too_large = |reason: String| RuntimeError::BadRequest {
            what: "context",
            found: format!("a cache of {count} elements per layer ({reason})"),
            expected: "one that fits this machine's memory: a smaller --context or cache format".to_string(),
        };
        let map = |size: usize| {
            let bytes = count.checked_mul(size).ok_or_else(|| too_large("beyond the address space".to_string()))?;
            MmapMut::map_anon(bytes).map_err(|e| too_large(e.to_string()))
        };
        match format {
            QuantFormat::F16 => Ok(Self::F16(map(2)?)),
            QuantFormat::F32 => Ok(Self::F32(map(4)?)),
            QuantFormat::Q8_0 if width.is_multiple_of(Q8_0_BLOCK) => {
                // 34 bytes for 32 elements, so the division comes first.
                let bytes = (count / Q8_0_BLOCK).checked_mul(size_of::<BlockQ8_0>());
                let bytes = bytes.ok_or_else(|| too_large("beyond the address space".to_string()))?;
                MmapMut::map_anon(bytes).map(Self::Q8_0).map_err(|e| too_large(e.to_string()))
            }
            other => Err(RuntimeError::BadRequest {
                what: "kv format",
                found: format!("{} for rows of {width} elements", other.name()),
                expected: format!("F16, F32, or Q8_0 where rows are multiples of {Q8_0_BLOCK} elements"),
            }),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::F16(map) | Self::F32(map) | Self::Q8_0(map) => map.len() as u64,
        }
    }

    fn write(&mut self, kernels: &CpuKernels, at: usize, row: &[f32]) {
        match self {
            Self::F16(map) => kernels.f32_to_f16(row, &mut bytemuck::cast_slice_mut(map)[at..at + row.len()]),
            Self::F32(map) => bytemuck::cast_slice_mut(map)[at..at + row.len()].copy_from_slice(row),
            Self::Q8_0(map) => {
                let blocks: &mut [BlockQ8_0] = bytemuck::cast_slice_mut(map);
                for (block, x) in blocks[at / Q8_0_BLOCK..].iter_mut().zip(row.chunks_exact(Q8_0_BLOCK)) {
                    // Encoded like activations; values that are not finite give a scale that is not, so they show.
                    let mut encoded = ActivationQ8_1::zeroed();
                    kernels.quantize_activation_row(ActivationFormat::Q8_1, x, bytemuck::bytes_of_mut(&mut encoded));
                    *block = BlockQ8_0 { scale: f16::from_f32(encoded.scale).to_le_bytes(), codes: encoded.codes };
                }
            }
        }
    }

    fn byte_range(&self, (at, count): (usize, usize)) -> &[u8] {
        match self {
            Self::F16(map) => &map[2 * at..2 * (at + count)],
            Self::F32(map) => &map[4 * at..4 * (at + count)],
            Self::Q8_0(map) => {
                let bytes = |elements: usize| elements / Q8_0_BLOCK * size_of::<BlockQ8_0>();
                &map[bytes(at)..bytes(at + count)]
            }
        }
    }

    fn slice(&self, at: usize, count: usize) -> KvRows<'_> {
        match self {
            Self::F16(map) => KvRows::F16(&bytemuck::cast_slice(map)[at..at + count]),
            Self::F32(map) => KvRows::F32(&bytemuck::cast_slice(map)[at..at + count]),
            Self::Q8_0(map) => KvRows::Q8_0(&bytemuck::cast_slice(map)[at / Q8_0_BLOCK..(at + count) / Q8_0_BLOCK]),
        }
    }
}

/// Keys or values of one head at consecutive positions: `[positions, head_dim]`.
#[derive(Debug, Clone, Copy)]
pub enum KvRows<'a> {
    /// Halves.
    F16(&'a [f16]),
    /// Single precision.
    F32(&'a [f32]),
    /// Blocks of 32.
    Q8_0(&'a [BlockQ8_0]),
}

impl KvRows<'_> {
    /// Elements from number `at` on, as f32.
    pub fn widen(&self, kernels: &CpuKernels, at: usize, out: &mut [f32]) {
        match self {
            Self::F16(x) => kernels.f16_to_f32(&x[at..at + out.len()], out),
            Self::F32(x) => out.copy_from_slice(&x[at..at + out.len()]),
            Self::Q8_0(x) => kernels.q8_0_to_f32(&x[at / Q8_0_BLOCK..(at + out.len()) / Q8_0_BLOCK], out),
        }
    }
}

/// What the heads of one group attend to.
#[derive(Debug, Clone, Copy)]
pub struct KvSource<'a> {
    keys: &'a Elements,
    /// `None`: the first elements of the keys.
    values: Option<&'a Elements>,
    /// First position of the head.
    first: usize,
    /// Elements of a key.
    pub key_width: usize,
    /// Elements of a value.
    pub value_width: usize,
}

impl<'a> KvSource<'a> {
    fn place(&self, (start, end): (usize, usize), width: usize) -> (usize, usize) {
        ((self.first + start) * width, (end - start) * width)
    }

    /// Keys at positions `start..end`.
    pub fn keys(&self, positions: (usize, usize)) -> KvRows<'a> {
        let (at, count) = self.place(positions, self.key_width);
        self.keys.slice(at, count)
    }

    /// Values at positions `start..end`, rows of `value_width`; `None` if they are the first elements of the keys.
    pub fn values(&self, positions: (usize, usize)) -> Option<KvRows<'a>> {
        let (at, count) = self.place(positions, self.value_width);
        self.values.map(|v| v.slice(at, count))
    }

    /// The bytes of the keys, to fetch them ahead.
    pub fn key_bytes(&self, positions: (usize, usize)) -> &'a [u8] {
        self.keys.byte_range(self.place(positions, self.key_width))
    }

    /// The bytes of the values, to fetch them ahead; nothing if they are parts of the keys.
    pub fn value_bytes(&self, positions: (usize, usize)) -> &'a [u8] {
        self.values.map_or(&[], |v| v.byte_range(self.place(positions, self.value_width)))
    }
}

impl KvCache {
    /// An empty cache for `context` positions.
    ///
    /// # Errors
    /// When the format is not one of F16, F32 and Q8_0 (for rows of whole blocks), a layer cannot be run, or the size overflows.
    pub fn new(spec: &ModelSpec, context: usize, format: QuantFormat) -> Result<Self> {
        let mut layers = Vec::with_capacity(spec.layers.len());
        for layer in &spec.layers {
            layers.push(match &layer.attention {
                Attention::Gqa(a) => {
                    let (kv_heads, head_dim) = (a.num_kv_heads as usize, a.head_dim as usize);
                    let elements = || Elements::new(format, context.saturating_mul(kv_heads), head_dim);
                    let (keys, values) = (elements()?, elements()?);
                    LayerCache::Heads(HeadsCache { keys, values, kv_heads, head_dim })
                }
                Attention::Mla(a) => {
                    let width = latent_width(a);
                    LayerCache::Latent { rows: Elements::new(format, context, width)?, width, rank: a.kv_lora_rank as usize }
                }
                Attention::DeltaNet(a) => LayerCache::State(DeltaState::new(a).ok_or_else(|| RuntimeError::BadRequest {
                    what: "model",
                    found: format!("states of {} elements in a layer", a.state_elements()),
                    expected: "states that fit this machine's memory".to_string(),
                })?),
                Attention::PlanOnly(_) => {
                    return Err(RuntimeError::BadRequest {
                        what: "attention kind",
                        found: format!("{:?}", layer.attention),
                        expected: "grouped-query or latent attention".to_string(),
                    });
                }
            });
        }
        Ok(Self { layers, context, len: 0, states_len: 0 })
    }

    /// Positions held.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Nothing held.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions it can hold.
    pub const fn context(&self) -> usize {
        self.context
    }

    /// Bytes reserved for the whole context.
    pub fn bytes(&self) -> u64 {
        let bytes = |l: &LayerCache| match l {
            LayerCache::Heads(l) => l.keys.bytes() + l.values.bytes(),
            LayerCache::Latent { rows, .. } => rows.bytes(),
            LayerCache::State(state) => state.bytes(),
        };
        self.layers.iter().map(bytes).sum()
    }

    /// Forgets every position from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        if self.len < self.states_len {
            self.states_len = 0;
            for layer in &mut self.layers {
                if let LayerCache::State(state) = layer {
                    state.clear();
                }
            }
        }
    }

    /// Some layers have states that cannot go back.
    pub fn has_states(&self) -> bool {
        self.layers.iter().any(|l| matches!(l, LayerCache::State(_)))
    }

    /// If states have seen fewer positions than are held: forgets those, and says which have to be computed again.
    pub fn go_back_to_states(&mut self) -> Option<std::ops::Range<usize>> {
        let lost = self.states_len..self.len;
        if lost.is_empty() || !self.has_states() {
            return None;
        }
        self.len = lost.start;
        Some(lost)
    }

    /// The state of a layer with a gated delta rule.
    pub fn state_mut(&mut self, layer: usize) -> &mut DeltaState {
        let LayerCache::State(state) = &mut self.layers[layer] else { unreachable!("{NO_STATE}") };
        state
    }

    /// Writes keys and values of new tokens at positions `self.len()..`; [`Self::advance`] makes them part of the cache.
    pub fn append(
        &mut self,
        kernels: &CpuKernels,
        layer: usize,
        keys: &[f32],   // [tokens, kv_heads * head_dim]
        values: &[f32], // [tokens, kv_heads * head_dim]
    ) {
        let (start, context) = (self.len, self.context);
        let LayerCache::Heads(l) = &mut self.layers[layer] else { unreachable!("{NOT_HEADS}") };
        let width = l.kv_heads * l.head_dim;
        for (t, (k, v)) in keys.chunks_exact(width).zip(values.chunks_exact(width)).enumerate() {
            for head in 0..l.kv_heads {
                let at = (head * context + start + t) * l.head_dim;
                let columns = head * l.head_dim..(head + 1) * l.head_dim;
                l.keys.write(kernels, at, &k[columns.clone()]);
                l.values.write(kernels, at, &v[columns]);
            }
        }
    }

    /// Writes latents of new tokens, as [`Self::append`] does keys and values.
    pub fn append_latents(&mut self, kernels: &CpuKernels, layer: usize, latents: &[f32] /* [tokens, width] */) {
        let LayerCache::Latent { rows, width, .. } = &mut self.layers[layer] else { unreachable!("{NOT_LATENT}") };
        rows.write(kernels, self.len * *width, latents);
    }

    /// Counts `tokens` positions, written in every layer, as held.
    pub fn advance(&mut self, tokens: usize) {
        self.len += tokens;
        if self.has_states() {
            self.states_len = self.len;
        }
        debug_assert!(self.len <= self.context, "the session checks the context before a step");
    }

    /// What the query heads of key/value head `head` attend to.
    pub fn source(&self, layer: usize, head: usize) -> KvSource<'_> {
        match &self.layers[layer] {
            LayerCache::Heads(l) => KvSource {
                keys: &l.keys,
                values: Some(&l.values),
                first: head * self.context,
                key_width: l.head_dim,
                value_width: l.head_dim,
            },
            LayerCache::Latent { rows, width, rank } => {
                KvSource { keys: rows, values: None, first: 0, key_width: *width, value_width: *rank }
            }
            LayerCache::State(_) => unreachable!("{NO_ROWS}"),
        }
    }
}

const NOT_HEADS: &str = "operations and cache follow from the same description: this layer has no grouped-query attention";
const NOT_LATENT: &str = "operations and cache follow from the same description: this layer has no latent attention";
const NO_STATE: &str = "operations and cache follow from the same description: this layer has no state";
const NO_ROWS: &str = "operations and cache follow from the same description: this layer has a state and no cache";

#[cfg(test)]
mod tests {
    use super::*;

    /// Half a step of 1/127 of the largest value of a block, and the rounding of its scale to a half.
    #[test]
    fn q8_0_keeps_values_within_half_a_step_and_what_is_not_finite_shows() {
        let values: Vec<f32> = (0..128).map(|i| (i as f32 * 0.7).sin() * (1 << (i / 32)) as f32).collect();
        for kernels in CpuKernels::available() {
            let mut elements = Elements::new(QuantFormat::Q8_0, 3, 128).expect("made");
            assert_eq!(elements.bytes(), 3 * 4 * 34);
            elements.write(&kernels, 128, &values);
            let mut read = vec![f32::NAN; 128];
            elements.slice(128, 128).widen(&kernels, 0, &mut read);
            for (x, y) in values.chunks(32).zip(read.chunks(32)) {
                let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
                let bound = largest * (0.5 / 127.0 + 1.0 / 2048.0) * 1.001;
                assert!(x.iter().zip(y).all(|(x, y)| (x - y).abs() <= bound), "{}: {x:?} {y:?}", kernels.name);
            }
            let mut again = vec![f32::NAN; 128];
            elements.slice(128, 128).widen(&CpuKernels::SCALAR, 0, &mut again);
            assert_eq!(again, read, "{}", kernels.name);
            let mut part = vec![f32::NAN; 64];
            elements.slice(128, 128).widen(&kernels, 32, &mut part);
            assert_eq!(part, read[32..96]);
            for special in [f32::NAN, f32::INFINITY, 1e30] {
                let mut row = values.clone();
                row[40] = special;
                elements.write(&kernels, 0, &row);
                elements.slice(0, 128).widen(&kernels, 0, &mut read);
                assert!(!read[40].is_finite() && read[..32].iter().chain(&read[64..]).all(|x| x.is_finite()), "{special}");
            }
        }
        let refused = Elements::new(QuantFormat::Q8_0, 3, 80).expect_err("80 is not whole blocks");
        assert!(refused.to_string().contains("multiples of 32"), "{refused}");
        Elements::new(QuantFormat::Q4_0, 3, 64).expect_err("no format of caches");
        Elements::new(QuantFormat::Q8_0, usize::MAX / 2, 64).expect_err("too large");
    }
}
