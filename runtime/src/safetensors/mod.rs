//! Hugging Face weights: one safetensors file, or a folder of them with an index.
//!
//! Read through memory maps and checked like GGUF files: nothing in the header is believed before it was compared with the file.
//! Plain formats (F32, F16, BF16) are tensors like those of GGUF files; 8-bit and 4-bit floats are [`RawTensor`]s, which only their
//! scales give a meaning. [`header`] has the layout.

pub mod header;

pub use header::{RawKind, RawTensor};

use crate::error::{Result, RuntimeError};
use crate::gguf::TensorInfo;
use crate::gguf::file::missing_tensor;
use crate::gguf::map::{HostWeights, bring_in, map_file};
use memmap2::Mmap;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Weights in safetensors form, open for reading.
#[derive(Debug)]
pub struct SafeTensors {
    path: PathBuf,
    parts: Vec<(PathBuf, Mmap)>,
    /// Of all files, ordered by file and place.
    tensors: Vec<TensorInfo>,
    /// Name to place in `tensors`.
    index: HashMap<String, usize>,
    /// By name.
    raw: BTreeMap<String, RawTensor>,
}

const SINGLE_NAME: &str = "model.safetensors";
const INDEX_NAME: &str = "model.safetensors.index.json";

/// The index of a model in several files.
#[derive(Deserialize)]
struct Index {
    /// Tensor name to file name.
    weight_map: BTreeMap<String, String>,
}

impl SafeTensors {
    /// Opens a file, an index, or a folder with `model.safetensors` or `model.safetensors.index.json` (the first is preferred,
    /// as the `transformers` library does).
    pub fn open(path: &Path) -> Result<Self> {
        let meta = fs::metadata(path).map_err(|e| RuntimeError::io("open", path, e))?;
        let is_index = path.file_name().is_some_and(|n| n.to_string_lossy().ends_with(".index.json"));
        let (single, index) = (path.join(SINGLE_NAME), path.join(INDEX_NAME));
        if !meta.is_dir() {
            if is_index { Self::open_index(path, path) } else { Self::open_files(path, vec![path.to_path_buf()]) }
        } else if single.exists() {
            Self::open_files(path, vec![single])
        } else if index.exists() {
            Self::open_index(path, &index)
        } else {
            Err(RuntimeError::bad_file(
                path,
                "a folder without weights",
                format!("{SINGLE_NAME} or {INDEX_NAME} in it"),
                "give the folder of a model in safetensors form",
            ))
        }
    }

