//! The operations of the reference back-end, as plain loops over numbers in f64.

use super::{Memory, device_error};
use crate::backend::check::row_bytes;
use crate::backend::device::View;
use crate::backend::op::{ABSENT, DeviceAttention, DeviceExperts, DeviceOp, DeviceRule, KvElement, RowGroups, TILE_ROWS};
use crate::error::Result;
use half::f16;
use tierwise_cost::model::{Activation, RopePairing};

impl Memory {
    /// Runs an operation that was checked.
    pub(super) fn run(&mut self, op: &DeviceOp) -> Result<()> {
        match *op {
            DeviceOp::Embed { table, ids, out, tokens } => {
                for (t, id) in self.integers(ids, tokens as usize).into_iter().enumerate() {
                    if id >= table.rows {
                        return Err(device_error(format!("embed: token {id} of a vocabulary of {}", table.rows)));
                    }
                    let row = self.matrix_row(&table, id)?;
                    self.store_all(out.part((t * 4 * row.len()) as u64, 4 * row.len() as u64), &row);
                }
            }
            DeviceOp::RmsNorm { x, weight, period, out, rows, width, eps } => {
                let (rows, width) = (rows as usize, width as usize);
                let weight =
                    weight.map_or_else(|| vec![1.0; period as usize * width], |w| self.floats(w, period as usize * width));
                let values = self.floats(x, rows * width);
                for (r, x) in values.chunks_exact(width).enumerate() {
                    let mean = x.iter().map(|v| v * v).sum::<f64>() / width as f64;
                    let factor = 1.0 / (mean + f64::from(eps)).sqrt();
                    for (i, v) in x.iter().enumerate() {
                        self.store(out, r * width + i, v * factor * weight[r % period as usize * width + i]);
                    }
                }
            }
            DeviceOp::LayerNorm { x, weight, bias, out, rows, width, eps } => {
                let (rows, width) = (rows as usize, width as usize);
                let (weight, bias, values) = (self.floats(weight, width), self.floats(bias, width), self.floats(x, rows * width));
                for (r, x) in values.chunks_exact(width).enumerate() {
                    let mean = x.iter().sum::<f64>() / width as f64;
                    let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / width as f64;
                    let factor = 1.0 / (variance + f64::from(eps)).sqrt();
                    for (i, v) in x.iter().enumerate() {
                        self.store(out, r * width + i, (v - mean) * factor * weight[i] + bias[i]);
                    }
                }
            }
            DeviceOp::MatMul { weight, bias, x, out, tokens } => {
                let (rows, cols) = (weight.rows as usize, weight.cols as usize);
                let (bias, x) = (self.floats_or_zeros(bias, rows), self.floats(x, tokens as usize * cols));
                for (r, bias) in bias.iter().enumerate() {
                    let w = self.matrix_row(&weight, r as u32)?;
                    for (t, x) in x.chunks_exact(cols).enumerate() {
                        self.store(out, t * rows + r, dot(&w, x) + bias);
                    }
                }
            }
            DeviceOp::HeadMatMul { weight, heads, x, x_stride, out, out_stride, tokens } => {
                let (rows, cols) = (weight.rows / heads, weight.cols as usize);
                let x = self.floats(x, (tokens * heads * x_stride) as usize);
                for h in 0..heads {
                    for r in 0..rows {
                        let w = self.matrix_row(&weight, h * rows + r)?;
                        for t in 0..tokens {
                            let from = ((t * heads + h) * x_stride) as usize;
                            self.store(out, ((t * heads + h) * out_stride + r) as usize, dot(&w, &x[from..from + cols]));
                        }
                    }
                }
            }
            DeviceOp::Rope { x, cos_sin, tokens, heads, head_stride, first, pairs, pairing } => {
                let values = self.floats(x, (tokens * heads * head_stride) as usize);
                let table = self.floats(cos_sin, (tokens * pairs * 2) as usize);
                for (row, pair) in (0..tokens * heads).flat_map(|row| (0..pairs).map(move |p| (row, p))) {
                    let (i, j) = match pairing {
                        RopePairing::Halves => (pair, pair + pairs),
                        RopePairing::Interleaved => (2 * pair, 2 * pair + 1),
                    };
                    let start = (row * head_stride + first) as usize;
                    let (a, b) = (values[start + i as usize], values[start + j as usize]);
                    let at = (row / heads * pairs + pair) as usize * 2;
                    let (cos, sin) = (table[at], table[at + 1]);
                    self.store(x, start + i as usize, a * cos - b * sin);
                    self.store(x, start + j as usize, b * cos + a * sin);
                }
            }
            DeviceOp::CopyColumns { x, x_stride, x_start, out, out_stride, out_start, rows, width } => {
                let values = self.floats(x, (rows * x_stride) as usize);
                for (r, i) in (0..rows).flat_map(|r| (0..width).map(move |i| (r, i))) {
                    let value = values[(r * x_stride + x_start + i) as usize];
                    self.store(out, (r * out_stride + out_start + i) as usize, value);
                }
            }
            DeviceOp::AppendKv { x, cache, element, tokens, width, position } => {
                let values = self.floats(x, (tokens * width) as usize);
                let first = position as usize * width as usize;
                match element {
                    KvElement::F32 => values.iter().enumerate().for_each(|(i, v)| self.store(cache, first + i, *v)),
                    KvElement::F16 => {
                        for (i, pair) in values.as_chunks::<2>().0.iter().enumerate() {
                            let [a, b] = pair.map(|v| f16::from_f32(v as f32).to_le_bytes());
                            self.set(cache, first / 2 + i, [a[0], a[1], b[0], b[1]]);
                        }
                    }
                }
            }
            DeviceOp::Attention(ref a) => self.attention(a),
            DeviceOp::Scale { x, factor, factors, rows, width } => {
                let factors = factors.map_or_else(|| vec![f64::from(factor); rows as usize], |f| self.floats(f, rows as usize));
                for (i, v) in self.floats(x, (rows * width) as usize).into_iter().enumerate() {
                    self.store(x, i, v * factors[i / width as usize]);
                }
            }
            DeviceOp::Axpy { x, y, factor, elements } => {
                let (x, old) = (self.floats(x, elements as usize), self.floats(y, elements as usize));
                x.iter().zip(old).enumerate().for_each(|(i, (x, old))| self.store(y, i, old + f64::from(factor) * x));
            }
            DeviceOp::GatedAxpy { x, input, gate, y, rows, width, cols } => {
                let (x, old) = (self.floats(x, (rows * width) as usize), self.floats(y, (rows * width) as usize));
                let (input, gate) = (self.floats(input, (rows * cols) as usize), self.floats(gate, cols as usize));
                for (r, input) in input.chunks_exact(cols as usize).enumerate() {
                    let factor = sigmoid(dot(input, &gate));
                    for i in r * width as usize..(r + 1) * width as usize {
                        self.store(y, i, old[i] + factor * x[i]);
                    }
                }
            }
            DeviceOp::Activate { gate, up, out, elements, activation } => {
                let (gate, up) = (self.floats(gate, elements as usize), self.floats(up, elements as usize));
                gate.iter().zip(up).enumerate().for_each(|(i, (g, u))| self.store(out, i, activate(activation, *g, u)));
            }
            DeviceOp::ScaleCap { x, elements, factor, softcap } => {
                for (i, v) in self.floats(x, elements as usize).into_iter().enumerate() {
                    self.store(x, i, capped(f64::from(factor) * v, softcap));
                }
            }
            DeviceOp::Route { logits, selection_bias, ids, weights, tokens, num_experts, k, rule } => {
                let logits = self.floats(logits, (tokens * num_experts) as usize);
                let bias = selection_bias.map(|b| self.floats(b, num_experts as usize));
                for (t, logits) in logits.chunks_exact(num_experts as usize).enumerate() {
                    for (c, (id, weight)) in choose(rule, logits, bias.as_deref(), k as usize).into_iter().enumerate() {
                        self.set(ids, t * k as usize + c, id.to_le_bytes());
                        self.store(weights, t * k as usize + c, weight);
                    }
                }
            }
            DeviceOp::Experts { ref experts, x, ids, rows_per_input, inner, out, rows, groups } => {
                let ids = self.integers(ids, rows as usize);
                let x = self.floats(x, rows.div_ceil(rows_per_input) as usize * experts.hidden as usize);
                let table = self.integers(experts.table, 3 * experts.num_experts as usize);
                if let Some(groups) = groups {
                    self.check_groups(&groups, &ids, &table)?;
                }
                for (r, id) in ids.into_iter().enumerate() {
                    let Some(starts) = table.as_chunks::<3>().0.get(id as usize).filter(|s| s[0] != ABSENT) else { continue };
                    let input = r / rows_per_input as usize * experts.hidden as usize;
                    self.expert(experts, (id, *starts), &x[input..input + experts.hidden as usize], r, (inner, out))?;
                }
            }
            DeviceOp::Combine { x, weights, y, tokens, k, width, accumulate } => {
                let (k, width) = (k as usize, width as usize);
                let (x, weights) = (self.floats(x, tokens as usize * k * width), self.floats(weights, tokens as usize * k));
                let old = if accumulate { self.floats(y, tokens as usize * width) } else { vec![0.0; tokens as usize * width] };
                for (i, old) in old.into_iter().enumerate() {
                    let (t, column) = (i / width, i % width);
                    let sum: f64 = (t * k..(t + 1) * k).map(|row| weights[row] * x[row * width + column]).sum();
                    self.store(y, i, old + sum);
                }
            }
        }
        Ok(())
    }

