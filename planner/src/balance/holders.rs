//! Which devices hold which experts of one layer, looked up both ways.

use crate::error::PlanError;

/// Experts that each device holds. No device holds an expert twice; every expert is held. `[devices][experts held]`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LayerPlacement {
    /// In the order of slots.
    pub devices: Vec<Vec<u16>>,
}

impl LayerPlacement {
    /// As many experts on every device, in order: plain expert parallelism.
    ///
    /// # Errors
    /// [`PlanError::BadBalance`] when experts do not divide among devices.
    pub fn contiguous(num_experts: usize, num_devices: usize) -> Result<Self, PlanError> {
        if num_devices == 0 || !num_experts.is_multiple_of(num_devices) {
            return Err(PlanError::BadBalance {
                field: "devices".into(),
                found: num_devices.to_string(),
                expected: format!("a divisor of {num_experts}, the number of experts"),
            });
        }
        let each = num_experts / num_devices;
        Ok(Self { devices: (0..num_devices).map(|g| (g * each..(g + 1) * each).map(|e| e as u16).collect()).collect() })
    }

    /// From slots, as many on every device; an expert that a device holds twice is held once.
    pub fn from_slots(slots: &[u16], num_devices: usize) -> Self {
        let devices = slots.chunks_exact(slots.len() / num_devices.max(1));
        let once = |slots: &[u16]| {
            let mut held: Vec<u16> = Vec::with_capacity(slots.len());
            slots.iter().for_each(|e| {
                if !held.contains(e) {
                    held.push(*e);
                }
            });
            held
        };
        Self { devices: devices.map(once).collect() }
    }

    /// Refuses unknown experts, an expert twice on a device, an expert nowhere, and more experts than slots. `slots`: `[devices]`
    ///
    /// # Errors
    /// [`PlanError::BadBalance`] naming device and expert.
    pub fn check(&self, num_experts: usize, slots: &[u32]) -> Result<(), PlanError> {
        let bad = |field: String, found: String, expected: &str| {
            Err(PlanError::BadBalance { field, found, expected: expected.to_string() })
        };
        if self.devices.len() != slots.len() {
            return bad("the number of devices".into(), self.devices.len().to_string(), &slots.len().to_string());
        }
        let mut seen_on = vec![usize::MAX; num_experts];
        for (g, held) in self.devices.iter().enumerate() {
            if held.len() > slots[g] as usize {
                return bad(
                    format!("the number of experts on device {g}"),
                    held.len().to_string(),
                    &format!("at most {}", slots[g]),
                );
            }
            for e in held {
                match seen_on.get_mut(usize::from(*e)) {
                    None => return bad(format!("an expert on device {g}"), e.to_string(), &format!("below {num_experts}")),
                    Some(at) if *at == g => {
                        return bad(format!("the experts of device {g}"), format!("{e} twice"), "each once");
                    }
                    Some(at) => *at = g,
                }
            }
        }
        match seen_on.iter().position(|g| *g == usize::MAX) {
            Some(e) => bad(format!("the devices that hold expert {e}"), "none".into(), "one or more"),
            None => Ok(()),
        }
    }

    /// Replicas per expert. `[experts]`
    pub fn counts(&self, num_experts: usize) -> Vec<u32> {
        let mut counts = vec![0; num_experts];
        self.devices.iter().flatten().for_each(|e| counts[usize::from(*e)] += 1);
        counts
    }

    /// Load of each device when every expert's tokens are divided equally among its replicas. `[devices]`
    pub fn equal_loads(&self, load: &[f64]) -> Vec<f64> {
        let counts = self.counts(load.len());
        let of = |held: &Vec<u16>| held.iter().map(|e| load[usize::from(*e)] / f64::from(counts[usize::from(*e)])).sum();
        self.devices.iter().map(of).collect()
    }

    /// By expert.
    pub fn holders(&self, num_experts: usize) -> Holders {
        let mut lists = vec![Vec::new(); num_experts];
        for (g, held) in self.devices.iter().enumerate() {
            held.iter().for_each(|e| lists[usize::from(*e)].push(g as u16));
        }
        Holders::new(&lists, self.devices.len())
    }
}

/// The devices that hold each expert, side by side.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Holders {
    /// Number of devices.
    pub num_devices: usize,
    /// Where the devices of each expert begin. `[experts + 1]`
    pub first: Vec<u32>,
    /// `[places]`
    pub device: Vec<u16>,
}

impl Holders {
    /// From a list of devices for each expert.
    pub fn new(lists: &[Vec<u16>], num_devices: usize) -> Self {
        let mut out = Self { num_devices, first: Vec::with_capacity(lists.len() + 1), device: Vec::new() };
        out.first.push(0);
        for list in lists {
            out.device.extend_from_slice(list);
            out.first.push(out.device.len() as u32);
        }
        out
    }

    /// These and more: (expert, device), none of them held already. An expert's further devices come after its own, in this order.
    pub fn with(&self, more: &[(u16, u16)]) -> Self {
        let experts = self.num_experts();
        // As many more places for each expert as it gets devices; then where its next one goes.
        let mut next = vec![0_u32; experts];
        more.iter().for_each(|(e, _)| next[usize::from(*e)] += 1);
        let mut out = Self {
            num_devices: self.num_devices,
            first: Vec::with_capacity(self.first.len()),
            device: Vec::with_capacity(self.device.len() + more.len()),
        };
        out.first.push(0);
        for (e, next) in next.iter_mut().enumerate() {
            out.device.extend_from_slice(self.of(e));
            let own_end = out.device.len();
            out.device.resize(own_end + *next as usize, 0);
            *next = own_end as u32;
            out.first.push(out.device.len() as u32);
        }
        for (e, device) in more {
            let at = &mut next[usize::from(*e)];
            out.device[*at as usize] = *device;
            *at += 1;
        }
        out
    }

    /// Number of experts.
    pub fn num_experts(&self) -> usize {
        self.first.len().saturating_sub(1)
    }

    /// The places of an expert in [`Self::device`].
    pub fn places(&self, expert: usize) -> std::ops::Range<usize> {
        self.first[expert] as usize..self.first[expert + 1] as usize
    }

    /// The devices that hold an expert.
    pub fn of(&self, expert: usize) -> &[u16] {
        &self.device[self.places(expert)]
    }
}
