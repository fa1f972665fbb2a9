//! What travels between ranks in a layer: how many tokens for whom, rows with who is to compute them.
//!
//! A row travels once to each rank that computes some of its experts, in the very form that the experts' weights multiply with, which is
//! four times smaller than floats where weights are quantised and saves the receiver the work. Results come back as one row of floats
//! per (row, expert) in the order in which they were asked for. Numbers are little-endian; nothing in a message is believed unchecked.

use crate::error::{Result, RuntimeError};
use crate::exec::prepared::Prepared;
use crate::quant::activation_format;
use tierwise_cost::quant::QuantFormat;

/// The formats of gate and up of which each needs a form of its own.
pub fn forms(gate: QuantFormat, up: QuantFormat) -> Vec<QuantFormat> {
    if activation_format(gate) == activation_format(up) { vec![gate] } else { vec![gate, up] }
}

fn bad(rank: usize, what: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::Rank {
        rank,
        reason: format!("{what}: sent {found}, expected {expected}; do all ranks run the same model with the same settings?"),
    }
}

/// Where a rank is, and how many of its tokens want each expert.
pub fn counts_message(step: u64, layer: u32, counts: &[u32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(12 + 4 * counts.len());
    out.extend(step.to_le_bytes());
    out.extend(layer.to_le_bytes());
    counts.iter().for_each(|c| out.extend(c.to_le_bytes()));
    out
}

/// The counts of `rank`, which must be at the same place with as many experts. `[experts]`
///
/// # Errors
/// When it is not.
pub fn counts_of(rank: usize, message: &[u8], step: u64, layer: u32, num_experts: usize) -> Result<Vec<u64>> {
    let numbers = Words::new(message);
    if message.len() != 12 + 4 * num_experts {
        return Err(bad(rank, "tokens per expert", format!("{} bytes", message.len()), format!("{num_experts} experts")));
    }
    let at = (u64::from(numbers.get(0)) | u64::from(numbers.get(1)) << 32, numbers.get(2));
    if at != (step, layer) {
        let place = |(step, layer): (u64, u32)| format!("step {step}, layer {layer}");
        return Err(bad(rank, "tokens per expert", place(at), place((step, layer))));
    }
    Ok((3..3 + num_experts).map(|i| u64::from(numbers.get(i))).collect())
}

/// Little-endian 32-bit numbers.
struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn get(&self, i: usize) -> u32 {
        u32::from_le_bytes([self.0[4 * i], self.0[4 * i + 1], self.0[4 * i + 2], self.0[4 * i + 3]])
    }
}

/// What one rank asks of another.
#[derive(Debug, Default, Clone)]
pub struct Request {
    /// Rows of the sender's input that travel, ascending.
    rows: Vec<u32>,
    /// (place in `rows`, expert).
    choices: Vec<(u32, u32)>,
    /// The sender's (token, choice) of each of them.
    origins: Vec<usize>,
}

impl Request {
    /// Adds a choice; those of one input row come one after the other.
    pub fn push(&mut self, row: u32, expert: u32, origin: usize) {
        if self.rows.last() != Some(&row) {
            self.rows.push(row);
        }
        self.choices.push((self.rows.len() as u32 - 1, expert));
        self.origins.push(origin);
    }

    /// The sender's (token, choice) of every result to come.
    pub fn origins(&self) -> &[usize] {
        &self.origins
    }

    /// The message.
    pub fn encode(&self, forms: &[QuantFormat], input: &Prepared) -> Vec<u8> {
        if self.rows.is_empty() {
            // Without tokens there may be no input either.
            return vec![0; 8];
        }
        let row_bytes: usize = forms.iter().map(|f| input.get(*f).row(0).len()).sum();
        let mut out = Vec::with_capacity(8 + 8 * self.choices.len() + self.rows.len() * row_bytes);
        out.extend((self.rows.len() as u32).to_le_bytes());
        out.extend((self.choices.len() as u32).to_le_bytes());
        for (row, expert) in &self.choices {
            out.extend(row.to_le_bytes());
            out.extend(expert.to_le_bytes());
        }
        for format in forms {
            let form = input.get(*format);
            self.rows.iter().for_each(|row| out.extend_from_slice(form.row(*row)));
        }
        out
    }
}

/// A request as it came.
#[derive(Debug, Clone, Copy)]
pub struct Received<'a> {
    /// Who asks.
    pub rank: usize,
    /// Rows.
    pub rows: usize,
    choices: &'a [u8],
    /// The rows in one form after the other.
    body: &'a [u8],
}

