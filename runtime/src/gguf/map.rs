//! Read-only memory maps of model files: the one place where the runtime maps a file.
//!
//! A map lets weights be used straight from the page cache, shared with other processes, and never counted twice in memory.
//! [`bring_in`] trades that for pages that are there from the start, or for huge ones.

use crate::error::{Result, RuntimeError};
use crate::memory::{HUGE_BYTES, PageSize, anonymous};
use memmap2::{Advice, Mmap};
use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

/// How weights in host memory come from their files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HostWeights {
    /// Mapped: a page is read when it is first touched.
    #[default]
    Map,
    /// Mapped, and all pages are brought in before the first token.
    Prefault,
    /// Copied into memory of the program's own, in huge pages as far as the system gives them. The page cache may drop its copy.
    Huge,
    /// The same in huge pages that the administrator has set aside, or an error.
    Hugetlb,
}

/// Bytes copied at once into huge pages: progress on disk, few system calls.
const COPY_BYTES: usize = 64 << 20;

/// Brings a file's map in, as `how` says.
pub(crate) fn bring_in(path: &Path, map: &mut Mmap, how: HostWeights) -> Result<()> {
    match how {
        HostWeights::Map => Ok(()),
        HostWeights::Prefault => {
            map.advise(Advice::PopulateRead).or_else(|_| touch(map)).map_err(|e| RuntimeError::io("read", path, e))
        }
        HostWeights::Huge | HostWeights::Hugetlb => {
            let refused = |e| RuntimeError::io("copy into memory", path, e);
            let pages = if how == HostWeights::Huge { PageSize::Transparent } else { PageSize::Hugetlb };
            let mut copy = anonymous(map.len(), pages).map_err(|e| match (how, e.raw_os_error()) {
                (HostWeights::Hugetlb, Some(libc::ENOMEM)) => too_few_huge_pages(map.len()),
                _ => refused(e),
            })?;
            let mut file = File::open(path).map_err(refused)?;
            copy[..map.len()].chunks_mut(COPY_BYTES).try_for_each(|part| file.read_exact(part)).map_err(refused)?;
            *map = copy.make_read_only().map_err(refused)?;
            Ok(())
        }
    }
}

fn too_few_huge_pages(bytes: usize) -> RuntimeError {
    let pages = bytes.div_ceil(HUGE_BYTES);
    RuntimeError::BadRequest {
        what: "--weights hugetlb",
        found: "fewer huge pages set aside than the weights need".into(),
        expected: format!("{pages} free ones of 2 MiB (echo {pages} > /proc/sys/vm/nr_hugepages), or --weights huge"),
    }
}

/// One byte of every page, for kernels without `MADV_POPULATE_READ` (before 5.14).
fn touch(map: &Mmap) -> std::io::Result<()> {
    std::hint::black_box(map.iter().step_by(4096).fold(0u8, |sum, byte| sum ^ byte));
    Ok(())
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_weights_come_they_are_the_same() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("weights");
        // More than a huge page, and no whole number of pages.
        let bytes: Vec<u8> = (0..5_000_001u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        fs::write(&path, &bytes).expect("written");
        for how in [HostWeights::Map, HostWeights::Prefault, HostWeights::Huge] {
            let mut map = map_file(&path, "weights").expect("mapped");
            bring_in(&path, &mut map, how).expect("brought in");
            assert!(map[..] == bytes[..], "{how:?}");
        }
        let mut map = map_file(&path, "weights").expect("mapped");
        fs::remove_file(&path).expect("removed");
        let message = bring_in(&path, &mut map, HostWeights::Huge).expect_err("the file is gone").to_string();
        assert!(message.contains("weights"), "{message}");
        touch(&map).expect("every page is there");
    }
}
