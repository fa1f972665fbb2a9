//! Encoding f32 rows into block formats.
//!
//! F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4 follow ggml's reference formulas and give the same bytes as the `gguf`
//! package (tested). Q4_K, Q5_K, Q6_K, Q8_K and IQ4_NL are plain min-max or largest-value encoders without ggml's search for
//! the scale of least error: sound, a little less accurate (tested: error at most a step per weight).
//! Q2_K, Q3_K and IQ4_XS have no encoder.

use super::activation::{ActivationQ8K, encode_q8k};
use super::k_quants::pack_scales;
use super::mxfp4::half_scale;
use super::*;
use crate::error::{Result, RuntimeError};
use half::{bf16, f16 as Half};

/// Encodes one row (or any whole number of blocks).
///
/// # Errors
/// If the format has no encoder, or a value is not finite or beyond what the format's scale can express.
///
/// # Panics
/// If `out` is not exactly `src.len()` elements long.
pub fn quantize_row(format: QuantFormat, src: &[f32], out: &mut [u8]) -> Result<()> {
    let bytes = format.row_bytes(src.len() as u64);
    assert_eq!(bytes, Some(out.len() as u64), "{format}: {} bytes given for {} elements", out.len(), src.len());
    let limit = largest_magnitude(format)?;
    if let Some(v) = src.iter().find(|v| v.is_nan() || v.abs() > limit) {
        return Err(RuntimeError::BadRequest {
            what: "value to quantise",
            found: v.to_string(),
            expected: format!("a finite number of magnitude at most {limit} for {format}"),
        });
    }
    match format {
        QuantFormat::F32 => each(src, out, |x: &[f32; 1]| BlockF32(x[0].to_le_bytes())),
        QuantFormat::F16 => each(src, out, |x: &[f32; 1]| BlockF16(Half::from_f32(x[0]).to_le_bytes())),
        QuantFormat::BF16 => each(src, out, |x: &[f32; 1]| BlockBf16(bf16::from_f32(x[0]).to_le_bytes())),
        QuantFormat::Q4_0 => each(src, out, q4_0),
        QuantFormat::Q4_1 => each(src, out, q4_1),
        QuantFormat::Q5_0 => each(src, out, q5_0),
        QuantFormat::Q5_1 => each(src, out, q5_1),
        QuantFormat::Q8_0 => each(src, out, q8_0),
        QuantFormat::Q4_K => each(src, out, q4_k),
        QuantFormat::Q5_K => each(src, out, q5_k),
        QuantFormat::Q6_K => each(src, out, q6_k),
        QuantFormat::Q8_K => each(src, out, q8_k),
        QuantFormat::IQ4_NL => each(src, out, iq4_nl),
        QuantFormat::MXFP4 => each(src, out, mxfp4),
        QuantFormat::Q2_K | QuantFormat::Q3_K | QuantFormat::IQ4_XS => unreachable!("refused by largest_magnitude"),
    }
    Ok(())
}

/// Largest magnitude the encoder takes: beyond it a scale, a minimum or the value itself would become infinite.
fn largest_magnitude(format: QuantFormat) -> Result<f32> {
    match format {
        QuantFormat::F32 | QuantFormat::MXFP4 => Ok(f32::MAX),
        // For Q8_K just low enough that 127 times the rounded scale stays finite.
        QuantFormat::BF16 | QuantFormat::Q8_K => Ok(bf16::MAX.to_f32()),
        QuantFormat::F16
        | QuantFormat::Q4_0
        | QuantFormat::Q4_1
        | QuantFormat::Q5_0
        | QuantFormat::Q5_1
        | QuantFormat::Q8_0
        | QuantFormat::Q4_K
        | QuantFormat::Q5_K
        | QuantFormat::Q6_K
        | QuantFormat::IQ4_NL => Ok(Half::MAX.to_f32()),
        QuantFormat::Q2_K | QuantFormat::Q3_K | QuantFormat::IQ4_XS => Err(RuntimeError::BadRequest {
            what: "target format",
            found: format.to_string(),
            expected: "a format with an encoder: any but Q2_K, Q3_K, IQ4_XS".to_string(),
        }),
    }
}

fn each<const N: usize, B: Block>(src: &[f32], out: &mut [u8], encode: impl Fn(&[f32; N]) -> B) {
    for (src, out) in src.as_chunks::<N>().0.iter().zip(bytemuck::cast_slice_mut::<u8, B>(out)) {
        *out = encode(src);
    }
}

