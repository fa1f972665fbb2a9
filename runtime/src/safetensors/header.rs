//! Bytes of one safetensors file to its tensor table, without IO.
//!
//! Layout: u64 header length, a JSON object, the data. Each entry has a type, a shape and the ends of its data; data must cover
//! the rest of the file without overlap or hole. Source: the format section of the safetensors project's README.

use crate::error::{Result, RuntimeError};
use crate::gguf::TensorInfo;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use tierwise_cost::quant::QuantFormat;

/// Longest header that the specification allows.
pub(super) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The entry that holds free text instead of a tensor.
const METADATA_KEY: &str = "__metadata__";

const DAMAGED: &str = "the file is damaged, or its writer is at fault";

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The entries in file order. A plain map would silently keep the last of two entries of one name.
struct Entries(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct EntriesVisitor;

        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entries, A::Error> {
                let mut entries = Vec::new();
                let mut names = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!("{name:?} twice")));
                    }
                    if name == METADATA_KEY {
                        map.next_value::<BTreeMap<String, String>>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor)
    }
}

/// A tensor of bytes that mean nothing without another tensor: 8-bit floats, or pairs of 4-bit floats, with their scales.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawTensor {
    /// Name as in the file.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// What a byte is.
    pub kind: RawKind,
    /// Which file, from 0.
    pub part: usize,
    /// Where the data begins, counted from the start of that file.
    pub offset: u64,
    /// Length of the data.
    pub bytes: u64,
}

/// What a byte of a [`RawTensor`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RawKind {
    /// A float of 4 exponent and 3 mantissa bits (`F8_E4M3`).
    Fp8E4m3,
    /// A byte (`U8`): two 4-bit floats, or a scale, of MXFP4 weights.
    Byte,
}

/// The tensors of a file, each list ordered by place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    /// Those of plain elements.
    pub plain: Vec<TensorInfo>,
    /// The others.
    pub raw: Vec<RawTensor>,
}

/// Parses a whole file (or its map); `path` only serves messages.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Tables> {
    let bad = |found: String, expected: &str, hint: &str| RuntimeError::bad_file(path, found, expected, hint);
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(bad(format!("{} bytes", bytes.len()), "a safetensors file", "the download failed: repeat it"));
    };
    let length = u64::from_le_bytes(*length);
    if rest.first() != Some(&b'{') || length > MAX_HEADER_BYTES {
        return Err(bad(
            format!("the first bytes {:02x?}", &bytes[..bytes.len().min(12)]),
            "a safetensors file: a header length of at most 100 MB and a JSON object",
            "this is not a safetensors file, or only a pointer to it (then run `git lfs pull`)",
        ));
    }
    // Not above MAX_HEADER_BYTES.
    let Some((json, data)) = rest.split_at_checked(length as usize) else {
        return Err(bad(
            format!("a header of {length} bytes and only {} bytes left", rest.len()),
            "a header inside the file",
            &format!("the file is truncated, at least {} bytes are missing: download it again", length - rest.len() as u64),
        ));
    };
    let entries: Entries = serde_json::from_slice(json)
        .map_err(|e| bad(format!("a header that is not valid: {e}"), "a safetensors header", DAMAGED))?;
    let data_start = 8 + length;
    let mut tables = Tables::default();
    for (name, entry) in entries.0 {
        let kind = match entry.dtype.as_str() {
            "F8_E4M3" => RawKind::Fp8E4m3,
            "U8" => RawKind::Byte,
            _ => {
                tables.plain.push(place(name, entry, data_start, path)?);
                continue;
            }
        };
        let offset = start_of(&name, &entry, 1, data_start, path)?;
        let (shape, bytes) = (entry.shape, entry.data_offsets.1 - entry.data_offsets.0);
        tables.raw.push(RawTensor { name, shape, kind, part: 0, offset, bytes });
    }
    tables.plain.sort_by_key(|t| (t.offset, t.bytes));
    tables.raw.sort_by_key(|t| (t.offset, t.bytes));
    let plain = tables.plain.iter().map(|t| (t.name.as_str(), t.offset, t.bytes));
    let raw = tables.raw.iter().map(|t| (t.name.as_str(), t.offset, t.bytes));
    let mut extents: Vec<_> = plain.chain(raw).collect();
    extents.sort_by_key(|(_, offset, bytes)| (*offset, *bytes));
    check_cover(&extents, data_start, data_start + data.len() as u64, path)?;
    Ok(tables)
}

fn place(name: String, entry: Entry, data_start: u64, path: &Path) -> Result<TensorInfo> {
    let bad = |found: String, expected: String, hint: &str| {
        Err(RuntimeError::bad_file(path, format!("tensor {name:?} {found}"), expected, hint))
    };
    let format = match entry.dtype.as_str() {
        "F32" => QuantFormat::F32,
        "F16" => QuantFormat::F16,
        "BF16" => QuantFormat::BF16,
        other => {
            let hint = "take the model in one of these, or as a GGUF file";
            return bad(format!("of type {other:?}"), "F32, F16 or BF16, or F8_E4M3 or U8 (MXFP4) with scales".to_string(), hint);
        }
    };
    let offset = start_of(&name, &entry, u64::from(format.layout().bytes), data_start, path)?;
    let bytes = entry.data_offsets.1 - entry.data_offsets.0;
    Ok(TensorInfo { name, shape: entry.shape, format, bytes, part: 0, offset })
}

/// Where in the file an entry's data begins, which has as many bytes as its shape and ends below 2^64.
fn start_of(name: &str, entry: &Entry, element_bytes: u64, data_start: u64, path: &Path) -> Result<u64> {
    let (begin, end) = entry.data_offsets;
    let bad = |expected: &str| {
        let found = format!("tensor {name:?} at {begin}..{end} with shape {:?} of {}", entry.shape, entry.dtype);
        RuntimeError::bad_file(path, found, expected, DAMAGED)
    };
    let bytes = entry.shape.iter().try_fold(element_bytes, |product, d| product.checked_mul(*d));
    let bytes = bytes.filter(|n| begin.checked_add(*n) == Some(end)).ok_or_else(|| bad("as many bytes as the shape has"))?;
    let start = begin.checked_add(data_start).filter(|start| start.checked_add(bytes).is_some());
    start.ok_or_else(|| bad("an end below 2^64"))
}

/// Checks that the tensors, ordered by offset, fill the file from `data_start` to its end.
fn check_cover(tensors: &[(&str, u64, u64)], data_start: u64, file_bytes: u64, path: &Path) -> Result<()> {
    let mut covered = data_start;
    for (name, offset, bytes) in tensors.iter().copied() {
        if offset != covered {
            let what = if offset < covered { "overlaps the one before it" } else { "leaves a hole before it" };
            let found = format!("tensor {name:?} at byte {offset}, which {what}");
            return Err(RuntimeError::bad_file(path, found, format!("its data at byte {covered}"), DAMAGED));
        }
        covered = offset + bytes;
    }
    if covered == file_bytes {
        return Ok(());
    }
    let hint = match covered.checked_sub(file_bytes) {
        Some(missing) => format!("the file is truncated, {missing} bytes are missing: download it again"),
        None => DAMAGED.to_string(),
    };
    Err(RuntimeError::bad_file(path, format!("a file of {file_bytes} bytes"), format!("{covered} bytes"), hint))
}
