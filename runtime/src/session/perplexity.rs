//! Perplexity as llama.cpp's `llama-perplexity` defines it, so that numbers can be compared.
//!
//! The text is cut into windows of `window` tokens, the rest is dropped. Each window starts with an empty cache (and with the
//! BOS token in place of its first, if the model wants one). Only the second half is scored: logits of positions
//! `window / 2 .. window - 1` against the token after them. The error is the standard error of the mean negative
//! log-likelihood, times the perplexity.

use super::Session;
use crate::error::{Result, RuntimeError};

/// A perplexity with its uncertainty.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Perplexity {
    /// `exp` of the mean negative log-likelihood.
    pub value: f64,
    /// Its standard error; infinite for a single scored token.
    pub error: f64,
    /// Tokens scored.
    pub scored_tokens: usize,
    /// Windows used.
    pub windows: usize,
}

/// Sums over scored tokens.
#[derive(Default)]
struct Sums {
    nll: f64,
    nll_squared: f64,
    count: usize,
}

impl Sums {
    fn add(&mut self, nll: f64) {
        self.nll += nll;
        self.nll_squared += nll * nll;
        self.count += 1;
    }

    fn perplexity(&self, windows: usize) -> Perplexity {
        let n = self.count as f64;
        let mean = self.nll / n;
        let variance = (self.nll_squared / n - mean * mean).max(0.0);
        let value = mean.exp();
        let error = if self.count > 1 { value * (variance / (n - 1.0)).sqrt() } else { f64::INFINITY };
        Perplexity { value, error, scored_tokens: self.count, windows }
    }
}

/// Perplexity of `tokens` in windows of `window`. `bos` replaces the first token of each window.
///
/// `progress(windows done, windows in all, result so far)` is called after each window and stops the run by returning `false`.
///
/// # Errors
/// For a window that is too small or larger than the context, fewer tokens than one window, or as [`Session::prefill`].
pub fn perplexity(
    session: &mut Session,
    tokens: &[u32],
    window: usize,
    bos: Option<u32>,
    mut progress: impl FnMut(usize, usize, &Perplexity) -> bool,
) -> Result<Perplexity> {
    if window < 4 || window > session.context() {
        return Err(RuntimeError::BadRequest {
            what: "window",
            found: format!("{window} tokens"),
            expected: format!("4 to the context of {}", session.context()),
        });
    }
    if tokens.len() < window {
        return Err(RuntimeError::BadRequest {
            what: "text",
            found: format!("{} tokens", tokens.len()),
            expected: format!("at least one window of {window}; give a longer text or a smaller window"),
        });
    }
    let windows = tokens.len() / window;
    let first = window / 2;
    let mut sums = Sums::default();
    let mut done = 0;
    for text in tokens.chunks_exact(window) {
        let mut input = text.to_vec();
        if let Some(bos) = bos {
            input[0] = bos;
        }
        session.reset();
        // The last token's successor is in the next window, so it is not scored and need not be computed.
        session.for_each_logits(&input[..window - 1], first, |i, logits| sums.add(nll(logits, text[i + 1])))?;
        done += 1;
        if !progress(done, windows, &sums.perplexity(done)) {
            break;
        }
    }
    session.reset();
    Ok(sums.perplexity(done))
}

/// `-log softmax(logits)[token]`
fn nll(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    sum.ln() - f64::from(logits[token as usize] - max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihood_and_error_follow_their_formulas() {
        assert!((nll(&[0.0, 0.0, 0.0, 0.0], 2) - 4.0f64.ln()).abs() < 1e-12);
        assert!((nll(&[1000.0, 998.0], 1) - (2.0 + (1.0 + (-2.0f64).exp()).ln())).abs() < 1e-9);
        let mut sums = Sums::default();
        for x in [1.0, 2.0, 3.0] {
            sums.add(x);
        }
        let p = sums.perplexity(1);
        assert!((p.value - 2.0f64.exp()).abs() < 1e-12);
        // Population variance 2/3 over n - 1 = 2.
        assert!((p.error - 2.0f64.exp() * (1.0f64 / 3.0).sqrt()).abs() < 1e-12);
    }
}
