//! CPU kernels chosen at run time: the inner loops of the executor, once per instruction set.
//!
//! [`CpuKernels`] is a table of function pointers, one per operation and weight format. A table for an instruction set can
//! only be made from a proof that the processor has it ([`Avx2`], [`Avx512`]), so its methods are safe to call. Formats and
//! operations without a vector version use the scalar one. Adding an instruction set: one proof, one constructor, one folder.
//!
//! Properties that hold for every table and are tested:
//! * integer products inside a block are exact, so quantised results differ from the scalar ones by f32 summation order only;
//! * the value for a token does not depend on the other tokens computed with it. [`CpuKernels::matmul_rows`] gives the same bits
//!   for any number of them; [`CpuKernels::gemm`] chooses a kernel by their number, which may change the order of additions.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod activations;
mod attention;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod attention_vector;
mod gemm;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod gemm_float;
mod scalar;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
pub use aarch64::{DotProd, I8mm, Neon};
pub use activations::ActivationBuf;
pub use attention::{AttentionTile, BLOCK, KvFloats, MAX_BLOCKS, TILE_ROWS, WIDTH_STEP};
pub use gemm::GemmScratch;
#[cfg(target_arch = "x86_64")]
pub use x86::{Amx, Avx2, Avx512, AvxVnni};

use crate::error::{Result, RuntimeError};
use crate::quant::{ActivationFormat, ActivationQ8_1, ActivationQ8K, BlockQ8_0, activation_format};
use gemm::{Gemm, GemmTask};
use half::f16;
use std::sync::OnceLock;
use tierwise_cost::quant::QuantFormat;

/// Tokens that share one pass over a weight row.
const TILE: usize = 4;

/// Weight rows are taken in groups of about this many bytes, so that a group stays in the L2 cache while all tokens pass.
const GROUP_BYTES: usize = 128 << 10;

/// Dot products of one encoded weight row with `T` encoded activation rows of the same length.
type RowDot<const T: usize> = unsafe fn(&[u8], [&[u8]; T]) -> [f32; T];

/// How far ahead of the row in work weights are fetched. Measured: without it one token's product reads at 0.75 of the rate of
/// a plain read, because a row's work outlasts what the processor fetches ahead by itself.
const PREFETCH_BYTES: usize = 2 << 10;

/// Asks the processor to bring `bytes` to the nearest cache.
#[inline(always)]
fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which reads nothing and needs no feature beyond x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// Dot products of [`ROWS`] encoded weight rows, one after the other, with one activation row.
type RowsDot = unsafe fn(&[u8], &[u8]) -> [f32; ROWS];

/// Weight rows that share the preparation of one token, where a kernel does that.
const ROWS: usize = 4;

/// The row kernels of one format.
#[derive(Clone, Copy)]
struct RowDots {
    one: RowDot<1>,
    tile: RowDot<TILE>,
    /// For one token and several rows: the same bits as `one` for each.
    several: Option<RowsDot>,
    /// With one token the kernels fetch weights ahead by themselves.
    fetches: bool,
}

const NUM_FORMATS: usize = QuantFormat::ALL.len();

/// Kernels for many tokens, each with the number of tokens from which on it is the fastest; ascending.
type GemmSteps = [Option<(usize, Gemm)>; 2];

/// What [`CpuKernels::best`] gives.
static BEST: OnceLock<CpuKernels> = OnceLock::new();

/// Index of a format in a table of [`NUM_FORMATS`] entries.
const fn index(format: QuantFormat) -> usize {
    format as usize
}

/// A table with `of(format)` for every format.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn per_format(of: impl Fn(QuantFormat) -> RowDots) -> [RowDots; NUM_FORMATS] {
    let mut table = CpuKernels::SCALAR.dots;
    for format in QuantFormat::ALL {
        table[index(*format)] = of(*format);
    }
    table
}

/// Whether products of this format with many tokens have kernels of their own: AVX2, AVX-512, AMX. Without, those for few tokens run.
#[cfg(target_arch = "x86_64")]
pub fn many_token_kernels(format: QuantFormat) -> [bool; 3] {
    x86::many_token_kernels(index(format))
}

