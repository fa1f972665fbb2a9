//! Every operation of every back-end that this machine has, against the reference back-end, within derived bounds.
//!
//! The cases are in `conformance/`. A back-end whose device is missing is skipped and says why; with `TIERWISE_REQUIRE_GPU=1` there must
//! be one (Mesa's software Vulkan device will do).

mod conformance;

use conformance::{Case, attention, check, check_formats, check_on, devices, elementwise, experts, products, run};
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::engine::Purpose;
use tierwise_runtime::backend::device::View;
use tierwise_runtime::backend::op::DeviceOp;

#[test]
fn embeddings() {
    check_formats(products::embeddings);
}

#[test]
fn products_of_all_formats() {
    check_formats(products::matmuls);
}

#[test]
fn products_per_head() {
    check_formats(products::head_matmuls);
}

#[test]
fn norms_and_movements() {
    let cases: Vec<Case> = elementwise::norms().into_iter().chain(elementwise::movements()).collect();
    check(&cases);
}

#[test]
fn sums_and_activations() {
    check(&elementwise::sums());
}

#[test]
fn routing() {
    check(&elementwise::routes());
}

#[test]
fn attentions() {
    check(&attention::attentions());
}

#[test]
fn experts_of_all_formats() {
    check_formats(experts::of_format);
}

#[test]
fn experts_of_mixed_formats() {
    check(&experts::mixed());
    let apart = experts::gate_and_up_apart();
    for mut device in devices() {
        match run(&mut *device, &apart[0]) {
            Ok(_) => check_on(vec![device], &apart),
            Err(e) => assert!(e.to_string().contains("gate and up"), "{e}"),
        }
    }
}

/// Weights larger than what a device binds at once.
#[cfg(feature = "wgpu")]
#[test]
fn windows_of_large_weights() {
    use tierwise_runtime::backend::wgpu::WgpuBackend;
    let Ok(mut device) = WgpuBackend::open(true) else { return };
    device.bind_at_most(24 << 10);
    let shape = experts::Shape {
        formats: [QuantFormat::Q4_0; 3],
        hidden: 64,
        inner: 96,
        num_experts: 13,
        tokens: 5,
        k: 4,
        clamped: false,
        biased: false,
        tiles: false,
    };
    let cases = [
        products::matmul(QuantFormat::Q8_0, 1000, 96, 3, true),
        products::matmul(QuantFormat::MXFP4, 333, 160, 17, false),
        products::head_matmul(QuantFormat::F16, (9, 33, 64), 5),
        experts::case(shape),
        experts::case(experts::Shape { tiles: true, ..shape }),
    ];
    for case in &cases {
        assert!(case.blocks[0].len() > 24 << 10, "{}", case.name);
    }
    check_on(vec![Box::new(device)], &cases);
}

/// Sums over workgroups on devices without subgroup operations.
#[cfg(feature = "wgpu")]
#[test]
fn without_subgroups() {
    use tierwise_runtime::backend::wgpu::WgpuBackend;
    let Ok(mut device) = WgpuBackend::open(true) else { return };
    device.use_no_subgroups();
    let mut cases = elementwise::norms();
    cases.extend(elementwise::routes());
    cases.extend(attention::attentions().into_iter().take(5));
    cases.extend(products::matmuls(QuantFormat::Q4_K));
    cases.extend(experts::of_format(QuantFormat::Q8_0));
    check_on(vec![Box::new(device)], &cases);
}

