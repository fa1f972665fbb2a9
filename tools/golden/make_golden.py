#!/usr/bin/env python3
"""Tiny random MoE checkpoints with reference outputs, one per family.

usage: make_golden.py OUT_DIR [family ...]       (GOLDEN_F32_GGUF=DIR also writes DIR/<family>-f32.gguf, not for the repository)

OUT_DIR/<family>/
  config.json, model.safetensors   as on the hub: classic per-expert names, bf16
  model-bf16.gguf                  the same weights for llama.cpp (2-D and 3-D BF16; norms, biases, router F32)
  reference.json                   tokens, routing per layer, greedy continuation
  logits.f32                       [32, vocab] float32 little-endian
Reference: transformers, float32 arithmetic on the bf16 weights, eager attention, one pass without a cache.
Seeds are searched so that no routing decision and no greedy step is close to a tie.
"""
import json, os, sys
import numpy as np
import torch
import gguf
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

N_TOKENS, N_PROMPT, N_GREEDY, MIN_GAP = 32, 12, 16, 0.03
VOCAB, HIDDEN, LAYERS, HEADS = 96, 32, 2, 4

COMMON = dict(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
              hidden_act="silu", initializer_range=0.02, max_position_embeddings=256, tie_word_embeddings=False,
              attention_dropout=0.0, use_cache=True, output_router_logits=False, router_aux_loss_coef=0.001,
              bos_token_id=95, eos_token_id=95, torch_dtype="bfloat16")
FAMILIES = {
    # head_dim * heads != hidden; q/k norm per head; renormalised top-2 of 6
    "qwen3moe": dict(COMMON, architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_key_value_heads=2, head_dim=16,
                     intermediate_size=64, moe_intermediate_size=40, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True,
                     decoder_sparse_step=1, mlp_only_layers=[], attention_bias=False, rms_norm_eps=1e-6, rope_theta=1000000.0,
                     rope_scaling=None, sliding_window=None, use_sliding_window=False),
    # q/k norm over the full width; top-3 of 8 not renormalised
    "olmoe": dict(COMMON, architectures=["OlmoeForCausalLM"], model_type="olmoe", num_key_value_heads=4,
                  intermediate_size=24, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False, attention_bias=False,
                  clip_qkv=None, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None),
    # softmax over the chosen two of 5; block_sparse_moe names; q/k rows permuted in the GGUF
    "mixtral": dict(COMMON, architectures=["MixtralForCausalLM"], model_type="mixtral", num_key_value_heads=2,
                    intermediate_size=48, num_local_experts=5, num_experts_per_tok=2, router_jitter_noise=0.0,
                    rms_norm_eps=1e-5, rope_theta=500000.0, sliding_window=None),
    # q/k/v biases, sigmoid-gated shared expert, top-3 of 6 not renormalised; rope_parameters instead of rope_theta
    "qwen2moe": dict(COMMON, architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe", num_key_value_heads=2,
                     intermediate_size=72, moe_intermediate_size=24, shared_expert_intermediate_size=56, num_experts=6,
                     num_experts_per_tok=3, norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[], qkv_bias=True,
                     rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
                     sliding_window=None, use_sliding_window=False, max_window_layers=2),
}
FAMILIES["qwen2moe"].pop("torch_dtype")
FAMILIES["qwen2moe"]["dtype"] = "bfloat16"  # as transformers 5 writes it


def head_dim(c):
    return c.get("head_dim") or HIDDEN // HEADS


def n_experts(c):
    return c.get("num_experts") or c["num_local_experts"]


