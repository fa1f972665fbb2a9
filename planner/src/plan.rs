//! The plan file: everything that was decided, and what was assumed while deciding it.
//!
//! JSON, versioned by its first field; unknown fields are refused. The JSON Schema is generated from these types and committed as
//! `planner/schema/plan.schema.json`. A plan read from a file is only a claim: [`Plan::check`] makes it a [`crate::CheckedPlan`].

use crate::engine::schedule::Rule;
use crate::error::PlanError;
use crate::held_out::HeldOut;
use crate::request::Request;
use crate::settings::SettingsReport;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tierwise_cost::machine::{MemoryKind, ProcessorKind};
use tierwise_cost::units::Bytes;

/// The schema version written and read.
pub const PLAN_VERSION: u32 = 1;

/// A plan as it stands in a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Schema version: 1.
    pub tierwise_plan: u32,
    /// The model it was made for.
    pub model: ModelId,
    /// The machine it was made for.
    pub machine: MachineId,
    /// What was asked for.
    pub request: Request,
    /// Who computes everything but routed experts, and from where.
    pub main: Main,
    /// The places an expert may have; layers refer to them by index.
    pub tiers: Vec<Tier>,
    /// Every layer with routed experts, ascending.
    pub layers: Vec<PlanLayer>,
    /// Every byte of every memory.
    pub budgets: Vec<MemoryBudget>,
    /// What to expect.
    pub predicted: Predicted,
    /// Value of the objective, in seconds.
    pub objective_s: f64,
    /// No placement has a smaller objective, under the same prices.
    pub lower_bound_s: f64,
    /// (objective - bound) / objective.
    pub gap: f64,
    /// How the bound was computed.
    pub bound_method: String,
    /// Who made the placement.
    pub solver: String,
    /// Why that solver, and what it chose between.
    pub solver_reason: String,
    /// Where the numbers behind the predictions come from.
    pub provenance: Vec<Provenance>,
    /// What it is worth on the part of a routing trace that it was not made from; absent without a trace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<HeldOut>,
    /// How the engine works at run time.
    #[serde(default, skip_serializing_if = "EngineSettings::is_default")]
    pub engine: EngineSettings,
    /// The latencies that were asked for; absent when none were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slo: Option<SloReport>,
    /// Why the engine's settings and cache policies are as they are; absent where no expert is loaded before use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<SettingsReport>,
}

/// Latencies asked for, and what became of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SloReport {
    /// Time to the first token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttft: Option<SloLine>,
    /// Time per output token of a sequence: a decode step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpot: Option<SloLine>,
    /// The objective that was found without them: the difference is what they cost. Absent when the placement was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective_without_s: Option<f64>,
}

/// One latency.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SloLine {
    /// What was asked for.
    pub limit_s: f64,
    /// What is predicted.
    pub predicted_s: f64,
    /// The plan without limits would be above it. Absent when the placement was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binds: Option<bool>,
}

/// A model's identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelId {
    /// Name for people.
    pub name: String,
    /// GGUF architecture name.
    pub architecture: String,
    /// [`tierwise_cost::model::ModelSpec::fingerprint`].
    pub fingerprint: String,
    /// Format name for people.
    pub format: String,
}

/// A machine's identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineId {
    /// Name for people.
    pub name: String,
    /// [`tierwise_cost::machine::Machine::fingerprint`].
    pub fingerprint: String,
}

/// The main processor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Main {
    /// Its id.
    pub executor: String,
    /// Its kind.
    pub executor_kind: ProcessorKind,
    /// Its home memory: non-expert weights, keys and values, activations.
    pub memory: String,
    /// Why this one.
    pub reason: String,
}

/// A place an expert may have, and who computes it there.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tier {
    /// The memory that holds it.
    pub memory: String,
    /// That memory's kind.
    pub kind: MemoryKind,
    /// The processor that computes it.
    pub executor: String,
    /// That processor's kind.
    pub executor_kind: ProcessorKind,
    /// The memory with the cache slots into which it is loaded before use; absent when it is computed where it lies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub through: Option<String>,
}

impl Tier {
    /// One line for people: `dram0, computed by cpu0` or `disk0, loaded into dram0, computed by cpu0`.
    pub fn describe(&self) -> String {
        match &self.through {
            None => format!("{}, computed by {}", self.memory, self.executor),
            Some(through) => format!("{}, loaded into {through}, computed by {}", self.memory, self.executor),
        }
    }
}

/// Consecutive experts of a layer in one tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpertRun {
    /// Index into the plan's tiers.
    pub tier: u32,
    /// First expert.
    pub first: u32,
    /// Number of experts.
    pub count: u32,
}

/// How a cache chooses its victims.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CachePolicyKind {
    /// Least recently used.
    #[default]
    Lru,
    /// Least smoothed router probability (HybriMoE).
    Mrs {
        /// Weight of the newest token, in percent.
        alpha_percent: u32,
        /// How many of the largest probabilities count; 0: twice the experts per token.
        top_p: u32,
    },
    /// Least frequently used.
    Lfu {
        /// Counts are halved after so many demands; 0: never.
        halve_every: u32,
    },
    /// Segmented least recently used.
    Slru {
        /// Share of the slots for experts that were used again, in percent.
        protected_percent: u32,
    },
    /// Small, main and ghost queue.
    S3Fifo {
        /// Share of the slots for newcomers, in percent.
        small_percent: u32,
    },
    /// Chance of reuse, learnt while running.
    Adaptive,
}

