//! Routing traces: hostile input, the split, what scenarios converge to.

use super::*;
use std::collections::BTreeSet;

fn fixture(name: &str) -> RoutingTrace {
    let path = |end: &str| std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(format!("{name}.{end}"));
    let meta = std::fs::read_to_string(path("meta.json")).expect("a committed file");
    RoutingTrace::new(&meta, std::fs::read(path("ids.u8")).expect("a committed file")).expect("a good trace")
}

fn meta(tokens: usize, experts: u32, k: usize, sequences: &str) -> String {
    format!(
        r#"{{"model": "m", "source": "s", "licence": "l", "phase": "decode", "n_tokens": {tokens}, "n_moe_layers": 2,
            "n_experts": {experts}, "top_k": {k}, "sequences": {sequences}}}"#
    )
}

#[test]
fn hostile_input_is_refused_by_field() {
    let one = r#"[{"start": 0, "len": 2}]"#;
    let ids = vec![0, 1, 2, 3, 0, 1, 2, 255];
    assert!(RoutingTrace::new(&meta(2, 4, 2, one), ids.clone()).is_ok());
    let fails = |meta: String, ids: &[u8], words: &[&str]| {
        let error = RoutingTrace::new(&meta, ids.to_vec()).expect_err("bad input").to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error}");
        }
    };
    fails("{".into(), &ids, &["description", "EOF"]);
    fails(meta(2, 4, 2, one).replace("top_k", "k"), &ids, &["top_k"]);
    fails(meta(3, 4, 2, one), &ids, &["number of ids", "8", "12"]);
    fails(meta(usize::MAX, 4, 2, one), &ids, &["n_tokens"]);
    fails(meta(0, 4, 2, one), &[], &["n_tokens"]);
    fails(meta(2, 4, 2, one).replace("layers\": 2", "layers\": 0"), &ids, &["n_moe_layers"]);
    fails(meta(2, 4, 2, one).replace("layers\": 2", "layers\": 9000000000"), &ids, &["n_moe_layers"]);
    fails(meta(2, 256, 2, one), &ids, &["n_experts", "255"]);
    fails(meta(2, 4, 5, one), &ids, &["top_k", "5"]);
    fails(meta(2, 3, 2, one), &ids, &["expert of token 0 in MoE layer 1", "is 3"]);
    fails(meta(2, 4, 2, one), &[0, 1, 2, 2, 0, 1, 2, 3], &["token 0 in MoE layer 1", "expert 2 twice"]);
    fails(meta(2, 4, 2, "[]"), &ids, &["sequences", "empty"]);
    fails(meta(2, 4, 2, r#"[{"start": 0, "len": 0}]"#), &ids, &["sequences[0]"]);
    fails(meta(2, 4, 2, r#"[{"start": 1, "len": 2}]"#), &ids, &["sequences[0]", "2"]);
    fails(meta(2, 4, 2, r#"[{"start": 1, "len": 18446744073709551615}]"#), &ids, &["sequences[0]"]);
    fails(meta(2, 4, 2, r#"[{"start": 1, "len": 1}, {"start": 0, "len": 2}]"#), &ids, &["overlap"]);
}

#[test]
fn another_model_is_refused_with_both_sides() {
    let trace = fixture("gptoss20b_11seq");
    trace.check_model("gpt-oss-20b", &[(32, 4); 24]).unwrap();
    for other in [vec![(32, 4); 36], vec![(128, 4); 24], vec![(32, 8); 24], vec![]] {
        let error = trace.check_model("other", &other).unwrap_err().to_string();
        assert!(error.contains("24 MoE layers, 4 of 32") && error.contains("other"), "{error}");
    }
}

#[test]
fn split_is_by_whole_sequences_of_every_label() {
    let trace = fixture("dsv2lite_12seq");
    for seed in 0..20 {
        for fraction in [0.001, 0.3, 0.5, 0.8, 0.999] {
            let (train, test) = trace.split(fraction, seed).unwrap();
            assert_eq!((train.clone(), test.clone()), trace.split(fraction, seed).unwrap());
            let both: BTreeSet<usize> = train.sequences.iter().chain(&test.sequences).copied().collect();
            assert_eq!(both.len(), train.sequences.len() + test.sequences.len(), "a sequence in both parts");
            assert_eq!(both.len(), trace.sequences.len(), "a sequence in neither part");
            assert!(!train.sequences.is_empty() && !test.sequences.is_empty());
            assert_eq!(trace.num_tokens_of(&train) + trace.num_tokens_of(&test), trace.num_tokens());
            let longest = trace.sequences.iter().map(|s| s.tokens.len()).max().unwrap() as f64;
            let off = trace.num_tokens_of(&train) as f64 - fraction * trace.num_tokens() as f64;
            assert!(off.abs() <= longest, "{fraction}: off by {off} tokens");
            if fraction == 0.5 {
                let labels = |part: &Part| -> BTreeSet<Option<String>> {
                    part.sequences.iter().map(|s| trace.sequences[*s].label.clone()).collect()
                };
                assert_eq!(labels(&train), labels(&test), "seed {seed}, {fraction}");
            }
        }
    }
    assert_ne!(trace.split(0.5, 1).unwrap(), trace.split(0.5, 2).unwrap());
    for bad in [0.0, 1.0, -1.0, f64::NAN] {
        assert!(trace.split(bad, 0).is_err());
    }
}

#[test]
fn shares_are_counted_frequencies() {
    let trace = fixture("gptoss20b_11seq");
    let (train, _) = trace.split(0.5, 0).unwrap();
    let shares = trace.shares(&train);
    // Counted from the bytes themselves.
    for layer in [0, 11, 23] {
        let mut counts = [0_u32; 32];
        let mut tokens = 0;
        for s in &train.sequences {
            for token in trace.sequences[*s].tokens.clone() {
                tokens += 1;
                for k in 0..4 {
                    counts[usize::from(trace.ids[(token * 24 + layer) * 4 + k])] += 1;
                }
            }
        }
        for (share, count) in shares[layer].iter().zip(counts) {
            assert!((share - f64::from(count) / f64::from(4 * tokens)).abs() < 1e-12);
        }
    }
}

/// Share of the scenarios in which each expert of a layer is active.
fn frequency(scenarios: &crate::scenario::Scenarios, layer: usize, experts: usize) -> Vec<f64> {
    let steps = &scenarios.layers[layer];
    let mut seen = vec![0.0; experts];
    for active in steps {
        assert!(active.windows(2).all(|p| p[0] < p[1]), "ascending and without doubles");
        active.iter().for_each(|e| seen[usize::from(*e)] += 1.0 / steps.len() as f64);
    }
    seen
}

#[test]
fn scenarios_converge_to_the_shares() {
    let trace = fixture("dsv2lite_12seq");
    let (train, _) = trace.split(0.6, 3).unwrap();
    let shares = trace.shares(&train);
    let scenarios = trace.scenarios(&train, 1, 4000, 5).unwrap();
    let all = trace.stream(&train, 1).unwrap();
    assert_eq!(all.layers[0].len(), trace.num_tokens_of(&train));
    for (layer, shares) in shares.iter().enumerate() {
        // Four standard deviations of a frequency over 4000 draws are at most 0.032.
        for ((s, f), exact) in shares.iter().zip(frequency(&scenarios, layer, 64)).zip(frequency(&all, layer, 64)) {
            assert!((6.0 * s - f).abs() < 0.04, "layer {layer}: share {s}, frequency {f}");
            assert!((6.0 * s - exact).abs() < 1e-9);
        }
    }
}

#[test]
fn a_scenario_is_one_step_of_different_sequences() {
    // Three sequences whose tokens all choose experts of their own, the same in both layers.
    let ids: Vec<u8> = (0..12_u8).flat_map(|t| [t / 4, t / 4]).collect();
    let text = meta(12, 4, 1, r#"[{"start": 0, "len": 4}, {"start": 4, "len": 4}, {"start": 8, "len": 4}]"#);
    let trace = RoutingTrace::new(&text, ids).unwrap();
    let two = trace.scenarios(&trace.all(), 2, 50, 1).unwrap();
    assert!(two.layers[0].iter().all(|s| s.len() == 2), "two different sequences");
    assert_eq!(two.layers[0], two.layers[1], "all layers from the same tokens");
    let five = trace.scenarios(&trace.all(), 5, 50, 1).unwrap();
    assert!(five.layers[0].iter().all(|s| s == &[0, 1, 2]), "a longer batch begins anew");
    assert_eq!(two, trace.scenarios(&trace.all(), 2, 50, 1).unwrap());
    assert!(trace.scenarios(&trace.all(), 0, 50, 1).is_err());
    // Side by side: the first token of each third, then the second, ...
    assert_eq!(trace.stream(&trace.all(), 3).unwrap().layers[1], vec![vec![0, 1, 2]; 4]);
    assert_eq!(trace.stream(&trace.all(), 2).unwrap().layers[0][1..3], [vec![0, 1], vec![0, 2]]);
    assert_eq!(trace.stream(&trace.all(), 1).unwrap().layers[0].len(), 12);
    assert!(trace.stream(&trace.all(), 0).is_err() && trace.stream(&trace.all(), 13).is_err());
}

#[test]
fn unrecorded_tokens_are_left_out() {
    let text = meta(3, 4, 1, r#"[{"start": 0, "len": 2}, {"start": 2, "len": 1}]"#);
    let trace = RoutingTrace::new(&text, vec![0, 255, 1, 2, 255, 255]).unwrap();
    let steps = trace.scenarios(&trace.all(), 1, 20, 0).unwrap();
    assert!(steps.layers[0].iter().all(|s| s == &[1]) && steps.layers[1].iter().all(|s| s == &[2]));
    assert_eq!(trace.shares(&trace.all()), [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]);
    assert!(trace.stream(&Part { sequences: vec![1] }, 1).is_err());
}

#[test]
fn every_expert_is_seen_about_64_times() {
    assert_eq!(num_scenarios_for(32, 4, 1), 512);
    assert_eq!(num_scenarios_for(256, 8, 1), 2048);
    assert_eq!(num_scenarios_for(8, 8, 1), 64);
    assert_eq!(num_scenarios_for(64, 6, 4096), 64);
    assert_eq!(num_scenarios_for(4000, 1, 1), 4096);
}

#[test]
fn counts_give_shares_and_independent_steps() {
    let text = r#"{"model": "m", "source": "s", "licence": "l", "n_experts": 3, "top_k": 2, "other": 1,
        "domains": {"all": {"tokens": 6, "counts": [[4, 4, 4], [0, 0, 0]]},
                    "a": {"tokens": 2, "counts": [[3, 1, 0], [0, 0, 0]]}, "b": {"counts": [[1, 3, 4], [0, 0, 0]]}}}"#;
    let table = CountsTable::from_json(text).unwrap();
    let third = 1.0 / 3.0;
    assert_eq!(table.shares(None).unwrap(), [[third; 3], [third; 3]]);
    assert_eq!(table.shares(Some("a")).unwrap()[0], [0.75, 0.25, 0.0]);
    assert!(table.shares(Some("c")).unwrap_err().to_string().contains("a, all, b"));
    for (from, to, word) in
        [("[3, 1, 0]", "[3, 1]", "layer 0"), ("[[1, 3, 4], ", "[", "number of layers"), ("\"top_k\": 2", "\"top_k\": 4", "top_k")]
    {
        assert!(CountsTable::from_json(&text.replace(from, to)).unwrap_err().to_string().contains(word), "{from}");
    }
    // One of two is drawn first in proportion, the other second: expert 0 is in unless 1 and 2 are drawn.
    let shares = vec![vec![0.5, 0.3, 0.2]];
    let steps = independent_scenarios(&shares, 2, 1, 20_000, 9).unwrap();
    let without_0 = 0.3 * 0.2 / 0.7 + 0.2 * 0.3 / 0.8;
    assert!((frequency(&steps, 0, 3)[0] - (1.0 - without_0)).abs() < 0.012);
    // Fewer experts with a share than are chosen.
    let steps = independent_scenarios(&[vec![1.0, 0.0, 0.0]], 2, 1, 50, 9).unwrap();
    assert!(steps.layers[0].iter().all(|s| s.len() == 2 && s[0] == 0));
    assert!(independent_scenarios(&[vec![1.0]], 2, 1, 1, 0).is_err());
    assert!(independent_scenarios(&[vec![1.0, f64::NAN]], 1, 1, 1, 0).is_err());
}

#[test]
fn synthetic_steps_have_the_zipf_skew() {
    let shares = zipf_shares(3, 8, 1.0, 4);
    assert_ne!(shares[0], shares[1], "the order differs between layers");
    let mut sorted = shares[0].clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    assert!((sorted[0] / sorted[3] - 4.0).abs() < 1e-9 && (sorted.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    let steps = synthetic_scenarios(58, 256, 8, 1, 32, 0.5, 7).unwrap();
    assert_eq!((steps.layers.len(), steps.layers[57].len()), (58, 32));
    assert!(steps.layers.iter().flatten().all(|s| s.len() == 8));
    assert_eq!(steps, synthetic_scenarios(58, 256, 8, 1, 32, 0.5, 7).unwrap());
}
