//! A load log under every policy: what each would have cost, on one cost model.
//!
//! Placements are made from the first steps and judged on the others (a log of one step is judged on itself, and says so). `ep`: experts
//! in order, nothing else. `eplb`: EPLB's replicas, tokens divided equally. `eplb+split`: the same replicas, tokens divided by L2.
//! `llep`: experts in order, LLA in every layer and step whose imbalance reaches lambda. `tierwise`: L1, L2 and L3. With a rebalance
//! interval EPLB and ours are placed anew from the steps since the last one, and wait for the weights that move.

use super::affinity::{Affinity, align};
use super::cost::{LayerCost, LayerSeconds};
use super::decide::{DecideSettings, Decider};
use super::eplb::{EplbShape, eplb};
use super::holders::LayerPlacement;
use super::loads::Loads;
use super::metrics::{Balance, BalanceReport};
use super::packs::{PackSpec, PlacedInPacks, place_in_packs};
use super::place::{DeviceSpec, PlaceOptions, place_layer_with};
use super::replan::replan_layer;
use super::result::once;
use super::spill::SpillSettings;
use super::terms::{Terms, Together};
use crate::error::PlanError;
use serde::Serialize;

/// A way of placing experts and dividing tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Plain expert parallelism.
    Ep,
    /// EPLB.
    Eplb,
    /// EPLB's replicas, divided exactly.
    EplbSplit,
    /// LLEP.
    Llep,
    /// L1, L2 and L3.
    Tierwise,
}

impl Policy {
    /// All, by name.
    pub const ALL: [(&'static str, Self); 5] = [
        ("ep", Self::Ep),
        ("eplb", Self::Eplb),
        ("eplb+split", Self::EplbSplit),
        ("llep", Self::Llep),
        ("tierwise", Self::Tierwise),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, p)| *p == self).map_or("", |(n, _)| n)
    }

    /// The policy of that name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(n, _)| *n == name).map(|(_, p)| *p)
    }
}

/// On what a log is replayed, and how.
#[derive(Debug, Clone)]
pub struct ReplaySettings {
    /// The devices, with slots per layer.
    pub devices: Vec<DeviceSpec>,
    /// Nodes.
    pub num_nodes: usize,
    /// Groups of the router.
    pub num_groups: usize,
    /// Prices.
    pub cost: LayerCost,
    /// Steps that placements are made from; the others are replayed. 0: the log has one step, or is to be judged on itself.
    pub train_steps: usize,
    /// Place anew after so many steps; 0: never.
    pub rebalance_every: usize,
    /// Windows of the log whose mean is minimised.
    pub windows: usize,
    /// How L1 searches.
    pub place: PlaceOptions,
    /// L3.
    pub spill: SpillSettings,
    /// LLEP's alpha.
    pub alpha: f64,
    /// LLEP acts from this largest / mean on.
    pub lambda: f64,
    /// Bytes that one row of activations takes on a device, for the peak.
    pub row_bytes: f64,
    /// Slots of each layer on each device, where layers differ; empty: those of `devices` in every layer. `[layers][devices]`
    pub layer_slots: Vec<Vec<u32>>,
    /// How much slower than a fresh placement ours may be when one in use is changed, to copy less: 0.01 for 1 %.
    pub tolerance: f64,
    /// Which experts tokens chose together and one after another, if the log says.
    pub affinity: Option<Affinity>,
    /// Price of a pair of experts that a token needs from two devices (with several nodes: from two nodes), in tokens computed.
    pub pair_price: f64,
    /// Memories of each device after its own slots, for what does not fit there: ours alone can use them. Then no copies are made on the way (L3).
    pub packs: Vec<PackSpec>,
}

impl ReplaySettings {
    /// The devices with a layer's slots.
    pub fn fleet(&self, layer: usize) -> Vec<DeviceSpec> {
        match self.layer_slots.get(layer) {
            Some(row) => self.devices.iter().zip(row).map(|(d, slots)| DeviceSpec { slots: *slots, ..*d }).collect(),
            None => self.devices.clone(),
        }
    }
}

