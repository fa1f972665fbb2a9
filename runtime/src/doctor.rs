//! Looks at this machine the way a person would before running a large model, and says what to change.
//!
//! Every check states what was found; a hint says what to do. A missing file or an old kernel is a finding, not an error.

use crate::backend;
use crate::probe::nodes::Nodes;
use serde::Serialize;
use std::fs;
use std::path::Path;
use tierwise_cost::units::Bytes;

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works; something could be better.
    Warn,
    /// Not there; some features need it.
    Missing,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How good it is.
    pub status: Status,
    /// What is there.
    pub found: String,
    /// What to do; empty when nothing is to be done.
    pub hint: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, found: found.into(), hint: String::new() }
    }

    fn warn(name: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, status: Status::Warn, found: found.into(), hint: hint.into() }
    }

    fn missing(name: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, status: Status::Missing, found: found.into(), hint: hint.into() }
    }
}

/// All checks. `folder` is where models will lie: its file system is looked at. `nodes` are this machine's.
pub fn examine(folder: &Path, nodes: &Nodes) -> Vec<Check> {
    let mut checks = vec![processor(), instruction_sets(), memory()];
    checks.extend(numa_and_cxl(nodes));
    checks.extend(backend::discover().into_iter().map(devices));
    checks.push(memlock());
    checks.push(transparent_huge_pages());
    checks.push(governor());
    checks.push(disk(folder));
    checks
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|s| s.trim().to_string())
}

/// The value of `key` in a file of `key : value` lines, first match.
fn field(text: &str, key: &str) -> Option<String> {
    text.lines().find_map(|l| {
        let (k, v) = l.split_once(':')?;
        (k.trim() == key).then(|| v.trim().to_string())
    })
}

fn processor() -> Check {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let name = read("/proc/cpuinfo").and_then(|t| field(&t, "model name")).unwrap_or_else(|| std::env::consts::ARCH.to_string());
    let found = format!("{name}, {threads} threads usable");
    if threads < 4 {
        Check::warn("processor", found, "few threads: prefill will be slow; memory bandwidth may not be reached")
    } else {
        Check::ok("processor", found)
    }
}

