//! `verify`, `run --record`, and the choice of how experts on disk are read, as a user meets them.

use assert_cmd::Command;
use serde_json::Value;
use std::path::Path;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-q4_k_m.gguf");
/// Room for a part of the bundled model's experts.
const RAM: &str = "9MiB";

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

const RUN: &[&str] = &["run", TINY, "-p", "ROMEO:", "-n", "24", "--seed", "1", "--context", "128", "--chunk", "32"];

#[test]
fn a_run_within_less_memory_says_the_same_and_replays() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let whole = json(RUN);
    assert!(whole["io"].is_null(), "nothing is read from disk");
    for extra in
        [&["--io", "threads"][..], &["--io", "auto"], &["--page-cache", "use"], &["--io", "threads", "--page-cache", "use"]]
    {
        let record = folder.path().join("run.rec");
        let mut args = RUN.to_vec();
        args.extend(["--ram", RAM, "--record", str(&record)]);
        args.extend(extra);
        let out = json(&args);
        assert_eq!(out["text"], whole["text"], "{extra:?}");
        assert!(out["misses"].as_u64().expect("a count") > 0);
        let io = &out["io"];
        assert!(["io_uring", "threads"].contains(&io["backend"].as_str().expect("a name")), "{io}");
        if extra.contains(&"threads") {
            assert_eq!(io["backend"], "threads");
        }
        if extra.contains(&"use") {
            assert_eq!((io["page_cache"].as_str(), io["page_cache_reason"].as_str()), (Some("used"), Some("as asked")));
        }
        let replayed = json(&["verify", "--replay", str(&record), TINY]);
        assert_eq!(replayed["ok"], true);
        assert!(replayed["actions"].as_u64() > Some(100), "{replayed}");
        assert!(replayed["difference"].is_null());

        // One expert changed in one action: the replay names it and fails.
        let text = std::fs::read_to_string(&record).expect("read");
        let at =
            text.rfind("{\"out\":{\"Compute\":{\"layer\":").expect("a computation") + "{\"out\":{\"Compute\":{\"layer\":".len();
        let mut changed = text;
        changed.insert(at, '1');
        std::fs::write(&record, changed).expect("written");
        let message = error(&["verify", "--replay", str(&record), TINY]);
        assert!(message.contains("the replay differs") && message.contains("after input"), "{message}");
    }
    let message = error(&["verify", "--replay", TINY, TINY]);
    assert!(message.contains("tiny-q4_k_m.gguf"), "{message}");
}

#[test]
fn verify_finds_what_was_planned() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plan = folder.path().join("plan.json");
    json(&["plan", TINY, "--ram", RAM, "--context", "128", "--chunk", "32", "-o", str(&plan)]);
    for args in [vec!["verify", str(&plan), TINY], vec!["verify", TINY], vec!["verify", TINY, "--ram", RAM, "--context", "128"]] {
        let out = json(&args);
        assert_eq!(out["ok"], true, "{out}");
        let checks = out["checks"].as_array().expect("checks");
        let names: Vec<&str> = checks.iter().map(|c| c["name"].as_str().expect("a name")).collect();
        for name in ["model", "experts in memory", "experts on disk", "slots", "bytes in slots", "keys and values"] {
            assert!(names.contains(&name), "{names:?}");
        }
        let bytes = checks.iter().find(|c| c["name"] == "bytes in slots").expect("it is there");
        let compared = !bytes["found"].as_str().expect("text").starts_with("0 experts");
        assert_eq!(compared, args.len() != 2, "{bytes}");
    }
    let text = tierwise(&["verify", str(&plan), TINY, "-v"]).assert().success().get_output().clone();
    let out = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(out.contains("all as planned") && out.contains("experts in slots"), "{out}");
    let notes = String::from_utf8_lossy(&text.stderr).into_owned();
    assert!(notes.contains("experts are read by"), "-v says how: {notes}");
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plan = folder.path().join("plan.json");
    json(&["plan", TINY, "--ram", RAM, "--context", "128", "--chunk", "32", "-o", str(&plan)]);
    let text = std::fs::read_to_string(&plan).expect("read");
    let fingerprint =
        serde_json::from_str::<Value>(&text).expect("JSON")["model"]["fingerprint"].as_str().expect("text").to_string();
    std::fs::write(&plan, text.replace(&fingerprint, "0123456789abcdef")).expect("written");
    let message = error(&["verify", str(&plan), TINY]);
    assert!(message.contains("plan.json") && message.contains("0123456789abcdef"), "{message}");
    assert!(error(&["verify", str(&plan), TINY, "--ram", "9MiB"]).contains("the plan's"));
    assert!(error(&["verify", str(&folder.path().join("absent.json")), TINY]).contains("absent.json"));
}

