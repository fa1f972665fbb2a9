#!/usr/bin/env python3
"""Writes configs/models/*.toml from a table of published geometries.

    python3 tools/configs/make_models.py [DATA]        # DATA defaults to ../shared/data beside the repository

DATA holds models.json (one row per model, with its source) and model_configs/*.json (copies of Hugging Face config.json).
What neither says (RoPE base and norm epsilon of a few models, routing details) is written below, from the model's
implementation in transformers or llama.cpp; recalled values are named in the file's note. Layers whose attention cannot be
described exactly become `plan_only` parts with the right sizes.
"""
import json
import math
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARCHITECTURES = {  # model_type -> general.architecture of GGUF files
    "minimax_m2": "minimax-m2", "minimax_m3": "minimax-m3", "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe",
    "qwen3_5_moe_text": "qwen35moe", "qwen3_next": "qwen3next", "mimo_v2_flash": "mimo2", "deepseek": "deepseek",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "deepseek_v32": "deepseek32", "deepseek_v4": "deepseek4",
    "kimi_k2": "deepseek2", "kimi_linear": "kimi-k3", "gemma4_text": "gemma4", "llama4_text": "llama4", "mixtral": "llama",
    "nemotron_h": "nemotron_h_moe", "gpt_oss": "gpt-oss", "step3p7": "step35", "glm_moe_dsa": "glm-dsa", "glm4_moe": "glm4moe",
    "olmoe": "olmoe", "phimoe": "phimoe", "grinmoe": "grinmoe", "granitemoe": "granitemoe", "jamba": "jamba",
    "ernie4_5_moe": "ernie4_5-moe", "hunyuan_v1_moe": "hunyuan-moe", "dots1": "dots1", "bailing_moe_v2": "bailingmoe2",
}
# GGUF architectures whose q and k rows are stored for pairs (2i, 2i + 1).
INTERLEAVED = {"llama", "deepseek", "deepseek2", "ernie4_5-moe", "granitemoe", "llama4"}
# Models without a config copy: (rope_theta, norm eps, context if models.json has none), recalled or from transformers' defaults.
RECALLED = {
    "DeepSeek-V2": (10000, 1e-6, 163840), "GLM-4.5": (1000000, 1e-5, None), "Qwen3-Next-80B-A3B-Instruct": (10000000, 1e-6, None),
    "Moonlight-16B-A3B": (50000, 1e-5, None), "granite-3.1-3b-a800m-instruct": (5000000, 1e-6, None),
    "granite-3.1-1b-a400m-instruct": (5000000, 1e-6, 131072), "ERNIE-4.5-21B-A3B-PT": (500000, 1e-5, None),
    "ERNIE-4.5-300B-A47B-PT": (500000, 1e-5, None), "Hunyuan-A13B-Instruct": (10000, 1e-5, 262144),
    "dots.llm1.inst": (10000000, 1e-5, None), "Ling-mini-2.0": (600000, 1e-6, None), "Ling-1T (Ring-1T)": (600000, 1e-6, 32768),
}
RECALLED_YARN = {
    "DeepSeek-V2": {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                    "mscale_all_dim": 1.0},
}


