//! L2: divides the tokens of one batch among the devices that hold their experts, so that the slowest device is as fast as possible.
//!
//! Exact, in whole tokens. A first division levels the holders of one expert after the other, and of experts with two holders once more.
//! What that leaves uneven is a flow: devices and experts form a network in which a device above its share hands tokens of an expert to another
//! holder of it, along shortest paths, all paths of a length at once (Dinic). Where the devices that can be reached are all full, their tokens
//! cannot go anywhere else (a minimum cut), so the share has to grow to what these devices need on average; nothing else raises it. The share
//! found is therefore both reached and a lower bound. In decode, where the time of a device follows the number of distinct experts it reads, every active expert
//! counts as one token and is computed by one holder ([`Unit::Experts`]).

use super::holders::Holders;

/// What makes a device busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Tokens: many per expert, weights are read once for all.
    Tokens,
    /// Distinct experts: few tokens each, reading weights is all.
    Experts,
}

/// Room that is kept between calls.
#[derive(Debug, Default)]
pub struct Splitter {
    /// Tokens of each place of [`Holders::device`] after [`Self::split`]. `[places]`
    pub share: Vec<u64>,
    /// Units of each device. `[devices]`
    pub load: Vec<u64>,
    /// Units that each device may have. `[devices]`
    cap: Vec<u64>,
    /// Places of experts with several holders, by device: where each device's begin, and (expert, place). `[devices + 1]`, `[places]`
    first: Vec<u32>,
    shared: Vec<(u32, u32)>,
    /// Experts with several holders, those with few tokens first; and room to sort them in.
    order: Vec<u32>,
    sorted: Vec<u32>,
    /// Steps from each device to one with room. `[devices]`
    distance: Vec<u32>,
    /// The places of each device that were not yet tried at these distances. `[devices]`
    untried: Vec<u32>,
    /// Devices and places on the way: from a place there to another holder's.
    path: Vec<(u16, u32, u32)>,
    seen: Vec<bool>,
    queue: Vec<u16>,
    /// The devices of the last minimum cut.
    cut: Vec<u16>,
}

/// No way to a device with room.
const NO_WAY: u32 = u32::MAX;
/// All ways of its length were taken.
const USED_UP: u32 = NO_WAY - 1;
/// How often experts with two holders are levelled again before paths are looked for: cheap, and most of the work.
const SWEEPS: usize = 2;
/// Lengths of numbers of tokens: powers of two in quarters.
const LENGTHS: usize = 256;

/// Its power of two, in quarters.
const fn length(units: u64) -> usize {
    let units = if units < 4 { 4 } else { units };
    let bits = units.ilog2() as usize;
    bits * 4 + (units >> (bits - 2) & 3) as usize
}

impl Splitter {
    /// Divides `tokens` (`[experts]`) among holders, for devices of these relative speeds (`[devices]`, positive). Returns the largest
    /// load per speed, in units.
    pub fn split(&mut self, holders: &Holders, tokens: &[u64], speed: &[f64], unit: Unit) -> f64 {
        self.start(holders, tokens, speed, unit);
        let total: u64 = self.load.iter().sum();
        let mut share = total as f64 / speed.iter().sum::<f64>();
        self.cut.clear();
        self.cut.extend(0..holders.num_devices as u16);
        share = self.grow(share, speed, total);
        while self.measure(holders) {
            for source in 0..self.load.len() {
                if self.load[source] <= self.cap[source] {
                    continue;
                }
                if self.distance[source] != NO_WAY {
                    self.hand_over(holders, source);
                } else if self.is_confined(holders, source) {
                    let confined = self.cut.iter().map(|d| self.load[usize::from(*d)]).sum();
                    share = self.grow(share, speed, confined);
                    // Rooms have changed, and distances with them.
                    break;
                }
            }
        }
        if unit == Unit::Experts {
            self.experts_to_tokens(holders, tokens);
        }
        self.load.iter().zip(speed).map(|(l, s)| *l as f64 / s).fold(0.0, f64::max)
    }

    /// The devices whose tokens could not go anywhere else, when the share was last raised: what binds.
    pub fn binding(&self) -> &[u16] {
        &self.cut
    }

