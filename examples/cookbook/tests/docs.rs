//! Every program in the pages of the documentation is part of the cookbook, word for word, and the cookbook runs.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// The Markdown files in the folder `docs`.
fn pages() -> impl Iterator<Item = PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    files.filter(|file| file.extension().is_some_and(|extension| extension == "md"))
}

/// The text between "```rust" and "```", for each program.
fn programs(page: &str) -> Vec<&str> {
    let blocks = page.split("```rust\n").skip(1);
    blocks.map(|block| block.split_once("```").expect("a block has an end").0).collect()
}

/// Without indentation, which is deeper inside a function of the cookbook.
fn lines(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_program_in_the_pages_is_in_the_cookbook() {
    let cookbook = lines(include_str!("../src/main.rs"));
    let mut found = 0;
    for page in pages() {
        let text = std::fs::read_to_string(&page).unwrap();
        for program in programs(&text) {
            assert!(
                cookbook.contains(&lines(program)),
                "{}: not in the cookbook:\n{program}",
                page.display()
            );
            found += 1;
        }
    }
    assert!(found >= 20, "only {found} programs were found");
}

#[test]
fn the_cookbook_runs() {
    let output = Command::new(env!("CARGO_BIN_EXE_cookbook")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
