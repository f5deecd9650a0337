//! A second server that follows the first.

use std::time::Duration;

use super::account::run_as_server;
use super::process::run;
use super::server::Server;

impl Server {
    /// A server that follows this one and may be read; what is committed here appears there a little later.
    ///
    /// # Errors
    /// If the backup fails or the standby does not come up.
    pub fn standby(&self) -> Result<Self, String> {
        let mut standby = Self::in_new_folder(self.binaries().clone())?;
        standby.language.clone_from(&self.language);
        let mut backup = self.client("pg_basebackup");
        backup
            .args(["-R", "--wal-method=stream", "--checkpoint=fast", "--no-sync", "-D"])
            .arg(standby.data())
            .current_dir(standby.folder());
        run(run_as_server(&mut backup))?;
        standby.launch_on_free_port()
    }

    /// Lets a standby go its own way; it accepts writes when this returns.
    ///
    /// # Errors
    /// If it is none, or if it takes longer than thirty seconds.
    pub fn promote(&self) -> Result<(), String> {
        self.psql("postgres", "SELECT pg_promote(false)")?;
        self.wait_until_primary(Duration::from_secs(30))
    }
}
