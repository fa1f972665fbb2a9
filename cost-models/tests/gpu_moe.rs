//! The fitted GPU table against measured rows, and against the arithmetic of the tool that fitted it.
//!
//! tests/data/moe_kernel_sample.csv: 8 rows per GPU and format, spread over tokens and shapes, balanced load; NOTICE beside it.

use std::path::Path;
use tierwise_cost::cost::{
    EstimateSource, MoeShape, expected_distinct, moe_fits, moe_formats, moe_layer_seconds, moe_layer_seconds_of,
};

struct Row {
    gpu: String,
    format: String,
    shape: MoeShape,
    tokens: u32,
    measured_s: f64,
    model_s: f64,
}

fn rows() -> Vec<Row> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/moe_kernel_sample.csv");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut lines = text.lines();
    assert_eq!(
        lines.next(),
        Some("gpu,format,hidden,inner,top_k,num_experts,matrices,tokens,measured_ms,model_ms"),
        "columns as written by tools/gpu-moe/fit.py"
    );
    let parse = |line: &str| {
        let f: Vec<&str> = line.split(',').collect();
        let n = |i: usize| f[i].parse::<u32>().unwrap_or_else(|e| panic!("{line}: {e}"));
        let x = |i: usize| f[i].parse::<f64>().unwrap_or_else(|e| panic!("{line}: {e}"));
        let shape = MoeShape { hidden: n(2), inner: n(3), top_k: n(4), num_experts: n(5), matrices: n(6) };
        Row { gpu: f[0].into(), format: f[1].into(), shape, tokens: n(7), measured_s: 1e-3 * x(8), model_s: 1e-3 * x(9) }
    };
    lines.map(parse).collect()
}

/// Balanced load: min(experts, tokens x k) of them, any.
fn balanced(r: &Row) -> f64 {
    f64::from(r.shape.num_experts).min(f64::from(r.tokens) * f64::from(r.shape.top_k))
}

#[test]
fn agrees_with_the_tool_that_fitted_it() {
    let rows = rows();
    assert!(rows.len() >= 150 && rows.len() <= 200, "{} rows", rows.len());
    for r in &rows {
        let e = moe_layer_seconds_of(&r.gpu, &r.format, r.shape, r.tokens, balanced(r)).unwrap();
        let at = format!("{} {} {:?} {} tokens", r.gpu, r.format, r.shape, r.tokens);
        assert!((e.seconds / r.model_s - 1.0).abs() < 1e-4, "{at}: {} s, the tool has {} s", e.seconds, r.model_s);
        assert_eq!(e.source, EstimateSource::Interpolated, "{at}");
        assert!(e.low > 0.0 && e.low <= e.seconds && e.seconds <= e.high, "{at}: {e:?}");
    }
}

#[test]
fn is_near_the_measured_rows() {
    let rows = rows();
    let (mut errors, mut covered) = (Vec::new(), 0);
    for r in &rows {
        let e = moe_layer_seconds_of(&r.gpu, &r.format, r.shape, r.tokens, balanced(r)).unwrap();
        errors.push((e.seconds / r.measured_s - 1.0).abs());
        covered += usize::from((e.low..=e.high).contains(&r.measured_s));
    }
    errors.sort_by(f64::total_cmp);
    let (median, p90) = (errors[errors.len() / 2], errors[errors.len() * 9 / 10]);
    let covered = covered as f64 / rows.len() as f64;
    println!(
        "{} rows: median error {:.1} %, p90 {:.1} %, {:.0} % in the interval",
        rows.len(),
        100.0 * median,
        100.0 * p90,
        100.0 * covered
    );
    // Every kernel counts alike here; over all 21 755 rows the median is 6 %.
    assert!(median < 0.10 && p90 < 0.35, "median {median}, p90 {p90}");
    assert!((0.7..=0.95).contains(&covered), "an interval of 80 % holds {covered}");
}

