//! The floors: the shortest correct code for the same work on the driver alone, with prepared statements, the same
//! columns and indexes, and the same durability.

use std::sync::{Arc, Mutex};

use evercore_postgres::Timestamp;
use evercore_postgres::tokio_postgres::types::Type;
use evercore_postgres::tokio_postgres::{Client, NoTls, Statement, binary_copy::BinaryCopyInWriter};
use futures_channel::oneshot;
use futures_lite::StreamExt;

use benches::{Content, Counter};

/// The tables of the store, but with a position from a sequence, as is usual.
pub(crate) const TABLES: &str = "
    CREATE SCHEMA floor;
    CREATE TABLE floor.aggregates (
        id BIGINT PRIMARY KEY, aggregate_type_id INTEGER NOT NULL, natural_key TEXT COLLATE \"C\",
        UNIQUE (aggregate_type_id, natural_key));
    CREATE TABLE floor.events (
        position BIGSERIAL PRIMARY KEY, aggregate_id BIGINT NOT NULL, sequence BIGINT NOT NULL,
        event_time BIGINT NOT NULL, recorded_at BIGINT NOT NULL, event_type_id INTEGER NOT NULL, payload BYTEA NOT NULL,
        reference TEXT, correlation_id TEXT, causation_id TEXT, headers TEXT, UNIQUE (aggregate_id, sequence));
    CREATE INDEX ON floor.events (event_type_id, position);
    CREATE TABLE floor.head (one INTEGER PRIMARY KEY, position BIGINT NOT NULL) WITH (fillfactor = 10);
    INSERT INTO floor.head VALUES (1, 0);";

const INSERT: &str =
    "INSERT INTO floor.events (aggregate_id, sequence, event_time, recorded_at, event_type_id, payload)
    VALUES ($1, $2, $3, $3, 1, $4)";

const INSERT_MANY: &str = "INSERT INTO floor.events
    (aggregate_id, sequence, event_time, recorded_at, event_type_id, payload)
    SELECT $1, e.sequence, $2, $2, 1, e.payload FROM unnest($3::bigint[], $4::bytea[]) AS e (sequence, payload)";

/// One statement that writes the head row and the other rows.
const COMBINED: &str = "WITH head AS (UPDATE floor.head SET position = position + $1 RETURNING position - $1 AS before)
    INSERT INTO floor.events (position, aggregate_id, sequence, event_time, recorded_at, event_type_id, payload)
    SELECT before + e.place, e.id, e.sequence, $2, $2, 1, e.payload
    FROM head, unnest($3::bigint[], $4::bigint[], $5::bytea[]) WITH ORDINALITY AS e (id, sequence, payload, place)";

const CREATE: &str = "WITH made AS (INSERT INTO floor.aggregates VALUES ($1, 1, $2))
    INSERT INTO floor.events (aggregate_id, sequence, event_time, recorded_at, event_type_id, payload)
    VALUES ($1, 1, $3, $3, 1, $4)";

const LOAD_BY_ID: &str =
    "SELECT sequence, event_type_id, payload FROM evercore.events WHERE aggregate_id = $1 ORDER BY sequence";

const LOAD_BY_KEY: &str = "SELECT e.sequence, e.event_type_id, e.payload
    FROM evercore.events e WHERE e.aggregate_id =
        (SELECT a.id FROM evercore.aggregates a WHERE a.aggregate_type_id = 1 AND a.natural_key = $1)
    ORDER BY e.sequence";

const COPY: &str =
    "COPY floor.events (aggregate_id, sequence, event_time, recorded_at, event_type_id, payload)
    FROM STDIN BINARY";

const READ: &str = "SELECT position, event_type_id, payload FROM evercore.events
    WHERE position > $1 ORDER BY position LIMIT $2";

pub(crate) struct Floor {
    pub(crate) client: Client,
    insert: Statement,
    insert_many: Statement,
    combined: Statement,
    create: Statement,
    load_by_id: Statement,
    load_by_key: Statement,
    read: Statement,
}