    /// One row through one expert.
    fn expert(
        &mut self,
        e: &DeviceExperts,
        (id, starts): (u32, [u32; 3]),
        x: &[f64], // [hidden]
        row: usize,
        (inner, out): (View, View),
    ) -> Result<()> {
        let starts = starts.map(|s| u64::from(s) * 16);
        let size = self.blocks[e.buffer.0 as usize].len() as u64;
        for (which, (start, cols, rows)) in
            [(starts[0], e.hidden, e.inner_size), (starts[1], e.hidden, e.inner_size), (starts[2], e.inner_size, e.hidden)]
                .iter()
                .enumerate()
        {
            let end = start + row_bytes(e.formats[which], *cols)? * u64::from(*rows);
            if end > size {
                return Err(device_error(format!("experts: expert {id} ends at byte {end} of a block of {size}")));
            }
        }
        let (inner_size, hidden) = (e.inner_size as usize, e.hidden as usize);
        let bias = |memory: &Self, which: usize, r: usize, rows: usize| match e.biases {
            Some(b) => memory.floats(b[which].part(4 * (id as usize * rows + r) as u64, 4), 1)[0],
            None => 0.0,
        };
        for r in 0..inner_size {
            let gate =
                dot(&self.weight_row((e.buffer, starts[0]), e.formats[0], e.hidden, r as u32)?, x) + bias(self, 0, r, inner_size);
            let up =
                dot(&self.weight_row((e.buffer, starts[1]), e.formats[1], e.hidden, r as u32)?, x) + bias(self, 1, r, inner_size);
            self.store(inner, row * inner_size + r, activate(e.activation, gate, up));
        }
        let activated = self.floats(inner.part(4 * (row * inner_size) as u64, 4 * inner_size as u64), inner_size);
        for r in 0..hidden {
            let w = self.weight_row((e.buffer, starts[2]), e.formats[2], e.inner_size, r as u32)?;
            let bias = bias(self, 2, r, hidden);
            self.store(out, row * hidden + r, dot(&w, &activated) + bias);
        }
        Ok(())
    }

