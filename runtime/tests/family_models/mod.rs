//! Makes the tiny models of `tests/data/families` as files: safetensors folders from `weights.json`, Q8_0 files from F16 ones.
//!
//! Weights are a function of a tensor's name and an element's index, so that only names, shapes, means and scales are stored. The rule is
//! that of `tools/golden/make_families.py`; `sum` in `weights.json` checks that both sides make the same bits.

use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use tierwise_cost::quant::QuantFormat;
use tierwise_runtime::gguf::{Gguf, GgufWriter};
use tierwise_runtime::quant::{dequantize_row, quantize_row};

/// The folder of references.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families")
}

/// All models with references, in the order of their names: safetensors if `gguf` is false.
#[allow(dead_code, reason = "not every test goes through all models")]
pub fn names(gguf: bool) -> Vec<String> {
    let entries = std::fs::read_dir(folder()).expect("the folder is part of the repository");
    let mut names: Vec<String> = entries
        .map(|e| e.expect("readable").file_name().into_string().expect("UTF-8"))
        .filter(|n| n.ends_with("-gguf") == gguf)
        .collect();
    names.sort();
    assert!(!names.is_empty(), "no references in {}", folder().display());
    names
}

/// `deepseek_v3-1` to `deepseek_v3`.
#[allow(dead_code, reason = "not every test that makes these models groups them")]
pub fn family(model: &str) -> &str {
    model.split_once('-').map_or(model, |(family, _)| family)
}

fn fnv1a64(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// Element `index` of the stream of `state`, in [-1, 1) in steps of 2^-23.
fn uniform(state: u64, index: u64) -> f64 {
    let mut z = state.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 40) as f64 / f64::from(1u32 << 23) - 1.0
}

/// The stored bytes of one entry of `weights.json`, and what they add to the check sum.
fn tensor_bytes(entry: &Value, seed: u64, rounded: bool, sum: &mut u64) -> Vec<u8> {
    let name = entry["name"].as_str().expect("a name");
    let count: u64 = entry["shape"].as_array().expect("a shape").iter().map(|d| d.as_u64().expect("a size")).product();
    let (mean, scale) = (entry["mean"].as_f64().expect("a number"), entry["scale"].as_f64().expect("a number"));
    let state = fnv1a64(name) ^ seed;
    let value = |i| mean + scale * uniform(state, i);
    match entry["dtype"].as_str().expect("a type") {
        "F32" => (0..count)
            .flat_map(|i| {
                let x = value(i) as f32;
                let x = if rounded { half::f16::from_f32(x).to_f32() } else { x };
                *sum = sum.wrapping_add(u64::from(x.to_bits()));
                x.to_le_bytes()
            })
            .collect(),
        dtype => (0..count)
            .map(|i| {
                let byte = value(i).floor() as u8;
                // 0x7f and 0xff are not numbers.
                let byte = if dtype == "F8_E4M3" && byte & 0x7f == 0x7f { byte & 0xfe } else { byte };
                *sum = sum.wrapping_add(u64::from(byte));
                byte
            })
            .collect(),
    }
}

/// Writes the model's `config.json` and `model.safetensors` into a folder of its own name under `parent`.
pub fn write_safetensors(model: &str, parent: &Path) -> PathBuf {
    write_safetensors_of(&folder().join(model), parent)
}

/// The same of a folder of references.
pub fn write_safetensors_of(source: &Path, parent: &Path) -> PathBuf {
    let model = source.file_name().and_then(|n| n.to_str()).expect("a name");
    let text = std::fs::read_to_string(source.join("weights.json")).expect("readable");
    let weights: Value = serde_json::from_str(&text).expect("JSON");
    let seed = weights["seed"].as_u64().expect("a seed");
    // The models that went through llama.cpp's converter have weights that F16 can hold.
    let rounded = weights["rounded"] == "F16";
    let (mut header, mut data, mut sum) = (Map::new(), Vec::new(), 0u64);
    for entry in weights["tensors"].as_array().expect("a list") {
        let start = data.len();
        data.extend(tensor_bytes(entry, seed, rounded, &mut sum));
        let name = entry["name"].as_str().expect("a name").to_string();
        header.insert(name, json!({"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [start, data.len()]}));
    }
    assert_eq!(sum, weights["sum"].as_u64().expect("a sum"), "{model}: the weights are not those of the reference");
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let folder = parent.join(model);
    std::fs::create_dir_all(&folder).expect("created");
    std::fs::copy(source.join("config.json"), folder.join("config.json")).expect("copied");
    let file = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
    std::fs::write(folder.join("model.safetensors"), file).expect("written");
    folder
}

/// The model's folder with its safetensors header and config changed. One more float32 lies at the end of the data if `more`.
#[allow(dead_code, reason = "not every test that makes these models changes them")]
pub fn rewritten(name: &str, parent: &Path, more: bool, change: impl FnOnce(&mut Value, &mut Value)) -> PathBuf {
    let folder = write_safetensors(name, parent);
    let read = |file: &str| std::fs::read(folder.join(file)).expect("readable");
    let stored = read("model.safetensors");
    let length = u64::from_le_bytes(stored[..8].try_into().expect("eight bytes")) as usize;
    let mut header: Value = serde_json::from_slice(&stored[8..8 + length]).expect("JSON");
    let mut config: Value = serde_json::from_slice(&read("config.json")).expect("JSON");
    if more {
        let end = stored.len() - 8 - length;
        header["model.layers.0.surprise"] = json!({"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]});
    }
    change(&mut header, &mut config);
    let mut text = header.to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let all =
        [&(text.len() as u64).to_le_bytes()[..], &text, &stored[8 + length..], &[0; 4][..if more { 4 } else { 0 }]].concat();
    std::fs::write(folder.join("model.safetensors"), all).expect("written");
    std::fs::write(folder.join("config.json"), config.to_string()).expect("written");
    folder
}

/// The same GGUF file with every F16 tensor in Q8_0, by this crate's encoder.
#[allow(dead_code, reason = "not every test that makes these models quantises them")]
pub fn write_q8_0(f16: &Path, out: &Path) {
    let gguf = Gguf::open(f16).expect("opened");
    let mut writer = GgufWriter::new(out, gguf.alignment()).expect("a valid alignment");
    for (key, value) in gguf.metadata().iter() {
        writer.meta(key, value.clone()).expect("a valid entry");
    }
    let format_of = |format| if format == QuantFormat::F16 { QuantFormat::Q8_0 } else { format };
    for t in gguf.tensors() {
        writer.tensor(&t.name, &t.shape, format_of(t.format)).expect("rows of whole blocks");
    }
    let mut writer = writer.start().expect("started");
    for t in gguf.tensors() {
        let data = gguf.data(t);
        if t.format != QuantFormat::F16 {
            writer.write(&t.name, data).expect("written");
            continue;
        }
        let cols = *t.shape.last().expect("at least one dimension") as usize;
        let mut row = vec![0.0; cols];
        let mut quantised = vec![0; cols / 32 * 34];
        for bytes in data.chunks_exact(2 * cols) {
            dequantize_row(QuantFormat::F16, bytes, &mut row);
            quantize_row(QuantFormat::Q8_0, &row, &mut quantised).expect("a row");
            writer.write(&t.name, &quantised).expect("written");
        }
    }
    writer.finish().expect("finished");
}
