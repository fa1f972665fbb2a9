//! A lower bound and fractions of experts from the convex program, by a first-order primal-dual method.
//!
//! min over x max over (mu, lambda): x[l, e, .] mixes tiers, mu[l, s, .] mixes the resources of a step, lambda prices the bytes of a
//! memory. A processor's round trip is paid in full once any of its experts is active: it is the largest of their shares there, so
//! a processor with one appears once for every active expert in a step's mix (in small steps; in large ones, where it hardly counts,
//! it is paid in proportion). For any mu and lambda, letting every expert choose its cheapest tier gives a lower bound (Lagrange), computed exactly in
//! float64: the method only has to find good ones. Primal-dual hybrid gradient (Chambolle and Pock) with diagonal steps (Pock and
//! Chambolle 2011) and restarts from averages (Applegate et al. 2021, PDLP).

use super::linear::{Costs, Layer, Linear, Step};

/// What the relaxation found.
pub(super) struct Relaxed {
    /// No placement with these cache sizes has a smaller objective, in seconds.
    pub bound_s: f64,
    /// Fractions of experts. `[layers][experts * tiers]`
    pub x: Vec<Vec<f64>>,
    /// Seconds per byte of each memory. `[memories]`
    pub price: Vec<f64>,
}

/// Primal and dual variables.
#[derive(Clone)]
struct State {
    /// `[layers][experts * tiers]`
    x: Vec<Vec<f64>>,
    /// Each step's mix of resources, then for each processor with a round trip its mix of active experts. `[layers][rows]`
    mu: Vec<Vec<f64>>,
    /// Price of the whole room of each memory. `[memories]`
    lambda: Vec<f64>,
}

/// How long to try.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    /// Multiply-adds, about: time without a clock.
    pub work: f64,
    /// Ends when the bound is this close to the value of the fractions.
    pub close: f64,
}

/// Iterations between looks at the bound.
const LOOK: usize = 40;

/// Relaxes `lp`; `start` is a placement to begin with. `[layers][experts]`
pub(super) fn relax(lp: &Linear, start: &[Vec<u8>], effort: Effort) -> Relaxed {
    let scale = 1.0 / (typical_seconds(lp, start)).max(f64::MIN_POSITIVE);
    let mut method = Method::new(lp, scale);
    let mut now = State {
        x: lp.layers.iter().zip(start).map(|(l, tiers)| one_hot(l, tiers, lp.num_tiers)).collect(),
        mu: lp.layers.iter().zip(&method.layouts).zip(&method.sigma).map(|((l, rows), s)| even(l, rows, s)).collect(),
        lambda: vec![0.0; lp.room.len()],
    };
    let per_iteration: f64 = lp
        .layers
        .iter()
        .flat_map(|l| l.steps.iter().map(|s| (s.active.len() * 2 * l.phases[s.phase].costs.len()) as f64))
        .sum::<f64>()
        + lp.layers.iter().map(|l| (l.num_experts * lp.num_tiers * 6) as f64).sum::<f64>();
    let rounds = ((effort.work / per_iteration / LOOK as f64) as usize).clamp(4, 400);

    let mut best = (f64::NEG_INFINITY, now.clone());
    let mut restart_from = now.clone();
    let mut average = now.clone();
    let mut averaged = 0.0;
    let mut error_at_restart = f64::INFINITY;
    let mut since_restart = 0;
    let mut fractions = now.x.clone();
    let mut least_error = f64::INFINITY;
    let (mut improved_from, mut idle) = (f64::NEG_INFINITY, 0);
    for round in 0..rounds {
        if round == 1 || round == 4 {
            method.price_room(lp, &mut now);
            restart_from.clone_from(&now);
            average.clone_from(&now);
            averaged = 0.0;
        }
        for _ in 0..LOOK {
            method.iterate(lp, &mut now);
            averaged += 1.0;
            add_to_average(&mut average, &now, averaged);
        }
        since_restart += LOOK;
        let mut measured: Vec<(f64, bool)> = Vec::new();
        for (is_average, state) in [(false, &now), (true, &average)] {
            let bound = method.bound(lp, state);
            let (value, over) = method.value(lp, state);
            if bound > best.0 {
                best = (bound, state.clone());
            }
            let error = (value - bound).abs() + over * value.abs();
            measured.push((error, is_average));
            if error < least_error {
                least_error = error;
                fractions.clone_from(&state.x);
            }
            if over < effort.close && value - best.0 < effort.close * (value + lp.constant_s() * method.scale) {
                fractions.clone_from(&state.x);
                return finish(lp, &method, best, fractions);
            }
        }
        if best.0 > improved_from + 0.05 * effort.close * best.0.abs() {
            improved_from = best.0;
            idle = 0;
        } else {
            idle += 1;
            if idle > 25 {
                break;
            }
        }
        measured.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (error, use_average) = measured[0];
        if error < 0.4 * error_at_restart || since_restart > 60 * LOOK {
            if use_average {
                now.clone_from(&average);
            }
            method.rebalance(&restart_from, &now);
            restart_from.clone_from(&now);
            average.clone_from(&now);
            averaged = 0.0;
            since_restart = 0;
            error_at_restart = error;
        }
    }
    finish(lp, &method, best, fractions)
}