/// What a policy cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PolicyResult {
    /// Its name.
    pub policy: &'static str,
    /// Mean seconds of a step: all layers, and its share of rebalances.
    pub step_s: f64,
    /// Of which computing.
    pub compute_s: f64,
    /// Of which tokens on links.
    pub all_to_all_s: f64,
    /// Of which weights on links, waited for.
    pub transfer_s: f64,
    /// How balanced tokens were.
    #[serde(flatten)]
    pub balance: BalanceReport,
    /// Expert copies sent, rebalances included.
    pub transfers: u64,
    /// Their bytes.
    pub bytes_moved: f64,
    /// Most bytes of experts and rows that a device had at once, all layers' experts and one layer's rows.
    pub peak_bytes: f64,
    /// Most tokens that a device computed in a layer.
    pub peak_rows: u64,
    /// Tokens per device of the last step, layer by layer. `[layers][devices]`
    #[serde(skip)]
    pub last_loads: Vec<Vec<u64>>,
    /// The first placement.
    #[serde(skip)]
    pub placement: Placement,
}

/// Experts in the slots of one layer's devices; how often one is there counts in an equal division. `[devices][slots]`
pub type Slots = Vec<Vec<u16>>;

/// All layers placed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Placement {
    /// Who holds what. `[layers][devices][slots]`
    pub slots: Vec<Slots>,
    /// In which of the device's memories, 0 for its own slots; empty where there are no others. `[layers][experts]`
    pub pack_of: Vec<Vec<u8>>,
}

impl Placement {
    /// Of layers that were placed.
    pub fn of(placed: Vec<PlacedInPacks>) -> Self {
        let mut all = Self::default();
        for layer in placed {
            all.slots.push(layer.placed.placement.devices);
            if !layer.pack_of.is_empty() {
                all.pack_of.push(layer.pack_of);
            }
        }
        all
    }

    /// What a token of each expert counts as, with the memories of these prices after the devices' own slots. `[layers][experts]`
    pub fn prices(&self, packs: &[PackSpec]) -> Vec<Vec<f64>> {
        let price = |pack: &u8| if *pack == 0 { 1.0 } else { packs[usize::from(*pack) - 1].price };
        self.pack_of.iter().map(|layer| layer.iter().map(price).collect()).collect()
    }
}

/// Replays the log under one policy.
///
/// # Errors
/// [`PlanError::BadBalance`] when the policy cannot place these experts on these devices.
pub fn replay(loads: &Loads, policy: Policy, settings: &ReplaySettings) -> Result<PolicyResult, PlanError> {
    replay_from(loads, policy, settings, None, &mut || ())
}

/// The same from this first placement, if there is one; says when each step is done.
///
/// # Errors
/// As [`replay`].
pub fn replay_from(
    loads: &Loads,
    policy: Policy,
    settings: &ReplaySettings,
    first: Option<Placement>,
    on_step: &mut dyn FnMut(),
) -> Result<PolicyResult, PlanError> {
    let (train, test) = parts(loads, settings)?;
    let mut run = Run::new(loads, policy, settings);
    match first {
        Some(placement) => run.switch_to(placement),
        None => run.place(train)?,
    }
    let first = run.placement.clone();
    let mut since = test.start;
    for step in test.clone() {
        if settings.rebalance_every > 0 && step - since == settings.rebalance_every {
            run.place(since..step)?;
            since = step;
        }
        run.step(step)?;
        on_step();
    }
    Ok(PolicyResult { placement: first, ..run.result(test.len()) })
}

/// Steps that placements are made from.
///
/// # Errors
/// [`PlanError::BadBalance`] when none would be left to replay.
pub fn steps_placed_from(loads: &Loads, settings: &ReplaySettings) -> Result<std::ops::Range<usize>, PlanError> {
    Ok(parts(loads, settings)?.0)
}

/// Steps to place from and steps to replay.
fn parts(loads: &Loads, settings: &ReplaySettings) -> Result<(std::ops::Range<usize>, std::ops::Range<usize>), PlanError> {
    let steps = loads.num_steps();
    if settings.train_steps == 0 {
        return Ok((0..steps, 0..steps));
    }
    if settings.train_steps >= steps {
        return Err(PlanError::BadBalance {
            field: "steps to place from".into(),
            found: settings.train_steps.to_string(),
            expected: format!("fewer than {steps}, the steps of the log"),
        });
    }
    Ok((0..settings.train_steps, settings.train_steps..steps))
}

struct Run<'a> {
    loads: &'a Loads,
    policy: Policy,
    settings: &'a ReplaySettings,
    placement: Placement,
    /// Experts in the devices' own slots, all layers. `[devices]`
    held: Vec<usize>,
    decider: Decider,
    balance: Balance,
    seconds: LayerSeconds,
    moved_s: f64,
    sent: u64,
    peak_rows: u64,
    peak_experts: usize,
    last_loads: Vec<Vec<u64>>,
}

