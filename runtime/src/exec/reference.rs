//! The slow obvious executor: the oracle of the fast one.
//!
//! The same operation list over a whole sequence at once, without cache, chunks, threads or kernels: every weight row is
//! dequantised to f32, everything else is plain loops in f64. Formulas are those of the Hugging Face implementations.

use super::model::{Matrix, Model};
use super::rope::frequencies;
use crate::error::Result;
use ndarray::{Array1, Array2, ArrayView1, Axis, s};
use std::collections::HashMap;
use tierwise_cost::model::{
    Activation, DeltaNet, Gqa, GroupScore, Mla, Moe, QkNorm, Rope, RopePairing, RouterScore, Selection, TensorId, ValueHeads,
};
use tierwise_cost::op::{Batch, OpKind, Slot, lower};

/// What the oracle computes.
#[derive(Debug)]
pub struct Reference {
    /// `[tokens, vocab_size]`
    pub logits: Array2<f64>,
    /// Per layer with experts, in order.
    pub routing: Vec<LayerRouting>,
}

/// Where one layer's tokens went.
#[derive(Debug)]
pub struct LayerRouting {
    /// The layer.
    pub layer: u32,
    /// Per token: the chosen experts with their weights, heaviest first.
    pub tokens: Vec<Vec<(u32, f64)>>,
}

