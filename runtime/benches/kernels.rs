//! Matrix-vector and matrix-matrix speed of every kernel table and weight format, beside this machine's read bandwidth.
//!
//! Every case is verified against an f64 product of the decoded weights before it is timed. `gemv` reads weights that do not
//! fit any cache (a ring of 384 MiB), as decoding does, so its figure is bytes of weights per second and `read-sum` is its
//! ceiling; `gemm` multiplies 8 to 512 tokens with a matrix that stays in cache, its figure is multiply-adds per second
//! (`elem/s`, half of the floating-point operations). Names are `operation/table/format`; with `--test` everything runs once on
//! small data.
//!
//! `attention` is one layer of 32 heads over 4 key/value heads of 128: decoding by bytes of cached keys and values per second (8 layers
//! take turns, so that they come from memory or the outermost cache), prefill by multiply-adds per second.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array2;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Duration;
use tierwise_cost::model::{Attention, Geometry, Gqa, ModelSpec};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::recipe::Recipe;
use tierwise_runtime::exec::attention::attention;
use tierwise_runtime::exec::kv_cache::KvCache;
use tierwise_runtime::exec::threads::Threads;
use tierwise_runtime::kernels::{ActivationBuf, CpuKernels, GemmScratch};
use tierwise_runtime::quant::dequantize_row;

const COLS: usize = 2048;
const ROWS: usize = 1024;
const GEMM_TOKENS: [usize; 4] = [8, 16, 64, 512];
const ROWS_PER_TASK: usize = 32;

fn ring_bytes() -> usize {
    if std::env::args().any(|arg| arg == "--test") { 24 << 20 } else { 384 << 20 }
}

/// Random bytes that make valid blocks of every format: whatever field such a byte belongs to, no scale or value is infinite,
/// NaN, above 1 or so small that products become subnormal (which is slow and rare in real weights).
fn weight_bytes(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(1).fill_bytes(&mut bytes);
    bytes.iter_mut().for_each(|b| *b = *b & 0x0B | 0x30);
    bytes
}

fn activation_values(tokens: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(2);
    (0..tokens * COLS).map(|_| (rng.next_u32() as f32 / u32::MAX as f32) * 2.0 - 1.0).collect()
}

/// The first rows times one and many tokens against f64. The bound is that of the eight-bit activations: half a step of at
/// most 1/127 per element.
fn verify(kernels: &CpuKernels, format: QuantFormat, weight: &[u8], x: &[f32]) {
    const ROWS: usize = 8;
    let row_bytes = format.row_bytes(COLS as u64).expect("2048 is whole blocks of every format") as usize;
    let mut act = ActivationBuf::new();
    let mut values = vec![0f32; COLS];
    for tokens in [1, 64] {
        kernels.quantize_activations(format, &x[..tokens * COLS], COLS, &mut act);
        let mut out = vec![f32::NAN; ROWS * tokens];
        let weight = &weight[..ROWS * row_bytes];
        kernels.gemm(format, weight, COLS, &act, act.all_tokens(), &mut GemmScratch::default(), &mut out);
        for (out, weight) in out.chunks_exact(tokens).zip(weight.chunks_exact(row_bytes)) {
            dequantize_row(format, weight, &mut values);
            let bound = values.iter().map(|w| f64::from(w.abs())).sum::<f64>() / 253.0;
            for (y, x) in out.iter().zip(x.chunks_exact(COLS)) {
                let exact: f64 = values.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                assert!((f64::from(*y) - exact).abs() <= bound, "{} {format}: {y} for {exact}", kernels.name);
            }
        }
    }
}

fn read_sum(bytes: &[u8]) -> u64 {
    let (lines, _) = bytes.as_chunks::<64>();
    let mut sums = [0u64; 8];
    for line in lines {
        for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}

fn kernels(c: &mut Criterion) {
    let ring = weight_bytes(ring_bytes());
    let x = activation_values(512);
    let threads = rayon::current_num_threads();

    let mut group = c.benchmark_group("read-sum");
    group.throughput(Throughput::Bytes(ring.len() as u64));
    group.bench_function("1-thread", |b| b.iter(|| read_sum(black_box(&ring))));
    group.bench_function(format!("{threads}-threads"), |b| {
        b.iter(|| ring.par_chunks(1 << 20).map(read_sum).reduce(|| 0, u64::wrapping_add));
    });
    group.finish();

    for table in CpuKernels::available() {
        for format in QuantFormat::ALL.iter().copied() {
            verify(&table, format, &ring, &x);
            let row_bytes = format.row_bytes(COLS as u64).expect("2048 is whole blocks of every format") as usize;
            let matrix_bytes = ROWS * row_bytes;
            let mut act = ActivationBuf::new();

            table.quantize_activations(format, &x[..COLS], COLS, &mut act);
            let mut out = vec![0f32; ROWS];
            let mut at = 0;
            let mut next = || {
                at = if at + 2 * matrix_bytes > ring.len() { 0 } else { at + matrix_bytes };
                &ring[at..at + matrix_bytes]
            };
            let mut group = c.benchmark_group(format!("gemv/{}", table.name));
            group.throughput(Throughput::Bytes(matrix_bytes as u64));
            group.bench_function(format!("{format}/1-thread"), |b| {
                b.iter(|| table.matmul_rows(format, next(), COLS, &act, &[0], &mut out));
            });
            group.bench_function(format!("{format}/{threads}-threads"), |b| {
                b.iter(|| {
                    let tasks = next().par_chunks(ROWS_PER_TASK * row_bytes).zip(out.par_chunks_mut(ROWS_PER_TASK));
                    tasks.for_each(|(weight, out)| table.matmul_rows(format, weight, COLS, &act, &[0], out));
                });
            });
            group.finish();

            let mut scratch = GemmScratch::default();
            for tokens in GEMM_TOKENS {
                table.quantize_activations(format, &x[..tokens * COLS], COLS, &mut act);
                let mut out = vec![0f32; ROWS * tokens];
                let mut group = c.benchmark_group(format!("gemm/{}", table.name));
                group.throughput(Throughput::Elements((ROWS * tokens * COLS) as u64));
                group.bench_function(format!("{format}/{tokens}-tokens"), |b| {
                    let weight = &ring[..matrix_bytes];
                    b.iter(|| table.gemm(format, weight, COLS, &act, act.all_tokens(), &mut scratch, &mut out));
                });
                group.finish();
            }
        }
    }
}

const LAYERS: usize = 8;
const HEADS: usize = 32;
const KV_HEADS: usize = 4;
const HEAD_DIM: usize = 128;

fn attention_spec() -> ModelSpec {
    let text = format!(
        r#"
        name = "attention"
        architecture = "qwen3moe"
        hidden_size = 2048
        vocab_size = 256
        context_length = 65536
        source = "Qwen3-30B-A3B"
        [[block]]
        repeat = {LAYERS}
        ffn = {{ kind = "dense", inner_size = 32 }}
        [block.attention]
        kind = "gqa"
        num_heads = {HEADS}
        num_kv_heads = {KV_HEADS}
        head_dim = {HEAD_DIM}
        rope = {{ theta = 1e6, rotary_dim = {HEAD_DIM} }}
        "#
    );
    let geometry = Geometry::from_toml(&text).expect("a geometry");
    ModelSpec::with_recipe(geometry, &Recipe::by_name("F32").expect("a recipe")).expect("a model")
}

fn array(rows: usize, cols: usize, seed: u64) -> Array2<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    Array2::from_shape_fn((rows, cols), |_| (rng.next_u32() as f32 / u32::MAX as f32) * 2.0 - 1.0)
}

