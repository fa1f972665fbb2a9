//! Routed experts: tokens grouped by expert, computed wave by wave, summed in a fixed order.
//!
//! Every (token, choice) has a row of its own for its expert's output, and a token's rows are added in the order of its choices
//! (heaviest first) after the last wave. So the result depends neither on the threads nor on which experts came in which wave.

use super::matmul::{Product, run_products};
use super::model::Matrix;
use super::prepared::Prepared;
use super::route::{NO_EXPERT, Routing};
use super::threads::Threads;
use crate::kernels::{ActivationBuf, CpuKernels};
use crate::quant::activation_format;
use rayon::prelude::*;
use tierwise_cost::model::Activation;
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::engine::Demand;

/// Sums below this many elements stay on the calling thread.
const SERIAL_ELEMENTS: usize = 64 << 10;

/// Rows of gate and up that are computed together at least, when experts have one token each.
const FUSED_ROWS: usize = 64;
/// With fewer pieces than this per thread the threads would finish too unevenly.
const FUSED_PIECES_PER_THREAD: usize = 4;

/// One expert's matrices, in the memory map or in a slot.
#[derive(Debug, Clone, Copy)]
pub struct ExpertBytes<'a> {
    /// `[inner_size, hidden]`
    pub gate: Matrix<'a>,
    /// `[inner_size, hidden]`
    pub up: Matrix<'a>,
    /// `[hidden, inner_size]`
    pub down: Matrix<'a>,
}

/// Formats and sizes of a layer's experts, which are alike: with the places of the three matrices they make an expert of bytes.
#[derive(Debug, Clone)]
pub struct ExpertLayout {
    /// Format, rows, columns and bytes of gate, up and down.
    matrices: [(QuantFormat, usize, usize, usize); 3],
}

impl ExpertLayout {
    /// The layout for experts like `example`.
    pub fn new(example: &ExpertBytes<'_>) -> Self {
        Self { matrices: [example.gate, example.up, example.down].map(|m| (m.format, m.rows, m.cols, m.bytes.len())) }
    }

    /// Bytes of an expert.
    pub fn bytes(&self) -> usize {
        self.matrices.iter().map(|m| m.3).sum()
    }

    /// The expert whose gate, up and down begin at `starts` of `slot`.
    pub fn in_slot<'a>(&self, slot: &'a [u8], starts: [usize; 3]) -> ExpertBytes<'a> {
        let [gate, up, down] = [0, 1, 2].map(|i| {
            let (format, rows, cols, bytes) = self.matrices[i];
            Matrix { format, rows, cols, bytes: &slot[starts[i]..starts[i] + bytes] }
        });
        ExpertBytes { gate, up, down }
    }
}

/// What a layer's experts do beside three products.
#[derive(Debug, Clone, Copy, Default)]
pub struct ExpertExtras<'a> {
    /// Between gate and up and down.
    pub activation: Activation,
    /// Of gate, up and down: `[num_experts, inner_size]` twice, `[num_experts, hidden]`.
    pub biases: Option<[&'a [f32]; 3]>,
    /// Weights are in the input already.
    pub weights_on_input: bool,
}

impl<'a> ExpertExtras<'a> {
    /// The bias of matrix `which` (0 gate, 1 up, 2 down) of `rows` rows.
    fn bias(&self, which: usize, expert: u32, rows: usize) -> Option<&'a [f32]> {
        self.biases.map(|b| &b[which][expert as usize * rows..(expert as usize + 1) * rows])
    }
}

/// In the place of a row, for a choice that a token does not have.
const NO_ROW: u32 = u32::MAX;

/// Rows of one expert.
struct Group {
    expert: u32,
    start: usize,
    end: usize,
}

/// Working memory of a layer's routed experts.
#[derive(Default)]
pub struct ExpertBuffers {
    /// The demanded experts, ascending, with their rows.
    groups: Vec<Group>,
    /// Row of the input of each row.
    tokens: Vec<u32>,
    /// Row of each (token, choice), or [`NO_ROW`]: `[tokens, experts_per_token]`.
    row_of: Vec<u32>,
    /// `[rows, inner_size]` each.
    gate: Vec<f32>,
    up: Vec<f32>,
    /// `silu(gate) * up` as the down matrices need it: `[rows, inner_size]`.
    inner: ActivationBuf,
    /// `[rows, hidden]`
    out: Vec<f32>,
}

