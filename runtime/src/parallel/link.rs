//! How fast messages between ranks are: what copies of experts are weighed with.

use super::transport::Transport;
use crate::error::Result;
use std::time::Instant;

/// Rounds of each size; the fastest counts.
const ROUNDS: usize = 5;
/// Bytes of the large message.
const LARGE_BYTES: usize = 2 << 20;

/// Seconds before a message arrives, and bytes per second after that, each way at once: the slowest rank's, the same on all ranks.
///
/// # Errors
/// As [`Transport::exchange`].
pub fn measure(transport: &mut dyn Transport) -> Result<(f64, f64)> {
    let (me, size) = (transport.rank(), transport.size());
    if size == 1 {
        return Ok((0.0, f64::INFINITY));
    }
    let mut seconds = [f64::INFINITY; 2];
    let large = vec![1_u8; LARGE_BYTES];
    for (bytes, best) in [&large[..1], &large[..]].into_iter().zip(&mut seconds) {
        for _ in 0..ROUNDS {
            transport.barrier()?;
            let start = Instant::now();
            transport.exchange("measuring the link", &[((me + 1) % size, bytes)], &[(me + size - 1) % size])?;
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    let mine: Vec<u8> = seconds.iter().flat_map(|s| s.to_le_bytes()).collect();
    let all = transport.all_gather("measured links", &mine)?;
    let slowest = |i: usize| {
        let of = |m: &Vec<u8>| m.get(8 * i..8 * i + 8).and_then(|b| b.try_into().ok()).map_or(0.0, f64::from_le_bytes);
        all.iter().map(of).fold(0.0, f64::max)
    };
    let (latency, whole) = (slowest(0), slowest(1));
    Ok((latency, LARGE_BYTES as f64 / (whole - latency).max(1e-9)))
}
