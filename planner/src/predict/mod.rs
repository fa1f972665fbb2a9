//! Predicts runs of other engines from their description: how fast would llama.cpp be on that machine?
//!
//! A run is described by names and flags ([`rows`]); tables turn names into numbers ([`tables`], [`geometry`], [`host`],
//! [`placement`], [`inputs`]); formulas with twelve fitted parameters turn numbers into times ([`decode`], [`fit`]), into memory
//! verdicts ([`memory`]) and into a sketch of the prompt speed ([`prefill`]). [`report`] compares with what was measured, [`refit`]
//! fits again with machines or sources left out, and [`strategy`] applies the same physics to a plan's own model and machine.
//! The study behind it, with reference implementation and per-row oracle: tools/predict.

pub mod decode;
pub mod fit;
pub mod geometry;
pub mod host;
pub mod inputs;
pub mod memory;
pub mod placement;
pub mod prefill;
pub mod refit;
pub mod report;
pub mod rows;
pub mod strategy;
pub mod tables;

use decode::{Parameters, PartsMs, Speed, shipped_band};
use geometry::Shape;
use inputs::Inputs;
use memory::{HostNeed, Verdict, VramNeed};
use rows::Run;
use serde::Serialize;

/// Engines whose strategy the model describes.
const ENGINES: &[&str] = &["llama.cpp", "ik_llama.cpp", "kTransformers", "LM Studio", "llama.cpp fork"];

/// What is predicted for one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction<'a> {
    /// The run.
    pub run: &'a Run,
    /// Its description as numbers, or what it lacks.
    pub inputs: Result<Inputs, String>,
    /// Speed of decoding and what it is spent on, or why there is none.
    pub decode: Result<(Speed, PartsMs), String>,
    /// Prompt tokens per second (a Prior).
    pub prefill_tps: Option<f64>,
    /// VRAM needed, and whether that fits.
    pub vram: Option<(VramNeed, Verdict)>,
    /// Host memory needed.
    pub host: Option<HostNeed>,
}

/// Predicts every run with `parameters`. `beyond` gives shapes of models that are not in the table of published ones.
pub fn predict<'a>(runs: &'a [Run], parameters: &Parameters, beyond: &dyn Fn(&str) -> Option<Shape>) -> Vec<Prediction<'a>> {
    runs.iter()
        .map(|run| {
            let inputs = Inputs::of(run, beyond);
            let decode = match (&inputs, no_decode(run)) {
                (Err(lacks), None) => Err(lacks.clone()),
                (_, Some(reason)) => Err(reason),
                (Ok(x), None) => {
                    let parts = parameters.decode(x);
                    Ok((Speed::new(parts.total(), shipped_band(x.interval_class())), parts))
                }
            };
            let shape = shape_of(run, beyond);
            let vram = shape.as_ref().and_then(|s| memory::vram_need(run, s)).zip(run.vram_gb);
            let ok = run.outcome.as_deref().is_none_or(|o| o == "ok");
            Prediction {
                run,
                decode,
                prefill_tps: inputs.as_ref().ok().filter(|_| ok && prefill::applies(run)).map(|x| prefill::tokens_per_s(run, x)),
                vram: vram.map(|(need, gib)| (need, need.verdict(gib))),
                host: memory::host_need(run, shape.as_ref()),
                inputs,
            }
        })
        .collect()
}

fn shape_of(run: &Run, beyond: &dyn Fn(&str) -> Option<Shape>) -> Option<Shape> {
    let name = run.model.as_deref()?;
    Shape::published(name).cloned().or_else(|| beyond(name))
}

/// Why the model does not apply to a run, whatever its description.
fn no_decode(run: &Run) -> Option<String> {
    match (run.outcome.as_deref(), run.placement_class.as_deref(), run.engine.as_deref()) {
        (Some(outcome), ..) if outcome != "ok" => Some(format!("outcome {outcome}: only memory is checked")),
        _ if run.speculative => Some("speculative decoding".into()),
        (_, Some("gpu_uvm" | "gpu_spill"), _) => Some("pages of unified memory".into()),
        (_, _, None) => Some("engine not stated".into()),
        (_, _, Some(engine)) if !ENGINES.contains(&engine) => Some(format!("engine {engine:?} is not modelled")),
        _ => None,
    }
}

