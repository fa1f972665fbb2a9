//! The machine of a published run: cards and processors as stated, with priors for what is not.
//!
//! Rules and their reasons: tools/predict/README.md §4. Nothing here depends on what was measured, only on what was described.

use super::rows::Run;
use super::tables::{Cpu, Gpu, MemoryClass};

/// Share of the channels' peak that the best read loops reach (prior).
pub const READ_OF_PEAK: f64 = 0.85;
/// A STREAM triad without streaming stores moves four arrays and counts three.
const READ_OF_TRIAD: f64 = 4.0 / 3.0;
/// Peak of two channels when only the type of memory is known, GB/s.
const DESKTOP_DDR4: f64 = 51.2;
const DESKTOP_DDR5: f64 = 89.6;
const DESKTOP_ANY: f64 = 64.0;

/// How the read bandwidth of host memory is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RamSource {
    /// Stated: measured.
    Measured,
    /// Stated: the channels' peak.
    Peak,
    /// From the processor's name.
    PriorCpu,
    /// From the kind of machine.
    PriorKind,
}

impl RamSource {
    /// Not stated in the description.
    pub const fn is_prior(self) -> bool {
        matches!(self, Self::PriorCpu | Self::PriorKind)
    }
}

/// Processors and host memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Host {
    /// Physical cores in use, over all sockets.
    pub cores: f64,
    /// Their clock, GHz.
    pub ghz: f64,
    /// Sockets in use.
    pub sockets: f64,
    /// Read bandwidth per socket, GB/s.
    pub read_gb_per_s: f64,
    /// How that is known.
    pub source: RamSource,
}

impl Host {
    /// The host of a run.
    pub fn of(run: &Run) -> Self {
        let name = run.cpu.as_deref().unwrap_or_default();
        let notes = run.notes.as_deref().unwrap_or_default();
        let known = Cpu::named(name);
        let two = if name.starts_with("2x") { 2 } else { 1 };
        let sockets = f64::from(run.cpu_sockets_used.filter(|s| *s > 0).unwrap_or(two));
        // An unnamed host that runs 48 threads or must hold 128 GiB is a server: eight channels of DDR4-3200.
        let server = run.threads.unwrap_or(0) >= 48 || run.file_gib.unwrap_or(0.0) > 128.0;
        let (cores, ghz, channels, mt_per_s) = match known {
            Some(c) => (c.cores, c.ghz, c.channels, Some(c.mt_per_s)),
            None if server => (32, 3.0, 8, Some(3200.0)),
            None => (8, 4.2, 2, None),
        };
        let threads_per_core = if name.contains("vCPU") { 2.0 } else { 1.0 };
        let all_cores = f64::from(cores) * sockets;
        let cores = match run.threads.filter(|t| *t > 0) {
            Some(threads) => all_cores.min(f64::from(threads) / threads_per_core),
            None => all_cores,
        };
        let (read_gb_per_s, source) = if let Some(measured) = run.ram_bw_measured_gbs {
            let read = if notes.contains("STREAM triad") {
                (measured * READ_OF_TRIAD).min(READ_OF_PEAK * run.ram_bw_peak_gbs.unwrap_or(1e9))
            } else {
                measured
            };
            // Figures are those of all sockets in use unless the note says otherwise.
            (if notes.contains("per socket") { read } else { read / sockets }, RamSource::Measured)
        } else if let Some(peak) = run.ram_bw_peak_gbs {
            (peak * READ_OF_PEAK / sockets, RamSource::Peak)
        } else if let Some(fastest) = mt_per_s {
            let channels = run.ram_channels.filter(|n| *n > 0).map_or(f64::from(channels) * sockets, f64::from);
            let peak = channels * run.ram_mts.unwrap_or(fastest) * 8e-3;
            (peak * READ_OF_PEAK / sockets, if known.is_some() { RamSource::PriorCpu } else { RamSource::PriorKind })
        } else {
            let peak = match run.ram_type.as_deref() {
                Some("DDR4") => DESKTOP_DDR4,
                Some("DDR5") => DESKTOP_DDR5,
                _ => DESKTOP_ANY,
            };
            (peak * READ_OF_PEAK, RamSource::PriorKind)
        };
        Self { cores, ghz, sockets, read_gb_per_s, source }
    }
}

