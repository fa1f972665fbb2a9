//! A model's weights as they lie in its files.
//!
//! Big tensors stay in the memory map in the file's format: loading copies nothing and the page cache is shared with other
//! processes. Vectors (norms, biases) are converted to f32 once.

use super::experts::{ExpertBytes, ExpertLayout};
use super::loader::{ExpertTable, FileReader};
use super::placed::{self, Placed};
use crate::error::{Result, RuntimeError};
use crate::gguf::{Gguf, HostWeights, TensorInfo};
use crate::import::hf_weights::{HfFolder, Piece};
use crate::import::{ModelSource, split_kv_b};
use crate::memory::PageSize;
use crate::quant::dequantize_row;
use crate::safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tierwise_cost::model::{Attention, ModelSpec, TensorId, TensorRole, TensorSpec};
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::CheckedPlan;

/// A matrix, or some of its rows, in file format.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// How its rows are stored.
    pub format: QuantFormat,
    /// Number of rows.
    pub rows: usize,
    /// Elements per row.
    pub cols: usize,
    /// The rows, one after the other.
    pub bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// Bytes of one row.
    pub const fn row_bytes(&self) -> usize {
        self.bytes.len() / self.rows
    }

    /// Rows `start..end`.
    #[must_use]
    pub fn rows(&self, start: usize, end: usize) -> Self {
        let row = self.row_bytes();
        Self { rows: end - start, bytes: &self.bytes[start * row..end * row], ..*self }
    }

    /// One row as f32.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        dequantize_row(self.format, self.rows(row, row + 1).bytes, out);
    }
}

/// The files behind the weights.
#[derive(Debug)]
enum Files {
    Gguf(Gguf),
    SafeTensors(SafeTensors),
}

impl Files {
    fn tensors(&self) -> &[TensorInfo] {
        match self {
            Self::Gguf(f) => f.tensors(),
            Self::SafeTensors(f) => f.tensors(),
        }
    }

    fn data(&self, t: &TensorInfo) -> &[u8] {
        match self {
            Self::Gguf(f) => f.data(t),
            Self::SafeTensors(f) => f.data(t),
        }
    }

    fn location(&self, t: &TensorInfo) -> (&Path, u64) {
        match self {
            Self::Gguf(f) => f.location(t),
            Self::SafeTensors(f) => f.location(t),
        }
    }
}

/// A run of bytes of a file's tensor.
#[derive(Debug, Clone, Copy)]
struct Span {
    /// Index into the files' tensors.
    tensor: usize,
    /// Where it begins.
    offset: usize,
    bytes: usize,
}

/// What a tensor of the table comes from.
enum Origin {
    Files(Vec<Span>),
    Made(Vec<u8>),
}

/// Where one tensor of the table is.
#[derive(Debug)]
struct Stored {
    /// One span, or one per expert; none of a tensor made at load.
    spans: Vec<Span>,
    /// The bytes of a tensor made at load.
    made: Vec<u8>,
    /// The elements of a vector.
    vector: Vec<f32>,
}

/// A model's geometry and weights.
#[derive(Debug)]
pub struct Model {
    spec: ModelSpec,
    files: Files,
    stored: Vec<Stored>,
    /// Experts that were copied to the nodes of a plan.
    placed: Option<Placed>,
}

impl Model {
    /// Takes an opened model over, ready to run.
    ///
    /// # Errors
    /// [`RuntimeError::BadRequest`] for a description without weights, [`RuntimeError::BadFile`] for tensors that do not have
    /// the bytes that the model's table says.
    pub fn new(source: ModelSource) -> Result<Self> {
        match source {
            ModelSource::Gguf { gguf, spec } => Self::from_gguf(gguf, spec),
            ModelSource::Folder(folder) => Self::from_folder(folder),
            ModelSource::Description { origin, .. } => Err(RuntimeError::BadRequest {
                what: "model",
                found: format!("{origin}, a description without weights"),
                expected: "a GGUF file or a Hugging Face folder with safetensors; a random model can be made with `synth`"
                    .to_string(),
            }),
        }
    }

