-- The schema of an evercore store on PostgreSQL. It lies in a schema of the user's choice: the names below
-- are found through the search path of the transaction that runs this.
-- Names, keys and texts compare bytewise; times are microseconds since 1970, UTC.
--
-- There is no sequence, no trigger, no function and no foreign key: every row is written by one statement that holds
-- the row of log_end and has checked what a foreign key would check again, row by row.

-- One row: who this store is, and of which schema version.
CREATE TABLE store (
    one            SMALLINT NOT NULL CHECK (one = 1),
    store_id       TEXT     NOT NULL,
    schema_version INTEGER  NOT NULL,
    CONSTRAINT store_one PRIMARY KEY (one)
);
INSERT INTO store VALUES (1, pg_catalog.replace(pg_catalog.gen_random_uuid()::text, '-', ''), 1);

-- One row: where the log ends. Whoever commits updates it first and holds it until the commit is visible, so positions
-- are 1, 2, 3, … in commit order, on a standby and after a restore too.
CREATE TABLE log_end (
    one         SMALLINT NOT NULL CHECK (one = 1),
    position    BIGINT   NOT NULL,
    recorded_at BIGINT   NOT NULL,
    -- A random number that changes with every name that is registered. While it stays as it was when the names were read,
    -- they are as they were, and there are no others. It stands here and not in a table of its own because the statement
    -- that commits locks this row anyway.
    names       BIGINT   NOT NULL
) WITH (
    -- Every commit leaves a dead version of the row. They are few pages if they are vacuumed often. The table is never
    -- cut short at its end: that takes a lock which ends queries on standbys.
    autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_scale_factor = 0,
    autovacuum_analyze_threshold = 1000000, autovacuum_analyze_scale_factor = 0, vacuum_truncate = false
);
-- The live version of the row is the first from the top. A key on `one` would make each commit look through the dead ones.
CREATE INDEX log_end_position ON log_end (position);
INSERT INTO log_end VALUES (1, 0, 0, 0);

-- Names are numbered under the lock of the row in log_end: 1, 2, 3, … in the order in which they commit.
CREATE TABLE aggregate_types (
    id   INTEGER          NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    CONSTRAINT aggregate_types_id PRIMARY KEY (id),
    CONSTRAINT aggregate_types_name UNIQUE (name)
);

CREATE TABLE event_types (
    id                INTEGER          NOT NULL,
    aggregate_type_id INTEGER          NOT NULL,
    name              TEXT COLLATE "C" NOT NULL,
    CONSTRAINT event_types_id PRIMARY KEY (id),
    CONSTRAINT event_types_name UNIQUE (aggregate_type_id, name)
);

CREATE TABLE aggregates (
    id                BIGINT  NOT NULL,
    aggregate_type_id INTEGER NOT NULL,
    natural_key       TEXT COLLATE "C",
    CONSTRAINT aggregates_id PRIMARY KEY (id),
    -- Deferrable, so that it is checked at the end of a statement: two aggregates may swap their keys.
    CONSTRAINT aggregates_natural_key UNIQUE (aggregate_type_id, natural_key) DEFERRABLE INITIALLY IMMEDIATE
);

-- The log. The position is written, never drawn.
CREATE TABLE events (
    position       BIGINT  NOT NULL,
    aggregate_id   BIGINT  NOT NULL,
    sequence       BIGINT  NOT NULL,
    event_time     BIGINT  NOT NULL,
    recorded_at    BIGINT  NOT NULL,
    event_type_id  INTEGER NOT NULL,
    payload        BYTEA   NOT NULL,
    reference      TEXT COLLATE "C",
    correlation_id TEXT COLLATE "C",
    causation_id   TEXT COLLATE "C",
    headers        TEXT, -- a JSON object of strings
    mark           BIGINT  NOT NULL, -- a random number of the commit: tells this event from another that takes its place
    CONSTRAINT events_position PRIMARY KEY (position),
    -- An aggregate's events, and what no two writers can pass together.
    CONSTRAINT events_aggregate_sequence UNIQUE (aggregate_id, sequence)
);
-- A filter that matches rarely reads one of these instead of the log.
CREATE INDEX events_event_type ON events (event_type_id, position);
CREATE INDEX events_reference ON events (reference, position) WHERE reference IS NOT NULL;
CREATE INDEX events_correlation_id ON events (correlation_id, position) WHERE correlation_id IS NOT NULL;

-- One per aggregate.
CREATE TABLE snapshots (
    aggregate_id BIGINT  NOT NULL,
    sequence     BIGINT  NOT NULL,
    version      BIGINT  NOT NULL,
    state        BYTEA   NOT NULL,
    CONSTRAINT snapshots_aggregate_id PRIMARY KEY (aggregate_id)
);

