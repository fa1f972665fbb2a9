//! Reading good files: made by hand, by our writer, by llama.cpp's tools; split models; round trips of every type.

mod gguf_raw;

use gguf_raw::Raw;
use std::path::{Path, PathBuf};
use tierwise_cost::quant::QuantFormat;
use tierwise_runtime::gguf::{Array, Gguf, GgufWriter, Value};

fn open_bytes(bytes: &[u8]) -> (tempfile::TempDir, Gguf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    (folder, gguf)
}

#[test]
fn a_file_made_by_hand_is_read() {
    for version in [2u32, 3] {
        let raw = Raw { version: version.to_le_bytes().to_vec(), ..Raw::good() };
        let bytes = raw.bytes();
        let (_folder, gguf) = open_bytes(&bytes);
        assert_eq!((gguf.version(), gguf.alignment(), gguf.total_bytes()), (version, 32, bytes.len() as u64));
        let m = gguf.metadata();
        assert_eq!(m.get_str("general.architecture").unwrap(), "test");
        assert_eq!(m.get_u64("test.block_count").unwrap(), 2);
        assert_eq!(m.get_u64("test.big").unwrap(), 1 << 40);
        assert_eq!(m.get_str_array("test.tokens").unwrap(), ["a", "bc", "中"]);
        assert_eq!(m.get("test.nested"), Some(&Value::Array(Array::Array(vec![Array::U8(vec![1, 2]), Array::U8(vec![])]))));

        let summary: Vec<_> = gguf.tensors().iter().map(|t| (t.name.as_str(), t.shape.clone(), t.format, t.bytes)).collect();
        assert_eq!(
            summary,
            [
                ("a.weight", vec![2, 3], QuantFormat::F32, 24),
                ("b.weight", vec![2, 32], QuantFormat::Q4_0, 36),
                ("c.weight", vec![256], QuantFormat::Q4_K, 144),
            ]
        );
        assert_eq!(gguf.tensor_bytes(), 24 + 36 + 144);
        let b = gguf.require_tensor("b.weight").unwrap();
        assert_eq!(gguf.data(b), (32..68).collect::<Vec<u8>>(), "the data section holds its own offsets");
        let (path, offset) = gguf.location(b);
        assert_eq!(&std::fs::read(path).unwrap()[offset as usize..][..36], gguf.data(b));
        let message = gguf.require_tensor("d.weight").unwrap_err().to_string();
        assert!(message.contains("model.gguf") && message.contains("\"d.weight\""), "{message}");
    }
}

/// One value of each type, edge values among them.
fn every_value() -> Vec<(&'static str, Value)> {
    let strings = vec![String::new(), "a\nb".to_string(), "🦀".repeat(1000)];
    let nested = Array::Array(vec![Array::Array(vec![]), Array::String(strings.clone()), Array::F64(vec![-0.0])]);
    vec![
        ("u8", Value::U8(u8::MAX)),
        ("i8", Value::I8(i8::MIN)),
        ("u16", Value::U16(u16::MAX)),
        ("i16", Value::I16(i16::MIN)),
        ("u32", Value::U32(u32::MAX)),
        ("i32", Value::I32(i32::MIN)),
        ("u64", Value::U64(u64::MAX)),
        ("i64", Value::I64(i64::MIN)),
        ("f32", Value::F32(f32::MIN_POSITIVE)),
        ("f64", Value::F64(std::f64::consts::PI)),
        ("true", Value::Bool(true)),
        ("false", Value::Bool(false)),
        ("string", Value::from("Ünï, 中文")),
        ("empty string", Value::from("")),
        ("array u8", Value::from(vec![0u8, 255])),
        ("array i8", Value::from(vec![-128i8, 127])),
        ("array u16", Value::from(vec![0u16, 65535])),
        ("array i16", Value::from(vec![-32768i16])),
        ("array u32", Value::from(vec![u32::MAX])),
        ("array i32", Value::from(vec![i32::MIN, 0])),
        ("array u64", Value::from(vec![u64::MAX])),
        ("array i64", Value::from(vec![i64::MIN])),
        ("array f32", Value::from(vec![f32::INFINITY, 1.5])),
        ("array f64", Value::from(vec![f64::MAX])),
        ("array bool", Value::from(vec![true, false])),
        ("array string", Value::from(strings)),
        ("array of arrays", Value::Array(nested)),
        ("empty", Value::from(Vec::<f32>::new())),
    ]
}

