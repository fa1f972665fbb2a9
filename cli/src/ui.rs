//! What people see: tables, notes, progress bars, JSON. Results go to standard output, everything else to standard error.

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};

/// How to talk: decided once from the global flags.
#[derive(Debug, Clone, Copy)]
pub struct Ui {
    /// One JSON object on standard output.
    pub json: bool,
    quiet: bool,
    verbose: bool,
}

impl Ui {
    pub fn new(json: bool, quiet: bool, verbose: bool) -> Self {
        Self { json, quiet, verbose }
    }

    /// Prints the result: as JSON if asked, else as the text that `human` builds.
    pub fn result(&self, json: &serde_json::Value, human: impl FnOnce() -> String) -> Result<()> {
        let text = if self.json { serde_json::to_string_pretty(json).context("result to JSON")? } else { human() };
        self.out(&format!("{}\n", text.trim_end()))
    }

    /// Prints to standard output at once.
    pub fn out(&self, text: &str) -> Result<()> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("write to standard output")
    }

    /// A remark about what is done, on standard error.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            eprintln!("{}", text.as_ref());
        }
    }

    /// A remark for those who asked for more.
    pub fn detail(&self, text: impl AsRef<str>) {
        if self.verbose && !self.quiet {
            eprintln!("{}", text.as_ref());
        }
    }

    /// A progress bar over `total` units; invisible when standard error is no terminal or `--quiet` was given.
    pub fn progress(&self, what: &str, total: u64, bytes: bool) -> ProgressBar {
        let bar = ProgressBar::new(total);
        if self.quiet || !std::io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let template = if bytes {
            "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta} left"
        } else {
            "{msg} [{bar:30}] {pos}/{len} {eta} left"
        };
        bar.set_style(ProgressStyle::with_template(template).expect("the templates are valid").progress_chars("=> "));
        bar.set_message(what.to_string());
        bar
    }
}

/// A plain table with a header row; columns from the second on are right-aligned when `numbers` is set.
pub fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>, numbers: bool) -> String {
    let mut t = Table::new();
    t.load_style(presets::NOTHING).set_header(header.iter().copied());
    for row in rows {
        t.add_row(row);
    }
    if numbers {
        for column in t.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    t.lines().map(|l| l.trim_end().to_string()).collect::<Vec<_>>().join("\n")
}

/// A number with three significant digits or so.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => format!("{value:.0}"),
        v if v >= 100.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// A part of one as a percentage.
pub fn percent(part: f64) -> String {
    format!("{:.1} %", part * 100.0)
}

/// Whether an error is the reader of standard output going away.
pub fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().any(|c| c.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe))
}