/// Logits and routing at every position of `tokens`.
///
/// # Errors
/// When the model cannot be run.
pub fn run(model: &Model, tokens: &[u32]) -> Result<Reference> {
    let n = tokens.len() as u32;
    let ops = lower(model.spec(), Batch { tokens: n, past: 0, sequences: 1, logits: n })?;
    let eps = f64::from(model.spec().norm_eps);
    let vector = |id: TensorId| Array1::from_iter(model.vector(id).iter().map(|x| f64::from(*x)));
    let mut slots: HashMap<Slot, Array2<f64>> = HashMap::new();
    let mut routing: Vec<LayerRouting> = Vec::new();
    for op in ops {
        match op.kind {
            OpKind::Embed { table } => {
                let table = model.matrix(table);
                let mut hidden = Array2::zeros((tokens.len(), table.cols));
                for (t, token) in tokens.iter().enumerate() {
                    hidden.row_mut(t).assign(&row(&table, *token as usize));
                }
                slots.insert(Slot::Hidden, hidden);
            }
            OpKind::RmsNorm { weight, input, output } => {
                let mut x = slots[&input].clone();
                for mut row in x.rows_mut() {
                    let normed = rms_norm(&row.view(), &vector(weight), eps);
                    row.assign(&normed);
                }
                slots.insert(output, x);
            }
            OpKind::LayerNorm { weight, bias, input, output } => {
                let mut x = slots[&input].clone();
                for mut row in x.rows_mut() {
                    let mean = row.mean().expect("not empty");
                    row -= mean;
                    let normed = rms_norm(&row.view(), &vector(weight), eps) + vector(bias);
                    row.assign(&normed);
                }
                slots.insert(output, x);
            }
            OpKind::Scale { slot, factor } => {
                *slots.get_mut(&slot).expect("written before") *= f64::from(factor);
            }
            OpKind::Temper(t) => {
                for (p, mut row) in slots.get_mut(&Slot::Q).expect("written before").rows_mut().into_iter().enumerate() {
                    let steps = ((p + 1) as f64 / f64::from(t.period)).floor();
                    row *= 1.0 + f64::from(t.scale) * (1.0 + steps).ln();
                }
            }
            OpKind::Logits { weight, bias, factor, softcap } => {
                let mut y = matmul(&model.matrix(weight), &slots[&Slot::Normed]);
                if let Some(bias) = bias {
                    y += &vector(bias);
                }
                y.mapv_inplace(|x| capped(f64::from(factor) * x, softcap));
                slots.insert(Slot::Logits, y);
            }
            OpKind::MatMul { weight, bias, input, output } => {
                let mut y = matmul(&model.matrix(weight), &slots[&input]);
                if let Some(bias) = bias {
                    y += &vector(bias);
                }
                slots.insert(output, y);
            }
            OpKind::QkNorm { weight, slot, span, head_dim } => {
                let x = slots.get_mut(&slot).expect("written before");
                let span = if span == QkNorm::FullWidth { x.ncols() } else { head_dim as usize };
                let weight = weight.map_or_else(|| Array1::ones(span), vector);
                for mut row in x.rows_mut() {
                    for start in (0..row.len()).step_by(span) {
                        let mut part = row.slice_mut(s![start..start + span]);
                        let normed = rms_norm(&part.view(), &weight, eps);
                        part.assign(&normed);
                    }
                }
            }
            OpKind::Rope { slot, head_dim, rope } => {
                rotate(slots.get_mut(&slot).expect("written before"), head_dim as usize, &rope, tokens.len());
            }
            OpKind::Attention { gqa, sinks } => {
                let sinks = sinks.map(|s| vector(s).to_vec());
                let attended = attention(&gqa, sinks.as_deref(), &slots[&Slot::Q], &slots[&Slot::K], &slots[&Slot::V]);
                slots.insert(Slot::Attended, attended);
            }
            OpKind::LatentAttention { mla, kv_norm, k_b, v_b } => {
                let (k_b, v_b) = (model.matrix(k_b), model.matrix(v_b));
                let (q, latent) = (&slots[&Slot::Q], &slots[&Slot::KvLatent]);
                let attended = latent_attention(&mla, q, latent, (&vector(kv_norm), eps), &k_b, &v_b);
                slots.insert(Slot::Attended, attended);
            }
            OpKind::SplitGate { head_dim } => {
                let both = slots[&Slot::Q].clone();
                let part = |which: usize| {
                    let of_part: Vec<usize> = (0..both.ncols()).filter(|c| c / head_dim as usize % 2 == which).collect();
                    both.select(Axis(1), &of_part)
                };
                slots.insert(Slot::Q, part(0));
                slots.insert(Slot::Gate, part(1));
            }
            OpKind::GateAttended => {
                let gate = slots[&Slot::Gate].mapv(|g| 1.0 / (1.0 + (-g).exp()));
                *slots.get_mut(&Slot::Attended).expect("written before") *= &gate;
            }
            OpKind::DeltaRule { delta, conv, dt_bias, decay, norm } => {
                let attended = delta_rule(&delta, &slots, [conv, dt_bias, decay, norm].map(vector), eps);
                slots.insert(Slot::Attended, attended);
            }
            OpKind::AddDelta { factor } => {
                let delta = &slots[&Slot::Delta] * f64::from(factor);
                *slots.get_mut(&Slot::Hidden).expect("written before") += &delta;
            }
            OpKind::InnerResidual => {
                let given = slots[&Slot::Normed].clone();
                *slots.get_mut(&Slot::Delta).expect("written before") += &given;
            }
            OpKind::NextIteration => {
                let result = slots[&Slot::Delta].clone();
                slots.insert(Slot::Normed, result);
            }
            OpKind::Route { weight, bias, selection_bias, moe, iteration } => {
                let experts = moe.num_experts as usize;
                let mine = iteration as usize * experts..(iteration as usize + 1) * experts;
                let mut scores = matmul(&model.matrix(weight).rows(mine.start, mine.end), &slots[&Slot::Normed]);
                if let Some(bias) = bias {
                    scores += &vector(bias).slice(s![mine.clone()]);
                }
                let bias = selection_bias.map(|b| vector(b).slice(s![mine.clone()]).to_owned());
                let tokens = scores.rows().into_iter().map(|r| choose(&moe, &r, bias.as_ref())).collect();
                routing.push(LayerRouting { layer: op.layer.unwrap_or(0), tokens });
            }
            OpKind::RoutedExperts { gate, up, down, biases, moe } => {
                let x = &slots[&Slot::Normed];
                let chosen = &routing.last().expect("routed before").tokens;
                let mut delta = Array2::zeros(x.dim());
                for expert in 0..moe.num_experts {
                    let mine: Vec<(usize, f64)> = chosen
                        .iter()
                        .enumerate()
                        .flat_map(|(t, c)| c.iter().filter(|(e, _)| *e == expert).map(move |(_, w)| (t, *w)))
                        .collect();
                    let mut inputs = x.select(Axis(0), &mine.iter().map(|(t, _)| *t).collect::<Vec<_>>());
                    let mut mine = mine;
                    if moe.weights_on_input {
                        for (mut row, (_, w)) in inputs.rows_mut().into_iter().zip(&mut mine) {
                            row *= std::mem::replace(w, 1.0);
                        }
                    }
                    let e = model.expert([gate, up, down], expert);
                    let bias = |which: usize, rows: usize| match biases {
                        Some(b) => Array1::from_iter(
                            model.vector(b[which])[expert as usize * rows..][..rows].iter().map(|x| f64::from(*x)),
                        ),
                        None => Array1::zeros(rows),
                    };
                    let gate = matmul(&e.gate, &inputs) + bias(0, e.gate.rows);
                    let up = matmul(&e.up, &inputs) + bias(1, e.up.rows);
                    let inner = ndarray::Zip::from(&gate).and(&up).map_collect(|g, u| activate(moe.activation, *g, *u));
                    let outputs = matmul(&e.down, &inner) + bias(2, e.down.rows);
                    for ((t, w), out) in mine.iter().zip(outputs.rows()) {
                        delta.row_mut(*t).scaled_add(*w, &out);
                    }
                }
                slots.insert(Slot::Delta, delta);
            }
            OpKind::Ffn { gate, up, down, sigmoid_gate, accumulate } => {
                let x = &slots[&Slot::Normed];
                let mut out = swiglu(&model.matrix(gate), &model.matrix(up), &model.matrix(down), x);
                if let Some(gate) = sigmoid_gate {
                    let gate = vector(gate);
                    for (mut row, x) in out.rows_mut().into_iter().zip(x.rows()) {
                        row *= 1.0 / (1.0 + (-x.dot(&gate)).exp());
                    }
                }
                if accumulate {
                    out += &slots[&Slot::Delta];
                }
                slots.insert(Slot::Delta, out);
            }
            OpKind::SelectRows => unreachable!("the logits of every position are wanted"),
        }
    }
    let logits = slots.remove(&Slot::Logits).expect("the list ends with the logits");
    Ok(Reference { logits, routing })
}

