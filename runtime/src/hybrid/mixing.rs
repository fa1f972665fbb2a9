//! How tokens see each other, on the device: the cache of keys and values, grouped-query and latent attention.

use super::activations::{Activations, PART_TOKENS};
use super::memory::DeviceMemory;
use super::stream::Stream;
use super::weights::Weights;
use crate::backend::device::{DeviceBackend, View};
use crate::backend::op::{DeviceAttention, DeviceOp, KvElement};
use crate::error::{Result, RuntimeError};
use tierwise_cost::model::{Attention, Gqa, Mla, ModelSpec, TensorId};
use tierwise_cost::op::Slot;
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::budget;

/// What a layer keeps.
#[derive(Debug)]
enum LayerCache {
    /// `[context, kv_heads * head_dim]` each.
    Heads { keys: View, values: View },
    /// `[context, kv_lora_rank + qk_rope_head_dim]`
    Latent(View),
}

/// Keys and values of one sequence over all layers.
#[derive(Debug)]
pub struct DeviceKv {
    layers: Vec<LayerCache>,
    element: KvElement,
    context: usize,
    len: usize,
}

impl DeviceKv {
    /// An empty cache for `context` positions.
    ///
    /// # Errors
    /// For a format that is none of the device's, or when there is no room.
    pub fn allocate(
        spec: &ModelSpec,
        context: usize,
        format: QuantFormat,
        memory: &mut DeviceMemory,
        backend: &mut dyn DeviceBackend,
    ) -> Result<Self> {
        let element = match format {
            QuantFormat::F32 => KvElement::F32,
            QuantFormat::F16 => KvElement::F16,
            other => {
                return Err(RuntimeError::BadRequest {
                    what: "kv format",
                    found: other.name().to_string(),
                    expected: "F16 or F32".to_string(),
                });
            }
        };
        let mut alloc =
            |width: u32, what: &str| memory.alloc(backend, budget::KV, context as u64 * u64::from(width) * element.bytes(), what);
        let layers = spec.layers.iter().enumerate().map(|(i, layer)| match &layer.attention {
            Attention::Gqa(a) => {
                let width = a.num_kv_heads * a.head_dim;
                let (keys, values) = (format!("keys of layer {i}"), format!("values of layer {i}"));
                Ok(LayerCache::Heads { keys: alloc(width, &keys)?, values: alloc(width, &values)? })
            }
            Attention::Mla(a) => {
                alloc(a.kv_lora_rank + a.qk_rope_head_dim, &format!("latents of layer {i}")).map(LayerCache::Latent)
            }
            Attention::DeltaNet(_) => unreachable!("refused when the session was opened"),
            Attention::PlanOnly(m) => Err(RuntimeError::BadRequest {
                what: "attention kind",
                found: m.name.clone(),
                expected: "grouped-query or latent attention".to_string(),
            }),
        });
        Ok(Self { layers: layers.collect::<Result<_>>()?, element, context, len: 0 })
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

    /// Forgets every position from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Counts `tokens` positions, written in every layer, as held.
    pub const fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// Appends keys and values of `tokens` new tokens, then attends: queries to [`Slot::Attended`].
    pub(super) fn attention(
        &self,
        (layer, a): (usize, &Gqa),
        sinks: Option<View>,
        tokens: u32,
        buffers: &mut Activations,
        stream: &mut Stream,
    ) -> Result<()> {
        let LayerCache::Heads { keys, values } = self.layers[layer] else { unreachable!("{SAME}") };
        let (width, position) = (a.num_kv_heads * a.head_dim, self.len as u32);
        for (slot, cache) in [(Slot::K, keys), (Slot::V, values)] {
            let x = buffers.rows(slot, tokens);
            stream.push(DeviceOp::AppendKv { x, cache, element: self.element, tokens, width, position })?;
        }
        buffers.widen(Slot::Attended, a.num_heads * a.head_dim);
        stream.push(DeviceOp::Attention(DeviceAttention {
            q: buffers.rows(Slot::Q, tokens),
            keys,
            values,
            value_stride: a.head_dim,
            out: buffers.rows(Slot::Attended, tokens),
            sinks,
            element: self.element,
            tokens,
            past: position,
            heads: a.num_heads,
            kv_heads: a.num_kv_heads,
            key_dim: a.head_dim,
            value_dim: a.head_dim,
            scale: a.scale.unwrap_or_else(|| 1.0 / (a.head_dim as f32).sqrt()),
            window: a.sliding_window,
            chunk: a.chunk,
            softcap: a.softcap,
        }))
    }

    /// Latent attention of queries over latents, with its norm and rotations, to [`Slot::Attended`]. In parts of a few tokens: in the
    /// latent space a query is several times as wide. As in `exec/mla.rs`.
    #[expect(clippy::too_many_arguments, reason = "what the operation has, and where it goes")]
    pub(super) fn latent_attention(
        &self,
        (layer, a): (usize, &Mla),
        [kv_norm, k_b, v_b]: [TensorId; 3],
        (cos_sin, eps): (View, f32),
        tokens: u32,
        weights: &Weights,
        buffers: &mut Activations,
        stream: &mut Stream,
    ) -> Result<()> {
        let LayerCache::Latent(cache) = self.layers[layer] else { unreachable!("{SAME}") };
        let (heads, rank, nope, rotary) = (a.num_heads, a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim);
        let (qk, latent) = (nope + rotary, rank + rotary);
        let (pairs, pairing) = (a.rope.rotary_dim / 2, a.rope.pairing);
        buffers.widen(Slot::Attended, heads * a.v_head_dim);
        let (q_all, latents_all) = (buffers.rows(Slot::Q, tokens), buffers.rows(Slot::KvLatent, tokens));
        let rope =
            |x, heads, head_stride, first| DeviceOp::Rope { x, cos_sin, tokens, heads, head_stride, first, pairs, pairing };
        stream.push(rope(q_all, heads, qk, nope))?;
        stream.push(rope(latents_all, 1, latent, rank))?;
        let [queries, sums] = buffers.latent;
        let parts = || (0..tokens).step_by(PART_TOKENS as usize).map(|first| (first, PART_TOKENS.min(tokens - first)));
        let rows_of = |view: View, width: u32, first: u32, rows: u32| {
            view.part(4 * u64::from(first) * u64::from(width), 4 * u64::from(rows) * u64::from(width))
        };
        for (first, rows) in parts() {
            let (x, compressed) = (rows_of(latents_all, latent, first, rows), rows_of(sums, rank, 0, rows));
            stream.push(DeviceOp::CopyColumns {
                x,
                x_stride: latent,
                x_start: 0,
                out: compressed,
                out_stride: rank,
                out_start: 0,
                rows,
                width: rank,
            })?;
            let weight = Some(weights.vector(kv_norm));
            stream.push(DeviceOp::RmsNorm { x: compressed, weight, period: 1, out: compressed, rows, width: rank, eps })?;
            stream.push(DeviceOp::CopyColumns {
                x: compressed,
                x_stride: rank,
                x_start: 0,
                out: x,
                out_stride: latent,
                out_start: 0,
                rows,
                width: rank,
            })?;
        }
        let position = self.len as u32;
        stream.push(DeviceOp::AppendKv { x: latents_all, cache, element: self.element, tokens, width: latent, position })?;
        for (first, rows) in parts() {
            let q = rows_of(q_all, heads * qk, first, rows);
            let (to, seen) = (rows_of(queries, heads * latent, 0, rows), rows_of(sums, heads * rank, 0, rows));
            stream.push(DeviceOp::HeadMatMul {
                weight: weights.matrix(k_b),
                heads,
                x: q,
                x_stride: qk,
                out: to,
                out_stride: latent,
                tokens: rows,
            })?;
            stream.push(DeviceOp::CopyColumns {
                x: q,
                x_stride: qk,
                x_start: nope,
                out: to,
                out_stride: latent,
                out_start: rank,
                rows: rows * heads,
                width: rotary,
            })?;
            stream.push(DeviceOp::Attention(DeviceAttention {
                q: to,
                keys: cache,
                values: cache,
                value_stride: latent,
                out: seen,
                sinks: None,
                element: self.element,
                tokens: rows,
                past: position + first,
                heads,
                kv_heads: 1,
                key_dim: latent,
                value_dim: rank,
                scale: a.scale.unwrap_or_else(|| 1.0 / (qk as f32).sqrt()),
                window: None,
                chunk: None,
                softcap: None,
            }))?;
            let attended = rows_of(buffers.rows(Slot::Attended, tokens), heads * a.v_head_dim, first, rows);
            stream.push(DeviceOp::HeadMatMul {
                weight: weights.matrix(v_b),
                heads,
                x: seen,
                x_stride: rank,
                out: attended,
                out_stride: a.v_head_dim,
                tokens: rows,
            })?;
        }
        Ok(())
    }
}

const SAME: &str = "operations and cache follow from the same description";
