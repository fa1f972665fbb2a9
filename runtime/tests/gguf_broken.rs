//! Broken, truncated and hostile GGUF files: each gives one clear message, none a panic.

mod gguf_raw;

use gguf_raw::*;
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use tierwise_runtime::gguf::Gguf;

/// A good file changed by `change`.
fn with(change: impl FnOnce(&mut Raw)) -> Vec<u8> {
    let mut raw = Raw::good();
    change(&mut raw);
    raw.bytes()
}

/// A good file with one more metadata entry.
fn with_entry(bytes: Vec<u8>) -> Vec<u8> {
    with(|raw| raw.entries.push(bytes))
}

/// A good file whose second tensor is another.
fn with_tensor(bytes: Vec<u8>) -> Vec<u8> {
    with(|raw| raw.tensors[1] = bytes)
}

/// A good file cut after `keep` bytes.
fn cut(keep: usize) -> Vec<u8> {
    Raw::good().bytes()[..keep].to_vec()
}

/// Arrays in arrays, `depth` deep.
fn nested(depth: usize) -> Vec<u8> {
    [array(ARRAY, 1, &[]).repeat(depth - 1), array(U8, 0, &[])].concat()
}

/// Name, bytes, and what the message must say.
fn broken_files() -> Vec<(&'static str, Vec<u8>, Vec<&'static str>)> {
    let header = Raw::good().header().len();
    let whole = Raw::good().bytes().len();
    // Key, value type, element type and length are whole, of the first token 4 bytes of its length.
    let tokens = Raw::good().bytes().windows(11).position(|w| w == b"test.tokens").unwrap() + 11 + 4 + 4 + 8 + 4;
    let swapped = |v: u32| v.to_be_bytes().to_vec();
    vec![
        // What is not a GGUF file at all.
        ("empty", vec![], vec!["an empty file", "repeat"]),
        ("three bytes", b"GGU".to_vec(), vec!["a file of 3 bytes", "truncated"]),
        ("bad magic", with(|r| r.magic = b"GGUX".to_vec()), vec!["[47, 47, 55, 58]", "\"GGUF\"", "not a model"]),
        ("web page", b"\n<!DOCTYPE html><html><body>404".to_vec(), vec!["a web page", "download link"]),
        ("web page, bare", b"<html><head>".to_vec(), vec!["a web page"]),
        (
            "git-lfs pointer",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n".to_vec(),
            vec!["a git-lfs pointer", "git lfs pull"],
        ),
        ("safetensors", b"\x40\0\0\0\0\0\0\0{\"a\":{}}".to_vec(), vec!["safetensors", "convert"]),
        ("zip", b"PK\x03\x04rest".to_vec(), vec!["a zip archive"]),
        ("old ggml", b"tjgg\x03\0\0\0".to_vec(), vec!["before GGUF", "convert"]),
        ("zeros", vec![0; 4096], vec!["zeros", "repeat"]),
        ("reversed magic", with(|r| r.magic = b"FUGG".to_vec()), vec!["other byte order"]),
        // Versions.
        ("version 1", with(|r| r.version = 1u32.to_le_bytes().to_vec()), vec!["GGUF version 1 ", "convert"]),
        ("version 0", with(|r| r.version = vec![0; 4]), vec!["GGUF version 0 ", "2 or 3"]),
        ("version 99", with(|r| r.version = 99u32.to_le_bytes().to_vec()), vec!["GGUF version 99 ", "update"]),
        ("big-endian", with(|r| r.version = swapped(3)), vec!["big-endian", "version 3", "little-endian"]),
        // Cut in each section.
        ("cut in the version", cut(6), vec!["version of 4 bytes at byte 4", "only 2 bytes left", "at least 2 bytes more"]),
        ("cut in the tensor count", cut(10), vec!["number of tensors of 8 bytes at byte 8", "truncated"]),
        ("cut in the entry count", cut(20), vec!["number of metadata entries of 8 bytes at byte 16", "truncated"]),
        ("cut in the first key", cut(40), vec!["7 metadata entries at byte 24", "truncated"]),
        ("cut in a string array", cut(tokens), vec!["3 array elements of type string", "(\"test.tokens\")", "download it again"]),
        ("cut in the tensor table", cut(header - 3), vec!["tensor offset of 8 bytes", "\"c.weight\"", "at least 3 bytes more"]),
        ("cut before the data", cut(header), vec!["ends in tensor \"a.weight\"", "bytes are missing"]),
        ("cut in the data", cut(whole - 100), vec!["ends in tensor \"c.weight\"", "100 bytes are missing", "download it again"]),
        ("cut by one byte", cut(whole - 1), vec!["1 bytes are missing"]),
        // Counts and lengths that lie.
        ("tensor count 2^64 - 1", with(|r| r.num_tensors = Some(u64::MAX)), vec!["18446744073709551615 tensors", "at most"]),
        ("tensor count one too high", with(|r| r.num_tensors = Some(4)), vec!["at byte"]),
        ("entry count 2^63", with(|r| r.num_entries = Some(1 << 63)), vec!["9223372036854775808 metadata entries", "at most"]),
        (
            "entry count of a big file",
            with(|r| {
                r.num_entries = Some(70_000);
                r.data = vec![0; 1_000_000];
            }),
            vec!["70000 metadata entries", "at most 65536"],
        ),
        (
            "key length 2^64 - 1",
            with_entry([&u64::MAX.to_le_bytes()[..], b"x"].concat()),
            vec!["metadata key of 18446744073709551615 bytes", "left"],
        ),
        (
            "string length 2^40",
            with_entry(entry("x", STRING, &(1u64 << 40).to_le_bytes())),
            vec!["string of 1099511627776 bytes", "\"x\"", "left"],
        ),
        (
            "array length 2^62",
            with_entry(entry("x", ARRAY, &array(F32, 1 << 62, &[]))),
            vec!["4611686018427387904 array elements of type f32", "\"x\""],
        ),
        (
            "string array length 2^61",
            with_entry(entry("x", ARRAY, &array(STRING, 1 << 61, &[]))),
            vec!["2305843009213693952 array elements of type string", "\"x\""],
        ),
        (
            "bool array length 2^40",
            with_entry(entry("x", ARRAY, &array(BOOL, 1 << 40, &[]))),
            vec!["array of booleans of 1099511627776"],
        ),
        (
            "array of arrays 2^60",
            with_entry(entry("x", ARRAY, &array(ARRAY, 1 << 60, &[]))),
            vec!["elements of type array", "\"x\""],
        ),
        // Values.
        ("nesting 5 deep", with_entry(entry("x", ARRAY, &nested(5))), vec!["nested more than 4 deep", "\"x\""]),
        ("nesting bomb", with_entry(entry("x", ARRAY, &nested(100_000))), vec!["nested more than 4 deep"]),
        ("value type 13", with_entry(entry("x", 13, &[0; 8])), vec!["metadata value type 13", "\"x\"", "0 to 12"]),
        ("element type 99", with_entry(entry("x", ARRAY, &array(99, 1, &[0; 8]))), vec!["metadata value type 99"]),
        ("boolean 2", with_entry(entry("x", BOOL, &[2])), vec!["a boolean of value 2", "\"x\"", "0 or 1"]),
        ("boolean 255 in an array", with_entry(entry("x", ARRAY, &array(BOOL, 2, &[1, 255]))), vec!["a boolean of value 255"]),
        ("duplicate key", with(|r| r.entries.push(r.entries[1].clone())), vec!["\"test.block_count\" twice"]),
        ("empty key", with_entry(entry("", U8, &[0])), vec!["metadata key \"\" of 0 bytes"]),
        (
            "control character in a key",
            with_entry(entry("a\u{1b}[31m", U8, &[0])),
            vec!["metadata key \"a\\u{1b}[31m\"", "control"],
        ),
        (
            "key that is not UTF-8",
            with_entry([string(b"ab\xff"), vec![0; 5]].concat()),
            vec!["metadata key", "not UTF-8 from its byte 2"],
        ),
        (
            "string that is not UTF-8",
            with_entry(entry("x", ARRAY, &array(STRING, 1, &string(b"\xc3\x28")))),
            vec!["string in an array", "\"x\"", "not UTF-8 from its byte 0"],
        ),
        ("alignment 0", with_entry(entry("general.alignment", U32, &[0; 4])), vec!["general.alignment 0,", "a power of two"]),
        ("alignment 24", with_entry(entry("general.alignment", U32, &24u32.to_le_bytes())), vec!["general.alignment 24,"]),
        ("alignment 4", with_entry(entry("general.alignment", U32, &4u32.to_le_bytes())), vec!["general.alignment 4,"]),
        (
            "alignment 2^63",
            with_entry(entry("general.alignment", U64, &(1u64 << 63).to_le_bytes())),
            vec!["general.alignment 92233"],
        ),
        (
            "alignment of type string",
            with_entry(entry("general.alignment", STRING, &string(b"32"))),
            vec!["string \"32\"", "integer"],
        ),
        // Tensors.
        ("unread format", with_tensor(tensor(b"t", &[256], 16, 32)), vec!["IQ2_XXS (ggml type 16)", "\"t\"", "Q4_K"]),
        ("unknown format", with_tensor(tensor(b"t", &[256], 77, 32)), vec!["ggml type 77", "\"t\""]),
        ("removed format", with_tensor(tensor(b"t", &[256], 4, 32)), vec!["ggml type 4", "\"t\""]),
        (
            "row of half a block",
            with_tensor(tensor(b"t", &[48, 2], 2, 32)),
            vec!["Q4_0 with rows of 48 elements", "multiple of 32"],
        ),
        (
            "row of half a superblock",
            with_tensor(tensor(b"t", &[128, 4], 12, 32)),
            vec!["Q4_K with rows of 128", "multiple of 256"],
        ),
        ("no dimensions", with_tensor(tensor(b"t", &[], 0, 32)), vec!["a tensor of 0 dimensions", "1 to 4"]),
        ("five dimensions", with_tensor(tensor(b"t", &[1; 5], 0, 32)), vec!["a tensor of 5 dimensions", "1 to 4"]),
        ("2^32 - 1 dimensions", with_tensor([string(b"t"), vec![255; 4]].concat()), vec!["4294967295 dimensions"]),
        ("dimension 0", with_tensor(tensor(b"t", &[32, 0], 0, 32)), vec!["shape [0, 32]", "no dimension of 0"]),
        ("shape overflow", with_tensor(tensor(b"t", &[1 << 32, 1 << 32], 0, 32)), vec!["shape [4294967296, 4294967296]", "2^63"]),
        ("elements above 2^63", with_tensor(tensor(b"t", &[1 << 62, 2], 0, 32)), vec!["below 2^63"]),
        ("bytes overflow", with_tensor(tensor(b"t", &[1 << 62], 0, 32)), vec!["less than 2^64 bytes"]),
        ("zero hides overflow", with_tensor(tensor(b"t", &[1 << 63, 1 << 63, 0], 0, 32)), vec!["no dimension of 0"]),
        (
            "duplicate tensor",
            with_tensor(tensor(b"a.weight", &[3, 2], 0, 32)),
            vec!["second tensor of the same name", "\"a.weight\""],
        ),
        ("empty tensor name", with_tensor(tensor(b"", &[3], 0, 32)), vec!["tensor name \"\" of 0 bytes"]),
        ("tensor name that is not UTF-8", with_tensor(tensor(b"\xff\xfe", &[3], 0, 32)), vec!["tensor name", "not UTF-8"]),
        ("unaligned offset", with_tensor(tensor(b"t", &[3], 0, 33)), vec!["\"t\" at data offset 33", "alignment 32"]),
        ("offset past the end", with_tensor(tensor(b"t", &[3], 0, 1 << 30)), vec!["\"t\" at bytes", "inside the file"]),
        (
            "offset + start overflow",
            with_tensor(tensor(b"t", &[3], 0, u64::MAX - 31)),
            vec!["\"t\" at data offset", "below 2^64"],
        ),
        ("overlapping tensors", with_tensor(tensor(b"t", &[3], 0, 0)), vec!["tensor \"t\"", "overlap"]),
        ("overlap by one block", with_tensor(tensor(b"t", &[32], 0, 32)), vec!["tensor \"t\"", "\"c.weight\"", "overlap"]),
    ]
}

