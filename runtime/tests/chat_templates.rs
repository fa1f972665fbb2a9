//! Chat templates against Python's jinja2 with the settings of transformers (`tools/golden/make_chat_golden.py`).

use serde_json::Value;
use std::path::Path;
use tierwise_runtime::chat::{ChatTemplate, Message};

#[test]
fn renderings_equal_jinja2() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let golden: Value = serde_json::from_str(&read("cases.json")).expect("JSON");
    let now = golden["unix_seconds"].as_u64().expect("a time");
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() >= 50);
    for (i, case) in cases.iter().enumerate() {
        let name = case["template"].as_str().expect("a name");
        let (bos, eos) = (golden["bos"].as_str(), golden["eos"].as_str());
        let template = ChatTemplate::with_clock(&read(name), bos, eos, move || now).unwrap_or_else(|e| panic!("{name}: {e}"));
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).expect("messages");
        let variables = case["variables"].as_object().cloned().unwrap_or_default();
        let add = case["add_generation_prompt"].as_bool().expect("a flag");
        let found = template.render_with(&messages, case.get("tools"), add, &variables);
        match (found, case["text"].as_str()) {
            (Ok(found), Some(expected)) => assert_eq!(found, expected, "{name}, case {i}"),
            (Err(e), None) => {
                let expected = case["error"].as_str().expect("text or error");
                assert!(e.to_string().contains(expected), "{name}, case {i}: {e}, expected {expected}");
            }
            (found, expected) => panic!("{name}, case {i}: found {found:?}, expected {expected:?}, error {}", case["error"]),
        }
    }
}
