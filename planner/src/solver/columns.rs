//! Near-optimal placements, with proof, of models whose experts are alike within a layer.
//!
//! Layers with equal prices form a class. A column is one way to place a layer of a class: counts per tier and slots
//! ([`super::counts`]). Which columns to use how often is a small linear program with one row per memory and class; its prices of
//! memory tell which column to look for next (Dantzig-Wolfe). For any prices of memory, the sum of the cheapest columns minus the
//! price of all room is a lower bound on every placement (Lagrange). At the end the fractions are rounded and single layers are
//! improved within the room that is left.

use super::counts::{CountLayer, Effort, Found, Point};
use super::polish;
use crate::error::PlanError;
use crate::evaluate::{LayerPlacement, Placement, Weights, step_seconds};
use crate::problem::Problem;
use good_lp::{Expression, ProblemVariables, Solution as _, SolverModel, constraint, microlp, variable};

/// How the bound is computed, for the plan.
pub const METHOD: &str = "Lagrangian over whole placements of layers (column generation, branch and bound per layer)";

/// Rounds of column generation at most; the bound holds after each.
const MAX_ROUNDS: usize = 60;
/// The same with more than four tiers, where a search takes much longer.
const MAX_ROUNDS_MANY_TIERS: usize = 16;
/// Column generation ends when fractions of columns are this close to the bound.
const CLOSE: f64 = 1e-4;
/// Regions that one search of column generation looks at.
const MAX_REGIONS: usize = 60_000;
/// The same with more than four tiers, where a region costs more.
const MAX_REGIONS_MANY_TIERS: usize = 15_000;
/// Rounded columns this close to the bound are good enough; and when to look for what takes longer to find: columns for other prices.
const CLOSE_ROUNDED: f64 = 2e-4;
const CLOSE_SHIFTED: f64 = 1e-3;
/// Columns that others are shifted from, by how many experts or slots, how much dearer than the cheapest they may be, and how many are kept.
const SHIFTED_FROM: usize = 8;
const SHIFTS: [u32; 10] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 40];
const SHIFTED_WITHIN: f64 = 0.02;
const MAX_SHIFTED: usize = 240;
/// Factors of the prices of memory for which more columns are made before rounding again.
const NEIGHBOURS: [f64; 4] = [0.7, 0.9, 1.1, 1.4];
/// Effort for a single layer left over by rounding.
const LEFTOVER: Effort = Effort { close: 1e-3, max_regions: 4_000 };
/// Times in the programs are in microseconds, sizes in MiB: coefficients of similar size keep the simplex method stable.
const MICRO: f64 = 1e6;
const MIB: f64 = 1_048_576.0;

/// Layers that are alike.
pub(super) struct Class<'a> {
    pub layers: Vec<usize>,
    pub counts: CountLayer<'a>,
    pub mib: f64,
    pub columns: Vec<Column>,
}

/// A way to place a layer of a class.
pub(super) struct Column {
    pub found: Found,
    /// MiB held in each memory.
    pub mib: Vec<f64>,
}

/// What column generation found.
pub(super) struct Columns {
    /// A feasible placement, if rounding found one.
    pub placement: Option<Placement>,
    /// No placement has a smaller objective in this form.
    pub bound_s: f64,
    /// Seconds per byte of each memory: what a little more of it would save.
    pub saved_s_per_byte: Vec<f64>,
}

