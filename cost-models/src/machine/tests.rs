//! Machine files: every committed one, the round trip, and what is refused.

use super::*;

pub(crate) const SMALL: &str = r#"
name = "small"

[[memory]]
id = "dram0"
kind = "dram"
capacity = { value = "32 GiB", source = "datasheet" }
read_bandwidth = { value = "51.2 GB/s", source = "datasheet", note = "DDR4-3200 x 2" }
latency = { value = "81 ns", source = "prior" }

[[memory]]
id = "vram0"
kind = "vram"
capacity = { value = "8 GiB", source = "datasheet" }
read_bandwidth = { value = "272 GB/s", source = "datasheet" }
latency = { value = "500 ns", source = "prior" }

[[processor]]
id = "cpu0"
kind = "cpu"
name = "a CPU"
cores = 8
threads = 16
isa = ["avx2"]
computes_from = ["dram0"]
f32_flops = { value = "900 GFLOP/s", source = "prior" }
launch_latency = { value = "5 us", source = "prior" }

[[processor]]
id = "gpu0"
kind = "gpu"
name = "a GPU"
cores = 24
threads = 24
computes_from = ["vram0"]
f32_flops = { value = "15 TFLOP/s", source = "datasheet" }
launch_latency = { value = "2 us", source = "prior" }

[[link]]
from = "dram0"
to = "vram0"
bandwidth = { value = "25.6 GB/s", source = "prior" }
pageable_bandwidth = { value = "10 GB/s", source = "prior" }
latency = { value = "10 us", source = "prior" }
"#;

#[test]
fn every_machine_in_configs_parses_and_checks() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/machines");
    let mut count = 0;
    for entry in std::fs::read_dir(&folder).expect("configs/machines exists") {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let machine = Machine::from_toml(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(Some(machine.name.as_str()), path.file_stem().and_then(|s| s.to_str()), "name and file name agree");
        assert_eq!(Machine::from_toml(&machine.to_toml().unwrap()).unwrap(), machine, "{}", path.display());
        // A figure without a source is a rumour: datasheet and measured values say which.
        let unsourced = text.lines().filter(|l| l.contains("source = \"measured\"") && !l.contains("note =")).count();
        assert_eq!(unsourced, 0, "{}: measured values need a note", path.display());
        count += 1;
    }
    assert!(count >= 8, "{count} machines");
}

#[test]
fn fingerprint_follows_numbers_and_not_notes() {
    let a = Machine::from_toml(SMALL).unwrap();
    let renoted = Machine::from_toml(&SMALL.replace("DDR4-3200 x 2", "two modules")).unwrap();
    let slower = Machine::from_toml(&SMALL.replace("51.2 GB/s", "51.1 GB/s")).unwrap();
    assert_eq!(a.fingerprint(), renoted.fingerprint());
    assert_ne!(a.fingerprint(), slower.fingerprint());
}

/// SMALL's main memory on these nodes.
fn on_nodes(nodes: &str) -> String {
    SMALL.replacen("latency = { value = \"81 ns\"", &format!("numa_nodes = {nodes}\nlatency = {{ value = \"81 ns\""), 1)
}

#[test]
fn nodes_read_back_and_count_in_the_fingerprint() {
    let plain = Machine::from_toml(SMALL).unwrap();
    let placed = Machine::from_toml(&on_nodes("[0, 2]")).unwrap();
    assert_eq!(placed.memories[0].numa_nodes, [0, 2]);
    assert_eq!(Machine::from_toml(&placed.to_toml().unwrap()).unwrap(), placed);
    assert_eq!(Machine::from_toml(&on_nodes("[]")).unwrap().fingerprint(), plain.fingerprint());
    assert_ne!(placed.fingerprint(), plain.fingerprint());
    for wrong in ["[2, 0]", "[0, 0]", "[1024]"] {
        let message = Machine::from_toml(&on_nodes(wrong)).unwrap_err().to_string();
        assert!(message.contains("dram0 numa_nodes"), "{wrong}: {message}");
    }
    let of_vram = SMALL.replacen("latency = { value = \"500 ns\"", "numa_nodes = [1]\nlatency = { value = \"500 ns\"", 1);
    assert!(Machine::from_toml(&of_vram).unwrap_err().to_string().contains("vram0 numa_nodes"));
}