    /// A first division, and who can hand what to whom.
    fn start(&mut self, holders: &Holders, tokens: &[u64], speed: &[f64], unit: Unit) {
        let devices = holders.num_devices;
        self.share.clear();
        self.share.resize(holders.device.len(), 0);
        self.load.clear();
        self.load.resize(devices, 0);
        self.cap.clear();
        self.cap.resize(devices, 0);
        self.first.clear();
        self.first.resize(devices + 1, 0);
        self.order.clear();
        let units = |e: usize| if unit == Unit::Experts { u64::from(tokens[e] > 0) } else { tokens[e] };
        for (e, n) in tokens.iter().enumerate() {
            let places = holders.places(e);
            if *n == 0 {
                continue;
            }
            if places.len() == 1 {
                self.share[places.start] = units(e);
                self.load[usize::from(holders.device[places.start])] += units(e);
            } else {
                self.order.push(e as u32);
                holders.of(e).iter().for_each(|g| self.first[usize::from(*g) + 1] += 1);
            }
        }
        for g in 0..devices {
            self.first[g + 1] += self.first[g];
        }
        self.shared.clear();
        self.shared.resize(self.first[devices] as usize, (0, 0));
        self.sort(units);
        let order = std::mem::take(&mut self.order);
        for e in &order {
            let e = *e as usize;
            for place in holders.places(e) {
                let g = usize::from(holders.device[place]);
                self.shared[self.first[g] as usize] = (e as u32, place as u32);
                self.first[g] += 1;
            }
            self.fill(holders, e, units(e), speed);
        }
        // Each beginning has moved to the next one's.
        self.first.copy_within(0..devices, 1);
        self.first[0] = 0;
        for _ in 0..SWEEPS {
            for e in order.iter().map(|e| *e as usize) {
                let places = holders.places(e);
                if places.len() == 2 {
                    self.load[usize::from(holders.device[places.start])] -= self.share[places.start];
                    self.load[usize::from(holders.device[places.start + 1])] -= self.share[places.start + 1];
                    self.fill_two(holders, places.start, units(e), speed);
                }
            }
        }
        self.order = order;
    }

    /// Experts of most tokens are divided last: they fill what the others left uneven. Lengths are exact enough, and need no comparisons.
    fn sort(&mut self, units: impl Fn(usize) -> u64) {
        let mut first = [0_u32; LENGTHS + 1];
        self.order.iter().for_each(|e| first[length(units(*e as usize)) + 1] += 1);
        for i in 0..LENGTHS {
            first[i + 1] += first[i];
        }
        self.sorted.clear();
        self.sorted.resize(self.order.len(), 0);
        for e in &self.order {
            let at = &mut first[length(units(*e as usize))];
            self.sorted[*at as usize] = *e;
            *at += 1;
        }
        std::mem::swap(&mut self.order, &mut self.sorted);
    }

    /// Levels the holders of one expert with its tokens.
    fn fill(&mut self, holders: &Holders, expert: usize, units: u64, speed: &[f64]) {
        let places = holders.places(expert);
        if places.len() == 2 {
            return self.fill_two(holders, places.start, units, speed);
        }
        let level = |this: &Self, p: usize| {
            let g = usize::from(holders.device[p]);
            this.load[g] as f64 / speed[g]
        };
        // The level to which all holders below it rise with these tokens.
        let mut target = f64::INFINITY;
        let (mut sum, mut speeds) = (units as f64, 0.0);
        loop {
            let next = places.clone().filter(|p| level(self, *p) < target || target.is_infinite());
            let (mut s, mut v) = (units as f64, 0.0);
            next.for_each(|p| {
                s += self.load[usize::from(holders.device[p])] as f64;
                v += speed[usize::from(holders.device[p])];
            });
            if v == speeds && s == sum || v == 0.0 {
                break;
            }
            (sum, speeds) = (s, v);
            target = s / v;
        }
        let mut left = units;
        for p in places.clone() {
            let g = usize::from(holders.device[p]);
            let want = (target * speed[g] - self.load[g] as f64).max(0.0).floor() as u64;
            let take = want.min(left);
            self.share[p] = take;
            self.load[g] += take;
            left -= take;
        }
        // Whole tokens that rounding left over.
        while left > 0 {
            let p = places.clone().min_by(|a, b| level(self, *a).total_cmp(&level(self, *b))).expect("an expert has holders");
            let take = left.div_ceil(places.len() as u64).min(left);
            self.share[p] += take;
            self.load[usize::from(holders.device[p])] += take;
            left -= take;
        }
    }

    /// The same for two holders, most experts' number: one formula.
    fn fill_two(&mut self, holders: &Holders, place: usize, units: u64, speed: &[f64]) {
        let (g, h) = (usize::from(holders.device[place]), usize::from(holders.device[place + 1]));
        let (load_g, load_h) = (self.load[g] as f64, self.load[h] as f64);
        let target = (units as f64 + load_g + load_h) / (speed[g] + speed[h]);
        // Rounded down, and never below nothing; the other one gets the rest.
        let take = ((target * speed[g] - load_g).max(0.0) as u64).min(units);
        self.share[place] = take;
        self.share[place + 1] = units - take;
        self.load[g] += take;
        self.load[h] += units - take;
    }