/// Solves `form`; `starts` are feasible placements, of which there must be one. `None` when experts of a layer differ
/// or the machine has too many tiers.
///
/// # Errors
/// [`PlanError::Bound`] when a linear program fails.
pub(super) fn solve(problem: &Problem<'_>, form: &Weights<'_>, starts: &[Placement]) -> Result<Option<Columns>, PlanError> {
    let Some(mut classes) = classes(problem, form) else { return Ok(None) };
    let memories = problem.room.len();
    let room: Vec<f64> = problem.room.iter().map(|b| b.0 as f64 / MIB).collect();
    let other_s: f64 = form.iter().map(|(w, t)| w * t.other_s).sum();
    for placement in starts {
        for class in &mut classes {
            for i in class.layers.clone() {
                let point = Point::of(&placement.layers[i], problem.tiers.len());
                class.add(point, memories);
            }
        }
    }
    let mut bound = f64::NEG_INFINITY;
    let mut prices = vec![0.0; memories];
    let mut wanted = vec![0.0; memories];
    let (rounds, max_regions) =
        if problem.tiers.len() <= 4 { (MAX_ROUNDS, MAX_REGIONS) } else { (MAX_ROUNDS_MANY_TIERS, MAX_REGIONS_MANY_TIERS) };
    let mut gap = 1.0;
    for _ in 0..rounds {
        let (value, duals) = master_dual(&classes, &room)?;
        // Far from the end a rough search is enough.
        let close = (gap * 0.05_f64).clamp(CLOSE, 1e-2);
        let effort = Effort { close, max_regions };
        let mut lagrangian = -duals.iter().zip(&room).map(|(p, r)| p * r).sum::<f64>();
        let mut added = false;
        let mut searched: Vec<(usize, Option<Point>, f64)> = Vec::new();
        for c in 0..classes.len() {
            let known = searched.iter().find_map(|(other, point, lowest)| {
                let same_size = classes[*other].mib == classes[c].mib;
                let more = classes[c].counts.differs_only_by(&classes[*other].counts).filter(|_| same_size)?;
                Some((point.clone(), lowest + more))
            });
            let class = &classes[c];
            let (point, lowest) = known.unwrap_or_else(|| {
                let per_expert: Vec<f64> = duals.iter().map(|p| p * class.mib).collect();
                let max_held: Vec<u32> = room.iter().map(|r| (r / class.mib).floor().min(f64::from(u32::MAX)) as u32).collect();
                let (found, lowest) = class.counts.cheapest(&per_expert, &max_held, class.cheapest(&duals), effort);
                (found.map(|f| f.point), lowest)
            });
            lagrangian += class.layers.len() as f64 * lowest;
            if let Some(point) = point.clone() {
                added |= classes[c].add(point, memories);
            }
            searched.push((c, point, lowest));
        }
        if lagrangian > bound {
            bound = lagrangian;
            prices.clone_from(&duals);
        }
        wanted = duals;
        gap = (value - bound) / value.abs().max(f64::MIN_POSITIVE);
        if gap <= 2.0 * CLOSE || (!added && close <= CLOSE) {
            break;
        }
        if !added {
            gap = 0.0;
        }
    }
    if prices.iter().all(|p| *p == 0.0) {
        prices.clone_from(&wanted);
    }
    let mut placement = round(problem, form, &classes, &room, &prices)?;
    let seconds =
        |p: &Option<Placement>| p.as_ref().map_or(f64::INFINITY, |p| form.iter().map(|(w, t)| w * step_seconds(t, p)).sum());
    // What does not come out even needs columns of other sizes: those beside the good ones, then those for other prices of memory.
    for (close, shifted) in [(CLOSE_ROUNDED, true), (CLOSE_SHIFTED, false)] {
        if seconds(&placement) <= (other_s + bound) * (1.0 + close) {
            break;
        }
        for class in &mut classes {
            if shifted {
                class.add_shifted(&prices, &room);
            } else {
                class.add_neighbours(&prices, &room, max_regions / 8);
            }
        }
        let again = round(problem, form, &classes, &room, &prices)?;
        if seconds(&again) < seconds(&placement) {
            placement = again;
        }
    }
    let saved_s_per_byte = prices.iter().map(|p| p / MIB).collect();
    Ok(Some(Columns { placement, bound_s: other_s + bound, saved_s_per_byte }))
}

fn classes<'a>(problem: &Problem<'_>, form: &Weights<'a>) -> Option<Vec<Class<'a>>> {
    let mut classes: Vec<Class<'a>> = Vec::new();
    for i in 0..problem.layers.len() {
        let same = |c: &&mut Class<'_>| {
            let j = c.layers[0];
            form.iter().all(|(_, t)| t.class_of[i] == t.class_of[j])
                && problem.layers[i].expert_bytes == problem.layers[j].expert_bytes
                && problem.layers[i].num_experts == problem.layers[j].num_experts
        };
        match classes.iter_mut().find(same) {
            Some(class) => class.layers.push(i),
            None => classes.push(Class {
                layers: vec![i],
                counts: CountLayer::new(problem, form, i)?,
                mib: problem.layers[i].expert_bytes.0 as f64 / MIB,
                columns: Vec::new(),
            }),
        }
    }
    Some(classes)
}

