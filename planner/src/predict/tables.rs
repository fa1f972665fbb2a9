//! What names stand for: bits per weight of quantisations, figures of graphics cards and processors.
//!
//! A published run names its parts ("RTX 3090", "EPYC 9355", "UD-Q4_K_XL"); these tables turn the names into numbers. The first entry
//! that matches decides, so special names stand before general ones. Sources: bandwidths and TFLOPS are datasheet values; boost and
//! all-core clocks are datasheet values or estimates; bits per weight are accounted from file sizes (tools/predict/README.md §3, §10).

use MemoryClass::{Gddr, Hbm};

/// Bits per weight of a quantisation by the start of its name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quant {
    /// Start of the name.
    pub prefix: &'static str,
    /// Mean over the routed experts.
    pub expert_bits: f64,
    /// Mean over everything else.
    pub dense_bits: f64,
    /// Codebook format (IQ1, IQ2): slow to decode on a CPU.
    pub codebook: bool,
}

impl Quant {
    const fn new(prefix: &'static str, expert_bits: f64, dense_bits: f64, codebook: bool) -> Self {
        Self { prefix, expert_bits, dense_bits, codebook }
    }

    /// The entry for a quantisation's name.
    pub fn named(name: &str) -> Option<&'static Self> {
        QUANTS.iter().find(|q| name.starts_with(q.prefix))
    }
}

/// What kind of memory a graphics card has: the share of the datasheet rate that decoding reaches differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryClass {
    /// Soldered graphics memory.
    Gddr,
    /// Stacked memory.
    Hbm,
}

/// A graphics card.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gpu {
    /// Part of its name.
    pub name: &'static str,
    /// Memory bandwidth, GB/s.
    pub gb_per_s: f64,
    /// Boost clock, GHz.
    pub ghz: f64,
    /// Kind of memory.
    pub memory: MemoryClass,
    /// float16 rate without tensor cores.
    pub tflops: f64,
}

impl Gpu {
    const fn new(name: &'static str, gb_per_s: f64, ghz: f64, memory: MemoryClass, tflops: f64) -> Self {
        Self { name, gb_per_s, ghz, memory, tflops }
    }

    /// The entry whose name is part of `text`.
    pub fn named(text: &str) -> Option<&'static Self> {
        GPUS.iter().find(|g| text.contains(g.name))
    }
}

/// A processor: figures of one socket. Entries of virtual machines give the cores of the virtual machine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cpu {
    /// Part of its name.
    pub name: &'static str,
    /// Physical cores.
    pub cores: u32,
    /// Clock with all cores busy, GHz.
    pub ghz: f64,
    /// Memory channels.
    pub channels: u32,
    /// Fastest supported memory, MT/s.
    pub mt_per_s: f64,
}

impl Cpu {
    const fn new(name: &'static str, cores: u32, ghz: f64, channels: u32, mt_per_s: f64) -> Self {
        Self { name, cores, ghz, channels, mt_per_s }
    }

    /// The entry whose name is part of `text`.
    pub fn named(text: &str) -> Option<&'static Self> {
        CPUS.iter().find(|c| text.contains(c.name))
    }
}

/// Bytes per element of a key/value cache by the name of its type; unstated and unknown types count as float16, the engines' default.
pub fn kv_bytes(kv_type: Option<&str>) -> f64 {
    const Q8_0: f64 = 34.0 / 32.0;
    match kv_type {
        Some("q8_0") => Q8_0,
        Some("q4_0") => 18.0 / 32.0,
        Some("K q8_0 / V f16") => (Q8_0 + 2.0) / 2.0,
        _ => 2.0,
    }
}