/// A machine file with main and CXL memory on a node that this machine has.
fn two_tiers(folder: &Path, node: u64, cxl_node: u64) -> String {
    let memory = |id: &str, kind: &str, node: u64| {
        format!(
            "[[memory]]\nid = \"{id}\"\nkind = \"{kind}\"\ncapacity = {{ value = \"1 GiB\", source = \"prior\" }}\n\
             read_bandwidth = {{ value = \"10 GB/s\", source = \"prior\" }}\nlatency = {{ value = \"100 ns\", source = \"prior\" }}\n\
             numa_nodes = [{node}]\n"
        )
    };
    let text = format!(
        "name = \"two tiers\"\n{}{}[[processor]]\nid = \"cpu0\"\nkind = \"cpu\"\nname = \"test\"\ncores = 2\nthreads = 2\n\
         computes_from = [\"dram0\", \"cxl0\"]\nf32_flops = {{ value = \"100 GFLOP/s\", source = \"prior\" }}\n\
         launch_latency = {{ value = \"5 us\", source = \"prior\" }}\n[[link]]\nfrom = \"cxl0\"\nto = \"dram0\"\n\
         bandwidth = {{ value = \"5 GB/s\", source = \"prior\" }}\nlatency = {{ value = \"300 ns\", source = \"prior\" }}\n",
        memory("dram0", "dram", node),
        memory("cxl0", "cxl", cxl_node)
    );
    let path = folder.join(format!("tiers-{node}-{cxl_node}.toml"));
    std::fs::write(&path, text).expect("written");
    str(&path).to_string()
}

#[test]
fn experts_lie_on_the_nodes_that_the_plan_names() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let doctor = json(&["doctor"]);
    let nodes = doctor["nodes"]["nodes"].as_array().expect("nodes");
    let Some(node) = nodes.iter().find(|n| n["allowed"] == true && n["total"] != "0 B").and_then(|n| n["number"].as_u64()) else {
        return println!("skipped: no node is readable here: {doctor}");
    };
    let machine = two_tiers(folder.path(), node, node);
    let budgets = ["--machine", &machine, "--ram", RAM, "--cxl", "64MiB", "--device", "cpu"];
    let with = |args: &[&'static str]| args.iter().copied().chain(budgets).map(str::to_string).collect::<Vec<_>>();
    let args = with(RUN);
    let args: Vec<&str> = args.iter().map(String::as_str).chain(["--verify"]).collect();
    let run = tierwise(&args).output().expect("it ran");
    let notes = String::from_utf8_lossy(&run.stderr).into_owned();
    if notes.contains("refused") {
        return println!("skipped: {notes}");
    }
    assert!(run.status.success() && notes.contains("experts placed") && notes.contains("cxl0"), "{notes}");
    assert_eq!(json(&args)["text"], json(RUN)["text"], "where bytes lie changes no text");
    let args = with(&["verify", TINY, "--context", "128"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let out = json(&args);
    assert_eq!(out["ok"], true, "{out}");
    let rows = out["tiers"].as_array().expect("rows");
    for memory in ["dram0", "cxl0"] {
        let row = rows.iter().find(|r| r["memory"] == memory && r["what"] == "resident experts").expect("a row");
        assert_eq!(row["there"], row["planned"], "{row}");
        assert_eq!((&row["elsewhere"], &row["absent"]), (&Value::from("0 B"), &Value::from("0 B")), "{row}");
    }
    // A node that is not there: an error before anything is loaded, with those that are.
    let wrong = two_tiers(folder.path(), node, 999);
    let mut args = RUN.to_vec();
    args.extend(["--machine", &wrong, "--ram", RAM, "--cxl", "64MiB", "--device", "cpu"]);
    let message = error(&args);
    assert!(message.contains("cxl0 on node 999") && message.contains(&format!("node {node} (")), "{message}");
}

#[test]
fn what_lies_in_the_map_is_looked_at_too() {
    let out = json(&["verify", TINY, "--context", "128", "--device", "cpu"]);
    let rows = out["tiers"].as_array().expect("rows");
    let row = rows.iter().find(|r| r["memory"] == "dram0" && r["what"] == "resident experts").expect("a row");
    assert!(row["nodes"].as_array().is_some_and(Vec::is_empty) && row["ok"] == true, "{row}");
    let out =
        tierwise(&["run", TINY, "-p", "x", "-n", "1", "--context", "64", "--verify"]).assert().success().get_output().clone();
    assert!(String::from_utf8_lossy(&out.stderr).contains("elsewhere"), "the table is a note");
}
