//! A running server and its files.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::account::run_as_server;
use super::binaries::Binaries;
use super::place::{free_port, is_free, new_folder};
use super::process::{children_of, command, signal, wait_until, wait_until_gone};
use super::tls::CA_FILE;
use super::watchdog::Watchdog;

/// The lines of `postmaster.pid` with the shared memory and with the state of the server.
const SHARED_MEMORY_LINE: usize = 6;
const STATUS_LINE: usize = 7;

const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// A PostgreSQL server on `127.0.0.1` and a free port, with its own folder.
///
/// The superuser is `evercore`, without a password. When this is dropped, or the process ends in any way, the server
/// is stopped at once and its folder is removed.
#[derive(Debug)]
pub struct Server {
    binaries: Binaries,
    folder: PathBuf,
    port: u16,
    pub(super) language: Option<String>,
    process: Mutex<Option<Child>>,
    // Kept until the end: its drop removes the folder.
    _watchdog: Watchdog,
}

impl Server {
    pub(super) fn in_new_folder(binaries: Binaries) -> Result<Self, String> {
        let folder = new_folder()?;
        let watchdog = Watchdog::start(&folder, &pid_file(&folder))?;
        let process = Mutex::default();
        Ok(Self { binaries, folder, port: 0, language: None, process, _watchdog: watchdog })
    }

    /// Its URL, with the database `postgres`.
    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    /// Its URL, with this database.
    pub fn url_of(&self, database: &str) -> String {
        format!("postgres://evercore@127.0.0.1:{}/{database}", self.port)
    }

    /// Its port. It stays the same when the server is started again.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its folder, with data, log and socket.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The certificate of the authority that signed its certificate, if it has [TLS](super::Builder::tls).
    pub fn ca_file(&self) -> PathBuf {
        self.data().join(CA_FILE)
    }

