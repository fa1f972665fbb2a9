#!/usr/bin/env python3
"""Golden blocks for GGUF dequantisation, made with the `gguf` package (numpy code, independent of ours).

usage: make_quant_golden.py OUT_DIR
Per type: NAME.bin (raw blocks) and NAME.f32 (their values, float32 little-endian).
Where the package can also quantise: NAME.src.f32 (1024 gaussian values) and NAME.quantized.bin.
index.json lists them. Random bits everywhere, sane scales; the first blocks hold edge cases (see sane_scales).
"""
import json, os, sys
import numpy as np
from importlib.metadata import version
from gguf import GGMLQuantizationType as T, GGML_QUANT_SIZES, quants

# type -> byte offsets of its f16 scale fields within a block
F16_FIELDS = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "IQ4_NL": [0], "IQ4_XS": [0],
}
NAMES = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
         "Q8_K", "IQ4_NL", "IQ4_XS", "MXFP4"]


def sane_scales(rng, n, width):
    """n f16 scales in +-0.1; the first few blocks: 0, subnormal, negative, 1.0 (as far as n allows)."""
    s = rng.uniform(-0.1, 0.1, size=(n, width)).astype("<f2")
    edge = np.array([0.0, 6e-6, -0.0625, 1.0], dtype="<f2")
    if n >= 8:
        for i, v in enumerate(edge):
            s[i, 0] = v
    return s


def make(name, rng):
    t = T[name]
    if name in ("F16", "BF16"):
        # finite bit patterns of every size, both signs, subnormals and zeros
        u = rng.integers(0, 65536, size=1024, dtype=np.uint16)
        u[:8] = [0, 0x8000, 1, 0x8001, 0x03FF, 0x3C00 if name == "F16" else 0x3F80, 0x0400, 0x7BFF]
        e = 0x7C00 if name == "F16" else 0x7F80
        bad = (u & e) == e
        u[bad] &= np.uint16(~0x4000 & 0xFFFF)
        return u.view(np.uint8)
    per, size = GGML_QUANT_SIZES[t]
    n = max(8, 512 // per)
    b = rng.integers(0, 256, size=(n, size), dtype=np.uint8)
    if name in F16_FIELDS:
        offs = F16_FIELDS[name]
        s = sane_scales(rng, n, len(offs))
        for j, o in enumerate(offs):
            b[:, o:o + 2] = np.ascontiguousarray(s[:, j:j + 1]).view(np.uint8)
    if name == "MXFP4":
        b[:, 0] = rng.integers(118, 131, size=n)
        b[0, 0], b[1, 0], b[2, 0] = 118, 130, 127
    if name == "Q8_K":
        b[:, :4] = rng.uniform(-0.1, 0.1, size=(n, 1)).astype("<f4").view(np.uint8)
    return b.reshape(-1)


def main(out):
    os.makedirs(out, exist_ok=True)
    index = {"gguf_package": version("gguf"), "types": {}}
    for k, name in enumerate(NAMES):
        rng = np.random.default_rng(1000 + k)
        t = T[name]
        raw = make(name, rng)
        per, size = GGML_QUANT_SIZES[t]
        try:
            v = quants.dequantize(raw.view(np.float16) if name == "F16" else raw, t)
        except NotImplementedError as e:
            print(f"{name}: not supported by gguf {index['gguf_package']}: {e}")
            continue
        v = np.asarray(v, dtype="<f4").reshape(-1)
        assert np.isfinite(v).all(), name
        assert v.size == raw.size // size * per, (name, v.size)
        raw.tofile(f"{out}/{name}.bin")
        v.tofile(f"{out}/{name}.f32")
        e = {"ggml_type": int(t), "block_elements": per, "block_bytes": size, "elements": int(v.size), "quantized": False}
        src = rng.standard_normal(1024).astype("<f4")
        src[:32] = 0  # an all-zero block for the 32-wide types
        try:
            q = quants.quantize(src, t)
            src.tofile(f"{out}/{name}.src.f32")
            np.asarray(q).view(np.uint8).tofile(f"{out}/{name}.quantized.bin")
            e["quantized"] = True
        except NotImplementedError:
            pass
        index["types"][name] = e
        print(name, e, "max", float(abs(v).max()))
    with open(f"{out}/index.json", "w") as f:
        json.dump(index, f, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
