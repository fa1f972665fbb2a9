//! Pre-tokenizers: the regular expressions that cut a text into words before byte-level BPE, by their GGUF name.
//!
//! BPE never merges across a cut, so the wrong expression gives other tokens than those of the training: an unknown
//! name is an error, not a guess. GGUF stores only a name (`tokenizer.ggml.pre`); names, expressions and flags are
//! those of `llama-vocab.cpp` of llama.cpp, and where that file approximates an expression (its own engine knows
//! neither `(?i:)` nor `\p{Lu}`) the one of the models' own tokenizer.json. Each expression is applied to the
//! pieces left by the one before; matches and the gaps between them are pieces.

use crate::error::{Result, RuntimeError};

/// How one family of vocabularies cuts its text.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    /// The values of `tokenizer.ggml.pre`.
    pub names: &'static [&'static str],
    /// Applied one after the other.
    pub splits: &'static [&'static str],
    /// A word that is a token is taken whole, whatever the merges say.
    pub ignore_merges: bool,
    /// Whether BOS is prefixed when the file does not say.
    pub adds_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3: like Qwen 2, but up to three digits.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 3.5: combining marks belong to words.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// o200k: words end where lower case is followed by upper case.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Kimi K2: like o200k, but Han characters are cut off first.
const KIMI_K2: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DIGIT: &str = r"\p{N}";
const UP_TO_THREE_DIGITS: &str = r"\p{N}{1,3}";
/// Groups of three counted from the right: 1234567 is 1, 234, 567.
const DIGITS_BY_THOUSANDS: &str = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))";
const CJK_AND_KANA: &str = "[一-龥぀-ゟ゠-ヿ]+";
const CJK_AND_HANGUL: &str = "[一-龥ࠀ-一가-퟿]+";
const CR_OR_LF: &str = r"[\r\n]";
const DEEPSEEK_V3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const DEEPSEEK_LLM_WORD: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

const fn row(names: &'static [&'static str], splits: &'static [&'static str]) -> PreTokenizer {
    PreTokenizer { names, splits, ignore_merges: false, adds_bos: false }
}

const fn whole_words(mut pre: PreTokenizer, adds_bos: bool) -> PreTokenizer {
    pre.ignore_merges = true;
    pre.adds_bos = adds_bos;
    pre
}

