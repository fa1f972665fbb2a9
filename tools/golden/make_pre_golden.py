#!/usr/bin/env python3
"""Golden ids of llama.cpp for every pre-tokenizer name, on the vocabulary of GPT-2.

The tokens and merges stay those of GPT-2 (they cross the cuts of all others); only `tokenizer.ggml.pre` changes, so differences come from the
cuts alone. Needs llama-cpp-python (its Python layer suffices, with LLAMA_CPP_LIB_PATH at a built llama.cpp).

usage: make_pre_golden.py ggml-vocab-gpt-2.gguf tiny.json OUT.json NAME...
"""
import json, sys, tempfile, os
import gguf
from llama_cpp import llama_cpp as lc


EXTRA = [
    "YouTube iPhone JavaScript GitHub PlayStation eBay HTTPServer getElementById TensorFlow", "12345678 1234 123 12 1 2024-01-15 10000 1,000,000 100x 5th 3D a1b22c333",
    "don't DON'T I'LL we'Ve he's HE'S they're o'clock 'tis", "foo/bar//baz/\n/usr/lib/\r\n x /\n", "a\u0301bc n\u0303 \u0928\u092e\u0938\u094d\u0924\u0947", "\u6f22\u5b57\u304b\u306aABC\u6f22def \uac00\ub098\ub2e4 1\u5e742\u6708",
    "_private __init__ .method #tag @user $var %d &amp *ptr (x) [y] {z} =a +b -c", "one  two   three    four     five", "line\n\n\n  indented\n\t\ttabs \n", "a\u00a0b \u3000c\u2003d", "hello world foo bar baz", "word \n\n word", "!!!???...", "x!!\n\ny??\r\nz", "\u2026end. mid\u3002next\uff0clast",
]


def vocab_file(src, pre, dst):
    r = gguf.GGUFReader(src)
    w = gguf.GGUFWriter(dst, "llama")
    for f in r.fields.values():
        if not f.name.startswith("tokenizer."):
            continue
        v = pre if f.name == "tokenizer.ggml.pre" else f.contents()
        t = f.types[0]
        w.add_key_value(f.name, v, t, sub_type=f.types[-1] if t == gguf.GGUFValueType.ARRAY else None)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


def tokenize(vocab, text):
    raw = text.encode()
    buf = (lc.llama_token * (len(raw) + 8))()
    n = lc.llama_tokenize(vocab, raw, len(raw), buf, len(buf), False, False)
    assert n >= 0
    return list(buf[:n])


def main(src, texts, dst, *names):
    texts = EXTRA + [e["text"] for e in json.load(open(texts)) if 1 <= len(e["text"].encode()) <= 160 and "<|" not in e["text"]]
    out = {}
    lc.llama_backend_init()
    for name in names:
        path = os.path.join(tempfile.mkdtemp(), "v.gguf")
        vocab_file(src, name, path)
        p = lc.llama_model_default_params(); p.vocab_only = True
        m = lc.llama_model_load_from_file(path.encode(), p)
        if not m:
            print("llama.cpp refuses", name); continue
        v = lc.llama_model_get_vocab(m)
        out[name] = [tokenize(v, t) for t in texts]
        lc.llama_model_free(m); os.remove(path)
    # Names with equal ids are one group; only what differs from gpt-2 is written out.
    base, groups = out["gpt-2"], {}
    for name, ids in out.items():
        groups.setdefault(json.dumps(ids), []).append(name)
    rows = []
    for ids, members in groups.items():
        ids = json.loads(ids)
        rows.append({"names": members, "changed": {str(i): x for i, (x, b) in enumerate(zip(ids, base)) if x != b}})
    dump = lambda v: json.dumps(v, separators=(",", ":"))
    with open(dst, "w", encoding="ascii") as f:
        f.write('{"texts":' + dump(texts) + ',\n"base":' + dump(base) + ',\n"groups":[\n' + ",\n".join(map(dump, rows)) + "\n]}\n")
    print(len(out), "names", len(texts), "texts")


if __name__ == "__main__":
    main(*sys.argv[1:])
