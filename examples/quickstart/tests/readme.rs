//! The program in the README is the quick start, word for word, and it runs twice on one file.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

use std::process::Command;

#[test]
fn the_program_in_the_readme_is_the_quick_start() {
    let (_, program) = include_str!("../../../README.md").split_once("```rust\n").unwrap();
    let (program, _) = program.split_once("```").unwrap();
    assert_eq!(program, include_str!("../src/main.rs"));
}

#[test]
fn it_runs_twice_on_one_file() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let mut program = Command::new(env!("CARGO_BIN_EXE_quickstart"));
        let output = program.current_dir(folder.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("after 2 events"), "{text}");
    }
}