// start of the name, bits of experts, bits of the rest, codebook format
const QUANTS: &[Quant] = &[
    Quant::new("IQ4_XS experts", 4.25, 5.7, false),
    Quant::new("q8_0 attn, IQ4_XS/IQ3_S", 3.9, 8.5, false),
    Quant::new("UD-Q4_K_XL (MXFP4", 4.6, 7.5, false),
    Quant::new("F16 (MXFP4", 4.25, 16.0, false),
    Quant::new("MXFP4", 4.25, 8.5, false),
    Quant::new("NVFP4", 4.5, 8.5, false),
    Quant::new("THIREUS", 6.25, 8.5, false),
    Quant::new("DQ4_K_R4", 5.2, 8.5, false),
    Quant::new("mix-IQ6_K", 6.6, 8.5, false),
    Quant::new("IQ2_K_R4", 2.7, 8.5, false),
    Quant::new("IQ2_KL", 2.7, 8.5, false),
    Quant::new("IQ3_KS", 3.35, 8.5, false),
    Quant::new("IQ4_KS_R4", 4.5, 8.5, false),
    Quant::new("IQ4_K_R4", 4.75, 8.5, false),
    Quant::new("UD-IQ1", 1.7, 6.0, true),
    Quant::new("IQ1_S_R4", 1.55, 8.5, false),
    Quant::new("IQ1_S", 1.55, 6.0, true),
    Quant::new("IQ2_XXS", 2.2, 6.0, true),
    Quant::new("UD-IQ2_M", 2.7, 6.5, true),
    Quant::new("IQ4_XS_R8", 4.25, 5.5, false),
    Quant::new("UD-IQ4_XS", 4.4, 6.5, false),
    Quant::new("IQ4_XS", 4.25, 5.5, false),
    Quant::new("IQ4_NL", 4.5, 6.0, false),
    Quant::new("UD-Q2_K_XL", 2.75, 5.2, false),
    Quant::new("~UD-Q2_K_XL", 2.9, 6.0, false),
    Quant::new("UD-Q3_K_XL", 3.5, 6.0, false),
    Quant::new("UD-Q4_K_XL", 4.6, 5.5, false),
    Quant::new("UD-Q4_K_M", 4.75, 6.5, false),
    Quant::new("UD-Q5_K_M", 5.6, 7.0, false),
    Quant::new("UD ~4.5", 4.5, 6.5, false),
    Quant::new("Q2_K_L", 3.0, 5.0, false),
    Quant::new("Q2_K", 2.95, 4.5, false),
    Quant::new("Q2", 2.95, 4.5, false),
    Quant::new("Q3_K_M", 3.85, 4.8, false),
    Quant::new("Q4_K_XL", 4.6, 6.5, false),
    Quant::new("Q4_K_M", 4.84, 5.2, false),
    Quant::new("Q4_K_S", 4.55, 4.9, false),
    Quant::new("Q4_K", 4.84, 5.2, false),
    Quant::new("Q4_0", 4.5, 4.8, false),
    Quant::new("Q6_K", 6.56, 6.6, false),
    Quant::new("Q8_0", 8.5, 8.5, false),
    Quant::new("FP8", 8.0, 8.0, false),
    Quant::new("INT8", 8.0, 8.0, false),
    Quant::new("int8", 8.0, 8.0, false),
    Quant::new("int4", 4.5, 4.5, false),
    Quant::new("BF16", 16.0, 16.0, false),
];

// part of the name, GB/s, GHz, memory, TFLOPS
const GPUS: &[Gpu] = &[
    Gpu::new("RTX PRO 6000", 1792.0, 2.6, Gddr, 126.0),
    Gpu::new("RTX 5090", 1792.0, 2.41, Gddr, 104.8),
    Gpu::new("RTX 5080", 960.0, 2.62, Gddr, 56.3),
    Gpu::new("RTX 5070 Ti", 896.0, 2.45, Gddr, 43.9),
    Gpu::new("RTX 5070", 672.0, 2.51, Gddr, 30.8),
    Gpu::new("RTX 5060 Ti", 448.0, 2.57, Gddr, 23.7),
    Gpu::new("RTX 4090", 1008.0, 2.52, Gddr, 82.6),
    Gpu::new("RTX 4080", 717.0, 2.51, Gddr, 48.7),
    Gpu::new("RTX 4070", 504.0, 2.48, Gddr, 29.2),
    Gpu::new("RTX 4060 Lap", 256.0, 2.2, Gddr, 11.6),
    Gpu::new("RTX 6000 Ada", 960.0, 2.5, Gddr, 91.1),
    Gpu::new("RTX 3090 Ti", 1008.0, 1.86, Gddr, 40.0),
    Gpu::new("RTX 3090", 936.0, 1.7, Gddr, 35.6),
    Gpu::new("RTX 3060", 360.0, 1.78, Gddr, 12.7),
    Gpu::new("RTX A6000", 768.0, 1.8, Gddr, 38.7),
    Gpu::new("RTX A5000", 768.0, 1.7, Gddr, 27.8),
    Gpu::new("A100-SXM4-40", 1555.0, 1.41, Hbm, 78.0),
    Gpu::new("A100", 2039.0, 1.41, Hbm, 78.0),
    Gpu::new("A10", 600.0, 1.7, Gddr, 31.2),
    Gpu::new("Quadro RTX 6000", 672.0, 1.77, Gddr, 32.6),
    Gpu::new("RTX 2060 Super", 448.0, 1.65, Gddr, 14.4),
    Gpu::new("RTX 2070", 448.0, 1.62, Gddr, 14.9),
    Gpu::new("GTX 1650", 192.0, 1.73, Gddr, 8.9),
    Gpu::new("GTX 1070", 256.0, 1.68, Gddr, 6.5),
    Gpu::new("P100", 732.0, 1.33, Hbm, 19.1),
    Gpu::new("RX 9070 XT", 645.0, 2.97, Gddr, 97.3),
    Gpu::new("R9700", 640.0, 2.92, Gddr, 95.7),
    Gpu::new("RX 7900 XTX", 960.0, 2.5, Gddr, 122.8),
    Gpu::new("RX 7900 XT", 800.0, 2.4, Gddr, 103.0),
    Gpu::new("RX 7600", 288.0, 2.66, Gddr, 43.5),
    Gpu::new("RX 6700 XT", 384.0, 2.58, Gddr, 26.4),
    Gpu::new("V620", 512.0, 2.2, Gddr, 40.6),
    Gpu::new("gfx1030", 512.0, 2.2, Gddr, 32.0),
];

