//! What a driver answers to the engine, with loads that fail.

use std::collections::{HashMap, HashSet};
use tierwise_planner::CheckedPlan;
use tierwise_planner::engine::{Action, Input, MAX_RETRIES, SlotId};

/// By slot: layer, expert, whether it has come.
pub type Content = HashMap<SlotId, (u32, u32, bool)>;
/// Demanded and not computed yet, by layer.
pub type Demanded = HashMap<u32, HashSet<u32>>;

/// Answers a load or a wave. A load fails where `fails`, but no more often than it is tried again.
pub fn answer(
    plan: &CheckedPlan,
    action: Action,
    fails: bool,
    failures: &mut HashMap<SlotId, u32>,
    content: &mut Content,
    demanded: &mut Demanded,
) -> Input {
    match action {
        Action::Load { key, slot, .. } => {
            let times = failures.entry(slot).or_default();
            if fails && *times < MAX_RETRIES {
                *times += 1;
                return Input::Failed { key, slot, reason: "injected".into() };
            }
            *times = 0;
            content.insert(slot, (key.layer, key.expert, true));
            Input::Loaded { key, slot }
        }
        Action::Compute { layer, wave, experts, .. } => {
            let left = demanded.get_mut(&layer).expect("a layer with a demand");
            experts.iter().for_each(|(x, _)| assert!(left.remove(x), "computed once, and only on demand"));
            // Guests leave when they were computed.
            let staging = plan.cache_pools().len() as u32;
            let gone = |l: u32, e: u32| l == layer && experts.iter().any(|(x, _)| *x == e);
            content.retain(|s, (l, e, ready)| s.pool != staging || !*ready || !gone(*l, *e));
            Input::Computed { layer, wave }
        }
        other => unreachable!("{other:?} needs no answer"),
    }
}
