//! The metadata of a GGUF file: keys in file order, typed getters.
//!
//! A getter never guesses: a missing key and a value of the wrong type are errors that name the file, the key and both types.
//! Integers are taken from every integer type, since converters disagree on widths.

use super::value::{Array, Value};
use crate::error::{Result, RuntimeError};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Ordered map of unique keys.
#[derive(Debug, Clone)]
pub struct Metadata {
    path: PathBuf,
    entries: Vec<(String, Value)>,
    /// Key to place in `entries`.
    index: HashMap<String, usize>,
}

impl Metadata {
    /// No entries; `path` only serves messages.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf(), entries: Vec::new(), index: HashMap::new() }
    }

    /// Adds an entry at the end; a key that is there already is refused.
    pub fn insert(&mut self, key: &str, value: impl Into<Value>) -> Result<()> {
        if self.index.insert(key.to_string(), self.entries.len()).is_some() {
            return Err(RuntimeError::bad_file(
                &self.path,
                format!("metadata key {key:?} twice"),
                "each key once",
                "the file is damaged, or its converter is at fault",
            ));
        }
        self.entries.push((key.to_string(), value.into()));
        Ok(())
    }

    /// Whether the key is there.
    pub fn contains(&self, key: &str) -> bool {
        self.index.contains_key(key)
    }

    /// The value of a key, whatever its type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|i| &self.entries[*i].1)
    }

    /// All entries in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A text; `None` when the key is absent.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |v| match v {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    /// A non-negative integer of any integer type; `None` when the key is absent.
    pub fn opt_u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "an integer that is not negative", Value::as_u64)
    }

    /// A number of either float type; `None` when the key is absent.
    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a floating-point number", Value::as_f32)
    }

    /// A truth value; `None` when the key is absent.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", |v| match v {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// An array of texts; `None` when the key is absent.
    pub fn opt_str_array(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Array(Array::String(a)) => Some(a.as_slice()),
            _ => None,
        })
    }

    /// An array of 32-bit floats; `None` when the key is absent.
    pub fn opt_f32_array(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "an array of f32", |v| match v {
            Value::Array(Array::F32(a)) => Some(a.as_slice()),
            _ => None,
        })
    }

    /// An array of integers of any type whose values fit 32 bits; `None` when the key is absent.
    pub fn opt_i32_array(&self, key: &str) -> Result<Option<Cow<'_, [i32]>>> {
        self.typed(key, "an array of integers that fit i32", |v| match v {
            Value::Array(Array::I32(a)) => Some(Cow::Borrowed(a.as_slice())),
            Value::Array(a) => a.to_ints().map(Cow::Owned),
            _ => None,
        })
    }

    /// One integer per layer (or the like): a single one stands for all `count`, an array must have exactly `count`.
    pub fn opt_u64_or_array(&self, key: &str, count: usize) -> Result<Option<Vec<u64>>> {
        let expected = "a non-negative integer or an array of such";
        let values = self.typed(key, expected, |v| match v {
            Value::Array(a) => a.to_ints(),
            _ => v.as_u64().map(|x| vec![x; count]),
        })?;
        match values {
            Some(values) if values.len() != count => Err(self.bad(
                &format!("an array of {} for metadata key {key:?}", values.len()),
                &format!("one integer, or an array of {count}"),
            )),
            other => Ok(other),
        }
    }

    /// A text.
    pub fn get_str(&self, key: &str) -> Result<&str> {
        self.require(key, self.opt_str(key)?)
    }

    /// A non-negative integer of any integer type.
    pub fn get_u64(&self, key: &str) -> Result<u64> {
        self.require(key, self.opt_u64(key)?)
    }

    /// A number of either float type.
    pub fn get_f32(&self, key: &str) -> Result<f32> {
        self.require(key, self.opt_f32(key)?)
    }

    /// A truth value.
    pub fn get_bool(&self, key: &str) -> Result<bool> {
        self.require(key, self.opt_bool(key)?)
    }

    /// An array of texts.
    pub fn get_str_array(&self, key: &str) -> Result<&[String]> {
        self.require(key, self.opt_str_array(key)?)
    }

    /// An array of 32-bit floats.
    pub fn get_f32_array(&self, key: &str) -> Result<&[f32]> {
        self.require(key, self.opt_f32_array(key)?)
    }

    /// An array of integers of any type whose values fit 32 bits.
    pub fn get_i32_array(&self, key: &str) -> Result<Cow<'_, [i32]>> {
        self.require(key, self.opt_i32_array(key)?)
    }

    /// One integer per layer (or the like), as in [`Self::opt_u64_or_array`].
    pub fn get_u64_or_array(&self, key: &str, count: usize) -> Result<Vec<u64>> {
        self.require(key, self.opt_u64_or_array(key, count)?)
    }

    fn typed<'a, T>(&'a self, key: &str, expected: &str, convert: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(self.bad(&format!("{} {value} for metadata key {key:?}", value.kind()), expected)),
        }
    }

    fn require<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.bad(&format!("no metadata key {key:?}"), "this key, which the model cannot do without"))
    }

    fn bad(&self, found: &str, expected: &str) -> RuntimeError {
        RuntimeError::bad_file(&self.path, found, expected, "convert the model again with current tools")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Metadata {
        let mut m = Metadata::new(Path::new("some/model.gguf"));
        m.insert("name", "tiny").unwrap();
        m.insert("layers", 6u32).unwrap();
        m.insert("signed", 7i16).unwrap();
        m.insert("negative", -1i64).unwrap();
        m.insert("base", 1e6f32).unwrap();
        m.insert("exact", 0.5f64).unwrap();
        m.insert("flag", true).unwrap();
        m.insert("heads", vec![4i32, 4, 2]).unwrap();
        m.insert("types", vec![1u8, 3]).unwrap();
        m.insert("wide", vec![1u64 << 40]).unwrap();
        m.insert("scores", vec![0.5f32, -1.0]).unwrap();
        m.insert("tokens", vec!["a".to_string(), "b".to_string()]).unwrap();
        m
    }

    #[test]
    fn getters_convert_what_they_say() {
        let m = sample();
        assert_eq!(m.get_str("name").unwrap(), "tiny");
        assert_eq!((m.get_u64("layers").unwrap(), m.get_u64("signed").unwrap()), (6, 7));
        assert_eq!((m.get_f32("base").unwrap(), m.get_f32("exact").unwrap()), (1e6, 0.5));
        assert!(m.get_bool("flag").unwrap());
        assert_eq!(m.get_i32_array("heads").unwrap().as_ref(), [4, 4, 2]);
        assert_eq!(m.get_i32_array("types").unwrap().as_ref(), [1, 3]);
        assert_eq!(m.get_f32_array("scores").unwrap(), [0.5, -1.0]);
        assert_eq!(m.get_str_array("tokens").unwrap(), ["a", "b"]);
        assert_eq!(m.get_u64_or_array("layers", 3).unwrap(), [6, 6, 6]);
        assert_eq!(m.get_u64_or_array("heads", 3).unwrap(), [4, 4, 2]);
        assert_eq!(m.opt_u64("absent").unwrap(), None);
        assert_eq!(m.iter().map(|(k, _)| k).take(3).collect::<Vec<_>>(), ["name", "layers", "signed"]);
    }

    #[test]
    fn errors_name_file_key_and_types() {
        let m = sample();
        let messages = [
            (m.get_u64("name").unwrap_err(), ["\"name\"", "string \"tiny\"", "integer"]),
            (m.get_u64("negative").unwrap_err(), ["\"negative\"", "i64 -1", "not negative"]),
            (m.get_str("layers").unwrap_err(), ["\"layers\"", "u32 6", "a string"]),
            (m.get_f32("layers").unwrap_err(), ["\"layers\"", "u32 6", "floating-point"]),
            (m.get_bool("layers").unwrap_err(), ["\"layers\"", "u32 6", "boolean"]),
            (m.get_str_array("heads").unwrap_err(), ["\"heads\"", "array of i32", "array of strings"]),
            (m.get_f32_array("heads").unwrap_err(), ["\"heads\"", "array of i32", "array of f32"]),
            (m.get_i32_array("wide").unwrap_err(), ["\"wide\"", "array of u64", "fit i32"]),
            (m.get_u64_or_array("heads", 6).unwrap_err(), ["\"heads\"", "array of 3", "array of 6"]),
            (m.opt_bool("name").unwrap_err(), ["\"name\"", "string", "boolean"]),
            (m.get_str("absent").unwrap_err(), ["\"absent\"", "no metadata key", "cannot do without"]),
        ];
        for (error, parts) in messages {
            let message = error.to_string();
            assert!(message.starts_with("some/model.gguf: "), "{message}");
            for part in parts {
                assert!(message.contains(part), "{part} not in {message}");
            }
        }
        assert!(sample().insert("name", 1u8).unwrap_err().to_string().contains("\"name\" twice"));
    }

    #[test]
    fn long_values_are_shown_short() {
        assert_eq!(Value::from((0..100i32).collect::<Vec<_>>()).to_string(), "[0, 1, 2, 3, 4, 5, … 100 in all]");
        assert_eq!(Value::from(vec![true]).to_string(), "[true]");
        assert!(Value::from("x".repeat(1000)).to_string().chars().count() < 90);
    }
}
