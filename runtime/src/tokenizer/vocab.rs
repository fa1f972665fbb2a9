//! What a model file says about its tokens, as plain data, checked once.
//!
//! The keys are those of the GGUF specification (`tokenizer.ggml.*`); defaults for missing keys are llama.cpp's,
//! except that no token id is ever guessed for byte-level vocabularies.

use crate::error::{Result, RuntimeError};
use crate::gguf::Metadata;
use std::collections::{BTreeSet, HashMap};

/// How text becomes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VocabModel {
    /// Byte-level BPE with a merge list ("gpt2").
    ByteLevelBpe,
    /// SentencePiece BPE with scores and byte fallback ("llama").
    SentencePiece,
}

/// What a token is for; numbered as in `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// Ordinary text.
    Normal,
    /// Stands for what no token covers.
    Unknown,
    /// Structure, not text: `<|im_start|>`. Never made from plain text.
    Control,
    /// Added by the model's makers; found in plain text before anything else.
    UserDefined,
    /// A spare row.
    Unused,
    /// One byte, for characters without a token.
    Byte,
}

/// Everything needed to build a [`super::Tokenizer`] from a GGUF file.
#[derive(Debug, Clone)]
pub struct VocabData {
    /// Where it comes from, for messages.
    pub origin: String,
    /// How text becomes tokens.
    pub model: VocabModel,
    /// Name of the pre-tokenizer; `None` means "default".
    pub pre: Option<String>,
    /// Text by id.
    pub tokens: Vec<String>,
    /// Score by id; empty if the file has none.
    pub scores: Vec<f32>,
    /// Kind by id; empty means that all are normal.
    pub kinds: Vec<TokenKind>,
    /// "left right", best first.
    pub merges: Vec<String>,
    /// Begin of sequence.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: Option<u32>,
    /// Unknown token.
    pub unk: Option<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Further ids that end a generation: end of turn, end of message, the fill-in-the-middle separators.
    pub stops: Vec<u32>,
    /// Whether a text starts with BOS; `None` means that the pre-tokenizer or model kind decides.
    pub add_bos: Option<bool>,
    /// Whether a text ends with EOS.
    pub add_eos: Option<bool>,
    /// Whether a blank goes before the text (SentencePiece).
    pub add_space_prefix: Option<bool>,
    /// Rows of the embedding table according to the file.
    pub vocab_size: Option<u64>,
    /// The Jinja source of the chat format.
    pub chat_template: Option<String>,
}

/// Texts that end a generation wherever they are tokens of their own (`llama-vocab.cpp` of llama.cpp).
const STOP_TEXTS: [&str; 30] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
    // Padding and separators of fill-in-the-middle.
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

impl VocabData {
    /// An empty vocabulary, to be filled in.
    pub fn new(origin: impl Into<String>, model: VocabModel) -> Self {
        Self {
            origin: origin.into(),
            model,
            pre: None,
            tokens: Vec::new(),
            scores: Vec::new(),
            kinds: Vec::new(),
            merges: Vec::new(),
            bos: None,
            eos: None,
            unk: None,
            pad: None,
            stops: Vec::new(),
            add_bos: None,
            add_eos: None,
            add_space_prefix: None,
            vocab_size: None,
            chat_template: None,
        }
    }

    /// Reads the `tokenizer.*` keys of a GGUF file.
    pub fn from_metadata(metadata: &Metadata, origin: impl Into<String>) -> Result<Self> {
        let origin = origin.into();
        let model = match metadata.get_str("tokenizer.ggml.model")? {
            "gpt2" => VocabModel::ByteLevelBpe,
            "llama" => VocabModel::SentencePiece,
            other => {
                return Err(RuntimeError::Tokenizer(format!(
                    "{origin}: tokenizer.ggml.model is {other:?}; known: \"gpt2\" (byte-level BPE), \"llama\" (SentencePiece)"
                )));
            }
        };
        let mut data = Self::new(origin, model);
        data.pre = metadata.opt_str("tokenizer.ggml.pre")?.map(str::to_owned);
        data.tokens = metadata.get_str_array("tokenizer.ggml.tokens")?.to_vec();
        if metadata.contains("tokenizer.ggml.scores") {
            data.scores = metadata.get_f32_array("tokenizer.ggml.scores")?.to_vec();
        }
        if let Some(kinds) = metadata.opt_i32_array("tokenizer.ggml.token_type")? {
            data.kinds = kinds.iter().map(|&kind| data.kind_of_code(kind)).collect::<Result<_>>()?;
        }
        match model {
            VocabModel::ByteLevelBpe => data.merges = metadata.get_str_array("tokenizer.ggml.merges")?.to_vec(),
            // The ids that SentencePiece gives them unless told otherwise.
            VocabModel::SentencePiece => (data.unk, data.bos, data.eos) = (Some(0), Some(1), Some(2)),
        }
        let id = |key: &str| -> Result<Option<u32>> {
            let key = format!("tokenizer.ggml.{key}");
            let Some(id) = metadata.opt_u64(&key)? else { return Ok(None) };
            u32::try_from(id).map(Some).map_err(|_| {
                RuntimeError::Tokenizer(format!(
                    "{}: {key} is {id}, expected a token id below {}",
                    data.origin,
                    data.tokens.len()
                ))
            })
        };
        let bos = id("bos_token_id")?.or(data.bos);
        let eos = id("eos_token_id")?.or(data.eos);
        let unk = id("unknown_token_id")?.or(data.unk);
        let pad = id("padding_token_id")?;
        let mut stops = Vec::new();
        for key in ["eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id"] {
            stops.extend(id(key)?);
        }
        (data.bos, data.eos, data.unk, data.pad, data.stops) = (bos, eos, unk, pad, stops);
        data.add_bos = metadata.opt_bool("tokenizer.ggml.add_bos_token")?;
        data.add_eos = metadata.opt_bool("tokenizer.ggml.add_eos_token")?;
        data.add_space_prefix = metadata.opt_bool("tokenizer.ggml.add_space_prefix")?;
        data.chat_template = metadata.opt_str("tokenizer.chat_template")?.map(str::to_owned);
        if let Some(architecture) = metadata.opt_str("general.architecture")? {
            data.vocab_size = metadata.opt_u64(&format!("{architecture}.vocab_size"))?;
        }
        Ok(data)
    }

