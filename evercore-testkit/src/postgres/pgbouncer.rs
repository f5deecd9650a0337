//! PgBouncer between a client and a server.

use std::fs::{self, File};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use super::account::{give_to_server, run_as_server};
use super::place::{free_port, new_folder};
use super::process::{command, wait_until};
use super::server::Server;
use super::watchdog::Watchdog;

/// Where to look for the program, in addition to `PATH`, which often lacks Debian's folder.
const PLACES: [&str; 2] = ["/usr/sbin", "/usr/local/sbin"];

/// A running PgBouncer on `127.0.0.1` and a free port. Dropping it stops it and removes its folder.
#[derive(Debug)]
pub struct PgBouncer {
    port: u16,
    folder: PathBuf,
    process: Child,
    // Kept until the end: its drop removes the folder.
    _watchdog: Watchdog,
}

impl PgBouncer {
    /// Starts one in front of the server, with its defaults. The mode is `session`, `transaction` or `statement`.
    /// Gives `None` if the program is not installed.
    ///
    /// # Errors
    /// If it does not start; with its log.
    pub fn start(server: &Server, pool_mode: &str) -> Result<Option<Self>, String> {
        Self::start_with(server, pool_mode, &[])
    }

    /// The same with more settings.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn start_with(
        server: &Server,
        pool_mode: &str,
        settings: &[(&str, &str)],
    ) -> Result<Option<Self>, String> {
        let Some(program) = find() else { return Ok(None) };
        let folder = new_folder()?;
        let watchdog = Watchdog::start(&folder, &folder.join("pid"))?;
        let port = free_port()?;
        let ini = folder.join("pgbouncer.ini");
        fs::write(&ini, configuration(server, port, pool_mode, &folder, settings))
            .map_err(|error| format!("\"{}\": {error}", ini.display()))?;
        give_to_server(&ini)?;
        // Not by its own setting, which would hide errors in the file.
        let log = File::create(folder.join("log")).map_err(|error| format!("no log: {error}"))?;
        let mut pgbouncer = command(&program);
        pgbouncer.arg(&ini).current_dir(&folder).stdout(Stdio::null()).stderr(log).process_group(0);
        let started = run_as_server(&mut pgbouncer).spawn();
        let process =
            started.map_err(|error| format!("\"{}\" could not be started: {error}", program.display()))?;
        let mut pgbouncer = Self { port, folder, process, _watchdog: watchdog };
        pgbouncer.wait_until_ready()?;
        Ok(Some(pgbouncer))
    }

    /// Its URL, with the database `postgres`.
    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    /// Its URL, with this database.
    pub fn url_of(&self, database: &str) -> String {
        format!("postgres://evercore@127.0.0.1:{}/{database}", self.port)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    fn wait_until_ready(&mut self) -> Result<(), String> {
        let is_ready = wait_until(Duration::from_secs(10), || {
            let has_ended = !matches!(self.process.try_wait(), Ok(None));
            has_ended || TcpStream::connect(("127.0.0.1", self.port)).is_ok()
        });
        if is_ready && matches!(self.process.try_wait(), Ok(None)) {
            Ok(())
        } else {
            Err(format!("PgBouncer did not come up; its log:\n{}", self.log()))
        }
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        // A kill cannot harm its state, and it may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_file(self.folder.join("pid"));
    }
}

fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(PLACES.map(PathBuf::from));
    folders.map(|folder| folder.join("pgbouncer")).find(|program| program.is_file())
}

fn configuration(
    server: &Server,
    port: u16,
    pool_mode: &str,
    folder: &Path,
    settings: &[(&str, &str)],
) -> String {
    let folder = folder.display();
    let settings: String = settings.iter().map(|(name, value)| format!("{name} = {value}\n")).collect();
    // `any` needs a user for the server's side, and accepts every client.
    format!(
        "[databases]
* = host=127.0.0.1 port={server} user=evercore
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {pool_mode}
max_client_conn = 500
default_pool_size = 20
pidfile = {folder}/pid
{settings}",
        server = server.port()
    )
}
