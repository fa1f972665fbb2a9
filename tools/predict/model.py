#!/usr/bin/env python3
"""Reference implementation: decode / prefill / memory model of published llama.cpp-like MoE runs.
One command prints all figures: python model.py DATA_FOLDER [--ablate] [--sens]; writes predictions.json beside it."""
import json, re, sys, math, collections, os
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
import numpy as np
from scipy.optimize import least_squares
D = sys.argv[1].rstrip('/') + '/'
ROWS = json.load(open(D + 'published_runs.json'))
MODELS = {m['name']: m for m in json.load(open(D + 'models.json'))['models']}
GPUDB = {g['name']: g for g in json.load(open(D + 'hardware/hardware.json'))['gpus']['list']}
GIB = 2.0 ** 30

# ---------------------------------------------------------------- 1. models
NAME2KEY = [  # first match (substring of row.model) wins
    ('Smoothie-Qwen3-235B', 'Qwen/Qwen3-235B-A22B'), ('Qwen3-235B', 'Qwen/Qwen3-235B-A22B'),
    ('Qwen3-30B', 'Qwen/Qwen3-30B-A3B'), ('Qwen3-Coder-30B', 'Qwen/Qwen3-30B-A3B'),
    ('Qwen3-Coder-Next', 'Qwen/Qwen3-Next-80B-A3B-Instruct'), ('Qwen3-Next', 'Qwen/Qwen3-Next-80B-A3B-Instruct'),
    ('Qwen3.5-35B', 'Qwen/Qwen3.5-35B-A3B'), ('Qwen3.6-35B', 'Qwen/Qwen3.5-35B-A3B'),
    ('Qwen2-57B', 'Qwen/Qwen2-57B-A14B'),
    ('DeepSeek-V2-Lite', 'deepseek-ai/DeepSeek-V2-Lite'), ('DeepSeek-Coder-V2-Lite', 'deepseek-ai/DeepSeek-V2-Lite'),
    ('DeepSeek-V2', 'deepseek-ai/DeepSeek-V2'), ('DeepSeek', 'deepseek-ai/DeepSeek-V3'),
    ('Kimi-K2', 'moonshotai/Kimi-K2-Instruct'), ('gpt-oss-120b', 'openai/gpt-oss-120b'), ('gpt-oss-20b', 'openai/gpt-oss-20b'),
    ('Mixtral-8x22B', 'mistralai/Mixtral-8x22B-v0.1'), ('Mixtral-8x7B', 'mistralai/Mixtral-8x7B-v0.1'),
    ('Phi-3.5-MoE', 'microsoft/Phi-3.5-MoE-instruct'), ('MiniMax-M2', 'MiniMaxAI/MiniMax-M2.5'),
    ('Llama-4-Maverick', 'meta-llama/Llama-4-Maverick-17B-128E-Instruct'), ('Llama-4-Scout', 'meta-llama/Llama-4-Scout-17B-16E-Instruct'),
    ('Gemma-4-26B', 'google/gemma-4-26B-A4B'), ('GLM-4.5-Air', 'zai-org/GLM-4.5-Air'), ('GLM-4.5-355B', 'zai-org/GLM-4.5'), ('GLM-5.2', 'zai-org/GLM-5.2'),
]

class Geo: pass

def geometry(name):
    if not name: return None
    key = next((k for s, k in NAME2KEY if s in name), None)
    if key is None: return None
    m = MODELS[key]; g = Geo(); g.key = key
    h, L, hd, nh, nkv = m['hidden'], m['layers'], m['head_dim'], m['heads'], m['kv_heads']
    g.h, g.L, g.Lm, g.E, g.k, g.vocab = h, L, m['moe_layers'], m['experts'], m['top_k'], m['vocab']
    g.expert = m['params_per_expert'] if m.get('params_per_expert') else 3 * h * m['moe_intermediate']
    g.shared = 3 * h * (m['shared_intermediate'] or 0)          # per MoE layer
    g.router = h * m['experts']
    g.dense_layers = L - g.Lm
    g.dense_ffn = 3 * h * (m['dense_intermediate'] or 0) if g.dense_layers else 0
    g.arch = 'gqa'
    if m['attention'] == 'mla':
        a = m['mla']; q = a['q_lora_rank']; qd = a['qk_nope_head_dim'] + a['qk_rope_head_dim']; kl, r, v = a['kv_lora_rank'], a['qk_rope_head_dim'], a['v_head_dim']
        g.attn = [((h * q + q * nh * qd) if q else h * nh * qd) + h * (kl + r) + kl * nh * (a['qk_nope_head_dim'] + v) + nh * v * h] * L
        g.arch = 'mla'; g.kv_elems = kl + r                     # per token and layer (latent cache)
        g.att_flops = 2 * nh * (kl + r + kl)                    # per cached token and layer, absorbed form
        g.full_layers = L; g.window_layers = 0; g.window = 0
        g.lin_state = 0
    elif m['attention'].startswith('hybrid linear'):
        la = m['linear_attention']; kd = la['linear_num_key_heads'] * la['linear_key_head_dim']; vd = la['linear_num_value_heads'] * la['linear_value_head_dim']
        nfull = L // m['full_attention_interval']
        full = h * nh * hd * 2 + 2 * h * nkv * hd + nh * hd * h
        lin = h * (2 * kd + 2 * vd) + h * 2 * la['linear_num_value_heads'] + vd * h
        g.attn = [full] * nfull + [lin] * (L - nfull)
        g.arch = 'lin'; g.kv_elems = 2 * nkv * hd; g.att_flops = 4 * nh * hd
        g.full_layers = nfull; g.window_layers = 0; g.window = 0
        g.lin_state = (L - nfull) * la['linear_num_value_heads'] * la['linear_value_head_dim'] * la['linear_key_head_dim'] * 4 * 2
    else:
        g.attn = [2 * h * nh * hd + 2 * h * nkv * hd] * L
        g.kv_elems = 2 * nkv * hd; g.att_flops = 4 * nh * hd
        lt = m.get('layer_types') or {}
        g.window_layers = lt.get('sliding_attention', 0); g.full_layers = L - g.window_layers
        g.window = m.get('sliding_window') or 0; g.lin_state = 0
    g.attn_avg = sum(g.attn) / L
    g.head = h * g.vocab
    g.embed = 0 if m['tie_embeddings'] else h * g.vocab         # kept on the CPU, one row read per token
    g.nonexpert = sum(g.attn) + g.Lm * (g.shared + g.router) + g.dense_layers * g.dense_ffn + g.head + g.embed
    g.expert_total = g.Lm * g.E * g.expert
    g.dense_active = g.nonexpert - g.embed                      # weights read per token outside routed experts
    g.layer_dense = (sum(g.attn) + g.Lm * (g.shared + g.router) + g.dense_layers * g.dense_ffn) / L
    return g

