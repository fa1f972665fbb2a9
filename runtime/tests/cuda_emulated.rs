//! The CUDA kernels, as they are, with the launches of the CUDA back-end, on an emulated device (`shaders/tests/emulator.h`) against the
//! reference back-end. Needs a C++ compiler; without one the test says so and passes.
//!
//! What this cannot see: speed, the driver, and the tensor cores' own rounding.
#![cfg(feature = "cuda")]

#[allow(dead_code, reason = "the suite's own devices are not wanted here")]
mod conformance;
mod cuda_emulated_device;

use conformance::{Case, attention, check_on, elementwise, experts, products};
use cuda_emulated_device::Emulated;
use tierwise_cost::model::{Activation, RopePairing};
use tierwise_cost::quant::QuantFormat;
use tierwise_runtime::backend::check::group_rows;
use tierwise_runtime::backend::cuda::launch::EXACT_TOKENS;
use tierwise_runtime::backend::device::{DeviceBackend, View};
use tierwise_runtime::backend::op::{
    ABSENT, DeviceAttention, DeviceExperts, DeviceMatrix, DeviceOp, DeviceRule, KvElement, RowGroups,
};
use tierwise_runtime::backend::reference::ReferenceBackend;
use tierwise_runtime::quant::quantize_row;
use tierwise_shaders::cuda::CUDA_FORMATS;

/// The same buffers on both back-ends: what is written to one is written to the other.
struct Pair {
    reference: ReferenceBackend,
    emulated: Emulated,
}

impl Pair {
    fn open() -> Option<Self> {
        Some(Self { reference: ReferenceBackend::new(1 << 30), emulated: Emulated::open()? })
    }

