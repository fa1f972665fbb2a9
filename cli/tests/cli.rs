//! The command as a user meets it: exit codes, messages, JSON, files.

use assert_cmd::Command;
use serde_json::Value;
use std::path::{Path, PathBuf};

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

/// Runs a command that must fail with exit code 1 and one `error:` line that contains all `words`.
fn fails(args: &[&str], words: &[&str]) {
    let out = tierwise(args).assert().code(1).get_output().clone();
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    let errors: Vec<_> = message.lines().filter(|l| l.starts_with("error:")).collect();
    assert_eq!(errors.len(), 1, "{args:?}: {message}");
    assert!(!message.contains("panicked"), "{args:?}: {message}");
    for word in words {
        assert!(errors[0].contains(word), "{args:?}: {word:?} is not in {message}");
    }
    assert!(out.stdout.is_empty(), "{args:?}: standard output of a failure: {}", String::from_utf8_lossy(&out.stdout));
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> String {
    let path = dir.join(name);
    std::fs::write(&path, bytes).expect("the temporary folder is writable");
    path.display().to_string()
}

fn files_in(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).expect("the temporary folder is readable").map(|e| e.expect("readable").path()).collect()
}

#[test]
fn bad_input_gets_one_clear_message() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let good = std::fs::read(TINY).expect("the bundled model is there");
    let text = write(dir.path(), "text.gguf", b"this is no model at all, just text in a file of that name");
    let cut = write(dir.path(), "cut.gguf", &good[..good.len() / 2]);
    let cut_header = write(dir.path(), "cut-header.gguf", &good[..1000]);
    let at = good.windows(8).position(|w| w == b"qwen3moe").expect("the architecture's name is in the file");
    let mut other = good;
    other[at..at + 8].copy_from_slice(b"qwen9moe");
    let other = write(dir.path(), "other.gguf", &other);
    let ids = write(dir.path(), "ids.txt", b"1 2 three");
    let far = write(dir.path(), "far.txt", b"1 2 4096");
    let empty = write(dir.path(), "empty.txt", b" \n");
    let not_a_plan = write(dir.path(), "plan.json", b"{\"tierwise_plan\": 99}");
    let folder = dir.path().display().to_string();
    let long = "word ".repeat(2000);

    fails(&["inspect", "/no/such/model.gguf"], &["/no/such/model.gguf", "No such file"]);
    fails(&["inspect", "qwen3-30b"], &["qwen3-30b-a3b"]);
    fails(&["inspect", &text], &["text.gguf", "GGUF"]);
    fails(&["inspect", &cut], &["cut.gguf"]);
    fails(&["run", &cut_header, "-p", "x"], &["cut-header.gguf"]);
    fails(&["run", &other, "-p", "x"], &["qwen9moe", "qwen3moe", "olmoe"]);
    fails(&["inspect", &folder], &["config.json"]);
    fails(&["run", TINY, "-p", "x", "--vram", "1KB"], &["--vram"]);
    fails(&["run", TINY, "-p", "x", "--ram", "1MB"], &["smallest"]);
    fails(&["plan", TINY, "--machine", "rtx3090-24g-ddr4-64g", "--vram", "1KB"], &["smallest"]);
    fails(&["plan", TINY, "--machine", "rtx3090"], &["\"rtx3090\"", "rtx3090-24g-ddr4-64g"]);
    fails(&["plan", TINY, "--context", "9999999"], &["context", "1024"]);
    fails(&["run", TINY, "-p", &long, "--context", "256"], &["256", "--context"]);
    fails(&["run", TINY, "-p", "x", "--context", "0"], &["context"]);
    fails(&["run", TINY, "-p", "x", "--chat"], &["chat template", "--chatml"]);
    fails(&["run", TINY, "-p", "x", "--kv", "BF16"], &["BF16", "F16, F32, or Q8_0"]);
    fails(&["run", TINY, "-p", "x", "--temp=-1"], &["temperature"]);
    fails(&["run", TINY, "-p", ""], &["empty"]);
    let on_cuda = ["run", TINY, "-p", "x", "-n", "1", "--device", "cuda"];
    if tierwise(&on_cuda).output().expect("started").status.success() {
        println!("skipped: there is a CUDA device to run on");
    } else {
        fails(&on_cuda, &["cuda", "--device cpu"]);
    }
    fails(&["run", TINY, "-p", "x", "--threads", "0"], &["--threads"]);
    fails(&["run", TINY, "-p", "x", "--plan", &not_a_plan], &["plan.json"]);
    fails(&["run", "qwen3-30b-a3b", "-p", "x"], &["without weights", "synth"]);
    fails(&["logits", TINY, "--tokens", &ids], &["three"]);
    fails(&["logits", TINY, "--tokens", &far], &["4096"]);
    fails(&["logits", TINY, "--tokens", &empty], &["no ids"]);
    fails(&["perplexity", TINY, "--text", &empty], &["window"]);
    fails(&["synth", "olmoe-1b-7b", "--format", "Q9", "-o", "/tmp/x.gguf"], &["Q9", "Q4_K_M"]);
    fails(&["synth", "olmoe-1b-7b", "--layers", "99", "-o", "/tmp/x.gguf"], &["--layers", "16"]);
    fails(&["bench", TINY, "-p", "0", "-n", "0"], &["nothing to measure"]);
    fails(&["explain", &text], &["text.gguf", "plan"]);
}

