//! Capacity studies, marginal values and the serving simulation, against hand computation and slow replays.

mod common;

use common::{config, machine, qwen3_30b, small_machine, tiny};
use tierwise_cost::cost::{CostModel, Roofline};
use tierwise_cost::machine::{Machine, MemoryKind};
use tierwise_cost::units::{Bytes, BytesPerS, Seconds};
use tierwise_planner::capacity::{Opened, Study, evaluate_point, pareto_front};
use tierwise_planner::evaluate::Prices;
use tierwise_planner::marginal::{marginal_values, upgrades};
use tierwise_planner::price::Case;
use tierwise_planner::serving::memory::KvPool;
use tierwise_planner::serving::metrics::{Limits as Promise, Metrics, tpot_s};
use tierwise_planner::serving::steps::{Chunk, decode_seconds, placement_of, prompt_seconds};
use tierwise_planner::serving::{
    Admission, Arrival, Arrivals, Config, Outcome, Serving, Slo, StepSeconds, StepTable, simulate, study_load,
};
use tierwise_planner::{Limits, Problem, Request, SolverKind, make_plan};

fn roofline(_: &Machine) -> Box<dyn CostModel> {
    Box::new(Roofline::default())
}

/// 1 ms per prompt token, 10 ms per decode step, whatever the batch.
struct Simple;
impl StepSeconds for Simple {
    fn seconds(&self, decoding: u32, _: f64, chunks: &[Chunk]) -> f64 {
        let prompt: u32 = chunks.iter().map(|c| c.tokens).sum();
        f64::from(prompt) * 1e-3 + if decoding > 0 { 10e-3 } else { 0.0 }
    }
}

fn arrivals(list: &[(f64, u32, u32)]) -> Arrivals {
    let requests = list.iter().map(|(at_s, p, o)| Arrival { at_s: *at_s, prompt_tokens: *p, output_tokens: *o }).collect();
    Arrivals { format: "test", requests, skipped: 0 }
}