// part of the name, cores, GHz, channels, MT/s
const CPUS: &[Cpu] = &[
    Cpu::new("Platinum 8358", 15, 2.8, 8, 3200.0),
    Cpu::new("EPYC 7J13", 15, 3.0, 8, 3200.0),
    Cpu::new("EPYC 9355 (32c; VM)", 24, 4.0, 12, 6000.0),
    Cpu::new("EPYC 9355", 32, 4.0, 12, 6400.0),
    Cpu::new("EPYC 9374F", 32, 4.0, 12, 4800.0),
    Cpu::new("EPYC 9175F", 16, 4.6, 12, 6400.0),
    Cpu::new("EPYC 9654", 96, 3.5, 12, 4800.0),
    Cpu::new("EPYC 9965", 192, 3.2, 12, 6400.0),
    Cpu::new("EPYC 7343", 16, 3.5, 8, 3200.0),
    Cpu::new("EPYC 24-core", 24, 3.6, 12, 4800.0),
    Cpu::new("EPYC, 56", 56, 3.0, 8, 3200.0),
    Cpu::new("6980P", 128, 3.0, 12, 6400.0),
    Cpu::new("E5-2697A", 16, 2.9, 4, 2400.0),
    Cpu::new("Gold 6138", 20, 2.7, 6, 2666.0),
    Cpu::new("Gold 6454S", 32, 2.8, 8, 4800.0),
    Cpu::new("Gold Skylake", 14, 2.6, 6, 2666.0),
    Cpu::new("8488C", 48, 3.0, 8, 4800.0),
    Cpu::new("8480", 56, 3.0, 8, 4800.0),
    Cpu::new("Xeon Scalable (24c", 24, 2.7, 6, 2666.0),
    Cpu::new("Platinum 8452Y", 36, 2.8, 8, 4800.0),
    Cpu::new("285K", 24, 4.6, 2, 6400.0),
    Cpu::new("12600K", 10, 4.3, 2, 6000.0),
    Cpu::new("7700", 4, 3.9, 2, 2400.0),
    Cpu::new("10900X", 10, 4.0, 4, 2933.0),
    Cpu::new("14900K", 16, 4.8, 2, 5600.0),
    Cpu::new("7980XE", 18, 4.2, 4, 3200.0),
    Cpu::new("10400F", 6, 4.0, 2, 2666.0),
    Cpu::new("Ryzen 5 3500", 6, 4.0, 2, 2667.0),
    Cpu::new("Ryzen 5 5600", 6, 4.4, 2, 3200.0),
    Cpu::new("5700X", 8, 4.3, 2, 3200.0),
    Cpu::new("5800X", 8, 4.5, 2, 3200.0),
    Cpu::new("7800X3D", 8, 4.7, 2, 6000.0),
    Cpu::new("9800X3D", 8, 5.0, 2, 6000.0),
    Cpu::new("5950X", 16, 4.0, 2, 3200.0),
    Cpu::new("7950X", 16, 4.9, 2, 5200.0),
    Cpu::new("5975WX", 32, 3.8, 8, 3200.0),
    Cpu::new("3945WX", 12, 4.0, 8, 3200.0),
    Cpu::new("3995WX", 64, 3.0, 8, 3200.0),
    Cpu::new("7975WX", 32, 4.2, 8, 4800.0),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_names_stand_before_general_ones() {
        for (i, g) in GPUS.iter().enumerate() {
            assert_eq!(Gpu::named(g.name), Some(g), "{} is hidden by an earlier entry", GPUS[i].name);
        }
        for q in QUANTS {
            assert_eq!(Quant::named(q.prefix), Some(q), "{}", q.prefix);
        }
        for c in CPUS {
            assert_eq!(Cpu::named(c.name), Some(c), "{}", c.name);
        }
    }

    #[test]
    fn names_in_context_are_found() {
        assert_eq!(Gpu::named("2x RTX 3090 Ti").map(|g| g.ghz), Some(1.86));
        assert_eq!(Cpu::named("2x EPYC 9654 (96c)").map(|c| c.cores), Some(96));
        assert_eq!(Quant::named("UD-Q4_K_XL (MXFP4 experts)").map(|q| q.dense_bits), Some(7.5));
        assert_eq!((Quant::named("Q9"), Gpu::named("Voodoo"), Cpu::named("")), (None, None, None));
    }
}
