//! One file per verb. Each turns its arguments into library calls and prints the result.

pub mod balance;
mod bench;
pub mod calibrate;
pub mod capacity;
mod chat;
pub mod control;
pub mod convert;
mod demo;
mod doctor;
mod explain;
pub mod export;
mod inspect;
mod logits;
pub mod parallel;
mod perplexity;
pub mod plan;
mod plan_counts;
pub mod plan_trace;
pub mod predict;
pub mod run;
mod shell;
pub mod simulate;
mod synth;
pub mod trace;
pub mod trace_import;
pub mod verify;

use crate::args::Command;
use crate::ui::Ui;
use anyhow::{Context, Result};
use std::io::Read;

/// Carries out one verb.
pub fn run(command: Command, ui: &Ui) -> Result<()> {
    match command {
        Command::Inspect(args) => inspect::run(&args, ui),
        Command::Doctor(args) => doctor::run(&args, ui),
        Command::Calibrate(args) => calibrate::run(&args, ui),
        Command::Plan(args) => plan::run(&args, ui),
        Command::Capacity(args) => capacity::run(&args, ui),
        Command::Simulate(args) => simulate::run(&args, ui),
        Command::Balance(args) => balance::run(&args, ui),
        Command::Export(args) => export::run(&args, ui),
        Command::Explain(args) => explain::run(&args, ui),
        Command::Predict(args) => predict::run(&args, ui),
        Command::Run(args) => run::run(&args, ui),
        Command::Control(args) => control::run(&args, ui),
        Command::Verify(args) => verify::run(&args, ui),
        Command::Bench(args) => bench::run(&args, ui),
        Command::Parallel(args) => parallel::run(&args, ui),
        Command::Logits(args) => logits::run(&args, ui),
        Command::Perplexity(args) => perplexity::run(&args, ui),
        Command::Trace(command) => trace::run(&command, ui),
        Command::Convert(args) => convert::run(&args, ui),
        Command::Synth(args) => synth::run(&args, ui),
        Command::Demo(args) => demo::run(&args, ui),
        Command::Completions { shell } => shell::completions(shell, ui),
        Command::Man => shell::manual(ui),
    }
}

/// The text of a file, or of standard input for `-`.
fn read_text(path: &str) -> Result<String> {
    if path == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("read standard input")?;
        Ok(text)
    } else {
        std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))
    }
}