    /// Brings the files' weights into host memory, as `how` says. Not for models of which experts are to stay on disk.
    ///
    /// # Errors
    /// When a file cannot be read or the system refuses the memory.
    pub fn bring_in(&mut self, how: HostWeights) -> Result<()> {
        match &mut self.files {
            Files::Gguf(f) => f.bring_in(how),
            Files::SafeTensors(f) => f.bring_in(how),
        }
    }

    /// Copies experts to the memory nodes that `plan` names, in place of those of another plan. Without named nodes nothing is copied.
    ///
    /// # Errors
    /// When a node is not there, has too little free memory, or the system refuses; when a file cannot be read.
    pub fn place(&mut self, plan: &CheckedPlan, pages: PageSize) -> Result<()> {
        self.placed = None;
        self.placed = placed::place(self, plan, pages)?;
        Ok(())
    }

    /// Experts on memory nodes, if [`Self::place`] put some there.
    pub const fn placed(&self) -> Option<&Placed> {
        self.placed.as_ref()
    }

    /// The bytes of every tensor that holds no routed experts, of the map or made at load.
    pub fn non_expert_bytes(&self) -> impl Iterator<Item = &[u8]> {
        let stored = self.spec.tensors.iter().zip(&self.stored).filter(|(t, _)| !t.role.is_routed_expert());
        stored.map(|(_, s)| s.part(&self.files, 0, 1))
    }

    fn from_gguf(gguf: Gguf, spec: ModelSpec) -> Result<Self> {
        let index = name_index(gguf.tensors());
        let mut made = kv_b_parts(&gguf, &spec, &index);
        let mut origin = |(i, t): (usize, &TensorSpec)| {
            if let Some(bytes) = made.remove(&i) {
                return Some(Origin::Made(bytes));
            }
            let tensor = *index.get(&t.name)?;
            let bytes = usize::try_from(gguf.tensors()[tensor].bytes).ok()?;
            let count = if t.role.is_routed_expert() { usize::try_from(t.shape[0]).ok()? } else { 1 };
            let span = |i| Span { tensor, offset: i * (bytes / count), bytes: bytes / count };
            Some(Origin::Files((0..count).map(span).collect()))
        };
        let origins = spec.tensors.iter().enumerate().map(&mut origin).collect();
        let path = gguf.path().to_path_buf();
        Self::build(&path, Files::Gguf(gguf), spec, origins)
    }

    fn from_folder(folder: HfFolder) -> Result<Self> {
        let ids = (0..folder.spec().tensors.len() as u32).map(TensorId);
        let made = ids.map(|id| folder.converted(id)).collect::<Result<Vec<_>>>()?;
        let (spec, weights, pieces) = folder.into_parts();
        let index = name_index(weights.tensors());
        let span = |p: &Piece| {
            let tensor = *index.get(&p.tensor)?;
            let size = u64::from(weights.tensors()[tensor].format.layout().bytes);
            let offset = usize::try_from(p.first_element.checked_mul(size)?).ok()?;
            Some(Span { tensor, offset, bytes: usize::try_from(p.num_elements.checked_mul(size)?).ok()? })
        };
        let origin = |(of_tensor, made): (&Vec<Piece>, Option<Vec<u8>>)| match made {
            Some(bytes) => Some(Origin::Made(bytes)),
            None => of_tensor.iter().map(span).collect::<Option<_>>().map(Origin::Files),
        };
        let origins = pieces.iter().zip(made).map(origin).collect();
        let path = weights.path().to_path_buf();
        Self::build(&path, Files::SafeTensors(weights), spec, origins)
    }