#[test]
fn every_type_and_format_survives_writing_and_reading() {
    let folder = tempfile::tempdir().unwrap();
    for alignment in [8, 32, 4096] {
        let path = folder.path().join(format!("all-{alignment}.gguf"));
        let mut writer = GgufWriter::new(&path, alignment).unwrap();
        for (key, value) in every_value() {
            writer.meta(key, value).unwrap();
        }
        let shapes: [&[u64]; 4] = [&[256], &[3, 256], &[2, 3, 512], &[1, 2, 1, 256]];
        for format in QuantFormat::ALL {
            for (i, shape) in shapes.iter().enumerate() {
                writer.tensor(&format!("{format}.{i}"), shape, *format).unwrap();
            }
        }
        let data_of = |name: &str, bytes: u64| -> Vec<u8> {
            let seed = name.bytes().fold(7u8, |h, b| h.wrapping_mul(31).wrapping_add(b));
            (0..bytes).map(|i| (i as u8).wrapping_mul(37).wrapping_add(seed)).collect()
        };
        let mut data = writer.start().unwrap();
        for format in QuantFormat::ALL {
            for (i, shape) in shapes.iter().enumerate() {
                let name = format!("{format}.{i}");
                let bytes = data_of(&name, format.tensor_bytes(shape).unwrap().0);
                // Uneven pieces, an empty one among them.
                for piece in bytes.chunks(100 + 13 * i) {
                    data.write(&name, piece).unwrap();
                }
                assert!(data.write(&name, &[0]).is_err(), "complete");
            }
        }
        assert!(!path.exists(), "only a finished file has its name");
        let written_bytes = data.finish().unwrap();

        let gguf = Gguf::open(&path).unwrap();
        assert_eq!((gguf.version(), gguf.alignment(), gguf.total_bytes()), (3, alignment, written_bytes));
        for (key, value) in every_value() {
            assert_eq!(gguf.metadata().get(key), Some(&value), "{key}");
        }
        assert_eq!(gguf.tensors().len(), QuantFormat::ALL.len() * shapes.len());
        for t in gguf.tensors() {
            assert_eq!(gguf.data(t), data_of(&t.name, t.bytes), "{}", t.name);
            assert_eq!(gguf.data(t).as_ptr() as usize % alignment.min(4096) as usize, 0, "{}", t.name);
        }
    }
}

#[test]
fn the_writer_refuses_what_would_not_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    for alignment in [0, 3, 4, 24, 1 << 20] {
        assert!(GgufWriter::new(&path, alignment).is_err(), "{alignment}");
    }
    let mut writer = GgufWriter::new(&path, 32).unwrap();
    writer.meta("key", 1u32).unwrap();
    assert!(writer.meta("key", 2u32).is_err(), "twice");
    assert!(writer.meta("", 2u32).is_err());
    assert!(writer.meta("general.alignment", 64u32).is_err());
    let deep = (0..4).fold(Array::U8(vec![]), |inner, _| Array::Array(vec![inner]));
    assert!(writer.meta("deep", Value::Array(deep)).is_err());

    writer.tensor("t", &[2, 32], QuantFormat::Q8_0).unwrap();
    assert!(writer.tensor("t", &[2, 32], QuantFormat::Q8_0).is_err(), "twice");
    for shape in [&[][..], &[0], &[33], &[1, 1, 1, 1, 32], &[u64::MAX, 32]] {
        assert!(writer.tensor("u", shape, QuantFormat::Q8_0).is_err(), "{shape:?}");
    }
    // What was refused leaves no trace.
    writer.tensor("u", &[2, 32], QuantFormat::F32).unwrap();
    let mut data = writer.start().unwrap();
    let message = data.write("u", &[0; 4]).unwrap_err().to_string();
    assert!(message.contains("\"u\"") && message.contains("68 bytes more of \"t\""), "{message}");
    assert!(data.write("t", &[0; 69]).is_err(), "too much");
    data.write("t", &[0; 68]).unwrap();
    let message = data.finish().unwrap_err().to_string();
    assert!(message.contains("1 of 2 tensors") && message.contains("256 bytes more of \"u\""), "{message}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "no file, no litter");
}

#[test]
fn an_unwritable_place_is_named() {
    let path = Path::new("/no/such/folder/out.gguf");
    let message = GgufWriter::new(path, 32).unwrap().start().unwrap_err().to_string();
    assert!(message.contains("/no/such/folder/out.gguf"), "{message}");
}