def make_weights(fam, c, seed):
    """Weights under their hub names, bf16."""
    g = torch.Generator().manual_seed(seed)
    w = {}

    def mat(name, out, inp, gain=1.0):
        w[name] = torch.randn(out, inp, generator=g) * (gain / inp ** 0.5)

    def norm(name, n):
        w[name] = 1.0 + 0.25 * torch.randn(n, generator=g)

    def bias(name, n):
        w[name] = 0.3 * torch.randn(n, generator=g)

    hd, kv = head_dim(c), c["num_key_value_heads"]
    w["model.embed_tokens.weight"] = torch.randn(VOCAB, HIDDEN, generator=g)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        a = p + "self_attn."
        mat(a + "q_proj.weight", HEADS * hd, HIDDEN, 1.5)
        mat(a + "k_proj.weight", kv * hd, HIDDEN, 1.5)
        mat(a + "v_proj.weight", kv * hd, HIDDEN)
        mat(a + "o_proj.weight", HIDDEN, HEADS * hd)
        if fam == "qwen2moe":
            bias(a + "q_proj.bias", HEADS * hd)
            bias(a + "k_proj.bias", kv * hd)
            bias(a + "v_proj.bias", kv * hd)
        if fam == "qwen3moe":
            norm(a + "q_norm.weight", hd)
            norm(a + "k_norm.weight", hd)
        if fam == "olmoe":
            norm(a + "q_norm.weight", HEADS * hd)
            norm(a + "k_norm.weight", kv * hd)
        norm(p + "input_layernorm.weight", HIDDEN)
        norm(p + "post_attention_layernorm.weight", HIDDEN)
        moe = p + ("block_sparse_moe." if fam == "mixtral" else "mlp.")
        mat(moe + "gate.weight", n_experts(c), HIDDEN, 1.5)
        gate, up, down = ("w1", "w3", "w2") if fam == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        ff = c.get("moe_intermediate_size") or c["intermediate_size"]
        for e in range(n_experts(c)):
            x = f"{moe}experts.{e}."
            mat(x + gate + ".weight", ff, HIDDEN, 1.5)
            mat(x + up + ".weight", ff, HIDDEN, 1.5)
            mat(x + down + ".weight", HIDDEN, ff, 1.5)
        if fam == "qwen2moe":
            sff = c["shared_expert_intermediate_size"]
            x = moe + "shared_expert."
            mat(x + "gate_proj.weight", sff, HIDDEN)
            mat(x + "up_proj.weight", sff, HIDDEN)
            mat(x + "down_proj.weight", HIDDEN, sff)
            mat(moe + "shared_expert_gate.weight", 1, HIDDEN, 1.5)
    norm("model.norm.weight", HIDDEN)
    mat("lm_head.weight", VOCAB, HIDDEN, 2.0)
    return {k: v.to(torch.bfloat16).contiguous() for k, v in w.items()}