#[test]
fn routes_of_two_hops_run_at_the_slower_one() {
    let with_disk = format!(
        "{SMALL}{}",
        r#"
[[memory]]
id = "disk0"
kind = "disk"
capacity = { value = "1 TB", source = "datasheet" }
read_bandwidth = { value = "7 GB/s", source = "datasheet" }
latency = { value = "80 us", source = "prior" }

[[link]]
from = "disk0"
to = "dram0"
bandwidth = { value = "7 GB/s", source = "datasheet" }
latency = { value = "80 us", source = "prior" }
"#
    );
    let m = Machine::from_toml(&with_disk).unwrap();
    let route = m.route("disk0", "vram0").unwrap();
    assert_eq!(route.bandwidth.value, BytesPerS(7e9));
    assert!((route.latency.value.0 - 90e-6).abs() < 1e-12);
    assert!(m.route("vram0", "disk0").is_none());
}

#[test]
fn impossible_machines_are_refused_with_the_field() {
    // (what is replaced, by what, words the message must have)
    let cases = [
        ("id = \"vram0\"", "id = \"dram0\"", "twice"),
        ("id = \"vram0\"", "id = \"V RAM\"", "a-z"),
        ("name = \"small\"", "name = \" \"", "name"),
        ("capacity = { value = \"8 GiB\"", "capacity = { value = \"0 B\"", "vram0 capacity"),
        ("51.2 GB/s", "0 GB/s", "dram0 read_bandwidth"),
        ("51.2 GB/s", "51.2", "51.2"),
        ("81 ns", "2 s", "latency"),
        ("cores = 8", "cores = 0", "cpu0 cores"),
        ("threads = 16", "threads = 4", "cpu0 threads"),
        ("computes_from = [\"vram0\"]", "computes_from = [\"vram1\"]", "dram0, vram0"),
        ("computes_from = [\"vram0\"]", "computes_from = []", "computes_from"),
        ("computes_from = [\"dram0\"]", "computes_from = [\"vram0\"]", "CPU"),
        ("kind = \"cpu\"", "kind = \"gpu\"", "kind cpu"),
        ("to = \"vram0\"", "to = \"dram0\"", "different"),
        ("to = \"vram0\"", "to = \"nowhere\"", "nowhere"),
        ("\"10 GB/s\"", "\"30 GB/s\"", "pinned"),
        ("source = \"prior\"", "source = \"guess\"", "guess"),
        ("cores = 8", "cores = 8\ncoers = 9", "coers"),
        ("900 GFLOP/s", "0 GFLOP/s", "f32_flops"),
    ];
    for (from, to, words) in cases {
        let text = SMALL.replacen(from, to, 1);
        assert_ne!(text, SMALL, "{from}");
        let message = Machine::from_toml(&text).expect_err(to).to_string();
        assert!(message.contains(words), "{from} -> {to}: {message}");
    }
    let lonely = SMALL.replace("computes_from = [\"vram0\"]", "computes_from = [\"dram0\"]");
    assert!(Machine::from_toml(&lonely).unwrap_err().to_string().contains("out of reach"));
}

/// A calibration of SMALL's cpu0, as text.
pub(crate) const CALIBRATION: &str = r#"
[calibration]
date = "2026-11-21"
program = "tierwise 0.1.0"
seconds = 12.5
threads = 8
kernels = "avx2"
processor = "cpu0"
memory = "dram0"
notes = ["no GPU found: not measured"]
launch_us = { median = 5.0, min = 4.0, max = 7.0, runs = 5 }
read = [
  { node = 0, threads = 1, gb_per_s = { median = 12.0, min = 11.0, max = 12.5, runs = 5 } },
  { node = 0, threads = 8, gb_per_s = { median = 40.0, min = 38.0, max = 41.0, runs = 5 } },
]
experts = [
  { format = "Q8_0", hidden = 1000, inner = 1000, tokens = 1.0, distinct = 1.0, us = { median = 300.0, min = 270.0, max = 360.0, runs = 5 } },
  { format = "Q8_0", hidden = 1000, inner = 1000, tokens = 1.0, distinct = 4.0, us = { median = 600.0, min = 540.0, max = 720.0, runs = 5 } },
  { format = "Q8_0", hidden = 1000, inner = 1000, tokens = 4.0, distinct = 4.0, us = { median = 1200.0, min = 1080.0, max = 1440.0, runs = 5 } },
  { format = "Q8_0", hidden = 1000, inner = 1000, tokens = 16.0, distinct = 4.0, us = { median = 4800.0, min = 4320.0, max = 5760.0, runs = 5 } },
]
matmuls = [
  { format = "F32", rows = 1000, cols = 1000, tokens = 1.0, us = { median = 100.0, min = 90.0, max = 120.0, runs = 5 } },
  { format = "Q8_0", rows = 1000, cols = 1000, tokens = 1.0, us = { median = 50.0, min = 45.0, max = 60.0, runs = 5 } },
  { format = "Q8_0", rows = 1000, cols = 1000, tokens = 16.0, us = { median = 200.0, min = 180.0, max = 240.0, runs = 5 } },
]
attention = [
  { flops_per_byte = 1.0, heads = 8, kv_heads = 8, tokens = 1, past = 511, kv_bytes = 1e6, us = { median = 100.0, min = 90.0, max = 120.0, runs = 5 } },
  { flops_per_byte = 16.0, heads = 8, kv_heads = 8, tokens = 32, past = 0, kv_bytes = 1e6, us = { median = 400.0, min = 360.0, max = 480.0, runs = 5 } },
]
small = [
  { elements = 1000.0, us = { median = 1.0, min = 0.9, max = 1.2, runs = 5 } },
  { elements = 100000.0, us = { median = 50.0, min = 45.0, max = 60.0, runs = 5 } },
]
disk = []
"#;