/// Numbers that look random and are the same everywhere.
fn noise(seed: u64) -> impl FnMut() -> f64 {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Requests with many short and some very long answers.
fn heavy_tailed(count: usize, rate_per_s: f64, seed: u64) -> Arrivals {
    let mut u = noise(seed);
    let mut at = 0.0;
    let list: Vec<(f64, u32, u32)> = (0..count)
        .map(|_| {
            at += -(1.0 - u()).ln() / rate_per_s;
            let long = u() < 0.1;
            let output = 1 + (u() * if long { 900.0 } else { 60.0 }) as u32;
            (at, 1 + (u() * 300.0) as u32, output)
        })
        .collect();
    arrivals(&list)
}

#[test]
fn one_request_alone_takes_what_its_steps_take() {
    let pool = KvPool::linear(1 << 40, 4096, 1000);
    let config = Config { chunk_tokens: 512, ..Config::default() };
    let run = simulate(&arrivals(&[(0.0, 100, 11)]), 1.0, &pool, &Simple, &config);
    let r = run.requests[0];
    assert!((r.first_token_s.unwrap() - 0.1).abs() < 1e-12);
    assert!((tpot_s(&r).unwrap() - 0.01).abs() < 1e-12);
    assert!((r.finish_s - 0.2).abs() < 1e-12);
    assert_eq!((run.steps, run.tokens, run.prompt_tokens, run.most_running), (11, 11, 100, 1));
    // A prompt longer than a chunk takes several steps, and its tokens take as long in all.
    let run = simulate(&arrivals(&[(0.0, 1100, 1)]), 1.0, &pool, &Simple, &config);
    assert_eq!(run.steps, 3);
    assert!((run.requests[0].first_token_s.unwrap() - 1.1).abs() < 1e-12);
    assert_eq!(tpot_s(&run.requests[0]), None);
}

#[test]
fn two_requests_by_hand() {
    // Steps of at most 128 tokens. Both arrive at 0 with 100 prompt tokens and 3 tokens each:
    // step 1: 100 of a, 28 of b: 128 ms, first token of a. Step 2: a decodes, 72 of b: 82 ms, first token of b, second of a.
    // Step 3: both decode: 10 ms, a is done. Step 4: b decodes: 10 ms.
    let pool = KvPool::linear(1 << 40, 4096, 1000);
    let config = Config { chunk_tokens: 128, admission: Admission::Aggressive, ..Config::default() };
    let run = simulate(&arrivals(&[(0.0, 100, 3), (0.0, 100, 3)]), 1.0, &pool, &Simple, &config);
    let near = |x: f64, y: f64| assert!((x - y).abs() < 1e-12, "{x} {y}");
    near(run.requests[0].first_token_s.unwrap(), 0.128);
    near(run.requests[0].finish_s, 0.22);
    near(run.requests[1].first_token_s.unwrap(), 0.21);
    near(run.requests[1].finish_s, 0.23);
    let mut gaps: Vec<(f64, u32)> = run.gaps.clone();
    gaps.sort_by(|a, b| a.0.total_cmp(&b.0));
    assert_eq!(gaps.iter().map(|g| g.1).sum::<u32>(), 4);
    near(gaps.last().unwrap().0, 0.082);
    let m = Metrics::new(&run, Promise { ttft_s: 0.15, tpot_s: 0.05 });
    assert_eq!(m.attained, 0.5, "b waits too long for its first token");
    near(m.goodput_per_s, 1.0 / 0.23);
    near(m.users, (0.22 + 0.23) / 0.23);
}

#[test]
fn an_eviction_by_hand() {
    // Blocks of 16 tokens, room for 4 blocks, requests of up to 64 tokens. a and b: 17 prompt tokens (2 blocks each), 30 tokens.
    // Both fill 2 blocks; a's 33rd token needs a third: b goes, waits until a has finished, and computes prompt and answer again.
    let pool = KvPool::linear(4 * 16, 64, 1);
    let config = Config { chunk_tokens: 64, admission: Admission::Aggressive, ..Config::default() };
    let run = simulate(&arrivals(&[(0.0, 17, 30), (0.0, 17, 30)]), 1.0, &pool, &Simple, &config);
    assert_eq!(run.evictions, 1);
    // First tokens come with the prompts; 15 more until both hold 32 tokens. Then b goes with 32 tokens in its cache.
    assert_eq!(run.recomputed_tokens, 32);
    assert_eq!(run.prompt_tokens, 17 + 17 + 33);
    let (a, b) = (run.requests[0], run.requests[1]);
    assert!((a.finish_s - (0.034 + 29.0 * 0.01)).abs() < 1e-12, "{a:?}");
    // b: prompt and 16 tokens again, which yields its 17th token, and 13 more.
    assert!((b.finish_s - (a.finish_s + 0.033 + 13.0 * 0.01)).abs() < 1e-12, "{b:?}");
    assert_eq!((a.tokens, b.tokens), (30, 30));
    // Who looks ahead starts b later and computes nothing twice.
    for admission in [Admission::ReserveLongest, Admission::PastFuture] {
        let config = Config { admission, ..config.clone() };
        let run = simulate(&arrivals(&[(0.0, 17, 30), (0.0, 17, 30)]), 1.0, &pool, &Simple, &config);
        assert_eq!((run.evictions, run.recomputed_tokens, run.most_running), (0, 0, 1));
    }
}

#[test]
fn every_request_finishes_once_and_memory_is_never_exceeded() {
    for seed in 1..=4 {
        let trace = heavy_tailed(300, 20.0, seed);
        for admission in Admission::ALL {
            // Room for about four of the longest.
            let pool = KvPool::linear(16 * 300, 1250, 1);
            let config = Config { admission, max_running: 24, chunk_tokens: 256, ..Config::default() };
            let run = simulate(&trace, 1.0, &pool, &Simple, &config);
            for (r, served) in trace.requests.iter().zip(&run.requests) {
                assert_eq!(served.tokens, r.output_tokens, "{admission:?}");
                let first = served.first_token_s.unwrap();
                assert!(served.arrival_s <= first && first <= served.finish_s);
            }
            let sum: u64 = trace.requests.iter().map(|r| u64::from(r.output_tokens)).sum();
            assert_eq!(run.tokens, sum);
            let gaps: u64 = run.gaps.iter().map(|g| u64::from(g.1)).sum();
            assert_eq!(gaps, sum - 300, "a gap after every token but the last of a request");
            assert!(run.peak_kv_bytes <= pool.capacity_bytes, "{admission:?}: {}", run.peak_kv_bytes);
            let prompts: u64 = trace.requests.iter().map(|r| u64::from(r.prompt_tokens)).sum();
            assert!(run.prompt_tokens >= prompts + run.recomputed_tokens.saturating_sub(run.evictions));
            assert!(admission != Admission::ReserveLongest || run.evictions == 0, "what is reserved is never taken away");
            assert_eq!(run, simulate(&trace, 1.0, &pool, &Simple, &config), "the same again");
        }
    }
}

#[test]
fn looking_ahead_beats_reserving_and_hoping() {
    // Steps of a machine that is better used by wider batches.
    struct Wide;
    impl StepSeconds for Wide {
        fn seconds(&self, decoding: u32, _: f64, chunks: &[Chunk]) -> f64 {
            let prompt: u32 = chunks.iter().map(|c| c.tokens).sum();
            10e-3 + f64::from(prompt) * 0.2e-3 + f64::from(decoding) * 0.2e-3
        }
    }
    let (mut reserve, mut hope, mut ahead) = (0.0, 0.0, 0.0);
    let (mut evicted_hoping, mut evicted_ahead) = (0, 0);
    for seed in 1..=5 {
        let trace = heavy_tailed(600, 1000.0, seed);
        let pool = KvPool::linear(16 * 300, 1250, 1);
        let run = |admission| {
            let config = Config { admission, max_running: 64, chunk_tokens: 256, ..Config::default() };
            simulate(&trace, 1.0, &pool, &Wide, &config)
        };
        let of = |run: &Outcome| Metrics::new(run, Promise { ttft_s: 1.0, tpot_s: 1.0 }).tokens_per_s;
        let (r, h, a) = (run(Admission::ReserveLongest), run(Admission::Aggressive), run(Admission::PastFuture));
        reserve += of(&r);
        hope += of(&h);
        ahead += of(&a);
        evicted_hoping += h.evictions;
        evicted_ahead += a.evictions;
    }
    println!("tokens/s: reserve {reserve:.0}, hope {hope:.0}, ahead {ahead:.0}; evictions {evicted_hoping} and {evicted_ahead}");
    assert!(ahead > 1.2 * reserve, "{ahead} {reserve}");
    assert!(evicted_ahead * 4 < evicted_hoping, "{evicted_ahead} {evicted_hoping}");
    assert!(ahead > 0.95 * hope, "{ahead} {hope}");
}

#[test]
fn requests_beyond_the_context_are_refused_and_count_against_the_promise() {
    let pool = KvPool::linear(1 << 30, 100, 1);
    let run = simulate(&arrivals(&[(0.0, 90, 11), (0.0, 90, 10)]), 1.0, &pool, &Simple, &Config::default());
    assert_eq!((run.refused, run.requests[0].first_token_s, run.requests[1].tokens), (1, None, 10));
    assert_eq!(Metrics::new(&run, Promise { ttft_s: 9.0, tpot_s: 9.0 }).attained, 0.5);
}

fn plan_of(batch: u32, context: u32, vram_gib: u64) -> (tierwise_cost::model::ModelSpec, Machine, tierwise_planner::Plan) {
    let (spec, m) = (qwen3_30b("Q4_K_M"), machine("rtx3090-24g-ddr4-64g"));
    let limits = Limits { vram: Some(Bytes::gib(vram_gib)), ..Limits::default() };
    let request = Request { batch, context, limits, ..Request::default() };
    let problem = Problem::new(&spec, &m, request).unwrap();
    let plan = make_plan(&problem, &Roofline::default(), SolverKind::Greedy).unwrap();
    (spec, m, plan)
}

#[test]
fn step_times_are_those_of_the_plan() {
    let (spec, m, plan) = plan_of(8, 4096, 14);
    let placement = placement_of(&plan);
    let cost = Roofline::default();
    let table = StepTable::new(&spec, &m, &plan.request, &placement, &cost, Case::Expected, 32).unwrap();
    // At the plan's own batch and position: the plan's prediction.
    let step = table.seconds(8, f64::from(plan.request.decode_past()), &[]);
    assert!((step / plan.predicted.decode_step_s.value - 1.0).abs() < 1e-6, "{step}");
    let prompt = table.seconds(0, 0.0, &[Chunk { tokens: 512, past: 0 }]);
    assert!((prompt / plan.predicted.ttft_s.value - 1.0).abs() < 1e-6, "{prompt}");
    // Off the grid: near the prices themselves.
    let mut problem = Problem::new(&spec, &m, plan.request.clone()).unwrap();
    let mut worst = 0.0_f64;
    for (batch, past) in [(1, 77), (5, 3000), (7, 100), (11, 1500), (23, 4000), (29, 700)] {
        let exact = decode_seconds(&mut problem, &placement, &cost, Case::Expected, batch, past);
        worst = worst.max((table.seconds(batch, f64::from(past), &[]) / exact - 1.0).abs());
    }
    let mut problem = Problem::new(&spec, &m, plan.request).unwrap();
    for (tokens, past) in [(5, 0), (39, 900), (77, 0), (300, 3000), (400, 100), (511, 1111)] {
        let exact = prompt_seconds(&mut problem, &placement, &cost, Case::Expected, tokens, past);
        worst = worst.max((table.seconds(0, 0.0, &[Chunk { tokens, past }]) / exact - 1.0).abs());
    }
    println!("largest error of the interpolation: {:.2} %", worst * 100.0);
    assert!(worst < 0.03, "{worst}");
    // A mixed step is longer than each of its parts and shorter than one after the other.
    let both = table.seconds(8, 1000.0, &[Chunk { tokens: 300, past: 512 }]);
    let (a, b) = (table.seconds(8, 1000.0, &[]), table.seconds(0, 0.0, &[Chunk { tokens: 300, past: 512 }]));
    assert!(both >= a.max(b) && both <= (a + b) * 1.02, "{both} {a} {b}");
}

#[test]
fn a_saturated_simulation_gives_the_tokens_per_second_of_the_plan() {
    let (spec, m, plan) = plan_of(8, 2048, 14);
    let placement = placement_of(&plan);
    let table = StepTable::new(&spec, &m, &plan.request, &placement, &Roofline::default(), Case::Expected, 8).unwrap();
    let pool = KvPool::of_plan(&spec, &plan, 8).unwrap();
    // Short prompts, answers that fill the context: positions average to the half of it, where the plan is priced.
    let trace = arrivals(&(0..32).map(|_| (0.0, 1, 2047)).collect::<Vec<_>>());
    let config = Config { max_running: 8, chunk_tokens: 512, admission: Admission::ReserveLongest, ..Config::default() };
    let run = simulate(&trace, 1.0, &pool, &table, &config);
    let got = run.tokens as f64 / run.end_s;
    let planned = plan.predicted.decode_tokens_per_s.value;
    assert!((got / planned - 1.0).abs() < 0.01, "{got} tok/s, planned {planned}");
    assert_eq!(run.most_running, 8);
}

#[test]
fn the_largest_load_is_that_of_a_scan() {
    let trace = heavy_tailed(200, 1.0, 9);
    let pool = KvPool::linear(1 << 30, 1250, 1);
    let config = Config { max_running: 8, ..Config::default() };
    let slo = Slo { ttft: Seconds(1.0), tokens_per_s: 40.0, share: 0.9 };
    let serving = Serving { arrivals: &trace, pool: &pool, config: &config, slo };
    let report = study_load(&serving, &Simple, None);
    let limit = report.limit.expect("alone everything is kept");
    assert!(limit.metrics.attained >= 0.9);
    let attained = |load: f64| {
        let run = simulate(&trace, load, &pool, &Simple, &config);
        Metrics::new(&run, Promise { ttft_s: 1.0, tpot_s: 1.0 / 40.0 }).attained
    };
    let scan = (1..2000).map(|i| f64::from(i) * 0.01).take_while(|l| attained(*l) >= 0.9).last().unwrap();
    assert!(limit.load > 0.9 * scan && limit.load < 1.3 * scan, "{} and {scan}", limit.load);
    assert!(attained(limit.load * 1.1) < 0.95, "far beyond the limit it does not hold");
    assert!(report.sentence.contains("users at once") && report.sentence.contains("40 tok/s"), "{}", report.sentence);
    // What fails alone fails at every load, and the sentence says what can be had.
    let strict = Serving { slo: Slo { ttft: Seconds(0.001), ..slo }, ..serving };
    let report = study_load(&strict, &Simple, None);
    assert!(report.limit.is_none() && report.sentence.starts_with("At no load"), "{}", report.sentence);
}

#[test]
fn an_upgrade_never_harms_and_is_worth_what_a_new_plan_says() {
    let (spec, m) = (qwen3_30b("Q4_K_M"), machine("rtx3090-24g-ddr4-64g"));
    let limits = Limits { vram: Some(Bytes::gib(8)), ..Limits::default() };
    let request = Request { limits, ..Request::default() };
    let values = marginal_values(&spec, &m, &request, &roofline, SolverKind::Auto).unwrap();
    for v in &values {
        assert!(v.gain >= -1e-9 && v.before > 0.0, "{v:?}");
        assert!((v.after - v.before - v.gain).abs() < 1e-9);
    }
    let of = |what: &str| values.iter().find(|v| v.what == what).unwrap_or_else(|| panic!("{what} in {values:?}"));
    assert!(of("+1 GiB VRAM").gain > 0.0);
    assert_eq!(of("+1 GiB DRAM").gain, 0.0, "all experts fit without it");
    assert!(of("+1 GB/s dram0").gain > 0.0, "CPU experts are read from it");
    let more = Request { limits: Limits { vram: Some(Bytes::gib(9)), ..limits }, ..request };
    let problem = Problem::new(&spec, &m, more).unwrap();
    let plan = make_plan(&problem, &Roofline::default(), SolverKind::Auto).unwrap();
    let speed = plan.predicted.decode_tokens_per_s.value;
    assert!(of("+1 GiB VRAM").after >= speed * (1.0 - 1e-8), "{} {speed}", of("+1 GiB VRAM").after);
    // At the installed size the budget cannot grow without the memory.
    let full = Limits { vram: Some(Bytes::gib(24)), ..Limits::default() };
    let up = upgrades(&m, full).into_iter().find(|u| u.what == "+1 GiB VRAM").unwrap();
    assert_eq!(up.limits.vram, Some(Bytes::gib(25)));
    assert_eq!(up.machine.memories_of(MemoryKind::Vram).map(|m| m.capacity.value).sum::<Bytes>(), Bytes::gib(25));
}

#[test]
fn a_faster_memory_is_worth_what_the_roofline_says() {
    // A CPU-only machine whose step is nothing but reading: seconds = bytes / (share x rate) + launches.
    let (spec, m) = (qwen3_30b("Q4_K_M"), small_machine(0, 64 << 30, 0));
    let request = Request { context: 512, ..Request::default() };
    let value = &marginal_values(&spec, &m, &request, &roofline, SolverKind::Greedy).unwrap();
    let v = value.iter().find(|v| v.what == "+1 GB/s dram0").unwrap();
    let problem = Problem::new(&spec, &m, request).unwrap();
    let plan = make_plan(&problem, &Roofline::default(), SolverKind::Greedy).unwrap();
    let bytes: f64 = plan.predicted.bytes_per_token.iter().map(|b| b.bytes.0 as f64).sum();
    let reading = |rate: f64| bytes / (0.68 * rate);
    let launches = 1.0 / v.before - reading(50e9);
    assert!(launches > 0.0 && launches < 0.1 / v.before, "{launches}");
    let expected = 1.0 / (reading(51e9) + launches);
    assert!((v.after / expected - 1.0).abs() < 1e-3, "{} {expected}", v.after);
}

#[test]
fn equal_parts_of_a_machine_are_changed_together() {
    let names = |name: &str| -> Vec<String> { upgrades(&machine(name), Limits::default()).into_iter().map(|u| u.what).collect() };
    assert_eq!(
        names("xeon-cxl-rtx4090"),
        [
            "+1 GiB VRAM",
            "+1 GiB DRAM",
            "+1 GiB CXL memory",
            "+1 GB/s vram0",
            "+1 GB/s dram0",
            "+1 GB/s cxl0",
            "+1 GB/s disk0",
            "+1 GB/s dram0->vram0",
            "+1 GB/s cxl0->vram0",
        ]
    );
    assert!(names("xeon-2s-ddr5-1t").contains(&"+1 GB/s dram0, dram1".to_string()), "{:?}", names("xeon-2s-ddr5-1t"));
    let cxl = upgrades(&machine("xeon-cxl-rtx4090"), Limits::default()).into_iter().find(|u| u.what == "+1 GB/s cxl0").unwrap();
    assert_eq!(cxl.machine.link("cxl0", "dram0").unwrap().bandwidth.value, BytesPerS(36.6e9), "a card is as fast as its port");
    assert_eq!(cxl.machine.link("cxl0", "vram0").unwrap().bandwidth.value, BytesPerS(25.6e9));
}

const STUDY: &str = r#"
name = "test"
question = "Which?"
[base]
model = "qwen3-30b-a3b@Q4_K_M"
machine = "rtx3090-24g-ddr4-64g"
[sweep]
vram = { from = "8 GiB", to = "24 GiB", steps = 3 }
batch = [1, 8]
"#;

#[test]
fn a_study_is_the_product_of_its_axes_in_order() {
    let study = Study::from_toml(STUDY).unwrap();
    let points = study.points().unwrap();
    let got: Vec<_> = points.iter().map(|p| (p.vram.unwrap().0 >> 30, p.batch)).collect();
    assert_eq!(got, [(8, 1), (8, 8), (16, 1), (16, 8), (24, 1), (24, 8)]);
    assert!(points.iter().all(|p| p.model == "qwen3-30b-a3b" && p.format == "Q4_K_M" && p.context == 4096));
    assert_eq!(study.swept(), ["vram", "batch"]);
}

#[test]
fn a_wrong_study_names_the_key() {
    let with = |from: &str, to: &str| Study::from_toml(&STUDY.replace(from, to)).unwrap_err().to_string();
    for (from, to, words) in [
        ("batch = [1, 8]", "batches = [1, 8]", "batches"),
        ("batch = [1, 8]", "batch = []", "sweep.batch is an empty list"),
        ("batch = [1, 8]", "batch = { from = 1, to = 4000, steps = 900 }\ncontext = [1, 2, 3, 4]", "10800 combinations"),
        ("steps = 3", "steps = 0", "sweep.vram is 0 steps"),
        ("\"8 GiB\"", "8", "line 8"),
        ("name = \"test\"", "name = \" \"", "name is empty"),
        ("model = ", "modle = ", "modle"),
        ("machine = ", "vram = \"8 GiB\"\nmachine = ", "sweep.vram is given besides the budget in base"),
        ("machine = ", "format = \"Q8_0\"\nmachine = ", "qwen3-30b-a3b@Q4_K_M"),
        ("[sweep]", "[serving.slo]\nshare = 1.5\n[sweep]", "serving.slo.share"),
        ("[sweep]", "[serving]\nadmission = \"hope\"\n[sweep]", "hope"),
    ] {
        let message = with(from, to);
        assert!(message.contains(words), "{to}: {message}");
    }
}

#[test]
fn impossible_rows_are_rows_and_others_are_what_plan_says() {
    let text = STUDY.replace("from = \"8 GiB\"", "from = \"1 GiB\"").replace("steps = 3", "steps = 2");
    let study = Study::from_toml(&text).unwrap();
    let (spec, m) = (qwen3_30b("Q4_K_M"), machine("rtx3090-24g-ddr4-64g"));
    let opened = Opened { spec: &spec, machine: &m, arrivals: None };
    // No budget in base: a card that is too small leads no more: the CPU does.
    let rows: Vec<_> =
        (0..4).map(|i| evaluate_point(i, &study.points().unwrap()[i], opened, &study, &roofline, SolverKind::Greedy)).collect();
    assert!(rows.iter().all(|r| r.error.is_none()), "{:?}", rows[0].error);
    let small = rows[0].expected.as_ref().unwrap();
    assert!(small.main.starts_with("cpu0") && small.experts_in_vram < 0.05, "{}", small.main);
    let request = Request { batch: 8, ..Request::default() };
    let plan = make_plan(&Problem::new(&spec, &m, request).unwrap(), &Roofline::default(), SolverKind::Greedy).unwrap();
    let (row, p) = (rows[3].expected.as_ref().unwrap(), &plan.predicted);
    assert_eq!(row.decode_tokens_per_s, p.decode_tokens_per_s);
    assert_eq!((row.ttft_s, row.gap, &row.binding), (p.ttft_s, plan.gap, &p.binding));
    assert!((row.decode_tokens_per_s_per_user.value * 8.0 - p.decode_tokens_per_s.value).abs() < 1e-9);
    let small = STUDY.replace("[sweep]", "[sweep]\nram = [\"6 GiB\"]").replace("machine = ", "disk = \"0 B\"\nmachine = ");
    let study = Study::from_toml(&small).unwrap();
    let row = evaluate_point(0, &study.points().unwrap()[0], opened, &study, &roofline, SolverKind::Greedy);
    let why = row.error.expect("8 GiB and 6 GiB do not hold 17 GiB");
    assert!(why.contains("smallest budget"), "{why}");
}

#[test]
fn a_swept_machine_is_the_machine_with_that_changed() {
    let m = machine("xeon-cxl-rtx4090");
    let text = "name = \"t\"\nquestion = \"?\"\n[base]\nmodel = \"deepseek-v3\"\nmachine = \"xeon-cxl-rtx4090\"\n[sweep]\n\
                cxl = [\"0 B\", \"1 TiB\"]\ncxl_bandwidth = [\"20 GB/s\", \"70 GB/s\"]\npcie_bandwidth = [\"50 GB/s\"]\n\
                dram_bandwidth = [\"200 GB/s\"]\n";
    let points = Study::from_toml(text).unwrap().points().unwrap();
    let made: Vec<_> = points.iter().map(|p| p.machine(&m, Limits::default()).unwrap()).collect();
    assert_eq!(made[0].1.cxl, Some(Bytes::ZERO));
    let rate = |i: usize, from: &str, to: &str| made[i].0.link(from, to).unwrap().bandwidth.value.0 / 1e9;
    assert_eq!((rate(2, "cxl0", "dram0"), rate(2, "cxl0", "vram0"), rate(2, "dram0", "vram0")), (20.0, 20.0, 50.0));
    assert_eq!((rate(3, "cxl0", "dram0"), rate(3, "cxl0", "vram0")), (70.0, 50.0));
    assert_eq!(made[3].0.memory("cxl0").unwrap().capacity.value, Bytes(1 << 40));
    assert_eq!(made[3].0.memory("dram0").unwrap().read_bandwidth.value, BytesPerS(200e9));
    let error = points[2].machine(&machine("rtx3090-24g-ddr4-64g"), Limits::default()).unwrap_err().to_string();
    assert!(error.contains("rtx3090-24g-ddr4-64g has none"), "{error}");
}

#[test]
fn keys_and_values_and_experts_share_the_memory() {
    let spec = tiny(4, 16, 2);
    let m = small_machine(0, 8 << 30, 0);
    let plan = |batch| {
        let problem = Problem::new(&spec, &m, Request { batch, context: 1024, prompt_tokens: 64, ..Request::default() }).unwrap();
        make_plan(&problem, &Roofline::default(), SolverKind::Greedy).unwrap()
    };
    let pool = KvPool::of_plan(&spec, &plan(4), 4).unwrap();
    let line = plan(4).budgets.iter().find(|b| b.memory == "dram0").unwrap().clone();
    assert_eq!(pool.capacity_bytes, line.line("keys and values").0 + line.line("free").0);
    assert_eq!(pool.bytes(1024), spec.kv_bytes(1024, plan(4).request.kv_format).0);
    assert_eq!((pool.bytes(0), pool.bytes(1)), (0, pool.bytes(16)));
    // More sequences at once need more rows of logits.
    assert_eq!(KvPool::of_plan(&spec, &plan(4), 14).unwrap().capacity_bytes, pool.capacity_bytes - 4 * 256 * 10);
}

#[test]
fn the_ready_studies_are_valid_and_name_what_exists() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/studies");
    let mut names: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            let study = Study::from_toml(&std::fs::read_to_string(&path).unwrap()).unwrap_or_else(|e| panic!("{path:?}: {e}"));
            assert_eq!(path.file_stem().unwrap().to_str().unwrap(), study.name);
            for p in study.points().unwrap() {
                config(&format!("models/{}.toml", p.model));
                machine(p.machine.as_deref().unwrap_or_else(|| panic!("{path:?}: a ready study names its machines")));
                if let Some(trace) = p.arrivals {
                    assert!(
                        !Arrivals::from_text(&config(&format!("studies/data/{trace}.csv")), None).unwrap().requests.is_empty()
                    );
                }
            }
            names.push(study.name);
        }
    }
    assert!(names.len() >= 4, "{names:?}");
}

#[test]
fn prices_and_the_pareto_front_agree_with_each_other() {
    let (_, _, plan) = plan_of(1, 4096, 14);
    assert!(plan.predicted.decode_tokens_per_s.value > 0.0);
    let (spec, m) = (qwen3_30b("Q4_K_M"), machine("rtx3090-24g-ddr4-64g"));
    let points: Vec<(f64, f64)> = [1, 2, 4, 8, 16]
        .into_iter()
        .map(|batch| {
            let problem = Problem::new(&spec, &m, Request { batch, ..Request::default() }).unwrap();
            let prices = Prices::new(&problem, &Roofline::default(), Case::Expected);
            let placement = tierwise_planner::solver::solve(&problem, &prices, SolverKind::Greedy).unwrap().placement;
            let total = f64::from(batch) / tierwise_planner::evaluate::step_seconds(&prices.decode, &placement);
            (total / f64::from(batch), total)
        })
        .collect();
    // Wider batches give more tokens together and fewer to each: all are on the front.
    assert_eq!(pareto_front(&points), [4, 3, 2, 1, 0]);
}
