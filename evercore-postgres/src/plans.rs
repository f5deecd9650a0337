//! Tests of all statements: each plan uses an index, on an empty store and on a full one, because a plan is made once
//! and kept; and each statement runs only PostgreSQL's own functions and operators.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

use std::collections::BTreeSet;
use std::sync::Arc;

use evercore_core::engine::{Append, Batch, NewAggregate, NewEvent, Payload, Snapshot};
use evercore_core::{AggregateType, CommandId, EventType, Key, Metadata, Sequence, StorageEngine, Timestamp};
use evercore_testkit::postgres;
use serde_json::Value;
use tokio_postgres::Client;

use crate::connection::user_sql::START_TIME;
use crate::migrate::INSPECT;
use crate::postgres_engine::PostgresEngine;
use crate::sql::{MADE, Sql};

/// The tables that grow, with their indexes, and the columns that a condition must have so that the index is not read
/// from end to end.
const INDEXES: [(&str, &str, &[&str]); 12] = [
    ("log_end", "log_end_position", &["position"]),
    ("events", "events_position", &["position"]),
    ("events", "events_aggregate_sequence", &["aggregate_id"]),
    ("events", "events_event_type", &["event_type_id"]),
    ("events", "events_reference", &["reference", "position"]),
    ("events", "events_correlation_id", &["correlation_id", "position"]),
    ("aggregates", "aggregates_id", &["id"]),
    ("aggregates", "aggregates_natural_key", &["aggregate_type_id", "natural_key"]),
    ("commands", "commands_command_id", &["command_id"]),
    ("snapshots", "snapshots_aggregate_id", &["aggregate_id"]),
    ("cursors", "cursors_newest", &["subscription"]),
    ("parked_events", "parked_events_id", &["subscription", "version", "partition"]),
];

/// Opens an engine. Returns all its statements, too.
async fn open(schema: &str, url: &str) -> (PostgresEngine, Vec<Sql>) {
    MADE.take();
    let engine = PostgresEngine::builder().schema(schema).unwrap().connect(url).await.unwrap();
    engine.store().with_sql.batches.make_all();
    engine.store().log.make_all();
    (engine, MADE.take())
}

async fn plan(client: &Client, sql: &Sql) -> Value {
    let types: Vec<&str> = sql.types().iter().map(|kind| kind.name()).collect();
    let list =
        |items: Vec<&str>| if items.is_empty() { String::new() } else { format!("({})", items.join(", ")) };
    let (types, nulls) = (list(types.clone()), list(vec!["NULL"; types.len()]));
    client.batch_execute(&format!("PREPARE it{types} AS {}", sql.text())).await.unwrap();
    let rows = client.simple_query(&format!("EXPLAIN (FORMAT JSON) EXECUTE it{nulls}")).await.unwrap();
    client.batch_execute("DEALLOCATE it").await.unwrap();
    let text = rows.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    serde_json::from_str(text.unwrap()).unwrap()
}

/// Finds the faults of a plan: a growing table that is read from end to end, or sorted.
fn faults(node: &Value, faults: &mut Vec<String>) {
    let of = |name: &str| node[name].as_str().unwrap_or_default();
    let (kind, table, index) = (of("Node Type"), of("Relation Name"), of("Index Name"));
    let condition = of("Index Cond");
    let grows = INDEXES.iter().any(|known| known.0 == table);
    let is_well = match kind {
        "Sort" | "Incremental Sort" => false,
        "Index Scan" | "Index Only Scan" if grows => INDEXES
            .iter()
            .any(|known| known.1 == index && known.2.iter().all(|column| condition.contains(column))),
        "Seq Scan" | "Bitmap Heap Scan" => !grows,
        _ => true,
    };
    if !is_well {
        faults.push(format!("{kind} on {table} by {index}, {condition}"));
    }
    let below = node["Plans"].as_array().into_iter().flatten();
    below.for_each(|node| self::faults(node, faults));
}