fn row(m: &Matrix<'_>, r: usize) -> Array1<f64> {
    let mut values = vec![0.0; m.cols];
    m.dequantize_row(r, &mut values);
    values.into_iter().map(f64::from).collect()
}

/// `x * m^T`: `[tokens, cols]` to `[tokens, rows]`.
fn matmul(m: &Matrix<'_>, x: &Array2<f64>) -> Array2<f64> {
    let mut y = Array2::zeros((x.nrows(), m.rows));
    for r in 0..m.rows {
        y.column_mut(r).assign(&x.dot(&row(m, r)));
    }
    y
}

fn rms_norm(x: &ArrayView1<'_, f64>, weight: &Array1<f64>, eps: f64) -> Array1<f64> {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    x * weight / (mean + eps).sqrt()
}

fn rotate(x: &mut Array2<f64>, head_dim: usize, rope: &Rope, context: usize) {
    let (frequencies, magnitude) = frequencies(rope, context);
    let dim = rope.rotary_dim as usize;
    for (position, mut row) in x.rows_mut().into_iter().enumerate() {
        for head in (0..row.len()).step_by(head_dim) {
            for (pair, frequency) in frequencies.iter().enumerate() {
                let (i, j) = match rope.pairing {
                    RopePairing::Halves => (head + pair, head + pair + dim / 2),
                    RopePairing::Interleaved => (head + 2 * pair, head + 2 * pair + 1),
                };
                let angle = position as f64 * frequency;
                let (a, b) = (magnitude * row[i], magnitude * row[j]);
                row[i] = a * angle.cos() - b * angle.sin();
                row[j] = b * angle.cos() + a * angle.sin();
            }
        }
    }
}

