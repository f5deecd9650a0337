//! Backup of a store that is in use, and restore.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use evercore_core::{Error, ErrorKind};
use rusqlite::backup::{Backup, StepResult};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};

use crate::connection::open::{self, Role};
use crate::connection::{path, wal};
use crate::error::{self, Result, SqliteError, damaged};
use crate::log_end::LogEnd;
use crate::migrate::{self, Identity, not_a_store};
use crate::settings::Settings;

/// Copies the store into a new file. The file appears only when it is complete, and has the permissions of the store.
pub(crate) fn back_up(source: &Connection, of: Option<&Path>, target: &Path) -> Result<()> {
    copy_to(source, of, target).map_err(|error| during("the backup to", target, error))
}

fn copy_to(source: &Connection, of: Option<&Path>, target: &Path) -> Result<()> {
    check_folder(target)?;
    if fs::symlink_metadata(target).is_ok() {
        return Err(exists());
    }
    let copy = PartFile::write(source, target, of)?;
    publish(&copy.0, target)?;
    sync_folder(target)
}

/// Replaces a store that nobody has open by a backup. Returns the new path of the old store.
pub(crate) fn restore(backup: &Path, path: &Path) -> Result<Option<PathBuf>> {
    replace(backup, path).map_err(|error| during("the restore to", path, error))
}

fn replace(backup: &Path, path: &Path) -> Result<Option<PathBuf>> {
    check_folder(path)?;
    if is_one_file(backup, path) {
        return Err(Error::invalid("the backup is the same file as the store to replace").into());
    }
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return Err(not_a_store("the path is a folder or a device, not a file"));
    }
    let settings = Settings { read_only: true, ..Settings::default() };
    // A backup without a log needs no other file beside it, so its folder may be read-only.
    let settings = Settings { immutable: wal::bytes(backup) == 0, ..settings };
    let identified = match fs::metadata(backup) {
        Ok(file) if file.is_file() => migrate::identify(backup, &settings),
        _ => Err(not_a_store("there is no such file")),
    };
    if identified.map_err(|error| error.at(backup))? == Identity::Empty {
        return Err(not_a_store("the database is empty").at(backup));
    }
    let role = if settings.immutable { Role::Immutable } else { Role::Reader };
    let source = open::configured(backup, role, false, &settings).map_err(|error| error.at(backup))?;
    let _folder = migrate::lock_folder(path, Instant::now() + settings.open_timeout);
    let like = if path.exists() { path } else { backup };
    let copy = PartFile::write(&source, path, Some(like))?;
    let replaced = set_aside(path)?;
    fs::rename(&copy.0, path)?;
    sync_folder(path)?;
    Ok(replaced)
}

/// How long a restore waits for a reader.
const PATIENCE: Duration = Duration::from_millis(250);

/// Renames the old file with all files beside it. A store is first made one file, which fails while somebody has it
/// open.
fn set_aside(path: &Path) -> Result<Option<PathBuf>> {
    let old = free_name(path);
    let length = fs::symlink_metadata(path).ok().map(|file| file.len());
    let was_there = length.is_some();
    let is_readable = match length {
        None => true,
        // SQLite treats a short file as empty, and would delete the log beside it.
        Some(..migrate::HEADER_BYTES) => false,
        Some(_) => match migrate::identify(path, &Settings::default()).map_err(Error::from) {
            Ok(_) => {
                make_one_file(path)?;
                true
            }
            Err(error) if *error.kind() == ErrorKind::NotAStore => false,
            Err(error) => return Err(error.into()),
        },
    };
    // A file that is not a store is kept unchanged.
    if !is_readable {
        check_unused(path)?;
    }
    // The log is renamed first: a crash in between leaves no log beside a file that it does not belong to.
    for suffix in ["-wal", "-journal"] {
        if let Err(error) = fs::rename(path::with_suffix(path, suffix), path::with_suffix(&old, suffix))
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error.into());
        }
    }
    let _ = fs::remove_file(path::with_suffix(path, "-shm")); // SQLite creates it again
    if was_there && fs::hard_link(path, &old).is_err() {
        fs::rename(path, &old)?;
    }
    Ok(was_there.then_some(old))
}

/// Leaves WAL mode, which SQLite allows only to a connection that is alone.
fn make_one_file(path: &Path) -> Result<()> {
    let connection = open::open(path, Role::Writer, false, PATIENCE)?;
    let mode = connection.pragma_update_and_check(None, "journal_mode", "delete", |row| row.get(0));
    match mode {
        Ok::<String, _>(mode) if mode == "delete" => Ok(()),
        Err(error) if !error::is_busy(&error) => Err(error.into()),
        _ => Err(in_use()),
    }
}

/// Refuses a file that another connection has locked, and changes nothing. It opens the file by a second name, so that
/// SQLite does not touch the files beside the first. An idle connection in rollback mode holds no lock and is not
/// found.
fn check_unused(path: &Path) -> Result<()> {
    let second = PartFile(part_path(path));
    if fs::hard_link(path, &second.0).is_err() {
        return Ok(()); // the file system has no links
    }
    // With a log and in this mode SQLite takes the exclusive lock before it reads, so the file may be damaged.
    fs::write(wal::path_of(&second.0), [0])?;
    let connection = open::open(&second.0, Role::Writer, false, PATIENCE)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.pragma_update_and_check(None, "locking_mode", "exclusive", |_| Ok(()))?;
    match connection.execute_batch("BEGIN EXCLUSIVE") {
        Err(error) if error::is_busy(&error) => Err(in_use()),
        _ => Ok(()),
    }
}

