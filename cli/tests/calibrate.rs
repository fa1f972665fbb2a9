//! `tierwise calibrate`: the file it writes, what reads it, and what it refuses.

use assert_cmd::Command;
use serde_json::Value;
use std::path::Path;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-q4_k_m.gguf");

fn tierwise(cache: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"));
    command.env("XDG_CACHE_HOME", cache).args(args);
    command
}

fn json(cache: &Path, args: &[&str]) -> Value {
    let out = tierwise(cache, args).arg("--json").assert().success().get_output().stdout.clone();
    serde_json::from_slice(&out).expect("standard output is one JSON object")
}

#[test]
fn what_it_writes_is_what_plans_and_runs_use() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let disk = dir.path().join("models");
    std::fs::create_dir(&disk).expect("made");
    let cache = dir.path().join("cache");
    let folder = disk.display().to_string();
    let machine = json(&cache, &["calibrate", "--tiny", "--threads", "2", "--folder", &folder]);
    let calibration = &machine["calibration"];
    assert_eq!(calibration["threads"], 2);
    assert!(calibration["experts"].as_array().is_some_and(|s| !s.is_empty()), "{calibration}");
    assert_eq!(std::fs::read_dir(&disk).expect("readable").count(), 0, "nothing is left in the folder");

    // The default place, found without a flag; and by name.
    let file = cache.join("tierwise").join("machine.toml");
    let by_name = file.display().to_string();
    let plan = json(&cache, &["plan", "qwen3-30b-a3b", "--layers", "2"]);
    assert!(plan["machine_origin"].as_str().is_some_and(|o| o.contains("calibrated in")), "{}", plan["machine_origin"]);
    for args in [vec!["plan", "qwen3-30b-a3b", "--layers", "2", "--machine", &by_name], vec!["plan", TINY]] {
        let plan = json(&cache, &args);
        let words = plan["provenance"].as_array().expect("a list").iter().find(|p| p["what"] == "cost model").expect("named");
        assert!(words["value"].as_str().is_some_and(|v| v.starts_with("calibrated 20")), "{words}");
        let decode = &plan["predicted"]["decode_tokens_per_s"];
        let [low, value, high] = ["low", "value", "high"].map(|k| decode[k].as_f64().expect("a number"));
        assert!(0.0 < low && low <= value && value <= high, "{decode}");
    }

    let bench = json(&cache, &["bench", TINY, "-p", "16", "-n", "8", "-r", "1", "--threads", "2"]);
    for result in bench["results"].as_array().expect("a list") {
        assert!(result["predicted_tokens_per_s"]["value"].as_f64().is_some_and(|v| v > 0.0), "{result}");
    }
    assert!(bench["cost_model"].as_str().is_some_and(|w| w.starts_with("calibrated")));
    // Another number of threads was not calibrated: probed, and said so.
    let other = json(&cache, &["bench", TINY, "-p", "0", "-n", "2", "-r", "1", "--threads", "1"]);
    assert!(other["cost_model"].as_str().is_some_and(|w| w.starts_with("roofline")), "{}", other["cost_model"]);
}

/// The reference device stands for a GPU.
#[test]
fn a_device_is_measured_beside_the_cpu() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let folder = dir.path().display().to_string();
    let machine = json(dir.path(), &["calibrate", "--tiny", "--folder", &folder, "--device", "reference", "--vram", "64MiB"]);
    let gpu = machine["processor"].as_array().expect("a list").iter().find(|p| p["id"] == "gpu0").expect("measured");
    assert!(gpu["name"].as_str().is_some_and(|n| n.contains("reference")), "{gpu}");
    let links = machine["link"].as_array().expect("a list");
    assert!(links.iter().any(|l| l["to"] == "vram0") && links.iter().any(|l| l["from"] == "vram0"), "{links:?}");
    let notes = machine["calibration"]["notes"].as_array().expect("a list");
    assert!(notes.iter().any(|n| n.as_str().is_some_and(|n| n.contains("measured through reference"))), "{notes:?}");
    let plan = json(dir.path(), &["plan", TINY]);
    assert!(plan["machine_origin"].as_str().is_some_and(|o| o.contains("calibrated in")), "{}", plan["machine_origin"]);
}

#[test]
fn the_file_is_whole_or_absent() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let missing = dir.path().join("no such folder").display().to_string();
    let out = dir.path().join("m.toml").display().to_string();
    let fails = |args: &[&str], words: &str| {
        let output = tierwise(dir.path(), args).assert().code(1).get_output().clone();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(message.contains("error:") && message.contains(words), "{args:?}: {message}");
    };
    fails(&["calibrate", "--tiny", "--folder", &missing, "-o", &out], "no such folder");
    fails(&["calibrate", "--tiny", "--threads", "0", "-o", &out], "threads");
    fails(
        &["calibrate", "--tiny", "--folder", &dir.path().display().to_string(), "-o", &missing, "--threads", "2000"],
        "threads",
    );
    assert!(!Path::new(&out).exists());

    let folder = dir.path().display().to_string();
    let args = ["calibrate", "--tiny", "--device", "cpu", "--folder", &folder, "-o", &out];
    let text = tierwise(dir.path(), &args).assert().success().get_output().stdout.clone();
    let text = String::from_utf8_lossy(&text).into_owned();
    // Of GPUs: that there is none, or that it was not measured.
    for words in ["reading memory", "Q4_K experts", "attention", "repeat:", "not measured"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    // A broken file is refused by name and field.
    let broken = std::fs::read_to_string(&out).expect("written").replacen("runs = 5", "runs = 0", 1);
    std::fs::write(&out, broken).expect("writable");
    fails(&["plan", "qwen3-30b-a3b", "--machine", &out], "calibration.");
}
