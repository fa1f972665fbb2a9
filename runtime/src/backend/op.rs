//! The operations of GPU back-ends: [`tierwise_cost::op::OpKind`] with shapes and places filled in.
//!
//! Activations are f32, row-major. Weights are in the formats of the files ([`QuantFormat`]), rows packed without padding. `tokens`
//! counts rows of activations. In one operation, what is written and what is read lie in different buffers, except where an
//! operation works in place (WGSL may not see one buffer as read and written at once).

use super::device::{BufferId, View};
use tierwise_cost::model::{Activation, RopePairing};
use tierwise_cost::quant::QuantFormat;

/// A matrix in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMatrix {
    /// How its rows are stored.
    pub format: QuantFormat,
    /// Rows.
    pub rows: u32,
    /// Elements per row.
    pub cols: u32,
    /// The rows, one after the other.
    pub view: View,
}

/// Experts of one layer in one buffer: where each one's three matrices begin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceExperts {
    /// The buffer that holds them.
    pub buffer: BufferId,
    /// `[num_experts, 3]` u32: first byte of gate, up and down in `buffer`, in units of 16 bytes; [`ABSENT`] where the expert is not in
    /// this buffer. A row of an absent expert is left as it is.
    pub table: View,
    /// Experts of the layer.
    pub num_experts: u32,
    /// Formats of gate, up and down.
    pub formats: [QuantFormat; 3],
    /// `inner_size`: rows of gate and up.
    pub inner_size: u32,
    /// `hidden`: columns of gate and up, rows of down.
    pub hidden: u32,
    /// Between gate and up and down.
    pub activation: Activation,
    /// Of gate, up and down: f32 `[num_experts, inner_size]` twice, `[num_experts, hidden]`.
    pub biases: Option<[View; 3]>,
}

/// "Not in this buffer" in [`DeviceExperts::table`].
pub const ABSENT: u32 = u32::MAX;

/// How keys and values are stored on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvElement {
    /// 32 bits.
    F32,
    /// 16 bits.
    F16,
}

