//! What transfers share: one link into a GPU, one memory that several read.
//!
//! Links are described by where they begin and end, and two of them may be one wire: whatever host memory its bytes come from, a GPU has one
//! slot on the bus. A CPU that computes straight from CXL memory and copies from there drink from the same cards. Who shares, shares the rate:
//! each does no more than it could alone, all together no more than the thing they share. (Reads of a processor's home memory beside copies
//! from it are the same thing; plans count those as slowing that processor, algorithms §1.)

use super::{Link, Machine, MemoryKind, Processor};

impl Machine {
    /// The fastest of several links from host memories and disks into the memory of a GPU: copies over any of them share its rate.
    /// `None` where there is one link, or none.
    pub fn port(&self, to: &str) -> Option<&Link> {
        let outside = |id: &str| self.memory(id).is_some_and(|m| m.kind != MemoryKind::Vram);
        self.memory(to).filter(|m| m.kind == MemoryKind::Vram)?;
        let links = || self.links.iter().filter(|l| l.to == to && outside(&l.from));
        (links().count() > 1).then(|| links().max_by(|a, b| a.bandwidth.value.0.total_cmp(&b.bandwidth.value.0))).flatten()
    }

    /// A processor that computes from `memory` though that is nobody's home: CXL memory read by a CPU.
    pub fn guest_of(&self, memory: &str) -> Option<&Processor> {
        let home = |p: &&Processor| p.computes_from.first().is_some_and(|id| id == memory);
        if self.processors.iter().any(|p| home(&p)) {
            return None;
        }
        self.processors.iter().find(|p| p.computes_from.iter().any(|id| id == memory))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_has_one_slot_and_cards_have_guests() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/machines/xeon-cxl-rtx4090.toml");
        let mut machine = Machine::from_toml(&std::fs::read_to_string(path).expect("a file")).expect("a machine");
        let port = machine.port("vram0").expect("DRAM and CXL are linked to it");
        assert_eq!(port.bandwidth.value.0, 25.6e9);
        assert!(machine.port("dram0").is_none(), "a disk and a card have lanes of their own");
        assert_eq!(machine.guest_of("cxl0").map(|p| p.id.as_str()), Some("cpu0"));
        assert!(
            machine.guest_of("dram0").is_none() && machine.guest_of("vram0").is_none() && machine.guest_of("disk0").is_none()
        );
        machine.links.retain(|l| l.to != "vram0" || l.from == "dram0");
        assert!(machine.port("vram0").is_none());
    }
}
