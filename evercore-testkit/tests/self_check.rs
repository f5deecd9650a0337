//! Who tests the tests: an honest engine passes every case, and every broken one is caught by the cases that are there
//! to catch it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use evercore_memory::MemoryEngine;
use evercore_testkit::broken::{Broken, Fault};
use evercore_testkit::{CASES, Fixture, block_on};

fn passes(name: &str, mut fixture: Fixture) -> bool {
    let case =
        CASES.iter().find(|case| case.name == name).unwrap_or_else(|| panic!("there is no case \"{name}\""));
    catch_unwind(AssertUnwindSafe(|| block_on((case.run)(&mut fixture)))).is_ok()
}

#[test]
fn an_honest_engine_passes_every_case() {
    for case in CASES {
        assert!(passes(case.name, Fixture::shared(Arc::new(MemoryEngine::new()))), "{}", case.name);
    }
}

#[test]
fn an_engine_that_passes_everything_on_is_as_honest_as_what_is_below() {
    // The wrapper itself must not be what is caught: this fault is of one method only, and of no other case.
    for case in CASES.iter().filter(|case| case.name != "values::nothing_shows_a_key_or_a_payload") {
        let engine = Broken::new(Arc::new(MemoryEngine::new()), Fault::ShowsKeys);
        assert!(passes(case.name, Fixture::shared(Arc::new(engine))), "{}", case.name);
    }
}

#[test]
fn every_name_is_there_once() {
    let mut names: Vec<_> = CASES.iter().map(|case| case.name).collect();
    names.sort_unstable();
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
}

const MODEL: &str = "random::a_random_walk_agrees_with_a_model";

/// One test per fault: the cases named here must fail.
macro_rules! faults {
    ($($test:ident: $fault:ident, [$($case:expr),* $(,)?];)*) => {
        $(#[test]
        fn $test() {
            for case in [$($case),*] {
                // A fault that shows in a race only may hide from one run on a busy machine.
                let is_seen = (0..5).any(|_| {
                    let engine = Broken::new(Arc::new(MemoryEngine::new()), Fault::$fault);
                    !passes(case, Fixture::shared(Arc::new(engine)))
                });
                assert!(is_seen, "{case} does not see it");
            }
        })*

        #[test]
        fn every_fault_has_a_test() {
            let tested = [$(Fault::$fault),*];
            for fault in Fault::ALL {
                assert!(tested.contains(fault), "{fault:?}");
            }
        }
    };
}

