//! The harness of the conformance suite: cases, back-ends, comparison.
//!
//! A case is memory, operations and outputs with error bounds. The expected values come from the reference back-end (f64); bounds come
//! from the shapes and from magnitudes, never from what a device gave.

pub mod attention;
pub mod elementwise;
pub mod experts;
pub mod products;

use tierwise_cost::quant::QuantFormat;
use tierwise_runtime::backend::device::{DeviceBackend, View};
use tierwise_runtime::backend::op::DeviceOp;
use tierwise_runtime::backend::{Choice, OpenOptions, open};
use tierwise_runtime::quant::{dequantize_row, quantize_row};

/// Relative error of one operation in f32: devices may round towards zero instead of to nearest.
pub const UNIT: f64 = 1.0 / (1u64 << 23) as f64;
/// Relative error of a product whose two factors were rounded to bf16 before.
pub const UNIT_BF16: f64 = 2.0 / 256.0 + 1.0 / 65536.0;
/// From more tokens than this on a device may multiply in bf16, if its features say so.
pub const FEW_TOKENS: usize = 8;

/// How an output is compared, element by element.
pub enum Bound {
    /// The same bits.
    Same,
    /// So many times [`UNIT`] of the expected value.
    Relative(f64),
    /// Absolute errors; the second is added on devices that multiply in bf16 where there are many tokens.
    Absolute(Vec<(f64, f64)>),
    /// F16 numbers that may be off by one in the last place.
    Halves,
}

/// Operations over buffers.
pub type Ops = Box<dyn Fn(&[View]) -> Vec<DeviceOp>>;

/// Memory, operations, outputs.
pub struct Case {
    pub name: String,
    /// A buffer each.
    pub blocks: Vec<Vec<u8>>,
    /// Operations over the buffers.
    pub ops: Ops,
    /// Which buffers are looked at.
    pub outputs: Vec<(usize, Bound)>,
}

/// Numbers between -1 and 1 from a fixed generator.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }
}

pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

pub fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

pub fn zeros(count: usize) -> Vec<u8> {
    vec![0; 4 * count]
}

/// An encoded matrix and what it decodes to.
pub struct Encoded {
    /// Whole words.
    pub bytes: Vec<u8>,
    /// `[rows, cols]`
    pub decoded: Vec<f32>,
}

/// A random matrix; blocks differ in magnitude, so that scales do.
pub fn matrix(format: QuantFormat, rows: usize, cols: usize, random: &mut Random) -> Encoded {
    let row_bytes = format.row_bytes(cols as u64).expect("whole blocks") as usize;
    let mut encoded = vec![0; rows * row_bytes];
    let mut decoded = vec![0.0; rows * cols];
    for (encoded, decoded) in encoded.chunks_exact_mut(row_bytes).zip(decoded.chunks_exact_mut(cols)) {
        let mut values = random.floats(cols);
        for run in values.chunks_mut(32) {
            let magnitude = 1.0 + 0.9 * random.next();
            run.iter_mut().for_each(|v| *v *= magnitude);
        }
        quantize_row(format, &values, encoded).expect("small values");
        dequantize_row(format, encoded, decoded);
    }
    encoded.resize(encoded.len().next_multiple_of(4), 0);
    Encoded { bytes: encoded, decoded }
}

/// Columns that a format's row can have: `blocks` blocks, or an odd number for formats without blocks.
pub fn cols_of(format: QuantFormat, blocks: usize) -> usize {
    match format.layout().elems {
        1 => 37 * blocks,
        elements => elements as usize * blocks,
    }
}

/// The back-ends of this machine but the reference; says which one is missing and why.
pub fn devices() -> Vec<Box<dyn DeviceBackend>> {
    let mut found = Vec::new();
    for choice in [Choice::Wgpu, Choice::Cuda] {
        match open(choice, &OpenOptions::default()) {
            Ok(opened) => {
                println!("with {}", opened.why);
                found.extend(opened.backend);
            }
            Err(e) => println!("skipped: {e}"),
        }
    }
    let required = std::env::var_os("TIERWISE_REQUIRE_GPU").is_some();
    assert!(!found.is_empty() || !required, "TIERWISE_REQUIRE_GPU is set, but there is no device");
    found
}

pub fn reference() -> Box<dyn DeviceBackend> {
    open(Choice::Reference, &OpenOptions::default()).expect("memory").backend.expect("the reference is a back-end")
}

