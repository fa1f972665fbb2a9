//! `--throttle`: said, in the JSON, priced, and refused by name where it makes no sense.

#[path = "common/machine.rs"]
mod machine;

use assert_cmd::Command;
use serde_json::Value;
use std::time::Instant;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-q4_k_m.gguf");

fn tierwise(args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"));
    // A calibration of this machine must not change what the test sees.
    command.env("XDG_CACHE_HOME", std::env::temp_dir().join("tierwise-throttle-tests")).args(args);
    command
}

#[test]
fn a_throttled_disk_is_said_priced_and_kept_to() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let machine = machine::with_disk(folder.path(), "64 GiB", "20 GB/s", "64 GiB");
    let common = ["--device", "cpu", "--machine", &machine, "--ram", "9MiB", "--context", "128", "--chunk", "16", "--json"];
    let bench = |throttle: &[&str]| {
        let tests = ["bench", TINY, "-p", "0", "-n", "16", "-r", "2"];
        let start = Instant::now();
        let out = tierwise(&[&tests[..], &common[..], throttle].concat()).assert().success().get_output().clone();
        let seconds = start.elapsed().as_secs_f64();
        let value: Value = serde_json::from_slice(&out.stdout).expect("standard output is one JSON object");
        (value, String::from_utf8_lossy(&out.stderr).to_string(), seconds)
    };
    let (fast, said, _) = bench(&[]);
    assert_eq!(fast["throttled"].as_array().map(Vec::len), Some(0), "{fast}");
    assert!(!said.contains("throttled"), "{said}");
    let (slow, said, seconds) = bench(&["--throttle", "disk0=20MB/s"]);
    assert!(said.contains("throttled: disk0 gives experts at 20 MB/s"), "{said}");
    let throttled = &slow["throttled"][0];
    assert_eq!((throttled["memory"].as_str(), throttled["bytes_per_s"].as_f64()), (Some("disk0"), Some(20e6)), "{slow}");
    let paid = throttled["paid_bytes"].as_f64().expect("a number");
    assert!(paid > 0.0 && paid <= 20e6 * seconds, "{paid} bytes in {seconds} s");
    let predicted = |v: &Value| v["results"][0]["predicted_tokens_per_s"]["value"].as_f64().expect("a prediction");
    assert!(predicted(&slow) < predicted(&fast), "{} {}", predicted(&slow), predicted(&fast));

    let run = ["run", TINY, "-p", "hello", "-n", "3", "--throttle", "disk0=50MB/s"];
    let out = tierwise(&[&run[..], &common[..]].concat()).assert().success().get_output().stdout.clone();
    let value: Value = serde_json::from_slice(&out).expect("one JSON object");
    assert_eq!(value["throttled"][0]["memory"], "disk0", "{value}");
}

#[test]
fn what_cannot_be_throttled_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let machine = machine::with_disk(folder.path(), "64 GiB", "20 GB/s", "64 GiB");
    let refused = |throttle: &str, ram: &str| {
        let common = ["--device", "cpu", "--machine", &machine, "--context", "128", "--chunk", "16"];
        let run = ["run", TINY, "-p", "a", "-n", "1", "--ram", ram, "--throttle", throttle];
        let args = [&run[..], &common[..]].concat();
        let out = tierwise(&args).assert().failure().get_output().stderr.clone();
        String::from_utf8_lossy(&out).to_string()
    };
    let no_memory = refused("tape0=1GB/s", "9MiB");
    assert!(no_memory.contains("tape0") && no_memory.contains("dram0, disk0"), "{no_memory}");
    assert!(refused("dram0=1GB/s", "9MiB").contains("what is no expert"));
    // All experts fit, so nothing is ever read from the disk.
    assert!(refused("disk0=1GB/s", "8GiB").contains("all in one"));
    for (text, word) in [("disk0", "cxl0=5GB/s"), ("disk0=5", "rate"), ("disk0=0GB/s", "at least 1")] {
        let message = refused(text, "9MiB");
        assert!(message.contains(word), "{text}: {message}");
    }
}
