//! A base backup of a server, and recovery from it to a point in time.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use super::account::{give_to_server, run_as_server};
use super::process::{command, run, wait_until};
use super::server::Server;

const RECOVERY_LIMIT: Duration = Duration::from_secs(60);

/// The files of a server at one moment, made by `pg_basebackup`. They are in the server's folder and are removed with
/// it.
#[derive(Debug)]
pub struct BaseBackup {
    files: PathBuf,
}

impl Server {
    /// The [settings](super::Builder::setting) of a server that keeps its whole write-ahead log, so that
    /// [`recover`](Self::recover) can replay it.
    pub const ARCHIVING: [(&'static str, &'static str); 3] = [
        ("wal_level", "replica"),
        ("archive_mode", "on"),
        ("archive_command", "mkdir -p ../archive && cp %p ../archive/%f"),
    ];

    /// Makes a base backup. It replaces an earlier one.
    ///
    /// # Errors
    /// If the old files cannot be removed, or `pg_basebackup` fails; with its message.
    pub fn base_backup(&self) -> Result<BaseBackup, String> {
        let files = self.folder().join("base-backup");
        if files.exists() {
            fs::remove_dir_all(&files).map_err(|error| format!("\"{}\": {error}", files.display()))?;
        }
        let mut backup = self.client("pg_basebackup");
        backup.args(["--wal-method=none", "--checkpoint=fast", "--no-sync", "-D"]).arg(&files);
        run(run_as_server(backup.current_dir(self.folder())))?;
        Ok(BaseBackup { files })
    }

    /// Puts the backup in place of the server's files and starts it again on the same port. The server replays its archive
    /// up to the target, such as `("recovery_target_time", "2026-01-01 12:00:00+00")`, and then accepts writes. Commits
    /// after the target are gone.
    ///
    /// The server must have run with [`ARCHIVING`](Self::ARCHIVING). It is stopped if it runs.
    ///
    /// # Errors
    /// If the files cannot be put in place, if the server does not come up, or if the archive does not reach the target
    /// within a minute.
    pub fn recover(&self, backup: &BaseBackup, target: (&str, &str)) -> Result<(), String> {
        self.stop()?;
        let data = self.data();
        let failed = |error: std::io::Error| format!("recovery of \"{}\": {error}", data.display());
        fs::remove_dir_all(&data).map_err(failed)?;
        run(run_as_server(command("cp").arg("-a").arg(&backup.files).arg(&data).current_dir(self.folder())))?;
        let (name, value) = target;
        let mut settings = File::options().append(true).open(data.join("postgresql.conf")).map_err(failed)?;
        let text = format!(
            "restore_command = 'cp ../archive/%f %p'\n{name} = '{value}'\nrecovery_target_action = 'promote'\n"
        );
        settings.write_all(text.as_bytes()).map_err(failed)?;
        let signal = data.join("recovery.signal");
        File::create(&signal).map_err(failed)?;
        give_to_server(&signal)?;
        self.start_again()?;
        self.wait_until_primary(RECOVERY_LIMIT)
    }

    /// Waits until the server accepts writes.
    pub(super) fn wait_until_primary(&self, limit: Duration) -> Result<(), String> {
        let is_primary =
            || self.psql("postgres", "SELECT pg_is_in_recovery()").is_ok_and(|answer| answer == "f");
        if wait_until(limit, is_primary) {
            return Ok(());
        }
        Err(self.failure(&format!("did not become a primary within {} seconds", limit.as_secs())))
    }
}
