//! Metadata values: all thirteen types of GGUF, arrays and nested arrays among them.
//!
//! The type table below is the only list of types; reading, writing, naming and converting come from it.

use super::MAX_ARRAY_DEPTH;
use super::cursor::{Cursor, shorten};
use crate::error::Result;

/// GGUF type id of booleans: one byte, 0 or 1, "anything else is invalid".
const BOOL_ID: u32 = 7;
/// GGUF type id of strings.
const STRING_ID: u32 = 8;
/// GGUF type id of arrays.
const ARRAY_ID: u32 = 9;

macro_rules! number_table {
    ($($variant:ident $ty:ident $id:literal;)*) => {
        /// One metadata value.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs, reason = "each variant is named after the type that it holds")]
        pub enum Value { $($variant($ty),)* Bool(bool), String(String), Array(Array) }

        /// An array of values of one type.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs, reason = "each variant is named after the type that it holds")]
        pub enum Array { $($variant(Vec<$ty>),)* Bool(Vec<bool>), String(Vec<String>), Array(Vec<Array>) }

        impl Value {
            pub(super) fn type_id(&self) -> u32 {
                match self {
                    $(Self::$variant(_) => $id,)*
                    Self::Bool(_) => BOOL_ID,
                    Self::String(_) => STRING_ID,
                    Self::Array(_) => ARRAY_ID,
                }
            }

            /// Reads a value of the type `id`.
            pub(super) fn read(cursor: &mut Cursor, id: u32) -> Result<Self> {
                Ok(match id {
                    $($id => Self::$variant($ty::from_le_bytes(cursor.array(concat!("value of type ", stringify!($ty)))?)),)*
                    BOOL_ID => {
                        let [byte] = cursor.array("boolean")?;
                        Self::Bool(read_bool(cursor, byte)?)
                    }
                    STRING_ID => Self::String(cursor.string("string")?.to_string()),
                    ARRAY_ID => Self::Array(Array::read(cursor, 1)?),
                    _ => return Err(unknown_type(cursor, id)),
                })
            }

            pub(super) fn write(&self, out: &mut Vec<u8>) {
                match self {
                    $(Self::$variant(v) => out.extend_from_slice(&v.to_le_bytes()),)*
                    Self::Bool(v) => out.push(u8::from(*v)),
                    Self::String(v) => write_string(v, out),
                    Self::Array(v) => v.write(out),
                }
            }
        }

        impl Array {
            fn element_type_id(&self) -> u32 {
                match self {
                    $(Self::$variant(_) => $id,)*
                    Self::Bool(_) => BOOL_ID,
                    Self::String(_) => STRING_ID,
                    Self::Array(_) => ARRAY_ID,
                }
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Self::$variant(v) => v.len(),)*
                    Self::Bool(v) => v.len(),
                    Self::String(v) => v.len(),
                    Self::Array(v) => v.len(),
                }
            }

            fn read(cursor: &mut Cursor, depth: u32) -> Result<Self> {
                let id = cursor.u32("array element type")?;
                let count = cursor.u64("array length")?;
                Ok(match id {
                    $($id => {
                        const SIZE: usize = size_of::<$ty>();
                        let count = cursor.check_count(concat!("array elements of type ", stringify!($ty)), count, SIZE as u64)?;
                        let bytes = cursor.take("array", (count * SIZE) as u64)?;
                        Self::$variant(bytes.as_chunks::<SIZE>().0.iter().map(|b| $ty::from_le_bytes(*b)).collect())
                    })*
                    BOOL_ID => {
                        let bytes = cursor.take("array of booleans", count)?;
                        Self::Bool(bytes.iter().map(|b| read_bool(cursor, *b)).collect::<Result<_>>()?)
                    }
                    STRING_ID => {
                        // The shortest string is its length alone: 8 bytes.
                        let count = cursor.check_count("array elements of type string", count, 8)?;
                        let mut strings = Vec::with_capacity(count.min(MAX_RESERVED));
                        for _ in 0..count {
                            strings.push(cursor.string("string in an array")?.to_string());
                        }
                        Self::String(strings)
                    }
                    ARRAY_ID => {
                        if depth >= MAX_ARRAY_DEPTH {
                            return Err(cursor.bad(
                                &format!("arrays nested more than {MAX_ARRAY_DEPTH} deep"),
                                &format!("at most {MAX_ARRAY_DEPTH} levels"),
                                "the file is damaged, or made to do harm",
                            ));
                        }
                        // The shortest array is its type and its length: 12 bytes.
                        let count = cursor.check_count("array elements of type array", count, 12)?;
                        let mut arrays = Vec::with_capacity(count.min(MAX_RESERVED));
                        for _ in 0..count {
                            arrays.push(Self::read(cursor, depth + 1)?);
                        }
                        Self::Array(arrays)
                    }
                    _ => return Err(unknown_type(cursor, id)),
                })
            }

            fn write(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.element_type_id().to_le_bytes());
                out.extend_from_slice(&(self.len() as u64).to_le_bytes());
                match self {
                    $(Self::$variant(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),)*
                    Self::Bool(v) => out.extend(v.iter().map(|x| u8::from(*x))),
                    Self::String(v) => v.iter().for_each(|x| write_string(x, out)),
                    Self::Array(v) => v.iter().for_each(|x| x.write(out)),
                }
            }

            /// The elements `range` as texts, for display.
            fn show(&self, range: std::ops::Range<usize>) -> Vec<String> {
                match self {
                    $(Self::$variant(v) => v[range].iter().map(ToString::to_string).collect(),)*
                    Self::Bool(v) => v[range].iter().map(ToString::to_string).collect(),
                    Self::String(v) => v[range].iter().map(|s| format!("{:?}", shorten(s))).collect(),
                    Self::Array(v) => v[range].iter().map(ToString::to_string).collect(),
                }
            }
        }

        fn type_name(id: u32) -> &'static str {
            match id {
                $($id => stringify!($ty),)*
                BOOL_ID => "bool",
                STRING_ID => "string",
                _ => "array",
            }
        }

        $(
            impl From<$ty> for Value {
                fn from(v: $ty) -> Self {
                    Self::$variant(v)
                }
            }
            impl From<Vec<$ty>> for Value {
                fn from(v: Vec<$ty>) -> Self {
                    Self::Array(Array::$variant(v))
                }
            }
        )*
    };
}

