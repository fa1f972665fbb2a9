//! Where each expert's bytes are in the model's files and where they come to lie in a slot; positional reads of them.
//!
//! Reads are positional, never through the memory map: pages of a map would stay resident outside the plan's budget. Direct reads
//! (`O_DIRECT`, open(2)) go past the page cache and want whole blocks. GGUF aligns tensors to 32 bytes only, so the window of blocks
//! around a matrix is read and the matrix is used where it lies inside: no copy, at most one block too much on either side.

use super::buffer::{ALIGNMENT, SlotBuffer};
use crate::error::{Result, RuntimeError};
use rustix::fs::{CWD, Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tierwise_planner::engine::ExpertKey;

/// Where experts come from. A trait, so that tests can make reads fail or take their time.
pub trait ExpertReader: Send + Sync {
    /// Fills `buffer`, a slot for the expert, as [`ExpertTable`] says.
    ///
    /// # Errors
    /// The system's reason, with the file.
    fn read(&self, key: ExpertKey, buffer: &mut [u8]) -> Result<(), String>;
}

/// One matrix of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Index into the table's files.
    pub file: usize,
    /// Where it is in the file.
    pub offset: u64,
    /// Its length.
    pub bytes: usize,
    /// Where its window begins in the slot: a multiple of [`ALIGNMENT`].
    pub window: usize,
}

/// A read: so many bytes of a file to a place in the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Index into the table's files.
    pub file: usize,
    /// Where to read.
    pub offset: u64,
    /// Where to, in the slot.
    pub at: usize,
    /// How much to ask for.
    pub bytes: usize,
    /// How much must come; what is asked beyond may lie behind the file's end.
    pub needed: usize,
}

impl Extent {
    /// Where the matrix begins in the slot: as far into its window as in the file's blocks, so both ways of reading agree.
    pub const fn in_slot(&self) -> usize {
        self.window + (self.offset % ALIGNMENT as u64) as usize
    }

    /// What to read: whole blocks for direct reads, else the very bytes.
    pub const fn read(&self, direct: bool) -> Window {
        if direct {
            let skip = (self.offset % ALIGNMENT as u64) as usize;
            let needed = skip + self.bytes;
            let bytes = needed.next_multiple_of(ALIGNMENT);
            Window { file: self.file, offset: self.offset - skip as u64, at: self.window, bytes, needed }
        } else {
            Window { file: self.file, offset: self.offset, at: self.in_slot(), bytes: self.bytes, needed: self.bytes }
        }
    }
}

/// Every expert of every layer with routed experts: where it is, and how it lies in a slot.
#[derive(Debug, Default)]
pub struct ExpertTable {
    paths: Vec<PathBuf>,
    /// `[layer][expert]` to gate, up and down; empty for layers without experts.
    experts: Vec<Vec<[Extent; 3]>>,
    /// Bytes of a slot, by layer.
    slot_bytes: Vec<usize>,
}

impl ExpertTable {
    /// A table of `layers` without experts.
    pub fn new(layers: usize) -> Self {
        Self { paths: Vec::new(), experts: vec![Vec::new(); layers], slot_bytes: vec![0; layers] }
    }

    /// Adds a layer: `(file, offset, bytes)` of gate, up and down of each of its experts.
    pub fn add_layer<'p>(&mut self, layer: usize, experts: impl Iterator<Item = [(&'p Path, u64, usize); 3]>) {
        let mut of_layer: Vec<[Extent; 3]> = experts
            .map(|matrices| {
                matrices.map(|(path, offset, bytes)| {
                    let file = self.paths.iter().position(|p| p == path).unwrap_or_else(|| {
                        self.paths.push(path.to_path_buf());
                        self.paths.len() - 1
                    });
                    Extent { file, offset, bytes, window: 0 }
                })
            })
            .collect();
        // Windows begin at the same places for all experts of the layer: room for the longest.
        let longest = |i: usize| of_layer.iter().map(|e| e[i].read(true).bytes).max().unwrap_or(0);
        let rooms = [longest(0), longest(1), longest(2)];
        let starts = [0, rooms[0], rooms[0] + rooms[1]];
        for expert in &mut of_layer {
            expert.iter_mut().zip(starts).for_each(|(e, start)| e.window = start);
        }
        self.experts[layer] = of_layer;
        self.slot_bytes[layer] = rooms.iter().sum();
    }

    /// The files.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Gate, up and down of an expert.
    ///
    /// # Panics
    /// If the model has no such expert.
    pub fn expert(&self, key: ExpertKey) -> &[Extent; 3] {
        &self.experts[key.layer as usize][key.expert as usize]
    }

    /// Bytes of a slot for an expert of `layer`: the expert's own, up to a block more before and behind each matrix.
    pub fn slot_bytes(&self, layer: u32) -> usize {
        self.slot_bytes.get(layer as usize).copied().unwrap_or(0)
    }
}

/// The model's files, open for positional reads.
#[derive(Debug)]
pub struct FileReader {
    table: Arc<ExpertTable>,
    files: Vec<File>,
    direct: bool,
}

