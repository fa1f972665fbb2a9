//! Renumbers the experts of a safetensors model, as [`crate::permute`] does for GGUF.
//!
//! Where every expert has tensors of its own (`...experts.17.up_proj.weight`) only names change, in the headers and in the index; where
//! experts lie in one tensor, and in the router's rows, biases and correction bias, parts are copied in the new order. Tensor by tensor,
//! with one buffer. Everything else in the folder is copied as it is; the index comes last.

use crate::atomic_file::{AtomicFile, write_atomic};
use crate::error::{Result, RuntimeError};
use crate::permute::check_order;
use crate::safetensors::SafeTensors;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

/// Order of experts by layer.
type Order = BTreeMap<u32, Vec<u16>>;

/// What a name without its layer says: the modules that have a row for each expert.
const ROUTERS: [&str; 11] = [
    "mlp.gate.weight",
    "mlp.gate.bias",
    "mlp.router.weight",
    "mlp.router.bias",
    "mlp.gate.wg.weight",
    "mlp.gate.e_score_correction_bias",
    "mlp.moe_statics.e_score_correction_bias",
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.e_score_correction_bias",
    "block_sparse_moe.router.layer.weight",
    "feed_forward.router.weight",
];

/// What happens to a tensor.
enum Part<'a> {
    /// It stays.
    Same,
    /// It gets this name.
    Renamed(String),
    /// Its parts are put in this order.
    Reordered(&'a [u16]),
}

/// Layer number, and the name after it.
fn layer_of(name: &str) -> Option<(u32, &str)> {
    let (_, rest) = name.split_once("layers.")?;
    let (number, rest) = rest.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

/// What happens to a tensor of this name; counts experts' tensors of its layer in `touched`.
fn part_of<'a>(name: &str, order: &'a Order, touched: &mut BTreeMap<u32, usize>) -> Result<Part<'a>> {
    let Some((layer, rest)) = layer_of(name) else { return Ok(Part::Same) };
    let Some(row) = order.get(&layer) else { return Ok(Part::Same) };
    if ROUTERS.contains(&rest) {
        return Ok(Part::Reordered(row));
    }
    let fused = ["block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"].contains(&rest);
    let Some(at) = rest.find("experts.").filter(|at| !rest[..*at].ends_with("shared_")) else {
        if !fused {
            return Ok(Part::Same);
        }
        *touched.entry(layer).or_default() += 1;
        return Ok(Part::Reordered(row));
    };
    *touched.entry(layer).or_default() += 1;
    let after = &rest[at + "experts.".len()..];
    let number = after.split('.').next().unwrap_or_default();
    let Ok(old) = number.parse::<u16>() else { return Ok(Part::Reordered(row)) };
    let Some(new) = row.iter().position(|e| *e == old) else {
        return Err(RuntimeError::BadRequest {
            what: "order of experts",
            found: format!("{} experts in layer {layer}", row.len()),
            expected: format!("as many as the model has: there is {name}"),
        });
    };
    let head = name.len() - after.len();
    Ok(Part::Renamed(format!("{}{new}{}", &name[..head], &after[number.len()..])))
}

/// Copies a folder with its experts in another order: place i of layer l gets expert `order[l][i]`. Layers without an entry stay. Returns the
/// bytes of weights written.
///
/// # Errors
/// [`RuntimeError::BadRequest`] when an order is no permutation or names a layer without experts, [`RuntimeError::BadFile`] for a folder that is no
/// model or a destination that exists.
pub fn permute_folder(folder: &Path, order: &Order, out: &Path) -> Result<u64> {
    check_order(order)?;
    // The reader checks headers and index; tensors are copied without it, whatever their types.
    drop(SafeTensors::open(folder)?);
    if out.exists() {
        return Err(RuntimeError::bad_file(out, "something that exists", "the name of a new folder", "give another name"));
    }
    fs::create_dir_all(out).map_err(|e| RuntimeError::io("create", out, e))?;
    let mut touched: BTreeMap<u32, usize> = order.keys().map(|l| (*l, 0)).collect();
    let mut written = 0;
    let mut index = None;
    let entries = fs::read_dir(folder).map_err(|e| RuntimeError::io("read", folder, e))?;
    for entry in entries {
        let path = entry.map_err(|e| RuntimeError::io("read", folder, e))?.path();
        let Some(name) = path.file_name().filter(|_| path.is_file()) else { continue };
        let to = out.join(name);
        let text = name.to_string_lossy();
        if text.ends_with(".safetensors") {
            written += permute_file(&path, order, &to, &mut touched)?;
        } else if text.ends_with(".safetensors.index.json") {
            index = Some((path, to));
        } else {
            fs::copy(&path, &to).map_err(|e| RuntimeError::io("copy", &path, e))?;
        }
    }
    if let Some((layer, _)) = touched.iter().find(|(_, n)| **n == 0) {
        return Err(RuntimeError::BadRequest {
            what: "order of experts",
            found: format!("one for layer {layer}"),
            expected: "layers that have experts in the model".into(),
        });
    }
    if let Some((path, to)) = index {
        let bytes = fs::read(&path).map_err(|e| RuntimeError::io("read", &path, e))?;
        let bad =
            |found: String| RuntimeError::bad_file(&path, found, "a JSON object with weight_map", "download the model again");
        let mut value: Value = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        let map = value["weight_map"].as_object().ok_or_else(|| bad("no weight_map".into()))?;
        let mut renamed = Map::new();
        for (name, file) in map {
            let name = match part_of(name, order, &mut touched)? {
                Part::Renamed(new) => new,
                _ => name.clone(),
            };
            renamed.insert(name, file.clone());
        }
        value["weight_map"] = Value::Object(renamed);
        write_atomic(&to, value.to_string().as_bytes())?;
    }
    Ok(written)
}

