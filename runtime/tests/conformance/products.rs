//! Embedding, matrix products, products per head.

use super::*;
use tierwise_runtime::backend::op::DeviceMatrix;

fn view_matrix(format: QuantFormat, rows: usize, cols: usize, view: View) -> DeviceMatrix {
    DeviceMatrix { format, rows: rows as u32, cols: cols as u32, view }
}

/// Bounds of `out[t, r] = w[r] * x[t]`: `cols` additions and a product per term round once each, relative to the terms' magnitudes.
pub fn product_bounds(w: &[f32], x: &[f32], cols: usize, many: bool) -> Vec<(f64, f64)> {
    let mut bounds = Vec::new();
    for x in x.chunks_exact(cols) {
        for w in w.chunks_exact(cols) {
            let magnitude: f64 = w.iter().zip(x).map(|(w, x)| (f64::from(*w) * f64::from(*x)).abs()).sum();
            bounds.push(((cols + 8) as f64 * UNIT * magnitude, if many { UNIT_BF16 * magnitude } else { 0.0 }));
        }
    }
    bounds
}

pub fn embeddings(format: QuantFormat) -> Vec<Case> {
    [(7, 3, vec![6, 0, 3, 3, 5]), (3, 1, vec![2])]
        .into_iter()
        .map(|(rows, blocks, ids)| {
            let cols = cols_of(format, blocks);
            let table = matrix(format, rows, cols, &mut Random::new(3));
            let tokens = ids.len() as u32;
            Case {
                name: format!("embed {format} {rows} x {cols}, {tokens} tokens"),
                blocks: vec![table.bytes, words(&ids), zeros(ids.len() * cols)],
                ops: Box::new(move |v| {
                    vec![DeviceOp::Embed { table: view_matrix(format, rows, cols, v[0]), ids: v[1], out: v[2], tokens }]
                }),
                outputs: vec![(2, Bound::Absolute(vec![(4.0 * UNIT * 2.0, 0.0); ids.len() * cols]))],
            }
        })
        .collect()
}

pub fn matmul(format: QuantFormat, rows: usize, cols: usize, tokens: usize, with_bias: bool) -> Case {
    let mut random = Random::new((rows * 31 + cols * 7 + tokens) as u64);
    let weight = matrix(format, rows, cols, &mut random);
    let (x, bias) = (random.floats(tokens * cols), random.floats(rows));
    let bounds = product_bounds(&weight.decoded, &x, cols, tokens > FEW_TOKENS);
    let bounds = bounds.into_iter().map(|(a, b)| (a + UNIT, b)).collect();
    Case {
        name: format!("matmul {format} {rows} x {cols}, {tokens} tokens{}", if with_bias { ", bias" } else { "" }),
        blocks: vec![weight.bytes, bytes(&bias), bytes(&x), zeros(tokens * rows)],
        ops: Box::new(move |v| {
            let weight = view_matrix(format, rows, cols, v[0]);
            vec![DeviceOp::MatMul { weight, bias: with_bias.then_some(v[1]), x: v[2], out: v[3], tokens: tokens as u32 }]
        }),
        outputs: vec![(3, Bound::Absolute(bounds))],
    }
}

pub fn matmuls(format: QuantFormat) -> Vec<Case> {
    let (one, three) = (cols_of(format, 1), cols_of(format, 3));
    // Rows, blocks of a row and tokens that fill neither workgroups nor tiles; one token, few, many.
    [(1, one, 1), (7, three, 2), (33, three, 7), (70, one, 33), (5, three, 17), (67, three, 1)]
        .into_iter()
        .enumerate()
        .map(|(i, (rows, cols, tokens))| matmul(format, rows, cols, tokens, i % 2 == 1))
        .collect()
}

pub fn head_matmul(format: QuantFormat, (heads, rows, cols): (usize, usize, usize), tokens: usize) -> Case {
    let mut random = Random::new((heads * 5 + rows + tokens) as u64);
    let weight = matrix(format, heads * rows, cols, &mut random);
    let (x_stride, out_stride) = (cols + 6, rows + 3);
    let (x, before) = (random.floats(tokens * heads * x_stride), random.floats(tokens * heads * out_stride));
    let mut bounds = Vec::new();
    for (i, x) in x.chunks_exact(x_stride).enumerate() {
        let head = i % heads;
        let w = &weight.decoded[head * rows * cols..(head + 1) * rows * cols];
        bounds.extend(product_bounds(w, &x[..cols], cols, tokens > FEW_TOKENS));
        // What lies between the heads stays.
        bounds.extend(vec![(0.0, 0.0); out_stride - rows]);
    }
    Case {
        name: format!("head_matmul {format} {heads} x {rows} x {cols}, {tokens} tokens"),
        blocks: vec![weight.bytes, bytes(&x), bytes(&before)],
        ops: Box::new(move |v| {
            vec![DeviceOp::HeadMatMul {
                weight: view_matrix(format, heads * rows, cols, v[0]),
                heads: heads as u32,
                x: v[1],
                x_stride: x_stride as u32,
                out: v[2],
                out_stride: out_stride as u32,
                tokens: tokens as u32,
            }]
        }),
        outputs: vec![(2, Bound::Absolute(bounds))],
    }
}

pub fn head_matmuls(format: QuantFormat) -> Vec<Case> {
    let cols = cols_of(format, 2);
    vec![head_matmul(format, (3, 10, cols), 1), head_matmul(format, (2, 5, cols), 7), head_matmul(format, (3, 34, cols), 33)]
}
