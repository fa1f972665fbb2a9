//! What no placement can beat: a linear program over counts.
//!
//! Layers with equal prices form a class; variables are how many experts of a class (and popularity bucket) are in each tier, and
//! how many slots each class has. Every feasible placement gives a feasible point whose value is at most its objective:
//! * a layer's expected maximum is at least the maximum of its branches' means;
//! * sums over the layers of a class: the maximum of sums is at most the sum of maxima;
//! * whole experts become fractions; in a bucket every expert counts with the least activity of the bucket;
//! * a round trip is paid with probability 1 - exp(-A), A the sum of -ln(1 - p) over the processor's experts: concave, so at least
//!   its chord, which is linear in the counts;
//! * misses of n experts with s slots are n m(s/n), m convex: jointly convex, so at least each of its supporting planes.
//!
//! With more than one form of the objective (prompts in place or streamed) the bound is the least of their bounds.

use crate::error::PlanError;
use crate::evaluate::{Prices, Weights};
use crate::price::{Copies, LayerPrice, TierPrice};
use crate::problem::Problem;
use crate::request::Popularity;
use good_lp::{Expression, ProblemVariables, Solution, SolverModel, Variable, constraint, microlp, variable};

/// Buckets of experts by popularity, when it was measured.
const BUCKETS: usize = 8;
/// The LP solver's tolerance, taken off the bound so that it stays one.
const TOLERANCE: f64 = 1e-6;
/// Times in the program are in microseconds, sizes in MiB: coefficients of similar size keep the simplex method stable.
const MICRO: f64 = 1e6;
const MIB: f64 = 1_048_576.0;

/// How the bound was computed, for the plan.
pub const METHOD: &str = "linear program over expert counts per class of equal layers (microlp)";

/// A lower bound on [`Prices::objective`] over all feasible placements, in seconds.
///
/// # Errors
/// [`PlanError::Bound`] when the linear program is not solved.
pub fn lower_bound(problem: &Problem<'_>, prices: &Prices) -> Result<f64, PlanError> {
    let mut least = f64::INFINITY;
    for form in prices.forms(problem) {
        least = least.min(solve(problem, &form)?);
    }
    Ok(least)
}

/// Layers that are alike in every table of the form.
struct Class {
    layers: Vec<usize>,
    key: Vec<usize>,
}

fn classes(problem: &Problem<'_>, form: &Weights<'_>) -> Vec<Class> {
    let mut classes: Vec<Class> = Vec::new();
    for i in 0..problem.layers.len() {
        let key: Vec<usize> = form.iter().map(|(_, table)| table.class_of[i]).collect();
        let same = |c: &&mut Class| {
            let other = &problem.layers[c.layers[0]];
            c.key == key
                && other.expert_bytes == problem.layers[i].expert_bytes
                && other.by_popularity == problem.layers[i].by_popularity
        };
        match classes.iter_mut().find(same) {
            Some(class) => class.layers.push(i),
            None => classes.push(Class { layers: vec![i], key }),
        }
    }
    classes
}

/// Experts of a bucket, least active last.
struct Bucket {
    size: usize,
    least: usize,
}

fn buckets(problem: &Problem<'_>, layer: usize) -> Vec<Bucket> {
    let order = &problem.layers[layer].by_popularity;
    let size = match problem.request.popularity {
        Popularity::Uniform => order.len(),
        Popularity::Shares(_) => order.len().div_ceil(BUCKETS),
    };
    order
        .chunks(size.max(1))
        .map(|c| Bucket { size: c.len(), least: *c.last().expect("chunks are not empty") as usize })
        .collect()
}

/// A variable per bucket and tier: experts of all layers of the class. `[buckets][tiers]`
type Counts = Vec<Vec<Variable>>;

