//! Gated delta rule (Gated DeltaNet, arXiv 2412.06464): attention with a state per head instead of a cache that grows.
//!
//! A causal convolution over the last few positions mixes each channel of queries, keys and values. A value head's state `S`
//! `[key_head_dim, value_head_dim]` decays, is corrected towards the new value, `S += k (beta (v - k^T S))`, and gives `q^T S`, which is
//! normed and gated. Position after position, so that neither chunks of a prompt nor the thread count change a bit. Formulas:
//! transformers, `modeling_qwen3_next.py` (`torch_recurrent_gated_delta_rule`).

use super::threads::{Threads, for_rows};
use crate::kernels::CpuKernels;
use rayon::prelude::*;
use tierwise_cost::model::{DeltaNet, ValueHeads};

/// Under the root of the norms of queries and keys, as all implementations have it.
const NORM_EPS: f32 = 1e-6;
/// Multiplications of a step below this many stay on the calling thread.
const SERIAL_PRODUCTS: usize = 64 << 10;

/// What a layer keeps of the positions seen so far.
#[derive(Debug, Clone, PartialEq)]
pub struct DeltaState {
    /// Inputs of the convolution at the last positions: `[conv_kernel - 1, channels]`.
    inputs: Vec<f32>,
    /// `[num_value_heads, key_head_dim, value_head_dim]`
    heads: Vec<f32>,
}

impl DeltaState {
    /// The state before the first position; `None` when there is no memory for it.
    pub fn new(a: &DeltaNet) -> Option<Self> {
        let before = (a.conv_kernel as usize).saturating_sub(1) * a.channels() as usize;
        let mut heads = Vec::new();
        let count = (a.state_elements() as usize).checked_sub(before)?;
        heads.try_reserve_exact(count).ok()?;
        heads.resize(count, 0.0);
        Some(Self { inputs: vec![0.0; before], heads })
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.inputs.fill(0.0);
        self.heads.fill(0.0);
    }

    /// Its size in memory.
    pub const fn bytes(&self) -> u64 {
        4 * (self.inputs.len() + self.heads.len()) as u64
    }
}

/// The layer's vectors.
#[derive(Debug, Clone, Copy)]
pub struct DeltaWeights<'a> {
    /// `[channels, conv_kernel]`
    pub conv: &'a [f32],
    /// Added to the decay's projection: `[num_value_heads]`.
    pub dt_bias: &'a [f32],
    /// Decay per unit of time, negative: `[num_value_heads]`.
    pub decay: &'a [f32],
    /// `[value_head_dim]`
    pub norm: &'a [f32],
    /// Under that norm's root.
    pub norm_eps: f32,
}

/// Projections of the new tokens.
#[derive(Debug, Clone, Copy)]
pub struct DeltaInputs<'a> {
    /// Queries, keys and values: `[tokens, channels]`.
    pub mixed: &'a [f32],
    /// What gates the result: `[tokens, num_value_heads * value_head_dim]`.
    pub gate: &'a [f32],
    /// What becomes beta, alone or with the decay's: `[tokens, num_value_heads]` or `[tokens, 2 * num_value_heads]`.
    pub beta: &'a [f32],
    /// The decay's, if it is apart: `[tokens, num_value_heads]`.
    pub alpha: Option<&'a [f32]>,
}

/// Rows of a step that belong to one sequence.
#[derive(Debug)]
pub struct DeltaPart<'a> {
    /// The sequence's state, which goes on by them.
    pub state: &'a mut DeltaState,
    /// Number of rows.
    pub rows: usize,
}

/// Working memory of a step.
#[derive(Debug, Default)]
pub struct DeltaBuffers {
    /// Part after part: `[conv_kernel - 1 + tokens, channels]`
    padded: Vec<f32>,
    /// `[tokens, channels]`
    convolved: Vec<f32>,
    /// Part after part: `[num_value_heads, tokens, value_head_dim]`
    results: Vec<f32>,
}

