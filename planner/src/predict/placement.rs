//! Where a published run's layers are: read off placement class, flags and tensor overrides.
//!
//! Engines move whole layers (`--n-cpu-moe`, `-ngl`) or tensors by pattern (`-ot`); what counts is how many layers' worth of expert
//! bytes the CPU reads and how often a step crosses to it. The rules are tools/predict/README.md §4, first match decides.

use super::geometry::{Mixer, Shape};
use super::rows::Run;

/// Experts on the CPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CpuExperts {
    /// Layers' worth of expert bytes.
    pub layers: f64,
    /// Layers that need a round trip to the CPU.
    pub round_trips: f64,
}

impl CpuExperts {
    const fn both(layers: f64) -> Self {
        Self { layers, round_trips: layers }
    }
}

/// Placement class as stated, or what follows from the flags.
pub fn class(run: &Run, shape: &Shape) -> &'static str {
    match run.placement_class.as_deref() {
        Some("cpu_only") => "cpu_only",
        Some("gpu_full") => "gpu_full",
        Some("hybrid_experts") => "hybrid_experts",
        Some("hybrid_layers") => "hybrid_layers",
        Some("gpu_uvm") => "gpu_uvm",
        Some("gpu_spill") => "gpu_spill",
        Some(_) => "other",
        None if run.gpu_count == 0 => "cpu_only",
        None if run.n_cpu_moe.is_some() || run.moe_layers_on_cpu.is_some() || run.ot.is_some() => "hybrid_experts",
        None if run.ngl.is_some_and(|n| n < shape.layers) => "hybrid_layers",
        None if run.ngl.is_some() => "gpu_full",
        None => "not stated",
    }
}

/// Experts on the CPU, or `None` when the description does not say. `expert_bits`: bits per weight of the routed experts.
pub fn cpu_experts(run: &Run, shape: &Shape, expert_bits: Option<f64>) -> Option<CpuExperts> {
    let all = f64::from(shape.moe_layers);
    let class = class(run, shape);
    let ot = run.ot.as_deref().unwrap_or_default();
    match class {
        "cpu_only" => return Some(CpuExperts::both(all)),
        "gpu_full" => return Some(CpuExperts::both(0.0)),
        _ => {}
    }
    if ot.contains("gate_exps of layers 0-19 and all up/down_exps=CPU") {
        // Gates of the last 41 of 61 layers stay on the cards: a third of those layers' experts.
        return Some(CpuExperts { layers: all - 41.0 / 3.0, round_trips: all });
    }
    if let Some(tensors) = tensors_on_cards(ot, shape) {
        // Each is one of three matrices of a layer's experts. Where only every second layer has experts, half of them exist.
        let share = if 2 * shape.moe_layers == shape.layers { 0.5 } else { 1.0 };
        return Some(CpuExperts { layers: all - share * tensors / 3.0, round_trips: all });
    }
    // `--n-cpu-moe N` counts layers from the first; those without experts have nothing to move.
    let from_flag = run.n_cpu_moe.map(|n| n.saturating_sub(shape.leading_dense_layers));
    if let Some(n) = run.moe_layers_on_cpu.or(from_flag) {
        return Some(CpuExperts::both(f64::from(n).min(all)));
    }
    if let (Some(ngl), "hybrid_layers") = (run.ngl, class) {
        return Some(CpuExperts::both(f64::from(shape.layers.saturating_sub(ngl)).min(all)));
    }
    if ot.contains("exps=CPU") && !ot.contains("CUDA") && !ot.contains("GPU") {
        return Some(CpuExperts::both(all));
    }
    if let (Some(mib), Some(bits)) = (run.cpu_weight_mib, expert_bits) {
        let share = (mib * 1_048_576.0 / (shape.routed_weights() * bits / 8.0)).min(1.0);
        return Some(CpuExperts { layers: all * share, round_trips: (all * share - 0.05).ceil() });
    }
    if run.engine.as_deref() == Some("kTransformers") {
        let (on_card, of) = experts_per_layer(run.flags.as_deref().unwrap_or_default())?;
        return Some(CpuExperts { layers: all * (1.0 - on_card / of), round_trips: all });
    }
    None
}

/// Matrices of expert layers that overrides like `blk\.[3-4]\.ffn_up=CUDA0` put on cards; `None` without such an override.
fn tensors_on_cards(ot: &str, shape: &Shape) -> Option<f64> {
    let first_moe = if shape.mixer == Mixer::Latent { shape.leading_dense_layers } else { 0 };
    let mut tensors = None;
    for at in ot.split(r"blk\.[").skip(1) {
        let b = at.as_bytes();
        let is_range = b.len() > 4 && b[0].is_ascii_digit() && b[1] == b'-' && b[2].is_ascii_digit() && b[3] == b']';
        let Some(rest) = at.get(4..).and_then(|r| r.strip_prefix(r"\.ffn_")) else { continue };
        if is_range && (rest.starts_with("up=CUDA") || rest.starts_with("gate=CUDA")) {
            let (first, last) = (u32::from(b[0] - b'0').max(first_moe), u32::from(b[2] - b'0'));
            *tensors.get_or_insert(0.0) += f64::from((last + 1).saturating_sub(first));
        }
    }
    tensors
}

/// `"8 GPU experts per layer (of 256)"` as `(8, 256)`.
fn experts_per_layer(flags: &str) -> Option<(f64, f64)> {
    let (before, after) = flags.split_once(" GPU experts per layer (of ")?;
    let on_card: u32 = before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    let of: u32 = after.split(')').next()?.parse().ok()?;
    (of > 0 && on_card <= of).then(|| (f64::from(on_card), f64::from(of)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_say_how_many_layers() {
        let deepseek = Shape::published("DeepSeek-V3").unwrap();
        let run = |n| Run { gpu_count: 1, n_cpu_moe: Some(n), ..Run::default() };
        // The first three layers are dense.
        for (n, layers) in [(0, 0.0), (3, 0.0), (5, 2.0), (61, 58.0), (99, 58.0)] {
            assert_eq!(cpu_experts(&run(n), deepseek, None), Some(CpuExperts::both(layers)), "{n}");
        }
        assert_eq!(cpu_experts(&Run { gpu_count: 1, ..Run::default() }, deepseek, None), None);
        assert_eq!(cpu_experts(&Run::default(), deepseek, None), Some(CpuExperts::both(58.0)));
    }

    #[test]
    fn overrides_are_read() {
        let deepseek = Shape::published("DeepSeek-V3").unwrap();
        assert_eq!(tensors_on_cards(r"blk\.[0-4]\.ffn_up=CUDA0,blk\.[3-5]\.ffn_gate=CUDA1,exps=CPU", deepseek), Some(2.0 + 3.0));
        assert_eq!(tensors_on_cards("exps=CPU", deepseek), None);
        assert_eq!(tensors_on_cards(r"blk\.[é", deepseek), None);
        assert_eq!(experts_per_layer("with 8 GPU experts per layer (of 256), x"), Some((8.0, 256.0)));
        assert_eq!(experts_per_layer("GPU experts per layer (of 0)"), None);
    }
}
