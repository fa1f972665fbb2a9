//! `tierwise logits`: raw logits and router choices, for comparison with other engines.

use crate::args::LogitsArgs;
use crate::cmd::read_text;
use crate::loaded::Loaded;
use crate::ui::{Ui, number};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tierwise_runtime::atomic_file::write_atomic;
use tierwise_runtime::exec::route::NO_EXPERT;
use tierwise_runtime::session::CapturedRouting;

pub fn run(args: &LogitsArgs, ui: &Ui) -> Result<()> {
    let tokens = parse_ids(&read_text(&args.tokens)?)?;
    let mut loaded = Loaded::open(&args.exec, Some(tokens.len()), args.routing, ui)?;
    let logits = loaded.session.logits_all(&tokens)?;
    let mut value = json!({ "num_tokens": tokens.len(), "vocab_size": logits.ncols() });
    if let Some(path) = &args.output {
        let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
        write_atomic(path, &bytes)?;
        value["file"] = json!(path);
    } else {
        value["logits"] = logits.rows().into_iter().map(|row| json!(row.to_vec())).collect();
    }
    if args.routing {
        let (experts, weights) = by_layer(&loaded.session.take_routing(), loaded.session.model().spec().layers.len());
        value["experts"] = experts;
        value["weights"] = weights;
    }
    ui.result(&value, || match &args.output {
        Some(path) => format!("{}: [{}, {}] float32, little-endian", path.display(), tokens.len(), logits.ncols()),
        None => {
            let rows = tokens.iter().zip(logits.rows()).map(|(token, row)| {
                let best = row.iter().enumerate().fold((0, f32::NEG_INFINITY), |b, (i, x)| if *x > b.1 { (i, *x) } else { b });
                vec![token.to_string(), best.0.to_string(), number(f64::from(best.1))]
            });
            let text = crate::ui::table(&["token", "most likely next", "its logit"], rows, true);
            format!("{text}\n(--json prints all logits, -o FILE writes them as float32)")
        }
    })
}

/// `experts[layer][token][slot]` and the weights in the same shape; layers without experts are empty.
fn by_layer(captured: &[CapturedRouting], num_layers: usize) -> (Value, Value) {
    let mut experts = vec![Vec::new(); num_layers];
    let mut weights = vec![Vec::new(); num_layers];
    for c in captured {
        let k = c.routing.experts_per_token;
        for (ids, of_token) in c.routing.experts.chunks(k).zip(c.routing.weights.chunks(k)) {
            let chosen = ids.iter().take_while(|e| **e != NO_EXPERT).count();
            experts[c.layer as usize].push(ids[..chosen].to_vec());
            weights[c.layer as usize].push(of_token[..chosen].to_vec());
        }
    }
    (json!(experts), json!(weights))
}

/// Token ids separated by white space.
fn parse_ids(text: &str) -> Result<Vec<u32>> {
    let ids: Vec<u32> = text
        .split_whitespace()
        .map(|word| {
            word.parse()
                .with_context(|| format!("--tokens: {word:?} is not a token id; expected whole numbers separated by white space"))
        })
        .collect::<Result<_>>()?;
    if ids.is_empty() {
        bail!("--tokens: no ids found; expected whole numbers separated by white space");
    }
    Ok(ids)
}