# ---------------------------------------------------------------- 2. quantisation: (prefix, experts bpw, dense bpw, kind)
# kind: 'q' plain/legacy/K/MXFP4/ik-K formats; 'i' codebook i-quants (slow to decode on a CPU); 'f' 8/16 bit float
QUANT = [
    ('IQ4_XS experts', 4.25, 5.7, 'q'), ('q8_0 attn, IQ4_XS/IQ3_S', 3.9, 8.5, 'q'), ('UD-Q4_K_XL (MXFP4', 4.6, 7.5, 'q'), ('F16 (MXFP4', 4.25, 16.0, 'q'),
    ('MXFP4', 4.25, 8.5, 'q'), ('NVFP4', 4.5, 8.5, 'q'), ('THIREUS', 6.25, 8.5, 'q'), ('DQ4_K_R4', 5.2, 8.5, 'q'), ('mix-IQ6_K', 6.6, 8.5, 'q'),
    ('IQ2_K_R4', 2.7, 8.5, 'q'), ('IQ2_KL', 2.7, 8.5, 'q'), ('IQ3_KS', 3.35, 8.5, 'q'), ('IQ4_KS_R4', 4.5, 8.5, 'q'), ('IQ4_K_R4', 4.75, 8.5, 'q'),
    ('UD-IQ1', 1.7, 6.0, 'i'), ('IQ1_S_R4', 1.55, 8.5, 'q'), ('IQ1_S', 1.55, 6.0, 'i'), ('IQ2_XXS', 2.2, 6.0, 'i'), ('UD-IQ2_M', 2.7, 6.5, 'i'), ('IQ4_XS_R8', 4.25, 5.5, 'q'), ('UD-IQ4_XS', 4.4, 6.5, 'q'),
    ('IQ4_XS', 4.25, 5.5, 'q'), ('IQ4_NL', 4.5, 6.0, 'q'),
    ('UD-Q2_K_XL', 2.75, 5.2, 'q'), ('~UD-Q2_K_XL', 2.9, 6.0, 'q'), ('UD-Q3_K_XL', 3.5, 6.0, 'q'), ('UD-Q4_K_XL', 4.6, 5.5, 'q'), ('UD-Q4_K_M', 4.75, 6.5, 'q'), ('UD-Q5_K_M', 5.6, 7.0, 'q'), ('UD ~4.5', 4.5, 6.5, 'q'),
    ('Q2_K_L', 3.0, 5.0, 'q'), ('Q2_K', 2.95, 4.5, 'q'), ('Q2', 2.95, 4.5, 'q'), ('Q3_K_M', 3.85, 4.8, 'q'), ('Q4_K_XL', 4.6, 6.5, 'q'), ('Q4_K_M', 4.84, 5.2, 'q'), ('Q4_K_S', 4.55, 4.9, 'q'), ('Q4_K', 4.84, 5.2, 'q'), ('Q4_0', 4.5, 4.8, 'q'),
    ('Q6_K', 6.56, 6.6, 'q'), ('Q8_0', 8.5, 8.5, 'q'), ('FP8', 8.0, 8.0, 'q'), ('INT8', 8.0, 8.0, 'q'), ('int8', 8.0, 8.0, 'q'), ('int4', 4.5, 4.5, 'q'), ('BF16', 16.0, 16.0, 'q'),
]
KV_BYTES = {'f16': 2.0, 'q8_0': 34 / 32, 'q4_0': 18 / 32, 'K q8_0 / V f16': (34 / 32 + 2) / 2}

def quant(row, g):
    q = row.get('quant')
    if q is None: return None
    e, d, kind = next(((e, d, k) for p, e, d, k in QUANT if q.startswith(p)), (None,) * 3)
    if e is None: return None
    if g is not None and row.get('file_gib'):                   # the file's size fixes the experts' average exactly
        b = (row['file_gib'] * GIB * 8 - g.nonexpert * d) / g.expert_total
        if 0.75 * e < b < 1.33 * e: e = b
    return e, d, kind

# ---------------------------------------------------------------- 3. hardware
# GPU: (substring, bandwidth GB/s, boost GHz, memory class, fp16 TFLOPS non-tensor) ; first match
GPU = [('RTX PRO 6000', 1792, 2.6, 'gddr', 126.0), ('RTX 5090', 1792, 2.41, 'gddr', 104.8), ('RTX 5080', 960, 2.62, 'gddr', 56.3), ('RTX 5070 Ti', 896, 2.45, 'gddr', 43.9), ('RTX 5070', 672, 2.51, 'gddr', 30.8), ('RTX 5060 Ti', 448, 2.57, 'gddr', 23.7),
       ('RTX 4090', 1008, 2.52, 'gddr', 82.6), ('RTX 4080', 717, 2.51, 'gddr', 48.7), ('RTX 4070', 504, 2.48, 'gddr', 29.2), ('RTX 4060 Lap', 256, 2.2, 'gddr', 11.6), ('RTX 6000 Ada', 960, 2.5, 'gddr', 91.1),
       ('RTX 3090 Ti', 1008, 1.86, 'gddr', 40.0), ('RTX 3090', 936, 1.70, 'gddr', 35.6), ('RTX 3060', 360, 1.78, 'gddr', 12.7), ('RTX A6000', 768, 1.80, 'gddr', 38.7), ('RTX A5000', 768, 1.70, 'gddr', 27.8), ('A100-SXM4-40', 1555, 1.41, 'hbm', 78.0), ('A100', 2039, 1.41, 'hbm', 78.0), ('A10', 600, 1.70, 'gddr', 31.2),
       ('Quadro RTX 6000', 672, 1.77, 'gddr', 32.6), ('RTX 2060 Super', 448, 1.65, 'gddr', 14.4), ('RTX 2070', 448, 1.62, 'gddr', 14.9), ('GTX 1650', 192, 1.73, 'gddr', 8.9), ('GTX 1070', 256, 1.68, 'gddr', 6.5), ('P100', 732, 1.33, 'hbm', 19.1),
       ('RX 9070 XT', 645, 2.97, 'gddr', 97.3), ('R9700', 640, 2.92, 'gddr', 95.7), ('RX 7900 XTX', 960, 2.5, 'gddr', 122.8), ('RX 7900 XT', 800, 2.4, 'gddr', 103.0), ('RX 7600', 288, 2.66, 'gddr', 43.5), ('RX 6700 XT', 384, 2.58, 'gddr', 26.4), ('V620', 512, 2.2, 'gddr', 40.6), ('gfx1030', 512, 2.2, 'gddr', 32.0)]
# CPU: (substring, cores per socket, all-core GHz, channels per socket, max MT/s of the platform)
CPU = [('Platinum 8358', 15, 2.8, 8, 3200), ('EPYC 7J13', 15, 3.0, 8, 3200), ('EPYC 9355 (32c; VM)', 24, 4.0, 12, 6000), ('EPYC 9355', 32, 4.0, 12, 6400), ('EPYC 9374F', 32, 4.0, 12, 4800), ('EPYC 9175F', 16, 4.6, 12, 6400), ('EPYC 9654', 96, 3.5, 12, 4800), ('EPYC 9965', 192, 3.2, 12, 6400), ('EPYC 7343', 16, 3.5, 8, 3200), ('EPYC 24-core', 24, 3.6, 12, 4800), ('EPYC, 56', 56, 3.0, 8, 3200),
       ('6980P', 128, 3.0, 12, 6400), ('E5-2697A', 16, 2.9, 4, 2400), ('Gold 6138', 20, 2.7, 6, 2666), ('Gold 6454S', 32, 2.8, 8, 4800), ('Gold Skylake', 14, 2.6, 6, 2666), ('8488C', 48, 3.0, 8, 4800), ('8480', 56, 3.0, 8, 4800), ('Xeon Scalable (24c', 24, 2.7, 6, 2666), ('Platinum 8452Y', 36, 2.8, 8, 4800),
       ('285K', 24, 4.6, 2, 6400), ('12600K', 10, 4.3, 2, 6000), ('7700', 4, 3.9, 2, 2400), ('10900X', 10, 4.0, 4, 2933), ('14900K', 16, 4.8, 2, 5600), ('7980XE', 18, 4.2, 4, 3200), ('10400F', 6, 4.0, 2, 2666),
       ('Ryzen 5 3500', 6, 4.0, 2, 2667), ('Ryzen 5 5600', 6, 4.4, 2, 3200), ('5700X', 8, 4.3, 2, 3200), ('5800X', 8, 4.5, 2, 3200), ('7800X3D', 8, 4.7, 2, 6000), ('9800X3D', 8, 5.0, 2, 6000), ('5950X', 16, 4.0, 2, 3200), ('7950X', 16, 4.9, 2, 5200),
       ('5975WX', 32, 3.8, 8, 3200), ('3945WX', 12, 4.0, 8, 3200), ('3995WX', 64, 3.0, 8, 3200), ('7975WX', 32, 4.2, 8, 4800)]
