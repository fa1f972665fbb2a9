//! What a plan is wanted for: context, batch, objective, budgets.
//!
//! `configs/workloads/*.toml` are requests with a name; command-line flags override their fields.

use crate::error::PlanError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tierwise_cost::machine::MemoryKind;
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::{Bytes, Seconds};

/// What is to be fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Seconds per decode step.
    #[default]
    Decode,
    /// Seconds until the first token of a prompt.
    Prefill,
    /// Seconds for a whole request: prompt and generated tokens.
    Mix,
}

/// How often experts are used.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Popularity {
    /// All experts of a layer alike.
    #[default]
    Uniform,
    /// Share of the selections of each expert, from a trace: one list per MoE layer, each summing to 1.
    Shares(Vec<Vec<f64>>),
}

/// Latencies that a plan has to keep, under the same prices that it is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SloLimits {
    /// Time to the first token of the request's prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttft: Option<Seconds>,
    /// Time per output token of a sequence: a decode step, whatever the batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpot: Option<Seconds>,
}

impl SloLimits {
    /// Nothing has to be kept.
    pub const fn is_none(&self) -> bool {
        self.ttft.is_none() && self.tpot.is_none()
    }
}

/// The objective as weights: seconds of a decode step times `decode` plus seconds of the request's prompt times `prompt`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    /// Of a decode step.
    pub decode: f64,
    /// Of the prompt.
    pub prompt: f64,
}

impl Goal {
    /// Weighted seconds.
    pub fn of(self, step_s: f64, prompt_s: f64) -> f64 {
        self.decode * step_s + self.prompt * prompt_s
    }
}

/// Most bytes that may be used, per kind of memory; absent: all of it, less a reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// VRAM of all GPUs together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vram: Option<Bytes>,
    /// Host memory of all sockets together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram: Option<Bytes>,
    /// CXL memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cxl: Option<Bytes>,
    /// Disk from which experts may be read at run time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Bytes>,
    /// Host memory that may be page-locked: staging buffers, and experts that are copied to a GPU. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned: Option<Bytes>,
}

impl Limits {
    /// The limit for a kind of memory.
    pub const fn of(&self, kind: MemoryKind) -> Option<Bytes> {
        match kind {
            MemoryKind::Vram => self.vram,
            MemoryKind::Dram => self.ram,
            MemoryKind::Cxl => self.cxl,
            MemoryKind::Disk => self.disk,
        }
    }

    /// Sets the limit for a kind of memory.
    pub const fn set(&mut self, kind: MemoryKind, limit: Bytes) {
        match kind {
            MemoryKind::Vram => self.vram = Some(limit),
            MemoryKind::Dram => self.ram = Some(limit),
            MemoryKind::Cxl => self.cxl = Some(limit),
            MemoryKind::Disk => self.disk = Some(limit),
        }
    }

    /// The flag that sets it.
    pub const fn flag(kind: MemoryKind) -> &'static str {
        match kind {
            MemoryKind::Vram => "--vram",
            MemoryKind::Dram => "--ram",
            MemoryKind::Cxl => "--cxl",
            MemoryKind::Disk => "--disk",
        }
    }
}

/// What a plan is wanted for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Request {
    /// Positions that each sequence may reach.
    pub context: u32,
    /// Sequences decoded together.
    pub batch: u32,
    /// Tokens of a prompt computed at once.
    pub chunk_tokens: u32,
    /// Length of the prompt for which the time to the first token is predicted.
    pub prompt_tokens: u32,
    /// Tokens generated per request (objective `mix`).
    pub generated_tokens: u32,
    /// Format of keys and values in the cache.
    pub kv_format: QuantFormat,
    /// What is to be fast.
    pub objective: Objective,
    /// Budgets.
    pub limits: Limits,
    /// How often experts are used.
    pub popularity: Popularity,
    /// Latencies to keep.
    #[serde(skip_serializing_if = "SloLimits::is_none")]
    pub slo: SloLimits,
    /// Every expert is computed where it lies: no cache slots, which other engines do not have.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_cache: bool,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            context: 4096,
            batch: 1,
            chunk_tokens: 512,
            prompt_tokens: 512,
            generated_tokens: 128,
            kv_format: QuantFormat::F16,
            objective: Objective::Decode,
            limits: Limits::default(),
            popularity: Popularity::Uniform,
            slo: SloLimits::default(),
            no_cache: false,
        }
    }
}

impl Request {
    /// Positions in the cache for which decode is priced: half of the context, the mean over filling it.
    pub const fn decode_past(&self) -> u32 {
        self.context / 2
    }

    /// The objective as weights.
    pub fn goal(&self) -> Goal {
        match self.objective {
            Objective::Decode => Goal { decode: 1.0, prompt: 0.0 },
            Objective::Prefill => Goal { decode: 0.0, prompt: 1.0 },
            Objective::Mix => Goal { decode: f64::from(self.generated_tokens), prompt: 1.0 },
        }
    }

    pub(crate) fn check(&self, context_length: u32) -> Result<(), PlanError> {
        let range = |field, value: u32, max: u32| {
            if value == 0 || value > max {
                return Err(PlanError::BadRequest { field, found: value.to_string(), expected: format!("1 to {max}") });
            }
            Ok(())
        };
        range("context", self.context, context_length)?;
        range("batch", self.batch, 4096)?;
        range("chunk_tokens", self.chunk_tokens, 1 << 16)?;
        range("prompt_tokens", self.prompt_tokens, self.context)?;
        range("generated_tokens", self.generated_tokens, 1 << 24)?;
        for (field, limit) in [("slo ttft", self.slo.ttft), ("slo tpot", self.slo.tpot)] {
            if let Some(Seconds(s)) = limit
                && !(s.is_finite() && s > 0.0)
            {
                return Err(PlanError::BadRequest { field, found: format!("{s} s"), expected: "a time above 0".into() });
            }
        }
        if !matches!(self.kv_format, QuantFormat::F32 | QuantFormat::F16 | QuantFormat::BF16 | QuantFormat::Q8_0) {
            return Err(PlanError::BadRequest {
                field: "kv_format",
                found: self.kv_format.to_string(),
                expected: "F32, F16, BF16 or Q8_0".into(),
            });
        }
        Ok(())
    }
}

/// A request with a name: `configs/workloads/*.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Name; the file's name.
    pub name: String,
    /// What it stands for.
    pub note: String,
    /// The request.
    pub request: Request,
}

impl Workload {
    /// Reads the text of a workload file.
    ///
    /// # Errors
    /// [`tierwise_cost::CostError::BadToml`] with line and column.
    pub fn from_toml(text: &str) -> Result<Self, PlanError> {
        toml::from_str(text).map_err(|e| tierwise_cost::CostError::BadToml { what: "workload", message: e.to_string() }.into())
    }
}
