//! Facts about this machine that need no measurement: processor, instruction sets, memory and its limits.
//!
//! Read from `/proc` and `/sys` as the Linux manual pages describe them; a container's limits (cgroup v1 and v2) count.

use std::collections::HashSet;
use std::path::Path;
use tierwise_cost::units::Bytes;

/// What the system says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// Product name of the processor.
    pub cpu_name: String,
    /// Physical cores that this process may use.
    pub cores: u32,
    /// Hardware threads that this process may use.
    pub threads: u32,
    /// Instruction sets that matter for kernels.
    pub isa: Vec<String>,
    /// Memory that this process may use in all.
    pub ram_total: Bytes,
    /// Memory that is free or can be freed without swapping.
    pub ram_available: Bytes,
}

/// Reads the facts. What cannot be read is left at zero or "unknown".
pub fn host_facts() -> HostFacts {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let (cpu_name, system_cores, system_threads) = parse_cpuinfo(&text("/proc/cpuinfo"));
    let (mut total, mut available) = parse_meminfo(&text("/proc/meminfo"));
    for (limit, used) in cgroup_limits(Path::new("/sys/fs/cgroup"), &text("/proc/self/cgroup")) {
        if limit < total {
            total = limit;
        }
        available = available.min(limit.saturating_sub(used));
    }
    // Hardware threads of one core come in equal numbers.
    let per_core = (system_threads / system_cores.max(1)).max(1);
    HostFacts {
        cpu_name,
        cores: (threads / per_core).max(1),
        threads,
        isa: isa(),
        ram_total: Bytes(total),
        ram_available: Bytes(available),
    }
}

/// Product name, physical cores and hardware threads.
fn parse_cpuinfo(text: &str) -> (String, u32, u32) {
    let value = |line: &str| line.split_once(':').map(|(_, v)| v.trim().to_string()).unwrap_or_default();
    let mut name = None;
    let mut cores = HashSet::new();
    let mut threads = 0;
    for cpu in text.split("\n\n").filter(|t| !t.trim().is_empty()) {
        let field = |key: &str| cpu.lines().find(|l| l.split(':').next().is_some_and(|k| k.trim() == key)).map(value);
        if field("processor").is_none() {
            continue;
        }
        threads += 1;
        name = name.or_else(|| field("model name"));
        if let (Some(socket), Some(core)) = (field("physical id"), field("core id")) {
            cores.insert((socket, core));
        }
    }
    let cores = if cores.is_empty() { threads } else { cores.len() as u32 };
    (name.unwrap_or_else(|| "unknown processor".to_string()), cores, threads)
}

/// Total and available bytes.
fn parse_meminfo(text: &str) -> (u64, u64) {
    let field = |key: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(key))?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    (field("MemTotal:").unwrap_or(0), field("MemAvailable:").unwrap_or(0))
}

/// `(limit, used without reclaimable page cache)` of every memory cgroup that this process is in.
pub(super) fn cgroup_limits(root: &Path, self_cgroup: &str) -> Vec<(u64, u64)> {
    let mut limits = Vec::new();
    for line in self_cgroup.lines() {
        // hierarchy-id:controllers:path
        let mut parts = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let v2 = id == "0" && controllers.is_empty();
        if !v2 && !controllers.split(',').any(|c| c == "memory") {
            continue;
        }
        let base = if v2 { root.to_path_buf() } else { root.join("memory") };
        let (limit_file, used_file) =
            if v2 { ("memory.max", "memory.current") } else { ("memory.limit_in_bytes", "memory.usage_in_bytes") };
        // Every ancestor's limit holds too. Inside a container the path may not exist below the root that is mounted there.
        let mut folder = base.join(path.trim_start_matches('/'));
        loop {
            let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
            if let Some(limit) = number(limit_file) {
                let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
                let reclaimable: u64 =
                    stat.lines().find_map(|l| l.strip_prefix("inactive_file ")?.trim().parse().ok()).unwrap_or(0);
                limits.push((limit, number(used_file).unwrap_or(0).saturating_sub(reclaimable)));
            }
            if folder == base || !folder.pop() {
                break;
            }
        }
    }
    limits
}

#[cfg(target_arch = "x86_64")]
fn isa() -> Vec<String> {
    macro_rules! detected {
        ($($name:tt),*) => {
            [$(($name, std::arch::is_x86_feature_detected!($name))),*]
        };
    }
    detected!(
        "sse4.1",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avxvnni",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512vnni",
        "avx512bf16",
        "avx512fp16"
    )
    .into_iter()
    .filter(|(_, there)| *there)
    .map(|(name, _)| name.to_string())
    .collect()
}

