//! A copy of a store while it is in use.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use evercore_core::Error;
use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};

use crate::commit::Head;
use crate::error::{Result, SqliteError, damaged};

/// Copies the store into a new file, which is there complete or not at all.
pub(crate) fn back_up(source: &Connection, target: &Path) -> Result<()> {
    if fs::symlink_metadata(target).is_ok() {
        return Err(exists());
    }
    let copy = Copy(beside(target));
    write(source, &copy.0)?;
    // SQLite has closed it; now it can be opened as a plain file.
    File::open(&copy.0)?.sync_all()?;
    arrive(&copy.0, target)?;
    sync_folder(target)
}

/// Gives the copy its name, unless a file with that name has come meanwhile: a link, unlike a rename, replaces nothing.
fn arrive(copy: &Path, target: &Path) -> Result<()> {
    match fs::hard_link(copy, target) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(exists()),
        Err(_) => rename(copy, target),
    }
}

/// For a file system without links. It replaces nothing but what comes between the look and the deed.
fn rename(copy: &Path, target: &Path) -> Result<()> {
    if fs::symlink_metadata(target).is_ok() {
        return Err(exists());
    }
    Ok(fs::rename(copy, target)?)
}

fn exists() -> SqliteError {
    Error::invalid("the target of the backup exists already").into()
}

/// A file that is on its way, and goes when it does not arrive.
struct Copy(PathBuf);

impl Drop for Copy {
    fn drop(&mut self) {
        for suffix in ["", "-wal", "-shm", "-journal"] {
            let mut name = self.0.as_os_str().to_owned();
            name.push(suffix);
            let _ = fs::remove_file(name);
        }
    }
}

fn beside(target: &Path) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut name = target.as_os_str().to_owned();
    name.push(format!(".{}-{count}.part", std::process::id()));
    name.into()
}

/// All pages in one step: the copy is of one moment, and commits go on beside it. In several steps it would begin
/// again with every commit.
fn write(source: &Connection, path: &Path) -> Result<()> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut copy = Connection::open_with_flags(path, flags)?;
    let moment = Transaction::new_unchecked(source, TransactionBehavior::Deferred)?;
    let head = Head::read(&moment)?;
    let outcome = Backup::new(&moment, &mut copy)?.step(-1)?;
    drop(moment);
    if outcome != StepResult::Done {
        return Err(Error::new(evercore_core::ErrorKind::Unavailable, "the store is locked").into());
    }
    verify(&copy, head)?;
    copy.close().map_err(|(_, error)| error.into())
}

fn verify(copy: &Connection, head: Head) -> Result<()> {
    let verdict: String = copy.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if verdict != "ok" {
        return Err(damaged("the copy does not pass SQLite's integrity check"));
    }
    if Head::read(copy)?.position != head.position {
        return Err(damaged("the copy ends elsewhere than the store"));
    }
    Ok(())
}

/// So that the new name lasts too; a system that cannot flush a folder does so by itself.
fn sync_folder(target: &Path) -> Result<()> {
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use evercore_core::ErrorKind;

    use super::*;

    #[test]
    fn neither_way_to_the_name_replaces_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let (copy, target) = (folder.path().join("copy"), folder.path().join("target"));
        for way in [arrive, rename] {
            fs::write(&copy, "copy").unwrap();
            fs::write(&target, "older").unwrap();
            assert_eq!(Error::from(way(&copy, &target).unwrap_err()).kind(), &ErrorKind::Invalid);
            assert_eq!(fs::read_to_string(&target).unwrap(), "older");
            fs::remove_file(&target).unwrap();
            way(&copy, &target).unwrap();
            assert_eq!(fs::read_to_string(&target).unwrap(), "copy");
            fs::remove_file(&target).unwrap();
            let _ = fs::remove_file(&copy); // a link leaves it there
        }
    }
}