    fn kind_of_code(&self, code: i32) -> Result<TokenKind> {
        Ok(match code {
            // 0 is "undefined": what converters write for tokens they know nothing about.
            0 | 1 => TokenKind::Normal,
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => return Err(self.error(format!("tokenizer.ggml.token_type holds {code}, expected 0 to 6"))),
        })
    }

    /// The kind of token `id`.
    pub fn kind(&self, id: u32) -> TokenKind {
        self.kinds.get(id as usize).copied().unwrap_or(TokenKind::Normal)
    }

    pub(super) fn error(&self, message: impl std::fmt::Display) -> RuntimeError {
        RuntimeError::Tokenizer(format!("{}: {message}", self.origin))
    }

    /// Checks everything that does not depend on the model kind, gives empty tokens a name and stop tokens their
    /// kind. Returns the set of ids that end a generation.
    pub(super) fn normalize(&mut self) -> Result<BTreeSet<u32>> {
        let count = self.tokens.len();
        if count == 0 {
            return Err(self.error("the vocabulary is empty (tokenizer.ggml.tokens)"));
        }
        if u32::try_from(count).is_err() {
            return Err(self.error(format!("{count} tokens, expected fewer than 2^32")));
        }
        if let Some(rows) = self.vocab_size
            && rows != count as u64
        {
            return Err(
                self.error(format!("found {count} tokens, but the model's vocab_size is {rows}; the file contradicts itself"))
            );
        }
        if self.kinds.is_empty() {
            self.kinds = vec![TokenKind::Normal; count];
        }
        for (what, found) in [("token_type", self.kinds.len()), ("scores", self.scores.len())] {
            if found != count && !(what == "scores" && found == 0) {
                return Err(self.error(format!("tokenizer.ggml.{what} has {found} entries, expected one per token: {count}")));
            }
        }
        if let Some(id) = self.scores.iter().position(|s| s.is_nan()) {
            return Err(self.error(format!("the score of token {id} is not a number")));
        }
        for (name, id) in [("bos", self.bos), ("eos", self.eos), ("unknown", self.unk), ("padding", self.pad)]
            .into_iter()
            .chain(self.stops.iter().map(|&id| ("stop", Some(id))))
        {
            if let Some(id) = id.filter(|&id| id as usize >= count) {
                return Err(self.error(format!("the {name} token has id {id}, expected less than the number of tokens, {count}")));
            }
        }
        for (id, text) in self.tokens.iter_mut().enumerate().filter(|(_, text)| text.is_empty()) {
            *text = format!("[EMPTY_{id}]");
        }
        let mut by_text: HashMap<&str, usize> = HashMap::with_capacity(count);
        for (id, text) in self.tokens.iter().enumerate() {
            if let Some(first) = by_text.insert(text, id) {
                return Err(self.error(format!("tokens {first} and {id} are both {text:?}; a text must have one id")));
            }
        }
        let (stops, by_name) = stop_ids(&|text| by_text.get(text).map(|&id| id as u32), self.eos, &self.stops);
        // Some converters leave them "normal", so that plain text could end a turn.
        for id in by_name {
            self.kinds[id as usize] = TokenKind::Control;
        }
        Ok(stops)
    }
}