    fn upload(&mut self, bytes: &[u8]) -> View {
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(4), 0);
        let a = self.reference.alloc(padded.len() as u64, "test").expect("room");
        let b = self.emulated.alloc(padded.len() as u64, "test").expect("room");
        assert_eq!(a, b, "both back-ends count buffers alike");
        let view = View { buffer: a, offset_bytes: 0, bytes: padded.len() as u64 };
        self.reference.write(view, &padded).expect("written");
        self.emulated.write(view, &padded).expect("written");
        view
    }

    fn floats(&mut self, values: &[f32]) -> View {
        self.upload(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
    }

    fn words(&mut self, values: &[u32]) -> View {
        self.upload(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
    }

    /// Runs on both; the results of the part as f32.
    fn run(&mut self, op: &DeviceOp, result: View) -> (Vec<f32>, Vec<f32>) {
        let ops = std::slice::from_ref(op);
        self.reference.submit(ops).expect("the reference runs it");
        self.emulated.submit(ops).expect("the emulator runs it");
        (read(&mut self.reference, result), read(&mut self.emulated, result))
    }

    /// [`Self::run`], every element within `relative` of the largest of its row of `width`, plus `relative * scale`.
    fn agree(&mut self, what: &str, op: &DeviceOp, result: View, relative: f32) {
        let (expected, found) = self.run(op, result);
        let size = expected.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
        for (i, (a, b)) in expected.iter().zip(&found).enumerate() {
            assert!((a - b).abs() <= relative * size, "{what}: element {i}: {b} against {a}, largest {size}");
        }
    }
}

fn read(backend: &mut dyn DeviceBackend, part: View) -> Vec<f32> {
    let mut bytes = vec![0; part.bytes as usize];
    backend.read(&mut [(part, &mut bytes)]).expect("read");
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Values in -1..1 that do not repeat.
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn encoded(format: QuantFormat, rows: usize, cols: usize, seed: u32) -> Vec<u8> {
    let row_bytes = format.row_bytes(cols as u64).expect("whole blocks") as usize;
    let mut out = vec![0; row_bytes * rows];
    for (row, out) in out.chunks_exact_mut(row_bytes).enumerate() {
        quantize_row(format, &values(cols, seed + row as u32), out).expect("finite");
    }
    out
}

/// Columns that are whole blocks and no multiple of a chunk, if the format allows it.
fn odd_cols(format: QuantFormat) -> [usize; 2] {
    match format.layout().elems {
        1 => [63, 321],
        32 => [96, 416],
        _ => [256, 1536],
    }
}

/// Exact kernels are as good as f32; the others round both factors to bf16 (2^-8 each).
fn tolerance(format: QuantFormat, tokens: u32) -> f32 {
    if tokens <= EXACT_TOKENS || format == QuantFormat::F32 { 2e-6 } else { 8e-3 }
}

/// The cases of `backend_conformance`; below are larger ones, of several chunks, blocks and ranges.
#[test]
fn the_conformance_suite() {
    let of_formats = [products::embeddings, products::matmuls, products::head_matmuls, experts::of_format];
    let others: Vec<Case> =
        [elementwise::norms(), elementwise::movements(), elementwise::sums(), elementwise::routes(), attention::attentions()]
            .into_iter()
            .flatten()
            .collect();
    let Some(device) = Emulated::open() else { return };
    check_on(vec![Box::new(device)], &others);
    for cases in of_formats {
        for format in CUDA_FORMATS {
            let device = Emulated::open().expect("it opened before");
            check_on(vec![Box::new(device)], &cases(*format));
        }
    }
}

#[test]
fn products_of_all_formats() {
    let Some(mut pair) = Pair::open() else { return };
    for &format in CUDA_FORMATS {
        for (case, (rows, tokens)) in [(1, 1), (16, 2), (37, 3), (40, 8), (130, 9), (33, 150)].into_iter().enumerate() {
            let cols = odd_cols(format)[case % 2];
            let view = pair.upload(&encoded(format, rows, cols, 7 * case as u32));
            let weight = DeviceMatrix { format, rows: rows as u32, cols: cols as u32, view };
            let x = pair.floats(&values(tokens * cols, 99));
            let bias = (case % 2 == 0).then(|| pair.floats(&values(rows, 5)));
            let out = pair.floats(&vec![7.0; tokens * rows]);
            let op = DeviceOp::MatMul { weight, bias, x, out, tokens: tokens as u32 };
            pair.agree(&format!("{format}, {rows} x {cols}, {tokens} tokens"), &op, out, tolerance(format, tokens as u32));
        }
    }
}

#[test]
fn products_per_head_and_embeddings() {
    let Some(mut pair) = Pair::open() else { return };
    for &format in CUDA_FORMATS {
        let (heads, rows, cols) = (3, 20, odd_cols(format)[0]);
        let view = pair.upload(&encoded(format, heads * rows, cols, 3));
        let weight = DeviceMatrix { format, rows: (heads * rows) as u32, cols: cols as u32, view };
        for tokens in [1, 5, 12] {
            let (x_stride, out_stride) = (cols + 3, rows + 5);
            let x = pair.floats(&values(tokens * heads * x_stride, 1));
            let out = pair.floats(&vec![7.0; tokens * heads * out_stride]);
            let op = DeviceOp::HeadMatMul {
                weight,
                heads: heads as u32,
                x,
                x_stride: x_stride as u32,
                out,
                out_stride: out_stride as u32,
                tokens: tokens as u32,
            };
            pair.agree(&format!("{format} per head, {tokens} tokens"), &op, out, tolerance(format, tokens as u32));
        }
        let ids = pair.words(&[59, 0, 17]);
        let out = pair.floats(&vec![7.0; 3 * cols]);
        let (expected, found) = pair.run(&DeviceOp::Embed { table: weight, ids, out, tokens: 3 }, out);
        for (i, (a, b)) in expected.iter().zip(&found).enumerate() {
            // One rounding of a product and one of a difference.
            assert!((a - b).abs() <= 3e-7 * a.abs().max(0.1), "{format}: element {i}: {b} against {a}");
        }
    }
}

#[test]
fn experts_of_all_formats() {
    let Some(mut pair) = Pair::open() else { return };
    for &format in CUDA_FORMATS {
        for (case, tokens) in [1usize, 7, 70].into_iter().enumerate() {
            let (hidden, inner_size) = match format.layout().elems {
                1 => (70, 66),
                32 => (160, 96),
                _ => (256, 512),
            };
            let (num_experts, k) = (5usize, 2usize);
            // Expert 3 is not in the buffer; the others lie at multiples of 16 bytes in another order.
            let part = |rows, cols, seed| {
                let mut bytes = encoded(format, rows, cols, seed);
                bytes.resize(bytes.len().next_multiple_of(16), 0);
                bytes
            };
            let mut arena = vec![0; 32];
            let mut table = vec![ABSENT; 3 * num_experts];
            for e in [4, 0, 2, 1] {
                for (m, (rows, cols)) in
                    [(inner_size, hidden), (inner_size, hidden), (hidden, inner_size)].into_iter().enumerate()
                {
                    table[3 * e + m] = arena.len() as u32 / 16;
                    arena.extend(part(rows, cols, (10 * e + m) as u32));
                }
            }
            let rows = tokens * k;
            let ids: Vec<u32> =
                (0..rows).map(|r| if rows == 2 { [4, 1][r] } else { (r * 7 % 11 % num_experts) as u32 }).collect();
            let activation = if case == 1 { Activation::ClampedSwiglu { alpha: 1.7, limit: 2.0 } } else { Activation::Silu };
            let arena = pair.upload(&arena);
            let biases = (case == 1)
                .then(|| [inner_size, inner_size, hidden].map(|width| pair.floats(&values(num_experts * width, width as u32))));
            let experts = DeviceExperts {
                buffer: arena.buffer,
                table: pair.words(&table),
                num_experts: num_experts as u32,
                formats: [format; 3],
                inner_size: inner_size as u32,
                hidden: hidden as u32,
                activation,
                biases,
            };
            let x = pair.floats(&values(tokens * hidden, 17));
            let id_view = pair.words(&ids);
            let inner = pair.floats(&vec![0.0; rows * inner_size]);
            let out = pair.floats(&vec![7.0; rows * hidden]);
            let groups = (case == 2).then(|| {
                let (order, tiles) = group_rows(&ids, |e| e != 3);
                RowGroups { order: pair.words(&order), tiles: pair.words(tiles.as_flattened()), num_tiles: tiles.len() as u32 }
            });
            let rounded = groups.is_some() && format != QuantFormat::F32;
            let op =
                DeviceOp::Experts { experts, x, ids: id_view, rows_per_input: k as u32, inner, out, rows: rows as u32, groups };
            pair.agree(&format!("experts in {format}, {tokens} tokens"), &op, out, if rounded { 2e-2 } else { 4e-6 });
        }
    }
}

#[test]
fn attention_over_caches() {
    let Some(mut pair) = Pair::open() else { return };
    // (tokens, past, heads, kv heads, key dim, value dim, window, chunk, softcap, sinks, values are keys)
    let cases = [
        (1, 0, 4, 4, 16, 16, None, None, None, false, false),
        (1, 700, 8, 2, 64, 64, None, None, None, true, false),
        (5, 300, 6, 2, 20, 12, None, None, Some(3.0), false, false),
        (40, 3, 4, 1, 32, 32, Some(7), None, None, true, false),
        (33, 60, 2, 2, 128, 128, None, Some(16), None, false, false),
        (2, 500, 16, 1, 96, 80, None, None, None, false, true),
        (1, 400, 3, 1, 130, 130, Some(300), None, None, false, false),
        (20, 20, 2, 1, 288, 256, None, None, None, false, true),
        (3, 1, 2, 2, 6, 2, None, None, None, true, false),
    ];
    for (tokens, past, heads, kv_heads, key_dim, value_dim, window, chunk, softcap, sinks, shared) in cases {
        for element in [KvElement::F32, KvElement::F16] {
            let value_stride = if shared { key_dim } else { value_dim };
            let positions = (past + tokens) as usize;
            let mut cache = |width: u32, seed| {
                let elements = (kv_heads * width) as usize * positions;
                let x = pair.floats(&values(elements, seed));
                let cache = pair.upload(&vec![0; elements * element.bytes() as usize]);
                let op = DeviceOp::AppendKv { x, cache, element, tokens: past + tokens, width: kv_heads * width, position: 0 };
                let (a, b) = pair.run(&op, cache);
                assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "appended values are rounded alike");
                cache
            };
            let keys = cache(key_dim, 1);
            let values_view = if shared { keys } else { cache(value_stride, 2) };
            let q = pair.floats(&values((tokens * heads * key_dim) as usize, 3));
            let out = pair.floats(&vec![7.0; (tokens * heads * value_dim) as usize]);
            let sinks = sinks.then(|| pair.floats(&values(heads as usize, 4)));
            let a = DeviceAttention {
                q,
                keys,
                values: values_view,
                value_stride,
                out,
                sinks,
                element,
                tokens,
                past,
                heads,
                kv_heads,
                key_dim,
                value_dim,
                scale: 1.0 / (key_dim as f32).sqrt(),
                window,
                chunk,
                softcap,
            };
            pair.agree(&format!("{a:?}"), &DeviceOp::Attention(a), out, 3e-6);
        }
    }
}

#[test]
fn routing() {
    let Some(mut pair) = Pair::open() else { return };
    for (num_experts, k, sigmoid, normalize, softmax_after_topk, bias) in [
        (8, 2, false, true, false, false),
        (60, 4, false, false, false, false),
        (256, 8, true, true, false, true),
        (32, 4, false, false, true, false),
        (33, 33, false, false, false, true),
    ] {
        let tokens = 5u32;
        let mut logits: Vec<f32> = values((tokens * num_experts) as usize, num_experts).iter().map(|x| 4.0 * x).collect();
        logits[3] = logits[5]; // equals
        let logits = pair.floats(&logits);
        let selection_bias = bias.then(|| pair.floats(&values(num_experts as usize, 8)));
        let ids = pair.words(&vec![9; (tokens * k) as usize]);
        let weights = pair.floats(&vec![9.0; (tokens * k) as usize]);
        let rule = DeviceRule { sigmoid, normalize, softmax_after_topk, scale: 1.5 };
        let op = DeviceOp::Route { logits, selection_bias, ids, weights, tokens, num_experts, k, rule };
        let what = format!("{k} of {num_experts}, {rule:?}");
        pair.agree(&what, &op, weights, 1e-6);
        let (a, b) = (read(&mut pair.reference, ids), read(&mut pair.emulated, ids));
        assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}: other experts");
    }
}