/// Writes a part with the given split metadata and tensors of 8 floats, each filled with its number.
fn write_part(path: &Path, no: Option<u16>, count: u16, total: Option<i32>, tensors: &[u8]) {
    let mut writer = GgufWriter::new(path, 32).unwrap();
    if let Some(no) = no {
        writer.meta("split.no", no).unwrap();
        writer.meta("split.count", count).unwrap();
    }
    if let Some(total) = total {
        writer.meta("split.tensors.count", total).unwrap();
    }
    tensors.iter().for_each(|t| writer.tensor(&format!("t{t}"), &[8], QuantFormat::F32).unwrap());
    let mut data = writer.start().unwrap();
    tensors.iter().for_each(|t| data.write(&format!("t{t}"), &[*t; 32]).unwrap());
    data.finish().unwrap();
}

struct SplitModel {
    _folder: tempfile::TempDir,
    parts: Vec<PathBuf>,
}

/// Three parts; the first, as those of `llama-gguf-split --no-tensor-first-split`, has no tensors.
fn split_model() -> SplitModel {
    let folder = tempfile::tempdir().unwrap();
    let parts: Vec<_> = (1..=3).map(|i| folder.path().join(format!("m-{i:05}-of-00003.gguf"))).collect();
    for (i, tensors) in [&[][..], &[1, 2], &[3]].iter().enumerate() {
        write_part(&parts[i], Some(i as u16), 3, Some(3), tensors);
    }
    SplitModel { _folder: folder, parts }
}

impl SplitModel {
    /// The message when the model is opened by part `i`.
    fn message(&self, i: usize) -> String {
        Gguf::open(&self.parts[i]).map(|_| ()).unwrap_err().to_string()
    }
}

#[test]
fn a_split_model_is_read_as_one() {
    let model = split_model();
    let gguf = Gguf::open(&model.parts[0]).unwrap();
    assert_eq!(gguf.part_paths().collect::<Vec<_>>(), model.parts);
    assert_eq!(gguf.tensors().iter().map(|t| (t.name.as_str(), t.part)).collect::<Vec<_>>(), [("t1", 1), ("t2", 1), ("t3", 2)]);
    for t in gguf.tensors() {
        let number: u8 = t.name[1..].parse().unwrap();
        assert_eq!(gguf.data(t), [number; 32]);
        let (path, offset) = gguf.location(t);
        assert_eq!(path, model.parts[t.part]);
        assert_eq!(std::fs::read(path).unwrap()[offset as usize..][..32], [number; 32]);
    }
    let total: u64 = model.parts.iter().map(|p| std::fs::metadata(p).unwrap().len()).sum();
    assert_eq!(gguf.total_bytes(), total);
}

#[test]
fn broken_split_models_are_explained() {
    let check = |what: &str, message: String, reasons: &[&str]| {
        for reason in reasons {
            assert!(message.contains(reason), "{what}: no {reason:?} in: {message}");
        }
    };
    let model = split_model();
    check("other part", model.message(1), &["part 2 of a model of 3 parts", "m-00001-of-00003.gguf instead"]);

    let model = split_model();
    std::fs::remove_file(&model.parts[1]).unwrap();
    check("missing part", model.message(0), &["m-00002-of-00003.gguf", "without 1 of the others", "all 3 parts"]);

    let model = split_model();
    write_part(&model.parts[2], Some(2), 4, Some(3), &[3]);
    check("wrong count in a part", model.message(0), &["m-00003-of-00003.gguf", "split.count 4", "split.count 3"]);

    let model = split_model();
    write_part(&model.parts[2], Some(1), 3, Some(3), &[3]);
    check("wrong number in a part", model.message(0), &["m-00003-of-00003.gguf", "split.no 1", "split.no 2"]);

    let model = split_model();
    write_part(&model.parts[2], None, 3, None, &[3]);
    check("part that is no part", model.message(0), &["m-00003-of-00003.gguf", "\"split.no\""]);

    let model = split_model();
    write_part(&model.parts[0], Some(0), 4, Some(3), &[]);
    check("count and name disagree", model.message(0), &["part 1 of 3 by its name", "part 1 of 4 by its metadata"]);

    let model = split_model();
    write_part(&model.parts[0], None, 1, None, &[]);
    check("part by name only", model.message(0), &["part 1 of 3 by its name", "part 1 of 1 by its metadata"]);

    let model = split_model();
    write_part(&model.parts[0], Some(0), 3, Some(4), &[]);
    check("wrong tensor count", model.message(0), &["3 tensors in all", "4, as split.tensors.count"]);

    let model = split_model();
    write_part(&model.parts[0], Some(0), 3, None, &[]);
    check("no tensor count", model.message(0), &["m-00001-of-00003.gguf", "split.tensors.count"]);

    let model = split_model();
    write_part(&model.parts[2], Some(2), 3, Some(3), &[2]);
    check("tensor twice", model.message(0), &["tensor \"t2\" in part 2 and in part 3"]);

    let model = split_model();
    let renamed = model.parts[0].with_file_name("renamed.gguf");
    std::fs::rename(&model.parts[0], &renamed).unwrap();
    let message = Gguf::open(&renamed).map(|_| ()).unwrap_err().to_string();
    check("renamed", message, &["renamed.gguf", "part 1 of a model of 3 parts", "-00001-of-00003.gguf"]);

    let model = split_model();
    write_part(&model.parts[0], Some(3), 3, Some(3), &[]);
    check("number above count", model.message(0), &["split.no 3 of split.count 3"]);

    let model = split_model();
    let bytes = std::fs::read(&model.parts[1]).unwrap();
    std::fs::write(&model.parts[1], &bytes[..bytes.len() - 40]).unwrap();
    check("truncated part", model.message(0), &["m-00002-of-00003.gguf", "40 bytes are missing"]);
}

