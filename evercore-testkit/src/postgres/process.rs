//! Runs programs, signals and watches processes.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// A command without influence from the environment: no `PG…` variable, no locale, no input.
pub(super) fn command(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(name);
        }
    }
    command.env_remove("LANGUAGE").env("LC_ALL", "C").env("PGCLIENTENCODING", "UTF8").stdin(Stdio::null());
    command
}

/// Runs a command to its end and gives its output.
pub(super) fn run(command: &mut Command) -> Result<Vec<u8>, String> {
    let program = Path::new(command.get_program()).display().to_string();
    let output = command.output().map_err(|error| {
        let folder = command.get_current_dir().unwrap_or(Path::new(".")).display();
        format!("\"{program}\" could not be run in \"{folder}\": {error}")
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("\"{program}\" failed ({}): {}", output.status, said.trim()))
}

/// Sends a signal to all of them at once. A process that has ended is no error.
pub(super) fn signal(signal: &str, processes: &[u32]) {
    let processes = processes.iter().map(u32::to_string);
    let _ = Command::new("sh")
        .args(["-c", r#"kill -s "$0" "$@""#, signal])
        .args(processes)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// The running children of this process.
pub(super) fn children_of(parent: u32) -> Vec<u32> {
    living().into_iter().filter(|process| process.parent == parent).map(|process| process.id).collect()
}

/// Waits until all of them have ended, at most ten seconds.
pub(super) fn wait_until_gone(processes: &[u32]) -> bool {
    wait_until(Duration::from_secs(10), || {
        let living: HashSet<u32> = living().into_iter().map(|process| process.id).collect();
        !processes.iter().any(|process| living.contains(process))
    })
}

/// Asks until the answer is yes. Gives false after the time-out.
pub(super) fn wait_until(limit: Duration, mut is_done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if is_done() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

struct Process {
    id: u32,
    parent: u32,
}

/// All processes except zombies, which have ended and wait for their parent.
fn living() -> Vec<Process> {
    let Ok(folder) = fs::read_dir("/proc") else { return living_by_ps() };
    folder
        .filter_map(|entry| {
            let id = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
            // The form is "17 (postgres: checkpointer) S 1 …". The name may contain brackets and spaces.
            let (_, after_name) = stat.rsplit_once(')')?;
            let mut fields = after_name.split_whitespace();
            let is_zombie = matches!(fields.next()?, "Z" | "X");
            let parent = fields.next()?.parse().ok()?;
            (!is_zombie).then_some(Process { id, parent })
        })
        .collect()
}

/// The same without `/proc`, as on macOS.
fn living_by_ps() -> Vec<Process> {
    let output = Command::new("ps").args(["-axo", "pid=,ppid=,stat="]).output();
    let listing = output.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&listing)
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let process = Process { id: fields.next()?.parse().ok()?, parent: fields.next()?.parse().ok()? };
            (!fields.next()?.starts_with('Z')).then_some(process)
        })
        .collect()
}
