//! `tierwise control`: says a line to a run's control socket and prints the answer.

use crate::control::MOST_LINE_BYTES;
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// `control`
#[derive(Debug, Args)]
pub struct ControlArgs {
    /// The socket that `run --control` or `bench --control` made.
    pub socket: PathBuf,
    /// What to say: `ram SIZE`, `status` or `wait` (until the slots are those of the last budget).
    #[arg(required = true, num_args = 1.., value_name = "COMMAND")]
    pub command: Vec<String>,
}

pub fn run(args: &ControlArgs, ui: &Ui) -> Result<()> {
    let path = args.socket.display();
    let mut stream = UnixStream::connect(&args.socket)
        .with_context(|| format!("{path}: nobody listens there; start a run with --control {path}"))?;
    let line = args.command.join(" ");
    if line.contains('\n') || line.len() > MOST_LINE_BYTES {
        bail!("a command is one line of at most {MOST_LINE_BYTES} bytes");
    }
    let lost = || format!("{path}: the run ended");
    stream.write_all(format!("{line}\n").as_bytes()).with_context(lost)?;
    let mut answer = String::new();
    BufReader::new(stream.take(1 << 20)).read_line(&mut answer).with_context(lost)?;
    let value: Value = serde_json::from_str(&answer).with_context(lost)?;
    if value["ok"] != true {
        bail!("{}", value["error"].as_str().unwrap_or("the run answered nothing that this program reads"));
    }
    ui.result(&value, || answer.clone())
}