#[cfg(target_arch = "x86_64")]
fn instruction_sets() -> Check {
    let have = [
        ("AVX2", is_x86_feature_detected!("avx2")),
        ("FMA", is_x86_feature_detected!("fma")),
        ("F16C", is_x86_feature_detected!("f16c")),
        ("AVX-512", is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")),
        ("AVX-512 VNNI", is_x86_feature_detected!("avx512vnni")),
        ("AVX-512 BF16", is_x86_feature_detected!("avx512bf16")),
        ("AVX-VNNI", is_x86_feature_detected!("avxvnni")),
    ];
    let names: Vec<_> = have.iter().filter(|(_, yes)| *yes).map(|(name, _)| *name).collect();
    if have[..3].iter().all(|(_, yes)| *yes) {
        Check::ok("instruction sets", names.join(", "))
    } else {
        Check::warn(
            "instruction sets",
            names.join(", "),
            "without AVX2, FMA and F16C the scalar kernels run: expect a tenth of the speed",
        )
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn instruction_sets() -> Check {
    Check::warn("instruction sets", std::env::consts::ARCH, "no vector kernels for this architecture yet: the scalar ones run")
}

fn memory() -> Check {
    let info = read("/proc/meminfo").unwrap_or_default();
    let kib = |key: &str| {
        field(&info, key).and_then(|v| v.split_whitespace().next().and_then(|n| n.parse::<u64>().ok())).map(|k| Bytes(k << 10))
    };
    let (Some(total), Some(available)) = (kib("MemTotal"), kib("MemAvailable")) else {
        return Check::missing("memory", "unknown", "/proc/meminfo is not readable: give --ram");
    };
    let swap_used = kib("SwapTotal").unwrap_or_default().saturating_sub(kib("SwapFree").unwrap_or_default());
    let limit = cgroup_limit().filter(|l| l.0 < total.0);
    let mut found = format!("{total}, {available} available");
    if let Some(limit) = limit {
        found += &format!(", {limit} allowed for this process group");
    }
    if swap_used.0 > total.0 / 50 {
        return Check::warn(
            "memory",
            found + &format!(", {swap_used} swapped out"),
            "close other programs: swapping ruins decode speed",
        );
    }
    Check::ok("memory", found)
}

/// The memory limit of this process's control group, where there is one.
fn cgroup_limit() -> Option<Bytes> {
    let text = read("/sys/fs/cgroup/memory.max").or_else(|| read("/sys/fs/cgroup/memory/memory.limit_in_bytes"))?;
    text.parse().ok().map(Bytes)
}

/// NUMA nodes with and without processors, and CXL devices that are no memory yet.
fn numa_and_cxl(nodes: &Nodes) -> Vec<Check> {
    let list = |far: bool| {
        let of_kind = nodes.nodes.iter().filter(|n| n.total.0 > 0 && n.kind.is_far() == far);
        of_kind.map(|n| format!("node {}: {}", n.number, n.total)).collect::<Vec<_>>()
    };
    let (near, far) = (list(false), list(true));
    let notes = nodes.notes.iter().map(|n| format!("; {n}")).collect::<String>();
    let numa = match near.len() {
        0 | 1 => Check::ok("NUMA", near.join(", ") + &notes),
        n => Check::warn(
            "NUMA",
            format!("{n} nodes: {}{notes}", near.join(", ")),
            "threads are not kept beside their node: bind the process to one node if the model fits there",
        ),
    };
    let sleeping = nodes.dax.iter().filter(|d| d.driver.as_deref() != Some("kmem")).count();
    let devices = nodes.cxl.len();
    let cxl = match (devices, far.is_empty()) {
        (0, true) if sleeping == 0 => Check::ok("CXL memory", "none"),
        (0, true) => Check::warn(
            "CXL memory",
            format!("{sleeping} DAX devices that are files, not memory"),
            "bring them up as system RAM (daxctl reconfigure-device --mode=system-ram)",
        ),
        (n, true) => Check::warn(
            "CXL memory",
            format!("{n} devices, {} regions, not online as memory", nodes.regions.len()),
            "make a region (cxl create-region -t ram) and bring it up as system RAM (daxctl reconfigure-device --mode=system-ram)",
        ),
        (n, false) => Check::ok("CXL memory", format!("nodes without processors: {}; {n} CXL devices", far.join(", "))),
    };
    vec![numa, cxl]
}

fn devices(report: backend::Report) -> Check {
    let name = match report.interface {
        "CUDA" => "CUDA GPUs",
        _ => "Vulkan GPUs",
    };
    match report.absent_because {
        Some(why) => {
            Check::missing(name, why, "install the GPU's driver if there is one; without a GPU, plans for the CPU are made")
        }
        None => {
            let list: Vec<_> = report
                .devices
                .iter()
                .map(|d| {
                    let memory = d.memory_bytes.map(|b| format!(", {}", Bytes(b))).unwrap_or_default();
                    format!("{} ({}, {}{memory})", d.name, d.kind, d.driver)
                })
                .collect();
            Check::ok(name, list.join("; "))
        }
    }
}

fn memlock() -> Check {
    let limits = read("/proc/self/limits").unwrap_or_default();
    let soft = limits
        .lines()
        .find_map(|l| l.strip_prefix("Max locked memory"))
        .and_then(|l| l.split_whitespace().next().map(str::to_string))
        .unwrap_or_else(|| "unknown".into());
    match soft.parse::<u64>() {
        Ok(bytes) if bytes < 1 << 30 => Check::warn(
            "locked memory",
            Bytes(bytes).to_string(),
            "raise it for pinned buffers: ulimit -l unlimited, or LimitMEMLOCK=infinity",
        ),
        Ok(bytes) => Check::ok("locked memory", Bytes(bytes).to_string()),
        Err(_) => Check::ok("locked memory", soft),
    }
}

fn transparent_huge_pages() -> Check {
    match read("/sys/kernel/mm/transparent_hugepage/enabled") {
        None => Check::missing("huge pages", "not in this kernel", ""),
        Some(text) => {
            let chosen = text.split_whitespace().find(|w| w.starts_with('[')).unwrap_or("").trim_matches(['[', ']']).to_string();
            if chosen == "never" {
                Check::warn("huge pages", chosen, "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")
            } else {
                Check::ok("huge pages", chosen)
            }
        }
    }
}

fn governor() -> Check {
    match read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") {
        None => Check::ok("frequency governor", "not visible (virtual machine or fixed frequency)"),
        Some(g) if g == "powersave" => {
            Check::warn("frequency governor", g, "cpupower frequency-set -g performance for steady speed")
        }
        Some(g) => Check::ok("frequency governor", g),
    }
}

fn disk(folder: &Path) -> Check {
    let Ok(space) = fs_space(folder) else {
        return Check::missing("disk", format!("{} is not readable", folder.display()), "give a folder that exists");
    };
    let mounts = read("/proc/self/mounts").unwrap_or_default();
    let absolute = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
    let mount = mounts
        .lines()
        .filter_map(|l| {
            let mut words = l.split(' ');
            Some((words.next()?, words.next()?, words.next()?))
        })
        .filter(|(_, at, _)| absolute.starts_with(at))
        .max_by_key(|(_, at, _)| at.len());
    let (device, kind) = mount.map_or(("unknown", "unknown"), |(device, _, kind)| (device, kind));
    let found = format!("{} free of {} on {device} ({kind})", Bytes(space.0), Bytes(space.1));
    if matches!(kind, "nfs" | "nfs4" | "cifs" | "fuse.sshfs") {
        Check::warn(
            "disk",
            found,
            "a network file system: loading experts on demand will be slow; copy the model to a local disk",
        )
    } else if space.0 < 10 << 30 {
        Check::warn("disk", found, "less than 10 GiB free: too little for most models")
    } else {
        Check::ok("disk", found)
    }
}

/// (free, total) bytes of the file system that holds `folder`.
fn fs_space(folder: &Path) -> rustix::io::Result<(u64, u64)> {
    let s = rustix::fs::statvfs(folder)?;
    Ok((s.f_bavail.saturating_mul(s.f_frsize), s.f_blocks.saturating_mul(s.f_frsize)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_is_filled_and_every_warning_has_a_hint() {
        let checks = examine(Path::new("."), &Nodes::of_this_machine());
        for name in ["processor", "instruction sets", "memory", "NUMA", "CXL memory", "CUDA GPUs", "Vulkan GPUs", "disk"] {
            assert!(checks.iter().any(|c| c.name == name), "{name}");
        }
        for c in &checks {
            assert!(!c.found.is_empty(), "{c:?}");
            assert!(c.status != Status::Warn || !c.hint.is_empty(), "{c:?}");
        }
    }

    #[test]
    fn a_folder_that_is_not_there_is_reported() {
        assert_eq!(disk(Path::new("/no/such/folder")).status, Status::Missing);
    }
}
