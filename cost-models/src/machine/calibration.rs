//! What `calibrate` measured on a machine: the samples as they were taken, with their spread.
//!
//! A machine's rates say what its memory and arithmetic can do; these samples say what this program's own kernels do with them, at
//! the sizes that decode and prefill ask for. [`crate::cost::Calibrated`] interpolates them. Every list is sorted by its keys, so
//! that a file can be read by people and a look-up needs no sorting.

use super::Machine;
use crate::error::CostError;
use crate::quant::QuantFormat;
use serde::{Deserialize, Serialize};

/// Several runs of one measurement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// The middle run.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// How many runs.
    pub runs: u32,
}

impl Spread {
    /// Of some runs; `None` without any, or when one is not a positive finite number.
    pub fn of(runs: &[f64]) -> Option<Self> {
        let mut sorted = runs.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (first, last) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], sorted[middle]) } else { sorted[middle] };
        (first.is_finite() && first > 0.0 && last.is_finite()).then_some(Self {
            median,
            min: first,
            max: last,
            runs: u32::try_from(sorted.len()).unwrap_or(u32::MAX),
        })
    }

    /// (max - min) / median.
    pub fn relative(&self) -> f64 {
        (self.max - self.min) / self.median
    }

    /// Every number times `factor`.
    #[must_use]
    pub fn times(&self, factor: f64) -> Self {
        Self { median: self.median * factor, min: self.min * factor, max: self.max * factor, runs: self.runs }
    }

    fn fault(&self) -> Option<(&'static str, String)> {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        [("median", self.median), ("min", self.min), ("max", self.max)]
            .into_iter()
            .find(|(_, x)| !positive(*x))
            .map(|(name, x)| (name, x.to_string()))
            .or_else(|| (self.min > self.median || self.median > self.max).then(|| ("median", self.median.to_string())))
            .or_else(|| (self.runs == 0).then(|| ("runs", "0".to_string())))
    }
}

/// Reading memory with the float dot product.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReadSample {
    /// NUMA node that the memory and the threads were on; absent when they were spread over all nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<u32>,
    /// Threads.
    pub threads: u32,
    /// 10^9 bytes per second.
    pub gb_per_s: Spread,
}

/// One layer's routed experts, computed as the runtime does: gate, up, activation, down, weighted sum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertSample {
    /// Format of all three matrices.
    pub format: QuantFormat,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width inside an expert.
    pub inner: u32,
    /// Mean number of tokens per expert.
    pub tokens: f64,
    /// Distinct experts computed in one go.
    pub distinct: f64,
    /// Microseconds for all of them.
    pub us: Spread,
}

/// A product of activations with a matrix that is not an expert's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatmulSample {
    /// Format of the matrix.
    pub format: QuantFormat,
    /// Its rows.
    pub rows: u32,
    /// Its columns.
    pub cols: u32,
    /// Tokens.
    pub tokens: f64,
    /// Microseconds.
    pub us: Spread,
}

/// Attention over cached keys and values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionSample {
    /// Operations per byte of keys and values read: the key of the list. It tells one token from many, and query heads that share
    /// a key head from those that do not.
    pub flops_per_byte: f64,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// New tokens.
    pub tokens: u32,
    /// Positions that were in the cache before them.
    pub past: u32,
    /// Bytes of keys and values read, counted as [`crate::cost::op_work`] does.
    pub kv_bytes: f64,
    /// Microseconds.
    pub us: Spread,
}

/// Norms, rotations, residual sums and the router's choice of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmallSample {
    /// Elements passed over, counted as [`crate::cost::Work::activations`] does.
    pub elements: f64,
    /// Microseconds.
    pub us: Spread,
}

/// Reading a file past the page cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSample {
    /// Reads under way at the same time.
    pub depth: u32,
    /// Bytes per read.
    pub block: u64,
    /// 10^9 bytes per second.
    pub gb_per_s: Spread,
}

