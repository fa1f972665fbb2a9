//! Everything the formulas need of a run, after all look-ups: the description as numbers.
//!
//! Nothing measured enters. What a prior had to stand in for is kept, because it decides how far the prediction can be trusted.

use super::geometry::{Mixer, Shape};
use super::host::{Cards, Host, RamSource};
use super::placement::{self, CpuExperts};
use super::rows::Run;
use super::tables::{Quant, kv_bytes};

/// How much of what the time depends on is stated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub enum Tier {
    /// All of it.
    A,
    /// A prior stands in for the bandwidth of host memory.
    B,
}

/// Which published intervals apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum IntervalClass {
    /// Tier A with a GPU and one socket.
    GpuOrHybrid,
    /// Tier A, all on the CPU or over several sockets.
    CpuOrNuma,
    /// Tier B, the processor is named.
    CpuNamed,
    /// Tier B, it is not.
    CpuUnnamed,
}

impl IntervalClass {
    /// Every class.
    pub const ALL: [Self; 4] = [Self::GpuOrHybrid, Self::CpuOrNuma, Self::CpuNamed, Self::CpuUnnamed];
}

/// A run as numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Inputs {
    /// The model.
    pub shape: Shape,
    /// Bits per weight of routed experts.
    pub expert_bits: f64,
    /// Bits per weight of everything else.
    pub dense_bits: f64,
    /// The experts' format is a codebook format.
    pub codebook: bool,
    /// Experts on the CPU.
    pub experts: CpuExperts,
    /// Layers wholly on the CPU.
    pub cpu_layers: f64,
    /// The output projection is on the CPU.
    pub head_on_cpu: bool,
    /// Cards, if any.
    pub cards: Option<Cards>,
    /// Processors and host memory.
    pub host: Host,
    /// Mean number of cached positions while decoding.
    pub depth: f64,
    /// Bytes per cached element.
    pub kv_bytes: f64,
    /// Cached elements per position and layer.
    pub kv_elements: f64,
    /// The cache is quantised.
    pub kv_quantised: bool,
    /// Engine with kernels of ik_llama.cpp.
    pub ik: bool,
    /// Engine that keeps a copy of the weights per socket.
    pub ktransformers: bool,
    /// Placement class.
    pub class: &'static str,
}

/// Mean bits per weight of experts and of the rest. The file's size, if stated, fixes the experts' mean.
pub fn bits(run: &Run, shape: Option<&Shape>) -> Option<(f64, f64, bool)> {
    let quant = Quant::named(run.quant.as_deref()?)?;
    let stated = quant.expert_bits;
    let accounted = run.file_gib.zip(shape).map(|(gib, shape)| {
        let rest = shape.other_weights() * quant.dense_bits;
        (gib * 1_073_741_824.0 * 8.0 - rest) / shape.routed_weights()
    });
    // A size that contradicts the name belongs to another variant of the file.
    let experts = accounted.filter(|b| (0.75 * stated < *b) && (*b < 1.33 * stated)).unwrap_or(stated);
    Some((experts, quant.dense_bits, quant.codebook))
}

impl Inputs {
    /// The run as numbers, or what is missing. `beyond`: shapes of models that are not in the table of published ones.
    pub fn of(run: &Run, beyond: &dyn Fn(&str) -> Option<Shape>) -> Result<Self, String> {
        let name = run.model.as_deref().ok_or("model not stated")?;
        let shape =
            Shape::published(name).cloned().or_else(|| beyond(name)).ok_or_else(|| format!("model {name:?} is not known"))?;
        let (expert_bits, dense_bits, codebook) = bits(run, Some(&shape)).ok_or_else(|| match &run.quant {
            Some(q) => format!("quantisation {q:?} is not known"),
            None => "quantisation not stated".to_string(),
        })?;
        let cards = Cards::of(run).map_err(|name| format!("GPU {name:?} is not known"))?;
        let mut experts = placement::cpu_experts(run, &shape, Some(expert_bits)).ok_or("placement not stated")?;
        let class = placement::class(run, &shape);
        let ngl = run.ngl.unwrap_or(u32::MAX);
        let cpu_layers = if class == "cpu_only" || cards.is_none() { shape.layers } else { shape.layers.saturating_sub(ngl) };
        if cpu_layers > 0 {
            let layers = experts.layers.max(f64::from(cpu_layers.min(shape.moe_layers)));
            experts = CpuExperts { layers, round_trips: layers };
        }
        let engine = run.engine.as_deref().unwrap_or_default();
        let (ik, ktransformers) = (engine == "ik_llama.cpp", engine == "kTransformers");
        let prompt_first = run.bench.as_deref() == Some("llama-server") || ktransformers;
        let start = run.ctx_depth.or(run.prompt_len.filter(|_| prompt_first)).unwrap_or(0);
        // This engine's builds without `-mla` cache the heads of this model expanded.
        let expanded = shape.mixer == Mixer::Latent && ik && shape.name.contains("V2-Lite");
        let kv_elements = if expanded && !run.flags.as_deref().unwrap_or_default().contains("-mla") {
            16.0 * (192.0 + 128.0)
        } else {
            shape.kv_elements
        };
        Ok(Self {
            expert_bits,
            dense_bits,
            codebook,
            experts,
            cpu_layers: f64::from(cpu_layers),
            head_on_cpu: cpu_layers > 0 && run.ngl.unwrap_or(0) <= shape.layers,
            cards,
            host: Host::of(run),
            depth: f64::from(start) + f64::from(run.gen_len.unwrap_or(0)) / 2.0,
            kv_bytes: kv_bytes(run.kv_type.as_deref()),
            kv_elements,
            kv_quantised: matches!(run.kv_type.as_deref(), Some("q8_0" | "q4_0")),
            ik,
            ktransformers,
            class,
            shape,
        })
    }

    /// Bytes of one expert.
    pub fn expert_bytes(&self) -> f64 {
        self.shape.expert_weights * self.expert_bits / 8.0
    }

    /// How much of what the time depends on is stated.
    pub fn tier(&self) -> Tier {
        let uses_ram = self.experts.layers > 0.0 || matches!(self.class, "cpu_only" | "hybrid_layers");
        if uses_ram && self.host.source.is_prior() { Tier::B } else { Tier::A }
    }

    /// Which published interval applies.
    pub fn interval_class(&self) -> IntervalClass {
        match self.tier() {
            Tier::A if self.class == "cpu_only" || self.host.sockets > 1.0 => IntervalClass::CpuOrNuma,
            Tier::A => IntervalClass::GpuOrHybrid,
            Tier::B if self.host.source == RamSource::PriorCpu => IntervalClass::CpuNamed,
            Tier::B => IntervalClass::CpuUnnamed,
        }
    }
}
