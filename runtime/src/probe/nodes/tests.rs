//! Made-up machines as folder trees: one node, none, holes in the numbers, CXL, containers.

use super::*;

struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn file(&self, path: &str, content: &str) -> &Self {
        let path = self.0.path().join(path);
        std::fs::create_dir_all(path.parent().expect("inside the tree")).expect("made");
        std::fs::write(path, content).expect("written");
        self
    }

    /// A node with its usual files.
    fn node(&self, number: u32, cpus: &str, mib: u64, distance: &str) -> &Self {
        let own = format!("sys/devices/system/node/node{number}");
        let kib = mib * 1024;
        let line = |key: &str, value: u64| format!("Node {number} {key}:  {value} kB\n");
        let lines = [("MemTotal", kib), ("MemFree", kib / 2), ("Active(file)", kib / 8), ("Inactive(file)", kib / 8)];
        self.file(&format!("{own}/meminfo"), &lines.map(|(k, v)| line(k, v)).concat());
        self.file(&format!("{own}/cpulist"), &format!("{cpus}\n")).file(&format!("{own}/distance"), &format!("{distance}\n"))
    }

    fn rated(&self, number: u32, class: u32, mib_per_s: u64, ns: u64) -> &Self {
        let own = format!("sys/devices/system/node/node{number}/access{class}/initiators");
        self.file(&format!("{own}/read_bandwidth"), &mib_per_s.to_string()).file(&format!("{own}/read_latency"), &ns.to_string())
    }

    fn link(&self, from: &str, to: &str) {
        let from = self.0.path().join(from);
        std::fs::create_dir_all(from.parent().expect("inside the tree")).expect("made");
        std::os::unix::fs::symlink(self.0.path().join(to), from).expect("linked");
    }

    fn read(&self) -> Nodes {
        Nodes::read(self.0.path(), 4096)
    }
}

#[test]
fn one_node_is_local() {
    let tree = Tree::new();
    tree.node(0, "0-3,8", 1024, "10").file("proc/self/status", "Mems_allowed_list:\t0\n");
    let found = tree.read();
    let node = &found.nodes[0];
    assert_eq!((node.number, node.kind, node.cpus.as_slice()), (0, NodeKind::Local, &[0, 1, 2, 3, 8][..]));
    assert_eq!((node.total, node.free, node.page_cache), (Bytes::mib(1024), Bytes::mib(512), Bytes::mib(256)));
    assert_eq!(node.available(), Bytes::mib(768));
    assert!(found.notes.is_empty() && found.far().count() == 0 && node.allowed, "{found:?}");
    assert_eq!(node.distances, BTreeMap::from([(0, 10)]));
}

#[test]
fn no_nodes_are_one() {
    let tree = Tree::new();
    tree.file("proc/meminfo", "MemTotal:  2048 kB\nMemFree:  1024 kB\nInactive(file):  8 kB\n");
    let found = tree.read();
    assert_eq!(found.nodes.len(), 1);
    assert_eq!((found.nodes[0].total, found.nodes[0].available()), (Bytes(2048 << 10), Bytes(1032 << 10)));
    assert!(found.notes[0].contains("treated as node 0"), "{found:?}");
    assert!(Tree::new().read().nodes.len() == 1, "nothing at all is readable");
}

#[test]
fn numbers_may_have_holes() {
    let tree = Tree::new();
    tree.node(0, "0-1", 1024, "10 21 31").node(2, "2-3", 1024, "21 10 31").node(7, "", 4096, "31 31 10");
    tree.file("sys/devices/system/node/online", "0,2,7\n");
    let found = tree.read();
    assert_eq!(found.nodes.iter().map(|n| n.number).collect::<Vec<_>>(), [0, 2, 7]);
    assert_eq!(found.nodes[0].distances, BTreeMap::from([(0, 10), (2, 21), (7, 31)]), "columns are online nodes");
    assert_eq!(found.nodes[2].kind, NodeKind::Far);
    assert_eq!(found.far().map(|n| n.number).collect::<Vec<_>>(), [7]);
}

