-- Grants a role the minimal rights to read, append and subscribe. The role can neither change nor delete an event, nor
-- alter a table.
--
--     psql -v schema=evercore -v role=shop_app -f application.sql postgres://owner@db.example.org/shop
--
-- Run it as the owner of the store, after the store was created (`Builder::migrate`), and again after each migration of
-- the schema. Create the role first: CREATE ROLE shop_app LOGIN PASSWORD '…';
\set ON_ERROR_STOP on
BEGIN;

-- Start from no rights on the store. Rights on the owner's other tables stay as they are.
REVOKE ALL ON SCHEMA :"schema" FROM :"role";
REVOKE ALL ON :"schema".store, :"schema".log_end, :"schema".aggregate_types, :"schema".event_types,
    :"schema".aggregates, :"schema".events, :"schema".snapshots, :"schema".commands, :"schema".event_log,
    :"schema".cursors, :"schema".parked_events
    FROM :"role";

GRANT USAGE ON SCHEMA :"schema" TO :"role";
GRANT SELECT ON :"schema".store, :"schema".log_end, :"schema".aggregate_types, :"schema".event_types,
    :"schema".aggregates, :"schema".events, :"schema".snapshots, :"schema".commands TO :"role";

-- Append-only tables: the log, and the tables that grow with it.
GRANT INSERT ON :"schema".events, :"schema".aggregates, :"schema".commands, :"schema".aggregate_types,
    :"schema".event_types TO :"role";

-- `EventStore::forget_commands` needs a role that may delete commands, by default the owner. To let the application
-- do it: GRANT DELETE ON :"schema".commands TO :"role";

-- Rows that change: the end of the log, the mark of the names, the key of an aggregate, its one snapshot.
GRANT UPDATE (position, recorded_at, names) ON :"schema".log_end TO :"role";
GRANT UPDATE (natural_key) ON :"schema".aggregates TO :"role";
GRANT INSERT, UPDATE (sequence, version, state) ON :"schema".snapshots TO :"role";

-- The progress of subscriptions, and the events they have parked.
GRANT SELECT, INSERT, UPDATE, DELETE ON :"schema".cursors, :"schema".parked_events TO :"role";

COMMIT;