class Model:
    """One row of models.json with its config.json, and what is made of them."""

    def __init__(self, row, config):
        self.row, self.config = row, config
        self.type = row["model_type"]
        self.h = row["hidden"]
        self.full_name = row["name"].split("/")[-1]
        self.notes = [row["note"]] if row.get("note") else []
        self.head = {}
        recalled = RECALLED.get(self.full_name)
        if config is None:
            self.theta, self.eps, context = recalled
            self.notes.append("RoPE base and norm epsilon from memory or from transformers' defaults")
        else:
            rope = config.get("rope_parameters") or {}
            self.theta = config.get("rope_theta") or rope.get("rope_theta") or 10000.0
            self.eps = next((config[k] for k in ("rms_norm_eps", "layernorm_epsilon", "norm_eps") if k in config), 1e-6)
            context = None
            scaling = (config.get("rope_scaling") or {})
            kind = scaling.get("rope_type") or scaling.get("type")
            if kind:
                self.notes.append(f"{kind} RoPE scaling is not described")
        self.context = row["max_positions"] or context
        if not row["max_positions"]:
            self.notes.append("context length from memory")
        if row.get("from_memory_fields"):
            self.notes.append("from memory: " + ", ".join(row["from_memory_fields"]))
        if self.get("num_nextn_predict_layers") or self.get("num_mtp_modules") or self.get("mtp_num_hidden_layers"):
            self.notes.append("multi-token prediction layers are left out")

    def get(self, key, default=None):
        value = (self.config or {}).get(key)
        return default if value is None else value

    @property
    def stem(self):
        """File name: lower case, without words that name a fine-tune or a checkpoint format."""
        s = re.sub(r" \(.*\)", "", self.full_name.lower())
        s = re.sub(r"^(nvidia|ai21)-", "", s)
        while True:
            t = re.sub(r"(-instruct|\.inst|-v0\.1|-bf16|-pt|-base|-0125)$", "", s)
            if t == s:
                return s
            s = t

    # ---- parts

    def rope(self, dim):
        rope = {"theta": float(self.theta), "rotary_dim": dim}
        if ARCHITECTURES[self.type] in INTERLEAVED:
            rope["pairing"] = "interleaved"
        return rope

    def gqa(self, qk_norm=None, bias=False, rotary=1.0, window=None):
        r = self.row
        part = {"kind": "gqa", "num_heads": r["heads"], "num_kv_heads": r["kv_heads"], "head_dim": r["head_dim"]}
        if bias:
            part["qkv_bias"] = True
        if qk_norm:
            part["qk_norm"] = qk_norm
        part["rope"] = self.rope(int(r["head_dim"] * rotary) // 2 * 2)
        if window:
            part["sliding_window"] = window
        return part

    def plan_only(self, name, weights, kv, state=0, window=None):
        part = {"kind": "plan_only", "name": name, "weight_elements": weights, "kv_elements_per_token": kv}
        if state:
            part["state_elements"] = state
        if window:
            part["sliding_window"] = window
        return part

    def gqa_sized(self, name, window=None, extra=0, heads=None, kv_heads=None, head_dim=None, v_matrix=True):
        """Grouped-query attention with something beside it: its sizes plus `extra` weights."""
        r = self.row
        heads, kv_heads, d = heads or r["heads"], kv_heads or r["kv_heads"], head_dim or r["head_dim"]
        matrices = 2 * heads * d + (2 if v_matrix else 1) * kv_heads * d
        return self.plan_only(name, matrices * self.h + extra, 2 * kv_heads * d, window=window)

    def mla(self):
        m = self.row["mla"]
        part = {"kind": "mla", "num_heads": self.row["heads"]}
        if m["q_lora_rank"]:
            part["q_lora_rank"] = m["q_lora_rank"]
        for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            part[key] = m[key]
        part["rope"] = {"theta": float(self.theta), "rotary_dim": m["qk_rope_head_dim"], "pairing": "interleaved"}
        yarn = self.get("rope_scaling") or RECALLED_YARN.get(self.full_name)
        if yarn:
            described = "yarn RoPE scaling is not described"
            self.notes = [n for n in self.notes if n != described] + ([] if self.config else ["RoPE scaling from memory"])
            # transformers, modeling_rope_utils.py and yarn_apply_mscale
            def magnitude(mscale):
                return 0.1 * mscale * math.log(yarn["factor"]) + 1.0
            part["rope"]["scaling"] = {
                "kind": "yarn", "factor": float(yarn["factor"]), "original_context": yarn["original_max_position_embeddings"],
                "beta_fast": float(yarn["beta_fast"]), "beta_slow": float(yarn["beta_slow"]),
                "attention_factor": magnitude(yarn["mscale"]) / magnitude(yarn["mscale_all_dim"]),
            }
            qk = m["qk_nope_head_dim"] + m["qk_rope_head_dim"]
            part["scale"] = float(f"{magnitude(yarn['mscale_all_dim']) ** 2 / math.sqrt(qk):.9g}")
        return part

    def mla_sized(self, name, extra=0, extra_kv=0):
        m, heads, h = self.row["mla"], self.row["heads"], self.h
        qk = m["qk_nope_head_dim"] + m["qk_rope_head_dim"]
        rank = m["q_lora_rank"]
        kv = m["kv_lora_rank"] + m["qk_rope_head_dim"]
        weights = h * rank + rank * heads * qk + h * kv + heads * m["kv_lora_rank"] * (m["qk_nope_head_dim"] + m["v_head_dim"])
        weights += heads * m["v_head_dim"] * h
        return self.plan_only(name, weights + extra, kv + extra_kv)

    def router(self, score="softmax", normalize=True, scale=None, bias=False):
        part = {"score": score, "normalize_topk": normalize}
        scale = scale if scale is not None else self.row.get("routed_scaling_factor")
        if scale and scale != 1.0:
            part["scale"] = float(scale)
        if bias:
            part["selection_bias"] = True
        groups = self.row.get("expert_groups")
        if groups and groups > 1:
            part["groups"] = [groups, self.row["topk_group"]]
            if score == "softmax":
                part["group_score"] = "max"
        return part

    def moe(self, router, sigmoid_gate=False, gated=True, latent=None, parallel_dense=None):
        r = self.row
        part = {"kind": "moe", "num_experts": r["experts"], "experts_per_token": r["top_k"], "inner_size": r["moe_intermediate"]}
        if not gated:
            part["gated"] = False
        if latent:
            part["latent_size"] = latent
        part["router"] = router
        if r["shared_experts"] and not parallel_dense:
            part["shared"] = {"count": r["shared_experts"], "inner_size": r["shared_intermediate"]}
            if sigmoid_gate:
                part["shared"]["sigmoid_gate"] = True
        if parallel_dense:
            part["parallel_dense_inner_size"] = parallel_dense
        return part

    def dense(self, inner=None):
        return {"kind": "dense", "inner_size": inner or self.row["dense_intermediate"]}

    def after_dense(self, attention, moe, dense=None):
        """The common layout: some dense layers, then routed ones."""
        first = self.row["first_dense_layers"]
        return [(attention, (dense or self.dense()) if i < first else moe) for i in range(self.row["layers"])]

    # ---- layers by model_type

    def layers(self):
        return getattr(self, "layers_" + self.type)()

    def layers_qwen3_moe(self):
        return self.after_dense(self.gqa("per_head"), self.moe(self.router()))

    def layers_qwen2_moe(self):
        return self.after_dense(self.gqa(bias=True), self.moe(self.router(normalize=False), sigmoid_gate=True))

    def layers_olmoe(self):
        return self.after_dense(self.gqa("full_width"), self.moe(self.router(normalize=False)))

    def layers_mixtral(self):
        return self.after_dense(self.gqa(), self.moe(self.router()))

    def layers_deepseek(self):
        return self.after_dense(self.gqa(), self.moe(self.router(normalize=False)))

    def layers_minimax_m2(self):
        return self.after_dense(self.gqa("full_width", rotary=0.5), self.moe(self.router("sigmoid", bias=True)))

    def layers_minimax_m3(self):
        s = self.get("sparse_attention_config")
        index = self.h * s["sparse_index_dim"] * (s["sparse_num_index_heads"] + 1)
        sparse = self.gqa_sized("block-sparse grouped-query attention", extra=index)
        sparse["kv_elements_per_token"] += s["sparse_index_dim"]
        full = self.gqa("per_head", rotary=0.5)
        moe, dense = self.moe(self.router("sigmoid", bias=True)), self.dense(self.get("dense_intermediate_size"))
        self.notes.append("the activation is a clamped SwiGLU")
        routed = self.get("moe_layer_freq")
        return [(sparse if on else full, moe if r else dense) for on, r in zip(s["sparse_attention_freq"], routed)]

    def gated_delta(self):
        """Qwen3-Next and 3.5: three layers of gated delta rule, then one of gated attention."""
        a, r = self.row["linear_attention"], self.row
        linear = {"kind": "delta_net", "num_key_heads": a["linear_num_key_heads"], "num_value_heads": a["linear_num_value_heads"],
                  "key_head_dim": a["linear_key_head_dim"], "value_head_dim": a["linear_value_head_dim"],
                  "conv_kernel": a["linear_conv_kernel_dim"]}
        if self.type == "qwen3_next":
            linear["fused_gates"] = True
        else:
            linear["value_heads"] = "tiled"
        full = {**self.gqa("per_head", rotary=0.25), "output_gate": True}
        moe = self.moe(self.router(), sigmoid_gate=True)
        every = r["full_attention_interval"]
        return [(full if i % every == every - 1 else linear, moe) for i in range(r["layers"])]

    layers_qwen3_next = layers_qwen3_5_moe_text = gated_delta

    def layers_mimo_v2_flash(self):
        c, h, heads = self.config, self.h, self.row["heads"]

        def part(name, kv_heads, qk, v, extra, window=None):
            weights = h * (heads * qk + kv_heads * (qk + v) + heads * v) + extra
            return self.plan_only(name, weights, kv_heads * (qk + v), window=window)

        full = part("grouped-query attention with narrow values", c["num_key_value_heads"], c["head_dim"], c["v_head_dim"], 0)
        sliding = part("sliding-window attention with sinks and narrow values", c["swa_num_key_value_heads"], c["swa_head_dim"],
                       c["swa_v_head_dim"], heads, c["sliding_window"])
        moe = self.moe(self.router("sigmoid", bias=True))
        pattern = zip(c["hybrid_layer_pattern"], c["moe_layer_freq"])
        return [(sliding if s else full, moe if routed else self.dense()) for s, routed in pattern]

    def layers_deepseek_v2(self):
        return self.after_dense(self.mla(), self.moe(self.router(normalize=False)))

    def layers_deepseek_v3(self):
        return self.after_dense(self.mla(), self.moe(self.router("sigmoid", bias=True)))

    layers_kimi_k2 = layers_deepseek_v3

    def sparse_latent(self):
        """Latent attention with an indexer that picks the positions to attend to (DeepSeek-V3.2, GLM-5)."""
        s, rank = self.row["sparse_attention"], self.row["mla"]["q_lora_rank"]
        heads, d = s["index_heads"], s["index_head_dim"]
        index = self.h * (heads + d) + rank * heads * d + 2 * d
        full = self.mla_sized("latent attention with sparse indexer", index, d)
        shared = self.mla_sized("latent attention with another layer's sparse indexer")
        kinds = self.get("indexer_types", ["full"] * self.row["layers"])
        moe = self.moe(self.router("sigmoid", bias=True))
        layers = self.after_dense(full, moe)
        return [(full if k == "full" else shared, ffn) for k, (_, ffn) in zip(kinds, layers)]

    layers_deepseek_v32 = layers_glm_moe_dsa = sparse_latent

    def layers_deepseek_v4(self):
        c, r, h = self.config, self.row, self.h
        heads, d, index_d = r["heads"], r["head_dim"], c["index_head_dim"]
        groups, o_rank, q_rank, window = c["o_groups"], c["o_lora_rank"], c["q_lora_rank"], c["sliding_window"]
        base = h * (q_rank + d) + q_rank * heads * d + heads * d * o_rank + groups * o_rank * h + heads + q_rank + d
        streams = c["hc_mult"]
        base += 2 * streams * h * (2 + streams) * streams  # hyper-connections of attention and feed-forward part

        def part(ratio):
            if ratio == 0:
                return self.plan_only("sliding-window attention on one shared head", base, d, window=window)
            overlap = 2 if ratio == 4 else 1
            weights = base + 2 * h * overlap * d + overlap * d * ratio + d
            kv = d // ratio
            name = f"attention on keys compressed {ratio}:1"
            if ratio == 4:
                weights += h * c["index_n_heads"] + q_rank * c["index_n_heads"] * index_d + 4 * h * index_d
                kv += index_d // ratio
                name += " with sparse indexer"
            return self.plan_only(name, weights, kv, state=window * d)

        moe = self.moe(self.router("sqrt_softplus", bias=True))
        self.notes.append("the first layers route by a hash of the token; the cached window of uncompressed keys is counted as state")
        return [(part(ratio), moe) for ratio in c["compress_ratios"][: r["layers"]]]

    def layers_gemma4_text(self):
        c = self.config
        sliding = self.gqa_sized("sliding-window attention with value norm", window=c["sliding_window"])
        full = self.gqa_sized("attention with keys as values", kv_heads=c["num_global_key_value_heads"],
                              head_dim=c["global_head_dim"], v_matrix=False)
        moe = self.moe(self.router(), parallel_dense=c["intermediate_size"])
        self.notes.append("the activation is GELU; extra norms and scales are left out")
        return [(full if kind == "full_attention" else sliding, moe) for kind in c["layer_types"]]

    def layers_llama4_text(self):
        c = self.config
        local = {**self.gqa("unweighted" if c["use_qk_norm"] else None), "chunk": c["attention_chunk_size"]}
        if c["use_qk_norm"]:
            local["qk_norm_after_rope"] = True
        scaling = c.get("rope_scaling")
        if scaling:
            self.notes = [n for n in self.notes if n != "llama3 RoPE scaling is not described"]
            local["rope"] = {**local["rope"], "scaling": {
                "kind": "llama3", "factor": float(scaling["factor"]), "low_freq_factor": float(scaling["low_freq_factor"]),
                "high_freq_factor": float(scaling["high_freq_factor"]), "original_context": scaling["original_max_position_embeddings"]}}
        # Values that transformers has where the config says nothing.
        full = {**self.gqa(), "temperature": {"scale": c.get("attn_scale", 0.1), "period": int(c.get("floor_scale", 8192))}}
        del full["rope"]
        moe = {**self.moe(self.router("sigmoid", normalize=False)), "weights_on_input": True}
        dense = self.dense(c["intermediate_size_mlp"])
        step = c["interleave_moe_layer_step"]
        return [(full if i % 4 == 3 else local, moe if i % step == step - 1 else dense) for i in range(self.row["layers"])]

    def layers_kimi_linear(self):
        c, h = self.config, self.h
        a = c["linear_attn_config"]
        d, heads, kernel = a["head_dim"], a["num_heads"], a["short_conv_kernel_size"]
        inner = heads * d
        weights = h * (5 * inner + d + heads) + d * inner + 3 * inner * kernel + inner + heads + d
        linear = self.plan_only("Kimi delta attention", weights, 0, heads * d * d + 3 * inner * (kernel - 1))
        gate = h * self.row["heads"] * self.row["mla"]["v_head_dim"]
        full = self.mla_sized("latent attention with output gate, without positions", gate)
        moe = self.moe(self.router("sigmoid", bias=True), latent=c["routed_expert_hidden_size"])
        layers = self.after_dense(full, moe)
        return [(full if i + 1 in a["full_attn_layers"] else linear, ffn) for i, (_, ffn) in enumerate(layers)]

    def layers_nemotron_h(self):
        c, h = self.config, self.h
        heads, d, groups, n = c["mamba_num_heads"], c["mamba_head_dim"], c["n_groups"], c["ssm_state_size"]
        inner = heads * d
        conv = inner + 2 * groups * n
        weights = h * (2 * inner + 2 * groups * n + heads) + conv * (c["conv_kernel"] + 1) + 3 * heads + inner + inner * h
        mamba = self.plan_only("Mamba-2", weights, 0, heads * d * n + conv * (c["conv_kernel"] - 1))
        attention = self.gqa_sized("attention without positions")
        nothing = self.plan_only("none", 0, 0)
        moe = self.moe(self.router("sigmoid", bias=True), gated=False, latent=c.get("moe_latent_size"))
        self.notes.append("each layer is a mixer or experts, not both; the activation is the square of ReLU")
        kinds = {"M": (mamba, {"kind": "none"}), "*": (attention, {"kind": "none"}), "E": (nothing, moe)}
        names = {"mamba": "M", "attention": "*", "moe": "E"}
        pattern = c.get("hybrid_override_pattern") or [names[k] for k in c["layers_block_type"]]
        return [kinds[k] for k in pattern]

    def layers_gpt_oss(self):
        c = self.config
        yarn = c["rope_scaling"]
        self.notes = [n for n in self.notes if n != "yarn RoPE scaling is not described"]

        def attention(window):
            part = self.gqa(bias=True, window=window)
            part["rope"]["scaling"] = {
                "kind": "yarn", "factor": float(yarn["factor"]), "original_context": yarn["original_max_position_embeddings"],
                "beta_fast": float(yarn["beta_fast"]), "beta_slow": float(yarn["beta_slow"]),
                "attention_factor": float(f"{0.1 * math.log(yarn['factor']) + 1.0:.9g}"), "truncate": yarn["truncate"],
            }
            return {**part, "output_bias": True, "sinks": True}

        moe = self.moe({**self.router(), "bias": True})
        # The steepness is a constant of the model's implementation.
        moe = {**moe, "expert_bias": True, "activation": {"kind": "clamped_swiglu", "alpha": 1.702, "limit": float(c["swiglu_limit"])}}
        parts = {"full_attention": attention(None), "sliding_attention": attention(c["sliding_window"])}
        return [(parts[kind], moe) for kind in c["layer_types"]]

    def layers_step3p7(self):
        c = self.config
        gate = self.h * self.row["heads"]
        parts = {"full_attention": self.gqa_sized("grouped-query attention with head gate", extra=gate),
                 "sliding_attention": self.gqa_sized("sliding-window attention with head gate", c["sliding_window"], gate)}
        moe = self.moe(self.router("sigmoid", scale=c["moe_router_scaling_factor"], bias=True))
        self.notes.append("the config copy states no other head count for sliding layers; RoPE base unknown")
        layers = self.after_dense(None, moe)
        return [(parts[kind], ffn) for kind, (_, ffn) in zip(c["layer_types"], layers)]

    def layers_phimoe(self):
        c = self.config
        window = c.get("sliding_window")
        part = {**self.gqa(bias=True, window=window if window and window < self.context else None), "output_bias": True}
        scaling = c.get("rope_scaling")
        if scaling:
            self.notes = [n for n in self.notes if n != "longrope RoPE scaling is not described"]
            part["rope"]["scaling"] = {
                "kind": "long_rope", "original_context": c["original_max_position_embeddings"],
                "short_divisors": scaling["short_factor"], "long_divisors": scaling["long_factor"],
                "short_attention_factor": scaling["short_mscale"], "long_attention_factor": scaling["long_mscale"]}
        self.head = {"norm": "layer", "output_bias": c["lm_head_bias"]}
        return self.after_dense(part, self.moe(self.router("sparse_mixer", normalize=False)))

    layers_grinmoe = layers_phimoe

    def layers_granitemoe(self):
        c = self.config
        if c is None:
            # The published Granite 3.1 models of both sizes.
            c = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625, "logits_scaling": 6.0}
            self.notes.append("factors on embedding, scores, residual stream and logits from memory")
        self.head = {"scales": {"embedding": c["embedding_multiplier"], "residual": c["residual_multiplier"],
                                "logits": float(f"{1.0 / c['logits_scaling']:.9g}")}}
        return self.after_dense({**self.gqa(), "scale": c["attention_multiplier"]}, self.moe(self.router()))

    def layers_jamba(self):
        c, h = self.config, self.h
        inner, n, rank, kernel = c["mamba_expand"] * h, c["mamba_d_state"], c["mamba_dt_rank"], c["mamba_d_conv"]
        weights = h * 2 * inner + inner * (kernel + 1) + inner * (rank + 2 * n) + rank * inner + inner + rank + 2 * n
        weights += inner * n + inner + inner * h
        mamba = self.plan_only("Mamba", weights, 0, inner * (n + kernel - 1))
        attention = self.gqa_sized("attention without positions")
        moe, dense = self.moe(self.router(normalize=False)), self.dense(c["intermediate_size"])

        def layer(i):
            mixer = attention if i % c["attn_layer_period"] == c["attn_layer_offset"] else mamba
            return mixer, moe if i % c["expert_layer_period"] == c["expert_layer_offset"] else dense

        return [layer(i) for i in range(self.row["layers"])]

    def layers_glm4_moe(self):
        # GLM-4.5 has query and key norms, Air does not; both rotate half of each head and have q, k and v biases.
        norm = "per_head" if self.config is None else None
        return self.after_dense(self.gqa(norm, bias=True, rotary=0.5), self.moe(self.router("sigmoid", bias=True)))

    def layers_ernie4_5_moe(self):
        return self.after_dense(self.gqa(), self.moe(self.router(bias=True)))

    def layers_hunyuan_v1_moe(self):
        part = {**self.gqa("per_head"), "qk_norm_after_rope": True}
        # "dynamic" scaling with an alpha raises the base once for all lengths (transformers, modeling_hunyuan_v1_moe.py).
        dim = self.row["head_dim"]
        part["rope"]["theta"] = float(f"{part['rope']['theta'] * 1000.0 ** (dim / (dim - 2)):.9g}")
        self.notes.append("alpha 1000 of the RoPE scaling, which is in the base, from memory")
        return self.after_dense(part, self.moe(self.router()))

    def layers_dots1(self):
        return self.after_dense(self.gqa("per_head"), self.moe(self.router("sigmoid", bias=True)))

    def layers_bailing_moe_v2(self):
        router = self.router("sigmoid", scale=2.5, bias=True)
        self.notes.append("half of each head rotated, per-head norms, routing scale 2.5: from memory")
        return self.after_dense(self.gqa("per_head", rotary=0.5), self.moe(router))


