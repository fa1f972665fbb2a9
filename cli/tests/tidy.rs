//! House rules that the compiler does not check. See CONTRIBUTING.md.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_path_buf()
}

/// All Rust sources of the workspace, as (path relative to the root, text).
fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).expect("source folders are readable") {
            let path = entry.expect("source folders are readable").path();
            if path.is_dir() && !path.ends_with("target") {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push(path);
            }
        }
    }
    let root = root();
    let mut paths = Vec::new();
    for member in ["cost-models", "planner", "shaders", "runtime", "cli"] {
        walk(&root.join(member), &mut paths);
    }
    paths.sort();
    paths
        .into_iter()
        .map(|p| {
            let relative = p.strip_prefix(&root).expect("walked from the root").to_string_lossy().replace('\\', "/");
            (relative, std::fs::read_to_string(&p).expect("sources are UTF-8"))
        })
        .collect()
}

#[test]
fn every_file_says_what_it_is_for() {
    let silent: Vec<_> = sources().into_iter().filter(|(_, text)| !text.starts_with("//!")).map(|(p, _)| p).collect();
    assert!(silent.is_empty(), "files that do not start with a `//!` line: {silent:?}");
}

#[test]
fn the_sans_io_crates_have_no_clock_file_or_thread() {
    const BANNED: &[&str] = &["Instant::now", "SystemTime", "std::thread", "std::fs", "std::net", "std::env::var"];
    for (path, text) in sources() {
        let sans_io = ["cost-models/src/", "planner/src/"].iter().any(|c| path.starts_with(c)) && !path.ends_with("tests.rs");
        // In-file tests may read configs; everything before them may not.
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for banned in BANNED {
            assert!(!(sans_io && code.contains(banned)), "{path} uses {banned}");
        }
    }
}

#[test]
fn unsafe_code_stays_in_the_listed_files() {
    const LISTED: &[&str] = &[
        "runtime/src/kernels/",
        "runtime/src/gguf/map.rs",
        "runtime/src/backend/cuda/",
        "runtime/src/exec/loader/uring.rs",
        "runtime/src/memory/numa.rs",
    ];
    for (path, text) in sources() {
        let has_unsafe = text.lines().any(|l| {
            let code = l.split("//").next().unwrap_or_default();
            code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")
        });
        let allowed = LISTED.iter().any(|l| path.starts_with(l)) || path == "cli/tests/tidy.rs";
        assert!(!has_unsafe || allowed, "{path} contains unsafe code; the listed places are {LISTED:?}");
    }
}