impl FileReader {
    /// Opens the files for reads through the page cache.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn new(table: Arc<ExpertTable>) -> Result<Self> {
        let open = |p: &PathBuf| File::open(p).map_err(|e| RuntimeError::io("open", p, e));
        let files = table.paths.iter().map(open).collect::<Result<_>>()?;
        Ok(Self { table, files, direct: false })
    }

    /// Opens the files for reads past the page cache. `Ok(Err(why))` when the file system refuses.
    ///
    /// # Errors
    /// When one cannot be opened at all.
    pub fn direct(table: Arc<ExpertTable>) -> Result<Result<Self, String>> {
        let mut files = Vec::with_capacity(table.paths.len());
        for path in &table.paths {
            let file = match rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()) {
                Ok(file) => File::from(file),
                Err(e) if [rustix::io::Errno::INVAL, rustix::io::Errno::OPNOTSUPP].contains(&e) => {
                    return Ok(Err(format!("the file system of {} refuses direct reads ({e})", path.display())));
                }
                Err(e) => return Err(RuntimeError::io("open", path, e.into())),
            };
            // Some file systems accept the flag and refuse the read.
            let mut probe = SlotBuffer::zeroed(ALIGNMENT);
            if let Err(e) = file.read_at(probe.as_mut_slice(), 0) {
                return Ok(Err(format!("the file system of {} refuses direct reads ({e})", path.display())));
            }
            files.push(file);
        }
        Ok(Ok(Self { table, files, direct: true }))
    }

    /// What is read.
    pub const fn table(&self) -> &Arc<ExpertTable> {
        &self.table
    }

    /// Whether reads go past the page cache.
    pub const fn is_direct(&self) -> bool {
        self.direct
    }

    /// Asks the system to drop its copies of the files, as far as nobody maps them.
    pub fn drop_page_cache(&self) {
        for file in &self.files {
            // Advice: whoever ignores it keeps more in memory, nothing else.
            let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
        }
    }

    /// The open files, in the table's order.
    pub(super) fn files(&self) -> &[File] {
        &self.files
    }

    /// The reads for an expert, in file order for the disk's sake.
    pub(super) fn windows(&self, key: ExpertKey) -> [Window; 3] {
        let mut windows = self.table.expert(key).map(|e| e.read(self.direct));
        windows.sort_by_key(|w| (w.file, w.offset));
        windows
    }

    /// What to say about a failed read.
    pub(super) fn failure(&self, w: &Window, source: &dyn std::fmt::Display) -> String {
        format!("{}: {} bytes at {}: {source}", self.table.paths[w.file].display(), w.bytes, w.offset)
    }

    /// What to say about a read that ended early.
    pub(super) fn too_short(&self, w: &Window, done: usize) -> String {
        self.failure(w, &format_args!("the file ends after {done} of them: it was cut while in use"))
    }
}

impl ExpertReader for FileReader {
    fn read(&self, key: ExpertKey, buffer: &mut [u8]) -> Result<(), String> {
        for w in self.windows(key) {
            let into = &mut buffer[w.at..w.at + w.bytes];
            let mut done = 0;
            while done < w.needed {
                match self.files[w.file].read_at(&mut into[done..], w.offset + done as u64) {
                    Ok(0) => return Err(self.too_short(&w, done)),
                    // A direct read stops within a block only at the file's end.
                    Ok(n) if self.direct && done + n < w.needed && n % ALIGNMENT != 0 => {
                        return Err(self.too_short(&w, done + n));
                    }
                    Ok(n) => done += n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(self.failure(&w, &e)),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_hold_the_matrix_and_do_not_overlap() {
        let path = Path::new("model.gguf");
        let mut table = ExpertTable::new(1);
        let sizes = [10_000_usize, 7, 4096];
        let at = |e: usize, i: usize| (32 * (1 + e) + 50_000 * i + e * sizes[i]) as u64;
        table.add_layer(0, (0..9).map(|e| [0, 1, 2].map(|i| (path, at(e, i), sizes[i]))));
        for expert in 0..9 {
            let of = table.expert(ExpertKey { layer: 0, expert });
            let mut end = 0;
            for (i, e) in of.iter().enumerate() {
                let (direct, exact) = (e.read(true), e.read(false));
                assert_eq!((direct.offset % 4096, direct.bytes % 4096, direct.at % 4096), (0, 0, 0));
                assert!(direct.at >= end, "windows are apart");
                end = direct.at + direct.bytes;
                assert_eq!(exact.at - direct.at, (exact.offset - direct.offset) as usize, "both put the matrix in one place");
                assert_eq!((exact.at, exact.bytes, exact.offset), (e.in_slot(), sizes[i], at(expert as usize, i)));
                assert_eq!(direct.needed, exact.at + exact.bytes - direct.at);
                assert!(direct.bytes - direct.needed < 4096);
            }
            assert!(end <= table.slot_bytes(0));
        }
        assert!(table.slot_bytes(0) <= sizes.iter().map(|s| s + 2 * 4095).sum());
    }
}
