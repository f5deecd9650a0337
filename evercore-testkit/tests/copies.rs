//! The licences, the guide's pages and the migrations are at the top of the repository. The crates whose packages need
//! them have copies, because a package contains only files of its own folder, and symbolic links break on Windows. This
//! test compares them.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The names of the entries of a folder.
fn names(folder: &Path) -> BTreeSet<OsString> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().file_name()).collect()
}

fn crates() -> Vec<PathBuf> {
    let is_crate = |name: &OsString| name.to_string_lossy().starts_with("evercore-");
    let crates: Vec<_> = names(&top()).into_iter().filter(is_crate).map(|name| top().join(name)).collect();
    assert!(crates.len() >= 5, "{crates:?}");
    crates
}

fn assert_copy(original: &Path, copy: &Path) {
    let is_file = fs::symlink_metadata(copy).is_ok_and(|file| file.is_file());
    assert!(
        is_file && fs::read(original).unwrap() == fs::read(copy).unwrap(),
        "{} must be a copy of {}: change the original, then run `just copies`",
        copy.display(),
        original.display()
    );
}

#[test]
fn every_crate_has_the_licences() {
    for of in crates() {
        for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
            assert_copy(&top().join(licence), &of.join(licence));
        }
    }
}

#[test]
fn the_pages_in_the_crates_are_those_of_the_guide() {
    let mut pages = 0;
    for docs in crates().iter().map(|of| of.join("docs")).filter(|docs| docs.is_dir()) {
        for page in names(&docs) {
            assert_copy(&top().join("docs").join(&page), &docs.join(&page));
            pages += 1;
        }
    }
    assert!(pages >= 6, "only {pages} pages were found");
}

#[test]
fn the_engines_embed_the_migrations_of_the_top_folder() {
    for database in names(&top().join("migrations")) {
        let originals = top().join("migrations").join(&database);
        let copies = top().join(format!("evercore-{}", database.display())).join("migrations");
        assert_eq!(names(&originals), names(&copies), "{database:?}: run `just copies`");
        for migration in names(&originals) {
            assert_copy(&originals.join(&migration), &copies.join(&migration));
        }
    }
}
