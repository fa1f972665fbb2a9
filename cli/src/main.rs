//! The `tierwise` command: arguments, tables, progress. Decisions and execution live in the library crates.

#![forbid(unsafe_code)]

mod args;
mod cmd;
mod control;
mod engine_flags;
mod loaded;
mod model;
mod place;
mod report;
mod ui;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let ui = ui::Ui::new(cli.json, cli.quiet, cli.verbose);
    match cmd::run(cli.command, &ui) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output went away (`tierwise ... | head`): nobody is left to tell.
        Err(e) if ui::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}