async fn check(engine: &PostgresEngine, statements: &[Sql], when: &str) {
    // Under the settings of the engine's own sessions.
    let client = engine.pool().get().await.unwrap();
    assert!(statements.len() > 100, "{}", statements.len());
    let mut bad = String::new();
    for sql in statements {
        let plan = plan(&client, sql).await;
        let mut found = Vec::new();
        faults(&plan[0]["Plan"], &mut found);
        if !found.is_empty() {
            bad += &format!("{found:#?}\n{}\n\n", sql.text());
        }
    }
    assert!(bad.is_empty(), "{when}:\n{bad}");
}

fn event(name: &str, case: usize) -> NewEvent {
    let metadata = match case % 4 {
        0 => Metadata::new()
            .with_reference(format!("case {case}"))
            .unwrap()
            .with_correlation_id("talk")
            .unwrap(),
        _ => Metadata::new(),
    };
    NewEvent {
        event_type: EventType::new(name).unwrap(),
        payload: Payload::new(vec![b'x'; 200]).unwrap(),
        time: Timestamp::now(),
        metadata: Arc::new(metadata),
    }
}

/// Some thousands of events of six types, on eighty aggregates of two types with keys, snapshots and commands.
async fn fill(engine: &PostgresEngine) {
    for n in 0..80 {
        let id = engine.reserve(1).await.unwrap().next().unwrap();
        let aggregate_type = AggregateType::new(["order", "invoice"][n % 2]).unwrap();
        let mut batch = Batch::new();
        let key = Some(Key::new(format!("key {n}")).unwrap());
        batch.create(NewAggregate { id, aggregate_type: aggregate_type.clone(), key }).unwrap();
        let events = (0..60).map(|m| event(["Placed", "Changed", "Paid"][m % 3], n + m)).collect();
        batch.append(Append { aggregate: id, aggregate_type, expected: Sequence::ZERO, events }).unwrap();
        let state = Payload::new(b"{}").unwrap();
        batch.snapshot(id, Snapshot { sequence: Sequence::new(50).unwrap(), version: 1, state });
        batch.set_command(CommandId::new(format!("command {n}")).unwrap(), None);
        engine.commit(batch).await.unwrap();
    }
}

#[test]
fn every_statement_uses_an_index_on_an_empty_and_on_a_full_store() {
    let Some(url) = postgres::shared_url() else { return };
    let schema = format!("plans_{}", std::process::id());
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let (engine, statements) = open(&schema, &url).await;
        check(&engine, &statements, "empty").await;
        postgres::psql(&url, "ANALYZE").unwrap();
        check(&engine, &statements, "empty, with statistics").await;
        fill(&engine).await;
        check(&engine, &statements, "full, with the statistics of an empty store").await;
        postgres::psql(&url, "ANALYZE").unwrap();
        check(&engine, &statements, "full").await;
        postgres::psql(&url, &format!("DROP SCHEMA {schema} CASCADE")).unwrap();
    });
}

/// The types with which our statements compute.
const TYPES: [&str; 16] = [
    "smallint",
    "integer",
    "bigint",
    "real",
    "double precision",
    "numeric",
    "text",
    "varchar",
    "name",
    "bytea",
    "boolean",
    "timestamptz",
    "interval",
    "bigint[]",
    "integer[]",
    "text[]",
];

const OPERATORS: [&str; 10] = ["=", "<>", "<", "<=", ">", ">=", "+", "-", "*", "/"];

/// Creates, in a separate schema, operators for all types for which pg_catalog has none. If both schemas had one,
/// PostgreSQL would use that of pg_catalog.
fn hostile_operators(schema: &str) -> String {
    let mut sql = format!("CREATE SCHEMA {schema}; SET search_path = {schema};\n");
    for left in TYPES {
        for right in TYPES {
            for result in ["boolean", "bigint"] {
                sql += &format!(
                    "CREATE FUNCTION of_{result}({left}, {right}) RETURNS {result} LANGUAGE sql AS 'SELECT NULL::{result}';\n"
                );
            }
            for operator in OPERATORS {
                let result = if "+-*/".contains(operator) { "bigint" } else { "boolean" };
                sql += &format!(
                    "CREATE OPERATOR {operator} (FUNCTION = of_{result}, LEFTARG = {left}, RIGHTARG = {right});\n"
                );
            }
        }
    }
    sql
}