#[test]
fn every_broken_file_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let files = broken_files();
    assert!(files.len() >= 30);
    for (name, bytes, reasons) in files {
        let path = folder.path().join(format!("{name}.gguf"));
        std::fs::write(&path, &bytes).unwrap();
        let message = match Gguf::open(&path) {
            Ok(_) => panic!("{name}: opened"),
            Err(e) => e.to_string(),
        };
        assert!(message.contains(&path.display().to_string()), "{name}: no path in: {message}");
        assert!(message.contains("expected"), "{name}: nothing expected in: {message}");
        assert!(message.len() < 700, "{name}: long message: {message}");
        for reason in reasons {
            assert!(message.contains(reason), "{name}: no {reason:?} in: {message}");
        }
        // The path without IO says the same.
        assert_eq!(Gguf::parse(&bytes, &path).map(|_| ()).unwrap_err().to_string(), message, "{name}");
    }
}

#[test]
fn what_is_not_a_file_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.gguf");
    for (path, reason) in [(folder.path(), "found a folder"), (&missing, "cannot open"), (Path::new("/dev/null"), "special file")]
    {
        let message = Gguf::open(path).unwrap_err().to_string();
        assert!(message.contains(&path.display().to_string()) && message.contains(reason), "{message}");
    }
}

/// A file that is really as long as its false length says (a sparse one costs nothing) must not make us take memory for it.
#[test]
fn a_huge_header_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("huge.gguf");
    for (type_id, count) in [(U8, 1u64 << 31), (U64, 1 << 28), (STRING, 1 << 28)] {
        let header = with(|raw| {
            raw.entries.push(entry("x", ARRAY, &array(type_id, count, &[])));
            raw.tensors.clear();
            raw.data.clear();
        });
        std::fs::write(&path, &header).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(4 << 30).unwrap();
        let message = Gguf::open(&path).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("\"x\"") && message.contains("within the first 134217728 bytes"), "{message}");
    }
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let good = Raw::good().bytes();
    Gguf::parse(&good, Path::new("good.gguf")).unwrap();
    for keep in 0..good.len() {
        let error = Gguf::parse(&good[..keep], Path::new("cut.gguf")).map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("cut.gguf: found "), "{keep}: {error}");
    }
}