/// One memory of a machine with several, measured where its pages were bound to its nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSample {
    /// Id of the memory.
    pub memory: String,
    /// Threads that read and computed, all of them.
    pub threads: u32,
    /// Reading with the float dot product, 10^9 bytes per second.
    pub gb_per_s: Spread,
    /// A load that waits for the one before (pointer chase), in nanoseconds.
    pub latency_ns: Spread,
    /// Routed experts at one token each, computed from this memory: 10^9 bytes of weights per second.
    pub expert_gb_per_s: Spread,
    /// While as many threads read the home memory as read this one: 10^9 bytes per second of this memory and of the home memory.
    /// Absent for the home memory itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contended_gb_per_s: Option<[Spread; 2]>,
}

/// Copying from one node of host memory into the GPU's, where there are several nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopySample {
    /// The node.
    pub node: u32,
    /// Id of the memory that it is, or is part of.
    pub memory: String,
    /// The GPU hangs on this node; absent where the firmware does not say, or of several GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub near: Option<bool>,
    /// 10^9 bytes per second.
    pub gb_per_s: Spread,
}

/// All samples of one run of `calibrate`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Day, as `2026-11-21`.
    pub date: String,
    /// Program and version that measured.
    pub program: String,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Threads that computed.
    pub threads: u32,
    /// Kernels that computed, e.g. `avx512`.
    pub kernels: String,
    /// Id of the processor.
    pub processor: String,
    /// Id of the memory that it computed from.
    pub memory: String,
    /// Id of the disk that was read; absent when none could be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_memory: Option<String>,
    /// What was not measured, and why; what disturbed.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Waking all threads and waiting for them, in microseconds.
    pub launch_us: Spread,
    /// By node and threads.
    pub read: Vec<ReadSample>,
    /// By format, tokens and distinct experts.
    pub experts: Vec<ExpertSample>,
    /// By format and tokens.
    pub matmuls: Vec<MatmulSample>,
    /// By operations per byte.
    pub attention: Vec<AttentionSample>,
    /// By elements.
    pub small: Vec<SmallSample>,
    /// By depth and block; empty when the disk was not measured.
    #[serde(default)]
    pub disk: Vec<DiskSample>,
    /// By memory, in the machine's order; empty where host memory is one node or not bound to nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<NodeSample>,
    /// By node; empty without a GPU, or where host memory is one node. Plans price by the links, which say the same by memory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copies: Vec<CopySample>,
}

impl Calibration {
    /// Median of (max - min) / median over all samples of computation: how quiet the machine was.
    pub fn noise(&self) -> f64 {
        let mut spreads: Vec<f64> = self
            .experts
            .iter()
            .map(|s| &s.us)
            .chain(self.matmuls.iter().map(|s| &s.us))
            .chain(self.attention.iter().map(|s| &s.us))
            .map(Spread::relative)
            .collect();
        spreads.sort_by(f64::total_cmp);
        spreads.get(spreads.len() / 2).copied().unwrap_or(0.0)
    }

    /// What a plan depends on: threads, keys and medians.
    pub(super) fn identity(&self) -> String {
        let rows = [
            self.read.iter().map(|s| format!("{:?} {} {}", s.node, s.threads, s.gb_per_s.median)).collect::<Vec<_>>(),
            self.experts
                .iter()
                .map(|s| format!("{} {} {} {} {} {}", s.format, s.hidden, s.inner, s.tokens, s.distinct, s.us.median))
                .collect(),
            self.matmuls.iter().map(|s| format!("{} {} {} {} {}", s.format, s.rows, s.cols, s.tokens, s.us.median)).collect(),
            self.attention.iter().map(|s| format!("{} {} {}", s.flops_per_byte, s.kv_bytes, s.us.median)).collect(),
            self.small.iter().map(|s| format!("{} {}", s.elements, s.us.median)).collect(),
            self.disk.iter().map(|s| format!("{} {} {}", s.depth, s.block, s.gb_per_s.median)).collect(),
        ];
        let mut rows: Vec<String> = rows.into_iter().map(|list| list.join(",")).collect();
        if !self.nodes.is_empty() {
            let node = |s: &NodeSample| format!("{} {} {}", s.memory, s.gb_per_s.median, s.expert_gb_per_s.median);
            rows.push(self.nodes.iter().map(node).collect::<Vec<_>>().join(","));
        }
        format!("{} {} {} {:?} {}", self.threads, self.processor, self.memory, self.disk_memory, rows.join(";"))
    }