#[test]
fn cxl_is_told_by_its_region_and_rated_by_the_firmware() {
    let tree = Tree::new();
    tree.node(0, "0-1", 2048, "10 20").node(1, "", 4096, "20 10");
    tree.rated(0, 0, 250_000, 80).rated(1, 0, 1, 1).rated(1, 1, 30_000, 250);
    tree.file("sys/devices/virtual/memory_tiering/memory_tier4/nodelist", "0\n");
    tree.file("sys/devices/virtual/memory_tiering/memory_tier22/nodelist", "1\n");
    tree.file(
        "proc/zoneinfo",
        "Node 0, zone   Normal\n  pages free     10\n        managed  524288\nNode 1, zone  Movable\n  pages free     11\n        managed  1048576\n",
    );
    let real = "sys/devices/platform/ACPI0017:00/root0/decoder0.0/region0/dax_region0/dax0.0";
    tree.file(&format!("{real}/size"), "4294967296\n").file(&format!("{real}/target_node"), "1\n");
    tree.file("sys/bus/dax/drivers/kmem/bind", "");
    tree.link(&format!("{real}/driver"), "sys/bus/dax/drivers/kmem");
    tree.link("sys/bus/dax/devices/dax0.0", real);
    let devices = "sys/bus/cxl/devices";
    tree.file(&format!("{devices}/mem0/ram/size"), "0x100000000\n").file(&format!("{devices}/mem0/numa_node"), "0\n");
    tree.file(&format!("{devices}/mem0/pmem/size"), "0x0\n").file(&format!("{devices}/root0/uport"), "");
    tree.file(&format!("{devices}/region0/size"), "0x100000000\n").file(&format!("{devices}/region0/mode"), "ram\n");
    tree.file(&format!("{devices}/region0/interleave_ways"), "1\n").file(&format!("{devices}/region0/commit"), "1\n");
    let gpu = "sys/bus/pci/devices/0000:41:00.0";
    tree.file(&format!("{gpu}/class"), "0x030200\n").file(&format!("{gpu}/numa_node"), "0\n");
    tree.file(&format!("{gpu}/vendor"), "0x10de\n").file(&format!("{gpu}/device"), "0x26b9\n");
    let other = "sys/bus/pci/devices/0000:01:00.0";
    tree.file(&format!("{other}/class"), "0x010802\n").file(&format!("{other}/numa_node"), "-1\n");
    let found = tree.read();
    let far = &found.nodes[1];
    assert_eq!((far.kind, far.tier, found.nodes[0].tier), (NodeKind::Cxl, Some(22), Some(4)));
    let rated = far.rated.expect("the firmware says");
    assert_eq!(rated.read_bandwidth.map(|r| r.0), Some(30_000.0 * 1_048_576.0), "accesses by processors, not by any initiator");
    assert_eq!((rated.read_latency_ns, rated.write_bandwidth), (Some(250), None));
    assert_eq!((found.nodes[0].movable, far.movable), (Some(Bytes::ZERO), Some(Bytes::gib(4))));
    assert_eq!(found.cxl.len(), 1);
    assert_eq!((found.cxl[0].volatile, found.cxl[0].near_node), (Bytes::gib(4), Some(0)));
    assert!(found.regions[0].committed && found.regions[0].mode == "ram" && found.regions[0].ways == Some(1));
    assert_eq!((found.dax[0].driver.as_deref(), found.dax[0].target_node), (Some("kmem"), Some(1)));
    assert_eq!(found.gpus.len(), 1, "a disk is no GPU: {:?}", found.gpus);
    assert_eq!((found.gpus[0].id.as_str(), found.gpus[0].node), ("10de:26b9", Some(0)));
}

#[test]
fn persistent_memory_is_cxl_only_behind_a_cxl_bridge() {
    for (real, kind) in [
        ("sys/devices/LNXSYSTM:00/ACPI0012:00/ndbus0/region0/dax0.0", NodeKind::Far),
        ("sys/devices/platform/ACPI0017:00/root0/nvdimm-bridge0/ndbus0/region0/dax0.0", NodeKind::Cxl),
    ] {
        let tree = Tree::new();
        tree.node(0, "0", 64, "10 20").node(1, "", 64, "20 10").file(&format!("{real}/target_node"), "1\n");
        tree.link("sys/bus/dax/devices/dax0.0", real);
        assert_eq!(tree.read().nodes[1].kind, kind, "{real}");
    }
}

