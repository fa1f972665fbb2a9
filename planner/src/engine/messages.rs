//! What goes into the engine and what comes out: the words of its contract, and the keys that both sides use.
//!
//! All of them can be written to a file and read back to the bit, because a recorded run is replayed from them.

use serde::{Deserialize, Serialize};
use tierwise_cost::units::Bytes;

/// An expert of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExpertKey {
    /// Layer of the model.
    pub layer: u32,
    /// Expert of the layer.
    pub expert: u32,
}

/// Index into a plan's tiers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TierId(pub u32);

/// Index into a plan's executors; 0 is the main one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExecutorId(pub u32);

/// Room for one expert in a cache: which pool of the plan ([`CheckedPlan::pools`](crate::CheckedPlan::pools)), which place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SlotId {
    /// Index into [`CheckedPlan::pools`](crate::CheckedPlan::pools).
    pub pool: u32,
    /// Place in the pool, from 0.
    pub index: u32,
}

/// A router's probability of 1 in [`Demand::scores`] and [`Input::Foreseen`]: fixed point, so that runs replay to the bit.
pub const SCORE_ONE: u32 = 1 << 16;

/// What one layer needs in one step.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Demand {
    /// The driver's number for the step; comes back with [`Action::Finish`].
    pub step: u64,
    /// Layer of the model.
    pub layer: u32,
    /// (expert, tokens routed to it), ascending by expert, tokens at least 1.
    pub experts: Vec<(u32, u32)>,
    /// Tokens of the step.
    pub tokens: u32,
    /// (expert, sum over the step's tokens of its router probability in units of 1 / [`SCORE_ONE`]), ascending by expert; experts that
    /// no token ranks among its first 2 x experts per token may be left out; empty when nothing is known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<(u32, u32)>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// The run begins: slots are filled as the plan says. May be left out.
    Begin,
    /// The router of a layer has chosen. One demand per layer at a time.
    Routed(Demand),
    /// What the router of a later layer of this step makes of the current hidden state: a guess at its demand.
    Foreseen {
        /// The driver's number for the step.
        step: u64,
        /// The later layer.
        layer: u32,
        /// How many layers with routed experts lie between: 1 for the next.
        distance: u32,
        /// As [`Demand::scores`].
        scores: Vec<(u32, u32)>,
    },
    /// A load is done.
    Loaded {
        /// The expert.
        key: ExpertKey,
        /// Its slot.
        slot: SlotId,
    },
    /// A wave is computed.
    Computed {
        /// Its layer.
        layer: u32,
        /// Its number.
        wave: u32,
    },
    /// A load failed.
    Failed {
        /// The expert.
        key: ExpertKey,
        /// The slot it was to come into.
        slot: SlotId,
        /// Why, for people.
        reason: String,
    },
    /// The pools are to have these numbers of slots, one for each of [`CheckedPlan::cache_pools`](crate::CheckedPlan::cache_pools). They come and go by and by
    /// ([`Action::Allocate`], [`Action::Release`]), a few after every demand.
    Resize {
        /// By pool: at least one where experts are loaded before use, at most one for each of these.
        slots: Vec<u32>,
    },
}

/// Where an expert's weights are for a computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Location {
    /// In its tier's memory, as planned.
    Resident,
    /// In a slot.
    Slot(SlotId),
}

/// Why something is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// A layer waits for it.
    Demand,
    /// It may be needed soon. A driver may finish demand loads first.
    Prefetch,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// A slot's content is given up; a load into it follows, or its release.
    Evict {
        /// Who leaves.
        key: ExpertKey,
        /// The slot.
        slot: SlotId,
    },
    /// Bring an expert into a slot; answer with `Loaded` or `Failed`.
    Load {
        /// The expert.
        key: ExpertKey,
        /// The slot.
        slot: SlotId,
        /// Its size.
        bytes: Bytes,
        /// The tier it comes from.
        from: TierId,
        /// Why.
        purpose: Purpose,
    },
    /// Compute these experts for the tokens of the layer's demand; answer with `Computed`.
    Compute {
        /// The layer.
        layer: u32,
        /// Number of the wave within the demand, from 0.
        wave: u32,
        /// (expert, where its weights are), ascending by expert.
        experts: Vec<(u32, Location)>,
        /// Who computes.
        executor: ExecutorId,
    },
    /// There is one slot more, which is empty.
    Allocate {
        /// The slot.
        slot: SlotId,
    },
    /// There is one slot less: its memory is given back. It is empty, and nothing is on its way into it.
    Release {
        /// The slot.
        slot: SlotId,
    },
    /// A demand is served.
    Finish {
        /// Its step.
        step: u64,
        /// Its layer.
        layer: u32,
    },
    /// It cannot go on; nothing follows.
    Abort {
        /// Why, for people.
        reason: String,
    },
}
