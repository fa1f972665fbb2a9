//! `bench --batch`: several sequences computed together.

use assert_cmd::Command;
use serde_json::Value;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-q4_k_m.gguf");

fn tierwise(args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"));
    // A calibration of this machine must not change what the test sees.
    command.env("XDG_CACHE_HOME", std::env::temp_dir().join("tierwise-bench-tests")).args(args);
    command
}

#[test]
fn batches_are_measured_one_after_the_other() {
    let args = ["bench", TINY, "--batch", "3,1", "-p", "16", "-n", "4", "-d", "2", "-r", "2", "--device", "cpu", "--json"];
    let out = tierwise(&args).assert().success().get_output().stdout.clone();
    let v: Value = serde_json::from_slice(&out).expect("standard output is one JSON object");
    let results = v["results"].as_array().expect("a list");
    let tests: Vec<_> = results.iter().map(|r| (r["batch"].as_u64(), r["test"].as_str())).collect();
    assert_eq!(tests, [(Some(3), Some("pp16")), (Some(3), Some("tg4")), (Some(1), Some("pp16")), (Some(1), Some("tg4"))]);
    assert!(results.iter().all(|r| r["tokens_per_s_median"].as_f64() > Some(0.0)), "{v}");
    // More tokens for one reading of the weights, as far as experts are shared.
    assert!(results[1]["limit_tokens_per_s"].as_f64() > results[3]["limit_tokens_per_s"].as_f64(), "{v}");
    assert!(results[1]["predicted_tokens_per_s"]["value"].as_f64() > Some(0.0), "{v}");

    let table = tierwise(&args[..args.len() - 1]).assert().success().get_output().stdout.clone();
    let table = String::from_utf8(table).expect("UTF-8");
    assert!(table.contains("3 x tg4"), "{table}");
}

#[test]
fn a_plan_for_fewer_sequences_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plan = folder.path().join("plan.json");
    let plan = plan.to_str().expect("UTF-8");
    tierwise(&["plan", TINY, "--batch", "2", "--vram", "0B", "-o", plan]).assert().success();
    let run =
        |batch: &str| tierwise(&["bench", TINY, "--plan", plan, "--batch", batch, "-p", "0", "-n", "2", "-r", "1"]).assert();
    run("2").success();
    let refused = run("3").code(1).get_output().stderr.clone();
    let refused = String::from_utf8_lossy(&refused);
    assert!(refused.contains("for 2 sequences") && refused.contains("--batch 3"), "{refused}");
}