#[test]
fn elementwise_operations() {
    let Some(mut pair) = Pair::open() else { return };
    let (rows, width) = (3u32, 270u32);
    let n = rows * width;
    let x = pair.floats(&values(n as usize, 1));
    let other = pair.floats(&values(n as usize, 2));
    let weight = pair.floats(&values(3 * width as usize, 3));
    let bias = pair.floats(&values(width as usize, 4));
    let three = pair.floats(&[0.5, -2.0, 3.0]);
    let out = pair.floats(&vec![7.0; n as usize]);
    let wide = pair.floats(&values(rows as usize * 400, 6));
    let choices = pair.floats(&values((rows * 2) as usize, 9));
    let pairs_of_rows = pair.floats(&values((rows * 2 * width) as usize, 10));
    let angles = pair.floats(&values((rows * 40 * 2) as usize, 11));
    let clamped = Activation::ClampedSwiglu { alpha: 1.702, limit: 0.5 };
    let ops = [
        (DeviceOp::RmsNorm { x, weight: None, period: 1, out, rows, width, eps: 1e-6 }, out),
        (DeviceOp::RmsNorm { x, weight: Some(weight), period: 3, out, rows, width, eps: 1e-6 }, out),
        (DeviceOp::RmsNorm { x: other, weight: Some(weight), period: 1, out: other, rows, width, eps: 1e-5 }, other),
        (DeviceOp::LayerNorm { x, weight, bias, out, rows, width, eps: 1e-5 }, out),
        (
            DeviceOp::CopyColumns { x, x_stride: width, x_start: 20, out: wide, out_stride: 400, out_start: 7, rows, width: 250 },
            wide,
        ),
        (DeviceOp::Scale { x: other, factor: 0.3, factors: None, rows, width }, other),
        (DeviceOp::Scale { x: other, factor: 1.0, factors: Some(three), rows, width }, other),
        (DeviceOp::Axpy { x, y: other, factor: -0.7, elements: n }, other),
        (DeviceOp::GatedAxpy { x, input: wide, gate: bias, y: other, rows, width, cols: 133 }, other),
        (DeviceOp::Activate { gate: x, up: other, out, elements: n, activation: Activation::Silu }, out),
        (DeviceOp::Activate { gate: x, up: other, out, elements: n, activation: clamped }, out),
        (DeviceOp::ScaleCap { x: other, elements: n, factor: 2.0, softcap: Some(1.5) }, other),
        (DeviceOp::ScaleCap { x: other, elements: n, factor: 2.0, softcap: None }, other),
        (DeviceOp::Combine { x: pairs_of_rows, weights: choices, y: out, tokens: rows, k: 2, width, accumulate: false }, out),
        (DeviceOp::Combine { x: pairs_of_rows, weights: choices, y: out, tokens: rows, k: 2, width, accumulate: true }, out),
        (
            DeviceOp::Rope {
                x: other,
                cos_sin: angles,
                tokens: rows,
                heads: 3,
                head_stride: 90,
                first: 4,
                pairs: 40,
                pairing: RopePairing::Halves,
            },
            other,
        ),
        (
            DeviceOp::Rope {
                x: other,
                cos_sin: angles,
                tokens: rows,
                heads: 3,
                head_stride: 90,
                first: 0,
                pairs: 40,
                pairing: RopePairing::Interleaved,
            },
            other,
        ),
    ];
    for (op, result) in &ops {
        pair.agree(&format!("{op:?}"), op, *result, 2e-6);
    }
}

