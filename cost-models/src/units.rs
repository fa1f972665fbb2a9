//! Newtypes for sizes, rates and times, and their text forms.
//!
//! In files and on the command line a quantity is a string with a unit: `"24 GiB"`, `"64 GB/s"`, `"85 us"`, `"12.5 TFLOP/s"`.
//! GB = 1e9 and GiB = 2^30, never mixed; a bare number is refused, because nobody can know what it means.

use crate::error::CostError;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub u64);

/// A transfer rate in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct BytesPerS(pub f64);

/// An arithmetic rate in floating-point operations per second.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct FlopsPerS(pub f64);

/// A span of time in seconds.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct Seconds(pub f64);

/// An instant or span on the engine's clock, in nanoseconds. Integer, so that replays compare exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(transparent)]
pub struct Nanos(pub u64);

const SIZE_UNITS: &[(&str, f64)] = &[
    ("B", 1.0),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
    ("TiB", 1_099_511_627_776.0),
];
const TIME_UNITS: &[(&str, f64)] = &[("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("min", 60.0)];
const FLOP_UNITS: &[(&str, f64)] = &[("FLOP/s", 1.0), ("MFLOP/s", 1e6), ("GFLOP/s", 1e9), ("TFLOP/s", 1e12), ("PFLOP/s", 1e15)];

const SIZE_HINT: &str = "write a number and a unit, e.g. \"24 GiB\" (2^30) or \"24 GB\" (10^9)";
const RATE_HINT: &str = "write a number and a unit per second, e.g. \"64 GB/s\"";
const TIME_HINT: &str = "write a number and a unit, e.g. \"85 us\"";
const FLOP_HINT: &str = "write a number and a unit, e.g. \"12.5 TFLOP/s\"";

/// Splits `"24 GiB"` into 24.0 and `"GiB"`; the number must be finite and not negative.
fn split_quantity(text: &str) -> Option<(f64, &str)> {
    let t = text.trim();
    let at = t.find(|c: char| c.is_ascii_alphabetic() && !matches!(c, 'e' | 'E') || c == 'µ').unwrap_or(t.len());
    let value: f64 = t[..at].trim().parse().ok()?;
    (value.is_finite() && value >= 0.0).then_some((value, t[at..].trim()))
}

fn scale(units: &[(&str, f64)], unit: &str) -> Option<f64> {
    units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, s)| *s)
}

fn parse(text: &str, units: &[(&str, f64)], strip: &str, expected: &'static str, hint: &'static str) -> Result<f64, CostError> {
    let bad = || CostError::BadQuantity { text: text.to_string(), expected, hint };
    let (value, unit) = split_quantity(text).ok_or_else(bad)?;
    let unit = unit.strip_suffix(strip).ok_or_else(bad)?.trim();
    Ok(value * scale(units, unit).ok_or_else(bad)?)
}

impl std::str::FromStr for Bytes {
    type Err = CostError;
    fn from_str(s: &str) -> Result<Self, CostError> {
        // llama.cpp-style short forms ("24G", "512M") mean binary units, as users of these tools write them.
        let t = s.trim();
        if t == "0" {
            return Ok(Self(0));
        }
        let long = match t.char_indices().last() {
            Some((i, c)) if "KMGT".contains(c.to_ascii_uppercase()) && i > 0 => {
                format!("{}{}iB", &t[..i], c.to_ascii_uppercase())
            }
            _ => t.to_string(),
        };
        // Whole bytes are read as integers: an f64 would lose the last bits above 2^53.
        if let Some(Ok(whole)) = long.strip_suffix('B').map(|n| n.trim().parse::<u64>()) {
            return Ok(Self(whole));
        }
        let value = parse(&long, SIZE_UNITS, "", "a size", SIZE_HINT)?;
        if value >= u64::MAX as f64 {
            return Err(CostError::BadQuantity { text: s.to_string(), expected: "a size", hint: "the number is too large" });
        }
        Ok(Self(value.round() as u64))
    }
}

impl std::str::FromStr for BytesPerS {
    type Err = CostError;
    fn from_str(s: &str) -> Result<Self, CostError> {
        parse(s, SIZE_UNITS, "/s", "a transfer rate", RATE_HINT).map(Self)
    }
}

