#!/usr/bin/env python3
"""References for routing rules that no published model has: top-p, a threshold with experts per layer (DynaMoE), iterated experts
(Chain-of-Experts). A decoder of its own, in plain PyTorch, float32; transformers has none of them.

usage: make_routing_rules.py OUT_DIR [model ...]

OUT_DIR/<model>/{config.json, weights.json, reference.json, logits.f32} as make_families.py writes them; weights follow its rule. `routing`
has an entry per layer and iteration, with lists that differ in length. `mean` is how many experts a token had on average, by layer.
"""
import json, sys
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from make_families import check_sum, values, write_lines

N_TOKENS, N_PROMPT, N_GREEDY, TOLERANCE = 40, 20, 32, 5e-4
BASE = dict(hidden_act="silu", max_position_embeddings=128, rms_norm_eps=1e-6, rope_theta=1e4, vocab_size=80, tie_word_embeddings=False,
            hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16, decoder_sparse_step=1, mlp_only_layers=[])
QWEN3 = dict(BASE, architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", attention_bias=False, norm_topk_prob=True)
QWEN2 = dict(BASE, architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe", norm_topk_prob=False, shared_expert_intermediate_size=56)
MODELS = {
    "top_p": dict(QWEN3, num_hidden_layers=3, num_experts=7, num_experts_per_tok=5, moe_intermediate_size=40,
                  expert_selection={"type": "top_p", "p": 0.7}),
    # every layer has another number of experts and of experts per token
    "dynamoe": dict(QWEN3, num_hidden_layers=3, num_experts=[9, 6, 4], num_experts_per_tok=[5, 3, 2], moe_intermediate_size=40,
                    expert_selection={"type": "threshold", "min_score": 0.15}),
    "chain": dict(QWEN3, num_hidden_layers=2, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40, num_expert_iterations=3,
                  expert_inner_residual=True),
    # without inner residual, with a shared expert in every iteration and a number of experts that varies
    "chain_top_p": dict(QWEN2, num_hidden_layers=2, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24,
                        num_expert_iterations=2, expert_selection={"type": "top_p", "p": 0.5}),
}


def at(x, layer):
    return x[layer] if isinstance(x, list) else x


def tensors_of(c):
    h, d, out = c["hidden_size"], c["head_dim"], []
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d

    def add(name, shape, gain=None, mean=0.0, scale=None):
        scale = scale if gain is None else float(f"{gain * (3 / shape[-1]) ** 0.5:.6g}")
        out.append({"name": name, "dtype": "F32", "shape": shape, "mean": mean, "scale": scale})

    add("model.embed_tokens.weight", [c["vocab_size"], h], scale=1.7)
    for l in range(c["num_hidden_layers"]):
        p = f"model.layers.{l}"
        add(f"{p}.input_layernorm.weight", [h], mean=1.0, scale=0.4)
        for name, rows, gain in (("q", q, 1.5), ("k", kv, 1.5), ("v", kv, 1.2)):
            add(f"{p}.self_attn.{name}_proj.weight", [rows, h], gain)
            if c["model_type"] == "qwen2_moe":
                add(f"{p}.self_attn.{name}_proj.bias", [rows], scale=0.4)
        if c["model_type"] == "qwen3_moe":
            add(f"{p}.self_attn.q_norm.weight", [d], mean=1.0, scale=0.4)
            add(f"{p}.self_attn.k_norm.weight", [d], mean=1.0, scale=0.4)
        add(f"{p}.self_attn.o_proj.weight", [h, q], 1.2)
        add(f"{p}.post_attention_layernorm.weight", [h], mean=1.0, scale=0.4)
        experts, inner = at(c["num_experts"], l), c["moe_intermediate_size"]
        # one router after the other
        add(f"{p}.mlp.gate.weight", [experts * c.get("num_expert_iterations", 1), h], 2.0)
        for e in range(experts):
            for name, shape in (("gate", [inner, h]), ("up", [inner, h]), ("down", [h, inner])):
                add(f"{p}.mlp.experts.{e}.{name}_proj.weight", shape, 1.5)
        if shared := c.get("shared_expert_intermediate_size"):
            for name, shape in (("gate", [shared, h]), ("up", [shared, h]), ("down", [h, shared])):
                add(f"{p}.mlp.shared_expert.{name}_proj.weight", shape, 1.5)
            add(f"{p}.mlp.shared_expert_gate.weight", [1, h], 1.5)
    add("model.norm.weight", [h], mean=1.0, scale=0.4)
    add("lm_head.weight", [c["vocab_size"], h], 2.0)
    return out


def norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, theta):
    """[tokens, heads, d]: dimension i with i + d / 2."""
    t, _, d = x.shape
    angle = torch.arange(t).double()[:, None] * theta ** (-torch.arange(0, d, 2).double() / d)
    cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
    a, b = x[..., : d // 2], x[..., d // 2:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def network(x, w, name):
    return F.linear(F.silu(F.linear(x, w[f"{name}.gate_proj.weight"])) * F.linear(x, w[f"{name}.up_proj.weight"]),
                    w[f"{name}.down_proj.weight"])


def choose(c, layer, scores):
    """One token: its experts, best first."""
    rule, most = c.get("expert_selection", {}), at(c["num_experts_per_tok"], layer)
    chosen, total = [], 0.0
    for e in sorted(range(len(scores)), key=lambda e: -scores[e]):
        full = len(chosen) == most
        if rule.get("type") == "top_p":
            full |= total >= rule["p"]
        if rule.get("type") == "threshold":
            full |= bool(chosen) and scores[e] < rule["min_score"]
        if full:
            break
        chosen.append(e)
        total += float(scores[e])
    return chosen


def experts(c, w, layer, x, routing):
    """The iterated part of one layer on [tokens, hidden]."""
    p, count = f"model.layers.{layer}.mlp", at(c["num_experts"], layer)
    for iteration in range(c.get("num_expert_iterations", 1)):
        router = w[f"{p}.gate.weight"][iteration * count:(iteration + 1) * count]
        result, rows = torch.zeros_like(x), []
        for t, scores in enumerate(F.linear(x, router).softmax(-1)):
            chosen = choose(c, layer, scores.tolist())
            weights = scores[chosen]
            if c["norm_topk_prob"]:
                weights = weights / weights.sum()
            rows.append((chosen, weights.tolist()))
            for e, weight in zip(chosen, weights):
                result[t] += weight * network(x[t], w, f"{p}.experts.{e}")
        if "shared_expert_intermediate_size" in c:
            result += torch.sigmoid(F.linear(x, w[f"{p}.shared_expert_gate.weight"])) * network(x, w, f"{p}.shared_expert")
        routing.append((layer, rows))
        x = x + result if c.get("expert_inner_residual") else result
    return x


@torch.no_grad()
def run(c, w, ids):
    eps, d, heads, kv = c["rms_norm_eps"], c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    x, n, routing = w["model.embed_tokens.weight"][ids], len(ids), []
    for l in range(c["num_hidden_layers"]):
        p = f"model.layers.{l}"
        a = norm(x, w[f"{p}.input_layernorm.weight"], eps)
        q, k, v = (F.linear(a, w[f"{p}.self_attn.{s}_proj.weight"], w.get(f"{p}.self_attn.{s}_proj.bias")).view(n, -1, d) for s in "qkv")
        if c["model_type"] == "qwen3_moe":
            q, k = norm(q, w[f"{p}.self_attn.q_norm.weight"], eps), norm(k, w[f"{p}.self_attn.k_norm.weight"], eps)
        q, k = rotate(q, c["rope_theta"]), rotate(k, c["rope_theta"])
        k, v = k.repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
        scores = torch.einsum("thd,shd->hts", q, k) / d ** 0.5
        scores = scores.masked_fill(torch.triu(torch.ones(n, n, dtype=torch.bool), 1), float("-inf")).softmax(-1)
        x = x + F.linear(torch.einsum("hts,shd->thd", scores, v).reshape(n, -1), w[f"{p}.self_attn.o_proj.weight"])
        x = x + experts(c, w, l, norm(x, w[f"{p}.post_attention_layernorm.weight"], eps), routing)
    return F.linear(norm(x, w["model.norm.weight"], eps), w["lm_head.weight"]), routing


def choices(routing):
    return [[sorted(row[0]) for row in rows] for _, rows in routing]


def reference(name, c, w, seed):
    tokens = [int(t) for t in np.random.default_rng(seed).integers(0, c["vocab_size"] - 1, size=N_TOKENS)]
    logits, routing = run(c, w, tokens)
    lengths = {len(row[0]) for _, rows in routing for row in rows}
    if "expert_selection" in c and len(lengths) < 2:
        return None, None
    g = torch.Generator().manual_seed(seed)

    def noisy(ids):
        return run(c, {k: v * (1 + TOLERANCE * (2 * torch.rand(v.shape, generator=g) - 1)) for k, v in w.items()}, ids)

    if any(choices(noisy(tokens)[1]) != choices(routing) for _ in range(3)):
        return None, None
    seq = tokens[:N_PROMPT]
    for _ in range(N_GREEDY):
        seq = seq + [int(run(c, w, seq)[0][-1].argmax())]
    continuation = seq[N_PROMPT:]
    if len(set(continuation)) < 5:
        return None, None
    wanted = choices(run(c, w, seq)[1])
    for _ in range(3):
        l, r = noisy(seq)
        if choices(r) != wanted or l[N_PROMPT - 1:-1].argmax(-1).tolist() != continuation:
            return None, None
    layers = [{"layer": l, "experts": [row[0] for row in rows], "weights": [[float(f"{x:.7g}") for x in row[1]] for row in rows]}
              for l, rows in routing]
    ref = {"model": name, "seed": seed, "tokens": tokens, "n_vocab": c["vocab_size"], "routing": layers,
           "greedy": {"prompt": tokens[:N_PROMPT], "tokens": continuation}}
    return ref, logits.numpy().astype("<f4")


def main(out, wanted):
    torch.set_num_threads(1)
    for name, c in MODELS.items():
        if wanted and name not in wanted:
            continue
        tensors = tensors_of(c)
        for seed in range(1, 2000):
            w = {t["name"]: values(t, seed) for t in tensors}
            ref, logits = reference(name, c, w, seed)
            if ref:
                break
        else:
            sys.exit(f"{name}: no seed found")
        if "expert_selection" in c:
            by_layer = [[len(row) for r in ref["routing"] if r["layer"] == l for row in r["experts"]] for l in range(c["num_hidden_layers"])]
            c = dict(c, num_experts_per_tok_mean=[round(float(np.mean(n)), 3) for n in by_layer])
        d = Path(out) / name
        d.mkdir(parents=True, exist_ok=True)
        (d / "config.json").write_text(json.dumps(c, indent=1) + "\n")
        write_lines(d / "weights.json", {"seed": seed, "sum": check_sum(w)}, tensors)
        logits.tofile(d / "logits.f32")
        (d / "reference.json").write_text(json.dumps(ref, separators=(",", ":")) + "\n")
        print(f"{name}: seed {seed}, logits rms {np.sqrt((logits ** 2).mean()):.3f}, {c.get('num_experts_per_tok_mean')}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
