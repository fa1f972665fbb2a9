//! Requests that arrive over time, read from the public trace formats.
//!
//! What each file calls its columns (read off the files' own headers):
//! * Azure LLM inference 2023 / 2024: CSV `TIMESTAMP,ContextTokens,GeneratedTokens`, date and time with up to seven decimals;
//! * BurstGPT: CSV `Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type`, seconds; failed calls have 0 response tokens;
//! * APEX: CSV or JSON lines `StartTimeOffset,ContextTokens,GeneratedTokens`, nanoseconds;
//! * LLMServingSim: JSON lines `arrival_time_ns,input_toks,output_toks`;
//! * Mooncake: JSON lines `timestamp` (milliseconds), `input_length`, `output_length`.
//!
//! None of them says which experts were used: routing in a simulation over them is the cost model's assumption.

use crate::error::PlanError;
use serde_json::Value;

/// One request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrival {
    /// Seconds after the first request of the trace.
    pub at_s: f64,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Tokens that it generates.
    pub output_tokens: u32,
}

/// A trace of requests, by time of arrival.
#[derive(Debug, Clone, PartialEq)]
pub struct Arrivals {
    /// Which format it was read from.
    pub format: &'static str,
    /// The requests; the first arrives at 0.
    pub requests: Vec<Arrival>,
    /// Rows left out because they have no prompt or no answer (failed calls).
    pub skipped: usize,
}

/// Columns of a format: time, its unit in seconds (0: a date), prompt and output tokens.
struct Columns {
    format: &'static str,
    time: &'static str,
    unit_s: f64,
    prompt: &'static str,
    output: &'static str,
}

const FORMATS: &[Columns] = &[
    Columns { format: "Azure LLM inference", time: "TIMESTAMP", unit_s: 0.0, prompt: "ContextTokens", output: "GeneratedTokens" },
    Columns { format: "APEX", time: "StartTimeOffset", unit_s: 1e-9, prompt: "ContextTokens", output: "GeneratedTokens" },
    Columns { format: "BurstGPT", time: "Timestamp", unit_s: 1.0, prompt: "Request tokens", output: "Response tokens" },
    Columns { format: "LLMServingSim", time: "arrival_time_ns", unit_s: 1e-9, prompt: "input_toks", output: "output_toks" },
    Columns { format: "Mooncake", time: "timestamp", unit_s: 1e-3, prompt: "input_length", output: "output_length" },
];

impl Columns {
    fn names(&self) -> [&'static str; 3] {
        [self.time, self.prompt, self.output]
    }
}

fn bad(found: String, expected: impl Into<String>) -> PlanError {
    PlanError::BadRequest { field: "arrivals", found, expected: expected.into() }
}

fn known_formats() -> String {
    let names: Vec<String> = FORMATS.iter().map(|f| format!("{} ({})", f.names().join(","), f.format)).collect();
    format!("CSV or JSON lines with the columns of one of: {}", names.join("; "))
}

impl Arrivals {
    /// Reads the text of a trace; at most the first `limit` requests when given.
    ///
    /// # Errors
    /// [`PlanError::BadRequest`] naming the row and column.
    pub fn from_text(text: &str, limit: Option<usize>) -> Result<Self, PlanError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut read = if text.trim_start().starts_with('{') { from_json_lines(text)? } else { from_csv(text)? };
        read.requests.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
        if let Some(limit) = limit {
            read.requests.truncate(limit);
        }
        let Some(first) = read.requests.first().map(|r| r.at_s) else {
            return Err(bad(format!("no request with a prompt and an answer ({} rows without)", read.skipped), known_formats()));
        };
        for r in &mut read.requests {
            r.at_s -= first;
        }
        Ok(read)
    }

    /// Seconds from the first to the last arrival.
    pub fn span_s(&self) -> f64 {
        self.requests.last().map_or(0.0, |r| r.at_s)
    }

    /// Requests per second over the span.
    pub fn rate_per_s(&self) -> f64 {
        if self.span_s() > 0.0 { (self.requests.len() - 1) as f64 / self.span_s() } else { 0.0 }
    }

    /// Mean tokens of prompts and of answers.
    pub fn mean_tokens(&self) -> (f64, f64) {
        let n = self.requests.len().max(1) as f64;
        let sum = |f: fn(&Arrival) -> u32| self.requests.iter().map(|r| f64::from(f(r))).sum::<f64>() / n;
        (sum(|r| r.prompt_tokens), sum(|r| r.output_tokens))
    }

    /// The longest answer.
    pub fn longest_output(&self) -> u32 {
        self.requests.iter().map(|r| r.output_tokens).max().unwrap_or(0)
    }
}