fn finish(lp: &Linear, method: &Method, best: (f64, State), x: Vec<Vec<f64>>) -> Relaxed {
    let (mut bound, mut state) = best;
    method.price_room(lp, &mut state);
    bound = bound.max(method.bound(lp, &state));
    let price = state.lambda.iter().zip(&lp.room).map(|(l, r)| l / r.max(1.0) / method.scale).collect();
    Relaxed { bound_s: bound / method.scale + lp.constant_s(), x, price }
}

struct Method {
    scale: f64,
    /// Balance between primal and dual steps.
    omega: f64,
    /// Where the rows of each step are. `[layers]`
    layouts: Vec<Rows>,
    /// Dual steps; 0 for what nothing uses. `[layers][rows]`
    sigma: Vec<Vec<f64>>,
    sigma_room: Vec<f64>,
    /// Primal steps. `[layers][experts]`
    tau: Vec<Vec<f64>>,
    gradient: Vec<f64>,
}

impl Method {
    fn new(lp: &Linear, scale: f64) -> Self {
        let t = lp.num_tiers;
        let mut sigma = Vec::new();
        let mut columns: Vec<Vec<f64>> = Vec::new();
        let mut layouts = Vec::new();
        let mut room_rows = vec![0.0; lp.room.len()];
        let mut entries = 0.0;
        for layer in &lp.layers {
            let rows = Rows::new(lp, layer);
            let mut lengths = vec![0.0; rows.len()];
            let mut column = vec![0.0; layer.num_experts * t];
            for (s, step) in layer.steps.iter().enumerate() {
                let mut widest = vec![0.0; lp.num_resources];
                each_cost(layer, step, rows.exact[s], |tier, on, seconds, copying| {
                    for a in &step.active {
                        let entry = if copying { a.copies } else { a.times } * seconds * scale;
                        widest[on] += entry;
                        column[usize::from(a.expert) * t + tier] += entry * step.weight;
                    }
                });
                let trips = rows.trips(layer, s);
                for trip in trips {
                    widest[trip.on] += trip.sync_s * scale;
                    // Shared by the experts, so each feels its part.
                    for a in &step.active {
                        for tier in &trip.tiers {
                            column[usize::from(a.expert) * t + tier] += trip.sync_s * scale * step.weight * step.share;
                        }
                    }
                }
                // One step length for all rows of a step: they share a simplex. Resources that nothing uses have none.
                let most = widest.iter().copied().fold(0.0, f64::max);
                let (first, end) = rows.range(s);
                let row = &mut lengths[first..end];
                for (on, w) in widest.iter().enumerate() {
                    let in_trips = trips.iter().any(|trip| trip.on == on);
                    row[on] = if *w > 0.0 && !in_trips { 1.0 / most } else { 0.0 };
                }
                row[lp.num_resources..].fill(1.0 / most);
            }
            for tier in (0..t).filter(|x| layer.allowed[*x]) {
                for (m, bytes) in &layer.uses[tier] {
                    room_rows[*m] += layer.num_experts as f64 * bytes / lp.room[*m].max(1.0);
                }
                entries += layer.num_experts as f64;
            }
            sigma.push(lengths);
            layouts.push(rows);
            columns.push(column);
        }
        // Prices of memory are scaled so that a typical expert feels them as much as its time: else they would creep.
        let felt = columns.iter().flatten().sum::<f64>() / entries.max(1.0);
        let faster: Vec<f64> = room_rows.iter().map(|row| felt / (row / entries.max(1.0)).max(1e-300)).collect();
        let mut tau = Vec::new();
        for (layer, column) in lp.layers.iter().zip(&mut columns) {
            for e in 0..layer.num_experts {
                for tier in (0..t).filter(|x| layer.allowed[*x]) {
                    for (m, bytes) in &layer.uses[tier] {
                        column[e * t + tier] += faster[*m] * bytes / lp.room[*m].max(1.0);
                    }
                }
            }
            let widest = |e: usize| column[e * t..(e + 1) * t].iter().copied().fold(1e-12, f64::max);
            tau.push((0..layer.num_experts).map(|e| 1.0 / widest(e)).collect());
        }
        let sigma_room = room_rows.iter().zip(&faster).map(|(row, f)| if *row > 0.0 { f / row } else { 0.0 }).collect();
        Self { scale, omega: 1.0, layouts, sigma, sigma_room, tau, gradient: Vec::new() }
    }

