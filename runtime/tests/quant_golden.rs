//! Block formats against the `gguf` Python package: decoding of random blocks, encoding of gaussian values.
//!
//! `golden/quant/NAME.bin` holds blocks, `NAME.f32` their values; `NAME.src.f32` and `NAME.quantized.bin` the other direction.
//! The files are made by `tools/golden/make_quant_golden.py`.

use std::path::PathBuf;
use tierwise_cost::quant::QuantFormat;
use tierwise_runtime::quant::{dequantize_row, quantize_row};

/// Formats the Python package cannot decode: F32 is trivial, Q8_K has no decoder there. Both are tested below by hand.
const WITHOUT_GOLDEN: [QuantFormat; 2] = [QuantFormat::F32, QuantFormat::Q8_K];

/// Formats that package can encode.
const WITH_ENCODER_GOLDEN: [QuantFormat; 8] = [
    QuantFormat::F16,
    QuantFormat::BF16,
    QuantFormat::Q4_0,
    QuantFormat::Q4_1,
    QuantFormat::Q5_0,
    QuantFormat::Q5_1,
    QuantFormat::Q8_0,
    QuantFormat::MXFP4,
];

fn read(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/quant").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}; run tools/golden/make_quant_golden.py", path.display()))
}

fn read_f32(name: &str) -> Vec<f32> {
    read(name).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

#[test]
fn decoding_matches_the_gguf_package_bit_for_bit() {
    let mut checked = 0;
    for format in QuantFormat::ALL.iter().copied().filter(|f| !WITHOUT_GOLDEN.contains(f)) {
        let blocks = read(&format!("{format}.bin"));
        let expected = read_f32(&format!("{format}.f32"));
        let mut out = vec![f32::NAN; expected.len()];
        dequantize_row(format, &blocks, &mut out);
        for (i, (a, b)) in out.iter().zip(&expected).enumerate() {
            // `==` rather than bits: the package may give +0 where we give -0.
            assert!(a == b, "{format} element {i}: {a:e}, the package says {b:e}");
        }
        checked += 1;
    }
    assert_eq!(checked, QuantFormat::ALL.len() - WITHOUT_GOLDEN.len());
}

#[test]
fn encoding_matches_the_gguf_package_byte_for_byte() {
    for format in WITH_ENCODER_GOLDEN {
        let src = read_f32(&format!("{format}.src.f32"));
        let expected = read(&format!("{format}.quantized.bin"));
        let mut out = vec![0; expected.len()];
        quantize_row(format, &src, &mut out).expect("gaussian values fit every format");
        if let Some(at) = out.iter().zip(&expected).position(|(a, b)| a != b) {
            let block = format.layout().bytes as usize;
            panic!("{format}: byte {} of block {} is {}, the package says {}", at % block, at / block, out[at], expected[at]);
        }
    }
}

#[test]
fn formats_without_golden_decode_hand_made_blocks() {
    let values = [1.5f32, -0.0, f32::MIN_POSITIVE / 4.0, -3e38];
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut out = [0f32; 4];
    dequantize_row(QuantFormat::F32, &bytes, &mut out);
    assert_eq!(out.map(f32::to_bits), values.map(f32::to_bits));

    let mut block = 0.25f32.to_le_bytes().to_vec();
    block.extend((0..256).map(|i| (i - 128) as u8));
    block.extend([0xA5; 32]);
    let mut out = [0f32; 256];
    dequantize_row(QuantFormat::Q8_K, &block, &mut out);
    for (i, v) in out.iter().enumerate() {
        assert_eq!(*v, (i as f32 - 128.0) * 0.25);
    }
}
