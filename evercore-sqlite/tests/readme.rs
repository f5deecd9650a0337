//! The README's programs are the examples, word for word, and the examples run.

#![allow(clippy::unwrap_used)]

use std::path::Path;

#[allow(dead_code)]
#[path = "../examples/cookbook.rs"]
mod cookbook;
#[allow(dead_code)]
#[path = "../examples/quickstart.rs"]
mod quickstart;

/// The README, or `None` in a packed crate, which has not got it.
fn readme() -> Option<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = std::fs::read_to_string(path).ok();
    if text.is_none() {
        eprintln!("skipped: there is no README beside this crate");
    }
    text
}

/// What stands between "```rust" and "```".
fn programs(readme: &str) -> Vec<&str> {
    let blocks = readme.split("```rust\n").skip(1);
    blocks.map(|block| block.split_once("```").expect("a block has an end").0).collect()
}

/// Without indentation, which differs when a recipe stands in a function.
fn lines(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_first_program_of_the_readme_is_the_quick_start() {
    let Some(readme) = readme() else { return };
    // The test calls `run`, the reader need not see that.
    let example = include_str!("../examples/quickstart.rs").replace("pub(crate) ", "");
    assert_eq!(programs(&readme)[0], example);
}

#[test]
fn every_other_program_of_the_readme_stands_in_the_cookbook() {
    let Some(readme) = readme() else { return };
    let cookbook = lines(include_str!("../examples/cookbook.rs"));
    let recipes = programs(&readme).split_off(1);
    assert!(!recipes.is_empty());
    for recipe in recipes {
        assert!(cookbook.contains(&lines(recipe)), "not in examples/cookbook.rs:\n{recipe}");
    }
}

#[test]
fn the_quick_start_runs_twice_on_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("users.db");
    let file = file.to_str().unwrap();
    smol::block_on(quickstart::run(file)).unwrap();
    smol::block_on(quickstart::run(file)).unwrap();
}

#[test]
fn the_cookbook_runs() {
    smol::block_on(cookbook::run()).unwrap();
}
