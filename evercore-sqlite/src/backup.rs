//! A copy of a store while it is in use.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use evercore_core::{Error, ErrorKind};
use rusqlite::backup::{Backup, StepResult};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};

use crate::connection::open::{self, Role};
use crate::connection::wal;
use crate::error::{self, Result, SqliteError, damaged};
use crate::log_end::LogEnd;
use crate::migrate::{self, Identity, not_a_store};
use crate::settings::Settings;

/// Copies the store into a new file, which is there complete or not at all, and is as private as the store.
pub(crate) fn back_up(source: &Connection, of: Option<&Path>, target: &Path) -> Result<()> {
    copy_to(source, of, target).map_err(|error| during("the backup to", target, error))
}

fn copy_to(source: &Connection, of: Option<&Path>, target: &Path) -> Result<()> {
    check_folder(target)?;
    if fs::symlink_metadata(target).is_ok() {
        return Err(exists());
    }
    let copy = Copy::write(source, target, of)?;
    arrive(&copy.0, target)?;
    sync_folder(target)
}

/// Puts a backup in the place of a store that nobody has open; gives the place where the old one is now.
pub(crate) fn restore(backup: &Path, path: &Path) -> Result<Option<PathBuf>> {
    replace(backup, path).map_err(|error| during("the restore to", path, error))
}

fn replace(backup: &Path, path: &Path) -> Result<Option<PathBuf>> {
    check_folder(path)?;
    if is_one_file(backup, path) {
        return Err(Error::invalid(
            "the backup is the file that it is to replace, so there is nothing to do",
        )
        .into());
    }
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return Err(not_a_store("there is a folder or a device, and no file"));
    }
    let settings = Settings { read_only: true, ..Settings::default() };
    // Without a log it needs no file beside it: it may lie where nothing can be written.
    let settings = Settings { immutable: wal::bytes(backup) == 0, ..settings };
    let identified = match fs::metadata(backup) {
        Ok(file) if file.is_file() => migrate::identify(backup, &settings),
        _ => Err(not_a_store("there is no such file")),
    };
    if identified.map_err(|error| error.at(backup))? == Identity::Empty {
        return Err(not_a_store("the database is empty").at(backup));
    }
    let role = if settings.immutable { Role::Archive } else { Role::Reader };
    let source = open::ready(backup, role, false, &settings).map_err(|error| error.at(backup))?;
    let _folder = migrate::lock_folder(path, Instant::now() + settings.open_timeout);
    let like = if path.exists() { path } else { backup };
    let copy = Copy::write(&source, path, Some(like))?;
    let replaced = set_aside(path)?;
    fs::rename(&copy.0, path)?;
    sync_folder(path)?;
    Ok(replaced)
}

/// How long a reader of the moment may be in the way of a restore.
const PATIENCE: Duration = Duration::from_millis(250);

/// Gives what lies there another name, with all files beside it. A store is made one file before; while somebody has it
/// open that cannot be done.
fn set_aside(path: &Path) -> Result<Option<PathBuf>> {
    let old = free_name(path);
    let length = fs::symlink_metadata(path).ok().map(|file| file.len());
    let was_there = length.is_some();
    let is_readable = match length {
        None => true,
        // SQLite takes a short file for an empty one, and would delete the log beside it.
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
    // It is kept as it is.
    if !is_readable {
        check_unused(path)?;
    }
    // The log first: a crash between the two leaves no log beside a file that it does not belong to.
    for suffix in ["-wal", "-journal"] {
        if let Err(error) = fs::rename(wal::beside(path, suffix), wal::beside(&old, suffix))
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error.into());
        }
    }
    let _ = fs::remove_file(wal::beside(path, "-shm")); // SQLite makes it anew
    if was_there && fs::hard_link(path, &old).is_err() {
        fs::rename(path, &old)?;
    }
    Ok(was_there.then_some(old))
}

/// Out of WAL mode, which SQLite does only for a connection that is alone.
fn make_one_file(path: &Path) -> Result<()> {
    let connection = open::open(path, Role::Writer, false, PATIENCE)?;
    let mode = connection.pragma_update_and_check(None, "journal_mode", "delete", |row| row.get(0));
    match mode {
        Ok::<String, _>(mode) if mode == "delete" => Ok(()),
        Err(error) if !error::is_busy(&error) => Err(error.into()),
        _ => Err(in_use()),
    }
}

