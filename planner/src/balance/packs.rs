//! Experts that do not fit on the GPUs: the host's memory and the disk as further packs of each device, at a price per token.
//!
//! The coldest experts go to the dearest packs (any other choice costs more tokens in sum), then L1 balances what that makes of the loads.
//! How many slots are left to replicas is tried out: a replica may be worth more than another cold expert on the GPU. Last, experts on
//! both sides of the border change packs as long as that helps.

use super::place::{DeviceSpec, Effort, PlaceOptions, Placed, place_layer_with};
use super::terms::{Packs, Terms};
use crate::error::PlanError;

/// A memory of every device, after its own slots.
#[derive(Debug, Clone, PartialEq)]
pub struct PackSpec {
    /// A token of an expert here counts as so many: 1 or more, not less than in the pack before.
    pub price: f64,
    /// Experts that each device has room for. `[devices]`
    pub slots: Vec<u32>,
}

/// A layer placed in packs.
#[derive(Debug, Clone, PartialEq)]
pub struct PlacedInPacks {
    /// Devices. The objective counts tokens at their packs' prices.
    pub placed: Placed,
    /// 0 for the devices' own slots; empty where there is nothing else. `[experts]`
    pub pack_of: Vec<u8>,
}

/// Experts that change packs are this near to the border, on either side.
const NEAR: usize = 8;

/// Places the experts of one layer in the devices' own slots and in these further packs. `windows`: `[windows][experts]`
///
/// # Errors
/// [`PlanError::BadBalance`] when prices fall or are below 1, packs have no number for every device, or there is no room.
pub fn place_in_packs(
    windows: &[Vec<f64>],
    devices: &[DeviceSpec],
    more: &[PackSpec],
    options: &PlaceOptions,
    terms: Terms<'_>,
) -> Result<PlacedInPacks, PlanError> {
    let experts = windows.first().map_or(0, Vec::len);
    super::loads::check_rows(windows, experts)?;
    check(more, devices.len())?;
    let mut order: Vec<usize> = (0..experts).collect();
    let mean = |e: usize| windows.iter().map(|w| w[e]).sum::<f64>();
    order.sort_by(|a, b| mean(*b).total_cmp(&mean(*a)));
    let first: usize = devices.iter().map(|d| d.slots as usize).sum();
    let most = first.min(experts);
    let quick = PlaceOptions { effort: Effort::Fast, ..*options };
    let place = |pack_of: &[u8], options: &PlaceOptions| {
        let packs = Packs { pack_of: pack_of.to_vec(), slots: more.iter().map(|p| p.slots.clone()).collect() };
        let price = |e: usize| if pack_of[e] == 0 { 1.0 } else { more[usize::from(pack_of[e]) - 1].price };
        let scaled: Vec<Vec<f64>> = windows.iter().map(|w| w.iter().enumerate().map(|(e, l)| l * price(e)).collect()).collect();
        place_layer_with(&scaled, devices, options, Terms { packs: Some(&packs), ..terms })
    };
    let mut best: Option<(f64, usize, Vec<u8>)> = None;
    let mut reserve = 0;
    while reserve <= most {
        if let Some(pack_of) = by_heat(&order, most - reserve, more) {
            let value = place(&pack_of, &quick)?.objective;
            if best.as_ref().is_none_or(|(v, ..)| value < *v) {
                best = Some((value, most - reserve, pack_of));
            }
        }
        reserve = if reserve < 4 { reserve + 1 } else { reserve * 2 };
    }
    let Some((mut value, border, mut pack_of)) = best else {
        return bad("room in packs", first.to_string(), format!("{experts} in all, one for each expert of the layer"));
    };
    if options.effort == Effort::Thorough {
        for inner in border.saturating_sub(NEAR)..border {
            for outer in border..(border + NEAR).min(experts) {
                let mut other = pack_of.clone();
                other.swap(order[inner], order[outer]);
                let v = place(&other, &quick)?.objective;
                if v < value * (1.0 - 1e-9) {
                    (value, pack_of) = (v, other);
                }
            }
        }
    }
    let mut placed = place(&pack_of, options)?;
    placed.lower_bound = bound(windows, devices, more, most, options).min(placed.objective);
    Ok(PlacedInPacks { placed, pack_of })
}

fn bad<T>(field: &str, found: String, expected: String) -> Result<T, PlanError> {
    Err(PlanError::BadBalance { field: field.into(), found, expected })
}

fn check(more: &[PackSpec], devices: usize) -> Result<(), PlanError> {
    let mut before = 1.0;
    for pack in more {
        if !(pack.price.is_finite() && pack.price >= before) {
            return bad(
                "the price of a pack",
                pack.price.to_string(),
                format!("{before} or more, not less than the pack before"),
            );
        }
        if pack.slots.len() != devices {
            return bad("the slots of a pack", pack.slots.len().to_string(), format!("{devices} numbers, one for each device"));
        }
        before = pack.price;
    }
    if more.len() > 200 {
        return bad("packs", more.len().to_string(), "at most 200".into());
    }
    Ok(())
}

/// The `first` hottest experts in the first pack, the others in the next packs while they have room.
fn by_heat(order: &[usize], first: usize, more: &[PackSpec]) -> Option<Vec<u8>> {
    let mut pack_of = vec![0; order.len()];
    let mut rest = order[first..].iter();
    for (i, pack) in more.iter().enumerate() {
        let room: u64 = pack.slots.iter().map(|s| u64::from(*s)).sum();
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        rest.by_ref().take(room).for_each(|e| pack_of[*e] = i as u8 + 1);
    }
    rest.next().is_none().then_some(pack_of)
}

/// No choice of packs and no placement is better: every window's hottest experts in the cheapest packs, and devices level.
fn bound(windows: &[Vec<f64>], devices: &[DeviceSpec], more: &[PackSpec], first: usize, options: &PlaceOptions) -> f64 {
    let speeds: f64 = devices.iter().map(|d| 1.0 / d.inverse_speed).sum();
    let of = |window: &Vec<f64>| {
        let mut order: Vec<usize> = (0..window.len()).collect();
        order.sort_by(|a, b| window[*b].total_cmp(&window[*a]));
        let pack_of = by_heat(&order, first, more).unwrap_or_else(|| vec![0; window.len()]);
        let price = |e: usize| if pack_of[e] == 0 { 1.0 } else { more[usize::from(pack_of[e]) - 1].price };
        window.iter().enumerate().map(|(e, l)| l * price(e)).sum::<f64>() / speeds
    };
    options.risk.of(&mut windows.iter().map(of).collect::<Vec<_>>())
}