/// Whence guesses at later demands come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PrefetchKind {
    /// Nothing is prefetched.
    #[default]
    Off,
    /// Learnt from past demands.
    History,
    /// The routers of later layers, evaluated on the current hidden state; history where the driver sends none.
    Lookahead,
}

/// How the slots are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CachePartition {
    /// Every layer has its own.
    #[default]
    PerLayer,
    /// All layers share all slots; their experts must be of one size.
    Global,
}

/// How the engine works at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EngineSettings {
    /// Who computes misses.
    pub schedule: Rule,
    /// What is prefetched.
    pub prefetch: PrefetchKind,
    /// How many layers ahead prefetches look, 1 to 8; of no meaning when nothing is prefetched.
    pub prefetch_layers: u32,
    /// How the slots are shared.
    pub partition: CachePartition,
    /// Whether a miss that was computed at home is loaded afterwards, when its link is idle and the policy thinks more of it than of whom
    /// it would replace.
    pub fill: bool,
    /// Slots for experts that are moved for one step and do not stay; they take room from what the budget stages or leaves free.
    pub staging_slots: u32,
}

impl EngineSettings {
    /// Whether all is as in a plan that says nothing.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// One layer's experts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanLayer {
    /// Layer of the model.
    pub layer: u32,
    /// Bytes of one expert.
    pub expert_bytes: Bytes,
    /// Where the experts are: every expert in exactly one run, ascending.
    pub runs: Vec<ExpertRun>,
    /// Cache slots for experts that are loaded before use.
    pub slots: u32,
    /// How the slots' contents are chosen.
    pub policy: CachePolicyKind,
    /// Experts that are loaded into the slots before the first demand, at most as many as slots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preload: Vec<u32>,
}

/// One memory's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryBudget {
    /// The memory's id.
    pub memory: String,
    /// Its kind.
    pub kind: MemoryKind,
    /// What may be used of it.
    pub capacity: Bytes,
    /// What it is used for; the lines sum to the capacity.
    pub lines: Vec<BudgetLine>,
    /// How much of that is page-locked: staging buffers, and experts that are copied to a GPU.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub page_locked: Bytes,
    /// The NUMA nodes of the machine's description: the runtime puts the memory's experts and slots there, striped if there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub numa_nodes: Vec<u32>,
}

fn is_zero(b: &Bytes) -> bool {
    b.0 == 0
}

/// One use of a memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BudgetLine {
    /// What for; names are those of [`crate::budget`].
    pub name: String,
    /// How much.
    pub bytes: Bytes,
}

/// [`Predicted::prefill_strategy`] where experts are computed where they are planned.
pub const PREFILL_IN_PLACE: &str = "in_place";
/// [`Predicted::prefill_strategy`] where prompts copy experts through staging slots to the main processor.
pub const PREFILL_STREAMED: &str = "streamed";

/// A prediction with an interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Interval {
    /// Best estimate.
    pub value: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Bytes that one generated token reads from a memory or moves over a link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BytesOn {
    /// A memory's id, or `from->to`.
    pub on: String,
    /// Expected bytes per token.
    pub bytes: Bytes,
}

/// What to expect.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Predicted {
    /// Tokens per second of all sequences together, at half of the context.
    pub decode_tokens_per_s: Interval,
    /// Prompt tokens per second.
    pub prefill_tokens_per_s: Interval,
    /// Seconds until the first token of a prompt of the request's length.
    pub ttft_s: Interval,
    /// Seconds per decode step.
    pub decode_step_s: Interval,
    /// How prompts are computed: `in_place` or `streamed` (experts copied to the main processor).
    pub prefill_strategy: String,
    /// Expected share of cached experts found in their slots; absent without a cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hit_rate: Option<Interval>,
    /// Bytes per generated token, by memory and link.
    pub bytes_per_token: Vec<BytesOn>,
    /// What a decode step mostly waits for.
    pub binding: String,
    /// Share of the step during which `binding` is what is waited for.
    pub binding_share: f64,
}

/// Where a number comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Which number.
    pub what: String,
    /// Its value.
    pub value: String,
    /// `measured`, `datasheet` or `prior`.
    pub source: String,
    /// Which measurement, datasheet or reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Plan {
    /// Reads a plan file's text. The version is looked at first, so that a newer file is named as such.
    ///
    /// # Errors
    /// [`PlanError::BadJson`] with line and column, [`PlanError::BadPlan`] for another version.
    pub fn from_json(text: &str) -> Result<Self, PlanError> {
        #[derive(Deserialize)]
        struct Version {
            tierwise_plan: Option<u32>,
        }
        let bad = |e: serde_json::Error| PlanError::BadJson { message: e.to_string() };
        let version: Version = serde_json::from_str(text).map_err(bad)?;
        match version.tierwise_plan {
            Some(PLAN_VERSION) => serde_json::from_str(text).map_err(bad),
            other => Err(PlanError::BadPlan {
                field: "tierwise_plan".into(),
                found: other.map_or_else(|| "absent".into(), |v| v.to_string()),
                expected: format!("{PLAN_VERSION}, the version that this program reads"),
            }),
        }
    }

    /// The text of a plan file.
    ///
    /// # Panics
    /// Never: every field has a JSON form.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("a plan has no map with keys that are not strings");
        text.push('\n');
        text
    }

    /// The JSON Schema of plan files.
    ///
    /// # Panics
    /// Never: a schema is plain JSON.
    pub fn json_schema() -> String {
        let mut text = serde_json::to_string_pretty(&schemars::schema_for!(Self)).expect("a schema is plain JSON");
        text.push('\n');
        text
    }
}
