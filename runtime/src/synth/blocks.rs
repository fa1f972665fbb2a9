//! Random blocks of every weight format with a given mean and standard deviation.
//!
//! A block is filled with random bits and then its scale fields are overwritten with one of a table of prepared variants:
//! the quants are uniform, the scales make the decoded values have the wanted spread, and minimums (or random signs of scales)
//! make them centred. Layouts are those of ggml (`ggml-common.h`).

use half::{bf16, f16};
use tierwise_cost::quant::QuantFormat;

/// SplitMix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
pub(super) const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// SplitMix64: a counter through [`mix`]. Small, fast, the same everywhere; not for secrets.
pub(super) struct Rng(u64);

impl Rng {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A whole number below `n`; the bias of a remainder of 64 bits does not matter here.
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Uniform in (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller).
    fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        let mut words = bytes.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
        let rest = words.into_remainder();
        let last = self.next().to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// Prepared variants of scale fields; few enough to stay in the first-level cache.
const NUM_VARIANTS: usize = 64;
/// Prepared values of plain formats.
const NUM_VALUES: usize = 4096;

/// A source of random blocks of one format, mean and standard deviation.
pub(super) enum BlockSource {
    /// Elements of `width` bytes drawn from a table of normal values.
    Plain {
        /// Encoded values, one after another.
        values: Vec<u8>,
        /// Bytes of a value: 2 or 4.
        width: usize,
    },
    /// Blocks of random bits with prepared scale fields.
    Blocked {
        /// Bytes of a block.
        block_bytes: usize,
        /// Where the scale fields lie in a block: start and end.
        fields: &'static [(usize, usize)],
        /// For each variant the fields' bytes, one after another.
        variants: Vec<Vec<u8>>,
        /// Quants are signed bytes, and -128 is not one that a quantiser makes.
        signed_bytes: bool,
    },
}

impl BlockSource {
    /// `None` for a format that no weight is stored in, and for a mean other than 0 in a block format.
    pub(super) fn new(format: QuantFormat, mean: f32, std: f32, seed: u64) -> Option<Self> {
        let mut rng = Rng::new(seed);
        if let Some(width) = plain_width(format) {
            return Some(Self::Plain { values: plain_values(format, mean, std, &mut rng), width });
        }
        if mean != 0.0 {
            return None;
        }
        let fields = scale_fields(format)?;
        let variants = (0..NUM_VARIANTS).map(|number| scale_variant(format, std, number, &mut rng)).collect();
        let block_bytes = format.layout().bytes as usize;
        Some(Self::Blocked { block_bytes, fields, variants, signed_bytes: format == QuantFormat::Q8_0 })
    }

