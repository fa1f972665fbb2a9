//! What a study sweeps over: a list, or equal steps from one end to the other.

use crate::error::PlanError;
use serde::{Deserialize, Serialize};
use tierwise_cost::units::{Bytes, BytesPerS};

/// Values of one axis: `["8 GiB", "12 GiB"]` or `{ from = "8 GiB", to = "32 GiB", steps = 4 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a list of values, or { from = ..., to = ..., steps = N }; sizes and rates are strings with units")]
pub enum Values<T> {
    /// These.
    List(Vec<T>),
    /// `steps` values with equal distances, both ends included.
    Range(Range<T>),
}

/// Equal steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range<T> {
    /// First value.
    pub from: T,
    /// Last value.
    pub to: T,
    /// How many values.
    pub steps: u32,
}

/// A value that can be stepped.
pub trait Stepped: Clone {
    /// The value at `share` (0 to 1) of the way from `from` to `to`.
    fn between(from: &Self, to: &Self, share: f64) -> Self;
}

impl Stepped for u32 {
    fn between(from: &Self, to: &Self, share: f64) -> Self {
        (f64::from(*from) + share * (f64::from(*to) - f64::from(*from))).round() as Self
    }
}
impl Stepped for Bytes {
    fn between(from: &Self, to: &Self, share: f64) -> Self {
        // Whole MiB: what people can buy and read.
        let mib = f64::from(1_u32 << 20);
        let bytes = from.0 as f64 + share * (to.0 as f64 - from.0 as f64);
        if share == 0.0 {
            *from
        } else if share == 1.0 {
            *to
        } else {
            Self(((bytes / mib).round() * mib) as u64)
        }
    }
}
impl Stepped for BytesPerS {
    fn between(from: &Self, to: &Self, share: f64) -> Self {
        Self(from.0 + share * (to.0 - from.0))
    }
}

/// Most values of one axis.
const MOST_STEPS: u32 = 1000;

impl<T: Stepped> Values<T> {
    /// All values, in order. `axis` is the key for messages.
    ///
    /// # Errors
    /// [`PlanError::BadRequest`] for an empty list or an impossible number of steps.
    pub fn all(&self, axis: &'static str) -> Result<Vec<T>, PlanError> {
        match self {
            Self::List(list) => not_empty(list, axis),
            Self::Range(r) if r.steps == 0 || r.steps > MOST_STEPS => Err(PlanError::BadRequest {
                field: axis,
                found: format!("{} steps", r.steps),
                expected: format!("1 to {MOST_STEPS} steps"),
            }),
            Self::Range(r) if r.steps == 1 => Ok(vec![r.from.clone()]),
            Self::Range(r) => {
                let last = f64::from(r.steps - 1);
                Ok((0..r.steps).map(|i| T::between(&r.from, &r.to, f64::from(i) / last)).collect())
            }
        }
    }
}

/// A list that has something in it.
pub(super) fn not_empty<T: Clone>(list: &[T], axis: &'static str) -> Result<Vec<T>, PlanError> {
    if list.is_empty() {
        let expected = "at least one value, or no such key".into();
        return Err(PlanError::BadRequest { field: axis, found: "an empty list".into(), expected });
    }
    Ok(list.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_include_both_ends() {
        let range =
            |from: &str, to: &str, steps| Values::Range(Range { from: from.parse().unwrap(), to: to.parse().unwrap(), steps });
        let got: Vec<String> = range("8 GiB", "32 GiB", 4).all("sweep.vram").unwrap().iter().map(Bytes::to_string).collect();
        assert_eq!(got, ["8 GiB", "16 GiB", "24 GiB", "32 GiB"]);
        assert_eq!(range("8 GiB", "32 GiB", 1).all("sweep.vram").unwrap(), [Bytes::gib(8)]);
        assert!(range("8 GiB", "32 GiB", 0).all("sweep.vram").unwrap_err().to_string().contains("sweep.vram is 0 steps"));
        let n = Values::Range(Range { from: 1_u32, to: 10, steps: 4 });
        assert_eq!(n.all("sweep.batch").unwrap(), [1, 4, 7, 10]);
        assert!(Values::<u32>::List(vec![]).all("sweep.batch").is_err());
    }
}