    fn open_index(path: &Path, index_path: &Path) -> Result<Self> {
        let bad = |found: String, expected: &str| RuntimeError::bad_file(index_path, found, expected, "download the model again");
        let io = |e| RuntimeError::io("read", index_path, e);
        let bytes = fs::metadata(index_path).map_err(io)?.len();
        if bytes > header::MAX_HEADER_BYTES {
            return Err(bad(format!("an index of {bytes} bytes"), "at most 100 MB"));
        }
        let text = fs::read(index_path).map_err(io)?;
        let index: Index = serde_json::from_slice(&text).map_err(|e| {
            bad(format!("an index that is not valid: {e}"), "an object with a weight_map from tensor to file name")
        })?;
        let file_names: BTreeSet<&String> = index.weight_map.values().collect();
        let mut files = Vec::new();
        for name in file_names {
            // Only files beside the index: an index must not lead elsewhere.
            let mut components = Path::new(name).components();
            if !matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) {
                return Err(bad(format!("the file name {name:?}"), "a file name without folders"));
            }
            let file = index_path.with_file_name(name);
            if !file.exists() {
                return Err(bad(format!("no file {name}"), "all files that the index names, in its folder"));
            }
            files.push(file);
        }
        if files.is_empty() {
            return Err(bad("an empty weight_map".to_string(), "at least one tensor"));
        }
        let model = Self::open_files(path, files)?;
        for (tensor, file) in &index.weight_map {
            let part = model.tensor(tensor).map(|t| t.part).or_else(|| model.raw(tensor).map(|t| t.part));
            let home = part.map(|p| &model.parts[p].0);
            if home != Some(&index_path.with_file_name(file)) {
                return Err(bad(format!("no tensor {tensor:?} in {file}"), "every tensor in the file that the index says"));
            }
        }
        Ok(model)
    }

    fn open_files(path: &Path, files: Vec<PathBuf>) -> Result<Self> {
        let mut parts = Vec::with_capacity(files.len());
        let mut tensors: Vec<TensorInfo> = Vec::new();
        let mut index = HashMap::new();
        let mut raw: BTreeMap<String, RawTensor> = BTreeMap::new();
        for (part, file) in files.into_iter().enumerate() {
            let map = map_file(&file, "a safetensors file")?;
            let twice = |name: &str| {
                let found = format!("tensor {name:?}, which another file has too");
                RuntimeError::bad_file(&file, found, "each tensor once", "download the model again")
            };
            let tables = header::parse(&map, &file)?;
            for tensor in tables.plain {
                if raw.contains_key(&tensor.name) || index.insert(tensor.name.clone(), tensors.len()).is_some() {
                    return Err(twice(&tensor.name));
                }
                tensors.push(TensorInfo { part, ..tensor });
            }
            for tensor in tables.raw {
                let name = tensor.name.clone();
                if index.contains_key(&name) || raw.insert(name.clone(), RawTensor { part, ..tensor }).is_some() {
                    return Err(twice(&name));
                }
            }
            parts.push((file, map));
        }
        Ok(Self { path: path.to_path_buf(), parts, tensors, index, raw })
    }

    /// Brings all weights in, as `how` says.
    ///
    /// # Errors
    /// When a file cannot be read or the system refuses the memory.
    pub fn bring_in(&mut self, how: HostWeights) -> Result<()> {
        self.parts.iter_mut().try_for_each(|(path, map)| bring_in(path, map, how))
    }

    /// The path given to [`Self::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensors of all files, ordered by file and place.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|i| &self.tensors[*i])
    }

    /// The raw tensor of this name.
    pub fn raw(&self, name: &str) -> Option<&RawTensor> {
        self.raw.get(name)
    }

    /// All raw tensors.
    pub fn raw_tensors(&self) -> impl Iterator<Item = &RawTensor> {
        self.raw.values()
    }

    /// The data of a raw tensor of this model.
    ///
    /// # Panics
    /// When `tensor` is not one of [`Self::raw_tensors`].
    pub fn raw_data(&self, tensor: &RawTensor) -> &[u8] {
        // Fits usize: the range was checked against the map's length.
        &self.parts[tensor.part].1[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize]
    }

    /// The tensor of this name, or an error that says that it is missing.
    pub fn require_tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(name).ok_or_else(|| missing_tensor(&self.path, name))
    }

    /// The data of a tensor of this model, straight from the memory map. The format promises no alignment: convert elements with
    /// `from_le_bytes` or `bytemuck::pod_read_unaligned`.
    ///
    /// # Panics
    /// When `tensor` is not one of [`Self::tensors`].
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        // Fits usize: the range was checked against the map's length.
        &self.parts[tensor.part].1[tensor.offset as usize..tensor.end() as usize]
    }

    /// File and position of a tensor's data, for positional reads.
    ///
    /// # Panics
    /// When `tensor` is not one of [`Self::tensors`].
    pub fn location(&self, tensor: &TensorInfo) -> (&Path, u64) {
        (&self.parts[tensor.part].0, tensor.offset)
    }

    /// Size of all files together.
    pub fn total_bytes(&self) -> u64 {
        self.parts.iter().map(|(_, map)| map.len() as u64).sum()
    }

    /// Size of all tensors together.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum::<u64>() + self.raw.values().map(|t| t.bytes).sum::<u64>()
    }
}

#[cfg(test)]
mod tests;
