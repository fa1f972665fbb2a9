//! Hugging Face folders made by hand: a SentencePiece-like and a byte-level tokenizer.json with the files beside them.

use serde_json::{Value, json};
use std::path::Path;
use tierwise_runtime::tokenizer::{AddSpecial, StreamDecoder, Tokenizer};

fn write(folder: &Path, name: &str, value: &Value) {
    std::fs::write(folder.join(name), value.to_string()).expect("writable");
}

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special})
}

/// Llama-2 style: blanks as U+2581, one before the text, bytes for what has no token, BOS by the post-processor.
fn llama_style() -> Value {
    let mut vocab = serde_json::Map::new();
    let mut texts: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    texts.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
    texts.extend(["▁", "h", "i", "hi", "▁hi", "<tool>"].map(String::from));
    for (id, text) in texts.iter().enumerate() {
        vocab.insert(text.clone(), id.into());
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true), added(264, "<tool>", false)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": [["h", "i"], ["▁", "hi"]]}
    })
}

#[test]
fn llama_style_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let tokenizer_json = llama_style();
    write(folder.path(), "tokenizer.json", &tokenizer_json);
    let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": [
        {"name": "tool_use", "template": "other"}, {"name": "default", "template": "{{ messages }}"}]});
    write(folder.path(), "tokenizer_config.json", &config);
    write(folder.path(), "generation_config.json", &json!({"eos_token_id": [2, 263]}));
    let tokenizer = Tokenizer::from_hf_folder(folder.path()).unwrap_or_else(|e| panic!("{e}"));
    let library = tokenizers::Tokenizer::from_bytes(tokenizer_json.to_string()).expect("valid");

    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.vocab_size()), (Some(1), Some(2), 265));
    assert_eq!(tokenizer.end_of_generation().iter().copied().collect::<Vec<_>>(), [2, 263]);
    assert_eq!(tokenizer.chat_template(), Some("{{ messages }}"));
    for text in ["hi", "hi hi", " hi", "é🙂", "hi</s>hi", "a<tool> hi", "", "\n"] {
        let ids = tokenizer.encode(text, AddSpecial::AsModel, true).expect("encodes");
        assert_eq!(ids, library.encode(text, true).expect("encodes").get_ids(), "{text:?}");
        if !text.contains('<') {
            assert_eq!(tokenizer.decode_without_special(&ids), library.decode(&ids, true).expect("decodes"), "{text:?}");
            assert_eq!(tokenizer.decode_without_special(&ids), text);
        }
        let plain = tokenizer.encode(text, AddSpecial::Never, false).expect("encodes");
        assert!(plain.iter().all(|&id| !tokenizer.is_special(id)), "{text:?}: {plain:?}");
    }
    assert_eq!(tokenizer.token_bytes(3 + 0xF0), [0xF0]);
    let mut stream = StreamDecoder::new(true);
    let parts: Vec<Option<String>> = [1, 263, 3 + 0xC3, 3 + 0xA9].into_iter().map(|id| stream.push(&tokenizer, id)).collect();
    assert_eq!(parts, [None, Some(" hi".into()), None, Some("é".into())]);
}

#[test]
fn configuration_overrides_and_contradictions() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path();
    let load = || Tokenizer::from_hf_folder(path);
    let refused = || load().expect_err("refused").to_string();

    let missing = refused();
    assert!(missing.contains("cannot read") && missing.contains("tokenizer.json"), "{missing}");
    write(path, "tokenizer.json", &json!({"version": "1.0"}));
    assert!(refused().contains("tokenizer.json"));

    write(path, "tokenizer.json", &llama_style());
    write(
        path,
        "tokenizer_config.json",
        &json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": false, "add_eos_token": true}),
    );
    std::fs::write(path.join("chat_template.jinja"), "from the file").expect("writable");
    let tokenizer = load().unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(tokenizer.encode("hi", AddSpecial::AsModel, true).expect("encodes"), [263, 2]);
    assert_eq!(tokenizer.chat_template(), Some("from the file"));

    write(path, "tokenizer_config.json", &json!({"eos_token": "<nowhere>"}));
    assert!(refused().contains("<nowhere>"));
    std::fs::write(path.join("tokenizer_config.json"), "{").expect("writable");
    assert!(refused().contains("tokenizer_config.json"));
    write(path, "tokenizer_config.json", &json!({}));
    write(path, "generation_config.json", &json!({"eos_token_id": 265}));
    assert!(refused().contains("265"));
    write(path, "generation_config.json", &json!({}));

    let mut other = llama_style();
    other["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    write(path, "tokenizer.json", &other);
    let message = refused();
    assert!(message.contains("WordPiece") && message.contains("ByteLevel"), "{message}");
    let mut huge = llama_style();
    huge["model"]["vocab"]["hi"] = json!(4_000_000_000u32);
    write(path, "tokenizer.json", &huge);
    assert!(refused().contains("4000000001"), "{}", refused());
}
