//! The measured cost model: seconds from the samples that `calibrate` took of this program's own kernels.
//!
//! A matrix costs elements x (seconds per element at its number of tokens); for routed experts the table is over tokens per expert
//! x distinct experts, because threads share out many experts better than few. Starting and joining the threads is part of the
//! samples, so launches are not charged again. Attention is seconds per byte of the cache over operations per byte; norms, rotations
//! and sums are seconds per element. What was not measured (other processors and memories, links) is priced by [`Roofline`], and
//! [`Calibrated::describe`] says so.

use super::curve::{Curve, Reading, Span};
use super::{CostModel, Estimate, EstimateSource, Roofline, Work};
use crate::machine::{Calibration, Link, Machine, Memory, Processor, Source, Spread};
use crate::quant::QuantFormat;
use crate::units::Bytes;

/// A step is more than its parts: sums of measured parts were within 5 % of whole steps, relative to each other, for decode and
/// prefill of two models.
const COMPOSITION_ERROR: f64 = 0.05;

/// Reads that the runtime's loader keeps under way.
const LOADER_DEPTH: u32 = 4;

/// One format's seconds per element.
#[derive(Debug, Clone, PartialEq)]
struct Table {
    format: QuantFormat,
    /// By tokens: (tokens, by distinct experts).
    rows: Vec<(f64, Curve)>,
}

impl Table {
    /// Seconds per element with `tokens` per matrix, `distinct` experts at a time.
    fn at(&self, tokens: f64, distinct: f64) -> Reading {
        let read: Vec<(f64, Reading)> = self.rows.iter().map(|(n, curve)| (*n, curve.at(distinct))).collect();
        let curve = Curve::new(read.iter().map(|(n, r)| (*n, r.span)).collect()).expect("a table has rows");
        let mut reading = curve.at(tokens);
        // Only the rows on both sides matter.
        let after = read.partition_point(|(n, _)| *n < tokens * (1.0 - 1e-6)).min(read.len() - 1);
        reading = reading.weakened(read[after].1.source);
        if reading.source != EstimateSource::Measured {
            reading = reading.weakened(read[after.saturating_sub(1)].1.source);
        }
        if tokens > curve.end() {
            // Bound by arithmetic there: every further token costs as much as those before.
            return Reading { span: reading.span.times(tokens / curve.end()), source: EstimateSource::Analytic };
        }
        reading
    }
}

/// Samples of `(format, tokens, distinct, seconds per element)`, sorted, as tables.
fn tables(samples: impl Iterator<Item = (QuantFormat, f64, f64, Span)>) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    for (format, tokens, distinct, span) in samples {
        match tables.last_mut() {
            Some(t) if t.format == format => match t.rows.last_mut() {
                Some((n, curve)) if *n == tokens => curve.push(distinct, span),
                _ => t.rows.push((tokens, Curve::one(distinct, span))),
            },
            _ => tables.push(Table { format, rows: vec![(tokens, Curve::one(distinct, span))] }),
        }
    }
    tables
}

/// Measured tables over a roofline.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibrated {
    processor: String,
    memory: String,
    experts: Vec<Table>,
    matmuls: Vec<Table>,
    /// Seconds per byte over operations per byte.
    attention: Curve,
    /// Seconds per element over elements.
    small: Curve,
    /// Disk, its curve of seconds over bytes per read.
    disk: Option<(String, Curve)>,
    /// Memories measured on their nodes: 10^9 bytes of experts' weights and of anything per second.
    nodes: Vec<(String, Spread, Spread)>,
    /// Share by which interpolated values may be off besides the samples' own spread.
    interpolation_error: f64,
    /// For people: what was measured, what was not.
    words: String,
    roofline: Roofline,
}

