//! A model in other formats, as one GGUF file: a Hugging Face folder or a GGUF file in, a GGUF file out.
//!
//! Everything is decided before the first byte is written: the format of each tensor, the metadata (read back through the
//! importer and compared), the tokenizer (compared with the folder's own on probe texts) and whether the disk has room. Then the
//! tensors go through window by window, so that memory does not grow with the model, and the file appears only when complete.
//!
//! `formats`: which tensor gets which format. `metadata`: keys for models that come without. `vocabulary`: tokenizer.json to
//! `tokenizer.ggml.*`. `stream`: bytes in, bytes out.

mod formats;
mod metadata;
mod stream;
mod vocabulary;

pub use formats::{Fallback, RoleFormat, role_formats};

use crate::error::{Result, RuntimeError};
use crate::gguf::{DEFAULT_ALIGNMENT, Gguf, GgufWriter, Value};
use crate::import::gguf::file_type_of;
use crate::import::gguf_rope;
use crate::import::read_back::check_that_it_reads_back;
use crate::import::{HfFolder, ModelSource};
use std::path::{Path, PathBuf};
use std::time::Instant;
use stream::{Job, StoredTensor};
use tierwise_cost::model::{Geometry, ModelSpec, TensorId, TensorShape};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::recipe::Recipe;

/// What to make of the model.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// Which tensor gets which format.
    pub recipe: Recipe,
    /// Formats that go before the recipe's.
    pub roles: Vec<RoleFormat>,
    /// Quantise weights that are quantised already, which adds one error to the other.
    pub allow_requantize: bool,
    /// Write no vocabulary: for checkpoints that have none.
    pub without_tokenizer: bool,
    /// Replace an existing file.
    pub force: bool,
}

/// What was written.
#[derive(Debug, Clone)]
pub struct ConvertReport {
    /// The model in the file.
    pub spec: ModelSpec,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Size of the file.
    pub file_bytes: u64,
    /// Time it took, the final sync to disk included.
    pub seconds: f64,
    /// Tensors that got another format than asked for.
    pub fallbacks: Vec<Fallback>,
}

/// Converts `source` to the GGUF file `out`. `progress` is told source bytes done and in all.
///
/// # Errors
/// What is wrong with model, options or destination, before anything is written; [`RuntimeError::Io`] when reading or writing
/// fails later.
pub fn convert(
    source: &ModelSource,
    options: &ConvertOptions,
    out: &Path,
    progress: impl FnMut(u64, u64),
) -> Result<ConvertReport> {
    let start = Instant::now();
    if !options.force && out.exists() {
        return Err(RuntimeError::bad_file(out, "a file of this name", "a new name", "give --force to replace it"));
    }
    let plan = match source {
        ModelSource::Folder(folder) => plan_folder(folder, options, out)?,
        ModelSource::Gguf { gguf, spec } => plan_gguf(gguf, spec, options)?,
        ModelSource::Description { geometry, origin } => {
            return Err(RuntimeError::BadRequest {
                what: "model",
                found: format!("{} ({origin}), a description without weights", geometry.name),
                expected: "a GGUF file or a folder with safetensors".into(),
            });
        }
    };
    check_requantizing(&plan, options)?;
    check_room(out, plan.spec.total_bytes().0, free_bytes(out)?)?;
    let mut header = GgufWriter::new(out, plan.alignment)?;
    for (key, value) in &plan.keys {
        header.meta(key, value.clone())?;
    }
    for job in &plan.jobs {
        header.tensor(&job.name, &job.shape, job.format)?;
    }
    let source_bytes = plan.jobs.iter().map(|j| j.stored.num_bytes()).sum();
    let file_bytes = stream::write_all(header.start()?, &plan.files, &plan.jobs, source_bytes, progress)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(ConvertReport { spec: plan.spec, source_bytes, file_bytes, seconds, fallbacks: plan.fallbacks })
}

/// Everything decided.
struct Plan<'a> {
    spec: ModelSpec,
    alignment: u64,
    keys: Vec<(String, Value)>,
    /// Files to read from.
    files: Vec<PathBuf>,
    /// In file order.
    jobs: Vec<Job<'a>>,
    fallbacks: Vec<Fallback>,
}

fn plan_folder<'a>(folder: &'a HfFolder, options: &ConvertOptions, out: &Path) -> Result<Plan<'a>> {
    let stored = folder.spec();
    let path = folder.weights().path();
    let geometry = metadata::gguf_geometry(path, &stored.geometry)?;
    let (spec, fallbacks) = formats::choose(geometry, &stored.tensors, options)?;
    let mut files: Vec<PathBuf> = Vec::new();
    let mut jobs = Vec::with_capacity(spec.tensors.len());
    for (i, t) in spec.tensors.iter().enumerate() {
        let mut tensor = StoredTensor::new(stored.tensors[i].format, metadata::row_order(&stored.geometry, &spec.geometry, t));
        let id = TensorId(i as u32);
        if folder.is_converted(id) {
            tensor.make(path, folder.pieces(id).len() as u64, stored.tensors[i].bytes.0, move |piece| {
                folder.converted_piece(id, piece)
            });
        }
        for piece in folder.pieces(id).iter().filter(|_| !folder.is_converted(id)) {
            let info = folder.weights().require_tensor(&piece.tensor)?;
            let (file, offset) = folder.weights().location(info);
            let index = files.iter().position(|f| f == file).unwrap_or_else(|| {
                files.push(file.to_path_buf());
                files.len() - 1
            });
            // `bytes` has the checks of the piece's range.
            let bytes = folder.bytes(piece)?.len() as u64;
            let first = piece.first_element * u64::from(info.format.layout().bytes);
            tensor.push(index, offset + first, bytes);
        }
        jobs.push(Job { name: t.name.clone(), shape: t.shape.clone(), format: t.format, stored: tensor });
    }
    for (name, values) in gguf_rope::tensors_of(&spec.geometry) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut tensor = StoredTensor::new(QuantFormat::F32, None);
        tensor.make(path, 1, bytes.len() as u64, move |_| Ok(bytes.clone()));
        jobs.push(Job { name: name.into(), shape: vec![values.len() as u64], format: QuantFormat::F32, stored: tensor });
    }
    let mut keys = metadata::keys(&spec, &options.recipe)?;
    if options.without_tokenizer {
        keys.push(("tokenizer.ggml.model".into(), "no_vocab".into()));
    } else {
        keys.extend(vocabulary::keys(path, spec.vocab_size)?);
    }
    check_that_it_reads_back(&spec, &keys, out)?;
    Ok(Plan { spec, alignment: DEFAULT_ALIGNMENT, keys, files, jobs, fallbacks })
}