static TABLE: &[PreTokenizer] = &[
    row(
        &["default"],
        &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    ),
    row(
        &["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "a.x-4.0", "mellum", "modern-bert"],
        &[GPT2],
    ),
    row(
        &["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[DIGIT, GPT2],
    ),
    row(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
    whole_words(row(&["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"], &[LLAMA3]), true),
    row(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[LLAMA3]),
    whole_words(row(&["glm4", "glm5"], &[LLAMA3]), false),
    row(
        &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"],
        &[QWEN2],
    ),
    row(&["qwen35"], &[QWEN35]),
    row(&["laguna"], &[r"[^\n]+|[\n]+", QWEN2]),
    row(
        &["gpt-4o", "o200k", "llama4", "kanana2", "talkie", "minimax-m2"],
        &[GPT4O],
    ),
    whole_words(row(&["tekken"], &[TEKKEN]), true),
    row(&["kimi-k2"], &[KIMI_K2]),
    row(
        &["deepseek-llm"],
        &[CR_OR_LF, DEEPSEEK_LLM_WORD, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK_AND_HANGUL, r"\p{N}+"],
    ),
    row(&["deepseek-coder"], &[CR_OR_LF, r"\s?\p{L}+", r"\s?\p{P}+", CJK_AND_HANGUL, DIGIT]),
    row(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        &[UP_TO_THREE_DIGITS, CJK_AND_KANA, DEEPSEEK_V3],
    ),
    row(
        &["afmoe"],
        &[
            DIGITS_BY_THOUSANDS,
            "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
            DEEPSEEK_V3,
        ],
    ),
    row(&["tiny_aya", "cohere2moe"], &[DIGITS_BY_THOUSANDS, GPT4O]),
    row(
        &["bailingmoe", "bailingmoe2", "llada-moe"],
        &[r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"],
    ),
    row(
        &["seed-coder"],
        &[r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"],
    ),
    row(
        &["exaone-moe"],
        &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ],
    ),
    row(&["poro-chat", "bloom", "gpt3-finnish"], &[BLOOM]),
    row(&["viking"], &[BLOOM, DIGIT]),
];

/// The row of `name`; a missing name means "default", as in llama.cpp.
pub(super) fn by_name(name: Option<&str>) -> Result<&'static PreTokenizer> {
    let name = name.filter(|n| !n.is_empty()).unwrap_or("default");
    TABLE.iter().find(|row| row.names.contains(&name)).ok_or_else(|| {
        let known: Vec<&str> = TABLE.iter().flat_map(|row| row.names).copied().collect();
        RuntimeError::Tokenizer(format!(
            "unknown pre-tokenizer {name:?} (tokenizer.ggml.pre); known: {}; a guess would give wrong tokens",
            known.join(", ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::tokenizer::pattern::Pattern;
    use tokenizers::utils::SysRegex;

    fn pieces<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        let mut pieces = vec![text];
        for split in by_name(Some(name)).expect("known name").splits {
            let regex = SysRegex::new(split).expect("valid expression");
            pieces = pieces
                .into_iter()
                .flat_map(|piece| {
                    let cuts = (&regex).find_matches(piece).expect("no error");
                    cuts.into_iter().map(|((start, end), _)| &piece[start..end]).collect::<Vec<_>>()
                })
                .collect();
        }
        pieces
    }

    #[test]
    fn every_expression_compiles_and_every_name_is_unique() {
        let mut names = std::collections::BTreeSet::new();
        for row in TABLE {
            for name in row.names {
                assert!(names.insert(*name), "{name} twice");
                assert_eq!(pieces(name, "a 1\n").concat(), "a 1\n");
            }
        }
    }

    #[test]
    fn cuts_of_the_main_families() {
        assert_eq!(pieces("gpt-2", "I'll go  12 x!"), ["I", "'ll", " go", " ", " 12", " x", "!"]);
        assert_eq!(pieces("qwen2", "I'LL go\n\n 123."), ["I", "'LL", " go", "\n\n", " ", "1", "2", "3", "."]);
        assert_eq!(pieces("llama-bpe", "12345 a\r\n"), ["123", "45", " a", "\r\n"]);
        assert_eq!(pieces("gpt-4o", "camelCase's HTTPServer/\n"), ["camel", "Case's", " HTTPServer", "/\n"]);
        assert_eq!(pieces("tekken", "camelCase's 12"), ["camel", "Case", "'s", " ", "1", "2"]);
        assert_eq!(pieces("deepseek-v3", "_abc 1234 漢字かな"), ["_abc", " ", "123", "4", " ", "漢字かな"]);
        assert_eq!(pieces("kimi-k2", "Hello漢字x"), ["Hello", "漢字", "x"]);
        assert_eq!(pieces("afmoe", "1234567 12 1234"), ["1", "234", "567", " ", "12", " ", "1", "234"]);
        assert_eq!(pieces("qwen35", "ke\u{301}x"), ["ke\u{301}x"]);
        assert_eq!(pieces("qwen2", "ke\u{301}x"), ["ke", "\u{301}x"]);
    }

    #[test]
    fn missing_is_default_and_unknown_is_refused() {
        assert_eq!(by_name(None).expect("default").names, ["default"]);
        assert_eq!(by_name(Some("")).expect("default").names, ["default"]);
        let message = by_name(Some("nonsense")).expect_err("unknown").to_string();
        assert!(message.contains("nonsense") && message.contains("qwen2") && message.contains("deepseek-v3"), "{message}");
    }

    /// Expressions with look-around are run by backtracking, which must not give up on long runs.
    #[test]
    fn long_runs_stay_whole() {
        let spaces = " ".repeat(300_000) + "x";
        let letters = "é".repeat(300_000);
        for row in TABLE {
            let name = row.names[0];
            assert_eq!(pieces(name, &spaces).concat().len(), spaces.len());
            if row.splits != [BLOOM] && name != "viking" && name != "deepseek-coder" && name != "deepseek-llm" {
                assert!(pieces(name, &spaces).len() <= 3, "{name}: {}", pieces(name, &spaces).len());
            }
            assert_eq!(pieces(name, &letters).len(), 1, "{name}");
        }
    }
}
