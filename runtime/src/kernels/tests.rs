//! Every kernel table this machine can run against f64 references, over [`QuantFormat::ALL`].
//!
//! Dot products. With u = 2^-24, n blocks per row (16 elements count as one for the float formats) and S = sum of the
//! magnitudes of all terms (|scale * code * x|, and |min * x| where there is a minimum): inside a block the integer sum is
//! exact and a handful of roundings follow (conversion to f32, product of the two scales, product with the sum, minimum);
//! adding up takes at most n roundings in one lane and 16 to join lanes; the reference itself starts from f32 weights, which
//! carry up to 3. So |error| <= (n + 32) u S to first order, plus what underflow can lose.
//! Test rows cover random bits and the extremes: all codes 0, 255 or -128, scales zero, subnormal and negative.

use super::*;
use crate::quant::dequantize_row;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

const ROUNDING: f64 = 1.0 / (1 << 24) as f64;

/// Byte ranges of a block.
struct Fields {
    /// f16 scales and minima.
    halves: &'static [usize],
    /// Where the codes are, for formats in which code 0 leaves just the minimum.
    codes_of_minimum_format: Option<std::ops::Range<usize>>,
}

fn fields(format: QuantFormat) -> Fields {
    let (halves, codes): (&[usize], _) = match format {
        QuantFormat::F32 | QuantFormat::F16 | QuantFormat::BF16 | QuantFormat::MXFP4 | QuantFormat::Q8_K => (&[], None),
        QuantFormat::Q4_0 | QuantFormat::Q5_0 | QuantFormat::Q8_0 | QuantFormat::IQ4_NL | QuantFormat::IQ4_XS => (&[0], None),
        QuantFormat::Q4_1 => (&[0, 2], Some(4..20)),
        QuantFormat::Q5_1 => (&[0, 2], Some(4..24)),
        QuantFormat::Q2_K => (&[80, 82], Some(16..80)),
        QuantFormat::Q3_K => (&[108], None),
        QuantFormat::Q4_K => (&[0, 2], Some(16..144)),
        QuantFormat::Q5_K => (&[0, 2], Some(16..176)),
        QuantFormat::Q6_K => (&[208], None),
    };
    Fields { halves, codes_of_minimum_format: codes }
}

#[derive(Debug, Clone, Copy)]
enum Style {
    Random,
    /// Every byte that is no scale has this value.
    Filled(u8),
    /// Random codes, this scale.
    Scale(f32),
}

const STYLES: [Style; 8] = [
    Style::Random,
    Style::Filled(0),
    Style::Filled(255),
    Style::Filled(0x80),
    Style::Filled(0x88),
    Style::Scale(0.0),
    Style::Scale(6e-8),
    Style::Scale(-0.5),
];

