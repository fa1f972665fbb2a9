//! mistral.rs: a topology file, `START-END: device:` by layer.
//!
//! Ranges hold whole layers, their attention included; end is exclusive. Its own rules, written again here ( `topology/mod.rs` @ 0a08262): a device is
//! `cpu`, `cuda[N]` or `metal[N]`; ranges are sorted by end, and later ones override.

use super::{Content, Exported, TwoTiers, cannot};
use crate::error::PlanError;
use crate::plan::Plan;
use std::fmt::Write;

const TARGET: &str = "mistralrs";

/// The device of each layer that a topology gives one.
///
/// # Errors
/// [`PlanError::CannotExport`] where mistral.rs would refuse, or an expression is used as selector, which is not read here.
pub fn parse_topology(text: &str, num_layers: usize) -> Result<Vec<Option<String>>, PlanError> {
    let mut ranges: Vec<(usize, usize, String)> = Vec::new();
    let mut lines = text.lines().filter(|l| !l.trim().is_empty() && !l.trim_start().starts_with('#'));
    while let Some(line) = lines.next() {
        let selector = line.strip_suffix(':').map(|s| s.trim_matches(['"', '\'']));
        let number = |s: &str| s.parse::<usize>().ok();
        let range = selector.and_then(|s| match s.split_once('-') {
            Some((a, b)) => Some((number(a)?, number(b)?)),
            None => number(s).map(|a| (a, a + 1)),
        });
        let Some((start, end)) = range.filter(|(a, b)| a < b && *b <= num_layers) else {
            return cannot(TARGET, "a selector", &line, format!("START-END: with START < END <= {num_layers}"));
        };
        let device =
            lines.next().and_then(|l| l.trim().strip_prefix("device:")).map(|d| d.trim().trim_matches(['"', '\'']).to_string());
        let ordinal =
            |d: &str, kind: &str| d.strip_prefix(kind).and_then(|r| r.strip_prefix('[')?.strip_suffix(']')?.parse::<u32>().ok());
        let known = |d: &str| d == "cpu" || ordinal(d, "cuda").is_some() || ordinal(d, "metal").is_some();
        match device {
            Some(device) if known(&device) => ranges.push((start, end, device)),
            other => {
                return cannot(
                    TARGET,
                    format!("the device of {start}-{end}"),
                    &other.unwrap_or_default(),
                    "cpu, cuda[N] or metal[N]",
                );
            }
        }
    }
    ranges.sort_by_key(|r| r.1);
    let mut out = vec![None; num_layers];
    for (start, end, device) in ranges {
        out[start..end].fill(Some(device));
    }
    Ok(out)
}

/// Exports a plan of a model with so many layers.
///
/// # Errors
/// [`PlanError::CannotExport`].
pub fn export(plan: &Plan, num_layers: usize) -> Result<Exported, PlanError> {
    let tiers = TwoTiers::new(plan, TARGET)?;
    // Layers without experts stay with the GPU.
    let mut gpu = vec![tiers.has_gpu; num_layers];
    for (layer, on_gpu) in tiers.layers.iter().zip(tiers.whole_layers()) {
        let Some(place) = gpu.get_mut(*layer as usize) else {
            return cannot(TARGET, "the number of layers", &num_layers, "that of the model the plan was made for");
        };
        *place = on_gpu;
    }
    let mut text = String::new();
    let mut start = 0;
    while start < num_layers {
        let end = (start..num_layers).find(|l| gpu[*l] != gpu[start]).unwrap_or(num_layers);
        let device = if gpu[start] { "cuda[0]" } else { "cpu" };
        writeln!(text, "{start}-{end}:\n  device: {device}").expect("a string takes all");
        start = end;
    }
    let read = parse_topology(&text, num_layers)?;
    let on = |l: u32| read[l as usize].as_deref() == Some("cuda[0]");
    let exported: Vec<Vec<bool>> = tiers.layers.iter().zip(&tiers.on_gpu).map(|(l, row)| vec![on(*l); row.len()]).collect();
    let mut loss = tiers.loss(&exported);
    loss.notes.push(
        "a range places whole layers: the attention and shared experts of a layer on the host are computed there too".into(),
    );
    Ok(Exported {
        target: TARGET,
        written_for: "mistral.rs topology/mod.rs @ 0a08262",
        content: Some(Content::Text(text)),
        command: "mistralrs serve -m {model} --topology {file}".into(),
        loss,
        on_gpu: exported,
    })
}
