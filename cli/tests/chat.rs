//! `run --chat` as a conversation over a pipe, on the bundled model (which has no template of its own).

use assert_cmd::Command;
use serde_json::Value;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-q4_k_m.gguf");

fn talk(args: &[&str], input: &str) -> assert_cmd::assert::Assert {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"));
    command.env("XDG_CACHE_HOME", std::env::temp_dir().join("tierwise-cli-tests"));
    command.args(["run", TINY, "--chat", "--quiet", "--temp", "0", "--seed", "1"]).args(args).write_stdin(input).assert()
}

fn json(args: &[&str], input: &str) -> Value {
    let out = talk(args, input).success().get_output().stdout.clone();
    let args: Vec<_> = args.iter().filter(|a| **a != "--json").collect();
    serde_json::from_slice(&out).unwrap_or_else(|e| panic!("{args:?}: {e}: {}", String::from_utf8_lossy(&out)))
}

#[test]
fn without_a_template_the_error_says_what_to_give() {
    let out = talk(&[], "hi\n").code(1).get_output().clone();
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(message.contains("--chat-template") && message.contains("--chatml"), "{message}");
    assert!(out.stdout.is_empty());
}

#[test]
fn a_template_from_a_file_is_used_and_a_missing_one_is_named() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("plain.jinja");
    std::fs::write(&file, "{% for m in messages %}{{ m.content }}\n{% endfor %}").expect("writable");
    let file = file.display().to_string();
    let found = json(&["--chat-template", &file, "-n", "3", "--json"], "ROMEO:\n");
    let plain = {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"));
        command.args(["run", TINY, "-p", "ROMEO:\n", "-n", "3", "--temp", "0", "--quiet", "--json"]);
        serde_json::from_slice::<Value>(&command.assert().success().get_output().stdout).expect("JSON")
    };
    // The model adds no token at the beginning, so that the template's text is the whole prompt in both.
    assert_eq!(found["turns"][0]["tokens"], plain["tokens"]);
    let missing = talk(&["--chat-template", "none.jinja"], "").code(1).get_output().stderr.clone();
    assert!(String::from_utf8_lossy(&missing).contains("none.jinja"));
}

#[test]
fn turns_reuse_the_cache_and_give_what_a_fresh_session_gives() {
    let found = json(&["--chatml", "-n", "4", "--json", "--system", "Be brief."], "one\n\ntwo\nthree\n");
    let turns = found["turns"].as_array().expect("turns");
    assert_eq!(turns.len(), 3, "empty lines are no turns");
    assert_eq!(turns[0]["reused_tokens"], 0);
    for pair in turns.windows(2) {
        let (before, reused) = (pair[0]["prompt_tokens"].as_u64(), pair[1]["reused_tokens"].as_u64());
        assert!(reused >= before, "the whole earlier prompt stays in the cache: {reused:?}, {before:?}");
    }
    let roles: Vec<_> = found["messages"].as_array().expect("messages").iter().map(|m| m["role"].clone()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant", "user", "assistant"]);

    // After /reset nothing of the conversation is left: the same answer as of the first turn.
    let reset = json(&["--chatml", "-n", "4", "--json", "--system", "Be brief."], "one\n/reset\none\n");
    assert_eq!(reset["turns"][0]["tokens"], reset["turns"][1]["tokens"]);
    assert_eq!(reset["turns"][0]["prompt_tokens"], reset["turns"][1]["prompt_tokens"]);
    assert_eq!(reset["messages"].as_array().map(Vec::len), Some(3));
}

#[test]
fn commands_save_and_exit() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("saved.json").display().to_string();
    let input = format!("/system Be kind.\nhi\n/save {file}\n/exit\nnever said\n");
    let found = json(&["--chatml", "-n", "2", "--json"], &input);
    assert_eq!(found["turns"].as_array().map(Vec::len), Some(1));
    let saved: Value = serde_json::from_str(&std::fs::read_to_string(&file).expect("saved")).expect("JSON");
    assert_eq!(saved, found["messages"]);
    assert_eq!(saved[0]["content"], "Be kind.");
    assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 1, "no temporary file is left");
}

#[test]
fn a_full_context_says_what_to_do() {
    let long = "word ".repeat(400);
    let out = talk(&["--chatml", "--context", "128"], &format!("{long}\n")).code(1).get_output().stderr.clone();
    let message = String::from_utf8_lossy(&out);
    assert!(message.contains("/reset") && message.contains("--context"), "{message}");
}

/// The first Ctrl-C ends the answer; the program goes on and takes the next line.
#[cfg(unix)]
#[test]
fn an_interrupt_stops_the_answer_and_not_the_program() {
    // Only the interrupt ends the first answer, unless it comes after as many tokens as the model's context has: on a busy machine it may.
    let stopped = (0..10).any(|_| {
        let notes = interrupted();
        assert!(notes.contains("/reset"), "{notes}");
        notes.contains("(stopped)")
    });
    assert!(stopped, "ten answers were over before the interrupt came");
}

/// What is noted while an answer is interrupted, then asked for help.
#[cfg(unix)]
fn interrupted() -> String {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};
    let mut child = Command::new(assert_cmd::cargo::cargo_bin!("tierwise"))
        .env("XDG_CACHE_HOME", std::env::temp_dir().join("tierwise-cli-tests"))
        .args(["run", TINY, "--chat", "--chatml", "--ignore-eos", "-n", "1000000", "--context", "1024", "--temp", "0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut stdin = child.stdin.take().expect("piped");
    let mut stdout = child.stdout.take().expect("piped");
    stdin.write_all(b"one\n").expect("written");
    // Text comes, so the answer is under way.
    let mut first = [0; 1];
    stdout.read_exact(&mut first).expect("the answer begins");
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(sent.success());
    stdin.write_all(b"/help\n/exit\n").expect("the program still reads");
    drop(stdin);
    let drain = std::thread::spawn(move || {
        let mut rest = Vec::new();
        stdout.read_to_end(&mut rest).map(|_| rest)
    });
    let out = child.wait_with_output().expect("it ends");
    drain.join().expect("joined").expect("read");
    let notes = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{:?}: {notes}", out.status);
    notes
}