    /// Its log.
    pub fn log(&self) -> String {
        let log = fs::read(self.log_file()).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Its version, such as `15.18`.
    ///
    /// # Panics
    /// If `postgres --version` fails.
    pub fn version(&self) -> String {
        self.binaries.version().unwrap_or_else(|error| panic!("{error}"))
    }

    /// Crashes it: kills all its processes at the same moment. Returns when they have ended.
    ///
    /// # Panics
    /// If they do not end.
    pub fn kill(&self) {
        let Some(mut postmaster) = self.process().take() else { return };
        // Not if it ended by itself: another process may have its id.
        if matches!(postmaster.try_wait(), Ok(None)) {
            kill_all(&mut postmaster);
        }
        self.clean_up();
    }

    /// Shuts it down. Clients are disconnected, and open transactions are rolled back.
    ///
    /// # Errors
    /// If it has not stopped within thirty seconds; with the end of its log.
    pub fn stop(&self) -> Result<(), String> {
        self.end("INT", STOP_LIMIT)
    }

    /// Starts it again after [`kill`](Self::kill) or [`stop`](Self::stop), with the same data and the same port.
    ///
    /// # Errors
    /// If it runs, or does not start; with the end of its log.
    pub fn start_again(&self) -> Result<(), String> {
        if self.runs() {
            return Err("the server runs already".to_owned());
        }
        // A connection may have got the port meanwhile.
        wait_until(START_LIMIT, || is_free(self.port));
        self.launch()
    }

    /// Restarts it.
    ///
    /// # Errors
    /// As for [`stop`](Self::stop) and [`start_again`](Self::start_again).
    pub fn restart(&self) -> Result<(), String> {
        self.stop()?;
        self.start_again()
    }

    pub(super) fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    pub(super) fn data(&self) -> PathBuf {
        data(&self.folder)
    }

    /// Starts it on the data that initdb or a backup has made.
    pub(super) fn launch_on_free_port(mut self) -> Result<Self, String> {
        let mut tries = 0;
        loop {
            self.port = free_port()?;
            match self.launch() {
                Ok(()) => return Ok(self),
                // Another process took the port.
                Err(_) if !is_free(self.port) && tries < 5 => tries += 1,
                Err(error) => return Err(error),
            }
        }
    }

    fn launch(&self) -> Result<(), String> {
        let mut process = self.process();
        self.clean_up();
        let mut postmaster = self.spawn()?;
        let mut ended = false;
        let answered = wait_until(START_LIMIT, || {
            ended = !matches!(postmaster.try_wait(), Ok(None));
            ended || self.is_ready()
        });
        *process = Some(postmaster);
        drop(process);
        if answered && !ended {
            return Ok(());
        }
        self.kill();
        let why = if ended { "ended at once" } else { "did not come up within 30 seconds" };
        Err(self.failure(why))
    }

    fn runs(&self) -> bool {
        self.process().as_mut().is_some_and(|postmaster| matches!(postmaster.try_wait(), Ok(None)))
    }

    fn spawn(&self) -> Result<Child, String> {
        let log = File::options().create(true).append(true).open(self.log_file());
        let log = log.and_then(|log| Ok((log.try_clone()?, log)));
        let (output, errors) = log.map_err(|error| format!("no log: {error}"))?;
        let program = self.binaries.program("postgres");
        let mut postgres: Command = command(&program);
        postgres
            .args(["-p", &self.port.to_string(), "-c", "listen_addresses=127.0.0.1", "-k"])
            .arg(&self.folder)
            .arg("-D")
            .arg(self.data())
            .envs(self.language.iter().map(|language| ("LANGUAGE", language)))
            .current_dir(&self.folder)
            .stdout(output)
            .stderr(errors)
            .stdin(Stdio::null())
            // Ctrl-C ends this process; the watchdog then stops the server.
            .process_group(0);
        let started = run_as_server(&mut postgres).spawn();
        started.map_err(|error| format!("\"{}\" could not be started: {error}", program.display()))
    }

    /// As pg_ctl does: the server writes to its file when it accepts connections.
    fn is_ready(&self) -> bool {
        let lines = fs::read_to_string(pid_file(&self.folder)).unwrap_or_default();
        lines.lines().nth(STATUS_LINE).is_some_and(|status| status.trim() == "ready")
    }

    fn end(&self, with: &str, limit: Duration) -> Result<(), String> {
        let mut process = self.process();
        let Some(postmaster) = process.as_mut() else { return Ok(()) };
        signal(with, &[postmaster.id()]);
        if !wait_until(limit, || !matches!(postmaster.try_wait(), Ok(None))) {
            return Err(self.failure("did not stop"));
        }
        *process = None;
        Ok(())
    }

    /// Removes what a killed server leaves, because another process may soon get its id.
    fn clean_up(&self) {
        let file = pid_file(&self.folder);
        let lines = fs::read_to_string(&file).unwrap_or_default();
        let key_and_id = lines.lines().nth(SHARED_MEMORY_LINE).unwrap_or_default();
        if let Some(id) = key_and_id.split_whitespace().nth(1) {
            let mut ipcrm = Command::new("ipcrm");
            // Optional: it is a few bytes, and the program may be missing.
            let _ = ipcrm.args(["-m", id]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        let _ = fs::remove_file(file);
    }

    pub(super) fn failure(&self, what: &str) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        format!("the PostgreSQL server {what}; the end of its log:\n{tail}")
    }

    fn log_file(&self) -> PathBuf {
        self.folder.join("log")
    }

    fn process(&self) -> MutexGuard<'_, Option<Child>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.end("QUIT", Duration::from_secs(10)).is_err() {
            self.kill();
        }
    }
}

fn kill_all(postmaster: &mut Child) {
    // Stopped first, so that it starts no other process while we look for them.
    signal("STOP", &[postmaster.id()]);
    let mut all = children_of(postmaster.id());
    all.push(postmaster.id());
    signal("KILL", &all);
    // A killed process ends.
    let _ = postmaster.wait();
    assert!(wait_until_gone(&all), "the server's processes were killed and are still there: {all:?}");
}

fn data(folder: &Path) -> PathBuf {
    folder.join("data")
}

fn pid_file(folder: &Path) -> PathBuf {
    data(folder).join("postmaster.pid")
}
