//! Plans in the words of other engines, with what is lost, and back.
//!
//! * [`ep`]: placements over devices for SGLang, TensorRT-LLM and vLLM-Ascend, and importers of the same;
//! * [`llama_cpp`], [`kt_kernel`], [`kt_yaml`], [`mistralrs`]: plans over the memories of one machine; [`import`]: the same read back;
//! * [`pattern`]: the regular expressions that these contain, matched as their targets match them.
//!
//! Each target's own checks are written again here and every export passes through them. Formats are those of the version that
//! [`Exported::written_for`] names.

pub mod ep;
pub mod import;
pub mod kt_kernel;
pub mod kt_yaml;
pub mod llama_cpp;
pub mod mistralrs;
pub mod pattern;

use crate::error::PlanError;
use crate::plan::Plan;
use serde::Serialize;
use tierwise_cost::machine::{MemoryKind, ProcessorKind};
use tierwise_cost::units::Bytes;

/// A plan for another engine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Exported {
    /// The engine.
    pub target: &'static str,
    /// Whose formats and flags these are.
    pub written_for: &'static str,
    /// The file, if the target takes one.
    #[serde(skip)]
    pub content: Option<Content>,
    /// The command line; `{file}` stands for the file's path, `{model}` for the model's.
    pub command: String,
    /// What the target cannot say.
    pub loss: Loss,
    /// For plans over the memories of one machine: the experts that the target will compute on the GPU. `[moe layers][experts]`
    #[serde(skip)]
    pub on_gpu: Vec<Vec<bool>>,
}

/// A file's content.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Text.
    Text(String),
    /// PyTorch's `{"logical_count": int64 [1, layers, experts]}`, which the runtime writes.
    LogicalCount {
        /// Number of layers.
        layers: usize,
        /// Experts per layer.
        experts: usize,
        /// `[layers][experts]`
        counts: Vec<i64>,
    },
}

/// What is lost on the way.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Loss {
    /// In words.
    pub notes: Vec<String>,
    /// Sum of mean loads / sum of largest, tokens divided as the plan means it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balancedness_planned: Option<f64>,
    /// The same as the target divides them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balancedness_exported: Option<f64>,
    /// Experts that are on another processor than planned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts_elsewhere: Option<u64>,
    /// Their bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_elsewhere: Option<u64>,
    /// Experts planned in memory of the GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts_on_gpu_planned: Option<u64>,
    /// Experts that the target will have there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts_on_gpu_exported: Option<u64>,
}

pub(crate) fn cannot<T>(
    target: &'static str,
    field: impl Into<String>,
    found: &dyn std::fmt::Display,
    expected: impl Into<String>,
) -> Result<T, PlanError> {
    Err(PlanError::CannotExport { target, field: field.into(), found: found.to_string(), expected: expected.into() })
}

/// Where a plan has each expert, as far as engines with one GPU and host memory can tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TwoTiers {
    /// Layers of the model with experts, ascending.
    pub layers: Vec<u32>,
    /// Bytes of one expert. `[moe layers]`
    pub expert_bytes: Vec<Bytes>,
    /// Computed by a GPU from its own memory. `[moe layers][experts]`
    pub on_gpu: Vec<Vec<bool>>,
    /// Experts that lie on disk or in cache slots.
    pub cached: u64,
    /// Does a GPU lead?
    pub has_gpu: bool,
}

impl TwoTiers {
    /// Of a plan.
    ///
    /// # Errors
    /// [`PlanError::CannotExport`] when runs are not those of a checked plan.
    pub fn new(plan: &Plan, target: &'static str) -> Result<Self, PlanError> {
        let mut out = Self {
            layers: Vec::new(),
            expert_bytes: Vec::new(),
            on_gpu: Vec::new(),
            cached: 0,
            has_gpu: plan.main.executor_kind == ProcessorKind::Gpu,
        };
        for layer in &plan.layers {
            let mut row = Vec::new();
            for run in &layer.runs {
                let Some(tier) = plan.tiers.get(run.tier as usize) else {
                    return cannot(
                        target,
                        format!("a tier of layer {}", layer.layer),
                        &run.tier,
                        format!("below {}", plan.tiers.len()),
                    );
                };
                if run.first as usize != row.len() || run.count > 1 << 16 {
                    return cannot(
                        target,
                        format!("a run of layer {}", layer.layer),
                        &run.first,
                        format!("from expert {}", row.len()),
                    );
                }
                let gpu = tier.executor_kind == ProcessorKind::Gpu && tier.kind == MemoryKind::Vram && tier.through.is_none();
                if tier.through.is_some() {
                    out.cached += u64::from(run.count);
                }
                row.resize(row.len() + run.count as usize, gpu);
            }
            if row.is_empty() {
                return cannot(target, format!("the experts of layer {}", layer.layer), &0, "one or more");
            }
            out.layers.push(layer.layer);
            out.expert_bytes.push(layer.expert_bytes);
            out.on_gpu.push(row);
        }
        if out.layers.is_empty() {
            return cannot(target, "the layers with experts", &0, "one or more: this plan has nothing to place");
        }
        Ok(out)
    }

    /// Experts on the GPU in layer `i` of the list.
    pub fn gpu_count(&self, i: usize) -> usize {
        self.on_gpu[i].iter().filter(|g| **g).count()
    }

    /// Whole layers on the GPU: those with the most experts there, late ones first among equals, while the planned bytes last.
    pub(crate) fn whole_layers(&self) -> Vec<bool> {
        let bytes = |i: usize| self.expert_bytes[i].0 * self.on_gpu[i].len() as u64;
        let mut budget: u64 = (0..self.layers.len()).map(|i| self.expert_bytes[i].0 * self.gpu_count(i) as u64).sum();
        let mut order: Vec<usize> = (0..self.layers.len()).collect();
        order.sort_by_key(|i| (std::cmp::Reverse(self.gpu_count(*i)), std::cmp::Reverse(*i)));
        let mut gpu = vec![false; self.layers.len()];
        for i in order {
            gpu[i] = self.has_gpu && budget >= bytes(i);
            if gpu[i] {
                budget -= bytes(i);
            }
        }
        gpu
    }

    /// The loss against what another placement has.
    pub(crate) fn loss(&self, other: &[Vec<bool>]) -> Loss {
        let (mut experts, mut bytes) = (0, 0);
        for ((mine, theirs), size) in self.on_gpu.iter().zip(other).zip(&self.expert_bytes) {
            let differ = mine.iter().zip(theirs).filter(|(a, b)| a != b).count() as u64;
            experts += differ;
            bytes += differ * size.0;
        }
        let count = |rows: &[Vec<bool>]| rows.iter().flatten().filter(|g| **g).count() as u64;
        let mut loss = Loss {
            experts_elsewhere: Some(experts),
            bytes_elsewhere: Some(bytes),
            experts_on_gpu_planned: Some(count(&self.on_gpu)),
            experts_on_gpu_exported: Some(count(other)),
            ..Loss::default()
        };
        if self.cached > 0 {
            loss.notes.push(format!(
                "{} experts are planned to be loaded into cache slots before use: the target has no such cache, they stay in host memory (or in the page cache over the file); `plan --no-cache` places without",
                self.cached
            ));
        }
        loss
    }
}
