//! The control socket of a run, as a user meets it: budgets change while it goes on, the answers stay, the socket goes.

use assert_cmd::cargo::cargo_bin;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-q4_k_m.gguf");

fn tierwise(args: &[&str]) -> Command {
    let mut command = Command::new(cargo_bin!("tierwise"));
    // A calibration of this machine must not change what the tests see.
    command.env("XDG_CACHE_HOME", std::env::temp_dir().join("tierwise-cli-tests")).args(args);
    command
}

/// Exit status, and standard output as JSON or else standard error as a text.
fn say(args: &[&str]) -> (bool, Value) {
    let out = tierwise(args).arg("--json").output().expect("started");
    let error = || json!(String::from_utf8_lossy(&out.stderr));
    (out.status.success(), serde_json::from_slice(&out.stdout).unwrap_or_else(|_| error()))
}

/// A conversation, which computes only when it is told a line: nothing here depends on how fast that is.
struct Chat {
    child: Child,
    socket: PathBuf,
}

impl Chat {
    fn start(socket: &Path) -> Self {
        let args = ["run", TINY, "--chat", "--chatml", "-n", "24", "--seed", "1", "--context", "512", "--chunk", "32", "--json"];
        let mut command = tierwise(&args);
        command.arg("--control").arg(socket);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("started");
        Self { child, socket: socket.to_path_buf() }
    }

    /// Until the run listens: a file may be there before, or be one that another run left behind.
    fn wait_for_socket(&self) {
        let begun = Instant::now();
        while UnixStream::connect(&self.socket).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(120), "the run makes no socket");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().expect("piped"), "{line}").expect("the run listens");
    }

    fn control(&self, words: &[&str]) -> (bool, Value) {
        let mut args = vec!["control", self.socket.to_str().expect("UTF-8")];
        args.extend(words);
        say(&args)
    }

    /// Ends the input; the conversation as it was printed.
    fn end(mut self) -> Value {
        drop(self.child.stdin.take());
        let out = self.child.wait_with_output().expect("ended");
        assert!(out.status.success());
        serde_json::from_slice(&out.stdout).expect("one JSON object")
    }
}

const LINES: [&str; 3] = ["Who are you?", "What shall we do?", "Speak again."];

#[test]
fn budgets_change_and_answers_stay() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    // Everything in memory, no control.
    let mut plain =
        tierwise(&["run", TINY, "--chat", "--chatml", "-n", "24", "--seed", "1", "--context", "512", "--chunk", "32", "--json"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("started");
    plain.stdin.take().expect("piped").write_all((LINES.join("\n") + "\n").as_bytes()).expect("told");
    let out = plain.wait_with_output().expect("ended");
    let expected: Value = serde_json::from_slice(&out.stdout).expect("one JSON object");

    let socket = folder.path().join("run.sock");
    // One that a killed run left behind is replaced.
    drop(UnixListener::bind(&socket).expect("bound"));
    let mut chat = Chat::start(&socket);
    chat.wait_for_socket();
    let (ok, status) = chat.control(&["status"]);
    assert!(ok, "{status}");
    assert_eq!((&status["settled"], &status["changes"]), (&json!(true), &json!(0)));
    let all = status["slots"]["held_bytes"].as_u64().expect("bytes");
    assert!(status["resident_bytes"].as_u64() > Some(0));

    let mut budgets = vec![];
    for (line, budget) in LINES.iter().zip([Some("8MiB"), Some("11MiB"), None]) {
        if let Some(budget) = budget {
            let (ok, answer) = chat.control(&["ram", budget]);
            assert!(ok, "{answer}");
            assert_eq!(answer["settled"], false, "nothing was computed yet: {answer}");
        }
        chat.tell(line);
        let (ok, answer) = chat.control(&["wait"]);
        assert!(ok, "{answer}");
        assert_eq!((&answer["settled"], &answer["refused"]), (&json!(true), &Value::Null));
        let slots = &answer["slots"];
        assert_eq!((&slots["held"], &slots["held_bytes"]), (&slots["planned"], &slots["planned_bytes"]));
        budgets.push(slots["held_bytes"].as_u64().expect("bytes"));
    }
    assert!(budgets[0] < budgets[1] && budgets[1] < all && budgets[1] == budgets[2], "{budgets:?} of {all}");
    // Too small, too large, not understood: refused with what works, and the run goes on.
    for (words, expected) in [
        (&["ram", "1MiB"][..], "the smallest budget that works is"),
        (&["ram", "900TiB"], "at most"),
        (&["ram", "much"], "size"),
        (&["rum", "4G"], "expected `ram SIZE`"),
        (&["ram"], "expected `ram SIZE`"),
    ] {
        let (ok, error) = chat.control(words);
        assert!(!ok && error.as_str().is_some_and(|e| e.contains(expected)), "{words:?}: {error}");
    }
    // By hand, as `nc -U` does: a line of JSON for a line of words.
    let mut stream = UnixStream::connect(&socket).expect("it listens");
    stream.write_all(b"status\n\nnonsense\n").expect("told");
    let mut answers = BufReader::new(&stream).lines();
    let mut next = || serde_json::from_str::<Value>(&answers.next().expect("a line").expect("text")).expect("JSON");
    assert_eq!((next()["ok"].clone(), next()["ok"].clone()), (json!(true), json!(false)));
    (&stream).write_all(&[b'x'; 5000]).expect("told");
    let long = next();
    assert!(long["error"].as_str().is_some_and(|e| e.contains("256 bytes")), "{long}");
    // Another run cannot take the socket away.
    let (ok, error) = say(&["run", TINY, "-p", "a", "-n", "1", "--control", socket.to_str().expect("UTF-8")]);
    assert!(!ok && error.as_str().is_some_and(|e| e.contains("another run listens there")), "{error}");

    let got = chat.end();
    assert_eq!(got["messages"], expected["messages"], "the same answers");
    assert!(!socket.exists(), "the socket goes with the run");
    let (ok, error) = say(&["control", socket.to_str().expect("UTF-8"), "status"]);
    assert!(!ok && error.as_str().is_some_and(|e| e.contains("nobody listens there")), "{error}");
}

#[test]
fn interrupted_runs_leave_no_socket() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = folder.path().join("run.sock");
    let mut chat = Chat::start(&socket);
    chat.wait_for_socket();
    let (ok, _) = chat.control(&["status"]);
    assert!(ok);
    let begun = Instant::now();
    // At the prompt the second one ends the program; signals that come too close together are one.
    let status = loop {
        let pid = chat.child.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().expect("kill").success());
        std::thread::sleep(Duration::from_millis(50));
        if let Some(status) = chat.child.try_wait().expect("a child") {
            break status;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "it does not end");
    };
    assert_eq!(status.code(), Some(130));
    assert!(!socket.exists());
}

