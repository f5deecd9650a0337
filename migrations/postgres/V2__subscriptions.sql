-- The schema of an evercore store on PostgreSQL, version 2: the cursors of durable subscriptions.

UPDATE store SET schema_version = 2 WHERE one = 1;

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
    CONSTRAINT cursors_id PRIMARY KEY (subscription, version, partition)
);

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