/// Every value of every byte of the header: either an error or a header whose tensors lie inside the file.
#[test]
fn any_changed_header_byte_is_safe() {
    let good = Raw::good().bytes();
    let header = Raw::good().header().len();
    let mut refused = 0;
    for at in 0..header {
        let mut bytes = good.clone();
        for value in 0..=255 {
            bytes[at] = value;
            refused += usize::from(!is_safe_or_refused(&bytes));
        }
    }
    assert!(refused > header * 100, "most changes must be noticed, {refused} of {} were", header * 256);
}

/// False when refused; panics when accepted with a tensor that does not lie in the file.
fn is_safe_or_refused(bytes: &[u8]) -> bool {
    let Ok(header) = Gguf::parse(bytes, Path::new("changed.gguf")) else { return false };
    let mut ends: Vec<_> = header.tensors.iter().map(|t| (t.offset, t.offset.checked_add(t.bytes).unwrap())).collect();
    ends.sort_unstable();
    assert!(ends.iter().all(|(start, end)| *start >= header.data_start && *end <= bytes.len() as u64 && start < end));
    assert!(ends.windows(2).all(|w| w[0].1 <= w[1].0));
    assert!(
        header.tensors.iter().all(|t| t.offset % header.alignment == 0 && t.format.tensor_bytes(&t.shape).unwrap().0 == t.bytes)
    );
    true
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = Raw::good().bytes();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        is_safe_or_refused(&bytes);
    }

    #[test]
    fn changed_words_never_panic(
        at in any::<prop::sample::Index>(),
        value in prop_oneof![Just(0u64), Just(1), Just(u64::MAX), Just(i64::MAX as u64), Just(1 << 32), any::<u64>()],
        keep in any::<prop::sample::Index>(),
    ) {
        let mut bytes = Raw::good().bytes();
        let at = at.index(bytes.len() - 8);
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        is_safe_or_refused(&bytes);
        is_safe_or_refused(&bytes[..keep.index(bytes.len())]);
    }

    #[test]
    fn noise_after_the_magic_never_panics(noise in prop::collection::vec(any::<u8>(), 0..300)) {
        let bytes = [b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".to_vec(), noise].concat();
        is_safe_or_refused(&bytes);
    }
}

