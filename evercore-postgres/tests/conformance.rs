//! The PostgreSQL engine keeps every promise of the contract, on a real server, however it is connected.

#![allow(clippy::unwrap_used)]

#[path = "postgres/common.rs"]
mod common;

use std::future::Future;
use std::marker::PhantomData;
use std::time::Duration;

use common::Place;
use evercore_postgres::deadpool_postgres::{Manager, Pool};
use evercore_postgres::tokio_postgres::{Config, NoTls};
use evercore_postgres::{PostgresEngine, Result};
use evercore_testkit::{Ability, Harness};

/// What asks the engine itself. The rest asks core, which sees no difference between two ways of connecting.
const ENGINE_ITSELF: &[&str] = &[
    "types",
    "aggregates",
    "keys",
    "appends",
    "commands",
    "reading",
    "log::",
    "snapshots",
    "storage",
    "values",
    "cursors",
    "random::a_random_walk",
];

/// A way of connecting.
trait Way: 'static {
    const ONLY: &'static [&'static str] = ENGINE_ITSELF;

    fn connect(place: &Place) -> impl Future<Output = Result<PostgresEngine>>;
}

/// A store in a schema of its own, connected to in this way.
struct Connected<W>(PhantomData<W>);

impl<W: Way> Harness for Connected<W> {
    const NAME: &'static str = "postgres";
    /// What a killed server leaves is looked at in the tests that have a server of their own.
    const CANNOT: &'static [Ability] = &[Ability::CrashImage];
    const ONLY: &'static [&'static str] = W::ONLY;
    type Engine = PostgresEngine;
    type Guard = Place;

    async fn engine() -> Option<(Place, PostgresEngine)> {
        let place = Place::fresh()?;
        let engine = Self::further(&place).await?;
        Some((place, engine))
    }

    async fn further(place: &Place) -> Option<PostgresEngine> {
        Some(W::connect(place).await.unwrap())
    }

    async fn reopen(place: &Place) -> Option<PostgresEngine> {
        Self::further(place).await
    }

    /// What is stored is so much later than the clock.
    async fn turn_clock_back(place: &Place, by: Duration) -> bool {
        let micros = by.as_micros();
        place.psql(&format!(
            "UPDATE @events SET recorded_at = recorded_at + {micros};
             UPDATE @log_end SET recorded_at = recorded_at + {micros};
             UPDATE @cursors SET expires_at = expires_at + {micros} WHERE expires_at > 0;"
        ));
        true
    }

    fn block_on<F: Future>(future: F) -> F::Output {
        common::block_on(future)
    }
}

/// As by default.
struct Direct;

impl Way for Direct {
    const ONLY: &'static [&'static str] = &[];

    async fn connect(place: &Place) -> Result<PostgresEngine> {
        place.builder().connect(&place.url).await
    }
}

/// As behind a pooler in transaction mode: nothing named, nothing kept in a session.
struct WithoutSessions;

impl Way for WithoutSessions {
    async fn connect(place: &Place) -> Result<PostgresEngine> {
        place.builder().pooler(true).connect(&place.url).await
    }
}

/// On a pool of the application's own, whose sessions are set to what would do harm.
struct HandedIn;

impl Way for HandedIn {
    async fn connect(place: &Place) -> Result<PostgresEngine> {
        let mut config: Config = place.url.parse().unwrap();
        config.options(
            "-c default_transaction_isolation=serializable -c synchronous_commit=off \
             -c standard_conforming_strings=off -c TimeZone=Asia/Kathmandu \
             -c search_path=pg_catalog -c bytea_output=escape -c DateStyle=German",
        );
        let pool = Pool::builder(Manager::new(config, NoTls)).max_size(6).build().unwrap();
        place.builder().with_pool(pool).await
    }
}

mod direct {
    evercore_testkit::conformance!(crate::Connected<crate::Direct>);
}

mod without_sessions {
    evercore_testkit::conformance!(crate::Connected<crate::WithoutSessions>);
}

mod handed_in {
    evercore_testkit::conformance!(crate::Connected<crate::HandedIn>);
}