faults! {
    forgotten_conflicts: ForgetsConflicts, [
        "appends::a_stale_append_is_a_conflict_and_writes_nothing",
        "appends::an_expectation_from_the_future_is_a_conflict",
        "appends::of_racing_appends_one_wins",
        "appends::one_stale_unit_among_fifty_fails_alone",
        "appends::or_nothing_of_it_keys_snapshots_and_command_included",
        "unit_of_work::a_retry_runs_again_on_fresh_state",
        MODEL,
    ];
    half_commits: CommitsHalf, [
        "appends::all_of_a_unit_is_written",
        "commands::a_commit_dropped_at_any_await_is_whole_or_absent",
        "log::the_events_of_a_batch_are_contiguous",
        MODEL,
    ];
    commits_in_pieces: CommitsInPieces, [
        "appends::or_nothing_of_it_keys_snapshots_and_command_included",
        "commands::a_commit_dropped_at_any_await_is_whole_or_absent",
        "log::the_events_of_a_batch_are_contiguous",
        MODEL,
    ];
    forgotten_guards: ForgetsGuards, [
        "unit_of_work::a_stale_guard_is_a_conflict_and_writes_nothing",
        "unit_of_work::a_guard_alone_is_checked",
        "unit_of_work::write_skew_is_prevented_by_guards",
        MODEL,
    ];
    forgotten_commands: ForgetsCommands, [
        "commands::a_known_id_returns_the_first_receipt",
        "commands::a_known_id_with_another_fingerprint_is_command_reused",
        "commands::the_command_id_is_looked_at_before_everything_else",
        "commands::an_id_takes_effect_once_when_sixteen_come_at_once",
        "commands::a_receipt_can_be_asked_for",
    ];
    forgotten_fingerprints: ForgetsFingerprints, [
        "commands::a_known_id_with_another_fingerprint_is_command_reused",
        MODEL,
    ];
    forgotten_young_commands: ForgetsYoungCommands, ["commands::old_commands_are_forgotten_and_young_ones_kept"];
    kept_commands: KeepsCommands, ["commands::old_commands_are_forgotten_and_young_ones_kept"];
    mixed_up_appends: MixesUpAppends, ["appends::events_of_a_batch_lie_in_the_order_of_its_appends", MODEL];
    forgotten_settling: ForgetsToSettle, [
        "commands::a_late_original_cannot_land_after_it_was_settled",
        "commands::settled_is_settled_also_after_reopening",
    ];
    lost_keys: LosesTakenKeys, [
        "keys::a_taken_key_is_key_taken_and_writes_nothing",
        "keys::racing_creations_of_one_key_leave_one_winner",
        MODEL,
    ];
    shared_keys: SharesKeysAmongTypes, ["keys::the_same_key_for_another_type_is_allowed"];
    folded_keys: FoldsKeys, ["keys::keys_compare_bytewise"];
    forgotten_key_changes: ForgetsKeyChanges, [
        "keys::a_changed_key_finds_and_the_old_one_is_free",
        "keys::aggregates_change_keys_with_one_another",
        MODEL,
    ];
    lost_snapshots: LosesSnapshots, [
        "snapshots::a_later_one_takes_its_place",
        "snapshots::one_of_another_version_takes_its_place",
        MODEL,
    ];
    ignored_versions: IgnoresSnapshotVersions, ["snapshots::one_of_another_version_is_not_usable", MODEL];
    events_lost_behind_snapshots: SkipsBehindSnapshots, [
        "snapshots::a_snapshot_comes_with_the_events_behind_it",
        "snapshots::a_load_equals_a_snapshot_and_the_rest_at_every_sequence",
        "snapshots::writers_with_and_without_snapshots_agree",
        MODEL,
    ];
    loads_of_too_much: LoadsTooMuch, [
        "reading::a_load_ends_where_it_is_asked_to",
        "snapshots::one_behind_what_is_asked_for_is_usable_and_one_ahead_is_not",
        MODEL,
    ];
    overfull_pages: OverfillsPages, [
        "reading::a_page_ends_at_its_limit_of_events",
        "reading::a_load_is_a_page_and_the_rest_is_read_behind_it",
        MODEL,
    ];
    unbounded_bytes: IgnoresByteLimits, [
        "reading::a_page_ends_at_its_limit_of_bytes_and_has_one_event_at_least",
        "reading::a_page_counts_the_bytes_of_metadata_too",
    ];
    skips_between_pages: SkipsBetweenPages, [
        "reading::a_page_ends_at_its_limit_of_events",
        "log::a_commit_of_another_engine_is_never_skipped",
        MODEL,
    ];
    doubles_between_pages: RepeatsBetweenPages, [
        "reading::a_page_ends_at_its_limit_of_events",
        "log::a_commit_of_another_engine_is_never_skipped",
        MODEL,
    ];
    forgotten_search: ForgetsWhatWasSearched, ["reading::a_filtered_page_tells_how_far_it_searched"];
    the_naive_reader: SkipsSlowCommits, [
        "log::a_reader_that_follows_64_writers_skips_nothing_and_sees_nothing_twice",
    ];
    ignored_cursors: IgnoresCursorsAhead, [
        "log::reading_forward_from_past_the_head_is_cursor_ahead",
        "log::an_empty_log_knows_a_cursor_that_is_ahead",
    ];
    forgotten_type_filter: ForgetsTheTypeFilter, ["reading::a_filter_means_the_same_to_every_engine", MODEL];
    one_type_of_filter: KnowsOneTypeOfFilter, ["reading::a_filter_means_the_same_to_every_engine", MODEL];
    forgotten_reference_filter: ForgetsTheReferenceFilter, [
        "reading::events_are_found_by_reference_and_by_correlation",
        MODEL,
    ];
    forgotten_correlation_filter: ForgetsTheCorrelationFilter, [
        "reading::events_are_found_by_reference_and_by_correlation",
        MODEL,
    ];
    folded_event_types: FoldsEventTypes, ["reading::a_filter_means_the_same_to_every_engine", MODEL];
    lost_references: LosesReferences, ["reading::every_field_is_equal_on_every_read_path"];
    lost_headers: LosesHeaders, ["reading::every_field_is_equal_on_every_read_path"];
    lost_empty_texts: LosesEmptyTexts, ["reading::every_field_is_equal_on_every_read_path"];
    cut_payloads: CutsPayloads, ["values::any_payload_comes_back"];
    cut_times: CutsTimes, [
        "values::any_time_from_year_1_to_9999_comes_back",
        "reading::every_field_is_equal_on_every_read_path",
    ];
    believed_writers: BelievesWriters, [
        "log::recorded_at_is_the_engines_clock_and_never_goes_back",
        "reading::every_field_is_equal_on_every_read_path",
    ];
    repeated_ids: RepeatsIds, ["aggregates::no_id_is_given_out_twice"];
    unheard_commits: WakesNobody, ["log::a_commit_wakes_all_who_wait_at_once"];
    remembered_names: RemembersLostNames, ["types::an_interner_remembers_only_what_has_committed"];
    shown_keys: ShowsKeys, ["values::nothing_shows_a_key_or_a_payload"];
    ignored_leases: IgnoresLeases, [
        "cursors::every_claim_raises_the_epoch_also_for_the_same_owner",
        "cursors::a_lease_that_has_expired_is_taken_over",
    ];
    leases_given_twice: GivesLeasesTwice, [
        "cursors::a_claim_is_refused_while_another_has_the_lease",
        "cursors::of_racing_claims_one_wins",
        "subscriptions::a_second_claim_is_refused_or_waits_as_asked",
    ];
    forgotten_renewals: ForgetsRenewals, [
        "cursors::a_lease_that_is_renewed_lasts",
        "subscriptions::a_lease_is_renewed_while_the_handler_runs",
    ];
    moves_from_anywhere: MovesFromAnywhere, ["cursors::a_cursor_moves_from_where_it_stands_and_never_back"];
    moves_past_the_end: MovesPastTheEnd, ["cursors::a_cursor_does_not_move_past_the_end_of_the_log"];
    lost_parked_events: LosesParkedEvents, [
        "cursors::parked_events_are_kept_listed_and_forgotten",
        "cursors::cursors_and_parked_events_survive_reopening",
        "cursors::a_step_dropped_at_any_await_is_whole_or_absent",
    ];
    overlooked_operators: OverlooksOperators, ["cursors::a_move_that_knows_less_of_parked_events_is_refused"];
    soft_resets: ResetsSoftly, ["cursors::a_reset_takes_the_lease_and_forgets_what_was_parked"];
    declared_again: DeclaresAgain, [
        "cursors::a_cursor_is_made_once",
        "cursors::racing_declarations_make_one_cursor",
    ];
    forgotten_close: ForgetsToClose, ["closing::what_is_called_later_is_closed"];
    forgotten_pauses: ForgetsPauses, [
        "cursors::every_field_of_a_cursor_comes_back",
        "subscriptions::it_is_paused_and_resumed",
    ];
}
