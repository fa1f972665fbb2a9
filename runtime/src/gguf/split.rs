//! Models split over several files, as made by `llama-gguf-split`.
//!
//! Files are called `NAME-00001-of-00003.gguf`; each has `split.no` (from 0) and `split.count`, the first also all other metadata,
//! and `split.tensors.count` is the number of tensors in all. Source: `tools/gguf-split` and `llama-model-loader` of llama.cpp.

use super::header::Header;
use crate::error::{Result, RuntimeError};
use std::path::{Path, PathBuf};

const NO_KEY: &str = "split.no";
const COUNT_KEY: &str = "split.count";
const TENSORS_KEY: &str = "split.tensors.count";

/// The parts of a file name that follows the scheme.
#[derive(Debug, PartialEq, Eq)]
struct SplitName<'a> {
    prefix: &'a str,
    /// From 1.
    number: u64,
    count: u64,
}

impl<'a> SplitName<'a> {
    fn of(path: &'a Path) -> Option<Self> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let digits = |s: &str| if s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit()) { s.parse().ok() } else { None };
        Some(Self { prefix, number: digits(number)?, count: digits(count)? })
    }

    fn path_of(&self, path: &Path, number: u64) -> PathBuf {
        path.with_file_name(format!("{}-{number:05}-of-{:05}.gguf", self.prefix, self.count))
    }
}

/// Paths of the other parts of the model whose first part is `path`; none when it is one file.
pub(super) fn other_parts(path: &Path, header: &Header) -> Result<Vec<PathBuf>> {
    let count = header.metadata.opt_u64(COUNT_KEY)?.unwrap_or(1);
    let index = header.metadata.opt_u64(NO_KEY)?.unwrap_or(0);
    let name = SplitName::of(path);
    if index >= count {
        return Err(RuntimeError::bad_file(
            path,
            format!("{NO_KEY} {index} of {COUNT_KEY} {count}"),
            "a number below the count",
            "the file is damaged, or its converter is at fault",
        ));
    }
    if index > 0 {
        let first = name.map_or_else(|| "the first part".to_string(), |n| n.path_of(path, 1).display().to_string());
        return Err(RuntimeError::bad_file(
            path,
            format!("part {} of a model of {count} parts", index + 1),
            "part 1",
            format!("give {first} instead; the others are found from it"),
        ));
    }
    match name {
        Some(name) if name.count != count || name.number != 1 => Err(RuntimeError::bad_file(
            path,
            format!("part {} of {} by its name, part 1 of {count} by its metadata", name.number, name.count),
            "name and metadata that agree",
            "give the file its original name back, or download it again",
        )),
        None if count > 1 => Err(RuntimeError::bad_file(
            path,
            format!("part 1 of a model of {count} parts"),
            format!("a name that ends in -00001-of-{count:05}.gguf, by which the others are found"),
            "give the files their original names back",
        )),
        Some(name) => {
            let paths: Vec<_> = (2..=count).map(|number| name.path_of(path, number)).collect();
            check_present(path, &paths, count)?;
            Ok(paths)
        }
        None => Ok(Vec::new()),
    }
}

fn check_present(first: &Path, others: &[PathBuf], count: u64) -> Result<()> {
    let missing: Vec<_> = others.iter().filter(|p| !p.exists()).collect();
    let Some(example) = missing.first() else { return Ok(()) };
    Err(RuntimeError::bad_file(
        first,
        format!("part 1 of {count} without {} of the others (first: {})", missing.len(), example.display()),
        format!("all {count} parts in one folder"),
        "download the missing parts",
    ))
}

/// Checks that the file at `path` is the part `index` (from 0) of `count`.
pub(super) fn check_part(path: &Path, header: &Header, index: u64, count: u64) -> Result<()> {
    let (found_index, found_count) = (header.metadata.get_u64(NO_KEY)?, header.metadata.get_u64(COUNT_KEY)?);
    if (found_index, found_count) == (index, count) {
        return Ok(());
    }
    Err(RuntimeError::bad_file(
        path,
        format!("{NO_KEY} {found_index} and {COUNT_KEY} {found_count}"),
        format!("{NO_KEY} {index} and {COUNT_KEY} {count}"),
        "the parts are not of one model: download them again",
    ))
}

/// Checks the number of tensors of all parts together against what part 1 announces.
pub(super) fn check_total(path: &Path, first: &Header, found: usize) -> Result<()> {
    let announced = first.metadata.get_u64(TENSORS_KEY)?;
    if announced == found as u64 {
        return Ok(());
    }
    Err(RuntimeError::bad_file(
        path,
        format!("{found} tensors in all parts together"),
        format!("{announced}, as {TENSORS_KEY} says"),
        "the parts are not of one model: download them again",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart_and_put_together() {
        let path = Path::new("some/dir/model-q4-of-me-00002-of-00013.gguf");
        let name = SplitName::of(path).unwrap();
        assert_eq!(name, SplitName { prefix: "model-q4-of-me", number: 2, count: 13 });
        assert_eq!(name.path_of(path, 1), Path::new("some/dir/model-q4-of-me-00001-of-00013.gguf"));
        for other in ["model.gguf", "m-1-of-3.gguf", "m-00001-of-00003.bin", "m-00001-of-0000x.gguf", "m-+0001-of-00003.gguf"] {
            assert_eq!(SplitName::of(Path::new(other)), None, "{other}");
        }
    }
}
