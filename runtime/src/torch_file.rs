//! Writes the one PyTorch file that other engines want from a plan: `{"logical_count": int64 [1, layers, experts]}`.
//!
//! A `.pt` file is an uncompressed zip archive of a pickle and of raw numbers (PyTorch's serialization notes; zip form since 1.6). The pickle holds
//! only what `torch.load(weights_only=True)` admits: a dictionary and `torch._utils._rebuild_tensor_v2` on a storage. It is read back by
//! [`crate::trace`]'s reader, which runs nothing.

use crate::atomic_file::write_atomic;
use crate::error::{Result, RuntimeError};
use std::io::{Cursor, Write};
use std::path::Path;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// Writes counts (`[layers][experts]`) as a file that SGLang reads with `--init-expert-location`; returns its size.
///
/// # Errors
/// [`RuntimeError::BadRequest`] when the counts are not as many as the shape says, [`RuntimeError::Io`].
pub fn write_logical_count(path: &Path, layers: usize, experts: usize, counts: &[i64]) -> Result<u64> {
    if layers.checked_mul(experts) != Some(counts.len()) || counts.is_empty() || i32::try_from(counts.len()).is_err() {
        return Err(RuntimeError::BadRequest {
            what: "counts for a .pt file",
            found: counts.len().to_string(),
            expected: format!("{layers} x {experts}, below 2^31"),
        });
    }
    let bytes =
        archive(layers as i32, experts as i32, counts).map_err(|e| RuntimeError::io("write", path, std::io::Error::other(e)))?;
    write_atomic(path, &bytes)?;
    Ok(bytes.len() as u64)
}

fn archive(layers: i32, experts: i32, counts: &[i64]) -> zip::result::ZipResult<Vec<u8>> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let numbers: Vec<u8> = counts.iter().flat_map(|c| c.to_le_bytes()).collect();
    let files: [(&str, &[u8]); 4] = [
        ("logical_count/data.pkl", &program(layers, experts)),
        ("logical_count/byteorder", b"little"),
        ("logical_count/data/0", &numbers),
        ("logical_count/version", b"3\n"),
    ];
    for (name, content) in files {
        zip.start_file(name, options)?;
        zip.write_all(content)?;
    }
    Ok(zip.finish()?.into_inner())
}

/// The pickle, protocol 2: opcodes of CPython's `pickletools`.
fn program(layers: i32, experts: i32) -> Vec<u8> {
    let mut p: Vec<u8> = b"\x80\x02}".to_vec();
    text(&mut p, "logical_count");
    p.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    text(&mut p, "storage");
    p.extend(b"ctorch\nLongStorage\n");
    text(&mut p, "0");
    text(&mut p, "cpu");
    int(&mut p, layers * experts);
    // The persistent id's tuple; offset; sizes; strides; no gradient, no hooks.
    p.extend(b"tQ");
    int(&mut p, 0);
    for row in [[1, layers, experts], [layers * experts, experts, 1]] {
        p.push(b'(');
        row.iter().for_each(|n| int(&mut p, *n));
        p.push(b't');
    }
    p.extend(b"\x89ccollections\nOrderedDict\n)RtRs.");
    p
}

fn text(p: &mut Vec<u8>, s: &str) {
    p.push(b'X');
    p.extend((s.len() as u32).to_le_bytes());
    p.extend(s.as_bytes());
}

fn int(p: &mut Vec<u8>, n: i32) {
    p.push(b'J');
    p.extend(n.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::{Format, ImportOptions, import_routing};
    use tierwise_planner::routing::Imported;

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("counts.pt");
        let counts: Vec<i64> = (0..12).map(|i| i * 1_000_000_007).collect();
        write_logical_count(&path, 3, 4, &counts).expect("written");
        let import = import_routing(&path, Some(Format::Sglang), &ImportOptions::default()).expect("read back");
        let Imported::Counts(table) = import.routing else { panic!("counts were written") };
        let back: Vec<i64> = table.counts(None).expect("one group").concat().into_iter().map(|c| c as i64).collect();
        assert_eq!(back, counts);
        for (layers, experts) in [(0, 4), (3, 5), (usize::MAX, 2)] {
            let error = write_logical_count(&path, layers, experts, &counts).expect_err("a wrong shape").to_string();
            assert!(error.contains("counts for a .pt file"), "{error}");
        }
    }
}
