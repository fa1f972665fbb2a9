//! A Hugging Face folder: `config.json` and safetensors, and where each tensor of the model lies in them.
//!
//! The model's table stacks a layer's experts in one tensor; checkpoints store one tensor per expert, or (transformers 5 in
//! memory order) all experts' gate and up projections in one. Either way a tensor is a concatenation of [`Piece`]s.

use super::convert_hf::{Conversion, MXFP4_GROUP_BYTES, convert, decode_fp8, fp8_scale_shape, repack_mxfp4};
use super::hf;
use super::hf_names::{self, Nesting};
use super::tensors::check_format;
use crate::error::{Result, RuntimeError};
use crate::quant::dequantize_row;
use crate::safetensors::{RawKind, RawTensor, SafeTensors};
use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path;
use tierwise_cost::model::{Geometry, ModelSpec, TensorId, TensorShape, TensorSpec, tensor_shapes};
use tierwise_cost::quant::QuantFormat;

/// A run of consecutive elements of a stored tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Name in the safetensors files.
    pub tensor: String,
    /// First element of it.
    pub first_element: u64,
    /// How many.
    pub num_elements: u64,
}

/// An opened folder.
#[derive(Debug)]
pub struct HfFolder {
    spec: ModelSpec,
    weights: SafeTensors,
    /// Parallel to `spec.tensors`.
    pieces: Vec<Vec<Piece>>,
    /// Parallel to `spec.tensors`: what turns the pieces into the tensor, if they are not it.
    conversions: Vec<Option<Conversion>>,
}

impl HfFolder {
    /// Opens the folder: geometry from `config.json`, checked against the tensors; formats are the tensors'.
    ///
    /// # Errors
    /// As [`hf::geometry`] and [`SafeTensors::open`], and [`RuntimeError::BadFile`] for a tensor that is missing, superfluous or
    /// of another shape than the config says.
    pub fn open(folder: &Path) -> Result<Self> {
        let geometry = read_config(folder)?;
        let weights = SafeTensors::open(folder)?;
        Self::new(geometry, weights, folder)
    }

    fn new(geometry: Geometry, weights: SafeTensors, folder: &Path) -> Result<Self> {
        let mut specs = Vec::new();
        let mut all_pieces = Vec::new();
        let mut conversions = Vec::new();
        let mut used = HashSet::new();
        let nesting = Nesting::of(&weights);
        for expected in tensor_shapes(&geometry) {
            let Located { pieces, format, conversion } = locate(folder, &geometry, &weights, nesting, &expected)?;
            check_format(folder, &expected, format)?;
            for piece in &pieces {
                if let Some(raw) = weights.raw(&piece.tensor) {
                    used.insert(scales_name(raw));
                }
                used.insert(piece.tensor.clone());
            }
            specs.push(TensorSpec::new(expected, format)?);
            all_pieces.push(pieces);
            conversions.push(conversion);
        }
        refuse_superfluous(folder, &geometry, &weights, nesting, &used)?;
        // The format of most bytes: mixed folders keep their norms in float32.
        let bytes_of = |f: &QuantFormat| specs.iter().filter(|t| t.format == *f).map(|t| t.bytes.0).sum::<u64>();
        let format_name = QuantFormat::ALL.iter().max_by_key(|f| bytes_of(f)).map_or("F32", |f| f.name()).to_string();
        Ok(Self { spec: ModelSpec { geometry, tensors: specs, format_name }, weights, pieces: all_pieces, conversions })
    }

    /// The model, with the stored formats.
    pub const fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The stored tensors.
    pub const fn weights(&self) -> &SafeTensors {
        &self.weights
    }

    /// The pieces whose concatenation is tensor `id` of the model. A tensor of routed experts has one piece per expert.
    pub fn pieces(&self, id: TensorId) -> &[Piece] {
        &self.pieces[id.0 as usize]
    }

    /// The bytes of tensor `id` when it is more than its pieces as they are stored: a tensor that is made at load.
    ///
    /// # Errors
    /// As [`Self::bytes`].
    pub fn converted(&self, id: TensorId) -> Result<Option<Vec<u8>>> {
        let Some(how) = self.conversions[id.0 as usize] else { return Ok(None) };
        let element_bytes = self.spec.tensors[id.0 as usize].format.layout().bytes as usize;
        convert(how, self.pieces(id), element_bytes, |piece| self.decoded(piece, how)).map(Some)
    }

