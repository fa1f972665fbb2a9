//! Any bytes as a safetensors file: an error, or tensors that fill the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use tierwise_runtime::safetensors::header;

fuzz_target!(|bytes: &[u8]| {
    let Ok(tensors) = header::parse(bytes, Path::new("fuzz.safetensors")) else { return };
    let data_bytes: u64 = tensors.iter().map(|t| t.bytes).sum();
    let header_bytes = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("the parser wants 8 bytes"));
    assert_eq!(header_bytes + data_bytes, bytes.len() as u64);
    assert!(tensors.iter().all(|t| t.offset >= header_bytes && t.offset + t.bytes <= bytes.len() as u64));
});
