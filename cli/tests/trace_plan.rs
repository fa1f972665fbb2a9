//! `plan --trace` as a user meets it.

use assert_cmd::Command;
use serde_json::Value;
use std::path::Path;

const TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../planner/tests/data/gptoss20b_11seq.meta.json");

fn tierwise(args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"));
    command.env("XDG_CACHE_HOME", std::env::temp_dir().join("tierwise-cli-tests")).args(args);
    command
}

const PLAN: &[&str] =
    &["plan", "gpt-oss-20b", "--format", "MXFP4", "--machine", "rtx3090-24g-ddr4-64g", "--vram", "8GiB", "--trace", TRACE];

fn json(more: &[&str]) -> Value {
    let out = tierwise(&[PLAN, more, &["--json"]].concat()).assert().success().get_output().stdout.clone();
    serde_json::from_slice(&out).expect("standard output is one JSON object")
}

fn fails(args: &[&str], words: &[&str]) {
    let out = tierwise(args).assert().code(1).get_output().clone();
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    for word in words {
        assert!(message.contains(word), "{args:?}: {word:?} is not in {message}");
    }
    assert!(out.stdout.is_empty());
}

#[test]
fn a_plan_from_a_trace_reports_what_it_is_worth_elsewhere() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("plan.json").display().to_string();
    let plan = json(&["--train-fraction", "0.6", "--scenarios", "100", "--seed", "5", "-o", &file]);
    let report = &plan["held_out"];
    let number = |v: &Value| v.as_f64().expect("a number");
    assert_eq!(report["trace"]["scenarios"], 100);
    assert_eq!(report["trace"]["seed"], 5);
    assert_eq!(number(&report["trace"]["train_tokens"]) + number(&report["trace"]["test_tokens"]), 986.0);
    assert_eq!(report["trace"]["fingerprint"].as_str().map(str::len), Some(16));
    let layers = report["layers"].as_array().expect("a list");
    assert_eq!(layers.len(), 24);
    for l in layers {
        let chosen = match l["chosen"].as_str() {
            Some("static") => &l["static"],
            Some("cached") => &l["cached"],
            Some("pinned_cached") => &l["pinned_cached"],
            other => panic!("{other:?}"),
        };
        assert!(number(&chosen["seconds"]) <= number(&l["static"]["seconds"]));
        assert!((0.0..=1.0).contains(&number(&chosen["hit"])));
    }
    assert!(number(&report["chosen_step_s"]) <= number(&report["static_step_s"]));
    // The file can be read and explained.
    tierwise(&["explain", &file]).assert().success();
    let text = tierwise(PLAN).assert().success().get_output().stdout.clone();
    let text = String::from_utf8_lossy(&text);
    for word in ["held-out part", "static", "pinned + cached", "tokens to test on"] {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
}

#[test]
fn other_engines_are_compared_with_the_same_bytes() {
    let plan = json(&["--scenarios", "64", "--compare", "1"]);
    let comparison = &plan["comparison"][0];
    assert_eq!(comparison["vram"], "8 GiB");
    let rows = comparison["rows"].as_array().expect("a list");
    let names: Vec<&str> = rows.iter().filter_map(|r| r["plan"].as_str()).collect();
    assert_eq!(names[..2], ["tierwise", "tierwise, nothing cached"]);
    assert!(names[2].starts_with("best --n-cpu-moe N: ") && names[3..] == ["frequency top-k", "uniform top-k"], "{names:?}");
    let speed = |i: usize| rows[i]["tokens_per_s"].as_f64().expect("a number");
    for (i, row) in rows.iter().enumerate() {
        let gain = row["gain"].as_f64().expect("a number");
        assert!((speed(0) / speed(i) - 1.0 - gain).abs() < 1e-9, "{row}");
    }
    // As planned and as compared is the same replay.
    let chosen = plan["held_out"]["chosen_step_s"].as_f64().expect("a number");
    assert!((rows[0]["step_s"].as_f64().expect("a number") / chosen - 1.0).abs() < 1e-7);
}

#[test]
fn what_does_not_fit_is_refused_with_both_sides() {
    let with = |model: &str, trace: &str, more: &[&str]| {
        let head = ["plan", model, "--machine", "rtx3090-24g-ddr4-64g", "--trace", trace];
        [&head, more].concat().iter().map(ToString::to_string).collect::<Vec<String>>()
    };
    let refused = |args: Vec<String>, words: &[&str]| fails(&args.iter().map(String::as_str).collect::<Vec<_>>(), words);
    refused(with("gpt-oss-120b", TRACE, &[]), &["24 MoE layers, 4 of 32", "gpt-oss-120b", "36 MoE layers, 4 of 128"]);
    refused(with("gpt-oss-20b", TRACE, &["--train-fraction", "1"]), &["train fraction", "above 0 and below 1"]);
    refused(with("gpt-oss-20b", TRACE, &["--scenarios", "0"]), &["at least 1"]);
    refused(with("gpt-oss-20b", TRACE, &["--compare", "0"]), &["1 to 64"]);
    refused(with("gpt-oss-20b", "nowhere.meta.json", &[]), &["nowhere", "cannot read"]);
    refused(with("gpt-oss-20b", "trace.json", &[]), &["trace.json", "NAME.meta.json"]);
    // A description without the choices beside it.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let lonely = dir.path().join("lonely.meta.json");
    std::fs::copy(Path::new(TRACE), &lonely).expect("writable");
    refused(with("gpt-oss-20b", &lonely.display().to_string(), &[]), &["lonely.ids.u8"]);
    // Options of a trace without one.
    tierwise(&["plan", "gpt-oss-20b", "--compare", "2"]).assert().code(2);
}