/// The element of largest magnitude, with its sign; the first of equals.
fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0f32, |best, v| if v.abs() > best.abs() { *v } else { best })
}

fn min_max(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), v| (lo.min(*v), hi.max(*v)))
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn half_bytes(v: f32) -> [u8; 2] {
    Half::from_f32(v).to_le_bytes()
}

/// Code of a value counted in steps, rounded to nearest, within 0..=`max`.
fn code(steps: f64, max: u8) -> u8 {
    // Adding a half and cutting off is how ggml rounds; `as` saturates and sends NaN to 0.
    ((steps + 0.5) as u8).min(max)
}

fn pack_nibbles(codes: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|i| codes[i] & 15 | codes[i + 16] << 4)
}

fn fifth_bits(codes: &[u8; 32]) -> [u8; 4] {
    codes.iter().enumerate().fold(0u32, |bits, (i, c)| bits | u32::from(c >> 4 & 1) << i).to_le_bytes()
}

fn q4_0(x: &[f32; 32]) -> BlockQ4_0 {
    let scale = extreme(x) / -8.0;
    let codes = x.map(|v| code(f64::from(v) * f64::from(inverse(scale)) + 8.0, 15));
    BlockQ4_0 { scale: half_bytes(scale), codes: pack_nibbles(&codes) }
}

fn q5_0(x: &[f32; 32]) -> BlockQ5_0 {
    let scale = extreme(x) / -16.0;
    let codes = x.map(|v| code(f64::from(v) * f64::from(inverse(scale)) + 16.0, 31));
    BlockQ5_0 { scale: half_bytes(scale), high: fifth_bits(&codes), codes: pack_nibbles(&codes) }
}

/// Scale, minimum and codes 0..=`max` for the `_1` formats. ggml computes the steps in f32.
fn scale_min_codes(x: &[f32; 32], max: u8) -> (f32, f32, [u8; 32]) {
    let (low, high) = min_max(x);
    let scale = (high - low) / f32::from(max);
    let codes = x.map(|v| (((v - low) * inverse(scale) + 0.5) as u8).min(max));
    (scale, low, codes)
}

fn q4_1(x: &[f32; 32]) -> BlockQ4_1 {
    let (scale, min, codes) = scale_min_codes(x, 15);
    BlockQ4_1 { scale: half_bytes(scale), min: half_bytes(min), codes: pack_nibbles(&codes) }
}

fn q5_1(x: &[f32; 32]) -> BlockQ5_1 {
    let (scale, min, codes) = scale_min_codes(x, 31);
    BlockQ5_1 { scale: half_bytes(scale), min: half_bytes(min), high: fifth_bits(&codes), codes: pack_nibbles(&codes) }
}

fn q8_0(x: &[f32; 32]) -> BlockQ8_0 {
    let scale = extreme(x).abs() / 127.0;
    BlockQ8_0 { scale: half_bytes(scale), codes: x.map(|v| (v * inverse(scale)).round() as i8) }
}

/// Scale and minimum (as a positive number to subtract) of sub-blocks, as multiples of two f16 numbers, at most 63 of each.
struct SubScales {
    scale: Half,
    min: Half,
    scales: [u8; 8],
    mins: [u8; 8],
}

/// Min-max fit of eight sub-blocks of 32 to codes 0..=`code_max`. The minimum is never above zero, as the format requires.
fn fit_sub_scales(x: &[f32; 256], code_max: u8) -> SubScales {
    let mut steps = [0f32; 8];
    let mut depths = [0f32; 8];
    for ((step, depth), x) in steps.iter_mut().zip(&mut depths).zip(x.as_chunks::<32>().0) {
        let (low, high) = min_max(x);
        *depth = -low.min(0.0);
        *step = (high.max(0.0) + *depth) / f32::from(code_max);
    }
    let (scale, scales) = six_bits(steps);
    let (min, mins) = six_bits(depths);
    SubScales { scale, min, scales, mins }
}

/// Non-negative numbers as one f16 times 6-bit integers.
fn six_bits(v: [f32; 8]) -> (Half, [u8; 8]) {
    let unit = Half::from_f32(extreme(&v) / 63.0);
    let inverse = inverse(unit.to_f32());
    (unit, v.map(|v| code(f64::from(v * inverse), 63)))
}

fn sub_scaled_codes(x: &[f32; 256], fit: &SubScales, code_max: u8) -> [u8; 256] {
    std::array::from_fn(|i| {
        let step = fit.scale.to_f32() * f32::from(fit.scales[i / 32]);
        let depth = fit.min.to_f32() * f32::from(fit.mins[i / 32]);
        code(f64::from((x[i] + depth) * inverse(step)), code_max)
    })
}

