-- What a role needs that only reads, by `PostgresEngine::read_from` or by SQL on the view event_log.
--
--     psql -v schema=evercore -v role=shop_reports -f read_only.sql postgres://owner@db.example.org/shop
--
-- Run it as the owner of the store, once the store is there (`Builder::migrate`), and again after a new version of the
-- schema. The role itself is made before: CREATE ROLE shop_reports LOGIN PASSWORD '…';
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
    :"schema".aggregates, :"schema".events, :"schema".snapshots, :"schema".commands, :"schema".event_log,
    :"schema".cursors, :"schema".parked_events TO :"role";

COMMIT;