-- Commands that took effect, or were settled as never committed (no receipt).
CREATE TABLE commands (
    command_id  TEXT COLLATE "C" NOT NULL,
    fingerprint BIGINT,
    receipt     TEXT,
    recorded_at BIGINT           NOT NULL, -- old ones may be forgotten
    CONSTRAINT commands_command_id PRIMARY KEY (command_id)
);

-- How far each partition of each version of a subscription has come, and who moves it. The owner and the epoch, which
-- grows at every claim, are the lease; all times are of the server's clock.
CREATE TABLE cursors (
    subscription    TEXT COLLATE "C" NOT NULL,
    version         BIGINT           NOT NULL,
    partition       BIGINT           NOT NULL,
    partitions      BIGINT           NOT NULL,
    position        BIGINT           NOT NULL,
    epoch           BIGINT           NOT NULL,
    owner           TEXT COLLATE "C",
    expires_at      BIGINT           NOT NULL,
    wanted_by       TEXT COLLATE "C",
    wanted_until    BIGINT           NOT NULL,
    live_from       BIGINT,
    status          INTEGER          NOT NULL, -- 0 active, 1 paused, 2 retired
    failed_position BIGINT,
    failed_attempts BIGINT,
    failed_error    TEXT,
    parked_changes  BIGINT           NOT NULL,
    revision        BIGINT           NOT NULL -- how often the row was written
) WITH (
    -- As with log_end, each move leaves a dead version of a row.
    autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_scale_factor = 0,
    autovacuum_analyze_threshold = 1000000, autovacuum_analyze_scale_factor = 0, vacuum_truncate = false
);
-- The live version of each row first. Not unique by the first three: that would make each move look through the dead
-- ones. A cursor is made under the lock of the row in log_end, so there is one of each.
CREATE UNIQUE INDEX cursors_newest ON cursors (subscription, version, partition, revision DESC);

-- Events that could not be handled and were put aside.
CREATE TABLE parked_events (
    subscription TEXT COLLATE "C" NOT NULL,
    version      BIGINT           NOT NULL,
    partition    BIGINT           NOT NULL,
    position     BIGINT           NOT NULL,
    aggregate_id BIGINT           NOT NULL,
    holds_back   BOOLEAN          NOT NULL, -- whether later events of the aggregate wait
    attempts     BIGINT           NOT NULL,
    error        TEXT             NOT NULL,
    parked_at    BIGINT           NOT NULL,
    is_due       BOOLEAN          NOT NULL, -- whether it is to be tried again
    CONSTRAINT parked_events_id PRIMARY KEY (subscription, version, partition, position)
);

-- The log for people: names instead of ids, the payload and the times as text. A payload that is no text (the pattern
-- is that of well-formed UTF-8 without a NUL) is shown in hexadecimal. Times are added in days and microseconds: an
-- interval is multiplied in floating point, which has not every microsecond of ten thousand years.
CREATE VIEW event_log AS
SELECT e.position,
       a.name AS aggregate_type,
       e.aggregate_id,
       g.natural_key,
       e.sequence,
       t.name AS event_type,
       CASE WHEN pg_catalog.encode(e.payload, 'hex') ~ ('^((0[1-9a-f]|[1-7][0-9a-f])'
                || '|(c[2-9a-f]|d[0-9a-f])[89ab][0-9a-f]'
                || '|e0[ab][0-9a-f][89ab][0-9a-f]'
                || '|(e[1-9abcef]([89ab][0-9a-f]){2}|ed[89][0-9a-f][89ab][0-9a-f])'
                || '|f0[9ab][0-9a-f]([89ab][0-9a-f]){2}|f[123]([89ab][0-9a-f]){3}|f48[0-9a-f]([89ab][0-9a-f]){2})*$')
            THEN pg_catalog.convert_from(e.payload, 'UTF8')
            ELSE '\x'::text || pg_catalog.encode(e.payload, 'hex')
       END AS payload,
       e.reference,
       pg_catalog.to_char(timestamp '1970-01-01' + (e.event_time / 86400000000)::double precision * interval '1 day'
                   + (e.event_time % 86400000000)::double precision * interval '1 microsecond',
               'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS event_time,
       pg_catalog.to_char(timestamp '1970-01-01' + (e.recorded_at / 86400000000)::double precision * interval '1 day'
                   + (e.recorded_at % 86400000000)::double precision * interval '1 microsecond',
               'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS recorded_at,
       e.correlation_id,
       e.causation_id,
       e.headers
FROM events e
JOIN event_types t     ON t.id = e.event_type_id
JOIN aggregate_types a ON a.id = t.aggregate_type_id
JOIN aggregates g      ON g.id = e.aggregate_id;
