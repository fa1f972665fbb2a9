//! What a capacity study found, for people: text on the terminal, CSV, and one HTML file.
//!
//! * [`answer`]: the sentences that come first; [`text`], [`csv`], [`html`]: the three forms; [`plots`]: figures as inline SVG.

pub mod answer;
pub mod csv;
pub mod figures;
pub mod html;
pub mod plots;
pub mod text;

use serde::Serialize;
use tierwise_planner::capacity::{Point, Row};
use tierwise_planner::marginal::Marginal;

/// A study with all its results.
pub struct Study<'a> {
    pub study: &'a tierwise_planner::capacity::Study,
    pub rows: &'a [Row],
    pub pareto: &'a [Front],
    pub marginal: &'a [Marginals],
    /// What was opened, and where it is from.
    pub origins: &'a [(String, String)],
    /// Axes with more than one value.
    pub axes: &'a [&'static str],
}

/// The Pareto front of one model, at one context: what is wanted is not chosen, only what it is wanted from.
#[derive(Debug, Serialize)]
pub struct Front {
    /// Model and format.
    pub model: String,
    /// Positions that each sequence may reach.
    pub context: u32,
    /// Rows by rising speed of each user.
    pub rows: Vec<usize>,
}

/// Marginal values of one row.
#[derive(Debug, Serialize)]
pub struct Marginals {
    /// The row.
    pub row: usize,
    /// Its inputs for people.
    pub label: String,
    /// What each upgrade is worth.
    pub values: Vec<Marginal>,
}

/// Rows by model and format, in the order in which they appear.
pub fn by_model(rows: &[Row]) -> Vec<(String, Vec<&Row>)> {
    let mut groups: Vec<(String, Vec<&Row>)> = Vec::new();
    for row in rows {
        let name = format!("{} ({})", row.inputs.model, row.inputs.format);
        match groups.iter_mut().find(|g| g.0 == name) {
            Some(group) => group.1.push(row),
            None => groups.push((name, vec![row])),
        }
    }
    groups
}

/// The value of one axis of a point, for people.
pub fn value(p: &Point, axis: &str) -> String {
    fn text<T: std::fmt::Display>(v: Option<&T>) -> String {
        v.map_or_else(|| "-".into(), ToString::to_string)
    }
    match axis {
        "model" => p.model.clone(),
        "format" => p.format.clone(),
        "machine" => p.machine.clone().unwrap_or_else(|| "this machine".into()),
        "vram" => text(p.vram.as_ref()),
        "ram" => text(p.ram.as_ref()),
        "cxl" => text(p.cxl.as_ref()),
        "cxl_bandwidth" => text(p.cxl_bandwidth.as_ref()),
        "pcie_bandwidth" => text(p.pcie_bandwidth.as_ref()),
        "dram_bandwidth" => text(p.dram_bandwidth.as_ref()),
        "context" => p.context.to_string(),
        "batch" => p.batch.to_string(),
        "arrivals" => text(p.arrivals.as_ref()),
        _ => String::new(),
    }
}

/// The value of one axis as a number and its unit; `None` for names.
pub fn numeric(p: &Point, axis: &str) -> Option<f64> {
    let gib = |b: Option<tierwise_cost::units::Bytes>| b.map(|b| b.0 as f64 / f64::from(1_u32 << 30));
    let rate = |r: Option<tierwise_cost::units::BytesPerS>| r.map(|r| r.0 / 1e9);
    match axis {
        "vram" => gib(p.vram),
        "ram" => gib(p.ram),
        "cxl" => gib(p.cxl),
        "cxl_bandwidth" => rate(p.cxl_bandwidth),
        "pcie_bandwidth" => rate(p.pcie_bandwidth),
        "dram_bandwidth" => rate(p.dram_bandwidth),
        "context" => Some(f64::from(p.context)),
        "batch" => Some(f64::from(p.batch)),
        _ => None,
    }
}

/// An axis for people, with its unit for numbers.
pub const fn axis_title(axis: &str) -> &'static str {
    match axis.as_bytes() {
        b"model" => "model",
        b"format" => "format",
        b"machine" => "machine",
        b"vram" => "VRAM (GiB)",
        b"ram" => "host memory (GiB)",
        b"cxl" => "CXL memory (GiB)",
        b"cxl_bandwidth" => "CXL bandwidth (GB/s)",
        b"pcie_bandwidth" => "PCIe bandwidth (GB/s)",
        b"dram_bandwidth" => "DRAM bandwidth per socket (GB/s)",
        b"context" => "context (tokens)",
        b"batch" => "batch (sequences)",
        _ => "arrivals",
    }
}

/// An axis in a sentence.
pub const fn axis_word(axis: &str) -> &'static str {
    match axis.as_bytes() {
        b"vram" => "VRAM",
        b"ram" => "host memory",
        b"cxl" => "CXL memory",
        b"cxl_bandwidth" => "CXL",
        b"pcie_bandwidth" => "PCIe",
        b"dram_bandwidth" => "DRAM",
        b"context" => "context",
        b"batch" => "batch",
        _ => "",
    }
}

/// What tells a row from the others of its study: the swept values, with or without the model's name.
pub fn label(axes: &[&'static str], p: &Point, with_model: bool) -> String {
    let parts: Vec<String> = axes
        .iter()
        .filter(|a| with_model || !matches!(**a, "model" | "format"))
        .map(|a| match axis_word(a) {
            "" => value(p, a),
            word => format!("{word} {}", value(p, a)),
        })
        .collect();
    if parts.is_empty() { value(p, "machine") } else { parts.join(", ") }
}

/// Axes with more than one value, in the study's order.
pub fn axes(study: &tierwise_planner::capacity::Study, points: &[Point]) -> Vec<&'static str> {
    study.swept().into_iter().filter(|a| points.iter().any(|p| value(p, a) != value(&points[0], a))).collect()
}

/// A time for people.
pub fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.0} us", s * 1e6),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}
