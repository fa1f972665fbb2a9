//! Buffers between operations on the device, each a block of its own: an operation reads and writes different blocks.
//!
//! Sizes are those of the longest step. The plan's line "activations" is the frame: feed-forward networks go through their inner
//! buffers in as many parts as it takes to stay inside (at least [`PART_TOKENS`] tokens each), and as many rows of logits are computed
//! at once as are left.

use super::memory::DeviceMemory;
use crate::backend::device::{DeviceBackend, View};
use crate::backend::op::TILE_ROWS;
use crate::error::Result;
use tierwise_cost::model::{Attention, Ffn, ModelSpec};
use tierwise_cost::op::Slot;
use tierwise_planner::budget;

/// Tokens of a part, where something is computed in parts. Parts of f32 rows then begin at multiples of 256 bytes, which is the largest
/// alignment that a device may ask for.
pub const PART_TOKENS: u32 = 64;

/// Rows of logits at once, at most.
const LOGITS_ROWS: u64 = 64;

/// The blocks.
#[derive(Debug)]
pub struct Activations {
    /// By [`Slot::index`].
    slots: [View; SLOTS],
    /// Elements per row, by [`Slot::index`].
    widths: [u32; 11],
    /// u32 `[tokens]`
    pub token_ids: View,
    /// f32 `[tokens]`: growth of queries with their position.
    pub temper: View,
    /// Router logits: f32 `[tokens, num_experts]`.
    pub router: View,
    /// Chosen experts: u32 `[tokens, k]`.
    pub ids: View,
    /// Their weights in the sum: f32 `[tokens, k]`.
    pub weights: View,
    /// Weights on the experts' input: f32 `[tokens, k]`.
    pub factors: View,
    /// Ones: f32 `[tokens, k]`.
    pub ones: View,
    /// Rows by expert: u32 `[tokens * k]`.
    pub order: View,
    /// Tiles of them: u32 `[tiles, 3]`.
    pub tiles: View,
    /// Where the experts of a wave are: u32 `[num_experts, 3]`.
    pub table: View,
    /// The experts' input where weights are on it: `[tokens * k, hidden]`.
    pub expert_input: View,
    /// `[tokens * k, inner_size]`
    pub expert_inner: View,
    /// `[tokens * k, hidden]`
    pub expert_out: View,
    /// What the CPU's experts add: `[tokens, hidden]`.
    pub host_delta: View,
    /// Gate, up and inner activations of a feed-forward network.
    pub ffn: [View; 3],
    /// A shared expert's output: `[tokens, hidden]`.
    pub ffn_out: View,
    /// Of at most [`PART_TOKENS`] tokens in the latent space: queries, and sums of latents.
    pub latent: [View; 2],
}

/// The first so many slots: the others are of parts that no device computes.
const SLOTS: usize = Slot::KvLatent.index() + 1;

/// Widest rows over all layers, in elements.
#[derive(Debug, Default)]
struct Widths {
    slots: [u64; SLOTS],
    /// Per token in the latent space: queries, sums.
    latent: [u64; 2],
    num_experts: u64,
    k: u64,
    /// Rows of an expert's inner activations per token, and whether weights are on the input.
    expert_inner: u64,
    weights_on_input: bool,
    /// Inner width of networks for all tokens, and whether one adds to routed experts.
    ffn: u64,
    shared: bool,
    temper: bool,
}

impl Widths {
    fn new(spec: &ModelSpec) -> Self {
        let hidden = u64::from(spec.hidden_size);
        let mut w = Self::default();
        for slot in [Slot::Hidden, Slot::Normed, Slot::Delta] {
            w.slots[slot.index()] = hidden;
        }
        let mut widen = |slot: Slot, width: u32| w.slots[slot.index()] = w.slots[slot.index()].max(u64::from(width));
        for layer in &spec.layers {
            match &layer.attention {
                Attention::Gqa(a) => {
                    let (q, kv) = (a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim);
                    for (slot, width) in [(Slot::Q, q), (Slot::Attended, q), (Slot::K, kv), (Slot::V, kv)] {
                        widen(slot, width);
                    }
                    w.temper |= a.temperature.is_some();
                }
                Attention::Mla(a) => {
                    let latent = a.kv_lora_rank + a.qk_rope_head_dim;
                    widen(Slot::Q, a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim));
                    widen(Slot::Attended, a.num_heads * a.v_head_dim);
                    widen(Slot::KvLatent, latent);
                    for slot in [Slot::QLatent, Slot::QLatentNormed] {
                        widen(slot, a.q_lora_rank.unwrap_or(0));
                    }
                    let heads = u64::from(a.num_heads);
                    let of = [heads * u64::from(latent), heads * u64::from(a.kv_lora_rank)];
                    w.latent = [w.latent[0].max(of[0]), w.latent[1].max(of[1])];
                }
                Attention::DeltaNet(_) | Attention::PlanOnly(_) => {}
            }
            match &layer.ffn {
                Ffn::Dense(d) => w.ffn = w.ffn.max(u64::from(d.inner_size)),
                Ffn::Moe(m) => {
                    w.num_experts = w.num_experts.max(u64::from(m.num_experts));
                    w.k = w.k.max(u64::from(m.experts_per_token));
                    w.expert_inner = w.expert_inner.max(u64::from(m.experts_per_token) * u64::from(m.inner_size));
                    w.weights_on_input |= m.weights_on_input;
                    if let Some(shared) = &m.shared {
                        w.ffn = w.ffn.max(u64::from(shared.inner_size));
                        w.shared = true;
                    }
                }
                Ffn::None => {}
            }
        }
        w
    }
}

