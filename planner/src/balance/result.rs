//! The file that `balance -o` writes and `export` reads: who holds what, under which loads.

use super::holders::LayerPlacement;
use super::place::DeviceSpec;
use crate::error::PlanError;
use serde::{Deserialize, Serialize};

/// The version written and read.
pub const BALANCE_VERSION: u32 = 1;

/// A placement of experts over devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalanceFile {
    /// Schema version: 1.
    pub tierwise_balance: u32,
    /// The model, as the load's author calls it or as `--model` says.
    pub model: String,
    /// Layers of the model, dense ones included.
    pub num_layers: u32,
    /// Which of them have experts, ascending.
    pub moe_layers: Vec<u32>,
    /// Routed experts per layer.
    pub num_experts: u32,
    /// Groups of the router, 1 without.
    pub num_groups: u32,
    /// Who made it.
    pub policy: String,
    /// The devices.
    pub devices: Vec<FileDevice>,
    /// Experts in the slots of each device. `[moe layers][devices][slots]`
    pub slots: Vec<Vec<Vec<u16>>>,
    /// The load that it was made from, as shares of a layer. `[moe layers][experts]`
    pub load: Vec<Vec<f64>>,
    /// Memories of each device after its own slots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packs: Vec<FilePack>,
    /// Memory of each expert: 0 for the devices' own slots, then those of `packs`; empty without any. `[moe layers][experts]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pack_of: Vec<Vec<u8>>,
}

/// A further memory of every device, in a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilePack {
    /// What it is: host, disk.
    pub name: String,
    /// A token of an expert here counts as so many.
    pub price: f64,
    /// Experts of a layer that each device has room for. `[devices]`
    pub slots: Vec<u32>,
}

/// A device in a file.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileDevice {
    /// Its node.
    pub node: u16,
    /// Relative speed.
    pub speed: f64,
    /// Slots per layer.
    pub slots: u32,
}

impl BalanceFile {
    /// Reads a file's text and checks all of it.
    ///
    /// # Errors
    /// [`PlanError::BadBalance`] naming the field.
    pub fn from_json(text: &str) -> Result<Self, PlanError> {
        let bad =
            |field: &str, found: String, expected: String| Err(PlanError::BadBalance { field: field.into(), found, expected });
        let file: Self = match serde_json::from_str(text) {
            Ok(file) => file,
            Err(e) => return bad("the file", e.to_string(), "JSON written by `tierwise balance -o`".into()),
        };
        if file.tierwise_balance != BALANCE_VERSION {
            return bad("tierwise_balance", file.tierwise_balance.to_string(), BALANCE_VERSION.to_string());
        }
        file.check()?;
        Ok(file)
    }

    /// Refuses what contradicts itself.
    ///
    /// # Errors
    /// [`PlanError::BadBalance`] naming layer, device and expert.
    pub fn check(&self) -> Result<(), PlanError> {
        let bad = |field: String, found: String, expected: String| Err(PlanError::BadBalance { field, found, expected });
        let ascending = self.moe_layers.windows(2).all(|w| w[0] < w[1]);
        if self.moe_layers.is_empty() || !ascending || self.moe_layers.last().is_some_and(|l| *l >= self.num_layers) {
            return bad(
                "moe_layers".into(),
                format!("{:?}", self.moe_layers),
                format!("ascending layers below {}", self.num_layers),
            );
        }
        for (what, found) in [("the layers of slots", self.slots.len()), ("the layers of load", self.load.len())] {
            if found != self.moe_layers.len() {
                return bad(what.into(), found.to_string(), format!("{}, as in moe_layers", self.moe_layers.len()));
            }
        }
        if let Some(g) = self.devices.iter().position(|d| !(d.speed.is_finite() && d.speed > 0.0)) {
            return bad(format!("the speed of device {g}"), self.devices[g].speed.to_string(), "a positive number".into());
        }
        super::loads::check_rows(&self.load, self.num_experts as usize)?;
        self.check_packs()?;
        let more = |g: usize| self.packs.iter().map(|p| p.slots[g]).fold(0, u32::saturating_add);
        let room: Vec<u32> = self.devices.iter().enumerate().map(|(g, d)| d.slots.saturating_add(more(g))).collect();
        for (slots, layer) in self.slots.iter().zip(&self.moe_layers) {
            // EPLB's own placements may hold an expert twice on a device; each copy is a slot.
            let once = LayerPlacement { devices: slots.iter().map(|d| once(d)).collect() };
            let too_many = slots.iter().zip(&room).position(|(s, r)| s.len() > *r as usize);
            let checked = match too_many {
                Some(g) => {
                    bad(format!("the number of slots of device {g}"), slots[g].len().to_string(), format!("at most {}", room[g]))
                }
                None => once.check(self.num_experts as usize, &room),
            };
            if let Err(PlanError::BadBalance { field, found, expected }) = checked {
                return bad(format!("layer {layer}: {field}"), found, expected);
            }
        }
        Ok(())
    }

