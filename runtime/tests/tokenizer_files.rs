//! Tokenizers from real files against other programs' ids: llama.cpp's vocabulary fixtures, Hugging Face's
//! `tokenizers` on the tiny model.

use std::path::{Path, PathBuf};
use tierwise_runtime::gguf::Gguf;
use tierwise_runtime::tokenizer::{AddSpecial, StreamDecoder, Tokenizer};

/// Shared data lies beside the workspace and is not part of it.
fn shared(relative: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared").join(relative);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is not here", path.display());
    None
}

fn gguf_tokenizer(path: &Path) -> Tokenizer {
    let gguf = Gguf::open(path).unwrap_or_else(|e| panic!("{e}"));
    Tokenizer::from_gguf(&gguf).unwrap_or_else(|e| panic!("{e}"))
}

/// llama.cpp's own test data: texts, and the ids it expects without BOS.
#[test]
fn llama_cpp_vocabularies() {
    let Some(folder) = shared("data/vocab") else { return };
    for name in ["llama-spm", "gpt-2", "deepseek-llm", "deepseek-coder"] {
        let base = folder.join(format!("ggml-vocab-{name}.gguf"));
        let read = |suffix: &str| {
            let path = folder.join(format!("ggml-vocab-{name}.gguf.{suffix}"));
            std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let (inputs, outputs) = (read("inp"), read("out"));
        let inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
        let outputs: Vec<&str> = outputs.lines().collect();
        assert!(inputs.len() >= outputs.len() && outputs.len() > 40, "{name}: {} {}", inputs.len(), outputs.len());
        let tokenizer = gguf_tokenizer(&base);
        for (text, expected) in inputs.iter().zip(&outputs) {
            let expected: Vec<u32> = expected.split_whitespace().map(|id| id.parse().expect("an id")).collect();
            let found = tokenizer.encode(text, AddSpecial::Never, false).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(found, expected, "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&found), **text, "{name}");
        }
        println!("{name}: {} texts", outputs.len());
    }
}

#[derive(Debug)]
struct Pair {
    text: String,
    ids: Vec<u32>,
}

fn pairs(path: &Path) -> Vec<Pair> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let pair = |p: &serde_json::Value| Pair {
        text: p["text"].as_str().expect("text").to_owned(),
        ids: p["ids"].as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect(),
    };
    json.as_array().expect("a list").iter().map(pair).collect()
}

/// The GGUF form and the Hugging Face form of one model must agree with the library that made it.
#[test]
fn tiny_model_equals_hugging_face() {
    let Some(folder) = shared("models/tiny") else { return };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer/tiny.json");
    let mut expected = pairs(&golden);
    assert!(expected.len() >= 200, "{}", expected.len());
    expected.extend(pairs(&folder.join("reference.tokenizer.json")));
    let from_gguf = gguf_tokenizer(&folder.join("tiny-q4_k_m.gguf"));
    let from_folder = Tokenizer::from_hf_folder(&folder).unwrap_or_else(|e| panic!("{e}"));
    for (kind, tokenizer) in [("GGUF", &from_gguf), ("folder", &from_folder)] {
        for Pair { text, ids } in &expected {
            let found = tokenizer.encode(text, AddSpecial::AsModel, true).unwrap_or_else(|e| panic!("{kind}: {e}"));
            assert_eq!(&found, ids, "{kind}: {text:?}");
            assert_eq!(&tokenizer.decode(ids), text, "{kind}");

            let plain = tokenizer.encode(text, AddSpecial::Never, false).unwrap_or_else(|e| panic!("{kind}: {e}"));
            assert!(plain.iter().all(|&id| !tokenizer.is_special(id)), "{kind}: {text:?} made a control token");
            assert_eq!(&tokenizer.decode(&plain), text, "{kind}");
        }
    }
    assert_eq!(from_gguf.vocab_size(), from_folder.vocab_size());
    for id in 0..from_gguf.vocab_size() as u32 {
        assert_eq!(from_gguf.token_bytes(id), from_folder.token_bytes(id), "{id}");
        assert_eq!(from_gguf.is_special(id), from_folder.is_special(id), "{id}");
    }
    assert_eq!(from_gguf.end_of_generation(), from_folder.end_of_generation());
    assert_eq!(from_gguf.eos(), from_folder.eos());
}

#[test]
fn streamed_text_equals_decoded_text() {
    let Some(folder) = shared("models/tiny") else { return };
    let tokenizer = gguf_tokenizer(&folder.join("tiny-q8_0.gguf"));
    let text = "naïve 🙂🚀 数学与代码 <|im_end|> e\u{301} 👨‍👩‍👧";
    let ids = tokenizer.encode(text, AddSpecial::Never, true).expect("encodes");
    let mut decoder = StreamDecoder::new(false);
    let mut streamed = String::new();
    let mut waited = 0;
    for &id in &ids {
        match decoder.push(&tokenizer, id) {
            Some(part) => streamed.push_str(&part),
            None => waited += 1,
        }
    }
    assert!(waited > 0, "no token ended inside a character: the test says nothing");
    assert_eq!(decoder.flush(), None);
    assert_eq!(streamed, text);

    // Cut off inside the emoji: one replacement at the end, nothing before it lost.
    let smile = tokenizer.encode("a🙂", AddSpecial::Never, true).expect("encodes");
    let mut decoder = StreamDecoder::new(true);
    let mut parts: String = smile[..smile.len() - 1].iter().filter_map(|&id| decoder.push(&tokenizer, id)).collect();
    parts.extend(decoder.flush());
    assert_eq!(parts, "a\u{FFFD}");
    let control = tokenizer.special_id("<|im_end|>").expect("ChatML");
    assert_eq!(decoder.push(&tokenizer, control), None);
}