# ---- TOML


def scalar(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {scalar(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if isinstance(value, float):
        return repr(value) if value < 1e16 else f"{value:e}"
    return str(value)


def table(header, fields):
    return f"[{header}]\n" + "".join(f"{k} = {scalar(v)}\n" for k, v in fields.items())


def runs(items):
    out = []
    for item in items:
        if out and out[-1][1] == item:
            out[-1][0] += 1
        else:
            out.append([1, item])
    return out


def groups(layers):
    """(repeat, layers) so that a repeated pattern of layers is written once: greedy, the pattern that covers most comes first."""
    out, i = [], 0
    while i < len(layers):
        best = (1, 1)  # repeats, period
        for period in range(1, 13):
            pattern = layers[i : i + period]
            n = 1
            while layers[i + n * period : i + (n + 1) * period] == pattern:
                n += 1
            if n > 1 and n * period > best[0] * best[1]:
                best = (n, period)
        n, period = best
        out.append((n, layers[i : i + period]))
        i += n * period
    return out


def render(model):
    layers = model.layers()
    assert len(layers) == model.row["layers"], (model.full_name, len(layers))
    source = re.sub(r" ?\(?(see )?search index file ids? [0-9, ]+\)?", "", model.row["source"])
    source = source.replace("none found", "from memory").strip()
    text = "# Written by tools/configs/make_models.py.\n"
    head = {"name": model.full_name, "architecture": ARCHITECTURES[model.type], "hidden_size": model.h,
            "vocab_size": model.row["vocab"], "context_length": model.context, "norm_eps": model.eps}
    if model.row["tie_embeddings"]:
        head["tie_word_embeddings"] = True
    head |= {k: v for k, v in model.head.items() if v}
    head["source"] = source
    if model.notes:
        head["note"] = "; ".join(model.notes)
    text += "".join(f"{k} = {scalar(v)}\n" for k, v in head.items())
    for repeat, members in groups(layers):
        text += f"\n[[block]]\nrepeat = {repeat}\n"
        if len(members) == 1:
            attention, ffn = members[0]
            text += "\n" + table("block.attention", attention) + "\n" + table("block.ffn", ffn)
            continue
        for count, (attention, ffn) in runs(members):
            fields = {"repeat": count} if count > 1 else {}
            text += f"\n[[block.layer]]\n" + "".join(f"{k} = {scalar(v)}\n" for k, v in fields.items())
            text += f"attention = {scalar(attention)}\nffn = {scalar(ffn)}\n"
    return text


def nemotron_ultra(config):
    """The one config copy that models.json has no row for: its row, from the copy alone."""
    name = "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16"
    copies = "github.com/ai-dynamo/aiconfigurator aic-core/src/aiconfigurator_core/model_configs"
    return {
        "name": name.replace("--", "/"), "model_type": config["model_type"], "layers": len(config["layers_block_type"]),
        "first_dense_layers": None, "hidden": config["hidden_size"], "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"], "head_dim": config["head_dim"], "experts": config["n_routed_experts"],
        "top_k": config["num_experts_per_tok"], "moe_intermediate": config["moe_intermediate_size"], "dense_intermediate": None,
        "vocab": config["vocab_size"], "max_positions": config["max_position_embeddings"],
        "tie_embeddings": config["tie_word_embeddings"], "shared_experts": config["n_shared_experts"],
        "shared_intermediate": config["moe_shared_expert_intermediate_size"],
        "routed_scaling_factor": config["routed_scaling_factor"], "from_memory_fields": ["expert_matrices", "shared expert at full width"],
        "source": f"{copies}/{name}_config.json (copy of the Hugging Face config.json)",
    }


def main():
    data = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "data"
    out = ROOT / "configs" / "models"
    out.mkdir(parents=True, exist_ok=True)
    rows = json.loads((data / "models.json").read_text())["models"]
    ultra = data / "model_configs" / "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16.json"
    rows.append(nemotron_ultra(json.loads(ultra.read_text())))
    stems = set()
    for row in rows:
        path = data / "model_configs" / (row["name"].replace("/", "--") + ".json")
        config = json.loads(path.read_text()) if path.exists() else None
        if config is not None:
            config = config.get("text_config", config)
        model = Model(row, config)
        assert model.stem not in stems, model.stem
        stems.add(model.stem)
        (out / f"{model.stem}.toml").write_text(render(model))
    print(f"{len(stems)} files in {out}")


if __name__ == "__main__":
    main()