    /// Whether tensor `id` is more than its pieces as they are stored.
    pub fn is_converted(&self, id: TensorId) -> bool {
        self.conversions[id.0 as usize].is_some()
    }

    /// What piece number `piece` contributes to [`Self::converted`]; all pieces of a tensor contribute the same number of bytes.
    ///
    /// # Errors
    /// As [`Self::bytes`].
    pub fn converted_piece(&self, id: TensorId, piece: usize) -> Result<Vec<u8>> {
        let how = self.conversions[id.0 as usize].unwrap_or(Conversion::Join);
        let element_bytes = self.spec.tensors[id.0 as usize].format.layout().bytes as usize;
        let piece = self.pieces(id).get(piece..=piece).unwrap_or_default();
        convert(how, piece, element_bytes, |piece| self.decoded(piece, how))
    }

    /// A piece in the format of its tensor.
    fn decoded(&self, piece: &Piece, how: Conversion) -> Result<Cow<'_, [u8]>> {
        let Some(raw) = self.weights.raw(&piece.tensor) else {
            let stored = self.bytes(piece)?;
            let Conversion::Map(change) = how else { return Ok(Cow::Borrowed(stored)) };
            let mut values = vec![0.0; piece.num_elements as usize];
            dequantize_row(self.weights.require_tensor(&piece.tensor)?.format, stored, &mut values);
            return Ok(Cow::Owned(values.into_iter().flat_map(|x| change.of(x).to_le_bytes()).collect()));
        };
        let outside = || RuntimeError::bad_file(self.weights.path(), format!("piece {piece:?}"), "a part of that tensor", "");
        let (first, count) = (piece.first_element as usize, piece.num_elements as usize);
        let part = |first: usize, count: usize| first..first.saturating_add(count);
        let elements = self.weights.raw_data(raw).get(part(first, count)).ok_or_else(outside)?;
        match raw.kind {
            RawKind::Fp8E4m3 => {
                let scales = self.weights.require_tensor(&scales_name(raw))?;
                let scales: Vec<f32> = self.weights.data(scales).chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
                let cols = raw.shape.last().copied().unwrap_or(1) as usize;
                Ok(Cow::Owned(decode_fp8(elements, first, cols, &scales)))
            }
            RawKind::Byte => {
                let scales = self.weights.raw(&scales_name(raw)).ok_or_else(outside)?;
                let of_piece = part(first / MXFP4_GROUP_BYTES, count / MXFP4_GROUP_BYTES);
                let scales = self.weights.raw_data(scales).get(of_piece).ok_or_else(outside)?;
                Ok(Cow::Owned(repack_mxfp4(elements, scales)))
            }
        }
    }

    /// The stored bytes of a piece, not necessarily aligned.
    ///
    /// # Errors
    /// [`RuntimeError::BadFile`] when the piece is not one of this folder's.
    pub fn bytes(&self, piece: &Piece) -> Result<&[u8]> {
        let info = self.weights.require_tensor(&piece.tensor)?;
        let size = u64::from(info.format.layout().bytes);
        let outside = || RuntimeError::bad_file(self.weights.path(), format!("piece {piece:?}"), "a part of that tensor", "");
        let range = |n: u64| n.checked_mul(size).and_then(|b| usize::try_from(b).ok());
        let start = range(piece.first_element).ok_or_else(outside)?;
        let end = piece.first_element.checked_add(piece.num_elements).and_then(range).ok_or_else(outside)?;
        self.weights.data(info).get(start..end).ok_or_else(outside)
    }

    /// Takes the folder apart.
    pub fn into_parts(self) -> (ModelSpec, SafeTensors, Vec<Vec<Piece>>) {
        (self.spec, self.weights, self.pieces)
    }
}

