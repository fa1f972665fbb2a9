//! Tokens to text while they arrive: only whole characters leave.
//!
//! A byte-level token may end inside a character, so its first bytes wait for the next token. What can no longer
//! become a character is shown as U+FFFD, exactly as `String::from_utf8_lossy` shows it for the whole output.

use super::Tokenizer;

/// Collects the bytes of tokens and gives them back as text.
#[derive(Debug, Clone, Default)]
pub struct StreamDecoder {
    /// Less than one character.
    pending: Vec<u8>,
    skip_special: bool,
}

impl StreamDecoder {
    /// `skip_special`: control tokens (`<|im_end|>`) leave no text.
    pub fn new(skip_special: bool) -> Self {
        Self { pending: Vec::new(), skip_special }
    }

    /// The text that is complete after this token, if any.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Option<String> {
        if self.skip_special && tokenizer.is_special(id) {
            return None;
        }
        self.push_bytes(tokenizer.token_bytes(id))
    }

    fn push_bytes(&mut self, bytes: &[u8]) -> Option<String> {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let invalid = chunk.invalid();
            // At the very end it may be a character that is still to come.
            let at_end = done + invalid.len() == self.pending.len();
            if at_end && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none()) {
                break;
            }
            if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                done += invalid.len();
            }
        }
        self.pending.drain(..done);
        (!text.is_empty()).then_some(text)
    }

    /// Ends the stream: what still waits becomes U+FFFD.
    pub fn flush(&mut self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        (!text.is_empty()).then_some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream(parts: &[&[u8]]) -> (Vec<Option<String>>, Option<String>) {
        let mut decoder = StreamDecoder::new(false);
        let pushed = parts.iter().map(|p| decoder.push_bytes(p)).collect();
        (pushed, decoder.flush())
    }

    #[test]
    fn a_split_emoji_leaves_whole() {
        let (pushed, rest) = stream(&[b"a\xF0", b"\x9F", b"\x99\x82b"]);
        assert_eq!(pushed, [Some("a".into()), None, Some("🙂b".into())]);
        assert_eq!(rest, None);
    }

    #[test]
    fn a_truncated_character_becomes_one_replacement() {
        let (pushed, rest) = stream(&[b"x\xF0\x9F\x99"]);
        assert_eq!((pushed, rest), (vec![Some("x".into())], Some("\u{FFFD}".into())));
        // Broken off in the middle: known as soon as the next byte cannot belong to it.
        let (pushed, rest) = stream(&[b"\xE4\xBD", b"z", b"\x80"]);
        assert_eq!((pushed, rest), (vec![None, Some("\u{FFFD}z".into()), Some("\u{FFFD}".into())], None));
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_text_of_the_whole(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0x80u8..0xC0, 0xE0u8..0xF5], 0..40),
            cuts in prop::collection::vec(1usize..4, 0..40),
        ) {
            let mut decoder = StreamDecoder::new(false);
            let (mut text, mut rest) = (String::new(), &bytes[..]);
            for cut in cuts {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                text.extend(decoder.push_bytes(now));
                prop_assert!(decoder.pending.len() < 4);
                rest = later;
            }
            text.extend(decoder.push_bytes(rest));
            text.extend(decoder.flush());
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
