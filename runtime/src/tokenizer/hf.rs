//! Tokenizers of Hugging Face model folders: `tokenizer.json` and the small files beside it.
//!
//! The library reads the encoding half itself. For the decoding half only what the two families need is taken: the
//! decoder's type says whether token texts are byte-level or SentencePiece, which makes the bytes of single tokens
//! known; other decoders are refused. The folder's configuration adds what `transformers` adds: BOS and EOS, stop
//! ids and the chat template.

use super::Tokenizer;
use super::bytes::{byte_level_piece, byte_token_value};
use super::pipeline::{Library, Pipeline, Words, library_error};
use super::spm::BLANK;
use super::vocab::{TokenKind, stop_ids};
use crate::error::{Result, RuntimeError};
use serde_json::Value;
use std::path::Path;

/// How a token's text becomes bytes.
#[derive(Clone, Copy, PartialEq)]
enum Spelling {
    ByteLevel,
    SentencePiece { byte_tokens: bool },
}

pub(super) fn load(folder: &Path) -> Result<Tokenizer> {
    let path = folder.join("tokenizer.json");
    let origin = path.display().to_string();
    let bytes = std::fs::read(&path).map_err(|e| RuntimeError::io("read", &path, e))?;
    let mut library = tokenizers::Tokenizer::from_bytes(&bytes)
        .map_err(|e| RuntimeError::bad_file(&path, e.to_string(), "a tokenizer.json", ""))?;
    // Limits of a training set-up, not of the text.
    library.with_truncation(None).map_err(|e| library_error(&origin, e))?;
    library.with_padding(None);

    let (spelling, strips_leading_space) = spelling(&library, &path)?;
    let added = library.get_added_tokens_decoder();
    let vocab = library.get_vocab(true);
    let count = vocab.values().max().map_or(0, |&id| id as usize + 1);
    // Ids are dense in real files; a stray huge id must not become a huge allocation.
    if count == 0 || count > 2 * vocab.len() + 65_536 {
        return Err(RuntimeError::bad_file(
            &path,
            format!("{} tokens with ids up to {count}", vocab.len()),
            "ids that number the tokens",
            "",
        ));
    }
    let mut kinds = vec![TokenKind::Unused; count];
    let mut pieces: Vec<Box<[u8]>> = vec![Box::default(); count];
    for (text, &id) in &vocab {
        let (kind, piece) = match added.get(&id) {
            Some(token) if token.special => (TokenKind::Control, token.content.clone().into_bytes()),
            Some(token) => (TokenKind::UserDefined, token.content.clone().into_bytes()),
            None => (TokenKind::Normal, piece(spelling, text)),
        };
        kinds[id as usize] = kind;
        pieces[id as usize] = piece.into();
    }

    let config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let generation = read_json(&folder.join("generation_config.json"))?.unwrap_or_default();
    let named = |key: &str| -> Result<Option<u32>> {
        let Some(text) = token_text(&config[key]) else { return Ok(None) };
        vocab.get(text).copied().map(Some).ok_or_else(|| {
            RuntimeError::Tokenizer(format!("{}: {key} is {text:?}, which tokenizer.json does not have", folder.display()))
        })
    };
    let (bos, eos) = (named("bos_token")?, named("eos_token")?);
    let declared = match &generation["eos_token_id"] {
        Value::Array(ids) => ids.iter().filter_map(id_of_value).collect(),
        one => id_of_value(one).into_iter().collect::<Vec<u32>>(),
    };
    if let Some(id) = declared.iter().find(|&&id| id as usize >= count) {
        return Err(RuntimeError::Tokenizer(format!(
            "{}: generation_config.json ends generation at token {id}, but there are {count} tokens",
            folder.display()
        )));
    }
    let is_added = |text: &str| vocab.get(text).copied().filter(|id| added.contains_key(id));
    let (end_of_generation, by_name) = stop_ids(&is_added, eos, &declared);
    for id in by_name {
        kinds[id as usize] = TokenKind::Control;
    }

    let (mut prefix, mut suffix) = wrapping(&library, &origin)?;
    match (config["add_bos_token"].as_bool(), bos) {
        (Some(true), Some(bos)) if prefix.is_empty() => prefix = vec![bos],
        (Some(false), Some(bos)) if prefix == [bos] => prefix.clear(),
        _ => {}
    }
    match (config["add_eos_token"].as_bool(), eos) {
        (Some(true), Some(eos)) if suffix.is_empty() => suffix = vec![eos],
        (Some(false), Some(eos)) if suffix == [eos] => suffix.clear(),
        _ => {}
    }

    let with_special = library.get_added_vocabulary().clone();
    let mut without_special = with_special.clone();
    without_special.set_encode_special_tokens(true);
    let words = Words::Library(Box::new(Library {
        normalizer: library.get_normalizer().cloned(),
        pre_tokenizer: library.get_pre_tokenizer().cloned(),
        model: library.get_model().clone(),
    }));
    Ok(Tokenizer {
        // A normalizer may change the number of bytes, so it cannot be compared; the library's models all have a
        // fallback or an unknown token.
        pipeline: Pipeline { words, with_special, without_special, may_lose_bytes: false },
        pieces,
        kinds,
        bos,
        eos,
        end_of_generation,
        prefix,
        suffix,
        strips_leading_space,
        chat_template: chat_template(folder, &config)?,
    })
}