/// `rows * cols` weights in encoded form.
fn weights(format: QuantFormat, elements: usize, style: Style, rng: &mut StdRng) -> Vec<u8> {
    let layout = format.layout();
    let mut bytes = vec![0; format.row_bytes(elements as u64).unwrap() as usize];
    match style {
        Style::Filled(byte) => bytes.fill(byte),
        Style::Random | Style::Scale(_) => rng.fill_bytes(&mut bytes),
    }
    for block in bytes.chunks_exact_mut(layout.bytes as usize) {
        let scale = if let Style::Scale(scale) = style { scale } else { rng.random_range(-0.1..0.1) };
        for at in fields(format).halves {
            block[*at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        }
        match format {
            QuantFormat::F32 => block.copy_from_slice(&(scale * rng.random_range(-1.0..1.0f32)).to_le_bytes()),
            QuantFormat::Q8_K => block[..4].copy_from_slice(&scale.to_le_bytes()),
            QuantFormat::F16 if f16::from_le_bytes([block[0], block[1]]).to_f32().is_finite() => {}
            QuantFormat::BF16 if block[1] & 0x7F < 0x48 => {}
            QuantFormat::F16 | QuantFormat::BF16 => block[1] &= 0x3B,
            QuantFormat::MXFP4 => {
                block[0] = if let Style::Scale(s) = style { (s == -0.5) as u8 } else { rng.random_range(110..140) }
            }
            QuantFormat::Q4_0
            | QuantFormat::Q4_1
            | QuantFormat::Q5_0
            | QuantFormat::Q5_1
            | QuantFormat::Q8_0
            | QuantFormat::Q2_K
            | QuantFormat::Q3_K
            | QuantFormat::Q4_K
            | QuantFormat::Q5_K
            | QuantFormat::Q6_K
            | QuantFormat::IQ4_NL
            | QuantFormat::IQ4_XS => {}
        }
    }
    bytes
}

/// The kernels for many tokens against f64 (same bound), and the same bits for any cut of the rows and order of the tokens.
fn check_gemm(format: QuantFormat, rows: usize, blocks: usize, tokens: usize, style: Style, seed: u64) {
    let rng = &mut StdRng::seed_from_u64(seed);
    let per_block = format.layout().elems as usize;
    let cols = if per_block == 1 { 37 * blocks } else { per_block * blocks };
    let weight = weights(format, rows * cols, style, rng);
    let x = activations(tokens * cols, rng);
    let terms = match format {
        // Products of their parts may be added one by one.
        QuantFormat::BF16 => 3 * cols,
        QuantFormat::F16 => 6 * cols,
        // Eight or more sums run beside each other.
        QuantFormat::F32 => cols.div_ceil(8),
        _ => cols.div_ceil(per_block.max(16)),
    } as f64;
    let row_bytes = weight.len() / rows;
    let (mut act, mut scratch) = (ActivationBuf::new(), GemmScratch::default());
    // Repeated, unordered and missing ones.
    let chosen: Vec<u32> = (0..tokens as u32).map(|t| (t * 7 + 3) % tokens as u32).collect();
    for kernels in CpuKernels::available() {
        kernels.quantize_activations(format, &x, cols, &mut act);
        let mut out = vec![f32::NAN; rows * tokens];
        kernels.gemm(format, &weight, cols, &act, &chosen, &mut scratch, &mut out);
        for (i, token) in chosen.iter().enumerate() {
            let x = decode_activations(&act, *token);
            for (row, weight) in weight.chunks_exact(row_bytes).enumerate() {
                let (exact, magnitude) = reference(format, weight, &x);
                let bound = (terms + 32.0) * ROUNDING * magnitude + terms * f64::from(f32::MIN_POSITIVE);
                let y = f64::from(out[row * tokens + i]);
                assert!((y - exact).abs() <= bound, "{} {format} {style:?}: {y} for {exact}, bound {bound:e}", kernels.name);
            }
        }
        let reversed: Vec<u32> = chosen.iter().rev().copied().collect();
        let mut again = vec![f32::NAN; rows * tokens];
        for (weight, again) in weight.chunks(5 * row_bytes).zip(again.chunks_mut(5 * tokens)) {
            kernels.gemm(format, weight, cols, &act, &reversed, &mut scratch, again);
        }
        for row in 0..rows {
            for i in 0..tokens {
                let bits = out[row * tokens + i].to_bits();
                assert_eq!(again[row * tokens + tokens - 1 - i].to_bits(), bits, "{} {format}", kernels.name);
            }
        }
    }
}

#[test]
fn gemm_of_extreme_rows() {
    for format in QuantFormat::ALL {
        for style in STYLES {
            check_gemm(*format, 19, 3, 33, style, 7);
        }
    }
}

/// Every fill of the token tiles, and rows that fill no panel.
#[test]
fn gemm_of_every_number_of_tokens() {
    use QuantFormat::{BF16, F16, F32, Q4_0, Q4_K, Q6_K, Q8_0};
    for format in [Q4_0, Q8_0, Q4_K, Q6_K, BF16, F16, F32] {
        for tokens in 1..=40 {
            check_gemm(format, 1 + tokens % 18, 2, tokens, Style::Random, 9);
        }
    }
}

/// A token that is not finite shows in all its results and in no other token's.
#[test]
fn gemm_keeps_infinity_and_nan_to_their_token() {
    let (rows, tokens, bad) = (18, 20, 13);
    for format in QuantFormat::ALL {
        let rng = &mut StdRng::seed_from_u64(4);
        let cols = format.layout().elems as usize * if format.layout().elems == 1 { 70 } else { 2 };
        let weight = weights(*format, rows * cols, Style::Random, rng);
        let x: Vec<f32> = (0..tokens * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
        for kernels in CpuKernels::available() {
            let product = |x: &[f32]| {
                let (mut act, mut scratch, mut out) = (ActivationBuf::new(), GemmScratch::default(), vec![0.0; rows * tokens]);
                kernels.quantize_activations(*format, x, cols, &mut act);
                kernels.gemm(*format, &weight, cols, &act, act.all_tokens(), &mut scratch, &mut out);
                out
            };
            let expected = product(&x);
            assert!(expected.iter().all(|y| y.is_finite()), "{} {format}", kernels.name);
            for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = x.clone();
                x[bad * cols + cols / 2] = special;
                let got = product(&x);
                for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    if i % tokens == bad {
                        assert!(!got.is_finite(), "{} {format}: {got} from {special}", kernels.name);
                    } else {
                        assert_eq!(got.to_bits(), expected.to_bits(), "{} {format}: {special} spread", kernels.name);
                    }
                }
            }
        }
    }
}

