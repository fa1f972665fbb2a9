//! `tierwise export` as a user meets it.

use assert_cmd::Command;
use serde_json::Value;
use std::path::Path;

fn tierwise(args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"));
    command.env("XDG_CACHE_HOME", std::env::temp_dir().join("tierwise-cli-tests"));
    command.args(args);
    command
}

fn json_of(args: &[&str]) -> Value {
    let out = tierwise(args).args(["--json", "--quiet"]).assert().success().get_output().clone();
    serde_json::from_slice(&out.stdout).expect("one JSON object")
}

fn plan(dir: &Path) -> String {
    let path = dir.join("plan.json").display().to_string();
    let args = [
        "plan",
        "gpt-oss-20b",
        "--format",
        "MXFP4",
        "--machine",
        "epyc-12ch-ddr5-rtx4090",
        "--vram",
        "7GiB",
        "--solver",
        "greedy",
        "-o",
        &path,
        "--quiet",
    ];
    tierwise(&args).assert().success();
    path
}

#[test]
fn a_plan_becomes_llama_cpps_command_line() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let plan = plan(dir.path());
    let v = json_of(&["export", &plan, "--to", "llama.cpp", "--model", "gpt-oss-20b"]);
    let command = v["command"].as_str().expect("a command");
    assert!(command.starts_with("llama-server -m gpt-oss-20b -ngl 99 -ot \"") && command.contains("exps=CPU\""), "{command}");
    assert!(!command.contains('{'), "{command}");
    let loss = &v["loss"];
    let number = |key: &str| loss[key].as_f64().unwrap_or_else(|| panic!("{key} in {loss}"));
    assert!(number("experts_on_gpu_exported") <= number("experts_on_gpu_planned"));
    let (planned, exported) = (number("decode_tokens_per_s_planned"), number("decode_tokens_per_s_exported"));
    assert!(exported > 0.0 && exported <= planned * 1.001, "{planned} and {exported}");
    assert_eq!(v["files"].as_array().map(Vec::len), Some(0));
    let text = tierwise(&["export", &plan, "--to", "ik_llama"]).assert().success().get_output().stdout.clone();
    assert!(String::from_utf8_lossy(&text).contains("lost on the way:"));
}

#[test]
fn a_plan_becomes_files_for_others() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let plan = plan(dir.path());
    let v = json_of(&["export", &plan, "--to", "ktransformers"]);
    let file = v["files"][0].as_str().expect("a file");
    assert!(file.ends_with("plan.kt.pt") && Path::new(file).is_file());
    assert_eq!(v["loss"]["experts_elsewhere"], 0);
    // The counts come back through the importer of such files: as many large ones as experts are planned on the GPU.
    let counts = dir.path().join("counts.json").display().to_string();
    tierwise(&["trace", "import", file, "--from", "sglang", "-o", &counts]).assert().success();
    let table: Value = serde_json::from_str(&std::fs::read_to_string(&counts).expect("written")).expect("JSON");
    let text = table.to_string();
    let large = text.matches("1000000").count() as u64;
    assert!(large >= v["loss"]["experts_on_gpu_planned"].as_u64().expect("a number"), "{large}");
    let v = json_of(&["export", &plan, "--to", "mistralrs"]);
    let topology = std::fs::read_to_string(v["files"][0].as_str().expect("a file")).expect("written");
    assert!(topology.contains("device: cpu") && topology.contains("device: cuda[0]"), "{topology}");
}

#[test]
fn what_cannot_be_exported_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let plan = plan(dir.path());
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("writable");
        path.display().to_string()
    };
    let empty = write("empty.json", "{}");
    let no_json = write("no.json", "nothing");
    let balance = write("balance.json", r#"{"tierwise_balance":1}"#);
    let wrong = write("wrong.json", r#"{"tierwise_plan":99}"#);
    let pt = dir.path().join("counts.json").display().to_string();
    #[rustfmt::skip]
    let table: [(&[&str], &str); 8] = [
        (&[&plan, "--to", "sglang"], "is a plan for the memories of one machine; expected a placement"),
        (&[&balance, "--to", "llama.cpp"], "is a placement over devices; expected a plan"),
        (&[&balance, "--to", "sglang"], "expected JSON written by `tierwise balance -o`"),
        (&[&empty, "--to", "sglang"], "has neither tierwise_plan nor tierwise_balance"),
        (&[&no_json, "--to", "sglang"], "no.json"),
        (&[&wrong, "--to", "llama.cpp"], "99"),
        (&[&plan, "--to", "ktransformers", "-o", &pt], "expected .pt"),
        (&["absent.json", "--to", "sglang"], "cannot read absent.json"),
    ];
    for (args, message) in table {
        let out = tierwise(&[&["export"], args].concat()).assert().code(1).get_output().clone();
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(error.contains(message) && !error.contains("panicked") && out.stdout.is_empty(), "{args:?}: {error}");
    }
}

#[test]
fn a_permuted_checkpoint_computes_the_same() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-q4_k_m.gguf");
    let inside = json_of(&["inspect", model]);
    let of = |key: &str| inside[key].as_u64().unwrap_or_else(|| panic!("{key} in {inside}")) as usize;
    let (layers, experts) = (of("num_layers"), of("num_experts"));
    // Loads that put other experts together in every layer.
    let weight: Vec<Vec<usize>> =
        (0..layers).map(|l| (0..experts).map(|e| 1 + (e * 7 + l * 3) % experts * (e + 1)).collect()).collect();
    std::fs::write(path("loads.json"), serde_json::json!({ "weight": weight }).to_string()).expect("writable");
    let (loads, placement, permuted) = (path("loads.json"), path("placement.json"), path("permuted.gguf"));
    let args =
        ["balance", "--load", &loads, "--devices", "2", "--model", model, "--policy", "tierwise", "-o", &placement, "--quiet"];
    tierwise(&args).assert().success();
    tierwise(&["export", &placement, "--permute-checkpoint", &permuted, "--model", model]).assert().success();
    assert_ne!(std::fs::read(model).expect("readable"), std::fs::read(&permuted).expect("written"));
    std::fs::write(path("tokens"), "1 5 9 200 33 7 81 4 17 60 2 3").expect("writable");
    let logits = |model: &str| {
        let v = json_of(&["logits", model, "--tokens", &path("tokens"), "--routing"]);
        let numbers: Vec<f64> = v["logits"]
            .as_array()
            .expect("rows")
            .iter()
            .flat_map(|r| r.as_array().expect("a row"))
            .filter_map(Value::as_f64)
            .collect();
        (numbers, v["experts"].clone())
    };
    let ((before, chosen), (after, renamed)) = (logits(model), logits(&permuted));
    assert_eq!(before.len(), after.len());
    let worst = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst <= 1e-4, "logits differ by {worst}");
    assert_ne!(chosen, renamed, "the experts have other numbers");
    // Replicas cannot be in a file.
    let args = [
        "balance",
        "--load",
        &loads,
        "--devices",
        "2",
        "--replicas",
        &(2 * experts).to_string(),
        "--policy",
        "tierwise",
        "-o",
        &placement,
        "--quiet",
    ];
    tierwise(&args).assert().success();
    let out = tierwise(&["export", &placement, "--permute-checkpoint", &path("no.gguf"), "--model", model]).assert().code(1);
    assert!(String::from_utf8_lossy(&out.get_output().stderr).contains("once: no replicas"));
}