pub(crate) async fn client(url: &str) -> Client {
    let mut config: evercore_postgres::tokio_postgres::Config = url.parse().unwrap();
    // Prevents a bad plan for a table that was small when the statement was prepared.
    config.options(
        "-c synchronous_commit=on -c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c jit=off",
    );
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

impl Floor {
    pub(crate) async fn connect(url: &str) -> Self {
        let client = client(url).await;
        Self {
            insert: client.prepare(INSERT).await.unwrap(),
            insert_many: client.prepare(INSERT_MANY).await.unwrap(),
            combined: client.prepare(COMBINED).await.unwrap(),
            create: client.prepare(CREATE).await.unwrap(),
            load_by_id: client.prepare(LOAD_BY_ID).await.unwrap(),
            load_by_key: client.prepare(LOAD_BY_KEY).await.unwrap(),
            read: client.prepare(READ).await.unwrap(),
            client,
        }
    }

    pub(crate) async fn append(&self, id: i64, expected: i64, events: i64) {
        let now = Timestamp::now().as_micros();
        if events == 1 {
            let payload = Content::payload(expected + 1);
            let rows = self.client.execute(&self.insert, &[&id, &(expected + 1), &now, &payload]).await;
            assert_eq!(rows.unwrap(), 1);
        } else {
            let sequences: Vec<i64> = (expected + 1..=expected + events).collect();
            let payloads: Vec<Vec<u8>> = sequences.iter().map(|number| Content::payload(*number)).collect();
            let rows = self.client.execute(&self.insert_many, &[&id, &now, &sequences, &payloads]).await;
            assert_eq!(rows.unwrap(), events as u64);
        }
    }

    pub(crate) async fn create(&self, id: i64, key: &str) {
        let (now, payload) = (Timestamp::now().as_micros(), Content::payload(1));
        self.client.execute(&self.create, &[&id, &key, &now, &payload]).await.unwrap();
    }

    pub(crate) async fn load(&self, id: i64) -> Counter {
        fold(self.client.query_raw(&self.load_by_id, [id]).await.unwrap()).await
    }

    pub(crate) async fn load_by_key(&self, key: &str) -> Counter {
        fold(self.client.query_raw(&self.load_by_key, [key]).await.unwrap()).await
    }

    pub(crate) async fn read(&self, after: i64, limit: i64) -> Counter {
        fold(self.client.query_raw(&self.read, [after, limit]).await.unwrap()).await
    }

    /// One unit by COPY, in its own transaction.
    pub(crate) async fn copy(&self, rows: impl Iterator<Item = (i64, i64)>) {
        let sink = self.client.copy_in(COPY).await.unwrap();
        let types = [Type::INT8, Type::INT8, Type::INT8, Type::INT8, Type::INT4, Type::BYTEA];
        let mut writer = std::pin::pin!(BinaryCopyInWriter::new(sink, &types));
        let now = Timestamp::now().as_micros();
        for (id, sequence) in rows {
            let payload = Content::payload(sequence);
            writer.as_mut().write(&[&id, &sequence, &now, &now, &1_i32, &payload]).await.unwrap();
        }
        writer.finish().await.unwrap();
    }
}

async fn fold(rows: evercore_postgres::tokio_postgres::RowStream) -> Counter {
    let mut rows = std::pin::pin!(rows);
    let mut counter = Counter::default();
    while let Some(row) = rows.try_next().await.unwrap() {
        assert_eq!(row.get::<_, i32>(1), 1);
        let content: Content = serde_json::from_slice(row.get(2)).unwrap();
        counter.count(&content);
    }
    counter
}

/// A hand-written combined commit: the first caller leads, and writes for all that are queued.
#[derive(Clone)]
pub(crate) struct Combined {
    floor: Arc<Floor>,
    queue: Arc<Mutex<(Vec<Job>, bool)>>,
}

type Job = (i64, i64, Vec<u8>, oneshot::Sender<()>);

impl Combined {
    pub(crate) async fn connect(url: &str) -> Self {
        Self { floor: Arc::new(Floor::connect(url).await), queue: Arc::default() }
    }

    pub(crate) async fn append(&self, id: i64, expected: i64) {
        let (done, answer) = oneshot::channel();
        let leads = {
            let mut queue = self.queue.lock().unwrap();
            queue.0.push((id, expected + 1, Content::payload(expected + 1), done));
            !std::mem::replace(&mut queue.1, true)
        };
        if leads {
            let this = self.clone();
            tokio::spawn(async move { this.lead().await });
        }
        answer.await.unwrap();
    }

    async fn lead(&self) {
        loop {
            let jobs = {
                let mut queue = self.queue.lock().unwrap();
                queue.1 = !queue.0.is_empty();
                std::mem::take(&mut queue.0)
            };
            if jobs.is_empty() {
                return;
            }
            let ids: Vec<i64> = jobs.iter().map(|job| job.0).collect();
            let sequences: Vec<i64> = jobs.iter().map(|job| job.1).collect();
            let payloads: Vec<&[u8]> = jobs.iter().map(|job| &job.2[..]).collect();
            let (count, now) = (jobs.len() as i64, Timestamp::now().as_micros());
            let Floor { client, combined, .. } = &*self.floor;
            let rows = client.execute(combined, &[&count, &now, &ids, &sequences, &payloads]).await;
            assert_eq!(rows.unwrap(), count as u64);
            jobs.into_iter().for_each(|job| job.3.send(()).unwrap());
        }
    }
}
