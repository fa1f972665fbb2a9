//! Read-only memory maps of model files: the one place where the runtime maps a file.
//!
//! A map lets weights be used straight from the page cache, shared with other processes, and never counted twice in memory.

use crate::error::{Result, RuntimeError};
use memmap2::Mmap;
use std::fs::{self, File};
use std::path::Path;

/// Maps a regular file. `expected` says what the file should be, for the message when it is something else.
pub(crate) fn map_file(path: &Path, expected: &str) -> Result<Mmap> {
    // Before opening: opening a pipe would wait for its writer.
    let meta = fs::metadata(path).map_err(|e| RuntimeError::io("open", path, e))?;
    if !meta.is_file() {
        let found = if meta.is_dir() { "a folder" } else { "a device or other special file" };
        return Err(RuntimeError::bad_file(path, found, expected, "give the path of the file itself"));
    }
    let file = File::open(path).map_err(|e| RuntimeError::io("open", path, e))?;
    // SAFETY: the map is read-only and private to this process, and only bytes are taken from it, of which every pattern is
    // valid. What the language cannot rule out is another process that changes the file while it is mapped: then reads see the
    // new bytes (all checks were made on lengths and offsets kept elsewhere), or, if it was cut, the process dies of SIGBUS.
    // Every program that maps model files accepts this; our own writers replace files by renaming, never in place.
    let map = unsafe { Mmap::map(&file) };
    map.map_err(|e| RuntimeError::io("map", path, e))
}