/// Subnormal activations count as they are or as zero.
#[test]
fn gemm_of_subnormal_activations() {
    let (rows, tokens) = (17, 18);
    for format in QuantFormat::ALL {
        let rng = &mut StdRng::seed_from_u64(6);
        let cols = format.layout().elems as usize * if format.layout().elems == 1 { 70 } else { 2 };
        let weight = weights(*format, rows * cols, Style::Random, rng);
        let x: Vec<f32> = (0..tokens * cols).map(|_| 1e-38 * rng.random_range(-1.0..1.0f32)).collect();
        for kernels in CpuKernels::available() {
            let (mut act, mut scratch, mut out) = (ActivationBuf::new(), GemmScratch::default(), vec![f32::NAN; rows * tokens]);
            kernels.quantize_activations(*format, &x, cols, &mut act);
            kernels.gemm(*format, &weight, cols, &act, act.all_tokens(), &mut scratch, &mut out);
            for (weight, out) in weight.chunks_exact(weight.len() / rows).zip(out.chunks_exact(tokens)) {
                let (_, magnitude) = reference(*format, weight, &vec![1.0; cols]);
                for (t, y) in out.iter().enumerate() {
                    let (exact, _) = reference(*format, weight, &decode_activations(&act, t as u32));
                    let bound = (magnitude + cols as f64) * f64::from(f32::MIN_POSITIVE);
                    assert!((f64::from(*y) - exact).abs() <= bound, "{} {format}: {y:e} for {exact:e}", kernels.name);
                }
            }
        }
    }
}

/// More tokens than one pass over the weights takes.
#[test]
fn gemm_in_several_passes() {
    check_gemm(QuantFormat::Q4_K, 3, 70, 100, Style::Random, 5);
    check_gemm(QuantFormat::Q4_0, 3, 700, 100, Style::Random, 5);
    // 37 * 224 columns: whole steps, no padding; 33 rows: with.
    check_gemm(QuantFormat::BF16, 33, 224, 50, Style::Random, 5);
    // 8325 columns: several pieces, the last one short, and 48 tokens per pass.
    check_gemm(QuantFormat::F16, 9, 225, 51, Style::Random, 5);
    check_gemm(QuantFormat::F32, 9, 225, 51, Style::Random, 5);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn gemm_of_random_rows(rows in 1usize..40, blocks in 1usize..11, tokens in 1usize..50, seed: u64) {
        for format in QuantFormat::ALL {
            check_gemm(*format, rows, blocks, tokens, STYLES[seed as usize % STYLES.len()], seed);
        }
    }
}

fn activations(len: usize, rng: &mut StdRng) -> Vec<f32> {
    let size = 10f32.powi(rng.random_range(-3..4));
    let mut x: Vec<f32> = (0..len).map(|_| size * rng.random_range(-1.0..1.0f32)).collect();
    // One extreme pattern in three: all codes at +-127.
    if rng.random_range(0..3) == 0 {
        x.iter_mut().for_each(|v| *v = size.copysign(*v));
    }
    x
}