/// Every token sees itself and those before it, as far as window and chunk reach.
pub(super) fn attention(a: &Gqa, sinks: Option<&[f64]>, q: &Array2<f64>, k: &Array2<f64>, v: &Array2<f64>) -> Array2<f64> {
    let head_dim = a.head_dim as usize;
    let group = (a.num_heads / a.num_kv_heads) as usize;
    let window = a.sliding_window.map_or(usize::MAX, |w| w as usize);
    let scale = a.scale.map_or_else(|| 1.0 / (head_dim as f64).sqrt(), f64::from);
    let mut out = Array2::zeros(q.dim());
    for t in 0..q.nrows() {
        for head in 0..a.num_heads as usize {
            let columns = |h: usize| s![h * head_dim..(h + 1) * head_dim];
            let query = q.row(t);
            let query = query.slice(columns(head));
            let in_chunk = |p: usize| a.chunk.is_none_or(|c| p / c as usize == t / c as usize);
            let seen: Vec<usize> = (0..=t).filter(|p| t - p < window && in_chunk(*p)).collect();
            let score = |p: &usize| capped(query.dot(&k.row(*p).slice(columns(head / group))) * scale, a.softcap);
            let mut weights: Vec<f64> = seen.iter().map(score).chain(sinks.map(|s| s[head])).collect();
            softmax(&mut weights);
            for (p, w) in seen.iter().zip(weights) {
                out.row_mut(t).slice_mut(columns(head)).scaled_add(w, &v.row(*p).slice(columns(head / group)));
            }
        }
    }
    out
}

/// Latent attention as its paper defines it: keys and values are expanded for every head and position, then attended to.
pub(super) fn latent_attention(
    a: &Mla,
    q: &Array2<f64>,      // [tokens, num_heads * (nope + rotary)]
    latent: &Array2<f64>, // [tokens, rank + rotary]
    (kv_norm, eps): (&Array1<f64>, f64),
    k_b: &Matrix<'_>, // [num_heads * rank, nope]
    v_b: &Matrix<'_>, // [num_heads * v_head_dim, rank]
) -> Array2<f64> {
    let (rank, nope, rotary) = (a.kv_lora_rank as usize, a.qk_nope_head_dim as usize, a.qk_rope_head_dim as usize);
    let (qk, v_dim, tokens) = (nope + rotary, a.v_head_dim as usize, q.nrows());
    let scale = a.scale.map_or_else(|| 1.0 / (qk as f64).sqrt(), f64::from);
    let mut rotated_key = latent.slice(s![.., rank..]).to_owned();
    rotate(&mut rotated_key, rotary, &a.rope, tokens);
    let mut compressed = latent.slice(s![.., ..rank]).to_owned();
    for mut row in compressed.rows_mut() {
        let normed = rms_norm(&row.view(), kv_norm, eps);
        row.assign(&normed);
    }
    let mut out = Array2::zeros((tokens, a.num_heads as usize * v_dim));
    for head in 0..a.num_heads as usize {
        // [rank, nope]: the transposed expansion.
        let mut expand_key = Array2::zeros((rank, nope));
        for r in 0..rank {
            expand_key.row_mut(r).assign(&row(k_b, head * rank + r));
        }
        let keys = compressed.dot(&expand_key);
        let values = matmul(&v_b.rows(head * v_dim, (head + 1) * v_dim), &compressed);
        let mut rotated_query = q.slice(s![.., head * qk + nope..(head + 1) * qk]).to_owned();
        rotate(&mut rotated_query, rotary, &a.rope, tokens);
        for t in 0..tokens {
            let query = q.slice(s![t, head * qk..head * qk + nope]);
            let score = |p: usize| query.dot(&keys.row(p)) + rotated_query.row(t).dot(&rotated_key.row(p));
            let mut weights: Vec<f64> = (0..=t).map(|p| score(p) * scale).collect();
            softmax(&mut weights);
            for (p, w) in weights.into_iter().enumerate() {
                out.slice_mut(s![t, head * v_dim..(head + 1) * v_dim]).scaled_add(w, &values.row(p));
            }
        }
    }
    out
}