impl Class<'_> {
    /// Adds a column; false when it is there already.
    fn add(&mut self, point: Point, memories: usize) -> bool {
        if self.columns.iter().any(|c| c.found.point == point) {
            return false;
        }
        let mib = self.counts.experts_in(&point, memories).iter().map(|n| f64::from(*n) * self.mib).collect();
        let seconds = self.counts.seconds(&point.counts, point.slots);
        self.columns.push(Column { found: Found { point, seconds }, mib });
        true
    }

    /// Adds columns that differ from the cheapest ones by some experts in another tier, or by some slots: nearly as cheap, and of all sizes.
    fn add_shifted(&mut self, prices: &[f64], room: &[f64]) {
        let per_expert: Vec<f64> = prices.iter().map(|p| p * self.mib).collect();
        let value = |p: &Point| self.counts.priced(p, &per_expert);
        let mut cheapest: Vec<(f64, &Point)> = self.columns.iter().map(|c| (value(&c.found.point), &c.found.point)).collect();
        cheapest.sort_by(|a, b| a.0.total_cmp(&b.0));
        let most = cheapest.first().map_or(0.0, |(v, _)| v * (1.0 + SHIFTED_WITHIN));
        let fits =
            |p: &Point| self.counts.experts_in(p, room.len()).iter().zip(room).all(|(n, r)| f64::from(*n) * self.mib <= *r);
        let mut shifted: Vec<(f64, Point)> = Vec::new();
        for (_, point) in cheapest.iter().take(SHIFTED_FROM) {
            for p in shifts(point, &self.counts.through) {
                let v = value(&p);
                if v <= most && fits(&p) && shifted.iter().all(|(_, q)| *q != p) {
                    shifted.push((v, p));
                }
            }
        }
        shifted.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (_, point) in shifted.into_iter().take(MAX_SHIFTED) {
            self.add(point, room.len());
        }
    }

    /// Adds the columns that would be cheapest if memory cost a little more or less, each memory alone and all together.
    fn add_neighbours(&mut self, prices: &[f64], room: &[f64], max_regions: usize) {
        let max_held: Vec<u32> = room.iter().map(|r| (r / self.mib).floor().min(f64::from(u32::MAX)) as u32).collect();
        let costly: Vec<usize> = (0..prices.len()).filter(|m| prices[*m] > 0.0).collect();
        let changes = costly.iter().map(|m| vec![*m]).chain((costly.len() > 1).then(|| costly.clone()));
        for (memories, factor) in changes.flat_map(|m| NEIGHBOURS.map(|f| (m.clone(), f))) {
            let mut prices = prices.to_vec();
            memories.iter().for_each(|m| prices[*m] *= factor);
            let per_expert: Vec<f64> = prices.iter().map(|p| p * self.mib).collect();
            let effort = Effort { close: 1e-3, max_regions };
            if let (Some(found), _) = self.counts.cheapest(&per_expert, &max_held, self.cheapest(&prices), effort) {
                self.add(found.point, room.len());
            }
        }
    }

    /// The known column that is cheapest at these prices.
    fn cheapest(&self, prices: &[f64]) -> Option<&Point> {
        let value = |c: &Column| c.found.seconds + c.mib.iter().zip(prices).map(|(b, p)| b * p).sum::<f64>();
        self.columns.iter().min_by(|a, b| value(a).total_cmp(&value(b))).map(|c| &c.found.point)
    }
}

/// The points that differ from `point` by some experts in another tier, or by some slots. `through`: memory of each tier's slots
fn shifts(point: &Point, through: &[Option<usize>]) -> Vec<Point> {
    let tiers = through.len();
    let cache = (0..tiers).find_map(|t| through[t].filter(|_| point.counts[t] > 0));
    let open = |t: usize| through[t].is_none() || through[t] == cache;
    let mut points = Vec::new();
    let mut keep = |mut p: Point| {
        let cached: u32 = (0..tiers).filter(|t| through[*t].is_some()).map(|t| p.counts[t]).sum();
        p.slots = p.slots.min(cached);
        if (p.slots == 0) == (cached == 0) {
            points.push(p);
        }
    };
    for n in SHIFTS {
        for from in (0..tiers).filter(|t| point.counts[*t] >= n) {
            for to in (0..tiers).filter(|t| *t != from && open(*t)) {
                let mut p = point.clone();
                p.counts[from] -= n;
                p.counts[to] += n;
                keep(p);
            }
        }
        for slots in [point.slots.saturating_sub(n), point.slots + n] {
            keep(Point { slots, ..point.clone() });
        }
    }
    points
}