/// Nibbles in the order of Q4_K and Q5_K.
fn pack_k_nibbles(codes: &[u8; 256]) -> [u8; 128] {
    std::array::from_fn(|i| {
        let first = 64 * (i / 32) + i % 32;
        codes[first] & 15 | codes[first + 32] << 4
    })
}

fn q4_k(x: &[f32; 256]) -> BlockQ4K {
    let fit = fit_sub_scales(x, 15);
    let codes = sub_scaled_codes(x, &fit, 15);
    BlockQ4K {
        scale: fit.scale.to_le_bytes(),
        min: fit.min.to_le_bytes(),
        scales: pack_scales(fit.scales, fit.mins),
        codes: pack_k_nibbles(&codes),
    }
}

fn q5_k(x: &[f32; 256]) -> BlockQ5K {
    let fit = fit_sub_scales(x, 31);
    let codes = sub_scaled_codes(x, &fit, 31);
    BlockQ5K {
        scale: fit.scale.to_le_bytes(),
        min: fit.min.to_le_bytes(),
        scales: pack_scales(fit.scales, fit.mins),
        high: std::array::from_fn(|i| (0..8).fold(0, |bits, s| bits | (codes[32 * s + i] >> 4 & 1) << s)),
        codes: pack_k_nibbles(&codes),
    }
}

fn q6_k(x: &[f32; 256]) -> BlockQ6K {
    let steps: [f32; 16] = std::array::from_fn(|g| extreme(&x[16 * g..16 * g + 16]) / -32.0);
    let unit = Half::from_f32(extreme(&steps) / -128.0);
    let unit_inverse = inverse(unit.to_f32());
    let scales = steps.map(|s| (s * unit_inverse).round_ties_even() as i8);
    let codes: [u8; 256] = std::array::from_fn(|i| {
        let step = unit.to_f32() * f32::from(scales[i / 16]);
        code(f64::from(x[i] * inverse(step)) + 32.0, 63)
    });
    BlockQ6K {
        low: std::array::from_fn(|i| {
            let first = 128 * (i / 64) + i % 64;
            codes[first] & 15 | codes[first + 64] << 4
        }),
        high: std::array::from_fn(|i| {
            let first = 128 * (i / 32) + i % 32;
            (0..4).fold(0, |bits, k| bits | codes[first + 32 * k] >> 4 << (2 * k))
        }),
        scales,
        scale: unit.to_le_bytes(),
    }
}

fn q8_k(x: &[f32; 256]) -> BlockQ8K {
    let mut block = [<ActivationQ8K as bytemuck::Zeroable>::zeroed()];
    encode_q8k(x, &mut block);
    let [b] = block;
    BlockQ8K { scale: b.scale.to_le_bytes(), codes: b.codes, sums: b.sums.map(i16::to_le_bytes) }
}

/// The largest value maps to the table's largest entry, -127; every code is the nearest table value.
fn iq4_nl(x: &[f32; 32]) -> BlockIq4Nl {
    let scale = Half::from_f32(extreme(x) / -127.0);
    let inverse = inverse(scale.to_f32());
    BlockIq4Nl { scale: scale.to_le_bytes(), codes: pack_nibbles(&x.map(|v| nearest(&IQ4_VALUES, v * inverse))) }
}

/// Index of the nearest table value; the first of equals.
fn nearest(table: &[i8; 16], v: f32) -> u8 {
    let error = |i: u8| (f32::from(table[usize::from(i)]) - v).abs();
    (1..16).fold(0, |best, i| if error(i) < error(best) { i } else { best })
}