impl<'a> Run<'a> {
    fn new(loads: &'a Loads, policy: Policy, settings: &'a ReplaySettings) -> Self {
        let decide = DecideSettings {
            speed: settings.devices.iter().map(|d| 1.0 / d.inverse_speed).collect(),
            cost: settings.cost,
            spill: settings.spill,
            alpha: settings.alpha,
            lambda: settings.lambda,
        };
        Self {
            loads,
            policy,
            settings,
            placement: Placement::default(),
            held: Vec::new(),
            decider: Decider::new(policy, decide),
            balance: Balance::default(),
            seconds: LayerSeconds::default(),
            moved_s: 0.0,
            sent: 0,
            peak_rows: 0,
            peak_experts: 0,
            last_loads: vec![Vec::new(); loads.num_layers],
        }
    }

    /// Places all layers from these steps; counts what moves.
    fn place(&mut self, steps: std::ops::Range<usize>) -> Result<(), PlanError> {
        let old = self.decider.slots();
        let new = placement(self.loads, self.policy, self.settings, steps, (!old.is_empty()).then_some(old))?;
        for (old, new) in old.iter().zip(&new.slots) {
            let gains: Vec<u64> = new.iter().zip(old).map(|(n, o)| n.iter().filter(|e| !o.contains(e)).count() as u64).collect();
            self.sent += gains.iter().sum::<u64>();
            self.moved_s += self.settings.cost.transfer_s(gains.iter().copied().max().unwrap_or(0));
        }
        self.switch_to(new);
        Ok(())
    }

    fn switch_to(&mut self, placement: Placement) {
        let num_experts = vec![self.loads.num_experts; placement.slots.len()];
        let in_own_slots = |layer: usize, e: &u16| placement.pack_of.get(layer).is_none_or(|p| p[usize::from(*e)] == 0);
        let held = |g: usize| {
            let of_layer = |(layer, slots): (usize, &Slots)| slots[g].iter().filter(|e| in_own_slots(layer, e)).count();
            placement.slots.iter().enumerate().map(of_layer).sum()
        };
        self.held = (0..self.settings.devices.len()).map(held).collect();
        self.decider.place(placement.slots.clone(), &num_experts);
        self.decider.price(placement.prices(&self.settings.packs));
        self.placement = placement;
    }

    fn step(&mut self, step: usize) -> Result<(), PlanError> {
        for layer in 0..self.loads.num_layers {
            let tokens = self.loads.row(step, layer);
            let decision = self.decider.decide(layer, tokens)?;
            let (rows, seconds) = (decision.rows(), decision.seconds);
            self.sent += decision.sent;
            self.seconds.compute_s += seconds.compute_s;
            self.seconds.all_to_all_s += seconds.all_to_all_s;
            self.seconds.transfer_s += seconds.transfer_s;
            self.balance.add(&self.decider.levels(layer, &decision));
            self.peak_rows = self.peak_rows.max(rows.iter().copied().max().unwrap_or(0));
            self.last_loads[layer] = rows;
        }
        let held = self.held.iter().enumerate().map(|(g, held)| held + self.decider.cache().of(g).count());
        self.peak_experts = self.peak_experts.max(held.max().unwrap_or(0));
        Ok(())
    }

    fn result(self, steps: usize) -> PolicyResult {
        let n = steps.max(1) as f64;
        let cost = &self.settings.cost;
        PolicyResult {
            policy: self.policy.name(),
            step_s: (self.seconds.total() + self.moved_s) / n,
            compute_s: self.seconds.compute_s / n,
            all_to_all_s: self.seconds.all_to_all_s / n,
            transfer_s: (self.seconds.transfer_s + self.moved_s) / n,
            balance: self.balance.report(),
            transfers: self.sent,
            bytes_moved: self.sent as f64 * cost.expert_bytes,
            peak_bytes: self.peak_experts as f64 * cost.expert_bytes + self.peak_rows as f64 * self.settings.row_bytes,
            peak_rows: self.peak_rows,
            last_loads: self.last_loads,
            placement: Placement::default(),
        }
    }
}

