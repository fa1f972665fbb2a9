//! The one table of weight formats.
//!
//! Every size in Tierwise comes from [`QuantFormat::layout`]; tests and kernels iterate over [`QuantFormat::ALL`].
//! Block layouts are those of ggml (`ggml-common.h`); type ids are those of the GGUF specification.

use crate::error::CostError;
use crate::units::Bytes;
use serde::{Deserialize, Serialize};

/// How the elements of a weight row are stored. A row is a whole number of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[allow(missing_docs, non_camel_case_types, reason = "names are those of the GGUF specification")]
pub enum QuantFormat {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

/// Size and identity of one block of a [`QuantFormat`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockLayout {
    /// Name as in GGUF tools (`Q4_K`).
    pub name: &'static str,
    /// Elements per block.
    pub elems: u32,
    /// Bytes per block.
    pub bytes: u32,
    /// `ggml_type` id in GGUF files.
    pub ggml_id: u32,
}

macro_rules! format_table {
    ($($variant:ident $name:literal $elems:literal $bytes:literal $id:literal;)*) => {
        impl QuantFormat {
            /// Every format, in table order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Name, block size and id of this format.
            pub const fn layout(self) -> BlockLayout {
                match self {
                    $(Self::$variant => BlockLayout { name: $name, elems: $elems, bytes: $bytes, ggml_id: $id },)*
                }
            }
        }
    };
}

// variant  name   elements  bytes  ggml id
format_table! {
    F32    "F32"      1    4  0;
    F16    "F16"      1    2  1;
    BF16   "BF16"     1    2 30;
    Q4_0   "Q4_0"    32   18  2;
    Q4_1   "Q4_1"    32   20  3;
    Q5_0   "Q5_0"    32   22  6;
    Q5_1   "Q5_1"    32   24  7;
    Q8_0   "Q8_0"    32   34  8;
    Q2_K   "Q2_K"   256   84 10;
    Q3_K   "Q3_K"   256  110 11;
    Q4_K   "Q4_K"   256  144 12;
    Q5_K   "Q5_K"   256  176 13;
    Q6_K   "Q6_K"   256  210 14;
    Q8_K   "Q8_K"   256  292 15;
    IQ4_NL "IQ4_NL"  32   18 20;
    IQ4_XS "IQ4_XS" 256  136 23;
    MXFP4  "MXFP4"   32   17 39;
}

/// `ggml_type` ids that exist but that Tierwise does not read, so that an error can name them.
const KNOWN_UNREAD: &[(u32, &str)] = &[
    (9, "Q8_1"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

impl QuantFormat {
    /// Name as in GGUF tools, e.g. `"Q4_K"`.
    pub const fn name(self) -> &'static str {
        self.layout().name
    }

    /// Format with this `ggml_type` id, if Tierwise reads it.
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|f| f.layout().ggml_id == id)
    }

    /// Name of a `ggml_type` id that is not in the table, for error messages.
    pub fn describe_ggml_id(id: u32) -> String {
        match KNOWN_UNREAD.iter().find(|(known, _)| *known == id) {
            Some((_, name)) => format!("{name} (ggml type {id})"),
            None => format!("ggml type {id}"),
        }
    }

    /// Bytes of one row of `cols` elements, or `None` when `cols` is not a whole number of blocks or overflows.
    pub const fn row_bytes(self, cols: u64) -> Option<u64> {
        let l = self.layout();
        if !cols.is_multiple_of(l.elems as u64) {
            return None;
        }
        (cols / l.elems as u64).checked_mul(l.bytes as u64)
    }

    /// Bytes of a tensor of this shape (outermost dimension first; blocks run along the last), or `None` as in [`Self::row_bytes`].
    pub fn tensor_bytes(self, shape: &[u64]) -> Option<Bytes> {
        let (cols, outer) = shape.split_last()?;
        let mut bytes = self.row_bytes(*cols)?;
        for d in outer {
            bytes = bytes.checked_mul(*d)?;
        }
        Some(Bytes(bytes))
    }

    /// Mean storage per element in bits.
    pub fn bits_per_element(self) -> f64 {
        let l = self.layout();
        f64::from(l.bytes) * 8.0 / f64::from(l.elems)
    }

    /// All names, separated by commas, for messages and `--help`.
    pub fn known_names() -> String {
        Self::ALL.iter().map(|f| f.name()).collect::<Vec<_>>().join(", ")
    }
}

impl std::fmt::Display for QuantFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for QuantFormat {
    type Err = CostError;

    fn from_str(s: &str) -> Result<Self, CostError> {
        Self::ALL
            .iter()
            .copied()
            .find(|f| f.name().eq_ignore_ascii_case(s))
            .ok_or_else(|| CostError::UnknownFormat { name: s.to_string(), known: Self::known_names() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names_are_unique_and_round_trip() {
        for (i, f) in QuantFormat::ALL.iter().enumerate() {
            assert_eq!(QuantFormat::from_ggml_id(f.layout().ggml_id), Some(*f));
            assert_eq!(f.name().parse::<QuantFormat>().as_ref(), Ok(f));
            for g in &QuantFormat::ALL[..i] {
                assert_ne!(f.layout().ggml_id, g.layout().ggml_id);
            }
        }
        assert!(KNOWN_UNREAD.iter().all(|(id, _)| QuantFormat::from_ggml_id(*id).is_none()));
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(QuantFormat::Q4_K.tensor_bytes(&[2, 3, 512]), Some(Bytes(2 * 3 * 288)));
        assert_eq!(QuantFormat::Q4_K.tensor_bytes(&[2, 128]), None);
        assert_eq!(QuantFormat::F32.tensor_bytes(&[u64::MAX, 8]), None);
        assert_eq!(QuantFormat::F32.tensor_bytes(&[]), None);
    }

    #[test]
    fn unread_types_are_named() {
        assert_eq!(QuantFormat::describe_ggml_id(16), "IQ2_XXS (ggml type 16)");
        assert_eq!(QuantFormat::describe_ggml_id(99), "ggml type 99");
    }
}