impl Prediction<'_> {
    /// Measured tokens per second, if this run counts: predicted, measured, and of good quality.
    pub fn compared(&self) -> Option<(&Inputs, f64)> {
        let good = self.run.quality.as_deref() != Some("low") && self.decode.is_ok();
        self.inputs.as_ref().ok().zip(self.run.decode_tps).filter(|_| good)
    }

    /// ln(measured / predicted tokens per second) of a run that counts.
    pub fn log_error(&self) -> Option<f64> {
        let (_, measured) = self.compared()?;
        self.decode.as_ref().ok().map(|(speed, _)| (measured / speed.tps).ln())
    }

    /// All that the time depends on is stated, and the experts' placement by number: the rows that acceptance is judged by.
    pub fn is_core(&self) -> bool {
        let run = self.run;
        let ram = run.ram_bw_peak_gbs.or(run.ram_bw_measured_gbs).is_some();
        self.compared().is_some() && run.cpu.is_some() && ram && run.moe_layers_on_cpu.is_some() && run.quant.is_some()
    }
}

/// The parts of a prediction that a list shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RowSummary {
    /// The run's id.
    pub id: String,
    /// Engine as stated.
    pub engine: Option<String>,
    /// Model as stated.
    pub model: Option<String>,
    /// Name under which runs of one machine go together.
    pub machine: String,
    /// Predicted tokens per second.
    pub predicted_decode_tps: Option<f64>,
    /// Lower end of the interval.
    pub low: Option<f64>,
    /// Upper end.
    pub high: Option<f64>,
    /// Measured tokens per second, as stated.
    pub measured: Option<f64>,
    /// |predicted / measured - 1|, for rows that count.
    pub error: Option<f64>,
    /// Prediction by parameters fitted without this row's machine (after a refit).
    pub held_out_decode_tps: Option<f64>,
    /// The error of that.
    pub held_out_error: Option<f64>,
    /// `analytic (fitted)` or `prior`, by what a prior had to stand in for.
    pub basis: Option<&'static str>,
    /// One of the rows that acceptance is judged by.
    pub core: bool,
    /// What a token's time goes to, in milliseconds.
    pub parts_ms: Option<PartsMs>,
    /// Prompt tokens per second: a prior.
    pub predicted_prefill_tps: Option<f64>,
    /// Measured prompt tokens per second, as stated.
    pub measured_prefill_tps: Option<f64>,
    /// VRAM needed, in GiB.
    pub vram_need_gib: Option<f64>,
    /// Whether it fits.
    pub vram_verdict: Option<Verdict>,
    /// Host memory needed, in GiB.
    pub host_need_gib: Option<f64>,
    /// Weights will be read from disk while decoding.
    pub swap_bound: Option<bool>,
    /// Outcome as stated.
    pub outcome: Option<String>,
    /// Why there is no prediction.
    pub skipped: Option<String>,
}

impl Prediction<'_> {
    /// The row for a list.
    pub fn summary(&self) -> RowSummary {
        let speed = self.decode.as_ref().ok();
        let basis = |x: &Inputs| match x.tier() {
            inputs::Tier::A if !(x.codebook && x.experts.layers > 0.0) => "analytic (fitted)",
            _ => "prior",
        };
        RowSummary {
            id: self.run.id.clone(),
            engine: self.run.engine.clone(),
            model: self.run.model.clone(),
            machine: host::machine_name(self.run),
            predicted_decode_tps: speed.map(|(s, _)| s.tps),
            low: speed.map(|(s, _)| s.low),
            high: speed.map(|(s, _)| s.high),
            measured: self.run.decode_tps,
            error: self.log_error().map(|e| ((-e).exp() - 1.0).abs()),
            held_out_decode_tps: None,
            held_out_error: None,
            basis: self.inputs.as_ref().ok().filter(|_| speed.is_some()).map(basis),
            core: self.is_core(),
            parts_ms: speed.map(|(_, p)| *p),
            predicted_prefill_tps: self.prefill_tps,
            measured_prefill_tps: self.run.prefill_tps,
            vram_need_gib: self.vram.map(|(need, _)| need.total()),
            vram_verdict: self.vram.map(|(_, v)| v),
            host_need_gib: self.host.map(|h| h.need_gib),
            swap_bound: self.host.map(|h| h.swap_bound),
            outcome: self.run.outcome.clone(),
            skipped: self.decode.as_ref().err().cloned(),
        }
    }
}