/// One file of weights.
fn permute_file(path: &Path, order: &Order, to: &Path, touched: &mut BTreeMap<u32, usize>) -> Result<u64> {
    let io = |e| RuntimeError::io("read", path, e);
    let bad = |found: String, expected: String| RuntimeError::bad_file(path, found, expected, "download the model again");
    let mut file = File::open(path).map_err(io)?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(io)?;
    let mut header = vec![0; u64::from_le_bytes(length) as usize];
    file.read_exact(&mut header).map_err(io)?;
    let data = 8 + header.len() as u64;
    let header: Map<String, Value> =
        serde_json::from_slice(&header).map_err(|e| bad(e.to_string(), "a header in JSON".into()))?;
    let mut new_header = Map::new();
    // Tensors in the order of their bytes: begin, end, and the order of the parts.
    let mut tensors: Vec<(u64, u64, Option<&[u16]>)> = Vec::new();
    for (name, entry) in &header {
        if name == "__metadata__" {
            new_header.insert(name.clone(), entry.clone());
            continue;
        }
        let offset = |i: usize| entry["data_offsets"][i].as_u64().unwrap_or(0);
        let (begin, end) = (offset(0), offset(1));
        let (name, parts) = match part_of(name, order, touched)? {
            Part::Same => (name.clone(), None),
            Part::Renamed(new) => (new, None),
            Part::Reordered(row) => {
                // A correction bias may be [1, experts].
                let axis = entry["shape"].as_array().into_iter().flatten().filter_map(Value::as_u64).find(|n| *n != 1);
                if axis != Some(row.len() as u64) || !(end - begin).is_multiple_of(row.len() as u64) {
                    return Err(RuntimeError::BadRequest {
                        what: "order of experts",
                        found: format!("{} experts for {name} of shape {}", row.len(), entry["shape"]),
                        expected: "as many as the tensor has".into(),
                    });
                }
                (name.clone(), Some(row))
            }
        };
        new_header.insert(name, entry.clone());
        tensors.push((begin, end, parts));
    }
    tensors.sort_unstable_by_key(|t| t.0);
    // Padded with spaces to a multiple of 8, as the library does: tensors stay aligned.
    let mut text = Value::Object(new_header).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    let mut out = AtomicFile::create(to)?;
    let mut write = |bytes: &[u8]| out.write_all(bytes).map_err(|e| RuntimeError::io("write", to, e));
    write(&(text.len() as u64).to_le_bytes())?;
    write(text.as_bytes())?;
    let mut buffer = Vec::new();
    let mut at = 0;
    for (begin, end, parts) in tensors {
        if begin != at {
            return Err(bad(format!("a gap before byte {begin}"), format!("tensors one after another, the next at byte {at}")));
        }
        at = end;
        let size = (end - begin) / parts.map_or(1, |p| p.len() as u64);
        for i in 0..parts.map_or(1, <[u16]>::len) {
            let from = parts.map_or(0, |p| u64::from(p[i]) * size);
            file.seek(SeekFrom::Start(data + begin + from)).map_err(io)?;
            let mut left = size;
            while left > 0 {
                buffer.resize(left.min(1 << 22) as usize, 0);
                file.read_exact(&mut buffer).map_err(io)?;
                write(&buffer)?;
                left -= buffer.len() as u64;
            }
        }
    }
    out.commit()?;
    Ok(8 + text.len() as u64 + at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tensors of these names, shapes and bytes as a file.
    fn file(tensors: &[(&str, &[u64], Vec<u8>)]) -> Vec<u8> {
        let (mut header, mut data) = (Map::new(), Vec::new());
        for (name, shape, bytes) in tensors {
            let begin = data.len();
            data.extend_from_slice(bytes);
            header.insert(
                (*name).into(),
                serde_json::json!({ "dtype": "U8", "shape": shape, "data_offsets": [begin, data.len()] }),
            );
        }
        let text = Value::Object(header).to_string();
        [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat()
    }

    /// The bytes of every tensor of a file.
    fn tensors(path: &Path) -> BTreeMap<String, Vec<u8>> {
        let bytes = fs::read(path).expect("written");
        let length = u64::from_le_bytes(*bytes.first_chunk().expect("a length")) as usize;
        assert_eq!(length % 8, 0, "tensors stay aligned");
        let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).expect("JSON");
        let range = |v: &Value, i: usize| 8 + length + v["data_offsets"][i].as_u64().expect("a number") as usize;
        header.iter().map(|(n, v)| (n.clone(), bytes[range(v, 0)..range(v, 1)].to_vec())).collect()
    }

    #[test]
    fn experts_and_router_rows_move_together_and_nothing_else_does() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir(&from).expect("writable");
        let model = file(&[
            ("model.layers.0.mlp.gate.weight", &[3, 2], vec![0, 1, 2, 3, 4, 5]),
            ("model.layers.1.mlp.experts.0.up_proj.weight", &[2], vec![10, 11]),
            ("model.layers.1.mlp.experts.1.up_proj.weight", &[2], vec![20, 21]),
            ("model.layers.1.mlp.experts.2.up_proj.weight", &[2], vec![30, 31]),
            ("model.layers.1.mlp.gate.e_score_correction_bias", &[1, 3], vec![7, 8, 9]),
            ("model.layers.1.mlp.gate.weight", &[3, 2], vec![0, 1, 2, 3, 4, 5]),
            ("model.layers.1.mlp.shared_experts.up_proj.weight", &[3], vec![1, 2, 3]),
            ("model.layers.2.mlp.experts.down_proj_blocks", &[3, 2], vec![1, 2, 3, 4, 5, 6]),
        ]);
        fs::write(from.join("model.safetensors"), &model).expect("writable");
        fs::write(from.join("config.json"), "{}").expect("writable");
        let order = Order::from([(1, vec![2, 0, 1]), (2, vec![1, 2, 0])]);
        let bytes = permute_folder(&from, &order, &to).expect("a model");
        assert_eq!(bytes, fs::metadata(to.join("model.safetensors")).expect("written").len());
        assert_eq!(fs::read(to.join("config.json")).expect("copied"), b"{}");
        let (was, is) = (tensors_of_unpadded(&model), tensors(&to.join("model.safetensors")));
        for same in ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"] {
            assert_eq!(was[same], is[same]);
        }
        let expert = |e: usize| format!("model.layers.1.mlp.experts.{e}.up_proj.weight");
        for (new, old) in order[&1].iter().enumerate() {
            assert_eq!(is[&expert(new)], was[&expert(usize::from(*old))]);
        }
        assert_eq!(is["model.layers.1.mlp.gate.weight"], [4, 5, 0, 1, 2, 3]);
        assert_eq!(is["model.layers.1.mlp.gate.e_score_correction_bias"], [9, 7, 8]);
        assert_eq!(is["model.layers.2.mlp.experts.down_proj_blocks"], [3, 4, 5, 6, 1, 2]);
        // Back again: the same bytes by name.
        let inverse = |row: &Vec<u16>| (0..3_u16).map(|e| row.iter().position(|x| *x == e).expect("held") as u16).collect();
        let back = order.iter().map(|(l, row)| (*l, inverse(row))).collect();
        permute_folder(&to, &back, &dir.path().join("back")).expect("a model");
        assert_eq!(tensors(&dir.path().join("back/model.safetensors")), was);

        let refused = |order: Order, words: &str| {
            let error = permute_folder(&from, &order, &dir.path().join("no")).expect_err(words).to_string();
            assert!(error.contains(words), "{error}");
            let _ = fs::remove_dir_all(dir.path().join("no"));
        };
        refused(Order::from([(1, vec![0, 0, 1])]), "once: no replicas");
        refused(Order::from([(1, vec![0, 1])]), "as many as the model has");
        refused(Order::from([(0, vec![0, 1, 2])]), "layers that have experts");
        assert!(permute_folder(&from, &order, &to).is_err(), "an existing folder is not touched");
    }

    fn tensors_of_unpadded(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let length = u64::from_le_bytes(*bytes.first_chunk().expect("a length")) as usize;
        let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).expect("JSON");
        let range = |v: &Value, i: usize| 8 + length + v["data_offsets"][i].as_u64().expect("a number") as usize;
        header.iter().map(|(n, v)| (n.clone(), bytes[range(v, 0)..range(v, 1)].to_vec())).collect()
    }
}