impl ExpertBuffers {
    /// Groups a layer's tokens by expert. With `input_per_choice` every (token, choice) has an input row of its own.
    pub fn arrange(&mut self, routing: &Routing, inner_size: usize, hidden: usize, down: QuantFormat, input_per_choice: bool) {
        let mut choices: Vec<u32> = (0..routing.experts.len() as u32).collect();
        choices.retain(|c| routing.experts[*c as usize] != NO_EXPERT);
        let rows = choices.len();
        let k = routing.experts_per_token;
        self.groups.clear();
        self.tokens.resize(rows, 0);
        self.row_of.clear();
        self.row_of.resize(routing.experts.len(), NO_ROW);
        // Stable: within an expert by token.
        choices.sort_by_key(|c| routing.experts[*c as usize]);
        for (row, choice) in choices.into_iter().enumerate() {
            self.tokens[row] = if input_per_choice { choice } else { choice / k as u32 };
            self.row_of[choice as usize] = row as u32;
            let expert = routing.experts[choice as usize];
            match self.groups.last_mut() {
                Some(g) if g.expert == expert => g.end += 1,
                _ => self.groups.push(Group { expert, start: row, end: row + 1 }),
            }
        }
        for buffer in [&mut self.gate, &mut self.up] {
            if buffer.len() < rows * inner_size {
                buffer.resize(rows * inner_size, 0.0);
            }
        }
        if self.out.len() < rows * hidden {
            self.out.resize(rows * hidden, 0.0);
        }
        self.inner.reset(activation_format(down), rows, inner_size);
    }

    /// The output of a (token, choice), counted over both; empty for a choice that there is not.
    pub fn output(&self, choice: usize, hidden: usize) -> &[f32] {
        match self.row_of[choice] {
            NO_ROW => &[],
            row => &self.out[row as usize * hidden..(row as usize + 1) * hidden],
        }
    }

    /// The place of that output, for those who compute it elsewhere.
    pub fn output_mut(&mut self, choice: usize, hidden: usize) -> &mut [f32] {
        match self.row_of[choice] {
            NO_ROW => &mut [],
            row => &mut self.out[row as usize * hidden..(row as usize + 1) * hidden],
        }
    }

    /// What `layer` asks the engine for; the step is the driver's.
    pub fn demand(&self, layer: u32, routing: &Routing, scores: Vec<(u32, u32)>) -> Demand {
        let experts = self.groups.iter().map(|g| (g.expert, (g.end - g.start) as u32)).collect();
        Demand { layer, experts, tokens: routing.num_tokens() as u32, scores, ..Demand::default() }
    }