/// Gated delta rule, one value head and one position after the other, with the state as a matrix.
fn delta_rule(
    a: &DeltaNet,
    slots: &HashMap<Slot, Array2<f64>>,
    [conv, dt_bias, decay, norm]: [Array1<f64>; 4],
    eps: f64,
) -> Array2<f64> {
    let (mixed, gate) = (&slots[&Slot::Q], &slots[&Slot::Gate]);
    let (tokens, kernel) = (mixed.nrows(), a.conv_kernel as usize);
    let (keys, values) = (a.num_key_heads as usize, a.num_value_heads as usize);
    let (key_dim, value_dim) = (a.key_head_dim as usize, a.value_head_dim as usize);
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let convolved = Array2::from_shape_fn(mixed.dim(), |(t, c)| {
        let at = |i: usize| (t + i + 1).checked_sub(kernel).map_or(0.0, |p| mixed[[p, c]] * conv[c * kernel + i]);
        silu((0..kernel).map(at).sum())
    });
    let unit = |x: ArrayView1<'_, f64>| &x / (x.dot(&x) + 1e-6).sqrt();
    let mut out = Array2::zeros((tokens, values * value_dim));
    for head in 0..values {
        let key_head = match a.value_heads {
            ValueHeads::Grouped => head / (values / keys),
            ValueHeads::Tiled => head % keys,
        };
        let mut state: Array2<f64> = Array2::zeros((key_dim, value_dim));
        for t in 0..tokens {
            let (beta, alpha) = if a.fused_gates {
                // [keys, 2, values per key]
                let per_key = values / keys;
                let at = |which: usize| slots[&Slot::Beta][[t, (head / per_key * 2 + which) * per_key + head % per_key]];
                (at(0), at(1))
            } else {
                (slots[&Slot::Beta][[t, head]], slots[&Slot::Alpha][[t, head]])
            };
            let part = |start: usize, width: usize| convolved.slice(s![t, start..start + width]);
            let q = unit(part(key_head * key_dim, key_dim)) / (key_dim as f64).sqrt();
            let k = unit(part((keys + key_head) * key_dim, key_dim));
            let v = part(2 * keys * key_dim + head * value_dim, value_dim);
            state *= (decay[head] * (1.0 + (alpha + dt_bias[head]).exp()).ln()).exp();
            let correction = (&v - &k.dot(&state)) / (1.0 + (-beta).exp());
            for (i, k) in k.iter().enumerate() {
                state.row_mut(i).scaled_add(*k, &correction);
            }
            let columns = s![t, head * value_dim..(head + 1) * value_dim];
            let normed = rms_norm(&q.dot(&state).view(), &norm, eps);
            out.slice_mut(columns).assign(&(normed * gate.slice(columns).mapv(silu)));
        }
    }
    out
}

fn softmax(x: &mut [f64]) {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|v| (v - max).exp()).sum();
    x.iter_mut().for_each(|v| *v = (*v - max).exp() / sum);
}

/// Phi-3.5's rule, line by line as in transformers: mask what is far from the best, softmax, take the best; again without it.
fn sparse_mixer(logits: &ArrayView1<'_, f64>) -> Vec<(u32, f64)> {
    let mut left = logits.to_vec();
    let mut chosen = Vec::new();
    for _ in 0..2 {
        let threshold = left.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let best = left.iter().position(|x| *x == threshold).expect("not empty");
        let far = |x: f64| (threshold - x) / x.abs().max(threshold) > 0.02;
        let mut gates: Vec<f64> = left.iter().zip(logits).map(|(l, x)| if far(*x) { f64::NEG_INFINITY } else { *l }).collect();
        softmax(&mut gates);
        chosen.push((best as u32, gates[best]));
        left[best] = f64::NEG_INFINITY;
    }
    chosen.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    chosen
}