    /// Further memories: as many rooms as devices, every expert in one of them or in own slots, none too full, no replicas there.
    fn check_packs(&self) -> Result<(), PlanError> {
        let bad = |field: String, found: String, expected: String| Err(PlanError::BadBalance { field, found, expected });
        for p in &self.packs {
            if p.slots.len() != self.devices.len() || !(p.price.is_finite() && p.price >= 1.0) {
                let found = format!("a price of {} and {} numbers of slots", p.price, p.slots.len());
                return bad(
                    format!("the memory {}", p.name),
                    found,
                    format!("a price of 1 or more, {} numbers", self.devices.len()),
                );
            }
        }
        let layers = if self.packs.is_empty() { 0 } else { self.moe_layers.len() };
        if self.pack_of.len() != layers {
            return bad("the layers of pack_of".into(), self.pack_of.len().to_string(), format!("{layers}"));
        }
        for ((slots, packs), layer) in self.slots.iter().zip(&self.pack_of).zip(&self.moe_layers) {
            let most = self.packs.len();
            if packs.len() != self.num_experts as usize || packs.iter().any(|p| usize::from(*p) > most) {
                let expected = format!("{} of them, from 0 to {most}", self.num_experts);
                return bad(format!("layer {layer}: the memories of experts"), format!("{packs:?}"), expected);
            }
            let pack_of = |e: &u16| packs.get(usize::from(*e)).map_or(0, |p| usize::from(*p));
            for (g, held) in slots.iter().enumerate() {
                for pack in 0..=most {
                    let n = held.iter().filter(|e| pack_of(e) == pack).count();
                    let (name, room) = match pack.checked_sub(1) {
                        Some(p) => (self.packs[p].name.as_str(), self.packs[p].slots.get(g).copied().unwrap_or(0)),
                        None => ("own", self.devices.get(g).map_or(0, |d| d.slots)),
                    };
                    if n > room as usize {
                        return bad(
                            format!("layer {layer}: the experts in {name} slots of device {g}"),
                            n.to_string(),
                            format!("at most {room}"),
                        );
                    }
                }
            }
            let mut seen = vec![false; packs.len()];
            for e in slots.iter().flatten().filter(|e| pack_of(e) > 0) {
                if std::mem::replace(&mut seen[usize::from(*e)], true) {
                    return bad(
                        format!("layer {layer}: the replicas of expert {e}"),
                        "several".into(),
                        "one outside own slots".into(),
                    );
                }
            }
        }
        Ok(())
    }

    /// Experts that lie in further memories, over all layers.
    pub fn num_outside(&self) -> usize {
        self.pack_of.iter().flatten().filter(|p| **p > 0).count()
    }

    /// The text of a file.
    ///
    /// # Panics
    /// Never: every field has a JSON form.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string(self).expect("numbers, texts and lists have a JSON form");
        text.push('\n');
        text
    }

    /// The devices, as L1 takes them.
    pub fn specs(&self) -> Vec<DeviceSpec> {
        self.devices.iter().map(|d| DeviceSpec { node: d.node, inverse_speed: 1.0 / d.speed, slots: d.slots }).collect()
    }
}

/// Each expert of a device once, in order.
pub fn once(slots: &[u16]) -> Vec<u16> {
    let mut out: Vec<u16> = Vec::with_capacity(slots.len());
    slots.iter().for_each(|e| {
        if !out.contains(e) {
            out.push(*e);
        }
    });
    out
}