/// Steps that differ by their position only: the first is remembered, the second made into a graph, later ones change its nodes. Every
/// step's result is the reference's.
#[test]
fn steps_that_repeat_become_graphs() {
    let Some(mut pair) = Pair::open() else { return };
    pair.emulated.fix_scratch(1 << 20);
    let (heads, kv_heads, dim, context) = (4u32, 2u32, 16u32, 400u32);
    let width = heads * dim;
    let weight = DeviceMatrix {
        format: QuantFormat::Q8_0,
        rows: width,
        cols: width,
        view: pair.upload(&encoded(QuantFormat::Q8_0, width as usize, width as usize, 3)),
    };
    let [x, q, out, hidden] = [1, 2, 3, 4].map(|seed| pair.floats(&values(width as usize, seed)));
    let cache = |seed| values((context * kv_heads * dim) as usize, seed);
    let (keys, cached) = (pair.floats(&cache(5)), pair.floats(&cache(6)));
    let angles = pair.floats(&vec![0.0; dim as usize]);
    let new = View { bytes: u64::from(4 * kv_heads * dim), ..q };
    for (step, past) in [0u32, 1, 2, 150, 299, 300, 3].into_iter().enumerate() {
        let turned: Vec<f32> = (0..dim / 2)
            .flat_map(|i| [(past as f32 * 0.1 / (i + 1) as f32).cos(), (past as f32 * 0.1 / (i + 1) as f32).sin()])
            .collect();
        let bytes: Vec<u8> = turned.iter().flat_map(|x| x.to_le_bytes()).collect();
        let part = View { bytes: bytes.len() as u64, ..angles };
        pair.reference.write(part, &bytes).expect("written");
        pair.emulated.write(part, &bytes).expect("written");
        let attention = DeviceAttention {
            q,
            keys,
            values: cached,
            value_stride: dim,
            out,
            sinks: None,
            element: KvElement::F32,
            tokens: 1,
            past,
            heads,
            kv_heads,
            key_dim: dim,
            value_dim: dim,
            scale: 0.25,
            window: None,
            chunk: None,
            softcap: None,
        };
        let norm = DeviceOp::RmsNorm { x: hidden, weight: None, period: 1, out: x, rows: 1, width, eps: 1e-6 };
        let append = |cache| DeviceOp::AppendKv {
            x: new,
            cache,
            element: KvElement::F32,
            tokens: 1,
            width: kv_heads * dim,
            position: past,
        };
        let ops = [
            norm,
            DeviceOp::MatMul { weight, bias: None, x, out: q, tokens: 1 },
            DeviceOp::Rope {
                x: q,
                cos_sin: part,
                tokens: 1,
                heads,
                head_stride: dim,
                first: 0,
                pairs: dim / 2,
                pairing: RopePairing::Halves,
            },
            append(keys),
            append(cached),
            DeviceOp::Attention(attention),
            DeviceOp::MatMul { weight, bias: None, x: out, out: x, tokens: 1 },
            DeviceOp::Axpy { x, y: hidden, factor: 0.5, elements: width },
        ];
        pair.reference.submit(&ops).expect("the reference runs it");
        pair.emulated.submit(&ops).expect("the emulator runs it");
        let (expected, found) = (read(&mut pair.reference, hidden), read(&mut pair.emulated, hidden));
        let size = expected.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
        for (i, (a, b)) in expected.iter().zip(&found).enumerate() {
            assert!((a - b).abs() <= 2e-5 * size, "step {step}, element {i}: {b} against {a}");
        }
    }
    let counts = pair.emulated.graphs();
    println!("{counts:?}");
    // Ranges of attention are put together by a kernel more: long steps are another list.
    assert!(counts.built >= 1 && counts.run >= 3 && counts.changed >= 6, "{counts:?}");
}
