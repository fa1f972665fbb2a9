#!/usr/bin/env python3
"""Writes configs/machines/*.toml from a table of combinations and published hardware figures.

    python3 tools/configs/make_machines.py [HARDWARE_JSON]     # default ../shared/data/hardware/hardware.json beside the repository

HARDWARE_JSON holds datasheet figures of GPUs and SoCs (Hugging Face's and llmfit's tables, MIT), data-centre systems
(aiconfigurator, Apache-2.0), and hosts that their owners measured (experts4bit-qlora, MIT). What is combined with what, and what
none of the tables says (multiprocessors, clocks of a CPU class, corrections of weak entries), is written below; every number of a
file says which of them it is. One file per machine, named like the machine; files of machines that are not in the table are left
alone. Needs no packages.
"""
import json
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "configs" / "machines"

HF = "Hugging Face hardware table (MIT)"
LLMFIT = "llmfit name table (MIT)"
AIC = "aiconfigurator systems (Apache-2.0)"
HOSTS = "experts4bit-qlora calibration files (MIT)"
BUILT = "as configured: the size this description stands for"


def datasheet(value, note):
    return (value, "datasheet", note)


def prior(value, note):
    return (value, "prior", note)


def measured(value, note):
    return (value, "measured", note)


def number(x):
    """A decimal without a tail: 936.0 -> 936, 71.68 -> 71.68."""
    return f"{x:.4f}".rstrip("0").rstrip(".")


