//! Experts on DRAM and CXL cards in four arrangements, judged alike: the study of docs/cxl-study.md.
//!
//! The rule is that of arXiv 2507.03305 (Liaw, Chen 2025), transferred from fine-tuning to experts: bytes that the CPU computes with stay in
//! DRAM, bytes that are only streamed to the GPU go to CXL, striped over the cards. There the CPU's part is the optimiser step, here it is the
//! experts computed beside their memory; the streamed part is there parameters and activations, here experts copied to the GPU. That
//! copies share the GPU's one link, and all reads of CXL memory the cards, is part of the planner's prices.

use super::common::{config, machine};
use tierwise_cost::cost::Roofline;
use tierwise_cost::machine::{Machine, MemoryKind, Sourced};
use tierwise_cost::model::{Geometry, ModelSpec};
use tierwise_cost::recipe::Recipe;
use tierwise_cost::units::{Bytes, BytesPerS};
use tierwise_planner::evaluate::{Branch, Branches, Loads, Placement, Prices, step_seconds, usage};
use tierwise_planner::price::{Case, PriceTable};
use tierwise_planner::solver::solve;
use tierwise_planner::{Problem, Request, SolverKind};

const GIB: u64 = 1 << 30;
/// Local memory of the machines with CXL.
pub const DRAM_BYTES: u64 = 256 * GIB;
/// All cards together.
pub const CXL_BYTES: u64 = 512 * GIB;
/// A CXL 2.0 x8 expander, all reads: measured (CacheLib OCP demo, the figure of configs/machines).
pub const MEASURED_CARD: f64 = 17.8e9;
/// What such a card is said to reach, 24 to 30 GB/s: above a PCIe 4.0 x16 link.
pub const FAST_CARD: f64 = 27e9;

/// How the host's experts lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    /// 768 GiB of DRAM, no CXL: what the others are compared with.
    DramOnly,
    /// Pages of all of them in turn on DRAM and on every card (`numactl --interleave=all`), on the cards alone once DRAM is full.
    Interleave,
    /// The rule: the CPU computes from DRAM, what does not fit there is on the cards and copied to the GPU when it is needed.
    Rule,
    /// What the planner does when the CPU may also compute straight from CXL; the rule's plan where that is better. At decode nothing is copied
    /// from DRAM.
    Ours,
}

/// One machine and model.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The machine of configs/machines whose GPU it is.
    pub gpu: &'static str,
    /// CXL cards.
    pub cards: u32,
    /// Of one card.
    pub card_bytes_per_s: f64,
}

/// What an arrangement achieves.
#[derive(Debug, Clone, Copy)]
#[allow(dead_code, reason = "the table and the test use their own parts")]
pub struct Outcome {
    /// Decode, one sequence.
    pub decode_tokens_per_s: f64,
    /// A chunk of a prompt with experts copied to the GPU, one copy at a time, each at its source's rate: tokens per second.
    pub prompt_one_by_one: f64,
    /// The same with copies from DRAM and from cards under way at once: tokens per second.
    pub prompt_at_once: f64,
    /// Bytes per second of the copies alone: one by one, and from both at once.
    pub streamed_bytes_per_s: [f64; 2],
    /// Bytes of experts and slots per memory: on the GPU, in DRAM, on cards.
    pub bytes: [u64; 3],
}

/// The model as Q4_K_M.
pub fn model(name: &str) -> ModelSpec {
    let geometry = Geometry::from_toml(&config(&format!("models/{name}.toml"))).expect("a model of configs");
    ModelSpec::with_recipe(geometry, &Recipe::by_name("Q4_K_M").expect("a known recipe")).expect("planned")
}

/// Decode at half of 8192 positions; prompts in chunks of 2048.
fn request() -> Request {
    Request { context: 8192, prompt_tokens: 4096, chunk_tokens: 2048, ..Request::default() }
}

/// The CXL workstation of configs/machines with this GPU, its link, and so many cards.
fn with_cards(s: &Setting) -> Machine {
    let mut m = machine("xeon-cxl-rtx4090");
    let donor = machine(s.gpu);
    let gpu = donor.processor("gpu0").expect("a machine with a GPU").clone();
    *m.processors.iter_mut().find(|p| p.id == "gpu0").expect("it has one") = gpu;
    *m.memories.iter_mut().find(|p| p.id == "vram0").expect("it has one") = donor.memory("vram0").expect("its memory").clone();
    let link = donor.link("dram0", "vram0").expect("its link").clone();
    m.memories.retain(|x| x.kind != MemoryKind::Disk);
    m.links.retain(|l| l.from != "disk0");
    let rate = f64::from(s.cards) * s.card_bytes_per_s;
    for memory in &mut m.memories {
        match memory.kind {
            MemoryKind::Dram => memory.capacity.value = Bytes(DRAM_BYTES),
            MemoryKind::Cxl => {
                memory.capacity.value = Bytes(CXL_BYTES);
                // As a datasheet's figure, so that DRAM and CXL are both discounted to what one gets of it.
                memory.read_bandwidth = Sourced::datasheet(BytesPerS(rate));
            }
            MemoryKind::Vram | MemoryKind::Disk => {}
        }
    }
    for l in &mut m.links {
        match (l.from.as_str(), l.to.as_str()) {
            ("dram0", "vram0") => *l = link.clone(),
            ("cxl0", "vram0") => l.bandwidth = Sourced::prior(BytesPerS(link.bandwidth.value.0.min(rate))),
            ("cxl0", _) => l.bandwidth = Sourced::prior(BytesPerS(rate)),
            _ => {}
        }
    }
    m
}

