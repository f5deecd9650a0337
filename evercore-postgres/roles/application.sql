-- What a role needs that reads, appends and subscribes, and no more: it can neither change nor remove an event, nor
-- alter a table.
--
--     psql -v schema=evercore -v role=shop_app -f application.sql postgres://owner@db.example.org/shop
--
-- Run it as the owner of the store, once the store is there (`Builder::migrate`), and again after a new version of the
-- schema. The role itself is made before: CREATE ROLE shop_app LOGIN PASSWORD '…';
\set ON_ERROR_STOP on
BEGIN;

-- Whatever it had here before; the owner's other tables are left alone.
REVOKE ALL ON SCHEMA :"schema" FROM :"role";
REVOKE ALL ON :"schema".store, :"schema".log_end, :"schema".aggregate_types, :"schema".event_types,
    :"schema".aggregates, :"schema".events, :"schema".snapshots, :"schema".commands, :"schema".event_log,
    :"schema".cursors, :"schema".parked_events
    FROM :"role";

GRANT USAGE ON SCHEMA :"schema" TO :"role";
GRANT SELECT ON :"schema".store, :"schema".log_end, :"schema".aggregate_types, :"schema".event_types,
    :"schema".aggregates, :"schema".events, :"schema".snapshots, :"schema".commands TO :"role";

-- The log, and what comes with it: what is written here once stays as it is.
GRANT INSERT ON :"schema".events, :"schema".aggregates, :"schema".commands, :"schema".aggregate_types,
    :"schema".event_types TO :"role";

-- Commands are forgotten by a role that may remove them (`EventStore::forget_commands`), by default the owner. If the
-- application is to do so by itself: GRANT DELETE ON :"schema".commands TO :"role";

-- What moves: the end of the log, the mark of the names, the key of an aggregate, its one snapshot.
GRANT UPDATE (position, recorded_at, mark, names) ON :"schema".log_end TO :"role";
GRANT UPDATE (natural_key) ON :"schema".aggregates TO :"role";
GRANT INSERT, UPDATE (sequence, version, state) ON :"schema".snapshots TO :"role";

-- How far subscriptions have come, and what they have put aside.
GRANT SELECT, INSERT, UPDATE, DELETE ON :"schema".cursors, :"schema".parked_events TO :"role";

COMMIT;