    /// Computes the outputs of some of the demanded experts, in two parallel regions, or three where experts have many tokens.
    pub fn compute(
        &mut self,
        threads: &Threads,
        input: &Prepared,
        extras: &ExpertExtras<'_>,
        experts: &[(u32, ExpertBytes<'_>)],
    ) {
        let Some((_, first)) = experts.first() else { return };
        let (inner_size, hidden) = (first.gate.rows, first.down.rows);
        // The wave's experts in the order of the groups.
        let wave: Vec<(usize, &ExpertBytes<'_>)> = self
            .groups
            .iter()
            .enumerate()
            .filter_map(|(i, g)| experts.iter().find(|(e, _)| *e == g.expert).map(|(_, bytes)| (i, bytes)))
            .collect();

        let block = self.inner.format().block().0.max(FUSED_ROWS);
        let pieces = wave.len() * inner_size.div_ceil(block);
        let single = wave.iter().all(|(g, _)| self.groups[*g].end - self.groups[*g].start == 1);
        if single && pieces >= FUSED_PIECES_PER_THREAD * threads.count() {
            self.fused_inner(threads, input, extras, &wave, block);
        } else {
            self.inner_of_many(threads, input, extras, &wave, inner_size);
        }

        let parts = split_rows(&mut self.out, hidden, wave.iter().map(|(g, _)| &self.groups[*g]));
        let products = parts
            .into_iter()
            .zip(&wave)
            .map(|(out, (g, bytes))| {
                let tokens = &self.inner.all_tokens()[self.groups[*g].start..self.groups[*g].end];
                let bias = extras.bias(2, self.groups[*g].expert, hidden);
                Product { weight: bytes.down, bias, input: &self.inner, tokens, out }
            })
            .collect();
        run_products(threads, products);
    }

    /// Inner activations of experts with one token each: a piece takes the same rows of gate and up and encodes their product at
    /// once, so that nothing goes through memory and no thread waits between.
    fn fused_inner(
        &mut self,
        threads: &Threads,
        input: &Prepared,
        extras: &ExpertExtras<'_>,
        wave: &[(usize, &ExpertBytes<'_>)],
        block: usize,
    ) {
        let format = self.inner.format();
        let block_bytes = format.row_bytes(block).expect("whole blocks");
        let mut of_row: Vec<Option<(u32, &ExpertBytes<'_>)>> = vec![None; self.tokens.len()];
        wave.iter().for_each(|(g, bytes)| of_row[self.groups[*g].start] = Some((self.groups[*g].expert, *bytes)));
        let mut pieces = Vec::with_capacity(2 * wave.len());
        for ((row, token), bytes) in self.inner.rows_mut().zip(&self.tokens).zip(of_row) {
            let Some((id, expert)) = bytes else { continue };
            let starts = (0..expert.gate.rows).step_by(block);
            pieces.extend(
                starts.zip(row.chunks_mut(block_bytes)).map(|(start, out)| (id, expert, std::slice::from_ref(token), start, out)),
            );
        }
        let address = |piece: &(u32, &ExpertBytes<'_>, &[u32], usize, &mut [u8])| piece.1.gate.bytes.as_ptr() as usize;
        threads.for_each_near(pieces, address, |(id, expert, token, start, out)| {
            let kernels = threads.kernels();
            let rows = start..expert.gate.rows.min(start + block);
            threads.with_scratch(|s| {
                s.inner.resize(3 * block, 0.0);
                let (gate, rest) = s.inner.split_at_mut(block);
                let (up, product) = rest.split_at_mut(block);
                let [gate, up, product] = [gate, up, product].map(|x| &mut x[..rows.len()]);
                for (which, matrix, out) in [(0, expert.gate, &mut *gate), (1, expert.up, &mut *up)] {
                    let weight = matrix.rows(rows.start, rows.end).bytes;
                    kernels.matmul_rows(matrix.format, weight, matrix.cols, input.get(matrix.format), token, out);
                    if let Some(bias) = extras.bias(which, id, matrix.rows) {
                        out.iter_mut().zip(&bias[rows.start..]).for_each(|(x, b)| *x += b);
                    }
                }
                activate(kernels, extras.activation, gate, up, product);
                kernels.quantize_activation_row(format, product, out);
            });
        });
    }

    /// Inner activations of experts with any number of tokens.
    fn inner_of_many(
        &mut self,
        threads: &Threads,
        input: &Prepared,
        extras: &ExpertExtras<'_>,
        wave: &[(usize, &ExpertBytes<'_>)],
        inner_size: usize,
    ) {
        let mut products = Vec::with_capacity(2 * wave.len());
        for (out, which) in [(&mut self.gate, 0), (&mut self.up, 1)] {
            let parts = split_rows(out, inner_size, wave.iter().map(|(g, _)| &self.groups[*g]));
            for (out, (g, bytes)) in parts.into_iter().zip(wave) {
                let weight = if which == 0 { bytes.gate } else { bytes.up };
                let tokens = &self.tokens[self.groups[*g].start..self.groups[*g].end];
                let bias = extras.bias(which, self.groups[*g].expert, inner_size);
                products.push(Product { weight, bias, input: input.get(weight.format), tokens, out });
            }
        }
        run_products(threads, products);

        let format = self.inner.format();
        let mut wanted = wave.iter().map(|(g, _)| &self.groups[*g]).flat_map(|g| g.start..g.end).peekable();
        let (gate, up) = (self.gate.chunks_exact_mut(inner_size), self.up.chunks_exact_mut(inner_size));
        let all = self.inner.rows_mut().zip(gate.zip(up)).enumerate();
        let rows: Vec<_> = all.filter_map(|(i, row)| wanted.next_if_eq(&i).map(|_| row)).collect();
        let fill = |(row, (gate, up)): (&mut [u8], (&mut [f32], &mut [f32]))| {
            threads.with_scratch(|s| {
                s.inner.resize(inner_size, 0.0);
                activate(threads.kernels(), extras.activation, gate, up, &mut s.inner);
                threads.kernels().quantize_activation_row(format, &s.inner, row);
            });
        };
        if rows.len() == 1 || threads.count() == 1 {
            rows.into_iter().for_each(fill);
        } else {
            rows.into_par_iter().for_each(fill);
        }
    }

    /// `delta[t] = sum over choices of weight * output`, in the order of the choices, of those experts for which `is_mine` holds.
    pub fn combine(
        &self,
        threads: &Threads,
        routing: &Routing,
        delta: &mut [f32], // [tokens, hidden]
        hidden: usize,
        is_mine: impl Fn(u32) -> bool + Sync,
    ) {
        let k = routing.experts_per_token;
        let sum = |(t, row): (usize, &mut [f32])| {
            row.fill(0.0);
            let of_token = t * k..(t + 1) * k;
            // Choices that there are come before those that there are not.
            let rows = self.row_of[of_token.clone()].iter().filter(|row| **row != NO_ROW);
            let choices = routing.weights[of_token.clone()].iter().zip(rows);
            for ((weight, from), expert) in choices.zip(&routing.experts[of_token]) {
                if is_mine(*expert) {
                    let from = *from as usize * hidden;
                    threads.kernels().axpy_f32(*weight, &self.out[from..from + hidden], row);
                }
            }
        };
        if threads.count() == 1 || delta.len() * k < SERIAL_ELEMENTS {
            delta.chunks_exact_mut(hidden).enumerate().for_each(sum);
        } else {
            delta.par_chunks_exact_mut(hidden).enumerate().for_each(sum);
        }
    }
}

/// An input row for every choice, weighted: what experts get where weights come before them.
pub fn weighted_rows(x: &[f32] /* [tokens, width] */, width: usize, routing: &Routing, out: &mut Vec<f32>) {
    out.clear();
    for (row, weights) in x.chunks_exact(width).zip(routing.weights.chunks_exact(routing.experts_per_token)) {
        weights.iter().for_each(|w| out.extend(row.iter().map(|x| w * x)));
    }
}

/// What goes into the down projection; gate and up are used up.
fn activate(
    kernels: &CpuKernels,
    activation: Activation,
    gate: &mut [f32], // [inner_size]
    up: &mut [f32],   // [inner_size]
    out: &mut [f32],  // [inner_size]
) {
    if let Activation::ClampedSwiglu { alpha, limit } = activation {
        // g sigmoid(alpha g) (u + 1) = silu(alpha g) (u + 1) / alpha: the kernel for silu serves.
        gate.iter_mut().for_each(|g| *g = alpha * g.min(limit));
        up.iter_mut().for_each(|u| *u = (u.clamp(-limit, limit) + 1.0) / alpha);
    }
    kernels.silu_mul(gate, up, out);
}

/// The rows of each group (ascending, apart) as slices of `buffer`.
fn split_rows<'a, 'g>(buffer: &'a mut [f32], width: usize, groups: impl Iterator<Item = &'g Group>) -> Vec<&'a mut [f32]> {
    let mut rest = buffer;
    let mut taken = 0;
    groups
        .map(|g| {
            let (_, from) = std::mem::take(&mut rest).split_at_mut((g.start - taken) * width);
            let (part, after) = from.split_at_mut((g.end - g.start) * width);
            (rest, taken) = (after, g.end);
            part
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gate and up in one pass or one after the other, rows at once or in pieces: the same bytes.
    #[test]
    fn both_ways_to_inner_activations_agree() {
        const HIDDEN: usize = 256;
        let threads = Threads::new(2).expect("threads");
        for (format, inner_size) in [(QuantFormat::Q4_K, 512), (QuantFormat::Q8_0, 96), (QuantFormat::F32, 100)] {
            let matrix_bytes = format.row_bytes(HIDDEN as u64).expect("whole blocks") as usize * inner_size;
            // Bytes that are small ordinary numbers in every field of every format.
            let bytes: Vec<u8> = (0..8 * matrix_bytes).map(|i| ((i * 2_654_435_761) >> 13) as u8 & 0x0B | 0x30).collect();
            let matrix = |i: usize| Matrix {
                format,
                rows: inner_size,
                cols: HIDDEN,
                bytes: &bytes[i * matrix_bytes..(i + 1) * matrix_bytes],
            };
            let experts: Vec<ExpertBytes<'_>> =
                (0..4).map(|e| ExpertBytes { gate: matrix(2 * e), up: matrix(2 * e + 1), down: matrix(0) }).collect();
            let x: Vec<f32> = (0..HIDDEN).map(|i| (i * 37 % 101) as f32 / 1000.0 - 0.05).collect();
            let mut input = Prepared::default();
            input.ensure(&threads, format, &x, HIDDEN);
            let routing = Routing { experts: vec![2, 0, 3], weights: vec![0.5, 0.3, 0.2], experts_per_token: 3 };
            let bias: Vec<f32> = (0..4 * inner_size).map(|i| (i * 29 % 83) as f32 / 50.0 - 0.8).collect();
            let biased = ExpertExtras {
                activation: Activation::ClampedSwiglu { alpha: 1.7, limit: 0.9 },
                biases: Some([&bias, &bias, &[]]),
                weights_on_input: false,
            };
            let inner = |fused: bool, extras: &ExpertExtras<'_>| {
                let mut buffers = ExpertBuffers::default();
                buffers.arrange(&routing, inner_size, HIDDEN, format, false);
                // Not all of the groups, as in a wave of some.
                let wave = [(0, &experts[0]), (2, &experts[3])];
                threads.pool().install(|| {
                    if fused {
                        buffers.fused_inner(&threads, &input, extras, &wave, buffers.inner.format().block().0.max(FUSED_ROWS));
                    } else {
                        buffers.inner_of_many(&threads, &input, extras, &wave, inner_size);
                    }
                });
                [0, 2].map(|row| buffers.inner.row(row).to_vec())
            };
            for extras in [ExpertExtras::default(), biased] {
                let [first, second] = inner(true, &extras);
                assert!(first != second && first.iter().any(|b| *b != 0), "{format}: nothing was computed");
                assert_eq!(inner(false, &extras), [first, second], "{format}");
            }
        }
    }
}