/// Collects rows, leaving out those without prompt or answer.
struct Reader {
    columns: &'static Columns,
    requests: Vec<Arrival>,
    skipped: usize,
}

impl Reader {
    fn new(columns: &'static Columns) -> Self {
        Self { columns, requests: Vec::new(), skipped: 0 }
    }

    fn add(&mut self, row: usize, time: &str, prompt: &str, output: &str) -> Result<(), PlanError> {
        let c = self.columns;
        let at = |column: &str, found: &str| format!("{found:?} in row {row}, column {column}");
        let at_s = match c.unit_s {
            0.0 => {
                date_seconds(time).ok_or_else(|| bad(at(c.time, time), "a date and time such as 2023-11-16 18:15:46.6805900"))?
            }
            unit => match time.trim().parse::<f64>() {
                Ok(t) if t.is_finite() && t >= 0.0 => t * unit,
                _ => return Err(bad(at(c.time, time), "a number of at least 0")),
            },
        };
        let tokens = |column: &str, text: &str| {
            text.trim().parse::<u32>().ok().filter(|n| *n <= 1 << 24).ok_or_else(|| bad(at(column, text), "0 to 16777216 tokens"))
        };
        let (prompt_tokens, output_tokens) = (tokens(c.prompt, prompt)?, tokens(c.output, output)?);
        if prompt_tokens == 0 || output_tokens == 0 {
            self.skipped += 1;
        } else {
            self.requests.push(Arrival { at_s, prompt_tokens, output_tokens });
        }
        Ok(())
    }

    fn done(self) -> Arrivals {
        Arrivals { format: self.columns.format, requests: self.requests, skipped: self.skipped }
    }
}

/// Seconds of a date with or without an offset; only differences matter.
fn date_seconds(text: &str) -> Option<f64> {
    let text = text.trim();
    let at = match text.parse::<jiff::Timestamp>() {
        Ok(at) => at,
        Err(_) => text.parse::<jiff::civil::DateTime>().ok()?.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp(),
    };
    Some(at.as_nanosecond() as f64 * 1e-9)
}

fn from_csv(text: &str) -> Result<Arrivals, PlanError> {
    let mut csv = csv::ReaderBuilder::new().flexible(true).trim(csv::Trim::Headers).from_reader(text.as_bytes());
    let unreadable = |e: csv::Error| bad(format!("text that is no CSV: {e}"), known_formats());
    let header = csv.headers().map_err(unreadable)?.clone();
    let find = |name: &str| header.iter().position(|h| h == name);
    let Some((columns, at)) = FORMATS.iter().find_map(|f| {
        let at: Option<Vec<usize>> = f.names().into_iter().map(find).collect();
        Some((f, at?))
    }) else {
        let names: Vec<&str> = header.iter().take(8).collect();
        return Err(bad(format!("the columns {}", names.join(",")), known_formats()));
    };
    let mut reader = Reader::new(columns);
    for (i, record) in csv.records().enumerate() {
        let record = record.map_err(unreadable)?;
        let get = |c: usize| record.get(at[c]).unwrap_or_default();
        reader.add(i + 2, get(0), get(1), get(2))?;
    }
    Ok(reader.done())
}