/// The folder of large shared test files, when this machine has it.
fn shared(folder: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared").join(folder);
    if !path.is_dir() {
        println!("skipped: no shared files at {}", path.display());
        return None;
    }
    Some(path)
}

fn gguf_files(folder: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    files.filter(|p| p.extension().is_some_and(|e| e == "gguf")).collect()
}

#[test]
fn the_tiny_model_is_read() {
    let Some(folder) = shared("models/tiny") else { return };
    for (file, bytes) in [("tiny-f16.gguf", 44_643_328), ("tiny-q8_0.gguf", 23_876_640), ("tiny-q4_k_m.gguf", 14_661_152)] {
        let gguf = Gguf::open(&folder.join(file)).unwrap();
        assert_eq!(gguf.total_bytes(), bytes);
        let m = gguf.metadata();
        assert_eq!(m.get_str("general.architecture").unwrap(), "qwen3moe");
        assert_eq!(m.get_u64("qwen3moe.expert_count").unwrap(), 32);
        assert_eq!(m.get_str_array("tokenizer.ggml.tokens").unwrap().len(), 4096);
        assert_eq!(m.get_i32_array("tokenizer.ggml.token_type").unwrap().len(), 4096);
        // [experts, expert width, hidden]
        assert_eq!(gguf.require_tensor("blk.0.ffn_gate_exps.weight").unwrap().shape, [32, 128, 256]);
        assert_eq!(gguf.require_tensor("token_embd.weight").unwrap().shape, [4096, 256]);
        let norm = gguf.require_tensor("output_norm.weight").unwrap();
        let norm: &[f32] = bytemuck::cast_slice(gguf.data(norm));
        assert!(norm.len() == 256 && norm.iter().all(|x| x.abs() < 100.0) && norm.iter().any(|x| *x != 0.0));
    }
}

/// These files were written by other programs (the converter and the quantiser of llama.cpp), so our writer is held against theirs.
#[test]
fn a_file_written_again_has_the_same_bytes() {
    let mut files = Vec::new();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for model in ["mixtral", "olmoe", "qwen2moe", "qwen3moe"] {
        files.extend(gguf_files(&golden.join(model)));
    }
    if let Some(folder) = shared("models/tiny") {
        files.extend(gguf_files(&folder));
    }
    assert!(files.len() >= 4, "{files:?}");
    let folder = tempfile::tempdir().unwrap();
    for path in files {
        let gguf = Gguf::open(&path).unwrap();
        let copy = folder.path().join("copy.gguf");
        let mut writer = GgufWriter::new(&copy, gguf.alignment()).unwrap();
        for (key, value) in gguf.metadata().iter().filter(|(key, _)| *key != "general.alignment") {
            writer.meta(key, value.clone()).unwrap();
        }
        for t in gguf.tensors() {
            writer.tensor(&t.name, &t.shape, t.format).unwrap();
        }
        let mut data = writer.start().unwrap();
        for t in gguf.tensors() {
            data.write(&t.name, gguf.data(t)).unwrap();
        }
        data.finish().unwrap();
        assert!(std::fs::read(&copy).unwrap() == std::fs::read(&path).unwrap(), "{} differs", path.display());
    }
}

#[test]
fn vocabulary_files_without_tensors_are_read() {
    let Some(folder) = shared("data/vocab") else { return };
    let files = gguf_files(&folder);
    assert!(!files.is_empty());
    for path in files {
        let gguf = Gguf::open(&path).unwrap();
        assert!(gguf.tensors().is_empty());
        assert!(gguf.metadata().get_str_array("tokenizer.ggml.tokens").unwrap().len() > 30_000, "{}", path.display());
    }
}
