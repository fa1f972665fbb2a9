//! `tierwise balance` as a user meets it: the table, the file, moves, messages.

mod common;

use assert_cmd::Command;
use common::message_of_failure;
use serde_json::{Value, json};
use std::path::Path;

const TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../planner/tests/data/gptoss20b_11seq.meta.json");

fn tierwise(args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"));
    command.args(args);
    command
}

fn json_of(args: &[&str]) -> Value {
    let out = tierwise(args).args(["--json", "--quiet"]).assert().success().get_output().clone();
    serde_json::from_slice(&out.stdout).expect("one JSON object")
}

fn failure(args: &[&str]) -> String {
    message_of_failure(&mut tierwise(args))
}

fn number(v: &Value, key: &str) -> f64 {
    v[key].as_f64().unwrap_or_else(|| panic!("{key} of {v} is a number"))
}

/// Counts of two kinds of work that like different experts.
fn counts(dir: &Path) -> String {
    let kind = |shift: usize| -> Vec<Vec<u64>> {
        (0..3).map(|l| (0..16).map(|e| 100 + 10_000 / (1 + (e + shift + l) % 16) as u64).collect()).collect()
    };
    let path = dir.join("counts.json");
    let table = json!({ "model": "made up", "source": "a test", "licence": "-", "n_experts": 16, "top_k": 2,
        "tasks": { "a": { "counts": kind(0) }, "b": { "counts": kind(8) } } });
    std::fs::write(&path, table.to_string()).expect("writable");
    path.display().to_string()
}

#[test]
fn a_trace_is_replayed_under_every_policy() {
    let v = json_of(&[
        "balance",
        "--load",
        TRACE,
        "--devices",
        "4",
        "--replicas",
        "40",
        "--model",
        "gpt-oss-20b",
        "--tokens-per-step",
        "64",
        "--effort",
        "fast",
    ]);
    let names: Vec<&str> = v["policies"].as_array().expect("a list").iter().filter_map(|p| p["policy"].as_str()).collect();
    assert_eq!(names, ["ep", "eplb", "eplb+split", "llep", "tierwise"]);
    let step = |i: usize| number(&v["policies"][i], "step_s");
    assert!(step(4) <= step(0) && step(4) <= step(1) && step(4) <= step(3), "{v}");
    assert_eq!(v["in_sample"], false);
    let slots = v["physical_to_logical"].as_array().expect("layers");
    assert_eq!(slots.len(), 24);
    assert!(slots.iter().all(|l| l.as_array().is_some_and(|l| l.len() <= 40 && l.len() >= 32)));
    for key in ["balancedness", "aggregate_balancedness", "lower_bound", "transfers", "bytes_moved"] {
        number(&v, key);
    }
    assert_eq!(v["max_load"].as_array().map(Vec::len), Some(24));
    let out =
        tierwise(&["balance", "--load", TRACE, "--devices", "4", "--policy", "ep,llep", "--effort", "fast"]).assert().success();
    let text = String::from_utf8(out.get_output().stdout.clone()).expect("text");
    assert!(text.contains("ep ") && text.contains("llep") && text.contains("worst PAR"), "{text}");
}

#[test]
fn the_oracle_case_of_eplbs_readme() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("readme.json");
    let weight = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]];
    std::fs::write(&path, json!({ "weight": weight }).to_string()).expect("writable");
    let args = [
        "--load",
        &path.display().to_string(),
        "--devices",
        "8",
        "--nodes",
        "2",
        "--groups",
        "4",
        "--replicas",
        "16",
        "--policy",
        "eplb",
    ];
    let v = json_of(&[&["balance"], args.as_slice()].concat());
    assert_eq!(
        v["physical_to_logical"],
        json!([[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]])
    );
    // Whole tokens: the oracle's 0.815574 divides 121.5 ones.
    assert!((number(&v, "aggregate_balancedness") - 0.815_574).abs() < 0.01, "{v}");
    assert_eq!(v["in_sample"], true);
}

