//! Writing GGUF version 3, tensor data as a stream.
//!
//! First everything is declared, so that the header and all offsets are known; then data is written in the declared order, in
//! pieces of any size, so that a model larger than memory can be made. The file appears under its name only when complete.

use super::metadata::Metadata;
use super::tensors::TensorInfo;
use super::value::{Value, write_string};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_ALIGNMENT, MAX_ARRAY_DEPTH, is_valid_alignment};
use crate::atomic_file::AtomicFile;
use crate::error::{Result, RuntimeError};
use std::collections::HashSet;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tierwise_cost::quant::QuantFormat;

/// Declares a file: metadata and tensors. [`Self::start`] goes on to the data.
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    alignment: u64,
    metadata: Metadata,
    /// Offsets relative to the data section.
    tensors: Vec<TensorInfo>,
    names: HashSet<String>,
    /// Where the next tensor's data would end up, relative to the data section.
    next_offset: u64,
}

/// Takes the tensor data of a declared file.
#[derive(Debug)]
pub struct GgufDataWriter {
    out: BufWriter<AtomicFile>,
    path: PathBuf,
    alignment: u64,
    tensors: Vec<TensorInfo>,
    /// The tensor being written, and how much of it is there.
    current: usize,
    current_bytes: u64,
    file_bytes: u64,
}

const VERSION: u32 = 3;

fn bad(what: &'static str, found: impl Into<String>, expected: impl Into<String>) -> RuntimeError {
    RuntimeError::BadRequest { what, found: found.into(), expected: expected.into() }
}

impl GgufWriter {
    /// A file to be called `path`. Nothing is written before [`Self::start`].
    pub fn new(path: &Path, alignment: u64) -> Result<Self> {
        if !is_valid_alignment(alignment) {
            return Err(bad("GGUF alignment", alignment.to_string(), format!("a power of two from 8 to {MAX_ALIGNMENT}")));
        }
        let mut metadata = Metadata::new(path);
        if alignment != DEFAULT_ALIGNMENT {
            // Not above MAX_ALIGNMENT, so it fits; u32 is the type that ggml insists on.
            metadata.insert(ALIGNMENT_KEY, alignment as u32)?;
        }
        Ok(Self { path: path.to_path_buf(), alignment, metadata, tensors: Vec::new(), names: HashSet::new(), next_offset: 0 })
    }

    /// Adds a metadata entry.
    pub fn meta(&mut self, key: &str, value: impl Into<Value>) -> Result<()> {
        let value = value.into();
        if key == ALIGNMENT_KEY {
            return Err(bad("GGUF metadata", key, "the alignment given to GgufWriter::new"));
        }
        check_name("GGUF metadata key", key)?;
        if value.depth() > MAX_ARRAY_DEPTH {
            return Err(bad("GGUF array depth", value.depth().to_string(), format!("at most {MAX_ARRAY_DEPTH}")));
        }
        self.metadata.insert(key, value)
    }

    /// Declares the next tensor.
    pub fn tensor(
        &mut self,
        name: &str,
        shape: &[u64], // outermost first
        format: QuantFormat,
    ) -> Result<()> {
        check_name("GGUF tensor name", name)?;
        let bytes = match format.tensor_bytes(shape) {
            Some(bytes) if bytes.0 > 0 && shape.len() <= 4 => bytes.0,
            _ => {
                return Err(bad(
                    "GGUF tensor shape",
                    format!("{shape:?} for {name:?}"),
                    format!("1 to 4 dimensions above 0, the last a multiple of {} for {format}", format.layout().elems),
                ));
            }
        };
        let offset = self.next_offset;
        let next_offset = offset
            .checked_add(bytes)
            .and_then(|end| end.checked_next_multiple_of(self.alignment))
            .ok_or_else(|| bad("GGUF size", "more than 2^64 bytes", "a file that can exist"))?;
        if !self.names.insert(name.to_string()) {
            return Err(bad("GGUF tensor name", format!("{name:?} twice"), "each tensor once"));
        }
        self.next_offset = next_offset;
        self.tensors.push(TensorInfo { name: name.to_string(), shape: shape.to_vec(), format, bytes, part: 0, offset });
        Ok(())
    }

