//! kTransformers' kt-kernel under SGLang: a `.pt` file of made-up counts that makes its `frequency` strategy choose the planned experts.
//!
//! Its rule (`generate_gpu_experts_masks` in kt-kernel's `experts_base.py`, called by `kt_ep_wrapper.py` @ aafedd7): the counts of all layers are
//! laid side by side, and the `int(ratio x experts of all MoE layers)` largest are on the GPU. Planned experts therefore get a large
//! count, others 0, and the ratio is the middle between two whole numbers, so that rounding cannot change it.

use super::{Content, Exported, TwoTiers, cannot};
use crate::error::PlanError;
use crate::plan::Plan;

const TARGET: &str = "ktransformers";
/// The count of an expert on the GPU.
const LARGE: i64 = 1_000_000;

/// kt-kernel's own choice: the `budget` largest of all. `[layers][experts]`
pub fn gpu_mask(counts: &[i64], budget: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(counts[*i]));
    let mut mask = vec![false; counts.len()];
    order.iter().take(budget).for_each(|i| mask[*i] = true);
    mask
}

/// Exports a plan of a model with so many layers, dense ones included.
///
/// # Errors
/// [`PlanError::CannotExport`] when layers differ in their number of experts, or no GPU leads.
pub fn export(plan: &Plan, num_layers: usize) -> Result<Exported, PlanError> {
    let tiers = TwoTiers::new(plan, TARGET)?;
    if !tiers.has_gpu {
        return cannot(TARGET, "the main processor", &plan.main.executor, "a GPU: kt-kernel needs one");
    }
    let experts = tiers.on_gpu[0].len();
    if let Some(i) = tiers.on_gpu.iter().position(|r| r.len() != experts) {
        return cannot(
            TARGET,
            format!("the number of experts of layer {}", tiers.layers[i]),
            &tiers.on_gpu[i].len(),
            format!("{experts}, as in the first layer"),
        );
    }
    if tiers.layers.last().is_some_and(|l| *l as usize >= num_layers) {
        return cannot(TARGET, "the number of layers", &num_layers, "that of the model the plan was made for");
    }
    let mut counts = vec![0; num_layers * experts];
    for (layer, row) in tiers.layers.iter().zip(&tiers.on_gpu) {
        for (e, gpu) in row.iter().enumerate().filter(|(_, g)| **g) {
            counts[*layer as usize * experts + e] = i64::from(*gpu) * LARGE;
        }
    }
    let budget: usize = tiers.on_gpu.iter().flatten().filter(|g| **g).count();
    let total = tiers.layers.len() * experts;
    let ratio = if budget == total { 1.0 } else { (budget as f64 + 0.5) / total as f64 };
    let text = format!("{ratio:.9}");
    // As Python computes it from the flag's text.
    let read = (total as f64 * text.parse::<f64>().unwrap_or(0.0)) as usize;
    if read != budget {
        return cannot(TARGET, "the number of experts on the GPU", &read, budget.to_string());
    }
    let mask = gpu_mask(&counts, read);
    let exported: Vec<Vec<bool>> =
        tiers.layers.iter().map(|l| mask[*l as usize * experts..(*l as usize + 1) * experts].to_vec()).collect();
    let mut loss = tiers.loss(&exported);
    if loss.experts_elsewhere != Some(0) {
        return cannot(TARGET, "the experts that its rule chooses", &"not those planned", "those planned");
    }
    loss.notes.push("which experts are on the GPU is exact; whether misses are deferred and how prompts are computed is kt-kernel's own choice".into());
    Ok(Exported {
        target: TARGET,
        written_for: "kvcache-ai/sglang kt_ep_wrapper.py @ aafedd7",
        content: Some(Content::LogicalCount { layers: num_layers, experts, counts }),
        command: format!(
            "python -m sglang.launch_server --model {{model}} --kt-weight-path {{model}} --kt-gpu-experts-ratio {text} \
             --kt-expert-placement-strategy frequency --init-expert-location {{file}} --chunked-prefill-size {}",
            plan.request.chunk_tokens
        ),
        loss,
        on_gpu: exported,
    })
}