    /// Fills whole blocks; the bytes depend on the source and the seed alone.
    pub(super) fn fill(&self, out: &mut [u8], seed: u64) {
        let mut rng = Rng::new(seed);
        match self {
            Self::Plain { values, width: 2 } => fill_plain::<2>(out, values, &mut rng),
            Self::Plain { values, .. } => fill_plain::<4>(out, values, &mut rng),
            Self::Blocked { block_bytes, fields, variants, signed_bytes } => {
                rng.fill(out);
                if *signed_bytes {
                    for byte in out.iter_mut() {
                        *byte = if *byte == 0x80 { 0 } else { *byte };
                    }
                }
                for block in out.chunks_exact_mut(*block_bytes) {
                    let variant = &variants[(rng.next() >> 32) as usize % NUM_VARIANTS];
                    let mut rest = variant.as_slice();
                    for (start, end) in *fields {
                        let (bytes, tail) = rest.split_at(end - start);
                        block[*start..*end].copy_from_slice(bytes);
                        rest = tail;
                    }
                }
            }
        }
    }
}

fn fill_plain<const W: usize>(out: &mut [u8], values: &[u8], rng: &mut Rng) {
    let (values, _) = values.as_chunks::<W>();
    // 64 random bits choose four values.
    for group in out.chunks_mut(4 * W) {
        let mut bits = rng.next();
        for element in group.chunks_exact_mut(W) {
            element.copy_from_slice(&values[bits as usize % NUM_VALUES]);
            bits >>= 16;
        }
    }
}

const fn plain_width(format: QuantFormat) -> Option<usize> {
    match format {
        QuantFormat::F32 => Some(4),
        QuantFormat::F16 | QuantFormat::BF16 => Some(2),
        _ => None,
    }
}

/// Normal values, shifted and scaled so that the table itself has exactly the wanted mean and standard deviation.
fn plain_values(format: QuantFormat, mean: f32, std: f32, rng: &mut Rng) -> Vec<u8> {
    let raw: Vec<f64> = (0..NUM_VALUES).map(|_| rng.normal()).collect();
    let n = NUM_VALUES as f64;
    let raw_mean = raw.iter().sum::<f64>() / n;
    let raw_std = (raw.iter().map(|x| (x - raw_mean).powi(2)).sum::<f64>() / n).sqrt();
    let mut bytes = Vec::with_capacity(NUM_VALUES * 4);
    for x in raw {
        let value = mean + std * ((x - raw_mean) / raw_std) as f32;
        match format {
            QuantFormat::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
            QuantFormat::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            _ => bytes.extend(value.to_le_bytes()),
        }
    }
    bytes
}

/// Byte ranges (start, end) of a block that hold scales and minimums.
fn scale_fields(format: QuantFormat) -> Option<&'static [(usize, usize)]> {
    use QuantFormat as F;
    Some(match format {
        // d
        F::Q4_0 | F::Q5_0 | F::Q8_0 | F::IQ4_NL => &[(0, 2)],
        // d, m
        F::Q4_1 | F::Q5_1 => &[(0, 4)],
        // scales[16], qs[64], d, dmin
        F::Q2_K => &[(0, 16), (80, 84)],
        // hmask[32], qs[64], scales[12], d
        F::Q3_K => &[(96, 110)],
        // d, dmin, scales[12], qs...
        F::Q4_K | F::Q5_K => &[(0, 16)],
        // ql[128], qh[64], scales[16], d
        F::Q6_K => &[(192, 210)],
        // d, scales_h, scales_l[4], qs[128]
        F::IQ4_XS => &[(0, 8)],
        // e, qs[16]
        F::MXFP4 => &[(0, 1)],
        F::F32 | F::F16 | F::BF16 | F::Q8_K => return None,
    })
}

/// Mean and standard deviation of uniform whole numbers from `0` to `n - 1`.
fn uniform(n: u32) -> (f32, f32) {
    ((n - 1) as f32 / 2.0, ((n * n - 1) as f32 / 12.0).sqrt())
}