#[test]
fn every_row_of_the_table_is_possible() {
    let fits: Vec<_> = moe_fits().collect();
    assert!(fits.len() >= 20);
    for f in &fits {
        assert!((1e-6..=300e-6).contains(&f.launch_s), "{f:?}");
        assert!((0.05..=1.0).contains(&f.memory_share) && (0.05..=1.0).contains(&f.arithmetic_share), "{f:?}");
        assert!((0.7..=12.0).contains(&f.sharpness) && f.low_high.0 <= 1.0 && f.low_high.1 >= 1.0, "{f:?}");
        assert_eq!(fits.iter().filter(|o| (o.gpu, o.format) == (f.gpu, f.format)).count(), 1, "{f:?}");
    }
}

#[test]
fn behaves_like_a_layer() {
    let at = |tokens| moe_layer_seconds("NVIDIA H100 SXM 80 GB", "bfloat16", 2048, 768, 128, 8, tokens).unwrap().seconds;
    let mut before = 0.0;
    for tokens in [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 16_384] {
        let s = at(tokens);
        assert!(s > before, "{tokens} tokens: {s} s after {before} s");
        before = s;
    }
    // One token reads 8 experts of 9.4 MB: at 3.35 TB/s no less than 22.5 us. All 128 of them: 360 us.
    assert!(at(1) > 22.5e-6 && at(1) < 80e-6, "{}", at(1));
    assert!(at(64) > 360e-6 * expected_distinct(128, 8, 64) / 128.0 && at(64) < 600e-6, "{}", at(64));
    // 16 384 tokens: 1.24e12 operations on tensor cores of 989e12 per second.
    assert!(at(16_384) > 1.25e-3 && at(16_384) < 6e-3, "{}", at(16_384));
    let gpus = ["NVIDIA RTX PRO 6000 Blackwell", "NVIDIA H100 SXM 80 GB", "NVIDIA H200 SXM 141 GB", "NVIDIA B200 SXM 180 GB"];
    let speeds = gpus.map(|g| moe_layer_seconds(g, "bfloat16", 4096, 1536, 128, 8, 4).unwrap().seconds);
    assert!(speeds.windows(2).all(|w| w[0] > w[1]), "{speeds:?}");
}

#[test]
fn says_nothing_where_nothing_was_measured() {
    for gpu in ["NVIDIA GeForce RTX 4090", "NVIDIA GB200", "NVIDIA H100 PCIe", "RTX PRO 6000 Max-Q", "H1000", ""] {
        assert!(moe_layer_seconds(gpu, "bfloat16", 2048, 768, 128, 8, 1).is_none(), "{gpu:?}");
        assert!(moe_formats(gpu).is_empty(), "{gpu:?}");
    }
    assert!(moe_formats("NVIDIA H100 80GB HBM3").contains(&"fp8_block"));
    assert!(moe_layer_seconds("H100", "q4_k", 2048, 768, 128, 8, 1).is_none());
    for (hidden, inner, experts, k, tokens) in
        [(0, 768, 128, 8, 1), (2048, 0, 128, 8, 1), (2048, 768, 4, 8, 1), (2048, 768, 128, 8, 0), (2048, 768, 128, 0, 1)]
    {
        assert!(moe_layer_seconds("H100", "bfloat16", hidden, inner, experts, k, tokens).is_none());
    }
    // Outside the measured shapes: wider, and from another source.
    let far = moe_layer_seconds("H100", "bfloat16", 12_288, 768, 128, 8, 1).unwrap();
    let near = moe_layer_seconds("H100", "bfloat16", 2048, 768, 128, 8, 1).unwrap();
    assert_eq!((near.source, far.source), (EstimateSource::Interpolated, EstimateSource::Analytic));
    assert!(far.high / far.seconds > near.high / near.seconds && far.low / far.seconds < near.low / near.seconds);
    // More experts than float precision cares about, and the largest numbers: finite.
    let huge = moe_layer_seconds("B200", "nvfp4", u32::MAX, u32::MAX, u32::MAX, u32::MAX, u32::MAX).unwrap();
    assert!(huge.seconds.is_finite() && huge.high.is_finite());
}
