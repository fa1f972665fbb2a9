//! The slow, obvious back-end: host memory, plain loops, sums in f64. The oracle of the others, and what the hybrid executor is tested
//! with where there is no device. Here is its memory; what operations do with it is in `ops`.
//!
//! Values are rounded to f32 (keys and values to what the cache holds) when an operation stores them, and nowhere else.

mod ops;

use super::check::{check_view, row_bytes};
use super::device::{BufferId, Copier, DeviceBackend, DeviceInfo, View};
use super::op::{DeviceMatrix, DeviceOp};
use crate::error::{Result, RuntimeError};
use crate::quant::dequantize_row;
use std::sync::{Arc, Mutex, MutexGuard};
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::engine::Purpose;

/// Views start at multiples of this, as on most devices.
const ALIGNMENT_BYTES: u64 = 256;

/// The blocks of memory, shared with the copiers.
#[derive(Debug, Default)]
struct Memory {
    blocks: Vec<Vec<u8>>,
    allocated_bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub struct ReferenceBackend {
    info: DeviceInfo,
    memory: Arc<Mutex<Memory>>,
    capacity_bytes: u64,
}

#[derive(Debug)]
struct ReferenceCopier(Arc<Mutex<Memory>>);

fn lock(memory: &Mutex<Memory>) -> MutexGuard<'_, Memory> {
    // A panic while it was held would have left whole values: nothing in here is half done.
    memory.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn device_error(reason: String) -> RuntimeError {
    RuntimeError::Device { device: "reference", reason }
}

impl ReferenceBackend {
    /// A back-end with so much memory.
    pub fn new(capacity_bytes: u64) -> Self {
        let info = DeviceInfo {
            backend: "reference",
            name: "plain loops in host memory".into(),
            driver: String::new(),
            free_bytes: Some(capacity_bytes),
            max_buffer_bytes: capacity_bytes,
            max_expert_bytes: capacity_bytes,
            alignment_bytes: ALIGNMENT_BYTES,
            formats: QuantFormat::ALL.to_vec(),
            features: Vec::new(),
        };
        Self { info, memory: Arc::default(), capacity_bytes }
    }
}

impl DeviceBackend for ReferenceBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&mut self, bytes: u64, what: &str) -> Result<BufferId> {
        let mut memory = lock(&self.memory);
        let free = self.capacity_bytes - memory.allocated_bytes;
        let bytes = bytes.next_multiple_of(4);
        if bytes > free {
            return Err(device_error(format!("{what} needs {bytes} bytes, {free} are free; lower --vram or --context")));
        }
        let len = usize::try_from(bytes).map_err(|_| device_error(format!("{what} needs {bytes} bytes: too many here")))?;
        memory.blocks.push(vec![0; len]);
        memory.allocated_bytes += bytes;
        Ok(BufferId(u32::try_from(memory.blocks.len() - 1).expect("fewer than 2^32 blocks fit in memory")))
    }

    fn allocated_bytes(&self) -> u64 {
        lock(&self.memory).allocated_bytes
    }

    fn write(&mut self, to: View, bytes: &[u8]) -> Result<()> {
        lock(&self.memory).write(to, bytes)
    }

    fn submit(&mut self, ops: &[DeviceOp]) -> Result<()> {
        let mut memory = lock(&self.memory);
        for op in ops {
            op.check(ALIGNMENT_BYTES, QuantFormat::ALL, |b| memory.size(b))?;
            memory.run(op)?;
        }
        Ok(())
    }

    fn read(&mut self, parts: &mut [(View, &mut [u8])]) -> Result<()> {
        let memory = lock(&self.memory);
        for (view, out) in parts {
            memory.check(*view, out.len())?;
            out.copy_from_slice(&memory.bytes(*view)[..out.len()]);
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }

    fn copier(&self) -> Arc<dyn Copier> {
        Arc::new(ReferenceCopier(Arc::clone(&self.memory)))
    }
}

impl Copier for ReferenceCopier {
    fn copy(&self, to: View, bytes: &[u8], _purpose: Purpose) -> Result<()> {
        lock(&self.0).write(to, bytes)
    }
}

impl Memory {
    fn size(&self, id: BufferId) -> Option<u64> {
        self.blocks.get(id.0 as usize).map(|b| b.len() as u64)
    }

