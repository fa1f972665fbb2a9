//! The roofline with priors: what to expect of a machine that nobody measured.
//!
//! time = max(bytes / (efficiency x bandwidth), operations / (efficiency x rate)) + launches (algorithms §1). Efficiencies come
//! from published runs: decode reaches about 0.55 of VRAM bandwidth in today's engines; one socket's CPU decode realises 0.50 to
//! 0.88 of the byte floor; pinned copies reach 0.85 to 0.9 of a PCIe link; a round trip to CPU experts costs about 85 us a layer.

use super::{CostModel, Estimate, EstimateSource, Work};
use crate::machine::{Link, Memory, MemoryKind, Processor, ProcessorKind, Source, Sourced};
use crate::units::Bytes;

/// An assumption with an interval: the share of a rate that is reached, or a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    /// Best estimate.
    pub value: f64,
    /// Pessimistic.
    pub low: f64,
    /// Optimistic.
    pub high: f64,
}

/// Roofline cost model.
#[derive(Debug, Clone, PartialEq)]
pub struct Roofline {
    /// Of a datasheet's VRAM bandwidth.
    pub vram: Range,
    /// Of a datasheet's DRAM or CXL bandwidth.
    pub dram: Range,
    /// Of a measured read bandwidth, wherever.
    pub measured: Range,
    /// Of a link or disk.
    pub link: Range,
    /// Of a GPU's arithmetic rate.
    pub gpu_flops: Range,
    /// Of a CPU's arithmetic rate.
    pub cpu_flops: Range,
    /// Round trip to a processor that is not the main one, in seconds.
    pub sync_s: Range,
}

impl Default for Roofline {
    fn default() -> Self {
        Self {
            vram: Range { value: 0.55, low: 0.35, high: 0.80 },
            dram: Range { value: 0.68, low: 0.50, high: 0.88 },
            measured: Range { value: 0.85, low: 0.65, high: 1.0 },
            link: Range { value: 0.90, low: 0.75, high: 1.0 },
            gpu_flops: Range { value: 0.45, low: 0.25, high: 0.70 },
            cpu_flops: Range { value: 0.40, low: 0.20, high: 0.70 },
            sync_s: Range { value: 85e-6, low: 30e-6, high: 150e-6 },
        }
    }
}

impl Roofline {
    fn memory_efficiency(&self, m: &Memory) -> Range {
        match (m.read_bandwidth.source, m.kind) {
            (Source::Measured, _) => self.measured,
            (_, MemoryKind::Vram) => self.vram,
            (_, MemoryKind::Disk) => self.link,
            (_, MemoryKind::Dram | MemoryKind::Cxl) => self.dram,
        }
    }
}

fn source_of<T>(rate: &Sourced<T>) -> EstimateSource {
    match rate.source {
        Source::Measured => EstimateSource::Analytic,
        Source::Datasheet | Source::Prior => EstimateSource::Prior,
    }
}

impl CostModel for Roofline {
    fn describe(&self) -> String {
        format!(
            "roofline; shares of the rates reached: VRAM {}, DRAM {}, measured memory {}, links and disks {}, GPU arithmetic {}, \
             CPU arithmetic {}; {} us per round trip",
            self.vram.value,
            self.dram.value,
            self.measured.value,
            self.link.value,
            self.gpu_flops.value,
            self.cpu_flops.value,
            (self.sync_s.value * 1e6).round()
        )
    }

    fn compute(&self, p: &Processor, from: &Memory, work: Work, launches: u32) -> Estimate {
        let memory = self.memory_efficiency(from);
        let (arithmetic, rate) = match p.kind {
            ProcessorKind::Gpu => (self.gpu_flops, p.f16_flops.as_ref().unwrap_or(&p.f32_flops)),
            ProcessorKind::Cpu => (self.cpu_flops, &p.f32_flops),
        };
        let bytes_s = work.bytes().0 as f64 / from.read_bandwidth.value.0;
        let flops_s = work.flops / rate.value.0;
        let time = |m: f64, a: f64, launch: f64| (bytes_s / m).max(flops_s / a) + launch * f64::from(launches);
        let launch = p.launch_latency.value.0;
        Estimate {
            seconds: time(memory.value, arithmetic.value, launch),
            low: time(memory.high, arithmetic.high, 0.5 * launch),
            high: time(memory.low, arithmetic.low, 2.0 * launch),
            source: source_of(&from.read_bandwidth),
        }
    }

    fn transfer(&self, link: &Link, bytes: Bytes) -> Estimate {
        let e = if link.bandwidth.source == Source::Measured { self.measured } else { self.link };
        let copy = bytes.0 as f64 / link.bandwidth.value.0;
        let latency = link.latency.value.0;
        Estimate {
            seconds: latency + copy / e.value,
            low: 0.5 * latency + copy / e.high,
            high: 2.0 * latency + copy / e.low,
            source: source_of(&link.bandwidth),
        }
    }

    fn sync(&self, _: &Processor) -> Estimate {
        Estimate { seconds: self.sync_s.value, low: self.sync_s.low, high: self.sync_s.high, source: EstimateSource::Prior }
    }
}
