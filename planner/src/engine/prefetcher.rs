//! Decides what to load before anyone asks (algorithms §5).
//!
//! Guesses come from the layer routers' look-ahead or from history; a guess is worth its probability times what the layer would take
//! longer without it, by the exact scheduler. It is issued when its link carries nothing that is demanded, when it should arrive before
//! its layer starts, and when it is likelier to be needed there than the expert that must go. Guesses for a layer are dropped when its
//! router has spoken. One prefetch per link is under way at a time, so a demand never waits for more than the rest of one.

use super::costs::EngineCosts;
use super::layer::LayerEngine;
use super::makespans::Makespans;
use super::pool::{Pool, Presence};
use super::prefetch::{HitCalibration, Mix, Predictor, Shape, logistic};
use super::schedule::{Item, LayerWork, Rule, Schedule, Scratch};
use super::{Places, SCORE_ONE};
use crate::check::CheckedPlan;
use crate::plan::PrefetchKind;
use tierwise_cost::units::Nanos;

/// Guesses below this are not worth a copy.
const LEAST_PROBABILITY: f64 = 0.05;
/// Weight of the newest interval between two layers.
const INTERVAL_WEIGHT: f64 = 0.25;

/// A look-ahead: its distance, and a probability by expert.
type Foreseen = (usize, Vec<(u32, f64)>);

/// A load that may be worth it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    /// Index of the layer.
    pub index: usize,
    pub expert: u32,
    probability: f64,
    gain_s: f64,
}

/// Probability that each expert of a layer is demanded when the layer comes next.
#[derive(Debug)]
pub(super) struct Chances {
    /// Probabilities, or logarithms of their odds: few of them are ever asked for. `[experts]`
    values: Vec<f32>,
    are_log_odds: bool,
}

impl Chances {
    fn none(experts: u32) -> Self {
        Self { values: vec![0.0; experts as usize], are_log_odds: false }
    }

    /// That of an expert that the layer has.
    pub fn of(&self, expert: u32) -> Option<f32> {
        let value = *self.values.get(expert as usize)?;
        Some(if self.are_log_odds { logistic(f64::from(value)) as f32 } else { value })
    }
}

#[derive(Debug)]
pub(super) struct Prefetcher {
    kind: PrefetchKind,
    /// Layers to look ahead.
    depth: usize,
    predictor: Mix,
    calibration: HitCalibration,
    candidates: Vec<Candidate>,
    /// `[layers]`
    chances: Vec<Chances>,
    /// Look-ahead guesses for layers of the running step. `[layers]`
    foreseen: Vec<Option<Foreseen>>,
    /// Mean time from one layer's demand to the next's, in seconds; 0 unknown. `[layers]`
    interval_s: Vec<f64>,
    /// Layer and time of the last demand.
    last: Option<(usize, Nanos)>,
    /// Experts per step that each layer asked for lately. `[layers]`
    demanded: Vec<f64>,
    /// `[layers]`
    makespans: Vec<Makespans>,
    work: LayerWork,
    schedule: Schedule,
    scratch: Scratch,
}

impl Prefetcher {
    /// `None` when the plan wants none or nothing can be prefetched.
    pub fn new(plan: &CheckedPlan) -> Option<Self> {
        let settings = plan.plan().engine;
        if settings.prefetch == PrefetchKind::Off || plan.plan().layers.iter().all(|l| l.slots == 0) {
            return None;
        }
        let experts: Vec<u32> = plan.moe_layers().iter().map(|l| plan.num_experts(*l)).collect();
        let n = experts.len();
        let k = plan.plan().layers.first().map_or(1, |l| plan.experts_per_token(l.layer));
        let shape = Shape {
            num_layers: n,
            num_experts: experts.iter().copied().max().unwrap_or(0) as usize,
            experts_per_token: k as usize,
            max_distance: settings.prefetch_layers as usize,
        };
        Some(Self {
            kind: settings.prefetch,
            depth: settings.prefetch_layers as usize,
            predictor: Mix::new(shape),
            calibration: HitCalibration::new(shape.max_distance),
            candidates: Vec::new(),
            chances: experts.iter().map(|e| Chances::none(*e)).collect(),
            foreseen: vec![None; n],
            interval_s: vec![0.0; n],
            last: None,
            demanded: vec![0.0; n],
            makespans: vec![Makespans::default(); n],
            work: LayerWork::default(),
            schedule: Schedule::default(),
            scratch: Scratch::default(),
        })
    }

