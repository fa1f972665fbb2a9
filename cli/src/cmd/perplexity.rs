//! `tierwise perplexity`

use crate::args::PerplexityArgs;
use crate::cmd::read_text;
use crate::loaded::Loaded;
use crate::ui::{Ui, number};
use anyhow::Result;
use serde_json::json;
use std::time::Instant;
use tierwise_runtime::session::perplexity;
use tierwise_runtime::tokenizer::AddSpecial;

pub fn run(args: &PerplexityArgs, ui: &Ui) -> Result<()> {
    let text = read_text(&args.text)?;
    let mut loaded = Loaded::open(&args.exec, Some(args.window), false, ui)?;
    let tokenizer = loaded.tokenizer()?;
    // As llama.cpp does: special tokens in the text are plain text, and BOS takes the first place of each window if the model wants one.
    let mut tokens = tokenizer.encode(&text, AddSpecial::Never, false)?;
    let with_special = tokenizer.encode("", AddSpecial::AsModel, false)?;
    let bos = tokenizer.bos().filter(|bos| with_special.first() == Some(bos));
    tokens.splice(0..0, bos);
    let bar = ui.progress("perplexity", 0, false);
    let started = Instant::now();
    let result = perplexity(&mut loaded.session, &tokens, args.window, bos, |done, all, so_far| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        bar.set_message(format!("perplexity {}", number(so_far.value)));
        true
    })?;
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    let value = json!({
        "perplexity": result.value, "error": result.error, "num_tokens": tokens.len(), "scored_tokens": result.scored_tokens,
        "windows": result.windows, "window": args.window, "seconds": seconds,
    });
    ui.result(&value, || {
        format!(
            "perplexity {:.4} +/- {:.4} over {} tokens ({} windows of {}, second halves scored), {} s",
            result.value,
            result.error,
            result.scored_tokens,
            result.windows,
            args.window,
            number(seconds)
        )
    })
}
