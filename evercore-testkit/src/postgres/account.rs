//! Who runs a server: ourselves, or another account if we are root, since PostgreSQL refuses to be run by root.

use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

#[derive(Clone, Copy, Debug)]
struct Account {
    user: u32,
    group: u32,
}

/// Lets the command be run by the account of the servers.
pub(super) fn run_as_server(command: &mut Command) -> &mut Command {
    match account() {
        Some(account) => command.gid(account.group).uid(account.user),
        None => command,
    }
}

/// Gives the file or folder to the account of the servers.
pub(super) fn give_to_server(path: &Path) -> Result<(), String> {
    let Some(account) = account() else { return Ok(()) };
    chown(path, Some(account.user), Some(account.group)).map_err(|error| {
        format!("\"{}\" could not be given to the server's account: {error}", path.display())
    })
}

/// None if we are not root and run the servers ourselves.
fn account() -> Option<Account> {
    static ACCOUNT: OnceLock<Option<Account>> = OnceLock::new();
    *ACCOUNT.get_or_init(|| {
        if id(&["-u"]) == Some(0) { named("postgres").or_else(|| named("nobody")) } else { None }
    })
}

fn named(name: &str) -> Option<Account> {
    Some(Account { user: id(&["-u", name])?, group: id(&["-g", name])? })
}

fn id(args: &[&str]) -> Option<u32> {
    let output = Command::new("id").args(args).output().ok()?;
    String::from_utf8_lossy(&output.stdout).trim().parse().ok()
}