    /// A layer was asked for experts: learns, and drops guesses that are no guesses any more.
    pub fn routed(&mut self, now: Nanos, step: u64, index: usize, experts: &[(u32, u32)]) {
        let n = self.chances.len();
        if let Some((last, at)) = self.last
            && (last + 1) % n == index
        {
            let interval = now.0.saturating_sub(at.0) as f64 * 1e-9;
            let mean = &mut self.interval_s[last];
            *mean = if *mean == 0.0 { interval } else { *mean + INTERVAL_WEIGHT * (interval - *mean) };
        }
        self.last = Some((index, now));
        self.candidates.retain(|c| c.index != index);
        if let Some((distance, guesses)) = self.foreseen[index].take() {
            for (expert, p) in guesses {
                let hit = experts.binary_search_by_key(&expert, |e| e.0).is_ok();
                self.calibration.record(distance, p, hit);
            }
        }
        let demanded = &mut self.demanded[index];
        *demanded = if *demanded == 0.0 { experts.len() as f64 } else { *demanded + 0.1 * (experts.len() as f64 - *demanded) };
        self.predictor.observe(step, index, experts);
    }

    /// A later layer's router has looked at the current hidden state; false if that is of no use.
    pub fn foreseen(&mut self, index: usize, distance: usize, scores: &[(u32, u32)]) -> bool {
        let useful = self.kind == PrefetchKind::Lookahead && (1..=self.depth.min(index)).contains(&distance);
        if useful {
            let p = |score: u32| (f64::from(score) / f64::from(SCORE_ONE)).min(1.0);
            self.foreseen[index] = Some((distance, scores.iter().map(|(e, s)| (*e, p(*s))).collect()));
        }
        useful
    }

    /// New guesses after layer `index` was asked.
    pub fn guess(&mut self, index: usize, places: Places<'_>, costs: &EngineCosts, rule: Rule) {
        for distance in 1..=self.depth.min(places.layers.len()) {
            self.guess_again(index, distance, places, costs, rule);
        }
        self.sort();
    }

    /// New guesses at the demand of the layer `distance` after `index`.
    pub fn guess_at(&mut self, index: usize, distance: usize, places: Places<'_>, costs: &EngineCosts, rule: Rule) {
        self.guess_again(index, distance, places, costs, rule);
        self.sort();
    }

    fn guess_again(&mut self, index: usize, distance: usize, places: Places<'_>, costs: &EngineCosts, rule: Rule) {
        let target = (index + distance) % places.layers.len();
        let limit = (self.demanded[target] * 2.0).ceil().max(1.0) as usize;
        let chances = &mut self.chances[target];
        let guesses: Vec<(u32, f64)> = match &self.foreseen[target] {
            Some((d, scores)) => {
                let mut all: Vec<(u32, f64)> = scores.iter().map(|(e, p)| (*e, self.calibration.probability(*d, *p))).collect();
                all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                all.retain(|(e, _)| (*e as usize) < chances.values.len());
                chances.values.fill(0.0);
                chances.are_log_odds = false;
                for (e, p) in &all {
                    chances.values[*e as usize] = *p as f32;
                }
                all.truncate(limit);
                all
            }
            None => {
                let guesses = self.predictor.predict_all(index, distance, limit, &mut chances.values);
                chances.are_log_odds = guesses.is_some();
                guesses.unwrap_or_else(|| {
                    chances.values.fill(0.0);
                    Vec::new()
                })
            }
        };
        self.candidates.retain(|c| c.index != target);
        self.weigh(target, &guesses, places.at(target), costs, rule);
    }