fn from_json_lines(text: &str) -> Result<Arrivals, PlanError> {
    let mut reader: Option<Reader> = None;
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let row: Value =
            serde_json::from_str(line).map_err(|e| bad(format!("line {}: {e}", i + 1), "one JSON object per line"))?;
        let columns = match &reader {
            Some(r) => r.columns,
            None => FORMATS
                .iter()
                .find(|f| f.names().iter().all(|n| row.get(n).is_some()))
                .ok_or_else(|| bad(format!("line {} with other keys", i + 1), known_formats()))?,
        };
        let get = |name: &str| match row.get(name) {
            Some(Value::String(s)) => s.clone(),
            Some(other) => other.to_string(),
            None => String::new(),
        };
        let (time, prompt, output) = (get(columns.time), get(columns.prompt), get(columns.output));
        reader.get_or_insert_with(|| Reader::new(columns)).add(i + 1, &time, &prompt, &output)?;
    }
    reader.map(Reader::done).ok_or_else(|| bad("an empty text".into(), known_formats()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_format() {
        let azure =
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n";
        let azure_2024 = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.000000+00:00,374,44\n2024-05-10 00:00:04.314579+00:00,396,109\n";
        let burst = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,374,44,418,Conversation log\n7,GPT-4,10,0,10,API log\n9.314579,ChatGPT,396,109,505,API log\n";
        let apex = "ContextTokens,GeneratedTokens,StartTimeOffset,RequestID,TotalTokens\n374,44,1000000000,a,418\n396,109,5314579000,b,505\n";
        let apex_lines = "{\"StartTimeOffset\": 1000000000, \"ContextTokens\": 374, \"GeneratedTokens\": 44}\n{\"StartTimeOffset\": 5314579000, \"ContextTokens\": 396, \"GeneratedTokens\": 109}\n";
        let sim = "{\"input_toks\": 374, \"output_toks\": 44, \"arrival_time_ns\": 0}\n{\"input_toks\": 396, \"output_toks\": 109, \"arrival_time_ns\": 4314579000}";
        for (text, format) in [
            (azure, "Azure LLM inference"),
            (azure_2024, "Azure LLM inference"),
            (burst, "BurstGPT"),
            (apex, "APEX"),
            (apex_lines, "APEX"),
            (sim, "LLMServingSim"),
        ] {
            let a = Arrivals::from_text(text, None).unwrap();
            assert_eq!(a.format, format);
            assert_eq!(a.requests.len(), 2, "{format}");
            assert_eq!(
                (a.requests[0].at_s, a.requests[0].prompt_tokens, a.requests[0].output_tokens),
                (0.0, 374, 44),
                "{format}"
            );
            assert!((a.requests[1].at_s - 4.314_579).abs() < 1e-6, "{format}: {}", a.requests[1].at_s);
            assert_eq!(a.skipped, usize::from(format == "BurstGPT"));
        }
        let mooncake = "{\"timestamp\": 0, \"input_length\": 10, \"output_length\": 3, \"hash_ids\": [0]}\n{\"timestamp\": 40, \"input_length\": 10, \"output_length\": 3, \"hash_ids\": []}";
        assert!((Arrivals::from_text(mooncake, None).unwrap().span_s() - 0.04).abs() < 1e-12);
    }

    #[test]
    fn says_where_a_trace_is_wrong() {
        for (text, words) in [
            ("a,b\n1,2\n", "the columns a,b"),
            ("", "columns"),
            ("{}", "other keys"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "row 2, column TIMESTAMP"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,-2\n", "row 2, column GeneratedTokens"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,0\n", "1 rows without"),
            ("StartTimeOffset,ContextTokens,GeneratedTokens\nNaN,1,1\n", "column StartTimeOffset"),
            ("StartTimeOffset,ContextTokens,GeneratedTokens\n1\n", "column ContextTokens"),
            ("{\"timestamp\": 0, \"input_length\": 10, \"output_length\": 3}\n{", "line 2"),
        ] {
            let message = Arrivals::from_text(text, None).unwrap_err().to_string();
            assert!(message.contains(words), "{text:?}: {message}");
        }
    }

    #[test]
    fn rows_are_sorted_and_cut() {
        let text = "StartTimeOffset,ContextTokens,GeneratedTokens\n3000000000,3,3\n1000000000,1,1\n2000000000,2,2\n";
        let a = Arrivals::from_text(text, Some(2)).unwrap();
        assert_eq!(a.requests.iter().map(|r| (r.at_s, r.prompt_tokens)).collect::<Vec<_>>(), [(0.0, 1), (1.0, 2)]);
        assert_eq!((a.rate_per_s(), a.mean_tokens(), a.longest_output()), (1.0, (1.5, 1.5), 2));
    }
}
