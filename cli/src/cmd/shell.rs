//! `tierwise completions` and `tierwise man`, generated from the argument definitions.

use crate::args::Cli;
use crate::ui::Ui;
use anyhow::{Context, Result};
use clap::CommandFactory;

pub fn completions(shell: clap_complete::Shell, ui: &Ui) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tierwise", &mut script);
    ui.out(&String::from_utf8(script).context("completion script")?)
}

/// One page for the program and all its verbs.
pub fn manual(ui: &Ui) -> Result<()> {
    let mut page = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut page).context("manual page")?;
    for verb in Cli::command().get_subcommands() {
        let man = clap_mangen::Man::new(verb.clone());
        man.render_name_section(&mut page).and_then(|()| man.render_synopsis_section(&mut page)).context("manual page")?;
        man.render_options_section(&mut page).context("manual page")?;
    }
    ui.out(&String::from_utf8(page).context("manual page")?)
}