/// The ids that end a generation, and those of them that were found by their text.
pub(super) fn stop_ids(
    id_of: &dyn Fn(&str) -> Option<u32>,
    eos: Option<u32>,
    declared: &[u32],
) -> (BTreeSet<u32>, BTreeSet<u32>) {
    let by_name: BTreeSet<u32> = STOP_TEXTS.iter().filter_map(|text| id_of(text)).collect();
    let mut all: BTreeSet<u32> = by_name.iter().copied().chain(eos).chain(declared.iter().copied()).collect();
    // Where messages have their own end (gpt-oss, solar-open), <|end|> only closes a part of the answer.
    let has = |text: &str| id_of(text).is_some();
    let has_call = has("<|call|>") || has("<|calls|>");
    if has_call
        && (has("<|return|>") || has("<|flush|>"))
        && let Some(end) = id_of("<|end|>")
    {
        all.remove(&end);
    }
    // Gemma 4 and PLaMo have "</s>" as ordinary markup.
    if (has("<|tool_response>") || has("<|plamo:eos|>"))
        && let Some(s) = id_of("</s>")
    {
        all.remove(&s);
    }
    (all, by_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(texts: &[&str]) -> VocabData {
        let mut data = VocabData::new("file.gguf", VocabModel::ByteLevelBpe);
        data.tokens = texts.iter().map(|t| t.to_string()).collect();
        data
    }

    fn refusal(change: impl FnOnce(&mut VocabData)) -> String {
        let mut data = data(&["a", "b", "c"]);
        change(&mut data);
        data.normalize().expect_err("refused").to_string()
    }

    #[test]
    fn contradictions_are_named() {
        for (message, expected) in [
            (refusal(|d| d.tokens.clear()), "empty"),
            (refusal(|d| d.tokens[2] = "a".into()), "tokens 0 and 2 are both \"a\""),
            (refusal(|d| d.bos = Some(3)), "bos token has id 3"),
            (refusal(|d| d.stops = vec![0, 9]), "stop token has id 9"),
            (refusal(|d| d.vocab_size = Some(4)), "vocab_size is 4"),
            (refusal(|d| d.kinds = vec![TokenKind::Normal; 2]), "token_type has 2 entries"),
            (refusal(|d| d.scores = vec![0.0; 4]), "scores has 4 entries"),
            (refusal(|d| d.scores = vec![0.0, f32::NAN, 0.0]), "score of token 1"),
        ] {
            assert!(message.contains(expected) && message.contains("file.gguf"), "{message} / {expected}");
        }
    }

    #[test]
    fn empty_tokens_get_distinct_names() {
        let mut data = data(&["a", "", ""]);
        data.normalize().expect("valid");
        assert_eq!(data.tokens, ["a", "[EMPTY_1]", "[EMPTY_2]"]);
    }

    #[test]
    fn stop_tokens_by_text_and_by_id() {
        let mut chatml = data(&["a", "<|im_end|>", "<|im_start|>", "<|endoftext|>"]);
        chatml.eos = Some(0);
        assert_eq!(chatml.normalize().expect("valid"), BTreeSet::from([0, 1, 3]));
        assert_eq!(chatml.kinds, [TokenKind::Normal, TokenKind::Control, TokenKind::Normal, TokenKind::Control]);
        let mut phi = data(&["<|end|>", "b"]);
        assert_eq!(phi.normalize().expect("valid"), BTreeSet::from([0]));
        let mut harmony = data(&["<|end|>", "<|return|>", "<|call|>"]);
        assert_eq!(harmony.normalize().expect("valid"), BTreeSet::from([1, 2]));
        assert_eq!(harmony.kind(0), TokenKind::Control);
    }

    #[test]
    fn metadata_with_defaults() {
        let mut metadata = Metadata::new(std::path::Path::new("m.gguf"));
        let mut put = |key: &str, value: crate::gguf::Value| metadata.insert(key, value).expect("new key");
        put("tokenizer.ggml.model", "llama".into());
        put("tokenizer.ggml.tokens", vec!["<unk>".to_string(), "<s>".into(), "</s>".into()].into());
        put("tokenizer.ggml.scores", vec![0.0f32; 3].into());
        put("tokenizer.ggml.token_type", vec![2i32, 3, 3].into());
        put("tokenizer.ggml.padding_token_id", 1u32.into());
        let data = VocabData::from_metadata(&metadata, "m.gguf").expect("valid");
        assert_eq!((data.unk, data.bos, data.eos, data.pad), (Some(0), Some(1), Some(2), Some(1)));
        assert_eq!(data.kinds, [TokenKind::Unknown, TokenKind::Control, TokenKind::Control]);
        assert_eq!((data.add_bos, data.add_space_prefix, data.pre), (None, None, None));

        let mut metadata = Metadata::new(std::path::Path::new("m.gguf"));
        metadata.insert("tokenizer.ggml.model", "t5").expect("new key");
        let message = VocabData::from_metadata(&metadata, "m.gguf").expect_err("unknown").to_string();
        assert!(message.contains("t5") && message.contains("gpt2"), "{message}");
    }
}