impl Calibrated {
    /// The model of `machine` from its samples.
    ///
    /// # Panics
    /// If the machine was not checked: a checked calibration has samples of everything.
    pub fn new(machine: &Machine, c: &Calibration) -> Self {
        let us = |s: &Spread, per: f64| Span::of(s).times(1e-6 / per);
        let experts = tables(c.experts.iter().map(|s| {
            let elements = 3.0 * f64::from(s.hidden) * f64::from(s.inner) * s.distinct;
            (s.format, s.tokens, s.distinct, us(&s.us, elements))
        }));
        let matmuls =
            tables(c.matmuls.iter().map(|s| (s.format, s.tokens, 1.0, us(&s.us, f64::from(s.rows) * f64::from(s.cols)))));
        let attention = c.attention.iter().map(|s| (s.flops_per_byte, us(&s.us, s.kv_bytes))).collect();
        let small = c.small.iter().map(|s| (s.elements, us(&s.us, s.elements))).collect();
        let mut errors: Vec<f64> = Vec::new();
        for table in experts.iter().chain(&matmuls) {
            let mean = |(n, curve): &(f64, Curve)| (*n, curve.at(8.0).span);
            errors.extend(Curve::new(table.rows.iter().map(mean).collect()).map(|c| c.errors()).unwrap_or_default());
        }
        errors.sort_by(f64::total_cmp);
        let reasons = unmeasured(machine, c);
        Self {
            processor: c.processor.clone(),
            memory: c.memory.clone(),
            words: format!(
                "calibrated {} by {} with {} threads ({} kernels): {} from {} by {} samples, spread {:.0} %{}",
                c.date,
                c.program,
                c.threads,
                c.kernels,
                c.processor,
                c.memory,
                c.experts.len() + c.matmuls.len() + c.attention.len() + c.small.len(),
                100.0 * c.noise(),
                if reasons.is_empty() { String::new() } else { format!("; not measured: {}", reasons.join(", ")) },
            ),
            experts,
            matmuls,
            attention: Curve::new(attention).expect("a checked calibration has samples of attention"),
            small: Curve::new(small).expect("a checked calibration has samples of small operations"),
            disk: disk_curve(c),
            nodes: c.nodes.iter().map(|s| (s.memory.clone(), s.expert_gb_per_s, s.gb_per_s)).collect(),
            interpolation_error: errors.get(errors.len() / 2).copied().unwrap_or(0.1),
            roofline: Roofline::default(),
        }
    }

    /// One format's matrices.
    fn matrices(&self, tables: &[Table], format: QuantFormat, bytes: f64, flops: f64, distinct: f64) -> Estimate {
        let elements = bytes * 8.0 / format.bits_per_element();
        let tokens = flops / (2.0 * elements);
        let (table, exact) = nearest(tables, format);
        let mut reading = table.at(tokens, distinct);
        if !exact {
            // Bound by bytes it would follow the size, bound by arithmetic it would not: either may be so.
            let by_bytes = reading.span.times(format.bits_per_element() / table.format.bits_per_element());
            reading.span.value = (reading.span.value * by_bytes.value).sqrt();
            reading.span.low = reading.span.low.min(by_bytes.low);
            reading.span.high = reading.span.high.max(by_bytes.high);
            reading = reading.weakened(EstimateSource::Analytic);
        }
        self.widened(Reading { span: reading.span.times(elements), ..reading }).estimate()
    }

    fn widened(&self, mut r: Reading) -> Reading {
        if r.source != EstimateSource::Measured {
            let error = self.interpolation_error.max(COMPOSITION_ERROR);
            r.span.low *= 1.0 - error.min(0.9);
            r.span.high *= 1.0 + error;
        }
        r
    }

    /// `work` on the processor and memory that were measured.
    fn measured(&self, p: &Processor, from: &Memory, work: &Work) -> Estimate {
        let (tables, distinct) = if work.distinct > 0.0 { (&self.experts, work.distinct) } else { (&self.matmuls, 1.0) };
        // One expert is priced as its share of all that are computed together.
        let mut sum = Estimate::ZERO;
        let (mut known_bytes, mut known_flops) = (0.0, work.attention_flops);
        for (format, m) in work.matrices.iter() {
            sum = sum.then(self.matrices(tables, format, m.bytes, m.flops, distinct));
            known_bytes += m.bytes;
            known_flops += m.flops;
        }
        let kv = work.kv_bytes.0 as f64;
        if kv > 0.0 {
            let reading = self.attention.at(work.attention_flops / kv);
            let mut span = reading.span.times(kv);
            let beyond = work.attention_flops / kv / self.attention.end();
            if beyond > 1.0 {
                span = span.times(beyond);
            }
            sum = sum.then(self.widened(Reading { span, ..reading }).estimate());
        }
        if work.activations > 0.0 {
            let reading = self.small.at(work.activations);
            sum = sum.then(self.widened(Reading { span: reading.span.times(work.activations), ..reading }).estimate());
        }
        // What is not a matrix (norms' weights, rows of the embedding), and work that somebody else counted without formats.
        let rest = Work {
            weight_bytes: Bytes((work.weight_bytes.0 as f64 - known_bytes).max(0.0) as u64),
            flops: (work.flops - known_flops).max(0.0),
            ..Work::default()
        };
        if rest.weight_bytes.0 as f64 > 0.01 * work.bytes().0 as f64 {
            sum = sum.then(self.roofline.compute(p, from, rest, 0));
        }
        sum
    }
}

