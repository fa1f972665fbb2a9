//! `--device` as a user meets it: what is chosen and why, budgets, and the same text wherever experts are computed. The device is the
//! reference back-end, so that this runs without a GPU.

use assert_cmd::Command;
use serde_json::Value;
use std::path::Path;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-q4_k_m.gguf");

fn tierwise(args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"));
    // A calibration of this machine must not change what the tests see.
    command.env("XDG_CACHE_HOME", std::env::temp_dir().join("tierwise-cli-tests")).args(args);
    command
}

fn json(args: &[&str]) -> Value {
    let out = tierwise(args).arg("--json").assert().success().get_output().stdout.clone();
    serde_json::from_slice(&out).expect("standard output is one JSON object")
}

fn error(args: &[&str]) -> String {
    let out = tierwise(args).assert().code(1).get_output().stderr.clone();
    let text = String::from_utf8_lossy(&out).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    text.lines().find(|l| l.starts_with("error:")).expect("an error line").to_string()
}

fn str(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The bundled model with weights that CPU and device multiply with the same activations.
fn f16_model(folder: &Path) -> String {
    let path = folder.join("tiny-f16.gguf");
    tierwise(&["convert", TINY, "--format", "F16", "--allow-requantize", "-o", str(&path)]).assert().success();
    str(&path).to_string()
}

#[test]
fn the_text_is_the_same_with_all_some_and_no_experts_on_the_device() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let model = f16_model(folder.path());
    let run = |extra: &[&str]| {
        let args = ["run", &model, "-p", "ROMEO:", "-n", "10", "--temp", "0", "--context", "64", "--chunk", "16"];
        json(&[&args[..], extra].concat())
    };
    let cpu = run(&["--device", "cpu"]);
    assert!(cpu["device"].as_str().expect("a text").contains("cpu, as asked"));
    assert!(cpu["device_memory"].is_null());
    // By its own speed the device would get no expert, so it stands for a real one. Its reserve of 512 MiB leaves room for a part only.
    let (mut hits, mut misses) = (0, 0);
    for vram in ["1GiB", "548MiB", "534MiB"] {
        let out = run(&["--device", "reference", "--machine", "rtx3060-12g-ddr4-32g", "--vram", vram]);
        assert_eq!(out["text"], cpu["text"], "{vram}");
        assert!(out["device"].as_str().expect("a text").contains("reference"), "{}", out["device"]);
        let lines = out["device_memory"].as_array().expect("lines");
        let sum = |field: &str| -> String { lines.iter().map(|l| format!("{} {}; ", l["name"], l[field])).collect() };
        println!("{vram}: planned {}, allocated {}", sum("planned"), sum("allocated"));
        assert!(lines.iter().any(|l| l["name"] == "keys and values"));
        hits += out["hits"].as_u64().expect("a count");
        misses += out["misses"].as_u64().expect("a count");
    }
    println!("{hits} hits, {misses} misses");
    assert!(hits > 0 && misses > 0, "some experts had to come through slots");
    let probed = run(&["--device", "reference"]);
    assert_eq!(probed["text"], cpu["text"]);
}

#[test]
fn plans_and_devices_must_fit_together() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plan = folder.path().join("plan.json");
    tierwise(&["plan", TINY, "--machine", "rtx3060-12g-ddr4-32g", "--vram", "1GiB", "-o", str(&plan)]).assert().success();
    fn with<'a>(extra: &[&'a str]) -> Vec<&'a str> {
        [&["run", TINY, "-p", "x", "-n", "2"], extra].concat()
    }
    let message = error(&with(&["--plan", str(&plan), "--device", "cpu"]));
    assert!(message.contains("gpu0") && message.contains("--vram 0"), "{message}");
    // A plan for another machine's GPU runs on the device at hand.
    assert!(json(&with(&["--plan", str(&plan), "--device", "reference"]))["text"].is_string());
    let described = json(&with(&["--machine", "rtx3060-12g-ddr4-32g", "--vram", "1GiB", "--device", "reference"]));
    assert!(described["text"].is_string());
    let message = error(&with(&["--machine", "desktop-ddr4-64g", "--device", "reference"]));
    assert!(message.contains("has no GPU"), "{message}");
    let message = error(&with(&["--device", "reference", "--vram", "100MiB"]));
    assert!(message.contains("--vram"), "{message}");
    let zero = json(&with(&["--device", "auto", "--vram", "0B"]));
    assert!(zero["device"].as_str().expect("a text").contains("cpu"));
}

#[test]
fn verify_looks_at_the_device_too() {
    let verified = json(&[
        "verify",
        TINY,
        "--device",
        "reference",
        "--vram",
        "528MiB",
        "-n",
        "8",
        "--context",
        "64",
        "--machine",
        "rtx3060-12g-ddr4-32g",
    ]);
    assert_eq!(verified["ok"], true, "{verified}");
    let names: Vec<&str> = verified["checks"].as_array().expect("checks").iter().filter_map(|c| c["name"].as_str()).collect();
    for name in ["experts on the device", "device: keys and values", "device: all", "bytes in slots on the device"] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
}
