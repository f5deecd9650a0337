//! Paths of database files, resolved before SQLite sees them.

use std::path::{Path, PathBuf};

use evercore_core::{Error, ErrorKind, Result};

/// The file that is meant: absolute, since the engine outlives a change of the working directory, and behind all links,
/// since SQLite puts its files beside that one.
pub(crate) fn checked(path: &Path) -> Result<PathBuf> {
    let text = path.as_os_str().as_encoded_bytes();
    // SQLite gives some names a meaning of their own, in which several connections would not be one store.
    if text.is_empty() || text == b":memory:" || text.starts_with(b"file:") {
        return Err(Error::invalid(format!("\"{}\" is no path of a file", path.display())));
    }
    let resolved = std::path::absolute(path).and_then(|path| resolved(path, 0));
    resolved.map_err(|error| {
        let message = format!("\"{}\" cannot be resolved", path.display());
        Error::new(ErrorKind::Backend, message).with_source(error)
    })
}

/// A file that is to be made. What is there by this name is not looked behind, so that a link is found to be there.
pub(crate) fn checked_new(path: &Path) -> Result<PathBuf> {
    checked(path)?;
    std::path::absolute(path).map_err(|error| {
        let message = format!("\"{}\" cannot be resolved", path.display());
        Error::new(ErrorKind::Backend, message).with_source(error)
    })
}

/// Also of a file that is not there yet, and of a link to one.
fn resolved(path: PathBuf, links: u32) -> std::io::Result<PathBuf> {
    const MOST_LINKS: u32 = 40;
    match std::fs::canonicalize(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        found => return found,
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    match std::fs::read_link(&path) {
        Ok(target) if links < MOST_LINKS => resolved(folder.join(target), links + 1),
        // No link: there is nothing by this name.
        _ => match (std::fs::canonicalize(folder), path.file_name()) {
            (Ok(folder), Some(name)) => Ok(folder.join(name)),
            _ => Ok(path),
        },
    }
}
