//! A loan application: what can happen to it, and what it is after that.

use crate::evercore::{Aggregate, Json};
use serde::{Deserialize, Serialize};

/// A piece of work that people do for an application.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum WorkItem {
    HandleLead,
    AssessFraud,
    CompleteApplication,
    CallAboutMissingFiles,
    CallAboutOffer,
    ValidateApplication,
    ChangeContract,
}

/// What happened: to the application, to an offer made for it, to a work item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ApplicationEvent {
    Submitted { amount_requested: u64 },
    PartlySubmitted,
    PreAccepted,
    Accepted,
    Finalized,
    Approved,
    Registered,
    Activated,
    Declined,
    Cancelled,
    OfferSelected,
    OfferCreated,
    OfferSent,
    OfferSentBack,
    OfferAccepted,
    OfferDeclined,
    OfferCancelled,
    WorkScheduled { item: WorkItem },
    WorkStarted { item: WorkItem },
    WorkCompleted { item: WorkItem },
}

/// An application as its events left it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Application {
    pub(crate) amount_requested: u64,
    pub(crate) submitted: u32,
    pub(crate) approved: u32,
    pub(crate) declined: u32,
    pub(crate) cancelled: u32,
    pub(crate) offers_accepted: u32,
    pub(crate) work_in_progress: i32,
}

impl Aggregate for Application {
    const TYPE: &'static str = "application";
    type Event = ApplicationEvent;
    type Codec = Json;

    fn apply(&mut self, event: ApplicationEvent) {
        use ApplicationEvent as E;
        match event {
            E::Submitted { amount_requested } => {
                self.amount_requested = amount_requested;
                self.submitted += 1;
            }
            E::Approved => self.approved += 1,
            E::Declined => self.declined += 1,
            E::Cancelled => self.cancelled += 1,
            E::OfferAccepted => self.offers_accepted += 1,
            E::WorkStarted { .. } => self.work_in_progress += 1,
            E::WorkCompleted { .. } => self.work_in_progress -= 1,
            E::PartlySubmitted
            | E::PreAccepted
            | E::Accepted
            | E::Finalized
            | E::Registered
            | E::Activated => {}
            E::OfferSelected | E::OfferCreated | E::OfferSent | E::OfferSentBack => {}
            E::OfferDeclined | E::OfferCancelled | E::WorkScheduled { .. } => {}
        }
    }
}

/// The names of the source and ours, side by side.
const STEPS: [(&str, ApplicationEvent); 16] = [
    ("A_PARTLYSUBMITTED", ApplicationEvent::PartlySubmitted),
    ("A_PREACCEPTED", ApplicationEvent::PreAccepted),
    ("A_ACCEPTED", ApplicationEvent::Accepted),
    ("A_FINALIZED", ApplicationEvent::Finalized),
    ("A_APPROVED", ApplicationEvent::Approved),
    ("A_REGISTERED", ApplicationEvent::Registered),
    ("A_ACTIVATED", ApplicationEvent::Activated),
    ("A_DECLINED", ApplicationEvent::Declined),
    ("A_CANCELLED", ApplicationEvent::Cancelled),
    ("O_SELECTED", ApplicationEvent::OfferSelected),
    ("O_CREATED", ApplicationEvent::OfferCreated),
    ("O_SENT", ApplicationEvent::OfferSent),
    ("O_SENT_BACK", ApplicationEvent::OfferSentBack),
    ("O_ACCEPTED", ApplicationEvent::OfferAccepted),
    ("O_DECLINED", ApplicationEvent::OfferDeclined),
    ("O_CANCELLED", ApplicationEvent::OfferCancelled),
];

const WORK: [(&str, WorkItem); 7] = [
    ("W_Afhandelen leads", WorkItem::HandleLead),
    ("W_Beoordelen fraude", WorkItem::AssessFraud),
    ("W_Completeren aanvraag", WorkItem::CompleteApplication),
    ("W_Nabellen incomplete dossiers", WorkItem::CallAboutMissingFiles),
    ("W_Nabellen offertes", WorkItem::CallAboutOffer),
    ("W_Valideren aanvraag", WorkItem::ValidateApplication),
    ("W_Wijzigen contractgegevens", WorkItem::ChangeContract),
];

impl ApplicationEvent {
    /// The event with this name in the source; `None` if it is not known.
    pub(crate) fn from_source(name: &str, transition: &str, amount_requested: u64) -> Option<Self> {
        if let Some((_, item)) = WORK.iter().find(|(known, _)| *known == name) {
            return match transition {
                "SCHEDULE" => Some(Self::WorkScheduled { item: *item }),
                "START" => Some(Self::WorkStarted { item: *item }),
                "COMPLETE" => Some(Self::WorkCompleted { item: *item }),
                _ => None,
            };
        }
        match (name, transition) {
            ("A_SUBMITTED", "COMPLETE") => Some(Self::Submitted { amount_requested }),
            (_, "COMPLETE") => STEPS.iter().find(|(known, _)| *known == name).map(|(_, event)| *event),
            _ => None,
        }
    }

    /// Name and transition in the source.
    pub(crate) fn to_source(self) -> (&'static str, &'static str) {
        let work = |wanted| WORK.iter().find(|(_, item)| *item == wanted).map_or("?", |(name, _)| name);
        match self {
            Self::Submitted { .. } => ("A_SUBMITTED", "COMPLETE"),
            Self::WorkScheduled { item } => (work(item), "SCHEDULE"),
            Self::WorkStarted { item } => (work(item), "START"),
            Self::WorkCompleted { item } => (work(item), "COMPLETE"),
            step => {
                (STEPS.iter().find(|(_, event)| *event == step).map_or("?", |(name, _)| name), "COMPLETE")
            }
        }
    }
}
