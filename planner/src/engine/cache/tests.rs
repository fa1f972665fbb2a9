//! Policies against naive twins.

use super::*;
use proptest::prelude::*;

/// LRU as a list: most recent last; one demand's experts enter in falling order, so that the smallest is the oldest of them.
struct NaiveLru(Vec<u32>);

impl NaiveLru {
    fn on_demand(&mut self, experts: &[u32]) {
        self.0.retain(|e| !experts.contains(e));
        self.0.extend(experts);
    }

    fn victim(&self, candidates: &[u32]) -> u32 {
        let never: Option<&u32> = candidates.iter().find(|c| !self.0.contains(c));
        *never.unwrap_or_else(|| self.0.iter().find(|e| candidates.contains(e)).expect("every candidate is in the list"))
    }
}

proptest! {
    #[test]
    fn lru_equals_its_twin(steps in prop::collection::vec((prop::collection::btree_set(0_u32..16, 1..6), prop::collection::btree_set(0_u32..16, 1..8)), 1..60)) {
        let (mut fast, mut naive) = (build(CachePolicyKind::Lru, 16), NaiveLru(Vec::new()));
        for (demand, candidates) in steps {
            let demand: Vec<u32> = demand.into_iter().collect();
            let candidates: Vec<u32> = candidates.into_iter().collect();
            let experts: Vec<(u32, u32)> = demand.iter().map(|e| (*e, 1)).collect();
            fast.on_demand(&Seen { experts: &experts, tokens: 1, scores: &[] });
            naive.on_demand(&demand);
            prop_assert_eq!(fast.victim(&candidates), naive.victim(&candidates));
        }
    }
}
