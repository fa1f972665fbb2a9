//! Every byte of every memory has a line, and the lines sum to the capacity.
//!
//! Lines of the main processor's memory: weights that are not routed experts, resident experts, expert cache slots, keys and
//! values, activations of a chunk, staging buffers, reserve, and what is free (algorithms §1). The reserve of VRAM is max(2 %,
//! 512 MiB): over-commit is a cliff. Host memory keeps max(5 %, 2 GiB) for the system, unless a `--ram` limit says what may be used: that
//! is then the budget to the byte, also where a container has little more.

use crate::plan::{BudgetLine, MemoryBudget};
use crate::request::Request;
use tierwise_cost::machine::{Machine, Memory, MemoryKind};
use tierwise_cost::model::{Attention, Ffn, ModelSpec};
use tierwise_cost::units::Bytes;

/// Weights that are not routed experts.
pub const NON_EXPERT_WEIGHTS: &str = "non-expert weights";
/// Routed experts that stay.
pub const RESIDENT_EXPERTS: &str = "resident experts";
/// Slots for routed experts that come and go.
pub const EXPERT_CACHE: &str = "expert cache slots";
/// Keys and values of the whole context of every sequence.
pub const KV: &str = "keys and values";
/// Buffers between operations.
pub const ACTIVATIONS: &str = "activations";
/// Buffers through which experts are copied.
pub const STAGING: &str = "staging";
/// Kept empty: driver, fragmentation, other programs.
pub const RESERVE: &str = "reserve";
/// The rest.
pub const FREE: &str = "free";

/// All line names in the order in which a budget lists them.
pub const LINES: &[&str] = &[NON_EXPERT_WEIGHTS, RESIDENT_EXPERTS, EXPERT_CACHE, KV, ACTIVATIONS, STAGING, RESERVE, FREE];

/// What may be used of memory `m`: all, or its part of the limit for its kind.
pub fn capacity(machine: &Machine, request: &Request, m: &Memory) -> Bytes {
    let installed = m.capacity.value;
    let Some(limit) = request.limits.of(m.kind) else { return installed };
    let total: u64 = machine.memories_of(m.kind).map(|o| o.capacity.value.0).sum();
    // u128: the product of two sizes.
    Bytes((u128::from(limit.0) * u128::from(installed.0) / u128::from(total.max(1))) as u64).min(installed)
}

/// A limit closer than this to what there is leaves too little for anything but the model.
const TIGHT: Bytes = Bytes(64 << 20);

/// What to tell whoever asked for a `--ram` limit that leaves the rest of the system next to nothing.
pub fn tight_ram(machine: &Machine, request: &Request) -> Option<String> {
    let limit = request.limits.ram?;
    let installed: Bytes = machine.memories_of(MemoryKind::Dram).map(|m| m.capacity.value).sum();
    let left = installed.saturating_sub(limit);
    (limit <= installed && left < TIGHT).then(|| {
        format!(
            "--ram {limit} leaves {left} of the {installed} that {} has: the program's own pages and other programs need room beside it",
            machine.name
        )
    })
}

/// What is kept empty of memory `m` with this capacity.
pub fn reserve(request: &Request, m: &Memory, capacity: Bytes) -> Bytes {
    match m.kind {
        MemoryKind::Vram if capacity.0 == 0 => Bytes::ZERO,
        MemoryKind::Vram => Bytes((capacity.0 / 50).max(512 << 20)),
        MemoryKind::Dram if request.limits.ram.is_some() => Bytes::ZERO,
        MemoryKind::Dram => Bytes((m.capacity.value.0 / 20).max(2 << 30)),
        MemoryKind::Cxl | MemoryKind::Disk => Bytes::ZERO,
    }
}

/// Weights that are not routed experts.
pub fn non_expert_weights(spec: &ModelSpec) -> Bytes {
    Bytes(spec.total_bytes().0 - spec.expert_bytes().0)
}