    fn iterate(&mut self, lp: &Linear, z: &mut State) {
        let t = lp.num_tiers;
        let mut used = vec![0.0; lp.room.len()];
        for (l, layer) in lp.layers.iter().enumerate() {
            let (x, mu) = (&mut z.x[l], &mut z.mu[l]);
            let room_price = room_prices(lp, layer, &z.lambda);
            self.gradient.clear();
            self.gradient.resize(layer.num_experts * t, 0.0);
            add_gradient(layer, &self.layouts[l], mu, t, self.scale, &mut self.gradient);
            // The extrapolated point 2 x' - x is left in the gradient's place.
            for e in 0..layer.num_experts {
                let tau = self.tau[l][e] / self.omega;
                let (xe, ge) = (&mut x[e * t..(e + 1) * t], &mut self.gradient[e * t..(e + 1) * t]);
                let mut moved = [0.0; super::MAX_TIERS];
                for k in 0..t {
                    moved[k] = if layer.allowed[k] { xe[k] - tau * (ge[k] + room_price[k]) } else { f64::NEG_INFINITY };
                }
                onto_simplex(&mut moved[..t], 1.0);
                for k in 0..t {
                    ge[k] = 2.0 * moved[k] - xe[k];
                    for (m, bytes) in &layer.uses[k] {
                        used[*m] += ge[k] * bytes;
                    }
                    xe[k] = moved[k];
                }
            }
            let (sigma, rows) = (&self.sigma[l], &self.layouts[l]);
            let mut loads = [0.0; MAX_ROW];
            for (s, step) in layer.steps.iter().enumerate() {
                let (first, end) = rows.range(s);
                let loads = &mut loads[..end - first];
                load(layer, rows, s, &self.gradient, t, loads);
                let row = &mut mu[first..end];
                for (i, m) in row.iter_mut().enumerate() {
                    let length = sigma[first + i];
                    *m = if length > 0.0 {
                        *m + self.omega * length * loads[i] * self.scale * step.weight
                    } else {
                        f64::NEG_INFINITY
                    };
                }
                onto_simplex(row, step.weight);
            }
        }
        for (((price, used), room), length) in z.lambda.iter_mut().zip(used).zip(&lp.room).zip(&self.sigma_room) {
            *price = (*price + self.omega * length * (used - room) / room.max(1.0)).max(0.0);
        }
    }

    /// The Lagrangian bound of `z`, scaled, without the constant.
    fn bound(&self, lp: &Linear, z: &State) -> f64 {
        let t = lp.num_tiers;
        let mut total = -z.lambda.iter().zip(&lp.room).map(|(l, r)| l * r.max(0.0) / r.max(1.0)).sum::<f64>();
        let mut gradient = Vec::new();
        for ((layer, mu), rows) in lp.layers.iter().zip(&z.mu).zip(&self.layouts) {
            gradient.clear();
            gradient.resize(layer.num_experts * t, 0.0);
            add_gradient(layer, rows, mu, t, self.scale, &mut gradient);
            let room_price = room_prices(lp, layer, &z.lambda);
            for g in gradient.chunks_exact(t) {
                let cheapest = (0..t).filter(|k| layer.allowed[*k]).map(|k| g[k] + room_price[k]);
                total += cheapest.fold(f64::INFINITY, f64::min);
            }
        }
        total
    }

