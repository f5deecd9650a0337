//! The faults there are.

/// Writes the faults and their list from one place.
macro_rules! faults {
    ($($(#[$doc:meta])* $fault:ident,)*) => {
        /// What is wrong with an engine.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Fault {
            $($(#[$doc])* $fault,)*
        }

        impl Fault {
            /// All faults there are.
            pub const ALL: &[Self] = &[$(Self::$fault,)*];
        }
    };
}

faults! {
    /// A stale append is written behind whatever is there.
    ForgetsConflicts,
    /// The last append of a batch of several is lost.
    CommitsHalf,
    /// The appends of a batch are written one after the other, and between them anything can happen.
    CommitsInPieces,
    /// Guards are not looked at.
    ForgetsGuards,
    /// Command ids are not looked at.
    ForgetsCommands,
    /// A known command is answered with the first receipt, whatever it is for.
    ForgetsFingerprints,
    /// Young commands are forgotten with the old ones.
    ForgetsYoungCommands,
    /// No command is forgotten.
    KeepsCommands,
    /// Two appends of one batch change places.
    MixesUpAppends,
    /// Settling a command asks for it, and does not keep the late original out.
    ForgetsToSettle,
    /// A key that is taken is left out, and the aggregate is made without it.
    LosesTakenKeys,
    /// A key is taken for all types when one type has it.
    SharesKeysAmongTypes,
    /// Keys are compared without case and spaces.
    FoldsKeys,
    /// Key changes are lost.
    ForgetsKeyChanges,
    /// Snapshots are never kept.
    LosesSnapshots,
    /// A snapshot of another version is given out as if it had the one asked for.
    IgnoresSnapshotVersions,
    /// The first event behind a snapshot is lost.
    SkipsBehindSnapshots,
    /// Loads do not end where they are asked to.
    LoadsTooMuch,
    /// Pages hold one event more than asked for.
    OverfillsPages,
    /// Pages are not bounded in bytes.
    IgnoresByteLimits,
    /// The page after a full one begins one event too late.
    SkipsBetweenPages,
    /// The page after a full one begins one event too early.
    RepeatsBetweenPages,
    /// A page that found nothing tells that nothing was searched.
    ForgetsWhatWasSearched,
    /// The naive rule: reads on from the last position seen, past a commit that is slower than its position.
    SkipsSlowCommits,
    /// A cursor past the head reads as "nothing new".
    IgnoresCursorsAhead,
    /// The log's filter forgets the aggregate type.
    ForgetsTheTypeFilter,
    /// Of several aggregate types in a filter the last one counts.
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
    /// Texts that are empty come back as none.
    LosesEmptyTexts,
    /// Payloads end at the first NUL.
    CutsPayloads,
    /// Event times are kept in milliseconds.
    CutsTimes,
    /// The time of recording is taken from the writer's clock.
    BelievesWriters,
    /// Ids are given out twice.
    RepeatsIds,
    /// A commit wakes nobody.
    WakesNobody,
    /// Names of commits that failed are remembered.
    RemembersLostNames,
    /// `Debug` shows natural keys.
    ShowsKeys,
    /// A cursor moves for whoever asks, whatever lease he names.
    IgnoresLeases,
    /// A lease is given to whoever claims it, though another has it.
    GivesLeasesTwice,
    /// A renewal is answered, and the lease ends as if it had not been.
    ForgetsRenewals,
    /// A cursor moves from anywhere.
    MovesFromAnywhere,
    /// A cursor moves past the end of the log.
    MovesPastTheEnd,
    /// A cursor moves and its parked events are forgotten.
    LosesParkedEvents,
    /// A cursor moves although parked events were changed since its owner looked at them.
    OverlooksOperators,
    /// A reset leaves the lease with its owner.
    ResetsSoftly,
    /// A cursor is made anew whenever it is declared.
    DeclaresAgain,
    /// A pause is forgotten.
    ForgetsPauses,
    /// A closed engine goes on.
    ForgetsToClose,
    /// After it is reopened, cursors that nobody holds are gone.
    LosesReleasedCursors,
    /// After it is reopened, no cursor knows why it stopped.
    ForgetsFailures,
    /// After it is reopened, no parked event is due.
    ForgetsWhatIsDue,
    /// After it is reopened, a command id is known and its content is not.
    ForgetsContents,
    /// After it is reopened, a commit wakes nobody.
    WakesNobodyLater,
    /// What was written last reaches the disk with the next write.
    LosesTheLast,
    /// Steps of cursors reach the disk with the next commit.
    LosesSteps,
    /// Settled commands do not reach the disk.
    LosesSettling,
    /// Of two commits at once one wakes nobody.
    LosesWakeUps,
    /// Each commit gives a wait its whole time again.
    RestartsWaits,
    /// A commit without events ends all waits.
    EndsWaitsEarly,
    /// The head is told once more as it was before the last commit.
    TellsOldHeads,
    /// An aggregate read backward is not bounded in bytes.
    IgnoresBytesBackward,
    /// A filtered page that ends at its limit of bytes leaves out the event that did not fit.
    SkipsWhatDoesNotFit,
    /// Of many event types in a filter only the first sixteen count.
    LooksAtFewTypes,
    /// Read backward with a filter, the log ends one event too early.
    StopsShortBackward,
    /// Keys are compared without their last byte, if they are long.
    CutsLongKeys,
    /// Cursors are listed by how their name begins.
    ListsByPrefix,
    /// Event types are kept in composed normal form.
    ComposesNames,
    /// Correlation and causation ids that are empty come back as none.
    LosesEmptyIds,
    /// Events of one append that have the same headers' names get the values of the first.
    SharesHeaders,
    /// An aggregate to be made whose id is in use is left as it is.
    TakesIdsInUse,
    /// A key that a unit wanted which failed stays taken.
    KeepsKeysOfFailures,
    /// The appends of a batch of more than a thousand events are written one after the other.
    CommitsLargeUnitsInPieces,
    /// A receipt that is asked for has its aggregates in the order of their ids.
    SortsReceipts,
    /// A page that was begun and not polled keeps commits waiting.
    HoldsWriters,
    /// The time of recording goes back with the clock.
    BelievesTheClock,
    /// A lease that seems too long, after the clock went back, is no lease.
    EndsLeasesEarly,
    /// Parked events are listed in the order in which they were parked.
    ListsParkedAnyhow,
    /// All versions of a subscription see the parked events of the first.
    SharesParked,
    /// A cursor that is removed and made again finds what was parked before.
    LeavesParked,
    /// A claim looks first and writes later.
    RacesForClaims,
    /// A type is not registered by a warm-up without event types.
    ForgetsBareTypes,
    /// Of many guards only the first three are checked.
    ChecksFewGuards,
    /// Of several snapshots in a batch only the last is kept.
    KeepsOneSnapshot,
}
