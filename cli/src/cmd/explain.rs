//! `tierwise explain`

use crate::args::ExplainArgs;
use crate::cmd::read_text;
use crate::ui::{self, Ui};
use anyhow::{Context, Result};
use serde_json::json;
use tierwise_planner::Plan;
use tierwise_planner::explain::explain;

pub fn run(args: &ExplainArgs, ui: &Ui) -> Result<()> {
    let path = args.plan.display().to_string();
    let plan = Plan::from_json(&read_text(&path)?).with_context(|| path.clone())?;
    let reasons = explain(&plan);
    let value = json!({ "model": plan.model, "machine": plan.machine, "reasons": reasons, "provenance": plan.provenance, "budgets": plan.budgets });
    ui.result(&value, || {
        let rows = reasons.iter().map(|r| vec![r.layers.clone(), r.experts.clone(), r.memory.clone(), r.bytes.to_string(), r.reason.clone()]);
        let mut text = format!("{} on {}\n\n", plan.model.name, plan.machine.name);
        text += &ui::table(&["layers", "experts", "memory", "bytes", "because"], rows, false);
        text += "\n\nNumbers used\n";
        let rows = plan.provenance.iter().map(|p| vec![p.what.clone(), p.value.clone(), p.source.clone(), p.note.clone().unwrap_or_default()]);
        text += &ui::table(&["what", "value", "source", "note"], rows, false);
        text
    })
}
