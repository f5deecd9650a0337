-- Grants a role the minimal rights to read, with `PostgresEngine::read_from` or with SQL on the view event_log.
--
--     psql -v schema=evercore -v role=shop_reports -f read_only.sql postgres://owner@db.example.org/shop
--
-- Run it as the owner of the store, after the store was created (`Builder::migrate`), and again after each migration of
-- the schema. Create the role first: CREATE ROLE shop_reports LOGIN PASSWORD '…';
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
    :"schema".aggregates, :"schema".events, :"schema".snapshots, :"schema".commands, :"schema".event_log,
    :"schema".cursors, :"schema".parked_events TO :"role";

COMMIT;