    /// With mu held, the best prices of memory are a matter of a few one-dimensional searches: the bound is concave in each.
    fn price_room(&self, lp: &Linear, z: &mut State) {
        for _ in 0..2 {
            for m in 0..z.lambda.len() {
                let mut at = |l: f64| {
                    z.lambda[m] = l;
                    self.bound(lp, z)
                };
                let (mut low, mut high) = (0.0, 1.0);
                let mut value = at(high);
                loop {
                    let next = at(high * 2.0);
                    if next <= value || high > 1e9 {
                        break;
                    }
                    (low, high, value) = (high, high * 2.0, next);
                }
                (low, high) = (low / 2.0, high * 2.0);
                for _ in 0..20 {
                    let (a, b) = (low + (high - low) / 3.0, high - (high - low) / 3.0);
                    if at(a) < at(b) { low = a } else { high = b }
                }
                z.lambda[m] = (low + high) / 2.0;
                let kept = (z.lambda[m], self.bound(lp, z));
                z.lambda[m] = 0.0;
                if self.bound(lp, z) < kept.1 {
                    z.lambda[m] = kept.0;
                }
            }
        }
    }

    /// Value of the fractions, scaled, without the constant; and by what share of its room a memory is over at most.
    fn value(&self, lp: &Linear, z: &State) -> (f64, f64) {
        let t = lp.num_tiers;
        let mut used = vec![0.0; lp.room.len()];
        let mut total = 0.0;
        let mut loads = [0.0; MAX_ROW];
        for ((layer, x), rows) in lp.layers.iter().zip(&z.x).zip(&self.layouts) {
            for xe in x.chunks_exact(t) {
                for (share, uses) in xe.iter().zip(&layer.uses) {
                    for (m, bytes) in uses {
                        used[*m] += share * bytes;
                    }
                }
            }
            for (s, step) in layer.steps.iter().enumerate() {
                let (first, end) = rows.range(s);
                let loads = &mut loads[..end - first];
                load(layer, rows, s, x, t, loads);
                total += step.weight * loads.iter().copied().fold(0.0, f64::max);
            }
        }
        let over = used.iter().zip(&lp.room).map(|(u, r)| (u - r) / r.max(1.0)).fold(0.0, f64::max);
        (total * self.scale, over)
    }

    /// Sets the balance of steps by how far primal and dual moved since the last restart (PDLP).
    fn rebalance(&mut self, from: &State, to: &State) {
        let distance = |a: &[Vec<f64>], b: &[Vec<f64>]| -> f64 {
            a.iter().zip(b).flat_map(|(x, y)| x.iter().zip(y)).map(|(x, y)| (x - y) * (x - y)).sum()
        };
        let dx = distance(&from.x, &to.x).sqrt();
        let prices: f64 = from.lambda.iter().zip(&to.lambda).map(|(a, b)| (a - b) * (a - b)).sum();
        let dy = (distance(&from.mu, &to.mu) + prices).sqrt();
        if dx > 1e-10 && dy > 1e-10 {
            self.omega = (0.5 * (dy / dx).ln() + 0.5 * self.omega.ln()).exp().clamp(1e-4, 1e4);
        }
    }
}

/// What the bytes of an expert cost in each tier. `lambda`: price of the whole room of each memory
fn room_prices(lp: &Linear, layer: &Layer, lambda: &[f64]) -> Vec<f64> {
    layer.uses.iter().map(|uses| uses.iter().map(|(m, bytes)| lambda[*m] / lp.room[*m].max(1.0) * bytes).sum()).collect()
}

/// Rows up to which round trips are exact.
const MAX_TRIP_ROWS: usize = 48;
/// Longest mix of a step.
const MAX_ROW: usize = super::MAX_RESOURCES + MAX_TRIP_ROWS;

/// Where the rows of a layer's steps are: its resources, then an entry for every active expert of each processor with a round trip.
struct Rows {
    /// First row of each step, and the end. `[steps + 1]`
    first: Vec<usize>,
    num_resources: usize,
    /// Round trips of the step are exact. `[steps]`
    exact: Vec<bool>,
    /// Round trips that steps may need. `[phases]`
    trips: Vec<Vec<Trip>>,
}

