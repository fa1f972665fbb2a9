//! The crate's one error type.

use thiserror::Error;

/// What can be wrong with a description (never with a file: this crate opens none).
#[derive(Debug, Error, PartialEq)]
pub enum CostError {
    /// A quantity's text form was not understood.
    #[error("cannot read {text:?} as {expected}: {hint}")]
    BadQuantity {
        /// The text as given.
        text: String,
        /// What was expected, e.g. "a size".
        expected: &'static str,
        /// What to write instead.
        hint: &'static str,
    },
    /// A format or recipe name is not in the table.
    #[error("unknown weight format {name:?}; known: {known}")]
    UnknownFormat {
        /// The name as given.
        name: String,
        /// All known names, separated by commas.
        known: String,
    },
    /// A row length is not a whole number of blocks.
    #[error("tensor {tensor}: rows of {cols} elements do not divide into {format} blocks of {block}")]
    RowNotBlocked {
        /// Tensor name.
        tensor: String,
        /// Elements per row.
        cols: u64,
        /// Format name.
        format: &'static str,
        /// Elements per block.
        block: u64,
    },
    /// A model description contradicts itself.
    #[error("model {model}: {field} is {found}, expected {expected}")]
    BadModel {
        /// Model name.
        model: String,
        /// The offending field.
        field: String,
        /// Its value.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// A machine description contradicts itself.
    #[error("machine {machine}: {field} is {found}, expected {expected}")]
    BadMachine {
        /// Machine name.
        machine: String,
        /// The offending field.
        field: String,
        /// Its value.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// A TOML text did not parse into the description.
    #[error("{what}: {message}")]
    BadToml {
        /// "machine" or "model".
        what: &'static str,
        /// The parser's message with line and column.
        message: String,
    },
}
