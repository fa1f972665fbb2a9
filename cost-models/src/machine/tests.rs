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