    /// Creates the file under a temporary name and writes all that was declared.
    pub fn start(self) -> Result<GgufDataWriter> {
        let header = self.header();
        let mut out = BufWriter::with_capacity(1 << 20, AtomicFile::create(&self.path)?);
        out.write_all(&header).map_err(|e| RuntimeError::io("write", &self.path, e))?;
        Ok(GgufDataWriter {
            out,
            path: self.path,
            alignment: self.alignment,
            tensors: self.tensors,
            current: 0,
            current_bytes: 0,
            file_bytes: header.len() as u64,
        })
    }

    fn header(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        out.extend_from_slice(&(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in self.metadata.iter() {
            write_string(key, &mut out);
            out.extend_from_slice(&value.type_id().to_le_bytes());
            value.write(&mut out);
        }
        for t in &self.tensors {
            write_string(&t.name, &mut out);
            out.extend_from_slice(&(t.shape.len() as u32).to_le_bytes());
            for d in t.shape.iter().rev() {
                out.extend_from_slice(&d.to_le_bytes());
            }
            out.extend_from_slice(&t.format.layout().ggml_id.to_le_bytes());
            out.extend_from_slice(&t.offset.to_le_bytes());
        }
        // The reference implementation pads the header even when there are no tensors.
        out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
        out
    }
}

impl GgufDataWriter {
    /// Appends `bytes` to the tensor `name`. Tensors come in the declared order, each in as many pieces as wanted.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(tensor) = self.tensors.get(self.current) else {
            return Err(bad("GGUF tensor data", format!("data for {name:?}"), "no more data: all tensors are complete"));
        };
        if tensor.name != name {
            let expected = format!("{} bytes more of {:?}", tensor.bytes - self.current_bytes, tensor.name);
            return Err(bad("GGUF tensor data", format!("data for {name:?}"), expected));
        }
        let missing = tensor.bytes - self.current_bytes;
        if bytes.len() as u64 > missing {
            return Err(bad(
                "GGUF tensor data",
                format!("{} bytes for {name:?}", bytes.len()),
                format!("{missing} bytes to complete {} of {:?}", tensor.format, tensor.shape),
            ));
        }
        let padding = if bytes.len() as u64 == missing {
            self.current += 1;
            self.current_bytes = 0;
            tensor.bytes.next_multiple_of(self.alignment) - tensor.bytes
        } else {
            self.current_bytes += bytes.len() as u64;
            0
        };
        self.append(bytes)?;
        // At most MAX_ALIGNMENT bytes.
        self.append(&vec![0; padding as usize])
    }

    /// Completes the file and gives it its name. Returns its size in bytes.
    pub fn finish(self) -> Result<u64> {
        if let Some(tensor) = self.tensors.get(self.current) {
            let missing = tensor.bytes - self.current_bytes;
            return Err(bad(
                "GGUF tensor data",
                format!("the end with {} of {} tensors complete", self.current, self.tensors.len()),
                format!("{missing} bytes more of {:?}", tensor.name),
            ));
        }
        let file = self.out.into_inner().map_err(|e| RuntimeError::io("write", &self.path, e.into_error()))?;
        file.commit()?;
        Ok(self.file_bytes)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| RuntimeError::io("write", &self.path, e))?;
        self.file_bytes += bytes.len() as u64;
        Ok(())
    }
}

fn check_name(what: &'static str, name: &str) -> Result<()> {
    if name.is_empty() || name.len() > super::cursor::MAX_NAME_BYTES || name.chars().any(char::is_control) {
        return Err(bad(what, format!("{name:?}"), "text without control characters, not empty"));
    }
    Ok(())
}
