#!/usr/bin/env python3
"""Fits a small physical model of one MoE layer's time on a GPU to measured kernel latencies.

    python3 tools/gpu-moe/fit.py [DATA] [--ablate]      # needs numpy, scipy; DATA defaults to ../shared/data beside the repository

DATA/moe_kernel_perf/*.csv: latency in ms of vLLM's and SGLang's MoE kernels (aiconfigurator, Apache-2.0);
DATA/hardware/hardware.json: bandwidth and arithmetic rates of the GPUs (same source).
Writes fitted.json beside this file: the parameters, the residuals' quantiles and the measured ranges of every (GPU, kernel, format).
README.md says what the model is and how large its errors are.
"""
import collections
import csv
import json
import os
import pathlib
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np
from scipy.optimize import least_squares

HERE = pathlib.Path(__file__).resolve().parent
SAMPLE = HERE.parents[1] / "cost-models/tests/data/moe_kernel_sample.csv"
# Row of the systems table, and the name that the table of constants uses.
GPUS = {
    "NVIDIA B200": ("b200_sxm", "B200"), "NVIDIA H100 80GB HBM3": ("h100_sxm", "H100"), "NVIDIA H200": ("h200_sxm", "H200"),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": ("rtx_pro_6000_server", "RTX PRO 6000"),
}
# Bytes per weight (with scales) and the arithmetic rate that the kernel uses.
FORMATS = {
    "bfloat16": (2.0, "bfloat16_tc_flops"), "fp8": (1.0, "fp8_tc_flops"), "fp8_block": (1.0 + 4 / 128**2, "fp8_tc_flops"),
    "nvfp4": (0.5 + 1 / 16, "fp4_tc_flops"), "w4a16_mxfp4": (0.5 + 1 / 32, "bfloat16_tc_flops"),
    "w4a8_mxfp4_mxfp8": (0.5 + 1 / 32, "fp8_tc_flops"), "int4_wo": (0.5 + 2 / 32, "bfloat16_tc_flops"),
}
# Models without a gate projection (Nemotron-H): two matrices per expert. Seen in the data: a third would exceed the bandwidth.
UNGATED = {(1024, 2688, 22, 512), (2048, 5120, 22, 512), (2688, 1856, 6, 128), (4096, 2688, 22, 512), (8192, 5120, 22, 512)}
TILES = [1, 16, 32, 64, 128]  # tokens per block of rows; only `--ablate` tries more than 1


def expert_counts(distribution, tokens, experts, top_k):
    """Tokens of each expert under the collector's load, in expectation.

    balanced: all experts get the same number, min(E, n k) of them any. power_law_a: the collector draws one number per expert from
    a density x^-a on [1, 0.8 n] (on [0.01, 2] while n k <= E), scales them to n k tokens and rounds, at most n per expert; the
    draws are replaced by the quantiles (i + 1/2) / E.
    """
    slots = tokens * top_k
    if distribution == "balanced":
        active = min(experts, slots)
        return np.full(active, slots / active)
    a = float(distribution.rsplit("_", 1)[1])
    low, high = (1.0, 0.8 * tokens) if slots > experts else (0.01, 2.0)
    high = max(high, low * 1.0001)
    u = (np.arange(experts) + 0.5) / experts
    x = ((high ** (1 - a) - low ** (1 - a)) * u + low ** (1 - a)) ** (1 / (1 - a))
    counts = np.minimum(np.round(x / x.sum() * slots), tokens)
    # What rounding and the cap lose goes to the largest that have room, one each: the collector does the same.
    missing = int(slots - counts.sum())
    order = np.argsort(-counts, kind="stable")
    while missing != 0:
        for e in order:
            if missing > 0 and counts[e] < tokens:
                counts[e] += 1
                missing -= 1
            elif missing < 0 and counts[order[::-1][-missing % experts]] > 0:
                counts[order[::-1][-missing % experts]] -= 1
                missing += 1
            if missing == 0:
                break
        else:
            if missing < 0:
                counts[np.argmax(counts)] -= 1
                missing += 1
    return counts[counts > 0]


