//! Descriptions of models, machines, workloads and studies by name: those in a folder of the user's, then those built into the binary.

use crate::error::{Result, RuntimeError};
use std::borrow::Cow;
use std::path::Path;

include!(concat!(env!("OUT_DIR"), "/configs.rs"));

/// Which descriptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `configs/models/*.toml`.
    Model,
    /// `configs/machines/*.toml`.
    Machine,
    /// `configs/workloads/*.toml`.
    Workload,
    /// `configs/studies/*.toml`.
    Study,
    /// `configs/studies/data/*.csv`: traces of arriving requests.
    Arrivals,
}

impl Kind {
    /// Those built into the binary: `(name, TOML text)`, sorted by name.
    pub fn built_in(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Model => MODELS,
            Self::Machine => MACHINES,
            Self::Workload => WORKLOADS,
            Self::Study => STUDIES,
            Self::Arrivals => ARRIVALS,
        }
    }

    const fn folder(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Machine => "machines",
            Self::Workload => "workloads",
            Self::Study => "studies",
            Self::Arrivals => "studies/data",
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Machine => "machine",
            Self::Workload => "workload",
            Self::Study => "study",
            Self::Arrivals => "arrivals",
        }
    }

    const fn extension(self) -> &'static str {
        match self {
            Self::Model | Self::Machine | Self::Workload | Self::Study => "toml",
            Self::Arrivals => "csv",
        }
    }
}

/// A description's TOML text and where it is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// A path, or `built-in <name>`.
    pub origin: String,
    /// The text.
    pub text: Cow<'static, str>,
}

/// The description called `name` (case does not matter, its extension may be added): from `<configs_dir>/models` (or `machines`,
/// `workloads`, `studies`, `studies/data`) if there is one, else built in.
///
/// # Errors
/// [`RuntimeError::BadRequest`] with the nearest names, or [`RuntimeError::Io`] for a file that cannot be read.
pub fn find(kind: Kind, name: &str, configs_dir: Option<&Path>) -> Result<Found> {
    let stem = stem(name, kind.extension());
    if let Some(folder) = configs_dir.map(|d| d.join(kind.folder())) {
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries.filter_map(|e| e.ok().map(|e| e.path())).collect(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(RuntimeError::io("list", &folder, e)),
        };
        let same = |p: &&std::path::PathBuf| {
            p.extension().is_some_and(|x| x == kind.extension())
                && p.file_stem().is_some_and(|s| s.to_string_lossy().to_lowercase() == stem)
        };
        if let Some(path) = entries.iter().find(same) {
            let text = std::fs::read_to_string(path).map_err(|e| RuntimeError::io("read", path, e))?;
            return Ok(Found { origin: path.display().to_string(), text: text.into() });
        }
    }
    if let Some((known, text)) = kind.built_in().iter().find(|(known, _)| known.eq_ignore_ascii_case(&stem)) {
        return Ok(Found { origin: format!("built-in {known}"), text: (*text).into() });
    }
    Err(RuntimeError::BadRequest {
        what: kind.word(),
        found: format!("{name:?}, which is neither a file nor a known name"),
        expected: near_names(kind, &stem),
    })
}

fn stem(name: &str, extension: &str) -> String {
    let lower = name.to_lowercase();
    lower.strip_suffix(extension).and_then(|n| n.strip_suffix('.')).unwrap_or(&lower).to_string()
}

/// The known names nearest to `wanted`, for a message.
fn near_names(kind: Kind, wanted: &str) -> String {
    let mut names: Vec<(usize, &str)> = kind.built_in().iter().map(|(known, _)| (distance(wanted, known), *known)).collect();
    names.sort_unstable();
    let near: Vec<&str> = names.iter().take(5).map(|(_, n)| *n).collect();
    format!("a file, or a name such as {} ({} are known)", near.join(", "), names.len())
}

/// How far two names are apart: the edit distance, with a bonus when one contains the other.
fn distance(a: &str, b: &str) -> usize {
    if !a.is_empty() && (b.contains(a) || a.contains(b)) {
        return 0;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distance_is_right() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("qwen3-30b", "qwen3-30b-a3b"), 0);
    }

    #[test]
    fn a_folder_of_the_user_comes_before_the_built_in_names() {
        let dir = tempfile::tempdir().unwrap();
        let models = dir.path().join("models");
        std::fs::create_dir(&models).unwrap();
        std::fs::write(models.join("Mine.toml"), "name = 'mine'").unwrap();
        for name in ["mine", "MINE.toml"] {
            assert_eq!(find(Kind::Model, name, Some(dir.path())).unwrap().text, "name = 'mine'");
        }
        let (known, _) = Kind::Model.built_in()[0];
        std::fs::write(models.join(format!("{known}.toml")), "theirs").unwrap();
        assert_eq!(find(Kind::Model, known, Some(dir.path())).unwrap().text, "theirs");
        assert!(find(Kind::Model, known, None).unwrap().origin.starts_with("built-in"));
    }

    #[test]
    fn unknown_names_get_near_ones() {
        let message = find(Kind::Model, "qwen3-30b-a3", None).unwrap_err().to_string();
        assert!(message.contains("qwen3-30b-a3b"), "{message}");
    }
}