DESKTOP_DDR4, DESKTOP_DDR5, DESKTOP_ANY = 51.2, 89.6, 64.0      # dual-channel priors, GB/s peak
READ_OF_PEAK = 0.85        # prior: best read rate over channel peak
READ_OF_TRIAD = 4.0 / 3.0  # prior: a triad without streaming stores moves 4 arrays, counts 3

def gpus(row):
    """list of (count, bw, ghz, cls, tflops) of the row's GPUs"""
    txt = row.get('gpu') or ''; n = row['gpu_count']
    if n == 0 or not txt: return []
    note = row.get('notes') or ''
    if re.match(r'^\d+x (RTX|RX)', note): txt = note
    out = []
    parts = txt.split(' + ') if ' + ' in txt else [txt]
    for p in parts:
        m = re.match(r'(\d+)x (.*)', p); c = int(m.group(1)) if m else (1 if len(parts) > 1 else n)
        hit = next((x for x in GPU if x[0] in p), None)
        if hit is None: return None
        out.append((c,) + hit[1:])
    return out

def cpu_of(row):
    """cores in use (physical, all sockets in use), GHz, sockets, read GB/s, provenance of the bandwidth"""
    txt = row.get('cpu') or ''
    hit = next((x for x in CPU if x[0] in txt), None)
    two = txt.startswith('2x'); sockets = row.get('cpu_sockets_used') or (2 if two else 1)
    if hit: _, cps, ghz, ch, mts = hit
    else:
        cps, ghz, ch, mts = 8, 4.2, 2, None
        # an unnamed host that runs >= 48 threads or must hold > 128 GiB is a server: 8 channels of DDR4-3200, 32 cores at 3 GHz
        if (row.get('threads') or 0) >= 48 or (row.get('file_gib') or 0) > 128: cps, ghz, ch, mts = 32, 3.0, 8, 3200
    vm = 'vCPU' in txt
    thr = row.get('threads')
    cores = cps * sockets
    if thr: cores = min(cores, thr / 2 if vm else thr)
    meas, peak = row.get('ram_bw_measured_gbs'), row.get('ram_bw_peak_gbs')
    if meas:
        if 'STREAM triad' in (row.get('notes') or ''):
            bw = min(meas * READ_OF_TRIAD, READ_OF_PEAK * (peak or 1e9)); src = 'measured-triad'
        else: bw, src = meas, 'measured'
        # measured figures are those of the sockets in use
        per = bw / sockets if sockets > 1 and not ('per socket' in (row.get('notes') or '')) else bw
    elif peak: bw = peak * READ_OF_PEAK; per = bw / sockets; src = 'peak'
    else:
        if mts:
            n = row.get('ram_channels') or ch * sockets
            s = row.get('ram_mts') or mts
            bw = n * s * 8e-3 * READ_OF_PEAK; per = bw / sockets; src = 'prior-cpu' if hit else 'prior-type'
        else:
            t = row.get('ram_type')
            bw = READ_OF_PEAK * (DESKTOP_DDR4 if t == 'DDR4' else DESKTOP_DDR5 if t == 'DDR5' else DESKTOP_ANY); per = bw; src = 'prior-type'
    return cores, ghz, sockets, per, src, hit is not None

def host(row):
    """the machine, for leave-one-machine-out"""
    c = row.get('cpu')
    if c:
        return re.sub(r'\s*\(.*', '', c).replace('Ryzen ', '')
    return (row['source'] + '|' + str(row.get('gpu')))

def moe_on_cpu(row, g):
    """(expert layers' worth of expert bytes on the CPU, expert layers that need a CPU round trip) or None"""
    Lm = g.Lm; pc = row['placement_class']
    if pc == 'cpu_only': return float(Lm), Lm
    if pc == 'gpu_full': return 0.0, 0
    n = row.get('moe_layers_on_cpu'); ot = row.get('ot') or ''
    if 'gate_exps of layers 0-19 and all up/down_exps=CPU' in ot:
        gpu_gates = 61 - 20; return Lm - gpu_gates / 3.0, Lm
    m = re.findall(r'blk\\\.\[(\d)-(\d)\]\\\.ffn_(up|gate)=CUDA', ot)
    if m:
        first_moe = g.L - Lm if g.key.find('DeepSeek') >= 0 else 0
        per = sum(max(0, int(b) - max(int(a), first_moe) + 1) for a, b, _ in m) / 3.0
        if 'Maverick' in g.key: per /= 2
        return Lm - per, Lm
    if n is not None: return float(min(n, Lm)), min(n, Lm)
    if row['placement_class'] == 'hybrid_layers' and row.get('ngl') is not None and row['n_cpu_moe'] is None:
        c = max(0, g.L - row['ngl']); return float(min(c, Lm)), min(c, Lm)
    if 'exps=CPU' in ot and not re.search(r'CUDA|GPU', ot): return float(Lm), Lm
    if row.get('cpu_weight_mib') and quant(row, g):
        f = min(1.0, row['cpu_weight_mib'] * 2**20 / (g.expert_total * quant(row, g)[0] / 8)); return Lm * f, math.ceil(Lm * f - 0.05)
    if row['engine'] == 'kTransformers' or row['engine'] == "paper's engine" :
        f = row.get('flags') or ''
        m = re.search(r'(\d+) GPU experts per layer \(of (\d+)\)', f)
        if m: return Lm * (1 - int(m.group(1)) / int(m.group(2))), Lm
    return None

def kind_of_row(row):
    """'fit' tier A: everything the time depends on is stated; 'prior' tier B: a prior replaces something; 'no' + reason"""
    if row['outcome'] != 'ok': return 'no', 'outcome ' + row['outcome']
    if row['quality'] == 'low': return 'no', 'quality low'
    if not row.get('decode_tps'): return 'no', 'no decode figure'
    if row.get('speculative'): return 'no', 'speculative decoding'
    if row['placement_class'] in ('gpu_uvm', 'gpu_spill'): return 'no', 'unified-memory paging'
    if row['engine'] not in ('llama.cpp', 'ik_llama.cpp', 'kTransformers', 'LM Studio', 'llama.cpp fork'): return 'no', 'engine not modelled or not stated'
    g = geometry(row.get('model'))
    if g is None: return 'no', 'geometry unknown'
    if quant(row, g) is None: return 'no', 'quantisation not stated'
    gp = gpus(row)
    if gp is None: return 'no', 'GPU not in the table'
    pl = moe_on_cpu(row, g)
    assumed = False
    if pl is None:
        return 'no', 'placement not stated'
    src = cpu_of(row)[4]
    if pl[0] > 0 or row['placement_class'] in ('cpu_only', 'hybrid_layers'):
        if src.startswith('prior'): return 'prior', 'RAM bandwidth is a prior (%s)' % src
    return 'fit', ''

def is_core(row):
    return (row['outcome'] == 'ok' and row['quality'] != 'low' and bool(row.get('cpu')) and (row.get('ram_bw_peak_gbs') or row.get('ram_bw_measured_gbs')) is not None
            and row.get('moe_layers_on_cpu') is not None and row.get('quant') is not None and bool(row.get('decode_tps')))