class Group:
    """Rows of one GPU, kernel and format as arrays."""

    def __init__(self, key, rows, system):
        self.gpu, self.kernel, self.format = key
        self.bytes_per_weight, rate = FORMATS[self.format]
        self.bandwidth, self.flops = system["mem_bw"], system[rate]
        self.rows = rows
        self.seconds = np.array([float(r["latency"]) * 1e-3 for r in rows])
        self.shape = [tuple(int(r[c]) for c in ("hidden_size", "inter_size", "topk", "num_experts")) for r in rows]
        self.shapes = sorted(set(self.shape))
        self.tokens = np.array([int(r["num_tokens"]) for r in rows])
        self.balanced = np.array([r["distribution"] == "balanced" for r in rows])
        weights = np.array([(2 if s in UNGATED else 3) * s[0] * s[1] for s in self.shape], float)
        counts = [expert_counts(r["distribution"], int(r["num_tokens"]), s[3], s[2]) for r, s in zip(rows, self.shape)]
        self.distinct = np.array([len(c) for c in counts], float)
        uniform = np.array([s[3] * (1 - (1 - s[2] / s[3]) ** n) for s, n in zip(self.shape, self.tokens)])
        self.bytes = self.distinct * weights * self.bytes_per_weight
        self.bytes_uniform = uniform * weights * self.bytes_per_weight
        # Inputs and outputs of both products, two bytes each: read once, written once.
        matrices = np.array([2 if s in UNGATED else 3 for s in self.shape])
        width = np.array([s[0] * 2 + s[1] * m for s, m in zip(self.shape, matrices)], float)
        self.activations = 2.0 * self.tokens * np.array([s[2] for s in self.shape]) * width
        rounded = lambda c, tile: c.sum() if tile == 1 else (np.ceil(c / tile) * tile).sum()
        self.work = {tile: 2.0 * weights * np.array([rounded(c, tile) for c in counts]) for tile in TILES}

    def predict(self, p, tile=1, bytes=None, hard=False):
        """p = ln launch, ln share of bandwidth, ln share of arithmetic rate, ln sharpness."""
        launch, memory, arithmetic, sharpness = np.exp(p)
        read = (self.bytes if bytes is None else bytes) + self.activations
        tb = read / (memory * self.bandwidth)
        tf = self.work[tile] / (arithmetic * self.flops)
        top = np.maximum(tb, tf)
        if hard:
            return launch + top
        return launch + top * ((tb / top) ** sharpness + (tf / top) ** sharpness) ** (1 / sharpness)

    def solve(self, rows, tile, **how):
        start = np.log([10e-6, 0.6, 0.4, 2.0])
        # Weak priors where the data are silent: a launch of some 10 us, a sharpness of about 2.
        def residuals(p):
            fit = np.log(self.predict(p, tile, **how)[rows] / self.seconds[rows])
            return np.concatenate([fit, 0.5 * (p - start) * np.array([1, 0, 0, 1])])
        bounds = (np.log([1e-6, 0.02, 0.01, 0.7]), np.log([300e-6, 1.0, 1.0, 12.0]))
        return least_squares(residuals, start, loss="soft_l1", f_scale=0.1, bounds=bounds)

    def best(self, rows, tiles=(1,), **how):
        """The tile with the smallest loss on these rows."""
        fits = [(self.solve(rows, t, **how), t) for t in tiles]
        fit, tile = min(fits, key=lambda f: f[0].cost)
        return fit.x, tile

    def error(self, p, tile=1, **how):
        return np.log(self.predict(p, tile, **how) / self.seconds)

    def held_out(self, tiles=(1,), **how):
        """Log errors of every shape from a fit to the others; None with a single shape."""
        if len(self.shapes) < 2:
            return None
        out = np.empty(len(self.rows))
        for shape in self.shapes:
            test = np.array([s == shape for s in self.shape])
            p, tile = self.best(~test, tiles, **how)
            out[test] = self.error(p, tile, **how)[test]
        return out


def sample_of(g, p, rows=8):
    """Rows with balanced load, spread over tokens and shapes: what the program's own arithmetic is tested against."""
    candidates = sorted(np.flatnonzero(g.balanced), key=lambda i: (g.tokens[i], g.shape[i]))
    model = g.predict(p)
    lines = []
    for i in (candidates[j] for j in np.linspace(0, len(candidates) - 1, rows).round().astype(int)):
        h, inner, k, e = g.shape[i]
        matrices = 2 if g.shape[i] in UNGATED else 3
        lines.append(f"{GPUS[g.gpu][1]},{g.format},{h},{inner},{k},{e},{matrices},{g.tokens[i]},{g.seconds[i] * 1e3:.6g},{model[i] * 1e3:.6g}")
    return lines


def relative(log_error):
    return np.abs(np.expm1(log_error))


def summary(log_error):
    if log_error is None:
        return "    -      -"
    e = relative(log_error)
    return f"{100 * np.median(e):5.1f}  {100 * np.quantile(e, 0.9):5.1f}"


def read(data):
    systems = json.loads((data / "hardware/hardware.json").read_text())["datacenter_systems"]["systems"]
    rows = collections.defaultdict(list)
    for path in sorted((data / "moe_kernel_perf").glob("*.csv")):
        for r in csv.DictReader(path.open()):
            rows[(r["device"], r["kernel_source"], r["moe_dtype"])].append(r)
    return [Group(key, r, systems[GPUS[key[0]][0]]) for key, r in sorted(rows.items())]


