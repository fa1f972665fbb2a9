//! A step's (token, choice) rows by expert: what the engine is asked for, and the tiles that devices compute.

use crate::backend::op::TILE_ROWS;
use crate::exec::route::Routing;
use tierwise_planner::engine::Demand;

/// Rows by expert.
#[derive(Debug, Default)]
pub struct Groups {
    /// Row numbers, by expert, within an expert ascending: `[tokens * k]`.
    pub order: Vec<u32>,
    /// (expert, first place in `order`, rows), ascending by expert.
    experts: Vec<(u32, u32, u32)>,
}

impl Groups {
    /// Replaces the groups by those of `routing`.
    pub fn arrange(&mut self, routing: &Routing) {
        self.order.clear();
        self.order.extend(0..routing.experts.len() as u32);
        // Stable: within an expert by row.
        self.order.sort_by_key(|row| routing.experts[*row as usize]);
        self.experts.clear();
        for (place, row) in self.order.iter().enumerate() {
            let expert = routing.experts[*row as usize];
            match self.experts.last_mut() {
                Some((e, _, rows)) if *e == expert => *rows += 1,
                _ => self.experts.push((expert, place as u32, 1)),
            }
        }
    }

    /// What `layer` asks the engine for; the step is the driver's.
    pub fn demand(&self, layer: u32, tokens: u32, scores: Vec<(u32, u32)>) -> Demand {
        let experts = self.experts.iter().map(|(e, _, rows)| (*e, *rows)).collect();
        Demand { layer, experts, tokens, scores, ..Demand::default() }
    }

    /// Tiles of at most [`TILE_ROWS`] rows: (expert, first place in `order`, rows).
    pub fn tiles(&self) -> Vec<[u32; 3]> {
        let mut tiles = Vec::new();
        for (expert, first, rows) in &self.experts {
            tiles.extend((0..*rows).step_by(TILE_ROWS as usize).map(|at| [*expert, first + at, TILE_ROWS.min(rows - at)]));
        }
        tiles
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_hold_every_row_once_and_of_one_expert() {
        let experts: Vec<u32> = (0..500_u32).map(|i| i * i * 7 % 11).collect();
        let routing = Routing { weights: vec![1.0; experts.len()], experts, experts_per_token: 4 };
        let mut groups = Groups::default();
        groups.arrange(&routing);
        let mut seen = vec![false; 500];
        for [expert, first, rows] in groups.tiles() {
            assert!((1..=TILE_ROWS).contains(&rows));
            for row in &groups.order[first as usize..(first + rows) as usize] {
                assert_eq!(routing.experts[*row as usize], expert);
                assert!(!std::mem::replace(&mut seen[*row as usize], true));
            }
        }
        assert!(seen.iter().all(|s| *s));
        let demand = groups.demand(3, 125, Vec::new());
        assert!(demand.experts.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!((demand.experts.iter().map(|e| e.1).sum::<u32>(), demand.tokens, demand.layer), (500, 125, 3));
    }
}