fn solve(problem: &Problem<'_>, form: &Weights<'_>) -> Result<f64, PlanError> {
    let mut vars = ProblemVariables::new();
    let mut constraints = Vec::new();
    let mut objective = Expression::from(0.0);
    let mut constant: f64 = form.iter().map(|(w, t)| w * t.other_s).sum();
    let memories = problem.machine.memories.len();
    let mut used: Vec<Expression> = vec![Expression::from(0.0); problem.room.len()];

    for class in classes(problem, form) {
        let first = class.layers[0];
        let n_layers = class.layers.len() as f64;
        let mib = problem.layers[first].expert_bytes.0 as f64 / MIB;
        let buckets = buckets(problem, first);
        let counts: Counts =
            buckets.iter().map(|_| (0..problem.tiers.len()).map(|_| vars.add(variable().min(0.0))).collect()).collect();
        for (bucket, row) in buckets.iter().zip(&counts) {
            let all: Expression = row.iter().sum();
            constraints.push(constraint!(all == bucket.size as f64 * n_layers));
        }
        // Slots per memory that holds any.
        let mut slots: Vec<Option<Variable>> = vec![None; memories];
        for (t, tier) in problem.tiers.iter().enumerate() {
            for row in &counts {
                problem.rooms_of(tier).for_each(|room| used[room].add_mul(mib, row[t]));
            }
            if let Some(through) = &tier.through {
                let m = problem.memory_index(through);
                if slots[m].is_none() {
                    let s = vars.add(variable().min(0.0));
                    used[m].add_mul(mib, s);
                    slots[m] = Some(s);
                }
            }
        }
        for (weight, table) in form {
            let price = table.layer(first);
            constant += weight * n_layers * price.fixed_s;
            let time = vars.add(variable().min(0.0));
            objective.add_mul(*weight, time);
            for branch in branches(problem, price, &buckets, &counts, &slots, &mut vars, &mut constraints) {
                constraints.push(constraint!(branch <= time));
            }
        }
    }
    for (m, sum) in used.into_iter().enumerate() {
        constraints.push(constraint!(sum <= problem.room[m].0 as f64 / MIB));
    }
    if problem.layers.is_empty() {
        return Ok(constant);
    }
    let failed = |e: good_lp::ResolutionError| PlanError::Bound { message: e.to_string() };
    let goal = objective.clone();
    let mut model = vars.minimise(objective).using(microlp);
    for c in constraints {
        model = model.with(c);
    }
    let solution = model.solve().map_err(failed)?;
    let seconds = solution.eval(goal) / MICRO;
    Ok((constant + seconds) * (1.0 - TOLERANCE))
}

/// The branches of a class in one phase, in microseconds over all its layers: each is a lower bound on their time.
fn branches(
    problem: &Problem<'_>,
    price: &LayerPrice,
    buckets: &[Bucket],
    counts: &Counts,
    slots: &[Option<Variable>],
    vars: &mut ProblemVariables,
    constraints: &mut Vec<good_lp::Constraint>,
) -> Vec<Expression> {
    let links = price.tiers.iter().map(TierPrice::links_end).max().unwrap_or(0);
    let mut processors = vec![Expression::from(0.0); price.sync_s.len()];
    let mut copies = vec![Expression::from(0.0); links];
    let all_busy: f64 = -price.ln_idle.iter().sum::<f64>();
    let chord = if all_busy > 0.0 { (1.0 - (-all_busy).exp()) / all_busy } else { 0.0 };
    let least_active = price.active.iter().copied().fold(f64::INFINITY, f64::min);
    for (t, tier) in price.tiers.iter().enumerate() {
        for (bucket, row) in buckets.iter().zip(counts) {
            let p = price.active[bucket.least];
            let sync = price.sync_s[tier.processor] * chord * -price.ln_idle[bucket.least];
            processors[tier.processor].add_mul((p * tier.expert_s + sync) * MICRO, row[t]);
            for (r, seconds) in tier.shares(false) {
                copies[r].add_mul(p * seconds * MICRO, row[t]);
            }
            if tier.copies == Copies::Always {
                copies[tier.link].add_mul(p * tier.copy_s * MICRO, row[t]);
                for (r, seconds) in tier.shares(true) {
                    copies[r].add_mul(p * seconds * MICRO, row[t]);
                }
            }
        }
        let through = problem.tiers[t].through.as_deref().map(|id| problem.memory_index(id));
        if tier.copies == Copies::Misses
            && let Some(slots) = through.and_then(|m| slots[m])
        {
            let misses = vars.add(variable().min(0.0));
            for (at_zero, slope) in price.misses.lines() {
                let mut plane = Expression::from(0.0);
                for row in counts {
                    plane.add_mul(at_zero * least_active, row[t]);
                }
                plane.add_mul(slope * least_active, slots);
                constraints.push(constraint!(plane <= misses));
            }
            copies[tier.link].add_mul(tier.copy_s * MICRO, misses);
            for (r, seconds) in tier.shares(true) {
                copies[r].add_mul(seconds * MICRO, misses);
            }
        }
    }
    processors.into_iter().chain(copies).collect()
}