/// The activation rows of a tile as blocks, as many as the weight row has.
// A plain loop, always inlined: then the compiler knows all lengths equal `blocks` and drops the checks in the inner loops.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
fn activation_blocks<A: bytemuck::Pod, const T: usize>(x: [&[u8]; T], blocks: usize) -> [&[A]; T] {
    let mut rows: [&[A]; T] = [&[]; T];
    for t in 0..T {
        rows[t] = &bytemuck::cast_slice(x[t])[..blocks];
    }
    rows
}

/// The kernels of one instruction set. Cheap to copy; every method may be called from several threads at once.
///
/// The pointers are `unsafe fn` because most need processor features; each table is only built where they are present.
#[derive(Clone, Copy)]
pub struct CpuKernels {
    /// `scalar`, `avx2`, `avxvnni`, `avx512` or `amx`; `neon`, `dotprod` or `i8mm`.
    pub name: &'static str,
    dots: [RowDots; NUM_FORMATS],
    gemm: [GemmSteps; NUM_FORMATS],
    encode_q8_1: unsafe fn(&[f32], &mut [ActivationQ8_1]),
    encode_q8k: unsafe fn(&[f32], &mut [ActivationQ8K]),
    attend: unsafe fn(&mut AttentionTile<'_>),
    axpy_f32: unsafe fn(f32, &[f32], &mut [f32]),
    rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    silu_mul: unsafe fn(&[f32], &[f32], &mut [f32]),
    softmax: unsafe fn(&mut [f32]),
    f32_to_f16: unsafe fn(&[f32], &mut [f16]),
    f16_to_f32: unsafe fn(&[f16], &mut [f32]),
    q8_0_to_f32: unsafe fn(&[BlockQ8_0], &mut [f32]),
}

impl std::fmt::Debug for CpuKernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("CpuKernels").field(&self.name).finish()
    }
}

impl CpuKernels {
    /// Plain Rust: works everywhere, and is what the others are tested against.
    pub const SCALAR: Self = Self {
        name: "scalar",
        dots: {
            let mut table = [scalar::row_dots(QuantFormat::F32); NUM_FORMATS];
            let mut i = 0;
            while i < NUM_FORMATS {
                table[index(QuantFormat::ALL[i])] = scalar::row_dots(QuantFormat::ALL[i]);
                i += 1;
            }
            table
        },
        gemm: [[None; 2]; NUM_FORMATS],
        encode_q8_1: crate::quant::encode_q8_1,
        encode_q8k: crate::quant::encode_q8k,
        attend: attention::attend,
        axpy_f32: scalar::axpy_f32,
        rms_norm: scalar::rms_norm,
        silu_mul: scalar::silu_mul,
        softmax: scalar::softmax,
        f32_to_f16: scalar::f32_to_f16,
        f16_to_f32: scalar::f16_to_f32,
        q8_0_to_f32: scalar::q8_0_to_f32,
    };

    /// 256-bit vectors.
    #[cfg(target_arch = "x86_64")]
    pub fn avx2(proof: Avx2) -> Self {
        x86::avx2_kernels(proof)
    }

    /// 256-bit vectors with 8-bit integer dot products.
    #[cfg(target_arch = "x86_64")]
    pub fn avx_vnni(proof: AvxVnni) -> Self {
        x86::avx_vnni_kernels(proof)
    }

    /// 512-bit vectors with 8-bit integer dot products.
    #[cfg(target_arch = "x86_64")]
    pub fn avx512(proof: Avx512) -> Self {
        x86::avx512_kernels(proof)
    }

    /// As [`Self::avx512`], products of many tokens on the matrix unit.
    #[cfg(target_arch = "x86_64")]
    pub fn amx(proof: Amx) -> Self {
        x86::amx_kernels(proof)
    }

    /// 128-bit vectors.
    #[cfg(target_arch = "aarch64")]
    pub fn neon(proof: Neon) -> Self {
        aarch64::neon_kernels(proof)
    }

