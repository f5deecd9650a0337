//! The list of all cases. It makes the table for runners and the macro that turns cases into tests.

// A case fails by a panic. All cases are async, even if they do not await.
#![allow(clippy::unwrap_used, clippy::unused_async)]

mod aggregates;
mod appends;
mod changes;
mod closing;
mod commands;
mod cursors;
mod faults;
mod keys;
mod log;
mod log_reader;
mod random;
mod reading;
mod snapshots;
mod storage;
mod subscriptions;
mod types;
mod unit_of_work;
mod values;

use crate::fixture::{Ability, Fixture, LocalFuture};

/// One case: it tests a promise and panics if the engine breaks it.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The module and the name, such as `keys::keys_compare_bytewise`.
    pub name: &'static str,
    /// The abilities it needs in addition to a fresh engine. A harness without one of them skips the case.
    pub needs: &'static [Ability],
    /// The case. The fixture has a fresh engine.
    pub run: for<'a> fn(&'a mut Fixture) -> LocalFuture<'a, ()>,
}

/// Makes the table and the macro from one list, so that they contain the same cases. A case outside of the list is
/// dead code, which the compiler reports.
macro_rules! cases {
    (($d:tt) $($module:ident { $($case:ident $([$($need:ident),*])?,)* })*) => {
        /// All cases, for other runners.
        pub const CASES: &[Case] = &[$($(
            Case {
                name: concat!(stringify!($module), "::", stringify!($case)),
                needs: &[$($(Ability::$need),*)?],
                run: |fixture| Box::pin($module::$case(fixture)),
            },
        )*)*];

        /// Makes a `#[test]` of each case, for the engine of this [`Harness`](crate::Harness), and one test that
        /// lists the skipped cases.
        #[macro_export]
        macro_rules! conformance {
            ($d harness:ty) => {
                mod harness {
                    #[allow(unused_imports)]
                    use super::*;

                    #[test]
                    fn tells_what_it_skips() {
                        $crate::tell_what_is_skipped::<$d harness>();
                    }
                }

                $(mod $module {
                    #[allow(unused_imports)]
                    use super::*;

                    $(#[test]
                    fn $case() {
                        $crate::run::<$d harness>(concat!(stringify!($module), "::", stringify!($case)));
                    })*
                })*
            };
        }
    };
}