/// Finds calls of functions without a schema, except those that are part of the SQL grammar. `unnest` of several arrays
/// is part of it too.
fn unqualified_calls(text: &str) -> Vec<String> {
    const GRAMMAR: [&str; 7] = ["coalesce", "greatest", "least", "extract", "max", "values", "exists"];
    let is_of_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_' || letter == '.';
    let mut calls = Vec::new();
    for (place, _) in text.match_indices('(') {
        let before = &text[..place];
        let start = before.rfind(|letter| !is_of_name(letter)).map_or(0, |end| end + 1);
        let name = &before[start..];
        let is_list = name == "unnest" && {
            let arguments = &text[place..place + text[place..].find(')').unwrap_or(0)];
            arguments.contains(',')
        };
        let is_ours =
            name.is_empty() || name.starts_with("pg_catalog.") || GRAMMAR.contains(&name) || is_list;
        if !is_ours {
            calls.push(name.to_owned());
        }
    }
    calls
}

/// A role that may create objects in a schema of the search path, such as `public`, could create a function or an
/// operator that fits a call better than PostgreSQL's own. It would run with the rights of the application.
#[test]
fn no_statement_runs_functions_or_operators_of_others() {
    let Some(url) = postgres::shared_url() else { return };
    let name = format!("hijack_{}", std::process::id());
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let (engine, statements) = open(&name, &url).await;
        let mut all: Vec<(String, Vec<String>)> = statements
            .iter()
            .map(|sql| (sql.text().to_owned(), sql.types().iter().map(|kind| kind.name().to_owned()).collect()))
            .collect();
        all.push((INSPECT.to_owned(), vec!["text".to_owned()]));
        all.push((START_TIME.to_owned(), Vec::new()));
        let calls: BTreeSet<_> = all.iter().flat_map(|(text, _)| unqualified_calls(text)).collect();

        let client = engine.pool().get().await.unwrap();
        client.batch_execute(&hostile_operators(&format!("{name}_others"))).await.unwrap();
        for (number, (text, types)) in all.iter().enumerate() {
            // The server parses the body now, and records the objects on which it depends.
            let make = format!(
                "CREATE FUNCTION {name}.s{number}({}) RETURNS void LANGUAGE sql BEGIN ATOMIC {text}; END",
                types.join(", ")
            );
            client.batch_execute(&make).await.unwrap_or_else(|error| panic!("{error:?}: {make}"));
        }
        let taken = "SELECT DISTINCT d.objid::regproc::text, o.oid::regoperator::text
                     FROM pg_depend d JOIN pg_operator o ON d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid
                     WHERE d.classid = 'pg_proc'::regclass AND o.oprnamespace = $1::text::regnamespace";
        let taken = client.query(taken, &[&format!("{name}_others")]).await.unwrap();
        let taken: Vec<String> = taken
            .iter()
            .map(|row| {
                let (number, operator): (String, String) = (row.get(0), row.get(1));
                let number: usize = number.rsplit_once(".s").unwrap().1.parse().unwrap();
                format!("{operator} in {}", all[number].0)
            })
            .collect();
        let some = &taken[..taken.len().min(3)];
        assert!(calls.is_empty() && taken.is_empty(), "not qualified: {calls:?}; of others: {}, {some:#?}", taken.len());
        client.batch_execute(&format!("DROP SCHEMA {name} CASCADE; DROP SCHEMA {name}_others CASCADE")).await.unwrap();
        drop(deadpool_postgres::Object::take(client));
    });
}
