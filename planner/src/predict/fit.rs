//! Fits the parameters of the decode model to measured runs.
//!
//! Weighted least squares of ln(predicted / measured) with a soft L1 loss on the data and a normal prior on the logarithm of each
//! parameter, solved by Levenberg-Marquardt with central differences (Nocedal and Wright, Numerical Optimization, §10.3). Rows of one
//! machine share an error, so all data together weigh as many observations as there are machines (tools/predict/README.md §5, §9).

use super::decode::{NUM_PARAMETERS, PARAMETERS, PRIOR_SIGMA, Parameters};
use super::inputs::Inputs;

/// Errors beyond this share count by their size, not its square.
const ROBUST_SCALE: f64 = 0.10;

/// Parameters that fit `rows` of (description, measured milliseconds per token), each residual weighted by `weight`.
pub fn fit(rows: &[(&Inputs, f64)], weight: f64) -> Parameters {
    let priors = PARAMETERS.map(|p| p.prior.ln());
    let residuals = |theta: &[f64; NUM_PARAMETERS], out: &mut Vec<f64>| {
        let parameters = Parameters::from_array(theta.map(f64::exp));
        out.clear();
        out.extend(rows.iter().map(|(x, ms)| weight * soft_l1((parameters.decode(x).total() / ms).ln() / ROBUST_SCALE)));
        out.extend(theta.iter().zip(&priors).map(|(t, p)| (t - p) / PRIOR_SIGMA));
    };
    Parameters::from_array(levenberg_marquardt(priors, residuals).map(f64::exp))
}

/// The residual whose square is the soft L1 loss of `r`.
fn soft_l1(r: f64) -> f64 {
    // sqrt(1 + r^2) - 1 without cancellation near 0.
    let loss = 2.0 * r * r / ((1.0 + r * r).sqrt() + 1.0);
    r.signum() * loss.sqrt()
}

/// Minimises the sum of squared residuals from `start`. `residuals` writes them for a point; their number does not change.
fn levenberg_marquardt<const N: usize>(start: [f64; N], residuals: impl Fn(&[f64; N], &mut Vec<f64>)) -> [f64; N] {
    const STEP: f64 = 1e-6;
    const MAX_ITERATIONS: usize = 300;
    let cost = |r: &[f64]| r.iter().map(|x| x * x).sum::<f64>();
    let (mut x, mut r, mut trial) = (start, Vec::new(), Vec::new());
    residuals(&x, &mut r);
    let mut best = cost(&r);
    let (mut plus, mut minus) = (Vec::new(), Vec::new());
    let mut damping = 1e-3;
    for _ in 0..MAX_ITERATIONS {
        // [N, residuals]
        let jacobian: Vec<Vec<f64>> = (0..N)
            .map(|i| {
                let (mut up, mut down) = (x, x);
                up[i] += STEP;
                down[i] -= STEP;
                residuals(&up, &mut plus);
                residuals(&down, &mut minus);
                plus.iter().zip(&minus).map(|(p, m)| (p - m) / (2.0 * STEP)).collect()
            })
            .collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let normal: [[f64; N]; N] = std::array::from_fn(|i| std::array::from_fn(|j| dot(&jacobian[i], &jacobian[j])));
        let gradient: [f64; N] = std::array::from_fn(|i| dot(&jacobian[i], &r));
        let before = best;
        // More damping until a step helps: for small enough steps one does, unless this is the minimum.
        while damping < 1e12 {
            let mut damped = normal;
            for (i, row) in damped.iter_mut().enumerate() {
                row[i] += damping * row[i].max(1e-12);
            }
            if let Some(step) = solve_positive(damped, gradient) {
                let moved: [f64; N] = std::array::from_fn(|i| x[i] - step[i]);
                residuals(&moved, &mut trial);
                let now = cost(&trial);
                // A comparison that is false for NaN, so that such a point is never taken.
                if now < best {
                    (x, best) = (moved, now);
                    std::mem::swap(&mut r, &mut trial);
                    damping = (damping * 0.2).max(1e-12);
                    break;
                }
            }
            damping *= 5.0;
        }
        if before - best <= 1e-12 * before {
            break;
        }
    }
    x
}

/// Solves `a x = b` for symmetric positive definite `a` by Cholesky factors; `None` if it is not.
fn solve_positive<const N: usize>(mut a: [[f64; N]; N], mut b: [f64; N]) -> Option<[f64; N]> {
    for i in 0..N {
        for j in 0..=i {
            let sum: f64 = a[i][j] - (0..j).map(|k| a[i][k] * a[j][k]).sum::<f64>();
            if i == j {
                if sum.is_nan() || sum <= 0.0 {
                    return None;
                }
                a[i][i] = sum.sqrt();
            } else {
                a[i][j] = sum / a[j][j];
            }
        }
    }
    for i in 0..N {
        b[i] = (b[i] - (0..i).map(|k| a[i][k] * b[k]).sum::<f64>()) / a[i][i];
    }
    for i in (0..N).rev() {
        b[i] = (b[i] - (i + 1..N).map(|k| a[k][i] * b[k]).sum::<f64>()) / a[i][i];
    }
    Some(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_system_is_solved_and_an_indefinite_one_refused() {
        let x = solve_positive([[4.0, 2.0, 0.0], [2.0, 5.0, 1.0], [0.0, 1.0, 3.0]], [2.0, 12.0, 11.0]).unwrap();
        for (found, expected) in x.iter().zip([-0.5, 2.0, 3.0]) {
            assert!((found - expected).abs() < 1e-12, "{x:?}");
        }
        assert_eq!(solve_positive([[1.0, 2.0], [2.0, 1.0]], [0.0, 0.0]), None);
        assert_eq!(solve_positive([[f64::NAN]], [1.0]), None);
    }

    #[test]
    fn rosenbrocks_valley_is_followed_to_its_end() {
        let x = levenberg_marquardt([-1.2, 1.0], |x: &[f64; 2], out: &mut Vec<f64>| {
            out.clear();
            out.extend([10.0 * (x[1] - x[0] * x[0]), 1.0 - x[0]]);
        });
        assert!((x[0] - 1.0).abs() < 1e-6 && (x[1] - 1.0).abs() < 1e-6, "{x:?}");
    }

    #[test]
    fn soft_l1_is_square_near_zero_and_linear_far_away() {
        assert!((soft_l1(1e-9) - 1e-9).abs() < 1e-24);
        assert!((soft_l1(-1e4).powi(2) - 2e4).abs() < 3.0 && soft_l1(-1.0) < 0.0);
    }

    #[test]
    fn without_rows_the_priors_stand() {
        assert!(fit(&[], 1.0).to_array().iter().zip(Parameters::priors().to_array()).all(|(a, b)| (a / b - 1.0).abs() < 1e-9));
    }
}
