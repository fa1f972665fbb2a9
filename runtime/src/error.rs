//! The crate's one error type. Each message says where, what was found, what was expected and what to do.

use std::path::{Path, PathBuf};
use thiserror::Error;

/// Everything that can go wrong between a file and a token.
#[derive(Debug, Error)]
pub enum RuntimeError {
    /// The operating system refused something.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// "open", "read", "write", "map", ...
        action: &'static str,
        /// The file concerned.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: found {found}, expected {expected}{}{hint}", path.display(), if hint.is_empty() { "" } else { "; " })]
    BadFile {
        /// The file concerned.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What should be there.
        expected: String,
        /// What to do about it; may be empty.
        hint: String,
    },
    /// The model's architecture is not one of those implemented.
    #[error("{}: architecture {found:?} is not supported; known: {known}", path.display())]
    UnknownArchitecture {
        /// The file concerned.
        path: PathBuf,
        /// The name in the file.
        found: String,
        /// All known names, separated by commas.
        known: String,
    },
    /// Tokenizer data is missing, contradictory or of an unknown kind.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template could not be rendered.
    #[error("chat template: {0}")]
    Template(String),
    /// More tokens than the context holds.
    #[error(
        "{needed} tokens do not fit the context of {context}; raise --context (the model was made for {trained}) or shorten the prompt"
    )]
    ContextTooSmall {
        /// Tokens asked for.
        needed: usize,
        /// Tokens the session holds.
        context: usize,
        /// Tokens the model was trained for.
        trained: usize,
    },
    /// A request that makes no sense.
    #[error("{what}: found {found}, expected {expected}")]
    BadRequest {
        /// The parameter.
        what: &'static str,
        /// Its value.
        found: String,
        /// What is allowed.
        expected: String,
    },
    /// A device was asked for that is not there or cannot run the model.
    #[error("device {device}: {reason}")]
    Device {
        /// "wgpu", "cuda", ...
        device: &'static str,
        /// Why not, and what to do.
        reason: String,
    },
    /// A description was refused by the cost crate.
    #[error(transparent)]
    Cost(#[from] tierwise_cost::CostError),
    /// An expert's bytes could not be had; the session is of no use after that.
    #[error("layer {layer}: experts could not be loaded: {reason}; check the model's file and disk, then start again")]
    ExpertsUnavailable {
        /// The layer that was being computed.
        layer: u32,
        /// The engine's reason.
        reason: String,
    },
    /// Ranks that compute together cannot go on.
    #[error("rank {rank}: {reason}")]
    Rank {
        /// Who is concerned.
        rank: usize,
        /// What is wrong with it.
        reason: String,
    },
}

/// Shorthand used all over the crate.
pub type Result<T, E = RuntimeError> = std::result::Result<T, E>;

impl RuntimeError {
    /// An [`RuntimeError::Io`] for `path`.
    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }

    /// A [`RuntimeError::BadFile`] for `path`.
    pub(crate) fn bad_file(path: &Path, found: impl Into<String>, expected: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::BadFile { path: path.to_path_buf(), found: found.into(), expected: expected.into(), hint: hint.into() }
    }
}
