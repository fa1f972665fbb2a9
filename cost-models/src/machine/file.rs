//! The text form of a machine: `configs/machines/*.toml`.
//!
//! Written by hand here, because a number and its source belong on one line (an inline table), which the serialiser does not do.

use super::{Calibration, Machine, Sourced};
use crate::error::CostError;
use serde::Serialize;
use std::fmt::Write;

impl Machine {
    /// Reads and checks the text of a machine file.
    ///
    /// # Errors
    /// [`CostError::BadToml`] with line and column, or [`CostError::BadMachine`].
    pub fn from_toml(text: &str) -> Result<Self, CostError> {
        let machine: Self = toml::from_str(text).map_err(|e| CostError::BadToml { what: "machine", message: e.to_string() })?;
        machine.check()?;
        Ok(machine)
    }

    /// The text of a machine file; reads back to an equal machine.
    ///
    /// # Errors
    /// [`CostError::BadToml`] if a value has no TOML form.
    pub fn to_toml(&self) -> Result<String, CostError> {
        let mut out = Writer(String::new());
        out.field("name", &self.name)?;
        if let Some(note) = &self.note {
            out.field("note", note)?;
        }
        for m in &self.memories {
            out.table("memory");
            out.field("id", &m.id)?;
            out.field("kind", &m.kind)?;
            out.sourced("capacity", &m.capacity)?;
            out.sourced("read_bandwidth", &m.read_bandwidth)?;
            out.sourced("latency", &m.latency)?;
            if !m.numa_nodes.is_empty() {
                out.field("numa_nodes", &m.numa_nodes)?;
            }
        }
        for p in &self.processors {
            out.table("processor");
            out.field("id", &p.id)?;
            out.field("kind", &p.kind)?;
            out.field("name", &p.name)?;
            out.field("cores", &p.cores)?;
            out.field("threads", &p.threads)?;
            out.field("isa", &p.isa)?;
            out.field("computes_from", &p.computes_from)?;
            out.sourced("f32_flops", &p.f32_flops)?;
            for (name, rate) in [("f16_flops", &p.f16_flops), ("int8_ops", &p.int8_ops)] {
                if let Some(rate) = rate {
                    out.sourced(name, rate)?;
                }
            }
            out.sourced("launch_latency", &p.launch_latency)?;
        }
        for l in &self.links {
            out.table("link");
            out.field("from", &l.from)?;
            out.field("to", &l.to)?;
            out.sourced("bandwidth", &l.bandwidth)?;
            if let Some(pageable) = &l.pageable_bandwidth {
                out.sourced("pageable_bandwidth", pageable)?;
            }
            out.sourced("latency", &l.latency)?;
        }
        if let Some(c) = &self.calibration {
            out.calibration(c)?;
        }
        Ok(out.0)
    }
}

struct Writer(String);

impl Writer {
    fn table(&mut self, name: &str) {
        let _ = writeln!(self.0, "\n[[{name}]]");
    }

    fn calibration(&mut self, c: &Calibration) -> Result<(), CostError> {
        self.0.push_str("\n[calibration]\n");
        self.field("date", &c.date)?;
        self.field("program", &c.program)?;
        self.field("seconds", &c.seconds)?;
        self.field("threads", &c.threads)?;
        self.field("kernels", &c.kernels)?;
        self.field("processor", &c.processor)?;
        self.field("memory", &c.memory)?;
        if let Some(disk) = &c.disk_memory {
            self.field("disk_memory", disk)?;
        }
        self.list("notes", &c.notes)?;
        self.field("launch_us", &c.launch_us)?;
        self.list("read", &c.read)?;
        self.list("experts", &c.experts)?;
        self.list("matmuls", &c.matmuls)?;
        self.list("attention", &c.attention)?;
        self.list("small", &c.small)?;
        self.list("disk", &c.disk)?;
        if !c.nodes.is_empty() {
            self.list("nodes", &c.nodes)?;
        }
        if c.copies.is_empty() { Ok(()) } else { self.list("copies", &c.copies) }
    }

    /// One item per line.
    fn list<T: Serialize>(&mut self, name: &str, items: &[T]) -> Result<(), CostError> {
        let _ = writeln!(self.0, "{name} = [");
        for item in items {
            let text = inline(item)?;
            let _ = writeln!(self.0, "  {text},");
        }
        self.0.push_str("]\n");
        Ok(())
    }

    fn field(&mut self, name: &str, value: &impl Serialize) -> Result<(), CostError> {
        let text = inline(value)?;
        let _ = writeln!(self.0, "{name} = {text}");
        Ok(())
    }

    fn sourced<T: Serialize>(&mut self, name: &str, s: &Sourced<T>) -> Result<(), CostError> {
        let mut text = format!("{{ value = {}, source = {}", inline(&s.value)?, inline(&s.source)?);
        if let Some(note) = &s.note {
            let _ = write!(text, ", note = {}", inline(note)?);
        }
        let _ = writeln!(self.0, "{name} = {text} }}");
        Ok(())
    }
}

fn inline(value: &impl Serialize) -> Result<String, CostError> {
    toml::Value::try_from(value)
        .map(|v| v.to_string())
        .map_err(|e| CostError::BadToml { what: "machine", message: e.to_string() })
}
