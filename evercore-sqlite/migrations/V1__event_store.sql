-- The schema of an evercore store on SQLite, version 1.
-- Names, keys and texts are compared by their bytes. Times are microseconds since 1970, UTC.

-- 'EVCR' marks the file as a store of evercore. A store that was restored from a dump lacks it until it is opened.
PRAGMA application_id = 1163281234;

-- One row: the id of the store, its schema version, and the next aggregate id that is not reserved. Each later migration
-- raises the version.
CREATE TABLE store (
    one               INTEGER PRIMARY KEY CHECK (one = 1),
    store_id          TEXT    NOT NULL,
    schema_version    INTEGER NOT NULL,
    is_backup         INTEGER NOT NULL, -- whether the file is a backup that was not written since
    next_aggregate_id INTEGER NOT NULL
) STRICT;
INSERT INTO store (one, store_id, schema_version, is_backup, next_aggregate_id)
VALUES (1, lower(hex(randomblob(16))), 1, 0, 1);

-- AUTOINCREMENT: a committed id is never given to another name, even if its row is deleted.
CREATE TABLE aggregate_types (
    id   INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT    NOT NULL UNIQUE
) STRICT;

CREATE TABLE event_types (
    id                INTEGER PRIMARY KEY AUTOINCREMENT,
    aggregate_type_id INTEGER NOT NULL REFERENCES aggregate_types,
    name              TEXT    NOT NULL,
    UNIQUE (aggregate_type_id, name)
) STRICT;

CREATE TABLE aggregates (
    id                INTEGER PRIMARY KEY,
    aggregate_type_id INTEGER NOT NULL REFERENCES aggregate_types,
    natural_key       TEXT
) STRICT;
CREATE UNIQUE INDEX aggregates_natural_key ON aggregates (aggregate_type_id, natural_key) WHERE natural_key IS NOT NULL;

-- The log. The engine writes the position: 1, 2, 3, … in commit order.
CREATE TABLE events (
    position       INTEGER PRIMARY KEY,
    aggregate_id   INTEGER NOT NULL REFERENCES aggregates,
    sequence       INTEGER NOT NULL,
    event_type_id  INTEGER NOT NULL REFERENCES event_types,
    event_time     INTEGER NOT NULL,
    recorded_at    INTEGER NOT NULL,
    payload        BLOB    NOT NULL,
    reference      TEXT,
    correlation_id TEXT,
    causation_id   TEXT,
    headers        TEXT    -- a JSON object of strings
) STRICT;
-- Finds the events of an aggregate, and refuses the same sequence twice.
CREATE UNIQUE INDEX events_aggregate_sequence ON events (aggregate_id, sequence);
-- A filter that few events match reads one of these indexes instead of the log. Every index ends with the position.
CREATE INDEX events_event_type ON events (event_type_id);
CREATE INDEX events_reference ON events (reference) WHERE reference IS NOT NULL;
CREATE INDEX events_correlation_id ON events (correlation_id) WHERE correlation_id IS NOT NULL;

-- One snapshot per aggregate.
CREATE TABLE snapshots (
    aggregate_id INTEGER PRIMARY KEY REFERENCES aggregates,
    sequence     INTEGER NOT NULL,
    version      INTEGER NOT NULL,
    state        BLOB    NOT NULL
) STRICT;

-- Commands that took effect, and commands that were settled as never committed (without a receipt).
CREATE TABLE commands (
    command_id  TEXT PRIMARY KEY,
    fingerprint INTEGER,
    receipt     TEXT,
    recorded_at INTEGER NOT NULL -- old ones may be forgotten
) STRICT, WITHOUT ROWID;

-- How far each partition of each version of a subscription has come, and which worker moves it. The owner and the epoch,
-- which grows with every claim, are the lease. All times are by this machine's clock. An inline projection has a cursor
-- too. It has no owner: every commit moves it.
CREATE TABLE cursors (
    subscription     TEXT    NOT NULL,
    version          INTEGER NOT NULL,
    partition        INTEGER NOT NULL,
    partitions       INTEGER NOT NULL,
    position         INTEGER NOT NULL,
    epoch            INTEGER NOT NULL,
    owner            TEXT,
    expires_at       INTEGER NOT NULL,
    wanted_by        TEXT,
    wanted_until     INTEGER NOT NULL,
    live_from        INTEGER,
    is_held          INTEGER NOT NULL, -- whether the version waits for its promotion
    status           INTEGER NOT NULL, -- 0 active, 1 paused, 2 retired
    failed_position  INTEGER,
    failed_attempts  INTEGER,
    failed_error     TEXT,
    parked_changes   INTEGER NOT NULL,
    lost_leases      INTEGER NOT NULL, -- in a row, without a move
    PRIMARY KEY (subscription, version, partition)
) STRICT, WITHOUT ROWID;

-- Events that a handler could not handle, and that were set aside.
CREATE TABLE parked_events (
    subscription TEXT    NOT NULL,
    version      INTEGER NOT NULL,
    partition    INTEGER NOT NULL,
    position     INTEGER NOT NULL,
    aggregate_id INTEGER NOT NULL,
    holds_back   INTEGER NOT NULL, -- whether later events of the aggregate must wait
    attempts     INTEGER NOT NULL,
    error        TEXT    NOT NULL,
    parked_at    INTEGER NOT NULL,
    is_due       INTEGER NOT NULL, -- whether it must be tried again
    PRIMARY KEY (subscription, version, partition, position)
) STRICT, WITHOUT ROWID;

-- The log for people: names instead of ids, and the payload and the times as text. It calculates in integers, because
-- fractions would be rounded.
CREATE VIEW event_log AS
SELECT e.position,
       a.name                                                       AS aggregate_type,
       e.aggregate_id,
       g.natural_key,
       e.sequence,
       t.name                                                       AS event_type,
       CAST(e.payload AS TEXT)                                      AS payload,
       e.reference,
       strftime('%Y-%m-%dT%H:%M:%S', (e.event_time - (e.event_time % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
           || format('.%06dZ', (e.event_time % 1000000 + 1000000) % 1000000)  AS event_time,
       strftime('%Y-%m-%dT%H:%M:%S', (e.recorded_at - (e.recorded_at % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
           || format('.%06dZ', (e.recorded_at % 1000000 + 1000000) % 1000000)  AS recorded_at,
       e.correlation_id,
       e.causation_id,
       e.headers
FROM events e
JOIN event_types t     ON t.id = e.event_type_id
JOIN aggregate_types a ON a.id = t.aggregate_type_id
JOIN aggregates g      ON g.id = e.aggregate_id;
