//! Matrix products over the threads: one parallel region for any number of products.
//!
//! Regions are cut into pieces of weight rows of about equal cost, several per thread, so that a thread that was held up
//! delays the others little. A row's result does not depend on how the rows were cut.

use super::model::Matrix;
use super::threads::Threads;
use crate::kernels::{ActivationBuf, CpuKernels, GemmScratch};
use ndarray::{ArrayViewMut2, Axis};
use rayon::prelude::*;
use tierwise_cost::quant::QuantFormat;

/// Pieces per thread and region.
const PIECES_PER_THREAD: usize = 4;
/// Pieces are whole multiples of this many rows, so that kernels can work in tiles.
const ROW_STEP: usize = 16;
/// Regions below this cost (weight bytes times tokens) stay on the calling thread: waking others takes longer.
const SERIAL_COST: usize = 32 << 10;
/// Activations below this many elements are prepared on the calling thread.
const SERIAL_ELEMENTS: usize = 16 << 10;

/// Working memory of one thread.
#[derive(Debug, Default)]
pub struct MatmulScratch {
    /// A piece's results as kernels write them: `[rows of the piece, tokens]`.
    out: Vec<f32>,
    gemm: GemmScratch,
}

/// `out = input * weight^T (+ bias)`.
pub struct Product<'a> {
    /// `[rows, cols]`
    pub weight: Matrix<'a>,
    /// `[rows]`
    pub bias: Option<&'a [f32]>,
    /// `[any, cols]`, prepared for the weight's format.
    pub input: &'a ActivationBuf,
    /// Which rows of `input`.
    pub tokens: &'a [u32],
    /// `[tokens, rows]`
    pub out: &'a mut [f32],
}

struct Piece<'a> {
    weight: Matrix<'a>,
    bias: Option<&'a [f32]>,
    input: &'a ActivationBuf,
    tokens: &'a [u32],
    /// `[tokens, weight.rows]`: a range of columns of the product's `out`.
    out: ArrayViewMut2<'a, f32>,
}

/// Computes all `products` in one parallel region.
pub fn run_products(threads: &Threads, products: Vec<Product<'_>>) {
    let cost = |p: &Product<'_>| p.weight.bytes.len() * p.tokens.len();
    let total: usize = products.iter().map(cost).sum();
    let serial = threads.count() == 1 || total < SERIAL_COST;
    let piece_cost = total / (threads.count() * PIECES_PER_THREAD) + 1;
    let mut pieces = Vec::with_capacity(products.len() + threads.count() * PIECES_PER_THREAD);
    for p in products {
        let (rows, tokens) = (p.weight.rows, p.tokens.len());
        let step = if serial { rows } else { (rows * piece_cost / cost(&p).max(1)).next_multiple_of(ROW_STEP).max(ROW_STEP) };
        let mut out = ArrayViewMut2::from_shape((tokens, rows), p.out).expect("out is [tokens, rows]");
        let mut start = 0;
        while start < rows {
            let end = rows.min(start + step);
            let (columns, rest) = out.split_at(Axis(1), end - start);
            out = rest;
            pieces.push(Piece {
                weight: p.weight.rows(start, end),
                bias: p.bias.map(|b| &b[start..end]),
                input: p.input,
                tokens: p.tokens,
                out: columns,
            });
            start = end;
        }
    }
    if serial {
        pieces.into_iter().for_each(|p| compute(threads, p));
    } else {
        threads.for_each_near(pieces, |p| p.weight.bytes.as_ptr() as usize, |p| compute(threads, p));
    }
}

fn compute(threads: &Threads, mut p: Piece<'_>) {
    let kernels = threads.kernels();
    let (format, bytes, rows, n) = (p.weight.format, p.weight.bytes, p.weight.rows, p.tokens.len());
    if n == 1 {
        let out = p.out.as_slice_mut().expect("one row is contiguous");
        kernels.matmul_rows(format, bytes, p.weight.cols, p.input, p.tokens, out);
        if let Some(bias) = p.bias {
            out.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
        return;
    }
    threads.with_scratch(|s| {
        let MatmulScratch { out, gemm } = &mut s.matmul;
        out.resize(rows * n, 0.0);
        kernels.gemm(format, bytes, p.weight.cols, p.input, p.tokens, gemm, out);
        // In bands of one cache line of results per token, so that what is read stays in the nearest cache.
        for start in (0..rows).step_by(ROW_STEP) {
            let end = rows.min(start + ROW_STEP);
            for (t, mut row) in p.out.rows_mut().into_iter().enumerate() {
                let row = &mut row.as_slice_mut().expect("rows are contiguous")[start..end];
                for (r, x) in (start..).zip(row) {
                    *x = out[r * n + t] + p.bias.map_or(0.0, |b| b[r]);
                }
            }
        }
    });
}

/// Prepares `x` for matrices of `format`, rows in parallel when there are enough.
pub fn prepare(
    threads: &Threads,
    format: QuantFormat,
    x: &[f32], /* [tokens, cols] */
    cols: usize,
    out: &mut ActivationBuf,
) {
    prepare_rows(threads, format, x.len() / cols, cols, out, |row, kernels, to| {
        let from = &x[row * cols..(row + 1) * cols];
        kernels.quantize_activation_row(crate::quant::activation_format(format), from, to);
    });
}

/// Fills `out` with `tokens` rows by calling `fill(row, kernels, bytes)` for each.
pub fn prepare_rows(
    threads: &Threads,
    format: QuantFormat,
    tokens: usize,
    cols: usize,
    out: &mut ActivationBuf,
    fill: impl Fn(usize, &CpuKernels, &mut [u8]) + Sync,
) {
    out.reset(crate::quant::activation_format(format), tokens, cols);
    let rows = out.rows_mut().enumerate();
    if threads.count() == 1 || tokens * cols < SERIAL_ELEMENTS {
        rows.for_each(|(i, row)| fill(i, threads.kernels(), row));
    } else {
        let rows: Vec<(usize, &mut [u8])> = rows.collect();
        rows.into_par_iter()
            .with_min_len((SERIAL_ELEMENTS / 4 / cols).max(1))
            .for_each(|(i, row)| fill(i, threads.kernels(), row));
    }
}