/// The encoded activation row as exact numbers.
fn decode_activations(act: &ActivationBuf, token: u32) -> Vec<f64> {
    let row = act.row(token);
    let scaled = |codes: &[i8], scale: f32| codes.iter().map(|c| f64::from(*c) * f64::from(scale)).collect::<Vec<_>>();
    match act.format() {
        ActivationFormat::F32 => bytemuck::cast_slice::<_, f32>(row).iter().map(|v| f64::from(*v)).collect(),
        ActivationFormat::Q8_1 => {
            bytemuck::cast_slice::<_, ActivationQ8_1>(row).iter().flat_map(|b| scaled(&b.codes, b.scale)).collect()
        }
        ActivationFormat::Q8_K => {
            bytemuck::cast_slice::<_, ActivationQ8K>(row).iter().flat_map(|b| scaled(&b.codes, b.scale)).collect()
        }
    }
}

/// Exact dot product and S of the bound above.
fn reference(format: QuantFormat, weight: &[u8], x: &[f64]) -> (f64, f64) {
    let mut values = vec![0f32; x.len()];
    dequantize_row(format, weight, &mut values);
    let mut minima = vec![0f32; x.len()];
    if let Some(codes) = fields(format).codes_of_minimum_format {
        let mut without_codes = weight.to_vec();
        for block in without_codes.chunks_exact_mut(format.layout().bytes as usize) {
            block[codes.clone()].fill(0);
        }
        dequantize_row(format, &without_codes, &mut minima);
    }
    let mut sums = (0.0, 0.0);
    for ((w, m), x) in values.iter().zip(&minima).zip(x) {
        let (w, m) = (f64::from(*w), f64::from(*m));
        sums.0 += w * x;
        sums.1 += ((w - m).abs() + m.abs()) * x.abs();
    }
    sums
}

fn check_matmul(format: QuantFormat, rows: usize, blocks: usize, tokens: usize, style: Style, seed: u64) {
    let rng = &mut StdRng::seed_from_u64(seed);
    let per_block = format.layout().elems as usize;
    // For the float formats any number of columns is whole blocks; odd ones exercise the tails.
    let cols = if per_block == 1 { 37 * blocks } else { per_block * blocks };
    let weight = weights(format, rows * cols, style, rng);
    let x = activations(tokens * cols, rng);
    let terms = cols.div_ceil(per_block.max(16)) as f64;
    let row_bytes = weight.len() / rows;
    let mut act = ActivationBuf::new();
    let mut scalar = vec![];
    for kernels in CpuKernels::available() {
        kernels.quantize_activations(format, &x, cols, &mut act);
        let mut out = vec![f32::NAN; rows * tokens];
        kernels.matmul_rows(format, &weight, cols, &act, act.all_tokens(), &mut out);
        if scalar.is_empty() {
            scalar.clone_from(&out);
        }
        for token in 0..tokens {
            let x = decode_activations(&act, token as u32);
            for (row, weight) in weight.chunks_exact(row_bytes).enumerate() {
                let (exact, magnitude) = reference(format, weight, &x);
                let bound = (terms + 32.0) * ROUNDING * magnitude + terms * f64::from(f32::MIN_POSITIVE);
                let y = f64::from(out[row * tokens + token]);
                let name = kernels.name;
                assert!((y - exact).abs() <= bound, "{name} {format} {style:?}: {y} for {exact}, bound {bound:e}");
                let oracle = f64::from(scalar[row * tokens + token]);
                assert!((y - oracle).abs() <= 2.0 * bound, "{name} {format} {style:?}: {y}, scalar {oracle}");
            }
        }
        // Each token alone, and in another order: the same bits.
        let reversed: Vec<u32> = (0..tokens as u32).rev().collect();
        let mut again = vec![f32::NAN; rows * tokens];
        kernels.matmul_rows(format, &weight, cols, &act, &reversed, &mut again);
        for token in 0..tokens {
            let mut alone = vec![f32::NAN; rows];
            kernels.matmul_rows(format, &weight, cols, &act, &[token as u32], &mut alone);
            for row in 0..rows {
                let expected = out[row * tokens + token].to_bits();
                assert_eq!(alone[row].to_bits(), expected, "{} {format}: batching changed a value", kernels.name);
                assert_eq!(again[row * tokens + tokens - 1 - token].to_bits(), expected, "{} {format}", kernels.name);
            }
        }
    }
}