#[test]
fn calibrations_read_back_equal_and_count_in_the_fingerprint() {
    let machine = Machine::from_toml(&format!("{SMALL}{CALIBRATION}")).unwrap();
    assert_eq!(Machine::from_toml(&machine.to_toml().unwrap()).unwrap(), machine);
    let print = |text: &str| Machine::from_toml(text).unwrap().fingerprint();
    let with = |from: &str, to: &str| print(&format!("{SMALL}{}", CALIBRATION.replacen(from, to, 1)));
    let same = machine.fingerprint();
    assert_ne!(print(SMALL), same);
    assert_eq!(with("2026-11-21", "2027-01-01"), same, "the day changes no plan");
    assert_eq!(with("max = 360.0", "max = 380.0"), same, "the interval changes no plan");
    assert_ne!(with("median = 300.0", "median = 301.0"), same);
    assert_ne!(with("threads = 8\nkernels", "threads = 4\nkernels"), same);
}

/// Samples of memories on nodes, to be put behind CALIBRATION.
pub(crate) const NODES: &str = r#"nodes = [
  { memory = "dram0", threads = 8, gb_per_s = { median = 40.0, min = 38.0, max = 41.0, runs = 3 }, latency_ns = { median = 90.0, min = 88.0, max = 99.0, runs = 3 }, expert_gb_per_s = { median = 30.0, min = 28.0, max = 31.0, runs = 3 } },
  { memory = "cxl0", threads = 8, gb_per_s = { median = 20.0, min = 19.0, max = 21.0, runs = 3 }, latency_ns = { median = 250.0, min = 240.0, max = 300.0, runs = 3 }, expert_gb_per_s = { median = 10.0, min = 8.0, max = 12.5, runs = 3 }, contended_gb_per_s = [{ median = 15.0, min = 14.0, max = 16.0, runs = 3 }, { median = 30.0, min = 29.0, max = 31.0, runs = 3 }] },
]
"#;

/// SMALL with CXL memory of which its CPU computes.
pub(crate) fn with_cxl() -> String {
    let cxl = r#"
[[memory]]
id = "cxl0"
kind = "cxl"
capacity = { value = "32 GiB", source = "datasheet" }
read_bandwidth = { value = "25 GB/s", source = "datasheet" }
latency = { value = "250 ns", source = "prior" }
numa_nodes = [1]
"#;
    format!("{SMALL}{cxl}").replacen("computes_from = [\"dram0\"]", "computes_from = [\"dram0\", \"cxl0\"]", 1)
}

