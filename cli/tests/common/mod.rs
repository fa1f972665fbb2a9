//! What tests of verbs share: a command that has to fail, with a message and nothing else.

use assert_cmd::Command;

/// What a command says when it fails, as it must: on standard error alone, and without a panic.
pub fn message_of_failure(command: &mut Command) -> String {
    let out = command.assert().failure().get_output().clone();
    assert!(out.stdout.is_empty());
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!message.contains("panicked"), "{message}");
    message
}