#[test]
fn matmul_of_extreme_rows() {
    for format in QuantFormat::ALL {
        for style in STYLES {
            check_matmul(*format, 3, 5, 6, style, 7);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn matmul_of_random_rows(rows in 1usize..5, blocks in 1usize..20, tokens in 1usize..10, seed: u64) {
        for format in QuantFormat::ALL {
            check_matmul(*format, rows, blocks, tokens, STYLES[seed as usize % STYLES.len()], seed);
        }
    }
}

#[test]
fn rows_larger_than_a_group_are_all_computed() {
    let rng = &mut StdRng::seed_from_u64(3);
    let (rows, cols) = (2 * GROUP_BYTES / 144 + 3, 256);
    let weight = weights(QuantFormat::Q4_K, rows * cols, Style::Random, rng);
    let x = activations(5 * cols, rng);
    let mut act = ActivationBuf::new();
    CpuKernels::best().quantize_activations(QuantFormat::Q4_K, &x, cols, &mut act);
    let mut whole = vec![f32::NAN; rows * 5];
    CpuKernels::best().matmul_rows(QuantFormat::Q4_K, &weight, cols, &act, act.all_tokens(), &mut whole);
    let mut pieces = vec![f32::NAN; rows * 5];
    for (weight, out) in weight.chunks(7 * 144).zip(pieces.chunks_mut(7 * 5)) {
        CpuKernels::best().matmul_rows(QuantFormat::Q4_K, weight, cols, &act, act.all_tokens(), out);
    }
    assert!(whole.iter().all(|v| v.is_finite()));
    assert_eq!(whole, pieces);
}

/// Rows that end a block in every special way there is.
fn activation_rows() -> Vec<Vec<f32>> {
    let rng = &mut StdRng::seed_from_u64(11);
    let mut rows: Vec<Vec<f32>> = (0..20).map(|_| activations(512, rng)).collect();
    rows.push(vec![0.0; 512]);
    rows.push(vec![-0.0; 512]);
    // Exact halves: rounding to even shows.
    rows.push((0..512).map(|i| if i % 16 == 0 { 127.0 } else { (i % 100) as f32 + 0.5 }).collect());
    rows.push((0..512).map(|i| if i == 0 { 1e-37 } else { 1e-39 }).collect());
    rows.push((0..512).map(|i| f32::MAX * if i % 2 == 0 { 1.0 } else { -1.0 }).collect());
    for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE / 2.0] {
        for at in [0, 17, 255, 511] {
            let mut row = vec![0.5; 512];
            row[at] = special;
            rows.push(row);
        }
    }
    rows
}

#[test]
fn activation_encoding_is_the_same_everywhere_and_within_half_a_step() {
    for format in [QuantFormat::F32, QuantFormat::Q8_0, QuantFormat::Q4_K] {
        for x in activation_rows() {
            let mut oracle = ActivationBuf::new();
            CpuKernels::SCALAR.quantize_activations(format, &x, x.len(), &mut oracle);
            let decoded = decode_activations(&oracle, 0);
            let per_block = oracle.format().block().0;
            for (x, decoded) in x.chunks(per_block).zip(decoded.chunks(per_block)) {
                let largest = x.iter().fold(0.0, |m: f64, v| m.max(f64::from(v.abs())));
                // Half a step, the rounding of scale and quotient, and blocks too small for a scale count as zero.
                let bound = largest / 254.0 * 1.0001 + if largest < 1.5e-36 { largest } else { 0.0 };
                if x.iter().all(|v| v.is_finite()) {
                    assert!(x.iter().zip(decoded).all(|(x, d)| (f64::from(*x) - d).abs() <= bound), "{x:?} {decoded:?}");
                } else if per_block > 1 {
                    assert!(decoded.iter().all(|d| d.is_nan()), "a value that is not finite must show");
                }
            }
            for kernels in CpuKernels::available() {
                let mut act = ActivationBuf::new();
                kernels.quantize_activations(format, &x, x.len(), &mut act);
                assert_eq!(act.row(0), oracle.row(0), "{} {format}", kernels.name);
            }
        }
    }
}

/// Vectors of every length up to a few registers, with values spread over many magnitudes.
fn vectors(lanes: usize) -> Vec<Vec<f32>> {
    let rng = &mut StdRng::seed_from_u64(5);
    let lengths = (0..70).chain([128, 1000, 4099]);
    lengths
        .map(|n| (0..n * lanes).map(|_| rng.random_range(-1.0..1.0f32) * 10f32.powi(rng.random_range(-6..3))).collect())
        .collect()
}

fn assert_close(name: &str, y: f32, exact: f64, relative: f64, absolute: f64) {
    let bound = relative * exact.abs() + absolute;
    assert!((f64::from(y) - exact).abs() <= bound, "{name}: {y:e} for {exact:e}, bound {bound:e}");
}

#[test]
fn dots_and_axpys_match_f64() {
    for kernels in CpuKernels::available() {
        for v in vectors(3) {
            let n = v.len() / 3;
            let (a, b, c) = (&v[..n], &v[n..2 * n], &v[2 * n..]);
            let exact: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let magnitude: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) * f64::from(*b)).abs()).sum();
            let bound = (n as f64 / 16.0 + 32.0) * ROUNDING * magnitude;
            assert_close(kernels.name, kernels.dot_f32(a, b), exact, 0.0, bound);

            let mut y = c.to_vec();
            kernels.axpy_f32(0.7, a, &mut y);
            for i in 0..n {
                let product = f64::from(0.7f32) * f64::from(a[i]);
                assert_close(kernels.name, y[i], product + f64::from(c[i]), 2.0 * ROUNDING, 2.0 * ROUNDING * product.abs());
            }
        }
    }
}

