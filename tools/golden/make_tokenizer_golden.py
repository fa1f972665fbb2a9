#!/usr/bin/env python3
"""Golden {text, ids} pairs from the Hugging Face `tokenizers` library.

usage: make_tokenizer_golden.py TOKENIZER.json OUT.json
"""
import json, random, sys
from tokenizers import Tokenizer

HAND = [
    "", " ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\r\n", "\r", "\r\n\r\n", "\t", "\t\t", " \n", "\n ", " \n ", "  \n  ", "\t\n\t", " \t ", "\n\t\t", "a ", " a", " a ", "a  b", "a   b", "a\tb", "a\nb", "a\n\nb", "a \nb", "a\n b", "a  \n  b",
    "a\r\nb", "a\r\n\r\n  b", "a \r\n", "trailing   ", "   leading", "tabs\tand spaces  mixed \t \t end",
    "Hello", "Hello, world!", "hello world", "HELLO WORLD", "The quick brown fox jumps over the lazy dog.", "ROMEO: O, she doth teach the torches to burn bright!",
    "it's", "IT'S", "It'S we'Re you'VE I'm he'll she'D don't can't", "'s't're've'm'll'd", "o'clock", "'", "''", "'tis", "rock'n'roll", "’s curly’ll", "\u2019tis \u2018quoted\u2019", "'S'T", "\u017f's '\u017f 'ſ", "x'\u017fy",
    "0", "1", "12", "123", "1234567890", "3.14159", "1,000,000", "1e-10", "0x1F", "2024-11-20T23:51:00Z", "٣٤٥", "१२३", "Ⅷ ½ ² ₃", "a1b2c3", "1st 2nd 3rd", "100%", "$5.99", "€20", "£7", "¥100", "#1", "v1.2.3-rc.4+build.5",
    "naïve café — “quotes”", "Ünïcödé", "Zażółć gęślą jaźń", "Příliš žluťoučký kůň", "straße", "ﬁ ﬂ ligatures", "ĲSSEL", "İstanbul ı", "Ωμέγα", "Привет, мир!", "Здравствуйте, как дела?", "שלום עולם", "مرحبا بالعالم", "السلام عليكم ورحمة الله", "فارسی نیم‌فاصله", "नमस्ते दुनिया", "สวัสดีชาวโลก", "안녕하세요 세계", "こんにちは世界", "カタカナとひらがな", "ﾊﾝｶｸ", "東京タワー、行きました。", "数学与代码", "你好，世界！", "中文 English 混排 test 123", "今天天气不错，我们去公园散步吧。", "繁體中文測試", "「引号」『书名号』《标题》", "。，！？；：", "ａｂｃ１２３", "𠮷野家", "龘", "ትግርኛ", "ქართული", "Հայերեն", "தமிழ்", "ខ្មែរ", "Tiếng Việt có dấu",
    "e\u0301", "é", "n\u0303o", "a\u0308\u0323", "Z\u0351\u036b\u0343\u036aa\u035fl\u0360g\u0321o", "\u0301", " \u0301x", "\u1100\u1161\u11a8",
    "🙂", "🙂🚀 émoji", "👨‍👩‍👧‍👦", "👩🏽‍💻", "🏳️‍🌈", "🇩🇪🇯🇵", "❤️", "❤", "1️⃣", "☕️☕", "a🙂b", " 🙂", "🙂 ", "🙂\n🙂", "\u200d", "\ufe0f", "(╯°□°)╯︵ ┻━┻", "¯\\_(ツ)_/¯", "→ ← ↑ ↓ ⇒", "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋", "α≠β ∧ γ≤δ", "├── src\n│   └── main.rs",
    "\u00a0", "a\u00a0b", "\u00a0\u00a0x", "a \u00a0 b", "\u2003em\u2003space", "\u3000全角\u3000空格", "\u200bzero\u200bwidth", "\ufeffBOM", "\u2028line\u2029para", "\u0085next", "a\u0085b", "\u000b\u000c", "a\u000cb", "\u1680ogham", "\u180emongol", "\u00adsoft",
    "\x00", "a\x00b", "\x01\x02\x03", "\x1b[31mred\x1b[0m", "\x7f", "\x80\x9f", "\x1c\x1d\x1e\x1f", "\x1fx", "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\ue000private", "\U000e0001",
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|>user\nhi<|im_end|>", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "a<|endoftext|>b", "a <|endoftext|> b", "<|endoftext|><|endoftext|>", "<|endoftext", "|endoftext|>", "<|ENDOFTEXT|>", "<|im_start |>", "< |im_start|>", "<|im_start|><|im_end|><|endoftext|>", "\n<|im_end|>\n", "<<|im_end|>>", "</s><s>", "[INST] x [/INST]",
    "fn f<T: Ord>(x: &[T]) -> usize { x.len() }", "fn main() {\n    println!(\"Hello, {}!\", name);\n}\n", "#[derive(Debug, Clone)]\npub struct A<'a> { b: &'a str }\n", "let x = match y { Some(v) if v > 0 => v, _ => 0 };", "def f(x):\n    return x ** 2\n", "if __name__ == \"__main__\":\n\tmain()\n", "class A:\n    '''doc'''\n    def __init__(self):\n        self.x = [i for i in range(10) if i % 2 == 0]\n",
    "#include <stdio.h>\nint main(void) { printf(\"%d\\n\", 42); return 0; }", "const f = async (x) => { await g(x?.y ?? 0); };", "SELECT * FROM t WHERE a = 'b' AND c IS NOT NULL;", "<div class=\"a\">text &amp; more</div>", "{\"a\": [1, 2.5, null, true], \"b\": {\"c\": \"d\\n\"}}", "for i in $(seq 1 10); do echo \"$i\" >> out.txt; done", "package main\n\nimport \"fmt\"\n\nfunc main() {\n\tfmt.Println(\"hi\")\n}\n", "main :: IO ()\nmain = mapM_ print [1..10]", "key: value\nlist:\n  - a\n  - b\n", "| a | b |\n|---|---|\n| 1 | 2 |\n", "```rust\nlet a = 1;\n```", "# Title\n\n* item\n* item\n\n[link](https://example.com/a?b=c&d=e#f)", "\\frac{a}{b} \\sum_{i=0}^{n} x_i", "/usr/local/bin:/home/user/.cargo/bin", "C:\\Users\\me\\file.txt", "user@example.com", "https://de.wikipedia.org/wiki/%C3%9C", "snake_case camelCase PascalCase kebab-case SCREAMING_CASE", "a+b-c*d/e%f^g&h|i~j!k@l#m$n", "!!!", "...", "....", "?!?!", "--", "---", "----------", "==========", "((((()))))", "a.b.c", "a..b", "x=1;y=2", "/* c */ // d", "!\n!", "!\r\n!", "!\n\n!", " !\n", " ;\n\n  x", "}\n\n\n}", "};\r\n\r\n", "-\n-", "a!b ?c", "_", "__init__", "_a", "a_", " _", "@a #b",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ababababababababababababab", "thethethethethe", "antidisestablishmentarianism", "Donaudampfschifffahrtsgesellschaftskapitän", "supercalifragilisticexpialidocious",
]


