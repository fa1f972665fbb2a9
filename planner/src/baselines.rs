//! Placements that other engines would choose, judged by the same prices.
