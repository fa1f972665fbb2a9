//! How far usual rules are from the optimum, on layers with loads of recorded routing. Prints a table; asserts only what must hold.
//!
//! Times are those of the cost model's formulas with these numbers: GPU 0.55 x 768 GB/s and 77 TFLOP/s (RTX A6000, half of its
//! tensor peak), 5 us per launch; link 25.6 GB/s, 10 us (PCIe 4.0 x16); CPU 8 channels of DDR4-3200 at 0.75 of peak, 153.6 GB/s, 1.4
//! TFLOP/s, or a third of that for HybriMoE's 10 cores, and 85 us once; weights of 4.5 bits.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tierwise_planner::engine::schedule::{Item, LayerWork, RowSplit, RowSplitScratch, Rule, Schedule, Scratch, row_split};
use tierwise_planner::routing::RoutingTrace;

struct Model {
    name: &'static str,
    hidden: f64,
    inner: f64,
    num_experts: usize,
    experts_per_token: usize,
    /// Times the inner size of an expert.
    shared: f64,
}

const MODELS: [Model; 3] = [
    Model { name: "DeepSeek-V2-Lite", hidden: 2048.0, inner: 1408.0, num_experts: 64, experts_per_token: 6, shared: 2.0 },
    Model { name: "Qwen2-57B-A14B", hidden: 3584.0, inner: 2560.0, num_experts: 64, experts_per_token: 8, shared: 8.0 },
    Model { name: "Mixtral-8x7B", hidden: 4096.0, inner: 14336.0, num_experts: 8, experts_per_token: 2, shared: 0.0 },
];

struct Times {
    /// Share of all cores.
    cpu: f64,
}

impl Times {
    fn gpu_s(&self, parameters: f64, tokens: f64) -> f64 {
        (parameters * 4.5 / 8.0 / (0.55 * 768e9)).max(2.0 * parameters * tokens / 77e12) + 5e-6
    }

    fn cpu_s(&self, parameters: f64, tokens: f64) -> f64 {
        (parameters * 4.5 / 8.0 / (self.cpu * 153.6e9)).max(2.0 * parameters * tokens / (self.cpu * 1.4e12))
    }
}

/// Experts that a token chose in a layer. V2-Lite's own for 6 of 64; two more from the next layer for 8 of 64; 2 of 8 uniformly, as
/// Mixtral is almost balanced.
fn chosen(model: &Model, trace: &RoutingTrace, token: usize, layer: usize, rng: &mut StdRng) -> Vec<usize> {
    if model.num_experts == 8 {
        return rand::seq::index::sample(rng, 8, 2).into_vec();
    }
    let mut set: Vec<usize> = trace.chosen(token, layer).map(usize::from).collect();
    for e in trace.chosen(token, layer + 1) {
        if set.len() < model.experts_per_token && !set.contains(&usize::from(e)) {
            set.push(usize::from(e));
        }
    }
    set
}

fn layer(model: &Model, times: &Times, trace: &RoutingTrace, tokens: usize, cached_share: f64, rng: &mut StdRng) -> LayerWork {
    let layer = rng.random_range(0..trace.num_moe_layers - 1);
    let first = rng.random_range(300..trace.num_tokens() - tokens);
    let mut loads = vec![0_u32; model.num_experts];
    for token in first..first + tokens {
        chosen(model, trace, token, layer, rng).into_iter().for_each(|e| loads[e] += 1);
    }
    // Least recently used: the experts of the last tokens are there.
    let slots = (model.num_experts as f64 * cached_share) as usize;
    let mut cached = Vec::new();
    for token in (0..first).rev() {
        for e in chosen(model, trace, token, layer, rng) {
            if cached.len() < slots && !cached.contains(&e) {
                cached.push(e);
            }
        }
        if cached.len() == slots {
            break;
        }
    }
    let parameters = 3.0 * model.hidden * model.inner;
    let bytes = parameters * 4.5 / 8.0;
    let make = |(e, load): (usize, &u32)| Item {
        expert: e as u32,
        gpu_s: times.gpu_s(parameters, f64::from(*load)),
        cpu_s: times.cpu_s(parameters, f64::from(*load)),
        move_s: if cached.contains(&e) { 0.0 } else { 10e-6 + bytes / 25.6e9 },
        contended_s: bytes / 153.6e9,
        worth: 0.0,
    };
    let items = loads.iter().enumerate().filter(|(_, load)| **load > 0).map(make).collect();
    let gpu_busy_s = if model.shared > 0.0 { times.gpu_s(parameters * model.shared, tokens as f64) } else { 0.0 };
    LayerWork { items, gpu_busy_s, link_busy_s: 0.0, cpu_first_s: 85e-6 }
}

