//! The combinations that no other beats in both of two numbers.

/// Indices of the points that are on the Pareto front when both coordinates should be large, by rising first coordinate.
/// Of equal points the first is kept; points that are not finite are left out.
pub fn pareto_front(points: &[(f64, f64)]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..points.len()).filter(|i| points[*i].0.is_finite() && points[*i].1.is_finite()).collect();
    order.sort_by(|a, b| {
        let (p, q) = (points[*a], points[*b]);
        q.0.total_cmp(&p.0).then(q.1.total_cmp(&p.1)).then(a.cmp(b))
    });
    let mut best = f64::NEG_INFINITY;
    let mut front: Vec<usize> = order
        .into_iter()
        .filter(|i| {
            let keeps = points[*i].1 > best;
            best = best.max(points[*i].1);
            keeps
        })
        .collect();
    front.reverse();
    front
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_on_the_front_is_beaten_and_nothing_off_it_is_not() {
        let points: Vec<(f64, f64)> =
            (0..60_u32).map(|i| (f64::from(i * 37 % 17), f64::from(i * 53 % 19))).chain([(f64::NAN, 1e9)]).collect();
        let front = pareto_front(&points);
        let beats = |a: (f64, f64), b: (f64, f64)| a.0 >= b.0 && a.1 >= b.1 && a != b;
        for (i, p) in points.iter().enumerate().filter(|(_, p)| p.0.is_finite()) {
            let beaten = points.iter().any(|q| beats(*q, *p));
            let twin_before = points[..i].contains(p);
            assert_eq!(front.contains(&i), !beaten && !twin_before, "{i} {p:?}");
        }
        assert!(front.windows(2).all(|w| points[w[0]].0 < points[w[1]].0));
        assert!(pareto_front(&[]).is_empty());
    }
}
