//! `tierwise parallel` under `mpirun` (feature `mpi`): four processes, every policy, equal logits; a rank that dies or hangs ends the job.
#![cfg(feature = "mpi")]

use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../runtime/tests/golden/olmoe");
const BINARY: &str = env!("CARGO_BIN_EXE_tierwise");
const MACHINE: [&str; 2] = ["--machine", "rtx3060-12g-ddr4-32g"];

/// `mpirun`, as root and with more ranks than processors where that is so.
fn mpirun() -> Command {
    let mut command = Command::new("mpirun");
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.args(["--oversubscribe", "--mca", "btl_vader_single_copy_mechanism", "none"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("mpirun (apt install openmpi-bin): {e}"))
}

fn words(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn four_processes_compute_what_one_does_under_every_policy() {
    let args = [
        "--tokens",
        "48",
        "--chunk",
        "16",
        "--decode",
        "4",
        "--kv",
        "f32",
        "--min-tokens",
        "1",
        "--lambda",
        "1.01",
        "--check",
        "--json",
    ];
    let out = output(mpirun().args(["-n", "4", BINARY, "parallel", MODEL]).args(args).args(MACHINE));
    assert!(out.status.success(), "{}", words(&out.stderr));
    let value: Value = serde_json::from_slice(&out.stdout).expect("one JSON object, of rank 0");
    assert!(value["transport"].as_str().is_some_and(|t| t.starts_with("4 processes over Open MPI")), "{}", value["transport"]);
    let policies = value["policies"].as_array().expect("a list");
    assert_eq!(policies.len(), 5);
    for p in policies {
        assert_eq!(p["check"]["equal"], true, "{p}");
        assert_eq!(p["check"]["rows_compared"], 4 * 52, "{p}");
    }
    assert!(policies[3]["weight_bytes"].as_u64() > Some(0), "LLEP moves weights: {}", policies[3]);
}

#[test]
fn ranks_with_other_arguments_are_refused() {
    let rank = |alpha: &'static str| [BINARY, "parallel", MODEL, MACHINE[0], MACHINE[1], "--alpha", alpha, "--gpu", "h100"];
    let out = output(mpirun().args(["-n", "1"]).args(rank("1.0")).args([":", "-n", "1"]).args(rank("1.5")));
    assert!(!out.status.success());
    assert!(words(&out.stderr).contains("give all ranks the same model and arguments"), "{}", words(&out.stderr));
}

#[test]
fn an_error_of_one_rank_is_said_and_ends_all() {
    let out = output(mpirun().args(["-n", "3", BINARY, "parallel", MODEL, "--policy", "llep", "--lambda", "0.1"]).args(MACHINE));
    assert!(!out.status.success());
    let text = words(&out.stderr);
    assert!(text.contains("ends the job: ") && text.contains("a divisor of 8"), "{text}");
}

/// A job that would run for hours, whose ranks have found each other.
struct LongJob {
    mpirun: Child,
    ranks: Vec<u32>,
    /// What comes on standard error until it is closed.
    errors: JoinHandle<String>,
}

impl LongJob {
    fn start(deadline: &str) -> Self {
        let args = ["--tokens", "64", "--decode", "0", "-r", "100000000", "--policy", "ep", "--deadline", deadline];
        let mut mpirun =
            mpirun().args(["-n", "4", BINARY, "parallel", MODEL]).args(args).args(MACHINE).spawn().expect("mpirun starts");
        let mut lines = BufReader::new(mpirun.stderr.take().expect("piped")).lines().map_while(Result::ok);
        // Rank 0 says it when all ranks have left MPI's start, which has no deadline of ours: one stopped in there is waited for for ever.
        let mut text = String::new();
        let begun = lines.by_ref().inspect(|l| text.extend([l.as_str(), "\n"])).any(|l| l.starts_with("4 processes over"));
        assert!(begun, "the ranks do not start: {text}");
        std::thread::sleep(Duration::from_secs(1));
        let ranks = children(mpirun.id());
        assert_eq!(ranks.len(), 4, "{text}");
        Self { mpirun, ranks, errors: std::thread::spawn(move || lines.collect::<Vec<_>>().join("\n")) }
    }

    /// It ends by itself within `limit`, with an error, which this is.
    fn ends_within(mut self, limit: Duration) -> String {
        let start = Instant::now();
        while self.mpirun.try_wait().expect("a child").is_none() {
            if start.elapsed() > limit {
                self.mpirun.kill().expect("a child");
                self.ranks.iter().for_each(|r| signal("-KILL", *r));
                panic!("the job goes on after {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        println!("ended after {:.1} s", start.elapsed().as_secs_f64());
        let out = self.mpirun.wait_with_output().expect("ended");
        assert!(!out.status.success() && out.stdout.is_empty());
        self.errors.join().expect("read to its end")
    }
}

/// Processes whose parent is `pid`.
fn children(pid: u32) -> Vec<u32> {
    let stat = |p: u32| std::fs::read_to_string(format!("/proc/{p}/stat")).ok();
    let parent = |p: u32| stat(p)?.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<u32>().ok();
    let all = std::fs::read_dir("/proc").expect("Linux").filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let is_rank = |p: &u32| {
        parent(*p) == Some(pid) && std::fs::read_link(format!("/proc/{p}/exe")).is_ok_and(|e| e == std::path::Path::new(BINARY))
    };
    all.filter(is_rank).collect()
}

fn signal(name: &str, pid: u32) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status().expect("kill is there");
    assert!(sent.success());
}

#[test]
fn a_rank_that_is_killed_ends_the_job() {
    let job = LongJob::start("600");
    signal("-KILL", job.ranks[2]);
    let text = job.ends_within(Duration::from_secs(60));
    assert!(text.contains("exited on signal 9"), "{text}");
}

#[test]
fn a_rank_that_hangs_ends_the_job_at_the_deadline() {
    // Whichever it is, and wherever it stops: between two messages, or in the middle of one.
    for rank in 1..4 {
        let job = LongJob::start("5");
        signal("-STOP", job.ranks[rank]);
        let text = job.ends_within(Duration::from_secs(90));
        assert!(text.contains(": is silent for 5 s"), "{text}");
    }
}