// variant type GGUF id
number_table! {
    U8  u8   0;
    I8  i8   1;
    U16 u16  2;
    I16 i16  3;
    U32 u32  4;
    I32 i32  5;
    F32 f32  6;
    U64 u64 10;
    I64 i64 11;
    F64 f64 12;
}

/// Elements reserved at once; longer arrays grow as they are read, so that a false length costs no memory.
const MAX_RESERVED: usize = 1 << 20;

impl Value {
    /// The type in words: `u32`, `array of string`.
    pub fn kind(&self) -> String {
        match self {
            Self::Array(a) => format!("array of {}", type_name(a.element_type_id())),
            _ => type_name(self.type_id()).to_string(),
        }
    }

    /// The value of any integer type, when it is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => Some(v),
            Self::I8(v) => v.try_into().ok(),
            Self::I16(v) => v.try_into().ok(),
            Self::I32(v) => v.try_into().ok(),
            Self::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// The value of either float type.
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Self::F32(v) => Some(v),
            Self::F64(v) => Some(v as f32),
            _ => None,
        }
    }

    /// Levels of arrays in this value: 0 for a scalar.
    pub(super) fn depth(&self) -> u32 {
        match self {
            Self::Array(a) => a.depth(),
            _ => 0,
        }
    }
}

impl Array {
    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements of an array of any integer type, when all fit `T`.
    pub fn to_ints<T>(&self) -> Option<Vec<T>>
    where
        T: TryFrom<u8> + TryFrom<i8> + TryFrom<u16> + TryFrom<i16> + TryFrom<u32> + TryFrom<i32> + TryFrom<u64> + TryFrom<i64>,
    {
        fn all<S: Copy, T: TryFrom<S>>(values: &[S]) -> Option<Vec<T>> {
            values.iter().map(|v| T::try_from(*v).ok()).collect()
        }
        match self {
            Self::U8(v) => all(v),
            Self::I8(v) => all(v),
            Self::U16(v) => all(v),
            Self::I16(v) => all(v),
            Self::U32(v) => all(v),
            Self::I32(v) => all(v),
            Self::U64(v) => all(v),
            Self::I64(v) => all(v),
            _ => None,
        }
    }

    fn depth(&self) -> u32 {
        match self {
            Self::Array(v) => 1 + v.iter().map(Self::depth).max().unwrap_or(0),
            _ => 1,
        }
    }
}

impl From<bool> for Value {
    fn from(v: bool) -> Self {
        Self::Bool(v)
    }
}

impl From<&str> for Value {
    fn from(v: &str) -> Self {
        Self::String(v.to_string())
    }
}

impl From<String> for Value {
    fn from(v: String) -> Self {
        Self::String(v)
    }
}

impl From<Vec<bool>> for Value {
    fn from(v: Vec<bool>) -> Self {
        Self::Array(Array::Bool(v))
    }
}

impl From<Vec<String>> for Value {
    fn from(v: Vec<String>) -> Self {
        Self::Array(Array::String(v))
    }
}

/// Short form for people: long texts and arrays are cut.
impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Array(a) => a.fmt(f),
            Self::String(s) => write!(f, "{:?}", shorten(s)),
            Self::Bool(v) => v.fmt(f),
            Self::F32(v) => v.fmt(f),
            Self::F64(v) => v.fmt(f),
            Self::U64(v) => v.fmt(f),
            Self::I64(v) => v.fmt(f),
            Self::U32(v) => v.fmt(f),
            Self::I32(v) => v.fmt(f),
            Self::U16(v) => v.fmt(f),
            Self::I16(v) => v.fmt(f),
            Self::U8(v) => v.fmt(f),
            Self::I8(v) => v.fmt(f),
        }
    }
}

impl std::fmt::Display for Array {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 6;
        let shown = self.show(0..self.len().min(SHOWN)).join(", ");
        if self.len() > SHOWN { write!(f, "[{shown}, … {} in all]", self.len()) } else { write!(f, "[{shown}]") }
    }
}

pub(super) fn write_string(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn read_bool(cursor: &Cursor, byte: u8) -> Result<bool> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(cursor.bad(&format!("a boolean of value {byte}"), "0 or 1", "the file is damaged: download it again")),
    }
}

fn unknown_type(cursor: &Cursor, id: u32) -> crate::RuntimeError {
    cursor.bad(&format!("metadata value type {id}"), "a type from 0 to 12", "the file is damaged: download it again")
}