/// Refuses a file that another connection has locked, without a change to it. SQLite is asked by a second name, so that it
/// leaves alone what lies beside the first. An idle connection in rollback mode holds no lock and is not found.
fn check_unused(path: &Path) -> Result<()> {
    let second = Copy(beside(path));
    if fs::hard_link(path, &second.0).is_err() {
        return Ok(()); // The file system has no links.
    }
    // Beside a log, and in this mode, SQLite takes the exclusive lock before it reads. So the file may be broken.
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
    let message =
        "another application or process uses the file, so nothing can take its place: close it there first";
    Error::new(ErrorKind::Unavailable, message).into()
}

fn free_name(path: &Path) -> PathBuf {
    let name = |n| wal::beside(path, &format!(".replaced-{n}"));
    let is_taken = |n: &u32| {
        ["", "-wal", "-journal"]
            .iter()
            .any(|suffix| fs::symlink_metadata(wal::beside(&name(*n), suffix)).is_ok())
    };
    name((1..u32::MAX).find(|n| !is_taken(n)).unwrap_or(u32::MAX))
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
    Error::invalid("there is something by this name already, which is kept: choose another name").into()
}

fn check_folder(path: &Path) -> Result<()> {
    if path.parent().is_some_and(Path::is_dir) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Backend, "the folder does not exist, make it first").into())
}

/// Also by two names, which are links to it.
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

/// The same error, which says what failed and where.
fn during(operation: &str, path: &Path, error: SqliteError) -> SqliteError {
    let error = Error::from(error);
    let message = format!("{operation} \"{}\" failed: {error}", path.display());
    Error::new(error.kind().clone(), message).with_source(error).into()
}

/// A file that is on its way, and goes when it does not arrive.
struct Copy(PathBuf);

impl Copy {
    /// A flushed copy beside the target, with the permissions of the file that it is `like`.
    fn write(source: &Connection, target: &Path, like: Option<&Path>) -> Result<Self> {
        let copy = Self(beside(target));
        new_file(&copy.0, like.is_some())?;
        write(source, &copy.0)?;
        if let Some(like) = like {
            fs::set_permissions(&copy.0, fs::metadata(like)?.permissions())?;
        }
        // SQLite has closed it; now it can be opened as a plain file.
        File::open(&copy.0)?.sync_all()?;
        Ok(copy)
    }
}

/// An empty file, which only its owner may read until it gets the permissions that it is to have.
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

impl Drop for Copy {
    fn drop(&mut self) {
        for suffix in ["", "-wal", "-shm", "-journal"] {
            let _ = fs::remove_file(wal::beside(&self.0, suffix));
        }
    }
}

fn beside(target: &Path) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    wal::beside(target, &format!(".{}-{count}.part", std::process::id()))
}

/// All pages in one step: the copy is of one moment, and commits go on beside it. In several steps it would begin
/// again with every commit. The copy is marked as a backup, and is one file, without a log.
fn write(source: &Connection, path: &Path) -> Result<()> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut copy = Connection::open_with_flags(path, flags)?;
    let moment = Transaction::new_unchecked(source, TransactionBehavior::Deferred)?;
    let head = LogEnd::read(&moment)?;
    let outcome = Backup::new(&moment, &mut copy)?.step(-1)?;
    drop(moment);
    if outcome != StepResult::Done {
        return Err(Error::new(ErrorKind::Unavailable, "the store is locked").into());
    }
    copy.pragma_update_and_check(None, "journal_mode", "delete", |_| Ok(()))?;
    copy.execute_batch("UPDATE store SET is_backup = 1")?;
    verify(&copy, head)?;
    copy.close().map_err(|(_, error)| error.into())
}

fn verify(copy: &Connection, head: LogEnd) -> Result<()> {
    let verdict: String = copy.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if verdict != "ok" {
        return Err(damaged("the copy does not pass SQLite's integrity check"));
    }
    if LogEnd::read(copy)?.position != head.position {
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