impl std::str::FromStr for FlopsPerS {
    type Err = CostError;
    fn from_str(s: &str) -> Result<Self, CostError> {
        parse(s, FLOP_UNITS, "", "an arithmetic rate", FLOP_HINT).map(Self)
    }
}

impl std::str::FromStr for Seconds {
    type Err = CostError;
    fn from_str(s: &str) -> Result<Self, CostError> {
        parse(s, TIME_UNITS, "", "a time", TIME_HINT).map(Self)
    }
}

/// Writes `value` with three or more significant digits and the largest unit that keeps it >= 1.
fn write_scaled(f: &mut fmt::Formatter<'_>, value: f64, units: &[(&str, f64)], suffix: &str) -> fmt::Result {
    let mut best = units[0];
    for u in units {
        if value >= u.1 && u.1 >= best.1 {
            best = *u;
        }
    }
    let v = value / best.1;
    let text = if (v - v.round()).abs() < 1e-9 * v.max(1.0) && v < 1e4 {
        format!("{v:.0} {}{suffix}", best.0)
    } else if v < 10.0 {
        format!("{v:.2} {}{suffix}", best.0)
    } else if v < 100.0 {
        format!("{v:.1} {}{suffix}", best.0)
    } else {
        format!("{v:.0} {}{suffix}", best.0)
    };
    f.pad(&text)
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const BINARY: &[(&str, f64)] =
            &[("B", 1.0), ("KiB", 1024.0), ("MiB", 1_048_576.0), ("GiB", 1_073_741_824.0), ("TiB", 1_099_511_627_776.0)];
        write_scaled(f, self.0 as f64, BINARY, "")
    }
}

impl fmt::Display for BytesPerS {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_scaled(f, self.0, &[("B", 1.0), ("KB", 1e3), ("MB", 1e6), ("GB", 1e9)], "/s")
    }
}

impl fmt::Display for FlopsPerS {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_scaled(f, self.0, FLOP_UNITS, "")
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_scaled(f, self.0, &[("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3), ("s", 1.0)], "")
    }
}

/// Text form that reads back to the same value: what goes into files.
trait Exact {
    fn exact(&self) -> String;
}

/// The largest of `units` (ascending) that divides `value` to a short decimal, else the smallest.
fn exact_text(value: f64, units: &[(&str, f64)], suffix: &str) -> String {
    for (name, s) in units.iter().rev() {
        let v = value / s;
        if v >= 1.0 && (v * 1e4).fract() == 0.0 && v * s == value {
            return format!("{v} {name}{suffix}");
        }
    }
    format!("{value} {}{suffix}", units[0].0)
}

impl Exact for Bytes {
    fn exact(&self) -> String {
        const UNITS: &[(&str, f64)] =
            &[("B", 1.0), ("KiB", 1024.0), ("MiB", 1_048_576.0), ("GiB", 1_073_741_824.0), ("TiB", 1_099_511_627_776.0)];
        if self.0 < (1 << 53) { exact_text(self.0 as f64, UNITS, "") } else { format!("{} B", self.0) }
    }
}
impl Exact for BytesPerS {
    fn exact(&self) -> String {
        exact_text(self.0, &[("B", 1.0), ("MB", 1e6), ("GB", 1e9)], "/s")
    }
}
impl Exact for FlopsPerS {
    fn exact(&self) -> String {
        exact_text(self.0, FLOP_UNITS, "")
    }
}
impl Exact for Seconds {
    fn exact(&self) -> String {
        format!("{} s", self.0)
    }
}

macro_rules! text_serde {
    ($($t:ty, $name:literal, $pattern:literal;)*) => {$(
        impl Serialize for $t {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.exact())
            }
        }
        impl<'de> Deserialize<'de> for $t {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
        impl schemars::JsonSchema for $t {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                $name.into()
            }
            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "description": concat!("a quantity such as ", $pattern) })
            }
        }
    )*};
}
text_serde! {
    Bytes, "Bytes", "\"24 GiB\"";
    BytesPerS, "BytesPerS", "\"64 GB/s\"";
    FlopsPerS, "FlopsPerS", "\"12.5 TFLOP/s\"";
    Seconds, "Seconds", "\"85 us\"";
}

