//! Stops the server and removes its folder, however the process that started it ends.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A shell that waits for the end of a pipe from this process, then stops the server and removes its folder.
///
/// Panics that abort, statics that are never dropped, and `kill -9` all end the pipe, because no other process holds
/// it.
#[derive(Debug)]
pub(super) struct Watchdog {
    shell: Child,
}

impl Watchdog {
    pub(super) fn start(folder: &Path, pid_file: &Path) -> Result<Self, String> {
        let shell = Command::new("sh")
            .args(["-c", include_str!("watchdog.sh"), "evercore-watchdog"])
            .args([folder, pid_file])
            .current_dir("/")
            .stdin(Stdio::piped())
            // It inherits no output: a program that waits for the end of our output must not wait for the shell.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A separate process group, because Ctrl-C and time-outs reach all processes of our group.
            .process_group(0)
            .spawn()
            .map_err(|error| format!("the watchdog \"sh\" could not be started: {error}"))?;
        Ok(Self { shell })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        // It ends within seconds. If waiting fails, nothing is left to do.
        let _ = self.shell.wait();
    }
}