#[test]
fn unwritable_output_is_refused_and_leaves_nothing() {
    fails(&["plan", TINY, "-o", "/no/such/folder/plan.json"], &["/no/such/folder"]);
    fails(&["synth", "olmoe-1b-7b", "--layers", "1", "-o", "/no/such/folder/m.gguf"], &["/no/such/folder"]);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let folder = dir.path().display().to_string();
    fails(&["plan", TINY, "-o", &folder], &[&folder]);
    assert!(files_in(dir.path()).is_empty(), "{:?}", files_in(dir.path()));
}

#[test]
fn usage_errors_exit_with_two() {
    for args in [
        &["frobnicate"][..],
        &["run"],
        &["plan", TINY, "--vram", "24"],
        &["bench", TINY, "-r", "0"],
        &["run", TINY, "-p", "x", "--kv", "Q17"],
    ] {
        tierwise(args).assert().code(2);
    }
}

#[test]
fn every_verb_has_help_with_an_example() {
    for verb in
        ["inspect", "doctor", "plan", "explain", "run", "bench", "logits", "perplexity", "synth", "demo", "completions", "man"]
    {
        let out = tierwise(&[verb, "--help"]).assert().success().get_output().stdout.clone();
        let text = String::from_utf8_lossy(&out).into_owned();
        assert!(text.contains("Example:") && text.contains(&format!("tierwise {verb}")), "{verb}: {text}");
    }
}

#[test]
fn inspect_counts_every_byte() {
    let v = json(&["inspect", TINY, "--tensors"]);
    assert_eq!(v["architecture"], "qwen3moe");
    assert_eq!((&v["num_layers"], &v["num_experts"], &v["experts_per_token"]), (&6.into(), &32.into(), &4.into()));
    // 2 KV heads x 64 x 2 (keys and values) x 6 layers x 2 bytes.
    assert_eq!(v["kv_bytes_per_token"], 3072);
    let sum: u64 = v["tensors"].as_array().expect("a list").iter().map(|t| t["bytes"].as_u64().expect("a number")).sum();
    assert_eq!(v["total_bytes"], sum);
    let roles: u64 = v["bytes_by_role"].as_object().expect("a map").values().map(|b| b.as_u64().expect("a number")).sum();
    assert_eq!(roles, sum);
    assert_eq!(v["file_bytes"], std::fs::metadata(TINY).expect("the bundled model is there").len());
}