    /// Checks names, numbers and order.
    ///
    /// # Errors
    /// [`CostError::BadMachine`] naming the field, e.g. `calibration.experts[3].us.median`.
    pub(super) fn check(&self, machine: &Machine) -> Result<(), CostError> {
        let bad = |field: &str, found: String, expected: &str| {
            Err(CostError::BadMachine {
                machine: machine.name.clone(),
                field: format!("calibration.{field}"),
                found,
                expected: expected.to_string(),
            })
        };
        for (name, text) in [("date", &self.date), ("program", &self.program), ("kernels", &self.kernels)] {
            if text.trim().is_empty() {
                return bad(name, "empty".into(), "a text");
            }
        }
        if !(self.seconds.is_finite() && self.seconds >= 0.0) {
            return bad("seconds", self.seconds.to_string(), "a time that is not negative");
        }
        if self.threads == 0 {
            return bad("threads", "0".into(), "at least 1");
        }
        let Some(p) = machine.processor(&self.processor) else {
            return bad("processor", format!("{:?}", self.processor), "the id of one of the processors");
        };
        if !p.computes_from.contains(&self.memory) {
            return bad("memory", format!("{:?}", self.memory), &format!("one of those that {} computes from", p.id));
        }
        match &self.disk_memory {
            Some(id) if machine.memory(id).is_none() => {
                return bad("disk_memory", format!("{id:?}"), "the id of one of the memories");
            }
            None if !self.disk.is_empty() => return bad("disk_memory", "absent".into(), "the disk that the samples are of"),
            _ => {}
        }
        if let Some((part, found)) = self.launch_us.fault() {
            return bad(&format!("launch_us.{part}"), found, SPREAD);
        }
        self.check_nodes(machine)?;
        // (list, may be empty, keys and spread of each sample)
        let lists: [(&str, bool, Vec<Row<'_>>); 6] = [
            (
                "read",
                false,
                self.read
                    .iter()
                    .map(|s| {
                        Row::new(
                            &[s.node.map_or(-1.0, f64::from), f64::from(s.threads)],
                            &[("threads", f64::from(s.threads))],
                            "gb_per_s",
                            &s.gb_per_s,
                        )
                    })
                    .collect(),
            ),
            (
                "experts",
                false,
                self.experts
                    .iter()
                    .map(|s| {
                        Row::new(
                            &[f64::from(s.format as u8), s.tokens, s.distinct],
                            &[
                                ("hidden", f64::from(s.hidden)),
                                ("inner", f64::from(s.inner)),
                                ("tokens", s.tokens),
                                ("distinct", s.distinct),
                            ],
                            "us",
                            &s.us,
                        )
                    })
                    .collect(),
            ),
            (
                "matmuls",
                false,
                self.matmuls
                    .iter()
                    .map(|s| {
                        Row::new(
                            &[f64::from(s.format as u8), s.tokens],
                            &[("rows", f64::from(s.rows)), ("cols", f64::from(s.cols)), ("tokens", s.tokens)],
                            "us",
                            &s.us,
                        )
                    })
                    .collect(),
            ),
            (
                "attention",
                false,
                self.attention
                    .iter()
                    .map(|s| {
                        Row::new(
                            &[s.flops_per_byte],
                            &[("flops_per_byte", s.flops_per_byte), ("kv_bytes", s.kv_bytes)],
                            "us",
                            &s.us,
                        )
                    })
                    .collect(),
            ),
            (
                "small",
                false,
                self.small.iter().map(|s| Row::new(&[s.elements], &[("elements", s.elements)], "us", &s.us)).collect(),
            ),
            (
                "disk",
                true,
                self.disk
                    .iter()
                    .map(|s| {
                        Row::new(
                            &[f64::from(s.depth), s.block as f64],
                            &[("depth", f64::from(s.depth)), ("block", s.block as f64)],
                            "gb_per_s",
                            &s.gb_per_s,
                        )
                    })
                    .collect(),
            ),
        ];
        for (list, may_be_empty, rows) in &lists {
            if rows.is_empty() && !may_be_empty {
                return bad(list, "no sample".into(), "at least one");
            }
            for (i, row) in rows.iter().enumerate() {
                if let Some((name, value)) = row.numbers.iter().find(|(_, x)| !(x.is_finite() && *x > 0.0)) {
                    return bad(&format!("{list}[{i}].{name}"), value.to_string(), "a positive finite number");
                }
                if let Some((part, found)) = row.spread.fault() {
                    return bad(&format!("{list}[{i}].{}.{part}", row.spread_name), found, SPREAD);
                }
                if i > 0 && rows[i - 1].keys.partial_cmp(&row.keys) != Some(std::cmp::Ordering::Less) {
                    return bad(
                        &format!("{list}[{i}]"),
                        "a sample out of order or given twice".into(),
                        "samples ascending by their keys",
                    );
                }
            }
        }
        Ok(())
    }
}

impl Calibration {
    /// Memories that there are, each once, with numbers that can be.
    fn check_nodes(&self, machine: &Machine) -> Result<(), CostError> {
        let bad = |field: String, found: String, expected: &str| {
            let field = format!("calibration.nodes{field}");
            Err(CostError::BadMachine { machine: machine.name.clone(), field, found, expected: expected.to_string() })
        };
        for (i, s) in self.nodes.iter().enumerate() {
            if machine.memory(&s.memory).is_none() || self.nodes[..i].iter().any(|o| o.memory == s.memory) {
                return bad(format!("[{i}].memory"), format!("{:?}", s.memory), "the id of one of the memories, each once");
            }
            if s.threads == 0 {
                return bad(format!("[{i}].threads"), "0".into(), "at least 1");
            }
            let own = [("gb_per_s", &s.gb_per_s), ("latency_ns", &s.latency_ns), ("expert_gb_per_s", &s.expert_gb_per_s)];
            let contended = s.contended_gb_per_s.iter().flatten().map(|spread| ("contended_gb_per_s", spread));
            for (name, spread) in own.into_iter().chain(contended) {
                if let Some((part, found)) = spread.fault() {
                    return bad(format!("[{i}].{name}.{part}"), found, SPREAD);
                }
            }
        }
        for (i, s) in self.copies.iter().enumerate() {
            let bad = |field: &str, found: String, expected: &str| {
                let field = format!("calibration.copies[{i}].{field}");
                Err(CostError::BadMachine { machine: machine.name.clone(), field, found, expected: expected.to_string() })
            };
            if machine.memory(&s.memory).is_none() {
                return bad("memory", format!("{:?}", s.memory), "the id of one of the memories");
            }
            if let Some((part, found)) = s.gb_per_s.fault() {
                return bad(&format!("gb_per_s.{part}"), found, SPREAD);
            }
        }
        Ok(())
    }
}

const SPREAD: &str = "positive finite numbers with min <= median <= max, of at least one run";

/// One sample as the checks see it.
struct Row<'a> {
    /// What the list is sorted by.
    keys: Vec<f64>,
    /// What has to be positive.
    numbers: Vec<(&'static str, f64)>,
    spread_name: &'static str,
    spread: &'a Spread,
}

impl<'a> Row<'a> {
    fn new(keys: &[f64], numbers: &[(&'static str, f64)], spread_name: &'static str, spread: &'a Spread) -> Self {
        Self { keys: keys.to_vec(), numbers: numbers.to_vec(), spread_name, spread }
    }
}
