//! EPLB and LLA against the outputs of the original programs, all of them, exactly. Fixtures: `tests/data/balance`.

use serde_json::Value;
use tierwise_planner::balance::eplb::{EplbShape, eplb};
use tierwise_planner::balance::lla::{LlaSettings, lla};

fn cases(text: &str) -> Vec<Value> {
    let value: Value = serde_json::from_str(text).expect("a fixture is JSON");
    value["cases"].as_array().expect("cases").clone()
}

fn of<T: serde::de::DeserializeOwned>(case: &Value, key: &str) -> T {
    serde_json::from_value(case[key].clone()).unwrap_or_else(|e| panic!("{} of {}: {e}", key, case["name"]))
}

#[test]
fn eplb_is_output_equal_to_upstream() {
    let cases = cases(include_str!("data/balance/eplb.json"));
    assert_eq!(cases.len(), 30);
    for case in &cases {
        let name: String = of(case, "name");
        let shape = EplbShape {
            num_replicas: of(case, "num_replicas"),
            num_groups: of(case, "num_groups"),
            num_nodes: of(case, "num_nodes"),
            num_devices: of(case, "num_gpus"),
        };
        assert_eq!(shape.is_hierarchical(), case["policy"] == "hierarchical", "{name}");
        let weight: Vec<Vec<f64>> = of(case, "weight");
        let maps = eplb(&weight, shape).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(maps.physical_to_logical, of::<Vec<Vec<u16>>>(case, "phy2log"), "{name}");
        assert_eq!(maps.logical_to_physical(), of::<Vec<Vec<Vec<u32>>>>(case, "log2phy"), "{name}");
        assert_eq!(maps.logical_count, of::<Vec<Vec<u16>>>(case, "logcnt"), "{name}");
        // Its loads, with every physical replica an equal part.
        for (layer, expected) in of::<Vec<Vec<f64>>>(case, "gpu_loads").iter().enumerate() {
            let per_device = shape.num_replicas / shape.num_devices;
            for (slots, load) in maps.physical_to_logical[layer].chunks(per_device).zip(expected) {
                let of_slot = |e: &u16| weight[layer][usize::from(*e)] / f64::from(maps.logical_count[layer][usize::from(*e)]);
                let sum: f64 = slots.iter().map(of_slot).sum();
                assert!((sum - load).abs() <= 1e-6 * load.max(1.0), "{name}, layer {layer}: {sum} and {load}");
            }
        }
    }
}

#[test]
fn lla_is_output_equal_to_upstream() {
    let cases = cases(include_str!("data/balance/lla.json"));
    assert_eq!(cases.len(), 27);
    for case in &cases {
        let name: String = of(case, "name");
        let settings = LlaSettings {
            num_ranks: of(case, "ep_size"),
            alpha: of(case, "alpha"),
            min_tokens_per_gemm: of(case, "min_tokens_per_gemm"),
        };
        let counts: Vec<u64> = of(case, "counts");
        let plan = lla(&counts, &settings).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(plan.cap, of::<u64>(case, "cap"), "{name}");
        assert_eq!(plan.loads, of::<Vec<u64>>(case, "gpu_loads"), "{name}");
        assert_eq!(plan.forced_tokens, of::<u64>(case, "forced_tokens"), "{name}");
        for expert in 0..counts.len() {
            let runs: Vec<[u64; 3]> = plan.runs[expert].iter().map(|r| [u64::from(r.rank), r.start, r.end]).collect();
            let expected = case["lpt_plan"].get(expert.to_string()).cloned().unwrap_or(Value::Array(Vec::new()));
            assert_eq!(serde_json::to_value(&runs).expect("numbers"), expected, "{name}, expert {expert}");
        }
        let transfers: Vec<[u64; 5]> = plan
            .transfers
            .iter()
            .map(|t| [u64::from(t.expert), u64::from(t.source), u64::from(t.run.rank), t.run.start, t.run.end])
            .collect();
        assert_eq!(transfers, of::<Vec<[u64; 5]>>(case, "weight_transfers"), "{name}");
    }
}

#[test]
fn impossible_shapes_are_refused_by_name() {
    let even = vec![vec![1.0; 8]];
    let shape = |num_replicas, num_groups, num_nodes, num_devices| EplbShape { num_replicas, num_groups, num_nodes, num_devices };
    let row = |w: f64| vec![vec![1.0, 2.0, w, 4.0, 1.0, 1.0, 1.0, 1.0]];
    let ragged = vec![vec![1.0; 8], vec![1.0; 7]];
    #[rustfmt::skip]
    let table: [(&str, &[Vec<f64>], EplbShape, &str); 12] = [
        ("replicas do not divide", &even, shape(10, 1, 1, 4), "replicas is 10, expected a multiple of 4"),
        ("fewer replicas than experts", &even, shape(4, 1, 1, 4), "replicas is 4, expected 8"),
        ("no devices", &even, shape(8, 1, 1, 0), "devices is 0"),
        ("no nodes", &even, shape(8, 1, 0, 4), "nodes is 0"),
        ("no groups", &even, shape(8, 0, 1, 4), "groups is 0"),
        ("groups do not divide experts", &even, shape(8, 3, 1, 4), "groups is 3, expected a divisor of 8"),
        ("devices do not divide among nodes", &even, shape(9, 3, 3, 4), "replicas is 9"),
        ("negative load", &row(-1.0), shape(8, 1, 1, 4), "load of expert 2 in layer 0 is -1"),
        ("load that is no number", &row(f64::NAN), shape(8, 1, 1, 4), "is NaN"),
        ("infinite load", &row(f64::INFINITY), shape(8, 1, 1, 4), "is inf"),
        ("missing experts in a layer", &ragged, shape(8, 1, 1, 4), "experts of layer 1 is 7, expected 8"),
        ("no layers", &[], shape(8, 1, 1, 4), "experts is 0"),
    ];
    for (what, weight, shape, message) in table {
        let error = eplb(weight, shape).expect_err(what).to_string();
        assert!(error.contains(message), "{what}: {error}");
    }
    let settings = |num_ranks, alpha| LlaSettings { num_ranks, alpha, min_tokens_per_gemm: 1 };
    #[rustfmt::skip]
    let table: [(&[u64], LlaSettings, &str); 5] = [
        (&[1, 2, 3], settings(2, 1.0), "devices is 2, expected a divisor of 3"),
        (&[1, 2], settings(0, 1.0), "devices is 0"),
        (&[], settings(1, 1.0), "devices is 1"),
        (&[1, 2], settings(1, f64::NAN), "alpha is NaN"),
        (&[u64::MAX, 2], settings(1, 1.0), "tokens is more than"),
    ];
    for (counts, settings, message) in table {
        let error = lla(counts, &settings).expect_err(message).to_string();
        assert!(error.contains(message), "{error}");
    }
}