    /// Raises the share until the devices of the cut have room for `units`; sets every device's room.
    fn grow(&mut self, mut share: f64, speed: &[f64], units: u64) -> f64 {
        let room = |share: f64, g: u16| (share * speed[usize::from(g)] * (1.0 + 1e-12)).floor();
        let speeds: f64 = self.cut.iter().map(|g| speed[usize::from(*g)]).sum();
        share = share.max(units as f64 / speeds);
        // Rooms are whole: raise to the next place where one of them grows.
        while self.cut.iter().map(|g| room(share, *g)).sum::<f64>() < units as f64 {
            let next = |g: &u16| (room(share, *g) + 1.0) / speed[usize::from(*g)];
            share = self.cut.iter().map(next).fold(f64::INFINITY, f64::min);
        }
        for g in 0..self.cap.len() {
            self.cap[g] = room(share, g as u16) as u64;
        }
        share
    }

    /// Measures every device's distance to one with room. False when no device has too much.
    fn measure(&mut self, holders: &Holders) -> bool {
        let devices = holders.num_devices;
        if self.load.iter().zip(&self.cap).all(|(l, c)| l <= c) {
            return false;
        }
        self.distance.clear();
        self.distance.resize(devices, NO_WAY);
        self.untried.clone_from(&self.first);
        self.queue.clear();
        for g in 0..devices {
            if self.load[g] < self.cap[g] {
                self.distance[g] = 0;
                self.queue.push(g as u16);
            }
        }
        let mut at = 0;
        while at < self.queue.len() {
            let h = usize::from(self.queue[at]);
            at += 1;
            for (expert, _) in &self.shared[self.first[h] as usize..self.first[h + 1] as usize] {
                for place in holders.places(*expert as usize).filter(|p| self.share[*p] > 0) {
                    let g = usize::from(holders.device[place]);
                    if self.distance[g] == NO_WAY {
                        self.distance[g] = self.distance[h] + 1;
                        self.queue.push(g as u16);
                    }
                }
            }
        }
        true
    }

    /// The devices that tokens of this one can reach: true if they are the cut, none of them with room.
    fn is_confined(&mut self, holders: &Holders, source: usize) -> bool {
        self.seen.clear();
        self.seen.resize(holders.num_devices, false);
        self.queue.clear();
        self.queue.push(source as u16);
        self.seen[source] = true;
        let mut at = 0;
        while at < self.queue.len() {
            let g = usize::from(self.queue[at]);
            at += 1;
            for (expert, place) in &self.shared[self.first[g] as usize..self.first[g + 1] as usize] {
                if self.share[*place as usize] == 0 {
                    continue;
                }
                for h in holders.of(*expert as usize) {
                    if !std::mem::replace(&mut self.seen[usize::from(*h)], true) {
                        if self.load[usize::from(*h)] < self.cap[usize::from(*h)] {
                            return false;
                        }
                        self.queue.push(*h);
                    }
                }
            }
        }
        self.cut.clone_from(&self.queue);
        true
    }

    /// Hands what a device has too much along shortest paths to devices with room, as long as there are paths of that length.
    fn hand_over(&mut self, holders: &Holders, source: usize) {
        self.path.clear();
        let mut g = source;
        while self.load[source] > self.cap[source] {
            if self.distance[g] == 0 && self.load[g] < self.cap[g] {
                self.pass_along(source, g);
                self.path.clear();
                g = source;
            } else if let Some((place, other)) = self.next_step(holders, g) {
                self.path.push((g as u16, place, other));
                g = usize::from(holders.device[other as usize]);
            } else {
                self.distance[g] = USED_UP;
                let Some((before, ..)) = self.path.pop() else { return };
                g = usize::from(before);
            }
        }
    }

    /// A place of the device with tokens, and one of the same expert on a device that is one step nearer to room.
    fn next_step(&mut self, holders: &Holders, device: usize) -> Option<(u32, u32)> {
        let distance = self.distance[device].checked_sub(1)?;
        while self.untried[device] < self.first[device + 1] {
            let (expert, place) = self.shared[self.untried[device] as usize];
            if self.share[place as usize] > 0 {
                let is_nearer = |p: &usize| self.distance[usize::from(holders.device[*p])] == distance;
                if let Some(other) = holders.places(expert as usize).find(is_nearer) {
                    return Some((place, other as u32));
                }
            }
            self.untried[device] += 1;
        }
        None
    }

    fn pass_along(&mut self, source: usize, target: usize) {
        let room = (self.load[source] - self.cap[source]).min(self.cap[target] - self.load[target]);
        let amount = self.path.iter().map(|(_, place, _)| self.share[*place as usize]).fold(room, u64::min);
        for (_, place, other) in &self.path {
            self.share[*place as usize] -= amount;
            self.share[*other as usize] += amount;
        }
        self.load[source] -= amount;
        self.load[target] += amount;
    }

    /// Gives all tokens of an expert to the holder that was chosen for it.
    fn experts_to_tokens(&mut self, holders: &Holders, tokens: &[u64]) {
        for (e, tokens) in tokens.iter().enumerate() {
            holders.places(e).for_each(|p| self.share[p] *= tokens);
        }
    }
}
