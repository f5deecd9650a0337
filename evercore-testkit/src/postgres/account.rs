//! The account that runs servers. It is the current one, or another one for root, because PostgreSQL refuses to run
//! as root.

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

/// Runs the command as the account of the servers.
pub(super) fn run_as_server(command: &mut Command) -> &mut Command {
    match account() {
        Some(account) => command.gid(account.group).uid(account.user),
        None => command,
    }
}

/// Makes the account of the servers the owner of the file or folder.
pub(super) fn give_to_server(path: &Path) -> Result<(), String> {
    let Some(account) = account() else { return Ok(()) };
    chown(path, Some(account.user), Some(account.group)).map_err(|error| {
        format!("\"{}\" could not be given to the server's account: {error}", path.display())
    })
}

/// `None` if the current account is not root and runs the servers.
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
