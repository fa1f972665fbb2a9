//! The study file: a question, what is given, what is swept. TOML; unknown keys are refused.
//!
//! ```toml
//! name = "which-gpu"
//! question = "Which card for Qwen3-30B-A3B?"
//! [base]
//! model = "qwen3-30b-a3b@Q4_K_M"
//! machine = "rtx4090-24g-ddr5-64g"
//! context = 8192
//! [sweep]
//! vram = { from = "8 GiB", to = "32 GiB", steps = 7 }
//! pcie_bandwidth = ["12 GB/s", "25 GB/s"]
//! ```

use super::point::{DEFAULT_FORMAT, Point};
use super::values::{Values, not_empty};
use crate::error::PlanError;
use crate::request::{Objective, Request};
use crate::serving::{Admission, Slo};
use serde::{Deserialize, Serialize};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::units::{Bytes, BytesPerS};

/// Most rows of a study.
pub const MOST_ROWS: usize = 5000;

/// A study.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// Name; of built-in studies the file's name.
    pub name: String,
    /// What is asked.
    pub question: String,
    /// What is the same in all rows.
    pub base: Base,
    /// What differs between rows: all combinations are tried.
    #[serde(default)]
    pub sweep: Sweep,
    /// What arriving requests are promised and how they are batched; used with `arrivals`.
    #[serde(default)]
    pub serving: ServingPart,
}

/// What is the same in all rows.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Base {
    /// Model by name or file; `name@FORMAT` also says the format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Weight format of a model without weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Machine by name or file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// Positions that each sequence may reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<u32>,
    /// Sequences decoded together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<u32>,
    /// Format of keys and values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv: Option<QuantFormat>,
    /// What is to be fast.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub objective: Option<Objective>,
    /// Tokens of a prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<u32>,
    /// Tokens of an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generated_tokens: Option<u32>,
    /// Tokens of a prompt computed at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk_tokens: Option<u32>,
    /// Budget of VRAM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vram: Option<Bytes>,
    /// Budget of host memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<Bytes>,
    /// Budget of CXL memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cxl: Option<Bytes>,
    /// Budget of disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<Bytes>,
    /// Trace of arriving requests: a file beside the study or the name of a built-in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arrivals: Option<String>,
}

/// What differs between rows. Sizes and rates change the machine: they are what one would install.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sweep {
    /// Models.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<Vec<String>>,
    /// Weight formats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Vec<String>>,
    /// Machines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<Vec<String>>,
    /// VRAM of all GPUs together; 0 for no GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vram: Option<Values<Bytes>>,
    /// Host memory of all sockets together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<Values<Bytes>>,
    /// CXL memory; 0 for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cxl: Option<Values<Bytes>>,
    /// Rate of the CXL memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cxl_bandwidth: Option<Values<BytesPerS>>,
    /// Rate of each link from host or CXL memory to a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pcie_bandwidth: Option<Values<BytesPerS>>,
    /// Rate of each socket's memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dram_bandwidth: Option<Values<BytesPerS>>,
    /// Contexts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<Values<u32>>,
    /// Batches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<Values<u32>>,
    /// Traces of arriving requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arrivals: Option<Vec<String>>,
}

/// How arriving requests are served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServingPart {
    /// What is promised.
    pub slo: Slo,
    /// Who may start.
    pub admission: Admission,
    /// Most requests in memory at once.
    pub max_running: u32,
    /// Most requests of the trace.
    pub max_requests: u32,
    /// Share of the memory for keys and values that `past_future` keeps for answers longer than predicted.
    pub reserve: f64,
    /// Seed of the predictions.
    pub seed: u64,
}

impl Default for ServingPart {
    fn default() -> Self {
        Self {
            slo: Slo::default(),
            admission: Admission::PastFuture,
            max_running: 64,
            max_requests: 2000,
            reserve: 0.03,
            seed: 1,
        }
    }
}

fn bad(field: &'static str, found: impl Into<String>, expected: impl Into<String>) -> PlanError {
    PlanError::BadRequest { field, found: found.into(), expected: expected.into() }
}

