#!/usr/bin/env python3
"""Cuts the tiny model's reference outputs down to what is committed beside the tests.

usage: cut_tiny_references.py TINY_FOLDER OUTPUT_FOLDER      (standard library only)

logits.f32: every 16th of the 256 positions, [16, 4096] float32 little-endian; tokens, routing and greedy texts whole.
"""
import json
import pathlib
import shutil
import sys

VOCAB, STEP = 4096, 16

source, target = map(pathlib.Path, sys.argv[1:3])
target.mkdir(parents=True, exist_ok=True)
logits = (source / "reference.logits.f32").read_bytes()
row = VOCAB * 4
rows = [logits[i * row:(i + 1) * row] for i in range(0, len(logits) // row, STEP)]
(target / "logits.f32").write_bytes(b"".join(rows))
shutil.copyfile(source / "reference.tokens", target / "tokens.txt")
greedy = json.loads((source / "reference.greedy.json").read_text())
(target / "greedy.json").write_text(json.dumps(greedy, separators=(",", ":")))
routing = json.loads((source / "reference.routing.json").read_text())
for layer in routing["layers"]:
    layer.pop("weights", None)
(target / "routing.json").write_text(json.dumps(routing, separators=(",", ":")))
