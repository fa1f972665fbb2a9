//! The tables of docs/cxl-study.md: experts on DRAM and 1, 2 or 4 CXL cards, interleaved, by the rule of arXiv 2507.03305, and as planned.
//!
//! `cargo run --release -p tierwise-planner --example cxl_study [-- auto|greedy [model]]`

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/common/cxl.rs"]
mod cxl;

use cxl::{Arrangement, FAST_CARD, MEASURED_CARD, Outcome, Setting, evaluate, model};
use tierwise_cost::model::ModelSpec;
use tierwise_planner::SolverKind;

const GPUS: [(&str, &str); 3] = [
    ("rtx4090-24g-ddr5-64g", "RTX 4090 24 GB, PCIe 4"),
    ("threadripper-rtx6000ada-48g-ddr5-256g", "RTX 6000 Ada 48 GB, PCIe 4"),
    ("threadripper-rtxpro6000-96g-ddr5-512g", "RTX PRO 6000 96 GB, PCIe 5"),
];

fn main() -> Result<(), tierwise_planner::PlanError> {
    let solver = std::env::args().nth(1).map_or(Ok(SolverKind::Auto), |name| name.parse())?;
    let only = std::env::args().nth(2);
    for name in ["deepseek-v3", "kimi-k2"].into_iter().filter(|n| only.as_deref().is_none_or(|o| o == *n)) {
        let spec = model(name);
        println!("\n### {} Q4_K_M, {:.0} GB of experts\n", spec.name, spec.expert_bytes().0 as f64 / 1e9);
        println!(
            "| GPU | cards | GB/s per card | decode, tokens/s: DRAM only | interleaved | rule | ours | streamed, GB/s: DRAM only | interleaved | rule, one by one | rule, both at once | ours: GB on GPU / DRAM / CXL |"
        );
        println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
        for (gpu, title) in GPUS {
            // Cards make no difference to it.
            let first = Setting { gpu, cards: 1, card_bytes_per_s: FAST_CARD };
            let dram = evaluate(&spec, &first, Arrangement::DramOnly, solver);
            for card_bytes_per_s in [MEASURED_CARD, FAST_CARD] {
                for cards in [1, 2, 4] {
                    let setting = Setting { gpu, cards, card_bytes_per_s };
                    println!("| {title} | {cards} | {:.1} | {}", card_bytes_per_s / 1e9, figures(&spec, &setting, &dram, solver));
                }
            }
        }
    }
    Ok(())
}

/// Tokens per second, and percent of DRAM only.
fn figures(spec: &ModelSpec, setting: &Setting, dram: &Outcome, solver: SolverKind) -> String {
    let [interleaved, rule, ours] =
        [Arrangement::Interleave, Arrangement::Rule, Arrangement::Ours].map(|a| evaluate(spec, setting, a, solver));
    let percent = |x: f64, of: f64| format!("{x:.2} ({:.0} %)", 100.0 * x / of);
    let decode = [&interleaved, &rule, &ours].map(|o| percent(o.decode_tokens_per_s, dram.decode_tokens_per_s));
    let all = dram.streamed_bytes_per_s[0];
    let streamed = [interleaved.streamed_bytes_per_s[0], rule.streamed_bytes_per_s[0], rule.streamed_bytes_per_s[1]];
    let prompt = streamed.map(|rate| format!("{:.1} ({:.0} %)", rate / 1e9, 100.0 * rate / all));
    let bytes = ours.bytes.map(|b| format!("{:.0}", b as f64 / 1e9));
    let (all_dram, all_prompt) = (dram.decode_tokens_per_s, all / 1e9);
    format!("{all_dram:.2} | {} | {all_prompt:.1} | {} | {} |", decode.join(" | "), prompt.join(" | "), bytes.join(" / "))
}
