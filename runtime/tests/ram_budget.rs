//! With experts on disk a process keeps what the plan says and a stated overhead, whichever way it reads, and computes the same bits.
//!
//! Each run is a process of its own (this test started again), because resident memory is the process's.

mod session_common;

use session_common::*;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tierwise_cost::recipe::Recipe;
use tierwise_cost::units::Bytes;
use tierwise_planner::budget;
use tierwise_runtime::session::process::ProcessMemory;
use tierwise_runtime::session::verify::{OVERHEAD, verify};
use tierwise_runtime::session::{IoBackend, IoOptions, PageCache, Session, SessionConfig};
use tierwise_runtime::synth::synth;

const CHILD: &str = "TIERWISE_TEST_RAM_BUDGET";
const OPTIONS: PlanOptions = PlanOptions { context: 128, chunk: 64, ..F16_KV };

/// What a child does and prints: `slots backend page_cache model`; 0 slots for everything in memory.
fn child(what: &str) {
    let mut words = what.splitn(4, ' ');
    let mut word = || words.next().expect("four words");
    let (slots, backend, page_cache, path) = (word().parse::<u32>().expect("slots"), word(), word(), PathBuf::from(word()));
    let backend = if backend == "uring" { IoBackend::Auto } else { IoBackend::Threads };
    let page_cache = if page_cache == "use" { PageCache::Use } else { PageCache::Auto };
    let before = ProcessMemory::look(&[]).expect("/proc");
    let model = open(&path);
    let spec = model.spec();
    let plan = if slots == 0 { ram_plan(spec, OPTIONS) } else { disk_plan(spec, OPTIONS, slots, |_, _| true) };
    let config = SessionConfig { io: IoOptions { backend, page_cache }, ..SessionConfig::new(2) };
    let mut s = Session::open(Arc::clone(&model), &plan, config).expect("opened");
    let tokens: Vec<u32> = (0..90).map(|i| (i * i * 31 + i * 7 + 3) % spec.vocab_size).collect();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |logits: &[f32]| {
        for x in logits {
            hash = (hash ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3);
        }
    };
    add(s.prefill(&tokens[..60]).expect("computed"));
    for t in &tokens[60..] {
        add(s.decode(*t).expect("computed"));
    }
    let checks = verify(&mut s, &plan).expect("readable");
    let after = ProcessMemory::look(&model.paths()).expect("/proc");
    let lines: Vec<Bytes> =
        [budget::NON_EXPERT_WEIGHTS, budget::RESIDENT_EXPERTS, budget::EXPERT_CACHE, budget::KV, budget::ACTIVATIONS]
            .iter()
            .map(|name| plan.plan().budgets[0].line(name))
            .collect();
    let report = s.io().map_or_else(|| "all in memory".to_string(), ToString::to_string);
    let value = serde_json::json!({
        "hash": format!("{hash:016x}"), "planned": lines.iter().map(|b| b.0).sum::<u64>(), "cache": lines[2].0,
        "mapped": lines[0].0 + lines[1].0, "report": report, "checks": checks,
        "before": before.resident.0, "resident": after.resident.0, "peak": after.peak.0, "anonymous": after.anonymous.0,
        "model": after.model.0, "program": after.file.0 - after.model.0, "anonymous_before": before.anonymous.0,
    });
    println!("\nRESULT {value}");
}

fn run(path: &Path, slots: u32, backend: &str, page_cache: &str) -> serde_json::Value {
    let out = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "resident_memory_stays_within_the_plan", "--nocapture", "--test-threads=1"])
        .env(CHILD, format!("{slots} {backend} {page_cache} {}", path.display()))
        .output()
        .expect("started");
    let text = String::from_utf8_lossy(&out.stdout);
    let line = text.lines().find_map(|l| l.strip_prefix("RESULT "));
    let line = line.unwrap_or_else(|| panic!("{text}\n{}", String::from_utf8_lossy(&out.stderr)));
    serde_json::from_str(line).expect("JSON")
}

#[test]
fn resident_memory_stays_within_the_plan() {
    if let Ok(what) = std::env::var(CHILD) {
        return child(&what);
    }
    if ProcessMemory::look(&[]).is_none() {
        println!("skipped: there is no /proc");
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    let report = synth(&small_olmoe(), &Recipe::by_name("Q4_K_M").expect("known"), 1, &path, |_, _| {}).expect("written");
    let experts = report.spec.expert_bytes().0;
    let mib = |v: &serde_json::Value| v.as_u64().expect("bytes") as f64 / f64::from(1 << 20);
    println!("model {:.0} MiB, of which experts {:.0} MiB", report.file_bytes as f64 / 1048576.0, experts as f64 / 1048576.0);

    let whole = run(&path, 0, "threads", "use");
    // The measure sees experts: with all in memory most of them are resident.
    assert!(whole["model"].as_u64().expect("bytes") > experts / 2, "{whole}");
    let mut overheads = Vec::new();
    for (slots, backend, page_cache) in
        [(1, "uring", "bypass"), (16, "uring", "bypass"), (16, "uring", "use"), (16, "threads", "bypass"), (32, "threads", "use")]
    {
        let r = run(&path, slots, backend, page_cache);
        let name = format!("{slots} slots: {}", r["report"].as_str().unwrap_or_default());
        assert_eq!(r["hash"], whole["hash"], "{name}: other logits than all in memory");
        for c in r["checks"].as_array().expect("checks") {
            assert_eq!(c["ok"], true, "{name}: {c}");
        }
        let (planned, peak) = (mib(&r["planned"]), mib(&r["peak"]));
        let overhead = peak - planned - mib(&r["program"]);
        println!(
            "{name}\n  planned {planned:.1} MiB (slots {:.1}), resident {:.1}, peak {peak:.1}; of it program {:.1}, own {:.1}, model's pages {:.1} of {:.1}; beside plan and program {overhead:.1}",
            mib(&r["cache"]),
            mib(&r["resident"]),
            mib(&r["program"]),
            mib(&r["anonymous"]),
            mib(&r["model"]),
            mib(&r["mapped"]),
        );
        assert!(overhead * 1048576.0 <= OVERHEAD.0 as f64, "{name}: {r}");
        overheads.push(overhead);
    }
    println!("stated overhead {OVERHEAD}; measured at most {:.1} MiB", overheads.iter().fold(f64::MIN, |a, b| a.max(*b)));
}