    /// Checks that every span has the bytes that the table says, so that nothing below can read outside.
    fn build(path: &Path, files: Files, spec: ModelSpec, origins: Vec<Option<Origin>>) -> Result<Self> {
        let mut stored = Vec::with_capacity(spec.tensors.len());
        for (t, origin) in spec.tensors.iter().zip(origins) {
            let count = if t.role.is_routed_expert() { t.shape[0] } else { 1 };
            let (spans, made) = match origin {
                Some(Origin::Files(spans)) => (spans, Vec::new()),
                Some(Origin::Made(bytes)) => (Vec::new(), bytes),
                None => (Vec::new(), Vec::new()),
            };
            let fits = |s: &Span| {
                let info = &files.tensors()[s.tensor];
                let inside = s.offset.checked_add(s.bytes).is_some_and(|end| end <= files.data(info).len());
                inside && info.format == t.format && s.bytes as u64 * count == t.bytes.0
            };
            let found = spans.len() as u64 == count && spans.iter().all(fits);
            if !found && (made.is_empty() || made.len() as u64 != t.bytes.0) {
                return Err(RuntimeError::bad_file(
                    path,
                    format!("tensor {} in {} pieces of unexpected size or format", t.name, spans.len()),
                    format!("{count} of {} bytes in {}", t.bytes.0 / count.max(1), t.format),
                    "download or convert the model again",
                ));
            }
            let mut of_tensor = Stored { spans, made, vector: Vec::new() };
            if t.shape.len() == 1 || t.role.is_elementwise() {
                let mut vector = vec![0.0; t.elements() as usize];
                dequantize_row(t.format, of_tensor.part(&files, 0, 1), &mut vector);
                of_tensor.vector = vector;
            }
            stored.push(of_tensor);
        }
        Ok(Self { spec, files, stored, placed: None })
    }

    /// Geometry and tensor table.
    pub const fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn tensor(&self, id: TensorId) -> (&TensorSpec, &Stored) {
        (&self.spec.tensors[id.0 as usize], &self.stored[id.0 as usize])
    }

    /// A vector's elements (norm, bias, shared experts' gate), or those of the experts' biases, one expert after the other.
    pub fn vector(&self, id: TensorId) -> &[f32] {
        &self.tensor(id).1.vector
    }