def main():
    arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
    data = pathlib.Path(arguments[0]) if arguments else HERE.parents[2] / "shared/data"
    groups = read(data)
    if "--ablate" in sys.argv:
        return ablate(groups)
    # One kernel for every GPU and format goes into the program: the one measured on most shapes.
    chosen = {}
    for g in groups:
        key = (g.gpu, g.format)
        if key not in chosen or (len(g.shapes), len(g.rows)) > (len(chosen[key].shapes), len(chosen[key].rows)):
            chosen[key] = g
    sample = []
    print(f"{'GPU':13} {'format':17} {'kernel':64} rows shapes   launch  bw    flops sharp | train   p90 | held    p90 | n=1..8 balanced")
    out = []
    for g in groups:
        everything = np.ones(len(g.rows), bool)
        p, _ = g.best(everything)
        launch, memory, arithmetic, sharpness = (float(f"{x:.4g}") for x in np.exp(p))
        p = np.log([launch, memory, arithmetic, sharpness])  # as written
        train, held = g.error(p), g.held_out()
        few = (g.tokens <= 8) & g.balanced
        print(f"{GPUS[g.gpu][1]:13} {g.format:17} {g.kernel:64} {len(g.rows):4} {len(g.shapes):3}   {launch * 1e6:6.1f}us {memory:5.3f} {arithmetic:5.3f} "
              f"{sharpness:5.2f} | {summary(train)} | {summary(held)} | {summary(train[few])}")
        # The interval: what the model misses on shapes it has not seen (where there are none to spare: on its own).
        spread = held if held is not None else train
        ranges = {name: [int(min(v)), int(max(v))] for name, v in zip(("hidden", "inner", "top_k", "num_experts"), zip(*g.shapes))}
        ranges["tokens"] = [int(g.tokens.min()), int(g.tokens.max())]
        error = lambda e: None if e is None else [round(float(q), 4) for q in np.quantile(relative(e), [0.5, 0.9])]
        used = chosen[(g.gpu, g.format)] is g
        if used:
            sample += sample_of(g, p)
        out.append({
            "used": used, "gpu": GPUS[g.gpu][1], "device": g.gpu, "kernel": g.kernel, "format": g.format, "rows": len(g.rows), "shapes": len(g.shapes),
            "bytes_per_weight": g.bytes_per_weight, "bandwidth": g.bandwidth, "flops": g.flops,
            "launch_s": launch, "memory_share": memory, "arithmetic_share": arithmetic, "sharpness": sharpness,
            # measured / predicted at the 10th and 90th percentile
            "low_high": [min(1.0, round(float(np.exp(-np.quantile(spread, 0.9))), 4)), max(1.0, round(float(np.exp(-np.quantile(spread, 0.1))), 4))],
            "train_median_p90": error(train), "held_out_median_p90": error(held), "range": ranges,
        })
    part = HERE / "fitted.json.part"
    # One group per line, so that a changed fit is a readable difference.
    head = json.dumps({
        "source": "aiconfigurator kernel latencies (Apache-2.0), fitted by tools/gpu-moe/fit.py",
        "model": "launch_s + ((bytes / (memory_share bandwidth))^s + (work / (arithmetic_share flops))^s)^(1/s), s = sharpness"}, indent=1)
    groups_text = ",\n".join("  " + json.dumps(g) for g in out)
    part.write_text(head.removesuffix("\n}") + ',\n "groups": [\n' + groups_text + "\n ]\n}\n")
    part.replace(HERE / "fitted.json")
    part = SAMPLE.with_suffix(".part")
    part.write_text("\n".join(["gpu,format,hidden,inner,top_k,num_experts,matrices,tokens,measured_ms,model_ms", *sample]) + "\n")
    part.replace(SAMPLE)
    rows = sum(len(g.rows) for g in groups)
    print(f"{rows} rows, {len(groups)} groups")


def ablate(groups):
    """Median and p90 of the held-out error over all groups with several shapes, with one part of the model changed."""
    groups = [g for g in groups if len(g.shapes) >= 9]
    for name, how in [
        ("the model", lambda g: g.held_out()),
        ("tokens of an expert rounded up to a tile, fitted", lambda g: g.held_out(TILES)),
        ("rounded up to 64", lambda g: g.held_out([64])),
        ("hard maximum", lambda g: g.held_out(hard=True)),
        ("without activations' bytes", lambda g: g.held_out(bytes=g.bytes - g.activations)),
        ("distinct experts of uniform routing for every load", lambda g: g.held_out(bytes=g.bytes_uniform)),
    ]:
        errors = [how(g) for g in groups]
        print(f"{name:52} {summary(np.concatenate(errors))}  per group: " + " ".join(f"{100 * np.median(relative(e)):.0f}" for e in errors))


if __name__ == "__main__":
    main()
