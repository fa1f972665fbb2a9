//! The ordering of docs/cxl-study.md: what arXiv 2507.03305 found for fine-tuning, and where decoding experts differs.

mod common;
#[path = "common/cxl.rs"]
mod cxl;

use cxl::{Arrangement, CXL_BYTES, DRAM_BYTES, FAST_CARD, MEASURED_CARD, Outcome, Setting, evaluate, model};
use tierwise_planner::SolverKind;

const PCIE4: &str = "rtx4090-24g-ddr5-64g";
const PCIE5: &str = "threadripper-rtxpro6000-96g-ddr5-512g";

fn outcome(name: &str, gpu: &'static str, cards: u32, card_bytes_per_s: f64, arrangement: Arrangement) -> Outcome {
    let o = evaluate(&model(name), &Setting { gpu, cards, card_bytes_per_s }, arrangement, SolverKind::Greedy);
    let is_on_cards = matches!(arrangement, Arrangement::Rule | Arrangement::Ours);
    let fits = o.bytes[1] <= DRAM_BYTES && o.bytes[2] <= CXL_BYTES && o.bytes[2] > 0;
    assert!(!is_on_cards || fits, "{name}, {arrangement:?}: {:?}", o.bytes);
    o
}

/// Streamed experts: one card recovers 97 % of DRAM-only or more on a PCIe 4.0 link if copies from DRAM go on beside it, two cards all of it.
#[test]
fn streamed_experts_lose_nothing_on_cards() {
    let share = |name, gpu, cards, rate, dram: &Outcome| {
        let rule =
            outcome(name, gpu, cards, rate, Arrangement::Rule).streamed_bytes_per_s.map(|r| r / dram.streamed_bytes_per_s[0]);
        // The link's limit is not beaten by leaving something out.
        assert!(rule[1] <= 1.000_001, "{name}: {rule:?}");
        rule
    };
    for name in ["deepseek-v3", "kimi-k2"] {
        let dram = outcome(name, PCIE4, 1, MEASURED_CARD, Arrangement::DramOnly);
        let one = share(name, PCIE4, 1, MEASURED_CARD, &dram);
        // Copies one by one, each at its source's rate, are not enough.
        assert!(one[1] >= 0.97 && one[0] < 0.97, "{name}: {one:?}");
        let two = share(name, PCIE4, 2, MEASURED_CARD, &dram);
        assert!(two[0] >= 0.995, "{name}: {two:?}");
        let fast = share(name, PCIE4, 1, FAST_CARD, &dram);
        assert!(fast[0] >= 0.995, "{name}: {fast:?}");
    }
    // A link twice as fast is too much for one card and a model that is mostly on it.
    let dram = outcome("kimi-k2", PCIE5, 1, MEASURED_CARD, Arrangement::DramOnly);
    let one = share("kimi-k2", PCIE5, 1, MEASURED_CARD, &dram);
    assert!(one[1] < 0.97, "{one:?}");
}

/// What the CPU computes with must not be interleaved: decode loses most with it, with any number of these cards; the rule loses less, the
/// plan least.
#[test]
fn interleaving_loses_where_the_cpu_computes() {
    let decode = |cards, a| outcome("deepseek-v3", PCIE4, cards, MEASURED_CARD, a).decode_tokens_per_s;
    let dram = decode(1, Arrangement::DramOnly);
    for cards in [1, 2, 4] {
        let [interleaved, rule, ours] = [Arrangement::Interleave, Arrangement::Rule, Arrangement::Ours].map(|a| decode(cards, a));
        assert!(interleaved < rule && rule <= ours && ours < dram, "{cards} cards: {interleaved} {rule} {ours} {dram}");
        // Unlike streamed bytes: each active expert is read once per token, there is nothing to hide its reading behind.
        assert!(rule < 0.9 * dram, "{cards} cards: {rule} of {dram}");
    }
}