fn mxfp4(x: &[f32; 32]) -> BlockMxfp4 {
    let largest = extreme(x).abs();
    // The largest code value is 6 = 1.5 * 2^2, so the block's exponent is two below that of its largest weight.
    let exponent = if largest > 0.0 { (largest.log2().floor() + 125.0).clamp(0.0, 254.0) as u8 } else { 0 };
    let scale = half_scale(exponent);
    // Distances are compared in the values' own unit, as ggml does: dividing would round differently.
    let codes = x.map(|v| {
        let error = |i: u8| (scale * f32::from(MXFP4_VALUES[usize::from(i)]) - v).abs();
        (1..16).fold(0, |best, i| if error(i) < error(best) { i } else { best })
    });
    BlockMxfp4 { exponent, codes: pack_nibbles(&codes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// Largest error of one weight as a share of the largest magnitude of its block.
    ///
    /// Half a step where codes are rounded to nearest (a step is 1/8 of the largest magnitude in Q4_0, 1/16 in Q5_0, 1/127 in
    /// Q8_0, up to 2/15 and 2/31 with a minimum), a whole step where the code range is one short at one end (`_0` formats).
    /// K formats also round each sub-block's scale and minimum to 1/63 of the largest (Q6_K: 1/128), which shifts the far end of
    /// a sub-block by up to half a step each. IQ4_NL: half its widest gap, 24/127, and one end short. MXFP4: the largest code is
    /// 6 and values up to 8 fall on it, so a quarter of the largest. F16 scales add 2^-11 throughout.
    fn error_bound(format: QuantFormat) -> f32 {
        let share = match format {
            QuantFormat::F32 => return 0.0,
            QuantFormat::F16 => 1.0 / 2048.0,
            QuantFormat::BF16 => 1.0 / 256.0,
            QuantFormat::Q4_0 => 1.0 / 8.0,
            QuantFormat::Q5_0 => 1.0 / 16.0,
            QuantFormat::Q4_1 => 1.0 / 15.0,
            QuantFormat::Q5_1 => 1.0 / 31.0,
            QuantFormat::Q8_0 | QuantFormat::Q8_K => 0.5 / 127.0,
            QuantFormat::Q4_K => 2.0 / 15.0,
            QuantFormat::Q5_K => 2.0 / 31.0,
            QuantFormat::Q6_K => 1.5 / 32.0,
            QuantFormat::IQ4_NL => 14.0 / 127.0,
            QuantFormat::MXFP4 => 1.0 / 4.0,
            QuantFormat::Q2_K | QuantFormat::Q3_K | QuantFormat::IQ4_XS => return f32::NAN,
        };
        share + 1.0 / 1024.0
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn decoding_what_was_encoded_is_within_a_step(seed: u64, size in -2i32..4, shift in -1f32..1.0) {
            let rng = &mut StdRng::seed_from_u64(seed);
            let size = 10f32.powi(size);
            let src: Vec<f32> = (0..512).map(|_| size * (shift + rng.random_range(-1.0..1.0f32))).collect();
            for format in QuantFormat::ALL.iter().copied().filter(|f| !error_bound(*f).is_nan()) {
                let mut bytes = vec![0; format.row_bytes(512).unwrap() as usize];
                quantize_row(format, &src, &mut bytes).unwrap();
                let mut back = vec![f32::NAN; 512];
                dequantize_row(format, &bytes, &mut back);
                let per_block = format.layout().elems as usize;
                for (src, back) in src.chunks(per_block).zip(back.chunks(per_block)) {
                    // The last term is half the smallest F16.
                    let bound = error_bound(format) * extreme(src).abs() + 3e-8;
                    for (s, b) in src.iter().zip(back) {
                        prop_assert!((s - b).abs() <= bound, "{format}: {s} became {b}, bound {bound}");
                    }
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for format in QuantFormat::ALL.iter().copied().filter(|f| !error_bound(*f).is_nan()) {
            let mut bytes = vec![0xFF; format.row_bytes(256).unwrap() as usize];
            quantize_row(format, &[0.0; 256], &mut bytes).unwrap();
            let mut back = [f32::NAN; 256];
            dequantize_row(format, &bytes, &mut back);
            assert!(back.iter().all(|v| *v == 0.0), "{format}: {back:?}");
        }
    }

    #[test]
    fn what_cannot_be_encoded_is_refused() {
        let mut bytes = [0; 1024];
        for format in QuantFormat::ALL.iter().copied() {
            let bytes = &mut bytes[..format.row_bytes(256).unwrap() as usize];
            if error_bound(format).is_nan() {
                let message = quantize_row(format, &[0.0; 256], bytes).unwrap_err().to_string();
                assert!(message.contains(format.name()), "{message}");
                continue;
            }
            let limit = largest_magnitude(format).unwrap();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -limit.next_up()] {
                let mut src = [0.25; 256];
                src[77] = bad;
                quantize_row(format, &src, bytes).unwrap_err();
            }
            // The largest magnitudes allowed decode to finite numbers.
            let src: [f32; 256] = std::array::from_fn(|i| if i % 3 == 0 { -limit } else { limit });
            quantize_row(format, &src, bytes).unwrap();
            let mut back = [f32::NAN; 256];
            dequantize_row(format, bytes, &mut back);
            assert!(back.iter().all(|v| v.is_finite()), "{format}");
        }
    }
}