/// Keys and values of the whole context of every sequence.
pub fn kv(spec: &ModelSpec, request: &Request) -> Bytes {
    Bytes(spec.kv_bytes(u64::from(request.context), request.kv_format).0.saturating_mul(u64::from(request.batch)))
}

/// Peak of the buffers between operations, in float32: the residual stream with its norm and delta, queries, keys, values and
/// attention's result, the widest feed-forward part's inner buffers, one row of scores per head, logits.
pub fn activations(spec: &ModelSpec, request: &Request) -> Bytes {
    let tokens = u64::from(request.chunk_tokens.max(request.batch));
    let hidden = u64::from(spec.hidden_size);
    let (mut widest_mixer, mut scores, mut widest_ffn) = (0, 0, 0);
    for layer in &spec.layers {
        let (mixer, heads) = match &layer.attention {
            Attention::Gqa(a) => {
                let gate = if a.output_gate { 2 * u64::from(a.num_heads) } else { 0 };
                (u64::from(a.head_dim) * (2 * u64::from(a.num_heads + a.num_kv_heads) + gate), u64::from(a.num_heads))
            }
            Attention::Mla(a) => {
                // Queries and results per token; in the latent space they are wider, and few tokens are there at a time.
                let heads = u64::from(a.num_heads);
                let narrow = heads * u64::from(a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim);
                scores = scores.max(64 * heads * u64::from(4 * a.kv_lora_rank + a.qk_rope_head_dim));
                (narrow + u64::from(a.kv_lora_rank + a.qk_rope_head_dim), heads)
            }
            // Inputs of the convolution and its result, gate and result.
            Attention::DeltaNet(a) => (2 * u64::from(a.channels()) + 3 * u64::from(a.value_dim()), 0),
            Attention::PlanOnly(m) => (2 * hidden + m.kv_elements_per_token, 64),
        };
        widest_mixer = mixer.max(widest_mixer);
        scores = scores.max(heads * u64::from(request.context));
        let ffn = match &layer.ffn {
            Ffn::Dense(d) => 2 * u64::from(d.inner_size),
            Ffn::Moe(m) => {
                let shared = m.shared.as_ref().map_or(0, |s| u64::from(s.inner_size));
                u64::from(m.experts_per_token) * (2 * u64::from(m.inner_size) + hidden)
                    + u64::from(m.num_experts)
                    + 2 * shared.max(m.parallel_dense_inner_size.map_or(0, u64::from))
            }
            Ffn::None => 0,
        };
        widest_ffn = ffn.max(widest_ffn);
    }
    let logits = u64::from(spec.vocab_size) * u64::from(request.batch);
    Bytes(4 * (tokens * (3 * hidden + widest_mixer + widest_ffn) + scores + logits))
}

/// A budget from its non-zero lines, nothing of it page-locked: in the order of [`LINES`], with the rest as the line "free".
///
/// `None` when the lines exceed the capacity.
pub fn complete(memory: &Memory, capacity: Bytes, uses: &[(&str, Bytes)]) -> Option<MemoryBudget> {
    let used = uses.iter().try_fold(0_u64, |sum, (_, b)| sum.checked_add(b.0))?;
    let free = Bytes(capacity.0.checked_sub(used)?);
    let mut lines: Vec<BudgetLine> = Vec::new();
    for name in LINES {
        let bytes = if *name == FREE { free } else { uses.iter().filter(|(n, _)| n == name).map(|(_, b)| *b).sum() };
        if bytes.0 > 0 || *name == FREE {
            lines.push(BudgetLine { name: (*name).to_string(), bytes });
        }
    }
    Some(MemoryBudget {
        memory: memory.id.clone(),
        kind: memory.kind,
        capacity,
        lines,
        page_locked: Bytes::ZERO,
        numa_nodes: memory.numa_nodes.clone(),
    })
}

impl MemoryBudget {
    /// Bytes of the line of this name, 0 without one.
    pub fn line(&self, name: &str) -> Bytes {
        self.lines.iter().filter(|l| l.name == name).map(|l| l.bytes).sum()
    }
}
