//! Bytes of keys and values of the requests that are being served.
//!
//! What the plan leaves for keys and values is a pool of blocks of 16 tokens (PagedAttention's size); experts have the rest of the same
//! memory. Bytes come from the model's own table of layers, so a sliding window stops growing.

use crate::budget;
use crate::error::PlanError;
use crate::plan::Plan;
use tierwise_cost::model::ModelSpec;

/// Tokens per block.
pub const BLOCK_TOKENS: u32 = 16;

/// Size of the pool and of what lies in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvPool {
    /// Bytes of all blocks.
    pub capacity_bytes: u64,
    /// Most tokens of one request.
    pub context: u32,
    /// Bytes of a request by blocks held. `[blocks + 1]`
    bytes_of_blocks: Vec<u64>,
}

impl KvPool {
    /// A pool of `capacity_bytes` for requests of up to `context` tokens, each token `bytes_per_token`.
    pub fn linear(capacity_bytes: u64, context: u32, bytes_per_token: u64) -> Self {
        let blocks = u64::from(context.div_ceil(BLOCK_TOKENS));
        let bytes_of_blocks = (0..=blocks).map(|b| b * u64::from(BLOCK_TOKENS) * bytes_per_token).collect();
        Self { capacity_bytes, context, bytes_of_blocks }
    }

    /// The pool that a plan leaves in the main memory: its keys and values and what is free, less the logits of the sequences by which
    /// `max_running` exceeds the plan's batch.
    ///
    /// # Errors
    /// [`PlanError::BadRequest`] when not even one request of the plan's context fits.
    pub fn of_plan(spec: &ModelSpec, plan: &Plan, max_running: u32) -> Result<Self, PlanError> {
        let main = plan.budgets.iter().find(|b| b.memory == plan.main.memory);
        let left = main.map_or(0, |b| b.line(budget::KV).0 + b.line(budget::FREE).0);
        let more_rows = u64::from(max_running.saturating_sub(plan.request.batch));
        let logits = 4 * u64::from(spec.vocab_size) * more_rows;
        let context = plan.request.context;
        let blocks = context.div_ceil(BLOCK_TOKENS);
        let bytes = |b: u32| {
            let tokens = u64::from(b) * u64::from(BLOCK_TOKENS);
            if b == 0 { 0 } else { spec.kv_bytes(tokens, plan.request.kv_format).0 }
        };
        let pool =
            Self { capacity_bytes: left.saturating_sub(logits), context, bytes_of_blocks: (0..=blocks).map(bytes).collect() };
        if pool.bytes(context) > pool.capacity_bytes {
            return Err(PlanError::BadRequest {
                field: "max_running",
                found: format!("{max_running}, whose logits leave {} for keys and values", pool.capacity_bytes),
                expected: format!(
                    "room for one request of {context} tokens, {} bytes: fewer, or a larger --batch",
                    pool.bytes(context)
                ),
            });
        }
        Ok(pool)
    }

    /// Bytes held by a request with `tokens` in its cache, whole blocks.
    ///
    /// # Panics
    /// If `tokens` is more than the pool's context in whole blocks.
    pub fn bytes(&self, tokens: u32) -> u64 {
        self.bytes_of_blocks[tokens.div_ceil(BLOCK_TOKENS) as usize]
    }
}
