//! Seconds of a step, at the step's own batch, positions and prompt tokens.
//!
//! A plan's prediction is for one batch and one position. While requests come and go a step decodes some sequences and computes some
//! prompt tokens beside them. Its time is put together from two tables of the plan's own prices, made once and interpolated:
//! * `D(n, p)`: n sequences decode one token each, p positions in each cache;
//! * `P(t, q)`: t tokens of one prompt after q others, in place or streamed, whichever is faster.
//!
//! A mixed step reads every weight once for all its tokens and every cache once for its sequence:
//! `P(t, 0) + sum over chunks of [P(c, q) - P(c, 0)] + [D(n, p) - D(n, 0)]`, with t = n + all chunk tokens, and never less than
//! `D(n, p)`. Wider steps touch more experts, so hit rates fall and slow tiers are used more: that is in D and P, because every point
//! of the tables prices the placement anew. Between points both tables are interpolated linearly.

use crate::error::PlanError;
use crate::evaluate::{Placement, step_seconds};
use crate::plan::Plan;
use crate::price::{Case, Phase, PriceTable};
use crate::problem::Problem;
use crate::request::Request;
use tierwise_cost::cost::CostModel;
use tierwise_cost::machine::Machine;
use tierwise_cost::model::ModelSpec;

/// Some tokens of one prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// How many.
    pub tokens: u32,
    /// Positions already in the cache.
    pub past: u32,
}

/// Tells how long a step takes.
pub trait StepSeconds: Sync {
    /// `decoding` sequences produce one token each, with `mean_past` positions in their caches; `chunks` of prompts beside them.
    fn seconds(&self, decoding: u32, mean_past: f64, chunks: &[Chunk]) -> f64;
}

/// Linear interpolation on a grid.
#[derive(Debug, Clone, PartialEq)]
struct Grid {
    x: Vec<f64>,
    y: Vec<f64>,
    /// `[x, y]`
    values: Vec<f64>,
}

impl Grid {
    fn new(x: Vec<u32>, y: Vec<u32>, mut value: impl FnMut(u32, u32) -> f64) -> Self {
        let values = x.iter().flat_map(|a| y.iter().map(move |b| (*a, *b))).map(|(a, b)| value(a, b)).collect();
        let float = |v: Vec<u32>| v.into_iter().map(f64::from).collect();
        Self { x: float(x), y: float(y), values }
    }

    /// Index of the point below and the weight of the one above; clamped to the axis.
    fn locate(axis: &[f64], at: f64) -> (usize, usize, f64) {
        let above = axis.partition_point(|v| *v < at).min(axis.len() - 1);
        if above == 0 || axis[above] <= at {
            return (above, above, 0.0);
        }
        let below = above - 1;
        (below, above, (at - axis[below]) / (axis[above] - axis[below]))
    }

    fn at(&self, x: f64, y: f64) -> f64 {
        let (x0, x1, wx) = Self::locate(&self.x, x);
        let (y0, y1, wy) = Self::locate(&self.y, y);
        let v = |i: usize, j: usize| self.values[i * self.y.len() + j];
        let low = v(x0, y0) + wy * (v(x0, y1) - v(x0, y0));
        let high = v(x1, y0) + wy * (v(x1, y1) - v(x1, y0));
        low + wx * (high - low)
    }
}

/// 1, 2, 3, 4, 6, 8, 12, ... up to `most`, which is always there.
fn points(most: u32) -> Vec<u32> {
    let mut list: Vec<u32> = (0..31).flat_map(|i| [1_u32 << i, 3 << i]).filter(|n| *n < most).collect();
    list.push(most);
    list.sort_unstable();
    list
}

/// 0, 128 (sliding windows are rarely narrower), 256, ... up to `most`.
fn positions(most: u32) -> Vec<u32> {
    let mut list: Vec<u32> = std::iter::once(0).chain((7..31).map(|i| 1_u32 << i)).filter(|n| *n < most).collect();
    list.push(most);
    list
}

/// Step times of one plan.
#[derive(Debug, Clone, PartialEq)]
pub struct StepTable {
    decode: Grid,
    prompt: Grid,
}