/// Makes the small files that fuzzing starts from.
fn write_fuzz_seeds(folder: &Path) {
    let alignment = entry("general.alignment", U32, &64u32.to_le_bytes());
    let split =
        [("split.no", 0u32), ("split.count", 3), ("split.tensors.count", 9)].map(|(k, v)| entry(k, U32, &v.to_le_bytes()));
    let good = [
        ("v3", Raw::good()),
        ("v2", Raw { version: 2u32.to_le_bytes().to_vec(), ..Raw::good() }),
        ("empty", Raw { entries: vec![], tensors: vec![], data: vec![], ..Raw::good() }),
        ("vocabulary", Raw { tensors: vec![], data: vec![], ..Raw::good() }),
        ("split", Raw { entries: split.to_vec(), ..Raw::good() }),
        (
            "alignment-64",
            Raw { alignment: 64, entries: vec![alignment], tensors: vec![tensor(b"t", &[32, 1, 1, 2], 8, 64)], ..Raw::good() },
        ),
    ];
    let broken = broken_files().into_iter().filter(|(_, bytes, _)| (24..2000).contains(&bytes.len()));
    let files = good.into_iter().map(|(name, raw)| (format!("ok-{name}"), raw.bytes()));
    // Every fifth of the broken ones is variety enough; the fuzzer finds the way to the others.
    let files = files.chain(
        broken
            .step_by(5)
            .map(|(name, bytes, _)| (format!("bad-{}", name.replace(|c: char| !c.is_ascii_alphanumeric(), "-")), bytes)),
    );
    for (name, bytes) in files {
        std::fs::write(folder.join(format!("{name}.gguf")), bytes).unwrap();
    }
}

/// The files that fuzzing starts from, and those it once found: `ok-*` must be read, `bad-*` refused. `UPDATE_GOLDEN=1` writes
/// them anew first.
#[test]
fn fuzz_seeds() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/gguf");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        write_fuzz_seeds(&folder);
    }
    let mut counts = [0, 0];
    for file in std::fs::read_dir(&folder).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let read = is_safe_or_refused(&std::fs::read(&path).unwrap());
        let ok = name.starts_with("ok-");
        assert!(ok || name.starts_with("bad-"), "{name}");
        assert_eq!(read, ok, "{name}: {:?}", Gguf::open(&path).map(|_| ()));
        counts[usize::from(ok)] += 1;
    }
    assert!(counts[0] >= 10 && counts[1] >= 6, "{counts:?} seeds");
}
