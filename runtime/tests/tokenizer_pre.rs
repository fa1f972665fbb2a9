//! Every pre-tokenizer name against llama.cpp's ids, all on the tokens and merges of GPT-2, which were learned under
//! other cuts than those of most names, so a missing cut shows (`tools/golden/make_pre_golden.py`).

use serde_json::Value;
use std::path::Path;
use tierwise_runtime::gguf::Gguf;
use tierwise_runtime::tokenizer::{AddSpecial, Tokenizer, VocabData};

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// First names of rows that share a group with an earlier row.
const FURTHER_ROWS: [&str; 6] = ["dbrx", "glm4", "qwen35", "bailingmoe", "seed-coder", "cohere2moe"];

#[test]
fn cuts_equal_llama_cpp() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let vocab = root.join("../../shared/data/vocab/ggml-vocab-gpt-2.gguf");
    if !vocab.exists() {
        eprintln!("skipped: {} is not here", vocab.display());
        return;
    }
    let gguf = Gguf::open(&vocab).unwrap_or_else(|e| panic!("{e}"));
    let data = VocabData::from_metadata(gguf.metadata(), "gpt-2").unwrap_or_else(|e| panic!("{e}"));
    let golden = std::fs::read_to_string(root.join("tests/golden/tokenizer/pre.json")).expect("golden file");
    let golden: Value = serde_json::from_str(&golden).expect("JSON");
    let texts: Vec<&str> = golden["texts"].as_array().expect("texts").iter().map(|t| t.as_str().expect("text")).collect();
    let base: Vec<Vec<u32>> = golden["base"].as_array().expect("ids").iter().map(ids).collect();
    let mut wrong = Vec::new();
    for group in golden["groups"].as_array().expect("groups") {
        let names = group["names"].as_array().expect("names").iter().map(|n| n.as_str().expect("a name"));
        // Building takes longer than encoding, and a unit test shows that the names of one row belong to one group.
        for (_, name) in names.enumerate().filter(|(i, name)| *i == 0 || FURTHER_ROWS.contains(name)) {
            let mut data = data.clone();
            data.pre = Some(name.to_owned());
            data.add_bos = Some(false);
            let tokenizer = Tokenizer::from_vocab(data).unwrap_or_else(|e| panic!("{name}: {e}"));
            for (i, text) in texts.iter().enumerate() {
                let expected = group["changed"].get(i.to_string()).map_or_else(|| base[i].clone(), ids);
                let found = tokenizer.encode(text, AddSpecial::Never, false).unwrap_or_else(|e| panic!("{name}: {e}"));
                // llama.cpp knows no \p{Lu} there and does not cut camelCase; the models' own tokenizer.json does.
                let cuts_camel_case = ["tiny_aya", "cohere2moe", "kimi-k2"].contains(&name) && text.contains("YouTube");
                if found != expected && !cuts_camel_case {
                    let parts = |ids: &[u32]| ids.iter().map(|&id| tokenizer.decode(&[id])).collect::<Vec<_>>().join("|");
                    wrong.push(format!("{name}: {text:?}: found {} expected {}", parts(&found), parts(&expected)));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
}