impl Activations {
    /// All of them, for steps of at most `tokens` tokens. `on_cpu`: some experts may be computed by the CPU.
    ///
    /// # Errors
    /// When there is no room.
    pub fn allocate(
        spec: &ModelSpec,
        tokens: u64,
        on_cpu: bool,
        memory: &mut DeviceMemory,
        backend: &mut dyn DeviceBackend,
    ) -> Result<Self> {
        let w = Widths::new(spec);
        let hidden = u64::from(spec.hidden_size);
        let mut alloc = |elements: u64, what: &str| memory.alloc(backend, budget::ACTIVATIONS, 4 * elements, what);
        let if_used = |used: bool, elements: u64| if used { elements } else { 0 };
        let part = tokens.min(u64::from(PART_TOKENS));
        let rows = tokens * w.k;
        // A tile more for every expert, but no more than rows.
        let tiles = rows.min(rows / u64::from(TILE_ROWS) + w.num_experts);
        let mut all = Self {
            slots: [View { buffer: crate::backend::device::BufferId(0), offset_bytes: 0, bytes: 0 }; SLOTS],
            widths: [0; 11],
            token_ids: alloc(tokens, "token ids")?,
            temper: alloc(if_used(w.temper, tokens), "factors on queries")?,
            router: alloc(tokens * w.num_experts, "router logits")?,
            ids: alloc(rows, "chosen experts")?,
            weights: alloc(rows, "experts' weights")?,
            factors: alloc(if_used(w.weights_on_input, rows), "weights on the input")?,
            ones: alloc(if_used(w.weights_on_input, rows), "ones")?,
            order: alloc(rows, "rows by expert")?,
            tiles: alloc(3 * tiles, "tiles of rows")?,
            table: alloc(3 * w.num_experts, "places of experts")?,
            expert_input: alloc(if_used(w.weights_on_input, rows * hidden), "experts' input")?,
            expert_inner: alloc(tokens * w.expert_inner, "experts' inner activations")?,
            expert_out: alloc(rows * hidden, "experts' outputs")?,
            host_delta: alloc(if_used(on_cpu, tokens * hidden), "outputs of the CPU's experts")?,
            ffn: [View { buffer: crate::backend::device::BufferId(0), offset_bytes: 0, bytes: 0 }; 3],
            ffn_out: alloc(if_used(w.shared, tokens * hidden), "shared experts' output")?,
            latent: [alloc(part * w.latent[0], "latent queries")?, alloc(part * w.latent[1], "latent sums")?],
        };
        for (view, (width, name)) in all.slots.iter_mut().zip(w.slots.iter().zip(SLOT_NAMES)) {
            *view = alloc(tokens * width, name)?;
        }
        let vocab = u64::from(spec.vocab_size);
        // What is left goes to inner buffers, then to logits.
        let left =
            |memory: &DeviceMemory| memory.planned(budget::ACTIVATIONS).saturating_sub(memory.allocated(budget::ACTIVATIONS)) / 4;
        let wanted = tokens * w.ffn;
        let in_frame = left(memory).saturating_sub(vocab) / 3;
        let whole_parts = if w.ffn == 0 { 0 } else { in_frame / (w.ffn * u64::from(PART_TOKENS)) };
        let elements = (whole_parts * u64::from(PART_TOKENS) * w.ffn).clamp(part * w.ffn, wanted.max(part * w.ffn));
        for (view, name) in all.ffn.iter_mut().zip(["gate", "up", "inner activations"]) {
            *view = memory.alloc(backend, budget::ACTIVATIONS, 4 * elements, name)?;
        }
        let rows = (left(memory) / vocab.max(1)).clamp(1, tokens.min(LOGITS_ROWS));
        all.slots[Slot::Logits.index()] = memory.alloc(backend, budget::ACTIVATIONS, 4 * rows * vocab, "logits")?;
        all.widths[Slot::Hidden.index()] = spec.hidden_size;
        Ok(all)
    }

    /// Sets how wide the rows of a slot are, before it is written.
    pub const fn widen(&mut self, slot: Slot, width: u32) {
        self.widths[slot.index()] = width;
    }

    /// Elements per row of what was written last into a slot.
    pub const fn width(&self, slot: Slot) -> u32 {
        self.widths[slot.index()]
    }

    /// The first `rows` rows of a slot.
    pub const fn rows(&self, slot: Slot, rows: u32) -> View {
        self.slots[slot.index()].part(0, rows as u64 * self.width(slot) as u64 * 4)
    }

    /// All of a slot's block.
    pub const fn whole(&self, slot: Slot) -> View {
        self.slots[slot.index()]
    }

    /// Exchanges the blocks of two slots of the same size.
    pub const fn swap(&mut self, a: Slot, b: Slot) {
        self.slots.swap(a.index(), b.index());
    }
}

/// By [`index`]; logits come last, with what is left.
const SLOT_NAMES: [&str; 11] = [
    "residual stream",
    "its norm",
    "queries",
    "keys",
    "values",
    "attention's result",
    "what is added",
    "no logits yet",
    "compressed queries",
    "their norm",
    "compressed keys and values",
];

/// The first `elements` f32 or u32 of a block.
pub const fn first(view: View, elements: u64) -> View {
    view.part(0, 4 * elements)
}
