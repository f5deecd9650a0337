//! The tables of the live run, in the store's own database.

use evercore_postgres::{BoxError, EventStore, PostgresEngine, Projection};
use tokio::sync::oneshot;

use crate::live::{Changes, Tables};

pub(crate) type Engine = PostgresEngine;

/// The schema of the store of the live run, and of its tables.
pub(crate) const SCHEMA: &str = "loan_applications_live";

const TABLES: &str = "
    -- In which state each application is, and since when.
    CREATE TABLE loan_applications_live.loan_states (
        application BIGINT PRIMARY KEY, day BIGINT NOT NULL, state TEXT NOT NULL
    );
    -- How many there are in each.
    CREATE TABLE loan_applications_live.loan_counts (
        day BIGINT, state TEXT, applications BIGINT NOT NULL, PRIMARY KEY (day, state)
    );
    CREATE TABLE loan_applications_live.loan_work (resource TEXT PRIMARY KEY, in_progress BIGINT NOT NULL)";

const FIND: &str = "
    SELECT application, day, state FROM loan_applications_live.loan_states WHERE application = ANY($1)";

const PUT: &str = "
    INSERT INTO loan_applications_live.loan_states
    SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[])
    ON CONFLICT (application) DO UPDATE SET day = excluded.day, state = excluded.state";

const COUNT: &str = "
    INSERT INTO loan_applications_live.loan_counts AS known
    SELECT * FROM unnest($1::bigint[], $2::text[], $3::bigint[])
    ON CONFLICT (day, state) DO UPDATE SET applications = known.applications + excluded.applications";

const WORK: &str = "
    INSERT INTO loan_applications_live.loan_work AS known
    SELECT * FROM unnest($1::text[], $2::bigint[])
    ON CONFLICT (resource) DO UPDATE SET in_progress = known.in_progress + excluded.in_progress";

pub(crate) async fn make_tables(engine: &Engine) -> Result<(), BoxError> {
    let store = EventStore::new(engine.clone());
    let make = engine
        .commit_with(store.begin(), |sql| Box::pin(async move { Ok(sql.batch_execute(TABLES).await?) }));
    make.await?;
    Ok(())
}

/// Counts every event, because no event comes twice.
pub(crate) fn projection(engine: &Engine) -> Projection {
    engine.projection(|sql, delivery| {
        Box::pin(async move {
            let changes = Changes::of(delivery.events())?;
            let applications: Vec<i64> = changes.states.keys().copied().collect();
            let rows = sql.query(FIND, &[&applications]).await?;
            let before = rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect();
            let (days, states): (Vec<i64>, Vec<String>) = changes.states.values().cloned().unzip();
            sql.execute(PUT, &[&applications, &days, &states]).await?;
            let (moved, counts): (Vec<_>, Vec<i64>) = changes.moves(&before).into_iter().unzip();
            let (days, states): (Vec<i64>, Vec<String>) = moved.into_iter().unzip();
            sql.execute(COUNT, &[&days, &states, &counts]).await?;
            let (resources, growth): (Vec<String>, Vec<i64>) = changes.work.into_iter().unzip();
            sql.execute(WORK, &[&resources, &growth]).await?;
            Ok(())
        })
    })
}

pub(crate) async fn read(engine: &Engine) -> Result<Tables, BoxError> {
    let (send, receive) = oneshot::channel();
    let store = EventStore::new(engine.clone());
    let ask = engine.commit_with(store.begin(), |sql| {
        Box::pin(async move {
            let counts = "SELECT day, state, applications FROM loan_applications_live.loan_counts
                          WHERE applications <> 0";
            let work = "SELECT resource, in_progress FROM loan_applications_live.loan_work";
            let (counts, work) = (sql.query(counts, &[]).await?, sql.query(work, &[]).await?);
            let applications = counts.iter().map(|row| ((row.get(0), row.get(1)), row.get(2))).collect();
            let work = work.iter().map(|row| (row.get(0), row.get(1))).collect();
            send.send(Tables { applications, work }).map_err(|_| "nobody listens".into())
        })
    });
    ask.await?;
    Ok(receive.await?)
}