#[test]
fn runs_and_plans_for_control() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_string();
    let (plan, pinned, socket) = (path("elastic.json"), path("pinned.json"), path("run.sock"));
    let base = ["--context", "128", "--chunk", "32", "--ram", "9MiB"];
    let (ok, made) = say(&[&["plan", TINY, "--elastic", "-o", &plan], &base[..]].concat());
    assert!(ok, "{made}");
    assert_eq!(made["solver"], "elastic");
    // With room for all of them the planner leaves them in the memory map.
    assert!(say(&["plan", TINY, "-o", &pinned, "--context", "128", "--chunk", "32"]).0);

    // The run's result says how long steps took.
    let (ok, run) = say(&["run", TINY, "-p", "ROMEO:", "-n", "12", "--seed", "1", "--plan", &plan, "--control", &socket]);
    assert!(ok, "{run}");
    let (_, plain) = say(&["run", TINY, "-p", "ROMEO:", "-n", "12", "--seed", "1"]);
    assert_eq!(run["tokens"], plain["tokens"]);
    assert_eq!(run["control"]["changes"], json!([]));
    assert_eq!(run["control"]["steps"].as_array().map(Vec::len), Some(11));
    assert!(plain["control"].is_null());
    assert!(!Path::new(&socket).exists());
    // A machine has no more than it has: all experts get a slot, and still none is pinned.
    let (ok, bench) = say(&["bench", TINY, "-p", "0", "-n", "4", "-r", "1", "--context", "128", "--control", &socket]);
    assert!(ok && !Path::new(&socket).exists(), "{bench}");

    let (ok, error) = say(&["run", TINY, "-p", "a", "-n", "1", "--plan", &pinned, "--control", &socket]);
    assert!(!ok && error.as_str().is_some_and(|e| e.contains("tierwise plan --elastic")), "{error}");
    std::fs::write(&socket, "not a socket").expect("written");
    let (ok, error) = say(&["run", TINY, "-p", "a", "-n", "1", "--control", &socket]);
    assert!(!ok && error.as_str().is_some_and(|e| e.contains("no socket")), "{error}");
    assert_eq!(std::fs::read_to_string(&socket).expect("read"), "not a socket");
    let (ok, error) = say(&["plan", "qwen3-30b-a3b", "--machine", "rtx3090-24g-ddr4-64g", "--elastic"]);
    assert!(!ok && error.as_str().is_some_and(|e| e.contains("--vram 0B")), "{error}");
}
