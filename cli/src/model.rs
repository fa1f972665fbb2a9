//! Opening what the user named: models and machines.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use tierwise_cost::machine::Machine;
use tierwise_cost::model::ModelSpec;
use tierwise_cost::recipe::Recipe;
use tierwise_planner::Workload;
use tierwise_runtime::backend::OpenOptions;
use tierwise_runtime::import::ModelSource;
use tierwise_runtime::import::configs::{self, Kind};
use tierwise_runtime::probe::{ProbeOptions, probe_machine};

/// The user's folder of descriptions, if set. The only environment variables are read here.
fn configs_dir() -> Option<PathBuf> {
    std::env::var_os("TIERWISE_CONFIGS").map(PathBuf::from)
}

/// A model by file, folder or name.
pub fn open(name: &str) -> Result<ModelSource> {
    Ok(ModelSource::open(name, configs_dir().as_deref())?)
}

/// The model with formats: as stored, or as `format` says, cut to `layers`.
pub fn spec(source: &ModelSource, format: Option<&str>, layers: Option<usize>) -> Result<ModelSpec> {
    let recipe = format.map(Recipe::by_name).transpose()?;
    match (source, layers) {
        (_, None) => {
            if recipe.is_some() && source.has_weights() {
                bail!("--format is for models without weights; this one has its own formats");
            }
            Ok(source.spec(recipe.as_ref())?)
        }
        (ModelSource::Description { geometry, .. }, Some(n)) if n >= 1 && n <= geometry.layers.len() => {
            let recipe = recipe.map_or_else(|| Recipe::by_name("Q4_K_M"), Ok)?;
            Ok(ModelSpec::with_recipe(geometry.clone().truncated(n), &recipe)?)
        }
        (ModelSource::Description { geometry, .. }, Some(n)) => {
            bail!("--layers {n}: the model has {} layers, expected 1 to {0}", geometry.layers.len())
        }
        (_, Some(_)) => bail!("--layers is for models without weights; a file has the layers it has"),
    }
}

/// A machine by file or name, or this one: calibrated if there is a file from a calibration with as many threads, else probed
/// quickly. Also says where it is from.
pub fn machine(name: Option<&str>, threads: Option<usize>) -> Result<(Machine, String)> {
    let Some(name) = name else {
        let mut origin = "probed quickly".to_string();
        if let Some(path) = calibrated_file().filter(|p| p.is_file()) {
            let machine = machine_from_file(&path)?;
            let measured = machine.calibration.as_ref().map(|c| c.threads as usize);
            match (threads, measured) {
                // Rates of two threads say nothing certain about one.
                (Some(wanted), Some(n)) if wanted != n => {
                    origin = format!("probed quickly with {wanted} threads: {} was calibrated with {n}", path.display());
                }
                _ => return Ok((machine, format!("calibrated in {}", path.display()))),
            }
        }
        let options = ProbeOptions { threads, ..ProbeOptions::default() };
        return Ok((probe_machine(options)?, origin));
    };
    let (text, origin) = text_of(Kind::Machine, name)?;
    Ok((Machine::from_toml(&text).with_context(|| origin.clone())?, origin))
}

/// A workload by file or name.
pub fn workload(name: &str) -> Result<Workload> {
    let (text, origin) = text_of(Kind::Workload, name)?;
    Workload::from_toml(&text).with_context(|| origin)
}

/// The text of a description by file or name, and where it is from.
fn text_of(kind: Kind, name: &str) -> Result<(String, String)> {
    if name.contains(['/', '\\']) || Path::new(name).is_file() {
        return Ok((std::fs::read_to_string(name).with_context(|| format!("cannot read {name}"))?, name.to_string()));
    }
    let found = configs::find(kind, name, configs_dir().as_deref())?;
    Ok((found.text.into_owned(), found.origin))
}

fn machine_from_file(path: &Path) -> Result<Machine> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read machine {}", path.display()))?;
    Machine::from_toml(&text).with_context(|| path.display().to_string())
}

fn calibrated_file() -> Option<PathBuf> {
    cache_dir().map(|d| d.join("machine.toml"))
}

/// What back-ends may need: a folder of compiled CUDA kernels (`TIERWISE_CUDA_KERNELS`) or of NVIDIA's run-time compiler
/// (`TIERWISE_NVRTC_DIR`), where the system does not have it; kernels compiled here are kept in the cache.
pub fn device_options() -> OpenOptions {
    let folder = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    OpenOptions {
        cuda_kernels: folder("TIERWISE_CUDA_KERNELS"),
        cuda_cache: cache_dir().map(|d| d.join("kernels")),
        nvrtc: folder("TIERWISE_NVRTC_DIR"),
        ..OpenOptions::default()
    }
}

/// `~/.cache/tierwise`, or where `XDG_CACHE_HOME` says.
pub fn cache_dir() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .filter(|v| !v.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(base.join("tierwise"))
}

/// Processes that a launcher of MPI jobs started together with this one, if one did (Open MPI; MPICH and its kin).
pub fn launched_ranks() -> Option<usize> {
    ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].into_iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}

/// The text of a study by file or name, and where it is from.
pub fn study(name: &str) -> Result<(String, String)> {
    text_of(Kind::Study, name)
}

/// The text of a trace of arriving requests: a file beside the study, any other file, or a built-in name.
pub fn arrivals(name: &str, beside: Option<&Path>) -> Result<(String, String)> {
    match beside.map(|dir| dir.join(name)).filter(|p| p.is_file()) {
        Some(path) => text_of(Kind::Arrivals, &path.display().to_string()),
        None => text_of(Kind::Arrivals, name),
    }
}