/// The slots that a policy fills from these steps of the log.
///
/// # Errors
/// [`PlanError::BadBalance`] when it cannot.
pub fn placement(
    loads: &Loads,
    policy: Policy,
    settings: &ReplaySettings,
    steps: std::ops::Range<usize>,
    old: Option<&[Slots]>,
) -> Result<Placement, PlanError> {
    let devices = settings.devices.len();
    let in_own_slots = |slots| Ok(Placement { slots, pack_of: Vec::new() });
    match policy {
        Policy::Ep | Policy::Llep => {
            let layer = LayerPlacement::contiguous(loads.num_experts, devices)?;
            let least = settings.devices.iter().map(|d| d.slots as usize).min().unwrap_or(0);
            if !settings.packs.is_empty() && least < layer.devices[0].len() {
                return Err(PlanError::BadBalance {
                    field: "slots of a device".into(),
                    found: least.to_string(),
                    expected: format!("{} or more: {} uses no other memory", layer.devices[0].len(), policy.name()),
                });
            }
            in_own_slots(vec![layer.devices; loads.num_layers])
        }
        Policy::Eplb | Policy::EplbSplit => {
            let weight: Vec<Vec<f64>> = (0..loads.num_layers).map(|l| loads.sum(steps.clone(), l)).collect();
            let slots = settings.devices.first().map_or(0, |d| d.slots);
            if settings.devices.iter().any(|d| d.slots != slots) {
                return Err(PlanError::BadBalance {
                    field: "slots of the devices".into(),
                    found: "not all alike".into(),
                    expected: format!("{slots} on each, all that EPLB can"),
                });
            }
            let shape = EplbShape {
                num_replicas: slots as usize * devices,
                num_groups: settings.num_groups,
                num_nodes: settings.num_nodes,
                num_devices: devices,
            };
            let maps = eplb(&weight, shape)?;
            let of_layer = |row: &Vec<u16>| row.chunks(slots as usize).map(<[u16]>::to_vec).collect();
            in_own_slots(maps.physical_to_logical.iter().map(of_layer).collect())
        }
        Policy::Tierwise => Ok(Placement::of(place_all(loads, settings, steps, old)?)),
    }
}

/// L1 for all layers. Against an old placement few experts move; otherwise devices of a layer are relabelled so that tokens stay where
/// they are, if the log says which experts follow each other.
///
/// # Errors
/// [`PlanError::BadBalance`].
pub fn place_all(
    loads: &Loads,
    settings: &ReplaySettings,
    steps: std::ops::Range<usize>,
    old: Option<&[Slots]>,
) -> Result<Vec<PlacedInPacks>, PlanError> {
    let place = |layer| place_one(loads, settings, steps.clone(), layer, old.map(|o| &o[layer]));
    let mut placed = (0..loads.num_layers).map(place).collect::<Result<Vec<_>, _>>()?;
    if old.is_none() {
        align_all(&mut placed, settings);
    }
    Ok(placed)
}

/// Relabels the devices of each layer after the one before, so that tokens travel less. Costs no balance. Devices that differ in room
/// after their own slots keep their names.
pub fn align_all(placed: &mut [PlacedInPacks], settings: &ReplaySettings) {
    let Some(affinity) = &settings.affinity else { return };
    if settings.packs.iter().any(|p| p.slots.iter().any(|s| *s != p.slots[0])) {
        return;
    }
    for layer in 1..placed.len() {
        let (before, this) = (&placed[layer - 1].placed.placement, &placed[layer].placed.placement);
        placed[layer].placed.placement = align(before, this, &affinity.hops[layer - 1], &settings.fleet(layer));
    }
}

/// L1 for one layer, from a placement in use or afresh; with more memories always afresh.
///
/// # Errors
/// [`PlanError::BadBalance`].
pub fn place_one(
    loads: &Loads,
    settings: &ReplaySettings,
    steps: std::ops::Range<usize>,
    layer: usize,
    old: Option<&Slots>,
) -> Result<PlacedInPacks, PlanError> {
    let windows = loads.windows(steps, layer, settings.windows);
    let fleet = settings.fleet(layer);
    let mut counts = Vec::new();
    let mut terms = Terms::default();
    if let Some(affinity) = settings.affinity.as_ref().filter(|_| settings.pair_price > 0.0) {
        // In the units of a mean window.
        let mean = windows.iter().flatten().sum::<f64>() / windows.len() as f64;
        let scale = mean / (affinity.choices as f64).max(1.0);
        counts.extend(affinity.together[layer].iter().map(|c| c * scale));
        terms.together = Some(Together { counts: &counts, price: settings.pair_price, by_node: settings.num_nodes > 1 });
    }
    if !settings.packs.is_empty() {
        return place_in_packs(&windows, &fleet, &settings.packs, &settings.place, terms);
    }
    let placed = match old {
        Some(old) => {
            let old = LayerPlacement { devices: old.iter().map(|d| once(d)).collect() };
            replan_layer(&windows, &fleet, &old, settings.tolerance, &settings.place, terms)
        }
        None => place_layer_with(&windows, &fleet, &settings.place, terms),
    };
    Ok(PlacedInPacks { placed: placed?, pack_of: Vec::new() })
}