#[cfg(target_arch = "aarch64")]
fn isa() -> Vec<String> {
    macro_rules! detected {
        ($($name:tt),*) => {
            [$(($name, std::arch::is_aarch64_feature_detected!($name))),*]
        };
    }
    detected!("neon", "dotprod", "i8mm", "fp16", "bf16", "sve")
        .into_iter()
        .filter(|(_, t)| *t)
        .map(|(n, _)| n.to_string())
        .collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn isa() -> Vec<String> {
    Vec::new()
}

/// The block device with the most bytes: `(name, capacity, spins)`.
pub(super) fn largest_disk() -> Option<(String, Bytes, bool)> {
    let mut best = None;
    for entry in std::fs::read_dir("/sys/block").ok()?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if ["loop", "ram", "zram", "dm-", "sr", "md"].iter().any(|p| name.starts_with(p)) {
            continue;
        }
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file)).ok();
        // In sectors of 512 bytes, whatever the device's own sector size.
        let sectors: u64 = read("size").and_then(|s| s.trim().parse().ok()).unwrap_or(0);
        let spins = read("queue/rotational").is_some_and(|s| s.trim() == "1");
        let bytes = Bytes(sectors.saturating_mul(512));
        if bytes.0 > 0 && best.as_ref().is_none_or(|(_, most, _)| bytes > *most) {
            best = Some((name, bytes, spins));
        }
    }
    best
}

/// The largest cache of the first processor, in bytes; 0 where the system does not say.
pub(super) fn last_level_cache() -> Bytes {
    let text = |index: u32| std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size")).ok();
    Bytes((0..8).filter_map(text).filter_map(|t| parse_cache_size(&t)).max().unwrap_or(0))
}

/// `107520K` or `32M`.
fn parse_cache_size(text: &str) -> Option<u64> {
    let t = text.trim();
    let (number, unit) = t.split_at(t.find(|c: char| !c.is_ascii_digit()).unwrap_or(t.len()));
    let unit = match unit {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

/// Display and 3D controllers of vendors that make GPUs, as `vendor:device`. From the bus, because asking drivers loads them.
pub(super) fn gpus() -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten() {
        let read = |name: &str| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default().trim().to_string();
        // Class 03: display controllers. Vendors: NVIDIA, AMD, Intel; others' are screens of servers and virtual machines.
        if read("class").starts_with("0x03") && ["0x10de", "0x1002", "0x8086"].contains(&read("vendor").as_str()) {
            found.push(format!("{}:{}", read("vendor").trim_start_matches("0x"), read("device").trim_start_matches("0x")));
        }
    }
    found.sort();
    found
}

/// Whether it is worth asking drivers for a GPU: only a bus that can be read and shows none says no.
pub(crate) fn may_have_gpu() -> bool {
    std::fs::read_dir("/sys/bus/pci/devices").is_err() || !gpus().is_empty()
}

/// NUMA nodes that the system shows; 1 where it shows none.
pub(super) fn numa_nodes() -> usize {
    let is_node = |name: &str| name.strip_prefix("node").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    let entries = std::fs::read_dir("/sys/devices/system/node").into_iter().flatten().flatten();
    entries.filter(|e| is_node(&e.file_name().to_string_lossy())).count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_systems_texts() {
        let cpu = |n: u32, core: u32| {
            format!("processor\t: {n}\nmodel name\t: Some CPU @ 2.00GHz\nphysical id\t: 0\ncore id\t\t: {core}\n\n")
        };
        let text: String = [cpu(0, 0), cpu(1, 0), cpu(2, 1), cpu(3, 1)].concat();
        assert_eq!(parse_cpuinfo(&text), ("Some CPU @ 2.00GHz".to_string(), 2, 4));
        assert_eq!(parse_cpuinfo(""), ("unknown processor".to_string(), 0, 0));
        assert_eq!(parse_cache_size("107520K\n"), Some(107_520 << 10));
        assert_eq!((parse_cache_size("32M"), parse_cache_size("x"), parse_cache_size("5G")), (Some(32 << 20), None, None));
        let memory = "MemTotal:       16000 kB\nMemFree:  1 kB\nMemAvailable:    8000 kB\n";
        assert_eq!(parse_meminfo(memory), (16_000 << 10, 8_000 << 10));
    }

    #[test]
    fn every_ancestors_limit_counts() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let inner = root.path().join("a/b");
        std::fs::create_dir_all(&inner).expect("made");
        let write = |path: &Path, name: &str, text: &str| std::fs::write(path.join(name), text).expect("written");
        write(&inner, "memory.max", "max\n");
        write(&root.path().join("a"), "memory.max", "1000\n");
        write(&root.path().join("a"), "memory.current", "400\n");
        write(&root.path().join("a"), "memory.stat", "anon 1\ninactive_file 100\n");
        assert_eq!(cgroup_limits(root.path(), "0::/a/b\n"), [(1000, 300)]);
        let v1 = root.path().join("memory/x");
        std::fs::create_dir_all(&v1).expect("made");
        write(&v1, "memory.limit_in_bytes", "500\n");
        write(&v1, "memory.usage_in_bytes", "50\n");
        assert_eq!(cgroup_limits(root.path(), "5:cpu,memory:/x\n3:pids:/x\n"), [(500, 50)]);
    }

    #[test]
    fn this_machine_has_something() {
        let facts = host_facts();
        assert!(facts.threads >= facts.cores && facts.cores >= 1);
        assert!(facts.ram_total >= facts.ram_available);
        assert!(!cfg!(target_os = "linux") || facts.ram_total.0 > 0);
    }
}