impl Bytes {
    /// Zero bytes.
    pub const ZERO: Self = Self(0);

    /// `n` GiB (2^30).
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// `n` MiB (2^20).
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// The least size that is at least this one and that people read as it is: its text form parses to no less.
    #[must_use]
    pub fn rounded_up(self) -> Self {
        let unit = (0..=4u32).map(|i| 1u64 << (10 * i)).rfind(|u| self.0 >= *u).unwrap_or(1);
        let whole = self.0 / unit;
        let digits = if whole < 10 {
            100.0
        } else if whole < 100 {
            10.0
        } else {
            1.0
        };
        let value = (self.0 as f64 / unit as f64 * digits).ceil() / digits;
        Self((value * unit as f64).ceil() as u64)
    }

    /// The difference, or zero when `other` is larger.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl std::ops::Add for Bytes {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        Self(self.0 + o.0)
    }
}
impl std::ops::AddAssign for Bytes {
    fn add_assign(&mut self, o: Self) {
        self.0 += o.0;
    }
}
impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        Self(iter.map(|b| b.0).sum())
    }
}
impl std::ops::Div<BytesPerS> for Bytes {
    type Output = Seconds;
    fn div(self, rate: BytesPerS) -> Seconds {
        Seconds(self.0 as f64 / rate.0)
    }
}
impl Seconds {
    /// This span on the engine's integer clock, rounded up to a whole nanosecond, at most ~584 years.
    pub fn to_nanos(self) -> Nanos {
        Nanos((self.0 * 1e9).ceil().clamp(0.0, u64::MAX as f64) as u64)
    }
}
impl Nanos {
    /// This span in seconds.
    pub fn to_seconds(self) -> Seconds {
        Seconds(self.0 as f64 * 1e-9)
    }
}
impl std::ops::Add for Nanos {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        Self(self.0.saturating_add(o.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("24 GiB", 24 << 30),
            ("24GB", 24_000_000_000),
            ("1.5 KiB", 1536),
            ("8G", 8 << 30),
            ("512m", 512 << 20),
            ("0 B", 0),
            ("1e3 B", 1000),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        assert_eq!("64 GB/s".parse(), Ok(BytesPerS(64e9)));
        assert_eq!("85 us".parse::<Seconds>().unwrap().to_nanos(), Nanos(85_000));
        assert_eq!("12.5 TFLOP/s".parse(), Ok(FlopsPerS(12.5e12)));
    }

    #[test]
    fn refuses_what_is_unclear() {
        for text in ["24", "", "GiB", "-1 GiB", "NaN GiB", "inf GiB", "1e400 GiB", "24 apples", "24 GiB/s", "é"] {
            assert!(text.parse::<Bytes>().is_err(), "{text:?}");
        }
        for text in ["24 GiB", "64", "GB/s"] {
            assert!(text.parse::<BytesPerS>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn files_read_back_exactly() {
        for b in [0, 1, 1536, 24 << 30, 123_456_789, (1 << 53) + 1] {
            assert_eq!(Bytes(b).exact().parse(), Ok(Bytes(b)));
        }
        for r in [1.0, 25.6e9, 936.2e9, 1.0 / 3.0 * 1e9] {
            assert_eq!(BytesPerS(r).exact().parse(), Ok(BytesPerS(r)));
        }
    }

    #[test]
    fn rounded_up_sizes_print_as_no_less_than_they_are() {
        for b in [0, 1, 999, 1025, 6_857_345, 6_857_346, (10 << 20) - 1, 123_456_789, 99_999_999_999, (24 << 30) + 1] {
            let up = Bytes(b).rounded_up();
            let read: Bytes = up.to_string().parse().unwrap();
            assert!(up.0 >= b && read.0 >= b && read.0 as f64 <= b as f64 * 1.011 + 1.0, "{b}: {up}, read as {read:?}");
        }
    }

    #[test]
    fn prints_for_people() {
        assert_eq!(Bytes(24 << 30).to_string(), "24 GiB");
        assert_eq!(Bytes(1_500_000_000).to_string(), "1.40 GiB");
        assert_eq!(BytesPerS(936.2e9).to_string(), "936 GB/s");
        assert_eq!(Seconds(0.000_085).to_string(), "85 us");
    }
}