    /// 128-bit vectors with 8-bit integer dot products.
    #[cfg(target_arch = "aarch64")]
    pub fn dotprod(proof: DotProd) -> Self {
        aarch64::dotprod_kernels(proof)
    }

    /// As [`Self::dotprod`], products of many tokens by 8-bit matrix products.
    #[cfg(target_arch = "aarch64")]
    pub fn i8mm(proof: I8mm) -> Self {
        aarch64::i8mm_kernels(proof)
    }

    /// Every table this processor can run, slowest first; the first is always [`Self::SCALAR`].
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut, reason = "other processors have one table")]
        let mut tables = vec![Self::SCALAR];
        #[cfg(target_arch = "x86_64")]
        {
            tables.extend(Avx2::new().map(Self::avx2));
            tables.extend(AvxVnni::new().map(Self::avx_vnni));
            tables.extend(Avx512::new().map(Self::avx512));
            tables.extend(Amx::new().map(Self::amx));
        }
        #[cfg(target_arch = "aarch64")]
        {
            tables.extend(Neon::new().map(Self::neon));
            tables.extend(DotProd::new().map(Self::dotprod));
            tables.extend(I8mm::new().map(Self::i8mm));
        }
        tables
    }

    /// The fastest table this processor can run, detected once, or the one of [`Self::use_only`].
    pub fn best() -> &'static Self {
        BEST.get_or_init(|| Self::available().pop().unwrap_or(Self::SCALAR))
    }

    /// Makes the table `name` this process's [`Self::best`], to compare instruction sets on one machine.
    ///
    /// # Errors
    /// When this processor cannot run it, or another one is in use already.
    pub fn use_only(name: &str) -> Result<()> {
        let refused = |found: String, expected: String| RuntimeError::BadRequest { what: "instruction set", found, expected };
        let tables = Self::available();
        let names = tables.iter().map(|t| t.name).collect::<Vec<_>>().join(", ");
        let Some(table) = tables.into_iter().find(|t| t.name == name) else {
            return Err(refused(name.to_string(), format!("one that this processor has: {names}")));
        };
        let in_use = BEST.get_or_init(|| table).name;
        if in_use == name { Ok(()) } else { Err(refused(name.to_string(), format!("{in_use}, which is in use already"))) }
    }

    /// Encodes activations for weights of `weight`; `act` is reset and grows if it is too small.
    pub fn quantize_activations(
        &self,
        weight: QuantFormat,
        x: &[f32], // [tokens, cols]
        cols: usize,
        act: &mut ActivationBuf,
    ) {
        assert!(cols > 0 && x.len().is_multiple_of(cols), "{} activations are not rows of {cols}", x.len());
        let format = activation_format(weight);
        act.reset(format, x.len() / cols, cols);
        for (x, row) in x.chunks_exact(cols).zip(act.rows_mut()) {
            self.quantize_activation_row(format, x, row);
        }
    }

    /// Encodes one row into one item of [`ActivationBuf::rows_mut`], so that rows can be filled in parallel.
    pub fn quantize_activation_row(
        &self,
        format: ActivationFormat,
        x: &[f32], // [cols]
        row: &mut [u8],
    ) {
        let bytes = format.row_bytes(x.len()).expect("the activation buffer was reset with this length");
        let row = &mut row[..bytes];
        match format {
            ActivationFormat::F32 => row.copy_from_slice(bytemuck::cast_slice(x)),
            // SAFETY: this table was built with proof that the processor has the features its functions need.
            ActivationFormat::Q8_1 => unsafe { (self.encode_q8_1)(x, bytemuck::cast_slice_mut(row)) },
            // SAFETY: as above.
            ActivationFormat::Q8_K => unsafe { (self.encode_q8k)(x, bytemuck::cast_slice_mut(row)) },
        }
    }

    /// `out[row][i] = weight row . activation row tokens[i]`, for every row in `weight`.
    ///
    /// The output lies row by row of the *weight*, so any split of the rows splits `weight` and `out` into matching
    /// contiguous pieces for threads; [`transpose`] turns the whole into `[tokens, rows]`. With one token `out` is `y[rows]`.
    ///
    /// # Panics
    /// If lengths disagree or `act` does not hold `activation_format(format)` of `cols`.
    pub fn matmul_rows(
        &self,
        format: QuantFormat,
        weight: &[u8], // [rows, cols], encoded
        cols: usize,
        act: &ActivationBuf,
        tokens: &[u32],  // [n] rows of `act`
        out: &mut [f32], // [rows, n]
    ) {
        let row_bytes = check_sizes(format, weight, cols, act, tokens, out);
        let n = tokens.len();
        if n == 0 {
            return;
        }
        let dots = &self.dots[index(format)];
        let group = (GROUP_BYTES / row_bytes).max(1);
        let mut ahead = weight.get(PREFETCH_BYTES..).unwrap_or_default().chunks(row_bytes);
        for (weight, out) in weight.chunks(group * row_bytes).zip(out.chunks_mut(group * n)) {
            for (tile, at) in tokens.chunks(TILE).zip((0..).step_by(TILE)) {
                // The first tokens take the weights from memory, the others from the cache.
                let mut fetch = || {
                    if at == 0 {
                        prefetch(ahead.next().unwrap_or_default());
                    }
                };
                if let [token] = tile {
                    let x = [act.row(*token)];
                    let mut done = 0;
                    if let Some(several) = dots.several {
                        let quads = weight.chunks_exact(ROWS * row_bytes).zip(out.chunks_exact_mut(ROWS * n));
                        for (weight, out) in quads {
                            // SAFETY: this table was built with proof that the processor has the features it needs.
                            let y = unsafe { several(weight, x[0]) };
                            y.iter().enumerate().for_each(|(r, y)| out[r * n + at] = *y);
                            done += ROWS;
                        }
                    }
                    let rows = weight.chunks_exact(row_bytes).zip(out.chunks_exact_mut(n)).skip(done);
                    for (weight, out) in rows {
                        if !dots.fetches {
                            fetch();
                        }
                        // SAFETY: this table was built with proof that the processor has the features it needs.
                        let y = unsafe { (dots.one)(weight, x) };
                        out[at] = y[0];
                    }
                } else {
                    // A last tile of two or three is filled up with its first token; the surplus results are dropped.
                    let x = std::array::from_fn(|i| act.row(*tile.get(i).unwrap_or(&tile[0])));
                    for (weight, out) in weight.chunks_exact(row_bytes).zip(out.chunks_exact_mut(n)) {
                        fetch();
                        // SAFETY: as above.
                        let y = unsafe { (dots.tile)(weight, x) };
                        out[at..at + tile.len()].copy_from_slice(&y[..tile.len()]);
                    }
                }
            }
        }
    }

    /// As [`Self::matmul_rows`], with a kernel for many tokens where there is one and they are enough.
    ///
    /// A value may then differ from that of a smaller batch by the order of f32 additions over the blocks of a row; it still
    /// does not depend on the other tokens' values, on their order or on how the rows are cut.
    ///
    /// # Panics
    /// As [`Self::matmul_rows`].
    #[expect(clippy::too_many_arguments, reason = "one matrix product")]
    pub fn gemm(
        &self,
        format: QuantFormat,
        weight: &[u8], // [rows, cols], encoded
        cols: usize,
        act: &ActivationBuf,
        tokens: &[u32], // [n] rows of `act`
        scratch: &mut GemmScratch,
        out: &mut [f32], // [rows, n]
    ) {
        let mut steps = self.gemm[index(format)].iter().flatten();
        let Some((_, kernel)) = steps.rfind(|(from, _)| tokens.len() >= *from) else {
            return self.matmul_rows(format, weight, cols, act, tokens, out);
        };
        let row_bytes = check_sizes(format, weight, cols, act, tokens, out);
        // SAFETY: this table was built with proof that the processor has the features its functions need.
        unsafe { kernel(GemmTask { weight, row_bytes, act, tokens, out }, scratch) }
    }

    /// Sum of products.
    pub fn dot_f32(&self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len(), "dot product of unequal lengths");
        let dot = self.dots[index(QuantFormat::F32)].one;
        // SAFETY: this table was built with proof that the processor has the features its functions need.
        let [y] = unsafe { dot(bytemuck::cast_slice(a), [bytemuck::cast_slice(b)]) };
        y
    }

    /// `y += a * x`.
    pub fn axpy_f32(&self, a: f32, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "vectors of unequal lengths");
        // SAFETY: as in `dot_f32`.
        unsafe { (self.axpy_f32)(a, x, y) }
    }

    /// `out = x / sqrt(mean(x^2) + eps) * weight`, the mean taken in f64.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == weight.len() && x.len() == out.len(), "vectors of unequal lengths");
        // SAFETY: as in `dot_f32`.
        unsafe { (self.rms_norm)(x, weight, eps, out) }
    }

    /// `out = gate / (1 + exp(-gate)) * up`.
    pub fn silu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == up.len() && gate.len() == out.len(), "vectors of unequal lengths");
        // SAFETY: as in `dot_f32`.
        unsafe { (self.silu_mul)(gate, up, out) }
    }

    /// `x = exp(x - max) / sum`, in place. Minus infinity becomes 0; without a finite element the result is NaN.
    pub fn softmax(&self, x: &mut [f32]) {
        // SAFETY: as in `dot_f32`.
        unsafe { (self.softmax)(x) }
    }

    /// Rounds to nearest even.
    pub fn f32_to_f16(&self, src: &[f32], out: &mut [f16]) {
        assert_eq!(src.len(), out.len(), "vectors of unequal lengths");
        // SAFETY: as in `dot_f32`.
        unsafe { (self.f32_to_f16)(src, out) }
    }

    /// Widens exactly.
    pub fn f16_to_f32(&self, src: &[f16], out: &mut [f32]) {
        assert_eq!(src.len(), out.len(), "vectors of unequal lengths");
        // SAFETY: as in `dot_f32`.
        unsafe { (self.f16_to_f32)(src, out) }
    }

    /// Decodes blocks.
    pub fn q8_0_to_f32(&self, src: &[BlockQ8_0], out: &mut [f32]) {
        assert_eq!(32 * src.len(), out.len(), "vectors of unequal lengths");
        // SAFETY: as in `dot_f32`.
        unsafe { (self.q8_0_to_f32)(src, out) }
    }
}