/// Graphics cards that hold equal shares of the layers and run one after the other: means are over cards, of times.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cards {
    /// Harmonic mean of the memory bandwidths, GB/s.
    pub gb_per_s: f64,
    /// Harmonic mean of the clocks, GHz.
    pub ghz: f64,
    /// Harmonic mean of the float16 rates without tensor cores.
    pub tflops: f64,
    /// Memory of the first card.
    pub memory: MemoryClass,
}

impl Cards {
    /// The cards of a run: `Ok(None)` without any, `Err` with the name of one that is in no table.
    pub fn of(run: &Run) -> Result<Option<Self>, String> {
        let named = run.gpu.as_deref().unwrap_or_default();
        if run.gpu_count == 0 || named.is_empty() {
            return Ok(None);
        }
        // A mixed set is listed in the notes.
        let notes = run.notes.as_deref().unwrap_or_default();
        let listed = split_count(notes).is_some_and(|(_, name)| name.starts_with("RTX") || name.starts_with("RX"));
        let text = if listed { notes } else { named };
        let parts: Vec<&str> = text.split(" + ").collect();
        let mut cards = Vec::with_capacity(parts.len());
        for part in &parts {
            let alone = if parts.len() > 1 { 1 } else { run.gpu_count };
            let (count, name) = split_count(part).unwrap_or((alone, part));
            cards.push((f64::from(count), Gpu::named(name).ok_or_else(|| (*part).to_string())?));
        }
        Ok(Self::mean(&cards))
    }

    /// The mean over `(count, card)`; `None` of none.
    pub fn mean(cards: &[(f64, &Gpu)]) -> Option<Self> {
        let total: f64 = cards.iter().map(|(n, _)| n).sum();
        let first = cards.first().filter(|_| total > 0.0)?.1;
        let harmonic = |of: &dyn Fn(&Gpu) -> f64| total / cards.iter().map(|(n, g)| n / of(g)).sum::<f64>();
        Some(Self {
            gb_per_s: harmonic(&|g| g.gb_per_s),
            ghz: harmonic(&|g| g.ghz),
            tflops: harmonic(&|g| g.tflops),
            memory: first.memory,
        })
    }
}

/// `"2x RTX 3090"` as `(2, "RTX 3090")`.
fn split_count(text: &str) -> Option<(u32, &str)> {
    let (count, name) = text.split_once("x ")?;
    (!count.is_empty() && count.bytes().all(|b| b.is_ascii_digit())).then(|| count.parse().ok().map(|n| (n, name)))?
}

/// Name under which runs of one machine go together. Virtual machines of one processor count as one machine.
pub fn machine_name(run: &Run) -> String {
    match run.cpu.as_deref().filter(|c| !c.is_empty()) {
        Some(cpu) => cpu.split('(').next().unwrap_or_default().trim_end().replace("Ryzen ", ""),
        None => format!("{}|{}", run.source.as_deref().unwrap_or("?"), run.gpu.as_deref().unwrap_or("None")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixed_cards_and_tails_of_names() {
        assert_eq!(split_count("12x RTX 3090"), Some((12, "RTX 3090")));
        assert_eq!((split_count("RTX 3090"), split_count("x RTX"), split_count("max RTX")), (None, None, None));
        let run = Run { cpu: Some("Ryzen 7 7800X3D (8c, DDR5)".into()), ..Run::default() };
        assert_eq!(machine_name(&run), "7 7800X3D");
        let run = Run { gpu: Some("RTX 3090 + RTX 4090".into()), gpu_count: 2, ..Run::default() };
        let cards = Cards::of(&run).unwrap().unwrap();
        assert!((cards.gb_per_s - 2.0 / (1.0 / 936.0 + 1.0 / 1008.0)).abs() < 1e-9);
        let run = Run { gpu: Some("Voodoo 2".into()), gpu_count: 1, ..Run::default() };
        assert_eq!(Cards::of(&run), Err("Voodoo 2".to_string()));
    }

    #[test]
    fn a_triad_is_corrected_but_not_beyond_the_peak() {
        let run = Run {
            ram_bw_measured_gbs: Some(90.0),
            ram_bw_peak_gbs: Some(120.0),
            notes: Some("STREAM triad".into()),
            ..Run::default()
        };
        assert!((Host::of(&run).read_gb_per_s - 102.0).abs() < 1e-9);
    }
}