#[test]
fn norm_silu_softmax_match_f64() {
    // exp within 2 ulp, then at most four more roundings.
    const RELATIVE: f64 = 10.0 * ROUNDING;
    for kernels in CpuKernels::available() {
        for v in vectors(2).into_iter().filter(|v| !v.is_empty()) {
            let n = v.len() / 2;
            let (a, b) = (&v[..n], &v[n..]);
            let mut y = vec![f32::NAN; n];
            kernels.rms_norm(a, b, 1e-6, &mut y);
            let mean = a.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
            for i in 0..n {
                let exact = f64::from(a[i]) / (mean + f64::from(1e-6f32)).sqrt() * f64::from(b[i]);
                assert_close(kernels.name, y[i], exact, 4.0 * ROUNDING, 1e-37);
            }
            kernels.silu_mul(a, b, &mut y);
            for i in 0..n {
                let gate = f64::from(a[i]);
                let exact = gate / (1.0 + (-gate).exp()) * f64::from(b[i]);
                // Beyond the range of exp the vector versions give about 1e-36 instead of less.
                assert_close(kernels.name, y[i], exact, RELATIVE, 1e-33);
            }
            y.copy_from_slice(a);
            y[n / 2] = if n > 2 { f32::NEG_INFINITY } else { y[n / 2] };
            let max = y.iter().fold(f64::NEG_INFINITY, |m, v| m.max(f64::from(*v)));
            let e: Vec<f64> = y.iter().map(|v| (f64::from(*v) - max).exp()).collect();
            // exp of a rounded difference: the rounding of v - max counts as a relative error.
            let difference: Vec<f64> = y.iter().map(|v| (f64::from(*v) - max).abs()).collect();
            kernels.softmax(&mut y);
            let sum: f64 = e.iter().sum();
            for i in 0..n {
                let relative = RELATIVE + if e[i] > 0.0 { difference[i] * ROUNDING } else { 0.0 };
                assert_close(kernels.name, y[i], e[i] / sum, relative, 2e-37);
            }
            if n > 2 {
                assert_eq!(y[n / 2], 0.0, "minus infinity is exactly zero");
            }
        }
        let mut none = [f32::NEG_INFINITY; 5];
        kernels.softmax(&mut none);
        assert!(none.iter().all(|v| v.is_nan()), "{}", kernels.name);
    }
}

