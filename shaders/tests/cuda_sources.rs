//! The registry of CUDA kernels says what the sources say: names, threads per block, types and names of parameters.

use std::collections::BTreeMap;
use tierwise_shaders::cuda::{CUDA_FORMATS, CudaModule, CudaType, attention_shared_bytes, weights_shared_bytes};

/// Kernels of a source: name to (threads, parameters).
fn declared(text: &str) -> BTreeMap<String, (u32, Vec<(CudaType, String)>)> {
    // Attention's kernels are made by a macro of their own.
    let text = text.replace("\\\n", "");
    let mut found = BTreeMap::new();
    for (at, _) in text.match_indices("KERNEL(") {
        let rest = &text[at + "KERNEL(".len()..];
        let (bounds, rest) = rest.split_once(')').expect("closed");
        let (name, rest) = rest.split_once('(').expect("a parameter list");
        let (list, _) = rest.split_once(')').expect("closed");
        let threads = bounds.split(',').next().and_then(|t| t.trim().parse().ok()).expect("threads first");
        let parameters = list
            .split(',')
            .map(|p| {
                let words: Vec<&str> = p.split_whitespace().collect();
                let (name, kind) = words.split_last().expect("a type and a name");
                let kind = match kind {
                    [.., t] if t.ends_with('*') => CudaType::Pointer,
                    ["u32"] => CudaType::U32,
                    ["u64"] => CudaType::U64,
                    ["float"] => CudaType::F32,
                    other => panic!("type {other:?} of {name}"),
                };
                (kind, (*name).to_string())
            })
            .collect();
        if name.trim() == "NAME" {
            for (at, _) in text.match_indices("\nATTENTION(") {
                let name = text[at + "\nATTENTION(".len()..].split(',').next().expect("a name");
                found.insert(name.to_string(), (threads, Vec::clone(&parameters)));
            }
        } else {
            found.insert(name.trim().to_string(), (threads, parameters));
        }
    }
    found
}

#[test]
fn descriptions_match_the_sources() {
    for module in [CudaModule::Elementwise, CudaModule::Attention, CudaModule::Weights(CUDA_FORMATS[1])] {
        let described: BTreeMap<_, _> = module
            .kernels()
            .iter()
            .map(|k| {
                let parameters = k.parameters.iter().map(|(kind, name)| (*kind, (*name).to_string())).collect();
                (k.entry_point.to_string(), (k.threads, parameters))
            })
            .collect();
        assert_eq!(described, declared(module.body()), "{}", module.name());
    }
}

#[test]
fn every_format_has_a_decoder_and_its_own_text() {
    for format in CUDA_FORMATS {
        let source = CudaModule::Weights(*format).source();
        assert!(source.contains(&format!("struct {} :", format.name())), "{format}");
        assert!(source.contains(&format!("#define FORMAT {}\n", format.name())), "{format}");
    }
}

/// What a block can have on consumer cards (compute capability 8.6, 8.9, 12.0).
const CONSUMER_SHARED_BYTES: u32 = 99 << 10;

#[test]
fn kernels_fit_the_shared_memory_of_consumer_cards() {
    for format in CUDA_FORMATS {
        for kernel in CudaModule::Weights(*format).kernels() {
            let bytes = weights_shared_bytes(*format, kernel.entry_point).unwrap_or(0);
            assert!(bytes <= CONSUMER_SHARED_BYTES, "{format} {}: {bytes}", kernel.entry_point);
        }
    }
    // Heads of 256, and latents of 576 and 512, in f16.
    assert!(attention_shared_bytes(256, 256, 2, false) <= CONSUMER_SHARED_BYTES);
    assert!(attention_shared_bytes(576, 512, 2, true) <= CONSUMER_SHARED_BYTES);
}
