//! Flags of the engine and exact `--ram` budgets, as a user meets them.

#[path = "common/machine.rs"]
mod machine;

use assert_cmd::Command;
use serde_json::Value;

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

fn errors(args: &[&str], code: i32) -> String {
    let out = tierwise(args).assert().code(code).get_output().stderr.clone();
    String::from_utf8_lossy(&out).into_owned()
}

const RUN: &[&str] = &["run", TINY, "-p", "ROMEO:", "-n", "24", "--seed", "1", "--context", "128", "--chunk", "32"];

#[test]
fn engines_by_flag_say_the_same_and_replay() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let record = folder.path().join("run.rec");
    let record = record.to_str().expect("UTF-8");
    let whole = json(RUN);
    for flags in [
        &["--policy", "adaptive", "--prefetch", "lookahead", "--prefetch-layers", "2", "--fill"][..],
        &["--policy", "s3-fifo", "--prefetch", "history", "--staging", "2", "--io", "threads"],
    ] {
        let mut args = RUN.to_vec();
        args.extend(["--ram", "9MiB", "--record", record]);
        args.extend(flags);
        let out = json(&args);
        assert_eq!(out["text"], whole["text"], "{flags:?}");
        let engine = &out["engine"];
        assert_eq!(engine["settings"]["prefetch"], flags[3]);
        assert!(engine["hit_rate_cold"].is_number() && engine["hit_rate_steady"].is_number(), "{engine}");
        assert!(engine["prefetches"]["issued"].is_number());
        assert_eq!(json(&["verify", "--replay", record, TINY])["ok"], true);
        let mut verify = vec!["verify", TINY, "--ram", "9MiB", "--context", "128"];
        verify.extend(flags);
        assert_eq!(json(&verify)["ok"], true, "{flags:?}");
    }
}

#[test]
fn plans_take_the_flags_and_files_keep_them() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("plan.json");
    let file = file.to_str().expect("UTF-8");
    let gpu = ["plan", "qwen3-30b-a3b", "--machine", "rtx3090-24g-ddr4-64g", "--vram", "12GiB", "-o", file];
    let mut args = gpu.to_vec();
    args.extend(["--policy", "mrs", "--prefetch", "lookahead", "--prefetch-layers", "3", "--fill"]);
    let plan = json(&args);
    let settings = &plan["engine"];
    assert_eq!(
        (&settings["prefetch"], &settings["prefetch_layers"], &settings["fill"]),
        (&"lookahead".into(), &3.into(), &true.into())
    );
    let written: Value = serde_json::from_str(&std::fs::read_to_string(file).expect("read")).expect("JSON");
    assert_eq!(&written["engine"], settings);
    assert!(errors(&["plan", "qwen3-30b-a3b", "--policy", "best"], 2).contains("adaptive"), "the choices are named");
    let mut args = gpu.to_vec();
    args.extend(["--prefetch", "history", "--prefetch-layers", "9"]);
    assert!(errors(&args, 2).contains("1..=8"));
}

/// A machine of 4 GiB, as a container shows itself: the reserve of 2 GiB counts only when nobody says what may be used.
#[test]
fn an_explicit_ram_limit_is_the_budget() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = &machine::with_disk(folder.path(), "4 GiB", "50 GB/s", "1 TB");
    let plan = |ram: &[&str]| {
        let mut args = vec!["plan", "olmoe-1b-7b", "--machine", file, "--context", "512"];
        args.extend(ram);
        json(&args)
    };
    let line = |plan: &Value, name: &str| {
        let budget = plan["budgets"].as_array().expect("budgets").iter().find(|b| b["memory"] == "dram0").expect("the memory");
        let lines = budget["lines"].as_array().expect("lines").iter();
        (budget["capacity"].clone(), lines.filter(|l| l["name"] == name).count())
    };
    let asked = plan(&["--ram", "3GiB"]);
    assert_eq!(line(&asked, "reserve").1, 0, "all of what was asked for is used");
    assert_eq!(line(&asked, "reserve").0, "3 GiB");
    assert_eq!(line(&plan(&[]), "reserve").1, 1, "the system keeps its part");
    let tight = ["plan", "olmoe-1b-7b", "--machine", file, "--context", "512", "--ram", "4090MiB"];
    let out = tierwise(&tight).assert().success().get_output().stderr.clone();
    assert!(String::from_utf8_lossy(&out).contains("leaves"), "{}", String::from_utf8_lossy(&out));
    let over = ["plan", "olmoe-1b-7b", "--machine", file, "--context", "512", "--ram", "5GiB"];
    assert!(errors(&over, 1).contains("at most"));
}
