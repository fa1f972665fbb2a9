//! Perplexity of the trained tiny model against llama.cpp (commit 0c1e57098) and `transformers`, 256-token windows.

mod session_common;

use session_common::*;
use std::path::Path;
use tierwise_cost::quant::QuantFormat;
use tierwise_runtime::gguf::Gguf;
use tierwise_runtime::session::{Perplexity, perplexity};
use tierwise_runtime::tokenizer::{AddSpecial, Tokenizer};

fn measure(folder: &Path, file: &str, options: PlanOptions) -> Perplexity {
    let gguf = Gguf::open(&folder.join(file)).expect("opened");
    let tokenizer = Tokenizer::from_gguf(&gguf).expect("a tokenizer");
    let text = std::fs::read_to_string(folder.join("validation.txt")).expect("read");
    // As llama-perplexity does: special tokens of the model added (it has none to add), those in the text not parsed.
    let tokens = tokenizer.encode(&text, AddSpecial::AsModel, false).expect("encoded");
    assert_eq!(tokens.len(), 10_261);
    let mut s = session(&open(&folder.join(file)), options);
    let mut calls = 0;
    let result = perplexity(&mut s, &tokens, 256, None, |done, all, so_far| {
        calls += 1;
        assert!(done == calls && all == 40 && so_far.scored_tokens == done * 127);
        true
    });
    let result = result.expect("measured");
    assert_eq!((calls, result.windows, result.scored_tokens), (40, 40, 5080));
    println!("{file}: {:.4} +/- {:.5}", result.value, result.error);
    result
}

/// llama.cpp computes these weights with f16 or 8-bit activations; `transformers` has 33.846518 +/- 1.24185 in float32.
#[test]
fn perplexity_agrees_with_llama_cpp() {
    let Some(folder) = tiny() else { return };
    let exact = measure(&folder, "tiny-f16.gguf", F32_KV);
    assert!((exact.value - 33.846_518).abs() < 5e-4 && (exact.error - 1.241_85).abs() < 1e-4, "{exact:?}");
    for (file, theirs, error) in [("tiny-q8_0.gguf", 33.8476, 1.2421), ("tiny-q4_k_m.gguf", 33.7797, 1.2380)] {
        let p = measure(&folder, file, F16_KV);
        assert!((p.value / theirs - 1.0).abs() < 2e-3, "{file}: {} and {theirs}", p.value);
        assert!((p.error - error).abs() < 5e-3, "{file}: {} and {error}", p.error);
    }
}

/// An 8-bit cache rounds keys and values to half of 1/127 of the largest of 32: it must not be worse than 8-bit weights are.
#[test]
fn an_8_bit_cache_changes_perplexity_little() {
    let Some(folder) = tiny() else { return };
    let p = measure(&folder, "tiny-f16.gguf", PlanOptions { kv: QuantFormat::Q8_0, ..F16_KV });
    assert!((p.value / 33.846_518 - 1.0).abs() < 2e-3, "{p:?}");
}

#[test]
fn progress_can_stop_and_nonsense_is_refused() {
    let model = open(&golden("olmoe"));
    let mut s = session(&model, PlanOptions { context: 64, ..F16_KV });
    let tokens: Vec<u32> = (0..100).map(|i| i % model.spec().vocab_size).collect();
    let p = perplexity(&mut s, &tokens, 32, Some(5), |done, _, _| done < 2).expect("measured");
    assert_eq!((p.windows, p.scored_tokens), (2, 30));
    assert!(s.is_empty());
    for window in [3, 65, 101] {
        assert!(perplexity(&mut s, &tokens, window, None, |_, _, _| true).is_err(), "{window}");
    }
    assert!(perplexity(&mut s, &tokens[..20], 32, None, |_, _, _| true).is_err());
}