fn in_use() -> SqliteError {
    let message = "another application or process uses the file, close it there first";
    Error::new(ErrorKind::Unavailable, message).into()
}

fn free_name(path: &Path) -> PathBuf {
    let name = |n| path::with_suffix(path, &format!(".replaced-{n}"));
    let is_taken = |n: &u32| {
        ["", "-wal", "-journal"]
            .iter()
            .any(|suffix| fs::symlink_metadata(path::with_suffix(&name(*n), suffix)).is_ok())
    };
    name((1..u32::MAX).find(|n| !is_taken(n)).unwrap_or(u32::MAX))
}

/// Gives the copy its name. It uses a link, because unlike a rename a link replaces no file that appeared meanwhile.
fn publish(copy: &Path, target: &Path) -> Result<()> {
    match fs::hard_link(copy, target) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(exists()),
        Err(_) => rename_new(copy, target),
    }
}

/// For a file system without links. A file that appears between the check and the rename is replaced.
fn rename_new(copy: &Path, target: &Path) -> Result<()> {
    if fs::symlink_metadata(target).is_ok() {
        return Err(exists());
    }
    Ok(fs::rename(copy, target)?)
}

fn exists() -> SqliteError {
    Error::invalid("a file with this name exists already, choose another name").into()
}

fn check_folder(path: &Path) -> Result<()> {
    if path.parent().is_some_and(Path::is_dir) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Backend, "the folder does not exist, create it first").into())
}

/// Links to one file count as one file.
fn is_one_file(one: &Path, other: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |path| fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
        if id(one).is_some_and(|found| Some(found) == id(other)) {
            return true;
        }
    }
    one == other
}

/// Adds the operation and the path to the error.
fn during(operation: &str, path: &Path, error: SqliteError) -> SqliteError {
    let error = Error::from(error);
    let message = format!("{operation} \"{}\" failed: {error}", path.display());
    Error::new(error.kind().clone(), message).with_source(error).into()
}

/// A file that is not complete yet. It is removed when this is dropped.
struct PartFile(PathBuf);

impl PartFile {
    /// Writes and flushes a copy beside the target, with the permissions of the file `like`.
    fn write(source: &Connection, target: &Path, like: Option<&Path>) -> Result<Self> {
        let copy = Self(part_path(target));
        new_file(&copy.0, like.is_some())?;
        write(source, &copy.0)?;
        if let Some(like) = like {
            fs::set_permissions(&copy.0, fs::metadata(like)?.permissions())?;
        }
        // SQLite has closed the file, so it can be opened here.
        File::open(&copy.0)?.sync_all()?;
        Ok(copy)
    }
}

/// Creates an empty file. If it is private, only its owner may read it until it gets its permissions.
fn new_file(path: &Path, is_private: bool) -> Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    if is_private {
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    }
    options.open(path)?;
    Ok(())
}

impl Drop for PartFile {
    fn drop(&mut self) {
        for suffix in ["", "-wal", "-shm", "-journal"] {
            let _ = fs::remove_file(path::with_suffix(&self.0, suffix));
        }
    }
}

fn part_path(target: &Path) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    path::with_suffix(target, &format!(".{}-{count}.part", std::process::id()))
}

/// Copies all pages in one step, so that the copy is consistent while commits continue. With several steps, each commit
/// would start the copy again. The copy is marked as a backup, and is one file without a log.
fn write(source: &Connection, path: &Path) -> Result<()> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut copy = Connection::open_with_flags(path, flags)?;
    let moment = Transaction::new_unchecked(source, TransactionBehavior::Deferred)?;
    let head = LogEnd::read(&moment)?;
    let outcome = Backup::new(&moment, &mut copy)?.step(-1)?;
    drop(moment);
    if outcome != StepResult::Done {
        return Err(
            Error::new(ErrorKind::Unavailable, "another connection has locked the store, try again").into()
        );
    }
    copy.pragma_update_and_check(None, "journal_mode", "delete", |_| Ok(()))?;
    copy.execute_batch("UPDATE store SET is_backup = 1")?;
    verify(&copy, head)?;
    copy.close().map_err(|(_, error)| error.into())
}

fn verify(copy: &Connection, head: LogEnd) -> Result<()> {
    let verdict: String = copy.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if verdict != "ok" {
        return Err(damaged("the copy fails SQLite's integrity check"));
    }
    if LogEnd::read(copy)?.position != head.position {
        return Err(damaged("the copy has another last event than the store"));
    }
    Ok(())
}

/// Flushes the folder, so that the new name survives a crash. Only Unix needs this.
fn sync_folder(target: &Path) -> Result<()> {
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_way_to_the_name_replaces_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let (copy, target) = (folder.path().join("copy"), folder.path().join("target"));
        for way in [publish, rename_new] {
            fs::write(&copy, "copy").unwrap();
            fs::write(&target, "older").unwrap();
            assert_eq!(Error::from(way(&copy, &target).unwrap_err()).kind(), &ErrorKind::Invalid);
            assert_eq!(fs::read_to_string(&target).unwrap(), "older");
            fs::remove_file(&target).unwrap();
            way(&copy, &target).unwrap();
            assert_eq!(fs::read_to_string(&target).unwrap(), "copy");
            fs::remove_file(&target).unwrap();
            let _ = fs::remove_file(&copy); // still there after a link
        }
    }
}