    /// Whether groups say the same as ids: devices go by the groups alone.
    fn check_groups(&self, groups: &RowGroups, ids: &[u32], table: &[u32]) -> Result<()> {
        let wrong = |e: String| Err(device_error(format!("experts: row groups that contradict the rows' experts: {e}")));
        let order = self.integers(groups.order, (groups.order.bytes / 4) as usize);
        let mut seen = vec![false; ids.len()];
        for [expert, first, rows] in self.integers(groups.tiles, 3 * groups.num_tiles as usize).as_chunks::<3>().0 {
            let Some(places) = order.get(*first as usize..(first + rows) as usize).filter(|_| *rows <= TILE_ROWS) else {
                return wrong(format!("a tile of {rows} rows from place {first} on"));
            };
            for row in places {
                if ids.get(*row as usize) != Some(expert) || std::mem::replace(&mut seen[*row as usize], true) {
                    return wrong(format!("row {row} in a tile of expert {expert}"));
                }
            }
        }
        let here = |id: u32| table.get(3 * id as usize).is_some_and(|s| *s != ABSENT);
        match ids.iter().zip(seen).position(|(id, seen)| here(*id) && !seen) {
            Some(row) => wrong(format!("row {row} is in no tile")),
            None => Ok(()),
        }
    }

    /// `count` elements of the cache from element `first` on.
    fn cached(&self, cache: View, element: KvElement, first: usize, count: usize) -> Vec<f64> {
        let bytes = self.bytes(cache);
        match element {
            KvElement::F32 => bytes[4 * first..4 * (first + count)]
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f64::from(f32::from_le_bytes(*b)))
                .collect(),
            KvElement::F16 => {
                bytes[2 * first..2 * (first + count)].as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f64()).collect()
            }
        }
    }

    fn attention(&mut self, a: &DeviceAttention) {
        let [tokens, past, heads, kv_heads] = [a.tokens, a.past, a.heads, a.kv_heads].map(|n| n as usize);
        let [key_dim, value_dim, value_stride] = [a.key_dim, a.value_dim, a.value_stride].map(|n| n as usize);
        let queries = self.floats(a.q, tokens * heads * key_dim);
        let sinks = a.sinks.map(|s| self.floats(s, heads));
        for (t, head) in (0..tokens).flat_map(|t| (0..heads).map(move |h| (t, h))) {
            let row = t * heads + head;
            let at = past + t;
            let in_window = |p: usize| a.window.is_none_or(|w| at - p < w as usize);
            let in_chunk = |p: usize| a.chunk.is_none_or(|c| p / c as usize == at / c as usize);
            let seen: Vec<usize> = (0..=at).filter(|p| in_window(*p) && in_chunk(*p)).collect();
            let kv_head = head / (heads / kv_heads);
            let q = &queries[row * key_dim..(row + 1) * key_dim];
            let score = |p: &usize| {
                let key = self.cached(a.keys, a.element, (p * kv_heads + kv_head) * key_dim, key_dim);
                capped(dot(q, &key) * f64::from(a.scale), a.softcap)
            };
            let mut weights: Vec<f64> = seen.iter().map(score).chain(sinks.as_ref().map(|s| s[head])).collect();
            softmax(&mut weights);
            let mut sum = vec![0.0; value_dim];
            for (p, w) in seen.iter().zip(weights) {
                let value = self.cached(a.values, a.element, (p * kv_heads + kv_head) * value_stride, value_dim);
                sum.iter_mut().zip(value).for_each(|(s, v)| *s += w * v);
            }
            sum.iter().enumerate().for_each(|(i, v)| self.store(a.out, row * value_dim + i, *v));
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softmax(x: &mut [f64]) {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|v| (v - max).exp()).sum();
    x.iter_mut().for_each(|v| *v = (*v - max).exp() / sum);
}

fn capped(x: f64, cap: Option<f32>) -> f64 {
    cap.map_or(x, |cap| f64::from(cap) * (x / f64::from(cap)).tanh())
}

fn activate(activation: Activation, gate: f64, up: f64) -> f64 {
    match activation {
        Activation::Silu => gate * sigmoid(gate) * up,
        Activation::ClampedSwiglu { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let gate = gate.min(limit);
            gate * sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1.0)
        }
    }
}

/// The chosen experts and their weights, heaviest first.
fn choose(rule: DeviceRule, logits: &[f64], bias: Option<&[f64]>, k: usize) -> Vec<(u32, f64)> {
    let mut scores = logits.to_vec();
    if rule.sigmoid {
        scores.iter_mut().for_each(|s| *s = sigmoid(*s));
    } else if !rule.softmax_after_topk {
        softmax(&mut scores);
    }
    let worth = |e: usize| bias.map_or(logits[e], |b| scores[e] + b[e]);
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| worth(*b).total_cmp(&worth(*a)).then(a.cmp(b)));
    order.truncate(k);
    let mut weights: Vec<f64> = order.iter().map(|e| scores[*e]).collect();
    if rule.softmax_after_topk && !rule.sigmoid {
        softmax(&mut weights);
    }
    if rule.normalize {
        // The same guard against a sum of nothing as on the host.
        let sum = weights.iter().sum::<f64>() + 1e-20;
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    let mut chosen: Vec<(u32, f64)> = order.iter().zip(weights).map(|(e, w)| (*e as u32, w * f64::from(rule.scale))).collect();
    if bias.is_some() {
        chosen.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    }
    chosen
}