/// Panics unless the operands of a product fit; bytes of a weight row.
fn check_sizes(format: QuantFormat, weight: &[u8], cols: usize, act: &ActivationBuf, tokens: &[u32], out: &[f32]) -> usize {
    assert_eq!(act.format(), activation_format(format), "activations are encoded for another format than {format}");
    assert_eq!(act.cols(), cols, "activations and weights differ in length");
    let row_bytes = format.row_bytes(cols as u64).expect("columns are whole blocks: checked when the file was read") as usize;
    assert!(row_bytes > 0 && weight.len().is_multiple_of(row_bytes), "{} bytes are not rows of {row_bytes}", weight.len());
    assert_eq!(out.len(), weight.len() / row_bytes * tokens.len(), "output is not rows x tokens");
    row_bytes
}

/// Turns the `[rows, n]` output of [`CpuKernels::matmul_rows`] into `[n, rows]`.
pub fn transpose(
    src: &[f32], // [rows, n]
    rows: usize,
    n: usize,
    out: &mut [f32], // [n, rows]
) {
    assert!(src.len() == rows * n && out.len() == rows * n, "matrix sizes disagree");
    if n == 0 || rows == 0 {
        return;
    }
    // Bands of 16 source rows: one output cache line per token is filled while it is in L1.
    for (band, src) in src.chunks(16 * n).enumerate() {
        for (i, out) in out.chunks_exact_mut(rows).enumerate() {
            for (out, src) in out[16 * band..].iter_mut().zip(src.iter().skip(i).step_by(n)) {
                *out = *src;
            }
        }
    }
}