/// The layer's result for the new tokens of the first of `parts`, then for those of the next.
pub fn delta_net(
    threads: &Threads,
    a: &DeltaNet,
    weights: &DeltaWeights<'_>,
    input: DeltaInputs<'_>,
    mut parts: Vec<DeltaPart<'_>>,
    buffers: &mut DeltaBuffers,
    out: &mut [f32], // [tokens, num_value_heads * value_head_dim]
) {
    let tokens = out.len() / a.value_dim() as usize;
    let DeltaBuffers { padded, convolved, results } = buffers;
    // First row and number of rows of each row's part.
    let mut part_of = Vec::with_capacity(tokens);
    for part in &parts {
        let first = part_of.len();
        part_of.resize(first + part.rows, (first, part.rows));
    }
    convolve(threads, a, weights.conv, input.mixed, &mut parts, padded, convolved);
    norm_queries_and_keys(threads, a, convolved);

    let (key_dim, value_dim) = (a.key_head_dim as usize, a.value_head_dim as usize);
    let value_heads = a.num_value_heads as usize;
    results.resize(value_heads * tokens * value_dim, 0.0);
    let mut heads = Vec::with_capacity(parts.len() * value_heads);
    let (mut rest, mut first_row) = (&mut results[..], 0);
    for part in parts {
        let (of_part, later) = rest.split_at_mut(value_heads * part.rows * value_dim);
        rest = later;
        let states = part.state.heads.chunks_exact_mut(key_dim * value_dim);
        let of_heads = states.zip(of_part.chunks_exact_mut(part.rows * value_dim)).enumerate();
        heads.extend(of_heads.map(|(head, (state, out))| (first_row, head, state, out)));
        first_row += part.rows;
    }
    let channels = a.channels() as usize;
    let convolved = &*convolved;
    let run = |(first_row, head, state, out): (usize, usize, &mut [f32], &mut [f32])| {
        let gates = Gates::of(a, weights, head);
        let q = gates.key_head * key_dim;
        let k = (a.num_key_heads as usize) * key_dim + q;
        let v = 2 * (a.num_key_heads as usize) * key_dim + head * value_dim;
        let rows = convolved[first_row * channels..].chunks_exact(channels);
        for (t, (row, out)) in rows.zip(out.chunks_exact_mut(value_dim)).enumerate() {
            let (decay, beta) = gates.at(first_row + t, &input);
            let [q, k, v] = [&row[q..q + key_dim], &row[k..k + key_dim], &row[v..v + value_dim]];
            advance(threads.kernels(), state, (decay, beta), q, k, v, out);
        }
    };
    if threads.count() == 1 || tokens * state_products(a) < SERIAL_PRODUCTS {
        heads.into_iter().for_each(run);
    } else {
        heads.into_par_iter().with_max_len(1).for_each(run);
    }

    let results = &*results;
    for_rows(threads, out, a.value_dim() as usize, |t, row| {
        let gate = &input.gate[t * row.len()..(t + 1) * row.len()];
        let (first_row, rows) = part_of[t];
        let of_part = &results[first_row * value_heads * value_dim..];
        for (head, (out, gate)) in row.chunks_exact_mut(value_dim).zip(gate.chunks_exact(value_dim)).enumerate() {
            out.copy_from_slice(&of_part[(head * rows + t - first_row) * value_dim..][..value_dim]);
            super::elementwise::rms_norm_in_place(threads.kernels(), out, Some(weights.norm), weights.norm_eps);
            out.iter_mut().zip(gate).for_each(|(x, g)| *x *= silu(*g));
        }
    });
}

const fn state_products(a: &DeltaNet) -> usize {
    a.num_value_heads as usize * a.key_head_dim as usize * a.value_head_dim as usize
}

