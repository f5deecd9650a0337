//! All faults of broken engines.

/// Writes the enum and its list from one source.
macro_rules! faults {
    ($($(#[$doc:meta])* $fault:ident,)*) => {
        /// A fault of an engine.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Fault {
            $($(#[$doc])* $fault,)*
        }

        impl Fault {
            /// All faults.
            pub const ALL: &[Self] = &[$(Self::$fault,)*];
        }
    };
}

faults! {
    /// A stale append is written after the events that are there.
    ForgetsConflicts,
    /// The last append of a batch of several is lost.
    CommitsHalf,
    /// The appends of a batch are written one by one, and other commits can come between them.
    CommitsInPieces,
    /// Guards are not checked.
    ForgetsGuards,
    /// Command ids are not checked.
    ForgetsCommands,
    /// A known command id gets the first receipt, even if the command is another one.
    ForgetsFingerprints,
    /// Forgetting old commands also forgets young ones.
    ForgetsYoungCommands,
    /// Forgetting commands does nothing.
    KeepsCommands,
    /// Two appends of one batch are swapped.
    MixesUpAppends,
    /// Settling a command looks it up, but a late original can still commit.
    ForgetsToSettle,
    /// A taken key is ignored, and the aggregate is made without it.
    LosesTakenKeys,
    /// A key of one type is taken for all types.
    SharesKeysAmongTypes,
    /// Keys are compared without case and spaces.
    FoldsKeys,
    /// Key changes are lost.
    ForgetsKeyChanges,
    /// Snapshots are not kept.
    LosesSnapshots,
    /// A snapshot of another version is returned as one of the requested version.
    IgnoresSnapshotVersions,
    /// The first event after a snapshot is lost.
    SkipsBehindSnapshots,
    /// A load does not stop where it was asked to.
    LoadsTooMuch,
    /// Pages hold one event more than the limit.
    OverfillsPages,
    /// Pages ignore the limit in bytes.
    IgnoresByteLimits,
    /// A page goes on until it is full or the log ends, however far that is.
    SearchesWithoutEnd,
    /// The page after a full one begins one event too late.
    SkipsBetweenPages,
    /// The page after a full one begins one event too early.
    RepeatsBetweenPages,
    /// A page without events reports that nothing was searched.
    ForgetsWhatWasSearched,
    /// The naive rule: reading goes on after the last position seen, past a commit that has a lower position and ends
    /// later.
    SkipsSlowCommits,
    /// Reading after the head gives an empty page and no error.
    IgnoresCursorsAhead,
    /// The log's filter forgets the aggregate type.
    ForgetsTheTypeFilter,
    /// Of several aggregate types in a filter only the last one counts.
    KnowsOneTypeOfFilter,
    /// The log's filter forgets the reference.
    ForgetsTheReferenceFilter,
    /// The log's filter forgets the correlation id.
    ForgetsTheCorrelationFilter,
    /// Event types match without case.
    FoldsEventTypes,
    /// An aggregate's events come back without reference.
    LosesReferences,
    /// An aggregate's events come back without headers.
    LosesHeaders,
    /// Empty texts come back as missing.
    LosesEmptyTexts,
    /// Payloads are cut at the first NUL byte.
    CutsPayloads,
    /// Event times are stored in milliseconds.
    CutsTimes,
    /// `recorded_at` is taken from the writer's clock.
    BelievesWriters,
    /// Ids are reserved twice.
    RepeatsIds,
    /// A commit wakes no waiter.
    WakesNobody,
    /// Type names of failed commits are remembered.
    RemembersLostNames,
    /// `Debug` shows natural keys.
    ShowsKeys,
    /// A cursor moves for every caller, with any lease.
    IgnoresLeases,
    /// A lease that another owner has is given to the next one that claims it.
    GivesLeasesTwice,
    /// A renewal succeeds, but the lease ends at its old time.
    ForgetsRenewals,
    /// A cursor moves, whatever its old position is.
    MovesFromAnywhere,
    /// A cursor moves past the end of the log.
    MovesPastTheEnd,
    /// A cursor moves, but its parked events are not written.
    LosesParkedEvents,
    /// A cursor moves although parked events have changed since its owner read them.
    OverlooksOperators,
    /// A reset leaves the lease with its owner.
    ResetsSoftly,
    /// Declaring a cursor replaces one that exists.
    DeclaresAgain,
    /// A pause is not stored.
    ForgetsPauses,
    /// A change of several cursors is made cursor by cursor.
    ChangesOneByOne,
    /// A closed engine keeps working.
    ForgetsToClose,
    /// After reopening, cursors without an owner are gone.
    LosesReleasedCursors,
    /// After reopening, the errors that stopped subscriptions are gone.
    ForgetsFailures,
    /// After reopening, no parked event is due.
    ForgetsWhatIsDue,
    /// After reopening, a command id is known, but its fingerprint is not.
    ForgetsContents,
    /// After reopening, a commit wakes no waiter.
    WakesNobodyLater,
    /// The last write reaches the disk only with the next one.
    LosesTheLast,
    /// Steps of cursors reach the disk only with the next commit.
    LosesSteps,
    /// Settled commands do not reach the disk.
    LosesSettling,
    /// Of two commits at the same time one wakes no waiter.
    LosesWakeUps,
    /// Each commit restarts the time of a wait.
    RestartsWaits,
    /// A commit without events ends all waits early.
    EndsWaitsEarly,
    /// After a commit the old head is reported once more.
    TellsOldHeads,
    /// Reading an aggregate backward ignores the limit in bytes.
    IgnoresBytesBackward,
    /// A filtered page that ends at its limit of bytes leaves out the event that did not fit.
    SkipsWhatDoesNotFit,
    /// Of many event types in a filter only the first sixteen count.
    LooksAtFewTypes,
    /// Read backward with a filter, the log ends one event too early.
    StopsShortBackward,
    /// Long keys are compared without their last byte.
    CutsLongKeys,
    /// Listing the cursors of a subscription includes names that begin with its name.
    ListsByPrefix,
    /// Event types are stored in composed normal form.
    ComposesNames,
    /// Empty correlation and causation ids come back as missing.
    LosesEmptyIds,
    /// In one append, events with the same header names get the values of the first event.
    SharesHeaders,
    /// Creating an aggregate whose id is in use changes nothing and succeeds.
    TakesIdsInUse,
    /// A key that a failed unit wanted stays taken.
    KeepsKeysOfFailures,
    /// The appends of a batch with more than a thousand events are written one by one.
    CommitsLargeUnitsInPieces,
    /// A receipt that is looked up has its aggregates in the order of their ids.
    SortsReceipts,
    /// A page that was begun and is not polled delays commits.
    HoldsWriters,
    /// `recorded_at` goes back with the clock.
    BelievesTheClock,
    /// After the clock went back, a lease that seems too long counts as expired.
    EndsLeasesEarly,
    /// Parked events are listed in the order of parking.
    ListsParkedAnyhow,
    /// All versions of a subscription share the parked events of the first one.
    SharesParked,
    /// A cursor that is removed and made again has its old parked events.
    LeavesParked,
    /// A claim reads and writes in two steps.
    RacesForClaims,
    /// Warming up does not register a type without event types.
    ForgetsBareTypes,
    /// Of many guards only the first three are checked.
    ChecksFewGuards,
    /// Of several snapshots in a batch only the last is kept.
    KeepsOneSnapshot,
}
