//! Other engines' settings for one machine, as a placement: which experts they compute on the GPU.
//!
//! llama.cpp's command line: `-ot`, `--cpu-moe`, `--n-cpu-moe` and `-ngl`, each as `common/arg.cpp` and `llama-model.cpp` take them (overrides in the
//! order of arguments, the first that matches wins; without one a layer's tensors are on the GPU if it is among the last `-ngl` ones,
//! where the output counts as one more layer). mistral.rs' topology and kTransformers' YAML by their own readers.

use super::llama_cpp::{buffer_of, parse_overrides};
use super::{cannot, kt_yaml, mistralrs};
use crate::error::PlanError;

/// What a command line asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Experts computed on the GPU. `[moe layers][experts]`
    pub on_gpu: Vec<Vec<bool>>,
    /// Tokens of context for all sequences.
    pub context: Option<u32>,
    /// Sequences.
    pub parallel: Option<u32>,
    /// Tokens computed at once.
    pub chunk: Option<u32>,
    /// What was not taken over, in words.
    pub notes: Vec<String>,
}

/// Words of a command line; quotes as in a shell.
fn words(text: &str) -> Option<Vec<String>> {
    let mut out = Vec::new();
    let (mut word, mut quote, mut open) = (String::new(), None, false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, quote) {
            (c, Some(q)) if c == q => quote = None,
            ('\\', Some('"')) if chars.peek().is_some_and(|n| ['"', '\\', '$', '`'].contains(n)) => word.extend(chars.next()),
            ('\'' | '"', None) => (quote, open) = (Some(c), true),
            ('\\', None) => match chars.next() {
                Some('\n') => {}
                Some(c) => word.push(c),
                None => return None,
            },
            (c, None) if c.is_whitespace() => {
                if open || !word.is_empty() {
                    out.push(std::mem::take(&mut word));
                }
                open = false;
            }
            (c, _) => word.push(c),
        }
    }
    if quote.is_some() {
        return None;
    }
    if open || !word.is_empty() {
        out.push(word);
    }
    Some(out)
}

/// A command line of llama.cpp or ik_llama.cpp. `layers`: MoE layers and their experts; `num_layers`: all layers.
///
/// # Errors
/// [`PlanError::CannotExport`] where llama.cpp would refuse.
pub fn llama_cpp(text: &str, layers: &[(u32, usize)], num_layers: usize) -> Result<Wanted, PlanError> {
    const TARGET: &str = "llama.cpp";
    let Some(words) = words(text) else {
        return cannot(TARGET, "the command line", &"a quote that is not closed", "closed quotes");
    };
    let mut wanted = Wanted::default();
    let mut overrides = Vec::new();
    // Without -ngl recent versions take all layers that fit: all.
    let mut gpu_layers = u32::MAX;
    let mut words = words.into_iter();
    let number = |flag: &str, value: Option<String>| match value.as_deref().map(str::parse::<i64>) {
        // Negative: all.
        Some(Ok(n)) => Ok(u32::try_from(n).unwrap_or(u32::MAX)),
        _ if matches!(value.as_deref(), Some("all" | "auto")) => Ok(u32::MAX),
        _ => cannot(TARGET, flag, &value.unwrap_or_default(), "a number"),
    };
    while let Some(word) = words.next() {
        match word.as_str() {
            "-ot" | "--override-tensor" => {
                let value = words.next().unwrap_or_default();
                overrides.extend(parse_overrides([value.as_str()])?);
            }
            "-cmoe" | "--cpu-moe" => overrides.extend(parse_overrides([r"\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"])?),
            "-ncmoe" | "--n-cpu-moe" => {
                for layer in 0..number(&word, words.next())?.min(num_layers as u32) {
                    let pattern = format!(r"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU");
                    overrides.extend(parse_overrides([pattern.as_str()])?);
                }
            }
            "-ngl" | "--gpu-layers" | "--n-gpu-layers" => gpu_layers = number(&word, words.next())?,
            "-c" | "--ctx-size" => wanted.context = Some(number(&word, words.next())?).filter(|c| *c > 0),
            "-np" | "--parallel" => wanted.parallel = Some(number(&word, words.next())?),
            "-ub" | "--ubatch-size" => wanted.chunk = Some(number(&word, words.next())?),
            "-m" | "--model" | "-b" | "--batch-size" | "-t" | "--threads" => drop(words.next()),
            "-ts" | "--tensor-split" | "--rpc" | "-sm" | "--split-mode" | "-ctk" | "-ctv" | "--cache-type-k"
            | "--cache-type-v" => {
                let value = words.next().unwrap_or_default();
                wanted.notes.push(format!("{word} {value} was not taken over"));
            }
            _ => {}
        }
    }
    let first_on_gpu = (num_layers as u64 + 1).saturating_sub(u64::from(gpu_layers));
    for (layer, experts) in layers {
        let at = |matrix: &str| match buffer_of(&overrides, &format!("blk.{layer}.ffn_{matrix}_exps.weight")) {
            Some(buffer) => buffer != "CPU" && !buffer.starts_with("RPC"),
            None => u64::from(*layer) >= first_on_gpu,
        };
        let matrices = ["up", "gate", "down"].map(at);
        if matrices.iter().any(|g| *g) && !matrices.iter().all(|g| *g) {
            wanted.notes.push(format!("layer {layer}: some of its matrices are on the GPU; its experts count as not there"));
        }
        wanted.on_gpu.push(vec![matrices.iter().all(|g| *g); *experts]);
    }
    if first_on_gpu > 0 {
        wanted
            .notes
            .push(format!("the attention of layers below {first_on_gpu} is on the CPU there, and on the GPU in this plan"));
    }
    Ok(wanted)
}

/// A topology of mistral.rs; layers without a device are on the GPU.
///
/// # Errors
/// [`PlanError::CannotExport`] where mistral.rs would refuse.
pub fn topology(text: &str, layers: &[(u32, usize)], num_layers: usize) -> Result<Wanted, PlanError> {
    let devices = mistralrs::parse_topology(text, num_layers)?;
    let on = |layer: u32| devices.get(layer as usize).is_none_or(|d| d.as_deref() != Some("cpu"));
    let mut wanted = Wanted { on_gpu: layers.iter().map(|(l, n)| vec![on(*l); *n]).collect(), ..Wanted::default() };
    if devices.iter().any(|d| d.as_deref() == Some("cpu")) {
        wanted.notes.push("layers on the CPU are there with their attention, which is on the GPU in this plan".into());
    }
    Ok(wanted)
}

/// kTransformers' YAML; experts that no rule replaces are on the GPU, as the model has them.
///
/// # Errors
/// [`PlanError::CannotExport`] where kTransformers would fail.
pub fn kt_rules(text: &str, layers: &[(u32, usize)]) -> Result<Wanted, PlanError> {
    let rules = kt_yaml::parse_rules(text)?;
    let on = |layer: u32| kt_yaml::is_on_gpu(&rules, layer).unwrap_or(true);
    Ok(Wanted { on_gpu: layers.iter().map(|(l, n)| vec![on(*l); *n]).collect(), ..Wanted::default() })
}
