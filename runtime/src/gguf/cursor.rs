//! Bounded little-endian reads from the bytes of a GGUF header.
//!
//! Every read says what it reads, so that a truncated or damaged file is reported with the field and the byte where it went wrong.

use crate::error::{Result, RuntimeError};
use std::path::Path;

/// A position in the bytes of a file. `path` and `context` only serve messages.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
    path: &'a Path,
    /// Metadata key or tensor name being read; empty in the fixed header.
    context: &'a str,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8], path: &'a Path) -> Self {
        Self { bytes, position: 0, path, context: "" }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// From now on messages say that they concern `context`.
    pub(super) fn set_context(&mut self, context: &'a str) {
        self.context = context;
    }

    /// A [`RuntimeError::BadFile`] at the current position.
    pub(super) fn bad(&self, found: &str, expected: &str, hint: &str) -> RuntimeError {
        RuntimeError::bad_file(self.path, format!("{found}{}", self.place(self.position)), expected, hint)
    }

    fn place(&self, position: usize) -> String {
        if self.context.is_empty() {
            format!(" at byte {position}")
        } else {
            format!(" at byte {position} ({:?})", shorten(self.context))
        }
    }

    /// The next `count` bytes, or an error that says that the file ends inside `what`.
    pub(super) fn take(&mut self, what: &str, count: u64) -> Result<&'a [u8]> {
        match usize::try_from(count).ok().and_then(|n| self.bytes[self.position..].get(..n)) {
            Some(taken) if self.position + taken.len() <= MAX_HEADER_BYTES => {
                self.position += taken.len();
                Ok(taken)
            }
            Some(_) => Err(self.bad(
                &format!("{what} of {count} bytes"),
                &format!("metadata and tensor table within the first {MAX_HEADER_BYTES} bytes"),
                "the file is damaged, or made to do harm",
            )),
            None => {
                let remaining = self.remaining() as u64;
                Err(RuntimeError::bad_file(
                    self.path,
                    format!("{what} of {count} bytes{}, and only {remaining} bytes left", self.place(self.position)),
                    format!("at least {} bytes more", count - remaining),
                    "the file is truncated or damaged: download it again",
                ))
            }
        }
    }

    /// Checks that `count` items of at least `min_bytes` each can still be in the file; the count then fits memory.
    pub(super) fn check_count(&self, what: &str, count: u64, min_bytes: u64) -> Result<usize> {
        let most = self.remaining() as u64 / min_bytes;
        if count > most {
            return Err(self.bad(
                &format!("{count} {what}"),
                &format!("at most {most} in the {} bytes left", self.remaining()),
                "the file is truncated or damaged: download it again",
            ));
        }
        // count <= remaining <= usize::MAX
        Ok(count as usize)
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let taken = self.take(what, N as u64)?;
        Ok(taken.try_into().expect("take returns exactly N bytes"))
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A length-prefixed UTF-8 string.
    pub(super) fn string(&mut self, what: &str) -> Result<&'a str> {
        let length = self.u64(what)?;
        let start = self.position;
        let taken = self.take(what, length)?;
        std::str::from_utf8(taken).map_err(|e| {
            RuntimeError::bad_file(
                self.path,
                format!("{what}{} that is not UTF-8 from its byte {}", self.place(start), e.valid_up_to()),
                "UTF-8 text, as the GGUF specification demands",
                "the file is damaged, or its converter is at fault",
            )
        })
    }

    /// A string that names something: not empty, no control characters, of a sane length.
    pub(super) fn name(&mut self, what: &str) -> Result<&'a str> {
        let name = self.string(what)?;
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
            return Err(self.bad(
                &format!("{what} {:?} of {} bytes", shorten(name), name.len()),
                &format!("1 to {MAX_NAME_BYTES} bytes without control characters"),
                "the file is damaged: download it again",
            ));
        }
        Ok(name)
    }
}

/// Metadata and tensor table may not be longer: what is read from them takes a few times as much memory. Real ones have some
/// ten million bytes, nearly all of it vocabulary.
pub(super) const MAX_HEADER_BYTES: usize = 128 << 20;

/// Longest key that the specification allows (2^16 - 1 bytes); tensor names are shorter still.
pub(super) const MAX_NAME_BYTES: usize = 65_535;

/// The first characters of a text that may be long, for messages.
pub(super) fn shorten(text: &str) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text.to_string(),
    }
}