#[test]
fn a_change_of_work_moves_few_experts_in_stages() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let counts = counts(dir.path());
    let (old, new) = (dir.path().join("old.json").display().to_string(), dir.path().join("new.json").display().to_string());
    let common = ["balance", "--load", &counts, "--devices", "4", "--replicas", "20", "--policy", "tierwise"];
    let a = json_of(&[common.as_slice(), &["--group", "a", "--judge", "b", "-o", &old]].concat());
    assert_eq!((a["steps_placed_from"].as_u64(), a["in_sample"].as_bool()), (Some(1), Some(false)));
    let b = json_of(&[common.as_slice(), &["--group", "b", "--from", &old, "-o", &new, "--stage", "100MiB"]].concat());
    assert!(number(&b, "aggregate_balancedness") > 0.97, "{b}");
    let change = &b["change"];
    let copies = number(change, "copies") as usize;
    let moves = change["moves"].as_array().expect("moves");
    assert_eq!(moves.iter().filter(|m| m.get("copy").is_some()).count(), copies);
    assert!(copies > 0 && copies < 3 * 20);
    let stages: u64 = change["moves_per_stage"].as_array().expect("stages").iter().filter_map(Value::as_u64).sum();
    assert_eq!(stages as usize, moves.len());
    // The same again moves nothing; nor does SGLang's form of it.
    let same = json_of(&[common.as_slice(), &["--group", "b", "--from", &new]].concat());
    assert_eq!(same["change"]["copies"], 0);
    let sglang = dir.path().join("sglang.json").display().to_string();
    tierwise(&["export", &new, "--to", "sglang", "-o", &sglang]).assert().success();
    let back = json_of(&[common.as_slice(), &["--group", "b", "--from", &sglang]].concat());
    assert_eq!(back["change"]["copies"], 0);
}

#[test]
fn devices_may_differ() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let counts = counts(dir.path());
    let v =
        json_of(&["balance", "--load", &counts, "--devices", "2", "--slots", "6,14", "--speed", "1,2", "--policy", "tierwise"]);
    for layer in v["slots"].as_array().expect("layers") {
        let held = |g: usize| layer[g].as_array().map_or(0, Vec::len);
        assert!(held(0) <= 6 && held(1) <= 14 && held(0) + held(1) >= 16);
    }
    assert!(number(&v, "aggregate_balancedness") > 0.95, "{v}");
    // EPLB cannot, and is left out of all.
    let out = tierwise(&["balance", "--load", &counts, "--devices", "2", "--slots", "6,14", "--json"]).assert().success();
    assert!(String::from_utf8_lossy(&out.get_output().stderr).contains("eplb is left out: balance: slots of the devices"));
}

