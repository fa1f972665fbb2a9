//! An open GGUF model: one file or all parts of a split one, mapped into memory.
//!
//! Everything is checked in [`Gguf::open`]; afterwards access cannot fail.

use super::header::Header;
use super::map::{HostWeights, bring_in, map_file};
use super::metadata::Metadata;
use super::split;
use super::tensors::TensorInfo;
use crate::error::{Result, RuntimeError};
use memmap2::Mmap;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A GGUF model, open for reading.
#[derive(Debug)]
pub struct Gguf {
    parts: Vec<Part>,
    /// That of the first part; its tensors were moved to `tensors`.
    version: u32,
    alignment: u64,
    metadata: Metadata,
    /// Of all parts, in file order.
    tensors: Vec<TensorInfo>,
    /// Name to place in `tensors`.
    index: HashMap<String, usize>,
}

/// One file.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    map: Mmap,
}

impl Gguf {
    /// Opens a model. Of a split model give the first part; the others are found by their names.
    pub fn open(path: &Path) -> Result<Self> {
        let map = map_file(path, "a GGUF file")?;
        let mut first = Self::parse(&map, path)?;
        let others = split::other_parts(path, &first)?;
        let num_parts = 1 + others.len();
        let mut tensors = std::mem::take(&mut first.tensors);
        let mut parts = vec![Part { path: path.to_path_buf(), map }];
        for (i, other) in others.into_iter().enumerate() {
            let part = i + 1;
            let map = map_file(&other, "a GGUF file")?;
            let header = Self::parse(&map, &other)?;
            split::check_part(&other, &header, part as u64, num_parts as u64)?;
            tensors.extend(header.tensors.into_iter().map(|t| TensorInfo { part, ..t }));
            parts.push(Part { path: other, map });
        }
        if num_parts > 1 {
            split::check_total(path, &first, tensors.len())?;
        }
        let mut index = HashMap::with_capacity(tensors.len());
        for (i, t) in tensors.iter().enumerate() {
            if let Some(earlier) = index.insert(t.name.clone(), i) {
                let (a, b) = (tensors[earlier].part + 1, t.part + 1);
                return Err(RuntimeError::bad_file(
                    path,
                    format!("tensor {:?} in part {a} and in part {b}", t.name),
                    "each tensor once",
                    "the parts are not of one model: download them again",
                ));
            }
        }
        Ok(Self { parts, version: first.version, alignment: first.alignment, metadata: first.metadata, tensors, index })
    }

    /// Brings all weights in, as `how` says.
    ///
    /// # Errors
    /// When a file cannot be read or the system refuses the memory.
    pub fn bring_in(&mut self, how: HostWeights) -> Result<()> {
        self.parts.iter_mut().try_for_each(|p| bring_in(&p.path, &mut p.map, how))
    }

    /// Parses the bytes of one file without any IO; `path` only serves messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Header> {
        Header::parse(bytes, path)
    }

    /// The path given to [`Self::open`].
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// Files of the model, in order.
    pub fn part_paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.parts.iter().map(|p| p.path.as_path())
    }

    /// Metadata of the first part.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Tensors of all parts, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|i| &self.tensors[*i])
    }

    /// The tensor of this name, or an error that says that it is missing.
    pub fn require_tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(name).ok_or_else(|| missing_tensor(self.path(), name))
    }

    /// The data of a tensor of this model, straight from the memory map, aligned to [`Self::alignment`] of its part (8 or more).
    ///
    /// # Panics
    /// When `tensor` is not one of [`Self::tensors`].
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        // Fits usize: the range was checked against the map's length.
        &self.parts[tensor.part].map[tensor.offset as usize..tensor.end() as usize]
    }

    /// File and position of a tensor's data, for positional reads.
    ///
    /// # Panics
    /// When `tensor` is not one of [`Self::tensors`].
    pub fn location(&self, tensor: &TensorInfo) -> (&Path, u64) {
        (&self.parts[tensor.part].path, tensor.offset)
    }

    /// Size of all files together.
    pub fn total_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.map.len() as u64).sum()
    }

    /// Size of all tensors together, without headers and padding.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }

    /// GGUF version of the first part, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Alignment of tensor data in the first part.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }
}

/// The error for a tensor that a model needs and does not have.
pub(crate) fn missing_tensor(path: &Path, name: &str) -> RuntimeError {
    RuntimeError::bad_file(
        path,
        format!("no tensor {name:?}"),
        "this tensor, which the model cannot do without",
        "the file is incomplete, or of another architecture than it says",
    )
}