    /// What each absent guess is worth: the layer's time with the likely demand, with and without it in place.
    fn weigh(
        &mut self,
        index: usize,
        guesses: &[(u32, f64)],
        (layer, pool): (&LayerEngine, &Pool),
        costs: &EngineCosts,
        rule: Rule,
    ) {
        let likely = (self.demanded[index].round().max(1.0) as usize).min(guesses.len());
        self.work.items.clear();
        for (expert, _) in &guesses[..likely] {
            let home = layer.homes[*expert as usize];
            if !home.cached {
                continue;
            }
            let time = &costs.layers[index].tiers[home.tier.0 as usize];
            let here = pool.presence(layer.key(*expert)) != Presence::Absent;
            self.work.items.push(Item {
                expert: *expert,
                gpu_s: time.compute.at(1).to_seconds().0,
                cpu_s: time.at_home.as_ref().map_or(f64::INFINITY, |t| t.at(1).to_seconds().0),
                move_s: if here { 0.0 } else { time.copy.to_seconds().0 },
                contended_s: if here { 0.0 } else { time.contended.to_seconds().0 },
                worth: 0.0,
            });
        }
        let sync = layer.homes.iter().find_map(|h| h.at_home).map_or(0.0, |x| costs.sync[x.0 as usize].to_seconds().0);
        (self.work.gpu_busy_s, self.work.cpu_first_s, self.work.link_busy_s) = (0.0, sync, 0.0);
        // With all of them alike it does not matter which is in place.
        let alike = Makespans::are_alike(&self.work.items);
        let without = self.makespan(index, alike, rule);
        let mut known = None;
        for (expert, probability) in guesses {
            let home = layer.homes[*expert as usize];
            if *probability < LEAST_PROBABILITY || !home.cached || pool.presence(layer.key(*expert)) != Presence::Absent {
                continue;
            }
            let gain_s = match self.work.items.iter().position(|i| i.expert == *expert) {
                Some(at) => {
                    let with = known.filter(|_| alike).unwrap_or_else(|| {
                        let item = self.work.items[at];
                        (self.work.items[at].move_s, self.work.items[at].contended_s) = (0.0, 0.0);
                        let with = self.makespan(index, alike, rule);
                        self.work.items[at] = item;
                        with
                    });
                    known = Some(with);
                    (without - with).max(0.0) * probability
                }
                None => 0.0,
            };
            self.candidates.push(Candidate { index, expert: *expert, probability: *probability, gain_s });
        }
    }

    /// The best first.
    fn sort(&mut self) {
        self.candidates.sort_unstable_by(|a, b| {
            (b.gain_s.total_cmp(&a.gain_s))
                .then(b.probability.total_cmp(&a.probability))
                .then((a.index, a.expert).cmp(&(b.index, b.expert)))
        });
    }

    /// What `rule` makes of the work, which is the layer's at `index`.
    fn makespan(&mut self, index: usize, alike: bool, rule: Rule) -> f64 {
        let Self { work, scratch, schedule, makespans, .. } = self;
        let work = &*work;
        let mut decide = || {
            rule.decide(work, scratch, schedule);
            schedule.makespan_s
        };
        // To other rules it may matter in which order equal ones come.
        if alike && rule == Rule::Exact { makespans[index].of(work, decide) } else { decide() }
    }

    /// Takes the best guess that may be loaded now, if there is one.
    pub fn next(&mut self, mut allowed: impl FnMut(&Candidate, f64, &Chances) -> bool) -> Option<Candidate> {
        let (last, _) = self.last?;
        let n = self.chances.len();
        let until = |target: usize| {
            let mut s = 0.0;
            let mut l = last;
            while l != target {
                s += self.interval_s[l];
                l = (l + 1) % n;
            }
            s
        };
        let at = self.candidates.iter().position(|c| allowed(c, until(c.index), &self.chances[c.index]))?;
        Some(self.candidates.remove(at))
    }

    /// When the last demand was.
    pub fn last_demand(&self) -> Nanos {
        self.last.map_or(Nanos(0), |l| l.1)
    }

    /// Probability that the one who must go is needed where it is, by [`Candidate::probability`]'s measure.
    pub fn beats(candidate: &Candidate, victim: Option<f32>) -> bool {
        victim.is_none_or(|v| candidate.probability > f64::from(v))
    }
}
