//! Timing products with weights: the runtime's own code on weights that come from memory, not from caches.
//!
//! Matrices lie in a pool that is several times as large as the caches and every run takes the next ones, as the layers of a model
//! follow each other. Weights are one repeated byte: kernels take the same time for all values, and this byte gives ordinary numbers
//! in every format (no denormal, which would be slow; sums may overflow to infinity, which is not).

use crate::error::{Result, RuntimeError};
use crate::exec::experts::{ExpertBuffers, ExpertBytes, ExpertExtras};
use crate::exec::matmul::{Product, run_products};
use crate::exec::model::Matrix;
use crate::exec::prepared::Prepared;
use crate::exec::route::Routing;
use crate::exec::threads::Threads;
use crate::memory::{NodeRegion, PageSize};
use memmap2::MmapMut;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::Bytes;

/// f16 203, bf16 and f32 1.5e16, e8m0 2^-37.
const FILL: u8 = 0x5a;
/// Tensors in GGUF files begin at multiples of this.
const ALIGNMENT: usize = 32;
/// Bytes filled or read at once by one thread.
pub(super) const PIECE: usize = 1 << 20;

/// Memory that stands for a model's weights.
pub(super) struct Pool {
    memory: PoolMemory,
}

/// Wherever the system puts it, or on chosen nodes.
enum PoolMemory {
    Any(MmapMut),
    Nodes(NodeRegion),
}

impl Pool {
    /// `size` bytes, each page first touched by one of the threads that will read it.
    pub(super) fn new(threads: &Threads, size: Bytes) -> Result<Self> {
        let refused = |e: std::io::Error| RuntimeError::BadRequest {
            what: "memory to measure with",
            found: format!("{size} refused ({e})"),
            expected: "a machine with that much free memory".into(),
        };
        let bytes = usize::try_from(size.0).unwrap_or(usize::MAX).max(PIECE);
        let mut map = MmapMut::map_anon(bytes).map_err(refused)?;
        // Mapped model files have small pages; where the system has no huge ones there is nothing to refuse.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::NoHugePage);
        threads.pool().install(|| map.par_chunks_mut(PIECE).for_each(|c| c.fill(FILL)));
        Ok(Self { memory: PoolMemory::Any(map) })
    }

    /// `size` bytes on `nodes`.
    pub(super) fn on(threads: &Threads, size: Bytes, nodes: &[u32]) -> Result<Self> {
        let bytes = usize::try_from(size.0).unwrap_or(usize::MAX).max(PIECE);
        let mut region = NodeRegion::new(bytes, nodes, PageSize::System)?;
        threads.pool().install(|| region.as_mut_slice().par_chunks_mut(PIECE).for_each(|c| c.fill(FILL)));
        Ok(Self { memory: PoolMemory::Nodes(region) })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match &self.memory {
            PoolMemory::Any(map) => map,
            PoolMemory::Nodes(region) => region.as_slice(),
        }
    }

    /// Matrix number `index` of this shape; numbers wrap around.
    fn matrix(&self, format: QuantFormat, rows: usize, cols: usize, index: usize) -> Matrix<'_> {
        let bytes = matrix_bytes(format, rows, cols);
        let stride = bytes.next_multiple_of(ALIGNMENT);
        let memory = self.bytes();
        let start = index % (memory.len() / stride).max(1) * stride;
        Matrix { format, rows, cols, bytes: &memory[start..start + bytes] }
    }

    /// Expert number `index` of this shape.
    fn expert(&self, s: &ExpertShape, index: usize) -> ExpertBytes<'_> {
        let matrix = |rows, cols, i| self.matrix(s.format, rows, cols, 3 * index + i);
        // All three have the same number of bytes, because formats store blocks of equal size.
        ExpertBytes { gate: matrix(s.inner, s.hidden, 0), up: matrix(s.inner, s.hidden, 1), down: matrix(s.hidden, s.inner, 2) }
    }
}

fn matrix_bytes(format: QuantFormat, rows: usize, cols: usize) -> usize {
    let row = format.row_bytes(cols as u64).expect("shapes are whole blocks of every format");
    row as usize * rows
}

/// Buffers shared by all measurements, as a session's are by its layers.
#[derive(Default)]
pub(super) struct Workspace {
    input: Vec<f32>,
    prepared: Prepared,
    experts: ExpertBuffers,
    out: Vec<f32>,
    /// Next matrix or expert of the pool.
    next: usize,
}

impl Workspace {
    fn reserve(&mut self, input: usize, out: usize) {
        if self.input.len() < input {
            self.input.resize(input, 1.0);
        }
        if self.out.len() < out {
            self.out.resize(out, 0.0);
        }
    }
}

