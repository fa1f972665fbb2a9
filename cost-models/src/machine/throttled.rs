//! The same machine with one memory slower: what to plan and predict by where a program holds a memory back to a rate.
//!
//! A cost model takes a share off every rate, because what is rated is not reached. A rate that is kept by holding bytes back is reached
//! exactly, so it is written as the measured rate of which that share is left.

use super::{Machine, Sourced};
use crate::cost::Roofline;
use crate::units::BytesPerS;

impl Machine {
    /// The machine with `memory` and all links from it no faster than `rate`, as they are priced. `None` if it has no such memory.
    ///
    /// What `calibrate` measured of that memory no longer holds and is left out.
    #[must_use]
    pub fn throttled(&self, memory: &str, rate: BytesPerS) -> Option<Self> {
        let mut slow = self.clone();
        let rated = BytesPerS(rate.0 / Roofline::default().measured.value);
        let hold_back = |own: &mut Sourced<BytesPerS>| {
            if rated.0 < own.value.0 {
                *own = Sourced::measured(rated).with_note(format!("held back: {rate} reached"));
            }
        };
        hold_back(&mut slow.memories.iter_mut().find(|m| m.id == memory)?.read_bandwidth);
        for link in slow.links.iter_mut().filter(|l| l.from == memory) {
            hold_back(&mut link.bandwidth);
            if let Some(pageable) = &mut link.pageable_bandwidth {
                hold_back(pageable);
            }
        }
        if slow.calibration.as_ref().is_some_and(|c| c.memory == memory) {
            slow.calibration = None;
        }
        if let Some(c) = &mut slow.calibration {
            c.nodes.retain(|s| s.memory != memory);
            if c.disk_memory.as_deref() == Some(memory) {
                c.disk_memory = None;
                c.disk.clear();
            }
        }
        Some(slow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{CostModel, Work};
    use crate::units::Bytes;

    #[test]
    fn a_throttled_memory_is_priced_at_its_rate() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/machines/xeon-cxl-rtx4090.toml");
        let machine = Machine::from_toml(&std::fs::read_to_string(path).expect("a file")).expect("a machine");
        assert!(machine.throttled("tape0", BytesPerS(1e9)).is_none());
        let slow = machine.throttled("cxl0", BytesPerS(2e9)).expect("it has one");
        slow.check().expect("a machine");
        let (cost, bytes) = (Roofline::default(), Bytes(1 << 30));
        let wanted = bytes.0 as f64 / 2e9;
        let cpu = slow.processor("cpu0").expect("it has one");
        let work = Work { weight_bytes: bytes, ..Work::default() };
        let seen = slow.seen_from(cpu, slow.memory("cxl0").expect("it has one"));
        assert!((cost.compute(cpu, &seen, work, 0).seconds / wanted - 1.0).abs() < 1e-9);
        for link in slow.links.iter().filter(|l| l.from == "cxl0") {
            let seconds = cost.transfer(link, bytes).seconds - link.latency.value.0;
            assert!((seconds / wanted - 1.0).abs() < 1e-9, "{link:?}");
        }
        // Nothing else changes, and nothing gets faster.
        assert_eq!(slow.memory("dram0"), machine.memory("dram0"));
        assert_eq!(machine.throttled("cxl0", BytesPerS(1e15)).expect("it has one"), machine);
    }
}