/// Seconds over bytes per read, at the depth nearest to the loader's.
fn disk_curve(c: &Calibration) -> Option<(String, Curve)> {
    let depth = c.disk.iter().map(|s| s.depth).min_by_key(|d| d.abs_diff(LOADER_DEPTH))?;
    let samples = c.disk.iter().filter(|s| s.depth == depth).map(|s| {
        // The slowest rate is the longest time.
        let seconds = |gb_per_s: f64| s.block as f64 / (gb_per_s * 1e9);
        let span = Span { value: seconds(s.gb_per_s.median), low: seconds(s.gb_per_s.max), high: seconds(s.gb_per_s.min) };
        (s.block as f64, span)
    });
    Some((c.disk_memory.clone()?, Curve::new(samples.collect())?))
}

/// What [`Roofline`] has to price, and why.
fn unmeasured(machine: &Machine, c: &Calibration) -> Vec<String> {
    let processors = machine.processors.iter().filter(|p| p.id != c.processor).map(|p| format!("{} (roofline)", p.id));
    let memories = machine
        .processor(&c.processor)
        .into_iter()
        .flat_map(|p| p.computes_from.iter().filter(|m| **m != c.memory && c.nodes.iter().all(|s| s.memory != **m)))
        .map(|m| format!("{} read by {} (roofline)", m, c.processor));
    let links = machine
        .links
        .iter()
        .filter(|l| c.disk.is_empty() || Some(&l.from) != c.disk_memory.as_ref())
        .map(|l| format!("{}->{} (roofline)", l.from, l.to));
    processors.chain(memories).chain(links).collect()
}

/// The table for `format`, or of the format nearest to it: the same kind of activations if possible, then the nearest size.
fn nearest(tables: &[Table], format: QuantFormat) -> (&Table, bool) {
    let kind = |f: QuantFormat| match f.layout().elems {
        1 => 0,
        32 => 1,
        _ => 2,
    };
    let best = tables.iter().min_by(|a, b| {
        let key = |t: &Table| {
            let distance = (t.format.bits_per_element() / format.bits_per_element()).ln().abs();
            (t.format != format, kind(t.format) != kind(format), distance)
        };
        let ((a0, a1, a2), (b0, b1, b2)) = (key(a), key(b));
        (a0, a1).cmp(&(b0, b1)).then(a2.total_cmp(&b2))
    });
    let table = best.expect("a checked calibration has samples");
    (table, table.format == format)
}

impl CostModel for Calibrated {
    fn describe(&self) -> String {
        format!("{}; interpolation is good to {:.1} %", self.words, 100.0 * self.interpolation_error)
    }

    fn basis(&self) -> (Source, &'static str) {
        (Source::Measured, "samples of this program's own kernels on this machine, kept in its file")
    }

    fn compute(&self, p: &Processor, from: &Memory, work: Work, launches: u32) -> Estimate {
        if p.id != self.processor {
            return self.roofline.compute(p, from, work, launches);
        }
        let here = self.measured(p, from, &work);
        if from.id == self.memory {
            return here;
        }
        // Another memory of the same processor: as fast as the measured one, or bound by its own rate.
        if let Some((_, weights, reads)) = self.nodes.iter().find(|n| n.0 == from.id) {
            let seconds = |of_weights: f64, of_reads: f64| {
                work.weight_bytes.0 as f64 / (of_weights * 1e9) + work.kv_bytes.0 as f64 / (of_reads * 1e9)
            };
            return Estimate {
                seconds: here.seconds.max(seconds(weights.median, reads.median)),
                low: here.low.max(seconds(weights.max, reads.max)),
                high: here.high.max(seconds(weights.min, reads.min)),
                source: here.source,
            };
        }
        let bytes = Work { weight_bytes: work.weight_bytes, kv_bytes: work.kv_bytes, ..Work::default() };
        let there = self.roofline.compute(p, from, bytes, 0);
        Estimate {
            seconds: here.seconds.max(there.seconds),
            low: here.low.max(there.low),
            high: here.high.max(there.high),
            source: here.then(there).source,
        }
    }

    fn transfer(&self, link: &Link, bytes: Bytes) -> Estimate {
        match &self.disk {
            Some((disk, curve)) if *disk == link.from && link.to == self.memory && bytes.0 > 0 => {
                let size = bytes.0 as f64;
                let reading = curve.at(size);
                // Above the largest block a read is several of them.
                let factor = (size / curve.end()).max(1.0);
                self.widened(Reading { span: reading.span.times(factor), ..reading }).estimate()
            }
            _ => self.roofline.transfer(link, bytes),
        }
    }

    fn sync(&self, p: &Processor) -> Estimate {
        self.roofline.sync(p)
    }
}
