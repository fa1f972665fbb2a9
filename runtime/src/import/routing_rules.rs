//! Routing rules that no published checkpoint has: keys of our own, in `config.json` and in GGUF files.
//!
//! | `config.json` | GGUF, after the architecture's name | meaning |
//! |---|---|---|
//! | `num_experts`, `num_experts_per_tok`: also lists | `expert_count`, `expert_used_count`: also arrays | per layer (DynaMoE) |
//! | `expert_selection` = `{"type": "top_p", "p": 0.5}` | `expert_selection.type`, `.value` | how many of them a token gets |
//! | `{"type": "threshold", "min_score": 0.1}` | the same | |
//! | `num_experts_per_tok_mean`: a number or a list | `expert_used_mean`: an array | what costs are computed with |
//! | `num_expert_iterations`, `expert_inner_residual` | `expert_iterations`, `expert_inner_residual` | Chain-of-Experts; the router's rows of one iteration follow those of the one before |
//!
//! Families with readers of their own (`*_deepseek`, `*_variants`) do not have them.

use super::gguf::Keys;
use super::hf::Config;
use crate::error::Result;
use crate::gguf::Value;
use tierwise_cost::model::{Moe, Router, Selection};

const RULES: &str = "top_p or threshold";

/// The rule of layer `layer` of a `config.json`.
pub(super) fn of_config(config: &Config<'_>, layer: u32, moe: Moe) -> Result<Moe> {
    let selection = match config.get("expert_selection") {
        None => Selection::TopK,
        Some(value) => {
            let rule = Config { path: config.path, value };
            let number = |key: &str| match rule.opt_f32(key)? {
                Some(number) => Ok(number),
                None => Err(config.refuse("expert_selection", format!("without {key}"), "a number", "")),
            };
            match rule.get("type").and_then(serde_json::Value::as_str) {
                Some("top_p") => Selection::TopP { p: number("p")? },
                Some("threshold") => Selection::Threshold { min_score: number("min_score")? },
                _ => return Err(config.refuse("expert_selection", value, &format!("an object whose type is {RULES}"), "")),
            }
        }
    };
    let mean = match config.get("num_experts_per_tok_mean") {
        None => None,
        Some(value) => {
            let number =
                value.as_array().map_or(Some(value), |list| list.get(layer as usize)).and_then(serde_json::Value::as_f64);
            let expected = format!("a number for layer {layer}");
            Some(number.ok_or_else(|| config.refuse("num_experts_per_tok_mean", value, &expected, ""))? as f32)
        }
    };
    Ok(Moe {
        mean_experts_per_token: mean,
        iterations: config.opt_u32("num_expert_iterations")?.unwrap_or(1),
        inner_residual: config.opt_bool("expert_inner_residual")?.unwrap_or(false),
        router: Router { selection, ..moe.router },
        ..moe
    })
}

/// The rules of a GGUF file's layers.
pub(super) fn of_keys(keys: &Keys<'_>, layers: Vec<Moe>) -> Result<Vec<Moe>> {
    let m = keys.metadata;
    let value = || m.get_f32(&keys.key("expert_selection.value"));
    let selection = match m.opt_str(&keys.key("expert_selection.type"))? {
        None => Selection::TopK,
        Some("top_p") => Selection::TopP { p: value()? },
        Some("threshold") => Selection::Threshold { min_score: value()? },
        Some(other) => return Err(keys.refuse("expert_selection.type", format!("{other:?}"), RULES, "")),
    };
    let means = m.opt_f32_array(&keys.key("expert_used_mean"))?;
    if let Some(means) = means.filter(|means| means.len() != layers.len()) {
        let found = format!("of {} numbers", means.len());
        return Err(keys.refuse("expert_used_mean", found, &format!("{}, one per layer", layers.len()), ""));
    }
    let iterations = keys.opt_u32("expert_iterations")?.unwrap_or(1);
    let inner_residual = m.opt_bool(&keys.key("expert_inner_residual"))?.unwrap_or(false);
    let rule = |(i, moe): (usize, Moe)| Moe {
        mean_experts_per_token: means.map(|means| means[i]),
        iterations,
        inner_residual,
        router: Router { selection, ..moe.router },
        ..moe
    };
    Ok(layers.into_iter().enumerate().map(rule).collect())
}

/// The keys that [`of_keys`] reads, where they say something.
pub(crate) fn write(layers: &[&Moe], arch: &mut dyn FnMut(&str, Value)) {
    let Some(first) = layers.first() else { return };
    let selection = match first.router.selection {
        Selection::TopK => None,
        Selection::TopP { p } => Some(("top_p", p)),
        Selection::Threshold { min_score } => Some(("threshold", min_score)),
    };
    if let Some((name, value)) = selection {
        arch("expert_selection.type", name.into());
        arch("expert_selection.value", value.into());
    }
    if let Some(means) = layers.iter().map(|m| m.mean_experts_per_token).collect::<Option<Vec<f32>>>() {
        arch("expert_used_mean", means.into());
    }
    if first.iterations > 1 {
        arch("expert_iterations", first.iterations.into());
        arch("expert_inner_residual", first.inner_residual.into());
    }
}
