//! Lists the models, machines, workloads and studies of `configs/`, so that their texts are part of the binary: an installed `tierwise`
//! knows them without a copy of the repository.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn main() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    println!("cargo::rerun-if-changed=build.rs");
    let mut code = String::new();
    let kinds = [
        ("MODELS", "models", "toml"),
        ("MACHINES", "machines", "toml"),
        ("WORKLOADS", "workloads", "toml"),
        ("STUDIES", "studies", "toml"),
        ("ARRIVALS", "studies/data", "csv"),
    ];
    for (constant, folder, extension) in kinds {
        let folder = configs.join(folder);
        // A path that does not exist would make every build run this again; its parent changes when it appears.
        let watched = if folder.is_dir() { &folder } else { &configs };
        println!("cargo::rerun-if-changed={}", watched.display());
        writeln!(code, "static {constant}: &[(&str, &str)] = &[").expect("writing to a string");
        for path in files(&folder, extension) {
            let stem = path.file_stem().expect("a file has a name").to_string_lossy();
            writeln!(code, "    ({stem:?}, include_str!({path:?})),").expect("writing to a string");
        }
        code.push_str("];\n");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("configs.rs");
    std::fs::write(&out, code).unwrap_or_else(|e| panic!("cannot write {}: {e}", out.display()));
}

/// The files of a folder with this extension, by name; none when the folder is absent.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<PathBuf> =
        entries.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| p.extension().is_some_and(|x| x == extension)).collect();
    files.sort();
    files
}