/// The dual of "choose columns": value in seconds, and price in seconds per MiB of each memory.
fn master_dual(classes: &[Class<'_>], room: &[f64]) -> Result<(f64, Vec<f64>), PlanError> {
    let mut vars = ProblemVariables::new();
    let price: Vec<_> = room.iter().map(|_| vars.add(variable().min(0.0))).collect();
    let worth: Vec<_> = classes.iter().map(|_| vars.add(variable())).collect();
    let mut goal = Expression::from(0.0);
    for (p, r) in price.iter().zip(room) {
        goal.add_mul(-r, *p);
    }
    let mut constraints = Vec::new();
    for (class, w) in classes.iter().zip(&worth) {
        goal.add_mul(class.layers.len() as f64, *w);
        for c in &class.columns {
            let mut left = Expression::from(*w);
            for (p, mib) in price.iter().zip(&c.mib) {
                left.add_mul(-mib, *p);
            }
            constraints.push(constraint!(left <= c.found.seconds * MICRO));
        }
    }
    let objective = goal.clone();
    let mut model = vars.maximise(goal).using(microlp);
    for c in constraints {
        model = model.with(c);
    }
    let solution = model.solve().map_err(|e| PlanError::Bound { message: format!("prices of memory: {e}") })?;
    Ok((solution.eval(objective) / MICRO, price.iter().map(|p| solution.value(*p).max(0.0) / MICRO).collect()))
}

/// How often to use each column, in fractions. `[classes][columns]`
fn master(classes: &[Class<'_>], room: &[f64]) -> Result<Vec<Vec<f64>>, PlanError> {
    let mut vars = ProblemVariables::new();
    let mut goal = Expression::from(0.0);
    let mut used: Vec<Expression> = room.iter().map(|_| Expression::from(0.0)).collect();
    let mut constraints = Vec::new();
    let mut times = Vec::new();
    for class in classes {
        let row: Vec<_> = class.columns.iter().map(|_| vars.add(variable().min(0.0))).collect();
        for (c, x) in class.columns.iter().zip(&row) {
            goal.add_mul(c.found.seconds * MICRO, *x);
            for (sum, mib) in used.iter_mut().zip(&c.mib) {
                sum.add_mul(*mib, *x);
            }
        }
        let all: Expression = row.iter().sum();
        constraints.push(constraint!(all == class.layers.len() as f64));
        times.push(row);
    }
    for (sum, r) in used.into_iter().zip(room) {
        constraints.push(constraint!(sum <= *r));
    }
    let mut model = vars.minimise(goal).using(microlp);
    for c in constraints {
        model = model.with(c);
    }
    let solution = model.solve().map_err(|e| PlanError::Bound { message: format!("choice of columns: {e}") })?;
    Ok(times.iter().map(|row| row.iter().map(|x| solution.value(*x)).collect()).collect())
}

/// Whole numbers of columns, leftover layers placed one by one in the room that is left, then improved.
fn round(
    problem: &Problem<'_>,
    form: &Weights<'_>,
    classes: &[Class<'_>],
    room: &[f64],
    prices: &[f64],
) -> Result<Option<Placement>, PlanError> {
    let fractions = master(classes, room)?;
    let mut free: Vec<f64> = room.to_vec();
    let mut layers: Vec<Option<LayerPlacement>> = vec![None; problem.layers.len()];
    let mut open: Vec<(usize, usize)> = Vec::new();
    for ((c, class), row) in classes.iter().enumerate().zip(&fractions) {
        let mut waiting = class.layers.iter().copied();
        for (column, times) in class.columns.iter().zip(row) {
            for i in waiting.by_ref().take((times + 1e-6).floor() as usize) {
                layers[i] = Some(column.found.point.placement(&problem.layers[i].by_popularity));
                for (f, mib) in free.iter_mut().zip(&column.mib) {
                    *f -= mib;
                }
            }
        }
        open.extend(waiting.map(|i| (c, i)));
    }
    for (k, (c, i)) in open.iter().enumerate() {
        // Every layer that still waits is owed its share of the room.
        let share = 1.0 / (open.len() - k) as f64;
        let class = &classes[*c];
        let max_held: Vec<u32> = free.iter().map(|f| (f.max(0.0) / class.mib).floor() as u32).collect();
        let fits = |column: &&Column| column.mib.iter().zip(&free).all(|(m, f)| *m <= f * share + 1e-6);
        let per_expert: Vec<f64> = prices.iter().map(|p| p * class.mib).collect();
        let known = class.columns.iter().filter(fits).min_by(|a, b| a.found.seconds.total_cmp(&b.found.seconds));
        let shared: Vec<u32> = max_held.iter().map(|m| (f64::from(*m) * share).floor() as u32).collect();
        // With little room left a layer's own optimum is what fits, whatever the prices.
        let last = vec![0.0; prices.len()];
        let price = if k + 1 == open.len() { &last } else { &per_expert };
        let mut best = class.counts.cheapest(price, &shared, known.map(|k| &k.found.point), LEFTOVER).0;
        if best.is_none() {
            best = class.counts.cheapest(price, &max_held, None, LEFTOVER).0;
        }
        let Some(best) = best else { return Ok(None) };
        for (f, n) in free.iter_mut().zip(class.counts.experts_in(&best.point, room.len())) {
            *f -= f64::from(n) * class.mib;
        }
        layers[*i] = Some(best.point.placement(&problem.layers[*i].by_popularity));
    }
    let Some(layers) = layers.into_iter().collect() else { return Ok(None) };
    let mut placement = Placement { layers };
    super::exchange::improve(problem, classes, prices, &mut placement);
    polish::polish(problem, form, &mut placement);
    Ok(crate::evaluate::usage(problem, &placement).is_ok().then_some(placement))
}