def main(src, dst):
    tok = Tokenizer.from_file(src)
    texts = list(HAND)
    texts += [" " * n + "x" for n in (3, 4, 7, 8, 15, 16, 17, 31, 64)] + [" " * n for n in (3, 5, 8, 33, 100)] + ["\n" * n for n in (4, 9, 40)] + ["\t" * n + "x" for n in (3, 8)]
    texts += ["\n" + " " * n + "return x;\n" for n in (2, 4, 8, 12)]
    rng = random.Random(7)
    pools = ["abcdefghijklmnopqrstuvwxyz ", "aA1 .'\n", " \t\r\n\u00a0", "日本語中文字符 a1,。", "éàüßñ xyz", "🙂🚀👍🏽\u200d\ufe0f a", "{}[]()<>;:=+-*/ \n", "\u0300\u0301\u0323aeo ", "0123456789 .,"]
    for p in pools:
        for n in (10, 40, 120):
            texts.append("".join(rng.choice(p) for _ in range(n)))
    allp = "".join(pools)
    for n in (50, 200, 400):
        texts.append("".join(rng.choice(allp) for _ in range(n)))
    # any valid scalar value
    for n in (20, 60, 150):
        s = []
        while len(s) < n:
            c = rng.choice([rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0x10000), rng.randrange(0x110000)])
            if not 0xD800 <= c <= 0xDFFF:
                s.append(chr(c))
        texts.append("".join(s))
    texts.append("fn main() { let v: Vec<u32> = (0..10).collect(); }\n" * 20)
    texts.append("To be, or not to be, that is the question:\n" * 20)
    texts.append("混合エキスパート模型。" * 30)
    texts.append("x" * 1000)
    texts.append(" " * 500 + "\n" * 20 + "end")
    seen, out = set(), []
    for t in texts:
        if t in seen:
            continue
        seen.add(t)
        ids = tok.encode(t).ids
        out.append({"text": t, "ids": ids})
    with open(dst, "w", encoding="ascii") as f:
        f.write("[\n" + ",\n".join(json.dumps(e, separators=(",", ":")) for e in out) + "\n]\n")
    lossless = sum(tok.decode(e["ids"], skip_special_tokens=False) == e["text"] for e in out)
    print(len(out), "pairs,", sum(len(e["ids"]) for e in out), "ids, decode gives the text back for", lossless)


if __name__ == "__main__":
    main(*sys.argv[1:3])