/// Geometry of the `config.json` in `folder`, named after the folder.
pub(super) fn read_config(folder: &Path) -> Result<Geometry> {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| RuntimeError::io("read", &path, e))?;
    // A relative "." has no name; the real folder has one.
    let real = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
    let name = real.file_name().map_or_else(|| "unnamed".to_string(), |s| s.to_string_lossy().into_owned());
    hf::geometry(&text, &path, &name)
}

/// Where a tensor of the model lies, and its format.
fn locate(folder: &Path, geometry: &Geometry, weights: &SafeTensors, nesting: Nesting, t: &TensorShape) -> Result<Located> {
    let mut candidates = hf_names::candidates(geometry, t);
    for piece in candidates.iter_mut().flat_map(|c| &mut c.pieces) {
        piece.tensor = nesting.stored(&piece.tensor);
    }
    // A candidate counts as present when its first piece is; the others must then exist too.
    let stored = |name: &str| weights.tensor(name).is_some() || weights.raw(name).is_some();
    let chosen = candidates.iter().find(|c| stored(&c.pieces[0].tensor));
    let Some(candidate) = chosen else {
        let names: Vec<&str> = candidates.iter().map(|c| c.pieces[0].tensor.as_str()).collect();
        return Err(RuntimeError::bad_file(
            folder,
            format!("no tensor for {}", t.name),
            if names.is_empty() { "a name for it".to_string() } else { names.join(" or ") },
            "the folder is incomplete, or its config.json belongs to another model",
        ));
    };
    let mut format = None;
    for piece in &candidate.pieces {
        let raw = weights.raw(&piece.tensor);
        let stored = match raw {
            Some(raw) => raw.shape.as_slice(),
            None => weights.require_tensor(&piece.tensor)?.shape.as_slice(),
        };
        let plain_vector = candidate.shape.len() == 1 && stored == [1, candidate.shape[0]];
        if stored != candidate.shape && !plain_vector {
            return Err(RuntimeError::bad_file(
                folder,
                format!("tensor {} of shape {stored:?}", piece.tensor),
                format!("shape {:?}", candidate.shape),
                "config.json and weights contradict each other",
            ));
        }
        let stored_format = match raw {
            Some(raw) => check_raw(folder, weights, raw, candidate.conversion)?,
            // Changed values are kept in full precision.
            None if matches!(candidate.conversion, Some(Conversion::Map(_))) => QuantFormat::F32,
            None => weights.require_tensor(&piece.tensor)?.format,
        };
        if *format.get_or_insert(stored_format) != stored_format {
            return Err(RuntimeError::bad_file(
                folder,
                format!("tensor {} in {stored_format}", piece.tensor),
                format!("the same format as {}", candidate.pieces[0].tensor),
                "all experts of a layer must be stored alike",
            ));
        }
    }
    let format = format.expect("every candidate has at least one piece");
    let decoded = candidate.pieces.iter().any(|p| weights.raw(&p.tensor).is_some());
    let conversion = candidate.conversion.or(decoded.then_some(Conversion::Join));
    Ok(Located { pieces: candidate.pieces.clone(), format, conversion })
}

/// Name of the scales of a raw tensor.
fn scales_name(raw: &RawTensor) -> String {
    match raw.kind {
        RawKind::Fp8E4m3 => format!("{}_scale_inv", raw.name),
        RawKind::Byte => raw.name.strip_suffix("_blocks").map_or_else(String::new, |base| format!("{base}_scales")),
    }
}

/// The format of what a raw tensor holds. Bytes are MXFP4 where this family has it, and nothing elsewhere.
fn check_raw(folder: &Path, weights: &SafeTensors, raw: &RawTensor, how: Option<Conversion>) -> Result<QuantFormat> {
    match (raw.kind, how) {
        (RawKind::Fp8E4m3, None | Some(Conversion::Join | Conversion::Columns { .. })) => {
            check_fp8_scales(folder, weights, raw).map(|()| QuantFormat::F32)
        }
        (RawKind::Byte, Some(Conversion::Rows { .. })) => check_mxfp4_scales(folder, weights, raw).map(|()| QuantFormat::MXFP4),
        _ => {
            let found = format!("tensor {} of {:?}", raw.name, raw.kind);
            Err(RuntimeError::bad_file(folder, found, "plain elements", "take the model in BF16, or as a GGUF file"))
        }
    }
}