# ---------------------------------------------------------------- 4. decode model
# name: (start, prior sigma in ln, unit, meaning)
PARAMS = collections.OrderedDict([
    ('eta_gddr', (0.55, 0.7, '1', 'share of datasheet VRAM bandwidth reached by decode, GDDR cards')),
    ('eta_hbm',  (0.55, 0.7, '1', 'same, HBM cards (A100, P100)')),
    ('c_layer',  (170, 0.7, 'kcycle', 'GPU overhead per layer of a plain GQA MoE model, in thousand GPU clock cycles')),
    ('k_mla',    (1.6, 0.7, '1', 'overhead of an MLA layer over a GQA layer')),
    ('k_lin',    (1.5, 0.7, '1', 'overhead of a layer of a linear-attention hybrid over a GQA layer')),
    ('r_core',   (8, 0.7, 'weight/cycle', 'weights a core multiplies per clock cycle (decode kernel)')),
    ('t_rt',     (85, 0.7, 'us', 'round trip per CPU expert layer (graph split, copies, thread wake-up)')),
    ('x_iq',     (2, 0.7, '1', 'CPU cycles per weight of i-quants (IQ1/IQ2 codebooks) over other formats')),
    ('t_cpu',    (85, 0.7, 'us', 'overhead per layer computed wholly on the CPU (barriers of ~20 ops)')),
    ('eta_kv',   (0.55, 0.7, '1', 'share of the datasheet VRAM bandwidth reached when reading the KV cache')),
    ('r_att',    (8, 0.7, 'element/cycle', 'query-head x head-dim elements of K and V a core handles per cycle (CPU attention)')),
    ('x_kvq',    (1, 0.7, '1', 'slow-down of CPU attention over a quantised cache in llama.cpp (not ik)')),
])
# not fitted: b0, s2 (second socket, from the same-machine pairs R338/R339, R340/R341, R342/R343, R344/R345, R346/R347), share of the FP16 rate in
# decode attention, share of a plain layer's kernels that belong to the routed experts (about 6 of 17 graph nodes)
FIXED = dict(s2=0.8, b0=200e6, flop_att=0.5, expert_kernels=0.35, eta_dram=1.0)

def features(row):
    """everything the formula needs from a row (description only)"""
    g = geometry(row['model']); e, d, kind = quant(row, g)
    f = Geo(); f.row = row; f.g = g; f.kind = kind
    f.exp_bytes = g.k * g.expert * e / 8; f.exp_w = g.k * g.expert
    f.one_expert = g.expert * e / 8
    f.dense_b = d / 8
    n_bytes, n_rt = moe_on_cpu(row, g)
    f.n_cpu, f.n_rt = n_bytes, n_rt
    f.gp = gpus(row) or []
    pc = row['placement_class']
    f.layers_cpu = 0
    if pc == 'cpu_only' or not f.gp: f.layers_cpu = g.L
    elif row.get('ngl') is not None and row['ngl'] < g.L: f.layers_cpu = g.L - row['ngl']
    f.head_cpu = f.layers_cpu > 0 and not (row.get('ngl') or 0) > g.L
    if f.layers_cpu: f.n_cpu = max(f.n_cpu, min(f.layers_cpu, g.Lm)) ; f.n_rt = f.n_cpu
    f.gpu_layers = g.L - f.layers_cpu
    if f.gp:
        tot = sum(c for c, *_ in f.gp)
        f.ibw = sum(c / bw for c, bw, *_ in f.gp) / tot; f.ighz = sum(c / z for c, _, z, *_ in f.gp) / tot
        f.hbm = f.gp[0][3] == 'hbm'; f.tf = tot / sum(c / t for c, *_, t in f.gp)
    f.cores, f.ghz, f.sockets, f.bw1, f.src, f.known = cpu_of(row)
    depth = row.get('ctx_depth')
    if depth is None: depth = row['prompt_len'] if (row.get('bench') == 'llama-server' or row['engine'] == 'kTransformers') and row.get('prompt_len') else 0
    f.depth = depth + (row.get('gen_len') or 0) / 2
    kvb = KV_BYTES.get(row.get('kv_type') or 'f16', 2.0)
    fl = row.get('flags') or ''
    kv = g.kv_elems
    if g.arch == 'mla' and row['engine'] == 'ik_llama.cpp' and '-mla' not in fl and 'V2-Lite' in g.key: kv = 16 * (192 + 128)
    f.kv_full = kv * kvb * f.depth; f.kv_win = kv * kvb * min(f.depth, g.window)
    f.kv_bytes = g.full_layers * f.kv_full + g.window_layers * f.kv_win
    f.att_flops = g.att_flops * (g.full_layers * f.depth + g.window_layers * min(f.depth, g.window))
    f.kvq = (row.get('kv_type') or 'f16') in ('q8_0', 'q4_0')
    f.att_elems = f.att_flops / 2
    f.ik = row['engine'] == 'ik_llama.cpp'; f.kt = row['engine'] == 'kTransformers'
    return f

def decode_ms(f, p, parts=False):
    g = f.g
    # --- sockets
    gain = 1.0
    if f.sockets > 1:
        gain = 2.0 * 0.9 if f.kt else 1.0 + FIXED['s2'] * f.one_expert / (f.one_expert + FIXED['b0'])
    bw = f.bw1 * gain * FIXED['eta_dram']                                   # GB/s
    rate = p['r_core'] * f.ghz * f.cores / f.sockets * gain             # 1e9 weights/s
    if f.kind == 'i': rate_e = rate / p['x_iq']
    else: rate_e = rate
    t = {}
    # --- CPU experts
    t['rt'] = 0.0 if f.layers_cpu >= g.L else f.n_rt * p['t_rt'] * 1e-3
    t['cpu_bytes'] = f.n_cpu * f.exp_bytes / bw * 1e-6
    t['cpu_calc'] = f.n_cpu * f.exp_w / rate_e * 1e-6
    k = p['k_mla'] if g.arch == 'mla' else p['k_lin'] if g.arch == 'lin' else 1.0
    # --- dense part on the CPU
    if f.layers_cpu:
        w = f.layers_cpu * g.layer_dense + (g.head if f.head_cpu else 0)
        t['cpu_dense'] = w * f.dense_b / bw * 1e-6 + w / rate * 1e-6
        t['cpu_over'] = f.layers_cpu * k * p['t_cpu'] * 1e-3
        t['cpu_kv'] = f.att_elems * f.layers_cpu / g.L / (p['r_att'] * f.ghz * f.cores) * 1e-6 * (p['x_kvq'] if f.kvq and not f.ik else 1.0)
    # --- GPU
    if f.gpu_layers > 0:
        gbw = p['eta_hbm' if f.hbm else 'eta_gddr'] / f.ibw             # GB/s
        w = f.gpu_layers * g.layer_dense + (0 if f.head_cpu else g.head)
        t['gpu_dense'] = (w * f.dense_b + g.lin_state * f.gpu_layers / g.L) / gbw * 1e-6
        t['gpu_exp'] = max(0.0, g.Lm - f.n_cpu) * f.exp_bytes / gbw * 1e-6
        on_cpu = max(0.0, f.n_rt - f.layers_cpu)                        # layers whose expert kernels run on the CPU instead
        t['gpu_over'] = (f.gpu_layers * k - FIXED['expert_kernels'] * on_cpu) * p['c_layer'] * f.ighz * 1e-3
        share = f.gpu_layers / g.L
        t['gpu_kv'] = share * (f.kv_bytes * f.ibw / p['eta_kv'] * 1e-6 + f.att_flops / (FIXED['flop_att'] * f.tf) * 1e-9)
    return t if parts else sum(t.values())

