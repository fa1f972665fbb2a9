//! Bytes as printable characters, and back: the alphabet of byte-level BPE, and the `<0xNN>` tokens of SentencePiece.
//!
//! Byte-level BPE never sees raw bytes: each byte is shown as one character, printable Latin-1 as itself and the
//! other 68 as U+0100 and up in byte order (`bytes_to_unicode` in encoder.py of openai/gpt-2). So every text has a
//! token sequence, and a token may hold a part of a character.

use std::sync::LazyLock;

/// Whether the alphabet shows `byte` as itself.
fn is_shown_as_itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

static BYTE_TO_CHAR: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut table = ['\0'; 256];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        table[usize::from(byte)] = if is_shown_as_itself(byte) {
            char::from(byte)
        } else {
            let c = char::from_u32(next).expect("U+0100 to U+0143 are characters");
            next += 1;
            c
        };
    }
    table
});

/// Indexed by code point; the alphabet ends at U+0143.
static CHAR_TO_BYTE: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut table = [None; 0x144];
    for byte in 0..=255u8 {
        table[BYTE_TO_CHAR[usize::from(byte)] as usize] = Some(byte);
    }
    table
});

/// The character that stands for `byte` in a byte-level vocabulary.
pub(super) fn byte_to_char(byte: u8) -> char {
    BYTE_TO_CHAR[usize::from(byte)]
}

/// The bytes of a byte-level token; a text with a character outside the alphabet is taken literally, as the
/// `tokenizers` library does.
pub(super) fn byte_level_piece(text: &str) -> Vec<u8> {
    text.chars()
        .map(|c| CHAR_TO_BYTE.get(c as usize).copied().flatten())
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| text.as_bytes().to_vec())
}

/// The byte of a `<0xNN>` token.
pub(super) fn byte_token_value(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit()) { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The text of the token of `byte` in a SentencePiece vocabulary.
pub(super) fn byte_token_text(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// Whether `byte` occurs in any UTF-8 text.
pub(super) fn occurs_in_utf8(byte: u8) -> bool {
    !matches!(byte, 0xC0 | 0xC1 | 0xF5..=0xFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_is_a_bijection_onto_the_known_characters() {
        let shown: std::collections::BTreeSet<char> = (0..=255).map(byte_to_char).collect();
        assert_eq!(shown.len(), 256);
        // The best-known ones: space, newline, tab, delete, no-break space, soft hyphen.
        for (byte, c) in
            [(b' ', 'Ġ'), (b'\n', 'Ċ'), (b'\t', 'ĉ'), (0x7F, 'ġ'), (0xA0, 'ł'), (0xAD, 'Ń'), (b'a', 'a'), (0xFF, 'ÿ')]
        {
            assert_eq!(byte_to_char(byte), c);
        }
        for byte in 0..=255 {
            assert_eq!(byte_level_piece(&byte_to_char(byte).to_string()), [byte]);
        }
    }

    #[test]
    fn text_outside_the_alphabet_is_literal() {
        assert_eq!(byte_level_piece("Ġa"), b" a");
        assert_eq!(byte_level_piece("<｜User｜>"), "<｜User｜>".as_bytes());
        assert_eq!(byte_level_piece("\u{144}"), "\u{144}".as_bytes());
    }

    #[test]
    fn byte_tokens() {
        for byte in 0..=255 {
            assert_eq!(byte_token_value(&byte_token_text(byte)), Some(byte));
        }
        for not_one in ["<0x0A", "0x0A>", "<0x0AB>", "<0xA>", "<0x+1>", "<0xGG>", "", "<0x>"] {
            assert_eq!(byte_token_value(not_one), None, "{not_one}");
        }
        assert_eq!(byte_token_value("<0x0a>"), Some(10));
    }

    #[test]
    fn bytes_that_occur_in_utf8() {
        let mut seen = [false; 256];
        for c in (0..=0x10_FFFF).filter_map(char::from_u32) {
            for &b in c.encode_utf8(&mut [0; 4]).as_bytes() {
                seen[usize::from(b)] = true;
            }
        }
        for byte in 0..=255 {
            assert_eq!(occurs_in_utf8(byte), seen[usize::from(byte)], "{byte:02X}");
        }
    }
}
