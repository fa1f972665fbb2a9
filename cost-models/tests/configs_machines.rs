//! Every file of configs/machines describes a possible machine, says where its numbers are from, and the kinds people own are there.
//!
//! The files come from `tools/configs/make_machines.py`; what is checked here holds for hand-written ones too.

use std::path::Path;
use tierwise_cost::machine::{Machine, MemoryKind, ProcessorKind, Source, Sourced};
use tierwise_cost::units::Bytes;

fn machines() -> Vec<Machine> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/machines");
    let mut paths: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    let read = |path: &std::path::PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        let machine = Machine::from_toml(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(Some(machine.name.as_str()), path.file_stem().and_then(|s| s.to_str()), "name and file name agree");
        assert_eq!(Machine::from_toml(&machine.to_toml().unwrap()).unwrap(), machine, "{}", path.display());
        machine
    };
    paths.iter().map(read).collect()
}

/// Source and note of every number, with its field.
fn sources(m: &Machine) -> Vec<(String, Source, Option<&str>)> {
    fn one<T>(field: String, s: &Sourced<T>) -> (String, Source, Option<&str>) {
        (field, s.source, s.note.as_deref())
    }
    let mut all = Vec::new();
    for x in &m.memories {
        all.push(one(format!("{} capacity", x.id), &x.capacity));
        all.push(one(format!("{} read_bandwidth", x.id), &x.read_bandwidth));
        all.push(one(format!("{} latency", x.id), &x.latency));
    }
    for x in &m.processors {
        all.push(one(format!("{} f32_flops", x.id), &x.f32_flops));
        all.extend(x.f16_flops.iter().map(|r| one(format!("{} f16_flops", x.id), r)));
        all.extend(x.int8_ops.iter().map(|r| one(format!("{} int8_ops", x.id), r)));
        all.push(one(format!("{} launch_latency", x.id), &x.launch_latency));
    }
    for x in &m.links {
        let field = |name: &str| format!("{} -> {} {name}", x.from, x.to);
        all.push(one(field("bandwidth"), &x.bandwidth));
        all.extend(x.pageable_bandwidth.iter().map(|r| one(field("pageable_bandwidth"), r)));
        all.push(one(field("latency"), &x.latency));
    }
    all
}

fn vram(m: &Machine) -> Bytes {
    m.memories_of(MemoryKind::Vram).map(|v| v.capacity.value).sum()
}

fn sockets(m: &Machine) -> usize {
    m.processors_of(ProcessorKind::Cpu).count()
}

fn gpus(m: &Machine) -> usize {
    m.processors_of(ProcessorKind::Gpu).count()
}

#[test]
fn every_number_says_where_it_is_from() {
    for m in machines() {
        for (field, source, note) in sources(&m) {
            assert!(note.is_some_and(|n| n.len() >= 4), "{}: {field} ({}) has no note", m.name, source.name());
        }
        assert!(m.note.as_ref().is_some_and(|n| n.len() > 20), "{}: what it stands for", m.name);
    }
}

