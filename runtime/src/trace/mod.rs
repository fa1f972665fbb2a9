//! Routing traces from files: `NAME.meta.json` and, beside it, `NAME.ids.u8`.
//!
//! What the files mean and how they are checked is [`tierwise_planner::routing`]'s business; here they are found and read, and errors
//! get their paths.

use crate::error::{Result, RuntimeError};
use std::path::{Path, PathBuf};
use tierwise_planner::PlanError;
use tierwise_planner::routing::{CountsTable, RoutingTrace};

/// End of a description's name.
const META: &str = ".meta.json";
/// End of the name of the file with the choices.
const IDS: &str = ".ids.u8";

/// Reads the trace with the description `meta`.
///
/// # Errors
/// [`RuntimeError::Io`], or [`RuntimeError::BadFile`] with the file that is to blame.
pub fn read_routing(meta: &Path) -> Result<RoutingTrace> {
    let ids = ids_file(meta)?;
    let text = std::fs::read_to_string(meta).map_err(|e| RuntimeError::io("read", meta, e))?;
    let bytes = std::fs::read(&ids).map_err(|e| RuntimeError::io("read", &ids, e))?;
    RoutingTrace::new(&text, bytes).map_err(|e| bad(meta, &ids, e))
}

/// Reads a table of expert counts.
///
/// # Errors
/// [`RuntimeError::Io`], [`RuntimeError::BadFile`].
pub fn read_counts(path: &Path) -> Result<CountsTable> {
    let text = std::fs::read_to_string(path).map_err(|e| RuntimeError::io("read", path, e))?;
    CountsTable::from_json(&text).map_err(|e| bad(path, path, e))
}

/// The file with the choices beside a description.
fn ids_file(meta: &Path) -> Result<PathBuf> {
    let name = meta.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    match name.strip_suffix(META) {
        Some(stem) if !stem.is_empty() => Ok(meta.with_file_name(format!("{stem}{IDS}"))),
        _ => Err(RuntimeError::bad_file(
            meta,
            format!("the name {name:?}"),
            format!("NAME{META}"),
            format!("give the description of the trace; NAME{IDS} is looked for beside it"),
        )),
    }
}

/// The planner's complaint with the path: of the choices when it is about them, else of the description.
fn bad(meta: &Path, ids: &Path, error: PlanError) -> RuntimeError {
    match error {
        PlanError::BadTrace { field, found, expected } => {
            let about_ids = ["the number of ids", "the expert of", "the choice of"].iter().any(|f| field.starts_with(f));
            let path = if about_ids { ids } else { meta };
            RuntimeError::bad_file(path, format!("{field}: {found}"), expected, "")
        }
        other => RuntimeError::bad_file(meta, other.to_string(), "a routing trace", ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../planner/tests/data").join(name)
    }

    #[test]
    fn a_trace_is_two_files() {
        let trace = read_routing(&fixture("gptoss20b_11seq.meta.json")).expect("a committed trace");
        assert_eq!((trace.num_tokens(), trace.num_moe_layers, trace.num_experts, trace.experts_per_token), (986, 24, 32, 4));
    }

    #[test]
    fn errors_name_the_file_to_blame() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let meta = dir.path().join("cut.meta.json");
        std::fs::copy(fixture("gptoss20b_11seq.meta.json"), &meta).expect("writable");
        let message = |path: &Path| read_routing(path).expect_err("not a trace").to_string();
        assert!(message(&meta).contains("cannot read") && message(&meta).contains("cut.ids.u8"));
        std::fs::write(dir.path().join("cut.ids.u8"), [0; 10]).expect("writable");
        assert!(message(&meta).contains("cut.ids.u8: found the number of ids: 10"), "{}", message(&meta));
        std::fs::write(&meta, "{}").expect("writable");
        assert!(message(&meta).contains("cut.meta.json: found the description"), "{}", message(&meta));
        assert!(message(&fixture("gptoss20b_11seq.ids.u8")).contains("expected NAME.meta.json"));
    }

    #[test]
    fn tables_of_counts_that_are_lent_can_be_read() {
        let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
        for (file, layers, experts) in [
            ("counts/glm52_counts.json", 75, 256),
            ("counts/gptoss20b.counts.json", 24, 32),
            ("routing/dsv2lite.counts.json", 26, 64),
        ] {
            let path = shared.join(file);
            if !path.is_file() {
                println!("skipped: no {file} in ../shared/data beside the workspace");
                continue;
            }
            let table = read_counts(&path).expect("a good table");
            assert_eq!((table.num_moe_layers, table.num_experts), (layers, experts));
            let shares = table.shares(None).expect("all groups");
            assert!(shares.iter().all(|s| (s.iter().sum::<f64>() - 1.0).abs() < 1e-9));
        }
    }
}
