//! Bytes of a GGUF file to its metadata and tensor table, without IO: this is what is fuzzed.
//!
//! Layout (versions 2 and 3, little-endian): magic, version u32, tensor count u64, metadata count u64, metadata entries, tensor
//! entries, padding to the alignment, tensor data. Strings and arrays carry u64 lengths.

use super::cursor::Cursor;
use super::metadata::Metadata;
use super::tensors::{self, TensorInfo};
use super::value::Value;
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_ALIGNMENT, is_valid_alignment};
use crate::error::{Result, RuntimeError};
use std::path::Path;

/// Everything in front of the tensor data of one file.
#[derive(Debug, Clone)]
pub struct Header {
    /// GGUF version, 2 or 3.
    pub version: u32,
    /// All keys and values.
    pub metadata: Metadata,
    /// All tensors in file order, checked against the file's length; `part` is 0.
    pub tensors: Vec<TensorInfo>,
    /// Tensor data begins at multiples of this.
    pub alignment: u64,
    /// Where the data section begins.
    pub data_start: u64,
}

/// More entries than this are taken for damage; files in use have fewer than a hundred.
const MAX_METADATA_ENTRIES: u64 = 1 << 16;

/// Bytes of the shortest metadata entry: key length, a key of one byte, type, a value of one byte.
const MIN_METADATA_ENTRY_BYTES: u64 = 8 + 1 + 4 + 1;

impl Header {
    /// Parses a whole file (or its map); `path` only serves messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        if !bytes.starts_with(&MAGIC) {
            return Err(not_gguf(bytes, path));
        }
        let mut cursor = Cursor::new(bytes, path);
        cursor.take("magic", MAGIC.len() as u64)?;
        let version = read_version(&mut cursor)?;
        let num_tensors = cursor.u64("number of tensors")?;
        let num_entries = cursor.u64("number of metadata entries")?;
        let metadata = read_metadata(&mut cursor, num_entries)?;
        let alignment = read_alignment(&metadata, path)?;
        let mut tensors = tensors::read_entries(&mut cursor, num_tensors)?;
        // A position in a slice is below 2^63, so adding an alignment does not overflow.
        let data_start = (cursor.position() as u64).next_multiple_of(alignment);
        tensors::place(&mut tensors, data_start, alignment, bytes.len() as u64, path)?;
        Ok(Self { version, metadata, tensors, alignment, data_start })
    }
}

fn read_version(cursor: &mut Cursor) -> Result<u32> {
    let version = cursor.u32("version")?;
    let expected = "GGUF version 2 or 3, little-endian";
    match version {
        2 | 3 => Ok(version),
        1 => Err(cursor.bad("GGUF version 1", expected, "convert the model again with current tools")),
        // A small number in the other byte order.
        _ if version.swap_bytes() <= 0xffff && version > 0xffff => Err(cursor.bad(
            &format!("a big-endian GGUF file of version {}", version.swap_bytes()),
            expected,
            "take or convert a little-endian file",
        )),
        _ => Err(cursor.bad(
            &format!("GGUF version {version}"),
            expected,
            "the file is damaged, or newer than this program: update",
        )),
    }
}

fn read_metadata(cursor: &mut Cursor, count: u64) -> Result<Metadata> {
    cursor.check_count("metadata entries", count, MIN_METADATA_ENTRY_BYTES)?;
    if count > MAX_METADATA_ENTRIES {
        let expected = format!("at most {MAX_METADATA_ENTRIES}");
        return Err(cursor.bad(&format!("{count} metadata entries"), &expected, "the file is damaged: download it again"));
    }
    let mut metadata = Metadata::new(cursor.path());
    for _ in 0..count {
        cursor.set_context("");
        let key = cursor.name("metadata key")?;
        cursor.set_context(key);
        let id = cursor.u32("value type")?;
        let value = Value::read(cursor, id)?;
        metadata.insert(key, value)?;
    }
    cursor.set_context("");
    Ok(metadata)
}

fn read_alignment(metadata: &Metadata, path: &Path) -> Result<u64> {
    let alignment = metadata.opt_u64(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
    if is_valid_alignment(alignment) {
        return Ok(alignment);
    }
    Err(RuntimeError::bad_file(
        path,
        format!("{ALIGNMENT_KEY} {alignment}"),
        format!("a power of two from 8 to {MAX_ALIGNMENT}"),
        "the file is damaged, or its converter is at fault",
    ))
}

/// What a file without the magic is, as far as its first bytes tell.
fn not_gguf(bytes: &[u8], path: &Path) -> RuntimeError {
    let start = &bytes[..bytes.len().min(64)];
    let text = String::from_utf8_lossy(start).trim_start().to_lowercase();
    let (found, hint) = if bytes.is_empty() {
        ("an empty file".to_string(), "the download failed: repeat it")
    } else if MAGIC.starts_with(bytes) {
        (format!("a file of {} bytes", bytes.len()), "the file is truncated: download it again")
    } else if text.starts_with("<!doctype") || text.starts_with("<html") || text.starts_with("<?xml") {
        ("a web page".to_string(), "the address leads to a page, not to the file: use its download link")
    } else if text.starts_with("version https://git-lfs") {
        ("a git-lfs pointer".to_string(), "the file itself was not fetched: run `git lfs pull`")
    } else if start.starts_with(b"FUGG") {
        ("a GGUF file of the other byte order".to_string(), "take or convert a little-endian file")
    } else if [b"lmgg", b"tjgg", b"fmgg", b"algg"].iter().any(|magic| start.starts_with(*magic)) {
        ("a GGML file from before GGUF".to_string(), "convert the model again with current tools")
    } else if start.starts_with(b"PK") {
        ("a zip archive, perhaps of PyTorch".to_string(), "convert the model to GGUF")
    } else if start.get(8) == Some(&b'{') {
        ("what looks like a safetensors file".to_string(), "convert the model to GGUF")
    } else if start.iter().all(|b| *b == 0) {
        ("zeros".to_string(), "the download did not finish: repeat it")
    } else {
        (format!("the bytes {:02x?}", &start[..start.len().min(4)]), "this is not a model in GGUF form")
    };
    RuntimeError::bad_file(path, found, "a GGUF file (first bytes \"GGUF\")", hint)
}