impl Study {
    /// Reads and checks the text of a study file.
    ///
    /// # Errors
    /// [`tierwise_cost::CostError::BadToml`] with line and column, or [`PlanError::BadRequest`] naming the key.
    pub fn from_toml(text: &str) -> Result<Self, PlanError> {
        let study: Self =
            toml::from_str(text).map_err(|e| tierwise_cost::CostError::BadToml { what: "study", message: e.to_string() })?;
        study.points()?;
        Ok(study)
    }

    /// What every row asks of the planner, before the sweep.
    pub fn request(&self) -> Request {
        let (b, d) = (&self.base, Request::default());
        let context = b.context.unwrap_or(d.context);
        let mut limits = d.limits;
        (limits.vram, limits.ram, limits.cxl, limits.disk) = (b.vram, b.ram, b.cxl, b.disk);
        Request {
            context,
            batch: b.batch.unwrap_or(d.batch),
            chunk_tokens: b.chunk_tokens.unwrap_or(d.chunk_tokens),
            prompt_tokens: b.prompt_tokens.unwrap_or(d.prompt_tokens),
            generated_tokens: b.generated_tokens.unwrap_or(d.generated_tokens),
            kv_format: b.kv.unwrap_or(d.kv_format),
            objective: b.objective.unwrap_or(d.objective),
            limits,
            popularity: d.popularity,
            slo: d.slo,
            no_cache: d.no_cache,
        }
    }

    /// All combinations, the first axis changing slowest: model, format, machine, vram, ram, cxl, cxl_bandwidth, pcie_bandwidth,
    /// dram_bandwidth, context, batch, arrivals.
    ///
    /// # Errors
    /// [`PlanError::BadRequest`] naming the key: nothing to study, a size given twice, too many rows, impossible serving limits.
    pub fn points(&self) -> Result<Vec<Point>, PlanError> {
        self.check()?;
        let (b, s, r) = (&self.base, &self.sweep, self.request());
        let names = |list: &Option<Vec<String>>, base: &Option<String>, axis| match (list, base) {
            (Some(list), _) => Ok(not_empty(list, axis)?.into_iter().map(Some).collect()),
            (None, base) => Ok::<_, PlanError>(vec![base.clone()]),
        };
        fn swept<T: super::values::Stepped>(v: &Option<Values<T>>, axis: &'static str) -> Result<Vec<Option<T>>, PlanError> {
            v.as_ref().map_or_else(|| Ok(vec![None]), |v| Ok(v.all(axis)?.into_iter().map(Some).collect()))
        }
        let numbers = |v: &Option<Values<u32>>, base: u32, axis| v.as_ref().map_or_else(|| Ok(vec![base]), |v| v.all(axis));
        let models = names(&s.model, &b.model, "sweep.model")?;
        let formats = names(&s.format, &b.format, "sweep.format")?;
        let machines = names(&s.machine, &b.machine, "sweep.machine")?;
        let vram = swept(&s.vram, "sweep.vram")?;
        let ram = swept(&s.ram, "sweep.ram")?;
        let cxl = swept(&s.cxl, "sweep.cxl")?;
        let cxl_bandwidth = swept(&s.cxl_bandwidth, "sweep.cxl_bandwidth")?;
        let pcie_bandwidth = swept(&s.pcie_bandwidth, "sweep.pcie_bandwidth")?;
        let dram_bandwidth = swept(&s.dram_bandwidth, "sweep.dram_bandwidth")?;
        let contexts = numbers(&s.context, r.context, "sweep.context")?;
        let batches = numbers(&s.batch, r.batch, "sweep.batch")?;
        let arrivals = names(&s.arrivals, &b.arrivals, "sweep.arrivals")?;
        let axes = [
            models.len(),
            formats.len(),
            machines.len(),
            vram.len(),
            ram.len(),
            cxl.len(),
            cxl_bandwidth.len(),
            pcie_bandwidth.len(),
            dram_bandwidth.len(),
            contexts.len(),
            batches.len(),
            arrivals.len(),
        ];
        let rows = axes.iter().try_fold(1_usize, |n, a| n.checked_mul(*a)).unwrap_or(usize::MAX);
        if rows > MOST_ROWS {
            return Err(bad(
                "sweep",
                format!("{rows} combinations"),
                format!("at most {MOST_ROWS}: fewer values, or two studies"),
            ));
        }
        let mut points = Vec::with_capacity(rows);
        for mut index in 0..rows {
            // Mixed radix, the last axis fastest.
            let mut at = [0; 12];
            for (digit, len) in at.iter_mut().zip(axes).rev() {
                *digit = index % len;
                index /= len;
            }
            let (model, tagged) = split_model(models[at[0]].as_deref().unwrap_or_default());
            let format = match (tagged, &formats[at[1]]) {
                (Some(tag), None) => tag.to_string(),
                (None, Some(format)) => format.clone(),
                (None, None) => DEFAULT_FORMAT.to_string(),
                (Some(tag), Some(format)) => {
                    return Err(bad(
                        "format",
                        format!("{format} and {model}@{tag}"),
                        "one format for a model: NAME@FORMAT or format",
                    ));
                }
            };
            points.push(Point {
                model: model.to_string(),
                format,
                machine: machines[at[2]].clone(),
                vram: vram[at[3]],
                ram: ram[at[4]],
                cxl: cxl[at[5]],
                cxl_bandwidth: cxl_bandwidth[at[6]],
                pcie_bandwidth: pcie_bandwidth[at[7]],
                dram_bandwidth: dram_bandwidth[at[8]],
                context: contexts[at[9]],
                batch: batches[at[10]],
                arrivals: arrivals[at[11]].clone(),
            });
        }
        Ok(points)
    }