    /// A matrix, or all rows of a stack of matrices.
    pub fn matrix(&self, id: TensorId) -> Matrix<'_> {
        let (t, stored) = self.tensor(id);
        let bytes = stored.part(&self.files, 0, 1);
        let (cols, outer) = t.shape.split_last().expect("a tensor has at least one dimension");
        Matrix { format: t.format, rows: outer.iter().product::<u64>() as usize, cols: *cols as usize, bytes }
    }

    /// One expert's three matrices: on the node where it was placed, else in the memory map. `tensors`: gate, up and down.
    pub fn expert(&self, tensors: [TensorId; 3], expert: u32) -> ExpertBytes<'_> {
        let placed = self.placed.as_ref().and_then(|p| p.image(self.tensor(tensors[0]).0.layer?, expert));
        let [gate, up, down] = [0, 1, 2].map(|i| {
            let (t, stored) = self.tensor(tensors[i]);
            let count = t.shape[0] as usize;
            let bytes = match placed {
                Some((image, starts)) => &image[starts[i]..starts[i] + t.bytes.0 as usize / count],
                None => stored.part(&self.files, expert as usize, count),
            };
            Matrix { format: t.format, rows: t.shape[1] as usize, cols: t.shape[2] as usize, bytes }
        });
        ExpertBytes { gate, up, down }
    }

    /// Gate, up and down tensors of a layer's routed experts, if it has some.
    pub fn expert_tensors(&self, layer: u32) -> Option<[TensorId; 3]> {
        let id = |role| self.spec.tensor(Some(layer), role).map(|(id, _)| id);
        Some([id(TensorRole::ExpertGate)?, id(TensorRole::ExpertUp)?, id(TensorRole::ExpertDown)?])
    }

    /// The experts of `layer` were made at load: they cannot be read from the files.
    pub fn experts_are_made(&self, layer: u32) -> bool {
        self.expert_tensors(layer).is_some_and(|ids| ids.iter().any(|id| !self.tensor(*id).1.made.is_empty()))
    }

    /// Bytes of tensors that were made at load and are held in memory beside the map of the files.
    pub fn made_bytes(&self) -> u64 {
        self.stored.iter().map(|s| s.made.len() as u64).sum()
    }

    /// How an expert of `layer` lies in a slot, if it has experts.
    pub fn expert_layout(&self, layer: u32) -> Option<ExpertLayout> {
        self.expert_tensors(layer).map(|tensors| ExpertLayout::new(&self.expert(tensors, 0)))
    }

    /// The files that hold the weights.
    pub fn paths(&self) -> Vec<PathBuf> {
        let mut paths: Vec<PathBuf> = Vec::new();
        for t in self.files.tensors() {
            let (path, _) = self.files.location(t);
            if paths.last().is_none_or(|p| p != path) && !paths.iter().any(|p| p == path) {
                paths.push(path.to_path_buf());
            }
        }
        paths
    }

    /// Where the experts of `layers` are in the model's files, and how they lie in slots.
    pub fn expert_table(&self, layers: impl IntoIterator<Item = u32>) -> ExpertTable {
        let mut table = ExpertTable::new(self.spec.layers.len());
        for layer in layers {
            let Some(tensors) = self.expert_tensors(layer) else { continue };
            if self.experts_are_made(layer) {
                continue;
            }
            let count = self.tensor(tensors[0]).1.spans.len();
            let experts = (0..count).map(|expert| {
                tensors.map(|id| {
                    let span = self.tensor(id).1.spans[expert];
                    let (path, start) = self.files.location(&self.files.tensors()[span.tensor]);
                    (path, start + span.offset as u64, span.bytes)
                })
            });
            table.add_layer(layer as usize, experts);
        }
        table
    }

    /// A reader of the experts of `layers`, with positional reads from the model's files through the page cache.
    ///
    /// # Errors
    /// When a file cannot be opened.
    pub fn expert_reader(&self, layers: &[u32]) -> Result<FileReader> {
        FileReader::new(Arc::new(self.expert_table(layers.iter().copied())))
    }
}

impl Stored {
    /// Part `index` of `count` equal ones.
    fn part<'a>(&'a self, files: &'a Files, index: usize, count: usize) -> &'a [u8] {
        match self.spans.get(index) {
            Some(span) => bytes_of(files, *span),
            None => &self.made[index * (self.made.len() / count)..(index + 1) * (self.made.len() / count)],
        }
    }
}

/// Tensors of latent attention that a file from before their split holds in one: place in the table to bytes.
fn kv_b_parts(gguf: &Gguf, spec: &ModelSpec, index: &HashMap<String, usize>) -> HashMap<usize, Vec<u8>> {
    let mut made = HashMap::new();
    for (layer, of_layer) in spec.layers.iter().enumerate() {
        let whole = index.get(&format!("blk.{layer}.attn_kv_b.weight"));
        let (Attention::Mla(a), Some(whole)) = (&of_layer.attention, whole) else { continue };
        let info = &gguf.tensors()[*whole];
        let (k_b, v_b) = split_kv_b(a, info.format, gguf.data(info));
        for (role, bytes) in [(TensorRole::AttentionKB, k_b), (TensorRole::AttentionVB, v_b)] {
            if let Some((id, _)) = spec.tensor(Some(layer as u32), role) {
                made.insert(id.0 as usize, bytes);
            }
        }
    }
    made
}

fn bytes_of(files: &Files, span: Span) -> &[u8] {
    &files.data(&files.tensors()[span.tensor])[span.offset..span.offset + span.bytes]
}

fn name_index(tensors: &[TensorInfo]) -> HashMap<String, usize> {
    tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect()
}