# ---- CPUs: name, cores, threads, instruction sets, float32 rate with its arithmetic (clock and width of the class are recalled).
AVX2 = ["avx2", "fma", "f16c"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"]
AMX = [*AVX512, "amx_int8", "amx_bf16"]
NEON = ["neon", "dotprod", "i8mm"]
CPUS = {
    "zen3-8": ("8-core Zen 3 class", 8, 16, AVX2, "970 GFLOP/s", "8 cores x 3.8 GHz x 32 operations"),
    "zen3-12": ("12-core Zen 3 class", 12, 24, AVX2, "1.4 TFLOP/s", "12 cores x 3.7 GHz x 32 operations"),
    "zen3-6": ("6-core Zen 3 class", 6, 12, AVX2, "710 GFLOP/s", "6 cores x 3.7 GHz x 32 operations"),
    "laptop-8": ("8-core laptop class", 8, 16, AVX2, "770 GFLOP/s", "8 cores x 3.0 GHz x 32 operations"),
    "raptor-14": ("14-core Raptor Lake class (6 + 8)", 14, 20, AVX2, "1.4 TFLOP/s", "6 cores x 4.6 GHz x 32 operations + 8 x 3.4 x 16"),
    "zen4m-8": ("8-core Zen 4 mobile class", 8, 16, AVX512, "1 TFLOP/s", "8 cores x 4.0 GHz x 32 operations"),
    "zen4-6": ("6-core Zen 4 class", 6, 12, AVX512, "900 GFLOP/s", "6 cores x 4.7 GHz x 32 operations"),
    "zen4-8": ("8-core Zen 4 class", 8, 16, AVX512, "1.2 TFLOP/s", "8 cores x 4.7 GHz x 32 operations"),
    "zen4-16": ("16-core Zen 4 class", 16, 32, AVX512, "2.3 TFLOP/s", "16 cores x 4.5 GHz x 32 operations"),
    "zen5-8": ("8-core Zen 5 class", 8, 16, AVX512, "2.4 TFLOP/s", "8 cores x 4.7 GHz x 64 operations"),
    "zen5-16": ("16-core Zen 5 class", 16, 32, AVX512, "4.6 TFLOP/s", "16 cores x 4.5 GHz x 64 operations"),
    "tr-zen3-32": ("32-core Threadripper PRO 5000 class", 32, 64, AVX2, "3.7 TFLOP/s", "32 cores x 3.6 GHz x 32 operations"),
    "tr-zen4-32": ("32-core Threadripper PRO 7000 class", 32, 64, AVX512, "4.1 TFLOP/s", "32 cores x 4.0 GHz x 32 operations"),
    "tr-zen5-64": ("64-core Threadripper PRO 9000 class", 64, 128, AVX512, "15.6 TFLOP/s", "64 cores x 3.8 GHz x 64 operations"),
    "milan-32": ("32-core EPYC 7003 class", 32, 64, AVX2, "3.3 TFLOP/s", "32 cores x 3.2 GHz x 32 operations"),
    "milan-64": ("64-core EPYC 7003 class", 64, 128, AVX2, "5.7 TFLOP/s", "64 cores x 2.8 GHz x 32 operations"),
    "genoa-48": ("48-core EPYC 9004 class", 48, 96, AVX512, "5.5 TFLOP/s", "48 cores x 3.6 GHz x 32 operations"),
    "genoa-96": ("96-core EPYC 9004 class", 96, 192, AVX512, "9.2 TFLOP/s", "96 cores x 3.0 GHz x 32 operations"),
    "turin-96": ("96-core EPYC 9005 class", 96, 192, AVX512, "19 TFLOP/s", "96 cores x 3.1 GHz x 64 operations"),
    "skylake-24": ("24-core Cascade Lake class", 24, 48, [*AVX2, "avx512f", "avx512bw", "avx512_vnni"], "3.8 TFLOP/s",
                   "24 cores x 2.5 GHz x 64 operations"),
    "spr-32": ("32-core Sapphire Rapids class", 32, 64, AMX, "6 TFLOP/s", "32 cores x 3.0 GHz x 64 operations"),
    "spr-56": ("56-core Sapphire Rapids class", 56, 112, AMX, "9 TFLOP/s", "56 cores x 2.5 GHz x 64 operations"),
    "gnr-96": ("96-core Granite Rapids class", 96, 192, AMX, "16.6 TFLOP/s", "96 cores x 2.7 GHz x 64 operations"),
    "m1-max": ("Apple M1 Max, 8 + 2 cores", 10, 10, ["neon", "dotprod"], "820 GFLOP/s", "8 cores x 3.2 GHz x 32 operations"),
    "m2-ultra": ("Apple M2 Ultra, 16 + 8 cores", 24, 24, NEON, "1.8 TFLOP/s", "16 cores x 3.5 GHz x 32 operations"),
    "m3-max": ("Apple M3 Max, 12 + 4 cores", 16, 16, NEON, "1.5 TFLOP/s", "12 cores x 4.0 GHz x 32 operations"),
    "m3-ultra": ("Apple M3 Ultra, 24 + 8 cores", 32, 32, NEON, "3.1 TFLOP/s", "24 cores x 4.0 GHz x 32 operations"),
    "m4-pro": ("Apple M4 Pro, 10 + 4 cores", 14, 14, NEON, "1.4 TFLOP/s", "10 cores x 4.4 GHz x 32 operations"),
    "m4-max": ("Apple M4 Max, 12 + 4 cores", 16, 16, NEON, "1.6 TFLOP/s", "12 cores x 4.4 GHz x 32 operations"),
    "strix-16": ("16-core Zen 5 (Ryzen AI Max+ 395)", 16, 32, AVX512, "4.1 TFLOP/s", "16 cores x 4.0 GHz x 64 operations"),
    "gb10-20": ("Arm, 10 + 10 cores (GB10)", 20, 20, [*NEON, "sve2"], "1.9 TFLOP/s", "10 cores x 3.8 GHz x 32 operations + 10 x 2.8 x 24"),
}

# ---- GPUs: product name, row of the GPU table, capacity, multiprocessors, instruction sets; `bandwidth` corrects or completes the
# table, `f32_share` is float32 over the table's float16 rate (AMD counts packed pairs).
GDDR = "datasheet arithmetic: {} Gb/s x {} bit; "
GPUS = {
    "rtx2080ti": dict(name="NVIDIA GeForce RTX 2080 Ti", row="RTX 2080 Ti", gib=11, sms=68, isa="sm_75", f32_share=0.5),
    "rtx3060": dict(name="NVIDIA GeForce RTX 3060", row="RTX 3060", gib=12, sms=28, isa="sm_86"),
    "rtx3070": dict(name="NVIDIA GeForce RTX 3070", row="RTX 3070", gib=8, sms=46, isa="sm_86"),
    "rtx3080": dict(name="NVIDIA GeForce RTX 3080", row="RTX 3080", gib=10, sms=68, isa="sm_86"),
    "rtx3090": dict(name="NVIDIA GeForce RTX 3090", row="RTX 3090", gib=24, sms=82, isa="sm_86"),
    "rtx4060": dict(name="NVIDIA GeForce RTX 4060", row="RTX 4060", gib=8, sms=24, isa="sm_89"),
    "rtx4060-laptop": dict(name="NVIDIA GeForce RTX 4060 Laptop", row="RTX 4060 Laptop", gib=8, sms=24, isa="sm_89",
                           bandwidth=(256, "16 Gb/s x 128 bit, the laptop card; the desktop card has 272 GB/s")),
    "rtx4060ti": dict(name="NVIDIA GeForce RTX 4060 Ti", row="RTX 4060 Ti", gib=16, sms=34, isa="sm_89"),
    "rtx4070": dict(name="NVIDIA GeForce RTX 4070", row="RTX 4070", gib=12, sms=46, isa="sm_89"),
    "rtx4070tis": dict(name="NVIDIA GeForce RTX 4070 Ti SUPER", row="RTX 4070 Ti Super", gib=16, sms=66, isa="sm_89"),
    "rtx4080": dict(name="NVIDIA GeForce RTX 4080", row="RTX 4080", gib=16, sms=76, isa="sm_89"),
    "rtx4090": dict(name="NVIDIA GeForce RTX 4090", row="RTX 4090", gib=24, sms=128, isa="sm_89"),
    "rtx5060": dict(name="NVIDIA GeForce RTX 5060", row="RTX 5060", gib=8, sms=30, isa="sm_120",
                    bandwidth=(448, GDDR.format(28, 128) + "the llmfit table's 256 GB/s is wrong")),
    "rtx5060ti": dict(name="NVIDIA GeForce RTX 5060 Ti", row="RTX 5060 Ti", gib=16, sms=36, isa="sm_120"),
    "rtx5070": dict(name="NVIDIA GeForce RTX 5070", row="RTX 5070", gib=12, sms=48, isa="sm_120"),
    "rtx5070ti": dict(name="NVIDIA GeForce RTX 5070 Ti", row="RTX 5070 Ti", gib=16, sms=70, isa="sm_120"),
    "rtx5080": dict(name="NVIDIA GeForce RTX 5080", row="RTX 5080", gib=16, sms=84, isa="sm_120"),
    "rtx5090": dict(name="NVIDIA GeForce RTX 5090", row="RTX 5090", gib=32, sms=170, isa="sm_120"),
    "a2000": dict(name="NVIDIA RTX A2000", row="RTX A2000", gib=12, sms=26, isa="sm_86",
                  bandwidth=(288, GDDR.format(12, 192) + "not in the llmfit table")),
    "a6000": dict(name="NVIDIA RTX A6000", row="RTX A6000", gib=48, sms=84, isa="sm_86"),
    "rtx6000ada": dict(name="NVIDIA RTX 6000 Ada", row="RTX 6000 Ada", gib=48, sms=142, isa="sm_89",
                       bandwidth=(960, GDDR.format(20, 384) + "not in the llmfit table")),
    "rx7800xt": dict(name="AMD Radeon RX 7800 XT", row="RX 7800 XT", gib=16, sms=60, isa="gfx1101", f32_share=0.5),
    "rx7900xtx": dict(name="AMD Radeon RX 7900 XTX", row="RX 7900 XTX", gib=24, sms=96, isa="gfx1100", f32_share=0.5),
    "rx9070": dict(name="AMD Radeon RX 9070", row="RX 9070", gib=16, sms=56, isa="gfx1201", f32_share=0.5,
                   bandwidth=(640, GDDR.format(20, 256) + "the llmfit table's 488 GB/s is wrong")),
    "rx9070xt": dict(name="AMD Radeon RX 9070 XT", row="RX 9070 XT", gib=16, sms=64, isa="gfx1201", f32_share=0.5,
                     bandwidth=(640, GDDR.format(20, 256) + "the llmfit table has 624 GB/s")),
    "m1-max": dict(name="Apple M1 Max, 32 cores", row="Apple M1 Max", sms=32, isa="metal3"),
    "m2-ultra": dict(name="Apple M2 Ultra, 76 cores", row="Apple M2 Ultra", sms=76, isa="metal3"),
    "m3-max": dict(name="Apple M3 Max, 40 cores", row="Apple M3 Max", sms=40, isa="metal3"),
    "m3-ultra": dict(name="Apple M3 Ultra, 80 cores", row="Apple M3 Ultra", sms=80, isa="metal3"),
    "m4-pro": dict(name="Apple M4 Pro, 20 cores", row="Apple M4 Pro", sms=20, isa="metal3"),
    "m4-max": dict(name="Apple M4 Max, 40 cores", row="Apple M4 Max", sms=40, isa="metal3"),
    "strix-halo": dict(name="AMD Radeon 8060S, 40 units (Ryzen AI Max+ 395)", row="Ryzen AI Max+ 395", sms=40, isa="gfx1151"),
    "gb10": dict(name="NVIDIA GB10", row="GB10", sms=48, isa="sm_121",
                 bandwidth=(273, "datasheet arithmetic: LPDDR5X-8533 x 256 bit; not in the llmfit table")),
    # Data-centre parts: `system` is a row of the systems table; float32 rates are of the vendor's data sheet.
    "rtxpro6000": dict(name="NVIDIA RTX PRO 6000 Blackwell", system="rtx_pro_6000_server", sms=188, isa="sm_120",
                       f32=(126, HF + ": without tensor cores")),
    "l4": dict(name="NVIDIA L4", system="l4", sms=58, isa="sm_89", f32=(30.3, HF + ": without tensor cores")),
    "l40s": dict(name="NVIDIA L40S", system="l40s", sms=142, isa="sm_89", f32=(91.6, HF + ": without tensor cores")),
    "a100": dict(name="NVIDIA A100 SXM 80 GB", system="a100_sxm", sms=108, isa="sm_80", f32=(19.5, "NVIDIA's A100 data sheet")),
    "h100": dict(name="NVIDIA H100 SXM 80 GB", system="h100_sxm", sms=132, isa="sm_90", f32=(67, "NVIDIA's H100 data sheet, SXM")),
    "h200": dict(name="NVIDIA H200 SXM 141 GB", system="h200_sxm", sms=132, isa="sm_90", f32=(67, "NVIDIA's H200 data sheet")),
    "b200": dict(name="NVIDIA B200 SXM 180 GB", system="b200_sxm", sms=148, isa="sm_100", f32=(75, "NVIDIA's HGX B200 data sheet")),
    "b60": dict(name="Intel Arc Pro B60", system="b60", sms=20, isa="xe2", f32=(12.3, "Intel's Arc Pro B60 data sheet")),
    "mi300x": dict(name="AMD Instinct MI300X", row="MI300", gib=192, sms=304, isa="gfx942",
                   f16=(1307, "AMD's MI300X data sheet, dense matrix cores; the Hugging Face table's 383 is without them"),
                   f32=(163.4, "AMD's MI300X data sheet")),
}

# ---- Paths from host memory into a GPU: rate from pinned memory with its reason, rate from pageable memory.
STAGED = "staged through a pinned buffer by the driver"
PCIE = {
    "3x16": (prior("12.8 GB/s", "half of gen4 x16"), "6 GB/s"),
    "4x16": (prior("25.6 GB/s", "measured hosts: 23.2 to 28.5 GB/s pinned at gen4 x16"), "10 GB/s"),
    "4x8": (prior("12.8 GB/s", "half of gen4 x16"), "7 GB/s"),
    "5x16": (prior("55 GB/s", "PCIe 5.0 x16: 56.7 GB/s measured on other hosts of the table, 64 GB/s datasheet"), "14 GB/s"),
    "5x8": (prior("27 GB/s", "half of gen5 x16"), "10 GB/s"),
    "5x16-5090": (measured("46.3 GB/s", "another host: RTX 5090 in a Threadripper PRO 7975WX, pinned 64 MB copies (experts4bit-qlora calib.json, MIT)"), "14 GB/s"),
}
COPY = prior("10 us", "one asynchronous copy")
CROSS_SOCKET = {  # by PCIe generation
    "4": prior("20 GB/s", "a copy that crosses the sockets' link, about 0.8 of the near one"),
    "5": prior("40 GB/s", "a copy that crosses the sockets' link, about 0.7 of the near one"),
}

# ---- Disks: rate of the class.
NVME4 = datasheet("7 GB/s", "NVMe PCIe 4.0 x4 class figure, sequential read")
NVME5 = datasheet("10 GB/s", "NVMe PCIe 5.0 x4 class figure, sequential read")
NVME3 = datasheet("3.5 GB/s", "NVMe PCIe 3.0 x4 class figure, sequential read")
APPLE_SSD = prior("7.4 GB/s", "internal SSD of this class; an M3 Max 1 TB measured 17.5 GB/s in another source")
UNMEASURED_SSD = prior("7 GB/s", "NVMe PCIe 4.0 x4 class figure; this host's disk was not measured")
DISK_LATENCY = prior("80 us", "random read of a TLC NVMe drive")
DRAM_LATENCY = prior("81 ns", "Ice Lake server, Intel MLC: 80.8 ns local")
REMOTE_LATENCY = prior("140 ns", "Ice Lake server, Intel MLC: 140.4 ns remote")
SHARED_LATENCY = prior("100 ns", "shared memory of this class")
VRAM_LATENCY = prior("500 ns", "pointer-chase class figure of a recent GPU")
FORK_JOIN = prior("2 us", "fork and join of a spinning thread pool")
GRAPH_LAUNCH = prior("2 us", "kernel launch inside a captured graph")
METAL_LAUNCH = prior("5 us", "one compute encoder")
UPI = prior("62 GB/s", "three UPI links at about 0.65 of their raw rate")
XGMI2 = prior("100 GB/s", "four xGMI2 links of 36 GB/s at about 0.7 of their raw rate")
XGMI3 = prior("125 GB/s", "three xGMI3 links of 64 GB/s at about 0.65 of their raw rate")
CXL_NOTE = "2 x 17.8 GB/s all-read per CXL 2.0 x8 expander (CacheLib OCP demo)"


class Tables:
    """The published figures."""

    def __init__(self, path):
        data = json.loads(path.read_text())
        self.gpus = {g["name"]: g for g in data["gpus"]["list"]}
        self.systems = data["datacenter_systems"]["systems"]
        self.dram = {d["name"]: d["theoretical_gbs"] for d in data["dram_theoretical"]["list"]}
        self.hosts = data["measured_hosts"]["hosts"]

    def dram_rate(self, name):
        """`DDR5-6000 2ch` -> its rate, checked against the table where that has it."""
        kind, channels = name.split()
        rate = int(kind.split("-")[1]) * 8 * int(channels[:-2]) / 1000
        if name in self.dram and abs(self.dram[name] - rate) > 0.1:
            raise SystemExit(f"{name}: {rate} by arithmetic, {self.dram[name]} in the table")
        return rate

    def gpu(self, key):
        """Capacity, bandwidth and arithmetic rates of a GPU, each with source and note."""
        g = GPUS[key]
        out = {"name": g["name"], "sms": g["sms"], "isa": [g["isa"]]}
        if "system" in g:
            s = self.systems[g["system"]]
            capacity = s["mem_capacity"]
            out["capacity"] = datasheet(f"{capacity / 2**30:g} GiB" if capacity % 2**30 == 0 else f"{capacity:.0f} B", AIC)
            out["bandwidth"] = datasheet(f"{number(s['mem_bw'] / 1e9)} GB/s", AIC)
            out["f32"] = datasheet(f"{number(g['f32'][0])} TFLOP/s", g["f32"][1])
            out["f16"] = datasheet(f"{number(round(s['bfloat16_tc_flops'] / 1e12, 2))} TFLOP/s", AIC + ", dense tensor cores")
            out["int8"] = datasheet(f"{number(round(s['int8_tc_flops'] / 1e12, 2))} TFLOP/s", AIC)
            return out
        row = self.gpus[g["row"]]
        if "gib" in g:
            if g["gib"] not in row["memory_gb"]:
                raise SystemExit(f"{key}: {g['gib']} GB is not one of {row['memory_gb']}")
            out["capacity"] = datasheet(f"{g['gib']} GiB", HF)
        gbs, note = g.get("bandwidth", (row["mem_bandwidth_gbs"], LLMFIT))
        if gbs is None:
            raise SystemExit(f"{key}: no bandwidth in the table; give one with its reason")
        out["bandwidth"] = datasheet(f"{number(gbs)} GB/s", note)
        if "f16" in g:
            out["f16"] = datasheet(f"{number(g['f16'][0])} TFLOP/s", g["f16"][1])
            out["f32"] = datasheet(f"{number(g['f32'][0])} TFLOP/s", g["f32"][1])
            return out
        half, share = row["fp16_tflops"], g.get("f32_share", 1)
        why = "same as the float16 figure: no tensor cores" if share == 1 else "half the float16 figure: pairs are packed"
        out["f32"] = datasheet(f"{number(half * share)} TFLOP/s", why)
        out["f16"] = datasheet(f"{number(half)} TFLOP/s", HF + ", without tensor cores")
        return out


class File:
    """A machine file while it is written; the layout is that of `Machine::to_toml`."""

    def __init__(self, name, note):
        self.name = name
        self.lines = [f"name = {quote(name)}", f"note = {quote(note)}"]

    def table(self, title, **fields):
        self.lines += ["", f"[[{title}]]"]
        for key, value in fields.items():
            if value is None:
                continue
            if isinstance(value, tuple):
                text, source, why = value
                value = f'{{ value = {quote(text)}, source = {quote(source)}, note = {quote(why)} }}'
            elif isinstance(value, list):
                value = "[" + ", ".join(quote(v) for v in value) + "]"
            elif isinstance(value, str):
                value = quote(value)
            self.lines.append(f"{key} = {value}")

    def memory(self, id, kind, capacity, bandwidth, latency):
        self.table("memory", id=id, kind=kind, capacity=capacity, read_bandwidth=bandwidth, latency=latency)

    def cpu(self, id, cpu, homes):
        name, cores, threads, isa, rate, why = cpu
        self.table("processor", id=id, kind="cpu", name=name, cores=cores, threads=threads, isa=isa, computes_from=homes,
                   f32_flops=prior(rate, why), launch_latency=FORK_JOIN)

    def gpu(self, id, gpu, home, launch=GRAPH_LAUNCH):
        self.table("processor", id=id, kind="gpu", name=gpu["name"], cores=gpu["sms"], threads=gpu["sms"], isa=gpu["isa"],
                   computes_from=[home], f32_flops=gpu["f32"], f16_flops=gpu["f16"], int8_ops=gpu.get("int8"), launch_latency=launch)

    def link(self, start, end, bandwidth, latency, pageable=None):
        self.table("link", **{"from": start, "to": end}, bandwidth=bandwidth,
                   pageable_bandwidth=prior(pageable, STAGED) if pageable else None, latency=latency)

    def write(self):
        path = OUT / f"{self.name}.toml"
        part = path.with_suffix(".part")
        part.write_text("\n".join(self.lines) + "\n")
        part.replace(path)


def quote(text):
    if '"' in text or "\\" in text:
        raise SystemExit(f"{text!r}: needs escaping")
    return f'"{text}"'


# ---- Combinations

def host(name, note, cpu, dram, size, *, sockets=1, gpu=None, gpus=1, pcie="4x16", disk=NVME4, disk_size="2 TB", cxl=None,
         dram_note=None, gpu_link=None, socket_link=UPI):
    """A machine whose GPUs, if any, have memory of their own. `size` is per socket; GPUs are spread over the sockets."""
    return dict(locals(), build=build_host)


def unified(name, note, soc, cpu, size, *, disk=APPLE_SSD, disk_size="1 TB", launch=METAL_LAUNCH):
    """CPU and GPU that compute from one memory."""
    return dict(locals(), build=build_unified)


def build_host(t, m):
    f = File(m["name"], m["note"])
    gpu = t.gpu(m["gpu"]) if m["gpu"] else None
    count = m["gpus"] if gpu else 0
    sockets = range(m["sockets"])
    socket_of = lambda i: i * m["sockets"] // count
    for i in range(count):
        f.memory(f"vram{i}", "vram", gpu["capacity"], gpu["bandwidth"], VRAM_LATENCY)
    kind, channels = m["dram"].split()
    why = f"{kind} x {channels[:-2]} channels x 8 bytes"
    if m["dram_note"]:
        why = m["dram_note"].format(why)
    rate = datasheet(f"{number(t.dram_rate(m['dram']))} GB/s", why)
    for s in sockets:
        f.memory(f"dram{s}", "dram", datasheet(m["size"], BUILT), rate, DRAM_LATENCY)
    if m["cxl"]:
        size, count_cxl = m["cxl"]
        gbs = f"{number(17.8 * count_cxl)} GB/s"
        far = measured("250 ns", "another host: the same expander")
        each = CXL_NOTE if count_cxl == 2 else CXL_NOTE.replace("2 x", f"{count_cxl} x")
        f.memory("cxl0", "cxl", datasheet(size, f"{count_cxl} expanders of 96 GB, interleaved"),
                 measured(gbs, "another host: " + each), far)
    f.memory("disk0", "disk", datasheet(m["disk_size"], BUILT), m["disk"], DISK_LATENCY)
    for s in sockets:
        homes = [f"dram{s}"] + [f"dram{o}" for o in sockets if o != s]
        if m["cxl"] and s == 0:
            homes.append("cxl0")
        f.cpu(f"cpu{s}", CPUS[m["cpu"]], homes)
    for i in range(count):
        f.gpu(f"gpu{i}", gpu, f"vram{i}")
    for i in range(count):
        pinned, pageable = PCIE[m["pcie"]]
        near = socket_of(i)
        f.link(f"dram{near}", f"vram{i}", pinned, COPY, pageable)
        for o in sockets:
            if o != near:
                f.link(f"dram{o}", f"vram{i}", CROSS_SOCKET[m["pcie"][0]], COPY)
        if m["cxl"]:
            slower = prior("25.6 GB/s", "PCIe 4.0 x16 is slower than the two expanders")
            if m["pcie"].startswith("5"):
                slower = measured(gbs, "another host: " + each)
            f.link("cxl0", f"vram{i}", slower, COPY)
    if m["gpu_link"]:
        for i in range(count):
            for o in range(count):
                if o != i:
                    f.link(f"vram{i}", f"vram{o}", m["gpu_link"], COPY)
    for s in sockets:
        for o in sockets:
            if o != s:
                f.link(f"dram{s}", f"dram{o}", m["socket_link"], REMOTE_LATENCY)
    if m["cxl"]:
        f.link("cxl0", "dram0", measured(gbs, "another host: " + each), far)
    for s in sockets:
        f.link("disk0", f"dram{s}", m["disk"], DISK_LATENCY)
    f.write()


def build_unified(t, m):
    f = File(m["name"], m["note"])
    soc = t.gpu(m["soc"])
    row = t.gpus[GPUS[m["soc"]]["row"]]
    if int(m["size"].split()[0]) not in row["memory_gb"]:
        raise SystemExit(f"{m['name']}: {m['size']} is not one of {row['memory_gb']}")
    f.memory("dram0", "dram", datasheet(m["size"], HF), soc["bandwidth"], SHARED_LATENCY)
    f.memory("disk0", "disk", datasheet(m["disk_size"], BUILT), m["disk"], DISK_LATENCY)
    f.cpu("cpu0", CPUS[m["cpu"]], ["dram0"])
    f.gpu("gpu0", soc, "dram0", m["launch"])
    f.link("disk0", "dram0", m["disk"], DISK_LATENCY)
    f.write()


def nvlink(gbs):
    return datasheet(f"{gbs} GB/s", AIC + ", one direction within the node")


MACHINES = [
    # Desktops and laptops with one GPU: two channels of memory.
    host("rtx2080ti-11g-ddr4-32g", "Desktop of 2018-2020: RTX 2080 Ti, eight-core CPU, two channels of DDR4-3200.", "zen3-8", "DDR4-3200 2ch", "32 GiB", gpu="rtx2080ti", pcie="3x16", disk=NVME3, disk_size="1 TB"),
    host("rtx3060-12g-ddr4-32g", "Desktop of 2021: RTX 3060 with 12 GB, six-core CPU, two channels of DDR4-3200.", "zen3-6", "DDR4-3200 2ch", "32 GiB", gpu="rtx3060", disk_size="1 TB"),
    host("rtx3070-8g-ddr4-32g", "Desktop of 2021: RTX 3070, eight-core CPU, two channels of DDR4-3200.", "zen3-8", "DDR4-3200 2ch", "32 GiB", gpu="rtx3070", disk_size="1 TB"),
    host("rtx3080-10g-ddr4-32g", "Desktop of 2021: RTX 3080 with 10 GB, eight-core CPU, two channels of DDR4-3200.", "zen3-8", "DDR4-3200 2ch", "32 GiB", gpu="rtx3080", disk_size="1 TB"),
    host("rtx3090-24g-ddr4-64g", "Desktop of 2020-2022: RTX 3090, eight-core CPU, two channels of DDR4-3200.", "zen3-8", "DDR4-3200 2ch", "64 GiB", gpu="rtx3090"),
    host("rtx4060-8g-laptop-ddr5-32g", "Laptop class: RTX 4060 with 8 GB on eight PCIe lanes, two channels of DDR5-4800.", "laptop-8", "DDR5-4800 2ch", "32 GiB", gpu="rtx4060-laptop", pcie="4x8", disk_size="1 TB"),
    host("rtx4060-8g-ddr5-32g", "Desktop of 2023: RTX 4060 with 8 GB on eight PCIe lanes, two channels of DDR5-5600.", "raptor-14", "DDR5-5600 2ch", "32 GiB", gpu="rtx4060", pcie="4x8", disk_size="1 TB"),
    host("rtx4060ti-16g-ddr5-64g", "Desktop of 2023: RTX 4060 Ti with 16 GB on eight PCIe lanes, two channels of DDR5-5600.", "zen4-8", "DDR5-5600 2ch", "64 GiB", gpu="rtx4060ti", pcie="4x8"),
    host("rtx4070-12g-ddr5-32g", "Desktop of 2023: RTX 4070, six-core CPU, two channels of DDR5-5600.", "zen4-6", "DDR5-5600 2ch", "32 GiB", gpu="rtx4070", disk_size="1 TB"),
    host("rtx4070tis-16g-ddr5-64g", "Desktop of 2024: RTX 4070 Ti SUPER, eight-core CPU, two channels of DDR5-6000.", "zen4-8", "DDR5-6000 2ch", "64 GiB", gpu="rtx4070tis"),
    host("rtx4080-16g-ddr5-64g", "Desktop of 2023: RTX 4080, sixteen-core CPU, two channels of DDR5-5600.", "zen4-16", "DDR5-5600 2ch", "64 GiB", gpu="rtx4080"),
    host("rtx4090-24g-ddr5-64g", "Desktop of 2023: RTX 4090, sixteen-core CPU, two channels of DDR5-5600.", "zen4-16", "DDR5-5600 2ch", "64 GiB", gpu="rtx4090"),
    host("rtx5060-8g-ddr5-32g", "Desktop of 2025: RTX 5060 on eight PCIe lanes, two channels of DDR5-5600.", "zen5-8", "DDR5-5600 2ch", "32 GiB", gpu="rtx5060", pcie="5x8", disk_size="1 TB"),
    host("rtx5060ti-16g-ddr5-64g", "Desktop of 2025: RTX 5060 Ti with 16 GB on eight PCIe lanes, two channels of DDR5-6000.", "zen5-8", "DDR5-6000 2ch", "64 GiB", gpu="rtx5060ti", pcie="5x8"),
    host("rtx5070-12g-ddr5-32g", "Desktop of 2025: RTX 5070, eight-core CPU, two channels of DDR5-6000.", "zen5-8", "DDR5-6000 2ch", "32 GiB", gpu="rtx5070", pcie="5x16", disk_size="1 TB"),
    host("rtx5070ti-16g-ddr5-64g", "Desktop of 2025: RTX 5070 Ti, eight-core CPU, two channels of DDR5-6000.", "zen5-8", "DDR5-6000 2ch", "64 GiB", gpu="rtx5070ti", pcie="5x16"),
    host("rtx5080-16g-ddr5-64g", "Desktop of 2025: RTX 5080, sixteen-core CPU, two channels of DDR5-6000.", "zen5-16", "DDR5-6000 2ch", "64 GiB", gpu="rtx5080", pcie="5x16", disk=NVME5),
    host("rtx5090-32g-ddr5-96g", "Desktop of 2025: RTX 5090, sixteen-core CPU, two channels of DDR5-6000.", "zen5-16", "DDR5-6000 2ch", "96 GiB", gpu="rtx5090", pcie="5x16-5090", disk=NVME5),
    host("rx7800xt-16g-ddr5-32g", "Desktop of 2023: Radeon RX 7800 XT, eight-core CPU, two channels of DDR5-5600.", "zen4-8", "DDR5-5600 2ch", "32 GiB", gpu="rx7800xt", disk_size="1 TB"),
    host("rx7900xtx-24g-ddr5-64g", "Desktop of 2023: Radeon RX 7900 XTX, sixteen-core CPU, two channels of DDR5-5600.", "zen4-16", "DDR5-5600 2ch", "64 GiB", gpu="rx7900xtx"),
    host("rx9070-16g-ddr5-32g", "Desktop of 2025: Radeon RX 9070, eight-core CPU, two channels of DDR5-6000.", "zen5-8", "DDR5-6000 2ch", "32 GiB", gpu="rx9070", pcie="5x16", disk_size="1 TB"),
    host("rx9070xt-16g-ddr5-64g", "Desktop of 2025: Radeon RX 9070 XT, eight-core CPU, two channels of DDR5-6000.", "zen5-8", "DDR5-6000 2ch", "64 GiB", gpu="rx9070xt", pcie="5x16"),
    host("arc-b60-24g-ddr5-64g", "Desktop of 2025: Arc Pro B60 with 24 GB on eight PCIe lanes, two channels of DDR5-6000.", "zen4-8", "DDR5-6000 2ch", "64 GiB", gpu="b60", pcie="5x8"),
    host("minipc-ddr5-32g", "Mini PC: eight cores, 32 GiB of DDR5-5600 in two channels, no GPU.", "zen4m-8", "DDR5-5600 2ch", "32 GiB", disk_size="1 TB"),
    host("desktop-ddr4-64g", "Desktop of 2021 without a GPU to speak of: twelve cores, two channels of DDR4-3200.", "zen3-12", "DDR4-3200 2ch", "64 GiB", disk_size="1 TB"),
    # Desktops with several GPUs.
    host("rtx3090x2-48g-ddr4-128g", "Desktop of 2022: two RTX 3090 on eight PCIe lanes each, no NVLink bridge.", "zen3-12", "DDR4-3200 2ch", "128 GiB", gpu="rtx3090", gpus=2, pcie="4x8"),
    host("rtx4060tix2-32g-ddr5-64g", "Desktop of 2023: two RTX 4060 Ti with 16 GB on eight PCIe lanes each.", "zen4-8", "DDR5-5600 2ch", "64 GiB", gpu="rtx4060ti", gpus=2, pcie="4x8"),
    host("rtx5090x2-64g-ddr5-192g", "Desktop of 2025: two RTX 5090 on eight PCIe lanes each, four modules of DDR5-5600.", "zen5-16", "DDR5-5600 2ch", "192 GiB", gpu="rtx5090", gpus=2, pcie="5x8", disk=NVME5, disk_size="4 TB"),
    # Workstations.
    host("threadripper-a6000-48g-ddr4-256g", "Workstation of 2021: Threadripper PRO with eight channels of DDR4-3200 and an RTX A6000.", "tr-zen3-32", "DDR4-3200 8ch", "256 GiB", gpu="a6000"),
    host("threadripper-rtx6000ada-48g-ddr5-256g", "Workstation of 2023: Threadripper PRO with eight channels of DDR5-4800 and an RTX 6000 Ada.", "tr-zen4-32", "DDR5-4800 8ch", "256 GiB", gpu="rtx6000ada", disk_size="4 TB"),
    host("threadripper-rtxpro6000-96g-ddr5-512g", "Workstation of 2025: Threadripper PRO with eight channels of DDR5-6400 and an RTX PRO 6000.", "tr-zen5-64", "DDR5-6400 8ch", "512 GiB", gpu="rtxpro6000", pcie="5x16", disk=NVME5, disk_size="4 TB"),
    host("threadripper-rtxpro6000x2-192g-ddr5-512g", "Workstation of 2025: Threadripper PRO with eight channels of DDR5-6400 and two RTX PRO 6000.", "tr-zen5-64", "DDR5-6400 8ch", "512 GiB", gpu="rtxpro6000", gpus=2, pcie="5x16", disk=NVME5, disk_size="4 TB"),
    host("threadripper-rtx4090x2-48g-ddr5-256g", "Workstation of 2023: Threadripper with four channels of DDR5-5600 and two RTX 4090.", "tr-zen4-32", "DDR5-5600 4ch", "256 GiB", gpu="rtx4090", gpus=2, disk_size="4 TB"),
    # Servers without a GPU.
    host("epyc-8ch-ddr4-512g", "Server: one EPYC 7003 with eight channels of DDR4-3200, no GPU.", "milan-64", "DDR4-3200 8ch", "512 GiB", disk_size="4 TB"),
    host("epyc-12ch-ddr5-768g", "Server: one EPYC 9004 with twelve channels of DDR5-4800, no GPU.", "genoa-96", "DDR5-4800 12ch", "768 GiB", disk_size="4 TB"),
    host("epyc-2s-24ch-ddr5-1536g", "Server with two EPYC 9005 sockets, twelve channels of DDR5-6000 each, no GPU.", "turin-96", "DDR5-6000 12ch", "768 GiB", sockets=2, disk_size="8 TB", socket_link=XGMI3),
    host("xeon-2s-ddr4-768g", "Server of 2019: two Cascade Lake sockets, six channels of DDR4-2666 each, no GPU.", "skylake-24", "DDR4-2666 6ch", "384 GiB", sockets=2, disk=NVME3, disk_size="4 TB", socket_link=prior("41 GB/s", "three UPI links of 10.4 GT/s at about 0.65 of their raw rate")),
    host("xeon-2s-ddr5-1t", "Server with two Sapphire Rapids sockets, eight channels of DDR5-4800 each, no GPU.", "spr-56", "DDR5-4800 8ch", "512 GiB", sockets=2, disk_size="4 TB"),
    host("xeon6-12ch-mrdimm-1536g", "Server: one Granite Rapids with twelve channels of MRDIMM-8800, no GPU.", "gnr-96", "MRDIMM-8800 12ch", "1536 GiB", disk=NVME5, disk_size="8 TB"),
    # Servers with consumer or workstation GPUs.
    host("epyc-8ch-ddr4-rtx3090x4-256g", "Home server: one EPYC 7003 with eight channels of DDR4-3200 and four RTX 3090.", "milan-32", "DDR4-3200 8ch", "256 GiB", gpu="rtx3090", gpus=4),
    host("epyc-12ch-ddr5-rtx4090", "Workstation: one EPYC with twelve channels of DDR5-4800 and an RTX 4090.", "genoa-48", "DDR5-4800 12ch", "768 GiB", gpu="rtx4090", disk_size="4 TB", dram_note="{}; 12-channel EPYC 9655 hosts measured 408 (triad) to 504 GB/s (expert gather)"),
    host("epyc-12ch-ddr5-rtx5090-1152g", "Server: one EPYC 9005 with twelve channels of DDR5-6400 and an RTX 5090.", "turin-96", "DDR5-6400 12ch", "1152 GiB", gpu="rtx5090", pcie="5x16-5090", disk=NVME5, disk_size="4 TB"),
    host("xeon-2s-ddr5-rtx4090-1t", "Server with two Sapphire Rapids sockets and an RTX 4090 beside the first: the KTransformers kind.", "spr-56", "DDR5-4800 8ch", "512 GiB", sockets=2, gpu="rtx4090", disk_size="4 TB"),
    host("l4-24g-ddr5-128g", "Cloud instance class: one L4 and a part of a server's memory.", "genoa-48", "DDR5-4800 4ch", "128 GiB", gpu="l4", disk_size="1 TB"),
    host("l40s-48g-ddr5-512g", "Server: one EPYC 9004 and an L40S.", "genoa-48", "DDR5-4800 12ch", "512 GiB", gpu="l40s", disk_size="4 TB"),
    host("epyc-2s-ddr5-l40sx4-1t", "Server with two EPYC 9004 sockets and two L40S beside each.", "genoa-48", "DDR5-4800 12ch", "512 GiB", sockets=2, gpu="l40s", gpus=4, disk_size="8 TB", socket_link=XGMI3),
    # Boxes with memory behind CXL.
    host("xeon-cxl-rtx4090", "Workstation with 128 GiB of local DDR5, two 96 GB CXL expanders seen as one region, and an RTX 4090.", "spr-32", "DDR5-4800 8ch", "128 GiB", gpu="rtx4090", disk=NVME5, disk_size="4 TB", cxl=("192 GB", 2)),
    host("xeon-cxl-512g", "Server with 128 GiB of local DDR5 and four 96 GB CXL expanders seen as one region, no GPU.", "spr-56", "DDR5-4800 8ch", "128 GiB", disk=NVME5, disk_size="4 TB", cxl=("384 GB", 4)),
    host("xeon-2s-cxl-l40s-1t", "Server with two Sapphire Rapids sockets, two CXL expanders and an L40S beside the first.", "spr-32", "DDR5-4800 8ch", "512 GiB", sockets=2, gpu="l40s", disk=NVME5, disk_size="4 TB", cxl=("192 GB", 2)),
    # Data-centre nodes.
    host("a100-80g-ddr4-1t", "One A100 SXM of a node with 1 TiB of host memory.", "milan-64", "DDR4-3200 8ch", "1 TiB", gpu="a100", disk_size="8 TB", dram_note="one socket: {}"),
    host("a100x8-640g-ddr4-2t", "Node with eight A100 SXM and two EPYC 7003 sockets.", "milan-64", "DDR4-3200 8ch", "1 TiB", sockets=2, gpu="a100", gpus=8, disk_size="15 TB", gpu_link=nvlink(300), socket_link=XGMI2),
    host("h100-80g-ddr5-1t", "One H100 SXM of a node with 1 TiB of host memory.", "spr-56", "DDR5-4800 8ch", "1 TiB", gpu="h100", pcie="5x16", disk_size="8 TB", dram_note="one socket: {}"),
    host("h100x8-640g-ddr5-2t", "Node with eight H100 SXM and two Sapphire Rapids sockets.", "spr-56", "DDR5-4800 8ch", "1 TiB", sockets=2, gpu="h100", gpus=8, pcie="5x16", disk_size="30 TB", gpu_link=nvlink(450)),
    host("h200-141g-ddr5-2t", "One H200 SXM of a node with 2 TiB of host memory.", "spr-56", "DDR5-4800 8ch", "2 TiB", gpu="h200", pcie="5x16", disk_size="8 TB", dram_note="one socket: {}"),
    host("h200x8-1128g-ddr5-2t", "Node with eight H200 SXM and two Sapphire Rapids sockets.", "spr-56", "DDR5-4800 8ch", "1 TiB", sockets=2, gpu="h200", gpus=8, pcie="5x16", disk_size="30 TB", gpu_link=nvlink(450)),
    host("b200-180g-ddr5-2t", "One B200 SXM of a node with 2 TiB of host memory.", "spr-56", "DDR5-5600 8ch", "2 TiB", gpu="b200", pcie="5x16", disk_size="8 TB", dram_note="one socket: {}"),
    host("b200x8-1440g-ddr5-2t", "Node with eight B200 SXM and two sockets.", "spr-56", "DDR5-5600 8ch", "1 TiB", sockets=2, gpu="b200", gpus=8, pcie="5x16", disk_size="30 TB", gpu_link=nvlink(900)),
    host("mi300x-192g-ddr5-1t", "One MI300X of a node with 1 TiB of host memory.", "genoa-96", "DDR5-4800 12ch", "1 TiB", gpu="mi300x", pcie="5x16", disk_size="8 TB", dram_note="one socket: {}"),
    host("mi300xx8-1536g-ddr5-2t", "Node with eight MI300X and two EPYC 9004 sockets.", "genoa-96", "DDR5-4800 12ch", "1 TiB", sockets=2, gpu="mi300x", gpus=8, pcie="5x16", disk_size="30 TB", gpu_link=datasheet("64 GB/s", "AMD's MI300X data sheet: one of seven Infinity Fabric links, 128 GB/s both ways"), socket_link=XGMI3),
    # One memory for CPU and GPU.
    unified("apple-m1-max-64g", "Unified memory: CPU and GPU compute from the same 64 GiB.", "m1-max", "m1-max", "64 GiB"),
    unified("apple-m2-ultra-192g", "Unified memory: CPU and GPU compute from the same 192 GiB.", "m2-ultra", "m2-ultra", "192 GiB", disk_size="2 TB"),
    unified("apple-m3-max-128g", "Unified memory: CPU and GPU compute from the same 128 GiB; the variant with 40 GPU cores (the one with 30 has 300 GB/s).", "m3-max", "m3-max", "128 GiB"),
    unified("apple-m3-ultra-512g", "Unified memory: CPU and GPU compute from the same 512 GiB.", "m3-ultra", "m3-ultra", "512 GiB", disk_size="4 TB"),
    unified("apple-m4-pro-48g", "Unified memory: CPU and GPU compute from the same 48 GiB.", "m4-pro", "m4-pro", "48 GiB"),
    unified("apple-m4-max-64g", "Unified memory: CPU and GPU compute from the same 64 GiB.", "m4-max", "m4-max", "64 GiB"),
    unified("apple-m4-max-128g", "Unified memory: CPU and GPU compute from the same 128 GiB.", "m4-max", "m4-max", "128 GiB", disk_size="2 TB"),
    unified("strix-halo-128g", "Ryzen AI Max+ 395 with 128 GiB of LPDDR5X on 256 bit, seen as memory that CPU and GPU share.", "strix-halo", "strix-16", "128 GiB", disk=NVME4, disk_size="2 TB", launch=GRAPH_LAUNCH),
    unified("dgx-spark-128g", "GB10 with 128 GiB of LPDDR5X that CPU and GPU share.", "gb10", "gb10-20", "128 GiB", disk=NVME5, disk_size="4 TB", launch=GRAPH_LAUNCH),
]

# ---- Hosts that their owners measured: several calibrations of one host become one file with the medians.
MEASURED = [
    ("measured-epyc9655-rtx5090-177g", "rtx5090", ["hybrid-g3/calib-235b", "hybrid-g3/calib", "hybrid-g5/calib-g5"]),
    ("measured-epyc9655-rtx5090-138g", "rtx5090", ["hybrid-g9/b16close/calib"]),
    ("measured-epyc9755-rtx5090-138g", "rtx5090", ["hybrid-g6/calib-g6"]),
    ("measured-epyc9755-rtx5090-138g-shared", "rtx5090", ["hybrid-g9/fixbox/calib"]),
    ("measured-epyc9554-rtx5090-63g", "rtx5090", ["hybrid-g9/gate1/calib"]),
    ("measured-epyc9554-rtxpro6000-126g", "rtxpro6000", ["hybrid-g9/gate2/calib"]),
    ("measured-tr7965wx-rtx5090x2-125g", "rtx5090", ["hybrid-g9/final/calib", "hybrid-g9/intracall/calib", "hybrid-g9/spinwindow/calib"]),
    ("measured-tr7975wx-rtx5090x2-251g", "rtx5090", ["hybrid-g9/adjudication/calib", "hybrid-g9/b16axis/calib", "hybrid-g9/barconfirm/calib", "hybrid-g9/coresweep/calib", "hybrid-g9/remeasure/calib"]),
    ("measured-tr7995wx-rtx4090-251g", "rtx4090", ["hybrid-g9/box/calib"]),
    ("measured-w1250-a2000-126g", "a2000", ["hybrid-g8/receipts/calib-gpudev"]),
]
# CPUs of those hosts: cores, instruction sets, float32 rate of all cores; a virtual machine has a share of them.
MEASURED_CPUS = {
    "AMD EPYC 9655 96-Core Processor": (96, AVX512, 2.6, 64), "AMD EPYC 9755 128-Core Processor": (128, AVX512, 2.7, 64),
    "AMD EPYC 9554 64-Core Processor": (64, AVX512, 3.1, 32), "AMD Ryzen Threadripper PRO 7965WX 24-Cores": (24, AVX512, 4.2, 32),
    "AMD Ryzen Threadripper PRO 7975WX 32-Cores": (32, AVX512, 4.0, 32), "AMD Ryzen Threadripper PRO 7995WX 96-Cores": (96, AVX512, 2.5, 32),
    "Intel(R) Xeon(R) W-1250 CPU @ 3.30GHz": (6, AVX2, 3.3, 32),
}


REMARKS = {
    "measured-epyc9755-rtx5090-138g-shared":
        " Half the DRAM rate of the other calibration with this CPU: neighbours on the host or fewer channels, the source does not say.",
}


def build_measured(t, name, gpu_key, paths):
    hosts = [h for h in t.hosts for p in paths if h["path"] == f"bench/{p}.json"]
    if len(hosts) != len(paths):
        raise SystemExit(f"{name}: {len(hosts)} of {len(paths)} calibrations found")
    first = hosts[0]
    if any((h["cpu"], h["mem_gib"], len(h["gpu"])) != (first["cpu"], first["mem_gib"], len(first["gpu"])) for h in hosts):
        raise SystemExit(f"{name}: calibrations of different hosts")
    where = HOSTS + (f", median of {len(paths)}" if len(paths) > 1 else "")
    median = lambda values: number(round(statistics.median(values), 2))
    physical, isa, ghz, width = MEASURED_CPUS[first["cpu"]]
    threads = first["online_cpus"]
    whole = threads >= 2 * physical
    cores = physical if whole else min(threads // 2, physical)
    cpu_name = first["cpu"].replace("(R)", "").replace(" CPU", "").replace(" Processor", "")
    note = f"A measured host: {cpu_name}, {len(first['gpu'])} x {first['gpu'][0]['name']}."
    note += f" Source: {HOSTS}: bench/{', bench/'.join(paths)}."
    if not whole:
        note += f" A part of the CPU: {threads} hardware threads, taken as two per core."
    f = File(name, note + REMARKS.get(name, ""))
    gpu = t.gpu(gpu_key)
    for i in range(len(first["gpu"])):
        rate = median([h["gpu"][i]["vram_triad_gbs"] for h in hosts])
        f.memory(f"vram{i}", "vram", gpu["capacity"], measured(f"{rate} GB/s", f"triad; {where}"), VRAM_LATENCY)
    scatter, triad = (median([h[k]["gbs"] for h in hosts]) for k in ("dram_expert_scatter_best", "dram_triad_best"))
    f.memory("dram0", "dram", measured(f"{number(first['mem_gib'])} GiB", where),
             measured(f"{scatter} GB/s", f"gather of expert blocks, best of block sizes and threads (triad {triad} GB/s); {where}"), DRAM_LATENCY)
    f.memory("disk0", "disk", prior("1 TB", "not recorded"), UNMEASURED_SSD, DISK_LATENCY)
    rate = cores * ghz * width / 1000
    f.cpu("cpu0", (cpu_name, cores, threads, isa, f"{number(round(rate, 2))} TFLOP/s", f"{cores} cores x {ghz} GHz x {width} operations"), ["dram0"])
    for i in range(len(first["gpu"])):
        f.gpu(f"gpu{i}", {**gpu, "name": first["gpu"][i]["name"]}, f"vram{i}")
    slow = {"3": "4 GB/s"}.get(str(first["pcie"][0][1]), "10 GB/s")
    for i in range(len(first["gpu"])):
        # A copy of 8 KB takes the latency and its bytes at the rate of large copies.
        for start, end, way in ((f"dram0", f"vram{i}", "h2d"), (f"vram{i}", "dram0", "d2h")):
            large = statistics.median([h["gpu"][i][f"{way}_64mb"] for h in hosts])
            small = statistics.median([h["gpu"][i][f"{way}_8kb"] for h in hosts])
            latency = 8192 / small / 1e3 - 8192 / large / 1e3
            f.link(start, end, measured(f"{number(round(large, 2))} GB/s", f"pinned copies of 64 MB; {where}"),
                   measured(f"{number(round(latency, 2))} us", f"copies of 8 KB ran at {number(round(small, 2))} GB/s; {where}"),
                   slow if way == "h2d" else None)
    f.link("disk0", "dram0", UNMEASURED_SSD, DISK_LATENCY)
    f.write()


def main():
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared/data/hardware/hardware.json"
    t = Tables(path)
    used = [p for _, _, paths in MEASURED for p in paths]
    left = {h["path"] for h in t.hosts} - {f"bench/{p}.json" for p in used}
    if left:
        raise SystemExit(f"calibrations without a file: {sorted(left)}")
    for m in MACHINES:
        m["build"](t, m)
    for name, gpu, paths in MEASURED:
        build_measured(t, name, gpu, paths)
    print(f"{len(MACHINES)} described and {len(MEASURED)} measured machines in {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
