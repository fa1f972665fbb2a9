//! `tierwise parallel` as a user meets it: ranks as threads, every policy, the check of logits, messages.

mod common;

use assert_cmd::Command;
use common::message_of_failure;
use serde_json::Value;
use std::path::Path;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../runtime/tests/golden/olmoe");
const MACHINE: [&str; 2] = ["--machine", "rtx3060-12g-ddr4-32g"];

fn tierwise(args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"));
    command.arg("parallel").args(args).args(MACHINE);
    command
}

fn failure(args: &[&str]) -> String {
    message_of_failure(&mut tierwise(args))
}

/// A trace with few popular experts, of the model's shape.
fn skewed(dir: &Path) -> String {
    let path = dir.join("skewed.twtrace").display().to_string();
    let args = ["trace", "synth", "--zipf", "1.4", "--layers", "2", "--experts", "8", "--top-k", "3"];
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"));
    command.args(args).args(["--tokens", "2048", "-o", &path]).assert().success();
    path
}

#[test]
fn every_policy_balances_as_it_says_and_gives_the_logits_of_one_process() {
    let dir = tempfile::tempdir().expect("created");
    let trace = skewed(dir.path());
    let args = ["--ranks", "4", "--tokens", "64", "--chunk", "24", "--decode", "4", "--kv", "f32", "--min-tokens", "1"];
    let out = tierwise(&[MODEL, "--routing", &trace, "--check", "--json"]).args(args).assert().success().get_output().clone();
    let value: Value = serde_json::from_slice(&out.stdout).expect("one JSON object");
    let policies = value["policies"].as_array().expect("a list");
    let names: Vec<&str> = policies.iter().filter_map(|p| p["policy"].as_str()).collect();
    assert_eq!(names, ["ep", "eplb", "eplb+split", "llep", "tierwise"]);
    let number = |p: &Value, key: &str| p[key].as_f64().unwrap_or_else(|| panic!("{key} of {p}"));
    for p in policies {
        assert_eq!(p["check"]["equal"], true, "{p}");
        assert_eq!(p["check"]["rows_compared"], 4 * 68, "{p}");
        assert!(number(p, "dispatch_bytes") > 0.0 && number(p, "result_bytes") > 0.0, "{p}");
        assert_eq!(number(p, "experts_sent") > 0.0, number(p, "weight_bytes") > 0.0, "{p}");
    }
    let after = |name: &str| number(policies.iter().find(|p| p["policy"] == name).expect("it ran"), "imbalance_after");
    assert_eq!(after("ep"), number(&policies[0], "imbalance_before"));
    assert!(after("eplb+split") <= after("eplb") && after("llep") < after("ep") && after("tierwise") < after("ep"));
    assert!(number(&policies[3], "experts_sent") > 0.0);

    let text = tierwise(&[MODEL, "--ranks", "2", "--tokens", "9", "--policy", "ep,tierwise", "--check"]).assert().success();
    let text = String::from_utf8_lossy(&text.get_output().stdout).into_owned();
    assert!(!text.contains("eplb") && text.contains("tierwise") && text.contains("a copy of an expert pays from"), "{text}");
}

#[test]
fn mistakes_are_told() {
    for (args, expected) in [
        (&[MODEL, "--ranks", "3", "--policy", "llep", "--lambda", "0.1"][..], "a divisor of 8"),
        (&[MODEL, "--ranks", "2", "--policy", "best"], "--policy best: expected some of ep, eplb, eplb+split, llep, tierwise"),
        (&[MODEL, "--ranks", "2", "--slots", "3"], "replicas is 6, expected 8"),
        (&[MODEL, "--ranks", "2", "--speed", "1"], "--speed: found 1 numbers, expected 2"),
        (&[MODEL, "--ranks", "2", "--gpu", "h900"], "--gpu h900: expected one of h100"),
        (&[MODEL, "--ranks", "2", "--tokens", "9999"], "expected at most 256, the model's context"),
        (&[MODEL, "--ranks", "2", "--deadline", "0"], "--deadline 0"),
        (&["olmoe-1b-7b", "--ranks", "2"], "tierwise synth"),
    ] {
        let message = failure(args);
        assert!(message.contains(expected), "{args:?}: {message}");
    }
    if cfg!(not(feature = "mpi")) {
        assert!(failure(&[MODEL]).contains("build with `cargo build --release --features mpi`"));
    }
    let launched = tierwise(&[MODEL, "--ranks", "2"]).env("OMPI_COMM_WORLD_SIZE", "4").assert().failure().get_output().clone();
    assert!(String::from_utf8_lossy(&launched.stderr).contains("--ranks under mpirun: 4 processes were started"));
}