impl<'a> Received<'a> {
    /// Reads a message with rows of so many bytes in all forms together, for experts below `num_experts`.
    ///
    /// # Errors
    /// When it contradicts itself.
    pub fn decode(rank: usize, message: &'a [u8], row_bytes: usize, num_experts: usize) -> Result<Self> {
        let short = || bad(rank, "rows", format!("{} bytes", message.len()), "a whole message");
        let (head, rest) = message.split_at_checked(8).ok_or_else(short)?;
        let (rows, count) = (Words::new(head).get(0) as usize, Words::new(head).get(1) as usize);
        let lengths = count.checked_mul(8).zip(rows.checked_mul(row_bytes));
        let parts = lengths.and_then(|(choices, body)| rest.split_at_checked(choices).filter(|(_, b)| b.len() == body));
        let (choices, body) = parts.ok_or_else(short)?;
        let received = Self { rank, rows, choices, body };
        // A row may be named by choices that follow each other alone; so none is named by more than there are experts.
        let mut next = 0;
        for (row, expert) in received.choices() {
            let (row, expert) = (row as usize, expert as usize);
            if row > next || row + 1 < next || row >= rows || expert >= num_experts {
                return Err(bad(
                    rank,
                    "rows",
                    format!("row {row} for expert {expert}"),
                    format!("rows in order below {rows}, experts below {num_experts}"),
                ));
            }
            next = row + 1;
        }
        if next != rows {
            return Err(bad(rank, "rows", format!("{next} rows that are wanted"), rows));
        }
        Ok(received)
    }

    /// (row, expert) in the order of results.
    pub fn choices(&self) -> impl Iterator<Item = (u32, u32)> + 'a {
        let words = Words::new(self.choices);
        (0..self.choices.len() / 8).map(move |i| (words.get(2 * i), words.get(2 * i + 1)))
    }

    /// The rows in a form whose rows have `row_bytes`, which begin after `before` bytes per row of other forms.
    pub fn rows_of_form(&self, before: usize, row_bytes: usize) -> impl Iterator<Item = &'a [u8]> {
        let first = self.rows * before;
        self.body[first..first + self.rows * row_bytes].chunks_exact(row_bytes.max(1))
    }
}

/// Checks that `rank` sent a row of `hidden` floats for each of `count` choices.
///
/// # Errors
/// When it did not.
pub fn check_results(rank: usize, message: &[u8], count: usize, hidden: usize) -> Result<()> {
    if count.checked_mul(4 * hidden) == Some(message.len()) {
        return Ok(());
    }
    Err(bad(rank, "results", format!("{} bytes", message.len()), format!("{count} rows of {hidden} floats")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::threads::Threads;

    fn input(format: QuantFormat, rows: usize, cols: usize) -> Prepared {
        let threads = Threads::new(1).expect("one thread");
        let x: Vec<f32> = (0..rows * cols).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        let mut input = Prepared::default();
        input.ensure(&threads, format, &x, cols);
        input
    }

    fn request() -> Request {
        let mut request = Request::default();
        [(0, 5, 1), (0, 2, 3), (2, 5, 9), (3, 0, 12)]
            .into_iter()
            .for_each(|(row, expert, origin)| request.push(row, expert, origin));
        request
    }

    #[test]
    fn rows_arrive_as_they_were() {
        for format in [QuantFormat::F32, QuantFormat::Q4_K, QuantFormat::Q8_0] {
            let input = input(format, 4, 256);
            let message = request().encode(&forms(format, format), &input);
            let row_bytes = input.get(format).row(0).len();
            let got = Received::decode(1, &message, row_bytes, 6).expect("whole");
            assert_eq!(got.choices().collect::<Vec<_>>(), [(0, 5), (0, 2), (1, 5), (2, 0)]);
            let rows: Vec<&[u8]> = got.rows_of_form(0, row_bytes).collect();
            assert_eq!(rows, [0, 2, 3].map(|r| input.get(format).row(r)));
        }
    }

    /// Every cut and every changed number of the head is an error or a message that is still whole; never a panic.
    #[test]
    fn broken_messages_are_refused() {
        let input = input(QuantFormat::F32, 4, 8);
        let message = request().encode(&[QuantFormat::F32], &input);
        for len in 0..message.len() {
            let error = Received::decode(3, &message[..len], 32, 6).expect_err("cut").to_string();
            assert!(error.starts_with("rank 3: rows: sent"), "{error}");
        }
        for at in 0..8 + 4 * 8 {
            for value in [0, 1, 2, 5, 6, 7, 128, 255] {
                let mut changed = message.clone();
                changed[at] = value;
                if let Ok(got) = Received::decode(3, &changed, 32, 6) {
                    assert!(got.choices().all(|(r, e)| (r as usize) < got.rows && e < 6));
                }
            }
        }
        assert!(Received::decode(3, &message, 32, 5).is_err(), "expert 5 of 5");
        let counts = counts_message(7, 3, &[1, 2]);
        assert_eq!(counts_of(1, &counts, 7, 3, 2).expect("whole"), [1, 2]);
        for (step, layer, experts) in [(8, 3, 2), (7, 4, 2), (7, 3, 3)] {
            assert!(counts_of(1, &counts, step, layer, experts).is_err());
        }
        assert!(check_results(0, &[0; 64], 2, 8).is_ok() && check_results(0, &[0; 60], 2, 8).is_err());
    }
}
