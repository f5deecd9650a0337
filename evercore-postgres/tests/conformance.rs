//! The PostgreSQL engine keeps every promise of the contract, on a real server, however it is connected.

#![allow(clippy::unwrap_used)]

mod common;

use std::future::Future;

use common::Place;
use evercore_postgres::PostgresEngine;
use evercore_postgres::deadpool_postgres::{Manager, Pool};
use evercore_postgres::tokio_postgres::NoTls;
use evercore_testkit::Harness;

/// As connected by default.
struct Direct;

impl Harness for Direct {
    const NAME: &'static str = "postgres";
    type Engine = PostgresEngine;
    type Guard = Place;

    async fn engine() -> Option<(Place, PostgresEngine)> {
        let place = Place::fresh()?;
        let engine = place.engine().await;
        Some((place, engine))
    }

    async fn another(place: &Place) -> Option<PostgresEngine> {
        Some(place.engine().await)
    }

    fn block_on<F: Future>(future: F) -> F::Output {
        common::block_on(future)
    }
}

/// As behind a pooler in transaction mode: nothing named, nothing kept in a session.
struct WithoutSessions;

impl Harness for WithoutSessions {
    const NAME: &'static str = "postgres";
    type Engine = PostgresEngine;
    type Guard = Place;

    async fn engine() -> Option<(Place, PostgresEngine)> {
        let place = Place::fresh()?;
        let engine = Self::another(&place).await?;
        Some((place, engine))
    }

    async fn another(place: &Place) -> Option<PostgresEngine> {
        Some(place.builder().pooler(true).connect(&place.url).await.unwrap())
    }

    fn block_on<F: Future>(future: F) -> F::Output {
        common::block_on(future)
    }
}

/// On a pool of the application's own, whose sessions are set to what would do harm.
struct HandedIn;

impl Harness for HandedIn {
    const NAME: &'static str = "postgres";
    type Engine = PostgresEngine;
    type Guard = Place;

    async fn engine() -> Option<(Place, PostgresEngine)> {
        let place = Place::fresh()?;
        let engine = Self::another(&place).await?;
        Some((place, engine))
    }

    async fn another(place: &Place) -> Option<PostgresEngine> {
        let mut config: evercore_postgres::tokio_postgres::Config = place.url.parse().unwrap();
        config.options(
            "-c default_transaction_isolation=serializable -c synchronous_commit=off -c standard_conforming_strings=off \
             -c TimeZone=Asia/Kathmandu \
             -c search_path=pg_catalog -c bytea_output=escape -c DateStyle=German",
        );
        let pool = Pool::builder(Manager::new(config, NoTls)).max_size(6).build().unwrap();
        Some(place.builder().with_pool(pool).await.unwrap())
    }

    fn block_on<F: Future>(future: F) -> F::Output {
        common::block_on(future)
    }
}

mod direct {
    evercore_testkit::conformance!(crate::Direct);
}

mod without_sessions {
    evercore_testkit::conformance!(crate::WithoutSessions);
}

mod handed_in {
    evercore_testkit::conformance!(crate::HandedIn);
}