#[test]
fn exp_is_accurate_over_its_range() {
    // silu(x) * 1 for x = -t is -t / (1 + e^t): a window on exp from -88 to 88.
    for kernels in CpuKernels::available() {
        let gate: Vec<f32> = (-8800..8800).map(|i| i as f32 / 100.0).collect();
        let mut y = vec![f32::NAN; gate.len()];
        kernels.silu_mul(&gate, &vec![1.0; gate.len()], &mut y);
        for (gate, y) in gate.iter().zip(&y) {
            let g = f64::from(*gate);
            assert_close(kernels.name, *y, g / (1.0 + (-g).exp()), 8.0 * ROUNDING, 1e-38);
        }
    }
}

#[test]
fn half_conversions_are_exact_and_round_to_even() {
    let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let mut between: Vec<f32> = vec![1e30, -1e30, 65519.9, 65520.0, 1e-10, f32::NAN];
    for pair in halves[..0x7C00].windows(2) {
        between.push(f32::midpoint(pair[0].to_f32(), pair[1].to_f32()));
    }
    for kernels in CpuKernels::available() {
        let mut wide = vec![0f32; halves.len()];
        kernels.f16_to_f32(&halves, &mut wide);
        for (h, w) in halves.iter().zip(&wide) {
            assert!(h.to_f32().to_bits() == w.to_bits() || (h.is_nan() && w.is_nan()));
        }
        for src in [&wide, &between] {
            let mut narrow = vec![f16::ZERO; src.len()];
            kernels.f32_to_f16(src, &mut narrow);
            for (s, n) in src.iter().zip(&narrow) {
                assert!(f16::from_f32(*s).to_bits() == n.to_bits() || (s.is_nan() && n.is_nan()), "{}: {s} {n}", kernels.name);
            }
        }
    }
}

#[test]
fn transposing_twice_is_nothing() {
    for (rows, n) in [(1, 1), (5, 3), (16, 16), (33, 7), (100, 1), (1, 9), (0, 4)] {
        let src: Vec<f32> = (0..rows * n).map(|i| i as f32).collect();
        let (mut once, mut twice) = (vec![0.0; rows * n], vec![0.0; rows * n]);
        transpose(&src, rows, n, &mut once);
        for row in 0..rows {
            for i in 0..n {
                assert_eq!(once[i * rows + row], src[row * n + i]);
            }
        }
        transpose(&once, n, rows, &mut twice);
        assert_eq!(src, twice);
    }
}

#[test]
fn activation_buffers_are_reused() {
    let mut act = ActivationBuf::new();
    act.reset(ActivationFormat::Q8_K, 8, 512);
    let held = act.capacity_bytes();
    act.reset(ActivationFormat::F32, 3, 37);
    assert_eq!((act.tokens(), act.cols(), act.all_tokens()), (3, 37, &[0, 1, 2][..]));
    assert_eq!(act.capacity_bytes(), held);
    assert_eq!(act.row(2).len(), 37 * 4);
    assert!(act.rows_mut().all(|row| row.as_ptr().addr() % 64 == 0));
}

/// Rows that are computed together are computed as if each were alone, whatever their number.
#[test]
fn rows_do_not_depend_on_their_neighbours() {
    let rng = &mut StdRng::seed_from_u64(7);
    for format in QuantFormat::ALL.iter().copied() {
        let layout = format.layout();
        let cols = if layout.elems == 1 { 111 } else { 3 * layout.elems as usize };
        let rows = 2 * ROWS + 3;
        let weight = weights(format, rows * cols, Style::Random, rng);
        let x = activations(5 * cols, rng);
        let row_bytes = weight.len() / rows;
        for kernels in CpuKernels::available() {
            let mut act = ActivationBuf::new();
            kernels.quantize_activations(format, &x, cols, &mut act);
            for tokens in [&[3u32][..], &[0, 1, 2, 3, 4]] {
                let mut together = vec![f32::NAN; rows * tokens.len()];
                kernels.matmul_rows(format, &weight, cols, &act, tokens, &mut together);
                let mut alone = Vec::new();
                for row in weight.chunks_exact(row_bytes) {
                    let mut out = vec![f32::NAN; tokens.len()];
                    kernels.matmul_rows(format, row, cols, &act, tokens, &mut out);
                    alone.extend(out);
                }
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&together), bits(&alone), "{format} {}", kernels.name);
            }
        }
    }
}
