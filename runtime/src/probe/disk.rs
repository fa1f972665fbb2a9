//! Timing a disk: reads of a file of our own past the page cache (direct I/O), by block size and reads under way.
//!
//! The file's name is removed as soon as it is open, so it is gone however the program ends. If the file system refuses direct I/O
//! there is nothing to measure: reads through the page cache would time memory.

use crate::error::{Result, RuntimeError};
use rustix::fs::{CWD, Mode, OFlags};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tierwise_cost::machine::{DiskSample, Spread};

/// Direct I/O wants buffers, offsets and lengths aligned to the device's block, at most this.
const ALIGNMENT: usize = 4096;
/// Blocks written at once.
const WRITE_BYTES: usize = 4 << 20;
/// `f_type` of file systems that live in memory: tmpfs and ramfs.
const MEMORY_FILE_SYSTEMS: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// A nameless file, open for direct reads.
pub(super) struct DiskFile {
    file: File,
    bytes: u64,
}

/// The file's name until it is removed.
struct Name(PathBuf);

impl Drop for Name {
    fn drop(&mut self) {
        // Best effort: an error that made us give up is the one worth telling.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl DiskFile {
    /// Writes `bytes` of random data in `folder`. `Ok(Err(why))` when the file system has no direct I/O.
    pub(super) fn create(folder: &Path, bytes: u64) -> Result<Result<Self, String>> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let serial = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!(".tierwise-calibrate-{}-{serial}.tmp", std::process::id()));
        let mut writer =
            OpenOptions::new().write(true).create_new(true).open(&path).map_err(|e| RuntimeError::io("create", &path, e))?;
        let name = Name(path.clone());
        if let Ok(fs) = rustix::fs::fstatfs(&writer)
            && MEMORY_FILE_SYSTEMS.contains(&(fs.f_type as u64))
        {
            return Ok(Err(format!("{} is a file system in memory", folder.display())));
        }
        let direct = rustix::fs::openat(CWD, &path, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty());
        let file = match direct {
            Ok(file) => File::from(file),
            Err(e) => return Ok(Err(format!("{} refuses direct I/O ({e})", folder.display()))),
        };
        drop(name);
        let failed = |e| RuntimeError::io("write", &path, e);
        let mut block = vec![0u8; WRITE_BYTES];
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let bytes = bytes.next_multiple_of(WRITE_BYTES as u64).max(WRITE_BYTES as u64);
        for _ in 0..bytes / WRITE_BYTES as u64 {
            // xorshift64 (Marsaglia 2003): disks that compress or share equal blocks must not look fast.
            for word in block.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            writer.write_all(&block).map_err(failed)?;
        }
        writer.sync_all().map_err(failed)?;
        let opened = Self { file, bytes };
        // Some file systems accept the flag and refuse the read.
        match opened.read(ALIGNMENT as u64, 1, Duration::ZERO, 0) {
            Ok(_) => Ok(Ok(opened)),
            Err(e) => Ok(Err(format!("{} refuses direct reads ({e})", folder.display()))),
        }
    }

    /// 10^9 bytes per second of `depth` threads, each reading random blocks one after the other for `time`, at least one.
    fn read(&self, block: u64, depth: u32, time: Duration, seed: u64) -> std::io::Result<f64> {
        let start = Instant::now();
        let reader = |thread: u64| -> std::io::Result<u64> {
            let size = usize::try_from(block).unwrap_or(usize::MAX);
            // An aligned part of a buffer that is a little larger.
            let mut buffer = vec![0u8; size + ALIGNMENT];
            let skip = buffer.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
            let aligned = &mut buffer[skip..skip + size];
            let blocks = (self.bytes / block).max(1);
            let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (thread + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mut done = 0;
            loop {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                self.file.read_exact_at(aligned, state % blocks * block)?;
                done += block;
                if start.elapsed() >= time {
                    return Ok(done);
                }
            }
        };
        let bytes: u64 = std::thread::scope(|s| {
            let readers: Vec<_> = (0..u64::from(depth)).map(|i| s.spawn(move || reader(i))).collect();
            readers.into_iter().map(|r| r.join().expect("a reader does not panic")).sum::<std::io::Result<u64>>()
        })?;
        Ok(bytes as f64 / start.elapsed().as_secs_f64().max(1e-9) / 1e9)
    }

    /// Every block size at every depth, in interleaved rounds. `progress` is told the share that is done.
    pub(super) fn measure(
        &self,
        blocks: &[u64],
        depths: &[u32],
        time: Duration,
        rounds: usize,
        progress: &mut dyn FnMut(f64),
    ) -> std::io::Result<Vec<DiskSample>> {
        let points: Vec<(u32, u64)> =
            depths.iter().flat_map(|d| blocks.iter().map(|b| (*d, *b))).filter(|(_, b)| *b <= self.bytes).collect();
        let each = time / (points.len() * rounds).max(1) as u32;
        let mut rates = vec![Vec::new(); points.len()];
        for round in 0..rounds {
            for (i, (depth, block)) in points.iter().enumerate() {
                rates[i].push(self.read(*block, *depth, each, (round * points.len() + i) as u64)?);
                progress((round * points.len() + i + 1) as f64 / (rounds * points.len()) as f64);
            }
        }
        let sample = |((depth, block), rates): (&(u32, u64), &Vec<f64>)| {
            Some(DiskSample { depth: *depth, block: *block, gb_per_s: Spread::of(rates)? })
        };
        Ok(points.iter().zip(&rates).filter_map(sample).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_nothing_behind_and_reads_or_says_why_not() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let made = DiskFile::create(folder.path(), 1 << 20).expect("written");
        assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 0, "the file has no name");
        match made {
            Ok(file) => {
                let samples = file.measure(&[64 << 10, 1 << 20], &[1, 4], Duration::ZERO, 2, &mut |_| {}).expect("read");
                let keys: Vec<_> = samples.iter().map(|s| (s.depth, s.block)).collect();
                assert_eq!(keys, [(1, 64 << 10), (1, 1 << 20), (4, 64 << 10), (4, 1 << 20)]);
                assert!(samples.iter().all(|s| s.gb_per_s.min > 0.0 && s.gb_per_s.runs == 2));
            }
            Err(why) => println!("skipped: {why}"),
        }
        let missing = folder.path().join("missing");
        let message = DiskFile::create(&missing, 1).err().expect("no such folder").to_string();
        assert!(message.contains("missing"), "{message}");
    }
}
