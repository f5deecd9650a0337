//! The conformance suite on the PostgreSQL engine, on a real server, with each kind of connection.

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

/// The cases that test the engine. The others test core, for which all kinds of connections are the same.
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

/// A kind of connection.
trait Way: 'static {
    const ONLY: &'static [&'static str] = ENGINE_ITSELF;

    fn connect(place: &Place) -> impl Future<Output = Result<PostgresEngine>>;
}

/// A store in its own schema, with this kind of connection.
struct Connected<W>(PhantomData<W>);

impl<W: Way> Harness for Connected<W> {
    const NAME: &'static str = "postgres";
    /// Tests with their own server look at the data of a killed server.
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

    /// Makes the stored times this much later than the clock.
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

/// The default.
struct Direct;

impl Way for Direct {
    const ONLY: &'static [&'static str] = &[];

    async fn connect(place: &Place) -> Result<PostgresEngine> {
        place.builder().connect(&place.url).await
    }
}

/// As with a pooler in transaction mode: no named statements, no state in a session.
struct WithoutSessions;

impl Way for WithoutSessions {
    async fn connect(place: &Place) -> Result<PostgresEngine> {
        place.builder().pooler(true).connect(&place.url).await
    }
}

/// On a pool of the application, with harmful settings in its sessions.
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