/// What an expert looks like.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpertShape {
    pub(super) format: QuantFormat,
    pub(super) hidden: usize,
    pub(super) inner: usize,
}

/// One layer's experts for some tokens: measured with the routing's irregular group sizes, because kernels work in tiles.
pub(super) struct ExpertWork {
    shape: ExpertShape,
    routing: Routing,
    distinct: usize,
}

impl ExpertWork {
    /// `tokens` per expert on the mean, `distinct` experts, each with at least one token.
    pub(super) fn new(shape: ExpertShape, tokens: usize, distinct: usize) -> Self {
        let experts_per_token = distinct.min(8);
        let rows = tokens * distinct;
        let mut rng = StdRng::seed_from_u64((rows * 1000 + distinct) as u64);
        let mut experts: Vec<u32> = (0..distinct as u32).collect();
        experts.extend((distinct..rows).map(|_| rng.random_range(0..distinct as u32)));
        experts.shuffle(&mut rng);
        let weights = vec![1.0 / experts_per_token as f32; rows];
        Self { shape, routing: Routing { experts, weights, experts_per_token }, distinct }
    }

    pub(super) fn run(&self, threads: &Threads, pool: &Pool, w: &mut Workspace) {
        let ExpertShape { format, hidden, inner } = self.shape;
        let tokens = self.routing.num_tokens();
        w.reserve(tokens * hidden, tokens * hidden);
        w.prepared.invalidate();
        w.prepared.ensure(threads, format, &w.input[..tokens * hidden], hidden);
        w.experts.arrange(&self.routing, inner, hidden, format, false);
        let experts: Vec<(u32, ExpertBytes<'_>)> =
            (0..self.distinct).map(|e| (e as u32, pool.expert(&self.shape, w.next + e))).collect();
        w.next += self.distinct;
        w.experts.compute(threads, &w.prepared, &ExpertExtras::default(), &experts);
        w.experts.combine(threads, &self.routing, &mut w.out[..tokens * hidden], hidden, |_| true);
    }
}

/// A matrix that is no expert's.
#[derive(Debug, Clone, Copy)]
pub(super) struct MatmulWork {
    pub(super) format: QuantFormat,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) tokens: usize,
}

impl MatmulWork {
    pub(super) fn run(&self, threads: &Threads, pool: &Pool, w: &mut Workspace) {
        let Self { format, rows, cols, tokens } = *self;
        w.reserve(tokens * cols, tokens * rows);
        w.prepared.invalidate();
        w.prepared.ensure(threads, format, &w.input[..tokens * cols], cols);
        let weight = pool.matrix(format, rows, cols, w.next);
        w.next += 1;
        let input = w.prepared.get(format);
        let out = &mut w.out[..tokens * rows];
        run_products(threads, vec![Product { weight, bias: None, input, tokens: input.all_tokens(), out }]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_sizes_are_as_asked() {
        let shape = ExpertShape { format: QuantFormat::Q4_K, hidden: 256, inner: 256 };
        for (tokens, distinct) in [(1, 1), (1, 8), (1, 32), (4, 8), (16, 32)] {
            let work = ExpertWork::new(shape, tokens, distinct);
            let mut seen = work.routing.experts.clone();
            assert_eq!(seen.len(), tokens * distinct);
            assert_eq!(work.routing.num_tokens() * work.routing.experts_per_token, seen.len());
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), distinct, "{tokens} tokens for each of {distinct}");
        }
    }

    #[test]
    fn every_format_computes_from_the_pool() {
        let threads = Threads::new(2).expect("threads");
        let pool = Pool::new(&threads, Bytes::mib(4)).expect("memory");
        let mut w = Workspace::default();
        for format in super::super::effort::FORMATS {
            let shape = ExpertShape { format: *format, hidden: 256, inner: 256 };
            threads.pool().install(|| {
                ExpertWork::new(shape, 4, 8).run(&threads, &pool, &mut w);
                assert!(w.out[..4 * 256].iter().all(|x| *x != 0.0), "{format}: nothing was computed");
                MatmulWork { format: *format, rows: 64, cols: 256, tokens: 3 }.run(&threads, &pool, &mut w);
            });
            let by_hand = |x: f32| w.out[..3 * 64].iter().all(|y| *y == x || (*y / x - 1.0).abs() < 0.02);
            if *format == QuantFormat::F32 {
                // 256 times the weight that four fill bytes make.
                assert!(by_hand(256.0 * f32::from_le_bytes([FILL; 4])), "{:?}", w.out[0]);
            }
        }
    }
}
