-- The schema of an evercore store on SQLite, version 2: the cursors of durable subscriptions.

PRAGMA user_version = 2;

-- How far each partition of each version of a subscription has come, and who moves it. The owner and the epoch, which
-- grows at every claim, are the lease; all times are of this machine's clock. An inline projection has a cursor too,
-- which nobody owns: every commit moves it.
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
    status           INTEGER NOT NULL, -- 0 active, 1 paused, 2 retired
    failed_position  INTEGER,
    failed_attempts  INTEGER,
    failed_error     TEXT,
    parked_changes   INTEGER NOT NULL,
    PRIMARY KEY (subscription, version, partition)
) STRICT, WITHOUT ROWID;

-- Events that could not be handled and were put aside.
CREATE TABLE parked_events (
    subscription TEXT    NOT NULL,
    version      INTEGER NOT NULL,
    partition    INTEGER NOT NULL,
    position     INTEGER NOT NULL,
    aggregate_id INTEGER NOT NULL,
    holds_back   INTEGER NOT NULL, -- whether later events of the aggregate wait
    attempts     INTEGER NOT NULL,
    error        TEXT    NOT NULL,
    parked_at    INTEGER NOT NULL,
    is_due       INTEGER NOT NULL, -- whether it is to be tried again
    PRIMARY KEY (subscription, version, partition, position)
) STRICT, WITHOUT ROWID;
