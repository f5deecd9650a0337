//! Folders and ports for servers.

use std::net::TcpListener;
use std::path::PathBuf;

use super::account::give_to_server;

/// Makes a folder for a server. Only its account can read and write it.
pub(super) fn new_folder() -> Result<PathBuf, String> {
    let folder = tempfile::Builder::new().prefix("evercore-postgres-").disable_cleanup(true).tempdir();
    let folder = folder.map_err(|error| format!("no folder could be made: {error}"))?;
    give_to_server(folder.path())?;
    Ok(folder.path().to_owned())
}

/// A port that is free at the moment.
pub(super) fn free_port() -> Result<u16, String> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    listener.map(|address| address.port()).map_err(|error| format!("no port is free: {error}"))
}

/// Whether this port is free.
pub(super) fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}
