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

/// Parses a whole file (or its map); `path` only serves messages. Tensors come ordered by their place in the file.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Vec<TensorInfo>> {
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
    let mut tensors = entries.0.into_iter().map(|(name, e)| place(name, e, data_start, path)).collect::<Result<Vec<_>>>()?;
    tensors.sort_by_key(|t| (t.offset, t.bytes));
    check_cover(&tensors, data_start, data_start + data.len() as u64, path)?;
    Ok(tensors)
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
            return bad(format!("of type {other:?}"), "F32, F16 or BF16".to_string(), hint);
        }
    };
    let (begin, end) = entry.data_offsets;
    let element_bytes = u64::from(format.layout().bytes);
    let bytes = entry.shape.iter().try_fold(element_bytes, |product, d| product.checked_mul(*d));
    let Some(bytes) = bytes.filter(|n| begin.checked_add(*n) == Some(end)) else {
        let found = format!("at {begin}..{end} with shape {:?} of {format}", entry.shape);
        return bad(found, "as many bytes as the shape has".to_string(), DAMAGED);
    };
    match begin.checked_add(data_start).filter(|start| start.checked_add(bytes).is_some()) {
        Some(offset) => Ok(TensorInfo { name, shape: entry.shape, format, bytes, part: 0, offset }),
        None => bad(format!("at {begin}..{end}"), "an end below 2^64".to_string(), DAMAGED),
    }
}

/// Checks that the tensors, ordered by offset, fill the file from `data_start` to its end.
fn check_cover(tensors: &[TensorInfo], data_start: u64, file_bytes: u64, path: &Path) -> Result<()> {
    let mut covered = data_start;
    for t in tensors {
        if t.offset != covered {
            let what = if t.offset < covered { "overlaps the one before it" } else { "leaves a hole before it" };
            let found = format!("tensor {:?} at byte {}, which {what}", t.name, t.offset);
            return Err(RuntimeError::bad_file(path, found, format!("its data at byte {covered}"), DAMAGED));
        }
        covered = t.end();
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
