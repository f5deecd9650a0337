//! Helpers of the tests of this engine: one runtime, one server, a schema for each store.

#![allow(dead_code, reason = "the conformance suite uses a part")]

use std::future::Future;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use evercore_postgres::{Builder, PostgresEngine};
use evercore_testkit::postgres;
use tokio::runtime::Runtime;

/// One runtime for all tests of a process, because connections outlive the call that made them.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::new().unwrap()).block_on(future)
}

/// A separate schema on the server that the tests of this process share.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) url: String,
    pub(crate) schema: String,
}

impl Place {
    /// Prints a message and gives `None` if there is no server.
    pub(crate) fn fresh() -> Option<Self> {
        Some(Self::on(postgres::shared_url()?))
    }

    pub(crate) fn on(url: impl Into<String>) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self { url: url.into(), schema: format!("test_{}_{count}", std::process::id()) }
    }

    pub(crate) fn builder(&self) -> Builder {
        PostgresEngine::builder().schema(&self.schema).unwrap()
    }

    pub(crate) async fn engine(&self) -> PostgresEngine {
        self.builder().connect(&self.url).await.unwrap()
    }

    pub(crate) fn psql(&self, sql: &str) -> String {
        postgres::psql(&self.url, &sql.replace('@', &format!("{}.", self.schema))).unwrap()
    }
}

/// On a server of others the schema is removed.
impl Drop for Place {
    fn drop(&mut self) {
        if std::env::var_os("EVERCORE_POSTGRES_URL").is_some() {
            let _ = postgres::psql(&self.url, &format!("DROP SCHEMA IF EXISTS {} CASCADE", self.schema));
        }
    }
}