def pdict(theta, names=None):
    names = names or list(PARAMS)
    d = {k: v[0] for k, v in PARAMS.items()}
    d.update({k: math.exp(x) for k, x in zip(names, theta)})
    return d

def fit(feats, y, w, names=None, prior=1.0, x0=None):
    names = names or list(PARAMS)
    mu = np.array([math.log(PARAMS[k][0]) for k in names]); sg = np.array([PARAMS[k][1] for k in names])
    def res(th):
        p = pdict(th, names)
        r = np.array([math.log(decode_ms(f, p)) for f in feats]) - y
        r = r / 0.10
        r = np.sign(r) * np.sqrt(2 * (np.sqrt(1 + r * r) - 1))          # soft_l1 on the data only
        return np.concatenate([w * r, prior * (th - mu) / sg])
    s = least_squares(res, mu if x0 is None else x0, method='trf', max_nfev=int(os.environ.get("NFEV","60")))
    return s.x

# ---------------------------------------------------------------- 5. memory accounting (GPU side, bytes)
RESERVE_GIB = 1.1
def vram_need(row):
    """(GiB needed on the GPUs without reserve, parts) or None"""
    g = geometry(row.get('model'))
    if g is None or row['gpu_count'] == 0 or not row.get('vram_gb'): return None
    q = quant(row, g)
    if q is None: return None
    e, d, _ = q
    pl = moe_on_cpu(row, g)
    if pl is None:
        if row['placement_class'] == 'gpu_spill': pl = (0.0, 0)
        else: return None
    ngl = row.get('ngl')
    on_gpu = g.L if ngl is None else min(ngl, g.L)
    dense = (on_gpu * g.layer_dense + (g.head if ngl is None or ngl > g.L else 0)) * d / 8
    exp_gpu = max(0.0, (on_gpu * g.Lm / g.L if on_gpu < g.L else g.Lm) - (pl[0] if on_gpu == g.L else min(pl[0], g.Lm) - (g.L - on_gpu) if pl[0] > g.L - on_gpu else 0.0)) * g.E * g.expert * e / 8
    U = row.get('ubatch') or 512
    ctx = row.get('ctx_size') or (32768 if row.get('bench') == 'llama-server' else 0) or max((row.get('ctx_depth') or 0) + (row.get('prompt_len') or 0) + (row.get('gen_len') or 0), 512)
    kvb = KV_BYTES.get(row.get('kv_type') or 'f16', 2.0)
    kv = (g.full_layers * ctx + g.window_layers * min(ctx, g.window + U)) * g.kv_elems * kvb * on_gpu / g.L + g.lin_state
    comp = U * (g.vocab + 8 * g.h) * 4.0
    if g.arch == 'mla' and row['engine'] == 'ik_llama.cpp' and ctx > 4096: comp = max(comp, ctx * 128 * 320 * 2.0 + 512 * 2**20)
    comp *= row['gpu_count'] if row['gpu_count'] > 1 else 1
    if 'UD-' in row['quant'] and g.arch == 'lin':                                            # these files keep everything but the experts at 8-16 bits
        dense *= 10.0 / d; exp_gpu *= 1 if not row.get('file_gib') else ((row['file_gib'] * GIB * 8 - g.nonexpert * 10.0) / g.expert_total) / e
    ctxo = (0.3 + (0.5 if (row.get('os') or '').startswith('Windows') else 0.0)) * GIB * row['gpu_count']
    parts = dict(dense=dense, experts=exp_gpu, kv=kv, compute=comp, driver=ctxo)
    return sum(parts.values()) / GIB, {k: v / GIB for k, v in parts.items()}

def host_need(row):
    """(GiB the host must hold; RAM GiB) or None: swap-bound if need > RAM - 4 GiB (memory-mapped weights must stay in the page cache)"""
    g = geometry(row.get('model'))
    if not row.get('ram_gb'): return None
    q = quant(row, g) if g else None
    if q is None: return ((row['file_gib'] - (row.get('vram_gb') or 0), row['ram_gb']) if row.get('file_gib') else None)
    pl = moe_on_cpu(row, g)
    if pl is None: return None
    need = (pl[0] * g.E * g.expert * q[0] / 8 + g.embed * q[1] / 8 + (g.dense_active * q[1] / 8 if row['placement_class'] == 'cpu_only' else 0)) / GIB
    return need, row['ram_gb']

# ---------------------------------------------------------------- 6. prefill model
PP = collections.OrderedDict([
    ('phi_g',   (0.45, 0.4, '1', 'share of the non-tensor FP16 rate reached by prefill GEMMs on the GPU')),
    ('phi_att', (0.45, 0.5, '1', 'share of the same rate reached by attention in prefill')),
    ('eta_pin', (0.75, 0.2, '1', 'share of the PCIe line rate reached by pinned weight copies')),
    ('m_gpu',   (16., 0.5, 'token', 'tokens per expert at which a GPU expert GEMM reaches half its rate')),
    ('a_page',  (0.3,  0.3, '1', 'rate of pageable (memory-mapped) weight copies over the host read bandwidth (a staged copy crosses the DRAM about three times)')),
    ('r_pp',    (12.,  0.5, 'flop/cycle', 'prefill rate of a core, llama.cpp')),
    ('x_ikpp',  (3.5,  0.4, '1', 'prefill rate of an ik_llama.cpp (or AMX kTransformers) core over llama.cpp')),
    ('m_half',  (8.0, 0.5, 'token', 'tokens per expert at which a CPU GEMM reaches half its rate')),
    ('r_attpp', (8.0,  0.6, 'flop/cycle', 'prefill attention rate of a core')),
])
PP_KVQ = 5.0
PCIE = {3: 15.75, 4: 31.5, 5: 63.0}
def pcie_gbs(row):
    gen = row.get('pcie_gen')
    if gen is None:
        n = row.get('gpu') or ''
        gen = 5 if re.search(r'RTX 50|PRO 6000|RX 90|R9700', n) and row.get('ram_type') != 'DDR4' else 3 if re.search(r'GTX|RTX 20|P100|Quadro', n) else 4
    return PCIE[gen] * (row.get('pcie_lanes') or 16) / 16

def prefill_s(f, q):
    """seconds per token of prompt"""
    r, g = f.row, f.g; fl = r.get('flags') or ''
    U = r.get('ubatch') or 512
    if r.get('prompt_len') and r['prompt_len'] > 1: U = min(U, r['prompt_len'])
    depth = r.get('ctx_depth') or 0
    if r.get('bench') in (None, 'llama-server', 'llama-bench') and r.get('prompt_len'): depth += r['prompt_len'] / 2
    dense_fl = 2.0 * (g.dense_active - g.head) * U; exp_fl = 2.0 * g.k * g.expert * U      # per pass; per layer
    att = g.att_flops * (g.full_layers * (depth + U / 2) + g.window_layers * min(depth + U / 2, g.window)) * U
    core = f.cores * f.ghz * 1e9
    rc = q['r_pp'] * (q['x_ikpp'] if (f.ik or f.kt) else 1.0) * core
    m = U * g.k / g.E; re_ = rc * m / (m + q['m_half'])                                     # an expert's GEMM is efficient only with many tokens
    gpu = f.gpu_layers > 0 and bool(f.gp)
    if not gpu:
        return (dense_fl / rc + f.n_cpu * exp_fl / re_) / U + att / (q['r_attpp'] * core) / U * (PP_KVQ if f.kvq and not f.ik else 1.0)
    tf = f.tf * 1e12
    t = dense_fl * f.gpu_layers / g.L / (q['phi_g'] * tf) + (g.Lm - f.n_cpu) * exp_fl / (q['phi_g'] * tf) * (m + q['m_gpu']) / m + att / (q['phi_att'] * tf)
    t += (g.Lm - f.n_cpu) * g.E * f.one_expert * f.ibw / 0.72 * 1e-9                        # all resident experts are read once a pass
    touched = 1 - (1 - g.k / g.E) ** U
    copy_b = f.n_cpu * g.E * f.one_expert * touched
    offload = U >= 32
    if f.ik: offload = U >= 32 * g.E / g.k and '-rtr' not in fl
    if f.kt or '--no-op-offload' in fl: offload = False
    if offload:
        pinned = 'pinned' in fl or 'no-mmap' in fl or 'no mmap' in fl
        bw = q['eta_pin'] * pcie_gbs(r) if pinned else min(q['a_page'] * f.bw1, q['eta_pin'] * pcie_gbs(r))
        t += copy_b / bw * 1e-9 + f.n_cpu * exp_fl / (q['phi_g'] * tf) * (m + q['m_gpu']) / m
    else:
        t += f.n_cpu * exp_fl / re_
    if f.layers_cpu: t += dense_fl * f.layers_cpu / g.L / rc
    return t / U