#[test]
fn a_plan_for_a_machine_one_does_not_own_accounts_for_every_byte() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("plan.json").display().to_string();
    let v = json(&["plan", "qwen3-30b-a3b", "--machine", "rtx3090-24g-ddr4-64g", "--vram", "12GiB", "-o", &file]);
    for budget in v["budgets"].as_array().expect("a list") {
        let bytes = |value: &Value| value.as_str().expect("a size").parse::<tierwise_cost::units::Bytes>().expect("a size").0;
        let sum: u64 = budget["lines"].as_array().expect("a list").iter().map(|l| bytes(&l["bytes"])).sum();
        assert_eq!(sum, bytes(&budget["capacity"]), "{}", budget["memory"]);
    }
    assert!(v["lower_bound_s"].as_f64() <= v["objective_s"].as_f64());
    assert!(v["predicted"]["decode_tokens_per_s"]["low"].as_f64() <= v["predicted"]["decode_tokens_per_s"]["value"].as_f64());
    let reasons = json(&["explain", &file]);
    assert!(!reasons["reasons"].as_array().expect("a list").is_empty());
    // The same plan cannot run here: it is for another model, and it wants a GPU.
    fails(&["run", TINY, "-p", "x", "--plan", &file], &["Qwen3-30B-A3B"]);
}

#[test]
fn run_follows_a_saved_plan_and_repeats_with_a_seed() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let cpu_only = dir.path().join("plan.json").display().to_string();
    tierwise(&["plan", TINY, "--machine", "minipc-ddr5-32g", "-o", &cpu_only]).assert().success();
    let args = ["run", TINY, "-p", "ROMEO:", "-n", "24", "--seed", "7", "--quiet"];
    let a = json(&args);
    let b = json(&[&args[..], &["--plan", &cpu_only]].concat());
    assert_eq!(a["tokens"], b["tokens"]);
    assert_eq!(a["tokens"].as_array().expect("a list").len(), 24);
    let text = String::from_utf8(tierwise(&args).assert().success().get_output().stdout.clone()).expect("text");
    assert_eq!(text.trim_end_matches('\n'), a["text"].as_str().expect("text").trim_end_matches('\n'));
}

#[test]
fn a_machine_file_with_a_gpu_does_not_keep_the_cpu_from_running() {
    let cache = tempfile::tempdir().expect("a temporary folder");
    let folder = cache.path().join("tierwise");
    std::fs::create_dir(&folder).expect("the temporary folder is writable");
    write(&folder, "machine.toml", include_bytes!("../../configs/machines/rtx3090-24g-ddr4-64g.toml"));
    let mut command = tierwise(&["run", TINY, "-p", "x", "-n", "2", "--verbose"]);
    let out = command.env("XDG_CACHE_HOME", cache.path()).assert().success().get_output().stderr.clone();
    assert!(String::from_utf8_lossy(&out).contains("calibrated in"));
}

#[test]
fn chat_form_is_applied_when_asked_for() {
    let plain = json(&["run", TINY, "-p", "hi", "-n", "2", "--quiet", "--temp", "0"]);
    let chat =
        json(&["run", TINY, "-p", "hi", "-n", "2", "--quiet", "--temp", "0", "--chat", "--chatml", "--system", "Be brief."]);
    assert!(chat["prompt_tokens"].as_u64() > plain["prompt_tokens"].as_u64());
}

#[test]
fn experts_on_disk_change_the_traffic_but_not_the_text() {
    let args = ["run", TINY, "-p", "pub fn new(", "-n", "32", "--temp", "0", "--quiet", "--context", "256"];
    let all = json(&args);
    // The message for an impossible budget names the smallest one that works.
    let out = tierwise(&[&args[..], &["--ram", "1MB"]].concat()).assert().code(1).get_output().stderr.clone();
    let message = String::from_utf8_lossy(&out).into_owned();
    let smallest = message
        .split("smallest budget that works is ")
        .nth(1)
        .and_then(|s| s.split(" (").next())
        .unwrap_or_else(|| panic!("{message}"));
    let smallest = smallest.split(" of ").next().expect("split gives one part").replace(' ', "");
    let some = json(&[&args[..], &["--ram", &smallest]].concat());
    assert_eq!(all["tokens"], some["tokens"]);
    assert!(some["bytes_by_link"].as_object().is_some_and(|m| m.values().any(|b| b.as_u64() > Some(0))), "{some}");
}

