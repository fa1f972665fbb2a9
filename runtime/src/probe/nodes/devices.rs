//! What is behind memory nodes: CXL devices and regions, DAX devices, and the node that a GPU hangs on.
//!
//! Attribute names are those of the kernel's `Documentation/ABI/testing/sysfs-bus-cxl`, `sysfs-bus-dax` and `sysfs-bus-pci`.

use super::{number, numbered, text};
use serde::Serialize;
use std::path::Path;
use tierwise_cost::units::Bytes;

/// A CXL memory device (`memN`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CxlDevice {
    /// `mem0`.
    pub name: String,
    /// Volatile capacity.
    pub volatile: Bytes,
    /// Persistent capacity.
    pub persistent: Bytes,
    /// The node of the processors that it hangs on.
    pub near_node: Option<u32>,
}

/// A range of CXL memory over one or several devices (`regionN`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CxlRegion {
    /// `region0`.
    pub name: String,
    /// Its bytes.
    pub size: Bytes,
    /// `ram` or `pmem`.
    pub mode: String,
    /// Devices it is striped over.
    pub ways: Option<u32>,
    /// Whether it is switched on.
    pub committed: bool,
}

/// Memory that is a file, or that a driver has made a node (`daxN.M`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DaxDevice {
    /// `dax0.0`.
    pub name: String,
    /// Its bytes.
    pub size: Bytes,
    /// The node that it is, or would be.
    pub target_node: Option<u32>,
    /// `kmem`: it is ordinary memory; `device_dax`: it is a file.
    pub driver: Option<String>,
    /// It belongs to a CXL region.
    pub behind_cxl: bool,
}

/// A graphics processor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PciGpu {
    /// `0000:41:00.0`.
    pub address: String,
    /// Vendor and device id, `10de:26b9`.
    pub id: String,
    /// The node it hangs on; absent where the firmware does not say.
    pub node: Option<u32>,
}

/// A node's number from a file; `-1` is none.
fn node(folder: &Path, file: &str) -> Option<u32> {
    text(folder, file)?.parse().ok()
}

/// CXL memory devices and regions.
pub(super) fn cxl(root: &Path) -> (Vec<CxlDevice>, Vec<CxlRegion>) {
    let folder = root.join("sys/bus/cxl/devices");
    let bytes = |own: &Path, file: &str| Bytes(text(own, file).and_then(|t| number(&t)).unwrap_or(0));
    let device = |n: u32| {
        let own = folder.join(format!("mem{n}"));
        CxlDevice {
            name: format!("mem{n}"),
            volatile: bytes(&own, "ram/size"),
            persistent: bytes(&own, "pmem/size"),
            near_node: node(&own, "numa_node"),
        }
    };
    let region = |n: u32| {
        let own = folder.join(format!("region{n}"));
        CxlRegion {
            name: format!("region{n}"),
            size: bytes(&own, "size"),
            mode: text(&own, "mode").unwrap_or_else(|| "unknown".into()),
            ways: text(&own, "interleave_ways").and_then(|t| t.parse().ok()),
            committed: text(&own, "commit").as_deref() == Some("1"),
        }
    };
    let list = |prefix: &str| numbered(&folder, prefix).unwrap_or_default();
    (list("mem").into_iter().map(device).collect(), list("region").into_iter().map(region).collect())
}

/// DAX devices.
pub(super) fn dax(root: &Path) -> Vec<DaxDevice> {
    let folder = root.join("sys/bus/dax/devices");
    let Ok(entries) = std::fs::read_dir(&folder) else { return Vec::new() };
    let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|n| n.starts_with("dax") && !n.starts_with("dax_"));
    names.sort();
    let device = |name: String| {
        let own = folder.join(&name);
        // The entry is a link into the device tree: below the CXL root (`ACPI0017`), a decoder, or the bridge that makes persistent CXL
        // memory an NVDIMM. An NVDIMM of another kind has regions, too.
        let place = own.canonicalize().unwrap_or_else(|_| own.clone());
        const CXL: [&str; 3] = ["ACPI0017", "decoder", "nvdimm-bridge"];
        let behind_cxl = place.iter().any(|part| CXL.iter().any(|c| part.to_string_lossy().starts_with(c)));
        DaxDevice {
            size: Bytes(text(&own, "size").and_then(|t| number(&t)).unwrap_or(0)),
            target_node: node(&own, "target_node"),
            driver: std::fs::read_link(own.join("driver"))
                .ok()
                .and_then(|d| d.file_name().map(|n| n.to_string_lossy().into_owned())),
            behind_cxl,
            name,
        }
    };
    names.into_iter().map(device).collect()
}

/// Display controllers and 3D accelerators with their nodes.
pub(super) fn gpus(root: &Path) -> Vec<PciGpu> {
    let folder = root.join("sys/bus/pci/devices");
    let Ok(entries) = std::fs::read_dir(&folder) else { return Vec::new() };
    let mut addresses: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    addresses.sort();
    let gpu = |address: String| {
        let own = folder.join(&address);
        // PCI class 03: display controllers; 02 in the second byte: without a display (3D controller).
        let is_gpu = text(&own, "class").is_some_and(|c| c.starts_with("0x03"));
        let id = |file: &str| text(&own, file).unwrap_or_default().trim_start_matches("0x").to_string();
        is_gpu.then(|| PciGpu { id: format!("{}:{}", id("vendor"), id("device")), node: node(&own, "numa_node"), address })
    };
    addresses.into_iter().filter_map(gpu).collect()
}
