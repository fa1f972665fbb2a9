//! One budget of slots for all layers: where replicas are worth most.
//!
//! A layer's curve says how slow it is with so many slots; the sum over layers is made least exactly, by dynamic programming over layers
//! (time lost adds up: layers come one after another). Slots of a layer are then spread over devices by the room that they have, so
//! that no device gets more experts over all layers than its memory holds.

use super::packs::{PackSpec, place_in_packs};
use super::place::{DeviceSpec, Effort, PlaceOptions, place_layer};
use super::terms::Terms;
use crate::error::PlanError;

/// A layer's value for each number of units of slots.
pub type Curve = Vec<f64>;

/// How many units each layer gets, so that the sum of the curves' values is least and no more than `units` are given. Every layer gets at
/// least 0, at most its curve's length - 1.
pub fn share_units(curves: &[Curve], units: usize) -> Vec<usize> {
    // The least sum of the layers so far with so many units, and what the last of them gets.
    let mut least = vec![0.0; units + 1];
    let mut given: Vec<Vec<usize>> = Vec::with_capacity(curves.len());
    for curve in curves {
        let mut next = vec![f64::INFINITY; units + 1];
        let mut choice = vec![0; units + 1];
        for have in 0..=units {
            for (k, value) in curve.iter().enumerate().take(have + 1) {
                let sum = least[have - k] + value;
                if sum < next[have] {
                    next[have] = sum;
                    choice[have] = k;
                }
            }
        }
        least = next;
        given.push(choice);
    }
    let mut left = units;
    let mut out: Vec<usize> = given
        .iter()
        .rev()
        .map(|choice| {
            let k = choice[left];
            left -= k;
            k
        })
        .collect();
    out.reverse();
    out
}

/// Spreads each layer's slots over devices in proportion to their room, so that over all layers none gets more than its room, and in
/// one layer none gets more than `most`. `room`: `[devices]`. Returns `[layers][devices]`.
///
/// # Errors
/// [`PlanError::BadBalance`] when there is not enough room.
pub fn spread(layers: &[usize], room: &[u64], most: u32) -> Result<Vec<Vec<u32>>, PlanError> {
    let total: u64 = room.iter().sum();
    let wanted: u64 = layers.iter().map(|l| *l as u64).sum();
    let short = |found: u64| PlanError::BadBalance {
        field: "slots of all layers and devices".into(),
        found: found.to_string(),
        expected: format!("{wanted} or more, at most {most} of them on a device in a layer"),
    };
    if wanted > total {
        return Err(short(total));
    }
    let mut left = room.to_vec();
    let mut to_come = wanted;
    let mut out = Vec::with_capacity(layers.len());
    for slots in layers {
        let mut row = vec![0_u32; room.len()];
        // What each device's room allows, in proportion to what is still to come; then whoever has the most room left.
        for (g, n) in row.iter_mut().enumerate() {
            let share = (u128::from(left[g]) * *slots as u128 / u128::from(to_come.max(1))) as u64;
            *n = share.min(left[g]).min(u64::from(most)) as u32;
        }
        let mut given: u64 = row.iter().map(|n| u64::from(*n)).sum();
        while given > *slots as u64 {
            let g = (0..row.len()).max_by_key(|g| row[*g]).expect("a device has slots");
            row[g] -= 1;
            given -= 1;
        }
        while given < *slots as u64 {
            let free = |g: &usize| left[*g] - u64::from(row[*g]);
            let Some(g) = (0..row.len()).filter(|g| free(g) > 0 && row[*g] < most).max_by_key(free) else {
                return Err(short(total - left.iter().sum::<u64>()));
            };
            row[g] += 1;
            given += 1;
        }
        left.iter_mut().zip(&row).for_each(|(l, n)| *l -= u64::from(*n));
        to_come -= *slots as u64;
        out.push(row);
    }
    Ok(out)
}

/// Slots of every layer on every device, under the room that each device has for experts of all layers together. `windows`:
/// `[layers][windows][experts]`, `room`: `[devices]`, `host_price`: what a token counts whose expert does not fit and stays in its device's host
/// memory; None: everything has to fit. Returns `[layers][devices]`.
///
/// # Errors
/// [`PlanError::BadBalance`] when there is not room for every expert once, or loads are impossible.
pub fn layer_slots(
    windows: &[Vec<Vec<f64>>],
    devices: &[DeviceSpec],
    room: &[u64],
    host_price: Option<f64>,
    options: &PlaceOptions,
) -> Result<Vec<Vec<u32>>, PlanError> {
    let experts = windows.first().and_then(|l| l.first()).map_or(0, Vec::len);
    let total: u64 = room.iter().sum();
    let all = (windows.len() * experts) as u64;
    if total < all && host_price.is_none() {
        return Err(PlanError::BadBalance {
            field: "room for experts of all layers".into(),
            found: total.to_string(),
            expected: format!("{all} or more, every expert of {} layers once; or a price of host memory", windows.len()),
        });
    }
    // Slots are given in units of one per device, or of an eighth of what is to be given where that is less.
    let most = experts * devices.len();
    let (least, spare) = if total < all { (0, total as usize) } else { (experts, (total - all) as usize) };
    let unit = devices.len().min((spare / windows.len().max(1) / 8).max(1));
    // Nobody needs many times the mean.
    let steps = ((spare / unit).min(4 * spare / windows.len().max(1) / unit + 4)).min((most - least) / unit);
    let quick = PlaceOptions { effort: Effort::Fast, ..*options };
    let mut curves = Vec::with_capacity(windows.len());
    for layer in windows {
        let mut curve: Vec<f64> = Vec::with_capacity(steps + 1);
        for k in 0..=steps {
            let slots = least + k * unit;
            let fleet = fleet(devices, room, slots, experts)?;
            let value = match host_price {
                Some(price) if slots < experts => {
                    let host = PackSpec { price, slots: vec![experts as u32; devices.len()] };
                    place_in_packs(layer, &fleet, &[host], &quick, Terms::default())?.placed.objective
                }
                _ => place_layer(layer, &fleet, &quick)?.objective,
            };
            // The search is not perfect; more slots are never worse.
            curve.push(curve.last().map_or(value, |before| before.min(value)));
        }
        curves.push(curve);
    }
    let units = share_units(&curves, spare / unit);
    let slots: Vec<usize> = units.iter().map(|k| least + k * unit).collect();
    spread(&slots, room, experts as u32)
}

/// The devices with so many slots of one layer, in proportion to their room.
fn fleet(devices: &[DeviceSpec], room: &[u64], slots: usize, experts: usize) -> Result<Vec<DeviceSpec>, PlanError> {
    let row = spread(&[slots], room, experts as u32)?.remove(0);
    Ok(devices.iter().zip(row).map(|(d, slots)| DeviceSpec { slots, ..*d }).collect())
}