/// The outputs of a case on a back-end.
pub fn run(backend: &mut dyn DeviceBackend, case: &Case) -> tierwise_runtime::error::Result<Vec<Vec<u8>>> {
    let mut views = Vec::new();
    for block in &case.blocks {
        let buffer = backend.alloc(block.len() as u64, &case.name)?;
        let view = View { buffer, offset_bytes: 0, bytes: block.len() as u64 };
        backend.write(view, block)?;
        views.push(view);
    }
    backend.submit(&(case.ops)(&views))?;
    let mut outputs: Vec<Vec<u8>> = case.outputs.iter().map(|(i, _)| vec![0; case.blocks[*i].len()]).collect();
    let mut parts: Vec<(View, &mut [u8])> =
        case.outputs.iter().zip(&mut outputs).map(|((i, _), out)| (views[*i], out.as_mut_slice())).collect();
    backend.read(&mut parts)?;
    Ok(outputs)
}

fn as_floats(bytes: &[u8]) -> impl Iterator<Item = f64> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b)))
}

fn as_halves(bytes: &[u8]) -> impl Iterator<Item = f64> + '_ {
    bytes.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f64())
}

/// Holds an output against the reference's.
pub fn compare(name: &str, bound: &Bound, bf16: bool, found: &[u8], expected: &[u8]) {
    let near = |i: usize, a: f64, b: f64, limit: f64| {
        assert!((a - b).abs() <= limit, "{name}: element {i}: {a} against {b}, bound {limit:e}");
    };
    match bound {
        Bound::Same => assert!(found == expected, "{name}: bytes differ"),
        Bound::Relative(units) => as_floats(found)
            .zip(as_floats(expected))
            .enumerate()
            .for_each(|(i, (a, b))| near(i, a, b, units * UNIT * b.abs() + 1e-37)),
        Bound::Absolute(limits) => {
            assert_eq!(limits.len() * 4, found.len(), "{name}");
            let all = as_floats(found).zip(as_floats(expected)).zip(limits).enumerate();
            // What is stored is rounded once more.
            all.for_each(|(i, ((a, b), (f32, rounded)))| near(i, a, b, f32 + if bf16 { *rounded } else { 0.0 } + UNIT * b.abs()));
        }
        Bound::Halves => {
            for (i, (a, b)) in as_halves(found).zip(as_halves(expected)).enumerate() {
                near(i, a, b, b.abs() / 1024.0 + 6e-8);
            }
        }
    }
}

/// Runs cases on every device and on the reference, and compares.
pub fn check(cases: &[Case]) {
    check_on(devices(), cases);
}

pub fn check_on(devices: Vec<Box<dyn DeviceBackend>>, cases: &[Case]) {
    assert!(!cases.is_empty());
    let expected: Vec<_> =
        cases.iter().map(|c| run(&mut *reference(), c).unwrap_or_else(|e| panic!("{}: {e}", c.name))).collect();
    for (case, outputs) in cases.iter().zip(&expected) {
        for ((block, _), output) in case.outputs.iter().zip(outputs) {
            assert!(&case.blocks[*block] != output, "{}: nothing was computed", case.name);
        }
    }
    for mut device in devices {
        let bf16 = device.info().features.iter().any(|f| f.contains("bf16"));
        for (case, expected) in cases.iter().zip(&expected) {
            let name = format!("{} on {}", case.name, device.info().backend);
            let found = run(&mut *device, case).unwrap_or_else(|e| panic!("{name}: {e}"));
            for (((_, bound), found), expected) in case.outputs.iter().zip(&found).zip(expected) {
                compare(&name, bound, bf16, found, expected);
            }
        }
        println!("{} cases on {}", cases.len(), device.info().backend);
    }
}

/// Formats that every back-end must compute with.
pub const REQUIRED: [QuantFormat; 8] = [
    QuantFormat::F32,
    QuantFormat::F16,
    QuantFormat::BF16,
    QuantFormat::Q8_0,
    QuantFormat::Q4_0,
    QuantFormat::Q4_K,
    QuantFormat::Q6_K,
    QuantFormat::MXFP4,
];

/// Runs the cases of formats that a device computes with; others it must refuse by name.
pub fn check_formats(cases: impl Fn(QuantFormat) -> Vec<Case>) {
    let devices = devices();
    let supported: Vec<Vec<QuantFormat>> = devices.iter().map(|d| d.info().formats.clone()).collect();
    for (device, supported) in devices.into_iter().zip(supported) {
        assert!(REQUIRED.iter().all(|f| supported.contains(f)), "{supported:?}");
        let mut device = Some(device);
        let mut all = Vec::new();
        for format in QuantFormat::ALL {
            let cases = cases(*format);
            if supported.contains(format) {
                all.extend(cases);
            } else {
                let device = device.as_deref_mut().expect("not used yet");
                let message = run(device, &cases[0]).expect_err("the format is not supported").to_string();
                assert!(message.contains(format.name()) && message.contains("Q4_K"), "{message}");
            }
        }
        check_on(device.take().into_iter().collect(), &all);
    }
}