#[test]
fn fast_memory_without_processors_is_not_far() {
    let tree = Tree::new();
    tree.node(0, "0-1", 2048, "10 13").node(1, "", 1024, "13 10").rated(0, 0, 250_000, 80).rated(1, 0, 900_000, 110);
    assert_eq!(tree.read().nodes[1].kind, NodeKind::Fast);
    assert_eq!(tree.read().far().count(), 0);
}

#[test]
fn containers_may_hide_nodes_and_forbid_them() {
    let tree = Tree::new();
    tree.node(0, "0-1", 1024, "10 20 20").node(1, "", 1024, "20 10 20");
    // The folder is there, its files are not.
    std::fs::create_dir_all(tree.0.path().join("sys/devices/system/node/node2")).expect("made");
    tree.file("proc/self/status", "Name:\tx\nMems_allowed_list:\t0,2\n");
    tree.file("proc/self/cgroup", "0::/box\n").file("sys/fs/cgroup/box/memory.max", "1048576\n");
    tree.file("sys/fs/cgroup/box/memory.current", "48576\n");
    let found = tree.read();
    assert_eq!(found.nodes.iter().map(|n| (n.number, n.allowed)).collect::<Vec<_>>(), [(0, true), (1, false)]);
    assert_eq!(found.usable().count(), 1);
    assert_eq!(found.memory_limit, Some((Bytes(1 << 20), Bytes(1_000_000))));
    assert!(found.notes.iter().any(|n| n.contains("node 2 cannot be read")), "{:?}", found.notes);
    assert!(found.notes.iter().any(|n| n.contains("node 1 is not allowed")), "{:?}", found.notes);

    // Without the kernel's word that of the control group, either version.
    let tree = Tree::new();
    tree.node(0, "0", 64, "10 20").node(1, "1", 64, "20 10").file("proc/self/cgroup", "0::/a\n");
    tree.file("sys/fs/cgroup/a/cpuset.mems.effective", "1\n");
    assert_eq!(tree.read().usable().map(|n| n.number).collect::<Vec<_>>(), [1]);
    let tree = Tree::new();
    tree.node(0, "0", 64, "10 20").node(1, "1", 64, "20 10").file("proc/self/cgroup", "3:cpuset:/b\n0::/\n");
    tree.file("sys/fs/cgroup/cpuset/b/cpuset.effective_mems", "0\n");
    assert_eq!(tree.read().usable().map(|n| n.number).collect::<Vec<_>>(), [0]);
}

#[test]
fn nodes_without_memory_or_processors_of_their_own() {
    let tree = Tree::new();
    tree.node(0, "0", 0, "10 20").node(1, "", 512, "20 10").node(2, "", 512, "20 10");
    let kinds: Vec<NodeKind> = tree.read().nodes.iter().map(|n| n.kind).collect();
    assert_eq!(kinds, [NodeKind::NoMemory, NodeKind::Far, NodeKind::Far]);
    // Processors nowhere to be seen: memory is not far from anything.
    let tree = Tree::new();
    tree.node(1, "", 512, "10");
    assert_eq!(tree.read().nodes[0].kind, NodeKind::Local);
}

#[test]
fn lists_are_parsed_or_refused() {
    assert_eq!(parse_list("0-2,5\n"), Some(vec![0, 1, 2, 5]));
    assert_eq!((parse_list(""), parse_list("3")), (Some(vec![]), Some(vec![3])));
    for bad in ["x", "3-1", "0-4294967295", "1-", "-1"] {
        assert_eq!(parse_list(bad), None, "{bad}");
    }
    assert_eq!((number("0x10"), number("12"), number("-1"), number("0xg")), (Some(16), Some(12), None, None));
}

#[test]
fn this_machine_has_a_usable_node() {
    let found = Nodes::of_this_machine();
    assert!(!cfg!(target_os = "linux") || found.usable().count() > 0, "{found:?}");
}