/// Copies of all sizes, from this thread and from loader threads, are where later operations look for them.
#[test]
fn copies_arrive() {
    for mut device in devices() {
        const BYTES: usize = 9 << 20;
        let buffer = device.alloc(BYTES as u64, "a large block").expect("there is room");
        let whole = View { buffer, offset_bytes: 0, bytes: BYTES as u64 };
        let pattern = |seed: usize| (0..BYTES / 4).flat_map(move |i| ((i * 7 + seed) as u32).to_le_bytes()).collect::<Vec<u8>>();
        let mut found = vec![1; BYTES];
        device.read(&mut [(whole, &mut found)]).expect("it is there");
        assert!(found.iter().all(|b| *b == 0), "blocks begin as zeros");
        let first = pattern(1);
        device.write(whole, &first).expect("it fits");
        device.read(&mut [(whole, &mut found)]).expect("it is there");
        assert!(found == first);

        let (copier, second) = (device.copier(), pattern(2));
        let half = BYTES as u64 / 2 / 4096 * 4096;
        let parts = [(whole.part(0, half), Purpose::Prefetch), (whole.part(half, BYTES as u64 - half), Purpose::Demand)];
        std::thread::scope(|s| {
            for (part, purpose) in parts {
                let (copier, second) = (&copier, &second);
                let bytes = &second[part.offset_bytes as usize..(part.offset_bytes + part.bytes) as usize];
                s.spawn(move || copier.copy(part, bytes, purpose).expect("it fits"));
            }
        });
        device
            .submit(&[DeviceOp::ScaleCap { x: whole.part(4096, 8), elements: 2, factor: 0.0, softcap: None }])
            .expect("it runs");
        device.read(&mut [(whole, &mut found)]).expect("it is there");
        assert!(found[..4096] == second[..4096] && found[4104..] == second[4104..]);
        assert_eq!(found[4096..4104], [0; 8]);
        device.wait().expect("it is well");
        assert!(device.allocated_bytes() >= BYTES as u64);
    }
}

/// While loader threads copy all the time, every read gets its answer, also where a loader's thread is the one that sees it end.
#[test]
fn reads_are_answered_while_copies_go_on() {
    use std::sync::atomic::{AtomicBool, Ordering};
    const BYTES: u64 = 128 << 10;
    for mut device in devices() {
        let parts: Vec<View> = (0..4)
            .map(|_| View { buffer: device.alloc(BYTES, "a block").expect("there is room"), offset_bytes: 0, bytes: BYTES })
            .collect();
        let (copier, done) = (device.copier(), AtomicBool::new(false));
        std::thread::scope(|s| {
            for part in &parts[1..] {
                let (copier, done) = (&copier, &done);
                s.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        copier.copy(*part, &[3; BYTES as usize], Purpose::Demand).expect("it fits");
                    }
                });
            }
            let mut answers = Vec::new();
            for i in 0..400 {
                let (written, mut found) = ([i as u8; 64], [0; 64]);
                device.write(parts[0].part(0, 64), &written).expect("it fits");
                answers.push(device.read(&mut [(parts[0].part(0, 64), &mut found)]).map(|()| found == written));
            }
            // Before anything is asserted: a scope waits for its threads.
            done.store(true, Ordering::Relaxed);
            for (i, answer) in answers.into_iter().enumerate() {
                assert!(answer.unwrap_or_else(|e| panic!("read {i}: {e}")), "read {i} found something else");
            }
        });
    }
}

#[test]
fn what_cannot_be_is_an_error_and_the_device_goes_on() {
    for mut device in devices() {
        let info = device.info().clone();
        let message = device.alloc(1 << 50, "far too much").unwrap_err().to_string();
        assert!(message.contains("far too much") && message.contains(&(1u64 << 50).to_string()), "{message}");
        let buffer = device.alloc(1024, "numbers").expect("there is room");
        let part = View { buffer, offset_bytes: 0, bytes: 1024 };
        let too_many = DeviceOp::ScaleCap { x: part, elements: 257, factor: 1.0, softcap: None };
        assert!(device.submit(&[too_many]).unwrap_err().to_string().contains("1028"));
        let aliased = DeviceOp::Axpy { x: part, y: part, factor: 1.0, elements: 4 };
        assert!(device.submit(&[aliased]).unwrap_err().to_string().contains("different blocks"));
        assert!(device.write(part, &[0; 1028]).is_err());
        assert!(device.write(part.part(1024, 1024), &[0; 4]).is_err());
        assert!(device.read(&mut [(part.part(1, 4), &mut [0; 4])]).is_err());
        let case = &elementwise::sums()[0];
        run(&mut *device, case).unwrap_or_else(|e| panic!("{} no longer works: {e}", info.backend));
    }
}
