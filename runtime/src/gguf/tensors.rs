//! The tensor table of a GGUF file and every check that makes its offsets safe to follow.
//!
//! After `place` each tensor lies inside the file, is aligned, overlaps no other and has exactly the bytes of its shape.

use super::cursor::{Cursor, shorten};
use crate::error::{Result, RuntimeError};
use std::collections::HashSet;
use std::path::Path;
use tierwise_cost::quant::QuantFormat;

/// Where a tensor is and what it holds. Also used for safetensors files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name as in the file.
    pub name: String,
    /// Dimensions, outermost first (the reverse of GGUF's own order); blocks run along the last.
    pub shape: Vec<u64>,
    /// How elements are stored.
    pub format: QuantFormat,
    /// Length of the data.
    pub bytes: u64,
    /// Which file of a split model, from 0.
    pub part: usize,
    /// Where the data begins, counted from the start of that file.
    pub offset: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn num_elements(&self) -> u64 {
        // Checked to fit when the file was read.
        self.shape.iter().product()
    }

    /// First byte after the data. Only after the tensor was checked against its file.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.bytes
    }
}

/// Most dimensions of a ggml tensor (`GGML_MAX_DIMS`).
const MAX_DIMS: u32 = 4;

/// Bytes of the shortest tensor entry: name length, a name of one byte, dimension count, one dimension, type, offset.
const MIN_ENTRY_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// Reads `count` entries. Offsets are still relative to the data section.
pub(super) fn read_entries(cursor: &mut Cursor, count: u64) -> Result<Vec<TensorInfo>> {
    let count = cursor.check_count("tensors", count, MIN_ENTRY_BYTES)?;
    let mut tensors = Vec::with_capacity(count.min(1 << 16));
    let mut names = HashSet::with_capacity(count.min(1 << 16));
    for _ in 0..count {
        cursor.set_context("");
        let name = cursor.name("tensor name")?;
        cursor.set_context(name);
        if !names.insert(name) {
            return Err(cursor.bad(
                "a second tensor of the same name",
                "each name once",
                "the file is damaged, or its converter is at fault",
            ));
        }
        tensors.push(read_entry(cursor, name)?);
    }
    cursor.set_context("");
    Ok(tensors)
}

fn read_entry(cursor: &mut Cursor, name: &str) -> Result<TensorInfo> {
    const DAMAGED: &str = "the file is damaged: download it again";
    let num_dims = cursor.u32("number of dimensions")?;
    if !(1..=MAX_DIMS).contains(&num_dims) {
        return Err(cursor.bad(&format!("a tensor of {num_dims} dimensions"), &format!("1 to {MAX_DIMS}"), DAMAGED));
    }
    let mut shape = Vec::with_capacity(num_dims as usize);
    for _ in 0..num_dims {
        shape.push(cursor.u64("dimension")?);
    }
    shape.reverse();
    let elements = shape.iter().try_fold(1u64, |product, d| product.checked_mul(*d));
    // ggml keeps element counts in i64.
    if !elements.is_some_and(|n| n > 0 && i64::try_from(n).is_ok()) {
        return Err(cursor.bad(
            &format!("a tensor of shape {shape:?}"),
            "no dimension of 0, and a number of elements below 2^63",
            DAMAGED,
        ));
    }
    let id = cursor.u32("tensor type")?;
    let Some(format) = QuantFormat::from_ggml_id(id) else {
        return Err(cursor.bad(
            &format!("weight format {}", QuantFormat::describe_ggml_id(id)),
            &format!("one of {}", QuantFormat::known_names()),
            "take a file of the model in one of these formats",
        ));
    };
    let Some(bytes) = format.tensor_bytes(&shape) else {
        return Err(cursor.bad(
            &format!("{format} with rows of {} elements in shape {shape:?}", shape[shape.len() - 1]),
            &format!("rows of a multiple of {} elements, and less than 2^64 bytes", format.layout().elems),
            DAMAGED,
        ));
    };
    let offset = cursor.u64("tensor offset")?;
    Ok(TensorInfo { name: name.to_string(), shape, format, bytes: bytes.0, part: 0, offset })
}

/// Makes offsets absolute and checks them against the file.
pub(super) fn place(tensors: &mut [TensorInfo], data_start: u64, alignment: u64, file_bytes: u64, path: &Path) -> Result<()> {
    let bad = |t: &TensorInfo, found: String, expected: String, hint: &str| {
        Err(RuntimeError::bad_file(path, format!("tensor {:?} {found}", shorten(&t.name)), expected, hint))
    };
    const DAMAGED: &str = "the file is damaged, or its converter is at fault";
    for t in tensors.iter_mut() {
        if !t.offset.is_multiple_of(alignment) {
            return bad(t, format!("at data offset {}", t.offset), format!("a multiple of the alignment {alignment}"), DAMAGED);
        }
        match t.offset.checked_add(data_start).filter(|start| start.checked_add(t.bytes).is_some()) {
            Some(start) => t.offset = start,
            None => return bad(t, format!("at data offset {}", t.offset), "an end below 2^64".to_string(), DAMAGED),
        }
    }
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
    by_offset.sort_by_key(|t| t.offset);
    for pair in by_offset.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        if a.end() > b.offset {
            let found = format!("at bytes {}..{} and tensor {:?} from byte {}", a.offset, a.end(), shorten(&b.name), b.offset);
            return bad(a, found, "tensors that do not overlap".to_string(), DAMAGED);
        }
    }
    check_ends(&by_offset, data_start, alignment, file_bytes, path)
}

/// Tells a truncated file (data in one piece, and the file ends inside it) from one with a false offset.
fn check_ends(by_offset: &[&TensorInfo], data_start: u64, alignment: u64, file_bytes: u64, path: &Path) -> Result<()> {
    let Some(first_outside) = by_offset.iter().position(|t| t.end() > file_bytes) else { return Ok(()) };
    let mut piece_end = data_start;
    for t in by_offset {
        // checked_next_multiple_of: a piece that ends at 2^64 is followed by nothing.
        if piece_end.checked_next_multiple_of(alignment) != Some(t.offset) {
            let t = by_offset[first_outside];
            return Err(RuntimeError::bad_file(
                path,
                format!("tensor {:?} at bytes {}..{} of a file of {file_bytes} bytes", shorten(&t.name), t.offset, t.end()),
                "tensors inside the file",
                "the file is truncated or damaged: download it again",
            ));
        }
        piece_end = t.end();
    }
    Err(RuntimeError::bad_file(
        path,
        format!("a file of {file_bytes} bytes that ends in tensor {:?}", shorten(&by_offset[first_outside].name)),
        format!("{piece_end} bytes"),
        format!("the file is truncated, {} bytes are missing: download it again", piece_end - file_bytes),
    ))
}
