//! SentencePiece BPE ("llama" vocabularies): merges by score instead of by a list of pairs.
//!
//! The text, blanks written as U+2581, starts as single characters; of all neighbours whose concatenation is a
//! token, the pair with the highest score is joined, the leftmost among equals, until none is left. What is no token
//! then is written as its bytes, `<0xNN>`. (Kudo & Richardson 2018; `bpe_model.cc` of google/sentencepiece, which
//! llama.cpp follows.) A list of ranked pairs, as byte-level BPE has, cannot express the "leftmost among equals"
//! between two splits of one token, so this is a model of its own.

use super::bytes::{byte_token_text, byte_token_value};
use super::vocab::{TokenKind, VocabData};
use crate::error::{Result, RuntimeError};
use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};

/// U+2581, the blank.
pub(super) const BLANK: char = '\u{2581}';

/// The merge half of a SentencePiece tokenizer; special tokens are cut out before.
#[derive(Debug)]
pub(super) struct SpmModel {
    /// Text to (id, score), for all tokens that ordinary text may become.
    tokens: HashMap<Box<str>, (u32, f32)>,
    byte_ids: Box<[Option<u32>; 256]>,
    unknown_id: Option<u32>,
    /// A blank goes before the text, so that a word is the same token at the start as elsewhere.
    pub add_space_prefix: bool,
}

/// One run of characters, in a doubly linked list over the text.
struct Symbol {
    start: usize,
    /// 0 once it is part of its left neighbour.
    bytes: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    /// Length of the pair when it was proposed: differs from now if either side has changed since.
    bytes: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(Reverse(self.left).cmp(&Reverse(other.left)))
    }
}
impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Candidate {}

impl SpmModel {
    /// `data` has been validated.
    pub fn new(data: &VocabData) -> Result<Self> {
        if data.scores.len() != data.tokens.len() {
            return Err(RuntimeError::Tokenizer(format!(
                "{}: a \"llama\" vocabulary needs a score per token (tokenizer.ggml.scores): found {}, expected {}",
                data.origin,
                data.scores.len(),
                data.tokens.len()
            )));
        }
        let mut tokens = HashMap::with_capacity(data.tokens.len());
        let mut byte_ids = Box::new([None; 256]);
        for (id, (text, &score)) in (0u32..).zip(data.tokens.iter().zip(&data.scores)) {
            match data.kind(id) {
                // Plain text must never become a control token, however it is spelled.
                TokenKind::Control | TokenKind::Unknown => {}
                TokenKind::Byte => {
                    let byte = byte_token_value(text).ok_or_else(|| {
                        RuntimeError::Tokenizer(format!("{}: byte token {id} is {text:?}, expected \"<0xNN>\"", data.origin))
                    })?;
                    byte_ids[usize::from(byte)] = Some(id);
                }
                TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused => {
                    tokens.insert(text.as_str().into(), (id, score));
                }
            }
        }
        // Old files give byte tokens the type "normal".
        for byte in 0..=255u8 {
            let slot = &mut byte_ids[usize::from(byte)];
            if slot.is_none() {
                *slot = tokens.get(byte_token_text(byte).as_str()).map(|&(id, _)| id);
            }
        }
        Ok(Self { tokens, byte_ids, unknown_id: data.unk, add_space_prefix: data.add_space_prefix.unwrap_or(true) })
    }

    /// Appends the tokens of `text`, one stretch between special tokens.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        let mut escaped = String::with_capacity(text.len() * 2);
        if self.add_space_prefix {
            escaped.push(BLANK);
        }
        escaped.extend(text.chars().map(|c| if c == ' ' { BLANK } else { c }));