/// Root of the mean square of a codebook's values: their spread when signs are random.
fn rms(values: &[f32]) -> f32 {
    (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt()
}

/// Whole scales from `low` to `2 * low - 1`, and the factor that makes their mean square one.
fn scales<const N: usize>(low: u8, rng: &mut Rng) -> ([u8; N], f32) {
    let all: Vec<f32> = (low..2 * low).map(f32::from).collect();
    (std::array::from_fn(|_| low + rng.below(u64::from(low)) as u8), 1.0 / rms(&all))
}

const IQ4_CODEBOOK: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];
const FP4_CODEBOOK: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The bytes of a block's scale fields, one of [`NUM_VARIANTS`] that together have exactly the wanted spread and no bias:
/// half of the signs are negative, and sizes are spaced evenly.
fn scale_variant(format: QuantFormat, std: f32, number: usize, rng: &mut Rng) -> Vec<u8> {
    use QuantFormat as F;
    let half = |x: f32| f16::from_f32(x).to_le_bytes();
    let sign = if number.is_multiple_of(2) { 1.0 } else { -1.0 };
    let place = |i: usize, n: usize| (i as f32 + 0.5) / n as f32;
    // Block scales differ by up to a quarter; E[(1 + u/4)^2] for u uniform in [-1, 1] is 1 + 1/48.
    let spread = (0.75 + 0.5 * place(number / 2, NUM_VARIANTS / 2)) / (1.0f32 + 1.0 / 48.0).sqrt();
    let std = std * spread;
    let mut bytes = Vec::with_capacity(18);
    match format {
        // d * (q - 8), d * (q - 16): off centre by half a step, so d has either sign.
        F::Q4_0 | F::Q5_0 => {
            let n = if format == F::Q4_0 { 16 } else { 32 };
            let (_, unit) = uniform(n);
            bytes.extend(half(sign * std / (unit * unit + 0.25).sqrt()));
        }
        F::Q8_0 => bytes.extend(half(std / rms(&(-127i8..=127).map(f32::from).collect::<Vec<_>>()))),
        F::IQ4_NL => bytes.extend(half(sign * std / rms(&IQ4_CODEBOOK))),
        // d * q + m
        F::Q4_1 | F::Q5_1 => {
            let (centre, unit) = uniform(if format == F::Q4_1 { 16 } else { 32 });
            bytes.extend(half(std / unit));
            bytes.extend(half(-centre * std / unit));
        }
        // d * scale * q - dmin * min, with min = scale: centred when dmin = d * centre.
        F::Q2_K => {
            let (centre, unit) = uniform(4);
            let (scales, factor) = scales::<16>(8, rng);
            bytes.extend(scales.map(|s| s | s << 4));
            bytes.extend(half(std / unit * factor));
            bytes.extend(half(centre * std / unit * factor));
        }
        F::Q4_K | F::Q5_K => {
            let (centre, unit) = uniform(if format == F::Q4_K { 16 } else { 32 });
            let (scales, factor) = scales::<8>(32, rng);
            bytes.extend(half(std / unit * factor));
            bytes.extend(half(centre * std / unit * factor));
            bytes.extend(pack_k4(scales));
        }
        // d * (scale - 32) * (q - 4): the sign of each scale is random.
        F::Q3_K => {
            let (_, unit) = uniform(8);
            let (scales, factor) = scales::<16>(16, rng);
            bytes.extend(pack_q3(scales.map(|s| signed_scale(s, rng))));
            bytes.extend(half(std / (unit * unit + 0.25).sqrt() * factor));
        }
        // d * scale * (q - 32), scale a signed byte.
        F::Q6_K => {
            let (_, unit) = uniform(64);
            let (scales, factor) = scales::<16>(64, rng);
            bytes.extend(scales.map(|s| if rng.next() >> 63 == 0 { s } else { s.wrapping_neg() }));
            bytes.extend(half(std / (unit * unit + 0.25).sqrt() * factor));
        }
        // d * (scale - 32) * codebook[q]; two high bits of each of 8 scales, then the low four.
        F::IQ4_XS => {
            let (scales, factor) = scales::<8>(16, rng);
            let scales = scales.map(|s| signed_scale(s, rng));
            bytes.extend(half(std / rms(&IQ4_CODEBOOK) * factor));
            let high = scales.iter().enumerate().fold(0u16, |h, (i, s)| h | u16::from(s >> 4) << (2 * i));
            bytes.extend(high.to_le_bytes());
            bytes.extend(scales.chunks_exact(2).map(|pair| (pair[0] & 15) | (pair[1] & 15) << 4));
        }
        // 2^(e - 127) * codebook[q]: the power of two below or above, so often that the mean square is right.
        F::MXFP4 => {
            let wanted = std / rms(&FP4_CODEBOOK);
            let below = wanted.log2().floor();
            let fraction = (wanted * wanted / below.exp2().powi(2) - 1.0) / 3.0;
            // A permutation of the places, so that this choice does not follow the size.
            let exponent = below as i32 + i32::from(place(number * 29 % NUM_VARIANTS, NUM_VARIANTS) < fraction);
            bytes.push((exponent + 127).clamp(1, 254) as u8);
        }
        F::F32 | F::F16 | F::BF16 | F::Q8_K => {}
    }
    bytes
}

/// A six-bit scale stored with an offset of 32, of magnitude `s` and random sign.
fn signed_scale(s: u8, rng: &mut Rng) -> u8 {
    if rng.next() >> 63 == 0 { 32 + s } else { 32 - s }
}

/// Eight six-bit scales and as many equal minimums in the twelve bytes of Q4_K and Q5_K: the first four of each in the low six
/// bits of their bytes, the rest split into four low bits and two high ones.
fn pack_k4(scales: [u8; 8]) -> [u8; 12] {
    std::array::from_fn(|i| match i {
        0..4 => scales[i] | (scales[i + 4] >> 4) << 6,
        4..8 => scales[i - 4] | (scales[i] >> 4) << 6,
        _ => (scales[i - 4] & 15) | (scales[i - 4] & 15) << 4,
    })
}

/// Sixteen six-bit scales in the twelve bytes of Q3_K: low halves in eight bytes, two high bits each in the last four.
fn pack_q3(scales: [u8; 16]) -> [u8; 12] {
    std::array::from_fn(|i| match i {
        0..8 => (scales[i] & 15) | (scales[i + 8] & 15) << 4,
        _ => (0..4).fold(0, |byte, j| byte | (scales[i - 8 + 4 * j] >> 4) << (2 * j)),
    })
}