fn piece(spelling: Spelling, text: &str) -> Vec<u8> {
    match spelling {
        Spelling::ByteLevel => byte_level_piece(text),
        Spelling::SentencePiece { byte_tokens } => match byte_token_value(text).filter(|_| byte_tokens) {
            Some(byte) => vec![byte],
            None => text.replace(BLANK, " ").into_bytes(),
        },
    }
}

/// From the decoder: how texts are spelled, and whether the text's first blank is not part of it.
fn spelling(library: &tokenizers::Tokenizer, path: &Path) -> Result<(Spelling, bool)> {
    let decoder = serde_json::to_value(library.get_decoder()).unwrap_or_default();
    let steps = match decoder["type"].as_str() {
        Some("Sequence") => decoder["decoders"].as_array().cloned().unwrap_or_default(),
        _ => vec![decoder],
    };
    let step = |name: &str| steps.iter().find(|s| s["type"] == name);
    if step("ByteLevel").is_some() {
        return Ok((Spelling::ByteLevel, false));
    }
    let replaces_blank = step("Replace").is_some_and(|s| s["pattern"]["String"] == BLANK.to_string() && s["content"] == " ");
    let metaspace = step("Metaspace").filter(|s| s["replacement"] == BLANK.to_string());
    if replaces_blank || metaspace.is_some() {
        let byte_tokens = step("ByteFallback").is_some();
        let strips = step("Strip").is_some_and(|s| s["content"] == " " && s["start"] == 1)
            || metaspace.is_some_and(|s| s["prepend_scheme"] != "never");
        return Ok((Spelling::SentencePiece { byte_tokens }, strips));
    }
    let names: Vec<&str> = steps.iter().filter_map(|s| s["type"].as_str()).collect();
    Err(RuntimeError::bad_file(
        path,
        format!("decoder {}", if names.is_empty() { "none".to_owned() } else { names.join(" + ") }),
        "ByteLevel, or one that replaces U+2581 by a blank",
        "use the model's GGUF form",
    ))
}

/// What the post-processor puts before and after a text, found by looking.
fn wrapping(library: &tokenizers::Tokenizer, origin: &str) -> Result<(Vec<u32>, Vec<u32>)> {
    let ids = |special: bool| -> Result<Vec<u32>> {
        Ok(library.encode_fast("a", special).map_err(|e| library_error(origin, e))?.get_ids().to_vec())
    };
    let (bare, wrapped) = (ids(false)?, ids(true)?);
    let at = wrapped.windows(bare.len().max(1)).position(|w| w == bare).ok_or_else(|| {
        library_error(origin, format!("the post-processor changes the tokens of a text: {bare:?} becomes {wrapped:?}"))
    })?;
    Ok((wrapped[..at].to_vec(), wrapped[at + bare.len()..].to_vec()))
}

/// A token as `tokenizer_config.json` writes it: its text, or an object with the text.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

fn id_of_value(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// The file's content; `None` if there is no such file.
fn read_json(path: &Path) -> Result<Option<Value>> {
    let Some(text) = read_optional(path)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|e| RuntimeError::bad_file(path, e.to_string(), "JSON", ""))
}

fn read_optional(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(RuntimeError::io("read", path, e)),
    }
}

/// `chat_template.jinja` goes before `tokenizer_config.json`; of several named templates the one called "default".
fn chat_template(folder: &Path, config: &Value) -> Result<Option<String>> {
    if let Some(text) = read_optional(&folder.join("chat_template.jinja"))? {
        return Ok(Some(text));
    }
    let template = match &config["chat_template"] {
        Value::Array(named) => named.iter().find(|t| t["name"] == "default").map(|t| &t["template"]),
        one => Some(one),
    };
    Ok(template.and_then(Value::as_str).map(str::to_owned))
}
