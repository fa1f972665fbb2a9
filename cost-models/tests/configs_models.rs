//! Every file of configs/models parses, and its parameter counts are those of the model it describes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tierwise_cost::model::{Geometry, ModelSpec};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::recipe::Recipe;

/// Parameters in 10^9: estimated total and active (without the embedding, with the output), and the published total.
/// The estimates were computed elsewhere, from the same sources, with plain GQA or MLA formulas for every layer.
const PARAMETERS: &[(&str, f64, f64, Option<f64>)] = &[
    ("deepseek-moe-16b", 16.38, 2.62, None),
    ("deepseek-r1", 671.03, 36.62, None),
    ("deepseek-v2", 235.74, 20.85, Some(236.0)),
    ("deepseek-v2-lite", 15.71, 2.45, Some(15.7)),
    ("deepseek-v3", 671.03, 36.62, Some(671.0)),
    ("deepseek-v3.2", 671.03, 36.62, None),
    ("deepseek-v4-flash", 283.81, 12.75, None),
    ("deepseek-v4-pro", 1571.74, 47.59, None),
    ("dots.llm1", 142.77, 13.39, Some(142.0)),
    ("ernie-4.5-21b-a3b", 21.83, 3.35, None),
    ("ernie-4.5-300b-a47b", 299.48, 47.08, Some(300.0)),
    ("gemma-4-26b-a4b", 25.16, 3.75, None),
    ("glm-4.5", 352.8, 32.85, Some(355.0)),
    ("glm-4.5-air", 106.85, 12.8, Some(106.0)),
    ("glm-5", 743.18, 40.1, None),
    ("glm-5.1", 743.18, 40.1, None),
    ("glm-5.2", 743.18, 40.1, Some(744.0)),
    ("gpt-oss-120b", 116.79, 5.13, Some(116.8)),
    ("gpt-oss-20b", 20.91, 3.61, Some(20.9)),
    ("granite-3.1-1b-a400m", 1.33, 0.43, None),
    ("granite-3.1-3b-a800m", 3.3, 0.88, None),
    ("grin-moe", 41.87, 6.51, None),
    ("hunyuan-a13b", 80.39, 12.75, Some(80.0)),
    ("jamba-mini-1.6", 46.98, 7.25, Some(51.6)),
    ("kimi-k2", 1026.41, 31.69, Some(1000.0)),
    ("kimi-k2.5", 1026.41, 31.69, None),
    ("kimi-k3", 2751.96, 76.67, None),
    ("ling-1t", 999.7, 49.77, Some(1000.0)),
    ("ling-mini-2.0", 16.26, 1.11, None),
    ("llama-4-maverick-17b-128e", 400.71, 16.15, Some(400.0)),
    ("llama-4-scout-17b-16e", 107.77, 16.14, Some(109.0)),
    ("mimo-v2-flash", 309.43, 15.47, None),
    ("minimax-m2.5", 228.69, 10.42, Some(229.0)),
    ("minimax-m2.7", 228.69, 10.42, None),
    ("minimax-m3", 425.44, 24.0, None),
    ("mixtral-8x22b", 140.62, 38.95, Some(141.0)),
    ("mixtral-8x7b", 46.7, 12.75, Some(46.7)),
    ("moonlight-16b-a3b", 15.96, 2.58, None),
    ("nemotron-3-nano-30b-a3b", 32.43, 4.08, None),
    // No estimate of others: the published name.
    ("nemotron-3-ultra-550b-a55b", 550.0, 55.0, Some(550.0)),
    ("olmoe-1b-7b", 6.92, 1.18, Some(6.9)),
    ("phi-3.5-moe", 41.87, 6.51, Some(41.9)),
    ("powermoe-3b", 3.3, 0.88, None),
    ("qwen1.5-moe-a2.7b", 14.32, 2.38, Some(14.3)),
    ("qwen2-57b-a14b", 57.41, 13.7, Some(57.4)),
    ("qwen3-235b-a22b", 235.09, 21.57, Some(235.0)),
    ("qwen3-30b-a3b", 30.53, 3.04, Some(30.5)),
    ("qwen3-coder-480b-a35b", 480.15, 34.54, None),
    ("qwen3-next-80b-a3b", 79.04, 2.93, Some(80.0)),
    ("qwen3.5-122b-a10b", 120.55, 7.44, None),
    ("qwen3.5-35b-a3b", 34.13, 2.42, Some(35.0)),
    ("qwen3.5-397b-a17b", 393.74, 13.73, Some(397.0)),
    ("step-3.7-flash", 195.83, 10.34, None),
];

