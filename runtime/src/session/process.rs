//! What this process keeps in memory, from `/proc/self` (proc(5)): the check on what plans promise.

use std::path::PathBuf;
use tierwise_cost::units::Bytes;

/// Resident memory of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessMemory {
    /// All of it (`VmRSS`).
    pub resident: Bytes,
    /// The most it ever was (`VmHWM`).
    pub peak: Bytes,
    /// Of it memory of its own: heap, stacks, slots (`RssAnon`).
    pub anonymous: Bytes,
    /// Of it pages of files: program, libraries, the model's memory map (`RssFile`).
    pub file: Bytes,
    /// Of these, pages of the model's files.
    pub model: Bytes,
    /// Of the memory of its own, what is in huge pages.
    pub huge: Bytes,
}

impl ProcessMemory {
    /// Looks now. `None` where there is no `/proc`.
    pub fn look(model_files: &[PathBuf]) -> Option<Self> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let files: Vec<String> = model_files
            .iter()
            .map(|p| std::fs::canonicalize(p).unwrap_or_else(|_| p.clone()).to_string_lossy().into_owned())
            .collect();
        Self::parse(&status, &maps, &files)
    }

    fn parse(status: &str, maps: &str, model_files: &[String]) -> Option<Self> {
        let line = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).and_then(kibibytes);
        Some(Self {
            resident: line("VmRSS:")?,
            peak: line("VmHWM:")?,
            anonymous: line("RssAnon:")?,
            file: line("RssFile:")?,
            model: resident_of(maps, model_files),
            huge: Bytes(maps.lines().filter_map(|l| l.strip_prefix("AnonHugePages:")).filter_map(kibibytes).map(|b| b.0).sum()),
        })
    }
}

/// `    1234 kB`
fn kibibytes(text: &str) -> Option<Bytes> {
    text.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024).map(Bytes)
}

/// Sum of the `Rss` of the maps of `files`.
fn resident_of(maps: &str, files: &[String]) -> Bytes {
    let mut sum = 0;
    let mut counted = false;
    for line in maps.lines() {
        if let Some(rss) = line.strip_prefix("Rss:") {
            if counted {
                sum += kibibytes(rss).unwrap_or_default().0;
            }
        } else if line.split_whitespace().next().is_some_and(|w| w.contains('-')) {
            // `7f..-7f.. r--s 00000000 fd:00 1234   /path with spaces`
            let path = line.splitn(6, ' ').nth(5).unwrap_or_default().trim_start();
            counted = files.iter().any(|f| f == path);
        }
    }
    Bytes(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_summed_by_file() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\nRssAnon:\t     512 kB\nRssFile:\t     500 kB\n";
        let maps = "7f0000000000-7f0000001000 r--s 00000000 fd:00 12                         /models/a b.gguf\nSize: 4 kB\nRss:                 100 kB\nPss: 50 kB\n\
                    7f1000000000-7f1000001000 r-xp 00000000 fd:00 13                         /bin/x\nRss:                 7 kB\n\
                    7f2000000000-7f2000001000 r--s 00001000 fd:00 12                         /models/a b.gguf\nRss:                 11 kB\n\
                    7f3000000000-7f3000001000 rw-p 00000000 00:00 0 \nRss:                 9 kB\n";
        let m = ProcessMemory::parse(status, maps, &["/models/a b.gguf".to_string()]).expect("whole");
        let kib = |n: u64| Bytes(n * 1024);
        assert_eq!((m.resident, m.peak, m.anonymous, m.file), (kib(1024), kib(2048), kib(512), kib(500)));
        assert_eq!(m.model, kib(111));
        assert!(ProcessMemory::parse("", maps, &[]).is_none());
    }
}