/// MXFP4 blocks `[experts, rows, groups, 16]` have a byte of scale per group.
fn check_mxfp4_scales(folder: &Path, weights: &SafeTensors, raw: &RawTensor) -> Result<()> {
    let name = scales_name(raw);
    let expected = &raw.shape[..raw.shape.len().saturating_sub(1)];
    let scales = weights.raw(&name).filter(|s| s.kind == RawKind::Byte);
    if scales.is_some_and(|s| s.shape == expected) {
        return Ok(());
    }
    let found = scales.map_or_else(|| format!("no tensor {name} of bytes"), |s| format!("tensor {name} of shape {:?}", s.shape));
    Err(RuntimeError::bad_file(
        folder,
        found,
        format!("scales of shape {expected:?}, one per 32 elements"),
        "download the model again",
    ))
}

/// An FP8 tensor is a matrix with float32 scales of one block each.
fn check_fp8_scales(folder: &Path, weights: &SafeTensors, raw: &RawTensor) -> Result<()> {
    let name = scales_name(raw);
    let [rows, cols] = raw.shape[..] else {
        let found = format!("tensor {} of 8-bit floats, of shape {:?}", raw.name, raw.shape);
        return Err(RuntimeError::bad_file(folder, found, "a matrix", "take the model in BF16, or as a GGUF file"));
    };
    let expected = fp8_scale_shape(rows, cols);
    let scales = weights.tensor(&name);
    if scales.is_some_and(|s| s.format == QuantFormat::F32 && s.shape == expected) {
        return Ok(());
    }
    let found =
        scales.map_or_else(|| format!("no tensor {name}"), |s| format!("tensor {name} of shape {:?} in {}", s.shape, s.format));
    let hint = "other block sizes are not implemented: take the model in BF16, or as a GGUF file";
    Err(RuntimeError::bad_file(folder, found, format!("F32 scales of shape {expected:?}, one per 128 x 128 elements"), hint))
}

/// A tensor that was found.
struct Located {
    pieces: Vec<Piece>,
    format: QuantFormat,
    conversion: Option<Conversion>,
}

fn refuse_superfluous(
    folder: &Path,
    geometry: &Geometry,
    weights: &SafeTensors,
    nesting: Nesting,
    used: &HashSet<String>,
) -> Result<()> {
    let harmless = |name: &str| {
        // Old checkpoints store the rotary frequencies, which follow from the config; tied ones may store the output twice.
        name.ends_with("rotary_emb.inv_freq")
            || of_prediction_layer(geometry, weights, name)
            || nesting.is_beside(name)
            || (geometry.tie_word_embeddings && name == nesting.stored("lm_head.weight"))
    };
    let plain = weights.tensors().iter().map(|t| (&t.name, &t.shape));
    let all = plain.chain(weights.raw_tensors().map(|t| (&t.name, &t.shape)));
    let mut extra = all.filter(|(name, _)| !used.contains(*name) && !harmless(name));
    let Some((name, shape)) = extra.next() else { return Ok(()) };
    let more = extra.count();
    let more = if more > 0 { format!(" and {more} more unknown ones") } else { String::new() };
    Err(RuntimeError::bad_file(
        folder,
        format!("tensor {name} of shape {shape:?}{more}"),
        format!("only the tensors of architecture {} with {} layers", geometry.architecture, geometry.layers.len()),
        "the model has a part that is not implemented, or its config.json belongs to another model",
    ))
}

/// A tensor of a layer for multi-token prediction, which follows the others and only speculative decoding has a use for.
fn of_prediction_layer(geometry: &Geometry, weights: &SafeTensors, name: &str) -> bool {
    if name.starts_with("mtp.") {
        return matches!(geometry.architecture.as_str(), "qwen3next" | "qwen35moe");
    }
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')?.0.parse::<usize>().ok());
    layer.is_some_and(|l| {
        let marker = format!("model.layers.{l}.eh_proj.weight");
        l >= geometry.layers.len() && (weights.tensor(&marker).is_some() || weights.raw(&marker).is_some())
    })
}