/// The routing rule, one sentence of its description after the other.
pub(super) fn choose(moe: &Moe, logits: &ArrayView1<'_, f64>, bias: Option<&Array1<f64>>) -> Vec<(u32, f64)> {
    let r = &moe.router;
    if r.score == RouterScore::SparseMixer {
        return sparse_mixer(logits);
    }
    let mut p = logits.to_vec();
    match r.score {
        RouterScore::Softmax => softmax(&mut p),
        RouterScore::Sigmoid => p.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
        RouterScore::SqrtSoftplus | RouterScore::SparseMixer => unreachable!("refused, or done above"),
    }
    let worth: Vec<f64> = (0..p.len()).map(|e| p[e] + bias.map_or(0.0, |b| b[e])).collect();
    let descending = |x: &[f64]| {
        let mut order: Vec<usize> = (0..x.len()).collect();
        order.sort_by(|a, b| x[*b].total_cmp(&x[*a]).then(a.cmp(b)));
        order
    };
    let mut candidates: Vec<usize> = (0..p.len()).collect();
    if let Some((groups, kept)) = r.groups {
        let size = p.len() / groups as usize;
        let group_worth = |g: usize| {
            let mut members = worth[g * size..(g + 1) * size].to_vec();
            members.sort_by(|a, b| b.total_cmp(a));
            match r.group_score {
                GroupScore::Max => members[0],
                GroupScore::Top2Sum => members.iter().take(2).sum(),
            }
        };
        let group_worths: Vec<f64> = (0..groups as usize).map(group_worth).collect();
        let kept = &descending(&group_worths)[..kept as usize];
        candidates.retain(|e| kept.contains(&(e / size)));
    }
    let mut order = descending(&worth);
    order.retain(|e| candidates.contains(e));
    order.truncate(moe.experts_per_token as usize);
    // As long as what came before was not enough, and always the first.
    let before = |i: usize| order[..i].iter().map(|e| p[*e]).sum::<f64>();
    let wanted = |i: usize| match r.selection {
        Selection::TopK => true,
        Selection::TopP { p } => before(i) < f64::from(p),
        Selection::Threshold { min_score } => p[order[i]] >= f64::from(min_score),
    };
    let count = (1..order.len()).find(|i| !wanted(*i)).unwrap_or(order.len());
    order.truncate(count);
    let sum: f64 = if r.normalize_topk { order.iter().map(|e| p[*e]).sum() } else { 1.0 };
    let mut chosen: Vec<(u32, f64)> = order.into_iter().map(|e| (e as u32, p[e] / sum * f64::from(r.scale))).collect();
    chosen.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    chosen
}

/// `cap * tanh(x / cap)`, if there is a cap.
fn capped(x: f64, cap: Option<f32>) -> f64 {
    cap.map_or(x, |cap| f64::from(cap) * (x / f64::from(cap)).tanh())
}

/// What goes into an expert's down projection, from its gate and up projections.
fn activate(activation: Activation, gate: f64, up: f64) -> f64 {
    match activation {
        Activation::Silu => gate / (1.0 + (-gate).exp()) * up,
        Activation::ClampedSwiglu { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let gate = gate.min(limit);
            gate / (1.0 + (-alpha * gate).exp()) * (up.clamp(-limit, limit) + 1.0)
        }
    }
}

fn swiglu(gate: &Matrix<'_>, up: &Matrix<'_>, down: &Matrix<'_>, x: &Array2<f64>) -> Array2<f64> {
    let silu = matmul(gate, x).mapv_into(|g| g / (1.0 + (-g).exp()));
    matmul(down, &(silu * matmul(up, x)))
}