def pp_usable(row):
    if row['outcome'] != 'ok' or row['quality'] == 'low' or not row.get('prefill_tps') or row.get('speculative'): return False
    if row['placement_class'] in ('gpu_uvm', 'gpu_spill') or '(BLAS' in (row.get('flags') or ''): return False
    if row['engine'] not in ('llama.cpp', 'ik_llama.cpp', 'kTransformers', None): return False
    if row.get('prompt_len') is not None and row['prompt_len'] < 64: return False
    g = geometry(row.get('model'))
    return g is not None and quant(row, g) is not None and gpus(row) is not None and moe_on_cpu(row, g) is not None

# ---------------------------------------------------------------- 7. figures
usable = [(r, kind_of_row(r)) for r in ROWS]
reasons = collections.Counter((k, w) for _, (k, w) in usable)
rows = [r for r, (k, _) in usable if k != 'no']; tier = np.array([k for _, (k, _) in usable if k != 'no'])
F = [features(r) for r in rows]; y = np.array([math.log(1000 / r['decode_tps']) for r in rows])
hosts = np.array([host(r) for r in rows]); A = tier == 'fit'
nh = collections.Counter(hosts[A]); w = np.full(len(rows), math.sqrt(len(nh) / A.sum()))   # rows of one machine share an error: the data weigh as many observations as there are machines
core = np.array([is_core(r) for r in rows]); src = np.array([f.src for f in F])

def logpred(p, idx): return np.array([math.log(decode_ms(F[j], p)) for j in idx])
def fit_on(mask, names=None):
    i = np.where(mask)[0]
    return pdict(fit([F[j] for j in i], y[i], w[i], names), names)
def err(e): return np.abs(np.exp(-e) - 1)                 # |tps_pred / tps_meas - 1|, e = ln(ms_pred / ms_meas)
def st(e):
    if len(e) == 0: return 'n   0'
    a = err(e); return 'n %3d  median %5.1f %%  p90 %5.1f %%  bias(ms) %+5.1f %%' % (len(a), 100 * np.median(a), 100 * np.quantile(a, .9), 100 * (math.exp(np.median(e)) - 1))
def lomo(names=None):
    full = fit_on(A, names); e = np.zeros(len(rows)); ps = {}
    for h in sorted(set(hosts)):
        idx = np.where(hosts == h)[0]; p = full
        if A[idx].any(): p = fit_on(A & (hosts != h), names); ps[h] = p
        e[idx] = logpred(p, idx) - y[idx]
    return full, e, ps