/// The same with one host memory of `capacity` bytes and these rates instead of DRAM and CXL.
fn one_host_memory(mut m: Machine, capacity: u64, read: Option<f64>, copy: Option<f64>) -> Machine {
    m.memories.retain(|x| x.kind != MemoryKind::Cxl);
    m.links.retain(|l| l.from != "cxl0");
    for p in &mut m.processors {
        p.computes_from.retain(|id| id != "cxl0");
    }
    let dram = m.memories.iter_mut().find(|x| x.kind == MemoryKind::Dram).expect("it has one");
    dram.capacity.value = Bytes(capacity);
    if let Some(rate) = read {
        dram.read_bandwidth = Sourced::datasheet(BytesPerS(rate));
    }
    if let (Some(rate), Some(link)) = (copy, m.links.iter_mut().find(|l| l.from == "dram0" && l.to == "vram0")) {
        link.bandwidth = Sourced::prior(BytesPerS(link.bandwidth.value.0.min(rate)));
    }
    m
}

/// Share of interleaved bytes that is in DRAM.
fn interleaved_share(host_bytes: u64, cards: u32) -> f64 {
    (1.0 / f64::from(1 + cards)).min(DRAM_BYTES as f64 / host_bytes as f64)
}

fn host_bytes(problem: &Problem<'_>) -> u64 {
    let vram = problem.room[problem.memory_index("vram0")];
    problem.expert_bytes().saturating_sub(vram).0
}

/// Seconds of a prompt's chunk with experts copied to the GPU through its one link, copies one by one and those from cards beside others; and
/// bytes per second of the copies.
fn streamed_seconds(problem: &Problem<'_>, table: &PriceTable, placement: &Placement) -> [[f64; 2]; 2] {
    let (mut seconds, mut copies_s, mut bytes) = ([table.other_s; 2], [0.0; 2], 0.0);
    for (i, l) in placement.layers.iter().enumerate() {
        let price = table.layer(i);
        let loads = Loads::new(price, l);
        let branches = Branches::new(price, &loads, table.links.len());
        let slowest = |b: &[Branch]| b.iter().map(|b| b.seconds).fold(0.0, f64::max);
        let one_by_one: f64 = price.tiers.iter().zip(&loads.copied).map(|(tier, copied)| copied * tier.copy_s).sum();
        for (way, copies) in [one_by_one, slowest(&branches.links)].into_iter().enumerate() {
            seconds[way] += price.fixed_s + f64::max(slowest(&branches.processors), copies);
            copies_s[way] += copies;
        }
        bytes += loads.copied.iter().sum::<f64>() * problem.layers[i].expert_bytes.0 as f64;
    }
    [seconds, copies_s.map(|s| bytes / s)]
}

fn outcome(problem: &Problem<'_>, solver: SolverKind) -> Outcome {
    let cost = Roofline::default();
    let prices = Prices::new(problem, &cost, Case::Expected);
    let placement = solve(problem, &prices, solver).expect("the experts fit").placement;
    let used = usage(problem, &placement).expect("solvers keep budgets");
    let of = |id: &str| {
        problem
            .machine
            .memory(id)
            .map_or(0, |_| (used.resident[problem.memory_index(id)] + used.slots[problem.memory_index(id)]).0)
    };
    let streamed = prices.streamed.as_ref().expect("there is a link to the GPU");
    let [seconds, streamed_bytes_per_s] = streamed_seconds(problem, streamed, &placement);
    let prompt = seconds.map(|s| f64::from(streamed.tokens) / s);
    Outcome {
        decode_tokens_per_s: 1.0 / step_seconds(&prices.decode, &placement),
        prompt_one_by_one: prompt[0],
        prompt_at_once: prompt[1],
        streamed_bytes_per_s,
        bytes: [of("vram0"), of("dram0"), of("cxl0")],
    }
}

/// The outcome of an arrangement.
pub fn evaluate(spec: &ModelSpec, s: &Setting, arrangement: Arrangement, solver: SolverKind) -> Outcome {
    let cxl = with_cards(s);
    let cost = Roofline::default();
    let rate = f64::from(s.cards) * s.card_bytes_per_s;
    let posed = |m: &Machine, keep: &dyn Fn(MemoryKind, bool) -> bool| {
        let mut problem = Problem::new(spec, m, request()).expect("a GPU that holds all but experts, hosts that hold those");
        problem.tiers.retain(|t| keep(t.kind, t.through.is_some()));
        outcome(&problem, solver)
    };
    let not_from_dram = |kind, copied| !(kind == MemoryKind::Dram && copied);
    match arrangement {
        Arrangement::DramOnly => posed(&one_host_memory(cxl, DRAM_BYTES + CXL_BYTES, None, None), &|_, _| true),
        Arrangement::Interleave => {
            let dram_rate = cxl.memory("dram0").expect("it has one").read_bandwidth.value.0;
            let plain = one_host_memory(cxl, DRAM_BYTES + CXL_BYTES, None, None);
            let share = interleaved_share(host_bytes(&Problem::new(spec, &plain, request()).expect("as above")), s.cards);
            // Whoever reads an expert reads from all at once and waits for the slower; the cards' rate in terms of DRAM's discount.
            let both = (dram_rate / share).min(rate / (1.0 - share) * cost.cxl.value / cost.dram.value);
            posed(&one_host_memory(plain, DRAM_BYTES + CXL_BYTES, Some(both), Some(rate / (1.0 - share))), &|_, _| true)
        }
        Arrangement::Rule => posed(&cxl, &|kind, copied| not_from_dram(kind, copied) && (kind != MemoryKind::Cxl || copied)),
        Arrangement::Ours => {
            let (planned, rule) = (posed(&cxl, &not_from_dram), evaluate(spec, s, Arrangement::Rule, solver));
            if rule.decode_tokens_per_s > planned.decode_tokens_per_s { rule } else { planned }
        }
    }
}