    /// Whether `bytes` bytes may be copied from or to the start of a part.
    fn check(&self, view: View, bytes: usize) -> Result<()> {
        check_view(view, ALIGNMENT_BYTES, |b| self.size(b)).map_err(|e| device_error(format!("a part {e}")))?;
        if bytes as u64 > view.bytes || !bytes.is_multiple_of(4) {
            return Err(device_error(format!("{bytes} bytes for a part of {}", view.bytes)));
        }
        Ok(())
    }

    fn write(&mut self, to: View, bytes: &[u8]) -> Result<()> {
        self.check(to, bytes.len())?;
        let start = to.offset_bytes as usize;
        self.blocks[to.buffer.0 as usize][start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn bytes(&self, view: View) -> &[u8] {
        &self.blocks[view.buffer.0 as usize][view.offset_bytes as usize..][..view.bytes as usize]
    }

    fn words(&self, view: View) -> impl Iterator<Item = [u8; 4]> + '_ {
        self.bytes(view).as_chunks::<4>().0.iter().copied()
    }

    /// The first `count` numbers of a part.
    fn floats(&self, view: View, count: usize) -> Vec<f64> {
        self.words(view).take(count).map(|b| f64::from(f32::from_le_bytes(b))).collect()
    }

    fn integers(&self, view: View, count: usize) -> Vec<u32> {
        self.words(view).take(count).map(u32::from_le_bytes).collect()
    }

    /// Numbers of a part, or as many zeros.
    fn floats_or_zeros(&self, view: Option<View>, count: usize) -> Vec<f64> {
        view.map_or_else(|| vec![0.0; count], |v| self.floats(v, count))
    }

    fn set(&mut self, view: View, index: usize, word: [u8; 4]) {
        let start = view.offset_bytes as usize + 4 * index;
        self.blocks[view.buffer.0 as usize][start..start + 4].copy_from_slice(&word);
    }

    fn store(&mut self, view: View, index: usize, value: f64) {
        self.set(view, index, (value as f32).to_le_bytes());
    }

    fn store_all(&mut self, view: View, values: &[f64]) {
        values.iter().enumerate().for_each(|(i, v)| self.store(view, i, *v));
    }

    /// Row `row` of a weight that starts at `start` of a block.
    fn weight_row(&self, (buffer, start): (BufferId, u64), format: QuantFormat, cols: u32, row: u32) -> Result<Vec<f64>> {
        let bytes = row_bytes(format, cols)? as usize;
        let first = start as usize + row as usize * bytes;
        let mut out = vec![0.0; cols as usize];
        dequantize_row(format, &self.blocks[buffer.0 as usize][first..first + bytes], &mut out);
        Ok(out.into_iter().map(f64::from).collect())
    }

    fn matrix_row(&self, m: &DeviceMatrix, row: u32) -> Result<Vec<f64>> {
        self.weight_row((m.view.buffer, m.view.offset_bytes), m.format, m.cols, row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::op::DeviceRule;
    use crate::exec::rope::RopeTable;
    use crate::exec::route::{Routing, Rule};
    use crate::kernels::CpuKernels;
    use tierwise_cost::model::{Moe, Rope, RopePairing, Router, RouterScore};

    /// A back-end with blocks of these numbers.
    fn with(blocks: &[&[f32]]) -> (ReferenceBackend, Vec<View>) {
        let mut backend = ReferenceBackend::new(1 << 20);
        let views = blocks
            .iter()
            .map(|values| {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                let buffer = backend.alloc(bytes.len() as u64, "numbers").expect("there is room");
                let view = View { buffer, offset_bytes: 0, bytes: bytes.len() as u64 };
                backend.write(view, &bytes).expect("it fits");
                view
            })
            .collect();
        (backend, views)
    }

    fn numbers(backend: &mut ReferenceBackend, view: View) -> Vec<f32> {
        let mut bytes = vec![0; view.bytes as usize];
        backend.read(&mut [(view, &mut bytes)]).expect("it is there");
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    /// Numbers between -2 and 2 that do not repeat.
    fn values(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| ((i as f32 * 0.618_034 + seed).fract() - 0.5) * 4.0).collect()
    }

    #[test]
    fn rotation_is_that_of_the_cpu() {
        for pairing in [RopePairing::Halves, RopePairing::Interleaved] {
            let (tokens, heads, stride, first, pairs) = (3, 2, 14, 4, 5);
            let mut rope = RopeTable::new(Rope::plain(1e4, 10, pairing), 64);
            rope.fill(&[(7, tokens)]);
            let mut table = Vec::new();
            for position in 7..7 + tokens {
                for pair in 0..pairs {
                    let angle = position as f64 * 1e4f64.powf(-2.0 * f64::from(pair) / 10.0);
                    table.extend([angle.cos() as f32, angle.sin() as f32]);
                }
            }
            let x = values(tokens * heads * stride, 0.1);
            let mut expected = x.clone();
            for (i, head) in expected.chunks_exact_mut(stride).enumerate() {
                rope.apply(i / heads, &mut head[first..], stride - first);
            }
            let (mut backend, v) = with(&[&x, &table]);
            let op = DeviceOp::Rope {
                x: v[0],
                cos_sin: v[1],
                tokens: tokens as u32,
                heads: heads as u32,
                head_stride: stride as u32,
                first: first as u32,
                pairs: pairs as u32,
                pairing,
            };
            backend.submit(&[op]).expect("it runs");
            let found = numbers(&mut backend, v[0]);
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6), "{pairing:?}: {found:?} {expected:?}");
        }
    }

    #[test]
    fn choices_are_those_of_the_cpu() {
        let (tokens, num_experts, k) = (5, 12, 3);
        let logits = values(tokens * num_experts, 0.4);
        let bias = values(num_experts, 0.9);
        for (sigmoid, normalize, biased) in [(false, false, false), (false, true, false), (true, true, true), (true, false, true)]
        {
            let mut router = Router { scale: 1.5, selection_bias: biased, ..Router::softmax(normalize) };
            router.score = if sigmoid { RouterScore::Sigmoid } else { RouterScore::Softmax };
            let moe = Moe::plain(num_experts as u32, k as u32, 8, router);
            let mut expected = Routing::default();
            let rule = Rule { moe: &moe, selection_bias: biased.then_some(bias.as_slice()) };
            expected.choose(&CpuKernels::SCALAR, rule, &mut logits.clone());
            let nothing = vec![0.0; tokens * k];
            let (mut backend, v) = with(&[&logits, &bias, &nothing, &nothing]);
            // Over the chosen alone is the same as over all and normalised.
            for softmax_after_topk in [false, true] {
                if softmax_after_topk && (sigmoid || !normalize) {
                    continue;
                }
                let rule = DeviceRule { sigmoid, normalize, softmax_after_topk, scale: 1.5 };
                let op = DeviceOp::Route {
                    logits: v[0],
                    selection_bias: biased.then_some(v[1]),
                    ids: v[2],
                    weights: v[3],
                    tokens: tokens as u32,
                    num_experts: num_experts as u32,
                    k: k as u32,
                    rule,
                };
                backend.submit(&[op]).expect("it runs");
                let ids: Vec<u32> = numbers(&mut backend, v[2]).into_iter().map(f32::to_bits).collect();
                assert_eq!(ids, expected.experts, "{rule:?}");
                let weights = numbers(&mut backend, v[3]);
                assert!(weights.iter().zip(&expected.weights).all(|(a, b)| (a - b).abs() < 1e-5), "{rule:?}");
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
        let (mut backend, v) = with(&[&[0.0; 256], &[0.0; 256]]);
        let refused = |backend: &mut ReferenceBackend, op: DeviceOp| backend.submit(&[op]).unwrap_err().to_string();
        let axpy = |x, y, elements| DeviceOp::Axpy { x, y, factor: 1.0, elements };
        assert!(refused(&mut backend, axpy(v[0], v[1], 257)).contains("1028 bytes"));
        assert!(refused(&mut backend, axpy(v[0], v[0].part(512, 512), 4)).contains("one block"));
        assert!(refused(&mut backend, axpy(v[0].part(4, 64), v[1], 4)).contains("multiple of 256"));
        let elsewhere = View { buffer: BufferId(9), ..v[0] };
        assert!(refused(&mut backend, axpy(elsewhere, v[1], 4)).contains("unknown block 9"));
        let weight = DeviceMatrix { format: QuantFormat::Q4_K, rows: 1, cols: 32, view: v[0] };
        let op = DeviceOp::MatMul { weight, bias: None, x: v[0], out: v[1], tokens: 1 };
        assert!(refused(&mut backend, op).contains("multiple of 256 for Q4_K"));
        let message = backend.alloc(1 << 21, "the cache").unwrap_err().to_string();
        assert!(message.contains("the cache needs 2097152 bytes"), "{message}");
    }
}