if __name__ == '__main__':
    print('== rows'); print('total', len(ROWS))
    for (k, why), n in sorted(reasons.items(), key=lambda x: (x[0][0], -x[1])): print('  %-6s %-45s %d' % (k, why, n))
    print('core', int(core.sum()), 'tier A hosts', len(nh))
    full, e, ps = lomo(); e0 = logpred(full, range(len(rows))) - y
    print('== parameters (%d)' % len(PARAMS))
    for k, (s0, sg, u, d) in PARAMS.items():
        v = [p[k] for p in ps.values()]; print('  %-9s start %-7g fit %-9.4g LOMO %.4g .. %.4g  [%s] %s' % (k, s0, full[k], min(v), max(v), u, d))
    print('== decode error'); q1 = core
    for nm, m in (('core (112)', core), ('tier A', A), ('tier A, not core', A & ~core), ('tier B all', ~A), ('tier B, CPU named', src == 'prior-cpu'), ('tier B, CPU unnamed', src == 'prior-type'), ('all predicted', A | ~A)):
        print('  %-20s train %s | LOMO %s' % (nm, st(e0[m]), st(e[m])))
    start = {k: v[0] for k, v in PARAMS.items()}; es0 = logpred(start, range(len(rows))) - y
    print('  nothing fitted (start values): core %s | tier A %s' % (st(es0[core]), st(es0[A])))
    keep = dict(PARAMS)
    for k, c in dict(k_mla=1.0, k_lin=1.0, x_iq=1.0).items(): PARAMS[k] = (c,) + keep[k][1:]
    for k in keep: PARAMS[k] = (PARAMS[k][0], 1.5) + keep[k][2:]
    fn, en, _ = lomo(); en0 = logpred(fn, range(len(rows))) - y; PARAMS.update(keep)
    print('  nearly flat priors (ratios centred at 1, sigma ln 1.5): core train %s | core LOMO %s | tier A LOMO %s' % (st(en0[core]), st(en[core]), st(en[A])))
    print('    parameters', {k: float('%.4g' % v) for k, v in fn.items()})
    floor = dict(start, eta_gddr=1.0, eta_hbm=1.0, c_layer=1e-9, r_core=1e9, t_rt=1e-9, t_cpu=1e-9, eta_kv=1.0, r_att=1e9); ef = logpred(floor, range(len(rows))) - y
    print('  byte floor (bytes / datasheet VRAM and read DRAM bandwidth, no overhead): core %s | tier A %s; measured below the floor: %s' % (st(ef[core]), st(ef[A]), [rows[j]['id'] for j in range(len(rows)) if A[j] and ef[j] > 0.0]))
    # two rows-per-host-balanced figures
    hm = [np.median(err(e[core & (hosts == h)])) for h in sorted(set(hosts[core]))]
    print('  core, one figure per machine (median of its rows), LOMO: median %.1f %%, worst %.1f %%, machines %d' % (100 * np.median(hm), 100 * max(hm), len(hm)))
    es = np.zeros(len(rows)); so = np.array([r['source'] for r in rows])
    for s in set(so):
        idx = np.where(so == s)[0]; p = fit_on(A & (so != s)) if A[idx].any() else full; es[idx] = logpred(p, idx) - y[idx]
    print('  leave-one-SOURCE-out (stricter: one author measured both A10 and A100 machines): core %s | tier A %s' % (st(es[core]), st(es[A])))
    print('== by engine (LOMO)')
    for en in sorted(set(str(r['engine']) for r in rows)):
        m = np.array([str(r['engine']) == en for r in rows]); print('  %-14s core %s | A %s | B %s' % (en, st(e[m & core]), st(e[m & A]), st(e[m & ~A])))
    print('== by placement class (LOMO)')
    for pc in sorted(set(r['placement_class'] for r in rows)):
        m = np.array([r['placement_class'] == pc for r in rows]); print('  %-15s core %s | A %s | B %s' % (pc, st(e[m & core]), st(e[m & A]), st(e[m & ~A])))
    print('== by depth (tier A, LOMO)')
    dep = np.array([f.depth for f in F])
    for lo, hi in ((0, 600), (600, 10000), (10000, 1e9)):
        m = (dep >= lo) & (dep < hi); print('  depth %6d..%-8g core %s | A %s' % (lo, hi, st(e[m & core]), st(e[m & A])))
    print('== by machine')
    for h in sorted(set(hosts), key=lambda h: (-nh.get(h, 0), h)):
        m = hosts == h; print('  %-44s %s train %s | LOMO %s' % (h[-44:], ('core' if core[m].any() else 'A   ' if A[m].any() else 'B   '), st(e0[m]), st(e[m])))
    print('== rows with |LOMO error| > 30 % (tier A)')
    for j in range(len(rows)):
        if A[j] and err(e[j:j+1])[0] > 0.30:
            r = rows[j]; print('  %s %-22s %-16s %-12s ncpu %5.1f depth %6.0f measured %7.2f tok/s, LOMO %7.2f, fitted %7.2f' % (r['id'], hosts[j][-22:], r['model'][:16], r['quant'][:12], F[j].n_cpu, F[j].depth, r['decode_tps'], 1000 / math.exp(e[j] + y[j]), 1000 / math.exp(e0[j] + y[j])))
    # ---------- intervals
    def klass(j):
        r, f = rows[j], F[j]
        if tier[j] == 'fit': return 'A-cpu/numa' if (r['placement_class'] == 'cpu_only' or f.sockets > 1) else 'A-gpu/hybrid'
        return 'B-cpu-named' if f.src == 'prior-cpu' else 'B-unnamed'
    kl = np.array([klass(j) for j in range(len(rows))])
    def wq(x, wt, q):
        o = np.argsort(x); c = np.cumsum(wt[o]); return x[o][min(np.searchsorted(c, q * (c[-1] + wt.max())), len(x) - 1)]
    def band(mask):
        c = collections.Counter(hosts[mask]); wt = np.array([c[h] ** -0.5 for h in hosts[mask]]); r = e[mask]
        # asymmetric: 10 % and 90 % quantile of ln(pred/meas)
        # finite-sample level of split conformal prediction, counted in machines
        n = len(c); lv = min(1.0, 0.90 * (n + 1) / n); o = np.argsort(r); cs = np.cumsum(wt[o]) / wt.sum()
        return r[o][min(np.searchsorted(cs, 1 - lv + 1e-12), len(r) - 1)], r[o][min(np.searchsorted(cs, lv - 1e-12), len(r) - 1)]
    bands = {c: band(kl == c) for c in sorted(set(kl))}
    cov = np.zeros(len(rows), bool); lo = np.zeros(len(rows)); hi = np.zeros(len(rows))
    for h in set(hosts):
        for c in set(kl[hosts == h]):
            m = (kl == c) & (hosts != h)
            a, b = band(m if m.sum() >= 5 else kl == c)
            idx = (hosts == h) & (kl == c); lo[idx], hi[idx] = a, b; cov[idx] = (e[idx] >= a - 1e-9) & (e[idx] <= b + 1e-9)
    print('== intervals (80 %): ln(ms_pred/ms_meas) band per class, coverage with the band made without the row\'s machine')
    for c in sorted(set(kl)):
        m = kl == c; hb = np.mean([cov[m & (hosts == h)].mean() for h in set(hosts[m])])
        print('  %-13s n %3d machines %2d band [%+.3f, %+.3f] -> tps x [%.2f, %.2f]  coverage rows %.0f %%, machines %.0f %%' % (c, m.sum(), len(set(hosts[m])), *bands[c], math.exp(bands[c][0]), math.exp(bands[c][1]), 100 * cov[m].mean(), 100 * hb))
    print('  core rows coverage %.0f %%, tier A %.0f %%, all %.0f %%' % (100 * cov[core].mean(), 100 * cov[A].mean(), 100 * cov.mean()))
    # ---------- sweeps
    print('== ranking of sweeps (LOMO predictions)')
    groups = collections.defaultdict(list)
    for j, r in enumerate(rows):
        if r['sweep_id']: groups[r['sweep_id']].append(j)
    tot = collections.Counter(); bad = []
    for sid, idx in sorted(groups.items()):
        ok = n = 0; okc = nc = 0
        for a in range(len(idx)):
            for b in range(a):
                i, j = idx[a], idx[b]; d = y[i] - y[j]
                noise = max(0.03, 2 * ((rows[i]['decode_sd'] or 0) / rows[i]['decode_tps'] + (rows[j]['decode_sd'] or 0) / rows[j]['decode_tps']))
                if abs(d) <= noise: continue
                pd = (e[i] + y[i]) - (e[j] + y[j]); good = pd * d > 0
                if abs(F[i].n_cpu - F[j].n_cpu) > 1e-9:
                    n += 1; ok += good
                    if not good: bad.append((sid, rows[i]['id'], rows[j]['id']))
                nc += 1; okc += good
        tot['n'] += n; tot['ok'] += ok; tot['nc'] += nc; tot['okc'] += okc
        if core[idx].any(): tot['kn'] += n; tot['kok'] += ok
        if nc: print('  %-26s n-cpu-moe pairs %3d/%3d   all pairs %3d/%3d' % (sid, ok, n, okc, nc))
    print('  TOTAL n-cpu-moe pairs %d/%d = %.1f %%; of core sweeps %d/%d; all pairs (threads, depth, model too) %d/%d = %.1f %%' % (tot['ok'], tot['n'], 100 * tot['ok'] / tot['n'], tot['kok'], tot['kn'], tot['okc'], tot['nc'], 100 * tot['okc'] / tot['nc']))
    print('  wrong:', bad[:40])
    # ---------- memory
    print('== memory accounting')
    used = []; scan = []
    tab = collections.Counter(); lst = []
    for r in ROWS:
        v = vram_need(r)
        if v is None: continue
        if r.get('vram_used_gib'): used.append((v[0] - r['vram_used_gib'], r['id'], v[0], r['vram_used_gib']))
        cap = r['vram_gb']; fits = v[0] + RESERVE_GIB <= cap
        o = r['outcome']
        scan.append((o, cap - v[0]))
        if o in ('oom', 'vram_spill'): tab[(o, 'refused' if not fits else 'MISSED')] += 1; lst.append((r['id'], o, round(v[0], 2), cap, 'refused' if not fits else 'MISSED'))
        elif o == 'ok' and r['placement_class'] != 'gpu_uvm': tab[('ok', 'accepted' if fits else 'FALSE ALARM')] += 1; (not fits) and lst.append((r['id'], 'ok', round(v[0], 2), cap, 'FALSE ALARM', r.get('vram_used_gib')))
    d = np.array([u[0] for u in used]); print('  predicted minus reported VRAM use: n %d median %+.2f GiB, median abs %.2f, p90 abs %.2f' % (len(d), np.median(d), np.median(abs(d)), np.quantile(abs(d), .9)))
    for rs in (0.4, 0.6, 0.8, 1.0, 1.1, 1.3): print('   reserve %.1f GiB: recognised %d of %d oom/spill, false alarms %d of %d ok' % (rs, sum(o in ('oom', 'vram_spill') and fr < rs for o, fr in scan), sum(o in ('oom', 'vram_spill') for o, fr in scan), sum(o == 'ok' and fr < rs for o, fr in scan), sum(o == 'ok' for o, fr in scan)))
    print('  ', dict(tab)); [print('   ', x) for x in lst]
    sw = collections.Counter()
    for r in ROWS:
        v = host_need(r)
        if v is None: continue
        bound = v[0] > v[1] - (6 if (r.get('os') or '').startswith('Windows') else 4)
        sw[(('swap_bound' if r['outcome'] == 'swap_bound' else 'other'), bound)] += 1
        if bound != (r['outcome'] == 'swap_bound'): print('    host memory:', r['id'], r['outcome'], 'need %.1f of %.1f GiB' % v)
    print('  host memory (outcome, recognised as beyond RAM - 4 GiB, Windows 6):', dict(sw))
    # ---------- prefill
    print('== prefill')
    P = [r for r in ROWS if pp_usable(r)]; PF = [features(r) for r in P]; py = np.array([-math.log(r['prefill_tps']) for r in P]); ph = np.array([host(r) for r in P])
    pc = collections.Counter(ph); pw = np.array([pc[h] ** -0.5 for h in ph]); names = list(PP); mu = np.array([math.log(PP[k][0]) for k in names]); sg = np.array([PP[k][1] for k in names])
    def ppfit(mask):
        idx = np.where(mask)[0]
        def res(th):
            q = dict(zip(names, np.exp(th))); r = (np.array([math.log(prefill_s(PF[j], q)) for j in idx]) - py[idx]) / 0.2
            r = np.sign(r) * np.sqrt(2 * (np.sqrt(1 + r * r) - 1)); return np.concatenate([pw[idx] * r, (th - mu) / sg])
        return dict(zip(names, np.exp(least_squares(res, mu, max_nfev=60).x)))
    q0 = ppfit(np.ones(len(P), bool)); pe0 = np.array([math.log(prefill_s(f, q0)) for f in PF]) - py; pe = np.zeros(len(P)); qs = []
    for h in sorted(set(ph)):
        q = ppfit(ph != h); qs.append(q)
        for j in np.where(ph == h)[0]: pe[j] = math.log(prefill_s(PF[j], q)) - py[j]
    for k in names: print('  %-8s start %-6g fit %-8.4g LOMO %.4g .. %.4g [%s] %s' % (k, PP[k][0], q0[k], min(q[k] for q in qs), max(q[k] for q in qs), PP[k][2], PP[k][3]))
    print('  all   train %s | LOMO %s' % (st(pe0), st(pe)))
    for c in ('gpu_full', 'hybrid_experts', 'hybrid_layers', 'cpu_only'):
        m = np.array([r['placement_class'] == c for r in P]); print('  %-15s LOMO %s' % (c, st(pe[m])))
    pcore = np.array([is_core(r) for r in P]); print('  core rows with a prefill figure: train %s | LOMO %s' % (st(pe0[pcore]), st(pe[pcore])))
    for h in sorted(set(ph), key=lambda h: -pc[h])[:45]: print('    %-44s LOMO %s' % (h[-44:], st(pe[ph == h])))
    # ---------- predictions.json
    out = {}
    for j, r in enumerate(rows):
        ms = math.exp(e0[j] + y[j]); msl = math.exp(e[j] + y[j]); a, b = bands[kl[j]]
        out[r['id']] = dict(measured_tps=r['decode_tps'], predicted_tps=round(1000 / ms, 4), lomo_tps=round(1000 / msl, 4), low_tps=round(1000 / ms * math.exp(a), 4), high_tps=round(1000 / ms * math.exp(b), 4),
                            tier='A' if A[j] else 'B', core=bool(core[j]), machine=hosts[j], interval_class=str(kl[j]), parts_ms={k: round(v, 5) for k, v in decode_ms(F[j], full, True).items()},
                            inputs=dict(n_cpu=round(F[j].n_cpu, 4), round_trips=F[j].n_rt, expert_bpw=round(quant(r, F[j].g)[0], 5), dense_bpw=quant(r, F[j].g)[1], cores=F[j].cores, ghz=F[j].ghz, sockets=F[j].sockets, read_gbs_per_socket=round(F[j].bw1, 4), depth=F[j].depth))
    json.dump(dict(parameters={k: full[k] for k in PARAMS}, prefill_parameters=q0, bands={k: [float(a), float(b)] for k, (a, b) in bands.items()}, rows=out,
                   prefill={r['id']: dict(measured_tps=r['prefill_tps'], predicted_tps=round(math.exp(-(pe0[j] + py[j])), 4), lomo_tps=round(math.exp(-(pe[j] + py[j])), 4)) for j, r in enumerate(P)},
                   vram={r['id']: dict(need_gib=round(vram_need(r)[0], 4), vram_gib=r['vram_gb'], outcome=r['outcome'], parts={k: round(v, 4) for k, v in vram_need(r)[1].items()}) for r in ROWS if vram_need(r)}), open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'predictions.json'), 'w'), indent=0)
    if '--ablate' in sys.argv:
        print('== ablation: parameter removed (neutral value), the rest refitted; LOMO')
        neutral = dict(eta_hbm=None, c_layer=1e-6, k_mla=1.0, k_lin=1.0, r_core=1e6, t_rt=1e-6, x_iq=1.0, t_cpu=1e-6, eta_kv=1e6, r_att=1e9, x_kvq=1.0)
        def sc(tag, names):
            f0, el, _ = lomo(names); e00 = logpred(f0, range(len(rows))) - y
            dg = np.array([f.depth > 8000 and f.gpu_layers > 0 for f in F])
            hb = np.mean([np.mean(np.minimum(np.abs(el[A & (hosts == h)]), 1)) for h in set(hosts[A])])
            print('  %-20s core train %s | core LOMO %s | tier A LOMO %s | A+B depth>8k GPU %s | machine-mean |ln| %.3f' % (tag, st(e00[core]), st(el[core]), st(el[A]), st(el[dg]), hb)); sys.stdout.flush()
        sc('none', list(PARAMS))
        for k, v in neutral.items():
            keep = PARAMS[k]
            if k == 'eta_hbm':
                for f in F: f._h = f.hbm if f.gp else None
                for f in F:
                    if f.gp: f.hbm = False
                sc('eta_hbm=eta_gddr', [x for x in PARAMS if x != k])
                for f in F:
                    if f.gp: f.hbm = f._h
                continue
            PARAMS[k] = (v,) + keep[1:]
            sc('without ' + k, [x for x in PARAMS if x != k]); PARAMS[k] = keep
    if '--sens' in sys.argv:
        model = sys.modules[__name__]
        print('== sensitivity to choices that are not fitted (LOMO)')
        def rebuild():
            global F
            F = [features(r) for r in rows]
        def sc2(tag):
            rebuild(); f0, el, _ = lomo(); print('  %-34s core %s | tier A %s' % (tag, st(el[core]), st(el[A]))); sys.stdout.flush()
        sc2('as specified')
        for nm, vals in (('READ_OF_PEAK', (0.75, 0.95)), ('READ_OF_TRIAD', (1.0, 1.15))):
            old = getattr(model, nm)
            for v in vals: setattr(model, nm, v); sc2('%s %.2f -> %.2f' % (nm, old, v))
            setattr(model, nm, old)
        for k, vals in (('expert_kernels', (0.0, 0.5)), ('flop_att', (0.3, 0.8)), ('s2', (0.0, 1.0)), ('b0', (100e6, 400e6))):
            old = FIXED[k]
            for v in vals: FIXED[k] = v; sc2('%s %g -> %g' % (k, old, v))
            FIXED[k] = old
        w0 = w.copy()
        for ex in (0.25, 0.5):
            w[:] = np.array([max(nh[h], 1) ** -ex for h in hosts]); w[:] *= w0[A].mean() / w[A].mean(); sc2('row weight n^-%.2f (0)' % ex)
        w[:] = w0
        for pr in (0.5, 2.0):
            w[:] = w0 / pr; sc2('prior strength x %.1f' % pr)
        w[:] = w0; rebuild()
