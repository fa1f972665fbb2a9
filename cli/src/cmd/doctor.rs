//! `tierwise doctor`

use crate::args::DoctorArgs;
use crate::ui::{self, Ui};
use anyhow::Result;
use serde_json::json;
use tierwise_runtime::doctor::{Status, examine};

pub fn run(args: &DoctorArgs, ui: &Ui) -> Result<()> {
    let checks = examine(&args.folder);
    ui.result(&json!({ "checks": checks }), || {
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
        text
    })
}