#[test]
fn logits_and_routing_have_their_shapes() {
    let out = tierwise(&["logits", TINY, "--tokens", "-", "--routing", "--json"])
        .write_stdin("4038 28 766")
        .assert()
        .success()
        .get_output()
        .stdout
        .clone();
    let v: Value = serde_json::from_slice(&out).expect("JSON");
    assert_eq!(v["logits"].as_array().map(Vec::len), Some(3));
    assert_eq!(v["logits"][2].as_array().map(Vec::len), Some(4096));
    assert_eq!(v["experts"].as_array().map(Vec::len), Some(6));
    assert_eq!(v["experts"][5][2].as_array().map(Vec::len), Some(4));
}

#[test]
fn synth_makes_a_model_that_is_inspected_and_run() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let small = include_str!("../../runtime/tests/golden/olmoe/config.json").replace("\"vocab_size\": 96", "\"vocab_size\": 512");
    let config = write(dir.path(), "config.json", small.as_bytes());
    let file = dir.path().join("m.gguf").display().to_string();
    let made = json(&["synth", &config, "--format", "Q8_0", "-o", &file]);
    assert_eq!(made["bytes"], std::fs::metadata(&file).expect("written").len());
    assert_eq!(json(&["inspect", &file])["architecture"], "olmoe");
    assert_eq!(
        json(&["run", &file, "-p", "ab", "-n", "4", "--ignore-eos", "--quiet"])["tokens"].as_array().map(Vec::len),
        Some(4)
    );
    let names: Vec<_> = files_in(dir.path()).iter().map(|p| p.file_name().expect("a name").to_os_string()).collect();
    assert_eq!(names.len(), 2, "no temporary files stay: {names:?}");
}

#[test]
fn demo_shows_plan_text_and_speed() {
    let out = tierwise(&["demo", "-n", "16"]).assert().success().get_output().stdout.clone();
    let text = String::from_utf8_lossy(&out).into_owned();
    for part in ["Where the experts are", "What every byte is for", "ROMEO:", "predicted", "measured", "limit"] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let v = json(&["demo", "-n", "8"]);
    assert_eq!(v["tokens"].as_array().map(Vec::len), Some(8));
    assert!(v["plan"]["tierwise_plan"] == 1 && v["limit"]["decode_tokens_per_s"].as_f64() > Some(0.0));
}

#[test]
fn bench_reports_medians_and_limits() {
    let v = json(&["bench", TINY, "-p", "32", "-n", "8", "-r", "2"]);
    let results = v["results"].as_array().expect("a list");
    assert_eq!(results.len(), 2);
    assert_eq!((&results[0]["test"], &results[1]["test"]), (&"pp32".into(), &"tg8".into()));
    assert!(results.iter().all(|r| r["min"].as_f64() <= r["tokens_per_s_median"].as_f64()));
    assert!(results[1]["limit_tokens_per_s"].as_f64() > Some(0.0));
}

#[test]
fn perplexity_is_finite_and_repeats() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let text = write(
        dir.path(),
        "t.txt",
        "The common people swarm like summer flies; and whither fly the gnats but to the sun?\n".repeat(8).as_bytes(),
    );
    let v = json(&["perplexity", TINY, "--text", &text, "--window", "64"]);
    assert!(v["perplexity"].as_f64().is_some_and(|p| p > 1.0 && p < 4096.0), "{v}");
    assert_eq!(v["perplexity"], json(&["perplexity", TINY, "--text", &text, "--window", "64"])["perplexity"]);
}

#[test]
fn doctor_completions_and_manual_print() {
    let checks = json(&["doctor"]);
    assert!(checks["checks"].as_array().is_some_and(|c| c.len() >= 8));
    for shell in ["bash", "zsh", "fish"] {
        let out = tierwise(&["completions", shell]).assert().success().get_output().stdout.clone();
        assert!(String::from_utf8_lossy(&out).contains("perplexity"), "{shell}");
    }
    let man = tierwise(&["man"]).assert().success().get_output().stdout.clone();
    assert!(String::from_utf8_lossy(&man).contains("tierwise"));
}