/// Where the estimates leave something out that the files describe: allowed difference of total and active count in percent.
const EXCEPTIONS: &[(&str, f64, f64, &str)] = &[
    ("qwen3-next-80b-a3b", 2.0, 22.0, "estimate without delta-net projections and output gates"),
    ("qwen3.5-122b-a10b", 2.0, 22.0, "estimate without delta-net projections and output gates"),
    ("qwen3.5-35b-a3b", 2.0, 22.0, "estimate without delta-net projections and output gates"),
    ("qwen3.5-397b-a17b", 2.0, 20.0, "estimate without delta-net projections and output gates"),
    ("jamba-mini-1.6", 10.0, 64.0, "estimate without Mamba layers; the file has the published 51.6"),
    ("kimi-k3", 2.0, 36.0, "estimate with MLA instead of the wider delta attention"),
    ("nemotron-3-nano-30b-a3b", 3.0, 21.0, "estimate with attention in all 52 layers instead of 6"),
    ("minimax-m3", 2.0, 4.0, "estimate with dense layers of the experts' width and without indexer"),
    ("mimo-v2-flash", 2.0, 5.0, "estimate without the narrow value heads"),
    ("deepseek-v3.2", 2.0, 3.0, "estimate without indexer"),
    ("deepseek-v4-flash", 2.0, 5.0, "estimate without indexer, compressor and hyper-connections"),
    ("deepseek-v4-pro", 2.0, 3.0, "estimate without indexer, compressor and hyper-connections"),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/models")
}