/// The last token's heads against f64. The cache rounds elements (of magnitude at most 1) by at most a share of 2^-11 or 1/254: that
/// moves a score by at most scale * sum of |q| (under 80) of it, a weight by twice that, and a value by the share itself.
fn verify_attention(format: QuantFormat, a: &Gqa, [q, k, v, out]: [&Array2<f32>; 4]) {
    let share = if format == QuantFormat::F16 { 1.0 / 2048.0 } else { 1.0 / 254.0 };
    let (scale, last) = (1.0 / f64::from(a.head_dim).sqrt(), q.nrows() - 1);
    for head in 0..HEADS {
        let of = |x: &Array2<f32>, row: usize, head: usize, i: usize| f64::from(x[[row, head * HEAD_DIM + i]]);
        let kv_head = head / (HEADS / KV_HEADS);
        let score = |p: usize| (0..HEAD_DIM).map(|i| of(q, last, head, i) * of(k, p, kv_head, i)).sum::<f64>() * scale;
        let weights: Vec<f64> = (0..k.nrows()).map(|p| score(p).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for i in 0..HEAD_DIM {
            let exact = weights.iter().enumerate().map(|(p, w)| w / sum * of(v, p, kv_head, i)).sum::<f64>();
            assert!((of(out, last, head, i) - exact).abs() <= 16.0 * share, "{format}: {} for {exact}", of(out, last, head, i));
        }
    }
}

fn attentions(c: &mut Criterion) {
    let test = std::env::args().any(|arg| arg == "--test");
    let spec = attention_spec();
    let Attention::Gqa(a) = &spec.layers[0].attention else { unreachable!("the description says gqa") };
    let all = rayon::current_num_threads();
    for (name, tokens, past) in
        [("decode-1k", 1, 1023), ("decode-4k", 1, 4095), ("prefill-512", 512, 0), ("prefill-512-after-1536", 512, 1536)]
    {
        let (tokens, past) = if test { (tokens.min(20), past.min(100)) } else { (tokens, past) };
        let positions = past + tokens;
        let (q, k, v) = (
            array(tokens, HEADS * HEAD_DIM, 1),
            array(positions, KV_HEADS * HEAD_DIM, 2),
            array(positions, KV_HEADS * HEAD_DIM, 3),
        );
        for format in [QuantFormat::F16, QuantFormat::Q8_0] {
            let mut kv = KvCache::new(&spec, positions, format).expect("a cache");
            let rows = |x: &Array2<f32>| x.as_slice().expect("row-major").to_vec();
            (0..LAYERS).for_each(|layer| kv.append(CpuKernels::best(), layer, &rows(&k), &rows(&v)));
            kv.advance(past);
            let mut group = c.benchmark_group(format!("attention/{name}"));
            let pairs = tokens * past + tokens * (tokens + 1) / 2;
            group.throughput(if past > 0 && tokens == 1 {
                Throughput::Bytes(kv.bytes() / LAYERS as u64)
            } else {
                Throughput::Elements((2 * HEADS * HEAD_DIM * pairs) as u64)
            });
            for count in [1, all] {
                let threads = Threads::new(count).expect("threads");
                let (mut out, mut layer) = (Array2::zeros(q.dim()), 0);
                let mut run = |out: &mut Array2<f32>| {
                    layer = (layer + 1) % LAYERS;
                    threads.pool().install(|| attention(&threads, a, None, layer, &kv, &q.view(), out.view_mut()));
                };
                run(&mut out);
                verify_attention(format, a, [&q, &k, &v, &out]);
                group.bench_function(format!("{format}/{count}-threads"), |b| b.iter(|| run(&mut out)));
                if count == all {
                    break;
                }
            }
            group.finish();
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(600));
    targets = kernels, attentions
}
criterion_main!(benches);
