//! `tierwise predict` as a user meets it: a small file, a file that is none, the published runs.

use assert_cmd::Command;
use serde_json::Value;
use std::path::Path;

const THREE: &str = r#"[
  {"id": "good", "source": "somebody", "engine": "llama.cpp", "model": "Qwen3-30B-A3B", "quant": "Q4_K_M", "gpu": "RTX 4090",
   "vram_gb": 24, "cpu": "Ryzen 9 7950X", "ram_bw_peak_gbs": 83.2, "placement_class": "hybrid_experts", "n_cpu_moe": 24,
   "moe_layers_on_cpu": 24, "threads": 16, "decode_tps": 70.0, "outcome": "ok", "quality": "high", "colour": "unknown keys pass"},
  {"id": "too-much", "engine": "llama.cpp", "model": "Qwen3-235B-A22B", "quant": "Q4_K_M", "gpu": "RTX 4090", "vram_gb": 24,
   "placement_class": "gpu_full", "outcome": "oom"},
  {"id": "lacking", "engine": "llama.cpp", "model": "Qwen3-30B-A3B", "gpu": "RTX 4090", "n_cpu_moe": 0}
]"#;

fn tierwise(args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"));
    command.args(args);
    command
}

fn json(args: &[&str], input: &str) -> Value {
    let out = tierwise(args).arg("--json").write_stdin(input).assert().success().get_output().stdout.clone();
    serde_json::from_slice(&out).expect("standard output is one JSON object")
}

#[test]
fn each_row_gets_a_prediction_a_verdict_or_a_reason() {
    let v = json(&["predict", "--runs", "-"], THREE);
    let row = |i: usize| &v["rows"][i];
    let (low, tps, high) = (&row(0)["low"], &row(0)["predicted_decode_tps"], &row(0)["high"]);
    assert!(low.as_f64() < tps.as_f64() && tps.as_f64() < high.as_f64(), "{}", row(0));
    let error = (tps.as_f64().unwrap() / 70.0 - 1.0).abs();
    assert!((row(0)["error"].as_f64().unwrap() - error).abs() < 1e-12);
    assert!((v["median_abs_error"].as_f64().unwrap() - error).abs() < 1e-12 && v["error_rows"] == "core");
    assert!(row(0)["parts_ms"]["gpu_overhead"].as_f64().unwrap() > 0.0 && row(0)["vram_verdict"] == "fits");
    assert_eq!((&row(1)["vram_verdict"], &row(1)["predicted_decode_tps"]), (&Value::from("does_not_fit"), &Value::Null));
    assert_eq!(row(2)["skipped"], "quantisation not stated");
    assert_eq!(v["report"]["memory"]["failed_does_not_fit"], 1);
    assert_eq!(v["sweep_pairs_right"], Value::Null);
}

#[test]
fn people_see_rows_and_reasons() {
    let out = tierwise(&["predict", "--runs", "-"]).write_stdin(THREE).assert().success().get_output().stdout.clone();
    let text = String::from_utf8_lossy(&out);
    for words in ["good", "does not fit VRAM", "quantisation not stated", "in interval", "3 runs: 1 predicted"] {
        assert!(text.contains(words), "{words:?} is not in\n{text}");
    }
}

#[test]
fn a_model_beyond_the_table_is_known_by_its_description() {
    let run = r#"[{"id": "a", "engine": "llama.cpp", "model": "olmoe-1b-7b", "quant": "Q4_K_M", "gpu_count": 0,
        "cpu": "Ryzen 7 7800X3D", "ram_mts": 6000}]"#;
    let v = json(&["predict", "--runs", "-"], run);
    assert!(v["rows"][0]["predicted_decode_tps"].as_f64().unwrap() > 10.0, "{}", v["rows"][0]);
    assert_eq!((&v["rows"][0]["error"], &v["median_abs_error"]), (&Value::Null, &Value::Null));
}

#[test]
fn a_bad_file_is_named_with_row_and_field() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("runs.json").display().to_string();
    for (text, words) in [
        ("not json", "JSON list"),
        (r#"[{"id": "a", "threads": "many"}]"#, "a: threads is \"many\", expected a whole number"),
        (r#"[{"id": 5}]"#, "row 1: id is 5, expected text"),
    ] {
        std::fs::write(&path, text).expect("the temporary folder is writable");
        let out = tierwise(&["predict", "--runs", &path]).assert().code(1).get_output().clone();
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(message.contains("runs.json") && message.contains(words), "{message}");
        assert!(out.stdout.is_empty());
    }
    tierwise(&["predict", "--runs", "/no/such/runs.json"]).assert().code(1);
}

#[test]
fn published_runs_are_met_by_machines_left_out() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/published_runs.json");
    if !path.is_file() {
        println!("skipped: {} is not there", path.display());
        return;
    }
    let v = json(&["predict", "--runs", &path.display().to_string(), "--refit"], "");
    let core = &v["lomo"]["totals"][0];
    assert_eq!((core["name"].as_str(), core["rows"].as_u64()), (Some("core"), Some(112)));
    assert!(core["median_abs_error"].as_f64().unwrap() <= 0.15 && core["p90_abs_error"].as_f64().unwrap() <= 0.35, "{core}");
    assert!(v["sweep_pairs_right"].as_f64().unwrap() >= 0.9 && core["coverage"].as_f64().unwrap() >= 0.8);
    assert_eq!(v["rows"].as_array().unwrap().len(), 494);
    // The headline is the honest figure once there is one.
    assert_eq!((&v["median_abs_error"], &v["p90_abs_error"]), (&core["median_abs_error"], &core["p90_abs_error"]));
    assert!(v["error_basis"].as_str().unwrap().contains("left out"));
}
