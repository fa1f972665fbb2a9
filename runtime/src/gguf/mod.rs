//! GGUF files: read through a memory map, written as a stream.
//!
//! Everything here treats the file as hostile: no length is believed, and nothing allocated for it, before it was compared with
//! the bytes that are there. Layout: `docs/gguf.md` of the ggml project.
//!
//! * [`mod@file`]: an open model, one file or several ([`Gguf`]); `split`: names and checks of split models.
//! * [`header`]: bytes to [`Header`], without IO; `cursor`: bounded reads; [`tensors`]: the tensor table and its checks.
//! * [`value`], [`metadata`]: typed metadata.
//! * [`mod@write`]: [`GgufWriter`], the only place where files are made.

mod cursor;
pub mod file;
pub mod header;
pub(crate) mod map;
pub mod metadata;
mod split;
pub mod tensors;
pub mod value;
pub mod write;

pub use file::Gguf;
pub use header::Header;
pub use map::HostWeights;
pub use metadata::Metadata;
pub use tensors::TensorInfo;
pub use value::{Array, Value};
pub use write::{GgufDataWriter, GgufWriter};

/// The first four bytes of every GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";

/// Alignment of tensor data in a file without `general.alignment`.
pub const DEFAULT_ALIGNMENT: u64 = 32;

/// Largest alignment taken seriously: the largest page size in use (64 KiB on some ARM and POWER systems).
pub const MAX_ALIGNMENT: u64 = 64 << 10;

/// Metadata key of the alignment.
const ALIGNMENT_KEY: &str = "general.alignment";

/// Deepest nesting of arrays in arrays. Files in use have none; the limit keeps a hostile file from exhausting the stack.
const MAX_ARRAY_DEPTH: u32 = 4;

/// Whether `alignment` may be used: the specification wants a multiple of 8, ggml a power of two.
fn is_valid_alignment(alignment: u64) -> bool {
    alignment.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&alignment)
}
