//! A byte-level BPE vocabulary of any size, in the form of GGUF's `tokenizer.ggml.*` keys.
//!
//! The 256 byte tokens make every text encodable; merges of letter pairs give it a few longer tokens; the rest are words of
//! their own, so that generated text can be read as words. Byte names are GPT-2's (`bytes_to_unicode`).

use crate::error::{Result, RuntimeError};
use crate::gguf::Value;

/// Tokens at the end that are no text; the first ends a sequence.
const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const NORMAL_TYPE: i32 = 1;
const CONTROL_TYPE: i32 = 3;

/// The keys of a vocabulary of `size` tokens.
pub(super) fn keys(size: u32) -> Result<Vec<(String, Value)>> {
    let smallest = 256 + CONTROL.len();
    let size = size as usize;
    if size < smallest {
        return Err(RuntimeError::BadRequest {
            what: "vocab_size",
            found: size.to_string(),
            expected: format!("at least {smallest}: one token per byte and the control tokens"),
        });
    }
    let room = size - CONTROL.len();
    let mut tokens: Vec<String> = (0..=255u8).map(|b| byte_name(b).to_string()).collect();
    let mut merges = Vec::new();
    // A space before a letter, then pairs of letters.
    let firsts = std::iter::once(byte_name(b' ')).chain('a'..='z');
    for (first, second) in firsts.flat_map(|a| ('a'..='z').map(move |b| (a, b))) {
        if tokens.len() == room {
            break;
        }
        tokens.push(format!("{first}{second}"));
        merges.push(format!("{first} {second}"));
    }
    for number in 0..room - tokens.len() {
        tokens.push(format!("{}w{number}", byte_name(b' ')));
    }
    let end = tokens.len() as u32;
    tokens.extend(CONTROL.map(String::from));
    let types: Vec<i32> = (0..size).map(|i| if i < room { NORMAL_TYPE } else { CONTROL_TYPE }).collect();
    let key = |suffix: &str, value: Value| (format!("tokenizer.ggml.{suffix}"), value);
    Ok(vec![
        key("model", "gpt2".into()),
        key("pre", "qwen2".into()),
        key("tokens", tokens.into()),
        key("token_type", types.into()),
        key("merges", merges.into()),
        key("bos_token_id", end.into()),
        key("eos_token_id", end.into()),
        key("padding_token_id", end.into()),
        key("add_bos_token", false.into()),
    ])
}

/// The character that stands for a byte: itself if it is printable, else one from U+0100 on, in order.
fn byte_name(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let place = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + place).expect("a few code points above U+0100 exist")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Array;

    #[test]
    fn tokens_are_unique_and_of_the_right_number() {
        for size in [259, 300, 1000, 50_304, 151_936] {
            let keys = keys(size).unwrap();
            let (_, Value::Array(Array::String(tokens))) = &keys[2] else { panic!("{:?}", keys[2].0) };
            assert_eq!(tokens.len(), size as usize);
            assert_eq!(tokens.iter().collect::<std::collections::HashSet<_>>().len(), size as usize);
        }
        assert!(keys(258).unwrap_err().to_string().contains("259"));
    }

    #[test]
    fn bytes_have_the_names_of_gpt2() {
        assert_eq!([b' ', b'\n', b'a', 0, 0x7f, 0xad].map(byte_name), ['Ġ', 'Ċ', 'a', 'Ā', 'ġ', 'Ń']);
    }
}
