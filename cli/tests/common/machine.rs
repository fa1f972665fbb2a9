//! A machine with main memory and a disk, of the sizes that a test wants.

use std::path::Path;

/// Writes the description as `machine.toml` in `folder` and gives its path. `ram` and `disk` are capacities, `ram_rate` is what the
/// processor reads from main memory.
pub fn with_disk(folder: &Path, ram: &str, ram_rate: &str, disk: &str) -> String {
    let text = format!(
        r#"
name = "test"
[[memory]]
id = "dram0"
kind = "dram"
capacity = {{ value = "{ram}", source = "prior" }}
read_bandwidth = {{ value = "{ram_rate}", source = "prior" }}
latency = {{ value = "100 ns", source = "prior" }}
[[memory]]
id = "disk0"
kind = "disk"
capacity = {{ value = "{disk}", source = "prior" }}
read_bandwidth = {{ value = "3 GB/s", source = "prior" }}
latency = {{ value = "80 us", source = "prior" }}
[[processor]]
id = "cpu0"
kind = "cpu"
name = "test"
cores = 2
threads = 2
computes_from = ["dram0"]
f32_flops = {{ value = "100 GFLOP/s", source = "prior" }}
launch_latency = {{ value = "5 us", source = "prior" }}
[[link]]
from = "disk0"
to = "dram0"
bandwidth = {{ value = "3 GB/s", source = "prior" }}
latency = {{ value = "80 us", source = "prior" }}
"#
    );
    let path = folder.join("machine.toml");
    std::fs::write(&path, text).expect("written");
    path.display().to_string()
}
