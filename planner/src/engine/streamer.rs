//! Streams prompts: while a layer computes, experts of the next one are on their way into staging slots.
//!
//! A part of a prompt asks for most experts of every layer, so what the next layer needs is known well before its router speaks: the
//! popular ones first, from the request's trace, the prompt so far, or the next router's look-ahead. Sent for ahead is what the exact
//! scheduler would move for the tokens to be expected, and what the link has time for until that layer begins; of no use are experts
//! for which no token is expected, and those that are computed sooner where they wait. The layer's own demand then decides anew, with
//! what has come in place.

use super::costs::EngineCosts;
use super::layer::{LayerEngine, fill_in};
use super::pool::{Pool, Presence};
use super::schedule::{Item, LayerWork, Rule, Schedule, Scratch};
use super::staging::Staging;
use super::{Demand, Places};
use crate::check::CheckedPlan;
use crate::request::Popularity;
use std::collections::VecDeque;

/// Weight of the newest part of a prompt in the shares of its experts.
const NEWEST: f64 = 0.5;

#[derive(Debug)]
pub(super) struct Streamer {
    /// Share of the (token, choice) rows of prompts that each expert gets. `[layers][experts]`
    shares: Vec<Vec<f64>>,
    /// Tokens of the last part of a prompt in the last layer, of which most steps compute the last token alone.
    in_last: u32,
    /// Index of the layer after the one that is served.
    target: Option<usize>,
    /// Tokens and rows of its demand, as expected.
    expected: (u32, f64),
    /// Its experts to send for, first first.
    queue: VecDeque<u32>,
    work: LayerWork,
    schedule: Schedule,
    scratch: Scratch,
}

impl Streamer {
    /// `None` where prompts are computed in place.
    pub fn new(plan: &CheckedPlan, costs: &EngineCosts) -> Option<Self> {
        if !costs.streams {
            return None;
        }
        let known = match &plan.plan().request.popularity {
            Popularity::Shares(shares) => shares.as_slice(),
            Popularity::Uniform => &[],
        };
        let of_layer = |(i, layer): (usize, &u32)| {
            let n = plan.num_experts(*layer) as usize;
            known.get(i).filter(|s| s.len() == n).cloned().unwrap_or_else(|| vec![1.0 / n.max(1) as f64; n])
        };
        Some(Self {
            shares: plan.moe_layers().iter().enumerate().map(of_layer).collect(),
            in_last: 0,
            target: None,
            expected: (0, 0.0),
            queue: VecDeque::new(),
            work: LayerWork::default(),
            schedule: Schedule::default(),
            scratch: Scratch::default(),
        })
    }

    /// The layer that comes next, if something is to be sent for.
    pub fn target(&self) -> Option<usize> {
        self.target.filter(|_| !self.queue.is_empty())
    }

    /// A layer was asked. Guests of the layer that was to come before are of no use if it is another one.
    pub fn before(&mut self, index: usize, layers: &[LayerEngine], staging: &mut Staging) {
        self.queue.clear();
        if let Some(other) = self.target.take().filter(|t| *t != index) {
            staging.dismiss(layers[other].layer, |_| false);
        }
    }

    /// Learns from a part of a prompt, and chooses what to send for.
    pub fn after(&mut self, index: usize, demand: &Demand, places: Places<'_>, costs: &EngineCosts) {
        let rows: u64 = demand.experts.iter().map(|(_, n)| u64::from(*n)).sum();
        let last = places.layers.len() - 1;
        if index == last {
            self.in_last = demand.tokens;
        }
        if !places.layers[index].streams(demand) || rows == 0 {
            return;
        }
        let shares = &mut self.shares[index];
        shares.iter_mut().for_each(|s| *s *= 1.0 - NEWEST);
        demand.experts.iter().for_each(|(e, n)| shares[*e as usize] += NEWEST * f64::from(*n) / rows as f64);
        if index == last {
            return;
        }
        let target = index + 1;
        let tokens = if target == last { demand.tokens.min(self.in_last) } else { demand.tokens };
        self.target = Some(target);
        self.expected = (tokens, rows as f64 * f64::from(tokens) / f64::from(demand.tokens));
        let shares = std::mem::take(&mut self.shares[target]);
        self.choose(&shares, places.at(target), costs, target);
        self.shares[target] = shares;
    }

    /// The next layer's router has looked at the current hidden state.
    pub fn foreseen(&mut self, index: usize, scores: &[(u32, u32)], places: Places<'_>, costs: &EngineCosts) {
        let sum: f64 = scores.iter().map(|(_, s)| f64::from(*s)).sum();
        if self.target != Some(index) || sum <= 0.0 {
            return;
        }
        let mut shares = vec![0.0; places.layers[index].homes.len()];
        scores.iter().for_each(|(e, s)| shares[*e as usize] = f64::from(*s) / sum);
        self.choose(&shares, places.at(index), costs, index);
    }

    fn choose(&mut self, shares: &[f64], (layer, pool): (&LayerEngine, &Pool), costs: &EngineCosts, index: usize) {
        self.queue.clear();
        let (tokens, rows) = self.expected;
        if tokens <= layer.batch() {
            return;
        }
        let times = &costs.layers[index];
        self.work.items.clear();
        (self.work.gpu_busy_s, self.work.cpu_first_s, self.work.link_busy_s) = (0.0, 0.0, 0.0);
        let mut wanted: Vec<(u32, u32)> = Vec::new();
        for (expert, share) in (0_u32..).zip(shares) {
            let n = (share * rows).round().min(f64::from(tokens)) as u32;
            let home = layer.homes[expert as usize];
            let time = &times.tiers[home.tier.0 as usize];
            if n == 0 {
                continue;
            }
            let seconds = time.compute.at(n).to_seconds().0;
            match (home.streamed, home.executor.0) {
                (false, 0) => self.work.gpu_busy_s += seconds,
                (false, _) => self.work.cpu_first_s += seconds,
                (true, _) => {
                    let mut item = Item { expert, gpu_s: 0.0, cpu_s: 0.0, move_s: 0.0, contended_s: 0.0, worth: 0.0 };
                    fill_in(&mut item, time, n);
                    if pool.presence(layer.key(expert)) != Presence::Absent {
                        (item.move_s, item.contended_s) = (0.0, 0.0);
                    } else if item.gpu_s < item.cpu_s {
                        wanted.push((expert, n));
                    }
                    self.work.items.push(item);
                }
            }
        }
        Rule::Exact.decide(&self.work, &mut self.scratch, &mut self.schedule);
        // The link begins before the layer does.
        let copy_s = times.tiers.iter().filter(|t| t.streamed.is_some()).map(|t| t.copy().to_seconds().0).fold(0.0, f64::max);
        let before_s = costs.before(index, tokens, true).to_seconds().0;
        let meanwhile = if copy_s > 0.0 { (before_s / copy_s) as usize } else { 0 };
        wanted.sort_by_key(|(expert, n)| (std::cmp::Reverse(*n), *expert));
        wanted.truncate(self.schedule.moves.len() + meanwhile);
        self.queue.extend(wanted.iter().map(|(expert, _)| expert));
    }

    /// The next expert to send for.
    pub fn first(&self) -> Option<u32> {
        self.queue.front().copied()
    }

    /// It was sent for, or is there already.
    pub fn done(&mut self) {
        self.queue.pop_front();
    }
}
