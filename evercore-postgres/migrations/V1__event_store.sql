-- The schema of an evercore store on PostgreSQL, in a schema that the user chooses. The names below are found by the
-- search path of the transaction that runs this. Names, keys and texts are compared by their bytes. Times are
-- microseconds since 1970, UTC.
--
-- There is no sequence, trigger, function or foreign key. Every row is written by one statement that holds the row of
-- log_end and has checked what a foreign key would check again, row by row.

-- One row: the id of the store, and its schema version.
CREATE TABLE store (
    one            SMALLINT NOT NULL CHECK (one = 1),
    store_id       TEXT     NOT NULL,
    schema_version INTEGER  NOT NULL,
    CONSTRAINT store_one PRIMARY KEY (one)
);
INSERT INTO store VALUES (1, pg_catalog.replace(pg_catalog.gen_random_uuid()::text, '-', ''), 1);

-- One row: the end of the log. A commit updates it first and holds it until the commit is visible, so positions are
-- 1, 2, 3, … in commit order, also on a standby and after a restore.
CREATE TABLE log_end (
    one         SMALLINT NOT NULL CHECK (one = 1),
    position    BIGINT   NOT NULL,
    recorded_at BIGINT   NOT NULL,
    -- A random number that changes with each registered name. While it is the same, the names that were read are
    -- complete and right. It is in this row because the statement that commits locks the row anyway.
    names       BIGINT   NOT NULL
) WITH (
    -- Every commit leaves a dead version of the row. Frequent vacuuming keeps them to a few pages. The table is never
    -- truncated at its end, because that takes a lock that ends queries on standbys.
    autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_scale_factor = 0,
    autovacuum_analyze_threshold = 1000000, autovacuum_analyze_scale_factor = 0, vacuum_truncate = false
);
-- The live version of the row is the first from the top. With a key on `one` each commit would look through the dead
-- versions.
CREATE INDEX log_end_position ON log_end (position);
INSERT INTO log_end VALUES (1, 0, 0, 0);

-- Names get numbers under the lock of the row in log_end: 1, 2, 3, … in commit order.
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

-- The log. The engine writes the position; it is not drawn from a sequence.
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
    -- Finds the events of an aggregate, and refuses the same sequence twice.
    CONSTRAINT events_aggregate_sequence UNIQUE (aggregate_id, sequence)
);
-- A filter that few events match reads one of these indexes instead of the log.
CREATE INDEX events_event_type ON events (event_type_id, position);
CREATE INDEX events_reference ON events (reference, position) WHERE reference IS NOT NULL;
CREATE INDEX events_correlation_id ON events (correlation_id, position) WHERE correlation_id IS NOT NULL;

-- One snapshot per aggregate.
CREATE TABLE snapshots (
    aggregate_id BIGINT  NOT NULL,
    sequence     BIGINT  NOT NULL,
    version      BIGINT  NOT NULL,
    state        BYTEA   NOT NULL,
    CONSTRAINT snapshots_aggregate_id PRIMARY KEY (aggregate_id)
);

-- Commands that took effect, and commands that were settled as never committed (without a receipt).
CREATE TABLE commands (
    command_id  TEXT COLLATE "C" NOT NULL,
    fingerprint BIGINT,
    receipt     TEXT,
    recorded_at BIGINT           NOT NULL, -- old ones may be forgotten
    CONSTRAINT commands_command_id PRIMARY KEY (command_id)
);

-- How far each partition of each version of a subscription has come, and which worker moves it. The owner and the
-- epoch, which grows with every claim, are the lease. All times are by the server's clock.
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
    is_held         BOOLEAN          NOT NULL, -- whether the version waits for its promotion
    status          INTEGER          NOT NULL, -- 0 active, 1 paused, 2 retired
    failed_position BIGINT,
    failed_attempts BIGINT,
    failed_error    TEXT,
    parked_changes  BIGINT           NOT NULL,
    lost_leases     BIGINT           NOT NULL, -- in a row, without a move
    revision        BIGINT           NOT NULL -- how often the row was written
) WITH (
    -- As with log_end, each move leaves a dead version of a row.
    autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_scale_factor = 0,
    autovacuum_analyze_threshold = 1000000, autovacuum_analyze_scale_factor = 0, vacuum_truncate = false
);
-- The live version of each row comes first. The index is not unique on the first three columns, because each move
-- would then look through the dead versions. A cursor is made under the lock of the row in log_end, so there is one
-- of each.
CREATE UNIQUE INDEX cursors_newest ON cursors (subscription, version, partition, revision DESC);

-- Events that a handler could not handle, and that were set aside.
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

-- The log for people: names instead of ids, and the payload and the times as text. A payload that is not text is
-- shown in hexadecimal; the pattern matches well-formed UTF-8 without a NUL. Times are added in days and
-- microseconds, because an interval is multiplied in floating point, which cannot represent every microsecond of ten
-- thousand years.
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