fn read(name: &str) -> Geometry {
    let path = folder().join(format!("{name}.toml"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    Geometry::from_toml(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn percent(found: f64, expected: f64) -> f64 {
    100.0 * (found / expected - 1.0).abs()
}

#[test]
fn the_table_has_a_row_for_every_file() {
    let files: BTreeSet<String> = std::fs::read_dir(folder())
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|x| x == "toml"))
        .map(|p| p.file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    let rows: BTreeSet<String> = PARAMETERS.iter().map(|r| r.0.to_string()).collect();
    assert_eq!(files, rows);
    let names: BTreeSet<String> = files.iter().map(|f| read(f).name).collect();
    assert_eq!(names.len(), files.len(), "two files describe a model of the same name");
}

#[test]
fn parameter_counts_are_the_published_ones() {
    for (name, total, active, published) in PARAMETERS {
        let spec = ModelSpec::with_recipe(read(name), &Recipe::by_name("BF16").unwrap()).unwrap();
        let exception = EXCEPTIONS.iter().find(|e| e.0 == *name);
        let (allowed_total, allowed_active) = exception.map_or((2.0, 2.0), |e| (e.1, e.2));
        let (found_total, found_active) = (spec.total_elements() as f64 / 1e9, spec.active_elements_per_token() as f64 / 1e9);
        assert!(percent(found_total, *total) <= allowed_total, "{name}: {found_total} in all, estimated {total}");
        assert!(percent(found_active, *active) <= allowed_active, "{name}: {found_active} active, estimated {active}");
        if let Some(published) = published {
            assert!(percent(found_total, *published) <= 5.0, "{name}: {found_total} in all, published {published}");
        }
    }
}

/// An exception that is not needed any more hides the next mistake.
#[test]
fn exceptions_are_needed() {
    for (name, ..) in EXCEPTIONS {
        let (_, total, active, _) = PARAMETERS.iter().find(|r| r.0 == *name).unwrap();
        let spec = ModelSpec::with_recipe(read(name), &Recipe::by_name("BF16").unwrap()).unwrap();
        let found = [spec.total_elements(), spec.active_elements_per_token()].map(|n| n as f64 / 1e9);
        assert!(percent(found[0], *total) > 2.0 || percent(found[1], *active) > 2.0, "{name} agrees within 2 %");
    }
}

/// Keys and values of published models in bytes per token, from their papers or configs:
/// heads x width x 2 x layers, or the latent width x layers.
#[test]
fn caches_have_the_published_sizes() {
    for (name, bytes) in [
        ("qwen3-30b-a3b", 4 * 128 * 2 * 48 * 2),
        ("mixtral-8x7b", 8 * 128 * 2 * 32 * 2),
        ("olmoe-1b-7b", 16 * 128 * 2 * 16 * 2),
        ("deepseek-v3", (512 + 64) * 61 * 2),
        // 12 of 48 layers keep keys and values.
        ("qwen3-next-80b-a3b", 2 * 256 * 2 * 12 * 2),
        // 4 of 32, and 6 of 52.
        ("jamba-mini-1.6", 8 * 128 * 2 * 4 * 2),
        ("nemotron-3-nano-30b-a3b", 2 * 128 * 2 * 6 * 2),
    ] {
        let spec = ModelSpec::with_recipe(read(name), &Recipe::by_name("Q8_0").unwrap()).unwrap();
        assert_eq!(spec.kv_bytes_per_token(QuantFormat::F16).0, bytes, "{name}");
    }
    // Every second layer of gpt-oss stops growing at 128 tokens.
    let spec = ModelSpec::with_recipe(read("gpt-oss-20b"), &Recipe::by_name("MXFP4").unwrap()).unwrap();
    let row = 8 * 64 * 2 * 2;
    assert_eq!(spec.kv_bytes(1000, QuantFormat::F16).0, 12 * row * 1000 + 12 * row * 128);
}

#[test]
fn only_models_that_are_described_exactly_claim_to_run() {
    let runnable: Vec<&str> = PARAMETERS
        .iter()
        .map(|r| r.0)
        .filter(|name| {
            ModelSpec::with_recipe(read(name), &Recipe::by_name("Q8_0").unwrap()).unwrap().plan_only_reason().is_none()
        })
        .collect();
    let expected = [
        "deepseek-moe-16b",
        "deepseek-r1",
        "deepseek-v2",
        "deepseek-v2-lite",
        "deepseek-v3",
        "dots.llm1",
        "ernie-4.5-21b-a3b",
        "ernie-4.5-300b-a47b",
        "glm-4.5",
        "glm-4.5-air",
        "gpt-oss-120b",
        "gpt-oss-20b",
        "granite-3.1-1b-a400m",
        "granite-3.1-3b-a800m",
        "grin-moe",
        "hunyuan-a13b",
        "kimi-k2",
        "kimi-k2.5",
        "ling-1t",
        "ling-mini-2.0",
        "llama-4-maverick-17b-128e",
        "llama-4-scout-17b-16e",
        "minimax-m2.5",
        "minimax-m2.7",
        "mixtral-8x22b",
        "mixtral-8x7b",
        "moonlight-16b-a3b",
        "olmoe-1b-7b",
        "phi-3.5-moe",
        "powermoe-3b",
        "qwen1.5-moe-a2.7b",
        "qwen2-57b-a14b",
        "qwen3-235b-a22b",
        "qwen3-30b-a3b",
        "qwen3-coder-480b-a35b",
        "qwen3-next-80b-a3b",
        "qwen3.5-122b-a10b",
        "qwen3.5-35b-a3b",
        "qwen3.5-397b-a17b",
    ];
    assert_eq!(runnable, expected);
}