fn plan_gguf(gguf: &Gguf, stored: &ModelSpec, options: &ConvertOptions) -> Result<Plan<'static>> {
    let (spec, fallbacks) = formats::choose(stored.geometry.clone(), &stored.tensors, options)?;
    let files: Vec<PathBuf> = gguf.part_paths().map(Path::to_path_buf).collect();
    let mut jobs = Vec::with_capacity(spec.tensors.len());
    // In the order of the source, with its shapes: [1, hidden] stays [1, hidden].
    for info in gguf.tensors() {
        let Some(t) = spec.tensors.iter().find(|t| t.name == info.name) else {
            return Err(RuntimeError::bad_file(gguf.path(), format!("tensor {}", info.name), "a tensor of the model", ""));
        };
        let mut tensor = StoredTensor::new(info.format, None);
        tensor.push(info.part, info.offset, info.bytes);
        jobs.push(Job { name: t.name.clone(), shape: info.shape.clone(), format: t.format, stored: tensor });
    }
    // Those of the file's form are written anew.
    let own = |key: &str| {
        key.starts_with("split.") || ["general.alignment", "general.file_type", "general.quantization_version"].contains(&key)
    };
    let mut keys: Vec<(String, Value)> =
        gguf.metadata().iter().filter(|(key, _)| !own(key)).map(|(key, value)| (key.to_string(), value.clone())).collect();
    keys.push(("general.quantization_version".into(), 2u32.into()));
    if let Some(id) = file_type_of(options.recipe.name()) {
        keys.push(("general.file_type".into(), id.into()));
    }
    Ok(Plan { spec, alignment: gguf.alignment(), keys, files, jobs, fallbacks })
}

/// Quantising what was quantised adds errors, as llama.cpp warns: only on demand.
fn check_requantizing(plan: &Plan, options: &ConvertOptions) -> Result<()> {
    let plain = |f: QuantFormat| matches!(f, QuantFormat::F32 | QuantFormat::F16 | QuantFormat::BF16);
    let again = |j: &&Job| !plain(j.stored.format) && j.format != j.stored.format;
    match plan.jobs.iter().find(again) {
        Some(job) if !options.allow_requantize => Err(RuntimeError::bad_file(
            &plan.files[0],
            format!("tensor {} quantised to {} already", job.name, job.stored.format),
            format!("weights in F32, F16 or BF16, to make {} of them", job.format),
            "start from the unquantised model, or give --allow-requantize and accept the loss",
        )),
        _ => Ok(()),
    }
}

/// Bytes that this process may still write beside `out`.
fn free_bytes(out: &Path) -> Result<u64> {
    let folder = match out.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let s = rustix::fs::statvfs(folder).map_err(|e| RuntimeError::io("look at the disk of", out, e.into()))?;
    Ok(s.f_bavail.saturating_mul(s.f_frsize))
}

fn check_room(out: &Path, needed: u64, free: u64) -> Result<()> {
    if free >= needed {
        return Ok(());
    }
    use tierwise_cost::units::Bytes;
    Err(RuntimeError::bad_file(
        out,
        format!("{} free on its disk", Bytes(free)),
        format!("{} for the model", Bytes(needed)),
        "free some space, write to another disk, or choose a smaller format",
    ))
}

/// A tensor of the table without its format.
fn shape_of(t: &tierwise_cost::model::TensorSpec) -> TensorShape {
    TensorShape { name: t.name.clone(), role: t.role, layer: t.layer, shape: t.shape.clone() }
}

/// The model with these formats.
fn spec_with(geometry: Geometry, tensors: Vec<tierwise_cost::model::TensorSpec>, recipe: &Recipe) -> ModelSpec {
    ModelSpec { geometry, tensors, format_name: recipe.name().to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_before_anything_is_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let out = folder.path().join("out.gguf");
        let free = free_bytes(&out).expect("a disk");
        check_room(&out, free / 2, free).expect("there is room");
        let message = check_room(&out, 1 << 40, 1 << 30).expect_err("no room").to_string();
        assert!(message.contains("out.gguf") && message.contains("free") && message.contains("smaller format"), "{message}");
        assert!(free_bytes(&folder.path().join("no/such/out.gguf")).is_err());
    }
}
