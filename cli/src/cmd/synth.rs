//! `tierwise synth`

use crate::args::SynthArgs;
use crate::model;
use crate::ui::{Ui, number};
use anyhow::{Result, bail};
use serde_json::json;
use std::time::Instant;
use tierwise_cost::recipe::Recipe;
use tierwise_cost::units::Bytes;
use tierwise_runtime::synth::synth;

pub fn run(args: &SynthArgs, ui: &Ui) -> Result<()> {
    let source = model::open(&args.model)?;
    let mut geometry = source.geometry().clone();
    if let Some(n) = args.layers {
        if n == 0 || n > geometry.layers.len() {
            bail!("--layers {n}: the model has {} layers, expected 1 to {0}", geometry.layers.len());
        }
        geometry = geometry.truncated(n);
    }
    let recipe = Recipe::by_name(&args.format)?;
    let started = Instant::now();
    let bar = ui.progress("writing", 0, true);
    let report = synth(&geometry, &recipe, args.seed, &args.output, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    let value = json!({
        "file": args.output, "model": geometry.name, "format": recipe.name(), "layers": geometry.layers.len(), "seed": args.seed,
        "bytes": report.file_bytes, "seconds": seconds,
    });
    ui.result(&value, || {
        format!(
            "{}: random weights in the shape of {} ({} layers, {}), {} in {} s ({} MB/s)",
            args.output.display(),
            geometry.name,
            geometry.layers.len(),
            recipe.name(),
            Bytes(report.file_bytes),
            number(seconds),
            number(report.file_bytes as f64 / 1e6 / seconds)
        )
    })
}
