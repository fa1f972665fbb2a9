//! kTransformers before kt-kernel: a YAML of rules that replace modules, whole layers of experts on the GPU or on the CPU.
//!
//! Rules as its `optimize/optimize.py` (0.2.x) reads them: a list; the first rule whose expression is found in a module's name replaces the
//! module; `kwargs` name devices and operators for prefill and decode. An expression stands for whole layers, since a layer's experts are
//! one module. Experts on the GPU are computed by Marlin kernels (`KExpertsMarlin`), on the CPU by `KExpertsCPU`, whose output goes back to
//! the GPU (`out_device`). Prompts are computed on the GPU, streamed there for layers on the CPU (`KExpertsTorch`).

use super::pattern::Pattern;
use super::{Content, Exported, TwoTiers, cannot};
use crate::error::PlanError;
use crate::plan::Plan;
use std::fmt::Write;

const TARGET: &str = "ktransformers-yaml";
const CLASS: &str = "ktransformers.operators.experts.KTransformersExperts";

/// A rule about experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Expression for the module's name.
    pub name: String,
    /// Where decode computes: `cpu` or `cuda:N`.
    pub generate_device: String,
    /// With which operator.
    pub generate_op: String,
}

/// Text after `key:`, without quotes; in double quotes a backslash stands for what follows.
fn scalar(text: &str) -> String {
    let text = text.trim();
    match text.strip_prefix('"').and_then(|t| t.strip_suffix('"')) {
        Some(inner) => inner.replace("\\\\", "\\"),
        None => text.trim_matches('\'').to_string(),
    }
}

/// Reads the rules about experts; rules that replace other modules are skipped, rules that match a class instead of a name too.
///
/// # Errors
/// [`PlanError::CannotExport`] where kTransformers would fail: a rule without a match or a replacement, operators and devices that do not go
/// together, expressions that are none.
pub fn parse_rules(text: &str) -> Result<Vec<Rule>, PlanError> {
    let mut rules = Vec::new();
    let mut current: Option<Vec<(String, String)>> = None;
    for line in text.lines() {
        let line = line.split(" #").next().unwrap_or_default();
        if line.trim().is_empty() || line.trim_start().starts_with('#') {
            continue;
        }
        let starts = line.starts_with("- ");
        if starts && let Some(keys) = current.replace(Vec::new()) {
            rules.extend(rule(&keys)?);
        }
        let Some(keys) = &mut current else {
            return cannot(TARGET, "the first line", &line, "- match:, the first of a list of rules");
        };
        // Flow mappings are opened: `match: {name: "x"}` is as good as two lines.
        let mut rest = line.trim_start_matches(['-', ' ']).trim();
        while let Some((key, value)) = rest.split_once(':') {
            let value = value.trim();
            match value.strip_prefix('{') {
                Some(inner) => {
                    keys.push((key.trim().to_string(), String::new()));
                    rest = inner;
                }
                None => {
                    // A comma ends a value within braces only; none of the values here holds one.
                    let (value, more) = if let Some(quoted) = value.strip_prefix('"') {
                        value.split_at(quoted.find('"').map_or(value.len(), |e| e + 2))
                    } else {
                        value.split_at(value.find([',', '}']).unwrap_or(value.len()))
                    };
                    keys.push((key.trim().to_string(), scalar(value)));
                    rest = more.trim_start_matches([',', '}', ' ']);
                }
            }
        }
        if !rest.is_empty() {
            return cannot(TARGET, "a line", &line, "KEY: VALUE");
        }
    }
    if let Some(keys) = current {
        rules.extend(rule(&keys)?);
    }
    Ok(rules)
}