/// A round trip to a processor.
struct Trip {
    on: usize,
    sync_s: f64,
    /// What that processor computes.
    tiers: Vec<usize>,
}

impl Rows {
    fn new(lp: &Linear, layer: &Layer) -> Self {
        let trips = layer.phases.iter().map(|costs| round_trips(layer, costs)).collect();
        let mut rows = Self { first: vec![0], num_resources: lp.num_resources, exact: Vec::new(), trips };
        for step in &layer.steps {
            let whole = step.active.iter().all(|a| a.times == 1.0);
            let more = step.active.len() * rows.trips[step.phase].len();
            let exact = whole && more <= MAX_TRIP_ROWS;
            rows.exact.push(exact);
            rows.first.push(rows.len() + lp.num_resources + if exact { more } else { 0 });
        }
        rows
    }

    fn len(&self) -> usize {
        *self.first.last().expect("there is always the first row's number")
    }

    fn range(&self, step: usize) -> (usize, usize) {
        (self.first[step], self.first[step + 1])
    }

    /// Round trips that have rows of their own in a step.
    fn trips(&self, layer: &Layer, step: usize) -> &[Trip] {
        if self.exact[step] { &self.trips[layer.steps[step].phase] } else { &[] }
    }
}

/// Processors that steps with these costs may need a round trip to.
fn round_trips(layer: &Layer, costs: &Costs) -> Vec<Trip> {
    let tiers_on =
        |p: usize| costs.processor.iter().enumerate().filter(move |(t, on)| **on == p && layer.allowed[*t]).map(|(t, _)| t);
    let trips = costs.sync_s.iter().enumerate().filter(|(_, s)| **s > 0.0);
    let trips = trips.map(|(on, sync_s)| Trip { on, sync_s: *sync_s, tiers: tiers_on(on).collect() });
    trips.filter(|trip| !trip.tiers.is_empty()).collect()
}

/// Every cost of a step: tier, resource, seconds, whether per copy. Round trips are among them, in proportion, unless `exact`.
fn each_cost(layer: &Layer, step: &Step, exact: bool, mut f: impl FnMut(usize, usize, f64, bool)) {
    let costs = &layer.phases[step.phase];
    for c in costs.costs.iter().filter(|c| layer.allowed[c.tier]) {
        f(c.tier, c.on, c.seconds, c.copying);
    }
    if exact {
        return;
    }
    for (tier, on) in costs.processor.iter().enumerate().filter(|(t, p)| layer.allowed[*t] && costs.sync_s[**p] > 0.0) {
        f(tier, *on, costs.sync_s[*on] * step.share, false);
    }
}

/// Adds the seconds that each expert would cost in each tier under `mu`. `gradient`: `[experts * tiers]`
fn add_gradient(layer: &Layer, rows: &Rows, mu: &[f64], t: usize, scale: f64, gradient: &mut [f64]) {
    let (mut computing, mut copied) = ([0.0; super::MAX_TIERS], [0.0; super::MAX_TIERS]);
    let mut weight = [0.0; super::MAX_RESOURCES];
    for (s, step) in layer.steps.iter().enumerate() {
        let (first, end) = rows.range(s);
        let (row, shares) = mu[first..end].split_at(rows.num_resources);
        weight[..row.len()].copy_from_slice(row);
        for (trip, shares) in rows.trips(layer, s).iter().zip(shares.chunks_exact(step.active.len().max(1))) {
            weight[trip.on] = shares.iter().sum();
            for (a, share) in step.active.iter().zip(shares) {
                for tier in &trip.tiers {
                    gradient[usize::from(a.expert) * t + tier] += trip.sync_s * scale * share;
                }
            }
        }
        computing[..t].fill(0.0);
        copied[..t].fill(0.0);
        each_cost(layer, step, rows.exact[s], |tier, on, seconds, copying| {
            let per_tier = if copying { &mut copied } else { &mut computing };
            per_tier[tier] += weight[on] * seconds * scale;
        });
        for a in &step.active {
            let first = usize::from(a.expert) * t;
            for (k, g) in gradient[first..first + t].iter_mut().enumerate() {
                *g += a.times * computing[k] + a.copies * copied[k];
            }
        }
    }
}