#[test]
fn samples_of_nodes_read_back_and_are_checked() {
    let text = format!("{}{CALIBRATION}{NODES}", with_cxl());
    let machine = Machine::from_toml(&text).unwrap();
    assert_eq!(Machine::from_toml(&machine.to_toml().unwrap()).unwrap(), machine);
    assert_ne!(Machine::from_toml(&format!("{}{CALIBRATION}", with_cxl())).unwrap().fingerprint(), machine.fingerprint());
    let cases = [
        ("memory = \"cxl0\", threads", "memory = \"cxl9\", threads", "nodes[1].memory"),
        ("memory = \"cxl0\", threads", "memory = \"dram0\", threads", "nodes[1].memory"),
        ("memory = \"cxl0\", threads = 8", "memory = \"cxl0\", threads = 0", "nodes[1].threads"),
        ("median = 250.0", "median = -250.0", "nodes[1].latency_ns.median"),
        ("median = 15.0", "median = nan", "nodes[1].contended_gb_per_s.median"),
        ("min = 8.0", "min = 11.0", "nodes[1].expert_gb_per_s.median"),
    ];
    for (from, to, words) in cases {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        let message = Machine::from_toml(&changed).expect_err(words).to_string();
        assert!(message.contains(words), "{words}: {message}");
    }
}

#[test]
fn impossible_calibrations_are_refused_with_the_field() {
    let experts_at = CALIBRATION.find("experts = [").unwrap();
    let (before, after) = CALIBRATION.split_at(experts_at);
    let first = after.find("  {").unwrap();
    let second = first + 3 + after[first + 3..].find("  {").unwrap();
    let third = second + 3 + after[second + 3..].find("  {").unwrap();
    // The first two samples of experts exchanged.
    let unsorted = format!("{before}{}{}{}{}", &after[..first], &after[second..third], &after[first..second], &after[third..]);
    let list = |name: &str| {
        let start = CALIBRATION.find(&format!("\n{name} = [")).unwrap() + 1;
        let end = start + CALIBRATION[start..].find("\n]").unwrap() + 2;
        CALIBRATION.replace(&CALIBRATION[start..end], &format!("{name} = []"))
    };
    let swap = |from: &str, to: &str| {
        let text = CALIBRATION.replacen(from, to, 1);
        assert_ne!(text, CALIBRATION, "{from}");
        text
    };
    let cases = [
        (unsorted, "experts[1]"),
        (list("experts"), "calibration.experts"),
        (list("matmuls"), "calibration.matmuls"),
        (list("attention"), "calibration.attention"),
        (list("small"), "calibration.small"),
        (list("read"), "calibration.read"),
        (swap("median = 300.0", "median = -300.0"), "experts[0].us.median"),
        (swap("median = 300.0", "median = nan"), "experts[0].us.median"),
        (swap("max = 360.0", "max = inf"), "experts[0].us.max"),
        (swap("min = 270.0", "min = 0.0"), "experts[0].us.min"),
        (swap("min = 270.0", "min = 310.0"), "experts[0].us.median"),
        (swap("max = 360.0, runs = 5", "max = 360.0, runs = 0"), "experts[0].us.runs"),
        (swap("tokens = 1.0, distinct = 1.0", "tokens = 0.0, distinct = 1.0"), "experts[0].tokens"),
        (swap("tokens = 1.0, distinct = 1.0", "tokens = 1.0, distinct = nan"), "experts[0].distinct"),
        (swap("hidden = 1000", "hidden = 0"), "experts[0].hidden"),
        (swap("kv_bytes = 1e6", "kv_bytes = -1.0"), "attention[0].kv_bytes"),
        (swap("elements = 100000.0", "elements = 1000.0"), "small[1]"),
        (swap("threads = 8\nkernels", "threads = 0\nkernels"), "calibration.threads"),
        (swap("seconds = 12.5", "seconds = nan"), "calibration.seconds"),
        (swap("2026-11-21", " "), "calibration.date"),
        (swap("processor = \"cpu0\"", "processor = \"cpu9\""), "calibration.processor"),
        (swap("memory = \"dram0\"", "memory = \"vram0\""), "calibration.memory"),
        (swap("seconds = 12.5", "secs = 12.5"), "secs"),
        (swap("\"Q8_0\"", "\"Q9_9\""), "Q9_9"),
    ];
    for (text, words) in cases {
        let message = Machine::from_toml(&format!("{SMALL}{text}")).expect_err(words).to_string();
        assert!(message.contains(words), "{words}: {message}");
    }
    let disk = "disk = [{ depth = 1, block = 65536, gb_per_s = { median = 1.0, min = 1.0, max = 1.0, runs = 1 } }]";
    let message = Machine::from_toml(&format!("{SMALL}{}", CALIBRATION.replace("disk = []", disk))).unwrap_err().to_string();
    assert!(message.contains("calibration.disk_memory"), "{message}");
}