cases! {
    ($)
    types {
        known_types_are_listed_in_order,
        case_matters,
        an_event_type_belongs_to_its_aggregate_type,
        concurrent_first_uses_of_a_name_give_one_type,
        an_interner_remembers_only_what_has_committed,
        many_types_in_one_unit_keep_their_names,
        the_longest_name_is_kept,
        a_bad_name_is_refused_where_it_is_born,
        warming_up_registers_names_and_again_is_harmless,
        a_store_warms_up_with_the_names_of_its_codec,
        warming_up_at_once_is_harmless,
        two_engines_on_one_storage_agree [Further],
        a_reader_meets_names_as_they_come [Further],
        names_survive_reopening [Reopen],
        names_compare_bytewise_up_to_the_last_byte,
        a_type_without_events_is_registered_too,
    }
    aggregates {
        a_new_aggregate_is_empty_and_not_missing,
        a_missing_aggregate_differs_from_an_empty_one,
        no_id_is_given_out_twice,
        no_id_is_given_out_twice_by_any_engine_on_the_same_storage [Further],
        no_id_is_given_out_twice_also_after_reopening [Reopen],
        a_block_has_as_many_ids_as_asked_for,
        ids_that_are_not_used_are_lost_and_that_is_harmless,
        an_aggregate_that_does_not_exist_is_not_found,
        an_aggregate_of_another_type_is_wrong_type,
        an_aggregate_is_not_made_twice,
        a_unit_may_make_many_aggregates,
        aggregates_survive_reopening [Reopen],
        an_id_in_use_is_invalid,
    }
    keys {
        an_aggregate_is_found_by_its_key,
        a_taken_key_is_key_taken_and_writes_nothing,
        the_same_key_for_another_type_is_allowed,
        a_changed_key_finds_and_the_old_one_is_free,
        a_key_does_not_change_to_a_taken_one,
        an_aggregate_without_a_key_can_get_one,
        a_key_changes_to_itself,
        a_key_comes_back_to_its_first_holder,
        a_key_change_is_rolled_back_with_its_unit,
        a_key_that_the_same_batch_takes_from_its_holder_is_free,
        aggregates_change_keys_with_one_another,
        keys_compare_bytewise,
        the_longest_key_is_kept,
        a_bad_key_is_refused_where_it_is_born,
        racing_creations_of_one_key_leave_one_winner,
        racing_load_or_create_makes_one_aggregate,
        one_who_lost_a_key_can_go_on,
        a_unit_sees_the_keys_it_gives,
        keys_survive_reopening [Reopen],
        long_keys_differ_in_their_last_byte,
    }
    appends {
        the_first_sequence_is_one_and_there_are_no_holes,
        a_stale_append_is_a_conflict_and_writes_nothing,
        an_append_or_a_guard_that_read_another_event_is_a_conflict,
        an_expectation_from_the_future_is_a_conflict,
        a_new_aggregate_is_at_zero,
        a_conflict_names_the_aggregate_that_is_stale,
        a_hot_aggregate_has_no_hole_and_no_double,
        of_racing_appends_one_wins,
        an_empty_unit_is_fine_and_writes_nothing,
        a_thousand_events_go_in_one_unit,
        the_largest_unit_is_written_and_a_larger_one_refused,
        all_of_a_unit_is_written,
        or_nothing_of_it_keys_snapshots_and_command_included,
        units_of_three_aggregates_in_any_order_never_deadlock,
        events_of_a_batch_lie_in_the_order_of_its_appends,
        the_receipt_tells_where_the_events_stand,
        one_stale_unit_among_fifty_fails_alone,
        two_engines_on_one_storage_see_each_others_appends [Further],
        what_is_acknowledged_is_there_after_reopening [Reopen],
        what_a_failed_unit_wanted_is_free,
        no_poll_of_a_large_commit_takes_half_its_time [OffThread],
    }
    faults {
        a_settled_command_goes_before_a_stale_append,
        a_wrong_type_goes_before_a_wrong_sequence,
        the_first_append_goes_before_the_next,
        a_stale_append_goes_before_a_guard_on_nothing,
        a_stale_guard_goes_before_a_snapshot_of_nothing,
        a_snapshot_of_nothing_goes_before_a_key_of_another_type,
        a_key_of_another_type_goes_before_a_taken_key,
        a_taken_key_goes_before_an_id_in_use,
        a_stale_append_or_guard_goes_before_an_id_in_use,
    }
    unit_of_work {
        nothing_is_visible_before_the_commit,
        an_aggregate_loaded_twice_has_the_staged_events,
        dropping_it_writes_nothing,
        an_error_in_it_leaves_nothing,
        a_panic_in_it_leaves_nothing_and_a_healthy_engine,
        a_panic_while_recording_leaves_aggregate_and_unit_as_before,
        a_stale_guard_is_a_conflict_and_writes_nothing,
        a_guard_that_holds_lets_the_unit_through,
        a_guard_alone_is_checked,
        a_guard_on_an_aggregate_that_the_batch_makes_is_at_zero,
        write_skew_is_prevented_by_guards,
        write_skew_is_possible_without_guards,
        racing_guards_never_let_both_through,
        a_handle_of_a_repeated_command_is_not_committed,
        a_guard_on_what_never_was_does_not_hold,
        a_handle_is_good_for_every_engine_on_the_same_storage [Further],
        a_guard_on_an_older_read_is_a_conflict,
        joined_headers_keep_their_limit,
        a_retry_runs_again_on_fresh_state,
        a_retry_is_bounded,
        the_users_own_errors_are_not_tried_again,
        an_invalid_state_is_not_staged_and_leaves_the_aggregate_as_before,
        racing_updates_all_count,
        a_decision_without_events_writes_nothing,
        one_event_may_override_the_metadata_of_its_unit,
        a_lost_race_to_create_is_a_conflict_whatever_else_the_unit_renames,
        updates_of_a_store_with_metadata_carry_it,
        every_guard_is_checked,
    }
    commands {
        a_known_id_returns_the_first_receipt,
        the_command_id_is_looked_at_before_everything_else,
        a_known_id_with_another_fingerprint_is_command_reused,
        an_id_takes_effect_once_when_sixteen_come_at_once,
        an_id_takes_effect_once_also_after_reopening [Reopen],
        an_id_takes_effect_once_on_all_engines_of_one_storage [Further],
        a_receipt_can_be_asked_for,
        a_large_receipt_comes_back_equal,
        a_command_that_writes_nothing_has_a_receipt_too,
        a_command_that_failed_can_be_tried_again,
        settling_a_command_that_took_effect_gives_its_receipt,
        a_late_original_cannot_land_after_it_was_settled,
        settled_is_settled_also_after_reopening [Reopen],
        a_race_of_commit_and_settle_ends_one_way,
        command_ids_compare_bytewise_up_to_the_longest,
        a_commit_dropped_at_any_await_is_whole_or_absent,
        every_future_may_be_dropped_at_any_await,
        an_update_with_a_command_id_decides_once,
        without_a_command_id_a_unit_that_is_sent_twice_may_land_twice,
        a_receipt_keeps_the_order_of_its_unit,
        a_known_id_for_another_aggregate_is_command_reused,
        a_command_that_is_decided_again_may_have_other_events,
        a_command_that_sees_its_own_effect_is_not_refused,
        a_command_with_a_word_is_told_by_it,
        a_command_of_several_aggregates_takes_effect_once,
        an_update_that_creates_takes_effect_once,
        a_refused_command_is_not_remembered,
        old_commands_are_forgotten_and_young_ones_kept,
        thousands_of_commands_are_forgotten,
    }
    reading {
        an_aggregate_is_read_behind_from_and_up_to_to,
        an_aggregate_is_read_backward_too,
        a_missing_aggregate_reads_empty,
        the_log_is_read_behind_from_and_up_to_to,
        a_page_ends_at_its_limit_of_events,
        a_page_of_the_largest_limit_is_read_and_a_larger_one_refused,
        a_page_ends_at_its_limit_of_bytes_and_has_one_event_at_least,
        a_page_counts_the_bytes_of_metadata_too,
        a_load_is_a_page_and_the_rest_is_read_behind_it,
        a_load_ends_where_it_is_asked_to,
        a_long_history_is_folded_whole,
        a_load_by_key_equals_a_load_by_id,
        reading_while_others_append_sees_a_prefix,
        a_filter_means_the_same_to_every_engine,
        events_are_found_by_reference_and_by_correlation,
        a_name_that_no_event_has_yet_matches_as_soon_as_one_has_it,
        a_filtered_page_tells_how_far_it_searched,
        every_field_is_equal_on_every_read_path,
        the_log_is_the_union_of_the_aggregates_events,
        an_aggregate_is_loaded_as_of_a_sequence_a_position_and_a_time,
        an_event_that_does_not_decode_is_named,
        page_after_page_is_the_log_read_whole,
        page_after_page_is_an_aggregate_read_whole,
        a_filter_may_have_many_event_types,
        a_page_that_looks_at_events_one_by_one_ends_after_a_bound,
        a_large_unit_is_seen_whole_or_not_at_all,
    }
    log {
        an_empty_log_ends_at_zero,
        positions_have_no_holes_after_conflicts_and_rollbacks,
        the_events_of_a_batch_are_contiguous,
        a_reader_that_follows_64_writers_skips_nothing_and_sees_nothing_twice,
        a_commit_of_another_engine_is_never_skipped [Further],
        positions_survive_reopening [Reopen],
        reading_forward_from_past_the_head_is_cursor_ahead,
        a_page_tells_at_which_events_it_began_and_ended,
        an_empty_log_knows_a_cursor_that_is_ahead,
        recorded_at_is_the_engines_clock_and_never_goes_back,
        a_position_is_found_by_the_time_of_recording,
        waiting_ends_at_once_if_there_is_something,
        waiting_ends_when_time_is_up,
        a_commit_wakes_all_who_wait_at_once,
        a_pause_lets_time_pass,
        a_reader_that_stands_still_does_not_stall_writers,
        two_commits_at_once_wake_all_who_wait_for_both,
        after_an_answer_nothing_tells_of_less,
        waiting_ends_when_time_is_up_also_while_others_commit,
        a_commit_without_events_ends_no_wait,
        a_begun_page_holds_nothing_that_others_need,
        recorded_at_never_goes_back_when_the_clock_does [TurnClockBack],
        a_lease_is_not_lost_when_the_clock_goes_back [TurnClockBack],
    }
    storage {
        all_of_a_store_is_there_after_reopening [Reopen],
        all_of_a_store_is_there_after_a_crash [CrashImage],
        what_is_acknowledged_is_there_after_a_crash [CrashImage],
    }
    log_reader {
        it_gives_what_page_after_page_gives,
        at_the_end_it_looks_again_for_what_came_later,
        two_that_follow_writers_skip_nothing_and_see_nothing_twice,
        its_next_may_be_dropped_at_any_await,
        a_cursor_past_the_head_is_an_error_each_time,
    }
    snapshots {
        a_snapshot_comes_with_the_events_behind_it,
        a_later_one_takes_its_place,
        an_earlier_one_does_not_take_its_place,
        one_of_another_version_takes_its_place,
        one_of_another_version_is_not_usable,
        the_largest_version_is_kept,
        one_ahead_of_the_aggregate_is_not_kept,
        one_of_the_events_of_its_own_unit_is_kept,
        one_behind_what_is_asked_for_is_usable_and_one_ahead_is_not,
        one_is_rolled_back_with_its_unit,
        one_of_a_missing_aggregate_is_not_found,
        any_state_comes_back,
        snapshots_survive_reopening [Reopen],
        a_load_equals_a_snapshot_and_the_rest_at_every_sequence,
        a_changed_shape_is_read_from_the_events,
        one_that_does_not_decode_is_ignored_and_counted,
        writers_with_and_without_snapshots_agree,
        every_snapshot_of_a_unit_is_kept,
    }
    values {
        any_payload_comes_back,
        the_largest_payload_comes_back,
        a_payload_over_the_limit_is_refused_before_it_is_copied,
        any_time_from_year_1_to_9999_comes_back,
        a_time_out_of_range_is_refused_where_it_is_born,
        nanoseconds_are_cut_the_same_everywhere,
        negative_and_zero_numbers_are_refused_where_they_are_born,
        hard_texts_come_back_in_every_field,
        the_largest_metadata_comes_back,
        bad_metadata_is_refused_where_it_is_born,
        deep_json_comes_back,
        nothing_shows_a_key_or_a_payload,
        empty_texts_are_not_none,
        each_event_of_a_unit_keeps_its_own_metadata,
    }
    cursors {
        a_cursor_is_made_once,
        cursors_are_listed_in_order_with_the_engines_time,
        a_claim_is_refused_while_another_has_the_lease,
        every_claim_raises_the_epoch_also_for_the_same_owner,
        lost_leases_are_counted_until_the_cursor_moves,
        a_reported_failure_leaves_the_lease,
        a_lease_that_has_expired_is_taken_over,
        a_lease_that_is_renewed_lasts,
        a_move_renews_the_lease,
        a_cursor_moves_from_where_it_stands_and_never_back,
        a_cursor_does_not_move_past_the_end_of_the_log,
        a_move_that_read_another_event_is_refused,
        of_racing_claims_one_wins,
        of_racing_claims_one_wins_whichever_engine_it_came_by [Further],
        racing_declarations_make_one_cursor,
        racing_moves_are_made_one_after_the_other,
        every_field_of_a_cursor_comes_back,
        parked_events_are_kept_listed_and_forgotten,
        a_move_that_knows_less_of_parked_events_is_refused,
        a_reset_takes_the_lease_and_forgets_what_was_parked,
        a_retired_or_removed_cursor_is_nobodys,
        cursors_and_parked_events_survive_reopening [Reopen],
        a_step_dropped_at_any_await_is_whole_or_absent,
        each_cursor_has_its_own_parked_events_in_order,
        a_backlog_tells_what_each_cursor_has_to_do,
        cursors_are_listed_by_the_whole_name,
        every_step_is_kept_with_all_that_came_of_it,
    }
    changes {
        a_change_returns_the_subscription_as_it_is_listed,
        a_change_that_is_refused_changes_no_cursor,
        a_change_is_seen_as_a_whole_and_loses_no_step,
        racing_declarations_make_each_version_once_and_whole,
        a_version_takes_over_with_all_partitions_at_once,
        a_take_over_waits_for_what_is_paused_parked_or_held,
        versions_are_promoted_and_rolled_back_in_one_step,
        nothing_that_changes_nothing_is_a_success,
        changes_from_two_engines_follow_one_another [Further],
    }
    subscriptions {
        it_begins_where_it_is_told_to,
        a_first_version_has_its_past_as_replay_unless_told_otherwise,
        at_the_end_of_an_empty_store_it_misses_nothing_after_a_restart,
        a_second_claim_is_refused_or_waits_as_asked,
        an_owner_that_dies_is_replaced_and_nothing_is_missed,
        a_lease_is_renewed_while_the_handler_runs,
        a_failing_handler_is_tried_again,
        then_it_stops_and_says_where,
        after_a_stop_nobody_tries_at_full_speed,
        then_it_skips,
        then_it_parks_and_later_events_of_the_aggregate_wait,
        then_it_parks_alone_and_all_others_go_on,
        a_parked_event_is_resumed_and_dropped_while_it_runs,
        what_was_parked_is_not_forgotten_by_a_reset_nor_resumed_in_vain,
        operators_of_the_same_store_are_heard_at_once,
        an_event_that_does_not_decode_is_a_failure_too,
        a_handler_that_panics_has_failed,
        a_batch_that_fails_is_tried_one_by_one,
        a_run_outlasts_every_error_of_the_store,
        a_mistake_of_the_program_ends_a_run_that_begins,
        a_failed_acknowledgement_repeats_no_event,
        a_partition_that_fails_rests_and_the_others_go_on,
        the_function_decides_about_each_failure,
        while_a_dependency_is_down_one_event_is_tried_and_no_try_counts,
        a_handler_that_takes_too_long_has_failed,
        an_event_at_which_lease_after_lease_is_lost_is_given_up,
        tries_of_another_owner_count,
        events_are_acknowledged_before_the_end_of_a_long_batch,
        a_pause_takes_effect_between_two_events,
        with_a_spawner_a_handler_that_blocks_keeps_its_lease,
        with_a_spawner_partitions_run_at_the_same_time,
        parked_events_are_tried_again_by_time,
        events_that_wait_for_a_parked_one_outlast_a_cut_delivery,
        with_too_many_parked_events_the_partition_rests,
        a_filter_that_matches_rarely_still_moves_the_cursor,
        a_changed_filter_takes_effect_after_the_claim_and_whole,
        a_new_event_type_stops_a_subscription_that_names_those_it_knows,
        an_unknown_type_can_be_parked_until_a_program_knows_it,
        one_event_of_one_partition_is_skipped_and_nothing_else,
        one_partition_is_paused_reset_and_resumed_alone,
        it_is_paused_and_resumed,
        it_is_reset_while_it_runs_and_tells_what_is_a_replay,
        a_shutdown_acknowledges_what_is_done_and_nothing_else,
        a_handler_that_does_not_end_is_dropped_after_the_grace,
        dropping_a_runner_acknowledges_nothing,
        runners_that_come_and_go_miss_nothing,
        delivery_equals_storage_in_every_field,
        an_ephemeral_subscription_follows_the_log_and_writes_nothing,
        a_new_version_is_built_beside_the_old_one_and_takes_over,
        versions_that_run_side_by_side_change_over_without_a_gap,
        a_version_that_fails_does_not_take_over,
        a_version_takes_over_when_all_its_partitions_have_handled_enough,
        a_version_catches_up_with_one_that_never_stands_still,
        a_held_version_follows_and_waits_for_its_promotion,
        a_roll_back_goes_on_where_the_newer_version_was,
        a_run_stands_by_while_its_version_is_retired,
        a_take_over_drops_no_parked_event,
        what_an_operator_asks_of_a_retired_version_is_an_error,
        versions_that_are_declared_at_once_end_with_the_newest [Further],
        who_wrote_it_can_wait_until_a_projection_has_it,
        partitions_share_the_work_and_keep_each_aggregates_order,
        partitions_are_shared_evenly_when_runners_come_and_go,
        equal_keys_belong_to_one_partition_and_stay_in_order,
        a_parked_event_holds_back_its_aggregate_in_its_partition,
        a_new_version_may_have_another_number_of_partitions,
        a_lag_is_told_in_events_and_in_time,
        the_health_tells_what_is_wrong_with_live_versions,
        a_sample_of_the_health_ends_with_the_shutdown,
        a_cursor_ahead_of_the_log_is_an_error,
        futures_of_subscriptions_are_send,
    }
    closing {
        what_is_called_later_is_closed,
        a_wait_that_is_under_way_ends_at_once,
        a_commit_under_way_is_written_or_an_error [Reopen],
    }
    random {
        a_random_walk_agrees_with_a_model,
        a_second_walk_agrees_too,
        a_third_walk_agrees_too,
        a_fourth_walk_agrees_too,
    }
}
