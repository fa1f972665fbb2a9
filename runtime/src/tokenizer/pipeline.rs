//! The encoding half of a tokenizer, in the pieces of the `tokenizers` crate: added tokens, normalizer,
//! pre-tokenizer, model.
//!
//! The crate's own `Tokenizer` decides once whether special tokens are recognised in text; here it is decided per
//! call, because a prompt is a template (recognised) around somebody's text (not recognised). So the parts are held
//! directly, with one matcher of added tokens for either case.

use super::bytes::{byte_to_char, occurs_in_utf8};
use super::pre;
use super::spm::SpmModel;
use super::vocab::{TokenKind, VocabData};
use crate::error::{Result, RuntimeError};
use std::collections::HashSet;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, AddedVocabulary, Model, ModelWrapper, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizer,
    PreTokenizerWrapper, SplitDelimiterBehavior,
};

/// What turns the text between special tokens into ids.
pub(super) enum Words {
    /// The `tokenizers` crate.
    Library(Box<Library>),
    /// Merges by score.
    SentencePiece(SpmModel),
}

/// The parts of the crate's tokenizer that work on the text between special tokens.
pub(super) struct Library {
    pub normalizer: Option<NormalizerWrapper>,
    pub pre_tokenizer: Option<PreTokenizerWrapper>,
    pub model: ModelWrapper,
}

/// Text to ids, without BOS and EOS.
pub(super) struct Pipeline {
    pub words: Words,
    /// Recognises all added tokens.
    pub with_special: AddedVocabulary,
    /// Recognises those that plain text may hold.
    pub without_special: AddedVocabulary,
    /// Some byte of UTF-8 has no token, so the output must be compared with the input.
    pub may_lose_bytes: bool,
}

pub(super) fn library_error(origin: &str, error: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::Tokenizer(format!("{origin}: {error}"))
}

impl Pipeline {
    /// Byte-level BPE; `data` has been normalized.
    pub fn byte_level(data: &VocabData) -> Result<Self> {
        let pre = pre::by_name(data.pre.as_deref()).map_err(|e| match e {
            RuntimeError::Tokenizer(message) => data.error(message),
            other => other,
        })?;
        let mut parts = Vec::with_capacity(pre.splits.len() + 1);
        for split in pre.splits {
            let split = Split::new(SplitPattern::Regex((*split).to_owned()), SplitDelimiterBehavior::Isolated, false)
                .map_err(|e| library_error(&data.origin, e))?;
            parts.push(PreTokenizerWrapper::Split(split));
        }
        parts.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)));

        let mut vocab: Vocab = (0u32..).zip(&data.tokens).map(|(id, text)| (text.clone(), id)).collect();
        let (merges, merged) = parse_merges(data, &vocab)?;
        // With ignore_merges a word that is spelled like a control token would become one.
        for (id, text) in (0u32..).zip(&data.tokens) {
            if matches!(data.kind(id), TokenKind::Control | TokenKind::Unknown) && !merged[id as usize] {
                vocab.remove(text);
            }
        }
        let may_lose_bytes = (0..=255).any(|b| occurs_in_utf8(b) && !vocab.contains_key(byte_to_char(b).to_string().as_str()));
        let model = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(pre.ignore_merges)
            .build()
            .map_err(|e| library_error(&data.origin, e))?;
        let words = Words::Library(Box::new(Library {
            normalizer: None,
            pre_tokenizer: Some(PreTokenizerWrapper::Sequence(Sequence::new(parts))),
            model: ModelWrapper::BPE(model),
        }));
        let (with_special, without_special) = added_tokens(data)?;
        Ok(Self { words, with_special, without_special, may_lose_bytes })
    }

    /// SentencePiece; `data` has been normalized.
    pub fn sentence_piece(data: &VocabData) -> Result<Self> {
        let (with_special, without_special) = added_tokens(data)?;
        Ok(Self { words: Words::SentencePiece(SpmModel::new(data)?), with_special, without_special, may_lose_bytes: false })
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>> {
        let added = if parse_special { &self.with_special } else { &self.without_special };
        let mut ids = Vec::new();
        match &self.words {
            Words::Library(library) => {
                let Library { normalizer, pre_tokenizer, model } = &**library;
                let failed = |e| library_error("cannot encode the text", e);
                let mut pieces = added.extract_and_normalize(normalizer.as_ref(), text);
                if let Some(pre_tokenizer) = pre_tokenizer {
                    pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
                }
                pieces.tokenize(|piece| model.tokenize(piece.get())).map_err(failed)?;
                for (_, _, tokens) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::None) {
                    ids.extend(tokens.iter().flatten().map(|token| token.id));
                }
            }
            Words::SentencePiece(model) => {
                let pieces = added.extract_and_normalize::<NormalizerWrapper>(None, text);
                for (piece, _, tokens) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::None) {
                    match tokens {
                        Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                        None => model.encode(piece, &mut ids)?,
                    }
                }
            }
        }
        Ok(ids)
    }
}

type Merges = Vec<(String, String)>;

/// The merge list as pairs, the first of equal pairs kept, and which ids it mentions.
fn parse_merges(data: &VocabData, vocab: &Vocab) -> Result<(Merges, Vec<bool>)> {
    let mut merges = Vec::with_capacity(data.merges.len());
    let mut mentioned = vec![false; data.tokens.len()];
    let mut seen = HashSet::with_capacity(data.merges.len());
    let mut joined = String::new();
    for (line, merge) in data.merges.iter().enumerate() {
        let bad = |what: &str| data.error(format!("merge {line}, {merge:?}: {what}"));
        // The left side has at least one character, which may be the separator itself.
        let first = merge.chars().next().map_or(0, char::len_utf8);
        let at = merge[first..].find(' ').ok_or_else(|| bad("expected two tokens separated by a blank"))? + first;
        let (left, right) = (&merge[..at], &merge[at + 1..]);
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        let mut ids = [0; 3];
        for (id, text) in ids.iter_mut().zip([left, right, joined.as_str()]) {
            *id = *vocab
                .get(text)
                .ok_or_else(|| bad(&format!("{text:?} is not in the vocabulary; merges and tokens do not belong together")))?;
            mentioned[*id as usize] = true;
        }
        if seen.insert((ids[0], ids[1])) {
            merges.push((left.to_owned(), right.to_owned()));
        }
    }
    Ok((merges, mentioned))
}

/// The matchers of all added tokens, and of those that plain text may hold.
fn added_tokens(data: &VocabData) -> Result<(AddedVocabulary, AddedVocabulary)> {
    let matcher = |wanted: &dyn Fn(TokenKind) -> bool| -> Result<AddedVocabulary> {
        let chosen = || (0u32..).zip(&data.tokens).filter(|&(id, _)| wanted(data.kind(id)));
        // The matcher asks a model for the ids; this one knows nothing else.
        let ids: Vocab = chosen().map(|(id, text)| (text.clone(), id)).collect();
        let ids = BPE::builder().vocab_and_merges(ids, Vec::new()).build().map_err(|e| library_error(&data.origin, e))?;
        let tokens =
            chosen().map(|(id, text)| AddedToken::from(text.clone(), data.kind(id) != TokenKind::UserDefined).normalized(false));
        let mut added = AddedVocabulary::new();
        added.add_tokens::<NormalizerWrapper>(tokens, &ids, None).map_err(|e| library_error(&data.origin, e))?;
        Ok(added)
    };
    let all = matcher(&|kind| matches!(kind, TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined))?;
    let plain = matcher(&|kind| kind == TokenKind::UserDefined)?;
    Ok((all, plain))
}