impl StepTable {
    /// Prices `placement` for up to `max_decoding` sequences and up to the request's chunk of tokens in a step.
    ///
    /// # Errors
    /// Those of [`Problem::new`].
    pub fn new(
        spec: &ModelSpec,
        machine: &Machine,
        request: &Request,
        placement: &Placement,
        cost: &dyn CostModel,
        case: Case,
        max_decoding: u32,
    ) -> Result<Self, PlanError> {
        let mut problem = Problem::new(spec, machine, request.clone())?;
        let last = request.context.max(1);
        let decode = Grid::new(points(max_decoding.max(1)), positions(last), |batch, past| {
            decode_seconds(&mut problem, placement, cost, case, batch, past)
        });
        let prompt = Grid::new(points(request.chunk_tokens.max(2)), positions(last), |tokens, past| {
            prompt_seconds(&mut problem, placement, cost, case, tokens, past)
        });
        Ok(Self { decode, prompt })
    }
}

/// Sets the shape of the work to be priced. Rooms and tiers stay those of the plan.
fn priced(problem: &Problem<'_>, placement: &Placement, cost: &dyn CostModel, phase: Phase, case: Case) -> Option<f64> {
    PriceTable::new(problem, cost, phase, case).map(|table| step_seconds(&table, placement))
}

/// Seconds of a decode step of `batch` sequences with `past` positions each, straight from the prices.
pub fn decode_seconds(
    problem: &mut Problem<'_>,
    placement: &Placement,
    cost: &dyn CostModel,
    case: Case,
    batch: u32,
    past: u32,
) -> f64 {
    problem.request.batch = batch;
    // `Request::decode_past` is half of the context.
    problem.request.context = past.saturating_mul(2);
    priced(problem, placement, cost, Phase::Decode, case).expect("every tier of a problem has a route")
}

/// Seconds of `tokens` prompt tokens after `past` others, straight from the prices.
pub fn prompt_seconds(
    problem: &mut Problem<'_>,
    placement: &Placement,
    cost: &dyn CostModel,
    case: Case,
    tokens: u32,
    past: u32,
) -> f64 {
    // A prompt of tokens + 2 past, in chunks of `tokens`: its mean chunk has `past` before it.
    problem.request.chunk_tokens = tokens;
    problem.request.prompt_tokens = tokens.saturating_add(past.saturating_mul(2));
    let in_place = priced(problem, placement, cost, Phase::PrefillInPlace, case).expect("every tier of a problem has a route");
    priced(problem, placement, cost, Phase::PrefillStreamed, case).map_or(in_place, |streamed| streamed.min(in_place))
}

impl StepSeconds for StepTable {
    fn seconds(&self, decoding: u32, mean_past: f64, chunks: &[Chunk]) -> f64 {
        let n = f64::from(decoding);
        let decode = if decoding > 0 { self.decode.at(n, mean_past) } else { 0.0 };
        if chunks.is_empty() {
            return decode;
        }
        let all = n + chunks.iter().map(|c| f64::from(c.tokens)).sum::<f64>();
        let mut seconds = self.prompt.at(all, 0.0);
        for c in chunks.iter().filter(|c| c.past > 0) {
            let tokens = f64::from(c.tokens);
            seconds += (self.prompt.at(tokens, f64::from(c.past)) - self.prompt.at(tokens, 0.0)).max(0.0);
        }
        if decoding > 0 {
            seconds += (decode - self.decode.at(n, 0.0)).max(0.0);
        }
        seconds.max(decode)
    }
}

/// The placement that a plan states. `[moe layers]`
pub fn placement_of(plan: &Plan) -> Placement {
    let layers = plan
        .layers
        .iter()
        .map(|l| crate::evaluate::LayerPlacement {
            tier_of: l.runs.iter().flat_map(|r| std::iter::repeat_n(r.tier as u8, r.count as usize)).collect(),
            slots: l.slots,
        })
        .collect();
    Placement { layers }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_is_exact_at_its_points_and_linear_between() {
        let g = Grid::new(points(12), positions(512), |x, y| f64::from(3 * x + 2 * y + x * y));
        assert_eq!(points(12), [1, 2, 3, 4, 6, 8, 12]);
        assert_eq!(positions(300), [0, 128, 256, 300]);
        for (x, y) in [(1.0, 0.0), (12.0, 512.0), (6.0, 256.0), (5.0, 64.0), (7.0, 200.0)] {
            assert!((g.at(x, y) - (3.0 * x + 2.0 * y + x * y)).abs() < 1e-9, "{x} {y}: {}", g.at(x, y));
        }
        assert_eq!(g.at(99.0, 9999.0), g.at(12.0, 512.0));
    }
}