#[test]
fn the_kinds_that_people_own_are_there() {
    let all = machines();
    assert!(all.len() >= 40, "{} machines", all.len());
    let gb = 1_000_000_000;
    type Kind = (&'static str, usize, fn(&Machine) -> bool);
    let kinds: [Kind; 14] = [
        ("desktop with a GPU of 8 to 12 GB", 5, |m| gpus(m) == 1 && (8..=12).contains(&(vram(m).0 >> 30)) && !m.is_unified()),
        ("desktop with a GPU of 16 to 32 GB", 10, |m| gpus(m) == 1 && (16..=32).contains(&(vram(m).0 >> 30))),
        ("several GPUs and one socket", 4, |m| gpus(m) > 1 && sockets(m) == 1),
        ("workstation GPU of 48 to 96 GB", 3, |m| gpus(m) == 1 && (44..=96).contains(&(vram(m).0 >> 30)) && sockets(m) == 1),
        ("no GPU", 4, |m| gpus(m) == 0),
        ("two sockets without GPU", 2, |m| gpus(m) == 0 && sockets(m) == 2),
        ("two sockets with GPU", 3, |m| gpus(m) > 0 && sockets(m) == 2),
        ("CXL", 3, |m| m.memories_of(MemoryKind::Cxl).count() > 0),
        ("Apple", 5, |m| m.is_unified() && m.name.starts_with("apple")),
        ("unified, not Apple", 2, |m| m.is_unified() && !m.name.starts_with("apple")),
        ("node of eight GPUs", 4, |m| gpus(m) == 8),
        ("data-centre GPU", 5, |m| gpus(m) == 1 && vram(m).0 >= 80 << 30),
        ("AMD GPU", 4, |m| m.processors_of(ProcessorKind::Gpu).any(|g| g.isa.iter().any(|i| i.starts_with("gfx")))),
        ("measured host", 9, |m| {
            m.memories.iter().any(|x| x.kind == MemoryKind::Dram && x.read_bandwidth.source == Source::Measured)
        }),
    ];
    for (what, at_least, is) in kinds {
        let found: Vec<&str> = all.iter().filter(|m| is(m)).map(|m| m.name.as_str()).collect();
        assert!(found.len() >= at_least, "{what}: only {found:?}");
    }
    // Names are unique by file; two files must not describe the same machine either.
    let mut prints: Vec<String> = all.iter().map(Machine::fingerprint).collect();
    prints.sort();
    prints.dedup();
    assert_eq!(prints.len(), all.len(), "two files with the same numbers");
    assert!(all.iter().all(|m| vram(m).0 < 2000 * gb));
}

/// Orders of magnitude that a slip of a unit or a wrong row would break.
#[test]
fn numbers_are_of_the_right_size() {
    for m in machines() {
        let name = &m.name;
        for p in m.processors_of(ProcessorKind::Gpu) {
            let home = m.home(p);
            let rate = home.read_bandwidth.value.0;
            if home.kind == MemoryKind::Vram {
                for d in m.memories_of(MemoryKind::Dram) {
                    // A card beside a big server may be slower than all its channels together; beside a desktop's two it never is.
                    let server = d.read_bandwidth.value.0 > 150e9;
                    assert!(server || rate > d.read_bandwidth.value.0, "{name}: {} is slower than {}", home.id, d.id);
                }
                let mut ways = m.links.iter().filter(|l| l.to == home.id && m.memory(&l.from).unwrap().kind == MemoryKind::Dram);
                assert!(ways.clone().next().is_some(), "{name}: nothing leads into {}", home.id);
                // The memory of the other socket is no nearer.
                let near = ways.clone().find(|l| l.pageable_bandwidth.is_some()).expect("one link from the socket beside it");
                for l in ways.clone().filter(|l| l.from != near.from) {
                    assert!(l.bandwidth.value.0 < near.bandwidth.value.0, "{name}: {} -> {}", l.from, l.to);
                }
                assert!(ways.all(|l| l.bandwidth.value.0 < rate && l.bandwidth.value.0 < 130e9), "{name}: {}", home.id);
                // Seconds to read a card once: 1 to 100 ms for everything sold.
                let once = home.capacity.value.0 as f64 / rate;
                assert!((0.005..=0.1).contains(&once), "{name}: {once} s to read {}", home.id);
            }
            let f16 = p.f16_flops.as_ref().expect("GPUs have a float16 rate").value.0;
            assert!(f16 >= p.f32_flops.value.0, "{name}");
            // Operations per byte: 10 (large memory, few units) to 500.
            assert!((10.0..=500.0).contains(&(f16 / rate)), "{name}: {} operations per byte", f16 / rate);
        }
        for p in m.processors_of(ProcessorKind::Cpu) {
            let per_core = p.f32_flops.value.0 / f64::from(p.cores);
            assert!((40e9..=320e9).contains(&per_core), "{name}: {per_core} operations per second and core");
            assert!(m.link("disk0", &m.home(p).id).is_some(), "{name}: no way from disk to {}", m.home(p).id);
            let disk = m.memory("disk0").unwrap();
            assert!(disk.read_bandwidth.value.0 < m.home(p).read_bandwidth.value.0, "{name}");
        }
        // Sockets reach each other's memory, more slowly than their own.
        for a in m.processors_of(ProcessorKind::Cpu) {
            for d in m.memories_of(MemoryKind::Dram).filter(|d| d.id != m.home(a).id) {
                assert!(a.computes_from.contains(&d.id), "{name}: {} does not read {}", a.id, d.id);
                let seen = m.seen_from(a, d);
                assert!(seen.read_bandwidth.value.0 < d.read_bandwidth.value.0, "{name}: {} from {}", d.id, a.id);
                assert!(seen.latency.value.0 > d.latency.value.0, "{name}: {} from {}", d.id, a.id);
            }
        }
    }
}

/// Figures that are known from elsewhere: datasheets and arithmetic over them, for one machine of every kind.
#[test]
fn known_figures() {
    let all = machines();
    let rate = |name: &str, memory: &str| {
        let m = all.iter().find(|m| m.name == name).unwrap_or_else(|| panic!("{name}"));
        m.memory(memory).unwrap_or_else(|| panic!("{name} {memory}")).read_bandwidth.value.0 / 1e9
    };
    for (name, memory, gbs) in [
        // Gb/s per pin x bits / 8.
        ("rtx3060-12g-ddr4-32g", "vram0", 15.0 * 192.0 / 8.0),
        ("rtx3080-10g-ddr4-32g", "vram0", 19.0 * 320.0 / 8.0),
        ("rtx4060ti-16g-ddr5-64g", "vram0", 18.0 * 128.0 / 8.0),
        ("rtx4080-16g-ddr5-64g", "vram0", 22.4 * 256.0 / 8.0),
        ("rtx5060-8g-ddr5-32g", "vram0", 28.0 * 128.0 / 8.0),
        ("rtx5080-16g-ddr5-64g", "vram0", 30.0 * 256.0 / 8.0),
        ("rtx5090-32g-ddr5-96g", "vram0", 28.0 * 512.0 / 8.0),
        ("rx7900xtx-24g-ddr5-64g", "vram0", 20.0 * 384.0 / 8.0),
        ("rx9070-16g-ddr5-32g", "vram0", 20.0 * 256.0 / 8.0),
        ("threadripper-rtxpro6000-96g-ddr5-512g", "vram0", 28.0 * 512.0 / 8.0),
        ("a100x8-640g-ddr4-2t", "vram7", 2039.0),
        ("h200x8-1128g-ddr5-2t", "vram0", 4800.0),
        ("mi300x-192g-ddr5-1t", "vram0", 5300.0),
        // MT/s x channels x 8.
        ("epyc-2s-24ch-ddr5-1536g", "dram1", 6.0 * 12.0 * 8.0),
        ("threadripper-a6000-48g-ddr4-256g", "dram0", 3.2 * 8.0 * 8.0),
        ("xeon6-12ch-mrdimm-1536g", "dram0", 8.8 * 12.0 * 8.0),
        ("apple-m4-max-64g", "dram0", 8.533 * 512.0 / 8.0),
        ("strix-halo-128g", "dram0", 8.0 * 256.0 / 8.0),
        // Measured by their owner.
        ("measured-tr7995wx-rtx4090-251g", "vram0", 944.4),
        ("measured-w1250-a2000-126g", "dram0", 25.02),
    ] {
        let found = rate(name, memory);
        assert!((found / gbs - 1.0).abs() < 0.005, "{name} {memory}: {found} GB/s, expected {gbs}");
    }
}