/// Seconds of each row of a step. `x`: `[experts * tiers]`
fn load(layer: &Layer, rows: &Rows, s: usize, x: &[f64], t: usize, loads: &mut [f64]) {
    let step = &layer.steps[s];
    let (mut computed, mut copied) = ([0.0; super::MAX_TIERS], [0.0; super::MAX_TIERS]);
    for a in &step.active {
        let first = usize::from(a.expert) * t;
        for (k, v) in x[first..first + t].iter().enumerate() {
            computed[k] += a.times * v;
            copied[k] += a.copies * v;
        }
    }
    loads.fill(0.0);
    each_cost(layer, step, rows.exact[s], |tier, on, seconds, copying| {
        loads[on] += seconds * if copying { copied[tier] } else { computed[tier] };
    });
    let (loads, shares) = loads.split_at_mut(rows.num_resources);
    for (trip, shares) in rows.trips(layer, s).iter().zip(shares.chunks_exact_mut(step.active.len().max(1))) {
        for (a, share) in step.active.iter().zip(shares) {
            let first = usize::from(a.expert) * t;
            let here: f64 = trip.tiers.iter().map(|k| x[first + k]).sum();
            *share = loads[trip.on] + trip.sync_s * here;
        }
    }
}

/// The nearest point with non-negative entries that sum to `sum`; entries of minus infinity become 0.
fn onto_simplex(v: &mut [f64], sum: f64) {
    if v.len() <= FEW_ENTRIES { project(v, sum, &mut [0.0; FEW_ENTRIES]) } else { project(v, sum, &mut [0.0; MAX_ROW]) }
}

/// Entries for which a little room will do: clearing it counts.
const FEW_ENTRIES: usize = 16;

/// [`onto_simplex`] in the room given.
fn project(v: &mut [f64], sum: f64, room: &mut [f64]) {
    let sorted = &mut room[..v.len()];
    sorted.copy_from_slice(v);
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let (mut total, mut level) = (0.0, 0.0);
    for (i, s) in sorted.iter().enumerate() {
        if !s.is_finite() {
            break;
        }
        total += s;
        let candidate = (total - sum) / (i + 1) as f64;
        if *s <= candidate {
            break;
        }
        level = candidate;
    }
    for x in v.iter_mut() {
        *x = (*x - level).max(0.0);
    }
}

fn one_hot(layer: &Layer, tiers: &[u8], t: usize) -> Vec<f64> {
    let mut x = vec![0.0; layer.num_experts * t];
    for (e, tier) in tiers.iter().enumerate() {
        x[e * t + usize::from(*tier)] = 1.0;
    }
    x
}

/// Every step's weight, shared evenly by what its layer uses.
fn even(layer: &Layer, rows: &Rows, sigma: &[f64]) -> Vec<f64> {
    let mut mu = vec![0.0; rows.len()];
    for (s, step) in layer.steps.iter().enumerate() {
        let (first, end) = rows.range(s);
        let used = sigma[first..end].iter().filter(|x| **x > 0.0).count().max(1) as f64;
        for i in (first..end).filter(|i| sigma[*i] > 0.0) {
            mu[i] = step.weight / used;
        }
    }
    mu
}

/// Seconds of a layer with this placement, on average.
fn typical_seconds(lp: &Linear, tier_of: &[Vec<u8>]) -> f64 {
    let mut loads = [0.0; MAX_ROW];
    let mut total = 0.0;
    for (layer, tiers) in lp.layers.iter().zip(tier_of) {
        let (x, rows) = (one_hot(layer, tiers, lp.num_tiers), Rows::new(lp, layer));
        for (s, step) in layer.steps.iter().enumerate() {
            let (first, end) = rows.range(s);
            load(layer, &rows, s, &x, lp.num_tiers, &mut loads[..end - first]);
            total += step.weight * loads[..end - first].iter().copied().fold(0.0, f64::max);
        }
    }
    total / lp.layers.len().max(1) as f64
}

fn add_to_average(average: &mut State, now: &State, n: f64) {
    let mix = |a: &mut Vec<Vec<f64>>, b: &Vec<Vec<f64>>| {
        for (x, y) in a.iter_mut().flatten().zip(b.iter().flatten()) {
            *x += (y - *x) / n;
        }
    };
    mix(&mut average.x, &now.x);
    mix(&mut average.mu, &now.mu);
    for (x, y) in average.lambda.iter_mut().zip(&now.lambda) {
        *x += (y - *x) / n;
    }
}