impl KvElement {
    /// Bytes of an element.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

/// How a device's router scores and chooses; the rules of `exec/route.rs` that need no groups of experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceRule {
    /// Sigmoid scores instead of a softmax.
    pub sigmoid: bool,
    /// Weights of the chosen add up to one.
    pub normalize: bool,
    /// The softmax is over the chosen alone.
    pub softmax_after_topk: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// One operation.
#[derive(Debug, Clone, PartialEq)]
pub enum DeviceOp {
    /// `out[t] = table[ids[t]]`.
    Embed {
        /// `[vocab_size, width]`.
        table: DeviceMatrix,
        /// u32 `[tokens]`.
        ids: View,
        /// `[tokens, width]`.
        out: View,
        /// Rows.
        tokens: u32,
    },
    /// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row; `out` may be `x` (in place).
    RmsNorm {
        /// `[rows, width]`.
        x: View,
        /// f32 `[period, width]`: row `r` takes row `r % period`; absent: ones.
        weight: Option<View>,
        /// Rows of the weight; 1 where all rows share one.
        period: u32,
        /// `[rows, width]`.
        out: View,
        /// Rows.
        rows: u32,
        /// Elements per row.
        width: u32,
        /// Added to the mean square.
        eps: f32,
    },
    /// `out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`, row by row.
    LayerNorm {
        /// `[rows, width]`.
        x: View,
        /// f32 `[width]`.
        weight: View,
        /// f32 `[width]`.
        bias: View,
        /// `[rows, width]`.
        out: View,
        /// Rows.
        rows: u32,
        /// Elements per row.
        width: u32,
        /// Added to the variance.
        eps: f32,
    },
    /// `out = x * weight^T (+ bias)`.
    MatMul {
        /// `[rows, cols]`.
        weight: DeviceMatrix,
        /// f32 `[rows]`.
        bias: Option<View>,
        /// `[tokens, cols]`.
        x: View,
        /// `[tokens, rows]`.
        out: View,
        /// Rows of `x`.
        tokens: u32,
    },
    /// `out[t, h] = x[t, h] * weight[h]^T` for every head: latent attention's absorbed products.
    HeadMatMul {
        /// `[heads * rows, cols]`: head after head.
        weight: DeviceMatrix,
        /// Heads.
        heads: u32,
        /// `[tokens, heads, x_stride]`, of which the first `cols` elements count.
        x: View,
        /// Elements from head to head in `x`.
        x_stride: u32,
        /// `[tokens, heads, out_stride]`, of which the first `rows` elements are written.
        out: View,
        /// Elements from head to head in `out`.
        out_stride: u32,
        /// Rows of `x`.
        tokens: u32,
    },
    /// Rotates the first `2 * pairs` elements from `first` on of every head, in place.
    Rope {
        /// `[tokens, heads, head_stride]`.
        x: View,
        /// f32 `[tokens, pairs, 2]`: cosine and sine, magnitude included.
        cos_sin: View,
        /// Rows.
        tokens: u32,
        /// Heads.
        heads: u32,
        /// Elements from head to head.
        head_stride: u32,
        /// First rotated element of a head.
        first: u32,
        /// Pairs of rotated elements.
        pairs: u32,
        /// Which elements form a pair.
        pairing: RopePairing,
    },
    /// `out[r, 0..width] = x[r, start..start + width]`, for parts of rows.
    CopyColumns {
        /// `[rows, x_stride]`.
        x: View,
        /// Elements from row to row of `x`.
        x_stride: u32,
        /// First element of a row of `x`.
        x_start: u32,
        /// `[rows, out_stride]`.
        out: View,
        /// Elements from row to row of `out`.
        out_stride: u32,
        /// First element of a row of `out`.
        out_start: u32,
        /// Rows.
        rows: u32,
        /// Elements copied per row.
        width: u32,
    },
    /// `cache[position + t] = x[t]`, converted.
    AppendKv {
        /// f32 `[tokens, width]`.
        x: View,
        /// `[context, width]`.
        cache: View,
        /// Format of the cache.
        element: KvElement,
        /// Rows.
        tokens: u32,
        /// Elements per row, even.
        width: u32,
        /// First position written.
        position: u32,
    },
    /// Causal attention of new tokens over the cache, in which they already are.
    Attention(DeviceAttention),
    /// `x *= factor`, or `x[t] *= factors[t]` with `factors`, in place.
    Scale {
        /// `[rows, width]`.
        x: View,
        /// Factor of all rows.
        factor: f32,
        /// f32 `[rows]`: a factor for each row.
        factors: Option<View>,
        /// Rows.
        rows: u32,
        /// Elements per row.
        width: u32,
    },
    /// `y += factor * x`.
    Axpy {
        /// `[elements]`.
        x: View,
        /// `[elements]`, in place.
        y: View,
        /// The factor.
        factor: f32,
        /// Elements.
        elements: u32,
    },
    /// `y[r] += sigmoid(dot(input[r], gate)) * x[r]`: a shared expert behind a sigmoid gate.
    GatedAxpy {
        /// `[rows, width]`.
        x: View,
        /// `[rows, cols]`.
        input: View,
        /// f32 `[cols]`.
        gate: View,
        /// `[rows, width]`, in place.
        y: View,
        /// Rows.
        rows: u32,
        /// Elements per row of `x` and `y`.
        width: u32,
        /// Elements per row of `input`.
        cols: u32,
    },
    /// `out = activation(gate, up)`.
    Activate {
        /// `[elements]`.
        gate: View,
        /// `[elements]`.
        up: View,
        /// `[elements]`.
        out: View,
        /// Elements.
        elements: u32,
        /// Which.
        activation: Activation,
    },
    /// `x = cap * tanh(factor * x / cap)`, or `factor * x` without cap, in place.
    ScaleCap {
        /// `[elements]`.
        x: View,
        /// Elements.
        elements: u32,
        /// Factor.
        factor: f32,
        /// Cap.
        softcap: Option<f32>,
    },
    /// The `k` best experts of each row and their weights, heaviest first. Experts are ranked by their logits, with a selection bias by
    /// score plus bias; among equals the lower index.
    Route {
        /// Router logits: f32 `[tokens, num_experts]`.
        logits: View,
        /// f32 `[num_experts]`: added to the scores for the choice only.
        selection_bias: Option<View>,
        /// u32 `[tokens, k]`.
        ids: View,
        /// f32 `[tokens, k]`.
        weights: View,
        /// Rows.
        tokens: u32,
        /// Experts.
        num_experts: u32,
        /// Experts per token.
        k: u32,
        /// The rule.
        rule: DeviceRule,
    },
    /// Outputs of experts, a row per (token, choice): `out[r] = down(activation(gate(x[input_row]), up(x[input_row])))` for every row whose
    /// expert is in the buffer; rows of other experts stay as they are.
    Experts {
        /// The experts.
        experts: DeviceExperts,
        /// `[inputs, hidden]`.
        x: View,
        /// u32 `[rows]`: the expert of each row; one that the layer does not have is as an absent one.
        ids: View,
        /// Row `r` reads input row `r / rows_per_input`.
        rows_per_input: u32,
        /// Scratch: f32 `[rows, inner_size]`.
        inner: View,
        /// `[rows, hidden]`.
        out: View,
        /// Rows: tokens x experts per token.
        rows: u32,
        /// For many rows: rows ordered by expert. Absent: every row on its own.
        groups: Option<RowGroups>,
    },
    /// `y[t] (+)= sum over choices of weights[t, c] * x[t * k + c]`, in the order of the choices.
    Combine {
        /// `[tokens * k, width]`.
        x: View,
        /// f32 `[tokens, k]`.
        weights: View,
        /// `[tokens, width]`.
        y: View,
        /// Rows of `y`.
        tokens: u32,
        /// Choices per token.
        k: u32,
        /// Elements per row.
        width: u32,
        /// Add to `y` instead of overwriting it.
        accumulate: bool,
    },
}

/// Rows of a [`DeviceOp::Experts`] in the order of their experts, cut into tiles of at most [`TILE_ROWS`] rows of one expert. Every row
/// whose expert is in the buffer is in one tile; other rows may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowGroups {
    /// u32 `[rows]`: row numbers, grouped by expert.
    pub order: View,
    /// u32 `[tiles, 3]`: expert, first place in `order`, number of rows.
    pub tiles: View,
    /// Tiles.
    pub num_tiles: u32,
}

/// Rows of a tile at most.
pub const TILE_ROWS: u32 = 32;

/// Grouped-query attention, or latent attention over latents (one key-value head whose values are its keys' first elements).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceAttention {
    /// f32 `[tokens, heads, key_dim]`.
    pub q: View,
    /// `[context, kv_heads, key_dim]`.
    pub keys: View,
    /// `[context, kv_heads, value_stride]`, of which `value_dim` elements count; the keys themselves in latent attention.
    pub values: View,
    /// Elements from head to head in `values`.
    pub value_stride: u32,
    /// f32 `[tokens, heads, value_dim]`.
    pub out: View,
    /// f32 `[heads]`: a logit per head that has no value.
    pub sinks: Option<View>,
    /// Format of keys and values.
    pub element: KvElement,
    /// New tokens.
    pub tokens: u32,
    /// Positions before them.
    pub past: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Width of a key, even.
    pub key_dim: u32,
    /// Width of a value, even.
    pub value_dim: u32,
    /// Factor on the products.
    pub scale: f32,
    /// Only the last so many positions are seen.
    pub window: Option<u32>,
    /// Only positions of the same chunk of so many are seen.
    pub chunk: Option<u32>,
    /// Scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
}
