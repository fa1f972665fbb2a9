//! What a plan is wanted for: context, batch, objective, budgets.
//!
//! `configs/workloads/*.toml` are requests with a name; command-line flags override their fields.

use crate::error::PlanError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tierwise_cost::machine::MemoryKind;
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::Bytes;

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
        }
    }
}

impl Request {
    /// Positions in the cache for which decode is priced: half of the context, the mean over filling it.
    pub const fn decode_past(&self) -> u32 {
        self.context / 2
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