    fn check(&self) -> Result<(), PlanError> {
        let (b, s) = (&self.base, &self.sweep);
        if self.name.trim().is_empty() {
            return Err(bad("name", "empty", "a name"));
        }
        if b.model.is_none() && s.model.is_none() {
            return Err(bad("base.model", "absent", "a model by name or file, here or in sweep.model"));
        }
        let twice = [
            ("sweep.vram", b.vram.is_some() && s.vram.is_some()),
            ("sweep.ram", b.ram.is_some() && s.ram.is_some()),
            ("sweep.cxl", b.cxl.is_some() && s.cxl.is_some()),
        ];
        if let Some((field, _)) = twice.into_iter().find(|t| t.1) {
            return Err(bad(
                field,
                "given besides the budget in base",
                "one of the two: sweep changes the machine, base limits its use",
            ));
        }
        let v = &self.serving;
        v.slo.check()?;
        if v.max_running == 0 || v.max_running > 4096 {
            return Err(bad("serving.max_running", v.max_running.to_string(), "1 to 4096"));
        }
        if v.max_requests == 0 {
            return Err(bad("serving.max_requests", "0", "at least 1"));
        }
        if !(0.0..0.5).contains(&v.reserve) {
            return Err(bad("serving.reserve", v.reserve.to_string(), "0 to 0.5"));
        }
        Ok(())
    }

    /// The axes with more than one value, by key, in the order of [`Study::points`].
    pub fn swept(&self) -> Vec<&'static str> {
        let s = &self.sweep;
        [
            ("model", s.model.is_some()),
            ("format", s.format.is_some()),
            ("machine", s.machine.is_some()),
            ("vram", s.vram.is_some()),
            ("ram", s.ram.is_some()),
            ("cxl", s.cxl.is_some()),
            ("cxl_bandwidth", s.cxl_bandwidth.is_some()),
            ("pcie_bandwidth", s.pcie_bandwidth.is_some()),
            ("dram_bandwidth", s.dram_bandwidth.is_some()),
            ("context", s.context.is_some()),
            ("batch", s.batch.is_some()),
            ("arrivals", s.arrivals.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, is)| is.then_some(name))
        .collect()
    }
}

/// `name@FORMAT` into its parts. An `@` in a folder's name is not a format.
fn split_model(model: &str) -> (&str, Option<&str>) {
    match model.rsplit_once('@') {
        Some((name, tag)) if !name.is_empty() && !tag.contains(['/', '\\', '.']) => (name, Some(tag)),
        _ => (model, None),
    }
}
