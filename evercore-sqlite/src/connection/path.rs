//! Paths of database files, resolved before SQLite sees them.

use std::path::{Path, PathBuf};

use evercore_core::{Error, ErrorKind, Result};

/// The absolute path, because the working directory may change while the engine is open. Links are followed, because
/// SQLite puts its other files beside the target.
pub(crate) fn checked(path: &Path) -> Result<PathBuf> {
    let text = path.as_os_str().as_encoded_bytes();
    // SQLite gives these names a special meaning: each connection would open another database.
    if text.is_empty() || text == b":memory:" || text.starts_with(b"file:") {
        return Err(Error::invalid(format!("\"{}\" is not the path of a file", path.display())));
    }
    let resolved = std::path::absolute(path).and_then(|path| resolved(path, 0));
    resolved.map_err(|error| unresolved(path, error))
}

/// The absolute path of a file that does not exist yet. Links are not followed: a link with this name counts as a file.
pub(crate) fn checked_new(path: &Path) -> Result<PathBuf> {
    checked(path)?;
    std::path::absolute(path).map_err(|error| unresolved(path, error))
}

fn unresolved(path: &Path, error: std::io::Error) -> Error {
    let message = format!("the path \"{}\" cannot be resolved", path.display());
    Error::new(ErrorKind::Backend, message).with_source(error)
}

/// Also resolves a file that does not exist yet, and a link to one.
fn resolved(path: PathBuf, links: u32) -> std::io::Result<PathBuf> {
    const MOST_LINKS: u32 = 40;
    match std::fs::canonicalize(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        found => return found,
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    match std::fs::read_link(&path) {
        Ok(target) if links < MOST_LINKS => resolved(folder.join(target), links + 1),
        // Neither a file nor a link has this name.
        _ => match (std::fs::canonicalize(folder), path.file_name()) {
            (Ok(folder), Some(name)) => Ok(folder.join(name)),
            _ => Ok(path),
        },
    }
}

/// The path with something added to the file's name.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
