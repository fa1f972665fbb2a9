//! Logits, routing and greedy text of tiny random models, one per family, against the `transformers` library in float32.

mod session_common;

use session_common::*;

/// bf16 weights from safetensors, computed in f32: nothing but the order of additions differs.
#[test]
fn safetensors_agree_with_transformers() {
    for family in FAMILIES {
        let folder = golden(family);
        let reference = json(&folder.join("reference.json"));
        let tokens = ids(&reference["tokens"]);
        let expected = floats(&folder.join("logits.f32"));
        let model = open(&folder);
        let mut s = session(&model, F32_KV);
        let logits = s.logits_all(&tokens).expect("computed");
        let difference = max_difference(logits.as_slice().expect("row-major"), &expected);
        println!("{family} safetensors: max |difference| {difference:.2e}");
        assert!(difference <= 1e-3, "{family}: {difference}");
        let layers = model.spec().layers.len();
        assert_eq!(captured_experts(&s.take_routing(), layers), reference_experts(&reference["routing"]), "{family}");
        let continuation = ids(&reference["greedy"]["tokens"]);
        assert_eq!(greedy(&mut s, &ids(&reference["greedy"]["prompt"]), continuation.len()), continuation, "{family}");
    }
}

#[test]
fn routing_weights_agree_with_transformers() {
    for family in FAMILIES {
        let folder = golden(family);
        let reference = json(&folder.join("reference.json"));
        let mut s = session(&open(&folder), F32_KV);
        s.prefill(&ids(&reference["tokens"])).expect("computed");
        for c in s.take_routing() {
            let weights = reference["routing"][c.layer as usize]["weights"].as_array().expect("an array");
            let weights: Vec<f32> = weights
                .iter()
                .flat_map(|w| w.as_array().expect("an array"))
                .map(|w| w.as_f64().expect("a number") as f32)
                .collect();
            assert!(max_difference(&c.routing.weights, &weights) < 1e-5, "{family} layer {}", c.layer);
        }
    }
}

/// The same weights through the GGUF importer (names, permuted rows of `llama`, shapes).
#[test]
fn gguf_agrees_with_transformers() {
    for family in FAMILIES {
        let folder = golden(family);
        let reference = json(&folder.join("reference.json"));
        let tokens = ids(&reference["tokens"]);
        let expected = floats(&folder.join("logits.f32"));
        let mut s = session(&open(&folder.join("model-bf16.gguf")), F32_KV);
        let logits = s.logits_all(&tokens).expect("computed");
        let rows = logits.rows().into_iter().zip(expected.chunks_exact(logits.ncols()));
        let worst = rows.map(|(a, b)| cosine(a.as_slice().expect("row-major"), b)).fold(1.0, f64::min);
        let difference = max_difference(logits.as_slice().expect("row-major"), &expected);
        println!("{family} GGUF: max |difference| {difference:.2e}, cosine {worst:.7}");
        assert!(worst >= 0.9999, "{family}: {worst}");
        let continuation = ids(&reference["greedy"]["tokens"]);
        assert_eq!(greedy(&mut s, &ids(&reference["greedy"]["prompt"]), continuation.len()), continuation, "{family}");
    }
}

/// The fast executor against the slow one of this crate, which shares neither kernels nor cache nor order of additions.
#[test]
fn executor_agrees_with_its_oracle() {
    for family in FAMILIES {
        for file in ["", "model-bf16.gguf"] {
            let model = open(&if file.is_empty() { golden(family) } else { golden(family).join(file) });
            let tokens = ids(&json(&golden(family).join("reference.json"))["tokens"]);
            let oracle = tierwise_runtime::exec::reference::run(&model, &tokens).expect("computed");
            let mut s = session(&model, F32_KV);
            let logits = s.logits_all(&tokens).expect("computed");
            let expected: Vec<f32> = oracle.logits.iter().map(|x| *x as f32).collect();
            let difference = max_difference(logits.as_slice().expect("row-major"), &expected);
            println!("{family} {file}: max |difference| to the oracle {difference:.2e}");
            assert!(difference < 2e-4, "{family} {file}: {difference}");
            let experts = |t: &Vec<(u32, f64)>| t.iter().map(|(e, _)| *e).collect();
            let expected: Vec<Vec<Vec<u32>>> = oracle.routing.iter().map(|l| l.tokens.iter().map(experts).collect()).collect();
            assert_eq!(captured_experts(&s.take_routing(), expected.len()), expected, "{family} {file}");
        }
    }
}
