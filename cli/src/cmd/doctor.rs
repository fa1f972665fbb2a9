//! `tierwise doctor`: findings about this machine with hints, and its memory nodes.

use crate::args::DoctorArgs;
use crate::ui::{self, Ui};
use anyhow::Result;
use serde_json::json;
use tierwise_runtime::doctor::{Status, examine};
use tierwise_runtime::probe::nodes::{Node, Nodes};

pub fn run(args: &DoctorArgs, ui: &Ui) -> Result<()> {
    let nodes = Nodes::of_this_machine();
    let checks = examine(&args.folder, &nodes);
    ui.result(&json!({ "checks": checks, "nodes": nodes }), || {
        let rows = checks.iter().map(|c| {
            let mark = match c.status {
                Status::Ok => "ok",
                Status::Warn => "warn",
                Status::Missing => "missing",
            };
            vec![mark.to_string(), c.name.to_string(), c.found.clone()]
        });
        let mut text = ui::table(&["", "check", "found"], rows, false);
        for c in checks.iter().filter(|c| !c.hint.is_empty()) {
            text += &format!("\n{}: {}", c.name, c.hint);
        }
        if nodes.nodes.len() > 1 || !nodes.cxl.is_empty() || !nodes.dax.is_empty() {
            text += &format!("\n\n{}", node_text(&nodes));
        }
        text
    })
}

/// Memory nodes, and the devices behind them.
fn node_text(nodes: &Nodes) -> String {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let row = |n: &Node| {
        let rated = n.rated.map(|r| {
            let rate = r.read_bandwidth.map(|b| b.to_string());
            [rate, r.read_latency_ns.map(|ns| format!("{ns} ns"))].into_iter().flatten().collect::<Vec<_>>().join(", ")
        });
        let distances = n.distances.iter().map(|(to, d)| format!("{to}: {d}")).collect::<Vec<_>>().join(", ");
        vec![
            n.number.to_string(),
            if n.allowed { n.kind.name().to_string() } else { format!("{}, not allowed", n.kind.name()) },
            n.cpus.len().to_string(),
            n.total.to_string(),
            n.free.to_string(),
            n.page_cache.to_string(),
            or_dash(n.movable.map(|m| m.to_string())),
            or_dash(rated),
            or_dash(n.tier.map(|t| t.to_string())),
            distances,
        ]
    };
    let headers = ["node", "kind", "threads", "memory", "unused", "page cache", "movable", "reads as rated", "tier", "distances"];
    let mut text = ui::table(&headers, nodes.nodes.iter().map(row), false);
    for d in &nodes.cxl {
        let near = d.near_node.map_or(String::new(), |n| format!(", near node {n}"));
        text += &format!("\nCXL device {}: {} volatile, {} persistent{near}", d.name, d.volatile, d.persistent);
    }
    for r in &nodes.regions {
        let ways = r.ways.map_or(String::new(), |w| format!(", over {w} device(s)"));
        text += &format!("\nCXL {}: {} {}{ways}{}", r.name, r.size, r.mode, if r.committed { "" } else { ", not switched on" });
    }
    for d in &nodes.dax {
        let driver = d.driver.as_deref().unwrap_or("no driver");
        let node = d.target_node.map_or(String::new(), |n| format!(", node {n}"));
        text += &format!("\nDAX device {}: {} ({driver}{node}{})", d.name, d.size, if d.behind_cxl { ", CXL" } else { "" });
    }
    for g in &nodes.gpus {
        let node = g.node.map_or("unknown".to_string(), |n| n.to_string());
        text += &format!("\nGPU {} ({}): node {node}", g.address, g.id);
    }
    if let Some((limit, left)) = nodes.memory_limit {
        text += &format!("\ncontrol group: {limit} of memory at most, {left} left");
    }
    for note in &nodes.notes {
        text += &format!("\nnote: {note}");
    }
    text
}
