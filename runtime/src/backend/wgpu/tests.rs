//! What the conformance suite cannot reach: lost devices, and how weights are cut.

use super::dispatch::{Limits, dispatches};
use super::*;
use crate::backend::op::{DeviceExperts, DeviceMatrix};
use tierwise_cost::model::Activation;
use tierwise_planner::engine::Purpose;

fn part(buffer: u32, bytes: u64) -> View {
    View { buffer: BufferId(buffer), offset_bytes: 0, bytes }
}

fn limits(binding_bytes: u64) -> Limits {
    Limits { binding_bytes, alignment_bytes: 256, max_groups: 65535, nothing: part(9, 256), scratch: part(8, 1 << 20) }
}

/// Every row is in one window, windows begin at multiples of the alignment and are no larger than can be bound.
#[test]
fn windows_cover_every_row_once() {
    let (rows, cols, row_bytes) = (1001, 96, 102);
    let bytes = (rows as u64 * row_bytes).next_multiple_of(4);
    let weight = DeviceMatrix { format: QuantFormat::Q8_0, rows, cols, view: part(0, bytes) };
    let op = DeviceOp::MatMul { weight, bias: None, x: part(1, 4 * 96), out: part(2, 4 * 1004), tokens: 1 };
    for binding_bytes in [1 << 20, 50_000, 4096, 512] {
        let list = dispatches(&op, &limits(binding_bytes), |_| bytes).expect("rows fit");
        let mut next = 0;
        for d in &list {
            let (count, first_byte, first) = (d.params[0], d.params[4], d.params[5]);
            let binding = d.bindings[0];
            assert_eq!(first, next);
            assert_eq!(binding.offset_bytes + u64::from(first_byte), u64::from(first) * row_bytes);
            assert!(binding.offset_bytes % 256 == 0 && binding.bytes <= binding_bytes && binding.bytes % 4 == 0);
            assert!(u64::from(first_byte) + u64::from(count) * row_bytes <= binding.bytes);
            assert!(binding.offset_bytes + binding.bytes <= bytes);
            assert_eq!(d.groups[0], count.div_ceil(4));
            next += count;
        }
        assert_eq!(next, rows);
        assert_eq!(list.len() == 1, binding_bytes > bytes);
    }
    let message = dispatches(&op, &limits(300), |_| bytes).unwrap_err().to_string();
    assert!(message.contains("102 bytes"), "{message}");
}

/// Every expert of at most `max_expert_bytes` lies whole in the one window that it begins in.
#[test]
fn every_expert_is_in_one_window() {
    let experts = DeviceExperts {
        buffer: BufferId(0),
        table: part(1, 12 * 64),
        num_experts: 64,
        formats: [QuantFormat::Q4_0; 3],
        inner_size: 32,
        hidden: 64,
        activation: Activation::Silu,
        biases: None,
    };
    let op = DeviceOp::Experts {
        experts,
        x: part(2, 256),
        ids: part(3, 4 * 4),
        rows_per_input: 4,
        inner: part(4, 4 * 32 * 4),
        out: part(5, 4 * 64 * 4),
        rows: 4,
        groups: None,
    };
    let (arena_bytes, limits) = (1_000_000u64, limits(100_000));
    let list = dispatches(&op, &limits, |_| arena_bytes).expect("it can be cut");
    let windows: Vec<(View, u64, u64)> =
        list.iter().step_by(2).map(|d| (d.bindings[0], 16 * u64::from(d.params[7]), 16 * u64::from(d.params[8]))).collect();
    for start in (0..arena_bytes - limits.max_expert_bytes()).step_by(16) {
        let mine: Vec<_> = windows.iter().filter(|(_, first, places)| (*first..first + places).contains(&start)).collect();
        let [(view, first, _)] = mine[..] else { panic!("byte {start} is in {} windows", mine.len()) };
        assert!(view.offset_bytes == *first && view.bytes <= limits.binding_bytes);
        assert!(start + limits.max_expert_bytes() <= view.offset_bytes + view.bytes, "an expert at {start} does not fit");
    }
}

/// A device that is gone is an error of every call, at once, and no panic.
#[test]
fn a_lost_device_is_an_error() {
    let mut backend = match WgpuBackend::open(true) {
        Ok(backend) => backend,
        Err(e) => return println!("skipped: {e}"),
    };
    let buffer = backend.alloc(1 << 20, "numbers").expect("there is room");
    let numbers = View { buffer, offset_bytes: 0, bytes: 1 << 20 };
    let op = DeviceOp::ScaleCap { x: numbers, elements: 1 << 18, factor: 2.0, softcap: None };
    backend.submit(std::slice::from_ref(&op)).expect("the device is well");
    let copier = backend.copier();
    backend.device.device.destroy();
    let lost = |what: &str, result: Result<()>| {
        let message = result.expect_err(what).to_string();
        assert!(message.contains("wgpu"), "{what}: {message}");
    };
    // The first call may be what notices it.
    let _ = backend.wait();
    lost("submit", backend.submit(&[op]));
    lost("read", backend.read(&mut [(numbers, &mut [0; 64])]));
    lost("write", backend.write(numbers, &[0; 64]));
    lost("wait", backend.wait());
    lost("alloc", backend.alloc(1024, "more").map(|_| ()));
    lost("copy", copier.copy(numbers, &[0; 64], Purpose::Demand));
    lost("a large copy", copier.copy(numbers, &vec![0; 1 << 20], Purpose::Prefetch));
}

/// What a copier writes while operations see the same block stays: a wave of experts computes while the next one is copied.
#[test]
fn copies_beside_operations_are_kept() {
    let mut backend = match WgpuBackend::open(true) {
        Ok(backend) => backend,
        Err(e) => return println!("skipped: {e}"),
    };
    const PARTS: u64 = 64;
    const PART_BYTES: u64 = 1024;
    let x = View { buffer: backend.alloc(1024, "input").expect("there is room"), offset_bytes: 0, bytes: 1024 };
    let out = View { buffer: backend.alloc(256, "output").expect("there is room"), offset_bytes: 0, bytes: 4 };
    for round in 0..40_u8 {
        let buffer = backend.alloc(PARTS * PART_BYTES, "slots").expect("there is room");
        let view = View { buffer, offset_bytes: 0, bytes: PARTS * PART_BYTES };
        let copier = backend.copier();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let copier = &copier;
                scope.spawn(move || {
                    for i in (thread..PARTS).step_by(4) {
                        copier.copy(view.part(i * PART_BYTES, PART_BYTES), &[round + 1; 1024], Purpose::Demand).expect("copied");
                    }
                });
            }
            for first in (0..PARTS).step_by(8) {
                let op = |i| {
                    let weight = DeviceMatrix {
                        format: QuantFormat::F32,
                        rows: 1,
                        cols: 256,
                        view: view.part(i * PART_BYTES, PART_BYTES),
                    };
                    DeviceOp::MatMul { weight, bias: None, x, out, tokens: 1 }
                };
                backend.submit(&(first..first + 8).map(op).collect::<Vec<_>>()).expect("submitted");
            }
        });
        let mut bytes = vec![0; (PARTS * PART_BYTES) as usize];
        backend.read(&mut [(view, &mut bytes)]).expect("read");
        let lost = bytes.iter().position(|b| *b != round + 1);
        assert_eq!(lost, None, "round {round}: first byte that is not what was copied");
    }
}
