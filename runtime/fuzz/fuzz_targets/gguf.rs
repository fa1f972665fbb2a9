//! Any bytes as a GGUF file: an error, or a header whose tensors lie in the file.
//!
//! `cargo +nightly fuzz run gguf seeds/gguf` in the folder `runtime/fuzz`; what it finds goes to `seeds/gguf`, where an ordinary
//! test of the runtime reads it for ever.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use tierwise_runtime::gguf::Gguf;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = Gguf::parse(bytes, Path::new("fuzz.gguf")) else { return };
    for t in &header.tensors {
        let end = t.offset.checked_add(t.bytes).expect("checked by the parser");
        assert!(t.offset >= header.data_start && end <= bytes.len() as u64);
        assert!(t.num_elements() > 0 && t.offset % header.alignment == 0);
    }
    // Conversions and display meet the same hostile values.
    for (key, value) in header.metadata.iter() {
        let _ = (value.to_string(), value.kind());
        let _ = header.metadata.get_u64_or_array(key, 2);
        let _ = header.metadata.get_i32_array(key);
        let _ = header.metadata.get_f32(key);
    }
});