/// Every channel's weighted sum over the last positions of its sequence, through a SiLU. Keeps what the next step needs.
fn convolve(
    threads: &Threads,
    a: &DeltaNet,
    weights: &[f32], // [channels, conv_kernel]
    mixed: &[f32],   // [tokens, channels]
    parts: &mut [DeltaPart<'_>],
    padded: &mut Vec<f32>, // part after part: [conv_kernel - 1 + tokens, channels]
    out: &mut Vec<f32>,    // [tokens, channels]
) {
    let (channels, kernel) = (a.channels() as usize, a.conv_kernel as usize);
    padded.clear();
    // Where what a row sees begins.
    let mut starts = Vec::with_capacity(mixed.len() / channels);
    let mut rest = mixed;
    for part in parts {
        let (of_part, later) = rest.split_at(part.rows * channels);
        rest = later;
        starts.extend((0..part.rows).map(|t| padded.len() + t * channels));
        let before = &mut part.state.inputs;
        padded.extend_from_slice(before);
        padded.extend_from_slice(of_part);
        let kept = padded.len() - before.len();
        before.copy_from_slice(&padded[kept..]);
    }
    out.resize(mixed.len(), 0.0);
    for_rows(threads, out, channels, |t, row| {
        let seen = &padded[starts[t]..starts[t] + kernel * channels];
        for (c, (x, weights)) in row.iter_mut().zip(weights.chunks_exact(kernel)).enumerate() {
            let sum: f32 = weights.iter().enumerate().map(|(i, w)| w * seen[i * channels + c]).sum();
            *x = silu(sum);
        }
    });
}

/// Queries and keys of unit length; queries are divided by the root of their width besides.
fn norm_queries_and_keys(threads: &Threads, a: &DeltaNet, convolved: &mut [f32] /* [tokens, channels] */) {
    let (width, keys) = (a.key_head_dim as usize, (a.num_key_heads * a.key_head_dim) as usize);
    let scale = 1.0 / (width as f32).sqrt();
    for_rows(threads, convolved, a.channels() as usize, |_, row| {
        for (i, head) in row[..2 * keys].chunks_exact_mut(width).enumerate() {
            let length = (threads.kernels().dot_f32(head, head) + NORM_EPS).sqrt();
            let factor = if i * width < keys { scale } else { 1.0 } / length;
            head.iter_mut().for_each(|x| *x *= factor);
        }
    });
}

/// Where a value head finds its key head and gates.
struct Gates {
    key_head: usize,
    /// Place of beta's projection in its row, and the row's width.
    beta: (usize, usize),
    /// The same of the decay's.
    alpha: (usize, usize),
    dt_bias: f32,
    decay: f32,
}

impl Gates {
    fn of(a: &DeltaNet, weights: &DeltaWeights<'_>, head: usize) -> Self {
        let (values, keys) = (a.num_value_heads as usize, a.num_key_heads as usize);
        let per_key = values / keys;
        let key_head = match a.value_heads {
            ValueHeads::Grouped => head / per_key,
            ValueHeads::Tiled => head % keys,
        };
        let (beta, alpha) = if a.fused_gates {
            // Per key head: betas of its value heads, then their decays.
            let first = head / per_key * 2 * per_key + head % per_key;
            ((first, 2 * values), (first + per_key, 2 * values))
        } else {
            ((head, values), (head, values))
        };
        Self { key_head, beta, alpha, dt_bias: weights.dt_bias[head], decay: weights.decay[head] }
    }

    /// Factor on the state, and beta, at token `t`.
    fn at(&self, t: usize, input: &DeltaInputs<'_>) -> (f32, f32) {
        let beta = input.beta[t * self.beta.1 + self.beta.0];
        let alpha = input.alpha.unwrap_or(input.beta)[t * self.alpha.1 + self.alpha.0];
        ((self.decay * softplus(alpha + self.dt_bias)).exp(), 1.0 / (1.0 + (-beta).exp()))
    }
}

/// One position of one head.
fn advance(
    kernels: &CpuKernels,
    state: &mut [f32], // [key_head_dim, value_head_dim]
    (decay, beta): (f32, f32),
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32], // [value_head_dim]
) {
    let width = out.len();
    out.fill(0.0);
    for (row, k) in state.chunks_exact_mut(width).zip(k) {
        row.iter_mut().for_each(|s| *s *= decay);
        kernels.axpy_f32(*k, row, out);
    }
    // What the state makes of the key, to what is to be added.
    out.iter_mut().zip(v).for_each(|(x, v)| *x = beta * (v - *x));
    for (row, k) in state.chunks_exact_mut(width).zip(k) {
        kernels.axpy_f32(*k, out, row);
    }
    out.fill(0.0);
    for (row, q) in state.chunks_exact(width).zip(q) {
        kernels.axpy_f32(*q, row, out);
    }
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

fn softplus(x: f32) -> f32 {
    // Beyond that the difference is below the last bit.
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