def load(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    for k in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info.get(k), (k, info[k])
    return model.eval()


def routers(model):
    r = [m for _, m in model.named_modules() if type(m).__name__.endswith("Router")]
    assert len(r) == LAYERS, [type(m).__name__ for m in model.modules()]
    return r


@torch.no_grad()
def run(model, ids):
    """Logits and, per layer, what the router returned: (logits, weights as used, expert ids)."""
    got, hooks = [], []
    for r in routers(model):
        hooks.append(r.register_forward_hook(lambda m, i, o: got.append(tuple(t.detach().clone() for t in o))))
    out = model(torch.tensor([ids]), use_cache=False).logits[0]
    for h in hooks:
        h.remove()
    return out, got


def reference(fam, c, model, seed):
    rng = np.random.default_rng(seed)
    tokens = [int(t) for t in rng.integers(0, VOCAB - 1, size=N_TOKENS)]
    k, ne = c["num_experts_per_tok"], n_experts(c)
    logits, got = run(model, tokens)
    gap, layers = 1e9, []
    for rl, rw, ri in got:
        assert rw.shape == ri.shape == (N_TOKENS, k), (rw.shape, ri.shape)
        p = rl.softmax(-1)
        top = p.gather(1, ri)
        want = top / top.sum(-1, keepdim=True) if fam in ("qwen3moe", "mixtral") else top
        assert torch.allclose(want, rw, atol=1e-6), fam
        s = rl.sort(-1, descending=True).values
        gap = min(gap, float((s[:, k - 1] - s[:, k]).min()))
        o = rw.argsort(-1, descending=True)
        layers.append({"experts": ri.gather(1, o).tolist(), "weights": rw.gather(1, o).tolist()})
    seq, ggap = tokens[:N_PROMPT], 1e9
    for _ in range(N_GREEDY):
        l, gg = run(model, seq)
        for rl, _, _ in gg:
            s = rl[-1].sort(descending=True).values
            gap = min(gap, float(s[k - 1] - s[k]))
        t = l[-1].sort(descending=True)
        ggap = min(ggap, float(t.values[0] - t.values[1]))
        seq = seq + [int(t.indices[0])]
    used = {e for l in layers for row in l["experts"] for e in row}
    ref = {"family": fam, "seed": seed, "tokens": tokens, "n_vocab": VOCAB, "num_layers": LAYERS, "num_experts": ne, "experts_per_token": k,
           "router_min_gap": gap, "greedy_min_gap": ggap, "routing": layers,
           "greedy": {"prompt": tokens[:N_PROMPT], "tokens": seq[N_PROMPT:]}}
    good = gap > MIN_GAP and ggap > MIN_GAP and len(used) == ne and len(set(seq[N_PROMPT:])) > 6
    return ref, logits.numpy().astype("<f4"), good


def permute(w, heads):
    """Row order of q/k in llama-architecture GGUFs (interleaved rotary pairs)."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path, fam, c, w, dtype):
    arch = {"mixtral": "llama"}.get(fam, fam)
    g = gguf.GGUFWriter(path, arch)
    hd = head_dim(c)
    g.add_name(f"golden-{fam}")
    g.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == gguf.GGMLQuantizationType.BF16 else gguf.LlamaFileType.ALL_F32)
    g.add_context_length(c["max_position_embeddings"])
    g.add_embedding_length(HIDDEN)
    g.add_block_count(LAYERS)
    g.add_feed_forward_length(c["intermediate_size"])
    g.add_head_count(HEADS)
    g.add_head_count_kv(c["num_key_value_heads"])
    g.add_rope_freq_base(c.get("rope_theta") or c["rope_parameters"]["rope_theta"])
    g.add_layer_norm_rms_eps(c["rms_norm_eps"])
    g.add_expert_count(n_experts(c))
    g.add_expert_used_count(c["num_experts_per_tok"])
    if "moe_intermediate_size" in c:
        g.add_expert_feed_forward_length(c["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in c:
        g.add_expert_shared_feed_forward_length(c["shared_expert_intermediate_size"])
    if fam == "qwen3moe":
        g.add_key_length(hd)
        g.add_value_length(hd)
    if fam == "mixtral":
        g.add_rope_dimension_count(hd)
        g.add_vocab_size(VOCAB)
    # dummy byte-level tokenizer: printable ASCII without '~', the space letter, one merge, one control token
    toks = [chr(x) for x in range(33, 126)] + ["\u0120", "th", "<|endoftext|>"]
    assert len(toks) == VOCAB
    g.add_tokenizer_model("gpt2")
    g.add_tokenizer_pre("qwen2")
    g.add_token_list(toks)
    g.add_token_types([gguf.TokenType.NORMAL] * (VOCAB - 1) + [gguf.TokenType.CONTROL])
    g.add_token_merges(["t h"])
    g.add_bos_token_id(95)
    g.add_eos_token_id(95)
    g.add_add_bos_token(False)

    def add(name, t, f32=False):
        a = t.float().numpy()
        if a.ndim == 1 or f32 or dtype == gguf.GGMLQuantizationType.F32:
            g.add_tensor(name, np.ascontiguousarray(a, dtype=np.float32))
        else:
            g.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(a, dtype=np.float32), dtype), raw_dtype=dtype)

    add("token_embd.weight", w["model.embed_tokens.weight"])
    add("output_norm.weight", w["model.norm.weight"])
    add("output.weight", w["lm_head.weight"])
    for i in range(LAYERS):
        p, b = f"model.layers.{i}.", f"blk.{i}."
        add(b + "attn_norm.weight", w[p + "input_layernorm.weight"])
        add(b + "ffn_norm.weight", w[p + "post_attention_layernorm.weight"])
        for x, h in (("q", HEADS), ("k", c["num_key_value_heads"]), ("v", 0)):
            t = w[f"{p}self_attn.{x}_proj.weight"]
            add(f"{b}attn_{x}.weight", permute(t, h) if fam == "mixtral" and h else t)
            for hub, ours in ((f"{x}_proj.bias", f"attn_{x}.bias"), (f"{x}_norm.weight", f"attn_{x}_norm.weight")):
                if f"{p}self_attn.{hub}" in w:
                    add(b + ours, w[f"{p}self_attn.{hub}"])
        add(b + "attn_output.weight", w[p + "self_attn.o_proj.weight"])
        moe = p + ("block_sparse_moe." if fam == "mixtral" else "mlp.")
        add(b + "ffn_gate_inp.weight", w[moe + "gate.weight"], f32=True)
        names = {"gate": "w1", "up": "w3", "down": "w2"} if fam == "mixtral" else {x: x + "_proj" for x in ("gate", "up", "down")}
        for x, hub in names.items():
            add(f"{b}ffn_{x}_exps.weight", torch.stack([w[f"{moe}experts.{e}.{hub}.weight"] for e in range(n_experts(c))]))
        if fam == "qwen2moe":
            for x in ("gate", "up", "down"):
                add(f"{b}ffn_{x}_shexp.weight", w[f"{moe}shared_expert.{x}_proj.weight"])
            add(b + "ffn_gate_inp_shexp.weight", w[moe + "shared_expert_gate.weight"].squeeze(0))
    g.write_header_to_file()
    g.write_kv_data_to_file()
    g.write_tensors_to_file()
    g.close()


def main(out, fams):
    torch.set_num_threads(1)
    for fam in fams or FAMILIES:
        c, d = FAMILIES[fam], f"{out}/{fam}"
        os.makedirs(d, exist_ok=True)
        with open(f"{d}/config.json", "w") as f:
            json.dump(c, f, indent=1)
            f.write("\n")
        for seed in range(1, 400):
            w = make_weights(fam, c, seed)
            save_file(w, f"{d}/model.safetensors", metadata={"format": "pt"})
            ref, logits, good = reference(fam, c, load(d), seed)
            if good:
                break
        else:
            sys.exit(f"{fam}: no seed found")
        # transformers itself writes the same names back
        if os.environ.get("GOLDEN_CHECK_SAVE"):
            tmp = os.environ["GOLDEN_CHECK_SAVE"] + "/" + fam
            AutoModelForCausalLM.from_pretrained(d, dtype=torch.bfloat16).save_pretrained(tmp)
            with safe_open(f"{tmp}/model.safetensors", "pt") as f:
                names = set(f.keys())
                print(fam, "save_pretrained gives the same names and values:", names == set(w) and all(torch.equal(f.get_tensor(k), w[k]) for k in w))
        logits.tofile(f"{d}/logits.f32")
        with open(f"{d}/reference.json", "w") as f:
            json.dump(ref, f)
            f.write("\n")
        write_gguf(f"{d}/model-bf16.gguf", fam, c, w, gguf.GGMLQuantizationType.BF16)
        if os.environ.get("GOLDEN_F32_GGUF"):
            write_gguf(f"{os.environ['GOLDEN_F32_GGUF']}/{fam}-f32.gguf", fam, c, w, gguf.GGMLQuantizationType.F32)
        size = sum(os.path.getsize(f"{d}/{x}") for x in os.listdir(d))
        print(f"{fam}: seed {seed} router gap {ref['router_min_gap']:.4f} greedy gap {ref['greedy_min_gap']:.4f} logits rms {np.sqrt((logits**2).mean()):.3f}, {size} bytes")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
