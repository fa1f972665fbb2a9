//! `tierwise explain`

use crate::args::ExplainArgs;
use crate::cmd::read_text;
use crate::ui::{self, Ui};
use anyhow::{Context, Result};
use serde_json::json;
use tierwise_planner::Plan;
use tierwise_planner::explain::explain;
use tierwise_planner::plan::Tier;

pub fn run(args: &ExplainArgs, ui: &Ui) -> Result<()> {
    let path = args.plan.display().to_string();
    let plan = Plan::from_json(&read_text(&path)?).with_context(|| path.clone())?;
    let reasons = explain(&plan);
    let value = json!({ "model": plan.model, "machine": plan.machine, "reasons": reasons, "provenance": plan.provenance, "budgets": plan.budgets });
    ui.result(&value, || {
        let rows = reasons.iter().map(|r| {
            let layers =
                if r.num_layers == 1 { r.first_layer.to_string() } else { format!("{}-{}", r.first_layer, r.last_layer) };
            let place = plan.tiers.get(r.tier as usize).map_or_else(String::new, Tier::describe);
            vec![layers, r.experts.to_string(), place, r.bytes.to_string(), r.reason.clone()]
        });
        let mut text = format!("{} on {}\n\n", plan.model.name, plan.machine.name);
        text += &ui::table(&["layers", "experts of each", "place", "bytes", "because"], rows, false);
        text += "\n\nNumbers used\n";
        let rows = plan
            .provenance
            .iter()
            .map(|p| vec![p.what.clone(), p.value.clone(), p.source.clone(), p.note.clone().unwrap_or_default()]);
        text += &ui::table(&["what", "value", "source", "note"], rows, false);
        text
    })
}
