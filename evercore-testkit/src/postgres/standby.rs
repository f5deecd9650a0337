//! A second server that follows the first.

use std::time::Duration;

use super::account::run_as_server;
use super::process::run;
use super::server::Server;

impl Server {
    /// Starts a server that follows this one and can be read. Commits appear there a little later.
    ///
    /// # Errors
    /// If the backup fails or the standby does not start.
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

    /// Promotes a standby. It accepts writes when this returns.
    ///
    /// # Errors
    /// If this is not a standby, or if it takes longer than thirty seconds.
    pub fn promote(&self) -> Result<(), String> {
        self.psql("postgres", "SELECT pg_promote(false)")?;
        self.wait_until_primary(Duration::from_secs(30))
    }
}