fn trace() -> RoutingTrace {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let meta = std::fs::read_to_string(folder.join("dsv2lite_12seq.meta.json")).unwrap();
    RoutingTrace::new(&meta, std::fs::read(folder.join("dsv2lite_12seq.ids.u8")).unwrap()).unwrap()
}

#[test]
fn rules_against_the_optimum() {
    let trace = trace();
    let (mut scratch, mut best, mut out) = (Scratch::default(), Schedule::default(), Schedule::default());
    let rules = [Rule::Hybrimoe, Rule::Greedy, Rule::Static, Rule::AllMoved];
    println!(
        "makespan over the optimum's, mean / max; caches of 25, 50 and 75 %; proven: optimum proven, gap: most it can be off else"
    );
    println!("{:<42} {:^13} {:^13} {:^13} {:^13} proven   gap", "", "hybrimoe", "greedy", "static", "all moved");
    for (cores, times) in [("all cores", Times { cpu: 1.0 }), ("a third", Times { cpu: 1.0 / 3.0 })] {
        for model in &MODELS {
            for tokens in [1, 32, 128, 512, 1024] {
                let mut rng = StdRng::seed_from_u64(tokens as u64);
                let layers = if tokens == 1 { 300 } else { 60 };
                let (mut sum, mut max, mut proven, mut gap) = ([0.0; 4], [0.0_f64; 4], 0, 0.0_f64);
                for n in 0..layers {
                    let work = layer(model, &times, &trace, tokens, [0.25, 0.5, 0.75][n % 3], &mut rng);
                    Rule::Exact.decide(&work, &mut scratch, &mut best);
                    assert!(best.is_valid(&work));
                    proven += usize::from(scratch.is_proven());
                    assert!(scratch.lower_bound_s() <= best.makespan_s * (1.0 + 1e-9));
                    gap = gap.max(best.makespan_s / scratch.lower_bound_s() - 1.0);
                    for (r, rule) in rules.iter().enumerate() {
                        rule.decide(&work, &mut scratch, &mut out);
                        let ratio = out.makespan_s / best.makespan_s;
                        assert!(ratio >= 1.0 - 1e-9, "{}: {ratio} {work:?}", rule.name());
                        sum[r] += ratio;
                        max[r] = max[r].max(ratio);
                    }
                }
                let name = format!(
                    "{}, {cores}, {}",
                    model.name,
                    if tokens == 1 { "decode".into() } else { format!("prefill {tokens}") }
                );
                let columns: Vec<String> = (0..4).map(|r| format!("{:6.3}/{:6.2}", sum[r] / layers as f64, max[r])).collect();
                println!("{name:<42} {} {:5.0} % {:.4}", columns.join(" "), 100.0 * proven as f64 / layers as f64, gap);
            }
        }
    }
}

#[test]
fn dividing_an_expert_helps_decode_with_few_big_ones() {
    let trace = trace();
    let (mut room, mut divided) = (RowSplitScratch::default(), RowSplit::default());
    let (mut scratch, mut whole) = (Scratch::default(), Schedule::default());
    for (cores, times) in [("all cores", Times { cpu: 1.0 }), ("a third", Times { cpu: 1.0 / 3.0 })] {
        for (model, cached) in [(2, 0.25), (2, 0.5), (2, 0.75), (0, 0.5), (1, 0.5)] {
            let model = &MODELS[model];
            let mut rng = StdRng::seed_from_u64(9);
            let (mut ratio, mut least, mut used, mut saved_s) = (0.0, f64::INFINITY, 0, 0.0);
            for _ in 0..60 {
                let work = layer(model, &times, &trace, 1, cached, &mut rng);
                row_split(&work, 64, &mut room, &mut divided);
                Rule::Exact.decide(&work, &mut scratch, &mut whole);
                let r = divided.schedule.makespan_s / whole.makespan_s;
                assert!(r <= 1.0);
                ratio += r / 60.0;
                saved_s += (whole.makespan_s - divided.schedule.makespan_s) / 60.0;
                least = least.min(r);
                used += usize::from(divided.split.is_some());
            }
            println!(
                "{}, {cores}, {:.0} % cached, decode: {ratio:.3} of the whole schedule's time, {:.0} us saved, least {least:.3}, divided in {used} of 60",
                model.name,
                cached * 100.0,
                saved_s * 1e6
            );
        }
    }
}
