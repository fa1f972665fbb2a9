//! What a user may write where a command wants a model: a GGUF file, a Hugging Face folder, a `config.json`, a model
//! description in TOML, or the name of one.

use super::configs::{self, Kind};
use super::hf_weights::{HfFolder, read_config};
use super::{gguf, hf};
use crate::error::{Result, RuntimeError};
use crate::gguf::Gguf;
use std::io::Read as _;
use std::path::Path;
use tierwise_cost::model::{Geometry, ModelSpec};
use tierwise_cost::recipe::Recipe;

/// An opened model.
#[derive(Debug)]
pub enum ModelSource {
    /// A GGUF file, all of its parts.
    Gguf {
        /// The file.
        gguf: Gguf,
        /// Its content, checked.
        spec: ModelSpec,
    },
    /// A Hugging Face folder with weights.
    Folder(HfFolder),
    /// A description without weights: enough to plan and to synthesise.
    Description {
        /// The geometry.
        geometry: Geometry,
        /// Where it is from, for people.
        origin: String,
    },
}

impl ModelSource {
    /// Opens what `arg` names. An existing path comes first, then a name in `configs_dir`, then a built-in name.
    ///
    /// # Errors
    /// What is wrong with the file, or the nearest known names when there is neither a file nor a name.
    pub fn open(arg: &str, configs_dir: Option<&Path>) -> Result<Self> {
        let path = Path::new(arg);
        if path.is_dir() {
            return Self::open_folder(path);
        }
        if path.is_file() {
            return Self::open_file(path);
        }
        let looks_like_a_path = arg.contains(['/', '\\']) || [".gguf", ".json", ".safetensors"].iter().any(|e| arg.ends_with(e));
        if looks_like_a_path || path.exists() {
            let reason = match std::fs::File::open(path) {
                Err(e) => return Err(RuntimeError::io("open", path, e)),
                Ok(_) => "something that is neither a file nor a folder",
            };
            return Err(RuntimeError::bad_file(path, reason, "a model file or folder", ""));
        }
        let found = configs::find(Kind::Model, arg, configs_dir)?;
        Self::from_toml(&found.text, found.origin)
    }

    fn open_folder(folder: &Path) -> Result<Self> {
        let entries = std::fs::read_dir(folder).map_err(|e| RuntimeError::io("list", folder, e))?;
        let names: Vec<String> = entries.filter_map(|e| e.ok().map(|e| e.file_name().to_string_lossy().into_owned())).collect();
        if !names.iter().any(|n| n == "config.json") {
            let mut ggufs: Vec<&str> = names.iter().map(String::as_str).filter(|n| n.ends_with(".gguf")).collect();
            ggufs.sort_unstable();
            let hint =
                ggufs.first().map_or_else(String::new, |n| format!("name the file itself, e.g. {}", folder.join(n).display()));
            return Err(RuntimeError::bad_file(folder, "a folder without config.json", "a Hugging Face model folder", hint));
        }
        if names.iter().any(|n| n.ends_with(".safetensors") || n.ends_with(".safetensors.index.json")) {
            return HfFolder::open(folder).map(Self::Folder);
        }
        let geometry = read_config(folder)?;
        Ok(Self::Description { geometry, origin: folder.join("config.json").display().to_string() })
    }

    fn open_file(path: &Path) -> Result<Self> {
        let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
        let read = || std::fs::read_to_string(path).map_err(|e| RuntimeError::io("read", path, e));
        match extension.as_str() {
            "json" => {
                let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
                // config.json is named after its folder, anything else after itself.
                let named_by = if real.file_name().is_some_and(|n| n == "config.json") { real.parent() } else { None };
                let stem = named_by.and_then(Path::file_name).or_else(|| real.file_stem());
                let name = stem.map_or_else(|| "unnamed".to_string(), |s| s.to_string_lossy().into_owned());
                let geometry = hf::geometry(&read()?, path, &name)?;
                Ok(Self::Description { geometry, origin: path.display().to_string() })
            }
            "toml" => Self::from_toml(&read()?, path.display().to_string()),
            "safetensors" => Err(RuntimeError::bad_file(
                path,
                "a single safetensors file",
                "a model with its config.json",
                "give the folder that holds both",
            )),
            _ => {
                refuse_other_magic(path)?;
                let gguf = Gguf::open(path)?;
                let spec = gguf::model_spec(&gguf)?;
                Ok(Self::Gguf { gguf, spec })
            }
        }
    }

    fn from_toml(text: &str, origin: String) -> Result<Self> {
        let geometry = Geometry::from_toml(text).map_err(|e| {
            RuntimeError::bad_file(Path::new(&origin), e.to_string(), "a model description", "see configs/models")
        })?;
        Ok(Self::Description { geometry, origin })
    }

    /// The geometry.
    pub fn geometry(&self) -> &Geometry {
        match self {
            Self::Gguf { spec, .. } => &spec.geometry,
            Self::Folder(folder) => &folder.spec().geometry,
            Self::Description { geometry, .. } => geometry,
        }
    }

    /// The model as its files hold it; `None` for a description, which has no formats.
    pub fn stored_spec(&self) -> Option<&ModelSpec> {
        match self {
            Self::Gguf { spec, .. } => Some(spec),
            Self::Folder(folder) => Some(folder.spec()),
            Self::Description { .. } => None,
        }
    }

    /// The model under `recipe`; without one as stored, or under `Q4_K_M` when it is only described.
    ///
    /// # Errors
    /// When the geometry does not allow the recipe.
    pub fn spec(&self, recipe: Option<&Recipe>) -> Result<ModelSpec> {
        match (recipe, self.stored_spec()) {
            (None, Some(spec)) => Ok(spec.clone()),
            (Some(recipe), _) => Ok(ModelSpec::with_recipe(self.geometry().clone(), recipe)?),
            (None, None) => Ok(ModelSpec::with_recipe(self.geometry().clone(), &Recipe::by_name("Q4_K_M")?)?),
        }
    }

    /// Weights are there, so that the model can be run.
    pub const fn has_weights(&self) -> bool {
        !matches!(self, Self::Description { .. })
    }
}

/// A file that is plainly something else gets a message that says so, before the GGUF reader sees it.
fn refuse_other_magic(path: &Path) -> Result<()> {
    const MAGICS: &[(&[u8], &str)] =
        &[(b"PK\x03\x04", "a zip archive or PyTorch checkpoint"), (b"ggjt", "an old ggml file"), (b"tjgg", "an old ggml file")];
    let mut head = Vec::with_capacity(4);
    let file = std::fs::File::open(path).map_err(|e| RuntimeError::io("open", path, e))?;
    file.take(4).read_to_end(&mut head).map_err(|e| RuntimeError::io("read", path, e))?;
    match MAGICS.iter().find(|(magic, _)| head.starts_with(magic)) {
        Some((_, what)) => {
            Err(RuntimeError::bad_file(path, *what, "a GGUF file or a Hugging Face folder", "convert the model to GGUF"))
        }
        None => Ok(()),
    }
}
