//! The floors: the shortest correct code for the same work on the driver alone, with the same schema and the same
//! durability.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use futures_channel::oneshot;
use rusqlite::{Connection, params};

use benches::{Content, Counter};

const INSERT: &str = "INSERT INTO events (position, aggregate_id, sequence, event_type_id, event_time, recorded_at, \
                      payload) VALUES (?1, ?2, ?3, 1, ?4, ?4, ?5)";

pub(crate) struct Floor(pub(crate) Connection);

impl Floor {
    /// A connection to a file that the engine has created.
    pub(crate) fn open(path: &Path, synchronous: &str) -> Self {
        let connection = Connection::open(path).unwrap();
        connection.busy_timeout(Duration::from_secs(60)).unwrap();
        connection.pragma_update(None, "synchronous", synchronous).unwrap();
        connection.set_prepared_statement_cache_capacity(32);
        let floor = Self(connection);
        floor.run("INSERT OR IGNORE INTO aggregate_types VALUES (1, 'counter')");
        floor.run("INSERT OR IGNORE INTO event_types VALUES (1, 1, 'Counted')");
        floor
    }

    pub(crate) fn run(&self, sql: &str) {
        self.0.prepare_cached(sql).unwrap().execute([]).unwrap();
    }

    pub(crate) fn create(&self, id: i64, key: Option<&str>) {
        let mut insert = self.0.prepare_cached("INSERT INTO aggregates VALUES (?1, 1, ?2)").unwrap();
        insert.execute(params![id, key]).unwrap();
    }

    pub(crate) fn head(&self) -> i64 {
        let mut head = self.0.prepare_cached("SELECT ifnull(max(position), 0) FROM events").unwrap();
        head.query_row([], |row| row.get(0)).unwrap()
    }

    pub(crate) fn sequence(&self, id: i64) -> i64 {
        let sql = "SELECT ifnull(max(sequence), 0) FROM events WHERE aggregate_id = ?1";
        self.0.prepare_cached(sql).unwrap().query_row([id], |row| row.get(0)).unwrap()
    }

    pub(crate) fn insert(&self, position: i64, id: i64, sequence: i64, payload: &[u8]) {
        let now = evercore_sqlite::Timestamp::now().as_micros();
        self.0
            .prepare_cached(INSERT)
            .unwrap()
            .execute(params![position, id, sequence, now, payload])
            .unwrap();
    }

    /// One unit: the expected sequence checked, the events written.
    pub(crate) fn append(&self, id: i64, expected: i64, events: i64) {
        self.run("BEGIN IMMEDIATE");
        assert_eq!(self.sequence(id), expected);
        let head = self.head();
        for n in 1..=events {
            self.insert(head + n, id, expected + n, &Content::payload(expected + n));
        }
        self.run("COMMIT");
    }

    pub(crate) fn id_of(&self, key: &str) -> i64 {
        let sql = "SELECT id FROM aggregates WHERE aggregate_type_id = 1 AND natural_key = ?1";
        self.0.prepare_cached(sql).unwrap().query_row([key], |row| row.get(0)).unwrap()
    }

    pub(crate) fn load(&self, id: i64) -> Counter {
        let sql = "SELECT event_type_id, payload FROM events WHERE aggregate_id = ?1 ORDER BY sequence";
        self.fold(sql, [id])
    }

    pub(crate) fn read(&self, from: i64, count: i64) -> Counter {
        let sql = "SELECT event_type_id, payload FROM events WHERE position > ?1 ORDER BY position LIMIT ?2";
        self.fold(sql, [from, count])
    }

    fn fold(&self, sql: &str, parameters: impl rusqlite::Params) -> Counter {
        let mut select = self.0.prepare_cached(sql).unwrap();
        let mut rows = select.query(parameters).unwrap();
        let mut counter = Counter::default();
        while let Some(row) = rows.next().unwrap() {
            assert_eq!(row.get_ref(0).unwrap().as_i64().unwrap(), 1);
            let content: Content =
                serde_json::from_slice(row.get_ref(1).unwrap().as_blob().unwrap()).unwrap();
            counter.count(&content);
        }
        counter
    }
}

/// A hand-written combined commit: one thread writes for all queued callers.
#[derive(Clone)]
pub(crate) struct Combined(mpsc::Sender<Request>);

struct Request {
    id: i64,
    expected: i64,
    done: oneshot::Sender<()>,
}

impl Combined {
    pub(crate) fn open(path: &Path) -> Self {
        let floor = Floor::open(path, "FULL");
        let (sender, receiver) = mpsc::channel::<Request>();
        std::thread::spawn(move || {
            while let Ok(first) = receiver.recv() {
                let flight: Vec<_> = std::iter::once(first).chain(receiver.try_iter()).collect();
                floor.run("BEGIN IMMEDIATE");
                let mut position = floor.head();
                for request in &flight {
                    assert_eq!(floor.sequence(request.id), request.expected);
                    position += 1;
                    floor.insert(
                        position,
                        request.id,
                        request.expected + 1,
                        &Content::payload(request.expected + 1),
                    );
                }
                floor.run("COMMIT");
                flight.into_iter().for_each(|request| request.done.send(()).unwrap());
            }
        });
        Self(sender)
    }

    pub(crate) async fn append(&self, id: i64, expected: i64) {
        let (done, landed) = oneshot::channel();
        self.0.send(Request { id, expected, done }).unwrap();
        landed.await.unwrap();
    }
}