/// The rule of these keys, if it is about experts.
fn rule(keys: &[(String, String)]) -> Result<Option<Rule>, PlanError> {
    let get = |key: &str| keys.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
    let replaced: Vec<&str> = keys.iter().filter(|(k, _)| k == "class").map(|(_, v)| v.as_str()).collect();
    if get("match").is_none() || get("replace").is_none() {
        return cannot(
            TARGET,
            "a rule",
            &keys.iter().map(|(k, _)| k.as_str()).collect::<Vec<_>>().join(", "),
            "match and replace",
        );
    }
    let Some(name) = get("name").filter(|_| replaced.contains(&CLASS)) else { return Ok(None) };
    if Pattern::new(name).is_none() {
        return cannot(TARGET, "an expression", &name, "one that Python's re takes");
    }
    let (device, op) = (get("generate_device").unwrap_or("cpu"), get("generate_op").unwrap_or("KExpertsCPU"));
    let cuda = |d: &str| d.strip_prefix("cuda:").is_some_and(|n| n.parse::<u32>().is_ok()) || d == "cuda";
    let fits = match op {
        "KExpertsCPU" => device == "cpu" && get("out_device").is_some_and(cuda),
        "KExpertsMarlin" | "KExpertsTorch" => cuda(device),
        _ => false,
    };
    if !fits {
        return cannot(
            TARGET,
            format!("generate_op of {name}"),
            &format!("{op} on {device}"),
            "KExpertsCPU on cpu with out_device cuda:N, or KExpertsMarlin or KExpertsTorch on cuda:N",
        );
    }
    Ok(Some(Rule { name: name.into(), generate_device: device.into(), generate_op: op.into() }))
}

/// Does decode compute a layer's experts on a GPU? None when no rule replaces them.
pub fn is_on_gpu(rules: &[Rule], layer: u32) -> Option<bool> {
    let module = format!("model.layers.{layer}.mlp.experts");
    let found = rules.iter().find(|r| Pattern::new(&r.name).is_some_and(|p| p.is_match(&module)));
    found.map(|r| r.generate_device != "cpu")
}

/// Exports a plan.
///
/// # Errors
/// [`PlanError::CannotExport`] when no GPU leads.
pub fn export(plan: &Plan) -> Result<Exported, PlanError> {
    let tiers = TwoTiers::new(plan, TARGET)?;
    if !tiers.has_gpu {
        return cannot(TARGET, "the main processor", &plan.main.executor, "a GPU: kTransformers needs one");
    }
    let gpu = tiers.whole_layers();
    let mut text = String::new();
    for on_gpu in [true, false] {
        let layers: Vec<String> =
            tiers.layers.iter().zip(&gpu).filter(|(_, g)| **g == on_gpu).map(|(l, _)| l.to_string()).collect();
        if layers.is_empty() {
            continue;
        }
        let (device, op) = if on_gpu { ("cuda:0", "KExpertsMarlin") } else { ("cpu", "KExpertsCPU") };
        write!(
            text,
            "- match:\n    name: \"^model\\\\.layers\\\\.({})\\\\.mlp\\\\.experts$\"\n  replace:\n    class: {CLASS}\n    kwargs:\n      \
             prefill_device: \"cuda:0\"\n      prefill_op: \"KExpertsTorch\"\n      generate_device: \"{device}\"\n      \
             generate_op: \"{op}\"\n      out_device: \"cuda:0\"\n  recursive: False\n",
            layers.join("|")
        )
        .expect("a string takes all");
    }
    let rules = parse_rules(&text)?;
    let mut exported = Vec::new();
    for ((layer, planned), row) in tiers.layers.iter().zip(&gpu).zip(&tiers.on_gpu) {
        let Some(there) = is_on_gpu(&rules, *layer).filter(|there| there == planned) else {
            return cannot(TARGET, format!("the place of layer {layer}"), &"another", "the one that was written");
        };
        exported.push(vec![there; row.len()]);
    }
    let mut loss = tiers.loss(&exported);
    loss.notes.push("a layer's experts are one module: whole layers are placed, not experts".into());
    loss.notes
        .push("these rules place experts only: add them before those of the model's own file in optimize/optimize_rules".into());
    Ok(Exported {
        target: TARGET,
        written_for: "ktransformers 0.2 optimize_rules (archived; kt-kernel has replaced it)",
        content: Some(Content::Text(text)),
        command: format!(
            "python -m ktransformers.local_chat --model_path {{model}} --gguf_path {{model}} --optimize_config_path {{file}} --max_new_tokens {}",
            plan.request.generated_tokens
        ),
        loss,
        on_gpu: exported,
    })
}