        let symbols = self.merge(&escaped);
        let mut at = (!symbols.is_empty()).then_some(0);
        while let Some(i) = at {
            let symbol = &symbols[i];
            self.emit(&escaped[symbol.start..symbol.start + symbol.bytes], ids)?;
            at = symbol.next;
        }
        Ok(())
    }

    fn merge(&self, text: &str) -> Vec<Symbol> {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol { start, bytes: c.len_utf8(), previous: i.checked_sub(1), next: Some(i + 1) })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        let mut queue = BinaryHeap::new();
        for right in 1..symbols.len() {
            self.propose(text, &symbols, Some(right - 1), Some(right), &mut queue);
        }
        while let Some(Candidate { left, right, bytes, .. }) = queue.pop() {
            let (a, b) = (symbols[left].bytes, symbols[right].bytes);
            if a == 0 || b == 0 || a + b != bytes {
                continue;
            }
            let after = symbols[right].next;
            symbols[left].bytes = bytes;
            symbols[left].next = after;
            symbols[right].bytes = 0;
            if let Some(after) = after {
                symbols[after].previous = Some(left);
            }
            self.propose(text, &symbols, symbols[left].previous, Some(left), &mut queue);
            self.propose(text, &symbols, Some(left), after, &mut queue);
        }
        symbols
    }

    fn propose(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: Option<usize>,
        right: Option<usize>,
        queue: &mut BinaryHeap<Candidate>,
    ) {
        let (Some(left), Some(right)) = (left, right) else { return };
        let bytes = symbols[left].bytes + symbols[right].bytes;
        let start = symbols[left].start;
        if let Some(&(_, score)) = self.tokens.get(&text[start..start + bytes]) {
            queue.push(Candidate { score, left, right, bytes });
        }
    }

    fn emit(&self, piece: &str, ids: &mut Vec<u32>) -> Result<()> {
        if let Some(&(id, _)) = self.tokens.get(piece) {
            ids.push(id);
            return Ok(());
        }
        for byte in piece.bytes() {
            let id = self.byte_ids[usize::from(byte)].or(self.unknown_id).ok_or_else(|| {
                RuntimeError::Tokenizer(format!(
                    "{piece:?} is no token, and the vocabulary has neither the byte token {} nor an unknown token",
                    byte_token_text(byte)
                ))
            })?;
            ids.push(id);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::vocab::VocabModel;

    fn model(tokens: &[(&str, f32)], prefix: bool) -> SpmModel {
        let mut data = VocabData::new("test", VocabModel::SentencePiece);
        data.add_space_prefix = Some(prefix);
        data.unk = Some(0);
        data.tokens.push("<unk>".into());
        data.scores.push(0.0);
        data.kinds.push(TokenKind::Unknown);
        for &(text, score) in tokens {
            data.tokens.push(text.into());
            data.scores.push(score);
            data.kinds.push(TokenKind::Normal);
        }
        SpmModel::new(&data).expect("valid")
    }

    fn texts(tokens: &[(&str, f32)], text: &str) -> Vec<String> {
        let mut ids = Vec::new();
        model(tokens, false).encode(text, &mut ids).expect("encodes");
        ids.iter().map(|&id| tokens[id as usize - 1].0.to_string()).collect()
    }

    /// The rule, written down naively: look at all neighbours each time.
    fn naive(tokens: &[(&str, f32)], text: &str) -> Vec<String> {
        let mut parts: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let mut best: Option<(f32, usize)> = None;
            for i in 1..parts.len() {
                let joined = format!("{}{}", parts[i - 1], parts[i]);
                if let Some((_, score)) = tokens.iter().find(|(t, _)| *t == joined)
                    && best.is_none_or(|(s, _)| *score > s)
                {
                    best = Some((*score, i));
                }
            }
            let Some((_, i)) = best else { return parts };
            let right = parts.remove(i);
            parts[i - 1].push_str(&right);
        }
    }

    #[test]
    fn equals_the_naive_rule_also_among_equal_scores() {
        let tokens = [
            ("a", 0.0),
            ("b", 0.0),
            ("aa", -1.0),
            ("aaa", -1.0),
            ("ab", -2.0),
            ("ba", -2.0),
            ("aab", -0.5),
            ("bb", -1.0),
            ("bab", -3.0),
        ];
        for length in 0..=10u32 {
            for bits in 0..1u32 << length {
                let text: String = (0..length).map(|i| if bits >> i & 1 == 0 { 'a' } else { 'b' }).collect();
                assert_eq!(texts(&tokens, &text), naive(&tokens, &text), "{text}");
            }
        }
    }

    #[test]
    fn unknown_characters_become_bytes_or_the_unknown_token() {
        let with_bytes = model(&[("a", 0.0), ("<0xC3>", 0.0), ("<0xA9>", 0.0)], true);
        let mut ids = Vec::new();
        with_bytes.encode("aé", &mut ids).expect("encodes");
        // The blank's three bytes are not all there: unknown, one per byte.
        assert_eq!(ids, [0, 0, 0, 1, 2, 3]);
    }

    #[test]
    fn control_tokens_are_out_of_reach() {
        let mut data = VocabData::new("test", VocabModel::SentencePiece);
        data.add_space_prefix = Some(false);
        for (text, kind) in
            [("<s>", TokenKind::Control), ("<", TokenKind::Normal), ("s>", TokenKind::Normal), ("s", TokenKind::Normal)]
        {
            data.tokens.push(text.into());
            data.scores.push(0.0);
            data.kinds.push(kind);
        }
        data.tokens.push(">".into());
        data.scores.push(0.0);
        data.kinds.push(TokenKind::Normal);
        let mut ids = Vec::new();
        SpmModel::new(&data).expect("valid").encode("<s>", &mut ids).expect("encodes");
        assert_eq!(ids, [1, 2]);
    }
}