/// Eight experts of a layer on GPUs, six in host memory, two on disk: the least chosen ones, each once; and what that is good for.
#[test]
fn what_does_not_fit_on_devices_waits_in_host_memory_and_on_disk() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let counts = counts(dir.path());
    let file = dir.path().join("packs.json").display().to_string();
    let packs = ["--host-slots", "3", "--host-price", "4", "--disk-slots", "1,1", "--disk-price", "20"];
    let common = ["balance", "--load", &counts, "--group", "a", "--devices", "2"];
    let v = json_of(&[common.as_slice(), &["--replicas", "8", "-o", &file], &packs].concat());
    let policies: Vec<&str> = v["policies"].as_array().expect("a list").iter().filter_map(|p| p["policy"].as_str()).collect();
    assert_eq!(policies, ["tierwise"], "nobody else can");
    assert_eq!(v["experts_outside"].as_u64(), Some(3 * 8));
    let table: Value = serde_json::from_str(&std::fs::read_to_string(&counts).expect("written")).expect("JSON");
    for layer in 0..3 {
        let pack_of: Vec<u64> = v["pack_of"][layer].as_array().expect("a row").iter().filter_map(Value::as_u64).collect();
        let in_pack = |p: u64| pack_of.iter().filter(|x| **x == p).count();
        assert_eq!((in_pack(0), in_pack(1), in_pack(2)), (8, 6, 2), "{pack_of:?}");
        let load = |e: usize| table["tasks"]["a"]["counts"][layer][e].as_u64().expect("a count");
        let most = |p: u64| (0..16).filter(|e| pack_of[*e] == p).map(load).max();
        let least = |p: u64| (0..16).filter(|e| pack_of[*e] == p).map(load).min();
        assert!(least(1) >= most(2), "the least chosen experts are on disk: {pack_of:?}");
        // Tokens at their prices: what each device has to do, and what the bound says of it.
        let price = |e: usize| [1.0, 4.0, 20.0][pack_of[e] as usize];
        let held = |g: usize| v["slots"][layer][g].as_array().expect("a device").iter().filter_map(Value::as_u64);
        let work = |g: usize| held(g).map(|e| load(e as usize) as f64 * price(e as usize)).sum::<f64>();
        assert!(work(0).max(work(1)) >= v["lower_bound_by_layer"][layer].as_f64().expect("a bound") - 1e-6, "{v}");
        assert!(number(&v["policies"][0], "balancedness") > 0.9, "{v}");
    }
    let text = tierwise(&[common.as_slice(), &["--replicas", "8"], &packs].concat()).assert().success().get_output().clone();
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("host: 18 of 48 experts, ") && text.contains("disk: 6 of 48 experts, "), "{text}");
    // No engine has such a placement, and no step-by-step change.
    let error = failure(&["export", &file, "--to", "sglang"]);
    assert!(error.contains("experts in host memory or on disk") && error.contains("24"), "{error}");
    let error = failure(&[common.as_slice(), &["--replicas", "16", "--from", &file]].concat());
    assert!(error.contains("24 experts are in host memory or on disk"), "{error}");
    // A file that was tampered with.
    let text = std::fs::read_to_string(&file).expect("written");
    let mut bad: Value = serde_json::from_str(&text).expect("JSON");
    bad["pack_of"][1][0] = json!(3);
    std::fs::write(&file, bad.to_string()).expect("writable");
    let error = failure(&["export", &file, "--to", "sglang"]);
    assert!(error.contains("layer 1: the memories of experts"), "{error}");
    // Memory by bytes: an expert has 3 * 7168 * 2048 * 2 bytes; room for 12 of 48 on each device.
    let v = json_of(&[common.as_slice(), &["--memory", "1008MiB", "--host-slots", "16", "--host-price", "4"]].concat());
    // A replica may be worth more there than another expert.
    assert!(v["experts_outside"].as_u64().is_some_and(|n| (24..48).contains(&n)), "{v}");
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let counts = counts(dir.path());
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("writable");
        path.display().to_string()
    };
    let negative = write("negative.json", r#"{"weight":[[1,-2]]}"#);
    let ragged = write("ragged.json", r#"{"weight":[[1,2],[1]]}"#);
    let none = write("none.json", "{}");
    let load = ["--load", counts.as_str()];
    #[rustfmt::skip]
    let table: [(&[&str], &str); 25] = [
        (&["--devices", "4", "--host-slots", "2"], "--host-price"),
        (&["--devices", "4", "--disk-price", "2"], "--disk-slots"),
        (&["--devices", "4", "--host-slots", "2", "--host-price", "0.5"], "--host-price 0.5: expected 1 or more"),
        (&["--devices", "4", "--host-slots", "2,3", "--host-price", "2"], "--host-slots: found 2 numbers, expected one, or 4"),
        (&["--devices", "4", "--host-slots", "1", "--host-price", "9", "--disk-slots", "1", "--disk-price", "8"], "--disk-price 8: expected 9 or more"),
        (&["--devices", "4", "--replicas", "4", "--host-slots", "1", "--host-price", "9", "--policy", "tierwise"], "room in packs"),
        (&["--devices", "4", "--host-slots", "1", "--host-price", "9", "--rebalance", "2"], "--rebalance 2: expected none"),
        (&["--devices", "4", "--replicas", "18"], "--replicas 18: expected a multiple of 4"),
        (&["--devices", "4", "--replicas", "12", "--policy", "eplb"], "replicas is 12, expected 16"),
        (&["--devices", "5", "--policy", "ep"], "devices is 5, expected a divisor of 16"),
        (&["--devices", "4", "--nodes", "3"], "--nodes 3: found 4 devices"),
        (&["--devices", "2", "--slots", "8"], "--slots: found 1 numbers, expected 2"),
        (&["--devices", "2", "--speed", "1,0"], "--speed 0: expected positive"),
        (&["--devices", "2", "--speed", "1,NaN"], "--speed NaN: expected positive"),
        (&["--devices", "4", "--policy", "best"], "--policy best: expected one of ep, eplb"),
        (&["--devices", "4", "--gpu", "voodoo2"], "--gpu voodoo2: expected one of h100"),
        (&["--devices", "4", "--cvar", "0"], "--cvar 0"),
        (&["--devices", "4", "--train", "1"], "--train 1"),
        (&["--devices", "4", "--group", "c"], "the group is c, expected one of a, b"),
        (&["--devices", "4", "--alpha", "0", "--policy", "llep"], "--alpha 0"),
        (&["--devices", "4", "--model", "gpt-oss-20b"], "expected 24 MoE layers of 32 as"),
        (&["--devices", "4", "--from", &none], "expected a file of `tierwise balance -o`"),
        (&["--devices", "4", "--load", &negative], "-2"),
        (&["--devices", "4", "--load", &ragged], "ragged.json"),
        (&["--devices", "4", "--load", "absent.json"], "absent.json"),
    ];
    for (args, message) in table {
        let args =
            if args.contains(&"--load") { [&["balance"], args].concat() } else { [&["balance"], load.as_slice(), args].concat() };
        let error = failure(&args);
        assert!(error.contains(message), "{args:?}: {error}");
    }
}

/// A trace of our own needs no import.
#[test]
fn own_traces_are_logs() {
    let dir = tempfile::tempdir().expect("created");
    let path = dir.path().join("made.twtrace").display().to_string();
    let made =
        ["trace", "synth", "--zipf", "1.0", "--layers", "2", "--experts", "16", "--top-k", "2", "--tokens", "512", "-o", &path];
    tierwise(&made).assert().success();
    let found = json_of(&["balance", "--load", &path, "--devices", "4", "--replicas", "20", "--tokens-per-step", "64"]);
    assert!(found.as_object().is_some_and(|o| !o.is_empty()), "{found}");
}
